package server

import (
	"context"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// QuorumMode says which nodes vote.
type QuorumMode string

const (
	// QuorumAuto: all data nodes, with the witness when their number is even; of two
	// without a witness one.
	QuorumAuto QuorumMode = "auto"
	// QuorumWitness: the same, and there has to be a witness.
	QuorumWitness QuorumMode = "witness"
	// QuorumPreferred: one data node alone.
	QuorumPreferred QuorumMode = "preferred_node"
	// QuorumMajority: the data nodes, three or more.
	QuorumMajority QuorumMode = "majority"
)

var quorumModes = map[cluster.QuorumMode]QuorumMode{
	cluster.QuorumAuto: QuorumAuto, cluster.QuorumWitness: QuorumWitness, cluster.QuorumPreferred: QuorumPreferred, cluster.QuorumMajority: QuorumMajority,
}

// SetQuorum says which nodes vote; preferred is a node's name, for QuorumPreferred.
// The group of voters follows step by step, each when it is safe: Member.Voter.
func (n *Node) SetQuorum(ctx context.Context, mode QuorumMode, preferred string) error {
	for m, word := range quorumModes {
		if word != mode {
			continue
		}
		id := replication.NodeID(0)
		if preferred != "" {
			node := n.cluster.State().NodeNamed(preferred)
			if node == nil {
				return fmt.Errorf("node %q: %w", preferred, ErrNotFound)
			}
			id = node.ID
		}
		return n.cluster.SetQuorum(ctx, m, id)
	}
	return fmt.Errorf("%w: quorum mode %q", ErrInvalid, mode)
}

// SetBalance says whether volumes go back to the nodes that they belong to, and for
// how long nodes and replicas must have been settled before (0: the default).
func (n *Node) SetBalance(ctx context.Context, on bool, after time.Duration) error {
	return n.cluster.SetBalance(ctx, on, after)
}

// SetResyncRate says what the resyncs from one node may send together, in MiB a
// second; 0: as much as there is while initiators do not suffer.
func (n *Node) SetResyncRate(ctx context.Context, rate uint32) error {
	return n.cluster.SetResyncRate(ctx, rate)
}

// UpgradePlan is how far the nodes are on their way to a newer version.
type UpgradePlan struct {
	Level     int // of the cluster
	Next      int // the highest that all nodes that answer know
	Nodes     []UpgradeNode
	Ready     bool // Next can be set
	Advice    string
	Unhealthy string // why the next node should not be stopped yet; empty: it may
}

// UpgradeNode is one node of an UpgradePlan.
type UpgradeNode struct {
	Name    string
	Version string
	Level   int    // that its program knows; 0: it does not answer
	Error   string // why it does not
}

// UpgradePlan asks every node which feature level its program knows.
func (n *Node) UpgradePlan(ctx context.Context) (*UpgradePlan, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, err
	}
	p := &UpgradePlan{Level: int(state.Cluster.FeatureLevel), Ready: true}
	versions := map[string]bool{}
	for _, r := range n.cluster.Readiness(ctx) {
		x := UpgradeNode{Name: state.NodeName(r.Node), Version: r.Version, Level: int(r.Level)}
		if r.Err != nil {
			x.Error, p.Ready = r.Err.Error(), false
		} else {
			versions[r.Version] = true
			if p.Next == 0 || x.Level < p.Next {
				p.Next = x.Level
			}
		}
		p.Nodes = append(p.Nodes, x)
	}
	p.Next = max(p.Next, p.Level)
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	if s.Health != Healthy {
		p.Unhealthy = s.Problems[0].Cause
	}
	switch {
	case !p.Ready:
		p.Advice = "start the nodes that do not answer"
	case len(versions) > 1:
		p.Advice = "install the newer version on the other nodes, one at a time: twinsan node maintenance NODE enter"
	case p.Next > p.Level:
		p.Advice = "twinsan upgrade apply"
	default:
		p.Advice = "nothing to do"
	}
	p.Ready = p.Ready && p.Next > p.Level
	return p, nil
}

// RaiseLevel raises the feature level of the cluster to what all nodes know. There
// is no way back.
func (n *Node) RaiseLevel(ctx context.Context, level int) error {
	if level < 1 || cluster.FeatureLevel < level {
		return fmt.Errorf("%w: feature level %d; this version knows 1 to %d", ErrInvalid, level, cluster.FeatureLevel)
	}
	return n.cluster.RaiseLevel(ctx, uint32(level))
}
