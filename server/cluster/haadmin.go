package cluster

import (
	"context"
	"crypto/rand"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// recordOf is a volume as the quorum has it now.
func (c *Cluster) recordOf(ctx context.Context, id lsfs.VolumeID) (*Volume, error) {
	s, err := c.Sync(ctx)
	if err != nil {
		return nil, err
	}
	if v := s.Volume(id); v != nil && !v.Record.Deleted {
		return v, nil
	}
	return nil, errorf(ErrNotFound, "there is no volume %d", id)
}

// AddReplica records one more replica of a volume on a node, which the owner fills
// from then on; with replaces it takes the place of the replica on that node. It
// returns the operation. Errors: ErrNotFound, ErrExists, ErrInvalid (a witness),
// ErrRefused (a limit, a node that does not stay), replication.ErrConflict (the
// volume is changing, try again), ErrNoQuorum.
func (c *Cluster) AddReplica(ctx context.Context, id lsfs.VolumeID, node, replaces replication.NodeID) (*Operation, error) {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	v, err := c.recordOf(ctx, id)
	if err != nil {
		return nil, err
	}
	x := &cmdAddReplica{Volume: id, Expect: v.Record.Epoch, Node: node, Replaces: replaces}
	rand.Read(x.ID[:])
	r, err := c.proposeSync(ctx, x)
	if err != nil {
		return nil, err
	}
	if o := c.State().Operation(r.ID); o != nil {
		return o, nil
	}
	return nil, errorf(ErrNotFound, "operation %d is gone already", r.ID)
}

// RemoveReplica takes the replica on a node off a volume; the node frees it. It is
// refused (ErrRefused) for the owner and for the last good copy.
func (c *Cluster) RemoveReplica(ctx context.Context, id lsfs.VolumeID, node replication.NodeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	v, err := c.recordOf(ctx, id)
	if err != nil {
		return err
	}
	_, err = c.proposeSync(ctx, &cmdRemoveReplica{id, v.Record.Epoch, node})
	return err
}

// CancelOperation ends an operation that runs and drops the replica that it made.
func (c *Cluster) CancelOperation(ctx context.Context, id uint64) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdCancelOperation{id})
	return err
}

// SetMode sets the mode of a node; force enters maintenance although volumes have
// no other good copy, to is the node that takes the replicas of an evacuated one
// (0: any).
func (c *Cluster) SetMode(ctx context.Context, node replication.NodeID, mode NodeMode, force bool, to replication.NodeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdNodeMode{node, mode, force, to})
	return err
}

// SetBalance says whether volumes go back to their nodes, and for how long all
// nodes must have been up before (0: the default).
func (c *Cluster) SetBalance(ctx context.Context, on bool, after time.Duration) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	if after < 0 || after > maxBalanceAfter {
		return errorf(ErrInvalid, "volumes move back after at most %s", maxBalanceAfter)
	}
	_, err := c.proposeSync(ctx, &cmdSettings{Balance: true, Settings: Settings{BalanceOff: !on, BalanceAfter: uint32(after / time.Second)}})
	return err
}

// SetResyncRate says what the resyncs from one node may send together, in MiB a
// second; 0: as much as there is.
func (c *Cluster) SetResyncRate(ctx context.Context, rate uint32) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdSettings{Resync: true, Settings: Settings{ResyncRate: rate}})
	return err
}

// SetQuorum says which nodes vote; preferred is for QuorumPreferred. The change of
// the raft group follows step by step, each when it is safe.
func (c *Cluster) SetQuorum(ctx context.Context, mode QuorumMode, preferred replication.NodeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdSettings{Quorum: true, Settings: Settings{Quorum: mode, Preferred: preferred}})
	return err
}

// Prefer names the node that ought to own a volume; 0: none.
func (c *Cluster) Prefer(ctx context.Context, id lsfs.VolumeID, node replication.NodeID) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	_, err := c.proposeSync(ctx, &cmdPrefer{id, node})
	return err
}

// Promote makes the replica on a node the only good copy of a volume (B3), if its
// epoch is still the one that was looked at. What the other replicas hold is lost.
// why is kept in the event log.
func (c *Cluster) Promote(ctx context.Context, id lsfs.VolumeID, expect lsfs.Epoch, node replication.NodeID, why string) error {
	ctx, cancel := adminContext(ctx)
	defer cancel()
	v, err := c.recordOf(ctx, id)
	if err != nil {
		return err
	}
	x := &cmdPromote{Volume: id, Expect: expect, Node: node, Lineage: uuid.New(), Why: why[:min(len(why), maxText/2)]}
	for _, p := range v.Record.Replicas {
		if p.Node != node {
			q := replication.Replica{Node: p.Node}
			rand.Read(q.ID[:])
			x.Others = append(x.Others, q)
		}
	}
	_, err = c.proposeSync(ctx, x)
	return err
}

// Leads says whether this node leads the quorum. It is a hint: whoever acts on it
// must do no harm when two nodes believe it.
func (c *Cluster) Leads() bool { return c.Leader() == c.id.Node }

// StepAside gives leadership away, if this node has it, before it stops: the
// others then need no election in the middle of its leaving.
func (c *Cluster) StepAside(ctx context.Context) error {
	if !c.Leads() {
		return nil
	}
	changed := c.leaderChange.wait()
	if err := c.handOver(ctx); err != nil {
		return err
	}
	for c.Leads() || c.Leader() == 0 {
		select {
		case <-changed:
			changed = c.leaderChange.wait()
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Survives says whether a quorum is left of the voters when some nodes do not vote.
func (c *Cluster) Survives(gone ...replication.NodeID) bool {
	voters := c.Voters()
	left := 0
	for _, v := range voters {
		if !slices.Contains(gone, v) {
			left++
		}
	}
	return left > len(voters)/2
}
