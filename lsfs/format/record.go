package format

import (
	"encoding/binary"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
)

// A record starts with
//
//	0  kind u8, reserved [3], bytes u32 (of the whole record)
//
// and goes on by its kind. Operations of a volume (kinds 1 to 8, the numbers of lsfs.OpKind):
//
//	 8  volume u64, epoch u64, sequence u64, start u64
//	40  count u32, reserved u32
//	48  write, copy: count block entries; state: count bytes; clone: source volume u64, first source block u64;
//	    snapshot, rollback: snapshot u64
//
// A block entry of 56 bytes is the whole truth about one block after the write:
//
//	 0  fingerprint [32]
//	32  address u64      of the stored bytes: in this commit's payload, or for a
//	                     reference where the identity's bytes already stand
//	40  identity u64     0: the block is zero
//	48  sum u32, length u16, encoding u8, flags u8 (1: reference; bits 4 to 6: index in a group, since root version 5)
//
// A reference repeats address and checksum because an identity that was only
// pinned when the operation was logged may be dead when replay gets there; then
// it is made again from the record.
//
// The other kinds:
//
//	create   8  volume u64, blocks u64, replica [16]
//	delete   8  volume or snapshot u64         blocks are given back by sheds (by trims, in old logs)
//	gone     8  volume u64                     nothing is left of it
//	resize   8  volume u64, blocks u64
//	trim     8  volume u64, start u64, end u64 (of the blocks behind the end of a volume)
//	meta     8  volume u64, then the volume's meta, see PutMeta
//	shed     8  volume or snapshot u64, budget u64 (of what it has no use for any more)
//	from     8  volume u64, blocks u64, replica [16], snapshot u64: a volume with the map of a snapshot
//	forge    8  snapshot u64, volume u64, base u64, blocks u64: a snapshot begins that was not taken here
//	seal     8  snapshot u64, epoch u64, sequence u64: it is complete
//	merge    8  volume or snapshot u64, count u32, reserved u32, count x {block u64, identity u64, identity u64}:
//	            the block is mapped to the first and from here on to the second, which is equal; since root version 4
//	move     8  count u32, reserved u32, count x {identity u64, old u64, new u64, sum u32, length u16, encoding u8, index u8 (since root version 5)}
//	pages    8  count u32, reserved u32, count x {page u32, sum u32}; page i stands at payload + i * 4096
//	dirs     the same with numbers of directory pages
//	root     8  part u32, parts u32; the payload is the part
//
// pages, dirs and root belong to a checkpoint and mean nothing to replay.
type RecordKind uint8

const (
	RecordWrite    RecordKind = 1
	RecordUnmap    RecordKind = 2
	RecordEpoch    RecordKind = 3
	RecordState    RecordKind = 4
	RecordCopy     RecordKind = 5
	RecordClone    RecordKind = 6
	RecordSnapshot RecordKind = 7
	RecordRollback RecordKind = 8
	RecordCreate   RecordKind = 16
	RecordDelete   RecordKind = 17
	RecordGone     RecordKind = 18
	RecordResize   RecordKind = 19
	RecordTrim     RecordKind = 20
	RecordMeta     RecordKind = 21
	RecordShed     RecordKind = 22
	RecordFrom     RecordKind = 23
	RecordForge    RecordKind = 24
	RecordSeal     RecordKind = 25
	RecordMerge    RecordKind = 26
	RecordMove     RecordKind = 32
	RecordPages    RecordKind = 33
	RecordDirs     RecordKind = 34
	RecordRoot     RecordKind = 35
)

const (
	recordPrefix = 8
	// OpFixed is the size of an operation record without its entries.
	OpFixed = 48
	// CloneSize is the size of a clone record.
	CloneSize = OpFixed + 16
	// SnapshotSize is the size of a snapshot or rollback record.
	SnapshotSize = OpFixed + 8
	// BlockEntrySize is the size of a block entry.
	BlockEntrySize = 56
	// MoveEntrySize is the size of one entry of a move record.
	MoveEntrySize = 32
	// ListFixed is the size of a move, pages, dirs or root record without entries.
	ListFixed = 16
	// PageEntrySize is the size of one entry of a pages or dirs record.
	PageEntrySize = 8
)

