package lsfs

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

const (
	// smallReads and largeReads bound the reads that are at the devices at once;
	// further ones wait. Flash wants many small ones; each large one is many I/Os.
	smallReads = 128
	largeReads = 16
	// readBlocks is the number of blocks that one step of a read resolves: 1 MiB.
	readBlocks = 256
	// fewBlocks is the same for a small context: 64 KiB that begin anywhere.
	fewBlocks = 17
	// readGap is the largest hole between two blocks that are still read at once:
	// at 16 KiB reading the gap costs less than another I/O.
	readGap = 16 << 10
	// directBlocks is how many neighbours that are stored whole are read straight to
	// where they are wanted although the next ones are not.
	directBlocks = 4
)

// readContext is what a read needs beside its destination. It is leased, so that
// a read allocates nothing.
type readContext struct {
	s      *Store
	large  bool
	buf    []byte // aligned
	blocks []located
	runs   []device.Read
	batch  []*device.Read
	block  [dedup.BlockSize]byte
	to     target
	ahead  bool   // nobody waits for it yet
	ended  uint64 // flights.ended, before the cache was asked
	// passing: the read is part of a long scan (see Volume.miss).
	passing bool
	// reducer hashes what the second level gives, and encodes what goes to other nodes; it
	// and its buffer are made at first use.
	reducer *dedup.Reducer
	encoded []byte
	opened  opened // the group whose members are handed out

	// Methods as values, made once.
	cached func(i int, bid BID) bool
	give   func(l *located, stored []byte) error
}

// located is a stored block whose segment is held against reuse.
type located struct {
	index  int // in the request
	bid    BID
	e      format.Entry
	at     int  // of the stored bytes in the buffer, or
	direct bool // in the destination
	claim  claim
	// passing: of a long scan, and no snapshot, clone or other place leads to the block.
	passing bool
}

// readers lends read contexts: the one that came back last first, whose memory is warm.
type readers struct {
	turn chan struct{}
	mu   sync.Mutex
	free []*readContext
}

func newReaders(n int) *readers {
	r := &readers{turn: make(chan struct{}, n)}
	for range n {
		r.turn <- struct{}{}
		r.free = append(r.free, nil) // made at first use
	}
	return r
}

func (r *readers) close() {
	for _, rc := range r.free {
		if rc != nil {
			rc.free()
		}
	}
}

// lease lends a context for any read.
func (s *Store) lease(ctx context.Context) (*readContext, error) {
	return s.leaseFor(ctx, readBlocks)
}

