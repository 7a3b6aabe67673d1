package lsfs

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// mapCatalogue is a catalogue that forgets at the end of the process, and marks at once.
type mapCatalogue map[dedup.Fingerprint]uint64

func (c mapCatalogue) Lookup(list []knownBlock, f func(i int, ref uint64, found bool)) error {
	for i := range list {
		ref, ok := c[list[i].Fingerprint]
		f(i, ref, ok)
	}
	return nil
}

func (c mapCatalogue) Put(list []knownBlock) error {
	for _, e := range list {
		c[e.Fingerprint] = e.Ref
	}
	return nil
}

func (mapCatalogue) Marks(_ uint64, dst *[marksPerGroup]uint64) error {
	clear(dst[:])
	return nil
}
func (mapCatalogue) PutMarks([]groupMarks) error { return nil }
func (c mapCatalogue) Reset() error              { clear(c); return nil }
func (mapCatalogue) Bytes() int64                { return 0 }
func (mapCatalogue) Close() error                { return nil }

// unindex takes a fingerprint out of the index, as another one might have.
func unindex(s *Store, fp *dedup.Fingerprint) {
	var refs [dedup.Ways]uint64
	for _, ref := range refs[:s.index.Candidates(fp, &refs)] {
		s.index.Remove(fp, ref)
	}
}

// putRun writes patterns from number n on to blocks from start on, and returns the next sequence.
func putRun(c *client, v VolumeID, seq Seq, start BlockNo, n uint64, count int) Seq {
	for count > 0 {
		m := min(count, 100)
		var data []byte
		for i := range m {
			data = append(data, small(n+uint64(i))...)
		}
		c.must(c.write(v, seq, start, data))
		seq, start, n, count = seq+1, start+BlockNo(m), n+uint64(m), count-m
	}
	return seq
}

func mustMerge(tb testing.TB, s *Store) MergeResult {
	tb.Helper()
	s.StartMerge()
	if err := s.WaitMerge(context.Background()); err != nil {
		tb.Fatal(err)
	}
	return s.Merge().Last
}

// TestMergeWhatWasForgotten: with an index far smaller than the working set most duplicates are
// stored twice; after a pass each block is stored once, and nothing else has changed.
func TestMergeWhatWasForgotten(t *testing.T) {
	const distinct = 20_000
	dir := t.TempDir()
	r := newRig(t, 1, 64<<20)
	r.opts = func(c *Config) { c.IndexBytes, c.Catalogue, c.MergeInterval, c.ScrubInterval = 64<<10, dir, -1, -1 }
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, 3*distinct)
	c := newClient(t, s)
	seq := putRun(c, 1, 1, 0, 1, distinct)
	seq = putRun(c, 1, seq, distinct, 1, distinct)
	was := s.stored.Load()
	inline := 2*distinct - was
	if inline > distinct/2 {
		t.Fatalf("the index found %d of %d: it is not small enough for this test", inline, distinct)
	}
	bytes := s.segs.data.Load()
	got := mustMerge(t, s)
	if n := s.stored.Load(); n != distinct {
		t.Fatalf("%d blocks are stored, %d before, %d are distinct: %+v", n, was, distinct, got)
	}
	if got.Blocks != was-distinct || got.Found != got.Blocks || got.Looked != was || got.Bytes != bytes-s.segs.data.Load() {
		t.Fatalf("%+v of %d", got, was)
	}
	t.Logf("inline found %d %%, the pass the rest: %d blocks, %d bytes, in %v", 100*inline/distinct, got.Blocks, got.Bytes, got.Finished.Sub(got.Started))
	want := make([]uint64, 2*distinct)
	for i := range want {
		want[i] = uint64(i%distinct + 1)
	}
	check := func() {
		t.Helper()
		mustEqualAs(t, s.Volume(1), want, small)
		mustCheck(t, s)
	}
	check()

	// Pages that have not changed are not looked at again.
	if got := mustMerge(t, s); got.Looked > distinct+distinct/8 || got.Found != 0 {
		t.Fatalf("again: %+v", got)
	}
	if got := mustMerge(t, s); got.Looked != 0 {
		t.Fatalf("a third time: %+v", got)
	}

	// The catalogue outlives a start, and its loss and damage.
	seq = putRun(c, 1, seq, 2*distinct, 1, 100)
	want = append(want, want[:100]...)
	mustClose(t, s)
	s = r.start()
	if got := mustMerge(t, s); got.Looked > 1000 || s.stored.Load() != distinct {
		t.Fatalf("after a start: %+v, %d stored", got, s.stored.Load())
	}
	check()
	mustClose(t, s)
	tables, err := filepath.Glob(filepath.Join(dir, "*", "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatal(tables, err)
	}
	for _, path := range tables {
		if err := os.Truncate(path, 100); err != nil {
			t.Fatal(err)
		}
	}
	s = r.start()
	c = newClient(t, s)
	putRun(c, 1, seq, 2*distinct+100, 200, 100)
	for i := range uint64(100) {
		want = append(want, 200+i)
	}
	if got := mustMerge(t, s); got.Looked < distinct || s.stored.Load() != distinct {
		t.Fatalf("after damage: %+v, %d stored", got, s.stored.Load())
	}
	check()
	mustClose(t, s)
}

