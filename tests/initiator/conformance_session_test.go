package initiator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// TestLogout_RFC7143_11_14: reasons and what they are answered.
func TestLogout_RFC7143_11_14(t *testing.T) {
	l := newLab(t)
	var wrongCID bool
	c := l.dial(func(cfg *initiator.Config) {
		cfg.CID = 0x1234
		cfg.Outgoing = func(p *initiator.PDU) {
			if wrongCID && p.Opcode() == initiator.OpLogout {
				p.Put16(20, 0x4321)
			}
		}
	})
	if n, err := c.Logout(wait(t), 2); n != 2 || err != nil {
		t.Errorf("for recovery: %d, %v", n, err)
	}
	wrongCID = true
	if n, err := c.Logout(wait(t), 1); n != 1 || err != nil {
		t.Errorf("another connection: %d, %v", n, err)
	}
	wrongCID = false
	var rejected *initiator.RejectError
	if _, err := c.Logout(wait(t), 5); !asReject(err, &rejected) || rejected.Reason != 9 {
		t.Errorf("unknown reason: %v", err)
	}
	l.works(c)
	if n, err := c.Logout(wait(t), 1); n != 0 || err != nil {
		t.Errorf("this connection: %d, %v", n, err)
	}
	if err := c.Done(wait(t)); !errors.Is(err, io.EOF) {
		t.Errorf("afterwards: %v", err)
	}
	// Tasks under way are answered before the logout is.
	c = l.dial(nil)
	var tasks []*initiator.Task
	for i := range 20 {
		tasks = append(tasks, start(t, c, &initiator.Command{LUN: l.lun, CDB: initiator.Write16(uint64(i), 1), Out: fill(l.block, 1)}))
	}
	if n, err := c.Logout(wait(t), 0); n != 0 || err != nil {
		t.Errorf("the session: %d, %v", n, err)
	}
	finish(t, tasks)
}

// TestSNACK_RFC7143_11_16: at error recovery level 0 nothing is sent again, and
// the session goes on.
func TestSNACK_RFC7143_11_16(t *testing.T) {
	l := newLab(t)
	c := l.dial(nil)
	for kind := range byte(4) {
		p := initiator.NewPDU(initiator.OpSNACK, initiator.NoTag)
		p.BHS[1] |= kind
		p.Put32(20, initiator.NoTag)
		if err := c.Send(p); err != nil {
			t.Fatal(err)
		}
		if ev, err := c.Event(wait(t)); err != nil || ev.Opcode() != initiator.OpReject || ev.BHS[2] != 3 || !bytes.Equal(ev.Data, p.BHS[:]) {
			t.Errorf("type %d: %v, %v, want Reject 03 with its header", kind, ev, err)
		}
	}
	l.works(c)
}

// TestReservedTag_RFC7143_11_2_1_8: requests that want an answer need a tag.
func TestReservedTag_RFC7143_11_2_1_8(t *testing.T) {
	l := newLab(t)
	c := l.dial(nil)
	for _, op := range []byte{initiator.OpCommand, initiator.OpTaskManagement, initiator.OpText, initiator.OpLogout} {
		p := initiator.NewPDU(op|initiator.Immediate, initiator.NoTag)
		p.Put32(20, initiator.NoTag)
		if err := c.Send(p); err != nil {
			t.Fatal(err)
		}
		if ev, err := c.Event(wait(t)); err != nil || ev.Opcode() != initiator.OpReject || ev.BHS[2] != 9 {
			t.Errorf("opcode %02x: %v, %v, want Reject 09", op, ev, err)
		}
	}
	l.works(c)
}

