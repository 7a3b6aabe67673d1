package iscsi

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

func TestPings(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("MaxRecvDataSegmentLength=512")
	for _, n := range []int{0, 1, 512, 1000} {
		itt := c.ping(pattern(n, 1))
		r := c.expect(pdu.OpNopIn)
		if r.ITT() != itt || r.TTT() != pdu.NoTag {
			t.Errorf("% x", r.Header[:])
		}
		equal(t, r.data, pattern(n, 1)[:min(n, 512)])
	}
	// Numbered pings take their turn.
	var h pdu.Header
	(&pdu.NopOut{ITT: 77, TTT: pdu.NoTag, CmdSN: c.cmdSN}).Encode(&h)
	c.send(&h, nil)
	c.cmdSN++
	if r := c.expect(pdu.OpNopIn); r.ITT() != 77 || r.ExpCmdSN() != c.cmdSN || r.MaxCmdSN() != c.cmdSN+127 {
		t.Errorf("% x", r.Header[:])
	}
}

// TestPingFromTarget: after silence, with a valid tag, not before full feature
// phase; no answer ends the connection.
func TestPingFromTarget(t *testing.T) {
	clock := newFakeClock()
	b := newBench(t, func(c *Config) { c.Now = clock.Now })
	slow := dial(t, b)
	slow.isid[5]++
	slow.step(1, 0, false, who...)
	c := dial(t, b).login()
	c.ping(nil)
	stat := c.expect(pdu.OpNopIn).StatSN() + 1
	eventually(t, "the reader to listen", func() bool { return b.connections("")[0].listens.Load() })
	clock.advance(14 * time.Second)
	b.tick()
	clock.advance(time.Second)
	b.tick()
	r := c.expect(pdu.OpNopIn)
	if r.ITT() != pdu.NoTag || r.TTT() == pdu.NoTag || r.StatSN() != stat {
		t.Errorf("% x", r.Header[:])
	}
	var h pdu.Header
	(&pdu.NopOut{Immediate: true, ITT: pdu.NoTag, TTT: r.TTT(), CmdSN: c.cmdSN}).Encode(&h)
	c.send(&h, nil)
	c.ping(nil)
	if r := c.expect(pdu.OpNopIn); r.StatSN() != stat {
		t.Errorf("StatSN %d, want %d", r.StatSN(), stat)
	}
	eventually(t, "the reader to listen", func() bool { return b.connections("")[0].listens.Load() })
	clock.advance(15 * time.Second)
	b.tick()
	c.expect(pdu.OpNopIn)
	clock.advance(14 * time.Second)
	b.tick()
	clock.advance(time.Second)
	b.tick()
	c.expectClosed()
	if r := slow.step(1, 3, true); r.Status != 0 { // it was sent no ping
		t.Errorf("%+v", r)
	}
}

// TestGap: a command number that does not come ends the connection.
func TestGap(t *testing.T) {
	clock := newFakeClock()
	b := newBench(t, func(c *Config) { c.Now = clock.Now; c.Limits.PingAfter = time.Hour })
	c := dial(t, b).login()
	c.cmdSN++
	c.command(pdu.SCSICommand{Final: true}, nil)
	c.quiet()
	clock.advance(29 * time.Second)
	b.tick()
	c.quiet()
	clock.advance(2 * time.Second)
	b.tick()
	c.expectClosed()
	// One that was filled does not.
	c = dial(t, b).login()
	c.cmdSN++
	c.command(pdu.SCSICommand{Final: true}, nil)
	c.cmdSN -= 2
	c.command(pdu.SCSICommand{Final: true}, nil)
	c.expect(pdu.OpSCSIResponse)
	c.expect(pdu.OpSCSIResponse)
	clock.advance(time.Minute)
	b.tick()
	c.quiet()
	// Too much ahead of a gap.
	c.cmdSN += 2
	var h pdu.Header
	(&pdu.SCSICommand{Write: true, ITT: 9000, CmdSN: c.cmdSN, Expected: 1 << 22, CDB: write10(0, 8192)}).Encode(&h)
	c.send(&h, nil)
	for i := range 5 {
		(&pdu.DataOut{ITT: 9000, TTT: pdu.NoTag, DataSN: uint32(i)}).Encode(&h)
		if _, err := c.conn.Write(encode(c.layout, &h, nil, make([]byte, 256<<10))); err != nil {
			break
		}
	}
	c.expectClosed()
}

