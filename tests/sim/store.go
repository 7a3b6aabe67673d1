package sim

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/replication/wire"
)

// disk is what a node's pool holds on stable storage: it survives the process.
type disk struct {
	mu       sync.Mutex // of all that is below, and of the store that has it
	volumes  map[lsfs.VolumeID]*diskVolume
	snaps    map[lsfs.VolumeID]*diskSnapshot
	contents map[dedup.Fingerprint]*content
	byID     map[lsfs.BID]*content
	last     lsfs.BID
	loose    []relaxed    // written and not flushed, in order (W6)
	flushes  int          // how many have been
	lies     atomic.Int32 // blocks of resyncs that it will lose
}

// content is one stored block.
type content struct {
	fp     dedup.Fingerprint
	id     lsfs.BID
	enc    dedup.Encoding
	sum    uint32
	data   []byte
	refs   int // blocks of volumes that name it
	pins   int // of the running process
	rotten bool

	plain    []byte // decoded, as soon as somebody has read it
	plainSum uint64
}

// decode is the plain content and its sum. Called with the disk's mutex, as all that
// changes a content is.
func (c *content) decode() ([]byte, uint64, error) {
	if c.plain == nil {
		plain := make([]byte, dedup.BlockSize)
		if err := dedup.Decode(plain, c.enc, c.data); err != nil {
			return nil, 0, err
		}
		c.plain, c.plainSum = plain, sum(plain)
	}
	return c.plain, c.plainSum, nil
}

type diskVolume struct {
	blocks   uint64
	at       map[lsfs.BlockNo]*content
	versions map[uint32]lsfs.Seq
	meta     lsfs.Meta
	highest  lsfs.Epoch // newest promise ever, for I4
}

func newDisk() *disk {
	return &disk{volumes: map[lsfs.VolumeID]*diskVolume{}, snaps: map[lsfs.VolumeID]*diskSnapshot{}, contents: map[dedup.Fingerprint]*content{}, byID: map[lsfs.BID]*content{}}
}

// clone is an image of the disk as it is.
func (d *disk) clone() *disk {
	c := newDisk()
	c.last = d.last
	image := func(v *diskVolume) *diskVolume {
		w := &diskVolume{blocks: v.blocks, at: map[lsfs.BlockNo]*content{}, versions: map[uint32]lsfs.Seq{}, meta: v.meta}
		for no, x := range v.at {
			y := c.contents[x.fp]
			if y == nil {
				y = &content{fp: x.fp, id: x.id, enc: x.enc, sum: x.sum, data: x.data}
				c.contents[x.fp], c.byID[x.id] = y, y
			}
			y.refs++
			w.at[no] = y
		}
		for k, s := range v.versions {
			w.versions[k] = s
		}
		return w
	}
	for id, v := range d.volumes {
		c.volumes[id] = image(v)
	}
	for id, x := range d.snaps {
		c.snaps[id] = &diskSnapshot{diskVolume: image(x.diskVolume), id: x.id, of: x.of, point: x.point, forged: x.forged}
	}
	return c
}

// sum is that of the plain content of a block, for checks.
func (d *disk) sum(v lsfs.VolumeID, no lsfs.BlockNo) uint64 {
	if dv := d.volumes[v]; dv != nil {
		return dv.sum(no)
	}
	return holeSum
}

func (v *diskVolume) sum(no lsfs.BlockNo) uint64 {
	c := v.at[no]
	if c == nil {
		return holeSum
	}
	_, h, err := c.decode()
	if err != nil {
		return 0
	}
	return h
}

// holdsLock says whether a content is a lock's.
func (d *disk) holdsLock(c *content) bool {
	for _, v := range d.volumes {
		if v.at[lockBlock] == c {
			return true
		}
	}
	return false
}

func (d *disk) set(v *diskVolume, no lsfs.BlockNo, c *content) {
	old := v.at[no]
	if c != nil {
		c.refs++
		v.at[no] = c
	} else {
		delete(v.at, no)
	}
	if old != nil {
		old.refs--
		d.drop(old)
	}
}

func (d *disk) drop(c *content) {
	if c.refs == 0 && c.pins == 0 {
		if d.contents[c.fp] == c {
			delete(d.contents, c.fp)
		}
		delete(d.byID, c.id)
	}
}

func (d *disk) add(b *dedup.Block) *content {
	if c := d.contents[b.Fingerprint]; c != nil {
		if !c.rotten {
			return c
		}
		delete(d.contents, c.fp) // new copies do not lean on a damaged one
	}
	d.last++
	c := &content{fp: b.Fingerprint, id: d.last, enc: b.Encoding, sum: b.Sum, data: append([]byte(nil), b.Data...)}
	d.contents[c.fp], d.byID[c.id] = c, c
	return c
}

