package lsfs

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/twinsan/twinsan/lsfs/format"
)

const (
	// commitTarget is the size at which a batch is closed. Parts of large writes are 256 KiB
	// and their records: of those 1 MiB takes three, and 2 MiB seven with one flush. Larger ones
	// only add latency. It is an eighth of a segment at most, so that little of its end is lost.
	commitTarget = 2 << 20
	// copyTarget is the same while what waits is copied by a resync: nobody waits for one
	// of those, and a replica that is filled spent half of its commits' time in flushes.
	// A batch with anything else in it stays below commitTarget.
	copyTarget = 4 << 20
	// cleanStage is what the cleaner appends at once, beside the commits of operations.
	cleanStage = 1 << 20
	// OpBytesMax bounds the stored bytes of one operation, for an operation never
	// spans two commits. In pools of small segments half a segment is the bound.
	OpBytesMax = 8 << 20
	// opBlocksMax bounds the blocks of one write.
	opBlocksMax = OpBytesMax / 4096
)

// logWriter appends commits to the one log of the pool. One commit is in flight
// at a time: whoever has the turn, and turn is the only lock that is held across
// I/O, because holding it is what "in flight" means. Everything below it belongs
// to the holder.
type logWriter struct {
	turn ioLock

	segment    uint32 // open one; NoSegment before the first commit after Open
	generation uint64
	offset     uint32
	next       uint32
	seq        uint64        // of the last commit
	clock      atomic.Uint64 // seq for who has not the turn: the age of segments
	left       atomic.Int64  // room in the open segment; a hint to who has not the turn
	hash       [16]byte
	hasher     *blake3.Hasher
	sum        [32]byte
	commits    int     // in the open segment
	fill       prefill // of the next segment
}

// position is where the log goes on. The caller has the turn, or no one appends.
func (l *logWriter) position() format.Position {
	return format.Position{Segment: l.segment, Generation: l.generation, Offset: l.offset, Next: l.next, Seq: l.seq, Hash: l.hash}
}

func (l *logWriter) moveTo(p format.Position) {
	l.segment, l.generation, l.offset, l.next, l.seq, l.hash = p.Segment, p.Generation, p.Offset, p.Next, p.Seq, p.Hash
	l.clock.Store(p.Seq)
}

// chain is the hash of a commit's header and records, keyed so that no client
// can store data that looks like a commit.
func (l *logWriter) chain(b []byte) (h [16]byte) {
	l.hasher.Reset()
	_, _ = l.hasher.Write(b)
	copy(h[:], l.hasher.Sum(l.sum[:0]))
	return h
}

// begin takes the turn and says where a commit of at most n bytes will stand. It
// is followed by commit, which gives the turn back.
func (s *Store) begin(n int) (format.Addr, error) {
	l := &s.log
	l.turn.Lock()
	if err := s.failure(); err != nil {
		l.turn.Unlock()
		return 0, err
	}
	if l.left.Load() < int64(n) {
		if err := s.openSegment(); err != nil {
			l.turn.Unlock()
			s.poison(err)
			return 0, err
		}
	}
	return format.MakeAddr(l.segment, l.offset), nil
}

// openSegment makes next the open segment and chooses its successor.
func (s *Store) openSegment() error {
	var gen [8]byte
	_, _ = rand.Read(gen[:])
	s.endPrefill()
	small := s.log.commits*fillBelow > int(s.segs.bytes)
	s.log.commits = 0
	after, err := s.turnTo(binary.LittleEndian.Uint64(gen[:]))
	if err == nil && small {
		s.startPrefill(after)
	}
	return err
}

func (s *Store) turnTo(generation uint64) (uint32, error) {
	l := &s.log
	s.mu.Lock()
	defer s.mu.Unlock()
	after := s.segs.take(s.logClass())
	if after == format.NoSegment {
		return after, fmt.Errorf("log: no free segment: %w", ErrNoSpace)
	}
	if l.segment != format.NoSegment {
		seg := &s.segs.all[l.segment]
		seg.state, seg.lastSeq = segmentSealed, l.seq
	}
	l.segment, l.offset, l.next = l.next, 0, after
	l.generation = generation
	l.left.Store(int64(s.segs.bytes))
	s.segs.all[l.segment].state, s.segs.all[l.segment].stream = segmentOpen, streamLog
	if s.low() {
		s.cleaner.kick()
	}
	return after, nil
}

// commit completes the commit in buf (records and payload are in place, the
// header is not), writes it, makes it durable unless it is relaxed, and gives the turn
// back. On an error nobody knows what is on the device: the store is poisoned.
func (s *Store) commit(buf []byte, relaxed bool, records, recordBytes, payloadOff, payloadLen int) error {
	l := &s.log
	defer l.turn.Unlock()
	end := payloadOff + payloadLen
	total := roundUp(end)
	clear(buf[end:total])
	h := format.Commit{
		Pool: s.id, Records: uint32(records),
		Segment: l.segment, Next: l.next, Generation: l.generation, Offset: l.offset, Total: uint32(total),
		Seq: l.seq + 1, Durable: s.flush.durable.Load(), Previous: l.hash,
		RecordBytes: uint32(recordBytes), PayloadOff: uint32(payloadOff), PayloadLen: uint32(payloadLen),
		RecordSum: format.Checksum(buf[format.CommitHeaderSize : format.CommitHeaderSize+recordBytes]),
	}
	h.Put(buf)
	if hasParity(buf[format.CommitHeaderSize:]) {
		xorPage(buf[total-format.PageSize:], buf)
	}
	d, off := s.segs.locate(format.MakeAddr(l.segment, l.offset))
	start := time.Now()
	if err := d.WriteAt(buf[:total], off); err != nil {
		err = fmt.Errorf("write commit %d: %w", h.Seq, err)
		s.poison(err)
		return s.failure()
	}
	waiting := s.flush.wrote(d, h.Seq, total)
	var err error
	if relaxed {
		s.stats.relaxed.Add(1)
		err = s.relax(waiting)
	} else {
		err = s.flushLog()
	}
	if err != nil {
		return err
	}
	s.stats.commit.observe(time.Since(start))
	s.stats.logBytes.Add(int64(total))
	s.ckpt.bytes.Add(int64(total))
	l.seq, l.hash = h.Seq, l.chain(buf[:format.CommitHeaderSize+recordBytes])
	l.clock.Store(l.seq)
	l.commits++
	l.offset += uint32(total)
	l.left.Add(-int64(total))
	return nil
}
