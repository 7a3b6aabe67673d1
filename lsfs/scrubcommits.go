package lsfs

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// scrubCommits reads the headers and records of all commits in segments that hold
// anything. Nothing is read by way of them but by the cleaner and by a start, so a
// damaged one is repaired by making both need it no more: what is live in its segment
// is stored elsewhere, found by the identities and the directory instead of the
// records, and a checkpoint lets replay begin behind it.
func (s *Store) scrubCommits(ctx context.Context) error {
	k := &s.scrub
	move := make(map[uint32]bool)
	found := uint64(0)
	r := &logReader{s: s, buf: device.AlignedBuffer(int(s.commitMax) + readAhead), ahead: format.PageSize}
	defer device.FreeAligned(r.buf)
	count := s.segs.count()
	for n := uint32(k.state.Next); n < count; n++ {
		s.mu.RLock()
		seg := &s.segs.arena[n]
		use, bad := seg.state == segmentSealed && seg.live+seg.pages > 0, seg.bad
		if use {
			seg.readers.Add(1)
		}
		s.mu.RUnlock()
		if !use {
			continue
		}
		start := time.Now()
		read, damaged, err := s.proveCommits(r, n)
		if err == nil {
			err = s.failure()
		}
		seg.readers.Add(-1)
		if err != nil {
			if s.failure() != nil {
				return s.failure()
			}
			_ = s.report(s.corrupt("commit", format.MakeAddr(n, 0), 0, 0, err))
			damaged++
		}
		if damaged > 0 {
			found += uint64(damaged)
			k.note(func(r *ScrubResult) { r.Damaged += uint64(damaged) })
		}
		if damaged > 0 || bad {
			move[n] = true
		}
		if err := s.pace(ctx, read, time.Since(start)); err != nil {
			return err
		}
		k.at(uint64(n), uint64(count), doneBlocks, 1)
	}
	if len(move) == 0 {
		return nil
	}
	if err := s.evacuate(ctx, move); err != nil {
		return err
	}
	// Replay begins behind what was there.
	if err := s.checkpoint(); err != nil {
		return err
	}
	k.note(func(r *ScrubResult) { r.Repaired += found })
	return nil
}

// proveCommits walks the commits of a sealed segment. A place where no header parses
// although one of the same generation follows is a damaged commit. Where the log was cut
// by a loss of power there may be such a place too: nothing that follows says that the
// commit there was durable, and nothing from there on is in use.
func (s *Store) proveCommits(r *logReader, n uint32) (read, damaged int, err error) {
	var c format.Commit
	var generation uint64
	gap := format.NoSegment // where a header is missing
	last := uint64(0)       // sequence of the last commit; 0 in streams
	next := format.NoSegment
	// Damaged commits of the log that nothing proved yet to have been durable. seq is
	// the number of the commit, or the least that it can have.
	type doubt struct {
		seq  uint64
		torn bool // its header is whole
		err  *CorruptError
	}
	var doubts []doubt
	found := func(d doubt) {
		if d.seq == 0 || d.seq == 1 && !d.torn { // of a stream, or the first of a segment
			damaged++
			_ = s.report(d.err)
			return
		}
		doubts = append(doubts, d)
	}
	for at := uint32(0); s.segs.bytes-at >= format.PageSize; {
		ok, err := r.header(n, at, &c)
		read += format.PageSize
		if err != nil {
			return read, damaged, err
		}
		if !ok || generation != 0 && c.Generation != generation {
			if gap == format.NoSegment {
				gap = at
			}
			at += format.PageSize
			continue
		}
		generation = c.Generation
		if gap != format.NoSegment {
			found(doubt{seq: last + 1, err: s.corrupt("commit", format.MakeAddr(n, gap), 0, 0, fmt.Errorf("no header, but commit %d follows: %w", c.Seq, format.ErrInvalid))})
			gap = format.NoSegment
		}
		for len(doubts) > 0 && doubts[0].seq <= c.Durable {
			damaged++
			_ = s.report(doubts[0].err)
			doubts = doubts[1:]
		}
		all, ok, err := r.records(&c)
		read += int(c.RecordBytes)
		if err != nil {
			return read, damaged, err
		}
		if !ok {
			found(doubt{c.Seq, true, s.corrupt("commit", format.MakeAddr(n, at), c.RecordSum, format.Checksum(all[format.CommitHeaderSize:]), nil)})
		} else if pages, ok := parityPages(&c, all[format.CommitHeaderSize:]); ok && len(doubts) == 0 {
			read += pages * format.PageSize
			if good, err := s.proveParity(n, at, pages); err != nil {
				return read, damaged, err
			} else if !good {
				damaged++
				_ = s.report(s.corrupt("parity", format.MakeAddr(n, at), 0, 0, fmt.Errorf("the pages of commit %d do not come to its parity: %w", c.Seq, format.ErrInvalid)))
			}
		}
		last, next = c.Seq, c.Next
		at += c.Total
	}
	if len(doubts) > 0 {
		followed, cut, err := s.wentOn(r, next, last, doubts[0].seq)
		if err != nil || cut || !followed && !doubts[0].torn {
			return read, damaged, err // or a missing header, where the log may have ended once
		}
		damaged++
		_ = s.report(doubts[0].err)
	}
	if gap == format.NoSegment {
		return read, damaged, nil
	}
	// Behind the last commit, or the last one itself: that of a checkpoint can be made
	// again. Of another the cleaner says when something live stays behind.
	head := make([]byte, format.PageSize)
	if s.rebuildHeader(head, n, gap, &c) && (generation == 0 || c.Generation == generation) {
		damaged++
		_ = s.report(s.corrupt("commit", format.MakeAddr(n, gap), 0, 0, fmt.Errorf("no header, but the pages behind are those of commit %d: %w", c.Seq, format.ErrInvalid)))
	}
	return read, damaged, nil
}

