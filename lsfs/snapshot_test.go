package lsfs

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// The tests of snapshots model three windows of a volume: at its start, far behind it
// under another page of another page, and at the start of the annex.
const (
	nearBlocks  = 2100
	farBlocks   = 1100
	annexBlocks = 1100
	// Where far is: under the second page of the third level, or of the fourth, where the
	// top page leads to the annex too.
	farMedium = 1 << 19
	farLarge  = 1 << 28
)

// content is the model of what a volume or snapshot holds.
type content struct {
	size             uint64
	farStart         uint64
	near, far, annex []uint64 // numbers of patterns, 0 is a hole
	version          map[uint64]Seq
	floor            Seq
}

func (g *gallery) content(size uint64) *content {
	return &content{size: size, farStart: g.farStart, near: make([]uint64, nearBlocks), far: make([]uint64, farBlocks), annex: make([]uint64, annexBlocks), version: map[uint64]Seq{}}
}

func (p *content) clone() *content {
	q := &content{size: p.size, farStart: p.farStart, near: slices.Clone(p.near), far: slices.Clone(p.far), annex: slices.Clone(p.annex), version: map[uint64]Seq{}, floor: p.floor}
	for c, v := range p.version {
		q.version[c] = v
	}
	return q
}

// main is a copy without the annex.
func (p *content) main() *content {
	q := p.clone()
	clear(q.annex)
	for c := range q.version {
		if annexChunk <= c {
			delete(q.version, c)
		}
	}
	return q
}

// word is the place of a modelled block, nil for others.
func (p *content) word(b uint64) *uint64 {
	switch {
	case b < nearBlocks:
		return &p.near[b]
	case p.farStart <= b && b < p.farStart+farBlocks:
		return &p.far[b-p.farStart]
	case uint64(AnnexStart) <= b && b < uint64(AnnexStart)+annexBlocks:
		return &p.annex[b-uint64(AnnexStart)]
	}
	return nil
}

func (p *content) stamp(start, n uint64, seq Seq) {
	for c := start >> chunkShift; c <= (start+n-1)>>chunkShift; c++ {
		if b := c << chunkShift; p.word(b) != nil || p.word(b+chunkBlocksLast) != nil {
			p.version[c] = seq
		}
	}
}

// stampMapped is stamp for an unmap that is about to happen: chunks without one of its blocks
// stay as they are; a leaf that lies wholly inside counts as one.
func (p *content) stampMapped(start, n uint64, seq Seq) {
	for leaf := start &^ (format.WordsPerPage - 1); leaf < start+n; leaf += format.WordsPerPage {
		if p.word(leaf) == nil && p.word(leaf+format.WordsPerPage-1) == nil {
			// Nothing of it is modelled, and nothing is there: on to what may be.
			if leaf < p.farStart && p.farStart < start+n {
				leaf = max(leaf, p.farStart&^(format.WordsPerPage-1)-format.WordsPerPage)
				continue
			}
			if nearBlocks <= leaf && (leaf < p.farStart || p.farStart+farBlocks <= leaf) && leaf < uint64(AnnexStart) {
				return
			}
			continue
		}
		from, end := max(start, leaf), min(start+n, leaf+format.WordsPerPage)
		for from < end {
			to := end
			if from != leaf || end != leaf+format.WordsPerPage {
				to = min(end, nextSpan(from, chunkShift))
			}
			for i := from; i < to; i++ {
				if w := p.word(i); w != nil && *w != 0 {
					p.stamp(from, to-from, seq)
					break
				}
			}
			from = to
		}
	}
}

const chunkBlocksLast = ChunkBlocks - 1

// cut makes the content end at size.
func (p *content) cut(size uint64) {
	p.size = size
	for b := size; b < p.farStart+farBlocks; b++ {
		if b >= nearBlocks && b < p.farStart {
			b = p.farStart - 1
			continue
		}
		*p.word(b) = 0
	}
	for c := range p.version {
		if size <= c<<chunkShift && c < annexChunk {
			delete(p.version, c)
		}
	}
}

