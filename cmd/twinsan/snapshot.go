package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type snapshotView struct {
	ID        uint64     `json:"id"`
	Name      string     `json:"name"`
	Volume    string     `json:"volume"`
	State     string     `json:"state"`
	Created   *time.Time `json:"created,omitempty"`
	Size      uint64     `json:"size_bytes"`
	Mapped    uint64     `json:"mapped_bytes"`
	Group     []string   `json:"group"`
	Scheduled bool       `json:"scheduled"`
	Clones    []string   `json:"clones"`
}

func viewSnapshot(s *v1.Snapshot) snapshotView {
	return snapshotView{s.Id, s.Name, s.Volume, api.Word(s.State, "SNAPSHOT_STATE_"), moment(api.Time(s.Created)), s.SizeBytes, s.MappedBytes,
		words(s.Group), s.Scheduled, words(s.Clones)}
}

func (s *snapshotView) full() string { return s.Volume + "@" + s.Name }

type snapshotsPage struct {
	version1
	Snapshots []snapshotView `json:"snapshots"`
}

func (s *snapshotsPage) text(p *printer) {
	rows := [][]string{}
	for _, x := range s.Snapshots {
		by := "administrator"
		if x.Scheduled {
			by = "schedule"
		}
		rows = append(rows, []string{x.full(), x.State, since(x.Created), p.size(x.Size), p.size(x.Mapped), by, list(x.Clones)})
	}
	p.table("SNAPSHOT STATE CREATED SIZE MAPPED BY CLONES", rows)
}

type snapshotPage struct {
	version1
	Snapshot snapshotView `json:"snapshot"`
}

func (s *snapshotPage) text(p *printer) {
	x := s.Snapshot
	group, by := "", "administrator"
	if len(x.Group) > 1 {
		group = list(x.Group)
	}
	if x.Scheduled {
		by = "the schedule of the volume, which deletes it some day"
	}
	p.facts("snapshot", x.full(), "state", x.State, "created", since(x.Created), "size", p.size(x.Size), "mapped", p.size(x.Mapped),
		"taken by", by, "together with", group, "clones", list(x.Clones))
}

type snapshotDeletedPage struct {
	version1
	Snapshot snapshotView `json:"snapshot"`
	Deleted  bool         `json:"deleted"`
}

func (d *snapshotDeletedPage) text(p *printer) {
	if d.Deleted {
		p.line("snapshot %s is deleted; its space is given back in the background", d.Snapshot.full())
	}
}

// splitSnapshot reads VOLUME@SNAPSHOT.
func splitSnapshot(text string) (volume, name string, err error) {
	volume, name, ok := strings.Cut(text, "@")
	if !ok || volume == "" || name == "" {
		return "", "", usage("%q names no snapshot: want VOLUME@SNAPSHOT\n  see: twinsan snapshot list", text)
	}
	return volume, name, nil
}

func (a *app) snapshotCommand() *cobra.Command {
	return noun("snapshot", "Volumes as they were at a moment, the same on every node", []string{"snap"},
		a.snapshotCreate(), a.snapshotList(), a.snapshotShow(), a.snapshotDelete(), a.snapshotDiff(), a.scheduleCommand())
}

func (a *app) snapshotCreate() *cobra.Command {
	var volumes []string
	c := &cobra.Command{
		Use: "create NAME --volume VOLUME [--volume VOLUME ...]", Short: "Take a snapshot of a volume, or of several at one moment",
		Long: `Take a snapshot of a volume. It takes no room at first; what is overwritten later
stays for it. Every node that has the volume in sync has the snapshot.

With several volumes they all are of one moment: writes to them are held until
each has its snapshot, two seconds at most. When one fails, there is none.

To a host it is as if the power had failed at that moment. For more, have the
applications write out what they hold first.`,
		Example: "  twinsan snapshot create before-update --volume csv1\n  twinsan snapshot create nightly --volume db-data --volume db-log",
		Args:    arguments("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			name := args[0]
			if volume, after, ok := strings.Cut(name, "@"); ok && len(volumes) == 0 {
				volumes, name = []string{volume}, after
			}
			if len(volumes) == 0 {
				return usage("--volume VOLUME is missing\n  usage: %s", c.UseLine())
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Snapshots.CreateSnapshots(ctx, &v1.CreateSnapshotsRequest{Name: name, Volumes: volumes, RequestId: uuid.NewString()})
				if err != nil {
					return err
				}
				if err := a.print(&snapshotsPage{v1Header, views(r.Snapshots, viewSnapshot)}); err != nil {
					return err
				}
				if len(r.Snapshots) > 0 {
					x := viewSnapshot(r.Snapshots[0])
					a.next("twinsan volume clone %s NEWNAME, or twinsan snapshot list --volume %s", x.full(), x.Volume)
				}
				return nil
			})
		},
	}
	c.Flags().StringSliceVar(&volumes, "volume", nil, "volume to take it of; more than one: at the same moment")
	return c
}

