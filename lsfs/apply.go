package lsfs

import (
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

// unmapSlice bounds the blocks that are unmapped under one hold of the lock, and
// the size above which an unmap is applied in slices: 8 pages of the map, and
// at worst 16 MiB of identity pages.
const unmapSlice = 8 * format.WordsPerPage

// apply makes one logged record true. It is the only way in which the store
// changes, live and in replay, so the two cannot drift. from is the number of
// blocks of a huge unmap or clone that are done already. cut is called between slices.
//
// All pages are made resident first and are held until the round ends, so
// nothing can fail once something has changed. held says that this was done.
func (s *Store) apply(r format.Record, held bool, from uint64, cut func(done uint64) error) error {
	switch r.Kind {
	case format.RecordUnmap, format.RecordTrim:
		return s.applyUnmap(r, from, cut)
	case format.RecordClone:
		return s.applyClone(r, from, cut)
	case format.RecordSnapshot, format.RecordRollback, format.RecordFrom, format.RecordForge, format.RecordSeal:
		return s.applySharing(r)
	case format.RecordShed:
		return s.applyShed(r)
	case format.RecordGone:
		return s.applyGone(r)
	case format.RecordPages, format.RecordDirs, format.RecordRoot:
		return nil
	}
	if !held {
		if err := s.require(r); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Kind {
	case format.RecordWrite, format.RecordCopy:
		return s.applyWrite(r)
	case format.RecordMove:
		s.applyMove(r)
		return nil
	case format.RecordMerge:
		return s.applyMerge(r)
	}
	return s.applyVolume(r)
}

// require makes the pages that a record needs resident and holds them.
func (s *Store) require(r format.Record) error {
	for {
		s.missing = s.missing[:0]
		s.mu.RLock()
		err := s.scan(r)
		s.mu.RUnlock()
		if err != nil || len(s.missing) == 0 {
			return err
		}
		if err := s.faultAll(s.missing, true); err != nil {
			return err
		}
	}
}

// scan holds the resident pages of a record and collects the missing ones.
func (s *Store) scan(r format.Record) error {
	switch r.Kind {
	case format.RecordWrite, format.RecordCopy:
		h := r.Op()
		v, err := s.target(r.Kind, h)
		if err != nil {
			return err
		}
		s.scanRange(v, h.Start, h.Start+uint64(h.Count), parentsMax)
		s.scanVersions(v, h)
		last := ^uint64(0)
		for i := range int(h.Count) {
			if b := BID(r.BlockBID(i)); b != 0 && b.slot()/format.EntriesPerPage != last {
				s.scanIdentity(b)
				last = b.slot() / format.EntriesPerPage
			}
		}
	case format.RecordMove:
		var m format.Move
		for i := range r.Count() {
			r.Move(i, &m)
			s.scanIdentity(BID(m.BID))
		}
	case format.RecordMerge:
		s.scanMerge(r)
	default:
		s.scanSharing(r)
	}
	return nil
}

func (s *Store) need(missing uint32) {
	if len(s.missing) < cap(s.missing) {
		s.missing = append(s.missing, missing)
	}
}

// scanPath holds the path to index i of a tree.
func (s *Store) scanPath(t tree, shift uint, i uint64) (data []byte, span uint, ok bool) {
	if t.top == 0 {
		return nil, 64, true
	}
	span = shift + 9*uint(t.height-1)
	if i>>span != 0 {
		s.pg.hold(t.top)
		if s.pg.data(t.top) == nil {
			s.need(t.top)
			return nil, 0, false
		}
		return nil, 64, true
	}
	id := t.top
	for {
		if data = s.pg.data(id); data == nil {
			s.need(id)
			return nil, 0, false
		}
		s.pg.hold(id)
		if span == shift {
			return data, shift, true
		}
		span -= 9
		w := format.Word(data, int(i>>span)&(format.WordsPerPage-1))
		if w == 0 {
			return nil, span, true
		}
		id = uint32(w)
	}
}

func (s *Store) scanIdentity(b BID) { s.scanPath(s.identities, entryShift, b.slot()) }

// scanInner holds the path to the leaf of index i of a map, but not the leaf, whose
// id it returns: 0 when there is none. shared says that a page above it has more than
// one parent.
func (s *Store) scanInner(t tree, i uint64) (leaf uint32, span uint, shared, ok bool) {
	if t.top == 0 {
		return 0, 64, false, true
	}
	if span = wordShift + 9*uint(t.height-1); i>>span != 0 {
		return 0, 64, false, true
	}
	id := t.top
	for ; span > wordShift; id = leaf {
		data := s.pg.data(id)
		if data == nil {
			s.need(id)
			return 0, 0, false, false
		}
		s.pg.hold(id)
		shared = shared || s.pg.page(id).parents > 1
		span -= 9
		w := format.Word(data, int(i>>span)&(format.WordsPerPage-1))
		if w == 0 {
			return 0, span, shared, true
		}
		leaf = uint32(w)
	}
	return id, wordShift, shared, true
}

// scanRange holds the map pages of a range and the identity pages of what is mapped
// there. A shared leaf that lies there in part will be copied, so all its identities
// are held. One that lies there wholly will leave the map, and nothing of it is
// needed unless that may be its last parent: when it has no more than slots, which
// is how many may go between this scan and the change, and what is above it is not
// shared. (Then it gets another parent first. In a batch others may undo that: slots
// is parentsMax, and everything is held.)
func (s *Store) scanRange(v *Volume, start, end uint64, slots uint32) {
	for i := start; i < end; {
		leaf, span, shared, ok := s.scanInner(v.mapTree, i)
		from, stop := i, min(end, nextSpan(i, max(span, wordShift)))
		i = stop
		if !ok || leaf == 0 {
			continue
		}
		if p := s.pg.page(leaf); p.parents > 1 || shared {
			whole := from%format.WordsPerPage == 0 && stop == nextSpan(from, wordShift)
			if whole && (p.parents > slots || shared && slots != parentsMax) && p.flags&pageCounted != 0 {
				continue
			}
			from, stop = from&^(format.WordsPerPage-1), nextSpan(from, wordShift)
		}
		s.scanWords(leaf, from, stop)
	}
}

// scanWords holds a leaf and the identity pages of blocks [from, to) of it.
func (s *Store) scanWords(leaf uint32, from, to uint64) {
	data := s.pg.data(leaf)
	if data == nil {
		s.need(leaf)
		return
	}
	s.pg.hold(leaf)
	last := ^uint64(0)
	for ; from < to; from++ {
		b := BID(format.Word(data, int(from)&(format.WordsPerPage-1)))
		if b != 0 && b.slot()/format.EntriesPerPage != last {
			s.scanIdentity(b)
			last = b.slot() / format.EntriesPerPage
		}
	}
}

// nextSpan is the first index behind the aligned run of 1<<span around i.
func nextSpan(i uint64, span uint) uint64 {
	if span >= 64 {
		return ^uint64(0)
	}
	return (i>>span + 1) << span
}

func (s *Store) scanVersions(v *Volume, h format.OpHead) {
	if h.Count == 0 {
		return
	}
	for c := h.Start >> chunkShift; c <= (h.Start+uint64(h.Count)-1)>>chunkShift; c = nextSpan(c, wordShift) {
		s.scanPath(v.versions, wordShift, c)
	}
}

// target finds the volume of an operation and checks its range. Replay reads
// records from a disk: what no writer wrote is refused, not believed.
func (s *Store) target(kind format.RecordKind, h format.OpHead) (*Volume, error) {
	v := s.find(VolumeID(h.Volume))
	if v == nil {
		return nil, fmt.Errorf("record of volume %d: %w", h.Volume, ErrNoVolume)
	}
	if n := uint64(h.Count); !v.holds(h.Start, n) || kind == format.RecordWrite && v.size.Load() < h.Start+n {
		return nil, fmt.Errorf("record of volume %d at %d+%d: %w", h.Volume, h.Start, h.Count, ErrRange)
	}
	return v, nil
}

func (s *Store) applyWrite(r format.Record) error {
	h := r.Op()
	v, err := s.target(r.Kind, h)
	if err != nil {
		return err
	}
	var e format.BlockEntry
	for i := range int(h.Count) {
		r.Block(i, &e)
		if e.BID == 0 {
			continue
		}
		if !s.segs.valid(e.Addr, uint32(e.Len)) {
			return fmt.Errorf("record of volume %d names address %x: %w", h.Volume, uint64(e.Addr), format.ErrInvalid)
		}
		if e.Ref {
			s.ref(BID(e.BID), &e)
		} else {
			s.born(BID(e.BID), &e)
		}
	}
	s.unshare(v, h.Start, h.Start+uint64(h.Count), true)
	mapped := v.counter(h.Start)
	for i := range int(h.Count) {
		w := r.BlockBID(i)
		old := s.pg.setWord(&v.mapTree, h.Start+uint64(i), w)
		if w != 0 {
			*mapped++
		}
		if old != 0 {
			*mapped--
			s.unref(BID(old))
		}
	}
	s.stamp(v, h.Start, h.Start+uint64(h.Count), h.Seq)
	if r.Kind == format.RecordWrite {
		v.meta.Durable = OpID{Epoch(h.Epoch), Seq(h.Seq)}
	}
	return nil
}

// stamp sets the version of the chunks that [start, end) touches.
func (s *Store) stamp(v *Volume, start, end, seq uint64) {
	if start == end {
		return
	}
	first, last := start>>chunkShift, (end-1)>>chunkShift
	for c := first; c <= last; c++ {
		if c == first || c%format.WordsPerPage == 0 {
			s.pg.own(&v.versions, c, 0)
		}
		s.pg.setWord(&v.versions, c, seq)
	}
}

// stampMapped is stamp for what an unmap of a range changes, which is done after it. Holes
// stay as they are, so an unmap of a huge empty range makes no pages. A leaf that lies
// wholly inside need not be resident, and is taken for full.
func (s *Store) stampMapped(v *Volume, start, end, seq uint64) {
	for at := start; at < end; {
		leaf, _, span, _ := s.pg.leafOf(v.mapTree, at)
		next := min(end, nextSpan(at, max(span, wordShift)))
		switch {
		case leaf == 0:
		case at%format.WordsPerPage == 0 && next == nextSpan(at, wordShift):
			s.stamp(v, at, next, seq)
		default:
			data := s.pg.data(leaf)
			for from := at; from < next; {
				to := min(next, (from>>chunkShift+1)<<chunkShift)
				for i := from; i < to; i++ {
					if format.Word(data, int(i)&(format.WordsPerPage-1)) != 0 {
						s.stamp(v, from, to, seq)
						break
					}
				}
				from = to
			}
		}
		at = next
	}
}

// applyUnmap drops the mappings of a range in slices. An unmap that fits one
// slice is applied at once; a larger one lets readers and checkpoints in between.
func (s *Store) applyUnmap(r format.Record, from uint64, cut func(done uint64) error) error {
	var h format.OpHead
	var v *Volume
	s.mu.RLock()
	if r.Kind == format.RecordTrim {
		h = format.OpHead{Volume: r.Arg(0), Start: r.Arg(1), Count: uint32(r.Arg(2) - r.Arg(1))}
		if n := r.Arg(2) - r.Arg(1); n <= unmapSlice {
			v = s.find(VolumeID(h.Volume))
		}
	} else {
		h = r.Op()
		v, _ = s.target(r.Kind, h)
	}
	s.mu.RUnlock()
	if v == nil {
		return fmt.Errorf("unmap in volume %d at %d+%d: %w", h.Volume, h.Start, h.Count, ErrRange)
	}
	end := h.Start + uint64(h.Count)
	for i := h.Start + from; ; {
		stop := min(end, (i/unmapSlice+1)*unmapSlice)
		if uint64(h.Count) > unmapSlice {
			s.nextRound()
		}
		for {
			s.missing = s.missing[:0]
			s.mu.RLock()
			s.scanRange(v, i, stop, unmapSlice/format.WordsPerPage)
			s.scanVersions(v, format.OpHead{Start: i, Count: uint32(stop - i)})
			s.mu.RUnlock()
			if len(s.missing) == 0 {
				break
			}
			if err := s.faultAll(s.missing, true); err != nil {
				return err
			}
		}
		s.mu.Lock()
		if r.Kind == format.RecordUnmap {
			s.stampMapped(v, i, stop, h.Seq)
		}
		s.unshare(v, i, stop, false)
		for at := i; at < stop; {
			data, _, missing, span := s.pg.lookup(v.mapTree, wordShift, at)
			if missing != 0 {
				invariant("REFS", "page %d of an unmap is not resident", missing)
			}
			if data == nil {
				at = min(stop, nextSpan(at, span))
				continue
			}
			for leafEnd := min(stop, nextSpan(at, wordShift)); at < leafEnd; at++ {
				if old := s.pg.setWord(&v.mapTree, at, 0); old != 0 {
					*v.counter(at)--
					s.unref(BID(old))
				}
			}
		}
		if r.Kind != format.RecordUnmap {
			for c := (i + ChunkBlocks - 1) >> chunkShift; c<<chunkShift < stop; c++ {
				if data, _, _, _ := s.pg.lookup(v.versions, wordShift, c); data != nil && format.Word(data, int(c)&(format.WordsPerPage-1)) != 0 {
					s.pg.own(&v.versions, c, 0)
					s.pg.setWord(&v.versions, c, 0)
				}
			}
		}
		i = stop
		if i == end {
			if v.bare && r.Kind == format.RecordUnmap {
				// What a snapshot that is forged leaves out: no operation of its own.
			} else if r.Kind == format.RecordUnmap {
				v.meta.Durable = OpID{Epoch(h.Epoch), Seq(h.Seq)}
			} else {
				v.tailEnd = min(v.tailEnd, max(h.Start, v.size.Load()))
			}
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		if cut != nil {
			if err := cut(i - h.Start); err != nil {
				return err
			}
		}
	}
}

// applyMove gives identities new places, if they still stand where they were expected.
func (s *Store) applyMove(r format.Record) {
	var m format.Move
	for i := range r.Count() {
		r.Move(i, &m)
		at, leaf, _ := s.entryOf(BID(m.BID))
		if at == nil || format.EntryAddr(at) != m.Old || !s.segs.valid(m.New, uint32(m.Len)) {
			continue
		}
		if s.replaying {
			s.visit(m.New.Segment()) // it may have been free at the cut
		}
		at = format.EntryAt(s.pg.touch(leaf), int(BID(m.BID).slot()%format.EntriesPerPage))
		var e format.Entry
		format.ParseEntry(at, &e)
		if s.replaying && s.segs.all[m.New.Segment()].state == segmentFree {
			s.visit(m.New.Segment()) // it was written beside the log, see tiers
		}
		was := int32(e.Share())
		s.segs.addLive(e.Addr, -was)
		s.pg.refs.moved(BID(m.BID), e.Addr, -was)
		e.Addr, e.Sum, e.Len, e.Encoding, e.Index = m.New, m.Sum, m.Len, m.Encoding, m.Index
		format.PutEntry(at, &e)
		s.segs.addLive(e.Addr, int32(e.Share()))
		s.pg.refs.moved(BID(m.BID), e.Addr, int32(e.Share()))
	}
}

func (s *Store) applyVolume(r format.Record) error {
	if r.Kind == format.RecordCreate {
		id := VolumeID(r.Arg(0))
		if s.find(id) != nil {
			return fmt.Errorf("create volume %d: %w", id, ErrExists)
		}
		v := &Volume{s: s, id: id, tailEnd: r.Arg(1), meta: Meta{Replica: r.Replica()}}
		v.size.Store(r.Arg(1))
		v.settle()
		s.volumes[id] = v
		return nil
	}
	v := s.find(VolumeID(r.Arg(0)))
	if v == nil || v.bare && r.Kind != format.RecordDelete {
		return fmt.Errorf("record of volume %d: %w", r.Arg(0), ErrNoVolume)
	}
	switch r.Kind {
	case format.RecordEpoch:
		h := r.Op()
		id := OpID{Epoch(h.Epoch), Seq(h.Seq)}
		log := v.meta.EpochLog
		if len(log) >= format.EpochLogMax {
			log = log[1:]
		}
		v.meta.EpochLog = append(log[:len(log):len(log)], id)
		v.meta.Durable = id
	case format.RecordState:
		h := r.Op()
		v.meta.State = append([]byte(nil), r.State()...)
		v.meta.Durable = OpID{Epoch(h.Epoch), Seq(h.Seq)}
	case format.RecordDelete:
		v.deleting = true
		v.tailEnd = annexEnd
		v.size.Store(0)
	case format.RecordResize:
		n := r.Arg(1)
		v.tailEnd = max(v.tailEnd, v.size.Load(), n)
		v.size.Store(n)
	case format.RecordMeta:
		var m format.Meta
		if err := r.Meta(&m); err != nil {
			return err
		}
		v.meta = metaOf(&m)
	default:
		return fmt.Errorf("record kind %d: %w", r.Kind, format.ErrInvalid)
	}
	return nil
}
