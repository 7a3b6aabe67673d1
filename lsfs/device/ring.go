package device

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ringEntries is how many reads the ring holds at once; what comes beyond it goes
// to the pool's goroutines. Flash is at its full rate long before.
const ringEntries = 256

// The part of Linux's io_uring interface that reads need. All numbers are the
// kernel's (include/uapi/linux/io_uring.h).
const (
	ringOpRead        = 22 // since Linux 5.6
	ringFeatOneMap    = 1 << 0
	ringFeatNoDrop    = 1 << 1
	ringOffSubmission = 0
	ringOffEntries    = 0x10000000
	ringRegisterEvent = 4
	ringRegisterProbe = 8
)

type ringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	_                                                    [3]uint32
	sq                                                   struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

type ringEntry struct {
	op, flags uint8
	ioprio    uint16
	fd        int32
	off, addr uint64
	len, rw   uint32
	user      uint64
	_, _      uint16
	_         int32
	_, _      uint64
}

type ringCompletion struct {
	user  uint64
	res   int32
	flags uint32
}

// ring reads by io_uring: the reader's goroutine hands the request to the kernel
// and parks, and no thread blocks. With reads by threads each one takes its
// processor along until the runtime notices, which on few processors costs more
// than the read. Completions come through an eventfd and the runtime's poller to
// one goroutine, which ends all that are there.
//
// A completion that is not the whole read, for whatever reason, is repeated by
// ReadAt on a goroutine of the pool: that is where errors are made.
type ring struct {
	pool  *ReadPool
	fd    int
	event *os.File
	map1  []byte // both queues
	map2  []byte // submission entries

	sqTail, cqHead, cqTail *uint32 // shared with the kernel
	sqMask, cqMask         uint32
	entries                []ringEntry
	order                  []uint32
	completions            []ringCompletion

	flying atomic.Int32  // reads that the kernel has
	single atomic.Bool   // a read is performed by pread
	ended  chan struct{} // closed when the goroutine of completions is gone

	mu         sync.Mutex
	still      sync.Cond // nothing is in flight
	reads      []*Read   // by the number that the kernel is given
	free       []uint32
	pending    uint32 // in the queue, not submitted
	submitting bool
	broken     bool // takes no more
	completes  bool // the goroutine of completions was started, by the first read
}

// ringFile is a device whose reads the kernel can be given directly.
type ringFile interface {
	Device
	// beginRead checks a request and keeps the descriptor open until endRead, which is
	// told when it began and whether it was performed. Neither waits.
	beginRead(p []byte, off int64) (fd int, ok bool)
	endRead(begun time.Time, ok bool)
}

// newRing fails where the kernel has no io_uring or forbids it; then there is none.
func newRing(pool *ReadPool) (_ *ring, err error) {
	var p ringParams
	fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, ringEntries, uintptr(unsafe.Pointer(&p)), 0)
	if e != 0 {
		return nil, fmt.Errorf("io_uring: %w", e)
	}
	r := &ring{pool: pool, fd: int(fd), ended: make(chan struct{})}
	r.still.L = &r.mu
	defer func() {
		if err != nil {
			r.unmap()
		}
	}()
	if p.features&ringFeatOneMap == 0 || p.features&ringFeatNoDrop == 0 || !r.canRead() {
		return nil, errors.New("io_uring: the kernel's is too old")
	}
	size := max(int(p.sq.array+p.sqEntries*4), int(p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(ringCompletion{}))))
	if r.map1, err = unix.Mmap(r.fd, ringOffSubmission, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("io_uring: %w", err)
	}
	size = int(p.sqEntries) * int(unsafe.Sizeof(ringEntry{}))
	if r.map2, err = unix.Mmap(r.fd, ringOffEntries, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("io_uring: %w", err)
	}
	at := func(off uint32) unsafe.Pointer { return unsafe.Pointer(&r.map1[off]) }
	r.sqTail, r.cqHead, r.cqTail = (*uint32)(at(p.sq.tail)), (*uint32)(at(p.cq.head)), (*uint32)(at(p.cq.tail))
	r.sqMask, r.cqMask = *(*uint32)(at(p.sq.mask)), *(*uint32)(at(p.cq.mask))
	r.order = unsafe.Slice((*uint32)(at(p.sq.array)), p.sqEntries)
	r.completions = unsafe.Slice((*ringCompletion)(at(p.cq.cqes)), p.cqEntries)
	r.entries = unsafe.Slice((*ringEntry)(unsafe.Pointer(&r.map2[0])), p.sqEntries)
	r.reads = make([]*Read, p.sqEntries)
	for i := range p.sqEntries {
		r.free = append(r.free, i)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("io_uring: eventfd: %w", err)
	}
	r.event = os.NewFile(uintptr(event), "io_uring")
	number := int32(event)
	if _, _, e := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), ringRegisterEvent, uintptr(unsafe.Pointer(&number)), 1, 0, 0); e != 0 {
		return nil, fmt.Errorf("io_uring: register eventfd: %w", e)
	}
	return r, nil
}

// canRead asks the kernel whether it knows the one operation that is used.
func (r *ring) canRead() bool {
	const (
		header    = 16
		supported = 1
	)
	var probe [header + 256*8]byte // header, then per operation: number, reserved, flags u16, reserved u32
	_, _, e := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), ringRegisterProbe, uintptr(unsafe.Pointer(&probe)), 256, 0, 0)
	return e == 0 && probe[0] >= ringOpRead && probe[header+ringOpRead*8+2]&supported != 0
}

// alone takes the one place for a read on the caller's goroutine, which is faster
// than the ring while no other read is in flight. It is followed by notAlone.
func (r *ring) alone() bool { return r.flying.Load() == 0 && r.single.CompareAndSwap(false, true) }