func (a *app) snapshotList() *cobra.Command {
	var volume string
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List snapshots, oldest first", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Snapshots.ListSnapshots(ctx, &v1.ListSnapshotsRequest{Volume: volume})
				if err != nil {
					return err
				}
				if err := a.print(&snapshotsPage{v1Header, views(r.Snapshots, viewSnapshot)}); err != nil {
					return err
				}
				if len(r.Snapshots) == 0 {
					a.next("twinsan snapshot create NAME --volume VOLUME")
				} else {
					a.next("twinsan volume clone %s@%s NEWNAME", r.Snapshots[0].Volume, r.Snapshots[0].Name)
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&volume, "volume", "", "only those of this volume")
	return c
}

func (a *app) snapshotShow() *cobra.Command {
	return &cobra.Command{
		Use: "show VOLUME@SNAPSHOT", Short: "Show one snapshot", Args: arguments("VOLUME@SNAPSHOT"),
		RunE: func(c *cobra.Command, args []string) error {
			volume, name, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				s, err := client.Snapshots.GetSnapshot(ctx, &v1.GetSnapshotRequest{Volume: volume, Name: name})
				if err != nil {
					return err
				}
				a.next("twinsan volume clone %s NEWNAME, or twinsan snapshot diff %s", args[0], args[0])
				return a.print(&snapshotPage{v1Header, viewSnapshot(s)})
			})
		},
	}
}

func (a *app) snapshotDelete() *cobra.Command {
	var k confirmation
	c := &cobra.Command{
		Use: "delete VOLUME@SNAPSHOT", Short: "Delete a snapshot on every node", Args: arguments("VOLUME@SNAPSHOT"),
		RunE: func(c *cobra.Command, args []string) error {
			volume, name, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Snapshots.DeleteSnapshot(ctx, &v1.DeleteSnapshotRequest{Volume: volume, Name: name, DryRun: true})
				if err != nil {
					return err
				}
				s := viewSnapshot(r.Snapshot)
				effect := fmt.Sprintf("Snapshot %s of %s is destroyed on every node; this cannot be undone.", s.full(), since(s.Created))
				if len(s.Clones) > 0 {
					effect += "\n  its clones stay: " + list(s.Clones)
				}
				if k.dryRun {
					fmt.Fprintln(a.err, effect)
					return a.print(&snapshotDeletedPage{v1Header, s, false})
				}
				if err := a.confirm(k, effect); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if _, err = client.Snapshots.DeleteSnapshot(again, &v1.DeleteSnapshotRequest{Volume: volume, Name: name}); err != nil {
					return err
				}
				a.next("twinsan snapshot list --volume %s", s.Volume)
				return a.print(&snapshotDeletedPage{v1Header, s, true})
			})
		},
	}
	k.flags(c)
	return c
}

// rangePage is one changed range: ranges are printed as they come, in JSON one
// object on each line.
type rangePage struct {
	version1
	Offset uint64 `json:"offset"`
	Length uint64 `json:"length"`
	Kind   string `json:"kind"` // data, hole
}

func (r *rangePage) text(p *printer) { p.line("%16d %16d  %s", r.Offset, r.Length, r.Kind) }

func (a *app) snapshotDiff() *cobra.Command {
	var asJSON bool
	var offset uint64
	c := &cobra.Command{
		Use: "diff VOLUME@FROM [VOLUME@]TO | VOLUME@SNAPSHOT", Short: "List the ranges in which two snapshots differ, for backup programs",
		Long: `List the ranges in which two snapshots of a volume differ, or with one snapshot all
ranges that it has data in: offset and length in bytes, in order, and whether
the newer one has data there or a hole, which reads as zeros. A backup program
reads these ranges from a clone of the newer snapshot.

The output may be cut off and taken up again: --offset takes the end of the last
range that was read.`,
		Example: "  twinsan snapshot diff csv1@monday tuesday --json",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 1 {
				return nil
			}
			return arguments("VOLUME@FROM", "VOLUME@TO")(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			volume, name, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			request := &v1.ListChangesRequest{Volume: volume, To: name, Offset: offset}
			if len(args) == 2 {
				request.From, request.To = name, args[1]
				if of, to, ok := strings.Cut(args[1], "@"); ok {
					if of != volume {
						return usage("%s and %s are of two volumes", args[0], args[1])
					}
					request.To = to
				}
			}
			return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error {
				stream, err := client.Snapshots.ListChanges(ctx, request)
				if err != nil {
					return err
				}
				next := offset
				for {
					m, err := stream.Recv()
					if errors.Is(err, io.EOF) {
						return nil
					}
					if err != nil {
						a.next("the same with --offset %d goes on here", next)
						return err
					}
					for _, r := range m.Ranges {
						x := &rangePage{v1Header, r.Offset, r.Length, "data"}
						if r.Hole {
							x.Kind = "hole"
						}
						if err := a.printRange(x, asJSON); err != nil {
							return err
						}
					}
					next = m.NextOffset
				}
			})
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "the same as -o json: one object on each line")
	c.Flags().Uint64Var(&offset, "offset", 0, "begin at this byte, a multiple of 4096")
	return c
}

