package scsi

import (
	"encoding/binary"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// copyCommands are the rows of THIRD-PARTY COPY OUT and IN. Reservations: a
// EXTENDED COPY asks at each segment, for its source as a read and for its
// destination as a write.
func copyCommands() []*command {
	list := cdb.Mask{10: all, 11: all, 12: all, 13: all}
	with := func(m cdb.Mask, fields ...int) cdb.Mask {
		for _, f := range fields {
			m[f] = all
		}
		return m
	}
	alloc := allocField{at: 10, width: 4}
	const out, in = cdb.ThirdPartyCopyOut, cdb.ThirdPartyCopyIn
	return []*command{
		{name: "EXTENDED COPY(LID1)", op: out, actions: true, action: cdb.ActionExtendedCopy, class: ClassExtendedCopy, seconds: 60,
			usage: list, ignore: cdb.Mask{15: control}, begin: beginExtendedCopy, run: runExtendedCopy},
		{name: "POPULATE TOKEN", op: out, actions: true, action: cdb.ActionPopulateToken, class: ClassPopulateToken, access: AccessRead, seconds: 60,
			usage: with(list, 6, 7, 8, 9), ignore: cdb.Mask{14: group, 15: control}, begin: beginPopulate, run: runPopulate},
		{name: "WRITE USING TOKEN", op: out, actions: true, action: cdb.ActionWriteUsingToken, class: ClassWriteUsingToken,
			access: AccessWrite, writes: true, seconds: 60,
			usage: with(list, 6, 7, 8, 9), ignore: cdb.Mask{14: group, 15: control}, begin: beginUseToken, run: runUseToken},
		{name: "COPY OPERATION ABORT", op: out, actions: true, action: cdb.ActionCopyAbort, seconds: 60,
			usage: with(cdb.Mask{}, 2, 3, 4, 5), ignore: cdb.Mask{15: control}, begin: beginReady, run: runCopyAbort},
		{name: "RECEIVE COPY STATUS(LID1)", op: in, actions: true, action: cdb.ActionCopyStatus1,
			usage: with(list, 2), ignore: cdb.Mask{15: control}, begin: beginReply, reply: copyStatus1, alloc: alloc},
		{name: "RECEIVE COPY OPERATING PARAMETERS", op: in, actions: true, action: cdb.ActionCopyParameters,
			usage: list, ignore: cdb.Mask{2: all, 15: control}, begin: beginReply, reply: copyParameters, alloc: alloc},
		{name: "RECEIVE COPY FAILURE DETAILS(LID1)", op: in, actions: true, action: cdb.ActionCopyFailureDetails,
			usage: with(list, 2), ignore: cdb.Mask{15: control}, begin: beginReply, reply: copyFailureDetails, alloc: alloc},
		{name: "RECEIVE COPY STATUS(LID4)", op: in, actions: true, action: cdb.ActionCopyStatus4,
			usage: with(list, 2, 3, 4, 5), ignore: cdb.Mask{15: control}, begin: beginReply, reply: copyStatus4, alloc: alloc},
		{name: "RECEIVE ROD TOKEN INFORMATION", op: in, actions: true, action: cdb.ActionTokenInformation,
			usage: with(list, 2, 3, 4, 5), ignore: cdb.Mask{15: control}, begin: beginReply, reply: tokenInformation, alloc: alloc},
		{name: "REPORT ALL ROD TOKENS", op: in, actions: true, action: cdb.ActionAllTokens, readsState: true,
			usage: list, ignore: cdb.Mask{15: control}, begin: beginReply, reply: allTokens, alloc: alloc},
	}
}

// beginReady is for commands without data that wait.
func beginReady(*Server, *Task) Verdict { return Ready }

// allTokens is the reply of REPORT ALL ROD TOKENS: the management tokens, which
// hold no secret, of the valid tokens that this unit made.
func allTokens(s *Server, t *Task, b []byte) ([]byte, bool) {
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	for _, r := range t.state.ordered.tokens {
		if r.status.usable() {
			token := s.rodToken(t.state.unit, r, [cdb.TokenSecretBytes]byte{})
			b = append(b, token[:cdb.ManagementTokenBytes]...)
		}
	}
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b, true
}

// Third-party copy descriptors of VPD page 8F (SPC-4 "Third-party Copy VPD page").
const (
	copyRODLimits      = 0x0000
	copySupported      = 0x0001 // commands
	copyParameterData  = 0x0004
	copyDescriptorsOf  = 0x0008
	copyCSCDIDs        = 0x000c
	copyTokenFeatures  = 0x0106
	copyRODTypes       = 0x0108
	copyGeneralOptions = 0x8001
)

// thirdPartyPage is Third-party Copy. Windows looks at the first descriptor only,
// and only when it is that of the limits of tokens.
func thirdPartyPage(_ *Server, t *Task, b []byte) []byte {
	u := t.state.unit
	add := func(kind uint16, body []byte) {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		b = binary.BigEndian.AppendUint16(b, kind)
		b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
		b = append(b, body...)
	}
	// Offsets are those of the standard, less the four bytes of type and length.
	d := make([]byte, 0x20)
	binary.BigEndian.PutUint16(d[10-4:], maxTokenRanges)
	binary.BigEndian.PutUint32(d[12-4:], tokenTimeoutMax)
	binary.BigEndian.PutUint32(d[16-4:], tokenTimeoutDefault)
	binary.BigEndian.PutUint64(d[20-4:], maxTokenTransfer>>u.shift)
	binary.BigEndian.PutUint64(d[28-4:], optimalTransfer>>u.shift)
	add(copyRODLimits, d)

	d = []byte{0}
	for _, op := range [...]byte{cdb.ThirdPartyCopyOut, cdb.ThirdPartyCopyIn} {
		at := len(d) + 1
		d = append(d, op, 0)
		for _, c := range opcodes[op].actions {
			if c != nil && c.offeredOn(u) {
				d = append(d, c.action)
				d[at]++
			}
		}
	}
	d[0] = byte(len(d) - 1)
	add(copySupported, d)

	d = make([]byte, 0x1c)
	binary.BigEndian.PutUint16(d[8-4:], maxCSCDs)
	binary.BigEndian.PutUint16(d[10-4:], maxSegments)
	binary.BigEndian.PutUint32(d[12-4:], maxCopyListBytes)
	add(copyParameterData, d)

	add(copyDescriptorsOf, append([]byte{byte(len(copyDescriptors))}, copyDescriptors[:]...))
	add(copyCSCDIDs, []byte{0, 2, thisUnit >> 8, thisUnit & 0xff})

	const (
		sameTarget   = 4 // REMOTE TOKENS: those of all units of this target
		featureBytes = 48
	)
	d = make([]byte, 44+featureBytes)
	d[0] = sameTarget
	binary.BigEndian.PutUint32(d[20-4:], 0xffffffff) // MAXIMUM TOKEN LIFETIME: as long as it is used
	binary.BigEndian.PutUint32(d[24-4:], tokenTimeoutMax)
	binary.BigEndian.PutUint16(d[46-4:], featureBytes)
	f := d[44:] // block ROD device type specific features descriptor
	binary.BigEndian.PutUint16(f[2:], featureBytes-4)
	binary.BigEndian.PutUint16(f[6:], uint16(grainBytes>>u.shift)) // OPTIMAL BLOCK ROD LENGTH GRANULARITY
	binary.BigEndian.PutUint64(f[8:], maxTokenTransfer)
	for at := 16; at < 40; at += 8 { // optimal bytes in a transfer, to and from a token
		binary.BigEndian.PutUint64(f[at:], optimalTransfer)
	}
	add(copyTokenFeatures, d)

	const (
		rodTypeBytes = 64
		tokenIn      = 2
		tokenOut     = 1
	)
	d = make([]byte, 4, 4+2*rodTypeBytes)
	binary.BigEndian.PutUint16(d[2:], 2*rodTypeBytes)
	for _, rod := range [...]struct {
		kind  uint32
		flags byte
	}{{cdb.RODPointInTime, tokenIn | tokenOut}, {cdb.RODZero, tokenIn}} {
		var e [rodTypeBytes]byte
		binary.BigEndian.PutUint32(e[:], rod.kind)
		e[4] = rod.flags
		d = append(d, e[:]...)
	}
	add(copyRODTypes, d)

	d = make([]byte, 0x20)
	binary.BigEndian.PutUint32(d[0:], maxCopies)
	binary.BigEndian.PutUint32(d[8-4:], maxIdentifiedCopies)
	binary.BigEndian.PutUint32(d[12-4:], maxSegmentBytes)
	d[16-4], d[17-4] = u.shift, u.shift // granularities
	add(copyGeneralOptions, d)
	return b
}
