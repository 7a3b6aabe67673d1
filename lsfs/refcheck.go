package lsfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// refPass compares the reference counts of a window of identities with the maps while
// operations go on (REFS), and the live bytes of segments with the identities (LIVE).
//
// It counts the words of each leaf once, whenever it comes there. What changes meanwhile
// says so: an identity whose count moves is touched, and not compared in this pass. A
// leaf that a clone makes reachable from where the walk has been already could be
// missed; so walks are repeated, over what was not seen, until one went by without.
// The live bytes of a segment are summed in the order of identities, and whatever
// changes behind the place of the sum corrects it. Guarded by Store.mu.
type refPass struct {
	low     BID
	counts  []uint32
	touched []uint64 // bitmap of the window
	seen    []uint64 // bitmap of leaves that were counted
	shared  bool     // a leaf got another parent since the walk began

	summed BID      // live holds the identities below
	live   []uint32 // by segment
}

// touch says that the count of an identity changes. The receiver may be nil.
func (r *refPass) touch(b BID) {
	if b = BID(b.slot()); r != nil && r.low <= b && uint64(b-r.low) < uint64(len(r.counts)) {
		r.touched[(b-r.low)/64] |= 1 << ((b - r.low) % 64)
	}
}

// moved says that stored bytes of an identity came to a segment, or went.
func (r *refPass) moved(b BID, a format.Addr, n int32) {
	if r != nil && BID(b.slot()) < r.summed && int(a.Segment()) < len(r.live) {
		r.live[a.Segment()] += uint32(n)
	}
}

// share says that a leaf becomes reachable from another place.
func (r *refPass) share() {
	if r != nil {
		r.shared = true
	}
}

// has says whether a leaf was counted, and see that it is.
func (r *refPass) has(leaf uint32) bool {
	return leaf/64 < uint32(len(r.seen)) && r.seen[leaf/64]&(1<<(leaf%64)) != 0
}

func (r *refPass) see(leaf uint32) {
	for uint32(len(r.seen)) <= leaf/64 {
		r.seen = append(r.seen, 0)
	}
	r.seen[leaf/64] |= 1 << (leaf % 64)
}

// walksMax bounds the walks of a window. With clones coming all the time a window is
// left for the next pass.
const walksMax = 6

// errBusy: clones came faster than the maps could be walked.
var errBusy = errors.New("maps change too fast")

// scrubReferences proves REFS and LIVE, and corrects what is wrong: too much is a leak,
// too little would have data freed that is in use. After that nothing is given back
// until a pass finds everything right.
func (s *Store) scrubReferences(ctx context.Context) error {
	k := &s.scrub
	low := uint64(0)
	for first := true; ; first = false {
		s.mu.RLock()
		end := uint64(s.nextBID)
		s.mu.RUnlock()
		if end <= k.state.Next {
			if low == 0 && !first {
				k.resume(s)
			}
			return nil
		}
		wrong, err := s.refWindow(ctx, BID(k.state.Next), min(refWindowMax, end-k.state.Next), first)
		if err == nil && len(wrong) > 0 {
			// Never act on one look: what is wrong must be wrong again.
			var again []wrongCount
			if again, err = s.refWindow(ctx, BID(k.state.Next), min(refWindowMax, end-k.state.Next), first); err == nil {
				wrong = inBoth(wrong, again)
				var n uint64
				n, err = s.correct(wrong)
				low += n
			}
		}
		var damage *CorruptError
		if errors.Is(err, errBusy) || errors.As(err, &damage) && s.failure() == nil {
			// With a map that cannot be read no count can be trusted: nothing is corrected.
			s.logger.Warn("reference counts are left for the next scrub", "bid", k.state.Next, "err", err)
			low++ // not everything was found right
		} else if err != nil {
			return err
		}
		k.at(k.state.Next+refWindowMax, end, donePages, doneReferences)
	}
}

// refWindowMax is the number of identities that are counted at once: 64 MiB of counters.
const refWindowMax = 16 << 20

// resume lets the store give space back again.
func (k *scrubber) resume(s *Store) {
	if k.halted.Swap(false) {
		s.cfg.Event(Event{Code: "reclaim-resumed", Text: "all reference counts are right: space is given back again"})
	}
}

// wrongCount is a counter that is not what the maps say: of an identity, or, where bid
// is 0, of a segment.
type wrongCount struct {
	bid        BID
	segment    uint32
	have, want uint32
}

