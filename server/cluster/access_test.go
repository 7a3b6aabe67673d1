package cluster

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// A volume with another block profile keeps it, and what hosts cannot use is refused.
func TestVolumeProfile(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		block, physical uint32
		code            code
	}{
		{512, 512, codeOK}, {512, 4096, codeOK}, {4096, 4096, codeOK},
		{4096, 512, codeInvalid}, {512, 1024, codeInvalid}, {1024, 4096, codeInvalid}, {512, 0, codeInvalid}, {512, 8192, codeInvalid},
	} {
		x := volumeCommand("v" + string('a'+rune(b.n)))
		x.BlockBytes, x.PhysicalBytes, x.Thin = test.block, test.physical, false
		r := b.do(x)
		if r.Code != test.code {
			t.Errorf("%d in %d: %+v", test.block, test.physical, r)
		}
		if r.Code != codeOK {
			continue
		}
		if v := b.m.state.Volume(lsfs.VolumeID(r.ID)); v.PhysicalBytes != test.physical || v.BlockBytes != test.block || v.Thin {
			t.Errorf("volume %+v", v)
		}
	}
}

func TestMapVolume(t *testing.T) {
	b := newBench(t)
	b.ok(volumeCommand("vm1"))
	for _, h := range []string{"h1", "h2", "h3"} {
		b.ok(&cmdAddHost{Host{Name: h, Initiators: []string{"iqn." + h}}})
	}
	check := func(hosts, readOnly string) {
		t.Helper()
		v := b.m.state.Volumes[0]
		if strings.Join(v.Hosts, " ") != hosts || strings.Join(v.ReadOnly, " ") != readOnly {
			t.Errorf("hosts %v, read-only %v; want %s and %s", v.Hosts, v.ReadOnly, hosts, readOnly)
		}
	}
	b.ok(&cmdMapVolume{1, []string{"h2"}, mapReadOnly})
	check("h2", "h2")
	b.ok(&cmdMapVolume{1, []string{"h3", "h1", "h1"}, mapReadWrite})
	check("h1 h2 h3", "h2")
	events := len(b.m.state.Events)
	b.ok(&cmdMapVolume{1, []string{"h1"}, mapReadWrite})
	if len(b.m.state.Events) != events {
		t.Error("a mapping that changes nothing is reported")
	}
	b.ok(&cmdMapVolume{1, []string{"h2"}, mapReadWrite})
	check("h1 h2 h3", "")
	b.ok(&cmdMapVolume{1, []string{"h3", "h2"}, mapReadOnly})
	check("h1 h2 h3", "h2 h3")
	// To be named again gives nobody the right to write.
	b.ok(&cmdVolumeHosts{1, []string{"h2", "h1"}, false})
	check("h1 h2", "h2")
	b.ok(&cmdMapVolume{1, []string{"h1"}, mapNone})
	check("h2", "h2")
	if e := b.m.state.Events[len(b.m.state.Events)-1]; e.Code != "volume-hosts" || e.Text != "volume vm1 is seen by h2 (read-only)" {
		t.Errorf("event %+v", e)
	}
	for what, x := range map[string]*cmdMapVolume{
		"no host": {1, nil, mapReadOnly}, "no such mode": {1, []string{"h1"}, 3},
	} {
		if r := b.do(x); r.Code != codeInvalid {
			t.Errorf("%s: %+v", what, r)
		}
	}
	for what, x := range map[string]*cmdMapVolume{
		"no such host": {1, []string{"h9"}, mapReadOnly}, "no such volume": {7, []string{"h1"}, mapReadOnly},
	} {
		if r := b.do(x); r.Code != codeNotFound {
			t.Errorf("%s: %+v", what, r)
		}
	}
	check("h2", "h2")
	b.ok(&cmdRemoveHost{"h2"})
	check("", "")
}

