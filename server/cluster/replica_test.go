package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// wide is a bench with data nodes a, b, d and e, a witness, and one volume that is
// in sync on a, its owner, and b.
func wide(t testing.TB) (*bench, lsfs.VolumeID) {
	b := newBench(t)
	for _, id := range []byte{4, 5} {
		b.ok(&cmdCreateToken{token{Hash: [32]byte{id}, Role: RoleData, Expires: day.Add(time.Hour)}})
		b.ok(joinCommand(id))
		b.ok(&cmdStart{Node: replication.NodeID(id), Addresses: b.m.state.Node(replication.NodeID(id)).Addresses, Version: "v"})
	}
	id := lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
	b.grow(id, 2)
	return b, id
}

func (b *bench) record(id lsfs.VolumeID) *replication.Record { return &b.m.state.Volume(id).Record }

// grow brings a replica into sync.
func (b *bench) grow(id lsfs.VolumeID, n replication.NodeID) {
	b.t.Helper()
	r := b.record(id)
	b.ok(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch, Owner: r.Owner, InSync: append(slices.Clone(r.InSync), n), By: r.Owner,
		Grow: n, GrowReplica: r.Replicas[replicaOn(r, n)].ID, GrowIncarnation: b.m.state.Node(n).Incarnation}})
}

// own makes a member of the in-sync set the owner.
func (b *bench) own(id lsfs.VolumeID, n replication.NodeID) {
	b.t.Helper()
	r := b.record(id)
	b.ok(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch, Owner: n, InSync: r.InSync, By: r.Owner}})
}

func (b *bench) add(id lsfs.VolumeID, n, replaces replication.NodeID) *Operation {
	b.t.Helper()
	r := b.ok(&cmdAddReplica{Volume: id, Expect: b.record(id).Epoch, Node: n, ID: replication.ReplicaID{byte(n), byte(b.n)}, Replaces: replaces})
	return b.m.state.Operation(r.ID)
}

func TestAddAndRemoveReplica(t *testing.T) {
	b, id := wide(t)
	epoch := b.record(id).Epoch
	o := b.add(id, 4, 0)
	r := b.record(id)
	if o == nil || !o.Running() || r.Epoch != epoch+1 || len(r.Replicas) != 3 || !slices.Equal(r.InSync, []replication.NodeID{1, 2}) {
		t.Fatalf("%+v, %+v", o, r)
	}
	// An owner's change from before the replica came is decided against.
	if got := b.do(&cmdChange{replication.Change{Volume: id, Expect: epoch, Owner: 1, InSync: []replication.NodeID{1}, By: 1}}); got.Code != codeConflict {
		t.Errorf("%+v", got)
	}
	b.grow(id, 4)
	if o = b.m.state.Operation(o.ID); o.State != OperationDone || o.Ended.IsZero() {
		t.Errorf("%+v", o)
	}
	remove := func(n replication.NodeID) result {
		return b.do(&cmdRemoveReplica{id, b.record(id).Epoch, n})
	}
	if got := remove(1); got.Code != codeRefused || !strings.Contains(got.Text, "owns") {
		t.Errorf("the owner's replica: %+v", got)
	}
	if got := b.do(&cmdRemoveReplica{id, b.record(id).Epoch - 1, 2}); got.Code != codeConflict {
		t.Errorf("an old epoch: %+v", got)
	}
	if got := remove(5); got.Code != codeNotFound {
		t.Errorf("no replica: %+v", got)
	}
	if got := remove(2); got.Code != codeOK {
		t.Errorf("%+v", got)
	}
	if r = b.record(id); !slices.Equal(r.InSync, []replication.NodeID{1, 4}) || len(r.Replicas) != 2 {
		t.Errorf("%+v", r)
	}
	if got := remove(4); got.Code != codeOK {
		t.Errorf("%+v", got)
	}
	if got := remove(1); got.Code != codeRefused || !strings.Contains(got.Text, "last good copy") {
		t.Errorf("the last copy: %+v", got)
	}
	// It comes back as another replica, and a proposal for the one before finds none.
	old := replicaID(b.m.state.Volume(id).UUID, 2)
	b.add(id, 2, 0)
	r = b.record(id)
	if got := b.do(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch, Owner: 1, InSync: []replication.NodeID{1, 2}, By: 1, Grow: 2, GrowReplica: old, GrowIncarnation: 1}}); got.Code != codeConflict {
		t.Errorf("the replica of before enters the set: %+v", got)
	}
}

