package scsi

import "encoding/binary"

// The replies of PERSISTENT RESERVE IN (SPC-4 "PERSISTENT RESERVE IN command"),
// all made from the newest ordered state. Lengths are those of the whole.

// beginReply appends the header of a reply: PRgeneration and the length of what follows.
func (pr *persistent) beginReply(b []byte, bytes int) []byte {
	b = binary.BigEndian.AppendUint32(b, pr.generation)
	return binary.BigEndian.AppendUint32(b, uint32(bytes))
}

// readKeys is READ KEYS: one key for each nexus.
func readKeys(_ *Server, t *Task, b []byte) ([]byte, bool) {
	pr := &t.state.ordered.pr
	b = pr.beginReply(b, 8*len(pr.registrations))
	for i := range pr.registrations {
		b = binary.BigEndian.AppendUint64(b, pr.registrations[i].key)
	}
	return b, true
}

// readReservation is READ RESERVATION. A reservation that all hold shows no key.
func readReservation(_ *Server, t *Task, b []byte) ([]byte, bool) {
	pr := &t.state.ordered.pr
	if pr.kind == reserveNone {
		return pr.beginReply(b, 0), true
	}
	key := uint64(0)
	if !pr.kind.heldByAll() {
		key = pr.registrations[pr.find(pr.holder)].key
	}
	b = pr.beginReply(b, 16)
	b = binary.BigEndian.AppendUint64(b, key)
	return append(b, 0, 0, 0, 0, 0, byte(pr.kind), 0, 0), true
}

// reportCapabilities is REPORT CAPABILITIES.
func reportCapabilities(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		capabilities = 0x10 | 0x08 | 0x04 | 0x01 // CRH, SIP_C, ATP_C, PTPL_C
		maskValid    = 0x80                      // TMV
	)
	return append(b, 0, 8, capabilities, maskValid|bit(t.state.ordered.pr.powerLoss),
		0xea, 0x01, // all six types
		0, 0), true
}

// readFullStatus is READ FULL STATUS.
func readFullStatus(_ *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		holder   = 0x01 // R_HOLDER
		allPorts = 0x02 // ALL_TG_PT
	)
	pr := &t.state.ordered.pr
	start := len(b)
	b = pr.beginReply(b, 0)
	for i := range pr.registrations {
		r := &pr.registrations[i]
		var flags, kind byte
		if pr.kind.heldByAll() || pr.kind != reserveNone && pr.holder == r.port {
			flags, kind = holder, byte(pr.kind)
		}
		if r.allPorts {
			flags |= allPorts
		}
		b = binary.BigEndian.AppendUint64(b, r.key)
		b = append(b, 0, 0, 0, 0, flags, kind, 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, r.port.target)
		at := len(b)
		b = appendTransportID(append(b, 0, 0, 0, 0), portName{r.port.initiator, r.port.isid})
		binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	}
	binary.BigEndian.PutUint32(b[start+4:], uint32(len(b)-start-8))
	return b, true
}
