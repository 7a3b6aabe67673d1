package cache

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newCache(t testing.TB, blocks int64) *Cache {
	t.Helper()
	c, err := New(blocks * frameBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// block is full of its key.
func block(key uint64) []byte {
	b := make([]byte, BlockSize)
	for i := 0; i < BlockSize; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], key)
	}
	return b
}

// check finds broken queues, chains and counters.
func (s *shard) check(t rapid.TB) {
	t.Helper()
	seen := make([]bool, len(s.entries))
	for _, q := range []*queue{&s.small, &s.main} {
		n, newer := uint32(0), none
		for i := q.newest; i != none; i = s.entries[i].older {
			e := &s.entries[i]
			if seen[i] || e.newer != newer || e.inMain != (q == &s.main) || e.uses > usesMax {
				t.Fatalf("entry %d in its queue: %+v, seen %t", i, *e, seen[i])
			}
			if s.find(e.key, mix(e.key)) != i {
				t.Fatalf("entry %d of key %d is not found", i, e.key)
			}
			seen[i] = true
			newer = i
			n++
		}
		if q.oldest != newer || q.len != n {
			t.Fatalf("queue %+v has %d entries, the oldest %d", *q, n, newer)
		}
	}
	chained := 0
	for _, i := range s.buckets {
		for ; i != none; i = s.entries[i].chain {
			chained++
		}
	}
	if chained != int(s.small.len+s.main.len) {
		t.Fatalf("%d entries in chains, %d in queues", chained, s.small.len+s.main.len)
	}
	for i := s.free; i != none; i = s.entries[i].chain {
		if seen[i] {
			t.Fatalf("entry %d is free and not", i)
		}
		seen[i] = true
	}
	for i, ok := range seen {
		if !ok {
			t.Fatalf("entry %d is lost", i)
		}
	}
}

// TestModel: what the cache answers is what was put last and not removed, whole,
// and what it holds never exceeds its capacity.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blocks := rapid.Int64Range(1, 40).Draw(t, "blocks")
		c, err := New(blocks * frameBytes)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		model := map[uint64]uint64{}
		got := make([]byte, BlockSize)
		for range rapid.IntRange(0, 400).Draw(t, "steps") {
			key := rapid.Uint64Range(0, 60).Draw(t, "key")
			switch rapid.IntRange(0, 5).Draw(t, "kind") {
			case 0, 1:
				content := key + 100*rapid.Uint64Range(0, 3).Draw(t, "content")
				c.Put(key, block(content))
				model[key] = content
				if !c.Contains(key) {
					t.Fatalf("key %d is not there right after Put", key)
				}
			case 2:
				c.Remove(key)
				delete(model, key)
				if c.Contains(key) {
					t.Fatalf("key %d is there right after Remove", key)
				}
			default:
				off := rapid.IntRange(0, BlockSize).Draw(t, "off")
				n := rapid.IntRange(0, BlockSize-off).Draw(t, "n")
				if c.Get(key, got[:n], off) {
					want, ok := model[key]
					if !ok || !bytes.Equal(got[:n], block(want)[off:off+n]) {
						t.Fatalf("key %d: wrong content, want %d, %t", key, want, ok)
					}
				} else if _, ok := model[key]; ok && int64(len(model)) <= blocks && c.Stats().Evictions == 0 {
					t.Fatalf("key %d is lost without an eviction", key)
				}
			}
		}
		st := c.Stats()
		if st.Capacity != blocks*BlockSize || st.Bytes > st.Capacity {
			t.Fatalf("%+v with %d blocks", st, blocks)
		}
		for i := range c.shards {
			c.shards[i].check(t)
		}
	})
}