func TestAddReplicaRefusals(t *testing.T) {
	fresh := replication.ReplicaID{0xff}
	for _, tt := range []struct {
		what string
		x    cmdAddReplica
		want code
		prep func(*bench, lsfs.VolumeID)
	}{
		{what: "no volume", x: cmdAddReplica{Volume: 9, Node: 4, ID: fresh}, want: codeNotFound},
		{what: "no node", x: cmdAddReplica{Node: 9, ID: fresh}, want: codeNotFound},
		{what: "a witness", x: cmdAddReplica{Node: 3, ID: fresh}, want: codeInvalid},
		{what: "twice", x: cmdAddReplica{Node: 2, ID: fresh}, want: codeExists},
		{what: "without an id", x: cmdAddReplica{Node: 4}, want: codeInvalid},
		{what: "another epoch", x: cmdAddReplica{Node: 4, ID: fresh, Expect: 99}, want: codeConflict},
		{what: "replaces none", x: cmdAddReplica{Node: 4, ID: fresh, Replaces: 5}, want: codeNotFound},
		{what: "drained", x: cmdAddReplica{Node: 4, ID: fresh}, want: codeRefused, prep: func(b *bench, _ lsfs.VolumeID) { b.ok(&cmdDrainNode{4, true}) }},
		{what: "in maintenance", x: cmdAddReplica{Node: 4, ID: fresh}, want: codeRefused, prep: func(b *bench, _ lsfs.VolumeID) { b.ok(&cmdNodeMode{Node: 4, Mode: ModeMaintenance}) }},
		{what: "evacuated", x: cmdAddReplica{Node: 4, ID: fresh}, want: codeRefused, prep: func(b *bench, _ lsfs.VolumeID) { b.ok(&cmdNodeMode{Node: 4, Mode: ModeEvacuating}) }},
		{what: "a fourth", x: cmdAddReplica{Node: 5, ID: fresh}, want: codeRefused, prep: func(b *bench, id lsfs.VolumeID) { b.add(id, 4, 0) }},
		{what: "moved twice", x: cmdAddReplica{Node: 5, ID: fresh, Replaces: 2}, want: codeExists, prep: func(b *bench, id lsfs.VolumeID) { b.add(id, 4, 2) }},
	} {
		b, id := wide(t)
		if tt.prep != nil {
			tt.prep(b, id)
		}
		x := tt.x
		if x.Volume == 0 {
			x.Volume = id
		}
		if x.Expect == 0 {
			x.Expect = b.record(id).Epoch
		}
		before := b.record(id).Epoch
		if r := b.do(&x); r.Code != tt.want || r.Text == "" || b.record(id).Epoch != before {
			t.Errorf("%s: code %d (%s), want %d", tt.what, r.Code, r.Text, tt.want)
		}
	}
}

// The first epoch is that of an owner that has not begun.
func TestAddReplicaToNewVolume(t *testing.T) {
	b, _ := wide(t)
	id := lsfs.VolumeID(b.ok(volumeCommand("vm2")).ID)
	free := []replication.NodeID{1, 2, 4, 5}
	free = slices.DeleteFunc(free, func(n replication.NodeID) bool { return replicaOn(b.record(id), n) >= 0 })
	b.add(id, free[0], 0)
	if r := b.record(id); r.Epoch != 1 || len(r.Replicas) != 3 {
		t.Errorf("%+v", r)
	}
	b.ok(&cmdRemoveReplica{id, 1, free[0]})
	if r := b.record(id); r.Epoch != 1 || len(r.Replicas) != 2 {
		t.Errorf("%+v", r)
	}
	if r := b.do(&cmdPromote{Volume: id, Expect: 1, Node: b.record(id).Replicas[0].Node, Lineage: uuid.UUID{1}}); r.Code != codeRefused {
		t.Errorf("%+v", r)
	}
}