// inBoth is what two looks have in common. Live bytes may have gone on between them,
// what they are off by has not.
func inBoth(a, b []wrongCount) (both []wrongCount) {
	key := func(w wrongCount) wrongCount {
		if w.bid == 0 {
			w.have, w.want = 0, w.want-w.have
		}
		return w
	}
	seen := make(map[wrongCount]bool, len(b))
	for _, w := range b {
		seen[key(w)] = true
	}
	for _, w := range a {
		if seen[key(w)] {
			both = append(both, w)
		}
	}
	return both
}

// refWindow counts one window and says what is wrong. live says that live bytes are
// summed too, over all identities.
func (s *Store) refWindow(ctx context.Context, low BID, n uint64, live bool) (wrong []wrongCount, err error) {
	r := &refPass{low: low, counts: make([]uint32, n), touched: make([]uint64, (n+63)/64)}
	if live {
		r.live = make([]uint32, s.segs.count())
	}
	s.mu.Lock()
	s.pg.refs = r
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.pg.refs = nil
		s.mu.Unlock()
	}()
	for walk := 0; ; walk++ {
		if walk == walksMax {
			return nil, errBusy
		}
		s.mu.Lock()
		r.shared = false
		s.mu.Unlock()
		// One walk counts; r is changed under the read lock, but by this goroutine alone.
		err := s.eachMapLeaf(ctx, r.has, func(_ VolumeID, _ uint64, id uint32, leaf []byte) {
			r.see(id)
			for i := range format.WordsPerPage {
				if w := BID(format.Word(leaf, i)).slot(); w >= uint64(low) && w-uint64(low) < n {
					r.counts[w-uint64(low)]++
				}
			}
		})
		if err != nil {
			return nil, err
		}
		s.mu.RLock()
		quiet := !r.shared
		s.mu.RUnlock()
		if quiet {
			break
		}
	}
	return s.compareWindow(ctx, r)
}

// compareWindow compares identities with the counts of a window.
func (s *Store) compareWindow(ctx context.Context, r *refPass) (wrong []wrongCount, err error) {
	end := uint64(r.low) + uint64(len(r.counts))
	i := uint64(r.low) &^ (format.EntriesPerPage - 1)
	if r.live != nil {
		i = 0
	}
	var e format.Entry
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s.mu.RLock()
		data, _, missing, span := s.pg.lookup(s.identities, entryShift, i)
		for n := 0; data != nil && n < format.EntriesPerPage; n++ {
			bid := BID(i) + BID(n)
			format.ParseEntry(format.EntryAt(data, n), &e)
			if r.live != nil && e.Addr != 0 && s.segs.valid(e.Addr, uint32(e.Len)) && int(e.Addr.Segment()) < len(r.live) {
				r.live[e.Addr.Segment()] += e.Share()
			}
			at := uint64(bid) - uint64(r.low)
			if bid == 0 || bid < r.low || uint64(len(r.counts)) <= at || r.touched[at/64]&(1<<(at%64)) != 0 {
				continue
			}
			want := r.counts[at]
			switch {
			case e.Addr == 0 && want != 0, e.Addr != 0 && e.Refs != want:
				wrong = append(wrong, wrongCount{bid: makeBID(uint64(bid), e.Generation), have: e.Refs, want: want})
			}
		}
		over := missing == 0 && (uint64(s.nextBID) <= i || r.live == nil && end <= i)
		if missing == 0 {
			i = nextSpan(i, max(span, entryShift))
			r.summed = BID(i)
		}
		if over = over || i == ^uint64(0); over && r.live != nil {
			for n := range s.segs.all {
				if have := s.segs.all[n].live; n < len(r.live) && have != r.live[n] {
					wrong = append(wrong, wrongCount{segment: uint32(n), have: have, want: r.live[n]})
				}
			}
			r.live = nil
		}
		s.mu.RUnlock()
		switch {
		case missing != 0:
			if err := s.fault(missing, false); err != nil {
				return nil, err
			}
		case over:
			return wrong, nil
		}
		if len(wrong) >= wrongMax {
			return wrong, nil
		}
	}
}

// wrongMax bounds what one look reports; the next pass finds the rest.
const wrongMax = 100_000

// correctedTold bounds the events of one correction; the log has all.
const correctedTold = 16

