package lsfs

import (
	"sync/atomic"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// holed is a device that may have no place of its own yet for a range: a sparse
// or preallocated file.
type holed interface {
	Holes(off, n int64) bool
}

// prefill writes zeros once over the segment that the log opens next, when it
// has holes. A flush that has to record a new extent of a file takes half as long
// again as one of data alone (measured on ext4: 245 against 161 us at 8 KiB, 379
// against 238 at 64 KiB), and this moves that work out of the commits' way. Whether
// it succeeds changes nothing but time.
type prefill struct {
	stop atomic.Bool
	done chan struct{} // nil when none runs
}

// fillBelow is the mean size of the last segment's commits, in bytes, under which
// filling pays: longer ones spend their time on the transfer, which filling doubles.
const fillBelow = 128 << 10

// fillPart is written at a time, so that stopping takes no longer than one of them.
const fillPart = 1 << 20

// startPrefill begins to fill a segment that is free and reserved for the log.
// The caller has the log's turn.
func (s *Store) startPrefill(segment uint32) {
	d, off := s.segs.locate(format.MakeAddr(segment, 0))
	h, ok := d.(holed)
	if !ok || !h.Holes(off, int64(s.segs.bytes)) {
		return
	}
	f := &s.log.fill
	f.stop.Store(false)
	f.done = make(chan struct{})
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		defer close(f.done)
		zeros := device.AlignedBuffer(fillPart)
		defer device.FreeAligned(zeros)
		for end := off + int64(s.segs.bytes); off < end && !f.stop.Load(); off += fillPart {
			if d.WriteAt(zeros[:min(fillPart, end-off)], off) != nil {
				return // the commit that comes here will meet the error and report it
			}
		}
	}()
}

// endPrefill waits until nothing writes to the next segment any more.
func (s *Store) endPrefill() {
	f := &s.log.fill
	if f.done == nil {
		return
	}
	f.stop.Store(true)
	<-f.done
	f.done = nil
}
