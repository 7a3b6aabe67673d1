package cluster

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

var day = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// bench applies commands to a machine, one index and one second after another.
type bench struct {
	t testing.TB
	m *machine
	n uint64
}

func (b *bench) do(x command) result { b.t.Helper(); return b.by(1, x) }

func (b *bench) by(node replication.NodeID, x command) result {
	b.t.Helper()
	env := envelope{Now: day.Add(time.Duration(b.n) * time.Second), By: node}
	binary.BigEndian.PutUint64(env.Request[:], b.n+1)
	return b.exactly(env, x)
}

func (b *bench) exactly(env envelope, x command) result {
	b.t.Helper()
	data, err := encodeCommand(env, x)
	if err != nil {
		b.t.Fatal(err)
	}
	b.n++
	r, err := b.m.apply(b.n, data)
	if err != nil {
		b.t.Fatal(err)
	}
	checkState(b.t, b.m.state)
	return r
}

func (b *bench) ok(x command) result {
	b.t.Helper()
	r := b.do(x)
	if r.Code != codeOK {
		b.t.Fatalf("%T: %s", x, r.Text)
	}
	return r
}

func initCommand() *cmdInit {
	return &cmdInit{
		Cluster: ClusterInfo{Name: "lab", UUID: uuid.UUID{1}, Created: day, Target: "iqn.2026-11.io.twinsan:lab", FeatureLevel: FeatureLevel, CA: []byte("ca")},
		Node:    Node{ID: 1, Name: "a", Role: RoleData, Addresses: Addresses{Sync: "10.0.0.1:7"}, KeyPrint: [32]byte{1}, Joined: day},
		Tokens:  []token{{Hash: [32]byte{2}, Role: RoleData, Expires: day.Add(time.Hour)}, {Hash: [32]byte{3}, Role: RoleWitness, Expires: day.Add(time.Hour)}},
	}
}

func joinCommand(id byte) *cmdJoin {
	x := &cmdJoin{Token: [32]byte{id}, Name: string('a' + rune(id) - 1), Role: RoleData, Addresses: Addresses{Sync: fmt.Sprintf("10.0.0.%d:7", id)}, KeyPrint: [32]byte{id}}
	if id == 3 {
		x.Name, x.Role = "w", RoleWitness
	}
	return x
}

func volumeCommand(name string) *cmdCreateVolume {
	return &cmdCreateVolume{Name: name, UUID: uuid.NewSHA1(uuid.Nil, []byte(name)), NAA: [8]byte{0x30, name[0], name[len(name)-1], byte(len(name))}, Serial: name, SizeBytes: 1 << 20, BlockBytes: 512, PhysicalBytes: 4096, Thin: true, Dedup: true}
}

// newBench is a cluster of two data nodes and a witness, all started once.
func newBench(t testing.TB) *bench {
	b := &bench{t: t, m: newMachine(new(State))}
	b.ok(initCommand())
	b.ok(joinCommand(2))
	b.ok(joinCommand(3))
	for id, name := range []string{"a", "b", "w"} {
		b.ok(&cmdStart{Node: replication.NodeID(id + 1), Addresses: b.m.state.NodeNamed(name).Addresses, Version: "v"})
	}
	return b
}

