package lsfs

import (
	"fmt"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Metadata is no block that another replica could send by its fingerprint. So each
// commit of a checkpoint ends with a page of parity: the exclusive or of all its
// other pages, that of its header too. Whichever one page of it is damaged is made
// again from the rest, which stays on the device as long as any page of the segment
// is in use. Pools of before have commits without; then nothing is made again.
//
//	[header and records][page 1] ... [page n][parity]

// xorPage adds p to sum.
func xorPage(sum, p []byte) {
	sum, p = sum[:format.PageSize], p[:format.PageSize]
	for i := range sum {
		sum[i] ^= p[i]
	}
}

// putParity completes a commit of n pages, header included, that lies in buf: the
// page behind them becomes their parity. The header is not in place yet: commit, which
// makes it, adds the first page to the last one.
func putParity(buf []byte, pages int) {
	parity := buf[pages*format.PageSize:][:format.PageSize]
	clear(parity)
	for i := 1; i < pages; i++ {
		xorPage(parity, buf[i*format.PageSize:])
	}
}

// hasParity says whether the records of a commit are those of a checkpoint.
func hasParity(records []byte) bool {
	switch format.RecordKind(records[0]) {
	case format.RecordPages, format.RecordDirs, format.RecordRoot:
		return true
	}
	return false
}

// parityPages is the number of pages of a checkpoint's commit, header and parity
// included. ok is false for a commit without parity.
func parityPages(c *format.Commit, records []byte) (n int, ok bool) {
	if len(records) == 0 || !hasParity(records) {
		return 0, false
	}
	r, _, err := format.NextRecord(records)
	if err != nil {
		return 0, false
	}
	if r.Kind != format.RecordRoot && int(c.PayloadLen) != (r.Count()+1)*format.PageSize || r.Kind == format.RecordRoot && c.PayloadLen%format.PageSize != 0 {
		return 0, false
	}
	return int(c.Total / format.PageSize), true
}

// proveParity says whether the pages of a commit come to zeros with their parity.
func (s *Store) proveParity(segment, off uint32, pages int) (bool, error) {
	r := &segmentReader{s: s, segment: segment, page: device.AlignedBuffer(format.PageSize)}
	defer device.FreeAligned(r.page)
	var sum [format.PageSize]byte
	for i := range pages {
		p, err := r.read(off + uint32(i)*format.PageSize)
		if err != nil {
			return false, err
		}
		xorPage(sum[:], p)
	}
	return sum == [format.PageSize]byte{}, nil
}

// segmentReader reads pages of one segment for repair.
type segmentReader struct {
	s       *Store
	segment uint32
	page    []byte // aligned
}

func (r *segmentReader) read(off uint32) ([]byte, error) {
	d, at := r.s.segs.locate(format.MakeAddr(r.segment, off))
	return r.page, d.ReadAt(r.page, at)
}

// rebuildPage makes a damaged metadata page again into buf. The caller keeps the
// segment from being reused.
func (s *Store) rebuildPage(buf []byte, addr format.Addr, sum uint32) bool {
	r := &segmentReader{s: s, segment: addr.Segment(), page: device.AlignedBuffer(format.PageSize)}
	defer device.FreeAligned(r.page)
	var c format.Commit
	for at := uint32(0); at < addr.Offset(); {
		head, err := r.read(at)
		if err != nil || format.ParseCommit(head, &c, s.id, r.segment, at, s.segs.bytes) != nil {
			at += format.PageSize // damaged itself, or the payload of one that is
			continue
		}
		if at+c.Total <= addr.Offset() {
			at += c.Total
			continue
		}
		// The commit that holds it: all its pages but the wanted one.
		clear(buf[:format.PageSize])
		for off := at; off < at+c.Total; off += format.PageSize {
			if off == addr.Offset() {
				continue
			}
			p, err := r.read(off)
			if err != nil {
				return false
			}
			xorPage(buf, p)
		}
		return format.Checksum(buf[:format.PageSize]) == sum
	}
	return false
}

// repairPage is for a page whose reading failed: it is made again into buf, or the
// error is returned. What succeeds is counted and told.
func (s *Store) repairPage(buf []byte, addr format.Addr, sum uint32, err error) error {
	if !s.segs.valid(addr, format.PageSize) || !s.rebuildPage(buf, addr, sum) {
		return err
	}
	s.stats.rebuilt.Add(1)
	s.cfg.Event(Event{Code: "page-rebuilt", Text: fmt.Sprintf("metadata page at segment %d offset %d of %s was made again from parity", addr.Segment(), addr.Offset(), s.devicePath(addr.Segment()))})
	s.ckpt.changed.Store(true)
	return nil
}

// rebuildHeader makes the page again with which a checkpoint's commit begins at a
// place, when nothing there parses: how many pages the commit has is found by trying.
func (s *Store) rebuildHeader(buf []byte, segment, off uint32, c *format.Commit) bool {
	r := &segmentReader{s: s, segment: segment, page: device.AlignedBuffer(format.PageSize)}
	defer device.FreeAligned(r.page)
	clear(buf[:format.PageSize])
	for n := 1; n <= pagesPerCommit+1; n++ {
		at := off + uint32(n)*format.PageSize
		if s.segs.bytes < at+format.PageSize {
			return false
		}
		p, err := r.read(at)
		if err != nil {
			return false
		}
		xorPage(buf, p)
		if n > 1 && format.ParseCommit(buf, c, s.id, segment, off, s.segs.bytes) == nil && c.Total == uint32(n+1)*format.PageSize {
			return true
		}
	}
	return false
}

// rebuildRoot makes one damaged page of a part of the root again. part is the part as
// it was read, rounded up to whole pages.
func (s *Store) rebuildRoot(part []byte, x format.Extent) bool {
	r := &segmentReader{s: s, segment: x.Addr.Segment(), page: device.AlignedBuffer(format.PageSize)}
	defer device.FreeAligned(r.page)
	n := uint32(len(part))
	if x.Addr.Offset() < format.PageSize || s.segs.bytes-x.Addr.Offset() < n+format.PageSize {
		return false
	}
	// What the parity and all pages come to together: zeros, if none is damaged.
	var wrong [format.PageSize]byte
	for _, off := range [...]uint32{x.Addr.Offset() - format.PageSize, x.Addr.Offset() + n} {
		p, err := r.read(off)
		if err != nil {
			return false
		}
		xorPage(wrong[:], p)
	}
	for at := uint32(0); at < n; at += format.PageSize {
		xorPage(wrong[:], part[at:])
	}
	for at := uint32(0); at < n; at += format.PageSize {
		xorPage(part[at:], wrong[:])
		if format.Checksum(part[:x.Len]) == x.Sum {
			s.stats.rebuilt.Add(1)
			s.cfg.Event(Event{Code: "page-rebuilt", Text: fmt.Sprintf("a page of the root at segment %d of %s was made again from parity", x.Addr.Segment(), s.devicePath(x.Addr.Segment()))})
			s.ckpt.changed.Store(true)
			return true
		}
		xorPage(part[at:], wrong[:])
	}
	return false
}
