package scsi

// ReservationReport is who has registered with and reserved a logical unit, as
// every node answers alike: a picture for administrators.
type ReservationReport struct {
	Generation    uint32         // PRGENERATION
	Persist       bool           // the last REGISTER asked for persistence (APTPL)
	Type          byte           // of the persistent reservation (SPC-4); 0: none
	Registrations []Registration // in the order of registration
	Reserve       *Registration  // holder by RESERVE (SPC-2), without a key; nil: none
}

// Registration is one registered I_T nexus.
type Registration struct {
	Initiator string
	ISID      [6]byte
	Port      uint16 // relative target port id
	Key       uint64
	Holder    bool // holds the persistent reservation
}

func registrationOf(p portID) Registration {
	return Registration{Initiator: p.initiator, ISID: p.isid, Port: p.target}
}

// Reservations reports the reservations of a logical unit by the newest ordered
// state that this node has; the owner's is never behind. It does no I/O. An
// unknown LUN has none.
func (s *Server) Reservations(lun uint16) ReservationReport {
	lu := s.unit(lun)
	if lu == nil {
		return ReservationReport{}
	}
	st := lu.state.Load()
	r := ReservationReport{Generation: st.pr.generation, Persist: st.pr.powerLoss, Type: byte(st.pr.kind)}
	for i := range st.pr.registrations {
		x := registrationOf(st.pr.registrations[i].port)
		x.Key, x.Holder = st.pr.registrations[i].key, st.pr.holds(st.pr.registrations[i].port)
		r.Registrations = append(r.Registrations, x)
	}
	if st.legacy != nil {
		x := registrationOf(st.legacy.port)
		r.Reserve = &x
	}
	return r
}

// ClearReservations drops all registrations and reservations of a logical unit,
// the RESERVE of SPC-2 included, in the order of its operations: an
// administrator's CLEAR. Those who had registered are told as by PERSISTENT
// RESERVE OUT with CLEAR. done is called once, on a goroutine of the server,
// when every node acts by it; it must not block. The error is that of the
// volume, ErrUnavailable for an unknown LUN or a server that is closed.
func (s *Server) ClearReservations(lun uint16, done func(error)) {
	lu := s.unit(lun)
	if lu == nil {
		done(ErrUnavailable)
		return
	}
	if !s.sequencer.later(func() {
		s.changeState(lu, func(now *luState) (*luState, error) {
			if now.pr.kind == reserveNone && len(now.pr.registrations) == 0 && now.legacy == nil {
				return nil, nil
			}
			next := now.editedReserve(eventCleared, portID{})
			next.pr.registrations, next.legacy = nil, nil
			next.pr.dropReservation()
			return next, nil
		}, func(_ *luState, err error) { done(err) })
	}) {
		done(ErrUnavailable)
	}
}
