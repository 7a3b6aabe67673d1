//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
	"github.com/twinsan/twinsan/tests/lab"
)

// trial is a fault that a test of the conformance suite begins under.
//
// A change of the in-sync set or of the owner changes states of ports, which SPC wants
// told by a unit attention at the next command, and tests of the suite take none but at
// their start. So before a test begins everything has changed that is going to, and what
// comes back meanwhile has so much to catch up with that it is not in sync before the
// test has ended. If it was all the same, the test is repeated.
type trial struct {
	name string
	both bool // the test has both paths; else the owner's: the other one is unavailable
	// hurt returns when the volume is served again. owner and other are as before.
	hurt func(r *trialRig, owner, other string)
	// meanwhile happens while the test runs, and heal after it; nil: nothing.
	meanwhile, heal func(r *trialRig, owner, other string)
}

// trialVolume is what the tests run on.
const trialVolume = "c-faults"

// behind is what a replica has to catch up with while a test runs, and where that is
// written: behind everything that tests touch.
const (
	behind   = 40 * mib
	behindAt = 160 * mib
)

// trialRig is a cluster whose one volume the tests run on.
type trialRig struct {
	*netRig
	tool   string // the suite, where the initiators are
	lun    int
	eraser *host
}

var trials = []trial{
	{
		name: "replica killed and started: it is filled meanwhile",
		hurt: func(r *trialRig, owner, other string) {
			r.must(r.n.Kill(r.ctx, other), "kill")
			r.alone(owner)
			r.dirty(owner)
			r.must(r.n.Start(r.ctx, other), "start")
			r.must(lab.Until(r.ctx, 30*time.Second, func() error {
				v, err := r.via(owner)
				if err == nil && !slices.ContainsFunc(v.Replicas, func(x lab.Replica) bool { return x.Total > 0 }) {
					err = fmt.Errorf("the replicas are %+v", v.Replicas)
				}
				return err
			}), "node %s is filled", other)
		},
	},
	{
		name: "owner killed and started", both: true,
		hurt: func(r *trialRig, owner, other string) {
			r.must(r.n.Kill(r.ctx, owner), "kill")
			r.alone(other)
			r.must(r.n.Start(r.ctx, owner), "start")
			r.must(r.n.WaitServed(r.ctx, time.Minute), "node %s is back", owner)
		},
	},
	{
		name: "owner frozen, wakes meanwhile",
		hurt: func(r *trialRig, owner, other string) {
			r.must(r.n.Signal(owner, syscall.SIGSTOP), "freeze")
			r.alone(other)
			r.dirty(other)
		},
		meanwhile: func(r *trialRig, owner, _ string) { r.must(r.n.Signal(owner, syscall.SIGCONT), "wake") },
	},
	{
		name: "witness away", both: true,
		hurt: func(r *trialRig, _, _ string) { r.must(r.n.Kill(r.ctx, "w"), "kill") },
		heal: func(r *trialRig, _, _ string) { r.must(r.n.Start(r.ctx, "w"), "start") },
	},
	{
		name: "link between the nodes cut, and healed meanwhile",
		hurt: func(r *trialRig, owner, other string) {
			r.cut(owner, other)
			r.alone(owner)
			r.dirty(owner)
		},
		meanwhile: func(r *trialRig, owner, other string) { r.mend(owner, other) },
	},
}

// via asks one node, whatever the others do, for the volume.
func (r *trialRig) via(node string) (*lab.Volume, error) {
	out, err := r.n.On(r.ctx, node, "--timeout", "2s", "volume", "show", trialVolume, "-o", "json")
	var exit *lab.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.Code == lab.ExitDegraded) {
		return nil, err
	}
	var page struct {
		Volume lab.Volume `json:"volume"`
	}
	return &page.Volume, json.Unmarshal(out, &page)
}

// alone waits until a node owns the volume and the other one does not count.
func (r *trialRig) alone(node string) {
	r.Helper()
	r.must(lab.Until(r.ctx, 30*time.Second, func() error {
		v, err := r.via(node)
		if err == nil && (v.Owner != node || !slices.Equal(v.ServedBy, []string{node})) {
			err = fmt.Errorf("%s owns it, served by %v", v.Owner, v.ServedBy)
		}
		return err
	}), "node %s alone", node)
}

// dirty writes new content, of which one that comes back has nothing.
func (r *trialRig) dirty(node string) {
	r.Helper()
	r.load("--rw", "write", "--once", "--bs", "1m", "--iodepth", "8", "--offset", fmt.Sprint(behindAt), "--size", fmt.Sprint(behind),
		"--seed", fmt.Sprint(r.rand.Uint64()>>1), r.c.URL(node, r.lun))
}

