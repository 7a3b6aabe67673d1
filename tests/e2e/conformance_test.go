//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
	"github.com/twinsan/twinsan/tests/lab"
)

// verdicts say of tests of libiscsi's suite, by name, what else than "passed" is
// right, with the reason. Everything that is not listed must pass. A test on a
// list that passes all the same fails the run, so that the lists stay true.
type verdicts []struct{ names, reason string }

func (v verdicts) find(name string) (reason string, ok bool) {
	for _, e := range v {
		if regexp.MustCompile(`^(?:` + e.names + `)$`).MatchString(name) {
			return e.reason, true
		}
	}
	return "", false
}

// profile is a kind of logical unit that the suite runs against.
type profile struct {
	name     string
	create   []string // flags of "volume create"
	readOnly bool     // mapped read-only
	chap     bool     // the initiators have to prove who they are
	paths    int      // URLs that the suite gets: 1 through node a, 2 through both
	moving   bool     // another node owns the unit in each test
	short    string   // suites that "make test" runs
	not      string   // tests that are about something else than this unit
	skips    verdicts
	failures verdicts
	// sometimes may skip or fail, by the timing of the moves.
	sometimes verdicts
}

// Skips on every unit: what we do not offer.
var neverOffered = verdicts{
	{`PreventAllow\..*|NoMedia\..*|StartStopUnit\..*`, "the medium is not removable"},
	{`Sanitize\.CryptoErase`, "volumes are not encrypted"},
}

// partSkips are lines in which a test says that it leaves out a part of itself;
// what it does apart from that counts.
var partSkips = verdicts{
	{`Sanitize\.(Readonly|Reservations): .*CRYPTO_ERASE.*`, "volumes are not encrypted"},
	{`Sanitize\.(Readonly|Reservations): .*BLOCK_ERASE.*`, "the unit is fully provisioned"},
	{`WriteAtomic16\.VPD: .*(alignment|granularity) restrictions.*`, "atomic writes have none"},
}

var writable = verdicts{{`ReadOnly\..*`, "the unit is writable"}}
var onePath = verdicts{{`MultipathIO\..*`, "one path"}}

// wrongTests fail on every target that keeps to the standards.
var wrongTests = verdicts{
	{`iSCSITMF\.LUNResetSimpleAsync`, "it demands the answer to the reset before it has sent the reset"},
	{`WriteSame10\.UnmapUntilEnd`, "it sends WRITE SAME with UNMAP and a block of 0xFF and wants zeros back; SBC-3 lets a unit with LBPRZ=1 unmap only " +
		"what then reads as the block that was sent, so we write the block"},
}

var on512e = verdicts{
	{`GetLBAStatus\.UnmapSingle`, "it unmaps single logical blocks of a unit whose granularity is eight, and wants each deallocated"},
}

var smallUnit = verdicts{
	{`Sanitize\.Reset`, "the sanitize operation of a small unit has ended before the reset comes"},
}

var aligned = verdicts{
	{`WriteSame(10|16)\.UnmapUnaligned|.*\.InvalidDataOutSize`, "the physical block is one logical block"},
}

var on4Kn = verdicts{
	{`ProutReserve\.Access.*`, "it writes one block with 512 bytes of data, whatever the block size"},
}

var profiles = []profile{
	{name: "thin-512e", paths: 2, short: `.`, skips: slices.Concat(neverOffered, writable), failures: slices.Concat(wrongTests, on512e), sometimes: smallUnit},
	{name: "thin-512n", create: []string{"--physical-block", "512"}, paths: 1,
		short: `Inquiry|GetLBAStatus|ReadCapacity16|Unmap|WriteSame16`,
		skips: slices.Concat(neverOffered, writable, onePath, aligned), failures: wrongTests, sometimes: smallUnit},
	{name: "thick", create: []string{"--thick"}, paths: 1,
		short: `Inquiry|GetLBAStatus|ReadCapacity16|Unmap|WriteSame16`,
		skips: slices.Concat(neverOffered, writable, onePath, verdicts{
			{`Unmap\..*|WriteSame(10|16)\.Unmap(|Unaligned|UntilEnd)|.*\.InvalidDataOutSize|GetLBAStatus\.UnmapSingle|Inquiry\.BlockLimits|Sanitize\.BlockErase`,
				"the unit is fully provisioned"},
		}), failures: wrongTests[:1], sometimes: smallUnit},
	{name: "thin-4Kn", create: []string{"--block-size", "4096"}, paths: 1,
		short: `Inquiry|CompareAndWrite|Read16|Unmap|Write16|WriteSame16|iSCSIResiduals`,
		skips: slices.Concat(neverOffered, writable, onePath, aligned), failures: slices.Concat(wrongTests, on4Kn), sometimes: smallUnit},
	{name: "read-only", readOnly: true, paths: 1, short: `ReadOnly|Inquiry|ModeSense6|Read16`,
		not: `CompareAndWrite\.|ExtendedCopy\.(Simple|Valid)|GetLBAStatus\.Unmap|OrWrite\.|ProutReserve\.Access|ReceiveCopyResults\.CopyStatus|Sanitize\.|` +
			`Unmap\.|Write|iSCSIResiduals\.Write|iSCSITMF\.|MultipathIO\.`, // they write and look what came of it
		skips: neverOffered},
	{name: "chap", chap: true, paths: 2, short: `TestUnitReady|Read10|Reserve6|iSCSI|MultipathIO`,
		skips: slices.Concat(neverOffered, writable), failures: slices.Concat(wrongTests, on512e), sometimes: smallUnit},
	{name: "moving", paths: 2, moving: true,
		short: `CompareAndWrite|Prout|Reserve6|Unmap|MultipathIO|ExtendedCopy`,
		skips: slices.Concat(neverOffered, writable), failures: slices.Concat(wrongTests, on512e), sometimes: smallUnit},
}

