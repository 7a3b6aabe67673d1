package iscsi

import (
	"context"
	"errors"
	"slices"
	"time"
)

// ErrDraining is returned by Drain while the target is drained already.
var ErrDraining = errors.New("iSCSI target is drained already")

// drainage is where initiators go while this node's portals are drained.
type drainage struct {
	to func(initiator string) (addr string, ok bool)
}

// Drain empties this node's portals before planned work. From now on until
// Resume, normal logins are sent to the address that to names (login status
// 0101), or asked to come back later (0301) when to knows none or names a portal
// of this node. The address must be one that is alive and does not redirect.
// Discovery goes on. To is called during logins, concurrently; it must not block.
//
// Sessions are asked to log out (RFC 7143 section 11.9.1, event 1) within a
// time of at most 65535 s; those that do not are told that they end (event 3) and
// closed when their commands have ended. Drain returns when all normal sessions
// have ended. When ctx ends before, the drain is called off: the sessions that
// are left stay, logins are as before, and the error is ctx's.
func (t *Target) Drain(ctx context.Context, within time.Duration, to func(initiator string) (addr string, ok bool)) error {
	t.mu.Lock()
	switch {
	case t.closing:
		t.mu.Unlock()
		return ErrClosed
	case !t.login.drain.CompareAndSwap(nil, &drainage{to}):
		t.mu.Unlock()
		return ErrDraining
	}
	var asked, lost, ending []*session
	var conns []*connection
	for _, s := range t.sessions {
		switch {
		case s.discovery:
		case s.ending || s.detaching: // already
			ending = append(ending, s)
		case s.conn == nil:
			s.ending, s.detaching = true, true
			lost = append(lost, s)
		default:
			s.ending = true
			asked = append(asked, s)
			conns = append(conns, s.conn)
		}
	}
	t.mu.Unlock()
	for _, c := range conns {
		c.requestLogout(within)
	}
	t.log.Info("drain began", "target", t.name, "sessions", len(asked))
	for _, s := range lost {
		t.detach(s, true)
	}
	for _, s := range slices.Concat(asked, ending) {
		select {
		case <-s.done:
		case <-ctx.Done():
			t.callOff(asked)
			return ctx.Err()
		case <-t.stop:
			return ErrClosed
		}
	}
	return nil
}

// callOff ends a drain that is not wanted any more. Sessions that have not
// begun to end live on.
func (t *Target) callOff(asked []*session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range asked {
		if s.conn != nil && !s.detaching && s.conn.stay() {
			s.ending = false
		}
	}
	t.login.drain.Store(nil)
	t.log.Info("drain called off", "target", t.name)
}

// Resume lets initiators log in again after Drain.
func (t *Target) Resume() {
	if t.login.drain.Swap(nil) != nil {
		t.log.Info("drain ended", "target", t.name)
	}
}

// refusesLocked reports whether a session may not begin now. Under Target.mu.
func (t *Target) refusesLocked(l *login) bool {
	return t.closing || !l.discovery && t.login.drain.Load() != nil
}

// redirect says where a normal login has to go instead, with statusMoved, or
// that it may not be here now.
func (c *loginConfig) redirect(initiator string) (addr string, status uint16) {
	if addr, ok := c.directory.Redirect(initiator); ok {
		return addr, statusMoved
	}
	d := c.drain.Load()
	if d == nil {
		return "", statusSuccess
	}
	addr, ok := d.to(initiator)
	own := func(p Portal) bool { return p.Group == c.group && p.Addr == addr }
	if !ok || slices.ContainsFunc(c.directory.Portals(initiator), own) {
		return "", statusUnavailable
	}
	return addr, statusMoved
}

// stay takes a logout request back, as far as that is possible: the initiator
// may follow it nevertheless. False: the connection is ending.
func (c *connection) stay() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeAt = 0
	return !c.closed && !c.leaving.Load() && !c.dropped.Load()
}
