package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

const (
	// snapshotTries is how often a snapshot is tried that failed because the owner
	// of a volume was changing. Each try has an id of its own.
	snapshotTries = 3
	// settleMax is how long the outcome of a failed snapshot is looked for at once;
	// afterwards the keeper goes on with it.
	settleMax = 10 * time.Second
)

// snapshotOf describes a recorded snapshot.
func (n *Node) snapshotOf(state *cluster.State, s *cluster.Snapshot) Snapshot {
	x := Snapshot{ID: s.ID, Name: s.Name, State: SnapshotReady, Created: s.Created, Size: s.SizeBytes, Scheduled: s.Scheduled}
	if s.State == cluster.SnapshotPending {
		x.State = SnapshotPending
	}
	name := func(id lsfs.VolumeID) string {
		if v := state.Volume(id); v != nil {
			return v.Name
		}
		return fmt.Sprintf("volume %d", id)
	}
	x.Volume = name(s.Volume)
	if n.store != nil {
		if c := n.store.Snapshot(s.ID); c != nil {
			x.Mapped = c.MappedBlocks() * 4096
		}
	}
	for _, y := range state.SnapshotGroup(s.Group) {
		x.Group = append(x.Group, name(y.Volume))
	}
	for _, v := range state.Volumes {
		if !v.Record.Deleted && v.Record.Origin == s.ID {
			x.Clones = append(x.Clones, v.Name)
		}
	}
	return x
}

// Snapshots lists the snapshots of a volume, or of all when the name is empty,
// oldest first.
func (n *Node) Snapshots(ctx context.Context, volume string) ([]Snapshot, error) {
	state := n.cluster.State()
	list := state.Snapshots
	if volume != "" {
		s, v, err := n.volumeNamed(ctx, volume)
		if err != nil {
			return nil, err
		}
		state, list = s, s.SnapshotsOf(v.ID)
	}
	out := make([]Snapshot, len(list))
	for i, s := range list {
		out[i] = n.snapshotOf(state, s)
	}
	return out, nil
}

// snapshotNamed finds a snapshot in a state as fresh as the quorum's.
func (n *Node) snapshotNamed(ctx context.Context, volume, name string) (*cluster.State, *cluster.Volume, *cluster.Snapshot, error) {
	state, v, err := n.volumeNamed(ctx, volume)
	if err != nil {
		return nil, nil, nil, err
	}
	s := state.SnapshotNamed(v.ID, name)
	if s == nil {
		return nil, nil, nil, fmt.Errorf("snapshot %s@%s: %w", v.Name, name, ErrNotFound)
	}
	return state, v, s, nil
}

// CreateSnapshots takes a snapshot of each volume at one moment. Every in-sync copy
// has all of them on return. A repeated call with a request id that is not empty
// returns the snapshots of the first, which may have failed meanwhile (ErrNotFound).
func (n *Node) CreateSnapshots(ctx context.Context, name string, volumes []string, request string) ([]Snapshot, error) {
	if len(volumes) == 0 {
		return nil, fmt.Errorf("%w: no volume is named", ErrInvalid)
	}
	var ids []lsfs.VolumeID
	for _, text := range volumes {
		_, v, err := n.volumeNamed(ctx, text)
		if err != nil {
			return nil, err
		}
		ids = append(ids, v.ID)
	}
	if request == "" {
		request = uuid.NewString()
	}
	return n.takeSnapshots(ctx, name, ids, request, false)
}

