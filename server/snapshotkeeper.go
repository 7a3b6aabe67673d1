package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/server/cluster"
)

const (
	// keeperEvery is how often schedules and what is left over are looked at.
	keeperEvery = time.Second
	// settleAfter is how long a snapshot may be pending, or a rollback under way,
	// before the keeper asks what came of it: whoever began it is gone by then.
	settleAfter = 30 * time.Second
	// sweepEvery is how often snapshots in the store are looked at that no record names.
	sweepEvery = 10 * time.Second
	// keeperMax is how long one act of the keeper may take.
	keeperMax = 20 * time.Second
	// scheduleRetry is how long a schedule waits after a run that could not even be recorded.
	scheduleRetry = 30 * time.Second
	// schedulesAtOnce bounds the runs of schedules that are at work at the same time.
	schedulesAtOnce = 8
)

// keeper runs the schedules of snapshots, on the node that leads the cluster, and
// finishes what was left over: snapshots and rollbacks whose outcome nobody waits
// for any more, and on every node snapshots that no record names. It is owned by
// one goroutine.
type keeper struct {
	swept   time.Time
	since   map[lsfs.VolumeID]time.Time // pending groups and restoring volumes: since when this node has led and seen them
	backoff map[lsfs.VolumeID]time.Time // schedules: no run before
}

func newKeeper() *keeper {
	return &keeper{since: map[lsfs.VolumeID]time.Time{}, backoff: map[lsfs.VolumeID]time.Time{}}
}

// keep is one look.
func (n *Node) keep(ctx context.Context, k *keeper, now time.Time) {
	state, parts := n.cluster.State(), n.serving.Load()
	if parts == nil {
		return
	}
	if now.Sub(k.swept) >= sweepEvery || now.Before(k.swept) {
		k.swept = now
		parts.replication.ReconcileSnapshots(state.KnownSnapshots())
	}
	if n.cluster.Leader() != n.cluster.Self() {
		clear(k.since)
		return
	}
	n.finishLeftOvers(ctx, k, state, now)
	n.runSchedules(ctx, k, state, now)
}

// runSchedules runs what is due, some at a time: one volume that nobody serves
// must not hold up the others.
func (n *Node) runSchedules(ctx context.Context, k *keeper, state *cluster.State, now time.Time) {
	var due []*cluster.Schedule
	for _, s := range state.Schedules {
		if _, ok := s.Due(now); ok && !now.Before(k.backoff[s.Volume]) {
			due = append(due, s)
		}
	}
	again := make([]time.Time, len(due))
	var group errgroup.Group
	group.SetLimit(schedulesAtOnce)
	for i, s := range due {
		group.Go(func() error {
			if ctx.Err() == nil {
				again[i] = n.runSchedule(ctx, state, s, now)
			}
			return nil
		})
	}
	_ = group.Wait() // failures are events
	for i, s := range due {
		if again[i].IsZero() {
			delete(k.backoff, s.Volume)
		} else {
			k.backoff[s.Volume] = again[i]
		}
	}
}

// finishLeftOvers settles what is pending for too long.
func (n *Node) finishLeftOvers(ctx context.Context, k *keeper, state *cluster.State, now time.Time) {
	open := map[lsfs.VolumeID]bool{}
	old := func(id lsfs.VolumeID) bool {
		open[id] = true
		since, seen := k.since[id]
		if !seen {
			k.since[id] = now
		}
		return seen && now.Sub(since) >= settleAfter
	}
	for _, s := range state.Snapshots {
		if s.State != cluster.SnapshotPending || s.ID != s.Group || !old(s.Group) {
			continue
		}
		once, cancel := context.WithTimeout(ctx, keeperMax)
		ready, err := n.settleSnapshots(once, s.Group, "nobody waited for it any more")
		cancel()
		n.log.Info("a snapshot that was left over is settled", "snapshot", s.Name, "ready", ready, "err", err)
	}
	for _, v := range state.Volumes {
		if v.Restoring == 0 || v.Record.Deleted || !old(v.ID) {
			continue
		}
		once, cancel := context.WithTimeout(ctx, keeperMax)
		// The answer comes when no rollback is at work any more.
		_, err := n.stepAt(once, state, SnapshotStep{Act: ActFind, Volume: v.ID, Snapshot: v.Restoring})
		if err == nil {
			err = n.cluster.EndRollback(once, v.ID, v.Restoring, "nobody waited for its end; look at the content before you go on")
		}
		cancel()
		n.log.Info("a rollback that was left over is settled", "volume", v.Name, "err", err)
	}
	for id := range k.since {
		if !open[id] {
			delete(k.since, id)
		}
	}
}

// runSchedule takes the snapshot of one run and deletes what the schedule has
// outlived. A failure is an event, and the next run comes in its time; what could
// not even be recorded is tried again at the time that is returned.
func (n *Node) runSchedule(ctx context.Context, state *cluster.State, s *cluster.Schedule, now time.Time) (again time.Time) {
	at, _ := s.Due(now)
	v := state.Volume(s.Volume)
	if v == nil || v.Record.Deleted {
		return again
	}
	ctx, cancel := context.WithTimeout(ctx, keeperMax)
	defer cancel()
	name := "auto-" + at.UTC().Format("20060102-150405")
	if _, err := n.takeSnapshots(ctx, name, []lsfs.VolumeID{v.ID}, fmt.Sprintf("schedule %d %s", v.ID, name), true); err != nil {
		if errors.Is(err, ErrNoQuorum) {
			return now.Add(scheduleRetry)
		}
		n.journal.report(slog.LevelWarn, "schedule-failed", fmt.Sprintf("the scheduled snapshot %s@%s was not taken: %v", v.Name, name, err))
		return s.Next(now)
	}
	state = n.cluster.State()
	if s = state.Schedule(v.ID); s == nil {
		return again
	}
	var ids []lsfs.VolumeID
	for _, x := range s.Expired(state.SnapshotsOf(v.ID)) {
		if user, _ := state.Using(x.ID); user == nil {
			ids = append(ids, x.ID)
		}
	}
	if len(ids) == 0 {
		return again
	}
	if err := n.cluster.DeleteSnapshots(ctx, ids, "by the schedule of volume "+v.Name); err != nil {
		n.journal.report(slog.LevelWarn, "schedule-failed", fmt.Sprintf("old scheduled snapshots of volume %s were not deleted: %v", v.Name, err))
	}
	return again
}
