package cluster

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// checkSnapshots checks what must hold of snapshots in every state.
func checkSnapshots(t testing.TB, s *State) {
	t.Helper()
	names, groups := map[string]bool{}, map[lsfs.VolumeID][]*Snapshot{}
	for _, x := range s.Snapshots {
		groups[x.Group] = append(groups[x.Group], x)
	}
	for i, x := range s.Snapshots {
		v := s.Volume(x.Volume)
		if v == nil || v.Record.Deleted {
			t.Errorf("snapshot %d of no volume", x.ID)
		}
		key := fmt.Sprint(x.Volume, "@", x.Name)
		if names[key] || x.ID >= s.nextVolume || i > 0 && s.Snapshots[i-1].ID >= x.ID || s.Volume(x.ID) != nil || x.Group > x.ID {
			t.Errorf("snapshot %+v", x)
		}
		names[key] = true
		for _, y := range groups[x.Group] {
			if y.State != x.State && !slices.Contains([]SnapshotState{SnapshotReady, SnapshotPending}, y.State) {
				t.Errorf("a group in two states: %+v, %+v", x, y)
			}
			if x.State == SnapshotPending && y.State != SnapshotPending {
				t.Errorf("half a group is ready: %+v, %+v", x, y)
			}
		}
	}
	if len(s.Snapshots) > MaxSnapshots {
		t.Errorf("%d snapshots", len(s.Snapshots))
	}
	for i, x := range s.Schedules {
		if v := s.Volume(x.Volume); v == nil || v.Record.Deleted || i > 0 && s.Schedules[i-1].Volume >= x.Volume {
			t.Errorf("schedule %+v", x)
		}
	}
	for _, v := range s.Volumes {
		if v.Restoring != 0 && (s.Snapshot(v.Restoring) == nil || v.Record.Deleted) {
			t.Errorf("volume %s is restored to nothing", v.Name)
		}
		if v.Record.Origin != 0 && v.Record.Epoch == 1 && !v.Record.Deleted && s.Snapshot(v.Record.Origin) == nil {
			t.Errorf("volume %s cannot be made: its origin is gone", v.Name)
		}
	}
}

func randomSnapshotCommand(r *rand.Rand, s *State) command {
	vol := func() lsfs.VolumeID {
		if len(s.Volumes) == 0 {
			return 1
		}
		return s.Volumes[r.IntN(len(s.Volumes))].ID
	}
	snap := func() *Snapshot {
		if len(s.Snapshots) == 0 {
			return &Snapshot{ID: 1}
		}
		return s.Snapshots[r.IntN(len(s.Snapshots))]
	}
	switch r.IntN(9) {
	case 0, 1:
		x := &cmdTakeSnapshots{Name: fmt.Sprintf("s%d", r.IntN(40)), Volumes: []lsfs.VolumeID{vol()}, Scheduled: r.IntN(3) == 0}
		if other := vol(); other > x.Volumes[0] {
			x.Volumes = append(x.Volumes, other)
		}
		return x
	case 2, 3:
		return &cmdSnapshotsTaken{snap().Group}
	case 4:
		if r.IntN(2) == 0 {
			return &cmdSnapshotsFailed{snap().Group, "no reason"}
		}
		return &cmdDeleteSnapshots{IDs: []lsfs.VolumeID{snap().ID, snap().ID}}
	case 5:
		x := &cmdCloneVolume{Snapshot: snap().ID}
		x.cmdCreateVolume = *volumeCommand(fmt.Sprintf("n%d", r.IntN(12)))
		x.SizeBytes = max(x.SizeBytes, snap().SizeBytes)
		binary.BigEndian.PutUint64(x.UUID[:], r.Uint64())
		binary.BigEndian.PutUint64(x.NAA[:], r.Uint64())
		return x
	case 6:
		x := snap()
		return &cmdRollback{Volume: x.Volume, Snapshot: x.ID, End: r.IntN(2) == 0}
	case 7:
		if r.IntN(3) == 0 {
			return &cmdRemoveSchedule{vol()}
		}
		return &cmdSetSchedule{Schedule{Volume: vol(), Every: time.Duration(r.IntN(5000)) * time.Second, Keep: uint32(r.IntN(9))}}
	}
	return &cmdDeleteVolume{Volume: vol(), Snapshots: r.IntN(2) == 0}
}

// snapshotBench is two volumes with a ready snapshot each, taken together.
func snapshotBench(t *testing.T) (b *bench, v1, v2, group lsfs.VolumeID) {
	b = newBench(t)
	v1 = lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
	v2 = lsfs.VolumeID(b.ok(volumeCommand("vm2")).ID)
	group = lsfs.VolumeID(b.ok(&cmdTakeSnapshots{Name: "s1", Volumes: []lsfs.VolumeID{v1, v2}}).ID)
	b.ok(&cmdSnapshotsTaken{group})
	return b, v1, v2, group
}

