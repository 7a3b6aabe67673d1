package server

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// trio is a lab of data nodes a, b and c.
func trio(t *testing.T) (*lab, map[string]*Node) {
	l := newLab(t)
	ctx := t.Context()
	nodes := map[string]*Node{}
	first := l.config("a", false)
	tokens, err := Init(ctx, first, InitOptions{Cluster: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	nodes["a"] = l.open(first)
	for _, name := range []string{"b", "c"} {
		token := tokens.Data
		if name == "c" {
			more, err := nodes["a"].CreateToken(ctx, Data, 0)
			if err != nil {
				t.Fatal(err)
			}
			token = more.Text
		}
		c := l.config(name, false)
		if err := Join(ctx, c, JoinOptions{Address: first.Sync.Address, Token: token}); err != nil {
			t.Fatal(err)
		}
		nodes[name] = l.open(c)
	}
	return l, nodes
}

// settled waits until a volume has exactly these copies, all in sync, and a serving owner.
func (l *lab) settled(n *Node, name string, copies ...string) *Volume {
	l.t.Helper()
	var out *Volume
	l.await("copies of "+name, func() error {
		s, err := n.Status(l.t.Context())
		if err != nil {
			return err
		}
		for i := range s.Volumes {
			v := &s.Volumes[i]
			if v.Name != name {
				continue
			}
			var have []string
			for _, r := range v.Replicas {
				if r.State == ReplicaInSync {
					have = append(have, r.Node)
				}
			}
			if v.State == VolumeOnline && slices.Equal(have, copies) && len(v.Replicas) == len(copies) {
				out = v
				return nil
			}
			return fmt.Errorf("%s: %+v, operations %+v, problems %+v", v.State, v.Replicas, s.Operations, s.Problems)
		}
		return errors.New("no such volume")
	})
	return out
}

func (l *lab) operation(n *Node, id uint64, state OperationState) *Operation {
	l.t.Helper()
	var out Operation
	l.await(fmt.Sprintf("operation %d %s", id, state), func() error {
		list, err := n.Operations(l.t.Context())
		if err != nil {
			return err
		}
		for _, o := range list {
			if o.ID == id {
				out = o
			}
		}
		if out.State != state {
			return fmt.Errorf("%+v", out)
		}
		return nil
	})
	return &out
}

// The whole life of copies on three nodes: added, moved, removed, evacuated, and at
// last a node that is taken out.
func TestUpkeepOfReplicas(t *testing.T) {
	l, nodes := trio(t)
	ctx := t.Context()
	a, b, c := nodes["a"], nodes["b"], nodes["c"]
	if _, err := a.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true, Dedup: true}); err != nil {
		t.Fatal(err)
	}
	var first []string
	l.await("two copies", func() error {
		s, err := a.Status(ctx)
		if err != nil || len(s.Volumes) == 0 || s.Volumes[0].State != VolumeOnline {
			return fmt.Errorf("%+v, %v", s, err)
		}
		first = nil
		for _, r := range s.Volumes[0].Replicas {
			first = append(first, r.Node)
		}
		return nil
	})
	third := "a"
	for _, name := range []string{"b", "c"} {
		if !slices.Contains(first, name) {
			third = name
		}
	}
	o, err := b.AddReplica(ctx, "vm", third, "")
	if err != nil || o.Kind != OperationAddReplica || o.Volume != "vm" {
		t.Fatalf("%+v, %v", o, err)
	}
	v := l.settled(a, "vm", "a", "b", "c")
	l.operation(c, o.ID, OperationDone)
	if _, equal, err := a.CheckVolume(ctx, "vm", false); err != nil || !equal {
		t.Errorf("three copies differ: %v", err)
	}
	s, err := c.Status(ctx)
	if err != nil || !s.Risk.Survives || s.Health != Healthy {
		t.Errorf("risk %+v, %s, problems %+v, %v", s.Risk, s.Health, s.Problems, err)
	}
	if _, err := a.AddReplica(ctx, "vm", third, ""); !errors.Is(err, ErrExists) {
		t.Errorf("a copy twice: %v", err)
	}
	for _, wrong := range [][2]string{{"none", "a"}, {"vm", "z"}} {
		if _, err := a.AddReplica(ctx, wrong[0], wrong[1], ""); !errors.Is(err, ErrNotFound) {
			t.Errorf("add %v: %v", wrong, err)
		}
	}

	// The owner's copy goes: another node owns first.
	owner := v.Owner
	if _, err := a.RemoveReplica(ctx, "vm", owner, false, false); err != nil {
		t.Fatal(err)
	}
	var rest []string
	for _, name := range []string{"a", "b", "c"} {
		if name != owner {
			rest = append(rest, name)
		}
	}
	l.settled(a, "vm", rest...)
	l.await("the copy is freed", func() error {
		if n := nodes[owner]; len(n.store.Volumes()) > 0 {
			return errors.New("it is still there")
		}
		return nil
	})
	if _, err := a.RemoveReplica(ctx, "vm", rest[0], false, false); !errors.Is(err, ErrRefused) {
		t.Errorf("one copy left without force: %v", err)
	}
	if _, err := a.RemoveReplica(ctx, "vm", rest[0], true, true); err != nil {
		t.Errorf("dry run: %v", err)
	}

	// A copy moves back to the node that has none, and then everything leaves a node.
	if o, err = c.AddReplica(ctx, "vm", owner, rest[0]); err != nil {
		t.Fatal(err)
	}
	done := l.operation(a, o.ID, OperationDone)
	if done.From != rest[0] || done.To != owner || done.Ended.IsZero() {
		t.Errorf("%+v", done)
	}
	moved := []string{owner, rest[1]}
	slices.Sort(moved)
	l.settled(b, "vm", moved...)
	leaving, stays := nodes[owner], nodes[rest[1]]
	if _, err := stays.RemoveNode(ctx, owner, false, false); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "evacuate") {
		t.Errorf("a node with copies removed: %v", err)
	}
	if _, err := stays.EvacuateNode(ctx, owner, "", false); err != nil {
		t.Fatal(err)
	}
	slices.Sort(rest)
	l.settled(stays, "vm", rest...)
	if _, err := leaving.RemoveNode(ctx, owner, false, false); !errors.Is(err, ErrRefused) {
		t.Errorf("a node removed itself: %v", err)
	}
	if _, err := stays.RemoveNode(ctx, owner, false, false); err != nil {
		t.Fatal(err)
	}
	l.await("two nodes are left", func() error {
		if n, v := len(stays.cluster.State().Nodes), stays.cluster.Voters(); n != 2 || slices.Contains(v, leaving.id.Node) {
			return fmt.Errorf("%d nodes, voters %v", n, v)
		}
		return nil
	})
	l.close(leaving)
	if _, equal, err := stays.CheckVolume(ctx, "vm", false); err != nil || !equal {
		t.Errorf("after all that the copies differ: %v", err)
	}
}

