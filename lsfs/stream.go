package lsfs

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

// What is written is kept apart by how long it is going to live, so that segments die
// as a whole instead of by halves:
//
//	log     operations with their new blocks, in the order of the log
//	pages   metadata that checkpoints write: nearly all of it is replaced by the next few
//	cold    blocks that the cleaner moved, by how often they were moved: what survived
//	        once goes with its like
//
// Only the log is a chain that replay follows. The other streams have segments of
// their own, filled with writes that look like commits, so that the cleaner finds in a
// segment what it holds, whichever stream wrote it. Nothing in them counts until something
// else names it: a root names pages, a move record in the log names moved blocks. Before
// either is written the stream is flushed (DURABLE).
const (
	streamLog   = 0
	streamPages = 1
	streamCold  = 2 // moved once; the last one takes all that was moved more often
	coldStreams = 3
	// streamPacked, the last one, takes what was packed because it was not written for long, too.
	streamPacked = streamCold + coldStreams - 1
	// streamCapacity is what was moved to devices of class capacity.
	streamCapacity = streamCold + coldStreams
)

// outlet is the open segment of a stream beside the log. It belongs to one goroutine: the
// checkpoint's (pages) or the cleaner's (cold ones).
type outlet struct {
	kind       uint8
	segment    uint32 // NoSegment: none is open
	generation uint64
	offset     uint32
	ages       float64 // sum of the ages of the bytes written, for the mean
	bytes      float64
	unflushed  []uint32 // segments written to since the last flush
}

func (st *outlet) init(kind uint8) { st.kind, st.segment = kind, format.NoSegment }

// roomIn is what fits the stream's open segment, in bytes, headers included.
func (s *Store) roomIn(st *outlet) int {
	if st.segment == format.NoSegment {
		return 0
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if m := s.segs.layout.Load().find(st.segment); m == nil || !m.open {
		return 0 // the device is drained
	}
	return int(s.segs.bytes - st.offset)
}

// openStream takes a segment for a stream and seals the one before. The caller has
// seen to it that all that counts of that one is counted: sealed segments without live bytes
// are given back. ErrNoSpace when no segment is free.
func (s *Store) openStream(st *outlet) error {
	var gen [8]byte
	_, _ = rand.Read(gen[:])
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.takeFor(st)
	if n == format.NoSegment {
		return fmt.Errorf("no free segment: %w", ErrNoSpace)
	}
	s.sealStream(st)
	seg := &s.segs.all[n]
	seg.state, seg.stream = segmentOpen, st.kind
	st.segment, st.offset, st.generation = n, 0, binary.LittleEndian.Uint64(gen[:])
	st.ages, st.bytes = 0, 0
	return nil
}

// takeFor takes a segment for a stream: blocks that are cold go to devices of class
// capacity, as long as there is room, and everything else to where the log is. The caller has Store.mu.
func (s *Store) takeFor(st *outlet) uint32 {
	if st.kind != streamCapacity {
		return s.segs.take(s.logClass())
	}
	if s.segs.freeOf[Capacity].Load() <= 1 || s.short() {
		return format.NoSegment
	}
	return s.segs.takeOf(Capacity)
}

// leaveDevice seals the open segments of the cleaner's streams on a device. It runs on the
// cleaner's goroutine, between two segments.
func (s *Store) leaveDevice(m *member) {
	c := &s.cleaner
	c.turn.Lock()
	defer c.turn.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range c.out {
		if st := &c.out[i]; st.segment != format.NoSegment && s.segs.layout.Load().find(st.segment) == m {
			s.sealStream(st)
		}
	}
}

// sealStream ends the open segment of a stream. The caller has Store.mu.
func (s *Store) sealStream(st *outlet) {
	if st.segment == format.NoSegment {
		return
	}
	seg := &s.segs.all[st.segment]
	seg.state, seg.lastSeq = segmentSealed, s.log.clock.Load()
	if st.bytes > 0 {
		seg.lastSeq = uint64(st.ages / st.bytes)
	}
	st.segment = format.NoSegment
}

// writeStream writes one record and its payload, which are in place in buf, and returns
// where that stands: the payload is payloadOff behind. It is durable after flushStream. An error
// of the device poisons the store; ErrNoSpace does not.
func (s *Store) writeStream(st *outlet, buf []byte, recordBytes, payloadOff, payloadLen int) (format.Addr, error) {
	end := payloadOff + payloadLen
	if s.roomIn(st) < roundUp(end) {
		if err := s.openStream(st); err != nil {
			return 0, err
		}
	}
	return s.appendStream(st, buf, recordBytes, payloadOff, payloadLen)
}

// appendStream is writeStream into the open segment, which has room, wherever it stands: also on a
// device that is to be drained since it was opened. Who names places in it before they are
// written must not have it written elsewhere.
func (s *Store) appendStream(st *outlet, buf []byte, recordBytes, payloadOff, payloadLen int) (format.Addr, error) {
	if err := s.failure(); err != nil {
		return 0, err
	}
	end := payloadOff + payloadLen
	total := roundUp(end)
	if st.segment == format.NoSegment || s.segs.bytes < st.offset+uint32(total) {
		invariant("LIVE", "%d bytes do not fit segment %d behind %d", total, st.segment, st.offset)
	}
	clear(buf[end:total])
	h := format.Commit{
		Pool: s.id, Records: 1,
		Segment: st.segment, Next: format.NoSegment, Generation: st.generation, Offset: st.offset, Total: uint32(total),
		RecordBytes: uint32(recordBytes), PayloadOff: uint32(payloadOff), PayloadLen: uint32(payloadLen),
		RecordSum: format.Checksum(buf[format.CommitHeaderSize : format.CommitHeaderSize+recordBytes]),
	}
	h.Put(buf)
	if hasParity(buf[format.CommitHeaderSize:]) {
		xorPage(buf[total-format.PageSize:], buf)
	}
	base := format.MakeAddr(st.segment, st.offset)
	d, off := s.segs.locate(base)
	if err := d.WriteAt(buf[:total], off); err != nil {
		s.poison(fmt.Errorf("write segment %d: %w", st.segment, err))
		return 0, s.failure()
	}
	if n := len(st.unflushed); n == 0 || st.unflushed[n-1] != st.segment {
		st.unflushed = append(st.unflushed, st.segment)
	}
	st.offset += uint32(total)
	s.stats.logBytes.Add(int64(total))
	return base, nil
}

// flushStream makes durable what was written to the stream. An error is never retried.
func (s *Store) flushStream(st *outlet) error {
	for _, n := range st.unflushed {
		d, _ := s.segs.locate(format.MakeAddr(n, 0))
		if err := d.Flush(); err != nil {
			s.poison(fmt.Errorf("flush a stream: %w", err))
			return s.failure()
		}
	}
	st.unflushed = st.unflushed[:0]
	return nil
}
