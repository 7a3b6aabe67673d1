package lsfs

import (
	"compress/gzip"
	"context"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device"
)

// TestOpenRoot1 opens a pool as it was written when roots had version 1, with a
// checkpoint and a log behind it: volume 1 of 2000 blocks holds 700 blocks, of which
// 20 were unmapped, and one at 1500; volume 2 was deleted after the checkpoint. A
// clone then shares its leaves, and the next root is read again.
func TestOpenRoot1(t *testing.T) {
	f, err := os.Open("testdata/pool-root1.gz")
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
	start := func() *Store {
		s, err := Open(context.Background(), Config{
			Devices: []string{"flat"}, OpenDevice: func(string) (device.Device, error) { return disk, nil },
			Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 8 << 20, IndexBytes: 64 << 10,
		})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
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