// discover opens a discovery session.
func discover(t *testing.T, b *bench) *client {
	t.Helper()
	c := dial(t, b)
	if r := c.step(1, 3, true, "InitiatorName="+testInitiator, "SessionType=Discovery", "MaxRecvDataSegmentLength=512"); r.Status != 0 || r.TSIH == 0 {
		t.Fatalf("%+v", r)
	}
	return c
}

// ask sends a Text and puts a long answer together.
func (c *client) ask(pairs ...string) string {
	c.tb.Helper()
	p := pdu.TextRequest{Immediate: true, Final: true, ITT: 55, TTT: pdu.NoTag, CmdSN: c.cmdSN}
	data := text(pairs...)
	var answer []byte
	for {
		var h pdu.Header
		p.Encode(&h)
		c.send(&h, data)
		r := c.expect(pdu.OpTextResponse)
		var a pdu.TextResponse
		a.Decode(&r.Header)
		answer = append(answer, r.data...)
		if a.Final != (a.TTT == pdu.NoTag) || a.Final && a.Continue {
			c.tb.Fatalf("%+v", a)
		}
		if a.Final {
			return strings.ReplaceAll(string(answer), "\x00", "\n")
		}
		p.TTT, data = a.TTT, nil
	}
}

func TestSendTargets(t *testing.T) {
	b := newBench(t, nil)
	c := discover(t, b)
	all := "TargetName=" + testTarget + "\nTargetAddress=192.0.2.1:3260,1\nTargetAddress=[2001:db8::2]:3260,2\n"
	for value, want := range map[string]string{"All": all, "": all, strings.ToUpper(testTarget): all, "iqn.other": "", strings.Repeat("x", 224): "SendTargets=Reject\n"} {
		if got := c.ask("SendTargets=" + value); got != want {
			t.Errorf("%q: %q", value, got)
		}
	}
	if got := c.ask("Strange=1", "MaxRecvDataSegmentLength=600", "MaxRecvDataSegmentLength=1"); got != "Strange=NotUnderstood\nMaxRecvDataSegmentLength=Reject\n" {
		t.Errorf("%q", got)
	}
	// Keys of the login only, and answers that nobody asked for.
	if got := c.ask("MaxBurstLength=512", "CHAP_A=5", "HeaderDigest=None", "Other=Reject", "InitiatorAlias=me"); got != "MaxBurstLength=Reject\nCHAP_A=Reject\nHeaderDigest=Reject\n" {
		t.Errorf("%q", got)
	}
	b.dir.mu.Lock()
	b.dir.portals = []Portal{{"0.0.0.0:3260", 1}, {"[::]:3260", 1}, {"[fe80::1%eth0]:3260", 1}, {"192.0.2.1:0", 1}, {"192.0.2.1", 1}, {"192.0.2.7:3260", 0}, {"san.example.com:3260", 1}, {"192.0.2.8:3260", 1}}
	b.dir.mu.Unlock()
	if got := c.ask("SendTargets=All"); got != "TargetName="+testTarget+"\nTargetAddress=san.example.com:3260,1\nTargetAddress=192.0.2.8:3260,1\n" {
		t.Errorf("addresses that nobody reaches: %q", got)
	}
	b.dir.mu.Lock()
	want := "TargetName=" + testTarget + "\n"
	b.dir.portals = nil
	for i := range 40 {
		addr := fmt.Sprintf("[2001:db8::%d]:3260", i)
		b.dir.portals = append(b.dir.portals, Portal{addr, 3})
		want += "TargetAddress=" + addr + ",3\n"
	}
	b.dir.mu.Unlock()
	if got := c.ask("SendTargets=All"); got != want {
		t.Errorf("long list: %q", got)
	}
	b.dir.mu.Lock()
	b.dir.open = false
	b.dir.mu.Unlock()
	if got := c.ask("SendTargets=All"); got != "" {
		t.Errorf("stranger sees %q", got)
	}
	// What a discovery session has not.
	if got := c.logout(pdu.LogoutSession, 0); got != pdu.LogoutDone {
		t.Errorf("logout: %d", got)
	}
	c.expectClosed()
	b.dir.mu.Lock()
	b.dir.open = true
	b.dir.mu.Unlock()
	for name, p := range map[string]interface{ Encode(*pdu.Header) }{
		"command": &pdu.SCSICommand{Final: true, CmdSN: 100}, "task management": &pdu.TaskRequest{Immediate: true, Function: 2},
		"Data-Out": &pdu.DataOut{Final: true}, "logout of a connection": &pdu.Logout{Immediate: true, Reason: 1},
	} {
		c := discover(t, b)
		var h pdu.Header
		p.Encode(&h)
		c.send(&h, nil)
		if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectProtocol {
			t.Errorf("%s: % x", name, r.Header[:4])
		}
		c.expectClosed()
	}
	eventually(t, "sessions gone", func() bool { return len(b.Sessions()) == 0 })
	if got := b.detached(); len(got) != 0 {
		t.Error("a discovery session had a nexus")
	}
}