func (b *bench) refused(want code, x command) {
	b.t.Helper()
	before := len(b.m.state.Snapshots)
	if r := b.do(x); r.Code != want || r.Text == "" {
		b.t.Errorf("%T: code %d, %q; want code %d", x, r.Code, r.Text, want)
	}
	if len(b.m.state.Snapshots) != before {
		b.t.Errorf("%T was refused and changed something", x)
	}
}

func cloneCommand(name string, of lsfs.VolumeID) *cmdCloneVolume {
	return &cmdCloneVolume{*volumeCommand(name), of}
}

func TestSnapshotLife(t *testing.T) {
	b, v1, v2, group := snapshotBench(t)
	s := b.m.state
	a, c := s.SnapshotNamed(v1, "s1"), s.SnapshotNamed(v2, "s1")
	if a == nil || c == nil || a.ID != group || c.ID != group+1 || a.State != SnapshotReady || a.SizeBytes != 1<<20 || c.Group != group {
		t.Fatalf("snapshots %+v, %+v", a, c)
	}
	if k := s.KnownSnapshots(); k.Next != group+2 || k.Of(a.ID) != v1 || k.Of(c.ID) != v2 || k.Of(v1) != 0 || k.Of(99) != 0 {
		t.Errorf("known: up to %d", k.Next)
	}
	take := func(name string, v ...lsfs.VolumeID) *cmdTakeSnapshots {
		return &cmdTakeSnapshots{Name: name, Volumes: v}
	}
	b.refused(codeExists, take("s1", v1))
	b.refused(codeInvalid, take("S", v1))
	b.refused(codeInvalid, take("s2"))
	b.refused(codeInvalid, take("s2", v1, v1))
	b.refused(codeNotFound, take("s2", v1, 99))
	b.refused(codeNotFound, &cmdTakeSnapshots{Name: "s2", Volumes: []lsfs.VolumeID{v1}, Scheduled: true})
	b.refused(codeRefused, &cmdSnapshotsFailed{group, "late"})
	b.refused(codeNotFound, &cmdSnapshotsTaken{99})

	// While it is pending nothing is made of it, and it cannot be deleted.
	p := lsfs.VolumeID(b.ok(take("s2", v1)).ID)
	b.refused(codeRefused, &cmdDeleteSnapshots{IDs: []lsfs.VolumeID{p}})
	b.refused(codeRefused, cloneCommand("copy", p))
	b.refused(codeRefused, &cmdRollback{Volume: v1, Snapshot: p})
	b.ok(&cmdSnapshotsFailed{p, "the owner says so"})
	b.ok(&cmdSnapshotsFailed{p, "again"})
	if b.m.state.Snapshot(p) != nil {
		t.Error("given up and still there")
	}
	if next := lsfs.VolumeID(b.ok(take("s2", v1)).ID); next <= p {
		t.Errorf("id %d after %d was used", next, p)
	}

	// A clone keeps its origin until the owner has started; a rollback while it lasts.
	clone := lsfs.VolumeID(b.ok(cloneCommand("copy", a.ID)).ID)
	r, from := b.m.state.Volume(clone).Record, b.m.state.Volume(v1).Record
	if r.Origin != a.ID || r.Owner != from.Owner || len(r.Replicas) != len(from.Replicas) || !slices.Equal(r.InSync, []replication.NodeID{from.Owner}) || r.Replicas[0].ID == from.Replicas[0].ID {
		t.Errorf("clone %+v of %+v", r, from)
	}
	b.refused(codeRefused, &cmdDeleteSnapshots{IDs: []lsfs.VolumeID{a.ID}})
	b.refused(codeRefused, &cmdDeleteVolume{Volume: v1, Snapshots: true})
	b.ok(&cmdChange{replication.Change{Volume: clone, Expect: 1, Owner: r.Owner, InSync: r.InSync, By: r.Owner}})
	b.ok(&cmdRollback{Volume: v1, Snapshot: a.ID})
	b.refused(codeRefused, &cmdDeleteSnapshots{IDs: []lsfs.VolumeID{a.ID}})
	b.refused(codeRefused, &cmdRollback{Volume: v1, Snapshot: a.ID})
	b.refused(codeRefused, take("s3", v1))
	b.refused(codeRefused, &cmdResizeVolume{v1, 2 << 20})
	b.refused(codeNotFound, &cmdRollback{Volume: v1, Snapshot: c.ID})
	b.ok(&cmdRollback{Volume: v1, Snapshot: a.ID, End: true})
	b.ok(&cmdRollback{Volume: v1, Snapshot: a.ID, End: true}) // repeated
	if v := b.m.state.Volume(v1); v.Restoring != 0 || v.Restored != 1 {
		t.Errorf("after a rollback: %+v", v)
	}
	b.ok(&cmdDeleteSnapshots{IDs: []lsfs.VolumeID{a.ID, 99, a.ID}})
	if b.m.state.Snapshot(a.ID) != nil || b.m.state.Snapshot(c.ID) == nil {
		t.Error("the wrong one was deleted")
	}
	b.refused(codeNotFound, cloneCommand("copy2", a.ID))
	small := cloneCommand("copy2", c.ID)
	small.SizeBytes = 4096
	b.refused(codeInvalid, small)
	other := cloneCommand("copy2", c.ID)
	other.BlockBytes = 4096
	b.refused(codeInvalid, other)

	b.refused(codeRefused, &cmdDeleteVolume{Volume: v2})
	b.ok(&cmdSetSchedule{Schedule{Volume: v2, Every: time.Hour, Keep: 2}})
	b.ok(&cmdDeleteVolume{Volume: v2, Snapshots: true})
	if b.m.state.Snapshot(c.ID) != nil || b.m.state.Schedule(v2) != nil {
		t.Error("they outlived their volume")
	}
}

