package lsfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// settle brings the store to where nothing waits to be given back.
func settleStore(tb testing.TB, s *Store) {
	tb.Helper()
	if err := s.trimmer.wait(context.Background(), 0); err != nil {
		tb.Fatal(err)
	}
	for range 4 {
		if err := s.checkpoint(); err != nil {
			tb.Fatal(err)
		}
	}
}

// TestManySnapshots takes 2000 snapshots of a volume with writes between, each of which
// costs one record, and deletes them in random order: all space comes back.
func TestManySnapshots(t *testing.T) {
	ctx := context.Background()
	const blocks, many = 600 << 10, 2000
	r := newRig(t, 1, 256<<20)
	r.cfg.MetadataBytes = 24 << 20
	s := r.start()
	v := mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	seq := Seq(0)
	rng := rand.New(rand.NewPCG(3, 3))
	fillEqual(c, v, &seq, 0, 300<<10)
	write := func() {
		seq++
		c.must(c.write(1, seq, BlockNo(rng.Uint64N(blocks)), noise(uint64(seq))))
	}
	for range 20 {
		write()
	}
	settleStore(t, s)
	first := s.Room()
	pages := s.pg.nAlive.Load()
	want := make([]byte, dedup.BlockSize)
	probe := uint64(12345) * dedup.BlockSize
	dear := 0 // snapshots beside which checkpoints or the cleaner wrote to the log, too
	for i := range many {
		logged := s.ckpt.bytes.Load()
		seq++
		c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: VolumeID(100 + i)})
		if s.ckpt.bytes.Load()-logged > format.PageSize {
			dear++
		}
		write()
		if i%100 == 0 {
			seq++
			c.must(c.write(1, seq, 12345, noise(1<<40+uint64(i))))
		}
	}
	if dear > many/4 {
		t.Errorf("%d of %d snapshots wrote more than a page", dear, many)
	}
	list := s.Snapshots(1)
	if len(list) != many {
		t.Fatal(len(list))
	}
	for i := 0; i < many; i += 77 {
		if err := list[i].Read(ctx, probe, want); err != nil {
			t.Fatal(err)
		}
		is := small(1)
		if i > 0 {
			is = noise(1<<40 + uint64((i-1)/100*100))
		}
		if !bytes.Equal(want, is) {
			t.Fatalf("snapshot %d holds something else", i)
		}
	}
	if rep, err := s.Check(ctx); err != nil || !rep.OK() {
		t.Fatal(rep, err)
	}
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pages with %d snapshots, %d without; root of %d bytes", s.pg.nAlive.Load(), many, pages, len(s.ckpt.root))
	mustClose(t, s)
	s = r.start()
	c = newClient(t, s)
	// The content goes back to what it was, so that what is left can be compared.
	seq++
	c.must(&Op{Kind: OpRollback, Volume: 1, ID: OpID{1, seq}, Snapshot: 100})
	for n, i := range rng.Perm(many) {
		if err := s.DeleteSnapshot(ctx, VolumeID(100+i)); err != nil {
			t.Fatal(err)
		}
		if n == many/2 {
			mustClose(t, s)
			s = r.start()
			c = newClient(t, s)
		}
		if n%500 == 0 {
			if rep, err := s.Check(ctx); err != nil || !rep.OK() {
				t.Fatal(rep, err)
			}
		}
	}
	settleStore(t, s)
	// The version tree is empty since the rollback.
	if n := s.pg.nAlive.Load(); pages < n {
		t.Fatalf("%d pages are left, %d there were", n, pages)
	}
	if st := s.Stats(); st.SharedPages != 0 || st.Snapshots != 0 {
		t.Fatalf("%d pages shared, %d snapshots", st.SharedPages, st.Snapshots)
	}
	for i := 0; i < 50 && s.Room().Free < first.Free; i++ {
		s.cleaner.mu.Lock()
		if n, ok := s.victim(true); ok {
			s.cleanSegment(n)
		}
		s.cleaner.mu.Unlock()
		settleStore(t, s)
	}
	if last := s.Room(); last.Live > first.Live || last.Free < first.Free-2*int64(s.segs.bytes) {
		t.Fatalf("room was %+v, is %+v", first, last)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestSnapshotRefuses: what cannot be done is refused before it is logged, takes no
// sequence number and changes nothing.
func TestSnapshotRefuses(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 32<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 600<<10)
	mustCreate(t, s, 2, 5000)
	c := newClient(t, s)
	seq := Seq(0)
	fillEqual(c, v, &seq, 0, 3000)
	seq++
	c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: 10})
	snap := func(id VolumeID) error {
		return c.do(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq + 1}, Snapshot: id})
	}
	rollback := func(id VolumeID) error {
		return c.do(&Op{Kind: OpRollback, Volume: 1, ID: OpID{1, seq + 1}, Snapshot: id})
	}
	if err := s.ForgeSnapshot(ctx, 11, 1, 10, 600<<10); err != nil {
		t.Fatal(err)
	}
	from := func(id VolumeID, blocks uint64, snapshot VolumeID) error {
		_, err := s.CreateVolumeFrom(ctx, id, blocks, [16]byte{}, snapshot)
		return err
	}
	for name, x := range map[string]struct{ err, want error }{
		"snapshot with a volume's id":   {snap(2), ErrExists},
		"rollback without an id":        {rollback(0), ErrInvalidOp},
		"rollback to nothing":           {rollback(99), ErrNoVolume},
		"rollback to a volume":          {rollback(2), ErrNoVolume},
		"rollback to what is forged":    {rollback(11), ErrNoVolume},
		"rollback, asked":               {v.AdmitRollback(99), ErrNoVolume},
		"volume from nothing":           {from(20, 5000, 99), ErrNoVolume},
		"volume from what is forged":    {from(20, 600<<10, 11), ErrNoVolume},
		"smaller volume":                {from(20, 5000, 10), ErrRange},
		"volume with an id in use":      {from(2, 600<<10, 10), ErrExists},
		"volume with a snapshot's id":   {from(10, 600<<10, 10), ErrExists},
		"create with a snapshot's id":   {func() error { _, err := s.CreateVolume(ctx, 10, 5, [16]byte{}); return err }(), ErrExists},
		"delete of a volume's snapshot": {s.DeleteVolume(ctx, 10), ErrNoVolume},
		"delete of a volume":            {s.DeleteSnapshot(ctx, 2), ErrNoVolume},
		"delete of what is forged":      {s.DeleteSnapshot(ctx, 11), ErrNoVolume},
		"abandon of a snapshot":         {s.AbandonSnapshot(ctx, 10), ErrNoVolume},
		"seal elsewhere":                {s.SealSnapshot(ctx, 10, OpID{1, 1}), ErrNoVolume},
		"seal of nothing":               {s.SealSnapshot(ctx, 99, OpID{1, 1}), ErrNoVolume},
		"forge of a volume":             {s.ForgeSnapshot(ctx, 2, 1, 0, 5), ErrExists},
		"forge from nothing":            {s.ForgeSnapshot(ctx, 30, 1, 99, 5), ErrNoVolume},
		"write to a snapshot":           {c.do(&Op{Kind: OpWrite, Volume: 10, ID: OpID{1, 1}, Count: 1, Blocks: make([]dedup.Block, 1)}), ErrNoVolume},
		"copy to a snapshot":            {c.do(&Op{Kind: OpCopy, Volume: 10, ID: OpID{1, 1}, Count: 1, Blocks: make([]dedup.Block, 1)}), ErrNoVolume},
		"write to what is forged":       {c.do(&Op{Kind: OpWrite, Volume: 11, ID: OpID{1, 1}, Count: 1, Blocks: make([]dedup.Block, 1)}), ErrNoVolume},
		"copy into an annex of it":      {c.do(&Op{Kind: OpCopy, Volume: 11, Start: AnnexStart, Count: 1, Blocks: make([]dedup.Block, 1)}), ErrRange},
		"clone from what is forged":     {c.do(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, 1}, Count: 1, Source: 11}), ErrNoVolume},
		"changes of nothing":            {func() error { _, _, err := s.ChangedRanges(ctx, 99, 1, 0, make([]Extent, 0, 2)); return err }(), ErrNoVolume},
		"snapshot's annex":              {s.Snapshot(10).Read(ctx, uint64(AnnexStart)*dedup.BlockSize, make([]byte, 4096)), ErrRange},
	} {
		if !errors.Is(x.err, x.want) {
			t.Errorf("%s: %v, want %v", name, x.err, x.want)
		}
	}
	if n := v.Meta().Durable.Seq; n != seq {
		t.Fatalf("durable is %d, was %d", n, seq)
	}
	// The same snapshot again is an operation that changes nothing.
	at := s.Snapshot(10).Point()
	if err := snap(10); err != nil || s.Snapshot(10).Point() != at {
		t.Fatal(err, s.Snapshot(10).Point())
	}
	seq++
	// The pool has as many as it can have.
	s.mu.Lock()
	for i := range VolumeID(SnapshotsMax) {
		s.snapshots[1000+i] = &Snapshot{content: Volume{s: s, id: 1000 + i, bare: true, deleting: true}}
	}
	s.mu.Unlock()
	if err := v.AdmitSnapshot(); !errors.Is(err, ErrSnapshots) {
		t.Fatal(err)
	}
	s.mu.Lock()
	for i := range VolumeID(SnapshotsMax) {
		delete(s.snapshots, 1000+i)
	}
	s.mu.Unlock()
	if err := errors.Join(v.AdmitSnapshot(), v.AdmitRollback(10)); err != nil {
		t.Fatal(err)
	}
	// A page has as many parents as it can have.
	s.enter()
	s.parentsLast = 4
	s.leave()
	var err error
	for i := VolumeID(50); i < 60 && err == nil; i++ {
		if err = v.AdmitSnapshot(); err == nil {
			if err := snap(i); err != nil {
				t.Fatal("admitted, but", err)
			}
			seq++
		}
	}
	if !errors.Is(err, ErrReferences) {
		t.Fatal(err)
	}
	if err := snap(60); !errors.Is(err, ErrReferences) {
		t.Fatal(err)
	}
	if err := errors.Join(v.AdmitRollback(10), nil); !errors.Is(err, ErrReferences) {
		t.Fatal(err)
	}
	if err := rollback(10); !errors.Is(err, ErrReferences) {
		t.Fatal(err)
	}
	// A write that would have to copy the page above one is refused, before it is logged.
	limit := func(n uint32) {
		s.enter()
		s.parentsLast = n
		s.leave()
	}
	limit(100)
	for i := range VolumeID(6) {
		seq++
		c.must(c.write(1, seq, BlockNo(i), small(uint64(i+5))))
		seq++
		c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: 200 + i})
	}
	limit(4)
	op := c.write(1, seq+1, 7, small(8))
	if v.Admit(7, op.Blocks) || v.AdmitUnmap(7, 1) || v.AdmitClone(7, 1, 600, 1) {
		t.Fatal("admitted")
	}
	for _, op := range []*Op{op,
		{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq + 1}, Start: 7, Count: 1},
		{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq + 1}, Start: 7, Count: 2990},
		{Kind: OpClone, Volume: 1, ID: OpID{1, seq + 1}, Start: 7, Count: 1, Source: 1, SourceStart: 600},
	} {
		if err := c.do(op); !errors.Is(err, ErrReferences) {
			t.Fatal(op.Kind, err)
		}
	}
	mustCheck(t, s)
	limit(100)
	if op = c.write(1, seq+1, 7, small(8)); !v.Admit(7, op.Blocks) {
		t.Fatal("not admitted")
	}
	c.must(op)
	mustCheck(t, s)
	mustClose(t, s)
}