// apply makes one operation part of the disk.
func (d *disk) apply(op *lsfs.Op) error {
	v := d.target(op.Volume)
	if v == nil {
		return lsfs.ErrNoVolume
	}
	if op.Kind != lsfs.OpCopy && op.ID.Seq != v.meta.Durable.Seq+1 {
		return fmt.Errorf("volume %d: seq %d after %d: %w", op.Volume, op.ID.Seq, v.meta.Durable.Seq, lsfs.ErrGap)
	}
	start, end := op.Start, op.Start+lsfs.BlockNo(op.Count)
	switch op.Kind {
	case lsfs.OpWrite, lsfs.OpCopy:
		for i := range op.Blocks {
			b := &op.Blocks[i]
			var c *content
			if n := d.lies.Load(); op.Kind == lsfs.OpCopy && n > 0 && b.Encoding != dedup.Zero {
				d.lies.Store(n - 1)
				continue
			}
			switch {
			case b.Encoding == dedup.Zero:
			case b.Data != nil:
				c = d.add(b)
			default:
				if c = d.byID[op.Pinned[i]]; c == nil || c.fp != b.Fingerprint {
					panic("REFS: an operation names a block that is not pinned")
				}
			}
			d.set(v, start+lsfs.BlockNo(i), c)
		}
	case lsfs.OpUnmap:
		for no := start; no < end; no++ {
			d.set(v, no, nil)
		}
	case lsfs.OpClone:
		src := d.volumes[op.Source]
		if src == nil {
			return lsfs.ErrNoVolume
		}
		from := make([]*content, op.Count)
		for i := range from {
			from[i] = src.at[op.SourceStart+lsfs.BlockNo(i)]
		}
		for i, c := range from {
			d.set(v, start+lsfs.BlockNo(i), c)
		}
	case lsfs.OpEpoch:
		v.meta.EpochLog = append(slices.Clip(v.meta.EpochLog), op.ID)
		start, end = 0, 0
	case lsfs.OpSnapshot:
		if op.Snapshot != 0 { // else it only takes its number
			d.snap(op.Snapshot, op.Volume, v).point = op.ID
		}
	case lsfs.OpRollback:
		if err := d.rollTo(v, op); err != nil {
			return err
		}
		start, end = 0, 0
	case lsfs.OpState:
		v.meta.State = append([]byte(nil), op.State...)
		start, end = 0, 0
	}
	if start < end {
		for c := start / wire.ChunkBlocks; c <= (end-1)/wire.ChunkBlocks; c++ {
			v.versions[uint32(c)] = op.ID.Seq
		}
	}
	if op.Kind != lsfs.OpCopy {
		v.meta.Durable = op.ID
	}
	return nil
}

// store is a node's pool while one process has it: operations wait in RAM, are
// flushed in batches after a delay, and are lost with the process before that.
type store struct {
	w    *world
	p    *process
	disk *disk

	mu       *sync.Mutex // the disk's
	queue    []entry
	flying   []entry // being flushed
	busy     bool
	flushing bool // flushLater runs
	dead     bool // the process is gone
	poisoned bool // a flush failed
	expect   map[lsfs.VolumeID]lsfs.Seq
	onCommit func()
}

// entry is an operation, or a task that takes its place in their order.
type entry struct {
	op   *lsfs.Op
	err  error
	task func(d *disk) error
	done chan error
}

func newStore(w *world, p *process, d *disk) *store {
	for _, c := range d.contents {
		c.pins = 0
	}
	d.flushed(len(d.loose)) // a store flushes what it finds when it opens
	return &store{w: w, p: p, disk: d, mu: &d.mu, expect: map[lsfs.VolumeID]lsfs.Seq{}}
}

func (s *store) OnCommit(f func()) { s.onCommit = f }

func (s *store) Append(op *lsfs.Op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return
	}
	e := entry{op: op}
	v := s.disk.target(op.Volume)
	switch {
	case s.poisoned:
		e.err = lsfs.ErrPoisoned
	case v == nil:
		e.err = lsfs.ErrNoVolume
	case op.Kind == lsfs.OpCopy:
	default:
		next, ok := s.expect[op.Volume]
		if !ok {
			next = v.meta.Durable.Seq + 1
		}
		if op.ID.Seq != next {
			e.err = fmt.Errorf("volume %d: seq %d, expected %d: %w", op.Volume, op.ID.Seq, next, lsfs.ErrGap)
		} else {
			s.expect[op.Volume] = next + 1
		}
	}
	s.queue = append(s.queue, e)
}

