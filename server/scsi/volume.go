package scsi

// Op is what a command asks of a volume.
type Op uint8

const (
	// OpRead fills Data from Off.
	OpRead Op = iota + 1
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
)

// Request is one operation on a volume. The device server owns it; from Submit
// until Done it belongs to the volume. It is embedded in a Task, so a request
// costs no allocation.
type Request struct {
	Op   Op
	FUA  bool
	Off  uint64 // bytes, a multiple of 512
	Len  uint64 // bytes, a multiple of 512; for OpRead and OpWrite equal to len(Data)
	Data []byte // stays valid until Done, unless Borrowed
	// Borrowed: Data is valid only until Submit returns (it lies in a receive
	// buffer). The volume consumes it inside Submit or copies it. Only OpWrite.
	Borrowed bool

	// Err is nil or one of the errors below (errors.Is), set before Done.
	Err error
	// Miscompare is the byte offset in the first half of Data of the first
	// difference, with Err == ErrMiscompare.
	Miscompare uint64

	// Done is called exactly once, on any goroutine, possibly before Submit
	// returns. It must not block. Whoever calls Done on a batch of requests calls
	// the flush hook once after the batch (see Volume).
	Done func(*Request)

	// Scratch belongs to the volume while it has the request.
	Scratch any
}

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
	// SizeBytes is the current capacity, a multiple of 4096.
	SizeBytes() uint64
}

// Backend is the node below the volumes.
type Backend interface {
	// Kick starts what Submit queued: the caller has no more commands at hand.
	// It may do I/O on the calling goroutine when nothing else is in flight.
	Kick()
}

type volumeError string

func (e volumeError) Error() string { return string(e) }

// Errors of a Request. The device server translates them in sense.go.
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
	// ErrReadOnly: the volume is write protected.
	ErrReadOnly = volumeError("volume is read only")
	// ErrDeleted: the volume is gone.
	ErrDeleted = volumeError("volume was deleted")
)

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
