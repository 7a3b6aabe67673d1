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

	"github.com/twinsan/twinsan/tests/lab"
)

// expectedFailures are tests of libiscsi's suite that fail although we are right,
// or that ask for what we refuse on purpose, with the reason. A test in this
// list that passes is reported, so that the list stays short.
var expectedFailures = map[string]string{
	"iSCSITMF.LUNResetSimpleAsync": "the test demands the answer to the reset before it has sent the reset; no target can pass it when it runs alone",
	"WriteSame10.UnmapUntilEnd": "it sends WRITE SAME with UNMAP and a block of 0xFF and wants zeros back; SBC-4 lets a device unmap only what then " +
		"reads as the block that was sent, so we write the block",
	"iSCSIdatasn.iSCSIDataSnInvalid": "we close the connection on a wrong DataSN, as error recovery level 0 asks; the suite then logs in again and sends " +
		"its third write with immediate data, so that no wrong DataSN reaches us and the write succeeds",
	"MultipathIO.Reset": "a LOGICAL UNIT RESET reaches the nexuses of the node that got it, and not yet those of the other node",
}

// mustNotSkip are suites about commands that we have: a test that the suite
// leaves out here means that we announce too little.
var mustNotSkip = regexp.MustCompile(`^(Read(6|10|12|16)|Write(10|12|16)|ReadCapacity(10|16)|TestUnitReady|Unmap|CompareAndWrite|ModeSense6)\.(Simple|BeyondEol|ZeroBlocks)$`)

// shortSuites run in "make test"; "make conformance" runs all.
const shortSuites = `^(CompareAndWrite|Inquiry|Mandatory|ModeSense6|Read|TestUnitReady|Unmap|Write(10|16|Same10|Same16)|ReportSupportedOpcodes|iSCSI|MultipathIO)`

// testMax is how long one test may take.
const testMax = time.Minute

// TestConformance runs libiscsi's conformance suite against an LU, through node
// a and, for tests of several paths, node b. Each test is a process of its own,
// so that one that hangs or breaks its session does not spoil the others.
func TestConformance(t *testing.T) {
	scenario(t)
	pattern := *conformWith
	if pattern == "" {
		pattern = shortSuites
	}
	chosen, err := regexp.Compile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	tool, err := lab.Tool("iscsi-test-cu")
	if err != nil {
		t.Fatal(err)
	}
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:256M"}})
	lun := r.volume("demo").LUN
	names, err := conformanceTests(r.ctx, tool)
	r.must(err, "list the tests")
	result := map[string][]string{}
	for _, name := range names {
		if !chosen.MatchString(name) {
			continue
		}
		args := []string{"-d", "-t", "ALL." + name, r.c.URL("a", lun), r.c.URL("b", lun)}
		verdict, detail := conform(r.ctx, tool, name, args)
		reason, expected := expectedFailures[name]
		switch {
		case verdict == "failed" && expected:
			verdict = "failed as expected"
			t.Logf("%s: %s", name, reason)
		case verdict == "failed":
			t.Errorf("%s\n%s\nrepeat: %s; iscsi-test-cu %s", name, detail, r.c.Repeat(), strings.Join(args, " "))
		case verdict == "passed" && expected:
			t.Errorf("%s passes: take it off the list of expected failures", name)
		case verdict == "skipped" && mustNotSkip.MatchString(name):
			t.Errorf("%s was skipped: %s", name, detail)
		}
		result[verdict] = append(result[verdict], name)
	}
	if len(result["passed"]) == 0 {
		t.Errorf("no test of %q passed", pattern)
	}
	var counts []string
	for _, verdict := range slices.Sorted(maps.Keys(result)) {
		counts = append(counts, fmt.Sprintf("%d %s", len(result[verdict]), verdict))
		if verdict != "passed" {
			t.Logf("%s: %s", verdict, strings.Join(result[verdict], " "))
		}
	}
	t.Logf("conformance: %s", strings.Join(counts, ", "))
}

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
// one that asserted nothing.
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
		// The set-up of every test asks for reservations to clear, and says so when
		// there are none to be had. That is no skip of a test about something else.
		if !strings.Contains(line, "PERSISTENT RESERVE") || strings.HasPrefix(name, "Prin") || strings.HasPrefix(name, "Prout") {
			skip = line
			break
		}
	}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return "failed", fmt.Sprintf("it hangs: killed after %s\n%s", testMax, text)
	case err != nil, m == nil, m[2] != "0":
		return "failed", fmt.Sprintf("%v\n%s", err, text)
	case skip != "":
		return "skipped", skip
	case m[1] == "0":
		return "skipped", "nothing was asserted"
	}
	return "passed", ""
}
