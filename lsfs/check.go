package lsfs

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Report is what a check found.
type Report struct {
	Volumes, Pages, Identities, Mapped uint64 // counted
	Blocks                             uint64 // stored blocks whose checksum was verified
	// Problems names everything that is wrong, at most ProblemsMax of them; Count is all.
	Problems []string
	Count    int
}

// ProblemsMax bounds the list of a Report.
const ProblemsMax = 100

// OK says whether nothing is wrong.
func (r *Report) OK() bool { return r.Count == 0 }

func (r *Report) add(text string, args ...any) {
	r.Count++
	if len(r.Problems) < ProblemsMax {
		r.Problems = append(r.Problems, fmt.Sprintf(text, args...))
	}
}

// Check walks all maps and compares: the references of each identity (REFS), the
// live bytes of each segment and that none of it is free (LIVE), each page, its
// checksum on the device and the number of its parents, the counters of volumes. Operations wait meanwhile. The
// error is of the walk itself, such as ctx; what is wrong stands in the report.
func (s *Store) Check(ctx context.Context) (*Report, error) { return s.check(ctx, false) }

// CheckPool checks a pool that no process serves, as Check does, and the
// checksum of every stored block besides. It replays the log in memory and
// writes nothing.
func CheckPool(ctx context.Context, c Config) (*Report, error) {
	if c.OpenDevice == nil {
		c.OpenDevice = func(path string) (device.Device, error) { return device.Open(path, device.Options{ReadOnly: true}) }
	}
	s, err := open(ctx, c)
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
	k := &checker{s: s, r: &Report{}, parents: make([]uint32, s.pg.n), seen: make([]uint64, (s.pg.n+63)/64), live: make([]uint32, s.segs.count()), pages: make([]uint32, s.segs.count())}
	if err := k.trees(ctx); err != nil {
		return nil, err
	}
	if err := k.identities(ctx, blocks); err != nil {
		return nil, err
	}
	if n := uint64(s.stored.Load()); n != k.r.Identities {
		k.r.add("the store counts %d identities, holds %d", n, k.r.Identities)
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
	parents []uint32 // of each page
	seen    []uint64 // bitmap of shared leaves that this walk has been at
	live    []uint32
	pages   []uint32
	refs    []uint32 // of identities in the window
	low     BID
}

// known says whether there is a page of that id. Reads go on beside a check, and bring
// pages into RAM.
func (k *checker) known(id uint64) bool {
	k.s.mu.RLock()
	defer k.s.mu.RUnlock()
	return id < uint64(len(k.parents)) && k.s.pg.known(id)
}

// reach counts a parent of a page and says whether it may be walked. Only a leaf of
// a map may have more than one.
func (k *checker) reach(id uint64, leaf bool, from string) bool {
	if !k.known(id) {
		k.r.add("%s names page %d, which does not exist", from, id)
		return false
	}
	if k.parents[id]++; k.parents[id] > 1 && !leaf {
		k.r.add("page %d has more than one parent (%s)", id, from)
		return false
	}
	return true
}

// again says whether a shared leaf was met before on this walk of all maps.
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

// walk calls f for the leaves of a tree, with a copy of the page: nil for a leaf of a
// map that was met before. count says whether pages are counted as reached.
func (k *checker) walk(ctx context.Context, t tree, shift uint, name string, count bool, f func(first uint64, leaf uint32, page []byte)) error {
	if t.top == 0 {
		return nil
	}
	var visit func(id uint32, level uint8, first uint64) error
	visit = func(id uint32, level uint8, first uint64) error {
		if count && !k.reach(uint64(id), level == 0 && shift == wordShift, name) || !k.known(uint64(id)) {
			return nil
		}
		if level == 0 && shift == wordShift && k.again(id) {
			f(first, id, nil)
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
					k.r.add("%s: %v", name, err)
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
			f(first, id, page[:])
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

// leaf copies a leaf into buf and returns it, nil if it cannot be read.
func (k *checker) leaf(id uint32, buf []byte) []byte {
	for {
		k.s.mu.RLock()
		data := k.s.pg.data(id)
		copy(buf, data)
		k.s.mu.RUnlock()
		if data != nil {
			return buf
		}
		if err := k.s.fault(id, false); err != nil {
			k.r.add("page %d: %v", id, err)
			return nil
		}
	}
}

func (k *checker) trees(ctx context.Context) error {
	for id, v := range k.s.volumes {
		k.r.Volumes++
		mapped := uint64(0)
		annex := uint64(0)
		err := k.walk(ctx, v.mapTree, wordShift, fmt.Sprintf("map of volume %d", id), true, func(first uint64, leaf uint32, page []byte) {
			n, end := &mapped, max(v.size.Load(), v.tailEnd)
			if uint64(AnnexStart) <= first {
				n, end = &annex, annexEnd
			}
			if v.deleting {
				end = v.tailEnd
			}
			if page == nil && first+format.WordsPerPage <= end {
				k.s.mu.RLock()
				*n += uint64(k.s.pg.page(leaf).count) // it was compared with the page when that was met
				k.s.mu.RUnlock()
				return
			}
			var buf [format.PageSize]byte
			if page == nil {
				if page = k.leaf(leaf, buf[:]); page == nil {
					return
				}
			}
			for i := range format.WordsPerPage {
				if format.Word(page, i) != 0 {
					*n++
					if at := first + uint64(i); end <= at {
						k.r.add("volume %d maps block %d behind its end", id, at)
					}
				}
			}
		})
		if err != nil {
			return err
		}
		if mapped != v.mapped {
			k.r.add("volume %d maps %d blocks, counts %d", id, mapped, v.mapped)
		}
		if annex != v.annex {
			k.r.add("volume %d maps %d blocks of its annex, counts %d", id, annex, v.annex)
		}
		k.r.Mapped += mapped + annex
		err = k.walk(ctx, v.versions, wordShift, fmt.Sprintf("versions of volume %d", id), true, func(uint64, uint32, []byte) {})
		if err != nil {
			return err
		}
	}
	return nil
}

// identities compares references window by window.
func (k *checker) identities(ctx context.Context, blocks bool) error {
	s := k.s
	dormant := make(map[uint64]bool)
	for _, b := range s.pins.dormant(nil) {
		dormant[b] = true
	}
	s.queue.mu.Lock()
	for _, b := range s.queue.dormant {
		dormant[uint64(b)] = true
	}
	s.queue.mu.Unlock()
	k.refs = make([]uint32, min(uint64(s.nextBID), checkWindow))
	rc, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer s.giveBack(rc)
	for k.low = 0; k.low < s.nextBID; k.low += checkWindow {
		clear(k.refs)
		clear(k.seen)
		for _, v := range s.volumes {
			err := k.walk(ctx, v.mapTree, wordShift, "map", false, func(_ uint64, _ uint32, page []byte) {
				if page == nil {
					return // a shared leaf counts once
				}
				for i := range format.WordsPerPage {
					if w := format.Word(page, i); w == 0 {
						continue
					} else if w >= uint64(k.low) && w-uint64(k.low) < uint64(len(k.refs)) {
						k.refs[w-uint64(k.low)]++
					} else if w >= uint64(s.nextBID) {
						k.r.add("volume %d maps identity %d, which was never made", v.id, w)
					}
				}
			})
			if err != nil {
				return err
			}
		}
		first := k.low == 0
		err := k.walk(ctx, s.identities, entryShift, "identities", first, func(at uint64, _ uint32, page []byte) {
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
					k.r.add("identity %d counts %d references, %d map entries name it", bid, e.Refs, want)
				case want == 0 && !dormant[bid]:
					k.r.add("identity %d has neither references nor pins", bid)
				}
				if e.Addr == 0 {
					continue
				}
				k.r.Identities++
				if !s.segs.valid(e.Addr, uint32(e.Len)) || !dedup.StoredLenOK(e.Encoding, int(e.Len)) {
					k.r.add("identity %d stands at %x with %d bytes of encoding %d", bid, uint64(e.Addr), e.Len, e.Encoding)
					continue
				}
				k.live[e.Addr.Segment()] += uint32(e.Len)
				if blocks {
					k.block(rc, BID(bid), &e)
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
	return nil
}

// block verifies the stored bytes of an identity.
func (k *checker) block(rc *readContext, bid BID, e *format.Entry) {
	k.s.segs.all[e.Addr.Segment()].readers.Add(1)
	rc.blocks = append(rc.blocks[:0], located{bid: bid, e: *e})
	err := k.s.fetch(rc, nil, 0, func(_ *located, stored []byte) error {
		return dedup.Decode(rc.block[:], e.Encoding, stored)
	})
	if err != nil {
		k.r.add("%v", err)
	}
	k.r.Blocks++
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
			if e.Addr != 0 && p.flags&(pageDirty|pageRecount) == 0 && e.Refs != p.parents {
				k.r.add("page %d counts %d parents, its directory entry %d", id, p.parents, e.Refs)
			}
			if e.Addr == 0 && p.flags&pageDirty == 0 {
				k.r.add("page %d is clean but stands nowhere", id)
			}
		}
		if e.Addr != 0 {
			k.pages[e.Addr.Segment()] += format.PageSize
			if err := s.readPage(buf, e); err != nil {
				k.r.add("page %d: %v", id, err)
			}
		}
	}
	if n := uint64(s.pg.nAlive.Load()); n != k.r.Pages {
		k.r.add("the store counts %d pages, holds %d", n, k.r.Pages)
	}
	if n := s.pg.shared.Load(); n != shared {
		k.r.add("the store counts %d shared pages, holds %d", n, shared)
	}
	c := &s.ckpt
	for j := range c.dirAt {
		x := c.dirAt[j]
		if x.Addr == 0 {
			continue
		}
		k.pages[x.Addr.Segment()] += format.PageSize
		if err := s.readPage(buf, format.DirEntry{Addr: x.Addr, Sum: x.Sum}); err != nil {
			k.r.add("directory page %d: %v", j, err)
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
			k.r.add("segment %d counts %d live bytes, holds %d", i, seg.live, k.live[i])
		}
		if seg.pages != k.pages[i] {
			k.r.add("segment %d counts %d bytes of pages, holds %d", i, seg.pages, k.pages[i])
		}
		if k.live[i]+k.pages[i] > 0 && seg.state != segmentOpen && seg.state != segmentSealed {
			k.r.add("segment %d holds %d live bytes but is in state %d", i, k.live[i]+k.pages[i], seg.state)
		}
	}
}
