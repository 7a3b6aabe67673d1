package device

import (
	"errors"
	"fmt"
	"unsafe"
)

// Align is the unit of everything here: offsets, lengths and, for direct I/O,
// addresses in memory are multiples of it. It is the logical block size of 4Kn
// devices and a multiple of that of all others in use.
const Align = 4096

// Device is a range of stable storage.
//
// All methods are safe for concurrent use. Reads and writes that overlap in time
// and place may see or leave any mixture, at the grain of a sector: the caller
// orders them. Methods block until the system has answered. No method keeps a
// buffer after it returns.
//
// Every error names the path and the offset, and wraps the system's error
// (unix.EIO, unix.ENOSPC ...) or one of this package's.
type Device interface {
	// ReadAt fills p from off. p and off are multiples of Align, p is aligned to it
	// in memory, and the range lies in the device, else ErrRange. A part that was
	// never written, or was discarded, reads as anything. On an error p is undefined.
	ReadAt(p []byte, off int64) error
	// WriteAt writes p at off, under the same conditions. It is durable only after a
	// later Flush returned nil. After an error any sectors of it may be written.
	WriteAt(p []byte, off int64) error
	// Flush puts on stable storage what WriteAt returned for before Flush was
	// called. Its first failure poisons the device: see ErrPoisoned.
	Flush() error
	// Discard says that the contents of a range are not needed any more. It is a
	// hint: the range reads as anything afterwards, and nil is returned where the
	// device has no such function. It may not be used to make zeros.
	Discard(off, n int64) error
	// Size is the number of usable bytes, a multiple of Align. It does not change.
	Size() int64
	// Path is the name that the device was opened by.
	Path() string
	// Direct says whether I/O goes past the page cache.
	Direct() bool
	// Close waits for running operations and gives the device up. It does not
	// flush. Operations after it return ErrClosed; a second Close returns nil.
	Close() error
}

var (
	// ErrInUse is returned by Open when another process, or this one, has the device.
	ErrInUse = errors.New("device is in use")
	// ErrNotUsable is returned by Open for what is neither a block device nor a regular
	// file, and for a device smaller than Align.
	ErrNotUsable = errors.New("not a usable device")
	// ErrRange is a request that is not aligned or does not lie in the device: the
	// caller's mistake, or an address made of corrupt metadata.
	ErrRange = errors.New("request unaligned or outside of the device")
	// ErrPoisoned is returned by writes and flushes after a failed flush.
	ErrPoisoned = errors.New("device is unusable after a failed flush")
	// ErrReadOnly is returned by writes to a device that was opened read only.
	ErrReadOnly = errors.New("device is open for reading only")
	// ErrClosed is returned by every operation after Close.
	ErrClosed = errors.New("device is closed")
)

// Error is an operation on a device that failed.
type Error struct {
	Op   string // "read", "write", "flush", "discard"
	Path string
	Off  int64 // first byte of the request
	Len  int64
	Err  error
}

func (e *Error) Error() string {
	if e.Op == "flush" {
		return fmt.Sprintf("flush %s: %v", e.Path, e.Err)
	}
	return fmt.Sprintf("%s %s, %d bytes at %d: %v", e.Op, e.Path, e.Len, e.Off, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// CheckRange returns ErrRange unless p and off are a valid request to a device
// of the given size. Implementations of Device share it, so that a test on a
// double, or on a file system without direct I/O, finds an unaligned request too.
func CheckRange(p []byte, off, size int64) error {
	n := int64(len(p))
	if n == 0 || (n|off)%Align != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(p)))%Align != 0 ||
		off < 0 || n > size || off > size-n {
		return ErrRange
	}
	return nil
}

// CheckDiscard is CheckRange for Discard, which has no buffer.
func CheckDiscard(off, n, size int64) error {
	if n <= 0 || (n|off)%Align != 0 || off < 0 || n > size || off > size-n {
		return ErrRange
	}
	return nil
}
