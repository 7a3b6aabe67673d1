package iscsi

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"time"

	"github.com/twinsan/twinsan/server/scsi"
)

// errReinstated is the end of a session whose initiator port logs in again.
var errReinstated = errors.New("session reinstatement")

// sessionKey names a session: the initiator port, on this portal group (RFC
// 7143 section 4.4.3). All six ISID bytes count, whichever portal is used.
type sessionKey struct {
	initiator string
	isid      [6]byte
	discovery bool
}

// session is one initiator port's relation to the target. It outlives its
// connection by Time2Retain. Target.mu guards the fields below key.
//
//	active --connection lost--> lost --Time2Retain over, or new login--> ended
//	   ^                          |
//	   +----same TSIH and CID-----+
//	active --logout, reinstatement, end of a discovery session--> ended
type session struct {
	initiator string
	isid      [6]byte
	tsih      uint16
	cid       uint16
	discovery bool
	nexus     *scsi.Nexus // nil in a discovery session
	auth      string
	done      chan struct{} // closed when it has ended and the device server gave the nexus up

	key         sessionKey
	conn        *connection // nil: lost
	gone        chan struct{}
	ending      bool // its connection is cut, or about to be; it will not be retained
	detaching   bool // somebody ends it
	retainUntil time.Duration
	window      window // while there is no connection
}

// admit makes the session of a login that has come to its end, or lets the
// connection take the place of another one. It waits until an older session of
// the same initiator port has ended, but not beyond expired.
func (t *Target) admit(l *login, c *connection, expired <-chan time.Time) (status uint16) {
	if l.first.TSIH != 0 {
		return t.reinstateConnection(l, c, expired)
	}
	key := sessionKey{l.initiator, l.first.ISID, l.discovery}
	for {
		t.mu.Lock()
		if t.refusesLocked(l) {
			t.mu.Unlock()
			return statusUnavailable
		}
		old := t.sessions[key]
		if old == nil {
			break
		}
		t.endSessionLocked(old) // unlocks
		select {
		case <-old.done:
		case <-expired:
			return statusUnavailable
		case <-t.stop:
			return statusUnavailable
		}
	}
	for !t.roomLocked(l.initiator, c) {
		lost := t.oldestLostLocked(l.initiator)
		if lost == nil {
			t.mu.Unlock()
			return statusOutOfResources
		}
		t.endSessionLocked(lost) // unlocks
		select {
		case <-lost.done:
		case <-expired:
			return statusUnavailable
		}
		t.mu.Lock()
		if t.refusesLocked(l) || t.sessions[key] != nil {
			t.mu.Unlock()
			return statusUnavailable
		}
	}
	s := &session{
		initiator: l.initiator, isid: l.first.ISID, cid: l.first.CID, discovery: l.discovery,
		tsih: t.newTSIHLocked(), auth: l.authName, key: key,
		done: make(chan struct{}), gone: make(chan struct{}), conn: c,
	}
	t.sessions[key] = s
	t.byTSIH[s.tsih] = s
	c.session = s
	t.mu.Unlock()
	c.window = newWindow(l.first.CmdSN, t.limits.Window)
	if s.discovery {
		return statusSuccess
	}
	nexus, err := t.device.Attach(s.initiator, s.isid)
	if err != nil {
		t.log.Warn("login refused by the device server", "nexus", s.initiator, "err", err)
		t.connectionEnded(c, errLogout)
		return statusOutOfResources
	}
	s.nexus = nexus
	return statusSuccess
}

