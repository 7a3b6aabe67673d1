package lsfs

import (
	"errors"
	"slices"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

var (
	errChecksum    = errors.New("wrong checksum")
	errFingerprint = errors.New("the content is not what its fingerprint names")
)

// suspect is a stored block that is to be proved, as its identity describes it.
type suspect struct {
	bid     BID
	e       format.Entry
	nowhere bool // the identity names no place of the pool
}

// prover reads stored blocks from the devices, past all caches, and compares them with
// checksum and fingerprint. It is for one goroutine.
type prover struct {
	s     *Store
	buf   []byte // aligned
	alone []byte // for one block, or a group
	red   *dedup.Reducer
	runs  []proverRun
	plain [dedup.BlockSize]byte
	// The group that was decoded last, of what is in buf or in alone.
	opened opened
	within format.Entry // one of its members; no address: there is none
}

// proverRun is one read: blocks [from, to) of the list, from off to end of their segment.
type proverRun struct {
	from, to int
	off, end uint32
}

const (
	// proverBytes bounds one read; foreground reads of the same device wait no longer.
	proverBytes = 512 << 10
	// proverGap is the largest hole that is read along.
	proverGap = 32 << 10
)

func newProver(s *Store) *prover {
	p := &prover{s: s, buf: device.AlignedBuffer(proverBytes + (2+groupPages)*format.PageSize), red: dedup.NewReducer(s.cfg.Key)}
	p.alone = p.buf[proverBytes+2*format.PageSize:]
	return p
}

func (p *prover) close() { device.FreeAligned(p.buf) }

// prove calls bad for each block that is not right, with the checksum of what was found
// in its place. The caller keeps the segments from being reused. The list is sorted by
// address, so that a group is decoded once for its members. It returns the bytes that were read.
func (p *prover) prove(list []suspect, bad func(l *suspect, found uint32, why error)) (total int) {
	slices.SortFunc(list, func(a, b suspect) int {
		switch {
		case a.e.Addr < b.e.Addr:
			return -1
		case a.e.Addr > b.e.Addr:
			return 1
		}
		return 0
	})
	p.runs = p.runs[:0]
	for i := range list {
		l := &list[i]
		if l.nowhere || !storedOK(&l.e) {
			bad(l, 0, format.ErrInvalid)
			continue
		}
		off := l.e.Addr.Offset() &^ (format.PageSize - 1)
		end := roundUp(l.e.Addr.Offset() + uint32(l.e.Len))
		if n := len(p.runs); n > 0 {
			r := &p.runs[n-1]
			if list[r.from].e.Addr.Segment() == l.e.Addr.Segment() && r.to == i && off <= r.end+proverGap && end-r.off <= proverBytes {
				r.to, r.end = i+1, max(r.end, end)
				continue
			}
		}
		p.runs = append(p.runs, proverRun{i, i + 1, off, end})
	}
	for _, r := range p.runs {
		buf := p.buf[:r.end-r.off]
		p.within = format.Entry{}
		d, at := p.s.segs.locate(format.MakeAddr(list[r.from].e.Addr.Segment(), r.off))
		err := d.ReadAt(buf, at)
		total += len(buf)
		for i := r.from; i < r.to; i++ {
			l := &list[i]
			if err == nil && p.right(&l.e, buf[l.e.Addr.Offset()-r.off:][:l.e.Len]) == nil {
				continue
			}
			// Once more, alone: what was wrong may have been the way and not the device.
			stored, why := p.read(l)
			if why == nil {
				p.s.logger.Warn("a block was wrong once and right when read again", "bid", l.bid, "device", d.Path())
				continue
			}
			bad(l, dedup.Sum(stored), why)
		}
	}
	return total
}

// read reads one block by itself and says whether it is right. The bytes are valid
// until the next call.
func (p *prover) read(l *suspect) (stored []byte, err error) {
	if !storedOK(&l.e) {
		return nil, format.ErrInvalid
	}
	from := l.e.Addr.Offset() &^ (format.PageSize - 1)
	buf := p.alone[:roundUp(l.e.Addr.Offset()+uint32(l.e.Len))-from]
	d, at := p.s.segs.locate(format.MakeAddr(l.e.Addr.Segment(), from))
	if err := d.ReadAt(buf, at); err != nil {
		return nil, err
	}
	stored = buf[l.e.Addr.Offset()-from:][:l.e.Len]
	p.within = format.Entry{}
	defer func() { p.within = format.Entry{} }()
	return stored, p.right(&l.e, stored)
}

// right compares stored bytes with checksum and fingerprint. The content is in p.plain then.
func (p *prover) right(e *format.Entry, stored []byte) error {
	if e.Encoding == dedup.ZstdGroup {
		if err := p.member(e, stored); err != nil {
			return err
		}
	} else if dedup.Sum(stored) != e.Sum {
		return errChecksum
	} else if err := dedup.Decode(p.plain[:], e.Encoding, stored); err != nil {
		return err
	}
	if p.red.Fingerprint(p.plain[:]) != e.Fingerprint {
		return errFingerprint
	}
	return nil
}

// member brings the content of a member of a group into p.plain.
func (p *prover) member(e *format.Entry, stored []byte) error {
	if p.within.Addr == 0 || !sameGroup(&p.within, e) {
		p.within = format.Entry{}
		if dedup.Sum(stored) != e.Sum {
			return errChecksum
		}
		if err := p.opened.open(stored); err != nil {
			return err
		}
		p.within = *e
	}
	block, err := p.opened.block(e.Index)
	copy(p.plain[:], block)
	return err
}
