package lsfs

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

var (
	crashStates = flag.Int64("crash.states", 8_000, "how many crash states TestCrashStates looks at")
	crashFirst  = flag.Uint64("crash.first", 1, "its first seed")
	crashLanes  = flag.Int("crash.lanes", 0, "how many seeds it works on at a time; 0: one for each processor")
)

// lane is one seed of the explorer: a pool with a past, and a chain of short
// workloads, each of which begins where a crash of the one before left the pool.
type lane struct {
	seed   uint64
	rng    *rand.Rand
	images []*devicetest.Image
	cfg    Config
	model  *site
	look   *reader
	lax    *rand.Rand
	cold   bool
	sum    *explored // nil: nobody counts
}

// stats of a run of the explorer.
type explored struct {
	states, moments, workloads, lanes, full, goneOn, merged, packed, groups, kept, ended, read atomic.Int64
}

func (x *explored) met(s *Store) {
	if x == nil {
		return
	}
	x.read.Add(s.stats.groupReads.Load())
	p := &s.cleaner.packing
	x.packed.Add(p.blocks.Load())
	x.groups.Add(p.groups.Load())
	x.kept.Add(p.kept.Load())
	x.ended.Add(p.ended.Load())
}

// TestCrashStates cuts the power after every write and every flush of short random
// workloads, with nine kinds of loss of what was not flushed: nothing or all of it
// arrives, a quarter, half and three quarters of the sectors, a prefix, all but one
// sector, garbage in one, whole writes only. Outcomes that are equal are looked at
// once. After each cut the pool is opened, checked (REFS, LIVE, checksums, pages) and
// read back: it is the model after the last acknowledged change or a later one that
// was issued (DURABLE, ATOMIC-4K, ORDERED). Some go on from there and are opened again.
//
// A seed names a lane and gives the same states each time: -lsfs.seed=N.
func TestCrashStates(t *testing.T) {
	want := *crashStates
	if testing.Short() {
		want /= 10
	}
	next := *crashFirst
	workers := *crashLanes
	if workers == 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	if *seedFlag != 0 {
		next, workers, want = *seedFlag, 1, 1
	}
	var x explored
	var mu sync.Mutex
	var group sync.WaitGroup
	began, told := time.Now(), time.Now()
	for range workers {
		group.Go(func() {
			look := newReader()
			for {
				mu.Lock()
				seed := next
				next++
				enough := want <= x.states.Load() || t.Failed()
				if n := x.states.Load(); time.Since(told) > time.Minute {
					told = time.Now()
					fmt.Fprintf(os.Stderr, "%d crash states, seeds %d to %d, %.0f/s\n", n, *crashFirst, seed-1, float64(n)/time.Since(began).Seconds())
				}
				mu.Unlock()
				if enough {
					return
				}
				if err := exploreLane(seed, look, &x); err != nil {
					t.Errorf("%v\nreplay with: go test ./lsfs -run %s -lsfs.seed=%d", err, t.Name(), seed)
				}
			}
		})
	}
	group.Wait()
	if want >= 8_000 && x.merged.Load() == 0 {
		t.Error("no blocks were merged in all workloads")
	}
	if want >= 8_000 && (x.groups.Load() == 0 || x.kept.Load() == 0 || x.ended.Load() == 0 || x.read.Load() == 0) {
		t.Error("groups were not met")
	}
	t.Logf("%d blocks merged, %d recompressed; %d groups made, %d moved whole, %d taken apart, %d read by starts after crashes", x.merged.Load(), x.packed.Load(), x.groups.Load(), x.kept.Load(), x.ended.Load(), x.read.Load())
	t.Logf("%d crash states at %d moments of %d workloads, seeds %d to %d (%d pools ran full), %d went on, in %v",
		x.states.Load(), x.moments.Load(), x.workloads.Load(), *crashFirst, next-1, x.full.Load(), x.goneOn.Load(), time.Since(began).Round(time.Millisecond))
}

