package cache

import "testing"

// TestPass: a scan that passes leaves the cache as it was, and what passes twice within
// the memory of ghosts is kept.
func TestPass(t *testing.T) {
	const blocks = 1000
	c := newCache(t, blocks)
	for key := range uint64(blocks / 2) {
		c.Put(key, block(key))
	}
	for key := uint64(1e6); key < 1e6+10*blocks; key++ {
		c.Pass(key, block(key))
		if c.Contains(key) {
			t.Fatalf("key %d came to stay in its first pass", key)
		}
	}
	for key := range uint64(blocks / 2) {
		if !c.Contains(key) {
			t.Fatalf("a scan that passed drove key %d out", key)
		}
	}
	st := c.Stats()
	if st.Passed != 10*blocks || st.Evictions != 0 {
		t.Fatalf("%+v after %d blocks passed", st, 10*blocks)
	}
	got := make([]byte, BlockSize)
	kept := 0
	for key := uint64(1e6 + 10*blocks - 100); key < 1e6+10*blocks; key++ { // the newest
		c.Pass(key, block(key))
		if c.Get(key, got, 0) {
			kept++
			if string(got) != string(block(key)) {
				t.Fatalf("key %d has other content", key)
			}
		}
	}
	if kept < 80 {
		t.Errorf("%d of 100 blocks that passed twice were kept", kept)
	}
	c.Pass(1, block(7)) // repaired, say
	if c.Get(1, got, 0); string(got) != string(block(7)) {
		t.Error("a block that is there did not get its new content")
	}
	for i := range c.shards {
		c.shards[i].check(t)
	}
}
