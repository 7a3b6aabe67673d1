package lsfs

import (
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// fillIndex brings the fingerprints of stored blocks into the index after a start, the
// newest first, until it has seen all or the index is full. Until it is through, equal blocks
// may be stored twice. It reads pages past the frames, which belong to what is in use, and
// leaves operations half of the time.
func (s *Store) fillIndex() {
	defer close(s.filled)
	buf := device.AlignedBuffer(fillPages * format.PageSize)
	defer device.FreeAligned(buf)
	reads := make([]device.Read, fillPages)
	batch := make([]*device.Read, 0, fillPages)
	slots := s.index.Stats().Slots
	inserted := int64(0)
	s.mu.RLock()
	end := uint64(s.nextBID)
	s.mu.RUnlock()
	ops := s.stats.ops.Load()
	for inserted < slots-slots/8 && end > 0 {
		select {
		case <-s.stop:
			return
		default:
		}
		began := time.Now()
		low := (end - 1) &^ (fillPages*format.EntriesPerPage - 1)
		n, err := s.fillFrom(low, end, buf, reads, batch, s.indexPage)
		if err != nil {
			s.logger.Warn("fingerprint index is incomplete", "err", err)
			return
		}
		inserted += n
		end = low
		ops = s.yield(time.Since(began), ops, s.stop)
	}
}

// fillPages is how many pages are read at once.
const fillPages = 32

// fillFrom calls use for the pages of identities of slots [low, end), at most fillPages, and sums up
// what it returns. Those that are in RAM it gets under the read lock.
func (s *Store) fillFrom(low, end uint64, buf []byte, reads []device.Read, batch []*device.Read, use func(first uint64, page []byte) int64) (n int64, err error) {
	var at [fillPages]uint64
	var entries [fillPages]format.DirEntry
	batch = batch[:0]
	for slot := low; slot < end; {
		s.mu.RLock()
		leaf, missing, span, _ := s.pg.leafAt(s.identities, entryShift, slot)
		if leaf != 0 {
			if data := s.pg.data(leaf); data != nil {
				n += use(slot, data)
			} else if e := *s.pg.entry(leaf); s.segs.valid(e.Addr, format.PageSize) {
				s.segs.all[e.Addr.Segment()].readers.Add(1)
				i := len(batch)
				at[i], entries[i] = slot, e
				reads[i].Device, reads[i].Off = s.segs.locate(e.Addr)
				reads[i].P = buf[i*format.PageSize : (i+1)*format.PageSize]
				batch = append(batch, &reads[i])
			}
		}
		s.mu.RUnlock()
		if missing != 0 {
			if err = s.fault(missing, false); err != nil {
				break
			}
			continue
		}
		slot = nextSpan(slot, max(span, entryShift))
	}
	_ = s.reads.ReadBatch(batch)
	for i, r := range batch {
		s.segs.all[entries[i].Addr.Segment()].readers.Add(-1)
		// A page that is damaged is for whoever needs it. One that changed meanwhile leaves
		// entries that no longer hold, which whoever finds them sees.
		if r.Err == nil && format.Checksum(r.P) == entries[i].Sum {
			n += use(at[i], r.P)
		}
	}
	return n, err
}

// indexPage inserts the live entries of a page.
func (s *Store) indexPage(first uint64, page []byte) (n int64) {
	for i := range format.EntriesPerPage {
		if e := format.EntryAt(page, i); format.EntryAddr(e) != 0 {
			fp := dedup.Fingerprint(e[:32])
			s.index.Insert(&fp, first+uint64(i))
			n++
		}
	}
	return n
}
