package lsfs

import (
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// cleaner gives space back: it moves the live blocks out of a segment, makes the
// live pages dirty, so that the next checkpoint moves them, and lets checkpoints
// carry the segment through quarantine.
//
// It works ahead of need: at full speed when so few segments are free that operations
// are slowed down (pace.go), at half speed from twice that on, and at the pace of
// the clock when nobody waits for the store or garbage is above its bound.
type cleaner struct {
	mu    sync.Mutex
	wake  chan struct{}
	halt  chan struct{}
	ended bool
	stuck atomic.Bool // many steps gave nothing back while space is short
	fails int
	best  int64 // unused bytes, without those for pages that are dirty, at the last step that gave something back
	seen  int64 // operations then

	// turn is held while a victim is chosen, and while it is cleaned, I/O included: one
	// segment at a time. What follows belongs to its holder.
	turn   ioLock
	buf    []byte                  // the victim's content
	out    [coldStreams + 1]outlet // the last one is on capacity
	cold   bool                    // what is moved goes there
	to     *outlet                 // of the victim's blocks
	stage  []byte                  // aligned staging of to's next write
	moves  []move                  // staged, with addresses relative to the write
	filled int                     // bytes of payload staged
	placed []move                  // written, not logged yet

	squeeze  bool // the victim's blocks are recompressed
	grouping bool // into groups
	eager    bool // all that moves is cold, and groups need not win anything; of tests
	packing  recompressor
	coldness coldness

	choice  []victim // best first
	choices time.Time

	// Of the cleaner's goroutine.
	ops     int64 // operations at the last tick
	ahead   time.Time
	coming  int32 // what levels found last
	counted time.Time
	took    time.Duration // a look at all segments
}

// victim is a segment that is worth cleaning.
type victim struct {
	segment uint32
	score   float64
}

func (c *cleaner) init() {
	c.wake = make(chan struct{}, 1)
	c.halt = make(chan struct{})
	for i := range c.out {
		c.out[i].init(min(streamCold+uint8(i), streamCapacity))
	}
}

func (c *cleaner) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *cleaner) stopNow() {
	c.mu.Lock()
	if !c.ended {
		close(c.halt)
	}
	c.ended = true
	c.mu.Unlock()
	c.kick()
}

func (c *cleaner) stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// cleanTick is how often the cleaner looks by itself.
const cleanTick = 200 * time.Millisecond

func (s *Store) cleanLoop() {
	c := &s.cleaner
	tick := time.NewTicker(cleanTick)
	defer tick.Stop()
	defer func() {
		device.FreeAligned(c.buf)
		device.FreeAligned(c.stage)
	}()
	for {
		ticked := false
		select {
		case <-c.wake:
		case <-tick.C:
			ticked = true
		}
		for s.failure() == nil && !c.stopped() && s.cleanStep() {
		}
		if s.failure() == nil && !c.stopped() && (s.drainStep() || s.tierStep()) {
			c.kick()
		}
		if c.stopped() {
			return
		}
		if ticked && s.failure() == nil {
			s.salvageStep()
			s.cleanAhead()
			s.packCold()
		}
	}
}

// cleanStep does what is most urgent for free space: it cleans the best victim, or has a
// checkpoint taken that frees what was cleaned. It says whether to go on.
func (s *Store) cleanStep() bool {
	c := &s.cleaner
	l := s.levels()
	if ops := s.stats.ops.Load(); !s.short() || ops != c.seen {
		// While operations get through, what a checkpoint frees may be gone before this looks.
		c.seen, c.best, c.fails = ops, s.unused()-s.unwritten(), 0
	}
	if !s.short() {
		c.setStuck(s, false)
	}
	if l.free >= l.goal() {
		return false
	}
	if l.coming >= max(l.span/2, 1) {
		s.askCheckpoint() // and clean on while it is written
	}
	if l.free+l.coming < l.goal() {
		if n, ok := s.victim(l.free < l.reserve+l.span/4); ok && s.roomToClean(n) {
			start := time.Now()
			s.cleanSegment(n)
			c.coming++ // or half of one: levels will look again
			if l.free > l.reserve+l.span {
				c.rest(time.Since(start))
			}
			return true
		}
	}
	if l.coming == 0 && !s.short() {
		return false
	}
	// Nothing to clean, or no room to: only checkpoints give space back now.
	if s.checkpoint() != nil {
		return false
	}
	c.counted = time.Time{}
	s.wake()
	if left := s.unused() - s.unwritten(); left > c.best || !s.short() {
		c.fails = 0
		c.setStuck(s, false)
		c.best = left
	} else {
		if c.fails++; !s.reclaimable() {
			c.fails += roundsPatient - 1
		}
		if c.fails >= roundsMax*roundsPatient {
			c.setStuck(s, true)
			return false
		}
	}
	return true
}

