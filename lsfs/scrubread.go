package lsfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// The parts of a pass, as what has gone before them: reading blocks is nearly all of it.
const (
	donePages      = 0.04
	doneReferences = 0.08
	doneBlocks     = 0.97
)

func (s *Store) allocScrub() { s.scrub.prover = newProver(s) }

func (s *Store) freeScrub() {
	if s.scrub.prover != nil {
		s.scrub.prover.close()
		s.scrub.prover = nil
	}
}

// scrubSuperblocks makes all copies equal and intact.
func (s *Store) scrubSuperblocks() error {
	// A checkpoint writes them too: it waits, and so do cuts meanwhile.
	s.ckpt.super.Lock()
	defer s.ckpt.super.Unlock()
	n, err := s.healSuperblocks()
	if err != nil {
		return err
	}
	if n > 0 {
		s.cfg.Event(Event{Code: "superblock-repaired", Text: fmt.Sprintf("%d copies of the superblock were damaged and are written anew", n)})
		s.scrub.note(func(r *ScrubResult) { r.Damaged += uint64(n); r.Repaired += uint64(n) })
	}
	return nil
}

// scrubPages reads every page that the newest checkpoint names, the directory and the
// root. One that is damaged is made again from parity, or from RAM, and the next
// checkpoint writes it elsewhere.
func (s *Store) scrubPages(ctx context.Context) error {
	k := &s.scrub
	for id := uint32(max(1, k.state.Next)); ; id++ {
		s.mu.RLock()
		n := s.pg.n
		s.mu.RUnlock()
		if n <= id {
			return s.scrubDirectory(ctx)
		}
		start := time.Now()
		if !s.scrubPage(id) {
			continue
		}
		k.note(func(r *ScrubResult) { r.Pages++ })
		if err := s.pace(ctx, format.PageSize, time.Since(start)); err != nil {
			return err
		}
		k.at(uint64(id), uint64(n), 0, donePages)
	}
}

// scrubPage reads one page, and has it repaired when it is damaged. It says whether
// there was anything to read: what is dirty will be written anew.
func (s *Store) scrubPage(id uint32) bool {
	page := s.scrub.prover.buf[:format.PageSize]
	s.mu.RLock()
	p, e := s.pg.page(id), *s.pg.entry(id)
	use := p.flags&pageAlive != 0 && p.flags&pageDirty == 0 && s.segs.valid(e.Addr, format.PageSize)
	if use {
		s.segs.arena[e.Addr.Segment()].readers.Add(1)
	}
	s.mu.RUnlock()
	if !use {
		return false
	}
	if err := s.readPage(page, e); err != nil {
		s.mendPage(id, page, e, err)
	}
	s.segs.arena[e.Addr.Segment()].readers.Add(-1)
	return true
}

// mendPage repairs a page whose stored form is damaged.
func (s *Store) mendPage(id uint32, page []byte, e format.DirEntry, why error) {
	err := s.repairPage(page, e.Addr, e.Sum, why)
	s.mu.Lock()
	p := s.pg.page(id)
	switch {
	case p.flags&pageAlive == 0 || s.pg.entry(id).Addr != e.Addr:
		err = nil // it stands elsewhere by now
	case p.frame != 0:
		err = nil
		s.pg.touch(id)
	case err == nil:
		s.pg.install(id, page)
		s.pg.touch(id)
	}
	s.mu.Unlock()
	s.ckpt.changed.Store(true)
	s.scrub.note(func(r *ScrubResult) {
		r.Damaged++
		if err == nil {
			r.Repaired++
		} else {
			r.Lost++
		}
	})
	if err != nil {
		s.cfg.Event(Event{Code: "metadata-lost", Text: fmt.Sprintf("page %d of the metadata cannot be made again: rebuild this node's replicas from the others", id), Err: err})
	}
}

