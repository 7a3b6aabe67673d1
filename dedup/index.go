package dedup

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ways is the number of places that one fingerprint may stand in, and so the
// most candidates that a lookup can give.
const Ways = 12

const (
	setBytes   = 128
	refBits    = 48
	indexLocks = 1024 // power of two; at 64 bytes each, 64 KiB
)

// set is one associative set of the index:
//
//	 0  marks    1 bit per slot: found by a lookup since the hand last passed
//	 4  hand     next slot that an insert into a full set looks at
//	 8  tags     12 x 4 bytes of the fingerprint, 0 is an empty slot
//	56  low      12 x 4 bytes, references, bits 0..31
//	104 high     12 x 2 bytes, references, bits 32..47
//
// The first cache line holds everything that a miss has to look at; the second
// is touched by hits and inserts only. Two buckets of 6 in a line each, with an
// overflow from one to the other, hold as much and touch two lines per miss.
// The table lives in memory only: this is no disk format.
type set struct {
	marks uint32
	hand  uint32
	tags  [Ways]uint32
	low   [Ways]uint32
	high  [Ways]uint16
}

// A set must be two cache lines exactly.
var _ [setBytes]byte = [unsafe.Sizeof(set{})]byte{}

type indexLock struct {
	sync.Mutex
	entries   int64  // in the sets of this lock
	forgotten uint64 // entries overwritten by another fingerprint
	_         [64 - 24]byte
}

// Index remembers, for fingerprints of stored blocks, a reference (a block
// identity) of up to 48 bits. It is a table of fixed size outside the Go heap,
// 10.7 bytes a slot. It holds 32 bits of each fingerprint, so that an answer is a
// candidate that the caller verifies, and it forgets: an insert into a full set
// replaces an entry, one that no lookup has found lately if there is one. Filled
// to four fifths it has forgotten 4 % of what came.
// Forgetting costs savings, never data. All methods but Close are safe for
// concurrent use.
type Index struct {
	mem   []byte
	sets  []set
	locks []indexLock // BOUNDED: lock i guards the sets whose number is i modulo indexLocks
}

// NewIndex makes an index of at most the given bytes (at least one set, 128
// bytes) and brings its memory in, so that no later operation pays for a page fault.
func NewIndex(bytes int64) (*Index, error) {
	n := bytes / setBytes
	if n < 1 || n > 1<<40 {
		return nil, fmt.Errorf("fingerprint index of %d bytes: must be 128 bytes to 128 TiB", bytes)
	}
	mem, err := unix.Mmap(-1, 0, int(n*setBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes for the fingerprint index: %w", n*setBytes, err)
	}
	// Huge pages first, then the faults: MAP_POPULATE would fault small pages in.
	// Both are optimisations that an old kernel may refuse.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	if unix.Madvise(mem, unix.MADV_POPULATE_WRITE) != nil {
		for i := 0; i < len(mem); i += 4096 {
			mem[i] = 0
		}
	}
	return &Index{
		mem:   mem,
		sets:  unsafe.Slice((*set)(unsafe.Pointer(unsafe.SliceData(mem))), n),
		locks: make([]indexLock, min(indexLocks, n)),
	}, nil
}

// locate gives the set and the tag of a fingerprint, from different bits of it.
// The fingerprint is a keyed hash: its bits are uniform and nobody can aim at a set.
func (x *Index) locate(fp *Fingerprint) (*set, *indexLock, uint32) {
	n, _ := bits.Mul64(binary.LittleEndian.Uint64(fp[:8]), uint64(len(x.sets)))
	tag := binary.LittleEndian.Uint32(fp[8:12])
	if tag == 0 {
		tag = 1
	}
	return &x.sets[n], &x.locks[n%uint64(len(x.locks))], tag
}

func (s *set) ref(i int) uint64 { return uint64(s.low[i]) | uint64(s.high[i])<<32 }

func (s *set) put(i int, tag uint32, ref uint64) {
	s.tags[i] = tag
	s.low[i] = uint32(ref)
	s.high[i] = uint16(ref >> 32)
	s.marks &^= 1 << i
}

// Candidates fills dst with the references that may be of a block with this
// fingerprint and returns their number, almost always 0 or 1. The caller verifies
// each by its full fingerprint. It marks what it finds as in use.
func (x *Index) Candidates(fp *Fingerprint, dst *[Ways]uint64) int {
	s, l, tag := x.locate(fp)
	n := 0
	l.Lock()
	for i := range s.tags {
		if s.tags[i] == tag {
			dst[n] = s.ref(i)
			n++
			s.marks |= 1 << i
		}
	}
	l.Unlock()
	return n
}

// Lookup returns the first candidate that verify accepts. verify is called
// without any lock held. Where the closure would escape to the heap, use Candidates.
func (x *Index) Lookup(fp *Fingerprint, verify func(ref uint64) bool) (uint64, bool) {
	var refs [Ways]uint64
	for _, ref := range refs[:x.Candidates(fp, &refs)] {
		if verify(ref) {
			return ref, true
		}
	}
	return 0, false
}

// Insert remembers ref for fp. An entry with the same 32 bits is taken for the
// same block and replaced. A reference of more than 48 bits is not remembered.
func (x *Index) Insert(fp *Fingerprint, ref uint64) {
	if ref>>refBits != 0 {
		return
	}
	s, l, tag := x.locate(fp)
	l.Lock()
	defer l.Unlock()
	free := -1
	for i := range s.tags {
		switch s.tags[i] {
		case tag:
			s.put(i, tag, ref)
			return
		case 0:
			if free < 0 {
				free = i
			}
		}
	}
	if free < 0 {
		// The hand takes the mark off what was found since it last came by, and stops
		// at the first slot without one: after one round at the latest.
		free = int(s.hand) % Ways
		for s.marks&(1<<free) != 0 {
			s.marks &^= 1 << free
			free = (free + 1) % Ways
		}
		s.hand = uint32(free+1) % Ways
		l.entries--
		l.forgotten++
	}
	s.put(free, tag, ref)
	l.entries++
}

// Remove forgets fp if it still names ref. The store calls it before the block
// identity is freed.
func (x *Index) Remove(fp *Fingerprint, ref uint64) {
	s, l, tag := x.locate(fp)
	l.Lock()
	defer l.Unlock()
	for i := range s.tags {
		if s.tags[i] == tag && s.ref(i) == ref {
			s.put(i, 0, 0)
			l.entries--
			return
		}
	}
}

// IndexStats is what an index holds and has lost.
type IndexStats struct {
	Entries   int64  // remembered now
	Slots     int64  // room
	Forgotten uint64 // entries that gave way to another since the start
	Bytes     int64  // memory of the table
}

// Stats counts. It takes every lock in turn: for metrics, not for the data path.
func (x *Index) Stats() IndexStats {
	st := IndexStats{Slots: int64(len(x.sets)) * Ways, Bytes: int64(len(x.mem))}
	for i := range x.locks {
		l := &x.locks[i]
		l.Lock()
		st.Entries += l.entries
		st.Forgotten += l.forgotten
		l.Unlock()
	}
	return st
}

// Len is the number of entries remembered. It costs as much as Stats.
func (x *Index) Len() int { return int(x.Stats().Entries) }

// Close gives the memory back. No other call may be running or follow.
func (x *Index) Close() error {
	mem := x.mem
	if mem == nil {
		return nil
	}
	x.mem, x.sets = nil, nil
	return unix.Munmap(mem)
}
