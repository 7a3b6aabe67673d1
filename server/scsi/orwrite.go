package scsi

import "encoding/binary"

// runOrWrite is run of ORWRITE(16), whose begin is that of WRITE: the volume
// reads, ORs and writes as one step against all else on the range.
func runOrWrite(_ *Server, t *Task) {
	t.ownData()
	t.Req.FUA = t.fua()
	t.Req.Borrowed = false
	t.submit(OpOrWrite, t.state.off, t.state.length, t.state.data)
}

// beginWriteAtomic is begin of WRITE ATOMIC(16). A part of the data is never
// written, so all of it must be offered.
func beginWriteAtomic(_ *Server, t *Task) Verdict {
	const (
		boundaryField = 10
		countField    = 12
	)
	u := t.state.unit
	lba := binary.BigEndian.Uint64(t.CDB[2:])
	blocks := uint64(binary.BigEndian.Uint16(t.CDB[countField:]))
	if !t.within(lba, blocks, u.atomicMax, countField) {
		return Finished
	}
	if binary.BigEndian.Uint16(t.CDB[boundaryField:]) != 0 {
		sense := invalidField(boundaryField) // no boundaries: B0 says so
		return t.refuse(&sense)
	}
	t.Transfer = uint32(t.state.length)
	if t.outExpected() < t.Transfer {
		return t.misfit()
	}
	if t.OutLen = t.Transfer; t.OutLen == 0 {
		return Finished
	}
	return WantData
}

// runWriteAtomic is run of WRITE ATOMIC(16); submit marks the request.
func runWriteAtomic(_ *Server, t *Task) {
	t.Req.FUA = t.fua()
	t.Req.Borrowed = t.OutBorrowed
	t.submit(OpWrite, t.state.off, t.state.length, t.state.data)
}
