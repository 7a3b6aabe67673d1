package scsi

import (
	"errors"
	"time"
)

const (
	// overwriteBytes and eraseBytes are how much one request of a sanitize operation
	// covers: as much as an initiator may ask of WRITE SAME and UNMAP.
	overwriteBytes = maxWriteSameBytes
	eraseBytes     = 512 << 20
	// sanitizeStep is how often the progress becomes part of the state. What was
	// done since is done again after a take-over.
	sanitizeStep = 2 * time.Second
	// sanitizeRetry is how long a volume that cannot work just now is left alone.
	sanitizeRetry = 200 * time.Millisecond
)

// tendSanitize looks at a sanitize operation after everything that may start or
// end it here: another state, another path, another unit. The node whose ports
// are active/optimized does the work; on each node the SANITIZE commands that
// wait are answered. It does not block.
func (s *Server) tendSanitize(lu *logicalUnit) {
	lu.mu.Lock()
	defer lu.mu.Unlock()
	// Not before the lock: a command that begins to wait meanwhile is of a newer state.
	wipe := lu.state.Load().sanitize
	if len(lu.waiting) > 0 {
		var ended, left []sanitizeWait
		for _, w := range lu.waiting {
			if wipe != nil && wipe.birth == w.birth && !wipe.failed {
				left = append(left, w)
			} else {
				ended = append(ended, w)
			}
		}
		if len(ended) > 0 && s.workers.start(func(<-chan struct{}) { s.answerSanitized(lu, ended) }) {
			lu.waiting = left
		}
	}
	if !lu.wiping && lu.sanitizesHere() {
		lu.wiping = s.workers.start(func(stop <-chan struct{}) { (&sanitizer{s: s, lu: lu, stop: stop}).run() })
	}
}

// sanitizesHere says whether there is an operation and this node does it.
func (lu *logicalUnit) sanitizesHere() bool {
	wipe := lu.state.Load().sanitize
	return wipe != nil && !wipe.failed && !lu.gone.Load() && PathState(lu.path.Load()) == ActiveOptimized
}

// answerSanitized ends SANITIZE commands whose operation this node knows to have ended.
// It may know that before the volume's owner does, so the newest state is asked first:
// what the initiator sends after the answer must not find the unit being sanitized.
func (s *Server) answerSanitized(lu *logicalUnit, ended []sanitizeWait) {
	for _, w := range ended {
		s.changeState(lu, func(now *luState) (*luState, error) {
			switch r := now.sanitize; {
			case r == nil || r.birth != w.birth:
				return nil, nil
			case r.failed:
				return nil, &refusal{senseNotSanitized}
			}
			return nil, errSanitizing
		}, func(_ *luState, err error) {
			if errors.Is(err, errSanitizing) {
				s.waitSanitized(lu, w)
			} else if t := w.task.unpark(); t != nil {
				s.concludeChange(t, err)
			}
		})
	}
}

// sanitizer is the goroutine that does the work of a sanitize operation: one
// request at a time, for nothing else is to be done on the medium meanwhile.
type sanitizer struct {
	s    *Server
	lu   *logicalUnit
	stop <-chan struct{}
}

// run works while there is an operation for this node. Whoever makes one when
// it has decided to end starts another sanitizer.
func (z *sanitizer) run() {
	for {
		z.lu.mu.Lock()
		if z.stopped() || !z.lu.sanitizesHere() {
			z.lu.wiping = false
			z.lu.mu.Unlock()
			return
		}
		z.lu.mu.Unlock()
		if !z.pass() {
			select {
			case <-z.stop:
			case <-time.After(sanitizeRetry):
			}
		}
	}
}

func (z *sanitizer) stopped() bool {
	select {
	case <-z.stop:
		return true
	default:
		return false
	}
}

// pass goes on with the current pass of the operation to its end. It says false
// when that did not work and is to be tried again later.
func (z *sanitizer) pass() bool {
	wipe := z.lu.state.Load().sanitize
	if wipe == nil || wipe.failed {
		return true
	}
	unit := z.lu.config.Load()
	block := wipe.block(wipe.pass, unit.LogicalBlock)
	op, piece := OpWriteSame, uint64(overwriteBytes)
	if block == nil {
		op, piece = OpUnmap, eraseBytes
	}
	done, size := wipe.done, unit.Volume.SizeBytes()
	noted := z.s.now()
	for done < size && z.lu.sanitizesHere() {
		n := min(piece, size-done)
		switch err := z.request(wipe, op, done, n, block); {
		case err == nil:
			done += n
		case errors.Is(err, errSanitizing) || z.stopped():
			return true // the state has moved on: look again
		case errors.Is(err, ErrBusy) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrDeleted):
			z.note(wipe, func(r *sanitizeRecord) *sanitizeRecord { r.done = max(r.done, done); return r })
			return false
		default:
			z.s.log.Error("sanitize operation failed: the volume stays without service until SANITIZE is repeated or its failure mode is left",
				"volume", unit.Name, "err", err)
			return z.note(wipe, func(r *sanitizeRecord) *sanitizeRecord { r.failed = true; return r })
		}
		if now := z.s.now(); now-noted >= sanitizeStep {
			noted = now
			z.note(wipe, func(r *sanitizeRecord) *sanitizeRecord { r.done = max(r.done, done); return r })
		}
	}
	if done < size || !z.lu.sanitizesHere() {
		return true // another node goes on
	}
	if err := z.request(wipe, OpFlush, 0, size, nil); err != nil {
		return errors.Is(err, errSanitizing)
	}
	return z.note(wipe, func(r *sanitizeRecord) *sanitizeRecord {
		if r.pass++; r.pass == r.passes {
			return nil
		}
		r.done = 0
		return r
	})
}

// request makes one request and waits for it. It is bound to this pass of this
// operation: one that is late, after a take-over, is refused and cannot touch
// what initiators wrote since.
func (z *sanitizer) request(wipe *sanitizeRecord, op RequestOp, off, length uint64, block []byte) error {
	ended := make(chan struct{})
	r := &Request{
		Op: op, Off: off, Len: length, Data: block,
		Recheck: func(r *Request) error {
			now := z.lu.state.Load()
			if !wipe.same(now.sanitize) || now.sanitize.pass != wipe.pass {
				return errSanitizing
			}
			r.State = now.id
			return nil
		},
		Done: func(*Request) { close(ended) },
	}
	if err := r.Recheck(r); err != nil {
		return err
	}
	z.lu.config.Load().Volume.Submit(r)
	z.s.backend.Kick()
	select {
	case <-ended:
		return r.Err
	case <-z.stop:
		return ErrBusy
	}
}

// note changes the record of this pass of this operation and waits until the
// change is in force. change is given a copy and returns it, or nil for the end.
func (z *sanitizer) note(wipe *sanitizeRecord, change func(*sanitizeRecord) *sanitizeRecord) bool {
	ended := make(chan error, 1)
	z.s.changeState(z.lu, func(now *luState) (*luState, error) {
		if !wipe.same(now.sanitize) || now.sanitize.pass != wipe.pass {
			return nil, nil
		}
		next := now.edited(eventOther, portID{})
		r := *now.sanitize
		next.sanitize = change(&r)
		return next, nil
	}, func(_ *luState, err error) { ended <- err })
	select {
	case err := <-ended:
		return err == nil
	case <-z.stop:
		return true
	}
}
