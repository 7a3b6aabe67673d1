package lsfs

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

var proseBlocks sync.Map

// prose is a block of words, as text, code and logs are made of: s2 takes some of it away,
// zstd more.
func prose(n uint64) []byte {
	if b, ok := proseBlocks.Load(n); ok {
		return b.([]byte)
	}
	rng := rand.New(rand.NewPCG(n, 11))
	var b bytes.Buffer
	for b.Len() < dedup.BlockSize {
		fmt.Fprintf(&b, "%s %s=%d; ", [...]string{"segment", "volume", "replica", "owner", "epoch", "fence", "lease", "commit"}[rng.IntN(8)],
			[...]string{"start", "count", "bytes", "sequence", "address"}[rng.IntN(5)], rng.IntN(100_000))
	}
	proseBlocks.Store(n, b.Bytes()[:dedup.BlockSize])
	return b.Bytes()[:dedup.BlockSize]
}

// cleanAll cleans every sealed segment that holds blocks, once.
func cleanAll(tb testing.TB, s *Store) {
	tb.Helper()
	if err := s.post(&task{kind: taskTurn}); err != nil {
		tb.Fatal(err)
	}
	chill(s, math.MaxInt, false)
	for range 3 {
		if err := s.checkpoint(); err != nil {
			tb.Fatal(err)
		}
	}
}

// TestRecompress: blocks that are moved a second time are stored with zstd where that wins, and read
// as before, by clients, by scrub, by check, and after a start; to other nodes they go with s2.
func TestRecompress(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 48<<20)
	r.opts = func(c *Config) { c.ScrubInterval = -1 }
	r.configure()
	s := r.start()
	const blocks = 3000
	v := mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	content := func(i uint64) []byte {
		switch i % 10 {
		case 7:
			return noise(i + 1)
		case 8:
			return small(i + 1)
		}
		return prose(i)
	}
	seq := Seq(1)
	for at := uint64(0); at < blocks; at += 100 {
		var data []byte
		for i := range uint64(100) {
			data = append(data, content(at+i)...)
		}
		c.must(c.write(1, seq, BlockNo(at), data))
		seq++
	}
	stored := s.segs.data.Load()
	cleanAll(t, s)
	if n := s.cleaner.packing.blocks.Load() + s.cleaner.packing.groups.Load(); n != 0 || s.segs.data.Load() != stored {
		t.Fatalf("%d blocks were recompressed when they moved for the first time", n)
	}
	cleanAll(t, s)
	st := s.Stats()
	if st.Recompressed < blocks/2 || st.RecompressedWon < stored/20 || s.segs.data.Load() != stored-st.RecompressedWon {
		t.Fatalf("%d blocks were recompressed and won %d bytes, of %d, now %d", st.Recompressed, st.RecompressedWon, stored, s.segs.data.Load())
	}
	t.Logf("%d of %d blocks won %d of %d bytes", st.Recompressed, blocks, st.RecompressedWon, stored)
	check := func() {
		t.Helper()
		buf := make([]byte, blocks*dedup.BlockSize)
		if err := v.Read(ctx, 0, buf); err != nil {
			t.Fatal(err)
		}
		reduced, raw := make([]dedup.Block, blocks), make([]byte, blocks*dedup.BlockSize)
		if err := v.ReadReduced(ctx, 0, reduced, raw); err != nil {
			t.Fatal(err)
		}
		var plain [dedup.BlockSize]byte
		for i := range uint64(blocks) {
			want := content(i)
			if !bytes.Equal(buf[i*dedup.BlockSize:][:dedup.BlockSize], want) {
				t.Fatalf("block %d differs", i)
			}
			b := &reduced[i]
			if b.Encoding > dedup.S2 || dedup.Verify(b) != nil || dedup.Decode(plain[:], b.Encoding, b.Data) != nil || !bytes.Equal(plain[:], want) {
				t.Fatalf("block %d goes out with encoding %d", i, b.Encoding)
			}
		}
		fp := c.red.Fingerprint(content(3))
		b, err := s.ReadFingerprint(ctx, &fp, plain[:])
		if err != nil || b.Encoding > dedup.S2 || dedup.Verify(&b) != nil {
			t.Fatalf("%d, %v", b.Encoding, err)
		}
		if last := mustScrub(t, s); last.Damaged != 0 || last.Counters != 0 {
			t.Fatalf("%+v", last)
		}
		mustCheck(t, s)
	}
	check()
	// What is packed stays packed: groups move as they are, and what was left alone may find company.
	was, made, kept := s.segs.data.Load(), s.cleaner.packing.groups.Load(), s.cleaner.packing.kept.Load()
	cleanAll(t, s)
	if n := s.cleaner.packing.groups.Load() - made; was < s.segs.data.Load() || n > 20 || s.cleaner.packing.kept.Load()-kept != made || s.cleaner.packing.ended.Load() != 0 {
		t.Fatalf("a third move changed %d bytes to %d, and made %d groups", was, s.segs.data.Load(), n)
	}
	check()
	crashed := r.crash(devicetest.CrashOptions{Seed: 3})
	mustClose(t, s)
	r = crashed
	s = r.start()
	v = s.Volume(1)
	c = newClient(t, s)
	check()
	// A damaged one is found.
	var e format.Entry
	found := false
	err := s.eachEntryPage(nil, func(_ BID, page []byte) {
		for i := range format.EntriesPerPage {
			if format.ParseEntry(format.EntryAt(page, i), &e); !found && e.Addr != 0 && e.Encoding == dedup.Zstd {
				found = true
				d, off := s.segs.locate(e.Addr)
				r.disks[d.Path()].FlipBit(off, 40)
			}
		}
	})
	if err != nil || !found {
		t.Fatal(err, found)
	}
	report, err := s.check(ctx, true)
	if err != nil || report.Count != 1 {
		t.Fatal(report, err)
	}
	mustClose(t, s)
}
