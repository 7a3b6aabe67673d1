package cache

import (
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum is the CRC32C of a page without its last four bytes.
func sum(page []byte) uint32 { return crc32.Checksum(page[:flashSumAt], castagnoli) }

func setsIn(mem []byte, n int) []flashSet {
	return unsafe.Slice((*flashSet)(unsafe.Pointer(unsafe.SliceData(mem))), n)
}

// Spill takes what a Cache gives up and is worth keeping in a second level: blocks
// that left its main queue, and those that were read, given up and read again within
// the time that the second level would have held them. A scan so passes by, and so
// does what was read ahead or written and never asked for.
//
// It holds a bounded number of blocks until somebody takes them; what comes when it
// is full is lost, which is how the second level's rate bounds what it is given.
type Spill struct {
	mem  []byte
	seen []byte // of the cache's shards
	wake chan struct{}

	mu      sync.Mutex
	keys    []uint64
	free    []uint32
	full    []uint32 // ring of those that wait
	first   int
	n       int
	dropped int64
}

// NewSpill makes room for so many blocks.
func NewSpill(blocks int) (*Spill, error) {
	mem, err := unix.Mmap(-1, 0, blocks*BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d blocks on their way to the second level: %w", blocks, err)
	}
	s := &Spill{mem: mem, wake: make(chan struct{}, 1), keys: make([]uint64, blocks), full: make([]uint32, blocks)}
	for i := range blocks {
		s.free = append(s.free, uint32(i))
	}
	return s, nil
}

// put takes a copy of a block, or drops it.
func (s *Spill) put(key uint64, block []byte) {
	s.mu.Lock()
	if len(s.free) == 0 {
		s.dropped++
		s.mu.Unlock()
		return
	}
	i := s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	s.mu.Unlock()
	copy(s.mem[int(i)*BlockSize:][:BlockSize], block)
	s.mu.Lock()
	s.keys[i] = key
	s.full[(s.first+s.n)%len(s.full)] = i
	s.n++
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Wake is sent to when blocks have come since Take last found none.
func (s *Spill) Wake() <-chan struct{} { return s.wake }

// Take moves the block that waits longest to dst, BlockSize bytes.
func (s *Spill) Take(dst []byte) (key uint64, ok bool) {
	s.mu.Lock()
	if s.n == 0 {
		s.mu.Unlock()
		return 0, false
	}
	i := s.full[s.first]
	s.first = (s.first + 1) % len(s.full)
	s.n--
	key = s.keys[i]
	s.mu.Unlock()
	copy(dst, s.mem[int(i)*BlockSize:][:BlockSize])
	s.mu.Lock()
	s.free = append(s.free, i)
	s.mu.Unlock()
	return key, true
}

// Dropped counts the blocks that found no room.
func (s *Spill) Dropped() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// Close gives the memory back. The cache that spills is closed before.
func (s *Spill) Close() error {
	var err error
	if s.seen != nil {
		err = unix.Munmap(s.seen)
	}
	return errors.Join(err, unix.Munmap(s.mem))
}

// SpillTo makes the cache give what is worth keeping to a second level that holds so
// many blocks. It is called before the cache is used.
func (c *Cache) SpillTo(to *Spill, blocks int64) error {
	// Two bytes for each block of the second level: whoever was given up within as
	// many others as it holds is known again.
	per := max(blocks/int64(len(c.shards)), 1)
	mem, err := unix.Mmap(-1, 0, int(2*per)*len(c.shards), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("map the memory of %d blocks that were given up: %w", blocks, err)
	}
	to.seen = mem
	all := unsafe.Slice((*uint16)(unsafe.Pointer(unsafe.SliceData(mem))), per*int64(len(c.shards)))
	for i := range c.shards {
		s := &c.shards[i]
		s.spill = to
		s.seen, all = all[:per:per], all[per:]
	}
	return nil
}

// giveUp is told of a block that is about to lose its frame. It holds the shard's lock
// for the copy, as Get does.
func (s *shard) giveUp(i uint32, h uint64) {
	e := &s.entries[i]
	if s.spill == nil || !e.read {
		return
	}
	if !e.inMain {
		place := &s.seen[(h>>12&0xffffffff)*uint64(len(s.seen))>>32]
		tag := uint16(h) | 1
		if *place != tag {
			*place = tag
			return
		}
		*place = 0
	}
	s.spill.put(e.key, s.frame(i))
}
