package lsfs

import (
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// batch is the commit under construction. It belongs to the committing role.
//
// The staging buffer takes shape in this order: records, with everything but
// addresses; then, with the log's turn, addresses and payload; then the header.
type batch struct {
	buf     []byte // aligned staging: header, records, payload
	end     int    // end of the records
	n       int    // records
	ops     []*Op
	fresh   []fresh // identities made by this batch, in order
	slots   freshTable
	pinned  []BID // by the second probe
	relaxed bool  // all operations are
	bytes   int64 // stored bytes of fresh
	copies  int64 // pages that shared leaves and clones cost
	before  format.Position
	plain   [dedup.BlockSize]byte // of a block on its way to the cache
}

type fresh struct {
	bid  BID
	addr format.Addr
	warm bool
	// plain is the block's content when it shall enter the cache.
	plain []byte
	*dedup.Block
}

// hasWhole says whether a new block of the batch is stored uncompressed.
func (b *batch) hasWhole() bool {
	for i := range b.fresh {
		if len(b.fresh[i].Data) == dedup.BlockSize {
			return true
		}
	}
	return false
}

func (b *batch) reset() {
	b.end, b.n, b.bytes, b.copies = format.CommitHeaderSize, 0, 0, 0
	b.relaxed = false
	clear(b.fresh)
	b.slots.reset()
	b.fresh, b.pinned = b.fresh[:0], b.pinned[:0]
}

// runOnce does one piece of work with the committing role: a cut that is due,
// a task, or a batch of operations. It says whether there may be more.
func (s *Store) runOnce() bool {
	q := &s.queue
	if s.failure() == nil {
		if err := s.admit(); err != nil {
			s.poison(err)
		}
	}
	q.mu.Lock()
	if len(q.dormant) > 0 {
		s.batch.pinned = append(s.batch.pinned[:0], q.dormant...)
		q.dormant = q.dormant[:0]
		q.mu.Unlock()
		s.reapAll(s.batch.pinned)
		return true
	}
	if len(q.tasks) > 0 {
		t := q.tasks[0]
		q.tasks = append(q.tasks[:0], q.tasks[1:]...)
		q.mu.Unlock()
		t.done <- s.runTask(t)
		return true
	}
	refuse := false
	if s.short() && s.failure() == nil {
		if q.head == nil || !s.cleaner.stuck.Load() {
			q.mu.Unlock()
			s.cleaner.kick()
			return false
		}
		refuse = true
	}
	if s.failure() == nil && !s.cleaner.stuck.Load() && s.paused() {
		q.mu.Unlock()
		return false
	}
	s.take()
	q.mu.Unlock()
	if len(s.batch.ops) == 0 {
		return false
	}
	s.runBatch(refuse)
	return true
}

// nextRound lets go of the pages that the last batch held.
func (s *Store) nextRound() {
	s.mu.Lock()
	s.pg.round++
	s.pg.held = 0
	s.mu.Unlock()
}

func (s *Store) reapAll(bids []BID) {
	s.nextRound()
	for _, b := range bids {
		for {
			s.mu.Lock()
			_, _, missing := s.entryOf(b)
			if missing == 0 {
				s.reapDormant(b)
				s.mu.Unlock()
				break
			}
			s.mu.Unlock()
			if err := s.fault(missing, true); err != nil {
				// The identity stays as a leak that the next start gives back.
				break
			}
		}
	}
}

// runBatch logs and applies the operations that take put into the batch.
func (s *Store) runBatch(refuse bool) {
	b := &s.batch
	if b.ops[0].Kind == opTask {
		op := b.ops[0]
		op.err = s.runTask(op.task)
		s.finish()
		return
	}
	s.nextRound()
	b.reset()
	if len(b.ops) > 1 {
		s.prefetch(b.ops)
	}
	for i, op := range b.ops {
		if i > 0 && s.pg.held > s.pg.max/2 {
			// BOUNDED: one write into a shared leaf may need the identities of 512 blocks.
			s.putBack(i)
			break
		}
		s.waiting.Add(-int64(op.payloadBytes))
		if op.err == nil {
			op.err = s.failure()
		}
		if op.err == nil {
			op.err = s.stage(op, refuse)
		}
		if op.err != nil {
			s.rewind(op)
		}
	}
	if b.n > 0 {
		dirty := s.pg.nDirty.Load()
		b.relaxed = true
		for _, op := range b.ops {
			b.relaxed = b.relaxed && (op.err != nil || op.Relaxed && (op.Kind == OpWrite || op.Kind == OpCopy))
		}
		err := s.write()
		if err == nil {
			if err = s.applyBatch(); err == nil {
				s.warm()
			}
		}
		s.charge(int64(b.end)+b.bytes, max(s.pg.nDirty.Load()-dirty, 0))
		for _, op := range b.ops {
			if op.err == nil {
				op.err = err
			}
		}
	}
	for _, bid := range b.pinned {
		s.Unpin(bid)
	}
	s.finish()
}

// warm puts new blocks that will be read soon into the cache.
func (s *Store) warm() {
	b := &s.batch
	for i := range b.fresh {
		f := &b.fresh[i]
		plain := f.plain
		if plain == nil && f.warm && dedup.Decode(b.plain[:], f.Encoding, f.Data) == nil {
			plain = b.plain[:]
		}
		if plain != nil {
			s.l1.PutUnread(uint64(f.bid), plain)
			s.stats.warmBlocks.Add(1)
		}
	}
}

// finish reports the batch: in the order of Append, then the hook once.
func (s *Store) finish() {
	b := &s.batch
	for i, op := range b.ops {
		err := op.err
		if err == nil {
			// The references are counted now; a failed operation's pins stay its caller's.
			for _, bid := range op.Pinned {
				if bid != 0 {
					s.Unpin(bid)
				}
			}
		}
		b.ops[i] = nil
		op.Done(op, err)
	}
	b.ops = b.ops[:0]
	if s.onCommit != nil {
		s.onCommit()
	}
}

// stage checks an operation against its volume and appends its record.
func (s *Store) stage(op *Op, refuse bool) error {
	b := &s.batch
	s.mu.RLock()
	v := s.find(op.Volume)
	ok := v != nil && v.takes(op.Kind)
	var blocks uint64
	var copies int64
	inside, crowded := false, false
	if ok {
		blocks, inside = v.size.Load(), v.holds(uint64(op.Start), uint64(op.Count))
		if op.Kind == OpWrite {
			inside = inside && uint64(op.Start) < blocks
		}
		if inside && (op.Kind == OpWrite || op.Kind == OpCopy || op.Kind == OpUnmap) {
			copies = s.sharedEdges(v, uint64(op.Start), uint64(op.Start)+uint64(op.Count))
			crowded = copies > 0 && s.crowded(v.mapTree, uint64(op.Start), uint64(op.Start)+uint64(op.Count))
		}
	}
	s.mu.RUnlock()
	if !ok {
		return fmt.Errorf("volume %d: %w", op.Volume, ErrNoVolume)
	}
	if crowded {
		return fmt.Errorf("volume %d: a copy of shared metadata: %w", op.Volume, ErrReferences)
	}
	// What was admitted before the cleaner gave up has its number already, and other
	// copies have it: it takes of the reserve.
	refuse = refuse && !(op.admitted && s.segs.nFree.Load() > reserveSegments/2)
	if op.Kind != OpCopy && !v.bare && op.ID.Seq != v.built+1 {
		return fmt.Errorf("volume %d: seq %d, expected %d: %w", op.Volume, op.ID.Seq, v.built+1, ErrGap)
	}
	head := format.OpHead{Volume: uint64(op.Volume), Epoch: uint64(op.ID.Epoch), Seq: uint64(op.ID.Seq), Start: uint64(op.Start), Count: op.Count}
	switch op.Kind {
	case OpWrite, OpCopy, OpUnmap, OpClone:
		if !inside {
			return fmt.Errorf("volume %d block %d+%d of %d: %w", op.Volume, op.Start, op.Count, blocks, ErrRange)
		}
	case OpState:
		head.Start, head.Count = 0, uint32(len(op.State))
	default:
		head.Start, head.Count = 0, 0
	}
	n := int(op.recordBytes)
	at := b.buf[b.end : b.end+n]
	format.PutOp(at, format.RecordKind(op.Kind), &head, n)
	freshWas, bytesWas, allotted := len(b.fresh), b.bytes, s.allotted
	var err error
	switch op.Kind {
	case OpState:
		copy(at[format.OpFixed:], op.State)
	case OpClone:
		format.PutSource(at, uint64(op.Source), uint64(op.SourceStart))
	case OpSnapshot, OpRollback:
		format.PutSnapshot(at, uint64(op.Snapshot))
		err = s.stageSnapshot(v, op)
	case OpWrite, OpCopy:
		err = s.stageBlocks(op, at[format.OpFixed:])
	}
	if err == nil && !(op.Kind == OpUnmap && op.Count > unmapSlice) {
		var r format.Record
		if r, _, err = format.NextRecord(at); err == nil {
			if op.Kind == OpClone {
				err = s.stageClone(r, refuse)
			} else {
				err = s.require(r)
			}
		}
	}
	if err == nil && copies > 0 {
		b.copies += copies
		err = s.stageCopies(v, op, refuse)
	}
	if err == nil && (op.Kind == OpWrite || op.Kind == OpCopy) {
		grow := b.bytes - bytesWas
		own := grow + int64(len(b.fresh)-freshWas)*identityCost + copies*format.PageSize
		if add := b.bytes + int64(len(b.fresh))*identityCost + b.copies*format.PageSize; refuse && grow > 0 || s.usable.Load()+s.slack < s.charged()+add && !s.fits(v, op, add, own) {
			s.stats.spaceRefused.Add(1)
			err = fmt.Errorf("volume %d: %d bytes of new data: %w", op.Volume, grow, ErrNoSpace)
		}
	}
	if err != nil {
		for i := freshWas; i < len(b.fresh); i++ {
			s.index.Remove(&b.fresh[i].Fingerprint, b.fresh[i].bid.slot())
		}
		s.allotted = allotted
		b.slots.dropFrom(freshWas)
		clear(b.fresh[freshWas:])
		b.fresh, b.bytes = b.fresh[:freshWas], bytesWas
		return err
	}
	b.end += n
	b.n++
	if op.Kind != OpCopy && !v.bare {
		v.built = op.ID.Seq
	}
	return nil
}

// stageCopies looks at an operation that makes copies of shared pages. Even an unmap
// needs room for them, so when nothing at all is left it is refused.
func (s *Store) stageCopies(v *Volume, op *Op, refuse bool) error {
	if refuse && (op.Kind != OpUnmap || s.segs.nFree.Load() <= reserveSegments/2) {
		s.stats.spaceRefused.Add(1)
		return fmt.Errorf("volume %d: a copy of shared metadata: %w", op.Volume, ErrNoSpace)
	}
	start, end := uint64(op.Start), uint64(op.Start)+uint64(op.Count)
	for _, i := range [...]uint64{start, end - 1} {
		first := i &^ (format.WordsPerPage - 1)
		s.mu.RLock()
		err := s.roomForRefs(v, first, first+format.WordsPerPage, s.refsLast)
		s.mu.RUnlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// rewind makes the sequence after the last staged operation the next that Append
// takes, once an operation has failed: what is queued behind it fails with ErrGap.
func (s *Store) rewind(op *Op) {
	if op.Kind == OpCopy || op.Kind == opTask {
		return
	}
	if v := s.Volume(op.Volume); v != nil {
		s.queue.mu.Lock()
		v.expect = v.built + 1
		s.queue.mu.Unlock()
	}
}

// stageBlocks encodes the block entries of a write, all but the addresses of new blocks.
func (s *Store) stageBlocks(op *Op, at []byte) error {
	b := &s.batch
	for i := range op.Blocks {
		blk := &op.Blocks[i]
		to := at[i*format.BlockEntrySize:]
		if blk.Encoding == dedup.Zero {
			clear(to[:format.BlockEntrySize])
			s.stats.blocksZero.Add(1)
			continue
		}
		bid, held, twin := BID(0), false, false
		if blk.Data == nil {
			bid = op.Pinned[i]
		} else {
			// CHECKED: what is logged is what was reduced, on whichever node that was.
			if sum := dedup.Sum(blk.Data); sum != blk.Sum {
				return fmt.Errorf("volume %d block %d: checksum %08x, expected %08x: %w", op.Volume, uint64(op.Start)+uint64(i), sum, blk.Sum, ErrInvalidOp)
			}
			bid, held, twin = s.probe(&blk.Fingerprint)
		}
		if bid == 0 {
			var err error
			if bid, err = s.allot(); err != nil {
				return err
			}
			b.slots.put(bid.slot(), len(b.fresh))
			f := fresh{bid: bid, Block: blk, warm: op.Warm}
			if i < len(op.Plain) {
				f.plain = op.Plain[i]
			}
			b.fresh = append(b.fresh, f)
			b.bytes += int64(len(blk.Data))
			s.index.Insert(&blk.Fingerprint, bid.slot())
			s.stats.blocksNew.Add(1)
			s.stats.storedBytes.Add(int64(len(blk.Data)))
			format.PutBlock(to, &format.BlockEntry{Fingerprint: blk.Fingerprint, BID: uint64(bid), Sum: blk.Sum, Len: uint16(len(blk.Data)), Encoding: blk.Encoding})
			continue
		}
		s.stats.blocksRef.Add(1)
		if twin {
			// An equal block of this batch: write fills in its place. It is pinned like any
			// other: an operation between the two may take its only reference away.
			s.pins.add(bid)
			b.pinned = append(b.pinned, bid)
			format.PutBlock(to, &format.BlockEntry{Fingerprint: blk.Fingerprint, BID: uint64(bid), Ref: true})
			continue
		}
		if held {
			b.pinned = append(b.pinned, bid)
		}
		if err := s.stageRef(bid, &blk.Fingerprint, to); err != nil {
			return err
		}
	}
	return nil
}

// probe looks for a new block among what is stored and what this batch stores. A
// stored one is pinned (held), one of this batch is a twin.
func (s *Store) probe(fp *dedup.Fingerprint) (bid BID, held, twin bool) {
	b := &s.batch
	var refs [dedup.Ways]uint64
	for _, ref := range refs[:s.index.Candidates(fp, &refs)] {
		if i, ok := b.find(ref); ok {
			if b.fresh[i].Fingerprint == *fp {
				return b.fresh[i].bid, false, true
			}
			continue
		}
		s.mu.RLock()
		bid, e, _ := s.candidate(ref, fp)
		ok := e != nil && format.EntryRefs(e) < s.refsMax
		if ok {
			s.pins.add(bid)
		}
		s.mu.RUnlock()
		if ok {
			return bid, true, false
		}
	}
	return 0, false, false
}

// stageRef encodes a reference to a pinned identity, with all that replay needs.
func (s *Store) stageRef(bid BID, fp *dedup.Fingerprint, to []byte) error {
	for {
		s.mu.RLock()
		at, _, missing := s.entryOf(bid)
		var e format.Entry
		if at != nil {
			format.ParseEntry(at, &e)
		}
		s.mu.RUnlock()
		switch {
		case at != nil && e.Fingerprint == *fp:
			format.PutBlock(to, &format.BlockEntry{Fingerprint: e.Fingerprint, Addr: e.Addr, BID: uint64(bid), Sum: e.Sum, Len: e.Len, Encoding: e.Encoding, Index: e.Index, Ref: true})
			return nil
		case missing != 0:
			if err := s.fault(missing, true); err != nil {
				return err
			}
		default:
			return fmt.Errorf("identity %d is not the block that was pinned: %w", bid, ErrInvalidOp)
		}
	}
}

// identityCost is what the metadata of a stored block comes to in the long run: 64 bytes
// in a page of identities that is half full at worst (allot.go), and a place in the map.
const identityCost = 160

// charged is what counts against the usable size: stored bytes, and metadata as
// it is or as it will become. So overwriting a full pool never needs more than is there.
func (s *Store) charged() int64 {
	return s.segs.data.Load() + max(s.pg.nAlive.Load()*format.PageSize, s.stored.Load()*identityCost)
}

// fits says whether a write leaves the pool within its usable size when what it
// overwrites is counted off, or takes no more than it frees: add is what the batch
// takes, own what the write does. The pages are held.
func (s *Store) fits(v *Volume, op *Op, add, own int64) bool {
	s.mu.RLock()
	freed := s.freedBy(v, op.Start, op.Count)
	s.mu.RUnlock()
	return own <= freed || s.charged()+add-freed <= s.usable.Load()+s.slack
}

// freedBy sums the stored bytes that only the given range refers to, under Store.mu.
// What is not resident counts as a whole block.
func (s *Store) freedBy(v *Volume, start BlockNo, count uint32) (freed int64) {
	kept := false
	for i := uint64(start); i < uint64(start)+uint64(count); i++ {
		if i == uint64(start) || i%format.WordsPerPage == 0 {
			leaf, _, _, shared := s.pg.leafOf(v.mapTree, i)
			kept = leaf != 0 && shared
		}
		if kept {
			continue // the others keep what the leaf names
		}
		data, _, missing, _ := s.pg.lookup(v.mapTree, wordShift, i)
		if data == nil {
			if missing != 0 {
				freed += dedup.BlockSize + identityCost
			}
			continue
		}
		if w := format.Word(data, int(i)&(format.WordsPerPage-1)); w != 0 {
			e, _, missing := s.entryOf(BID(w))
			switch {
			case missing != 0:
				freed += dedup.BlockSize + identityCost
			case e != nil && format.EntryRefs(e) == 1:
				freed += int64(format.EntryShare(e)) + identityCost
			}
		}
	}
	return freed
}

// Admit says whether a write would find room, for a caller that must know before
// it gives the write a sequence number. It does no I/O. A write that was admitted
// and is appended at once is not refused for want of space.
func (v *Volume) Admit(start BlockNo, blocks []dedup.Block) bool {
	s := v.s
	var add int64
	for i := range blocks {
		if n := len(blocks[i].Data); n > 0 {
			add += int64(n) + identityCost
		}
	}
	over := s.charged() + s.waiting.Load() + add - s.usable.Load()
	shared := s.pg.shared.Load() > 0
	if add > 0 && s.refusing() {
		return false
	}
	if !shared && (add == 0 || over <= 0) || over+edgesMost*format.PageSize <= 0 && s.pg.crowd.Load() < s.parentsLast {
		return true
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	edges := s.sharedEdges(v, uint64(start), uint64(start)+uint64(len(blocks)))
	if edges > 0 && s.crowded(v.mapTree, uint64(start), uint64(start)+uint64(len(blocks))) {
		return false
	}
	// What takes no more than it frees is never in the way of a full pool.
	return add == 0 && edges == 0 || min(over, add)+edges*format.PageSize <= s.freedBy(v, start, uint32(len(blocks)))
}

// refusing says whether the store refuses what grows because not even the cleaner finds
// room: something is wrong with the pool, such as segments that cannot be read.
func (s *Store) refusing() bool { return s.cleaner.stuck.Load() && s.short() }

// AdmitUnmap says whether an unmap would find room, as Admit does for a write. Only
// where map pages are shared does it take any.
func (v *Volume) AdmitUnmap(start BlockNo, count uint32) bool {
	s := v.s
	over := s.charged() + s.waiting.Load() - s.usable.Load()
	if s.pg.shared.Load() == 0 || over+edgesMost*format.PageSize <= 0 && s.pg.crowd.Load() < s.parentsLast {
		return true
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	edges := s.sharedEdges(v, uint64(start), uint64(start)+uint64(count))
	if edges > 0 && s.crowded(v.mapTree, uint64(start), uint64(start)+uint64(count)) {
		return false
	}
	return edges == 0 || !s.refusing() && over+edges*format.PageSize <= s.freedBy(v, start, min(count, unmapSlice))
}

// Kept says whether something else, a snapshot or a clone, leads to what the range
// holds: then overwriting it or unmapping it gives nothing back, and takes room for
// pages of the map. It does no I/O; what is not in RAM counts as kept.
func (v *Volume) Kept(start BlockNo, count uint32) bool {
	s := v.s
	if s.pg.shared.Load() == 0 {
		return false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := uint64(start); i < uint64(start)+uint64(count); {
		_, missing, span, shared := s.pg.leafOf(v.mapTree, i)
		if missing != 0 || shared {
			return true
		}
		i = nextSpan(i, max(span, wordShift))
	}
	return false
}

// write gives the staged records their addresses and writes the commit, durably unless
// the batch is relaxed.
//
// Blocks that are stored whole come first, each on a page of the device of its
// own, so that reading one later takes one page and not two; the compressed ones
// follow, packed to the byte.
func (s *Store) write() error {
	b := &s.batch
	payloadOff := b.end
	if whole := int(roundUp(b.end)); b.hasWhole() && roundUp(whole+int(b.bytes)) <= len(b.buf) {
		payloadOff = whole
		clear(b.buf[b.end:whole])
	}
	base, err := s.begin(roundUp(payloadOff + int(b.bytes)))
	if err != nil {
		return err
	}
	b.before = s.log.position()
	off := payloadOff
	for _, whole := range [...]bool{true, false} {
		for i := range b.fresh {
			if f := &b.fresh[i]; (len(f.Data) == dedup.BlockSize) == whole {
				f.addr = base + format.Addr(off)
				off += copy(b.buf[off:], f.Data)
			}
		}
	}
	for at := format.CommitHeaderSize; at < b.end; {
		r, rest, err := format.NextRecord(b.buf[at:b.end])
		if err != nil {
			invariant("CHECKED", "staged record: %v", err)
		}
		if r.Kind == format.RecordWrite || r.Kind == format.RecordCopy {
			var e format.BlockEntry
			for i := range int(r.Op().Count) {
				k, ok := b.find(BID(r.BlockBID(i)).slot())
				if !ok || b.fresh[k].bid != BID(r.BlockBID(i)) {
					continue
				}
				f := &b.fresh[k]
				r.Block(i, &e)
				if !e.Ref {
					e.Addr = f.addr
				} else {
					// The first block of that identity is in this batch, before this one.
					e.Addr, e.Sum, e.Len, e.Encoding = f.addr, f.Sum, uint16(len(f.Data)), f.Encoding
				}
				r.PutBlock(i, &e)
			}
		}
		at = b.end - len(rest)
	}
	if err := s.commit(b.buf, b.relaxed, b.n, b.end-format.CommitHeaderSize, payloadOff, off-payloadOff); err != nil {
		return err
	}
	s.stats.batch.add(uint64(b.n))
	s.stats.ops.Add(int64(b.n))
	s.ckpt.changed.Store(true)
	return nil
}

// applyBatch makes the commit visible. It runs the records that are on
// the device through the same function as replay.
func (s *Store) applyBatch() error {
	b := &s.batch
	rest := b.buf[format.CommitHeaderSize:b.end]
	held := true
	for len(rest) > 0 {
		r, more, err := format.NextRecord(rest)
		if err == nil {
			err = s.apply(r, held, 0, s.cutInside)
			held = held && r.Kind != format.RecordClone // it may have shared what they looked at
		}
		if err != nil {
			// The commit is durable but cannot be made visible: go on from the log, at the
			// next start.
			err = fmt.Errorf("apply commit %d: %w", s.log.seq, err)
			s.poison(err)
			return s.failure()
		}
		rest = more
	}
	return nil
}
