package lsfs

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

func mustScrub(t *testing.T, s *Store) ScrubResult {
	t.Helper()
	s.StartScrub(true)
	if err := s.WaitScrub(context.Background()); err != nil {
		t.Fatal(err)
	}
	st := s.Scrub()
	if st.Running || st.Phase != ScrubIdle || st.Last.Finished.IsZero() {
		t.Fatalf("the pass did not end: %+v", st)
	}
	return st.Last
}

// TestScrubUnderLoad scrubs over and over while volumes are written, cloned, unmapped,
// deleted and cleaned. No pass finds anything wrong that is not: a reference count that
// moves while it is proved is no wrong count.
func TestScrubUnderLoad(t *testing.T) {
	r := newRig(t, 1, 16<<20, 12<<20)
	r.cfg.ScrubInterval = -1
	r.cfg.Event = func(e Event) {
		if e.Code != "recovered" {
			t.Errorf("event %s: %s", e.Code, e.Text)
		}
	}
	s := r.start()
	w := &world{rng: testRand(1), vols: map[VolumeID]*plane{}, many: 120}
	w.create(t, s)
	w.create(t, s)
	c := newClient(t, s)
	stop := make(chan struct{})
	var group sync.WaitGroup
	passes := 0
	var last ScrubResult
	group.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			s.StartScrub(true)
			if err := s.WaitScrub(context.Background()); err != nil {
				t.Error(err)
				return
			}
			last = s.Scrub().Last
			passes++
			if last.Damaged+last.Counters+last.Lost != 0 {
				t.Errorf("pass %d: %+v", passes, last)
			}
		}
	})
	for range 500 {
		id := w.pick()
		op, effect := w.op(c, id)
		if err := c.do(op); err != nil {
			if errors.Is(err, ErrNoSpace) {
				continue
			}
			t.Error(err)
			break
		}
		effect()
		w.vols[id].seq++
		switch w.rng.IntN(60) {
		case 3, 4, 5, 6:
			id := w.pick()
			w.last++
			w.vols[id].seq++
			if err := c.do(&Op{Kind: OpSnapshot, Volume: id, ID: OpID{1, w.vols[id].seq}, Snapshot: w.last}); err != nil {
				t.Error(err)
			}
		case 7, 8:
			if list := s.Snapshots(0); len(list) > 0 {
				if err := s.DeleteSnapshot(context.Background(), list[w.rng.IntN(len(list))].ID()); err != nil {
					t.Error(err)
				}
			}
		case 0:
			if err := s.checkpoint(); err != nil {
				t.Error(err)
			}
		case 1:
			evict(s)
		case 2:
			if len(w.vols) > 2 {
				id := w.pick()
				if err := s.DeleteVolume(context.Background(), id); err != nil {
					t.Error(err)
				}
				delete(w.vols, id)
			}
			w.create(t, s)
		}
		if t.Failed() {
			break
		}
	}
	close(stop)
	group.Wait()
	if passes == 0 || last.Blocks == 0 {
		t.Errorf("%d passes, the last %+v", passes, last)
	}
	t.Logf("%d passes", passes)
	w.mustMatch(t, s)
	mustClose(t, s)
}

// spoil changes the reference count of an identity behind everybody's back.
func spoil(s *Store, bid BID, by int) {
	s.enter()
	defer s.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	_, leaf, _ := s.entryOf(bid)
	at := format.EntryAt(s.pg.touch(leaf), int(bid%format.EntriesPerPage))
	format.PutEntryRefs(at, uint32(int(format.EntryRefs(at))+by))
}

