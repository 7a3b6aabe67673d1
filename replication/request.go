package replication

import (
	"sync/atomic"

	"github.com/twinsan/twinsan/lsfs"
)

// VolumeID names a volume in the whole cluster.
type VolumeID = lsfs.VolumeID

// StateID names one value of a volume's ordered state (C2): the operation that
// wrote it. Zero names the empty value of a new volume.
type StateID = lsfs.OpID

// StateBytesMax bounds the ordered state of a volume.
const StateBytesMax = 60 << 10

// The annex is a second range of byte addresses of every volume, behind all
// volumes' ends: what is cloned into it lives with the volume (replicated,
// resynchronised, deleted with it) and no initiator can address it. Point in
// time copies (ROD tokens) are kept there. Only OpRead, OpUnmap and OpClone take it.
const (
	AnnexOff   = uint64(lsfs.AnnexStart) * blockSize
	AnnexBytes = uint64(lsfs.AnnexBlocks) * blockSize
)

// RequestOp is what a command asks of a volume.
type RequestOp uint8

const (
	// OpRead fills Data from Off.
	OpRead RequestOp = iota + 1
	// OpWrite stores Data at Off.
	OpWrite
	// OpUnmap makes [Off, Off+Len) read as zeros and drops the mappings of whole 4 KiB blocks.
	OpUnmap
	// OpWriteSame stores Data, one logical block, over all of [Off, Off+Len).
	OpWriteSame
	// OpCompareAndWrite compares the first half of Data with the medium at Off and,
	// when equal, stores the second half, atomically against everything on that range.
	OpCompareAndWrite
	// OpFlush makes every acknowledged write stable on every in-sync replica.
	OpFlush
	// OpOrWrite stores the bitwise OR of Data and the medium at Off, atomically
	// against everything on that range.
	OpOrWrite
	// OpState replaces the ordered state by Data when State names the value in
	// force; otherwise ErrStateMoved. It takes its place in the order of all
	// operations: what was sequenced before it has committed, what comes after it
	// is held against the new value (Request.Recheck). Off and Len are 0.
	OpState
	// OpReadState sets State and Value to the ordered state in force (linearizable).
	// Value is not modified afterwards. Off and Len are 0.
	OpReadState
	// OpExtents fills Extents, up to its capacity, with what is mapped from Off on,
	// inside [Off, Off+Len). It may stop early, never without one extent.
	OpExtents
	// OpClone makes [Off, Off+Len) read as [SourceOff, SourceOff+Len) of volume
	// Source does, by reference; all are multiples of 4096, Len is at most
	// CloneBytesMax. Ranges of one volume may overlap: the result is as if read first.
	// ErrNoClone: not by reference here and now; nothing happened, copy the data.
	OpClone
)

// overlaps says of a clone into volume v whether it writes to a part of its source.
func (r *Request) overlaps(v VolumeID) bool {
	return r.Source == v && r.Off < r.SourceOff+r.Len && r.SourceOff < r.Off+r.Len
}

// AtomicBytesMax bounds a request with Atomic.
const AtomicBytesMax = 1 << 20

// CloneBytesMax bounds one OpClone.
const CloneBytesMax = 64 << 20

// Extent is a run of bytes of a volume, a multiple of 4096 but at the ends of a request.
type Extent struct {
	Bytes  uint64
	Mapped bool // else it reads as zeros and takes no room
}

