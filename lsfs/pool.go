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
	// Classes are the devices' classes, at the same index. Default: flash.
	Classes []Class
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
		if err := mustBeEmpty(d, buf); err != nil {
			return fmt.Errorf("format: %w", err)
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
	sb := format.Superblock{Sequence: 1, Generation: 1, Pool: c.Pool, SegmentBytes: c.SegmentBytes, KeyCheck: keyCheck(c.Key)}
	segments := int64(0)
	var members []*member
	for i, d := range devices {
		n := (d.Size() - format.SuperblockArea) / int64(c.SegmentBytes)
		if int64(format.NoSegment) <= segments+n {
			return fmt.Errorf("format: more than %d segments of %d bytes", segments, c.SegmentBytes)
		}
		m := &member{Metered: device.Meter(d), first: uint32(segments), count: uint32(n)}
		if i < len(c.Classes) {
			m.class = c.Classes[i]
		}
		_, _ = rand.Read(m.id[:])
		members = append(members, m)
		segments += n
	}
	if segments < segmentsMin {
		return fmt.Errorf("format: %d segments of %d bytes: a pool needs at least %d", segments, c.SegmentBytes, segmentsMin)
	}
	sb.Segments, sb.Members = uint32(segments), membersOf(members)
	return errors.Join(writeSuperblocks(members, sb)...)
}

// mustBeEmpty refuses a device whose first MiB holds anything (ErrInUse).
func mustBeEmpty(d device.Device, buf []byte) error {
	if err := d.ReadAt(buf, 0); err != nil {
		return err
	}
	for i, b := range buf {
		if b != 0 {
			what := "foreign data"
			if sb, err := format.ParseSuperblock(buf[:format.PageSize]); err == nil {
				what = fmt.Sprintf("a device of pool %x", sb.Pool)
			}
			return fmt.Errorf("%s holds %s at byte %d: %w", d.Path(), what, i, ErrInUse)
		}
	}
	return nil
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
