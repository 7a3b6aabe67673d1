package scsi

import (
	"encoding/binary"
	"errors"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// What third-party copy commands are refused with.
var (
	senseInProgress     = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x00, ASCQ: 0x16} // OPERATION IN PROGRESS
	senseTooManyCSCD    = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, ASCQ: 0x06} // TOO MANY TARGET DESCRIPTORS
	senseCSCDType       = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, ASCQ: 0x07} // UNSUPPORTED TARGET DESCRIPTOR TYPE CODE
	senseTooManySegment = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, ASCQ: 0x08} // TOO MANY SEGMENT DESCRIPTORS
	senseSegmentType    = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, ASCQ: 0x09} // UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE
	senseInlineData     = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26, ASCQ: 0x0b} // INLINE DATA LENGTH EXCEEDED
	senseNoROD          = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x55, ASCQ: 0x0c} // INSUFFICIENT RESOURCES TO CREATE ROD
	senseNoToken        = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x55, ASCQ: 0x0d} // INSUFFICIENT RESOURCES TO CREATE ROD TOKEN

	senseTokenType    = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x01} // UNSUPPORTED TOKEN TYPE
	senseTokenRemote  = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x02} // REMOTE TOKEN USAGE NOT SUPPORTED
	senseTokenUnknown = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x04} // TOKEN UNKNOWN
	senseTokenCorrupt = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x05} // TOKEN CORRUPT
	senseTokenRevoked = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x06} // TOKEN REVOKED
	senseTokenExpired = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x07} // TOKEN EXPIRED
	senseTokenGone    = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x08} // TOKEN CANCELLED
	senseTokenDeleted = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x09} // TOKEN DELETED
	senseTokenLength  = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x23, ASCQ: 0x0a} // INVALID TOKEN LENGTH

	senseCopyAborted  = cdb.Sense{Key: cdb.CopyAborted}                        // NO ADDITIONAL SENSE INFORMATION
	senseUnreachable  = cdb.Sense{Key: cdb.CopyAborted, ASC: 0x0d, ASCQ: 0x02} // COPY TARGET DEVICE NOT REACHABLE
	senseWrongCSCD    = cdb.Sense{Key: cdb.CopyAborted, ASC: 0x0d, ASCQ: 0x03} // INCORRECT COPY TARGET DEVICE TYPE
	senseBadParameter = cdb.Sense{Key: cdb.IllegalRequest, ASC: 0x26}          // INVALID FIELD IN PARAMETER LIST
)

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

// copySide is whose condition a copy forwards.
type copySide uint8

const (
	ofCopy copySide = iota // nobody's
	ofSource
	ofDestination
)

// setSense makes CHECK CONDITION the result.
func (r *copyResult) setSense(sense *cdb.Sense) {
	r.status = cdb.CheckCondition
	r.senseLen = sense.Encode(r.sense[:], false)
}

// setSegment makes COPY ABORTED the result (SPC-4 "Errors detected during
// processing of segment descriptors"): COMMAND-SPECIFIC INFORMATION holds where
// the forwarded status and sense data of the source and of the destination begin,
// and the number of the segment.
func (r *copyResult) setSegment(sense *cdb.Sense, segment int, side copySide, cause *copyResult) {
	r.setSense(sense)
	d := r.sense[:]
	binary.BigEndian.PutUint16(d[10:], uint16(segment))
	if side == ofCopy || cause == nil {
		return
	}
	area := r.senseLen
	d[area] = cause.status
	n := copy(d[area+1:], cause.sense[:cause.senseLen])
	d[7+int(side)] = byte(area) // byte 8 the source's, byte 9 the destination's
	r.senseLen = area + 1 + n
	d[7] = byte(r.senseLen - 8)
}

// setError makes the answer to a volume's error the result.
func (r *copyResult) setError(err error) {
	var refused *refusal
	if errors.As(err, &refused) {
		r.setSense(&refused.sense)
		return
	}
	for i := range answers {
		if a := &answers[i]; errors.Is(err, a.err) {
			if r.status = a.status; a.status == cdb.CheckCondition {
				r.setSense(&a.sense)
			}
			return
		}
	}
	switch {
	case errors.Is(err, ErrUnavailable):
		r.status = cdb.Busy
	case errors.Is(err, errStopped):
		r.setSense(&senseCopyAborted)
	default:
		r.setSense(&senseInternal)
	}
}

// lookCopy finds the operation that a RECEIVE COPY command names.
func (s *Server) lookCopy(t *Task, id uint32, read func(*operation) bool) (copyView, bool) {
	return s.copies.look(copyParty{t.Nexus, t.state.itl.lu}, id, s.now(), read)
}

const listIDField = 2 // of RECEIVE COPY commands

