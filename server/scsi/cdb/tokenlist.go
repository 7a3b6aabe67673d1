package cdb

import "encoding/binary"

// RangeList is a list of block device range descriptors (SBC-3 "Block device
// range descriptor"), 16 bytes each: LOGICAL BLOCK ADDRESS 8, NUMBER OF LOGICAL
// BLOCKS 4, reserved 4. It is a view of the caller's bytes.
type RangeList []byte

const rangeBytes = 16

// Len returns the number of whole descriptors.
func (l RangeList) Len() int { return len(l) / rangeBytes }

// At returns descriptor i, 0 <= i < Len.
func (l RangeList) At(i int) (lba uint64, blocks uint32) {
	d := l[i*rangeBytes:]
	return binary.BigEndian.Uint64(d), binary.BigEndian.Uint32(d[8:])
}

// AppendRanges appends descriptors, each {LBA, NUMBER OF LOGICAL BLOCKS}.
func AppendRanges(b []byte, ranges ...[2]uint64) []byte {
	for _, r := range ranges {
		b = binary.BigEndian.AppendUint64(b, r[0])
		b = binary.BigEndian.AppendUint32(b, uint32(r[1]))
		b = append(b, 0, 0, 0, 0)
	}
	return b
}

// The parameter list of POPULATE TOKEN (SBC-3 "POPULATE TOKEN parameter list"):
//
//	0  POPULATE TOKEN DATA LENGTH (n-1)      2 bytes
//	2  RTV (bit 1), IMMED (bit 0)
//	4  INACTIVITY TIMEOUT                    4 bytes
//	8  ROD TYPE                              4 bytes
//	14 BLOCK DEVICE RANGE DESCRIPTOR LENGTH  2 bytes
//	16 block device range descriptors
const PopulateHeaderBytes = 16

// PopulateToken is a POPULATE TOKEN parameter list.
type PopulateToken struct {
	TypeValid bool // RTV
	Immediate bool
	Timeout   uint32 // seconds; 0: the default
	Type      uint32
	Claimed   int       // bytes of range descriptors that the list claims
	Ranges    RangeList // those of them that are in the bytes
}

// ParsePopulateToken reads a parameter list. When it is not ok, field is the
// byte at fault.
func ParsePopulateToken(b []byte) (p PopulateToken, field uint16, ok bool) {
	if len(b) < PopulateHeaderBytes {
		return p, 0, false
	}
	p.TypeValid, p.Immediate = b[2]&2 != 0, b[2]&1 != 0
	p.Timeout = binary.BigEndian.Uint32(b[4:])
	p.Type = binary.BigEndian.Uint32(b[8:])
	p.Claimed = int(binary.BigEndian.Uint16(b[14:]))
	p.Ranges = cutRanges(b[PopulateHeaderBytes:], p.Claimed)
	return p, 0, 2+int(binary.BigEndian.Uint16(b)) >= PopulateHeaderBytes+p.Claimed
}

func cutRanges(b []byte, claimed int) RangeList {
	n := min(len(b), claimed)
	return RangeList(b[:n-n%rangeBytes])
}

// The parameter list of WRITE USING TOKEN (SBC-3 "WRITE USING TOKEN parameter list"):
//
//	0   WRITE USING TOKEN DATA LENGTH (n-1)  2 bytes
//	2   DEL_TKN (bit 1), IMMED (bit 0)
//	8   OFFSET INTO ROD                      8 bytes
//	16  ROD TOKEN                            512 bytes
//	534 BLOCK DEVICE RANGE DESCRIPTOR LENGTH 2 bytes
//	536 block device range descriptors
const WriteUsingTokenHeaderBytes = 536

// WriteUsingToken is a WRITE USING TOKEN parameter list.
type WriteUsingToken struct {
	Delete    bool
	Immediate bool
	Offset    uint64 // blocks of the destination
	Token     []byte // TokenBytes, a view
	Claimed   int
	Ranges    RangeList
}

// ParseWriteUsingToken reads a parameter list. When it is not ok, field is the
// byte at fault.
func ParseWriteUsingToken(b []byte) (w WriteUsingToken, field uint16, ok bool) {
	if len(b) < WriteUsingTokenHeaderBytes {
		return w, 0, false
	}
	w.Delete, w.Immediate = b[2]&2 != 0, b[2]&1 != 0
	w.Offset = binary.BigEndian.Uint64(b[8:])
	w.Token = b[16 : 16+TokenBytes]
	w.Claimed = int(binary.BigEndian.Uint16(b[534:]))
	w.Ranges = cutRanges(b[WriteUsingTokenHeaderBytes:], w.Claimed)
	return w, 0, 2+int(binary.BigEndian.Uint16(b)) >= WriteUsingTokenHeaderBytes+w.Claimed
}

