package scsi

import (
	"encoding/binary"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

func readCapacity10(_ *Server, t *Task, b []byte) ([]byte, bool) {
	u := t.state.unit
	b = binary.BigEndian.AppendUint32(b, uint32(min(u.blocks()-1, 0xffffffff)))
	return binary.BigEndian.AppendUint32(b, u.LogicalBlock), true
}

func readCapacity16(_ *Server, t *Task, b []byte) ([]byte, bool) {
	u := t.state.unit
	var d [32]byte
	binary.BigEndian.PutUint64(d[0:], u.blocks()-1)
	binary.BigEndian.PutUint32(d[8:], u.LogicalBlock)
	d[13] = u.physicalExponent()
	if u.Thin {
		d[14] = 0x80 | 0x40 // LBPME, LBPRZ
	}
	return append(b, d[:]...), true
}

// reportLUNs is the reply of REPORT LUNS: what this initiator sees, in
// ascending order. It is also the answer to REPORTED LUNS DATA HAS CHANGED.
func reportLUNs(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		selectField = 2
		allocField  = 6
	)
	if t.state.alloc < 16 {
		return t.deny(invalidField(allocField))
	}
	var units, wellKnown bool
	switch t.CDB[selectField] {
	case 0:
		units = true
	case 1:
		wellKnown = true
	case 2:
		units, wellKnown = true, true
	default:
		return t.deny(invalidField(selectField))
	}
	state := &t.Nexus.state
	state.lunsChanged.Store(false) // before the list is read: a later change is news again
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	if units {
		view := state.view.Load()
		luns := make([]uint16, 0, len(view.units))
		for lun := range view.units {
			luns = append(luns, lun)
		}
		slices.Sort(luns)
		for _, lun := range luns {
			b = binary.BigEndian.AppendUint64(b, cdb.EncodeLUN(lun))
		}
	}
	if wellKnown {
		b = binary.BigEndian.AppendUint64(b, cdb.WellKnownReportLUNs)
	}
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-8))
	return b, true
}

// The defect lists are empty: their headers name the lists and the format asked for.

func readDefectData10(_ *Server, t *Task, b []byte) ([]byte, bool) {
	return append(b, 0, t.CDB[2]&0x1f, 0, 0), true
}

func readDefectData12(_ *Server, t *Task, b []byte) ([]byte, bool) {
	return append(b, 0, t.CDB[1]&0x1f, 0, 0, 0, 0, 0, 0), true
}

// Diagnostic pages: only page 00, the list of pages.

func receiveDiagnostic(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		pageCodeValid = 0x01
		pageField     = 2
	)
	if t.CDB[1]&pageCodeValid != 0 && t.CDB[pageField] != 0 {
		return t.deny(invalidField(pageField))
	}
	return append(b, 0x00, 0, 0, 1, 0x00), true
}

// beginSendDiagnostic is begin of SEND DIAGNOSTIC. The self-test finds what
// stands in the way of every command, and that was checked before: it is good.
func beginSendDiagnostic(_ *Server, t *Task) Verdict {
	const (
		selfTest    = 0x04
		lengthField = 3
	)
	want := uint32(binary.BigEndian.Uint16(t.CDB[3:5]))
	switch {
	case want == 0:
		return Finished
	case t.CDB[1]&selfTest != 0:
		sense := invalidField(lengthField)
		return t.refuse(&sense)
	case want < 4 || t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

func runSendDiagnostic(s *Server, t *Task) {
	list := t.state.data
	if list[0] != 0 {
		t.rejectParameter(s, 0)
		return
	}
	s.conclude(t, nil)
}

// beginStartStop is begin of START STOP UNIT. A stop from one initiator must not
// take a shared unit from the others, so it has no effect but to make stable what
// was acknowledged, unless NO_FLUSH says not to. LOEJ is refused by the table.
func beginStartStop(_ *Server, t *Task) Verdict {
	const (
		start   = 0x01
		noFlush = 0x04
	)
	u := t.state.unit
	if !u.VolatileCache || t.CDB[4]&(start|noFlush) != 0 {
		return Finished
	}
	t.state.length = u.Volume.SizeBytes()
	return Ready
}