func (a *app) printRange(r *rangePage, asJSON bool) error {
	if !asJSON && a.output != "json" {
		return a.print(r)
	}
	line, err := json.Marshal(r)
	if err == nil {
		_, err = fmt.Fprintf(a.out, "%s\n", line)
	}
	return err
}

func (a *app) volumeClone() *cobra.Command {
	var hosts []string
	var anyHost bool
	var sizeText string
	c := &cobra.Command{
		Use: "clone VOLUME@SNAPSHOT NEWNAME", Short: "Make a writable volume that begins as a snapshot",
		Long: `Make a writable volume that begins as a snapshot, on the same nodes. It is there at
once and takes room only for what is written to it. Snapshot, volume and clone
may be deleted in any order.`,
		Example: "  twinsan volume clone csv1@before-update csv1-test --host hv1", Args: arguments("VOLUME@SNAPSHOT", "NEWNAME"),
		RunE: func(c *cobra.Command, args []string) error {
			volume, name, err := splitSnapshot(args[0])
			if err != nil {
				return err
			}
			size := server.Size(0)
			if sizeText != "" {
				if size, err = server.ParseSize(sizeText); err != nil {
					return usage("%w", err)
				}
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				v, err := client.Snapshots.CloneSnapshot(ctx, &v1.CloneSnapshotRequest{
					Volume: volume, Snapshot: name, Name: args[1], SizeBytes: uint64(size), Hosts: hosts, AnyHost: anyHost, RequestId: uuid.NewString(),
				})
				if err != nil {
					return err
				}
				if len(hosts) > 0 {
					a.next("twinsan connect %s %s", v.Name, hosts[0])
				} else {
					a.next("twinsan volume map %s --host HOST   (no host sees the volume yet)", v.Name)
				}
				return a.printVolume(v)
			})
		},
	}
	c.Flags().StringSliceVar(&hosts, "host", nil, "hosts that see the volume")
	c.Flags().BoolVar(&anyHost, "any-host", false, "every initiator sees the volume, without authentication")
	c.Flags().StringVar(&sizeText, "size", "", "size, at least that of the snapshot, which is the default")
	return c
}

type rolledBackPage struct {
	version1
	Volume     volumeView   `json:"volume"`
	Snapshot   snapshotView `json:"snapshot"`
	RolledBack bool         `json:"rolled_back"`
}

func (r *rolledBackPage) text(p *printer) {
	if r.RolledBack {
		p.line("volume %s holds what it held in snapshot %s", r.Volume.Name, r.Snapshot.Name)
	}
}

func (a *app) volumeRollback() *cobra.Command {
	var k confirmation
	var inUse bool
	var snapshot string
	c := &cobra.Command{
		Use: "rollback VOLUME --snapshot SNAPSHOT", Short: "Make a volume what a snapshot of it holds",
		Long: `Make a volume what a snapshot of it holds, on every node. What was written since is
lost, unless another snapshot has it: take one first. The size stays; what the
volume grew by reads as zeros. The snapshots stay.

Hosts must not use the volume meanwhile, because they know nothing of it: it is
refused while one is logged in that sees the volume. With --in-use it is done
all the same, and they are told that the medium may have changed.`,
		Example: "  twinsan volume rollback csv1 --snapshot before-update", Args: arguments("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			if volume, name, ok := strings.Cut(args[0], "@"); ok && snapshot == "" {
				args[0], snapshot = volume, name
			}
			if snapshot == "" {
				return usage("--snapshot SNAPSHOT is missing\n  see: twinsan snapshot list --volume %s", args[0])
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Snapshots.RollBackVolume(ctx, &v1.RollBackVolumeRequest{Volume: args[0], Snapshot: snapshot, DryRun: true, InUse: inUse})
				if err != nil {
					return err
				}
				v, s := viewVolume(r.Volume), viewSnapshot(r.Snapshot)
				effect := fmt.Sprintf("Volume %s becomes what it was in snapshot %s (%s). What was written since is lost; this cannot be undone.", v.Name, s.Name, since(s.Created))
				for _, x := range r.Sessions {
					effect += fmt.Sprintf("\n  in use: %s is logged in to node %s and may write over it what it has in memory", x.Initiator, x.Node)
				}
				if k.dryRun {
					fmt.Fprintln(a.err, effect)
					return a.print(&rolledBackPage{v1Header, v, s, false})
				}
				if err := a.confirm(k, effect); err != nil {
					return err
				}
				again, cancel := context.WithTimeout(c.Context(), a.timeout)
				defer cancel()
				if r, err = client.Snapshots.RollBackVolume(again, &v1.RollBackVolumeRequest{Volume: v.UUID, Snapshot: s.Name, InUse: inUse}); err != nil {
					return err
				}
				a.next("have the hosts look at the disk again, or twinsan volume show %s", v.Name)
				return a.print(&rolledBackPage{v1Header, viewVolume(r.Volume), s, true})
			})
		},
	}
	k.flags(c)
	c.Flags().StringVar(&snapshot, "snapshot", "", "the snapshot")
	c.Flags().BoolVar(&inUse, "in-use", false, "although hosts that see the volume are logged in")
	c.Flags().BoolVar(&inUse, "force", false, "the same as --in-use")
	return c
}
