package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type volumesPage struct {
	version1
	Volumes []volumeView `json:"volumes"`
}

func (v *volumesPage) text(p *printer) { volumeTable(p, v.Volumes) }

func volumeTable(p *printer, volumes []volumeView) {
	rows := [][]string{}
	for _, v := range volumes {
		hosts := hostWords(&v)
		if v.AnyHost {
			hosts = "any"
		}
		rows = append(rows, []string{v.Name, fmt.Sprint(v.LUN), p.size(v.Size), p.size(v.Mapped), v.State, v.Owner, replicaWords(v.Replicas), fmt.Sprint(v.Snapshots), hosts})
	}
	p.table("VOLUME LUN SIZE MAPPED STATE OWNER REPLICAS SNAPSHOTS HOSTS", rows)
}

func replicaWords(replicas []replicaView) string {
	var out []string
	for _, r := range replicas {
		if r.State == "in_sync" {
			out = append(out, r.Node)
		} else {
			out = append(out, r.Node+"("+r.State+")")
		}
	}
	return strings.Join(out, ",")
}

type volumePage struct {
	version1
	Volume volumeView `json:"volume"`
	whole  bool       // print what hosts do with it as well
}

func (v *volumePage) text(p *printer) {
	x := v.Volume
	var policy []string
	for _, w := range []struct {
		on   bool
		word string
	}{{x.Thin, "thin"}, {!x.Thin, "thick"}, {x.Dedup, "deduplicated"}, {x.Compress, "compressed"}} {
		if w.on {
			policy = append(policy, w.word)
		}
	}
	if x.WritePolicy == string(server.MirroredRAM) {
		policy = append(policy, writeWords(&x))
	}
	snapshots, restoring := "", ""
	if x.Snapshots > 0 {
		snapshots = fmt.Sprint(x.Snapshots)
	}
	if x.Restoring {
		restoring = "it is being rolled back to a snapshot"
	}
	p.facts("volume", fmt.Sprintf("%s (LUN %d)", x.Name, x.LUN), "size", p.size(x.Size), "mapped", p.size(x.Mapped), "room", p.size(x.Room)+" in its pools", "state", x.State,
		"policy", strings.Join(policy, ", "), "blocks", fmt.Sprintf("%d bytes, physical %d", x.LogicalBlock, x.PhysicalBlock), "hosts", hostWords(&x),
		"owner", ownerWords(&x), "lineage", lineageWords(x.Lineage), "served by", list(x.ServedBy), "epoch", fmt.Sprint(x.Epoch), "created", since(x.Created),
		"clone of", x.Origin, "snapshots", snapshots, "rollback", restoring, "uuid", x.UUID, "serial", x.Serial, "naa", x.NAA,
		"reads", fmt.Sprintf("%d, %s", x.Traffic.ReadOps, p.size(x.Traffic.ReadBytes)),
		"writes", fmt.Sprintf("%d, %s", x.Traffic.WriteOps, p.size(x.Traffic.WriteBytes)))
	p.line("")
	rows := [][]string{}
	for _, r := range x.Replicas {
		role, progress := "", ""
		if r.Owner {
			role = "owner"
		}
		if r.State == "syncing" {
			progress = bar(r.ResyncDone, r.ResyncTotal) + timeLeft(r.ResyncLeft)
		} else if r.Since != nil {
			progress = "out of sync since " + since(r.Since)
		}
		rows = append(rows, []string{r.Node, r.State, role, progress})
	}
	p.table("REPLICA STATE ROLE RESYNC", rows)
	if !v.whole {
		return
	}
	p.line("")
	rows = [][]string{}
	for _, w := range x.Paths {
		rows = append(rows, []string{w.Node, strings.ReplaceAll(w.State, "_", "-"), list(w.Portals), fmt.Sprint(w.Sessions)})
	}
	p.table("PATH STATE PORTALS SESSIONS", rows)
	p.line("")
	commandTables(p, &x)
	p.line("")
	reservationTable(p, x.Reservations)
}

// writeWords says what the policy mirrored-ram comes to now.
func writeWords(v *volumeView) string {
	if v.DurableAlone {
		return v.WritePolicy + " (durable while only one copy is in sync)"
	}
	return v.WritePolicy
}

// hostWords says who sees a volume.
func hostWords(v *volumeView) string {
	var out []string
	if v.AnyHost {
		out = append(out, "any initiator")
	}
	for _, h := range v.Hosts {
		if slices.Contains(v.ReadOnlyHosts, h) {
			h += " (read-only)"
		}
		out = append(out, h)
	}
	return strings.Join(out, ",")
}

type deletedPage struct {
	version1
	Volume  volumeView `json:"volume"`
	Deleted bool       `json:"deleted"`
}

func (d *deletedPage) text(p *printer) {
	if d.Deleted {
		p.line("volume %s is deleted; its space is given back in the background", d.Volume.Name)
	}
}

