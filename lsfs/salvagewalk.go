package lsfs

import (
	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// walker reads segments and proves the blocks in them. It is for one goroutine.
type walker struct {
	s      *Store
	red    *dedup.Reducer
	buf    []byte // aligned: a segment
	plain  [dedup.BlockSize]byte
	opened opened
	list   []format.BlockEntry
	out    walked
}

// segment reads a segment and lists its blocks.
func (w *walker) segment(n uint32) walked {
	w.out = walked{segment: n}
	t := w.s.segs
	for at := uint32(0); at < t.bytes; at += fillPart {
		end := min(at+fillPart, t.bytes)
		d, off := t.locate(format.MakeAddr(n, at))
		if w.out.err = d.ReadAt(w.buf[at:end], off); w.out.err != nil {
			return w.out // the cleaner could not read it either
		}
	}
	return w.parse(n)
}

// parse lists the blocks of the segment in the buffer that are what their records say. It goes
// through the commits exactly as the cleaner does, so that the cleaner finds each of them.
func (w *walker) parse(n uint32) walked {
	w.out, w.list = walked{segment: n}, nil
	t := w.s.segs
	var h format.Commit
	var generation uint64
	for at := uint32(0); t.bytes-at >= format.PageSize; at += h.Total {
		if format.ParseCommit(w.buf[at:], &h, w.s.id, n, at, t.bytes) != nil || at > 0 && h.Generation != generation {
			break
		}
		generation = h.Generation
		rest := w.buf[at+format.CommitHeaderSize:][:h.RecordBytes]
		if format.Checksum(rest) != h.RecordSum {
			w.out.damaged++
			continue
		}
		for len(rest) > 0 {
			r, more, err := format.NextRecord(rest)
			if err != nil {
				// The cleaner stops here, and leaves what stands behind.
				w.out.damaged++
				w.out.blocks = w.list
				return w.out
			}
			rest = more
			w.record(n, r)
		}
	}
	w.out.blocks = w.list
	return w.out
}

func (w *walker) record(n uint32, r format.Record) {
	switch r.Kind {
	case format.RecordWrite, format.RecordCopy:
		var e format.BlockEntry
		for i := range int(r.Op().Count) {
			if r.Block(i, &e); e.BID != 0 && !e.Ref && e.Addr.Segment() == n {
				w.block(&e, false)
			}
		}
	case format.RecordMove:
		var m format.Move
		open := format.Addr(0) // the group that is in w.opened
		for i := range r.Count() {
			r.Move(i, &m)
			if m.BID == 0 || m.New.Segment() != n {
				continue
			}
			e := format.BlockEntry{Addr: m.New, BID: m.BID, Sum: m.Sum, Len: m.Len, Encoding: m.Encoding, Index: m.Index}
			if m.Encoding != dedup.ZstdGroup {
				w.block(&e, true)
				continue
			}
			w.member(&e, &open)
		}
	}
}

// stored is the stored bytes of a block, nil if it cannot stand there.
func (w *walker) stored(e *format.BlockEntry) []byte {
	off := e.Addr.Offset()
	entry := format.Entry{Len: e.Len, Encoding: e.Encoding, Index: e.Index}
	if off == 0 || uint64(len(w.buf)) < uint64(off)+uint64(e.Len) || !storedOK(&entry) || VolumeBlocksMax <= BID(e.BID).slot() || BID(e.BID).slot() == 0 {
		return nil
	}
	return w.buf[off : off+uint32(e.Len)]
}

// block lists a block that is by itself. Of one that was moved the record does not have
// the fingerprint.
func (w *walker) block(e *format.BlockEntry, moved bool) {
	data := w.stored(e)
	if data == nil || e.Encoding == dedup.ZstdGroup || dedup.Sum(data) != e.Sum || dedup.Decode(w.plain[:], e.Encoding, data) != nil {
		w.out.damaged++
		return
	}
	fp := w.red.Fingerprint(w.plain[:])
	if !moved && fp != e.Fingerprint {
		w.out.damaged++
		return
	}
	e.Fingerprint = fp
	w.list = append(w.list, *e)
}

// member lists a member of a group. open is the group that was decoded last.
func (w *walker) member(e *format.BlockEntry, open *format.Addr) {
	data := w.stored(e)
	if data == nil || dedup.Sum(data) != e.Sum {
		w.out.damaged++
		return
	}
	if *open != e.Addr {
		*open = 0
		if w.opened.open(data) != nil {
			w.out.damaged++
			return
		}
		*open = e.Addr
	}
	plain, err := w.opened.block(e.Index)
	if err != nil {
		w.out.damaged++
		return
	}
	e.Fingerprint = w.red.Fingerprint(plain)
	w.list = append(w.list, *e)
}
