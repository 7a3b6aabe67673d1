package lsfs

import (
	"context"
	"testing"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// newTiers is a pool with a small flash and a large capacity device.
func newTiers(tb testing.TB, flash, capacity int64) *rig {
	tb.Helper()
	r := &rig{tb: tb, disks: map[string]*devicetest.Disk{}}
	for i, n := range []int64{flash, capacity} {
		name := []string{"flash", "capacity"}[i]
		r.names = append(r.names, name)
		r.disks[name] = devicetest.New(uint64(i)+1, n)
		r.disks[name].SetPath(name)
	}
	r.configure()
	err := Format(context.Background(), FormatConfig{
		Pool: [16]byte{7}, Key: testKey, Devices: r.names, Classes: []Class{Flash, Capacity}, SegmentBytes: format.SegmentMin, OpenDevice: r.open,
	})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// where tells how many of a volume's blocks stand on each class.
func where(tb testing.TB, v *Volume, start, end uint64) (on [classes]int) {
	tb.Helper()
	s := v.s
	rc, err := s.lease(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	defer s.giveBack(rc)
	for ; start < end; start++ {
		if err := v.resolve(context.Background(), rc, start, 1, func(int, BID) bool { return false }); err != nil {
			tb.Fatal(err)
		}
		for i := range rc.blocks {
			on[s.segs.classOf(rc.blocks[i].e.Addr.Segment())]++
		}
		s.letGo(rc)
	}
	return on
}

// forget takes the first n blocks of a volume out of the cache in RAM.
func forget(tb testing.TB, v *Volume, n int) {
	tb.Helper()
	rc, err := v.s.lease(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	defer v.s.giveBack(rc)
	if err := v.resolve(context.Background(), rc, 0, n, func(int, BID) bool { return false }); err != nil {
		tb.Fatal(err)
	}
	for i := range rc.blocks {
		v.s.l1.Remove(uint64(rc.blocks[i].bid))
	}
	v.s.letGo(rc)
}

// until waits for a condition.
func until(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("not in time: %s", what)
		}
	}
}

// TestTiers writes more than the flash holds, part of it over and over: the flash keeps
// room for the log, what is old ends on capacity, what is new stays on flash, and what is
// read from capacity again and again comes back.
func TestTiers(t *testing.T) {
	r := newTiers(t, 16<<20, 96<<20)
	s := r.start()
	const cold, hot = 6000, 300
	mustCreate(t, s, 1, cold+hot)
	c := newClient(t, s)
	seq := Seq(0)
	content := make([]uint64, cold+hot)
	number := uint64(0)
	put := func(at, n int) {
		var data []byte
		for i := range n {
			number++
			content[at+i] = number
			data = append(data, noise(number)...)
		}
		seq++
		c.must(c.write(1, seq, BlockNo(at), data))
	}
	low := int32(1 << 30)
	for at := 0; at < cold; at += 20 {
		put(at, 20)
		put(cold+at%hot, 20)
		low = min(low, s.segs.freeOf[Flash].Load())
		// Writers in memory are faster than any cleaner: let it catch up before the log has
		// to leave the flash.
		until(t, "room for the log", func() bool { return 4 <= s.segs.freeOf[Flash].Load() })
	}
	mustEqualAs(t, s.Volume(1), content, noise)
	mustCheck(t, s)
	if n := s.Stats().ChecksumErrors; n != 0 {
		t.Fatalf("%d checksum errors", n)
	}
	flash := s.segs.countOf[Flash].Load()
	until(t, "room on flash", func() bool {
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
		return flash*flashFree/100 <= s.segs.freeOf[Flash].Load()
	})
	v := s.Volume(1)
	// The beginning is oldest; the hot blocks are younger than anything that has left.
	if on := where(t, v, 0, 3000); on[Capacity] < 2900 {
		t.Fatalf("of the oldest blocks %d are on flash, %d on capacity", on[Flash], on[Capacity])
	}
	if on := where(t, v, cold, cold+hot); on[Flash] < hot*9/10 {
		t.Fatalf("of the hot blocks %d are on flash, %d on capacity", on[Flash], on[Capacity])
	}
	t.Logf("flash: %d of %d segments were free at least; %d bytes demoted", low, flash, s.tiers.demoted.Load())
	if low <= 0 {
		t.Error("the flash was full")
	}
	// The capacity device sees few large writes.
	if u := deviceAt(t, s, "capacity").Usage; s.tiers.demoted.Load()/(u.Writes-4*s.Stats().Checkpoints+1) < 64<<10 {
		t.Errorf("%d writes (and %d superblocks) for %d bytes on capacity in segments of 256 KiB", u.Writes, 4*s.Stats().Checkpoints, s.tiers.demoted.Load())
	}
	mustClose(t, s)
	s = r.start()
	v = s.Volume(1)
	mustEqualAs(t, v, content, noise)
	mustCheck(t, s)
	// Reads that RAM does not answer bring blocks back.
	buf := make([]byte, 50*dedup.BlockSize)
	until(t, "promotion", func() bool {
		if err := v.Read(context.Background(), 0, buf); err != nil {
			t.Fatal(err)
		}
		forget(t, v, 50)
		return where(t, v, 0, 50)[Flash] == 50
	})
	mustEqualAs(t, v, content, noise)
	mustCheck(t, s)
	if n := s.Stats().ChecksumErrors; n != 0 {
		t.Fatalf("%d checksum errors", n)
	}
	// Everything is deleted: both classes get their room back.
	if err := s.DeleteVolume(context.Background(), 1); err != nil {
		t.Fatal(err)
	}
	until(t, "free segments", func() bool {
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
		return s.segs.size()-10 < int64(s.segs.nFree.Load())
	})
	mustCheck(t, s)
	mustClose(t, s)
}

// TestTiersCrash cuts the power while blocks move to capacity, at every write there and
// on flash.
func TestTiersCrash(t *testing.T) {
	met := &coldStores{}
	defer met.mustHave(t, false)
	r := newTiers(t, 8<<20, 12<<20)
	r.cold = met
	s := r.start()
	h := &history{blocks: 700}
	mustCreate(t, s, 1, h.blocks)
	rng := testRand(4)
	c := newClient(t, s)
	h.load(t, c, rng, 1, 150, 100000)
	moments := newRecorder(r, 0, 1, func() struct{} { return struct{}{} })
	s.cleaner.mu.Lock() // the cleaner itself stands still: nothing is short
	moments.start()
	for i := range 6 {
		if victim, _ := s.coldest(); victim != format.NoSegment {
			s.demote(victim)
		}
		if i%2 == 1 {
			if err := s.checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
		c.must(h.randomOp(c, rng, 1, 100000))
	}
	moments.stop()
	s.cleaner.mu.Unlock()
	if on := where(t, s.Volume(1), 0, h.blocks); on[Capacity] == 0 {
		t.Fatalf("nothing moved: %v", on)
	}
	mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
	mustClose(t, s)
	moments.each(t, func(i int, m *moment[struct{}], s *Store) {
		k := s.Volume(1).Meta().Durable.Seq
		if k < 150 {
			t.Fatalf("durable is %d", k)
		}
		mustEqual(t, s.Volume(1), h.at(k))
		mustCheck(t, s)
		c := newClient(t, s)
		c.must(c.write(1, k+1, 7, pattern(77)))
		// Segments are used again after what the crash left of them.
		for range 3 {
			if victim, _ := s.coldest(); victim != format.NoSegment && i%4 == 0 {
				s.cleaner.mu.Lock()
				s.demote(victim)
				s.cleaner.mu.Unlock()
			}
			if err := s.checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
		want := h.at(k)
		want[7] = 77
		mustEqual(t, s.Volume(1), want)
		mustCheck(t, s)
		mustClose(t, s)
	})
}
