package scsi

import (
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

const (
	// copyBudget is how long WRITE USING TOKEN works before it answers with what it
	// has done; the host goes on from there.
	copyBudget = 4 * time.Second
	// copyBudgetMax is the same in the background. It is below tokenGrace.
	copyBudgetMax = 20 * time.Second
)

func beginUseToken(_ *Server, t *Task) Verdict {
	if !t.writable() {
		return Finished
	}
	return beginCopyList(t, cdb.WriteUsingTokenHeaderBytes, cdb.WriteUsingTokenHeaderBytes+16*maxTokenRanges)
}

// useToken is a WRITE USING TOKEN at work. The token's data is a stream, its
// ranges one after the other; it goes to the destination's ranges in turn.
type useToken struct {
	op     *operation
	ranges []byteRange // destination
	token  [cdb.TokenBytes]byte
	zero   bool // the block device zero token: any number of zeros
	delete bool
	offset uint64       // bytes into the token's data
	lu     *logicalUnit // that made the token; nil for zeros
	source []tokenRange // the token's ranges
	want   uint64       // bytes to be written
	less   bool         // the token has not as many as were asked for
	pos    uint64       // bytes written
	err    error
	copier copier
}

func runUseToken(s *Server, t *Task) {
	x := &useToken{op: &operation{known: true, keep: true}}
	if sense := x.parse(s, t); sense != nil {
		t.check(sense)
		s.finish(t)
		return
	}
	const idField = 6
	x.op.id = be32(t.CDB[idField:])
	if !s.beginCopy(x.op, t) {
		return
	}
	x.op.detach()
	if x.zero {
		x.begin()
		return
	}
	s.changeState(x.lu, x.open, x.opened)
}

// parse checks a parameter list up to what only the token's record can tell.
func (x *useToken) parse(s *Server, t *Task) *cdb.Sense {
	const offsetField = 8
	u := t.state.unit
	w, field, ok := cdb.ParseWriteUsingToken(t.state.data)
	if !ok {
		sense := invalidParameter(field)
		return &sense
	}
	var sense *cdb.Sense
	x.ranges, x.want, sense = u.blockRanges(w.Ranges, w.Claimed, cdb.WriteUsingTokenHeaderBytes)
	if sense != nil {
		return sense
	}
	x.delete, x.op.immed = w.Delete, w.Immediate
	copy(x.token[:], w.Token)
	token := cdb.ParseToken(x.token[:])
	switch {
	case !token.LengthOK:
		return &senseTokenLength
	case token.Type == cdb.RODZero:
		x.zero = true
		return nil
	case token.Type != cdb.RODPointInTime:
		return &senseTokenUnknown
	}
	if w.Offset > (1<<64-1)>>u.shift {
		sense := invalidParameter(offsetField)
		return &sense
	}
	x.offset = w.Offset << u.shift
	lu, err := s.creator(&token)
	if err != nil {
		return &err.(*refusal).sense
	}
	x.lu = lu
	return nil
}

// open is an edit: it finds the token's record and, when that is due, counts the use.
func (x *useToken) open(now *luState) (*luState, error) {
	const offsetField, tokenField = 8, 16
	s := x.op.s
	r, err := s.valid(x.lu, now, &x.token)
	if err != nil {
		return nil, err
	}
	if r.shift != x.op.unit.shift {
		return nil, &refusal{invalidParameter(tokenField)}
	}
	total := r.bytes()
	if x.offset >= total {
		return nil, &refusal{invalidParameter(offsetField)}
	}
	x.source = r.ranges
	x.less = x.want > total-x.offset
	if x.less {
		x.want = (total - x.offset) &^ (uint64(x.op.unit.LogicalBlock) - 1)
	}
	if x.lu.tokens.idle(r, s.now()) < r.lifetime()/4 {
		return nil, nil
	}
	return now.setToken(r, func(r *tokenRecord) { r.uses++ }), nil
}

func (x *useToken) opened(after *luState, err error) {
	if err != nil {
		x.op.finishError(x.fromSource(err))
		return
	}
	x.lu.tokens.survey(after, x.op.s.now())
	x.begin()
}

// fromSource is an error of the unit that made the token, as the host shall see
// it: its own path to this unit is not at fault.
func (x *useToken) fromSource(err error) error {
	if err == ErrUnavailable || err == ErrDeleted {
		return &refusal{senseUnreachable}
	}
	return err
}

func (x *useToken) begin() {
	s := x.op.s
	c := &x.copier
	c.s, c.stopped, c.done = s, x.op.stopped, x.copied
	c.to = s.inName(x.op.itl, AccessWrite)
	if !x.zero {
		c.from = place{volume: x.lu.config.Load().Volume, base: replication.AnnexOff}
	}
	c.until = x.op.started + copyBudget
	if x.op.immed {
		c.until = x.op.started + copyBudgetMax
	}
	x.next()
}

// next copies the next run that is contiguous on both sides, or ends.
func (x *useToken) next() {
	if x.pos == x.want {
		x.close(nil)
		return
	}
	c := &x.copier
	to, left := locate(x.ranges, x.pos)
	c.dst, c.length = to, min(left, x.want-x.pos)
	if !x.zero {
		from, left := locateToken(x.source, x.offset+x.pos)
		c.src, c.length = from, min(c.length, left)
	}
	c.start()
}

// locate finds byte pos of the ranges one after the other: where it lies, and how
// much of its range is left.
func locate(ranges []byteRange, pos uint64) (off, left uint64) {
	for _, r := range ranges {
		if pos < r.bytes {
			return r.off + pos, r.bytes - pos
		}
		pos -= r.bytes
	}
	return 0, 0
}

func locateToken(ranges []tokenRange, pos uint64) (off, left uint64) {
	for _, r := range ranges {
		if pos < r.bytes {
			return r.off + pos, r.bytes - pos
		}
		pos -= r.bytes
	}
	return 0, 0
}

func (x *useToken) copied(err error) {
	c := &x.copier
	x.pos += c.moved
	x.op.bytes.Store(x.pos)
	switch {
	case err != nil && c.failedFrom:
		x.close(x.fromSource(err))
	case err != nil:
		x.close(err)
	case c.moved < c.length:
		x.close(nil) // out of time
	default:
		x.next()
	}
}

// close ends the use. What was copied counts only if the token was still valid
// afterwards: its data is removed only after its record says so.
func (x *useToken) close(err error) {
	x.err = err
	if x.zero {
		x.end(err)
		return
	}
	s, gone := x.op.s, false
	s.changeState(x.lu, func(now *luState) (*luState, error) {
		id := cdb.ParseToken(x.token[:]).ID
		r := now.token(id)
		gone = false
		switch {
		case r == nil || !r.status.usable():
			return nil, &refusal{x.lu.tokens.why(id)}
		case x.err != nil || x.pos < x.want:
			return nil, nil
		case x.delete:
			gone = true
			return nil, nil
		case r.status == tokenReady && x.offset+x.pos == r.bytes():
			return now.setToken(r, func(r *tokenRecord) { r.status = tokenSpent }), nil
		}
		return nil, nil
	}, func(_ *luState, err error) {
		switch {
		case x.err != nil:
			err = x.err
		case err != nil:
			x.pos = 0
			x.op.bytes.Store(0)
			err = x.fromSource(err)
		case gone:
			s.removeToken(x.lu, cdb.ParseToken(x.token[:]).ID, tokenDeleted, func() { x.end(nil) })
			return
		}
		x.end(err)
	})
}

func (x *useToken) end(err error) {
	x.op.segments.Store(1)
	switch {
	case err != nil:
		x.op.finishError(err)
	case x.less || x.pos < x.want:
		x.op.finish(&copyResult{state: copyPartial})
	default:
		x.op.finish(&copyResult{state: copyGood})
	}
}
