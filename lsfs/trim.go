package lsfs

import (
	"context"
	"sync"
	"time"

	"github.com/twinsan/twinsan/lsfs/format"
)

// trimmer gives back the blocks behind the end of shrunken volumes, from the end, and what
// deletions and rollbacks leave (see shed.go), in small logged steps, so that it can
// stop anywhere and go on after a restart. Snapshots that a restart left half forged it
// deletes.
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
			if v.wasteful() {
				todo = append(todo, v)
			}
		}
		for _, n := range s.snapshots {
			if n.content.wasteful() {
				todo = append(todo, &n.content)
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

// wasteful says whether there is something to give back. The caller has Store.mu.
func (v *Volume) wasteful() bool {
	return v.deleting || v.stale || len(v.old) > 0 || v.size.Load() < v.tailEnd
}

// nextTrim says what the trimmer does with a volume or a snapshot: shed, end it, or neither.
// A snapshot that is stale is deleted first.
func (s *Store) nextTrim(v *Volume) (shed, gone, stale bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	empty := v.mapTree.top == 0 && v.versions.top == 0
	shed = len(v.old) > 0 || v.deleting && !empty
	return shed, v.deleting && !shed, v.stale && !v.deleting
}

// trim gives back what one volume or snapshot has no use for, and ends it if it is deleted.
func (s *Store) trim(v *Volume) error {
	t := &s.trimmer
	for ops := s.stats.ops.Load(); ; {
		began := time.Now()
		t.mu.Lock()
		ended := t.ended
		t.mu.Unlock()
		if ended {
			return nil
		}
		shed, gone, stale := s.nextTrim(v)
		leaves := int64(1)
		if !shed && !stale {
			leaves = shedLeaves
		}
		if !gone && !s.waitToShed(leaves) {
			return nil
		}
		switch {
		case stale:
			if err := s.post(&task{kind: taskForget, volume: v.id, of: v.id}); err != nil {
				return err
			}
			continue
		case shed:
			if err := s.post(&task{kind: taskShed, volume: v.id}); err != nil {
				return err
			}
			continue
		case gone:
			return s.post(&task{kind: taskGone, volume: v.id})
		}
		start, end, floor, err := s.nextTail(v)
		if err != nil {
			return err
		}
		if start == end {
			return nil
		}
		if err := s.post(&task{kind: taskTrim, volume: v.id, start: start, end: end, floor: floor}); err != nil {
			return err
		}
		// While clients are at work, half of the time is theirs.
		ops = s.yield(time.Since(began), ops, s.stop)
	}
}

// waitToShed waits until there is room for the pages that change when so many leaves are given back. It says whether
// the store goes on.
func (s *Store) waitToShed(leaves int64) bool {
	if s.roomToShed(leaves) >= leaves {
		return true
	}
	tick := time.NewTicker(cleanTick / 10)
	defer tick.Stop()
	for s.roomToShed(leaves) < leaves && s.failure() == nil {
		if s.pg.nDirty.Load() > 0 || s.reclaimable() {
			s.askCheckpoint()
		}
		s.cleaner.kick()
		select {
		case <-tick.C:
		case <-s.stop:
			return false
		}
	}
	return true
}

// nextTail finds the last slice of the tail that holds anything. When nothing is
// left but the tail itself it is an empty slice at the new end.
func (s *Store) nextTail(v *Volume) (start, end uint64, floor Seq, err error) {
	s.mu.RLock()
	size := v.size.Load()
	end, floor = v.tailEnd, v.floor
	s.mu.RUnlock()
	if end <= size {
		return size, size, floor, nil
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
				return 0, 0, floor, err
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
		return slice, at, floor, nil
	}
	// An empty trim at the new end records that the tail is gone.
	return size, size + 1, floor, nil
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
