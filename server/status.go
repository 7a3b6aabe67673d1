package server

import (
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Health is how well the cluster does its work.
type Health string

const (
	Healthy     Health = "healthy"     // everything recorded is up and in sync
	Degraded    Health = "degraded"    // all volumes are served, with less protection than configured
	Unavailable Health = "unavailable" // some volume is not served, or there is no quorum
)

// Status is the whole picture of a cluster as one node sees it.
type Status struct {
	Cluster    string
	Health     Health
	Problems   []Problem // worst first
	AnsweredBy string
	Quorum     bool
	Leader     string // name of the raft leader; empty: none known
	Voters     int
	VotersUp   int
	Nodes      []Member
	Volumes    []Volume
	Operations []Operation // those that run, and the last that ended
	// Risk says in a sentence what the next failure of a node does.
	Risk Risk
}

// Problem is one thing that is wrong, or (severity Healthy) an advice.
type Problem struct {
	Severity Health
	Code     string // stable, for scripts
	Cause    string
	Risk     string
	Remedy   string // the next command to type
}

// Info is the identity of a cluster and how initiators reach it.
type Info struct {
	Name         string
	UUID         string
	Created      time.Time
	Target       string // iSCSI qualified name
	Portals      []Portal
	FeatureLevel int // of the cluster
	LevelKnown   int // the highest that this node's program knows
	QuorumMode   QuorumMode
	Preferred    string // QuorumPreferred: the node that decides alone
	Balance      bool   // volumes go back to their nodes
	BalanceAfter time.Duration
	ResyncRate   uint32 // MiB a second that resyncs from one node may send together; 0: no limit
	Leader       string
	Quorum       bool
	Voters       int
	// Discovery is the policy for discovery sessions, with its users.
	Discovery       DiscoveryMode
	DiscoveryUser   string
	DiscoveryMutual string
}

// Portal is an address where initiators log in.
type Portal struct {
	Address string // ip:port
	Node    string
	Group   uint16 // target portal group tag
}

// Role is what a node does in the cluster.
type Role string

const (
	Data    Role = "data"
	Witness Role = "witness"
)

// NodeState is how a node looks from the node that was asked.
type NodeState string

const (
	NodeUp       NodeState = "up"
	NodeDown     NodeState = "down"     // it does not answer
	NodeStarting NodeState = "starting" // it answers and does not serve yet
)

// Member is a node of the cluster, as Status shows it.
type Member struct {
	ID          replication.NodeID
	Name        string
	Role        Role
	State       NodeState
	Sync        string
	Management  string // that of Sync when it has no other
	Portals     []string
	API         string
	Metrics     string
	Failure     string // why it stopped by itself since its last start; empty: it did not
	Detour      bool   // it does not answer at Management, and is asked at Sync
	Leader      bool
	Voter       bool
	Incarnation uint64
	Version     string
	Started     time.Time
	Owns        int
	InSync      int
	Replicas    int
	Pool        *Pool // nil: a witness, or no answer
	Traffic     Traffic
	Sessions    int
	Draining    bool // volumes and initiators leave it
	Mode        Mode
	EvacuateTo  string    // empty: any node
	ModeSince   time.Time // when it was set to Mode
	Scrub       *Scrub    // nil: a witness, or no answer
	Error       string    // why it is not up, when known
}

// Pool is the fill of one node's store, in bytes.
type Pool struct {
	Size    uint64
	Live    uint64 // live data and metadata
	Garbage uint64
	Free    uint64
	Usable  uint64 // what Live may grow to before writes are refused
	Mapped  uint64 // blocks that volumes map, before reduction
	Stored  uint64 // what these blocks take on the devices
	Caches  []Cache
	Reclaim uint64 // of Mapped, blocks of deleted volumes: on their way back to free space
	// WriteAmplification is bytes written to the devices for each byte of new blocks, since the start.
	WriteAmplification float64
}

// Cache is one level of the cache; counts are of blocks since the node started.
type Cache struct {
	Tier         string // "ram", "flash"
	Path         string // of flash
	Bytes        uint64
	Capacity     uint64
	Hits, Misses uint64
	Written      uint64 // of flash: bytes
	Failure      string // why it is off
	Warming      bool   // of flash
}

// Traffic counts what initiators moved since the node started.
type Traffic struct {
	ReadOps, WriteOps     uint64
	ReadBytes, WriteBytes uint64
}

func (t *Traffic) add(u Traffic) {
	t.ReadOps += u.ReadOps
	t.WriteOps += u.WriteOps
	t.ReadBytes += u.ReadBytes
	t.WriteBytes += u.WriteBytes
}

// Device is one disk of a node's pool.
type Device struct {
	Node     string
	Path     string
	UUID     string
	Size     uint64 // bytes
	State    string // in the words of lsfs.DeviceState
	DirectIO bool
	Errors   uint64 // of reads, writes and flushes since the node started
	Class    string // flash or capacity
	Live     uint64 // bytes that stand on it
	Free     uint64
	Drain    uint64 // bytes that stood on it when its drain began
	Stuck    string // why its drain does not get on
	// Means of the last few dozen operations.
	ReadLatency, WriteLatency, FlushLatency time.Duration
}

// VolumeState is how a volume does.
type VolumeState string

const (
	VolumeOnline   VolumeState = "online"   // served, all replicas in sync
	VolumeDegraded VolumeState = "degraded" // served, some replica missing or catching up
	VolumeStarting VolumeState = "starting" // ownership is moving or the owner is starting
	VolumeOffline  VolumeState = "offline"  // nobody serves it
	VolumeDeleting VolumeState = "deleting"
)

// ReplicaState is how one copy of a volume does.
type ReplicaState string

const (
	ReplicaInSync  ReplicaState = "in_sync"
	ReplicaSyncing ReplicaState = "syncing"
	ReplicaStale   ReplicaState = "stale" // out of sync and not catching up yet
	ReplicaDown    ReplicaState = "down"  // its node does not answer
)

// Replica is one copy of a volume.
type Replica struct {
	Node        string
	State       ReplicaState
	Owner       bool
	ResyncDone  uint64 // bytes
	ResyncTotal uint64 // bytes
	ResyncSent  uint64 // bytes of contents that had to be sent
	ResyncLeft  time.Duration
	Since       time.Time // when it fell out of sync; zero: it was never in, or is
}

// Volume is a mirrored disk that initiators see as a logical unit.
type Volume struct {
	ID           lsfs.VolumeID
	Name         string
	UUID         string
	LUN          uint16
	Serial       string
	NAA          string
	Size         uint64 // bytes
	LogicalBlock uint32 // bytes
	Dedup        bool
	Compress     bool
	Thin         bool
	Hosts        []string
	AnyHost      bool
	Created      time.Time
	State        VolumeState
	Epoch        uint64
	Owner        string
	Replicas     []Replica
	Mapped       uint64 // bytes that hosts wrote and that are not zero
	Traffic      Traffic
	ServedBy     []string

	PhysicalBlock uint32   // bytes
	ReadOnly      []string // those of Hosts whose writes are refused
	Paths         []Path
	Room          uint64 // bytes for new data in the fullest pool of its in-sync copies, as the owner knows it
	// Counts are the commands of all nodes since each of them started.
	Counts       []ClassCount
	Reservations *Reservations // nil: none
	Snapshots    int
	Origin       string // VOLUME@SNAPSHOT that it began as, while that exists
	Restoring    bool   // it is being rolled back to a snapshot

	Preferred string // the node that ought to own it; empty: none
	Lineage   string // UUID, since it was promoted by force; empty: it never was
}

// PathState is what initiators are told of a volume's path through a node.
type PathState string

const (
	PathOptimized    PathState = "optimized"     // the owner's
	PathNonOptimized PathState = "non_optimized" // forwards to the owner
	PathUnavailable  PathState = "unavailable"
)

// Path is the way to a volume through one node.
type Path struct {
	Node     string
	State    PathState
	Portals  []string
	Sessions int // of initiators that see the volume
}

// Host is a named set of initiators.
type Host struct {
	Name       string
	Initiators []string
	CHAPUser   string
	MutualUser string
	Volumes    []string
	Paths      []string // nodes that it is logged in to
}

// Session is one iSCSI session.
type Session struct {
	Node      string
	Host      string // empty: an initiator of no host
	Initiator string
	ISID      [6]byte
	TSIH      uint16
	Portal    string
	Peer      string
	Since     time.Time
	Auth      string
	Digests   string
	Commands  uint64
	BytesIn   uint64
	BytesOut  uint64
	Tasks     int
}

// Severity of an event.
type Severity string

const (
	Notice  Severity = "info"
	Warning Severity = "warning"
	Failure Severity = "error"
)

// Event is a fact that the cluster recorded.
type Event struct {
	Number   uint64
	Time     time.Time
	Severity Severity
	Code     string
	Text     string
	Node     string
}

// Token lets one node join, once.
type Token struct {
	Text      string
	Role      Role
	Expires   time.Time
	Addresses []string // sync addresses of data nodes
}

// Digest is what the comparison of one replica found: it is equal (Sum), differs
// (Different) or was not compared (Error).
type Digest struct {
	Node      string
	Sum       []byte   // SHA-256 over the content; equal replicas have equal ones
	Different []uint32 // chunks of 1 MiB, the first 64
	Snapshots []string // of its snapshots that differ: which, and in what
	Error     string
}

// Unreachable is a node that could not be asked.
type Unreachable struct {
	Node  string
	Error string
}

// Report is what only the node itself knows. Nodes ask each other for it.
type Report struct {
	Node     replication.NodeID
	Version  string
	Started  time.Time
	Ready    bool
	Pool     *Pool
	Devices  []Device
	Sessions []Session
	Volumes  []VolumeReport
	Scrub    *Scrub // nil on a witness
}

// VolumeReport is a node's view of one volume of which it has a replica.
type VolumeReport struct {
	ID       lsfs.VolumeID
	Standing *replication.Standing // of the copy there; nil: none
	Role     string                // in replication's words
	Owner    bool                  // it serves as owner
	Served   bool                  // initiators reach the volume through this node
	Epoch    lsfs.Epoch
	Mapped   uint64
	Traffic  Traffic
	Replicas []Replica // as the owner sees them; Node is the name

	Room         uint64 // see Volume
	Counts       []ClassCount
	Reservations *Reservations
}
