package scsi

import (
	"bytes"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// pieceMode is what a command that reads in pieces does with what it read.
type pieceMode uint8

const (
	pieceDiscard  pieceMode = iota // VERIFY BYTCHK=0: it was readable
	pieceCompare                   // VERIFY BYTCHK=1: compare with the data
	pieceRepeat                    // VERIFY BYTCHK=3: compare with one block again and again
	pieceCopy                      // READ of a part of a sector: copy to In
	piecePreFetch                  // PRE-FETCH: as discard, and errors do not matter
)

// beginVerify is begin of VERIFY.
func beginVerify(_ *Server, t *Task) Verdict {
	const byteCheckField = 1
	st := &t.state
	u := st.unit
	check := cdb.ByteCheck(&t.CDB)
	if check == 2 {
		sense := invalidField(byteCheckField)
		sense.Bit, sense.HasBit = 2, true
		return t.refuse(&sense)
	}
	lba, blocks := cdb.Range(&t.CDB)
	if !t.within(lba, uint64(blocks), u.transferMax, lengthField(t.CDB[0])) {
		return Finished
	}
	if blocks == 0 {
		return Finished
	}
	switch check {
	case 0:
		st.mode = pieceDiscard
		return Ready
	case 1:
		st.mode = pieceCompare
		t.Transfer = uint32(st.length)
	case 3:
		st.mode = pieceRepeat
		t.Transfer = u.LogicalBlock
	}
	if t.outExpected() < t.Transfer {
		return t.misfit()
	}
	t.OutLen = t.Transfer
	return WantData
}

// beginWriteAndVerify is begin of WRITE AND VERIFY. Its data are the blocks to
// write, so BYTCHK=3 (one block for all) has no meaning here.
func beginWriteAndVerify(s *Server, t *Task) Verdict {
	check := cdb.ByteCheck(&t.CDB)
	if check > 1 {
		sense := invalidField(1)
		sense.Bit, sense.HasBit = 2, true
		return t.refuse(&sense)
	}
	if check == 1 {
		t.state.mode = pieceCompare
	}
	return beginWrite(s, t)
}

func runWriteAndVerify(s *Server, t *Task) {
	st := &t.state
	if !t.takeScratch(s) {
		return
	}
	t.ownData()
	st.step = stepWritten
	t.Req.FUA = true
	t.Req.Borrowed = false
	t.submit(OpWrite, st.off, st.length, st.data)
}

func stepWritten(s *Server, t *Task) {
	if err := t.Req.Err; err != nil || t.Aborted.Load() {
		s.conclude(t, err)
		return
	}
	t.readPiece()
}

// beginPreFetch is begin of PRE-FETCH: the blocks are read and forgotten, which
// leaves them in the caches below. IMMED=1 is taken as a hint without effect.
func beginPreFetch(_ *Server, t *Task) Verdict {
	const immediate = 0x02
	u := t.state.unit
	lba, count := cdb.Range(&t.CDB)
	blocks := uint64(count)
	if capacity := u.blocks(); blocks == 0 && lba < capacity {
		blocks = min(capacity-lba, u.transferMax)
	}
	if !t.within(lba, blocks, u.transferMax, lengthField(t.CDB[0])) {
		return Finished
	}
	t.state.mode = piecePreFetch
	if t.CDB[1]&immediate != 0 {
		return Finished
	}
	return Ready
}

// runPieces reads [off, off+length) piece by piece.
func runPieces(s *Server, t *Task) {
	if t.takeScratch(s) {
		t.ownData()
		t.readPiece()
	}
}

func (t *Task) readPiece() {
	st := &t.state
	st.step = stepPiece
	st.piece = min(st.length-st.pos, pieceBytes)
	whole := (st.piece + 511) &^ 511
	t.Req.FUA = st.mode != piecePreFetch // what is verified is what stable storage holds
	t.Req.Borrowed = false
	t.submit(OpRead, st.off+st.pos, whole, st.scratch[:whole])
}

func stepPiece(s *Server, t *Task) {
	st := &t.state
	err := t.Req.Err
	if t.Aborted.Load() || err != nil {
		if st.mode == piecePreFetch {
			err = nil
		}
		s.conclude(t, err)
		return
	}
	got := st.scratch[:st.piece]
	switch st.mode {
	case pieceCompare:
		if at, differ := firstDifference(got, st.data[st.pos:]); differ {
			t.miscompare(s, st.pos+at)
			return
		}
	case pieceRepeat:
		for b := got; len(b) > 0; b = b[len(st.data):] {
			if at, differ := firstDifference(b[:len(st.data)], st.data); differ {
				t.miscompare(s, at)
				return
			}
		}
	case pieceCopy:
		copy(t.In[st.pos:], got)
	}
	if st.pos += st.piece; st.pos < st.length {
		t.readPiece()
		return
	}
	s.conclude(t, nil)
}

// miscompare ends a command with the offset of the first difference in its data.
func (t *Task) miscompare(s *Server, at uint64) {
	sense := senseDiffers
	sense.Info, sense.HasInfo = at, true
	t.check(&sense)
	s.finish(t)
}

// firstDifference compares a with the beginning of b, which is as long or longer.
func firstDifference(a, b []byte) (at uint64, differ bool) {
	b = b[:len(a)]
	if bytes.Equal(a, b) {
		return 0, false
	}
	for a[at] == b[at] {
		at++
	}
	return at, true
}
