package lsfs

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs/format"
)

// checkpointer writes checkpoints. A checkpoint is a consistent cut between two
// commits (or two slices of a huge unmap), taken by the holder of the committing
// role, and written by a goroutine of its own while operations go on:
//
//	cut      dirty pages become pages of the cut; volumes, live bytes and the log's
//	         position are copied
//	pages    1 MiB commits; whoever changes a page of the cut first saves it
//	dirs     the changed pages of the page directory
//	root     the copied state and the places of the directory pages
//	super    the places of the root, on all devices
//	done     what the checkpoint before named is released, quarantine moves on
type checkpointer struct {
	bytes   atomic.Int64 // of log since the last cut
	changed atomic.Bool  // by operations since the last cut
	pending atomic.Int64 // pages of the cut that are not written

	rootBytes atomic.Int64 // of the newest root

	mu      sync.Mutex
	cond    sync.Cond
	wanted  uint64 // a cut with this number is asked for
	cuts    uint64 // number of the last cut
	done    uint64 // number of the last durable one
	running bool
	closed  bool

	limitBytes int64
	limitDirty func() bool
	start      chan struct{}

	// The cut that is being written; belongs to the checkpoint goroutine while running.
	number   uint64
	list     []uint32 // pages dirty or dead at the cut
	parents  []uint32 // of list, at the cut
	moved    []moved  // clean pages whose parents changed
	drops    []uint32
	root     []byte
	state    format.Root // what it is made from; its lists of segments are used again
	pages    uint32      // ids at the cut
	devices  deviceList
	buf      []byte // aligned staging
	out      outlet
	sums     []uint32 // of the staged pages
	taken    []uint32
	released []uint32 // segments that lose a page when the checkpoint is durable

	super sync.Mutex // held while superblocks are written, and guards Store.pool

	// Guarded by Store.mu.
	dirAt    []format.Extent // where the directory pages stand
	dirDirty []bool
	rootAt   []format.Extent
}

// moved is a page that stays where it is and has another number of parents.
type moved struct {
	id      uint32
	parents uint32
}

const pagesPerCommit = 240 // with header and record just under 1 MiB

func (c *checkpointer) due() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.running && !c.closed && (c.cuts < c.wanted || c.limitBytes <= c.bytes.Load() || c.limitDirty())
}

// numbers returns those of the last cut and of the last durable checkpoint.
func (c *checkpointer) numbers() (cuts, done uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cuts, c.done
}

// admit runs at the head of each piece of work: it takes a cut that is due, and
// waits when so many pages are dirty that the next batch might not fit.
func (s *Store) admit() error {
	if s.ckpt.due() {
		s.cut(s.log.position(), 0)
	}
	return s.relieve(func() { s.cut(s.log.position(), 0) })
}

// relieve waits for checkpoints while too much of the metadata frames is dirty, or so much that
// the free segments might not take it.
func (s *Store) relieve(cut func()) error {
	most := int32(-1) // that was free
	for futile := 0; s.tight() || s.dirtyHard <= s.pg.nDirty.Load()+s.ckpt.pending.Load(); {
		if err := s.failure(); err != nil {
			return err
		}
		c := &s.ckpt
		c.mu.Lock()
		for c.running {
			c.cond.Wait()
		}
		c.mu.Unlock()
		if s.tight() {
			if s.pg.nDirty.Load() == 0 && !s.reclaimable() {
				return nil // only the cleaner can help
			}
			if free := s.segs.nFree.Load(); free > most {
				most, futile = free, 0
			} else if futile++; futile > tightRounds {
				return nil // a reader holds what was to be had
			}
		} else if s.pg.nDirty.Load() < s.dirtySoft {
			return nil
		}
		cut()
	}
	return nil
}

// cutInside lets a checkpoint in between two slices of the unmap that is being
// applied, alone in its commit.
func (s *Store) cutInside(done uint64) error {
	cut := func() { s.cut(s.batch.before, done) }
	if s.ckpt.due() {
		cut()
	}
	return s.relieve(cut)
}

