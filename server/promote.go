package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// PromoteSpec says which copy of a volume becomes the only good one.
type PromoteSpec struct {
	Volume, Node string
	// Epoch is that of the volume when it was looked at (Promotion.Epoch): what has
	// changed since is not promoted over. 0 with DryRun.
	Epoch uint64
	// Inconsistent accepts a copy that is a mixture, in the middle of a resync.
	Inconsistent bool
	DryRun       bool // only look
}

// Promotion is what is known of the copies of a volume before one is promoted.
type Promotion struct {
	Volume *Volume
	Epoch  uint64
	Facts  []string // in words: what the copy holds, and what is lost
	Refuse string   // why it cannot be promoted; empty: it can
}

// Promote makes the copy on a node the only good one of a volume, after the better
// ones are lost for good (B3). The others are discarded when their nodes come back.
func (n *Node) Promote(ctx context.Context, spec PromoteSpec) (*Promotion, error) {
	state, v, err := n.volumeNamed(ctx, spec.Volume)
	if err != nil {
		return nil, err
	}
	node := state.NodeNamed(spec.Node)
	if node == nil {
		return nil, fmt.Errorf("node %q: %w", spec.Node, ErrNotFound)
	}
	replies := n.reports(ctx, state)
	s := n.recorded(state)
	merge(s, replies)
	p := &Promotion{Epoch: uint64(v.Record.Epoch)}
	for i := range s.Volumes {
		if s.Volumes[i].ID == v.ID {
			p.Volume = &s.Volumes[i]
		}
	}
	at := standingIn(replies[node.ID].report, v.ID)
	var better []string
	for _, id := range v.Record.InSync {
		other := state.Node(id)
		if id == node.ID || other == nil {
			continue
		}
		better = append(better, other.Name)
		if replies[id].report != nil {
			p.Refuse = fmt.Sprintf("node %s has a good copy and is up", other.Name)
		}
	}
	switch {
	case p.Refuse != "":
	case !slices.ContainsFunc(v.Record.Replicas, func(r replication.Replica) bool { return r.Node == node.ID }):
		p.Refuse = fmt.Sprintf("node %s has no copy of volume %s", node.Name, v.Name)
	case replies[node.ID].report == nil:
		p.Refuse = fmt.Sprintf("node %s does not answer", node.Name)
	case at == nil:
		p.Refuse = fmt.Sprintf("node %s has nothing of volume %s on its disks yet", node.Name, v.Name)
	case !at.Consistent && !spec.Inconsistent:
		p.Refuse = fmt.Sprintf("the copy on node %s is in the middle of a resync, a mixture of old and new; to take it all the same: --inconsistent", node.Name)
	}
	if at != nil {
		p.Facts = append(p.Facts, fmt.Sprintf("the copy on node %s ends with operation %d of epoch %d; the volume is in epoch %d", node.Name, at.Sequence, at.Epoch, p.Epoch))
	}
	for _, l := range v.Left {
		if l.Node == node.ID {
			p.Facts = append(p.Facts, fmt.Sprintf("it fell out of sync at %s: what hosts wrote after that is lost", l.Time.UTC().Format(time.RFC3339)))
		}
	}
	if len(better) > 0 {
		p.Facts = append(p.Facts, fmt.Sprintf("newer copies are on %s: they are discarded when they come back; switch those machines off, they may be serving hosts", strings.Join(better, ", ")))
	}
	if spec.DryRun {
		return p, nil
	}
	if p.Refuse != "" {
		return nil, fmt.Errorf("%w: %s", ErrRefused, p.Refuse)
	}
	if err := n.cluster.Promote(ctx, v.ID, lsfs.Epoch(spec.Epoch), node.ID, strings.Join(p.Facts, "; ")+"."); err != nil {
		return nil, err
	}
	if p.Volume, err = n.described(ctx, v.ID); err != nil {
		return nil, err
	}
	return p, nil
}

// standingIn finds where a node's copy of a volume stands; nil: it has none, or did
// not answer.
func standingIn(r *Report, id lsfs.VolumeID) *replication.Standing {
	if r == nil {
		return nil
	}
	for i := range r.Volumes {
		if r.Volumes[i].ID == id {
			return r.Volumes[i].Standing
		}
	}
	return nil
}
