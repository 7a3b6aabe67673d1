package format

import (
	"encoding/binary"

	"github.com/twinsan/twinsan/dedup"
)

// Word pages: 512 words of 8 bytes. In the leaf of a volume map a word is a
// block identity, in the leaf of a version tree the sequence of the last change
// of a chunk, in an inner page the id of a page. Zero is nothing.
//
// Identity pages: 64 entries of 64 bytes, the entries of 64 consecutive block identities:
//
//	 0  fingerprint [32]
//	32  address      u64   0: the identity is dead
//	40  sum          u32   CRC32C of the stored bytes
//	44  references   u32   map entries that name the identity
//	48  length       u16   stored bytes, 1..4096; of a group 8..28672
//	50  encoding     u8
//	51  index        u8    in a group; 0 of a block by itself; since root version 5
//	52  generation   u16  of the identity, or of the last one that stood here; since root version 3
//	54  reserved [10] zero
const (
	WordsPerPage   = PageSize / 8
	EntriesPerPage = PageSize / EntrySize
	EntrySize      = 64
)

// PageKind says how a page is read.
type PageKind uint8

const (
	// WordPage holds 512 words.
	WordPage PageKind = 1
	// EntryPage holds 64 identity entries.
	EntryPage PageKind = 2
)

// Word reads word i of a word page.
func Word(page []byte, i int) uint64 { return binary.LittleEndian.Uint64(page[i*8:]) }

// PutWord sets word i of a word page.
func PutWord(page []byte, i int, v uint64) { binary.LittleEndian.PutUint64(page[i*8:], v) }

// Entry is the decoded form of an identity entry.
type Entry struct {
	Fingerprint dedup.Fingerprint
	Addr        Addr
	Sum         uint32
	Refs        uint32
	Len         uint16
	Encoding    dedup.Encoding
	Index       uint8
	Generation  uint16
}

// Share is the stored bytes that count as this identity's.
func (e *Entry) Share() uint32 { return share(e.Len, e.Encoding, e.Index) }

// share is what one block takes of n stored bytes: all of them, or, of a group, an equal part;
// the first n mod PackedBlocks members have one byte more, so that the parts come to n.
func share(n uint16, enc dedup.Encoding, index uint8) uint32 {
	if enc != dedup.ZstdGroup {
		return uint32(n)
	}
	part := uint32(n) / dedup.PackedBlocks
	if uint32(index) < uint32(n)%dedup.PackedBlocks {
		part++
	}
	return part
}

// EntryAt is the bytes of entry i of an identity page.
func EntryAt(page []byte, i int) []byte { return page[i*EntrySize : (i+1)*EntrySize : (i+1)*EntrySize] }

// ParseEntry decodes an entry in place.
func ParseEntry(b []byte, e *Entry) {
	_ = b[EntrySize-1]
	e.Fingerprint = dedup.Fingerprint(b[:32])
	e.Addr = Addr(binary.LittleEndian.Uint64(b[32:]))
	e.Sum = binary.LittleEndian.Uint32(b[40:])
	e.Refs = binary.LittleEndian.Uint32(b[44:])
	e.Len = binary.LittleEndian.Uint16(b[48:])
	e.Encoding, e.Index = dedup.Encoding(b[50]), b[51]
	e.Generation = EntryGeneration(b)
}

// PutEntry encodes an entry.
func PutEntry(b []byte, e *Entry) {
	_ = b[EntrySize-1]
	copy(b, e.Fingerprint[:])
	binary.LittleEndian.PutUint64(b[32:], uint64(e.Addr))
	binary.LittleEndian.PutUint32(b[40:], e.Sum)
	binary.LittleEndian.PutUint32(b[44:], e.Refs)
	binary.LittleEndian.PutUint16(b[48:], e.Len)
	b[50], b[51] = byte(e.Encoding), e.Index
	clear(b[52:EntrySize])
	binary.LittleEndian.PutUint16(b[52:], e.Generation)
}

