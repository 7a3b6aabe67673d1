package lsfs

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// reserveSegments are kept for the cleaner and checkpoints on top of what the
// dirty pages of the moment need: the open segment, its successor, the cleaner's
// output and the small parts of a checkpoint.
const reserveSegments = 8

// cleaner gives space back: it moves the live blocks out of a segment, makes the
// live pages dirty, so that the next checkpoint moves them, and lets checkpoints
// carry the segment through quarantine.
//
// It works when few segments are free, then as fast as it can, and otherwise
// slowly while garbage is above its bound.
type cleaner struct {
	mu    sync.Mutex
	wake  chan struct{}
	ended bool
	stuck atomic.Bool // the last round gave nothing back while space is short
	buf   []byte
	moves []move
	fails int
	cold  bool // what is moved goes to capacity
}

func (c *cleaner) init() { c.wake = make(chan struct{}, 1) }

func (c *cleaner) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *cleaner) stopNow() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.kick()
}

func (c *cleaner) stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// reserve is the number of segments that operations leave alone: twice what the
// pages that are dirty now need, because while they are written others become dirty.
func (s *Store) reserve() int32 {
	pages := s.pg.nDirty.Load() + s.ckpt.pending.Load()
	return int32(reserveSegments + 2*((pages+pages/64)*format.PageSize/int64(s.segs.bytes)))
}

// short says whether operations must wait for the cleaner.
func (s *Store) short() bool { return s.segs.nFree.Load() <= s.reserve() }

// low says whether the cleaner should run at full speed.
func (s *Store) low() bool {
	return s.segs.nFree.Load() <= s.reserve()+max(2, int32(s.segs.size()/32))
}

func (s *Store) cleanLoop() {
	defer s.running.Done()
	c := &s.cleaner
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	defer func() { device.FreeAligned(c.buf) }()
	for {
		select {
		case <-c.wake:
		case <-tick.C:
		}
		for {
			if c.stopped() {
				return
			}
			if s.failure() != nil || !s.low() {
				c.setStuck(s, false)
				break
			}
			s.cleanRound()
		}
		if s.drainStep() || s.tierStep() {
			c.kick()
		}
		if r := s.Room(); s.failure() == nil && r.Size/100*int64(s.cfg.GarbageMax) < r.Garbage {
			// In the background: one segment per tick, where it is worth it.
			if n, ok := s.victim(false); ok {
				s.cleanSegment(n)
			}
		}
	}
}

func (c *cleaner) setStuck(s *Store, v bool) {
	if !v {
		c.fails = 0
	}
	if c.stuck.Swap(v) != v {
		if v {
			s.logger.Warn("pool is full: the cleaner finds nothing to give back")
			s.cfg.Event(Event{Code: "no-space", Text: "the pool is full: writes of new data fail"})
		}
		s.wake()
	}
}

// roundsMax is how many rounds without gain mean that there is nothing to gain.
// A single one may lose: the pages that moved blocks made dirty are written.
const roundsMax = 8

// cleanRound empties a few segments and sees them through quarantine.
func (s *Store) cleanRound() {
	c := &s.cleaner
	before := s.freeBytes()
	// What is dead already comes first: it costs nothing but checkpoints.
	if s.pending() == 0 {
		// A round costs its checkpoints, so it empties as many as there is room for.
		for range 64 {
			n, ok := s.victim(true)
			if !ok {
				break
			}
			s.mu.RLock()
			need := int64(s.segs.all[n].live + s.segs.all[n].pages)
			s.mu.RUnlock()
			need += (s.pg.nDirty.Load()+s.ckpt.pending.Load())*format.PageSize*9/8 + 4*int64(s.segs.bytes)
			if s.freeBytes() < need {
				break
			}
			s.cleanSegment(n)
			if c.stopped() || s.failure() != nil {
				return
			}
		}
	}
	// Pages leave with the first checkpoint, the segment is dead at the cut of the
	// second and free when the third is durable; blocks alone take one less.
	for range 3 {
		if s.checkpoint() != nil || c.stopped() {
			return
		}
		s.wake()
		if s.pending() == 0 {
			break
		}
	}
	if s.freeBytes() > before {
		c.setStuck(s, false)
	} else if c.fails++; c.fails >= roundsMax {
		c.setStuck(s, true)
	}
}

