package cache

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func drain(t *testing.T, s *Spill) map[uint64]int {
	t.Helper()
	got := map[uint64]int{}
	buf := make([]byte, BlockSize)
	for {
		key, ok := s.Take(buf)
		if !ok {
			return got
		}
		if !bytes.Equal(buf, block(key)) {
			t.Fatalf("block %d has other content", key)
		}
		got[key]++
	}
}

func spilling(t *testing.T, frames, room int, second int64) (*Cache, *Spill) {
	t.Helper()
	s, err := NewSpill(room)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	c := newCache(t, int64(frames))
	if err := c.SpillTo(s, second); err != nil {
		t.Fatal(err)
	}
	return c, s
}

// TestSpillKnowsScans: one scan gives nothing to the second level, what is read again
// within its reach does, and what nobody asked for never.
func TestSpillKnowsScans(t *testing.T) {
	c, s := spilling(t, 200, 5000, 4000)
	for n := range uint64(3000) {
		c.Put(n, block(n))
	}
	if got := drain(t, s); len(got) > 20 { // chance matches of 15 bits
		t.Errorf("a scan of 3000 blocks gave %d to the second level", len(got))
	}
	for n := range uint64(3000) {
		c.Put(n, block(n))
	}
	// Half of 4000 places remember, the others were taken by later keys of the same place.
	if got := drain(t, s); len(got) < 1000 {
		t.Errorf("of 3000 blocks that were read twice %d went to the second level", len(got))
	}
	for range 3 {
		for n := uint64(10000); n < 13000; n++ {
			c.PutUnread(n, block(n))
		}
	}
	for key := range drain(t, s) {
		if key >= 10000 {
			t.Fatalf("block %d went to the second level, nobody has read it", key)
		}
	}
}

// TestSpillTakesWhatWasUsed: a block that was in use and is pushed out goes to the second level.
func TestSpillTakesWhatWasUsed(t *testing.T) {
	c, s := spilling(t, 200, 1000, 100000)
	buf := make([]byte, BlockSize)
	for n := range uint64(50) {
		c.Put(n, block(n))
		for range 3 {
			c.Get(n, buf, 0)
		}
	}
	got := map[uint64]int{}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20000 { // others come into use
		n := 100 + rng.Uint64N(400)
		if !c.Get(n, buf, 0) {
			c.Put(n, block(n))
		}
		for k, v := range drain(t, s) {
			got[k] += v
		}
	}
	for n := range uint64(50) {
		if got[n] == 0 && !c.Contains(n) {
			t.Fatalf("block %d is in neither", n)
		}
	}
}

func TestSpillIsBounded(t *testing.T) {
	c, s := spilling(t, 100, 8, 100000)
	for range 3 {
		for n := range uint64(2000) {
			c.Put(n, block(n))
		}
	}
	if got := len(drain(t, s)); got != 8 || s.Dropped() == 0 {
		t.Errorf("%d wait in room for 8, %d dropped", got, s.Dropped())
	}
	if _, ok := s.Take(make([]byte, BlockSize)); ok {
		t.Error("a block is there twice")
	}
}
