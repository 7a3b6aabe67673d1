package lsfs

import (
	"cmp"
	"slices"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Reading groups. Whoever wants blocks of one sorts them by address, so that its members
// follow each other; then it is read once and decoded once for all that are wanted.
//
// The members of a group have the address, length and checksum of its stored bytes in
// common, and each has an index. Identities come and go one by one: a group has no entry
// and no counter of its own, and what none of its members names any more is garbage.

// sameGroup says whether two identities are members of one group.
func sameGroup(a, b *format.Entry) bool {
	return a.Addr == b.Addr && a.Len == b.Len && a.Sum == b.Sum && a.Encoding == b.Encoding
}

// storedOK says whether an identity's length, encoding and index fit each other.
func storedOK(e *format.Entry) bool {
	if e.Encoding == dedup.ZstdGroup {
		return dedup.PackedLenOK(int(e.Len)) && e.Index < dedup.PackedBlocks
	}
	return dedup.StoredLenOK(e.Encoding, int(e.Len)) && e.Index == 0
}

// readable says whether what an identity names fits what readers provide for it.
func readable(e *format.Entry) bool {
	return e.Len <= dedup.BlockSize || e.Encoding == dedup.ZstdGroup && e.Len <= dedup.PackedMax
}

// groupPages is the pages that a group stands in at most.
const groupPages = (dedup.PackedMax+format.PageSize-1)/format.PageSize + 1

// opened is a decoded group. Its buffer is made at first use.
type opened struct{ plain []byte }

// open decodes stored bytes, whose checksum was verified.
func (o *opened) open(stored []byte) error {
	if o.plain == nil {
		o.plain = make([]byte, dedup.PackedBytes)
	}
	return dedup.DecodeGroup(o.plain, stored)
}

// block is a member's content, valid until the next open.
func (o *opened) block(index uint8) ([]byte, error) { return memberOf(o.plain, index) }

func memberOf(plain []byte, index uint8) ([]byte, error) {
	if dedup.PackedBlocks <= index {
		return nil, format.ErrInvalid
	}
	return plain[int(index)*dedup.BlockSize:][:dedup.BlockSize], nil
}

// byThemselves puts the members of groups behind the other blocks and says how many those are.
func byThemselves(blocks []located) int {
	n := 0
	for ; n < len(blocks); n++ {
		if blocks[n].e.Encoding == dedup.ZstdGroup {
			break
		}
	}
	for i := n + 1; i < len(blocks); i++ {
		if blocks[i].e.Encoding != dedup.ZstdGroup {
			blocks[n], blocks[i] = blocks[i], blocks[n]
			n++
		}
	}
	return n
}

// fetchGroups is fetch for members of groups. use gets the content of each, which lies in the
// context's buffer of a group, or in the target's place for the block.
func (s *Store) fetchGroups(rc *readContext, v *Volume, first uint64, blocks []located, use func(l *located, stored []byte) error) error {
	slices.SortFunc(blocks, func(a, b located) int {
		return cmp.Or(cmp.Compare(a.e.Addr, b.e.Addr), cmp.Compare(a.e.Index, b.e.Index))
	})
	if !rc.ahead {
		s.waitingReads.Add(1)
		defer s.waitingReads.Add(-1)
	}
	s.stats.blockReads.Add(int64(len(blocks)))
	var failed error
	for len(blocks) > 0 {
		n := rc.planGroups(s, blocks)
		s.stats.deviceReads.Add(int64(len(rc.batch)))
		readErr := s.reads.ReadBatch(rc.batch)
		for part := blocks[:n]; len(part) > 0; {
			k := 1
			for k < len(part) && sameGroup(&part[k].e, &part[0].e) {
				k++
			}
			if err := s.openFor(rc, v, first, part[:k], readErr, use); failed == nil {
				failed = err
			}
			part = part[k:]
		}
		blocks = blocks[n:]
	}
	return failed
}

// planGroups makes the reads for as many of the blocks as the buffer has room for, one group at
// least, and says how many those are.
func (rc *readContext) planGroups(s *Store, blocks []located) int {
	rc.batch = rc.batch[:0]
	var run *device.Read
	var runOff, runEnd int64 // in the segment, aligned
	base, end := 0, 0        // of the run in the buffer
	for i := range blocks {
		l := &blocks[i]
		l.direct = false
		if i > 0 && sameGroup(&l.e, &blocks[i-1].e) {
			l.at = blocks[i-1].at
			continue
		}
		from := int64(l.e.Addr.Offset()) &^ (format.PageSize - 1)
		to := roundUp(int64(l.e.Addr.Offset()) + max(int64(l.e.Len), 1))
		if i > 0 && l.e.Addr.Segment() == blocks[i-1].e.Addr.Segment() && from-runEnd <= readGap && base+int(max(runEnd, to)-runOff) <= len(rc.buf) {
			runEnd = max(runEnd, to)
		} else if len(rc.buf) < end+int(to-from) {
			return i
		} else {
			run = &rc.runs[len(rc.batch)]
			rc.batch = append(rc.batch, run)
			run.Device, run.Off = s.segs.locate(format.MakeAddr(l.e.Addr.Segment(), uint32(from)))
			runOff, runEnd, base = from, to, end
		}
		end = base + int(runEnd-runOff)
		run.P = rc.buf[base:end]
		l.at = base + int(int64(l.e.Addr.Offset())-runOff)
	}
	return len(blocks)
}

// openFor verifies and decodes a group that was read, and hands out the wanted members.
func (s *Store) openFor(rc *readContext, v *Volume, first uint64, members []located, readErr error, use func(l *located, stored []byte) error) error {
	e := &members[0].e
	stored := rc.buf[members[0].at:][:e.Len]
	// CHECKED: no byte leaves the store without its checksum verified.
	sum, why := dedup.Sum(stored), error(nil)
	plain := rc.place(members)
	switch {
	case sum != e.Sum:
		why = readErr
	case plain != nil:
		why = dedup.DecodeGroup(plain, stored)
	default:
		why = rc.opened.open(stored)
		plain = rc.opened.plain
	}
	s.stats.groupReads.Add(1)
	whole := sum == e.Sum && why == nil
	var failed error
	for i := range members {
		l := &members[i]
		err := why
		if whole {
			var block []byte
			if block, err = memberOf(plain, l.e.Index); err == nil {
				if err = use(l, block); err == nil {
					continue
				}
			}
		}
		switch {
		case failed != nil:
		case rc.ahead:
			failed = errAhead
		default:
			failed = s.report(s.corruptBlock(l, v, first, sum, err))
		}
	}
	return failed
}

// place is where a group can be decoded to at once: when all of its members are wanted, side by
// side and in their order.
func (rc *readContext) place(members []located) []byte {
	if rc.to.whole == nil || rc.ahead || len(members) != dedup.PackedBlocks {
		return nil
	}
	for i := range members {
		if int(members[i].e.Index) != i || members[i].index != members[0].index+i {
			return nil
		}
	}
	at := members[0].index * dedup.BlockSize
	return rc.to.whole[at : at+dedup.PackedBytes : at+dedup.PackedBytes]
}
