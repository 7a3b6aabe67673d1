package lsfs

import "github.com/twinsan/twinsan/lsfs/format"

// tree is a tree of pages from a number to a place in a leaf. Volume maps and
// version trees have leaves of 512 words (shift 9), the tree of identities has
// leaves of 64 entries (shift 6). A subtree without content does not exist.
//
// All functions need Store.mu; those that change need it for writing and need
// the path resident.
type tree struct {
	top    uint32
	height uint8 // pages one above another; 1: the top is a leaf
}

const (
	wordShift  = 9
	entryShift = 6
	heightMax  = 8
)

// lookup finds the leaf of index i. data is nil when there is none: then either
// missing is the id of a page on the path that must be read first, or the
// subtree of 1<<span indices around i is empty.
func (pg *pager) lookup(t tree, shift uint, i uint64) (data []byte, leaf, missing uint32, span uint) {
	if t.top == 0 {
		return nil, 0, 0, 64
	}
	span = shift + 9*uint(t.height-1)
	if i>>span != 0 {
		return nil, 0, 0, 64
	}
	id := t.top
	for level := t.height - 1; ; level-- {
		data = pg.data(id)
		if data == nil {
			return nil, 0, id, 0
		}
		if level == 0 {
			return data, id, 0, shift
		}
		span -= 9
		w := format.Word(data, int(i>>span)&(format.WordsPerPage-1))
		if w == 0 {
			return nil, 0, 0, span
		}
		id = uint32(w)
	}
}

// leafOf finds the id of the leaf of index i in a tree of words, which need not be
// resident. It is 0 when there is none: then missing and span are those of lookup.
// shared says that a page on the way, the leaf too, has more than one parent.
func (pg *pager) leafOf(t tree, i uint64) (leaf, missing uint32, span uint, shared bool) {
	return pg.leafAt(t, wordShift, i)
}

// leafAt is leafOf for a tree of any kind of leaves.
func (pg *pager) leafAt(t tree, shift uint, i uint64) (leaf, missing uint32, span uint, shared bool) {
	if t.top == 0 {
		return 0, 0, 64, false
	}
	span = shift + 9*uint(t.height-1)
	if i>>span != 0 {
		return 0, 0, 64, false
	}
	id := t.top
	for level := t.height - 1; level > 0; level-- {
		data := pg.data(id)
		if data == nil {
			return 0, id, 0, true
		}
		shared = shared || pg.page(id).parents > 1
		span -= 9
		w := format.Word(data, int(i>>span)&(format.WordsPerPage-1))
		if w == 0 {
			return 0, 0, span, shared
		}
		id = uint32(w)
	}
	return id, 0, shift, shared || pg.page(id).parents > 1
}

// emptyBelow is the first index of the empty run that ends with i, where lookup
// found no leaf but an empty subtree of 1<<span.
func (t tree) emptyBelow(shift uint, i uint64, span uint) uint64 {
	if t.top == 0 {
		return 0
	}
	if whole := shift + 9*uint(t.height-1); i>>whole != 0 {
		return 1 << whole
	}
	return i >> span << span
}

// ensure finds or makes the leaf of index i, which the caller changes. The existing
// path must be resident, and lead to this place only.
func (pg *pager) ensure(t *tree, shift uint, i uint64, kind format.PageKind) uint32 {
	kindAt := func(level uint8) format.PageKind {
		if level == 0 {
			return kind
		}
		return format.WordPage
	}
	if t.top == 0 {
		t.height = 1
		for i>>(shift+9*uint(t.height-1)) != 0 {
			t.height++
		}
		t.top = pg.create(kindAt(t.height - 1))
	}
	pg.raise(t, shift, i)
	id := t.top
	pg.mustOwn(id)
	for level := t.height - 1; level > 0; level-- {
		slot := int(i>>(shift+9*uint(level-1))) & (format.WordsPerPage - 1)
		w := format.Word(pg.data(id), slot)
		if w == 0 {
			w = uint64(pg.create(kindAt(level - 1)))
			format.PutWord(pg.touch(id), slot, w)
			pg.page(id).count++
		}
		id = uint32(w)
		pg.mustOwn(id)
	}
	return id
}

// raise puts pages on top of a tree until it reaches index i.
func (pg *pager) raise(t *tree, shift uint, i uint64) {
	for i>>(shift+9*uint(t.height-1)) != 0 {
		top := pg.create(format.WordPage)
		format.PutWord(pg.touch(top), 0, uint64(t.top))
		pg.page(top).count = 1
		t.top = top
		t.height++
	}
}

