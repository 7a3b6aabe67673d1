package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/format"
	"github.com/twinsan/twinsan/server/cluster"
)

// IdentityFile in the data directory says that this machine is a node.
const IdentityFile = "cluster.json"

// poolFile in the data directory says that the devices were formatted, so that a
// setup which was interrupted between joining and formatting can be finished.
const poolFile = "pool.json"

type poolRecord struct {
	Version int       `json:"version"`
	Pool    uuid.UUID `json:"pool"`
	Devices []string  `json:"devices"`
}

// readPool says which pool this node's devices must belong to: the disks of
// another node in its slots would be served as its own replicas.
func readPool(dataDir string) ([16]byte, error) {
	path := filepath.Join(dataDir, poolFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return [16]byte{}, fmt.Errorf("this node has no pool yet (%s is missing): repeat its twinsan init or join", path)
	}
	if err != nil {
		return [16]byte{}, err
	}
	var r poolRecord
	if err := json.Unmarshal(text, &r); err != nil || r.Version != 1 || r.Pool == uuid.Nil {
		return [16]byte{}, fmt.Errorf("%s is damaged: restore it from a backup", path)
	}
	return r.Pool, nil
}

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
	Address string // sync address of any data node
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
	return cluster.Addresses{Sync: c.Sync.Address, Portals: c.ISCSI.Portals, API: c.API.Address, Metrics: c.Metrics.Address}
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
		if len(c.Store.Devices) > 0 || len(c.ISCSI.Portals) > 0 {
			return fmt.Errorf("%w: a witness has neither devices nor portals", ErrInvalid)
		}
	} else {
		if len(c.Store.Devices) == 0 || len(c.ISCSI.Portals) == 0 {
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
	for _, path := range c.Store.Devices {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) && c.Store.DeviceSize > 0 {
			continue
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
	pool := uuid.New()
	sizes := make([]int64, len(c.Store.Devices))
	for i := range sizes {
		sizes[i] = int64(c.Store.DeviceSize)
	}
	if err := lsfs.Format(ctx, lsfs.FormatConfig{Pool: pool, Key: key, Devices: c.Store.Devices, Sizes: sizes, Force: wipe}); err != nil {
		return fmt.Errorf("%w\n  this machine is a node and has no pool yet: repeat the same command", err)
	}
	text, err := json.MarshalIndent(poolRecord{1, pool, c.Store.Devices}, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(c.DataDir, poolFile), append(text, '\n'), 0o600)
}

// StoreReport is what CheckStore found.
type StoreReport struct {
	Devices  []string
	Volumes  int
	Blocks   uint64   // stored blocks whose checksum was verified
	Mapped   uint64   // bytes that volumes map
	Problems []string // the first hundred
	Count    int      // of all problems
}

// CheckStore verifies the whole store of this node, which must not be running.
// It writes nothing. Damage is in the report; an error means that the check
// could not be made.
func CheckStore(ctx context.Context, c *Config) (*StoreReport, error) {
	config, err := c.store()
	if err != nil {
		return nil, err
	}
	r, err := lsfs.CheckPool(ctx, config)
	if err != nil {
		return nil, err
	}
	return &StoreReport{Devices: c.Store.Devices, Volumes: int(r.Volumes), Blocks: r.Blocks, Mapped: r.Mapped * 4096, Problems: r.Problems, Count: r.Count}, nil
}

// store is the store's part of the configuration.
func (c *Config) store() (lsfs.Config, error) {
	key, err := cluster.ReadFingerprintKey(c.DataDir)
	if err != nil {
		return lsfs.Config{}, fmt.Errorf("this machine is no data node yet: %w", err)
	}
	pool, err := readPool(c.DataDir)
	if err != nil {
		return lsfs.Config{}, err
	}
	return lsfs.Config{
		Devices: c.Store.Devices, Key: key, Pool: pool,
		L1Bytes: int64(c.Store.Cache), MetadataBytes: int64(c.Store.Metadata), IndexBytes: int64(c.Store.Index),
	}, nil
}
