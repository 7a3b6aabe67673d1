package format

import "encoding/binary"

const (
	mergeFixed = recordPrefix + 16
	// MergeEntrySize is the size of one entry of a merge record.
	MergeEntrySize = 24
)

// Merge is one block of a map that goes over from an identity to an equal one.
type Merge struct {
	Block    uint64
	From, To uint64
}

// MergeSize is the size of a merge record of count entries.
func MergeSize(count int) int { return mergeFixed + count*MergeEntrySize }

// PutMergeHead encodes all of a merge record of MergeSize(count) bytes but its entries.
func PutMergeHead(b []byte, volume uint64, count int) {
	putPrefix(b, RecordMerge, MergeSize(count))
	binary.LittleEndian.PutUint64(b[8:], volume)
	binary.LittleEndian.PutUint32(b[16:], uint32(count))
	binary.LittleEndian.PutUint32(b[20:], 0)
}

// PutMerge encodes entry i of the merge record at b.
func PutMerge(b []byte, i int, m *Merge) {
	b = b[mergeFixed+i*MergeEntrySize:][:MergeEntrySize]
	binary.LittleEndian.PutUint64(b, m.Block)
	binary.LittleEndian.PutUint64(b[8:], m.From)
	binary.LittleEndian.PutUint64(b[16:], m.To)
}

// Merges is the volume or snapshot of a merge record, and the number of its entries.
func (r Record) Merges() (volume uint64, count int) {
	return binary.LittleEndian.Uint64(r.Body), int(binary.LittleEndian.Uint32(r.Body[8:]))
}

// Merge decodes entry i of a merge record.
func (r Record) Merge(i int, m *Merge) {
	b := r.Body[mergeFixed-recordPrefix+i*MergeEntrySize:][:MergeEntrySize]
	m.Block = binary.LittleEndian.Uint64(b)
	m.From = binary.LittleEndian.Uint64(b[8:])
	m.To = binary.LittleEndian.Uint64(b[16:])
}
