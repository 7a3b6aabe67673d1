package lsfs

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Read-ahead: a reader that goes through a volume in order finds the next blocks in
// the cache. It changes no answer: what is read ahead enters the cache under its block
// identity, and the map says at the time of the read which identity is wanted.
const (
	// streamsMax is how many streams of one volume are followed; the one that was
	// quiet longest gives way.
	streamsMax = 8
	// streamSlack is how far from its end a read still belongs to a stream: commands
	// that are in flight together arrive in any order.
	streamSlack = 256
	// aheadStart is the first window in blocks: 256 KiB. It doubles up to the
	// configured one while the stream goes on.
	aheadStart = 64
	// aheadPart is read ahead at once: a reader that wants the first block of it waits for all.
	aheadPart = 64
	// aheadAfter is how many blocks must have been read of a stream, in at least two reads.
	aheadAfter = 8
	// aheadReaders read ahead at the same time, and aheadJobs wait for them; what comes
	// beyond is not read ahead.
	aheadReaders = 2
	aheadJobs    = 64
	// aheadYield is how many reads may be at the devices for somebody who waits;
	// with more, nothing is read ahead.
	aheadYield = 8
	// aheadDeep is how many bytes a host has in flight when it reads ahead by itself, or
	// in pieces so long that the copy through the cache costs more than waiting: with
	// 1 MiB and more a tenth of the processor time.
	aheadDeep = 512 << 10

	defaultReadAhead = 4 << 20
)

// stream is one reader that goes through a volume in order.
type stream struct {
	next   uint64 // block behind the last one read; 0: no stream
	ahead  uint64 // block behind the last one that was read ahead
	begin  uint64 // block from which on it is measured
	got    uint64 // blocks read from there to next: three quarters of all, else it is no stream
	reads  int
	window uint64 // blocks
	used   uint64 // time of the last read, in reads of the volume
	life   uint32 // changes when another stream takes the place
}

// streams finds the streams among the reads of one volume.
type streams struct {
	live     atomic.Int32 // streams with a window
	inFlight atomic.Int64 // bytes that are being read for somebody who waits

	mu   sync.Mutex
	time uint64
	all  [streamsMax]stream
}

// aheadJob is a part of a volume to be read ahead.
type aheadJob struct {
	v      *Volume
	stream int
	life   uint32
	start  uint64
	count  int
}

// hit follows a read that the cache answered. It costs an atomic load while the
// volume has no streams, and gives up when somebody else is looking.
func (v *Volume) hit(off uint64, n int) {
	if v.streams.live.Load() > 0 && v.streams.mu.TryLock() {
		v.followLocked(off, n, false)
	}
}

// miss follows a read that goes to the devices. It says whether the read is part of a
// stream that needs no cache to be fast: what it reads is likely to be read once.
func (v *Volume) miss(off uint64, n int) (passing bool) {
	if v.s.aheadMax > 0 && off < uint64(AnnexStart)*dedup.BlockSize {
		v.streams.mu.Lock()
		return v.followLocked(off, n, true)
	}
	return false
}

