//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// netRig is a rig whose nodes stand in network namespaces of their own.
type netRig struct {
	*rig
	n *lab.Network
}

func upNetwork(t *testing.T, o lab.NetworkOptions) *netRig {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if err := lab.CanNetwork(ctx); err != nil {
		t.Skipf("no network namespaces here: %v", err)
	}
	load, err := lab.Iscsiload(ctx, *root)
	if err != nil {
		t.Fatal(err)
	}
	h := fnv.New64a()
	h.Write([]byte(t.Name()))
	r := &rig{T: t, ctx: ctx, dir: filepath.Join(*work, strings.ReplaceAll(t.Name(), "/", "-")),
		rand: rand.New(rand.NewPCG(*seedFlag, h.Sum64()))}
	if err := clearOld(ctx, r.dir); err != nil {
		t.Fatal(err)
	}
	o.Binary, o.Dir = *program, filepath.Join(r.dir, "net")
	n, err := lab.UpNetwork(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	r.c = n.Cluster
	t.Cleanup(func() {
		for _, line := range r.c.Panics() {
			r.Errorf("a node's log: %s", line)
		}
		if t.Failed() {
			r.Log(r.c.Logs(60))
		}
		if err := n.Close(); err != nil {
			r.Errorf("close: %v", err)
		}
		if t.Failed() || *keep {
			r.Logf("kept: %s", r.dir)
		} else if err := clearOld(context.Background(), r.dir); err != nil {
			r.Error(err)
		}
	})
	r.iscsiload, err = n.Inside(load)
	r.must(err, "load generator")
	r.inside = n.Do
	return &netRig{rig: r, n: n}
}

// fault is one thing that happens to the network. owner and other are the data
// nodes of the volume, w is the witness.
type fault struct {
	name   string
	long   bool // not in short runs
	hurt   func(r *netRig, owner, other string)
	heal   func(r *netRig, owner, other string)
	goesOn bool          // writes are acknowledged while it lasts
	limit  time.Duration // of the pause at the initiator, if it goes on
	takes  bool          // the other node becomes the owner; false: it must not
	says   string        // code of a problem that the status of the first node shows while it lasts
}

// cut and mend take both directions of each pair.
func (r *netRig) cut(pairs ...string) {
	r.Helper()
	for i := 0; i < len(pairs); i += 2 {
		r.must(r.n.Cut(r.ctx, pairs[i], pairs[i+1]), "cut")
		r.must(r.n.Cut(r.ctx, pairs[i+1], pairs[i]), "cut")
	}
}

func (r *netRig) mend(pairs ...string) {
	r.Helper()
	for i := 0; i < len(pairs); i += 2 {
		r.must(r.n.Mend(r.ctx, pairs[i], pairs[i+1]), "mend")
		r.must(r.n.Mend(r.ctx, pairs[i+1], pairs[i]), "mend")
	}
}

var partitions = []fault{
	{
		name:   "link between the data nodes cut, both reach the witness",
		hurt:   func(r *netRig, owner, other string) { r.cut(owner, other) },
		heal:   func(r *netRig, owner, other string) { r.mend(owner, other) },
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name:   "what the owner sends to the replica is lost",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.must(r.n.Cut(r.ctx, owner, other), "cut") },
		heal:   func(r *netRig, owner, other string) { r.must(r.n.Mend(r.ctx, owner, other), "mend") },
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name:   "what the replica sends to the owner is lost",
		hurt:   func(r *netRig, owner, other string) { r.must(r.n.Cut(r.ctx, other, owner), "cut") },
		heal:   func(r *netRig, owner, other string) { r.must(r.n.Mend(r.ctx, other, owner), "mend") },
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name:   "owner cut off from the others, initiators still reach it",
		hurt:   func(r *netRig, owner, other string) { r.cut(owner, other, owner, "w") },
		heal:   func(r *netRig, owner, other string) { r.mend(owner, other, owner, "w") },
		goesOn: true, limit: 8 * time.Second, takes: true,
	},
	{
		name:   "replica cut off from the others, initiators still reach it",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.cut(other, owner, other, "w") },
		heal:   func(r *netRig, owner, other string) { r.mend(other, owner, other, "w") },
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name:   "owner vanishes from every network",
		hurt:   func(r *netRig, owner, _ string) { r.must(r.n.Vanish(r.ctx, owner), "vanish") },
		heal:   func(r *netRig, owner, _ string) { r.must(r.n.Return(r.ctx, owner), "return") },
		goesOn: true, limit: 8 * time.Second, takes: true,
	},
	{
		name:   "replica vanishes from every network",
		long:   true,
		hurt:   func(r *netRig, _, other string) { r.must(r.n.Vanish(r.ctx, other), "vanish") },
		heal:   func(r *netRig, _, other string) { r.must(r.n.Return(r.ctx, other), "return") },
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name:   "witness cut off",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.cut("w", owner, "w", other) },
		heal:   func(r *netRig, owner, other string) { r.mend("w", owner, "w", other) },
		goesOn: true, limit: time.Second,
	},
	{
		name: "witness reached by the replica alone, then the link between the data nodes cut",
		hurt: func(r *netRig, owner, other string) {
			r.cut("w", owner)
			r.wait(2 * time.Second)
			r.cut(owner, other)
		},
		heal:   func(r *netRig, owner, other string) { r.mend("w", owner, owner, other) },
		goesOn: true, limit: 8 * time.Second, takes: true,
	},
	{
		name: "witness reached by the owner alone, then the link between the data nodes cut",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.cut("w", other)
			r.wait(2 * time.Second)
			r.cut(owner, other)
		},
		heal:   func(r *netRig, owner, other string) { r.mend("w", other, owner, other) },
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name: "replica vanishes, then the witness",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.must(r.n.Vanish(r.ctx, other), "vanish")
			r.wait(5 * time.Second) // the owner is recorded alone by then
			r.must(r.n.Vanish(r.ctx, "w"), "vanish")
		},
		heal: func(r *netRig, owner, other string) {
			r.must(r.n.Return(r.ctx, "w"), "return")
			r.must(r.n.Return(r.ctx, other), "return")
		},
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name: "witness vanishes, then the replica",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.must(r.n.Vanish(r.ctx, "w"), "vanish")
			r.wait(2 * time.Second)
			r.must(r.n.Vanish(r.ctx, other), "vanish")
		},
		heal: func(r *netRig, owner, other string) {
			r.must(r.n.Return(r.ctx, "w"), "return")
			r.must(r.n.Return(r.ctx, other), "return")
		},
	},
	{
		name: "all three cut off from each other",
		hurt: func(r *netRig, owner, other string) { r.cut(owner, other, "w", owner, "w", other) },
		heal: func(r *netRig, owner, other string) { r.mend(owner, other, "w", owner, "w", other) },
	},
	{
		name: "the link between the data nodes comes and goes",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			for range 8 {
				r.cut(owner, other)
				r.wait(time.Duration(50+r.rand.IntN(1500)) * time.Millisecond)
				r.mend(owner, other)
				r.wait(time.Duration(50+r.rand.IntN(1500)) * time.Millisecond)
			}
		},
		heal:   func(*netRig, string, string) {},
		goesOn: true, limit: 8 * time.Second, takes: true, // it may
	},
	{
		name:   "the owner's network passes 2 MiB a second",
		long:   true,
		hurt:   func(r *netRig, owner, _ string) { r.must(r.n.Slow(r.ctx, owner, 2<<20), "slow") },
		heal:   func(r *netRig, owner, _ string) { r.must(r.n.Slow(r.ctx, owner, 0), "fast") },
		goesOn: true, limit: 8 * time.Second, takes: true, // it may
	},
}

