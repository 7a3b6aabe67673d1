package lsfs

import (
	"context"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// ownerWalk goes through trees that share pages, and notes who leads to each page. What
// is below a shared page need not be walked again for one who is known to lead there:
// so thousands of snapshots cost little more than what they differ by.
type ownerWalk struct {
	s      *Store
	buf    []byte   // aligned
	owners []owners // by page
	path   [heightMax]uint32
	loaded format.DirEntry // what buf holds
}

func newOwnerWalk(s *Store) *ownerWalk {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return &ownerWalk{s: s, buf: device.AlignedBuffer(format.PageSize), owners: make([]owners, s.pg.n)}
}

func (w *ownerWalk) close() { device.FreeAligned(w.buf) }

// leaves calls f under the read lock for each leaf of a tree of words, in order, with its
// content. With f nil leaves are not read. whole says that nothing is left out: otherwise
// what mine is known to lead to is. f must not keep the page.
func (w *ownerWalk) leaves(ctx context.Context, of func() tree, mine owners, whole bool, f func(page []byte)) error {
	clear(w.path[:])
	for i := uint64(0); i != ^uint64(0); {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, missing, err := w.step(of, mine, whole, i, f)
		if err == nil && missing != 0 {
			err = w.s.fault(missing, false)
		}
		if err != nil {
			return err
		}
		i = next
	}
	return nil
}

// step looks at the leaf of index i and returns the index behind it, or i again when a
// page has to be read before.
func (w *ownerWalk) step(of func() tree, mine owners, whole bool, i uint64, f func(page []byte)) (next uint64, missing uint32, err error) {
	s := w.s
	s.mu.RLock()
	t := of()
	if t.top == 0 || i>>(wordShift+9*uint(t.height-1)) != 0 {
		s.mu.RUnlock()
		return ^uint64(0), 0, nil
	}
	id := t.top
	span := wordShift + 9*uint(t.height-1)
	for level := t.height - 1; ; level-- {
		if w.path[level] != id {
			if !w.enter(id, mine) && !whole {
				s.mu.RUnlock()
				return nextSpan(i, span), 0, nil
			}
			w.path[level] = id
			clear(w.path[:level])
		}
		if level == 0 {
			break
		}
		data := s.pg.data(id)
		if data == nil {
			s.mu.RUnlock()
			return i, id, nil
		}
		span -= 9
		if id = uint32(format.Word(data, int(i>>span)&(format.WordsPerPage-1))); id == 0 {
			s.mu.RUnlock()
			return nextSpan(i, span), 0, nil
		}
	}
	next = nextSpan(i, span)
	if f == nil {
		w.path[0] = 0
		s.mu.RUnlock()
		return next, 0, nil
	}
	data, e := s.pg.data(id), *s.pg.entry(id)
	if data == nil && e.Addr != 0 && e == w.loaded {
		data = w.buf
	}
	if data != nil {
		f(data)
		w.path[0] = 0
		s.mu.RUnlock()
		return next, 0, nil
	}
	if !s.segs.valid(e.Addr, format.PageSize) {
		s.mu.RUnlock()
		return 0, 0, s.report(s.corrupt("page", e.Addr, e.Sum, 0, format.ErrInvalid))
	}
	seg := &s.segs.arena[e.Addr.Segment()]
	seg.readers.Add(1)
	s.mu.RUnlock()
	w.loaded = format.DirEntry{}
	if err = s.readPage(w.buf, e); err != nil {
		err = s.repairPage(w.buf, e.Addr, e.Sum, err)
	}
	seg.readers.Add(-1)
	if err != nil {
		return 0, 0, err
	}
	w.loaded = e
	return i, 0, nil
}

// enter notes that mine leads to a page, and says whether that is news.
func (w *ownerWalk) enter(id uint32, mine owners) bool {
	for uint32(len(w.owners)) <= id {
		w.owners = append(w.owners, make([]owners, pagesPerPart)...)
	}
	was := w.owners[id]
	w.owners[id] = was.join(mine)
	return w.owners[id] != was
}
