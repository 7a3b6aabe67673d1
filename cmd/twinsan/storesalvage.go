package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

type salvagedPage struct {
	version1
	DryRun   bool     `json:"dry_run"`
	Missing  []string `json:"missing"`
	Devices  []string `json:"devices"`
	Segments int      `json:"segments"`
	LetGo    int      `json:"segments_let_go"`
	Blocks   uint64   `json:"blocks"`
	Bytes    uint64   `json:"bytes"`
	Damaged  uint64   `json:"damaged"`
	Rate     uint64   `json:"bytes_per_second"`
}

func (s *salvagedPage) text(p *printer) {
	for _, d := range s.Missing {
		p.line("missing  %s", d)
	}
	for _, d := range s.Devices {
		p.line("left     %s", d)
	}
	if s.DryRun {
		p.line("%d segments may hold blocks and would be read", s.Segments)
		return
	}
	p.line("%s in %d blocks kept, read at %s/s; %d damaged, %d of %d segments let go", p.size(s.Bytes), s.Blocks, p.size(s.Rate), s.Damaged, s.LetGo, s.Segments)
	p.line("the pool of this node has no volumes: the other node fills them when this one runs, and sends what is missing")
}

func (a *app) storeSalvage() *cobra.Command {
	var k confirmation
	var end bool
	c := &cobra.Command{
		Use: "salvage", Short: "Begin this node's pool anew after a disk was lost, and keep the blocks of the others",
		Long: `Begin this node's pool anew after a disk was lost that it cannot do without, and keep
the blocks that stand on the other disks. The node's copies are filled by the other
node when it runs, while hosts go on; it asks by fingerprint, so only what the lost
disk held moves. No volume survives here: look at "twinsan status" on the other node
first, every volume must be served there. All disks that are left are read once. When
it is interrupted run it again. What no copy needs in the end goes by itself; --end
gives it up now. Add a disk for the lost one later: twinsan device add.`,
		Example: "  systemctl stop twinsan\n  twinsan store salvage --dry-run\n  twinsan store salvage\n  systemctl start twinsan",
		Args:    arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			if end {
				if k.dryRun {
					fmt.Fprintln(a.err, "What a salvage kept and no volume has again would be given up.")
					return nil
				}
				if err := server.EndSalvage(c.Context(), config); err != nil {
					return err
				}
				a.nextServe()
				return nil
			}
			effect := fmt.Sprintf("No volume of node %s survives, only nameless blocks. If the other node does not have all volumes, they are gone.", config.Name)
			if k.dryRun {
				fmt.Fprintln(a.err, effect)
			} else if err := a.confirmWord(k, effect, config.Name); err != nil {
				return err
			}
			told := int64(-1)
			s, err := server.SalvageStore(c.Context(), config, k.dryRun, func(done, total, kept int64) {
				if part := done * 20 / max(total, 1); part != told {
					told = part
					fmt.Fprintf(a.err, "%s of %s read, %s kept\n", server.Size(done), server.Size(total), server.Size(kept))
				}
			})
			if err != nil {
				return err
			}
			if !k.dryRun {
				a.nextServe()
			}
			return a.print(&salvagedPage{v1Header, k.dryRun, words(s.Missing), words(s.Devices), s.Segments, s.LetGo, s.Blocks, s.Bytes, s.Damaged, uint64(s.Rate)})
		},
	}
	c.Flags().BoolVar(&end, "end", false, "give up what a salvage kept and no volume has again")
	k.flags(c)
	return c
}
