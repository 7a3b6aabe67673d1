package iscsi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

const elsewhere = "192.0.2.2:3260"

// drainBench is a bench on a clock of its own.
func drainBench(t *testing.T) (*bench, *fakeClock) {
	clock := newFakeClock()
	return newBench(t, func(c *Config) { c.Now = clock.Now; c.Limits.PingAfter = time.Hour }), clock
}

// drain runs Drain on the side.
func (b *bench) drain(ctx context.Context, to func(string) (string, bool)) <-chan error {
	done := make(chan error, 1)
	go func() { done <- b.Drain(ctx, 10*time.Second, to) }()
	return done
}

func (c *client) async() pdu.Async {
	c.tb.Helper()
	var p pdu.Async
	p.Decode(&c.expect(pdu.OpAsync).Header)
	return p
}

// first sends the first PDU of a login and returns the answer.
func first(t *testing.T, b *bench, pairs ...string) (*client, pdu.LoginResponse) {
	t.Helper()
	c := dial(t, b)
	return c, c.step(0, 1, true, pairs...)
}

// TestDrain: who logs out when asked goes with the next login, who does not is
// told and closed after its commands, and nobody comes in meanwhile.
func TestDrain(t *testing.T) {
	b, clock := drainBench(t)
	obedient, deaf := dial(t, b).login(), dial(t, b)
	deaf.isid[5]++
	deaf.login()
	finder := discover(t, b)
	lost := dial(t, b)
	lost.isid[5] += 2
	lost.login()
	_ = lost.conn.Close()
	eventually(t, "a session waits for its initiator", func() bool {
		return slices.ContainsFunc(b.Sessions(), func(s SessionInfo) bool { return s.Peer == "" })
	})
	half := dial(t, b) // in the middle of its login when the drain begins
	half.isid[5] += 3
	half.step(0, 1, true, append(slices.Clone(who), "AuthMethod=None")...)

	b.device.gate(true)
	write := deaf.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: write10(0, 1)}, make([]byte, 512))
	eventually(t, "write started", func() bool { return b.device.queued() == 1 })
	done := b.drain(context.Background(), func(initiator string) (string, bool) {
		return elsewhere, initiator == testInitiator
	})
	for _, c := range []*client{obedient, deaf} {
		if p := c.async(); p.Event != pdu.AsyncLogoutRequest || p.Parameter3 != 10 {
			t.Errorf("%+v", p)
		}
	}
	if r := half.step(1, 3, true); r.Status != statusUnavailable {
		t.Errorf("a login under way: status %04x", r.Status)
	}
	if got := obedient.logout(pdu.LogoutSession, 0); got != pdu.LogoutDone {
		t.Errorf("logout: %d", got)
	}
	obedient.expectClosed()
	c, r := first(t, b, append(slices.Clone(who), "AuthMethod=None")...)
	if r.Status != statusMoved || c.keys["TargetAddress"] != elsewhere || len(c.keys) != 1 {
		t.Errorf("redirect: status %04x, %v", r.Status, c.keys)
	}
	c.expectClosed()
	if _, r := first(t, b, "InitiatorName=iqn.nowhere.to.go", "TargetName="+testTarget, "AuthMethod=None"); r.Status != statusUnavailable {
		t.Errorf("nowhere to go: status %04x", r.Status)
	}
	finder.quiet()
	discover(t, b)
	if err := b.Drain(context.Background(), time.Second, nil); !errors.Is(err, ErrDraining) {
		t.Errorf("second drain: %v", err)
	}

	clock.advance(9 * time.Second)
	b.tick()
	deaf.quiet()
	clock.advance(2 * time.Second)
	b.tick()
	if p := deaf.async(); p.Event != pdu.AsyncDropSession {
		t.Errorf("%+v", p)
	}
	select {
	case err := <-done:
		t.Fatalf("drained with a write under way: %v", err)
	default:
	}
	b.device.gate(false)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for {
		r, err := deaf.receive()
		if err != nil {
			break
		}
		if r.ITT() != write {
			t.Errorf("got % x", r.Header[:])
		}
	}
	for _, s := range b.Sessions() {
		if !s.Discovery {
			t.Errorf("left: %+v", s)
		}
	}
	if got := b.detached(); len(got) != 3 {
		t.Errorf("detached %v", got)
	}
	if _, r := first(t, b, append(slices.Clone(who), "AuthMethod=None")...); r.Status != statusMoved {
		t.Errorf("after the drain: status %04x", r.Status)
	}
	b.Resume()
	b.Resume()
	dial(t, b).login().quiet()
}

// TestDrainNeverLoops: nobody is sent to where it is.
func TestDrainNeverLoops(t *testing.T) {
	b, _ := drainBench(t)
	own := b.dir.portals[0].Addr
	if err := b.Drain(context.Background(), time.Second, func(string) (string, bool) { return own, true }); err != nil {
		t.Fatal(err)
	}
	if _, r := first(t, b, who...); r.Status != statusUnavailable {
		t.Errorf("status %04x", r.Status)
	}
}

// TestDrainCalledOff: sessions that are left stay what they are.
func TestDrainCalledOff(t *testing.T) {
	b, clock := drainBench(t)
	c := dial(t, b).login()
	ctx, cancel := context.WithCancel(context.Background())
	done := b.drain(ctx, func(string) (string, bool) { return elsewhere, true })
	c.async()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	clock.advance(time.Minute)
	b.tick()
	c.quiet()
	_ = c.conn.Close() // it is retained again
	eventually(t, "lost", func() bool { s := b.Sessions(); return len(s) == 1 && s[0].Peer == "" })
	again := dial(t, b)
	again.tsih = c.tsih
	again.login().quiet()
	if again.tsih != c.tsih {
		t.Error("the session was not continued")
	}
}

// TestDrainEndsWithTarget: Close does not wait for a drain.
func TestDrainEndsWithTarget(t *testing.T) {
	b, _ := drainBench(t)
	c := dial(t, b).login()
	done := b.drain(context.Background(), func(string) (string, bool) { return elsewhere, true })
	c.async()
	b.Close()
	if err := <-done; err != nil && !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := b.Drain(context.Background(), 0, nil); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// TestIdleLogins: a thousand connections that say nothing, from one address and
// from many, keep nobody from logging in within a second.
func TestIdleLogins(t *testing.T) {
	for _, sources := range []int{1, 200} {
		t.Run(fmt.Sprint(sources), func(t *testing.T) {
			b := newBench(t, nil)
			for i := range 1000 {
				conn, err := dialFrom(fmt.Sprintf("127.1.%d.1", i%sources), b.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
			}
			began := time.Now()
			dial(t, b).login().quiet()
			if d := time.Since(began); d > time.Second {
				t.Errorf("a good login takes %v", d)
			}
			if st := b.Stats(); st.HalfOpen > DefaultLimits().HalfOpen || st.Logins[0] != 1 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// TestHalfOpenPrefersWhoSpeaks: at the bound a login under way outlives those
// that have said nothing, though it is older.
func TestHalfOpenPrefersWhoSpeaks(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limits = Limits{HalfOpen: 4, HalfOpenPerAddress: 4} })
	c := dial(t, b)
	c.step(0, 1, true, append(slices.Clone(who), "AuthMethod=None")...)
	for range 20 {
		dial(t, b)
	}
	eventually(t, "evictions", func() bool { return b.Stats().HalfOpenEvicted == 17 })
	if r := c.step(1, 3, true); r.Status != statusSuccess {
		t.Errorf("%+v", r)
	}
}
