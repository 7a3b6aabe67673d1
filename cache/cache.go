package cache

import (
	"fmt"
	"math/bits"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BlockSize is the size of every cached block in bytes.
const BlockSize = 4096

const (
	// shardFrames is the least number of frames for which the cache takes another
	// shard: with fewer the small queue is too short to tell a scan from use.
	shardFrames = 1024
	shardsMax   = 256

	// frameBytes is what one frame takes: the block, its entry, its bucket and its ghosts.
	frameBytes = BlockSize + int64(unsafe.Sizeof(entry{})) + bucketsPerFrame*4 + ghostsPerFrame*8

	hugePage = 2 << 20
)

// Cache is a cache of blocks, safe for concurrent use but for Close.
type Cache struct {
	mem    []byte
	shards []shard
	shift  uint // the top bits of a mixed key choose the shard
}

// Stats counts since New.
type Stats struct {
	Hits      uint64 // Get that found the block
	Misses    uint64 // Get that did not
	FirstHits uint64 // of the hits, those of blocks that had been read ahead or written, and not asked for yet
	Evictions uint64 // blocks that gave way to another
	Passed    uint64 // blocks of long scans of which the key alone was remembered
	Bytes     int64  // of blocks held
	Capacity  int64  // of blocks that fit
}

// New makes a cache that takes at most the given bytes of memory, bookkeeping
// (1 %) included. The memory is taken from the system as it fills. Fewer bytes
// than one block and its bookkeeping need are an error.
func New(bytes int64) (*Cache, error) {
	frames := bytes / frameBytes
	if frames < 1 || frames > 1<<40 {
		return nil, fmt.Errorf("cache of %d bytes: must be %d bytes to 4 PiB", bytes, frameBytes)
	}
	n := int64(1)
	for n < shardsMax && frames/(2*n) >= shardFrames {
		n *= 2
	}
	per := frames / n
	if n > 1 {
		per &^= 1 // keeps every shard's bookkeeping at a multiple of 8
	}
	if per > 1<<31 {
		return nil, fmt.Errorf("cache of %d bytes: more than %d blocks in a shard", bytes, int64(1<<31))
	}
	// All blocks first, so that they are aligned to pages; the bookkeeping behind them.
	data := per * n * BlockSize
	meta := (frameBytes - BlockSize) * per
	mem, err := unix.Mmap(-1, 0, int(data+meta*n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes for the cache: %w", data+meta*n, err)
	}
	if len(mem) >= hugePage {
		_ = unix.Madvise(mem, unix.MADV_HUGEPAGE) // a hint
	}
	c := &Cache{mem: mem, shards: make([]shard, n), shift: uint(64 - bits.TrailingZeros64(uint64(n)))}
	for i := range c.shards {
		at := int64(i) * per * BlockSize
		c.shards[i].init(int(per), mem[at:at+per*BlockSize], mem[data+meta*int64(i):data+meta*int64(i+1)])
	}
	return c, nil
}

// mix spreads keys, which are handed out in sequence, over all 64 bits. It is
// the finalizer of SplitMix64, a bijection: different keys stay different.
func mix(key uint64) uint64 {
	key ^= key >> 30
	key *= 0xbf58476d1ce4e5b9
	key ^= key >> 27
	key *= 0x94d049bb133111eb
	return key ^ key>>31
}

func (c *Cache) shard(h uint64) *shard {
	return &c.shards[h>>c.shift] // a shift by 64 gives 0
}

// Get copies the bytes of the block from off on into dst, if the cache holds it,
// and says so. off+len(dst) is at most BlockSize; more is a panic.
func (c *Cache) Get(key uint64, dst []byte, off int) bool {
	if off < 0 || off > BlockSize || len(dst) > BlockSize-off {
		panic("cache: Get beyond the block")
	}
	h := mix(key)
	s := c.shard(h)
	s.mu.Lock()
	i := s.find(key, h)
	if i == none {
		s.misses++
		s.mu.Unlock()
		return false
	}
	s.hits++
	e := &s.entries[i]
	if e.uses < usesMax {
		e.uses++
	}
	if !e.read {
		e.read = true
		s.firstHits++
	}
	copy(dst, s.frame(i)[off:])
	s.mu.Unlock()
	return true
}

// Contains says whether the cache holds the block now. It does not count as a use.
func (c *Cache) Contains(key uint64) bool {
	h := mix(key)
	s := c.shard(h)
	s.mu.Lock()
	i := s.find(key, h)
	s.mu.Unlock()
	return i != none
}

// Wanted says whether the cache holds the block and somebody has asked for it. It does
// not count as a use.
func (c *Cache) Wanted(key uint64) bool {
	h := mix(key)
	s := c.shard(h)
	s.mu.Lock()
	i := s.find(key, h)
	wanted := i != none && s.entries[i].read
	s.mu.Unlock()
	return wanted
}

// Put holds a copy of block, BlockSize bytes, that was read because somebody wanted
// it. A block that is there already gets the new content, for it may have been repaired.
func (c *Cache) Put(key uint64, block []byte) { c.put(key, block, true) }

// PutUnread is Put for a block that nobody has asked for yet: it was read ahead, or
// written. Until the first Get it counts as not read.
func (c *Cache) PutUnread(key uint64, block []byte) { c.put(key, block, false) }

// Pass is Put for a block of a long scan. Only if it was given up or passed a short while ago does
// it enter the cache; else its key alone is remembered. So what is read once costs neither the copy nor
// other blocks' frames. A block that is there gets the new content.
func (c *Cache) Pass(key uint64, block []byte) {
	h := mix(key)
	s := c.shard(h)
	s.mu.Lock()
	if s.find(key, h) == none && s.ghost(h) == nil {
		s.addGhost(h)
		s.passed++
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	c.Put(key, block)
}

func (c *Cache) put(key uint64, block []byte, read bool) {
	if len(block) != BlockSize {
		panic("cache: Put of a block that is not 4096 bytes")
	}
	h := mix(key)
	s := c.shard(h)
	s.mu.Lock()
	i := s.find(key, h)
	if i == none {
		i = s.insert(key, h)
	}
	if read {
		s.entries[i].read = true
	}
	copy(s.frame(i), block)
	s.mu.Unlock()
}

// Remove gives the block's frame to the next one that comes.
func (c *Cache) Remove(key uint64) {
	h := mix(key)
	s := c.shard(h)
	s.mu.Lock()
	if i := s.find(key, h); i != none {
		s.drop(i, h)
	}
	s.mu.Unlock()
}

// Stats counts. It takes every lock in turn: for metrics, not for the data path.
func (c *Cache) Stats() Stats {
	var st Stats
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		st.Hits += s.hits
		st.Misses += s.misses
		st.FirstHits += s.firstHits
		st.Evictions += s.evictions
		st.Passed += s.passed
		st.Bytes += int64(s.small.len+s.main.len) * BlockSize
		st.Capacity += int64(len(s.entries)) * BlockSize
		s.mu.Unlock()
	}
	return st
}

// Close gives the memory back. No other call may be running or follow.
func (c *Cache) Close() error {
	mem := c.mem
	if mem == nil {
		return nil
	}
	c.mem, c.shards = nil, nil
	return unix.Munmap(mem)
}
