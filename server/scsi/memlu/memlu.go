// Package memlu is a volume in memory for tests of the device server and of
// transports: it keeps the contract of scsi.Volume and scsi.Backend, completes
// on the calling goroutine or asynchronously, and fails or holds requests on
// demand. It keeps only blocks that were written, so a large size costs nothing.
//
// LU is the volume; Path is another node's way to it. The lock of an LU is held while a request is applied and never
// while Done is called.
package memlu

import (
	"bytes"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/scsi"
)

const blockBytes = 4096

// LU is a volume in memory and the node below it. It implements scsi.Volume
// and scsi.Backend. A new one is synchronous: Submit applies the request and
// calls Done before it returns.
type LU struct {
	size     atomic.Uint64
	uncached atomic.Bool
	fail     atomic.Pointer[func(*scsi.Request) error]

	mu     sync.RWMutex
	blocks map[uint64]*[blockBytes]byte
	counts [16]uint64 // by RequestOp
	id     scsi.VolumeID
	state  []byte
	stated scsi.StateID
	watch  func(scsi.StateID, []byte, bool)
	paths  []*Path
	others map[scsi.VolumeID]*LU // clone sources

	queueMu sync.Mutex
	queue   []queued // submitted, before Kick
	kicked  []queued
	held    bool
	async   bool
	closed  bool
	wake    *sync.Cond
	flush   func()
	worker  sync.WaitGroup
}

type queued struct {
	r    *scsi.Request
	data []byte // in place of r.Data when that was borrowed
}

// New returns a synchronous volume of size bytes, a multiple of 4096, that
// reads as zeros.
func New(size uint64) *LU {
	if size%blockBytes != 0 {
		panic("memlu: size is not a multiple of 4096")
	}
	lu := &LU{blocks: make(map[uint64]*[blockBytes]byte), id: 1}
	lu.size.Store(size)
	lu.wake = sync.NewCond(&lu.queueMu)
	return lu
}

// StartAsync makes the volume asynchronous: requests wait for Kick and are
// completed by a goroutine, which calls flush after each batch. Close ends it.
func (lu *LU) StartAsync(flush func()) {
	lu.queueMu.Lock()
	lu.async = true
	lu.flush = flush
	lu.queueMu.Unlock()
	lu.worker.Go(lu.work)
}

// Close completes what is queued or held and waits for the goroutine.
func (lu *LU) Close() {
	lu.queueMu.Lock()
	lu.closed = true
	lu.held = false
	lu.kicked = append(lu.kicked, lu.queue...)
	lu.queue = nil
	lu.wake.Broadcast()
	lu.queueMu.Unlock()
	lu.worker.Wait()
	lu.complete()
}

// SetFail sets a function that is asked before each request is applied; the
// error it returns is the request's result. Nil ends that.
func (lu *LU) SetFail(f func(*scsi.Request) error) {
	if f == nil {
		lu.fail.Store(nil)
		return
	}
	lu.fail.Store(&f)
}

// SetCached says whether TryRead succeeds; it does at first.
func (lu *LU) SetCached(cached bool) { lu.uncached.Store(!cached) }

// Resize changes the capacity. Blocks beyond a smaller one stay.
func (lu *LU) Resize(size uint64) { lu.size.Store(size) }

// Hold keeps requests from being applied until Release.
func (lu *LU) Hold() {
	lu.queueMu.Lock()
	lu.held = true
	lu.queueMu.Unlock()
}

// Release applies what was held: on this goroutine when the volume is synchronous.
func (lu *LU) Release() {
	lu.queueMu.Lock()
	lu.held = false
	async := lu.async
	if !async {
		lu.kicked = append(lu.kicked, lu.queue...)
		lu.queue = nil
	}
	lu.wake.Broadcast()
	lu.queueMu.Unlock()
	if !async {
		lu.complete()
	}
}

// Queued is the number of requests that wait for Kick or Release.
func (lu *LU) Queued() int {
	lu.queueMu.Lock()
	defer lu.queueMu.Unlock()
	return len(lu.queue) + len(lu.kicked)
}

// Count is the number of requests of one kind that were applied or failed.
func (lu *LU) Count(op scsi.RequestOp) uint64 {
	lu.mu.RLock()
	defer lu.mu.RUnlock()
	return lu.counts[op]
}

// Changes is how often the ordered state was replaced.
func (lu *LU) Changes() uint64 {
	lu.mu.RLock()
	defer lu.mu.RUnlock()
	return uint64(lu.stated.Seq)
}

// Allocated is the number of 4 KiB blocks that were written and not unmapped.
func (lu *LU) Allocated() int {
	lu.mu.RLock()
	defer lu.mu.RUnlock()
	return len(lu.blocks)
}

// SetID names the volume, and the volumes that OpClone may read besides itself.
func (lu *LU) SetID(id scsi.VolumeID, others ...*LU) {
	lu.mu.Lock()
	defer lu.mu.Unlock()
	lu.id = id
	lu.others = make(map[scsi.VolumeID]*LU)
	for _, o := range others {
		lu.others[o.id] = o
	}
}

