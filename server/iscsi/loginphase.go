package iscsi

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// maxLoginReply is the longest text that an initiator takes during login unless
// it says otherwise (RFC 7143 section 13.12), bytes.
const maxLoginReply = 8192

// errLogin is the end of a connection whose login came to nothing.
var errLogin = errors.New("login failed")

// logIn runs the login phase of a connection: it carries PDUs between the
// socket and the state machine. Rest is what the initiator sent beyond it.
func (t *Target) logIn(c *connection) (rest []byte, ok bool) {
	timer := time.NewTimer(t.limits.LoginTime)
	defer timer.Stop()
	if c.conn.SetDeadline(time.Now().Add(t.limits.LoginTime)) != nil {
		return nil, false
	}
	l := newLogin(&t.login)
	defer l.close()
	buf := make([]byte, 0, pdu.HeaderLen+t.limits.LoginSegment+pdu.DigestLen)
	status := uint16(statusSuccess)
	for {
		var h pdu.Header
		var data []byte
		var err error
		h, data, buf, err = t.readLogin(c, buf)
		var reply loginReply
		switch {
		case errors.Is(err, errProtocol):
			reply.response = pdu.LoginResponse{ITT: h.ITT(), Status: statusInitiatorError}
			if h.Opcode() != pdu.OpLoginRequest {
				reply.response.Status = statusNotLogin
			}
		case err != nil:
			t.loginFailed(c, l, 0, err)
			return nil, false
		default:
			c.spoke.Store(true)
			var req pdu.LoginRequest
			req.Decode(&h)
			reply = l.step(&req, data)
		}
		if reply.complete {
			reply.response.Status = t.enter(l, c, timer.C)
			reply.response.TSIH = 0
			if reply.failed() {
				reply.text, reply.response.Transit, reply.response.NSG = nil, false, 0
			} else {
				reply.response.TSIH = c.session.tsih
			}
		}
		status = reply.response.Status
		if status == statusAuthentication && !t.pause(c, l) {
			return nil, false
		}
		err = t.writeLogin(c, l, &reply)
		switch {
		case reply.failed():
			t.loginFailed(c, l, status, err)
			linger(c.conn, buf[:cap(buf)])
			return nil, false
		case reply.complete && err == nil && c.conn.SetDeadline(time.Time{}) == nil:
			t.loginSucceeded(c, l)
			return buf, true
		case reply.complete:
			t.connectionEnded(c, fmt.Errorf("%w: %w", errLogin, err))
			return nil, false
		case err != nil:
			t.loginFailed(c, l, 0, err)
			return nil, false
		}
	}
}

// readLogin reads one PDU. Buf holds what was read before; what follows the PDU
// is returned in its place. A PDU that does not belong into a login is returned
// as errProtocol, with its header.
func (t *Target) readLogin(c *connection, buf []byte) (h pdu.Header, data, rest []byte, err error) {
	need := pdu.HeaderLen
	for {
		if len(buf) >= pdu.HeaderLen {
			h = pdu.Header(buf[:pdu.HeaderLen])
			if h.Opcode() != pdu.OpLoginRequest || h.AHSLen() > 0 || h.DataLen() > t.limits.LoginSegment {
				return h, nil, buf, errProtocol
			}
			need = pdu.Layout{}.Size(&h)
		}
		if len(buf) >= need {
			break
		}
		if cap(buf)-len(buf) < need-len(buf) { // never: cap is the longest PDU
			return h, nil, buf, io.ErrShortBuffer
		}
		n, err := c.conn.Read(buf[len(buf):cap(buf)])
		if err != nil {
			return h, nil, buf, err
		}
		buf = buf[:len(buf)+n]
	}
	data = append([]byte(nil), buf[pdu.HeaderLen:pdu.HeaderLen+h.DataLen()]...)
	n := copy(buf, buf[need:])
	return h, data, buf[:n], nil
}

// enter makes the session at the end of a login and readies the connection for
// full feature phase.
func (t *Target) enter(l *login, c *connection, expired <-chan time.Time) (status uint16) {
	if !l.discovery && !t.available() {
		return statusUnavailable
	}
	c.params = l.params
	status = t.admit(l, c, expired)
	if status == statusUnavailable { // the time for the login may be over, but not that for the answer
		_ = c.conn.SetDeadline(time.Now().Add(lingerTime))
	}
	return status
}

// writeLogin sends a login response. Digests begin after the last one.
func (t *Target) writeLogin(c *connection, l *login, reply *loginReply) error {
	if len(reply.text) > maxLoginReply {
		return fmt.Errorf("login reply of %d bytes: %w", len(reply.text), errLogin)
	}
	if reply.failed() && reply.response.Status != statusMoved {
		reply.text = nil
	}
	p := &reply.response
	c.mu.Lock()
	p.StatSN = c.statSN
	c.statSN++
	p.ExpCmdSN, p.MaxCmdSN = l.first.CmdSN, l.first.CmdSN+uint32(t.limits.Window)-1
	if reply.complete && !reply.failed() {
		p.ExpCmdSN, p.MaxCmdSN = c.window.exp, c.window.max
		c.layout = pdu.Layout{HeaderDigest: l.params.headerDigest, DataDigest: l.params.dataDigest}
	}
	c.mu.Unlock()
	var h pdu.Header
	p.Encode(&h)
	h.SetDataLen(len(reply.text))
	out := append(make([]byte, 0, pdu.HeaderLen+len(reply.text)+3), h[:]...)
	out = append(out, reply.text...)
	out = append(out, make([]byte, pdu.Pad(len(reply.text)))...)
	_, err := c.conn.Write(out)
	return err
}

// pause holds back the answer to a wrong secret when there were too many of
// them. False: the target is closing.
func (t *Target) pause(c *connection, l *login) bool {
	if t.guard.failed(c.address, l.initiator, t.now()) <= t.limits.FailedLogins {
		return true
	}
	timer := time.NewTimer(t.limits.FailedLoginDelay)
	defer timer.Stop()
	select {
	case <-timer.C:
		_ = c.conn.SetDeadline(time.Now().Add(lingerTime))
		return true
	case <-t.stop:
		return false
	}
}

func (t *Target) loginSucceeded(c *connection, l *login) {
	t.countLogin(statusSuccess)
	t.log.Info("session began", "nexus", l.initiator, "peer", c.peer, "portal", c.portal, "discovery", l.discovery, "auth", l.authName)
	t.event(Event{Kind: LoginSucceeded, Initiator: l.initiator, Peer: c.peer, Portal: c.portal, Discovery: l.discovery})
}

// loginFailed records a login that came to nothing. Status 0 means that the
// connection ended by itself or in time.
func (t *Target) loginFailed(c *connection, l *login, status uint16, err error) {
	if status == statusSuccess {
		t.count(&t.counters.abandoned)
		if !l.started {
			return // a port probe
		}
	} else {
		t.countLogin(status)
	}
	reason := fmt.Sprintf("login status %04x", status)
	if err != nil {
		reason = err.Error()
	}
	t.log.Info("login failed", "nexus", l.initiator, "peer", c.peer, "portal", c.portal, "err", reason)
	t.event(Event{Kind: LoginFailed, Initiator: l.initiator, Peer: c.peer, Portal: c.portal, Discovery: l.discovery, Status: status, Reason: reason})
}
