package lsfs

import (
	"context"
	"fmt"
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// queue holds what waits for the next commit. Whoever sets busy has the
// committing role: one goroutine at a time takes operations, logs and applies them.
//
// BOUNDED: operations are the callers' memory, linked through themselves, so the
// queue is as long as what callers admit (their command windows). Tasks are at
// most one per background goroutine and repair.
type queue struct {
	mu         sync.Mutex
	wake       sync.Cond // of the committer, and of those who wait for the role
	head, tail *Op
	n          int
	tasks      []*task // come before operations, also when space is short
	dormant    []BID   // lost their last pin without having references
	busy       bool
	closed     bool
}

// opTask is the kind of an Op that carries a task in the order of operations.
const opTask OpKind = 255

// inlineOps is how many operations Kick commits on the caller's goroutine: at a
// queue depth of one a wakeup costs more than the commit's own work.
const inlineOps = 2

// inlineBytes is how many of them may wait. A long commit would keep the caller from what it does
// best: a replica that committed on the goroutine that receives had 0.4 MiB in a commit, and
// received nothing meanwhile.
const inlineBytes = 128 << 10

// Append queues an operation for the next commit; Kick starts that. It does not
// wait for I/O. An operation that cannot be stored is Done with its error in its turn.
func (s *Store) Append(op *Op) {
	op.next, op.err, op.task = nil, nil, nil
	op.admitted = !s.refusing()
	s.inspect(op)
	q := &s.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	if op.err == nil {
		v := s.taker(op)
		err := s.failure()
		switch {
		case q.closed:
			op.err = ErrClosed
		case err != nil:
			op.err = err
		case v == nil:
			op.err = fmt.Errorf("volume %d: %w", op.Volume, ErrNoVolume)
		case op.Kind == OpCopy || v.bare:
		case op.ID.Seq != v.expect:
			op.err = fmt.Errorf("volume %d: seq %d, expected %d: %w", op.Volume, op.ID.Seq, v.expect, ErrGap)
		default:
			v.expect++
		}
	}
	s.waiting.Add(int64(op.payloadBytes))
	q.push(op)
}

func (q *queue) push(op *Op) {
	if q.tail == nil {
		q.head = op
	} else {
		q.tail.next = op
	}
	q.tail = op
	q.n++
}

// inspect looks at what an operation says of itself and computes its sizes.
func (s *Store) inspect(op *Op) {
	op.recordBytes, op.payloadBytes = 0, 0
	fail := func(text string, args ...any) {
		op.payloadBytes = 0
		op.err = fmt.Errorf("volume %d seq %d: "+text+": %w", append(append([]any{op.Volume, op.ID.Seq}, args...), ErrInvalidOp)...)
	}
	switch op.Kind {
	case OpWrite, OpCopy:
		if len(op.Blocks) != int(op.Count) || op.Count == 0 || opBlocksMax < op.Count {
			fail("%d blocks for a count of %d", len(op.Blocks), op.Count)
			return
		}
		for i := range op.Blocks {
			b := &op.Blocks[i]
			switch {
			case b.Encoding == dedup.Zero:
				if len(b.Data) != 0 {
					fail("block %d is zero but has data", i)
					return
				}
			case b.Data == nil:
				if len(op.Pinned) != len(op.Blocks) || op.Pinned[i] == 0 {
					fail("block %d is a reference without a pin", i)
					return
				}
			case !dedup.StoredLenOK(b.Encoding, len(b.Data)):
				fail("block %d has %d stored bytes of encoding %d", i, len(b.Data), b.Encoding)
				return
			default:
				op.payloadBytes += uint32(len(b.Data))
			}
		}
	case OpState:
		if format.StateMax < len(op.State) {
			fail("%d bytes of state", len(op.State))
			return
		}
	case OpUnmap:
		if op.Count == 0 {
			fail("unmap of nothing")
			return
		}
	case OpClone:
		if op.Count == 0 || ClonedBlocksMax < op.Count {
			fail("clone of %d blocks", op.Count)
			return
		}
	case OpSnapshot, OpRollback:
		if op.Snapshot == 0 && op.Kind == OpRollback {
			fail("no snapshot")
			return
		}
	case OpEpoch:
	default:
		fail("kind %d", op.Kind)
		return
	}
	op.recordBytes = uint32(format.OpSize(format.RecordKind(op.Kind), int(op.Count), len(op.State)))
	if n := roundUp(int64(op.recordBytes) + int64(op.payloadBytes) + format.CommitHeaderSize); s.commitMax < n {
		fail("%d bytes in one operation, the pool takes %d", n, s.commitMax)
	}
}

// Kick starts the commit of what was appended. When nobody commits and no more
// than two operations wait, and these are short, it commits them on the calling goroutine, Done calls
// included; else the committer is woken, or goes on with them by itself.
func (s *Store) Kick() {
	q := &s.queue
	q.mu.Lock()
	if q.busy || q.head == nil {
		q.mu.Unlock()
		return
	}
	if q.n > inlineOps || s.waiting.Load() > inlineBytes || len(q.tasks) > 0 || q.closed || s.short() || s.paused() {
		q.wake.Broadcast()
		q.mu.Unlock()
		return
	}
	q.busy = true
	q.mu.Unlock()
	s.runOnce()
	s.leave()
}

// leave gives the committing role up.
func (s *Store) leave() {
	q := &s.queue
	q.mu.Lock()
	q.busy = false
	q.wake.Broadcast()
	q.mu.Unlock()
}

// enter waits for the committing role.
func (s *Store) enter() {
	q := &s.queue
	q.mu.Lock()
	for q.busy {
		q.wake.Wait()
	}
	q.busy = true
	q.mu.Unlock()
}

// runnable says whether a holder of the role has something to do.
func (s *Store) runnable() bool {
	q := &s.queue
	return len(q.tasks) > 0 || len(q.dormant) > 0 || s.ckpt.due() || q.head != nil && (!s.short() && !s.paused() || s.cleaner.stuck.Load() || s.failure() != nil)
}

// committer takes the role whenever there is work that no caller does inline.
func (s *Store) committer() {
	defer close(s.committed)
	q := &s.queue
	q.mu.Lock()
	for {
		for q.busy || !s.runnable() {
			if q.closed && !q.busy && (q.head == nil || s.failure() != nil) && len(q.tasks) == 0 {
				q.mu.Unlock()
				return
			}
			if q.head != nil && !q.busy && s.short() {
				s.stats.spaceWaits.Add(1)
				s.cleaner.kick()
			}
			q.wake.Wait()
		}
		q.busy = true
		q.mu.Unlock()
		for s.runOnce() {
		}
		s.leave()
		q.mu.Lock()
	}
}

// take moves operations to the batch: as many as fit one commit.
func (s *Store) take() {
	q := &s.queue
	b := &s.batch
	b.ops = b.ops[:0]
	size := int64(format.CommitHeaderSize)
	left := s.log.left.Load() // a value that is stale by now costs a segment's tail
	written := min(s.commitMax, commitTarget, int64(s.segs.bytes)/8)
	limit := max(written, min(s.commitMax, copyTarget, int64(s.segs.bytes)/4)) // of copies alone
	blocks := 0
	changed, room := int64(0), s.roomForPages()
	for op := q.head; op != nil; op = q.head {
		n := int64(op.recordBytes) + int64(op.payloadBytes)
		alone := op.alone()
		work := int(min(op.Count, unmapSlice))
		if op.Kind == OpClone {
			work *= 2 // identities of two ranges
		}
		// Where a leaf is shared, at the edges too, the identities of all its blocks change.
		changed += min(int64(work)+2*format.WordsPerPage, s.pg.nAlive.Load())
		if op.Kind != OpCopy {
			limit = written
		}
		if len(b.ops) > 0 && (alone || limit < size+n || left > int64(s.segs.bytes)/minTail && left < roundUp(size+n) ||
			batchBlocks < blocks+work || room < changed || batchOps <= len(b.ops)) {
			break
		}
		q.head = op.next
		if q.head == nil {
			q.tail = nil
		}
		q.n--
		op.next = nil
		b.ops = append(b.ops, op)
		size += n
		blocks += work
		if alone {
			break
		}
	}
}

// alone says that an operation gets a commit of its own: a task, or one that is
// applied in slices between which a checkpoint may be cut.
func (op *Op) alone() bool {
	switch op.Kind {
	case OpUnmap:
		return op.Count > unmapSlice
	case OpClone:
		return op.Count > cloneSlice
	}
	return op.Kind == opTask || op.Kind == OpSnapshot && op.Snapshot != 0 || op.Kind == OpRollback // what follows finds its pages shared
}

// putBack returns the operations of the batch from i on to the head of the queue.
func (s *Store) putBack(i int) {
	q := &s.queue
	b := &s.batch
	q.mu.Lock()
	for k := len(b.ops) - 1; k >= i; k-- {
		op := b.ops[k]
		b.ops[k] = nil
		if op.next = q.head; q.tail == nil {
			q.tail = op
		}
		q.head = op
		q.n++
	}
	q.mu.Unlock()
	b.ops = b.ops[:i]
}

const (
	// batchOps and batchBlocks bound the pages that one batch holds in RAM.
	batchOps    = 1024
	batchBlocks = 2 * unmapSlice
	// minTail: a batch is kept small enough for the rest of a segment unless that is
	// less than this part of the segment.
	minTail = 64
)

func (q *queue) reap(b BID) {
	q.mu.Lock()
	q.dormant = append(q.dormant, b)
	q.wake.Broadcast()
	q.mu.Unlock()
}

// post queues a task before all operations and waits for it.
func (s *Store) post(t *task) error {
	t.done = make(chan error, 1)
	q := &s.queue
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return ErrClosed
	}
	q.tasks = append(q.tasks, t)
	q.wake.Broadcast()
	q.mu.Unlock()
	return <-t.done
}

// do queues a task in the order of operations and waits for it. When ctx ends
// first the task may still take effect.
func (s *Store) do(ctx context.Context, t *task) error {
	t.done = make(chan error, 1)
	op := &Op{Kind: opTask, Volume: t.volume, task: t}
	op.Done = func(_ *Op, err error) { t.done <- err }
	q := &s.queue
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return ErrClosed
	}
	q.push(op)
	q.mu.Unlock()
	s.Kick()
	select {
	case err := <-t.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
