package lsfs

import (
	"bytes"
	"context"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

// TestScanPasses: a long scan by large reads neither fills the cache nor drives others out; who
// scans the same again a short while later does it for the cache.
func TestScanPasses(t *testing.T) {
	const blocks = 2048
	r := newRig(t, 1, 64<<20)
	r.cfg.L1Bytes = 16 << 20
	s := r.start()
	mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	var seq Seq
	fill(c, 1, &seq, blocks, known)
	mustClose(t, s)

	s = r.start()
	v := s.Volume(1)
	buf := make([]byte, readBlocks*dedup.BlockSize)
	scan := func() (cached int) {
		for at := uint64(0); at < blocks; at += readBlocks {
			if v.TryRead(at*dedup.BlockSize, buf) {
				cached++
			} else if err := v.Read(context.Background(), at*dedup.BlockSize, buf); err != nil {
				t.Fatal(err)
			}
			for i := range uint64(readBlocks) {
				if !bytes.Equal(buf[i*dedup.BlockSize:][:dedup.BlockSize], known(at+i)) {
					t.Fatalf("block %d: other content", at+i)
				}
			}
		}
		return cached
	}
	const first = readBlocks // one read alone is no scan
	scan()
	if st := s.Stats(); st.L1.Bytes != first*dedup.BlockSize || st.L1.Passed != blocks-first {
		t.Errorf("after a scan of %d blocks the cache holds %d, and %d passed", blocks, st.L1.Bytes/dedup.BlockSize, st.L1.Passed)
	}
	scan()
	if st := s.Stats(); st.L1.Bytes < blocks*dedup.BlockSize*9/10 { // ghosts share places
		t.Errorf("after the second scan of %d blocks the cache holds %d", blocks, st.L1.Bytes/dedup.BlockSize)
	}
	reads := s.Stats().BlockReads
	scan()
	if n := s.Stats().BlockReads - reads; n > blocks/10 {
		t.Errorf("the third scan read %d blocks of %d from the devices", n, blocks)
	}
	mustClose(t, s)

	// What a clone shares is read by others soon, and does not pass.
	s = r.start()
	mustCreate(t, s, 2, blocks)
	c = newClient(t, s)
	c.must(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, 1}, Count: blocks, Source: 1})
	v = s.Volume(1)
	scan()
	if st := s.Stats(); st.L1.Passed != 0 || st.L1.Bytes != blocks*dedup.BlockSize {
		t.Errorf("of %d blocks of a clone %d passed, the cache holds %d", blocks, st.L1.Passed, st.L1.Bytes/dedup.BlockSize)
	}
	mustCheck(t, s)
	mustClose(t, s)
}
