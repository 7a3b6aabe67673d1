package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

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
		hosts := list(v.Hosts)
		if v.AnyHost {
			hosts = "any"
		}
		rows = append(rows, []string{v.Name, fmt.Sprint(v.LUN), p.size(v.Size), p.size(v.Mapped), v.State, v.Owner, replicaWords(v.Replicas), hosts})
	}
	p.table("VOLUME LUN SIZE MAPPED STATE OWNER REPLICAS HOSTS", rows)
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
}

func (v *volumePage) text(p *printer) {
	x := v.Volume
	hosts := list(x.Hosts)
	if x.AnyHost {
		hosts = "any initiator"
	}
	var policy []string
	for _, w := range []struct {
		on   bool
		word string
	}{{x.Thin, "thin"}, {x.Dedup, "deduplicated"}, {x.Compress, "compressed"}} {
		if w.on {
			policy = append(policy, w.word)
		}
	}
	p.facts("volume", fmt.Sprintf("%s (LUN %d)", x.Name, x.LUN), "size", p.size(x.Size), "mapped", p.size(x.Mapped), "state", x.State,
		"policy", strings.Join(policy, ", "), "blocks", fmt.Sprintf("%d bytes", x.LogicalBlock), "hosts", hosts,
		"owner", x.Owner, "served by", list(x.ServedBy), "epoch", fmt.Sprint(x.Epoch), "created", since(x.Created),
		"uuid", x.UUID, "serial", x.Serial, "naa", x.NAA,
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
			progress = bar(r.ResyncDone, r.ResyncTotal)
		}
		rows = append(rows, []string{r.Node, r.State, role, progress})
	}
	p.table("REPLICA STATE ROLE RESYNC", rows)
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

type checkPage struct {
	version1
	Volume  string       `json:"volume"`
	Equal   bool         `json:"equal"`
	Digests []digestView `json:"digests"`
}

type digestView struct {
	Node      string   `json:"node"`
	Digest    string   `json:"digest"`
	Different []uint32 `json:"different_chunks,omitempty"`
	Error     string   `json:"error,omitempty"`
}

func (c *checkPage) text(p *printer) {
	rows := [][]string{}
	for _, d := range c.Digests {
		problem := d.Error
		if len(d.Different) > 0 {
			problem = fmt.Sprintf("differs, first in MiB %d", d.Different[0])
		}
		rows = append(rows, []string{d.Node, d.Digest, problem})
	}
	p.table("REPLICA DIGEST PROBLEM", rows)
	if c.Equal {
		p.line("volume %s: all replicas hold the same content", c.Volume)
	} else {
		p.line("volume %s: the replicas are NOT proved equal", c.Volume)
	}
}

func (a *app) volumeCommand() *cobra.Command {
	return noun("volume", "Mirrored volumes that hosts see as disks", []string{"vol"},
		a.volumeCreate(), a.volumeList(), a.volumeShow(), a.volumeResize(), a.volumeDelete(), a.volumeCheck(), a.volumeHosts())
}

func (a *app) volumeCreate() *cobra.Command {
	var hosts []string
	var anyHost, noDedup, noCompress, fourK bool
	c := &cobra.Command{
		Use: "create NAME SIZE", Short: "Create a volume: mirrored, thin, deduplicated, compressed",
		Example: "  twinsan volume create csv1 2T --host hv1,hv2", Args: arguments("NAME", "SIZE"),
		RunE: func(c *cobra.Command, args []string) error {
			size, err := server.ParseSize(args[1])
			if err != nil {
				return usage("%w", err)
			}
			block := uint32(512)
			if fourK {
				block = 4096
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Volumes.CreateVolume(ctx, &v1.CreateVolumeRequest{
					Name: args[0], SizeBytes: uint64(size), Hosts: hosts, AnyHost: anyHost, NoDedup: noDedup, NoCompress: noCompress,
					LogicalBlockBytes: block, RequestId: uuid.NewString(),
				})
				if err != nil {
					return err
				}
				if err := a.print(&volumePage{v1Header, viewVolume(v)}); err != nil {
					return err
				}
				switch {
				case len(hosts) > 0:
					a.next("twinsan connect %s %s", v.Name, hosts[0])
				case anyHost:
					a.next("twinsan cluster show   (any initiator may log in to the target)")
				default:
					a.next("twinsan volume hosts %s HOST   (no host sees the volume yet)", v.Name)
				}
				return nil
			})
		},
	}
	c.Flags().StringSliceVar(&hosts, "host", nil, "hosts that see the volume")
	c.Flags().BoolVar(&anyHost, "any-host", false, "every initiator sees the volume, without authentication")
	c.Flags().BoolVar(&noDedup, "no-dedup", false, "do not look for duplicates")
	c.Flags().BoolVar(&noCompress, "no-compress", false, "do not compress")
	c.Flags().BoolVar(&fourK, "4kn", false, "logical blocks of 4096 bytes instead of 512")
	return c
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
				if err := a.print(&volumePage{v1Header, viewVolume(v)}); err != nil {
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
				return a.print(&volumePage{v1Header, viewVolume(v)})
			})
		},
	}
}

