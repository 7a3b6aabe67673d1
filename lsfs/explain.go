package lsfs

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Explanation says what the bytes of a pool are there for.
type Explanation struct {
	// Size is that of all segments, and the sum of the nine that follow.
	Size      int64
	Volumes   int64 // blocks that some volume maps, each once, as they are stored
	Snapshots int64 // blocks that snapshots map and no volume does
	Leaving   int64 // blocks of deleted volumes and snapshots: on their way back to free space
	Unsettled int64 // blocks that no map names: they came while the others were counted, or go, or a salvage kept them
	Metadata  int64 // pages of maps, identities, directory and root
	Garbage   int64 // in used segments, named by nothing
	Returning int64 // was garbage, is free two checkpoints from now
	Reserved  int64 // free, and kept: for cleaning, checkpoints and the bound of garbage
	Available int64 // free, for new data

	Usable int64 // what blocks and metadata may grow to
	Live   int64 // what they count as; see Room

	// What volumes map, in bytes, is Deduplicated + Compressed + Volumes.
	Mapped       int64
	Deduplicated int64 // by blocks that are stored once for all that name them, clones included
	Compressed   int64
	// Zeros were written since Open and take no room at all.
	Zeros int64

	// Sample is 1 when every block was counted. Otherwise one of so many was, and what
	// Volumes to Unsettled and List say of blocks is estimated from those.
	Sample int
	// List has a share for each volume, and for each deleted one whose snapshots remain,
	// in the order of their ids.
	List []VolumeShare
}

// VolumeShare is what a volume and its snapshots take of a pool, in bytes.
type VolumeShare struct {
	ID        VolumeID
	Deleted   bool  // only its snapshots are left
	Size      int64 // what it pretends to be
	Mapped    int64 // blocks that it maps, its annex included
	Reduced   int64 // the same as they are stored, each as often as it is mapped
	Stored    int64 // the same, each once
	Snapshots int   // their number
	// What would be given back in stored blocks: if its content went and its snapshots
	// stayed, if they went and it stayed, and if all of it is deleted.
	Own           int64
	SnapshotsOnly int64
	Frees         int64
	// FreesMetadata is what deleting all of it gives back in pages besides.
	FreesMetadata int64
}

// Free is what stands in free segments.
func (e *Explanation) Free() int64 { return e.Reserved + e.Available }

// explainWindow is the number of identities that are looked at in one walk of the maps:
// 100 MiB of RAM.
const explainWindow = 16 << 20

// Explain walks all maps while operations go on and says what the pool's bytes are there
// for. What changes meanwhile may be missed; the parts add up to the pool as it is in
// the end. A pool of more than 16 Mi blocks is sampled, unless exact: then it is walked
// once for each 16 Mi. progress, which may be nil, is told how far it is, from 0 to 1.
// It takes up to 100 MiB of RAM and 4 bytes for each page of metadata while it runs.
// Only one runs at a time: others wait. The error is that of ctx or the first page that
// cannot be read.
func (s *Store) Explain(ctx context.Context, exact bool, progress func(done float64)) (*Explanation, error) {
	return s.explain(ctx, exact, explainWindow, progress)
}