// scrubDirectory reads the pages of the directory and the root. What is wrong is
// written anew by the checkpoint that follows.
func (s *Store) scrubDirectory(ctx context.Context) error {
	k := &s.scrub
	c := &s.ckpt
	page := k.prover.buf[:format.PageSize]
	damaged := uint64(0)
	for j := 0; ; j++ {
		s.mu.RLock()
		if len(c.dirAt) <= j {
			s.mu.RUnlock()
			break
		}
		x := c.dirAt[j]
		if x.Addr != 0 {
			s.segs.arena[x.Addr.Segment()].readers.Add(1)
		}
		s.mu.RUnlock()
		if x.Addr == 0 {
			continue
		}
		err := s.readPage(page, format.DirEntry{Addr: x.Addr, Sum: x.Sum})
		s.segs.arena[x.Addr.Segment()].readers.Add(-1)
		if err != nil {
			damaged++
			s.mu.Lock()
			if c.dirAt[j] == x {
				c.dirDirty[j] = true // all of it is in RAM
			}
			s.mu.Unlock()
		}
		if err := s.pace(ctx, format.PageSize, 0); err != nil {
			return err
		}
	}
	s.mu.RLock()
	roots := slices.Clone(c.rootAt)
	for _, x := range roots {
		s.segs.arena[x.Addr.Segment()].readers.Add(1)
	}
	s.mu.RUnlock()
	for _, x := range roots {
		sum := uint32(0)
		var err error
		for at := uint32(0); at < x.Len && err == nil; at += format.PageSize {
			d, off := s.segs.locate(x.Addr + format.Addr(at))
			if err = d.ReadAt(page, off); err == nil {
				sum = format.AddChecksum(sum, page[:min(format.PageSize, x.Len-at)])
			}
		}
		if err != nil || sum != x.Sum {
			damaged++
			_ = s.report(s.corrupt("root", x.Addr, x.Sum, sum, err))
		}
		s.segs.arena[x.Addr.Segment()].readers.Add(-1)
	}
	if damaged == 0 {
		return nil
	}
	k.note(func(r *ScrubResult) { r.Damaged += damaged })
	if err := s.checkpoint(); err != nil {
		return err
	}
	k.note(func(r *ScrubResult) { r.Repaired += damaged })
	return nil
}

// scrubBlocks reads every stored block, in the order of identities, which is nearly
// that of the log.
func (s *Store) scrubBlocks(ctx context.Context) error {
	k := &s.scrub
	for i := k.state.Next; ; {
		s.mu.RLock()
		end := uint64(s.nextBID)
		if end <= i {
			s.mu.RUnlock()
			return nil
		}
		k.list = k.list[:0]
		bytes, missing := 0, uint32(0)
		from := i
		for i < end && bytes < proverBytes {
			data, _, miss, span := s.pg.lookup(s.identities, entryShift, i)
			if missing = miss; missing != 0 {
				break
			}
			for n := 0; data != nil && n < format.EntriesPerPage; n++ {
				e := format.EntryAt(data, n)
				if format.EntryAddr(e) == 0 {
					continue
				}
				k.list = append(k.list, suspect{bid: identityAt(BID(i), n, e)})
				l := &k.list[len(k.list)-1]
				format.ParseEntry(e, &l.e)
				if l.nowhere = !s.segs.valid(l.e.Addr, uint32(l.e.Len)) || l.e.Len == 0; l.nowhere {
					continue
				}
				s.segs.arena[l.e.Addr.Segment()].readers.Add(1)
				if n := len(k.list); n < 2 || !sameGroup(&l.e, &k.list[n-2].e) {
					bytes += int(l.e.Len)
				}
			}
			if i = nextSpan(i, max(span, entryShift)); i == ^uint64(0) {
				break
			}
		}
		s.mu.RUnlock()
		if missing != 0 && from == i {
			if err := s.fault(missing, false); err != nil {
				// Its 64 identities cannot be read: counted with the pages.
				i = nextSpan(i, entryShift)
			}
			continue
		}
		start := time.Now()
		n := s.proveBlocks(ctx, k.list)
		for j := range k.list {
			if l := &k.list[j]; !l.nowhere {
				s.segs.arena[l.e.Addr.Segment()].readers.Add(-1)
			}
		}
		blocks := len(k.list)
		k.note(func(r *ScrubResult) { r.Blocks += uint64(blocks) })
		if err := s.pace(ctx, n, time.Since(start)); err != nil {
			return err
		}
		k.at(i, end, doneReferences, doneBlocks)
	}
}

// proveBlocks reads blocks whose segments are held, and has those repaired that are
// damaged. It returns the bytes that it read.
func (s *Store) proveBlocks(ctx context.Context, list []suspect) int {
	return s.scrub.prover.prove(list, func(l *suspect, found uint32, why error) {
		ce := s.corrupt("block", l.e.Addr, l.e.Sum, found, why)
		ce.BID, ce.Fingerprint = l.bid, l.e.Fingerprint
		s.mendBlock(ctx, l, ce)
	})
}

// mendBlock replaces a damaged block by an intact copy, or remembers it.
func (s *Store) mendBlock(ctx context.Context, l *suspect, ce *CorruptError) {
	k := &s.scrub
	_ = s.report(ce)
	k.note(func(r *ScrubResult) { r.Damaged++ })
	if err := s.replaceBlock(ctx, l, nil); err == nil {
		k.note(func(r *ScrubResult) { r.Repaired++ })
		return
	}
	if len(k.unfixed) < scrubLostMax {
		k.unfixed = append(k.unfixed, *l)
	} else {
		k.note(func(r *ScrubResult) { r.Lost++ })
	}
}

