package replication

import (
	"context"
	"errors"
	"net"
	"slices"

	"github.com/twinsan/twinsan/lsfs"
)

// NodeID names a node of the cluster, 1 and up; it is never reused. It is also
// the tag of the node's target port group. Zero is no node.
type NodeID uint32

// ReplicaID is drawn anew at every formatting of a replica (rule "RID" of
// docs/replication.md): a replica that comes back with another one is another replica.
type ReplicaID [16]byte

// Incarnation counts the starts of a node's process. The cluster hands it out
// (it rises in raft at each start), so a higher one proves the older process dead.
type Incarnation uint64

// Replica is one copy of a volume.
type Replica struct {
	Node NodeID
	ID   ReplicaID
}

// Record is what raft holds of a volume for replication: the only judge of who
// may write (C3). Records are values; slices are not modified after they are handed over.
type Record struct {
	Volume    lsfs.VolumeID
	SizeBytes uint64 // multiple of 4096
	Epoch     lsfs.Epoch
	Owner     NodeID // 0: none yet
	InSync    []NodeID
	Replicas  []Replica
	Dedup     bool // policy: look for duplicates
	Compress  bool // policy: compress
	// MirroredRAM is the write policy: an acknowledged write is written on every replica
	// in sync, and flushed soon (W6). False: it is durable there (W5).
	MirroredRAM bool
	Forced      bool // promoted by force (B3)
	Deleted     bool // deletion is recorded; replicas free their copies
	// Origin is the snapshot as which the volume began; 0: it began empty.
	Origin lsfs.VolumeID
}

// Has says whether n is in the recorded in-sync set.
func (r *Record) Has(n NodeID) bool { return slices.Contains(r.InSync, n) }

// Change is a compare-and-set on a Record: it commits only while the record's
// epoch equals Expect, and then the epoch becomes Expect+1 (M1, M2, M4, M5, M6).
// The state machine refuses: an owner outside the new in-sync set; a new owner
// that was not in the recorded in-sync set; a new owner proposed by another node
// than the old owner while that stays in sync (M6); an in-sync set that gains more than
// Grow; a Grow whose replica id or incarnation is not the recorded one.
type Change struct {
	Volume lsfs.VolumeID
	Expect lsfs.Epoch
	Owner  NodeID
	InSync []NodeID

	Grow            NodeID // the one member that InSync gains, or 0
	GrowReplica     ReplicaID
	GrowIncarnation Incarnation

	By     NodeID // the proposer
	Reason string // for the event log: "replica 2 made no progress for 3s"
}

var (
	// ErrConflict: the change was decided against: the record has another epoch,
	// or the change breaks a rule. It cannot take effect later.
	ErrConflict = errors.New("the volume's record has moved on")
	// ErrOutcomeUnknown: the change may still commit (M7). It counts as dead only
	// when the record's epoch has passed Expect.
	ErrOutcomeUnknown = errors.New("the outcome of the change is not known")
)

// Control is what replication asks of the cluster. Methods may be called
// concurrently, block until ctx ends at most, and never call back.
type Control interface {
	// Propose submits a change and returns the record after it, ErrConflict with
	// the current record, or ErrOutcomeUnknown.
	Propose(ctx context.Context, c Change) (Record, error)
	// Record reads a volume's record linearizably (through a raft quorum).
	Record(ctx context.Context, v lsfs.VolumeID) (Record, error)
}

// Transport opens connections to other nodes on the data path, mutually
// authenticated (TLS 1.3, roles checked). An error that wraps
// syscall.ECONNREFUSED means that no process listens there (L5).
type Transport interface {
	Dial(ctx context.Context, n NodeID) (net.Conn, error)
}