func (s *Store) explain(ctx context.Context, exact bool, window uint64, progress func(float64)) (*Explanation, error) {
	select {
	case s.explaining <- struct{}{}:
		defer func() { <-s.explaining }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	x := newExplainer(s, window, exact, progress)
	defer x.walk.close()
	for low := uint64(0); ; low += x.slots {
		if err := x.window(ctx, low); err != nil {
			return nil, fmt.Errorf("explain pool %x: %w", s.id, err)
		}
		s.mu.RLock()
		end := uint64(s.nextBID)
		s.mu.RUnlock()
		if x.stride > 1 || end <= low+x.slots {
			return x.result(), nil
		}
	}
}

// owners says who leads to something: volumes, snapshots, what is about to be given back,
// and of which volume they all are. It only grows; see join.
type owners uint32

const (
	ownedByVolume owners = 1 << iota
	ownedBySnapshot
	ownedByLeaving
	ownerShift       = 3
	ownerMany        = 1<<29 - 1 // volumes, or their snapshots, are more than one
	ownerFlags       = ownedByVolume | ownedBySnapshot | ownedByLeaving
	explainTellEvery = 1024
)

// join is all who are in either.
func (o owners) join(p owners) owners {
	flags := (o | p) & ownerFlags
	a, b := o>>ownerShift, p>>ownerShift
	switch {
	case a == 0 || a == b:
		a = b
	case b != 0:
		a = ownerMany
	}
	return a<<ownerShift | flags
}

// group is 1 + the index of the volume that alone leads there, with its snapshots.
func (o owners) group() int { return int(o >> ownerShift) }

// explainer counts. What it keeps for each identity of a window is who leads there and
// how many bytes it has.
type explainer struct {
	s        *Store
	walk     *ownerWalk
	progress func(float64)
	steps    float64 // pages that were looked at, of expected
	expected float64

	slots  uint64 // of a window
	stride uint64 // one page of identities of so many is looked at
	low    uint64
	owners []owners
	lens   []uint16
	met    []uint64 // bitmap: the volume that is walked maps it

	groups []VolumeShare
	index  map[VolumeID]int

	// Of all windows so far.
	unique                                 int64 // blocks of volumes
	volumes, snapshots, leaving, unsettled int64
	identityPages                          []int64 // that end with a group
	mapped                                 []int64 // words of volumes that were counted
	reduced, stored, own, only, whole      []int64
}

func newExplainer(s *Store, window uint64, exact bool, progress func(float64)) *explainer {
	x := &explainer{s: s, progress: progress, stride: 1, slots: window, index: map[VolumeID]int{}}
	x.walk = newOwnerWalk(s)
	s.mu.RLock()
	slots := uint64(s.nextBID)
	x.expected = float64(s.pg.nAlive.Load())
	s.mu.RUnlock()
	switch {
	case slots <= window:
		x.slots = slots&^(format.EntriesPerPage-1) + format.EntriesPerPage
	case exact:
		x.expected *= float64((slots + window - 1) / window)
	default:
		x.stride = (slots + window - 1) / window
	}
	n := x.slots
	x.owners, x.lens, x.met = make([]owners, n), make([]uint16, n), make([]uint64, (n+63)/64)
	return x
}

// place is where the window has a slot, if it has.
func (x *explainer) place(slot uint64) (uint64, bool) {
	if x.stride > 1 {
		page := slot / format.EntriesPerPage
		slot = page/x.stride*format.EntriesPerPage + slot%format.EntriesPerPage
		return slot, page%x.stride == x.stride/2 && slot < x.slots
	}
	return slot - x.low, x.low <= slot && slot-x.low < x.slots
}

func (x *explainer) step(n float64) {
	was := int(x.steps / explainTellEvery)
	if x.steps += n; x.progress != nil && was != int(x.steps/explainTellEvery) {
		x.progress(min(x.steps/max(x.expected, 1), 1))
	}
}

// group finds the share of a volume. The caller holds Store.mu.
func (x *explainer) group(id VolumeID) int {
	i, ok := x.index[id]
	if !ok {
		i = len(x.groups)
		x.index[id] = i
		x.groups = append(x.groups, VolumeShare{ID: id, Deleted: true})
		for _, list := range []*[]int64{&x.identityPages, &x.mapped, &x.reduced, &x.stored, &x.own, &x.only, &x.whole} {
			*list = append(*list, 0)
		}
	}
	return i
}

// window looks at one window of identities.
func (x *explainer) window(ctx context.Context, low uint64) error {
	s := x.s
	x.low = low
	clear(x.owners)
	clear(x.lens)
	clear(x.walk.owners)
	if err := x.lengths(ctx); err != nil {
		return err
	}
	s.mu.RLock()
	holders := make([]*Volume, 0, len(s.volumes)+len(s.snapshots))
	for id, v := range s.volumes {
		if id != SalvageVolume || v.deleting {
			holders = append(holders, v)
		}
	}
	for _, n := range s.snapshots {
		holders = append(holders, &n.content)
	}
	s.mu.RUnlock()
	slices.SortFunc(holders, func(a, b *Volume) int {
		if a.bare != b.bare {
			if b.bare {
				return -1 // volumes first: they are walked whole
			}
			return 1
		}
		return cmp.Compare(a.id, b.id)
	})
	for _, v := range holders {
		if err := x.holder(ctx, v); err != nil {
			return err
		}
	}
	x.sum()
	return nil
}

// lengths learns how many bytes each identity of the window has.
func (x *explainer) lengths(ctx context.Context) error {
	s := x.s
	i := x.low
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if x.stride > 1 {
			// On to the next page of the sample.
			page := i / format.EntriesPerPage
			page += (x.stride + x.stride/2 - page%x.stride) % x.stride
			i = page * format.EntriesPerPage
		}
		s.mu.RLock()
		data, _, missing, span := s.pg.lookup(s.identities, entryShift, i)
		over := uint64(s.nextBID) <= i || x.stride == 1 && x.low+x.slots <= i
		for k := 0; data != nil && !over && k < format.EntriesPerPage; k++ {
			e := format.EntryAt(data, k)
			if at, ok := x.place(i + uint64(k)); ok && format.EntryAddr(e) != 0 {
				x.lens[at] = uint16(min(format.EntryShare(e), dedup.BlockSize))
			}
		}
		s.mu.RUnlock()
		if over {
			return nil
		}
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return err
			}
			continue
		}
		if i = nextSpan(i, max(span, entryShift)); i == ^uint64(0) {
			return nil
		}
		x.step(1)
	}
}

