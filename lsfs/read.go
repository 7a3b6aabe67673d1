package lsfs

import (
	"context"
	"fmt"

	"github.com/zeebo/blake3"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// TryRead fills dst from a byte offset (both multiples of 512) if all of it is
// holes or in the cache, without waiting for I/O, and says whether it did.
func (v *Volume) TryRead(off uint64, dst []byte) bool {
	if !v.tryRead(off, dst) {
		return false
	}
	v.hit(off, len(dst))
	return true
}

func (v *Volume) tryRead(off uint64, dst []byte) bool {
	s := v.s
	if s.failed.Load() != nil {
		return false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if v.deleting || !v.inside(off, len(dst)) {
		return false
	}
	var data []byte
	var missing uint32
	leafOf := ^uint64(0)
	found := int64(0)
	for len(dst) > 0 {
		no := off / dedup.BlockSize
		in := int(off % dedup.BlockSize)
		n := min(dedup.BlockSize-in, len(dst))
		if no>>wordShift != leafOf {
			if data, _, missing, _ = s.pg.lookup(v.mapTree, wordShift, no); missing != 0 {
				return false
			}
			leafOf = no >> wordShift
		}
		bid := uint64(0)
		if data != nil {
			bid = format.Word(data, int(no)&(format.WordsPerPage-1))
		}
		if bid == 0 {
			clear(dst[:n])
		} else if !s.l1.Get(bid, dst[:n], in) {
			s.stats.tryHits.Add(found)
			s.stats.tryMisses.Add(1)
			return false
		} else {
			found++
		}
		dst = dst[n:]
		off += uint64(n)
	}
	return true
}

// Wanted marks the blocks from start on whose content stands in the cache because it
// was read, and says whether there are any. Their next content is likely to be read
// too (Op.Plain). It neither does I/O nor waits; where it cannot look it says no.
func (v *Volume) Wanted(start BlockNo, dst []bool) (found bool) {
	s := v.s
	clear(dst)
	if !s.mu.TryRLock() {
		return false
	}
	defer s.mu.RUnlock()
	for i := range dst {
		no := uint64(start) + uint64(i)
		data, _, missing, _ := s.pg.lookup(v.mapTree, wordShift, no)
		if missing != 0 {
			return found
		}
		if data == nil {
			continue
		}
		if bid := format.Word(data, int(no)&(format.WordsPerPage-1)); bid != 0 && s.l1.Wanted(bid) {
			dst[i], found = true, true
		}
	}
	return found
}

// inside says whether n bytes at off lie in the volume or in its annex.
func (v *Volume) inside(off uint64, n int) bool {
	if size := v.size.Load() * dedup.BlockSize; off <= size && uint64(n) <= size-off {
		return true
	}
	first := off / dedup.BlockSize
	return v.holds(first, (off+uint64(n)+dedup.BlockSize-1)/dedup.BlockSize-first)
}

// Read fills dst from a byte offset (both multiples of 512). All of dst is the
// state after one commit per MiB at least: a write of up to 1 MiB that does not
// cross a MiB of the request is seen whole or not at all. A block that cannot be
// read intact is a *CorruptError; the caller repairs it and reads again.
func (v *Volume) Read(ctx context.Context, off uint64, dst []byte) error {
	s := v.s
	if off%512 != 0 || len(dst)%512 != 0 {
		return fmt.Errorf("read volume %d at %d+%d: %w", v.id, off, len(dst), ErrRange)
	}
	rc, err := s.leaseFor(ctx, (len(dst)+dedup.BlockSize-1)/dedup.BlockSize+1)
	if err != nil {
		return err
	}
	defer s.giveBack(rc)
	all := int64(len(dst))
	v.streams.inFlight.Add(all)
	defer v.streams.inFlight.Add(-all)
	rc.passing = v.miss(off, len(dst))
	defer func() { rc.passing = false }()
	for len(dst) > 0 {
		in := int(off % dedup.BlockSize)
		n := min(readBlocks*dedup.BlockSize-in, len(dst))
		if err := v.readStep(ctx, rc, off, dst[:n]); err != nil {
			return err
		}
		dst = dst[n:]
		off += uint64(n)
	}
	return nil
}

// target is where the blocks of a read go: blocks of a volume from first on, into
// dst, which begins and ends anywhere in a block.
type target struct {
	first uint64
	off   uint64 // of dst, bytes
	dst   []byte
	whole []byte // dst when all of it is whole blocks, aligned for the device; else nil
}

func makeTarget(off uint64, dst []byte) target {
	t := target{first: off / dedup.BlockSize, off: off, dst: dst}
	if off%dedup.BlockSize == 0 && len(dst)%dedup.BlockSize == 0 && device.Aligned(dst) {
		t.whole = dst
	}
	return t
}

func (t *target) blocks() int {
	return int((t.off+uint64(len(t.dst))-1)/dedup.BlockSize - t.first + 1)
}

// part is the place of block i, and where in the block it begins.
func (t *target) part(i int) (to []byte, in int) {
	from := int64(t.first+uint64(i))*dedup.BlockSize - int64(t.off)
	end := min(from+dedup.BlockSize, int64(len(t.dst)))
	if from < 0 {
		return t.dst[:end], int(-from)
	}
	return t.dst[from:end], 0
}

func (v *Volume) readStep(ctx context.Context, rc *readContext, off uint64, dst []byte) error {
	s := v.s
	rc.to, rc.ended = makeTarget(off, dst), s.flights.ended.Load()
	defer func() { rc.to = target{} }()
	err := v.resolve(ctx, rc, rc.to.first, rc.to.blocks(), rc.cached)
	if err != nil || len(rc.blocks) == 0 {
		return err
	}
	defer s.letGo(rc)
	return s.fetchOnce(rc, v)
}

// resolve finds the identities of count blocks at one instant. Blocks that have
// does not take are listed in rc.blocks with their segments held; fetch lets go
// of them. A failed resolve holds nothing.
func (v *Volume) resolve(ctx context.Context, rc *readContext, first uint64, count int, have func(i int, bid BID) bool) error {
	s := v.s
	for {
		if err := s.failure(); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		rc.blocks = rc.blocks[:0]
		missing, err := v.tryResolve(rc, first, count, have)
		if err == nil && missing == 0 {
			return nil
		}
		s.letGo(rc)
		if err != nil {
			return err
		}
		if err := s.fault(missing, false); err != nil {
			return err
		}
	}
}

func (v *Volume) tryResolve(rc *readContext, first uint64, count int, have func(i int, bid BID) bool) (missing uint32, err error) {
	s := v.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	if err := v.present(first, uint64(count)); err != nil {
		return 0, fmt.Errorf("read volume %d block %d+%d of %d: %w", v.id, first, count, v.size.Load(), err)
	}
	var data []byte
	shared := false
	for i := range count {
		no := first + uint64(i)
		if i == 0 || no%format.WordsPerPage == 0 {
			if data, _, missing, _ = s.pg.lookup(v.mapTree, wordShift, no); missing != 0 {
				return missing, nil
			}
			if rc.passing {
				_, _, _, shared = s.pg.leafOf(v.mapTree, no)
			}
		}
		bid := BID(0)
		if data != nil {
			bid = BID(format.Word(data, int(no)&(format.WordsPerPage-1)))
		}
		if have(i, bid) || bid == 0 {
			continue
		}
		at, _, missing := s.entryOf(bid)
		if missing != 0 {
			return missing, nil
		}
		if at == nil {
			return 0, s.report(&CorruptError{What: "map", Device: "?", BID: bid, Volume: v.id, Block: BlockNo(no), Err: format.ErrInvalid})
		}
		rc.blocks = append(rc.blocks, located{index: i, bid: bid})
		l := &rc.blocks[len(rc.blocks)-1]
		format.ParseEntry(at, &l.e)
		l.passing = rc.passing && !shared && format.EntryRefs(at) == 1
		if !s.segs.valid(l.e.Addr, uint32(l.e.Len)) || !readable(&l.e) {
			rc.blocks = rc.blocks[:len(rc.blocks)-1]
			return 0, s.report(&CorruptError{What: "identity", Device: "?", BID: bid, Volume: v.id, Block: BlockNo(no), Err: format.ErrInvalid})
		}
		seg := &s.segs.all[l.e.Addr.Segment()]
		seg.readers.Add(1)
		s.heatUp(seg, l.e.Addr, bid)
	}
	return 0, nil
}

// ReadReduced fills dst with the stored form of the blocks from start on, holes
// as dedup.Zero. Their Data lies in buf, which has 4096 bytes for each. Checksums
// are verified.
func (v *Volume) ReadReduced(ctx context.Context, start BlockNo, dst []dedup.Block, buf []byte) error {
	s := v.s
	if len(buf) < len(dst)*dedup.BlockSize {
		return fmt.Errorf("read of %d blocks into %d bytes: %w", len(dst), len(buf), ErrRange)
	}
	rc, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer s.giveBack(rc)
	for at := 0; at < len(dst); at += readBlocks {
		n := min(readBlocks, len(dst)-at)
		first := uint64(start) + uint64(at)
		err := v.resolve(ctx, rc, first, n, func(i int, bid BID) bool {
			if bid == 0 {
				dst[at+i] = dedup.Block{}
			}
			return false
		})
		if err != nil {
			return err
		}
		err = s.fetchAll(rc, v, first, func(l *located, stored []byte) error {
			i := at + l.index
			dst[i], err = rc.portable(l, stored, buf[i*dedup.BlockSize:])
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Fingerprints fills dst with the fingerprints of the blocks from start on, zero for holes.
func (v *Volume) Fingerprints(ctx context.Context, start BlockNo, dst []dedup.Fingerprint) error {
	s := v.s
	rc, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer s.giveBack(rc)
	for at := 0; at < len(dst); at += readBlocks {
		n := min(readBlocks, len(dst)-at)
		clear(dst[at : at+n])
		if err := v.resolve(ctx, rc, uint64(start)+uint64(at), n, func(int, BID) bool { return false }); err != nil {
			return err
		}
		for i := range rc.blocks {
			dst[at+rc.blocks[i].index] = rc.blocks[i].e.Fingerprint
		}
		s.letGo(rc)
	}
	return nil
}

// ReadFingerprint returns the stored form of a block with this fingerprint, for
// a peer that asks for the content: Data lies in buf, which has 4096 bytes. The
// checksum is verified. ErrNotFound when the index knows none.
func (s *Store) ReadFingerprint(ctx context.Context, fp *dedup.Fingerprint, buf []byte) (dedup.Block, error) {
	rc, err := s.lease(ctx)
	if err != nil {
		return dedup.Block{}, err
	}
	defer s.giveBack(rc)
	if len(buf) < dedup.BlockSize {
		return dedup.Block{}, fmt.Errorf("read of a block into %d bytes: %w", len(buf), ErrRange)
	}
	var refs [dedup.Ways]uint64
	for _, ref := range refs[:s.index.Candidates(fp, &refs)] {
		if err := s.failure(); err != nil {
			return dedup.Block{}, err
		}
		rc.blocks = rc.blocks[:0]
		var missing uint32
		for {
			s.mu.RLock()
			var at []byte
			var bid BID
			if bid, at, missing = s.candidate(ref, fp); at != nil {
				rc.blocks = append(rc.blocks, located{bid: bid})
				format.ParseEntry(at, &rc.blocks[0].e)
				s.segs.all[rc.blocks[0].e.Addr.Segment()].readers.Add(1)
			}
			s.mu.RUnlock()
			if missing == 0 {
				break
			}
			if err := s.fault(missing, false); err != nil {
				return dedup.Block{}, err
			}
		}
		if len(rc.blocks) == 0 {
			continue
		}
		var b dedup.Block
		err := s.fetchAll(rc, nil, 0, func(l *located, stored []byte) error {
			b, err = rc.portable(l, stored, buf)
			return err
		})
		return b, err
	}
	return dedup.Block{}, ErrNotFound
}

// Repair stores an intact copy of a block, which came from another replica, in
// place of the damaged one, for all that share it. It is durable on return. It
// does nothing when the block has changed since (another fingerprint).
func (v *Volume) Repair(ctx context.Context, no BlockNo, b dedup.Block) error {
	s := v.s
	if err := dedup.Verify(&b); err != nil || len(b.Data) == 0 {
		return fmt.Errorf("repair volume %d block %d: %w: %w", v.id, no, ErrInvalidOp, err)
	}
	rc, err := s.lease(ctx)
	if err != nil {
		return err
	}
	err = v.resolve(ctx, rc, uint64(no), 1, func(int, BID) bool { return false })
	var l located
	if err == nil && len(rc.blocks) == 1 {
		l = rc.blocks[0]
	}
	s.letGo(rc)
	s.giveBack(rc)
	if err != nil || l.bid == 0 || l.e.Fingerprint != b.Fingerprint {
		return err
	}
	err = s.post(&task{kind: taskMove, moves: []move{{bid: l.bid, old: l.e.Addr, sum: b.Sum, enc: b.Encoding, data: b.Data}}})
	if err == nil {
		s.stats.repairs.Add(1)
	}
	return err
}

// ChangedChunks lists the chunks whose version is above since, ascending: those
// that an operation with a later sequence has touched. After a rollback that is all of
// them, holes too.
func (v *Volume) ChangedChunks(ctx context.Context, since Seq) ([]uint32, error) {
	var list []uint32
	err := v.eachVersion(ctx, 0, ^uint64(0), func(chunk uint32, version Seq) {
		if since < version {
			list = append(list, chunk)
		}
	})
	// The floor is read after the versions: it rises when they go.
	if floor, chunks := v.lowest(); err == nil && since < floor {
		all := make([]uint32, chunks, chunks+8)
		for i := range all {
			all[i] = uint32(i)
		}
		for _, c := range list {
			if annexChunk <= uint64(c) {
				all = append(all, c)
			}
		}
		list = all
	}
	return list, err
}

// lowest returns the floor of the versions and the number of chunks that it holds for.
func (v *Volume) lowest() (floor Seq, chunks uint64) {
	v.s.mu.RLock()
	defer v.s.mu.RUnlock()
	return v.floor, (v.size.Load() + ChunkBlocks - 1) >> chunkShift
}

// ChunkVersions fills dst with the versions of the chunks from first on: the
// sequence of the last operation that touched each, 0 for none.
func (v *Volume) ChunkVersions(ctx context.Context, first uint32, dst []Seq) error {
	clear(dst)
	err := v.eachVersion(ctx, uint64(first), uint64(first)+uint64(len(dst)), func(chunk uint32, version Seq) {
		if first <= chunk && uint64(chunk) < uint64(first)+uint64(len(dst)) {
			dst[chunk-first] = version
		}
	})
	floor, chunks := v.lowest()
	for i := uint64(first); i < chunks && i-uint64(first) < uint64(len(dst)); i++ {
		dst[i-uint64(first)] = max(dst[i-uint64(first)], floor)
	}
	return err
}

// eachVersion calls f for the chunks with a version on the pages that hold
// [first, end), and so for some beside them.
func (v *Volume) eachVersion(ctx context.Context, first, end uint64, f func(chunk uint32, version Seq)) error {
	s := v.s
	for c := first &^ (format.WordsPerPage - 1); c < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.mu.RLock()
		if i := c << chunkShift; v.size.Load() <= i {
			// Behind the end comes the annex, and nothing behind that.
			if i < uint64(AnnexStart) {
				c = max(c, uint64(AnnexStart)>>chunkShift)
			} else if annexEnd <= i {
				c = end
			}
			if end <= c {
				s.mu.RUnlock()
				return nil
			}
		}
		data, _, missing, span := s.pg.lookup(v.versions, wordShift, c)
		if data != nil {
			for i := range format.WordsPerPage {
				if w := format.Word(data, i); w != 0 {
					f(uint32(c)+uint32(i), Seq(w))
				}
			}
		}
		s.mu.RUnlock()
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return err
			}
			continue
		}
		c = nextSpan(c, max(span, wordShift))
	}
	return nil
}

// Digest is a hash over number and fingerprint of all mapped blocks, those of the
// annex too: equal on replicas of equal content. It is of one instant only while no operation commits.
func (v *Volume) Digest(ctx context.Context) (d [32]byte, err error) {
	s := v.s
	h := blake3.New()
	fps := make([]dedup.Fingerprint, format.WordsPerPage)
	var rec [8 + 32]byte
	for i := uint64(0); ; {
		s.mu.RLock()
		size := v.size.Load()
		if size <= i {
			i, size = max(i, uint64(AnnexStart)), annexEnd
		}
		data, _, missing, span := s.pg.lookup(v.mapTree, wordShift, i)
		mapped := data != nil
		s.mu.RUnlock()
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return d, err
			}
			continue
		}
		if size <= i {
			break
		}
		if mapped {
			n := min(size-i, format.WordsPerPage)
			if err := v.Fingerprints(ctx, BlockNo(i), fps[:n]); err != nil {
				return d, err
			}
			for j := range fps[:n] {
				if fps[j] == (dedup.Fingerprint{}) {
					continue
				}
				for k := range 8 {
					rec[k] = byte((i + uint64(j)) >> (8 * k))
				}
				copy(rec[8:], fps[j][:])
				_, _ = h.Write(rec[:])
			}
		}
		if i = nextSpan(i, max(span, wordShift)); i == ^uint64(0) {
			break
		}
	}
	copy(d[:], h.Sum(nil))
	return d, nil
}
