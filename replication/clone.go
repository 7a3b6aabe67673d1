package replication

import (
	"errors"
	"slices"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// A clone makes a range of one volume equal to a range of another one (C4): every
// copy does it by reference, from its own copy of the source. So each of them must
// find the same content there when it takes its turn:
//
//   - The owner of the destination owns the source, too, or has borrowed its range
//     (loan.go), and holds the range until every copy that counts has the clone.
//     What was written there before is then durable at every node that is in sync;
//     nothing is written after. Both streams of one owner leave by the same link, so
//     the order is kept on the way.
//   - A replica takes it only if its own copy of the source is consistent, has
//     everything that had committed, and follows the epoch in which the owner
//     looked. Otherwise it refuses the stream and is filled again by fingerprint.
//
// Inside one volume the stream's own order says all this, except to a replica that
// is being filled: nobody clones while there is one.

// clone executes an OpClone at the owner of its destination.
func (v *Volume) clone(r *Request) error {
	src := v
	if r.Source != v.id {
		src = v.node.Volume(r.Source)
	}
	if src == nil || !src.inside(OpClone, r.SourceOff, r.Len) {
		return ErrNoClone
	}
	count := lsfs.BlockNo(r.Len / blockSize)
	start, from := lsfs.BlockNo(r.Off/blockSize), lsfs.BlockNo(r.SourceOff/blockSize)
	to := &hold{start: start, end: start + count, exclusive: true}
	read := &hold{start: from, end: from + count}
	var far *borrowed
	if mutant("C4-hold") && src != v {
		read.end = from
	}
	lockSource := func() (func(), error) {
		err := src.lockRange(read)
		if err == nil {
			return func() { src.unlockRange(read) }, nil
		}
		if !errors.Is(err, errElsewhere) {
			return nil, ErrNoClone
		}
		if far, err = src.borrow(from, uint32(count)); err != nil {
			return nil, err
		}
		return far.giveBack, nil
	}
	lock := func() (func(), error) { return func() { v.unlockRange(to) }, v.lockFor(to, r) }
	locks := []func() (func(), error){lock, lockSource}
	switch {
	case src == v:
		to.from, to.to = read.start, read.end
		locks = locks[:1]
	case src.id < v.id: // ordered by id: two clones never wait for each other
		slices.Reverse(locks)
	}
	for _, lock := range locks {
		unlock, err := lock()
		if err != nil {
			return err
		}
		defer unlock()
	}
	if c := v.replica.Load(); c == nil || !c.AdmitClone(start, src.id, from, uint32(count)) || !v.cloneFits() {
		return ErrNoClone // the copy by data is refused where there is really no room
	}
	w := v.node.works.get(0)
	if w == nil {
		return ErrBusy
	}
	w.op.Kind, w.op.Start, w.op.Count = lsfs.OpClone, start, uint32(count)
	w.op.Source, w.op.SourceStart = src.id, from

	lockBoth(v, src)
	var err error
	if far != nil {
		w.source = far.at
		err = v.borrowable(far, to)
	} else {
		w.source = lsfs.OpID{Epoch: src.g.rec.Epoch, Seq: src.committed()}
		err = v.cloneable(src, to, read)
	}
	if err != nil {
		unlockBoth(v, src)
		v.node.works.put(w)
		return err
	}
	wait := v.sequenceInside(w)
	unlockBoth(v, src)
	v.node.Kick()
	_, err = wait()
	return err
}

// cloneable says whether every copy of the destination can clone from its own
// copy of the source. Called with the mutexes of both.
func (v *Volume) cloneable(src *Volume, to, read *hold) error {
	if v.g.role != Active || v.gone != nil || v.term != to.term {
		return errElsewhere
	}
	if src != v && (src.g.role != Active || src.gone != nil || src.term != read.term || !src.mayServe()) {
		return ErrNoClone // R1: what is cloned is what a read would return at this moment
	}
	for _, f := range v.followers {
		if mutant("C4-followers") || f.link == nil && !v.g.needsAck(f.id) {
			continue
		}
		if !src.g.rec.Has(f.id) || f.mirror && !f.ready {
			return ErrNoClone
		}
		if src == v {
			continue
		}
		if g := src.follower(f.id); g == nil || g.link == nil || g.link != f.link {
			return ErrNoClone
		}
	}
	return nil
}

// cloneFits says whether every other pool has room for the metadata of a clone: 34
// pages of the map and some of identities.
func (v *Volume) cloneFits() bool {
	need := v.node.works.used.Load() + roomMargin
	for _, r := range *v.replicas.Load() {
		if p := (*v.node.peers.Load())[r.Node]; p != nil && p.room.Load() < need {
			return false
		}
	}
	return true
}

// committed is the newest operation that has committed. Called with mu, at the owner.
func (v *Volume) committed() lsfs.Seq {
	if v.flight.len() > 0 {
		return v.flight.at(0).op.ID.Seq - 1
	}
	return v.next - 1
}

// lockBoth takes the mutexes of two volumes in the order of their ids; unlockBoth
// lets go of them. The second may be nil or the first.
func lockBoth(a, b *Volume) {
	if b != nil && b.id < a.id {
		b.mu.Lock()
	}
	a.mu.Lock()
	if b != nil && a.id < b.id {
		b.mu.Lock()
	}
}

func unlockBoth(a, b *Volume) {
	a.mu.Unlock()
	if b != nil && a != b {
		b.mu.Unlock()
	}
}

// cloneSource is the volume that op clones from: nil for every other operation, and
// when this node does not know it.
func (v *Volume) cloneSource(op *lsfs.Op) *Volume {
	switch {
	case op.Kind != lsfs.OpClone:
		return nil
	case op.Source == v.id:
		return v
	}
	return v.node.Volume(op.Source)
}

// takes says whether the clone w, which another node has sequenced, finds the same
// content in this node's copy of the source v. Called with mu, of the source.
func (v *Volume) takes(w *work) bool {
	return v.has(w.source) && (v.g.role != Active || v.lends(w.from, w.op.SourceStart, w.op.Count))
}

// has says whether a clone that was sequenced when the source stood at source finds
// the same content in this node's copy of it. Called with mu, of the source.
func (v *Volume) has(source lsfs.OpID) bool {
	return mutant("C4-replica") || v.replica.Load() != nil && v.gone == nil && v.g.fit && v.g.promised <= source.Epoch && source.Seq <= v.local
}

// unblockClone appends a clone that waited for operations before it, if nothing at
// all came to its source meanwhile: while this replica counts, the owner sees to it
// for the range; afterwards nobody does.
func (v *Volume) unblockClone() {
	v.mu.Lock()
	var src *Volume
	if len(v.blocked) > 0 {
		src = v.cloneSource(&v.blocked[0].op)
	}
	v.mu.Unlock()
	defer v.node.pool.Kick()
	lockBoth(v, src)
	defer unlockBoth(v, src)
	if v.frozen || v.gone != nil || len(v.blocked) == 0 {
		return
	}
	w := v.blocked[0]
	if w.missing > 0 || w.op.Kind != lsfs.OpClone || w.op.Source == v.id {
		return
	}
	if src == nil || src.id != w.op.Source || src.g.role != Active && src.next != w.sourceNext || !src.takes(w) {
		l := w.from
		v.dropBlocked()
		v.refuseClone(l)
		return
	}
	v.blocked = slices.Delete(v.blocked, 0, 1)
	v.appendReplica(w)
	v.unblock()
}

func (v *Volume) refuseClone(l *link) {
	v.log.Warn("a clone cannot be made from this node's copy of its source, the replica will be filled again")
	v.refuse(l)
}

// refuse ends the stream that comes on l: the owner strikes this replica from the
// in-sync set, or gives up filling it, and begins anew. Called with mu.
func (v *Volume) refuse(l *link) {
	v.deaf = l
	l.lock()
	l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Gap, Volume: uint64(v.id), Epoch: uint64(v.g.promised)}, nil, nil)
	l.unlock()
	if v.gone == nil {
		v.node.spawn(l.flush)
	}
}
