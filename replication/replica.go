package replication

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// prepare takes an operation from the owner's stream: in exact order, in the
// promised epoch, whole and intact, or not at all (W2, W3).
func (v *Volume) prepare(l *link, h wire.Header, meta, data []byte) error {
	n := v.node
	epoch, seq := lsfs.Epoch(h.Epoch), lsfs.Seq(h.Seq)
	v.mu.Lock()
	if v.replica.Load() == nil || v.gone != nil || v.g.role == Active || v.g.role == Activating || v.g.role == Candidate && !mutant("M2-stop-acking") {
		v.mu.Unlock()
		return nil // M2: a candidate acknowledges nothing
	}
	if epoch < v.g.promised && !mutant("W2") {
		promised := v.g.promised
		v.mu.Unlock()
		l.lock()
		l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Stale, Volume: h.Volume, Epoch: uint64(promised), Seq: h.Seq}, nil, nil)
		l.unlock()
		return nil
	}
	if v.deaf == l {
		v.mu.Unlock()
		return nil // this stream was refused; the owner strikes us and fills us again
	}
	if v.ackTo != l {
		v.ackTo = l
		v.dropBlocked()
	}
	if seq < v.next {
		v.mu.Unlock()
		return nil // repeated after a lost link
	}
	if seq > v.next {
		next := v.next
		v.mu.Unlock()
		l.lock()
		l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Gap, Volume: h.Volume, Epoch: h.Epoch, Seq: uint64(next)}, nil, nil)
		l.unlock()
		return nil
	}
	v.mu.Unlock()

	// This goroutine is the only reader of the link, and the link is the only
	// source of operations, so next does not move meanwhile except by dropBlocked
	// and freezing, which the second look below sees.
	w := n.works.get(max(len(data)+blockSize, len(meta)))
	if w == nil {
		// Over the budget: the owner's own budget makes this rare. It resends after the gap is told.
		return fmt.Errorf("operation %d of volume %d does not fit the budget of this node", seq, v.id)
	}
	w.buf = append(w.buf[:0], data...)
	var err error
	if w.source, err = wire.DecodePrepare(h, meta, w.buf, &w.op); err != nil {
		n.works.put(w)
		return err
	}
	if len(w.op.State) > 0 { // it lies in the link's buffer, and the buffer has no other use
		w.buf = append(w.buf[:0], w.op.State...)
		w.op.State = w.buf
	}
	w.v, w.from = v, l
	w.op.Done = n.stored
	if err := n.resolve(w); err != nil {
		n.unpin(w)
		n.works.put(w)
		return err
	}
	src := v.cloneSource(&w.op)
	lockBoth(v, src)
	defer unlockBoth(v, src)
	if v.gone != nil || v.ackTo != l || seq != v.next || epoch < v.g.promised && !mutant("W2") {
		n.unpin(w)
		n.works.put(w)
		return nil
	}
	waits := w.missing > 0 || v.frozen || len(v.blocked) > 0
	if w.op.Kind == lsfs.OpClone && (src == nil || src != v && !waits && !src.takes(w)) {
		n.works.put(w)
		v.refuseClone(l)
		return nil
	}
	if w.op.Kind == lsfs.OpSnapshot && v.hollow && !mutant("S-hollow") {
		w.op.Snapshot = 0 // it only takes its number: the content is not whole yet
	}
	if w.op.Kind == lsfs.OpEpoch {
		v.g.promised = epoch // the record itself makes it durable (W2)
	}
	v.next++
	if w.missing > 0 {
		l.lock()
		l.out = wire.AppendNeed(l.out, wire.Header{Volume: h.Volume, Epoch: h.Epoch, Seq: h.Seq}, w.index)
		l.unlock()
	}
	if waits {
		if src != nil {
			w.sourceNext = src.next
		}
		v.blocked = append(v.blocked, w)
		return nil
	}
	v.appendReplica(w)
	return nil
}

