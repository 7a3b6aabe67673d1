package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// Mode is what an administrator has set a node to.
type Mode string

const (
	ModeServing     Mode = "serving"
	ModeMaintenance Mode = "maintenance" // it is drained, and its absence is no alarm
	ModeEvacuating  Mode = "evacuating"  // its replicas move to other nodes
)

var modes = map[cluster.NodeMode]Mode{
	cluster.ModeServing: ModeServing, cluster.ModeMaintenance: ModeMaintenance, cluster.ModeEvacuating: ModeEvacuating,
}

// member finds a node in a status that was just put together.
func (n *Node) member(ctx context.Context, name string) (*Member, error) {
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	if m := memberNamed(s, name); m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
}

// SetMaintenance sets a node to maintenance, or with enter false lets it serve
// again. It returns who would be hurt when the node stops: volumes without another
// good copy, and the quorum. With somebody hurt it is refused unless force. With
// dryRun nothing changes, and nothing is refused.
func (n *Node) SetMaintenance(ctx context.Context, name string, enter, force, dryRun bool) (*Member, []string, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, nil, err
	}
	node := state.NodeNamed(name)
	if node == nil {
		return nil, nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
	}
	s, err := n.Status(ctx)
	if err != nil {
		return nil, nil, err
	}
	var hurt []string
	if enter && node.Mode != cluster.ModeMaintenance {
		hurt = n.hurtBy(state, s, node)
	}
	if dryRun {
		return memberNamed(s, name), hurt, nil
	}
	if len(hurt) > 0 && !force {
		return nil, hurt, fmt.Errorf("%w: when node %s stops, %s\n  see: twinsan status; or go on all the same: --force", ErrRefused, name, strings.Join(hurt, "; "))
	}
	mode := cluster.ModeServing
	if enter {
		mode = cluster.ModeMaintenance
	}
	if err := n.cluster.SetMode(ctx, node.ID, mode, len(hurt) > 0 && force, 0); err != nil {
		return nil, hurt, err
	}
	m, err := n.member(ctx, name)
	return m, hurt, err
}

// hurtBy says who is hurt when a node stops now.
func (n *Node) hurtBy(state *cluster.State, s *Status, node *cluster.Node) []string {
	hurt := stuckVolumes(s, node.Name)
	gone := []replication.NodeID{node.ID}
	for _, m := range s.Nodes {
		if m.State == NodeDown {
			gone = append(gone, m.ID)
		}
	}
	if slices.Contains(n.cluster.Voters(), node.ID) && !n.cluster.Survives(gone...) {
		why := "the cluster would have no quorum"
		if state.Settings.Quorum == cluster.QuorumPreferred {
			why = fmt.Sprintf("the cluster would have no quorum: node %s decides alone (twinsan cluster set quorum preferred-node OTHER)", node.Name)
		}
		hurt = append(hurt, why)
	}
	return hurt
}

// EvacuateNode moves all replicas of a node to other nodes, or to the named one;
// with stop it does not go on. It returns when that is recorded; Member.Replicas
// falls to 0.
func (n *Node) EvacuateNode(ctx context.Context, name, to string, stop bool) (*Member, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, err
	}
	node := state.NodeNamed(name)
	if node == nil {
		return nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
	}
	mode, target := cluster.ModeEvacuating, replication.NodeID(0)
	if stop {
		if node.Mode != cluster.ModeEvacuating {
			return nil, fmt.Errorf("%w: node %s is not evacuated", ErrRefused, name)
		}
		mode = cluster.ModeServing
	} else if to != "" {
		other := state.NodeNamed(to)
		if other == nil {
			return nil, fmt.Errorf("node %q: %w", to, ErrNotFound)
		}
		target = other.ID
	}
	if err := n.cluster.SetMode(ctx, node.ID, mode, false, target); err != nil {
		return nil, err
	}
	for _, o := range state.Operations {
		if stop && o.Running() && o.From == node.ID {
			if err := n.cluster.CancelOperation(ctx, o.ID); err != nil {
				n.log.Info("a move goes on", "operation", o.ID, "err", err)
			}
		}
	}
	return n.member(ctx, name)
}

// RemoveNode takes a node out of the cluster for good: one that holds no replica,
// or with lost one that does not answer and never will again. The last good copy of
// a volume is never given up. With dryRun nothing changes. It returns what goes
// with the node, in words.
func (n *Node) RemoveNode(ctx context.Context, name string, lost, dryRun bool) ([]string, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, err
	}
	node := state.NodeNamed(name)
	if node == nil {
		return nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
	}
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	m := memberNamed(s, name)
	var effects, held []string
	for _, v := range s.Volumes {
		at := slices.IndexFunc(v.Replicas, func(r Replica) bool { return r.Node == name })
		if at < 0 || v.State == VolumeDeleting {
			continue
		}
		held = append(held, v.Name)
		good := slices.ContainsFunc(v.Replicas, func(r Replica) bool { return r.Node != name && r.State == ReplicaInSync })
		recorded := slices.ContainsFunc(state.Volume(v.ID).Record.InSync, func(id replication.NodeID) bool { return id == node.ID })
		if recorded && !good {
			return nil, fmt.Errorf("%w: node %s has the last good copy of volume %s\n  start the node; or, when it is lost: twinsan volume promote %s --node NODE --force, or delete the volume", ErrRefused, name, v.Name, v.Name)
		}
		effects = append(effects, fmt.Sprintf("volume %s loses its copy there", v.Name))
	}
	switch {
	case len(held) > 0 && m != nil && m.State != NodeDown:
		return nil, fmt.Errorf("%w: node %s has replicas of %s\n  move them first: twinsan node evacuate %s", ErrRefused, name, strings.Join(held, ", "), name)
	case len(held) > 0 && !lost:
		return nil, fmt.Errorf("%w: node %s does not answer and has replicas of %s\n  when it will never come back: --lost", ErrRefused, name, strings.Join(held, ", "))
	case node.ID == n.cluster.Self():
		return nil, fmt.Errorf("%w: node %s cannot remove itself: ask another one: --api", ErrRefused, name)
	}
	if node.Role == cluster.RoleWitness && len(state.DataNodes()) == 2 {
		effects = append(effects, "without a witness one of the two nodes decides alone")
	}
	if dryRun {
		return effects, nil
	}
	// The owners drop a dead member from their in-sync sets within seconds.
	end := time.Now().Add(evictMax)
	for {
		err := n.cluster.RemoveNode(ctx, node.ID)
		if !errors.Is(err, ErrRefused) || len(held) == 0 || time.Now().After(end) {
			return effects, err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return effects, err
		}
	}
}

// evictMax is how long to wait until owners go on without a node that is dead.
const evictMax = 10 * time.Second