// freeBytes is what can be appended before the last free segment is full.
func (s *Store) freeBytes() int64 {
	return int64(s.segs.nFree.Load())*int64(s.segs.bytes) + s.log.left.Load()
}

// pending counts the segments that checkpoints alone will free.
func (s *Store) pending() (n int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := range s.segs.all {
		seg := &s.segs.all[i]
		if seg.state == segmentQuarantine || seg.state == segmentSealed && seg.live+seg.pages == 0 {
			n++
		}
	}
	return n
}

// victim chooses a segment. In need it is the one with the fewest live bytes;
// else the one where the space gained, weighed with its age, pays best for the
// bytes moved: what is old stays as it is, so its space is worth more.
func (s *Store) victim(need bool) (uint32, bool) {
	_, done := s.ckpt.numbers()
	s.mu.RLock()
	defer s.mu.RUnlock()
	best, bestScore := format.NoSegment, 0.0
	size := float64(s.segs.bytes)
	for i := range s.segs.all {
		seg := &s.segs.all[i]
		if seg.state != segmentSealed || seg.bad || seg.live+seg.pages == 0 || done < seg.leaves {
			continue
		}
		used := float64(seg.live+seg.pages) / size
		score := 1 - used
		if !need {
			if used > 0.9 {
				continue
			}
			age := float64(s.nextBID) - float64(min(seg.lastSeq, uint64(s.nextBID))) + 1
			score = (1 - used) * age / (1 + used)
		} else if used > 0.98 {
			continue
		}
		if best == format.NoSegment || score > bestScore {
			best, bestScore = uint32(i), score
		}
	}
	return best, best != format.NoSegment
}

// cleanSegment moves what is live out of a sealed segment. A block that is
// damaged stays where it is and is reported: it is never stored again as good.
func (s *Store) cleanSegment(n uint32) {
	c := &s.cleaner
	if c.buf == nil {
		c.buf = device.AlignedBuffer(int(s.segs.bytes))
	}
	s.mu.RLock()
	seg := &s.segs.all[n]
	if seg.state != segmentSealed {
		s.mu.RUnlock()
		return
	}
	seg.readers.Add(1)
	s.mu.RUnlock()
	err := s.cleanContents(n)
	seg.readers.Add(-1)
	s.stats.cleaned.Add(1)
	cuts, _ := s.ckpt.numbers()
	s.mu.Lock()
	seg.leaves = cuts + 1
	if err != nil || seg.live != 0 && s.failure() == nil {
		seg.bad = true
	}
	s.mu.Unlock()
	if err != nil && s.failure() == nil {
		s.logger.Warn("segment cannot be cleaned", "segment", n, "err", err)
	}
}

func (s *Store) cleanContents(n uint32) error {
	c := &s.cleaner
	d, off := s.segs.locate(format.MakeAddr(n, 0))
	if err := d.ReadAt(c.buf, off); err != nil {
		return s.report(s.corrupt("commit", format.MakeAddr(n, 0), 0, 0, err))
	}
	var h format.Commit
	var generation uint64
	for at := uint32(0); s.segs.bytes-at >= format.PageSize; at += h.Total {
		if format.ParseCommit(c.buf[at:], &h, s.id, n, at, s.segs.bytes) != nil ||
			at > 0 && h.Generation != generation {
			break // the end of what was written, or damage: then something live stays
		}
		generation = h.Generation
		rest := c.buf[at+format.CommitHeaderSize:][:h.RecordBytes]
		if sum := format.Checksum(rest); sum != h.RecordSum {
			_ = s.report(s.corrupt("commit", format.MakeAddr(n, at), h.RecordSum, sum, nil))
			continue
		}
		for len(rest) > 0 {
			r, more, err := format.NextRecord(rest)
			if err != nil {
				return err
			}
			rest = more
			if err := s.cleanRecord(n, format.MakeAddr(n, at+h.PayloadOff), r); err != nil {
				return err
			}
		}
	}
	return s.flushMoves(n)
}

