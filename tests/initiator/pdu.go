package initiator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Opcodes of RFC 7143, section 11.1.2, without the immediate bit.
const (
	OpNopOut         = 0x00
	OpCommand        = 0x01
	OpTaskManagement = 0x02
	OpLogin          = 0x03
	OpText           = 0x04
	OpDataOut        = 0x05
	OpLogout         = 0x06
	OpSNACK          = 0x10

	OpNopIn                  = 0x20
	OpResponse               = 0x21
	OpTaskManagementResponse = 0x22
	OpLoginResponse          = 0x23
	OpTextResponse           = 0x24
	OpDataIn                 = 0x25
	OpLogoutResponse         = 0x26
	OpR2T                    = 0x31
	OpAsync                  = 0x32
	OpReject                 = 0x3f

	// Immediate is the bit beside the opcode.
	Immediate = 0x40
	// NoTag is the reserved value of the initiator and target task tags.
	NoTag = 0xffffffff

	headerLen = 48
	final     = 0x80 // F, or T in a login
	cont      = 0x40 // C of text and login
)

// PDU is one protocol data unit as it stands on the wire: what the fields say is
// what is sent, except the two lengths, which are made of AHS and Data.
type PDU struct {
	BHS  [headerLen]byte
	AHS  []byte // a multiple of 4 bytes
	Data []byte // without its padding

	// For bad input: digests that are not the ones of the bytes, lengths that are
	// not those of the segments, or nothing sent at all.
	BadHeaderDigest bool
	BadDataDigest   bool
	RawLengths      bool // bytes 4 to 7 of BHS stand as they are
	Drop            bool

	raw []byte // instead of everything else
}

// NewPDU makes a PDU with an opcode (with the immediate bit, if it is to have
// it), the final bit, and an initiator task tag.
func NewPDU(opcode byte, itt uint32) *PDU {
	p := &PDU{}
	p.BHS[0] = opcode
	p.BHS[1] = final
	p.Put32(16, itt)
	return p
}

func (p *PDU) Opcode() byte           { return p.BHS[0] & 0x3f }
func (p *PDU) ITT() uint32            { return p.U32(16) }
func (p *PDU) Final() bool            { return p.BHS[1]&final != 0 }
func (p *PDU) U16(at int) uint16      { return binary.BigEndian.Uint16(p.BHS[at:]) }
func (p *PDU) U32(at int) uint32      { return binary.BigEndian.Uint32(p.BHS[at:]) }
func (p *PDU) U64(at int) uint64      { return binary.BigEndian.Uint64(p.BHS[at:]) }
func (p *PDU) Put16(at int, v uint16) { binary.BigEndian.PutUint16(p.BHS[at:], v) }
func (p *PDU) Put32(at int, v uint32) { binary.BigEndian.PutUint32(p.BHS[at:], v) }
func (p *PDU) Put64(at int, v uint64) { binary.BigEndian.PutUint64(p.BHS[at:], v) }

func (p *PDU) String() string {
	return fmt.Sprintf("opcode %02x flags %02x ITT %08x, %d bytes of data", p.BHS[0], p.BHS[1], p.ITT(), len(p.Data))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendTo encodes the PDU. The CRC is sent with its least significant byte
// first (RFC 7143, section 13.1, and the examples of appendix B).
func (p *PDU) appendTo(b []byte, headerDigest, dataDigest bool) []byte {
	if p.raw != nil {
		return append(b, p.raw...)
	}
	start := len(b)
	b = append(b, p.BHS[:]...)
	if !p.RawLengths {
		b[start+4] = byte(len(p.AHS) / 4)
		n := len(p.Data)
		b[start+5], b[start+6], b[start+7] = byte(n>>16), byte(n>>8), byte(n)
	}
	b = append(b, p.AHS...)
	if headerDigest {
		b = appendDigest(b, b[start:], p.BadHeaderDigest)
	}
	if len(p.Data) > 0 {
		at := len(b)
		b = append(b, p.Data...)
		b = append(b, make([]byte, -len(p.Data)&3)...)
		if dataDigest {
			b = appendDigest(b, b[at:], p.BadDataDigest)
		}
	}
	return b
}

func appendDigest(b, of []byte, bad bool) []byte {
	sum := crc32.Checksum(of, castagnoli)
	if bad {
		sum = ^sum
	}
	return binary.LittleEndian.AppendUint32(b, sum)
}

// errDigest is a wrong digest of the target.
var errDigest = errors.New("wrong digest")

// readPDU reads one PDU with a data segment of at most limit bytes.
func readPDU(r io.Reader, headerDigest, dataDigest bool, limit int) (*PDU, error) {
	p := &PDU{}
	if _, err := io.ReadFull(r, p.BHS[:]); err != nil {
		return nil, err // io.EOF between PDUs
	}
	if p.BHS[4] > 0 {
		p.AHS = make([]byte, int(p.BHS[4])*4)
		if _, err := io.ReadFull(r, p.AHS); err != nil {
			return nil, noEOF(err)
		}
	}
	if headerDigest {
		if err := readDigest(r, p.BHS[:], p.AHS); err != nil {
			return nil, fmt.Errorf("header of %v: %w", p, err)
		}
	}
	n := int(p.BHS[5])<<16 | int(p.BHS[6])<<8 | int(p.BHS[7])
	if n > limit {
		return nil, violation("11.7.1", "%v: data segment of %d bytes, our limit is %d", p, n, limit)
	}
	if n == 0 {
		return p, nil
	}
	padded := make([]byte, (n+3)&^3)
	if _, err := io.ReadFull(r, padded); err != nil {
		return nil, noEOF(err)
	}
	if dataDigest {
		if err := readDigest(r, padded, nil); err != nil {
			return nil, fmt.Errorf("data of %v: %w", p, err)
		}
	}
	p.Data = padded[:n]
	return p, nil
}

func readDigest(r io.Reader, a, b []byte) error {
	var got [4]byte
	if _, err := io.ReadFull(r, got[:]); err != nil {
		return noEOF(err)
	}
	want := crc32.Update(crc32.Checksum(a, castagnoli), castagnoli, b)
	if binary.LittleEndian.Uint32(got[:]) != want {
		return errDigest
	}
	return nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Violation is something that the target must not do.
type Violation struct {
	Section string // of RFC 7143
	What    string
}

func (v *Violation) Error() string {
	return fmt.Sprintf("target violates RFC 7143 section %s: %s", v.Section, v.What)
}

func violation(section, format string, args ...any) error {
	return &Violation{Section: section, What: fmt.Sprintf(format, args...)}
}
