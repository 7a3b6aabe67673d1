package replication

import (
	"bytes"
	"testing"
)

// TestOverwriteOfWhatIsRead: blocks that are read and written in turns stay in memory
// on the owner, with compression and without; the replica, which nobody reads, and
// long writes leave the cache alone.
func TestOverwriteOfWhatIsRead(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(32 << 20)
	content := func(seed uint64, blocks int) []byte {
		p := pattern(seed, blocks*blockSize)
		for i := range blocks {
			if i%2 == 0 {
				clear(p[i*blockSize+1000:][:3000]) // this one is compressed
			}
		}
		return p
	}
	const blocks = 6
	a.write(t, 0, content(1, blocks))
	if n := a.store.Stats().WarmBlocks; n != 0 {
		t.Fatalf("%d blocks entered the cache, nobody has read them", n)
	}
	a.read(t, 0, blocks*blockSize)
	buf := make([]byte, blocks*blockSize)
	for seed := uint64(2); seed < 6; seed++ {
		want := content(seed, blocks)
		a.write(t, 0, want)
		eventually(t, "in memory", func() bool { return a.Volume(1).TryRead(0, buf) })
		if !bytes.Equal(buf, want) {
			t.Fatalf("write %d reads as something else", seed)
		}
	}
	was := a.store.Stats().WarmBlocks
	if was != 4*blocks || c.store.Stats().WarmBlocks != 0 {
		t.Errorf("%d blocks entered the owner's cache, %d the replica's", was, c.store.Stats().WarmBlocks)
	}
	a.write(t, 0, content(9, 64))
	if n := a.store.Stats().WarmBlocks; n != was {
		t.Errorf("%d blocks of a long write entered the cache", n-was)
	}
	b.equal()
}
