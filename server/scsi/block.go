package scsi

import "github.com/twinsan/twinsan/server/scsi/cdb"

// lengthField is where the transfer length stands in a CDB, for field pointers.
func lengthField(op byte) uint16 {
	switch cdb.Size(op) {
	case 6:
		return 4
	case 10:
		return 7
	case 12:
		return 6
	default:
		return 10
	}
}

// within makes the checks of a block command that follow those of the CDB, in
// order: range, length limit (in blocks), write protection. It sets off and
// length.
func (t *Task) within(lba, blocks, limit uint64, field uint16) bool {
	u := t.state.unit
	capacity := u.blocks()
	if lba >= capacity || blocks > capacity-lba {
		t.refuse(&senseLBA)
		return false
	}
	if blocks > limit {
		sense := invalidField(field)
		t.refuse(&sense)
		return false
	}
	if !t.writable() {
		return false
	}
	t.state.off = lba << u.shift
	t.state.length = blocks << u.shift
	return true
}

// writable refuses commands that write on a read-only unit, or on one that is
// write protected by the control mode page.
func (t *Task) writable() bool {
	st := &t.state
	switch {
	case !st.cmd.writes || !st.protected:
		return true
	case st.unit.ReadOnly || st.itl.readOnly:
		t.refuse(&senseProtected)
	default:
		t.refuse(&senseSoftware)
	}
	return false
}

// outExpected is the Data-Out that the initiator offers.
func (t *Task) outExpected() uint32 {
	if t.Write {
		return t.Expected
	}
	return 0
}

// misfit refuses a command whose Data-Out does not fit its CDB, before any of
// it is used. Transfer stays, so that the residual tells what was asked for.
func (t *Task) misfit() Verdict {
	t.OutLen = 0
	t.check(&senseUnitData)
	return Finished
}

// beginRead is begin of READ. When the initiator expects less than the CDB
// asks for, only that much is read.
func beginRead(_ *Server, t *Task) Verdict {
	lba, blocks := cdb.Range(&t.CDB)
	if !t.within(lba, uint64(blocks), t.state.unit.transferMax, lengthField(t.CDB[0])) {
		return Finished
	}
	t.Transfer = uint32(t.state.length)
	if t.Read {
		t.InLen = min(t.Transfer, t.Expected)
	}
	t.state.length = uint64(t.InLen)
	if t.InLen == 0 {
		return Finished
	}
	return Ready
}

// tryRead answers a READ from memory when the volume can.
func (t *Task) tryRead() bool {
	st := &t.state
	if st.length%512 != 0 || t.fua() && st.unit.VolatileCache {
		return false
	}
	return st.unit.Volume.TryRead(st.off, t.In[:st.length])
}

// fua says whether a command of READ's and WRITE's form asks for stable storage.
func (t *Task) fua() bool {
	return t.CDB[1]&cdb.FUA != 0 && cdb.Size(t.CDB[0]) != 6
}

func runRead(s *Server, t *Task) {
	st := &t.state
	if st.length%512 != 0 {
		// The initiator expects a part of a sector: read whole ones, copy what fits.
		st.mode = pieceCopy
		runPieces(s, t)
		return
	}
	t.Req.FUA = t.fua()
	t.Req.Borrowed = false
	t.submit(OpRead, st.off, st.length, t.In[:st.length])
}

// beginWrite is begin of WRITE. When less data is offered than the CDB asks
// for, the whole blocks of it are written; a part of a block is never written.
func beginWrite(_ *Server, t *Task) Verdict {
	lba, blocks := cdb.Range(&t.CDB)
	if !t.within(lba, uint64(blocks), t.state.unit.transferMax, lengthField(t.CDB[0])) {
		return Finished
	}
	t.Transfer = uint32(t.state.length)
	t.OutLen = min(t.Transfer, t.outExpected())
	if t.OutLen%t.state.unit.LogicalBlock != 0 {
		return t.misfit()
	}
	t.state.length = uint64(t.OutLen)
	if t.OutLen == 0 {
		return Finished
	}
	return WantData
}

func runWrite(_ *Server, t *Task) {
	t.Req.FUA = t.fua()
	t.Req.Borrowed = t.OutBorrowed
	t.submit(OpWrite, t.state.off, t.state.length, t.state.data)
}

// beginCompareAndWrite is begin of COMPARE AND WRITE, whose data are the
// blocks to compare and then as many to write.
func beginCompareAndWrite(_ *Server, t *Task) Verdict {
	const countField = 13
	lba, _ := cdb.Range(&t.CDB)
	u := t.state.unit
	blocks := uint64(t.CDB[countField])
	if !t.within(lba, blocks, u.compareMax, countField) {
		return Finished
	}
	want := uint32(2 * t.state.length)
	if t.outExpected() != want {
		sense := invalidField(countField)
		return t.refuse(&sense)
	}
	t.Transfer, t.OutLen = want, want
	if want == 0 {
		return Finished
	}
	return WantData
}

func runCompareAndWrite(s *Server, t *Task) {
	t.ownData()
	t.Req.FUA = t.fua()
	t.Req.Borrowed = false
	t.submit(OpCompareAndWrite, t.state.off, t.state.length, t.state.data)
}

// beginSynchronize is begin of SYNCHRONIZE CACHE. Length 0 is to the end.
func beginSynchronize(_ *Server, t *Task) Verdict {
	lba, blocks := cdb.Range(&t.CDB)
	if !t.within(lba, uint64(blocks), 1<<32, 0) {
		return Finished
	}
	if blocks == 0 {
		u := t.state.unit
		t.state.length = (u.blocks() - lba) << u.shift
	}
	return Ready
}

func runSynchronize(s *Server, t *Task) {
	const immediate = 0x02
	st := &t.state
	if t.CDB[1]&immediate != 0 {
		if !st.unit.VolatileCache {
			// What was acknowledged is stable: there is nothing to start.
			s.conclude(t, nil)
			return
		}
		if lu := st.itl.lu; !lu.flushing.Swap(true) {
			// One at a time: a second one meanwhile is answered when it is done.
			st.unit.Volume.Submit(&Request{
				Op: OpFlush, Off: st.off, Len: st.length,
				Done: func(*Request) { lu.flushing.Store(false) },
			})
			s.conclude(t, nil)
			return
		}
	}
	t.Req.FUA = false
	t.Req.Borrowed = false
	t.submit(OpFlush, st.off, st.length, nil)
}
