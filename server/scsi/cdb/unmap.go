package cdb

import "encoding/binary"

// An UNMAP parameter list (SBC-3 "UNMAP parameter list"):
//
//	0  UNMAP DATA LENGTH              2 bytes
//	2  UNMAP BLOCK DESCRIPTOR LENGTH  2 bytes
//	4  reserved                       4 bytes
//	8  descriptors of 16 bytes: LOGICAL BLOCK ADDRESS 8, NUMBER OF BLOCKS 4, reserved 4
const (
	unmapHeaderBytes     = 8
	unmapDescriptorBytes = 16
)

// UnmapList is the descriptor part of an UNMAP parameter list. It is a view of
// the caller's bytes and lives as long as they do.
type UnmapList []byte

// ParseUnmap reads the header of a parameter list. Only whole descriptors that
// both the header announces and the bytes hold belong to the list. It is not ok
// when the bytes are too few for the header.
func ParseUnmap(b []byte) (list UnmapList, ok bool) {
	if len(b) < unmapHeaderBytes {
		return nil, false
	}
	n := min(int(binary.BigEndian.Uint16(b[2:4])), len(b)-unmapHeaderBytes)
	n -= n % unmapDescriptorBytes
	return UnmapList(b[unmapHeaderBytes : unmapHeaderBytes+n]), true
}

// AppendUnmap appends one parameter list with the given ranges, each {LBA, NUMBER OF
// BLOCKS}; numbers of blocks above 32 bits are cut.
func AppendUnmap(b []byte, ranges ...[2]uint64) []byte {
	n := len(ranges) * unmapDescriptorBytes
	b = binary.BigEndian.AppendUint16(b, uint16(n+unmapHeaderBytes-2))
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = append(b, 0, 0, 0, 0)
	for _, r := range ranges {
		b = binary.BigEndian.AppendUint64(b, r[0])
		b = binary.BigEndian.AppendUint32(b, uint32(r[1]))
		b = append(b, 0, 0, 0, 0)
	}
	return b
}

// Len returns the number of descriptors.
func (l UnmapList) Len() int { return len(l) / unmapDescriptorBytes }

// At returns descriptor i, 0 <= i < Len.
func (l UnmapList) At(i int) (lba uint64, blocks uint32) {
	d := l[i*unmapDescriptorBytes:]
	return binary.BigEndian.Uint64(d[0:8]), binary.BigEndian.Uint32(d[8:12])
}

// Offset returns the place of descriptor i in the parameter list, in bytes, for
// the field pointer of sense data.
func (l UnmapList) Offset(i int) uint16 {
	return uint16(unmapHeaderBytes + i*unmapDescriptorBytes)
}
