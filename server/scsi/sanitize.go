package scsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// sanitizeRecord is a sanitize operation as part of the ordered state: every
// node refuses what does not work during it, and any node can go on with it.
// It is never modified.
//
//	absent -> under way (done rises, pass after pass) -> absent
//	                                                  -> failed -> absent (EXIT FAILURE MODE)
//	                                                            -> under way (another SANITIZE)
//
// What it erases is the unit's medium: snapshots and clones are other media.
type sanitizeRecord struct {
	birth        StateID // of the state that it was made from: names the operation
	unrestricted bool    // AUSE: EXIT FAILURE MODE works
	invert       bool    // every other pass writes the inverted pattern
	failed       bool
	passes, pass uint8  // of writing: all, and those that are complete
	done         uint64 // bytes of the current pass that are complete
	pattern      []byte // what one logical block begins with; none: block erase
}

const maxPattern = 4096

// Section 7 of the state; numbers are big-endian. Part of the wire and disk
// formats, do not change.
//
//	0   u64, u64  epoch and sequence of birth
//	16  u8        bits: 0 unrestricted, 1 invert, 2 failed
//	17  u8, u8    passes, pass
//	19  u64       done
//	27  ...       pattern
const sanitizeBytes = 27

func (st *luState) putSanitize(b []byte) []byte {
	r := st.sanitize
	if r == nil {
		return b
	}
	b = binary.BigEndian.AppendUint64(b, uint64(r.birth.Epoch))
	b = binary.BigEndian.AppendUint64(b, uint64(r.birth.Seq))
	var bits byte
	for i, set := range [...]bool{r.unrestricted, r.invert, r.failed} {
		if set {
			bits |= 1 << i
		}
	}
	b = append(b, bits, r.passes, r.pass)
	b = binary.BigEndian.AppendUint64(b, r.done)
	return append(b, r.pattern...)
}

func (st *luState) getSanitize(b []byte) error {
	if len(b) < sanitizeBytes || len(b) > sanitizeBytes+maxPattern || b[16] > 7 || b[18] >= b[17] {
		return fmt.Errorf("%w: sanitize operation", errState)
	}
	r := &sanitizeRecord{
		unrestricted: b[16]&1 != 0, invert: b[16]&2 != 0, failed: b[16]&4 != 0,
		passes: b[17], pass: b[18],
		done: binary.BigEndian.Uint64(b[19:]),
	}
	getNumber(&r.birth.Epoch, b)
	getNumber(&r.birth.Seq, b[8:])
	if len(b) > sanitizeBytes {
		r.pattern = slices.Clone(b[sanitizeBytes:])
	}
	st.sanitize = r
	return nil
}

// block is the logical block that a pass writes, nil for zeros. The last pass
// is never inverted.
func (r *sanitizeRecord) block(pass uint8, size uint32) []byte {
	if len(r.pattern) == 0 {
		return nil
	}
	b := make([]byte, size)
	for n := 0; n < len(b); {
		n += copy(b[n:], r.pattern)
	}
	if r.invert && (r.passes-1-pass)%2 != 0 {
		for i := range b {
			b[i] = ^b[i]
		}
	}
	if allZero(b) {
		return nil
	}
	return b
}

// same says whether another record is of the same operation.
func (r *sanitizeRecord) same(other *sanitizeRecord) bool {
	return other != nil && other.birth == r.birth && !other.failed
}

// admits says whether a command works while the unit is sanitized or after that
// failed (SBC-4 "Commands allowed during sanitize", and the reports about paths
// and logs, which do not touch the medium).
func (r *sanitizeRecord) admits(c *command) bool {
	if c == nil {
		return false
	}
	switch c.op {
	case cdb.Inquiry, cdb.RequestSense, cdb.ReportLUNs, cdb.LogSense, cdb.ReadCapacity10:
		return true
	case cdb.ServiceActionIn16:
		return c.action == cdb.ActionReadCapacity16
	case cdb.MaintenanceIn:
		switch c.action {
		case cdb.ActionReportTargetPorts, cdb.ActionReportOpcodes, cdb.ActionReportTaskManagement:
			return true
		}
	case cdb.Sanitize:
		return r.failed
	}
	return false
}

// sense is what other commands get.
func (r *sanitizeRecord) sense(u *unitConfig) cdb.Sense {
	if r.failed {
		return senseNotSanitized
	}
	s := senseSanitizing
	size := float64(u.Volume.SizeBytes())
	part := (float64(r.pass) + min(float64(r.done)/size, 1)) / float64(r.passes)
	s.Progress, s.HasProgress = uint16(min(part*65536, 65535)), true
	return s
}

// errSanitizing ends a request whose turn came after a sanitize operation began.
var errSanitizing = errors.New("the medium is being sanitized")

