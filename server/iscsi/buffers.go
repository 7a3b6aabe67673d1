package iscsi

import (
	"math/bits"
	"sync"
	"unsafe"
)

// Data buffers come in powers of two. The largest holds the longest transfer
// that the device server admits.
const (
	minBufferShift = 12 // 4 KiB, also the alignment
	maxBufferShift = 23 // 8 MiB
	bufferClasses  = maxBufferShift - minBufferShift + 1
)

// bufferPool lends the memory for data in transfer and bounds it (BOUNDED). A
// buffer is taken for the whole transfer at once, so nobody waits while holding
// a part. Who finds no memory waits in line; a line's head that fits is served
// by the target's granter goroutine. Nobody holds pool.mu and calls out.
type bufferPool struct {
	limit   int64 // bytes lent at most
	share   int64 // bytes for one account at most
	granted chan struct{}

	mu    sync.Mutex
	lent  int64
	idle  int64 // bytes in free
	free  [bufferClasses][][]byte
	first *waiter
	last  *waiter
}

// account is what one connection has borrowed. The pool's mutex guards it.
type account struct{ lent int64 }

// lease is one buffer on loan; the zero value is none. It must be released
// exactly once.
type lease struct {
	buf []byte // whole buffer, 4 KiB aligned
	who *account
}

// waiter is a place in the line for memory. It is part of a task.
type waiter struct {
	task       *task
	who        *account
	size       int64
	got        lease
	queued     bool
	prev, next *waiter
}

func newBufferPool(limit int64) *bufferPool {
	return &bufferPool{
		limit:   max(limit, 1<<maxBufferShift),
		share:   max(limit/4, 1<<maxBufferShift),
		granted: make(chan struct{}, 1),
	}
}

// bufferClass returns the class of the smallest buffer that holds n bytes.
func bufferClass(n uint32) int {
	return max(bits.Len32(max(n, 1)-1), minBufferShift) - minBufferShift
}

// fits reports whether size more bytes may be lent to who.
func (p *bufferPool) fits(who *account, size int64) bool {
	return p.lent+size <= p.limit && who.lent+size <= p.share
}

// try lends a buffer of n bytes (1 to 8 MiB) or returns false. It does not jump
// the line.
func (p *bufferPool) try(who *account, n uint32) (lease, bool) {
	class := bufferClass(n)
	if class >= bufferClasses {
		return lease{}, false
	}
	size := int64(1) << (class + minBufferShift)
	p.mu.Lock()
	if p.first != nil || !p.fits(who, size) {
		p.mu.Unlock()
		return lease{}, false
	}
	buf := p.takeLocked(who, class, size)
	p.mu.Unlock()
	return lease{allocated(buf, size), who}, true
}

// takeLocked accounts for a buffer and returns a free one, or nil when one has
// to be allocated.
func (p *bufferPool) takeLocked(who *account, class int, size int64) []byte {
	p.lent += size
	who.lent += size
	stack := p.free[class]
	if len(stack) == 0 {
		return nil
	}
	buf := stack[len(stack)-1]
	p.free[class] = stack[:len(stack)-1]
	p.idle -= size
	return buf
}

// allocated returns buf or, for nil, new memory of size bytes.
func allocated(buf []byte, size int64) []byte {
	if buf != nil {
		return buf
	}
	buf = make([]byte, size)
	const mask = 1<<minBufferShift - 1
	if off := uintptr(unsafe.Pointer(&buf[0])) & mask; off != 0 { // the allocator happens to align; this does not rely on it
		buf = make([]byte, size+mask)
		off = -uintptr(unsafe.Pointer(&buf[0])) & mask
		buf = buf[off : int64(off)+size]
	}
	return buf[:size:size]
}

// wait puts a task in line for n bytes, or lends them at once.
func (p *bufferPool) wait(w *waiter, t *task, who *account, n uint32) (lease, bool) {
	if l, ok := p.try(who, n); ok {
		return l, true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	*w = waiter{task: t, who: who, size: 1 << (bufferClass(n) + minBufferShift), queued: true, prev: p.last}
	if p.last == nil {
		p.first = w
	} else {
		p.last.next = w
	}
	p.last = w
	p.signalLocked()
	return lease{}, false
}

// cancel takes a waiter out of the line. False: it is being served just now.
func (p *bufferPool) cancel(w *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !w.queued {
		return false
	}
	p.unlinkLocked(w)
	p.signalLocked() // whoever stood behind may fit
	return true
}

func (p *bufferPool) unlinkLocked(w *waiter) {
	if w.prev == nil {
		p.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		p.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.prev, w.next, w.queued = nil, nil, false
}

// release gives a buffer back.
func (p *bufferPool) release(l lease) {
	if l.buf == nil {
		return
	}
	size := int64(len(l.buf))
	class := bits.Len64(uint64(size)) - 1 - minBufferShift
	p.mu.Lock()
	p.lent -= size
	l.who.lent -= size
	if p.idle+size <= p.limit/4 { // the rest goes back to the collector
		p.free[class] = append(p.free[class], l.buf)
		p.idle += size
	}
	if p.first != nil {
		p.signalLocked()
	}
	p.mu.Unlock()
}

func (p *bufferPool) signalLocked() {
	select {
	case p.granted <- struct{}{}:
	default:
	}
}

// serve takes the first in line whose wish fits. Those who have used up their
// own share are passed over; for others the line stops, so that large transfers
// are not starved by small ones.
func (p *bufferPool) serve() (*waiter, bool) {
	p.mu.Lock()
	var w *waiter
	for w = p.first; w != nil; w = w.next {
		if p.lent+w.size > p.limit {
			w = nil
			break
		}
		if p.fits(w.who, w.size) {
			break
		}
	}
	if w == nil {
		p.mu.Unlock()
		return nil, false
	}
	p.unlinkLocked(w)
	class := bits.Len64(uint64(w.size)) - 1 - minBufferShift
	buf := p.takeLocked(w.who, class, w.size)
	p.mu.Unlock()
	w.got = lease{allocated(buf, w.size), w.who}
	return w, true
}

// inUse returns the bytes on loan.
func (p *bufferPool) inUse() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lent
}
