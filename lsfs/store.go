package lsfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/cache"
	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Store is the log-structured store of one node: one pool of devices and the
// replicas of volumes on it. See the package comment for the flow and the locks.
type Store struct {
	cfg    Config
	logger *slog.Logger
	id     [16]byte          // UUID of the pool
	pool   format.Superblock // as last written; Index and Device vary by device. Of the checkpoint goroutine
	segs   *segmentTable
	index  *dedup.Index
	l1     *cache.Cache
	l2     *l2 // nil: none
	reads  *device.ReadPool

	rootVersion atomic.Uint32 // that is written

	mu         sync.RWMutex
	pg         *pager
	identities tree
	nextBID    BID    // slot behind the last one in use, see allot.go
	newest     uint16 // highest generation of an identity so far
	volumes    map[VolumeID]*Volume
	snapshots  map[VolumeID]*Snapshot
	generation uint64 // of the list of devices

	changing sync.Mutex // of the list of devices, one change at a time; comes before all other locks
	tiers    tiers

	pins     pinTable
	queue    queue
	log      logWriter
	flush    flusher
	batch    batch
	missing  []uint32 // scratch of the committing role
	faults   faulter
	words    [format.WordsPerPage]uint64
	ckpt     checkpointer
	cleaner  cleaner
	allotted allotment // of the committing role
	pacing   pace
	trimmer  trimmer
	scrub    scrubber
	merger   merger
	stats    counters

	explaining chan struct{} // who is explaining
	filled     chan struct{} // closed when fillIndex is through
	outgrown   error         // why the budget for metadata is too small, see keepBudget

	commitMax            int64        // bytes of the largest commit
	usable               atomic.Int64 // changes with the devices in use
	slack                int64
	dirtySoft, dirtyHard int64  // pages
	refsMax, refsLast    uint32 // see the constants of these names
	parentsMax           uint32
	parentsLast          uint32
	waiting              atomic.Int64 // stored bytes that are queued
	stored               atomic.Int64 // identities that are not dead
	onCommit             func()
	failed               atomic.Pointer[error]
	pageBufs             chan []byte
	pageMem              []byte // of pageBufs
	smallReaders         *readers
	largeReaders         *readers
	flights              *flights
	l2Failure            atomic.Pointer[error]
	ahead                chan aheadJob
	aheadMax             uint64       // blocks of the largest window; 0: nothing is read ahead
	waitingReads         atomic.Int32 // at the devices, for somebody who waits
	stop                 chan struct{}
	running              sync.WaitGroup
	committed            chan struct{}             // closed when the committer is gone
	openCatalogue        func() (catalogue, error) // nil: none

	// Only while opening.
	replaying bool
	adopting  bool // of the committing role of a salvage: a reference makes its identity
	visited   []bool
	scratch   []byte
}

// Open imports the devices of a pool, in any order, and brings its state to the
// end of the log. It refuses a missing, foreign, stale or cut device, another
// key, an unknown format version, and a log that lost what was durable
// (*CorruptError). The caller closes the store.
func Open(ctx context.Context, c Config) (*Store, error) {
	s, err := open(ctx, c)
	if err != nil {
		return nil, err
	}
	healed := 0
	if err = s.flushAll(); err == nil {
		healed, err = s.healSuperblocks()
	}
	if err != nil {
		s.free()
		return nil, fmt.Errorf("open pool %x: %w", s.id, err)
	}
	if s.outgrown != nil {
		s.cfg.Event(Event{Code: "metadata-ram-low", Text: s.outgrown.Error()})
	}
	if healed > 0 {
		s.logger.Info("superblocks written anew", "copies", healed)
	}
	s.mu.Lock()
	for _, m := range s.segs.layout.Load().members {
		if leaves(m.state) {
			m.begun = s.standsOn(m)
		}
	}
	generation := s.generation
	s.mu.Unlock()
	if err := s.cfg.Persist(generation, s.Devices()); err != nil {
		s.free()
		return nil, fmt.Errorf("open pool %x: record its devices: %w", s.id, err)
	}
	for _, loop := range []func(){s.committer, s.flushLoop, s.checkpointLoop, s.cleanLoop, s.trimLoop, s.fillIndex, s.scrubLoop, s.mergeLoop} {
		s.running.Go(loop)
	}
	if s.aheadMax > 0 {
		for range aheadReaders {
			s.running.Go(s.aheadLoop)
		}
	}
	if blocks, held := s.Salvaged(); held {
		s.cfg.Event(Event{Code: "salvaged", Text: fmt.Sprintf("%d blocks that a salvage kept are held until the replicas of this node are filled again", blocks)})
		// Whoever fills this store asks at once for what was kept.
		select {
		case <-s.filled:
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), s.Close())
		}
	}
	if s.openL2(); s.l2 != nil && s.l2.flash != nil {
		s.running.Go(s.l2Loop)
	}
	return s, nil
}

