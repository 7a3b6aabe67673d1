package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// MoveVolume makes another node the owner of a volume. That node must have a copy
// in sync. A node that is not the owner asks it, unless ownerOnly. To move a
// volume to its owner is no error.
func (n *Node) MoveVolume(ctx context.Context, name, to string, ownerOnly bool) (*Volume, error) {
	state, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, err
	}
	target := state.NodeNamed(to)
	if err := mayMove(state, v, target, to); err != nil {
		return nil, err
	}
	if err := n.move(ctx, state, v, target, ownerOnly); err != nil {
		return nil, err
	}
	if !ownerOnly {
		if err := n.prefer(ctx, v.ID, target.ID); err != nil {
			return nil, err
		}
	}
	return n.described(ctx, v.ID)
}

// move has the owner of a volume hand it over, and returns when the state of this
// node says so too.
func (n *Node) move(ctx context.Context, state *cluster.State, v *cluster.Volume, to *cluster.Node, ownerOnly bool) error {
	if v.Record.Owner == to.ID {
		return nil
	}
	if err := n.atOwner(state, v, ownerOnly,
		func(parts *serving) error { return n.moveHere(ctx, parts, v, to) },
		func(p Peers, owner *cluster.Node) error {
			return p.MoveVolume(ctx, owner.ID, n.api(owner), v.UUID.String(), to.Name)
		}); err != nil {
		return err
	}
	_, err := n.cluster.Sync(ctx)
	return err
}

// hostMoves are the moves that hosts ask for by SET TARGET PORT GROUPS. Each has a
// goroutine, which close ends and waits for; beyond hostMovesMax they are refused.
type hostMoves struct {
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup
	slots  chan struct{}
}

const hostMovesMax = 16

func newHostMoves() *hostMoves {
	m := &hostMoves{slots: make(chan struct{}, hostMovesMax)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// run starts f, or says that there are too many already.
func (m *hostMoves) run(f func(context.Context)) error {
	select {
	case m.slots <- struct{}{}:
	default:
		return fmt.Errorf("%d volumes are moving already: %w", hostMovesMax, ErrNotReady)
	}
	m.group.Go(func() {
		defer func() { <-m.slots }()
		ctx, cancel := context.WithTimeout(m.ctx, moveMax)
		defer cancel()
		f(ctx)
	})
	return nil
}

// close ends the moves, when no command can ask for another.
func (m *hostMoves) close() {
	m.cancel()
	m.group.Wait()
}

// optimize moves a volume to the node of a target port group, as a host asks for,
// and calls done once. It does not block.
func (n *Node) optimize(id lsfs.VolumeID, group uint16, done func(error)) {
	if err := n.moves.run(func(ctx context.Context) { done(n.moveToGroup(ctx, id, group)) }); err != nil {
		done(err)
	}
}

func (n *Node) moveToGroup(ctx context.Context, id lsfs.VolumeID, group uint16) error {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return err
	}
	v, to := state.Volume(id), state.Node(replication.NodeID(group))
	if v == nil || v.Record.Deleted {
		return fmt.Errorf("volume %d: %w", id, ErrNotFound)
	}
	if err := mayMove(state, v, to, fmt.Sprintf("of port group %d", group)); err != nil {
		return err
	}
	if err := n.move(ctx, state, v, to, false); err != nil {
		return err
	}
	return n.prefer(ctx, v.ID, to.ID)
}

// mayMove says why a volume cannot be owned by a node.
func mayMove(state *cluster.State, v *cluster.Volume, to *cluster.Node, name string) error {
	switch {
	case to == nil:
		return fmt.Errorf("node %q: %w", name, ErrNotFound)
	case to.Role != cluster.RoleData:
		return fmt.Errorf("%w: node %s is a witness and stores nothing", ErrInvalid, to.Name)
	case to.Mode == cluster.ModeMaintenance && v.Record.Owner != to.ID:
		return fmt.Errorf("%w: node %s is in maintenance\n  let it serve again first: twinsan node maintenance %s leave", ErrRefused, to.Name, to.Name)
	case to.Draining && v.Record.Owner != to.ID:
		return fmt.Errorf("%w: node %s is drained\n  let it serve again first: twinsan node resume %s", ErrRefused, to.Name, to.Name)
	case !slices.ContainsFunc(v.Record.Replicas, func(r replication.Replica) bool { return r.Node == to.ID }):
		return fmt.Errorf("%w: node %s has no copy of volume %s", ErrRefused, to.Name, v.Name)
	case !v.Record.Has(to.ID):
		return fmt.Errorf("%w: the copy of volume %s on node %s is not in sync\n  wait until it is: twinsan volume show %s", ErrRefused, v.Name, to.Name, v.Name)
	}
	return nil
}

func (n *Node) moveHere(ctx context.Context, parts *serving, v *cluster.Volume, to *cluster.Node) error {
	volume := parts.replication.Volume(v.ID)
	if volume == nil {
		return fmt.Errorf("volume %q: %w", v.Name, ErrNotFound)
	}
	start := time.Now()
	err := volume.MoveTo(ctx, to.ID)
	switch {
	case errors.Is(err, replication.ErrNotOwner), errors.Is(err, replication.ErrConflict):
		return fmt.Errorf("volume %s is changing its owner or its in-sync set, try again: %w (%w)", v.Name, ErrNotReady, err)
	case err != nil:
		return fmt.Errorf("move volume %s to node %s: %w", v.Name, to.Name, err)
	}
	n.log.Info("volume moved", "volume", v.Name, "node", to.Name, "took", time.Since(start).Round(time.Millisecond))
	return nil
}

// DrainNode sends initiators and volumes away from a node, or with drain false
// lets them come back. It returns when that is recorded; the node itself then
// moves its volumes, which Member.Owns shows. It is refused while some volume
// there has no copy in sync on another node that is up and stays.
func (n *Node) DrainNode(ctx context.Context, name string, drain bool) (*Member, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, err
	}
	node := state.NodeNamed(name)
	if node == nil {
		return nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
	}
	if !drain && node.Mode == cluster.ModeMaintenance {
		m, _, err := n.SetMaintenance(ctx, name, false, false, false) // which ends the drain as well
		return m, err
	}
	if drain {
		s, err := n.Status(ctx)
		if err != nil {
			return nil, err
		}
		if why := stuck(s, name); why != "" {
			return nil, fmt.Errorf("%w: %s", ErrRefused, why)
		}
	}
	if err := n.cluster.DrainNode(ctx, node.ID, drain); err != nil {
		return nil, err
	}
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	for i := range s.Nodes {
		if s.Nodes[i].ID == node.ID {
			return &s.Nodes[i], nil
		}
	}
	return nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
}

