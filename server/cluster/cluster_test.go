package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testLog writes to the test's log until the test is over.
type testLog struct {
	mu   sync.Mutex
	t    testing.TB
	done bool
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.done {
		l.t.Logf("%s", strings.TrimSuffix(string(p), "\n"))
	}
	return len(p), nil
}

func testLogger(t testing.TB, node string) *slog.Logger {
	l := &testLog{t: t}
	t.Cleanup(func() { l.mu.Lock(); l.done = true; l.mu.Unlock() })
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", node)
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a condition that no channel tells of.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(15 * time.Second)
	for !cond() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never happened: %s", what)
		}
	}
}

// must returns v of a call that may not fail.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func freeAddr(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// member is a node under test: what it is opened with, and the running Cluster.
type member struct {
	*Cluster
	cfg Config
}

// lab is a cluster under test: data nodes a and b and a witness w as far as they
// have joined.
type lab struct {
	t       testing.TB
	init    *InitResult
	fault   func(name, what string) error // of the members' raft stores; see Config.storeFault
	fatal   func(name string, err error)  // nil: it fails the test
	logger  *slog.Logger                  // of the members that are opened; nil: the test's
	members map[string]*member
}

func newLab(t testing.TB) *lab {
	l := &lab{t: t, members: make(map[string]*member)}
	dir := filepath.Join(t.TempDir(), "a")
	init, err := Bootstrap(testContext(t), dir, InitConfig{
		Name: "lab", NodeName: "a",
		Addresses: Addresses{Sync: freeAddr(t), Portals: []string{"127.0.0.1:3260"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l.init = init
	l.open("a", Config{Dir: dir})
	t.Cleanup(func() {
		for _, m := range l.members {
			if m.Cluster != nil {
				if err := m.Close(); err != nil {
					t.Errorf("close %s: %v", m.id.Name, err)
				}
			}
		}
	})
	return l
}

func (l *lab) open(name string, cfg Config) *member {
	l.t.Helper()
	if cfg.Logger = l.logger; cfg.Logger == nil {
		cfg.Logger = testLogger(l.t, name)
	}
	cfg.Version = "test"
	if l.fault != nil {
		cfg.storeFault = func(what string) error { return l.fault(name, what) }
	}
	if l.fatal != nil {
		cfg.Fatal = func(err error) { l.fatal(name, err) }
	} else if cfg.Fatal == nil {
		cfg.Fatal = func(err error) { l.t.Errorf("node %s: fatal: %v", name, err) }
	}
	c, err := Open(testContext(l.t), cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	m := &member{c, cfg}
	l.members[name] = m
	return m
}

func (l *lab) join(name string, role Role, tok string) *member {
	l.t.Helper()
	cfg := Config{Dir: filepath.Join(l.t.TempDir(), name)}
	jc := JoinConfig{Addr: l.init.Identity.Addresses.Sync, Token: tok, NodeName: name, Role: role, Addresses: Addresses{Sync: freeAddr(l.t)}}
	if err := JoinCluster(testContext(l.t), cfg.Dir, jc); err != nil {
		l.t.Fatalf("join %s: %v", name, err)
	}
	return l.open(name, cfg)
}

// crash stops a node without a word to the others.
func (l *lab) crash(name string) {
	l.t.Helper()
	m := l.members[name]
	if err := m.stop(false); err != nil {
		l.t.Fatal(err)
	}
	m.Cluster = nil
}

func (l *lab) restart(name string) *member {
	l.t.Helper()
	return l.open(name, l.members[name].cfg)
}

// full returns a lab with a, b and w, all of them voters.
func full(t testing.TB) (l *lab, a, b, w *member) {
	l = newLab(t)
	a = l.members["a"]
	l.ready(a)
	b = l.join("b", RoleData, l.init.DataToken)
	w = l.join("w", RoleWitness, l.init.WitnessToken)
	l.ready(b, w)
	for _, m := range []*member{a, b, w} {
		eventually(t, "three voters known at "+m.id.Name, func() bool { return len(m.Voters()) == 3 })
	}
	return l, a, b, w
}

func (l *lab) ready(ms ...*member) {
	l.t.Helper()
	for _, m := range ms {
		if err := m.WaitReady(testContext(l.t)); err != nil {
			l.t.Fatal(err)
		}
	}
}

func (l *lab) leader() *member {
	l.t.Helper()
	var lead *member
	eventually(l.t, "a leader", func() bool {
		for _, m := range l.members {
			if m.Cluster != nil && m.Leader() == m.Self() {
				lead = m
				return true
			}
		}
		return false
	})
	return lead
}

// agree waits until all running members have applied the same index, and compares
// their states (I18).
func (l *lab) agree() {
	l.t.Helper()
	s := must(l.leader().Sync(testContext(l.t)))(l.t)
	for name, m := range l.members {
		if m.Cluster == nil {
			continue
		}
		got := must(m.fsm.wait(testContext(l.t), s.Index))(l.t)
		if got.Index == s.Index && got.Hash() != s.Hash() {
			l.t.Errorf("state of %s differs at index %d", name, s.Index)
		}
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error is %v, want %v", err, want)
	}
}

func TestSingleNode(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	ctx := testContext(t)
	l.ready(a)
	if a.Incarnation() != 1 || a.Self() != 1 || a.Leader() != 1 || !a.Quorum() {
		t.Errorf("incarnation %d self %d leader %d", a.Incarnation(), a.Self(), a.Leader())
	}
	s := a.State()
	if s.Cluster.Target != "iqn.2026-11.io.twinsan:lab" || s.Node(1).Name != "a" || s.Node(1).RelativePort() != 1 {
		t.Errorf("state %+v", s)
	}

	v := must(a.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 30, RequestID: "r1"}))(t)
	if v.Record.Owner != 1 || !slices.Equal(v.Record.InSync, []replication.NodeID{1}) || v.Record.Epoch != 1 || v.BlockBytes != 512 || v.NAA[0]>>4 != 3 {
		t.Errorf("volume %+v", v)
	}
	again := must(a.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 30, RequestID: "r1"}))(t)
	if again.ID != v.ID {
		t.Errorf("repeated request made volume %d", again.ID)
	}
	_, err := a.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 30})
	wantErr(t, err, ErrExists)
	_, err = a.ResizeVolume(ctx, v.ID, 1<<20)
	wantErr(t, err, ErrRefused)
	if g := must(a.ResizeVolume(ctx, v.ID, 2<<30))(t); g.Record.SizeBytes != 2<<30 || g.Record.Epoch != 1 {
		t.Errorf("resized %+v", g.Record)
	}

	// Hosts and their secrets: nothing in the clear reaches the disk.
	const secret, mutual = "planted-secret-1", "planted-secret-2"
	h := must(a.AddHost(ctx, HostSpec{Name: "esx", Initiators: []string{"IQN.1998-01.com.vmware:esx"}, User: "u", Secret: secret, MutualUser: "m", MutualSecret: mutual}))(t)
	gotS, gotM, err := a.Secrets(h)
	if err != nil || gotS != secret || gotM != mutual {
		t.Errorf("secrets %q %q %v", gotS, gotM, err)
	}
	if a.State().HostOf("iqn.1998-01.com.vmware:ESX") == nil {
		t.Error("initiator is not found")
	}
	_, err = a.AddHost(ctx, HostSpec{Name: "hv", Initiators: []string{"iqn.1991-05.com.microsoft:hv"}, User: "u", Secret: mutual})
	wantErr(t, err, ErrInvalid)
	_, err = a.AddHost(ctx, HostSpec{Name: "hv", Initiators: []string{"iqn.1991-05.com.microsoft:hv"}, User: "u", Secret: "short"})
	wantErr(t, err, ErrInvalid)
	if v := must(a.SetVolumeHosts(ctx, v.ID, []string{"esx"}, false))(t); !v.SeenBy("esx") || v.SeenBy("hv") {
		t.Errorf("hosts %v", v.Hosts)
	}
	if err := a.AddEvent(ctx, Error, "device-failed", "sda is gone"); err != nil {
		t.Fatal(err)
	}
	if e := a.State().EventsAfter(0); e[len(e)-1].Code != "device-failed" || e[0].Number != 1 {
		t.Errorf("events %+v", e)
	}

	// A restart keeps everything, from the log and then from a snapshot.
	before := a.State()
	l.crash("a")
	a = l.restart("a")
	l.ready(a)
	if a.Incarnation() != 2 || a.State().VolumeNamed("vm1") == nil || a.State().Host("esx") == nil {
		t.Errorf("after restart: incarnation %d", a.Incarnation())
	}
	if err := a.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	l.crash("a")
	a = l.restart("a")
	l.ready(a)
	if a.Incarnation() != 3 || a.State().VolumeNamed(before.Volumes[0].UUID.String()) == nil || a.State().Index <= before.Index {
		t.Errorf("after restart from snapshot: incarnation %d", a.Incarnation())
	}
	key := must(a.FingerprintKey())(t)
	l.crash("a")
	if err := filepath.Walk(a.cfg.Dir, func(p string, fi os.FileInfo, err error) error {
		if err != nil || fi.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		for _, planted := range []string{secret, mutual, string(key[:])} {
			if strings.Contains(string(b), planted) {
				t.Errorf("%s holds a secret in the clear", p)
			}
		}
		if m := fi.Mode().Perm(); m&0o077 != 0 && filepath.Dir(p) == a.cfg.Dir {
			t.Errorf("%s has mode %o", p, m)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	_, err = Bootstrap(ctx, a.cfg.Dir, InitConfig{Name: "x", NodeName: "a", Addresses: Addresses{Sync: freeAddr(t)}})
	wantErr(t, err, ErrExists)
}

func TestOnlyOneProcess(t *testing.T) {
	l := newLab(t)
	if c, err := Open(testContext(t), Config{Dir: l.members["a"].cfg.Dir}); err == nil {
		c.Close()
		t.Error("opened twice")
	}
}

func TestJoinRefused(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	l.ready(a)
	ctx := testContext(t)
	sync := freeAddr(t)
	join := func(tok, name string, role Role, addr string) error {
		dir := filepath.Join(t.TempDir(), name)
		err := JoinCluster(ctx, dir, JoinConfig{Addr: a.addr.Sync, Token: tok, NodeName: name, Role: role, Addresses: Addresses{Sync: addr}})
		if err != nil {
			if _, err := ReadIdentity(dir); err == nil {
				t.Error("a refused join left an identity")
			}
		}
		return err
	}

	good, err := parseToken(l.init.DataToken)
	if err != nil {
		t.Fatal(err)
	}
	otherCA, otherSecret := good, good
	otherCA.CA[0] ^= 1
	otherSecret.Secret[0] ^= 1
	wantErr(t, join("tw1-garbage", "b", RoleData, sync), ErrToken)
	wantErr(t, join(otherCA.String(), "b", RoleData, sync), ErrToken)
	wantErr(t, join(otherSecret.String(), "b", RoleData, sync), ErrToken)
	wantErr(t, join(l.init.WitnessToken, "b", RoleData, sync), ErrToken)
	wantErr(t, join(l.init.DataToken, "a", RoleData, sync), ErrExists)
	wantErr(t, join(l.init.DataToken, "b", RoleData, a.addr.Sync), ErrExists)
	wantErr(t, join(l.init.DataToken, "b", RoleData, "0.0.0.0:1"), ErrInvalid)

	// An expired token: the clock of the proposer decides.
	short, err := a.CreateToken(ctx, RoleData, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "expiry", func() bool { return time.Now().After(short.Expires) })
	wantErr(t, join(short.Text, "b", RoleData, sync), ErrToken)
	_, err = a.CreateToken(ctx, RoleData, 48*time.Hour)
	wantErr(t, err, ErrInvalid)

	// Used once; the same node may ask again with the same key.
	a.joins.mu.Lock()
	a.joins.tokens = joinBurst
	a.joins.mu.Unlock()
	dir := filepath.Join(t.TempDir(), "b")
	jc := JoinConfig{Addr: a.addr.Sync, Token: l.init.DataToken, NodeName: "b", Role: RoleData, Addresses: Addresses{Sync: sync}}
	for range 2 {
		if err := JoinCluster(ctx, dir, jc); err != nil {
			t.Fatal(err)
		}
		if id := must(ReadIdentity(dir))(t); id.Node != 2 {
			t.Errorf("node id %d", id.Node)
		}
		if err := os.Remove(filepath.Join(dir, fileIdentity)); err != nil {
			t.Fatal(err)
		}
	}
	wantErr(t, join(l.init.DataToken, "c", RoleData, freeAddr(t)), ErrToken)
	if len(a.State().Nodes) != 2 {
		t.Errorf("%d nodes", len(a.State().Nodes))
	}

	// The rate: after the burst the door stays shut for a while.
	shut := false
	for range joinBurst + 1 {
		if err := join(otherSecret.String(), "b", RoleData, sync); !errors.Is(err, ErrToken) {
			shut = true
		}
	}
	if !shut {
		t.Error("joins are not limited")
	}
}

func TestPreferredNode(t *testing.T) {
	l := newLab(t)
	a := l.members["a"]
	ctx := testContext(t)
	l.ready(a)
	v := must(a.CreateVolume(ctx, VolumeSpec{Name: "early", SizeBytes: 1 << 20}))(t)
	b := l.join("b", RoleData, l.init.DataToken)
	l.ready(b)

	// Without a witness b follows without a vote, and a survives its loss.
	if got := b.Voters(); !slices.Equal(got, []replication.NodeID{1}) {
		t.Errorf("voters %v", got)
	}
	r := must(b.Record(ctx, v.ID))(t)
	if len(r.Replicas) != 2 || len(r.InSync) != 1 || r.Epoch != 1 {
		t.Errorf("the early volume got no second replica: %+v", r)
	}
	l.crash("b")
	must(a.CreateVolume(ctx, VolumeSpec{Name: "alone", SizeBytes: 1 << 20}))(t)

	// A witness alone changes nothing while b is away; with b back all three vote.
	w := l.join("w", RoleWitness, l.init.WitnessToken)
	l.ready(w)
	if got := a.Voters(); len(got) != 1 {
		t.Errorf("voters %v while b is down", got)
	}
	b = l.restart("b")
	l.ready(b)
	eventually(t, "three voters", func() bool { return len(a.Voters()) == 3 })
	l.agree()

	// The witness holds nothing that opens secrets.
	if _, err := os.Stat(filepath.Join(w.cfg.Dir, fileSealKey)); !os.IsNotExist(err) {
		t.Errorf("witness has the seal key: %v", err)
	}
	if id := w.Identity(); len(id.CAKey) != 0 || len(id.Fingerprint) != 0 {
		t.Error("witness has sealed keys in its identity")
	}

	// Without the witness again: back to one vote, and the witness is refused.
	wid := w.Self()
	if err := a.RemoveNode(ctx, wid); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one voter", func() bool { return len(l.leader().Voters()) == 1 })
	eventually(t, "the removed witness is refused", func() bool {
		_, err := w.Ping(ctx, 1)
		return err != nil
	})
	l.agree2("a", "b")
	if got := l.leader().State().Node(wid); got != nil {
		t.Errorf("removed node %+v", got)
	}
}

// mirror has the owner of a new volume take the other data node's replica into
// the in-sync set.
func (l *lab) mirror(v *Volume) {
	l.t.Helper()
	for _, m := range l.members {
		if m.Self() != v.Record.Owner {
			continue
		}
		for _, p := range v.Record.Replicas {
			if p.Node == v.Record.Owner {
				continue
			}
			must(m.Propose(testContext(l.t), replication.Change{
				Volume: v.ID, Expect: 1, Owner: v.Record.Owner, InSync: []replication.NodeID{1, 2}, By: m.Self(),
				Grow: p.Node, GrowReplica: p.ID, GrowIncarnation: m.State().Node(p.Node).Incarnation,
			}))(l.t)
		}
	}
}

// agree2 is agree among some members.
func (l *lab) agree2(names ...string) {
	l.t.Helper()
	all := l.members
	l.members = make(map[string]*member)
	for _, n := range names {
		l.members[n] = all[n]
	}
	l.agree()
	l.members = all
}

func TestThreeNodes(t *testing.T) {
	l, a, b, w := full(t)
	ctx := testContext(t)
	lead := l.leader()
	follower := a
	if lead == a {
		follower = b
	}

	v := must(follower.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 30}))(t)
	v2 := must(lead.CreateVolume(ctx, VolumeSpec{Name: "vm2", SizeBytes: 1 << 30}))(t)
	if v.Record.Owner == v2.Record.Owner || len(v.Record.Replicas) != 2 || v.LUN == v2.LUN {
		t.Errorf("placement: %+v and %+v", v.Record, v2.Record)
	}

	// The owner takes the other replica in, then one of them goes on alone, by
	// compare and set through the follower.
	owner := v.Record.Owner
	other := 3 - owner // nodes 1 and 2
	l.mirror(v)
	ch := replication.Change{Volume: v.ID, Expect: 2, Owner: owner, InSync: []replication.NodeID{owner}, By: follower.Self(), Reason: "test"}
	r := must(follower.Propose(ctx, ch))(t)
	if r.Epoch != 3 || r.Has(other) {
		t.Errorf("record %+v", r)
	}
	r, err := follower.Propose(ctx, ch)
	wantErr(t, err, replication.ErrConflict)
	if r.Epoch != 3 {
		t.Errorf("conflict without the current record: %+v", r)
	}
	if r := must(lead.Record(ctx, v.ID))(t); r.Epoch != 3 {
		t.Errorf("record %+v", r)
	}
	_, err = lead.Record(ctx, 99)
	wantErr(t, err, ErrNotFound)
	// Nobody speaks for another node.
	ch.Expect, ch.By = 3, lead.Self()
	_, err = follower.Propose(ctx, ch)
	wantErr(t, err, ErrRefused)
	// A witness neither proposes changes nor makes volumes.
	_, err = w.CreateVolume(ctx, VolumeSpec{Name: "w", SizeBytes: 1 << 20})
	wantErr(t, err, ErrRefused)
	l.agree()

	// The leader dies: a data node leads soon, and no proposal is lost or doubled.
	name, dead := lead.id.Name, lead.Self()
	l.crash(name)
	rest := follower
	must(rest.CreateVolume(ctx, VolumeSpec{Name: "vm3", SizeBytes: 1 << 30}))(t)
	eventually(t, "a data node leads", func() bool { return rest.Leader() == rest.Self() })
	if _, err := rest.Dial(ctx, dead); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial of a dead node: %v", err)
	}
	back := l.restart(name)
	l.ready(back)
	if back.Incarnation() != 2 {
		t.Errorf("incarnation %d", back.Incarnation())
	}
	if back.State().VolumeNamed("vm3") == nil {
		t.Error("a ready node is behind")
	}
	l.agree()

	// The witness gives leadership away.
	lead = l.leader()
	if !lead.begin() {
		t.Fatal("closed")
	}
	err = lead.transfer(w.Self())
	lead.applies.Done()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a data node leads again", func() bool {
		n := w.Leader()
		return n != 0 && n != w.Self() && w.raft.State().String() != "Leader"
	})
	must(w.Sync(ctx))(t)

	// Deletion: freed by both, then gone.
	if err := l.members["a"].DeleteVolume(ctx, v.ID, false); err != nil {
		t.Fatal(err)
	}
	if l.members["a"].State().VolumeNamed("vm1") != nil || l.members["a"].State().Volume(v.ID) == nil {
		t.Error("deleted volume is found by name, or lost before it was freed")
	}
	for _, n := range []string{"a", "b", "b"} {
		if err := l.members[n].VolumeFreed(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	if s := must(l.members["a"].Sync(ctx))(t); s.Volume(v.ID) != nil {
		t.Error("freed volume is still there")
	}
	wantErr(t, l.members["b"].RemoveNode(ctx, 1), ErrRefused)
	l.agree()
}

func TestNoQuorum(t *testing.T) {
	l, a, _, _ := full(t)
	v := must(a.CreateVolume(testContext(t), VolumeSpec{Name: "vm1", SizeBytes: 1 << 20}))(t)
	l.crash("b")
	l.crash("w")
	eventually(t, "the last voter steps down", func() bool { return !a.Quorum() })
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := a.CreateVolume(ctx, VolumeSpec{Name: "vm2", SizeBytes: 1 << 20})
	wantErr(t, err, ErrNoQuorum)
	_, err = a.Record(ctx, v.ID)
	wantErr(t, err, ErrNoQuorum)
	_, err = a.Propose(ctx, replication.Change{Volume: v.ID, Expect: 1, Owner: 1, InSync: []replication.NodeID{1}, By: 1})
	wantErr(t, err, replication.ErrOutcomeUnknown)
	// With the witness back there is a quorum again.
	l.restart("w")
	must(a.Sync(testContext(t)))(t)
}

// All nodes lose power at once. None of them has a snapshot, so each finds the
// others by what is in its raft log alone.
func TestAllDown(t *testing.T) {
	l, a, _, _ := full(t)
	must(a.CreateVolume(testContext(t), VolumeSpec{Name: "vm1", SizeBytes: 1 << 20}))(t)
	for _, name := range []string{"a", "b", "w"} {
		l.crash(name)
	}
	for _, name := range []string{"w", "b", "a"} {
		l.restart(name)
	}
	for name, m := range l.members {
		l.ready(m)
		if m.Incarnation() != 2 || m.State().VolumeNamed("vm1") == nil {
			t.Errorf("%s: incarnation %d", name, m.Incarnation())
		}
	}
	l.agree()
}

func TestManyProposers(t *testing.T) {
	l, a, b, _ := full(t)
	ctx := testContext(t)
	v := must(a.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 20}))(t)
	l.mirror(v)
	// Both nodes try to change the record at once, again and again: each epoch has one winner.
	var mu sync.Mutex
	winners := make(map[lsfs.Epoch]replication.NodeID)
	var wg sync.WaitGroup
	for _, m := range []*member{a, b} {
		for range 4 {
			wg.Go(func() {
				for range 5 {
					r, err := m.Record(ctx, v.ID)
					if err != nil {
						t.Error(err)
						return
					}
					ch := replication.Change{Volume: v.ID, Expect: r.Epoch, Owner: m.Self(), InSync: []replication.NodeID{1, 2}, By: m.Self()}
					r, err = m.Propose(ctx, ch)
					if err == nil {
						mu.Lock()
						if w, ok := winners[r.Epoch]; ok {
							t.Errorf("epoch %d won by %d and %d", r.Epoch, w, m.Self())
						}
						winners[r.Epoch] = m.Self()
						mu.Unlock()
					} else if !errors.Is(err, replication.ErrConflict) {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	r := must(a.Record(ctx, v.ID))(t)
	if len(winners) == 0 || int(r.Epoch) != len(winners)+2 {
		t.Errorf("epoch %d after %d changes", r.Epoch, len(winners))
	}
	l.agree()
}

func TestOnChange(t *testing.T) {
	l := newLab(t)
	l.ready(l.members["a"])
	l.crash("a")
	var mu sync.Mutex
	var seen []uint64
	var first replication.Incarnation
	cfg := l.members["a"].cfg
	cfg.OnChange = func(s *State) {
		mu.Lock()
		defer mu.Unlock()
		if len(seen) == 0 {
			first = s.Node(1).Incarnation
		}
		seen = append(seen, s.Index)
	}
	a := l.open("a", cfg)
	l.ready(a)
	for i := range 20 {
		if err := a.AddEvent(testContext(t), Info, "test", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	last := a.State().Index
	eventually(t, "the last state was told", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(seen) > 0 && seen[len(seen)-1] == last
	})
	mu.Lock()
	defer mu.Unlock()
	if first != 2 {
		t.Errorf("first told state has incarnation %d, older than this start", first)
	}
	if !slices.IsSorted(seen) {
		t.Errorf("out of order: %v", seen)
	}
}
