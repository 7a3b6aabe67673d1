package scsi

import (
	"encoding/binary"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// maxReplyBytes bounds the buffer of a reply, whatever the allocation length
// says. No reply is longer: REPORT LUNS of MaxLUs takes 8 KiB.
const maxReplyBytes = 64 << 10

// read returns the allocation length of a CDB.
func (f allocField) read(c *[16]byte) uint32 {
	switch f.width {
	case 1:
		return uint32(c[f.at])
	case 2:
		return uint32(binary.BigEndian.Uint16(c[f.at:]))
	case 3:
		return uint32(c[f.at])<<16 | uint32(binary.BigEndian.Uint16(c[f.at+1:]))
	case 4:
		return binary.BigEndian.Uint32(c[f.at:])
	default:
		return f.fixed
	}
}

// beginReply is begin of all commands whose Data-In is a reply that the device
// server makes.
func beginReply(_ *Server, t *Task) Verdict {
	t.state.alloc = t.state.cmd.alloc.read(&t.CDB)
	t.Transfer = t.state.alloc
	if t.Read {
		t.InLen = min(t.state.alloc, t.Expected, maxReplyBytes)
	}
	return Ready
}

// answer makes the reply of a command and cuts it to the allocation length and
// to what the initiator expects. Length fields in the reply are those of the
// whole. This is the only place where a reply enters t.In.
func (s *Server) answer(t *Task) {
	var scratch [512]byte
	b, ok := t.state.cmd.reply(s, t, scratch[:0])
	if !ok {
		t.Transfer = 0
		return
	}
	n := min(uint32(len(b)), t.state.alloc)
	copy(t.In[:t.InLen], b[:n])
	t.Transfer = n
	t.Status = cdb.Good
}

// deny is the refusal of a reply function.
func (t *Task) deny(sense cdb.Sense) ([]byte, bool) {
	t.check(&sense)
	return nil, false
}
