package lsfs

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs/format"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

// TestFullPool: a pool that is full to the last block refuses new data and nothing else,
// and heals without a restart when something is unmapped or deleted.
func TestFullPool(t *testing.T) {
	r := newRig(t, 3, 16<<20)
	s := r.start()
	ctx := context.Background()
	v := mustCreate(t, s, 1, 1<<20)
	mustCreate(t, s, 2, 1<<20)
	c := newClient(t, s)
	seq := map[VolumeID]Seq{}
	do := func(op *Op) error {
		op.ID = OpID{1, seq[op.Volume] + 1}
		err := c.do(op)
		if err == nil {
			seq[op.Volume]++
		}
		return err
	}
	n := uint64(0)
	fill := func(id VolumeID, at uint64) uint64 {
		for ; ; at++ {
			n++
			op := c.write(id, 0, BlockNo(at), noise(n))
			if admitted := s.Volume(id).Admit(BlockNo(at), op.Blocks); !admitted {
				if err := do(op); !errors.Is(err, ErrNoSpace) {
					// The slack above what Admit gives is small.
					if s.slack < s.charged()-s.usable.Load() {
						t.Fatalf("beyond the usable size: %v", err)
					}
					if err != nil {
						t.Fatal(err)
					}
					continue
				}
				return at
			}
			if err := do(op); err != nil {
				t.Fatalf("block %d was admitted: %v", at, err)
			}
		}
	}
	half := uint64(1000)
	for at := range half {
		n++
		if err := do(c.write(2, 0, BlockNo(at), noise(n))); err != nil {
			t.Fatal(err)
		}
	}
	full := fill(1, 0)
	t.Logf("full with %d blocks of %d bytes", full+half, s.Room().Size)
	rng := rand.New(rand.NewPCG(3, 3))
	want := make([]uint64, full)
	for i := range want {
		n++
		want[i] = n
		if err := do(c.write(1, 0, BlockNo(i), noise(n))); err != nil {
			t.Fatalf("overwrite of block %d: %v", i, err)
		}
	}
	for range 3 * full {
		i := rng.Uint64N(full)
		n++
		want[i] = n
		op := c.write(1, 0, BlockNo(i), noise(n))
		if !v.Admit(op.Start, op.Blocks) {
			t.Fatal("an overwrite is not admitted")
		}
		if err := do(op); err != nil {
			t.Fatalf("overwrite of block %d in a full pool: %v", i, err)
		}
	}
	for _, op := range []*Op{{Kind: OpState, Volume: 1, State: []byte("reserved")}, {Kind: OpEpoch, Volume: 1}} {
		if err := do(op); err != nil {
			t.Fatalf("kind %d in a full pool: %v", op.Kind, err)
		}
	}
	if err := v.UpdateMeta(ctx, func(m *Meta) { m.Promised = 9 }); err != nil {
		t.Fatal(err)
	}
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	mustEqualAs(t, v, want, noise)
	mustCheck(t, s)
	if s.cleaner.stuck.Load() {
		t.Error("the cleaner found nothing in a pool that is full of overwrites")
	}

	// An unmap makes room for as much.
	if err := do(&Op{Kind: OpUnmap, Volume: 1, Start: 10, Count: 100}); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(90) {
		if err := do(c.write(1, 0, BlockNo(full+i), noise(want[0]+1e6+i))); err != nil {
			t.Fatalf("after an unmap: %v", err)
		}
	}
	if err := do(&Op{Kind: OpUnmap, Volume: 1, Start: BlockNo(full), Count: 90}); err != nil {
		t.Fatal(err)
	}
	// So does a volume that is deleted, without waiting for anything but the background.
	if err := s.DeleteVolume(ctx, 2); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the deleted volume is given back", func() bool { return s.Stats().ReclaimBlocks == 0 && s.Stats().MappedBlocks == full-100 })
	for i := range half {
		if err := do(c.write(1, 0, BlockNo(full+i), noise(want[0]+2e6+i))); err != nil {
			t.Fatalf("after a delete, block %d: %v", i, err)
		}
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestUnmapOfHolesMakesNothing: an unmap of a range without blocks leaves no page behind,
// however long it is; one of a few blocks in a huge range stamps where they were.
func TestUnmapOfHolesMakesNothing(t *testing.T) {
	r := newRig(t, 1, 12<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 1<<30)
	c := newClient(t, s)
	c.must(c.write(1, 1, 5000, pattern(1)))
	c.must(c.write(1, 2, 1<<20, pattern(2)))
	pages := s.Stats().Pages
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, 3}, Start: 1 << 21, Count: 1 << 29})
	if now := s.Stats().Pages; now != pages {
		t.Errorf("%d pages became %d", pages, now)
	}
	if chunks, err := v.ChangedChunks(context.Background(), 2); err != nil || len(chunks) != 0 {
		t.Errorf("changed: %v, %v", chunks, err)
	}
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, 4}, Start: 4000, Count: 1 << 29})
	chunks, err := v.ChangedChunks(context.Background(), 3)
	if err != nil || len(chunks) != 4 || chunks[0] != 18 || chunks[3] != 4097 {
		t.Errorf("changed: %v, %v", chunks, err)
	}
	if n := v.MappedBlocks(); n != 0 {
		t.Errorf("%d blocks are mapped", n)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestStreamsKeepApart: after much overwriting, what was moved stands in segments of the
// cold streams, and pages in theirs, and a crash forgets none of it.
func TestStreamsKeepApart(t *testing.T) {
	r := newRig(t, 1, 40<<20)
	s := r.start()
	const blocks = 4000
	mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(1, 9))
	want := make([]uint64, blocks)
	for n := uint64(1); n < 5*blocks; n++ {
		no := n - 1
		if n > blocks {
			no = rng.Uint64N(blocks / 4)
		}
		want[no] = n
		c.must(c.write(1, Seq(n), BlockNo(no), noise(n)))
	}
	count := func() (by [streamCold + coldStreams]int) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		for i := range s.segs.all {
			if seg := &s.segs.all[i]; seg.state == segmentSealed && seg.live+seg.pages > 0 {
				by[seg.stream]++
				if seg.live > 0 && seg.stream == streamPages || seg.pages > 0 && seg.stream != streamPages {
					t.Errorf("segment %d of stream %d has %d bytes of blocks, %d of pages", i, seg.stream, seg.live, seg.pages)
				}
			}
		}
		return by
	}
	if by := count(); by[streamLog] == 0 || by[streamPages] == 0 || by[streamCold] == 0 {
		t.Errorf("segments of streams: %v", by)
	}
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	before := count()
	mustClose(t, s)
	s = r.start()
	after := count()
	for i := range before {
		if i >= streamCold && after[i] < before[i] {
			t.Errorf("segments of streams: %v, after a start %v", before, after)
		}
	}
	mustEqualAs(t, s.Volume(1), want, noise)
	mustCheck(t, s)
	mustClose(t, s)
}

