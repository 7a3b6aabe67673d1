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

// ensure finds or makes the leaf of index i. The existing path must be resident.
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
	for i>>(shift+9*uint(t.height-1)) != 0 {
		top := pg.create(format.WordPage)
		format.PutWord(pg.touch(top), 0, uint64(t.top))
		pg.page(top).count = 1
		t.top = top
		t.height++
	}
	id := t.top
	for level := t.height - 1; level > 0; level-- {
		slot := int(i>>(shift+9*uint(level-1))) & (format.WordsPerPage - 1)
		w := format.Word(pg.data(id), slot)
		if w == 0 {
			w = uint64(pg.create(kindAt(level - 1)))
			format.PutWord(pg.touch(id), slot, w)
			pg.page(id).count++
		}
		id = uint32(w)
	}
	return id
}

// prune drops the leaf of index i, which is empty, and what is empty above it.
func (pg *pager) prune(t *tree, shift uint, i uint64) {
	var path [heightMax]uint32
	id := t.top
	for level := t.height - 1; level > 0; level-- {
		path[level] = id
		id = uint32(format.Word(pg.data(id), int(i>>(shift+9*uint(level-1)))&(format.WordsPerPage-1)))
	}
	pg.drop(id)
	for level := uint8(1); level < t.height; level++ {
		id = path[level]
		format.PutWord(pg.touch(id), int(i>>(shift+9*uint(level-1)))&(format.WordsPerPage-1), 0)
		if p := pg.page(id); p.count > 1 {
			p.count--
			return
		}
		pg.drop(id)
	}
	*t = tree{}
}

// setWord sets word i and returns what was there. Setting zero makes no page.
func (pg *pager) setWord(t *tree, i, w uint64) (old uint64) {
	slot := int(i) & (format.WordsPerPage - 1)
	if w == 0 {
		data, leaf, _, _ := pg.lookup(*t, wordShift, i)
		if data == nil {
			return 0
		}
		if old = format.Word(data, slot); old == 0 {
			return 0
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
