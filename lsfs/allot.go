package lsfs

import (
	"math/bits"

	"github.com/twinsan/twinsan/lsfs/format"
)

// A block identity is a slot of an identity page, and the generation of the slot:
//
//	bits 0..47   slot: its number through all pages
//	bits 48..63  generation: rises when slots of a page are given out again
//
// So no identity is ever given twice, and what is keyed by one (maps, caches) cannot
// take a block for another, while the pages stay full: new slots come from pages of
// which at most half is in use, and only where there is none from behind the last one.
// Of identity pages there are then at most a little over twice as many as their
// entries need, however long random overwriting goes on.
//
// The generation of a dead slot stays in its entry, and goes with the page when all
// of the page is dead: slots of a page that does not exist are not given out.
const (
	slotBits      = 48
	slotMask      = 1<<slotBits - 1
	generationMax = 1<<16 - 1
)

// slot is the place of the identity in the tree of identities.
func (b BID) slot() uint64 { return uint64(b) & slotMask }

func (b BID) generation() uint16 { return uint16(b >> slotBits) }

// identityAt is the identity that has slot i of a page, whose first slot is first.
func identityAt(first BID, i int, entry []byte) BID {
	return makeBID(first.slot()+uint64(i), format.EntryGeneration(entry))
}

func makeBID(slot uint64, generation uint16) BID { return BID(slot | uint64(generation)<<slotBits) }

const (
	// sparsePage is how many live entries a page may have for its slots to be given out.
	sparsePage = format.EntriesPerPage / 2
	// sparseFrom is the number of slots in pages per live entry, in quarters, from
	// which sparse pages are looked for: below, pages are as dense as they get.
	sparseFrom = 5
	// sparseSteps bounds the pages that one search looks at. Where fewer than one in
	// so many is sparse there is nothing to gain.
	sparseSteps = 128
)

// allotment is where new identities come from. It belongs to the committing role. It
// is a value: what a failed operation took is given back by putting the old one back.
type allotment struct {
	frontier uint64 // slot behind the last one that was given out afresh; 0: none was since the start
	base     uint64 // first slot of the page whose free slots are given out
	free     uint64 // which of them are left: bit i is slot base+i
	gen      uint16 // their generation
	hand     uint64 // slot at which the search for a sparse page goes on
	quiet    int    // identities to take from the frontier before the next search
}

// allot takes a new identity. The page it lies in, if it exists, is found and held by
// whoever scans the operation.
func (s *Store) allot() (BID, error) {
	a := &s.allotted
	if a.free == 0 && a.quiet <= 0 && sparseFrom*s.stored.Load() < 4*(s.pg.nEntries.Load()-s.sparseSlack())*format.EntriesPerPage {
		if err := s.findSparse(); err != nil {
			return 0, err
		}
	}
	if a.free != 0 {
		i := bits.TrailingZeros64(a.free)
		a.free &= a.free - 1
		return makeBID(a.base+uint64(i), a.gen), nil
	}
	a.quiet--
	if a.frontier == 0 {
		// A start begins a page: the last one may hold generations from replay.
		if a.frontier = uint64(s.nextBID); a.frontier > 1 {
			a.frontier = (a.frontier + format.EntriesPerPage - 1) &^ (format.EntriesPerPage - 1)
		}
	}
	a.frontier++
	return makeBID(a.frontier-1, 0), nil
}

// sparseSlack is how many identity pages a pool may have whatever is in them.
func (s *Store) sparseSlack() int64 { return int64(min(sparseSteps, s.segs.count()/16)) }

