//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestDeviceFull fills the pools. Writes that need room fail with the sense that
// the standard has for it; reads, overwrites and deletes go on, nothing that was
// acknowledged is lost, and room that is given back can be used.
func TestDeviceFull(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "1G", Volumes: []string{"demo:128M", "ballast:4G"}})
	v, ballast := r.volume("demo"), r.volume("ballast")
	// All blocks of the range are written, none is shared and none compressed: an
	// overwrite then frees as much as it takes.
	r.load("--rw", "write", "--once", "--bs", "64k", "--iodepth", "8", "--size", fmt.Sprint(64*mib), r.c.URL("a", v.LUN))
	load := r.verify(r.both(v.LUN), 0, 64*mib, "--dedupe", "0", "--compress", "0")

	filler, err := lab.RunLoad(r.ctx, r.iscsiload, "--rw", "write", "--once", "--bs", "256k", "--iodepth", "4", r.c.URL(ballast.Owner, ballast.LUN))
	switch {
	case err == nil:
		t.Fatalf("4 GiB of incompressible data went into a pool of 1 GiB")
	case filler == nil:
		t.Fatal(err)
	case filler.Errors.SCSI == 0:
		t.Fatalf("the writer failed, but not by a SCSI error: %v", err)
	}
	t.Logf("full after %d MiB: %s", filler.IOs/4, filler.Errors.Last)
	if said := strings.ToUpper(filler.Errors.Last); !strings.Contains(said, "DATA_PROTECTION") && !strings.Contains(said, "0X2707") &&
		!strings.Contains(said, "SPACE_ALLOCATION") && !strings.Contains(said, "2707") {
		t.Errorf("a write to a full pool ended with %q, want sense 07/27/07", filler.Errors.Last)
	}
	pool := r.pools()
	t.Logf("pools: %+v", pool)
	for name, p := range pool {
		if p.Live > p.Size {
			t.Errorf("node %s says that %d of %d bytes are live", name, p.Live, p.Size)
		}
	}
	// Overwrites go on for ever: several times the room that is left.
	full := r.elapseUntilRewritten(load, 3)
	t.Logf("a full pool took %d overwrites", full)
	if res := load.stop(); res.Errors.SCSI != 0 {
		t.Errorf("overwrites on a full pool failed: %+v", res.Errors)
	}
	load.check(r.c.URL("b", v.LUN))
	r.load("--rw", "randread", "--runtime", "1", "--iodepth", "8", "--size", fmt.Sprint(256*mib), r.c.URL(ballast.Owner, ballast.LUN))
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")

	// Nodes that start with a full pool start.
	r.demo("down")
	for _, node := range []string{"w", "a", "b"} {
		r.demo("start", node)
	}
	r.must(r.c.WaitServed(r.ctx, time.Minute), "start with full pools")
	load.check(r.c.URL("a", v.LUN))

	// Room comes back without an operator's doing.
	r.must(r.c.DeleteVolume(r.ctx, "ballast"), "delete the ballast")
	again, err := r.c.CreateVolume(r.ctx, "again", "1G")
	r.must(err, "a volume after the full pool")
	r.must(lab.Until(r.ctx, 2*time.Minute, func() error {
		_, err := lab.RunLoad(r.ctx, r.iscsiload, "--rw", "write", "--once", "--bs", "256k", "--iodepth", "4", "--size", fmt.Sprint(256*mib), r.c.URL("a", again.LUN))
		return err
	}), "256 MiB after the ballast is gone")
	r.must(r.c.WaitHealthy(r.ctx, time.Minute), "health at the end")
}

// elapseUntilRewritten waits until every block of the load's range was
// acknowledged n times on average, and returns the number of writes.
func (r *rig) elapseUntilRewritten(load *verified, n int64) int64 {
	r.Helper()
	start := load.acked()
	for load.acked()-start < n*64*mib/4096 {
		load.progress(200, 30*time.Second)
	}
	return load.acked() - start
}
