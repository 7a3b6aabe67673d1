package scsi

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// A unit has at most maxRegistrations, encoded in at most maxReserveBytes, which
// leaves the rest of the ordered state its room. Beyond that a registration is
// refused with INSUFFICIENT REGISTRATION RESOURCES.
const (
	maxRegistrations = 512
	maxReserveBytes  = 48 << 10
)

// reserveKind is the TYPE of a persistent reservation, with the numbers of SPC-4
// "Persistent reservations type"; zero is none.
type reserveKind uint8

const (
	reserveNone               reserveKind = 0
	writeExclusive            reserveKind = 1
	exclusiveAccess           reserveKind = 3
	writeExclusiveRegistrants reserveKind = 5
	exclusiveRegistrants      reserveKind = 6
	writeExclusiveAll         reserveKind = 7
	exclusiveAll              reserveKind = 8
)

func (k reserveKind) valid() bool {
	return k == writeExclusive || k == exclusiveAccess || writeExclusiveRegistrants <= k && k <= exclusiveAll
}

// exclusive: reading conflicts too.
func (k reserveKind) exclusive() bool {
	return k == exclusiveAccess || k == exclusiveRegistrants || k == exclusiveAll
}

// forRegistrants: every registered nexus has access.
func (k reserveKind) forRegistrants() bool { return k >= writeExclusiveRegistrants }

// heldByAll: every registered nexus holds the reservation.
func (k reserveKind) heldByAll() bool { return k >= writeExclusiveAll }

// persistent is the persistent reservation state of a unit (SPC-4 "Persistent
// reservations"). It is part of the ordered state, so it is durable on every
// in-sync node before a command that changed it is answered, and it outlives
// failover and the restart of all nodes. That goes for APTPL=0 too: such
// registrations may be forgotten at a loss of power, and a host that finds one
// afterwards preempts it as any other; one that it relied on and that is gone
// would let two hosts write. APTPL is kept only to be reported.
//
// Invariants: a reservation has a registered holder, and one held by all has at
// least one registration; a port is registered once.
type persistent struct {
	generation    uint32
	powerLoss     bool // the last registration's APTPL
	kind          reserveKind
	holder        portID // unless kind is heldByAll or none
	registrations []registration
}

// registration is one I_T nexus's.
type registration struct {
	port     portID
	key      uint64
	allPorts bool // registered with ALL_TG_PT
}

// find returns the place of a port's registration, or -1.
func (pr *persistent) find(port portID) int {
	for i := range pr.registrations {
		if pr.registrations[i].port == port {
			return i
		}
	}
	return -1
}

// holds says whether a port holds the reservation.
func (pr *persistent) holds(port portID) bool {
	switch {
	case pr.kind == reserveNone:
		return false
	case pr.kind.heldByAll():
		return pr.find(port) >= 0
	default:
		return pr.holder == port
	}
}

// admits says whether a reservation lets a port do everything.
func (pr *persistent) admits(port portID, registered bool) bool {
	if pr.kind.forRegistrants() {
		return registered
	}
	return pr.kind != reserveNone && pr.holder == port
}

// ports is the set of registered ports.
func (pr *persistent) ports() map[portID]bool {
	set := make(map[portID]bool, len(pr.registrations))
	for i := range pr.registrations {
		set[pr.registrations[i].port] = true
	}
	return set
}

// Section 2 of the encoded state, big-endian:
//
//	 0  u32  PRgeneration
//	 4  u8   flags: 1 APTPL
//	 5  u8   type, 0 for no reservation
//	 6  u16  number of the holder's registration; FFFFh for none, or all
//	 8  u16  number of names
//	10  u16  number of registrations
//	    names: u8 length, initiator name
//	    registrations: u64 key, 6 ISID, u16 relative target port id, u16 number of the name, u8 flags: 1 ALL_TG_PT
//
// Registrations stand in the order in which they came. A name stands once
// however many registrations have it. Part of the wire and disk formats, do not change.
const (
	reserveHeaderBytes = 12
	registrationBytes  = 19
	noHolder           = 0xffff
)