// TestScrubCorrectsCounters: too many references are a leak, too few would free data
// that is in use, so nothing is given back until all were found right.
func TestScrubCorrectsCounters(t *testing.T) {
	r := newRig(t, 1, 16<<20)
	r.cfg.ScrubInterval = -1
	var mu sync.Mutex
	events := map[string]int{}
	r.cfg.Event = func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		events[e.Code]++
	}
	s := r.start()
	mustCreate(t, s, 1, 1000)
	c := newClient(t, s)
	var data []byte
	for i := range 40 {
		data = append(data, pattern(uint64(i+1))...)
	}
	c.must(c.write(1, 1, 0, data))
	c.must(c.write(1, 2, 500, data[:20*4096]))
	if last := mustScrub(t, s); last.Counters != 0 || last.Blocks != 40 {
		t.Fatalf("%+v", last)
	}
	spoil(s, 3, +5)
	s.enter()
	s.mu.Lock()
	s.segs.addLive(format.MakeAddr(0, 1), 777)
	s.mu.Unlock()
	s.leave()
	if last := mustScrub(t, s); last.Counters != 2 || events["refs-low"] != 0 || events["counter-corrected"] != 2 {
		t.Fatalf("%+v, %v", last, events)
	}
	mustCheck(t, s)
	spoil(s, 5, -1)
	if last := mustScrub(t, s); last.Counters != 1 || events["refs-low"] != 1 {
		t.Fatalf("%+v, %v", last, events)
	}
	if s.Scrub().Reclaim {
		t.Fatal("space is given back after a count was too low")
	}
	mustCheck(t, s)
	free := s.segs.nFree.Load()
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, 3}, Start: 0, Count: 1000})
	for range 4 {
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	if s.segs.nFree.Load() > free {
		t.Fatal("a segment was freed")
	}
	if last := mustScrub(t, s); last.Counters != 0 || !s.Scrub().Reclaim || events["reclaim-resumed"] != 1 {
		t.Fatalf("%+v, %v", last, events)
	}
	for range 4 {
		s.ckpt.changed.Store(true)
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	mustCheck(t, s)
	// Offline, the same.
	c.must(c.write(1, 4, 0, data))
	s.mu.RLock()
	leaf, _, _, _ := s.pg.lookup(s.Volume(1).mapTree, wordShift, 0)
	bid := BID(format.Word(leaf, 0))
	s.mu.RUnlock()
	spoil(s, bid, +2)
	mustClose(t, s)
	ctx := context.Background()
	rep, err := CheckPool(ctx, r.cfg)
	if err != nil || rep.Count != 1 || rep.Problems[0].Kind != FoundCounter {
		t.Fatal(rep, err)
	}
	if n, err := RepairCounters(ctx, r.cfg); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if rep, err = CheckPool(ctx, r.cfg); err != nil || !rep.OK() {
		t.Fatal(rep, err)
	}
}

// TestScrubWithoutDonor: what nobody can repair is counted, named by volume and blocks,
// refused to readers, and healed by the pass that finds a donor, or by being overwritten.
func TestScrubWithoutDonor(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 16<<20)
	r.cfg.ScrubInterval = -1
	var mu sync.Mutex
	var lost []string
	r.cfg.Event = func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Code == "block-lost" {
			lost = append(lost, e.Text)
		}
	}
	s := r.start()
	v := mustCreate(t, s, 7, 1000)
	c := newClient(t, s)
	c.must(c.write(7, 1, 10, bytes.Repeat(pattern(1), 3)))
	c.must(c.write(7, 2, 20, pattern(2)))
	flip := func(no uint64) dedup.Fingerprint {
		s.mu.RLock()
		defer s.mu.RUnlock()
		leaf, _, _, _ := s.pg.lookup(v.mapTree, wordShift, no)
		e, _, _ := s.entryOf(BID(format.Word(leaf, int(no))))
		_, off := s.segs.locate(format.EntryAddr(e))
		r.disks["disk0"].FlipBit(off, 99)
		return dedup.Fingerprint(e[:32])
	}
	fp := flip(10)
	flip(20)
	if last := mustScrub(t, s); last.Damaged != 2 || last.Lost != 2 || last.Repaired != 0 {
		t.Fatalf("%+v", last)
	}
	if st := s.Scrub(); len(st.Lost) != 2 || len(lost) != 2 || !strings.Contains(strings.Join(lost, " "), "volume 7 blocks 10 to 12") {
		t.Fatalf("%v %q", st.Lost, lost)
	}
	buf := make([]byte, 4096)
	var ce *CorruptError
	if err := v.Read(ctx, 11*4096, buf); !errors.As(err, &ce) {
		t.Fatal(err)
	}
	c.must(c.write(7, 3, 20, pattern(3)))
	var asked []Place
	wrong := true
	s.SetDonor(func(_ context.Context, want dedup.Fingerprint, places []Place) (dedup.Block, error) {
		if want != fp {
			t.Errorf("asked for %x", want)
		}
		asked = places
		if len(places) == 0 {
			return dedup.Block{}, ErrNotFound
		}
		if wrong { // a donor that lies is not believed
			b, _ := c.reduce(pattern(9), false)
			b.Fingerprint = want
			return b, nil
		}
		b, _ := c.reduce(pattern(1), false)
		return b, nil
	})
	if last := mustScrub(t, s); last.Damaged != 1 || last.Lost != 1 {
		t.Fatalf("%+v", last)
	}
	wrong = false
	if last := mustScrub(t, s); last.Damaged != 1 || last.Repaired != 1 || len(asked) != 1 || asked[0] != (Place{7, 10, 3}) {
		t.Fatalf("%+v %v", last, asked)
	}
	if last := mustScrub(t, s); last.Damaged != 0 || len(s.Scrub().Lost) != 0 {
		t.Fatalf("%+v", last)
	}
	if err := v.Read(ctx, 11*4096, buf); err != nil || !bytes.Equal(buf, pattern(1)) {
		t.Fatal(err)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestScrubGoesOn stops a pass in the middle, restarts the store, and sees it end where
// it was; the schedule begins the next one.
func TestScrubGoesOn(t *testing.T) {
	r := newRig(t, 1, 16<<20)
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var mu sync.Mutex
	r.cfg.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	s := r.start()
	mustCreate(t, s, 1, 4000)
	c := newClient(t, s)
	for i := range Seq(40) {
		var data []byte
		for k := range uint64(16) {
			data = append(data, noise(uint64(i)*16+k)...)
		}
		c.must(c.write(1, i+1, BlockNo(i)*16, data))
	}
	release := r.disks["disk0"].Hold(devicetest.Read)
	s.StartScrub(true)
	until(t, "the pass runs", func() bool { return s.Scrub().Running })
	s.StopScrub()
	release()
	if err := s.WaitScrub(context.Background()); err != nil {
		t.Fatal(err)
	}
	st := s.Scrub()
	if !st.Stopped || st.Running || st.Phase == ScrubIdle || !st.NextPass.IsZero() {
		t.Fatalf("stopped: %+v", st)
	}
	mustClose(t, s)
	r.cfg.ScrubFrom = st.ScrubState
	s = r.start()
	if st := s.Scrub(); !st.Stopped || st.Phase == ScrubIdle || st.Current.Started != now {
		t.Fatalf("after the restart: %+v", st)
	}
	mu.Lock()
	now = now.Add(time.Hour)
	mu.Unlock()
	if last := mustScrub(t, s); last.Finished.Sub(last.Started) != time.Hour || last.Blocks != 640 {
		t.Fatalf("%+v", last)
	}
	if st := s.Scrub(); !st.NextPass.Equal(now.Add(-time.Hour).Add(ScrubInterval)) || st.Stopped {
		t.Fatalf("schedule: %+v", st)
	}
	mustClose(t, s)
}

// TestMetadataOutlivesRot damages, one at a time, each page that a start reads: root,
// directory, pages, and the headers of their segments. The pool opens, holds what
// it held, and is written anew.
func TestMetadataOutlivesRot(t *testing.T) {
	l := &lane{seed: 1, rng: rand.New(rand.NewPCG(3, 3)), look: newReader(), model: &site{vols: map[VolumeID]*siteVolume{}}}
	l.images = []*devicetest.Image{devicetest.NewImage("a", format.SuperblockArea+32*format.SegmentMin)}
	l.cfg = explorerConfig(l.images)
	if err := Format(context.Background(), FormatConfig{Pool: [16]byte{9}, Key: testKey, Devices: l.cfg.Devices, SegmentBytes: format.SegmentMin, OpenDevice: l.cfg.OpenDevice}); err != nil {
		t.Fatal(err)
	}
	d := &driver{rng: l.rng, images: l.images}
	if err := d.start(l.cfg, l.model, l.panicked); err != nil {
		t.Fatal(err)
	}
	for range 120 {
		if err := d.step(); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.checkpoint(); err != nil {
		t.Fatal(err)
	}
	s := d.s
	type target struct {
		off  int64
		what string
	}
	var targets []target
	at := func(a format.Addr, what string) {
		_, off := s.segs.locate(a)
		targets = append(targets, target{off, what})
	}
	for id := uint32(1); id < s.pg.n; id++ {
		if e := s.pg.entry(id); e.Addr != 0 {
			at(e.Addr, "page")
		}
	}
	headers := map[format.Addr]bool{}
	for _, x := range s.ckpt.dirAt {
		at(x.Addr, "directory")
	}
	for _, x := range s.ckpt.rootAt {
		for off := uint32(0); off < x.Len; off += format.PageSize {
			at(x.Addr+format.Addr(off), "root")
		}
		headers[x.Addr-format.PageSize] = true
	}
	for a := range headers {
		at(a, "header")
	}
	model := d.model()
	d.abandon()
	kinds := map[string]int{}
	for _, x := range targets {
		for _, m := range l.images {
			m.Mark()
		}
		l.images[0].FlipBit(x.off, l.rng.Int64N(64*8)) // what no checksum covers is of no use
		s, err := open(context.Background(), l.cfg)
		if err != nil {
			t.Fatalf("%s at %d: %v", x.what, x.off, err)
		}
		if _, err := l.look.find(s, []*site{model}); err != nil {
			t.Fatalf("%s at %d: %v", x.what, x.off, err)
		}
		// The header of a checkpoint's pages is for the cleaner: a start does not read it.
		if s.Stats().PagesRebuilt == 0 && x.what != "page" && x.what != "header" {
			t.Errorf("%s at %d was not made again", x.what, x.off)
		}
		if s.Stats().PagesRebuilt > 0 {
			kinds[x.what]++
		}
		s.free()
		for _, m := range l.images {
			m.Rollback()
		}
	}
	t.Logf("%d places, made again: %v", len(targets), kinds)
	for _, k := range []string{"page", "directory", "root"} {
		if kinds[k] == 0 {
			t.Errorf("no %s was made again", k)
		}
	}
}

// TestDump prints all there is of a small pool.
func TestDump(t *testing.T) {
	r := newRig(t, 1, 16<<20)
	s := r.start()
	mustCreate(t, s, 1, 1000)
	c := newClient(t, s)
	c.must(c.write(1, 1, 10, bytes.Repeat(pattern(1), 3)))
	c.must(&Op{Kind: OpClone, Volume: 1, ID: OpID{1, 2}, Start: 100, Count: 50, Source: 1})
	mustClose(t, s)
	var out bytes.Buffer
	if err := DumpPool(context.Background(), r.cfg, DumpOptions{Segments: true, Segment: 0, Volume: 1, Count: 200}, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"superblock at 983040 ", "root of checkpoint 1", "volume 1: 1000 blocks, 6 mapped", "clone: volume 1 blocks 100+50 from volume 1 block 0", "  112: identity 1 at 0+", "6 references", "194 holes", "segment 0 on disk0"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}
