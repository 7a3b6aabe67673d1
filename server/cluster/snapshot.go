package cluster

import (
	"cmp"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Limits of snapshots. A command that would exceed one is refused.
const (
	// MaxVolumeSnapshots is how many snapshots one volume may have.
	MaxVolumeSnapshots = 4096
	// MaxSnapshots is how many snapshots all volumes together may have.
	MaxSnapshots = 1 << 16
	// MaxSnapshotGroup is how many volumes one consistent group may have: their
	// writes are held one volume after the other.
	MaxSnapshotGroup = 64
	// MinScheduleEvery is the shortest time between two runs of a schedule.
	MinScheduleEvery = time.Minute
	maxScheduleEvery = 366 * 24 * time.Hour
	maxScheduleKeep  = MaxVolumeSnapshots - 96 // some are left for an administrator
)

// SnapshotState says how far a snapshot has come. Part of the log and snapshot
// formats, do not change.
//
//	pending --taken on every in-sync copy--> ready --deleted--> (no record)
//	pending --the owner says it has none---> (no record)
type SnapshotState uint8

const (
	// SnapshotPending: it may have been taken, or not. Nothing can be made from it.
	SnapshotPending SnapshotState = 1
	// SnapshotReady: every in-sync copy of the volume has it (W4).
	SnapshotReady SnapshotState = 2
)

// Snapshot is the content of a volume at one operation of its stream. A node that
// holds one which no record names deletes it.
type Snapshot struct {
	ID        lsfs.VolumeID // from the same counter as volumes, never used again
	Volume    lsfs.VolumeID
	Name      string // unique within the volume
	State     SnapshotState
	SizeBytes uint64 // of the volume at that time
	Created   time.Time
	// Group is the id of the first snapshot that was taken at the same moment.
	Group lsfs.VolumeID
	// Scheduled: taken by the schedule of the volume, which deletes it as well.
	Scheduled bool
}

func (s *Snapshot) walk(c *codec) {
	u64(c, &s.ID)
	u64(c, &s.Volume)
	text(c, &s.Name)
	u8(c, &s.State)
	u64(c, &s.SizeBytes)
	c.time(&s.Created)
	u64(c, &s.Group)
	c.flag(&s.Scheduled)
}

// Schedule takes snapshots of a volume by the clock and deletes old ones.
type Schedule struct {
	Volume lsfs.VolumeID
	Every  time.Duration // whole seconds; runs fall on multiples of it since 1970, UTC
	// Keep newest snapshots of the schedule stay; of the older ones the newest of
	// each of the KeepDaily last days (UTC) that have one.
	Keep      uint32
	KeepDaily uint32
	Created   time.Time
	Last      time.Time // newest run that was begun; zero: none
}

func (s *Schedule) walk(c *codec) {
	u64(c, &s.Volume)
	seconds := uint64(s.Every / time.Second)
	u64(c, &seconds)
	if c.decoding {
		if seconds > uint64(maxScheduleEvery/time.Second) {
			c.fail("schedule")
			return
		}
		s.Every = time.Duration(seconds) * time.Second
	}
	u32(c, &s.Keep)
	u32(c, &s.KeepDaily)
	c.time(&s.Created)
	c.time(&s.Last)
}

// Due returns the time of the newest run that has not been begun, or false. Runs
// that were missed are not made up: the newest stands for all of them.
func (s *Schedule) Due(now time.Time) (time.Time, bool) {
	at := now.UTC().Truncate(s.Every)
	return at, at.After(s.Created) && at.After(s.Last)
}

// Next returns the time of the first run after now.
func (s *Schedule) Next(now time.Time) time.Time { return now.UTC().Truncate(s.Every).Add(s.Every) }

// Expired returns which of a volume's snapshots the schedule has outlived, oldest
// first. Those that an administrator took are never among them.
func (s *Schedule) Expired(all []*Snapshot) []*Snapshot {
	var mine []*Snapshot
	for _, x := range all {
		if x.Scheduled && x.State == SnapshotReady {
			mine = append(mine, x)
		}
	}
	slices.SortFunc(mine, func(a, b *Snapshot) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(b.ID, a.ID)) // newest first
	})
	var out []*Snapshot
	day, days := "", uint32(0)
	for i, x := range mine {
		this := x.Created.UTC().Format(time.DateOnly)
		newest := this != day // of its day, whether a younger rule keeps it or not
		if newest {
			day = this
			days++
		}
		if i >= int(s.Keep) && (!newest || days > s.KeepDaily) {
			out = append(out, x)
		}
	}
	slices.Reverse(out)
	return out
}

