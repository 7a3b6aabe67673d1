package device

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Options of Open.
type Options struct {
	// ReadOnly opens for reading: for checks of a pool that nobody serves. Several
	// readers may share a file, none together with a writer.
	ReadOnly bool
}

// file is a Device on a block device or a regular file.
type file struct {
	path     string
	size     int64
	direct   bool
	readOnly bool
	block    bool
	// reserved: every byte of the regular file had its place on the file system when
	// it was opened. A discard would give the place away, and the log could then
	// fail for want of it later, so it does nothing.
	reserved bool

	poisoned atomic.Bool

	// life is held for reading by every operation and for writing by Close.
	life sync.RWMutex
	fd   int // -1 after Close
}

// Open opens a block device or a regular file for aligned I/O, past the page
// cache where the file system allows it (Device.Direct tells).
//
// The device is this process's alone until Close: a block device is opened
// exclusively, which fails while it is mounted, part of another storage stack or
// open here, and a regular file is locked. ErrInUse says that somebody else has it.
// A regular file is not grown and not created: see Create.
func Open(path string, o Options) (Device, error) {
	f, err := open(path, o)
	if err != nil {
		return nil, fmt.Errorf("open device %s: %w", path, err)
	}
	return cached(f), nil
}

// cached puts a volatile write cache, or delays, before a device where a test asks for them.
var cached = func(d Device) Device { return d }

func open(path string, o Options) (_ *file, err error) {
	flags := unix.O_RDWR
	lock := unix.LOCK_EX
	if o.ReadOnly {
		flags, lock = unix.O_RDONLY, unix.LOCK_SH
	}
	// The kind is needed before the open: O_EXCL means "alone" for block devices only,
	// and the open of a pipe or of a tape drive does things of its own.
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, err
	}
	f := &file{path: path, readOnly: o.ReadOnly, fd: -1}
	kind := st.Mode & unix.S_IFMT
	switch kind {
	case unix.S_IFBLK:
		f.block = true
		flags |= unix.O_EXCL
	case unix.S_IFREG:
	default:
		return nil, fmt.Errorf("%w: neither a block device nor a regular file", ErrNotUsable)
	}
	if f.fd, err = openFD(path, flags); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unix.Close(f.fd)
		}
	}()
	// Between the stat and the open the name may have come to mean something else.
	if err := unix.Fstat(f.fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != kind {
		return nil, fmt.Errorf("%w: it changed while it was opened", ErrNotUsable)
	}
	// A block device is alone by O_EXCL. A lock on top would clash with udev, which
	// locks block devices for the moments in which it probes them.
	if !f.block {
		if err := unix.Flock(f.fd, lock|unix.LOCK_NB); err != nil {
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, ErrInUse
			}
			return nil, fmt.Errorf("lock: %w", err)
		}
	}
	if f.size, err = sizeOf(f.fd, &st); err != nil {
		return nil, err
	}
	if f.size < Align {
		return nil, fmt.Errorf("%w: only %d bytes", ErrNotUsable, f.size)
	}
	f.reserved = !f.block && st.Blocks*512 >= f.size
	f.direct = setDirect(f.fd)
	return f, nil
}

func openFD(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EBUSY):
			return -1, ErrInUse
		}
		return fd, err
	}
}

func sizeOf(fd int, st *unix.Stat_t) (int64, error) {
	size := st.Size
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		var n uint64
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n))); e != 0 {
			return 0, fmt.Errorf("size of block device: %w", e)
		}
		size = int64(n)
	}
	return size &^ (Align - 1), nil
}

// setDirect switches to direct I/O and says whether that works. The flag alone
// proves nothing: some file systems take it and refuse the I/O, so one block is
// read; those in memory take it and have nothing else than the page cache.
func setDirect(fd int) bool {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC) {
		return false
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return false
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT); err != nil {
		return false
	}
	probe := AlignedBuffer(Align)
	defer FreeAligned(probe)
	for {
		_, err = unix.Pread(fd, probe, 0)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		// If the flag cannot be taken off again the next read fails, loudly.
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
		return false
	}
	return true // an EIO of this block is for whoever needs it
}

func (f *file) Size() int64  { return f.size }
func (f *file) Path() string { return f.path }
func (f *file) Direct() bool { return f.direct }

// fail is kept out of the callers, so that they allocate on the way of an error only.
func (f *file) fail(op string, off, n int64, err error) error {
	return &Error{Op: op, Path: f.path, Off: off, Len: n, Err: err}
}