// sanitizeBars says whether a command that was begun before must not start any
// more. SANITIZE itself looks at the state when it changes it.
func (lu *logicalUnit) sanitizeBars(c *command) bool {
	wipe := lu.state.Load().sanitize
	return wipe != nil && !wipe.admits(c)
}

// Bits of byte 1 of SANITIZE.
const (
	sanitizeImmediate    = 0x80
	sanitizeUnrestricted = 0x20
)

// beginSanitize is begin of SANITIZE, all service actions.
func beginSanitize(_ *Server, t *Task) Verdict {
	const lengthField = 7
	want := uint32(binary.BigEndian.Uint16(t.CDB[lengthField:]))
	fits := want == 0
	if t.state.cmd.action == cdb.ActionSanitizeOverwrite {
		fits = want > 4 && want <= 4+t.state.unit.LogicalBlock
	}
	if !fits {
		sense := invalidField(lengthField)
		return t.refuse(&sense)
	}
	if !t.writable() {
		return Finished
	}
	if want == 0 {
		return Ready
	}
	if t.outExpected() < want {
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

// parseOverwrite reads the parameter list of the OVERWRITE service action, of 5 to
// 4 plus block bytes:
//
//	0  bit 7 INVERT, bits 6-5 TEST, bits 4-0 OVERWRITE COUNT
//	1  reserved
//	2  u16 INITIALIZATION PATTERN LENGTH
//	4  INITIALIZATION PATTERN
//
// When it is not ok field is the byte in error.
func parseOverwrite(b []byte, block uint32) (r sanitizeRecord, field uint16, ok bool) {
	n := int(binary.BigEndian.Uint16(b[2:]))
	switch {
	case b[0]&0x60 != 0 || b[0]&0x1f == 0:
		return r, 0, false
	case b[1] != 0:
		return r, 1, false
	case n == 0 || n > int(block) || n > len(b)-4:
		return r, 2, false
	}
	r.invert, r.passes = b[0]&0x80 != 0, b[0]&0x1f
	r.pattern = append([]byte(nil), b[4:4+n]...)
	return r, 0, true
}

// runSanitize makes the operation part of the ordered state; from there on it
// goes on whatever happens to this task, session or node. Without IMMED the
// task waits for the end.
func runSanitize(s *Server, t *Task) {
	st := &t.state
	lu, unit, itl := st.itl.lu, st.unit, st.itl
	next := sanitizeRecord{passes: 1}
	if t.OutLen > 0 {
		r, field, ok := parseOverwrite(st.data, unit.LogicalBlock)
		if !ok {
			t.rejectParameter(s, field)
			return
		}
		next = r
	}
	next.unrestricted = t.CDB[1]&sanitizeUnrestricted != 0
	immediate := t.CDB[1]&sanitizeImmediate != 0
	exit := st.cmd.action == cdb.ActionSanitizeExit
	var birth StateID
	s.changeState(lu, func(now *luState) (*luState, error) {
		g := now.grantTo(itl.nexus.id())
		old := now.sanitize
		switch {
		case t.Aborted.Load():
			return nil, ErrBusy // the status is the abort's
		case g.denies(AccessWrite):
			return nil, ErrReserved
		case g.protected:
			return nil, ErrReadOnly
		case old != nil && !old.failed:
			return nil, &refusal{old.sense(unit)}
		case exit && old == nil:
			return nil, nil
		case old != nil && !old.unrestricted && (exit || next.unrestricted):
			// Only a sanitize operation that succeeds ends the failure of a restricted one.
			return nil, &refusal{invalidField(1)}
		}
		changed := now.edited(eventOther, portID{})
		changed.sanitize = nil
		if !exit {
			made := next
			made.birth = now.id
			birth = now.id
			changed.sanitize = &made
		}
		return changed, nil
	}, func(_ *luState, err error) {
		if err != nil || exit || immediate {
			s.concludeChange(t, err)
			return
		}
		s.awaitSanitized(t, birth)
	})
}

// sanitizeWait is a SANITIZE command that waits for the end of its operation.
type sanitizeWait struct {
	task  *parking
	birth StateID
}

// awaitSanitized ends the task when the operation that was born from a state
// has ended.
func (s *Server) awaitSanitized(t *Task, birth StateID) {
	if p := t.park(s); p != nil {
		s.waitSanitized(t.state.itl.lu, sanitizeWait{p, birth})
	}
}

func (s *Server) waitSanitized(lu *logicalUnit, w sanitizeWait) {
	lu.mu.Lock()
	lu.waiting = append(lu.waiting, w)
	lu.mu.Unlock()
	s.tendSanitize(lu) // it may have ended before
}
