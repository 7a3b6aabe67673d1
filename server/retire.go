package server

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

const (
	// retireMax bounds what a node does for the others before it stops.
	retireMax = 8 * time.Second
	// leaveMax bounds one change of the record: without a quorum there is none.
	leaveMax = 2 * time.Second
	// retireAt volumes move at the same time.
	retireAt = 8
)

// Retire prepares this node to be stopped, so that the others go on without a
// pause: it gives leadership and its volumes away, and takes its copies out of the
// in-sync sets. What cannot be done in time is left to the others: they take over
// as after a crash. Close follows.
func (n *Node) Retire(ctx context.Context) {
	n.retiring.Store(true)
	parts := n.serving.Load()
	if n.store == nil || parts == nil || !n.ready.Load() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, retireMax)
	defer cancel()
	start := time.Now()
	once, done := context.WithTimeout(ctx, 2*time.Second)
	if err := n.cluster.StepAside(once); err != nil {
		n.log.Info("leadership is left to an election", "err", err)
	}
	done()
	moved := n.forEachVolume(ctx, func(v *replication.Volume) bool {
		return n.giveAway(ctx, parts, v.ID())
	})
	left := n.forEachVolume(ctx, func(v *replication.Volume) bool {
		owner := v.Status().Owner
		if linked, _, _ := parts.replication.Peer(owner); owner == 0 || !linked {
			return false // this may be the only copy that anybody reaches
		}
		once, done := context.WithTimeout(ctx, leaveMax)
		defer done()
		if err := v.Leave(once); err != nil {
			n.log.Info("a copy is left in the in-sync set", "volume", v.ID(), "err", err)
			return false
		}
		return true
	})
	n.log.Info("node has retired", "moved", moved, "left", left, "took", time.Since(start).Round(time.Millisecond))
}

// forEachVolume runs f for all volumes, some at a time, and counts where it did something.
func (n *Node) forEachVolume(ctx context.Context, f func(*replication.Volume) bool) int {
	volumes := n.serving.Load().replication.Volumes()
	did := make(chan bool, len(volumes))
	g := new(errgroup.Group)
	g.SetLimit(retireAt)
	for _, v := range volumes {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { did <- f(v); return nil })
	}
	_ = g.Wait() // f has said what was wrong
	close(did)
	count := 0
	for yes := range did {
		if yes {
			count++
		}
	}
	return count
}

// giveAway moves a volume that this node owns to another one, and says whether it did.
func (n *Node) giveAway(ctx context.Context, parts *serving, id lsfs.VolumeID) bool {
	state := n.cluster.State()
	v := state.Volume(id)
	if v == nil || v.Record.Deleted || v.Record.Owner != n.cluster.Self() {
		return false
	}
	to := n.destination(state, parts, v)
	if to == nil {
		n.log.Warn("no other node can take the volume over now", "volume", v.Name)
		return false
	}
	if err := n.moveHere(ctx, parts, v, to); err != nil {
		n.log.Warn("the volume was not given away", "volume", v.Name, "err", err)
		return false
	}
	return true
}

// Stopping says what stopping this node now would cost, for the log of whoever
// stops it: nothing, or the volumes without another good copy.
func (n *Node) Stopping(ctx context.Context) error {
	s, err := n.Status(ctx)
	if err != nil {
		return err
	}
	if stuck := stuckVolumes(s, n.id.Name); len(stuck) > 0 && len(s.Nodes) > 1 {
		return fmt.Errorf("%d volumes have no other good copy: %s", len(stuck), stuck[0])
	}
	return nil
}
