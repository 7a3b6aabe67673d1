package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type promotionPage struct {
	version1
	Volume   string   `json:"volume"`
	Node     string   `json:"node"`
	Promoted bool     `json:"promoted"`
	Epoch    uint64   `json:"epoch"` // before
	Facts    []string `json:"facts"`
	Refuse   string   `json:"refuse,omitempty"`
}

func (x *promotionPage) text(p *printer) {
	for _, f := range x.Facts {
		p.line("%s", f)
	}
	switch {
	case x.Promoted:
		p.line("volume %s: the copy on node %s is the good one from now on", x.Volume, x.Node)
	case x.Refuse != "":
		p.line("it cannot be promoted: %s", x.Refuse)
	}
}

func (a *app) volumePromote() *cobra.Command {
	var node string
	var force, inconsistent, dryRun bool
	var typed string
	c := &cobra.Command{
		Use: "promote NAME --node NODE --force", Short: "Make an old copy the good one, when the better ones are lost for good", Args: arguments("NAME"),
		Long: `Make an old copy of a volume the good one, when all better copies are lost for
good. What hosts wrote since that copy fell out of sync is lost; better copies are
discarded when their nodes come back, and never merged. Switch those machines off
first: one that is cut off may be serving hosts. Refused while a good copy is on a
node that answers. The name of the volume has to be typed; the event log keeps a
record. Without a quorum: twinsan cluster recover, first.`,
		RunE: func(c *cobra.Command, args []string) error {
			if node == "" {
				return usage("--node NODE is missing: whose copy?\n  see: twinsan volume show %s", args[0])
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Replicas.PromoteVolume(ctx, &v1.PromoteVolumeRequest{Volume: args[0], Node: node, Inconsistent: inconsistent, DryRun: true})
				if err != nil {
					return err
				}
				page := &promotionPage{v1Header, r.Volume.Name, node, false, r.Epoch, words(r.Facts), r.Refuse}
				if dryRun {
					return a.print(page)
				}
				if r.Refuse != "" {
					return refuse("%s", r.Refuse)
				}
				effect := fmt.Sprintf("The copy of volume %s on node %s becomes the only good one; this cannot be undone.\n  %s", r.Volume.Name, node, strings.Join(r.Facts, "\n  "))
				if !force {
					return refuse("%s\n  when that is what you want: --force", effect)
				}
				// No --yes here: who means it knows the name.
				if typed != "" && typed != r.Volume.Name {
					return refuse("--confirm %s is not the name of the volume; nothing was changed", typed)
				}
				if err := a.confirmWord(confirmation{yes: typed != ""}, effect, r.Volume.Name); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if _, err = client.Replicas.PromoteVolume(again, &v1.PromoteVolumeRequest{Volume: r.Volume.Uuid, Node: node, Inconsistent: inconsistent, Epoch: r.Epoch}); err != nil {
					return err
				}
				page.Promoted = true
				a.next("twinsan volume show %s", page.Volume)
				return a.print(page)
			})
		},
	}
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only show what is known of the copies")
	c.Flags().StringVar(&typed, "confirm", "", "the name of the volume, instead of typing it when asked")
	c.Flags().StringVar(&node, "node", "", "the node whose copy becomes the good one")
	c.Flags().BoolVar(&force, "force", false, "really")
	c.Flags().BoolVar(&inconsistent, "inconsistent", false, "accept a copy in the middle of a resync, a mixture of old and new")
	return c
}