func (s *Store) cleanRecord(n uint32, payload format.Addr, r format.Record) error {
	switch r.Kind {
	case format.RecordWrite, format.RecordCopy:
		var e format.BlockEntry
		for i := range int(r.Op().Count) {
			if r.Block(i, &e); e.BID == 0 || e.Ref {
				continue
			}
			if err := s.cleanBlock(n, BID(e.BID), e.Addr); err != nil {
				return err
			}
		}
	case format.RecordMove:
		var m format.Move
		for i := range r.Count() {
			r.Move(i, &m)
			if err := s.cleanBlock(n, BID(m.BID), m.New); err != nil {
				return err
			}
		}
	case format.RecordPages:
		for i := range r.Count() {
			id, _ := r.PageEntry(i)
			if err := s.cleanPage(id, payload+format.Addr(i*format.PageSize)); err != nil {
				return err
			}
		}
	case format.RecordDirs:
		s.mu.Lock()
		for i := range r.Count() {
			j, _ := r.PageEntry(i)
			if ck := &s.ckpt; int(j) < len(ck.dirAt) && ck.dirAt[j].Addr == payload+format.Addr(i*format.PageSize) {
				ck.dirDirty[j] = true
			}
		}
		s.mu.Unlock()
	}
	return nil
}

// cleanBlock adds a block to the moves if its identity still stands there. A record of
// the log may name a block in another segment, which is not this victim's.
func (s *Store) cleanBlock(n uint32, bid BID, at format.Addr) error {
	c := &s.cleaner
	if at.Segment() != n {
		return nil
	}
	var e format.Entry
	for {
		s.mu.RLock()
		entry, _, missing := s.entryOf(bid)
		if entry != nil {
			format.ParseEntry(entry, &e)
		}
		s.mu.RUnlock()
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return err
			}
			continue
		}
		if entry == nil || e.Addr != at {
			return nil
		}
		break
	}
	data := c.buf[at.Offset() : at.Offset()+uint32(e.Len)]
	if sum := dedup.Sum(data); sum != e.Sum {
		ce := s.corrupt("block", at, e.Sum, sum, nil)
		ce.BID, ce.Fingerprint = bid, e.Fingerprint
		_ = s.report(ce)
		return nil
	}
	c.moves = append(c.moves, move{bid: bid, old: at, sum: e.Sum, enc: e.Encoding, data: data})
	// Moves of one commit: as many as fit whatever their sizes.
	if (len(c.moves)+1)*(dedup.BlockSize+format.MoveEntrySize)+2*format.PageSize > min(commitTarget, int(s.commitMax)) {
		return s.flushMoves(at.Segment())
	}
	return nil
}

// flushMoves stores the collected blocks of a segment at their new places.
func (s *Store) flushMoves(from uint32) error {
	c := &s.cleaner
	if len(c.moves) == 0 {
		return nil
	}
	if s.toCapacity(from) {
		if err := s.placeCold(c.moves, from); err != nil {
			return err
		}
	}
	err := s.post(&task{kind: taskMove, moves: c.moves})
	clear(c.moves)
	c.moves = c.moves[:0]
	return err
}

// cleanPage makes a page dirty if the directory still names that place.
func (s *Store) cleanPage(id uint32, at format.Addr) error {
	for {
		s.mu.Lock()
		if s.pg.n <= id || s.pg.page(id).flags&pageAlive == 0 || s.pg.entry(id).Addr != at {
			s.mu.Unlock()
			return nil
		}
		if s.pg.page(id).frame != 0 {
			s.pg.touch(id)
			s.mu.Unlock()
			s.stats.cleanedPages.Add(1)
			return nil
		}
		s.mu.Unlock()
		if err := s.fault(id, false); err != nil {
			return err
		}
	}
}
