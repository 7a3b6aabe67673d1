package replication

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// startActivation begins M3 for the recorded epoch; one that runs for an older
// epoch ends. Called with mu.
func (v *Volume) startActivation(at Instant) {
	if v.activation != nil {
		v.activation()
	}
	ctx, cancel := context.WithCancel(v.node.ctx)
	v.activation = cancel
	epoch := v.g.rec.Epoch
	v.g.promised = max(v.g.promised, epoch)
	v.node.spawn(func() {
		defer cancel()
		if err := v.activate(ctx, epoch, at); err != nil && ctx.Err() == nil {
			v.node.failedBy(err)
			v.log.Error("cannot become owner", "epoch", epoch, "err", err)
			v.node.cfg.Event(levelError, "activation-failed", fmt.Sprintf("volume %d: this node is recorded as owner and cannot serve: %v", v.id, err))
		}
	})
}

// activate makes every in-sync copy equal to this node's and opens the epoch on
// all of them; only then does this node serve, reads too (M3). Everything in its
// log counts as committed: an unacknowledged write is new everywhere or, where
// this node never had it, absent everywhere.
func (v *Volume) activate(ctx context.Context, epoch lsfs.Epoch, at Instant) error {
	// L2, tested again here whatever was believed before (M7).
	for v.node.now() < at && !mutant("M3-retest") {
		if !pause(ctx, 20*time.Millisecond) {
			return ctx.Err()
		}
	}
	if v.copy() == nil {
		return errors.New("no local copy")
	}
	v.mu.Lock()
	v.forgetFlight()
	v.dropBlocked()
	v.mu.Unlock()
	var m lsfs.Meta
	// What the owner of an earlier epoch had asked this replica for may be at work still: who
	// writes the copy's Meta has read what it writes back (W2).
	err := v.hush(func(c Copy) error {
		if err := v.regrow(ctx, c); err != nil { // after a rollback that we took as a replica
			return err
		}
		m = c.Meta()
		if m.Promised >= epoch && !m.Inconsistent || mutant("W2-durable") && !m.Inconsistent {
			return nil
		}
		m.Promised = max(m.Promised, epoch)
		if m.Inconsistent {
			// Only a promotion by force makes an owner of such a copy: what it holds is
			// the volume's content from now on (B3).
			v.log.Warn("this copy was promoted in the middle of a resync", "from", m.SyncFrom.Seq)
			m.Inconsistent, m.SyncFrom = false, lsfs.OpID{}
		}
		if err := c.SetMeta(ctx, m); err != nil {
			return err
		}
		v.event(func(g *reign) { g.fit = true })
		return nil
	})
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.restate(m.State, false)
	v.mu.Unlock()
	v.announce() // everything in the log counts as committed, the state too
	for {
		others, ok := v.inSyncOthers(epoch)
		if !ok {
			return nil // the record moved on; its event starts another activation
		}
		stands := v.promises(ctx, others, epoch)
		if ahead := longest(stands, m.Durable); ahead != 0 && !mutant("M3-longest") && len(stands) == len(others) {
			v.yield(ahead, epoch)
		} else if len(stands) == len(others) {
			equal := 0
			for _, peer := range others {
				if err := v.equalize(ctx, peer, stands[peer], epoch, m); err == nil {
					equal++
				} else {
					v.log.Info("replica is not equal yet", "peer", peer, "err", err)
				}
			}
			if equal == len(others) {
				break
			}
		}
		if !pause(ctx, 100*time.Millisecond) {
			return ctx.Err()
		}
	}
	v.event(func(g *reign) {
		if g.role != Activating || g.rec.Epoch != epoch || ctx.Err() != nil {
			return
		}
		v.local = m.Durable.Seq
		v.next = v.local + 1
		v.followers = nil
		v.trackFollowers()
		for _, f := range v.followers {
			f.acked = v.local
			f.link = v.node.linkTo(f.id)
			g.progressed(v.node.now(), f.id)
		}
		if mutant("M3-epoch") {
			g.activated(v.node.now(), epoch)
		}
		v.appendEpoch(func(err error) {
			if err != nil {
				return
			}
			v.event(func(g *reign) {
				if g.activated(v.node.now(), epoch) {
					v.log.Info("active", "epoch", epoch, "insync", g.rec.InSync)
				}
			})
			v.node.beaconNow() // the leases come at once and not up to 200 ms later
			v.retryHeld()
		})
	})
	v.node.Kick()
	return nil
}

// forgetFlight drops what an earlier attempt to activate had in flight.
func (v *Volume) forgetFlight() {
	for v.flight.len() > 0 {
		w := v.flight.pop()
		v.locks.release(&w.hold, v.start)
		w.req, w.then = nil, nil
		if w.stored {
			v.node.works.put(w)
		} else {
			w.abandon = true
		}
	}
}