// KillEntry makes an entry dead. It keeps the generation, which the next identity in
// its place has to exceed.
func KillEntry(b []byte) {
	_ = b[EntrySize-1]
	clear(b[:52])
}

// EntryGeneration reads the generation of an entry, a dead one too.
func EntryGeneration(b []byte) uint16 { return binary.LittleEndian.Uint16(b[52:]) }

// PutEntryGeneration sets the generation of an entry.
func PutEntryGeneration(b []byte, n uint16) { binary.LittleEndian.PutUint16(b[52:], n) }

// EntryAddr, EntryRefs and EntryLen read one field of an entry.
func EntryAddr(b []byte) Addr   { return Addr(binary.LittleEndian.Uint64(b[32:])) }
func EntryRefs(b []byte) uint32 { return binary.LittleEndian.Uint32(b[44:]) }
func EntryLen(b []byte) uint16  { return binary.LittleEndian.Uint16(b[48:]) }

// EntryShare is Share of an entry in place.
func EntryShare(b []byte) uint32 { return share(EntryLen(b), dedup.Encoding(b[50]), b[51]) }

// PutEntryRefs sets the reference count of an entry.
func PutEntryRefs(b []byte, n uint32) { binary.LittleEndian.PutUint32(b[44:], n) }

// DirEntry says where the newest checkpointed form of a page stands. The page
// directory is the array of these by page id, stored in pages of 256.
//
//	0  address u64   0: never checkpointed, or the id is free
//	8  sum     u32   CRC32C of the page
//	12 refs    u16   low bits of the parents that name the page; above 1 since root version 2
//	14 kind    u8
//	15 of a word page: refs u8, high bits; of an identity page: live entries u8, 0: not known. Since root version 3
type DirEntry struct {
	Addr Addr
	Sum  uint32
	Refs uint16 // see Parents
	Kind PageKind
	High uint8 // see Parents and Count
}

// Parents is how many lead to the page, at most ParentsMax.
func (e *DirEntry) Parents() uint32 {
	if e.Kind == EntryPage {
		return uint32(e.Refs)
	}
	return uint32(e.Refs) | uint32(e.High)<<16
}

// SetParents says how many lead to the page.
func (e *DirEntry) SetParents(n uint32) {
	e.Refs = uint16(n)
	if e.Kind != EntryPage {
		e.High = uint8(n >> 16)
	}
}

// Count is the number of live entries of an identity page, 0 if it is not known.
func (e *DirEntry) Count() uint8 {
	if e.Kind != EntryPage {
		return 0
	}
	return e.High
}

// SetCount says how many entries of an identity page are live.
func (e *DirEntry) SetCount(n uint16) { e.High = uint8(n) }

// ParentsMax is what a directory entry can count.
const ParentsMax = 1<<24 - 1

const (
	dirEntrySize = 16
	// DirEntriesPerPage is the number of directory entries in one page.
	DirEntriesPerPage = PageSize / dirEntrySize
)

// PutDirPage encodes 256 entries into a page.
func PutDirPage(page []byte, entries []DirEntry) {
	clear(page[:PageSize])
	for i := range entries {
		b := page[i*dirEntrySize:]
		binary.LittleEndian.PutUint64(b, uint64(entries[i].Addr))
		binary.LittleEndian.PutUint32(b[8:], entries[i].Sum)
		binary.LittleEndian.PutUint16(b[12:], entries[i].Refs)
		b[14], b[15] = byte(entries[i].Kind), entries[i].High
	}
}

// ParseDirPage decodes a page into up to 256 entries.
func ParseDirPage(page []byte, entries []DirEntry) {
	for i := range entries {
		b := page[i*dirEntrySize:]
		entries[i] = DirEntry{
			Addr: Addr(binary.LittleEndian.Uint64(b)),
			Sum:  binary.LittleEndian.Uint32(b[8:]),
			Refs: binary.LittleEndian.Uint16(b[12:]),
			Kind: PageKind(b[14]), High: b[15],
		}
	}
}