// findSparse moves the hand to the next page that is at most half in use, and makes
// its dead slots the ones to give out.
func (s *Store) findSparse() error {
	a := &s.allotted
	for steps := 0; steps < sparseSteps; {
		leaf, missing, at := s.nextIdentityPage(a.hand, &steps)
		if missing == 0 && leaf == 0 {
			a.hand = 0 // once around
			steps += sparseSteps / 4
			continue
		}
		if missing != 0 {
			steps += 8
			a.hand = at
			if err := s.fault(missing, true); err != nil {
				return err
			}
			continue
		}
		a.hand = at + format.EntriesPerPage
		s.mu.RLock()
		data := s.pg.data(leaf)
		if data != nil {
			s.pg.hold(leaf)
			a.take(&s.batch, at, data)
		}
		s.mu.RUnlock()
		if data == nil {
			a.hand = at
			steps += 8
			if err := s.fault(leaf, true); err != nil {
				return err
			}
			continue
		}
		if a.free != 0 {
			return nil
		}
	}
	a.quiet = format.EntriesPerPage
	return nil
}

// take looks at a page and takes its dead slots if there are enough, without those that
// the batch has given out and not made yet.
func (a *allotment) take(b *batch, base uint64, page []byte) {
	var free uint64
	var gen uint16
	n := 0
	for i := range format.EntriesPerPage {
		e := format.EntryAt(page, i)
		gen = max(gen, format.EntryGeneration(e))
		if _, given := b.find(base + uint64(i)); format.EntryAddr(e) == 0 && !given {
			free |= 1 << i
			n++
		}
	}
	if base == 0 && free&1 != 0 {
		free, n = free&^1, n-1 // identity 0 is the hole
	}
	if n < format.EntriesPerPage-sparsePage || gen == generationMax || a.frontier < base+format.EntriesPerPage {
		return
	}
	a.base, a.free, a.gen = base, free, gen+1
}

// nextIdentityPage finds the first page from a slot on that may be sparse: at is its
// first slot. missing is a page above that has to be read first; both 0: there is none
// up to the end. steps counts the pages that were passed.
func (s *Store) nextIdentityPage(slot uint64, steps *int) (leaf, missing uint32, at uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := s.identities
	slot &^= format.EntriesPerPage - 1
	for ; *steps < sparseSteps; *steps++ {
		id, miss, span, _ := s.pg.leafAt(t, entryShift, slot)
		if miss != 0 {
			return 0, miss, slot
		}
		if id != 0 {
			if n := s.pg.page(id).count; n <= sparsePage {
				return id, 0, slot
			}
		}
		next := nextSpan(slot, max(span, entryShift))
		if next == ^uint64(0) || uint64(s.nextBID) <= next {
			return 0, 0, 0
		}
		slot = next
	}
	s.allotted.hand = slot
	return 0, 0, slot
}

// fresh blocks of a batch by their slots: an open table, so that nothing is allocated.
type freshTable struct {
	at   [freshSlots]uint16 // 1 + index in batch.fresh, 0: empty
	used []uint16
}

// freshSlots is four times what a batch can store, so that a search is short.
const freshSlots = 4 * batchBlocks

func freshHash(slot uint64) uint64 { return slot * 0x9e3779b97f4a7c15 >> 40 % freshSlots }

func (t *freshTable) reset() {
	for _, h := range t.used {
		t.at[h] = 0
	}
	t.used = t.used[:0]
}

// put notes that block i of the batch has a slot. Blocks are taken back in reverse order only.
func (t *freshTable) put(slot uint64, i int) {
	h := freshHash(slot)
	for t.at[h] != 0 {
		h = (h + 1) % freshSlots
	}
	t.at[h] = uint16(i + 1)
	t.used = append(t.used, uint16(h))
}

// dropFrom forgets blocks n and later.
func (t *freshTable) dropFrom(n int) {
	for _, h := range t.used[n:] {
		t.at[h] = 0
	}
	t.used = t.used[:n]
}

// find gives the block of the batch with a slot.
func (b *batch) find(slot uint64) (int, bool) {
	for h := freshHash(slot); ; h = (h + 1) % freshSlots {
		i := int(b.slots.at[h]) - 1
		if i < 0 {
			return 0, false
		}
		if b.fresh[i].bid.slot() == slot {
			return i, true
		}
	}
}
