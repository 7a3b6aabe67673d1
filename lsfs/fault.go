package lsfs

import (
	"slices"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// faultsAtOnce is how many pages are read at once: as many as the readers have at the
// devices, and as many again that wait.
const faultsAtOnce = 32

// faulter reads many pages at once. It belongs to the committing role, replay included:
// what a batch of operations needs is known beforehand, and one page after the other would
// take as many times as long as there are pages.
type faulter struct {
	buf     []byte // aligned, made at first use
	reads   [faultsAtOnce]device.Read
	batch   []*device.Read
	ids     [faultsAtOnce]uint32
	entries [faultsAtOnce]format.DirEntry
}

func (f *faulter) free() { device.FreeAligned(f.buf) }

// faultAll is fault for many pages, which it puts in order, with the repeated ones left out.
// The caller has the committing role.
func (s *Store) faultAll(ids []uint32, hold bool) error {
	if len(ids) == 1 {
		return s.fault(ids[0], hold)
	}
	f := &s.faults
	if f.buf == nil {
		f.buf = device.AlignedBuffer(faultsAtOnce * format.PageSize)
		f.batch = make([]*device.Read, 0, faultsAtOnce)
	}
	slices.Sort(ids)
	for ids = slices.Compact(ids); len(ids) > 0; {
		n := min(len(ids), faultsAtOnce)
		if err := s.faultSome(ids[:n], hold); err != nil {
			return err
		}
		ids = ids[n:]
	}
	return nil
}

func (s *Store) faultSome(ids []uint32, hold bool) error {
	f := &s.faults
	f.batch = f.batch[:0]
	s.mu.RLock()
	for _, id := range ids {
		p := s.pg.page(id)
		if p.flags&pageAlive == 0 || p.frame != 0 {
			if hold {
				s.pg.hold(id)
			}
			continue
		}
		e := *s.pg.entry(id)
		if !s.segs.valid(e.Addr, format.PageSize) {
			s.mu.RUnlock()
			s.letSegmentsGo(len(f.batch))
			return s.report(s.corrupt("page", e.Addr, e.Sum, 0, format.ErrInvalid))
		}
		s.segs.all[e.Addr.Segment()].readers.Add(1)
		i := len(f.batch)
		f.ids[i], f.entries[i] = id, e
		r := &f.reads[i]
		r.P = f.buf[i*format.PageSize : (i+1)*format.PageSize]
		r.Device, r.Off = s.segs.locate(e.Addr)
		f.batch = append(f.batch, r)
	}
	s.mu.RUnlock()
	_ = s.reads.ReadBatch(f.batch) // each read says for itself
	s.letSegmentsGo(len(f.batch))
	s.stats.pageReads.Add(int64(len(f.batch)))
	again := false
	s.mu.Lock()
	for i, r := range f.batch {
		id := f.ids[i]
		if p := s.pg.page(id); p.flags&pageAlive != 0 && p.frame == 0 {
			// CHECKED: no page is used before its checksum agrees with the directory. One that
			// is damaged, or has moved meanwhile, is for fault.
			if e := &f.entries[i]; s.pg.entry(id).Addr != e.Addr || r.Err != nil || format.Checksum(r.P) != e.Sum {
				again = true
				continue
			}
			s.pg.install(id, r.P)
		}
		if hold {
			s.pg.hold(id)
		}
	}
	s.mu.Unlock()
	for i := 0; again && i < len(f.batch); i++ {
		if err := s.fault(f.ids[i], hold); err != nil {
			return err
		}
	}
	return nil
}

// letSegmentsGo ends the hold on the segments of the first n reads.
func (s *Store) letSegmentsGo(n int) {
	for i := range n {
		s.segs.all[s.faults.entries[i].Addr.Segment()].readers.Add(-1)
	}
}

// prefetchRounds is how deep a path of pages can be that are missing: the levels of a map,
// then those of the identities.
const prefetchRounds = 8

// prefetch makes resident what the operations of the batch need of maps and identities,
// so that staging them finds it there. It is a matter of time only.
func (s *Store) prefetch(ops []*Op) {
	for range prefetchRounds {
		s.missing = s.missing[:0]
		s.mu.RLock()
		for _, op := range ops {
			if s.pg.held > s.pg.max/4 {
				break // the batch ends not much later (BOUNDED)
			}
			v := s.volumes[op.Volume]
			if op.err != nil || v == nil || op.Kind != OpWrite && op.Kind != OpCopy || !v.holds(uint64(op.Start), uint64(op.Count)) {
				continue
			}
			s.scanRange(v, uint64(op.Start), uint64(op.Start)+uint64(op.Count), parentsMax)
			for _, b := range op.Pinned {
				if b != 0 {
					s.scanIdentity(b)
				}
			}
		}
		s.mu.RUnlock()
		if len(s.missing) == 0 || s.faultAll(s.missing, true) != nil {
			return // who needs a page that cannot be read meets the error again
		}
	}
}

// prefetchRecords is prefetch for records that are about to be replayed. The state will
// have changed when the later ones are, so this is a guess, and a good one.
func (s *Store) prefetchRecords(all [][]byte) {
	s.nextRound()
	for read := 0; read < s.pg.max/4; read += len(s.missing) {
		s.missing = s.missing[:0]
		s.mu.RLock()
		for _, rest := range all {
			for len(rest) > 0 {
				r, more, err := format.NextRecord(rest)
				if err != nil || s.scan(r) != nil {
					break
				}
				rest = more
			}
		}
		s.mu.RUnlock()
		if len(s.missing) == 0 || s.pg.held > s.pg.max/2 || s.faultAll(s.missing, false) != nil {
			return
		}
	}
}
