package replication

import (
	"slices"
	"testing"
	"time"
)

const ms = time.Millisecond

// paced feeds a sample a second for a while and returns the seconds after which slow changed.
func paced(p *pace, at *Instant, seconds int, sample, peers time.Duration) (changes []int) {
	for i := range seconds {
		*at += second
		if p.step(*at, sample, peers) {
			changes = append(changes, i+1)
		}
	}
	return changes
}

// learned is a device that has taken a millisecond for five minutes.
func learned(t *testing.T) (*pace, *Instant) {
	t.Helper()
	p, at := &pace{floor: deviceFloor}, new(Instant)
	if c := paced(p, at, 300, ms, ms); c != nil {
		t.Fatalf("slow while it is as ever: %v", c)
	}
	return p, at
}

func TestPaceSlowAndWellAgain(t *testing.T) {
	p, at := learned(t)
	c := paced(p, at, 60, 20*ms, ms)
	if len(c) != 1 || !p.slow || c[0] < 30 || 45 < c[0] {
		t.Fatalf("20 times slower for a minute: changes after %v s", c)
	}
	if p.usual > float64(2*ms) {
		t.Errorf("slowness has become usual: %s", time.Duration(p.usual))
	}
	// Less than ten times the peers is no suspicion, and not well either.
	if c := paced(p, at, 600, 12*ms, 2*ms); c != nil {
		t.Fatalf("well after %v s of six times what its peers take", c)
	}
	c = paced(p, at, 120, ms, ms)
	if len(c) != 1 || p.slow || c[0] < 60 || 80 < c[0] {
		t.Fatalf("well again: changes after %v s", c)
	}
	// The second time within a day takes twice as long to be believed.
	if c := paced(p, at, 60, 20*ms, ms); len(c) != 1 {
		t.Fatalf("slow again: %v", c)
	}
	if c := paced(p, at, 200, ms, ms); len(c) != 1 || c[0] < 120 {
		t.Fatalf("well again for the second time after %v s", c)
	}
}

func TestPaceNotSlow(t *testing.T) {
	for name, c := range map[string]struct {
		seconds       int
		sample, peers time.Duration
	}{
		"as slow as its peers":     {300, 50 * ms, 40 * ms},
		"for less than 30 seconds": {20, 50 * ms, ms},
		"nine times the peers":     {300, 18 * ms, 2 * ms},
	} {
		p, at := learned(t)
		if got := paced(p, at, c.seconds, c.sample, c.peers); got != nil {
			t.Errorf("%s: slow after %v s", name, got)
		}
	}
	p, at := &pace{floor: deviceFloor}, new(Instant)
	if got := paced(p, at, 100, 10*time.Microsecond, 10*time.Microsecond); got != nil {
		t.Fatal(got)
	}
	if got := paced(p, at, 100, time.Millisecond, 10*time.Microsecond); got != nil {
		t.Errorf("below the floor: slow after %v s", got)
	}
	p, at = &pace{floor: deviceFloor}, new(Instant)
	if got := paced(p, at, 20, 300*ms, 0); got != nil {
		t.Errorf("without a history: slow after %v s", got)
	}
}

// A device that nobody writes to any more gets another chance, and a suspicion that
// nothing confirms is none.
func TestPaceMute(t *testing.T) {
	p, at := learned(t)
	paced(p, at, 50, 100*ms, ms)
	if !p.slow {
		t.Fatal("not slow")
	}
	if c := paced(p, at, 700, 0, ms); len(c) != 1 || c[0] != 600 {
		t.Errorf("mute: changes after %v s", c)
	}
	p, at = learned(t)
	paced(p, at, 5, 100*ms, ms)
	if c := paced(p, at, 300, 0, ms); c != nil {
		t.Errorf("slow after %v s without a sample", c)
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		all  []time.Duration
		want time.Duration
	}{{nil, 0}, {[]time.Duration{3}, 3}, {[]time.Duration{9, 1}, 1}, {[]time.Duration{9, 1, 4}, 4}} {
		if got := median(c.all); got != c.want {
			t.Errorf("median of %v is %d", c.all, got)
		}
	}
}

func TestOwnerSparesItselfASlowReplica(t *testing.T) {
	g := activeReign(t)
	fresh := func(now Instant) {
		g.granted(now, 2, now)
		g.progressed(now, 2)
	}
	g.spares, g.peer(2).slow = false, true // both are slow
	fresh(11 * second)
	g.tick(11 * second)
	if p := proposals(g); p != nil {
		t.Fatalf("M1: of two slow ones one was dropped: %+v", p)
	}
	g.spares = true
	g.tick(11 * second)
	p := proposals(g)
	if len(p) != 1 || !slices.Equal(p[0].InSync, []NodeID{1}) || p[0].Owner != 1 {
		t.Fatalf("M1: proposed %+v", p)
	}
	g.proposed(11*second, p[0], testRecord(3, 1, 1), nil)
	g.take()
	g.tick(12 * second)
	if p := proposals(g); p != nil {
		t.Fatalf("the last copy: proposed %+v", p)
	}
}

// A node that says that it is slow leaves the in-sync set, first as replica and then as
// owner, without an error or a dropped session, and is filled again when it is well.
func TestSlowNodeStandsAside(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(4 << 20)
	data := make([]byte, 4096)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			data[0] = byte(i)
			for _, n := range []*testNode{a, c} {
				if err := n.do(&Request{Op: OpWrite, Off: uint64(i%64) * 4096, Len: 4096, Data: data}); err != nil && n.Volume(1).Status().Role != Stale {
					t.Errorf("write %d: %v", i, err)
					return
				}
			}
		}
	}()
	c.paces.slow.Store(true)
	b.inSync(1)
	a.paces.slow.Store(true) // the last good copy stays where it is
	before := b.record().Epoch
	eventually(t, "beacons go on", func() bool { return c.peerSlow(1) })
	c.paces.slow.Store(false)
	a.paces.slow.Store(false)
	b.inSync(1, 2)
	if r := b.record(); r.Owner != 1 || r.Epoch != before+1 {
		t.Errorf("the record is %+v, in epoch %d it was that of node 1 alone", r, before)
	}

	a.paces.slow.Store(true) // the owner now
	b.inSync(2)
	if r := b.record(); r.Owner != 2 {
		t.Fatalf("the record is %+v", r)
	}
	a.paces.slow.Store(false)
	b.inSync(1, 2)
	close(stop)
	<-stopped
}
