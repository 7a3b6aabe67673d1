package lsfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

// fillEqual maps count blocks from start on to a few equal blocks, without data.
func fillEqual(c *client, v *Volume, seq *Seq, start, count uint64) {
	for at := start; at < start+count; at += 2048 {
		n := min(2048, start+count-at)
		*seq++
		op := &Op{Kind: OpWrite, Volume: v.ID(), ID: OpID{1, *seq}, Start: BlockNo(at), Count: uint32(n)}
		b, _ := c.reduce(small(1), false)
		for i := range n {
			var bid BID
			if i > 0 || at > start {
				var ok bool
				if bid, ok = c.s.Pin(&b.Fingerprint); ok {
					b.Data = nil
				}
			}
			op.Blocks, op.Pinned = append(op.Blocks, b), append(op.Pinned, bid)
		}
		c.must(op)
	}
}

// TestCloneIsCheap clones 4 GiB of mapped blocks: the log grows by well under 0.1 % of
// it, the checkpoint included, and what overwrites the clone pays for what it touches.
func TestCloneIsCheap(t *testing.T) {
	ctx := context.Background()
	const blocks = 4 << 30 / dedup.BlockSize
	r := newRig(t, 1, 256<<20)
	r.cfg.MetadataBytes = 32 << 20
	s := r.start()
	v := mustCreate(t, s, 1, blocks)
	mustCreate(t, s, 2, blocks)
	c := newClient(t, s)
	seq := Seq(0)
	fillEqual(c, v, &seq, 0, blocks)
	for range 2 {
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	s = r.start() // the leaves are not in RAM
	c = newClient(t, s)
	w := s.Volume(2)
	before := s.Stats()
	seq = 0
	for at := uint64(0); at < blocks; at += ClonedBlocksMax {
		seq++
		c.must(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, seq}, Start: BlockNo(at), Count: ClonedBlocksMax, Source: 1, SourceStart: BlockNo(at)})
	}
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	after := s.Stats()
	written := after.LogBytes - before.LogBytes
	if limit := int64(blocks * dedup.BlockSize / 2000); written > limit {
		t.Errorf("%d bytes were written, at most %d should", written, limit)
	}
	if w.MappedBlocks() != blocks || after.SharedPages != blocks/512 {
		t.Fatalf("%d blocks mapped, %d leaves shared", w.MappedBlocks(), after.SharedPages)
	}
	t.Logf("%d bytes written for %d cloned (%.4f %%), %d checkpoint pages", written, blocks*dedup.BlockSize, float64(written)*100/(blocks*dedup.BlockSize), after.CheckpointPages-before.CheckpointPages)
	list, err := w.Extents(ctx, 0, blocks, make([]Extent, 0, 8))
	if err != nil || len(list) != 1 || list[0] != (Extent{Blocks: blocks, Mapped: true}) && list[0].Blocks < extentLeaves*512 {
		t.Fatal(list, err)
	}
	seq++
	c.must(c.write(2, seq, 12345, small(7)))
	if n := s.Stats().SharedPages; n != blocks/512-1 {
		t.Fatalf("%d leaves shared after one write", n)
	}
	mustCheck(t, s)
	if err := s.DeleteVolume(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.trimmer.wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().SharedPages; n != 0 {
		t.Fatalf("%d leaves shared after the source is gone", n)
	}
	mustCheck(t, s)
	mustClose(t, s)
	s = r.start()
	buf := make([]byte, dedup.BlockSize)
	for at, n := range map[uint64]uint64{0: 1, 12344: 1, 12345: 7, blocks - 1: 1} {
		if err := s.Volume(2).Read(ctx, at*dedup.BlockSize, buf); err != nil || !bytes.Equal(buf, small(n)) {
			t.Fatalf("block %d: %v", at, err)
		}
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestCloneRefuses: what a clone may not do leaves everything as it was.
func TestCloneRefuses(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 32<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 5000)
	mustCreate(t, s, 2, 5000)
	mustCreate(t, s, 3, 100)
	if err := s.DeleteVolume(ctx, 3); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, s)
	seq := Seq(0)
	fillEqual(c, v, &seq, 0, 1000)
	s.enter()
	s.refsMax, s.refsLast = 1200, 1400
	s.leave()
	end := AnnexStart + AnnexBlocks
	for _, tt := range []struct {
		name        string
		start       BlockNo
		count       uint32
		source      VolumeID
		sourceStart BlockNo
		want        error
	}{
		{name: "nothing", source: 1, want: ErrInvalidOp},
		{name: "too much", count: ClonedBlocksMax + 1, source: 1, start: AnnexStart, sourceStart: AnnexStart, want: ErrInvalidOp},
		{name: "no source", count: 1, source: 9, want: ErrNoVolume},
		{name: "no source named", count: 1, want: ErrNoVolume},
		{name: "source is being deleted", count: 1, source: 3, sourceStart: AnnexStart, want: ErrNoVolume},
		{name: "destination behind the end", start: 4999, count: 2, source: 1, want: ErrRange},
		{name: "source behind the end", count: 2, source: 1, sourceStart: 4999, want: ErrRange},
		{name: "between end and annex", start: AnnexStart - 1, count: 2, source: 1, want: ErrRange},
		{name: "behind the annex", start: end - 1, count: 2, source: 1, want: ErrRange},
		{name: "wraps", start: ^BlockNo(0), count: 2, source: 1, want: ErrRange},
		{name: "source wraps", count: 2, source: 1, sourceStart: ^BlockNo(0), want: ErrRange},
	} {
		err := c.do(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, 1}, Start: tt.start, Count: tt.count, Source: tt.source, SourceStart: tt.sourceStart})
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if v.InRange(AnnexStart-1, 1) || !v.InRange(AnnexStart, AnnexBlocks) || v.InRange(AnnexStart, AnnexBlocks+1) || !v.InRange(5000, 0) || v.InRange(4999, 2) || v.InRange(1, ^uint64(0)) {
		t.Error("InRange")
	}
	if err := c.do(&Op{Kind: OpWrite, Volume: 2, ID: OpID{1, 1}, Start: AnnexStart, Count: 1, Blocks: make([]dedup.Block, 1)}); !errors.Is(err, ErrRange) {
		t.Errorf("write to an annex: %v", err)
	}
	// Words are copied up to the limit of references, leaves are shared beyond it.
	clone := func(start BlockNo, n uint32, from BlockNo) error {
		err := c.do(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, s.Volume(2).Meta().Durable.Seq + 1}, Start: start, Count: n, Source: 1, SourceStart: from})
		mustCheck(t, s)
		return err
	}
	if !s.Volume(2).AdmitClone(1, 1, 0, 200) {
		t.Fatal("a clone within the references is not admitted")
	}
	if err := errors.Join(clone(1, 200, 0), clone(1024, 512, 0), clone(2048, 512, 0)); err != nil {
		t.Fatal(err)
	}
	if v := s.Volume(2); v.AdmitClone(1, 1, 0, 200) || !v.AdmitClone(3072, 1, 0, 512) {
		t.Fatal("beyond the references words are admitted, or leaves are not")
	}
	if err := clone(300, 200, 0); err != nil {
		t.Fatalf("admitted once, beyond the references since: %v", err)
	}
	if err := clone(1, 200, 0); !errors.Is(err, ErrReferences) {
		t.Fatalf("beyond the references: %v", err)
	}
	if err := clone(1, 3000, 0); !errors.Is(err, ErrReferences) {
		t.Fatalf("a long one beyond the references: %v", err)
	}
	if b, _ := c.reduce(small(1), true); b.Data == nil {
		t.Fatal("a block at its limit is pinned")
	}
	if n := s.Volume(2).MappedBlocks(); n != 1424 {
		t.Fatalf("%d blocks mapped", n)
	}
	// A leaf at its limit of parents is copied, where references allow.
	s.enter()
	s.refsMax, s.refsLast, s.parentsMax = 10000, 20000, 3
	s.leave()
	if err := errors.Join(clone(3072, 512, 0), clone(3584, 512, 0)); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().SharedPages; n != 1 {
		t.Fatalf("%d pages shared", n)
	}
	mustClose(t, s)
}