// OpSize is the size of an operation's record.
func OpSize(kind RecordKind, count, stateBytes int) int {
	switch kind {
	case RecordWrite, RecordCopy:
		return OpFixed + count*BlockEntrySize
	case RecordState:
		return OpFixed + stateBytes
	case RecordClone:
		return CloneSize
	case RecordSnapshot, RecordRollback:
		return SnapshotSize
	}
	return OpFixed
}

// Record is a record in place: Body points into the bytes it was parsed from.
type Record struct {
	Kind RecordKind
	Body []byte // after the prefix
}

// NextRecord splits the first record off b and checks that its body holds what
// its kind and count say, so that the accessors below cannot run over the end.
func NextRecord(b []byte) (r Record, rest []byte, err error) {
	le := binary.LittleEndian
	if len(b) < recordPrefix {
		return r, nil, fmt.Errorf("record: %d bytes left: %w", len(b), ErrInvalid)
	}
	n := le.Uint32(b[4:])
	if n < recordPrefix || uint64(len(b)) < uint64(n) {
		return r, nil, fmt.Errorf("record: length %d of %d: %w", n, len(b), ErrInvalid)
	}
	r = Record{Kind: RecordKind(b[0]), Body: b[recordPrefix:n]}
	have := uint64(len(r.Body))
	var want uint64
	exact := true
	switch r.Kind {
	case RecordWrite, RecordUnmap, RecordEpoch, RecordState, RecordCopy, RecordClone, RecordSnapshot, RecordRollback:
		want = OpFixed - recordPrefix
		if have >= want {
			count := uint64(le.Uint32(r.Body[32:]))
			switch r.Kind {
			case RecordWrite, RecordCopy:
				want += count * BlockEntrySize
			case RecordState:
				want += count
			case RecordClone:
				want = CloneSize - recordPrefix
			case RecordSnapshot, RecordRollback:
				want = SnapshotSize - recordPrefix
			}
		}
	case RecordCreate:
		want = 32
	case RecordDelete, RecordGone:
		want = 8
	case RecordResize, RecordShed:
		want = 16
	case RecordTrim, RecordSeal:
		want = 24
	case RecordForge:
		want = 32
	case RecordFrom:
		want = 40
	case RecordMerge:
		if want = mergeFixed - recordPrefix; have >= want {
			want += uint64(le.Uint32(r.Body[8:])) * MergeEntrySize
		}
	case RecordMeta:
		want, exact = 8+metaFixed, false
	case RecordMove, RecordPages, RecordDirs:
		want = ListFixed - recordPrefix
		if have >= want {
			size := uint64(PageEntrySize)
			if r.Kind == RecordMove {
				size = MoveEntrySize
			}
			want += uint64(le.Uint32(r.Body)) * size
		}
	case RecordRoot:
		want = 8
	default:
		return r, nil, fmt.Errorf("record: unknown kind %d: %w", r.Kind, ErrInvalid)
	}
	if have < want || exact && have != want {
		return r, nil, fmt.Errorf("record: kind %d has %d bytes, wants %d: %w", r.Kind, have, want, ErrInvalid)
	}
	return r, b[n:], nil
}

func putPrefix(b []byte, kind RecordKind, n int) {
	b[0], b[1], b[2], b[3] = byte(kind), 0, 0, 0
	binary.LittleEndian.PutUint32(b[4:], uint32(n))
}

// OpHead is the fixed part of an operation record.
type OpHead struct {
	Volume, Epoch, Seq, Start uint64
	Count                     uint32
}

// PutOp encodes prefix and fixed part of an operation record of n bytes in all;
// the caller fills in the entries behind.
func PutOp(b []byte, kind RecordKind, h *OpHead, n int) {
	le := binary.LittleEndian
	putPrefix(b, kind, n)
	le.PutUint64(b[8:], h.Volume)
	le.PutUint64(b[16:], h.Epoch)
	le.PutUint64(b[24:], h.Seq)
	le.PutUint64(b[32:], h.Start)
	le.PutUint32(b[40:], h.Count)
	le.PutUint32(b[44:], 0)
}

