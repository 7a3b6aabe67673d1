package lsfs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"math/bits"
	"slices"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// A pass has two parts, which alternate when there are many duplicates.
//
// First it walks the identity pages and looks each fingerprint up in the catalogue. What
// is not there is put there. What is there with another identity that is alive is a pair.
// Pages that have not changed since they were looked at are left out: the catalogue keeps a
// digest of each, and does so after it has taken the page's fingerprints. A page with a
// pair has no digest, so the next pass comes back to it if this one cannot merge the pair.
//
// Then it walks the maps of volumes and snapshots, because nothing leads from an identity
// to the blocks that are mapped to it, and merges the words that name the first of a
// pair. Before the first of them both blocks are read, verified and compared: a
// fingerprint alone never makes data one.
//
// Both parts read pages past the frames, leave operations half of the time, and can stop
// anywhere. Pairs are kept in RAM, so many at a time that a walk of the maps pays.

const (
	// gatherMax is how many identities are looked up at once, sorted: their entries of the
	// catalogue lie closer together the more there are.
	gatherMax = 16 << 10
	// pairsPer is how many bytes of RAM for metadata allow one pair, which takes some 48.
	pairsPer = 1024
	pairsMin = 4 << 10
	pairsMax = 1 << 20
	// cataloguePer and catalogueMin bound the catalogue: one that has more bytes for each identity is
	// full of dead ones and is begun anew. An entry takes 33 bytes, and some 40 with what it takes
	// in filters and while tables are rewritten.
	cataloguePer = 160
	catalogueMin = 256 << 20
)

// pair is what an identity can be merged into.
type pair struct {
	to     BID
	proven bool // both were read and are equal
}

// mergeRun is one pass.
type mergeRun struct {
	s     *Store
	cat   catalogue
	ops   int64
	buf   []byte // aligned
	reads []device.Read
	batch []*device.Read

	list   []knownBlock // gathered, not looked up yet
	known  []uint64     // what the catalogue says to each
	put    []knownBlock
	groups []groupMarks // of the pages that list is from, ascending
	pairs  map[BID]pair
	limit  int
	plain  [2][dedup.BlockSize]byte
	words  []format.Merge
}

// mergePass looks at all identities once.
func (s *Store) mergePass(ctx context.Context, c catalogue) error {
	if most := max(catalogueMin, cataloguePer*s.stored.Load()); c.Bytes() > most {
		if err := c.Reset(); err != nil {
			return err
		}
	}
	f := &mergeRun{
		s: s, cat: c, ops: s.stats.ops.Load(), buf: device.AlignedBuffer(fillPages * format.PageSize),
		reads: make([]device.Read, fillPages), batch: make([]*device.Read, 0, fillPages),
		pairs: make(map[BID]pair), limit: int(min(max(s.cfg.MetadataBytes/pairsPer, pairsMin), pairsMax)),
	}
	defer device.FreeAligned(f.buf)
	s.mu.RLock()
	end := uint64(s.nextBID)
	s.mu.RUnlock()
	for group := uint64(0); group*fillPages*format.EntriesPerPage < end; group++ {
		began := time.Now()
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.gather(group, end); err != nil {
			return err
		}
		if len(f.list) >= gatherMax {
			if err := f.look(); err != nil {
				return err
			}
		}
		if len(f.pairs) >= f.limit {
			if err := f.merge(ctx); err != nil {
				return err
			}
		}
		s.merger.at(float64(group*fillPages*format.EntriesPerPage) / float64(end) / 2)
		f.rest(time.Since(began))
	}
	if err := f.look(); err != nil {
		return err
	}
	return f.merge(ctx)
}

// rest leaves operations as much time as was worked.
func (f *mergeRun) rest(worked time.Duration) { f.ops = f.s.yield(worked, f.ops, f.s.stop) }

// digest tells the live entries of an identity page from any others, 0: there are none.
// What has no references yet, or no more, is left for later.
func digest(page []byte) (d uint64) {
	for i := range format.EntriesPerPage {
		if e := format.EntryAt(page, i); format.EntryAddr(e) != 0 && format.EntryRefs(e) > 0 {
			// Fingerprints are uniform: it takes no more than to tell their order apart.
			d = bits.RotateLeft64(d, 5)*0x9e3779b97f4a7c15 + binary.LittleEndian.Uint64(e) + uint64(i)<<16 + uint64(format.EntryGeneration(e)) + 1
		}
	}
	return d
}

