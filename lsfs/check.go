package lsfs

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Report is what a check found.
type Report struct {
	Volumes, Pages, Identities, Mapped uint64 // counted
	Snapshots                          uint64
	Blocks                             uint64 // stored blocks whose checksum was verified
	// Problems names everything that is wrong, at most ProblemsMax of them; Count is all.
	Problems []Finding
	Count    int
}

// ProblemsMax bounds the list of a Report.
const ProblemsMax = 100

// OK says whether nothing is wrong.
func (r *Report) OK() bool { return r.Count == 0 }

// Finding is one thing that is wrong: what and where, and by its kind what to do.
type Finding struct {
	Kind FindingKind
	Text string
}

func (f Finding) String() string { return f.Text }

// FindingKind says what is wrong with a pool, as far as it matters for what to do.
type FindingKind string

const (
	// FoundCounter: a count is not what the maps say. No data is wrong.
	FoundCounter FindingKind = "counter"
	// FoundDamage: bytes on a device are not what was written there.
	FoundDamage FindingKind = "damage"
	// FoundStructure: intact metadata contradicts itself.
	FoundStructure FindingKind = "structure"
)

// Remedy says what to do about a finding.
func (k FindingKind) Remedy() string {
	switch k {
	case FoundCounter:
		return "twinsan store check --repair-counters, or start the node: its scrub corrects it"
	case FoundDamage:
		return "start the node, then: twinsan scrub start --full-speed; it is repaired from the other nodes"
	}
	return "leave the devices as they are, and rebuild this node's replicas from the other nodes"
}

// add, counter and damage note a finding of the kind of their name; add's is structure.
func (r *Report) add(text string, args ...any)     { r.find(FoundStructure, text, args) }
func (r *Report) counter(text string, args ...any) { r.find(FoundCounter, text, args) }
func (r *Report) damage(text string, args ...any)  { r.find(FoundDamage, text, args) }

func (r *Report) find(kind FindingKind, text string, args []any) {
	r.Count++
	if len(r.Problems) < ProblemsMax {
		r.Problems = append(r.Problems, Finding{kind, fmt.Sprintf(text, args...)})
	}
}

// Check walks all maps and compares: the references of each identity (REFS), the
// live bytes of each segment and that none of it is free (LIVE), each page, its
// checksum on the device and the number of its parents, the counters of volumes and snapshots. Operations wait meanwhile. The
// error is of the walk itself, such as ctx; what is wrong stands in the report.
func (s *Store) Check(ctx context.Context) (*Report, error) { return s.check(ctx, false) }

// CheckPool checks a pool that no process serves, as Check does, and the
// checksum of every stored block besides. It replays the log in memory and
// writes nothing.
func CheckPool(ctx context.Context, c Config) (*Report, error) {
	s, err := open(ctx, readOnly(c))
	if err != nil {
		return nil, err
	}
	defer s.free()
	return s.check(ctx, true)
}

// checkWindow is the number of identities whose references are counted in one
// walk of the maps: 64 MiB of counters.
const checkWindow = 16 << 20

func (s *Store) check(ctx context.Context, blocks bool) (*Report, error) {
	s.enter()
	defer s.leave()
	c := &s.ckpt
	c.mu.Lock()
	for c.running {
		c.cond.Wait()
	}
	c.mu.Unlock()
	if err := s.failure(); err != nil {
		return nil, err
	}
	k := &checker{s: s, r: &Report{}, under: make(map[uint32]uint64), parents: make([]uint32, s.pg.n), seen: make([]uint64, (s.pg.n+63)/64), live: make([]uint32, s.segs.count()), pages: make([]uint32, s.segs.count())}
	if err := k.trees(ctx); err != nil {
		return nil, err
	}
	if err := k.identities(ctx, blocks); err != nil {
		return nil, err
	}
	if n := uint64(s.stored.Load()); n != k.r.Identities {
		k.r.counter("the store counts %d identities, holds %d", n, k.r.Identities)
	}
	if err := k.directory(ctx); err != nil {
		return nil, err
	}
	k.segments()
	return k.r, nil
}

type checker struct {
	s       *Store
	r       *Report
	parents []uint32          // of each page
	seen    []uint64          // bitmap of shared pages that this walk has been at
	under   map[uint32]uint64 // mapped blocks below shared pages of maps
	live    []uint32
	pages   []uint32
	refs    []uint32 // of identities in the window
	low     BID
	prover  *prover
	list    []suspect
}

