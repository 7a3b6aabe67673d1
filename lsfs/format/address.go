package format

import (
	"errors"
	"hash/crc32"
)

// ErrInvalid is wrapped by every parse error of this package.
var ErrInvalid = errors.New("invalid on disk")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC32C of p.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// AddChecksum is the Checksum of what sum is the Checksum of, and p behind it.
func AddChecksum(sum uint32, p []byte) uint32 { return crc32.Update(sum, castagnoli, p) }

// Addr is the place of bytes in the log: segment in the upper 40 bits, offset
// in the segment in the lower 24. Zero is no address: a commit header stands there.
type Addr uint64

// NoSegment is the segment number that names none.
const NoSegment = ^uint32(0)

// MakeAddr joins a segment and an offset below SegmentMax.
func MakeAddr(segment, offset uint32) Addr { return Addr(segment)<<24 | Addr(offset&0xffffff) }

// Segment is the pool-wide number of the segment. It is NoSegment for an
// address whose segment does not fit the format.
func (a Addr) Segment() uint32 {
	if a>>24 > Addr(NoSegment) {
		return NoSegment
	}
	return uint32(a >> 24)
}

// Offset is the byte offset in the segment.
func (a Addr) Offset() uint32 { return uint32(a) & 0xffffff }
