package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/server/cluster"
)

// DeviceAction is what ChangeDevice does with a device.
type DeviceAction string

// The actions.
const (
	DeviceAdd     DeviceAction = "add"
	DeviceDrain   DeviceAction = "drain"   // move away what stands on it
	DeviceKeep    DeviceAction = "keep"    // end a drain, or use a drained device again
	DeviceRemove  DeviceAction = "remove"  // a drained one
	DeviceReplace DeviceAction = "replace" // add one; drain and remove another
)

// DeviceChange is a change of the devices of one node's pool.
type DeviceChange struct {
	Action DeviceAction
	Node   string
	// Device is the path or the uuid (or how it begins) of a device of the pool; for
	// replace the one that leaves.
	Device string
	// Path, for add and replace, is the new device.
	Path string
	// Class is "flash" or "capacity"; empty: capacity for disks that rotate.
	Class string
	// Size in bytes makes a device that does not exist a file of this size; 0: it must exist.
	Size uint64
	// Wipe takes a device that holds something.
	Wipe bool
}

// ChangeDevice changes the devices of a node's pool while it is in use. What was
// begun (a drain, a replacement) is durable on return and goes on in the background,
// over restarts; Devices shows how far it is. A node that is not the named one asks
// it, unless nodeOnly.
func (n *Node) ChangeDevice(ctx context.Context, c DeviceChange, nodeOnly bool) (*Device, error) {
	node := n.known().NodeNamed(c.Node)
	switch {
	case node == nil:
		return nil, fmt.Errorf("node %q: %w", c.Node, ErrNotFound)
	case node.Role == cluster.RoleWitness:
		return nil, fmt.Errorf("%w: node %s is a witness and has no devices", ErrInvalid, c.Node)
	case node.ID == n.cluster.Self():
		return n.changeDevice(ctx, c)
	case nodeOnly:
		return nil, fmt.Errorf("this is node %s: %w", n.id.Name, ErrNotReady)
	}
	peers := n.peers.Load()
	if peers == nil || node.API == "" {
		return nil, fmt.Errorf("node %s cannot be asked: %w", c.Node, ErrNotReady)
	}
	return (*peers).ChangeDevice(ctx, node.ID, n.api(node), c)
}

func (n *Node) changeDevice(ctx context.Context, c DeviceChange) (*Device, error) {
	var old lsfs.DeviceInfo
	var err error
	if c.Action != DeviceAdd {
		if old, err = n.deviceNamed(c.Device); err != nil {
			return nil, err
		}
	}
	switch c.Action {
	case DeviceAdd, DeviceReplace:
		return n.addDevice(ctx, c, old.ID)
	case DeviceDrain:
		err = n.store.DrainDevice(ctx, old.ID, false)
	case DeviceKeep:
		err = n.store.KeepDevice(ctx, old.ID)
	case DeviceRemove:
		err = n.store.RemoveDevice(ctx, old.ID)
	default:
		err = fmt.Errorf("%w: %q is nothing that can be done with a device", ErrInvalid, c.Action)
	}
	if err != nil {
		return nil, deviceError(err)
	}
	if now, err := n.deviceNamed(old.ID.String()); err == nil {
		old = now
	}
	out := n.deviceReport(&old)
	n.journal.report(levelInfo, "device-"+string(c.Action), fmt.Sprintf("device %s (%s) of node %s: %s", old.Path, old.ID, n.id.Name, c.Action))
	return &out, nil
}

func (n *Node) addDevice(ctx context.Context, c DeviceChange, replaces lsfs.DeviceID) (*Device, error) {
	if !filepath.IsAbs(c.Path) {
		return nil, fmt.Errorf("%w: device %q is not an absolute path", ErrInvalid, c.Path)
	}
	class := classOf(c.Path)
	if c.Class != "" {
		var err error
		if class, err = lsfs.ParseClass(c.Class); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	if err := refuseData(c.Path, c.Size > 0, c.Wipe); err != nil {
		return nil, err
	}
	if _, err := os.Stat(c.Path); errors.Is(err, os.ErrNotExist) && c.Size > 0 {
		if err := device.Create(c.Path, int64(min(c.Size, 1<<62))); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRefused, err)
		}
	}
	d, err := n.store.AddDevice(ctx, c.Path, lsfs.NewDevice{Class: class, Force: c.Wipe, Replaces: replaces})
	if err != nil {
		return nil, deviceError(err)
	}
	n.journal.report(levelInfo, "device-added", fmt.Sprintf("device %s (%s, %s) has joined the pool of node %s", d.Path, d.ID, d.Class, n.id.Name))
	if !d.Direct {
		n.log.Warn("no direct I/O on this file system, going on with flushes", "device", d.Path)
	}
	out := n.deviceReport(&d)
	return &out, nil
}

