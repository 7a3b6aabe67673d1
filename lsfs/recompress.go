package lsfs

import (
	"math"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Blocks that survived one cleaning and come by another are cold: then the cleaner stores them
// again with a compression that takes longer. So it does with what goes to devices of class
// capacity. Blocks that it meets one after the other become a group (dedup.ZstdGroup) where that
// wins, and are stored with the best form by themselves where it does not, or where there are too few.
// While space is short, and operations wait for the cleaner, it moves blocks as they are.
//
// A group whose members are all alive moves as it is. When some have died it would be
// garbage in part wherever it goes, so it ends: those that live are packed again. That is
// done while space is short, too. A member by itself takes more room than its share did, and
// cleaning has to give room back; in new groups the living of a segment take about what they took in
// the old ones, and never more than the segment holds.
//
// CHECKED: what is read is verified before, and what was made of it is decoded and compared
// before it is written. The checksum in the entry is of the bytes that are stored then.
type recompressor struct {
	packer *dedup.Packer
	buf    []byte // of the blocks that are staged and that were packed
	group  gathering
	opened opened // group that ends
	// from is the number of the checkpoint from which on no program that knows no groups can open
	// the pool: neither of the roots that the superblock names is older.
	from atomic.Uint64

	blocks atomic.Int64 // stored in a shorter form
	won    atomic.Int64 // bytes
	groups atomic.Int64 // made, and
	kept   atomic.Int64 // moved as they were, and
	ended  atomic.Int64 // taken apart
}

// RaiseRoot lets the store write roots of a newer version, and use what it brings. Older
// programs do not open the pool any more then. It does not wait.
func (s *Store) RaiseRoot(version uint32) {
	version = min(version, format.RootVersion)
	for {
		was := s.rootVersion.Load()
		if version <= was {
			return
		}
		if s.rootVersion.CompareAndSwap(was, version) {
			break
		}
	}
	cuts, _ := s.ckpt.numbers()
	s.groupsFrom(cuts + 2)
}

// groupsFrom says that the roots of a checkpoint, and of the one before, have the version that is written
// now.
func (s *Store) groupsFrom(checkpoint uint64) {
	if s.rootVersion.Load() < rootOfGroups {
		checkpoint = math.MaxUint64
	}
	s.cleaner.packing.from.Store(checkpoint)
}

// rootOfGroups is the first version of roots whose pools may hold groups.
const rootOfGroups = 5

// gathering is the blocks that wait for their group to be full.
type gathering struct {
	plain []byte // dedup.PackedBytes: their contents
	alone []byte // room for the forms that are new
	list  [dedup.PackedBlocks]gathered
	moves [dedup.PackedBlocks]move
	n     int
	bytes int // of the best forms by themselves
}

type gathered struct {
	move
	was   uint32 // bytes that it took
	fresh bool   // move.data is a new form
}

func (g *gathering) reset() { g.n, g.bytes, g.alone = 0, 0, g.alone[:0] }

// init makes the buffers at first use.
func (p *recompressor) init(stage int) {
	if p.packer == nil {
		p.packer = dedup.NewPacker()
		p.buf = make([]byte, 0, stage)
		p.group.plain, p.group.alone = make([]byte, dedup.PackedBytes), make([]byte, 0, dedup.PackedBytes)
	}
}

// groupGain: what a block takes in a group is a fifth more by itself, and a bit more than that lets groups be
// made again of what is left of others.
const groupGain = 4

// best gives a block, whose content is in its place, the best form by itself.
func (g *gathering) best(p *dedup.Packer, x *gathered) {
	i := 0
	for &g.list[i] != x {
		i++
	}
	enc, data := p.Alone(g.alone, x.enc, x.data, g.plain[i*dedup.BlockSize:][:dedup.BlockSize])
	if enc != x.enc {
		g.alone = g.alone[:len(g.alone)+len(data)]
		x.fresh = true
	}
	x.enc, x.data = enc, data
}

// gather takes a block to be packed. stored is its form in the victim's buffer; of the
// member of a group that ends it is the content. An error is a *dedup.CorruptError of what
// cannot be decoded, or what staging met.
func (s *Store) gather(bid BID, e *format.Entry, stored []byte) error {
	c := &s.cleaner
	p, g := &c.packing, &c.packing.group
	p.init(len(c.stage))
	plain := g.plain[g.n*dedup.BlockSize:][:dedup.BlockSize]
	x := &g.list[g.n]
	*x = gathered{move: move{bid: bid, old: e.Addr, sum: e.Sum, enc: e.Encoding, data: stored}, was: e.Share()}
	if e.Encoding == dedup.ZstdGroup {
		// What it would take by itself is made only if that is needed: where blocks die all the time
		// groups end all the time. As a rule it is a fifth more.
		copy(plain, stored)
		x.enc, x.data, x.fresh = dedup.Raw, plain, true
		g.bytes += int(x.was + x.was/groupGain)
	} else if err := dedup.Decode(plain, e.Encoding, stored); err != nil {
		return err
	} else {
		g.best(p.packer, x)
		g.bytes += len(x.data)
	}
	g.n++
	switch {
	case !c.grouping:
		return s.stageAlone()
	case g.n == dedup.PackedBlocks:
		return s.stageGroup()
	}
	return nil
}

// stageGroup stages the blocks that were gathered as a group, if that wins.
func (s *Store) stageGroup() error {
	p, g := &s.cleaner.packing, &s.cleaner.packing.group
	if s.cleaner.eager {
		g.bytes = dedup.PackedBytes
	}
	frame, ok := p.packer.Group(g.plain, g.bytes)
	if !ok {
		return s.stageAlone()
	}
	sum, was := dedup.Sum(frame), 0
	for i := range g.list {
		x := &g.list[i]
		g.moves[i] = move{bid: x.bid, old: x.old, sum: sum, enc: dedup.ZstdGroup, index: uint8(i)}
		was += int(x.was)
	}
	g.reset()
	p.groups.Add(1)
	if len(frame) < was {
		p.blocks.Add(dedup.PackedBlocks)
		p.won.Add(int64(was - len(frame)))
	}
	return s.stageMoves(g.moves[:], frame, true)
}

// stageAlone stages the blocks that were gathered, each by itself.
func (s *Store) stageAlone() error {
	p, g := &s.cleaner.packing, &s.cleaner.packing.group
	defer g.reset()
	for i := range g.n {
		x := &g.list[i]
		if x.fresh {
			if x.enc == dedup.Raw {
				g.best(p.packer, x)
			}
			if err := p.packer.Survives(x.enc, x.data, g.plain[i*dedup.BlockSize:][:dedup.BlockSize]); err != nil {
				s.logger.Error("a block is left where it is", "bid", x.bid, "err", err)
				continue
			}
			if x.sum = dedup.Sum(x.data); len(x.data) < int(x.was) {
				p.blocks.Add(1)
				p.won.Add(int64(x.was) - int64(len(x.data)))
			}
		}
		g.moves[0] = x.move
		if err := s.stageMoves(g.moves[:1], x.data, x.fresh); err != nil {
			return err
		}
	}
	return nil
}

// stageMoves stages stored bytes and the identities that are to stand there. fresh says that
// the bytes lie where others will be packed soon.
func (s *Store) stageMoves(moves []move, data []byte, fresh bool) error {
	c := &s.cleaner
	if !c.fits(s, len(moves), len(data)) {
		if err := s.writeMoves(); err != nil {
			return err
		}
	}
	if p := &c.packing; fresh {
		from := len(p.buf)
		p.buf = append(p.buf, data...)
		data = p.buf[from:len(p.buf):len(p.buf)]
	}
	for i := range moves {
		m := &moves[i]
		m.data, m.joins = data, i > 0
		c.moves = append(c.moves, *m)
	}
	c.filled += len(data)
	return nil
}

// cleanGroup stages the members of a group that still stand there, which entries
// [from, to) of a move record name.
func (s *Store) cleanGroup(n uint32, r format.Record, from, to int) error {
	c := &s.cleaner
	var m format.Move
	var live [dedup.PackedBlocks]struct {
		bid BID
		e   format.Entry
	}
	count, whole := 0, to-from == dedup.PackedBlocks
	for i := from; i < to; i++ {
		r.Move(i, &m)
		if m.New.Segment() != n {
			return nil
		}
		l := &live[count]
		ok, err := s.standing(BID(m.BID), m.New, &l.e)
		if err != nil {
			return err
		}
		if !ok || l.e.Encoding != dedup.ZstdGroup || count > 0 && !sameGroup(&l.e, &live[0].e) {
			continue
		}
		whole = whole && int(l.e.Index) == count
		l.bid = BID(m.BID)
		count++
	}
	if count == 0 {
		return nil
	}
	e := &live[0].e
	stored, damage := []byte(nil), error(format.ErrInvalid)
	sum := uint32(0)
	if s.segs.valid(e.Addr, uint32(e.Len)) {
		stored = c.buf[e.Addr.Offset():][:e.Len]
		if sum, damage = dedup.Sum(stored), nil; sum != e.Sum {
			damage = errChecksum
		}
	}
	if damage == nil && whole && count == dedup.PackedBlocks {
		moves := c.packing.group.moves[:] // nothing is in it between two groups
		for i := range moves {
			l := &live[i]
			moves[i] = move{bid: l.bid, old: l.e.Addr, sum: l.e.Sum, enc: l.e.Encoding, index: l.e.Index}
		}
		c.packing.kept.Add(1)
		return s.stageMoves(moves, stored, false)
	}
	if damage == nil {
		damage = c.packing.opened.open(stored)
		c.packing.ended.Add(1)
	}
	for i := range count {
		l := &live[i]
		why := damage
		if why == nil {
			block, err := c.packing.opened.block(l.e.Index)
			if err == nil {
				if err = s.gather(l.bid, &l.e, block); err != nil {
					return err // not of decoding: this is the content
				}
				continue
			}
			why = err
		}
		ce := s.corrupt("block", l.e.Addr, l.e.Sum, sum, why)
		ce.BID, ce.Fingerprint = l.bid, l.e.Fingerprint
		_ = s.report(ce)
	}
	return nil
}

// portable is a block in a stored form that every node of the cluster reads, whatever its
// version, with the bytes in buf: at most 4096. stored is as fetch hands it out.
func (rc *readContext) portable(l *located, stored, buf []byte) (dedup.Block, error) {
	b := dedup.Block{Fingerprint: l.e.Fingerprint, Sum: l.e.Sum, Encoding: l.e.Encoding}
	if b.Encoding != dedup.Raw && b.Encoding != dedup.S2 {
		plain := stored // of the member of a group
		if b.Encoding != dedup.ZstdGroup {
			plain = rc.block[:]
			if err := dedup.Decode(plain, l.e.Encoding, stored); err != nil {
				return b, err
			}
		}
		if rc.reducer == nil {
			rc.reducer = dedup.NewReducer(rc.s.cfg.Key)
		}
		if rc.encoded == nil {
			rc.encoded = make([]byte, 0, dedup.EncodeRoom)
		}
		b.Encoding, stored = rc.reducer.Encode(rc.encoded, plain, true)
		b.Sum = dedup.Sum(stored)
	}
	b.Data = buf[:len(stored):len(stored)]
	copy(b.Data, stored)
	return b, nil
}