func (v *Volume) appendReplica(w *work) {
	v.open++
	if w.op.Kind == lsfs.OpRollback {
		v.frozen = true // until rolledBack
	}
	v.node.pool.Append(&w.op)
}

// resolve verifies contents and pins references; w.index lists the blocks whose
// content this node does not hold.
func (n *Node) resolve(w *work) error {
	w.index = w.index[:0]
	for i := range w.op.Blocks {
		b := &w.op.Blocks[i]
		var pinned lsfs.BID
		switch {
		case b.Encoding == dedup.Zero:
		case b.Data != nil:
			if dedup.Sum(b.Data) != b.Sum { // CHECKED
				return fmt.Errorf("%w: stored block %d of operation %d does not match its sum", wire.ErrFrame, i, w.op.ID.Seq)
			}
		default:
			var held bool
			if pinned, held = n.pool.Pin(&b.Fingerprint); !held {
				w.index = append(w.index, uint32(i))
			}
		}
		w.op.Pinned = append(w.op.Pinned, pinned)
	}
	w.missing = len(w.index)
	return nil
}

// content fills the blocks that an operation waited for.
func (v *Volume) content(l *link, h wire.Header, meta, data []byte) error {
	index, blocks, err := wire.DecodeContent(meta, append([]byte(nil), data...))
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, w := range v.blocked {
		if w.op.ID.Seq != lsfs.Seq(h.Seq) || w.from != l {
			continue
		}
		for k, i := range index {
			if int(i) >= len(w.op.Blocks) || blocks[k].Data == nil || blocks[k].Fingerprint != w.op.Blocks[i].Fingerprint {
				return fmt.Errorf("%w: content %d of operation %d is not what was asked for", wire.ErrFrame, i, h.Seq)
			}
			if dedup.Sum(blocks[k].Data) != blocks[k].Sum {
				return fmt.Errorf("%w: content %d of operation %d does not match its sum", wire.ErrFrame, i, h.Seq)
			}
			if w.op.Blocks[i].Data == nil && w.op.Pinned[i] == 0 {
				w.missing--
			}
			w.op.Blocks[i] = blocks[k]
		}
		break
	}
	v.unblock()
	return nil
}

// unblock appends what waited, in order, up to the first that still misses content.
func (v *Volume) unblock() {
	if v.frozen {
		return
	}
	i := 0
	for ; i < len(v.blocked) && v.blocked[i].missing == 0; i++ { // a rollback ends it
		if w := v.blocked[i]; w.op.Kind == lsfs.OpClone && w.op.Source != v.id {
			v.node.spawn(v.unblockClone) // its source has to be looked at as well
			break
		}
		v.appendReplica(v.blocked[i])
		v.blocked[i] = nil
		if v.frozen {
			i++
			break
		}
	}
	v.blocked = append(v.blocked[:0], v.blocked[i:]...)
}

// dropBlocked forgets operations that were received and not appended: the owner
// sends them again.
func (v *Volume) dropBlocked() {
	if len(v.blocked) > 0 {
		v.next = v.blocked[0].op.ID.Seq
	}
	for i, w := range v.blocked {
		v.node.unpin(w)
		v.node.works.put(w)
		v.blocked[i] = nil
	}
	v.blocked = v.blocked[:0]
}

// position says where this replica stands; asking for it on a new link ends the
// stream of the old one.
func (v *Volume) position(l *link) (wire.Position, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.copy()
	if c == nil || v.gone != nil {
		return wire.Position{}, false
	}
	if v.g.rec.Owner == l.peer {
		v.ackTo = l
		v.dropBlocked()
	}
	return v.positionLocked(c), true
}

func (v *Volume) positionLocked(c Copy) wire.Position {
	m := c.Meta()
	return wire.Position{
		Volume: uint64(v.id), Replica: m.Replica, Promised: max(m.Promised, v.g.promised), Durable: m.Durable,
		SyncFrom: m.SyncFrom, Inconsistent: m.Inconsistent, EpochLog: m.EpochLog,
	}
}

