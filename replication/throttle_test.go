package replication

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// drive lets a resync send as fast as the throttle allows for a while, while commands
// take what latency says of the rate, and returns the bytes a second of the last second.
func drive(t *throttle, at *Instant, d time.Duration, link float64, latency func(rate float64) time.Duration) float64 {
	last, sent := 0.0, 0.0
	for end, next := at.After(d), at.After(time.Second); *at < end; *at += Instant(time.Millisecond) {
		for n := 0.0; n < link/1000 && t.delay(*at) == 0; n += 64 << 10 {
			t.charge(64 << 10)
			sent += 64 << 10
		}
		if *at%Instant(100*time.Millisecond) == 0 && latency != nil {
			t.mu.Lock()
			t.write.observe(*at, latency(last), true)
			t.mu.Unlock()
		}
		t.judge(*at)
		if *at >= next {
			last, sent, next = sent, 0, next.After(time.Second)
		}
	}
	return last
}

func TestThrottle(t *testing.T) {
	const link = float64(1 << 30)
	at := 100 * second
	th := &throttle{}
	if got := drive(th, &at, 5*time.Second, link, nil); got < 0.95*link {
		t.Errorf("Y6: without initiators %.0f MiB/s of %.0f are used", got/(1<<20), link/(1<<20))
	}
	th.ceiling.Store(100 << 20)
	if got := drive(th, &at, 5*time.Second, link, nil); got < 95<<20 || 105<<20 < got {
		t.Errorf("a ceiling of 100 MiB/s: %.0f MiB/s", got/(1<<20))
	}
	th.ceiling.Store(0)
	// What the usual is.
	th.mu.Lock()
	for range 100 {
		at += second / 10
		th.write.observe(at, 2*time.Millisecond, false)
	}
	th.mu.Unlock()
	// A device on which every 50 MiB/s of resync make a write 1 ms slower.
	shared := func(rate float64) time.Duration {
		return 2*time.Millisecond + time.Duration(rate/(50<<20)*1e6)
	}
	got := drive(th, &at, 120*time.Second, link, shared)
	if took := shared(got); 2*2*time.Millisecond < took || got < 20<<20 {
		t.Errorf("Y6: at the end %.0f MiB/s, a write takes %s", got/(1<<20), took)
	}
	// Nothing helps: the floor.
	if got := drive(th, &at, 60*time.Second, link, func(float64) time.Duration { return time.Second }); got < 0.9*ResyncFloor || 1.5*ResyncFloor < got {
		t.Errorf("Y6: the floor is %.1f MiB/s", got/(1<<20))
	}
	if got := drive(th, &at, 5*time.Second, link, nil); got < 0.9*link {
		t.Errorf("Y6: when the initiators have gone, %.0f MiB/s", got/(1<<20))
	}
}

// Initiators are at work from a command on until they have been quiet for a second.
func TestThrottleWorking(t *testing.T) {
	var th throttle
	at := Instant(time.Hour)
	if th.working(at) {
		t.Error("nobody has come yet")
	}
	for _, f := range []*foreground{&th.read, &th.write} {
		at += Instant(time.Minute)
		f.observe(at, time.Millisecond, true)
		if !th.working(at+foreQuiet-1) || th.working(at+foreQuiet) {
			t.Error("quiet at the wrong time")
		}
	}
}

func TestResyncOrder(t *testing.T) {
	var q resyncQueue
	var mu sync.Mutex
	var order []int
	var group sync.WaitGroup
	running := make(chan struct{})
	turns := []turn{{copies: 2, work: 1}, {copies: 1, work: 900}, {copies: 1, work: 30}, {copies: 2, work: 7}, {copies: 1, work: 31}}
	for _, i := range rand.Perm(len(turns)) {
		group.Go(func() {
			if err := q.enter(t.Context(), &turns[i]); err != nil {
				t.Error(err)
				return
			}
			running <- struct{}{}
			mu.Lock()
			order = append(order, i)
			mu.Unlock()
			q.leave()
		})
	}
	gone, cancel := context.WithCancel(t.Context())
	group.Go(func() {
		if q.enter(gone, &turn{}) == nil {
			t.Error("entered after its context ended")
		}
	})
	waiting := func(n int) func() bool {
		return func() bool { q.mu.Lock(); defer q.mu.Unlock(); return len(q.waiting) == n }
	}
	eventually(t, "all wait", waiting(6))
	cancel()
	eventually(t, "one has gone", waiting(5))
	q.active.Add(resyncsAtOnce - 1) // one at a time, to see the order
	q.dispatch()
	for range turns {
		<-running
	}
	group.Wait()
	if want := []int{2, 4, 1, 0, 3}; !slices.Equal(order, want) {
		t.Errorf("resyncs ran in the order %v, want %v: the most degraded first, then the smallest", order, want)
	}
	if n := q.active.Load(); n != resyncsAtOnce-1 {
		t.Errorf("%d are active at the end", n)
	}
}

// TestResyncMovesWhatChanged (G10): after an absence of one node, and after both were
// gone, a resync sends little more than what changed.
func TestResyncMovesWhatChanged(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	a, c := b.startOn(1, dir+"/1", true), b.startOn(2, dir+"/2", true)
	b.create(64<<20, 1)
	b.inSync(1, 2)
	fill := func(n *testNode, off, size uint64) {
		t.Helper()
		data := make([]byte, 64<<10)
		for end := off + size; off < end; off += uint64(len(data)) {
			for i := range data {
				data[i] = byte(rand.Uint32())
			}
			n.write(t, off, data)
		}
	}
	fill(a, 0, 32<<20)
	b.stop(2, c)
	b.inSync(1)
	const changed = 4 << 20
	fill(a, 3<<20, changed/2)
	fill(a, 40<<20, changed/2)
	c = b.startOn(2, dir+"/2", false)
	b.inSync(1, 2)
	sent := a.Resyncs().SentBytes
	t.Logf("away: %d of %d KiB", sent>>10, changed>>10)
	if sent < changed || changed+changed/10 < sent {
		t.Errorf("after an absence %d KiB were sent, %d changed", sent>>10, changed>>10)
	}
	// One dies, then the other; both come back.
	b.stop(2, c)
	b.inSync(1)
	fill(a, 50<<20, changed)
	b.stop(1, a)
	b.startOn(2, dir+"/2", false)
	a = b.startOn(1, dir+"/1", false)
	b.inSync(1, 2)
	sent = a.Resyncs().SentBytes
	t.Logf("both away: %d of %d KiB", sent>>10, changed>>10)
	if sent < changed || changed+changed/10 < sent {
		t.Errorf("after both were gone %d KiB were sent, %d changed", sent>>10, changed>>10)
	}
}
