package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/format"
	"github.com/twinsan/twinsan/server/cluster"
)

// IdentityFile in the data directory says that this machine is a node.
const IdentityFile = "cluster.json"

// InitOptions describe a new cluster.
type InitOptions struct {
	Cluster string // its name
	Wipe    bool   // format devices that hold data
}

// Tokens are made with a cluster, so that the next nodes can join at once.
type Tokens struct {
	Data, Witness string // empty: none were made
	Expires       time.Time
}

// JoinOptions say which cluster to join.
type JoinOptions struct {
	Address string // management address of any data node
	Token   string
	Witness bool
	Wipe    bool
}

// Init makes a cluster with this machine as its first node and formats its
// devices. Nothing runs afterwards. It refuses a machine that is a node already
// and devices that hold anything; when it was interrupted it may be repeated.
func Init(ctx context.Context, c *Config, o InitOptions) (*Tokens, error) {
	tokens := &Tokens{}
	err := setUp(ctx, c, false, o.Wipe, o.Cluster, func() error {
		r, err := cluster.Bootstrap(ctx, c.DataDir, cluster.InitConfig{Name: o.Cluster, NodeName: c.Name, Addresses: c.addresses()})
		if err == nil {
			tokens = &Tokens{r.DataToken, r.WitnessToken, r.TokensExpire}
		}
		return err
	})
	return tokens, err
}

// Join makes this machine a node of an existing cluster, like Init.
func Join(ctx context.Context, c *Config, o JoinOptions) error {
	role := cluster.RoleData
	if o.Witness {
		role = cluster.RoleWitness
	}
	return setUp(ctx, c, o.Witness, o.Wipe, "", func() error {
		return cluster.JoinCluster(ctx, c.DataDir, cluster.JoinConfig{Addr: o.Address, Token: o.Token, NodeName: c.Name, Role: role, Addresses: c.addresses()})
	})
}

// addresses are what the node tells the cluster about itself.
func (c *Config) addresses() cluster.Addresses {
	a := cluster.Addresses{Sync: c.Sync.Address, Portals: c.ISCSI.Portals, API: c.API.Address, Metrics: c.Metrics.Address}
	if c.Management.Address != c.Sync.Address {
		a.Management = c.Management.Address
	}
	return a
}

// setUp looks at the devices, makes the identity, then formats: the cluster's
// key goes into the superblocks, so the order cannot be another.
func setUp(ctx context.Context, c *Config, witness, wipe bool, name string, enrol func() error) error {
	if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(c.DataDir, poolFile)); err == nil {
		return fmt.Errorf("%w: this machine is a node already (%s)\n  see: twinsan status", ErrRefused, c.DataDir)
	}
	if witness {
		if len(c.Store.paths()) > 0 || len(c.ISCSI.Portals) > 0 {
			return fmt.Errorf("%w: a witness has neither devices nor portals", ErrInvalid)
		}
	} else {
		if len(c.Store.paths()) == 0 || len(c.ISCSI.Portals) == 0 {
			return fmt.Errorf("%w: a data node needs devices and a portal", ErrInvalid)
		}
		if err := inspect(c, wipe); err != nil {
			return err
		}
	}
	id, err := cluster.ReadIdentity(c.DataDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := enrol(); err != nil {
			return err
		}
	case err != nil:
		return err
	case witness || id.Role == cluster.RoleWitness || id.Name != c.Name || (name != "" && id.Cluster != name):
		return fmt.Errorf("%w: this machine is node %s of cluster %s already (%s)", ErrRefused, id.Name, id.Cluster, c.DataDir)
	}
	if witness {
		return nil
	}
	return formatPool(ctx, c, wipe)
}

// inspect refuses devices before anything has been changed.
func inspect(c *Config, wipe bool) error {
	for _, path := range c.Store.paths() {
		if err := refuseData(path, c.Store.DeviceSize > 0, wipe); err != nil {
			return err
		}
	}
	return nil
}

// refuseData refuses a device that holds something, unless it may be wiped, and one
// that does not exist, unless it will be made.
func refuseData(path string, mayMake, wipe bool) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && mayMake {
		return nil
	}
	if err != nil {
		return fmt.Errorf("device: %w", err)
	}
	head := make([]byte, format.SuperblockArea)
	n, err := io.ReadFull(f, head)
	f.Close()
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("device %s: %w", path, err)
	}
	if !wipe && !bytes.Equal(head[:n], make([]byte, n)) {
		return fmt.Errorf("%w: device %s holds data%s\n  look what it is: wipefs %s; give it up with: --wipe", ErrRefused, path, known(head[:n]), path)
	}
	return nil
}

