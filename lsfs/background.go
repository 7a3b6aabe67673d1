package lsfs

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// catalogue is the complete memory of fingerprints, a hint: what it says is verified, and
// what it has lost costs savings. A reference is a BID. It is used by one goroutine.
type catalogue interface {
	// Lookup calls f for each entry, in order, with what is known for its fingerprint.
	Lookup(list []knownBlock, f func(i int, ref uint64, found bool)) error
	// Put remembers entries durably.
	Put(list []knownBlock) error
	// Marks and PutMarks keep a number for each identity page, 0 at first.
	Marks(group uint64, dst *[marksPerGroup]uint64) error
	PutMarks(list []groupMarks) error
	// Reset empties it.
	Reset() error
	// Bytes is what it takes on disk.
	Bytes() int64
	Close() error
}

// merger is the second stage of deduplication: from time to time it looks for blocks that
// are stored twice, because the index in RAM had forgotten the first or could not look
// at it without I/O, and makes one of the two (duplicates.go, merge.go).
//
// The catalogue is open while a pass runs, so that between passes it takes no RAM.
type merger struct {
	wake   chan struct{}
	blocks atomic.Int64 // that ended, since the start
	bytes  atomic.Int64 // their stored bytes
	size   atomic.Int64 // of the catalogue, when it was last open

	mu      sync.Mutex
	cond    sync.Cond // of those who wait for the end of a pass
	asked   bool
	running bool
	ended   bool
	cancel  context.CancelFunc
	begun   time.Time // of the last pass, or of the store
	news    int64     // blocks stored when it began, -1: not all of the pool was looked at yet
	done    float64
	current MergeResult
	last    MergeResult
}

// MergeResult is what a pass that merges duplicates found and did.
type MergeResult struct {
	Started, Finished time.Time
	Looked            int64 // identities whose fingerprints were looked up: those of pages that had changed
	Found             int64 // of them, those that were stored already
	Blocks            int64 // stored blocks that ended
	Bytes             int64 // their stored bytes
	Err               error // why the pass ended early, nil if it did not
}

// MergeStatus is how the background part of deduplication does.
type MergeStatus struct {
	On      bool // there is a directory for the catalogue
	Running bool
	Done    float64 // part of the pass, while one runs
	Current MergeResult
	Last    MergeResult // the last pass that ended
	Blocks  int64       // stored blocks that ended, since Open
	Bytes   int64       // their stored bytes
	// CatalogueBytes is what the catalogue takes on disk.
	CatalogueBytes int64
}

// MergeInterval is how often the background looks for duplicates by default.
const MergeInterval = time.Hour

func (m *merger) init() {
	m.wake = make(chan struct{}, 1)
	m.cond.L = &m.mu
	m.begun, m.news = time.Now(), -1
}

func (m *merger) stopNow() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = true
	if m.cancel != nil {
		m.cancel()
	}
	m.cond.Broadcast()
}

// StartMerge begins a pass over all stored blocks now, which merges those that are equal,
// unless one runs. It does not wait. Without a catalogue it does nothing.
func (s *Store) StartMerge() {
	m := &s.merger
	m.mu.Lock()
	m.asked = s.openCatalogue != nil && !m.running
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// StopMerge ends the pass that runs, or was asked for, between two of its steps: what it has merged stays
// merged, and the next one goes on from there. It does not wait.
func (s *Store) StopMerge() {
	m := &s.merger
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = false
	if m.cancel != nil {
		m.cancel()
	}
	m.cond.Broadcast()
}

// WaitMerge returns when the pass has ended that ran at the call or was asked for.
func (s *Store) WaitMerge(ctx context.Context) error {
	m := &s.merger
	defer context.AfterFunc(ctx, func() {
		m.mu.Lock()
		m.cond.Broadcast()
		m.mu.Unlock()
	})()
	m.mu.Lock()
	defer m.mu.Unlock()
	for (m.asked || m.running) && !m.ended {
		if err := ctx.Err(); err != nil {
			return err
		}
		m.cond.Wait()
	}
	return errors.Join(s.failure(), m.last.Err)
}

// Merge returns how the background part of deduplication does. It is free.
func (s *Store) Merge() MergeStatus {
	m := &s.merger
	m.mu.Lock()
	defer m.mu.Unlock()
	return MergeStatus{
		On: s.openCatalogue != nil, Running: m.running, Done: m.done, Current: m.current, Last: m.last,
		Blocks: m.blocks.Load(), Bytes: m.bytes.Load(), CatalogueBytes: m.size.Load(),
	}
}

// due says whether a pass shall begin: one interval after the last, if anything was stored.
// The caller has m.mu.
func (m *merger) due(s *Store) bool {
	interval := s.cfg.MergeInterval
	return m.asked || interval > 0 && time.Since(m.begun) >= interval && m.news != s.stats.blocksNew.Load()
}

// mergeLoop runs passes when they are due or asked for.
func (s *Store) mergeLoop() {
	m := &s.merger
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		m.mu.Lock()
		var ctx context.Context
		begin := !m.ended && m.due(s)
		if begin {
			ctx, m.cancel = context.WithCancel(context.Background())
			m.asked, m.running, m.done, m.begun = false, true, 0, time.Now()
			m.news = s.stats.blocksNew.Load()
			m.current = MergeResult{Started: m.begun}
		}
		m.mu.Unlock()
		if begin {
			err := s.mergeNow(ctx)
			m.mu.Lock()
			m.cancel()
			m.running, m.cancel = false, nil
			m.current.Finished, m.current.Err = time.Now(), err
			if err != nil {
				m.news = -1
			}
			m.last, m.current = m.current, MergeResult{}
			r := m.last
			m.cond.Broadcast()
			m.mu.Unlock()
			switch {
			case err != nil && !errors.Is(err, context.Canceled) && s.failure() == nil:
				s.logger.Warn("merging of duplicates stopped", "err", err)
			case r.Blocks > 0:
				s.logger.Info("duplicates merged", "looked", r.Looked, "found", r.Found, "blocks", r.Blocks, "bytes", r.Bytes)
			}
		}
		select {
		case <-m.wake:
		case <-tick.C:
		case <-s.stop:
			return
		}
	}
}

// mergeNow opens the catalogue for one pass.
func (s *Store) mergeNow(ctx context.Context) error {
	c, err := s.openCatalogue()
	if err != nil {
		return err
	}
	err = s.mergePass(ctx, c)
	s.merger.size.Store(c.Bytes())
	return errors.Join(err, c.Close())
}

// note changes the result of the pass that runs.
func (m *merger) note(f func(*MergeResult)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&m.current)
}

// at says how far the pass is.
func (m *merger) at(done float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done = done
}
