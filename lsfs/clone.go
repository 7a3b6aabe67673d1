package lsfs

import (
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

// A clone changes the map and nothing else. Where a whole leaf of the source's map
// falls on a whole leaf of the destination's, both lead to one page from then on,
// and the directory counts its parents; everywhere else words are copied and their
// identities referred to once more.
//
// REFS: a shared leaf counts once. Its words are references of the page, not of the
// places that lead to it: one place more or less changes the count of parents, a
// copy of the page adds a reference to each identity, and the last parent takes them
// all away.

// cloneSlice bounds the blocks of a clone that are applied under one hold of the
// lock, and the size above which it is applied in slices, alone in its commit. Four
// leaves come to 16 MiB of identity pages at worst: those of the blocks that are
// cloned, and those of the blocks that were there.
const cloneSlice = 4 * format.WordsPerPage

// clone is one clone under way.
type clone struct {
	v, src        *Volume
	h             format.OpHead
	start, source uint64
	count         uint64
}

// cloneOf reads a clone record. The caller has Store.mu.
func (s *Store) cloneOf(r format.Record) (c clone, err error) {
	c.h = r.Op()
	if c.v, err = s.target(r.Kind, c.h); err != nil {
		return c, err
	}
	id, start := r.Source()
	c.src, c.start, c.source, c.count = s.find(VolumeID(id)), c.h.Start, start, uint64(c.h.Count)
	switch {
	case c.src == nil:
		err = ErrNoVolume
	case !c.src.holds(start, c.count):
		err = ErrRange
	}
	if err != nil {
		return c, fmt.Errorf("clone of volume %d at %d+%d: %w", id, start, c.count, err)
	}
	return c, nil
}

// backward says that the range is copied from its end on, so that no block is
// overwritten before it is read.
func (c *clone) backward() bool { return c.v == c.src && c.source < c.start }

// sliced says that there is more than one slice.
func (c *clone) sliced() bool { return c.count > cloneSlice }

// slice is what comes after the first done blocks, in the order of the clone.
func (c *clone) slice(done uint64) (from, to uint64) {
	from, to = c.start+done, c.start+c.count
	switch {
	case !c.sliced():
	case c.backward():
		from, to = c.start, to-done
		from = max(from, (to-1)/cloneSlice*cloneSlice)
	default:
		to = min(to, (from/cloneSlice+1)*cloneSlice)
	}
	return from, to
}

// pieces calls f for the parts of a slice that lie in one leaf of the destination
// each, in the order of the clone.
func (c *clone) pieces(from, to uint64, f func(a, b uint64)) {
	if c.backward() {
		for b := to; from < b; {
			a := max(from, (b-1)&^(format.WordsPerPage-1))
			f(a, b)
			b = a
		}
		return
	}
	for a := from; a < to; {
		b := min(to, nextSpan(a, wordShift))
		f(a, b)
		a = b
	}
}

// wholeLeaf says whether a piece is a leaf of both maps.
func (c *clone) wholeLeaf(a, b uint64) bool {
	return b-a == format.WordsPerPage && (c.start-c.source)%format.WordsPerPage == 0
}

// at is the block of the source that goes to block a.
func (c *clone) at(a uint64) uint64 { return a - c.start + c.source }

// requireClone makes the pages of a slice resident and holds them.
func (s *Store) requireClone(c *clone, from, to uint64) error {
	for {
		s.missing = s.missing[:0]
		s.mu.RLock()
		s.scanClone(c, from, to)
		s.mu.RUnlock()
		if len(s.missing) == 0 {
			return nil
		}
		if err := s.faultAll(s.missing, true); err != nil {
			return err
		}
	}
}

// scanClone holds the resident pages of a slice and collects the missing ones. It
// asks for more than the state of now needs where an earlier piece of the slice may
// change how a later one is done: which leaves have more than one parent.
func (s *Store) scanClone(c *clone, from, to uint64) {
	const slots = cloneSlice/format.WordsPerPage + 1
	s.scanVersions(c.v, format.OpHead{Start: from, Count: uint32(to - from)})
	c.pieces(from, to, func(a, b uint64) {
		if c.wholeLeaf(a, b) {
			leaf, _, _, ok := s.scanInner(c.src.mapTree, c.at(a))
			if !ok {
				return
			}
			if leaf == 0 || s.pg.page(leaf).parents+slots < s.parentsMax {
				if leaf != 0 && s.pg.page(leaf).flags&pageCounted == 0 {
					s.need(leaf)
				}
				s.scanRange(c.v, a, b, slots)
				return
			}
		}
		for i := c.at(a); i < c.at(b); i = nextSpan(i, wordShift) {
			if leaf, _, _, ok := s.scanInner(c.src.mapTree, i); ok && leaf != 0 {
				s.scanWords(leaf, i, min(c.at(b), nextSpan(i, wordShift)))
			}
		}
		s.scanRange(c.v, a, b, slots)
		if c.v == c.src {
			s.scanRange(c.v, a&^(format.WordsPerPage-1), nextSpan(a, wordShift), slots)
		}
	})
}

// applyClone makes a clone true, in slices.
func (s *Store) applyClone(r format.Record, from uint64, cut func(done uint64) error) error {
	s.mu.RLock()
	c, err := s.cloneOf(r)
	s.mu.RUnlock()
	if err != nil {
		return err
	}
	for done := from; ; {
		a, b := c.slice(done)
		if c.sliced() {
			s.nextRound()
		}
		if err := s.requireClone(&c, a, b); err != nil {
			return err
		}
		s.mu.Lock()
		c.pieces(a, b, func(a, b uint64) { s.clonePiece(&c, a, b) })
		s.stamp(c.v, a, b, c.h.Seq)
		if done += b - a; done == c.count {
			c.v.meta.Durable = OpID{Epoch(c.h.Epoch), Seq(c.h.Seq)}
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		if cut != nil {
			if err := cut(done); err != nil {
				return err
			}
		}
	}
}

// clonePiece makes blocks [a, b), which lie in one leaf, equal to their source.
func (s *Store) clonePiece(c *clone, a, b uint64) {
	if c.wholeLeaf(a, b) {
		from, _, _, _ := s.pg.leafOf(c.src.mapTree, c.at(a))
		if from == 0 {
			s.dropLeaf(c.v, a)
			return
		}
		if s.shareLeaf(c.v, a, from) {
			return
		}
	}
	words := s.words[:b-a]
	s.readWords(c.src.mapTree, c.at(a), words)
	// REFS: increments come before decrements.
	for _, w := range words {
		if w != 0 {
			s.addRef(BID(w))
		}
	}
	s.unshare(c.v, a, b, true)
	mapped := c.v.counter(a)
	for i, w := range words {
		old := s.pg.setWord(&c.v.mapTree, a+uint64(i), w)
		if w != 0 {
			*mapped++
		}
		if old != 0 {
			*mapped--
			s.unref(BID(old))
		}
	}
}

// readWords fills dst with the words of a map from block i on. The leaves are resident.
func (s *Store) readWords(t tree, i uint64, dst []uint64) {
	for len(dst) > 0 {
		n := min(uint64(len(dst)), nextSpan(i, wordShift)-i)
		data, _, missing, _ := s.pg.lookup(t, wordShift, i)
		switch {
		case missing != 0:
			invariant("REFS", "page %d of a clone's source is not resident", missing)
		case data == nil:
			clear(dst[:n])
		default:
			for k := range n {
				dst[k] = format.Word(data, int(i+k)&(format.WordsPerPage-1))
			}
		}
		dst = dst[n:]
		i += n
	}
}

// shareLeaf lets the map of v lead to leaf at block i. It says no when the leaf has
// as many parents as it can have.
func (s *Store) shareLeaf(v *Volume, i uint64, leaf uint32) bool {
	old, _, _, _ := s.pg.leafOf(v.mapTree, i)
	if old == leaf {
		return true
	}
	p := s.pg.page(leaf)
	if s.parentsMax <= p.parents {
		return false
	}
	if p.flags&pageCounted == 0 {
		invariant("REFS", "leaf %d is shared before it was counted", leaf)
	}
	s.pg.setParents(leaf, p.parents+1)
	s.pg.refs.share()
	s.pg.putLeaf(&v.mapTree, i, leaf)
	*v.counter(i) += uint64(p.count)
	if old != 0 {
		s.leaveLeaf(v, i, old)
	}
	return true
}

// dropLeaf takes the leaf of block i out of the map of v, if there is one.
func (s *Store) dropLeaf(v *Volume, i uint64) {
	if leaf, _, _, _ := s.pg.leafOf(v.mapTree, i); leaf != 0 {
		s.pg.putLeaf(&v.mapTree, i, 0)
		s.leaveLeaf(v, i, leaf)
	}
}

// leaveLeaf takes away the parent that led to a leaf from block i of v. With the last
// one go the leaf, which then is resident, and the references of its words.
func (s *Store) leaveLeaf(v *Volume, i uint64, leaf uint32) {
	p := s.pg.page(leaf)
	*v.counter(i) -= uint64(p.count)
	if p.parents > 1 {
		s.pg.setParents(leaf, p.parents-1)
		return
	}
	data := s.pg.data(leaf)
	if data == nil {
		invariant("REFS", "leaf %d loses its last parent but is not resident", leaf)
	}
	for k := range format.WordsPerPage {
		if w := format.Word(data, k); w != 0 {
			s.unref(BID(w))
		}
	}
	s.pg.drop(leaf)
}

// unshare makes the words of [start, end) changeable: shared pages above them are copied,
// a shared leaf that lies wholly inside leaves the map, for all its words are about to
// be replaced, and one that lies there in part is replaced by a copy. fill says that
// leaves are made where there are none.
func (s *Store) unshare(v *Volume, start, end uint64, fill bool) {
	if s.pg.shared.Load() == 0 {
		return
	}
	for i := start; i < end; {
		leaf, _, span, shared := s.pg.leafOf(v.mapTree, i)
		at := i
		if i = nextSpan(i, wordShift); leaf == 0 && !fill {
			i = nextSpan(at, max(span, wordShift))
		}
		if shared && (leaf != 0 || fill) {
			s.pg.own(&v.mapTree, at, 1)
		}
		if leaf == 0 || s.pg.page(leaf).parents == 1 {
			continue
		}
		s.replaceLeaf(v, at, leaf, start <= at&^(format.WordsPerPage-1) && i <= end)
	}
}

// replaceLeaf takes a shared leaf out of the map of v, or a copy in its place.
func (s *Store) replaceLeaf(v *Volume, i uint64, leaf uint32, whole bool) {
	if whole {
		s.dropLeaf(v, i)
	} else {
		s.copyLeaf(v, i, leaf)
	}
}

// copyLeaf gives the map of v a leaf of its own in place of a shared one.
func (s *Store) copyLeaf(v *Volume, i uint64, leaf uint32) {
	own := s.pg.copyPage(leaf, 0)
	data := s.pg.data(own)
	for k := range format.WordsPerPage {
		if w := format.Word(data, k); w != 0 {
			s.addRef(BID(w))
		}
	}
	s.pg.putLeaf(&v.mapTree, i, own)
}

// sharedEdges counts the shared pages that a change of [start, end) has to copy: those
// on the way to its first and to its last block, in the map and in the version tree. (What
// a long one copies between them goes with it.) The caller has Store.mu.
func (s *Store) sharedEdges(v *Volume, start, end uint64) (n int64) {
	if s.pg.shared.Load() == 0 || start == end {
		return 0
	}
	first, last := start&^(format.WordsPerPage-1), (end-1)&^(format.WordsPerPage-1)
	n = s.pg.copyCost(v.mapTree, first, first != start || first == last && end != last+format.WordsPerPage)
	if first != last {
		n += s.pg.copyCost(v.mapTree, last, end != last+format.WordsPerPage)
	}
	from, to := start>>chunkShift, (end-1)>>chunkShift
	n += s.pg.copyCost(v.versions, from, true)
	if from>>wordShift != to>>wordShift {
		n += s.pg.copyCost(v.versions, to, true)
	}
	return n
}

// edgesMost is above what sharedEdges can come to.
const edgesMost = 2 * (heightMax + heightMax)

// clonePages bounds the pages that a clone makes. The caller has Store.mu.
func (s *Store) clonePages(c *clone) (n int64) {
	n = 2 + int64(c.count>>(2*wordShift)) // above the leaves, at an end of the map
	if s.pg.shared.Load() > 0 && c.count > 0 {
		n += s.pg.copyCost(c.v.mapTree, c.start, false) + s.pg.copyCost(c.v.mapTree, c.start+c.count-1, false)
		n += s.pg.copyCost(c.v.versions, c.start>>chunkShift, true) + s.pg.copyCost(c.v.versions, (c.start+c.count-1)>>chunkShift, true)
	}
	c.pieces(c.start, c.start+c.count, func(a, b uint64) {
		if c.wholeLeaf(a, b) {
			leaf, _, _, _ := s.pg.leafOf(c.src.mapTree, c.at(a))
			if leaf == 0 || s.pg.page(leaf).parents < s.parentsMax {
				return
			}
		}
		if leaf, _, _, shared := s.pg.leafOf(c.v.mapTree, a); leaf == 0 || shared {
			n++
		}
	})
	return n
}

// AdmitClone says whether a clone of count blocks would find room for the pages that
// it makes, as Admit does for a write, and blocks that take another reference, as far as
// RAM tells: between refsMax and refsLast there is room for those that it does not see. Ranges that no clone can have are admitted:
// the clone itself says what is wrong with them.
func (v *Volume) AdmitClone(start BlockNo, source VolumeID, sourceStart BlockNo, count uint32) bool {
	s := v.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := clone{v: v, src: s.find(source), start: uint64(start), source: uint64(sourceStart), count: uint64(count)}
	if c.src == nil || c.src.forging || ClonedBlocksMax < count || !v.holds(c.start, c.count) || !c.src.holds(c.source, c.count) {
		return true
	}
	pages := s.clonePages(&c)
	if pages > 2 && s.refusing() || s.usable.Load() < s.charged()+s.waiting.Load()+pages*format.PageSize || s.crowded(v.mapTree, c.start, c.start+c.count) {
		return false
	}
	room := true
	c.pieces(c.start, c.start+c.count, func(a, b uint64) {
		room = room && (c.wholeLeaf(a, b) || s.roomForRefs(c.src, c.at(a), c.at(b), s.refsMax) == nil)
	})
	return room
}

// stageClone looks at a clone before it is logged: that its metadata can be read, that
// no identity would get too many references, and that there is room for its pages.
func (s *Store) stageClone(r format.Record, refuse bool) error {
	s.mu.RLock()
	c, err := s.cloneOf(r)
	var pages int64
	if err == nil {
		if c.src.deleting || c.src.forging {
			err = fmt.Errorf("clone of volume %d: %w", c.src.id, ErrNoVolume)
		}
		pages = s.clonePages(&c)
		if err == nil && s.crowded(c.v.mapTree, c.start, c.start+c.count) {
			err = fmt.Errorf("volume %d: a copy of shared metadata: %w", c.v.id, ErrReferences)
		}
	}
	s.mu.RUnlock()
	if err != nil {
		return err
	}
	if add := s.batch.bytes + s.batch.copies*format.PageSize + int64(len(s.batch.fresh))*identityCost + pages*format.PageSize; refuse && pages > 2 || s.usable.Load()+s.slack < s.charged()+add {
		s.stats.spaceRefused.Add(1)
		return fmt.Errorf("volume %d: clone of %d blocks: %w", c.v.id, c.count, ErrNoSpace)
	}
	for done := uint64(0); done < c.count; {
		a, b := c.slice(done)
		if c.sliced() {
			s.nextRound()
		}
		if err := s.requireClone(&c, a, b); err != nil {
			return err
		}
		s.mu.RLock()
		c.pieces(a, b, func(a, b uint64) {
			if err == nil && !c.wholeLeaf(a, b) {
				err = s.roomForRefs(c.src, c.at(a), c.at(b), s.refsLast)
			}
		})
		s.mu.RUnlock()
		if err != nil {
			return err
		}
		done += b - a
	}
	s.batch.copies += pages
	return nil
}

// roomForRefs says whether each identity that resident leaves of [start, end) name
// has fewer than limit references. The caller has Store.mu.
func (s *Store) roomForRefs(v *Volume, start, end uint64, limit uint32) error {
	for i := start; i < end; i++ {
		data, _, _, span := s.pg.lookup(v.mapTree, wordShift, i)
		if data == nil {
			i = nextSpan(i, max(span, wordShift)) - 1
			continue
		}
		if w := format.Word(data, int(i)&(format.WordsPerPage-1)); w != 0 {
			if e, _, _ := s.entryOf(BID(w)); e != nil && limit <= format.EntryRefs(e) {
				return fmt.Errorf("volume %d block %d: identity %d: %w", v.id, i, w, ErrReferences)
			}
		}
	}
	return nil
}