// TestMergeShared: words of leaves that snapshots and clones share are merged in place, for all of
// them, and what they count stays right when they go, in any order.
func TestMergeShared(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 2, 24<<20)
	r.opts = func(c *Config) { c.ScrubInterval = -1 }
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, 4096)
	mustCreate(t, s, 2, 4096)
	c := newClient(t, s)
	seq := putRun(c, 1, 1, 0, 1, 600)
	<-s.filled
	for n := uint64(1); n <= 600; n++ {
		fp := c.red.Fingerprint(small(n))
		unindex(s, &fp)
	}
	seq = putRun(c, 1, seq, 1024, 1, 600)
	c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: 9})
	c.must(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, 1}, Start: 512, Count: 600, Source: 1, SourceStart: 1024})
	// A part of the volume's leaf is its own from here on.
	seq = putRun(c, 1, seq+1, 1030, 2000, 3)
	if n := s.stored.Load(); n != 1203 {
		t.Fatal(n)
	}
	if err := s.mergePass(ctx, mapCatalogue{}); err != nil {
		t.Fatal(err)
	}
	if n := s.stored.Load(); n != 603 {
		t.Fatalf("%d blocks are stored, want 603", n)
	}
	one, two := &plane{seq: seq - 1, main: make([]uint64, 4096), annex: make([]uint64, annexModelled)}, &plane{seq: 1, main: make([]uint64, 4096), annex: make([]uint64, annexModelled)}
	for i := range 600 {
		one.main[i], one.main[1024+i], two.main[512+i] = uint64(i+1), uint64(i+1), uint64(i+1)
	}
	copy(one.main[1030:], []uint64{2000, 2001, 2002})
	w := &world{rng: testRand(1), vols: map[VolumeID]*plane{1: one, 2: two}}
	w.mustMatch(t, s)
	// The snapshot and the volume differ in three blocks only.
	n := uint64(0)
	list, _, err := s.ChangedRanges(ctx, 9, 1, 0, make([]Extent, 0, 100))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range list {
		if !x.Same {
			n += x.Blocks
		}
	}
	if n != 3 {
		t.Fatalf("%d blocks differ: %+v", n, list)
	}
	mustClose(t, s)
	s = r.start()
	w.mustMatch(t, s)
	if err := s.DeleteVolume(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteSnapshot(ctx, 9); err != nil {
		t.Fatal(err)
	}
	if err := s.trimmer.wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	delete(w.vols, 1)
	w.mustMatch(t, s)
	if n := s.stored.Load(); n != 600 {
		t.Fatalf("%d blocks are stored, want 600", n)
	}
	mustClose(t, s)
}

