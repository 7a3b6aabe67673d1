package iscsi

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// reject refuses a PDU; its header goes back as data.
func (c *connection) reject(reason uint8, of *pdu.Header) {
	c.mu.Lock()
	c.rejectLocked(reason, of)
	c.mu.Unlock()
}

func (c *connection) rejectLocked(reason uint8, of *pdu.Header) {
	c.target.count(&c.target.counters.rejects)
	p := pdu.Reject{Reason: reason, Numbers: c.numbersLocked()}
	h := c.out.header()
	p.Encode(h)
	c.sealLocked(h, pdu.HeaderLen)
	c.dataLocked(of[:])
}

// nopOut answers a ping, or takes the answer to ours.
func (c *connection) nopOut(h *pdu.Header, data []byte) {
	var p pdu.NopOut
	p.Decode(h)
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.ITT == pdu.NoTag {
		if p.TTT == c.pingTag {
			c.pinged = 0
		}
		return
	}
	data = data[:min(len(data), int(c.params.maxSend))]
	answer := pdu.NopIn{LUN: p.LUN, ITT: p.ITT, TTT: pdu.NoTag, Numbers: c.numbersLocked()}
	out := c.out.header()
	answer.Encode(out)
	c.sealLocked(out, len(data))
	c.dataLocked(data)
}

// logout ends the session's tasks, then the session (RFC 7143 section 11.14).
func (c *connection) logout(h *pdu.Header) error {
	var p pdu.Logout
	p.Decode(h)
	if c.session.discovery && p.Reason != pdu.LogoutSession {
		c.reject(pdu.RejectProtocol, h)
		return fmt.Errorf("logout reason %d in a discovery session: %w", p.Reason, errProtocol)
	}
	switch {
	case p.Reason > pdu.LogoutRecovery, p.ITT == pdu.NoTag:
		c.reject(pdu.RejectInvalidField, h)
		return nil
	case p.Reason == pdu.LogoutRecovery:
		c.logoutResponse(&p, pdu.LogoutNoRecovery)
		return nil
	case p.Reason == pdu.LogoutConnection && p.CID != c.session.cid:
		c.logoutResponse(&p, pdu.LogoutNoSuchCID)
		return nil
	}
	result := uint8(pdu.LogoutDone)
	if !c.endTasks() {
		result = pdu.LogoutCleanupFailed
	}
	if n := c.session.nexus; n != nil {
		c.target.device.Release(n, c.target.limits.LogoutTime)
	}
	c.logoutResponse(&p, result)
	return errLogout
}

// endTasks ends parked tasks and waits for those that the device server has.
// Their responses are sent as they come. False: some did not end in time.
func (c *connection) endTasks() bool {
	c.kickDue = true
	c.settle(false)
	until := c.target.elapsed() + c.target.limits.LogoutTime
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endParkedLocked(func(*task) bool { return true })
	for c.active > 0 {
		if c.target.elapsed() >= until || c.dropped.Load() || c.leaving.Load() {
			return false
		}
		c.changed.Wait()
	}
	return true
}

func (c *connection) logoutResponse(p *pdu.Logout, result uint8) {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer := pdu.LogoutResponse{
		Response: result, ITT: p.ITT, Numbers: c.numbersLocked(),
		Time2Wait: uint16(c.params.time2Wait), Time2Retain: uint16(c.params.time2Retain),
	}
	h := c.out.header()
	answer.Encode(h)
	c.sealLocked(h, 0)
}

// textRequest answers SendTargets and the few keys that may change after login
// (RFC 7143 sections 11.10, 13.3 and appendix C).
func (c *connection) textRequest(h *pdu.Header, data []byte) error {
	var p pdu.TextRequest
	p.Decode(h)
	if p.Continue && p.Final {
		c.reject(pdu.RejectProtocol, h)
		return nil
	}
	switch {
	case p.ITT == pdu.NoTag:
		c.reject(pdu.RejectInvalidField, h)
		return nil
	case p.TTT == pdu.NoTag: // a new exchange; what was left of the last one is void
		c.answer, c.text = nil, nil
	case !c.textOpen || p.TTT != c.textTag:
		c.reject(pdu.RejectInvalidField, h)
		return nil
	}
	if len(c.text)+len(data) > c.target.limits.NegotiationText {
		c.text = nil
		c.reject(pdu.RejectOutOfResource, h)
		return nil
	}
	if p.Continue {
		c.text = append(c.text, data...)
		c.textResponse(&p, nil, false)
		return nil
	}
	if len(c.text) > 0 {
		data = append(c.text, data...)
		c.text = nil
	}
	if len(c.answer) == 0 {
		pairs, err := pdu.ParseText(data, maxLoginKeys)
		if err != nil {
			c.reject(pdu.RejectProtocol, h)
			return nil
		}
		for _, pair := range pairs {
			c.answer = c.answerText(c.answer, pair)
		}
	}
	n := min(len(c.answer), int(c.params.maxSend))
	part := c.answer[:n]
	c.answer = c.answer[n:]
	c.textResponse(&p, part, len(c.answer) == 0)
	if len(c.answer) == 0 {
		c.answer = nil
	}
	return nil
}

// textResponse appends a Text Response. Complete says that part is the end of
// our answer.
func (c *connection) textResponse(p *pdu.TextRequest, part []byte, complete bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer := pdu.TextResponse{LUN: p.LUN, ITT: p.ITT, TTT: pdu.NoTag, Numbers: c.numbersLocked()}
	answer.Final = complete && p.Final
	answer.Continue = !complete && len(part) > 0
	c.textOpen = !answer.Final
	if c.textOpen {
		c.ttt++
		if c.ttt == pdu.NoTag {
			c.ttt = 0
		}
		answer.TTT = c.ttt
		c.textTag = c.ttt
	}
	h := c.out.header()
	answer.Encode(h)
	c.sealLocked(h, len(part))
	c.dataLocked(part)
}