// checkState checks what must hold in every state.
func checkState(t testing.TB, s *State) {
	t.Helper()
	names, luns, ids := map[string]bool{}, map[uint16]bool{}, map[lsfs.VolumeID]bool{}
	for i, v := range s.Volumes {
		r := &v.Record
		if ids[v.ID] || v.ID != r.Volume || v.ID >= s.nextVolume || i > 0 && s.Volumes[i-1].ID >= v.ID {
			t.Errorf("volume id %d", v.ID)
		}
		ids[v.ID] = true
		if r.Deleted {
			if r.Owner != 0 || len(r.InSync) != 0 || len(r.Replicas) == 0 {
				t.Errorf("deleted volume %s: %+v", v.Name, r)
			}
			continue
		}
		if names[v.Name] || luns[v.LUN] {
			t.Errorf("name %s or LUN %d taken twice", v.Name, v.LUN)
		}
		names[v.Name], luns[v.LUN] = true, true
		if !r.Has(r.Owner) || !slices.IsSorted(r.InSync) {
			t.Errorf("volume %s: owner %d, in sync %v", v.Name, r.Owner, r.InSync)
		}
		for _, n := range r.InSync {
			if !slices.ContainsFunc(r.Replicas, func(p replication.Replica) bool { return p.Node == n }) {
				t.Errorf("volume %s: %d is in sync and has no replica", v.Name, n)
			}
		}
		for _, p := range r.Replicas {
			if n := s.Node(p.Node); n == nil || n.Role != RoleData {
				t.Errorf("volume %s: replica on node %d", v.Name, p.Node)
			}
		}
		if v.Preferred != 0 && s.Node(v.Preferred) == nil || len(r.Replicas) > maxCopies+1 {
			t.Errorf("volume %s: preferred %d, %d replicas", v.Name, v.Preferred, len(r.Replicas))
		}
		held := map[replication.ReplicaID]bool{}
		for _, p := range r.Replicas {
			if held[p.ID] {
				t.Errorf("volume %s: two replicas of one id", v.Name)
			}
			held[p.ID] = true
		}
		for _, l := range v.Left {
			if r.Has(l.Node) || replicaOn(r, l.Node) < 0 || l.Epoch > r.Epoch {
				t.Errorf("volume %s: %+v has left, in sync %v", v.Name, l, r.InSync)
			}
		}
		for _, h := range v.ReadOnly {
			if !slices.Contains(v.Hosts, h) {
				t.Errorf("volume %s: %s may read what it does not see", v.Name, h)
			}
		}
		if !slices.IsSorted(v.Hosts) || !slices.IsSorted(v.ReadOnly) {
			t.Errorf("volume %s: hosts %v, read-only %v", v.Name, v.Hosts, v.ReadOnly)
		}
		for _, h := range v.Hosts {
			if s.Host(h) == nil {
				t.Errorf("volume %s: host %s", v.Name, h)
			}
		}
	}
	checkSnapshots(t, s)
	initiators := map[string]bool{}
	for _, h := range s.Hosts {
		for _, i := range h.Initiators {
			if initiators[i] {
				t.Errorf("initiator %s twice", i)
			}
			initiators[i] = true
		}
	}
	for _, n := range s.Nodes {
		if n.ID >= s.nextNode {
			t.Errorf("node %d", n.ID)
		}
	}
	for i, e := range s.Events {
		if i > 0 && e.Number != s.Events[i-1].Number+1 {
			t.Errorf("event %d after %d", e.Number, s.Events[i-1].Number)
		}
	}
	running := 0
	for i, o := range s.Operations {
		if o.ID > s.nextOperation || i > 0 && o.ID <= s.Operations[i-1].ID || o.Running() != o.Ended.IsZero() {
			t.Errorf("operation %+v", o)
		}
		if !o.Running() {
			continue
		}
		running++
		v := s.Volume(o.Volume)
		if v == nil || v.Record.Deleted || replicaOn(&v.Record, o.To) < 0 || o.Kind == OperationMove && replicaOn(&v.Record, o.From) < 0 || o.Kind == OperationAdd && v.Record.Has(o.To) {
			t.Errorf("operation %+v runs on %+v", o, v)
		}
	}
	if len(s.Operations)-running > keepOperations+1 {
		t.Errorf("%d operations are kept", len(s.Operations))
	}
	if len(s.Events) > 2*keepEvents || len(s.requests) > 2*keepRequests || len(s.tokens) > maxTokens {
		t.Errorf("unbounded: %d events, %d requests, %d tokens", len(s.Events), len(s.requests), len(s.tokens))
	}
}

