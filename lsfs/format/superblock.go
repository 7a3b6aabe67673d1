package format

import (
	"encoding/binary"
	"fmt"
)

// Superblock makes a device part of a pool and points to the newest checkpoint.
//
//	   0  magic "TWINSANP"
//	   8  version u16 (SuperblockVersion), device index u16, devices u16, root extents u16
//	  16  sequence u64           rises with each writing, the same on all devices
//	  24  pool [16]
//	  40  device [16]
//	  56  segment bytes u32, segments u32   numbers given out so far, those of removed devices too
//	  64  key check [16]         of the fingerprint key, see KeyCheck of lsfs
//	  80  checkpoint u64         number of the checkpoint, 0: none yet
//	  88  durable u64            sequence of a commit that was durable when this was written
//	  96  generation u64         of the list of devices, rises when one comes or goes
//	 104  extents of the previous root u16, reserved [6]
//	 112  devices x {uuid [16], first segment u32, segments u32, class u8, state u8, reserved u16}
//	   .  root extents x {address u64, bytes u32, sum u32}
//	   .  if there is a previous root: its checkpoint u64, its extents as above
//	4092  CRC32C of bytes 0..4091
//
// Version 1 has no numbers given out (0), no generation, and at 96 devices x {uuid
// [16], segments u32}: all of class flash and active, numbered in the order of the list.
//
// A reader takes the newest copy that two places agree on; a copy with a bad
// checksum does not count.
type Superblock struct {
	Sequence     uint64
	Pool         [16]byte
	Device       [16]byte
	Index        int
	SegmentBytes uint32
	Segments     uint32
	KeyCheck     [16]byte
	Checkpoint   uint64
	Durable      uint64
	Generation   uint64
	Members      []Member
	Root         []Extent
	// Previous is the root before the newest, which a start falls back to when the
	// newest is damaged; none: it is not known, or had no place in the page.
	Previous           []Extent
	PreviousCheckpoint uint64
}

// Member is one device of the pool. Its segments are [First, First+Segments) in
// the numbering of the pool; members stand in that order.
type Member struct {
	Device   [16]byte
	First    uint32
	Segments uint32
	Class    MemberClass
	State    MemberState
}

// MemberClass is what a device is good for.
type MemberClass uint8

const (
	// MemberFlash takes the log and what is read often.
	MemberFlash MemberClass = iota
	// MemberCapacity takes what is cold, in large sequential writes.
	MemberCapacity
)

// MemberState is where a device is in its life in the pool.
//
//	joining -> active <-> draining -> drained -> (gone)
//	           active  -> leaving  -----------> (gone)
//	           any     -> lost     -----------> (gone)
type MemberState uint8

const (
	// MemberActive: new segments are taken from it.
	MemberActive MemberState = iota
	// MemberJoining: nothing stands on it yet; if it is missing the pool goes on without it.
	MemberJoining
	// MemberDraining: no segments are taken, what stands on it moves away.
	MemberDraining
	// MemberLeaving: as draining; once nothing stands on it, it is removed.
	MemberLeaving
	// MemberDrained: nothing stands on it; if it is missing the pool goes on without it.
	MemberDrained
	// MemberLost: it is gone for good, and was given up. What stood on it is damaged.
	MemberLost
)

// SuperblockVersion is the version that is written; older ones are read.
//
//	1  first
//	2  devices have a first segment, a class and a state, so that they may come and go
const SuperblockVersion = 2

// Extent is a run of bytes in the log with its checksum.
type Extent struct {
	Addr Addr
	Len  uint32
	Sum  uint32
}

// RootExtentsMax bounds the parts of a root: what fits a superblock of a pool
// with the largest number of devices.
const RootExtentsMax = 128

var superMagic = [8]byte{'T', 'W', 'I', 'N', 'S', 'A', 'N', 'P'}

const (
	superFixed  = 112
	memberSize  = 28
	extentSize  = 16
	superFixed1 = 96
	memberSize1 = 20
	extents1Max = 160
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
	le.PutUint16(page[8:], SuperblockVersion)
	le.PutUint16(page[10:], uint16(s.Index))
	le.PutUint16(page[12:], uint16(len(s.Members)))
	le.PutUint16(page[14:], uint16(len(s.Root)))
	le.PutUint64(page[16:], s.Sequence)
	copy(page[24:], s.Pool[:])
	copy(page[40:], s.Device[:])
	le.PutUint32(page[56:], s.SegmentBytes)
	le.PutUint32(page[60:], s.Segments)
	copy(page[64:], s.KeyCheck[:])
	le.PutUint64(page[80:], s.Checkpoint)
	le.PutUint64(page[88:], s.Durable)
	le.PutUint64(page[96:], s.Generation)
	b := page[superFixed:]
	for _, m := range s.Members {
		copy(b, m.Device[:])
		le.PutUint32(b[16:], m.First)
		le.PutUint32(b[20:], m.Segments)
		b[24], b[25] = byte(m.Class), byte(m.State)
		b = b[memberSize:]
	}
	for _, x := range s.Root {
		le.PutUint64(b, uint64(x.Addr))
		le.PutUint32(b[8:], x.Len)
		le.PutUint32(b[12:], x.Sum)
		b = b[extentSize:]
	}
	s.putPrevious(page, b)
	le.PutUint32(page[PageSize-4:], Checksum(page[:PageSize-4]))
}