// gather adds the identities of one group of pages, where they changed, to the list.
func (f *mergeRun) gather(group, end uint64) error {
	g := groupMarks{Group: group}
	if err := f.cat.Marks(group, &g.Marks); err != nil {
		return err
	}
	low := group * fillPages * format.EntriesPerPage
	before, changed := len(f.list), false
	_, err := f.s.fillFrom(low, min(end, low+fillPages*format.EntriesPerPage), f.buf, f.reads, f.batch, func(first uint64, page []byte) int64 {
		mark := &g.Marks[first/format.EntriesPerPage%fillPages]
		d := digest(page)
		if d == *mark {
			return 0
		}
		*mark, changed = d, true
		for i := range format.EntriesPerPage {
			if e := format.EntryAt(page, i); format.EntryAddr(e) != 0 && format.EntryRefs(e) > 0 {
				f.list = append(f.list, knownBlock{Fingerprint: dedup.Fingerprint(e[:32]), Ref: uint64(identityAt(BID(first), i, e))})
			}
		}
		return 0
	})
	if changed {
		f.groups = append(f.groups, g)
	}
	n := int64(len(f.list) - before)
	f.s.merger.note(func(r *MergeResult) { r.Looked += n })
	return err
}

// look finds what of the list is known already, and makes the rest known.
func (f *mergeRun) look() error {
	slices.SortFunc(f.list, func(a, b knownBlock) int {
		if c := bytes.Compare(a.Fingerprint[:], b.Fingerprint[:]); c != 0 {
			return c
		}
		return cmp.Compare(a.Ref, b.Ref)
	})
	f.known = slices.Grow(f.known[:0], len(f.list))[:len(f.list)]
	err := f.cat.Lookup(f.list, func(i int, ref uint64, _ bool) { f.known[i] = ref })
	if err != nil {
		return err
	}
	f.put = f.put[:0]
	found := int64(0)
	keep := BID(0)
	for i := range f.list {
		e := &f.list[i]
		if i == 0 || e.Fingerprint != f.list[i-1].Fingerprint {
			keep = BID(f.known[i])
		}
		if keep == BID(e.Ref) {
			continue
		}
		ok, err := f.takes(keep, &e.Fingerprint)
		if err != nil {
			return err
		}
		if !ok {
			keep = BID(e.Ref)
			f.put = append(f.put, *e)
			continue
		}
		found++
		f.pairs[BID(e.Ref)] = pair{to: keep}
		f.unsettle(BID(e.Ref))
	}
	f.s.merger.note(func(r *MergeResult) { r.Found += found })
	if err := f.cat.Put(f.put); err != nil {
		return err
	}
	err = f.cat.PutMarks(f.groups)
	f.list, f.groups = f.list[:0], f.groups[:0]
	return err
}

// unsettle sees to it that the next pass looks at the page of an identity again.
func (f *mergeRun) unsettle(b BID) {
	page := b.slot() / format.EntriesPerPage
	i, ok := slices.BinarySearchFunc(f.groups, page/fillPages, func(g groupMarks, n uint64) int { return cmp.Compare(g.Group, n) })
	if ok {
		f.groups[i].Marks[page%fillPages] = 0
	}
}

// takes says whether an identity is alive, has that content, and has room for references.
func (f *mergeRun) takes(b BID, fp *dedup.Fingerprint) (ok bool, err error) {
	if b == 0 {
		return false, nil
	}
	s := f.s
	for {
		s.mu.RLock()
		e, _, missing := s.entryOf(b)
		ok = e != nil && dedup.Fingerprint(e[:32]) == *fp && format.EntryRefs(e) > 0 && format.EntryRefs(e) < s.refsMax-mergesMax
		s.mu.RUnlock()
		if missing == 0 {
			return ok, nil
		}
		if err := s.fault(missing, false); err != nil {
			return false, err
		}
	}
}

// errCrowded: there is no room to change maps now.
var errCrowded = errors.New("no free segments: duplicates are left for the next pass")

