package scsi

import "github.com/twinsan/twinsan/replication"

// Request is one operation on a volume: see replication.Request.
type Request = replication.Request

// RequestOp is what a Request asks of a volume.
type RequestOp = replication.RequestOp

// The operations of a Request.
const (
	OpRead            = replication.OpRead
	OpWrite           = replication.OpWrite
	OpUnmap           = replication.OpUnmap
	OpWriteSame       = replication.OpWriteSame
	OpCompareAndWrite = replication.OpCompareAndWrite
	OpFlush           = replication.OpFlush
	OpOrWrite         = replication.OpOrWrite
	OpState           = replication.OpState
	OpReadState       = replication.OpReadState
	OpExtents         = replication.OpExtents
	OpClone           = replication.OpClone
)

// VolumeID names a volume in the whole cluster.
type VolumeID = replication.VolumeID

// StateID names one value of a volume's ordered state.
type StateID = replication.StateID

// stateBytesMax bounds the ordered state of a volume.
const stateBytesMax = replication.StateBytesMax

// Extent is a run of bytes that is mapped or not.
type Extent = replication.Extent

// The errors of a Request; sense.go translates them.
const (
	ErrMiscompare  = replication.ErrMiscompare
	ErrNoSpace     = replication.ErrNoSpace
	ErrMedium      = replication.ErrMedium
	ErrBusy        = replication.ErrBusy
	ErrUnavailable = replication.ErrUnavailable
	ErrReadOnly    = replication.ErrReadOnly
	ErrReserved    = replication.ErrReserved
	ErrStateMoved  = replication.ErrStateMoved
	ErrNoClone     = replication.ErrNoClone
	ErrDeleted     = replication.ErrDeleted
)

// Volume is what the device server needs of a (replicated) volume. All methods
// may be called concurrently.
type Volume interface {
	// TryRead fills dst from byte offset off (a multiple of 512) if that needs
	// neither I/O nor waiting, and says whether it did. On false dst is undefined
	// and the caller submits an OpRead.
	TryRead(off uint64, dst []byte) bool
	// Submit starts an operation. It may do processor work (reduction) on the
	// calling goroutine but does not wait for I/O. Work queued by Submit may stay
	// queued until Kick.
	Submit(r *Request)
	// ID is the volume's name for OpClone.
	ID() VolumeID
	// Watch sets the function that learns of the ordered state: of the newest one
	// before Watch returns, then of each that follows, in order, one call at a time,
	// on any goroutine and before the operation that made it is answered. live is
	// false when others may have been missed (at first, after a resync). value is
	// not modified afterwards. The function must neither block nor submit. Nil ends it.
	Watch(func(id StateID, value []byte, live bool))
	// SizeBytes is the current capacity, a multiple of 4096.
	SizeBytes() uint64
}

// Backend is the node below the volumes.
type Backend interface {
	// Kick starts what Submit queued: the caller has no more commands at hand.
	// It may do I/O on the calling goroutine when nothing else is in flight.
	Kick()
}

// PathState is an asymmetric access state (SPC-4 "Asymmetric logical unit access").
type PathState uint8

const (
	ActiveOptimized    PathState = 0x0
	ActiveNonOptimized PathState = 0x1
	Standby            PathState = 0x2
	Unavailable        PathState = 0x3
	Transitioning      PathState = 0xf
)

// PortGroup is a target port group: the ports of one node.
type PortGroup struct {
	ID        uint16   // target port group tag, one per node, 1..
	Ports     []uint16 // relative target port ids, unique in the cluster
	State     PathState
	Preferred bool
}