// deviceError gives an error of the store the kind that callers act on.
func deviceError(err error) error {
	if errors.Is(err, lsfs.ErrDevice) || errors.Is(err, lsfs.ErrNoSpace) || errors.Is(err, lsfs.ErrInUse) || errors.Is(err, device.ErrInUse) || errors.Is(err, device.ErrNotUsable) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}

// deviceNamed finds a device of this node by its path, its uuid, or how that begins.
func (n *Node) deviceNamed(name string) (lsfs.DeviceInfo, error) {
	var found []lsfs.DeviceInfo
	for _, d := range n.store.Devices() {
		if d.Path == name || d.ID.String() == name {
			return d, nil
		}
		if len(name) >= 4 && strings.HasPrefix(d.ID.String(), strings.ToLower(name)) {
			found = append(found, d)
		}
	}
	switch len(found) {
	case 0:
		return lsfs.DeviceInfo{}, fmt.Errorf("device %q of node %s: %w\n  see: twinsan device list --node %s", name, n.id.Name, ErrNotFound, n.id.Name)
	case 1:
		return found[0], nil
	}
	return lsfs.DeviceInfo{}, fmt.Errorf("%w: %q is how %d devices of node %s begin", ErrInvalid, name, len(found), n.id.Name)
}

// deviceReport is a device in the words of this package.
func (n *Node) deviceReport(d *lsfs.DeviceInfo) Device {
	out := Device{
		Node: n.id.Name, Path: d.Path, UUID: d.ID.String(), Size: bytesOf(d.DiskBytes), State: string(d.State), DirectIO: d.Direct,
		Errors: uint64(d.Usage.Errors), Class: d.Class.String(), Live: bytesOf(d.LiveBytes), Free: bytesOf(d.FreeBytes),
		Drain: bytesOf(d.DrainBytes), Stuck: d.Stuck,
		ReadLatency: d.Usage.ReadLatency, WriteLatency: d.Usage.WriteLatency, FlushLatency: d.Usage.FlushLatency,
	}
	if d.State == lsfs.DeviceOK && n.deviceSlow(d.Path) {
		out.State = string(lsfs.DeviceSlow)
	}
	return out
}

// deviceProblems judges the devices of a cluster.
func deviceProblems(devices []Device) (list []Problem) {
	for _, d := range devices {
		name := fmt.Sprintf("device %s of node %s", d.Path, d.Node)
		switch lsfs.DeviceState(d.State) {
		case lsfs.DeviceFailed:
			list = append(list, Problem{Degraded, "device-failed", fmt.Sprintf("%s failed (%d errors)", name, d.Errors),
				"the node has stopped its store", "replace the disk; see docs/operations.md, Devices"})
		case lsfs.DeviceLost:
			list = append(list, Problem{Degraded, "device-lost", fmt.Sprintf("device %s of node %s was given up, and %s that stood there are not repaired yet", d.UUID, d.Node, Size(d.Live)),
				"these blocks have no second copy", "have them all read: see docs/operations.md, Devices"})
		case lsfs.DeviceSlow:
			list = append(list, Problem{Healthy, "device-slow", fmt.Sprintf("%s is slow: %s a read, %s a write, %s a flush", name, d.ReadLatency.Round(1e5), d.WriteLatency.Round(1e5), d.FlushLatency.Round(1e5)),
				"it may be about to fail; volumes that have another good copy are served without this node", fmt.Sprintf("twinsan device replace %s %s NEW", d.Node, d.Path)})
		case lsfs.DeviceDraining, lsfs.DeviceLeaving:
			if d.Stuck != "" {
				list = append(list, Problem{Degraded, "device-drain-stuck", fmt.Sprintf("the drain of %s does not get on: %s", name, d.Stuck),
					"it cannot be removed", fmt.Sprintf("twinsan device keep %s %s", d.Node, d.Path)})
			}
		}
	}
	return list
}

// onBlockDevices says whether all devices are block devices, which gain by being
// told of freed segments. A file would only get holes that the log has to fill again.
func onBlockDevices(paths []string) bool {
	for _, p := range paths {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
			return false
		}
	}
	return true
}
