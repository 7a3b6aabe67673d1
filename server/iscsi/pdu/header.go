package pdu

import "encoding/binary"

// HeaderLen is the length of the basic header segment, bytes.
const HeaderLen = 48

// DigestLen is the length of a header or data digest, bytes.
const DigestLen = 4

// MaxDataLen is the longest data segment that a header can announce, bytes.
const MaxDataLen = 1<<24 - 1

// NoTag is the reserved value of initiator and target task tags (RFC 7143
// section 11.2.1.8): no task, no transfer.
const NoTag = 0xffffffff

// Opcode is the type of a PDU (RFC 7143 section 11.2.1.2).
type Opcode uint8

// Opcodes sent by initiators.
const (
	OpNopOut       Opcode = 0x00
	OpSCSICommand  Opcode = 0x01
	OpTaskRequest  Opcode = 0x02
	OpLoginRequest Opcode = 0x03
	OpTextRequest  Opcode = 0x04
	OpDataOut      Opcode = 0x05
	OpLogout       Opcode = 0x06
	OpSNACK        Opcode = 0x10
)

// Opcodes sent by targets.
const (
	OpNopIn          Opcode = 0x20
	OpSCSIResponse   Opcode = 0x21
	OpTaskResponse   Opcode = 0x22
	OpLoginResponse  Opcode = 0x23
	OpTextResponse   Opcode = 0x24
	OpDataIn         Opcode = 0x25
	OpLogoutResponse Opcode = 0x26
	OpR2T            Opcode = 0x31
	OpAsync          Opcode = 0x32
	OpReject         Opcode = 0x3f
)

// Flag bits of byte 0 and byte 1.
const (
	flagImmediate = 0x40 // byte 0: delivery outside the command order
	flagFinal     = 0x80 // byte 1: last PDU of a sequence; transit in login PDUs
	flagContinue  = 0x40 // byte 1 of text and login PDUs: the text goes on
)

// Header is a basic header segment. The accessors read the fields that are at
// the same place in several PDUs; which PDUs have a field says RFC 7143.
type Header [HeaderLen]byte

// Opcode returns the PDU's type.
func (h *Header) Opcode() Opcode { return Opcode(h[0] & 0x3f) }

// Immediate reports whether the PDU is for immediate delivery.
func (h *Header) Immediate() bool { return h[0]&flagImmediate != 0 }

// Final reports the F bit.
func (h *Header) Final() bool { return h[1]&flagFinal != 0 }

// AHSLen is the length of all additional header segments, bytes (0..1020).
func (h *Header) AHSLen() int { return int(h[4]) * 4 }

// DataLen is the length of the data segment without padding, bytes.
func (h *Header) DataLen() int { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }

// SetDataLen sets the length of the data segment, at most MaxDataLen.
func (h *Header) SetDataLen(n int) { h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n) }

// LUN returns the eight LUN bytes.
func (h *Header) LUN() uint64 { return binary.BigEndian.Uint64(h[8:]) }

// ITT returns the initiator task tag.
func (h *Header) ITT() uint32 { return binary.BigEndian.Uint32(h[16:]) }

// TTT returns the target transfer tag.
func (h *Header) TTT() uint32 { return binary.BigEndian.Uint32(h[20:]) }

// CmdSN returns the command sequence number of an initiator's PDU.
func (h *Header) CmdSN() uint32 { return binary.BigEndian.Uint32(h[24:]) }

// ExpStatSN returns the next status number that the initiator expects.
func (h *Header) ExpStatSN() uint32 { return h.get32(28) }

// StatSN returns the status sequence number of a target's PDU.
func (h *Header) StatSN() uint32 { return binary.BigEndian.Uint32(h[24:]) }

// ExpCmdSN returns the next command number that the target expects.
func (h *Header) ExpCmdSN() uint32 { return binary.BigEndian.Uint32(h[28:]) }

// MaxCmdSN returns the last command number that the target takes.
func (h *Header) MaxCmdSN() uint32 { return binary.BigEndian.Uint32(h[32:]) }

func (h *Header) put16(at int, v uint16) { binary.BigEndian.PutUint16(h[at:], v) }
func (h *Header) put32(at int, v uint32) { binary.BigEndian.PutUint32(h[at:], v) }
func (h *Header) put64(at int, v uint64) { binary.BigEndian.PutUint64(h[at:], v) }
func (h *Header) get16(at int) uint16    { return binary.BigEndian.Uint16(h[at:]) }
func (h *Header) get32(at int) uint32    { return binary.BigEndian.Uint32(h[at:]) }

// putTags sets the fields that say what a PDU belongs to: the LUN, the initiator
// task tag, and the target's tag or what stands in its place.
func (h *Header) putTags(lun uint64, itt, ttt uint32) {
	h.put64(8, lun)
	h.put32(16, itt)
	h.put32(20, ttt)
}

// putOrder sets the numbers of an initiator's PDU.
func (h *Header) putOrder(cmdSN, expStatSN uint32) {
	h.put32(24, cmdSN)
	h.put32(28, expStatSN)
}

// begin clears the header and sets opcode and flags.
func (h *Header) begin(op Opcode, immediate bool, flags byte) {
	*h = Header{}
	h[0] = byte(op)
	if immediate {
		h[0] |= flagImmediate
	}
	h[1] = flags
}

func bit(on bool, mask byte) byte {
	if on {
		return mask
	}
	return 0
}

// Numbers are the three sequence numbers in every target PDU. Encode takes
// them together so that they are read in one step (RFC 7143 section 4.2.2).
type Numbers struct {
	StatSN   uint32
	ExpCmdSN uint32
	MaxCmdSN uint32
}

func (n Numbers) encode(h *Header) {
	h.put32(24, n.StatSN)
	h.put32(28, n.ExpCmdSN)
	h.put32(32, n.MaxCmdSN)
}

func (n *Numbers) decode(h *Header) {
	n.StatSN, n.ExpCmdSN, n.MaxCmdSN = h.StatSN(), h.ExpCmdSN(), h.MaxCmdSN()
}

// Layout says which digests a connection uses, and so where the parts of a PDU are.
type Layout struct {
	HeaderDigest bool
	DataDigest   bool
}

// DataStart is the offset of the data segment from the start of the PDU.
func (l Layout) DataStart(h *Header) int {
	n := HeaderLen + h.AHSLen()
	if l.HeaderDigest {
		n += DigestLen
	}
	return n
}

// Tail is what follows a data segment of n bytes: padding and digest, bytes.
func (l Layout) Tail(n int) int {
	tail := Pad(n)
	if l.DataDigest && n > 0 {
		tail += DigestLen
	}
	return tail
}

// Size is the length of the whole PDU, bytes.
func (l Layout) Size(h *Header) int {
	n := h.DataLen()
	return l.DataStart(h) + n + l.Tail(n)
}

// Pad is the number of padding bytes after n bytes of data.
func Pad(n int) int { return -n & 3 }

// SerialLess reports a < b in 32-bit serial arithmetic (RFC 1982, RFC 7143
// section 4.2.2.1).
func SerialLess(a, b uint32) bool { return int32(a-b) < 0 }