// stuck says which volume could not leave a node, by what the nodes report; empty: none.
func stuck(s *Status, name string) string {
	if all := stuckVolumes(s, name); len(all) > 0 {
		return all[0] + "\n  wait until it is healthy: twinsan status --wait healthy"
	}
	return ""
}

// stuckVolumes says of each volume that could not leave a node why.
func stuckVolumes(s *Status, name string) (all []string) {
	takes := func(r Replica) bool {
		at := slices.IndexFunc(s.Nodes, func(m Member) bool { return m.Name == r.Node })
		return r.Node != name && r.State == ReplicaInSync && at >= 0 && s.Nodes[at].State == NodeUp && !s.Nodes[at].Draining
	}
	for _, v := range s.Volumes {
		here := slices.ContainsFunc(v.Replicas, func(r Replica) bool { return r.Node == name && (r.State == ReplicaInSync || r.Owner) })
		if v.State == VolumeDeleting || !here || slices.ContainsFunc(v.Replicas, takes) {
			continue
		}
		why := "it has no other copy"
		for _, r := range v.Replicas {
			if r.Node == name {
				continue
			}
			switch r.State {
			case ReplicaInSync:
				why = "node " + r.Node + " is drained or starting"
			case ReplicaDown:
				why = "node " + r.Node + " does not answer"
			default:
				why = "the copy on node " + r.Node + " is not in sync"
			}
		}
		all = append(all, fmt.Sprintf("volume %s would have nowhere to go: %s", v.Name, why))
	}
	return all
}

// moveMax is how long the drainer waits for one volume to move.
const moveMax = 20 * time.Second

// drainState is what the goroutine of the drainer remembers of one drain.
type drainState struct {
	left bool   // no volume is owned here any more, and that was reported
	said string // the last trouble that was logged: it is tried again every second
}

func (d *drainState) trouble(n *Node, volume, what string) {
	if said := volume + what; said != d.said {
		d.said = said
		n.log.Warn("drain: volume does not move yet", "volume", volume, "why", what)
	}
}

// drain moves the volumes that this node owns to other nodes while it is recorded
// as draining, and then asks the initiators that are left to go. What cannot move
// now is tried again at the next tick.
func (n *Node) drain(ctx context.Context, d *drainState) {
	state, parts := n.cluster.State(), n.serving.Load()
	self := state.Node(n.cluster.Self())
	if parts == nil || self == nil {
		return
	}
	if !self.Draining {
		if d.left {
			parts.target.Resume()
		}
		*d = drainState{}
		return
	}
	owned := 0
	for _, v := range state.Volumes {
		if v.Record.Deleted || v.Record.Owner != self.ID {
			continue
		}
		owned++
		to := n.destination(state, parts, v)
		if to == nil {
			d.trouble(n, v.Name, "no other node that is linked and stays has it in sync")
			continue
		}
		once, cancel := context.WithTimeout(ctx, moveMax)
		err := n.moveHere(once, parts, v, to)
		cancel()
		if err != nil && ctx.Err() == nil {
			d.trouble(n, v.Name, err.Error())
		}
	}
	if owned > 0 {
		d.left = false
		return
	}
	if d.left {
		return
	}
	d.left = true
	n.journal.report(levelInfo, "node-drained", fmt.Sprintf("node %s owns no volume any more", n.id.Name))
	if _, ok := n.redirect(state, parts); !ok {
		return // without another node to go to, a path that forwards is better than none
	}
	once, cancel := context.WithTimeout(ctx, moveMax)
	defer cancel()
	if err := parts.target.Drain(once, logoutWithin, directory{n}.Redirect); err != nil && ctx.Err() == nil {
		n.log.Warn("drain: sessions did not leave", "err", err)
	}
}

// logoutWithin is how long an initiator of a drained node may take to log out.
const logoutWithin = 10 * time.Second

// destination is the node that takes over a volume when this one is drained; nil: none now.
func (n *Node) destination(state *cluster.State, parts *serving, v *cluster.Volume) *cluster.Node {
	for _, id := range v.Record.InSync {
		node := state.Node(id)
		if id == n.cluster.Self() || node == nil || !node.Stays() {
			continue
		}
		if linked, _, _ := parts.replication.Peer(id); linked {
			return node
		}
	}
	return nil
}
