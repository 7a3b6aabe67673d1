package lsfs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"github.com/zeebo/blake3"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// FormatConfig says how a pool is made.
type FormatConfig struct {
	// Pool is the pool's UUID.
	Pool [16]byte
	// Key is the cluster's fingerprint key; the pool will not open with another.
	Key dedup.Key
	// Devices are block devices or files. A file that does not exist is made with
	// the size at the same index of Sizes, in bytes.
	Devices []string
	Sizes   []int64
	// SegmentBytes is a power of two from 256 KiB to 16 MiB. Default 16 MiB, less
	// where the pool would have fewer than 256 segments.
	SegmentBytes uint32
	// Force formats devices that are not empty. What was on them is lost.
	Force bool
	// OpenDevice opens a device. Default: device.Open.
	OpenDevice func(path string) (device.Device, error)
}

// segmentsMin is what a pool needs to work at all: the log, a reserve for the
// cleaner and checkpoints, and data.
const segmentsMin = 24

// Format makes a pool of devices. It refuses a device whose first MiB is not
// all zeros (ErrInUse) unless forced, before it has written to any.
func Format(ctx context.Context, c FormatConfig) error {
	if len(c.Devices) == 0 || format.DevicesMax < len(c.Devices) {
		return fmt.Errorf("format: %d devices, allowed are 1 to %d", len(c.Devices), format.DevicesMax)
	}
	if c.OpenDevice == nil {
		c.OpenDevice = func(path string) (device.Device, error) {
			return device.Open(path, device.Options{})
		}
		for i, path := range c.Devices {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) || len(c.Sizes) <= i || c.Sizes[i] == 0 {
				continue
			}
			if err := device.Create(path, c.Sizes[i]); err != nil {
				return fmt.Errorf("format: %w", err)
			}
		}
	}
	var devices []device.Device
	defer func() {
		for _, d := range devices {
			_ = d.Close()
		}
	}()
	var total int64
	buf := device.AlignedBuffer(format.SuperblockArea)
	defer device.FreeAligned(buf)
	for _, path := range c.Devices {
		if err := ctx.Err(); err != nil {
			return err
		}
		d, err := c.OpenDevice(path)
		if err != nil {
			return fmt.Errorf("format: %w", err)
		}
		devices = append(devices, d)
		if d.Size() < format.SuperblockArea+format.SegmentMin {
			return fmt.Errorf("format: %s has %d bytes, too small for a pool", path, d.Size())
		}
		total += d.Size() - format.SuperblockArea
		if c.Force {
			continue
		}
		if err := d.ReadAt(buf, 0); err != nil {
			return fmt.Errorf("format: %w", err)
		}
		for i, b := range buf {
			if b != 0 {
				what := "foreign data"
				if sb, err := format.ParseSuperblock(buf[:format.PageSize]); err == nil {
					what = fmt.Sprintf("a device of pool %x", sb.Pool)
				}
				return fmt.Errorf("format: %s holds %s at byte %d: %w", path, what, i, ErrInUse)
			}
		}
	}
	if c.SegmentBytes == 0 {
		c.SegmentBytes = format.SegmentMax
		for c.SegmentBytes > format.SegmentMin && total/int64(c.SegmentBytes) < 256 {
			c.SegmentBytes /= 2
		}
	}
	if n := c.SegmentBytes; n < format.SegmentMin || format.SegmentMax < n || n&(n-1) != 0 {
		return fmt.Errorf("format: segments of %d bytes: must be a power of two from %d to %d", n, format.SegmentMin, format.SegmentMax)
	}
	sb := format.Superblock{Sequence: 1, Pool: c.Pool, SegmentBytes: c.SegmentBytes, KeyCheck: keyCheck(c.Key)}
	segments := int64(0)
	for _, d := range devices {
		m := format.Member{Segments: uint32((d.Size() - format.SuperblockArea) / int64(c.SegmentBytes))}
		_, _ = rand.Read(m.Device[:])
		sb.Members = append(sb.Members, m)
		segments += int64(m.Segments)
	}
	if segments < segmentsMin || segments >= int64(format.NoSegment) {
		return fmt.Errorf("format: %d segments of %d bytes: a pool needs at least %d", segments, c.SegmentBytes, segmentsMin)
	}
	return writeSuperblocks(devices, sb)
}

// keyCheck is stored in the superblock to recognise the key without revealing it.
func keyCheck(k dedup.Key) (c [16]byte) {
	h := keyedHasher(k)
	_, _ = h.Write([]byte("twinsan pool key check"))
	copy(c[:], h.Sum(nil))
	return c
}

