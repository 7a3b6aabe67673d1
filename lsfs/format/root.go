package format

import (
	"encoding/binary"
	"fmt"
)

// Meta is the stored form of a volume's small state.
//
//	 0  replica [16]
//	16  promised u64
//	24  durable epoch u64, sequence u64
//	40  sync from epoch u64, sequence u64
//	56  flags u32 (1: inconsistent), epoch log entries u32
//	64  state bytes u32, reserved u32
//	72  entries x {epoch u64, sequence u64}, state
type Meta struct {
	Replica            [16]byte
	Promised           uint64
	DurableEpoch       uint64
	DurableSeq         uint64
	SyncEpoch, SyncSeq uint64
	Inconsistent       bool
	EpochLog           []EpochStart
	State              []byte
}

// EpochStart is one entry of an epoch log.
type EpochStart struct{ Epoch, Seq uint64 }

const metaFixed = 72

// Limits of a volume's meta, checked by writer and reader.
const (
	EpochLogMax = 1 << 16
	StateMax    = 64 << 10
)

// AppendMeta encodes m.
func AppendMeta(b []byte, m *Meta) []byte {
	le := binary.LittleEndian
	b = append(b, m.Replica[:]...)
	for _, v := range [...]uint64{m.Promised, m.DurableEpoch, m.DurableSeq, m.SyncEpoch, m.SyncSeq} {
		b = le.AppendUint64(b, v)
	}
	var flags uint32
	if m.Inconsistent {
		flags = 1
	}
	b = le.AppendUint32(b, flags)
	b = le.AppendUint32(b, uint32(len(m.EpochLog)))
	b = le.AppendUint32(b, uint32(len(m.State)))
	b = le.AppendUint32(b, 0)
	for _, e := range m.EpochLog {
		b = le.AppendUint64(b, e.Epoch)
		b = le.AppendUint64(b, e.Seq)
	}
	return append(b, m.State...)
}

// ParseMeta decodes a meta and returns what follows it. Slices are copies.
func ParseMeta(b []byte, m *Meta) (rest []byte, err error) {
	le := binary.LittleEndian
	if len(b) < metaFixed {
		return nil, fmt.Errorf("meta: %d bytes: %w", len(b), ErrInvalid)
	}
	entries, state := uint64(le.Uint32(b[60:])), uint64(le.Uint32(b[64:]))
	if EpochLogMax < entries || StateMax < state || uint64(len(b)) < metaFixed+16*entries+state {
		return nil, fmt.Errorf("meta: %d epochs, %d bytes of state in %d bytes: %w", entries, state, len(b), ErrInvalid)
	}
	*m = Meta{
		Replica: [16]byte(b[:16]), Promised: le.Uint64(b[16:]),
		DurableEpoch: le.Uint64(b[24:]), DurableSeq: le.Uint64(b[32:]),
		SyncEpoch: le.Uint64(b[40:]), SyncSeq: le.Uint64(b[48:]),
		Inconsistent: le.Uint32(b[56:])&1 != 0,
	}
	b = b[metaFixed:]
	if entries > 0 {
		m.EpochLog = make([]EpochStart, entries)
		for i := range m.EpochLog {
			m.EpochLog[i] = EpochStart{le.Uint64(b), le.Uint64(b[8:])}
			b = b[16:]
		}
	}
	if state > 0 {
		m.State = append([]byte(nil), b[:state]...)
	}
	return b[state:], nil
}

// AppendMetaRecord appends a meta record.
func AppendMetaRecord(b []byte, volume uint64, m *Meta) []byte {
	at := len(b)
	b = append(b, byte(RecordMeta), 0, 0, 0, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, volume)
	b = AppendMeta(b, m)
	binary.LittleEndian.PutUint32(b[at+4:], uint32(len(b)-at))
	return b
}

// Meta decodes the meta of a meta record.
func (r Record) Meta(m *Meta) error {
	rest, err := ParseMeta(r.Body[8:], m)
	if err == nil && len(rest) != 0 {
		err = fmt.Errorf("meta: %d bytes behind: %w", len(rest), ErrInvalid)
	}
	return err
}

// Tree is a tree of pages: the id of its top page (0: empty) and how many pages stand one above another.
type Tree struct {
	Top    uint32
	Height uint8
}

