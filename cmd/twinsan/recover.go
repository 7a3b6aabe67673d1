package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type recoveryPage struct {
	version1
	Cluster   string   `json:"cluster"`
	Node      string   `json:"node"`
	Recovered bool     `json:"recovered"`
	Index     uint64   `json:"log_index"`
	Term      uint64   `json:"log_term"`
	Voters    []string `json:"voters"` // before
	Lost      []string `json:"lost"`
	Stale     []string `json:"volumes_without_good_copy"`
	Without   []string `json:"volumes_without_copy"`
}

func (r *recoveryPage) text(p *printer) {
	if r.Recovered {
		p.line("node %s is the only voter of cluster %s", r.Node, r.Cluster)
		return
	}
	p.facts("node", r.Node, "log ends with", fmt.Sprintf("entry %d of term %d", r.Index, r.Term), "voters", list(r.Voters), "lost", list(r.Lost),
		"no good copy of", list(r.Stale), "no copy of", list(r.Without))
}

func (a *app) clusterRecover() *cobra.Command {
	var lost []string
	var typed string
	var dryRun bool
	c := &cobra.Command{
		Use: "recover --lost NODE,...", Short: "Go on with this node alone, when the quorum is lost for good", Args: arguments(),
		Long: `Go on with this node alone, when the quorum of the cluster is lost for good: when
the preferred node is dead, or two of three. It is run on a data node that is left,
while its service is stopped. The lost nodes are never talked to again: if one of
them still runs somewhere, it serves its hosts with its own copies, and what they
write is lost. So switch them off first. Refused while a majority is left, or
while one that is called lost answers. Afterwards: start the service, look at
twinsan status, promote what has no good copy, and remove the lost nodes.`,
		Example: "  systemctl stop twinsan\n  twinsan cluster recover --lost a --dry-run\n  twinsan cluster recover --lost a\n  systemctl start twinsan\n  twinsan node remove a --lost",
		RunE: func(c *cobra.Command, _ []string) error {
			if len(lost) == 0 {
				return usage("--lost NODE,... is missing: who will never come back?")
			}
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			r, err := server.Recover(config, lost, true)
			if err != nil {
				return err
			}
			page := &recoveryPage{v1Header, r.Cluster, r.Node, false, r.Index, r.Term, words(r.Voters), words(r.Lost), words(r.Stale), words(r.Without)}
			if dryRun {
				return a.print(page)
			}
			if typed != "" && typed != r.Cluster {
				return refuse("--confirm %s is not the name of the cluster; nothing was changed", typed)
			}
			if err := a.confirmWord(confirmation{yes: typed != ""}, r.Effect(), r.Cluster); err != nil {
				return err
			}
			if _, err := server.Recover(config, lost, false); err != nil {
				return err
			}
			page.Recovered = true
			a.next("systemctl start twinsan; twinsan status; twinsan node remove %s --lost", r.Lost[0])
			return a.print(page)
		},
	}
	c.Flags().StringSliceVar(&lost, "lost", nil, "the nodes that will never come back")
	c.Flags().StringVar(&typed, "confirm", "", "the name of the cluster, instead of typing it when asked")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only show what this node knows")
	return c
}
