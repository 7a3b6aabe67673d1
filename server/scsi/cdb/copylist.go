package cdb

import "encoding/binary"

// The parameter list of EXTENDED COPY(LID1) (SPC-4 "EXTENDED COPY(LID1) command"):
//
//	0  LIST IDENTIFIER
//	1  reserved, STR (bit 5), LIST ID USAGE (bits 4-3), PRIORITY
//	2  CSCD DESCRIPTOR LIST LENGTH     2 bytes
//	4  reserved                        4 bytes
//	8  SEGMENT DESCRIPTOR LIST LENGTH  4 bytes
//	12 INLINE DATA LENGTH              4 bytes
//	16 CSCD descriptors, then segment descriptors, then inline data
const CopyHeaderBytes = 16

// Values of LIST ID USAGE.
const (
	ListIDKeep    = 0 // the status is kept until it is read
	ListIDDiscard = 2 // the status is known while the copy runs
	ListIDNone    = 3 // the copy has no list identifier
)

// CopyHeader is the header of an EXTENDED COPY parameter list. The lengths are
// what the list claims.
type CopyHeader struct {
	ID           byte
	Usage        byte
	CSCDBytes    uint16
	SegmentBytes uint32
	InlineBytes  uint32
}

// ParseCopyHeader is not ok when b is too short for a header.
func ParseCopyHeader(b []byte) (h CopyHeader, ok bool) {
	if len(b) < CopyHeaderBytes {
		return h, false
	}
	return CopyHeader{
		ID:           b[0],
		Usage:        b[1] >> 3 & 3,
		CSCDBytes:    binary.BigEndian.Uint16(b[2:]),
		SegmentBytes: binary.BigEndian.Uint32(b[8:]),
		InlineBytes:  binary.BigEndian.Uint32(b[12:]),
	}, true
}

// An identification CSCD descriptor (SPC-4 "Identification Descriptor CSCD
// descriptor format"):
//
//	0  E4h
//	1  LU ID TYPE (bits 7-6), NUL (bit 5), PERIPHERAL DEVICE TYPE
//	2  RELATIVE INITIATOR PORT IDENTIFIER  2 bytes
//	4  CODE SET, 5 ASSOCIATION (bits 5-4) and DESIGNATOR TYPE, 6 reserved, 7 DESIGNATOR LENGTH
//	8  DESIGNATOR                          20 bytes
//	28 PAD (bit 2)
//	29 DISK BLOCK LENGTH                   3 bytes
const (
	CSCDBytes          = 32
	CSCDIdentification = 0xe4

	designatorBytesMax = 20
)

// CSCD names a logical unit as the source or destination of a copy. LU ID TYPE,
// NUL and the initiator port say nothing to a device that claims SPC-4.
type CSCD struct {
	DeviceType  byte
	CodeSet     byte
	Association byte
	Kind        byte   // DESIGNATOR TYPE
	Designator  []byte // a view; nil when its length is impossible
	BlockBytes  uint32 // DISK BLOCK LENGTH; 0: not said
}

// ParseCSCD reads one identification descriptor. It is not ok when b is too
// short or another kind of descriptor.
func ParseCSCD(b []byte) (c CSCD, ok bool) {
	if len(b) < CSCDBytes || b[0] != CSCDIdentification {
		return c, false
	}
	c = CSCD{
		DeviceType:  b[1] & 0x1f,
		CodeSet:     b[4] & 0x0f,
		Association: b[5] >> 4 & 3,
		Kind:        b[5] & 0x0f,
		BlockBytes:  uint32(b[29])<<16 | uint32(b[30])<<8 | uint32(b[31]),
	}
	if n := int(b[7]); n > 0 && n <= designatorBytesMax {
		c.Designator = b[8 : 8+n]
	}
	return c, true
}

// AppendCSCD appends an identification descriptor of a block device. Bytes of
// the designator beyond the 20th are left out.
func AppendCSCD(b []byte, codeSet, kind byte, designator []byte, blockBytes uint32) []byte {
	var d [CSCDBytes]byte
	d[0] = CSCDIdentification
	d[4], d[5] = codeSet, kind
	d[7] = byte(copy(d[8:8+designatorBytesMax], designator))
	d[29], d[30], d[31] = byte(blockBytes>>16), byte(blockBytes>>8), byte(blockBytes)
	return append(b, d[:]...)
}