// followLocked finds the stream that a read belongs to, or begins one, and has the
// next blocks read ahead, or says that it is passing: so much of it is in flight that nothing
// is gained by the cache. It gives the lock up.
func (v *Volume) followLocked(off uint64, n int, begin bool) (passing bool) {
	t := &v.streams
	defer t.mu.Unlock()
	first, end := off/dedup.BlockSize, (off+uint64(n)+dedup.BlockSize-1)/dedup.BlockSize
	t.time++
	// What is in flight may come before this read or behind it: commands are begun by goroutines that
	// overtake each other. It counts as read where that matters, with large commands.
	slack, flight := uint64(streamSlack), uint64(0)
	deep := t.inFlight.Load() >= aheadDeep
	if deep {
		flight = uint64(t.inFlight.Load()) / dedup.BlockSize
		slack += flight
	}
	oldest := &t.all[0]
	for i := range t.all {
		st := &t.all[i]
		if st.used < oldest.used {
			oldest = st
		}
		if st.next == 0 || first > st.next+slack || end+slack < st.next {
			continue
		}
		st.used = t.time
		st.reads++
		st.next = max(st.next, end)
		st.begin = min(st.begin, first)
		st.got = min(st.got+end-first, st.next-st.begin)
		if st.next-st.begin > 2*slack {
			st.begin, st.got = st.begin+(st.next-st.begin)/2, st.got/2
		}
		switch dense := 4*(st.got+flight) >= 3*(st.next-st.begin); {
		case !dense && st.window > 0:
			st.window = 0
			t.live.Add(-1)
			fallthrough
		case !dense:
			st.begin, st.got, st.reads, st.ahead = first, end-first, 1, end
			st.next = end
		case deep:
			return st.reads >= 2 && st.got >= aheadAfter
		case end == st.next && st.reads >= 2 && st.got >= aheadAfter:
			v.readAhead(i, st)
		}
		return false
	}
	if !begin {
		return false
	}
	if oldest.window > 0 {
		t.live.Add(-1)
	}
	*oldest = stream{next: end, ahead: end, begin: first, got: end - first, reads: 1, used: t.time, life: oldest.life + 1}
	return false
}

// readAhead asks for the blocks up to the stream's window, when half of it is used up.
func (v *Volume) readAhead(i int, st *stream) {
	s := v.s
	if st.window == 0 {
		st.window = min(aheadStart, s.aheadMax)
		v.streams.live.Add(1)
	} else if st.ahead < st.next+st.window/2 {
		st.window = min(2*st.window, s.aheadMax)
	} else {
		return
	}
	st.ahead = max(st.ahead, st.next)
	for end := min(st.next+st.window, v.size.Load()); st.ahead < end; {
		n := min(end, (st.ahead/aheadPart+1)*aheadPart) - st.ahead
		select {
		case s.ahead <- aheadJob{v: v, stream: i, life: st.life, start: st.ahead, count: int(n)}:
		default:
			return // the readers do not keep up: the stream reads for itself
		}
		st.ahead += n
	}
}

// gone says that the stream has ended, or has passed the job.
func (j *aheadJob) gone() bool {
	t := &j.v.streams
	t.mu.Lock()
	defer t.mu.Unlock()
	st := &t.all[j.stream]
	return st.life != j.life || j.start+uint64(j.count) <= st.next
}

// aheadLoop reads ahead, with a context of its own: nobody who waits is kept from one.
func (s *Store) aheadLoop() {
	rc := newContext(s, aheadPart)
	rc.ahead = true
	defer rc.free()
	for {
		select {
		case <-s.stop:
			return
		case j := <-s.ahead:
			if s.waitingReads.Load() < aheadYield && s.failure() == nil && !j.gone() {
				s.runAhead(rc, &j)
			}
		}
	}
}

// runAhead reads one part into the cache. What is wrong with it is found again, and
// told, when somebody wants it.
func (s *Store) runAhead(rc *readContext, j *aheadJob) {
	rc.to, rc.ended = target{first: j.start}, s.flights.ended.Load()
	if j.v.resolve(context.Background(), rc, j.start, j.count, rc.cached) != nil {
		return
	}
	s.stats.aheadBlocks.Add(int64(len(rc.blocks)))
	if s.fetchOnce(rc, j.v) != nil {
		s.stats.aheadFailed.Add(1)
	}
	s.letGo(rc)
}

// newContext makes a read context for n blocks.
func newContext(s *Store, n int) *readContext {
	rc := &readContext{
		s:      s,
		buf:    device.AlignedBuffer(n * 2 * format.PageSize), // every block alone: at most two pages each
		blocks: make([]located, 0, n),
		runs:   make([]device.Read, n),
		batch:  make([]*device.Read, 0, n),
	}
	rc.cached, rc.give = rc.fromCache, rc.deliver
	return rc
}

func (rc *readContext) free() { device.FreeAligned(rc.buf) }
