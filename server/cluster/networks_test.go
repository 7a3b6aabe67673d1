package cluster

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/replication"
)

// twoNetworks is a lab whose data nodes have management addresses of their own; the
// witness has one address.
func twoNetworks(t *testing.T) (l *lab, a, b, w *member) {
	l = &lab{t: t, members: make(map[string]*member)}
	dir := filepath.Join(t.TempDir(), "a")
	addrs := Addresses{Sync: freeAddr(t), Management: freeAddr(t)}
	l.init = must(Bootstrap(testContext(t), dir, InitConfig{Name: "lab", NodeName: "a", Addresses: addrs}))(t)
	a = l.open("a", Config{Dir: dir})
	t.Cleanup(func() {
		for _, m := range l.members {
			if m.Cluster != nil {
				if err := m.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	})
	l.ready(a)
	join := func(name string, role Role, token string, addrs Addresses) *member {
		cfg := Config{Dir: filepath.Join(t.TempDir(), name)}
		if err := JoinCluster(testContext(t), cfg.Dir, JoinConfig{Addr: a.addr.Control(), Token: token, NodeName: name, Role: role, Addresses: addrs}); err != nil {
			t.Fatal(err)
		}
		return l.open(name, cfg)
	}
	b = join("b", RoleData, l.init.DataToken, Addresses{Sync: freeAddr(t), Management: freeAddr(t)})
	w = join("w", RoleWitness, l.init.WitnessToken, Addresses{Sync: freeAddr(t)})
	l.ready(b, w)
	for _, m := range []*member{a, b, w} {
		eventually(t, "three voters known at "+m.id.Name, func() bool { return len(m.Voters()) == 3 })
	}
	return l, a, b, w
}

// unplug ends what a member's management address takes, as far as a process can do
// that to itself: nobody listens there, and what is open ends.
func unplug(m *member) {
	m.lis.lns[1].Close()
	m.lis.mu.Lock()
	defer m.lis.mu.Unlock()
	for conn := range m.lis.conns {
		conn.Close()
	}
}

func TestManagementDetour(t *testing.T) {
	l, a, b, w := twoNetworks(t)
	ctx := testContext(t)
	for _, m := range []*member{a, b} {
		for _, n := range []replication.NodeID{1, 2} {
			if x := a.raftAddressOf(n); x != a.State().Node(n).Management {
				t.Errorf("raft reaches node %d at %s", n, x)
			}
		}
		// A slow start of the other one is a detour, for a moment.
		eventually(t, "no detours of "+m.id.Name, func() bool { return len(m.Detours()) == 0 })
	}
	unplug(b)
	// Whoever leads has to reach b, and b's commands have to get through.
	for _, m := range []*member{a, w} {
		if _, err := m.Ping(ctx, 2); err != nil {
			t.Errorf("from %s: %v", m.id.Name, err)
		}
	}
	if d := a.Detours(); !slices.Equal(d, []replication.NodeID{2}) {
		t.Errorf("detours %v", d)
	}
	v := must(b.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 20}))(t)
	eventually(t, "the volume at all members", func() bool {
		return a.State().Volume(v.ID) != nil && b.State().Volume(v.ID) != nil && w.State().Volume(v.ID) != nil
	})
	// Back at its address, it is reached there again.
	l.crash("b")
	b = l.restart("b")
	l.ready(b)
	eventually(t, "no detours", func() bool { return len(a.Detours()) == 0 && len(w.Detours()) == 0 })
	l.agree()
}

// Data connections live on the sync address and nowhere else: the lease dies with it.
func TestDataStaysOnSync(t *testing.T) {
	l, a, b, _ := twoNetworks(t)
	if got := a.route(2, "", protoData); !slices.Equal(got, []string{b.addr.Sync}) {
		t.Errorf("data goes to %v", got)
	}
	if got := a.route(2, "", protoRaft); !slices.Equal(got, []string{b.addr.Management, b.addr.Sync}) {
		t.Errorf("raft goes to %v", got)
	}
	if got := a.route(9, "x:1", protoRPC); !slices.Equal(got, []string{"x:1"}) {
		t.Errorf("an unknown node is looked for at %v", got)
	}
	taken := make(chan string, 1)
	l.crash("b")
	b.cfg.OnData = func(_ replication.NodeID, conn net.Conn) {
		taken <- conn.LocalAddr().String()
		conn.Close()
	}
	b = l.restart("b")
	l.ready(b)
	ctx := testContext(t)
	for _, address := range []string{b.addr.Management, b.addr.Sync} {
		conn, err := a.dialAt(ctx, 2, address, protoData)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%d bytes, %v", n, err)
		}
		conn.Close()
	}
	if got := <-taken; got != b.addr.Sync {
		t.Errorf("data was taken at %s", got)
	}
}

