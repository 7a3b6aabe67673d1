package lsfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// TestCloneModel runs random clones, congruent and not, overlapping, within and
// across volumes and annexes, between writes, unmaps, deletes, resizes, checkpoints,
// cleaning, clean restarts and power cuts, with readers beside.
func TestCloneModel(t *testing.T) {
	eachSeed(t, 3, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		w := &world{rng: rand.New(rand.NewPCG(seed, 5)), vols: map[VolumeID]*plane{}, many: 50 + seed%3*5000}
		rng := w.rng
		r := newRig(t, seed, 24<<20, 12<<20)
		s := r.start()
		tight := func() {
			if rng.IntN(2) == 0 {
				s.enter()
				s.dirtySoft, s.dirtyHard = 60, 100 // checkpoints are cut inside of clones
				s.leave()
			}
			if rng.IntN(3) == 0 {
				s.enter()
				s.parentsMax = uint32(2 + rng.IntN(8))
				s.leave()
			}
		}
		tight()
		w.create(t, s)
		w.create(t, s)
		c := newClient(t, s)
		var readers sync.WaitGroup
		var stop chan struct{}
		read := func() {
			stop = make(chan struct{})
			rng := rand.New(rand.NewPCG(seed, rng.Uint64()))
			readers.Add(1)
			go func(s *Store, stop chan struct{}) {
				defer readers.Done()
				buf := make([]byte, 8*dedup.BlockSize)
				for {
					select {
					case <-stop:
						return
					default:
					}
					ids := s.Volumes()
					v := s.Volume(ids[rng.IntN(len(ids))])
					if v == nil {
						continue
					}
					off := rng.Uint64N(1000) * dedup.BlockSize
					if rng.IntN(3) == 0 {
						off += uint64(AnnexStart) * dedup.BlockSize
					}
					if !v.TryRead(off, buf) {
						if err := v.Read(ctx, off, buf); err != nil {
							if errors.Is(err, ErrNoVolume) || errors.Is(err, ErrRange) {
								continue
							}
							t.Error(err)
							return
						}
					}
					for b := buf; len(b) > 0; b = b[dedup.BlockSize:] {
						if !bytes.Equal(b[:dedup.BlockSize], small(binary.LittleEndian.Uint64(b))) {
							t.Error("a mixed block")
							return
						}
					}
				}
			}(s, stop)
		}
		quiet := func() { close(stop); readers.Wait() }
		// Between looking at an operation and applying it there is a write to a device.
		starve := func() {
			s := s
			observe := func(op devicetest.Op) {
				if op.Kind == devicetest.Write {
					evict(s)
				}
			}
			for _, d := range r.disks {
				d.Observe(observe)
			}
		}
		starve()
		reopen := func() {
			for _, d := range r.disks {
				d.Observe(nil)
			}
			s = r.start()
			starve()
			tight()
			c = newClient(t, s)
			w.mustMatch(t, s)
			read()
		}
		read()
		for i := range 80 {
			switch k := rng.IntN(40); {
			case k < 32:
				id := w.pick()
				var wg sync.WaitGroup
				for range 1 + rng.IntN(3) {
					op, do := w.op(c, id)
					op.Done = func(_ *Op, err error) {
						if err != nil {
							t.Error(err)
						}
						wg.Done()
					}
					wg.Add(1)
					s.Append(op)
					do()
					w.vols[id].seq++
				}
				s.Kick()
				wg.Wait()
			case k == 32:
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
			case k == 33:
				if n, ok := s.victim(rng.IntN(2) == 0); ok {
					s.cleaner.mu.Lock()
					s.cleanSegment(n)
					s.cleaner.mu.Unlock()
				}
			case k == 34 && len(w.vols) > 2:
				id := w.pick()
				if err := s.DeleteVolume(ctx, id); err != nil {
					t.Fatal(err)
				}
				delete(w.vols, id)
			case k == 35 && len(w.vols) < 4:
				w.create(t, s)
			case k == 36:
				id := w.pick()
				p := w.vols[id]
				n := 1100 + rng.Uint64N(3000)
				if err := s.Volume(id).Resize(ctx, n); err != nil {
					t.Fatal(err)
				}
				main := make([]uint64, n)
				copy(main, p.main)
				p.main = main
				// MappedBlocks counts the tail until it is given back.
				if err := s.trimmer.wait(ctx, id); err != nil {
					t.Fatal(err)
				}
			case k == 37:
				quiet()
				mustClose(t, s)
				reopen()
			case k == 38:
				quiet()
				old := s
				r = r.crash(devicetest.CrashOptions{Seed: rng.Uint64(), Keep: rng.Float64(), Tear: true})
				mustClose(t, old)
				reopen()
			}
			if i%4 == 0 {
				w.mustMatch(t, s)
			} else if rep, err := s.Check(ctx); err != nil || !rep.OK() {
				t.Fatal(rep, err)
			}
			if t.Failed() {
				quiet()
				t.FailNow()
			}
		}
		quiet()
		w.mustMatch(t, s)
		for id := range w.vols {
			if err := s.DeleteVolume(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.trimmer.wait(ctx, 0); err != nil {
			t.Fatal(err)
		}
		if st := s.Stats(); st.UniqueBytes != 0 || st.MappedBlocks != 0 || st.SharedPages != 0 || s.pg.nAlive.Load() != 0 {
			t.Fatalf("%d bytes, %d pages left after the last volume is gone", st.UniqueBytes, s.pg.nAlive.Load())
		}
		mustCheck(t, s)
		mustClose(t, s)
	})
}

// TestCrashInClones cuts the power after writes and flushes of workloads made of
// clones, some of which are cut by checkpoints: each operation is there or not, and
// replay from any checkpoint comes to the same.
func TestCrashInClones(t *testing.T) {
	eachSeed(t, 3, func(t *testing.T, seed uint64) {
		w := &world{rng: rand.New(rand.NewPCG(seed, 6)), vols: map[VolumeID]*plane{}, many: 300}
		r := newRig(t, seed, 16<<20)
		s := r.start()
		s.enter()
		s.dirtySoft, s.dirtyHard = 40, 70
		s.leave()
		w.create(t, s)
		c := newClient(t, s)
		history := []*plane{w.vols[1].clone()}
		var acked atomic.Int64
		moments := newRecorder(r, seed, 4, acked.Load)
		moments.start()
		for i := range 40 {
			op, do := w.op(c, 1)
			c.must(op)
			acked.Store(int64(op.ID.Seq))
			do()
			w.vols[1].seq++
			history = append(history, w.vols[1].clone())
			if i%8 == 7 {
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
			}
		}
		moments.stop()
		w.mustMatch(t, s)
		mustClose(t, s)
		moments.each(t, func(_ int, m *moment[int64], s *Store) {
			v := s.Volume(1)
			if v == nil {
				t.Fatal("the volume is gone")
			}
			k := v.Meta().Durable.Seq
			if int64(k) < m.before || m.after+1 < int64(k) {
				t.Fatalf("durable is %d", k)
			}
			mustMatch(t, v, history[k], w.rng)
			mustCheck(t, s)
			mustClose(t, s)
		})
	})
}

// TestSharedLeavesStarve lets operations meet shared leaves whose pages, and those of
// their identities, are not in RAM, in the orders in which one changes what the next needs.
func TestSharedLeavesStarve(t *testing.T) {
	clone := func(to, from BlockNo, n uint32) *Op {
		return &Op{Kind: OpClone, Volume: 1, Start: to, Count: n, Source: 1, SourceStart: from}
	}
	unmap := func(at BlockNo, n uint32) *Op { return &Op{Kind: OpUnmap, Volume: 1, Start: at, Count: n} }
	for _, tt := range []struct {
		name    string
		prepare []*Op
		batch   func(c *client) []*Op
	}{
		// Leaves 1 and 2 are one page and its only parents, and go in one slice.
		{"unmap of both parents", []*Op{clone(512, 0, 512), clone(1024, 0, 512), unmap(0, 512)},
			func(*client) []*Op { return []*Op{unmap(512, 1024)} }},
		{"clone over both parents", []*Op{clone(512, 0, 512), clone(1024, 0, 512), unmap(0, 512)},
			func(*client) []*Op { return []*Op{clone(512, 2048, 1024)} }},
		{"words over both parents", []*Op{clone(512, 0, 512), clone(1024, 0, 512), unmap(0, 512)},
			func(*client) []*Op { return []*Op{clone(512, 2047, 1024)} }},
		{"unmap by two operations of a batch", []*Op{clone(512, 0, 512), clone(1024, 0, 512), unmap(0, 512)},
			func(*client) []*Op { return []*Op{unmap(512, 512), unmap(1024, 512)} }},
		{"write into what the clone before it shares", nil,
			func(c *client) []*Op { return []*Op{clone(512, 0, 512), c.write(1, 0, 100, small(9))} }},
		{"write over what the clone before it shares", []*Op{clone(3000, 0, 512)},
			func(c *client) []*Op {
				return []*Op{clone(512, 0, 512), c.write(1, 0, 1000, bytes.Join([][]byte{small(8), small(9)}, nil))}
			}},
		{"a piece shares what a later one changes in part", nil,
			func(*client) []*Op { return []*Op{clone(0, 512, 600)} }},
		{"words over a part of a shared leaf", []*Op{clone(512, 0, 512)},
			func(*client) []*Op { return []*Op{clone(700, 2000, 10)} }},
		{"unmap of a part", []*Op{clone(512, 0, 512)}, func(*client) []*Op { return []*Op{unmap(1000, 100)} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 1, 24<<20)
			s := r.start()
			v := mustCreate(t, s, 1, 4096)
			c := newClient(t, s)
			want := &plane{main: make([]uint64, 4096)}
			var data []byte
			for i := range 1024 {
				want.main[i] = uint64(i + 100)
				data = append(data, small(uint64(i+100))...)
			}
			c.must(c.write(1, 1, 0, data))
			want.seq = 1
			model := func(op *Op) {
				want.seq++
				op.ID = OpID{1, want.seq}
				switch to := want.main[op.Start:][:op.Count]; op.Kind {
				case OpClone:
					copy(to, want.main[op.SourceStart:])
				case OpUnmap:
					clear(to)
				case OpWrite:
					for i := range to {
						to[i] = 10 - uint64(len(to)-i)
					}
				}
			}
			for _, op := range tt.prepare {
				model(op)
				c.must(op)
			}
			if err := s.checkpoint(); err != nil {
				t.Fatal(err)
			}
			r.disks["disk0"].Observe(func(op devicetest.Op) {
				if op.Kind == devicetest.Write {
					evict(s)
				}
			})
			s.nextRound()
			evict(s)
			var wg sync.WaitGroup
			ops := tt.batch(c)
			for _, op := range ops {
				model(op)
				op.Done = func(_ *Op, err error) {
					if err != nil {
						t.Error(err)
					}
					wg.Done()
				}
				wg.Add(1)
				s.Append(op)
			}
			s.Kick()
			wg.Wait()
			r.disks["disk0"].Observe(nil)
			mustMatch(t, v, want, rand.New(rand.NewPCG(1, 1)))
			mustCheck(t, s)
			mustClose(t, s)
			s = r.start()
			mustMatch(t, s.Volume(1), want, rand.New(rand.NewPCG(1, 1)))
			mustCheck(t, s)
			mustClose(t, s)
		})
	}
}

