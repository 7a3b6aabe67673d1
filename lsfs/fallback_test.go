package lsfs

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// aged makes a pool with two checkpoints and a log behind them, cuts the power, and gives
// the disks, the newest superblock and the model.
func aged(t *testing.T, seed uint64) (r *rig, sb *format.Superblock, h *history) {
	rng := rand.New(rand.NewPCG(seed, 5))
	r = newRig(t, seed, 12<<20, 8<<20)
	r.cold = (&coldStores{}).every(2, seed)
	s := r.start()
	mustCreate(t, s, 1, 300)
	h = &history{blocks: 300}
	c := newClient(t, s)
	for i := range 300 {
		c.must(h.randomOp(c, rng, 1, 40))
		if i == 200 || i == 260 || rng.IntN(40) == 0 {
			if err := s.checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
		if rng.IntN(10) == 0 {
			if n, ok := s.victim(true); r.cold != nil {
				chill(s, 4, rng.IntN(2) == 0)
			} else if ok {
				s.enter()
				s.leave()
				s.cleanSegment(n)
			}
		}
	}
	if r.cold != nil && s.cleaner.packing.groups.Load() == 0 {
		t.Fatal("no groups")
	}
	r2 := r.crash(devicetest.CrashOptions{Seed: seed})
	mustClose(t, s)
	d, err := r2.open(r2.names[0])
	if err != nil {
		t.Fatal(err)
	}
	if sb, err = readSuperblock(d); err != nil {
		t.Fatal(err)
	}
	return r2, sb, h
}

// spoil damages a byte of an extent of a pool.
func (r *rig) spoil(sb *format.Superblock, x format.Extent) {
	for i, name := range r.names {
		m := sb.Members[i]
		if seg := x.Addr.Segment(); m.First <= seg && seg < m.First+m.Segments {
			r.disks[name].FlipBit(format.SuperblockArea+int64(seg-m.First)*int64(sb.SegmentBytes)+int64(x.Addr.Offset())+int64(x.Len/2), 3)
			// And a page beside it, which parity would need to make the first again.
			r.disks[name].FlipBit(format.SuperblockArea+int64(seg-m.First)*int64(sb.SegmentBytes)+int64(x.Addr.Offset())-format.PageSize+300, 3)
		}
	}
}

// directory reads where the directory pages of a root stand.
func (r *rig) directory(sb *format.Superblock) []format.Extent {
	s, err := open(context.Background(), r.cfg)
	if err != nil {
		r.tb.Fatal(err)
	}
	defer s.free()
	return s.ckpt.dirAt
}

// TestDamagedRootFallsBack: with the newest root or its directory damaged the pool opens
// from the checkpoint before and the log, without loss, and says so; it goes on, and
// can be opened again. With both roots damaged it does not open.
func TestDamagedRootFallsBack(t *testing.T) {
	eachSeed(t, 4, func(t *testing.T, seed uint64) {
		for _, what := range []string{"root", "directory", "both"} {
			r, sb, h := aged(t, seed)
			if len(sb.Previous) == 0 || sb.PreviousCheckpoint+1 != sb.Checkpoint {
				t.Fatalf("checkpoint %d, the one before %d of %d extents", sb.Checkpoint, sb.PreviousCheckpoint, len(sb.Previous))
			}
			if what == "directory" {
				r.spoil(sb, r.directory(sb)[0])
			} else {
				r.spoil(sb, sb.Root[0])
			}
			if what == "both" {
				r.spoil(sb, sb.Previous[0])
				var damage *CorruptError
				if _, err := Open(context.Background(), r.cfg); !errors.As(err, &damage) || damage.What != "root" {
					t.Fatalf("both roots damaged: %v", err)
				}
				continue
			}
			var mu sync.Mutex
			fell := false
			r.cfg.Event = func(e Event) {
				mu.Lock()
				fell = fell || e.Code == "root-fallback"
				mu.Unlock()
			}
			s := r.start()
			mu.Lock()
			if !fell {
				t.Errorf("%s: no event", what)
			}
			mu.Unlock()
			mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
			mustCheck(t, s)
			c := newClient(t, s)
			rng := rand.New(rand.NewPCG(seed, 6))
			for i := range 100 {
				c.must(h.randomOp(c, rng, 1, 40))
				if i%30 == 29 {
					if err := s.checkpoint(); err != nil {
						t.Fatal(err)
					}
				}
			}
			mustCheck(t, s)
			r = r.crash(devicetest.CrashOptions{Seed: seed})
			mustClose(t, s)
			s = r.start()
			mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
			mustCheck(t, s)
			mustClose(t, s)
		}
	})
}

// TestOpenRoot2Overwritten opens a pool as it was written when roots had version 2, with shared
// leaves, checkpoints and a log behind them: 700 blocks of 200 patterns at 0, cloned to 1024
// and to the annex (600 of them), 20 unmapped at 10, one block at 1500. It is
// overwritten until slots of identities are used again, and read once more.
func TestOpenRoot2Overwritten(t *testing.T) {
	start := openSample(t, "testdata/pool-root2-shared.gz")
	want := &plane{seq: 11, main: make([]uint64, 2000), annex: make([]uint64, 600)}
	for i := range 700 {
		n := uint64(i%200 + 1)
		if i < 600 {
			want.main[1024+i], want.annex[i] = n, n
		}
		if i < 10 || 30 <= i {
			want.main[i] = n
		}
	}
	want.main[1500] = 300
	s := start()
	w := &world{rng: testRand(1), vols: map[VolumeID]*plane{1: want}}
	w.mustMatch(t, s)
	c := newClient(t, s)
	for n := uint64(0); n < 3000; n++ {
		i := w.rng.Uint64N(1000)
		want.main[i] = 400 + n
		want.seq++
		c.must(c.write(1, want.seq, BlockNo(i), small(400+n)))
	}
	w.mustMatch(t, s)
	mustClose(t, s)
	s = start()
	w.mustMatch(t, s)
	mustClose(t, s)
}
