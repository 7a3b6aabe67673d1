package replication

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"

	"github.com/twinsan/twinsan/lsfs"
)

// The ordered state as it is stored and shipped: its name, then the value. An
// empty one is that of a new volume. Part of the disk and wire formats, do not change.
//
//	0  u64 epoch   8  u64 seq   16  value
//
// all numbers little-endian.
const stateName = 16

// stated is one value of the ordered state with its name. It is never modified.
type stated struct {
	id    StateID
	value []byte
}

// parseState reads the stored form; what is too short to have a name is empty.
func parseState(b []byte) stated {
	if len(b) < stateName {
		return stated{}
	}
	return stated{
		id:    StateID{Epoch: lsfs.Epoch(binary.LittleEndian.Uint64(b)), Seq: lsfs.Seq(binary.LittleEndian.Uint64(b[8:]))},
		value: b[stateName:len(b):len(b)],
	}
}

// nameState writes the operation's own name into the state that it brings.
func nameState(op *lsfs.Op) {
	binary.LittleEndian.PutUint64(op.State, uint64(op.ID.Epoch))
	binary.LittleEndian.PutUint64(op.State[8:], uint64(op.ID.Seq))
}

// watcher is the device server's function that learns of the ordered state. Its
// mutex is held while the function runs and is taken before Volume.mu.
type watcher struct {
	mu sync.Mutex
	f  func(id StateID, value []byte, live bool)
}

// news is a value that has not been brought to the watcher yet.
type news struct {
	*stated
	live bool
}

// Watch sets the function that learns of the ordered state (see the device
// server's Volume). It may come before the local copy exists: then the empty
// value is the newest, and the copy's is brought when it is there.
func (v *Volume) Watch(f func(id StateID, value []byte, live bool)) {
	v.watch.mu.Lock()
	defer v.watch.mu.Unlock()
	v.watch.f = f
	if f != nil {
		s := v.stated.Load()
		f(s.id, s.value, false)
	}
}

// restate notes the value in force; announce brings it to the watcher. live is
// false when it does not follow from the one before by an operation of the
// stream. b is kept. Called with mu.
func (v *Volume) restate(b []byte, live bool) {
	s := parseState(b)
	if s.id == v.newest {
		return
	}
	v.newest = s.id
	v.news = append(v.news, news{&s, live})
}

// announce brings what restate noted to the watcher, in order, and makes it the
// value against which requests are held. Where that matters (the owner), nothing
// can be sequenced meanwhile: the caller holds the whole volume, or is not active yet.
func (v *Volume) announce() {
	v.watch.mu.Lock()
	defer v.watch.mu.Unlock()
	told := false
	for {
		v.mu.Lock()
		list := v.news
		v.news = nil
		if told && len(list) == 0 && len(v.held) > 0 && v.gone == nil {
			v.node.spawn(v.retryHeld) // some may wait for just this
		}
		v.mu.Unlock()
		if len(list) == 0 {
			return
		}
		for _, s := range list {
			if v.watch.f != nil {
				v.watch.f(s.id, s.value, s.live)
			}
			v.stated.Store(s.stated)
		}
		told = true
	}
}

// recheck says whether r may still be executed: at all (Z1, Z2), and under the value in
// force (C2). Called with mu.
func (v *Volume) recheck(r *Request) error {
	if r == nil {
		return nil
	}
	if err := v.outlived(r); err != nil {
		return verdict{err}
	}
	if r.Recheck == nil || r.State == v.stated.Load().id || mutant("C2-recheck") {
		return nil
	}
	if err := r.Recheck(r); err != nil {
		return verdict{err}
	}
	return nil
}

// verdict is what Recheck ended a request with: the device server's own word,
// which it gets back as it is.
type verdict struct{ error }

func (v verdict) Unwrap() error { return v.error }

// refuseMoved is the Recheck of a forwarded request: only the node that accepted
// it can look at it anew.
func refuseMoved(*Request) error { return errMoved }

// changeState replaces the ordered state. It holds the whole volume: what was
// sequenced before it has committed, and what comes later waits and is held
// against the new value, which the watcher knows by then.
func (v *Volume) changeState(r *Request) error {
	h := &hold{end: lsfs.AnnexStart + lsfs.AnnexBlocks, exclusive: true}
	if mutant("C2-hold") {
		h.end = 0
	}
	if err := v.lockFor(h, r); err != nil {
		return err
	}
	defer v.unlockRange(h)
	if v.stated.Load().id != r.State && !mutant("C2-from") {
		if !v.mayServe() {
			return errElsewhere // what is known here may be old: it must not be compared with
		}
		return ErrStateMoved
	}
	w := v.node.works.get(stateName + len(r.Data))
	if w == nil {
		return ErrBusy
	}
	w.buf = append(append(w.buf[:0], make([]byte, stateName)...), r.Data...)
	w.op.Kind, w.op.Start, w.op.Count, w.op.State = lsfs.OpState, 0, 0, w.buf
	id, err := v.execute(w, h)
	if err == nil {
		v.announce() // retireLocked has noted it
		r.State = id
	}
	return err
}

// readState reads the ordered state: it is linearizable, for the lease is tested
// after the value was taken (R1), and a value is in force only once it has committed.
func (v *Volume) readState(r *Request, elsewhere func()) {
	take := func() bool {
		s := v.stated.Load()
		r.State, r.Value = s.id, s.value
		return v.mayServe()
	}
	if take() {
		v.end(r, nil)
		return
	}
	v.node.spawn(func() {
		err := v.waitLease()
		if err == nil && !take() {
			err = ErrBusy
		}
		if errors.Is(err, errElsewhere) {
			elsewhere()
		} else {
			v.end(r, err)
		}
		v.node.flush()
	})
}

// sequencedState is the newest ordered state among the operations that have a
// number: in flight, or else in the copy. Called with mu.
func (v *Volume) sequencedState(c Copy) []byte {
	for i := v.flight.len() - 1; i >= 0; i-- {
		if w := v.flight.at(i); w.op.Kind == lsfs.OpState {
			return bytes.Clone(w.op.State)
		}
	}
	return c.Meta().State
}