// Op reads the fixed part of an operation record.
func (r Record) Op() OpHead {
	le := binary.LittleEndian
	b := r.Body
	return OpHead{Volume: le.Uint64(b), Epoch: le.Uint64(b[8:]), Seq: le.Uint64(b[16:]), Start: le.Uint64(b[24:]), Count: le.Uint32(b[32:])}
}

// PutSource encodes the source of a clone record at b.
func PutSource(b []byte, volume, start uint64) {
	binary.LittleEndian.PutUint64(b[OpFixed:], volume)
	binary.LittleEndian.PutUint64(b[OpFixed+8:], start)
}

// Source reads the source volume and its first block from a clone record.
func (r Record) Source() (volume, start uint64) {
	b := r.Body[OpFixed-recordPrefix:]
	return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
}

// PutSnapshot encodes the snapshot of a snapshot or rollback record at b.
func PutSnapshot(b []byte, id uint64) { binary.LittleEndian.PutUint64(b[OpFixed:], id) }

// Snapshot reads the snapshot of a snapshot or rollback record.
func (r Record) Snapshot() uint64 { return binary.LittleEndian.Uint64(r.Body[OpFixed-recordPrefix:]) }

// State is the state carried by a state record, in place.
func (r Record) State() []byte { return r.Body[OpFixed-recordPrefix:] }

// BlockEntry is one block of a write as it is logged.
type BlockEntry struct {
	Fingerprint dedup.Fingerprint
	Addr        Addr
	BID         uint64
	Sum         uint32
	Len         uint16
	Encoding    dedup.Encoding
	Index       uint8 // in a group, below 8
	Ref         bool
}

// Share is the stored bytes that count as this block's.
func (e *BlockEntry) Share() uint32 { return share(e.Len, e.Encoding, e.Index) }

// PutBlock encodes a block entry.
func PutBlock(b []byte, e *BlockEntry) {
	le := binary.LittleEndian
	_ = b[BlockEntrySize-1]
	copy(b, e.Fingerprint[:])
	le.PutUint64(b[32:], uint64(e.Addr))
	le.PutUint64(b[40:], e.BID)
	le.PutUint32(b[48:], e.Sum)
	le.PutUint16(b[52:], e.Len)
	b[54] = byte(e.Encoding)
	b[55] = e.Index & 7 << 4
	if e.Ref {
		b[55] |= 1
	}
}

// Block decodes block entry i of a write or copy record.
func (r Record) Block(i int, e *BlockEntry) {
	le := binary.LittleEndian
	b := r.Body[OpFixed-recordPrefix+i*BlockEntrySize:]
	_ = b[BlockEntrySize-1]
	e.Fingerprint = dedup.Fingerprint(b[:32])
	e.Addr = Addr(le.Uint64(b[32:]))
	e.BID = le.Uint64(b[40:])
	e.Sum = le.Uint32(b[48:])
	e.Len = le.Uint16(b[52:])
	e.Encoding = dedup.Encoding(b[54])
	e.Ref, e.Index = b[55]&1 != 0, b[55]>>4&7
}

// BlockBID reads the identity of block entry i.
func (r Record) BlockBID(i int) uint64 {
	return binary.LittleEndian.Uint64(r.Body[OpFixed-recordPrefix+i*BlockEntrySize+40:])
}

// AppendVolume appends a record of up to three numbers after the volume id:
// delete, gone, resize, trim, shed, forge, seal.
func AppendVolume(b []byte, kind RecordKind, volume uint64, args ...uint64) []byte {
	n := recordPrefix + 8 + 8*len(args)
	b = append(b, byte(kind), 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(n))
	b = binary.LittleEndian.AppendUint64(b, volume)
	for _, a := range args {
		b = binary.LittleEndian.AppendUint64(b, a)
	}
	return b
}

// AppendCreate appends a create record.
func AppendCreate(b []byte, volume, blocks uint64, replica [16]byte) []byte {
	b = append(b, byte(RecordCreate), 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, recordPrefix+32)
	b = binary.LittleEndian.AppendUint64(b, volume)
	b = binary.LittleEndian.AppendUint64(b, blocks)
	return append(b, replica[:]...)
}

