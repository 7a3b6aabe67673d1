package lsfs

import (
	"errors"
	"fmt"
	"strings"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

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
		if firstErr == nil {
			firstErr = format.ErrInvalid
		}
		return nil, fmt.Errorf("no two of four superblocks agree (%d readable): %w", valid, firstErr)
	}
	return best, nil
}

// candidate is a device that may belong to the pool.
type candidate struct {
	path string
	dev  device.Device
	sb   *format.Superblock
	why  string // it is not used
	used bool
}

// finder looks for the devices of one pool.
type finder struct {
	c     *Config
	pool  [16]byte
	all   []*candidate
	paths map[string]bool
	best  *format.Superblock
}

// importDevices opens the devices of a pool, wherever they are plugged in, and
// returns them in the pool's order with the newest superblock. Devices that do not
// belong to it, any more or at all, are left alone; each is named in the log, and in
// the error when a device of the pool is missing.
func importDevices(c *Config) (members []*member, sb *format.Superblock, err error) {
	f := &finder{c: c, pool: c.Pool, paths: map[string]bool{}}
	defer func() {
		for _, x := range f.all {
			if x.dev != nil && (err != nil || !x.used) {
				_ = x.dev.Close()
			}
		}
	}()
	for _, path := range c.Devices {
		f.look(path)
	}
	members, missing := f.assemble()
	if (f.best == nil || len(missing) > 0) && c.Search != nil {
		for _, path := range c.Search() {
			f.look(path)
		}
		members, missing = f.assemble()
	}
	if f.best == nil {
		return nil, nil, fmt.Errorf("open pool: none of its devices is here%s", f.reasons())
	}
	if len(missing) > 0 {
		return nil, nil, fmt.Errorf("open pool: %s of pool %x is missing%s\n  plug it in, or repair what is wrong with it; without it the data of this node is not whole.\n  If it failed for good: twinsan store forget DEVICE", strings.Join(missing, " and "), f.best.Pool, f.reasons())
	}
	sb = f.best
	if sb.Generation < c.Generation {
		return nil, nil, fmt.Errorf("open pool: these devices are an older state of pool %x: their list of devices is number %d, this node has known number %d; devices that were removed or replaced were plugged in again%s", sb.Pool, sb.Generation, c.Generation, f.reasons())
	}
	if sb.KeyCheck != keyCheck(c.Key) {
		return nil, nil, fmt.Errorf("open pool: pool %x was made with the key of another cluster", sb.Pool)
	}
	for _, x := range f.all {
		if !x.used && x.why != "" {
			c.Logger.Warn("device is not used", "device", x.path, "why", x.why)
			c.Event(Event{Code: "device-refused", Text: fmt.Sprintf("device %s is not used: it %s", x.path, x.why)})
		}
	}
	return members, sb, nil
}

// look opens a device and reads what it says of itself.
func (f *finder) look(path string) {
	if f.paths[path] {
		return
	}
	f.paths[path] = true
	x := &candidate{path: path}
	f.all = append(f.all, x)
	var err error
	if x.dev, err = f.c.OpenDevice(path); err != nil {
		x.why = fmt.Sprintf("cannot be opened: %v", err)
		return
	}
	if x.sb, err = readSuperblock(x.dev); err != nil {
		x.why = fmt.Sprintf("holds no pool: %v", err)
		return
	}
	if f.pool == [16]byte{} {
		f.pool = x.sb.Pool
	}
	if x.sb.Pool != f.pool {
		x.why = fmt.Sprintf("belongs to pool %x, this node's pool is %x: were devices swapped between nodes?", x.sb.Pool, f.pool)
		return
	}
	if f.best == nil || f.best.Sequence < x.sb.Sequence {
		f.best = x.sb
	}
}

// assemble finds a device for each member of the newest list, and names those that
// there is none for.
func (f *finder) assemble() (members []*member, missing []string) {
	if f.best == nil {
		return nil, nil
	}
	for i, m := range f.best.Members {
		var found *candidate
		for _, x := range f.all {
			if x.sb == nil || x.sb.Pool != f.pool || x.sb.Device != m.Device {
				continue
			}
			if m.State == format.MemberLost {
				x.why = "was given up, and the pool went on without it. To use it again, empty it and add it: wipefs --all, then twinsan device add"
				continue
			}
			want := format.SuperblockArea + int64(m.Segments)*int64(f.best.SegmentBytes)
			switch {
			case found != nil:
				x.why = fmt.Sprintf("is the same member of the pool as %s: one is a copy", found.path)
				missing = append(missing, "the one true device "+DeviceID(m.Device).String())
			case x.sb.Sequence+1 < f.best.Sequence:
				x.why = fmt.Sprintf("is stale: its state %d is older than the pool's %d; it was away while the pool went on", x.sb.Sequence, f.best.Sequence)
			case x.dev.Size() < want:
				x.why = fmt.Sprintf("has %d bytes, was formatted with %d or more: it was cut off", x.dev.Size(), want)
			default:
				found = x
			}
		}
		switch {
		case found != nil:
			found.used = true
			state := m.State
			if state == format.MemberJoining {
				state = format.MemberActive // its superblocks are written: that was all that it needed
			}
			members = append(members, &member{Metered: device.Meter(found.dev), id: m.Device, first: m.First, count: m.Segments, class: Class(m.Class), state: state})
		case f.c.giveUp(&m):
			members = append(members, &member{Metered: device.Meter(lostDevice{m.Device}), id: m.Device, first: m.First, count: m.Segments, class: Class(m.Class), state: format.MemberLost})
		case holdsNothing(m.State):
			f.c.Logger.Warn("a device that held nothing is gone from the pool", "device", DeviceID(m.Device).String())
		default:
			missing = append(missing, fmt.Sprintf("device %d of %d (%s)", i+1, len(f.best.Members), DeviceID(m.Device)))
		}
	}
	for _, x := range f.all {
		if x.sb != nil && x.sb.Pool == f.pool && !x.used && x.why == "" {
			x.why = fmt.Sprintf("is device %s, which is not a member of the pool any more: it was removed or replaced. To use it again, empty it and add it: wipefs --all, then twinsan device add", DeviceID(x.sb.Device))
		}
	}
	return members, missing
}

// reasons says why candidates are not used, a line for each.
func (f *finder) reasons() string {
	var b strings.Builder
	for _, x := range f.all {
		if !x.used && x.why != "" {
			fmt.Fprintf(&b, "\n  %s %s", x.path, x.why)
		}
	}
	return b.String()
}

// errNoDevices is what a store without any place to look for its devices gets.
var errNoDevices = errors.New("config: no devices, and nowhere to search for them")