// copyStatus1 is the reply of RECEIVE COPY STATUS(LID1). Reading the status of a
// finished copy frees it, unless it has failure details that were not read.
func copyStatus1(s *Server, t *Task, b []byte) ([]byte, bool) {
	const bytesUnit, kibiUnit = 0, 1
	v, ok := s.lookCopy(t, uint32(t.CDB[listIDField]), func(op *operation) bool {
		return op.action == cdb.ActionExtendedCopy && op.result.state == copyGood
	})
	if !ok || v.action != cdb.ActionExtendedCopy {
		return t.deny(invalidField(listIDField))
	}
	state := byte(0) // in progress
	if v.ended {
		state = 1
		if v.state != copyGood {
			state = 2
		}
	}
	count, unit := v.bytes, byte(bytesUnit)
	if count > 1<<32-1 {
		count, unit = count>>10, kibiUnit
	}
	b = append(b, 0, 0, 0, 8, state)
	b = binary.BigEndian.AppendUint16(b, uint16(v.segments))
	b = append(b, unit)
	return binary.BigEndian.AppendUint32(b, uint32(count)), true
}

// copyFailureDetails is the reply of RECEIVE COPY FAILURE DETAILS(LID1): the
// status and sense of a copy that failed. Reading them frees it.
func copyFailureDetails(s *Server, t *Task, b []byte) ([]byte, bool) {
	v, ok := s.lookCopy(t, uint32(t.CDB[listIDField]), func(op *operation) bool {
		return op.action == cdb.ActionExtendedCopy && op.result.state != copyGood
	})
	if !ok || v.action != cdb.ActionExtendedCopy || !v.ended || v.state == copyGood {
		return t.deny(invalidField(listIDField))
	}
	sense := v.result.sense[:v.result.senseLen]
	b = binary.BigEndian.AppendUint32(b, uint32(56+len(sense)))
	b = append(b, make([]byte, 52)...)
	b = append(b, v.result.status, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sense)))
	return append(b, sense...), true
}

// copyParameters is the reply of RECEIVE COPY OPERATING PARAMETERS.
func copyParameters(_ *Server, t *Task, b []byte) ([]byte, bool) {
	d := make([]byte, 44, 44+len(copyDescriptors))
	d[4] = 1 // SNLID
	binary.BigEndian.PutUint16(d[8:], maxCSCDs)
	binary.BigEndian.PutUint16(d[10:], maxSegments)
	binary.BigEndian.PutUint32(d[12:], maxCopyListBytes)
	binary.BigEndian.PutUint32(d[16:], maxSegmentBytes)
	binary.BigEndian.PutUint16(d[34:], maxCopies)
	d[36] = maxIdentifiedCopies
	d[37] = t.state.unit.shift // DATA SEGMENT GRANULARITY
	d[38] = t.state.unit.shift // INLINE DATA GRANULARITY
	d[39] = t.state.unit.shift // HELD DATA GRANULARITY
	d[43] = byte(len(copyDescriptors))
	d = append(d, copyDescriptors[:]...)
	binary.BigEndian.PutUint32(d, uint32(len(d)-4))
	return append(b, d...), true
}

// append appends what RECEIVE COPY STATUS(LID4) and RECEIVE ROD TOKEN
// INFORMATION have in common.
func (v *copyView) append(b []byte) []byte {
	const (
		pollDelay  = 500 // ms
		blocksUnit = 0xf1
		bytesUnit  = 0
	)
	start := len(b)
	b = append(b, make([]byte, 32)...)
	d := b[start:]
	d[4] = v.action
	d[5] = v.state
	d[15] = bytesUnit
	count := v.bytes
	if v.action != cdb.ActionExtendedCopy {
		d[15] = blocksUnit
		count >>= v.shift
	}
	binary.BigEndian.PutUint64(d[16:], count)
	binary.BigEndian.PutUint16(d[24:], uint16(v.segments))
	if !v.ended {
		binary.BigEndian.PutUint32(d[8:], pollDelay)
		return b
	}
	d[12] = v.result.status
	d[13], d[14] = byte(v.result.senseLen), byte(v.result.senseLen)
	return append(b, v.result.sense[:v.result.senseLen]...)
}

// copyStatus4 is the reply of RECEIVE COPY STATUS(LID4), for copies of all kinds.
// A finished copy stays known.
func copyStatus4(s *Server, t *Task, b []byte) ([]byte, bool) {
	v, ok := s.lookCopy(t, be32(t.CDB[listIDField:]), nil)
	if !ok {
		return t.deny(invalidField(listIDField))
	}
	start := len(b)
	b = v.append(b)
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b, true
}

// tokenInformation is the reply of RECEIVE ROD TOKEN INFORMATION. Reading all of
// it frees a finished operation; a reply that the allocation length cuts does not.
func tokenInformation(s *Server, t *Task, b []byte) ([]byte, bool) {
	v, ok := s.lookCopy(t, be32(t.CDB[listIDField:]), func(op *operation) bool {
		n := 32 + op.result.senseLen + 4
		if op.result.token != nil {
			n += 2 + cdb.TokenBytes
		}
		return op.action != cdb.ActionExtendedCopy && t.InLen >= uint32(n)
	})
	if !ok || v.action == cdb.ActionExtendedCopy {
		return t.deny(invalidField(listIDField))
	}
	start := len(b)
	b = v.append(b)
	if v.ended && v.result.token != nil {
		b = binary.BigEndian.AppendUint32(b, 2+cdb.TokenBytes)
		b = append(b, 0, 0)
		b = append(b, v.result.token[:]...)
	} else {
		b = append(b, 0, 0, 0, 0)
	}
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b, true
}
