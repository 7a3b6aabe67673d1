package lsfs

import "github.com/twinsan/twinsan/lsfs/format"

// Copy on write. A snapshot, a clone of a volume and a rollback make two trees lead to
// one top page; nothing below is touched. A page that more than one place leads to
// stays as it is, but for merges, which change no content (merge.go). Before a tree changes, the shared pages on the way to the change are
// replaced by copies from the top down: each copy is one more parent of all that the
// page leads to, so what was shared as a whole is then shared by its parts.
//
// REFS: references count leaves, however many ways lead to a leaf. Copying a page above
// the leaves so changes no identity; copying a leaf refers to each of its once more.

// own makes the pages on the way to index i of a tree of words this tree's own, from
// the top down to level low (0: the leaf, which must hold no identities). It ends where
// the way ends. The path is resident.
func (pg *pager) own(t *tree, i uint64, low uint8) {
	if t.top == 0 || pg.shared.Load() == 0 || i>>(wordShift+9*uint(t.height-1)) != 0 {
		return
	}
	above, slot := uint32(0), 0
	id := t.top
	for level := t.height; level > low; {
		level--
		if pg.page(id).parents > 1 {
			id = pg.copyPage(id, level)
			if above == 0 {
				t.top = id
			} else {
				format.PutWord(pg.touch(above), slot, uint64(id))
			}
		}
		if level == 0 {
			return
		}
		slot = int(i>>(wordShift+9*uint(level-1))) & (format.WordsPerPage - 1)
		data := pg.data(id)
		if data == nil {
			invariant("REFS", "page %d is on the way to a change but not resident", id)
		}
		w := format.Word(data, slot)
		if w == 0 {
			return
		}
		above, id = id, uint32(w)
	}
}

// copyPage makes a copy of a shared page for one of those that lead to it. Above the
// leaves all that it leads to gets another parent.
func (pg *pager) copyPage(id uint32, level uint8) uint32 {
	own := pg.create(format.WordPage)
	from, to := pg.data(id), pg.touch(own)
	if from == nil {
		invariant("REFS", "page %d is copied but not resident", id)
	}
	copy(to, from)
	pg.page(own).count = pg.page(id).count
	if level > 0 {
		for k := range format.WordsPerPage {
			if w := uint32(format.Word(to, k)); w != 0 {
				pg.setParents(w, pg.page(w).parents+1)
			}
		}
	}
	pg.setParents(id, pg.page(id).parents-1)
	return own
}

// copyCost counts the pages that own would copy on the way to index i; leaf says that
// the leaf is one of them.
func (pg *pager) copyCost(t tree, i uint64, leaf bool) (n int64) {
	if t.top == 0 || i>>(wordShift+9*uint(t.height-1)) != 0 {
		return 0
	}
	shared := false
	id := t.top
	for level := t.height - 1; ; level-- {
		shared = shared || pg.page(id).parents > 1
		if shared && (level > 0 || leaf) {
			n++
		}
		if level == 0 {
			return n
		}
		data := pg.data(id)
		if data == nil {
			return n + int64(level)
		}
		w := format.Word(data, int(i>>(wordShift+9*uint(level-1)))&(format.WordsPerPage-1))
		if w == 0 {
			return n
		}
		id = uint32(w)
	}
}

// crowded says whether a copy of the pages on the way to [start, end) could give a page
// more parents than can be counted. That takes millions of clones of one leaf, so
// nothing is looked at before a page has that many.
func (s *Store) crowded(t tree, start, end uint64) bool {
	if s.pg.crowd.Load() < s.parentsLast {
		return false
	}
	for i := start; i < end; i = nextSpan(i, 2*wordShift) {
		if t.top == 0 || i>>(wordShift+9*uint(t.height-1)) != 0 {
			return false
		}
		shared := false
		id := t.top
		for level := t.height - 1; level > 0; level-- {
			data := s.pg.data(id)
			if data == nil {
				break // a huge unmap: what it must copy is looked at where it is resident
			}
			if shared = shared || s.pg.page(id).parents > 1; shared {
				for k := range format.WordsPerPage {
					if w := uint32(format.Word(data, k)); w != 0 && s.parentsLast <= s.pg.page(w).parents {
						return true
					}
				}
			}
			w := format.Word(data, int(i>>(wordShift+9*uint(level-1)))&(format.WordsPerPage-1))
			if w == 0 {
				break
			}
			id = uint32(w)
		}
	}
	return false
}

// annexChunk is the first chunk of an annex.
const annexChunk = uint64(AnnexStart) >> chunkShift

