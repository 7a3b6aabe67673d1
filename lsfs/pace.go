package lsfs

import (
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs/format"
)

// Operations are slowed down before space runs short, so that they are never stopped:
// with x the part of the span of free segments that is left, each byte of an
// operation costs
//
//	cost × (1-x) / x
//
// nanoseconds of waiting. cost is what a byte took to be given back lately, so where x is
// a half operations run as fast as the cleaner; below it gains, above they do, and the two
// settle somewhere between, with no edge on the way. The same is done with metadata pages
// that wait for a checkpoint. A device that is fast enough is never waited for.
//
// The debt is paid between batches and not inside of them, and the committing role is
// free meanwhile: moves of the cleaner and cuts go on.
type pace struct {
	debt    time.Duration // of the committing role
	until   atomic.Int64  // monotonic ns before which no operation is taken; 0: none
	timer   *time.Timer
	cost    atomic.Int64 // ns per KiB that is given back
	freed   int64        // bytes since
	since   time.Time
	started time.Time
}

const (
	// reserveSegments are kept for the cleaner and checkpoints on top of what the
	// dirty pages of the moment need: the log's open segment and its successor, those of the
	// other streams, and the small parts of a checkpoint.
	reserveSegments = 8
	// paceLeast is the debt that is worth waiting for: a timer takes some 0.1 ms by itself.
	paceLeast = time.Millisecond
	// paceMost bounds the wait of one batch, and so what pacing adds to an operation.
	paceMost = 20 * time.Millisecond
	// costFirst is the cost before anything was measured: 200 MB/s. costMost is 4 MB/s.
	costFirst, costMost = 5 * 1024, 256 * 1024
)

func (p *pace) init(wake func()) {
	p.started = time.Now()
	p.cost.Store(costFirst)
	p.timer = time.AfterFunc(time.Hour, wake)
	p.timer.Stop()
}

// levels are the numbers of segments that pacing and cleaning go by.
type levels struct {
	free    int32
	coming  int32 // dead: checkpoints alone will free them
	reserve int32 // operations leave these alone
	span    int32 // over so many above the reserve operations are slowed down
}

// goal is how many free segments the cleaner works for.
func (l levels) goal() int32 { return l.reserve + l.span + l.span/4 }

// span is a 14th of the pool, and no more than 16 GiB.
func (s *Store) span() int32 {
	return int32(min(max(s.segs.size()/14, 4), 16<<30/int64(s.segs.bytes)))
}

// levels looks at all segments, or where that takes long goes by what it saw a moment
// ago. The cleaner's goroutine calls it.
func (s *Store) levels() levels {
	c := &s.cleaner
	l := levels{free: s.segs.nFree.Load(), reserve: s.reserve(), span: s.span()}
	start := time.Now()
	if start.Sub(c.counted) < 10*c.took {
		l.coming = c.coming
		return l
	}
	for low := 0; low < int(s.segs.numbers.Load()); low += scanSlice {
		s.mu.RLock()
		for i := low; i < min(low+scanSlice, len(s.segs.all)); i++ {
			seg := &s.segs.all[i]
			if seg.state == segmentQuarantine || seg.state == segmentSealed && seg.live+seg.pages == 0 {
				l.coming++
			}
		}
		s.mu.RUnlock()
	}
	c.coming, c.counted = l.coming, time.Now()
	c.took = c.counted.Sub(start)
	return l
}

// Where each page that changes is written anew, space that is to be given back takes space first. Who
// needs it stops one after the other, so that there is some for those that come later, and a checkpoint,
// without which nothing is ever given back, never finds none:
//
//	operations   reserve
//	sheds, trims roomToShed: what is deleted makes garbage, which the cleaner must be able to clean
//	moves        tight: the pages that are dirty are written before others get dirty, and where
//	             that does not help the rest of the segment stays for now
//	the cleaner  roomToClean
//	checkpoints
//
// All of it goes by the pages that a piece of work makes dirty at worst: another one for each block.

// reserve is the number of segments that operations leave alone: what the next piece of work takes, and twice what the
// pages that are dirty now need, because while they are written others become dirty.
func (s *Store) reserve() int32 {
	pages := s.pg.nDirty.Load() + s.ckpt.pending.Load()
	size := int64(s.segs.bytes)
	return int32(reserveSegments + (pageBytes(min(pieceMost, s.pg.nAlive.Load()))+2*(pages+pages/64)*format.PageSize)/size)
}

// movedPages is how many pages of identities change when live bytes of blocks move.
func (s *Store) movedPages(live int64) int64 {
	blocks := int64(float64(live) * float64(s.stored.Load()) / float64(max(s.segs.data.Load(), 1)))
	return min(blocks, s.pg.nAlive.Load())
}

// pieceBytes is what the pages take that the next piece of work makes dirty, when live bytes are to move.
func (s *Store) pieceBytes(live int64) int64 { return pageBytes(min(s.movedPages(live), pieceMost)) }

// pageBytes is what writing so many pages takes.
func pageBytes(pages int64) int64 { return pages * format.PageSize * 9 / 8 }