// holder walks the maps of one volume or snapshot, and what it is about to give back.
func (x *explainer) holder(ctx context.Context, v *Volume) error {
	s := x.s
	s.mu.RLock()
	of, leaving := v.id, v.deleting || v.stale
	if n := s.snapshots[v.id]; v.bare && n != nil {
		of = n.of
	} else if v.bare {
		of, leaving = 0, true // deleted since
	}
	mine := ownedByLeaving
	g := -1
	if !leaving {
		g = x.group(of)
		mine = owners(g+1)<<ownerShift | ownedByVolume
		share := &x.groups[g]
		if v.bare {
			mine = owners(g+1)<<ownerShift | ownedBySnapshot
			if x.low == 0 {
				share.Snapshots++
			}
		} else {
			share.Deleted = false
			share.Size, share.Mapped = int64(v.size.Load())*dedup.BlockSize, int64(v.mapped+v.annex)*dedup.BlockSize
		}
	}
	s.mu.RUnlock()
	whole := mine&ownedByVolume != 0
	if whole {
		clear(x.met)
	}
	count := func(leaf []byte) {
		x.step(1)
		for i := range format.WordsPerPage {
			w := BID(format.Word(leaf, i))
			if w == 0 {
				continue
			}
			at, ok := x.place(w.slot())
			if !ok {
				continue
			}
			x.owners[at] = x.owners[at].join(mine)
			if !whole {
				continue
			}
			x.mapped[g]++
			x.reduced[g] += int64(x.lens[at])
			if bit := uint64(1) << (at % 64); x.met[at/64]&bit == 0 {
				x.met[at/64] |= bit
				x.stored[g] += int64(x.lens[at])
			}
		}
	}
	if err := x.walk.leaves(ctx, func() tree { return v.mapTree }, mine, whole, count); err != nil {
		return err
	}
	if err := x.walk.leaves(ctx, func() tree { return v.versions }, mine, whole, nil); err != nil {
		return err
	}
	// What a rollback left.
	mine, whole = ownedByLeaving, false
	for k := 0; ; k++ {
		s.mu.RLock()
		over := len(v.old) <= k
		s.mu.RUnlock()
		if over {
			return nil
		}
		if err := x.walk.leaves(ctx, func() tree { return treeOf(v, k) }, mine, false, count); err != nil {
			return err
		}
	}
}