// Position is a place between two commits of the log.
type Position struct {
	Segment    uint32 // NoSegment: before the first commit of Next
	Generation uint64
	Offset     uint32 // where the next commit begins, if it stands in Segment
	Next       uint32
	Seq        uint64 // of the commit before
	Hash       [16]byte
}

// Volume is a volume in a root.
type Volume struct {
	ID       uint64
	Blocks   uint64
	TailEnd  uint64 // blocks [Blocks, TailEnd) are still to be trimmed
	Mapped   uint64
	Annex    uint64 // mapped blocks of the annex, not in Mapped; since version 2
	Deleting bool
	Map      Tree
	Versions Tree
	Meta     Meta

	// Since version 3.
	Floor uint64 // least version of every chunk before the annex
	Old   []Lead // what the volume led to before a rollback, and still has to shed
}

// Lead is a tree that nothing but a list leads to.
type Lead struct {
	Versions bool // a version tree; else a map
	Tree     Tree
}

// Snapshot is a snapshot in a root, since version 3.
type Snapshot struct {
	ID, Volume uint64 // and whose it is
	Epoch, Seq uint64 // where it was taken
	Blocks     uint64
	TailEnd    uint64 // as of a volume
	Mapped     uint64
	Floor      uint64
	Deleting   bool
	Forging    bool // begun on this replica and not sealed
	Map        Tree
	Versions   Tree
}

// Root is all that a checkpoint remembers beside its pages: the state of the
// store exactly after the commit Position.Seq (and, where a huge unmap or a clone was cut,
// after Progress blocks of the one that the next commit holds).
//
//	magic "TWINROOT", version u32 (RootVersion), checkpoint u64
//	position: segment u32, next u32, generation u64, offset u32, seq u64, hash [16]; progress u64
//	next identity u64, identities stored u64, identity tree (top u32, height u8)
//	volumes u32 x volume; dormant u32 x identity u64
//	segments u32 x live bytes of blocks u32; bitmap of free segments
//	since version 3, segments x {age u32, stream u8}
//	sharing, since version 3, see appendSharing
//	pages u32 (entries of the directory); directory pages u32 x {address u64, sum u32}
//
// Its extents in the superblock carry its checksum.
type Root struct {
	Version    uint32 // RootVersion, or an older one
	Checkpoint uint64
	Position   Position
	Progress   uint64
	NextBID    uint64
	Stored     uint64 // identities that are not dead
	Identities Tree
	Volumes    []Volume
	Dormant    []uint64
	Live       []uint32
	Free       []byte
	Ages       []SegmentAge // as many as Live, or none before version 3
	Snapshots  []Snapshot
	Pages      uint32
	Directory  []Extent // Len is not stored: always a page
}

// RootVersion is the newest; older ones are read, and OldestRootVersion is still written.
//
//	1  first
//	2  volumes have an annex, whose mapped blocks are counted; pages of the directory
//	   may have more than one parent, which a program that knows only 1 would change
//	   in place for all of them
//	3  snapshots; pages above the leaves may have more than one parent too, and the
//	   directory counts up to 2^24-1 of them; segments say how old their contents are and
//	   which stream wrote them; identities have generations, and a place in an identity
//	   page is used again
//	4  nothing in the root; the log has merge records, and blocks may be stored with encoding 3
//	5  nothing in the root; blocks may be stored in groups (encoding 4), and each counts a share of
//	   the live bytes of its segment
const (
	RootVersion       = 5
	OldestRootVersion = 4
)

var rootMagic = [8]byte{'T', 'W', 'I', 'N', 'R', 'O', 'O', 'T'}

