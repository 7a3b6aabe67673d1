package replication

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// errChanging: another change of the volume's owner or in-sync set is on its way.
var errChanging = errors.New("the owner or the in-sync set is changing")

// MoveTo gives the volume to another member of its in-sync set (M6). It runs at the
// owner; elsewhere it fails with ErrNotOwner. New commands are held, what is in
// flight ends, and the record is changed; then the held commands go to the new
// owner, and no session is dropped. It returns when the record names the new owner.
//
// When ctx ends before the outcome is known, the volume stays stopped until it is
// (M7); the error wraps ctx.Err(). After any other error the volume is served here
// as before.
func (v *Volume) MoveTo(ctx context.Context, to NodeID) error {
	v.mu.Lock()
	epoch := v.g.rec.Epoch
	f := v.follower(to)
	var err error
	switch {
	case v.g.role != Active || v.gone != nil:
		err = fmt.Errorf("%w: ask node %d", ErrNotOwner, v.g.rec.Owner)
	case to == v.node.self:
	case v.leaving || v.g.proposal.open:
		err = errChanging
	case !v.g.rec.Has(to) || f == nil || f.link == nil:
		err = fmt.Errorf("node %d is not in sync or not in reach", to)
	default:
		v.leaving = true
		v.publish()
	}
	started := v.leaving
	v.mu.Unlock()
	if err != nil || to == v.node.self {
		return err
	}
	if !started {
		return errChanging
	}
	began := time.Now()
	if err := v.quiet(ctx); err != nil && !mutant("M6-quiet") {
		v.stay()
		return err
	}
	now, proposed := v.node.now(), false
	v.event(func(g *reign) { proposed = v.leaving && g.rec.Epoch == epoch && g.cede(now, to) })
	if !proposed {
		v.stay()
		return errChanging
	}
	for {
		v.mu.Lock()
		owner, moved, waiting := v.g.rec.Owner, v.g.rec.Epoch > epoch, v.leaving
		v.mu.Unlock()
		switch {
		case moved && owner == to:
			v.log.Info("moved", "owner", to, "stopped", time.Since(began))
			return nil
		case !waiting:
			return fmt.Errorf("the cluster refused to move the volume to node %d", to)
		}
		if !pause(ctx, time.Millisecond) {
			return fmt.Errorf("whether the volume moves is not known yet: %w", ctx.Err())
		}
	}
}

// quiet waits until nothing is in flight. It gives up before the hosts do.
func (v *Volume) quiet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, v.node.timing.Drop/2)
	defer cancel()
	for {
		v.node.Kick()
		v.mu.Lock()
		ours, idle := v.leaving, v.flight.len() == 0 && v.locks.idle()
		v.mu.Unlock()
		switch {
		case !ours:
			return ErrNotOwner
		case idle:
			return nil
		}
		if !pause(ctx, time.Millisecond) {
			return fmt.Errorf("wait for operations in flight: %w", ctx.Err())
		}
	}
}

// stay serves again after a move that was not proposed.
func (v *Volume) stay() {
	v.event(func(g *reign) {
		if g.role == Active && !(g.proposal.open && g.proposal.change.Owner != g.self) {
			v.leaving = false
		}
	})
	v.retryHeld()
}
