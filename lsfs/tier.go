package lsfs

import (
	"context"
	"math/bits"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// tiers moves blocks between the classes of devices, where a pool has both. It is
// cleaning with another output: the log is on flash, and when flash has little free
// room left, the segments that were neither written nor read for longest are emptied
// to capacity; a block that is read from there again and again is stored anew in the
// log, on flash.
//
// What goes to capacity is a stream of its own (stream.go), so a capacity device sees
// large sequential writes, and the flush of one holds up no operation.
//
// All but the hints of readers belongs to the cleaner's goroutine.
type tiers struct {
	ticks int

	demoted, promoted atomic.Int64 // bytes

	seen   [promoteSlots]atomic.Uint64 // blocks that were read from capacity once
	wanted chan BID                    // and those that were read again
	moves  []move
	buf    []byte
}

const (
	// flashFree is the part of the flash that is kept free for the log, in percent:
	// what a burst of writes can take while demotion goes on.
	flashFree = 20
	// flashEasy is down to where promotion may take part of it; demotion follows.
	flashEasy = flashFree / 2
	// promoteSlots is how many blocks read from capacity are remembered.
	promoteSlots = 1 << 12
	// promoteQueue bounds the blocks that wait for their promotion; further ones are
	// forgotten, and come back when they are read again.
	promoteQueue = 1 << 10
	// promoteBatch is how many are moved in one step: a commit.
	promoteBatch = 240
	// coolTicks is after how many looks of the cleaner the heat of segments is halved.
	coolTicks = 300
)

func (t *tiers) init() {
	t.wanted = make(chan BID, promoteQueue)
}

func (t *tiers) close() {
	device.FreeAligned(t.buf)
	t.buf = nil
}

// tiered says whether the pool has devices of both classes in use.
func (s *Store) tiered() bool {
	return s.segs.countOf[Flash].Load() > 0 && s.segs.countOf[Capacity].Load() > 0
}

// heatUp notes that a block is read from its device. It costs readers next to nothing.
func (s *Store) heatUp(seg *segment, at format.Addr, bid BID) {
	seg.heat.Add(1)
	if !s.tiered() || s.segs.classOf(at.Segment()) != Capacity {
		return
	}
	t := &s.tiers
	slot := &t.seen[uint64(bid)*0x9e3779b97f4a7c15>>(64-12)]
	if slot.Swap(uint64(bid)) == uint64(bid) {
		select {
		case t.wanted <- bid:
		default:
		}
	}
}

// tierStep does the next piece of work between the classes. It says whether there is
// more to do at once.
func (s *Store) tierStep() bool {
	if !s.tiered() || s.failure() != nil {
		return false
	}
	t := &s.tiers
	all := int(s.segs.countOf[Flash].Load())
	free := int(s.segs.freeOf[Flash].Load())
	if t.ticks++; t.ticks%coolTicks == 0 {
		s.cool()
	}
	if all*flashEasy/100 < free && len(t.wanted) > 0 {
		return s.promote()
	}
	if all*flashFree/100 <= free {
		return false
	}
	victim, waiting := s.coldest()
	switch {
	case free <= all*flashEasy/100 && waiting > 0:
		// Emptied ones are free only after checkpoints.
		return s.checkpoint() == nil
	case all*flashFree/100 <= free+waiting || victim == format.NoSegment || s.segs.freeOf[Capacity].Load() <= 2:
		return false
	}
	s.demote(victim)
	return true
}

// demote empties a segment of a flash device to capacity.
func (s *Store) demote(n uint32) {
	s.cleaner.cold = true
	s.cleanSegment(n)
	s.cleaner.cold = false
}

// coldest is the sealed segment on flash whose blocks were read least, and of those
// the oldest; or before that one that holds little but pages, which stay on flash.
// waiting counts the segments that checkpoints alone will free.
func (s *Store) coldest() (victim uint32, waiting int) {
	_, done := s.ckpt.numbers()
	victim = format.NoSegment
	var least, oldest uint64
	fewest := s.segs.bytes / 4
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, m := range s.segs.layout.Load().members {
		if m.class != Flash || !m.open {
			continue
		}
		for n := m.first; n < m.first+m.count; n++ {
			seg := &s.segs.all[n]
			switch {
			case seg.state == segmentQuarantine, seg.state == segmentSealed && (seg.live+seg.pages == 0 || done < seg.leaves):
				waiting++
				continue
			case seg.state != segmentSealed || seg.bad || fewest < s.segs.bytes/4 && fewest <= seg.live+seg.pages:
				continue
			case seg.live+seg.pages < fewest:
				victim, fewest = n, seg.live+seg.pages
				continue
			case seg.live == 0:
				continue // pages, as they should be
			}
			heat := uint64(bits.Len32(seg.heat.Load()))
			if victim == format.NoSegment || heat < least || heat == least && seg.lastSeq < oldest {
				victim, least, oldest = n, heat, seg.lastSeq
			}
		}
	}
	return victim, waiting
}

// cool halves the heat of all segments, so that what was read long ago counts less.
func (s *Store) cool() {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := range s.segs.all {
		if h := &s.segs.all[i].heat; h.Load() > 0 {
			h.Store(h.Load() / 2)
		}
	}
}

// toCapacity says whether what is moved out of a segment goes to capacity: when it is
// demoted, and when it stands there already.
func (s *Store) toCapacity(n uint32) bool {
	return s.cleaner.cold || s.segs.countOf[Flash].Load() > 0 && s.segs.classOf(n) == Capacity
}

// promote stores blocks that are read often from capacity anew in the log.
func (s *Store) promote() bool {
	t := &s.tiers
	if t.buf == nil {
		t.buf = device.AlignedBuffer(promoteBatch * dedup.BlockSize)
	}
	rc, err := s.lease(context.Background())
	if err != nil {
		return false
	}
	defer s.giveBack(rc)
	t.moves = t.moves[:0]
	for len(t.moves) < promoteBatch && len(t.wanted) > 0 {
		if m, ok := s.readMove(rc, <-t.wanted, t.buf[len(t.moves)*dedup.BlockSize:][:dedup.BlockSize]); ok {
			t.moves = append(t.moves, m)
			t.promoted.Add(int64(len(m.data)))
		}
	}
	if len(t.moves) == 0 {
		return false
	}
	return s.post(&task{kind: taskMove, moves: t.moves}) == nil
}

// readMove reads a block that stands on capacity into buf.
func (s *Store) readMove(rc *readContext, bid BID, buf []byte) (m move, ok bool) {
	rc.blocks = rc.blocks[:0]
	for {
		s.mu.RLock()
		at, _, missing := s.entryOf(bid)
		if at != nil {
			var e format.Entry
			format.ParseEntry(at, &e)
			if s.segs.valid(e.Addr, uint32(e.Len)) && s.segs.classOf(e.Addr.Segment()) == Capacity {
				rc.blocks = append(rc.blocks, located{bid: bid, e: e})
				s.segs.all[e.Addr.Segment()].readers.Add(1)
			}
		}
		s.mu.RUnlock()
		if missing == 0 {
			break
		}
		if s.fault(missing, false) != nil {
			return m, false
		}
	}
	if len(rc.blocks) == 0 {
		return m, false
	}
	err := s.fetchAll(rc, nil, 0, func(l *located, stored []byte) error {
		if l.e.Encoding != dedup.ZstdGroup {
			m = move{bid: bid, old: l.e.Addr, sum: l.e.Sum, enc: l.e.Encoding, data: buf[:copy(buf, stored)]}
			return nil
		}
		b, err := rc.portable(l, stored, buf) // the group stays for the others
		m = move{bid: bid, old: l.e.Addr, sum: b.Sum, enc: b.Encoding, data: b.Data}
		return err
	})
	return m, err == nil
}
