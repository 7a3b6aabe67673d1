package lsfs

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// TestLongCommits: Kick leaves long operations to the committer and returns while the device
// is at work; what waits meanwhile is one commit and not one for each.
func TestLongCommits(t *testing.T) {
	const parts, blocks = 8, 64 // the first, and seven that wait for it
	r := newRig(t, 1, 512<<20)
	err := Format(context.Background(), FormatConfig{Pool: [16]byte{7}, Key: testKey, Devices: r.names, SegmentBytes: 16 << 20, Force: true, OpenDevice: r.open})
	if err != nil {
		t.Fatal(err)
	}
	s := r.start()
	mustCreate(t, s, 1, parts*blocks)
	c := newClient(t, s)
	rng := rand.New(rand.NewPCG(1, 2))
	var done atomic.Int32
	ops := make([]*Op, parts)
	for i := range ops {
		data := make([]byte, blocks*dedup.BlockSize)
		for k := range data {
			data[k] = byte(rng.Uint32())
		}
		ops[i] = c.write(1, Seq(1+i), BlockNo(i*blocks), data)
		ops[i].Done = func(_ *Op, err error) {
			if err != nil {
				t.Error(err)
			}
			done.Add(1)
		}
	}
	disk := r.disks["disk0"]
	release := disk.Hold(devicetest.Write)
	commits := func() (n uint64) {
		for _, c := range s.Stats().CommitOps.Counts {
			n += c
		}
		return n
	}
	was := commits()
	s.Append(ops[0])
	s.Kick()
	until(t, "the committer has taken the first", func() bool {
		s.queue.mu.Lock()
		defer s.queue.mu.Unlock()
		return s.queue.head == nil && s.queue.busy
	})
	for _, op := range ops[1:] {
		s.Append(op)
		s.Kick()
	}
	if n := done.Load(); n != 0 {
		t.Errorf("%d operations are done while the device holds all writes", n)
	}
	release()
	until(t, "all are done", func() bool { return done.Load() == parts })
	if n := commits() - was; n != 2 {
		t.Errorf("%d commits for one write of 256 KiB and seven that came while it was written", n)
	}
	mustCheck(t, s)
	mustClose(t, s)
}
