package replication

import (
	"math/rand/v2"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// TestReduce: every block of a long write gets its own fingerprint and stored bytes, whatever
// stands beside it, at lengths that are no whole groups too.
func TestReduce(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	n := &Node{}
	n.reducers.key = dedup.Key{5}
	alone := dedup.NewReducer(n.reducers.key)
	w := &work{buf: make([]byte, 0, 264<<10)}
	got := make([]byte, blockSize)
	for blocks := 1; blocks <= 64; blocks += 1 + rng.IntN(3) {
		data := make([]byte, blocks*blockSize)
		for i := range blocks {
			b := data[i*blockSize:][:blockSize]
			switch rng.IntN(4) {
			case 0: // zeros
			case 1:
				for k := range b[:100] {
					b[k] = byte(rng.Uint32())
				}
			default:
				for k := range b {
					b[k] = byte(rng.Uint32())
				}
			}
		}
		w.op.Blocks, w.op.Pinned, w.buf = w.op.Blocks[:0], w.op.Pinned[:0], w.buf[:0]
		n.reduce(w, 7, data, false, true)
		if w.op.Kind != lsfs.OpWrite || w.op.Start != 7 || int(w.op.Count) != blocks || len(w.op.Blocks) != blocks || len(w.op.Pinned) != blocks {
			t.Fatalf("%d blocks became %d with a count of %d at %d", blocks, len(w.op.Blocks), w.op.Count, w.op.Start)
		}
		for i := range blocks {
			b, is := &w.op.Blocks[i], data[i*blockSize:][:blockSize]
			if dedup.IsZero(is) {
				if b.Encoding != dedup.Zero || b.Data != nil || b.Fingerprint != (dedup.Fingerprint{}) {
					t.Fatalf("block %d of %d is zeros and became %+v", i, blocks, b)
				}
				continue
			}
			if b.Fingerprint != alone.Fingerprint(is) {
				t.Fatalf("block %d of %d has another fingerprint", i, blocks)
			}
			if err := dedup.Verify(b); err != nil || b.Data == nil {
				t.Fatalf("block %d of %d: %v", i, blocks, err)
			}
			if err := dedup.Decode(got, b.Encoding, b.Data); err != nil || string(got) != string(is) {
				t.Fatalf("block %d of %d does not come back: %v", i, blocks, err)
			}
		}
	}
}