// A node in maintenance is drained, and is missed by nobody; the last good copy is
// not given up for it.
func TestMaintenance(t *testing.T) {
	l, nodes := trio(t)
	ctx := t.Context()
	a := nodes["a"]
	if err := a.SetBalance(ctx, true, time.Second); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vm1", "vm2", "vm3"} {
		if _, err := a.CreateVolume(ctx, VolumeSpec{Name: name, Size: 64 << 20, AnyHost: true}); err != nil {
			t.Fatal(err)
		}
	}
	healthy := func() error {
		s, err := a.Status(ctx)
		if err == nil && (s.Health != Healthy || len(s.Problems) > 0) {
			err = fmt.Errorf("%s: %+v", s.Health, s.Problems)
		}
		return err
	}
	l.await("healthy", healthy)
	owners := map[string]string{}
	s, err := a.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	out := ""
	for _, v := range s.Volumes {
		owners[v.Name] = v.Owner
		if v.Owner != "a" {
			out = v.Owner
		}
		if v.Preferred != v.Owner {
			t.Errorf("volume %s belongs to %q and is owned by %q", v.Name, v.Preferred, v.Owner)
		}
	}
	m, hurt, err := a.SetMaintenance(ctx, out, true, false, false)
	if err != nil || len(hurt) != 0 || m.Mode != ModeMaintenance {
		t.Fatalf("%+v, hurt %v, %v", m, hurt, err)
	}
	l.await("drained", func() error {
		for _, v := range a.cluster.State().Volumes {
			if v.Record.Owner == nodes[out].id.Node {
				return fmt.Errorf("%s is still there", v.Name)
			}
		}
		return nil
	})
	config := nodes[out].config
	l.close(nodes[out])
	l.await("its absence is known", func() error {
		s, err := a.Status(ctx)
		if err != nil {
			return err
		}
		for _, n := range s.Nodes {
			if n.Name == out && n.State != NodeDown {
				return errors.New("it still answers")
			}
		}
		for _, v := range s.Volumes {
			if v.State == VolumeStarting || v.State == VolumeOffline {
				return fmt.Errorf("%s is %s", v.Name, v.State)
			}
		}
		if s.Health != Healthy || !slices.ContainsFunc(s.Problems, func(p Problem) bool { return p.Code == "node-maintenance" }) {
			return fmt.Errorf("%s: %+v", s.Health, s.Problems)
		}
		if s.Risk.Survives || len(s.Risk.Stops) != 2 {
			return fmt.Errorf("risk %+v", s.Risk)
		}
		return nil
	})
	other := "b"
	if out == "b" {
		other = "c"
	}
	if _, hurt, err := a.SetMaintenance(ctx, other, true, false, false); !errors.Is(err, ErrRefused) || len(hurt) == 0 || !strings.Contains(err.Error(), "quorum") {
		t.Errorf("a second node: hurt %v, %v", hurt, err)
	}
	if _, err := a.CreateVolume(ctx, VolumeSpec{Name: "vm4", Size: 64 << 20, AnyHost: true}); err != nil {
		t.Fatal(err)
	}
	nodes[out] = l.open(config)
	if _, _, err := a.SetMaintenance(ctx, out, false, false, false); err != nil {
		t.Fatal(err)
	}
	l.await("healthy again", healthy)
	l.await("volumes are back where they belong", func() error {
		s, err := a.Status(ctx)
		if err != nil {
			return err
		}
		for _, v := range s.Volumes {
			if want := owners[v.Name]; want != "" && (v.Owner != want || v.State != VolumeOnline) {
				return fmt.Errorf("%s is owned by %s, and belongs to %s", v.Name, v.Owner, want)
			}
		}
		return nil
	})
}

