package lsfs

import (
	"context"
	"maps"
	"sync/atomic"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

func (g *gallery) clone() *gallery {
	q := &gallery{rng: g.rng, vols: map[VolumeID]*modelVolume{}, snaps: maps.Clone(g.snaps), forging: map[VolumeID]*modelSnapshot{}, last: g.last, many: g.many, farStart: g.farStart}
	for id, v := range g.vols {
		q.vols[id] = &modelVolume{v.content.clone(), v.seq}
	}
	return q
}

// like says whether a store may be what the model says, from what is cheap to see.
func (g *gallery) like(s *Store) bool {
	if len(s.Volumes()) != len(g.vols) || len(s.Snapshots(0)) != len(g.snaps) {
		return false
	}
	for id, p := range g.vols {
		if v := s.Volume(id); v == nil || v.Meta().Durable.Seq != p.seq || v.Blocks() != p.size {
			return false
		}
	}
	for id := range g.snaps {
		if s.Snapshot(id) == nil {
			return false
		}
	}
	return true
}

// step does one random thing and waits for it.
func (g *gallery) step(tb testing.TB, s *Store, c *client) {
	tb.Helper()
	ctx := context.Background()
	rng := g.rng
	must := func(err error) {
		if err != nil {
			tb.Helper()
			tb.Fatal(err)
		}
	}
	switch k := rng.IntN(20); {
	case k == 0 && len(g.vols) < 3 && len(g.snaps) > 0:
		from := pickOf(g, g.snaps)
		p := &modelVolume{g.snaps[from].main(), 1}
		clear(p.version)
		p.floor = 1
		g.last++
		_, err := s.CreateVolumeFrom(ctx, g.last, p.size, [16]byte{1}, from)
		must(err)
		g.vols[g.last] = p
	case k == 1 && len(g.vols) > 1:
		id := pickOf(g, g.vols)
		must(s.DeleteVolume(ctx, id))
		delete(g.vols, id)
	case k == 2:
		id := pickOf(g, g.vols)
		p := g.vols[id]
		n := g.size()
		must(s.Volume(id).Resize(ctx, n))
		if n < p.size {
			p.cut(n)
		}
		p.size = n
	case k < 6 && len(g.snaps) > 0:
		id := pickOf(g, g.snaps)
		must(s.DeleteSnapshot(ctx, id))
		delete(g.snaps, id)
	case k == 6 && len(g.snaps) > 0:
		g.forge(tb, s, c)
	case k == 7:
		must(s.checkpoint())
	default:
		id := pickOf(g, g.vols)
		op, do := g.op(c, id)
		c.must(op)
		do()
		g.vols[id].seq++
	}
}

// TestCrashInSnapshots cuts the power while snapshots come and go, are rolled back to,
// cloned and forged, and while what is deleted is shed, some of it cut by checkpoints: each
// step is there or not, what was half forged is gone, and replay from any checkpoint comes
// to the same.
func TestCrashInSnapshots(t *testing.T) {
	eachSeed(t, 3, func(t *testing.T, seed uint64) {
		g := newGallery(seed)
		g.many = 300
		r := newRig(t, seed, 24<<20)
		s := r.start()
		s.enter()
		s.dirtySoft, s.dirtyHard = 60, 100
		s.leave()
		g.create(t, s)
		c := newClient(t, s)
		var done atomic.Int64
		moments := newRecorder(r, seed, 8, done.Load)
		moments.start()
		history := []*gallery{g.clone()}
		for i := range 60 {
			g.step(t, s, c)
			history = append(history, g.clone())
			done.Store(int64(i + 1))
		}
		moments.stop()
		g.mustMatch(t, s)
		mustClose(t, s)
		moments.each(t, func(i int, m *moment[int64], s *Store) {
			at := m.before
			if at+1 < int64(len(history)) && !history[at].like(s) {
				at++
			}
			if !history[at].like(s) {
				t.Fatalf("volumes %v, %d snapshots", s.Volumes(), len(s.Snapshots(0)))
			}
			history[at].mustMatch(t, s)
			for _, n := range s.snapshots {
				if n.content.forging {
					t.Fatalf("snapshot %d is half forged", n.ID())
				}
			}
			// It goes on from there, and from there again.
			next := history[at].clone()
			c := newClient(t, s)
			for range 4 {
				next.step(t, s, c)
			}
			if i%2 == 0 {
				m.rig = m.rig.crash(devicetest.CrashOptions{Seed: seed})
				m.rig.tb = t
			}
			mustClose(t, s)
			s = m.rig.start()
			clear(next.forging)
			next.mustMatch(t, s)
			mustClose(t, s)
		})
	})
}
