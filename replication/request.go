package replication

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
)

// Request is one operation on a volume. The device server owns it; from Submit
// until Done it belongs to the volume. It is embedded in a Task, so a request
// costs no allocation.
type Request struct {
	Op   RequestOp
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
	// ErrReadOnly: the volume is write protected.
	ErrReadOnly = volumeError("volume is read only")
	// ErrNotOwner: another node owns the volume; ask there.
	ErrNotOwner = volumeError("another node owns the volume")
	// ErrDeleted: the volume is gone.
	ErrDeleted = volumeError("volume was deleted")
)