func (f *file) ReadAt(p []byte, off int64) error {
	if err := CheckRange(p, off, f.size); err != nil {
		return f.fail("read", off, int64(len(p)), err)
	}
	f.life.RLock()
	defer f.life.RUnlock()
	if f.fd < 0 {
		return f.fail("read", off, int64(len(p)), ErrClosed)
	}
	for done := 0; done < len(p); {
		n, err := unix.Pread(f.fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err == nil {
			n, err = f.progress(n, len(p)-done)
		}
		if err != nil {
			return f.fail("read", off, int64(len(p)), err)
		}
		done += n
	}
	return nil
}

// progress says how much of a count of the system can be built on: the next direct
// request has to start aligned. No progress means that the file was cut short, or
// that the device takes no more without saying why.
func (f *file) progress(n, left int) (int, error) {
	if f.direct && n < left {
		n &^= Align - 1
	}
	if n <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) error {
	if err := CheckRange(p, off, f.size); err != nil {
		return f.fail("write", off, int64(len(p)), err)
	}
	f.life.RLock()
	defer f.life.RUnlock()
	if err := f.writable(); err != nil {
		return f.fail("write", off, int64(len(p)), err)
	}
	for done := 0; done < len(p); {
		n, err := unix.Pwrite(f.fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err == nil {
			n, err = f.progress(n, len(p)-done)
		}
		if err != nil {
			return f.fail("write", off, int64(len(p)), err)
		}
		done += n
	}
	return nil
}

func (f *file) writable() error {
	switch {
	case f.fd < 0:
		return ErrClosed
	case f.readOnly:
		return ErrReadOnly
	case f.poisoned.Load():
		return ErrPoisoned
	}
	return nil
}

func (f *file) Flush() error {
	f.life.RLock()
	defer f.life.RUnlock()
	if err := f.writable(); err != nil {
		return f.fail("flush", 0, 0, err)
	}
	for {
		err := unix.Fdatasync(f.fd)
		switch err {
		case nil:
			// A flush of another goroutine that failed meanwhile has taken the system's
			// only report of the error with it: this one's success may be the lie.
			if f.poisoned.Load() {
				return f.fail("flush", 0, 0, ErrPoisoned)
			}
			return nil
		case unix.EINTR:
		default:
			f.poisoned.Store(true)
			return f.fail("flush", 0, 0, fmt.Errorf("%w: %w", ErrPoisoned, err))
		}
	}
}

func (f *file) Discard(off, n int64) error {
	if err := CheckDiscard(off, n, f.size); err != nil {
		return f.fail("discard", off, n, err)
	}
	f.life.RLock()
	defer f.life.RUnlock()
	if err := f.writable(); err != nil {
		return f.fail("discard", off, n, err)
	}
	if f.reserved {
		return nil
	}
	for {
		var err error
		if f.block {
			r := [2]uint64{uint64(off), uint64(n)}
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(f.fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r))); e != 0 {
				err = e
			}
		} else {
			err = unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		}
		switch err {
		case unix.EINTR:
		case nil, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOTTY, unix.ENOSYS:
			return nil
		default:
			return f.fail("discard", off, n, err)
		}
	}
}

func (f *file) Close() error {
	f.life.Lock()
	defer f.life.Unlock()
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	if err := unix.Close(fd); err != nil && err != unix.EINTR {
		return fmt.Errorf("close device %s: %w", f.path, err)
	}
	return nil
}

// Create makes a regular file of size bytes (rounded down to a multiple of Align)
// to be opened as a device, sparse: it takes room on the file system as it is
// written, so that a full file system shows as ENOSPC of a write. The file must
// not exist. It and its name are on stable storage on return.
func Create(path string, size int64) error { return create(path, size, false) }

// Preallocate is Create with all room taken at once; a file system without that
// function answers unix.EOPNOTSUPP.
func Preallocate(path string, size int64) error { return create(path, size, true) }

func create(path string, size int64, reserve bool) (err error) {
	size &^= Align - 1
	if size < Align {
		return fmt.Errorf("create device %s: %w: %d bytes", path, ErrNotUsable, size)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create device: %w", err)
	}
	defer func() {
		if e := f.Close(); err == nil && e != nil {
			err = fmt.Errorf("create device: %w", e)
		}
		if err != nil {
			os.Remove(path) // half a device must not be taken for one
		}
	}()
	if reserve {
		for {
			err = unix.Fallocate(int(f.Fd()), 0, 0, size)
			if err != unix.EINTR {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("create device %s: reserve %d bytes: %w", path, size, err)
		}
	} else if err := f.Truncate(size); err != nil {
		return fmt.Errorf("create device: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("create device: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("create device: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // no such function there
		return fmt.Errorf("create device: sync directory: %w", err)
	}
	return nil
}

// Holes says whether a part of [off, off+n) has no written place in the file.
func (f *file) Holes(off, n int64) bool {
	f.life.RLock()
	defer f.life.RUnlock()
	if f.block || f.fd < 0 {
		return false
	}
	at, err := unix.Seek(f.fd, off, unix.SEEK_HOLE)
	return err == nil && at < off+n
}
