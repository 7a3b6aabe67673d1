package replication

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// A snapshot is an operation of the stream, so every copy has it at the same place
// (ORDERED). Its owner holds new writes for as long as it takes to commit it: what
// was acknowledged before is in it, what comes after is not.
//
// A group of volumes has one moment when all of them are held at the same time:
// they are frozen in the order of their ids, and then each takes its snapshot and
// goes on. A write that a host sends because another one was acknowledged is in its
// snapshot only if that one is in its own.
//
// A replica that is being filled takes no snapshot until its content is whole
// (SyncWhole): it passes over the operation and is brought the snapshot afterwards
// (snapshotsync.go). One that was sealed or taken is right for ever.

const (
	// FreezeMax is how long a volume holds writes for a group. Afterwards it goes on,
	// and the snapshot of the group fails.
	FreezeMax = 2 * time.Second
	// frostsMax bounds the groups that hold one volume at a time; more are answered ErrBusy.
	frostsMax = 64
)

// ErrNoSnapshot: the volume's owner has no such snapshot.
var ErrNoSnapshot = errors.New("there is no such snapshot")

// frost holds a volume for a group.
type frost struct {
	h    *hold
	done chan struct{} // closed when somebody has taken it
}

// whole is a hold of everything that a volume has, the annex too. When it is not
// exclusive, reads go on.
func whole(exclusive bool) *hold {
	return &hold{end: lsfs.AnnexStart + lsfs.AnnexBlocks, exclusive: exclusive}
}

// notOwner turns the word of this package into the one for callers.
func notOwner(err error) error {
	if errors.Is(err, errElsewhere) {
		return ErrNotOwner
	}
	return err
}