// correct makes counters what the maps say. It returns how many were too low.
func (s *Store) correct(wrong []wrongCount) (low uint64, err error) {
	k := &s.scrub
	for _, w := range wrong {
		if w.have < w.want && !k.halted.Swap(true) {
			s.cfg.Event(Event{Code: "refs-low", Text: "a reference count is too low: no space is given back until a scrub has found all counts right", Err: s.corrupt("identity", 0, w.want, w.have, nil)})
		}
	}
	s.enter()
	defer s.leave()
	s.nextRound()
	told := 0
	for _, w := range wrong {
		done, err := s.correctOne(w)
		if err != nil {
			return low, err
		}
		if w.have < w.want {
			low++
		}
		if !done {
			continue
		}
		k.note(func(r *ScrubResult) { r.Counters++ })
		what := fmt.Sprintf("identity %d counted %d references, the maps hold %d", w.bid, w.have, w.want)
		if w.bid == 0 {
			what = fmt.Sprintf("segment %d counted %d live bytes, holds %d", w.segment, w.have, w.want)
		}
		s.logger.Warn("counter corrected", "what", what)
		if told++; told <= correctedTold {
			s.cfg.Event(Event{Code: "counter-corrected", Text: what})
		}
	}
	s.ckpt.changed.Store(true)
	return low, nil
}

// correctOne changes one counter if it still is what was found. The caller has the role.
func (s *Store) correctOne(w wrongCount) (bool, error) {
	if w.bid == 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		// The difference is what is wrong; operations may have gone on since.
		seg := &s.segs.arena[w.segment]
		delta := int64(w.want) - int64(w.have)
		if int64(seg.live)+delta < 0 {
			return false, nil
		}
		seg.live = uint32(int64(seg.live) + delta)
		s.segs.live.Add(delta)
		s.segs.data.Add(delta)
		return true, nil
	}
	for {
		s.mu.Lock()
		at, leaf, missing := s.entryOf(w.bid)
		if missing == 0 {
			defer s.mu.Unlock()
			if at == nil && w.have == 0 && w.want > 0 && len(s.scrub.unfixed) < scrubLostMax {
				// The maps name what is dead: nothing is left of it here but the places.
				s.scrub.unfixed = append(s.scrub.unfixed, suspect{bid: w.bid, nowhere: true})
				s.scrub.note(func(r *ScrubResult) { r.Damaged++ })
				return false, nil
			}
			if at == nil || format.EntryRefs(at) != w.have {
				return false, nil
			}
			if w.want == 0 {
				at = format.EntryAt(s.pg.touch(leaf), int(w.bid%format.EntriesPerPage))
				format.PutEntryRefs(at, 0)
				if !s.pins.hold(w.bid) {
					s.kill(w.bid, at, leaf)
				}
				return w.have != 0, nil
			}
			at = format.EntryAt(s.pg.touch(leaf), int(w.bid%format.EntriesPerPage))
			format.PutEntryRefs(at, w.want)
			return true, nil
		}
		s.mu.Unlock()
		if err := s.fault(missing, true); err != nil {
			return false, err
		}
	}
}

// eachMapLeaf calls f for the leaves of all maps, of volumes and snapshots and of what
// they are about to give back, under the read lock, with their content as it is at that
// moment. skip, which may be nil, leaves leaves out before they are read. What a page
// leads to that several lead to is walked once. Pages that are read for it do not come
// into RAM. It goes on behind what cannot be read, and returns the first such error in
// the end.
func (s *Store) eachMapLeaf(ctx context.Context, skip func(leaf uint32) bool, f func(v VolumeID, first uint64, leaf uint32, data []byte)) error {
	w := &leafWalk{s: s, skip: skip, f: f, pace: s.pace, buf: device.AlignedBuffer(format.PageSize), done: make(map[uint32]bool)}
	defer device.FreeAligned(w.buf)
	s.mu.RLock()
	holders := slices.Collect(maps.Values(s.volumes))
	for _, n := range s.snapshots {
		holders = append(holders, &n.content)
	}
	s.mu.RUnlock()
	slices.SortFunc(holders, func(a, b *Volume) int { return cmp.Compare(a.id, b.id) })
	for _, v := range holders {
		for k := -1; ; k++ {
			s.mu.RLock()
			over := len(v.old) <= k
			s.mu.RUnlock()
			if over {
				break
			}
			for i := uint64(0); i != ^uint64(0); {
				var err error
				if i, err = w.step(ctx, v, k, i); err != nil {
					return err
				}
			}
			w.inside = w.inside[:0]
		}
	}
	return w.unreadable
}

