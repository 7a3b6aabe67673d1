package replication

import (
	"bytes"
	"errors"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// inside says whether [off, off+n) lies in the volume or, for the operations that
// may go there, in its annex. Both are multiples of a sector.
func (v *Volume) inside(op RequestOp, off, n uint64) bool {
	if off%sectorSize != 0 || n%sectorSize != 0 {
		return false
	}
	if size := v.size.Load(); off <= size && n <= size-off {
		return true
	}
	return (op == OpRead || op == OpUnmap || op == OpClone) &&
		off >= AnnexOff && off-AnnexOff <= AnnexBytes && n <= AnnexBytes-(off-AnnexOff)
}

// valid says whether r keeps what Request promises.
func (v *Volume) valid(r *Request) bool {
	if !v.inside(r.Op, r.Off, r.Len) {
		return false
	}
	n := uint64(len(r.Data))
	switch r.Op {
	case OpRead:
		return n == r.Len
	case OpWrite:
		return n == r.Len && (!r.Atomic || n <= AtomicBytesMax)
	case OpOrWrite:
		return n == r.Len
	case OpCompareAndWrite:
		return n%(2*sectorSize) == 0 && v.inside(r.Op, r.Off, n/2)
	case OpWriteSame:
		return n == sectorSize || n == blockSize
	case OpUnmap, OpFlush:
		return true
	case OpState:
		return r.Off == 0 && r.Len == 0 && n <= StateBytesMax
	case OpReadState:
		return r.Off == 0 && r.Len == 0
	case OpExtents:
		return r.Len > 0 && cap(r.Extents) > 0
	case OpClone:
		return (r.Off|r.Len|r.SourceOff)%blockSize == 0 && r.Len <= CloneBytesMax
	}
	return false
}

// Submit starts an operation (see Request). A write of whole blocks is reduced
// on the calling goroutine and queued; everything that needs to read first goes
// on in a goroutine of its own.
func (v *Volume) Submit(r *Request) {
	if !v.valid(r) {
		panic("REQUEST: checked by the device server") // our own bug: it would write beyond the volume
	}
	r.drops, r.served = v.drops.Load(), false
	v.route(r)
}

// route executes r where the owner is.
func (v *Volume) route(r *Request) {
	if !v.active.Load() {
		v.redirect(r)
		return
	}
	v.submitHere(r, func() { v.redirect(r) })
}

// submitHere executes r on this node, the owner; elsewhere is called instead
// when it turns out not to be the owner, before anything took effect.
func (v *Volume) submitHere(r *Request, elsewhere func()) {
	switch {
	case r.Op == OpReadState:
		v.readState(r, elsewhere)
	case r.Op == OpState:
		v.node.spawn(func() { v.slow(r, elsewhere) })
	case r.Op == OpFlush:
		// With the durable policy an acknowledged write is stable (W5). What has no effect
		// is ordered before a change of the state that is on its way.
		v.flushFirst(r, elsewhere, func() { v.nothing(r, elsewhere) })
	case r.Len == 0:
		v.nothing(r, elsewhere)
	case r.FUA && r.Op == OpRead:
		v.flushFirst(r, elsewhere, func() { v.node.spawn(func() { v.readSlow(r, elsewhere) }) })
	case r.Op == OpRead || r.Op == OpExtents:
		v.node.spawn(func() { v.readSlow(r, elsewhere) })
	case r.Op == OpWrite && r.Off%blockSize == 0 && r.Len%blockSize == 0:
		v.writeBlocks(r, elsewhere)
	case v.quick(r, elsewhere):
	default:
		own(r)
		v.node.spawn(func() { v.slow(r, elsewhere) })
	}
}

// nothing ends a request that has nothing to do.
func (v *Volume) nothing(r *Request, elsewhere func()) {
	if !v.mayServe() {
		elsewhere()
		return
	}
	v.end(r, nil)
}

// own makes r's data stay valid after Submit.
func own(r *Request) {
	if r.Borrowed {
		r.Data = bytes.Clone(r.Data)
		r.Borrowed = false
	}
}

// partBytes bounds the client data of one logged operation: small enough for
// every pool, and a long write is on its way while its rest is still reduced.
const partBytes = 256 << 10

// wholeMax bounds the client data of one operation that must not be divided: what
// any pool of at least 512 MiB takes, and less in the tiny pools of demonstrations,
// whose segments are small.
func (n *Node) wholeMax() int {
	return max(partBytes, int(min(n.pool.Room().Usable/400, AtomicBytesMax+2*blockSize)))
}

// writeBlocks is the write path: reduce, lock, sequence. Nothing waits, and a
// write of one part allocates nothing.
func (v *Volume) writeBlocks(r *Request, elsewhere func()) {
	switch {
	case len(r.Data) <= partBytes:
		v.writePart(r.Off, r.Data, r, r, nil, elsewhere)
		return
	case r.Atomic && len(r.Data) > v.node.wholeMax():
		v.end(r, ErrNoSpace)
		return
	case r.Atomic: // one operation of the log: all or nothing
		own(r)
		v.node.spawn(func() { // some 5 ms of a core for a MiB
			v.writePart(r.Off, r.Data, r, r, nil, elsewhere)
			v.node.Kick()
			v.node.flush()
		})
		return
	}
	own(r) // an attempt elsewhere may come after Submit has returned
	whole := &parts{v: v, r: r, elsewhere: elsewhere}
	whole.left.Store(int32((len(r.Data) + partBytes - 1) / partBytes))
	// Reduction takes a core some 5 ms for a MiB: the parts share the cores, and the
	// caller goes on receiving.
	n, off := v.node, r.Off
	for data := r.Data; len(data) > 0; {
		part, at := data[:min(len(data), partBytes)], off
		n.spawn(func() {
			v.writePart(at, part, r, nil, whole.done, func() { whole.done(errElsewhere) })
			n.Kick()
			n.flush()
		})
		off += uint64(len(part))
		data = data[len(part):]
	}
}

// shares says whether duplicates go by reference. Not while a replica is being
// filled: it lacks much of what we hold, and would ask for it block by block. The
// stores find the duplicates by themselves when they commit.
func (v *Volume) shares() bool { return v.dup.Load() && v.filling.Load() == 0 }

// parts joins the ends of the parts of one long write. Repeating it elsewhere
// when some parts took effect is what the initiator would do: no 4 KiB block is
// written with anything but the request's own data.
type parts struct {
	v         *Volume
	r         *Request
	left      atomic.Int32
	err       atomic.Pointer[error]
	elsewhere func()
}

func (p *parts) done(err error) {
	if err != nil {
		p.err.CompareAndSwap(nil, &err)
	}
	if p.left.Add(-1) > 0 {
		return
	}
	switch e := p.err.Load(); {
	case e == nil:
		p.v.end(p.r, nil)
	case errors.Is(*e, errElsewhere):
		p.elsewhere()
	default:
		p.v.end(p.r, translate(*e))
	}
}

// writePart writes whole blocks that fit one operation and ends r, or calls then.
// ask is the request that they are part of.
func (v *Volume) writePart(off uint64, data []byte, ask, r *Request, then func(error), elsewhere func()) {
	n := v.node
	w := n.works.get(len(data) + blockSize)
	if w == nil {
		finishPart(v, r, then, ErrBusy)
		return
	}
	start := lsfs.BlockNo(off / blockSize)
	n.reduce(w, start, data, v.shares(), v.compress.Load())
	v.warm(w, data)
	w.ask, w.req, w.then = ask, r, then
	if !v.hasRoom(w) {
		n.unpin(w)
		n.works.put(w)
		finishPart(v, r, then, ErrNoSpace)
		return
	}
	v.enqueue(w, elsewhere)
}

func finishPart(v *Volume, r *Request, then func(error), err error) {
	if r != nil {
		v.end(r, err)
	} else {
		then(err)
	}
}

// serves says whether new operations are taken here: by the owner, unless it is
// about to give the volume away (M6). Called with mu.
func (v *Volume) serves() bool {
	return v.g.role == Active && v.gone == nil && (!v.leaving || mutant("M6-stop"))
}

// enqueue locks w's range and sequences it, now or when the range is free.
func (v *Volume) enqueue(w *work, elsewhere func()) {
	n := v.node
	w.hold = hold{start: w.op.Start, end: w.op.Start + lsfs.BlockNo(w.op.Count), exclusive: true, work: w}
	v.mu.Lock()
	if !v.serves() {
		v.mu.Unlock()
		n.unpin(w)
		n.works.put(w)
		elsewhere()
		return
	}
	var refused []*work
	if v.locks.acquire(&w.hold) {
		v.start(w)
		refused = v.dropRefused(nil)
	}
	v.mu.Unlock()
	n.finish(refused)
}

// start sequences w, whose range has just been locked, unless the ordered state
// has moved on and forbids it now (C2): then dropRefused takes it. Called with mu.
func (v *Volume) start(w *work) {
	if w.err = v.recheck(w.ask); w.err != nil {
		v.refused = append(v.refused, w)
		return
	}
	v.sequence(w)
}

// dropRefused frees the ranges of works that were refused when their turn came, and
// appends them to list, for finish without the mutex. Called with mu after every
// release of a range.
func (v *Volume) dropRefused(list []*work) []*work {
	for len(v.refused) > 0 {
		w := v.refused[len(v.refused)-1]
		v.refused = v.refused[:len(v.refused)-1]
		v.locks.release(&w.hold, v.start)
		v.node.unpin(w)
		list = append(list, w)
	}
	return list
}

// roomMargin is kept free in every other pool beyond what is in flight: its
// room is known as of its last answer to a beacon.
const roomMargin = 8 << 20

// mayUnmap says whether every pool can take an unmap. Where nothing keeps what the range
// holds it always can.
func (v *Volume) mayUnmap(start lsfs.BlockNo, count uint32) bool {
	c := v.replica.Load()
	if c == nil || !c.Kept(start, count) {
		return true
	}
	if !c.AdmitUnmap(start, count) {
		return false
	}
	peers := *v.node.peers.Load()
	for _, r := range *v.replicas.Load() {
		if p := peers[r.Node]; p != nil && p.room.Load() < v.node.works.used.Load()+roomMargin {
			return false
		}
	}
	return true
}

// hasRoom says whether every pool can take w's new data. Where room is short,
// what frees as much as it takes goes on: overwrites, zeros and duplicates. Where
// snapshots keep what is overwritten nothing is freed, and copies of metadata are made.
func (v *Volume) hasRoom(w *work) bool {
	c := v.replica.Load()
	if c == nil {
		return len(w.buf) == 0
	}
	kept := c.Kept(w.op.Start, uint32(len(w.op.Blocks)))
	if len(w.buf) == 0 && !kept {
		return true
	}
	if !c.Admit(w.op.Start, w.op.Blocks) {
		return false
	}
	peers := *v.node.peers.Load()
	need := int64(len(w.buf)) + v.node.works.used.Load() + roomMargin
	for _, r := range *v.replicas.Load() {
		p := peers[r.Node]
		if p == nil || p.room.Add(-int64(len(w.buf))) >= need {
			continue
		}
		if kept {
			return false
		}
		// The copies are equal, so an overwrite here is one there.
		var have [1]dedup.Fingerprint
		for i := range w.op.Blocks {
			if w.op.Blocks[i].Data == nil {
				continue
			}
			if c.Fingerprints(v.node.ctx, w.op.Start+lsfs.BlockNo(i), have[:]) != nil || have[0] == (dedup.Fingerprint{}) {
				return false
			}
		}
	}
	return true
}
