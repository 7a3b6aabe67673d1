package replication

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// Submit starts an operation (see Request). A write of whole blocks is reduced
// on the calling goroutine and queued; everything that needs to read first goes
// on in a goroutine of its own.
func (v *Volume) Submit(r *Request) {
	if size := v.size.Load(); r.Off > size || r.Len > size-r.Off || r.Off%sectorSize != 0 || r.Len%sectorSize != 0 {
		panic("REQUEST: range checked by the device server") // our own bug: it would write beyond the volume
	}
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
	case r.Len == 0 || r.Op == OpFlush:
		// OpFlush: with the durable policy an acknowledged write is stable (W5).
		if !v.mayServe() {
			elsewhere()
			return
		}
		v.end(r, nil)
	case r.Op == OpRead:
		v.node.spawn(func() { v.readSlow(r, elsewhere) })
	case r.Op == OpWrite && r.Off%blockSize == 0 && r.Len%blockSize == 0:
		v.writeBlocks(r, elsewhere)
	default:
		own(r)
		v.node.spawn(func() { v.slow(r, elsewhere) })
	}
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

// writeBlocks is the write path: reduce, lock, sequence. Nothing waits, and a
// write of one part allocates nothing.
func (v *Volume) writeBlocks(r *Request, elsewhere func()) {
	if len(r.Data) <= partBytes {
		v.writePart(r.Off, r.Data, r, nil, elsewhere)
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
			v.writePart(at, part, nil, whole.done, func() { whole.done(errElsewhere) })
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
func (v *Volume) writePart(off uint64, data []byte, r *Request, then func(error), elsewhere func()) {
	n := v.node
	w := n.works.get(len(data) + blockSize)
	if w == nil {
		finishPart(v, r, then, ErrBusy)
		return
	}
	start := lsfs.BlockNo(off / blockSize)
	n.reduce(w, start, data, v.shares(), v.compress.Load())
	w.req, w.then = r, then
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

// enqueue locks w's range and sequences it, now or when the range is free.
func (v *Volume) enqueue(w *work, elsewhere func()) {
	n := v.node
	w.hold = hold{start: w.op.Start, end: w.op.Start + lsfs.BlockNo(w.op.Count), exclusive: true, work: w}
	v.mu.Lock()
	if v.g.role != Active || v.gone != nil {
		v.mu.Unlock()
		n.unpin(w)
		n.works.put(w)
		elsewhere()
		return
	}
	if v.locks.acquire(&w.hold) {
		v.sequence(w)
	}
	v.mu.Unlock()
}

// roomMargin is kept free in every other pool beyond what is in flight: its
// room is known as of its last answer to a beacon.
const roomMargin = 8 << 20

// hasRoom says whether every pool can take w's new data. Where room is short,
// what frees as much as it takes goes on: overwrites, zeros and duplicates.
func (v *Volume) hasRoom(w *work) bool {
	if len(w.buf) == 0 {
		return true
	}
	c := v.replica.Load()
	if c == nil || !c.Admit(w.op.Start, w.op.Blocks) {
		return false
	}
	peers := *v.node.peers.Load()
	need := int64(len(w.buf)) + v.node.works.used.Load() + roomMargin
	for _, r := range *v.replicas.Load() {
		p := peers[r.Node]
		if p == nil || p.room.Add(-int64(len(w.buf))) >= need {
			continue
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

// errElsewhere ends a slow operation on a node that is not the owner (any more)
// before anything took effect.
var errElsewhere = errors.New("not the owner")

// slow executes what has to read before it writes, under the range lock: writes
// that cover blocks partly, unmaps with ragged edges, WRITE SAME, COMPARE AND WRITE (C1).
func (v *Volume) slow(r *Request, elsewhere func()) {
	first, last := lsfs.BlockNo(r.Off/blockSize), lsfs.BlockNo((r.Off+r.Len+blockSize-1)/blockSize)
	if r.Op == OpCompareAndWrite {
		last = lsfs.BlockNo((r.Off + uint64(len(r.Data)/2) + blockSize - 1) / blockSize)
	}
	h := &hold{start: first, end: last, exclusive: true}
	err := v.lockRange(h)
	if err == nil {
		switch r.Op {
		case OpWrite:
			err = v.overlay(h, r.Off, r.Data)
		case OpUnmap:
			err = v.unmap(h, r.Off, r.Len)
		case OpWriteSame:
			err = v.writeSame(h, r)
		case OpCompareAndWrite:
			err = v.compareAndWrite(h, r)
		default:
			err = errElsewhere
		}
		v.unlockRange(h)
	}
	if errors.Is(err, errElsewhere) {
		elsewhere()
	} else {
		v.end(r, translate(err))
	}
	v.node.flush()
}

// translate keeps the errors of a Request and turns any other into ErrMedium.
func translate(err error) error {
	var known volumeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return known
	case errors.Is(err, context.Canceled):
		return ErrUnavailable
	default:
		return ErrMedium
	}
}

// lockRange takes h and waits for it. It fails on a node that is not the owner.
func (v *Volume) lockRange(h *hold) error {
	v.mu.Lock()
	if v.g.role != Active || v.gone != nil {
		v.mu.Unlock()
		return errElsewhere
	}
	got := v.locks.acquire(h)
	if !got {
		h.ready = make(chan struct{})
	}
	v.mu.Unlock()
	if !got {
		v.node.Kick() // what we wait for may be queued by the same batch
		select {
		case <-h.ready:
		case <-v.node.ctx.Done():
			v.unlockRange(h)
			return ErrUnavailable
		}
	}
	if !v.active.Load() {
		v.unlockRange(h)
		return errElsewhere
	}
	return nil
}

func (v *Volume) unlockRange(h *hold) {
	v.mu.Lock()
	v.locks.release(h, v.sequence)
	v.mu.Unlock()
	v.node.Kick()
}

// execute sequences w inside a range that the caller has locked and waits until
// it is committed.
func (v *Volume) execute(w *work) error {
	done := make(chan error, 1)
	w.then = func(err error) { done <- err }
	w.hold = hold{exclusive: true, work: w} // an empty range: the caller holds the real one
	v.mu.Lock()
	if v.g.role != Active || v.gone != nil {
		v.mu.Unlock()
		v.node.unpin(w)
		v.node.works.put(w)
		return errElsewhere
	}
	v.locks.acquire(&w.hold)
	v.sequence(w)
	v.mu.Unlock()
	v.node.Kick()
	// demote and shut end what is in flight, so this always comes.
	return <-done
}

// write commits whole blocks inside a locked range.
func (v *Volume) write(start lsfs.BlockNo, data []byte) error {
	for len(data) > 0 {
		part := data[:min(len(data), partBytes)]
		w := v.node.works.get(len(part) + blockSize)
		if w == nil {
			return ErrBusy
		}
		v.node.reduce(w, start, part, v.shares(), v.compress.Load())
		if !v.hasRoom(w) {
			v.node.unpin(w)
			v.node.works.put(w)
			return ErrNoSpace
		}
		if err := v.execute(w); err != nil {
			return err
		}
		start += lsfs.BlockNo(len(part) / blockSize)
		data = data[len(part):]
	}
	return nil
}

// overlay writes data at a byte offset: the edges are read and merged first.
func (v *Volume) overlay(h *hold, off uint64, data []byte) error {
	from := uint64(h.start) * blockSize
	buf := make([]byte, uint64(h.end-h.start)*blockSize)
	if err := v.readEdges(h, off, uint64(len(data)), buf); err != nil {
		return err
	}
	copy(buf[off-from:], data)
	return v.write(h.start, buf)
}

// readEdges fills the first and last block of buf, which covers h, where
// [off, off+n) covers them only partly.
func (v *Volume) readEdges(h *hold, off, n uint64, buf []byte) error {
	if off%blockSize != 0 {
		if err := v.fetch(uint64(h.start)*blockSize, buf[:blockSize]); err != nil {
			return err
		}
	}
	if (off+n)%blockSize != 0 && (h.end-h.start > 1 || off%blockSize == 0) {
		if err := v.fetch(uint64(h.end-1)*blockSize, buf[len(buf)-blockSize:]); err != nil {
			return err
		}
	}
	return nil
}

// unmapPart bounds the blocks of one logged unmap, so that no replica is busy
// with one for long.
const unmapPart = 16 << 10 // 64 MiB

// unmap drops whole blocks and writes zeros over the edges.
func (v *Volume) unmap(h *hold, off, n uint64) error {
	end := off + n
	first, last := (off+blockSize-1)/blockSize, end/blockSize
	if first > last { // inside one block
		return v.overlay(h, off, make([]byte, n))
	}
	if head := first*blockSize - off; head > 0 {
		if err := v.overlay(&hold{start: lsfs.BlockNo(first - 1), end: lsfs.BlockNo(first)}, off, make([]byte, head)); err != nil {
			return err
		}
	}
	for first < last {
		part := min(last-first, unmapPart)
		w := v.node.works.get(0)
		if w == nil {
			return ErrBusy
		}
		w.op.Kind, w.op.Start, w.op.Count = lsfs.OpUnmap, lsfs.BlockNo(first), uint32(part)
		if err := v.execute(w); err != nil {
			return err
		}
		first += part
	}
	if tail := end - last*blockSize; tail > 0 {
		return v.overlay(&hold{start: lsfs.BlockNo(last), end: lsfs.BlockNo(last + 1)}, last*blockSize, make([]byte, tail))
	}
	return nil
}

// writeSame stores one logical block over a range. The second and later copies
// of a block are references where duplicates are looked for.
func (v *Volume) writeSame(h *hold, r *Request) error {
	if dedup.IsZero(r.Data) {
		return v.unmap(h, r.Off, r.Len)
	}
	const piece = 1 << 20
	buf := bytes.Repeat(r.Data, piece/len(r.Data))
	off, end := r.Off, r.Off+r.Len
	for off < end {
		n := min(piece-off%piece, end-off)
		first, last := lsfs.BlockNo(off/blockSize), lsfs.BlockNo((off+n+blockSize-1)/blockSize)
		var err error
		if off%blockSize == 0 && n%blockSize == 0 {
			err = v.write(first, buf[:n])
		} else {
			err = v.overlay(&hold{start: first, end: last}, off, buf[:n])
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// compareAndWrite reads, compares and writes under the one lock (C1).
func (v *Volume) compareAndWrite(h *hold, r *Request) error {
	n := len(r.Data) / 2
	from := uint64(h.start) * blockSize
	buf := make([]byte, uint64(h.end-h.start)*blockSize)
	if err := v.fetch(from, buf); err != nil {
		return err
	}
	if !v.mayServe() {
		return errElsewhere
	}
	at := r.Off - from
	for i, b := range r.Data[:n] {
		if buf[at+uint64(i)] != b {
			r.Miscompare = uint64(i)
			return ErrMiscompare
		}
	}
	copy(buf[at:], r.Data[n:])
	return v.write(h.start, buf)
}