func TestApplyRefusals(t *testing.T) {
	join := func(f func(*cmdJoin)) command { x := joinCommand(4); x.Token = [32]byte{4}; f(x); return x }
	vol := func(f func(*cmdCreateVolume)) command { x := volumeCommand("new"); f(x); return x }
	host := func(f func(*Host)) command {
		h := Host{Name: "new", Initiators: []string{"iqn.new"}}
		f(&h)
		return &cmdAddHost{h}
	}
	tests := []struct {
		what string
		x    command
		want code
	}{
		{"init twice", initCommand(), codeExists},
		{"unknown token", join(func(x *cmdJoin) { x.Token = [32]byte{9} }), codeToken},
		{"used token", join(func(x *cmdJoin) { x.Token = [32]byte{2} }), codeToken},
		{"expired token", join(func(x *cmdJoin) { x.Token = [32]byte{5} }), codeToken},
		{"token for another role", join(func(x *cmdJoin) { x.Role = RoleWitness }), codeToken},
		{"node name taken", join(func(x *cmdJoin) { x.Name = "a" }), codeExists},
		{"node name malformed", join(func(x *cmdJoin) { x.Name = "A b" }), codeInvalid},
		{"node address taken", join(func(x *cmdJoin) { x.Addresses.Sync = "10.0.0.1:7" }), codeExists},
		{"node address malformed", join(func(x *cmdJoin) { x.Addresses.Sync = "10.0.0.1" }), codeInvalid},
		{"portal malformed", join(func(x *cmdJoin) { x.Addresses.Portals = []string{"x"} }), codeInvalid},
		{"node key taken", join(func(x *cmdJoin) { x.KeyPrint = [32]byte{1} }), codeExists},
		{"second witness", join(func(x *cmdJoin) { x.Token = [32]byte{6}; x.Role = RoleWitness }), codeRefused},
		{"start of a stranger", &cmdStart{Node: 9, Addresses: Addresses{Sync: "10.0.0.9:7"}}, codeNotFound},
		{"start at another's address", &cmdStart{Node: 1, Addresses: Addresses{Sync: "10.0.0.2:7"}}, codeExists},
		{"remove a stranger", &cmdRemoveNode{9}, codeNotFound},
		{"remove an in-sync node", &cmdRemoveNode{1}, codeRefused},
		{"volume name taken", vol(func(x *cmdCreateVolume) { x.Name = "vm1" }), codeExists},
		{"volume name malformed", vol(func(x *cmdCreateVolume) { x.Name = "-" }), codeInvalid},
		{"volume of no size", vol(func(x *cmdCreateVolume) { x.SizeBytes = 0 }), codeInvalid},
		{"volume of odd size", vol(func(x *cmdCreateVolume) { x.SizeBytes = 4097 }), codeInvalid},
		{"volume too large", vol(func(x *cmdCreateVolume) { x.SizeBytes = MaxVolumeBytes + 4096 }), codeInvalid},
		{"volume of odd blocks", vol(func(x *cmdCreateVolume) { x.BlockBytes = 1024 }), codeInvalid},
		{"volume without UUID", vol(func(x *cmdCreateVolume) { x.UUID = uuid.Nil }), codeInvalid},
		{"volume UUID taken", vol(func(x *cmdCreateVolume) { x.UUID = volumeCommand("vm1").UUID }), codeExists},
		{"volume for a stranger", vol(func(x *cmdCreateVolume) { x.Hosts = []string{"nobody"} }), codeNotFound},
		{"delete nothing", &cmdDeleteVolume{Volume: 9}, codeNotFound},
		{"free what is not deleted", &cmdVolumeFreed{1, 1}, codeRefused},
		{"shrink", &cmdResizeVolume{1, 4096}, codeRefused},
		{"resize to odd size", &cmdResizeVolume{1, 1<<20 + 1}, codeInvalid},
		{"resize nothing", &cmdResizeVolume{9, 1 << 21}, codeNotFound},
		{"host name taken", host(func(h *Host) { h.Name = "esx" }), codeExists},
		{"host name malformed", host(func(h *Host) { h.Name = "" }), codeInvalid},
		{"host without initiator", host(func(h *Host) { h.Initiators = nil }), codeInvalid},
		{"initiator malformed", host(func(h *Host) { h.Initiators = []string{"new"} }), codeInvalid},
		{"initiator with space", host(func(h *Host) { h.Initiators = []string{"iqn.a b"} }), codeInvalid},
		{"initiator in capitals", host(func(h *Host) { h.Initiators = []string{"iqn.A"} }), codeInvalid},
		{"initiator taken", host(func(h *Host) { h.Initiators = []string{"iqn.esx"} }), codeExists},
		{"user without secret", host(func(h *Host) { h.User = "u" }), codeInvalid},
		{"mutual alone", host(func(h *Host) { h.MutualUser, h.MutualSecret = "u", Sealed("s") }), codeInvalid},
		{"remove no host", &cmdRemoveHost{"nobody"}, codeNotFound},
		{"show to a stranger", &cmdVolumeHosts{1, []string{"nobody"}, false}, codeNotFound},
		{"show nothing", &cmdVolumeHosts{9, nil, true}, codeNotFound},
		{"event without code", &cmdAddEvent{Info, "", "x"}, codeInvalid},
		{"event without severity", &cmdAddEvent{0, "x", "x"}, codeInvalid},
		{"token of no role", &cmdCreateToken{token{Hash: [32]byte{8}, Expires: day.Add(time.Hour)}}, codeInvalid},
		{"token expired at birth", &cmdCreateToken{token{Hash: [32]byte{8}, Role: RoleData, Expires: day}}, codeInvalid},
		{"token twice", &cmdCreateToken{token{Hash: [32]byte{4}, Role: RoleData, Expires: day.Add(time.Hour)}}, codeExists},
	}
	for _, tt := range tests {
		t.Run(tt.what, func(t *testing.T) {
			b := newBench(t)
			b.ok(volumeCommand("vm1"))
			b.ok(&cmdAddHost{Host{Name: "esx", Initiators: []string{"iqn.esx"}}})
			b.ok(&cmdCreateToken{token{Hash: [32]byte{4}, Role: RoleData, Expires: day.Add(time.Hour)}})
			b.ok(&cmdCreateToken{token{Hash: [32]byte{6}, Role: RoleWitness, Expires: day.Add(time.Hour)}})
			b.ok(&cmdCreateToken{token{Hash: [32]byte{5}, Role: RoleData, Expires: day.Add(time.Duration(b.n+1) * time.Second)}})
			before := *b.m.state
			r := b.do(tt.x)
			if r.Code != tt.want || r.Text == "" {
				t.Errorf("code %d (%s), want %d", r.Code, r.Text, tt.want)
			}
			// A refusal leaves nothing but its own trace against repetition.
			after := *b.m.state
			after.Index, after.requests = before.Index, before.requests
			if after.Hash() != before.Hash() {
				t.Error("a refused command changed the state")
			}
		})
	}
}

