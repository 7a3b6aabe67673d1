package lsfs

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

var seedFlag = flag.Uint64("lsfs.seed", 0, "run the random tests with this seed only")

// eachSeed runs f for a few seeds and those that found something once, or for the
// one of the flag. Short runs take half of the few.
func eachSeed(t *testing.T, n uint64, f func(t *testing.T, seed uint64), found ...uint64) {
	if *seedFlag != 0 {
		f(t, *seedFlag)
		return
	}
	if testing.Short() {
		n = (n + 1) / 2
	}
	seeds := found
	for seed := uint64(1); seed <= n; seed++ {
		seeds = append(seeds, seed)
	}
	for _, seed := range seeds {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) { f(t, seed) })
		if !ok {
			t.Fatalf("replay with: go test ./lsfs -run %s -lsfs.seed=%d", t.Name(), seed)
		}
	}
}

// history is the model: what each operation made of a volume's blocks.
type history struct {
	blocks uint64
	steps  []func(content []uint64) // content: pattern numbers, 0 is a hole
}

func (h *history) at(seq Seq) []uint64 {
	c := make([]uint64, h.blocks)
	for _, f := range h.steps[:seq] {
		f(c)
	}
	return c
}

// randomOp makes the next operation and notes its effect.
func (h *history) randomOp(c *client, rng *rand.Rand, v VolumeID, distinct uint64) *Op {
	seq := Seq(len(h.steps) + 1)
	n := rng.Uint64N(12) + 1
	start := rng.Uint64N(h.blocks - n + 1)
	if rng.IntN(5) == 0 {
		if rng.IntN(4) == 0 {
			n = rng.Uint64N(h.blocks-start) + 1
		}
		h.steps = append(h.steps, func(c []uint64) { clear(c[start : start+n]) })
		return &Op{Kind: OpUnmap, Volume: v, ID: OpID{1, seq}, Start: BlockNo(start), Count: uint32(n)}
	}
	nums := make([]uint64, n)
	var data []byte
	for i := range nums {
		if rng.IntN(10) == 0 {
			data = append(data, make([]byte, dedup.BlockSize)...)
			continue
		}
		nums[i] = rng.Uint64N(distinct) + 1
		data = append(data, pattern(nums[i])...)
	}
	h.steps = append(h.steps, func(c []uint64) { copy(c[start:], nums) })
	return c.write(v, seq, BlockNo(start), data)
}

// mustEqual compares a volume with the model.
func mustEqual(tb testing.TB, v *Volume, want []uint64) {
	tb.Helper()
	mustEqualAs(tb, v, want, pattern)
}

func mustEqualAs(tb testing.TB, v *Volume, want []uint64, pattern func(uint64) []byte) {
	tb.Helper()
	got := make([]byte, len(want)*dedup.BlockSize)
	if err := v.Read(context.Background(), 0, got); err != nil {
		tb.Fatal(err)
	}
	zero := make([]byte, dedup.BlockSize)
	for i, n := range want {
		b := zero
		if n != 0 {
			b = pattern(n)
		}
		if !bytes.Equal(got[i*dedup.BlockSize:(i+1)*dedup.BlockSize], b) {
			tb.Fatalf("block %d is not pattern %d", i, n)
		}
	}
}

// TestCrashAtEveryWrite cuts the power after every write and flush of short
// workloads, with every kind of loss, and looks at what a start makes of it:
// what was acknowledged stays (DURABLE), an operation is there or not, the
// counters are right (REFS, LIVE), and the store goes on.
func TestCrashAtEveryWrite(t *testing.T) {
	met := &coldStores{}
	defer met.mustHaveMet(t)
	eachSeed(t, 6, func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := newRig(t, seed, 8<<20, 4<<20)
		r.cold = met.every(2, seed)
		s := r.start()
		const blocks = 300
		mustCreate(t, s, 1, blocks)
		h := &history{blocks: blocks}
		c := newClient(t, s)
		var acked, issued atomic.Int64
		type span struct{ acked, issued int64 }
		moments := newRecorder(r, seed, 1, func() span { return span{acked.Load(), issued.Load()} })
		moments.start()
		for range 25 {
			n := rng.IntN(4) + 1
			var wg sync.WaitGroup
			var held []*Op
			for range n {
				op := h.randomOp(c, rng, 1, 40)
				wg.Add(1)
				op.Done = func(op *Op, err error) {
					if err != nil {
						t.Error(err)
					}
					acked.Store(int64(op.ID.Seq))
					wg.Done()
				}
				held = append(held, op)
			}
			issued.Add(int64(n))
			for _, op := range held {
				s.Append(op)
			}
			s.Kick()
			wg.Wait()
			switch rng.IntN(6) {
			case 0:
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
			case 1:
				if n, ok := s.victim(true); r.cold != nil {
					if err := s.post(&task{kind: taskTurn}); err != nil {
						t.Fatal(err)
					}
					chill(s, 4, false)
				} else if ok {
					s.cleanSegment(n)
				}
			}
		}
		moments.stop()
		mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
		mustCheck(t, s)
		mustClose(t, s)
		moments.each(t, func(i int, m *moment[span], s *Store) {
			v := s.Volume(1)
			k := v.Meta().Durable.Seq
			if int64(k) < m.before.acked || m.after.issued < int64(k) {
				t.Fatalf("durable is %d", k)
			}
			mustEqual(t, v, h.at(k))
			mustCheck(t, s)
			c := newClient(t, s)
			c.must(c.write(1, k+1, 7, pattern(77)))
			want := h.at(k)
			want[7] = 77
			if i%2 == 0 {
				// A second crash, at once.
				m.rig = m.rig.crash(devicetest.CrashOptions{Seed: seed})
				m.rig.tb = t
			}
			mustClose(t, s)
			s = m.rig.start()
			mustEqual(t, s.Volume(1), want)
			mustCheck(t, s)
			mustClose(t, s)
		})
	})
}