func (st *luState) putReserve(b []byte) []byte {
	pr := &st.pr
	if pr.generation == 0 && !pr.powerLoss && pr.kind == reserveNone && len(pr.registrations) == 0 {
		return b
	}
	holder := uint16(noHolder)
	if pr.kind != reserveNone && !pr.kind.heldByAll() {
		holder = uint16(pr.find(pr.holder))
	}
	numbers := make(map[string]uint16)
	var names []byte
	for i := range pr.registrations {
		name := pr.registrations[i].port.initiator
		if _, ok := numbers[name]; !ok {
			numbers[name] = uint16(len(numbers))
			names = append(append(names, byte(len(name))), name...)
		}
	}
	b = binary.BigEndian.AppendUint32(b, pr.generation)
	b = append(b, bit(pr.powerLoss), byte(pr.kind))
	b = binary.BigEndian.AppendUint16(b, holder)
	b = binary.BigEndian.AppendUint16(b, uint16(len(numbers)))
	b = binary.BigEndian.AppendUint16(b, uint16(len(pr.registrations)))
	b = append(b, names...)
	for i := range pr.registrations {
		r := &pr.registrations[i]
		b = binary.BigEndian.AppendUint64(b, r.key)
		b = append(b, r.port.isid[:]...)
		b = binary.BigEndian.AppendUint16(b, r.port.target)
		b = binary.BigEndian.AppendUint16(b, numbers[r.port.initiator])
		b = append(b, bit(r.allPorts))
	}
	return b
}

func bit(set bool) byte {
	if set {
		return 1
	}
	return 0
}

func (st *luState) getReserve(b []byte) error {
	bad := func(what string) error { return fmt.Errorf("%w: reservations: %s", errState, what) }
	if len(b) < reserveHeaderBytes {
		return bad("cut short")
	}
	var pr persistent
	pr.generation = binary.BigEndian.Uint32(b)
	pr.powerLoss = b[4]&1 != 0
	pr.kind = reserveKind(b[5])
	holder, names, count := binary.BigEndian.Uint16(b[6:]), binary.BigEndian.Uint16(b[8:]), binary.BigEndian.Uint16(b[10:])
	b = b[reserveHeaderBytes:]
	if pr.kind != reserveNone && !pr.kind.valid() {
		return bad("unknown type")
	}
	if names > count || count > maxRegistrations {
		return bad("too many")
	}
	table := make([]string, 0, names)
	for range names {
		if len(b) < 1 || len(b)-1 < int(b[0]) {
			return bad("name cut short")
		}
		n := 1 + int(b[0])
		table = append(table, string(b[1:n]))
		b = b[n:]
	}
	if len(b) != int(count)*registrationBytes {
		return bad("registrations cut short")
	}
	seen := make(map[portID]bool, count)
	for ; len(b) > 0; b = b[registrationBytes:] {
		r := registration{key: binary.BigEndian.Uint64(b), allPorts: b[18]&1 != 0}
		copy(r.port.isid[:], b[8:])
		r.port.target = binary.BigEndian.Uint16(b[14:])
		name := binary.BigEndian.Uint16(b[16:])
		if name >= names {
			return bad("no such name")
		}
		r.port.initiator = table[name]
		if seen[r.port] {
			return bad("one port twice")
		}
		seen[r.port] = true
		pr.registrations = append(pr.registrations, r)
	}
	switch {
	case pr.kind == reserveNone, pr.kind.heldByAll():
		if holder != noHolder || pr.kind != reserveNone && count == 0 {
			return bad("holder")
		}
	case holder >= count:
		return bad("no such holder")
	default:
		pr.holder = pr.registrations[holder].port
	}
	st.pr = pr
	return nil
}

// Service actions of PERSISTENT RESERVE OUT.
const (
	prRegister          = 0
	prReserve           = 1
	prRelease           = 2
	prClear             = 3
	prPreempt           = 4
	prPreemptAbort      = 5
	prRegisterAndIgnore = 6
	prRegisterAndMove   = 7
)

// reserveOut is a decoded PERSISTENT RESERVE OUT.
type reserveOut struct {
	action     byte
	kind       reserveKind // of RESERVE, RELEASE and PREEMPT
	key        uint64      // RESERVATION KEY
	serviceKey uint64      // SERVICE ACTION RESERVATION KEY
	powerLoss  bool        // APTPL
	allPorts   bool        // ALL_TG_PT
	unregister bool        // UNREG of REGISTER AND MOVE
	target     uint16      // RELATIVE TARGET PORT IDENTIFIER of REGISTER AND MOVE
	named      bool        // SPEC_I_PT
	initiators []portName  // TransportIDs of SPEC_I_PT, or the one of REGISTER AND MOVE
}

