package iscsi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
	"github.com/twinsan/twinsan/server/scsi"
)

// logout sends a logout and returns the response code.
func (c *client) logout(reason uint8, cid uint16) uint8 {
	c.tb.Helper()
	c.itt++
	p := pdu.Logout{Immediate: true, Reason: reason, ITT: c.itt, CID: cid, CmdSN: c.cmdSN}
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, nil)
	r := c.expect(pdu.OpLogoutResponse)
	return r.Header[2]
}

func (b *bench) detached() []bool {
	b.device.mu.Lock()
	defer b.device.mu.Unlock()
	return slices.Clone(b.device.detached)
}

func TestLogout(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b)
	c.cid = 3
	c.login()
	if got := c.logout(pdu.LogoutRecovery, 3); got != pdu.LogoutNoRecovery {
		t.Errorf("recovery: %d", got)
	}
	if got := c.logout(pdu.LogoutConnection, 4); got != pdu.LogoutNoSuchCID {
		t.Errorf("other connection: %d", got)
	}
	// A task that waits for data is ended, one with the device server waited for.
	c.r2t(c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: write10(0, 1)}, nil))
	b.device.gate(true)
	itt := c.command(pdu.SCSICommand{Final: true}, nil)
	eventually(t, "queued", func() bool { return b.device.queued() == 1 })
	var h pdu.Header
	p := pdu.Logout{Immediate: true, Reason: pdu.LogoutConnection, ITT: 500, CID: 3, CmdSN: c.cmdSN}
	p.Encode(&h)
	c.send(&h, nil)
	eventually(t, "forgotten", func() bool { return b.device.count().forgotten == 1 })
	b.device.gate(false)
	c.response(itt)
	if r := c.expect(pdu.OpLogoutResponse); r.Header[2] != pdu.LogoutDone {
		t.Errorf("logout: %d", r.Header[2])
	}
	c.expectClosed()
	eventually(t, "session gone", func() bool { return len(b.Sessions()) == 0 })
	if got := b.detached(); !slices.Equal(got, []bool{false}) {
		t.Errorf("detached %v", got)
	}
}

// TestSessionReinstatement: the old session's tasks end first, then it is
// detached as lost, then the new one begins; another ISID is another nexus.
func TestSessionReinstatement(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Listen = []string{"127.0.0.1:0", "127.0.0.1:0"} })
	old := dial(t, b).login()
	other := dial(t, b)
	other.isid[0] ^= 1
	other.login()
	b.device.gate(true)
	old.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: write10(0, 1)}, make([]byte, 512))
	eventually(t, "write started", func() bool { return b.device.queued() == 1 })

	b.addr = b.Addrs()[1].String() // the same ISID through another portal
	c := dial(t, b)
	p := pdu.LoginRequest{Transit: true, CSG: 1, NSG: 3, ISID: c.isid, ITT: 7, CmdSN: c.cmdSN}
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, text(who...))
	old.expectClosed()
	if got := b.detached(); len(got) != 0 {
		t.Fatal("nexus given up with a write under way")
	}
	b.device.gate(false)
	if r := c.loginResponse(); r.Status != 0 || r.TSIH == 0 || r.TSIH == old.tsih {
		t.Fatalf("%+v", r)
	}
	if got := b.detached(); !slices.Equal(got, []bool{true}) {
		t.Errorf("detached %v", got)
	}
	if n := len(b.Sessions()); n != 2 {
		t.Errorf("%d sessions", n)
	}
	other.quiet()
	c.quiet()
}

// TestConnectionReinstatement continues a session whose connection went, and
// takes over one that is still there.
func TestConnectionReinstatement(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b)
	c.cid = 1
	c.login()
	c.quiet()
	again := func() *client {
		t.Helper()
		n := dial(t, b)
		n.cid, n.tsih, n.cmdSN = c.cid, c.tsih, c.cmdSN
		n.login()
		if n.tsih != c.tsih {
			t.Errorf("TSIH %d became %d", c.tsih, n.tsih)
		}
		return n
	}
	c.response(c.command(pdu.SCSICommand{Final: true}, nil))
	second := again() // while the first is alive
	c.expectClosed()
	if p, _ := second.response(second.command(pdu.SCSICommand{Final: true}, nil)); p.ExpCmdSN != c.cmdSN+1 {
		t.Errorf("numbers do not go on: %+v", p)
	}
	c.cmdSN = second.cmdSN
	_ = second.conn.Close()
	eventually(t, "connection gone", func() bool { s := b.Sessions(); return len(s) == 1 && s[0].Peer == "" })
	third := again()
	third.quiet()
	if len(b.detached()) != 0 {
		t.Error("nexus lost")
	}
	for name, tt := range map[string]struct {
		change func(*client)
		status uint16
	}{
		"unknown TSIH":   {func(n *client) { n.tsih ^= 0x5555 }, statusNoSession},
		"other ISID":     {func(n *client) { n.isid[1]++ }, statusNoSession},
		"new connection": {func(n *client) { n.cid++ }, statusTooManyConns},
	} {
		n := dial(t, b)
		n.cid, n.tsih = c.cid, c.tsih
		tt.change(n)
		if r := n.step(1, 3, true, who...); r.Status != tt.status {
			t.Errorf("%s: status %04x", name, r.Status)
		}
		n.expectClosed()
	}
	third.quiet()
}

