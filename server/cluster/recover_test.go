package cluster

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/replication"
)

// voters waits until everybody in ms knows exactly these voters.
func voters(t testing.TB, want []replication.NodeID, ms ...*member) {
	t.Helper()
	for _, m := range ms {
		eventually(t, "voters known at "+m.id.Name, func() bool {
			have := m.Voters()
			slices.Sort(have)
			return slices.Equal(have, want)
		})
	}
}

// The quorum changes while the cluster runs: to one preferred node, to the other,
// and back to the witness; each time commands go on.
func TestQuorumOnline(t *testing.T) {
	l, a, b, w := full(t)
	ctx := testContext(t)
	ids := func(n ...replication.NodeID) []replication.NodeID { return n }
	work := func() {
		t.Helper()
		if err := l.leader().AddEvent(ctx, Info, "test", "x"); err != nil {
			t.Error(err)
		}
	}
	for _, step := range []struct {
		mode      QuorumMode
		preferred replication.NodeID
		want      []replication.NodeID
	}{
		{QuorumPreferred, 2, ids(2)}, {QuorumPreferred, 1, ids(1)}, {QuorumWitness, 0, ids(1, 2, 3)}, {QuorumPreferred, 2, ids(2)}, {QuorumAuto, 0, ids(1, 2, 3)},
	} {
		if err := w.SetQuorum(ctx, step.mode, step.preferred); err == nil {
			t.Fatal("a witness changed the quorum")
		}
		if err := a.SetQuorum(ctx, step.mode, step.preferred); err != nil {
			t.Fatalf("%+v: %v", step, err)
		}
		voters(t, step.want, a, b, w)
		work()
	}
	if err := a.SetQuorum(ctx, QuorumMajority, 0); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	// The preferred node survives the loss of all others by itself.
	if err := b.SetQuorum(ctx, QuorumPreferred, 1); err != nil {
		t.Fatal(err)
	}
	voters(t, ids(1), a, b, w)
	l.crash("b")
	l.crash("w")
	if err := a.AddEvent(ctx, Info, "test", "alone"); err != nil {
		t.Error(err)
	}
	b, w = l.restart("b"), l.restart("w")
	l.ready(b, w)
	// Another witness: the old one is removed, a new one joins.
	if err := a.SetQuorum(ctx, QuorumAuto, 0); err != nil {
		t.Fatal(err)
	}
	voters(t, ids(1, 2, 3), a, b)
	w.cfg.Fatal = nil
	l.crash("w")
	delete(l.members, "w")
	if err := b.RemoveNode(ctx, 3); err != nil {
		t.Fatal(err)
	}
	token := must(a.CreateToken(ctx, RoleWitness, 0))(t)
	w = l.join("w2", RoleWitness, token.Text)
	l.ready(w)
	voters(t, ids(1, 2, 4), a, b, w)
	l.agree()
}

// The preferred node is lost for good: the other goes on alone, and has nothing to
// do with the old one any more, should it come back.
func TestRecover(t *testing.T) {
	l := newLab(t)
	ctx := testContext(t)
	a := l.members["a"]
	l.ready(a)
	b := l.join("b", RoleData, l.init.DataToken)
	l.ready(b)
	voters(t, []replication.NodeID{1}, a, b)
	must(a.CreateVolume(ctx, VolumeSpec{Name: "vm1", SizeBytes: 1 << 30}))(t)
	must(b.Sync(ctx))(t)
	dir := b.cfg.Dir
	discard := slog.New(slog.DiscardHandler)
	if _, err := Recover(dir, []string{"a"}, true, discard); err == nil || !strings.Contains(err.Error(), "locked") {
		t.Errorf("a node that runs: %v", err)
	}
	l.crash("b")
	for _, tt := range []struct {
		lost []string
		want error
		text string
	}{
		{nil, ErrRefused, "majority"}, {[]string{"z"}, ErrNotFound, ""}, {[]string{"b"}, ErrInvalid, ""}, {[]string{"a"}, ErrRefused, "answers"},
	} {
		if _, err := Recover(dir, tt.lost, false, discard); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("lost %v: %v", tt.lost, err)
		}
	}
	l.crash("a")
	r := must(Recover(dir, []string{"a"}, true, discard))(t)
	if r.Cluster != "lab" || r.Node != "b" || r.Index == 0 || !slices.Equal(r.Voters, []string{"a"}) || r.State.VolumeNamed("vm1") == nil {
		t.Errorf("%+v", r)
	}
	if lost := must(readLost(dir))(t); len(lost) != 0 {
		t.Error("a dry run left a trace")
	}
	must(Recover(dir, []string{"a"}, false, discard))(t)
	b = l.restart("b")
	l.ready(b)
	if b.State().VolumeNamed("vm1") == nil || b.Leader() != 2 {
		t.Errorf("leader %d, state %+v", b.Leader(), b.State())
	}
	voters(t, []replication.NodeID{2}, b)

	// The old one comes back with its own quorum of one: neither listens to the other.
	fatal := make(chan error, 1)
	cfg := l.members["a"].cfg
	cfg.Fatal = func(err error) {
		select {
		case fatal <- err:
		default:
		}
	}
	a = l.open("a", cfg)
	l.ready(a)
	if _, err := a.Ping(ctx, 2); err == nil {
		t.Error("the lost node is answered")
	}
	if err := b.AddEvent(ctx, Info, "test", "after"); err != nil {
		t.Error(err)
	}
	if err := a.AddEvent(ctx, Info, "test", "elsewhere"); err != nil {
		t.Error(err)
	}
	if n := len(b.State().EventsAfter(0)); slices.ContainsFunc(b.State().Events, func(e Event) bool { return e.Text == "elsewhere" }) {
		t.Errorf("two histories met, of %d events", n)
	}
	l.crash("a")
	delete(l.members, "a")

	// It is taken out, and a third node joins in its place.
	v := b.State().VolumeNamed("vm1")
	if err := b.Promote(ctx, v.ID, v.Record.Epoch, 2, "a is lost"); err == nil {
		t.Error("a volume that was never served was promoted")
	}
	if err := b.DeleteVolume(ctx, v.ID, false); err != nil {
		t.Error(err)
	}
	if err := b.RemoveNode(ctx, 1); err != nil {
		t.Error(err)
	}
	voters(t, []replication.NodeID{2}, b)
	l.crash("b")
	b = l.restart("b")
	l.ready(b)

	if err := os.WriteFile(filepath.Join(dir, fileLost), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readLost(dir); err == nil {
		t.Error("a damaged list of lost nodes is taken")
	}
}

// A witness can recover nothing.
func TestRecoverRefusesWitness(t *testing.T) {
	l, _, _, w := full(t)
	dir := w.cfg.Dir
	l.crash("w")
	if _, err := Recover(dir, []string{"a", "b"}, false, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}
