package lsfs

import (
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Class is what a device is good for.
type Class uint8

const (
	// Flash takes the log and what is read often.
	Flash = Class(format.MemberFlash)
	// Capacity takes what stays cold, in large sequential writes.
	Capacity = Class(format.MemberCapacity)

	classes = Capacity + 1
)

func (c Class) String() string {
	return [...]string{"flash", "capacity", "?"}[min(c, classes)]
}

// ParseClass reads what String writes.
func ParseClass(s string) (Class, error) {
	for c := range classes {
		if strings.EqualFold(s, c.String()) {
			return c, nil
		}
	}
	return 0, fmt.Errorf("class %q: want flash or capacity", s)
}

// DeviceID names a device of a pool for ever, wherever it is plugged in.
type DeviceID [16]byte

func (d DeviceID) String() string {
	if id, err := uuid.FromBytes(d[:]); err == nil {
		return id.String()
	}
	return hex.EncodeToString(d[:])
}

// member is a device of the pool that is there. Its counters are its own, its place
// never changes, and the rest is guarded by Store.mu.
type member struct {
	*device.Metered
	id           DeviceID
	first, count uint32 // segments [first, first+count)
	class        Class

	state format.MemberState
	open  bool   // segments are taken from it
	low   uint32 // no free segment below this one
	begun int64  // bytes that stood on it when its drain began
	stuck string // why its drain does not get on
	// failed is what a device that holds nothing answered to a superblock. With any
	// other device that would stop the store.
	failed error
}

// offset is where an address stands on the device.
func (m *member) offset(segmentBytes uint32, a format.Addr) int64 {
	return format.SuperblockArea + int64(a.Segment()-m.first)*int64(segmentBytes) + int64(a.Offset())
}

// holdsNothing says whether the pool can do without the device.
func holdsNothing(s format.MemberState) bool {
	return s == format.MemberJoining || s == format.MemberDrained
}

// leaves says whether what stands on the device moves away.
func leaves(s format.MemberState) bool {
	return s == format.MemberDraining || s == format.MemberLeaving
}

// layout is which device has which segments, in their order. It never changes; a
// new one takes its place.
type layout struct{ members []*member }

// find is the device of a segment, nil if none has it.
func (l *layout) find(seg uint32) *member {
	lo, hi := 0, len(l.members)
	for lo < hi {
		if mid := (lo + hi) / 2; l.members[mid].first+l.members[mid].count <= seg {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(l.members) && l.members[lo].first <= seg {
		return l.members[lo]
	}
	return nil
}

// DeviceState is where a device is in its life in the pool.
type DeviceState string

// The states of a device.
const (
	DeviceOK       DeviceState = "ok"
	DeviceJoining  DeviceState = "joining"  // the pool is about to know it
	DeviceDraining DeviceState = "draining" // what stands on it moves away
	DeviceLeaving  DeviceState = "leaving"  // as draining, and then it is removed
	DeviceDrained  DeviceState = "drained"  // nothing stands on it
	DeviceFailed   DeviceState = "failed"   // a write or a flush failed, the store is stopped
	DeviceSlow     DeviceState = "slow"     // it answers, and takes long
	DeviceLost     DeviceState = "lost"     // it was given up; what stood on it is being repaired
)

// DeviceInfo is what the store knows of one of its devices.
type DeviceInfo struct {
	ID        DeviceID
	Path      string
	Class     Class
	State     DeviceState
	Direct    bool
	DiskBytes int64 // of the device
	SizeBytes int64 // of its segments
	LiveBytes int64 // blocks and metadata that stand on it
	FreeBytes int64 // in free segments
	// DrainBytes is what stood on it when its drain began (or when the store was opened).
	DrainBytes int64
	// Stuck says why a drain does not get on; empty while it does.
	Stuck string
	Usage device.Usage
}

// slowFlush and slowRead are mean latencies above which a device is called slow: ten
// times what a rotating disk with a busy queue takes.
const (
	slowFlush = 500 * time.Millisecond
	slowRead  = 250 * time.Millisecond
)

// Devices lists the devices of the pool, in the order in which they joined it.
func (s *Store) Devices() []DeviceInfo {
	failed := s.failure() != nil
	s.mu.RLock()
	defer s.mu.RUnlock()
	members := s.segs.layout.Load().members
	out := make([]DeviceInfo, len(members))
	for i, m := range members {
		u := m.Usage()
		d := DeviceInfo{
			ID: m.id, Path: m.Path(), Class: m.class, Direct: m.Direct(), DiskBytes: m.Size(), SizeBytes: int64(m.count) * int64(s.segs.bytes),
			DrainBytes: m.begun, Stuck: m.stuck, Usage: u, State: deviceStates[m.state],
		}
		for n := m.first; n < m.first+m.count; n++ {
			seg := &s.segs.all[n]
			d.LiveBytes += int64(seg.live) + int64(seg.pages)
			if seg.state == segmentFree {
				d.FreeBytes += int64(s.segs.bytes)
			}
		}
		switch {
		case failed && u.WriteErrors+u.FlushErrors > 0 || m.failed != nil:
			d.State = DeviceFailed
		case d.State == DeviceOK && (slowFlush < u.FlushLatency || slowRead < u.ReadLatency):
			d.State = DeviceSlow
		}
		out[i] = d
	}
	return out
}

var deviceStates = [...]DeviceState{
	format.MemberActive: DeviceOK, format.MemberJoining: DeviceJoining, format.MemberDraining: DeviceDraining,
	format.MemberLeaving: DeviceLeaving, format.MemberDrained: DeviceDrained, format.MemberLost: DeviceLost,
}