// TestRetention: a lost connection's session is kept for Time2Retain.
func TestRetention(t *testing.T) {
	clock := newFakeClock()
	b := newBench(t, func(c *Config) { c.Now = clock.Now })
	c := dial(t, b).login("DefaultTime2Retain=7")
	_ = c.conn.Close()
	eventually(t, "connection gone", func() bool { s := b.Sessions(); return len(s) == 1 && s[0].Peer == "" })
	clock.advance(6 * time.Second)
	b.tick()
	if len(b.Sessions()) != 1 {
		t.Fatal("session ended early")
	}
	clock.advance(time.Second)
	b.tick()
	if len(b.Sessions()) != 0 || !slices.Equal(b.detached(), []bool{true}) {
		t.Errorf("sessions %v, detached %v", b.Sessions(), b.detached())
	}
	// With Time2Retain 0 it ends at once.
	c = dial(t, b).login("DefaultTime2Retain=0")
	_ = c.conn.Close()
	eventually(t, "session gone", func() bool { return len(b.Sessions()) == 0 })
}

// TestDropSessions: a reset, not an orderly end, and nothing of what was sent
// before is executed.
func TestDropSessions(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	other := dial(t, b)
	if r := other.step(1, 3, true, "InitiatorName=iqn.other", "TargetName="+testTarget); r.Status != 0 {
		t.Fatalf("%+v", r)
	}
	b.DropSessions(strings.ToUpper(testInitiator), "test")
	if _, err := c.receive(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("error %v", err)
	}
	other.quiet()
	b.DropSessions("", "all")
	if _, err := other.receive(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("error %v", err)
	}
	c = dial(t, b).login() // reinstates
	c.quiet()
}

// abortedFirst is a device that tells when a nexus is aborted.
type abortedFirst struct {
	DeviceServer
	told chan string
}

func (d abortedFirst) AbortNexus(n *scsi.Nexus) {
	d.told <- "aborted"
	d.DeviceServer.AbortNexus(n)
}

