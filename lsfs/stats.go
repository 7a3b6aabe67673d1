package lsfs

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/cache"
	"github.com/twinsan/twinsan/dedup"
)

// Histogram counts observations by powers of two: Counts[i] holds those below
// 1<<i (and not below 1<<(i-1)), of microseconds for times. The last takes the rest.
type Histogram struct {
	Counts [24]uint64
	Sum    uint64
}

type histogram struct {
	counts [24]atomic.Uint64
	sum    atomic.Uint64
}

func (h *histogram) add(v uint64) {
	h.counts[min(bits.Len64(v), len(h.counts)-1)].Add(1)
	h.sum.Add(v)
}

func (h *histogram) observe(d time.Duration) { h.add(uint64(d.Microseconds())) }

func (h *histogram) read() (r Histogram) {
	for i := range h.counts {
		r.Counts[i] = h.counts[i].Load()
	}
	r.Sum = h.sum.Load()
	return r
}

type counters struct {
	commit, flush, batch                  histogram
	ops, logBytes, blocksNew, blocksRef   atomic.Int64
	blocksZero, storedBytes               atomic.Int64
	pinHits, pinMisses                    atomic.Int64
	cleaned, cleanedBytes, cleanedPages   atomic.Int64
	checkpoints, checkpointPages          atomic.Int64
	pageReads, blockReads, deviceReads    atomic.Int64
	groupReads                            atomic.Int64
	checksumErrors, deviceErrors, repairs atomic.Int64
	spaceWaits, spaceRefused, pacedNanos  atomic.Int64
	rebuilt                               atomic.Int64
	relaxed                               atomic.Int64
	sharedReads, aheadBlocks, aheadFailed atomic.Int64
	warmBlocks                            atomic.Int64
	tryHits, tryMisses                    atomic.Int64 // of TryRead in vain: Read looks for the same blocks again
}

// Stats are counters since Open and a few levels, for metrics.
type Stats struct {
	CommitMicros Histogram // write and flush of a commit, microseconds
	FlushMicros  Histogram
	CommitOps    Histogram // operations in a commit

	Ops         int64 // operations committed
	Relaxed     int64 // commits that were left to a later flush
	Unflushed   int64 // bytes of log that wait for it
	LogBytes    int64 // bytes written to devices: the log, checkpoints, moved blocks
	BlocksNew   int64 // blocks stored
	BlocksRef   int64 // blocks that became references
	BlocksZero  int64
	StoredBytes int64 // bytes of the blocks stored, after compression

	PinHits, PinMisses int64

	SegmentsCleaned, CleanerBytes, CleanerPages int64
	ColdSegments                                int64 // that were left alone until their blocks were packed
	Recompressed                                int64 // cold blocks that the cleaner stored again with zstd, in groups or alone
	RecompressedWon                             int64 // bytes that this won
	Checkpoints, CheckpointPages                int64
	PageReads, BlockReads, DeviceReads          int64 // pages, blocks, I/Os for blocks
	GroupReads                                  int64 // groups of cold blocks that were decoded for reads
	SharedReads                                 int64 // blocks that were wanted while somebody read them, and were not read again
	AheadBlocks                                 int64 // blocks read ahead
	WarmBlocks                                  int64 // blocks that entered the cache when they were written
	ChecksumErrors, DeviceErrors, Repairs       int64
	SpaceWaits, SpaceRefused                    int64
	Paced                                       time.Duration // that operations were held back for the cleaner
	PagesRebuilt                                int64         // metadata pages made again from parity

	Segments      map[string]int // by state
	MappedBlocks  uint64         // of all volumes and their annexes
	ReclaimBlocks uint64         // of them, of deleted volumes: on their way back to free space
	UniqueBytes   int64          // stored bytes of blocks that are referenced
	Pages         int64          // ids of metadata pages in use
	IdentityPages int64          // of them, pages of block identities
	SharedPages   int64          // of them, those that more than one place leads to
	Snapshots     int
	PagesResident int64
	PagesDirty    int64
	MetadataBytes int64 // RAM of frames, bytes
	FixedBytes    int64 // RAM of the page directory and the segment table, bytes
	L1            cache.Stats
	L2            L2Stats
	Ring          bool // reads go through io_uring
	Index         dedup.IndexStats
	Poisoned      error
}

// WriteAmplification is how many bytes were written to the devices for each byte of new
// blocks since Open, metadata and cleaning included; 0 while nothing was stored.
func (s *Stats) WriteAmplification() float64 {
	if s.StoredBytes == 0 {
		return 0
	}
	return float64(s.LogBytes) / float64(s.StoredBytes)
}

// Room says how full the pool is, in bytes.
type Room struct {
	Size    int64 // of all segments
	Live    int64 // blocks that are referenced, and what their metadata takes in the long run
	Garbage int64 // in used segments, named by nothing; the cleaner gives it back
	Free    int64 // in free segments
	Usable  int64 // Live may grow up to here; beyond it new data gets ErrNoSpace
}

