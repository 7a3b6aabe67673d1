package lsfs

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// How salvaged blocks enter the store, and how they leave it. They are logged as
// references of a copy into SalvageVolume to blocks that stand already: replay makes
// identities of such records by itself (see ref), so nothing about the log is new.

// adopted is what became of an adopt task.
type adopted struct {
	looked int // at so many of the list, from the start
	blocks int // became identities
	bytes  int64
}

// runAdopt makes identities of blocks that stand in segments already: of those of the
// task's list that are not known yet, as many as the pages in RAM have room for.
// The list is sorted by slot, the newest of a slot first.
func (s *Store) runAdopt(t *task) error {
	b := &s.batch
	met := make(map[dedup.Fingerprint]bool, len(t.adopt))
	live := make([]format.BlockEntry, 0, len(t.adopt))
	var replaced []uint64 // slots whose older identity goes
	var result adopted
	for i := range t.adopt {
		e := &t.adopt[i]
		if i > 0 && s.pg.held > s.pg.max/4 {
			break // BOUNDED
		}
		result.looked++
		slot := BID(e.BID).slot()
		if met[e.Fingerprint] || len(live) > 0 && BID(live[len(live)-1].BID).slot() == slot {
			continue
		}
		known, older, err := s.salvaged(e)
		if err != nil {
			return err
		}
		if known {
			continue
		}
		if older {
			replaced = append(replaced, slot)
		}
		met[e.Fingerprint] = true
		e.Ref = true
		live = append(live, *e)
		result.bytes += int64(e.Share())
	}
	t.adopted = result
	if len(live) == 0 {
		return nil
	}
	head := format.OpHead{Volume: uint64(SalvageVolume), Epoch: 1, Seq: 1}
	put := func(kind format.RecordKind, slot uint64, n, size int) []byte {
		head.Start, head.Count = slot, uint32(n)
		at := b.buf[b.end : b.end+size]
		format.PutOp(at, kind, &head, size)
		b.end += size
		b.n++
		return at
	}
	for _, slot := range replaced {
		put(format.RecordUnmap, slot, 1, format.OpFixed)
	}
	for i := 0; i < len(live); {
		n := 1
		for i+n < len(live) && BID(live[i+n].BID).slot() == BID(live[i].BID).slot()+uint64(n) {
			n++
		}
		at := put(format.RecordCopy, BID(live[i].BID).slot(), n, format.OpSize(format.RecordCopy, n, 0))
		for k := range n {
			format.PutBlock(at[format.OpFixed+k*format.BlockEntrySize:], &live[i+k])
		}
		r, _, err := format.NextRecord(at)
		if err == nil {
			err = s.require(r)
		}
		if err != nil {
			return err
		}
		i += n
	}
	b.relaxed = true // the superblocks that count come after the last flush
	if err := s.write(); err != nil {
		return err
	}
	s.adopting = true
	err := s.applyBatch()
	s.adopting = false
	if err != nil {
		return err
	}
	for i := range live {
		e := &live[i]
		s.index.Insert(&e.Fingerprint, BID(e.BID).slot())
		if e.Encoding == dedup.Zstd {
			s.needRoot(rootOfZstd)
		} else if e.Encoding == dedup.ZstdGroup {
			s.needRoot(rootOfGroups)
		}
	}
	t.adopted.blocks = len(live)
	return nil
}

// rootOfZstd is the first version of roots whose pools may hold single blocks that zstd compressed.
const rootOfZstd = 4

// needRoot has roots written in a version that tells programs what the pool holds.
func (s *Store) needRoot(version uint32) {
	s.rootVersion.Store(max(s.rootVersion.Load(), version))
}

// salvaged says whether a block is known already, or else whether its slot has an older identity.
func (s *Store) salvaged(e *format.BlockEntry) (known, older bool, err error) {
	slot := BID(e.BID).slot()
	for {
		s.mu.RLock()
		at, _, missing := s.slotEntry(slot)
		if missing == 0 {
			if at != nil {
				older = format.EntryGeneration(at) < BID(e.BID).generation()
				known = !older
			}
			if !known {
				known, missing = s.stands(&e.Fingerprint)
			}
		}
		s.mu.RUnlock()
		if missing == 0 {
			return known, older && !known, nil
		}
		if err := s.fault(missing, true); err != nil {
			return false, false, err
		}
	}
}

// stands says whether the index knows an identity with a fingerprint. missing is a page
// that must be read to know. The caller has Store.mu.
func (s *Store) stands(fp *dedup.Fingerprint) (yes bool, missing uint32) {
	var refs [dedup.Ways]uint64
	for _, ref := range refs[:s.index.Candidates(fp, &refs)] {
		_, e, miss := s.candidate(ref, fp)
		if e != nil {
			return true, 0
		}
		missing = max(missing, miss)
	}
	return false, missing
}

// Recall reads the pages that Pin, which does no I/O, needs to find salvaged blocks among
// these. In a store that holds none it does nothing. What cannot be read Pin will not find.
func (s *Store) Recall(ctx context.Context, fps []dedup.Fingerprint) {
	if _, held := s.Salvaged(); !held {
		return
	}
	for i := range fps {
		if fps[i] == (dedup.Fingerprint{}) {
			continue
		}
		for ctx.Err() == nil {
			s.mu.RLock()
			_, missing := s.stands(&fps[i])
			s.mu.RUnlock()
			if missing == 0 || s.fault(missing, false) != nil {
				break
			}
		}
	}
}

// Salvaged is the number of blocks that are held because a salvage kept them, those that
// volumes map again among them. held says whether the hold goes on.
func (s *Store) Salvaged() (blocks uint64, held bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v := s.volumes[SalvageVolume]
	if v == nil || v.deleting {
		return 0, false
	}
	return v.mapped, true
}

// EndSalvage gives up what a salvage kept and no volume has mapped since; it comes back as free
// space in the background, after a restart too. Without a salvage it does nothing. It is
// durable on return.
func (s *Store) EndSalvage(ctx context.Context) error {
	if _, held := s.Salvaged(); !held {
		return nil
	}
	if err := s.do(ctx, &task{kind: taskDelete, volume: SalvageVolume}); err != nil {
		return err
	}
	s.trimmer.kick()
	return nil
}

// salvageStep ends the hold before room runs short. It runs on the cleaner's goroutine.
func (s *Store) salvageStep() {
	if s.charged() < s.usable.Load()/100*salvageHold && !s.short() && !s.cleaner.stuck.Load() {
		return
	}
	blocks, held := s.Salvaged()
	if !held || s.post(&task{kind: taskDelete, volume: SalvageVolume}) != nil {
		return
	}
	s.trimmer.kick()
	s.logger.Warn("room is short: salvaged blocks are given up", "blocks", blocks)
	s.cfg.Event(Event{Code: "salvage-ended", Text: fmt.Sprintf("room is short: what the salvage kept (%d blocks) is given up, as far as no volume has it again; the other node sends what is still missing", blocks)})
}