// cut begins a checkpoint of the state as it is. The caller has the committing
// role, no checkpoint is running. progress is the part of the commit after pos
// that is applied already.
func (s *Store) cut(pos format.Position, progress uint64) {
	c := &s.ckpt
	s.log.turn.Lock()
	defer s.log.turn.Unlock()
	c.mu.Lock()
	c.cuts++
	c.running = true
	c.number = c.cuts
	c.mu.Unlock()
	c.bytes.Store(0)
	c.changed.Store(false)

	s.queue.mu.Lock()
	dormant := s.pins.dormant(nil)
	for _, b := range s.queue.dormant {
		dormant = append(dormant, uint64(b)) // unpinned, and not reaped yet
	}
	s.queue.mu.Unlock()

	s.mu.Lock()
	pg := s.pg
	c.list, pg.dirty = pg.dirty, c.list[:0]
	c.drops = c.drops[:0]
	c.moved = c.moved[:0]
	for _, id := range pg.moved {
		p := pg.page(id)
		if p.flags&pageRecount == 0 {
			continue // dropped since
		}
		if p.flags &^= pageRecount; p.flags&pageDirty == 0 {
			c.moved = append(c.moved, moved{id, p.parents})
		}
	}
	pg.moved = pg.moved[:0]
	c.parents = c.parents[:0]
	live := c.list[:0]
	for _, id := range c.list {
		p := pg.page(id)
		if p.flags&pageDead != 0 {
			p.flags = 0
			c.drops = append(c.drops, id)
			pg.ids = append(pg.ids, id)
			continue
		}
		p.flags = p.flags&^pageDirty | pageCut
		live = append(live, id)
		c.parents = append(c.parents, p.parents)
	}
	c.list = live
	c.pending.Store(int64(len(live)))
	pg.nDirty.Store(0)
	c.pages = pg.n

	t := s.segs
	r := format.Root{
		Checkpoint: c.number, Position: pos, Progress: progress,
		NextBID: uint64(makeBID(uint64(s.nextBID), s.newest)), Stored: uint64(s.stored.Load()), Identities: format.Tree{Top: s.identities.top, Height: s.identities.height},
		Dormant: dormant, Live: sized(c.state.Live, len(t.all)), Free: sized(c.state.Free, (len(t.all)+7)/8),
		Ages: sized(c.state.Ages, len(t.all)),
	}
	clear(r.Free)
	c.devices = s.deviceList()
	for i := range t.all {
		seg := &t.all[i]
		r.Live[i] = seg.live
		if seg.state == segmentSealed && seg.live == 0 && seg.pages == 0 {
			seg.state, seg.cut = segmentQuarantine, c.number
		}
		// Free once this checkpoint is durable, which is all that a start needs to know.
		if seg.state == segmentFree || seg.state == segmentQuarantine && seg.cut < c.number {
			r.Free[i/8] |= 1 << (i % 8)
		}
		r.Ages[i] = format.SegmentAge{Written: uint32(min(seg.lastSeq>>8, 1<<32-1)), Stream: seg.stream}
	}
	for _, v := range s.volumes {
		r.Volumes = append(r.Volumes, v.stored())
	}
	for _, n := range s.snapshots {
		r.Snapshots = append(r.Snapshots, n.stored())
	}
	c.state = r
	s.mu.Unlock()
	c.start <- struct{}{}
}

// checkpointLoop writes the checkpoints that are cut, and asks for one when the interval is over.
func (s *Store) checkpointLoop() {
	c := &s.ckpt
	tick := time.NewTicker(s.cfg.CheckpointInterval)
	defer tick.Stop()
	for {
		select {
		case _, ok := <-c.start:
			if !ok {
				return
			}
			s.runCheckpoint()
		case <-tick.C:
			if c.changed.Load() {
				c.mu.Lock()
				c.wanted = max(c.wanted, c.cuts+1)
				c.mu.Unlock()
				s.wake()
			}
		}
	}
}

