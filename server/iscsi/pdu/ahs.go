package pdu

import (
	"encoding/binary"
	"errors"
)

// ErrAHS is returned for additional header segments that are cut, of an unknown
// type, or of a length that their type does not have.
var ErrAHS = errors.New("malformed or unknown additional header segment")

// Types of additional header segments (RFC 7143 section 11.2.2.1).
const (
	ahsExtendedCDB  = 1
	ahsBidiExpected = 2
)

// AHS is what the additional header segments of a SCSI command say. The zero
// value stands for none.
type AHS struct {
	ExtendedCDB  []byte // the CDB from its byte 16 on, in the parsed buffer
	HasBidi      bool
	BidiExpected uint32 // expected bidirectional read data length, bytes
}

// ParseAHS reads all additional header segments of a SCSI command.
//
//	0      2      3      4
//	+------+------+------+--------------+
//	| len  | type | rsvd | len - 1 bytes, padded to 4
//	+------+------+------+--------------+
//
// len counts from the reserved byte on. Each type may be there once.
func ParseAHS(b []byte) (AHS, error) {
	var a AHS
	for len(b) > 0 {
		if len(b) < 4 {
			return AHS{}, ErrAHS
		}
		n := int(binary.BigEndian.Uint16(b))
		end := 3 + n
		padded := end + Pad(end)
		if n < 1 || padded > len(b) {
			return AHS{}, ErrAHS
		}
		switch b[2] {
		case ahsExtendedCDB:
			if n < 2 || a.ExtendedCDB != nil {
				return AHS{}, ErrAHS
			}
			a.ExtendedCDB = b[4:end:end]
		case ahsBidiExpected:
			if n != 5 || a.HasBidi {
				return AHS{}, ErrAHS
			}
			a.HasBidi = true
			a.BidiExpected = binary.BigEndian.Uint32(b[4:])
		default:
			return AHS{}, ErrAHS
		}
		b = b[padded:]
	}
	return a, nil
}
