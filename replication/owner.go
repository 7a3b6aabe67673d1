package replication

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// sequence gives w the next number and starts it on its way to every copy (W1).
// Its range is locked. Called with mu.
func (v *Volume) sequence(w *work) {
	w.op.Volume = v.id
	w.op.ID = lsfs.OpID{Epoch: v.g.rec.Epoch, Seq: v.next}
	w.op.Done = v.node.stored
	w.v = v
	if w.op.Relaxed = v.relaxes(w); w.op.Relaxed {
		v.loose = v.next
	}
	if w.op.Kind == lsfs.OpState {
		nameState(&w.op)
	}
	if v.sampleWrite && w.req != nil {
		v.sampleWrite, v.sampleSeq, v.sampleAt = false, v.next, v.node.now()
	}
	v.next++
	v.flight.push(w)
	for _, f := range v.followers {
		if f.link != nil {
			f.link.lock()
			f.link.out = wire.AppendPrepare(f.link.out, &w.op, w.source)
			f.link.unlock()
			if f.mirror && (w.hasRefs() || w.op.Kind == lsfs.OpClone) {
				f.refs = w.op.ID.Seq
			}
		}
	}
	v.open++
	v.node.pool.Append(&w.op)
}

// appendEpoch records the present epoch in the log of every copy: it names the
// first sequence number of the reign. then is called when all of them have it.
func (v *Volume) appendEpoch(then func(error)) {
	w := v.node.works.get(0)
	if w == nil {
		w = &work{} // the budget is for clients; a change of epoch must go on
		w.op.Ctx = w
	}
	w.op.Kind, w.op.Start, w.op.Count = lsfs.OpEpoch, 0, 0
	w.then = then
	w.hold = hold{exclusive: true, work: w} // an empty range
	v.locks.acquire(&w.hold)
	v.sequence(w)
	v.opened = w.op.ID.Seq
	if v.g.role == Activating {
		v.loose, v.firm = 0, 0 // the log may be another one than in our last reign
	} else if v.ram.Load() {
		v.loose = v.opened // a member that is new has not flushed what was relaxed for it before
	}
	v.g.promised = max(v.g.promised, v.g.rec.Epoch)
}

// stored notes that w is durable here, or written if it is relaxed (W6). It runs between a commit and its
// OnCommit, on the committing goroutine.
func (v *Volume) stored(w *work) {
	v.mu.Lock()
	v.open--
	w.stored = true
	if w.op.Kind != lsfs.OpCopy {
		v.local = w.op.ID.Seq
	}
	owned := w.from == nil && w.op.Kind != lsfs.OpCopy && !w.abandon
	brought := w.from != nil && w.op.Kind == lsfs.OpState
	rolled := w.from != nil && w.op.Kind == lsfs.OpRollback
	if brought {
		v.restate(bytes.Clone(w.op.State), true)
	}
	if v.open == 0 {
		v.still.Broadcast()
	}
	v.mu.Unlock()
	if rolled {
		v.node.spawn(v.rolledBack)
	}
	if brought && !mutant("C2-announce") {
		v.announce() // before the acknowledgement: what the owner answers is known at every door (C2)
	}
	if !owned {
		v.node.retired = append(v.node.retired, w)
	}
}

// lost takes back a work whose volume went away under it.
func (v *Volume) lost(w *work) {
	v.mu.Lock()
	v.open--
	w.stored = true
	if v.open == 0 {
		v.still.Broadcast()
	}
	v.mu.Unlock()
	if w.abandon || w.from != nil || w.op.Kind == lsfs.OpCopy {
		v.node.retired = append(v.node.retired, w)
	}
}

// tripped says whether a replica's operation failed in a way that ends the stream to
// this one replica and nothing more: its pool has no room although the owner's
// has, a block has too many references here, or the snapshot of a rollback is not here. What stood behind it in the queue
// fails with it.
func (v *Volume) tripped(w *work, err error) bool {
	full := errors.Is(err, lsfs.ErrNoSpace) || errors.Is(err, lsfs.ErrReferences) || errors.Is(err, lsfs.ErrSnapshots) ||
		w.op.Kind == lsfs.OpRollback && errors.Is(err, lsfs.ErrNoVolume)
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case w.op.Kind == lsfs.OpCopy && (full || errors.Is(err, lsfs.ErrInvalidOp)): // no room; or it is not what its sum says
		w.err = err // the resync ends, and is tried again
	case w.from == nil:
		return false
	case errors.Is(err, lsfs.ErrGap) && v.deaf == w.from:
	case full:
		v.log.Error("this replica cannot follow, it will be filled again", "seq", w.op.ID.Seq, "err", err)
		v.dropBlocked()
		v.next = w.op.ID.Seq
		v.refuse(w.from)
		if w.op.Kind == lsfs.OpRollback {
			v.frozen = false
		}
	default:
		return false
	}
	v.open--
	w.stored = true
	if v.open == 0 {
		v.still.Broadcast()
	}
	v.node.unpin(w) // a failed operation's pins stay ours
	v.node.retired = append(v.node.retired, w)
	return true
}

