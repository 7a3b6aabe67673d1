package lsfs

import (
	"testing"
	"time"

	"github.com/twinsan/twinsan/dedup"
)

// TestPackCold: what is written once, and leaves no garbage, is packed by itself when it is old; what
// would not get shorter is not written again. Nothing is done to what is young, or read.
func TestPackCold(t *testing.T) {
	const blocks = 1200
	content := func(i uint64) []byte {
		if i < blocks/2 {
			return prose(i)
		}
		return noise(i + 1)
	}
	r := newRig(t, 1, 64<<20)
	r.opts = func(c *Config) {
		c.ScrubInterval, c.MergeInterval, c.ReadAhead = -1, -1, -1
		c.ColdAfter = coldSamples * time.Hour
	}
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, blocks)
	c, seq := newClient(t, s), Seq(0)
	fill(c, 1, &seq, blocks/2, content)
	for i := uint64(blocks / 2); i < blocks; i++ {
		seq++
		c.must(c.write(1, seq, BlockNo(i), content(i)))
	}
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	if before, ok := s.cleaner.coldness.coldBefore(); ok {
		t.Fatalf("in the first hours what was written before %d is cold", before)
	}
	stored := s.segs.data.Load()
	mustClose(t, s)
	if n := s.cleaner.coldness.packed.Load(); n != 0 {
		t.Fatalf("%d segments were packed while they were young", n)
	}

	r.cfg.ColdAfter = coldSamples * time.Millisecond
	s = r.start()
	<-s.filled
	warm := s.Volume(1)
	s.mu.Lock()
	var read uint32
	for n := range s.segs.all {
		if seg := &s.segs.all[n]; seg.state == segmentSealed && seg.live > 0 && seg.stream == streamLog {
			read = uint32(n)
			seg.heat.Store(1 << 31)
			break
		}
	}
	s.mu.Unlock()
	if err := s.checkpoint(); err != nil { // from here on no older program can open the pool
		t.Fatal(err)
	}
	eventually(t, "the cold segments are packed", func() bool {
		s.mu.RLock()
		defer s.mu.RUnlock()
		s.segs.all[read].heat.Store(1 << 31) // it is halved all the time
		before := s.log.clock.Load()
		for n := range s.segs.all {
			if uint32(n) != read && s.cold(uint32(n), before, 1<<62) {
				return false
			}
		}
		return true
	})
	st := s.Stats()
	if now := s.segs.data.Load(); now > stored*9/10 || st.RecompressedWon != stored-now {
		t.Errorf("%d bytes were stored, %d are; %d were won", stored, now, st.RecompressedWon)
	}
	if n := s.cleaner.packing.groups.Load(); n < 40 {
		t.Errorf("%d groups", n)
	}
	// Half of the blocks are noise.
	if st.CleanerBytes > blocks/4*dedup.BlockSize {
		t.Errorf("%d bytes were moved", st.CleanerBytes)
	}
	s.mu.RLock()
	if seg := &s.segs.all[read]; seg.state != segmentSealed || seg.stream != streamLog || seg.live == 0 {
		t.Error("what is read often was packed")
	}
	s.mu.RUnlock()
	mustRead(t, warm, blocks, content)
	mustCheck(t, s)
	mustClose(t, s)
	s = r.start()
	mustRead(t, s.Volume(1), blocks, content)
	mustCheck(t, s)
	mustClose(t, s)
}