func (r *netRig) wait(d time.Duration) {
	select {
	case <-time.After(d):
	case <-r.ctx.Done():
	}
}

// TestPartitions does to the network what can happen to it, under verified load
// through both nodes: nothing that was acknowledged is lost, nothing stale is read,
// no command fails, the pause is bounded, and who owns the volume is foreseeable.
func TestPartitions(t *testing.T) {
	scenario(t)
	r := upNetwork(t, lab.NetworkOptions{DeviceSize: "4G", Nodes: []string{"a", "b"}, Volumes: []string{"demo:512M"}})
	r.suffer(partitions)
}

// suffer goes through faults, one after the other.
func (r *netRig) suffer(faults []fault) {
	r.Helper()
	for _, f := range faults {
		if f.long && *rounds <= 3 {
			continue
		}
		v := r.volume("demo")
		owner, other := v.Owner, v.Other()
		// An initiator that waits less than the target shows the target's pauses.
		load := r.verify(r.both(v.LUN), 0, 32*mib, "--failover", "--io-timeout", "2", "--iodepth", "8")
		load.progress(500, 30*time.Second)
		start := time.Now()
		f.hurt(r, owner, other)
		held := ""
		if f.says != "" {
			r.must(lab.Until(r.ctx, 20*time.Second, func() error {
				s, err := r.c.Status(r.ctx)
				if err == nil && !slices.ContainsFunc(s.Problems, func(p lab.Problem) bool { return p.Code == f.says }) {
					err = fmt.Errorf("the problems are %+v", s.Problems)
				}
				return err
			}), "%s: status says %s", f.name, f.says)
		}
		if f.goesOn {
			load.progress(500, 30*time.Second)
		} else {
			r.wait(7 * time.Second)
			before := load.acked()
			r.wait(4 * time.Second)
			if n := load.acked() - before; n > 0 {
				r.Fatalf("%s: %d writes were acknowledged by a node that cannot know that it may", f.name, n)
			}
			held = ", held"
		}
		f.heal(r, owner, other)
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "%s: recovery", f.name)
		load.progress(200, 30*time.Second)
		result := load.stop()
		pause := time.Duration(result.Failover.MaxGapMS * float64(time.Millisecond))
		if f.goesOn && pause > f.limit {
			r.Errorf("%s: the initiator waited %.2f s, allowed are %s", f.name, pause.Seconds(), f.limit)
		}
		if result.Errors.SCSI > 0 {
			r.Errorf("%s: %d commands failed: %s", f.name, result.Errors.SCSI, result.Errors.Last)
		}
		r.must(r.c.CheckEqual(r.ctx, "demo"), "%s: volume check", f.name)
		now := r.volume("demo").Owner
		if now != owner && !f.takes && f.goesOn {
			r.Errorf("%s: node %s became the owner", f.name, now)
		}
		for _, url := range r.both(v.LUN) {
			load.check(url)
		}
		r.Logf("%-80s pause %5.2f s%s, owner %s -> %s, %d writes, 0 lost, %.0f s", f.name, pause.Seconds(), held, owner, now, load.acked(), time.Since(start).Seconds())
	}
}