func TestStats(t *testing.T) {
	c := newCache(t, 10)
	buf := make([]byte, BlockSize)
	for key := range uint64(15) {
		c.Put(key, block(key))
	}
	var hits uint64
	for key := range uint64(15) {
		if c.Contains(key) != c.Get(key, buf, 0) {
			t.Errorf("key %d: Contains and Get differ", key)
		}
		if c.Contains(key) {
			hits++
		}
	}
	want := Stats{Hits: 10, Misses: 5, Evictions: 5, Bytes: 10 * BlockSize, Capacity: 10 * BlockSize}
	if got := c.Stats(); got != want || hits != 10 {
		t.Errorf("%+v, want %+v; %d hits", got, want, hits)
	}
}

// TestScanLeavesTheWorkingSet: blocks in use survive a scan of ten times the
// cache, and a scan with nothing in use fills the cache.
func TestScanLeavesTheWorkingSet(t *testing.T) {
	const blocks, hot = 4000, 2000
	c := newCache(t, blocks)
	buf := make([]byte, 512)
	use := func(key uint64) bool {
		if c.Get(key, buf, 0) {
			return true
		}
		c.Put(key, block(key))
		return false
	}
	for range 4 {
		for key := range uint64(hot) {
			use(key)
		}
	}
	for i := range uint64(10 * blocks) {
		use(1e6 + i)
	}
	kept := 0
	for key := range uint64(hot) {
		if c.Contains(key) {
			kept++
		}
	}
	if kept < hot*95/100 {
		t.Errorf("%d of %d blocks in use survived a scan", kept, hot)
	}
	if st := c.Stats(); st.Bytes != st.Capacity {
		t.Errorf("%+v: a full cache is not full", st)
	}
}

// TestGhostsBringBlocksBack: a block that comes again soon after it left is kept
// through the next scan.
func TestGhostsBringBlocksBack(t *testing.T) {
	const blocks = 1000
	c := newCache(t, blocks)
	scan := func(from, n uint64) {
		for i := range n {
			c.Put(from+i, block(from+i))
		}
	}
	scan(0, 100)
	scan(1e6, blocks+100) // the first hundred leave, unread
	if c.Contains(0) || c.Contains(99) {
		t.Fatal("the scan left the first blocks in the cache")
	}
	scan(0, 100) // and come back
	scan(2e6, 5*blocks)
	kept := 0
	for key := range uint64(100) {
		if c.Contains(key) {
			kept++
		}
	}
	if kept < 80 {
		t.Errorf("%d of 100 blocks that came back survived a scan", kept)
	}
}

// TestMainQueueGivesASecondChance: of blocks that all were kept once, those that
// are still read outlive those that are not, however many more are kept.
func TestMainQueueGivesASecondChance(t *testing.T) {
	const blocks, hot = 1000, 300
	c := newCache(t, blocks)
	buf := make([]byte, 8)
	keep := func(key uint64) { // read often enough to leave the small queue for the main one
		c.Put(key, block(key))
		for range keepUses {
			c.Get(key, buf, 0)
		}
	}
	for key := range uint64(hot) {
		keep(key)
	}
	for i := range uint64(5 * blocks) {
		keep(1e6 + i)
		c.Get(i%hot, buf, 0)
	}
	kept := 0
	for key := range uint64(hot) {
		if c.Contains(key) {
			kept++
		}
	}
	if kept < hot*9/10 {
		t.Errorf("%d of %d blocks in use survived", kept, hot)
	}
}

// TestHitRatio compares with a plain LRU on a skewed load with scans in it: the
// reason to have anything else.
func TestHitRatio(t *testing.T) {
	const blocks = 2000
	c := newCache(t, blocks)
	lru := newLRU(blocks)
	rng := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(rng, 1.1, 10, 50000)
	buf := make([]byte, 8)
	hits, lruHits, scan := 0, 0, uint64(1e6)
	use := func(key uint64) {
		if c.Get(key, buf, 0) {
			hits++
		} else {
			c.Put(key, make([]byte, BlockSize))
		}
		if lru.use(key) {
			lruHits++
		}
	}
	for i := range 100000 {
		use(zipf.Uint64())
		if i%10000 == 0 {
			for range 3000 {
				use(scan)
				scan++
			}
		}
	}
	if hits <= lruHits {
		t.Errorf("%d hits, %d of an LRU of the same size", hits, lruHits)
	}
	t.Logf("%d hits, %d of an LRU of the same size", hits, lruHits)
}

