package lsfs

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// relaxed is a write that does not wait for a flush.
func (c *client) relaxed(seq Seq, start BlockNo, n uint64) *Op {
	op := c.write(1, seq, start, noise(n))
	op.Relaxed = true
	return op
}

// neverFlush is a configuration in which no flush comes by itself in the time of a test.
func neverFlush(c *Config) { c.FlushInterval = 10 * time.Second }

// TestRelaxedCrash cuts the power at every write and flush of a workload of relaxed and
// durable operations on several devices, and again right after the next start: what is
// left is always a prefix, which holds the last durable operation (DURABLE), and scrub
// takes nothing of what was cut off for damage.
func TestRelaxedCrash(t *testing.T) {
	eachSeed(t, 6, func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 11))
		r := newRig(t, seed, 6<<20, 4<<20)
		r.opts = func(c *Config) {
			neverFlush(c)
			c.ScrubInterval = -1
			c.Event = func(e Event) {
				// What a stream was writing has no number, and may look damaged.
				if e.Code == "corrupt" && !strings.Contains(e.Text, "commit 0") {
					t.Error(e.Text)
				}
			}
			if seed%3 == 0 {
				c.FlushBytes = 64 << 10
			}
		}
		r.configure()
		s := r.start()
		const blocks = 300
		mustCreate(t, s, 1, blocks)
		h := &history{blocks: blocks}
		c := newClient(t, s)
		var firm, issued atomic.Uint64
		type span struct{ firm, issued Seq }
		moments := newRecorder(r, seed, 2, func() span { return span{Seq(firm.Load()), Seq(issued.Load())} })
		moments.start()
		for i := range 60 {
			op := h.randomOp(c, rng, 1, 2000)
			if op.Kind == OpWrite {
				op.Relaxed = rng.IntN(12) > 0
			}
			issued.Store(uint64(op.ID.Seq))
			c.must(op)
			if !op.Relaxed {
				firm.Store(uint64(op.ID.Seq))
			}
			if i%20 == 19 {
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
				firm.Store(issued.Load())
			}
		}
		moments.stop()
		mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
		mustCheck(t, s)
		mustClose(t, s)
		lost := 0
		moments.each(t, func(i int, m *moment[span], s *Store) {
			k := s.Volume(1).Meta().Durable.Seq
			if k < m.before.firm || m.after.issued < k {
				t.Fatalf("it stands at %d", k)
			}
			lost += int(m.after.issued - k)
			want := h.at(k)
			mustEqual(t, s.Volume(1), want)
			mustCheck(t, s)
			// Another life that is cut short as well: the left-overs of the first must not come back.
			c := newClient(t, s)
			for j := range Seq(6) {
				op := c.write(1, k+1+j, BlockNo(10+j), pattern(uint64(3000+j)))
				op.Relaxed = j != 2
				c.must(op)
			}
			next := m.rig.crash(devicetest.CrashOptions{Seed: seed + uint64(i), Keep: 0.5, Tear: true})
			next.tb = t
			mustClose(t, s)
			s = next.start()
			k2 := s.Volume(1).Meta().Durable.Seq
			if k2 < k+3 || k+6 < k2 {
				t.Fatalf("after a second one it stands at %d, was at %d", k2, k)
			}
			for j := range k2 - k {
				want[10+j] = uint64(3000 + j)
			}
			mustEqual(t, s.Volume(1), want)
			mustCheck(t, s)
			s.StartScrub(true)
			if err := s.WaitScrub(context.Background()); err != nil {
				t.Fatal(err)
			}
			if last := s.Scrub().Last; last.Lost != 0 || last.Counters != 0 {
				t.Fatalf("scrub found %+v", last)
			}
			mustClose(t, s)
		})
		if lost == 0 {
			t.Fatal("no crash took anything back: nothing was relaxed")
		}
		t.Logf("%d operations taken back", lost)
	})
}

// flushedClient also hears when the disk is told to flush.
type flushedClient struct {
	*client
	flushed chan struct{}
}

// TestRelaxedIsFlushed shows what makes a relaxed operation durable, and that nothing else does.
func TestRelaxedIsFlushed(t *testing.T) {
	for name, x := range map[string]struct {
		opts  func(*Config)
		after func(t *testing.T, s *Store, c *flushedClient)
		kept  bool
	}{
		"nothing": {neverFlush, func(*testing.T, *Store, *flushedClient) {}, false},
		"relaxed": {neverFlush, func(_ *testing.T, _ *Store, c *flushedClient) { c.must(c.relaxed(2, 9, 9)) }, false},
		"durable": {neverFlush, func(_ *testing.T, _ *Store, c *flushedClient) { c.must(c.write(1, 2, 9, noise(9))) }, true},
		"mark": {neverFlush, func(_ *testing.T, _ *Store, c *flushedClient) {
			c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, 2}})
		}, true},
		"unmap": {neverFlush, func(_ *testing.T, _ *Store, c *flushedClient) {
			c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, 2}, Start: 50, Count: 1, Relaxed: true})
		}, true},
		"other": {neverFlush, func(t *testing.T, s *Store, _ *flushedClient) { mustCreate(t, s, 2, 10) }, true},
		"interval": {func(c *Config) { c.FlushInterval = time.Millisecond }, func(_ *testing.T, s *Store, c *flushedClient) {
			<-c.flushed
			s.flush.turn.Lock() // until it is through
			defer s.flush.turn.Unlock()
		}, true},
		"bytes": {func(c *Config) { neverFlush(c); c.FlushBytes = 64 << 10 }, func(t *testing.T, s *Store, c *flushedClient) {
			for i := range Seq(16) {
				c.must(c.relaxed(2+i, 9, uint64(9+i)))
			}
			if n := s.Unflushed(); n >= 64<<10 {
				t.Errorf("%d bytes wait", n)
			}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1, 12<<20)
			r.opts = x.opts
			r.configure()
			s := r.start()
			mustCreate(t, s, 1, 100)
			c := &flushedClient{newClient(t, s), make(chan struct{}, 1)}
			r.disks["disk0"].Observe(func(op devicetest.Op) {
				if op.Kind == devicetest.Flush {
					select {
					case c.flushed <- struct{}{}:
					default:
					}
				}
			})
			c.must(c.relaxed(1, 7, 77))
			mustEqualAs(t, s.Volume(1), append([]uint64{7: 77}, make([]uint64, 92)...), noise) // it is visible
			x.after(t, s, c)
			cut := r.crash(devicetest.CrashOptions{})
			mustClose(t, s)
			s = cut.start()
			if kept := s.Volume(1).Meta().Durable.Seq > 0; kept != x.kept {
				t.Errorf("kept: %v, want %v", kept, x.kept)
			}
			mustCheck(t, s)
			mustClose(t, s)
		})
	}
}

