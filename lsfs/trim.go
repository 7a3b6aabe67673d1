package lsfs

import (
	"context"
	"sync"

	"github.com/twinsan/twinsan/lsfs/format"
)

// trimmer gives back the blocks of deleted volumes, their annexes too, and those behind the
// end of shrunken ones, in small logged steps from the end, so that it can stop
// anywhere and go on after a restart.
type trimmer struct {
	mu     sync.Mutex
	cond   sync.Cond
	work   bool
	ended  bool
	rounds uint64
}

func (t *trimmer) init() {
	t.cond.L = &t.mu
	t.work = true // what a start finds
}

func (t *trimmer) kick() {
	t.mu.Lock()
	t.work = true
	t.cond.Broadcast()
	t.mu.Unlock()
}

func (t *trimmer) stopNow() {
	t.mu.Lock()
	t.ended = true
	t.cond.Broadcast()
	t.mu.Unlock()
}

// wait returns when the trimmer has been through all volumes once since the call.
func (t *trimmer) wait(ctx context.Context, _ VolumeID) error {
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock()
		t.cond.Broadcast()
		t.mu.Unlock()
	})
	defer stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	target := t.rounds + 2
	for t.rounds < target && !t.ended {
		if err := ctx.Err(); err != nil {
			return err
		}
		t.work = true
		t.cond.Broadcast()
		t.cond.Wait()
	}
	if t.ended {
		return ErrClosed
	}
	return nil
}

func (s *Store) trimLoop() {
	defer s.running.Done()
	t := &s.trimmer
	for {
		t.mu.Lock()
		for !t.work && !t.ended {
			t.cond.Wait()
		}
		t.work = false
		ended := t.ended
		t.mu.Unlock()
		if ended {
			return
		}
		s.mu.RLock()
		var todo []*Volume
		for _, v := range s.volumes {
			if v.deleting || v.size.Load() < v.tailEnd {
				todo = append(todo, v)
			}
		}
		s.mu.RUnlock()
		for _, v := range todo {
			if err := s.trim(v); err != nil && s.failure() == nil {
				s.logger.Warn("giving blocks back stopped", "volume", v.id, "err", err)
			}
		}
		t.mu.Lock()
		t.rounds++
		t.cond.Broadcast()
		t.mu.Unlock()
	}
}

// trim gives back the tail of one volume, and ends the volume if it is deleted.
func (s *Store) trim(v *Volume) error {
	t := &s.trimmer
	for {
		t.mu.Lock()
		ended := t.ended
		t.mu.Unlock()
		if ended {
			return nil
		}
		start, end, deleting, err := s.nextTail(v)
		if err != nil {
			return err
		}
		if start == end && deleting {
			return s.post(&task{kind: taskGone, volume: v.id})
		}
		if start == end {
			return nil
		}
		if err := s.post(&task{kind: taskTrim, volume: v.id, start: start, end: end}); err != nil {
			return err
		}
	}
}

// nextTail finds the last slice of the tail that holds anything. When nothing is
// left but the tail itself it is an empty slice at the new end.
func (s *Store) nextTail(v *Volume) (start, end uint64, deleting bool, err error) {
	s.mu.RLock()
	size := v.size.Load()
	end, deleting = v.tailEnd, v.deleting
	s.mu.RUnlock()
	if end <= size {
		return size, size, deleting, nil
	}
	for at := end; size < at; {
		s.mu.RLock()
		blocks, _, missing, span := s.pg.lookup(v.mapTree, wordShift, at-1)
		mlow := v.mapTree.emptyBelow(wordShift, at-1, span)
		var versions []byte
		var vlow uint64
		if missing == 0 {
			c := (at - 1) >> chunkShift
			versions, _, missing, span = s.pg.lookup(v.versions, wordShift, c)
			vlow = v.versions.emptyBelow(wordShift, c, span)
		}
		s.mu.RUnlock()
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return 0, 0, deleting, err
			}
			continue
		}
		slice := max(size, (at-1)&^(unmapSlice-1))
		if blocks == nil && (versions == nil || !versionsIn(versions, slice, at)) {
			// Nothing here, and nothing in all that both trees lack below.
			low := slice
			if versions == nil {
				low = vlow << chunkShift
			}
			at = max(low, mlow)
			continue
		}
		return slice, at, deleting, nil
	}
	if deleting {
		return size, size, true, nil
	}
	// An empty trim at the new end records that the tail is gone.
	return size, size + 1, false, nil
}

// versionsIn says whether a leaf of versions has one for a chunk that begins in [from, to).
func versionsIn(leaf []byte, from, to uint64) bool {
	for c := (from + ChunkBlocks - 1) >> chunkShift; c<<chunkShift < to; c++ {
		if format.Word(leaf, int(c)&(format.WordsPerPage-1)) != 0 {
			return true
		}
	}
	return false
}
