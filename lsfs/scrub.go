package lsfs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
)

// Scrub reads everything that is in use from the devices, past all caches, and proves
// it: superblocks, root, page directory, pages of metadata, reference counts against
// the maps, the headers of commits, and each stored block against its checksum and
// its fingerprint. What is damaged is repaired: metadata from copies and parity,
// blocks from RAM or from another replica, counters from the maps.
//
//	waiting -(due, or Start)-> superblocks -> pages -> references -> blocks -> commits -> waiting
//	   ^--------------------------- Stop, from anywhere ----------------------------+
//
// A pass goes slowly: as fast as it must to be through within the interval, at least
// scrubFloor, and never more than scrubShare of the devices' time unless told otherwise.

const (
	// ScrubInterval is how long a pass may take, and how often one begins, by default.
	ScrubInterval = 14 * 24 * time.Hour
	// scrubFloor is the least speed, in bytes a second: a small pool is through in minutes.
	scrubFloor = 4 << 20
	// scrubShare is the share of time that a pass keeps the devices busy at most: one in 20.
	scrubShare = 20
	// scrubLostMax bounds what a pass remembers of blocks that it could not repair;
	// more of them are counted only.
	scrubLostMax = 4096
)

// ScrubPhase is what a pass is looking at.
type ScrubPhase string

const (
	ScrubIdle        ScrubPhase = ""
	ScrubSuperblocks ScrubPhase = "superblocks"
	ScrubPages       ScrubPhase = "pages"
	ScrubReferences  ScrubPhase = "references"
	ScrubBlocks      ScrubPhase = "blocks"
	ScrubCommits     ScrubPhase = "commits"
)

// scrubOrder is the order of the phases of a pass.
var scrubOrder = []ScrubPhase{ScrubSuperblocks, ScrubPages, ScrubReferences, ScrubBlocks, ScrubCommits}

// ScrubResult counts what a pass found.
type ScrubResult struct {
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished"` // zero: not through yet
	Blocks   uint64    `json:"blocks"`   // stored blocks that were read
	Pages    uint64    `json:"pages"`    // metadata pages that were read
	Bytes    uint64    `json:"bytes"`    // read from the devices
	Damaged  uint64    `json:"damaged"`  // blocks, pages, headers and superblocks that were not right
	Repaired uint64    `json:"repaired"` // of them
	Lost     uint64    `json:"lost"`     // of them: no intact copy was in reach
	Counters uint64    `json:"counters"` // reference counts and live bytes that were corrected
}

// ScrubState is all that must be kept over a restart for a pass to go on.
type ScrubState struct {
	Phase   ScrubPhase  `json:"phase"`
	Next    uint64      `json:"next"` // place in the phase
	Stopped bool        `json:"stopped"`
	Current ScrubResult `json:"current"`
	Last    ScrubResult `json:"last"` // pass that finished last
}

// ScrubStatus is how scrub does.
type ScrubStatus struct {
	ScrubState
	Running   bool
	FullSpeed bool
	Done      float64       // of the pass, 0 to 1
	Left      time.Duration // at the speed so far; 0: not known
	NextPass  time.Time     // when the next one begins by itself
	Reclaim   bool          // false: a reference count was too low, nothing is given back until a pass finds all right
	Lost      []Place       // of blocks that the newest pass could not repair, the first 64
}

// Place is a run of blocks of a volume.
type Place struct {
	Volume VolumeID
	Start  BlockNo
	Blocks uint64
}

func (p Place) String() string {
	return fmt.Sprintf("volume %d blocks %d to %d", p.Volume, p.Start, uint64(p.Start)+p.Blocks-1)
}

// Donor gives an intact copy of a block from another replica, or an error. places,
// which may be empty, are some of those that the block stands at. The answer is
// verified against the fingerprint. It may block; it is called by one goroutine at a time.
type Donor func(ctx context.Context, fp dedup.Fingerprint, places []Place) (dedup.Block, error)

// SetDonor says where intact copies come from. Until then nothing is repaired from
// elsewhere.
func (s *Store) SetDonor(d Donor) { s.scrub.donor.Store(&d) }

