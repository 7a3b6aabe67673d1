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
	r := coldRig(t, blocks)
	s := r.start()
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
	c := newClient(t, s)
	c.must(&Op{Kind: OpClone, Volume: 2, ID: OpID{1, 1}, Count: blocks, Source: 1})
	v = s.Volume(1)
	scan()
	if st := s.Stats(); st.L1.Passed != 0 || st.L1.Bytes != blocks*dedup.BlockSize {
		t.Errorf("of %d blocks of a clone %d passed, the cache holds %d", blocks, st.L1.Passed, st.L1.Bytes/dedup.BlockSize)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestScanOutOfOrder: commands of a scan that overtake each other are one stream, and those of
// several scans at once are; large reads at random are none.
func TestScanOutOfOrder(t *testing.T) {
	const command, depth, commands = 1 << 20, 16, 1 << 12
	r := newRig(t, 1, 16<<20)
	s := r.start()
	v := mustCreate(t, s, 1, 1<<30/dedup.BlockSize*8) // 8 GiB, all holes
	v.streams.inFlight.Add(depth * command)
	rng := testRand(1)
	passing := func(next func(i uint64) uint64) (n int) {
		for i := range uint64(commands) {
			if v.miss(next(i)*command, command) {
				n++
			}
		}
		return n
	}
	order := rng.Perm(depth)
	one := passing(func(i uint64) uint64 {
		if i%depth == 0 {
			order = rng.Perm(depth)
		}
		return i - i%depth + uint64(order[i%depth])
	})
	if one < commands*95/100 {
		t.Errorf("%d of %d commands of a scan pass", one, commands)
	}
	three := passing(func(i uint64) uint64 { return i%3*2700 + i/3 })
	if three < commands*95/100 {
		t.Errorf("%d of %d commands of three scans pass", three, commands)
	}
	random := passing(func(uint64) uint64 { return rng.Uint64N(8 << 10) })
	if random > commands/4 {
		t.Errorf("%d of %d reads at random pass for a scan", random, commands)
	}
	v.streams.inFlight.Add(-depth * command)
	mustClose(t, s)
}