// sum adds up a window.
func (x *explainer) sum() {
	for first := 0; first < len(x.lens); first += format.EntriesPerPage {
		ends := -1 // the group with which all of the page ends
		for i := first; i < min(first+format.EntriesPerPage, len(x.lens)); i++ {
			n, o := int64(x.lens[i]), x.owners[i]
			if n == 0 {
				continue
			}
			switch {
			case o&ownedByVolume != 0:
				x.volumes += n
				x.unique++
			case o&ownedBySnapshot != 0:
				x.snapshots += n
			case o&ownedByLeaving != 0:
				x.leaving += n
			default:
				x.unsettled += n
			}
			g := o.group()
			if g == 0 || g == ownerMany {
				ends = ownerMany
				continue
			}
			x.whole[g-1] += n
			switch {
			case o&ownedByVolume == 0:
				x.only[g-1] += n
			case o&ownedBySnapshot == 0:
				x.own[g-1] += n
			}
			if ends == -1 {
				ends = g
			} else if ends != g {
				ends = ownerMany
			}
		}
		if ends != -1 && ends != ownerMany {
			x.identityPages[ends-1]++
		}
	}
}

// result puts everything together, by the levels of the pool as they are now.
func (x *explainer) result() *Explanation {
	s := x.s
	e := &Explanation{Sample: int(x.stride), Zeros: s.stats.blocksZero.Load() * dedup.BlockSize}
	s.mu.RLock()
	t := s.segs
	e.Size = int64(t.present.Load()) * int64(t.bytes)
	free := int64(t.nFree.Load()+t.idle.Load()) * int64(t.bytes)
	data := t.data.Load()
	e.Metadata = t.live.Load() - data
	for i := range t.all {
		if t.all[i].state == segmentQuarantine && t.exists(uint32(i)) {
			e.Returning += int64(t.bytes)
		}
	}
	e.Live, e.Usable = s.charged(), s.usable.Load()
	e.Available = min(free, max(0, e.Usable-e.Live))
	e.Reserved = free - e.Available
	// Segments that stand on a device which failed hold data, and have no size.
	e.Size = max(e.Size, free+data+e.Metadata)
	e.Returning = min(e.Returning, e.Size-free-data-e.Metadata)
	e.Garbage = e.Size - free - data - e.Metadata - e.Returning
	pages := make([]int64, len(x.groups))
	for id, o := range x.walk.owners {
		if g := o.group(); 0 < g && g <= len(pages) && uint32(id) < s.pg.n && s.pg.page(uint32(id)).flags&pageAlive != 0 {
			pages[g-1]++
		}
	}
	s.mu.RUnlock()

	// To the blocks that the pool has: those of the sample, and what has come and gone.
	counted := x.volumes + x.snapshots + x.leaving + x.unsettled
	scale := func(n int64) int64 { return proportion(n, data, counted) }
	e.Snapshots, e.Leaving, e.Unsettled = scale(x.snapshots), scale(x.leaving), scale(x.unsettled)
	e.Volumes = data - e.Snapshots - e.Leaving - e.Unsettled
	if counted == 0 {
		e.Volumes, e.Unsettled = 0, data
	}
	for g := range x.groups {
		share := x.groups[g]
		if x.stride > 1 {
			blocks := share.Mapped / dedup.BlockSize
			share.Reduced = proportion(x.reduced[g], blocks, x.mapped[g])
			share.Stored = min(scale(x.stored[g]), share.Reduced)
			share.Own, share.SnapshotsOnly, share.Frees = scale(x.own[g]), scale(x.only[g]), scale(x.whole[g])
		} else {
			share.Reduced, share.Stored = x.reduced[g], x.stored[g]
			share.Own, share.SnapshotsOnly, share.Frees = x.own[g], x.only[g], x.whole[g]
		}
		share.FreesMetadata = (pages[g] + x.identityPages[g]*int64(x.stride)) * format.PageSize
		e.Mapped += share.Mapped
		e.List = append(e.List, share)
	}
	slices.SortFunc(e.List, func(a, b VolumeShare) int { return cmp.Compare(a.ID, b.ID) })
	unique := min(scale(x.unique*dedup.BlockSize), e.Mapped)
	e.Deduplicated = e.Mapped - unique
	e.Compressed = unique - e.Volumes
	if x.progress != nil {
		x.progress(1)
	}
	return e
}

// proportion is n * a / b without overflow, n when b is 0.
func proportion(n, a, b int64) int64 {
	if a == b || b == 0 {
		return n
	}
	return int64(float64(n) * (float64(a) / float64(b)))
}
