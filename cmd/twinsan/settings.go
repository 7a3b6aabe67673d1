package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

func quorumWords(mode, preferred string) string {
	switch mode {
	case "auto":
		return "data nodes, and the witness when their number is even"
	case "witness":
		return "data nodes and the witness"
	case "majority":
		return "data nodes"
	case "preferred_node":
		return "node " + preferred + " alone"
	}
	return ""
}

func balanceWords(on bool, after float64) string {
	if !on {
		return "off: volumes stay where they are"
	}
	return fmt.Sprintf("on, %s after nodes and copies have settled", time.Duration(after*float64(time.Second)))
}

func levelWords(level, known uint32) string {
	if known > level {
		return fmt.Sprintf("%d; this version knows %d: twinsan upgrade plan", level, known)
	}
	return fmt.Sprint(level)
}

func resyncWords(rate uint32) string {
	if rate == 0 {
		return "as much as there is while initiators do not suffer"
	}
	return fmt.Sprintf("%d MiB/s from one node at most", rate)
}

func (a *app) setResyncRate() *cobra.Command {
	return &cobra.Command{
		Use: "resync-rate MIB|auto", Short: "Bound what a node sends to replicas that catch up", Args: arguments("MIB|auto"),
		Long: `Bound what a node sends to replicas that catch up, all of them together, in MiB a
second: 10 and more, or auto. With auto, and below the bound, a resync takes what
there is while initiators do not wait longer for it, and 10 MiB a second when they do.`,
		Example: "  twinsan cluster set resync-rate 200\n  twinsan cluster set resync-rate auto",
		RunE: func(c *cobra.Command, args []string) error {
			rate := uint64(0)
			if args[0] != "auto" {
				var err error
				if rate, err = strconv.ParseUint(args[0], 10, 32); err != nil || rate == 0 {
					return usage("resync-rate %s: want MiB a second, or auto", args[0])
				}
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				i, err := client.Maintenance.SetResyncRate(ctx, &v1.SetResyncRateRequest{MibPerSecond: uint32(rate)})
				if err != nil {
					return err
				}
				a.next("twinsan status")
				return a.print(newClusterPage(i))
			})
		},
	}
}

func (a *app) setBalance() *cobra.Command {
	var after time.Duration
	c := &cobra.Command{
		Use: "balance on|off", Short: "Say whether volumes go back to the nodes that they belong to", Args: arguments("on|off"),
		Long: `Say whether volumes go back to the nodes that they belong to after a node has come
back: one after the other, without an error at any host, when nodes and copies
have been settled for a while. A volume belongs to the node that it was made or
moved to; those that belong to none are spread.`,
		RunE: func(c *cobra.Command, args []string) error {
			if args[0] != "on" && args[0] != "off" {
				return usage("balance %s: want on or off", args[0])
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				i, err := client.Maintenance.SetBalance(ctx, &v1.SetBalanceRequest{On: args[0] == "on", After: durationpb.New(after)})
				if err != nil {
					return err
				}
				return a.print(newClusterPage(i))
			})
		},
	}
	c.Flags().DurationVar(&after, "after", 0, "how long nodes and copies must have been settled (default 1m0s)")
	return c
}

func (a *app) setQuorum() *cobra.Command {
	return &cobra.Command{
		Use: "quorum auto|witness|majority|preferred-node NODE", Short: "Say which nodes decide, while the cluster runs",
		Long: `Say which nodes decide who owns what, while the cluster runs:

  auto             data nodes, with the witness when their number is even; of two
                   without a witness the preferred one
  witness          the same, and there has to be a witness
  majority         the data nodes, three or more of odd number
  preferred-node   one data node alone: it survives the loss of all others. When it
                   is lost itself, nothing is decided until an administrator has:
                   twinsan cluster recover, on a node that is left

The group follows step by step, each one when a majority is there before and after
it: twinsan node list shows who votes. To replace a witness: twinsan node remove W,
then twinsan cluster token create --witness.`,
		Example: "  twinsan cluster set quorum witness\n  twinsan cluster set quorum preferred-node a",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 && args[0] == "preferred-node" {
				return arguments("preferred-node", "NODE")(c, args)
			}
			return arguments("MODE")(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			r := &v1.SetQuorumRequest{Mode: map[string]v1.QuorumMode{
				"auto": v1.QuorumMode_QUORUM_MODE_AUTO, "witness": v1.QuorumMode_QUORUM_MODE_WITNESS,
				"majority": v1.QuorumMode_QUORUM_MODE_MAJORITY, "preferred-node": v1.QuorumMode_QUORUM_MODE_PREFERRED_NODE,
			}[args[0]]}
			if r.Mode == v1.QuorumMode_QUORUM_MODE_UNSPECIFIED {
				return usage("quorum %s: want auto, witness, majority or preferred-node NODE", args[0])
			}
			if len(args) == 2 {
				r.PreferredNode = args[1]
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				i, err := client.Maintenance.SetQuorum(ctx, r)
				if err != nil {
					return err
				}
				a.next("twinsan node list")
				return a.print(newClusterPage(i))
			})
		},
	}
}
