package lsfs

import (
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// mustAddUp checks that the parts of an explanation are the pool.
func mustAddUp(tb testing.TB, e *Explanation) {
	tb.Helper()
	sum := int64(0)
	for _, n := range []int64{e.Volumes, e.Snapshots, e.Leaving, e.Unsettled, e.Metadata, e.Garbage, e.Returning, e.Reserved, e.Available} {
		if sum += n; n < 0 {
			tb.Errorf("a part is negative: %+v", e)
		}
	}
	if sum != e.Size {
		tb.Errorf("the parts make %d, the pool has %d: %+v", sum, e.Size, e)
	}
	if e.Deduplicated < 0 || e.Mapped != e.Deduplicated+e.Compressed+e.Volumes {
		tb.Errorf("%d mapped is not %d deduplicated, %d compressed and %d stored", e.Mapped, e.Deduplicated, e.Compressed, e.Volumes)
	}
}

// mustExplain compares an explanation with the pool, counted in another way: the set of
// identities of each volume and snapshot.
func mustExplain(tb testing.TB, s *Store) *Explanation {
	tb.Helper()
	ctx := context.Background()
	e, err := s.Explain(ctx, false, nil)
	if err != nil {
		tb.Fatal(err)
	}
	mustAddUp(tb, e)
	if r := s.Room(); e.Size != r.Size || e.Garbage+e.Returning != r.Garbage || e.Free() != r.Free || e.Live != r.Live || e.Sample != 1 {
		tb.Fatalf("%+v is not %+v", e, r)
	}
	lens := map[uint64]int64{}
	_ = s.eachEntryPage(nil, func(first BID, page []byte) {
		for i := range format.EntriesPerPage {
			if x := format.EntryAt(page, i); format.EntryAddr(x) != 0 {
				lens[uint64(first)+uint64(i)] = int64(format.EntryLen(x))
			}
		}
	})
	k := &checker{s: s, r: &Report{}, parents: make([]uint32, s.pg.n), seen: make([]uint64, (s.pg.n+63)/64)}
	want := map[VolumeID]*VolumeShare{}
	type side struct{ volume, snapshot bool }
	who := map[uint64]map[VolumeID]side{}
	for _, h := range k.holders() {
		v, of := h.v, h.v.id
		if n := s.snapshots[v.id]; n != nil {
			of = n.of
		}
		if want[of] == nil {
			want[of] = &VolumeShare{ID: of, Deleted: true}
		}
		x := want[of]
		met := map[uint64]bool{}
		clear(k.seen)
		err := k.walk(ctx, v.mapTree, wordShift, h.name, false, func(_ uint64, _ uint32, page []byte) {
			for i := range format.WordsPerPage {
				if w := BID(format.Word(page, i)); w != 0 {
					met[w.slot()] = true
				}
			}
		})
		if err != nil || !k.r.OK() {
			tb.Fatal(err, k.r.Problems)
		}
		for w := range met {
			if who[w] == nil {
				who[w] = map[VolumeID]side{}
			}
			was := who[w][of]
			who[w][of] = side{was.volume || !v.bare, was.snapshot || v.bare}
		}
		if v.bare {
			x.Snapshots++
			continue
		}
		x.Deleted, x.Size, x.Mapped = false, int64(v.Blocks())*dedup.BlockSize, int64(v.mapped+v.annex)*dedup.BlockSize
		for w := range met {
			x.Stored += lens[w]
		}
	}
	var volumes, snapshots int64
	for w, n := range lens {
		by := side{}
		for _, x := range who[w] {
			by.volume, by.snapshot = by.volume || x.volume, by.snapshot || x.snapshot
		}
		if by.volume {
			volumes += n
		} else if by.snapshot {
			snapshots += n
		}
		if len(who[w]) != 1 {
			continue
		}
		for of, x := range who[w] {
			want[of].Frees += n
			if !x.volume {
				want[of].SnapshotsOnly += n
			} else if !x.snapshot {
				want[of].Own += n
			}
		}
	}
	if e.Volumes != volumes || e.Snapshots != snapshots || e.Leaving != 0 {
		tb.Fatalf("%d in volumes, %d in snapshots: %+v", volumes, snapshots, e)
	}
	for _, x := range e.List {
		w := want[x.ID]
		if w == nil {
			tb.Fatalf("volume %d does not exist", x.ID)
		}
		w.Reduced, w.FreesMetadata = x.Reduced, x.FreesMetadata // proved where it is deleted
		if x != *w {
			tb.Fatalf("got  %+v\nwant %+v", x, *w)
		}
		if x.Reduced < x.Stored || x.Mapped < x.Reduced {
			tb.Fatalf("%+v", x)
		}
	}
	if len(e.List) != len(want) {
		tb.Fatalf("%d volumes of %d", len(e.List), len(want))
	}
	return e
}

// settle waits until nothing of what was deleted is left.
func settle(t *testing.T, s *Store) {
	t.Helper()
	s.trimmer.kick()
	eventually(t, "what was deleted is gone", func() bool {
		s.mu.RLock()
		defer s.mu.RUnlock()
		for _, v := range s.volumes {
			if v.deleting || len(v.old) > 0 {
				return false
			}
		}
		for _, n := range s.snapshots {
			if n.content.deleting {
				return false
			}
		}
		return true
	})
}

// TestExplain explains pools after random operations with snapshots, rollbacks and clones,
// and then deletes volumes: what was said is given back to the byte.
func TestExplain(t *testing.T) {
	eachSeed(t, 4, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		g := newGallery(seed)
		r := newRig(t, seed, 32<<20, 16<<20)
		s := r.start()
		c := newClient(t, s)
		g.create(t, s)
		g.create(t, s)
		// One who explains beside the operations: it always adds up.
		stop := make(chan struct{})
		var beside sync.WaitGroup
		defer beside.Wait()
		defer func() {
			select {
			case <-stop:
			default:
				close(stop)
			}
		}()
		beside.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				e, err := s.explain(ctx, seed%2 == 0, 256, nil)
				if err != nil {
					t.Error(err)
					return
				}
				mustAddUp(t, e)
			}
		})
		for i := range 60 {
			id := pickOf(g, g.vols)
			op, do := g.op(c, id)
			c.must(op)
			do()
			g.vols[id].seq++
			switch {
			case i%9 == 0 && len(g.snaps) > 3:
				sid := pickOf(g, g.snaps)
				if err := s.DeleteSnapshot(ctx, sid); err != nil {
					t.Fatal(err)
				}
				delete(g.snaps, sid)
			case i%13 == 5:
				evict(s)
			case i%20 == 7:
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
			case i == 30 && len(g.snaps) > 0:
				sid := pickOf(g, g.snaps)
				g.last++
				if _, err := s.CreateVolumeFrom(ctx, g.last, g.snaps[sid].size, [16]byte{9}, sid); err != nil {
					t.Fatal(err)
				}
				g.vols[g.last] = &modelVolume{g.snaps[sid].main(), 1}
			}
		}
		close(stop)
		beside.Wait()
		settle(t, s)
		mustExplain(t, s)

		evict(s)
		one, err := s.Explain(ctx, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		told := 0.0
		many, err := s.explain(ctx, true, 512, func(done float64) {
			if done < told || 1 < done {
				t.Errorf("progress goes from %g to %g", told, done)
			}
			told = done
		})
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(one, many) || told != 1 {
			t.Fatalf("in one window %+v\nin many       %+v", one, many)
		}
		sampled, err := s.explain(ctx, false, 512, nil)
		if err != nil || 512 < s.nextBID && sampled.Sample < 2 {
			t.Fatal(err, sampled)
		}
		mustAddUp(t, sampled)
		stopped, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := s.Explain(stopped, false, nil); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}

		for len(g.vols) > 0 {
			id := pickOf(g, g.vols)
			e := mustExplain(t, s)
			share := e.List[slices.IndexFunc(e.List, func(x VolumeShare) bool { return x.ID == id })]
			before, pages := s.Stats(), s.pg.nAlive.Load()
			for _, sid := range slices.Sorted(maps.Keys(g.snaps)) {
				if g.snaps[sid].of == id {
					if err := s.DeleteSnapshot(ctx, sid); err != nil {
						t.Fatal(err)
					}
					delete(g.snaps, sid)
				}
			}
			settle(t, s)
			if freed := before.UniqueBytes - s.Stats().UniqueBytes; freed != share.SnapshotsOnly {
				t.Fatalf("the snapshots of volume %d gave back %d bytes: %+v", id, freed, share)
			}
			if err := s.DeleteVolume(ctx, id); err != nil {
				t.Fatal(err)
			}
			delete(g.vols, id)
			settle(t, s)
			after := s.Stats()
			if freed := before.UniqueBytes - after.UniqueBytes; freed != share.Frees {
				t.Fatalf("volume %d gave back %d bytes: %+v", id, freed, share)
			}
			// Pages above those of identities go as well when all below them do.
			if freed := (pages - s.pg.nAlive.Load()) * format.PageSize; freed < share.FreesMetadata || share.FreesMetadata+4*format.PageSize < freed {
				t.Fatalf("volume %d gave back %d bytes of pages: %+v", id, freed, share)
			}
		}
		mustClose(t, s)
	})
}