type scrubber struct {
	donor    atomic.Pointer[Donor]
	interval time.Duration
	wake     chan struct{}
	halted   atomic.Bool // a count was too low: no segment is reused
	now      func() time.Time

	mu      sync.Mutex
	cond    sync.Cond // of those who wait for the end of a pass
	state   ScrubState
	full    bool
	asked   bool // a pass shall begin now
	running bool
	ended   bool
	cancel  context.CancelFunc
	done    float64
	lost    []Place
	begun   time.Time // of this process's part of the pass
	begunAt float64   // done then

	// Of the goroutine that scrubs.
	prover  *prover
	list    []suspect
	unfixed []suspect
}

func (k *scrubber) init(c *Config) {
	k.wake = make(chan struct{}, 1)
	k.cond.L = &k.mu
	k.interval, k.state, k.now = c.ScrubInterval, c.ScrubFrom, c.Now
}

func (k *scrubber) stopNow() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ended = true
	if k.cancel != nil {
		k.cancel()
	}
	k.cond.Broadcast()
}

func (k *scrubber) kick() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// StartScrub begins a pass now, or goes on with one that was stopped. With fullSpeed
// it takes all the device time that it can get. It does not wait.
func (s *Store) StartScrub(fullSpeed bool) {
	k := &s.scrub
	k.mu.Lock()
	k.state.Stopped, k.asked, k.full = false, true, fullSpeed
	k.mu.Unlock()
	k.kick()
}

// StopScrub ends the pass where it is; StartScrub goes on there. No pass begins by
// itself until then. It does not wait.
func (s *Store) StopScrub() {
	k := &s.scrub
	k.mu.Lock()
	defer k.mu.Unlock()
	k.state.Stopped, k.asked = true, false
	if k.cancel != nil {
		k.cancel()
	}
}

// WaitScrub returns when a pass has ended that ran at the call, or that was asked for.
func (s *Store) WaitScrub(ctx context.Context) error {
	k := &s.scrub
	defer context.AfterFunc(ctx, func() {
		k.mu.Lock()
		k.cond.Broadcast()
		k.mu.Unlock()
	})()
	k.mu.Lock()
	defer k.mu.Unlock()
	for (k.asked || k.running) && !k.ended {
		if err := ctx.Err(); err != nil {
			return err
		}
		k.cond.Wait()
	}
	return s.failure()
}

// Scrub returns how scrub does. It is free.
func (s *Store) Scrub() ScrubStatus {
	k := &s.scrub
	k.mu.Lock()
	defer k.mu.Unlock()
	st := ScrubStatus{ScrubState: k.state, Running: k.running, FullSpeed: k.full, Done: k.done, Reclaim: !k.halted.Load(), Lost: append([]Place(nil), k.lost...)}
	if k.running && k.done > k.begunAt {
		took := k.now().Sub(k.begun)
		st.Left = time.Duration(float64(took) / (k.done - k.begunAt) * (1 - k.done))
	}
	if !k.state.Stopped && k.interval > 0 {
		st.NextPass = k.due()
	}
	return st
}

// due is when the next pass begins. The caller has k.mu.
func (k *scrubber) due() time.Time {
	if k.state.Phase != ScrubIdle {
		return k.now()
	}
	return k.state.Last.Started.Add(k.interval)
}

// scrubLoop runs passes when they are due or asked for.
func (s *Store) scrubLoop() {
	k := &s.scrub
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		k.mu.Lock()
		// A new pool is left alone for one tick: its first minute belongs to its start.
		begin := !k.ended && (k.asked || !k.state.Stopped && k.interval > 0 && !k.begun.IsZero() && !k.now().Before(k.due()))
		if k.begun.IsZero() {
			k.begun = k.now()
		}
		var ctx context.Context
		if begin {
			ctx, k.cancel = context.WithCancel(context.Background())
			k.running, k.asked = true, false
			k.begun, k.begunAt = k.now(), k.done
		}
		k.mu.Unlock()
		if begin {
			err := s.scrubPass(ctx)
			k.mu.Lock()
			k.cancel()
			k.running, k.cancel, k.full = false, nil, false
			k.cond.Broadcast()
			k.mu.Unlock()
			if err != nil && !errors.Is(err, context.Canceled) && s.failure() == nil {
				s.logger.Warn("scrub stopped", "err", err)
			}
		}
		select {
		case <-k.wake:
		case <-tick.C:
		case <-s.stop:
			s.freeScrub()
			return
		}
	}
}