// lower takes pages off the top of a tree of words that lead to the first place only.
// A shared page stays.
func (pg *pager) lower(t *tree) {
	for t.height > 1 {
		data := pg.data(t.top)
		if data == nil || pg.page(t.top).count != 1 || pg.page(t.top).parents != 1 || format.Word(data, 0) == 0 {
			return
		}
		first := uint32(format.Word(data, 0))
		pg.drop(t.top)
		t.top = first
		t.height--
	}
}

// putLeaf makes leaf, 0 for none, the leaf of index i in a tree of words. The path
// is resident, the leaves need not be. The one that was there is the caller's. Shared
// pages above it are copied, which gives all they lead to another parent.
func (pg *pager) putLeaf(t *tree, i uint64, leaf uint32) {
	pg.own(t, i, 1)
	if leaf == 0 {
		pg.unlink(t, wordShift, i)
		return
	}
	if t.top == 0 {
		if i>>wordShift == 0 {
			*t = tree{top: leaf, height: 1}
			return
		}
		*t = tree{top: pg.create(format.WordPage), height: 2}
		for i>>(wordShift+9*uint(t.height-1)) != 0 {
			t.height++
		}
	}
	pg.raise(t, wordShift, i)
	if t.height == 1 {
		t.top = leaf
		return
	}
	id := t.top
	for level := t.height - 1; ; level-- {
		slot := int(i>>(wordShift+9*uint(level-1))) & (format.WordsPerPage - 1)
		w := format.Word(pg.data(id), slot)
		if w != 0 && level > 1 {
			id = uint32(w)
			continue
		}
		if w == 0 {
			pg.page(id).count++
		}
		if level == 1 {
			format.PutWord(pg.touch(id), slot, uint64(leaf))
			return
		}
		below := pg.create(format.WordPage)
		format.PutWord(pg.touch(id), slot, uint64(below))
		id = below
	}
}

// prune drops the leaf of index i, which is empty, and what is empty above it.
func (pg *pager) prune(t *tree, shift uint, i uint64) {
	id := t.top
	for level := t.height - 1; level > 0; level-- {
		id = uint32(format.Word(pg.data(id), int(i>>(shift+9*uint(level-1)))&(format.WordsPerPage-1)))
	}
	pg.drop(id)
	pg.unlink(t, shift, i)
}

// unlink takes the leaf of index i out of a tree, and what is empty then above it.
func (pg *pager) unlink(t *tree, shift uint, i uint64) {
	var path [heightMax]uint32
	id := t.top
	for level := t.height - 1; level > 0; level-- {
		path[level] = id
		id = uint32(format.Word(pg.data(id), int(i>>(shift+9*uint(level-1)))&(format.WordsPerPage-1)))
	}
	for level := uint8(1); level < t.height; level++ {
		id = path[level]
		pg.mustOwn(id)
		format.PutWord(pg.touch(id), int(i>>(shift+9*uint(level-1)))&(format.WordsPerPage-1), 0)
		if p := pg.page(id); p.count > 1 {
			p.count--
			if shift == wordShift {
				pg.lower(t)
			}
			return
		}
		pg.drop(id)
	}
	*t = tree{}
}

// mustOwn makes sure that a page may be changed for the one place that leads to it.
func (pg *pager) mustOwn(id uint32) {
	if n := pg.page(id).parents; n != 1 {
		invariant("REFS", "page %d is changed but has %d parents", id, n)
	}
}

// setWord sets word i and returns what was there. Setting zero makes no page.
func (pg *pager) setWord(t *tree, i, w uint64) (old uint64) {
	slot := int(i) & (format.WordsPerPage - 1)
	if w == 0 {
		leaf, _, _, shared := pg.leafOf(*t, i)
		if leaf == 0 {
			return 0
		}
		data := pg.data(leaf)
		if data == nil {
			return 0
		}
		if old = format.Word(data, slot); old == 0 {
			return 0
		}
		if shared {
			invariant("REFS", "word %d of page %d is cleared but others see it", slot, leaf)
		}
		format.PutWord(pg.touch(leaf), slot, 0)
		if p := pg.page(leaf); p.count > 1 {
			p.count--
		} else {
			pg.prune(t, wordShift, i)
		}
		return old
	}
	leaf := pg.ensure(t, wordShift, i, format.WordPage)
	data := pg.touch(leaf)
	if old = format.Word(data, slot); old == 0 {
		pg.page(leaf).count++
	}
	format.PutWord(data, slot, w)
	return old
}
