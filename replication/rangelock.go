package replication

import (
	"sync/atomic"

	"github.com/twinsan/twinsan/lsfs"
)

// hold is one range of blocks that an operation has locked or waits for: every
// sequenced write holds its blocks exclusively until it is committed (W1), slow
// reads and resync hold theirs shared.
//
// A clone inside one volume has a second range, its source, which is held shared.
// Both are granted at the same moment: taken one after the other, two clones, or a
// clone and whoever waits for both ranges, could wait for each other for ever.
type hold struct {
	start, end lsfs.BlockNo // half open
	from, to   lsfs.BlockNo // half open, shared; empty but for clones
	exclusive  bool
	granted    bool
	work       *work         // sequenced when granted, or
	ready      chan struct{} // closed when granted
	term       uint64        // Volume.term when it was asked for
	prev, next *hold
}

// conflicts says whether the two cannot be granted together.
func (h *hold) conflicts(o *hold) bool {
	return (h.exclusive || o.exclusive) && h.start < o.end && o.start < h.end ||
		o.exclusive && h.from < o.end && o.start < h.to ||
		h.exclusive && o.from < h.end && h.start < o.to
}

type holdList struct{ head, tail *hold }

func (l *holdList) push(h *hold) {
	h.prev, h.next = l.tail, nil
	if l.tail != nil {
		l.tail.next = h
	} else {
		l.head = h
	}
	l.tail = h
}

func (l *holdList) remove(h *hold) {
	if h.prev != nil {
		h.prev.next = h.next
	} else {
		l.head = h.next
	}
	if h.next != nil {
		h.next.prev = h.prev
	} else {
		l.tail = h.prev
	}
	h.prev, h.next = nil, nil
}

// The filter counts exclusive holders by hash of 64 KiB granule, so that the
// usual case (nobody near) is decided by one load without walking a list and,
// for cached reads, without the mutex.
const (
	granuleBlocks = 16
	filterSize    = 4096 // power of two
	wideGranules  = 256  // longer holds count in wide instead
)

// rangeLock is the lock table of one volume. The volume's mutex guards all but the filter.
// Waiters are served first come, first served among those that overlap.
type rangeLock struct {
	filter  [filterSize]atomic.Int32
	wide    atomic.Int32
	holders holdList
	waiters holdList
	shared  int // holders with a range that is not exclusive
	alone   int // exclusive holders
}

func slot(granule uint64) uint64 { return (granule * 0x9e3779b97f4a7c15) >> 52 }

func granules(start, end lsfs.BlockNo) (first, last uint64) {
	return uint64(start) / granuleBlocks, (uint64(end) + granuleBlocks - 1) / granuleBlocks
}

// clear says that no exclusive holder overlaps [start, end): false may be a false alarm.
// It needs no lock.
func (l *rangeLock) clear(start, end lsfs.BlockNo) bool {
	if l.wide.Load() != 0 {
		return false
	}
	first, last := granules(start, end)
	if last-first > wideGranules {
		return false
	}
	for ; first < last; first++ {
		if l.filter[slot(first)].Load() != 0 {
			return false
		}
	}
	return true
}

func (l *rangeLock) count(h *hold, d int32) {
	if !h.exclusive || h.from < h.to {
		l.shared += int(d)
	}
	if !h.exclusive {
		return
	}
	l.alone += int(d)
	first, last := granules(h.start, h.end)
	if last-first > wideGranules {
		l.wide.Add(d)
		return
	}
	for ; first < last; first++ {
		l.filter[slot(first)].Add(d)
	}
}

func (l *rangeLock) free(h *hold, waiters *hold) bool {
	if l.shared > 0 && h.exclusive || !l.clear(h.start, h.end) || h.from < h.to && !l.clear(h.from, h.to) {
		for o := l.holders.head; o != nil; o = o.next {
			if o.conflicts(h) {
				return false
			}
		}
	}
	for o := l.waiters.head; o != nil && o != waiters; o = o.next {
		if o.conflicts(h) {
			return false
		}
	}
	return true
}

// idle says that no operation that writes holds a range or waits to be sequenced.
func (l *rangeLock) idle() bool {
	if l.alone > 0 {
		return false
	}
	for h := l.waiters.head; h != nil; h = h.next {
		if h.work != nil {
			return false
		}
	}
	return true
}

// acquire grants h now and says true, or queues it: then granting closes
// h.ready or hands h.work to the caller of release.
func (l *rangeLock) acquire(h *hold) bool {
	if l.free(h, nil) {
		l.grant(h)
		return true
	}
	h.granted = false
	l.waiters.push(h)
	return false
}

func (l *rangeLock) grant(h *hold) {
	h.granted = true
	l.count(h, 1)
	l.holders.push(h)
}

// release gives up h, granted or waiting, and calls next for the work of every
// waiter that is granted by that.
func (l *rangeLock) release(h *hold, next func(*work)) {
	if !h.granted {
		l.waiters.remove(h)
	} else {
		l.holders.remove(h)
		l.count(h, -1)
		h.granted = false
	}
	l.rescan(next)
}

// rescan grants what can be granted, in order.
func (l *rangeLock) rescan(next func(*work)) {
	for w := l.waiters.head; w != nil; {
		following := w.next
		if l.free(w, w) {
			l.waiters.remove(w)
			l.grant(w)
			if w.work != nil {
				next(w.work)
			} else {
				close(w.ready)
			}
		}
		w = following
	}
}
