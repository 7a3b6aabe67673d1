package scsi

import (
	"encoding/binary"
	"time"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// GET LBA STATUS (SBC-3 "GET LBA STATUS parameter data"): a header of eight bytes,
// then descriptors:
//
//	0   u64  LOGICAL BLOCK ADDRESS
//	8   u32  NUMBER OF LOGICAL BLOCKS
//	12  u8   PROVISIONING STATUS
const (
	statusHeaderBytes     = 8
	statusDescriptorBytes = 16

	statusMapped      = 0
	statusDeallocated = 1
)

const (
	// extentsAtOnce bounds the extents that one request asks for.
	extentsAtOnce = 128
	// extentSpan bounds the bytes of the medium that one request looks at.
	extentSpan = 64 << 30
	// statusMax is how long a GET LBA STATUS looks on; initiators take any
	// answer that has one descriptor, and ask again from where it ends.
	statusMax = 4 * time.Second
)

// beginLBAStatus is begin of GET LBA STATUS.
func beginLBAStatus(_ *Server, t *Task) Verdict {
	lba, alloc := cdb.Range(&t.CDB)
	u := t.state.unit
	if capacity := u.blocks(); lba >= capacity {
		return t.refuse(&senseLBA)
	} else {
		t.state.off = lba << u.shift
		t.state.length = (capacity - lba) << u.shift
	}
	t.state.alloc = alloc
	t.Transfer = alloc
	if t.Read {
		t.InLen = min(alloc, t.Expected, maxReplyBytes)
	}
	return Ready
}

// runLBAStatus asks the volume for its extents, request by request, until the
// end of the unit or of the room. The reply grows in the task's scratch buffer.
func runLBAStatus(s *Server, t *Task) {
	if !t.takeScratch(s) {
		return
	}
	st := &t.state
	st.data = st.scratch[:statusHeaderBytes]
	clear(st.data)
	if !st.unit.Thin {
		// Every block of a fully provisioned unit counts as mapped.
		t.addExtent(st.length, statusMapped)
		t.endLBAStatus(s)
		return
	}
	t.Req.Extents = make([]Extent, 0, extentsAtOnce)
	t.askExtents()
}

func (t *Task) askExtents() {
	st := &t.state
	st.step = stepExtents
	t.Req.FUA = false
	t.Req.Borrowed = false
	t.Req.Extents = t.Req.Extents[:0]
	t.submit(OpExtents, st.off+st.pos, min(st.length-st.pos, extentSpan), nil)
}

func stepExtents(s *Server, t *Task) {
	st := &t.state
	err := t.Req.Err
	if err != nil || t.Aborted.Load() {
		t.Req.Extents = nil
		s.conclude(t, err)
		return
	}
	full := false
	before := st.pos
	for _, e := range t.Req.Extents {
		status := byte(statusDeallocated)
		if e.Mapped {
			status = statusMapped
		}
		bytes := min(e.Bytes, st.length-st.pos)
		if full = !t.addExtent(bytes, status); full {
			break
		}
		st.pos += bytes
	}
	if !full && st.pos < st.length && st.pos > before && s.now()-st.start < statusMax {
		t.askExtents()
		return
	}
	t.Req.Extents = nil
	t.endLBAStatus(s)
}

// addExtent adds what follows to the reply: to the last descriptor when that has
// the same status. It says false when the room is up before the end of it.
func (t *Task) addExtent(bytes uint64, status byte) bool {
	const most = 1<<32 - 8 // blocks of one descriptor, a multiple of 4 KiB
	st := &t.state
	room := min(int(min(st.alloc, maxReplyBytes)), len(st.scratch))
	blocks := bytes >> st.unit.shift
	lba := (st.off + st.pos) >> st.unit.shift
	for blocks > 0 {
		if n := len(st.data); n > statusHeaderBytes {
			last := st.data[n-statusDescriptorBytes:]
			have := uint64(binary.BigEndian.Uint32(last[8:]))
			if more := min(blocks, most-have); last[12] == status && more > 0 {
				binary.BigEndian.PutUint32(last[8:], uint32(have+more))
				blocks -= more
				lba += more
				continue
			}
			if n+statusDescriptorBytes > room {
				return false
			}
		}
		st.data = binary.BigEndian.AppendUint64(st.data, lba)
		st.data = append(st.data, 0, 0, 0, 0, status, 0, 0, 0)
	}
	return true
}

// endLBAStatus sends what there is, cut to the allocation length as every reply.
func (t *Task) endLBAStatus(s *Server) {
	st := &t.state
	binary.BigEndian.PutUint32(st.data, uint32(len(st.data)-4))
	n := min(uint32(len(st.data)), st.alloc)
	copy(t.In[:t.InLen], st.data[:n])
	t.Transfer = n
	s.conclude(t, nil)
}
