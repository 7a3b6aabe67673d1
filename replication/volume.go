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

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

const (
	blockSize  = dedup.BlockSize
	sectorSize = 512

	levelInfo  = slog.LevelInfo
	levelWarn  = slog.LevelWarn
	levelError = slog.LevelError
)

// Volume is one volume on this node: owner, replica, or mere door to the owner.
// It satisfies the device server's Volume interface.
//
// The mutex guards the membership (reign), the sequence and everything in
// flight; it is held for bookkeeping only, never across I/O. What the read path
// needs is atomic. Lock order: Volume.mu, then link.mu, the throttle's or the store's queue.
type Volume struct {
	node *Node
	id   lsfs.VolumeID
	log  *slog.Logger

	active   atomic.Bool  // role is Active
	lease    atomic.Int64 // Instant until which it may serve (R1, L1)
	size     atomic.Uint64
	dup      atomic.Bool
	filling  atomic.Int32 // replicas that take the stream while they are filled
	compress atomic.Bool
	ram      atomic.Bool // policy mirrored-ram (W6)
	replica  atomic.Pointer[localCopy]
	replicas atomic.Pointer[[]Replica] // as recorded
	drops    atomic.Uint64             // rises whenever sessions are dropped (Z1)
	dropping atomic.Int32              // they are being dropped just now
	locks    rangeLock                 // its filter is read without mu
	stated   atomic.Pointer[stated]    // the ordered state that the watcher knows (C2)
	watch    watcher
	placing  placing

	touched bool // the committing goroutine's

	// Replica: the attempts to make it equal. What changes it holds sessions shared
	// over its I/O; taken first of all.
	sessions sync.RWMutex
	session  atomic.Uint64 // changed under sessions

	sizing sync.Mutex // from giving the copy its size to noting that size; taken before mu, held over I/O

	mu         sync.Mutex
	still      *sync.Cond // of mu: open fell to zero, or the role changed
	g          *reign
	next       lsfs.Seq // owner: the next to give; replica: the next to take
	local      lsfs.Seq // durable here, or written if it is relaxed (W6)
	loose      lsfs.Seq // owner: newest relaxed operation
	firm       lsfs.Seq // owner: newest operation that is durable everywhere, and all before it
	opened     lsfs.Seq // owner: the newest EPOCH operation
	open       int      // works appended to the store and not yet stored
	flight     queue    // owner: sequenced and not committed, in order
	followers  []*follower
	loans      []*loan // owner: ranges that are kept as they are for another node
	held       []heldRequest
	blocked    []*work             // replica: received in order, waiting for content or for a change of state
	frozen     bool                // replica: nothing is appended for now
	hollow     bool                // replica: it is being filled and takes no snapshots of the stream
	deaf       *link               // replica: the stream on it was refused (C4)
	newest     StateID             // of the newest value that restate took
	news       []news              // values that the watcher does not know yet
	refused    []*work             // within one hold of mu: locked and not to be sequenced
	leaving    bool                // active, and about to be given away: nothing new is taken (M6)
	term       uint64              // rises when everything in flight is forgotten
	ackTo      *link               // replica: where the owner's operations come from
	gone       error               // deleted or shut
	spareAt    Instant             // no attempt before to give it away because our devices are slow
	retiredAt  Instant             // newest retirement, or nothing was in flight
	frosts     map[VolumeID]*frost // owner: groups that hold the writes
	activation context.CancelFunc

	// One write and one read a tick are measured: what resyncs give way to.
	sampleRead  atomic.Bool // the next read is to be measured
	sampleWrite bool        // the next write is
	sampleSeq   lsfs.Seq    // the write that is being measured, or 0
	sampleAt    Instant
	syncing     map[NodeID]*resync
	toldLost    string // the newest resync-blocked
}

type localCopy struct{ Copy }

// follower is what the owner keeps of one other replica.
type follower struct {
	id      NodeID
	acked   lsfs.Seq // durable there up to, or written if relaxed
	link    *link    // nil while it does not take the stream
	mirror  bool     // takes the stream although it is not in sync (Y3)
	ready   bool     // mirror: it has taken the position that the stream follows
	joining bool     // mirror, about to be proposed: counts as if in sync (M4)
	refs    lsfs.Seq // newest operation with references that a mirror was sent
	seen    lsfs.Seq // acked as of since: the progress of a mirror
	since   Instant
}

