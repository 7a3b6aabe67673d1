package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type maintenancePage struct {
	version1
	Node nodeView `json:"node"`
	Hurt []string `json:"hurt"` // by stopping the node
}

func (m *maintenancePage) text(p *printer) {
	for _, h := range m.Hurt {
		p.line("! when node %s stops, %s", m.Node.Name, h)
	}
	(&nodePage{v1Header, m.Node}).text(p)
}

func (a *app) nodeMaintenance() *cobra.Command {
	var limit time.Duration
	var force, dryRun bool
	c := &cobra.Command{
		Use: "maintenance NODE enter|leave", Short: "Prepare a node to be stopped, or let it serve again",
		Long: `Prepare a node to be stopped: its volumes get other owners without an error at any
host, initiators are sent elsewhere, and that it is away is no alarm until it
leaves maintenance. Then its copies fetch what they missed. Refused (exit code 4)
while stopping it would take the last good copy of a volume or the quorum: the
text says which. --force does it all the same.`,
		Example: "  twinsan node maintenance a enter\n  twinsan node maintenance a leave", Args: arguments("NODE", "enter|leave"),
		RunE: func(c *cobra.Command, args []string) error {
			enter := args[1] == "enter"
			if !enter && args[1] != "leave" {
				return usage("maintenance %s: want enter or leave", args[1])
			}
			ctx, cancel := context.WithTimeout(c.Context(), limit)
			defer cancel()
			return a.stream(ctx, func(ctx context.Context, client *api.Client) error {
				r, err := client.Maintenance.SetMaintenance(ctx, &v1.SetMaintenanceRequest{Node: args[0], Leave: !enter, Force: force, DryRun: dryRun})
				if err != nil {
					return err
				}
				n := r.Node
				if enter && !dryRun && len(r.Hurt) == 0 {
					if n, err = a.awaitDrained(ctx, client, n); err != nil {
						return err
					}
				}
				switch {
				case dryRun:
				case enter:
					a.next("stop the node, do what you want to do, start it, then: twinsan node maintenance %s leave", n.Name)
				default:
					a.next("twinsan status --wait healthy")
				}
				if err := a.print(&maintenancePage{v1Header, viewNode(n), words(r.Hurt)}); err != nil {
					return err
				}
				if len(r.Hurt) > 0 {
					return &failure{exitDegraded, nil}
				}
				return nil
			})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "although volumes or the quorum are hurt")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only show who would be hurt")
	c.Flags().DurationVar(&limit, "limit", 5*time.Minute, "how long to wait for the volumes to move; they go on afterwards")
	return c
}

func (a *app) nodeEvacuate() *cobra.Command {
	var to string
	var stop, wait bool
	c := &cobra.Command{
		Use: "evacuate NODE", Short: "Move all copies of volumes from a node to other nodes", Args: arguments("NODE"),
		Long: `Move all copies of volumes from a node to other nodes, one by one, while the
volumes are in use: each new copy is in sync and proved equal before the old one
goes. The node itself may be down. It goes on whatever nodes come and go; a volume
for which no other node has room, and no copy yet, stays.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error {
				once, cancel := context.WithTimeout(ctx, a.timeout)
				n, err := client.Maintenance.EvacuateNode(once, &v1.EvacuateNodeRequest{Node: args[0], To: to, Stop: stop})
				cancel()
				if err != nil {
					return err
				}
				if wait && !stop {
					if n, err = a.awaitEmpty(ctx, client, n.Name); err != nil {
						return err
					}
				}
				switch {
				case stop:
				case n.Replicas == 0:
					a.next("twinsan node remove %s", n.Name)
				default:
					a.next("twinsan op list; twinsan node show %s", n.Name)
				}
				return a.print(&nodePage{v1Header, viewNode(n)})
			})
		},
	}
	c.Flags().StringVar(&to, "to", "", "the node that takes them (default: those with the fewest)")
	c.Flags().BoolVar(&stop, "stop", false, "do not go on; what has moved stays where it is")
	c.Flags().BoolVar(&wait, "wait", false, "wait until the node holds no copy any more")
	return c
}

// awaitEmpty waits until a node holds no replica any more.
func (a *app) awaitEmpty(ctx context.Context, client *api.Client, name string) (*v1.Node, error) {
	tick := time.NewTicker(watchPoll)
	defer tick.Stop()
	told, silent := uint32(0), 0
	for {
		once, cancel := context.WithTimeout(ctx, a.timeout)
		n, err := client.Nodes.GetNode(once, &v1.GetNodeRequest{Name: name})
		cancel()
		switch {
		case err != nil:
			if silent++; silent > 20 || ctx.Err() != nil {
				return nil, err
			}
		case n.Mode != v1.NodeMode_NODE_MODE_EVACUATING:
			return nil, fmt.Errorf("the evacuation of node %s was stopped", name)
		case n.Replicas == 0:
			return n, nil
		case n.Replicas != told:
			told, silent = n.Replicas, 0
			fmt.Fprintf(a.err, "node %s holds %d copies\n", name, told)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the evacuation goes on by itself: twinsan op list")
		}
	}
}

type nodeRemovedPage struct {
	version1
	Node    string   `json:"node"`
	Removed bool     `json:"removed"`
	Effects []string `json:"effects"`
}

func (r *nodeRemovedPage) text(p *printer) {
	if r.Removed {
		p.line("node %s is no member of the cluster any more", r.Node)
	}
}

func (a *app) nodeRemove() *cobra.Command {
	var lost bool
	var k confirmation
	c := &cobra.Command{
		Use: "remove NODE", Short: "Take a node out of the cluster for good", Args: arguments("NODE"),
		Long: `Take a node out of the cluster for good: a witness, a data node that holds no copy
of a volume, or with --lost one that is dead and will never come back. The last
good copy of a volume is never given up that way. Its certificate is refused from
then on; to use the machine again, wipe it and let it join as a new node.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error {
				return a.removeNode(ctx, client, args[0], lost, k)
			})
		},
	}
	k.flags(c)
	c.Flags().BoolVar(&lost, "lost", false, "the node is dead and will never come back")
	return c
}

