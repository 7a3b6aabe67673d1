package lsfs

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Config says what a store runs on. The zero value of a field means its default.
type Config struct {
	// Devices are paths where devices of the pool may be, in any order. What is there
	// and does not belong to the pool is left alone.
	Devices []string
	// Search names further paths, when a device of the pool is at none of Devices.
	// Default: none.
	Search func() []string
	// Generation is the least number of the pool's list of devices that is not too
	// old, as Persist was told. Default 0: any.
	Generation uint64
	// Forget are devices that failed for good: the pool opens without them, where that
	// can be (see ErrLost).
	Forget []DeviceID
	// Persist is told the list of devices when it changes: before a new device holds
	// anything, and after one has left. It is durable on return. An error keeps the new
	// device out. It must not call the store. Default: none.
	Persist func(generation uint64, devices []DeviceInfo) error
	// Pool is the pool that the devices must belong to; the zero value takes any.
	// A node that knows its pool so refuses another node's disks in its slots.
	Pool [16]byte
	// OpenDevice opens a device. Default: device.Open with direct I/O.
	OpenDevice func(path string) (device.Device, error)
	// Key is the cluster's fingerprint key. A pool refuses any other than the one
	// it was formatted with.
	Key dedup.Key

	// L1Bytes bounds the RAM cache of data blocks. Default 256 MiB, at least 1 MiB.
	L1Bytes int64
	// ReadAhead is the largest window that is read ahead of a sequential stream, bytes.
	// Default 4 MiB, less with a small L1; negative: nothing is read ahead.
	ReadAhead int64
	// L2 is a flash device or file for the second level of the cache; empty means
	// none. It pays when it is faster than the devices of the pool. What is wrong with
	// it is told as an event "l2-off", and the store works without.
	L2 string
	// L2Bytes is the size of the file that is made at L2 when there is nothing. 0: it must exist.
	L2Bytes int64
	// L2Rate bounds what is written to L2, bytes a second. Default 64 MiB.
	L2Rate int64
	// OpenL2 opens it. Default: device.Open with direct I/O.
	OpenL2 func(path string) (device.Device, error)
	// MetadataRAM is one budget for all RAM that metadata takes: MetadataBytes, IndexBytes,
	// and what the page directory and the segment table of the pool need. What of the first
	// two is set is taken from it as it is. At least 16 MiB. Default 0: none, and the two
	// have their own defaults. A pool that outgrows it is served, slower (event "metadata-ram-low").
	MetadataRAM int64
	// MetadataBytes bounds the RAM frames for pages of maps and identities.
	// Default 256 MiB, at least 8 MiB. It is passed only while replay needs more.
	MetadataBytes int64
	// IndexBytes bounds the fingerprint index. Default 64 MiB, at least 64 KiB.
	IndexBytes int64

	// Catalogue is the directory of the complete catalogue of fingerprints, on a local file system beside
	// the pool: up to 64 bytes for each stored block. It may be deleted while the store is not
	// open. Empty: duplicates that the index forgot stay.
	Catalogue string
	// MergeInterval is how often the background looks for duplicates, if anything was stored. Default
	// one hour; negative: only StartMerge does.
	MergeInterval time.Duration

	// ColdAfter is how long a segment is neither written nor much read until its blocks are cold, and
	// are compressed anew while the store has little else to do. Default 24 hours; negative: that
	// is done only to blocks that the cleaner moves anyhow.
	ColdAfter time.Duration

	// RootVersion is the version in which roots are written until RaiseRoot says otherwise, or was
	// read in a newer one: format.OldestRootVersion to format.RootVersion, the default. What a newer
	// version brings is not used before.
	RootVersion uint32

	divided bool // MetadataBytes is what MetadataRAM leaves

	// CheckpointBytes of log start a checkpoint: they bound replay. Default the
	// smaller of 1 GiB and a sixteenth of the pool, at least two segments.
	CheckpointBytes int64
	// CheckpointInterval starts one when something changed. Default 30 s.
	CheckpointInterval time.Duration
	// FlushInterval is how long a relaxed operation may wait for its flush. Default
	// 200 ms, 1 ms to 10 s.
	FlushInterval time.Duration
	// FlushBytes bounds the log that waits for a flush: what would be more is flushed
	// at once. Default 64 MiB.
	FlushBytes int64

	// GarbageMax is the percentage of the pool that dead bytes may take before the
	// cleaner works in the background; the usable size leaves it out. Default 20, 5 to 50.
	GarbageMax int
	// Discard tells devices about freed segments. Default off: on preallocated
	// files it would give the preallocation away.
	Discard bool

	// ScrubInterval is how long a scrub of the whole pool may take, and how often one
	// begins. Default 14 days; negative: none begins by itself.
	ScrubInterval time.Duration
	// ScrubFrom is where scrub goes on: Store.Scrub of the process before. The zero value begins anew.
	ScrubFrom ScrubState
	// Now is the clock of scrub's schedule. Default time.Now.
	Now func() time.Time

	// Logger takes the few lines that the store writes. Default: none.
	Logger *slog.Logger
	// Event is told facts that an operator should see. It must not block or call
	// the store. Default: none.
	Event func(Event)
}