// TestSnapshotFullPool fills a pool whose volume has snapshots: what was admitted is never
// refused, and deleting snapshots makes room again.
func TestSnapshotFullPool(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 16<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 20000)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(1, 1))
	seq := Seq(0)
	var snaps []VolumeID
	full, number := 0, uint64(0)
	for i := 0; full < 300 && i < 20000; i++ {
		number++
		at := BlockNo(rng.Uint64N(3000))
		op := c.write(1, seq+1, at, noise(number))
		if !v.Admit(at, op.Blocks) {
			full++
			n := uint32(rng.IntN(600) + 1)
			if unmap := (&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq + 1}, Start: at, Count: n}); v.AdmitUnmap(at, n) {
				seq++
				c.must(unmap)
			}
			continue
		}
		seq++
		c.must(op)
		if i%50 == 0 {
			id := VolumeID(1000 + i)
			if err := v.AdmitSnapshot(); err != nil {
				t.Fatal(err)
			}
			seq++
			c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: id})
			snaps = append(snaps, id)
		}
	}
	if full < 300 {
		t.Fatal("the pool never filled")
	}
	mustCheck(t, s)
	for _, id := range snaps {
		if err := s.DeleteSnapshot(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	settleStore(t, s)
	for range 200 {
		number++
		op := c.write(1, seq+1, BlockNo(rng.Uint64N(3000)), noise(number))
		if !v.Admit(op.Start, op.Blocks) {
			t.Fatalf("no room after %d snapshots are gone: %+v", len(snaps), s.Room())
		}
		seq++
		c.must(op)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestRollbackIsCheap: neither taking a snapshot of a large volume nor a rollback nor a
// clone of it costs more than a record, and what the rollback left is shed with what it shares.
func TestRollbackIsCheap(t *testing.T) {
	ctx := context.Background()
	const blocks = 1 << 30 / dedup.BlockSize
	r := newRig(t, 1, 64<<20)
	s := r.start()
	v := mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	seq := Seq(0)
	fillEqual(c, v, &seq, 0, blocks)
	settleStore(t, s)
	cost := func(what string, limit int64, f func()) {
		t.Helper()
		before := s.Stats()
		f()
		if n := s.Stats().LogBytes - before.LogBytes; limit < n {
			t.Errorf("%s wrote %d bytes", what, n)
		}
	}
	op := func(o *Op) func() {
		seq++
		o.Volume, o.ID = 1, OpID{1, seq}
		return func() { t.Helper(); c.must(o) }
	}
	cost("a snapshot", 4096, op(&Op{Kind: OpSnapshot, Snapshot: 5}))
	cost("a clone", 4096, func() {
		if _, err := s.CreateVolumeFrom(ctx, 6, 2*blocks, [16]byte{}, 5); err != nil {
			t.Fatal(err)
		}
	})
	pages := s.pg.nAlive.Load()
	cost("an unmap of what a snapshot holds", 4096, op(&Op{Kind: OpUnmap, Start: 0, Count: blocks}))
	mustCheck(t, s)
	cost("a rollback", 3*4096, func() {
		op(&Op{Kind: OpRollback, Snapshot: 5})()
		if err := s.trimmer.wait(ctx, 1); err != nil {
			t.Fatal(err)
		}
	})
	if v.MappedBlocks() != blocks || s.Volume(6).MappedBlocks() != blocks || s.Snapshot(5).MappedBlocks() != blocks {
		t.Fatal("the counters are wrong")
	}
	if n := s.pg.nAlive.Load(); pages < n {
		t.Fatalf("%d pages after the rollback, %d before", n, pages)
	}
	chunks, err := v.ChangedChunks(ctx, seq-1)
	if err != nil || len(chunks) != blocks/ChunkBlocks {
		t.Fatal(len(chunks), err)
	}
	if chunks, err = v.ChangedChunks(ctx, seq); err != nil || len(chunks) != 0 {
		t.Fatal(len(chunks), err)
	}
	if chunks, err = s.Volume(6).ChangedChunks(ctx, 0); err != nil || len(chunks) != 2*blocks/ChunkBlocks {
		t.Fatal(len(chunks), err)
	}
	list, next, err := s.ChangedRanges(ctx, 5, 1, 0, make([]Extent, 0, 4))
	if err != nil || next != blocks || len(list) != 1 || list[0] != (Extent{Blocks: blocks, Same: true}) {
		t.Fatal(list, next, err)
	}
	a, err := v.Digest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := s.Snapshot(5).Digest(ctx); err != nil || a != b {
		t.Fatal(err, a, b)
	}
	mustCheck(t, s)
	if err := errors.Join(s.DeleteVolume(ctx, 1), s.DeleteVolume(ctx, 6), s.DeleteSnapshot(ctx, 5)); err != nil {
		t.Fatal(err)
	}
	settleStore(t, s)
	if n := s.pg.nAlive.Load(); n != 0 {
		t.Fatalf("%d pages are left", n)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestRollbackUnderTrim: a step of the trimmer that looked at a volume before its rollback
// does nothing to the tail that came with it.
func TestRollbackUnderTrim(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 16<<20)
	s, err := open(ctx, r.cfg) // no trimmer
	if err != nil {
		t.Fatal(err)
	}
	v := mustCreate(t, s, 1, 6000)
	c := newClient(t, s)
	for i, at := range []BlockNo{0, 3000, 5500} {
		c.must(c.write(1, Seq(i+1), at, small(uint64(i+1))))
	}
	if err := v.Resize(ctx, 1000); err != nil {
		t.Fatal(err)
	}
	c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, 4}, Snapshot: 5})
	run := func(k *task) {
		t.Helper()
		if err := s.do(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	run(&task{kind: taskTrim, volume: 1, start: 4096, end: 6000})
	start, end, floor, err := s.nextTail(v)
	if err != nil || v.tailEnd != 4096 || start != 1000 || end != 4096 {
		t.Fatal(start, end, v.tailEnd, err)
	}
	c.must(&Op{Kind: OpRollback, Volume: 1, ID: OpID{1, 5}, Snapshot: 5})
	run(&task{kind: taskTrim, volume: 1, start: start, end: end, floor: floor})
	if v.tailEnd != 6000 || v.mapped != 3 {
		t.Fatalf("the tail ends at %d, %d mapped", v.tailEnd, v.mapped)
	}
	for {
		start, end, floor, err = s.nextTail(v)
		if err != nil {
			t.Fatal(err)
		}
		if start == end {
			break
		}
		run(&task{kind: taskTrim, volume: 1, start: start, end: end, floor: floor})
	}
	if v.tailEnd != 1000 || v.mapped != 1 || s.Snapshot(5).MappedBlocks() != 3 {
		t.Fatalf("the tail ends at %d, %d mapped", v.tailEnd, v.mapped)
	}
	mustCheck(t, s)
	s.free()
}

// TestSnapshotNoAllocation: a write into a volume with snapshots allocates nothing, and
// neither does a list of changes.
func TestSnapshotNoAllocation(t *testing.T) {
	ctx := context.Background()
	flat := make(flatDisk, 64<<20)
	open := func(string) (device.Device, error) { return flat, nil }
	if err := Format(ctx, FormatConfig{Key: testKey, Devices: []string{"flat"}, OpenDevice: open}); err != nil {
		t.Fatal(err)
	}
	s, err := Open(ctx, Config{Devices: []string{"flat"}, OpenDevice: open, Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 16 << 20, IndexBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v := mustCreate(t, s, 1, 1<<20)
	c := newClient(t, s)
	seq := Seq(0)
	fillEqual(c, v, &seq, 0, 200<<10)
	op := c.write(1, 1, 0, noise(1))
	var failed error
	done := make(chan struct{}, 1)
	op.Done = func(_ *Op, err error) {
		failed = errors.Join(failed, err)
		done <- struct{}{}
	}
	n := uint64(0)
	write := func() {
		seq++
		n++
		op.ID.Seq = seq
		op.Start = BlockNo(n * 512 % (200 << 10)) // another leaf each time: it is copied
		binary.LittleEndian.PutUint64(op.Blocks[0].Data, n)
		binary.LittleEndian.PutUint64(op.Blocks[0].Fingerprint[:], n*0x9e3779b97f4a7c15)
		op.Blocks[0].Sum = dedup.Sum(op.Blocks[0].Data)
		if !v.Admit(op.Start, op.Blocks) {
			failed = ErrNoSpace
			return
		}
		s.Append(op)
		s.Kick()
		<-done
	}
	for i := range VolumeID(3) {
		seq++
		c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: 10 + i})
		for range 200 {
			write()
		}
	}
	seq++
	c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: 20})
	for range 20 {
		write()
	}
	if a := testing.AllocsPerRun(150, write); a != 0 {
		t.Errorf("%.2f allocations per write", a)
	}
	if failed != nil {
		t.Fatal(failed)
	}
	list := make([]Extent, 0, 64)
	if a := testing.AllocsPerRun(50, func() {
		if l, _, err := s.ChangedRanges(ctx, 10, 1, 0, list); err != nil || len(l) != 64 {
			t.Fatal(len(l), err)
		}
	}); a != 0 {
		t.Errorf("%.2f allocations per list of changes", a)
	}
	// Its fingerprints are made up, so the blocks are not proved.
	if r, err := s.check(context.Background(), false); err != nil || !r.OK() {
		t.Fatal(r, err)
	}
	mustClose(t, s)
}

// BenchmarkSnapshotWrite writes single blocks into a volume of 1 GiB with a snapshot every
// 1000 of them, and without any.
func BenchmarkSnapshotWrite(b *testing.B) {
	for _, every := range []int{0, 1000} {
		b.Run(fmt.Sprintf("every=%d", every), func(b *testing.B) {
			r := newRig(b, 1, 256<<20)
			r.cfg.MetadataBytes = 64 << 20
			s := r.start()
			v := mustCreate(b, s, 1, 1<<18)
			c := newClient(b, s)
			seq := Seq(0)
			fillEqual(c, v, &seq, 0, 1<<18)
			rng := rand.New(rand.NewPCG(3, 3))
			for i := 0; b.Loop(); i++ {
				if every > 0 && i%every == 0 {
					seq++
					c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: VolumeID(10 + i)})
					if i >= 2*every {
						if err := s.DeleteSnapshot(context.Background(), VolumeID(10+i-2*every)); err != nil {
							b.Fatal(err)
						}
					}
				}
				seq++
				c.must(c.write(1, seq, BlockNo(rng.Uint64N(1<<18)), small(rng.Uint64N(1000)+1)))
			}
			mustClose(b, s)
		})
	}
}
