package lsfs

import (
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// refsMax is where a block stops taking references: the next equal block is
// stored afresh. Far below the counter's end, above what one image's clones need.
// AdmitClone refuses such a block too. What is left up to the end is for clones that
// were admitted and for the private copies of shared leaves, which cannot choose: below
// refsLast they go on (ErrReferences).
const (
	refsMax  = 1 << 31
	refsLast = 1<<32 - 1<<20
)

// pinTable counts who is about to refer to an identity. A pin keeps an identity
// without references from dying ("dormant") until the pin is gone.
type pinTable [64]pinShard

type pinShard struct {
	mu   sync.Mutex
	pins map[BID]pin
	_    [40]byte
}

type pin struct {
	n       int32
	dormant bool // references are zero: whoever takes the last pin away has it reaped
}

func (t *pinTable) init() {
	for i := range t {
		t[i].pins = make(map[BID]pin)
	}
}

func (t *pinTable) shard(b BID) *pinShard { return &t[b%64] }

// add pins b. The caller holds Store.mu, so the identity cannot die meanwhile.
func (t *pinTable) add(b BID) {
	sh := t.shard(b)
	sh.mu.Lock()
	p := sh.pins[b]
	p.n++
	sh.pins[b] = p
	sh.mu.Unlock()
}

// remove takes one pin away and says whether a dormant identity lost its last one.
func (t *pinTable) remove(b BID) (reap bool) {
	sh := t.shard(b)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	p, ok := sh.pins[b]
	if !ok {
		invariant("REFS", "identity %d is unpinned but was not pinned", b)
	}
	if p.n--; p.n == 0 {
		delete(sh.pins, b)
		return p.dormant
	}
	sh.pins[b] = p
	return false
}

// hold marks b dormant if it is pinned, and says whether it is.
func (t *pinTable) hold(b BID) bool {
	sh := t.shard(b)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	p, ok := sh.pins[b]
	if ok {
		p.dormant = true
		sh.pins[b] = p
	}
	return ok
}

// dormant lists the identities that live by pins alone, or might.
func (t *pinTable) dormant(dst []uint64) []uint64 {
	for i := range t {
		t[i].mu.Lock()
		for b, p := range t[i].pins {
			if p.dormant {
				dst = append(dst, uint64(b))
			}
		}
		t[i].mu.Unlock()
	}
	return dst
}

// entryOf finds the entry of an identity under Store.mu: nil when it is dead, or
// when page missing must be read first.
func (s *Store) entryOf(b BID) (entry []byte, leaf, missing uint32) {
	entry, leaf, missing = s.slotEntry(b.slot())
	if entry != nil && format.EntryGeneration(entry) != b.generation() {
		return nil, leaf, 0
	}
	return entry, leaf, missing
}

// slotEntry is entryOf for whatever identity has the slot now.
func (s *Store) slotEntry(slot uint64) (entry []byte, leaf, missing uint32) {
	data, leaf, missing, _ := s.pg.lookup(s.identities, entryShift, slot)
	if data == nil {
		return nil, 0, missing
	}
	e := format.EntryAt(data, int(slot%format.EntriesPerPage))
	if format.EntryAddr(e) == 0 {
		return nil, leaf, 0
	}
	return e, leaf, 0
}

// candidate finds the identity that a reference of the fingerprint index leads to, if
// it is the wanted block. missing is a page that must be read to know.
func (s *Store) candidate(ref uint64, fp *dedup.Fingerprint) (b BID, entry []byte, missing uint32) {
	e, _, missing := s.slotEntry(ref)
	if e == nil || dedup.Fingerprint(e[:32]) != *fp {
		return 0, nil, missing
	}
	return identityAt(BID(ref), 0, e), e, 0
}

// Pin finds a stored block with this fingerprint and pins it, so that it stays
// until the Unpin, or until the operation that carries the identity in Pinned
// is committed. It compares the full fingerprint, does no I/O, and may say no
// although the block is stored. It may be called on many goroutines at once.
func (s *Store) Pin(fp *dedup.Fingerprint) (BID, bool) {
	var refs [dedup.Ways]uint64
	for _, ref := range refs[:s.index.Candidates(fp, &refs)] {
		s.mu.RLock()
		b, e, _ := s.candidate(ref, fp)
		ok := e != nil && format.EntryRefs(e) < s.refsMax
		if ok {
			s.pins.add(b)
		}
		s.mu.RUnlock()
		if ok {
			s.stats.pinHits.Add(1)
			return b, true
		}
	}
	s.stats.pinMisses.Add(1)
	return 0, false
}

// Unpin gives up a pin that no operation took over.
func (s *Store) Unpin(b BID) {
	if s.pins.remove(b) {
		s.queue.reap(b)
	}
}

// born makes an identity with one reference. Its place in the tree is resident or absent.
func (s *Store) born(b BID, e *format.BlockEntry) {
	leaf := s.pg.ensure(&s.identities, entryShift, b.slot(), format.EntryPage)
	data := s.pg.touch(leaf)
	at := format.EntryAt(data, int(b.slot()%format.EntriesPerPage))
	if format.EntryAddr(at) != 0 && s.replaying && format.EntryRefs(at) == 0 {
		// Only a pin kept the one that was here alive at the cut, and it went before the slot
		// was given out again.
		s.kill(makeBID(b.slot(), format.EntryGeneration(at)), at, leaf)
		leaf = s.pg.ensure(&s.identities, entryShift, b.slot(), format.EntryPage)
		data = s.pg.touch(leaf)
		at = format.EntryAt(data, int(b.slot()%format.EntriesPerPage))
	}
	if format.EntryAddr(at) != 0 || b.generation() < format.EntryGeneration(at) && !s.replaying && !s.adopting {
		invariant("REFS", "identity %d is born twice", b)
	}
	s.newest = max(s.newest, b.generation())
	if gen := s.generationOfPage(b); gen > 0 && s.pg.page(leaf).count == 0 {
		for i := range format.EntriesPerPage {
			format.PutEntryGeneration(format.EntryAt(data, i), gen)
		}
	}
	s.pg.page(leaf).count++
	s.pg.refs.touch(b)
	s.pg.refs.moved(b, e.Addr, int32(e.Share()))
	format.PutEntry(at, &format.Entry{Fingerprint: e.Fingerprint, Addr: e.Addr, Sum: e.Sum, Refs: 1, Len: e.Len, Encoding: e.Encoding, Index: e.Index, Generation: b.generation()})
	s.segs.addLive(e.Addr, int32(e.Share()))
	s.stored.Add(1)
	s.nextBID = max(s.nextBID, BID(b.slot()+1))
}

// generationOfPage is what the dead slots of a page begin with that is made for b. One
// that is made anew for slots that are used again must not forget what they had: that is
// not above b's, which was given out last. Replay may make a page at another moment, and
// takes what no slot of the store has exceeded.
func (s *Store) generationOfPage(b BID) uint16 {
	if s.replaying {
		return s.newest
	}
	if s.adopting {
		return 0 // identities come in any order, and nothing else has a name of before
	}
	return b.generation()
}

// ref adds a reference to an identity, or makes it again when replay finds it dead.
func (s *Store) ref(b BID, e *format.BlockEntry) {
	at, leaf, missing := s.entryOf(b)
	if at == nil {
		if missing != 0 {
			invariant("REFS", "page %d of identity %d is not resident", missing, b)
		}
		if !s.replaying && !s.adopting {
			invariant("REFS", "identity %d is referred to but dead", b)
		}
		s.born(b, e)
		return
	}
	s.pg.refs.touch(b)
	data := s.pg.touch(leaf)
	at = format.EntryAt(data, int(b.slot()%format.EntriesPerPage))
	format.PutEntryRefs(at, format.EntryRefs(at)+1)
}

// addRef adds a reference to an identity that a map names, which so is alive.
func (s *Store) addRef(b BID) {
	at, leaf, missing := s.entryOf(b)
	if at == nil || format.EntryRefs(at) == 0 || format.EntryRefs(at) == 1<<32-1 {
		invariant("REFS", "identity %d takes no reference (page %d missing)", b, missing)
	}
	s.pg.refs.touch(b)
	at = format.EntryAt(s.pg.touch(leaf), int(b.slot()%format.EntriesPerPage))
	format.PutEntryRefs(at, format.EntryRefs(at)+1)
}

// unref takes a reference away; the last one ends the identity unless it is pinned.
// REFS: increments of an operation come before its decrements, so no count passes zero.
func (s *Store) unref(b BID) {
	at, leaf, _ := s.entryOf(b)
	if at == nil || format.EntryRefs(at) == 0 {
		invariant("REFS", "identity %d loses a reference that it does not have", b)
	}
	s.pg.refs.touch(b)
	n := format.EntryRefs(at) - 1
	at = format.EntryAt(s.pg.touch(leaf), int(b.slot()%format.EntriesPerPage))
	format.PutEntryRefs(at, n)
	if n == 0 && !s.pins.hold(b) {
		s.kill(b, at, leaf)
	}
}

// reapDormant ends an identity that has neither references nor pins. Its page is resident.
func (s *Store) reapDormant(b BID) {
	at, leaf, _ := s.entryOf(b)
	if at == nil || format.EntryRefs(at) != 0 || s.pins.hold(b) {
		return
	}
	at = format.EntryAt(s.pg.touch(leaf), int(b.slot()%format.EntriesPerPage))
	s.kill(b, at, leaf)
}

func (s *Store) kill(b BID, at []byte, leaf uint32) {
	fp := dedup.Fingerprint(at[:32])
	s.pg.refs.touch(b)
	s.pg.refs.moved(b, format.EntryAddr(at), -int32(format.EntryShare(at)))
	s.segs.addLive(format.EntryAddr(at), -int32(format.EntryShare(at)))
	format.KillEntry(at)
	s.stored.Add(-1)
	if p := s.pg.page(leaf); p.count > 1 {
		p.count--
	} else {
		s.pg.prune(&s.identities, entryShift, b.slot())
	}
	s.index.Remove(&fp, b.slot())
	s.l1.Remove(uint64(b))
}