// TestCloneIsCut clones many slices while no page may stay dirty, so that a checkpoint
// is cut between each two, and cuts the power there: upwards within a volume,
// where it goes from the end on, downwards, and from another volume.
func TestCloneIsCut(t *testing.T) {
	const n = 4 * cloneSlice
	for i, tt := range []struct {
		name     string
		to, from BlockNo
		source   VolumeID
	}{
		{"upwards", 1001, 0, 1},
		{"downwards", 0, 1001, 1},
		{"leaves across", 512, 1024, 2},
		{"across", 7, 5, 2},
	} {
		if testing.Short() && i%2 == 0 {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 3, 48<<20)
			s := r.start()
			c := newClient(t, s)
			rng := testRand(1)
			w := &world{rng: rng, vols: map[VolumeID]*plane{}}
			for id := VolumeID(1); id <= 2; id++ {
				mustCreate(t, s, id, n+1100)
				p := &plane{main: make([]uint64, n+1100)}
				for at := 0; at < len(p.main); at += 512 {
					var data []byte
					for i := at; i < min(at+512, len(p.main)); i++ {
						p.main[i] = uint64(id)<<20 + rng.Uint64N(50000) + 1
						data = append(data, small(p.main[i])...)
					}
					p.seq++
					c.must(c.write(id, p.seq, BlockNo(at), data))
				}
				w.vols[id] = p
			}
			if err := s.checkpoint(); err != nil {
				t.Fatal(err)
			}
			s.enter()
			s.dirtySoft, s.dirtyHard = 1, 1
			s.leave()
			before := w.vols[1].clone()
			p := w.vols[1]
			p.seq++
			copy(p.main[tt.to:][:n], slices.Clone(w.vols[tt.source].main[tt.from:][:n]))
			var mu sync.Mutex
			var crashes []*rig
			flushes := 0
			r.disks["disk0"].Observe(func(op devicetest.Op) {
				mu.Lock()
				defer mu.Unlock()
				if op.Kind != devicetest.Flush {
					evict(s)
				} else if flushes++; flushes%3 == 0 {
					crashes = append(crashes, r.crash(devicetest.CrashOptions{Seed: uint64(len(crashes))}))
				}
			})
			checkpoints, _ := s.ckpt.numbers()
			c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, p.seq}, Start: tt.to, Count: n, Source: tt.source, SourceStart: tt.from})
			r.disks["disk0"].Observe(nil)
			if cuts, _ := s.ckpt.numbers(); cuts-checkpoints < 3 {
				t.Fatalf("%d checkpoints inside of the operation", cuts-checkpoints)
			}
			w.mustMatch(t, s)
			mustClose(t, s)
			inside := 0
			for i, cr := range crashes {
				cr.tb = t
				s := cr.start()
				if k := s.Volume(1).Meta().Durable.Seq; k == p.seq {
					w.vols[1] = p
					inside++
				} else {
					w.vols[1] = before
				}
				w.mustMatch(t, s)
				if t.Failed() {
					t.Fatalf("crash %d of %d", i, len(crashes))
				}
				mustClose(t, s)
			}
			if inside == 0 {
				t.Fatal("no crash after the commit")
			}
		})
	}
}