// testMax is how long one test may take.
const testMax = time.Minute

// slowTest is how long one may take before that is worth a line.
const slowTest = 2 * time.Second

// TestConformance runs libiscsi's conformance suite against every kind of unit.
// Each test is a process of its own, so that one that hangs or breaks its
// session does not spoil the others.
func TestConformance(t *testing.T) {
	tool, err := lab.Tool("iscsi-test-cu")
	if err != nil {
		t.Fatal(err)
	}
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	names, err := conformanceTests(r.ctx, tool)
	r.must(err, "list the tests")
	for i := range profiles {
		p := &profiles[i]
		t.Run(p.name, func(t *testing.T) {
			scenario(t)
			for range *conformRuns {
				p.run(t, r, tool, names)
			}
		})
	}
}

func (p *profile) run(t *testing.T, r *rig, tool string, names []string) {
	pattern := *conformWith
	if pattern == "" {
		pattern = `^(?:` + p.short + `)`
	}
	chosen, err := regexp.Compile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	volume := "c-" + strings.ToLower(p.name)
	v, err := r.c.CreateVolume(r.ctx, volume, "256M", p.create...)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.c.DeleteVolume(r.ctx, volume); err != nil {
			t.Error(err)
		}
	}()
	if p.readOnly {
		// The suite's initiators, as a host that may only read.
		for _, args := range [][]string{
			{"host", "add", volume, suiteInitiator, suiteInitiator + "-2"},
			{"volume", "map", volume, "--host", volume, "--read-only"},
		} {
			if _, err := r.c.CLI(r.ctx, args...); err != nil {
				t.Fatal(err)
			}
		}
		defer r.c.CLI(r.ctx, "host", "remove", volume, "--yes")
	}
	urls := []string{r.c.URL("a", v.LUN), r.c.URL("b", v.LUN)}[:p.paths]
	if p.chap {
		var host struct {
			Host struct {
				User string `json:"chap_user"`
			} `json:"host"`
			Secret string `json:"chap_secret"`
		}
		if err := r.c.JSON(r.ctx, &host, "host", "add", volume, suiteInitiator, suiteInitiator+"-2", "--chap"); err != nil {
			t.Fatal(err)
		}
		defer r.c.CLI(r.ctx, "host", "remove", volume, "--yes")
		for i := range urls {
			// The other node knows it a moment later.
			r.must(lab.Until(r.ctx, 5*time.Second, func() error {
				if _, err := lab.Run(r.ctx, tool, "-t", "ALL.TestUnitReady.Simple", urls[i]); err == nil {
					return errors.New("a session without CHAP was let in")
				}
				return nil
			}), "path %d", i)
			urls[i] = strings.Replace(urls[i], "iscsi://", "iscsi://"+host.Host.User+"%"+host.Secret+"@", 1)
		}
	}
	// What one test leaves on the medium must not decide another: some initialise less
	// than they look at.
	eraser := r.host("eraser", v.LUN, "a", "b")
	defer eraser.close()
	block := make([]byte, 512)
	if slices.Contains(p.create, "4096") {
		block = make([]byte, 4096)
	}
	result := map[string][]string{}
	start := time.Now()
	for i, name := range names {
		if !chosen.MatchString(name) || p.not != "" && regexp.MustCompile(`^(?:`+p.not+`)`).MatchString(name) {
			continue
		}
		if p.moving {
			// A test takes no unit attention but those at its start, so it runs from one
			// move to the next.
			if _, err := r.c.CLI(r.ctx, "volume", "move", volume, "--to", r.c.Nodes[i%2].Name); err != nil {
				t.Fatal(err)
			}
		}
		if !p.readOnly {
			eraser.result("WRITE SAME", initiator.WriteSame16(0, 4096, false), block, 0)
		}
		args := append([]string{"-d", "-S", "-V", "-t", "ALL." + name}, urls...)
		began := time.Now()
		verdict, detail := conform(r.ctx, tool, name, args)
		if took := time.Since(began); took > slowTest {
			t.Logf("%s took %.1f s", name, took.Seconds())
		}
		verdict = p.judge(t, name, verdict, detail, fmt.Sprintf("%s; iscsi-test-cu %s", r.c.Repeat(), strings.Join(args, " ")))
		result[verdict] = append(result[verdict], name)
	}
	p.report(t, result, time.Since(start))
}