// exploreLane runs one seed.
func exploreLane(seed uint64, look *reader, x *explored) error {
	l := &lane{seed: seed, rng: rand.New(rand.NewPCG(seed, 0x6c616e65)), look: look, sum: x, cold: seed%2 == 0, model: &site{vols: map[VolumeID]*siteVolume{}}}
	const segment = format.SegmentMin
	if l.rng.IntN(2) == 0 {
		l.images = append(l.images, devicetest.NewImage("a", format.SuperblockArea+28*segment))
	} else {
		l.images = append(l.images, devicetest.NewImage("a", format.SuperblockArea+18*segment), devicetest.NewImage("b", format.SuperblockArea+10*segment))
	}
	l.cfg = explorerConfig(l.images)
	if l.rng.IntN(2) == 0 {
		l.cfg.CheckpointBytes = 64 << 10 // so that they are cut between the slices of one operation too
	}
	if l.lax = rand.New(rand.NewPCG(seed, 0x6c6178)); l.lax.IntN(3) == 0 {
		l.lax = nil
	} else if l.lax.IntN(3) == 0 {
		l.cfg.FlushBytes = 16 << 10
	}
	err := Format(context.Background(), FormatConfig{Pool: [16]byte{9}, Key: testKey, Devices: l.cfg.Devices, SegmentBytes: segment, OpenDevice: l.cfg.OpenDevice})
	if err != nil {
		return err
	}
	x.lanes.Add(1)
	if err := l.past(l.rng.IntN(3) * l.rng.IntN(150)); err != nil {
		if errors.Is(err, errFull) {
			x.full.Add(1)
			return nil
		}
		return fmt.Errorf("seed %d, past: %w", seed, err)
	}
	for n := range 5 {
		if err := l.workload(n, x); err != nil {
			if errors.Is(err, errFull) {
				x.full.Add(1)
				return nil
			}
			return fmt.Errorf("seed %d, workload %d: %w", seed, n, err)
		}
	}
	return nil
}

func (l *lane) panicked(p any) {
	fmt.Fprintf(os.Stderr, "the store panics: %v\nreplay with: go test ./lsfs -run TestCrashStates -lsfs.seed=%d\n", p, l.seed)
}

// past gives the pool a history, so that its segments hold what was there before.
func (l *lane) past(steps int) error {
	d := &driver{rng: l.rng, images: l.images, big: true, lax: l.lax, cold: l.cold}
	if err := d.start(l.cfg, l.model, l.panicked); err != nil {
		return err
	}
	defer d.abandon()
	for range steps {
		if err := d.step(); err != nil {
			return err
		}
	}
	l.model = d.model()
	l.sum.met(d.s)
	return nil
}