// A planned stop leaves nothing to find out for the others: they own everything
// before the node is gone.
func TestRetire(t *testing.T) {
	l, nodes := trio(t)
	ctx := t.Context()
	a := nodes["a"]
	for _, name := range []string{"vm1", "vm2", "vm3"} {
		if _, err := a.CreateVolume(ctx, VolumeSpec{Name: name, Size: 64 << 20, AnyHost: true}); err != nil {
			t.Fatal(err)
		}
	}
	l.await("healthy", func() error {
		s, err := a.Status(ctx)
		if err == nil && (s.Health != Healthy || len(s.Problems) > 0) {
			err = fmt.Errorf("%s: %+v", s.Health, s.Problems)
		}
		return err
	})
	self := a.id.Node
	l.await("nothing is left to find out", func() error {
		a.Retire(ctx) // on a busy machine it may run out of time, and leave something
		state, err := nodes["b"].cluster.Sync(ctx)
		if err == nil && nodes["b"].cluster.Leader() == self {
			err = errors.New("it leads still")
		}
		if err != nil {
			return err
		}
		for _, v := range state.Volumes {
			if v.Record.Owner == self || v.Record.Has(self) || len(v.Record.InSync) == 0 {
				return fmt.Errorf("%s: owner %d, in sync %v", v.Name, v.Record.Owner, v.Record.InSync)
			}
		}
		return nil
	})
	config := a.config
	l.close(a)
	nodes["a"] = l.open(config)
	l.await("all copies are back", func() error {
		s, err := nodes["b"].Status(ctx)
		if err == nil && s.Health != Healthy {
			err = fmt.Errorf("%s: %+v", s.Health, s.Problems)
		}
		return err
	})
}