// runCheckpoint writes the checkpoint that was cut, and says that it is through.
func (s *Store) runCheckpoint() {
	c := &s.ckpt
	err := s.failure()
	if err == nil {
		err = s.writeCheckpoint()
	}
	if err != nil {
		s.poison(fmt.Errorf("checkpoint %d: %w", c.number, err))
	} else {
		s.stats.checkpoints.Add(1)
	}
	c.mu.Lock()
	c.running = false
	if err == nil {
		c.done = c.number
	}
	c.cond.Broadcast()
	c.mu.Unlock()
	s.wake()
}

// wake makes the committer look again.
func (s *Store) wake() {
	s.queue.mu.Lock()
	s.queue.wake.Broadcast()
	s.queue.mu.Unlock()
}

// askCheckpoint has a checkpoint cut as soon as none is written.
func (s *Store) askCheckpoint() {
	c := &s.ckpt
	c.mu.Lock()
	ask := c.wanted <= c.cuts
	c.wanted = max(c.wanted, c.cuts+1)
	c.mu.Unlock()
	if ask {
		s.wake()
	}
}

// checkpoint returns when a checkpoint that was cut after the call is durable.
func (s *Store) checkpoint() error {
	c := &s.ckpt
	c.mu.Lock()
	target := c.cuts + 1
	c.wanted = max(c.wanted, target)
	c.mu.Unlock()
	s.wake()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.done < target {
		if err := s.failure(); err != nil {
			return err
		}
		if c.closed {
			return ErrClosed
		}
		c.cond.Wait()
	}
	return nil
}

func (s *Store) writeCheckpoint() error {
	c := &s.ckpt
	c.released = c.released[:0]
	if err := s.writePages(); err != nil {
		return err
	}
	s.mu.Lock()
	for _, id := range c.drops {
		s.setDir(id, format.DirEntry{})
	}
	for _, m := range c.moved {
		s.pg.entry(m.id).SetParents(m.parents)
		s.dirChanged(m.id)
	}
	dirs := int((c.pages + format.DirEntriesPerPage - 1) / format.DirEntriesPerPage)
	for len(c.dirAt) < dirs {
		c.dirAt = append(c.dirAt, format.Extent{})
		c.dirDirty = append(c.dirDirty, true)
	}
	s.mu.Unlock()
	if err := s.writeDirs(dirs); err != nil {
		return err
	}
	c.state.Version = s.rootVersion.Load()
	c.root = format.AppendRoot(c.root[:0], &c.state)
	c.root = format.AppendDirectory(c.root, c.pages, c.dirAt[:dirs])
	c.rootBytes.Store(int64(len(c.root)))
	extents, err := s.writeRoot()
	if err != nil {
		return err
	}
	if err := s.flushStream(&c.out); err != nil {
		return err
	}
	// DURABLE: what the pages of the cut tell of stands in the log, blocks included.
	if err := s.flushLog(); err != nil {
		return err
	}
	durable := s.flush.durable.Load()
	sb := s.pool
	sb.Sequence++
	sb.Previous, sb.PreviousCheckpoint = sb.Root, sb.Checkpoint
	sb.Checkpoint, sb.Root, sb.Durable = c.number, extents, durable
	c.super.Lock()
	if err = s.writeDevices(&sb); err == nil {
		s.pool = sb
	}
	c.super.Unlock()
	if err != nil {
		return err
	}

	s.mu.Lock()
	for _, x := range c.rootAt {
		s.segs.addRoot(x, -1)
	}
	c.rootAt = extents
	for _, seg := range c.released {
		s.segs.addPages(seg, -format.PageSize)
	}
	s.mu.Unlock()
	s.releaseQuarantine()
	return nil
}

// releaseQuarantine frees segments that entered quarantine at a cut before the
// one that is durable now.
// LIVE: neither this checkpoint nor the one before names them, replay of either
// begins behind them, and no reader is inside.
func (s *Store) releaseQuarantine() {
	for first, more := 0, true; more; first += segmentsHeld {
		s.mu.Lock()
		more = s.releaseSegments(first, first+segmentsHeld)
		s.mu.Unlock()
	}
}

