package format

import (
	"encoding/binary"
	"fmt"
)

// Commit is the header of one atomic append to the log.
//
//	  0  magic "TWCOMMIT"
//	  8  version u16, reserved u16, records u32
//	 16  pool [16]
//	 32  segment u32, next segment u32     next: chosen when the segment was opened
//	 40  generation u64                    drawn anew when the segment was opened
//	 48  offset u32, total u32             self address; bytes up to the next commit, a multiple of 4096
//	 56  sequence u64
//	 64  durable u64                       highest sequence known durable when this was built
//	 72  previous [16]                     hash of the previous commit's header and records
//	 88  record bytes u32, payload offset u32
//	 96  payload bytes u32, record sum u32
//	104  reserved [20] zero
//	124  CRC32C of bytes 0..123
//
// The self address exposes a misdirected write, the generation left-overs of an
// earlier use of the segment, the hash chain a lost write, and durable tells a
// torn tail from rot. Payload bytes have their checksums in the records.
type Commit struct {
	Pool        [16]byte
	Records     uint32
	Segment     uint32
	Next        uint32
	Generation  uint64
	Offset      uint32
	Total       uint32
	Seq         uint64
	Durable     uint64
	Previous    [16]byte
	RecordBytes uint32
	PayloadOff  uint32
	PayloadLen  uint32
	RecordSum   uint32
}

// CommitHeaderSize is the size of a commit header; records follow it.
const CommitHeaderSize = 128

var commitMagic = [8]byte{'T', 'W', 'C', 'O', 'M', 'M', 'I', 'T'}

// Put encodes the header into b.
func (c *Commit) Put(b []byte) {
	le := binary.LittleEndian
	b = b[:CommitHeaderSize]
	clear(b)
	copy(b, commitMagic[:])
	le.PutUint16(b[8:], Version)
	le.PutUint32(b[12:], c.Records)
	copy(b[16:], c.Pool[:])
	le.PutUint32(b[32:], c.Segment)
	le.PutUint32(b[36:], c.Next)
	le.PutUint64(b[40:], c.Generation)
	le.PutUint32(b[48:], c.Offset)
	le.PutUint32(b[52:], c.Total)
	le.PutUint64(b[56:], c.Seq)
	le.PutUint64(b[64:], c.Durable)
	copy(b[72:], c.Previous[:])
	le.PutUint32(b[88:], c.RecordBytes)
	le.PutUint32(b[92:], c.PayloadOff)
	le.PutUint32(b[96:], c.PayloadLen)
	le.PutUint32(b[100:], c.RecordSum)
	le.PutUint32(b[124:], Checksum(b[:124]))
}

// ParseCommit decodes a header that is said to stand at (segment, offset) of a
// pool with segments of segmentBytes. It does not look at records or payload.
func ParseCommit(b []byte, c *Commit, pool [16]byte, segment, offset, segmentBytes uint32) error {
	le := binary.LittleEndian
	if len(b) < CommitHeaderSize || [8]byte(b[:8]) != commitMagic {
		return fmt.Errorf("commit: no header: %w", ErrInvalid)
	}
	if Checksum(b[:124]) != le.Uint32(b[124:]) {
		return fmt.Errorf("commit: header checksum: %w", ErrInvalid)
	}
	if v := le.Uint16(b[8:]); v != Version {
		return fmt.Errorf("commit: disk format version %d, this program knows %d: %w", v, Version, ErrInvalid)
	}
	*c = Commit{
		Records:     le.Uint32(b[12:]),
		Pool:        [16]byte(b[16:32]),
		Segment:     le.Uint32(b[32:]),
		Next:        le.Uint32(b[36:]),
		Generation:  le.Uint64(b[40:]),
		Offset:      le.Uint32(b[48:]),
		Total:       le.Uint32(b[52:]),
		Seq:         le.Uint64(b[56:]),
		Durable:     le.Uint64(b[64:]),
		Previous:    [16]byte(b[72:88]),
		RecordBytes: le.Uint32(b[88:]),
		PayloadOff:  le.Uint32(b[92:]),
		PayloadLen:  le.Uint32(b[96:]),
		RecordSum:   le.Uint32(b[100:]),
	}
	if c.Pool != pool || c.Segment != segment || c.Offset != offset {
		return fmt.Errorf("commit: belongs to segment %d offset %d of another place: %w", c.Segment, c.Offset, ErrInvalid)
	}
	room := uint64(segmentBytes) - uint64(offset)
	if uint64(c.Total) > room || c.Total%PageSize != 0 || c.Total == 0 ||
		uint64(CommitHeaderSize)+uint64(c.RecordBytes) > uint64(c.PayloadOff) ||
		uint64(c.PayloadOff)+uint64(c.PayloadLen) > uint64(c.Total) {
		return fmt.Errorf("commit: lengths do not fit: %w", ErrInvalid)
	}
	return nil
}
