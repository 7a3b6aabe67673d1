package cluster

import (
	"slices"
	"strings"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// The kinds of the commands for snapshots. Part of the raft log format, do not change.
const (
	kindTakeSnapshots   kind = 40
	kindSnapshotsTaken  kind = 41
	kindSnapshotsFailed kind = 42
	kindDeleteSnapshots kind = 43
	kindCloneVolume     kind = 44
	kindRollback        kind = 45
	kindSetSchedule     kind = 46
	kindRemoveSchedule  kind = 47
)

// newSnapshotCommand is newCommand for the kinds above; nil for any other.
func newSnapshotCommand(k kind) command {
	switch k {
	case kindTakeSnapshots:
		return new(cmdTakeSnapshots)
	case kindSnapshotsTaken:
		return new(cmdSnapshotsTaken)
	case kindSnapshotsFailed:
		return new(cmdSnapshotsFailed)
	case kindDeleteSnapshots:
		return new(cmdDeleteSnapshots)
	case kindCloneVolume:
		return new(cmdCloneVolume)
	case kindRollback:
		return new(cmdRollback)
	case kindSetSchedule:
		return new(cmdSetSchedule)
	case kindRemoveSchedule:
		return new(cmdRemoveSchedule)
	}
	return nil
}

// cmdTakeSnapshots records that snapshots of some volumes, one each, are about to
// be taken at one moment. The result is the id of the first; those of the others
// follow in the order of Volumes.
type cmdTakeSnapshots struct {
	Name      string
	Volumes   []lsfs.VolumeID // ascending
	Scheduled bool
}

func (*cmdTakeSnapshots) kind() kind { return kindTakeSnapshots }
func (x *cmdTakeSnapshots) walk(c *codec) {
	text(c, &x.Name)
	list(c, &x.Volumes, u64[lsfs.VolumeID])
	c.flag(&x.Scheduled)
}

func (x *cmdTakeSnapshots) apply(e *edit) result {
	s := e.s
	switch {
	case !validName(x.Name):
		return refuse(codeInvalid, "%q is not a name of a snapshot: %s", x.Name, nameRule)
	case len(x.Volumes) == 0 || len(x.Volumes) > MaxSnapshotGroup:
		return refuse(codeInvalid, "a snapshot is taken of 1 to %d volumes at a time", MaxSnapshotGroup)
	case len(s.Snapshots)+len(x.Volumes) > MaxSnapshots:
		return refuse(codeRefused, "there are %d snapshots; the most that a cluster may have is %d: delete some first", len(s.Snapshots), MaxSnapshots)
	}
	for i, id := range x.Volumes {
		if i > 0 && id <= x.Volumes[i-1] {
			return refuse(codeInvalid, "a volume is named twice")
		}
		v, r := e.volume(id)
		switch {
		case v == nil:
			return r
		case v.Restoring != 0:
			return refuse(codeRefused, "volume %s is being rolled back", v.Name)
		case s.SnapshotNamed(id, x.Name) != nil:
			return refuse(codeExists, "there is a snapshot %s@%s already", v.Name, x.Name)
		case x.Scheduled && s.Schedule(id) == nil:
			return refuse(codeNotFound, "volume %s has no schedule", v.Name)
		}
		if n := len(s.SnapshotsOf(id)); n >= MaxVolumeSnapshots {
			return refuse(codeRefused, "volume %s has %d snapshots, the most that a volume may have: delete some first", v.Name, n)
		}
	}
	first := s.nextVolume
	s.Snapshots = append(make([]*Snapshot, 0, len(s.Snapshots)+len(x.Volumes)), s.Snapshots...)
	for _, id := range x.Volumes {
		s.Snapshots = append(s.Snapshots, &Snapshot{
			ID: s.nextVolume, Volume: id, Name: x.Name, State: SnapshotPending, SizeBytes: s.Volume(id).Record.SizeBytes,
			Created: e.env.Now, Group: first, Scheduled: x.Scheduled,
		})
		s.nextVolume++
		if x.Scheduled {
			run := *s.Schedule(id)
			run.Last = e.env.Now
			e.setSchedule(&run)
		}
	}
	return result{ID: uint64(first)}
}

func (e *edit) setSchedule(x *Schedule) {
	e.s.Schedules = replace(e.s.Schedules, x, func(y *Schedule) bool { return y.Volume == x.Volume })
}

// dropSnapshots takes records away.
func (e *edit) dropSnapshots(drop func(*Snapshot) bool) { e.s.Snapshots = without(e.s.Snapshots, drop) }

// groupNames lists the volumes of a group for a message, as VOLUME@NAME.
func (e *edit) groupNames(group []*Snapshot) string {
	var names []string
	for _, x := range group {
		names = append(names, e.snapshotName(x))
	}
	return strings.Join(names, ", ")
}

func (e *edit) snapshotName(x *Snapshot) string {
	if v := e.s.Volume(x.Volume); v != nil {
		return v.Name + "@" + x.Name
	}
	return x.Name
}

// cmdSnapshotsTaken says that all snapshots of a group were taken.
type cmdSnapshotsTaken struct{ Group lsfs.VolumeID }

func (*cmdSnapshotsTaken) kind() kind      { return kindSnapshotsTaken }
func (x *cmdSnapshotsTaken) walk(c *codec) { u64(c, &x.Group) }

func (x *cmdSnapshotsTaken) apply(e *edit) result {
	group := e.s.SnapshotGroup(x.Group)
	if len(group) == 0 {
		return refuse(codeNotFound, "the snapshot was given up")
	}
	if group[0].State == SnapshotReady {
		return result{ID: uint64(x.Group)}
	}
	e.s.Snapshots = slices.Clone(e.s.Snapshots)
	for i, s := range e.s.Snapshots {
		if s.Group == x.Group {
			ready := *s
			ready.State = SnapshotReady
			e.s.Snapshots[i] = &ready
		}
	}
	e.event(Info, "snapshot-created", "snapshot %s was taken", e.groupNames(group))
	return result{ID: uint64(x.Group)}
}

// cmdSnapshotsFailed gives up a group that is not ready: some of it was not taken.
// What was taken is deleted by the nodes, since no record names it any more.
type cmdSnapshotsFailed struct {
	Group  lsfs.VolumeID
	Reason string
}

func (*cmdSnapshotsFailed) kind() kind { return kindSnapshotsFailed }
func (x *cmdSnapshotsFailed) walk(c *codec) {
	u64(c, &x.Group)
	text(c, &x.Reason)
}

func (x *cmdSnapshotsFailed) apply(e *edit) result {
	group := e.s.SnapshotGroup(x.Group)
	if len(group) == 0 {
		return result{}
	}
	if group[0].State == SnapshotReady {
		return refuse(codeRefused, "snapshot %s is ready", e.snapshotName(group[0]))
	}
	e.event(Warning, "snapshot-failed", "snapshot %s was not taken: %s", e.groupNames(group), x.Reason)
	e.dropSnapshots(func(s *Snapshot) bool { return s.Group == x.Group })
	return result{}
}

// cmdDeleteSnapshots deletes snapshots; those that do not exist are passed over.
type cmdDeleteSnapshots struct {
	IDs []lsfs.VolumeID
	Why string // for the event; empty: an administrator
}

func (*cmdDeleteSnapshots) kind() kind { return kindDeleteSnapshots }
func (x *cmdDeleteSnapshots) walk(c *codec) {
	list(c, &x.IDs, u64[lsfs.VolumeID])
	text(c, &x.Why)
}

func (x *cmdDeleteSnapshots) apply(e *edit) result {
	drop := make(map[lsfs.VolumeID]bool, len(x.IDs))
	var gone []*Snapshot
	for _, id := range x.IDs {
		s := e.s.Snapshot(id)
		if s == nil || drop[id] {
			continue
		}
		if r := e.mayDrop(s); r.Code != codeOK {
			return r
		}
		drop[id] = true
		gone = append(gone, s)
	}
	if len(gone) == 0 {
		return result{}
	}
	names := e.groupNames(gone[:min(len(gone), 8)])
	if len(gone) > 8 {
		names += " and more"
	}
	why := ""
	if x.Why != "" {
		why = ": " + x.Why
	}
	e.event(Info, "snapshot-deleted", "%d snapshots deleted: %s%s", len(gone), names, why)
	e.dropSnapshots(func(s *Snapshot) bool { return drop[s.ID] })
	return result{}
}

// mayDrop says whether a snapshot may be deleted now.
func (e *edit) mayDrop(s *Snapshot) result {
	if s.State == SnapshotPending {
		return refuse(codeRefused, "snapshot %s is being taken; try again in a moment", e.snapshotName(s))
	}
	if v, what := e.s.Using(s.ID); v != nil {
		return refuse(codeRefused, "snapshot %s is needed: volume %s is being %s; try again in a moment", e.snapshotName(s), v.Name, what)
	}
	return result{}
}

// dropVolumeSnapshots takes the snapshots and the schedule of a volume that is
// deleted away with it, or refuses.
func (e *edit) dropVolumeSnapshots(v *Volume, all bool) result {
	mine := e.s.SnapshotsOf(v.ID)
	if len(mine) > 0 && !all {
		return refuse(codeRefused, "volume %s has %d snapshots\n  delete them first, or with the volume: --with-snapshots", v.Name, len(mine))
	}
	for _, s := range mine {
		if r := e.mayDrop(s); r.Code != codeOK {
			return r
		}
	}
	if len(mine) > 0 {
		e.dropSnapshots(func(s *Snapshot) bool { return s.Volume == v.ID })
		e.event(Info, "snapshot-deleted", "%d snapshots of volume %s deleted with it", len(mine), v.Name)
	}
	if e.s.Schedule(v.ID) != nil {
		e.s.Schedules = without(e.s.Schedules, func(x *Schedule) bool { return x.Volume == v.ID })
	}
	return result{}
}

// cmdCloneVolume makes a volume that begins as a snapshot. Its replicas are on the
// nodes of the snapshot's volume.
type cmdCloneVolume struct {
	cmdCreateVolume
	Snapshot lsfs.VolumeID
}

func (*cmdCloneVolume) kind() kind { return kindCloneVolume }
func (x *cmdCloneVolume) walk(c *codec) {
	x.cmdCreateVolume.walk(c)
	u64(c, &x.Snapshot)
}

func (x *cmdCloneVolume) apply(e *edit) result {
	origin := e.s.Snapshot(x.Snapshot)
	if origin == nil {
		return refuse(codeNotFound, "there is no snapshot %d", x.Snapshot)
	}
	v := e.s.Volume(origin.Volume)
	switch {
	case origin.State != SnapshotReady:
		return refuse(codeRefused, "snapshot %s is being taken; try again in a moment", e.snapshotName(origin))
	case v == nil || v.Record.Deleted || v.Record.Owner == 0:
		return refuse(codeRefused, "the volume of snapshot %s has no owner", e.snapshotName(origin))
	case x.SizeBytes < origin.SizeBytes:
		return refuse(codeInvalid, "snapshot %s has %d bytes; a clone of %d would lose data", e.snapshotName(origin), origin.SizeBytes, x.SizeBytes)
	case x.BlockBytes != v.BlockBytes:
		return refuse(codeInvalid, "volume %s has logical blocks of %d bytes; a clone has the same", v.Name, v.BlockBytes)
	}
	r := x.create(e, func() replication.Record {
		rec := replication.Record{Owner: v.Record.Owner, InSync: []replication.NodeID{v.Record.Owner}, Origin: origin.ID}
		for _, p := range v.Record.Replicas {
			rec.Replicas = append(rec.Replicas, replication.Replica{Node: p.Node, ID: replicaID(x.UUID, p.Node)})
		}
		return rec
	})
	if r.Code == codeOK {
		e.event(Info, "volume-cloned", "volume %s begins as snapshot %s", x.Name, e.snapshotName(origin))
	}
	return r
}

// cmdRollback brackets the return of a volume to a snapshot: the snapshot stays
// while it is under way.
type cmdRollback struct {
	Volume   lsfs.VolumeID
	Snapshot lsfs.VolumeID
	// End: it is over. Failure says why it was not done; empty: it was.
	End     bool
	Failure string
}

func (*cmdRollback) kind() kind { return kindRollback }
func (x *cmdRollback) walk(c *codec) {
	u64(c, &x.Volume)
	u64(c, &x.Snapshot)
	c.flag(&x.End)
	text(c, &x.Failure)
}

func (x *cmdRollback) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	s := e.s.Snapshot(x.Snapshot)
	w := *v
	if x.End {
		if v.Restoring != x.Snapshot || x.Snapshot == 0 {
			return result{ID: uint64(v.ID)}
		}
		// Whether or not it is known to have happened: hosts are told to look again.
		w.Restoring = 0
		w.Restored++
		e.setVolume(&w)
		name := "a snapshot"
		if s != nil {
			name = "snapshot " + s.Name
		}
		if x.Failure != "" {
			e.event(Warning, "rollback-failed", "volume %s was not rolled back to %s: %s", v.Name, name, x.Failure)
		} else {
			e.event(Warning, "volume-rolled-back", "volume %s was rolled back to %s", v.Name, name)
		}
		return result{ID: uint64(v.ID)}
	}
	switch {
	case s == nil || s.Volume != v.ID:
		return refuse(codeNotFound, "volume %s has no snapshot %d", v.Name, x.Snapshot)
	case s.State != SnapshotReady:
		return refuse(codeRefused, "snapshot %s is being taken; try again in a moment", e.snapshotName(s))
	case v.Restoring != 0:
		return refuse(codeRefused, "volume %s is being rolled back already", v.Name)
	}
	w.Restoring = s.ID
	e.setVolume(&w)
	return result{ID: uint64(v.ID)}
}