func (a *app) volumeCommand() *cobra.Command {
	return noun("volume", "Mirrored volumes that hosts see as disks", []string{"vol"},
		a.volumeCreate(), a.volumeList(), a.volumeShow(), a.volumeSet(), a.volumeResize(), a.volumeDelete(), a.volumeCheck(),
		a.volumeHosts(), a.volumeMap(), a.volumeUnmap(), a.volumeMove(), a.volumeReplica(), a.volumePromote(), a.volumeClearReservations(),
		a.volumeClone(), a.volumeRollback())
}

func (a *app) volumeCreate() *cobra.Command {
	var hosts []string
	var anyHost, noDedup, noCompress, fourK, thick bool
	var sizeText, policy string
	var block, physical blockSize
	c := &cobra.Command{
		Use: "create NAME SIZE", Short: "Create a volume: mirrored, thin, deduplicated, compressed",
		Long: `Create a volume. It is mirrored, deduplicated and compressed, and takes space as it
is written.

Hosts see logical blocks of 512 bytes on physical ones of 4096 (512e). Other
profiles: --physical-block 512 (512n) for a host that refuses 512e, and
--block-size 4096 (4Kn), which ESXi and many boot loaders refuse. They never
change later. --thick hides thin provisioning from hosts: no UNMAP, no
thresholds; space is taken as it is written all the same.

--write-policy mirrored-ram answers a write when it is written on all copies in
sync and before it is flushed there, 200 ms later at most: hosts see a write
cache. The loss of one node loses nothing; if all lose power at once, hosts lose
what they did not flush. It can be changed later: twinsan volume set.`,
		Example: "  twinsan volume create csv1 2T --host hv1,hv2",
		Args: func(c *cobra.Command, args []string) error {
			if sizeText == "" {
				return arguments("NAME", "SIZE")(c, args)
			}
			return arguments("NAME")(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			if sizeText == "" {
				sizeText = args[1]
			}
			size, err := server.ParseSize(sizeText)
			if err != nil {
				return usage("%w", err)
			}
			if _, err := server.ParseWritePolicy(policy); err != nil {
				return usage("--write-policy %q: want durable or mirrored-ram", policy)
			}
			if fourK && block == 512 {
				return usage("--4kn means --block-size 4096, and --block-size 512 was given as well")
			}
			if fourK {
				block = 4096
			}
			if physical != 0 && physical < max(block, 512) {
				return usage("--physical-block %d is smaller than the logical block of %d bytes: want 512 or 4096, at least --block-size", physical, max(block, 512))
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.CreateVolume(ctx, &v1.CreateVolumeRequest{
					Name: args[0], SizeBytes: uint64(size), Hosts: hosts, AnyHost: anyHost, NoDedup: noDedup, NoCompress: noCompress,
					LogicalBlockBytes: uint32(block), PhysicalBlockBytes: uint32(physical), Thick: thick, WritePolicy: policy, RequestId: uuid.NewString(),
				})
				if err != nil {
					return err
				}
				if err := a.printVolume(v); err != nil {
					return err
				}
				switch {
				case len(hosts) > 0:
					a.next("twinsan connect %s %s", v.Name, hosts[0])
				case anyHost:
					a.next("twinsan cluster show   (any initiator may log in to the target)")
				default:
					a.next("twinsan volume map %s --host HOST   (no host sees the volume yet)", v.Name)
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&sizeText, "size", "", "size, in the place of the argument SIZE")
	c.Flags().StringSliceVar(&hosts, "host", nil, "hosts that see the volume")
	c.Flags().BoolVar(&anyHost, "any-host", false, "every initiator sees the volume, without authentication")
	c.Flags().BoolVar(&noDedup, "no-dedup", false, "do not look for duplicates")
	c.Flags().BoolVar(&noCompress, "no-compress", false, "do not compress")
	c.Flags().Var(&block, "block-size", "logical block: 512 (default) or 4096 bytes")
	c.Flags().Var(&physical, "physical-block", "physical block: 512 or 4096 (default) bytes")
	c.Flags().BoolVar(&fourK, "4kn", false, "the same as --block-size 4096")
	c.Flags().StringVar(&policy, "write-policy", "", "durable (default) or mirrored-ram")
	c.Flags().BoolVar(&thick, "thick", false, "do not offer UNMAP and thin provisioning to hosts")
	return c
}

// blockSize is a flag: 512 or 4096 bytes.
type blockSize uint32

func (b *blockSize) Set(text string) error {
	n, err := server.ParseSize(text)
	if err != nil || n != 512 && n != 4096 {
		return fmt.Errorf("%q is not a block size: want 512 or 4096", text)
	}
	*b = blockSize(n)
	return nil
}

func (b *blockSize) String() string {
	if *b == 0 {
		return ""
	}
	return fmt.Sprint(uint32(*b))
}

// Type names the value in usage texts.
func (b *blockSize) Type() string { return "bytes" }

// printVolume prints a volume after it was changed.
func (a *app) printVolume(v *v1.Volume) error {
	return a.print(&volumePage{version1: v1Header, Volume: viewVolume(v)})
}

func (a *app) volumeList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the volumes", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Volumes.ListVolumes(ctx, &v1.ListVolumesRequest{})
				if err != nil {
					return err
				}
				if err := a.print(&volumesPage{v1Header, views(r.Volumes, viewVolume)}); err != nil {
					return err
				}
				if len(r.Volumes) == 0 {
					a.next("twinsan volume create NAME SIZE --host HOST")
				} else {
					a.next("twinsan volume show %s", r.Volumes[0].Name)
				}
				return nil
			})
		},
	}
}