// TestMergeBesideOperations: passes run while volumes are written, unmapped, cloned, and
// snapshots come and go; before and after a start everything reads as the model says.
func TestMergeBesideOperations(t *testing.T) {
	operations := 150
	if testing.Short() {
		operations = 60
	}
	eachSeed(t, 3, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		r := newRig(t, seed, 24<<20, 16<<20)
		r.opts = func(c *Config) { c.ScrubInterval = -1 }
		r.configure()
		s := r.start()
		w := &world{rng: testRand(seed), vols: map[VolumeID]*plane{}, many: 700}
		w.create(t, s)
		w.create(t, s)
		w.create(t, s)
		for round := range 3 {
			c := newClient(t, s)
			stop := make(chan struct{})
			var passes sync.WaitGroup
			passes.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(round)))
				for {
					select {
					case <-stop:
						return
					default:
					}
					for n := range uint64(700) {
						if rng.IntN(2) == 0 {
							fp := dedup.NewReducer(testKey).Fingerprint(small(n + 1))
							unindex(s, &fp)
						}
					}
					if err := s.mergePass(ctx, mapCatalogue{}); err != nil {
						t.Error(err)
						return
					}
				}
			})
			snap := VolumeID(0)
			for i := range operations {
				id := w.pick()
				op, effect := w.op(c, id)
				c.must(op)
				effect()
				w.vols[id].seq++
				if i%20 == 10 {
					snap = VolumeID(1000*uint64(round+1) + uint64(i))
					c.must(&Op{Kind: OpSnapshot, Volume: id, ID: OpID{1, w.vols[id].seq + 1}, Snapshot: snap})
					w.vols[id].seq++
				}
				if i%20 == 19 && snap != 0 {
					if err := s.DeleteSnapshot(ctx, snap); err != nil {
						t.Fatal(err)
					}
				}
				if i%40 == 30 {
					if err := s.checkpoint(); err != nil {
						t.Fatal(err)
					}
				}
			}
			close(stop)
			passes.Wait()
			if s.Merge().Blocks == 0 {
				t.Fatal("nothing was merged: the test tests nothing")
			}
			w.mustMatch(t, s)
			if round == 1 {
				evict(s)
			}
			if round%2 == 0 {
				mustClose(t, s)
			} else {
				next := r.crash(devicetest.CrashOptions{Seed: seed})
				mustClose(t, s)
				r = next
			}
			s = r.start()
			w.mustMatch(t, s)
		}
		mustClose(t, s)
	})
}

// TestMergeLeavesDamage: a block whose stored bytes are damaged is not made one with an
// intact one, in either direction.
func TestMergeLeavesDamage(t *testing.T) {
	for _, damaged := range []int{0, 1} {
		r := newRig(t, 4, 12<<20)
		r.opts = func(c *Config) { c.ScrubInterval = -1 }
		r.configure()
		s := r.start()
		mustCreate(t, s, 1, 100)
		c := newClient(t, s)
		seq := putRun(c, 1, 1, 0, 1, 1)
		fp := c.red.Fingerprint(small(1))
		<-s.filled // or it is put back
		unindex(s, &fp)
		putRun(c, 1, seq, 50, 1, 1)
		n := 0
		err := s.eachEntryPage(nil, func(_ BID, page []byte) {
			for i := range format.EntriesPerPage {
				var e format.Entry
				if format.ParseEntry(format.EntryAt(page, i), &e); e.Addr != 0 {
					if n == damaged {
						d, off := s.segs.locate(e.Addr)
						r.disks[d.Path()].FlipBit(off, 3)
					}
					n++
				}
			}
		})
		if err != nil || n != 2 {
			t.Fatal(n, err)
		}
		if err := s.mergePass(context.Background(), mapCatalogue{}); err != nil {
			t.Fatal(err)
		}
		if n := s.stored.Load(); n != 2 {
			t.Fatalf("%d blocks are stored, want 2", n)
		}
		if report, err := s.Check(context.Background()); err != nil || !report.OK() {
			t.Fatal(report, err)
		}
		mustClose(t, s)
	}
}