// TestDropSettles: who is dropped learns of it when its tasks are aborted and settled, and not
// before; nothing that it sends meanwhile is answered.
func TestDropSettles(t *testing.T) {
	told, released := make(chan string, 2), make(chan struct{})
	release := sync.OnceFunc(func() { close(released) })
	defer release()
	b := newBench(t, func(c *Config) {
		c.Device = abortedFirst{c.Device, told}
		c.Settle = func() {
			told <- "settled"
			<-released
		}
	})
	c := dial(t, b).login()
	c.quiet() // in full feature phase
	b.DropSessions("", "test")
	for _, want := range []string{"aborted", "settled"} {
		select {
		case got := <-told:
			if got != want {
				t.Fatalf("%s before it is %s", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("it is not %s", want)
		}
	}
	c.ping(nil)
	if err := c.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.receive(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("while it settles: %v", err)
	}
	release()
	if err := c.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.receive(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("settled: %v", err)
	}
}

// TestLimits: sessions per name and address, and in all.
func TestLimits(t *testing.T) {
	b := newBench(t, func(c *Config) {
		c.Limits = Limits{SessionsPerInitiator: 2, ConnectionsPerAddress: 3, Sessions: 4}
	})
	try := func(initiator string, isid byte) (*client, uint16) {
		c := dial(t, b)
		c.isid[5] = isid
		return c, c.step(1, 3, true, "InitiatorName="+initiator, "TargetName="+testTarget).Status
	}
	one, status := try("iqn.a", 1)
	if status != 0 {
		t.Fatalf("%04x", status)
	}
	if _, status := try("iqn.a", 2); status != 0 {
		t.Fatalf("%04x", status)
	}
	if c, status := try("iqn.a", 3); status != statusOutOfResources {
		t.Errorf("third of a name: %04x", status)
	} else {
		c.expectClosed()
	}
	if _, status := try("iqn.b", 1); status != 0 {
		t.Errorf("another name: %04x", status)
	}
	if _, status := try("iqn.c", 1); status != statusOutOfResources {
		t.Errorf("fourth of an address: %04x", status)
	}
	// A session that only waits for its initiator makes room.
	_ = one.conn.Close()
	eventually(t, "connection gone", func() bool {
		return slices.ContainsFunc(b.Sessions(), func(s SessionInfo) bool { return s.Peer == "" })
	})
	if _, status := try("iqn.a", 3); status != 0 {
		t.Errorf("in place of a lost one: %04x", status)
	}
	b.device.mu.Lock()
	b.device.attachErr = errFull
	b.device.mu.Unlock()
	if _, status := try("iqn.b", 1); status != statusOutOfResources {
		t.Errorf("refused by the device server: %04x", status)
	}
}

// TestHalfOpen: idle connections keep nobody out, and are closed in time.
func TestHalfOpen(t *testing.T) {
	b := newBench(t, func(c *Config) {
		c.Limits = Limits{HalfOpen: 20, HalfOpenPerAddress: 8, LoginTime: 300 * time.Millisecond}
	})
	var idle []net.Conn
	for range 50 {
		conn, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	dial(t, b).login().quiet()
	if st := b.Stats(); st.HalfOpen > 8 || st.HalfOpenEvicted < 42 {
		t.Errorf("%+v", st)
	}
	for _, conn := range idle {
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, context.DeadlineExceeded) || err == nil {
			t.Fatalf("idle connection: %v", err)
		}
	}
	eventually(t, "no half-open connections", func() bool { return b.Stats().HalfOpen == 0 })
}

// TestLoginOnTheWire: what the shell around the state machine adds.
func TestLoginOnTheWire(t *testing.T) {
	var events []Event
	eventCh := make(chan Event, 100)
	available := make(chan bool, 1)
	available <- true
	isAvailable := func() bool { v := <-available; available <- v; return v }
	b := newBench(t, func(c *Config) { c.Event = func(e Event) { eventCh <- e }; c.Available = isAvailable })
	c := dial(t, b)
	var h pdu.Header
	(&pdu.NopOut{Immediate: true, ITT: 9}).Encode(&h)
	c.send(&h, nil)
	if r := c.loginResponse(); r.Status != statusNotLogin || r.ITT != 9 {
		t.Errorf("NOP-Out first: %+v", r)
	}
	c.expectClosed()
	c = dial(t, b)
	(&pdu.LoginRequest{CSG: 1, ITT: 9}).Encode(&h)
	h.SetDataLen(pdu.MaxDataLen)
	c.write(h[:])
	if r := c.loginResponse(); r.Status != statusInitiatorError {
		t.Errorf("16 MiB of text: %+v", r)
	}
	c.expectClosed()
	c = dial(t, b)
	if r := c.step(1, 0, false, who...); r.Status != 0 || r.TSIH != 0 || r.ExpCmdSN != c.cmdSN || r.MaxCmdSN != c.cmdSN+127 {
		t.Errorf("first step: %+v", r)
	}
	stat := uint32(0)
	if r := c.step(1, 3, true); r.Status != 0 || r.TSIH == 0 {
		t.Errorf("second step: %+v", r)
	} else {
		stat = r.StatSN
	}
	c.ping(nil)
	if r := c.expect(pdu.OpNopIn); r.StatSN() != stat+1 {
		t.Errorf("StatSN %d after login, want %d", r.StatSN(), stat+1)
	}
	// Login again in full feature phase.
	(&pdu.LoginRequest{CSG: 1, ITT: 9}).Encode(&h)
	c.send(&h, nil)
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectProtocol {
		t.Errorf("%x", r.Header[:4])
	}
	c.expectClosed()
	<-available
	available <- false
	c = dial(t, b)
	if r := c.step(1, 3, true, who...); r.Status != statusUnavailable || r.TSIH != 0 || r.Transit {
		t.Errorf("unavailable: %+v", r)
	}
	c.expectClosed()
	eventually(t, "events", func() bool {
		select {
		case e := <-eventCh:
			events = append(events, e)
		default:
		}
		return len(events) == 5
	})
	got := fmt.Sprint(len(events))
	for _, e := range events {
		got += fmt.Sprintf(" %d:%04x", e.Kind, e.Status)
	}
	slices.SortFunc(events, func(a, b Event) int { return int(a.Status) - int(b.Status) })
	if events[4].Status != statusUnavailable || events[3].Status != statusNotLogin || events[4].Initiator != testInitiator {
		t.Error(got)
	}
	st := b.Stats()
	if st.Logins[0] != 1 || st.Logins[statusNotLogin] != 1 || st.Logins[statusUnavailable] != 1 {
		t.Errorf("%+v", st.Logins)
	}
}

// TestGuessing: after some wrong secrets the answers come late, to that name and
// address only.
func TestGuessing(t *testing.T) {
	clock := newFakeClock()
	b := newBench(t, func(c *Config) {
		c.Now = clock.Now
		c.Limits = Limits{FailedLogins: 2, FailedLoginDelay: 200 * time.Millisecond}
	})
	guess := func() time.Duration {
		c := dial(t, b)
		began := time.Now()
		if r := c.step(0, 1, true, with(who, "AuthMethod=CHAP")...); r.Status != statusAuthentication {
			t.Fatalf("%+v", r)
		}
		return time.Since(began)
	}
	guess()
	guess()
	if d := guess(); d < 200*time.Millisecond {
		t.Errorf("third guess answered after %v", d)
	}
	clock.advance(time.Minute)
	b.tick()
	if n := len(b.guard.failures); n != 0 {
		t.Errorf("%d entries remembered", n)
	}
}

func TestGuardIsBounded(t *testing.T) {
	var g guard
	now := time.Unix(0, 0)
	for i := range 3 * maxGuarded {
		g.failed(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), "x", now.Add(time.Duration(i)))
	}
	if len(g.failures) != maxGuarded {
		t.Errorf("%d entries", len(g.failures))
	}
}

// TestIPv6 logs in over an IPv6 portal.
func TestIPv6(t *testing.T) {
	probe, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here:", err)
	}
	_ = probe.Close()
	b := newBench(t, func(c *Config) { c.Listen = []string{"127.0.0.1:0", "[::1]:0"} })
	b.addr = b.Addrs()[1].String()
	dial(t, b).login().quiet()
	if s := b.Sessions(); len(s) != 1 || !strings.HasPrefix(s[0].Portal, "[::1]:") {
		t.Errorf("%+v", s)
	}
}