// AppendRoot encodes everything but the directory; AppendDirectory completes it. The version is
// OldestRootVersion or newer.
func AppendRoot(b []byte, r *Root) []byte {
	le := binary.LittleEndian
	b = append(b, rootMagic[:]...)
	b = le.AppendUint32(b, r.Version)
	b = le.AppendUint64(b, r.Checkpoint)
	p := &r.Position
	b = le.AppendUint32(b, p.Segment)
	b = le.AppendUint32(b, p.Next)
	b = le.AppendUint64(b, p.Generation)
	b = le.AppendUint32(b, p.Offset)
	b = le.AppendUint64(b, p.Seq)
	b = append(b, p.Hash[:]...)
	b = le.AppendUint64(b, r.Progress)
	b = le.AppendUint64(b, r.NextBID)
	b = le.AppendUint64(b, r.Stored)
	b = appendTree(b, r.Identities)
	b = le.AppendUint32(b, uint32(len(r.Volumes)))
	for i := range r.Volumes {
		v := &r.Volumes[i]
		b = le.AppendUint64(b, v.ID)
		b = le.AppendUint64(b, v.Blocks)
		b = le.AppendUint64(b, v.TailEnd)
		b = le.AppendUint64(b, v.Mapped)
		b = le.AppendUint64(b, v.Annex)
		b = append(b, b2u(v.Deleting))
		b = appendTree(b, v.Map)
		b = appendTree(b, v.Versions)
		b = AppendMeta(b, &v.Meta)
	}
	b = le.AppendUint32(b, uint32(len(r.Dormant)))
	for _, d := range r.Dormant {
		b = le.AppendUint64(b, d)
	}
	b = le.AppendUint32(b, uint32(len(r.Live)))
	for _, n := range r.Live {
		b = le.AppendUint32(b, n)
	}
	b = append(b, r.Free[:(len(r.Live)+7)/8]...)
	return appendSharing(appendAges(b, r), r)
}

// SegmentAge is what the choice of the cleaner rests on.
type SegmentAge struct {
	Written uint32 // number of the commit, divided by 256, up to which its contents were written, on average
	Stream  uint8  // 0: the log, 1: pages, from 2 on: blocks that were cleaned that many times less one
}

func appendAges(b []byte, r *Root) []byte {
	for i := range r.Live {
		var a SegmentAge
		if i < len(r.Ages) {
			a = r.Ages[i]
		}
		b = append(binary.LittleEndian.AppendUint32(b, a.Written), a.Stream)
	}
	return b
}

// appendSharing encodes what snapshots and rollbacks add to a root:
//
//	per volume, in their order: floor u64, leads u32 x {kind u8 (0 map, 1 versions), tree}
//	snapshots u32 x {id u64, volume u64, epoch u64, sequence u64, blocks u64, tail end u64,
//	mapped u64, floor u64, flags u8 (1 deleting, 2 forging), map tree, version tree}
func appendSharing(b []byte, r *Root) []byte {
	le := binary.LittleEndian
	for i := range r.Volumes {
		v := &r.Volumes[i]
		b = le.AppendUint64(b, v.Floor)
		b = le.AppendUint32(b, uint32(len(v.Old)))
		for _, l := range v.Old {
			b = append(b, b2u(l.Versions))
			b = appendTree(b, l.Tree)
		}
	}
	b = le.AppendUint32(b, uint32(len(r.Snapshots)))
	for i := range r.Snapshots {
		n := &r.Snapshots[i]
		for _, x := range [...]uint64{n.ID, n.Volume, n.Epoch, n.Seq, n.Blocks, n.TailEnd, n.Mapped, n.Floor} {
			b = le.AppendUint64(b, x)
		}
		b = append(b, b2u(n.Deleting)|b2u(n.Forging)<<1)
		b = appendTree(b, n.Map)
		b = appendTree(b, n.Versions)
	}
	return b
}

func (r *reader) ages(n int) []SegmentAge {
	p := r.take(5 * n)
	if p == nil {
		return nil
	}
	ages := make([]SegmentAge, n)
	for i := range ages {
		ages[i] = SegmentAge{Written: binary.LittleEndian.Uint32(p[5*i:]), Stream: p[5*i+4]}
	}
	return ages
}

const (
	leadSize     = 1 + 5
	snapshotSize = 8*8 + 1 + 2*5
)

// sharing decodes what appendSharing wrote.
func (rd *reader) sharing(r *Root) {
	for i := range r.Volumes {
		v := &r.Volumes[i]
		v.Floor = rd.u64()
		if n := rd.list(leadSize); n > 0 {
			v.Old = make([]Lead, n)
		}
		for j := range v.Old {
			v.Old[j] = Lead{Versions: rd.u8() != 0, Tree: rd.tree()}
		}
	}
	if n := rd.list(snapshotSize); n > 0 {
		r.Snapshots = make([]Snapshot, n)
	}
	for i := range r.Snapshots {
		n := &r.Snapshots[i]
		for _, x := range [...]*uint64{&n.ID, &n.Volume, &n.Epoch, &n.Seq, &n.Blocks, &n.TailEnd, &n.Mapped, &n.Floor} {
			*x = rd.u64()
		}
		flags := rd.u8()
		n.Deleting, n.Forging = flags&1 != 0, flags&2 != 0
		n.Map, n.Versions = rd.tree(), rd.tree()
	}
}

