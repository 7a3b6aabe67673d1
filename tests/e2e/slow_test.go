//go:build e2e

package e2e

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// checkedOnly skips the test unless the program has what only tests use.
func checkedOnly(t *testing.T) {
	t.Helper()
	info, err := buildinfo.ReadFile(*program)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(info.Settings, debug.BuildSetting{Key: "-tags", Value: "invariants"}) {
		t.Skip("needs a binary with the tag invariants: make bin/twinsan-checked")
	}
}

// TestSlowDevice makes the disk of the replica slow, and then that of the owner, under
// verified load: within a minute it is reported and its node stands aside, the load is
// as fast as before, and the node comes back when its disk is well again.
func TestSlowDevice(t *testing.T) {
	checkedOnly(t)
	if *rounds <= 3 {
		t.Skip("takes five minutes: make e2e RUN=TestSlowDevice with the binary of bin/twinsan-checked, -rounds 4")
	}
	t.Setenv("TWINSAN_SLOW", ".slow")
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:512M"}})
	load := r.verify(r.both(r.volume("demo").LUN), 0, 32*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	r.must(r.elapse(load, 45*time.Second), "the usual") // what is usual has to be known
	for _, role := range []string{"replica", "owner"} {
		v := r.volume("demo")
		node := v.Owner
		if role == "replica" {
			node = v.Other()
		}
		disk := r.c.Node(node).Devices[0]
		before := r.rate(load)
		r.must(os.WriteFile(disk+".slow", []byte("400"), 0o600), "slow")
		begun := time.Now()
		during := r.rate(load)
		reported := time.Duration(0)
		r.must(lab.Until(r.ctx, 2*time.Minute, func() error {
			if list, err := r.devices(node); err == nil && len(list) > 0 && list[0].State == "slow" && reported == 0 {
				reported = time.Since(begun)
			}
			v, err := r.c.Volume(r.ctx, "demo")
			if err != nil {
				return err
			}
			for _, x := range v.Replicas {
				if x.Node == node && x.State == "in_sync" || v.Owner == node || reported == 0 {
					return fmt.Errorf("reported after %s; owner %s, replica on %s %s", reported, v.Owner, x.Node, x.State)
				}
			}
			return nil
		}), "the slow node stands aside")
		aside := time.Since(begun)
		after := r.rate(load)
		r.Logf("%s on node %s: reported after %.0f s, aside after %.0f s; writes a second: %.0f before, %.0f slow, %.0f aside", role, node, reported.Seconds(), aside.Seconds(), before, during, after)
		if reported > time.Minute {
			r.Errorf("reported after %s", reported)
		}
		if after < 2*during {
			r.Errorf("%.0f writes a second without the slow disk, %.0f with it", after, during)
		}
		r.must(os.WriteFile(disk+".slow", []byte(strconv.Itoa(0)), 0o600), "well")
		well := time.Now()
		r.must(r.c.WaitHealthy(r.ctx, 5*time.Minute), "back")
		r.Logf("back in sync %.0f s after the disk was well", time.Since(well).Seconds())
	}
	load.stop()
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL("a", r.volume("demo").LUN))
}

// rate is how many writes are acknowledged in a second, over five.
func (r *rig) rate(load *verified) float64 {
	r.Helper()
	first, begun := load.acked(), time.Now()
	select {
	case <-time.After(5 * time.Second):
	case <-r.ctx.Done():
	}
	return float64(load.acked()-first) / time.Since(begun).Seconds()
}