func TestBeforeInit(t *testing.T) {
	b := &bench{t: t, m: newMachine(new(State))}
	if r := b.do(volumeCommand("vm1")); r.Code != codeInvalid {
		t.Errorf("%+v", r)
	}
}

func TestPlacement(t *testing.T) {
	b := newBench(t)
	owners := map[replication.NodeID]int{}
	for i := range 6 {
		r := b.ok(volumeCommand(fmt.Sprintf("vm%d", i)))
		rec := b.m.state.Volume(lsfs.VolumeID(r.ID)).Record
		if !slices.Equal(rec.InSync, []replication.NodeID{rec.Owner}) || len(rec.Replicas) != 2 || rec.Replicas[0].ID == rec.Replicas[1].ID {
			t.Errorf("record %+v", rec)
		}
		owners[rec.Owner]++
	}
	if owners[1] != 3 || owners[2] != 3 {
		t.Errorf("owners %v", owners)
	}
	// A third data node takes its share; every volume still has two replicas.
	b.ok(&cmdCreateToken{token{Hash: [32]byte{4}, Role: RoleData, Expires: day.Add(time.Hour)}})
	b.ok(&cmdJoin{Token: [32]byte{4}, Name: "c", Role: RoleData, Addresses: Addresses{Sync: "10.0.0.4:7"}, KeyPrint: [32]byte{4}})
	rec := b.m.state.Volume(lsfs.VolumeID(b.ok(volumeCommand("vm6")).ID)).Record
	if rec.Owner != 4 || rec.Replicas[0].Node != 1 || rec.Replicas[1].Node != 4 {
		t.Errorf("record %+v", rec)
	}
}

func TestVolumeLife(t *testing.T) {
	b := newBench(t)
	b.ok(&cmdAddHost{Host{Name: "esx", Initiators: []string{"iqn.esx"}}})
	id := lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
	b.ok(volumeCommand("vm2"))
	b.ok(&cmdVolumeHosts{id, []string{"esx", "esx"}, false})
	if v := b.m.state.Volume(id); !slices.Equal(v.Hosts, []string{"esx"}) {
		t.Errorf("hosts %v", v.Hosts)
	}
	b.ok(&cmdRemoveHost{"esx"})
	if v := b.m.state.Volume(id); len(v.Hosts) != 0 {
		t.Errorf("hosts %v", v.Hosts)
	}
	b.ok(&cmdDeleteVolume{Volume: id})
	// A change that was on its way when the volume was deleted is decided against.
	if r := b.do(&cmdChange{replication.Change{Volume: id, Expect: 1, Owner: 1, InSync: []replication.NodeID{1}}}); r.Code != codeConflict || !r.Record.Deleted {
		t.Errorf("%+v", r)
	}
	// Name and LUN are free at once.
	again := b.ok(&cmdCreateVolume{Name: "vm1", UUID: uuid.UUID{7}, NAA: [8]byte{7}, SizeBytes: 4096, BlockBytes: 4096, PhysicalBytes: 4096})
	if v := b.m.state.VolumeNamed("vm1"); v.LUN != 0 || uint64(v.ID) != again.ID || v.ID == id {
		t.Errorf("%+v", v)
	}
	b.by(1, &cmdVolumeFreed{id, 1})
	b.by(1, &cmdVolumeFreed{id, 1})
	if b.m.state.Volume(id) == nil {
		t.Error("gone while a replica is left")
	}
	b.by(2, &cmdVolumeFreed{id, 2})
	if b.m.state.Volume(id) != nil {
		t.Error("still there")
	}
	b.ok(&cmdVolumeFreed{id, 2})
}