// AppendDirectory appends the directory to a root made by AppendRoot.
func AppendDirectory(b []byte, pages uint32, dir []Extent) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, pages)
	b = le.AppendUint32(b, uint32(len(dir)))
	for _, d := range dir {
		b = le.AppendUint64(b, uint64(d.Addr))
		b = le.AppendUint32(b, d.Sum)
	}
	return b
}

func appendTree(b []byte, t Tree) []byte {
	return append(binary.LittleEndian.AppendUint32(b, t.Top), t.Height)
}

func b2u(v bool) byte {
	if v {
		return 1
	}
	return 0
}

// reader takes fixed parts off a slice; after the first short read all are zero and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if len(r.b) < n {
		r.bad, r.b = true, nil
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u8() uint8 {
	if p := r.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (r *reader) u32() uint32 {
	if p := r.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if p := r.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

func (r *reader) tree() Tree { return Tree{Top: r.u32(), Height: r.u8()} }

// list reads a count whose elements take at least size bytes each, so that no
// length is believed that the input cannot hold.
func (r *reader) list(size int) int {
	n := r.u32()
	if uint64(len(r.b)) < uint64(n)*uint64(size) {
		r.bad, r.b = true, nil
		return 0
	}
	return int(n)
}

// ParseRoot decodes a complete root.
func ParseRoot(b []byte) (*Root, error) {
	rd := &reader{b: b}
	if m := rd.take(8); m == nil || [8]byte(m) != rootMagic {
		return nil, fmt.Errorf("root: no root: %w", ErrInvalid)
	}
	version := rd.u32()
	if version < 1 || RootVersion < version {
		return nil, fmt.Errorf("root: version %d, this program knows 1 to %d: %w", version, RootVersion, ErrInvalid)
	}
	r := &Root{Version: version, Checkpoint: rd.u64()}
	p := &r.Position
	p.Segment, p.Next, p.Generation, p.Offset, p.Seq = rd.u32(), rd.u32(), rd.u64(), rd.u32(), rd.u64()
	copy(p.Hash[:], rd.take(16))
	r.Progress, r.NextBID, r.Stored = rd.u64(), rd.u64(), rd.u64()
	r.Identities = rd.tree()
	if n := rd.list(43 + metaFixed); n > 0 {
		r.Volumes = make([]Volume, n)
	}
	for i := range r.Volumes {
		v := &r.Volumes[i]
		v.ID, v.Blocks, v.TailEnd, v.Mapped = rd.u64(), rd.u64(), rd.u64(), rd.u64()
		if version > 1 {
			v.Annex = rd.u64()
		}
		v.Deleting = rd.u8() != 0
		v.Map, v.Versions = rd.tree(), rd.tree()
		if rd.bad {
			break
		}
		rest, err := ParseMeta(rd.b, &v.Meta)
		if err != nil {
			return nil, fmt.Errorf("root: volume %d: %w", v.ID, err)
		}
		rd.b = rest
	}
	if n := rd.list(8); n > 0 {
		r.Dormant = make([]uint64, n)
	}
	for i := range r.Dormant {
		r.Dormant[i] = rd.u64()
	}
	if n := rd.list(4); n > 0 {
		r.Live = make([]uint32, n)
	}
	for i := range r.Live {
		r.Live[i] = rd.u32()
	}
	r.Free = append([]byte(nil), rd.take((len(r.Live)+7)/8)...)
	if version > 2 {
		r.Ages = rd.ages(len(r.Live))
		rd.sharing(r)
	}
	r.Pages = rd.u32()
	if n := rd.list(12); n > 0 {
		r.Directory = make([]Extent, n)
	}
	for i := range r.Directory {
		r.Directory[i] = Extent{Addr: Addr(rd.u64()), Sum: rd.u32(), Len: PageSize}
	}
	if rd.bad || len(rd.b) != 0 {
		return nil, fmt.Errorf("root: %d bytes do not parse: %w", len(b), ErrInvalid)
	}
	if want := (uint64(r.Pages) + DirEntriesPerPage - 1) / DirEntriesPerPage; want != uint64(len(r.Directory)) {
		return nil, fmt.Errorf("root: %d pages need %d directory pages, has %d: %w", r.Pages, want, len(r.Directory), ErrInvalid)
	}
	return r, nil
}
