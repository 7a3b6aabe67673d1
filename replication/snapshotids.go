package replication

import (
	"errors"
	"slices"

	"github.com/twinsan/twinsan/lsfs"
)

// KnownSnapshots are the snapshots that the cluster has a record of.
type KnownSnapshots struct {
	// Next is the next id that the cluster hands out: what has this id or a higher
	// one is younger than the record.
	Next lsfs.VolumeID
	// Of names the volume of a recorded snapshot; 0: there is no record of it.
	Of func(snapshot lsfs.VolumeID) lsfs.VolumeID
}

// ReconcileSnapshots deletes the snapshots of this node that no record names, and
// those of volumes that are placed elsewhere. A record that is older than the pool,
// which knows ids that the record has not handed out yet, deletes nothing. It may
// take I/O, and returns when it has.
func (n *Node) ReconcileSnapshots(known KnownSnapshots) {
	n.reconcile.Lock()
	defer n.reconcile.Unlock()
	list := n.pool.Snapshots(0)
	if len(list) == 0 || mutant("S-reconcile") {
		return
	}
	young := func(id lsfs.VolumeID) bool { return id >= known.Next }
	if slices.ContainsFunc(n.pool.Copies(), young) || slices.ContainsFunc(list, func(s SnapshotCopy) bool { return young(s.ID()) }) {
		return
	}
	for _, s := range list {
		of := known.Of(s.ID())
		if v := n.Volume(of); of != 0 && (v == nil || v.placedHere()) {
			continue
		}
		if err := n.pool.DeleteSnapshot(n.ctx, s.ID()); err != nil && !errors.Is(err, lsfs.ErrNoVolume) && n.ctx.Err() == nil {
			n.log.Error("cannot delete a snapshot that no record names", "snapshot", s.ID(), "err", err)
			n.failedBy(err)
		}
	}
}

func (v *Volume) placedHere() bool {
	return slices.ContainsFunc(*v.replicas.Load(), func(r Replica) bool { return r.Node == v.node.self })
}