func (p *content) mapped() (main, annex uint64) {
	for _, part := range [][]uint64{p.near, p.far} {
		for _, n := range part {
			if n != 0 {
				main++
			}
		}
	}
	for _, n := range p.annex {
		if n != 0 {
			annex++
		}
	}
	return main, annex
}

type modelVolume struct {
	*content
	seq Seq
}

type modelSnapshot struct {
	*content
	of    VolumeID
	point OpID
}

// gallery is the model of a store with snapshots.
type gallery struct {
	rng     *rand.Rand
	vols    map[VolumeID]*modelVolume
	snaps   map[VolumeID]*modelSnapshot
	forging map[VolumeID]*modelSnapshot
	last    VolumeID
	many    uint64

	farStart uint64
}

func newGallery(seed uint64) *gallery {
	return &gallery{rng: rand.New(rand.NewPCG(seed, 11)), vols: map[VolumeID]*modelVolume{}, snaps: map[VolumeID]*modelSnapshot{}, forging: map[VolumeID]*modelSnapshot{}, many: 60 + seed%3*4000, farStart: []uint64{farMedium, farLarge}[seed%2]}
}

func pickOf[T any](g *gallery, m map[VolumeID]T) VolumeID {
	var ids []VolumeID
	for id := range m {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids[g.rng.IntN(len(ids))]
}

func (g *gallery) size() uint64 {
	if g.rng.IntN(2) == 0 {
		return 600 + g.rng.Uint64N(nearBlocks-600)
	}
	return g.farStart + 100 + g.rng.Uint64N(farBlocks-100)
}

func (g *gallery) create(tb testing.TB, s *Store) {
	g.last++
	p := g.content(g.size())
	mustCreate(tb, s, g.last, p.size)
	g.vols[g.last] = &modelVolume{content: p}
}

// place picks a range of at most n blocks.
func (g *gallery) place(p *content, annex bool, n uint64) (start, count uint64) {
	first, end := uint64(0), min(p.size, nearBlocks)
	switch {
	case annex && g.rng.IntN(4) == 0:
		first, end = uint64(AnnexStart), uint64(AnnexStart)+annexBlocks
	case p.farStart < p.size && g.rng.IntN(2) == 0:
		first, end = p.farStart, p.size
	}
	start = first + g.rng.Uint64N(end-first)
	if g.rng.IntN(2) == 0 {
		start &^= 511
	}
	return start, min(n, end-start)
}

// op makes the next operation of a volume and what it does to the model.
func (g *gallery) op(c *client, id VolumeID) (*Op, func()) {
	rng, p := g.rng, g.vols[id]
	seq := p.seq + 1
	op := &Op{Volume: id, ID: OpID{1, seq}}
	n := []uint64{rng.Uint64N(20) + 1, rng.Uint64N(700) + 1, 512, 1024}[rng.IntN(4)]
	set := func(start uint64, words []uint64) {
		for i, w := range words {
			*p.word(start + uint64(i)) = w
		}
		p.stamp(start, uint64(len(words)), seq)
	}
	switch k := rng.IntN(20); {
	case k < 8:
		start, n := g.place(p.content, false, min(n, 600))
		nums := make([]uint64, n)
		var data []byte
		for i := range nums {
			if rng.IntN(10) > 0 {
				nums[i] = rng.Uint64N(g.many) + 1
			}
			data = append(data, small(nums[i])...)
		}
		return c.write(id, seq, BlockNo(start), data), func() { set(start, nums) }
	case k < 11:
		start, n := g.place(p.content, true, n)
		op.Kind, op.Start, op.Count = OpUnmap, BlockNo(start), uint32(n)
		return op, func() {
			p.stampMapped(start, n, seq)
			for i := range n {
				*p.word(start + i) = 0
			}
		}
	case k == 11 && rng.IntN(4) == 0:
		n := min(p.size, farMedium)
		op.Kind, op.Count = OpUnmap, uint32(n)
		if farMedium < p.size && p.farStart == farMedium {
			n = p.size
			op.Count = uint32(n)
		}
		return op, func() {
			p.stampMapped(0, n, seq)
			clear(p.near)
			if p.farStart < n {
				clear(p.far)
			}
		}
	case k < 15:
		op.Kind = OpSnapshot
		g.last++
		sid := g.last
		op.Snapshot = sid
		return op, func() { g.snaps[sid] = &modelSnapshot{p.main(), id, op.ID} }
	case k == 15 && len(g.snaps) > 0:
		op.Kind, op.Snapshot = OpRollback, pickOf(g, g.snaps)
		from := g.snaps[op.Snapshot]
		return op, func() {
			annex, version := p.annex, p.version
			p.content = from.main()
			p.annex, p.floor = annex, seq
			clear(p.version)
			for c, v := range version {
				if annexChunk <= c {
					p.version[c] = v
				}
			}
		}
	}
	src := p.content
	op.Source = id
	switch rng.IntN(4) {
	case 0:
		op.Source = pickOf(g, g.vols)
		src = g.vols[op.Source].content
	case 1, 2:
		if len(g.snaps) > 0 {
			op.Source = pickOf(g, g.snaps)
			src = g.snaps[op.Source].content
		}
	}
	start, n := g.place(p.content, true, n)
	from, n := g.place(src, g.vols[op.Source] != nil, n)
	op.Kind, op.Start, op.Count, op.SourceStart = OpClone, BlockNo(start), uint32(n), BlockNo(from)
	return op, func() {
		words := make([]uint64, n)
		for i := range words {
			words[i] = *src.word(from + uint64(i))
		}
		set(start, words)
	}
}

type reading interface {
	Read(ctx context.Context, off uint64, dst []byte) error
	Blocks() uint64
	MappedBlocks() uint64
	ChunkVersions(ctx context.Context, first uint32, dst []Seq) error
	ChangedChunks(ctx context.Context, since Seq) ([]uint32, error)
}

// mustHold compares a volume or snapshot with the model.
func (p *content) mustHold(tb testing.TB, name string, id VolumeID, v reading, annex bool) {
	tb.Helper()
	ctx := context.Background()
	main, _ := p.mapped()
	if v.Blocks() != p.size || v.MappedBlocks() != main {
		tb.Fatalf("%s %d has %d blocks, %d mapped; not %d and %d", name, id, v.Blocks(), v.MappedBlocks(), p.size, main)
	}
	windows := [][2]uint64{{0, min(p.size, nearBlocks)}}
	if p.farStart < p.size {
		windows = append(windows, [2]uint64{p.farStart, p.size})
	}
	if annex {
		windows = append(windows, [2]uint64{uint64(AnnexStart), uint64(AnnexStart) + annexBlocks})
	}
	for _, w := range windows {
		got := make([]byte, (w[1]-w[0])*dedup.BlockSize)
		if err := v.Read(ctx, w[0]*dedup.BlockSize, got); err != nil {
			tb.Fatalf("%s %d: %v", name, id, err)
		}
		for b := w[0]; b < w[1]; b++ {
			if !bytes.Equal(got[(b-w[0])*dedup.BlockSize:][:dedup.BlockSize], small(*p.word(b))) {
				tb.Fatalf("%s %d block %d is not %d", name, id, b, *p.word(b))
			}
		}
		first := w[0] >> chunkShift
		versions := make([]Seq, (w[1]-1)>>chunkShift-first+1)
		if err := v.ChunkVersions(ctx, uint32(first), versions); err != nil {
			tb.Fatal(err)
		}
		for i, got := range versions {
			want := p.version[first+uint64(i)]
			if w[0] < uint64(AnnexStart) {
				want = max(want, p.floor)
			}
			if got != want {
				tb.Fatalf("%s %d chunk %d has version %d, not %d", name, id, first+uint64(i), got, want)
			}
		}
	}
}

// mustMatch compares everything with the model.
func (g *gallery) mustMatch(tb testing.TB, s *Store) {
	tb.Helper()
	// MappedBlocks counts a tail until it is given back.
	if err := s.trimmer.wait(context.Background(), 0); err != nil {
		tb.Fatal(err)
	}
	for id, p := range g.vols {
		v := s.Volume(id)
		if v == nil || v.Meta().Durable.Seq != p.seq {
			tb.Fatalf("volume %d is not at %d", id, p.seq)
		}
		p.mustHold(tb, "volume", id, v, true)
		if _, annex := p.mapped(); v.AnnexMapped() != annex {
			tb.Fatalf("volume %d has %d blocks in its annex, not %d", id, v.AnnexMapped(), annex)
		}
	}
	list := s.Snapshots(0)
	if len(list) != len(g.snaps) {
		tb.Fatalf("%d snapshots, not %d", len(list), len(g.snaps))
	}
	for i, n := range list {
		p := g.snaps[n.ID()]
		if p == nil || n.Volume() != p.of || n.Point() != p.point || s.Snapshot(n.ID()) != n {
			tb.Fatalf("snapshot %d of volume %d at %v", n.ID(), n.Volume(), n.Point())
		}
		if i > 0 && n.of == list[i-1].of && n.point.Seq < list[i-1].point.Seq {
			tb.Fatal("snapshots are not in their order")
		}
		p.mustHold(tb, "snapshot", n.ID(), n, false)
	}
	for id, p := range g.forging {
		if s.Snapshot(id) != nil || s.Forged(id) == nil {
			tb.Fatalf("snapshot %d is listed, or not being forged", id)
		}
		main, _ := p.mapped()
		if got := s.Forged(id).MappedBlocks(); got != main {
			tb.Fatalf("forged snapshot %d maps %d blocks, not %d", id, got, main)
		}
	}
	mustCheck(tb, s)
}

// side picks a volume or a snapshot.
func (g *gallery) side() (VolumeID, *content) {
	if len(g.snaps) > 0 && g.rng.IntN(3) > 0 {
		id := pickOf(g, g.snaps)
		return id, g.snaps[id].content
	}
	id := pickOf(g, g.vols)
	return id, g.vols[id].content
}

// mustDiffer compares ChangedRanges of a random pair with the model.
func (g *gallery) mustDiffer(tb testing.TB, s *Store) {
	tb.Helper()
	from, a := g.side()
	to, b := g.side()
	if g.rng.IntN(4) == 0 {
		from, a = 0, g.content(1)
	}
	dst := make([]Extent, 0, 2+g.rng.IntN(30))
	at := BlockNo(0)
	if g.rng.IntN(3) == 0 {
		at = BlockNo(g.rng.Uint64N(b.size))
	}
	for at < BlockNo(b.size) {
		list, next, err := s.ChangedRanges(context.Background(), from, to, at, dst)
		if err != nil || len(list) == 0 || next <= at {
			tb.Fatalf("changes from %d to %d at %d: %v, on to %d: %v", from, to, at, list, next, err)
		}
		for i, x := range list {
			if x.Blocks == 0 || i > 0 && x.Same == list[i-1].Same && x.Mapped == list[i-1].Mapped {
				tb.Fatalf("changes from %d to %d at %d: %v", from, to, at, list)
			}
			for end := at + BlockNo(x.Blocks); at < end; at++ {
				w := b.word(uint64(at))
				if w == nil {
					if !x.Same {
						tb.Fatalf("changes from %d to %d: block %d is %v", from, to, at, x)
					}
					at = min(end, BlockNo(g.farStart)) - 1
					continue
				}
				was := uint64(0)
				if uint64(at) < a.size && from != 0 {
					was = *a.word(uint64(at))
				}
				if x.Same != (was == *w) || !x.Same && x.Mapped != (*w != 0) || x.Same && x.Mapped {
					tb.Fatalf("changes from %d to %d: block %d was %d, is %d, but %+v", from, to, at, was, *w, x)
				}
			}
		}
		if at != next {
			tb.Fatalf("changes from %d to %d end at %d, not at %d", from, to, at, next)
		}
	}
	if at != BlockNo(b.size) {
		tb.Fatalf("changes from %d to %d end at %d of %d", from, to, at, b.size)
	}
}

// forge makes a copy of a snapshot, as a replica that missed it would.
func (g *gallery) forge(tb testing.TB, s *Store, c *client) {
	tb.Helper()
	ctx := context.Background()
	like := g.snaps[pickOf(g, g.snaps)]
	base, have := VolumeID(0), g.content(like.size)
	if g.rng.IntN(3) > 0 {
		id, p := g.side()
		base, have = id, p.main()
		have.cut(min(like.size, have.size))
		have.size = like.size
	}
	g.last++
	id := g.last
	if err := s.ForgeSnapshot(ctx, id, like.of, base, like.size); err != nil {
		tb.Fatal(err)
	}
	if err := s.ForgeSnapshot(ctx, id, like.of, base, like.size); !errors.Is(err, ErrExists) {
		tb.Fatal(err)
	}
	for _, w := range [][2]uint64{{0, min(like.size, nearBlocks)}, {like.farStart, like.size}} {
		for b := w[0]; b < w[1]; {
			if *have.word(b) == *like.word(b) {
				b++
				continue
			}
			// A range that is copied need not be all different.
			end := min(w[1], b+1+g.rng.Uint64N(200))
			op := &Op{Kind: OpUnmap, Volume: id, Start: BlockNo(b), Count: uint32(end - b)}
			hole := true
			var data []byte
			for i := b; i < end; i++ {
				hole = hole && *like.word(i) == 0
				data = append(data, small(*like.word(i))...)
			}
			if !hole {
				op = c.write(id, 0, BlockNo(b), data)
				op.Kind = OpCopy
			}
			op.ID = OpID{1, Seq(b + 1)}
			c.must(op)
			if hole {
				have.stampMapped(b, end-b, op.ID.Seq)
			} else {
				have.stamp(b, end-b, op.ID.Seq)
			}
			for i := b; i < end; i++ {
				*have.word(i) = *like.word(i)
			}
			b = end
		}
	}
	version, floor := have.version, have.floor
	have = like.main()
	have.version, have.floor = version, floor
	p := &modelSnapshot{have, like.of, like.point}
	if err := c.do(&Op{Kind: OpSnapshot, Volume: id, ID: OpID{1, 1}, Snapshot: 1 << 40}); !errors.Is(err, ErrNoVolume) {
		tb.Fatalf("snapshot of a forged snapshot: %v", err)
	}
	if err := s.trimmer.wait(ctx, 0); err != nil {
		tb.Fatal(err)
	}
	have.mustHold(tb, "forged", id, s.Forged(id), false)
	switch g.rng.IntN(3) {
	case 0:
		if err := s.AbandonSnapshot(ctx, id); err != nil {
			tb.Fatal(err)
		}
		if err := s.SealSnapshot(ctx, id, p.point); !errors.Is(err, ErrNoVolume) {
			tb.Fatal(err)
		}
	case 1:
		g.forging[id] = p
	default:
		for range 2 {
			if err := s.SealSnapshot(ctx, id, p.point); err != nil {
				tb.Fatal(err)
			}
		}
		g.snaps[id] = p
	}
}

// TestSnapshotModel runs random operations on volumes, snapshots of them, clones of those,
// rollbacks, resizes, forged snapshots and clones of ranges between all of them against a
// plain model, with pages evicted between looking and changing, cleaning, checkpoints,
// restarts and power cuts.
func TestSnapshotModel(t *testing.T) {
	met := &coldStores{}
	defer met.mustHave(t, false)
	eachSeed(t, 3, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		g := newGallery(seed)
		rng := g.rng
		r := newRig(t, seed, 32<<20, 16<<20)
		r.cold = met.every(2, seed+1)
		s := r.start()
		var c *client
		begin := func() {
			c = newClient(t, s)
			if rng.IntN(2) == 0 {
				s.enter()
				s.dirtySoft, s.dirtyHard = 80, 140
				s.leave()
			}
			if rng.IntN(3) == 0 {
				s.enter()
				s.parentsMax = uint32(2 + rng.IntN(8))
				s.leave()
			}
			s := s
			for _, d := range r.disks {
				d.Observe(func(op devicetest.Op) {
					if op.Kind == devicetest.Write {
						evict(s)
					}
				})
			}
		}
		reopen := func() {
			for _, d := range r.disks {
				d.Observe(nil)
			}
			s = r.start()
			clear(g.forging)
			begin()
			g.mustMatch(t, s)
		}
		begin()
		g.create(t, s)
		g.create(t, s)
		for i := range 90 {
			switch k := rng.IntN(48); {
			case k < 28:
				id := pickOf(g, g.vols)
				var wg sync.WaitGroup
				for range 1 + rng.IntN(4) {
					op, do := g.op(c, id)
					op.Done = func(op *Op, err error) {
						if err != nil {
							t.Error(op.Kind, err)
						}
						wg.Done()
					}
					wg.Add(1)
					s.Append(op)
					do()
					g.vols[id].seq++
				}
				s.Kick()
				wg.Wait()
			case k < 30:
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
			case k == 30:
				if n, ok := s.victim(rng.IntN(2) == 0); r.cold != nil {
					chill(s, 8, rng.IntN(2) == 0)
				} else if ok {
					s.cleaner.mu.Lock()
					s.cleanSegment(n)
					s.cleaner.mu.Unlock()
				}
			case k < 33 && len(g.vols) > 2:
				id := pickOf(g, g.vols)
				if err := s.DeleteVolume(ctx, id); err != nil {
					t.Fatal(err)
				}
				delete(g.vols, id)
			case k == 33 && len(g.vols) < 5:
				g.create(t, s)
			case k < 36:
				id := pickOf(g, g.vols)
				p := g.vols[id]
				n := g.size()
				if err := s.Volume(id).Resize(ctx, n); err != nil {
					t.Fatal(err)
				}
				if n < p.size {
					p.cut(n)
				}
				p.size = n
			case k < 38 && len(g.snaps) > 0 && len(g.vols) < 5:
				from := pickOf(g, g.snaps)
				p := &modelVolume{g.snaps[from].main(), 1}
				clear(p.version)
				p.floor = 1
				if rng.IntN(2) == 0 {
					p.size = max(p.size, g.size())
				}
				g.last++
				if _, err := s.CreateVolumeFrom(ctx, g.last, p.size, [16]byte{1}, from); err != nil {
					t.Fatal(err)
				}
				g.vols[g.last] = p
			case k < 41 && len(g.snaps) > 0:
				id := pickOf(g, g.snaps)
				n := s.Snapshot(id)
				if err := s.DeleteSnapshot(ctx, id); err != nil {
					t.Fatal(err)
				}
				delete(g.snaps, id)
				if err := n.Read(ctx, 0, make([]byte, 4096)); !errors.Is(err, ErrNoVolume) {
					t.Fatalf("read of a deleted snapshot: %v", err)
				}
				if err := s.DeleteSnapshot(ctx, id); !errors.Is(err, ErrNoVolume) {
					t.Fatalf("second delete: %v", err)
				}
			case k < 43 && len(g.snaps) > 0:
				g.forge(t, s, c)
			case k < 46:
				g.mustDiffer(t, s)
			case k == 46:
				mustClose(t, s)
				reopen()
			case k == 47:
				old := s
				r = r.crash(devicetest.CrashOptions{Seed: rng.Uint64(), Keep: rng.Float64(), Tear: true})
				mustClose(t, old)
				reopen()
			}
			if i%5 == 0 {
				g.mustMatch(t, s)
			} else if rep, err := s.Check(ctx); err != nil || !rep.OK() {
				t.Fatal(rep, err)
			}
			if t.Failed() {
				t.FailNow()
			}
		}
		g.mustMatch(t, s)
		var ids []VolumeID
		for id := range g.vols {
			ids = append(ids, id)
		}
		for id := range g.snaps {
			ids = append(ids, id)
		}
		for id := range g.forging {
			ids = append(ids, id)
		}
		slices.Sort(ids)
		rng.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
		for _, id := range ids {
			err := error(nil)
			switch {
			case g.vols[id] != nil:
				err = s.DeleteVolume(ctx, id)
			case g.snaps[id] != nil:
				err = s.DeleteSnapshot(ctx, id)
			default:
				err = s.AbandonSnapshot(ctx, id)
			}
			if err != nil {
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
