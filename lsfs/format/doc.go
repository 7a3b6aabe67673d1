// Package format is the disk format of lsfs: bytes in, value or error out.
//
// It does no I/O, reads no clock and panics on nothing that a disk can hold.
// The types to know are Addr (where bytes stand in the log), Commit (the header
// of one atomic append) and Root (what a checkpoint remembers). All integers
// are little endian, all checksums are CRC32C unless said otherwise.
//
// A device:
//
//	0        superblock area, 1 MiB: four copies at 0, 64K, 512K and 960K
//	1 MiB    segment 0 of the device
//	...      segment n-1; bytes after the last whole segment are unused
//
// Segments of all devices are numbered through; each device has a range, and that of
// one that was removed is not given out again. A segment is a row of commits and has no header of its own: each commit names
// the segment it stands in and the one that follows, so one damaged page costs
// one commit and never the chain.
//
//	segment  [commit][commit][commit]...[unused]
//	commit   [header 128 B][records][gap to payloadOff][payload][zeros to 4 KiB]
//
// Everything in this package is part of the format. A change adds a version.
package format

// Version of commits. 1: first. Superblock and root have versions of their own.
const Version = 1

const (
	// PageSize is the size of a metadata page and the unit of device I/O.
	PageSize = 4096
	// SuperblockArea is the number of bytes in front of the first segment.
	SuperblockArea = 1 << 20
	// SegmentMin and SegmentMax bound the size of a segment, a power of two.
	SegmentMin = 256 << 10
	SegmentMax = 16 << 20
	// DevicesMax bounds the devices of a pool: all are listed in each superblock.
	DevicesMax = 64
)

// SuperblockOffsets are where the copies of the superblock stand. They are
// written in pairs (0 and 1, flush, 2 and 3, flush), so one pair is always whole.
var SuperblockOffsets = [4]int64{0, 64 << 10, 512 << 10, 960 << 10}
