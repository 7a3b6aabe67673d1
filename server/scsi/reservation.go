package scsi

// Access is the class of a command for reservations (SPC-4 "Commands allowed in
// the presence of various reservations"). It goes by the command, never by the
// direction of its data: UNMAP may carry none and still writes.
type Access uint8

const (
	// AccessAny is allowed whatever persistent reservation there is.
	AccessAny Access = iota
	// AccessRead conflicts with exclusive access.
	AccessRead
	// AccessWrite conflicts with write exclusive and exclusive access.
	AccessWrite
	// AccessAlways is allowed even while another initiator holds the unit by RESERVE.
	AccessAlways
)

// grant is what one I_T_L nexus may do under one value of the ordered state.
// It is made when the state or the nexus comes, so that a command costs one
// atomic load whatever is registered. It is never modified.
type grant struct {
	id        StateID
	aborts    uint32 // luState.aborts
	denied    uint8  // bit per Access: RESERVATION CONFLICT
	protected bool   // software write protection
}

func (g *grant) denies(a Access) bool { return g.denied&(1<<a) != 0 }

// grantTo computes what a port may do: by RESERVE, which leaves others nearly
// nothing, and by the persistent reservation (SPC-4 "Persistent reservations
// overview").
func (st *luState) grantTo(port portID) *grant {
	return st.grant(port, st.pr.find(port) >= 0)
}

// grant is grantTo for a caller that knows whether the port is registered.
func (st *luState) grant(port portID, registered bool) *grant {
	g := &grant{id: st.id, aborts: st.aborts, protected: st.protected}
	if st.legacy != nil && st.legacy.port != port {
		g.denied = 1<<AccessAny | 1<<AccessRead | 1<<AccessWrite
	}
	if st.pr.kind != reserveNone && !st.pr.admits(port, registered) {
		g.denied |= 1 << AccessWrite
		if st.pr.kind.exclusive() {
			g.denied |= 1 << AccessRead
		}
	}
	return g
}

// accessOf is the class of a command that may have another one for some CDBs.
func (c *command) accessOf(b *[16]byte) Access {
	if c.harmless != nil && c.harmless(b) {
		return AccessAny
	}
	return c.access
}

// harmlessStart: START STOP UNIT with START=1 and no power condition changes nothing.
func harmlessStart(b *[16]byte) bool { return b[4]&0xf3 == 0x01 }

// harmlessAllow: PREVENT ALLOW MEDIUM REMOVAL that allows.
func harmlessAllow(b *[16]byte) bool { return b[4]&0x03 == 0 }

// recheck is every request's Recheck: the ordered state has moved on between
// Begin and the request's turn, so the checks that depend on it are made again.
// A task that was aborted meanwhile does not start any more. The grant is read
// first: whoever sees the one of a reset sees also that the reset aborted the
// task (publish works in the other order).
func recheck(r *Request) error {
	t := taskOf(r)
	cmd := t.state.cmd
	g := t.state.itl.grant.Load()
	switch {
	case t.Aborted.Load():
		return ErrBusy // the status is the abort's
	case g.denies(cmd.access):
		return ErrReserved
	case g.protected && cmd.writes:
		return ErrReadOnly
	case t.state.itl.lu.sanitizeBars(cmd):
		return errSanitizing
	}
	r.State = g.id
	return nil
}
