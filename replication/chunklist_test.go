package replication

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

func TestChunkList(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, limit := range []int{64, 400, wire.MaxData} {
		for range 50 {
			var chunks []uint32
			for c := uint32(r.IntN(5)); len(chunks) < r.IntN(300); c += 1 + uint32(r.IntN(4))*uint32(r.IntN(40)) {
				chunks = append(chunks, c)
			}
			if r.IntN(2) == 0 {
				chunks = append(chunks, uint32(annexFirst)+7)
			}
			list := appendChunks(chunks, limit)
			if len(list) > limit {
				t.Fatalf("%d bytes, the limit is %d", len(list), limit)
			}
			got, err := parseChunks(list, uint64(lsfs.VolumeBlocksMax))
			if err != nil || !slices.IsSorted(got) {
				t.Fatalf("%v, %v", got, err)
			}
			for _, c := range chunks {
				if _, ok := slices.BinarySearch(got, c); !ok {
					t.Fatalf("chunk %d is lost", c)
				}
			}
			if len(chunks)*4 <= limit && !slices.Equal(got, chunks) {
				t.Fatalf("got %v, want %v", got, chunks)
			}
		}
	}
	// All of 64 TiB: longer than a frame one by one.
	all := make([]uint32, 64<<20)
	for i := range all {
		all[i] = uint32(i)
	}
	if list := appendChunks(all, wire.MaxData); len(list) != 12 {
		t.Errorf("one run takes %d bytes", len(list))
	}
}

func FuzzChunkList(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 7, 0, 0, 0})
	f.Add(appendChunks([]uint32{1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}, 40))
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, list []byte) {
		const blocks = 1000 * wire.ChunkBlocks
		chunks, err := parseChunks(list, blocks)
		if err == nil && len(chunks) > len(list)/4 && len(chunks) > 1000+annexRunMax {
			t.Fatalf("%d chunks of %d bytes", len(chunks), len(list))
		}
	})
}