// TestSuperblockKeepsPrevious: the root before the newest fits beside the newest one up
// to the sizes that real pools have, and is left out where it does not.
func TestSuperblockKeepsPrevious(t *testing.T) {
	page := make([]byte, format.PageSize)
	for _, tt := range []struct {
		members, extents int
		kept             bool
	}{{1, 1, true}, {64, 60, true}, {64, 100, false}} {
		sb := &format.Superblock{Sequence: 2, SegmentBytes: format.SegmentMax, Checkpoint: 8, PreviousCheckpoint: 7}
		for i := range tt.members {
			sb.Members = append(sb.Members, format.Member{Device: [16]byte{byte(i + 1)}, First: uint32(3 * i), Segments: 3})
			sb.Segments += 3
		}
		sb.Device = sb.Members[0].Device
		for i := range tt.extents {
			sb.Root = append(sb.Root, format.Extent{Addr: format.MakeAddr(1, uint32(i)), Len: 4096, Sum: uint32(i)})
			sb.Previous = append(sb.Previous, format.Extent{Addr: format.MakeAddr(2, uint32(i)), Len: 100, Sum: uint32(i)})
		}
		sb.Put(page)
		got, err := format.ParseSuperblock(page)
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Root) != tt.extents || (len(got.Previous) == tt.extents) != tt.kept || tt.kept && (got.PreviousCheckpoint != 7 || got.Previous[tt.extents-1] != sb.Previous[tt.extents-1]) {
			t.Errorf("%d members, %d extents: %d and %d of checkpoint %d came back", tt.members, tt.extents, len(got.Root), len(got.Previous), got.PreviousCheckpoint)
		}
	}
}