func (a *app) volumeShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show one volume", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.GetVolume(ctx, &v1.GetVolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if err := a.print(&volumePage{v1Header, viewVolume(v), true}); err != nil {
					return err
				}
				if len(v.Hosts) > 0 {
					a.next("twinsan connect %s %s", v.Name, v.Hosts[0])
				} else {
					a.next("twinsan volume check %s", v.Name)
				}
				return nil
			})
		},
	}
}

func (a *app) volumeSet() *cobra.Command {
	var policy string
	c := &cobra.Command{
		Use: "set NAME --write-policy POLICY", Short: "Change a policy of a volume while it is in use", Args: arguments("NAME"),
		Long: `Change when writes to a volume are answered. Hosts learn of it with their next
command (WCE of the caching mode page).

durable       when they are on stable storage of every copy in sync
mirrored-ram  when they are written on every copy in sync, and flushed within
              200 ms. The loss of one node loses nothing. If all nodes lose
              power at once, hosts lose what they did not flush themselves. With
              one copy in sync it is durable.`,
		Example: "  twinsan volume set csv1 --write-policy mirrored-ram",
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := server.ParseWritePolicy(policy); policy == "" || err != nil {
				return usage("--write-policy %q: want durable or mirrored-ram", policy)
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.SetVolume(ctx, &v1.SetVolumeRequest{Name: args[0], WritePolicy: policy})
				if err != nil {
					return err
				}
				return a.printVolume(v)
			})
		},
	}
	c.Flags().StringVar(&policy, "write-policy", "", "durable or mirrored-ram")
	return c
}

func (a *app) volumeResize() *cobra.Command {
	return &cobra.Command{
		Use: "resize NAME SIZE", Short: "Grow a volume while it is in use", Args: arguments("NAME", "SIZE"),
		RunE: func(c *cobra.Command, args []string) error {
			size, err := server.ParseSize(args[1])
			if err != nil {
				return usage("%w", err)
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.ResizeVolume(ctx, &v1.ResizeVolumeRequest{Name: args[0], SizeBytes: uint64(size)})
				if err != nil {
					return err
				}
				a.next("rescan the disk on its hosts (Linux: iscsiadm -m session -R; Windows: Update-HostStorageCache), then grow the file system")
				return a.printVolume(v)
			})
		},
	}
}

func (a *app) volumeDelete() *cobra.Command {
	var k confirmation
	var inUse, snapshots bool
	c := &cobra.Command{
		Use: "delete NAME", Short: "Delete a volume and its data on every node", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Volumes.DeleteVolume(ctx, &v1.DeleteVolumeRequest{Name: args[0], DryRun: true, InUse: inUse, WithSnapshots: snapshots})
				if err != nil {
					return err
				}
				v := viewVolume(r.Volume)
				p := &printer{bytes: a.bytes}
				effect := fmt.Sprintf("Volume %s (LUN %d, %s, %s of data) is destroyed on %s; this cannot be undone.",
					v.Name, v.LUN, p.size(v.Size), p.size(v.Mapped), replicaWords(v.Replicas))
				if v.Snapshots > 0 {
					effect += fmt.Sprintf("\n  its %d snapshots are destroyed as well", v.Snapshots)
				}
				for _, s := range r.Sessions {
					effect += fmt.Sprintf("\n  in use: %s is logged in to node %s", s.Initiator, s.Node)
				}
				if k.dryRun {
					fmt.Fprintln(a.err, effect)
					return a.print(&deletedPage{v1Header, v, false})
				}
				if err := a.confirm(k, effect); err != nil {
					return err
				}
				// The person may have taken longer than the deadline of the first call.
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if r, err = client.Volumes.DeleteVolume(again, &v1.DeleteVolumeRequest{Name: v.UUID, InUse: inUse, WithSnapshots: snapshots}); err != nil {
					return err
				}
				a.next("twinsan volume list")
				return a.print(&deletedPage{v1Header, viewVolume(r.Volume), true})
			})
		},
	}
	k.flags(c)
	c.Flags().BoolVar(&snapshots, "with-snapshots", false, "delete its snapshots as well")
	c.Flags().BoolVar(&inUse, "in-use", false, "delete although hosts that see the volume are logged in")
	return c
}
