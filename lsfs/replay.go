package lsfs

import (
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// logReader reads commits back. Its window makes small commits one read for many.
type logReader struct {
	s       *Store
	buf     []byte // aligned
	segment uint32
	off, n  uint32 // what of the segment is in buf
	ahead   uint32 // read at a time at least; 0: readAhead

	// A page that was made again from parity and is read in the place of the damaged one.
	patch   []byte
	patchAt format.Addr
}

const readAhead = 256 << 10

// bytes returns n bytes at an offset of a segment, valid until the next call.
func (r *logReader) bytes(segment, off, n uint32) ([]byte, error) {
	if r.n == 0 || r.segment != segment || off < r.off || r.off+r.n < off+n {
		from := off &^ (format.PageSize - 1)
		ahead := r.ahead
		if ahead == 0 {
			ahead = readAhead
		}
		want := min(max(roundUp(off+n-from), ahead), r.s.segs.bytes-from)
		d, at := r.s.segs.locate(format.MakeAddr(segment, from))
		r.n = 0
		if err := d.ReadAt(r.buf[:want], at); err != nil {
			return nil, fmt.Errorf("read the log: %w", err)
		}
		r.segment, r.off, r.n = segment, from, want
		if at := r.patchAt.Offset(); r.patch != nil && r.patchAt.Segment() == segment && from <= at && at < from+want {
			copy(r.buf[at-from:], r.patch)
		}
	}
	return r.buf[off-r.off : off-r.off+n], nil
}

// header reads the commit header at an offset. ok is false when there is none that parses.
func (r *logReader) header(segment, off uint32, c *format.Commit) (ok bool, err error) {
	if r.s.segs.bytes-off < format.PageSize {
		return false, nil
	}
	b, err := r.bytes(segment, off, format.PageSize)
	if err != nil {
		return false, err
	}
	return format.ParseCommit(b, c, r.s.id, segment, off, r.s.segs.bytes) == nil, nil
}

// heal makes the first page of the commit at a place again, where the log has lost one
// that was durable. It says whether the log can go on there.
func (r *logReader) heal(segment, off uint32, seq uint64, previous [16]byte) bool {
	s := r.s
	if r.patch == nil {
		r.patch = make([]byte, format.PageSize)
	}
	at := format.MakeAddr(segment, off)
	var c format.Commit
	if !s.rebuildHeader(r.patch, segment, off, &c) || c.Seq != seq || c.Previous != previous {
		r.patchAt = 0
		return false
	}
	r.patchAt, r.n = at, 0
	_ = s.report(s.corrupt("commit", at, 0, 0, fmt.Errorf("commit %d is damaged, and was made again from parity: %w", seq, format.ErrInvalid)))
	s.stats.rebuilt.Add(1)
	s.ckpt.changed.Store(true)
	return true
}

// records reads and checks the records of a commit whose header was read: header
// and records together, for the hash.
func (r *logReader) records(c *format.Commit) (all []byte, ok bool, err error) {
	all, err = r.bytes(c.Segment, c.Offset, format.CommitHeaderSize+c.RecordBytes)
	if err != nil {
		return nil, false, err
	}
	return all, format.Checksum(all[format.CommitHeaderSize:]) == c.RecordSum, nil
}

// replay brings the state of the root to the end of the log.
//
// The log goes on in the segment of pos or at the start of the next one; when
// both hold a commit of the wanted sequence, the next segment is right: a start
// after a crash always goes on there, and what stands in the old one was cut off
// before. The first commit that is missing or damaged ends the log if it can be one
// that was never flushed: nothing says that it was durable. Else it is corruption,
// and the store does not start. Behind the end there may be commits that are whole:
// they were not flushed either, and a device keeps what it likes.
func (s *Store) replay(pos format.Position, progress uint64) (format.Position, error) {
	r := &logReader{s: s, buf: device.AlignedBuffer(int(s.commitMax) + readAhead)}
	defer device.FreeAligned(r.buf)
	w := &window{}
	var c, successor format.Commit
	var successorOK bool
	var healed uint64 // sequence of the last commit that was tried to be made again
	var err error
	look := func() error {
		if pos.Next == format.NoSegment || !s.segs.exists(pos.Next) {
			return fmt.Errorf("replay: segment %d is followed by segment %d, which does not exist: %w", pos.Segment, pos.Next, format.ErrInvalid)
		}
		successorOK, err = r.header(pos.Next, 0, &successor)
		return err
	}
	if err := look(); err != nil {
		return pos, err
	}
	// next finds the header of the commit after pos.
	next := func(c *format.Commit) (bool, error) {
		if successorOK && successor.Seq == pos.Seq+1 && successor.Previous == pos.Hash {
			*c = successor
			return true, nil
		}
		if pos.Segment == format.NoSegment {
			return false, nil
		}
		ok, err := r.header(pos.Segment, pos.Offset, c)
		return ok && c.Generation == pos.Generation && c.Seq == pos.Seq+1 && c.Previous == pos.Hash, err
	}
	for {
		ok, err := next(&c)
		if err != nil {
			return pos, err
		}
		known := s.pool.Durable
		if ok {
			known = max(known, c.Durable)
		}
		if !ok || w.full() {
			if end, err := s.replayWindow(r, w, known); err != nil {
				return pos, err
			} else if end != nil {
				return *end, s.endOfLog(r, *end)
			}
		}
		var all []byte
		if ok {
			if all, ok, err = r.records(&c); err != nil {
				return pos, err
			}
		}
		if !ok && pos.Seq < s.pool.Durable && healed != pos.Seq+1 {
			healed = pos.Seq + 1
			if pos.Segment != format.NoSegment && pos.Offset < s.segs.bytes && r.heal(pos.Segment, pos.Offset, healed, pos.Hash) {
				continue
			}
			if r.heal(pos.Next, 0, healed, pos.Hash) {
				if err := look(); err != nil {
					return pos, err
				}
				continue
			}
		}
		if !ok {
			if end, err := s.replayWindow(r, w, known); err != nil {
				return pos, err
			} else if end != nil {
				pos = *end
			}
			return pos, s.endOfLog(r, pos)
		}
		after := format.Position{Segment: c.Segment, Generation: c.Generation, Offset: c.Offset + c.Total, Next: c.Next, Seq: c.Seq, Hash: s.log.chain(all)}
		s.scratch = append(s.scratch[:0], all[format.CommitHeaderSize:]...)
		was := pos
		pos = after
		if was.Segment != c.Segment {
			if err := look(); err != nil {
				return was, err
			}
		}
		w.add(&c, was, s.scratch, progress)
		progress = 0
	}
}

// window holds commits that were found whole and are not applied yet: what they need
// of pages is read for all of them at once.
type window struct {
	commits []windowed
	records []byte
}

type windowed struct {
	commit   format.Commit
	before   format.Position
	from, to int // of its records
	progress uint64
}

// A window of windowBytes of records is some 1200 writes of one block, with twice as many pages.
const (
	windowCommits = 1024
	windowBytes   = 128 << 10
)

func (w *window) full() bool {
	return windowCommits <= len(w.commits) || windowBytes <= len(w.records)
}

func (w *window) add(c *format.Commit, before format.Position, records []byte, progress uint64) {
	from := len(w.records)
	w.records = append(w.records, records...)
	w.commits = append(w.commits, windowed{*c, before, from, len(w.records), progress})
}

// replayWindow applies what is in the window, and empties it. known is a commit that was
// durable. Of those behind it, and behind what the commits say themselves, the payload
// may be torn: the first that is not whole ends the log where end says.
func (s *Store) replayWindow(r *logReader, w *window, known uint64) (end *format.Position, err error) {
	for i := range w.commits {
		known = max(known, w.commits[i].commit.Durable)
	}
	for i := range w.commits {
		x := &w.commits[i]
		if x.commit.Seq <= known {
			continue
		}
		if whole, err := s.payloadIntact(r, &x.commit, w.records[x.from:x.to]); err != nil {
			return nil, err
		} else if !whole {
			at := x.before
			end, w.commits = &at, w.commits[:i]
			break
		}
	}
	var all [][]byte
	for i := range w.commits {
		x := &w.commits[i]
		all = append(all, w.records[x.from:x.to])
	}
	s.prefetchRecords(all)
	for i := range w.commits {
		x := &w.commits[i]
		s.scratch = append(s.scratch[:0], all[i]...)
		if err := s.replayCommit(&x.commit, x.progress); err != nil {
			return nil, fmt.Errorf("replay commit %d: %w", x.commit.Seq, err)
		}
		s.visit(x.commit.Segment)
		s.stats.ops.Add(int64(x.commit.Records))
	}
	w.commits, w.records = w.commits[:0], w.records[:0]
	return end, nil
}

// replayCommit applies the records in s.scratch.
func (s *Store) replayCommit(c *format.Commit, progress uint64) error {
	s.nextRound()
	rest := s.scratch
	for range c.Records {
		r, more, err := format.NextRecord(rest)
		if err != nil {
			return err
		}
		if err := s.apply(r, false, progress, nil); err != nil {
			return err
		}
		if r.Kind < format.RecordPages {
			s.ckpt.changed.Store(true)
		}
		rest = more
	}
	if len(rest) != 0 {
		return fmt.Errorf("%d bytes behind the records: %w", len(rest), format.ErrInvalid)
	}
	return nil
}

// claim marks a segment that holds pages of the checkpoint: they were written after the
// cut, which may have counted it as free.
func (s *Store) claim(a format.Addr) {
	if n := a.Segment(); s.segs.all[n].state == segmentFree {
		s.segs.unfree(n)
		s.segs.all[n].state, s.segs.all[n].stream = segmentSealed, streamPages
	}
}

// visit marks a segment that the log went through.
func (s *Store) visit(n uint32) {
	seg := &s.segs.all[n]
	if seg.state == segmentFree {
		s.segs.unfree(n)
	}
	seg.state = segmentSealed
	s.visited[n] = true
}

// payloadIntact checks the stored blocks of a commit that may have been torn. rest is
// its records.
func (s *Store) payloadIntact(r *logReader, c *format.Commit, rest []byte) (bool, error) {
	base := format.MakeAddr(c.Segment, c.Offset)
	good := func(a format.Addr, n uint16, sum uint32) (bool, error) {
		if a < base || base+format.Addr(c.Total) < a+format.Addr(n) {
			return false, nil
		}
		p, err := r.bytes(c.Segment, a.Offset(), uint32(n))
		return err == nil && dedup.Sum(p) == sum, err
	}
	for len(rest) > 0 {
		rec, more, err := format.NextRecord(rest)
		if err != nil {
			return false, nil
		}
		rest = more
		switch rec.Kind {
		case format.RecordWrite, format.RecordCopy:
			var e format.BlockEntry
			for i := range int(rec.Op().Count) {
				if rec.Block(i, &e); e.BID == 0 || e.Ref {
					continue
				}
				if ok, err := good(e.Addr, e.Len, e.Sum); !ok || err != nil {
					return false, err
				}
			}
		case format.RecordMove:
			var m format.Move
			for i := range rec.Count() {
				rec.Move(i, &m)
				if m.New.Segment() != c.Segment {
					continue // it was durable in its stream before the record was written
				}
				if ok, err := good(m.New, m.Len, m.Sum); !ok || err != nil {
					return false, err
				}
			}
		}
	}
	return true, nil
}

// endOfLog says whether the log may end at pos: nil, or a CorruptError when
// something proves that the commit after pos was durable.
func (s *Store) endOfLog(r *logReader, pos format.Position) error {
	missing := pos.Seq + 1
	at := format.MakeAddr(pos.Next, 0)
	if pos.Segment != format.NoSegment {
		at = format.MakeAddr(pos.Segment, pos.Offset)
	}
	if missing <= s.pool.Durable {
		return s.report(s.corrupt("commit", at, 0, 0, fmt.Errorf("commit %d is damaged, the superblock proves that commit %d was durable: %w", missing, s.pool.Durable, format.ErrInvalid)))
	}
	var c format.Commit
	search := func(segment, from uint32, generation bool) error {
		for off := from; off < s.segs.bytes; off += format.PageSize {
			ok, err := r.header(segment, off, &c)
			if err != nil {
				return err
			}
			if !ok || generation && c.Generation != pos.Generation {
				continue
			}
			if missing <= c.Durable {
				return s.report(s.corrupt("commit", at, 0, 0, fmt.Errorf("commit %d is damaged, commit %d at segment %d offset %d proves that it was durable: %w", missing, c.Seq, segment, off, format.ErrInvalid)))
			}
		}
		return nil
	}
	if pos.Segment != format.NoSegment && pos.Offset < s.segs.bytes {
		if err := search(pos.Segment, pos.Offset, true); err != nil {
			return err
		}
	}
	return search(pos.Next, 0, false)
}

// loadRoot reads what a checkpoint holds, or the empty state of a new pool, and sets
// the store up for replay.
func (s *Store) loadRoot(checkpoint uint64, extents []format.Extent) (*format.Root, error) {
	t := s.segs
	if len(extents) == 0 {
		for n := range t.all {
			if t.all[n].state != segmentGone {
				t.all[n].state = segmentFree
			}
		}
		t.all[0].state = segmentNext
		t.recount()
		return &format.Root{Position: format.Position{Segment: format.NoSegment, Next: 0}, NextBID: 1}, nil
	}
	var raw []byte
	buf := device.AlignedBuffer(int(t.bytes))
	defer device.FreeAligned(buf)
	for _, x := range extents {
		if !t.valid(x.Addr, roundUp(x.Len)) {
			return nil, s.report(s.corrupt("root", x.Addr, x.Sum, 0, format.ErrInvalid))
		}
		d, off := t.locate(x.Addr)
		if err := d.ReadAt(buf[:roundUp(x.Len)], off); err != nil {
			return nil, s.report(s.corrupt("root", x.Addr, x.Sum, 0, err))
		}
		if sum := format.Checksum(buf[:x.Len]); sum != x.Sum {
			if err := s.report(s.corrupt("root", x.Addr, x.Sum, sum, nil)); !s.rebuildRoot(buf[:roundUp(x.Len)], x) {
				return nil, err
			}
		}
		raw = append(raw, buf[:x.Len]...)
	}
	root, err := format.ParseRoot(raw)
	if err != nil {
		return nil, err
	}
	p := &root.Position
	if len(root.Live) != len(t.all) || root.Checkpoint != checkpoint ||
		p.Segment != format.NoSegment && !t.exists(p.Segment) || !t.exists(p.Next) {
		return nil, fmt.Errorf("root: checkpoint %d of %d segments does not fit the pool: %w", root.Checkpoint, len(root.Live), format.ErrInvalid)
	}
	s.nextBID, s.newest = BID(BID(root.NextBID).slot()), BID(root.NextBID).generation()
	s.stored.Store(int64(root.Stored))
	s.identities = tree{root.Identities.Top, root.Identities.Height}
	for i := range t.all {
		seg := &t.all[i]
		if seg.state == segmentGone {
			if root.Live[i] != 0 {
				return nil, fmt.Errorf("root: segment %d of no device has %d live bytes: %w", i, root.Live[i], format.ErrInvalid)
			}
			continue
		}
		if seg.live = root.Live[i]; seg.live > 0 {
			t.live.Add(int64(seg.live))
			t.data.Add(int64(seg.live))
		}
		seg.state = segmentSealed
		if root.Free[i/8]&(1<<(i%8)) != 0 {
			seg.state = segmentFree
		}
		if i < len(root.Ages) {
			seg.lastSeq, seg.stream = uint64(root.Ages[i].Written)<<8, root.Ages[i].Stream
		}
	}
	t.recount()
	if p.Segment != format.NoSegment {
		s.visit(p.Segment)
	}
	for _, x := range extents {
		s.claim(x.Addr)
		t.addRoot(x, 1)
	}
	c := &s.ckpt
	c.rootAt = extents
	c.dirAt = root.Directory
	c.dirDirty = make([]bool, len(root.Directory))
	c.number, c.cuts, c.done, c.wanted = root.Checkpoint, root.Checkpoint, root.Checkpoint, root.Checkpoint
	if err := s.loadDirectory(root); err != nil {
		return nil, err
	}
	for i := range root.Volumes {
		v := volumeOf(s, &root.Volumes[i])
		s.volumes[v.id] = v
	}
	for i := range root.Snapshots {
		n := snapshotOf(s, &root.Snapshots[i])
		s.snapshots[n.content.id] = n
	}
	return root, nil
}

// loadDirectory reads the page directory, runs of neighbours at once.
func (s *Store) loadDirectory(root *format.Root) error {
	pg, t := s.pg, s.segs
	pg.n = max(root.Pages, 1)
	pg.grow(pg.n)
	if err := s.loadDirPages(root.Directory); err != nil {
		return err
	}
	for id := uint32(1); id < pg.n; id++ {
		e := pg.entry(id)
		if e.Addr == 0 {
			pg.ids = append(pg.ids, id)
			continue
		}
		if !t.valid(e.Addr, format.PageSize) || e.Kind != format.WordPage && e.Kind != format.EntryPage || e.Parents() == 0 {
			return fmt.Errorf("page directory: page %d at %x of kind %d with %d parents: %w", id, uint64(e.Addr), e.Kind, e.Parents(), format.ErrInvalid)
		}
		p := pg.page(id)
		p.kind, p.flags, p.parents = e.Kind, pageAlive, e.Parents()
		if e.Kind == format.EntryPage {
			p.count = uint16(e.Count())
			pg.nEntries.Add(1)
		}
		if p.parents > 1 {
			pg.shared.Add(1)
			pg.crowd.Store(max(pg.crowd.Load(), p.parents))
		}
		pg.nAlive.Add(1)
		s.claim(e.Addr)
		t.addPages(e.Addr.Segment(), format.PageSize)
	}
	return nil
}

// loadDirPages reads directory pages: runs of neighbours at once, and many runs.
func (s *Store) loadDirPages(dirs []format.Extent) error {
	const runMax, runs = 16, 64
	buf := device.AlignedBuffer(runs * runMax * format.PageSize)
	defer device.FreeAligned(buf)
	reads := make([]device.Read, runs)
	first := make([]int, 0, runs)
	batch := make([]*device.Read, 0, runs)
	for j := 0; j < len(dirs); {
		first, batch = first[:0], batch[:0]
		for len(batch) < runs && j < len(dirs) {
			n := 1
			for j+n < len(dirs) && n < runMax && dirs[j+n].Addr == dirs[j].Addr+format.Addr(n*format.PageSize) {
				n++
			}
			if !s.segs.valid(dirs[j].Addr, uint32(n*format.PageSize)) {
				return s.report(s.corrupt("page", dirs[j].Addr, dirs[j].Sum, 0, format.ErrInvalid))
			}
			i := len(batch)
			reads[i].Device, reads[i].Off = s.segs.locate(dirs[j].Addr)
			reads[i].P = buf[i*runMax*format.PageSize:][:n*format.PageSize]
			first, batch = append(first, j), append(batch, &reads[i])
			j += n
		}
		_ = s.reads.ReadBatch(batch) // each read says for itself
		for i, r := range batch {
			for k := 0; k*format.PageSize < len(r.P); k++ {
				if err := s.loadDirPage(first[i]+k, dirs[first[i]+k], r.P[k*format.PageSize:(k+1)*format.PageSize], r.Err); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// loadDirPage takes directory page j, which was read into p.
func (s *Store) loadDirPage(j int, x format.Extent, p []byte, err error) error {
	if sum := format.Checksum(p); err != nil || sum != x.Sum {
		if err := s.repairPage(p, x.Addr, x.Sum, s.report(s.corrupt("page", x.Addr, x.Sum, sum, err))); err != nil {
			return err
		}
		s.ckpt.dirDirty[j] = true
	}
	first := j * format.DirEntriesPerPage
	format.ParseDirPage(p, s.pg.dir[first/pagesPerPart][first%pagesPerPart:][:format.DirEntriesPerPage])
	s.claim(x.Addr)
	s.segs.addPages(x.Addr.Segment(), format.PageSize)
	return nil
}

// recover loads the newest checkpoint and replays the log behind it.
//
// When that finds damage it is done again from the checkpoint before: its pages and all of
// the log since stand where they stood (LIVE keeps what either of the two needs), so
// if the log from there on is whole nothing is lost. What a damaged root names is not
// believed: the next checkpoint writes the whole way to it afresh where it differs.
func (s *Store) recover() error {
	first := s.recoverFrom(s.pool.Checkpoint, s.pool.Root)
	var damage *CorruptError
	if !errors.As(first, &damage) || len(s.pool.Previous) == 0 {
		return first
	}
	s.forget()
	if err := s.recoverFrom(s.pool.PreviousCheckpoint, s.pool.Previous); err != nil {
		s.logger.Error("the checkpoint before does not help", "checkpoint", s.pool.PreviousCheckpoint, "err", err)
		return first
	}
	s.logger.Warn("the newest checkpoint is damaged, the one before and the log were used", "checkpoint", s.pool.Checkpoint, "previous", s.pool.PreviousCheckpoint, "err", first)
	s.cfg.Event(Event{Code: "root-fallback", Text: fmt.Sprintf("checkpoint %d is damaged: the pool was opened from checkpoint %d and the log behind it, nothing is lost; a device may be failing (%v)", s.pool.Checkpoint, s.pool.PreviousCheckpoint, first)})
	// The next superblock names the root that was good as the one before.
	s.pool.Checkpoint, s.pool.Root = s.pool.PreviousCheckpoint, s.pool.Previous
	return nil
}

// forget puts the store back to how it was before recoverFrom.
func (s *Store) forget() {
	s.segs.reset()
	clear(s.visited)
	s.pg.close()
	s.pg = newPager(s.cfg.MetadataBytes)
	clear(s.volumes)
	s.identities, s.nextBID, s.newest = tree{}, 0, 0
	s.stored.Store(0)
	s.ckpt.dirAt, s.ckpt.dirDirty, s.ckpt.rootAt = nil, nil, nil
	s.ckpt.changed.Store(false)
	s.stats.ops.Store(0)
}

// recoverFrom loads one checkpoint and replays the log behind it.
func (s *Store) recoverFrom(checkpoint uint64, extents []format.Extent) error {
	s.replaying = true
	defer func() { s.replaying = false }()
	root, err := s.loadRoot(checkpoint, extents)
	if err != nil {
		return err
	}
	// The root before may be older than this one, and is what a start falls back to.
	s.rootVersion.Store(max(s.cfg.RootVersion, root.Version))
	from := checkpoint + 1
	if root.Version < rootOfGroups {
		from++
	}
	s.groupsFrom(from)
	s.nextBID = max(s.nextBID, 1)
	pos, err := s.replay(root.Position, root.Progress)
	if err != nil {
		return err
	}
	for _, d := range root.Dormant {
		b := BID(d)
		s.nextRound()
		for {
			s.mu.Lock()
			_, _, missing := s.entryOf(b)
			if missing == 0 {
				s.reapDormant(b)
			}
			s.mu.Unlock()
			if missing == 0 {
				break
			}
			if err := s.fault(missing, true); err != nil {
				return err
			}
		}
	}
	// The log goes on in a segment that holds nothing of what may have been in flight.
	if n := &s.segs.all[pos.Next]; n.state == segmentFree {
		s.segs.unfree(pos.Next)
	}
	s.segs.all[pos.Next].state = segmentNext
	pos.Segment, pos.Offset = format.NoSegment, 0
	s.log.moveTo(pos)
	s.flush.written = pos.Seq
	s.flush.durable.Store(pos.Seq)
	for i := range s.segs.all {
		seg := &s.segs.all[i]
		if len(root.Ages) == 0 || s.visited[i] {
			seg.lastSeq = pos.Seq
		}
		if seg.state == segmentSealed && seg.live == 0 && seg.pages == 0 && !s.visited[i] {
			seg.state, seg.cut = segmentQuarantine, root.Checkpoint
		}
	}
	for _, v := range s.volumes {
		v.settle()
	}
	s.abandonForged()
	if s.ckpt.changed.Load() {
		s.logger.Info("store recovered", "commits", pos.Seq-root.Position.Seq, "seq", pos.Seq, "checkpoint", root.Checkpoint)
		s.cfg.Event(Event{Code: "recovered", Text: fmt.Sprintf("%d commits replayed after checkpoint %d", pos.Seq-root.Position.Seq, root.Checkpoint)})
	}
	return nil
}
