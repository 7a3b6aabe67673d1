package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// placing is the making of the local copy, which may have to wait: for room in the
// pool, or until an older copy under the same name is freed.
type placing struct {
	mu sync.Mutex // held while the copy follows the record; before Volume.mu

	again atomic.Int64 // Instant of the next attempt; 0: none is needed
	tried int          // under mu
}

// placeEvery is the pause between attempts.
const placeEvery = 500 * time.Millisecond

// failed notes an attempt that failed, and says how loud to be about it.
func (p *placing) failed(now Instant) slog.Level {
	p.tried++
	p.again.Store(int64(now.After(placeEvery)))
	if p.tried%120 == 20 { // ten seconds, and then each minute
		return levelError
	}
	return slog.LevelDebug
}

func (p *placing) done() {
	p.tried = 0
	p.again.Store(0)
}

// placeAgain makes the next attempt when it is due.
func (v *Volume) placeAgain(now Instant) {
	at := v.placing.again.Load()
	if at == 0 || now < Instant(at) || !v.placing.again.CompareAndSwap(at, int64(now.After(placeEvery))) {
		return
	}
	v.node.spawn(func() {
		v.placing.mu.Lock()
		defer v.placing.mu.Unlock()
		v.mu.Lock()
		rec, gone := v.g.rec, v.gone // not before: an older record may mean another copy
		v.mu.Unlock()
		if gone == nil {
			v.follow(rec)
		}
	})
}

// forgetCopy lets go of the local copy, which is about to be deleted: it was placed
// elsewhere, or belongs to another life of the replica. What was received for it
// and is not in the store yet is dropped, and nothing more is taken.
func (v *Volume) forgetCopy() {
	if v.replica.Load() == nil {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.frozen && v.gone == nil { // a request of the owner is at work on it
		v.still.Wait()
	}
	v.replica.Store(nil)
	v.dropBlocked()
	v.ackTo, v.deaf = nil, nil
}

// Leave takes this node's copy out of the in-sync set, for a planned stop: the
// owner then waits for nothing from it, not even for the moment in which it finds
// out that this process is gone (M1). It does nothing where this node owns the
// volume, or is not in sync. The copy comes back by a resync of what it misses.
func (v *Volume) Leave(ctx context.Context) error {
	for {
		v.mu.Lock()
		rec, gone := v.g.rec, v.gone
		busy := v.g.proposal.open
		v.mu.Unlock()
		self := v.node.self
		if gone != nil || rec.Owner == self || !rec.Has(self) || rec.Deleted {
			return nil
		}
		if !busy {
			isr := slices.DeleteFunc(slices.Clone(rec.InSync), func(n NodeID) bool { return n == self })
			now, err := v.node.cfg.Control.Propose(ctx, Change{
				Volume: v.id, Expect: rec.Epoch, Owner: rec.Owner, InSync: isr, By: self, Reason: "it is stopped on purpose",
			})
			if err == nil || errors.Is(err, ErrConflict) && now.Volume != 0 {
				at := v.node.now()
				v.event(func(g *reign) { g.record(at, now, g.fit) })
			} else if !errors.Is(err, ErrConflict) {
				return fmt.Errorf("leave the in-sync set: %w", err)
			}
			if err == nil {
				return nil
			}
		}
		if !pause(ctx, v.node.timing.Beacon/4) {
			return fmt.Errorf("leave the in-sync set: %w", ctx.Err())
		}
	}
}

// Standing is where the local copy of a volume stands, for an administrator who has
// to decide what it is worth.
type Standing struct {
	Epoch      uint64 // of its newest operation
	Sequence   uint64 // of its newest operation
	Consistent bool   // false: in the middle of a resync, a mixture of old and new
}

// Standing says where the local copy stands; false when there is none.
func (v *Volume) Standing() (Standing, bool) {
	c := v.copy()
	if c == nil {
		return Standing{}, false
	}
	m := c.Meta()
	return Standing{uint64(m.Durable.Epoch), uint64(m.Durable.Seq), !m.Inconsistent}, true
}
