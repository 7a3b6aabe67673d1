package server

import (
	"errors"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// The errors that callers act on, for errors.Is; the texts of what they are
// wrapped in are for people.
var (
	// ErrNotFound: no such node, volume or host.
	ErrNotFound = cluster.ErrNotFound
	// ErrExists: the name is taken by something else.
	ErrExists = cluster.ErrExists
	// ErrInvalid: the request cannot be meant so.
	ErrInvalid = cluster.ErrInvalid
	// ErrRefused: the request is understood and would do harm; the text says which.
	ErrRefused = cluster.ErrRefused
	// ErrToken: a join token is unknown, expired, used, or of another cluster.
	ErrToken = cluster.ErrToken
	// ErrNoQuorum: the change needs more nodes than answer. It may be repeated.
	ErrNoQuorum = cluster.ErrNoQuorum
	// ErrOutcomeUnknown: the change may have been made or may still be made.
	ErrOutcomeUnknown = replication.ErrOutcomeUnknown
	// ErrNotReady: this node is starting or stopping, or has no such part.
	ErrNotReady = errors.New("not ready")
)

// VolumeSpec describes a volume to make.
type VolumeSpec struct {
	Name         string
	Size         uint64 // bytes, a multiple of 4096
	Hosts        []string
	AnyHost      bool
	Dedup        bool
	Compress     bool
	LogicalBlock uint32 // 512 or 4096 bytes; 0 is 512
	// PhysicalBlock is 512 or 4096 bytes, at least LogicalBlock; 0 is 4096.
	PhysicalBlock uint32
	MirroredRAM   bool   // write policy
	Thick         bool   // hosts are not offered UNMAP and provisioning
	RequestID     string // a repeated call with it returns the first one's volume
}

// HostSpec describes a host to add.
type HostSpec struct {
	Name       string
	Initiators []string
	// CHAPUser with CHAPSecret: the host proves itself. MutualUser with
	// MutualSecret: the target proves itself to the host as well.
	CHAPUser, CHAPSecret     string
	MutualUser, MutualSecret string
}