// known recognises what an administrator would be sorry to lose.
func known(head []byte) string {
	at := func(off int, magic string) bool {
		return off+len(magic) <= len(head) && string(head[off:off+len(magic)]) == magic
	}
	switch {
	case at(0, "TWINSANP"):
		return " (a twinsan pool)"
	case at(1080, "\x53\xef"):
		return " (an ext file system)"
	case at(0, "XFSB"):
		return " (an XFS file system)"
	case at(512, "LABELONE"):
		return " (an LVM physical volume)"
	case at(512, "EFI PART"), at(510, "\x55\xaa"):
		return " (a partition table)"
	case at(0, "LUKS\xba\xbe"):
		return " (an encrypted volume)"
	}
	return ""
}

func formatPool(ctx context.Context, c *Config, wipe bool) error {
	key, err := cluster.ReadFingerprintKey(c.DataDir)
	if err != nil {
		return err
	}
	pool := poolRecord{Version: 2, Pool: uuid.New(), Generation: 1}
	paths := c.Store.paths()
	sizes, classes := make([]int64, len(paths)), make([]lsfs.Class, len(paths))
	for i, p := range paths {
		sizes[i], classes[i] = int64(c.Store.DeviceSize), classOf(p)
		if slices.Contains(c.Store.CapacityDevices, p) {
			classes[i] = lsfs.Capacity
		}
		pool.Devices = append(pool.Devices, poolDevice{Path: p, Class: classes[i].String()})
	}
	if err := lsfs.Format(ctx, lsfs.FormatConfig{Pool: pool.Pool, Key: key, Devices: paths, Sizes: sizes, Classes: classes, Force: wipe}); err != nil {
		return fmt.Errorf("%w\n  this machine is a node and has no pool yet: repeat the same command", err)
	}
	return pool.write(c.DataDir)
}

// StoreReport is what CheckStore found.
type StoreReport struct {
	Devices  []string
	Volumes  int
	Blocks   uint64         // stored blocks whose checksum was verified
	Mapped   uint64         // bytes that volumes map
	Problems []StoreProblem // the first hundred
	Count    int            // of all problems
	// Corrected is how many counters were made right, when that was asked for.
	Corrected uint64
}

// StoreProblem is one thing that is wrong with a store.
type StoreProblem struct {
	Kind   string // counter, damage or structure
	Text   string // what and where
	Remedy string
}

// storeAt is what the store of a node is opened with, on other devices if any are
// named: a pool that was moved here from another slot.
func (c *Config) storeAt(devices []string) (lsfs.Config, error) {
	config, err := c.store()
	if err == nil && len(devices) > 0 {
		config.Devices = devices
	}
	return config, err
}

// DumpOptions choose what DumpStore prints; see lsfs.DumpOptions.
type DumpOptions struct{ lsfs.DumpOptions }

// NewDumpOptions are those that print superblocks, root and volumes only.
func NewDumpOptions() DumpOptions {
	return DumpOptions{lsfs.DumpOptions{Segment: format.NoSegment}}
}

// Range adds where blocks of a volume stand, both by their numbers.
func (o *DumpOptions) Range(volume, start, count uint64) {
	o.Volume, o.Start, o.Count = lsfs.VolumeID(volume), lsfs.BlockNo(start), count
}

// DumpStore prints for people what stands on the devices of this node's store, which
// must not be running.
func DumpStore(ctx context.Context, c *Config, devices []string, o DumpOptions, to io.Writer) error {
	config, err := c.storeAt(devices)
	if err != nil {
		return err
	}
	return lsfs.DumpPool(ctx, config, o.DumpOptions, to)
}

// CheckStore verifies the whole store of this node, which must not be running.
// It writes nothing. Damage is in the report; an error means that the check
// could not be made.
//
// With repair it first makes reference counts and live bytes what the maps say, which
// writes. devices are used instead of those of the node's file, if any are named.
func CheckStore(ctx context.Context, c *Config, devices []string, repair bool) (*StoreReport, error) {
	config, err := c.storeAt(devices)
	if err != nil {
		return nil, err
	}
	out := &StoreReport{Devices: config.Devices}
	if repair {
		if out.Corrected, err = lsfs.RepairCounters(ctx, config); err != nil {
			return nil, err
		}
	}
	r, err := lsfs.CheckPool(ctx, config)
	if err != nil {
		return nil, err
	}
	out.Volumes, out.Blocks, out.Mapped, out.Count = int(r.Volumes), r.Blocks, r.Mapped*4096, r.Count
	for _, p := range r.Problems {
		out.Problems = append(out.Problems, StoreProblem{string(p.Kind), p.Text, p.Kind.Remedy()})
	}
	return out, nil
}