// ID implements scsi.Volume.
func (lu *LU) ID() scsi.VolumeID { return lu.id }

// Watch implements scsi.Volume.
func (lu *LU) Watch(f func(id scsi.StateID, value []byte, live bool)) {
	lu.mu.Lock()
	lu.watch = f
	id, value := lu.stated, lu.state
	lu.mu.Unlock()
	if f != nil {
		f(id, value, false)
	}
}

// SetState replaces the ordered state as another node would.
func (lu *LU) SetState(value []byte) {
	lu.mu.Lock()
	lu.setState(value)
	lu.mu.Unlock()
}

// setState needs mu; the watchers take no lock of the volume.
func (lu *LU) setState(value []byte) {
	lu.stated.Epoch = 1
	lu.stated.Seq++
	lu.state = bytes.Clone(value)
	if lu.watch != nil {
		lu.watch(lu.stated, lu.state, true)
	}
	for _, p := range lu.paths {
		if p.watch != nil {
			p.watch(lu.stated, lu.state, true)
		}
	}
}

// SizeBytes implements scsi.Volume.
func (lu *LU) SizeBytes() uint64 { return lu.size.Load() }

// TryRead implements scsi.Volume.
func (lu *LU) TryRead(off uint64, dst []byte) bool {
	if lu.uncached.Load() || lu.fail.Load() != nil {
		return false
	}
	lu.queueMu.Lock()
	busy := lu.held || len(lu.queue)+len(lu.kicked) != 0
	lu.queueMu.Unlock()
	if busy {
		return false
	}
	lu.mu.RLock()
	defer lu.mu.RUnlock()
	lu.read(off, dst)
	return true
}

// Submit implements scsi.Volume. It panics when the request breaks the contract.
func (lu *LU) Submit(r *scsi.Request) {
	lu.validate(r)
	lu.submit(queued{r: r, data: r.Data}, r.Borrowed)
}

func (lu *LU) submit(q queued, borrowed bool) {
	lu.queueMu.Lock()
	if lu.async || lu.held {
		if borrowed {
			q.data = bytes.Clone(q.data)
		}
		lu.queue = append(lu.queue, q)
		lu.queueMu.Unlock()
		return
	}
	lu.queueMu.Unlock()
	lu.apply(q)
	q.r.Done(q.r)
}

// Kick implements scsi.Backend.
func (lu *LU) Kick() {
	lu.queueMu.Lock()
	defer lu.queueMu.Unlock()
	if !lu.async || len(lu.queue) == 0 {
		return
	}
	lu.kicked = append(lu.kicked, lu.queue...)
	lu.queue = lu.queue[:0]
	lu.wake.Signal()
}

func (lu *LU) work() {
	for {
		lu.queueMu.Lock()
		for !lu.closed && (lu.held || len(lu.kicked) == 0) {
			lu.wake.Wait()
		}
		closed := lu.closed
		lu.queueMu.Unlock()
		if lu.complete() {
			lu.flush()
		} else if closed {
			return
		}
	}
}

// complete applies and completes all kicked requests.
func (lu *LU) complete() bool {
	lu.queueMu.Lock()
	batch := lu.kicked
	lu.kicked = nil
	lu.queueMu.Unlock()
	for _, q := range batch {
		lu.apply(q)
		q.r.Done(q.r)
	}
	return len(batch) > 0
}

func (lu *LU) validate(r *scsi.Request) {
	length := r.Len
	switch r.Op {
	case scsi.OpRead, scsi.OpWrite:
		if uint64(len(r.Data)) != r.Len {
			panic(fmt.Sprintf("memlu: op %d: %d bytes of data, length %d", r.Op, len(r.Data), r.Len))
		}
	case scsi.OpCompareAndWrite:
		if uint64(len(r.Data)) != 2*r.Len {
			panic(fmt.Sprintf("memlu: compare and write: %d bytes of data, length %d", len(r.Data), r.Len))
		}
	case scsi.OpWriteSame:
		if n := len(r.Data); n != 512 && n != 4096 || r.Len%uint64(n) != 0 {
			panic(fmt.Sprintf("memlu: write same: a block of %d bytes", n))
		}
	case scsi.OpOrWrite:
		if uint64(len(r.Data)) != r.Len {
			panic(fmt.Sprintf("memlu: or write: %d bytes of data, length %d", len(r.Data), r.Len))
		}
	case scsi.OpUnmap, scsi.OpState, scsi.OpReadState:
	case scsi.OpExtents:
		if cap(r.Extents) == 0 || r.Len == 0 {
			panic("memlu: extents without room or range")
		}
	case scsi.OpClone:
		if (r.Off|r.Len|r.SourceOff)%blockBytes != 0 || r.Len > replication.CloneBytesMax {
			panic(fmt.Sprintf("memlu: clone of %d+%d from %d", r.Off, r.Len, r.SourceOff))
		}
	case scsi.OpFlush:
		length = 0
	default:
		panic(fmt.Sprintf("memlu: op %d", r.Op))
	}
	if r.Off >= replication.AnnexOff && (r.Op == scsi.OpRead || r.Op == scsi.OpUnmap || r.Op == scsi.OpClone) {
		length = 0 // the annex
	} else if r.Off%512 != 0 || length%512 != 0 || r.Off+length > lu.size.Load() || r.Off+length < r.Off {
		panic(fmt.Sprintf("memlu: op %d: range %d+%d", r.Op, r.Off, length))
	}
	if r.Borrowed && r.Op != scsi.OpWrite {
		panic(fmt.Sprintf("memlu: op %d with borrowed data", r.Op))
	}
	if r.Done == nil {
		panic("memlu: no Done")
	}
}

