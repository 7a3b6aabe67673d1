package cdb

import "encoding/binary"

// Sense keys (SPC-4 "Sense key and additional sense code definitions").
const (
	NoSense        = 0x0
	NotReady       = 0x2
	MediumError    = 0x3
	HardwareError  = 0x4
	IllegalRequest = 0x5
	UnitAttention  = 0x6
	DataProtect    = 0x7
	CopyAborted    = 0xa
	AbortedCommand = 0xb
	Miscompare     = 0xe
)

// FixedSenseBytes is the length of fixed format sense data as we send it.
const FixedSenseBytes = 18

// MaxSenseBytes bounds the length of sense data in either format.
const MaxSenseBytes = 8 + 12 + 12 + 8

// Sense is one condition: sense key, additional sense code and qualifier, and
// what stands beside them. It is a value; its zero is NO SENSE.
type Sense struct {
	Key  byte
	ASC  byte
	ASCQ byte

	// Info is the INFORMATION field, present when HasInfo.
	Info    uint64
	HasInfo bool

	// Command is the COMMAND-SPECIFIC INFORMATION field, present when HasCommand.
	Command    uint64
	HasCommand bool

	// Progress of what is under way, in 65536ths, is in the sense key specific bytes
	// when HasProgress (SPC-4 "Progress indication"). There is no field pointer then.
	Progress    uint16
	HasProgress bool

	// Field pointer of the sense key specific bytes, present when HasField:
	// the first byte in error and, when HasBit, the bit in it; of the parameter
	// list when InData, else of the CDB (SPC-4 "Field pointer").
	Field    uint16
	Bit      uint8
	HasField bool
	HasBit   bool
	InData   bool
}

// Encode writes s to dst in fixed (70h) or descriptor format (72h) and returns
// the length. dst needs MaxSenseBytes. In fixed format an INFORMATION value
// above 32 bits is left out with VALID=0, a COMMAND-SPECIFIC INFORMATION value
// above 32 bits is left out, too.
func (s *Sense) Encode(dst []byte, descriptor bool) int {
	clear(dst[:MaxSenseBytes])
	if !descriptor {
		dst[0] = 0x70
		dst[2] = s.Key
		if s.HasInfo && s.Info>>32 == 0 {
			dst[0] |= 0x80
			binary.BigEndian.PutUint32(dst[3:7], uint32(s.Info))
		}
		dst[7] = FixedSenseBytes - 8
		if s.HasCommand && s.Command>>32 == 0 {
			binary.BigEndian.PutUint32(dst[8:12], uint32(s.Command))
		}
		dst[12] = s.ASC
		dst[13] = s.ASCQ
		s.putSpecific(dst[15:18])
		return FixedSenseBytes
	}
	dst[0] = 0x72
	dst[1] = s.Key
	dst[2] = s.ASC
	dst[3] = s.ASCQ
	n := 8
	if s.HasInfo {
		d := dst[n : n+12]
		d[0], d[1], d[2] = 0x00, 0x0a, 0x80
		binary.BigEndian.PutUint64(d[4:12], s.Info)
		n += 12
	}
	if s.HasCommand {
		d := dst[n : n+12]
		d[0], d[1] = 0x01, 0x0a
		binary.BigEndian.PutUint64(d[4:12], s.Command)
		n += 12
	}
	if s.HasField || s.HasProgress {
		d := dst[n : n+8]
		d[0], d[1] = 0x02, 0x06
		s.putSpecific(d[4:7])
		n += 8
	}
	dst[7] = byte(n - 8)
	return n
}

// putSpecific fills the sense key specific bytes.
func (s *Sense) putSpecific(d []byte) {
	switch {
	case s.HasProgress:
		d[0] = 0x80
		binary.BigEndian.PutUint16(d[1:3], s.Progress)
	case s.HasField:
		s.putField(d)
	}
}

func (s *Sense) putField(d []byte) {
	d[0] = 0x80
	if !s.InData {
		d[0] |= 0x40
	}
	if s.HasBit {
		d[0] |= 0x08 | s.Bit&7
	}
	binary.BigEndian.PutUint16(d[1:3], s.Field)
}

// ParseSense reads sense data in either format. It is not ok when the bytes are
// neither, or too short to hold a sense key and additional sense code.
func ParseSense(b []byte) (s Sense, descriptor, ok bool) {
	if len(b) < 8 {
		return s, false, false
	}
	switch b[0] & 0x7f {
	case 0x70:
		if len(b) < 14 {
			return s, false, false
		}
		s.Key, s.ASC, s.ASCQ = b[2]&0xf, b[12], b[13]
		if b[0]&0x80 != 0 {
			s.HasInfo = true
			s.Info = uint64(binary.BigEndian.Uint32(b[3:7]))
		}
		if c := binary.BigEndian.Uint32(b[8:12]); c != 0 {
			s.Command, s.HasCommand = uint64(c), true
		}
		if len(b) >= 18 {
			s.getSpecific(b[15:18])
		}
		return s, false, true
	case 0x72:
		s.Key, s.ASC, s.ASCQ = b[1]&0xf, b[2], b[3]
		rest := b[8:]
		rest = rest[:min(len(rest), int(b[7]))]
		for len(rest) >= 2 {
			n := 2 + int(rest[1])
			if len(rest) < n {
				break
			}
			switch {
			case rest[0] == 0x00 && n == 12 && rest[2]&0x80 != 0:
				s.HasInfo = true
				s.Info = binary.BigEndian.Uint64(rest[4:12])
			case rest[0] == 0x01 && n == 12:
				s.Command, s.HasCommand = binary.BigEndian.Uint64(rest[4:12]), true
			case rest[0] == 0x02 && n == 8:
				s.getSpecific(rest[4:7])
			}
			rest = rest[n:]
		}
		return s, true, true
	default:
		return s, false, false
	}
}

// getSpecific reads the sense key specific bytes, whose meaning goes by the
// sense key: a field pointer with ILLEGAL REQUEST, progress with NOT READY and NO SENSE.
func (s *Sense) getSpecific(d []byte) {
	switch {
	case d[0]&0x80 == 0:
	case s.Key == NotReady || s.Key == NoSense:
		s.Progress, s.HasProgress = binary.BigEndian.Uint16(d[1:3]), true
	default:
		s.getField(d)
	}
}

func (s *Sense) getField(d []byte) {
	s.HasField = true
	s.InData = d[0]&0x40 == 0
	if d[0]&0x08 != 0 {
		s.HasBit = true
		s.Bit = d[0] & 7
	}
	s.Field = binary.BigEndian.Uint16(d[1:3])
}
