package lsfs

import (
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

var (
	// ErrNoSpace: the pool has no room for new data. Nothing of the operation was
	// stored. Reads, unmaps, deletes and writes that free as much as they take go on.
	ErrNoSpace = errors.New("no space left in the pool for new data")
	// ErrPoisoned: a write or flush of a device failed, so nobody knows what is on
	// it. Every later operation and read fails with it until the store is opened anew.
	ErrPoisoned = errors.New("the store is stopped: a device write or flush failed")
	// ErrGap: the operation's sequence number is not the next one of its volume
	// (W3). It was not stored.
	ErrGap = errors.New("operation is out of sequence")
	// ErrNoVolume: the volume does not exist here, or is being deleted.
	ErrNoVolume = errors.New("no such volume in this store")
	// ErrExists: a volume of that id exists already.
	ErrExists = errors.New("the volume exists already")
	// ErrRange: the range reaches beyond the end of the volume.
	ErrRange = errors.New("range is outside of the volume")
	// ErrInvalidOp: an operation that contradicts itself: wrong lengths, a missing
	// pin, more data than OpBytesMax. It was not stored.
	ErrInvalidOp = errors.New("invalid operation")
	// ErrReferences: a block of the range has as many references as a block can have.
	// The clone was not stored; the range can still be read and written.
	ErrReferences = errors.New("a block has no room for another reference")
	// ErrSnapshots: the pool has as many snapshots as it can have (SnapshotsMax).
	ErrSnapshots = errors.New("the pool has no room for another snapshot")
	// ErrClosed: the store is closed or closing.
	ErrClosed = errors.New("the store is closed")
	// ErrInUse: Format found something on a device.
	ErrInUse = errors.New("device is not empty")
	// ErrNotFound: no stored block has the fingerprint.
	ErrNotFound = errors.New("no block with that fingerprint")
)

// CorruptError says which bytes on a device are not what they must be. It is
// reported as an event where it is found, and the caller repairs it from
// another replica when the bytes belong to a block (Volume.Repair).
type CorruptError struct {
	Device      string // path
	Segment     uint32
	Offset      uint32 // bytes in the segment
	BID         BID    // zero when the bytes are not a block
	Volume      VolumeID
	Block       BlockNo
	Fingerprint dedup.Fingerprint
	Expected    uint32 // CRC32C
	Found       uint32
	What        string // "block", "page", "commit", "root"
	Err         error  // the device's or decoder's error, if that was the sign
}

func (e *CorruptError) Error() string {
	s := fmt.Sprintf("corrupt %s on %s segment %d offset %d: checksum %08x, expected %08x", e.What, e.Device, e.Segment, e.Offset, e.Found, e.Expected)
	if e.BID != 0 {
		s += fmt.Sprintf(" (bid %d, volume %d block %d)", e.BID, e.Volume, e.Block)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *CorruptError) Unwrap() error { return e.Err }

func (s *Store) corrupt(what string, addr format.Addr, expected, found uint32, err error) *CorruptError {
	return &CorruptError{
		Device: s.devicePath(addr.Segment()), Segment: addr.Segment(), Offset: addr.Offset(),
		Expected: expected, Found: found, What: what, Err: err,
	}
}

// invariant stops the process on a bug of our own: a stopped node is
// recoverable, a wrong block is not.
func invariant(name, format string, args ...any) {
	panic("lsfs: " + name + ": " + fmt.Sprintf(format, args...))
}
