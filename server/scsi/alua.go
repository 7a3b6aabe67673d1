package scsi

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"time"

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
	)
	format := t.CDB[formatField] >> 5
	if format > formatExtended {
		sense := invalidField(formatField)
		sense.Bit, sense.HasBit = 7, true
		return t.deny(sense)
	}
	status := byte(t.state.itl.lu.moved.Load())
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

// STATUS CODE of REPORT TARGET PORT GROUPS: what moved the unit last.
const (
	movedExplicitly = 0x01 // SET TARGET PORT GROUPS
	movedImplicitly = 0x02
)

// optimizeMax is how long SET TARGET PORT GROUPS waits for the volume to move.
const optimizeMax = 30 * time.Second

// optimization is a move of a unit that an initiator has asked for. The last
// one is remembered, so that its initiator is not told of its own doing.
type optimization struct {
	by      *Nexus
	told    atomic.Bool                 // the others know
	settled atomic.Pointer[[]PortGroup] // the paths that it led to; nil while it goes on
}

// pathsMoved tells the initiators of a unit that paths have changed: all of
// them, but the one whose SET TARGET PORT GROUPS it was.
func (s *Server) pathsMoved(lu *logicalUnit) {
	if o := lu.optimize.Load(); o != nil {
		settled := o.settled.Load()
		if settled == nil || slices.EqualFunc(*settled, s.paths(lu.config.Load()), samePorts) {
			lu.moved.Store(movedExplicitly)
			o.told.Store(true)
			for _, i := range lu.members() {
				if i.nexus != o.by {
					i.raise(attentionPaths)
				}
			}
			return
		}
		lu.optimize.CompareAndSwap(o, nil)
	}
	lu.moved.Store(movedImplicitly)
	lu.raise(attentionPaths)
}

func samePorts(a, b PortGroup) bool {
	return a.ID == b.ID && a.State == b.State && a.Preferred == b.Preferred && slices.Equal(a.Ports, b.Ports)
}

func explicit(u *unitConfig) bool { return u.Optimize != nil }

// beginSetTargetPortGroups is begin of SET TARGET PORT GROUPS (SPC-4). Its list
// is a header of four reserved bytes and descriptors of four:
//
//	0  bits 3-0 ASYMMETRIC ACCESS STATE
//	2  u16      TARGET PORT GROUP
func beginSetTargetPortGroups(_ *Server, t *Task) Verdict {
	const (
		lengthField = 6
		most        = 4 + 4*256 // more than there can be groups
	)
	want := binary.BigEndian.Uint32(t.CDB[lengthField:])
	switch {
	case want == 0:
		return Finished
	case want < 4 || want%4 != 0 || want > most || t.outExpected() < want:
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

// wantedGroup finds the group that shall be active/optimized in a parameter
// list; the others become active/non-optimized by that, and no other state can
// be asked for. When it is not ok field is the byte in error.
func wantedGroup(list []byte, groups []PortGroup) (wanted *PortGroup, field uint16, ok bool) {
	for at := 4; at+4 <= len(list); at += 4 {
		d := list[at:]
		if PathState(d[0]&0x0f) != ActiveOptimized || wanted != nil {
			return nil, uint16(at), false
		}
		id := binary.BigEndian.Uint16(d[2:])
		n := slices.IndexFunc(groups, func(g PortGroup) bool { return g.ID == id })
		if n < 0 {
			return nil, uint16(at + 2), false
		}
		wanted = &groups[n]
	}
	return wanted, 0, true
}

func runSetTargetPortGroups(s *Server, t *Task) {
	unit, lu := t.state.unit, t.state.itl.lu
	wanted, field, ok := wantedGroup(t.state.data, s.paths(unit))
	switch {
	case !ok:
		t.rejectParameter(s, field)
		return
	case wanted == nil || wanted.State == ActiveOptimized:
		s.conclude(t, nil)
		return
	}
	before := lu.optimize.Load()
	move := &optimization{by: t.Nexus}
	if before != nil && before.settled.Load() == nil || !lu.optimize.CompareAndSwap(before, move) {
		t.check(&senseTransition)
		s.finish(t)
		return
	}
	p := t.park(s)
	if p == nil {
		lu.optimize.CompareAndSwap(move, nil)
		return
	}
	answer := func(failed bool) {
		t := p.unpark()
		switch {
		case t == nil:
			return
		case failed:
			t.check(&senseNotOptimized)
			s.finish(t)
		default:
			s.conclude(t, nil)
		}
		s.hooks.Load().Flush()
	}
	patience := time.AfterFunc(optimizeMax, func() { answer(true) })
	unit.Optimize(wanted.ID, func(err error) {
		patience.Stop()
		if err != nil {
			s.log.Warn("volume does not move to the node that an initiator asked for",
				"volume", unit.Name, "nexus", move.by.Initiator, "err", err)
			lu.optimize.CompareAndSwap(move, nil)
			answer(true)
			return
		}
		if !move.told.Load() {
			s.askPaths(lu, true)
		}
		groups := s.paths(unit)
		move.settled.Store(&groups)
		answer(false)
	})
}