// putPrevious encodes the previous root at the head of to, a part of the page, if
// there is room for it.
func (s *Superblock) putPrevious(page, to []byte) {
	le := binary.LittleEndian
	if n := len(s.Previous); n == 0 || len(to)-4 < 8+n*extentSize {
		return
	}
	le.PutUint16(page[104:], uint16(len(s.Previous)))
	le.PutUint64(to, s.PreviousCheckpoint)
	to = to[8:]
	for _, x := range s.Previous {
		le.PutUint64(to, uint64(x.Addr))
		le.PutUint32(to[8:], x.Len)
		le.PutUint32(to[12:], x.Sum)
		to = to[extentSize:]
	}
}

// parsePrevious is the reverse of putPrevious.
func (s *Superblock) parsePrevious(page, from []byte) error {
	le := binary.LittleEndian
	if le.Uint16(page[8:]) == 1 {
		return nil
	}
	n := int(le.Uint16(page[104:]))
	if n == 0 {
		return nil
	}
	if len(from)-4 < 8+n*extentSize {
		return fmt.Errorf("superblock: %d extents of the previous root: %w", n, ErrInvalid)
	}
	s.PreviousCheckpoint = le.Uint64(from)
	from = from[8:]
	s.Previous = make([]Extent, n)
	for i := range s.Previous {
		s.Previous[i] = Extent{Addr: Addr(le.Uint64(from)), Len: le.Uint32(from[8:]), Sum: le.Uint32(from[12:])}
		from = from[extentSize:]
	}
	return nil
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
	version := le.Uint16(page[8:])
	if version < 1 || SuperblockVersion < version {
		return nil, fmt.Errorf("superblock: disk format version %d, this program knows 1 to %d: %w", version, SuperblockVersion, ErrInvalid)
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
	members, extents, extentsMax := int(le.Uint16(page[12:])), int(le.Uint16(page[14:])), RootExtentsMax
	if version == 1 {
		extentsMax = extents1Max
	}
	if members == 0 || DevicesMax < members || extentsMax < extents || members <= s.Index {
		return nil, fmt.Errorf("superblock: device %d of %d, %d root extents: %w", s.Index, members, extents, ErrInvalid)
	}
	if n := s.SegmentBytes; n < SegmentMin || SegmentMax < n || n&(n-1) != 0 {
		return nil, fmt.Errorf("superblock: segments of %d bytes: %w", n, ErrInvalid)
	}
	s.Members = make([]Member, members)
	b := s.readMembers(page, version)
	if err := s.checkMembers(); err != nil {
		return nil, err
	}
	if s.Members[s.Index].Device != s.Device {
		return nil, fmt.Errorf("superblock: device is not member %d of its own list: %w", s.Index, ErrInvalid)
	}
	s.Root = make([]Extent, extents)
	for i := range s.Root {
		s.Root[i] = Extent{Addr: Addr(le.Uint64(b)), Len: le.Uint32(b[8:]), Sum: le.Uint32(b[12:])}
		b = b[extentSize:]
	}
	if err := s.parsePrevious(page, b); err != nil {
		return nil, err
	}
	return s, nil
}

// readMembers fills Members and what goes with them and returns what follows the list.
func (s *Superblock) readMembers(page []byte, version uint16) []byte {
	le := binary.LittleEndian
	if version == 1 {
		b := page[superFixed1:]
		for i := range s.Members {
			n := le.Uint32(b[16:])
			s.Members[i] = Member{Device: [16]byte(b[:16]), First: s.Segments, Segments: n}
			s.Segments += n
			b = b[memberSize1:]
		}
		return b
	}
	s.Segments, s.Generation = le.Uint32(page[60:]), le.Uint64(page[96:])
	b := page[superFixed:]
	for i := range s.Members {
		s.Members[i] = Member{Device: [16]byte(b[:16]), First: le.Uint32(b[16:]), Segments: le.Uint32(b[20:]), Class: MemberClass(b[24]), State: MemberState(b[25])}
		b = b[memberSize:]
	}
	return b
}

func (s *Superblock) checkMembers() error {
	end := uint64(0)
	for i, m := range s.Members {
		if uint64(m.First) < end || m.Class > MemberCapacity || m.State > MemberLost {
			return fmt.Errorf("superblock: device %d of class %d and state %d begins at segment %d, the one before ends at %d: %w", i, m.Class, m.State, m.First, end, ErrInvalid)
		}
		end = uint64(m.First) + uint64(m.Segments)
	}
	if uint64(s.Segments) < end || s.Segments == NoSegment {
		return fmt.Errorf("superblock: %d segments, the devices have %d: %w", s.Segments, end, ErrInvalid)
	}
	return nil
}