// inSyncOthers lists the other members of the in-sync set; false when the reign
// is not epoch any more.
func (v *Volume) inSyncOthers(epoch lsfs.Epoch) ([]NodeID, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.g.role != Activating || v.g.rec.Epoch != epoch {
		return nil, false
	}
	return slices.DeleteFunc(slices.Clone(v.g.rec.InSync), func(n NodeID) bool { return n == v.node.self }), true
}

// promises asks the other members of the in-sync set for their promise, and where
// they stand. Those that did not give it are missing in the answer.
func (v *Volume) promises(ctx context.Context, others []NodeID, epoch lsfs.Epoch) map[NodeID]wire.Position {
	stands := make(map[NodeID]wire.Position, len(others))
	for _, peer := range others {
		pos, err := v.promiseOf(ctx, peer, epoch)
		if err != nil {
			v.log.Info("replica does not promise yet", "peer", peer, "err", err)
			continue
		}
		stands[peer] = pos
	}
	return stands
}

func (v *Volume) promiseOf(ctx context.Context, peer NodeID, epoch lsfs.Epoch) (pos wire.Position, err error) {
	l := v.node.linkTo(peer)
	if l == nil {
		return pos, errors.New("no link")
	}
	r, err := l.call(wire.Header{Volume: uint64(v.id), Epoch: uint64(epoch)}, wire.Promise, nil, nil, ctx.Done())
	if err != nil {
		if errors.Is(err, errStale) {
			v.node.spawn(v.reread)
		}
		return pos, err
	}
	if pos, err = wire.DecodePosition(r.meta); err != nil {
		return pos, err
	}
	if pos.Inconsistent {
		now := v.node.now()
		v.event(func(g *reign) { g.broken(now, peer) })
		return pos, errors.New("the replica is inconsistent")
	}
	return pos, nil
}

// longest is the replica whose log is longer than ours, and than all others'; 0: ours is the longest.
func longest(stands map[NodeID]wire.Position, ours lsfs.OpID) (ahead NodeID) {
	best := ours
	for _, peer := range slices.Sorted(maps.Keys(stands)) {
		if d := stands[peer].Durable; d.Epoch > best.Epoch || d.Epoch == best.Epoch && d.Seq > best.Seq {
			best, ahead = d, peer
		}
	}
	return ahead
}

// yield lets the replica with the longest log own the volume instead, before anybody
// is served (M3). What it has more was mostly never acknowledged, and it does no
// harm to keep it. But when our own copy came back older than it was (a disk that
// was restored, B4), it is what hosts were promised: levelling it down would lose
// that.
func (v *Volume) yield(to NodeID, epoch lsfs.Epoch) {
	now := v.node.now()
	v.event(func(g *reign) {
		if g.rec.Epoch == epoch && g.yield(now, to) {
			v.log.Info("another copy is ahead of ours and owns the volume", "peer", to, "epoch", epoch)
		}
	})
}

// equalize makes the content of a replica, which has promised, equal to ours.
func (v *Volume) equalize(ctx context.Context, peer NodeID, pos wire.Position, epoch lsfs.Epoch, m lsfs.Meta) error {
	l := v.node.linkTo(peer)
	if l == nil {
		return errors.New("no link")
	}
	if pos.Durable == m.Durable && lastEpoch(pos.EpochLog) == lastEpoch(m.EpochLog) {
		return nil
	}
	if mutant("M3-level") {
		return nil
	}
	s := newResync(v, peer, l, epoch)
	s.ctx, s.cancel = context.WithCancel(ctx)
	defer s.cancel()
	return s.level(pos, m)
}

func lastEpoch(log []lsfs.OpID) lsfs.OpID {
	if len(log) == 0 {
		return lsfs.OpID{}
	}
	return log[len(log)-1]
}

// common is the newest operation that two histories share (Y1): the end of the
// shorter stay in the newest epoch that both opened at the same number.
func common(a []lsfs.OpID, aEnd lsfs.OpID, b []lsfs.OpID, bEnd lsfs.OpID) lsfs.OpID {
	end := func(log []lsfs.OpID, i int, durable lsfs.OpID) lsfs.Seq {
		if i+1 < len(log) {
			return log[i+1].Seq - 1
		}
		return durable.Seq
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				return lsfs.OpID{Epoch: a[i].Epoch, Seq: min(end(a, i, aEnd), end(b, j, bEnd))}
			}
		}
	}
	return lsfs.OpID{}
}

// pause waits for d; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