// takeSnapshots records, takes and records as ready; after a failure it finds out
// what happened, so that nothing is left behind.
func (n *Node) takeSnapshots(ctx context.Context, name string, volumes []lsfs.VolumeID, request string, scheduled bool) ([]Snapshot, error) {
	for try := 0; ; try++ {
		once := request
		if try > 0 {
			once = fmt.Sprintf("%s/%d", request, try)
		}
		group, err := n.cluster.TakeSnapshots(ctx, once, name, volumes, scheduled)
		if err != nil {
			return nil, err
		}
		state := n.cluster.State()
		list := state.SnapshotGroup(group)
		if len(list) == 0 {
			return nil, fmt.Errorf("snapshot %s was given up: %w", name, ErrNotFound)
		}
		if list[0].State == cluster.SnapshotReady {
			return n.groupOf(group), nil // a repeated request
		}
		err = n.takeGroup(ctx, state, list)
		if err == nil {
			err = n.cluster.SnapshotsTaken(ctx, group)
		}
		if err == nil {
			return n.groupOf(group), nil
		}
		// The request may have ended; the outcome is looked for all the same.
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleMax)
		ready, settleErr := n.settleSnapshots(after, group, err.Error())
		cancel()
		switch {
		case ready:
			return n.groupOf(group), nil
		case settleErr != nil:
			return nil, fmt.Errorf("snapshot %s: %w: %w (what came of it: %w)", name, ErrOutcomeUnknown, err, settleErr)
		case ctx.Err() == nil && try+1 < snapshotTries && errors.Is(err, ErrNotReady):
			continue
		}
		return nil, fmt.Errorf("snapshot %s was not taken: %w", name, err)
	}
}

func (n *Node) groupOf(group lsfs.VolumeID) []Snapshot {
	state := n.cluster.State()
	var out []Snapshot
	for _, s := range state.SnapshotGroup(group) {
		out = append(out, n.snapshotOf(state, s))
	}
	return out
}

// takeGroup has the owners take the snapshots of a group. With more than one, all
// volumes are frozen first, in the order of their ids as clones between volumes
// are (replication), so that none waits for the other.
func (n *Node) takeGroup(ctx context.Context, state *cluster.State, group []*cluster.Snapshot) error {
	if len(group) == 1 {
		_, err := n.stepAt(ctx, state, SnapshotStep{Act: ActTake, Volume: group[0].Volume, Snapshot: group[0].ID})
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, replication.FreezeMax)
	defer cancel()
	step := func(ctx context.Context, act SnapshotAct, s *cluster.Snapshot) error {
		_, err := n.stepAt(ctx, state, SnapshotStep{Act: act, Volume: s.Volume, Snapshot: s.ID, Group: s.Group})
		return err
	}
	frozen := 0
	var err error
	for _, s := range group {
		if err = step(ctx, ActFreeze, s); err != nil {
			break
		}
		frozen++
	}
	if err != nil {
		// The one that failed may be frozen as well: its answer may have been lost.
		thaw, cancel := context.WithTimeout(context.WithoutCancel(ctx), replication.FreezeMax)
		defer cancel()
		var wait sync.WaitGroup
		for _, s := range group[:min(frozen+1, len(group))] {
			wait.Go(func() { _ = step(thaw, ActThaw, s) }) // they thaw by themselves as well
		}
		wait.Wait()
		return err
	}
	errs := make([]error, len(group))
	var wait sync.WaitGroup
	for i, s := range group {
		wait.Go(func() { errs[i] = step(ctx, ActTakeFrozen, s) })
	}
	wait.Wait()
	return errors.Join(errs...)
}

// settleSnapshots asks the owners whether the snapshots of a group are there, and
// records it. An error says that this is not known yet.
func (n *Node) settleSnapshots(ctx context.Context, group lsfs.VolumeID, reason string) (ready bool, err error) {
	for {
		state, err := n.cluster.Sync(ctx)
		if err != nil {
			return false, err
		}
		list := state.SnapshotGroup(group)
		switch {
		case len(list) == 0:
			return false, nil
		case list[0].State == cluster.SnapshotReady:
			return true, nil
		}
		all, err := true, error(nil)
		for _, s := range list {
			found, e := n.stepAt(ctx, state, SnapshotStep{Act: ActFind, Volume: s.Volume, Snapshot: s.ID})
			if e != nil {
				err = e
			}
			all = all && found
		}
		switch {
		case err == nil && all:
			return true, n.cluster.SnapshotsTaken(ctx, group)
		case err == nil:
			return false, n.cluster.SnapshotsFailed(ctx, group, reason)
		}
		pause := time.NewTimer(200 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return false, err
		}
	}
}