// All nodes get management addresses at once, by a restart: nobody knows of those of
// the others before there is a quorum.
func TestManagementForAllAtOnce(t *testing.T) {
	l, a, b, w := full(t)
	configs := map[string]Config{}
	for _, m := range []*member{a, b, w} {
		cfg := m.cfg
		cfg.Addresses = m.addr
		cfg.Addresses.Management = freeAddr(t)
		configs[m.id.Name] = cfg
	}
	for name := range configs {
		l.crash(name)
	}
	for name, cfg := range configs {
		l.open(name, cfg)
	}
	a, b, w = l.members["a"], l.members["b"], l.members["w"]
	l.ready(a, b, w)
	eventually(t, "raft at the management addresses", func() bool {
		for _, n := range a.State().Nodes {
			if n.Management == "" || a.raftAddressOf(n.ID) != n.Management {
				return false
			}
		}
		return true
	})
	if !a.creds.Load().names(a.addr) {
		t.Error("the certificate names other addresses")
	}
	l.agree()
}

func TestAddressesTaken(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		addrs Addresses
		taken string
	}{
		{Addresses{Sync: "10.0.0.1:7", Management: "10.1.0.2:7"}, "10.0.0.1:7"},
		{Addresses{Sync: "10.0.0.2:7", Management: "10.0.0.1:7"}, "10.0.0.1:7"},
		{Addresses{Sync: "10.0.0.2:7", Management: "10.1.0.2:7"}, ""},
	} {
		r := b.do(&cmdStart{Node: 2, Addresses: test.addrs, Version: "v"})
		if (r.Code == codeOK) != (test.taken == "") || !strings.Contains(r.Text, test.taken) {
			t.Errorf("%+v: %+v", test.addrs, r)
		}
	}
	n := b.m.state.Node(2)
	if n.Control() != "10.1.0.2:7" {
		t.Errorf("%+v", n)
	}
	// It is found in the state as it is written, and a later start may drop it.
	if again := must(unmarshalState(must(b.m.state.marshal())(t)))(t); again.Node(2).Management != n.Management || again.Hash() != b.m.state.Hash() {
		t.Errorf("%+v", again.Node(2))
	}
	if r := b.do(&cmdStart{Node: 3, Addresses: Addresses{Sync: "10.0.0.3:7", Management: "10.1.0.2:7"}}); r.Code != codeExists {
		t.Errorf("%+v", r)
	}
	if r := b.do(&cmdStart{Node: 2, Addresses: Addresses{Sync: "10.0.0.2:7", Management: "0.0.0.0:7"}}); r.Code != codeInvalid || !strings.Contains(r.Text, "management address") {
		t.Errorf("%+v", r)
	}
	b.ok(&cmdStart{Node: 2, Addresses: Addresses{Sync: "10.0.0.2:7"}})
	if n := b.m.state.Node(2); n.Control() != "10.0.0.2:7" {
		t.Errorf("%+v", n)
	}
}

// A join says as little as it can, so that an older cluster understands it.
func TestJoinVersions(t *testing.T) {
	for _, management := range []string{"", "10.1.0.2:7400"} {
		want := joinRequest{Secret: [16]byte{1}, Name: "b", Role: RoleData, Addresses: Addresses{Sync: "10.0.0.2:7400", Portals: []string{"10.2.0.2:3260"}, Management: management}, CSR: []byte("csr")}
		b := must(encodeJoin(&want))(t)
		var got joinRequest
		if err := decodeJoin(b, &got); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%+v, %v", got, err)
		}
		var old joinRequest
		if err := decodeVersion(b, joinVersion, &old); (err == nil) != (management == "") {
			t.Errorf("management %q as of before: %v", management, err)
		}
	}
	if err := decodeJoin(must(encode(&joinRequest{Name: "b"}))(t), new(joinRequest)); err == nil {
		t.Error("two encodings of one request")
	}
}
