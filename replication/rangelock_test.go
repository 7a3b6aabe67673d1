package replication

import (
	"math/rand/v2"
	"testing"

	"github.com/twinsan/twinsan/lsfs"
)

func TestRangeLockOrder(t *testing.T) {
	var l rangeLock
	var granted []*work
	next := func(w *work) { granted = append(granted, w) }
	hold1 := &hold{start: 0, end: 10, exclusive: true}
	if !l.acquire(hold1) {
		t.Fatal("an empty table refused")
	}
	a, b, c := &work{}, &work{}, &work{}
	wa := &hold{start: 5, end: 15, exclusive: true, work: a}
	wb := &hold{start: 12, end: 20, exclusive: true, work: b}
	wc := &hold{start: 30, end: 31, exclusive: true, work: c}
	if l.acquire(wa) {
		t.Error("an overlapping exclusive hold was granted")
	}
	if l.acquire(wb) {
		t.Error("a hold overtook an earlier waiter that it overlaps")
	}
	if !l.acquire(wc) {
		t.Error("a hold elsewhere had to wait")
	}
	if l.clear(3, 4) {
		t.Error("the filter forgot a holder")
	}
	l.release(hold1, next)
	if len(granted) != 1 || granted[0] != a {
		t.Fatalf("granted %v, want the first waiter alone", granted)
	}
	l.release(wa, next)
	if len(granted) != 2 || granted[1] != b {
		t.Fatalf("granted %v, want the second waiter next", granted)
	}
	l.release(wb, next)
	l.release(wc, next)
	if !l.clear(0, 1000) || l.holders.head != nil || l.waiters.head != nil {
		t.Error("something is left over")
	}
}

func TestRangeLockShared(t *testing.T) {
	var l rangeLock
	read := &hold{start: 0, end: 4}
	if !l.acquire(read) || !l.acquire(&hold{start: 2, end: 6}) {
		t.Fatal("readers exclude each other")
	}
	if !l.clear(0, 4) {
		t.Error("readers keep cached reads away")
	}
	w := &work{}
	write := &hold{start: 3, end: 4, exclusive: true, work: w}
	if l.acquire(write) {
		t.Error("a writer was granted over a reader")
	}
	if l.acquire(&hold{start: 3, end: 5}) {
		t.Error("a reader overtook a waiting writer")
	}
}

// TestRangeLockOfAClone: the source is shared with readers and other clones, kept
// from writers, and both ranges come at once.
func TestRangeLockOfAClone(t *testing.T) {
	var l rangeLock
	clone := &hold{start: 100, end: 110, from: 0, to: 10, exclusive: true}
	if !l.acquire(clone) || !l.acquire(&hold{start: 0, end: 10}) || !l.acquire(&hold{start: 200, end: 210, from: 5, to: 15, exclusive: true}) {
		t.Fatal("the source is not shared")
	}
	w := &work{}
	write := &hold{start: 9, end: 10, exclusive: true, work: w}
	if l.acquire(write) {
		t.Fatal("a write into the source of a clone was granted")
	}
	if l.acquire(&hold{start: 100, end: 101, ready: make(chan struct{})}) {
		t.Error("the destination of a clone was read")
	}
	if l.idle() {
		t.Error("idle under clones")
	}
	second := &hold{start: 300, end: 301, from: 9, to: 10, exclusive: true, ready: make(chan struct{})}
	if l.acquire(second) {
		t.Error("a clone overtook a waiting write into its source")
	}
}

// TestRangeLockRandom holds the table against a plain list.
func TestRangeLockRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	var l rangeLock
	live := map[*hold]bool{}
	for range 20000 {
		if len(live) > 0 && r.IntN(2) == 0 {
			for h := range live {
				delete(live, h)
				l.release(h, func(w *work) {})
				break
			}
		} else {
			start := lsfs.BlockNo(r.Uint64N(64))
			if r.IntN(50) == 0 {
				start = 0
			}
			length := 1 + lsfs.BlockNo(r.Uint64N(8))
			if r.IntN(50) == 0 {
				length = wideGranules*granuleBlocks + 100
			}
			h := &hold{start: start, end: start + length, exclusive: r.IntN(3) > 0, ready: make(chan struct{})}
			if h.exclusive && r.IntN(4) == 0 { // a clone
				h.from = lsfs.BlockNo(r.Uint64N(64))
				h.to = h.from + 1 + lsfs.BlockNo(r.Uint64N(8))
			}
			l.acquire(h)
			live[h] = true
		}
		for a := range live {
			if a.granted && a.exclusive && a.end > a.start && l.clear(a.start, a.end) {
				t.Fatal("the filter says clear over a writer")
			}
			for b := range live {
				if a == b || !a.granted || !b.granted {
					continue
				}
				if (a.exclusive || b.exclusive) && a.start < b.end && b.start < a.end {
					t.Fatalf("[%d,%d) and [%d,%d) are both granted", a.start, a.end, b.start, b.end)
				}
				if b.exclusive && a.from < b.end && b.start < a.to {
					t.Fatalf("[%d,%d) is written while a clone reads [%d,%d)", b.start, b.end, a.from, a.to)
				}
			}
		}
		stuck := len(live) > 0
		for h := range live {
			stuck = stuck && !h.granted
		}
		if stuck {
			t.Fatal("everybody waits")
		}
	}
}