// TestTextExchange: parts with C bits, resets, tags that do not belong.
func TestTextExchange(t *testing.T) {
	b := newBench(t, nil)
	c := discover(t, b)
	send := func(p pdu.TextRequest, data []byte) {
		t.Helper()
		p.Immediate, p.ITT, p.CmdSN = true, 55, c.cmdSN
		var h pdu.Header
		p.Encode(&h)
		c.send(&h, data)
	}
	send(pdu.TextRequest{Final: true, TTT: 0}, []byte("SendTargets=All\x00")) // goes on with nothing
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectInvalidField {
		t.Errorf("% x", r.Header[:4])
	}
	send(pdu.TextRequest{Continue: true, TTT: pdu.NoTag}, []byte("SendTar"))
	r := c.expect(pdu.OpTextResponse)
	if r.Final() || r.TTT() == pdu.NoTag || len(r.data) > 0 {
		t.Errorf("% x", r.Header[:])
	}
	send(pdu.TextRequest{Final: true, TTT: r.TTT() + 1}, []byte("gets=All\x00"))
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectInvalidField {
		t.Errorf("% x", r.Header[:4])
	}
	send(pdu.TextRequest{Final: true, TTT: r.TTT()}, []byte("gets=All\x00"))
	if r := c.expect(pdu.OpTextResponse); !r.Final() || !bytes.Contains(r.data, []byte(testTarget)) {
		t.Errorf("% x", r.Header[:])
	}
	send(pdu.TextRequest{Continue: true, TTT: pdu.NoTag}, []byte("Nonsense"))
	c.expect(pdu.OpTextResponse)
	if got := c.ask("X=1"); got != "X=NotUnderstood\n" { // a new exchange
		t.Errorf("%q", got)
	}
	send(pdu.TextRequest{Final: true, TTT: pdu.NoTag}, []byte("no end"))
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectProtocol {
		t.Errorf("% x", r.Header[:4])
	}
	send(pdu.TextRequest{Final: true, Continue: true, TTT: pdu.NoTag}, nil)
	c.expect(pdu.OpReject)
	tag := uint32(pdu.NoTag)
	for range 2 {
		send(pdu.TextRequest{Continue: true, TTT: tag}, make([]byte, 8192))
		tag = c.expect(pdu.OpTextResponse).TTT()
	}
	send(pdu.TextRequest{Continue: true, TTT: tag}, make([]byte, 8192))
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectOutOfResource {
		t.Errorf("% x", r.Header[:4])
	}
	// In a normal session "All" is this target alone.
	n := dial(t, b).login()
	if got := n.ask("SendTargets=All"); !strings.HasPrefix(got, "TargetName="+testTarget) {
		t.Errorf("%q", got)
	}
}