// FlushInterval is the default of Config.FlushInterval: short beside what a crashed
// host loses of its own memory, long beside a flush.
const FlushInterval = 200 * time.Millisecond

// Event is a fact about the store that an operator should see.
type Event struct {
	Code string // "corrupt", "poisoned", "no-space", "recovered", "device-...", "l2-off"
	Text string
	Err  error // *CorruptError for code "corrupt"
}

func (c Config) withDefaults() (Config, error) {
	set := func(p *int64, def, least int64, name string) error {
		if *p == 0 {
			*p = def
		}
		if *p < least {
			return fmt.Errorf("config: %s is %d bytes, at least %d", name, *p, least)
		}
		return nil
	}
	if c.OpenDevice == nil {
		c.OpenDevice = func(path string) (device.Device, error) { return device.Open(path, device.Options{}) }
	}
	if c.ReadAhead == 0 {
		c.ReadAhead = defaultReadAhead
	}
	if c.OpenL2 == nil {
		c.OpenL2 = func(path string) (device.Device, error) { return device.Open(path, device.Options{}) }
	}
	if c.CheckpointInterval == 0 {
		c.CheckpointInterval = 30 * time.Second
	}
	if c.RootVersion == 0 {
		c.RootVersion = format.RootVersion
	}
	if c.RootVersion < format.OldestRootVersion || format.RootVersion < c.RootVersion {
		return c, fmt.Errorf("config: RootVersion is %d, allowed are %d to %d", c.RootVersion, format.OldestRootVersion, format.RootVersion)
	}
	if c.FlushInterval == 0 {
		c.FlushInterval = FlushInterval
	}
	if c.FlushInterval < time.Millisecond || 10*time.Second < c.FlushInterval {
		return c, fmt.Errorf("config: FlushInterval is %v, allowed are 1ms to 10s", c.FlushInterval)
	}
	if c.ScrubInterval == 0 {
		c.ScrubInterval = ScrubInterval
	}
	if c.MergeInterval == 0 {
		c.MergeInterval = MergeInterval
	}
	if c.ColdAfter == 0 {
		c.ColdAfter = ColdAfter
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.GarbageMax == 0 {
		c.GarbageMax = 20
	}
	if c.GarbageMax < 5 || 50 < c.GarbageMax {
		return c, fmt.Errorf("config: GarbageMax is %d percent, allowed are 5 to 50", c.GarbageMax)
	}
	if len(c.Devices) == 0 && c.Search == nil {
		return c, errNoDevices
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Event == nil {
		c.Event = func(Event) {}
	}
	if c.Persist == nil {
		c.Persist = func(uint64, []DeviceInfo) error { return nil }
	}
	if err := c.share(); err != nil {
		return c, err
	}
	for _, err := range []error{
		set(&c.L1Bytes, 256<<20, 1<<20, "L1Bytes"),
		set(&c.L2Rate, l2Rate, 4096, "L2Rate"),
		set(&c.MetadataBytes, 256<<20, 8<<20, "MetadataBytes"),
		set(&c.IndexBytes, 64<<20, 64<<10, "IndexBytes"),
		set(&c.FlushBytes, 64<<20, 4096, "FlushBytes"),
		set(&c.CheckpointBytes, 1<<30, 64<<10, "CheckpointBytes"),
	} {
		if err != nil {
			return c, err
		}
	}
	return c, nil
}
