package lsfs

import (
	"math/bits"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// segmentState is where a segment is in its life:
//
//	free -> next -> open -> sealed -> quarantine -> free -> (gone)
//
// next is chosen when its predecessor is opened, and is named in each commit of
// it. A sealed segment without live bytes enters quarantine at the cut of a
// checkpoint and is free when the checkpoint after that one is durable and no
// reader is inside (LIVE). A segment whose device was removed is gone: its number
// is not used again.
type segmentState uint8

const (
	segmentFree segmentState = iota
	segmentNext
	segmentOpen
	segmentSealed
	segmentQuarantine
	segmentGone
	segmentStates = iota
)

// segment is one unit of allocation and cleaning. Guarded by Store.mu, except
// readers and heat.
type segment struct {
	state   segmentState
	bad     bool   // a commit in it does not parse: the cleaner leaves it alone
	live    uint32 // bytes of blocks that identities name; of groups their shares
	pages   uint32 // bytes of pages that the newest checkpoint names
	lastSeq uint64 // commit up to which its contents were written, on average: their age
	stream  uint8  // that wrote it, see stream.go
	cut     uint64 // number of the checkpoint at whose cut it entered quarantine
	leaves  uint64 // number of the checkpoint that carries its pages away, once cleaned
	readers atomic.Int32
	heat    atomic.Uint32 // reads by the device since it was last halved, see tiers
}

// segmentTable numbers the segments of all devices through. Removed devices leave
// holes. It grows with the committing role and Store.mu held; all but what is
// atomic is guarded by Store.mu.
type segmentTable struct {
	bytes  uint32 // size of a segment
	layout atomic.Pointer[layout]
	arena  []segment // room for numbers to come, of which all is the beginning: a segment never moves
	mem    []byte    // of the arena
	used   int       // bytes of mem that may be touched
	all    []segment
	free   []uint64 // bitmap of free ones on devices that are in use
	turn   [classes]int

	numbers atomic.Uint32         // len(all)
	present atomic.Int32          // segments of all devices that are there
	active  atomic.Int32          // of them, on devices in use
	nFree   atomic.Int32          // free ones on devices in use
	idle    atomic.Int32          // free ones on devices that are drained
	freeOf  [classes]atomic.Int32 // nFree by class
	countOf [classes]atomic.Int32 // active by class
	live    atomic.Int64          // sum of live and pages
	data    atomic.Int64          // sum of live
}

// segmentsSpare is how many segment numbers a store can give to devices that are
// added while it is open; beyond it must be opened anew. It costs address space only:
// 256 TiB in segments of 16 MiB.
const segmentsSpare = 16 << 20

func newSegmentTable(members []*member, numbers, bytes uint32) (*segmentTable, error) {
	t := &segmentTable{bytes: bytes}
	var err error
	t.mem, err = unix.Mmap(-1, 0, (int(numbers)+segmentsSpare)*int(unsafe.Sizeof(segment{})), unix.PROT_NONE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	t.arena = unsafe.Slice((*segment)(unsafe.Pointer(unsafe.SliceData(t.mem))), int(numbers)+segmentsSpare)
	if err := t.grow(numbers); err != nil {
		t.close()
		return nil, err
	}
	for i := range t.all {
		t.all[i].state = segmentGone
	}
	for _, m := range members {
		t.join(m)
		if m.state == format.MemberActive {
			m.open = true
		}
	}
	t.recount()
	return t, nil
}

func (t *segmentTable) close() {
	if t.mem != nil {
		_ = unix.Munmap(t.mem)
		t.mem, t.arena, t.all = nil, nil, nil
	}
}

// grow makes room for numbers below n. The new segments are gone.
func (t *segmentTable) grow(n uint32) error {
	if len(t.arena) < int(n) {
		return unix.ENOMEM
	}
	page := unix.Getpagesize()
	want := (int(n)*int(unsafe.Sizeof(segment{})) + page - 1) / page * page
	if t.used < want {
		if err := unix.Mprotect(t.mem[:min(want, len(t.mem))], unix.PROT_READ|unix.PROT_WRITE); err != nil {
			return err
		}
		t.used = want
	}
	for i := t.numbers.Load(); i < n; i++ {
		t.arena[i].state = segmentGone
	}
	t.all = t.arena[:n]
	for len(t.free) < int(n+63)/64 {
		t.free = append(t.free, 0)
	}
	t.numbers.Store(n)
	return nil
}

// reset puts all segments of devices that are there back to unknown, for another
// checkpoint to be loaded.
func (t *segmentTable) reset() {
	for i := range t.all {
		seg := &t.all[i]
		state := segmentSealed
		if seg.state == segmentGone {
			state = segmentGone
		}
		*seg = segment{state: state}
	}
	t.live.Store(0)
	t.data.Store(0)
	t.recount()
}

// join makes the segments of a device known. They are neither free nor used yet.
func (t *segmentTable) join(m *member) {
	old := t.layout.Load()
	l := &layout{}
	if old != nil {
		l.members = append(l.members, old.members...)
	}
	l.members = append(l.members, m)
	m.low = m.first
	for n := m.first; n < m.first+m.count; n++ {
		t.all[n].state = segmentSealed
	}
	t.layout.Store(l)
}

// part makes the segments of a device unknown: nothing stands there.
func (t *segmentTable) part(m *member) {
	l := &layout{}
	for _, x := range t.layout.Load().members {
		if x != m {
			l.members = append(l.members, x)
		}
	}
	for n := m.first; n < m.first+m.count; n++ {
		if s := &t.all[n]; s.state != segmentFree || s.live+s.pages != 0 || s.readers.Load() != 0 {
			invariant("LIVE", "segment %d in state %d leaves with its device", n, s.state)
		}
		t.all[n].state = segmentGone
	}
	t.layout.Store(l)
}

// recount brings the sums and the bitmap of free segments in line with the states
// of devices and segments.
func (t *segmentTable) recount() {
	var present, active, free, idle int32
	var freeOf, countOf [classes]int32
	clear(t.free)
	for _, m := range t.layout.Load().members {
		m.low = m.first
		if m.lost() {
			continue
		}
		present += int32(m.count)
		if m.open {
			active += int32(m.count)
			countOf[m.class] += int32(m.count)
		}
		for n := m.first; n < m.first+m.count; n++ {
			switch {
			case t.all[n].state != segmentFree:
			case m.open:
				t.free[n/64] |= 1 << (n % 64)
				free++
				freeOf[m.class]++
			default:
				idle++
			}
		}
	}
	t.present.Store(present)
	t.active.Store(active)
	t.nFree.Store(free)
	t.idle.Store(idle)
	for c := range classes {
		t.freeOf[c].Store(freeOf[c])
		t.countOf[c].Store(countOf[c])
	}
}

// count is the number of segment numbers given out, those of removed devices too.
func (t *segmentTable) count() uint32 { return t.numbers.Load() }

// size is the number of segments of the devices in use.
func (t *segmentTable) size() int64 { return int64(t.active.Load()) }

// exists says whether there is a device for a segment number.
func (t *segmentTable) exists(seg uint32) bool { return t.layout.Load().find(seg) != nil }

// locate finds the device and the byte offset of an address. The address must
// name a segment of the pool (valid).
func (t *segmentTable) locate(a format.Addr) (device.Device, int64) {
	m := t.layout.Load().find(a.Segment())
	if m == nil {
		invariant("LIVE", "no device has segment %d", a.Segment())
	}
	return m, m.offset(t.bytes, a)
}

// valid says whether n bytes at a lie inside one segment of the pool.
func (t *segmentTable) valid(a format.Addr, n uint32) bool {
	return a != 0 && uint64(a.Offset())+uint64(n) <= uint64(t.bytes) && t.exists(a.Segment())
}

// classOf is the class of the device that a segment of the pool stands on.
func (t *segmentTable) classOf(seg uint32) Class { return t.layout.Load().find(seg).class }

func (t *segmentTable) setFree(n uint32) {
	t.all[n].state, t.all[n].bad = segmentFree, false
	t.all[n].heat.Store(0)
	m := t.layout.Load().find(n)
	if !m.open {
		if !m.lost() {
			t.idle.Add(1)
		}
		return
	}
	t.free[n/64] |= 1 << (n % 64)
	t.nFree.Add(1)
	t.freeOf[m.class].Add(1)
	m.low = min(m.low, n)
}

func (t *segmentTable) unfree(n uint32) {
	m := t.layout.Load().find(n)
	if !m.open {
		t.idle.Add(-1)
		return
	}
	t.free[n/64] &^= 1 << (n % 64)
	t.nFree.Add(-1)
	t.freeOf[m.class].Add(-1)
}

// take picks the next free segment of a class, of another one when that has none:
// devices take turns, and on a device the lowest is taken, so that a sparse device
// file stays small. NoSegment if there is none.
func (t *segmentTable) take(class Class) uint32 {
	if n := t.takeOf(class); n != format.NoSegment {
		return n
	}
	for c := range classes {
		if n := t.takeOf(c); n != format.NoSegment {
			return n
		}
	}
	return format.NoSegment
}

// takeOf is take without another class.
func (t *segmentTable) takeOf(class Class) uint32 {
	if t.freeOf[class].Load() == 0 {
		return format.NoSegment
	}
	members := t.layout.Load().members
	for range members {
		m := members[t.turn[class]%len(members)]
		t.turn[class] = (t.turn[class] + 1) % len(members)
		if m.class != class || !m.open {
			continue
		}
		end := m.first + m.count
		for n := m.low; n < end; {
			if w := t.free[n/64] >> (n % 64); w != 0 {
				n += uint32(bits.TrailingZeros64(w))
				if end <= n {
					break
				}
				m.low = n + 1
				t.unfree(n)
				t.all[n].state = segmentNext
				return n
			}
			n = (n/64 + 1) * 64
		}
		m.low = end
	}
	return format.NoSegment
}

func (t *segmentTable) addLive(a format.Addr, n int32) {
	seg := &t.all[a.Segment()]
	if n < 0 && seg.live < uint32(-n) {
		invariant("LIVE", "segment %d has %d live bytes, %d go", a.Segment(), seg.live, -n)
	}
	seg.live += uint32(n)
	t.live.Add(int64(n))
	t.data.Add(int64(n))
}

func (t *segmentTable) addPages(seg uint32, n int32) {
	s := &t.all[seg]
	if n < 0 && s.pages < uint32(-n) {
		invariant("LIVE", "segment %d has %d page bytes, %d go", seg, s.pages, -n)
	}
	s.pages += uint32(n)
	t.live.Add(int64(n))
}

// addRoot accounts a part of a root, which is rounded up to whole pages.
func (t *segmentTable) addRoot(x format.Extent, sign int32) {
	t.addPages(x.Addr.Segment(), sign*int32(roundUp(x.Len)))
}

func roundUp[T uint32 | int | int64](n T) T {
	return (n + format.PageSize - 1) &^ (format.PageSize - 1)
}

func (s *Store) devicePath(seg uint32) string {
	if s.segs == nil || !s.segs.exists(seg) {
		return "?"
	}
	d, _ := s.segs.locate(format.MakeAddr(seg, 0))
	return d.Path()
}