// known says whether there is a page of that id. Reads go on beside a check, and bring
// pages into RAM.
func (k *checker) known(id uint64) bool {
	k.s.mu.RLock()
	defer k.s.mu.RUnlock()
	return id < uint64(len(k.parents)) && k.s.pg.known(id)
}

// reach counts a parent of a page and says whether it may be walked. Pages of
// identities have one.
func (k *checker) reach(id uint64, many bool, from string) bool {
	if !k.known(id) {
		k.r.add("%s names page %d, which does not exist", from, id)
		return false
	}
	if k.parents[id]++; k.parents[id] > 1 && !many {
		k.r.add("page %d has more than one parent (%s)", id, from)
		return false
	}
	return true
}

// again says whether a shared page was met before on this walk of all trees.
func (k *checker) again(id uint32) bool {
	k.s.mu.RLock()
	parents := k.s.pg.page(id).parents
	k.s.mu.RUnlock()
	if parents <= 1 {
		return false
	}
	was := k.seen[id/64]&(1<<(id%64)) != 0
	k.seen[id/64] |= 1 << (id % 64)
	return was
}

// walk calls f for the leaves of a tree, with a copy of the page. What is below a shared
// page is walked once only, from the first place that leads there. count says whether
// pages are counted as reached.
func (k *checker) walk(ctx context.Context, t tree, shift uint, name string, count bool, f func(first uint64, leaf uint32, page []byte)) error {
	if t.top == 0 {
		return nil
	}
	var visit func(id uint32, level uint8, first uint64) error
	visit = func(id uint32, level uint8, first uint64) error {
		if count && !k.reach(uint64(id), shift == wordShift, name) || !k.known(uint64(id)) {
			return nil
		}
		if shift == wordShift && k.again(id) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		var page [format.PageSize]byte
		for {
			k.s.mu.RLock()
			data := k.s.pg.data(id)
			if data != nil {
				copy(page[:], data)
			}
			counted := k.s.pg.page(id).count
			kind := k.s.pg.page(id).kind
			k.s.mu.RUnlock()
			if data == nil {
				if err := k.s.fault(id, false); err != nil {
					k.r.damage("%s: %v", name, err)
					return nil
				}
				continue
			}
			if n := countPage(kind, page[:]); count && (n != counted || n == 0) {
				k.r.add("%s: page %d holds %d, counts %d", name, id, n, counted)
			}
			break
		}
		if level == 0 {
			if f != nil {
				f(first, id, page[:])
			}
			return nil
		}
		for i := range format.WordsPerPage {
			if w := format.Word(page[:], i); w != 0 {
				if err := visit(uint32(w), level-1, first+uint64(i)<<(shift+9*uint(level-1))); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return visit(t.top, t.height-1, 0)
}

// load copies a page into buf and returns it, nil if it cannot be read.
func (k *checker) load(id uint32, buf []byte) []byte {
	for {
		k.s.mu.RLock()
		data := k.s.pg.data(id)
		copy(buf, data)
		k.s.mu.RUnlock()
		if data != nil {
			return buf
		}
		if err := k.s.fault(id, false); err != nil {
			k.r.damage("page %d: %v", id, err)
			return nil
		}
	}
}

// mapped counts the blocks that a subtree maps before end, and says what it maps behind.
// What shared pages lead to is counted once where all of it lies before end.
func (k *checker) mapped(id uint32, level uint8, first, end uint64, name string) (n uint64) {
	if !k.known(uint64(id)) {
		return 0 // walk has said so
	}
	span := wordShift + 9*uint(level)
	within := nextSpan(first, span) <= end
	if n, ok := k.under[id]; ok && within {
		return n
	}
	var buf [format.PageSize]byte
	page := k.load(id, buf[:])
	if page == nil {
		return 0
	}
	for i := range format.WordsPerPage {
		w := format.Word(page, i)
		switch at := first + uint64(i)<<(span-wordShift); {
		case w == 0:
		case level > 0:
			n += k.mapped(uint32(w), level-1, at, end, name)
		case end <= at:
			k.r.add("%s maps block %d behind its end", name, at)
		default:
			n++
		}
	}
	k.s.mu.RLock()
	shared := k.s.pg.page(id).parents > 1
	k.s.mu.RUnlock()
	if shared && within {
		k.under[id] = n
	}
	return n
}

// counters compares the mapped blocks of a volume or snapshot with what it counts.
func (k *checker) counters(v *Volume, name string) {
	t := v.mapTree
	var mapped, annex uint64
	end := max(v.size.Load(), v.tailEnd)
	var buf [format.PageSize]byte
	if slot := t.annexSlot(uint64(AnnexStart)); t.top != 0 && slot > 0 {
		page := k.load(t.top, buf[:])
		below := wordShift * uint(t.height-1)
		for i := 0; page != nil && i < format.WordsPerPage; i++ {
			w := uint32(format.Word(page, i))
			switch at := uint64(i) << below; {
			case w == 0:
			case slot <= i:
				annex += k.mapped(w, t.height-2, at, annexEnd, name)
			default:
				mapped += k.mapped(w, t.height-2, at, end, name)
			}
		}
	} else if t.top != 0 {
		mapped = k.mapped(t.top, t.height-1, 0, end, name)
	}
	if mapped != v.mapped {
		k.r.counter("%s maps %d blocks, counts %d", name, mapped, v.mapped)
	}
	if annex != v.annex {
		k.r.counter("%s maps %d blocks of its annex, counts %d", name, annex, v.annex)
	}
	k.r.Mapped += mapped + annex
}

// holder is one thing that leads to trees: a volume or a snapshot.
type holder struct {
	v    *Volume
	name string
}

func (k *checker) holders() (list []holder) {
	for id, v := range k.s.volumes {
		list = append(list, holder{v, fmt.Sprintf("volume %d", id)})
	}
	for id, n := range k.s.snapshots {
		list = append(list, holder{&n.content, fmt.Sprintf("snapshot %d", id)})
	}
	return list
}

// maps walks all maps, and their version trees where f is nil.
func (k *checker) maps(ctx context.Context, count bool, f func(first uint64, leaf uint32, page []byte)) error {
	for _, h := range k.holders() {
		leads := append([]lead{{tree: h.v.mapTree}, {tree: h.v.versions, versions: true}}, h.v.old...)
		for _, l := range leads {
			if l.versions && f != nil {
				continue
			}
			what := "map"
			if l.versions {
				what = "versions"
			}
			if err := k.walk(ctx, l.tree, wordShift, what+" of "+h.name, count, f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (k *checker) trees(ctx context.Context) error {
	if err := k.maps(ctx, true, nil); err != nil {
		return err
	}
	for _, h := range k.holders() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !h.v.bare {
			k.r.Volumes++
		} else {
			k.r.Snapshots++
		}
		if !h.v.deleting { // what is being deleted counts no more
			k.counters(h.v, h.name)
		}
	}
	return nil
}

// identities compares references window by window.
func (k *checker) identities(ctx context.Context, blocks bool) error {
	s := k.s
	dormant := make(map[uint64]bool)
	for _, b := range s.pins.dormant(nil) {
		dormant[BID(b).slot()] = true
	}
	s.queue.mu.Lock()
	for _, b := range s.queue.dormant {
		dormant[b.slot()] = true
	}
	s.queue.mu.Unlock()
	k.refs = make([]uint32, min(uint64(s.nextBID), checkWindow))
	if blocks {
		k.prover, k.list = newProver(s), make([]suspect, 0, 512)
		defer k.prover.close()
	}
	for k.low = 0; k.low < s.nextBID; k.low += checkWindow {
		clear(k.refs)
		clear(k.seen)
		err := k.maps(ctx, false, func(_ uint64, leaf uint32, page []byte) {
			for i := range format.WordsPerPage {
				if w := BID(format.Word(page, i)).slot(); w == 0 {
					continue
				} else if w >= uint64(k.low) && w-uint64(k.low) < uint64(len(k.refs)) {
					k.refs[w-uint64(k.low)]++
				} else if w >= uint64(s.nextBID) {
					k.r.add("page %d maps identity %d, which was never made", leaf, w)
				}
			}
		})
		if err != nil {
			return err
		}
		first := k.low == 0
		err = k.walk(ctx, s.identities, entryShift, "identities", first, func(at uint64, _ uint32, page []byte) {
			var e format.Entry
			for i := range format.EntriesPerPage {
				bid := at + uint64(i)
				if bid < uint64(k.low) || uint64(len(k.refs)) <= bid-uint64(k.low) {
					continue
				}
				want := k.refs[bid-uint64(k.low)]
				k.refs[bid-uint64(k.low)] = 0
				format.ParseEntry(format.EntryAt(page, i), &e)
				switch {
				case e.Addr == 0 && want != 0:
					k.r.add("identity %d is dead but %d map entries name it", bid, want)
				case e.Addr == 0:
				case e.Refs != want:
					k.r.counter("identity %d counts %d references, %d map entries name it", bid, e.Refs, want)
				case want == 0 && !dormant[bid]:
					k.r.counter("identity %d has neither references nor pins", bid)
				}
				if e.Addr == 0 {
					continue
				}
				k.r.Identities++
				if !s.segs.valid(e.Addr, uint32(e.Len)) || !storedOK(&e) {
					k.r.add("identity %d stands at %x with %d bytes of encoding %d, index %d", bid, uint64(e.Addr), e.Len, e.Encoding, e.Index)
					continue
				}
				k.live[e.Addr.Segment()] += e.Share()
				if !blocks {
					continue
				}
				if k.list = append(k.list, suspect{bid: makeBID(bid, e.Generation), e: e}); len(k.list) == cap(k.list) {
					k.proveBlocks()
				}
			}
		})
		if err != nil {
			return err
		}
		for i, n := range k.refs {
			if n != 0 {
				k.r.add("identity %d has no entry but %d map entries name it", uint64(k.low)+uint64(i), n)
			}
		}
	}
	if blocks {
		k.proveBlocks()
	}
	return nil
}

// proveBlocks verifies stored blocks. Nothing changes on the devices meanwhile but the
// checker's own store, which waits.
func (k *checker) proveBlocks() {
	k.prover.prove(k.list, func(l *suspect, found uint32, why error) {
		ce := k.s.corrupt("block", l.e.Addr, l.e.Sum, found, why)
		ce.BID, ce.Fingerprint = l.bid, l.e.Fingerprint
		k.r.damage("%v", ce)
	})
	k.r.Blocks += uint64(len(k.list))
	k.list = k.list[:0]
}

// directory compares pages with what the newest checkpoint says of them.
func (k *checker) directory(ctx context.Context) error {
	s := k.s
	var shared int64
	buf := device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(buf)
	for id := uint32(1); id < uint32(len(k.parents)); id++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.mu.RLock()
		p := *s.pg.page(id)
		e := *s.pg.entry(id)
		s.mu.RUnlock()
		if p.flags&pageAlive != 0 {
			k.r.Pages++
			if n := k.parents[id]; n == 0 {
				k.r.add("page %d has no parent", id)
			} else if n != uint32(p.parents) {
				k.r.add("page %d has %d parents, counts %d", id, n, p.parents)
			}
			if p.parents > 1 {
				shared++
			}
			if e.Addr != 0 && p.flags&(pageDirty|pageRecount) == 0 && e.Parents() != p.parents {
				k.r.add("page %d counts %d parents, its directory entry %d", id, p.parents, e.Parents())
			}
			if e.Addr == 0 && p.flags&pageDirty == 0 {
				k.r.add("page %d is clean but stands nowhere", id)
			}
		}
		if e.Addr != 0 {
			k.pages[e.Addr.Segment()] += format.PageSize
			if err := s.readPage(buf, e); err != nil {
				k.r.damage("page %d: %v", id, err)
			}
		}
	}
	if n := uint64(s.pg.nAlive.Load()); n != k.r.Pages {
		k.r.counter("the store counts %d pages, holds %d", n, k.r.Pages)
	}
	if n := s.pg.shared.Load(); n != shared {
		k.r.counter("the store counts %d shared pages, holds %d", n, shared)
	}
	c := &s.ckpt
	for j := range c.dirAt {
		x := c.dirAt[j]
		if x.Addr == 0 {
			continue
		}
		k.pages[x.Addr.Segment()] += format.PageSize
		if err := s.readPage(buf, format.DirEntry{Addr: x.Addr, Sum: x.Sum}); err != nil {
			k.r.damage("directory page %d: %v", j, err)
		}
	}
	for _, x := range c.rootAt {
		k.pages[x.Addr.Segment()] += roundUp(x.Len)
	}
	return nil
}

func (k *checker) segments() {
	for i := range k.s.segs.all {
		seg := &k.s.segs.all[i]
		if seg.live != k.live[i] {
			k.r.counter("segment %d counts %d live bytes, holds %d", i, seg.live, k.live[i])
		}
		if seg.pages != k.pages[i] {
			k.r.counter("segment %d counts %d bytes of pages, holds %d", i, seg.pages, k.pages[i])
		}
		if k.live[i]+k.pages[i] > 0 && seg.state != segmentOpen && seg.state != segmentSealed {
			k.r.add("segment %d holds %d live bytes but is in state %d", i, k.live[i]+k.pages[i], seg.state)
		}
	}
}