// replaceBlock stores an intact copy of a block: from the cache, or from a donor.
func (s *Store) replaceBlock(ctx context.Context, l *suspect, places []Place) error {
	k := &s.scrub
	var plain [dedup.BlockSize]byte
	if s.l1.Get(uint64(l.bid), plain[:], 0) && k.prover.red.Fingerprint(plain[:]) == l.e.Fingerprint {
		enc, data := k.prover.red.Encode(make([]byte, 0, dedup.EncodeRoom), plain[:], l.e.Encoding != dedup.Raw)
		return s.putIntact(l, dedup.Block{Fingerprint: l.e.Fingerprint, Encoding: enc, Data: data, Sum: dedup.Sum(data)})
	}
	donor := k.donor.Load()
	if donor == nil {
		return ErrNotFound
	}
	b, err := (*donor)(ctx, l.e.Fingerprint, places)
	if err != nil {
		return err
	}
	if err := dedup.Verify(&b); err != nil || len(b.Data) == 0 {
		return fmt.Errorf("the copy of another replica: %w", errors.Join(errChecksum, err))
	}
	if err := dedup.Decode(plain[:], b.Encoding, b.Data); err != nil {
		return err
	}
	if k.prover.red.Fingerprint(plain[:]) != l.e.Fingerprint {
		return fmt.Errorf("the copy of another replica: %w", errFingerprint)
	}
	return s.putIntact(l, b)
}

func (s *Store) putIntact(l *suspect, b dedup.Block) error {
	err := s.post(&task{kind: taskMove, moves: []move{{bid: l.bid, old: l.e.Addr, sum: b.Sum, enc: b.Encoding, data: b.Data}}})
	if err == nil {
		s.stats.repairs.Add(1)
		s.cfg.Event(Event{Code: "block-repaired", Text: fmt.Sprintf("block %d at segment %d offset %d of %s was damaged and is replaced by an intact copy", l.bid, l.e.Addr.Segment(), l.e.Addr.Offset(), s.devicePath(l.e.Addr.Segment()))})
	}
	return err
}

// settleLost finds out where the blocks stand that could not be repaired, tries once
// more with that knowledge, and names what is left.
func (s *Store) settleLost(ctx context.Context) error {
	k := &s.scrub
	if len(k.unfixed) == 0 {
		return nil
	}
	wanted := make(map[BID][]Place, len(k.unfixed))
	for _, l := range k.unfixed {
		wanted[l.bid] = nil
	}
	if err := s.findPlaces(ctx, wanted); err != nil {
		return err
	}
	for i := range k.unfixed {
		l := &k.unfixed[i]
		places := wanted[l.bid]
		if len(places) == 0 {
			continue // overwritten since
		}
		if s.replaceBlock(ctx, l, places) == nil {
			k.note(func(r *ScrubResult) { r.Repaired++ })
			continue
		}
		k.note(func(r *ScrubResult) { r.Lost++ })
		k.mu.Lock()
		k.lost = append(k.lost, places...)
		k.lost = k.lost[:min(len(k.lost), 64)]
		k.mu.Unlock()
		s.cfg.Event(Event{Code: "block-lost", Text: fmt.Sprintf("a damaged block has no intact copy in reach: %v (and as many as share it)", places), Err: s.corrupt("block", l.e.Addr, l.e.Sum, 0, nil)})
	}
	k.unfixed = k.unfixed[:0]
	return nil
}

// placesMax bounds the places that are found of one block.
const placesMax = 16

// findPlaces walks all maps and notes where the wanted identities stand.
func (s *Store) findPlaces(ctx context.Context, wanted map[BID][]Place) error {
	err := s.eachMapLeaf(ctx, nil, func(v VolumeID, first uint64, _ uint32, leaf []byte) {
		for i := range format.WordsPerPage {
			w := BID(format.Word(leaf, i))
			places, ok := wanted[w]
			if w == 0 || !ok {
				continue
			}
			at := BlockNo(first) + BlockNo(i)
			if n := len(places); n > 0 && places[n-1].Volume == v && places[n-1].Start+BlockNo(places[n-1].Blocks) == at {
				places[n-1].Blocks++
			} else if n < placesMax {
				places = append(places, Place{v, at, 1})
			}
			wanted[w] = places
		}
	})
	var damage *CorruptError
	if errors.As(err, &damage) {
		return nil // what can be read was looked at
	}
	return err
}