// TestCloneNearlyFull: a pool that is full of references refuses clones that need room
// for words, and goes on with those that need none.
func TestCloneNearlyFull(t *testing.T) {
	r := newRig(t, 1, 32<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 4<<20)
	c := newClient(t, s)
	c.must(c.write(1, 1, 512*1000, small(1)))
	fillEqual(c, v, ptr(Seq(1)), 0, 2048)
	seq := v.Meta().Durable.Seq
	var err error
	at := BlockNo(4096)
	for ; at < 3900<<10 && err == nil; at += 2048 {
		if !v.AdmitClone(at, 1, 1, 2047) {
			err = ErrNoSpace
			break
		}
		if err = c.do(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, seq + 1}, Start: at, Count: 2047, Source: 1, SourceStart: 1}); err == nil {
			seq++
		} else {
			t.Fatalf("admitted, but %v", err)
		}
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatal("the pool never filled")
	}
	mustCheck(t, s)
	for err = nil; err == nil && at < 3900<<10; at += 2048 {
		if err = c.do(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, seq + 1}, Start: at, Count: 2047, Source: 1, SourceStart: 1}); err == nil {
			seq++
		}
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatalf("a clone into a full pool: %v", err)
	}
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq + 1}, Start: 4096, Count: 1200 << 10})
	seq++
	if !v.AdmitClone(4096, 1, 1, 2047) {
		t.Fatal("no room after an unmap")
	}
	c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, seq + 1}, Start: 4096, Count: 2047, Source: 1, SourceStart: 1})
	mustCheck(t, s)
	mustClose(t, s)
}

