package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// drainPoll is how often a drain is looked at.
const drainPoll = 300 * time.Millisecond

func (a *app) nodeDrain() *cobra.Command {
	var limit time.Duration
	c := &cobra.Command{
		Use: "drain NODE", Short: "Move volumes and initiators away from a node",
		Long: `Move volumes and initiators away from a node, before it is stopped. Its volumes
get another owner without an error at any host, and initiators that log in are
sent to the other node. It stays a copy, in sync. Refused (exit code 4) while a
volume has no other copy in sync on a node that is up. It lasts until:
twinsan node resume NODE.`,
		Args: arguments("NODE"),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), limit)
			defer cancel()
			return a.stream(ctx, func(ctx context.Context, client *api.Client) error {
				n, err := client.Nodes.DrainNode(ctx, &v1.DrainNodeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if n, err = a.awaitDrained(ctx, client, n); err != nil {
					return err
				}
				a.next("stop the node, do what you want to do, start it, then: twinsan node resume %s", n.Name)
				return a.print(&nodePage{v1Header, viewNode(n)})
			})
		},
	}
	c.Flags().DurationVar(&limit, "limit", 5*time.Minute, "how long to wait for the volumes; the drain goes on afterwards")
	return c
}

// awaitDrained waits until a node owns no volume any more.
func (a *app) awaitDrained(ctx context.Context, client *api.Client, n *v1.Node) (*v1.Node, error) {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for told := uint32(0); n.Owns > 0; {
		if n.Owns != told {
			told = n.Owns
			fmt.Fprintf(a.err, "node %s owns %d volumes\n", n.Name, n.Owns)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("node %s still owns %d volumes; it goes on moving them\n  see: twinsan node show %s; twinsan events", n.Name, n.Owns, n.Name)
		}
		next, err := client.Nodes.GetNode(ctx, &v1.GetNodeRequest{Name: n.Name})
		if err != nil {
			if ctx.Err() != nil {
				continue
			}
			return nil, err
		}
		n = next
		if !n.Draining {
			return nil, fmt.Errorf("the drain of node %s was ended by: twinsan node resume", n.Name)
		}
	}
	return n, nil
}

func (a *app) nodeResume() *cobra.Command {
	return &cobra.Command{
		Use: "resume NODE", Short: "Let a drained node serve again", Args: arguments("NODE"),
		Long: "Let a drained node serve again: initiators may log in, and volumes may be moved there. None moves by itself.",
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				n, err := client.Nodes.DrainNode(ctx, &v1.DrainNodeRequest{Name: args[0], Resume: true})
				if err != nil {
					return err
				}
				a.next("twinsan volume move VOLUME --to %s", n.Name)
				return a.print(&nodePage{v1Header, viewNode(n)})
			})
		},
	}
}
