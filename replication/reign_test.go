package replication

import (
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

const second = Instant(time.Second)

func testRecord(epoch uint64, owner NodeID, insync ...NodeID) Record {
	return Record{Volume: 1, SizeBytes: 1 << 20, Epoch: lsfs.Epoch(epoch), Owner: owner, InSync: insync,
		Replicas: []Replica{{Node: 1}, {Node: 2}, {Node: 3}}}
}

// proposals takes the actions and returns the changes among them.
func proposals(g *reign) (out []Change) {
	for _, a := range g.take() {
		if a.kind == actPropose {
			out = append(out, a.change)
		}
	}
	return out
}

// activeReign is node 1 as the active owner of {1, 2} in epoch 2, at second 10.
func activeReign(t *testing.T) *reign {
	t.Helper()
	g := newReign(1, DefaultTiming, 0)
	g.record(9*second, testRecord(1, 1, 1, 2), true)
	p := proposals(g)
	if len(p) != 1 || p[0].Owner != 1 || p[0].Expect != 1 {
		t.Fatalf("M5: a restarted owner proposed %+v", p)
	}
	g.proposed(9*second, p[0], testRecord(2, 1, 1, 2), nil)
	if g.role != Activating {
		t.Fatalf("role %v after its own restart proposal", g.role)
	}
	if g.lease() != 0 {
		t.Error("M3: serves before it is active")
	}
	if !g.activated(10*second, 2) {
		t.Fatal("cannot activate")
	}
	g.granted(10*second, 2, 10*second)
	g.progressed(10*second, 2)
	g.take()
	return g
}

func TestLeaseCountsFromSend(t *testing.T) {
	g := activeReign(t)
	g.granted(12*second, 2, 11*second) // sent at 11, answered at 12
	if want := 13 * second; g.lease() != want {
		t.Errorf("L1: lease until %d, want %d: it counts from the sending", g.lease(), want)
	}
	g.record(12*second, testRecord(3, 1, 1), true)
	if g.lease() != never {
		t.Error("L4: a lone in-sync owner needs no lease")
	}
}

func TestOwnerDropsSilentReplica(t *testing.T) {
	g := activeReign(t)
	g.tick(11 * second)
	if p := proposals(g); p != nil {
		t.Fatalf("dropped a replica too early: %+v", p)
	}
	g.tick(12*second + second/2)
	p := proposals(g)
	if len(p) != 1 || !slices.Equal(p[0].InSync, []NodeID{1}) || p[0].Owner != 1 {
		t.Fatalf("M1: proposed %+v", p)
	}
	if !g.needsAck(2) {
		t.Error("M1, W4: the replica still counts until the change has committed")
	}
	// M7: an unknown outcome is repeated, not believed to have failed.
	g.proposed(13*second, p[0], Record{}, ErrOutcomeUnknown)
	g.tick(13*second + second/4)
	if q := proposals(g); q != nil {
		t.Errorf("repeated before the retry time: %+v", q)
	}
	g.tick(14 * second)
	if q := proposals(g); len(q) != 1 || q[0].Expect != p[0].Expect {
		t.Errorf("M7: repeated %+v", q)
	}
	g.proposed(14*second, p[0], testRecord(3, 1, 1), nil)
	if g.needsAck(2) || g.lease() != never {
		t.Error("the drop did not take effect")
	}
}

func TestOwnerDropsStuckAndDeadReplicas(t *testing.T) {
	g := activeReign(t)
	for at := 10 * second; at < 16*second; at += second / 5 {
		g.granted(at, 2, at) // it answers beacons and takes nothing
		g.tick(at)
	}
	if p := proposals(g); len(p) != 1 {
		t.Errorf("a replica without progress was not dropped: %+v", p)
	}
	g = activeReign(t)
	g.died(10*second+1, 2)
	if p := proposals(g); len(p) != 1 || !slices.Equal(p[0].InSync, []NodeID{1}) {
		t.Errorf("L5: a dead replica was not dropped at once: %+v", p)
	}
}

func standbyReign(now Instant) *reign {
	g := newReign(2, DefaultTiming, 0)
	g.record(now, testRecord(2, 1, 1, 2), true)
	g.take()
	return g
}

func TestTakeOverWaitsForGrace(t *testing.T) {
	g := standbyReign(20 * second)
	if !g.beacon(20*second, 1, 2, true) {
		t.Fatal("a standby grants its owner's lease")
	}
	g.tick(23 * second)
	if g.role != Standby {
		t.Fatal("M2: the owner has a head start")
	}
	g.tick(24 * second)
	p := proposals(g)
	if g.role != Candidate || len(p) != 1 || p[0].Owner != 2 || !slices.Equal(p[0].InSync, []NodeID{2}) {
		t.Fatalf("M2: role %v, proposed %+v", g.role, p)
	}
	if g.beacon(24*second, 1, 2, true) {
		t.Error("M2: a candidate grants nothing")
	}
	g.proposed(24*second, p[0], testRecord(3, 2, 2), nil)
	var at Instant
	for _, a := range g.take() {
		if a.kind == actActivate {
			at = a.at
		}
	}
	if want := (20 * second).After(DefaultTiming.Grace); at != want {
		t.Errorf("M3: activates at %d, want %d: the last grant must have run out", at, want)
	}
}

func TestTakeOverAtOnceFromADeadProcess(t *testing.T) {
	g := standbyReign(20 * second)
	g.beacon(20*second, 1, 2, true)
	g.died(20*second+1, 1)
	p := proposals(g)
	if len(p) != 1 || g.activateAfter != 0 {
		t.Fatalf("L5: proposed %+v, activation after %d", p, g.activateAfter)
	}
}

func TestTakeOverLost(t *testing.T) {
	g := standbyReign(20 * second)
	g.beacon(20*second, 1, 2, true)
	g.died(20*second+1, 1)
	p := proposals(g)
	g.proposed(21*second, p[0], testRecord(3, 1, 1, 2), ErrConflict)
	if g.role != Standby {
		t.Fatalf("role %v after a lost take-over", g.role)
	}
	if !g.beacon(21*second, 1, 3, true) {
		t.Error("M2: it grants again after losing")
	}
	// Dropped meanwhile: stale, and never a candidate.
	g.record(22*second, testRecord(4, 1, 1), true)
	g.died(23*second, 1)
	g.tick(90 * second)
	if p := proposals(g); p != nil || g.role != Stale {
		t.Errorf("NO-STALE: role %v, proposed %+v", g.role, p)
	}
}

func TestBootWaits(t *testing.T) {
	g := newReign(2, DefaultTiming, 0)
	if g.beacon(second, 1, 2, true) {
		t.Error("B1: grants before it has read the record")
	}
	g.record(second, testRecord(2, 1, 1, 2), true)
	g.died(2*second, 1)
	if p := proposals(g); p != nil {
		t.Errorf("B2: took over before the owner had time to start: %+v", p)
	}
	g.tick(11 * second)
	if p := proposals(g); len(p) != 1 {
		t.Errorf("B2: did not take over after the wait: %+v", p)
	}
	unfit := newReign(2, DefaultTiming, 0)
	unfit.record(second, testRecord(2, 1, 1, 2), false)
	unfit.died(2*second, 1)
	unfit.tick(60 * second)
	if p := proposals(unfit); p != nil || unfit.role != Stale {
		t.Errorf("B4: a node without its data is %v and proposed %+v", unfit.role, p)
	}
}

func TestDemotion(t *testing.T) {
	g := activeReign(t)
	g.record(11*second, testRecord(3, 2, 2), true)
	if g.role != Stale || g.lease() != 0 {
		t.Errorf("ONE-OWNER: role %v with a lease until %d after another took over", g.role, g.lease())
	}
	demoted := false
	for _, a := range g.take() {
		demoted = demoted || a.kind == actDemote
	}
	if !demoted {
		t.Error("Z1: sessions are not dropped")
	}
}

func TestGrowCountsFromTheProposal(t *testing.T) {
	g := activeReign(t)
	g.record(11*second, testRecord(3, 1, 1), true)
	if g.needsAck(2) {
		t.Fatal("counts a replica that is out")
	}
	if !g.grow(12*second, 2, ReplicaID{7}, 3) {
		t.Fatal("cannot grow")
	}
	if p := proposals(g); len(p) != 1 || p[0].Grow != 2 || p[0].GrowReplica != (ReplicaID{7}) || p[0].GrowIncarnation != 3 {
		t.Fatalf("M4: proposed %+v", p)
	}
	if !g.needsAck(2) {
		t.Error("M4: W4 counts the replica from the proposal on")
	}
}

func TestPromiseEndsOlderLeases(t *testing.T) {
	g := standbyReign(20 * second)
	g.promised = 5
	if g.beacon(21*second, 1, 4, true) {
		t.Error("W2: a lease for an epoch below the promised one")
	}
	if g.beacon(21*second, 1, 5, false) {
		t.Error("L3: a lease for an owner that does not hear us")
	}
	if g.beacon(21*second, 3, 5, true) {
		t.Error("a lease for a node that is not the owner")
	}
}

func TestCommonPoint(t *testing.T) {
	id := func(e, s uint64) lsfs.OpID { return lsfs.OpID{Epoch: lsfs.Epoch(e), Seq: lsfs.Seq(s)} }
	a := []lsfs.OpID{id(1, 1), id(2, 10), id(4, 30)}
	for _, c := range []struct {
		name string
		b    []lsfs.OpID
		end  lsfs.OpID
		want lsfs.OpID
	}{
		{"behind in the same epoch", []lsfs.OpID{id(1, 1), id(2, 10)}, id(2, 20), id(2, 20)},
		{"a tail of its own", []lsfs.OpID{id(1, 1), id(2, 10)}, id(2, 40), id(2, 29)},
		{"another epoch after the common one", []lsfs.OpID{id(1, 1), id(2, 10), id(3, 25)}, id(3, 50), id(2, 24)},
		{"same epoch, later end", a, id(4, 99), id(4, 35)},
		{"new", nil, id(0, 0), id(0, 0)},
	} {
		if got := common(a, id(4, 35), c.b, c.end); got != c.want {
			t.Errorf("Y1, %s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestGrowNeedsTheLease: from the proposal on the record may name the replica that is
// taken in, which may then take over; so it has to grant first.
func TestGrowNeedsTheLease(t *testing.T) {
	g := activeReign(t)
	g.record(11*second, testRecord(3, 1, 1), true)
	if g.lease() != never {
		t.Fatal("L4: a lone owner needs no lease")
	}
	g.granted(12*second, 2, 12*second)
	if !g.grow(12*second, 2, ReplicaID{}, 1) {
		t.Fatal("cannot grow")
	}
	if want := 14 * second; g.lease() != want {
		t.Errorf("L1, M7: lease until %d while the set may have grown, want %d", g.lease(), want)
	}
	c := proposals(g)[0]
	g.proposed(13*second, c, Record{}, ErrOutcomeUnknown)
	if want := 14 * second; g.lease() != want {
		t.Errorf("L1, M7: lease until %d after an unknown outcome, want %d", g.lease(), want)
	}
	g.proposed(20*second, c, testRecord(4, 1, 1), ErrConflict)
	if g.lease() != never {
		t.Error("the refused proposal still counts")
	}
}