func (s *store) Kick() {
	s.mu.Lock()
	start := !s.busy && len(s.queue) > 0 && !s.dead
	if start {
		s.busy = true
	}
	s.mu.Unlock()
	if start {
		s.w.group.Go(s.commit)
	}
}

// commit flushes batches until nothing waits.
func (s *store) commit() {
	for {
		s.mu.Lock()
		if s.dead || len(s.queue) == 0 {
			s.busy = false
			s.mu.Unlock()
			return
		}
		s.flying, s.queue = s.queue, nil
		relaxed := !slices.ContainsFunc(s.flying, func(e entry) bool { return e.op == nil || !e.op.Relaxed })
		s.mu.Unlock()

		took := s.w.flushDelay(s.p.id)
		if relaxed {
			took /= 4 // it is only written
		}
		time.Sleep(took)
		s.p.gate()

		s.mu.Lock()
		if s.dead {
			s.mu.Unlock()
			return
		}
		batch := s.flying
		s.flying = nil
		if !relaxed && s.p.poison.Swap(false) {
			s.poisoned = true
			s.w.note("poisoned", uint64(s.p.id))
		}
		for i := range batch {
			e := &batch[i]
			switch {
			case s.poisoned:
				e.err = lsfs.ErrPoisoned
			case e.err != nil:
			case e.task != nil:
				e.err = e.task(s.disk)
			default:
				e.err = s.apply(e.op)
				s.w.logf("node %d stored volume %d %v kind %d at %d for %d: %v", s.p.id, e.op.Volume, e.op.ID, e.op.Kind, e.op.Start, e.op.Count, e.err)
				if e.err != nil && e.op.Kind != lsfs.OpCopy {
					if v := s.disk.volumes[e.op.Volume]; v != nil {
						s.expect[e.op.Volume] = v.meta.Durable.Seq + 1
					}
				}
			}
			if e.op != nil && e.err == nil {
				for _, id := range e.op.Pinned {
					s.unpin(id)
				}
			}
		}
		if !relaxed && !s.poisoned {
			s.disk.flushed(len(s.disk.loose))
		}
		if len(s.disk.loose) > 0 && !s.flushing && !s.poisoned {
			s.flushing = true
			s.w.group.Go(s.flushLater)
		}
		s.mu.Unlock()
		for i := range batch {
			if e := &batch[i]; e.op != nil {
				e.op.Done(e.op, e.err)
			} else {
				e.done <- e.err
			}
		}
		s.onCommit()
	}
}

// crash ends the process's hold: of what was being flushed a random part has reached
// the disk, in order, and the rest is lost. So is, with the power, what was only written.
func (s *store) crash(r *random, power bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
	whole := true
	if (power || s.poisoned) && len(s.disk.loose) > 0 {
		whole = s.blackout(r)
	}
	if !s.poisoned && whole {
		for i := range r.n(len(s.flying) + 1) {
			switch e := &s.flying[i]; {
			case e.err != nil:
			case e.task != nil:
				_ = e.task(s.disk)
			default:
				_ = s.apply(e.op)
			}
		}
	}
	if power || s.poisoned {
		s.disk.flushed(len(s.disk.loose)) // what is there now is on the disk
	}
	for _, e := range append(s.flying, s.queue...) {
		if e.done != nil {
			e.done <- lsfs.ErrClosed
		}
	}
	s.flying, s.queue = nil, nil
	for _, c := range s.disk.byID {
		c.pins = 0
	}
	for _, c := range s.disk.byID {
		s.disk.drop(c)
	}
}