// open is Open without goroutines: nothing is written.
func open(ctx context.Context, c Config) (s *Store, err error) {
	if c, err = c.withDefaults(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	find := importDevices
	if c.salvage != nil {
		find = c.salvage.importDevices
	}
	members, sb, err := find(&c)
	if err != nil {
		return nil, err
	}
	s = &Store{cfg: c, logger: c.Logger, id: sb.Pool, pool: *sb, volumes: make(map[VolumeID]*Volume), snapshots: make(map[VolumeID]*Snapshot), stop: make(chan struct{}), committed: make(chan struct{}), filled: make(chan struct{}), explaining: make(chan struct{}, 1)}
	made := s
	defer func() {
		if err != nil {
			made.free()
		}
	}()
	if s.segs, err = newSegmentTable(members, sb.Segments, sb.SegmentBytes); err != nil {
		for _, m := range members {
			_ = m.Close()
		}
		return nil, err
	}
	s.generation = sb.Generation
	s.visited = make([]bool, s.segs.count())
	size := s.segs.size() * int64(sb.SegmentBytes)
	s.commitMax = min(int64(sb.SegmentBytes), OpBytesMax+(1<<20))
	reserved := s.cfg.reserve(size, s.segs.count())
	s.pg = newPager(s.cfg.MetadataBytes)
	s.bounds()
	s.usable.Store(s.usableOf(size))
	s.slack = max(size/128, int64(sb.SegmentBytes)/2)
	s.refsMax, s.refsLast, s.parentsMax, s.parentsLast = refsMax, refsLast, parentsMax, parentsLast
	s.pins.init()
	s.flush.init()
	s.missing = make([]uint32, 0, 32*faultsAtOnce)
	s.queue.wake.L = &s.queue.mu
	s.log.hasher = keyedHasher(c.Key)
	s.batch.buf = device.AlignedBuffer(int(s.commitMax))
	s.pageBufs = make(chan []byte, 32)
	s.pageMem = device.AlignedBuffer(cap(s.pageBufs) * format.PageSize)
	for i := range cap(s.pageBufs) {
		s.pageBufs <- s.pageMem[i*format.PageSize:][:format.PageSize:format.PageSize]
	}
	s.smallReaders, s.largeReaders = newReaders(smallReads), newReaders(largeReads)
	s.flights = newFlights()
	s.reads = device.NewReadPool(0)
	ck := &s.ckpt
	ck.cond.L = &ck.mu
	ck.limitBytes = min(c.CheckpointBytes, max(size/16, 2*int64(sb.SegmentBytes)))
	ck.limitDirty = func() bool { return s.dirtySoft <= s.pg.nDirty.Load() }
	ck.start = make(chan struct{}, 1)
	ck.buf = device.AlignedBuffer((s.stagePages() + 2) * format.PageSize)
	s.ckpt.out.init(streamPages)
	s.cleaner.init()
	s.pacing.init(s.wake)
	s.trimmer.init()
	s.scrub.init(&c)
	s.merger.init()
	if c.Catalogue != "" {
		s.openCatalogue = func() (catalogue, error) { return openBadgerCatalogue(c.Catalogue, s.id, c.Logger) }
	}
	s.tiers.init()
	if s.index, err = dedup.NewIndex(c.IndexBytes); err != nil {
		return nil, err
	}
	if s.l1, err = cache.New(c.L1Bytes); err != nil {
		return nil, err
	}
	// What is read ahead enters the cache's small queue, a tenth of it: a window that is
	// longer than a quarter of that would push out what was not used yet.
	s.aheadMax = uint64(min(max(c.ReadAhead, 0), s.l1.Stats().Capacity/40) / dedup.BlockSize)
	s.ahead = make(chan aheadJob, aheadJobs)
	load := s.recover
	if c.salvage != nil {
		load = func() error { return c.salvage.begin(s) }
	}
	if err = load(); err != nil {
		return nil, fmt.Errorf("open pool %x: %w", sb.Pool, s.explainLost(err))
	}
	s.keepBudget(reserved)
	if err = s.markLost(); err != nil {
		return nil, fmt.Errorf("open pool %x: %w", sb.Pool, s.explainLost(err))
	}
	return s, nil
}

// free gives memory and devices back. No goroutine runs any more.
func (s *Store) free() {
	if s.reads != nil {
		s.reads.Close()
	}
	if s.segs != nil {
		for _, m := range s.segs.layout.Load().members {
			if err := m.Close(); err != nil {
				s.logger.Warn("close device", "device", m.Path(), "err", err)
			}
		}
		s.segs.close()
	}
	if s.index != nil {
		s.index.Close()
	}
	if s.l1 != nil {
		_ = s.l1.Close()
	}
	if s.l2 != nil {
		s.l2.free(s)
	}
	if s.pg != nil {
		s.pg.close()
	}
	device.FreeAligned(s.batch.buf)
	s.faults.free()
	device.FreeAligned(s.ckpt.buf)
	s.tiers.close()
	device.FreeAligned(s.pageMem)
	if s.largeReaders != nil {
		s.smallReaders.close()
		s.largeReaders.close()
	}
}

// Close ends the store: operations that were appended are committed, a last
// checkpoint makes the next start short, and all goroutines are gone on return.
// The caller must not use the store or its volumes at the same time or later.
func (s *Store) Close() error {
	close(s.stop)
	s.trimmer.stopNow()
	s.scrub.stopNow()
	s.merger.stopNow()
	s.Kick()
	// Operations that wait for room need the cleaner.
	err := s.drain(func() bool { return s.queue.head != nil })
	s.cleaner.stopNow()
	if err == nil {
		err = s.drain(func() bool { return len(s.queue.tasks) > 0 })
	}
	if err == nil && s.ckpt.changed.Load() {
		err = s.checkpoint()
	}
	if err == nil {
		err = s.flushLog()
	}
	s.ckpt.mu.Lock()
	s.ckpt.closed = true
	s.ckpt.cond.Broadcast()
	for s.ckpt.running {
		s.ckpt.cond.Wait()
	}
	s.ckpt.mu.Unlock()
	s.queue.mu.Lock()
	s.queue.closed = true
	s.queue.wake.Broadcast()
	s.queue.mu.Unlock()
	// The committer may still take a cut of its own until it sees closed; it sends no
	// more starts once it is gone.
	<-s.committed
	close(s.ckpt.start)
	s.running.Wait()
	s.pacing.timer.Stop()
	s.free()
	return err
}

// drain waits until nobody commits and nothing is left. left is called with queue.mu.
func (s *Store) drain(left func() bool) error {
	q := &s.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.busy || left() {
		q.wake.Broadcast()
		q.wake.Wait()
	}
	return s.failure()
}

// OnCommit sets a hook that is called once after the Done calls of each commit,
// on the committing goroutine. It must not block. Set it before the first Append.
func (s *Store) OnCommit(f func()) { s.onCommit = f }

// failure is the error that stopped the store, nil while it works.
func (s *Store) failure() error {
	if p := s.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// poison stops the store for good: the first reason stays.
func (s *Store) poison(err error) {
	if !errors.Is(err, ErrPoisoned) {
		err = fmt.Errorf("%w: %w", ErrPoisoned, err)
	}
	if s.failed.CompareAndSwap(nil, &err) {
		s.stats.deviceErrors.Add(1)
		s.logger.Error("store stopped", "err", err)
		s.cfg.Event(Event{Code: "poisoned", Text: "the store is stopped: what the device holds is not known", Err: err})
	}
	s.ckpt.mu.Lock()
	s.ckpt.cond.Broadcast()
	s.ckpt.mu.Unlock()
	s.wake()
}

// report counts a corruption and tells it as an event. It returns its argument.
func (s *Store) report(e *CorruptError) error {
	s.stats.checksumErrors.Add(1)
	s.logger.Error("corrupt data", "device", e.Device, "segment", e.Segment, "bid", e.BID, "err", e)
	s.cfg.Event(Event{Code: "corrupt", Text: e.Error(), Err: e})
	return e
}

// eachEntryPage calls f under the read lock for each identity page, in order,
// until stop is closed. first is the slot of its first entry: see identityAt.
func (s *Store) eachEntryPage(stop <-chan struct{}, f func(first BID, page []byte)) error {
	for i := uint64(0); ; {
		select {
		case <-stop:
			return nil
		default:
		}
		s.mu.RLock()
		data, _, missing, span := s.pg.lookup(s.identities, entryShift, i)
		if data != nil {
			f(BID(i), data)
		}
		end := i >= uint64(s.nextBID)
		s.mu.RUnlock()
		switch {
		case missing != 0:
			if err := s.fault(missing, false); err != nil {
				return err
			}
			continue
		case end:
			return nil
		}
		if i = nextSpan(i, max(span, entryShift)); i == ^uint64(0) {
			return nil
		}
	}
}