// A move ends when the replica that goes is taken off; a cancelled one leaves the
// volume as it was.
func TestMoveReplica(t *testing.T) {
	b, id := wide(t)
	o := b.add(id, 4, 2)
	b.grow(id, 4)
	if o = b.m.state.Operation(o.ID); !o.Running() || o.Kind != OperationMove {
		t.Fatalf("%+v", o)
	}
	b.ok(&cmdRemoveReplica{id, b.record(id).Epoch, 2})
	if o = b.m.state.Operation(o.ID); o.State != OperationDone {
		t.Errorf("%+v", o)
	}

	o = b.add(id, 5, 1)
	b.ok(&cmdCancelOperation{o.ID})
	if o = b.m.state.Operation(o.ID); o.State != OperationCancelled || replicaOn(b.record(id), 5) >= 0 {
		t.Errorf("%+v, %+v", o, b.record(id))
	}
	if r := b.do(&cmdCancelOperation{o.ID}); r.Code != codeRefused {
		t.Errorf("%+v", r)
	}
	if r := b.do(&cmdCancelOperation{99}); r.Code != codeNotFound {
		t.Errorf("%+v", r)
	}
	o = b.add(id, 5, 1)
	b.grow(id, 5)
	b.own(id, 5)
	if r := b.do(&cmdCancelOperation{o.ID}); r.Code != codeRefused {
		t.Errorf("the new replica owns already: %+v", r)
	}
	// A node that goes, and a volume that goes, end what hangs on them.
	p := b.add(id, 2, 4)
	b.ok(&cmdRemoveNode{2})
	if p = b.m.state.Operation(p.ID); p.State != OperationFailed {
		t.Errorf("%+v", p)
	}
	b.ok(&cmdDeleteVolume{Volume: id})
	if o = b.m.state.Operation(o.ID); o.State != OperationFailed || o.Text == "" {
		t.Errorf("%+v", o)
	}
}

// A replica that is taken away before it has come takes with it the move that was to
// drop it: nothing is left to be dropped, and the new one stays.
func TestCancelBehindMove(t *testing.T) {
	b, id := wide(t)
	add := b.add(id, 4, 0)
	move := b.add(id, 5, 4)
	b.ok(&cmdCancelOperation{add.ID})
	if o := b.m.state.Operation(move.ID); o.State != OperationDone {
		t.Errorf("the replica that was to go is gone: %+v", o)
	}
	if replicaOn(b.record(id), 5) < 0 {
		t.Errorf("the replica that came is gone: %+v", b.record(id))
	}
	checkState(t, b.m.state)
}

// What a volume's replicas have missed is known by the time they fell out of sync.
func TestReplicaHistory(t *testing.T) {
	b, id := wide(t)
	r := b.record(id)
	b.ok(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch, Owner: 1, InSync: []replication.NodeID{1}, By: 1}})
	left := b.m.state.Volume(id).Left
	if len(left) != 1 || left[0].Node != 2 || left[0].Epoch != b.record(id).Epoch || left[0].Time.IsZero() {
		t.Errorf("%+v", left)
	}
	b.grow(id, 2)
	if left := b.m.state.Volume(id).Left; len(left) != 0 {
		t.Errorf("%+v", left)
	}
}

func TestNodeModes(t *testing.T) {
	b, id := wide(t)
	// b has the only other copy: a may go, then b may not.
	b.ok(&cmdNodeMode{Node: 1, Mode: ModeMaintenance})
	if n := b.m.state.Node(1); n.Mode != ModeMaintenance || !n.Draining || n.ModeSince.IsZero() || n.Stays() {
		t.Errorf("%+v", n)
	}
	if r := b.do(&cmdNodeMode{Node: 2, Mode: ModeMaintenance}); r.Code != codeRefused || !strings.Contains(r.Text, "vm1") {
		t.Errorf("the last copy may go: %+v", r)
	}
	b.ok(&cmdNodeMode{Node: 2, Mode: ModeMaintenance, Force: true})
	b.ok(&cmdNodeMode{Node: 2, Mode: ModeServing})
	b.ok(&cmdNodeMode{Node: 1, Mode: ModeServing})
	if n := b.m.state.Node(1); n.Mode != ModeServing || n.Draining || !n.ModeSince.IsZero() {
		t.Errorf("%+v", n)
	}
	b.ok(&cmdNodeMode{Node: 3, Mode: ModeMaintenance}) // the witness has nothing to drain
	if n := b.m.state.Node(3); n.Draining {
		t.Errorf("%+v", n)
	}
	for _, tt := range []struct {
		x    cmdNodeMode
		want code
	}{
		{cmdNodeMode{Node: 9, Mode: ModeMaintenance}, codeNotFound}, {cmdNodeMode{Node: 3, Mode: ModeEvacuating}, codeInvalid},
		{cmdNodeMode{Node: 1, Mode: ModeEvacuating, To: 1}, codeInvalid}, {cmdNodeMode{Node: 1, Mode: ModeEvacuating, To: 3}, codeInvalid},
		{cmdNodeMode{Node: 1, Mode: 9}, codeInvalid},
	} {
		if r := b.do(&tt.x); r.Code != tt.want {
			t.Errorf("%+v: %+v", tt.x, r)
		}
	}
	b.ok(&cmdNodeMode{Node: 1, Mode: ModeEvacuating, To: 5})
	// New volumes go elsewhere.
	rec := b.record(lsfs.VolumeID(b.ok(volumeCommand("vm2")).ID))
	if replicaOn(rec, 1) >= 0 {
		t.Errorf("a new volume on a node that is evacuated: %+v", rec)
	}
	b.add(id, 5, 1)
	b.ok(&cmdRemoveNode{5})
	if n := b.m.state.Node(1); n.EvacuateTo != 0 {
		t.Errorf("%+v", n)
	}
}