// Segment descriptors (SPC-4 "Block device to block device segment descriptor"
// and "... with offsets"); all begin with the type, flags, and the length of
// what follows in 2 bytes, then SOURCE and DESTINATION CSCD DESCRIPTOR ID:
//
//	02h  10 NUMBER OF BLOCKS 2, 12 SOURCE LBA 8, 20 DESTINATION LBA 8
//	0Ah   8 NUMBER OF BYTES 4, 12 SOURCE LBA 8, 20 DESTINATION LBA 8,
//	     28 SOURCE BYTE OFFSET 2, 30 DESTINATION BYTE OFFSET 2
const (
	SegmentBlocks = 0x02
	SegmentBytes  = 0x0a

	segmentBlocksBytes = 28
	segmentBytesBytes  = 32
)

// CopySegment is one copy from block device to block device.
type CopySegment struct {
	Type        byte
	CountsDest  bool   // 02h: Count is in blocks of the destination (DC)
	Source      uint16 // CSCD descriptor ids
	Destination uint16
	Count       uint32 // 02h: blocks; 0Ah: bytes
	SourceLBA   uint64
	DestLBA     uint64
	SourceByte  uint16 // 0Ah: offset from the LBA
	DestByte    uint16
}

// SegmentSize is the size that the first descriptor in b claims, its four
// leading bytes included; 0 when there are none.
func SegmentSize(b []byte) int {
	if len(b) < 4 {
		return 0
	}
	return 4 + int(binary.BigEndian.Uint16(b[2:]))
}

// KnownSegment says whether a segment descriptor type is one of those that
// ParseSegment reads.
func KnownSegment(kind byte) bool { return kind == SegmentBlocks || kind == SegmentBytes }

// ParseSegment reads the first descriptor in b. It is not ok when the type is
// unknown, or the size not that of the type or beyond b.
func ParseSegment(b []byte) (s CopySegment, ok bool) {
	size := SegmentSize(b)
	if size == 0 || size > len(b) {
		return s, false
	}
	s.Type = b[0]
	switch {
	case s.Type == SegmentBlocks && size == segmentBlocksBytes:
		s.CountsDest = b[1]&2 != 0
		s.Count = uint32(binary.BigEndian.Uint16(b[10:]))
	case s.Type == SegmentBytes && size == segmentBytesBytes:
		s.Count = binary.BigEndian.Uint32(b[8:])
		s.SourceByte = binary.BigEndian.Uint16(b[28:])
		s.DestByte = binary.BigEndian.Uint16(b[30:])
	default:
		return s, false
	}
	s.Source = binary.BigEndian.Uint16(b[4:])
	s.Destination = binary.BigEndian.Uint16(b[6:])
	s.SourceLBA = binary.BigEndian.Uint64(b[12:])
	s.DestLBA = binary.BigEndian.Uint64(b[20:])
	return s, true
}

// Append appends the descriptor of a segment of a known type.
func (s *CopySegment) Append(b []byte) []byte {
	var d [segmentBytesBytes]byte
	n := segmentBlocksBytes
	d[0] = s.Type
	if s.Type == SegmentBytes {
		n = segmentBytesBytes
		binary.BigEndian.PutUint32(d[8:], s.Count)
		binary.BigEndian.PutUint16(d[28:], s.SourceByte)
		binary.BigEndian.PutUint16(d[30:], s.DestByte)
	} else {
		if s.CountsDest {
			d[1] = 2
		}
		binary.BigEndian.PutUint16(d[10:], uint16(s.Count))
	}
	binary.BigEndian.PutUint16(d[2:], uint16(n-4))
	binary.BigEndian.PutUint16(d[4:], s.Source)
	binary.BigEndian.PutUint16(d[6:], s.Destination)
	binary.BigEndian.PutUint64(d[12:], s.SourceLBA)
	binary.BigEndian.PutUint64(d[20:], s.DestLBA)
	return append(b, d[:n]...)
}