// await runs f in a goroutine of the node and waits for it, or for the end of ctx:
// then f goes on, and its outcome is not known.
func (n *Node) await(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	n.spawn(func() { done <- f() })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TakeSnapshot takes snapshot id of the volume: every copy in sync has it on return.
// It runs at the owner; elsewhere it fails with ErrNotOwner and nothing happened. After
// any other error it may have been taken (FindSnapshot).
func (v *Volume) TakeSnapshot(ctx context.Context, id VolumeID) error {
	return v.node.await(ctx, func() error {
		h := whole(false)
		if err := v.lockUntil(h, nil, ctx.Done()); err != nil {
			return notOwner(err)
		}
		defer v.unlockRange(h)
		return v.takeInside(h, id)
	})
}

// takeInside takes a snapshot while h keeps writes away.
func (v *Volume) takeInside(h *hold, id VolumeID) error {
	c := v.copy()
	if c == nil {
		return ErrNotOwner
	}
	if err := c.AdmitSnapshot(); err != nil {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	_, err := v.order(h, lsfs.OpSnapshot, id)
	return err
}

// order sequences an operation about a snapshot inside h and waits for its commit.
func (v *Volume) order(h *hold, kind lsfs.OpKind, id VolumeID) (lsfs.OpID, error) {
	w := v.node.works.get(0)
	if w == nil {
		return lsfs.OpID{}, ErrBusy
	}
	w.op.Kind, w.op.Start, w.op.Count, w.op.Snapshot = kind, 0, 0, id
	at, err := v.execute(w, h)
	return at, notOwner(err)
}

// Freeze holds the writes of the volume for a group, until TakeFrozen, Thaw or the
// end of FreezeMax; reads go on. When it returns nil, nothing is in flight. The
// volumes of a group are frozen one after the other, in the order of their ids.
func (v *Volume) Freeze(ctx context.Context, group VolumeID) error {
	return v.node.await(ctx, func() error {
		h := whole(false)
		if mutant("C6-freeze") {
			h.end = 0
		}
		if err := v.lockUntil(h, nil, ctx.Done()); err != nil {
			return notOwner(err)
		}
		f := &frost{h: h, done: make(chan struct{})}
		v.mu.Lock()
		err := ctx.Err() // nobody waits for it any more
		switch {
		case err != nil:
		case v.frosts[group] != nil || len(v.frosts) >= frostsMax:
			err = ErrBusy
		default:
			if v.frosts == nil {
				v.frosts = map[VolumeID]*frost{}
			}
			v.frosts[group] = f
		}
		v.mu.Unlock()
		if err != nil {
			v.unlockRange(h)
			return err
		}
		v.node.spawn(func() { v.lapse(group, f) })
		return nil
	})
}

// lapse thaws the volume when nobody else has done so in time.
func (v *Volume) lapse(group VolumeID, f *frost) {
	t := time.NewTimer(FreezeMax)
	defer t.Stop()
	select {
	case <-f.done:
		return
	case <-t.C:
	case <-v.node.ctx.Done():
	}
	v.mu.Lock()
	ours := v.frosts[group] == f
	if ours {
		delete(v.frosts, group)
	}
	v.mu.Unlock()
	if ours {
		v.unlockRange(f.h)
	}
}

// claim takes the hold of a group; nil: it has lapsed.
func (v *Volume) claim(group VolumeID) *frost {
	v.mu.Lock()
	defer v.mu.Unlock()
	f := v.frosts[group]
	if f != nil {
		delete(v.frosts, group)
		close(f.done)
	}
	return f
}

// Thaw lets the writes of the volume go on that Freeze holds; no error when none are.
func (v *Volume) Thaw(group VolumeID) {
	if f := v.claim(group); f != nil {
		v.unlockRange(f.h)
	}
}

// TakeFrozen takes snapshot id of a frozen volume and lets its writes go on. When the
// hold has lapsed it fails, and nothing happened; errors are else those of TakeSnapshot.
func (v *Volume) TakeFrozen(ctx context.Context, group, id VolumeID) error {
	f := v.claim(group)
	if f == nil {
		return errLapsed
	}
	return v.node.await(ctx, func() error {
		defer v.unlockRange(f.h)
		return v.takeInside(f.h, id)
	})
}

var errLapsed = fmt.Errorf("%w: its writes were not held long enough for the group", ErrBusy)

// FindSnapshot says whether the volume has a snapshot, on every copy in sync. What was
// asked of this owner before is settled by then. It runs at the owner (ErrNotOwner).
func (v *Volume) FindSnapshot(ctx context.Context, id VolumeID) (found bool, err error) {
	err = v.node.await(ctx, func() error {
		h := whole(false)
		if err := v.lockUntil(h, nil, ctx.Done()); err != nil {
			return notOwner(err)
		}
		defer v.unlockRange(h)
		s := v.node.pool.Snapshot(id)
		if !v.mayServe() {
			return ErrBusy // another owner may know better
		}
		found = s != nil && s.Volume() == v.id
		return nil
	})
	return found && err == nil, err
}

// RollBack makes the content of the volume that of its snapshot id, on every copy;
// the size stays, and what the volume grew by is empty. Requests wait meanwhile. It
// runs at the owner (ErrNotOwner, and nothing happened). ErrNoSnapshot: there is none.
// After any other error it may have happened.
func (v *Volume) RollBack(ctx context.Context, id VolumeID) error {
	return v.node.await(ctx, func() error {
		h := whole(true)
		if mutant("C7-hold") {
			h.end = 0
		}
		if err := v.lockUntil(h, nil, ctx.Done()); err != nil {
			return notOwner(err)
		}
		defer v.unlockRange(h)
		c := v.copy()
		if s := v.node.pool.Snapshot(id); c == nil || s == nil || s.Volume() != v.id {
			return ErrNoSnapshot
		}
		if err := c.AdmitRollback(id); err != nil {
			return fmt.Errorf("%w: %w", ErrNoSpace, err)
		}
		if _, err := v.order(h, lsfs.OpRollback, id); err != nil {
			return err
		}
		return v.regrow(v.node.ctx, c) // nothing comes before it has its size again
	})
}

// regrow gives a copy the recorded size again after a rollback to a smaller snapshot.
func (v *Volume) regrow(ctx context.Context, c Copy) error {
	v.sizing.Lock()
	defer v.sizing.Unlock()
	if blocks := v.size.Load() / blockSize; c.Blocks() < blocks {
		return c.Resize(ctx, blocks)
	}
	return nil
}

// rolledBack goes on with the stream after a rollback, on a replica: nothing was
// appended behind it, because the copy may have been too small.
func (v *Volume) rolledBack() {
	c := v.copy()
	if c != nil {
		if err := v.regrow(v.node.ctx, c); err != nil && v.node.ctx.Err() == nil {
			v.log.Error("cannot grow the local copy after a rollback, the replica will be filled again", "err", err)
			v.mu.Lock()
			if v.ackTo != nil {
				v.dropBlocked()
				v.refuse(v.ackTo)
			}
			v.mu.Unlock()
		}
	}
	v.mu.Lock()
	v.frozen = false
	v.unblock()
	v.still.Broadcast()
	v.mu.Unlock()
	v.node.pool.Kick()
}