// TestTextInParts_RFC7143_11_10: an answer longer than the initiator takes comes
// in parts; a new request begins anew; tags that go on with nothing are rejected.
func TestTextInParts_RFC7143_11_10(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{})
	for i := range 60 {
		r.portals = append(r.portals, iscsi.Portal{Addr: fmt.Sprintf("[2001:db8::%x]:3260", i+1), Group: uint16(1 + i%2)})
	}
	cfg := r.config()
	cfg.TargetName = ""
	cfg.Keys = keys("MaxRecvDataSegmentLength=512")
	c, err := initiator.Dial(wait(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := c.SendTargets(wait(t), "All")
	if err != nil || len(got[targetName]) != 60 || got[targetName][59] != "[2001:db8::3c]:3260,2" {
		t.Errorf("%d portals, %v", len(got[targetName]), err)
	}
	p := initiator.NewPDU(initiator.OpText|initiator.Immediate, 0x777)
	p.Put32(20, 5)
	if err := c.Send(p); err != nil {
		t.Fatal(err)
	}
	if ev, err := c.Event(wait(t)); err != nil || ev.Opcode() != initiator.OpReject || ev.BHS[2] != 9 {
		t.Errorf("%v, %v", ev, err)
	}
}

// TestOneSessionPerPort_RFC7143_4_4_3: one initiator port has one session with a
// portal group, whichever of its portals it comes through.
func TestOneSessionPerPort_RFC7143_4_4_3(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	first := dial(t, r.config())
	cfg := r.config()
	cfg.Addr = r.target.Addrs()[1].String()
	second, err := initiator.Dial(wait(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := first.Done(wait(t)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the first session: %v", err)
	}
	if n := len(r.target.Sessions()); n != 1 {
		t.Errorf("%d sessions", n)
	}
	if res := do(t, second, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(res) != "06/29/07" {
		t.Errorf("first command: %v", res)
	}
	mustWork(t, second)
}

// TestReinstatementWaits_RFC7143_6_3_5: the new session begins when no task of the
// old one can have an effect any more.
func TestReinstatementWaits_RFC7143_6_3_5(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	old := dial(t, r.config())
	r.lu.Hold()
	start(t, old, &initiator.Command{CDB: initiator.Write16(0, 1), Out: fill(512, 1)})
	r.await(t, 1)
	type end struct {
		c   *initiator.Conn
		err error
	}
	done := make(chan end, 1)
	go func() {
		c, err := initiator.Dial(wait(t), r.config())
		done <- end{c, err}
	}()
	if err := old.Done(wait(t)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the old session: %v", err)
	}
	if _, err := r.pinger(t).Ping(wait(t), nil, true); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
		t.Error("the new session began while a write of the old one was under way")
	default:
	}
	r.lu.Release()
	e := <-done
	if e.err != nil {
		t.Fatal(e.err)
	}
	defer e.c.Close()
	if res := do(t, e.c, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(res) != "06/29/07" {
		t.Errorf("first command: %v", res)
	}
	mustWork(t, e.c)
}

// TestNexusLoss_RFC7143_13_16: a lost session is kept for Time2Retain, then its
// nexus is lost.
func TestNexusLoss_RFC7143_13_16(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	cfg := r.config()
	cfg.Keys = initiator.WithKeys(keys("DefaultTime2Retain=1")...)
	c := dial(t, cfg)
	c.Abort()
	ctx := wait(t)
	for n := 1; n > 0; n = len(r.target.Sessions()) {
		if ctx.Err() != nil {
			t.Fatal("the session is kept for ever")
		}
		// Every login attempt is a turn of the target.
		finder := r.config()
		finder.TargetName, finder.InitiatorName = "", hostName+"2"
		d, err := initiator.Dial(ctx, finder)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Logout(ctx, 0); err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
	again, err := initiator.Dial(wait(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if res := do(t, again, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(res) != "06/29/07" {
		t.Errorf("first command: %v", res)
	}
}

// TestRedirect_RFC7143_11_13_5: while a node is drained, hosts are asked to log
// out and find the other node under the address that their next login is given;
// afterwards they may come back.
func TestRedirect_RFC7143_11_13_5(t *testing.T) {
	one, two := newRig(t, true, iscsi.Limits{}), newRig(t, true, iscsi.Limits{})
	c := dial(t, one.config())
	mustWork(t, c)
	drained := make(chan error, 1)
	go func() {
		drained <- one.target.Drain(context.Background(), 10*time.Second, func(string) (string, bool) { return two.addr, true })
	}()
	ev, err := c.Event(wait(t))
	if err != nil || ev.Opcode() != initiator.OpAsync || ev.BHS[36] != 1 || ev.U16(42) != 10 || ev.ITT() != initiator.NoTag {
		t.Fatalf("%v, %v, want a logout request", ev, err)
	}
	mustWork(t, c) // it is asked, not thrown out
	if n, err := c.Logout(wait(t), 0); n != 0 || err != nil {
		t.Errorf("logout: %d, %v", n, err)
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	_, err = initiator.Dial(wait(t), one.config())
	var moved *initiator.LoginError
	if !errors.As(err, &moved) || moved.Class != 1 || moved.Detail != 1 || moved.Answers["TargetAddress"] != two.addr || len(moved.Answers) != 1 {
		t.Fatalf("%v, answers %v", err, moved)
	}
	cfg := one.config()
	cfg.Addr = moved.Answers["TargetAddress"]
	mustWork(t, dial(t, cfg))
	// Discovery is never redirected.
	finder := one.config()
	finder.TargetName = ""
	d, err := initiator.Dial(wait(t), finder)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	one.target.Resume()
	mustLogIn(t, one)
}

// TestAsyncDrop_RFC7143_11_9_1: who does not log out is told before the connection goes.
func TestAsyncDrop_RFC7143_11_9_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	c := dial(t, r.config())
	drained := make(chan error, 1)
	go func() {
		drained <- r.target.Drain(context.Background(), time.Second, func(string) (string, bool) { return "", false })
	}()
	for _, want := range []byte{1, 3} {
		ev, err := c.Event(wait(t))
		if err != nil || ev.Opcode() != initiator.OpAsync || ev.BHS[36] != want {
			t.Fatalf("%v, %v, want event %d", ev, err, want)
		}
	}
	if err := c.Done(wait(t)); !errors.Is(err, io.EOF) {
		t.Errorf("afterwards: %v", err)
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	_, err := initiator.Dial(wait(t), r.config())
	var refused *initiator.LoginError
	if !errors.As(err, &refused) || refused.Class != 3 || refused.Detail != 1 {
		t.Errorf("nowhere to go: %v, want 0301", err)
	}
}

// TestDiscoveryAuthentication_RFC7143_9_2: discovery asks for its own secret.
func TestDiscoveryAuthentication_RFC7143_9_2(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{FailedLoginDelay: time.Millisecond})
	r.discovery = map[string]iscsi.Access{hostName: {User: "finder", Secret: "secret of discovery", MutualUser: "san", MutualSecret: "secret of the san"}}
	for secret, ok := range map[string]bool{"": false, "secret of discovery": true, "secret of another": false} {
		cfg := r.config()
		cfg.TargetName = ""
		if secret != "" {
			cfg.CHAP = &initiator.CHAP{Name: "finder", Secret: secret, MutualName: "san", MutualSecret: "secret of the san"}
		}
		c, err := initiator.Dial(wait(t), cfg)
		var refused *initiator.LoginError
		if ok != (err == nil) || !ok && (!errors.As(err, &refused) || refused.Class != 2 || refused.Detail != 1) {
			t.Errorf("secret %q: %v", secret, err)
		}
		if c != nil {
			if got, err := c.SendTargets(wait(t), "All"); err != nil || len(got) != 1 {
				t.Errorf("%v, %v", got, err)
			}
			c.Close()
		}
	}
}

// TestCHAPReplay_RFC7143_9_2_1: a response is good for its challenge only, and
// challenges do not come twice.
func TestCHAPReplay_RFC7143_9_2_1(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{FailedLoginDelay: time.Millisecond})
	const name = "iqn.2026-01.example:chap"
	r.access[name] = iscsi.Access{User: "user", Secret: "secret of the user"}
	var heard []string
	cfg := r.config()
	cfg.InitiatorName = name
	cfg.CHAP = &initiator.CHAP{Name: "user", Secret: "secret of the user", Algorithms: []int{initiator.CHAPMD5}, OnResponse: func(s string) { heard = append(heard, s) }}
	for range 3 {
		c, err := initiator.Dial(wait(t), cfg)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if heard[0] == heard[1] || heard[1] == heard[2] {
		t.Fatal("the same response twice: the same challenge twice")
	}
	replay := *cfg.CHAP
	replay.RawResponse, replay.OnResponse = heard[0], nil
	cfg.CHAP = &replay
	_, err := initiator.Dial(wait(t), cfg)
	var refused *initiator.LoginError
	if !errors.As(err, &refused) || refused.Class != 2 || refused.Detail != 1 {
		t.Errorf("replay: %v", err)
	}
}

// TestSession goes through what tests of other packages use.
func TestSession(t *testing.T) {
	l := newLab(t)
	ctx := wait(t)
	opts := initiator.Options{InitiatorName: l.cfg.InitiatorName, ISID: l.cfg.ISID, CHAP: l.cfg.CHAP, HeaderDigest: true, DataDigest: true}
	s, err := initiator.Connect(ctx, l.url.Addr, l.url.Target, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Drop()
	if taken, err := s.Settle(ctx, l.url.LUN); err != nil || !slices.Contains(taken, "29/07") {
		t.Errorf("attentions %v, %v", taken, err)
	}
	if p := s.Conn().Params(); !p.HeaderDigest || !p.DataDigest {
		t.Errorf("%+v", p)
	}
	data := fill(8*l.block, 1)
	var pending []*initiator.Pending
	for i := range 8 {
		p, err := s.Submit(ctx, l.url.LUN, initiator.Write16(uint64(i), 1), data[i*l.block:(i+1)*l.block], 0)
		if err != nil {
			t.Fatal(err)
		}
		pending = append(pending, p)
	}
	for _, p := range pending {
		<-p.Done()
		if r, err := p.Wait(ctx); err != nil || !r.OK() {
			t.Fatalf("%v, %v", r, err)
		}
	}
	r, err := s.Do(ctx, l.url.LUN, initiator.Read16(0, 8), nil, 8*l.block)
	if err != nil || !r.OK() || !bytes.Equal(r.In, data) {
		t.Errorf("read: %v, %v", r, err)
	}
	if n, err := s.TaskManagement(ctx, initiator.AbortTask, l.url.LUN, pending[7]); n != 1 || err != nil {
		t.Errorf("abort of what has ended: %d, %v", n, err)
	}
	if r, err = s.Do(ctx, l.url.LUN, initiator.Inquiry(-1, 36), nil, 255); err != nil || len(r.In) != 36 || !r.Underflow {
		t.Errorf("INQUIRY: %v, %v", r, err)
	}
	if err := s.Reconnect(ctx); err != nil {
		t.Fatal(err)
	}
	if taken, err := s.Settle(ctx, l.url.LUN); err != nil || len(taken) == 0 {
		t.Errorf("after a reconnection: %v, %v", taken, err)
	}
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
}

// TestParseURL reads the forms that are customary.
func TestParseURL(t *testing.T) {
	for s, want := range map[string]initiator.URL{
		"iscsi://192.0.2.1/iqn.x/0":                          {Addr: "192.0.2.1:3260", Target: "iqn.x"},
		"iscsi://192.0.2.1:860/iqn.x:y/300":                  {Addr: "192.0.2.1:860", Target: "iqn.x:y", LUN: 300},
		"iscsi://user%secret@[2001:db8::1]:3260/iqn.x%3ay/2": {Addr: "[2001:db8::1]:3260", Target: "iqn.x:y", LUN: 2, User: "user", Secret: "secret"},
		"iscsi://[2001:db8::1]/iqn.x/1":                      {Addr: "[2001:db8::1]:3260", Target: "iqn.x", LUN: 1},
	} {
		if got, err := initiator.ParseURL(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "http://x/y/0", "iscsi://x", "iscsi://x/y", "iscsi://x//0", "iscsi://x/y/z", "iscsi://x/y/16384", "iscsi://x/y/-1"} {
		if got, err := initiator.ParseURL(s); err == nil {
			t.Errorf("%s: %+v", s, got)
		}
	}
}
