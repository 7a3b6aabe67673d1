package scsi

import (
	"encoding/binary"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// beginUnmap is begin of UNMAP.
func beginUnmap(_ *Server, t *Task) Verdict {
	if !t.writable() {
		return Finished
	}
	want := uint32(binary.BigEndian.Uint16(t.CDB[7:9]))
	switch {
	case want == 0:
		return Finished
	case want < 8 || t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

// runUnmap checks the whole list before it touches the medium, then unmaps one
// range after another. Descriptors of no blocks are skipped unchecked.
func runUnmap(s *Server, t *Task) {
	st := &t.state
	u := st.unit
	list, _ := cdb.ParseUnmap(st.data) // the header is there: beginUnmap saw to it
	if list.Len() > maxUnmapDescriptor {
		t.rejectParameter(s, 2)
		return
	}
	capacity := u.blocks()
	total, ranges := uint64(0), 0
	for i := range list.Len() {
		lba, blocks := list.At(i)
		if blocks == 0 {
			continue
		}
		if lba >= capacity || uint64(blocks) > capacity-lba {
			t.check(&senseLBA)
			s.finish(t)
			return
		}
		ranges++
		if total += uint64(blocks); total > maxUnmapBlocks {
			t.rejectParameter(s, list.Offset(i)+8)
			return
		}
	}
	st.length = total << u.shift
	st.list = list
	if ranges > 1 {
		t.ownData()
		st.list, _ = cdb.ParseUnmap(st.data)
	}
	t.unmapNext(s)
}

func (t *Task) rejectParameter(s *Server, field uint16) {
	sense := invalidParameter(field)
	t.check(&sense)
	s.finish(t)
}

// unmapNext submits the next range, or ends the command. Descriptors whose blocks follow on
// one another are one range, so that a list of many small pieces is as fast as one large one
// and pieces of a 4 KiB block are unmapped as a whole. After the last range the command ends
// without the sequencer.
func (t *Task) unmapNext(s *Server) {
	st := &t.state
	start, end := st.nextDescriptor()
	if start == end {
		s.conclude(t, nil)
		return
	}
	st.step = nil
	for {
		lba, last := st.nextDescriptor()
		if lba == last {
			break
		}
		if lba < start || end < lba {
			st.index-- // of another range
			st.step = stepUnmap
			break
		}
		end = max(end, last)
	}
	t.Req.FUA = false
	t.Req.Borrowed = false
	t.submit(OpUnmap, start<<st.unit.shift, (end-start)<<st.unit.shift, nil)
}

// nextDescriptor takes the next descriptor that has blocks; start and end are equal when
// there is none.
func (st *taskState) nextDescriptor() (start, end uint64) {
	for st.index < st.list.Len() {
		lba, blocks := st.list.At(st.index)
		st.index++
		if blocks > 0 {
			return lba, lba + uint64(blocks)
		}
	}
	return 0, 0
}

func stepUnmap(s *Server, t *Task) {
	if err := t.Req.Err; err != nil || t.Aborted.Load() {
		s.conclude(t, err)
		return
	}
	t.unmapNext(s)
}

// Bits of byte 1 of WRITE SAME.
const (
	sameUnmap  = 0x08
	sameNoData = 0x01 // NDOB, only in the 16-byte CDB
)

// beginWriteSame is begin of WRITE SAME. Length 0 is to the end of the unit, up
// to the limit.
func beginWriteSame(_ *Server, t *Task) Verdict {
	u := t.state.unit
	lba, count := cdb.Range(&t.CDB)
	unmap := t.CDB[1]&sameUnmap != 0
	if unmap && !u.Thin {
		sense := invalidField(1)
		sense.Bit, sense.HasBit = 3, true
		return t.refuse(&sense)
	}
	blocks := uint64(count)
	if capacity := u.blocks(); blocks == 0 && lba < capacity {
		blocks = capacity - lba
	}
	if !t.within(lba, blocks, u.sameMax, lengthField(t.CDB[0])) {
		return Finished
	}
	noData := t.CDB[0] == cdb.WriteSame16 && t.CDB[1]&sameNoData != 0
	switch {
	case noData || unmap && t.outExpected() == 0:
		return Ready
	case t.outExpected() != u.LogicalBlock:
		t.Transfer = u.LogicalBlock
		return t.misfit()
	}
	t.Transfer, t.OutLen = u.LogicalBlock, u.LogicalBlock
	return WantData
}

// runWriteSame stores one block many times. A block of zeros, given or implied,
// becomes an unmap: the ranges read as zeros and take no room, with UNMAP=1 or
// without. UNMAP=1 with other data is a plain write.
func runWriteSame(_ *Server, t *Task) {
	st := &t.state
	t.Req.FUA = false
	t.Req.Borrowed = false
	if t.OutLen == 0 || allZero(st.data) {
		t.submit(OpUnmap, st.off, st.length, nil)
		return
	}
	t.ownData()
	t.submit(OpWriteSame, st.off, st.length, st.data)
}

// allZero needs a length that is a multiple of 8.
func allZero(b []byte) bool {
	for ; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
	}
	return true
}
