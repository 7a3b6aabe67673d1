package cdb

import "encoding/binary"

// Bits of byte 1 that READ and WRITE commands of 10 and more bytes share.
const (
	DPO = 0x10 // disable page out
	FUA = 0x08 // force unit access
)

// Size returns the length in bytes of a CDB with this operation code, from its
// group code (SPC-4 "The fixed length CDB formats"), and 0 for groups whose
// CDBs have no fixed length (variable length, reserved, vendor specific).
func Size(op byte) int {
	switch op >> 5 {
	case 0:
		return 6
	case 1, 2:
		return 10
	case 4:
		return 16
	case 5:
		return 12
	default:
		return 0
	}
}

// Range reads the LOGICAL BLOCK ADDRESS and the length of a block command,
// which stand at the same place in all commands of one CDB size (SBC-3
// "Commands for direct access block devices"). The length of READ(6) and
// WRITE(6) is returned as 256 where the field is 0; in all others 0 means what
// the command says. For operation codes without a fixed size both are 0.
func Range(c *[16]byte) (lba uint64, blocks uint32) {
	switch c[0] >> 5 {
	case 0:
		lba = uint64(c[1]&0x1f)<<16 | uint64(c[2])<<8 | uint64(c[3])
		blocks = uint32(c[4])
		if blocks == 0 {
			blocks = 256
		}
	case 1, 2:
		lba = uint64(binary.BigEndian.Uint32(c[2:6]))
		blocks = uint32(binary.BigEndian.Uint16(c[7:9]))
	case 4:
		lba = binary.BigEndian.Uint64(c[2:10])
		blocks = binary.BigEndian.Uint32(c[10:14])
	case 5:
		lba = uint64(binary.BigEndian.Uint32(c[2:6]))
		blocks = binary.BigEndian.Uint32(c[6:10])
	}
	return lba, blocks
}

// ByteCheck reads the BYTCHK field of VERIFY and WRITE AND VERIFY.
func ByteCheck(c *[16]byte) byte { return c[1] >> 1 & 3 }

// Mask marks bits of a CDB, one byte for each of its bytes.
type Mask [16]byte

// FirstBit returns the place of the first bit, in reading order, that is set in
// both the CDB and the mask: the byte and the bit number (7 is the highest).
func (m *Mask) FirstBit(c *[16]byte) (field uint16, bit uint8, found bool) {
	for i := range c {
		if v := c[i] & m[i]; v != 0 {
			bit = 7
			for v&0x80 == 0 {
				v <<= 1
				bit--
			}
			return uint16(i), bit, true
		}
	}
	return 0, 0, false
}
