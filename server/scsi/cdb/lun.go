package cdb

// WellKnownReportLUNs is the address of the REPORT LUNS well known logical unit
// (SPC-4 "REPORT LUNS well known logical unit").
const WellKnownReportLUNs uint64 = 0xc101 << 48

// MaxLUN is the highest logical unit number that the flat space addressing
// method can express.
const MaxLUN = 0x3fff

// DecodeLUN reads the eight bytes of a LUN field (SAM-5 "LUN"). It knows the
// peripheral method on bus 0 and the flat space method, one level deep; any
// other address, the well known one included, is not ok.
func DecodeLUN(v uint64) (lun uint16, ok bool) {
	if v<<16 != 0 {
		return 0, false
	}
	top := uint16(v >> 48)
	switch top >> 14 {
	case 0:
		return top & 0xff, top>>8 == 0
	case 1:
		return top & MaxLUN, true
	default:
		return 0, false
	}
}

// EncodeLUN makes the eight bytes of a LUN field: peripheral addressing below
// 256, flat space addressing up to MaxLUN.
func EncodeLUN(lun uint16) uint64 {
	if lun < 256 {
		return uint64(lun) << 48
	}
	return uint64(0x4000|lun&MaxLUN) << 48
}
