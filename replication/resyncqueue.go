package replication

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// resyncsAtOnce bounds the resyncs that one node drives at the same time: more of them
// only make each one longer, and a volume is safe again when its own has ended.
const resyncsAtOnce = 2

// resyncQueue says which resyncs run: of those that wait first the one of the volume
// with the fewest good copies, then the one with the least to do, so that most volumes
// are safe soonest.
type resyncQueue struct {
	active atomic.Int32

	mu      sync.Mutex
	waiting []*turn
}

// turn is a resync that waits or runs.
type turn struct {
	copies int    // in sync
	work   uint64 // to do, roughly: operations that are missing, or blocks
	start  chan struct{}
	runs   bool // between enter and leave
}

// leave ends the turn; it may have ended.
func (t *turn) leave(q *resyncQueue) {
	if t.runs {
		t.runs = false
		q.leave()
	}
}

// enter waits for its turn, which leave ends. It fails when ctx ends before.
func (q *resyncQueue) enter(ctx context.Context, t *turn) error {
	t.start = make(chan struct{})
	q.mu.Lock()
	q.waiting = append(q.waiting, t)
	q.mu.Unlock()
	select {
	case <-t.start:
		t.runs = true
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	at := slices.Index(q.waiting, t)
	if at >= 0 {
		q.waiting = slices.Delete(q.waiting, at, at+1)
	}
	q.mu.Unlock()
	if at < 0 {
		q.leave() // it was chosen at the same moment
	}
	return ctx.Err()
}

func (q *resyncQueue) leave() {
	q.active.Add(-1)
	q.dispatch()
}

// dispatch starts what may. The ticker calls it after all volumes have asked, so that
// those of one moment are compared with each other.
func (q *resyncQueue) dispatch() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.waiting) > 0 && q.active.Load() < resyncsAtOnce {
		best := 0
		for i, t := range q.waiting {
			if b := q.waiting[best]; t.copies < b.copies || t.copies == b.copies && t.work < b.work {
				best = i
			}
		}
		t := q.waiting[best]
		q.waiting = slices.Delete(q.waiting, best, best+1)
		q.active.Add(1)
		close(t.start)
	}
}