// judge holds what came of a test against the lists, and names it for the report.
func (p *profile) judge(t *testing.T, name, verdict, detail, repeat string) string {
	t.Helper()
	skip, maySkip := p.skips.find(name)
	failure, mayFail := p.failures.find(name)
	sometimes, mayBoth := p.sometimes.find(name)
	switch {
	case mayBoth && verdict != "passed":
		t.Logf("%s %s: %s", name, verdict, sometimes)
		verdict += " as may be"
	case mayFail && verdict == "failed":
		verdict = "failed as expected"
		t.Logf("%s: %s", name, failure)
	case maySkip && verdict == "skipped", !maySkip && !mayFail && verdict == "passed", mayBoth:
	case verdict == "failed":
		t.Errorf("%s\n%s\nrepeat: %s", name, detail, repeat)
	case verdict == "skipped":
		t.Errorf("%s was skipped: %s", name, detail)
	default:
		t.Errorf("%s passes: take it off the lists (%s%s)", name, skip, failure)
	}
	return verdict
}

// report says how many tests came out how.
func (p *profile) report(t *testing.T, result map[string][]string, took time.Duration) {
	t.Helper()
	if len(result["passed"]) == 0 {
		t.Error("no test passed")
	}
	var counts []string
	for _, verdict := range slices.Sorted(maps.Keys(result)) {
		counts = append(counts, fmt.Sprintf("%d %s", len(result[verdict]), verdict))
		if verdict != "passed" {
			t.Logf("%s: %s", verdict, strings.Join(result[verdict], " "))
		}
	}
	t.Logf("conformance of %s: %s in %.0f s", p.name, strings.Join(counts, ", "), took.Seconds())
}

// suiteInitiator is the name that the suite logs in with; its second one has "-2" behind.
const suiteInitiator = "iqn.2007-10.com.github:sahlberg:libiscsi:iscsi-test"

// conformanceTests lists SUITE.TEST of the suite.
func conformanceTests(ctx context.Context, tool string) ([]string, error) {
	out, err := lab.Run(ctx, tool, "--list")
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "ALL."); ok && strings.Contains(name, ".") {
			names = append(names, name)
		}
	}
	if len(names) < 100 {
		return nil, fmt.Errorf("%d tests: is this libiscsi 1.19?\n%s", len(names), out)
	}
	return names, nil
}

var skipped = regexp.MustCompile(`\[SKIPPED\][^\n]*`)

var asserts = regexp.MustCompile(`asserts\s+(\d+)\s+\d+\s+\d+\s+(\d+)`)

// conform runs one test. The suite calls a test passed that skipped itself, and
// one that asserted nothing; some tests that look at pages say SUCCESS instead.
func conform(ctx context.Context, tool, name string, args []string) (verdict, detail string) {
	ctx, cancel := context.WithTimeout(ctx, testMax)
	defer cancel()
	c := exec.CommandContext(ctx, tool, args...)
	c.WaitDelay = 5 * time.Second
	out, err := c.CombinedOutput()
	text := strings.TrimSpace(string(out))
	m := asserts.FindStringSubmatch(text)
	skip := ""
	for _, line := range skipped.FindAllString(text, -1) {
		if _, part := partSkips.find(name + ": " + line); !part {
			skip = line
		}
	}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return "failed", fmt.Sprintf("it hangs: killed after %s\n%s", testMax, text)
	case err != nil, m == nil, m[2] != "0":
		return "failed", fmt.Sprintf("%v\n%s", err, text)
	case skip != "":
		return "skipped", skip
	case m[1] == "0" && !strings.Contains(text, "[SUCCESS]"):
		return "skipped", "nothing was asserted"
	}
	return "passed", ""
}