// TestConformanceFaults runs libiscsi's conformance suite with a fault before each test,
// one kind after the other: what stands in the lists must come out, as without faults.
func TestConformanceFaults(t *testing.T) {
	if *conformWith == "" {
		t.Skip("five seconds for each test: make conformance")
	}
	tool, err := lab.Tool("iscsi-test-cu")
	if err != nil {
		t.Fatal(err)
	}
	scenario(t)
	p := &profile{name: "faults", paths: 2,
		skips: slices.Concat(neverOffered, writable), failures: slices.Concat(wrongTests, on512e), sometimes: smallUnit}
	chosen, err := regexp.Compile(*conformWith)
	if err != nil {
		t.Fatal(err)
	}
	r := &trialRig{netRig: upNetwork(t, lab.NetworkOptions{DeviceSize: "4G", Nodes: []string{"a", "b"}, Volumes: []string{trialVolume + ":256M"}})}
	names, err := conformanceTests(r.ctx, tool)
	r.must(err, "list the tests")
	r.tool, err = r.n.Inside(tool)
	r.must(err, "the suite's place")
	r.lun = r.volume(trialVolume).LUN
	r.eraser = r.host("eraser", r.lun, "a", "b")
	// Nothing moves by itself in the middle of a test.
	_, err = r.c.CLI(r.ctx, "cluster", "set", "balance", "off")
	r.must(err, "balance")
	result := map[string][]string{}
	counts := make([]int, len(trials))
	repeated, next, start := 0, 0, time.Now()
	for _, name := range names {
		if !chosen.MatchString(name) {
			continue
		}
		for try := 1; ; try++ {
			x := next % len(trials)
			for !trials[x].both && strings.HasPrefix(name, "MultipathIO.") {
				x = (x + 1) % len(trials)
			}
			next++
			verdict, detail, quiet := r.try(&trials[x], name)
			if verdict == "failed" && !quiet && try < 4 {
				repeated++
				t.Logf("%s under %q: paths changed in the middle of it, it is repeated", name, trials[x].name)
				continue
			}
			counts[x]++
			verdict = p.judge(t, name, verdict, detail, fmt.Sprintf("under %q", trials[x].name))
			result[verdict] = append(result[verdict], name)
			break
		}
		if t.Failed() {
			break
		}
	}
	for i, n := range counts {
		t.Logf("%4d tests: %s", n, trials[i].name)
	}
	t.Logf("%d repeated", repeated)
	p.report(t, result, time.Since(start))
	r.must(r.c.CheckEqual(r.ctx, trialVolume), "volume check")
}

// try runs one test under a fault. quiet: no path changed while it ran.
func (r *trialRig) try(x *trial, name string) (verdict, detail string, quiet bool) {
	r.Helper()
	rate := func(to string) {
		_, err := r.c.CLI(r.ctx, "cluster", "set", "resync-rate", to)
		r.must(err, "rate of resyncs")
	}
	if !x.both {
		rate("10")
	}
	v := r.volume(trialVolume)
	owner, other := v.Owner, v.Other()
	start := time.Now()
	x.hurt(r, owner, other)
	hurt := time.Since(start)
	now := owner
	if v, err := r.via(other); err == nil {
		now = v.Owner
	}
	nodes := []string{now}
	if x.both {
		nodes = []string{"a", "b"}
	}
	var urls []string
	for _, node := range nodes {
		url := r.c.URL(node, r.lun)
		r.must(lab.Until(r.ctx, 20*time.Second, func() error {
			_, err := lab.Run(r.ctx, r.tool, "-t", "ALL.TestUnitReady.Simple", url)
			return err
		}), "%s: node %s answers", x.name, node)
		urls = append(urls, url)
	}
	// What one test leaves on the medium must not decide another.
	r.eraser.close() // it may wait for a node that stands still
	r.eraser.at = slices.Index(r.eraser.nodes, now)
	r.eraser.result("WRITE SAME", initiator.WriteSame16(0, 4096, false), make([]byte, 512), 0)
	before, err := r.via(now)
	r.must(err, "volume")
	ready := time.Since(start) - hurt
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		verdict, detail = conform(r.ctx, r.tool, name, append([]string{"-d", "-S", "-V", "-t", "ALL." + name}, urls...))
	}()
	if x.meanwhile != nil {
		r.wait(20 * time.Millisecond) // it logs in
		x.meanwhile(r, owner, other)
	}
	<-ended
	ran := time.Since(start) - ready - hurt
	after, err := r.via(now)
	r.must(err, "volume")
	if x.heal != nil {
		x.heal(r, owner, other)
	}
	if !x.both {
		rate("auto")
	}
	r.must(r.n.WaitServed(r.ctx, time.Minute), "%s: recovery", x.name)
	r.Logf("%s under %q: paths changed after %.1f s, ready after another %.1f s, it ran %.1f s, all well after another %.1f s",
		name, x.name, hurt.Seconds(), ready.Seconds(), ran.Seconds(), (time.Since(start) - ran - ready - hurt).Seconds())
	return verdict, detail, before.Epoch == after.Epoch
}
