package lsfs

import (
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

// TestCopyBatch: operations that a resync copies share larger commits than others, and
// one that is written among them is in no larger commit than without them.
func TestCopyBatch(t *testing.T) {
	r := newRig(t, 1, 64<<20)
	s := r.start()
	mustCreate(t, s, 1, 4096)
	c := newClient(t, s)
	rng := testRand(1)
	piece := make([]byte, max(1, int(s.segs.bytes)/16/dedup.BlockSize-1)*dedup.BlockSize)
	blocks := BlockNo(len(piece) / dedup.BlockSize)
	seq := Seq(0)
	// run queues operations, c a copy and w a write each, and returns how many commits they took.
	run := func(kinds string) (commits uint64) {
		before := s.Stats().CommitOps
		s.enter()
		var group sync.WaitGroup
		for i, kind := range kinds {
			for k := range piece {
				piece[k] = byte(rng.Uint32())
			}
			op := c.write(1, 1, BlockNo(i)*blocks, piece)
			if op.Kind = OpCopy; kind == 'w' {
				seq++
				op.Kind, op.ID.Seq = OpWrite, seq
			}
			group.Add(1)
			op.Done = func(_ *Op, err error) {
				if err != nil {
					t.Error(err)
				}
				group.Done()
			}
			s.Append(op)
		}
		s.leave()
		s.Kick()
		group.Wait()
		for i, n := range s.Stats().CommitOps.Counts {
			commits += n - before.Counts[i]
		}
		return commits
	}
	for _, x := range []struct {
		kinds    string
		min, max uint64
	}{
		{"cccccccccccc", 3, 5},  // four to a commit, less where a segment ends
		{"wwwwwwwwwwww", 6, 8},  // two
		{"ccwccwccwccw", 6, 12}, // a batch ends where a write would make it too large
	} {
		if n := run(x.kinds); n < x.min || x.max < n {
			t.Errorf("%s: %d commits, want %d to %d", x.kinds, n, x.min, x.max)
		}
	}
	mustCheck(t, s)
	mustClose(t, s)
}