// reserveOut applies a command of one nexus. targets are the relative target
// port ids of all nodes. It returns the next state, nil when the command is
// right and changes nothing, or an error: ErrReserved or a refusal.
func (st *luState) reserveOut(c *reserveOut, by portID, targets []uint16) (*luState, error) {
	own := st.pr.find(by)
	if c.action == prRegister || c.action == prRegisterAndIgnore {
		return st.register(c, by, own, targets)
	}
	if own < 0 || st.pr.registrations[own].key != c.key {
		return nil, ErrReserved
	}
	switch c.action {
	case prReserve:
		return st.reservePersistent(c, by)
	case prRelease:
		return st.releasePersistent(c, by)
	case prClear:
		next := st.editedReserve(eventCleared, by)
		next.pr.registrations = nil
		next.pr.dropReservation()
		return next, nil
	case prPreempt:
		return st.preempt(c, by, eventPreempted)
	case prPreemptAbort:
		return st.preempt(c, by, eventPreemptAborted)
	default:
		return st.move(c, by, targets)
	}
}

// editedReserve is edited for a change that counts in PRgeneration, with
// registrations of its own.
func (st *luState) editedReserve(kind eventKind, by portID) *luState {
	next := st.edited(kind, by)
	next.pr.generation++
	next.pr.registrations = slices.Clone(st.pr.registrations)
	return next
}

func (pr *persistent) dropReservation() { pr.kind, pr.holder = reserveNone, portID{} }

// register is REGISTER and REGISTER AND IGNORE EXISTING KEY.
func (st *luState) register(c *reserveOut, by portID, own int, targets []uint16) (*luState, error) {
	held := uint64(0)
	if own >= 0 {
		held = st.pr.registrations[own].key
	}
	switch {
	case c.action == prRegister && c.key != held:
		return nil, ErrReserved
	case c.named && own >= 0:
		return nil, refuseParameter(prFlagsField)
	case c.serviceKey == 0 && own < 0:
		return nil, nil
	case c.serviceKey == 0:
		return st.unregister(c, by, own), nil
	}
	next := st.editedReserve(eventOther, by)
	next.pr.powerLoss = c.powerLoss
	if !c.allPorts {
		targets = []uint16{by.target}
	}
	// The sender's port is always one of targets, unless its node has left the
	// unit's paths at this moment: then it is registered all the same.
	next.pr.put(by, c.serviceKey, c.allPorts, true)
	for _, target := range targets {
		next.pr.put(portID{by.initiator, by.isid, target}, c.serviceKey, c.allPorts, true)
		for _, i := range c.initiators {
			// One that is registered already has a key of its own, which stays.
			next.pr.put(portID{i.initiator, i.isid, target}, c.serviceKey, c.allPorts, false)
		}
	}
	return next.fits()
}

// put registers a port. With replace a registration that is there gets the key.
func (pr *persistent) put(port portID, key uint64, allPorts, replace bool) {
	i := pr.find(port)
	switch {
	case i < 0:
		pr.registrations = append(pr.registrations, registration{port, key, allPorts})
	case replace:
		pr.registrations[i].key = key
		pr.registrations[i].allPorts = pr.registrations[i].allPorts || allPorts
	}
}

// fits refuses a state with more registrations than there is room for (BOUNDED).
func (st *luState) fits() (*luState, error) {
	if len(st.pr.registrations) > maxRegistrations ||
		len(st.putReserve(nil)) > maxReserveBytes || len(st.encode(nil)) > stateBytesMax {
		return nil, &refusal{senseFull}
	}
	return st, nil
}

// unregister removes the sender's registration, and the reservation when its
// holder is gone.
func (st *luState) unregister(c *reserveOut, by portID, own int) *luState {
	kind := eventOther
	last := len(st.pr.registrations) == 1
	ends := st.pr.kind != reserveNone && (last || !st.pr.kind.heldByAll() && st.pr.holder == by)
	if ends {
		kind = eventReleased
	}
	next := st.editedReserve(kind, by)
	pr := &next.pr
	pr.powerLoss = c.powerLoss
	pr.remove(own)
	if ends {
		pr.dropReservation()
	}
	return next
}

