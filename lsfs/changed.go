package lsfs

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

// changedSteps bounds the subtrees that one call of ChangedRanges compares or skips:
// some milliseconds when what differs is in RAM.
const changedSteps = 4096

// ChangedRanges lists in what volume or snapshot to differs from from, as runs of blocks
// from start on, without gaps: Same says that a run is alike in both, Mapped, for one that
// is not, that to has data there. From 0 stands for an empty one: then every mapped
// block is a change. Blocks are alike when their content is; those behind the end of from
// are holes of it. The runs end with to's last block at the latest.
//
// Maps that share pages are not read where they do, so the cost is that of the changes.
// The list replaces dst's content, up to its capacity. It ends early when dst is full or
// much was compared; the caller goes on at the returned block, which is to's size at the
// end. There is progress with each call when dst has room for two runs. It is of one
// instant only while neither changes. ErrNoVolume when one of the two is not here.
func (s *Store) ChangedRanges(ctx context.Context, from, to VolumeID, start BlockNo, dst []Extent) ([]Extent, BlockNo, error) {
	dst = dst[:0]
	at := uint64(start)
	for steps := 0; ; {
		if err := s.failure(); err != nil {
			return dst, BlockNo(at), err
		}
		if err := ctx.Err(); err != nil {
			return dst, BlockNo(at), err
		}
		var d diff
		var end uint64
		full := cap(dst) == 0
		d.missing = 0
		s.mu.RLock()
		a, b := s.find(from), s.find(to)
		if b == nil || b.deleting || b.forging || from != 0 && (a == nil || a.deleting || a.forging) {
			s.mu.RUnlock()
			return dst, BlockNo(at), fmt.Errorf("changes from %d to %d: %w", from, to, ErrNoVolume)
		}
		d.s, d.to, end = s, b.mapTree, b.size.Load()
		if a != nil {
			d.from, d.fromEnd = a.mapTree, a.size.Load()
		}
		for hold := 0; at < end && hold < extentHold && !full && d.missing == 0; hold++ {
			steps++
			next, done := d.compare(at, end)
			if !done {
				break
			}
			for !full && at < next {
				x := d.run(at, next)
				if d.missing != 0 {
					break
				}
				if dst, full = addChange(dst, x); !full {
					at += x.Blocks
				}
			}
		}
		s.mu.RUnlock()
		if d.missing != 0 {
			if err := s.fault(d.missing, false); err != nil {
				return dst, BlockNo(at), err
			}
			continue
		}
		if full || end <= at || changedSteps <= steps {
			return dst, BlockNo(at), nil
		}
	}
}

func addChange(dst []Extent, x Extent) (_ []Extent, full bool) {
	if n := len(dst); n > 0 && dst[n-1].Mapped == x.Mapped && dst[n-1].Same == x.Same {
		dst[n-1].Blocks += x.Blocks
		return dst, false
	}
	if len(dst) == cap(dst) {
		return dst, true
	}
	return append(dst, x), false
}

// diff compares two maps at one instant.
type diff struct {
	s        *Store
	from, to tree
	fromEnd  uint64
	missing  uint32

	same bool   // as a whole, what compare found
	a, b []byte // the two leaves, nil for holes, where it is not
}

// pageAt is the page of a tree at a level over index i: 0 when there is nothing, whole
// when the level is above the tree's top, which is then somewhere below.
func (d *diff) pageAt(t tree, i uint64, level uint8) (id uint32, above bool) {
	if t.top == 0 || i>>(wordShift+9*uint(t.height-1)) != 0 {
		return 0, false
	}
	if t.height <= level {
		return 0, true
	}
	id = t.top
	for l := t.height - 1; l > level; l-- {
		data := d.s.pg.data(id)
		if data == nil {
			d.missing = id
			return 0, false
		}
		w := format.Word(data, int(i>>(wordShift+9*uint(l-1)))&(format.WordsPerPage-1))
		if w == 0 {
			return 0, false
		}
		id = uint32(w)
	}
	return id, false
}

// compare finds how far from block i on the maps are alike, or brings the leaves of i
// where they are not. done is false when a page is missing.
func (d *diff) compare(i, end uint64) (next uint64, done bool) {
	d.a, d.b, d.same = nil, nil, true
	from := d.from
	if d.fromEnd <= i {
		from = tree{}
	} else {
		end = min(end, d.fromEnd) // behind it from has holes, whatever its map still leads to
	}
	for level := max(from.height, d.to.height, 1); level > 0; {
		level--
		a, aboveA := d.pageAt(from, i, level)
		if d.missing != 0 {
			return 0, false
		}
		b, aboveB := d.pageAt(d.to, i, level)
		if d.missing != 0 {
			return 0, false
		}
		if a == b && !aboveA && !aboveB {
			return min(end, nextSpan(i, wordShift+9*uint(level))), true
		}
		if level > 0 {
			continue
		}
		d.same = false
		for _, x := range [...]struct {
			id   uint32
			data *[]byte
		}{{a, &d.a}, {b, &d.b}} {
			if x.id != 0 {
				if *x.data = d.s.pg.data(x.id); *x.data == nil {
					d.missing = x.id
					return 0, false
				}
			}
		}
	}
	return min(end, nextSpan(i, wordShift)), true
}

// run is the longest run of one kind from block i on and before next. When a page is
// missing it says nothing.
func (d *diff) run(i, next uint64) Extent {
	if d.same {
		return Extent{Blocks: next - i, Same: true}
	}
	var x Extent
	for n := i; n < next; n++ {
		k := int(n) & (format.WordsPerPage - 1)
		var a, b BID
		if d.a != nil {
			a = BID(format.Word(d.a, k))
		}
		if d.b != nil {
			b = BID(format.Word(d.b, k))
		}
		same := a == b || a != 0 && b != 0 && d.equal(a, b)
		if d.missing != 0 {
			return Extent{}
		}
		y := Extent{Blocks: 1, Same: same, Mapped: !same && b != 0}
		if n == i {
			x = y
		} else if x.Same != y.Same || x.Mapped != y.Mapped {
			break
		} else {
			x.Blocks++
		}
	}
	return x
}

// equal says whether two identities have the same content.
func (d *diff) equal(a, b BID) bool {
	x, _, missing := d.s.entryOf(a)
	if missing == 0 {
		var y []byte
		if y, _, missing = d.s.entryOf(b); missing == 0 {
			return x != nil && y != nil && [32]byte(x[:32]) == [32]byte(y[:32])
		}
	}
	d.missing = missing
	return false
}
