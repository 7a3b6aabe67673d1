package replication

import (
	"bytes"
	"context"
	"errors"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// errElsewhere ends a slow operation on a node that is not the owner (any more)
// before anything took effect.
var errElsewhere = errors.New("not the owner")

// slow executes what has to read before it writes, or more than a range, under
// the range lock: writes that cover blocks partly, unmaps with ragged edges, WRITE
// SAME, COMPARE AND WRITE (C1), ORWRITE, clones (C4) and changes of the state (C2).
func (v *Volume) slow(r *Request, elsewhere func()) {
	var err error
	switch r.Op {
	case OpState:
		err = v.changeState(r)
	case OpClone:
		err = v.clone(r)
	default:
		err = v.modify(r)
	}
	if errors.Is(err, errElsewhere) {
		elsewhere()
	} else {
		v.fail(r, err)
	}
	v.node.flush()
}

// span is the bytes of the medium that r is about. COMPARE AND WRITE has them twice
// in its data, and Len is not asked.
func (r *Request) span() uint64 {
	if r.Op == OpCompareAndWrite {
		return uint64(len(r.Data) / 2)
	}
	return r.Len
}

// blocks is the range of blocks that r touches, half open.
func (r *Request) blocks() (first, last lsfs.BlockNo) {
	return lsfs.BlockNo(r.Off / blockSize), lsfs.BlockNo((r.Off + r.span() + blockSize - 1) / blockSize)
}

// modify reads, changes and writes one range under one lock.
func (v *Volume) modify(r *Request) error {
	first, last := r.blocks()
	h := &hold{start: first, end: last, exclusive: true}
	if mutant("C1-lock") {
		h.exclusive = false
	}
	if err := v.lockFor(h, r); err != nil {
		return err
	}
	defer v.unlockRange(h)
	switch r.Op {
	case OpWrite:
		return v.overlay(h, r.Off, r.Data, r.Atomic)
	case OpUnmap:
		return v.unmap(h, r.Off, r.Len)
	case OpWriteSame:
		return v.writeSame(h, r)
	case OpCompareAndWrite, OpOrWrite:
		return v.merge(h, r)
	}
	panic("REQUEST: no such operation") // valid has looked
}

// fail ends r with an error of its own kind; an unreadable block says where it is.
func (v *Volume) fail(r *Request, err error) {
	v.node.failedBy(err) // a flush in the background may have failed, and nothing was appended since
	end := translate(err)
	if end == ErrMedium {
		r.Bad = r.Off &^ (blockSize - 1)
		if bad := (*badBlock)(nil); errors.As(err, &bad) {
			r.Bad = uint64(bad.block) * blockSize
		}
	}
	v.end(r, end)
}

// badBlock is ErrMedium with the place.
type badBlock struct{ block lsfs.BlockNo }

func (b *badBlock) Error() string { return ErrMedium.Error() }
func (b *badBlock) Unwrap() error { return ErrMedium }

// translate keeps the errors of a Request and of its Recheck, and turns any other into
// ErrMedium: another path may have what a store that has stopped had.
func translate(err error) error {
	var known volumeError
	var refused verdict
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refused):
		return refused.error
	case errors.As(err, &known):
		return known
	case errors.Is(err, context.Canceled), errors.Is(err, lsfs.ErrClosed), errors.Is(err, lsfs.ErrPoisoned) && !mutant("W6-stopped"):
		return ErrUnavailable
	default:
		return ErrMedium
	}
}

// lockRange takes h and waits for it. It fails on a node that is not the owner, or
// that was deposed meanwhile: what was read under a hold of an earlier term must
// not be written in a later one.
func (v *Volume) lockRange(h *hold) error { return v.lockFor(h, nil) }

// lockFor is lockRange for a request that depends on the ordered state. While h
// is held the state does not change, so the one look at it covers all that r does.
func (v *Volume) lockFor(h *hold, r *Request) error { return v.lockUntil(h, r, nil) }

// lockUntil is lockFor for a caller who gives up: it fails with context.Canceled when
// done is closed first.
func (v *Volume) lockUntil(h *hold, r *Request, done <-chan struct{}) error {
	v.mu.Lock()
	if !v.serves() {
		v.mu.Unlock()
		return errElsewhere
	}
	h.term = v.term
	got := v.locks.acquire(h)
	if !got {
		h.ready = make(chan struct{})
		v.mu.Unlock()
		v.node.Kick() // what we wait for may be queued by the same batch
		select {
		case <-h.ready:
		case <-done:
			v.unlockRange(h)
			return context.Canceled
		case <-v.node.ctx.Done():
			v.unlockRange(h)
			return ErrUnavailable
		}
		v.mu.Lock()
	}
	var err error
	if !v.serves() || h.term != v.term && !mutant("W1-term") {
		err = errElsewhere
	} else {
		err = v.recheck(r)
	}
	v.mu.Unlock()
	if err != nil {
		v.unlockRange(h)
	}
	return err
}

func (v *Volume) unlockRange(h *hold) {
	v.letGo(h)
	v.node.Kick()
}

// letGo gives a range back: what waited for it goes on, or ends refused.
func (v *Volume) letGo(h *hold) {
	v.mu.Lock()
	v.locks.release(h, v.start)
	refused := v.dropRefused(nil)
	v.mu.Unlock()
	v.node.finish(refused)
}