type lru struct {
	size int
	time int
	last map[uint64]int
	keys []uint64 // in order of use, stale ones included
}

func newLRU(size int) *lru { return &lru{size: size, last: map[uint64]int{}} }

func (l *lru) use(key uint64) bool {
	_, ok := l.last[key]
	l.last[key] = len(l.keys)
	l.keys = append(l.keys, key)
	for len(l.last) > l.size {
		if k := l.keys[l.time]; l.last[k] == l.time {
			delete(l.last, k)
		}
		l.time++
	}
	return ok
}

func TestConcurrent(t *testing.T) {
	c := newCache(t, 3000)
	if len(c.shards) < 2 {
		t.Fatal("one shard only")
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			buf := make([]byte, BlockSize)
			mine := make([]byte, BlockSize)
			for range 10000 {
				key := rng.Uint64N(6000)
				switch rng.IntN(8) {
				case 0:
					c.Remove(key)
				case 1, 2, 3:
					for i := 0; i < BlockSize; i += 8 {
						binary.LittleEndian.PutUint64(mine[i:], key)
					}
					c.Put(key, mine)
				default:
					if c.Get(key, buf, 0) {
						for i := 0; i < BlockSize; i += 8 {
							if got := binary.LittleEndian.Uint64(buf[i:]); got != key {
								t.Errorf("key %d: content of %d at %d", key, got, i)
								return
							}
						}
					}
				}
			}
		})
	}
	wg.Wait()
	for i := range c.shards {
		c.shards[i].check(t)
	}
}

func TestBoundedOffHeapNoAllocations(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const bytes = 64 << 20
	c, err := New(bytes)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
		t.Errorf("a cache of 64 MiB took %d bytes of the Go heap", grown)
	}
	if len(c.mem) > bytes || c.Stats().Capacity < bytes*97/100 {
		t.Errorf("%d bytes mapped, %d of blocks, of %d", len(c.mem), c.Stats().Capacity, bytes)
	}
	b := block(1)
	key := uint64(0)
	if n := testing.AllocsPerRun(20000, func() { // evictions included
		key++
		c.Put(key, b)
		c.Get(key, b, 0)
		c.Get(key-5, b, 0)
		c.Remove(key - 7)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestRefusals(t *testing.T) {
	for _, n := range []int64{-1, 0, BlockSize, frameBytes - 1, 1 << 62} {
		if c, err := New(n); err == nil {
			c.Close()
			t.Errorf("cache of %d bytes", n)
		}
	}
	c := newCache(t, 1)
	for name, f := range map[string]func(){
		"short Put":       func() { c.Put(1, make([]byte, 100)) },
		"Get beyond":      func() { c.Get(1, make([]byte, 10), BlockSize-9) },
		"negative offset": func() { c.Get(1, nil, -1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s does not panic", name)
				}
			}()
			f()
		}()
	}
}

func BenchmarkCache(b *testing.B) {
	c := newCache(b, 64<<10) // 256 MiB
	data := block(1)
	for key := range uint64(64 << 10) {
		c.Put(key, data)
	}
	b.Run("hit", func(b *testing.B) {
		rng := rand.New(rand.NewPCG(1, 1))
		for b.Loop() {
			c.Get(rng.Uint64N(64<<10), data, 0)
		}
	})
	b.Run("miss", func(b *testing.B) {
		rng := rand.New(rand.NewPCG(1, 1))
		for b.Loop() {
			c.Get(1<<20+rng.Uint64N(64<<10), data, 0)
		}
	})
	b.Run("put and evict", func(b *testing.B) {
		key := uint64(1 << 30)
		for b.Loop() {
			key++
			c.Put(key, data)
		}
	})
}