// cmdSetSchedule gives a volume a schedule, in the place of the one that it has.
type cmdSetSchedule struct{ Schedule Schedule }

func (*cmdSetSchedule) kind() kind      { return kindSetSchedule }
func (x *cmdSetSchedule) walk(c *codec) { x.Schedule.walk(c) }

func (x *cmdSetSchedule) apply(e *edit) result {
	n := x.Schedule
	v, r := e.volume(n.Volume)
	switch {
	case v == nil:
		return r
	case n.Every < MinScheduleEvery || n.Every > maxScheduleEvery || n.Every%time.Second != 0:
		return refuse(codeInvalid, "a schedule runs every %s to %d days, in whole seconds", MinScheduleEvery, maxScheduleEvery/(24*time.Hour))
	case n.Keep == 0 || n.Keep+n.KeepDaily > maxScheduleKeep || n.Keep > maxScheduleKeep || n.KeepDaily > maxScheduleKeep:
		return refuse(codeInvalid, "a schedule keeps 1 to %d snapshots", maxScheduleKeep)
	}
	n.Created, n.Last = e.env.Now, time.Time{}
	if old := e.s.Schedule(n.Volume); old != nil {
		n.Last = old.Last
	}
	e.setSchedule(&n)
	slices.SortFunc(e.s.Schedules, func(a, b *Schedule) int { return int(int64(a.Volume) - int64(b.Volume)) })
	e.event(Info, "schedule-set", "snapshots of volume %s every %s, %d kept, and one of each of %d days", v.Name, n.Every, n.Keep, n.KeepDaily)
	return result{ID: uint64(n.Volume)}
}

// cmdRemoveSchedule takes the schedule of a volume away; its snapshots stay.
type cmdRemoveSchedule struct{ Volume lsfs.VolumeID }

func (*cmdRemoveSchedule) kind() kind      { return kindRemoveSchedule }
func (x *cmdRemoveSchedule) walk(c *codec) { u64(c, &x.Volume) }

func (x *cmdRemoveSchedule) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	if e.s.Schedule(x.Volume) == nil {
		return refuse(codeNotFound, "volume %s has no schedule", v.Name)
	}
	e.s.Schedules = without(e.s.Schedules, func(s *Schedule) bool { return s.Volume == x.Volume })
	e.event(Info, "schedule-removed", "the schedule of volume %s was removed", v.Name)
	return result{}
}