// do runs a task in the order of the operations; it is durable on return.
func (s *store) do(ctx context.Context, task func(d *disk) error) error {
	done := make(chan error, 1)
	s.mu.Lock()
	if s.dead {
		s.mu.Unlock()
		return lsfs.ErrClosed
	}
	s.queue = append(s.queue, entry{task: task, done: done})
	s.mu.Unlock()
	s.Kick()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Recall has nothing to read.
func (s *store) Recall(context.Context, []dedup.Fingerprint) {}

func (s *store) Pin(fp *dedup.Fingerprint) (lsfs.BID, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.disk.contents[*fp]
	if s.dead || c == nil || c.rotten || s.w.storeRandom.chance(0.05) { // an index forgets
		return 0, false
	}
	c.pins++
	return c.id, true
}

func (s *store) Unpin(id lsfs.BID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unpin(id)
}

func (s *store) unpin(id lsfs.BID) {
	if c := s.disk.byID[id]; c != nil && c.pins > 0 && !s.dead {
		c.pins--
		s.disk.drop(c)
	}
}

func (s *store) ReadFingerprint(_ context.Context, fp *dedup.Fingerprint, buf []byte) (dedup.Block, error) {
	s.ioWait()
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.disk.contents[*fp]
	switch {
	case s.dead:
		return dedup.Block{}, lsfs.ErrClosed
	case c == nil:
		return dedup.Block{}, lsfs.ErrNotFound
	case c.rotten:
		return dedup.Block{}, &lsfs.CorruptError{BID: c.id, Fingerprint: c.fp, What: "block"}
	}
	return c.block(buf), nil
}

func (c *content) block(buf []byte) dedup.Block {
	return dedup.Block{Fingerprint: c.fp, Encoding: c.enc, Sum: c.sum, Data: buf[:copy(buf, c.data)]}
}

func (s *store) Room() lsfs.Room { return lsfs.Room{Size: 1 << 40, Free: 1 << 40, Usable: 1 << 40} }

// ioWait is the time that a read takes.
func (s *store) ioWait() {
	if d := s.w.readDelay(s.p.id); d > 0 {
		time.Sleep(d)
	}
	s.p.gate()
}

func (s *store) Copy(id lsfs.VolumeID) replication.Copy {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disk.volumes[id] == nil {
		return nil
	}
	return &localCopy{s, id}
}

func (s *store) CreateCopy(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica replication.ReplicaID) (replication.Copy, error) {
	err := s.do(ctx, func(d *disk) error {
		if d.volumes[id] != nil {
			return lsfs.ErrExists
		}
		d.volumes[id] = &diskVolume{blocks: blocks, at: map[lsfs.BlockNo]*content{}, versions: map[uint32]lsfs.Seq{}, meta: lsfs.Meta{Replica: replica}}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &localCopy{s, id}, nil
}

func (s *store) DeleteCopy(ctx context.Context, id lsfs.VolumeID) error {
	return s.do(ctx, func(d *disk) error {
		v := d.volumes[id]
		if v == nil {
			return lsfs.ErrNoVolume
		}
		for no := range v.at {
			d.set(v, no, nil)
		}
		delete(d.volumes, id)
		delete(s.expect, id)
		return nil
	})
}

func (s *store) Copies() []lsfs.VolumeID {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []lsfs.VolumeID
	for id := range s.disk.volumes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// localCopy is one volume of a store.
type localCopy struct {
	s  *store
	id lsfs.VolumeID
}

// with runs f on the volume.
func (c *localCopy) with(f func(v *diskVolume) error) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	v := c.s.disk.volumes[c.id]
	if x := c.s.disk.snaps[c.id]; x != nil {
		v = x.diskVolume
	}
	if v == nil {
		return lsfs.ErrNoVolume
	}
	if c.s.poisoned {
		return lsfs.ErrPoisoned
	}
	return f(v)
}

func (c *localCopy) Blocks() (n uint64) {
	_ = c.with(func(v *diskVolume) error { n = v.blocks; return nil })
	return n
}

func (c *localCopy) Resize(ctx context.Context, blocks uint64) error {
	return c.s.do(ctx, func(d *disk) error {
		v := d.volumes[c.id]
		if v == nil {
			return lsfs.ErrNoVolume
		}
		v.blocks = blocks
		return nil
	})
}

func (c *localCopy) Admit(lsfs.BlockNo, []dedup.Block) bool { return true }
func (c *localCopy) AdmitClone(lsfs.BlockNo, lsfs.VolumeID, lsfs.BlockNo, uint32) bool {
	return true
}

func (c *localCopy) AdmitUnmap(lsfs.BlockNo, uint32) bool { return true }
func (c *localCopy) AdmitSnapshot() error                 { return nil }
func (c *localCopy) AdmitRollback(lsfs.VolumeID) error    { return nil }
func (c *localCopy) Wanted(lsfs.BlockNo, []bool) bool     { return false }
func (c *localCopy) Kept(lsfs.BlockNo, uint32) bool       { return false }

func (c *localCopy) TryRead(off uint64, dst []byte) bool {
	return c.s.w.storeRandom.chance(0.5) && c.read(off, dst) == nil
}

func (c *localCopy) Read(_ context.Context, off uint64, dst []byte) error {
	c.s.ioWait()
	return c.read(off, dst)
}

func (c *localCopy) read(off uint64, dst []byte) error {
	return c.with(func(v *diskVolume) error {
		for len(dst) > 0 {
			no, in := lsfs.BlockNo(off/dedup.BlockSize), off%dedup.BlockSize
			n := min(uint64(len(dst)), dedup.BlockSize-in)
			x := v.at[no]
			switch {
			case x == nil:
				clear(dst[:n])
			case x.rotten:
				return &lsfs.CorruptError{BID: x.id, Volume: c.id, Block: no, Fingerprint: x.fp, What: "block"}
			default:
				plain, _, err := x.decode()
				if err != nil {
					return err
				}
				copy(dst[:n], plain[in:])
			}
			dst, off = dst[n:], off+n
		}
		return nil
	})
}

func (c *localCopy) ReadReduced(_ context.Context, start lsfs.BlockNo, dst []dedup.Block, buf []byte) error {
	c.s.ioWait()
	return c.with(func(v *diskVolume) error {
		for i := range dst {
			dst[i] = dedup.Block{}
			if x := v.at[start+lsfs.BlockNo(i)]; x != nil {
				if x.rotten {
					return &lsfs.CorruptError{BID: x.id, Volume: c.id, Block: start + lsfs.BlockNo(i), Fingerprint: x.fp, What: "block"}
				}
				dst[i] = x.block(buf[i*dedup.BlockSize : (i+1)*dedup.BlockSize])
			}
		}
		return nil
	})
}

func (c *localCopy) Fingerprints(_ context.Context, start lsfs.BlockNo, dst []dedup.Fingerprint) error {
	return c.with(func(v *diskVolume) error {
		for i := range dst {
			dst[i] = dedup.Fingerprint{}
			if x := v.at[start+lsfs.BlockNo(i)]; x != nil {
				dst[i] = x.fp
			}
		}
		return nil
	})
}

func (c *localCopy) Extents(_ context.Context, start, end lsfs.BlockNo, dst []lsfs.Extent) ([]lsfs.Extent, error) {
	dst = dst[:0]
	err := c.with(func(v *diskVolume) error {
		for no := start; no < end; no++ {
			mapped := v.at[no] != nil
			if n := len(dst); n > 0 && dst[n-1].Mapped == mapped {
				dst[n-1].Blocks++
			} else if n == cap(dst) {
				break
			} else {
				dst = append(dst, lsfs.Extent{Blocks: 1, Mapped: mapped})
			}
		}
		return nil
	})
	return dst, err
}

func (c *localCopy) Meta() (m lsfs.Meta) {
	_ = c.with(func(v *diskVolume) error { m = v.meta; return nil })
	return m
}

func (c *localCopy) SetMeta(ctx context.Context, m lsfs.Meta) error {
	return c.s.do(ctx, func(d *disk) error {
		v := d.volumes[c.id]
		if v == nil {
			return lsfs.ErrNoVolume
		}
		if m.Promised < v.highest {
			c.s.w.fail("I4: node %d volume %d: the promise went back from %d to %d", c.s.p.id, c.id, v.highest, m.Promised)
		}
		v.highest = m.Promised
		v.meta = m
		c.s.expect[c.id] = m.Durable.Seq + 1
		return nil
	})
}

func (c *localCopy) ChangedChunks(_ context.Context, since lsfs.Seq) (list []uint32, err error) {
	err = c.with(func(v *diskVolume) error {
		for k, s := range v.versions {
			if s > since {
				list = append(list, k)
			}
		}
		slices.Sort(list)
		return nil
	})
	return list, err
}

func (c *localCopy) ChunkVersions(_ context.Context, first uint32, dst []lsfs.Seq) error {
	return c.with(func(v *diskVolume) error {
		for i := range dst {
			dst[i] = v.versions[first+uint32(i)]
		}
		return nil
	})
}

func (c *localCopy) Repair(ctx context.Context, no lsfs.BlockNo, b dedup.Block) error {
	if err := dedup.Verify(&b); err != nil {
		return err
	}
	b.Data = append([]byte(nil), b.Data...)
	return c.s.do(ctx, func(d *disk) error {
		v := d.volumes[c.id]
		if x := d.snaps[c.id]; x != nil {
			v = x.diskVolume
		}
		if v == nil {
			return lsfs.ErrNoVolume
		}
		if x := v.at[no]; x != nil && x.fp == b.Fingerprint {
			x.enc, x.sum, x.data, x.plain, x.rotten = b.Encoding, b.Sum, b.Data, nil, false
			if d.contents[x.fp] == nil {
				d.contents[x.fp] = x
			}
		}
		return nil
	})
}
