package scsi

import "github.com/twinsan/twinsan/server/scsi/cdb"

// maxAttentions bounds a unit attention queue. When it overflows, one POWER ON
// takes the place of all: the initiator then looks at everything again.
const maxAttentions = 32

// attention is a unit attention condition (SAM-5 "Unit attention conditions").
type attention struct{ asc, ascq byte }

var (
	attentionMedium    = attention{0x28, 0x00} // NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED
	attentionPowerOn   = attention{0x29, 0x00} // POWER ON, RESET, OR BUS DEVICE RESET OCCURRED
	attentionReset     = attention{0x29, 0x03} // BUS DEVICE RESET FUNCTION OCCURRED
	attentionLoss      = attention{0x29, 0x07} // I_T NEXUS LOSS OCCURRED
	attentionMode      = attention{0x2a, 0x01} // MODE PARAMETERS CHANGED
	attentionLog       = attention{0x2a, 0x02} // LOG PARAMETERS CHANGED
	attentionCleared   = attention{0x2a, 0x03} // RESERVATIONS PREEMPTED
	attentionReleased  = attention{0x2a, 0x04} // RESERVATIONS RELEASED
	attentionPreempted = attention{0x2a, 0x05} // REGISTRATIONS PREEMPTED
	attentionPaths     = attention{0x2a, 0x06} // ASYMMETRIC ACCESS STATE CHANGED
	attentionCapacity  = attention{0x2a, 0x09} // CAPACITY DATA HAS CHANGED
	attentionTimestamp = attention{0x2a, 0x10} // TIMESTAMP CHANGED
	attentionSpace     = attention{0x38, 0x07} // THIN PROVISIONING SOFT THRESHOLD REACHED
	attentionInquiry   = attention{0x3f, 0x03} // INQUIRY DATA HAS CHANGED
	attentionIdentity  = attention{0x3f, 0x05} // DEVICE IDENTIFIER CHANGED
	attentionLUNs      = attention{0x3f, 0x0e} // REPORTED LUNS DATA HAS CHANGED
)

func (a attention) sense() cdb.Sense {
	return cdb.Sense{Key: cdb.UnitAttention, ASC: a.asc, ASCQ: a.ascq}
}

// raise queues a unit attention for this I_T_L nexus. One that waits already is
// not queued again; a reset (29/xx) supersedes what waits. REPORTED LUNS DATA
// HAS CHANGED is kept by the nexus, not here: it is reported once on any unit.
func (i *itlNexus) raise(a attention) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, b := range i.attentions {
		if a == b {
			return
		}
	}
	switch {
	case a.asc == attentionPowerOn.asc:
		i.attentions = append(i.attentions[:0], a)
	case len(i.attentions) >= maxAttentions:
		i.attentions = append(i.attentions[:0], attentionPowerOn)
	default:
		i.attentions = append(i.attentions, a)
	}
	i.pending.Store(int32(len(i.attentions)))
}

// takeAttention removes and returns the condition that is due, the unit's own
// first, in order of arrival.
func (i *itlNexus) takeAttention() (attention, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.attentions) > 0 {
		a := i.attentions[0]
		i.attentions = append(i.attentions[:0], i.attentions[1:]...)
		i.pending.Store(int32(len(i.attentions)))
		return a, true
	}
	if i.nexus.state.lunsChanged.Swap(false) {
		return attentionLUNs, true
	}
	return attention{}, false
}

// raise queues a unit attention for every nexus of the unit.
func (lu *logicalUnit) raise(a attention) {
	for _, i := range lu.members() {
		i.raise(a)
	}
}