// A node is drained only while every volume has somewhere to go.
func TestDrainNode(t *testing.T) {
	b := newBench(t)
	b.ok(volumeCommand("vm1")) // owned by node 1, which alone is in sync yet
	refused := func(node replication.NodeID, why string) {
		t.Helper()
		if r := b.do(&cmdDrainNode{node, true}); r.Code != codeRefused || !strings.Contains(r.Text, why) {
			t.Errorf("drain node %d: %+v", node, r)
		}
	}
	refused(1, "volume vm1 would have nowhere to go: the copy on b is not in sync")
	b.ok(&cmdDrainNode{2, true}) // nothing depends on it
	if n := b.m.state.Node(2); !n.Draining {
		t.Errorf("node %+v", n)
	}
	refused(1, "no other data node would be left")
	b.ok(&cmdDrainNode{2, true})
	b.ok(&cmdDrainNode{2, false})

	rec := b.m.state.Volumes[0].Record
	b.ok(&cmdChange{replication.Change{Volume: 1, Expect: 1, Owner: 1, InSync: []replication.NodeID{1, 2}, Grow: 2, GrowReplica: rec.Replicas[1].ID, GrowIncarnation: b.m.state.Node(2).Incarnation, By: 1}})
	b.ok(&cmdDrainNode{1, true})
	if e := b.m.state.Events[len(b.m.state.Events)-1]; e.Code != "node-draining" || e.Severity != Warning {
		t.Errorf("event %+v", e)
	}
	// What is made now is owned by the node that stays.
	b.ok(volumeCommand("vm2"))
	if r := b.m.state.Volumes[1].Record; r.Owner != 2 {
		t.Errorf("vm2 %+v", r)
	}
	// A restart does not end it; resume does.
	b.ok(&cmdStart{Node: 1, Addresses: b.m.state.Node(1).Addresses, Version: "v"})
	if !b.m.state.Node(1).Draining {
		t.Error("a restart ended the drain")
	}
	b.ok(&cmdDrainNode{1, false})
	if b.m.state.Node(1).Draining {
		t.Error("still drained")
	}
	if r := b.do(&cmdDrainNode{3, true}); r.Code != codeInvalid {
		t.Errorf("a witness: %+v", r)
	}
	if r := b.do(&cmdDrainNode{9, true}); r.Code != codeNotFound {
		t.Errorf("no such node: %+v", r)
	}
}

func TestDiscoveryPolicy(t *testing.T) {
	b := newBench(t)
	for _, bad := range []Discovery{
		{Mode: 3}, {Mode: DiscoveryCHAP}, {Mode: DiscoveryCHAP, User: "u"}, {Mode: DiscoveryOpen, User: "u", Secret: Sealed("s")},
		{Mode: DiscoveryCHAP, User: "u", Secret: Sealed("s"), MutualUser: "m"}, {Mode: DiscoveryAsHost, MutualSecret: Sealed("s")},
	} {
		if r := b.do(&cmdDiscovery{bad}); r.Code != codeInvalid {
			t.Errorf("%+v: %+v", bad, r)
		}
	}
	want := Discovery{Mode: DiscoveryCHAP, User: "u", Secret: Sealed("s"), MutualUser: "m", MutualSecret: Sealed("t")}
	b.ok(&cmdDiscovery{want})
	again := must(unmarshalState(must(b.m.state.marshal())(t)))(t)
	if !reflect.DeepEqual(again.Discovery, want) {
		t.Errorf("discovery %+v", again.Discovery)
	}
	b.ok(&cmdDiscovery{Discovery{Mode: DiscoveryOpen}})
	if d := b.m.state.Discovery; d.Mode != DiscoveryOpen || d.User != "" {
		t.Errorf("discovery %+v", d)
	}
}

// What older versions wrote is read for ever: the files in testdata were written
// by them.
func TestReadsVersion1(t *testing.T) {
	s := readsOld(t, 1)
	v := s.VolumeNamed("vm1")
	if v == nil || v.PhysicalBytes != 4096 || v.ReadOnly != nil || !slices.Equal(v.Hosts, []string{"h1"}) || v.Record.SizeBytes != 2<<20 || s.Node(1).Draining || s.Discovery.Mode != DiscoveryAsHost {
		t.Errorf("volume %+v, discovery %+v", v, s.Discovery)
	}
}

func TestReadsVersion2(t *testing.T) {
	s := readsOld(t, 2)
	v := s.VolumeNamed("vm1")
	if v == nil || v.PhysicalBytes != 512 || !slices.Equal(v.ReadOnly, []string{"h2"}) || v.Record.Owner != 2 || !s.Node(1).Draining || s.Node(1).Mode != ModeServing ||
		s.Discovery.User != "d" || s.Settings != (Settings{}) || len(s.Operations) != 0 || v.Preferred != 0 || len(v.Left) != 0 {
		t.Errorf("volume %+v, node %+v, discovery %+v", v, s.Node(1), s.Discovery)
	}
}

