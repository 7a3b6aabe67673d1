package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type nodesPage struct {
	version1
	Nodes []nodeView `json:"nodes"`
}

func (n *nodesPage) text(p *printer) { nodeTable(p, n.Nodes) }

func nodeTable(p *printer, nodes []nodeView) {
	rows := [][]string{}
	for _, n := range nodes {
		role := n.Role
		if n.Leader {
			role += ", leader"
		}
		row := []string{n.Name, role, nodeState(&n), "", "", "", "", fmt.Sprint(n.Sessions)}
		if n.Role == "data" {
			row[3], row[4] = fmt.Sprint(n.Owns), fmt.Sprintf("%d/%d", n.InSync, n.Replicas)
		} else {
			row[7] = ""
		}
		if n.Pool != nil {
			row[5], row[6] = p.size(n.Pool.Live)+" / "+p.size(n.Pool.Usable), savings(n.Pool.Mapped, n.Pool.Stored)
		}
		rows = append(rows, row)
	}
	p.table("NODE ROLE STATE OWNER_OF IN_SYNC POOL_USED SAVINGS SESSIONS", rows)
}

type nodePage struct {
	version1
	Node nodeView `json:"node"`
}

func (n *nodePage) text(p *printer) {
	v := n.Node
	voter := "no"
	if v.Voter {
		voter = "yes"
	}
	if v.Leader {
		voter = "yes, leader"
	}
	p.facts("node", fmt.Sprintf("%s (%d)", v.Name, v.ID), "role", v.Role, "state", nodeState(&v), "why", v.Error, "voter", voter,
		"software", v.Version, "started", since(v.Started), "sync", v.Sync, "management", v.Management, "portals", list(v.Portals), "api", v.API, "metrics", v.Metrics)
	if v.Role == "data" {
		p.facts("owner of", fmt.Sprint(v.Owns), "in sync", fmt.Sprintf("%d of %d replicas", v.InSync, v.Replicas), "sessions", fmt.Sprint(v.Sessions),
			"reads", fmt.Sprintf("%d, %s", v.Traffic.ReadOps, p.size(v.Traffic.ReadBytes)),
			"writes", fmt.Sprintf("%d, %s", v.Traffic.WriteOps, p.size(v.Traffic.WriteBytes)))
	}
	if v.Pool != nil {
		facts := []string{"pool", fmt.Sprintf("%s used of %s usable, %s garbage, %s free", p.size(v.Pool.Live), p.size(v.Pool.Usable), p.size(v.Pool.Garbage), p.size(v.Pool.Free)),
			"savings", fmt.Sprintf("%s mapped by volumes, %s stored %s", p.size(v.Pool.Mapped), p.size(v.Pool.Stored), savings(v.Pool.Mapped, v.Pool.Stored)),
			"given back", reclaiming(p, v.Pool), "written", amplification(v.Pool.Amp)}
		for _, c := range v.Pool.Caches {
			facts = append(facts, c.Tier+" cache", cacheState(p, &c))
		}
		p.facts(facts...)
	}
	if v.Scrub != nil {
		p.facts("scrub", v.Scrub.summary())
	}
}

// cacheState is a level of the cache in one line.
func cacheState(p *printer, c *cacheView) string {
	if c.Failure != "" {
		return fmt.Sprintf("off, reads go to the pool: %s", c.Failure)
	}
	s := fmt.Sprintf("%s of %s, %.0f %% of %d blocks found", p.size(c.Bytes), p.size(c.Capacity), 100*c.HitRate, c.Hits+c.Misses)
	if c.Path != "" {
		s += fmt.Sprintf(", %s written to %s", p.size(c.Written), c.Path)
	}
	if c.Warming {
		s += ", warming up"
	}
	return s
}

// amplification says what was written to the devices, nothing while nothing was.
func amplification(x float64) string {
	if x == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f times what was stored", x)
}

// reclaiming says how much of deleted volumes is still to become free, nothing if none is.
func reclaiming(p *printer, v *poolView) string {
	if v.Reclaim == 0 {
		return ""
	}
	return p.size(v.Reclaim) + " of deleted volumes still to come"
}

// nodeState is the state in one word or two.
func nodeState(n *nodeView) string {
	if n.Mode == "maintenance" || n.Mode == "evacuating" {
		return n.State + ", " + n.Mode
	}
	if n.Draining {
		return n.State + ", draining"
	}
	return n.State
}

func (a *app) nodeCommand() *cobra.Command {
	listing := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the nodes", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Nodes.ListNodes(ctx, &v1.ListNodesRequest{})
				if err != nil {
					return err
				}
				a.next("twinsan node show NODE")
				return a.print(&nodesPage{v1Header, views(r.Nodes, viewNode)})
			})
		},
	}
	show := &cobra.Command{
		Use: "show NODE", Short: "Show one node", Args: arguments("NODE"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				n, err := client.Nodes.GetNode(ctx, &v1.GetNodeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if err := a.print(&nodePage{v1Header, viewNode(n)}); err != nil {
					return err
				}
				if n.State == v1.NodeState_NODE_STATE_DOWN {
					a.next("on %s: systemctl status twinsan; journalctl -u twinsan", n.Name)
					return nil
				}
				a.next("twinsan device list --node %s", n.Name)
				return nil
			})
		},
	}
	return noun("node", "Nodes of the cluster", nil, listing, show, a.nodeDrain(), a.nodeResume(),
		a.nodeSet(), a.nodeMaintenance(), a.nodeEvacuate(), a.nodeReplace(), a.nodeRemove())
}
