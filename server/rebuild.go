package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/server/cluster"
)

// ForgetDevice records that a device of this node's pool failed for good, so that the
// next start opens the pool without it. id is its uuid. The node must not be running.
func ForgetDevice(c *Config, id string) error {
	record, err := readPool(c.DataDir)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(record.Devices, func(d poolDevice) bool { return d.UUID != "" && strings.EqualFold(d.UUID, id) })
	if at < 0 {
		return fmt.Errorf("device %q is not in the pool of this node: %w", id, ErrNotFound)
	}
	if len(record.Devices) == 1 {
		return fmt.Errorf("%w: it is the only device of this node's pool\n  make the pool anew on others: twinsan store rebuild", ErrRefused)
	}
	if headOf(record.Devices[at].Path, record.Pool) {
		return fmt.Errorf("%w: device %s is there (%s)\n  drain it while the node runs: twinsan device drain %s %s", ErrRefused, id, record.Devices[at].Path, c.Name, record.Devices[at].Path)
	}
	uuid := record.Devices[at].UUID
	if !slices.Contains(record.Forget, uuid) {
		record.Forget = append(record.Forget, uuid)
	}
	return record.write(c.DataDir)
}

// RebuildStore makes this node's pool anew on those of its devices that are there, or
// on the given ones. All that this node stored is lost; its replicas are filled again
// by the other nodes when it runs. It must not be running. When it was interrupted it
// may be repeated.
func RebuildStore(ctx context.Context, c *Config, devices []string) ([]string, error) {
	id, err := cluster.ReadIdentity(c.DataDir)
	if err != nil {
		return nil, fmt.Errorf("this machine is no node yet: %w", err)
	}
	if id.Role == cluster.RoleWitness {
		return nil, fmt.Errorf("%w: node %s is a witness and stores nothing", ErrInvalid, c.Name)
	}
	capacity := c.Store.CapacityDevices
	if len(devices) == 0 {
		if devices, capacity, err = c.remaining(); err != nil {
			return nil, err
		}
	}
	for _, d := range devices {
		if err := refuseData(d, c.Store.DeviceSize > 0, true); err != nil {
			return nil, err
		}
		if x, err := device.Open(d, device.Options{}); err == nil {
			_ = x.Close()
		} else if !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w\n  does the node run? stop it first: systemctl stop twinsan", ErrRefused, err)
		}
	}
	// From here on the node has no pool, until it is made.
	if err := os.Remove(filepath.Join(c.DataDir, poolFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	anew := *c
	anew.Store.Devices, anew.Store.CapacityDevices = devices, capacity
	anew.Store.Devices = slices.DeleteFunc(slices.Clone(devices), func(d string) bool { return slices.Contains(capacity, d) })
	anew.Store.CapacityDevices = slices.DeleteFunc(slices.Clone(capacity), func(d string) bool { return !slices.Contains(devices, d) })
	return devices, formatPool(ctx, &anew, true)
}

// remaining are the devices of the pool that are there, and those of class capacity.
func (c *Config) remaining() (devices, capacity []string, err error) {
	record, err := readPool(c.DataDir)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: name the devices that the pool is made of: --devices (%w)", ErrInvalid, err)
	}
	known := []string{}
	for _, d := range record.Devices {
		known = append(known, d.Path)
		if d.Class == "capacity" {
			capacity = append(capacity, d.Path)
		}
	}
	for _, p := range append(known, searchDevices(record.Pool, known)...) {
		if headOf(p, record.Pool) {
			devices = append(devices, p)
		}
	}
	if len(devices) == 0 {
		return nil, nil, fmt.Errorf("%w: no device of this node's pool is there: name those that it is made of: --devices", ErrRefused)
	}
	return devices, capacity, nil
}
