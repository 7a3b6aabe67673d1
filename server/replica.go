package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// OperationState is how far a long change is.
type OperationState string

const (
	OperationRunning   OperationState = "running"
	OperationDone      OperationState = "done"
	OperationCancelled OperationState = "cancelled"
	OperationFailed    OperationState = "failed"
)

// OperationKind is what a long change does.
type OperationKind string

const (
	OperationAddReplica  OperationKind = "replica_add"
	OperationMoveReplica OperationKind = "replica_move"
)

// Operation is a change that takes its time and goes on by itself, whatever nodes
// come and go.
type Operation struct {
	ID       uint64
	Kind     OperationKind
	State    OperationState
	Volume   string
	From, To string // nodes; From is empty where nothing goes
	Started  time.Time
	Ended    time.Time // zero while it runs
	Text     string    // why it failed, or what it waits for
	// Done and Total are bytes compared of the new replica, while it is filled.
	Done, Total uint64
	Left        time.Duration // to go, by the rate so far; 0: not known
}

var operationStates = map[cluster.OperationState]OperationState{
	cluster.OperationRunning: OperationRunning, cluster.OperationDone: OperationDone,
	cluster.OperationCancelled: OperationCancelled, cluster.OperationFailed: OperationFailed,
}

func operationOf(state *cluster.State, o *cluster.Operation) Operation {
	x := Operation{ID: o.ID, Kind: OperationAddReplica, State: operationStates[o.State], To: state.NodeName(o.To), Started: o.Started, Ended: o.Ended, Text: o.Text,
		Volume: fmt.Sprintf("volume %d", o.Volume)}
	if o.Kind == cluster.OperationMove {
		x.Kind, x.From = OperationMoveReplica, state.NodeName(o.From)
	}
	if v := state.Volume(o.Volume); v != nil {
		x.Volume = v.Name
	}
	return x
}

// mergeOperations adds to those that run what their volumes' owners report.
func mergeOperations(s *Status) {
	for i := range s.Operations {
		o := &s.Operations[i]
		at := slices.IndexFunc(s.Volumes, func(v Volume) bool { return v.Name == o.Volume })
		if o.State != OperationRunning || at < 0 {
			continue
		}
		for _, r := range s.Volumes[at].Replicas {
			if r.Node != o.To {
				continue
			}
			switch o.Done, o.Total, o.Left = r.ResyncDone, r.ResyncTotal, r.ResyncLeft; r.State {
			case ReplicaDown:
				o.Text = "node " + o.To + " does not answer"
			case ReplicaStale:
				o.Text = "waits for its turn"
			case ReplicaInSync:
				o.Text = "in sync; the replica on node " + o.From + " is about to go"
			}
		}
	}
}

// Operations lists the long changes that run and the last ones that have ended.
func (n *Node) Operations(ctx context.Context) ([]Operation, error) {
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	return s.Operations, nil
}

// CancelOperation ends a long change and takes back what it has made.
func (n *Node) CancelOperation(ctx context.Context, id uint64) (*Operation, error) {
	if err := n.cluster.CancelOperation(ctx, id); err != nil {
		return nil, err
	}
	state := n.cluster.State()
	if o := state.Operation(id); o != nil {
		x := operationOf(state, o)
		return &x, nil
	}
	return nil, fmt.Errorf("operation %d: %w", id, ErrNotFound)
}

// conflictMax is how long a change of a volume's replicas is tried again while the
// volume changes its owner or in-sync set at the same time.
const conflictMax = 5 * time.Second

