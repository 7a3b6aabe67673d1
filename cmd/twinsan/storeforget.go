package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type forgottenPage struct {
	version1
	Device string `json:"device"`
}

func (f *forgottenPage) text(p *printer) {
	p.line("device %s is given up: the node opens its pool without it", f.Device)
}

func (a *app) storeForget() *cobra.Command {
	var k confirmation
	c := &cobra.Command{
		Use: "forget DEVICE", Short: "Give up a disk that failed for good, so that this node starts without it",
		Long: `Give up a disk that failed for good, so that this node starts without it. DEVICE is
its UUID, as the failed start has named it. That works for disks of class capacity,
which hold cold data alone: what stood there is repaired from the other node as it is
read or scrubbed. When metadata stood on the disk it says so, and then the node's
pool has to begin anew: twinsan store salvage.`,
		Args: arguments("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			effect := fmt.Sprintf("What stood on device %s has no copy on node %s any more; the disk is not taken back as it is.", args[0], config.Name)
			if k.dryRun {
				fmt.Fprintln(a.err, effect)
				return nil
			}
			if err := a.confirm(k, effect); err != nil {
				return err
			}
			if err := server.ForgetDevice(config, args[0]); err != nil {
				return err
			}
			if _, err := server.SalvageStore(c.Context(), config, true, nil); err == nil {
				fmt.Fprintln(a.err, "Metadata stood on that device: the pool does not open without it. What the other devices hold can be kept.")
				a.next("twinsan store salvage")
			} else {
				a.nextServe()
			}
			return a.print(&forgottenPage{v1Header, args[0]})
		},
	}
	k.flags(c)
	return c
}

type rebuiltPage struct {
	version1
	Devices []string `json:"devices"`
}

func (r *rebuiltPage) text(p *printer) {
	for _, d := range r.Devices {
		p.line("formatted %s", d)
	}
	p.line("the pool of this node is empty: the other node fills it when this one runs")
}

func (a *app) storeRebuild() *cobra.Command {
	var k confirmation
	var devices []string
	c := &cobra.Command{
		Use: "rebuild", Short: "Make this node's pool anew; the other node fills it again",
		Long: `Make this node's pool anew, on those of its disks that are there or on the given
ones. Everything that this node stores is lost. Its copies are filled by the other
node when it runs, while hosts go on. Look at "twinsan status" on the other node first:
every volume must be served there.`,
		Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			effect := fmt.Sprintf("Everything that node %s stores is lost. If the other node does not have all volumes, they are gone.", config.Name)
			if k.dryRun {
				fmt.Fprintln(a.err, effect)
				return nil
			}
			if err := a.confirmWord(k, effect, config.Name); err != nil {
				return err
			}
			list, err := server.RebuildStore(c.Context(), config, devices)
			if err != nil {
				return err
			}
			a.nextServe()
			return a.print(&rebuiltPage{v1Header, words(list)})
		},
	}
	c.Flags().StringSliceVar(&devices, "devices", nil, "disks of the new pool (default: those of the old one that are there)")
	k.flags(c)
	return c
}
