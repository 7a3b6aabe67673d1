package replication

import (
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// work is one operation on its way: reduced, locked, sequenced, appended here
// and sent to the replicas, and at last committed; or, on a replica, received
// and appended. It owns the stored bytes that the operation's blocks point into
// and goes back to its pool when neither the store nor the volume needs it.
type work struct {
	op   lsfs.Op
	v    *Volume
	hold hold
	req  *Request    // completed when committed, or
	then func(error) // called when committed
	ask  *Request    // its Recheck is asked before the operation is sequenced (C2)
	err  error       // refused by that; it was never sequenced

	buf     []byte
	cost    int64 // bytes taken from the node's budget
	missing int   // replica: blocks whose content is awaited
	index   []uint32
	from    *link // replica: where the acknowledgement goes
	stored  bool  // the store is done with it
	settled bool  // the volume is done with it
	abandon bool  // failed to the client while the store still had it

	source     lsfs.OpID // clone: where its source stood (C4)
	sourceNext lsfs.Seq  // replica, clone that was not appended at once: the source's next number then
}

// workClasses are the buffer sizes of the pools: n blocks may need their full
// length, and the encoder one more block of room.
var workClasses = [...]int{8 << 10, 72 << 10, 264 << 10, 1<<20 + 8<<10, 9 << 20}

// workPool keeps works with their buffers, per class, so that the write path
// allocates nothing once it is warm. The budget bounds all of them together:
// beyond it a command is answered BUSY (BOUNDED).
type workPool struct {
	free [len(workClasses)]struct {
		sync.Mutex
		list []*work
	}
	used   atomic.Int64
	budget int64
}

const keepPerClass = 512

// get returns a work with room for dataLen stored bytes, or nil over the budget.
func (p *workPool) get(dataLen int) *work {
	class := 0
	for class < len(workClasses)-1 && workClasses[class] < dataLen {
		class++
	}
	cost := int64(max(workClasses[class], dataLen))
	if p.used.Add(cost) > p.budget {
		p.used.Add(-cost)
		return nil
	}
	f := &p.free[class]
	f.Lock()
	var w *work
	if n := len(f.list); n > 0 {
		w = f.list[n-1]
		f.list = f.list[:n-1]
	}
	f.Unlock()
	if w == nil {
		w = &work{buf: make([]byte, 0, cost)}
		w.op.Ctx = w
		w.hold.work = w
	}
	w.cost = cost
	return w
}

// put takes back a work that nobody uses any more.
func (p *workPool) put(w *work) {
	p.used.Add(-w.cost)
	clear(w.op.Blocks)
	clear(w.op.Plain)
	w.op.Blocks, w.op.Pinned, w.op.Plain, w.op.State = w.op.Blocks[:0], w.op.Pinned[:0], w.op.Plain[:0], nil
	w.op.Source, w.op.SourceStart, w.op.Snapshot = 0, 0, 0
	w.op.Done, w.op.Warm, w.op.Relaxed = nil, false, false
	w.buf, w.index = w.buf[:0], w.index[:0]
	w.v, w.req, w.then, w.from = nil, nil, nil, nil
	w.ask, w.err, w.source, w.sourceNext = nil, nil, lsfs.OpID{}, 0
	w.missing, w.stored, w.settled, w.abandon = 0, false, false, false
	for class, size := range workClasses {
		if cap(w.buf) == size {
			f := &p.free[class]
			f.Lock()
			if len(f.list) < max(4, keepPerClass>>(2*class)) {
				f.list = append(f.list, w)
			}
			f.Unlock()
			return
		}
	}
}

// reducers lends a Reducer to the goroutine that reduces.
type reducers struct {
	key  dedup.Key
	pool sync.Pool
}

func (r *reducers) get() *dedup.Reducer {
	if d, ok := r.pool.Get().(*dedup.Reducer); ok {
		return d
	}
	return dedup.NewReducer(r.key)
}

func (r *reducers) put(d *dedup.Reducer) { r.pool.Put(d) }

// reduce turns data, whole blocks, into w's operation: zero blocks vanish,
// blocks that the pool holds become references (pinned), the rest is compressed
// into w.buf. Nothing in w refers to data afterwards.
func (n *Node) reduce(w *work, start lsfs.BlockNo, data []byte, dup, compress bool) {
	d := n.reducers.get()
	defer n.reducers.put(d)
	w.op.Kind, w.op.Start, w.op.Count = lsfs.OpWrite, start, uint32(len(data)/dedup.BlockSize)
	var fps [dedup.GroupBlocks]dedup.Fingerprint
	var trial dedup.Trial
	for len(data) > 0 {
		group := data[:min(len(data), dedup.GroupBlocks*dedup.BlockSize)]
		data = data[len(group):]
		d.Fingerprints(&fps, group)
		for i := 0; len(group) > 0; i, group = i+1, group[dedup.BlockSize:] {
			block := group[:dedup.BlockSize]
			b := dedup.Block{Fingerprint: fps[i]}
			var pinned lsfs.BID
			if b.Fingerprint != (dedup.Fingerprint{}) { // else a block of zeros
				held := false
				if dup {
					pinned, held = n.pool.Pin(&b.Fingerprint)
				}
				if held {
					b.Encoding = dedup.Raw // by reference: the entry of the block identity says how it is stored
				} else {
					from := len(w.buf)
					try := compress && trial.Due()
					b.Encoding, w.buf = d.Encode(w.buf, block, try)
					if try {
						trial.Tried(b.Encoding)
					}
					b.Data = w.buf[from:len(w.buf):len(w.buf)]
					b.Sum = dedup.Sum(b.Data)
				}
			}
			w.op.Blocks = append(w.op.Blocks, b)
			w.op.Pinned = append(w.op.Pinned, pinned)
		}
	}
}

// hasRefs says whether a block goes by its fingerprint alone.
func (w *work) hasRefs() bool {
	for _, id := range w.op.Pinned {
		if id != 0 {
			return true
		}
	}
	return false
}

// unpin gives back the pins of a work that will not be appended.
func (n *Node) unpin(w *work) {
	for _, id := range w.op.Pinned {
		if id != 0 {
			n.pool.Unpin(id)
		}
	}
	w.op.Pinned = w.op.Pinned[:0]
}