// rest gives the devices and processors to operations for as long as the work took.
func (c *cleaner) rest(worked time.Duration) {
	t := time.NewTimer(min(worked, cleanTick))
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.halt:
	}
}

// cleanAhead runs on the clock: for half of the time where garbage is above its bound,
// nearly all of it where it is half as much again, and for a quarter when no operation came
// since the last time.
func (s *Store) cleanAhead() {
	c := &s.cleaner
	ops := s.stats.ops.Load()
	idle := ops == c.ops
	c.ops = ops
	// Where there are millions of segments a look at all takes a while.
	if time.Since(c.ahead) < 20*c.took {
		return
	}
	c.ahead = time.Now()
	r := s.Room()
	bound := r.Size / 100 * int64(s.cfg.GarbageMax)
	over := bound < r.Garbage
	if !over && !idle {
		return
	}
	l := s.levels()
	if !over && l.free+l.coming >= l.goal()+2*l.span || over && r.Garbage-int64(l.coming)*int64(s.segs.bytes) < bound {
		return // enough of it is on its way
	}
	part := cleanTick / 4
	switch {
	case bound+bound/2 < r.Garbage:
		part = cleanTick * 7 / 8
	case over:
		part = cleanTick / 2
	}
	for start := time.Now(); time.Since(start) < part; {
		n, ok := s.victim(false)
		if !ok || c.stopped() || s.failure() != nil || !s.roomToClean(n) {
			return
		}
		s.cleanSegment(n)
		c.coming++
		if over && s.Room().Garbage < bound-bound/16 {
			break
		}
	}
	if over && c.coming >= max(l.span/4, 1) {
		s.askCheckpoint() // what is clean is garbage until two of them are through
	}
}

func (c *cleaner) setStuck(s *Store, v bool) {
	if c.stuck.Swap(v) != v {
		if v {
			s.logger.Warn("pool is full: the cleaner finds nothing to give back")
			s.cfg.Event(Event{Code: "no-space", Text: "the pool is full: writes of new data fail"})
		}
		s.wake()
	}
}

// roundsMax is how many checkpoints without gain mean that there is nothing to gain.
// A few may lose: the pages that moved blocks made dirty are written. As long as segments are on
// their way to be free it takes roundsPatient times as many.
const roundsMax, roundsPatient = 8, 8

// roomToClean says whether the live bytes of a segment find room, and the pages that change with
// them. What is left of groups may take more than its shares, but with all else that
// lives there not much more than the segment, which is one of the three.
func (s *Store) roomToClean(n uint32) bool {
	s.mu.RLock()
	live, pages := int64(s.segs.all[n].live), int64(s.segs.all[n].pages)
	s.mu.RUnlock()
	return live+s.pieceBytes(live)+pageBytes(pages/format.PageSize)+s.unwritten()+cleanSegments*int64(s.segs.bytes) <= s.unused()
}

// freeBytes is what can be appended before the last free segment is full.
func (s *Store) freeBytes() int64 {
	return int64(s.segs.nFree.Load())*int64(s.segs.bytes) + s.log.left.Load()
}

const (
	// victimsMax is how many victims one look at all segments chooses.
	victimsMax = 16
	// victimsLast is how long a choice is good for: meanwhile segments lose more.
	victimsLast = time.Second
	// scanSlice is how many segments are looked at under one hold of the lock.
	scanSlice = 8192
	// usedMax and usedNeed are the parts of a segment that may be live for cleaning to
	// pay, and when space is short.
	usedMax, usedNeed = 0.9, 0.98
)

