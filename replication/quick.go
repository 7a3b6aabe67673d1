package replication

import (
	"bytes"
	"sync"
)

// quickBytes bounds what is read, changed and written on the caller's goroutine.
const quickBytes = 64 << 10

// quickBuffers are large enough for what quick reads.
var quickBuffers = sync.Pool{New: func() any { return new([quickBytes]byte) }}

// quick executes a small operation that reads before it writes as an ordinary write,
// on the calling goroutine, and says whether it did: when nobody holds its range and
// memory has what it reads, which is the rule for locks, heartbeats and journals.
// So many of them share one commit. On false nothing has happened; elsewhere is
// called as by submitHere.
func (v *Volume) quick(r *Request, elsewhere func()) bool {
	switch r.Op {
	case OpCompareAndWrite, OpWrite, OpOrWrite:
	default:
		return false
	}
	start, end := r.blocks()
	from, size := uint64(start)*blockSize, int(end-start)*blockSize
	c := v.replica.Load()
	if c == nil || size > quickBytes || !v.mayServe() {
		return false
	}
	w := v.node.works.get(size + blockSize)
	if w == nil {
		return false
	}
	w.hold = hold{start: start, end: end, exclusive: true, work: w}
	v.mu.Lock()
	if !v.serves() || !v.locks.free(&w.hold, nil) && !mutant("C1-lock") {
		v.mu.Unlock()
		v.node.works.put(w)
		return false
	}
	w.hold.term = v.term
	v.locks.grant(&w.hold)
	err := v.recheck(r)
	v.mu.Unlock()

	buf := quickBuffers.Get().(*[quickBytes]byte)
	defer quickBuffers.Put(buf)
	block := buf[:size]
	if err == nil {
		// The lease is looked at after the copy: a stale owner must not compare.
		if !c.TryRead(from, block) || !v.mayServe() && !mutant("C1-lease") {
			v.dropQuick(w)
			return false
		}
		err = change(r, block[r.Off-from:][:r.span()])
	}
	if err == nil {
		v.node.reduce(w, start, block, v.shares(), v.compress.Load())
		v.warm(w, block)
		w.op.Warm = true
		if !v.hasRoom(w) {
			err = ErrNoSpace
		}
	}
	if err != nil {
		v.dropQuick(w)
		v.fail(r, err)
		return true
	}
	w.req = r
	v.mu.Lock()
	if v.g.role != Active || v.gone != nil || w.hold.term != v.term {
		v.mu.Unlock()
		w.req = nil
		v.dropQuick(w)
		elsewhere()
		return true
	}
	v.sequence(w)
	v.mu.Unlock()
	return true
}

// dropQuick frees the range and the work of an operation that was not sequenced.
func (v *Volume) dropQuick(w *work) {
	v.letGo(&w.hold)
	v.node.unpin(w)
	v.node.works.put(w)
}

// change makes the medium's data what the request wants them to be.
func change(r *Request, medium []byte) error {
	r.Miscompare = 0
	switch r.Op {
	case OpCompareAndWrite:
		if want := r.Data[:len(medium)]; !bytes.Equal(medium, want) {
			for medium[r.Miscompare] == want[r.Miscompare] {
				r.Miscompare++
			}
			return ErrMiscompare
		}
		copy(medium, r.Data[len(medium):])
	case OpOrWrite:
		for i := range medium {
			medium[i] |= r.Data[i]
		}
	default:
		copy(medium, r.Data)
	}
	return nil
}
