package lsfs

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

// TestCheckpointFits: in a pool that is as full as it gets, whose snapshots come and go while all of it is
// overwritten at random, nearly all pages of metadata change between two checkpoints. Space for
// a checkpoint is always left: one that finds none stops the store.
func TestCheckpointFits(t *testing.T) {
	for _, size := range []int{480, 1200} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { checkpointsFit(t, size/8, 400) })
	}
}

// checkpointsFit overwrites blocks of so many words that do not compress.
func checkpointsFit(t *testing.T, words, rounds int) {
	ctx := context.Background()
	const seed = 1
	r := newRig(t, seed, 40<<20)
	r.opts = func(c *Config) { c.ScrubInterval, c.MergeInterval, c.ReadAhead = -1, -1, -1 }
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, 256<<10)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(seed, 8))
	seq, n := Seq(0), uint64(0)
	var flying sync.WaitGroup
	write := func(at, count int) {
		data := make([]byte, count*dedup.BlockSize)
		for i := range count {
			n++
			b := data[i*dedup.BlockSize:]
			for k := range words {
				binary.LittleEndian.PutUint64(b[8*k:], n*uint64(k+1)*0x9e3779b97f4a7c15)
			}
		}
		seq++
		op := c.write(1, seq, BlockNo(at), data)
		flying.Add(1)
		op.Done = func(_ *Op, err error) {
			if err != nil && !t.Failed() {
				t.Error(err)
			}
			flying.Done()
		}
		s.Append(op)
	}
	wait := func() {
		s.Kick()
		flying.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	used := 0
	for ; float64(s.Room().Live) < 0.90*float64(s.Room().Usable); used += 64 {
		write(used, 64)
		wait()
	}
	least := s.segs.nFree.Load()
	for i := range rounds {
		for range 32 {
			write(rng.IntN(used), 1)
		}
		wait()
		least = min(least, s.segs.nFree.Load())
		all := s.Snapshots(1)
		if len(all) > 0 && float64(s.Room().Live) >= 0.95*float64(s.Room().Usable) {
			if err := s.DeleteSnapshot(ctx, all[0].ID()); err != nil {
				t.Fatal(err)
			}
		}
		if i%50 == 49 {
			seq++
			c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: VolumeID(100 + i)})
		}
	}
	t.Logf("used %d least free %d, %d checkpoints of %d pages, %d segments cleaned, at the end: free %d reserve %d span %d alive %d", used, least, s.Checkpoints(), s.Stats().CheckpointPages, s.Stats().SegmentsCleaned, s.segs.nFree.Load(), s.reserve(), s.span(), s.pg.nAlive.Load())
	mustCheck(t, s)
	mustClose(t, s)
}
