package lsfs

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs/device"
)

// flusher makes the log durable. A commit of relaxed operations alone is written and
// not flushed; the next flush, of whoever needs one, takes all commits before it along:
//
//	commit of anything else    before it is reported
//	checkpoint                 before the superblocks name it (LIVE: nothing is reused on
//	                           the strength of a commit that a power cut may take back)
//	flushLoop                  FlushInterval after the first commit that is not flushed
//	commit that would be more than FlushBytes   at once
//
// What a power cut leaves is a prefix of the log, whatever a device kept of the rest:
// replay ends at the first commit that is not whole. So relaxed operations are lost from
// the newest back, over all volumes together, and never from between others.
//
// Lock order: logWriter.turn, flusher.turn, flusher.mu.
type flusher struct {
	// turn is held while devices flush: one flush at a time, because a device tells of an
	// error once, and whoever comes second must see that the store has failed.
	turn ioLock

	mu      sync.Mutex
	devices []device.Device // written to since their last flush; in a pool mostly one
	taken   []device.Device // scratch of who has the turn
	bytes   int64           // of log that no flush was begun for
	written uint64          // sequence of the newest commit on the devices

	durable atomic.Uint64 // sequence of the newest commit that is flushed, and all before it
	wake    chan struct{} // something is written and not flushed
	full    chan struct{} // half of FlushBytes is, or copyFlush
}

// copyFlush is the log that waits when a flush begins beside a resync's next commits: an
// operation that is durable itself does not come to stand behind much more than that.
const copyFlush = 8 << 20

func (f *flusher) init() {
	f.wake, f.full = make(chan struct{}, 1), make(chan struct{}, 1)
}

// wrote notes a commit that is on a device, and returns how many bytes wait for a flush.
func (f *flusher) wrote(d device.Device, seq uint64, n int) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	known := false
	for _, x := range f.devices {
		known = known || x == d
	}
	if !known {
		f.devices = append(f.devices, d)
	}
	f.bytes += int64(n)
	f.written = seq
	return f.bytes
}

// flushLog makes all commits durable that were written before the call. DURABLE: the one
// place that flushes the log. An error is never retried.
func (s *Store) flushLog() error {
	f := &s.flush
	f.turn.Lock()
	defer f.turn.Unlock()
	if err := s.failure(); err != nil {
		return err
	}
	f.mu.Lock()
	f.taken = append(f.taken[:0], f.devices...)
	clear(f.devices)
	f.devices, f.bytes = f.devices[:0], 0
	seq := f.written
	f.mu.Unlock()
	defer clear(f.taken)
	for _, d := range f.taken {
		start := time.Now()
		if err := d.Flush(); err != nil {
			s.poison(fmt.Errorf("flush up to commit %d: %w", seq, err))
			return s.failure()
		}
		s.stats.flush.observe(time.Since(start))
	}
	f.durable.Store(seq)
	return nil
}

// flushAll makes durable what the devices hold at the start. The commits that replay
// found may stand in a device's cache: a process that was killed left them there.
func (s *Store) flushAll() error {
	for _, m := range s.segs.layout.Load().members {
		if err := m.Flush(); err != nil && !m.lost() {
			return fmt.Errorf("flush %s: %w", m.Path(), err)
		}
	}
	return nil
}

// relax leaves a commit to the next flush, which is asked for here. waiting is what wrote returned.
func (s *Store) relax(waiting int64) error {
	f := &s.flush
	if s.cfg.FlushBytes <= waiting {
		return s.flushLog() // BOUNDED
	}
	select {
	case f.wake <- struct{}{}:
	default:
	}
	early := s.cfg.FlushBytes / 2
	if b := &s.batch; len(b.ops) > 0 && b.ops[0].Kind == OpCopy {
		early = min(early, copyFlush)
	}
	if early <= waiting {
		select {
		case f.full <- struct{}{}:
		default:
		}
	}
	return nil
}

// flushLoop flushes an interval after something was written that no flush followed.
func (s *Store) flushLoop() {
	f := &s.flush
	timer := time.NewTimer(s.cfg.FlushInterval)
	defer timer.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-f.wake:
		}
		timer.Reset(s.cfg.FlushInterval)
		select {
		case <-s.stop:
			return
		case <-f.full:
		case <-timer.C:
		}
		if s.flushLog() != nil {
			return // poisoned, which was told
		}
	}
}

// Unflushed is how many bytes of log are written and wait for their flush.
func (s *Store) Unflushed() int64 {
	f := &s.flush
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bytes
}
