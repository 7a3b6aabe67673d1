//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestStop stops nodes as a service manager does, owner and replica, under verified
// load: the others have taken over before the process ends, so the pause is that of
// a planned move.
func TestStop(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:256M"}})
	longest := time.Duration(0)
	for round := range 2 * *rounds {
		load := r.verify(r.both(r.volume("demo").LUN), 0, 32*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
		load.progress(100+r.rand.Int64N(1000), 30*time.Second)
		v := r.volume("demo")
		node := v.Owner
		if round%2 == 1 {
			node = v.Other()
		}
		r.demo("stop", node)
		load.progress(200, 30*time.Second)
		r.demo("start", node)
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "round %d: recovery", round)
		result := load.stop()
		pause := time.Duration(result.Failover.MaxGapMS * float64(time.Millisecond))
		longest = max(longest, pause)
		if pause > plannedMax {
			r.Errorf("round %d (%s of owner %s): the initiator waited %s, allowed are %s", round, node, v.Owner, pause, plannedMax)
		}
		if result.Errors.SCSI != 0 {
			r.Errorf("round %d: the initiator saw %+v", round, result.Errors)
		}
		r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
		load.check(r.c.URL([]string{"a", "b"}[round%2], v.LUN))
		r.Logf("round %d: node %s stopped (owner %s), pause %.0f ms, %d writes", round, node, v.Owner, result.Failover.MaxGapMS, load.acked())
	}
	r.Logf("longest pause %s", longest)
}

// TestMaintenance takes a node out for a while: its volumes leave it, its absence is
// no alarm, the other node may not follow, and afterwards its volumes come back.
func TestMaintenance(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:256M"}})
	r.cli("cluster", "set", "balance", "on", "--after", "2s")
	load := r.verify(r.both(r.volume("demo").LUN), 0, 32*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	v := r.volume("demo")
	node, stays := v.Owner, v.Other()
	r.cli("node", "maintenance", node, "enter")
	if owner := r.volume("demo").Owner; owner != stays {
		r.Fatalf("the volume is owned by %s", owner)
	}
	r.demo("stop", node)
	load.progress(200, 30*time.Second)
	s, err := r.c.Status(r.ctx)
	r.must(err, "status")
	if s.Health != "healthy" {
		r.Errorf("a node in maintenance is an alarm: %s, %+v", s.Health, s.Problems)
	}
	if why := r.refused("node", "maintenance", stays, "enter"); !strings.Contains(why, "demo") || !strings.Contains(why, "quorum") {
		r.Errorf("refused without saying who is hurt: %s", why)
	}
	out, err := r.c.CLI(r.ctx, "status")
	r.must(err, "status")
	if text := string(out); !strings.Contains(text, "next failure: the failure of node "+stays) || !strings.Contains(text, "maintenance") {
		r.Errorf("status does not tell of the risk:\n%s", text)
	}
	r.demo("start", node)
	r.cli("node", "maintenance", node, "leave")
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "recovery")
	r.must(lab.Until(r.ctx, time.Minute, func() error {
		if owner := r.volume("demo").Owner; owner != node {
			return fmt.Errorf("it is owned by %s", owner)
		}
		return nil
	}), "the volume goes back to node %s", node)
	load.progress(200, 30*time.Second)
	r.unharmed(load, "maintenance")
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL(node, v.LUN))
}

// TestQuorumLost loses one of two nodes and the witness for good: the node that is
// left goes on alone when it is told to, with everything that was acknowledged, and
// the lost ones can be taken out.
func TestQuorumLost(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:256M"}})
	v := r.volume("demo")
	load := r.verify(r.both(v.LUN), 0, 32*mib, "--iodepth", "8")
	load.progress(500, 30*time.Second)
	load.stop()
	lost, left := "a", "b" // the command line asks the first node that runs
	recover := func(args ...string) error {
		_, err := lab.Run(r.ctx, r.c.Binary, append([]string{"cluster", "recover", "--config", filepath.Join(r.c.Node(left).Dir, "twinsan.toml")}, args...)...)
		return err
	}
	r.demo("kill", "w")
	r.demo("kill", lost)
	if recover("--lost", lost+",w", "--confirm", "demo") == nil {
		r.Fatal("recovered while the node runs")
	}
	r.demo("stop", left)
	for _, refused := range [][]string{{"--lost", lost, "--confirm", "demo"}, {"--lost", lost + ",w", "--confirm", "other"}, {"--lost", lost + ",w"}} {
		var exit *lab.ExitError
		if err := recover(refused...); !errors.As(err, &exit) || exit.Code != lab.ExitRefused {
			r.Errorf("recover %v: %v", refused, err)
		}
	}
	r.must(recover("--lost", lost+",w", "--confirm", "demo"), "recover")
	r.demo("start", left)
	r.must(lab.Until(r.ctx, time.Minute, func() error {
		v, err := r.c.Volume(r.ctx, "demo")
		if err == nil && (v.Owner != left || v.State != "degraded") {
			err = fmt.Errorf("%s, owned by %s", v.State, v.Owner)
		}
		return err
	}), "the volume is served")
	load.check(r.c.URL(left, v.LUN))
	r.refused("node", "remove", lost, "--yes") // it has a copy: only with --lost
	r.cli("node", "remove", lost, "--lost", "--yes")
	r.cli("node", "remove", "w", "--yes")
	s, err := r.c.Status(r.ctx)
	r.must(err, "status")
	if len(s.Nodes) != 1 || s.Health != "healthy" {
		r.Errorf("%s: %+v", s.Health, s.Nodes)
	}
}