// TestStartFails: an address that cannot be listened on leaves nothing behind.
func TestStartFails(t *testing.T) {
	d := newMemoryDevice(1)
	cfg := Config{TargetName: testTarget, PortGroup: 1, Listen: []string{"127.0.0.1:0", "192.0.2.1:3260"}, Device: d, Directory: &testDirectory{}}
	target, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Start(context.Background()); err == nil || !strings.Contains(err.Error(), "192.0.2.1:3260") {
		t.Errorf("error %v", err)
	}
	target.Close()
	if err := target.Start(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("error %v", err)
	}
	for name, change := range map[string]func(*Config){
		"name": func(c *Config) { c.TargetName = "a b" }, "group": func(c *Config) { c.PortGroup = 0 },
		"portal": func(c *Config) { c.Listen = nil }, "device": func(c *Config) { c.Device = nil }, "directory": func(c *Config) { c.Directory = nil },
	} {
		bad := cfg
		change(&bad)
		if _, err := New(bad); err == nil {
			t.Errorf("bad %s accepted", name)
		}
	}
}

// TestContextEnds: the end of the context is the end of the target's service.
func TestContextEnds(t *testing.T) {
	b := newBench(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	target, err := New(Config{TargetName: testTarget, PortGroup: 1, Listen: []string{"127.0.0.1:0"}, Device: b.device, Directory: b.dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Start(ctx); err != nil {
		t.Fatal(err)
	}
	b.addr = target.Addrs()[0].String()
	defer target.Close()
	c := dial(t, b).login()
	c.quiet() // its reader is at work
	cancel()
	r := c.expect(pdu.OpAsync)
	if r.Header[36] != pdu.AsyncDropSession {
		t.Errorf("event %d", r.Header[36])
	}
	if _, err := c.receive(); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("error %v", err)
	}
	target.Close()
	if n := len(target.Sessions()); n != 0 {
		t.Errorf("%d sessions", n)
	}
}