// leaseFor lends a context for a read of so many blocks.
func (s *Store) leaseFor(ctx context.Context, blocks int) (*readContext, error) {
	r, n := s.largeReaders, readBlocks
	if blocks <= fewBlocks {
		r, n = s.smallReaders, fewBlocks
	}
	select {
	case <-r.turn: // the usual case, without a look at what all readers share
	default:
		select {
		case <-r.turn:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	r.mu.Lock()
	rc := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	r.mu.Unlock()
	if rc == nil {
		rc = newContext(s, n)
		rc.large = r == s.largeReaders
	}
	return rc, nil
}

func (s *Store) giveBack(rc *readContext) {
	r := s.smallReaders
	if rc.large {
		r = s.largeReaders
	}
	r.mu.Lock()
	r.free = append(r.free, rc)
	r.mu.Unlock()
	r.turn <- struct{}{}
}

// letGo gives up the segments of the listed blocks.
func (s *Store) letGo(rc *readContext) {
	for i := range rc.blocks {
		s.segs.arena[rc.blocks[i].e.Addr.Segment()].readers.Add(-1)
	}
	rc.blocks = rc.blocks[:0]
}

// fromCache answers a block of the target without I/O.
func (rc *readContext) fromCache(i int, bid BID) bool {
	if rc.ahead {
		return bid == 0 || rc.s.l1.Contains(uint64(bid))
	}
	to, in := rc.to.part(i)
	if bid == 0 {
		clear(to)
		return true
	}
	return rc.s.l1.Get(uint64(bid), to, in)
}

// deliver puts a block that was read where it is wanted, and into the cache. Of the member of a
// group stored is the content.
func (rc *readContext) deliver(l *located, stored []byte) error {
	if l.e.Encoding == dedup.Raw || l.e.Encoding == dedup.ZstdGroup {
		rc.deliverPlain(l, stored)
		return nil
	}
	block := rc.block[:]
	if !rc.ahead {
		if to, _ := rc.to.part(l.index); len(to) == dedup.BlockSize {
			block = to
		}
	}
	if err := dedup.Decode(block, l.e.Encoding, stored); err != nil {
		return err
	}
	rc.deliverPlain(l, block)
	return nil
}

// deliverPlain is deliver for the block's content, which may lie in its place already.
func (rc *readContext) deliverPlain(l *located, block []byte) {
	if rc.ahead {
		rc.s.l1.PutUnread(uint64(l.bid), block)
		return
	}
	to, in := rc.to.part(l.index)
	if &to[0] != &block[0] {
		copy(to, block[in:])
	}
	if l.passing {
		rc.s.l1.Pass(uint64(l.bid), block)
		return
	}
	rc.s.l1.Put(uint64(l.bid), block)
}

// fetchOnce reads the listed blocks into the target and the cache. What others are
// reading at the moment it waits for, so that many who want one block read the
// device once. The caller lets go of the segments.
func (s *Store) fetchOnce(rc *readContext, v *Volume) error {
	all := rc.blocks
	// Those that others read go to the end, in any order.
	end := len(all)
	for i := 0; i < end; {
		l := &all[i]
		if l.claim = s.flights.claim(l.bid); l.claim == claimOther {
			end--
			all[i], all[end] = all[end], all[i]
			continue
		}
		if l.claim == claimMine && rc.ended != s.flights.ended.Load() && s.l1.Contains(uint64(l.bid)) && rc.fromCache(l.index, l.bid) {
			s.flights.done(l.bid)
			s.stats.sharedReads.Add(1)
			end--
			all[i], all[end] = all[end], all[i]
			all[end].claim = claimServed
			continue
		}
		i++
	}
	mine, others := all[:end], all[end:]
	err := s.fetch(rc, v, rc.to.first, s.fromFlash(rc, mine), rc.give)
	s.flights.ended.Add(1)
	for i := range mine {
		if mine[i].claim == claimMine {
			s.flights.done(mine[i].bid)
		}
	}
	if len(others) == 0 || rc.ahead || err != nil {
		return err
	}
	n := 0
	for i := range others {
		if others[i].claim == claimServed {
			continue
		}
		s.flights.wait(others[i].bid)
		if !rc.fromCache(others[i].index, others[i].bid) { // it failed for them, or has left the cache again
			others[i], others[n] = others[n], others[i]
			n++
		} else {
			s.stats.sharedReads.Add(1)
		}
	}
	return s.fetch(rc, v, rc.to.first, others[:n], rc.give)
}

// errAhead is a damaged block that was read ahead: whoever wants it will tell.
var errAhead = errors.New("damaged block read ahead")

// fetchAll reads the listed blocks and hands the stored bytes of each, verified, to
// use. It lets go of the segments.
func (s *Store) fetchAll(rc *readContext, v *Volume, first uint64, use func(l *located, stored []byte) error) error {
	defer s.letGo(rc)
	return s.fetch(rc, v, first, rc.blocks, use)
}

// fetch reads blocks, neighbours at once, and hands the stored bytes of each,
// verified, to use; of the members of groups it hands over the content. They lie in the context's
// buffers, or in the target's place for the block (located.direct): several neighbours that are
// stored whole are read there. blocks comes into another order.
func (s *Store) fetch(rc *readContext, v *Volume, first uint64, blocks []located, use func(l *located, stored []byte) error) error {
	if n := byThemselves(blocks); n < len(blocks) {
		failed := s.fetchGroups(rc, v, first, blocks[n:], use)
		if err := s.fetch(rc, v, first, blocks[:n], use); err != nil {
			return err
		}
		return failed
	}
	if len(blocks) == 0 {
		return nil
	}
	rc.plan(s, blocks)
	s.stats.blockReads.Add(int64(len(blocks)))
	s.stats.deviceReads.Add(int64(len(rc.batch)))
	if !rc.ahead {
		s.waitingReads.Add(1)
		defer s.waitingReads.Add(-1)
	}
	readErr := s.reads.ReadBatch(rc.batch)
	var failed error
	for i := range blocks {
		l := &blocks[i]
		stored := rc.stored(l)
		// CHECKED: no byte leaves the store without its checksum verified.
		sum := dedup.Sum(stored)
		if rc.ahead && sum != l.e.Sum {
			failed = errAhead
			continue
		}
		if sum == l.e.Sum {
			if err := use(l, stored); err == nil {
				continue
			} else if failed == nil {
				failed = s.report(s.corruptBlock(l, v, first, sum, err))
			}
			continue
		}
		if failed == nil {
			failed = s.report(s.corruptBlock(l, v, first, sum, readErr))
		}
	}
	return failed
}

func (rc *readContext) stored(l *located) []byte {
	if l.direct {
		return rc.to.whole[l.at : l.at+dedup.BlockSize]
	}
	return rc.buf[l.at : l.at+int(l.e.Len)]
}

// straight is the number of blocks from the first on that are neighbours on the
// device and in the target, and that can be read to where they are wanted.
func (rc *readContext) straight(blocks []located) (n int) {
	for n < len(blocks) {
		l := &blocks[n]
		if rc.to.whole == nil || rc.ahead || l.e.Encoding != dedup.Raw || l.e.Addr.Offset()%format.PageSize != 0 ||
			n > 0 && (l.e.Addr != blocks[n-1].e.Addr+format.PageSize || l.index != blocks[n-1].index+1) {
			break
		}
		n++
	}
	return n
}

// plan sorts blocks by their places and makes the reads for them.
func (rc *readContext) plan(s *Store, blocks []located) {
	byPlace := func(a, b located) int {
		if a.e.Addr < b.e.Addr {
			return -1
		}
		return 1
	}
	for i := 1; i < len(blocks); i++ {
		if blocks[i].e.Addr < blocks[i-1].e.Addr {
			slices.SortFunc(blocks, byPlace)
			break
		}
	}
	rc.batch = rc.batch[:0]
	end := 0 // of the buffer in use
	spare := len(rc.buf) - len(blocks)*2*format.PageSize
	var run *device.Read // into the buffer; nil: a new one has to begin
	var runSeg uint32
	var runOff, runEnd int64 // in the segment, aligned
	base := 0
	start := func(l *located, from int64) *device.Read {
		r := &rc.runs[len(rc.batch)]
		rc.batch = append(rc.batch, r)
		r.Device, r.Off = s.segs.locate(format.MakeAddr(l.e.Addr.Segment(), uint32(from)))
		return r
	}
	for i := 0; i < len(blocks); {
		if n := rc.straight(blocks[i:]); n >= directBlocks || n > 0 && n == len(blocks) {
			to := blocks[i].index * dedup.BlockSize
			start(&blocks[i], int64(blocks[i].e.Addr.Offset())).P = rc.to.whole[to : to+n*dedup.BlockSize]
			for ; n > 0; n-- {
				blocks[i].direct, blocks[i].at = true, to
				to += dedup.BlockSize
				i++
			}
			run = nil
			continue
		}
		l := &blocks[i]
		i++
		from := int64(l.e.Addr.Offset()) &^ (format.PageSize - 1)
		to := roundUp(int64(l.e.Addr.Offset()) + int64(l.e.Len))
		gap := from - runEnd
		if run == nil || runSeg != l.e.Addr.Segment() || gap > readGap || gap > int64(spare) {
			run = start(l, from)
			runSeg, runOff, runEnd, base = l.e.Addr.Segment(), from, from, end
		} else if gap > 0 {
			spare -= int(gap)
		}
		runEnd = max(runEnd, to)
		end = base + int(runEnd-runOff)
		run.P = rc.buf[base:end]
		l.direct, l.at = false, base+int(int64(l.e.Addr.Offset())-runOff)
	}
}

func (s *Store) corruptBlock(l *located, v *Volume, first uint64, sum uint32, err error) *CorruptError {
	e := s.corrupt("block", l.e.Addr, l.e.Sum, sum, err)
	e.BID, e.Fingerprint = l.bid, l.e.Fingerprint
	if v != nil {
		e.Volume, e.Block = v.id, BlockNo(first+uint64(l.index))
	}
	return e
}