func TestQuorumSettings(t *testing.T) {
	quorum := func(m QuorumMode, n replication.NodeID) command {
		return &cmdSettings{Quorum: true, Settings: Settings{Quorum: m, Preferred: n}}
	}
	b := newBench(t) // a, b and a witness
	for _, tt := range []struct {
		x    command
		want code
	}{
		{quorum(QuorumWitness, 0), codeOK}, {quorum(QuorumMajority, 0), codeRefused}, {quorum(QuorumPreferred, 3), codeInvalid},
		{quorum(QuorumPreferred, 0), codeInvalid}, {quorum(QuorumWitness, 1), codeInvalid}, {quorum(9, 0), codeInvalid}, {quorum(QuorumPreferred, 2), codeOK},
		{&cmdSettings{Balance: true, Settings: Settings{BalanceAfter: 1 << 30}}, codeInvalid}, {&cmdSettings{Balance: true, Settings: Settings{BalanceOff: true, BalanceAfter: 5}}, codeOK},
	} {
		if r := b.do(tt.x); r.Code != tt.want {
			t.Errorf("%+v: %+v", tt.x, r)
		}
	}
	if s := b.m.state.Settings; s != (Settings{true, 5, QuorumPreferred, 2, 0}) {
		t.Errorf("%+v", s)
	}
	b.ok(&cmdRemoveNode{2})
	if s := b.m.state.Settings; s != (Settings{BalanceOff: true, BalanceAfter: 5}) {
		t.Errorf("a removed node is preferred: %+v", s)
	}
	if r := b.do(quorum(QuorumWitness, 0)); r.Code != codeRefused {
		t.Errorf("a witness beside one data node: %+v", r)
	}
}

func TestPromote(t *testing.T) {
	b, id := wide(t)
	r := b.record(id)
	b.ok(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch, Owner: 1, InSync: []replication.NodeID{1}, By: 1}})
	r = b.record(id)
	old := slices.Clone(r.Replicas)
	x := func(f func(*cmdPromote)) *cmdPromote {
		x := &cmdPromote{Volume: id, Expect: r.Epoch, Node: 2, Lineage: uuid.UUID{1}, Others: []replication.Replica{{Node: 1, ID: replication.ReplicaID{0xee}}}, Why: "b stood at operation 7."}
		f(x)
		return x
	}
	for what, bad := range map[string]struct {
		x    *cmdPromote
		want code
	}{
		"an old epoch":       {x(func(x *cmdPromote) { x.Expect-- }), codeConflict},
		"no replica":         {x(func(x *cmdPromote) { x.Node = 4 }), codeNotFound},
		"the only good copy": {x(func(x *cmdPromote) { x.Node = 1; x.Others[0].Node = 2 }), codeRefused},
		"no lineage":         {x(func(x *cmdPromote) { x.Lineage = uuid.Nil }), codeInvalid},
		"others keep theirs": {x(func(x *cmdPromote) { x.Others = nil }), codeInvalid},
		"an id twice":        {x(func(x *cmdPromote) { x.Others[0].ID = old[1].ID }), codeInvalid},
	} {
		if got := b.do(bad.x); got.Code != bad.want {
			t.Errorf("%s: %+v", what, got)
		}
	}
	b.ok(x(func(*cmdPromote) {}))
	v := b.m.state.Volume(id)
	if r = &v.Record; r.Owner != 2 || !slices.Equal(r.InSync, []replication.NodeID{2}) || !r.Forced || v.Lineage != (uuid.UUID{1}) ||
		r.Replicas[0].ID == old[0].ID || r.Replicas[1].ID != old[1].ID || len(v.Left) != 0 {
		t.Errorf("%+v", v)
	}
	if e := b.m.state.Events[len(b.m.state.Events)-1]; e.Code != "volume-promoted" || e.Severity != Error || !strings.Contains(e.Text, "b stood at operation 7.") {
		t.Errorf("%+v", e)
	}
	// The old owner's changes are over.
	if got := b.do(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch - 1, Owner: 1, InSync: []replication.NodeID{1}, By: 1}}); got.Code != codeConflict {
		t.Errorf("%+v", got)
	}
}