// drain waits until the store is done with everything appended for this volume.
// Called with mu.
func (v *Volume) drain() error {
	for v.open > 0 && v.gone == nil && !v.node.failed.Load() {
		v.mu.Unlock()
		v.node.pool.Kick()
		v.mu.Lock()
		if v.open > 0 {
			v.still.Wait()
		}
	}
	if v.gone != nil {
		return ErrUnavailable
	}
	if v.node.failed.Load() {
		return fmt.Errorf("the store of node %d failed", v.node.self)
	}
	return nil
}

// hush stops the stream, waits until everything received before is durable, runs
// f without the mutex, and goes on. f may change the copy's Meta.
func (v *Volume) hush(f func(c Copy) error) error {
	v.mu.Lock()
	for v.frozen && v.gone == nil {
		v.still.Wait()
	}
	v.frozen = true
	var err error
	if v.g.role != Activating || !mutant("M3-stored") {
		err = v.drain()
	}
	v.mu.Unlock()
	c := v.copy()
	if c == nil && err == nil {
		err = errAbsent
	}
	if err == nil {
		err = f(c)
	}
	v.mu.Lock()
	v.frozen = false
	v.unblock()
	v.still.Broadcast()
	v.mu.Unlock()
	v.node.pool.Kick()
	return err
}

// promise makes this replica act in no epoch below e any more (W2, M3), durably,
// and says where it stands with everything received before.
func (v *Volume) promise(ctx context.Context, l *link, e lsfs.Epoch) (pos wire.Position, err error) {
	v.mu.Lock()
	if e < v.g.promised {
		v.mu.Unlock()
		return pos, errStale
	}
	if v.copy() == nil {
		v.mu.Unlock()
		return pos, errAbsent
	}
	if !mutant("M3-promise") {
		v.g.promised = e // from now on nothing older is taken or granted
	}
	v.ackTo, v.deaf = l, nil
	v.dropBlocked()
	v.mu.Unlock()
	v.newSession()
	err = v.hush(func(c Copy) error {
		m := c.Meta()
		if m.Promised < e && !mutant("M3-promise") && !mutant("W2-durable") {
			m.Promised = e
			if err := c.SetMeta(ctx, m); err != nil {
				return err
			}
		}
		v.mu.Lock()
		v.local = m.Durable.Seq
		v.next = v.local + 1
		v.restate(m.State, false) // of an operation of ours that nobody answered, perhaps
		pos = v.positionLocked(c)
		v.mu.Unlock()
		v.announce()
		return nil
	})
	return pos, err
}

// sendContent reads blocks that a replica misses from our own copy and sends them.
func (v *Volume) sendContent(l *link, h wire.Header, index []uint32) {
	n := v.node
	v.mu.Lock()
	var fps []dedup.Fingerprint
	for i := range v.flight.len() {
		if w := v.flight.at(i); w.op.ID.Seq == lsfs.Seq(h.Seq) {
			for _, k := range index {
				if int(k) < len(w.op.Blocks) {
					fps = append(fps, w.op.Blocks[k].Fingerprint)
				}
			}
			break
		}
	}
	v.mu.Unlock()
	if len(fps) != len(index) {
		return // we are not the owner any more: what counts waits for it in flight
	}
	buf := make([]byte, len(fps)*blockSize)
	blocks := make([]dedup.Block, len(fps))
	for i := range fps {
		b, err := n.pool.ReadFingerprint(n.ctx, &fps[i], buf[i*blockSize:(i+1)*blockSize])
		if err != nil {
			// The block is pinned or stored here, so this is damage. The replica is
			// dropped for want of progress, the read path repairs or reports.
			v.log.Error("cannot read a block that a replica needs", "err", err)
			return
		}
		blocks[i] = b
	}
	l.lock()
	l.out = wire.AppendContent(l.out, h, index, blocks)
	l.unlock()
	l.flush()
}
