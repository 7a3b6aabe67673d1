package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

func (a *app) volumeMove() *cobra.Command {
	var to string
	c := &cobra.Command{
		Use: "move NAME --to NODE", Short: "Make another node the owner of a volume, while it is in use",
		Long: `Make another node the owner of a volume, while it is in use. That node must have a
copy in sync. Hosts see no error: they are told that the optimized path is
another one. Exit code 0: moved; 3: moved, and the volume is degraded; 4: that
node cannot take it, and the text says why.`,
		Example: "  twinsan volume move csv1 --to b", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			if to == "" {
				return usage("--to NODE is missing\n  see: twinsan volume show %s", args[0])
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.MoveVolume(ctx, &v1.MoveVolumeRequest{Name: args[0], To: to})
				if err != nil {
					return err
				}
				if err := a.printVolume(v); err != nil {
					return err
				}
				a.next("twinsan volume show %s", v.Name)
				if v.State == v1.VolumeState_VOLUME_STATE_DEGRADED {
					return &failure{exitDegraded, nil}
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&to, "to", "", "the node that becomes the owner")
	return c
}

type clearedPage struct {
	version1
	Volume       string            `json:"volume"`
	Cleared      bool              `json:"cleared"`
	Reservations *reservationsView `json:"reservations,omitempty"` // what was there
}

func (c *clearedPage) text(p *printer) {
	if c.Cleared {
		p.line("volume %s has no reservations any more", c.Volume)
	}
}

func (a *app) volumeClearReservations() *cobra.Command {
	var k confirmation
	c := &cobra.Command{
		Use: "clear-reservations NAME", Short: "Drop all SCSI reservations and registrations of a volume",
		Long: `Drop all SCSI reservations and registrations of a volume, on every node: for a
volume that a host has reserved which is gone for good. Hosts of a running
cluster that lose their reservation may write at the same time and destroy
data: stop them first. The event log keeps a record.`,
		Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Volumes.ClearReservations(ctx, &v1.ClearReservationsRequest{Name: args[0], DryRun: true})
				if err != nil {
					return err
				}
				was := viewReservations(r.Cleared)
				name := r.Volume.Name
				effect := reservationEffect(name, was)
				if k.dryRun || was == nil {
					fmt.Fprintln(a.err, effect)
					return a.print(&clearedPage{v1Header, name, false, was})
				}
				if err := a.confirmWord(k, effect, name); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if r, err = client.Volumes.ClearReservations(again, &v1.ClearReservationsRequest{Name: r.Volume.Uuid}); err != nil {
					return err
				}
				a.next("twinsan volume show %s", name)
				return a.print(&clearedPage{v1Header, name, true, viewReservations(r.Cleared)})
			})
		},
	}
	k.flags(c)
	return c
}

func reservationEffect(name string, was *reservationsView) string {
	if was == nil {
		return fmt.Sprintf("Volume %s has no reservations.", name)
	}
	effect := fmt.Sprintf("Volume %s loses its reservations. Hosts that rely on them may destroy data: stop them first.", name)
	if was.Type != "" {
		effect += "\n  reserved: " + was.Type
	}
	for _, x := range was.Registrations {
		effect += fmt.Sprintf("\n  registered: %s through node %s, key %s", orWord(x.Host, x.Initiator), x.Node, x.Key)
		if x.Holder {
			effect += ", holder"
		}
	}
	if was.Reserve != nil {
		effect += fmt.Sprintf("\n  RESERVE: %s through node %s", orWord(was.Reserve.Host, was.Reserve.Initiator), was.Reserve.Node)
	}
	return effect
}
