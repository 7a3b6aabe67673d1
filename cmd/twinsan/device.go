package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type devicesPage struct {
	version1
	Devices     []deviceView      `json:"devices"`
	Unreachable []unreachableView `json:"unreachable"`
}

func (d *devicesPage) text(p *printer) {
	deviceTable(p, d.Devices)
	unreachableLines(p, d.Unreachable)
}

func deviceTable(p *printer, devices []deviceView) {
	rows := [][]string{}
	for _, v := range devices {
		io := "direct"
		if !v.DirectIO {
			io = "buffered"
		}
		state := v.State
		if done, ok := v.drained(); ok {
			state += fmt.Sprintf(" %d%%", done)
		}
		rows = append(rows, []string{v.Node, v.Path, v.Class, state, p.size(v.Size), p.size(v.Live), fmt.Sprint(v.Errors),
			v.latency(v.ReadSeconds), v.latency(v.FlushSeconds), io, v.UUID})
	}
	p.table("NODE DEVICE CLASS STATE SIZE LIVE ERRORS READ FLUSH I/O UUID", rows)
	for _, v := range devices {
		if v.Stuck != "" {
			p.line("! the drain of %s on node %s does not get on: %s", v.Path, v.Node, v.Stuck)
		}
	}
}

// drained is how much of what stood on a device has left it, in percent.
func (d *deviceView) drained() (percent uint64, draining bool) {
	if d.State != "draining" && d.State != "leaving" || d.Drain == 0 {
		return 0, false
	}
	return 100 - min(d.Live, d.Drain)*100/d.Drain, true
}

func (d *deviceView) latency(seconds float64) string {
	if seconds == 0 {
		return "-"
	}
	return time.Duration(seconds * float64(time.Second)).Round(10 * time.Microsecond).String()
}

func unreachableLines(p *printer, nodes []unreachableView) {
	for _, u := range nodes {
		p.line("! node %s does not answer: %s", u.Node, u.Error)
	}
}

// partly is the exit of a list from which nodes are missing.
func partly(missing []unreachableView) error {
	if len(missing) > 0 {
		return &failure{exitDegraded, nil}
	}
	return nil
}

type devicePage struct {
	version1
	Device deviceView `json:"device"`
}

func (d *devicePage) text(p *printer) { deviceTable(p, []deviceView{d.Device}) }

func (a *app) printDevice(d *v1.Device) error { return a.print(&devicePage{v1Header, viewDevice(d)}) }

func (a *app) deviceCommand() *cobra.Command {
	var node string
	listing := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the devices of the pools", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Devices.ListDevices(ctx, &v1.ListDevicesRequest{Node: node})
				if err != nil {
					return err
				}
				page := &devicesPage{v1Header, views(r.Devices, viewDevice), views(r.Unreachable, viewUnreachable)}
				if err := a.print(page); err != nil {
					return err
				}
				a.next("twinsan status")
				return partly(page.Unreachable)
			})
		},
	}
	listing.Flags().StringVar(&node, "node", "", "only this node")
	return noun("device", "Disks of the nodes' pools", nil, listing, a.deviceAdd(), a.deviceDrain(), a.deviceKeep(), a.deviceRemove(), a.deviceReplace())
}

// newDevice are the flags of the verbs that add a device.
type newDevice struct {
	class string
	size  server.Size
	wipe  bool
}

func (n *newDevice) flags(c *cobra.Command) {
	c.Flags().StringVar(&n.class, "class", "", "flash or capacity (default: capacity for disks that rotate, else flash)")
	c.Flags().Var(&n.size, "size", "make a device that does not exist a file of this size")
	c.Flags().BoolVar(&n.wipe, "wipe", false, "take a device that holds data, which is lost")
}

func (n *newDevice) request(node, path string) *v1.AddDeviceRequest {
	return &v1.AddDeviceRequest{Node: node, Path: path, Class: n.class, SizeBytes: uint64(n.size), Wipe: n.wipe}
}

