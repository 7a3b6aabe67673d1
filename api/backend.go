package api

import (
	"context"
	"time"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

// Backend is a node, as the services need it. All methods may be called
// concurrently and end with ctx. Names may be uuids. What they return belongs
// to the caller.
type Backend interface {
	ClusterBackend
	NodeBackend
	VolumeBackend
	SnapshotBackend
	HostBackend
	ReplicaBackend
	MaintenanceBackend
}

// ClusterBackend answers for the cluster as a whole.
type ClusterBackend interface {
	// Status answers without a quorum too; it asks every node, and does not wait
	// for one that is silent longer than a second or two.
	Status(ctx context.Context) (*server.Status, error)
	// Info returns the identity of the cluster from local state.
	Info(ctx context.Context) (*server.Info, error)
	// CreateToken makes a join token, durable on return. ttl 0 is the default.
	CreateToken(ctx context.Context, role server.Role, ttl time.Duration) (*server.Token, error)
	// SetDiscovery sets how initiators prove themselves for discovery.
	SetDiscovery(ctx context.Context, spec server.DiscoverySpec) error
	// IssueCertificate signs an administrator's request (PKCS #10 DER) and returns
	// the certificate and the cluster's CA, both PEM.
	IssueCertificate(ctx context.Context, name string, csr []byte) (certificate, ca []byte, expires time.Time, err error)
	// Events calls send for the events after number after, in order. With follow
	// it goes on until ctx ends or send fails.
	Events(ctx context.Context, after uint64, follow bool, send func(server.Event) error) error
	// Member says what the node is in the cluster, or false.
	Member(id replication.NodeID) (server.Role, bool)
}

// NodeBackend answers for machines.
type NodeBackend interface {
	// Devices lists the devices of one node, or of all when node is empty, and
	// the nodes that did not answer.
	Devices(ctx context.Context, node string) ([]server.Device, []server.Unreachable, error)
	// ChangeDevice changes the devices of a node's pool; see server.DeviceChange. A node
	// that is not the named one asks it, unless nodeOnly.
	ChangeDevice(ctx context.Context, c server.DeviceChange, nodeOnly bool) (*server.Device, error)
	// Sessions lists the sessions of all nodes, and the nodes that did not answer.
	Sessions(ctx context.Context) ([]server.Session, []server.Unreachable, error)
	// Report returns what only this node knows; it asks nobody.
	Report(ctx context.Context) (*server.Report, error)
	// DrainNode records that initiators and volumes leave a node, or may come back;
	// it does not wait for them.
	DrainNode(ctx context.Context, name string, drain bool) (*server.Member, error)
	// ScrubNode shows, starts or stops the scrub of a data node's pool; it does not
	// wait for it. A node that is not that one asks it, unless here.
	ScrubNode(ctx context.Context, name string, action server.ScrubAction, fullSpeed, here bool) (*server.Scrub, error)
	// MergeNode shows, starts or stops the merging of duplicates in a data node's pool; it
	// does not wait for it. A node that is not that one asks it, unless here.
	MergeNode(ctx context.Context, name string, action server.MergeAction, here bool) (*server.Merge, error)
	// ExplainPool walks the maps of a node's pool, and tells progress from 0 to 1; an
	// error of progress ends it. A node that is not that one asks it, unless here.
	ExplainPool(ctx context.Context, name string, exact, here bool, progress func(done float64) error) (*server.PoolExplained, error)
}

// VolumeBackend manages volumes. Changes are committed in the cluster on return.
type VolumeBackend interface {
	// CreateVolume is idempotent by VolumeSpec.RequestID.
	CreateVolume(ctx context.Context, spec server.VolumeSpec) (*server.Volume, error)
	// DeleteVolume refuses a volume in use unless inUse, and one with snapshots
	// unless withSnapshots. With dryRun nothing changes.
	DeleteVolume(ctx context.Context, name string, dryRun, inUse, withSnapshots bool) (*server.Volume, []server.Session, error)
	// SetWritePolicy changes when writes to a volume are answered.
	SetWritePolicy(ctx context.Context, name string, p server.WritePolicy) (*server.Volume, error)
	// ResizeVolume grows a volume to size bytes.
	ResizeVolume(ctx context.Context, name string, size uint64) (*server.Volume, error)
	// CheckVolume compares every replica with the owner's; it takes as long as
	// reading the maps. A node that is not the owner asks it, unless ownerOnly.
	CheckVolume(ctx context.Context, name string, ownerOnly bool) (digests []server.Digest, equal bool, err error)
	// MoveVolume makes the node to the owner. A node that is not the owner asks it,
	// unless ownerOnly.
	MoveVolume(ctx context.Context, name, to string, ownerOnly bool) (*server.Volume, error)
	// ClearReservations drops the reservations of a volume and returns what was
	// there; with dryRun nothing changes. A node that is not the owner asks it,
	// unless ownerOnly.
	ClearReservations(ctx context.Context, name string, dryRun, ownerOnly bool) (*server.Volume, *server.Reservations, error)
	// MapVolume lets hosts see a volume in addition to those that do; with readOnly
	// their writes are refused.
	MapVolume(ctx context.Context, volume string, hosts []string, readOnly bool) (*server.Volume, error)
	// UnmapVolume takes a volume away from hosts.
	UnmapVolume(ctx context.Context, volume string, hosts []string) (*server.Volume, error)
	// SetVolumeHosts lets exactly these hosts, or any, see a volume.
	SetVolumeHosts(ctx context.Context, volume string, hosts []string, any bool) (*server.Volume, error)
}

// SnapshotBackend manages snapshots. Changes are committed in the cluster on return.
type SnapshotBackend interface {
	// Snapshots lists those of a volume, or of all when it is empty, oldest first.
	Snapshots(ctx context.Context, volume string) ([]server.Snapshot, error)
	// CreateSnapshots takes one of each volume at one moment; it is idempotent by request.
	CreateSnapshots(ctx context.Context, name string, volumes []string, request string) ([]server.Snapshot, error)
	// DeleteSnapshot deletes one. With dryRun nothing changes.
	DeleteSnapshot(ctx context.Context, volume, name string, dryRun bool) (*server.Snapshot, error)
	// Changes calls send for the ranges in which two snapshots differ, in order; next
	// is where to go on. The slice is valid until send returns.
	Changes(ctx context.Context, spec server.ChangesSpec, send func(ranges []server.ChangedRange, next uint64) error) error
	// CloneSnapshot makes a volume; it is idempotent by CloneSpec.RequestID.
	CloneSnapshot(ctx context.Context, spec server.CloneSpec) (*server.Volume, error)
	// RollBackVolume refuses a volume in use unless inUse. With dryRun nothing changes.
	RollBackVolume(ctx context.Context, volume, snapshot string, dryRun, inUse bool) (*server.Volume, *server.Snapshot, []server.Session, error)
	// Schedules lists all of them.
	Schedules(ctx context.Context) ([]server.Schedule, error)
	// SetSchedule replaces the schedule of a volume.
	SetSchedule(ctx context.Context, volume string, every time.Duration, keep, keepDaily int) (*server.Schedule, error)
	// RemoveSchedule leaves the snapshots.
	RemoveSchedule(ctx context.Context, volume string) error
	// SnapshotStep does one step on this node, the owner of the volume.
	SnapshotStep(ctx context.Context, step server.SnapshotStep) (found bool, err error)
}

// HostBackend manages hosts. Changes are committed in the cluster on return.
type HostBackend interface {
	// Hosts lists the hosts and where they are logged in.
	Hosts(ctx context.Context) ([]server.Host, error)
	// AddHost makes a host.
	AddHost(ctx context.Context, spec server.HostSpec) (*server.Host, error)
	// RemoveHost refuses a host that is logged in unless inUse. With dryRun nothing changes.
	RemoveHost(ctx context.Context, name string, dryRun, inUse bool) (*server.Host, error)
}

// ReplicaBackend manages the copies of volumes. Changes are recorded on return; what
// takes its time goes on as an operation.
type ReplicaBackend interface {
	// AddReplica gives a volume a copy on a node; replaces names the node whose copy
	// goes then, or is empty.
	AddReplica(ctx context.Context, volume, node, replaces string) (*server.Operation, error)
	// RemoveReplica never takes the last good copy; force allows that one is left.
	RemoveReplica(ctx context.Context, volume, node string, force, dryRun bool) (*server.Volume, error)
	// Promote makes a copy the only good one.
	Promote(ctx context.Context, spec server.PromoteSpec) (*server.Promotion, error)
	// Operations lists those that run and the last ones that have ended.
	Operations(ctx context.Context) ([]server.Operation, error)
	// CancelOperation takes back what the operation has made.
	CancelOperation(ctx context.Context, id uint64) (*server.Operation, error)
}

// MaintenanceBackend looks after nodes and the cluster as a whole. Changes are
// recorded on return.
type MaintenanceBackend interface {
	// SetMaintenance also returns who is hurt when the node stops.
	SetMaintenance(ctx context.Context, node string, enter, force, dryRun bool) (*server.Member, []string, error)
	// EvacuateNode begins, or with stop ends, that replicas leave a node.
	EvacuateNode(ctx context.Context, node, to string, stop bool) (*server.Member, error)
	// RemoveNode returns what goes with the node.
	RemoveNode(ctx context.Context, node string, lost, dryRun bool) ([]string, error)
	// SetResyncRate bounds what the resyncs from one node send together, in MiB a second; 0: no bound.
	SetResyncRate(ctx context.Context, rate uint32) error
	// SetBalance says whether and after what time volumes go back to their nodes.
	SetBalance(ctx context.Context, on bool, after time.Duration) error
	// SetQuorum says which nodes vote.
	SetQuorum(ctx context.Context, mode server.QuorumMode, preferred string) error
	// UpgradePlan asks all nodes what they know.
	UpgradePlan(ctx context.Context) (*server.UpgradePlan, error)
	// RaiseLevel raises the feature level for good.
	RaiseLevel(ctx context.Context, level int) error
}