func (r *ring) notAlone() { r.single.Store(false) }

// take gives reads to the kernel, those that it can take; the others are returned.
func (r *ring) take(reads []*Read) (left []*Read) {
	left = reads[:0]
	r.mu.Lock()
	for _, q := range reads {
		f, ok := q.Device.(ringFile)
		if !ok || len(r.free) == 0 || r.broken {
			left = append(left, q)
			continue
		}
		fd, ok := f.beginRead(q.P, q.Off)
		if !ok {
			left = append(left, q)
			continue
		}
		q.begun = time.Now()
		n := r.free[len(r.free)-1]
		r.free = r.free[:len(r.free)-1]
		r.reads[n] = q
		r.flying.Add(1)
		tail := *r.sqTail // only this side writes it
		i := tail & r.sqMask
		r.entries[i] = ringEntry{op: ringOpRead, fd: int32(fd), off: uint64(q.Off),
			addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(q.P)))), len: uint32(len(q.P)), user: uint64(n)}
		r.order[i] = i
		atomic.StoreUint32(r.sqTail, tail+1)
		r.pending++
	}
	if r.pending == 0 || r.submitting {
		// Whoever is submitting goes on with what has come meanwhile.
		r.mu.Unlock()
		return left
	}
	r.submitting = true
	if !r.completes {
		r.completes = true
		go r.complete()
	}
	if r.flying.Load() > 1 {
		// Others that are about to read join this call: one for many.
		r.mu.Unlock()
		runtime.Gosched()
		r.mu.Lock()
	}
	for r.pending > 0 {
		n := r.pending
		r.mu.Unlock()
		done, _, e := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), 0, 0, 0, 0)
		r.mu.Lock()
		switch e {
		case 0:
			r.pending -= uint32(done)
		case unix.EINTR:
		case unix.EAGAIN, unix.EBUSY:
			// The kernel is short of memory, or of room for completions: those that come give it back.
			r.mu.Unlock()
			runtime.Gosched()
			r.mu.Lock()
		default:
			// It should not happen. The kernel has not looked at the last ones: take them back.
			r.broken = true
			tail := *r.sqTail
			for i := tail - r.pending; i != tail; i++ {
				left = append(left, r.endLocked(uint32(r.entries[i&r.sqMask].user), -1))
			}
			atomic.StoreUint32(r.sqTail, tail-r.pending)
			r.pending = 0
		}
	}
	r.submitting = false
	r.mu.Unlock()
	return left
}

// endLocked ends a read by the number of bytes that the kernel has read, or its error.
func (r *ring) endLocked(n uint32, res int32) *Read {
	q := r.reads[n]
	r.reads[n] = nil
	r.free = append(r.free, n)
	q.Err = nil
	if int(res) != len(q.P) {
		q.Err = errAgain
	}
	q.Device.(ringFile).endRead(q.begun, q.Err == nil)
	if r.flying.Add(-1) == 0 {
		r.still.Broadcast()
	}
	return q
}

// complete ends reads until the ring is closed.
func (r *ring) complete() {
	defer close(r.ended)
	var count [8]byte
	var done [64]*Read
	for {
		head := *r.cqHead // only this side writes it
		tail := atomic.LoadUint32(r.cqTail)
		if head == tail {
			if _, err := r.event.Read(count[:]); err != nil {
				return // closed
			}
			continue
		}
		n := 0
		r.mu.Lock()
		for ; head != tail && n < len(done); head++ {
			c := r.completions[head&r.cqMask]
			done[n] = r.endLocked(uint32(c.user), c.res)
			n++
		}
		r.mu.Unlock()
		atomic.StoreUint32(r.cqHead, head)
		for i, q := range done[:n] {
			done[i] = nil
			if q.Err != nil {
				r.pool.enqueue([]*Read{q})
			} else {
				q.Done(q)
			}
		}
	}
}

// errAgain marks a read that the kernel did not perform as a whole.
var errAgain = errors.New("again")

// close waits for what is in flight.
func (r *ring) close() {
	r.mu.Lock()
	r.broken = true
	for r.flying.Load() > 0 {
		r.still.Wait()
	}
	if !r.completes {
		close(r.ended)
	}
	r.mu.Unlock()
	_ = r.event.Close()
	<-r.ended
	r.event = nil
	r.unmap()
}

func (r *ring) unmap() {
	if r.event != nil {
		_ = r.event.Close()
	}
	if r.map1 != nil {
		_ = unix.Munmap(r.map1)
	}
	if r.map2 != nil {
		_ = unix.Munmap(r.map2)
	}
	_ = unix.Close(r.fd)
}

// beginRead implements ringFile. The kernel is given direct reads only: others
// it may perform on the caller's time.
func (f *file) beginRead(p []byte, off int64) (fd int, ok bool) {
	// Close may be waiting for reads that only the caller, who must not wait, can end.
	if !f.direct || CheckRange(p, off, f.size) != nil || !f.life.TryRLock() {
		return 0, false
	}
	if f.fd < 0 {
		f.life.RUnlock()
		return 0, false
	}
	return f.fd, true
}

func (f *file) endRead(time.Time, bool) { f.life.RUnlock() }

// beginRead implements ringFile for a device that does.
func (m *Metered) beginRead(p []byte, off int64) (fd int, ok bool) {
	f, ok := m.Device.(ringFile)
	if !ok {
		return 0, false
	}
	return f.beginRead(p, off)
}

// endRead counts a read that was performed; any other is repeated, and counts then.
func (m *Metered) endRead(begun time.Time, ok bool) {
	m.Device.(ringFile).endRead(begun, ok)
	if ok {
		_ = m.reads.observe(begun, 0, nil)
	}
}
