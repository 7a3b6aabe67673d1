package lsfs

import (
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

type taskKind uint8

const (
	taskCreate taskKind = iota + 1
	taskDelete
	taskResize
	taskMeta
	taskTrim
	taskGone
	taskMove
	taskShed
	taskForget // a snapshot
	taskFrom
	taskForge
	taskSeal
	taskTurn
	taskMerge
)

// task is a change that is not an operation of a volume. It gets a commit of its own.
type task struct {
	kind    taskKind
	volume  VolumeID
	blocks  uint64
	replica [16]byte
	change  func(*Meta)
	start   uint64 // trim: [start, end)
	end     uint64
	floor   Seq // trim: the volume's, when it was looked at
	moves   []move
	merges  []format.Merge
	merged  merged // what became of them
	// Of snapshots: whose they are, what they begin with, where they were taken.
	of, base VolumeID
	point    OpID
	done     chan error
}

// move is a block that gets a new place. data stays the poster's.
type move struct {
	bid  BID
	old  format.Addr
	sum  uint32
	enc  dedup.Encoding
	data []byte
	// Of a group: the place in it, and whether it stands where the move before it does.
	index uint8
	joins bool

	// Where it stands already, durable in a stream; 0: it goes into the commit to come.
	at  format.Addr
	len uint16
}

// stored is the entry of a record for a block that stands already.
func (m *move) stored() *format.Move {
	return &format.Move{BID: uint64(m.bid), Old: m.old, New: m.at, Sum: m.sum, Len: m.len, Encoding: m.enc, Index: m.index}
}

// logged is the stored bytes that the commit of the move carries.
func (m *move) logged() int {
	if m.at != 0 {
		return 0
	}
	return len(m.data)
}

// errTail asks Resize to wait for the blocks behind the end.
var errTail = errors.New("blocks behind the end are still being given back")

// runTask logs and applies a task. Tasks that find their work done or impossible log nothing.
func (s *Store) runTask(t *task) error {
	if err := s.failure(); err != nil {
		return err
	}
	s.nextRound()
	b := &s.batch
	b.reset()
	s.mu.RLock()
	v := s.find(t.volume)
	var meta Meta
	var size, tail uint64
	deleting := false
	if v != nil {
		meta, size, tail, deleting = v.meta, v.size.Load(), v.tailEnd, v.deleting
	}
	s.mu.RUnlock()
	switch missing := v == nil || deleting || v.bare; {
	case missing && (t.kind == taskDelete || t.kind == taskResize || t.kind == taskMeta):
		return fmt.Errorf("volume %d: %w", t.volume, ErrNoVolume)
	}
	buf := b.buf[:format.CommitHeaderSize]
	switch t.kind {
	case taskCreate:
		if v != nil {
			return fmt.Errorf("create volume %d: %w", t.volume, ErrExists)
		}
		buf = format.AppendCreate(buf, uint64(t.volume), t.blocks, t.replica)
	case taskDelete:
		buf = format.AppendVolume(buf, format.RecordDelete, uint64(t.volume))
	case taskResize:
		if t.blocks == size {
			return nil
		}
		if size < t.blocks && size < tail {
			return errTail
		}
		buf = format.AppendVolume(buf, format.RecordResize, uint64(t.volume), t.blocks)
	case taskMeta:
		t.change(&meta)
		if format.EpochLogMax < len(meta.EpochLog) || format.StateMax < len(meta.State) {
			return fmt.Errorf("volume %d: %d epochs, %d bytes of state: %w", t.volume, len(meta.EpochLog), len(meta.State), ErrInvalidOp)
		}
		f := meta.stored()
		if int64(cap(buf)) < roundUp(int64(len(buf)+256+16*len(f.EpochLog)+len(f.State))) {
			return fmt.Errorf("volume %d: meta does not fit a segment: %w", t.volume, ErrInvalidOp)
		}
		buf = format.AppendMetaRecord(buf, uint64(t.volume), &f)
	case taskTrim:
		if s.roomToShed(shedLeaves) < shedLeaves {
			return nil // the trimmer will wait
		}
		// A rollback since then has brought another map, with a tail of its own.
		if v == nil || t.start < size || tail < t.end || v.floor != t.floor {
			return nil
		}
		buf = format.AppendVolume(buf, format.RecordTrim, uint64(t.volume), t.start, t.end)
	case taskGone:
		if v == nil {
			return nil
		}
		buf = format.AppendVolume(buf, format.RecordGone, uint64(t.volume))
	case taskMove:
		if len(t.moves) > 1 && s.tight() { // one is a repair
			return errNoRoom
		}
		return s.runMoves(t.moves)
	case taskMerge:
		return s.runMerges(t)
	case taskTurn:
		return s.turnLog()
	default:
		var err error
		if buf, err = s.snapshotTask(t, v, buf); err != nil || len(buf) == format.CommitHeaderSize {
			return err
		}
	}
	b.end, b.n = len(buf), 1
	if err := s.write(); err != nil {
		return err
	}
	if err := s.applyBatch(); err != nil {
		return err
	}
	if t.kind == taskMeta {
		s.queue.mu.Lock()
		if v.built != meta.Durable.Seq {
			v.built = meta.Durable.Seq
			v.expect = v.built + 1
		}
		s.queue.mu.Unlock()
	}
	return nil
}

// runMoves stores blocks at new places. Blocks that changed since they were read
// are left out here and again when applied.
func (s *Store) runMoves(moves []move) error {
	var e format.Entry
	live := moves[:0]
	for _, m := range moves {
		for {
			s.mu.RLock()
			at, _, missing := s.entryOf(m.bid)
			if at != nil {
				format.ParseEntry(at, &e)
				s.scanIdentity(m.bid)
			}
			s.mu.RUnlock()
			if missing != 0 {
				if err := s.fault(missing, true); err != nil {
					return err
				}
				continue
			}
			if at != nil && e.Addr == m.old {
				live = append(live, m)
			}
			break
		}
	}
	for len(live) > 0 {
		n := s.movesThatFit(live)
		if err := s.commitMoves(live[:n]); err != nil {
			return err
		}
		live = live[n:]
	}
	return nil
}

// movesThatFit says how many moves the next commit takes: what the open segment
// has room for, so that moving packs segments full, else what any segment takes.
func (s *Store) movesThatFit(moves []move) int {
	count := func(room int) (n int) {
		total := format.CommitHeaderSize + format.ListFixed
		for i := range moves {
			if total += format.MoveEntrySize + moves[i].logged(); room < total {
				return i
			}
		}
		return len(moves)
	}
	if n := count(int(s.log.left.Load())); n > 0 {
		return n
	}
	return max(count(int(s.commitMax)), 1)
}

func (s *Store) commitMoves(live []move) error {
	b := &s.batch
	at := b.buf[format.CommitHeaderSize:]
	format.PutList(at, format.RecordMove, len(live))
	b.end = format.CommitHeaderSize + format.ListFixed + len(live)*format.MoveEntrySize
	b.n = 1
	total := b.end
	for i := range live {
		total += live[i].logged()
	}
	base, err := s.begin(roundUp(total))
	if err != nil {
		return err
	}
	off := b.end
	for i := range live {
		m := &live[i]
		if m.at != 0 {
			format.PutMove(at, i, m.stored())
			continue
		}
		format.PutMove(at, i, &format.Move{BID: uint64(m.bid), Old: m.old, New: base + format.Addr(off), Sum: m.sum, Len: uint16(len(m.data)), Encoding: m.enc, Index: m.index})
		off += copy(b.buf[off:], m.data)
	}
	if err := s.commit(b.buf, false, 1, b.end-format.CommitHeaderSize, b.end, off-b.end); err != nil {
		return err
	}
	s.stats.cleanedBytes.Add(int64(off - b.end))
	s.ckpt.changed.Store(true)
	return s.applyBatch()
}