// TestRejects: what is refused and goes on, and what ends the connection.
func TestRejects(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	send := func(p interface{ Encode(*pdu.Header) }, change func(*pdu.Header)) {
		t.Helper()
		var h pdu.Header
		p.Encode(&h)
		if change != nil {
			change(&h)
		}
		c.write(h[:])
	}
	rejected := func(reason byte) {
		t.Helper()
		r := c.expect(pdu.OpReject)
		if r.Header[2] != reason || r.ITT() != pdu.NoTag || len(r.data) != pdu.HeaderLen {
			t.Errorf("reject % x, want reason %d", r.Header[:4], reason)
		}
	}
	send(&pdu.SNACK{Type: 1, ITT: 5, TTT: pdu.NoTag}, nil)
	rejected(pdu.RejectSNACK)
	send(&pdu.SCSICommand{Final: true, ITT: pdu.NoTag, CmdSN: c.cmdSN}, nil)
	rejected(pdu.RejectInvalidField)
	c.cmdSN++
	send(&pdu.SCSICommand{Read: true, ITT: 6, CmdSN: c.cmdSN}, nil) // F=0 without data
	rejected(pdu.RejectInvalidField)
	c.cmdSN++
	send(&pdu.Logout{Immediate: true, Reason: 5}, nil)
	rejected(pdu.RejectInvalidField)
	send(&pdu.Logout{Immediate: true, ITT: pdu.NoTag}, nil)
	rejected(pdu.RejectInvalidField)
	send(&pdu.TextRequest{Immediate: true, Final: true, ITT: pdu.NoTag, TTT: pdu.NoTag}, nil)
	rejected(pdu.RejectInvalidField)
	send(&pdu.TaskRequest{Immediate: true, Function: 2, ITT: pdu.NoTag}, nil)
	rejected(pdu.RejectInvalidField)
	// Additional header segments: an extended CDB, and nonsense.
	var h pdu.Header
	cmd := pdu.SCSICommand{Final: true, ITT: 7, CmdSN: c.cmdSN}
	cmd.Encode(&h)
	c.write(encode(c.layout, &h, []byte{0, 5, 1, 0, 1, 2, 3, 4}, nil))
	c.cmdSN++
	if p, data := c.response(7); p.Status != statusCheckCondition || sense(data) != [3]byte{5, 0x20, 0} {
		t.Errorf("extended CDB: %+v", p)
	}
	cmd.CmdSN = c.cmdSN
	cmd.Encode(&h)
	c.write(encode(c.layout, &h, []byte{0, 5, 99, 0, 1, 2, 3, 4}, nil))
	c.cmdSN++
	rejected(pdu.RejectProtocol)
	c.response(c.command(pdu.SCSICommand{Final: true}, nil))
	if c.last.ExpCmdSN != c.cmdSN || c.last.MaxCmdSN != c.cmdSN+127 {
		t.Errorf("refused commands do not count: %+v, next is %d", c.last, c.cmdSN)
	}
	for name, tt := range map[string]struct {
		pdu    interface{ Encode(*pdu.Header) }
		change func(*pdu.Header)
		reason byte
	}{
		"data too long":     {&pdu.DataOut{Final: true}, func(h *pdu.Header) { h.SetDataLen(maxRecvSegment + 1) }, pdu.RejectProtocol},
		"data much longer":  {&pdu.NopOut{Immediate: true}, func(h *pdu.Header) { h.SetDataLen(pdu.MaxDataLen) }, pdu.RejectProtocol},
		"AHS with NOP":      {&pdu.NopOut{Immediate: true}, func(h *pdu.Header) { h[4] = 255 }, pdu.RejectProtocol},
		"opcode of targets": {&pdu.NopIn{}, nil, pdu.RejectUnsupported},
		"unknown opcode":    {&pdu.NopOut{}, func(h *pdu.Header) { h[0] = 0x1f }, pdu.RejectUnsupported},
	} {
		c = dial(t, b).login()
		send(tt.pdu, tt.change)
		r := c.expect(pdu.OpReject)
		if r.Header[2] != tt.reason {
			t.Errorf("%s: reject % x", name, r.Header[:4])
		}
		c.expectClosed()
	}
}

