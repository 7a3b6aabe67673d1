package apitest

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/server"
)

// Snapshots lists those of a volume, or all.
func (b *Backend) Snapshots(_ context.Context, volume string) ([]server.Snapshot, error) {
	if err := b.begin("Snapshots " + volume); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	if volume == "" {
		return slices.Clone(b.SnapshotList), nil
	}
	v, err := b.volume(volume)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(b.SnapshotList), func(s server.Snapshot) bool { return s.Volume != v.Name }), nil
}

func (b *Backend) snapshot(volume, name string) (*server.Volume, *server.Snapshot, error) {
	v, err := b.volume(volume)
	if err != nil {
		return nil, nil, err
	}
	for i := range b.SnapshotList {
		if s := &b.SnapshotList[i]; s.Volume == v.Name && s.Name == name {
			return v, s, nil
		}
	}
	return nil, nil, fmt.Errorf("snapshot %s@%s: %w", v.Name, name, server.ErrNotFound)
}

// CreateSnapshots takes a snapshot of each volume.
func (b *Backend) CreateSnapshots(_ context.Context, name string, volumes []string, _ string) ([]server.Snapshot, error) {
	if err := b.begin(fmt.Sprintf("CreateSnapshots %s %v", name, volumes)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	var out []server.Snapshot
	for _, text := range volumes {
		v, err := b.volume(text)
		if err != nil {
			return nil, err
		}
		if _, _, err := b.snapshot(text, name); err == nil {
			return nil, fmt.Errorf("%w: there is a snapshot %s@%s already", server.ErrExists, v.Name, name)
		}
		v.Snapshots++
		out = append(out, server.Snapshot{ID: lsfs.VolumeID(100 + len(b.SnapshotList) + len(out)), Name: name, Volume: v.Name, State: server.SnapshotReady,
			Created: Epoch, Size: v.Size, Mapped: v.Mapped})
	}
	for i := range out {
		for _, s := range out {
			out[i].Group = append(out[i].Group, s.Volume)
		}
	}
	b.SnapshotList = append(b.SnapshotList, out...)
	return out, nil
}

// DeleteSnapshot deletes one.
func (b *Backend) DeleteSnapshot(_ context.Context, volume, name string, dryRun bool) (*server.Snapshot, error) {
	if err := b.begin(fmt.Sprintf("DeleteSnapshot %s@%s dry=%v", volume, name, dryRun)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, s, err := b.snapshot(volume, name)
	if err != nil {
		return nil, err
	}
	gone := *s
	if !dryRun {
		v.Snapshots--
		b.SnapshotList = slices.DeleteFunc(b.SnapshotList, func(x server.Snapshot) bool { return x.ID == gone.ID })
	}
	return &gone, nil
}

// Changes sends two ranges, one by one.
func (b *Backend) Changes(_ context.Context, spec server.ChangesSpec, send func([]server.ChangedRange, uint64) error) error {
	if err := b.begin(fmt.Sprintf("Changes %+v", spec)); err != nil {
		return err
	}
	_, s, err := b.snapshot(spec.Volume, spec.To)
	if err == nil && spec.From != "" {
		_, _, err = b.snapshot(spec.Volume, spec.From)
	}
	b.Mu.Unlock()
	if err != nil {
		return err
	}
	for _, r := range []server.ChangedRange{{Offset: 0, Length: 1 << 20}, {Offset: 4 << 20, Length: 4096, Hole: true}} {
		if r.Offset+r.Length <= spec.Offset {
			continue
		}
		if err := send([]server.ChangedRange{r}, r.Offset+r.Length); err != nil {
			return err
		}
	}
	return send(nil, s.Size)
}

// CloneSnapshot makes a volume.
func (b *Backend) CloneSnapshot(_ context.Context, spec server.CloneSpec) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("CloneSnapshot %s@%s %s", spec.Volume, spec.Snapshot, spec.Name)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, s, err := b.snapshot(spec.Volume, spec.Snapshot)
	if err != nil {
		return nil, err
	}
	s.Clones = append(s.Clones, spec.Name)
	origin := v.Name + "@" + s.Name
	c := b.add(server.VolumeSpec{Name: spec.Name, Size: max(s.Size, spec.Size), Hosts: spec.Hosts, AnyHost: spec.AnyHost, Dedup: true, Compress: true})
	c.Origin = origin
	out := *c
	return &out, nil
}

// RollBackVolume refuses a volume of a host with sessions unless inUse.
func (b *Backend) RollBackVolume(_ context.Context, volume, name string, dryRun, inUse bool) (*server.Volume, *server.Snapshot, []server.Session, error) {
	if err := b.begin(fmt.Sprintf("RollBackVolume %s@%s dry=%v", volume, name, dryRun)); err != nil {
		return nil, nil, nil, err
	}
	defer b.Mu.Unlock()
	v, s, err := b.snapshot(volume, name)
	if err != nil {
		return nil, nil, nil, err
	}
	var using []server.Session
	for _, x := range b.SessionList {
		if v.AnyHost || slices.Contains(v.Hosts, x.Host) {
			using = append(using, x)
		}
	}
	if len(using) > 0 && !inUse {
		return nil, nil, nil, fmt.Errorf("%w: volume %s is in use by %s", server.ErrRefused, v.Name, using[0].Initiator)
	}
	out, about := *v, *s
	return &out, &about, using, nil
}

// Schedules lists them.
func (b *Backend) Schedules(context.Context) ([]server.Schedule, error) {
	if err := b.begin("Schedules"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	return slices.Clone(b.ScheduleList), nil
}

// SetSchedule sets one.
func (b *Backend) SetSchedule(_ context.Context, volume string, every time.Duration, keep, keepDaily int) (*server.Schedule, error) {
	if err := b.begin(fmt.Sprintf("SetSchedule %s %s %d %d", volume, every, keep, keepDaily)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(volume)
	if err != nil {
		return nil, err
	}
	x := server.Schedule{Volume: v.Name, Every: every, Keep: keep, KeepDaily: keepDaily, Next: Epoch.Truncate(every).Add(every)}
	b.ScheduleList = append(slices.DeleteFunc(b.ScheduleList, func(s server.Schedule) bool { return s.Volume == v.Name }), x)
	return &x, nil
}

// RemoveSchedule removes one.
func (b *Backend) RemoveSchedule(_ context.Context, volume string) error {
	if err := b.begin("RemoveSchedule " + volume); err != nil {
		return err
	}
	defer b.Mu.Unlock()
	n := len(b.ScheduleList)
	b.ScheduleList = slices.DeleteFunc(b.ScheduleList, func(s server.Schedule) bool { return s.Volume == volume })
	if len(b.ScheduleList) == n {
		return fmt.Errorf("schedule of volume %s: %w", volume, server.ErrNotFound)
	}
	return nil
}

// SnapshotStep finds everything.
func (b *Backend) SnapshotStep(_ context.Context, step server.SnapshotStep) (bool, error) {
	if err := b.begin(fmt.Sprintf("SnapshotStep %+v", step)); err != nil {
		return false, err
	}
	defer b.Mu.Unlock()
	return true, nil
}
