package lsfs

import (
	"math"

	"github.com/twinsan/twinsan/lsfs/format"
)

// Shedding gives back what a deleted volume or snapshot led to, or a volume before its
// rollback. It walks only pages that nothing else leads to: where others do, it takes one
// parent away and stops. What it is through with is taken out of the pages themselves,
// so it goes on anywhere, after a restart too, in slices that are logged one by one.

// lead is a tree that nothing but a list leads to.
type lead struct {
	tree     tree
	versions bool // else a map, whose leaves hold identities
}

const (
	// shedLeaf is what a leaf of the map costs of a slice's budget, beside one for a
	// word of a page above: at worst it ends 512 identities on as many pages.
	shedLeaf = 64
	// shedLeaves is those of one slice, as for an unmap, where there is room enough.
	shedLeaves = 8
)

// applyShed does one slice.
func (s *Store) applyShed(r format.Record) error {
	return s.shed(VolumeID(r.Arg(0)), r.Arg(1))
}

// applyGone ends a volume or snapshot that has been shed. (A log of before there were
// sheds trimmed it instead, and a replay may have met other shapes of the trees: so
// what is left goes now.)
func (s *Store) applyGone(r format.Record) error {
	id := VolumeID(r.Arg(0))
	s.mu.Lock()
	if v := s.find(id); v != nil {
		v.deleting = true
	}
	s.mu.Unlock()
	if err := s.shed(id, math.MaxUint64); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.volumes, id)
	delete(s.snapshots, id)
	return nil
}

// shed takes away what a volume or snapshot has no use for, until the budget is spent.
func (s *Store) shed(id VolumeID, budget uint64) error {
	s.missing = s.missing[:0]
	for {
		if len(s.missing) == 0 {
			s.nextRound()
		}
		s.missing = s.missing[:0]
		s.mu.Lock()
		more := false
		// Readers come in between after each leaf: the lock is free for a moment.
		if v := s.find(id); v != nil && budget > 0 {
			more = s.shedStep(v, &budget)
		}
		s.mu.Unlock()
		if !more {
			return nil
		}
		for _, id := range s.missing {
			if err := s.fault(id, true); err != nil {
				return err
			}
		}
	}
}

// shedStep does the next bit: one leaf, or the words of one page that lead to what is
// shared. It collects missing pages instead where it needs them. It says whether there
// was anything to do.
func (s *Store) shedStep(v *Volume, budget *uint64) bool {
	var t *tree
	versions := false
	n := len(v.old)
	switch {
	case n > 0:
		t, versions = &v.old[n-1].tree, v.old[n-1].versions
	case !v.deleting:
		return false
	case v.mapTree.top != 0:
		t = &v.mapTree
	case v.versions.top != 0:
		t, versions = &v.versions, true
	default:
		return false
	}
	if t.top != 0 {
		s.shedTree(t, versions, budget)
	}
	if n > 0 && t.top == 0 {
		v.old = v.old[:n-1]
	}
	return true
}

// shedTree takes the last leaf out of a tree that nothing else leads to, or the last
// words that lead to shared pages.
func (s *Store) shedTree(t *tree, versions bool, budget *uint64) {
	pg := s.pg
	spend := func(n uint64) { *budget -= min(*budget, n) }
	var path [heightMax]uint32
	var slots [heightMax]int
	id := t.top
	level := t.height - 1
	if p := pg.page(id); p.parents > 1 {
		pg.setParents(id, p.parents-1)
		*t = tree{}
		spend(1)
		return
	}
	for ; level > 0; level-- {
		data := pg.data(id)
		if data == nil {
			s.need(id)
			return
		}
		pg.hold(id)
		slot := format.WordsPerPage - 1
		words := pg.page(id).count
		for ; ; slot-- {
			w := uint32(format.Word(data, slot))
			if w == 0 {
				continue
			}
			p := pg.page(w)
			if p.parents == 1 {
				path[level], slots[level], id = id, slot, w
				break
			}
			// Others lead there: this page does no more.
			pg.setParents(w, p.parents-1)
			format.PutWord(pg.touch(id), slot, 0)
			data = pg.data(id)
			words--
			pg.page(id).count = words
			spend(1)
			if words == 0 {
				s.dropUp(t, id, level, &path, &slots)
				return
			}
			if *budget == 0 {
				return
			}
		}
	}
	if !versions {
		was := len(s.missing)
		if data := pg.data(id); data == nil {
			s.need(id)
		} else {
			s.scanWords(id, 0, format.WordsPerPage)
			if len(s.missing) == was {
				for k := range format.WordsPerPage {
					if w := format.Word(data, k); w != 0 {
						s.unref(BID(w))
					}
				}
			}
		}
		if len(s.missing) > was {
			return
		}
	}
	spend(shedLeaf)
	s.dropUp(t, id, 0, &path, &slots)
}

// dropUp ends a page at a level of a tree, and those above it that are empty then.
func (s *Store) dropUp(t *tree, id uint32, level uint8, path *[heightMax]uint32, slots *[heightMax]int) {
	s.pg.drop(id)
	for level++; level < t.height; level++ {
		id = path[level]
		format.PutWord(s.pg.touch(id), slots[level], 0)
		p := s.pg.page(id)
		if p.count--; p.count > 0 {
			return
		}
		s.pg.drop(id)
	}
	*t = tree{}
}

func storedLeads(list []lead) (f []format.Lead) {
	for _, l := range list {
		f = append(f, format.Lead{Versions: l.versions, Tree: format.Tree{Top: l.tree.top, Height: l.tree.height}})
	}
	return f
}

func leadsOf(f []format.Lead) (list []lead) {
	for _, l := range f {
		list = append(list, lead{versions: l.Versions, tree: tree{l.Tree.Top, l.Tree.Height}})
	}
	return list
}
