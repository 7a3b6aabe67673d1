package lsfs

import (
	"math/bits"
	"sync/atomic"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// segmentState is where a segment is in its life:
//
//	free -> next -> open -> sealed -> quarantine -> free
//
// next is chosen when its predecessor is opened, and is named in each commit of
// it. A sealed segment without live bytes enters quarantine at the cut of a
// checkpoint and is free when the checkpoint after that one is durable and no
// reader is inside (LIVE).
type segmentState uint8

const (
	segmentFree segmentState = iota
	segmentNext
	segmentOpen
	segmentSealed
	segmentQuarantine
)

// segment is one unit of allocation and cleaning. Guarded by Store.mu, except readers.
type segment struct {
	state   segmentState
	bad     bool   // a commit in it does not parse: the cleaner leaves it alone
	live    uint32 // bytes of blocks that identities name
	pages   uint32 // bytes of pages that the newest checkpoint names
	lastSeq uint64 // of the last commit, when sealed: the age of what is inside
	cut     uint64 // number of the checkpoint at whose cut it entered quarantine
	leaves  uint64 // number of the checkpoint that carries its pages away, once cleaned
	readers atomic.Int32
}

// segmentTable numbers the segments of all devices through.
type segmentTable struct {
	bytes   uint32 // size of a segment
	devices []device.Device
	base    []uint32 // first segment of each device, and the total at the end
	all     []segment
	free    []uint64 // bitmap of free ones
	low     []uint32 // per device: no free segment below this one
	turn    int      // device to take the next segment from
	nFree   atomic.Int32
	live    atomic.Int64 // sum of live and pages
	data    atomic.Int64 // sum of live
}

func newSegmentTable(devices []device.Device, counts []uint32, bytes uint32) *segmentTable {
	t := &segmentTable{bytes: bytes, devices: devices}
	var n uint32
	for _, c := range counts {
		t.base = append(t.base, n)
		t.low = append(t.low, n)
		n += c
	}
	t.base = append(t.base, n)
	t.all = make([]segment, n)
	t.free = make([]uint64, (n+63)/64)
	return t
}

func (t *segmentTable) count() uint32 { return uint32(len(t.all)) }

// locate finds the device and the byte offset of an address. The address must
// name a segment of the pool (valid).
func (t *segmentTable) locate(a format.Addr) (device.Device, int64) {
	seg := a.Segment()
	d := 0
	for t.base[d+1] <= seg {
		d++
	}
	return t.devices[d], format.SuperblockArea + int64(seg-t.base[d])*int64(t.bytes) + int64(a.Offset())
}

// valid says whether n bytes at a lie inside one segment of the pool.
func (t *segmentTable) valid(a format.Addr, n uint32) bool {
	return a != 0 && a.Segment() < t.count() && uint64(a.Offset())+uint64(n) <= uint64(t.bytes)
}

func (t *segmentTable) setFree(n uint32) {
	seg := &t.all[n]
	seg.state = segmentFree
	t.free[n/64] |= 1 << (n % 64)
	t.nFree.Add(1)
	d := 0
	for t.base[d+1] <= n {
		d++
	}
	t.low[d] = min(t.low[d], n)
}

func (t *segmentTable) unfree(n uint32) {
	t.free[n/64] &^= 1 << (n % 64)
	t.nFree.Add(-1)
}

// take picks the next free segment: devices take turns, and on a device the
// lowest is taken, so that a sparse device file stays small. NoSegment if there is none.
func (t *segmentTable) take() uint32 {
	for range t.devices {
		d := t.turn
		t.turn = (t.turn + 1) % len(t.devices)
		for n := t.low[d]; n < t.base[d+1]; {
			if w := t.free[n/64] >> (n % 64); w != 0 {
				n += uint32(bits.TrailingZeros64(w))
				if t.base[d+1] <= n {
					break
				}
				t.low[d] = n + 1
				t.unfree(n)
				t.all[n].state = segmentNext
				return n
			}
			n = (n/64 + 1) * 64
		}
		t.low[d] = t.base[d+1]
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
	if s.segs == nil || s.segs.count() <= seg {
		return "?"
	}
	d, _ := s.segs.locate(format.MakeAddr(seg, 0))
	return d.Path()
}
