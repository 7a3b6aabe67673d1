package devicetest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/lsfs/device"
	"golang.org/x/sys/unix"
)

// Sector is the grain of a torn write: a disk writes one whole or not at all.
const Sector = 512

// Kind is a kind of operation on a disk.
type Kind uint8

const (
	Read Kind = iota
	Write
	Flush
	Discard
	kinds
)

func (k Kind) String() string {
	return [...]string{"read", "write", "flush", "discard", "?"}[min(k, kinds)]
}

// Op is one operation, as the hook of Observe sees it.
type Op struct {
	Kind Kind
	N    int // operations of this kind on this disk so far, this one included
	Off  int64
	Len  int64
	Err  error
}

type page [device.Align]byte

// write is one unsynced write or, without data, a discard.
type write struct {
	off  int64
	n    int64
	data []byte
}

// Disk is a disk in memory. It takes room as it is written. All methods are safe
// for concurrent use.
//
// Its contents are two layers: stable, what a flush has secured, and above it the
// pages changed since. The changes are also listed in order, so that a crash can
// choose among them.
type Disk struct {
	path string
	size int64

	mu       sync.Mutex
	rng      *rand.Rand
	stable   map[int64]*page // pages are shared with clones and never change in place
	volatile map[int64]*page // this disk's own
	unsynced []write
	counts   [kinds]int
	faults   []*fault
	gates    [kinds]chan struct{}
	observe  func(Op)
	full     bool
	lying    bool // flushes do nothing and succeed
	poisoned bool
	readOnly bool
	closed   bool
	running  sync.WaitGroup
}

// New makes a disk of size bytes, a multiple of device.Align, that reads as zeros.
func New(seed uint64, size int64) *Disk {
	if size <= 0 || size%device.Align != 0 {
		panic("devicetest: size of a disk must be a multiple of 4096")
	}
	return &Disk{
		path:     fmt.Sprintf("disk-%d", seed),
		size:     size,
		rng:      rand.New(rand.NewPCG(seed, uint64(size))),
		stable:   make(map[int64]*page),
		volatile: make(map[int64]*page),
	}
}

var _ device.Device = (*Disk)(nil)

func (d *Disk) Size() int64  { return d.size }
func (d *Disk) Path() string { return d.path }

// Direct is true: the disk demands aligned memory, as direct I/O does.
func (d *Disk) Direct() bool { return true }

// SetPath renames the disk: for stores that tell their devices apart by name.
// Call it before the disk is in use.
func (d *Disk) SetPath(path string) { d.path = path }

func (d *Disk) ReadAt(p []byte, off int64) error {
	if err := device.CheckRange(p, off, d.size); err != nil {
		return d.fail(Read, off, int64(len(p)), err)
	}
	return d.do(Read, off, int64(len(p)), func(f *fault) error {
		if f != nil && f.err != nil {
			return f.err
		}
		for at := int64(0); at < int64(len(p)); at += device.Align {
			d.readPage(p[at:at+device.Align], off+at)
		}
		if f != nil && f.flip {
			bit := d.rng.IntN(len(p) * 8)
			p[bit/8] ^= 1 << (bit % 8)
		}
		return nil
	})
}

func (d *Disk) WriteAt(p []byte, off int64) error {
	if err := device.CheckRange(p, off, d.size); err != nil {
		return d.fail(Write, off, int64(len(p)), err)
	}
	return d.do(Write, off, int64(len(p)), func(f *fault) error {
		switch {
		case d.readOnly:
			return device.ErrReadOnly
		case d.poisoned:
			return device.ErrPoisoned
		}
		to := off
		if f != nil {
			switch {
			case f.err != nil:
				if f.torn {
					d.tear(p, off)
				}
				return f.err
			case f.lose:
				return nil
			case f.elsewhere:
				to = f.to
				if to < 0 || to > d.size-int64(len(p)) || to%device.Align != 0 {
					panic("devicetest: misdirected write does not fit the disk")
				}
			}
		}
		if d.full && !d.allocated(to, int64(len(p))) {
			return unix.ENOSPC
		}
		data := slices.Clone(p)
		if f != nil && f.flip {
			bit := d.rng.IntN(len(p) * 8)
			data[bit/8] ^= 1 << (bit % 8)
		}
		d.unsynced = append(d.unsynced, write{off: to, n: int64(len(p)), data: data})
		d.apply(to, data)
		return nil
	})
}