// scrubPass runs the phases from where the state stands to the end.
func (s *Store) scrubPass(ctx context.Context) error {
	k := &s.scrub
	if k.prover == nil {
		s.allocScrub()
	}
	k.mu.Lock()
	if k.state.Phase == ScrubIdle {
		k.state.Phase, k.state.Next, k.done = scrubOrder[0], 0, 0
		k.state.Current = ScrubResult{Started: k.now()}
		k.lost, k.unfixed = nil, k.unfixed[:0]
		k.begunAt = 0
	}
	phase := k.state.Phase
	k.mu.Unlock()
	on := false
	for i, p := range scrubOrder {
		if on = on || p == phase; !on {
			continue
		}
		k.step(p, func(st *ScrubState) { st.Phase = p })
		var err error
		switch p {
		case ScrubSuperblocks:
			err = s.scrubSuperblocks()
		case ScrubPages:
			err = s.scrubPages(ctx)
		case ScrubReferences:
			err = s.scrubReferences(ctx)
		case ScrubBlocks:
			err = s.scrubBlocks(ctx)
		case ScrubCommits:
			err = s.scrubCommits(ctx)
		}
		if err != nil {
			return err
		}
		if i+1 < len(scrubOrder) {
			k.step(scrubOrder[i+1], func(st *ScrubState) { st.Next = 0 })
		}
	}
	if err := s.settleLost(ctx); err != nil {
		return err
	}
	k.mu.Lock()
	r := &k.state.Current
	r.Finished = k.now()
	k.state.Last, k.state.Phase, k.state.Next, k.done = *r, ScrubIdle, 0, 1
	last := *r
	k.mu.Unlock()
	if last.Damaged > 0 || last.Counters > 0 {
		s.cfg.Event(Event{Code: "scrub", Text: fmt.Sprintf("scrub read %d blocks and %d pages: %d damaged, %d repaired, %d lost, %d counters corrected",
			last.Blocks, last.Pages, last.Damaged, last.Repaired, last.Lost, last.Counters)})
	}
	s.logger.Info("scrub is through", "blocks", last.Blocks, "pages", last.Pages, "damaged", last.Damaged, "repaired", last.Repaired, "lost", last.Lost, "counters", last.Counters)
	return nil
}

// step changes the state of the pass, now in phase p.
func (k *scrubber) step(p ScrubPhase, f func(*ScrubState)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.state.Phase = p
	f(&k.state)
}

// note counts what a pass found.
func (k *scrubber) note(f func(*ScrubResult)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(&k.state.Current)
}

// at says how far a phase is: next is its place of end. share is what part of a pass
// the phases before it and itself are.
func (k *scrubber) at(next, end uint64, from, to float64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.state.Next = next
	if end > 0 {
		k.done = from + (to-from)*min(1, float64(next)/float64(end))
	}
}

// pace waits after n bytes, whose reading took so long, as the speed of the pass asks for.
func (s *Store) pace(ctx context.Context, n int, took time.Duration) error {
	k := &s.scrub
	k.note(func(r *ScrubResult) { r.Bytes += uint64(n) })
	if err := s.failure(); err != nil {
		return err
	}
	k.mu.Lock()
	full := k.full
	k.mu.Unlock()
	if full {
		return ctx.Err()
	}
	rate := max(scrubFloor, s.segs.live.Load()/max(1, int64(k.interval/time.Second)))
	wait := max(time.Duration(int64(n)*int64(time.Second)/rate)-took, took*(scrubShare-1))
	if wait <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-k.wake: // full speed from here, or stopped
	case <-ctx.Done():
	}
	return ctx.Err()
}
