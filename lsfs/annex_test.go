package lsfs

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

// TestAnnex: resync copies reach the annex, versions of its chunks are listed, and it
// outlives a resize and a restart.
func TestAnnex(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 32<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 600)
	c := newClient(t, s)
	c.must(c.write(1, 1, 0, bytes.Join([][]byte{small(1), small(2), small(3)}, nil)))
	const at = AnnexStart + 700
	c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, 2}, Start: at, Count: 3, Source: 1})
	op := c.write(1, 7, at+5, small(9))
	op.Kind = OpCopy
	c.must(op)
	if err := v.Resize(ctx, 100); err != nil {
		t.Fatal(err)
	}
	verify := func() {
		t.Helper()
		v := s.Volume(1)
		const chunk = uint32(at >> chunkShift)
		list, err := v.ChangedChunks(ctx, 1)
		if err != nil || !slices.Equal(list, []uint32{chunk}) {
			t.Fatal(list, err)
		}
		versions := make([]Seq, 3)
		if err := v.ChunkVersions(ctx, chunk-1, versions); err != nil || !slices.Equal(versions, []Seq{0, 7, 0}) {
			t.Fatal(versions, err)
		}
		fps := make([]dedup.Fingerprint, 6)
		if err := v.Fingerprints(ctx, at, fps); err != nil || fps[0] == fps[1] || fps[3] != (dedup.Fingerprint{}) || fps[5] == fps[3] {
			t.Fatal(fps, err)
		}
		blocks, buf := make([]dedup.Block, 6), make([]byte, 6*dedup.BlockSize)
		if err := v.ReadReduced(ctx, at, blocks, buf); err != nil || blocks[5].Fingerprint != fps[5] {
			t.Fatal(blocks, err)
		}
		if err := v.Repair(ctx, at+5, blocks[5]); err != nil {
			t.Fatal(err)
		}
		part := make([]byte, 1024)
		if err := v.Read(ctx, uint64(at)*dedup.BlockSize+4096-512, part); err != nil || part[0] != 1 || part[512] != 2 {
			t.Fatal(part[0], part[512], err)
		}
		if v.AnnexMapped() != 4 || v.MappedBlocks() != 3 {
			t.Fatal(v.AnnexMapped(), v.MappedBlocks())
		}
		if v.TryRead(uint64(annexEnd)*dedup.BlockSize-512, part) || v.Read(ctx, uint64(annexEnd)*dedup.BlockSize-512, part) == nil {
			t.Fatal("read behind the annex")
		}
		if _, err := v.Extents(ctx, 50, 101, make([]Extent, 0, 1)); !errors.Is(err, ErrRange) {
			t.Fatal(err)
		}
		mustCheck(t, s)
	}
	verify()
	d1, err := v.Digest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	s = r.start()
	verify()
	c = newClient(t, s)
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, 3}, Start: AnnexStart, Count: 9000})
	v = s.Volume(1)
	if d2, err := v.Digest(ctx); err != nil || d1 == d2 || v.AnnexMapped() != 0 {
		t.Fatal("the digest does not cover the annex", err)
	}
	s.mu.RLock()
	height := v.mapTree.height
	s.mu.RUnlock()
	if height != 1 {
		t.Fatalf("the map of an empty annex keeps %d levels", height)
	}
	mustCheck(t, s)
	mustClose(t, s)
}