// TestAdmittedBeforeStuck: what was appended before the cleaner gave up has its number,
// and is done out of the reserve; what comes after that is refused.
func TestAdmittedBeforeStuck(t *testing.T) {
	r := newRig(t, 1, 32<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 4096)
	c := newClient(t, s)
	c.must(c.write(1, 1, 0, append(small(1), small(2)...)))
	var done []error
	start := func(op *Op) {
		op.Done = func(_ *Op, err error) { done = append(done, err) }
		s.Append(op)
	}
	clone := func(seq Seq) *Op {
		return &Op{Kind: OpClone, Volume: 1, ID: OpID{1, seq}, Start: 1024, Count: 3, Source: 1}
	}
	write, late := c.write(1, 2, 8, pattern(3)), c.write(1, 4, 9, pattern(4))
	s.cleaner.stopNow()
	s.enter()
	taken := s.segs.nFree.Load() - s.reserve()
	s.segs.nFree.Add(-taken)
	start(write)
	start(clone(3))
	s.cleaner.stuck.Store(true)
	if v.Admit(9, late.Blocks) || v.AdmitClone(2048, 1, 0, 3) {
		t.Error("a store whose cleaner gave up admits what grows")
	}
	start(late)
	for s.runOnce() {
	}
	s.segs.nFree.Add(taken)
	s.cleaner.stuck.Store(false)
	s.leave()
	if len(done) != 3 || done[0] != nil || done[1] != nil || !errors.Is(done[2], ErrNoSpace) {
		t.Fatalf("a write, a clone and a late write end with %v", done)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

func ptr[T any](v T) *T { return &v }

// TestCheckFindsParents: a wrong count of parents, or one forgotten in the directory, is found.
func TestCheckFindsParents(t *testing.T) {
	r := newRig(t, 1, 32<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 5000)
	c := newClient(t, s)
	seq := Seq(0)
	fillEqual(c, v, &seq, 0, 1024)
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, seq + 1}, Start: 2048, Count: 512, Source: 1})
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	mustCheck(t, s)
	s.mu.Lock()
	leaf, _, _, _ := s.pg.leafOf(v.mapTree, 0)
	s.mu.Unlock()
	find := func(want string) {
		t.Helper()
		rep, err := s.Check(context.Background())
		if err != nil || !strings.Contains(fmt.Sprint(rep.Problems), want) {
			t.Fatalf("%v %v, want %q", err, rep, want)
		}
	}
	p, e := s.pg.page(leaf), s.pg.entry(leaf)
	if p.parents != 2 || e.Refs != 2 || p.flags&pageDirty != 0 {
		t.Fatalf("%+v %+v", *p, *e)
	}
	p.parents = 3
	find(fmt.Sprintf("page %d has 2 parents, counts 3", leaf))
	p.parents = 2
	e.Refs = 1
	find(fmt.Sprintf("page %d counts 2 parents, its directory entry 1", leaf))
	e.Refs = 2
	p.count--
	find("counts")
	p.count++
	s.pg.shared.Add(1)
	find("shared pages")
	s.pg.shared.Add(-1)
	v.annex++
	find("annex")
	v.annex--
	mustCheck(t, s)
	mustClose(t, s)
}