// tear lets a random part of the sectors of a failed write reach the disk.
func (d *Disk) tear(p []byte, off int64) {
	for at := 0; at < len(p); at += Sector {
		if d.rng.IntN(2) == 0 {
			sector := slices.Clone(p[at : at+Sector])
			d.unsynced = append(d.unsynced, write{off: off + int64(at), n: Sector, data: sector})
			d.apply(off+int64(at), sector)
		}
	}
}

func (d *Disk) Flush() error {
	return d.do(Flush, 0, 0, func(f *fault) error {
		switch {
		case d.readOnly:
			return device.ErrReadOnly
		case d.poisoned:
			return device.ErrPoisoned
		case f != nil && f.err != nil:
			// As on Linux: what was not written stays in the cache, or not, and nobody is
			// told about it a second time.
			d.poisoned = true
			return fmt.Errorf("%w: %w", device.ErrPoisoned, f.err)
		case d.lying || f != nil && f.lose:
			return nil
		}
		maps.Copy(d.stable, d.volatile)
		clear(d.volatile)
		d.unsynced = nil
		return nil
	})
}

// Discard fills the range with garbage, a block at a time or not: nobody may rely
// on what a discarded range reads as.
func (d *Disk) Discard(off, n int64) error {
	if err := device.CheckDiscard(off, n, d.size); err != nil {
		return d.fail(Discard, off, n, err)
	}
	return d.do(Discard, off, n, func(f *fault) error {
		switch {
		case d.readOnly:
			return device.ErrReadOnly
		case d.poisoned:
			return device.ErrPoisoned
		case f != nil && f.err != nil:
			return f.err
		case f != nil && f.lose:
			return nil
		}
		d.unsynced = append(d.unsynced, write{off: off, n: n})
		for at := off; at < off+n; at += device.Align {
			d.discardPage(at)
		}
		return nil
	})
}

// discardPage leaves the old content, zeros, or a filling of 0xdb. Of a page that
// was never written nothing is to be seen, so that wide discards cost no memory.
func (d *Disk) discardPage(at int64) {
	if d.stable[at] == nil && d.volatile[at] == nil {
		return
	}
	switch d.rng.IntN(3) {
	case 1:
		*d.own(at) = page{}
	case 2:
		p := d.own(at)
		for i := range p {
			p[i] = 0xdb
		}
	}
}

// Close waits for running operations. The contents stay: Reopen gives them back.
func (d *Disk) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.running.Wait()
	return nil
}

// Reopen makes a closed or poisoned disk usable again, with the contents that it
// has: what was not flushed is still there, for no power was lost.
func (d *Disk) Reopen() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed, d.poisoned = false, false
}

// SetReadOnly makes every write, flush and discard fail, as on a device that was
// opened for reading.
func (d *Disk) SetReadOnly(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.readOnly = on
}

func (d *Disk) fail(k Kind, off, n int64, err error) error {
	return &device.Error{Op: k.String(), Path: d.path, Off: off, Len: n, Err: err}
}

// do counts an operation, waits at its gate, finds its fault, performs it under
// the lock, and shows it to the observer.
func (d *Disk) do(k Kind, off, n int64, perform func(*fault) error) error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return d.fail(k, off, n, device.ErrClosed)
	}
	d.running.Add(1)
	defer d.running.Done()
	for d.gates[k] != nil {
		gate := d.gates[k]
		d.mu.Unlock()
		<-gate
		d.mu.Lock()
	}
	d.counts[k]++
	op := Op{Kind: k, N: d.counts[k], Off: off, Len: n}
	if err := perform(d.takeFault(op)); err != nil {
		op.Err = d.fail(k, off, n, err)
	}
	observe := d.observe
	d.mu.Unlock()
	if observe != nil {
		observe(op)
	}
	return op.Err
}

func (d *Disk) readPage(dst []byte, at int64) {
	if p := d.volatile[at]; p != nil {
		copy(dst, p[:])
	} else if p := d.stable[at]; p != nil {
		copy(dst, p[:])
	} else {
		clear(dst)
	}
}

// own gives the volatile page at a multiple of device.Align, to be changed.
func (d *Disk) own(at int64) *page {
	p := d.volatile[at]
	if p == nil {
		p = new(page)
		if s := d.stable[at]; s != nil {
			*p = *s
		}
		d.volatile[at] = p
	}
	return p
}

func (d *Disk) allocated(off, n int64) bool {
	for at := off; at < off+n; at += device.Align {
		if d.stable[at] == nil && d.volatile[at] == nil {
			return false
		}
	}
	return true
}

// Counts says how many operations of a kind the disk has seen, failed ones included.
func (d *Disk) Counts(k Kind) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[k]
}

// Unsynced is the number of writes and discards that no flush has secured yet.
func (d *Disk) Unsynced() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.unsynced)
}