func TestRemoveNode(t *testing.T) {
	b := newBench(t)
	id := lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
	gone := lsfs.VolumeID(b.ok(volumeCommand("vm2")).ID)
	b.ok(&cmdDeleteVolume{Volume: gone})
	b.ok(&cmdVolumeFreed{gone, 1})
	b.ok(&cmdChange{replication.Change{Volume: id, Expect: 1, Owner: 1, InSync: []replication.NodeID{1}, By: 1}})
	b.ok(&cmdRemoveNode{2})
	if v := b.m.state.Volume(id); len(v.Record.Replicas) != 1 {
		t.Errorf("%+v", v.Record)
	}
	if b.m.state.Volume(gone) != nil {
		t.Error("deleted volume waits for a removed node")
	}
	if r := b.do(&cmdRemoveNode{1}); r.Code != codeRefused {
		t.Errorf("the last data node: %+v", r)
	}
	// A newcomer gets a new id and the second replica.
	b.ok(&cmdCreateToken{token{Hash: [32]byte{4}, Role: RoleData, Expires: day.Add(time.Hour)}})
	r := b.ok(&cmdJoin{Token: [32]byte{4}, Name: "b", Role: RoleData, Addresses: Addresses{Sync: "10.0.0.2:7"}, KeyPrint: [32]byte{2}})
	if v := b.m.state.Volume(id); r.ID != 4 || len(v.Record.Replicas) != 2 || v.Record.Replicas[1].Node != 4 || v.Record.Epoch != 2 {
		t.Errorf("node %d, %+v", r.ID, v.Record)
	}
}

func TestRepeatedCommand(t *testing.T) {
	b := newBench(t)
	env := envelope{Request: [16]byte{0xff}, Now: day, By: 1}
	ch := &cmdChange{replication.Change{Volume: 1, Expect: 1, Owner: 1, InSync: []replication.NodeID{1}, By: 1}}
	refused := b.exactly(env, ch)
	if refused.Code != codeConflict {
		t.Fatalf("%+v", refused)
	}
	b.ok(volumeCommand("vm1"))
	// The copy of a refused change must not take effect, although it could now (M7).
	if r := b.exactly(env, ch); r.Code != codeConflict || b.m.state.Volumes[0].Record.Epoch != 1 {
		t.Errorf("%+v", r)
	}
	env.Request[0] = 0xfe
	first := b.exactly(env, ch)
	if first.Code != codeOK || first.Record.Epoch != 2 {
		t.Fatalf("%+v", first)
	}
	again := b.exactly(env, ch)
	if again.Code != codeOK || again.ID != first.ID || again.Index != first.Index || again.Record.Epoch != 2 {
		t.Errorf("%+v after %+v", again, first)
	}
	// It is remembered across a snapshot, and for as long as it should be.
	b.m = newMachine(must(unmarshalState(must(b.m.state.marshal())(t)))(t))
	for range keepRequests - 1 {
		b.ok(&cmdAddEvent{Info, "test", "x"})
	}
	if r := b.exactly(env, ch); r.Index != first.Index {
		t.Errorf("forgotten: %+v", r)
	}
}