// annexSlot is the first word of a tree's top page that leads to an annex, which begins
// at index at; 0 when the tree does not reach that far.
func (t tree) annexSlot(at uint64) int {
	if t.top == 0 {
		return 0
	}
	below := wordShift + 9*uint(t.height-1) - 9
	if t.height == 1 || at>>below >= format.WordsPerPage {
		return 0
	}
	return int(at >> below)
}

// parts sums up a top page: how many of its words lead before the annex and into it.
func (pg *pager) parts(t tree, slot int) (main, annex int) {
	data := pg.data(t.top)
	if data == nil {
		invariant("REFS", "page %d is a top to be shared but not resident", t.top)
	}
	for k := range format.WordsPerPage {
		if format.Word(data, k) != 0 {
			if k < slot {
				main++
			} else {
				annex++
			}
		}
	}
	return main, annex
}

// shareMain is another lead to what a tree holds before its annex, which begins at
// index at. The top page is resident where it reaches the annex (scanTop).
func (pg *pager) shareMain(t tree, at uint64) tree {
	pg.refs.share()
	if t.top == 0 {
		return t
	}
	slot := t.annexSlot(at)
	if slot > 0 {
		main, annex := pg.parts(t, slot)
		if first := uint32(format.Word(pg.data(t.top), 0)); annex > 0 {
			switch {
			case main == 0:
				return tree{}
			case main == 1 && first != 0:
				pg.setParents(first, pg.page(first).parents+1)
				return tree{first, t.height - 1}
			}
			return tree{pg.copyMain(t.top, slot, main, 1), t.height}
		}
	}
	pg.setParents(t.top, pg.page(t.top).parents+1)
	return t
}

// copyMain makes a page of the first words of a top page. What they lead to gets more
// parents.
func (pg *pager) copyMain(top uint32, slots, count int, more uint32) uint32 {
	own := pg.create(format.WordPage)
	from, to := pg.data(top), pg.touch(own)
	for k := range slots {
		w := uint32(format.Word(from, k))
		format.PutWord(to, k, uint64(w))
		if w != 0 && more > 0 {
			pg.setParents(w, pg.page(w).parents+more)
		}
	}
	pg.page(own).count = uint16(count)
	return own
}

// detachMain takes what a tree holds before its annex out of it and gives it to the caller.
func (pg *pager) detachMain(t *tree, at uint64) (old tree) {
	pg.refs.share()
	slot := t.annexSlot(at)
	main, annex := 0, 0
	if slot > 0 {
		main, annex = pg.parts(*t, slot)
	}
	if annex == 0 {
		old, *t = *t, tree{}
		return old
	}
	if main == 0 {
		return tree{}
	}
	if pg.page(t.top).parents > 1 {
		t.top = pg.copyPage(t.top, t.height-1)
	}
	if first := uint32(format.Word(pg.data(t.top), 0)); main == 1 && first != 0 {
		old = tree{first, t.height - 1}
	} else {
		old = tree{pg.copyMain(t.top, slot, main, 0), t.height}
	}
	clear(pg.touch(t.top)[:slot*8])
	pg.page(t.top).count = uint16(annex)
	return old
}

// attachMain makes a tree that holds nothing before its annex lead to what from, which
// has no annex, leads to.
func (pg *pager) attachMain(t *tree, from tree) {
	pg.refs.share()
	switch {
	case from.top == 0:
	case t.top == 0:
		pg.setParents(from.top, pg.page(from.top).parents+1)
		*t = from
	case from.height == t.height:
		data, to := pg.data(from.top), pg.touch(t.top)
		for k := range format.WordsPerPage {
			if w := uint32(format.Word(data, k)); w != 0 {
				if format.Word(to, k) != 0 {
					invariant("REFS", "page %d holds word %d already", t.top, k)
				}
				pg.setParents(w, pg.page(w).parents+1)
				format.PutWord(to, k, uint64(w))
				pg.page(t.top).count++
			}
		}
	default:
		id := from.top
		pg.setParents(id, pg.page(id).parents+1)
		for h := from.height; h < t.height-1; h++ {
			above := pg.create(format.WordPage)
			format.PutWord(pg.touch(above), 0, uint64(id))
			pg.page(above).count = 1
			id = above
		}
		format.PutWord(pg.touch(t.top), 0, uint64(id))
		pg.page(t.top).count++
	}
}

// scanTop holds the top page of a tree that reaches an annex, which begins at index at.
func (s *Store) scanTop(t tree, at uint64) {
	if t.annexSlot(at) > 0 {
		if s.pg.data(t.top) == nil {
			s.need(t.top)
		}
		s.pg.hold(t.top)
	}
}