// TestBatchIsBounded: writes into many shared leaves need the identities of all of
// them; those that do not fit beside each other go into the next commit, in order.
func TestBatchIsBounded(t *testing.T) {
	r := newRig(t, 1, 32<<20)
	s := r.start()
	const leaves = 40
	v := mustCreate(t, s, 1, 2*leaves*512)
	c := newClient(t, s)
	want := &plane{main: make([]uint64, 2*leaves*512)}
	for at := 0; at < leaves*512; at += 512 {
		var data []byte
		for i := at; i < at+512; i++ {
			want.main[i] = uint64(i%7919 + 1)
			data = append(data, small(want.main[i])...)
		}
		want.seq++
		c.must(c.write(1, want.seq, BlockNo(at), data))
	}
	for at := 0; at < leaves*512; at += ClonedBlocksMax {
		n := min(ClonedBlocksMax, leaves*512-at)
		want.seq++
		c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, want.seq}, Start: BlockNo(leaves*512 + at), Count: uint32(n), Source: 1, SourceStart: BlockNo(at)})
		copy(want.main[leaves*512+at:], want.main[at:at+n])
	}
	s.enter()
	s.pg.max = 100
	commits := s.Stats().CommitOps
	var wg sync.WaitGroup
	done := want.seq
	for i := range leaves {
		want.seq++
		op := c.write(1, want.seq, BlockNo(i*512+i), small(8000))
		want.main[i*512+i] = 8000
		op.Done = func(op *Op, err error) {
			if done++; err != nil || op.ID.Seq != done {
				t.Errorf("operation %d is done as %d: %v", op.ID.Seq, done, err)
			}
			wg.Done()
		}
		wg.Add(1)
		s.Append(op)
	}
	s.Kick()
	s.leave()
	wg.Wait()
	n := uint64(0)
	for i, k := range s.Stats().CommitOps.Counts {
		n += k - commits.Counts[i]
	}
	if n < 4 || leaves/2 < n {
		t.Errorf("%d commits for %d operations", n, leaves)
	}
	mustMatch(t, v, want, testRand(1))
	mustCheck(t, s)
	mustClose(t, s)
}
