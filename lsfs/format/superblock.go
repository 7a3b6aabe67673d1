package format

import (
	"encoding/binary"
	"fmt"
)

// Superblock makes a device part of a pool and points to the newest checkpoint.
//
//	   0  magic "TWINSANP"
//	   8  version u16, device index u16, devices u16, root extents u16
//	  16  sequence u64           rises with each writing, the same on all devices
//	  24  pool [16]
//	  40  device [16]
//	  56  segment bytes u32, reserved u32
//	  64  key check [16]         of the fingerprint key, see KeyCheck of lsfs
//	  80  checkpoint u64         number of the checkpoint, 0: none yet
//	  88  durable u64            sequence of a commit that was durable when this was written
//	  96  devices x {uuid [16], segments u32}
//	   .  root extents x {address u64, bytes u32, sum u32}
//	4092  CRC32C of bytes 0..4091
//
// A reader takes the newest copy that two places agree on; a copy with a bad
// checksum does not count.
type Superblock struct {
	Sequence     uint64
	Pool         [16]byte
	Device       [16]byte
	Index        int
	SegmentBytes uint32
	KeyCheck     [16]byte
	Checkpoint   uint64
	Durable      uint64
	Members      []Member
	Root         []Extent
}

// Member is one device of the pool.
type Member struct {
	Device   [16]byte
	Segments uint32
}

// Extent is a run of bytes in the log with its checksum.
type Extent struct {
	Addr Addr
	Len  uint32
	Sum  uint32
}

// RootExtentsMax bounds the parts of a root: what fits a superblock of a pool
// with the largest number of devices.
const RootExtentsMax = 160

var superMagic = [8]byte{'T', 'W', 'I', 'N', 'S', 'A', 'N', 'P'}

const (
	superFixed = 96
	memberSize = 20
	extentSize = 16
)

// Put encodes s into a page of 4096 bytes. More members or extents than the
// format holds are a bug of the caller.
func (s *Superblock) Put(page []byte) {
	if DevicesMax < len(s.Members) || RootExtentsMax < len(s.Root) {
		panic("format: superblock overflow")
	}
	le := binary.LittleEndian
	clear(page[:PageSize])
	copy(page, superMagic[:])
	le.PutUint16(page[8:], Version)
	le.PutUint16(page[10:], uint16(s.Index))
	le.PutUint16(page[12:], uint16(len(s.Members)))
	le.PutUint16(page[14:], uint16(len(s.Root)))
	le.PutUint64(page[16:], s.Sequence)
	copy(page[24:], s.Pool[:])
	copy(page[40:], s.Device[:])
	le.PutUint32(page[56:], s.SegmentBytes)
	copy(page[64:], s.KeyCheck[:])
	le.PutUint64(page[80:], s.Checkpoint)
	le.PutUint64(page[88:], s.Durable)
	b := page[superFixed:]
	for _, m := range s.Members {
		copy(b, m.Device[:])
		le.PutUint32(b[16:], m.Segments)
		b = b[memberSize:]
	}
	for _, x := range s.Root {
		le.PutUint64(b, uint64(x.Addr))
		le.PutUint32(b[8:], x.Len)
		le.PutUint32(b[12:], x.Sum)
		b = b[extentSize:]
	}
	le.PutUint32(page[PageSize-4:], Checksum(page[:PageSize-4]))
}

// ParseSuperblock decodes and checks one copy.
func ParseSuperblock(page []byte) (*Superblock, error) {
	le := binary.LittleEndian
	if len(page) != PageSize || [8]byte(page[:8]) != superMagic {
		return nil, fmt.Errorf("superblock: no twinsan superblock: %w", ErrInvalid)
	}
	if got, want := Checksum(page[:PageSize-4]), le.Uint32(page[PageSize-4:]); got != want {
		return nil, fmt.Errorf("superblock: checksum %08x, want %08x: %w", got, want, ErrInvalid)
	}
	if v := le.Uint16(page[8:]); v != Version {
		return nil, fmt.Errorf("superblock: disk format version %d, this program knows %d: %w", v, Version, ErrInvalid)
	}
	s := &Superblock{
		Index:        int(le.Uint16(page[10:])),
		Sequence:     le.Uint64(page[16:]),
		Pool:         [16]byte(page[24:40]),
		Device:       [16]byte(page[40:56]),
		SegmentBytes: le.Uint32(page[56:]),
		KeyCheck:     [16]byte(page[64:80]),
		Checkpoint:   le.Uint64(page[80:]),
		Durable:      le.Uint64(page[88:]),
	}
	members, extents := int(le.Uint16(page[12:])), int(le.Uint16(page[14:]))
	if members == 0 || DevicesMax < members || RootExtentsMax < extents || members <= s.Index {
		return nil, fmt.Errorf("superblock: device %d of %d, %d root extents: %w", s.Index, members, extents, ErrInvalid)
	}
	if n := s.SegmentBytes; n < SegmentMin || SegmentMax < n || n&(n-1) != 0 {
		return nil, fmt.Errorf("superblock: segments of %d bytes: %w", n, ErrInvalid)
	}
	b := page[superFixed:]
	s.Members = make([]Member, members)
	for i := range s.Members {
		s.Members[i] = Member{Device: [16]byte(b[:16]), Segments: le.Uint32(b[16:])}
		b = b[memberSize:]
	}
	if s.Members[s.Index].Device != s.Device {
		return nil, fmt.Errorf("superblock: device is not member %d of its own list: %w", s.Index, ErrInvalid)
	}
	s.Root = make([]Extent, extents)
	for i := range s.Root {
		s.Root[i] = Extent{Addr: Addr(le.Uint64(b)), Len: le.Uint32(b[8:]), Sum: le.Uint32(b[12:])}
		b = b[extentSize:]
	}
	return s, nil
}
