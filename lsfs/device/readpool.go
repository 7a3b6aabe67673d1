package device

import (
	"sync"
	"time"
)

// Read is one read that somebody else's goroutine performs. The caller owns the
// memory, sets the first fields, submits it, and must leave it alone until Done.
type Read struct {
	Device Device
	P      []byte // as for Device.ReadAt
	Off    int64
	// Done is called once, on a goroutine of the pool, with Err set. It may submit
	// further reads and may reuse r; it should not block, for it holds up other reads.
	Done func(r *Read)
	Err  error
	// Ctx belongs to the caller.
	Ctx any

	next  *Read
	begun time.Time
}

// ReadPool performs reads: by io_uring where the kernel has it and the device is a
// file or block device opened for direct I/O, else, and for what the ring does not
// take, by a bounded number of goroutines that pread. Submit neither blocks nor
// allocates: the queue is a list through the callers' Reads, and so as long as
// what callers have.
type ReadPool struct {
	workers int
	ring    *ring // nil: there is none
	wg      sync.WaitGroup

	mu      sync.Mutex
	wake    sync.Cond // for idle workers: the queue is not empty, or closed
	first   *Read
	last    *Read
	idle    int // workers that wait
	started int
	closed  bool
}

// DefaultReaders is the number of readers that a pool has unless told otherwise:
// flash is near its full rate at 16 (39 thousand of 54 thousand reads a second at
// depth 32), and each one more is a thread.
const DefaultReaders = 16

// NewReadPool makes a pool of at most the given number of readers (0 for
// DefaultReaders), which are started as reads come, and a ring if there can be one.
func NewReadPool(readers int) *ReadPool {
	if readers <= 0 {
		readers = DefaultReaders
	}
	p := &ReadPool{workers: readers}
	p.wake.L = &p.mu
	p.ring, _ = newRing(p) // without it everything works, more slowly at depth
	return p
}

// Ring says whether reads go through io_uring.
func (p *ReadPool) Ring() bool { return p.ring != nil }

// Submit starts reads, and uses the slice for itself. After Close they are Done
// with ErrClosed, on this goroutine.
func (p *ReadPool) Submit(reads ...*Read) {
	if p.ring != nil {
		reads = p.ring.take(reads)
	}
	p.enqueue(reads)
}

// enqueue gives reads to the goroutines.
func (p *ReadPool) enqueue(reads []*Read) {
	if len(reads) == 0 {
		return
	}
	for i, r := range reads {
		r.Err = nil
		r.next = nil
		if i > 0 {
			reads[i-1].next = r
		}
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		for _, r := range reads {
			r.next = nil
			r.Err = ErrClosed
			r.Done(r)
		}
		return
	}
	if p.last == nil {
		p.first = reads[0]
	} else {
		p.last.next = reads[0]
	}
	p.last = reads[len(reads)-1]
	wake := min(len(reads), p.idle)
	start := min(len(reads)-wake, p.workers-p.started)
	p.idle -= wake
	p.started += start
	p.wg.Add(start)
	p.mu.Unlock()
	for range wake {
		p.wake.Signal()
	}
	for range start {
		go p.work()
	}
}

func (p *ReadPool) work() {
	defer p.wg.Done()
	p.mu.Lock()
	for {
		for p.first == nil {
			if p.closed {
				p.mu.Unlock()
				return
			}
			p.idle++
			p.wake.Wait() // whoever signals takes this worker off idle
		}
		r := p.first
		if p.first = r.next; p.first == nil {
			p.last = nil
		}
		p.mu.Unlock()
		r.next = nil
		r.Err = r.Device.ReadAt(r.P, r.Off)
		r.Done(r)
		p.mu.Lock()
	}
}

// ReadBatch performs reads and returns when all are done. A single one, while no
// other is in flight, is performed on the calling goroutine; without a ring always
// one is. It uses Done and Ctx of the reads for itself. Each read's Err is set, and
// the first one that is not nil is returned. It must not be called by a Done.
func (p *ReadPool) ReadBatch(reads []*Read) error {
	if len(reads) == 0 {
		return nil
	}
	here := 1
	if p.ring != nil {
		if len(reads) == 1 && p.ring.alone() {
			defer p.ring.notAlone()
		} else {
			here = 0
		}
	}
	b, _ := batches.Get().(*batch)
	b.left.Add(len(reads) - here)
	b.reads = append(b.reads[:0], reads[here:]...)
	for _, r := range b.reads {
		r.Done, r.Ctx = batchDone, b
	}
	p.Submit(b.reads...)
	if here > 0 {
		reads[0].Err = reads[0].Device.ReadAt(reads[0].P, reads[0].Off)
	}
	b.left.Wait()
	clear(b.reads)
	batches.Put(b)
	for _, r := range reads {
		if r.Err != nil {
			return r.Err
		}
	}
	return nil
}

type batch struct {
	left  sync.WaitGroup
	reads []*Read
}

var batches = sync.Pool{New: func() any { return new(batch) }}

func batchDone(r *Read) { r.Ctx.(*batch).left.Done() }

// Close ends the pool when the reads that were submitted are done, and returns
// when its goroutines are gone. It must not be called by a Done.
func (p *ReadPool) Close() {
	if p.ring != nil {
		p.ring.close()
	}
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.wake.Broadcast()
	p.wg.Wait()
}