// workload records a few steps and looks at every crash in them. The pool is left
// at one of those crashes, or at the end.
func (l *lane) workload(number int, x *explored) error {
	x.workloads.Add(1)
	tape := &devicetest.Tape{}
	for i, m := range l.images {
		m.Mark()
		m.Record(tape, i)
	}
	d := &driver{rng: l.rng, images: l.images, tape: tape, lax: l.lax, cold: l.cold}
	run := func() error {
		if err := d.start(l.cfg, l.model, l.panicked); err != nil {
			return err
		}
		defer d.abandon()
		for range 3 + l.rng.IntN(4) {
			if err := d.step(); err != nil {
				return fmt.Errorf("%s: %w", d.current, err)
			}
		}
		x.merged.Add(d.s.merger.blocks.Load())
		l.sum.met(d.s)
		return nil
	}
	err := run()
	for _, m := range l.images {
		m.Record(nil, 0)
		m.Rollback()
	}
	if err != nil {
		return err
	}
	events := tape.Events
	end := [2]int{d.acked, len(d.models) - 1}
	leave := len(events)
	if l.rng.IntN(2) == 0 && leave > 0 {
		leave = l.rng.IntN(leave)
	}
	var unsynced []devicetest.Event
	var outcomes []uint64
	for i := range events {
		e := &events[i]
		if e.Kind == devicetest.Write {
			unsynced = append(unsynced, *e)
		} else {
			unsynced = l.sync(unsynced, e.Unit)
		}
		// What was acknowledged before the next event must be there already; what was issued later cannot.
		acked, issued := end[0], e.Stamp[1]
		if i+1 < len(events) {
			acked = events[i+1].Stamp[0]
		}
		x.moments.Add(1)
		outcomes = outcomes[:0]
		for loss := range devicetest.Losses {
			if loss > 0 && len(unsynced) == 0 {
				break
			}
			fresh, err := l.state(loss, number, i, unsynced, &outcomes, d.models[acked:max(acked, issued)+1], x)
			if err != nil {
				return fmt.Errorf("event %d of %d, %v: %w\nsteps: %q", i, len(events), loss, err, d.done)
			}
			if fresh {
				x.states.Add(1)
			}
		}
		if i == leave {
			break
		}
	}
	if leave == len(events) && l.lax == nil {
		l.model = d.models[end[0]]
		return nil
	}
	// The next workload begins at a crash of this one.
	if leave < len(events) {
		devicetest.Keep50.Cut(l.images, unsynced, l.rng)
	}
	s, err := open(context.Background(), l.cfg)
	if err != nil {
		return err
	}
	defer s.free()
	found, err := l.look.find(s, d.models)
	if err != nil {
		return err
	}
	l.model = d.models[found]
	return nil
}

// sync makes the unsynced writes of one image arrive and returns the others.
func (l *lane) sync(unsynced []devicetest.Event, unit int) []devicetest.Event {
	left := unsynced[:0:0]
	for _, w := range unsynced {
		if w.Unit == unit {
			l.images[unit].Put(w.Off, w.Data)
		} else {
			left = append(left, w)
		}
	}
	return left
}

// state cuts the power once and looks at the result. fresh says that no cut of this
// moment had the same outcome.
func (l *lane) state(loss devicetest.Loss, workload, event int, unsynced []devicetest.Event, outcomes *[]uint64, models []*site, x *explored) (fresh bool, err error) {
	for _, m := range l.images {
		m.Mark()
	}
	defer func() {
		for _, m := range l.images {
			m.Rollback()
		}
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	rng := rand.New(rand.NewPCG(l.seed<<8|uint64(workload), uint64(event)<<8|uint64(loss)))
	outcome := loss.Cut(l.images, unsynced, rng)
	if slices.Contains(*outcomes, outcome) {
		return false, nil
	}
	*outcomes = append(*outcomes, outcome)
	found, err := l.inspect(models)
	if err != nil || rng.IntN(16) != 0 {
		return true, err
	}
	// Go on from here, and open once more.
	x.goneOn.Add(1)
	d := &driver{rng: rng, images: l.images, lax: l.lax, cold: l.cold}
	if err := d.start(l.cfg, models[found], l.panicked); err != nil {
		return true, fmt.Errorf("go on: %w", err)
	}
	for range 1 + rng.IntN(3) {
		if err = d.step(); err != nil {
			break
		}
	}
	d.abandon()
	if errors.Is(err, errFull) {
		return true, nil
	}
	if err == nil {
		_, err = l.inspect([]*site{d.model()})
	}
	if err != nil {
		return true, fmt.Errorf("after going on by %q: %w", d.done, err)
	}
	return true, nil
}

// inspect opens the pool, proves it, and says which of the models it is.
func (l *lane) inspect(models []*site) (int, error) {
	s, err := open(context.Background(), l.cfg)
	if err != nil {
		return 0, err
	}
	defer s.free()
	found, err := l.look.find(s, models)
	if err != nil {
		return 0, err
	}
	r, err := s.check(context.Background(), true)
	if err != nil {
		return 0, err
	}
	l.sum.met(s)
	if !r.OK() {
		return 0, fmt.Errorf("%d problems: %q", r.Count, r.Problems)
	}
	return found, nil
}