// AppendFrom appends the record of a volume with the map of a snapshot.
func AppendFrom(b []byte, volume, blocks uint64, replica [16]byte, snapshot uint64) []byte {
	b = append(b, byte(RecordFrom), 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, recordPrefix+40)
	b = binary.LittleEndian.AppendUint64(b, volume)
	b = binary.LittleEndian.AppendUint64(b, blocks)
	b = append(b, replica[:]...)
	return binary.LittleEndian.AppendUint64(b, snapshot)
}

// Arg reads the i-th number of a volume record; 0 is the volume id. Of a from record,
// 1 is the size and 4 the snapshot.
func (r Record) Arg(i int) uint64 { return binary.LittleEndian.Uint64(r.Body[8*i:]) }

// Replica reads the replica id of a create or from record.
func (r Record) Replica() [16]byte { return [16]byte(r.Body[16:32]) }

// Move is one relocated block.
type Move struct {
	BID      uint64
	Old, New Addr
	Sum      uint32
	Len      uint16
	Encoding dedup.Encoding
	Index    uint8 // in a group
}

// Share is the stored bytes that count as this block's.
func (m *Move) Share() uint32 { return share(m.Len, m.Encoding, m.Index) }

// PutList encodes the fixed part of a move, pages or dirs record.
func PutList(b []byte, kind RecordKind, count int) {
	size := PageEntrySize
	if kind == RecordMove {
		size = MoveEntrySize
	}
	putPrefix(b, kind, ListFixed+count*size)
	binary.LittleEndian.PutUint32(b[8:], uint32(count))
	binary.LittleEndian.PutUint32(b[12:], 0)
}

// Count is the number of entries of a move, pages or dirs record.
func (r Record) Count() int { return int(binary.LittleEndian.Uint32(r.Body)) }

// PutMove encodes move entry i of the record at b.
func PutMove(b []byte, i int, m *Move) {
	le := binary.LittleEndian
	b = b[ListFixed+i*MoveEntrySize:]
	_ = b[MoveEntrySize-1]
	le.PutUint64(b, m.BID)
	le.PutUint64(b[8:], uint64(m.Old))
	le.PutUint64(b[16:], uint64(m.New))
	le.PutUint32(b[24:], m.Sum)
	le.PutUint16(b[28:], m.Len)
	b[30], b[31] = byte(m.Encoding), m.Index
}

// Move decodes move entry i.
func (r Record) Move(i int, m *Move) {
	le := binary.LittleEndian
	b := r.Body[ListFixed-recordPrefix+i*MoveEntrySize:]
	_ = b[MoveEntrySize-1]
	*m = Move{
		BID: le.Uint64(b), Old: Addr(le.Uint64(b[8:])), New: Addr(le.Uint64(b[16:])),
		Sum: le.Uint32(b[24:]), Len: le.Uint16(b[28:]), Encoding: dedup.Encoding(b[30]), Index: b[31],
	}
}

// PutPageEntry encodes entry i of a pages or dirs record at b.
func PutPageEntry(b []byte, i int, page, sum uint32) {
	b = b[ListFixed+i*PageEntrySize:]
	binary.LittleEndian.PutUint32(b, page)
	binary.LittleEndian.PutUint32(b[4:], sum)
}

// PageEntry decodes entry i of a pages or dirs record.
func (r Record) PageEntry(i int) (page, sum uint32) {
	b := r.Body[ListFixed-recordPrefix+i*PageEntrySize:]
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
}

// PutRootRecord encodes a root record of 16 bytes: part i of n.
func PutRootRecord(b []byte, i, n int) {
	putPrefix(b, RecordRoot, ListFixed)
	binary.LittleEndian.PutUint32(b[8:], uint32(i))
	binary.LittleEndian.PutUint32(b[12:], uint32(n))
}

// PutBlock encodes block entry i in place.
func (r Record) PutBlock(i int, e *BlockEntry) {
	PutBlock(r.Body[OpFixed-recordPrefix+i*BlockEntrySize:], e)
}
