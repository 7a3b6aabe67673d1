//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestAbsence takes a replica away while the volume changes, and demands that
// its return moves what changed and not the volume.
func TestAbsence(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "8G", Volumes: []string{"demo:1G"}})
	v := r.volume("demo")
	const still, region = 512 * mib, 32 * mib
	r.load("--rw", "write", "--once", "--bs", "1m", "--iodepth", "8", "--size", fmt.Sprint(still), r.c.URL(v.Owner, v.LUN))
	v = r.volume("demo")
	away := v.Other()

	load := r.verify(r.both(v.LUN), still, region, "--failover", "--io-timeout", "20")
	r.demo("kill", away)
	gone := time.Now()
	r.must(r.elapse(load, *absence), "absence")
	if _, err := r.c.CLI(r.ctx, "status"); err == nil {
		r.Error("status says healthy while a node is away")
	}
	load.stop() // so that only what changed in the absence is to be moved
	before := r.wrote(v.Owner)
	r.demo("start", away)
	back := time.Now()
	largest := int64(0)
	r.must(lab.Until(r.ctx, 5*time.Minute, func() error {
		s, err := r.c.Status(r.ctx)
		if err != nil {
			return err
		}
		for _, v := range s.Volumes {
			for _, p := range v.Replicas {
				largest = max(largest, p.Total)
			}
		}
		if s.Health != "healthy" {
			return fmt.Errorf("the cluster is %s: %+v", s.Health, s.Problems)
		}
		return nil
	}), "resync")
	took := time.Since(back)
	moved := r.wrote(v.Owner) - before
	r.Logf("away for %.0f s, %d MiB of %d MiB changed; in sync %.1f s after its start, resync looked at %d MiB, the owner wrote %d MiB to link and log",
		back.Sub(gone).Seconds(), region/mib, (still+region)/mib, took.Seconds(), largest/mib, moved/mib)
	if largest > 2*region {
		r.Errorf("resync looked at %d MiB, although %d MiB changed", largest/mib, region/mib)
	}
	if moved > 3*region {
		r.Errorf("the owner wrote %d MiB to link and log, although %d MiB changed", moved/mib, region/mib)
	}
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL(away, v.LUN))
}

// wrote is what a node's process has written to all its sockets and files since
// it started: an upper bound of what crossed the link.
func (r *rig) wrote(node string) int64 {
	r.Helper()
	n, err := writtenBytes(r.c.Node(node).PID)
	r.must(err, "what node %s has written", node)
	return n
}

// elapse lets d go by while the load makes progress all the time.
func (r *rig) elapse(load *verified, d time.Duration) error {
	ctx, cancel := context.WithTimeout(r.ctx, d)
	defer cancel()
	for ctx.Err() == nil {
		load.progress(50, 30*time.Second)
	}
	return r.ctx.Err()
}