// wentOn says how the log went on in the segment after one whose last commit is last:
// followed, with the next commit, so that all before it were durable; or cut, with one that took
// the place of commit seq, which a start had found torn.
func (s *Store) wentOn(r *logReader, next uint32, last, seq uint64) (followed, cut bool, err error) {
	if !s.segs.exists(next) {
		return false, false, nil
	}
	var c format.Commit
	ok, err := r.header(next, 0, &c)
	return ok && last != 0 && c.Seq == last+1, ok && c.Seq != 0 && c.Seq <= seq, err
}

// evacuate stores elsewhere what is live in some segments.
func (s *Store) evacuate(ctx context.Context, segments map[uint32]bool) error {
	var blocks []suspect
	err := s.eachEntryPage(ctx.Done(), func(first BID, page []byte) {
		for i := range format.EntriesPerPage {
			e := format.EntryAt(page, i)
			if a := format.EntryAddr(e); segments[a.Segment()] && s.segs.valid(a, uint32(format.EntryLen(e))) {
				blocks = append(blocks, suspect{bid: identityAt(first, i, e)})
				format.ParseEntry(e, &blocks[len(blocks)-1].e)
			}
		}
	})
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for len(blocks) > 0 {
		n := min(len(blocks), 128)
		if err := s.moveBlocks(ctx, blocks[:n]); err != nil {
			return err
		}
		blocks = blocks[n:]
	}
	s.mu.RLock()
	pages := s.pg.n
	s.mu.RUnlock()
	for id := uint32(1); id < pages; id++ {
		s.mu.RLock()
		at := s.pg.entry(id).Addr
		alive := s.pg.page(id).flags&pageAlive != 0
		s.mu.RUnlock()
		if alive && at != 0 && segments[at.Segment()] {
			if err := s.cleanPage(id, at); err != nil && s.failure() != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	for j, x := range s.ckpt.dirAt {
		if segments[x.Addr.Segment()] {
			s.ckpt.dirDirty[j] = true
		}
	}
	s.mu.Unlock()
	s.ckpt.changed.Store(true)
	return nil
}

// moveBlocks stores intact blocks again. A damaged one is mended by scrubBlocks.
func (s *Store) moveBlocks(ctx context.Context, list []suspect) error {
	moves := make([]move, 0, len(list))
	for i := range list {
		l := &list[i]
		seg := &s.segs.arena[l.e.Addr.Segment()]
		s.mu.RLock()
		at, _, missing := s.entryOf(l.bid)
		same := missing != 0 || at != nil && format.EntryAddr(at) == l.e.Addr
		if same {
			seg.readers.Add(1)
		}
		s.mu.RUnlock()
		if !same {
			continue
		}
		stored, err := s.scrub.prover.read(l)
		stored = bytes.Clone(stored)
		seg.readers.Add(-1)
		if err != nil {
			ce := s.corrupt("block", l.e.Addr, l.e.Sum, 0, err)
			ce.BID, ce.Fingerprint = l.bid, l.e.Fingerprint
			s.mendBlock(ctx, l, ce)
			continue
		}
		m := move{bid: l.bid, old: l.e.Addr, sum: l.e.Sum, enc: l.e.Encoding, data: stored}
		if l.e.Encoding == dedup.ZstdGroup { // the others may be gone: it goes by itself
			m.enc, m.data = s.scrub.prover.red.Encode(make([]byte, 0, dedup.EncodeRoom), s.scrub.prover.plain[:], true)
			m.sum = dedup.Sum(m.data)
		}
		moves = append(moves, m)
	}
	if len(moves) == 0 {
		return nil
	}
	return s.post(&task{kind: taskMove, moves: moves})
}
