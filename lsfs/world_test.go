package lsfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

// annexModelled is how much of each annex the tests use and look at.
const annexModelled = 2100

// plane is the model of a volume with its annex: numbers of patterns, 0 is a hole.
type plane struct {
	seq         Seq
	main, annex []uint64
}

func (p *plane) clone() *plane {
	return &plane{p.seq, slices.Clone(p.main), slices.Clone(p.annex)}
}

// at is the content from a block on, up to the end of its part.
func (p *plane) at(b BlockNo) []uint64 {
	if AnnexStart <= b {
		return p.annex[b-AnnexStart:]
	}
	return p.main[b:]
}

// world is the model of a few volumes. Its operations are random.
type world struct {
	rng  *rand.Rand
	vols map[VolumeID]*plane
	last VolumeID
	many uint64 // distinct blocks
}

var smallBlocks sync.Map

// small is a block that is told apart by n and compresses to almost nothing.
func small(n uint64) []byte {
	if b, ok := smallBlocks.Load(n); ok {
		return b.([]byte)
	}
	b := make([]byte, dedup.BlockSize)
	for i := 0; i < len(b) && n != 0; i += 512 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
	smallBlocks.Store(n, b)
	return b
}

func (w *world) create(tb testing.TB, s *Store) {
	w.last++
	p := &plane{main: make([]uint64, 1100+w.rng.Uint64N(3000)), annex: make([]uint64, annexModelled)}
	mustCreate(tb, s, w.last, uint64(len(p.main)))
	w.vols[w.last] = p
}

func (w *world) pick() VolumeID {
	var ids []VolumeID
	for id := range w.vols {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids[w.rng.IntN(len(ids))]
}

// place picks a range of at most n blocks whose start is phase behind a leaf's.
func (w *world) place(p *plane, annex bool, phase, n uint64) (BlockNo, uint64) {
	base, size := BlockNo(0), uint64(len(p.main))
	if annex {
		base, size = AnnexStart, annexModelled
	}
	start := w.rng.Uint64N((size-phase+511)/512)*512 + phase
	return base + BlockNo(start), min(n, size-start)
}

// op makes the next operation of a volume and what it does to the model.
func (w *world) op(c *client, id VolumeID) (*Op, func()) {
	rng, p := w.rng, w.vols[id]
	op := &Op{Volume: id, ID: OpID{1, p.seq + 1}}
	phase := uint64(0)
	if rng.IntN(2) == 0 {
		phase = rng.Uint64N(512)
	}
	n := []uint64{rng.Uint64N(20) + 1, rng.Uint64N(700) + 1, 512 * (1 + rng.Uint64N(3)), 4096}[rng.IntN(4)]
	switch k := rng.IntN(10); {
	case k < 3:
		start, n := w.place(p, false, phase, min(n, 600))
		nums := make([]uint64, n)
		var data []byte
		for i := range nums {
			if rng.IntN(10) > 0 {
				nums[i] = rng.Uint64N(w.many) + 1
			}
			data = append(data, small(nums[i])...)
		}
		op = c.write(id, p.seq+1, start, data)
		return op, func() { copy(p.at(start), nums) }
	case k < 5:
		start, n := w.place(p, rng.IntN(4) == 0, phase, n)
		op.Kind, op.Start, op.Count = OpUnmap, start, uint32(n)
		return op, func() { clear(p.at(start)[:n]) }
	}
	from := id
	if rng.IntN(3) > 0 {
		from = w.pick()
	}
	src := w.vols[from]
	start, n := w.place(p, rng.IntN(4) == 0, phase, n)
	if rng.IntN(3) == 0 {
		phase = rng.Uint64N(512)
	}
	srcStart, n := w.place(src, rng.IntN(4) == 0, phase, n)
	op.Kind, op.Start, op.Count, op.Source, op.SourceStart = OpClone, start, uint32(n), from, srcStart
	return op, func() { copy(p.at(start)[:n], src.at(srcStart)[:n]) }
}

// mustMatch compares a volume with its model: content, extents, counters.
func mustMatch(tb testing.TB, v *Volume, p *plane, rng *rand.Rand) {
	tb.Helper()
	ctx := context.Background()
	for _, part := range []struct {
		start BlockNo
		want  []uint64
		count uint64
	}{{0, p.main, v.MappedBlocks()}, {AnnexStart, p.annex, v.AnnexMapped()}} {
		got := make([]byte, len(part.want)*dedup.BlockSize)
		if err := v.Read(ctx, uint64(part.start)*dedup.BlockSize, got); err != nil {
			tb.Fatal(err)
		}
		mapped := uint64(0)
		for i, n := range part.want {
			if n != 0 {
				mapped++
			}
			if !bytes.Equal(got[i*dedup.BlockSize:(i+1)*dedup.BlockSize], small(n)) {
				tb.Fatalf("volume %d block %d is not %d", v.ID(), uint64(part.start)+uint64(i), n)
			}
		}
		if mapped != part.count {
			tb.Fatalf("volume %d counts %d blocks from %d on, has %d", v.ID(), part.count, part.start, mapped)
		}
		end := part.start + BlockNo(len(part.want))
		dst := make([]Extent, 0, 1+rng.IntN(20))
		for at, last := part.start, -1; at < end; {
			list, err := v.Extents(ctx, at, end, dst)
			if err != nil || len(list) == 0 {
				tb.Fatalf("%d extents of volume %d from %d: %v", len(list), v.ID(), at, err)
			}
			for i, x := range list {
				kind := map[bool]int{false: 0, true: 1}[x.Mapped]
				if i > 0 && kind == last || x.Blocks == 0 || uint64(end-at) < x.Blocks {
					tb.Fatalf("volume %d: extents %v from %d", v.ID(), list, at)
				}
				last = kind
				for range x.Blocks {
					if (part.want[at-part.start] != 0) != x.Mapped {
						tb.Fatalf("volume %d block %d: mapped is %v", v.ID(), at, x.Mapped)
					}
					at++
				}
			}
			last = -1
		}
	}
}

// evict takes every page out of RAM that may go. What an operation needs and does not
// hold is so missing when it is applied.
func evict(s *Store) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pg := s.pg
	for f := uint32(1); f < uint32(len(pg.slabs))*slabFrames; f++ {
		fr := pg.frameOf(f)
		if fr.page == 0 || fr.guard == pg.round {
			continue
		}
		if p := pg.page(fr.page); p.frame == f && p.flags&(pageDirty|pageCut|pageStaged) == 0 {
			p.frame = 0
			pg.nUsed.Add(-1)
			pg.release(f)
		}
	}
}

func (w *world) mustMatch(tb testing.TB, s *Store) {
	tb.Helper()
	for id, p := range w.vols {
		v := s.Volume(id)
		if v == nil || v.Meta().Durable.Seq != p.seq {
			tb.Fatalf("volume %d is not at %d", id, p.seq)
		}
		mustMatch(tb, v, p, w.rng)
	}
	mustCheck(tb, s)
}

func testRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 7)) }