// stepAt has the owner of a volume do one step.
func (n *Node) stepAt(ctx context.Context, state *cluster.State, step SnapshotStep) (found bool, err error) {
	v := state.Volume(step.Volume)
	if v == nil || v.Record.Deleted {
		return false, fmt.Errorf("volume %d: %w", step.Volume, ErrNotFound)
	}
	err = n.atOwner(state, v, false,
		func(*serving) (err error) {
			found, err = n.SnapshotStep(ctx, step)
			return err
		},
		func(p Peers, owner *cluster.Node) (err error) {
			found, err = p.SnapshotStep(ctx, owner.ID, n.api(owner), step)
			return err
		})
	return found, err
}

// SnapshotStep does one step on this node, the owner of the volume. Of ActFind the
// answer is whether the snapshot is there, on every copy in sync.
func (n *Node) SnapshotStep(ctx context.Context, step SnapshotStep) (found bool, err error) {
	parts := n.serving.Load()
	if parts == nil {
		return false, fmt.Errorf("node %s is starting: %w", n.id.Name, ErrNotReady)
	}
	v := parts.replication.Volume(step.Volume)
	if v == nil {
		return false, fmt.Errorf("volume %d: %w", step.Volume, ErrNotFound)
	}
	switch step.Act {
	case ActTake:
		err = v.TakeSnapshot(ctx, step.Snapshot)
	case ActFreeze:
		err = v.Freeze(ctx, step.Group)
	case ActTakeFrozen:
		err = v.TakeFrozen(ctx, step.Group, step.Snapshot)
	case ActThaw:
		v.Thaw(step.Group)
	case ActFind:
		found, err = v.FindSnapshot(ctx, step.Snapshot)
	case ActRollBack:
		err = v.RollBack(ctx, step.Snapshot)
	default:
		err = fmt.Errorf("%w: step %q", ErrInvalid, step.Act)
	}
	switch {
	case errors.Is(err, replication.ErrNotOwner), errors.Is(err, replication.ErrBusy):
		return false, fmt.Errorf("volume %d is changing its owner: %w (%w)", step.Volume, ErrNotReady, err)
	case errors.Is(err, replication.ErrNoSnapshot):
		return false, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return found, err
}

// DeleteSnapshot deletes a snapshot. With dryRun nothing changes.
func (n *Node) DeleteSnapshot(ctx context.Context, volume, name string, dryRun bool) (*Snapshot, error) {
	state, _, s, err := n.snapshotNamed(ctx, volume, name)
	if err != nil {
		return nil, err
	}
	out := n.snapshotOf(state, s)
	if dryRun {
		return &out, nil
	}
	return &out, n.cluster.DeleteSnapshots(ctx, []lsfs.VolumeID{s.ID}, "")
}

// CloneSnapshot makes a volume that begins as a snapshot, on the same nodes.
func (n *Node) CloneSnapshot(ctx context.Context, spec CloneSpec) (*Volume, error) {
	state, v, s, err := n.snapshotNamed(ctx, spec.Volume, spec.Snapshot)
	if err != nil {
		return nil, err
	}
	// A copy that was promoted by force may lack what the record names: nothing could be
	// made from it.
	found, err := n.stepAt(ctx, state, SnapshotStep{Act: ActFind, Volume: v.ID, Snapshot: s.ID})
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("%w: the owner of volume %s does not have snapshot %s\n  delete it: twinsan snapshot delete %s@%s", ErrRefused, v.Name, s.Name, v.Name, s.Name)
	}
	size := spec.Size
	if size == 0 {
		size = s.SizeBytes
	}
	if size%4096 != 0 {
		return nil, fmt.Errorf("%w: the size is %d bytes; want a multiple of 4 KiB", ErrInvalid, size)
	}
	c, err := n.cluster.CloneVolume(ctx, s.ID, cluster.VolumeSpec{
		Name: spec.Name, SizeBytes: size, BlockBytes: v.BlockBytes, PhysicalBytes: v.PhysicalBytes, Thick: !v.Thin,
		NoDedup: !v.Record.Dedup, NoCompress: !v.Record.Compress, Hosts: spec.Hosts, AnyHost: spec.AnyHost, RequestID: spec.RequestID,
	})
	if err != nil {
		return nil, err
	}
	return n.described(ctx, c.ID)
}