// walkSnapshots walks what version 3 added to the state for snapshots.
func (s *State) walkSnapshots(c *codec) {
	pointers(c, &s.Snapshots)
	pointers(c, &s.Schedules)
}

// walkSnapshots walks what version 3 added to a volume for snapshots.
func (v *Volume) walkSnapshots(c *codec) {
	u64(c, &v.Restoring)
	u64(c, &v.Restored)
}

// Snapshot returns a snapshot by its id, or nil.
func (s *State) Snapshot(id lsfs.VolumeID) *Snapshot {
	i, ok := slices.BinarySearchFunc(s.Snapshots, id, func(x *Snapshot, id lsfs.VolumeID) int { return cmp.Compare(x.ID, id) })
	if !ok {
		return nil
	}
	return s.Snapshots[i]
}

// SnapshotsOf returns the snapshots of a volume, oldest first.
func (s *State) SnapshotsOf(volume lsfs.VolumeID) []*Snapshot {
	var out []*Snapshot
	for _, x := range s.Snapshots {
		if x.Volume == volume {
			out = append(out, x)
		}
	}
	return out
}

// SnapshotCounts says how many snapshots each volume has.
func (s *State) SnapshotCounts() map[lsfs.VolumeID]int {
	counts := map[lsfs.VolumeID]int{}
	for _, x := range s.Snapshots {
		counts[x.Volume]++
	}
	return counts
}

// SnapshotNamed returns a snapshot of a volume by its name, or nil.
func (s *State) SnapshotNamed(volume lsfs.VolumeID, name string) *Snapshot {
	for _, x := range s.Snapshots {
		if x.Volume == volume && x.Name == name {
			return x
		}
	}
	return nil
}

// SnapshotGroup returns the snapshots that were taken at one moment, in the order
// of their volumes.
func (s *State) SnapshotGroup(group lsfs.VolumeID) []*Snapshot {
	var out []*Snapshot
	for _, x := range s.Snapshots {
		if x.Group == group {
			out = append(out, x)
		}
	}
	return out
}

// Schedule returns the schedule of a volume, or nil.
func (s *State) Schedule(volume lsfs.VolumeID) *Schedule {
	for _, x := range s.Schedules {
		if x.Volume == volume {
			return x
		}
	}
	return nil
}

// Using returns the volume that needs a snapshot to stay for now, and what for: to
// be made from it, or to be rolled back to it. Nil: none.
func (s *State) Using(snapshot lsfs.VolumeID) (v *Volume, what string) {
	for _, v := range s.Volumes {
		switch {
		case v.Record.Deleted:
		case v.Restoring == snapshot:
			return v, "rolled back to it"
		case v.Record.Origin == snapshot && v.Record.Epoch == 1: // the owner has not started: it may have no copy yet
			return v, "made from it"
		}
	}
	return nil, ""
}

// KnownSnapshots is what replication needs of the recorded snapshots to tell which
// of its own are garbage.
func (s *State) KnownSnapshots() replication.KnownSnapshots {
	return replication.KnownSnapshots{Next: s.nextVolume, Of: func(id lsfs.VolumeID) lsfs.VolumeID {
		if x := s.Snapshot(id); x != nil {
			return x.Volume
		}
		return 0
	}}
}