func (lu *LU) apply(q queued) {
	r := q.r
	lu.mu.Lock()
	defer lu.mu.Unlock()
	lu.counts[r.Op]++
	if f := lu.fail.Load(); f != nil {
		if r.Err = (*f)(r); r.Err != nil {
			return
		}
	}
	if r.Recheck != nil && r.State != lu.stated {
		if r.Err = r.Recheck(r); r.Err != nil {
			return
		}
	}
	switch r.Op {
	case scsi.OpState:
		if r.State != lu.stated {
			r.Err = scsi.ErrStateMoved
			return
		}
		lu.setState(q.data)
		r.State = lu.stated
	case scsi.OpReadState:
		r.State, r.Value = lu.stated, lu.state
	case scsi.OpExtents:
		lu.extents(r)
	case scsi.OpOrWrite:
		old := make([]byte, r.Len)
		lu.read(r.Off, old)
		for i := range old {
			old[i] |= q.data[i]
		}
		lu.write(r.Off, old)
	case scsi.OpClone:
		source := lu
		if r.Source != lu.id {
			if source = lu.others[r.Source]; source == nil {
				r.Err = scsi.ErrNoClone
				return
			}
			source.mu.RLock()
			defer source.mu.RUnlock()
		}
		lu.clone(r, source)
	case scsi.OpRead:
		lu.read(r.Off, r.Data)
	case scsi.OpWrite:
		lu.write(r.Off, q.data)
	case scsi.OpUnmap:
		lu.unmap(r.Off, r.Len)
	case scsi.OpWriteSame:
		for off := uint64(0); off < r.Len; off += uint64(len(q.data)) {
			lu.write(r.Off+off, q.data)
		}
	case scsi.OpCompareAndWrite:
		old := make([]byte, r.Len)
		lu.read(r.Off, old)
		for i := range old {
			if old[i] != q.data[i] {
				r.Miscompare = uint64(i)
				r.Err = scsi.ErrMiscompare
				return
			}
		}
		lu.write(r.Off, q.data[r.Len:])
	}
}

// extents merges equal neighbours up to the capacity.
func (lu *LU) extents(r *scsi.Request) {
	r.Extents = r.Extents[:0]
	for off, end := r.Off, r.Off+r.Len; off < end; {
		n := min(blockBytes-off%blockBytes, end-off)
		mapped := lu.blocks[off/blockBytes] != nil
		if k := len(r.Extents); k > 0 && r.Extents[k-1].Mapped == mapped {
			r.Extents[k-1].Bytes += n
		} else if k == cap(r.Extents) {
			return
		} else {
			r.Extents = append(r.Extents, scsi.Extent{Bytes: n, Mapped: mapped})
		}
		off += n
	}
}

func (lu *LU) clone(r *scsi.Request, source *LU) {
	n := r.Len / blockBytes
	copied := make([]*[blockBytes]byte, n)
	for i := range n {
		if b := source.blocks[r.SourceOff/blockBytes+i]; b != nil {
			c := *b
			copied[i] = &c
		}
	}
	for i, b := range copied {
		at := r.Off/blockBytes + uint64(i)
		if b == nil {
			delete(lu.blocks, at)
		} else {
			lu.blocks[at] = b
		}
	}
}

func (lu *LU) read(off uint64, dst []byte) {
	for len(dst) > 0 {
		at := off % blockBytes
		n := min(uint64(len(dst)), blockBytes-at)
		if b := lu.blocks[off/blockBytes]; b != nil {
			copy(dst[:n], b[at:])
		} else {
			clear(dst[:n])
		}
		dst = dst[n:]
		off += n
	}
}

func (lu *LU) write(off uint64, src []byte) {
	for len(src) > 0 {
		at := off % blockBytes
		n := min(uint64(len(src)), blockBytes-at)
		b := lu.blocks[off/blockBytes]
		if b == nil {
			b = new([blockBytes]byte)
			lu.blocks[off/blockBytes] = b
		}
		copy(b[at:], src[:n])
		src = src[n:]
		off += n
	}
}

func (lu *LU) unmap(off, length uint64) {
	for length > 0 {
		at := off % blockBytes
		n := min(length, blockBytes-at)
		if n == blockBytes {
			delete(lu.blocks, off/blockBytes)
		} else if b := lu.blocks[off/blockBytes]; b != nil {
			clear(b[at : at+n])
		}
		length -= n
		off += n
	}
}
