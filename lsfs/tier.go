package lsfs

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
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
// What goes to capacity is written beside the log, in commits of their own that stand
// in no chain: they make a segment readable for the cleaner, nothing more. When they
// are durable, the moves are logged without their payload. So a capacity device sees
// large sequential writes, and the flush of one holds up no operation.
//
// All but the hints of readers belongs to the cleaner's goroutine.
type tiers struct {
	cold  coldHead
	ticks int

	demoted, promoted atomic.Int64 // bytes

	seen   [promoteSlots]atomic.Uint64 // blocks that were read from capacity once
	wanted chan BID                    // and those that were read again
	moves  []move
	buf    []byte
}

// coldHead is where the next commit beside the log goes.
type coldHead struct {
	segment    uint32 // NoSegment: none is open
	generation uint64
	offset     uint32
	age        uint64 // highest lastSeq of what was put there
	buf        []byte // aligned
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
	t.cold.segment = format.NoSegment
	t.wanted = make(chan BID, promoteQueue)
}

func (t *tiers) close() {
	device.FreeAligned(t.cold.buf)
	device.FreeAligned(t.buf)
	t.cold.buf, t.buf = nil, nil
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

// placeCold stores the blocks of moves on a capacity device and notes where. Without
// room there it does nothing, and they go into the log. from is the segment where
// they stood.
func (s *Store) placeCold(moves []move, from uint32) error {
	h := &s.tiers.cold
	records := format.ListFixed + len(moves)*format.MoveEntrySize
	off := format.CommitHeaderSize + records
	total := off
	for i := range moves {
		total += len(moves[i].data)
	}
	end := total
	if total = roundUp(total); !s.openCold(total) {
		return nil
	}
	if h.buf == nil {
		h.buf = device.AlignedBuffer(int(s.commitMax))
	}
	base := format.MakeAddr(h.segment, h.offset)
	rec := h.buf[format.CommitHeaderSize:]
	format.PutList(rec, format.RecordMove, len(moves))
	for i := range moves {
		m := &moves[i]
		m.at = base + format.Addr(off)
		format.PutMove(rec, i, &format.Move{BID: uint64(m.bid), Old: m.old, New: m.at, Sum: m.sum, Len: uint16(len(m.data)), Encoding: m.enc})
		off += copy(h.buf[off:], m.data)
	}
	clear(h.buf[end:total])
	header := format.Commit{
		Pool: s.id, Records: 1, Segment: h.segment, Next: format.NoSegment, Generation: h.generation, Offset: h.offset, Total: uint32(total),
		RecordBytes: uint32(records), PayloadOff: uint32(format.CommitHeaderSize + records), PayloadLen: uint32(end - format.CommitHeaderSize - records),
		RecordSum: format.Checksum(rec[:records]),
	}
	header.Put(h.buf)
	d, at := s.segs.locate(base)
	err := d.WriteAt(h.buf[:total], at)
	if err == nil {
		// DURABLE: a move is logged only when its block stands on stable storage.
		err = d.Flush()
	}
	if err != nil {
		s.poison(fmt.Errorf("move to capacity: %w", err))
		return s.failure()
	}
	h.offset += uint32(total)
	s.mu.RLock()
	h.age = max(h.age, s.segs.all[from].lastSeq)
	s.mu.RUnlock()
	s.tiers.demoted.Add(int64(header.PayloadLen))
	return nil
}

// openCold makes sure that there is an open segment on capacity with room for n bytes.
func (s *Store) openCold(n int) bool {
	h := &s.tiers.cold
	if h.segment != format.NoSegment && h.offset+uint32(n) <= s.segs.bytes {
		return true
	}
	s.closeCold()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.segs.freeOf[Capacity].Load() <= 1 || s.short() {
		return false
	}
	if h.segment = s.segs.takeOf(Capacity); h.segment == format.NoSegment {
		return false
	}
	s.segs.all[h.segment].state = segmentOpen
	var generation [8]byte
	_, _ = rand.Read(generation[:])
	h.generation, h.offset, h.age = binary.LittleEndian.Uint64(generation[:]), 0, 0
	return true
}

// closeCold seals the open segment on capacity.
func (s *Store) closeCold() {
	h := &s.tiers.cold
	if h.segment == format.NoSegment {
		return
	}
	s.mu.Lock()
	seg := &s.segs.all[h.segment]
	seg.state, seg.lastSeq = segmentSealed, h.age
	s.mu.Unlock()
	h.segment = format.NoSegment
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
		m = move{bid: bid, old: l.e.Addr, sum: l.e.Sum, enc: l.e.Encoding, data: buf[:copy(buf, stored)]}
		return nil
	})
	return m, err == nil
}
