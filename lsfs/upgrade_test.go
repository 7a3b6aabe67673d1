package lsfs

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// openSample returns what opens a pool from its image, again and again.
func openSample(t *testing.T, path string) func() *Store {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	disk := flatDisk(raw)
	return func() *Store {
		s, err := Open(context.Background(), Config{
			Devices: []string{"flat"}, OpenDevice: func(string) (device.Device, error) { return disk, nil },
			Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 8 << 20, IndexBytes: 64 << 10,
		})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

// TestOpenRoot1 opens a pool as it was written when roots had version 1, with a
// checkpoint and a log behind it: volume 1 of 2000 blocks holds 700 blocks, of which
// 20 were unmapped, and one at 1500; volume 2 was deleted after the checkpoint. A
// clone then shares its leaves, and the next root is read again.
func TestOpenRoot1(t *testing.T) {
	start := openSample(t, "testdata/pool-root1.gz")
	want := &plane{seq: 3, main: make([]uint64, 2000), annex: make([]uint64, 600)}
	for i := range 700 {
		if i < 10 || 30 <= i {
			want.main[i] = uint64(i%200 + 1)
		}
	}
	want.main[1500] = 300
	s := start()
	if ids := s.Volumes(); !slices.Equal(ids, []VolumeID{1}) {
		t.Fatal(ids)
	}
	w := &world{rng: testRand(1), vols: map[VolumeID]*plane{1: want}}
	w.mustMatch(t, s)
	c := newClient(t, s)
	c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, 4}, Start: 512, Count: 600, Source: 1})
	copy(want.main[512:], want.main[:600])
	c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, 5}, Start: AnnexStart, Count: 600, Source: 1, SourceStart: 512})
	copy(want.annex, want.main[512:1112])
	want.seq = 5
	w.mustMatch(t, s)
	mustClose(t, s)
	s = start()
	w.mustMatch(t, s)
	mustClose(t, s)
}

// TestOpenRoot2Deleting opens a pool as it was written when roots had version 2, with leaves that
// volumes 1 and 2 and an annex share, and behind the checkpoint a log in which volume 3 was
// deleted, trimmed and ended, and volume 4, of 24576 mapped blocks, deleted and trimmed in
// part. Snapshots then share what is above the leaves, and the next root is read again.
func TestOpenRoot2Deleting(t *testing.T) {
	ctx := context.Background()
	start := openSample(t, "testdata/pool-root2-deleting.gz")
	one := &plane{seq: 2, main: make([]uint64, 2000), annex: make([]uint64, 600)}
	two := &plane{seq: 3, main: make([]uint64, 3000), annex: make([]uint64, 600)}
	for i := range 700 {
		one.main[i] = uint64(i%200 + 1)
	}
	copy(one.annex, one.main[:600])
	copy(two.main[1024:], one.main[:700])
	copy(two.main, one.main[:512])
	two.main[2900] = 300
	w := &world{rng: testRand(1), vols: map[VolumeID]*plane{1: one, 2: two}}
	s := start()
	if err := s.trimmer.wait(ctx, 4); err != nil {
		t.Fatal(err)
	}
	if ids := s.Volumes(); !slices.Equal(ids, []VolumeID{1, 2}) || len(s.volumes) != 2 {
		t.Fatal(ids)
	}
	w.mustMatch(t, s)
	c := newClient(t, s)
	c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, 3}, Snapshot: 9})
	c.must(c.write(1, 4, 3, small(77)))
	was := one.clone()
	one.main[3], one.seq = 77, 4
	w.mustMatch(t, s)
	mustClose(t, s)
	s = start()
	w.mustMatch(t, s)
	if _, err := s.CreateVolumeFrom(ctx, 10, 2000, [16]byte{}, 9); err != nil {
		t.Fatal(err)
	}
	was.seq = 1
	clear(was.annex)
	w.vols[10] = was
	w.mustMatch(t, s)
	mustClose(t, s)
}