func TestSnapshotLimits(t *testing.T) {
	b, v1, _, _ := snapshotBench(t)
	s := *b.m.state
	for i := range MaxVolumeSnapshots - 1 {
		s.Snapshots = append(s.Snapshots, &Snapshot{ID: s.nextVolume, Volume: v1, Name: fmt.Sprintf("x%d", i), State: SnapshotReady, Group: s.nextVolume})
		s.nextVolume++
	}
	b.m = newMachine(&s)
	b.refused(codeRefused, &cmdTakeSnapshots{Name: "more", Volumes: []lsfs.VolumeID{v1}})
	full := *b.m.state
	full.Snapshots = make([]*Snapshot, MaxSnapshots)
	for i := range full.Snapshots {
		full.Snapshots[i] = &Snapshot{ID: full.nextVolume, Volume: v1, Name: fmt.Sprintf("x%d", i), State: SnapshotReady, Group: full.nextVolume}
		full.nextVolume++
	}
	b.m = newMachine(&full)
	if r := b.do(&cmdTakeSnapshots{Name: "more", Volumes: []lsfs.VolumeID{v1 + 1}}); r.Code != codeRefused {
		t.Errorf("beyond the cluster's limit: %+v", r)
	}
	again := must(unmarshalState(must(b.m.state.marshal())(t)))(t)
	if again.Hash() != b.m.state.Hash() || len(again.Snapshots) != MaxSnapshots {
		t.Error("the fullest state is not read back")
	}
}

func TestSchedule(t *testing.T) {
	b, v1, v2, _ := snapshotBench(t)
	set := func(every time.Duration, keep, daily uint32) *cmdSetSchedule {
		return &cmdSetSchedule{Schedule{Volume: v1, Every: every, Keep: keep, KeepDaily: daily}}
	}
	b.refused(codeInvalid, set(time.Second, 1, 0))
	b.refused(codeInvalid, set(time.Hour, 0, 3))
	b.refused(codeInvalid, set(time.Hour, 4000, 1))
	b.refused(codeNotFound, &cmdSetSchedule{Schedule{Volume: 99, Every: time.Hour, Keep: 1}})
	b.ok(&cmdSetSchedule{Schedule{Volume: v2, Every: time.Hour, Keep: 1}})
	b.ok(set(time.Hour, 2, 2))
	s := b.m.state.Schedule(v1)
	hour := func(h int) time.Time { return day.Truncate(24 * time.Hour).Add(time.Duration(h) * time.Hour) } // day is at 12:00
	if _, due := s.Due(s.Created.Add(time.Minute)); due {
		t.Error("due before its first full hour")
	}
	if at, due := s.Due(hour(20).Add(time.Minute)); !due || !at.Equal(hour(20)) {
		t.Errorf("runs that were missed are one: %v, %v", at, due)
	}
	if next := s.Next(hour(13)); !next.Equal(hour(14)) {
		t.Errorf("next %v", next)
	}
	b.ok(&cmdTakeSnapshots{Name: "auto", Volumes: []lsfs.VolumeID{v1}, Scheduled: true})
	s = b.m.state.Schedule(v1)
	if _, due := s.Due(s.Last.Add(time.Second)); due || s.Last.IsZero() {
		t.Errorf("due again after its run: %+v", s)
	}
	var all []*Snapshot
	for i, h := range []int{1, 9, 20, 30, 31, 47, 49, 50, 51, 52} {
		all = append(all, &Snapshot{ID: lsfs.VolumeID(100 + i), Name: fmt.Sprint(h), Created: hour(h), Scheduled: true, State: SnapshotReady})
	}
	all = append(all, &Snapshot{ID: 1, Name: "by hand", Created: hour(0), State: SnapshotReady}, &Snapshot{ID: 2, Name: "pending", Created: hour(0), Scheduled: true, State: SnapshotPending})
	var names []string
	for _, x := range s.Expired(all) {
		names = append(names, x.Name)
	}
	// 52 and 51 by number; 52 and 47 as the newest of the last two days.
	if want := []string{"1", "9", "20", "30", "31", "49", "50"}; !slices.Equal(names, want) {
		t.Errorf("expired %v, want %v", names, want)
	}
	b.ok(&cmdRemoveSchedule{v1})
	b.refused(codeNotFound, &cmdRemoveSchedule{v1})
}