// randomCommand makes a command that is often valid in s.
func randomCommand(r *rand.Rand, s *State) command {
	node := func() replication.NodeID { return replication.NodeID(r.IntN(int(s.nextNode) + 1)) }
	vol := func() lsfs.VolumeID {
		if len(s.Volumes) == 0 || r.IntN(8) == 0 {
			return lsfs.VolumeID(r.IntN(5))
		}
		return s.Volumes[r.IntN(len(s.Volumes))].ID
	}
	name := func() string { return fmt.Sprintf("n%d", r.IntN(12)) }
	host := func() string {
		if len(s.Hosts) == 0 || r.IntN(4) == 0 {
			return name()
		}
		return s.Hosts[r.IntN(len(s.Hosts))].Name
	}
	if r.IntN(3) == 0 {
		return randomSnapshotCommand(r, s)
	}
	switch r.IntN(28) {
	case 0:
		return &cmdCreateToken{token{Hash: [32]byte{byte(r.IntN(9)), 1}, Role: Role(1 + r.IntN(2)), Expires: day.Add(time.Duration(r.IntN(10000)) * time.Second)}}
	case 1:
		return &cmdJoin{Token: [32]byte{byte(r.IntN(9)), 1}, Name: name(), Role: Role(1 + r.IntN(2)), Addresses: Addresses{Sync: fmt.Sprintf("10.0.1.%d:7", r.IntN(20))}, KeyPrint: [32]byte{byte(r.IntN(30)), 1}}
	case 2:
		return &cmdStart{Node: node(), Addresses: Addresses{Sync: fmt.Sprintf("10.0.2.%d:7", r.IntN(20))}, Version: "v"}
	case 3:
		return &cmdRemoveNode{node()}
	case 4, 5:
		x := volumeCommand(name())
		binary.BigEndian.PutUint64(x.UUID[:], r.Uint64())
		binary.BigEndian.PutUint64(x.NAA[:], r.Uint64())
		x.AnyHost = r.IntN(2) == 0
		return x
	case 6:
		return &cmdDeleteVolume{Volume: vol()}
	case 7:
		return &cmdVolumeFreed{vol(), node()}
	case 8:
		return &cmdResizeVolume{vol(), uint64(r.IntN(1000)) * 4096}
	case 9:
		return &cmdAddHost{Host{Name: name(), Initiators: []string{"iqn." + name()}}}
	case 10:
		return &cmdRemoveHost{name()}
	case 11:
		return &cmdVolumeHosts{vol(), []string{host(), host()}, r.IntN(2) == 0}
	case 12:
		return &cmdAddEvent{Info, "test", name()}
	case 13, 14:
		return &cmdMapVolume{vol(), []string{host()}, mapping(r.IntN(3))}
	case 15:
		return &cmdDrainNode{node(), r.IntN(4) == 0}
	case 16:
		d := Discovery{Mode: DiscoveryMode(r.IntN(3))}
		if d.Mode == DiscoveryCHAP {
			d.User, d.Secret = name(), Sealed("s")
		}
		return &cmdDiscovery{d}
	case 20, 21:
		x := &cmdAddReplica{Volume: vol(), Node: node(), ID: replication.ReplicaID{byte(r.Uint32()), byte(r.Uint32()), 1}}
		if v := s.Volume(x.Volume); v != nil {
			x.Expect = v.Record.Epoch - lsfs.Epoch(r.IntN(4)/3)
			if r.IntN(2) == 0 && len(v.Record.Replicas) > 0 {
				x.Replaces = v.Record.Replicas[r.IntN(len(v.Record.Replicas))].Node
			}
		}
		return x
	case 22:
		x := &cmdRemoveReplica{Volume: vol(), Node: node()}
		if v := s.Volume(x.Volume); v != nil {
			x.Expect = v.Record.Epoch - lsfs.Epoch(r.IntN(4)/3)
		}
		return x
	case 23:
		return &cmdCancelOperation{uint64(r.IntN(int(s.nextOperation) + 2))}
	case 24:
		return &cmdNodeMode{node(), NodeMode(r.IntN(4)), r.IntN(4) == 0, node() * replication.NodeID(r.IntN(2))}
	case 25:
		return &cmdSettings{r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0, Settings{r.IntN(2) == 0, uint32(r.IntN(100)), QuorumMode(r.IntN(5)), node() * replication.NodeID(r.IntN(2)), r.Uint32N(30)}}
	case 26:
		return &cmdPrefer{vol(), node()}
	case 27:
		x := &cmdPromote{Volume: vol(), Node: node(), Lineage: uuid.UUID{byte(r.Uint32()), byte(r.Uint32()), 1}, Why: name()}
		if v := s.Volume(x.Volume); v != nil {
			x.Expect = v.Record.Epoch
			for _, p := range v.Record.Replicas {
				x.Others = append(x.Others, replication.Replica{Node: p.Node, ID: replication.ReplicaID{byte(r.Uint32()), byte(r.Uint32()), 2}})
			}
		}
		return x
	}
	x := &cmdChange{replication.Change{Volume: vol(), Expect: 1, Owner: node(), By: node(), Reason: name()}}
	if v := s.Volume(x.Volume); v != nil {
		x.Expect = v.Record.Epoch - lsfs.Epoch(r.IntN(4)/3)
		x.InSync = slices.Clone(v.Record.InSync)
		x.Owner, x.By = v.Record.Owner, v.Record.Owner
		switch r.IntN(4) {
		case 0:
			x.InSync = []replication.NodeID{x.Owner}
		case 1:
			x.Owner = node()
		case 2:
			if len(v.Record.Replicas) > 0 {
				p := v.Record.Replicas[r.IntN(len(v.Record.Replicas))]
				x.Grow, x.GrowReplica = p.Node, p.ID
				x.InSync = append(x.InSync, p.Node)
				if n := s.Node(p.Node); n != nil {
					x.GrowIncarnation = n.Incarnation
				}
			}
		}
	}
	return x
}