// durable acknowledges what the commit just made durable: the owner retires
// what all copies have, a replica tells its owner.
func (v *Volume) durable(list []*work) []*work {
	v.mu.Lock()
	if v.g.role == Active || v.g.role == Activating {
		list = v.retireLocked(list)
	} else if l := v.ackTo; l != nil {
		l.lock()
		l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Ack, Volume: uint64(v.id), Epoch: uint64(v.g.promised), Seq: uint64(v.ackable())}, nil, nil)
		l.unlock()
	}
	v.mu.Unlock()
	return list
}

// ackable is the newest operation that a replica may acknowledge: what is on its disk
// (W3). Called with mu.
func (v *Volume) ackable() lsfs.Seq {
	if mutant("W3-ack") {
		return v.next - 1
	}
	return v.local
}

// acknowledged takes a replica's cumulative acknowledgement (W3).
func (v *Volume) acknowledged(peer NodeID, epoch lsfs.Epoch, seq lsfs.Seq) {
	var list []*work
	v.mu.Lock()
	// A replica that has promised a later epoch follows another owner: its numbers are
	// not ours any more (W2).
	if f := v.follower(peer); f != nil && f.link != nil && epoch <= v.g.rec.Epoch && seq > f.acked && seq < v.next {
		f.acked = seq
		v.g.progressed(v.node.now(), peer)
		list = v.retireLocked(nil)
	}
	v.mu.Unlock()
	v.node.finish(list)
}

func (v *Volume) retire() {
	v.mu.Lock()
	list := v.retireLocked(nil)
	v.mu.Unlock()
	v.node.finish(list)
}

// retireLocked takes out of flight what is durable here and at every replica that
// counts (W4), lets go of its range, and appends it to list. DURABLE is kept here.
func (v *Volume) retireLocked(list []*work) []*work {
	if v.g.role != Active && v.g.role != Activating {
		return list
	}
	committed := v.local
	if mutant("W4-local") {
		committed = v.next
	}
	for _, f := range v.followers {
		switch {
		case mutant("W4"):
		case v.g.needsAck(f.id):
			committed = min(committed, f.acked)
		case f.mirror && f.link != nil:
			// A replica that is being filled does not have to have it, but the stream to
			// it is bounded: clients are slowed to what it takes. An operation with
			// references stays in flight until it has them: it may ask for the contents.
			if f.acked < f.refs || f.joining {
				committed = min(committed, f.acked)
			} else {
				committed = min(committed, f.acked+mirrorWindow)
			}
		}
	}
	for v.flight.len() > 0 && v.flight.at(0).op.ID.Seq <= committed && !v.lone(v.flight.at(0)) {
		w := v.flight.pop()
		if !w.op.Relaxed {
			v.firm = w.op.ID.Seq
		}
		if w.op.Kind == lsfs.OpState {
			v.restate(bytes.Clone(w.op.State), true) // who executes it announces it
		}
		v.locks.release(&w.hold, v.start)
		v.retiredAt = never
		if w.op.ID.Seq == v.sampleSeq {
			v.sampleSeq = 0
			v.node.sampled(false, time.Duration(v.node.now()-v.sampleAt))
		}
		list = append(list, w)
	}
	return v.dropRefused(list)
}

// mirrorWindow is how many operations a replica that is being filled may be behind.
// mirrorStall is how long it may make no progress before its resync ends.
const (
	mirrorWindow = 256
	mirrorStall  = 2 * time.Second
)

// mirrorsStuck ends the resync of replicas that hold the clients up. Called with mu.
func (v *Volume) mirrorsStuck(now Instant) {
	for _, f := range v.followers {
		if !f.mirror || f.link == nil || v.g.needsAck(f.id) {
			continue
		}
		slack := lsfs.Seq(mirrorWindow)
		if f.joining || f.acked < f.refs {
			slack = 1 // clients wait for everything that it was sent
		}
		if f.acked+slack >= v.next || f.acked != f.seen {
			f.seen, f.since = f.acked, now
		} else if now > f.since.After(mirrorStall) {
			v.log.Warn("a replica that is being filled takes nothing, its resync starts over", "peer", f.id)
			f.link = nil
			if s := v.syncing[f.id]; s != nil {
				s.cancel()
			}
		}
	}
}

func (v *Volume) follower(id NodeID) *follower {
	for _, f := range v.followers {
		if f.id == id {
			return f
		}
	}
	return nil
}

// trackFollowers makes the followers those that count for W4 and those that are
// being made equal.
func (v *Volume) trackFollowers() {
	v.followers = slices.DeleteFunc(v.followers, func(f *follower) bool {
		return !v.g.needsAck(f.id) && !f.mirror
	})
	for _, id := range v.g.rec.InSync {
		if id == v.node.self {
			continue
		}
		f := v.follower(id)
		if f == nil {
			v.followers = append(v.followers, &follower{id: id})
		} else {
			f.mirror, f.joining = false, false
		}
	}
}