// remove takes a registration out. What is left of an ALL_TG_PT registration is
// no longer one on all ports.
func (pr *persistent) remove(i int) {
	gone := pr.registrations[i]
	pr.registrations = slices.Delete(pr.registrations, i, i+1)
	if !gone.allPorts {
		return
	}
	for j := range pr.registrations {
		r := &pr.registrations[j]
		if r.port.initiator == gone.port.initiator && r.port.isid == gone.port.isid {
			r.allPorts = false
		}
	}
}

func (st *luState) reservePersistent(c *reserveOut, by portID) (*luState, error) {
	pr := &st.pr
	switch {
	case pr.kind == reserveNone:
		next := st.edited(eventOther, by)
		next.pr.hold(c.kind, by)
		return next, nil
	case pr.holds(by) && pr.kind == c.kind:
		return nil, nil
	default:
		return nil, ErrReserved
	}
}

func (pr *persistent) hold(kind reserveKind, port portID) {
	pr.kind, pr.holder = kind, port
	if kind.heldByAll() {
		pr.holder = portID{}
	}
}

func (st *luState) releasePersistent(c *reserveOut, by portID) (*luState, error) {
	switch {
	case !st.pr.holds(by):
		return nil, nil
	case st.pr.kind != c.kind:
		return nil, &refusal{senseRelease}
	}
	next := st.edited(eventReleased, by)
	next.pr.dropReservation()
	return next, nil
}

// preempt is PREEMPT and PREEMPT AND ABORT. The sender's registration always stays.
func (st *luState) preempt(c *reserveOut, by portID, kind eventKind) (*luState, error) {
	pr := &st.pr
	takeOver := false
	victim := func(r *registration) bool { return r.key == c.serviceKey }
	switch {
	case pr.kind.heldByAll():
		if c.serviceKey == 0 {
			takeOver = true
			victim = func(*registration) bool { return true }
		}
	case c.serviceKey == 0:
		return nil, refuseParameter(prServiceKeyField)
	case pr.kind != reserveNone:
		takeOver = pr.registrations[pr.find(pr.holder)].key == c.serviceKey
	}
	if !takeOver && !slices.ContainsFunc(pr.registrations, func(r registration) bool { return victim(&r) }) {
		return nil, ErrReserved
	}
	next := st.editedReserve(kind, by)
	for i := len(next.pr.registrations) - 1; i >= 0; i-- {
		if r := &next.pr.registrations[i]; r.port != by && victim(r) {
			next.pr.remove(i)
		}
	}
	if takeOver {
		next.pr.hold(c.kind, by)
	}
	return next, nil
}

// preemptsItself: the sender's own tasks are among those that PREEMPT AND ABORT ends.
func (c *reserveOut) preemptsItself() bool {
	return c.action == prPreemptAbort && c.serviceKey == c.key
}

// move is REGISTER AND MOVE.
func (st *luState) move(c *reserveOut, by portID, targets []uint16) (*luState, error) {
	if st.pr.kind.heldByAll() || !st.pr.holds(by) {
		return nil, ErrReserved
	}
	to := portID{c.initiators[0].initiator, c.initiators[0].isid, c.target}
	switch {
	case c.serviceKey == 0:
		return nil, refuseParameter(prServiceKeyField)
	case !slices.Contains(targets, c.target):
		return nil, refuseParameter(prMoveTargetField)
	case to.initiator == by.initiator && to.isid == by.isid:
		return nil, refuseParameter(prTransportField)
	}
	next := st.editedReserve(eventOther, by)
	pr := &next.pr
	pr.powerLoss = c.powerLoss
	pr.put(to, c.serviceKey, false, true)
	pr.holder = to
	if c.unregister {
		pr.remove(pr.find(by))
	}
	return next.fits()
}

// refuseParameter is INVALID FIELD IN PARAMETER LIST as an edit's error.
func refuseParameter(field uint16) error { return &refusal{invalidParameter(field)} }