func keyedHasher(k dedup.Key) *blake3.Hasher {
	h, err := blake3.NewKeyed(k[:])
	if err != nil {
		panic("lsfs: a key of 32 bytes is refused: " + err.Error())
	}
	return h
}

// readSuperblock takes the newest superblock of a device that two copies agree on.
func readSuperblock(d device.Device) (*format.Superblock, error) {
	page := device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(page)
	var found [len(format.SuperblockOffsets)]*format.Superblock
	var raw [len(format.SuperblockOffsets)][format.PageSize]byte
	var firstErr error
	for i, off := range format.SuperblockOffsets {
		err := d.ReadAt(page, off)
		if err == nil {
			found[i], err = format.ParseSuperblock(page)
			copy(raw[i][:], page)
		}
		if err != nil && firstErr == nil {
			firstErr = err
		}
	}
	var best *format.Superblock
	valid := 0
	for i, a := range found {
		if a == nil {
			continue
		}
		valid++
		for j := i + 1; j < len(found); j++ {
			if found[j] != nil && raw[i] == raw[j] && (best == nil || best.Sequence < a.Sequence) {
				best = a
			}
		}
	}
	if best == nil {
		return nil, fmt.Errorf("%s: no two of four superblocks agree (%d readable): %w", d.Path(), valid, firstErrOr(firstErr))
	}
	return best, nil
}

func firstErrOr(err error) error {
	if err == nil {
		return format.ErrInvalid
	}
	return err
}

// importDevices opens all devices of a pool, given in any order, and returns
// them in the pool's order with the newest superblock.
func importDevices(c *Config) (devices []device.Device, sb *format.Superblock, err error) {
	opened := make([]device.Device, 0, len(c.Devices))
	defer func() {
		if err != nil {
			for _, d := range opened {
				_ = d.Close()
			}
		}
	}()
	supers := make([]*format.Superblock, 0, len(c.Devices))
	for _, path := range c.Devices {
		d, err := c.OpenDevice(path)
		if err != nil {
			return nil, nil, fmt.Errorf("open pool: %w", err)
		}
		opened = append(opened, d)
		s, err := readSuperblock(d)
		if err != nil {
			return nil, nil, fmt.Errorf("open pool: %w", err)
		}
		supers = append(supers, s)
		if sb == nil || sb.Sequence < s.Sequence {
			sb = s
		}
	}
	devices = make([]device.Device, len(sb.Members))
	for i, s := range supers {
		path := opened[i].Path()
		switch {
		case c.Pool != [16]byte{} && s.Pool != c.Pool:
			return nil, nil, fmt.Errorf("open pool: %s belongs to pool %x, this node's pool is %x: were devices swapped between nodes?", path, s.Pool, c.Pool)
		case s.Pool != supers[0].Pool:
			return nil, nil, fmt.Errorf("open pool: %s belongs to pool %x, %s to pool %x", path, s.Pool, opened[0].Path(), supers[0].Pool)
		case len(sb.Members) <= s.Index || sb.Members[s.Index] != s.Members[s.Index]:
			return nil, nil, fmt.Errorf("open pool: %s is not a member of pool %x any more", path, s.Pool)
		case devices[s.Index] != nil:
			return nil, nil, fmt.Errorf("open pool: %s and %s are the same member of pool %x: one is a copy", path, devices[s.Index].Path(), s.Pool)
		case s.Sequence+1 < sb.Sequence:
			return nil, nil, fmt.Errorf("open pool: %s is stale: its state %d is older than the pool's %d; it was away while the pool went on", path, s.Sequence, sb.Sequence)
		}
		devices[s.Index] = opened[i]
		if want := format.SuperblockArea + int64(s.Members[s.Index].Segments)*int64(sb.SegmentBytes); opened[i].Size() < want {
			return nil, nil, fmt.Errorf("open pool: %s has %d bytes, was formatted with %d or more: it was cut off", path, opened[i].Size(), want)
		}
	}
	for i, d := range devices {
		if d == nil {
			return nil, nil, fmt.Errorf("open pool: device %d of %d (uuid %x) of pool %x is missing", i+1, len(devices), sb.Members[i].Device, sb.Pool)
		}
	}
	if sb.KeyCheck != keyCheck(c.Key) {
		return nil, nil, fmt.Errorf("open pool: pool %x was made with the key of another cluster", sb.Pool)
	}
	return devices, sb, nil
}