// unlessConflict repeats f while it loses against another change of the record.
func unlessConflict(ctx context.Context, f func() error) error {
	end := time.Now().Add(conflictMax)
	for {
		err := f()
		if !errors.Is(err, replication.ErrConflict) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w: %w", ErrNotReady, err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// AddReplica gives a volume one more copy, on a node; with replaces it takes the
// place of the copy on that node. It returns when that is recorded.
func (n *Node) AddReplica(ctx context.Context, volume, node, replaces string) (*Operation, error) {
	state, v, err := n.volumeNamed(ctx, volume)
	if err != nil {
		return nil, err
	}
	to := state.NodeNamed(node)
	if to == nil {
		return nil, fmt.Errorf("node %q: %w", node, ErrNotFound)
	}
	from := replication.NodeID(0)
	if replaces != "" {
		old := state.NodeNamed(replaces)
		if old == nil {
			return nil, fmt.Errorf("node %q: %w", replaces, ErrNotFound)
		}
		from = old.ID
	}
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	if err := mayTake(s, v.Name, node); err != nil {
		return nil, err
	}
	var o *cluster.Operation
	err = unlessConflict(ctx, func() (err error) {
		o, err = n.cluster.AddReplica(ctx, v.ID, to.ID, from)
		return err
	})
	if err != nil {
		return nil, err
	}
	x := operationOf(n.cluster.State(), o)
	return &x, nil
}

// mayTake says why a node cannot take a copy of a volume now.
func mayTake(s *Status, volume, node string) error {
	m := memberNamed(s, node)
	at := slices.IndexFunc(s.Volumes, func(v Volume) bool { return v.Name == volume })
	switch {
	case m == nil || at < 0:
		return nil // the cluster knows better what is wrong
	case m.State == NodeDown:
		return fmt.Errorf("%w: node %s does not answer", ErrRefused, node)
	case m.Pool == nil:
		return nil
	}
	need := storedOf(s, &s.Volumes[at])
	if m.Pool.Live+need > m.Pool.Usable {
		return fmt.Errorf("%w: the pool of node %s has room for %s, and volume %s takes about %s", ErrRefused, node,
			Size(m.Pool.Usable-min(m.Pool.Live, m.Pool.Usable)), volume, Size(need))
	}
	return nil
}

// storedOf estimates the bytes that a copy of a volume takes, by the savings of the
// pool that holds its owner's.
func storedOf(s *Status, v *Volume) uint64 {
	if m := memberNamed(s, v.Owner); m != nil && m.Pool != nil && m.Pool.Mapped > 0 && m.Pool.Stored < m.Pool.Mapped {
		return uint64(float64(v.Mapped) * float64(m.Pool.Stored) / float64(m.Pool.Mapped))
	}
	return v.Mapped
}

func memberNamed(s *Status, name string) *Member {
	if i := slices.IndexFunc(s.Nodes, func(m Member) bool { return m.Name == name }); i >= 0 {
		return &s.Nodes[i]
	}
	return nil
}

// RemoveReplica takes the copy of a volume on a node away; a volume that is owned
// there moves first. The last good copy is never taken. force allows that one good
// copy is left. With dryRun nothing changes.
func (n *Node) RemoveReplica(ctx context.Context, volume, node string, force, dryRun bool) (*Volume, error) {
	state, v, err := n.volumeNamed(ctx, volume)
	if err != nil {
		return nil, err
	}
	gone := state.NodeNamed(node)
	if gone == nil {
		return nil, fmt.Errorf("node %q: %w", node, ErrNotFound)
	}
	if !slices.ContainsFunc(v.Record.Replicas, func(r replication.Replica) bool { return r.Node == gone.ID }) {
		return nil, fmt.Errorf("a replica of volume %s on node %s: %w", v.Name, node, ErrNotFound)
	}
	described, err := n.described(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	var good []string // that stay
	for _, r := range described.Replicas {
		if r.Node != node && r.State == ReplicaInSync {
			good = append(good, r.Node)
		}
	}
	switch {
	case len(good) == 0:
		return nil, fmt.Errorf("%w: the copy of volume %s on node %s is its last good one\n  see: twinsan volume show %s", ErrRefused, v.Name, node, v.Name)
	case len(good) == 1 && !force:
		return nil, fmt.Errorf("%w: volume %s would have one good copy left, on node %s\n  add another first: twinsan volume replica add %s NODE; or: --force", ErrRefused, v.Name, good[0], v.Name)
	}
	if dryRun {
		return described, nil
	}
	if err := n.dropReplica(ctx, v.ID, gone.ID); err != nil {
		return nil, err
	}
	return n.described(ctx, v.ID)
}

// dropReplica takes a replica off, after the volume has another owner.
func (n *Node) dropReplica(ctx context.Context, id lsfs.VolumeID, from replication.NodeID) error {
	return unlessConflict(ctx, func() error {
		state, err := n.cluster.Sync(ctx)
		if err != nil {
			return err
		}
		v := state.Volume(id)
		if v == nil || v.Record.Deleted {
			return fmt.Errorf("volume %d: %w", id, ErrNotFound)
		}
		if v.Record.Owner == from {
			to := heir(state, v, from)
			if to == nil {
				return fmt.Errorf("%w: no other node that stays has volume %s in sync", ErrRefused, v.Name)
			}
			if err := n.move(ctx, state, v, to, false); err != nil {
				return err
			}
		}
		return n.cluster.RemoveReplica(ctx, id, from)
	})
}

// heir is the node that takes a volume over from one of its in-sync set: the
// preferred one, else the one that owns fewest; nil: none stays.
func heir(state *cluster.State, v *cluster.Volume, from replication.NodeID) *cluster.Node {
	owns := ownedBy(state)
	var best *cluster.Node
	for _, id := range v.Record.InSync {
		node := state.Node(id)
		if id == from || node == nil || !node.Stays() {
			continue
		}
		if id == v.Preferred {
			return node
		}
		if best == nil || owns[id] < owns[best.ID] {
			best = node
		}
	}
	return best
}

// ownedBy counts the volumes that each node owns.
func ownedBy(state *cluster.State) map[replication.NodeID]int {
	owns := map[replication.NodeID]int{}
	for _, v := range state.Volumes {
		if !v.Record.Deleted {
			owns[v.Record.Owner]++
		}
	}
	return owns
}

// prefer records where an administrator or a host wants a volume, so that it stays
// there. A cluster of level 1 has no room for it, and moves nothing by itself.
func (n *Node) prefer(ctx context.Context, id lsfs.VolumeID, node replication.NodeID) error {
	state := n.cluster.State()
	if v := state.Volume(id); state.Cluster.FeatureLevel < 2 || v == nil || v.Preferred == node {
		return nil
	}
	return n.cluster.Prefer(ctx, id, node)
}