// linkUp resumes the stream to a replica that counts from where it stands.
func (v *Volume) linkUp(p *peer, l *link, at wire.Position, here bool) {
	now := v.node.now()
	v.event(func(g *reign) {
		f := v.follower(p.id)
		if f == nil || g.role != Active && g.role != Activating {
			return
		}
		if f.mirror && !g.needsAck(f.id) {
			return // its resync starts over
		}
		if lsfs.Epoch(at.Promised) > g.rec.Epoch && !mutant("W2-position") {
			// It follows another owner, and its numbers count that one's operations (W2).
			v.node.spawn(v.reread)
			return
		}
		if !here || at.Durable.Seq < f.acked && !mutant("B4") {
			// B4: it had acknowledged more than it has. It is out, and filled again.
			if here && v.ram.Load() {
				v.node.cfg.Event(levelWarn, "replica-unflushed", fmt.Sprintf("volume %d: node %d came back without its newest writes, which were not flushed when it lost power (policy mirrored-ram); this node has them, and fills it again", v.id, p.id))
			} else {
				v.node.cfg.Event(levelError, "replica-amnesia", "a replica came back without operations it had acknowledged; it is filled again")
			}
			g.broken(now, p.id)
			return
		}
		f.acked = at.Durable.Seq
		v.resend(f, l, f.acked+1)
	})
	v.retire()
	v.retryHeld()
}

// resend sends everything in flight from a number on, and leaves the stream open.
func (v *Volume) resend(f *follower, l *link, from lsfs.Seq) {
	f.link = l
	l.lock()
	for i := range v.flight.len() {
		if w := v.flight.at(i); w.op.ID.Seq >= from {
			l.out = wire.AppendPrepare(l.out, &w.op, w.source)
		}
	}
	l.unlock()
}

func (v *Volume) linkDown(p *peer) {
	v.mu.Lock()
	if f := v.follower(p.id); f != nil {
		f.link = nil
	}
	if s := v.syncing[p.id]; s != nil {
		s.cancel()
	}
	v.mu.Unlock()
}

// gap answers a replica that expected another number.
func (v *Volume) gap(p *peer, l *link, expected lsfs.Seq) {
	now := v.node.now()
	v.event(func(g *reign) {
		f := v.follower(p.id)
		if f == nil || f.link != l {
			return
		}
		refused := expected == 0 || expected <= f.acked // it cannot go on from here (C4, B4)
		if !f.mirror && refused {
			g.broken(now, p.id)
			return
		}
		// One that asks for what comes next misses nothing: it has read the record that takes
		// it in before we have (askAgain).
		if f.mirror && (refused || expected < v.next && (v.flight.len() == 0 || v.flight.at(0).op.ID.Seq > expected)) {
			if s := v.syncing[p.id]; s != nil {
				s.cancel() // what it misses has retired: its resync starts over
			}
			return
		}
		// It has received what is below, and may not have it on disk: that is for its
		// acknowledgements to say (W3).
		if mutant("W3-received") {
			f.acked = expected - 1
		}
		v.resend(f, l, expected)
	})
	l.flush()
}

// demote forgets everything in flight: its outcome is for the next owner to
// decide, and the initiators learn of it by their sessions being reset (Z1).
// Called with mu; the returned function runs without.
func (v *Volume) demote(reason string) func() {
	var failed []*Request
	var thens []func(error)
	var free []*work
	v.term++
	v.leaving, v.sampleSeq = false, 0
	if reason != "" {
		v.beginDrop() // under the mutex: from here on nothing old finds its way to the next owner
	}
	if v.activation != nil {
		v.activation()
		v.activation = nil
	}
	for _, s := range v.syncing {
		s.cancel()
	}
	for v.flight.len() > 0 {
		w := v.flight.pop()
		v.locks.holders.remove(&w.hold)
		v.locks.count(&w.hold, -1)
		if w.req != nil {
			failed = append(failed, w.req)
		} else if w.then != nil {
			thens = append(thens, w.then)
		}
		w.req, w.then = nil, nil
		if w.stored {
			free = append(free, w)
		} else {
			w.abandon = true
		}
	}
	for h := v.locks.waiters.head; h != nil; {
		next := h.next
		if w := h.work; w != nil {
			v.locks.waiters.remove(h)
			if w.req != nil {
				failed = append(failed, w.req)
			} else if w.then != nil {
				thens = append(thens, w.then)
			}
			v.node.unpin(w)
			free = append(free, w)
		}
		h = next
	}
	// What waits with a channel looks at the role when it is woken.
	v.locks.rescan(v.start)
	v.followers = nil
	v.active.Store(false)
	v.still.Broadcast()
	return func() {
		if reason != "" {
			v.log.Warn("ownership lost, sessions are dropped", "reason", reason)
			if !mutant("Z1") {
				v.node.cfg.DropSessions(v.id, reason)
			}
			v.endDrop()
		}
		for _, r := range failed {
			v.end(r, ErrUnavailable)
		}
		for _, f := range thens {
			f(ErrUnavailable)
		}
		for _, w := range free {
			v.node.works.put(w)
		}
		v.node.flush()
	}
}
