package cache

import (
	"sync"
	"unsafe"
)

const (
	bucketsPerFrame = 1
	ghostsPerFrame  = 1

	// none is no frame.
	none = ^uint32(0)
	// usesMax bounds the uses that an entry remembers, and so the rounds that it
	// stays in the main queue without a further one.
	usesMax = 3
	// keepUses is how often a block must be read in the small queue to be kept. One
	// is what a block that was read ahead, or written and read back, gets anyway.
	keepUses = 2
	// ghostWays is how many ghosts share a place: the oldest gives way.
	ghostWays = 4
)

// entry is the bookkeeping of one frame. It is free, in the small queue, or in
// the main queue:
//
//	free -> small -> main -> free
//	          |                ^
//	          +----------------+   not read while it was in the small queue
//
// with a short cut from free to main for keys with a ghost.
type entry struct {
	key    uint64
	chain  uint32 // next entry in the bucket, or in the free list
	older  uint32 // neighbours in its queue
	newer  uint32
	uses   uint8
	inMain bool
	read   bool // somebody wanted it; else it was read ahead or written
}

// queue is a first in, first out list through the entries.
type queue struct {
	newest uint32
	oldest uint32
	len    uint32
}

// ghost remembers a key that left the small queue: 32 bits of its mixed form,
// and when, in evictions from that queue. A wrong match costs one unearned stay.
type ghost struct {
	tag  uint32
	when uint32
}

// shard is an independent cache of a part of the keys. Everything is under mu.
type shard struct {
	mu        sync.Mutex
	entries   []entry
	buckets   []uint32 // heads of chains
	ghosts    []ghost
	frames    []byte
	free      uint32 // head of a list through chain
	small     queue
	main      queue
	smallMax  uint32
	ghostTime uint32

	hits, firstHits, misses, evictions, passed uint64

	spill *Spill   // nil: there is no second level
	seen  []uint16 // tags of keys that were read and left the small queue, by hash

	_ [64]byte // neighbours' locks on other cache lines
}

// init lays a shard of n frames into zeroed memory: its blocks, and n times the
// bookkeeping of a frame.
func (s *shard) init(n int, frames, meta []byte) {
	s.frames = frames
	p := unsafe.Pointer(unsafe.SliceData(meta))
	s.entries = unsafe.Slice((*entry)(p), n)
	p = unsafe.Add(p, n*int(unsafe.Sizeof(entry{})))
	s.ghosts = unsafe.Slice((*ghost)(p), n*ghostsPerFrame)
	p = unsafe.Add(p, n*ghostsPerFrame*8)
	s.buckets = unsafe.Slice((*uint32)(p), n*bucketsPerFrame)
	for i := range s.buckets {
		s.buckets[i] = none
	}
	for i := range s.entries {
		s.entries[i].chain = uint32(i) + 1
	}
	s.entries[n-1].chain = none
	s.small = queue{newest: none, oldest: none}
	s.main = queue{newest: none, oldest: none}
	s.smallMax = max(1, uint32(n)/10)
	// Time starts beyond the life of the zero ghosts.
	s.ghostTime = uint32(n) + 1
}

func (s *shard) frame(i uint32) []byte {
	at := int(i) * BlockSize
	return s.frames[at : at+BlockSize : at+BlockSize]
}

// bucket uses other bits of the mixed key than the choice of the shard (the top
// ones) and the ghosts (the low half).
func (s *shard) bucket(h uint64) *uint32 {
	return &s.buckets[(h>>16&0xffffffff)*uint64(len(s.buckets))>>32]
}

func (s *shard) find(key, h uint64) uint32 {
	i := *s.bucket(h)
	for i != none && s.entries[i].key != key {
		i = s.entries[i].chain
	}
	return i
}

