package lsfs

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// What is written once and stays, as images and archives do, leaves no garbage, so the cleaner
// has no reason to come by. Where segments are not written for ColdAfter and hardly read, their blocks are
// packed while there is little else to do: the oldest first, a quarter of the time. While there is more to
// do, it is one segment now and then.

// ColdAfter is the default of Config.ColdAfter.
const ColdAfter = 24 * time.Hour

const (
	// coldSamples is how finely ColdAfter is measured.
	coldSamples = 8
	// coldReads is how many reads by the device in the last two samples or so make a segment
	// warm.
	coldReads = 128
	// coldOps is how many operations between two looks of the cleaner are little to do.
	coldOps = 20
	// coldQuiet and coldBusy are how often longer than a segment takes the next one waits.
	coldQuiet, coldBusy = 3, 25
	// coldChoice is how many segments one look at all of them chooses.
	coldChoice = 16
)

// coldness is what the cleaner knows of blocks that are left alone. It belongs to its goroutine.
type coldness struct {
	clocks  [coldSamples]uint64 // of the log, at the last samples, a ring
	samples int                 // that were taken
	sampled time.Time           // the last one
	ops     int64               // at the last look
	next    time.Time           // not before
	choice  []coldSegment       // the oldest last
	none    bool                // since the last sample there is nothing to do

	packed atomic.Int64 // segments
}

type coldSegment struct {
	segment uint32
	written uint64
}

// sample takes the clock of the log from time to time. A clock that was set forward counts for
// one sample.
func (s *Store) sample() {
	k := &s.cleaner.coldness
	now := s.cfg.Now()
	if since := now.Sub(k.sampled); 0 <= since && since < s.cfg.ColdAfter/coldSamples {
		return
	}
	k.sampled = now
	k.clocks[k.samples%coldSamples] = s.log.clock.Load()
	k.samples++
	k.none = false
	if !s.tiered() { // where heat is halved more often
		s.cool()
	}
}

// coldBefore is the clock of ColdAfter ago; not before the store is open that long.
func (k *coldness) coldBefore() (clock uint64, ok bool) {
	if k.samples <= coldSamples {
		return 0, false
	}
	return k.clocks[k.samples%coldSamples], true
}

// packCold packs cold blocks, a segment at least, if it is time to. The cleaner's goroutine calls it at each tick.
func (s *Store) packCold() {
	c := &s.cleaner
	k := &c.coldness
	if s.cfg.ColdAfter < 0 {
		return
	}
	s.sample()
	ops := s.stats.ops.Load()
	rest := time.Duration(coldQuiet)
	if ops-k.ops > coldOps {
		rest = coldBusy
	}
	k.ops = ops
	start := time.Now()
	if start.Before(k.next) || c.stopped() || s.failure() != nil {
		return
	}
	before, ok := k.coldBefore()
	_, done := s.ckpt.numbers()
	if !ok || k.none || s.low() || done < c.packing.from.Load() {
		return
	}
	for time.Since(start) < cleanTick/4 && !c.stopped() {
		n, ok := s.coldSegment(before, done)
		if !ok || !s.roomToClean(n) {
			break
		}
		s.emptySegment(n, true)
		k.packed.Add(1)
	}
	k.next = start.Add((1 + rest) * time.Since(start))
}

// coldSegment chooses the oldest segment that is cold and was not packed.
func (s *Store) coldSegment(before, done uint64) (uint32, bool) {
	k := &s.cleaner.coldness
	if len(k.choice) == 0 {
		s.lookForCold(before, done)
		k.none = len(k.choice) == 0
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for len(k.choice) > 0 {
		n := k.choice[len(k.choice)-1].segment
		k.choice = k.choice[:len(k.choice)-1]
		if s.cold(n, before, done) {
			return n, true
		}
	}
	return format.NoSegment, false
}

// cold says whether a segment is. The caller has Store.mu.
func (s *Store) cold(n uint32, before, done uint64) bool {
	seg := &s.segs.all[n]
	return s.cleanable(seg, done) && seg.live > 0 && seg.lastSeq < before && seg.heat.Load() < coldReads &&
		(seg.stream == streamLog || streamCold <= seg.stream && seg.stream < streamPacked)
}

// lookForCold looks at all segments.
func (s *Store) lookForCold(before, done uint64) {
	k := &s.cleaner.coldness
	for low := 0; low < int(s.segs.numbers.Load()); low += scanSlice {
		s.mu.RLock()
		for n := low; n < min(low+scanSlice, len(s.segs.all)); n++ {
			if written := s.segs.all[n].lastSeq; s.cold(uint32(n), before, done) && (len(k.choice) < coldChoice || written < k.choice[0].written) {
				x := coldSegment{uint32(n), written}
				at, _ := slices.BinarySearchFunc(k.choice, x, func(a, b coldSegment) int { return cmp.Compare(b.written, a.written) })
				k.choice = slices.Insert(k.choice, at, x)
				k.choice = k.choice[max(0, len(k.choice)-coldChoice):]
			}
		}
		s.mu.RUnlock()
	}
}

// worthPacking says whether an eighth of the segment that was read is blocks that could get shorter.
func (s *Store) worthPacking(n uint32) bool {
	bytes := 0
	count := func(at format.Addr, length uint16, enc dedup.Encoding) {
		if at.Segment() == n && (enc == dedup.S2 || enc == dedup.Zstd) {
			bytes += int(length)
		}
	}
	_ = s.victimRecords(n, func(_ uint32, _ format.Addr, r format.Record) error {
		switch r.Kind {
		case format.RecordWrite, format.RecordCopy:
			var e format.BlockEntry
			for i := range int(r.Op().Count) {
				if r.Block(i, &e); e.BID != 0 && !e.Ref {
					count(e.Addr, e.Len, e.Encoding)
				}
			}
		case format.RecordMove:
			var m format.Move
			for i := range r.Count() {
				r.Move(i, &m)
				count(m.New, m.Len, m.Encoding)
			}
		}
		return nil
	})
	return int(s.segs.bytes)/8 < bytes
}