// heldRequest waits for an owner (Q4), or for a newer ordered state to be known here.
type heldRequest struct {
	r     *Request
	until Instant

	moved bool       // the owner of epoch refused it because of
	state StateID    // this state,
	epoch lsfs.Epoch // and knows a newer one
}

const maxHeld = 4096

// queue is a first-in first-out queue of works that keeps its array.
type queue struct {
	items []*work
	head  int
}

func (q *queue) len() int       { return len(q.items) - q.head }
func (q *queue) at(i int) *work { return q.items[q.head+i] }

func (q *queue) push(w *work) {
	if q.head > 64 && q.head*2 > len(q.items) {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	q.items = append(q.items, w)
}

func (q *queue) pop() *work {
	w := q.items[q.head]
	q.items[q.head] = nil
	q.head++
	if q.head == len(q.items) {
		q.items, q.head = q.items[:0], 0
	}
	return w
}

func newVolume(n *Node, rec Record) *Volume {
	v := &Volume{node: n, id: rec.Volume, log: n.log.With("volume", rec.Volume), g: newReign(n.self, n.timing, n.now()), retiredAt: never, syncing: map[NodeID]*resync{}}
	v.still = sync.NewCond(&v.mu)
	v.stated.Store(&stated{})
	v.size.Store(rec.SizeBytes)
	v.replicas.Store(&rec.Replicas)
	return v
}

// SizeBytes is the recorded capacity.
func (v *Volume) SizeBytes() uint64 { return v.size.Load() }

// ID is the volume's name in the cluster.
func (v *Volume) ID() lsfs.VolumeID { return v.id }

func (v *Volume) copy() Copy {
	if c := v.replica.Load(); c != nil {
		return c.Copy
	}
	return nil
}

// update takes the recorded state and makes the local copy follow it.
func (v *Volume) update(rec Record) {
	v.placing.mu.Lock()
	defer v.placing.mu.Unlock()
	v.follow(rec)
}

// follow is update. Called with placing.mu.
func (v *Volume) follow(rec Record) {
	v.dup.Store(rec.Dedup)
	v.compress.Store(rec.Compress)
	v.ram.Store(rec.MirroredRAM)
	v.replicas.Store(&rec.Replicas)
	v.sizing.Lock()
	defer v.sizing.Unlock()
	fit := v.prepareCopy(rec)
	now := v.node.now()
	v.event(func(g *reign) { g.record(now, rec, fit) })
	if rec.SizeBytes > v.size.Load() {
		v.size.Store(rec.SizeBytes) // grown everywhere that matters before it is offered
	}
}

// prepareCopy creates, resizes or opens the local copy, and says whether it is
// the recorded replica and consistent.
func (v *Volume) prepareCopy(rec Record) bool {
	i := slices.IndexFunc(rec.Replicas, func(r Replica) bool { return r.Node == v.node.self })
	if i < 0 {
		v.forgetCopy() // Update deletes it
		return false
	}
	id := rec.Replicas[i].ID
	c := v.node.pool.Copy(v.id)
	blocks := rec.SizeBytes / blockSize
	inSync := rec.Has(v.node.self)
	if c != nil && ReplicaID(c.Meta().Replica) != id && !inSync && !mutant("M8-life") {
		// Another life of this replica: its content means nothing any more.
		v.forgetCopy()
		if err := v.node.pool.DeleteCopy(v.node.ctx, v.id); err != nil {
			v.log.Error("cannot delete the old copy", "err", err)
			v.node.failedBy(err)
			return false
		}
		if err := v.dropSnapshots(v.node.ctx); err != nil {
			v.log.Error("cannot delete the snapshots of the old copy", "err", err)
			v.node.failedBy(err)
			return false
		}
		c = nil
	}
	if c == nil {
		if inSync && rec.Epoch > 1 && !mutant("B4-copy") {
			// B4: the record says that we hold the data, and we do not.
			v.node.cfg.Event(levelError, "replica-lost", fmt.Sprintf("volume %d: this node should hold a copy and has none (was its pool replaced?); it will be filled again from another node", v.id))
			return false
		}
		var err error
		if c, err = v.createCopy(rec, id, inSync); err != nil {
			v.log.Log(v.node.ctx, v.placing.failed(v.node.now()), "cannot create the local copy yet", "err", err)
			if !mutant("W6-placed") {
				v.node.failedBy(err)
			}
			return false
		}
	}
	v.placing.done()
	if c.Blocks() < blocks {
		if err := c.Resize(v.node.ctx, blocks); err != nil {
			v.log.Error("cannot grow the local copy", "err", err)
			v.node.failedBy(err)
			return false
		}
	}
	meta := c.Meta()
	if v.copy() == nil {
		v.mu.Lock()
		v.local = meta.Durable.Seq
		v.next = v.local + 1
		v.hollow = meta.Inconsistent
		v.g.promised = max(v.g.promised, meta.Promised)
		v.restate(meta.State, false)
		v.mu.Unlock()
		v.replica.Store(&localCopy{c})
		v.announce()
	}
	return ReplicaID(meta.Replica) == id && !meta.Inconsistent
}

// createCopy makes the local copy: as the snapshot as which the volume began, or
// empty. Without that snapshot only a replica that is filled anyway can be made.
func (v *Volume) createCopy(rec Record, id ReplicaID, inSync bool) (Copy, error) {
	blocks := rec.SizeBytes / blockSize
	if rec.Origin != 0 && !mutant("C8-origin") {
		c, err := v.node.pool.CreateCopyFrom(v.node.ctx, v.id, blocks, id, rec.Origin)
		if inSync && !mutant("C8-lacking") || !errors.Is(err, lsfs.ErrNoVolume) {
			return c, err
		}
	}
	return v.node.pool.CreateCopy(v.node.ctx, v.id, blocks, id)
}

// event feeds the membership machine and performs what it asks for.
func (v *Volume) event(f func(g *reign)) {
	var after []func()
	v.mu.Lock()
	f(v.g)
	for actions := v.g.take(); len(actions) > 0; actions = v.g.take() {
		for _, a := range actions {
			after = v.perform(a, after)
		}
	}
	v.publish()
	v.mu.Unlock()
	for _, f := range after {
		f()
	}
}

// publish sets what is read without the mutex.
func (v *Volume) publish() {
	active := v.serves()
	if v.active.Swap(active) != active {
		v.still.Broadcast()
	}
	v.lease.Store(int64(v.g.lease()))
}

// perform does one action under the mutex and returns what is to be done after it.
func (v *Volume) perform(a action, after []func()) []func() {
	n := v.node
	switch a.kind {
	case actPropose:
		change := a.change
		n.spawn(func() { v.propose(change) })
	case actActivate:
		v.log.Info("becoming owner", "epoch", v.g.rec.Epoch)
		v.startActivation(a.at)
		if !a.given { // else the old owner lives, and answers what it was sent
			after = append(after, func() { v.forwardsMoved(n.self) })
		}
	case actEpoch:
		v.log.Info("in-sync set changed", "epoch", v.g.rec.Epoch, "insync", v.g.rec.InSync)
		v.trackFollowers()
		v.appendEpoch(nil)
		after = append(after, v.retire, n.Kick)
	case actDemote:
		after = append(after, v.demote(a.reason), v.retryHeld)
	case actCede:
		v.log.Info("volume given away", "owner", v.g.rec.Owner, "epoch", v.g.rec.Epoch)
		after = append(after, v.demote(""), v.retryHeld)
		after = v.askAgain(after)
	case actKeep:
		v.leaving = false
		after = append(after, v.retryHeld)
	case actRole:
		v.log.Info("role changed", "role", v.g.role.String(), "epoch", v.g.rec.Epoch, "owner", v.g.rec.Owner)
		if owner := v.g.rec.Owner; !a.given { // else the old owner answers what it was sent
			after = append(after, func() { v.forwardsMoved(owner) })
		}
		after = append(after, v.retryHeld)
		after = v.askAgain(after)
	}
	return after
}

// askAgain asks the owner for what came while this node was no standby: it was
// not taken. Called with mu.
func (v *Volume) askAgain(after []func()) []func() {
	l := v.ackTo
	if l == nil || v.g.role != Standby {
		return after
	}
	l.lock()
	l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Gap, Volume: uint64(v.id), Epoch: uint64(v.g.promised), Seq: uint64(v.next)}, nil, nil)
	l.unlock()
	return append(after, l.flush)
}

