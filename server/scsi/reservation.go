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

	accessClasses
)

// grant is what one I_T_L nexus may do under one value of the ordered state.
// It is made when the state or the nexus comes, so that a command costs one
// atomic load whatever is registered. It is never modified.
type grant struct {
	id        StateID
	denied    uint8 // bit per Access: RESERVATION CONFLICT
	protected bool  // software write protection
}

func (g *grant) denies(a Access) bool { return g.denied&(1<<a) != 0 }

// grantTo computes what a port may do.
func (st *luState) grantTo(_ portID) *grant {
	return &grant{id: st.id, protected: st.protected}
}

// recheck is every request's Recheck: the ordered state has moved on between
// Begin and the request's turn, so the checks that depend on it are made again.
// A task that was aborted meanwhile does not start any more.
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
	}
	r.State = g.id
	return nil
}
