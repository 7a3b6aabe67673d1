package lsfs

import (
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

// A merge makes words of maps that name one identity name another with the same
// content, so that the first one ends with its last reference. It is a record of the log
// like any other change, with the words that change: volume, block, what is there and
// what shall be there. Replay finds what was found live, since only records change maps.
//
// A leaf that several places lead to is changed in place, for all of them: what they
// read does not change. So no merge copies a page, or needs room for one.
//
// REFS: the words of a shared leaf count once, so a merged word is one reference more and
// one less, however many places lead to its leaf.

// mergesMax bounds the words of one merge, which operations wait for: with their identity
// pages not much more than 1 MiB.
const mergesMax = 128

// scanMerge holds the pages of a merge and collects the missing ones.
func (s *Store) scanMerge(r format.Record) {
	volume, n := r.Merges()
	v := s.find(VolumeID(volume))
	if v == nil {
		return // apply says so
	}
	var m format.Merge
	for i := range n {
		r.Merge(i, &m)
		s.scanPath(v.mapTree, wordShift, m.Block)
		s.scanIdentity(BID(m.From))
		s.scanIdentity(BID(m.To))
	}
}

// applyMerge makes a merge true. The pages are held.
func (s *Store) applyMerge(r format.Record) error {
	volume, n := r.Merges()
	v := s.find(VolumeID(volume))
	if v == nil {
		return fmt.Errorf("merge in volume %d: %w", volume, ErrNoVolume)
	}
	var m format.Merge
	for i := range n {
		r.Merge(i, &m)
		data, leaf, _, _ := s.pg.lookup(v.mapTree, wordShift, m.Block)
		slot := int(m.Block) & (format.WordsPerPage - 1)
		from, _, _ := s.entryOf(BID(m.From))
		to, _, _ := s.entryOf(BID(m.To))
		if data == nil || m.From == 0 || format.Word(data, slot) != m.From || !mergeable(from, to) {
			return fmt.Errorf("merge of identity %d into %d at block %d of volume %d: %w", m.From, m.To, m.Block, volume, format.ErrInvalid)
		}
		s.addRef(BID(m.To))
		format.PutWord(s.pg.touch(leaf), slot, m.To)
		s.unref(BID(m.From))
	}
	return nil
}

// mergeable says whether two entries, nil for dead ones, are of different identities with
// one content that maps name. What no map names lives by a pin: replay may find it dead.
func mergeable(from, to []byte) bool {
	return from != nil && to != nil && &from[0] != &to[0] &&
		format.EntryRefs(from) > 0 && format.EntryRefs(to) > 0 && [32]byte(from[:32]) == [32]byte(to[:32])
}

// merged is what a merge came to.
type merged struct {
	words  int64 // of maps
	blocks int64 // identities that ended with it
	bytes  int64 // their stored bytes
}

// runMerges logs and applies those merges of a task that still hold: what changed since
// they were looked for is left out.
func (s *Store) runMerges(t *task) error {
	live := t.merges[:0]
	for _, m := range t.merges {
		ok, err := s.stillMerges(t.volume, &m)
		if err != nil {
			return err
		}
		if ok {
			live = append(live, m)
		}
	}
	if len(live) == 0 {
		return nil
	}
	b := &s.batch
	at := b.buf[format.CommitHeaderSize:]
	format.PutMergeHead(at, uint64(t.volume), len(live))
	for i := range live {
		format.PutMerge(at, i, &live[i])
	}
	b.end, b.n = format.CommitHeaderSize+format.MergeSize(len(live)), 1
	stored, bytes := s.stored.Load(), s.segs.data.Load()
	if err := s.write(); err != nil {
		return err
	}
	if err := s.applyBatch(); err != nil {
		return err
	}
	t.merged = merged{words: int64(len(live)), blocks: stored - s.stored.Load(), bytes: bytes - s.segs.data.Load()}
	return nil
}

// stillMerges says whether a block is mapped to what it was and both identities are fit
// to be merged, and holds all pages of it.
func (s *Store) stillMerges(volume VolumeID, m *format.Merge) (bool, error) {
	for {
		s.missing = s.missing[:0]
		s.mu.RLock()
		v := s.find(volume)
		if v == nil || v.deleting {
			s.mu.RUnlock()
			return false, nil
		}
		s.scanPath(v.mapTree, wordShift, m.Block)
		s.scanIdentity(BID(m.From))
		s.scanIdentity(BID(m.To))
		ok := false
		if len(s.missing) == 0 {
			data, _, _, _ := s.pg.lookup(v.mapTree, wordShift, m.Block)
			from, _, _ := s.entryOf(BID(m.From))
			to, _, _ := s.entryOf(BID(m.To))
			ok = data != nil && format.Word(data, int(m.Block)&(format.WordsPerPage-1)) == m.From && mergeable(from, to) && format.EntryRefs(to) < s.refsMax-mergesMax
		}
		s.mu.RUnlock()
		if len(s.missing) == 0 {
			return ok, nil
		}
		if err := s.faultAll(s.missing, true); err != nil {
			return false, err
		}
	}
}