// RollBackVolume makes a volume what a snapshot of it holds. It is refused while
// hosts that see the volume are logged in, unless inUse: they know nothing of it
// and would write what they have in memory over it. With dryRun nothing changes.
func (n *Node) RollBackVolume(ctx context.Context, volume, snapshot string, dryRun, inUse bool) (*Volume, *Snapshot, []Session, error) {
	state, v, s, err := n.snapshotNamed(ctx, volume, snapshot)
	if err != nil {
		return nil, nil, nil, err
	}
	out, err := n.described(ctx, v.ID)
	if err != nil {
		return nil, nil, nil, err
	}
	using, err := n.using(ctx, state, v)
	if err != nil {
		return nil, nil, nil, err
	}
	about := n.snapshotOf(state, s)
	if len(using) > 0 && !inUse {
		return nil, nil, nil, fmt.Errorf("%w: volume %s is in use: %s is logged in to node %s\n  log its hosts out first (they would write over it what they have in memory), or roll it back all the same: --in-use", ErrRefused, v.Name, using[0].Initiator, using[0].Node)
	}
	if dryRun {
		return out, &about, using, nil
	}
	if err := n.cluster.BeginRollback(ctx, v.ID, s.ID); err != nil {
		return nil, nil, nil, err
	}
	_, err = n.stepAt(ctx, n.cluster.State(), SnapshotStep{Act: ActRollBack, Volume: v.ID, Snapshot: s.ID})
	failure := ""
	if err != nil {
		failure = err.Error()
	}
	// The request may have ended; that it is over must be recorded all the same.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleMax)
	defer cancel()
	if e := n.cluster.EndRollback(after, v.ID, s.ID, failure); e != nil {
		err = errors.Join(err, e)
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("roll volume %s back to snapshot %s: %w", v.Name, s.Name, err)
	}
	out, err = n.described(ctx, v.ID)
	return out, &about, using, err
}

// changesBatch is how many ranges are sent at a time.
const changesBatch = 1024

// Changes sends the ranges in which two snapshots differ, in the order of offsets;
// next is where to go on after a failure. It runs where the snapshots are: on this
// node, else on the volume's owner. They never change, so any node that holds them
// has the right answer.
func (n *Node) Changes(ctx context.Context, spec ChangesSpec, send func(ranges []ChangedRange, next uint64) error) error {
	state, v, to, err := n.snapshotNamed(ctx, spec.Volume, spec.To)
	if err != nil {
		return err
	}
	var from lsfs.VolumeID
	if spec.From != "" {
		s := state.SnapshotNamed(v.ID, spec.From)
		if s == nil {
			return fmt.Errorf("snapshot %s@%s: %w", v.Name, spec.From, ErrNotFound)
		}
		from = s.ID
		if s.State == cluster.SnapshotPending {
			to = s
		}
	}
	if to.State == cluster.SnapshotPending {
		return fmt.Errorf("snapshot %s@%s is being taken: %w", v.Name, to.Name, ErrNotReady)
	}
	if spec.Offset%4096 != 0 {
		return fmt.Errorf("%w: offset %d is no multiple of 4 KiB", ErrInvalid, spec.Offset)
	}
	if n.store == nil || n.store.Snapshot(to.ID) == nil || from != 0 && n.store.Snapshot(from) == nil {
		owner := state.Node(v.Record.Owner)
		peers := n.peers.Load()
		if spec.OwnerOnly || owner == nil || owner.ID == n.cluster.Self() || peers == nil || owner.API == "" {
			return fmt.Errorf("no node that holds the snapshots can be asked: %w", ErrNotReady)
		}
		spec.OwnerOnly = true
		return (*peers).Changes(ctx, owner.ID, n.api(owner), spec, send)
	}
	return n.changesHere(ctx, from, to, spec.Offset, send)
}

