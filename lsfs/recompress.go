package lsfs

import (
	"fmt"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Blocks that survived one cleaning and come by another are cold: then the cleaner stores them
// again with a compression that takes longer, where that wins a tenth or more. So it does with what goes to
// devices of class capacity. While space is short, and operations wait for the cleaner, it moves
// blocks as they are.
//
// CHECKED: what is read is verified before, and what was made of it is decoded and compared
// before it is written. The checksum in the entry is of the bytes that are stored then.
type recompressor struct {
	packer *dedup.Packer
	buf    []byte // of the blocks that are staged
	blocks atomic.Int64
	won    atomic.Int64 // bytes
}

// recompress gives the stored form to move a block with: its own, or a shorter one, which stays
// valid until the staged blocks are written. The cleaner's turn is held.
func (s *Store) recompress(e *format.Entry, stored []byte) (dedup.Encoding, []byte, error) {
	c := &s.cleaner
	p := &c.packing
	if !c.squeeze || e.Encoding != dedup.S2 {
		return e.Encoding, stored, nil
	}
	if p.packer == nil {
		p.packer = dedup.NewPacker()
		p.buf = make([]byte, 0, cap(c.stage))
	}
	if cap(p.buf)-len(p.buf) < dedup.PackRoom {
		return e.Encoding, stored, nil
	}
	from := len(p.buf)
	enc, buf, ok, err := p.packer.Pack(p.buf, e.Encoding, stored)
	if err != nil {
		return 0, nil, fmt.Errorf("recompress: %w", err)
	}
	if !ok {
		return e.Encoding, stored, nil
	}
	p.buf = buf
	p.blocks.Add(1)
	p.won.Add(int64(len(stored) - (len(buf) - from)))
	return enc, buf[from:len(buf):len(buf)], nil
}

// keep moves the last block, which is staged next, to the front of the buffer, whose other
// blocks have been written.
func (p *recompressor) keep(data []byte) []byte {
	p.buf = append(p.buf[:0], data...)
	return p.buf[:len(data):len(data)]
}

// portable is a block in a stored form that every node of the cluster reads, whatever its
// version, with the bytes in buf: at most 4096.
func (rc *readContext) portable(l *located, stored, buf []byte) (dedup.Block, error) {
	b := dedup.Block{Fingerprint: l.e.Fingerprint, Sum: l.e.Sum, Encoding: l.e.Encoding}
	if b.Encoding != dedup.Raw && b.Encoding != dedup.S2 {
		if err := dedup.Decode(rc.block[:], l.e.Encoding, stored); err != nil {
			return b, err
		}
		if rc.reducer == nil {
			rc.reducer = dedup.NewReducer(rc.s.cfg.Key)
		}
		if rc.encoded == nil {
			rc.encoded = make([]byte, 0, dedup.EncodeRoom)
		}
		b.Encoding, stored = rc.reducer.Encode(rc.encoded, rc.block[:], true)
		b.Sum = dedup.Sum(stored)
	}
	b.Data = buf[:len(stored):len(stored)]
	copy(b.Data, stored)
	return b, nil
}