// merge walks all maps and merges the pairs that it comes by.
func (f *mergeRun) merge(ctx context.Context) error {
	s := f.s
	left := len(f.pairs)
	if left == 0 {
		return nil
	}
	defer clear(f.pairs)
	w := &leafWalk{s: s, buf: device.AlignedBuffer(format.PageSize), done: make(map[uint32]bool)}
	defer device.FreeAligned(w.buf)
	w.pace = func(ctx context.Context, _ int, took time.Duration) error {
		f.rest(took)
		return ctx.Err()
	}
	w.f = func(_ VolumeID, first uint64, _ uint32, leaf []byte) {
		for i := range format.WordsPerPage {
			if b := BID(format.Word(leaf, i)); b != 0 {
				if p, ok := f.pairs[b]; ok {
					f.words = append(f.words, format.Merge{Block: first + uint64(i), From: uint64(b), To: uint64(p.to)})
				}
			}
		}
	}
	s.mu.RLock()
	holders := slices.Collect(maps.Values(s.volumes))
	for _, n := range s.snapshots {
		holders = append(holders, &n.content)
	}
	s.mu.RUnlock()
	slices.SortFunc(holders, func(a, b *Volume) int { return cmp.Compare(a.id, b.id) })
	for n, v := range holders {
		for i := uint64(0); i != ^uint64(0); {
			next, err := w.step(ctx, v, -1, i)
			if err != nil {
				return err
			}
			i = next
			if len(f.words) == 0 {
				continue
			}
			began := time.Now()
			ended, err := f.mergeWords(ctx, v.id)
			if err != nil {
				return err
			}
			if left -= ended; left <= 0 {
				return nil
			}
			f.rest(time.Since(began))
		}
		w.inside = w.inside[:0]
		s.merger.at(0.5 + float64(n+1)/float64(len(holders))/2)
	}
	return w.unreadable
}

// mergeWords merges the words of one leaf and says how many pairs are done with.
func (f *mergeRun) mergeWords(ctx context.Context, volume VolumeID) (ended int, err error) {
	s := f.s
	n := 0
	for _, m := range f.words {
		p, ok := f.pairs[BID(m.From)]
		if ok && !p.proven {
			if p.proven, err = f.prove(ctx, BID(m.From), p.to); err != nil {
				return ended, err
			}
			if f.pairs[BID(m.From)] = p; !p.proven {
				delete(f.pairs, BID(m.From)) // dead, or damaged: then scrub has it
				ended++
				ok = false
			}
		}
		if ok {
			f.words[n] = m
			n++
		}
	}
	for words := f.words[:n]; len(words) > 0; {
		if s.short() {
			return ended, errCrowded
		}
		t := &task{kind: taskMerge, volume: volume, merges: words[:min(mergesMax, len(words))]}
		words = words[len(t.merges):]
		if err := s.post(t); err != nil {
			return ended, err
		}
		ended += int(t.merged.blocks)
		s.merger.blocks.Add(t.merged.blocks)
		s.merger.bytes.Add(t.merged.bytes)
		s.merger.note(func(r *MergeResult) { r.Blocks += t.merged.blocks; r.Bytes += t.merged.bytes })
	}
	f.words = f.words[:0]
	return ended, nil
}

// prove reads both blocks of a pair and compares them. What it finds holds as long as both
// identities live: their content never changes. A block that cannot be read is no error.
func (f *mergeRun) prove(ctx context.Context, from, to BID) (equal bool, err error) {
	s := f.s
	rc, err := s.leaseFor(ctx, 2)
	if err != nil {
		return false, err
	}
	defer s.giveBack(rc)
	rc.blocks = rc.blocks[:0]
	for i, b := range [...]BID{from, to} {
		for {
			s.mu.RLock()
			at, _, missing := s.entryOf(b)
			if at != nil {
				rc.blocks = append(rc.blocks, located{index: i, bid: b})
				l := &rc.blocks[len(rc.blocks)-1]
				format.ParseEntry(at, &l.e)
				s.segs.all[l.e.Addr.Segment()].readers.Add(1)
			}
			s.mu.RUnlock()
			if missing == 0 {
				break
			}
			if err := s.fault(missing, false); err != nil {
				s.letGo(rc)
				return false, err
			}
		}
	}
	if len(rc.blocks) < 2 {
		s.letGo(rc)
		return false, nil
	}
	fp := rc.blocks[1].e.Fingerprint
	err = s.fetchAll(rc, nil, 0, func(l *located, stored []byte) error {
		if l.e.Encoding == dedup.ZstdGroup {
			copy(f.plain[l.index][:], stored)
			return nil
		}
		return dedup.Decode(f.plain[l.index][:], l.e.Encoding, stored)
	})
	if err != nil {
		return false, s.failure()
	}
	if f.plain[0] != f.plain[1] {
		s.logger.Error("blocks with one fingerprint differ", "bid", from, "other", to)
		return false, nil
	}
	s.index.Insert(&fp, to.slot())
	return true, nil
}