// victim chooses a segment. In need it is the one that takes the fewest bytes to clean; else the
// one where the space gained, weighed with its age, pays best for the bytes moved: what
// is old stays as it is, so its space is worth more. The age counts by its fourth root. With
// its full weight (as log-structured file systems have it, with one stream) uniform overwriting
// at 90 % moves twice the bytes, and skewed overwriting no fewer: the streams
// keep old and young apart already.
func (s *Store) victim(need bool) (uint32, bool) {
	c := &s.cleaner
	c.turn.Lock()
	defer c.turn.Unlock()
	_, done := s.ckpt.numbers()
	if now := time.Now(); len(c.choice) == 0 || need || victimsLast < now.Sub(c.choices) {
		c.choose(s, need, done)
		c.choices = now
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for len(c.choice) > 0 {
		n := c.choice[0].segment
		c.choice = c.choice[1:]
		if s.cleanable(&s.segs.all[n], done) {
			return n, true
		}
	}
	return format.NoSegment, false
}

// cleanable says whether cleaning can get something out of a segment. The caller has Store.mu.
func (s *Store) cleanable(seg *segment, done uint64) bool {
	return seg.state == segmentSealed && !seg.bad && seg.live+seg.pages != 0 && seg.leaves <= done
}

// choose lists the best victims.
func (c *cleaner) choose(s *Store, need bool, done uint64) {
	if cap(c.choice) != victimsMax {
		c.choice = make([]victim, 0, victimsMax)
	}
	c.choice = c.choice[:0]
	size, clock := float64(s.segs.bytes), float64(s.log.clock.Load())
	for low := 0; low < int(s.segs.numbers.Load()); low += scanSlice {
		s.mu.RLock()
		for i := low; i < min(low+scanSlice, len(s.segs.all)); i++ {
			seg := &s.segs.all[i]
			if !s.cleanable(seg, done) {
				continue
			}
			used := float64(seg.live+seg.pages) / size
			score := 1 - used - float64(pageBytes(s.movedPages(int64(seg.live))))/size
			if need && used > usedNeed || !need && used > usedMax {
				continue
			}
			if !need {
				age := max(clock-float64(seg.lastSeq), 0) + 1
				score = (1 - used) / (1 + used) * math.Sqrt(math.Sqrt(age))
			}
			c.offer(victim{uint32(i), score})
		}
		s.mu.RUnlock()
	}
}

// offer keeps the best victims, best first.
func (c *cleaner) offer(v victim) {
	at := len(c.choice)
	for at > 0 && c.choice[at-1].score < v.score {
		at--
	}
	if at == victimsMax {
		return
	}
	if len(c.choice) < victimsMax {
		c.choice = append(c.choice, victim{})
	}
	copy(c.choice[at+1:], c.choice[at:])
	c.choice[at] = v
}

// cleanSegment moves what is live out of a sealed segment. A block that is
// damaged stays where it is and is reported: it is never stored again as good.
func (s *Store) cleanSegment(n uint32) { s.emptySegment(n, false) }

// emptySegment is cleanSegment. To pack a segment is to compress its blocks anew, whatever
// stream they come from; one that holds little that could get shorter stays as it is.
func (s *Store) emptySegment(n uint32, pack bool) {
	c := &s.cleaner
	c.turn.Lock()
	defer c.turn.Unlock()
	if c.buf == nil {
		c.buf = device.AlignedBuffer(int(s.segs.bytes))
		c.stage = device.AlignedBuffer(int(min(cleanStage, s.commitMax)))
	}
	s.mu.RLock()
	seg := &s.segs.all[n]
	if seg.state != segmentSealed {
		s.mu.RUnlock()
		return
	}
	seg.readers.Add(1)
	if c.to = &c.out[s.coldStream(n)]; pack && !s.toCapacity(n) {
		c.to = &c.out[streamPacked-streamCold]
	}
	c.squeeze = c.eager || !s.low() && (pack || seg.stream >= streamCold || s.toCapacity(n))
	s.mu.RUnlock()
	_, done := s.ckpt.numbers()
	c.grouping = c.eager || c.packing.from.Load() <= done
	err := s.readVictim(n)
	if err == nil && pack && !s.worthPacking(n) {
		s.mu.Lock()
		seg.stream = streamPacked
		s.mu.Unlock()
		seg.readers.Add(-1)
		return
	}
	if err == nil {
		err = s.cleanContents(n)
	}
	clear(c.moves)
	clear(c.placed)
	c.moves, c.placed, c.filled = c.moves[:0], c.placed[:0], 0
	c.packing.buf = c.packing.buf[:0]
	c.packing.group.reset()
	seg.readers.Add(-1)
	s.stats.cleaned.Add(1)
	cuts, _ := s.ckpt.numbers()
	s.mu.Lock()
	seg.leaves = cuts + 1
	if err == nil && seg.live != 0 && s.failure() == nil || err != nil && !errors.Is(err, errNoRoom) {
		seg.bad = true
	}
	s.mu.Unlock()
	if err != nil && !errors.Is(err, errNoRoom) && s.failure() == nil {
		s.logger.Warn("segment cannot be cleaned", "segment", n, "err", err)
	}
}

// coldStream is the stream for what survived in a segment. A small pool has no segments to
// spare and one stream for all.
func (s *Store) coldStream(n uint32) int {
	from := s.segs.all[n].stream
	switch {
	case s.toCapacity(n):
		return coldStreams
	case from < streamCold || from == streamCapacity || s.segs.count() < smallPool:
		return 0
	}
	return min(int(from)-streamCold+1, coldStreams-1)
}

// smallPool is the number of segments below which moved blocks are not kept apart by
// how often they were moved.
const smallPool = 128

// readVictim reads a segment, in parts, so that reads of clients get in between.
func (s *Store) readVictim(n uint32) error {
	c := &s.cleaner
	for at := uint32(0); at < s.segs.bytes; at += fillPart {
		end := min(at+fillPart, s.segs.bytes)
		d, off := s.segs.locate(format.MakeAddr(n, at))
		if err := d.ReadAt(c.buf[at:end], off); err != nil {
			return s.report(s.corrupt("commit", format.MakeAddr(n, at), 0, 0, err))
		}
	}
	return nil
}

func (s *Store) cleanContents(n uint32) error {
	if err := s.victimRecords(n, s.cleanRecord); err != nil {
		return err
	}
	if err := s.stageAlone(); err != nil { // too few for a group
		return err
	}
	return s.flushMoves()
}

// victimRecords calls f for all records of the segment that was read, with the address of their payload.
func (s *Store) victimRecords(n uint32, f func(n uint32, payload format.Addr, r format.Record) error) error {
	c := &s.cleaner
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
			if err := f(n, format.MakeAddr(n, at+h.PayloadOff), r); err != nil {
				return err
			}
		}
	}
	return nil
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
		for i := 0; i < r.Count(); {
			r.Move(i, &m)
			at, first := m.New, i
			if i++; m.Encoding != dedup.ZstdGroup {
				if err := s.cleanBlock(n, BID(m.BID), at); err != nil {
					return err
				}
				continue
			}
			// The members of a group follow each other.
			for ; i < r.Count() && i < first+dedup.PackedBlocks; i++ {
				if r.Move(i, &m); m.New != at {
					break
				}
			}
			if err := s.cleanGroup(n, r, first, i); err != nil {
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

// cleanBlock stages a block to be moved if its identity still stands there. A record of
// the log may name a block in another segment, which is not this victim's.
func (s *Store) cleanBlock(n uint32, bid BID, at format.Addr) error {
	c := &s.cleaner
	if at.Segment() != n {
		return nil
	}
	var e format.Entry
	if ok, err := s.standing(bid, at, &e); !ok || err != nil {
		return err
	}
	data := c.buf[at.Offset() : at.Offset()+uint32(e.Len)]
	sum := dedup.Sum(data)
	var damage error
	if e.Encoding == dedup.ZstdGroup {
		damage = format.ErrInvalid // its record would say so
	} else if c.squeeze && sum == e.Sum && (e.Encoding == dedup.S2 || e.Encoding == dedup.Zstd) {
		// What is stored whole stays so: its volume may want that.
		err := s.gather(bid, &e, data)
		if ce := (*dedup.CorruptError)(nil); !errors.As(err, &ce) {
			return err
		}
		damage = err
	}
	if sum != e.Sum || damage != nil {
		ce := s.corrupt("block", at, e.Sum, sum, damage)
		ce.BID, ce.Fingerprint = bid, e.Fingerprint
		_ = s.report(ce)
		return nil
	}
	return s.stageMoves([]move{{bid: bid, old: at, sum: e.Sum, enc: e.Encoding}}, data, false)
}

// standing finds the entry of an identity, if it still stands at an address.
func (s *Store) standing(bid BID, at format.Addr, e *format.Entry) (bool, error) {
	for {
		s.mu.RLock()
		entry, _, missing := s.entryOf(bid)
		if entry != nil {
			format.ParseEntry(entry, e)
		}
		s.mu.RUnlock()
		if missing == 0 {
			return entry != nil && e.Addr == at, nil
		}
		if err := s.fault(missing, false); err != nil {
			return false, err
		}
	}
}

// fits says whether n bytes more for so many blocks go into the write that is staged: it is as long as the
// staging buffer, and a segment's last one takes what is left of the segment.
func (c *cleaner) fits(s *Store, blocks, n int) bool {
	room := len(c.stage)
	if left := s.roomIn(c.to); left > len(c.stage)/minTail {
		room = min(room, left)
	}
	return len(c.moves) == 0 || roundUp(movesAt(len(c.moves)+blocks))+c.filled+n <= room
}

// movesAt is the size of the header and record of a write of n moved blocks.
func movesAt(n int) int { return format.CommitHeaderSize + format.ListFixed + n*format.MoveEntrySize }

// writeMoves writes the staged blocks to their stream. A segment of a stream is sealed
// only when all that was written to it is logged, for until then it has no live bytes.
func (s *Store) writeMoves() error {
	c := &s.cleaner
	if len(c.moves) == 0 {
		return nil
	}
	payload := roundUp(movesAt(len(c.moves)))
	if s.roomIn(c.to) < roundUp(payload+c.filled) {
		if err := s.logMoves(); err != nil {
			return err
		}
		err := s.openStream(c.to)
		if err != nil && c.to.kind == streamCapacity {
			// No room there: it stays on flash.
			if c.to = &c.out[0]; s.roomIn(c.to) < roundUp(payload+c.filled) {
				err = s.openStream(c.to)
			} else {
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
	base := format.MakeAddr(c.to.segment, c.to.offset)
	rec := c.stage[format.CommitHeaderSize:]
	format.PutList(rec, format.RecordMove, len(c.moves))
	clear(c.stage[movesAt(len(c.moves)):payload])
	off := payload
	age := s.ageOf(c.moves[0].old)
	for i := range c.moves {
		m := &c.moves[i]
		m.len = uint16(len(m.data))
		if m.joins {
			m.at = c.moves[i-1].at
		} else {
			m.at = base + format.Addr(off)
			off += copy(c.stage[off:], m.data)
		}
		format.PutMove(rec, i, m.stored())
		m.data = nil
	}
	if _, err := s.appendStream(c.to, c.stage, movesAt(len(c.moves))-format.CommitHeaderSize, payload, off-payload); err != nil {
		return err
	}
	c.to.ages += age * float64(c.filled)
	c.to.bytes += float64(c.filled)
	s.stats.cleanedBytes.Add(int64(c.filled))
	if c.to.kind == streamCapacity {
		s.tiers.demoted.Add(int64(c.filled))
	}
	c.placed = append(c.placed, c.moves...)
	c.moves, c.filled = c.moves[:0], 0
	c.packing.buf = c.packing.buf[:0]
	return nil
}

// ageOf is the age of a segment's contents, as a commit's number.
func (s *Store) ageOf(a format.Addr) float64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return float64(s.segs.all[a.Segment()].lastSeq)
}

// movesPerTask bounds the moves that are logged and applied in one go, which operations wait for.
const movesPerTask = 512

// logMoves makes moves that were written durable and has them logged.
func (s *Store) logMoves() error {
	c := &s.cleaner
	if len(c.placed) == 0 {
		return nil
	}
	// DURABLE: the bytes come before the record that names them.
	if err := s.flushStream(c.to); err != nil {
		return err
	}
	for at := 0; at < len(c.placed); at += movesPerTask {
		if err := s.post(&task{kind: taskMove, moves: c.placed[at:min(at+movesPerTask, len(c.placed))]}); err != nil {
			return err
		}
	}
	c.placed = c.placed[:0]
	return nil
}

// errNoRoom ends the cleaning of a segment, or other moves: what is left stays there for another time.
var errNoRoom = errors.New("no room for the pages that change with the moves")

// flushMoves moves what is staged.
func (s *Store) flushMoves() error {
	if err := s.writeMoves(); err != nil {
		return err
	}
	return s.logMoves()
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