// execute sequences w inside the range that the caller has locked with h, waits
// until it is committed, and says what name it got. It goes on while the volume is
// being given away: what holds a range is waited for (M6).
func (v *Volume) execute(w *work, h *hold) (lsfs.OpID, error) {
	v.mu.Lock()
	if v.g.role != Active || v.gone != nil || h.term != v.term && !mutant("W1-term") {
		v.mu.Unlock()
		v.node.unpin(w)
		v.node.works.put(w)
		return lsfs.OpID{}, errElsewhere
	}
	wait := v.sequenceInside(w)
	v.mu.Unlock()
	v.node.Kick()
	return wait()
}

// sequenceInside sequences w under a range that is held elsewhere and returns what
// waits for its commit. Called with mu.
func (v *Volume) sequenceInside(w *work) (wait func() (lsfs.OpID, error)) {
	var id lsfs.OpID
	done := make(chan error, 1)
	w.then = func(err error) {
		if err == nil {
			id = w.op.ID
		}
		done <- err
	}
	w.hold = hold{exclusive: true, work: w} // an empty range: it is granted whatever is held
	v.locks.acquire(&w.hold)
	v.sequence(w)
	return func() (lsfs.OpID, error) {
		err := <-done // demote and shut end what is in flight, so this always comes
		return id, err
	}
}

// write commits whole blocks inside a locked range; whole asks for one operation.
func (v *Volume) write(h *hold, start lsfs.BlockNo, data []byte, whole bool) error {
	size := partBytes
	if whole {
		if size = len(data); size > v.node.wholeMax() {
			return ErrNoSpace
		}
	}
	for len(data) > 0 {
		part := data[:min(len(data), size)]
		w := v.node.works.get(len(part) + blockSize)
		if w == nil {
			return ErrBusy
		}
		v.node.reduce(w, start, part, v.shares(), v.compress.Load())
		w.op.Warm = len(part) <= quickBytes
		if !v.hasRoom(w) {
			v.node.unpin(w)
			v.node.works.put(w)
			return ErrNoSpace
		}
		if _, err := v.execute(w, h); err != nil {
			return err
		}
		start += lsfs.BlockNo(len(part) / blockSize)
		data = data[len(part):]
	}
	return nil
}

// part is a piece of h, held by h.
func (h *hold) part(start, end lsfs.BlockNo) *hold {
	return &hold{start: start, end: end, term: h.term}
}

// overlay writes data at a byte offset over all of h: the edges are read and
// merged first. whole asks for one operation.
func (v *Volume) overlay(h *hold, off uint64, data []byte, whole bool) error {
	from := uint64(h.start) * blockSize
	buf := make([]byte, uint64(h.end-h.start)*blockSize)
	if err := v.readEdges(h, off, uint64(len(data)), buf); err != nil {
		return err
	}
	copy(buf[off-from:], data)
	return v.write(h, h.start, buf, whole)
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
		return v.overlay(h, off, make([]byte, n), false)
	}
	if head := first*blockSize - off; head > 0 {
		if err := v.overlay(h.part(lsfs.BlockNo(first-1), lsfs.BlockNo(first)), off, make([]byte, head), false); err != nil {
			return err
		}
	}
	for first < last {
		part := min(last-first, unmapPart)
		if !v.mayUnmap(lsfs.BlockNo(first), uint32(part)) {
			return ErrNoSpace
		}
		w := v.node.works.get(0)
		if w == nil {
			return ErrBusy
		}
		w.op.Kind, w.op.Start, w.op.Count = lsfs.OpUnmap, lsfs.BlockNo(first), uint32(part)
		if _, err := v.execute(w, h); err != nil {
			return err
		}
		first += part
	}
	if tail := end - last*blockSize; tail > 0 {
		return v.overlay(h.part(lsfs.BlockNo(last), lsfs.BlockNo(last+1)), last*blockSize, make([]byte, tail), false)
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
	buf := bytes.Repeat(r.Data, int(min(piece, r.Len))/len(r.Data))
	off, end := r.Off, r.Off+r.Len
	for off < end {
		n := min(piece-off%piece, end-off)
		first, last := lsfs.BlockNo(off/blockSize), lsfs.BlockNo((off+n+blockSize-1)/blockSize)
		var err error
		if off%blockSize == 0 && n%blockSize == 0 {
			err = v.write(h, first, buf[:n], false)
		} else {
			err = v.overlay(h.part(first, last), off, buf[:n], false)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// merge reads, compares or merges, and writes under the one lock (C1).
func (v *Volume) merge(h *hold, r *Request) error {
	from := uint64(h.start) * blockSize
	buf := make([]byte, uint64(h.end-h.start)*blockSize)
	if err := v.fetch(from, buf); err != nil {
		return err
	}
	if !v.mayServe() && !mutant("C1-lease") {
		return errElsewhere // what was read may be old: it must not be compared with
	}
	if err := change(r, buf[r.Off-from:][:r.span()]); err != nil {
		return err
	}
	return v.write(h, h.start, buf, r.Atomic || r.Op == OpCompareAndWrite && len(buf) <= v.node.wholeMax())
}