// propose submits a change and feeds its result back.
func (v *Volume) propose(c Change) {
	ctx, cancel := context.WithTimeout(v.node.ctx, 5*time.Second)
	defer cancel()
	rec, err := v.node.cfg.Control.Propose(ctx, c)
	now := v.node.now()
	v.log.Info("proposed", "reason", c.Reason, "epoch", c.Expect+1, "err", err)
	v.event(func(g *reign) { g.proposed(now, c, rec, err) })
}

// reread asks the cluster for the record after a peer refused our epoch.
func (v *Volume) reread() {
	ctx, cancel := context.WithTimeout(v.node.ctx, 5*time.Second)
	defer cancel()
	if rec, err := v.node.cfg.Control.Record(ctx, v.id); err == nil {
		now := v.node.now()
		v.event(func(g *reign) { g.record(now, rec, g.fit) })
	}
}

// tick lets time pass for this volume.
func (v *Volume) tick(now Instant) {
	var expired []*Request
	retry, stuck := false, false
	v.event(func(g *reign) {
		for _, f := range v.followers {
			if f.acked+1 >= v.next {
				g.progressed(now, f.id)
			}
		}
		g.spares = !v.node.paces.slow.Load() // of two slow ones the owner keeps the other
		for _, id := range g.rec.InSync {
			if id != v.node.self {
				g.peer(id).slow = v.node.peerSlow(id)
			}
		}
		g.tick(now)
		keep := v.held[:0]
		for _, h := range v.held {
			if now >= h.until {
				expired = append(expired, h.r)
			} else {
				keep = append(keep, h)
			}
		}
		v.held = keep
		retry = len(v.held) > 0
		if v.flight.len() == 0 || v.retiredAt == never {
			v.retiredAt = now
		} else if now > v.retiredAt.After(v.node.timing.Hold) {
			// No quorum and no answer: the path fails, so that the initiator decides (Q4).
			v.retiredAt = now
			stuck = true
		}
		v.sampleWrite = v.sampleSeq == 0
		v.mirrorsStuck(now)
		v.spareOwner(now)
		v.startResyncs()
	})
	v.sampleRead.Store(true)
	v.placeAgain(now)
	v.retire()
	for _, r := range expired {
		v.end(r, ErrUnavailable)
	}
	if len(expired) > 0 {
		v.node.flush()
	}
	if retry {
		v.retryHeld()
	}
	if stuck {
		v.log.Error("writes wait for a replica or a quorum, sessions are dropped")
		v.dropSessions("writes cannot be replicated and the cluster has no quorum to go on without the replica")
	}
}