// releaseSegments does that for segments [first, end) and says whether there are more. The
// caller holds Store.mu.
func (s *Store) releaseSegments(first, end int) (more bool) {
	c := &s.ckpt
	if s.scrub.halted.Load() {
		return false // a reference count was too low: nothing is reused until all are proved
	}
	given := 0
	for i := first; i < min(end, len(s.segs.all)); i++ {
		seg := &s.segs.all[i]
		if seg.state != segmentQuarantine || c.number <= seg.cut || seg.readers.Load() != 0 {
			continue
		}
		if seg.live != 0 || seg.pages != 0 {
			invariant("LIVE", "segment %d in quarantine has %d live bytes", i, seg.live+seg.pages)
		}
		s.segs.setFree(uint32(i))
		given++
		if s.cfg.Discard {
			d, off := s.segs.locate(format.MakeAddr(uint32(i), 0))
			// A hint: a device that cannot has lost nothing.
			_ = d.Discard(off, int64(s.segs.bytes))
		}
	}
	s.gave(given)
	return end < len(s.segs.all)
}

// sized is a list of n elements, in the memory of an earlier one if that has room.
func sized[T any](list []T, n int) []T {
	if n <= cap(list) {
		return list[:n]
	}
	return make([]T, n)
}

// setDir gives a page a new place and releases the old one when the checkpoint
// is durable. The caller holds Store.mu.
func (s *Store) setDir(id uint32, e format.DirEntry) {
	c := &s.ckpt
	d := s.pg.entry(id)
	if d.Addr != 0 {
		c.released = append(c.released, d.Addr.Segment())
	}
	*d = e
	s.dirChanged(id)
}

// dirChanged has the directory page of a page's entry written by the running checkpoint.
func (s *Store) dirChanged(id uint32) {
	c := &s.ckpt
	if j := int(id / format.DirEntriesPerPage); j < len(c.dirDirty) {
		c.dirDirty[j] = true
	}
}

// stagePages is how many pages go into one commit.
func (s *Store) stagePages() int {
	return min(pagesPerCommit, int(s.segs.bytes/format.PageSize)-2)
}

// fitPages is stagePages or what the stream's segment has room for beside header and
// parity, if that is worth a write.
func (s *Store) fitPages() int {
	if n := s.roomIn(&s.ckpt.out)/format.PageSize - 2; n >= 4 {
		return min(n, s.stagePages())
	}
	return s.stagePages()
}

func (s *Store) writePages() error {
	c := &s.ckpt
	pg := s.pg
	for at := 0; at < len(c.list); at += len(c.taken) {
		c.taken = append(c.taken[:0], c.list[at:min(at+s.fitPages(), len(c.list))]...)
		s.mu.Lock()
		for i, id := range c.taken {
			p := pg.page(id)
			to := c.buf[(i+1)*format.PageSize : (i+2)*format.PageSize]
			switch {
			case p.old != 0:
				copy(to, pg.mem(p.old))
				pg.release(p.old)
				p.old = 0
			case p.flags&pageCut != 0:
				copy(to, pg.mem(p.frame))
				p.flags = p.flags&^pageCut | pageStaged
			default:
				invariant("REFS", "page %d of the cut is gone", id)
			}
		}
		s.mu.Unlock()
		base, err := s.writeStaged(format.RecordPages, c.taken)
		if err != nil {
			return err
		}
		s.mu.Lock()
		for i, id := range c.taken {
			p := pg.page(id)
			p.flags &^= pageStaged
			to := c.buf[(i+1)*format.PageSize : (i+2)*format.PageSize]
			e := format.DirEntry{Addr: base + format.Addr(i*format.PageSize), Sum: c.sums[i], Kind: p.kind}
			e.SetParents(c.parents[at+i])
			if p.kind == format.EntryPage {
				e.SetCount(countPage(p.kind, to))
			}
			s.setDir(id, e)
			s.segs.addPages(base.Segment(), format.PageSize)
		}
		s.mu.Unlock()
		c.pending.Add(-int64(len(c.taken)))
		s.stats.checkpointPages.Add(int64(len(c.taken)))
	}
	return nil
}