// reinstateConnection lets a connection take over a session whose TSIH and CID
// it names. The session's tasks have ended before; its nexus goes on.
func (t *Target) reinstateConnection(l *login, c *connection, expired <-chan time.Time) (status uint16) {
	for {
		t.mu.Lock()
		s := t.byTSIH[l.first.TSIH]
		if s == nil || s.ending || s.detaching || t.closing || s.initiator != l.initiator || s.isid != l.first.ISID || s.discovery != l.discovery {
			t.mu.Unlock()
			return statusNoSession
		}
		if s.cid != l.first.CID {
			t.mu.Unlock()
			return statusTooManyConns
		}
		if s.conn == nil {
			s.conn = c
			s.gone = make(chan struct{})
			c.session = s
			c.window = s.window
			t.mu.Unlock()
			return statusSuccess
		}
		old, gone := s.conn, s.gone
		t.mu.Unlock()
		old.cut(errReinstated, false)
		select {
		case <-gone:
		case <-expired:
			return statusUnavailable
		case <-t.stop:
			return statusUnavailable
		}
	}
}

// roomLocked reports whether the limits allow another session.
func (t *Target) roomLocked(initiator string, c *connection) bool {
	ofName, ofAddress := 0, 0
	for _, s := range t.sessions {
		if s.initiator == initiator {
			ofName++
		}
		if s.conn != nil && s.conn.address == c.address {
			ofAddress++
		}
	}
	l := t.limits
	return ofName < l.SessionsPerInitiator && ofAddress < l.ConnectionsPerAddress && len(t.sessions) < l.Sessions
}

// oldestLostLocked finds a session without connection that may make room: one of
// the same name first, else any.
func (t *Target) oldestLostLocked(initiator string) *session {
	var found *session
	for _, s := range t.sessions {
		if s.conn != nil || s.detaching {
			continue
		}
		better := found == nil || s.initiator == initiator && found.initiator != initiator ||
			(s.initiator == initiator) == (found.initiator == initiator) && s.retainUntil < found.retainUntil
		if better {
			found = s
		}
	}
	return found
}

// newTSIHLocked makes a session handle that is free and cannot be guessed.
func (t *Target) newTSIHLocked() uint16 {
	for {
		var b [2]byte
		_, _ = rand.Read(b[:]) // never fails
		h := binary.BigEndian.Uint16(b[:])
		if h != 0 && t.byTSIH[h] == nil {
			return h
		}
	}
}

// endSessionLocked lets a session end as after a loss of the nexus: by its
// connection's goroutine when it has one, else here. It unlocks t.mu; s.done
// tells when it has ended.
func (t *Target) endSessionLocked(s *session) {
	s.ending = true
	conn := s.conn
	mine := conn == nil && !s.detaching
	if mine {
		s.detaching = true
	}
	t.mu.Unlock()
	switch {
	case conn != nil:
		conn.cut(errReinstated, false)
	case mine:
		t.detach(s, true)
	}
}

// connectionEnded is called once for each admitted connection, after its tasks
// have ended. The session ends too, or is retained for a while.
func (t *Target) connectionEnded(c *connection, cause error) {
	s := c.session
	logout := errors.Is(cause, errLogout)
	t.mu.Lock()
	s.conn = nil
	t.retireLocked(c)
	close(s.gone)
	end := logout || s.ending || s.discovery || t.closing || c.params.time2Retain == 0
	if !end {
		s.window = c.window
		s.window.forget()
		s.retainUntil = t.elapsed() + time.Duration(c.params.time2Retain)*time.Second
	} else if s.detaching {
		end = false
	} else {
		s.detaching = true
	}
	t.mu.Unlock()
	if end {
		t.detach(s, !logout)
	}
}

// detach gives a session's nexus up and forgets the session. Its caller has set
// s.detaching.
func (t *Target) detach(s *session, lost bool) {
	if s.nexus != nil {
		t.device.Detach(s.nexus, lost)
	}
	t.mu.Lock()
	delete(t.sessions, s.key)
	delete(t.byTSIH, s.tsih)
	t.mu.Unlock()
	close(s.done)
}

// expireSessions ends the sessions that were retained long enough.
func (t *Target) expireSessions(now time.Duration) {
	t.mu.Lock()
	var due []*session
	for _, s := range t.sessions {
		if s.conn == nil && !s.detaching && (now >= s.retainUntil || t.closing) {
			s.detaching = true
			s.ending = true
			due = append(due, s)
		}
	}
	t.mu.Unlock()
	for _, s := range due {
		t.detach(s, true)
	}
}
