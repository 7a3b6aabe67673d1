package lsfs

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
)

// TestReadChosen: some blocks of a chunk, read at once, are what they are one by one;
// holes, and what is stored compressed, among them.
func TestReadChosen(t *testing.T) {
	r := newRig(t, 1, 64<<20)
	s := r.start()
	mustCreate(t, s, 1, 1000)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(1, 2))
	for seq := range Seq(300) {
		start, n := BlockNo(rng.IntN(900)), rng.Uint64N(1<<30)
		switch seq % 8 {
		case 0:
			c.must(c.write(1, seq+1, start, pattern(n)))
		case 1, 2, 3:
			c.must(c.write(1, seq+1, start, slices.Concat(noise(n), noise(n+1), noise(n+2), noise(n+3), noise(n+4), noise(n+5))))
		default:
			c.must(c.write(1, seq+1, start, noise(n)))
		}
	}
	v := s.Volume(1)
	var dst [readBlocks]dedup.Block
	buf := device.AlignedBuffer(readBlocks * dedup.BlockSize)
	defer device.FreeAligned(buf)
	var one [1]dedup.Block
	single := make([]byte, dedup.BlockSize)
	for range 200 {
		start := BlockNo(rng.IntN(600))
		first := uint32(rng.IntN(100))
		var index []uint32
		all := rng.IntN(3) == 0
		for i := range uint32(readBlocks) {
			if all || rng.IntN(1+rng.IntN(40)) == 0 {
				index = append(index, first+i)
			}
		}
		if err := v.ReadChosen(t.Context(), start, index, dst[:len(index)], buf); err != nil {
			t.Fatal(err)
		}
		for k, i := range index {
			if err := v.ReadReduced(t.Context(), start+BlockNo(i), one[:], single); err != nil {
				t.Fatal(err)
			}
			if got, want := dst[k], one[0]; got.Fingerprint != want.Fingerprint || got.Encoding != want.Encoding || got.Sum != want.Sum || !slices.Equal(got.Data, want.Data) {
				t.Fatalf("block %d of %d: %v, want %v", k, len(index), got.Fingerprint, want.Fingerprint)
			}
			if d := dst[k].Data; len(d) > 0 && &d[0] != &buf[k*dedup.BlockSize] {
				t.Fatalf("block %d does not lie in its place", k)
			}
		}
	}
	for _, index := range [][]uint32{{3, 3}, {4, 3}, {0, readBlocks}, {1, 2, 999}} {
		if err := v.ReadChosen(t.Context(), 900, index, dst[:len(index)], buf); !errors.Is(err, ErrRange) {
			t.Errorf("%v: %v", index, err)
		}
	}
	mustClose(t, s)
}