// writeStaged commits the pages in the staging buffer, from its second page on,
// and returns where the first one stands.
func (s *Store) writeStaged(kind format.RecordKind, ids []uint32) (format.Addr, error) {
	c := &s.ckpt
	n := len(ids)
	rec := c.buf[format.CommitHeaderSize:]
	format.PutList(rec, kind, n)
	c.sums = c.sums[:0]
	for i, id := range ids {
		c.sums = append(c.sums, format.Checksum(c.buf[(i+1)*format.PageSize:(i+2)*format.PageSize]))
		format.PutPageEntry(rec, i, id, c.sums[i])
	}
	size := format.ListFixed + n*format.PageEntrySize
	clear(c.buf[format.CommitHeaderSize+size : format.PageSize])
	putParity(c.buf, n+1)
	base, err := s.writeStream(&c.out, c.buf, size, format.PageSize, (n+1)*format.PageSize)
	return base + format.PageSize, err
}

func (s *Store) writeDirs(dirs int) error {
	c := &s.ckpt
	for j := 0; j < dirs; {
		c.taken = c.taken[:0]
		limit := s.fitPages()
		s.mu.RLock()
		for ; j < dirs && len(c.taken) < limit; j++ {
			if !c.dirDirty[j] {
				continue
			}
			c.taken = append(c.taken, uint32(j))
			first := j * format.DirEntriesPerPage
			entries := s.pg.dir[first/pagesPerPart][first%pagesPerPart:][:format.DirEntriesPerPage]
			format.PutDirPage(c.buf[len(c.taken)*format.PageSize:][:format.PageSize], entries)
		}
		s.mu.RUnlock()
		if len(c.taken) == 0 {
			break
		}
		base, err := s.writeStaged(format.RecordDirs, c.taken)
		if err != nil {
			return err
		}
		s.mu.Lock()
		for i, d := range c.taken {
			if old := c.dirAt[d]; old.Addr != 0 {
				c.released = append(c.released, old.Addr.Segment())
			}
			c.dirAt[d] = format.Extent{Addr: base + format.Addr(i*format.PageSize), Len: format.PageSize, Sum: c.sums[i]}
			c.dirDirty[d] = false
			s.segs.addPages(base.Segment(), format.PageSize)
		}
		s.mu.Unlock()
	}
	return nil
}

// writeRoot stores the root in parts and returns their places.
func (s *Store) writeRoot() (extents []format.Extent, err error) {
	c := &s.ckpt
	part := s.stagePages() * format.PageSize
	parts := (len(c.root) + part - 1) / part
	if format.RootExtentsMax < parts {
		return nil, fmt.Errorf("root of %d bytes does not fit: %w", len(c.root), format.ErrInvalid)
	}
	for i := range parts {
		p := c.root[i*part : min((i+1)*part, len(c.root))]
		copy(c.buf[format.PageSize:], p)
		format.PutRootRecord(c.buf[format.CommitHeaderSize:], i, parts)
		clear(c.buf[format.CommitHeaderSize+format.ListFixed : format.PageSize])
		pages := 1 + roundUp(len(p))/format.PageSize
		clear(c.buf[format.PageSize+len(p) : pages*format.PageSize])
		putParity(c.buf, pages)
		base, err := s.writeStream(&c.out, c.buf, format.ListFixed, format.PageSize, pages*format.PageSize)
		if err != nil {
			return nil, err
		}
		x := format.Extent{Addr: base + format.PageSize, Len: uint32(len(p)), Sum: format.Checksum(p)}
		extents = append(extents, x)
		s.mu.Lock()
		s.segs.addRoot(x, 1)
		s.mu.Unlock()
	}
	return extents, nil
}