// TestFailedWrites fails the n-th write or flush, for many n: no operation that
// failed is acknowledged, the store says why and stays stopped, and what was
// acknowledged is there at the next start.
func TestFailedWrites(t *testing.T) {
	for _, kind := range []devicetest.Kind{devicetest.Write, devicetest.Flush} {
		for n := 1; n < 30; n += 1 {
			r := newRig(t, uint64(n), 12<<20)
			s := r.start()
			mustCreate(t, s, 1, 100)
			c := newClient(t, s)
			h := &history{blocks: 100}
			rng := rand.New(rand.NewPCG(uint64(n), 3))
			r.disks["disk0"].FailNth(kind, n, unix.EIO)
			acked := Seq(0)
			var failure error
			for i := range 60 {
				op := h.randomOp(c, rng, 1, 1000)
				if failure = c.do(op); failure != nil {
					break
				}
				acked = op.ID.Seq
				if i%5 == 4 {
					_ = s.checkpoint()
				}
			}
			if !errors.Is(failure, ErrPoisoned) || !errors.Is(failure, unix.EIO) {
				t.Fatalf("%v %d: %v, want ErrPoisoned with EIO", kind, n, failure)
			}
			r.disks["disk0"].Heal()
			if err := c.do(c.write(1, acked+1, 0, pattern(1))); !errors.Is(err, ErrPoisoned) {
				t.Fatalf("after: %v", err)
			}
			if err := s.Volume(1).Read(context.Background(), 0, make([]byte, 4096)); !errors.Is(err, ErrPoisoned) {
				t.Fatalf("read after: %v", err)
			}
			if err := s.Close(); !errors.Is(err, ErrPoisoned) {
				t.Fatalf("close: %v", err)
			}
			s = r.crash(devicetest.CrashOptions{Seed: uint64(n), Keep: 0.5, Tear: true}).start()
			k := s.Volume(1).Meta().Durable.Seq
			if k < acked || acked+1 < k {
				t.Fatalf("%v %d: durable %d, acked %d", kind, n, k, acked)
			}
			mustEqual(t, s.Volume(1), h.at(k))
			mustCheck(t, s)
			mustClose(t, s)
		}
	}
}

// TestOverwriteNearlyFull writes a pool full and then over and over: the cleaner
// keeps up for ever. New data beyond the usable size is refused, overwrites,
// unmaps and deletes go on.
func TestOverwriteNearlyFull(t *testing.T) {
	r := newRig(t, 5, 24<<20)
	s := r.start()
	ctx := context.Background()
	const blocks = 8000
	v := mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	seq := Seq(0)
	content := map[uint64]uint64{}
	next := uint64(1)
	put := func(start, n uint64) error {
		var data []byte
		first := next
		for range n {
			data = append(data, noise(next)...)
			next++
		}
		op := c.write(1, seq+1, BlockNo(start), data)
		if !v.Admit(op.Start, op.Blocks) {
			return ErrNoSpace
		}
		err := c.do(op)
		if err == nil {
			seq++
			for i := range n {
				content[start+i] = first + i
			}
		}
		return err
	}
	filled := uint64(0)
	for n := uint64(16); n > 0; {
		switch err := put(filled, n); {
		case errors.Is(err, ErrNoSpace):
			n /= 2
		case err != nil:
			t.Fatal(err)
		default:
			filled += n
		}
	}
	room := s.Room()
	if room.Live < room.Usable*9/10 {
		t.Fatalf("refused at %+v", room)
	}
	if v.Admit(BlockNo(filled), []dedup.Block{{Data: make([]byte, 4096)}}) {
		t.Fatal("a full pool admits new data")
	}
	rng := rand.New(rand.NewPCG(1, 1))
	total := 0
	for total < 4*int(room.Size)/4096 {
		n := rng.Uint64N(8) + 1
		start := rng.Uint64N(filled - n)
		if err := put(start, n); err != nil {
			t.Fatalf("overwrite after %d blocks: %v, room %+v", total, err, s.Room())
		}
		total += int(n)
	}
	mustCheck(t, s)
	st := s.Stats()
	t.Logf("%d blocks filled, %d overwritten, write amplification %.2f, %d segments cleaned, %d checkpoints, %d waits", filled, total,
		float64(st.LogBytes)/float64(st.StoredBytes), st.SegmentsCleaned, st.Checkpoints, st.SpaceWaits)
	want := make([]uint64, blocks)
	for b, n := range content {
		want[b] = n
	}
	mustEqualAs(t, v, want, noise)
	mustClose(t, s)
	s = r.start()
	v = s.Volume(1)
	mustEqualAs(t, v, want, noise)
	mustCheck(t, s)
	c = newClient(t, s)
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq + 1}, Start: 0, Count: uint32(filled / 2)})
	seq++
	if err := put(0, 32); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteVolume(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.trimmer.wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.UniqueBytes != 0 || st.MappedBlocks != 0 {
		t.Fatalf("%d bytes live after the last volume is gone", st.UniqueBytes)
	}
	mustCheck(t, s)
	mustClose(t, s)
}