// Request is one operation on a volume. The device server owns it; from Submit
// until Done it belongs to the volume. It is embedded in a Task, so a request
// costs no allocation.
type Request struct {
	Op   RequestOp
	FUA  bool   // the data is on stable storage of every in-sync replica before Done
	Off  uint64 // bytes, a multiple of 512
	Len  uint64 // bytes, a multiple of 512; for OpRead and OpWrite equal to len(Data)
	Data []byte // stays valid until Done, unless Borrowed
	// Atomic: all of it or nothing, against readers, power loss and failover. OpWrite of
	// whole logical blocks, at most AtomicBytesMax.
	Atomic bool
	// Borrowed: Data is valid only until Submit returns (it lies in a receive
	// buffer). The volume consumes it inside Submit or copies it. Only OpWrite.
	Borrowed bool

	Source    VolumeID // OpClone
	SourceOff uint64   // OpClone: bytes

	// State names the ordered state under which the request was accepted, for
	// OpState the value that Data was made from.
	State StateID
	// Recheck is asked when another state is in force by the time the request is
	// sequenced (or read): it looks at the newest state that Watch has brought, sets
	// State to its name and returns nil, or the error with which the request ends,
	// having had no effect. It must not block; it is called with locks held and may
	// be called more than once. Nil: the request does not depend on the state.
	Recheck func(*Request) error

	// Abandoned is set, at any time and by anybody, when whoever issued the request
	// has given it up: unless it has its number already, it ends with ErrBusy and has
	// no effect. Its initiator may repeat it through another node before it ends
	// here (Z1). Nil: it is never given up.
	Abandoned *atomic.Bool

	// Value is the result of OpReadState.
	Value []byte
	// Extents is the result of OpExtents; the caller gives the capacity.
	Extents []Extent

	// Err is nil or one of the errors below (errors.Is), set before Done.
	Err error
	// Miscompare is the byte offset in the first half of Data of the first
	// difference, with Err == ErrMiscompare.
	Miscompare uint64

	// Bad is the byte offset of the first 4 KiB block that cannot be read, with Err == ErrMedium.
	Bad uint64

	// Done is called exactly once, on any goroutine, possibly before Submit
	// returns. It must not block. Whoever calls Done on a batch of requests calls
	// the flush hook once after the batch (see Volume).
	Done func(*Request)

	// Scratch belongs to the volume while it has the request.
	Scratch any

	drops  uint64 // Volume.drops when the request came in
	served bool   // it came from another node, in
	term   uint64 // this Volume.term
}

type volumeError string

func (e volumeError) Error() string { return string(e) }

// Errors of a Request. The device server translates them to sense data.
const (
	// ErrMiscompare: COMPARE AND WRITE found other data; nothing was written.
	ErrMiscompare = volumeError("compare and write: miscompare")
	// ErrNoSpace: the pool has no room for new data; nothing of the request was written.
	ErrNoSpace = volumeError("no space left in the pool for new data")
	// ErrMedium: unrecoverable read error: no in-sync replica has the block.
	ErrMedium = volumeError("unrecovered read error: no replica holds an intact copy")
	// ErrBusy: the volume has no owner just now or ownership is moving; the command took no effect and may be repeated.
	ErrBusy = volumeError("volume is busy: ownership is moving")
	// ErrUnavailable: this node cannot reach an owner. The session must be dropped so that the initiator takes another path.
	ErrUnavailable = volumeError("volume cannot be served through this node")
	// ErrReserved is RESERVATION CONFLICT: Recheck's answer.
	ErrReserved = volumeError("another initiator has reserved the volume")
	// ErrStateMoved: OpState was made from another value than the one in force.
	ErrStateMoved = volumeError("the ordered state has changed meanwhile")
	// ErrNoClone: the range cannot be cloned by reference here and now.
	ErrNoClone = volumeError("not to be cloned by reference")
	// ErrReadOnly: the volume is write protected.
	ErrReadOnly = volumeError("volume is read only")
	// errMoved: a forwarded request was accepted under another ordered state than the
	// one in force. It had no effect; the node that forwarded it decides anew.
	errMoved = volumeError("the ordered state is another one than the request was accepted under")
	// ErrNotOwner: another node owns the volume; ask there.
	ErrNotOwner = volumeError("another node owns the volume")
	// ErrDeleted: the volume is gone.
	ErrDeleted = volumeError("volume was deleted")
)
