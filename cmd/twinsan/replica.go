package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// ownerWords names the owner, and whom it stands in for.
func ownerWords(v *volumeView) string {
	if v.Preferred != "" && v.Preferred != v.Owner {
		return v.Owner + " (belongs to " + v.Preferred + ")"
	}
	return v.Owner
}

func lineageWords(id string) string {
	if id == "" {
		return ""
	}
	return id + ", promoted by force"
}

// timeLeft is how long something still takes, by the rate so far.
func timeLeft(seconds float64) string {
	if seconds <= 0 {
		return ""
	}
	return ", about " + time.Duration(seconds*float64(time.Second)).Round(time.Second).String()
}

func (a *app) volumeReplica() *cobra.Command {
	return noun("replica", "Copies of a volume", nil, a.replicaAdd(), a.replicaMove(), a.replicaRemove())
}

func (a *app) replicaAdd() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "add VOLUME NODE", Short: "Give a volume one more copy, on a node", Args: arguments("VOLUME", "NODE"),
		Long: `Give a volume one more copy, on a node: a second one, or a third. It is filled while
the volume is in use, compared chunk by chunk, and then counts as in sync. It runs
as an operation that goes on whatever nodes come and go.`,
		Example: "  twinsan volume replica add csv1 c --wait",
		RunE: func(c *cobra.Command, args []string) error {
			return a.begin(c, wait, func(ctx context.Context, client *api.Client) (*v1.Operation, error) {
				return client.Replicas.AddReplica(ctx, &v1.AddReplicaRequest{Volume: args[0], Node: args[1]})
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until it is in sync")
	return c
}

func (a *app) replicaMove() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "move VOLUME FROM TO", Short: "Move a copy of a volume to another node", Args: arguments("VOLUME", "FROM", "TO"),
		Long: `Move a copy of a volume from one node to another, while the volume is in use: the
new copy is filled and proved equal before the old one goes. Hosts see no error.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.begin(c, wait, func(ctx context.Context, client *api.Client) (*v1.Operation, error) {
				return client.Replicas.MoveReplica(ctx, &v1.MoveReplicaRequest{Volume: args[0], From: args[1], To: args[2]})
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait until the old copy is gone")
	return c
}

// begin starts an operation, and waits for its end when asked to.
func (a *app) begin(c *cobra.Command, wait bool, start func(context.Context, *api.Client) (*v1.Operation, error)) error {
	return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error {
		once, cancel := context.WithTimeout(ctx, a.timeout)
		o, err := start(once, client)
		cancel()
		if err != nil {
			return err
		}
		if wait {
			return a.watchOperation(ctx, client, o.Id)
		}
		a.next("twinsan op watch %d", o.Id)
		return a.print(&operationPage{v1Header, viewOperation(o)})
	})
}

func (a *app) replicaRemove() *cobra.Command {
	var force bool
	var k confirmation
	c := &cobra.Command{
		Use: "remove VOLUME NODE", Short: "Take a copy of a volume away", Args: arguments("VOLUME", "NODE"),
		Long: `Take the copy of a volume on a node away, while the volume is in use. If the node
owns the volume, another one does so first. Hosts see no error: the path through
that node becomes unavailable, the others go on. The last good copy is never
taken; when one good copy would be left it takes --force.`,
		RunE: func(c *cobra.Command, args []string) error {
			r := &v1.RemoveReplicaRequest{Volume: args[0], Node: args[1], Force: force, DryRun: true}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Replicas.RemoveReplica(ctx, r)
				if err != nil {
					return err
				}
				effect := fmt.Sprintf("The copy of volume %s on node %s is destroyed; copies left: %d.", v.Name, args[1], len(v.Replicas)-1)
				if k.dryRun {
					fmt.Fprintln(a.err, effect)
					return a.printVolume(v)
				}
				if err := a.confirm(k, effect); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				r.Volume, r.DryRun = v.Uuid, false
				if v, err = client.Replicas.RemoveReplica(again, r); err != nil {
					return err
				}
				a.next("twinsan volume show %s", v.Name)
				return a.printVolume(v)
			})
		},
	}
	k.flags(c)
	c.Flags().BoolVar(&force, "force", false, "although one good copy is left")
	return c
}
