package server

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/server/cluster"
)

// Recovery is what the recovery of a quorum means, in words.
type Recovery struct {
	Cluster, Node string
	Index, Term   uint64 // of the newest entry in this node's log
	Voters, Lost  []string
	// Stale are volumes whose good copies are all on lost nodes: an old one can be
	// promoted. Without are those of which no copy is left at all.
	Stale, Without []string
}

// Recover makes this machine's node, which must not run, the only voter of its
// cluster after the quorum was lost for good. With dryRun nothing is changed.
func Recover(c *Config, lost []string, dryRun bool) (*Recovery, error) {
	r, err := cluster.Recover(c.DataDir, lost, dryRun, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	out := &Recovery{Cluster: r.Cluster, Node: r.Node, Index: r.Index, Term: r.Term, Voters: r.Voters, Lost: r.Lost}
	for _, v := range r.State.Volumes {
		if v.Record.Deleted {
			continue
		}
		good, any := false, false
		for _, p := range v.Record.Replicas {
			if slices.Contains(lost, r.State.NodeName(p.Node)) {
				continue
			}
			any = true
			good = good || v.Record.Has(p.Node)
		}
		switch {
		case !any:
			out.Without = append(out.Without, v.Name)
		case !good:
			out.Stale = append(out.Stale, v.Name)
		}
	}
	return out, nil
}

// Effect says in words what a recovery does.
func (r *Recovery) Effect() string {
	text := fmt.Sprintf("Node %s becomes the only voter of cluster %s; %s can never come back.\n  Its log ends with entry %d of term %d: on another node that is left, the same command with --dry-run must not show a higher term, or in the same term a higher entry.",
		r.Node, r.Cluster, strings.Join(r.Lost, " and "), r.Index, r.Term)
	if len(r.Stale) > 0 {
		text += "\n  No good copy is left of: " + strings.Join(r.Stale, ", ") + " (twinsan volume promote)"
	}
	if len(r.Without) > 0 {
		text += "\n  No copy at all is left of: " + strings.Join(r.Without, ", ")
	}
	return text
}
