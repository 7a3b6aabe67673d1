package scsi

import (
	"encoding/binary"
	"slices"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// The parameter list of PERSISTENT RESERVE OUT (SPC-4 "PERSISTENT RESERVE OUT
// parameter list"):
//
//	 0  RESERVATION KEY                    8 bytes
//	 8  SERVICE ACTION RESERVATION KEY     8 bytes
//	16  obsolete                           4 bytes
//	20  SPEC_I_PT 08h, ALL_TG_PT 04h, APTPL 01h
//	24  with SPEC_I_PT: length of the TransportIDs (4 bytes), TransportIDs
//
// and of REGISTER AND MOVE from byte 16 on:
//
//	17  UNREG 02h, APTPL 01h
//	18  RELATIVE TARGET PORT IDENTIFIER    2 bytes
//	20  length of the TransportID          4 bytes
//	24  TransportID
const (
	prListBytes       = 24
	prServiceKeyField = 8
	prMoveFlagsField  = 17
	prMoveTargetField = 18
	prFlagsField      = 20
	prTransportField  = 24

	prSpecified = 0x08
	prAllPorts  = 0x04
	prUnreg     = 0x02
	prPowerLoss = 0x01

	// maxReserveList bounds a parameter list: more TransportIDs than that cannot be
	// registered anyway.
	maxReserveList = 128 << 10
)

// reservationCommands are the rows of PERSISTENT RESERVE IN and OUT, RESERVE and
// RELEASE. What PERSISTENT RESERVE OUT may do depends on more than the class of
// the command: it decides on the newest state.
func reservationCommands() []*command {
	in := func(action byte, name string, reply func(*Server, *Task, []byte) ([]byte, bool)) *command {
		return &command{name: "PERSISTENT RESERVE IN, " + name, op: cdb.PersistentReserveIn, actions: true, action: action,
			worksIn: inStandby, readsState: true,
			usage: cdb.Mask{7: all, 8: all}, ignore: cdb.Mask{9: control},
			begin: beginReply, reply: reply, alloc: allocField{at: 7, width: 2}}
	}
	out := func(action byte, name string) *command {
		return &command{name: "PERSISTENT RESERVE OUT, " + name, op: cdb.PersistentReserveOut, actions: true, action: action,
			worksIn: inStandby,
			usage:   cdb.Mask{2: all, 5: all, 6: all, 7: all, 8: all}, ignore: cdb.Mask{9: control},
			begin: beginReserveOut, run: runReserveOut}
	}
	return []*command{
		in(0, "READ KEYS", readKeys),
		in(1, "READ RESERVATION", readReservation),
		in(2, "REPORT CAPABILITIES", reportCapabilities),
		in(3, "READ FULL STATUS", readFullStatus),
		out(prRegister, "REGISTER"),
		out(prReserve, "RESERVE"),
		out(prRelease, "RELEASE"),
		out(prClear, "CLEAR"),
		out(prPreempt, "PREEMPT"),
		out(prPreemptAbort, "PREEMPT AND ABORT"),
		out(prRegisterAndIgnore, "REGISTER AND IGNORE EXISTING KEY"),
		out(prRegisterAndMove, "REGISTER AND MOVE"),
		{name: "RESERVE(6)", op: cdb.Reserve6,
			ignore: cdb.Mask{1: oldLUN, 2: all, 5: control}, begin: beginReserveUnit, run: runReserveUnit},
		{name: "RELEASE(6)", op: cdb.Release6, access: AccessAlways,
			ignore: cdb.Mask{1: oldLUN, 2: all, 5: control}, begin: beginReserveUnit, run: runReleaseUnit},
		{name: "RESERVE(10)", op: cdb.Reserve10,
			ignore: cdb.Mask{1: oldLUN, 2: all, 3: all, 9: control}, begin: beginReserveUnit, run: runReserveUnit},
		{name: "RELEASE(10)", op: cdb.Release10, access: AccessAlways,
			ignore: cdb.Mask{1: oldLUN, 2: all, 3: all, 9: control}, begin: beginReserveUnit, run: runReleaseUnit},
	}
}

// beginReserveOut is begin of PERSISTENT RESERVE OUT. SCOPE and TYPE matter only to
// those service actions that make or end a reservation.
func beginReserveOut(_ *Server, t *Task) Verdict {
	const (
		scopeField = 2
		listField  = 5
	)
	want := binary.BigEndian.Uint32(t.CDB[listField:])
	switch t.state.cmd.action {
	case prReserve, prRelease, prPreempt, prPreemptAbort:
		if t.CDB[scopeField]>>4 != 0 || !reserveKind(t.CDB[scopeField]&0x0f).valid() {
			sense := invalidField(scopeField)
			return t.refuse(&sense)
		}
	}
	if want < prListBytes || want > maxReserveList || t.outExpected() < want {
		return t.refuse(&senseListLen)
	}
	t.Transfer, t.OutLen = want, want
	return WantData
}

// parseReserveOut decodes a parameter list of at least prListBytes. TransportIDs
// that name a device, not a port, go through known, which returns its ports.
func parseReserveOut(action byte, kind reserveKind, list []byte, known func(initiator string) []portName) (*reserveOut, *cdb.Sense) {
	c := &reserveOut{
		action:     action,
		kind:       kind,
		key:        binary.BigEndian.Uint64(list),
		serviceKey: binary.BigEndian.Uint64(list[prServiceKeyField:]),
	}
	refuse := func(field uint16) (*reserveOut, *cdb.Sense) {
		sense := invalidParameter(field)
		return nil, &sense
	}
	ids := list[prTransportField:]
	if action == prRegisterAndMove {
		c.powerLoss = list[prMoveFlagsField]&prPowerLoss != 0
		c.unregister = list[prMoveFlagsField]&prUnreg != 0
		c.target = binary.BigEndian.Uint16(list[prMoveTargetField:])
		if uint64(binary.BigEndian.Uint32(list[prFlagsField:])) != uint64(len(ids)) {
			return nil, &senseListLen
		}
		id, rest, ok := cutTransportID(ids)
		if !ok || id.device || len(rest) != 0 {
			return refuse(prTransportField)
		}
		c.initiators = []portName{id.portName}
		return c, nil
	}
	flags := list[prFlagsField]
	c.named = flags&prSpecified != 0
	if action == prRegister || action == prRegisterAndIgnore {
		c.powerLoss = flags&prPowerLoss != 0
		c.allPorts = flags&prAllPorts != 0
	}
	switch {
	case c.named && action != prRegister:
		return refuse(prFlagsField)
	case !c.named && len(ids) != 0, c.named && len(ids) < 4:
		return nil, &senseListLen
	case !c.named:
		return c, nil
	}
	if ids = ids[4:]; uint64(binary.BigEndian.Uint32(list[prTransportField:])) != uint64(len(ids)) {
		return nil, &senseListLen
	}
	for len(ids) > 0 {
		at := uint16(min(len(list)-len(ids), 0xffff))
		id, rest, ok := cutTransportID(ids)
		if !ok {
			return refuse(at)
		}
		ids = rest
		if !id.device {
			c.initiators = append(c.initiators, id.portName)
			continue
		}
		ports := known(id.initiator)
		if len(ports) == 0 {
			return refuse(at)
		}
		c.initiators = append(c.initiators, ports...)
	}
	return c, nil
}

func runReserveOut(s *Server, t *Task) {
	c, sense := parseReserveOut(t.state.cmd.action, reserveKind(t.CDB[2]&0x0f), t.state.data, s.portsOf)
	if sense != nil {
		t.check(sense)
		s.finish(t)
		return
	}
	by := t.Nexus.id()
	targets := s.targetPorts(t.state.unit)
	edit := t.checkedEdit(func(now *luState) (*luState, error) { return now.reserveOut(c, by, targets) })
	s.changeState(t.state.itl.lu, edit, func(_ *luState, err error) {
		if err == nil && c.action == prPreemptAbort {
			s.awaitPreempted(t, c.preemptsItself())
			return
		}
		s.concludeChange(t, err)
	})
}

// awaitPreempted ends a PREEMPT AND ABORT whose change is in force: every node
// has aborted the tasks of the nexuses that were preempted, and nothing of them
// is sequenced any more. Those of this node have ended when the command is
// answered. A command that was aborted itself waits for nobody, so that two
// cannot wait for each other.
func (s *Server) awaitPreempted(t *Task, itself bool) {
	a := abort{s: s, by: t.Nexus, wait: new(abortWait)}
	a.wait.left.Store(1)
	a.wait.done = func() { s.conclude(t, nil) }
	if !t.Aborted.Load() {
		for _, i := range t.state.itl.lu.members() {
			if itself && i.nexus == t.Nexus {
				a.tasksOf(i, t)
			}
			a.await(i, t)
		}
	}
	a.giveUp()
	a.wait.oneLess()
}

// targetPorts are the relative target port ids of all nodes.
func (s *Server) targetPorts(u *unitConfig) []uint16 {
	var all []uint16
	for _, g := range s.paths(u) {
		all = append(all, g.Ports...)
	}
	return all
}

// portsOf are the ports of an initiator that this node has a session with.
func (s *Server) portsOf(initiator string) []portName {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []portName
	for n := range s.nexuses {
		if p := (portName{n.Initiator, n.ISID}); n.Initiator == initiator && !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b portName) int { return slices.Compare(a.isid[:], b.isid[:]) })
	return all
}
