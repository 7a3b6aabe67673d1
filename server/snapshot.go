package server

import (
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// SnapshotState says whether a snapshot can be used.
type SnapshotState string

const (
	SnapshotPending SnapshotState = "pending" // being taken
	SnapshotReady   SnapshotState = "ready"
)

// Snapshot is the content of a volume at one moment.
type Snapshot struct {
	ID        lsfs.VolumeID
	Name      string
	Volume    string
	State     SnapshotState
	Created   time.Time
	Size      uint64   // bytes
	Mapped    uint64   // bytes; 0 when this node does not hold it
	Group     []string // volumes with a snapshot of the same moment
	Scheduled bool
	Clones    []string // volumes that began as it
}

// Schedule takes snapshots of a volume by the clock.
type Schedule struct {
	Volume    string
	Every     time.Duration
	Keep      int // newest snapshots that stay
	KeepDaily int // days of which the newest older snapshot stays
	Last      time.Time
	Next      time.Time
	Snapshots int // taken by it and not deleted yet
}

// CloneSpec describes a volume to make from a snapshot.
type CloneSpec struct {
	Volume, Snapshot string
	Name             string
	Size             uint64 // bytes; 0: that of the snapshot
	Hosts            []string
	AnyHost          bool
	RequestID        string
}

// ChangesSpec asks in what two snapshots of a volume differ.
type ChangesSpec struct {
	Volume    string
	From      string // empty: all that To holds
	To        string
	Offset    uint64 // bytes: where to begin
	OwnerOnly bool   // do not ask another node
}

// ChangedRange is a run of bytes in which two snapshots differ.
type ChangedRange struct {
	Offset, Length uint64
	Hole           bool // it reads as zeros
}

// SnapshotAct is one act of a snapshot or a rollback on the owner of a volume.
type SnapshotAct string

const (
	ActTake       SnapshotAct = "take"        // take it
	ActFreeze     SnapshotAct = "freeze"      // hold writes for a group
	ActTakeFrozen SnapshotAct = "take_frozen" // take it and let writes go on
	ActThaw       SnapshotAct = "thaw"        // let writes go on
	ActFind       SnapshotAct = "find"        // is it there
	ActRollBack   SnapshotAct = "roll_back"
)

// SnapshotStep is what a node asks of the owner of a volume.
type SnapshotStep struct {
	Act      SnapshotAct
	Volume   lsfs.VolumeID
	Snapshot lsfs.VolumeID
	Group    lsfs.VolumeID
}