// Room returns the levels of the pool. It is free.
func (s *Store) Room() Room {
	r := Room{
		Size:   int64(s.segs.present.Load()) * int64(s.segs.bytes),
		Live:   s.charged(),
		Free:   int64(s.segs.nFree.Load()+s.segs.idle.Load()) * int64(s.segs.bytes),
		Usable: s.usable.Load(),
	}
	r.Garbage = max(0, r.Size-r.Free-s.segs.live.Load())
	return r
}

// Taken is the number of blocks that volumes map, and the stored bytes of blocks that
// are referenced: what Stats says of them, at the cost of a look at each volume.
func (s *Store) Taken() (mappedBlocks uint64, uniqueBytes int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, v := range s.volumes {
		mappedBlocks += v.mapped + v.annex
	}
	return mappedBlocks, s.segs.data.Load()
}

// Checkpoints is how many checkpoints were written since Open. It is free.
func (s *Store) Checkpoints() int64 { return s.stats.checkpoints.Load() }

// segmentsHeld is how many segments are looked at before the lock is free for a moment:
// a pool of 64 TiB has four million.
const segmentsHeld = 64 << 10

// eachSegments calls f for all segments, part by part, each under the read lock.
func (s *Store) eachSegments(f func(part []segment)) {
	for first, more := 0, true; more; first += segmentsHeld {
		s.mu.RLock()
		if all := s.segs.all; first < len(all) {
			f(all[first:min(first+segmentsHeld, len(all))])
		} else {
			more = false
		}
		s.mu.RUnlock()
	}
}

// Stats returns the counters. It takes the store's lock for short times, and as long as
// it takes to look at each segment.
func (s *Store) Stats() Stats {
	c := &s.stats
	st := Stats{
		CommitMicros: c.commit.read(), FlushMicros: c.flush.read(), CommitOps: c.batch.read(),
		Ops: c.ops.Load(), Relaxed: c.relaxed.Load(), Unflushed: s.Unflushed(), LogBytes: c.logBytes.Load(), BlocksNew: c.blocksNew.Load(), BlocksRef: c.blocksRef.Load(),
		BlocksZero: c.blocksZero.Load(), StoredBytes: c.storedBytes.Load(),
		PinHits: c.pinHits.Load(), PinMisses: c.pinMisses.Load(),
		SegmentsCleaned: c.cleaned.Load(), CleanerBytes: c.cleanedBytes.Load(), CleanerPages: c.cleanedPages.Load(),
		ColdSegments: s.cleaner.coldness.packed.Load(),
		Recompressed: s.cleaner.packing.blocks.Load(), RecompressedWon: s.cleaner.packing.won.Load(),
		Checkpoints: c.checkpoints.Load(), CheckpointPages: c.checkpointPages.Load(),
		PageReads: c.pageReads.Load(), BlockReads: c.blockReads.Load(), DeviceReads: c.deviceReads.Load(), GroupReads: c.groupReads.Load(),
		ChecksumErrors: c.checksumErrors.Load(), DeviceErrors: c.deviceErrors.Load(), Repairs: c.repairs.Load(),
		SpaceWaits: c.spaceWaits.Load(), SpaceRefused: c.spaceRefused.Load(), Paced: time.Duration(c.pacedNanos.Load()), PagesRebuilt: c.rebuilt.Load(),
		SharedReads: c.sharedReads.Load(), AheadBlocks: c.aheadBlocks.Load(), WarmBlocks: c.warmBlocks.Load(), Ring: s.reads.Ring(),
		L1: s.l1.Stats(), L2: s.l2Stats(), Index: s.index.Stats(), Poisoned: s.failure(),
		Segments: map[string]int{},
	}
	st.L1.Hits -= min(st.L1.Hits, uint64(c.tryHits.Load()))
	st.L1.Misses -= min(st.L1.Misses, uint64(c.tryMisses.Load()))
	var states [segmentStates]int
	s.eachSegments(func(part []segment) {
		for i := range part {
			states[part[i].state]++
		}
	})
	for i, name := range [segmentStates]string{"free", "next", "open", "sealed", "quarantine", "gone"} {
		if states[i] > 0 {
			st.Segments[name] = states[i]
		}
	}
	st.MappedBlocks, st.UniqueBytes = s.Taken()
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, v := range s.volumes {
		if v.deleting {
			st.ReclaimBlocks += v.mapped + v.annex
		}
	}
	st.Pages = int64(s.pg.n) - 1 - int64(len(s.pg.ids))
	st.Snapshots = len(s.snapshots)
	st.SharedPages, st.IdentityPages = s.pg.shared.Load(), s.pg.nEntries.Load()
	st.PagesResident, st.PagesDirty = s.pg.nUsed.Load(), s.pg.nDirty.Load()
	st.MetadataBytes, st.FixedBytes = int64(len(s.pg.slabs))*slabFrames*4096, s.fixedBytes()
	return st
}
