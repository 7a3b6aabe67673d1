package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
	"github.com/twinsan/twinsan/server/cluster"
)

// poolFile in the data directory says that the devices were formatted, so that a
// setup which was interrupted between joining and formatting can be finished, and
// which devices the pool has now. They are found there first; what they say of
// themselves is what counts.
const poolFile = "pool.json"

// poolRecord is the content of poolFile. Version 1 had a list of paths for Devices,
// and no generation.
type poolRecord struct {
	Version int       `json:"version"`
	Pool    uuid.UUID `json:"pool"`
	// Generation is the number of the newest list of devices that this node has known:
	// devices with an older one were removed or replaced since.
	Generation uint64       `json:"generation"`
	Devices    []poolDevice `json:"devices"`
	// Forget are the uuids of devices that failed for good.
	Forget []string `json:"forget,omitempty"`
}

type poolDevice struct {
	Path  string `json:"path"`
	UUID  string `json:"uuid,omitempty"`
	Class string `json:"class,omitempty"`
}

// readPool says which pool this node's devices must belong to: the disks of
// another node in its slots would be served as its own replicas.
func readPool(dataDir string) (*poolRecord, error) {
	path := filepath.Join(dataDir, poolFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("this node has no pool yet (%s is missing): repeat its twinsan init or join", path)
	}
	if err != nil {
		return nil, err
	}
	r := &poolRecord{}
	var first struct {
		Version int       `json:"version"`
		Pool    uuid.UUID `json:"pool"`
		Devices []string  `json:"devices"`
	}
	if err = json.Unmarshal(text, r); err != nil {
		if err = json.Unmarshal(text, &first); err == nil && first.Version == 1 {
			*r = poolRecord{Version: 2, Pool: first.Pool}
			for _, d := range first.Devices {
				r.Devices = append(r.Devices, poolDevice{Path: d})
			}
		}
	}
	if err != nil || r.Version != 2 || r.Pool == uuid.Nil {
		return nil, fmt.Errorf("%s is damaged: restore it from a backup", path)
	}
	return r, nil
}

func (r *poolRecord) write(dataDir string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dataDir, poolFile), append(text, '\n'), 0o600)
}

// poolKeeper writes the list of devices as the store tells it.
type poolKeeper struct {
	dir string

	mu   sync.Mutex
	last poolRecord
}

// persist is the store's way to record its devices.
func (k *poolKeeper) persist(generation uint64, devices []lsfs.DeviceInfo) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	// A device that was given up is named until the list of devices has changed for it.
	now := poolRecord{Version: 2, Pool: k.last.Pool, Generation: generation, Forget: k.last.Forget}
	for _, d := range devices {
		if d.State == lsfs.DeviceLost {
			continue // its superblocks say so from now on
		}
		now.Devices = append(now.Devices, poolDevice{d.Path, d.ID.String(), d.Class.String()})
	}
	if now.Generation == k.last.Generation && slices.Equal(now.Devices, k.last.Devices) {
		return nil
	}
	if err := now.write(k.dir); err != nil {
		return err
	}
	k.last = now
	return nil
}

// store is the store's part of the configuration.
func (c *Config) store() (lsfs.Config, error) {
	key, err := cluster.ReadFingerprintKey(c.DataDir)
	if err != nil {
		return lsfs.Config{}, fmt.Errorf("this machine is no data node yet: %w", err)
	}
	record, err := readPool(c.DataDir)
	if err != nil {
		return lsfs.Config{}, err
	}
	var paths []string
	for _, d := range record.Devices {
		paths = append(paths, d.Path)
	}
	for _, p := range c.Store.paths() {
		if !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	var forget []lsfs.DeviceID
	for _, f := range record.Forget {
		id, err := uuid.Parse(f)
		if err != nil {
			return lsfs.Config{}, fmt.Errorf("%s is damaged: restore it from a backup", filepath.Join(c.DataDir, poolFile))
		}
		forget = append(forget, lsfs.DeviceID(id))
	}
	k := &poolKeeper{dir: c.DataDir, last: *record}
	interval := time.Duration(c.Store.ScrubDays) * 24 * time.Hour
	if interval == 0 {
		interval = -1
	}
	cold := time.Duration(c.Store.ColdMinutes) * time.Minute
	if cold == 0 {
		cold = -1
	}
	catalogue := ""
	if c.Store.MergeMinutes > 0 {
		catalogue = filepath.Join(c.DataDir, catalogueDir)
	}
	return lsfs.Config{
		RootVersion:   format.OldestRootVersion, // until the cluster's feature level says otherwise
		ScrubInterval: interval, FlushInterval: time.Duration(c.Store.FlushMilliseconds) * time.Millisecond,
		Catalogue: catalogue, MergeInterval: time.Duration(c.Store.MergeMinutes) * time.Minute, ColdAfter: cold,
		Devices: paths, Key: key, Pool: record.Pool, Generation: record.Generation, Persist: k.persist, Forget: forget,
		Search:  func() []string { return searchDevices(record.Pool, paths) },
		L1Bytes: int64(c.Store.Cache), L2: c.Store.L2, L2Bytes: int64(c.Store.L2Size), MetadataRAM: int64(c.Store.MetadataRAM), MetadataBytes: int64(c.Store.Metadata), IndexBytes: int64(c.Store.Index),
	}, nil
}

// catalogueDir is the catalogue of fingerprints in the data directory. It may be deleted while the node is down.
const catalogueDir = "catalogue"

// searchMax bounds the files of one directory that are looked at.
const searchMax = 1024

// searchDevices looks for devices of a pool that are not where they were: among the
// block devices of this machine, and in the directories of devices that are files. It
// only reads the head of each, and whoever has one open is not disturbed.
func searchDevices(pool [16]byte, known []string) (found []string) {
	dirs := []string{}
	for _, p := range known {
		if dir := filepath.Dir(p); dir != "/dev" && filepath.Dir(dir) != "/dev/disk" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	look := func(path string) {
		if !slices.Contains(known, path) && !slices.Contains(found, path) && headOf(path, pool) {
			found = append(found, path)
		}
	}
	if list, err := os.ReadDir("/sys/class/block"); err == nil {
		for _, e := range list {
			look(filepath.Join("/dev", e.Name()))
		}
	}
	for _, dir := range dirs {
		list, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for i, e := range list {
			if i == searchMax {
				break
			}
			if e.Type().IsRegular() {
				look(filepath.Join(dir, e.Name()))
			}
		}
	}
	return found
}

// headOf says whether a copy of a superblock of the pool is readable at path.
func headOf(path string, pool [16]byte) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	page := make([]byte, format.PageSize)
	for _, off := range format.SuperblockOffsets {
		if _, err := f.ReadAt(page, off); err != nil {
			if errors.Is(err, io.EOF) {
				return false
			}
			continue
		}
		if sb, err := format.ParseSuperblock(page); err == nil && bytes.Equal(sb.Pool[:], pool[:]) {
			return true
		}
	}
	return false
}

// classOf is the class that a device gets when nobody says which.
func classOf(path string) lsfs.Class {
	if device.Rotational(path) {
		return lsfs.Capacity
	}
	return lsfs.Flash
}