// TestOpenRoot3 opens a pool as it was written when roots had version 3: volume 1 of 2000
// blocks with snapshot 9 of its first 700, then 200 of them overwritten, 100 stored a second time at 1000, a
// checkpoint, a segment that was cleaned, and 50 more blocks at 1500, by reference. Merges then leave each
// block stored once, and the next root is read again.
func TestOpenRoot3(t *testing.T) {
	ctx := context.Background()
	start := openSample(t, "testdata/pool-root3.gz")
	want := &plane{seq: 12, main: make([]uint64, 2000), annex: make([]uint64, 600)}
	for i := range 700 {
		want.main[i] = uint64(i + 1)
	}
	for i := range 200 {
		want.main[100+i] = uint64(1001 + i)
	}
	for i := range 100 {
		want.main[1000+i] = uint64(i + 1)
	}
	copy(want.main[1500:], want.main[1000:1050])
	w := &world{rng: testRand(1), vols: map[VolumeID]*plane{1: want}}
	s := start()
	w.mustMatch(t, s)
	if n := s.stored.Load(); n != 1000 {
		t.Fatalf("%d blocks are stored", n)
	}
	if err := s.mergePass(ctx, mapCatalogue{}); err != nil {
		t.Fatal(err)
	}
	if n := s.stored.Load(); n != 900 {
		t.Fatalf("%d blocks are stored after the merge", n)
	}
	w.mustMatch(t, s)
	mustClose(t, s)
	s = start()
	w.mustMatch(t, s)
	was := make([]byte, 700*dedup.BlockSize)
	if err := s.Snapshot(9).Read(ctx, 0, was); err != nil {
		t.Fatal(err)
	}
	for i := range 700 {
		if !bytes.Equal(was[i*dedup.BlockSize:(i+1)*dedup.BlockSize], small(uint64(i+1))) {
			t.Fatalf("block %d of the snapshot has changed", i)
		}
	}
	mustClose(t, s)
}

// tale is a block of a few words.
func tale(n uint64) []byte {
	b := make([]byte, dedup.BlockSize)
	copy(b, prose(n)[:180])
	return b
}

// coldSample is what the samples of roots 4 and 5 hold, of tales: volume 1 of 2000 blocks with snapshot 9 of its
// first 700, then 200 of them overwritten, all of it cleaned twice, a checkpoint, and behind it a log in which 42 blocks
// were unmapped, 30 overwritten, all was cleaned once more, and 50 are written at 1500, by reference.
func coldSample() []uint64 {
	list := make([]uint64, 2000)
	for i := range 700 {
		list[i] = uint64(i + 1)
	}
	for i := range 200 {
		list[100+i] = uint64(1001 + i)
	}
	clear(list[400:421])
	clear(list[110:131])
	for i := range 30 {
		list[600+i] = uint64(2001 + i)
	}
	for i := range 50 {
		list[1500+i] = uint64(i + 1)
	}
	return list
}

// encodings counts the blocks of a store by their form.
func encodings(t *testing.T, s *Store) map[dedup.Encoding]int {
	t.Helper()
	count := map[dedup.Encoding]int{}
	err := s.eachEntryPage(nil, func(_ BID, page []byte) {
		var e format.Entry
		for i := range format.EntriesPerPage {
			if format.ParseEntry(format.EntryAt(page, i), &e); e.Addr != 0 {
				count[e.Encoding]++
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return count
}

// openCold opens a sample, looks at all of it, cleans it, and opens it again.
func openCold(t *testing.T, path string, was, will dedup.Encoding) {
	start, want := openSample(t, path), coldSample()
	s := start()
	if n := encodings(t, s); n[was] < 300 {
		t.Fatalf("blocks by form: %v", n)
	}
	look := func() {
		t.Helper()
		if n := s.Volume(1).Meta().Durable.Seq; n != 13 {
			t.Fatalf("volume 1 is at %d", n)
		}
		mustEqualAs(t, s.Volume(1), want, tale)
		mustCheck(t, s)
		old := make([]byte, 700*dedup.BlockSize)
		if err := s.Snapshot(9).Read(context.Background(), 0, old); err != nil {
			t.Fatal(err)
		}
		for i := range 700 {
			if !bytes.Equal(old[i*dedup.BlockSize:(i+1)*dedup.BlockSize], tale(uint64(i+1))) {
				t.Fatalf("block %d of the snapshot has changed", i)
			}
		}
		if last := mustScrub(t, s); last.Damaged != 0 || last.Counters != 0 {
			t.Fatalf("%+v", last)
		}
	}
	look()
	_, checkpoint := s.ckpt.numbers()
	groups := s.cleaner.packing.from.Load() - checkpoint
	for range 3 {
		cleanAll(t, s)
	}
	look()
	if n := encodings(t, s); n[will] < 700 || (groups == 1) != (was == dedup.ZstdGroup) {
		t.Fatalf("blocks by form: %v; groups in %d checkpoints", n, groups)
	}
	mustClose(t, s)
	s = start()
	look()
	mustClose(t, s)
}

// TestOpenRoot4 opens a pool as it was written when roots had version 4, with blocks in zstd, each by
// itself. They become groups, when no program of then can open the pool any more.
func TestOpenRoot4(t *testing.T) { openCold(t, "testdata/pool-root4.gz", dedup.Zstd, dedup.ZstdGroup) }

// TestOpenRoot5 opens a pool with groups, some of which have dead members, and moves of groups in the log.
func TestOpenRoot5(t *testing.T) {
	openCold(t, "testdata/pool-root5.gz", dedup.ZstdGroup, dedup.ZstdGroup)
}