// A ROD token (SPC-4 "ROD token format"):
//
//	0   ROD TYPE                          4 bytes
//	6   ROD TOKEN LENGTH (01F8h)          2 bytes
//	8   COPY MANAGER ROD TOKEN IDENTIFIER 8 bytes
//	16  CREATOR LOGICAL UNIT DESCRIPTOR   32 bytes, an identification CSCD descriptor
//	48  NUMBER OF BYTES REPRESENTED       16 bytes
//	96  device type specific data: LOGICAL BLOCK LENGTH 4 bytes, the rest 0 (SBC-3
//	    "ROD token device type specific data")
//	128 TARGET DEVICE DESCRIPTOR          a designation descriptor
//	480 32 random bytes, of the EXTENDED ROD TOKEN DATA
//
// The first 96 bytes are the ROD management token.
const (
	TokenBytes           = 512
	ManagementTokenBytes = 96
	TokenSecretBytes     = 32

	tokenLength   = TokenBytes - 8
	tokenTargetAt = 128
	tokenSecretAt = TokenBytes - TokenSecretBytes
)

// ROD types.
const (
	RODPointInTime    = 0x00800000 // point in time copy, default
	RODAnyPointInTime = 0x0080ffff
	RODZero           = 0xffff0001 // block device zero
)

// Token is a ROD token.
type Token struct {
	Type       uint32
	LengthOK   bool // ROD TOKEN LENGTH is the only one there is
	ID         uint64
	NAA        []byte // of the logical unit that made it; a view, nil without one
	Bytes      uint64 // NUMBER OF BYTES REPRESENTED; all ones beyond 64 bits
	BlockBytes uint32 // of the logical unit that made it
	Target     []byte // SCSI name of the target, without padding; a view, nil without one
	Secret     [TokenSecretBytes]byte
}

// Designators in a token.
const (
	tokenBinary = 1
	tokenNAA    = 3
	tokenUTF8   = 3
	tokenName   = 8
)

// ParseToken reads the first TokenBytes of b, which must be there.
func ParseToken(b []byte) (t Token) {
	b = b[:TokenBytes]
	t.Type = binary.BigEndian.Uint32(b)
	t.LengthOK = binary.BigEndian.Uint16(b[6:]) == tokenLength
	t.ID = binary.BigEndian.Uint64(b[8:])
	if c, ok := ParseCSCD(b[16:48]); ok && c.Kind == tokenNAA && c.Association == 0 {
		t.NAA = c.Designator
	}
	if t.Bytes = binary.BigEndian.Uint64(b[56:]); binary.BigEndian.Uint64(b[48:]) != 0 {
		t.Bytes = 1<<64 - 1
	}
	t.BlockBytes = binary.BigEndian.Uint32(b[96:])
	if d := b[tokenTargetAt:tokenSecretAt]; d[1]&0x3f == 0x20|tokenName && int(d[3]) <= len(d)-4 {
		name := d[4 : 4+int(d[3])]
		for len(name) > 0 && name[len(name)-1] == 0 {
			name = name[:len(name)-1]
		}
		t.Target = name
	}
	copy(t.Secret[:], b[tokenSecretAt:])
	return t
}

// Encode writes the token to dst. A target name above 223 bytes, which iSCSI
// does not have, is cut.
func (t *Token) Encode(dst *[TokenBytes]byte) {
	*dst = [TokenBytes]byte{}
	binary.BigEndian.PutUint32(dst[:], t.Type)
	binary.BigEndian.PutUint16(dst[6:], tokenLength)
	binary.BigEndian.PutUint64(dst[8:], t.ID)
	copy(dst[16:48], AppendCSCD(nil, tokenBinary, tokenNAA, t.NAA, t.BlockBytes))
	binary.BigEndian.PutUint64(dst[56:], t.Bytes)
	binary.BigEndian.PutUint32(dst[96:], t.BlockBytes)
	const iSCSI = 5 << 4
	name := t.Target[:min(len(t.Target), 223)]
	d := dst[tokenTargetAt:tokenSecretAt]
	d[0], d[1] = iSCSI|tokenUTF8, 0x80|0x20|tokenName
	d[3] = byte(copy(d[4:], name) + 4 - len(name)%4) // NULs, at least one, to a multiple of four
	copy(dst[tokenSecretAt:], t.Secret[:])
}
