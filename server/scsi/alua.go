package scsi

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// implicitTransitionSeconds is how long initiators shall wait for an implicit
// transition to end before they give a path up.
const implicitTransitionSeconds = 30

// paths returns the target port groups of a unit in order of their ids, which
// is the same from every node.
func (s *Server) paths(u *unitConfig) []PortGroup {
	if u.Paths == nil {
		return []PortGroup{{ID: s.portGroup, Ports: []uint16{s.nodePort}, State: ActiveOptimized}}
	}
	groups := slices.Clone(u.Paths())
	slices.SortFunc(groups, func(a, b PortGroup) int { return cmp.Compare(a.ID, b.ID) })
	return groups
}

// pathState is the state of this node's own group; a node that is in no group
// is no path.
func (s *Server) pathState(u *unitConfig) PathState {
	for _, g := range s.paths(u) {
		if g.ID == s.portGroup {
			return g.State
		}
	}
	return Unavailable
}

// pathBit is the bit of command.worksIn for a state that is not active.
func pathBit(p PathState) uint8 {
	switch p {
	case Standby:
		return inStandby
	case Transitioning:
		return inTransition
	default:
		return inUnavailable
	}
}

var (
	senseTransition  = cdb.Sense{Key: cdb.NotReady, ASC: 0x04, ASCQ: 0x0a}
	senseStandby     = cdb.Sense{Key: cdb.NotReady, ASC: 0x04, ASCQ: 0x0b}
	senseUnavailable = cdb.Sense{Key: cdb.NotReady, ASC: 0x04, ASCQ: 0x0c}
)

func pathSense(p PathState) *cdb.Sense {
	switch p {
	case Standby:
		return &senseStandby
	case Transitioning:
		return &senseTransition
	default:
		return &senseUnavailable
	}
}

// reportTargetPortGroups is the reply of REPORT TARGET PORT GROUPS: all groups
// of all nodes, those of dead ones too.
func reportTargetPortGroups(s *Server, t *Task, b []byte) ([]byte, bool) {
	const (
		formatField    = 1
		formatExtended = 1
		preferred      = 0x80
		states         = 0x80 | 0x08 | 0x04 | 0x02 | 0x01 // T_SUP, U_SUP, S_SUP, AN_SUP, AO_SUP
		statusImplicit = 0x02
	)
	format := t.CDB[formatField] >> 5
	if format > formatExtended {
		sense := invalidField(formatField)
		sense.Bit, sense.HasBit = 7, true
		return t.deny(sense)
	}
	var status byte
	if t.state.itl.lu.moved.Load() {
		status = statusImplicit
	}
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	if format == formatExtended {
		b = append(b, formatExtended<<4, implicitTransitionSeconds, 0, 0)
	}
	for _, g := range s.paths(t.state.unit) {
		state := byte(g.State) & 0x0f
		if g.Preferred {
			state |= preferred
		}
		b = append(b, state, states)
		b = binary.BigEndian.AppendUint16(b, g.ID)
		b = append(b, 0, status, 0, byte(len(g.Ports)))
		for _, port := range g.Ports {
			b = append(b, 0, 0)
			b = binary.BigEndian.AppendUint16(b, port)
		}
	}
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b, true
}
