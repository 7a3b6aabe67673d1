package replication

import "github.com/twinsan/twinsan/lsfs"

// relaxes says whether w may be acknowledged when it is written on every replica that
// counts, before it is flushed there (W6). Called with mu, by the owner.
func (v *Volume) relaxes(w *work) bool {
	r := w.ask
	if r == nil {
		r = w.req
	}
	// Two logs at least. The record counts and not the replicas that a proposal would
	// leave: an operation that was sequenced for more is looked at again when it
	// retires. What compares is what hosts agree by; it is as durable as reservations.
	return v.ram.Load() && w.op.Kind == lsfs.OpWrite && r != nil && (!r.FUA || mutant("W6-fua")) && r.Op != OpCompareAndWrite && (len(v.g.rec.InSync) > 1 || mutant("W6-single"))
}

// unflushed says whether something that is acknowledged, or soon will be, may not be
// durable everywhere. Called with mu, by the owner.
func (v *Volume) unflushed() bool { return v.loose > v.firm && !mutant("W6-flush") }

// lone says whether w must not be acknowledged yet although it is written everywhere:
// the set it was sequenced for has shrunk, and the EPOCH operation that opened the new
// reign, before which the log is flushed, is not durable here. Called with mu.
func (v *Volume) lone(w *work) bool {
	return w.op.Relaxed && v.local < v.opened && !mutant("W6-lone")
}

// flushFirst goes on with r, a read or a flush that has to be of what is on stable
// storage, when everything that was sequenced before is durable on every replica that
// counts: it puts a mark into the stream, an operation that changes nothing and is
// durable itself, and by that all before it (W3, W4). elsewhere is called as by submitHere.
func (v *Volume) flushFirst(r *Request, elsewhere func(), then func()) {
	v.mu.Lock()
	if !v.serves() {
		v.mu.Unlock()
		elsewhere()
		return
	}
	if !v.unflushed() {
		v.mu.Unlock()
		then()
		return
	}
	w := v.node.works.get(0)
	if w == nil {
		v.mu.Unlock()
		v.end(r, ErrBusy)
		return
	}
	w.op.Kind, w.op.Start, w.op.Count, w.op.Snapshot = lsfs.OpSnapshot, 0, 0, 0
	w.then = func(err error) {
		if err != nil {
			v.end(r, translate(err))
			return
		}
		then()
	}
	w.hold = hold{exclusive: true, work: w} // an empty range
	v.locks.acquire(&w.hold)
	v.sequence(w)
	v.mu.Unlock()
}