// granted takes a lease from peer; grant gives one to it.
func (v *Volume) granted(now Instant, peer NodeID, sent Instant) {
	v.mu.Lock()
	v.g.granted(now, peer, sent)
	v.publish()
	v.mu.Unlock()
}

func (v *Volume) grant(now Instant, peer NodeID, epoch lsfs.Epoch, fresh bool) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.g.beacon(now, peer, epoch, fresh)
}

// reigns says whether this node is the recorded owner and asks for leases.
func (v *Volume) reigns() (lsfs.Epoch, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.g.rec.Epoch, v.gone == nil && (v.g.role == Active || v.g.role == Activating)
}

// mayServe is the lease test (R1): made after the data was fetched, right before the reply.
func (v *Volume) mayServe() bool {
	return v.active.Load() && (int64(v.node.now()) < v.lease.Load() || mutant("R1"))
}

// shut ends everything of a volume that is deleted or whose node closes.
func (v *Volume) shut(err volumeError) {
	v.mu.Lock()
	v.gone = err
	if v.activation != nil {
		v.activation()
	}
	fail := v.demote("")
	held := v.held
	v.held = nil
	v.publish()
	v.still.Broadcast()
	v.mu.Unlock()
	fail()
	for _, h := range held {
		v.end(h.r, err)
	}
	v.node.flush()
}

// end completes a request that was never sequenced.
func (v *Volume) end(r *Request, err error) {
	r.Err = err
	r.Scratch = nil
	r.Done(r)
}