// TestRequestLogout: the initiator is asked, then the connection is closed.
func TestRequestLogout(t *testing.T) {
	clock := newFakeClock()
	b := newBench(t, func(c *Config) { c.Now = clock.Now })
	c := dial(t, b).login()
	c.quiet()
	next := uint32(0)
	c.ping(nil)
	next = c.expect(pdu.OpNopIn).StatSN() + 1
	b.RequestLogout("", 10*time.Second)
	r := c.expect(pdu.OpAsync)
	var p pdu.Async
	p.Decode(&r.Header)
	if p.Event != pdu.AsyncLogoutRequest || p.Parameter3 != 10 || p.StatSN != next || r.ITT() != pdu.NoTag {
		t.Errorf("%+v", p)
	}
	clock.advance(9 * time.Second)
	b.tick()
	c.ping(nil)
	if r := c.expect(pdu.OpNopIn); r.StatSN() != next+1 {
		t.Errorf("StatSN %d after Async, want %d", r.StatSN(), next+1)
	}
	clock.advance(2 * time.Second)
	b.tick()
	p.Decode(&c.expect(pdu.OpAsync).Header)
	if p.Event != pdu.AsyncDropSession || p.Parameter2 != 2 || p.Parameter3 != 20 {
		t.Errorf("%+v", p)
	}
	c.expectClosed()
}

// TestSlowWriter: whoever begins a PDU and does not end it is dropped, even if
// a byte comes now and then; whole PDUs may come as slowly as they like.
func TestSlowWriter(t *testing.T) {
	for name, size := range map[string]int{"buffered": 4096, "direct": 128 << 10} {
		t.Run(name, func(t *testing.T) {
			clock := newFakeClock()
			b := newBench(t, func(c *Config) { c.Now = clock.Now })
			c := dial(t, b).login("ImmediateData=No", "InitialR2T=Yes")
			second := func(n int) {
				for range n {
					clock.advance(time.Second)
					b.tick()
				}
			}
			for range 3 {
				second(14)
				c.quiet()
			}
			itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: uint32(size), CDB: write10(0, size/testBlock)}, nil)
			r := c.r2t(itt)
			var h pdu.Header
			(&pdu.DataOut{Final: true, ITT: itt, TTT: r.TTT}).Encode(&h)
			whole := encode(c.layout, &h, nil, make([]byte, size))
			c.write(whole[:1000])
			var conn *connection
			eventually(t, "the reader waits for the rest", func() bool {
				conn = b.connections("")[0]
				return conn.pduSince.Load() > 0 && conn.listens.Load() && conn.bytesIn.Load() >= 1000
			})
			for i := range 3 { // no silence that would call for a ping
				second(9)
				before := conn.bytesIn.Load()
				c.write(whole[1000+i : 1001+i])
				eventually(t, "a byte was read", func() bool { return conn.bytesIn.Load() > before && conn.listens.Load() })
			}
			c.itt++
			if b.Stats().BuffersInUse == 0 {
				t.Error("nothing is held, nothing is tested")
			}
			second(4)
			c.expectClosed()
			eventually(t, "memory is back", func() bool { return b.Stats().BuffersInUse == 0 })
		})
	}
}