var seedFlag = flag.Uint64("cluster.seed", 0, "seed of TestDeterminism; 0 takes one from the clock")

func TestDeterminism(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("again: go test ./server/cluster -run TestDeterminism -cluster.seed %d", seed)
	src := rand.New(rand.NewPCG(seed, 1))
	b := newBench(t)
	twin := newMachine(must(unmarshalState(must(b.m.state.marshal())(t)))(t))
	type kept struct {
		s *State
		h [32]byte
	}
	var old []kept
	decided := map[kind]int{}
	for i := range 6000 {
		x := randomCommand(src, b.m.state)
		env := envelope{Now: day.Add(time.Duration(i) * time.Second), By: replication.NodeID(1 + i%3)}
		binary.BigEndian.PutUint64(env.Request[:], uint64(src.IntN(1<<20))+1<<32)
		data, err := encodeCommand(env, x)
		if err != nil {
			t.Fatal(err)
		}
		b.n++
		r1, err1 := b.m.apply(b.n, data)
		r2, err2 := twin.apply(b.n, data)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if fmt.Sprint(r1) != fmt.Sprint(r2) {
			t.Fatalf("command %d: %+v and %+v", i, r1, r2)
		}
		if r1.Code == codeOK {
			decided[x.kind()]++
		}
		if i%50 == 0 {
			checkState(t, b.m.state)
			h := b.m.state.Hash()
			if h != twin.state.Hash() {
				t.Fatalf("states differ after command %d", i)
			}
			old = append(old, kept{b.m.state, h})
		}
		if i%1000 == 500 {
			// The twin goes on from a snapshot.
			twin = newMachine(must(unmarshalState(must(twin.state.marshal())(t)))(t))
		}
	}
	for i, k := range old {
		if k.s.Hash() != k.h {
			t.Fatalf("state %d changed after it was published", i)
		}
	}
	for k := kindJoin; k <= kindDiscovery; k++ {
		if decided[k] == 0 {
			t.Errorf("no command of kind %d took effect: the test is too weak", k)
		}
	}
}

func TestSnapshotRefused(t *testing.T) {
	b := newBench(t)
	good := must(b.m.state.marshal())(t)
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 0x40
		if _, err := unmarshalState(bad); err == nil {
			t.Fatalf("snapshot with a wrong byte %d is taken", i)
		}
	}
	for _, n := range []int{0, 7, 8, len(good) - 1} {
		if _, err := unmarshalState(good[:n]); err == nil {
			t.Errorf("snapshot of %d bytes is taken", n)
		}
	}
}

func TestUnknownCommandStops(t *testing.T) {
	var fatal []error
	f := newFSM(func(err error) { fatal = append(fatal, err) })
	apply := func(i uint64, data []byte) applied {
		return f.ApplyBatch([]*raft.Log{{Index: i, Type: raft.LogCommand, Data: data}})[0].(applied)
	}
	data := must(encodeCommand(envelope{Now: day, Request: [16]byte{1}}, initCommand()))(t)
	if a := apply(1, data); a.err != nil || a.result.Code != codeOK {
		t.Fatalf("%+v", a)
	}
	hash := f.state.Load().Hash()
	next := must(encodeCommand(envelope{Now: day, Request: [16]byte{2}}, volumeCommand("vm1")))(t)
	for _, bad := range [][]byte{{}, {2, byte(kindAddEvent)}, {1, 200}, next[:len(next)-1], append(slices.Clone(next), 0)} {
		f.stopped, fatal = nil, nil
		if a := apply(2, bad); a.err == nil || len(fatal) != 1 {
			t.Errorf("command % x: %+v, fatal %v", bad[:min(len(bad), 4)], a, fatal)
		}
		if a := apply(3, next); a.err == nil || f.state.Load().Hash() != hash {
			t.Error("a stopped state machine goes on")
		}
		if _, err := f.Snapshot(); err == nil {
			t.Error("a stopped state machine makes snapshots")
		}
	}
}

