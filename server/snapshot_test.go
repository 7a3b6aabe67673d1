package server

import (
	"bytes"
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

// volumeIO does one request on a volume through a node.
func volumeIO(t *testing.T, n *Node, id lsfs.VolumeID, op replication.RequestOp, off uint64, data []byte) {
	t.Helper()
	done := make(chan struct{})
	r := &replication.Request{Op: op, Off: off, Len: uint64(len(data)), Data: data, Done: func(*replication.Request) { close(done) }}
	node := n.serving.Load().replication
	node.Volume(id).Submit(r)
	node.Kick()
	<-done
	if r.Err != nil {
		t.Fatalf("request %d of volume %d at %d: %v", op, id, off, r.Err)
	}
}

func (l *lab) changes(n *Node, spec ChangesSpec) (all []ChangedRange, size uint64) {
	l.t.Helper()
	if err := n.Changes(l.t.Context(), spec, func(r []ChangedRange, next uint64) error {
		all, size = append(all, r...), next
		return nil
	}); err != nil {
		l.t.Fatal(err)
	}
	return all, size
}

// Snapshots from end to end on two data nodes and a witness.
func TestSnapshots(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	config := map[string]*Config{"a": l.config("a", false), "b": l.config("b", false), "w": l.config("w", true)}
	tokens, err := Init(ctx, config["a"], InitOptions{Cluster: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	a := l.open(config["a"])
	if err := Join(ctx, config["b"], JoinOptions{Address: config["a"].Sync.Address, Token: tokens.Data}); err != nil {
		t.Fatal(err)
	}
	b := l.open(config["b"])
	if err := Join(ctx, config["w"], JoinOptions{Address: config["a"].Sync.Address, Token: tokens.Witness, Witness: true}); err != nil {
		t.Fatal(err)
	}
	w := l.open(config["w"])
	volumes := map[string]*Volume{}
	for _, name := range []string{"db", "log"} { // owned by a and by b
		if _, err := a.CreateVolume(ctx, VolumeSpec{Name: name, Size: 16 << 20, Dedup: true, Compress: true}); err != nil {
			t.Fatal(err)
		}
		volumes[name] = l.awaitVolume(a, name, VolumeOnline, "a", "b")
	}
	if volumes["db"].Owner == volumes["log"].Owner {
		t.Errorf("both owned by %s", volumes["db"].Owner)
	}
	db := volumes["db"].ID
	block := func(x byte) []byte { return bytes.Repeat([]byte{x}, 8192) }
	volumeIO(t, a, db, replication.OpWrite, 4096, block(1))
	if s, err := b.CreateSnapshots(ctx, "s1", []string{"db"}, "r1"); err != nil || len(s) != 1 || s[0].State != SnapshotReady || s[0].Volume != "db" {
		t.Fatalf("create: %+v, %v", s, err)
	}
	if s, err := b.CreateSnapshots(ctx, "s1", []string{"db"}, "r1"); err != nil || len(s) != 1 {
		t.Errorf("the same request again: %+v, %v", s, err)
	}
	if _, err := a.CreateSnapshots(ctx, "s1", []string{"db"}, ""); !errors.Is(err, ErrExists) {
		t.Errorf("the same name again: %v", err)
	}
	volumeIO(t, a, db, replication.OpWrite, 8192, block(2))
	group, err := b.CreateSnapshots(ctx, "s2", []string{"db", volumes["log"].UUID}, "")
	if err != nil || len(group) != 2 || !slices.Equal(group[0].Group, []string{"db", "log"}) {
		t.Fatalf("a group: %+v, %v", group, err)
	}
	list, err := b.Snapshots(ctx, "db")
	if err != nil || len(list) != 2 || list[0].Name != "s1" || list[0].Mapped != 8192 || list[1].Mapped != 12288 {
		t.Errorf("list %+v, %v", list, err)
	}
	for _, n := range []*Node{a, b, w} { // the witness asks the owner
		got, size := l.changes(n, ChangesSpec{Volume: "db", From: "s1", To: "s2"})
		if want := []ChangedRange{{8192, 8192, false}}; !slices.Equal(got, want) || size != 16<<20 {
			t.Errorf("node %s: changes %+v up to %d, want %+v", n.id.Name, got, size, want)
		}
		got, _ = l.changes(n, ChangesSpec{Volume: "db", To: "s1", Offset: 8192})
		if want := []ChangedRange{{8192, 4096, false}}; !slices.Equal(got, want) {
			t.Errorf("node %s: all of s1 from 8192 on: %+v, want %+v", n.id.Name, got, want)
		}
		got, _ = l.changes(n, ChangesSpec{Volume: "db", From: "s2", To: "s1"})
		if want := []ChangedRange{{8192, 4096, false}, {12288, 4096, true}}; !slices.Equal(got, want) {
			t.Errorf("node %s: back: %+v, want %+v", n.id.Name, got, want)
		}
	}
	if err := a.Changes(ctx, ChangesSpec{Volume: "db", To: "none"}, nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("changes of nothing: %v", err)
	}
	if v := l.awaitVolume(a, "db", VolumeOnline, "a", "b"); v.Snapshots != 2 {
		t.Errorf("%d snapshots of db", v.Snapshots)
	}

	clone, err := b.CloneSnapshot(ctx, CloneSpec{Volume: "db", Snapshot: "s1", Name: "db-test", Size: 32 << 20, RequestID: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	if clone.Origin != "db@s1" || clone.Size != 32<<20 {
		t.Errorf("clone %+v", clone)
	}
	l.awaitVolume(a, "db-test", VolumeOnline, "a", "b")
	for _, n := range []*Node{a, b} {
		got := make([]byte, 16384)
		volumeIO(t, n, clone.ID, replication.OpRead, 0, got)
		if want := slices.Concat(make([]byte, 4096), block(1), make([]byte, 4096)); !bytes.Equal(got, want) {
			t.Errorf("the clone read through %s differs", n.id.Name)
		}
	}

	lost, err := a.cluster.TakeSnapshots(ctx, "lost", "lost", []lsfs.VolumeID{db}, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.cluster.SnapshotsTaken(ctx, lost); err != nil {
		t.Fatal(err)
	}
	if _, err := b.CloneSnapshot(ctx, CloneSpec{Volume: "db", Snapshot: "lost", Name: "db-lost"}); !errors.Is(err, ErrRefused) {
		t.Errorf("a clone of a snapshot that the owner lacks: %v", err)
	}
	if _, _, _, err := b.RollBackVolume(ctx, "db", "lost", false, false); !errors.Is(err, ErrNotFound) {
		t.Errorf("rolled back to a snapshot that the owner lacks: %v", err)
	}
	if _, err := b.DeleteSnapshot(ctx, "db", "lost", false); err != nil {
		t.Error(err)
	}

	if _, _, _, err := a.RollBackVolume(ctx, "db", "s1", true, false); err != nil {
		t.Errorf("dry run: %v", err)
	}
	if _, _, _, err := b.RollBackVolume(ctx, "db", "s1", false, false); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 16384)
	volumeIO(t, b, db, replication.OpRead, 0, got)
	if want := slices.Concat(make([]byte, 4096), block(1), make([]byte, 4096)); !bytes.Equal(got, want) {
		t.Error("rolled back, db is not s1")
	}
	if digests, equal, err := a.CheckVolume(ctx, "db", false); err != nil || !equal {
		t.Errorf("check %+v, %v", digests, err)
	}

	// What was begun and left is settled: one that was not taken goes, with its half.
	left, err := a.cluster.TakeSnapshots(ctx, "left", "left", []lsfs.VolumeID{db, volumes["log"].ID}, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.stepAt(ctx, a.cluster.State(), SnapshotStep{Act: ActTake, Volume: db, Snapshot: left}); err != nil {
		t.Fatal(err)
	}
	taken, err := a.cluster.TakeSnapshots(ctx, "taken", "taken", []lsfs.VolumeID{db}, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.stepAt(ctx, a.cluster.State(), SnapshotStep{Act: ActTake, Volume: db, Snapshot: taken}); err != nil {
		t.Fatal(err)
	}
	if err := a.cluster.BeginRollback(ctx, volumes["log"].ID, group[1].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := a.DeleteSnapshot(ctx, "log", "s2", false); !errors.Is(err, ErrRefused) {
		t.Errorf("a snapshot that is needed is deleted: %v", err)
	}
	leader := l.nodes[a.cluster.Leader()]
	k := newKeeper()
	leader.keep(ctx, k, time.Now())
	leader.keep(ctx, k, time.Now().Add(settleAfter+time.Second))
	l.await("the left-overs are settled", func() error {
		s := a.cluster.State()
		if x := s.Snapshot(taken); len(s.SnapshotGroup(left)) != 0 || x == nil || x.State != cluster.SnapshotReady || s.Volume(volumes["log"].ID).Restoring != 0 {
			return fmt.Errorf("%+v", s.Snapshots)
		}
		for _, n := range []*Node{a, b} {
			n.keep(ctx, newKeeper(), time.Now())
			if n.store.Snapshot(left) != nil || n.store.Snapshot(taken) == nil {
				return fmt.Errorf("node %s: half a group is there", n.id.Name)
			}
		}
		return nil
	})

	// The schedule runs by the clock of whoever leads.
	if _, err := a.SetSchedule(ctx, "db", time.Second, 1, 0); !errors.Is(err, ErrInvalid) {
		t.Errorf("every second: %v", err)
	}
	if s, err := b.SetSchedule(ctx, "db", time.Hour, 2, 0); err != nil || s.Volume != "db" || !s.Next.After(time.Now()) {
		t.Fatalf("schedule %+v, %v", s, err)
	}
	for h := range 4 {
		leader.runSchedules(ctx, k, leader.cluster.State(), time.Now().Add(time.Duration(h+1)*time.Hour))
		// Created is the present each time, which is what retention goes by; Last as well.
	}
	list, err = a.Snapshots(ctx, "db")
	if err != nil {
		t.Fatal(err)
	}
	scheduled := 0
	for _, s := range list {
		if s.Scheduled && strings.HasPrefix(s.Name, "auto-") {
			scheduled++
		}
	}
	if scheduled != 2 {
		t.Errorf("%d scheduled snapshots are kept, want 2: %+v", scheduled, list)
	}
	if x, err := a.Schedules(ctx); err != nil || len(x) != 1 || x[0].Snapshots != 2 || x[0].Last.IsZero() {
		t.Errorf("schedules %+v, %v", x, err)
	}
	if err := b.RemoveSchedule(ctx, "db"); err != nil {
		t.Error(err)
	}

	if _, _, err := a.DeleteVolume(ctx, "db", true, false, false); !errors.Is(err, ErrRefused) {
		t.Errorf("a volume with snapshots is deleted: %v", err)
	}
	if _, err := b.DeleteSnapshot(ctx, "db", "s2", false); err != nil {
		t.Error(err)
	}
	if _, _, err := a.DeleteVolume(ctx, "db", false, false, true); err != nil {
		t.Error(err)
	}
	if _, _, err := a.DeleteVolume(ctx, "log", false, false, true); err != nil {
		t.Error(err)
	}
	if _, _, err := a.DeleteVolume(ctx, "db-test", false, false, false); err != nil {
		t.Error(err)
	}
	l.await("nothing is left", func() error {
		for _, n := range []*Node{a, b} {
			if s := n.store.Snapshots(0); len(s) != 0 || len(n.store.Volumes()) != 0 {
				return fmt.Errorf("node %s has %d snapshots, volumes %v", n.id.Name, len(s), n.store.Volumes())
			}
		}
		return nil
	})
	events := a.cluster.State().Events
	for _, code := range []string{"snapshot-created", "snapshot-failed", "snapshot-deleted", "volume-cloned", "volume-rolled-back", "rollback-failed", "schedule-set", "schedule-removed"} {
		if !slices.ContainsFunc(events, func(e cluster.Event) bool { return e.Code == code }) {
			t.Errorf("no event %s", code)
		}
	}
}