func (a *app) removeNode(ctx context.Context, client *api.Client, name string, lost bool, k confirmation) error {
	once, cancel := context.WithTimeout(ctx, a.timeout)
	r, err := client.Maintenance.RemoveNode(once, &v1.RemoveNodeRequest{Node: name, Lost: lost, DryRun: true})
	cancel()
	if err != nil {
		return err
	}
	effect := fmt.Sprintf("Node %s is removed from the cluster for good.", name)
	if len(r.Effects) > 0 {
		effect += "\n  " + strings.Join(r.Effects, "\n  ")
	}
	if k.dryRun {
		fmt.Fprintln(a.err, effect)
		return a.print(&nodeRemovedPage{v1Header, name, false, words(r.Effects)})
	}
	if err := a.confirmWord(k, effect, name); err != nil {
		return err
	}
	once, cancel = context.WithTimeout(ctx, a.timeout)
	defer cancel()
	if r, err = client.Maintenance.RemoveNode(once, &v1.RemoveNodeRequest{Node: name, Lost: lost}); err != nil {
		return err
	}
	a.next("twinsan node list")
	return a.print(&nodeRemovedPage{v1Header, name, true, words(r.Effects)})
}

func (a *app) nodeReplace() *cobra.Command {
	var lost bool
	var k confirmation
	c := &cobra.Command{
		Use: "replace OLD NEW", Short: "Let a new node take the place of another one", Args: arguments("OLD", "NEW"),
		Long: `Let a node that has joined take the place of another one: all copies move from OLD
to NEW while the volumes are in use, then OLD is removed from the cluster. OLD may
be dead (--lost): then the new copies are made from the other good ones. When the
command is interrupted, the copies go on moving; repeat it to remove OLD.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error {
				effect := fmt.Sprintf("All copies move from node %s to node %s; then node %s is removed from the cluster for good.", args[0], args[1], args[0])
				if k.dryRun {
					fmt.Fprintln(a.err, effect)
					return nil
				}
				if err := a.confirmWord(k, effect, args[0]); err != nil {
					return err
				}
				once, cancel := context.WithTimeout(ctx, a.timeout)
				_, err := client.Maintenance.EvacuateNode(once, &v1.EvacuateNodeRequest{Node: args[0], To: args[1]})
				cancel()
				if err != nil {
					return err
				}
				if _, err := a.awaitEmpty(ctx, client, args[0]); err != nil {
					return err
				}
				return a.removeNode(ctx, client, args[0], lost, confirmation{yes: true})
			})
		},
	}
	k.flags(c)
	c.Flags().BoolVar(&lost, "lost", false, "OLD is dead and will never come back")
	return c
}