// TestRelaxedFlushFails: a flush that fails stops the store, whoever asked for it.
func TestRelaxedFlushFails(t *testing.T) {
	r := newRig(t, 1, 12<<20)
	poisoned := make(chan struct{})
	r.cfg.FlushInterval = time.Millisecond
	r.cfg.Event = func(e Event) {
		if e.Code == "poisoned" {
			close(poisoned)
		}
	}
	s := r.start()
	mustCreate(t, s, 1, 100)
	c := newClient(t, s)
	r.disks["disk0"].FailNth(devicetest.Flush, 1, unix.EIO)
	c.must(c.relaxed(1, 7, 77))
	<-poisoned
	if err := c.do(c.relaxed(2, 8, 78)); !errors.Is(err, ErrPoisoned) || !errors.Is(err, unix.EIO) {
		t.Fatalf("after a failed flush: %v", err)
	}
	if err := s.Close(); !errors.Is(err, ErrPoisoned) {
		t.Fatalf("close: %v", err)
	}
}

// TestRelaxedTail leaves a long tail that was never flushed, over several segments, of
// which the device keeps everything but one commit in the middle.
func TestRelaxedTail(t *testing.T) {
	for _, torn := range []int{3, 40, 90} {
		r := newRig(t, uint64(torn), 64<<20) // no checkpoint comes by itself
		r.opts = neverFlush
		r.configure()
		s := r.start()
		mustCreate(t, s, 1, 200)
		c := newClient(t, s)
		d := r.disks["disk0"]
		const n = 120
		segments := map[uint32]bool{}
		for i := range n {
			if i == torn {
				d.LoseNth(devicetest.Write, 1)
			}
			op := c.write(1, Seq(i+1), BlockNo(i), slices.Concat(noise(uint64(8*i+1)), noise(uint64(8*i+2)), noise(uint64(8*i+3)), noise(uint64(8*i+4)), noise(uint64(8*i+5))))
			op.Relaxed = true
			c.must(op)
			segments[s.log.segment] = true
		}
		cut := r.crash(devicetest.CrashOptions{Keep: 1})
		d.Heal()
		_ = s.Close() // what was lost may come up now; the cut pool is what counts
		if len(segments) < 2 {
			t.Fatal("the tail lies in one segment")
		}
		s = cut.start()
		if k := s.Volume(1).Meta().Durable.Seq; k != Seq(torn) {
			t.Fatalf("it stands at %d, commit %d was lost", k, torn+1)
		}
		mustCheck(t, s)
		mustClose(t, s)
	}
}

// TestScrubAmongRelaxed: a relaxed commit tells of nothing that is durable. A damaged one
// between others is found by what comes later in the segment, or in the one after it; the
// end of the log after a power cut is still no damage (TestRelaxedCrash).
func TestScrubAmongRelaxed(t *testing.T) {
	for name, durable := range map[string]int{"by a later commit of the segment": 4, "by the segment after it": -1} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1, 16<<20)
			r.opts = func(c *Config) { neverFlush(c); c.ScrubInterval = -1 }
			r.configure()
			s := r.start()
			mustCreate(t, s, 1, 1024)
			c := newClient(t, s)
			seq := Seq(0)
			log := func() (uint32, uint32) {
				s.log.turn.Lock()
				defer s.log.turn.Unlock()
				return s.log.segment, s.log.offset
			}
			step := func(relaxed bool) {
				seq++
				op := c.write(1, seq, BlockNo(seq%1000), pattern(uint64(seq)))
				op.Relaxed = relaxed
				c.must(op)
			}
			// A segment whose commits are all of this test.
			first, _ := log()
			for n := first; n == first; n, _ = log() {
				step(true)
			}
			segment, _ := log()
			var at []uint32
			for i := 0; ; i++ {
				n, off := log()
				if n != segment {
					break
				}
				at = append(at, off)
				step(i != durable)
			}
			_, base := s.segs.locate(format.MakeAddr(segment, 0))
			hit := base + int64(at[1])
			r.disks["disk0"].FlipBit(hit, 77) // the header of the third commit
			k := &logReader{s: s, buf: device.AlignedBuffer(int(s.commitMax) + readAhead), ahead: format.PageSize}
			defer device.FreeAligned(k.buf)
			if _, damaged, err := s.proveCommits(k, segment); err != nil || damaged != 1 {
				t.Errorf("%d damaged, %v", damaged, err)
			}
			r.disks["disk0"].FlipBit(hit, 77)
			if _, damaged, err := s.proveCommits(k, segment); err != nil || damaged != 0 {
				t.Errorf("whole again: %d damaged, %v", damaged, err)
			}
			mustClose(t, s)
		})
	}
}
