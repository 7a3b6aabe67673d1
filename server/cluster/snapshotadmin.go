package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
)

// TakeSnapshots records that a snapshot of each of the volumes, at one moment, is
// about to be taken. They are pending until SnapshotsTaken or SnapshotsFailed with
// the id of the first, which is returned; the others have the next ids, in the
// order of the ids of the volumes. A repeated call with the same request has the
// effect of one. Errors: ErrNotFound, ErrExists, ErrInvalid, ErrRefused (a limit),
// ErrNoQuorum.
func (c *Cluster) TakeSnapshots(ctx context.Context, request, name string, volumes []lsfs.VolumeID, scheduled bool) (lsfs.VolumeID, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	ids := slices.Clone(volumes)
	slices.Sort(ids)
	r, err := c.proposeOnce(ctx, request, &cmdTakeSnapshots{Name: name, Volumes: ids, Scheduled: scheduled})
	return lsfs.VolumeID(r.ID), err
}

// SnapshotsTaken records that every in-sync copy has the snapshots of a group.
// ErrNotFound: they were given up before.
func (c *Cluster) SnapshotsTaken(ctx context.Context, group lsfs.VolumeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdSnapshotsTaken{group})
	return err
}

// SnapshotsFailed gives up a group of which some were not taken. ErrRefused: it is ready.
func (c *Cluster) SnapshotsFailed(ctx context.Context, group lsfs.VolumeID, reason string) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdSnapshotsFailed{group, reason[:min(len(reason), maxText)]})
	return err
}

// DeleteSnapshots records that snapshots are deleted; those that do not exist are
// passed over. Every node frees its own by itself, an absent one when it is back.
// It is refused (ErrRefused) while one of them is pending or in use. why is for the
// event and may be empty.
func (c *Cluster) DeleteSnapshots(ctx context.Context, ids []lsfs.VolumeID, why string) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdDeleteSnapshots{ids, why})
	return err
}

// CloneVolume makes a volume that begins as a snapshot, on the nodes of the
// snapshot's volume. BlockBytes must be that volume's, and SizeBytes not below the
// snapshot's. Errors are those of CreateVolume.
func (c *Cluster) CloneVolume(ctx context.Context, snapshot lsfs.VolumeID, spec VolumeSpec) (*Volume, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	x := &cmdCloneVolume{Snapshot: snapshot}
	x.Name, x.UUID, x.SizeBytes, x.BlockBytes, x.PhysicalBytes = spec.Name, uuid.New(), spec.SizeBytes, spec.BlockBytes, spec.PhysicalBytes
	x.Dedup, x.Compress, x.Thin, x.AnyHost, x.Hosts = !spec.NoDedup, !spec.NoCompress, !spec.Thick, spec.AnyHost, spec.Hosts
	rand.Read(x.NAA[:])
	x.NAA[0] = 0x30 | x.NAA[0]&0x0f
	x.Serial = strings.ToUpper(hex.EncodeToString(x.UUID[:8]))
	r, err := c.proposeOnce(ctx, spec.RequestID, x)
	if err != nil {
		return nil, err
	}
	return c.volume(lsfs.VolumeID(r.ID))
}

// BeginRollback records that a volume is being rolled back to one of its snapshots,
// which cannot be deleted until EndRollback.
func (c *Cluster) BeginRollback(ctx context.Context, volume, snapshot lsfs.VolumeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdRollback{Volume: volume, Snapshot: snapshot})
	return err
}

// EndRollback records that it is over, with the reason if it was not done.
func (c *Cluster) EndRollback(ctx context.Context, volume, snapshot lsfs.VolumeID, failure string) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdRollback{Volume: volume, Snapshot: snapshot, End: true, Failure: failure[:min(len(failure), maxText)]})
	return err
}

// SetSchedule gives a volume a schedule, in the place of the one that it has.
func (c *Cluster) SetSchedule(ctx context.Context, volume lsfs.VolumeID, every time.Duration, keep, keepDaily uint32) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if every < 0 || every > maxScheduleEvery || every%time.Second != 0 {
		return errorf(ErrInvalid, "a schedule runs every %s to %d days, in whole seconds", MinScheduleEvery, maxScheduleEvery/(24*time.Hour))
	}
	_, err := c.proposeSync(ctx, &cmdSetSchedule{Schedule{Volume: volume, Every: every, Keep: keep, KeepDaily: keepDaily}})
	return err
}

// RemoveSchedule takes the schedule of a volume away; its snapshots stay.
func (c *Cluster) RemoveSchedule(ctx context.Context, volume lsfs.VolumeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdRemoveSchedule{volume})
	return err
}