type leafWalk struct {
	s          *Store
	skip       func(uint32) bool
	f          func(VolumeID, uint64, uint32, []byte)
	pace       func(ctx context.Context, n int, took time.Duration) error // called after n bytes were read
	buf        []byte                                                     // aligned
	unreadable error

	// Shared pages above the leaves: those that were walked from their first place to
	// their last, and those that the walk is inside of. A shared page does not change.
	done   map[uint32]bool
	inside []sharedSpan
}

// sharedSpan is the range of a shared page, as the tree counts.
type sharedSpan struct {
	page       uint32
	first, end uint64
}

// above looks at the shared pages on the way to index i, whose path is resident. It
// returns the end of one that was walked before, or 0.
func (w *leafWalk) above(t tree, i uint64) uint64 {
	pg := w.s.pg
	for n := len(w.inside); n > 0 && w.inside[n-1].end <= i; n = len(w.inside) {
		w.done[w.inside[n-1].page] = true
		w.inside = w.inside[:n-1]
	}
	span := wordShift + 9*uint(t.height-1)
	if t.top == 0 || i>>span != 0 {
		return 0
	}
	var path [heightMax]uint32
	n := 0
	id := t.top
	for level := t.height - 1; level > 0 && id != 0; level-- {
		path[n] = id
		n++
		if pg.page(id).parents > 1 {
			if w.done[id] {
				return nextSpan(i, span)
			}
			if first := i >> span << span; first == i && !slices.ContainsFunc(w.inside, func(x sharedSpan) bool { return x.page == id }) {
				w.inside = append(w.inside, sharedSpan{id, first, nextSpan(i, span)})
			}
		}
		data := pg.data(id)
		if data == nil {
			return 0 // and nothing is said of what is below
		}
		span -= 9
		id = uint32(format.Word(data, int(i>>span)&(format.WordsPerPage-1)))
	}
	// One that is not on the way any more was not walked to its end.
	w.inside = slices.DeleteFunc(w.inside, func(x sharedSpan) bool { return !slices.Contains(path[:n], x.page) })
	return 0
}

// treeOf is the map of a holder, or its k-th tree to be given back, if that is a map.
func treeOf(v *Volume, k int) tree {
	switch {
	case k < 0:
		return v.mapTree
	case k < len(v.old) && !v.old[k].versions:
		return v.old[k].tree
	}
	return tree{}
}

// step calls f for the leaf of index i and returns the index behind it.
func (w *leafWalk) step(ctx context.Context, v *Volume, k int, i uint64) (next uint64, err error) {
	s := w.s
	lost := func(err error) error {
		if w.unreadable == nil {
			w.unreadable = err
		}
		return s.failure()
	}
	var have format.DirEntry // what buf holds
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		s.mu.RLock()
		t := treeOf(v, k)
		if end := w.above(t, i); end != 0 {
			s.mu.RUnlock()
			return end, nil
		}
		leaf, missing, span, _ := s.pg.leafOf(t, i)
		if missing != 0 {
			s.mu.RUnlock()
			if err := s.fault(missing, false); err != nil {
				return nextSpan(i, wordShift), lost(err)
			}
			continue
		}
		next = nextSpan(i, max(span, wordShift))
		if leaf == 0 || w.skip != nil && w.skip(leaf) {
			s.mu.RUnlock()
			return next, nil
		}
		data, e := s.pg.data(leaf), *s.pg.entry(leaf)
		if data == nil && e.Addr != 0 && have == e {
			data = w.buf
		}
		if data != nil {
			w.f(v.id, i&^(format.WordsPerPage-1), leaf, data)
			s.mu.RUnlock()
			return next, nil
		}
		if !s.segs.valid(e.Addr, format.PageSize) {
			s.mu.RUnlock()
			return next, lost(s.report(s.corrupt("page", e.Addr, e.Sum, 0, format.ErrInvalid)))
		}
		seg := &s.segs.arena[e.Addr.Segment()]
		seg.readers.Add(1)
		s.mu.RUnlock()
		start := time.Now()
		err := s.readPage(w.buf, e)
		if err != nil {
			err = s.repairPage(w.buf, e.Addr, e.Sum, err)
		}
		seg.readers.Add(-1)
		if err != nil {
			return next, lost(err)
		}
		have = e
		if err := w.pace(ctx, format.PageSize, time.Since(start)); err != nil {
			return 0, err
		}
	}
}