func (n *Node) changesHere(ctx context.Context, from lsfs.VolumeID, to *cluster.Snapshot, offset uint64, send func([]ChangedRange, uint64) error) error {
	found := make([]lsfs.Extent, 0, changesBatch)
	var ranges []ChangedRange
	at, end := lsfs.BlockNo(offset/4096), lsfs.BlockNo(to.SizeBytes/4096)
	for {
		ranges = ranges[:0]
		start := at
		var err error
		if at < end {
			if found, at, err = n.store.ChangedRanges(ctx, from, to.ID, start, found[:0]); err != nil {
				return fmt.Errorf("compare snapshots: %w", err)
			}
			if at <= start {
				at = end
			}
		}
		at = min(at, end)
		for _, e := range found {
			if !e.Same && start < end {
				ranges = append(ranges, ChangedRange{Offset: uint64(start) * 4096, Length: min(e.Blocks, uint64(end-start)) * 4096, Hole: !e.Mapped})
			}
			start += lsfs.BlockNo(e.Blocks)
		}
		found = found[:0]
		for first := true; first || len(ranges) > 0; first = false {
			part := ranges[:min(len(ranges), changesBatch)]
			ranges = ranges[len(part):]
			next := uint64(at) * 4096
			if len(ranges) > 0 {
				next = ranges[0].Offset
			}
			if err := send(part, next); err != nil {
				return err
			}
		}
		if at >= end {
			return nil
		}
	}
}

// scheduleOf describes a schedule.
func scheduleOf(state *cluster.State, s *cluster.Schedule, now time.Time) Schedule {
	x := Schedule{Every: s.Every, Keep: int(s.Keep), KeepDaily: int(s.KeepDaily), Last: s.Last, Next: s.Next(now)}
	if v := state.Volume(s.Volume); v != nil {
		x.Volume = v.Name
	}
	for _, y := range state.SnapshotsOf(s.Volume) {
		if y.Scheduled {
			x.Snapshots++
		}
	}
	return x
}

// Schedules lists the schedules by the names of their volumes.
func (n *Node) Schedules(context.Context) ([]Schedule, error) {
	state := n.cluster.State()
	out := make([]Schedule, len(state.Schedules))
	for i, s := range state.Schedules {
		out[i] = scheduleOf(state, s, time.Now())
	}
	slices.SortFunc(out, func(a, b Schedule) int { return strings.Compare(a.Volume, b.Volume) })
	return out, nil
}

// SetSchedule gives a volume a schedule in the place of the one that it has.
func (n *Node) SetSchedule(ctx context.Context, volume string, every time.Duration, keep, keepDaily int) (*Schedule, error) {
	_, v, err := n.volumeNamed(ctx, volume)
	if err != nil {
		return nil, err
	}
	if keep < 1 || keepDaily < 0 || keep > cluster.MaxVolumeSnapshots || keepDaily > cluster.MaxVolumeSnapshots {
		return nil, fmt.Errorf("%w: a schedule keeps 1 to %d snapshots", ErrInvalid, cluster.MaxVolumeSnapshots)
	}
	if err := n.cluster.SetSchedule(ctx, v.ID, every, uint32(keep), uint32(keepDaily)); err != nil {
		return nil, err
	}
	state := n.cluster.State()
	s := state.Schedule(v.ID)
	if s == nil {
		return nil, fmt.Errorf("schedule of volume %s: %w", v.Name, ErrNotFound)
	}
	out := scheduleOf(state, s, time.Now())
	return &out, nil
}

// RemoveSchedule takes the schedule of a volume away; its snapshots stay.
func (n *Node) RemoveSchedule(ctx context.Context, volume string) error {
	_, v, err := n.volumeNamed(ctx, volume)
	if err != nil {
		return err
	}
	return n.cluster.RemoveSchedule(ctx, v.ID)
}
