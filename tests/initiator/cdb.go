package initiator

import "encoding/binary"

// The commands that tests send most, as CDBs. lba and blocks count logical blocks.

func TestUnitReady() []byte { return make([]byte, 6) }

// Inquiry asks for a vital product data page, or with page -1 for the standard data.
func Inquiry(page int, allocation uint16) []byte {
	b := []byte{0x12, 0, 0, byte(allocation >> 8), byte(allocation), 0}
	if page >= 0 {
		b[1], b[2] = 1, byte(page)
	}
	return b
}

func ReportLUNs(allocation uint32) []byte {
	b := make([]byte, 12)
	b[0] = 0xa0
	binary.BigEndian.PutUint32(b[6:], allocation)
	return b
}

func ReadCapacity16(allocation uint32) []byte {
	b := cdb16(0x9e, 0, allocation)
	b[1] = 0x10
	return b
}

func Read16(lba uint64, blocks uint32) []byte             { return cdb16(0x88, lba, blocks) }
func Write16(lba uint64, blocks uint32) []byte            { return cdb16(0x8a, lba, blocks) }
func SynchronizeCache16(lba uint64, blocks uint32) []byte { return cdb16(0x91, lba, blocks) }

// Write16FUA is a write that is stable before its status.
func Write16FUA(lba uint64, blocks uint32) []byte {
	b := Write16(lba, blocks)
	b[1] = 8
	return b
}

// CompareAndWrite has twice its blocks as data: what is to be there, and what to write.
func CompareAndWrite(lba uint64, blocks byte) []byte {
	b := cdb16(0x89, lba, 0)
	b[13] = blocks
	return b
}

// WriteSame16 writes one block of data many times, or with unmap and zeros none.
func WriteSame16(lba uint64, blocks uint32, unmap bool) []byte {
	b := cdb16(0x93, lba, blocks)
	if unmap {
		b[1] = 8
	}
	return b
}

// Unmap gives the CDB and the parameter list for ranges of {lba, blocks}.
func Unmap(ranges ...[2]uint64) (cdb, list []byte) {
	list = make([]byte, 8, 8+16*len(ranges))
	binary.BigEndian.PutUint16(list, uint16(6+16*len(ranges)))
	binary.BigEndian.PutUint16(list[2:], uint16(16*len(ranges)))
	for _, r := range ranges {
		list = binary.BigEndian.AppendUint64(list, r[0])
		list = binary.BigEndian.AppendUint32(list, uint32(r[1]))
		list = append(list, 0, 0, 0, 0)
	}
	cdb = make([]byte, 10)
	cdb[0] = 0x42
	binary.BigEndian.PutUint16(cdb[7:], uint16(len(list)))
	return cdb, list
}

func cdb16(op byte, lba uint64, n uint32) []byte {
	b := make([]byte, 16)
	b[0] = op
	binary.BigEndian.PutUint64(b[2:], lba)
	binary.BigEndian.PutUint32(b[10:], n)
	return b
}
