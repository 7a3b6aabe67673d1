package scsi

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

// RESERVE and RELEASE of SPC-2, beside persistent reservations (SPC-4
// "Exceptions to SPC-2 RESERVE and RELEASE behavior": CRH). The holder is kept in
// the ordered state, since every node must know it; it is volatile all the
// same and goes by RELEASE, by a reset, with the holder's nexus, and with the
// holder's node.

// legacyReserve is a unit held by RESERVE. It is never modified.
type legacyReserve struct {
	port portID
	// after is the state that the latest RESERVE found: it tells a reservation that
	// outlived its nexus from one that the same port made since.
	after StateID
}

// Section 3 of the encoded state: u64 epoch and u64 sequence of after, the port.
// Part of the wire and disk formats, do not change.
func (st *luState) putLegacy(b []byte) []byte {
	if st.legacy == nil {
		return b
	}
	b = binary.BigEndian.AppendUint64(b, uint64(st.legacy.after.Epoch))
	b = binary.BigEndian.AppendUint64(b, uint64(st.legacy.after.Seq))
	return appendPort(b, st.legacy.port)
}

func (st *luState) getLegacy(b []byte) error {
	if len(b) < 16 {
		return fmt.Errorf("%w: reserve cut short", errState)
	}
	l := new(legacyReserve)
	getNumber(&l.after.Epoch, b)
	getNumber(&l.after.Seq, b[8:])
	port, rest, err := cutPort(b[16:])
	if err == nil && len(rest) != 0 {
		err = fmt.Errorf("%w: reserve with a tail", errState)
	}
	l.port = port
	st.legacy = l
	return err
}

// beginReserveUnit is begin of RESERVE and RELEASE. Third party and extent
// reservations are refused by the command table.
func beginReserveUnit(*Server, *Task) Verdict { return Ready }

func runReserveUnit(s *Server, t *Task) {
	by := t.Nexus.id()
	t.changeState(s, func(now *luState) (*luState, error) { return now.reserveUnit(by) })
}

func runReleaseUnit(s *Server, t *Task) {
	by := t.Nexus.id()
	t.changeState(s, func(now *luState) (*luState, error) { return now.releaseUnit(by) })
}

func (st *luState) reserveUnit(by portID) (*luState, error) {
	switch {
	case st.pr.admits(by, st.pr.find(by) >= 0):
		return nil, nil
	case len(st.pr.registrations) > 0, st.legacy != nil && st.legacy.port != by:
		return nil, ErrReserved
	}
	next := st.edited(eventOther, by)
	next.legacy = &legacyReserve{by, st.id}
	return next, nil
}

func (st *luState) releaseUnit(by portID) (*luState, error) {
	switch {
	case st.legacy != nil && st.legacy.port == by:
		next := st.edited(eventOther, by)
		next.legacy = nil
		return next, nil
	case len(st.pr.registrations) > 0 && !st.pr.admits(by, st.pr.find(by) >= 0):
		return nil, ErrReserved
	}
	return nil, nil
}

// dropReserve ends a RESERVE, unless another has come since. It may be called on
// any goroutine; done, which may be nil, is called once.
func (s *Server) dropReserve(lu *logicalUnit, held *legacyReserve, done func()) {
	if done == nil {
		done = func() {}
	}
	started := s.sequencer.later(func() {
		s.changeState(lu, func(now *luState) (*luState, error) {
			if now.legacy == nil || *now.legacy != *held {
				return nil, nil
			}
			next := now.edited(eventOther, portID{})
			next.legacy = nil
			return next, nil
		}, func(*luState, error) { done() })
	})
	if !started {
		done()
	}
}

// dropReservesOf ends what a nexus holds by RESERVE: it is lost, or has just
// come, which means that it was lost before.
func (s *Server) dropReservesOf(n *Nexus, units []*logicalUnit) {
	for _, lu := range units {
		if held := lu.state.Load().legacy; held != nil && held.port == n.id() {
			s.dropReserve(lu, held, nil)
		}
	}
}

// Release gives up what a nexus holds by RESERVE, and waits for that, at most
// limit: once its logout is answered, others may have the unit.
func (s *Server) Release(n *Nexus, limit time.Duration) {
	units := n.state.view.Load().all()
	dropped := make(chan struct{}, len(units))
	late := time.NewTimer(limit)
	defer late.Stop()
	waiting := 0
	for _, lu := range units {
		if l := lu.state.Load().legacy; l != nil && l.port == n.id() {
			waiting++
			s.dropReserve(lu, l, func() { dropped <- struct{}{} })
		}
	}
	for ; waiting > 0; waiting-- {
		select {
		case <-dropped:
		case <-late.C:
			return
		}
	}
}

// reviewReserve looks whether a RESERVE has outlived its holder: the drop at the
// end of a nexus may have failed, and a node that died drops nothing. It is called
// when the paths change and when a RESERVE stands in a command's way, so no
// timer is needed; one review at a time.
func (s *Server) reviewReserve(lu *logicalUnit) {
	held := lu.state.Load().legacy
	if held == nil || lu.review.Swap(true) {
		return
	}
	end := func() { lu.review.Store(false) }
	started := s.sequencer.later(func() {
		if s.holderGone(lu, held.port) {
			s.dropReserve(lu, held, end)
			return
		}
		end()
	})
	if !started {
		end()
	}
}

// holderGone: a port of this node has no nexus any more that sees the unit, or
// the port's node is away and this one is the owner's.
func (s *Server) holderGone(lu *logicalUnit, port portID) bool {
	if port.target == s.nodePort {
		s.mu.Lock()
		defer s.mu.Unlock()
		for n := range s.nexuses {
			if i := n.state.view.Load().units[lu.lun]; n.id() == port && i != nil && i.lu == lu {
				return false
			}
		}
		return true
	}
	owner, away := false, true
	for _, g := range s.paths(lu.config.Load()) {
		if g.ID == s.portGroup {
			owner = g.State == ActiveOptimized
		}
		if slices.Contains(g.Ports, port.target) {
			away = g.State == Unavailable
		}
	}
	return owner && away
}