// unwritten is what the next checkpoint writes, as things are, and two small ones after it.
func (s *Store) unwritten() int64 {
	return pageBytes(s.pg.nDirty.Load()+s.ckpt.pending.Load()) + 2*s.ckpt.rootBytes.Load()
}

// unused is the bytes of free segments.
func (s *Store) unused() int64 { return int64(s.segs.nFree.Load()) * int64(s.segs.bytes) }

const (
	// pieceMost is the pages that a piece of work makes dirty that cannot be made smaller: an operation of
	// one block on a leaf that is shared, a leaf that is shed, moves.
	pieceMost = max(movesPerTask, format.WordsPerPage)
	// cleanSegments are what else is taken while a segment is cleaned: by the log, by the streams, and by
	// the small parts of checkpoints. tightSegments leave so many for cleaning one that holds pages.
	cleanSegments, tightSegments = 3, 6
	// tightRounds is how many checkpoints a segment takes from its last live byte until it is free.
	tightRounds = 2
)

// tight says whether there might be no room for the pages that are dirty and those that one more piece
// of work makes dirty. Who has the role then waits for checkpoints (relieve).
func (s *Store) tight() bool {
	return s.unused() < s.unwritten()+pageBytes(min(pieceMost, s.pg.nAlive.Load()))+tightSegments*int64(s.segs.bytes)
}

// roomForPages is how many pages operations may make dirty before the next look at the room.
func (s *Store) roomForPages() int64 {
	return (s.unused() - s.unwritten() - tightSegments*int64(s.segs.bytes)) * 8 / 9 / format.PageSize
}

// reclaimable says whether checkpoints alone give space back.
func (s *Store) reclaimable() (yes bool) {
	s.eachSegments(func(part []segment) {
		for i := range part {
			seg := &part[i]
			yes = yes || seg.state == segmentQuarantine || seg.state == segmentSealed && seg.live+seg.pages == 0
		}
	})
	return yes
}

// roomToShed is the leaves of maps, each with as many identities in as many pages, that can be taken
// away with the room that there is, at most most.
func (s *Store) roomToShed(most int64) int64 {
	spare := int64(tightSegments + 1)
	if s.cleaner.stuck.Load() {
		spare /= 2 // this is what can help now
	}
	room := s.unused() - s.unwritten() - spare*int64(s.segs.bytes)
	if pageBytes(s.pg.nAlive.Load()) <= room {
		return most
	}
	return max(0, min(most, room/pageBytes(format.WordsPerPage)))
}

// short says whether operations must wait for the cleaner.
func (s *Store) short() bool { return s.segs.nFree.Load() <= s.reserve() }

// low says whether the cleaner should work.
func (s *Store) low() bool { return s.segs.nFree.Load() <= s.reserve()+s.span()*9/8 }

// paused says whether operations wait to pay their debt.
func (s *Store) paused() bool {
	until := s.pacing.until.Load()
	return until != 0 && time.Since(s.pacing.started) < time.Duration(until)
}

// charge adds what a batch of n bytes, which made pages pages dirty, owes, and arranges the wait.
func (s *Store) charge(n int64, pages int64) {
	p := &s.pacing
	size := int64(s.segs.bytes)
	free := s.freeBytes() - int64(s.reserve())*size
	span := int64(s.span()) * size
	if free < span {
		owed := float64(p.cost.Load()) / 1024 * float64(n+pages*format.PageSize) * float64(span-free) / float64(max(free, span/64))
		p.debt += time.Duration(owed)
	}
	dirty := s.pg.nDirty.Load() + s.ckpt.pending.Load()
	if start := s.dirtySoft * 3 / 2; start < dirty {
		owed := float64(p.cost.Load()) / 1024 * float64(pages*format.PageSize) * float64(dirty-start) / float64(max(s.dirtyHard-dirty, (s.dirtyHard-start)/64))
		p.debt += time.Duration(owed)
	}
	if p.debt < paceLeast {
		p.debt -= p.debt / 8 // what nobody waits for is forgotten
		return
	}
	wait := min(p.debt, paceMost)
	p.debt = 0
	s.stats.pacedNanos.Add(int64(wait))
	p.until.Store(int64(time.Since(p.started) + wait))
	p.timer.Reset(wait)
}

// yield gives operations as much time as background work took, if there were any since
// ops, and returns the count to pass next time. It returns at once when stop is closed.
func (s *Store) yield(worked time.Duration, ops int64, stop <-chan struct{}) int64 {
	now := s.stats.ops.Load()
	if now == ops {
		return now
	}
	t := time.NewTimer(min(worked, cleanTick))
	defer t.Stop()
	select {
	case <-t.C:
	case <-stop:
	}
	return now
}

// gave notes that segments became free, for the cost of a byte.
func (s *Store) gave(segments int) {
	p := &s.pacing
	now := time.Now()
	p.freed += int64(segments) * int64(s.segs.bytes)
	took := now.Sub(p.since)
	if p.freed == 0 || took < 10*time.Millisecond {
		return
	}
	if s.low() && took < 10*time.Second {
		// Only while the cleaner is at work does this say how fast it is.
		was, is := p.cost.Load(), took.Nanoseconds()*1024/p.freed
		p.cost.Store(min(max((3*was+is)/4, 256), costMost))
	}
	p.freed, p.since = 0, now
}