// insert gives a frame to a key that has none; the caller fills it.
func (s *shard) insert(key, h uint64) uint32 {
	known := s.takeGhost(h)
	if s.free == none {
		s.evict()
	}
	i := s.free
	e := &s.entries[i]
	s.free = e.chain
	b := s.bucket(h)
	*e = entry{key: key, chain: *b, inMain: known}
	*b = i
	s.push(s.queueOf(e), i)
	return i
}

// drop frees an entry, wherever it is.
func (s *shard) drop(i uint32, h uint64) {
	e := &s.entries[i]
	s.unlink(s.queueOf(e), i)
	link := s.bucket(h)
	for *link != i {
		link = &s.entries[*link].chain
	}
	*link = e.chain
	e.chain = s.free
	s.free = i
}

// evict frees one frame. It ends: each round either frees one, moves an entry out
// of the small queue, or takes one of at most usesMax uses from an entry of main.
func (s *shard) evict() {
	for {
		if s.small.len > s.smallMax || s.main.len == 0 {
			i := s.small.oldest
			e := &s.entries[i]
			if e.uses >= keepUses {
				s.unlink(&s.small, i)
				// Uses beyond those that were asked for stay. Clearing them loses the
				// difference when a new cache is full for the first time and most of
				// what it holds moves at once.
				e.uses -= keepUses
				e.inMain = true
				s.push(&s.main, i)
				continue
			}
			h := mix(e.key)
			s.addGhost(h)
			s.giveUp(i, h)
			s.drop(i, h)
			s.evictions++
			return
		}
		i := s.main.oldest
		e := &s.entries[i]
		if e.uses > 0 {
			e.uses--
			s.unlink(&s.main, i)
			s.push(&s.main, i)
			continue
		}
		h := mix(e.key)
		s.giveUp(i, h)
		s.drop(i, h)
		s.evictions++
		return
	}
}

func (s *shard) queueOf(e *entry) *queue {
	if e.inMain {
		return &s.main
	}
	return &s.small
}

func (s *shard) push(q *queue, i uint32) {
	e := &s.entries[i]
	e.older, e.newer = q.newest, none
	if q.newest != none {
		s.entries[q.newest].newer = i
	} else {
		q.oldest = i
	}
	q.newest = i
	q.len++
}

func (s *shard) unlink(q *queue, i uint32) {
	e := &s.entries[i]
	if e.older != none {
		s.entries[e.older].newer = e.newer
	} else {
		q.oldest = e.newer
	}
	if e.newer != none {
		s.entries[e.newer].older = e.older
	} else {
		q.newest = e.older
	}
	q.len--
}

// ghostSet gives the places of a key's ghost: ghostWays of them, or all in a
// smaller shard.
func (s *shard) ghostSet(h uint64) ([]ghost, uint32) {
	sets := uint64(max(1, len(s.ghosts)/ghostWays))
	at := int(h>>24&0xffffffff*sets>>32) * ghostWays
	return s.ghosts[at:min(at+ghostWays, len(s.ghosts))], uint32(h)
}

// alive: ghosts are remembered for as many evictions as the main queue is long.
func (s *shard) alive(g *ghost) bool {
	return s.ghostTime-g.when <= uint32(len(s.ghosts))
}

func (s *shard) addGhost(h uint64) {
	set, tag := s.ghostSet(h)
	s.ghostTime++
	old := &set[0]
	for i := range set {
		if s.ghostTime-set[i].when > s.ghostTime-old.when {
			old = &set[i]
		}
	}
	*old = ghost{tag: tag, when: s.ghostTime}
}

// ghost finds the ghost of a key, if it is remembered.
func (s *shard) ghost(h uint64) *ghost {
	set, tag := s.ghostSet(h)
	for i := range set {
		if g := &set[i]; g.tag == tag && s.alive(g) {
			return g
		}
	}
	return nil
}

// takeGhost says whether the key has a ghost, and lays it to rest.
func (s *shard) takeGhost(h uint64) bool {
	g := s.ghost(h)
	if g == nil {
		return false
	}
	g.when = s.ghostTime - uint32(len(s.ghosts)) - 1
	return true
}