func TestEventsAfter(t *testing.T) {
	b := newBench(t)
	for i := range 3 * keepEvents {
		b.do(&cmdAddEvent{Info, "test", fmt.Sprint(i)})
	}
	s := b.m.state
	last := s.Events[len(s.Events)-1].Number
	for _, n := range []uint64{0, s.Events[0].Number - 1, s.Events[0].Number, last - 1, last, last + 5} {
		got := s.EventsAfter(n)
		want := slices.DeleteFunc(slices.Clone(s.Events), func(e Event) bool { return e.Number <= n })
		if !slices.Equal(got, want) {
			t.Errorf("after %d: %d events, want %d", n, len(got), len(want))
		}
	}
	if len(new(State).EventsAfter(0)) != 0 {
		t.Error("events of an empty state")
	}
}

func FuzzCommand(f *testing.F) {
	b := newBench(f)
	b.ok(volumeCommand("vm1"))
	b.ok(&cmdAddHost{Host{Name: "esx", Initiators: []string{"iqn.esx"}}})
	src := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		data, err := encodeCommand(envelope{Now: day, By: 1, Request: [16]byte{9}}, randomCommand(src, b.m.state))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add(must(encodeCommand(envelope{}, initCommand()))(f))
	base := b.m.state
	hash := base.Hash()
	f.Fuzz(func(t *testing.T, data []byte) {
		m := newMachine(base)
		_, err := m.apply(base.Index+1, data)
		if env, x, derr := decodeCommand(data); derr == nil {
			again, err := encodeCommand(env, x)
			if err != nil || !bytes.Equal(again, data) {
				t.Fatalf("encoding is not canonical: %v", err)
			}
		} else if err == nil || m.state != base {
			t.Fatal("a malformed command was applied")
		}
		checkState(t, m.state)
		if base.Hash() != hash {
			t.Fatal("an old state was modified")
		}
	})
}

func FuzzState(f *testing.F) {
	b := newBench(f)
	b.ok(volumeCommand("vm1"))
	b.ok(&cmdAddHost{Host{Name: "esx", Initiators: []string{"iqn.esx"}, User: "u", Secret: Sealed("s")}})
	f.Add(must(encode(b.m.state))(f))
	f.Add(must(encode(new(State)))(f))
	old := must(os.ReadFile("testdata/state-v1.bin"))(f)
	f.Add(old[len(snapshotMagic)+1 : len(old)-sha256.Size])
	f.Fuzz(func(t *testing.T, data []byte) {
		s := new(State)
		if decodeVersion(data, 1, s) == nil {
			checkRewritten(t, s)
		}
		s = new(State)
		if decode(data, s) != nil {
			return
		}
		again, err := encode(s)
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("encoding is not canonical: %v", err)
		}
		// Whatever state it is, no command makes it panic.
		m := newMachine(s)
		for i, x := range []command{volumeCommand("vm9"), joinCommand(2), &cmdDrainNode{1, true}, &cmdMapVolume{1, []string{"esx"}, mapReadOnly}, &cmdRemoveHost{"esx"}, &cmdRemoveNode{1}, &cmdDeleteVolume{Volume: 1}, &cmdChange{replication.Change{Volume: 1, Expect: 1, Owner: 1, InSync: []replication.NodeID{1}}}} {
			if _, err := m.apply(uint64(i), must(encodeCommand(envelope{Request: [16]byte{byte(i), 77}}, x))(t)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// checkRewritten checks that a state of an older version goes on as one of this version.
func checkRewritten(t *testing.T, s *State) {
	t.Helper()
	again := new(State)
	if err := decode(must(encode(s))(t), again); err != nil || again.Hash() != s.Hash() {
		t.Fatalf("a state of version 1 cannot be written anew: %v", err)
	}
}

func TestNames(t *testing.T) {
	for _, s := range []string{"a", "vm-1", strings.Repeat("x", 63)} {
		if !validName(s) {
			t.Errorf("%q refused", s)
		}
	}
	for _, s := range []string{"", "-a", "a-", "A", "a.b", "a b", "ä", strings.Repeat("x", 64)} {
		if validName(s) {
			t.Errorf("%q taken", s)
		}
	}
}