func (a *app) volumeDelete() *cobra.Command {
	var k confirmation
	var inUse bool
	c := &cobra.Command{
		Use: "delete NAME", Short: "Delete a volume and its data on every node", Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Volumes.DeleteVolume(ctx, &v1.DeleteVolumeRequest{Name: args[0], DryRun: true, InUse: inUse})
				if err != nil {
					return err
				}
				v := viewVolume(r.Volume)
				p := &printer{bytes: a.bytes}
				effect := fmt.Sprintf("Volume %s (LUN %d, %s, %s of data) is destroyed on %s; this cannot be undone.",
					v.Name, v.LUN, p.size(v.Size), p.size(v.Mapped), replicaWords(v.Replicas))
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
				if r, err = client.Volumes.DeleteVolume(again, &v1.DeleteVolumeRequest{Name: v.UUID, InUse: inUse}); err != nil {
					return err
				}
				a.next("twinsan volume list")
				return a.print(&deletedPage{v1Header, viewVolume(r.Volume), true})
			})
		},
	}
	k.flags(c)
	c.Flags().BoolVar(&inUse, "in-use", false, "delete although hosts that see the volume are logged in")
	return c
}

func (a *app) volumeCheck() *cobra.Command {
	var limit time.Duration
	c := &cobra.Command{
		Use: "check NAME", Short: "Compare the content of all replicas by digest",
		Long: "Compare the content of all replicas by digest. Exit code 0: equal; 1: not equal; 3: some replica could not be asked.",
		Args: arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), limit)
			defer cancel()
			return a.stream(ctx, func(ctx context.Context, client *api.Client) error {
				r, err := client.Volumes.CheckVolume(ctx, &v1.CheckVolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				page := &checkPage{v1Header, args[0], r.Equal, views(r.Digests, func(d *v1.ReplicaDigest) digestView {
					return digestView{d.Node, hex.EncodeToString(d.Digest), d.DifferentChunks, d.Error}
				})}
				if err := a.print(page); err != nil {
					return err
				}
				if r.Equal {
					return nil
				}
				a.next("twinsan status")
				for _, d := range r.Digests {
					if len(d.DifferentChunks) > 0 {
						return &failure{exitFailed, nil}
					}
				}
				return &failure{exitDegraded, nil}
			})
		},
	}
	c.Flags().DurationVar(&limit, "limit", time.Hour, "how long the check may take")
	return c
}

func (a *app) volumeHosts() *cobra.Command {
	var anyHost bool
	c := &cobra.Command{
		Use: "hosts NAME [HOST...]", Short: "Let exactly these hosts see a volume",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return arguments("NAME")(c, args)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Hosts.SetVolumeHosts(ctx, &v1.SetVolumeHostsRequest{Volume: args[0], Hosts: args[1:], AnyHost: anyHost})
				if err != nil {
					return err
				}
				if len(args) > 1 {
					a.next("twinsan connect %s %s", v.Name, args[1])
				}
				return a.print(&volumePage{v1Header, viewVolume(v)})
			})
		},
	}
	c.Flags().BoolVar(&anyHost, "any-host", false, "every initiator sees the volume, without authentication")
	return c
}