func (a *app) deviceAdd() *cobra.Command {
	var n newDevice
	c := &cobra.Command{
		Use: "add NODE PATH", Short: "Add a disk to a node's pool, while it is in use",
		Long: `Add a disk to a node's pool, while it is in use. A disk that holds anything is
refused (exit code 4) without --wipe. New writes use it at once; what is stored
already moves there as it is rewritten. The node remembers the disk and finds it
at its next start, under another name too.`,
		Example: "  twinsan device add a /dev/sdc\n  twinsan device add a /dev/sdd --class capacity", Args: arguments("NODE", "PATH"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				d, err := client.Devices.AddDevice(ctx, n.request(args[0], args[1]))
				if err != nil {
					return err
				}
				if err := a.printDevice(d); err != nil {
					return err
				}
				a.next("twinsan device list --node %s", d.Node)
				return nil
			})
		},
	}
	n.flags(c)
	return c
}

// deviceWait are the flags of the verbs that begin what takes long.
type deviceWait struct {
	noWait bool
	limit  time.Duration
}

func (w *deviceWait) flags(c *cobra.Command) {
	c.Flags().BoolVar(&w.noWait, "no-wait", false, "return when it has begun")
	c.Flags().DurationVar(&w.limit, "limit", 24*time.Hour, "how long to wait; it goes on afterwards")
}

func (a *app) deviceDrain() *cobra.Command {
	var w deviceWait
	c := &cobra.Command{
		Use: "drain NODE DEVICE", Short: "Move what stands on a disk to the others, before it is removed",
		Long: `Move what stands on a disk to the other disks of the node, while they are in use.
DEVICE is its path or its UUID (or how that begins). It is refused (exit code 4)
when the others have no room for it. It goes on over restarts, whether this
command waits or not, until: twinsan device keep NODE DEVICE.`,
		Args: arguments("NODE", "DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.deviceWork(c, w, func(ctx context.Context, client *api.Client) (*v1.Device, error) {
				return client.Devices.DrainDevice(ctx, &v1.DrainDeviceRequest{Node: args[0], Device: args[1]})
			}, func(d *v1.Device) bool { return d.State == "drained" }, "twinsan device remove %s %s")
		},
	}
	w.flags(c)
	return c
}

func (a *app) deviceKeep() *cobra.Command {
	return &cobra.Command{
		Use: "keep NODE DEVICE", Short: "End a drain, or use a drained disk again", Args: arguments("NODE", "DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				d, err := client.Devices.DrainDevice(ctx, &v1.DrainDeviceRequest{Node: args[0], Device: args[1], Keep: true})
				if err != nil {
					return err
				}
				return a.printDevice(d)
			})
		},
	}
}

func (a *app) deviceRemove() *cobra.Command {
	return &cobra.Command{
		Use: "remove NODE DEVICE", Aliases: []string{"rm"}, Short: "Take a drained disk out of the pool",
		Long: `Take a drained disk out of the pool. It is empty afterwards and may be pulled out
or used elsewhere. A disk that is not drained is refused (exit code 4).`,
		Args: arguments("NODE", "DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				d, err := client.Devices.RemoveDevice(ctx, &v1.RemoveDeviceRequest{Node: args[0], Device: args[1]})
				if err != nil {
					return err
				}
				fmt.Fprintf(a.err, "device %s has left the pool of node %s\n", d.Path, d.Node)
				a.next("twinsan device list --node %s", d.Node)
				return a.printDevice(d)
			})
		},
	}
}

func (a *app) deviceReplace() *cobra.Command {
	var n newDevice
	var w deviceWait
	c := &cobra.Command{
		Use: "replace NODE OLD NEW", Short: "Put a disk in the place of another one, while they are in use",
		Long: `Put a disk in the place of another one: NEW is added, what stands on OLD moves
away, and then OLD is removed. It goes on over restarts, whether this command waits
or not. Before OLD is gone it can be kept: twinsan device keep NODE OLD.`,
		Example: "  twinsan device replace a /dev/sdb /dev/sdf", Args: arguments("NODE", "OLD", "NEW"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.deviceWork(c, w, func(ctx context.Context, client *api.Client) (*v1.Device, error) {
				old, err := deviceOf(ctx, client, args[0], args[1])
				if err != nil {
					return nil, err
				}
				if _, err = client.Devices.ReplaceDevice(ctx, &v1.ReplaceDeviceRequest{Device: old.Uuid, With: n.request(args[0], args[2])}); err != nil {
					return nil, err
				}
				return old, nil
			}, nil, "twinsan device list --node %s")
		},
	}
	n.flags(c)
	w.flags(c)
	return c
}

