package lsfs

import (
	"sync"
	"sync/atomic"
)

// claim is what a reader is told about a block that it is about to read.
type claim uint8

const (
	claimNone   claim = iota // read it; nobody is told
	claimMine                // read it, then done
	claimOther               // somebody reads it: wait, then look into the cache
	claimServed              // it came into the cache meanwhile
)

const (
	flightSlots  = 1 << 14 // power of two: 128 KiB; of 4000 blocks in flight 1 in 9 finds its place taken
	flightGroups = 64
)

// flights knows the blocks that are being read from the devices, so that those who
// want the same one at the same time read it once: when a hundred clones of one
// image start together their reads meet here, at the one identity.
//
// A block has one place in a table of fixed size. A reader that finds it taken by
// another block reads on its own (BOUNDED). Who waits holds no claims of its own
// that are not done, so nobody waits in a circle.
type flights struct {
	// ended counts reads that ended. Who looked into the cache before one did, and claims
	// after it, has to look again: what it wants may just have come.
	ended  atomic.Uint64
	slots  [flightSlots]atomic.Uint64 // BID, 0 for none
	groups [flightGroups]flightGroup
}

type flightGroup struct {
	waiting atomic.Int32
	mu      sync.Mutex
	ended   sync.Cond
	_       [40]byte
}

func newFlights() *flights {
	f := &flights{}
	for i := range f.groups {
		f.groups[i].ended.L = &f.groups[i].mu
	}
	return f
}

func (f *flights) place(b BID) (*atomic.Uint64, *flightGroup) {
	// Identities of neighbours follow each other: they get places side by side.
	h := uint64(b) ^ uint64(b)>>14*0x9e3779b97f4a7c15>>40
	i := h % flightSlots
	return &f.slots[i], &f.groups[i/8%flightGroups]
}

func (f *flights) claim(b BID) claim {
	slot, _ := f.place(b)
	if slot.CompareAndSwap(0, uint64(b)) {
		return claimMine
	}
	if slot.Load() == uint64(b) {
		return claimOther
	}
	return claimNone
}

// done ends a claim: what was read is in the cache, or the read has failed. The caller
// has counted the end of its read before.
func (f *flights) done(b BID) {
	slot, g := f.place(b)
	slot.Store(0)
	if g.waiting.Load() > 0 {
		g.mu.Lock()
		g.ended.Broadcast()
		g.mu.Unlock()
	}
}

// wait returns when nobody reads b.
func (f *flights) wait(b BID) {
	slot, g := f.place(b)
	if slot.Load() != uint64(b) {
		return
	}
	g.mu.Lock()
	g.waiting.Add(1)
	for slot.Load() == uint64(b) {
		g.ended.Wait()
	}
	g.waiting.Add(-1)
	g.mu.Unlock()
}