// answerText appends the answer to one key.
func (c *connection) answerText(reply []byte, p pdu.Pair) []byte {
	switch {
	case reservedAnswer(p.Value):
		return reply
	case p.Key == "SendTargets":
		return c.sendTargets(reply, p.Value)
	case p.Key == "MaxRecvDataSegmentLength":
		n, ok := number(p.Value, minSegment, maxSegment)
		if !ok {
			return pdu.AppendText(reply, p.Key, answerReject)
		}
		c.mu.Lock()
		c.params.maxSend = n
		c.mu.Unlock()
		return reply
	case p.Key == "InitiatorAlias":
		return reply
	case loginOnly(p.Key):
		return pdu.AppendText(reply, p.Key, answerReject)
	}
	return pdu.AppendText(reply, p.Key, answerNotUnderstood)
}

// sendTargets lists the target with all portals at which the initiator may log
// in. In a normal session "All" means this target, too: initiators use it so.
func (c *connection) sendTargets(reply []byte, value string) []byte {
	t := c.target
	own := strings.EqualFold(value, t.name)
	switch {
	case value == "All", value == "", own:
	case len(value) > maxNameLen:
		return pdu.AppendText(reply, "SendTargets", answerReject)
	default:
		return reply // a name that is not ours: no targets
	}
	initiator := c.session.initiator
	if _, ok := t.directory.Access(initiator); !ok {
		return reply
	}
	reply = pdu.AppendText(reply, "TargetName", t.name)
	for _, portal := range t.directory.Portals(initiator) {
		if !reachable(portal) {
			continue
		}
		reply = pdu.AppendText(reply, "TargetAddress", portal.Addr+","+strconv.Itoa(int(portal.Group)))
	}
	return reply
}

// reachable tells whether an initiator can use a portal's address: one that
// stands for all addresses of a node, or that means something on one link only,
// says nothing to others (RFC 7143 section 13.8). A host name is the resolver's matter.
func reachable(p Portal) bool {
	if p.Group == 0 {
		return false
	}
	addr, err := netip.ParseAddrPort(p.Addr)
	if err != nil {
		host, _, err := net.SplitHostPort(p.Addr)
		return err == nil && host != ""
	}
	ip := addr.Addr()
	return !ip.IsUnspecified() && ip.Zone() == "" && addr.Port() != 0
}

// asyncLocked appends an Async Message.
func (c *connection) asyncLocked(event uint8, parameter2, parameter3 uint16) {
	p := pdu.Async{Event: event, Parameter2: parameter2, Parameter3: parameter3, Numbers: c.numbersLocked()}
	h := c.out.header()
	p.Encode(h)
	c.sealLocked(h, 0)
}

// farewell tells the initiator that its session is about to end, and lets the
// reader end it: its next read fails, then it sends what is left and closes.
func (c *connection) farewell() {
	c.mu.Lock()
	c.farewellLocked(ErrClosed)
	c.mu.Unlock()
}

func (c *connection) farewellLocked(cause error) {
	if !c.full {
		c.cutLocked(cause)
		return
	}
	if c.closed || c.leaving.Load() {
		return
	}
	c.asyncLocked(pdu.AsyncDropSession, uint16(c.params.time2Wait), uint16(c.params.time2Retain))
	c.leaveLocked(cause)
}

// requestLogout asks the initiator to log out.
func (c *connection) requestLogout(within time.Duration) {
	seconds := min(max(within/time.Second, 1), 1<<16-1)
	c.mu.Lock()
	if !c.closed {
		if c.full { // else serve does it, after the login response
			c.asyncLocked(pdu.AsyncLogoutRequest, 0, uint16(seconds))
		}
		c.closeAt = c.target.elapsed() + seconds*time.Second
	}
	c.mu.Unlock()
	c.flush()
}

// tick does what is due by the clock: pings, and the end of waits.
func (c *connection) tick(now time.Duration) {
	limits := c.target.limits
	if !c.listens.Load() {
		c.heard.Store(int64(now)) // we are not listening: silence says nothing
	}
	silent := now - time.Duration(c.heard.Load())
	unfinished := time.Duration(0)
	if c.listens.Load() { // before pduSince, which is set before it
		if since := c.pduSince.Load(); since > 0 {
			unfinished = now - time.Duration(since)
		}
	}
	c.mu.Lock()
	var cause error
	switch {
	case c.closed || !c.full:
	case c.closeAt > 0 && now >= c.closeAt:
		c.farewellLocked(errNoLogout)
	case unfinished >= limits.WriteTime:
		cause = errSlowWriter
	case c.gapSince > 0 && now-c.gapSince >= limits.GapTime:
		cause = errGap
	case c.pinged > 0 && time.Duration(c.heard.Load()) > c.pinged:
		c.pinged = 0
	case c.pinged > 0 && now-c.pinged >= limits.PingTime:
		cause = errNoPing
	case c.pinged == 0 && silent >= limits.PingAfter:
		c.pinged = now
		c.pingTag++
		if c.pingTag == pdu.NoTag {
			c.pingTag = 0
		}
		p := pdu.NopIn{ITT: pdu.NoTag, TTT: c.pingTag, Numbers: c.peekNumbersLocked()}
		h := c.out.header()
		p.Encode(h)
		c.sealLocked(h, 0)
	}
	if cause != nil {
		c.cutLocked(cause)
	}
	c.changed.Broadcast()
	flush := !c.busy && c.out.size > 0
	c.mu.Unlock()
	if flush {
		c.flush()
	}
}