// deviceOf finds a device by its path, its uuid, or how that begins.
func deviceOf(ctx context.Context, client *api.Client, node, name string) (*v1.Device, error) {
	r, err := client.Devices.ListDevices(ctx, &v1.ListDevicesRequest{Node: node})
	if err != nil {
		return nil, err
	}
	if len(r.Unreachable) > 0 {
		return nil, fmt.Errorf("node %s does not answer: %s", node, r.Unreachable[0].Error)
	}
	at := slices.IndexFunc(r.Devices, func(d *v1.Device) bool {
		return d.Path == name || len(name) >= 4 && len(name) <= len(d.Uuid) && d.Uuid[:len(name)] == name
	})
	if at < 0 {
		return nil, fmt.Errorf("device %q of node %s: %w\n  see: twinsan device list --node %s", name, node, server.ErrNotFound, node)
	}
	return r.Devices[at], nil
}

// devicePoll is how often work on a device is looked at.
const devicePoll = 500 * time.Millisecond

// deviceWork begins something and waits for its end: until the device is gone, or done
// says so.
func (a *app) deviceWork(c *cobra.Command, w deviceWait, begin func(context.Context, *api.Client) (*v1.Device, error), done func(*v1.Device) bool, next string) error {
	ctx, cancel := context.WithTimeout(c.Context(), w.limit)
	defer cancel()
	return a.stream(ctx, func(ctx context.Context, client *api.Client) error {
		first, end := context.WithTimeout(ctx, a.timeout)
		d, err := begin(first, client)
		end()
		if err != nil {
			return err
		}
		if w.noWait {
			a.next("twinsan device list --node %s", d.Node)
			return a.printDevice(d)
		}
		if d, err = a.awaitDevice(ctx, client, d, done); err != nil {
			return err
		}
		if done == nil {
			a.next(next, d.Node)
		} else {
			a.next(next, d.Node, d.Path)
		}
		return a.printDevice(d)
	})
}

// awaitDevice shows how far the drain of a device is, until it is done or the device
// is gone. A node that restarts meanwhile is waited for.
func (a *app) awaitDevice(ctx context.Context, client *api.Client, d *v1.Device, done func(*v1.Device) bool) (*v1.Device, error) {
	tick := time.NewTicker(devicePoll)
	defer tick.Stop()
	told, stuck := ^uint64(0), ""
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("device %s still holds data; it goes on\n  see: twinsan device list --node %s", d.Path, d.Node)
		}
		r, err := client.Devices.ListDevices(ctx, &v1.ListDevicesRequest{Node: d.Node})
		if err != nil || len(r.Unreachable) > 0 || len(r.Devices) == 0 {
			continue // it restarts, or says nothing before the limit
		}
		at := slices.IndexFunc(r.Devices, func(x *v1.Device) bool { return x.Uuid == d.Uuid })
		if at < 0 {
			if done == nil {
				d.State, d.LiveBytes = "removed", 0
				return d, nil
			}
			return nil, fmt.Errorf("device %s has left the pool", d.Path)
		}
		d = r.Devices[at]
		switch {
		case done != nil && done(d):
			return d, nil
		case d.State == "ok" || d.State == "slow":
			return nil, fmt.Errorf("the drain of device %s was ended by: twinsan device keep", d.Path)
		case d.State == "failed":
			return nil, fmt.Errorf("device %s failed\n  see: twinsan status", d.Path)
		}
		v := viewDevice(d)
		if percent, ok := v.drained(); ok && percent != told {
			told = percent
			fmt.Fprintf(a.err, "device %s: %d %% has moved, %s left\n", d.Path, percent, server.Size(d.LiveBytes))
		}
		if d.Stuck != stuck {
			if stuck = d.Stuck; stuck != "" {
				fmt.Fprintf(a.err, "device %s does not get on: %s\n", d.Path, stuck)
			}
		}
	}
}