// Level 1 is what the version before knows: nothing newer is applied or written
// until every member is known to read it.
func TestFeatureLevel(t *testing.T) {
	b := &bench{t: t, m: newMachine(new(State))}
	x := initCommand()
	x.Cluster.FeatureLevel = 1
	b.ok(x)
	b.ok(joinCommand(2))
	b.ok(&cmdStart{Node: 1, Addresses: x.Node.Addresses, Version: "v"})
	id := lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
	b.grow(id, 2)
	r := b.record(id)
	b.ok(&cmdChange{replication.Change{Volume: id, Expect: r.Epoch, Owner: r.Owner, InSync: []replication.NodeID{r.Owner}, By: r.Owner}})
	if v := b.m.state.Volume(id); v.Preferred != 0 || len(v.Left) != 0 {
		t.Errorf("what version 2 cannot hold: %+v", v)
	}
	s := must(b.m.state.marshal())(t)
	if s[len(snapshotMagic)] != 2 {
		t.Errorf("written in version %d", s[len(snapshotMagic)])
	}
	for _, x := range []command{&cmdNodeMode{Node: 1}, &cmdSettings{}, &cmdPrefer{id, 1}, &cmdAddReplica{Volume: id}, &cmdPromote{Volume: id}} {
		if r := b.do(x); r.Code != codeRefused || !strings.Contains(r.Text, "upgrade plan") {
			t.Errorf("%T: %+v", x, r)
		}
	}
	if r := b.do(&cmdRaiseLevel{9, []asked{{1, 1}, {2, 0}}}); r.Code != codeRefused {
		t.Errorf("%+v", r)
	}
	for _, who := range [][]asked{nil, {{1, 1}}, {{1, 0}, {2, 0}}} {
		if r := b.do(&cmdRaiseLevel{2, who}); r.Code != codeRefused {
			t.Errorf("asked %v: %+v", who, r)
		}
	}
	b.ok(&cmdRaiseLevel{2, []asked{{1, 1}, {2, 0}}})
	b.ok(&cmdRaiseLevel{2, nil})
	if s := must(b.m.state.marshal())(t); s[len(snapshotMagic)] != 3 {
		t.Errorf("written in version %d", s[len(snapshotMagic)])
	}
	b.ok(&cmdPrefer{id, 2})
	rate := &cmdSettings{Resync: true, Settings: Settings{ResyncRate: 200}}
	if r := b.do(rate); r.Code != codeRefused || !strings.Contains(r.Text, "upgrade plan") {
		t.Errorf("a resync rate on level 2: %+v", r)
	}
	b.ok(&cmdRaiseLevel{3, []asked{{1, 1}, {2, 0}}})
	b.ok(rate)
	if s := must(b.m.state.marshal())(t); s[len(snapshotMagic)] != 4 || b.m.state.Settings.ResyncRate != 200 {
		t.Errorf("written in version %d, settings %+v", s[len(snapshotMagic)], b.m.state.Settings)
	}
	for _, wrong := range []uint32{1, 9, 1<<20 + 1} {
		if r := b.do(&cmdSettings{Resync: true, Settings: Settings{ResyncRate: wrong}}); r.Code != codeInvalid {
			t.Errorf("rate %d: %+v", wrong, r)
		}
	}
	away := &cmdStart{Node: 2, Addresses: Addresses{Sync: "10.0.0.2:7", Management: "10.1.0.2:7"}, Version: "v"}
	if r := b.do(away); r.Code != codeRefused || !strings.Contains(r.Text, "upgrade plan") {
		t.Errorf("a management address on level 3: %+v", r)
	}
	b.ok(&cmdRaiseLevel{4, []asked{{1, 1}, {2, 0}}})
	b.ok(away)
	if s := must(b.m.state.marshal())(t); s[len(snapshotMagic)] != 5 {
		t.Errorf("written in version %d", s[len(snapshotMagic)])
	}
	b.ok(&cmdSettings{Resync: true})
	if b.m.state.Settings.ResyncRate != 0 {
		t.Errorf("settings %+v", b.m.state.Settings)
	}
}

// The answers that nodes give each other are read in the form of either version.
func TestMessageVersions(t *testing.T) {
	_, id := wide(t)
	for _, version := range []byte{2, 3, 4, 5} {
		want := result{Code: codeConflict, Text: "no", ID: 4, Index: 7, Record: replication.Record{Volume: id, Epoch: 3, Owner: 1, InSync: []replication.NodeID{1}}}
		var got result
		if err := decodeMessage(must(encodeVersion(&want, version))(t), &got); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("version %d: %+v, %v", version, got, err)
		}
	}
	if err := decodeMessage([]byte{1, 2}, new(result)); !errors.Is(err, errEncoding) {
		t.Error(err)
	}
}