// The last good copy is lost with its node, and an old one is promoted.
func TestPromoteLost(t *testing.T) {
	l, nodes := trio(t)
	ctx := t.Context()
	if _, err := nodes["a"].CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true}); err != nil {
		t.Fatal(err)
	}
	var v *Volume
	l.await("online", func() error {
		s, err := nodes["a"].Status(ctx)
		if err != nil || len(s.Volumes) == 0 || s.Volumes[0].State != VolumeOnline {
			return fmt.Errorf("%+v, %v", s, err)
		}
		v = &s.Volumes[0]
		return nil
	})
	owner, other := v.Owner, v.Replicas[0].Node
	if other == owner {
		other = v.Replicas[1].Node
	}
	asked := nodes["a"]
	for name, n := range nodes {
		if name != owner && name != other {
			asked = n // it has no copy, and keeps the quorum
		}
	}
	if _, err := asked.Promote(ctx, PromoteSpec{Volume: "vm", Node: other, Epoch: v.Epoch}); !errors.Is(err, ErrRefused) {
		t.Errorf("promoted beside a good copy: %v", err)
	}
	old, lost := nodes[other].config, nodes[owner].config
	l.close(nodes[other])
	l.await("the owner goes on alone", func() error {
		if r := asked.cluster.State().VolumeNamed("vm").Record; len(r.InSync) != 1 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	// The old copy must be there before the good one goes: two of three are needed.
	l.close(nodes[owner])
	nodes[other] = l.open(old)
	p, err := asked.Promote(ctx, PromoteSpec{Volume: "vm", Node: other, DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	if p.Refuse != "" || len(p.Facts) != 3 || !strings.Contains(p.Facts[1], "fell out of sync") || !strings.Contains(p.Facts[2], owner) {
		t.Fatalf("%+v", p)
	}
	if _, err := asked.Promote(ctx, PromoteSpec{Volume: "vm", Node: other, Epoch: p.Epoch - 1}); !errors.Is(err, replication.ErrConflict) {
		t.Errorf("promoted over a newer epoch: %v", err)
	}
	if _, err := asked.Promote(ctx, PromoteSpec{Volume: "vm", Node: other, Epoch: p.Epoch}); err != nil {
		t.Fatal(err)
	}
	l.await("served again", func() error {
		s, err := asked.Status(ctx)
		if err != nil {
			return err
		}
		if v := s.Volumes[0]; v.Owner != other || v.State != VolumeDegraded || v.Lineage == "" {
			return fmt.Errorf("%+v", v)
		}
		return nil
	})
	nodes[owner] = l.open(lost)
	both := []string{owner, other}
	slices.Sort(both)
	l.settled(asked, "vm", both...)
}

func TestNextBalance(t *testing.T) {
	state := func(preferred ...replication.NodeID) *cluster.State {
		s := &cluster.State{}
		for id := range replication.NodeID(3) {
			s.Nodes = append(s.Nodes, &cluster.Node{ID: id + 1, Role: cluster.RoleData})
		}
		for i, p := range preferred {
			s.Volumes = append(s.Volumes, &cluster.Volume{ID: lsfs.VolumeID(i + 1), Preferred: p, Record: replication.Record{Owner: 1, InSync: []replication.NodeID{1, 2}}})
		}
		return s
	}
	for _, tt := range []struct {
		what string
		s    *cluster.State
		f    func(*cluster.State)
		id   lsfs.VolumeID
		to   replication.NodeID
	}{
		{"nothing", state(), nil, 0, 0},
		{"at home", state(1, 1, 1), nil, 0, 0},
		{"away", state(1, 2), nil, 2, 2},
		{"home is not in sync", state(3), nil, 0, 0},
		{"home is drained", state(2), func(s *cluster.State) { s.Nodes[1].Draining = true }, 0, 0},
		{"home is in maintenance", state(2), func(s *cluster.State) { s.Nodes[1].Mode = cluster.ModeMaintenance }, 0, 0},
		{"one without a home", state(0), nil, 0, 0},
		{"two without a home", state(0, 0), nil, 1, 2},
		{"two, and one owned there", state(0, 0, 0), func(s *cluster.State) { s.Volumes[2].Record.Owner = 2 }, 0, 0},
		{"homes are not spread", state(1, 1, 1, 0), nil, 4, 2},
		{"deleted", state(2), func(s *cluster.State) { s.Volumes[0].Record = replication.Record{Deleted: true} }, 0, 0},
	} {
		if tt.f != nil {
			tt.f(tt.s)
		}
		if id, to := nextBalance(tt.s); id != tt.id || to != tt.to {
			t.Errorf("%s: volume %d to node %d, want %d to %d", tt.what, id, to, tt.id, tt.to)
		}
	}
}

func TestRisk(t *testing.T) {
	base := func() *Status {
		s := &Status{Quorum: true, Voters: 3, VotersUp: 3}
		for _, name := range []string{"a", "b"} {
			s.Nodes = append(s.Nodes, Member{Name: name, Role: Data, State: NodeUp, Voter: true, Mode: ModeServing})
		}
		s.Nodes = append(s.Nodes, Member{Name: "w", Role: Witness, State: NodeUp, Voter: true, Mode: ModeServing})
		for _, name := range []string{"vm1", "vm2"} {
			s.Volumes = append(s.Volumes, Volume{Name: name, State: VolumeOnline, Owner: "a", Replicas: []Replica{{Node: "a", State: ReplicaInSync, Owner: true}, {Node: "b", State: ReplicaInSync}}})
		}
		return s
	}
	for _, tt := range []struct {
		what string
		f    func(*Status)
		want string
	}{
		{"healthy", func(*Status) {}, "survives the loss of any one node"},
		{"witness down", func(s *Status) { s.Nodes[2].State, s.VotersUp = NodeDown, 2 },
			"the failure of node a stops I/O of vm1, vm2; the failure of node b stops I/O of vm1, vm2"},
		{"witness down, a copy not in sync", func(s *Status) {
			s.Nodes[2].State, s.VotersUp = NodeDown, 2
			s.Volumes[1].Replicas[1].State = ReplicaSyncing // vm2 goes on alone on a: it needs nobody
		}, "the failure of node a stops I/O of vm1, vm2; the failure of node b stops I/O of vm1"},
		{"b down and dropped", func(s *Status) {
			s.Nodes[1].State, s.VotersUp = NodeDown, 2
			s.Volumes[0].Replicas[1].State, s.Volumes[1].Replicas[1].State = ReplicaDown, ReplicaDown
		}, "the failure of node a stops I/O of vm1, vm2"},
		{"one copy stale", func(s *Status) { s.Volumes[0].Replicas[1].State = ReplicaStale }, "the failure of node a stops I/O of vm1"},
		{"no quorum", func(s *Status) { s.Quorum = false }, "there is no quorum: whatever fails next, its volumes stop"},
		{"preferred node", func(s *Status) {
			s.Nodes, s.Voters, s.VotersUp = s.Nodes[:2], 1, 1
			s.Nodes[1].Voter = false
		}, "the failure of node a stops I/O of vm1, vm2"},
		{"no volumes", func(s *Status) { s.Volumes = nil }, "survives the loss of any one node"},
	} {
		s := base()
		tt.f(s)
		if r := riskOf(s); r.Text != tt.want || r.Survives != (len(r.Stops) == 0 && s.Quorum) {
			t.Errorf("%s: %+v, want %q", tt.what, r, tt.want)
		}
	}
}
