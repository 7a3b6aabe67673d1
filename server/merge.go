package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// Merge is how the background part of deduplication does in a node's pool: it looks for
// blocks that are stored twice, and makes one of the two.
type Merge struct {
	Node           string
	On             bool // false: merge-minutes is 0 in the node's file
	Running        bool
	Done           float64 // of the pass, 0 to 1
	CatalogueBytes uint64  // on disk
	Blocks, Bytes  uint64  // stored blocks that ended since the node started, and their stored bytes
	Current, Last  MergeResult
}

// MergeResult counts what a pass found and did.
type MergeResult struct {
	Started, Finished            time.Time
	Looked, Found, Blocks, Bytes uint64
	Error                        string // why it ended early
}

// MergeAction is what an administrator wants of the merging of duplicates.
type MergeAction string

const (
	MergeShow  MergeAction = "show"
	MergeStart MergeAction = "start"
	MergeStop  MergeAction = "stop"
)

// MergeNode shows, starts or stops the merging of duplicates in a node's pool; it does not
// wait for it. A node that is not the one called name asks that, unless here.
func (n *Node) MergeNode(ctx context.Context, name string, action MergeAction, here bool) (*Merge, error) {
	node, peers, err := n.poolOf(n.known(), name, here)
	switch {
	case err != nil:
		return nil, err
	case peers != nil:
		return peers.MergeNode(ctx, node.ID, n.api(node), name, action)
	}
	switch action {
	case MergeStart:
		if !n.store.Merge().On {
			return nil, fmt.Errorf("%w: node %s keeps no catalogue of its blocks\n  set merge-minutes under [store] in its file, and start it again", ErrRefused, name)
		}
		n.store.StartMerge()
	case MergeStop:
		n.store.StopMerge()
	case MergeShow:
	default:
		return nil, fmt.Errorf("%w: %q is nothing that a merge can do", ErrInvalid, action)
	}
	m := n.store.Merge()
	return &Merge{Node: n.id.Name, On: m.On, Running: m.Running, Done: m.Done, CatalogueBytes: uint64(m.CatalogueBytes),
		Blocks: uint64(m.Blocks), Bytes: uint64(m.Bytes), Current: mergeResult(&m.Current), Last: mergeResult(&m.Last)}, nil
}

func mergeResult(r *lsfs.MergeResult) MergeResult {
	out := MergeResult{Started: r.Started, Finished: r.Finished, Looked: uint64(r.Looked), Found: uint64(r.Found), Blocks: uint64(r.Blocks), Bytes: uint64(r.Bytes)}
	switch {
	case errors.Is(r.Err, context.Canceled):
		out.Error = "it was stopped"
	case r.Err != nil:
		out.Error = r.Err.Error()
	}
	return out
}