func TestReadsVersion4(t *testing.T) {
	s := readsOld(t, 4)
	v := s.VolumeNamed("vm1")
	if v == nil || len(v.Record.Replicas) != 3 || v.Preferred != 2 || s.Settings.ResyncRate != 200 || s.Settings.Quorum != QuorumMajority || len(s.Operations) != 1 || s.Schedule(1) == nil ||
		s.SnapshotNamed(1, "s1").State != SnapshotReady || s.VolumeNamed("vm2").Lineage != (uuid.UUID{7}) || s.Node(2).Management != "" || s.Node(2).Control() != s.Node(2).Sync {
		t.Errorf("volume %+v, settings %+v, node %+v", v, s.Settings, s.Node(2))
	}
}

func readsOld(t *testing.T, version int) *State {
	t.Helper()
	snapshot := must(os.ReadFile(fmt.Sprintf("testdata/state-v%d.bin", version)))(t)
	log := must(os.ReadFile(fmt.Sprintf("testdata/commands-v%d.bin", version)))(t)
	s := must(unmarshalState(snapshot))(t)
	m := newMachine(new(State))
	for index := uint64(1); len(log) > 0; index++ {
		n := binary.BigEndian.Uint32(log)
		data := log[4 : 4+n]
		log = log[4+n:]
		if r, err := m.apply(index, data); err != nil || r.Code != codeOK {
			t.Fatalf("command %d: %+v, %v", index, r, err)
		}
		// A node that was not upgraded yet reads it too: it is written the same way.
		env, x := decoded(t, data)
		if again := must(encodeCommand(env, x))(t); !bytes.Equal(again, data) {
			t.Errorf("command %d (%T) is written in another way now", index, x)
		}
	}
	if s.Hash() != m.state.Hash() {
		t.Errorf("the snapshot and the log of version %d differ:\n%+v\n%+v", version, s, m.state)
	}
	checkState(t, s)
	b := must(s.marshal())(t)
	if again := must(unmarshalState(b))(t); again.Hash() != s.Hash() {
		t.Error("written anew it is another state")
	}
	// What is written must be read by the oldest version of the cluster's level.
	if b[len(snapshotMagic)] != byte(max(version, 2)) || version >= 2 && !bytes.Equal(b, snapshot) {
		t.Errorf("written anew in version %d, or otherwise than it was", b[len(snapshotMagic)])
	}
	return s
}

func decoded(t *testing.T, data []byte) (envelope, command) {
	t.Helper()
	env, x, err := decodeCommand(data)
	if err != nil {
		t.Fatal(err)
	}
	return env, x
}

// A command has one encoding: the oldest that can say it.
func TestCommandVersions(t *testing.T) {
	special := volumeCommand("vm1")
	special.PhysicalBytes = 512
	for _, test := range []struct {
		x       command
		version byte
	}{
		{volumeCommand("vm1"), 1}, {special, 2}, {&cmdAddEvent{Info, "x", "y"}, 1}, {&cmdStart{Node: 1, Addresses: Addresses{Sync: "s"}}, 1}, {&cmdStart{Node: 1, Addresses: Addresses{Sync: "s", Management: "m"}}, 5}, {&cmdJoin{Name: "n", Addresses: Addresses{Management: "m"}}, 5}, {&cmdMapVolume{1, []string{"h"}, mapReadOnly}, 2}, {&cmdDrainNode{1, true}, 2}, {&cmdDiscovery{}, 2},
		{&cmdAddReplica{Volume: 1, Expect: 2, Node: 3, ID: replication.ReplicaID{4}, Replaces: 5}, 3}, {&cmdRemoveReplica{1, 2, 3}, 3}, {&cmdCancelOperation{7}, 3},
		{&cmdNodeMode{1, ModeEvacuating, true, 2}, 3}, {&cmdSettings{Balance: true, Quorum: true, Settings: Settings{true, 60, QuorumPreferred, 2, 0}}, 3}, {&cmdSettings{Resync: true, Settings: Settings{ResyncRate: 200}}, 4}, {&cmdPrefer{1, 2}, 3},
		{&cmdPromote{1, 2, 3, uuid.UUID{1}, []replication.Replica{{Node: 2, ID: replication.ReplicaID{9}}}, "why"}, 3}, {&cmdRaiseLevel{2, []asked{{1, 5}}}, 3},
	} {
		data := must(encodeCommand(envelope{Now: day}, test.x))(t)
		if data[0] != test.version {
			t.Errorf("%T has version %d", test.x, data[0])
		}
		if _, x := decoded(t, data); !reflect.DeepEqual(x, test.x) {
			t.Errorf("%+v became %+v", test.x, x)
		}
		data[0] = 1 + data[0]%5
		if _, _, err := decodeCommand(data); !errors.Is(err, errEncoding) {
			t.Errorf("%T in version %d: %v", test.x, data[0], err)
		}
	}
}
