package lsfs

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// Salvage begins a pool anew after a device that it cannot do without was lost, and keeps
// the blocks that stand on the others. Nothing else of the old pool survives: no volume,
// no version, no promise. What is kept has no name but its fingerprint, so whoever fills
// the volumes again by fingerprint finds it (Pin) and moves only what is missing.
//
//	members    the devices that are left; the others leave the list
//	survey     the head of each segment, and the segment table of the newest root if that can
//	           still be read: which segments may hold blocks, which are free
//	walk       those are read whole, fullest first; each block is compared with its checksum,
//	           decoded, and its fingerprint computed. One of each becomes an identity
//	           where it stands, under its old BID: so the records beside it lead the cleaner
//	           to it as before
//	super      the last checkpoint is the only one that writes superblocks
//
// The identities are mapped by one hidden volume, SalvageVolume, block by slot: that is
// what keeps them, so REFS, LIVE, replay and checks hold as for any other block, and the hold ends
// by the volume's deletion.
//
// Until the superblocks are written the devices say what they said before: a salvage that
// was interrupted is run again. The segments with the old root are not used till then. The new log
// cannot be taken for a continuation of the old one, nor the other way round: its sequence
// begins far above all that was found, behind a hash that was drawn.

// SalvageVolume is the hidden volume that maps the blocks a salvage kept. No caller may
// create it; EndSalvage deletes it.
const SalvageVolume VolumeID = 1 << 63

// ErrWhole says that a pool opens, without the missing devices if there are any: there
// is nothing to salvage.
var ErrWhole = errors.New("the pool opens by itself")

const (
	// salvageJump is the distance of the new log's sequence from everything that was
	// found: more commits than fit between the newest that was seen and the newest.
	salvageJump = 1 << 24
	// superblockJump is more checkpoints than a lost device can be ahead of the others.
	superblockJump = 1 << 20
	// salvageBatch is how many blocks are entered with one commit.
	salvageBatch = 512
	// salvageFill is the percentage of the usable size that salvaged blocks may take.
	salvageFill = 80
	// salvageHold is the percentage of the usable size from which on they go.
	salvageHold = 94
	// salvageWorkers bounds the segments that are read at the same time, 16 MiB of RAM each.
	salvageWorkers = 8
)

// SalvageReport says what a salvage found and kept.
type SalvageReport struct {
	Missing  []DeviceID // devices of the pool that were not there
	Devices  []string   // those that were, by path
	Hint     bool       // the newest root was readable: only what was in use is looked at
	Segments int        // that may hold blocks
	LetGo    int        // of them, those that were given up for want of room, or could not be read
	Read     int64      // bytes
	Blocks   int64      // kept
	Bytes    int64      // kept, as they are stored
	Again    int64      // blocks that were kept already
	Damaged  int64      // blocks and commits that were not what their checksums say
}

// SalvageProgress is how far a salvage is, in bytes.
type SalvageProgress struct{ Done, Total, Kept int64 }

// salvager is a salvage under way.
type salvager struct {
	c        *Config
	report   SalvageReport
	old      format.Superblock // the newest that was found
	walk     []uint32          // segments that may hold blocks, best first
	keep     []uint32          // segments with the old root
	bySeq    []bool            // of all segments: it was written by the log
	ages     []uint64          // and the commit that it begins with
	lastRoot *format.Root
}

// Salvage does so with the devices of a pool that no process serves. A pool that opens is left alone
// (ErrWhole). With dryRun nothing is written and blocks are not read. progress may be nil.
// Config.Persist is told the new list of devices at the end. RAM: as for Open, and one
// segment for each processor, up to eight.
func Salvage(ctx context.Context, c Config, dryRun bool, progress func(SalvageProgress)) (*SalvageReport, error) {
	x := &salvager{}
	if c.OpenDevice == nil {
		c.OpenDevice = func(path string) (device.Device, error) {
			return device.Open(path, device.Options{ReadOnly: dryRun})
		}
	}
	x.c = &c
	if err := x.mustBeBroken(ctx); err != nil {
		return nil, err
	}
	config := c
	config.salvage, config.L2, config.Catalogue = x, "", ""
	s, err := open(ctx, config)
	if err != nil {
		return nil, err
	}
	if dryRun {
		s.free()
		return &x.report, nil
	}
	s.ckpt.apart.Store(true)
	for _, loop := range []func(){s.committer, s.flushLoop, s.checkpointLoop} {
		s.running.Go(loop)
	}
	if err = s.salvage(ctx, x, progress); err == nil {
		err = s.checkpoint() // what a start falls back to
	}
	if err == nil {
		s.ckpt.apart.Store(false)
		err = s.checkpoint()
	}
	if err != nil {
		// Nothing more is written: the superblocks are those of before.
		s.poison(err)
	}
	devices, generation := s.Devices(), s.generation
	closed := s.Close()
	if err != nil {
		return nil, fmt.Errorf("salvage pool %x: %w", s.id, err)
	}
	if closed != nil {
		return nil, fmt.Errorf("salvage pool %x: %w", s.id, closed)
	}
	return &x.report, s.cfg.Persist(generation, devices)
}

// mustBeBroken refuses a pool that opens.
func (x *salvager) mustBeBroken(ctx context.Context) error {
	c := *x.c
	set, err := c.withDefaults()
	if err != nil {
		return err
	}
	members, sb, err := x.find(&set)
	if err != nil {
		return err
	}
	for _, m := range members {
		_ = m.Close()
	}
	for i := range sb.Members {
		if !slices.ContainsFunc(members, func(m *member) bool { return m.id == sb.Members[i].Device }) && sb.Members[i].State != format.MemberLost {
			c.Forget = append(c.Forget, sb.Members[i].Device)
		}
	}
	c.Event, c.Logger = nil, nil
	s, err := open(ctx, c)
	if err != nil {
		return ctx.Err()
	}
	s.free()
	if len(c.Forget) == 0 {
		return fmt.Errorf("%w, with all of its devices: start the node", ErrWhole)
	}
	return fmt.Errorf("%w without device %s: no metadata stood there. Give it up: twinsan store forget %s", ErrWhole, DeviceID(c.Forget[0]), DeviceID(c.Forget[0]))
}

// find opens the devices of the pool that are there, however old their state: blocks
// are believed for their checksums. The superblock is the newest.
func (x *salvager) find(c *Config) (members []*member, sb *format.Superblock, err error) {
	f := &finder{c: c, pool: c.Pool, paths: map[string]bool{}}
	defer func() {
		for _, d := range f.all {
			if d.dev != nil && !d.used {
				_ = d.dev.Close()
			}
		}
	}()
	for _, path := range c.Devices {
		f.look(path)
	}
	if c.Search != nil {
		for _, path := range c.Search() {
			f.look(path)
		}
	}
	if f.best == nil {
		return nil, nil, fmt.Errorf("salvage: none of the pool's devices is here%s", f.reasons())
	}
	if f.best.KeyCheck != keyCheck(c.Key) {
		return nil, nil, fmt.Errorf("salvage: pool %x was made with the key of another cluster", f.best.Pool)
	}
	for _, m := range f.best.Members {
		if m.State == format.MemberLost {
			continue
		}
		for _, d := range f.all {
			if d.sb == nil || d.used || d.sb.Pool != f.pool || d.sb.Device != m.Device ||
				d.dev.Size() < format.SuperblockArea+int64(m.Segments)*int64(f.best.SegmentBytes) {
				continue
			}
			d.used = true
			state := m.State
			if state == format.MemberJoining {
				state = format.MemberActive
			}
			members = append(members, &member{Metered: device.Meter(d.dev), id: m.Device, first: m.First, count: m.Segments, class: Class(m.Class), state: state})
			break
		}
	}
	return members, f.best, nil
}

// importDevices gives the store that is made anew its devices, and a superblock that is newer than
// anything a lost device may come back with.
func (x *salvager) importDevices(c *Config) (members []*member, sb *format.Superblock, err error) {
	if members, sb, err = x.find(c); err != nil {
		return nil, nil, err
	}
	x.old = *sb
	x.report = SalvageReport{}
	segments := 0
	for _, m := range sb.Members {
		if !slices.ContainsFunc(members, func(k *member) bool { return k.id == m.Device }) {
			x.report.Missing = append(x.report.Missing, m.Device)
		}
	}
	for _, m := range members {
		x.report.Devices = append(x.report.Devices, m.Path())
		if segments += int(m.count); m.state != format.MemberActive {
			segments -= int(m.count)
		}
	}
	if segments < segmentsMin {
		for _, m := range members {
			_ = m.Close()
		}
		return nil, nil, fmt.Errorf("salvage: %d segments of %d bytes are left: a pool needs at least %d", segments, sb.SegmentBytes, segmentsMin)
	}
	now := *sb
	now.Sequence += superblockJump
	now.Generation = max(sb.Generation, c.Generation) + 1
	now.Root, now.Previous, now.PreviousCheckpoint = nil, nil, 0
	return members, &now, nil
}

// begin takes the place of loading a root and replaying a log: the store is empty, and
// what may hold blocks is neither free nor given back until it was walked.
func (x *salvager) begin(s *Store) error {
	x.readRoot(s)
	newest, err := x.survey(s)
	if err != nil {
		return err
	}
	t := s.segs
	for _, m := range t.layout.Load().members {
		for n := m.first; n < m.first+m.count; n++ {
			t.all[n].state = segmentFree
		}
	}
	for _, n := range slices.Concat(x.keep, x.walk) {
		t.all[n].state = segmentOpen
	}
	t.recount()
	// Metadata of what is kept needs room, and so does the log that tells of it.
	need := 2*reserveSegments + t.active.Load()/16
	for t.nFree.Load() < need && len(x.walk) > 0 {
		n := x.walk[len(x.walk)-1]
		x.walk = x.walk[:len(x.walk)-1]
		t.setFree(n)
		x.report.LetGo++
	}
	if t.nFree.Load() < need {
		return fmt.Errorf("%d segments are free, %d are needed: %w", t.nFree.Load(), need, ErrNoSpace)
	}
	var drawn [24]byte
	_, _ = rand.Read(drawn[:])
	pos := format.Position{Segment: format.NoSegment, Next: t.take(s.logClass()), Seq: newest + salvageJump, Hash: [16]byte(drawn[8:]), Generation: binary.LittleEndian.Uint64(drawn[:])}
	s.nextBID = 1
	s.rootVersion.Store(s.cfg.RootVersion)
	c := &s.ckpt
	c.number, c.cuts, c.done, c.wanted = x.old.Checkpoint, x.old.Checkpoint, x.old.Checkpoint, x.old.Checkpoint
	s.groupsFrom(x.old.Checkpoint + 2)
	s.log.moveTo(pos)
	s.flush.written = pos.Seq
	s.flush.durable.Store(pos.Seq)
	s.pool.Durable = pos.Seq
	return nil
}

// readRoot reads the newest root that stands whole on the devices that are left. It is a
// hint: what it says is in use is looked at first.
func (x *salvager) readRoot(s *Store) {
	for _, extents := range [][]format.Extent{x.old.Root, x.old.Previous} {
		var raw []byte
		whole := len(extents) > 0
		for _, e := range extents {
			if !s.segs.valid(e.Addr, roundUp(e.Len)) {
				whole = false
				break
			}
			buf := device.AlignedBuffer(int(roundUp(e.Len)))
			d, off := s.segs.locate(e.Addr)
			err := d.ReadAt(buf, off)
			whole = whole && err == nil && format.Checksum(buf[:e.Len]) == e.Sum
			raw = append(raw, buf[:e.Len]...)
			device.FreeAligned(buf)
		}
		if !whole {
			continue
		}
		if root, err := format.ParseRoot(raw); err == nil && len(root.Live) == len(s.segs.all) && x.lastRoot == nil {
			x.lastRoot, x.report.Hint = root, true
		}
		for _, e := range extents {
			x.keep = append(x.keep, e.Addr.Segment())
		}
	}
	slices.Sort(x.keep)
	x.keep = slices.Compact(x.keep)
}

// survey reads the head of each segment and lists those that may hold blocks, the ones
// that are worth most first. newest is the highest sequence that was met.
func (x *salvager) survey(s *Store) (newest uint64, err error) {
	t := s.segs
	newest = x.old.Durable
	r := x.lastRoot
	if r != nil {
		newest = max(newest, r.Position.Seq)
	}
	x.bySeq, x.ages = make([]bool, len(t.all)), make([]uint64, len(t.all))
	worth := make([]uint64, len(t.all))
	var mu sync.Mutex // newest, walk
	var group sync.WaitGroup
	for _, m := range t.layout.Load().members {
		group.Go(func() {
			page := device.AlignedBuffer(format.PageSize)
			defer device.FreeAligned(page)
			var h format.Commit
			for n := m.first; n < m.first+m.count; n++ {
				if m.ReadAt(page, m.offset(t.bytes, format.MakeAddr(n, 0))) != nil ||
					format.ParseCommit(page, &h, s.id, n, 0, t.bytes) != nil {
					continue // never written, or nothing in it can be found
				}
				x.bySeq[n], x.ages[n] = h.Seq != 0, h.Seq
				blocks := h.Seq != 0 || page[format.CommitHeaderSize] == byte(format.RecordMove)
				switch {
				case r == nil: // what survived once is likely to be in use; of the log the newest
					worth[n] = max(h.Seq, 1)
					if h.Seq == 0 {
						worth[n] = 1 << 63
					}
				case r.Live[n] > 0:
					worth[n] = 1 + uint64(r.Live[n])
				case h.Seq > r.Position.Seq || n == r.Position.Segment || n == r.Position.Next:
					worth[n] = 1 << 32
				default:
					blocks = false
				}
				mu.Lock()
				newest = max(newest, h.Seq, h.Durable)
				if blocks && !slices.Contains(x.keep, n) {
					x.walk = append(x.walk, n)
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	slices.SortFunc(x.walk, func(a, b uint32) int {
		switch {
		case worth[a] != worth[b] && worth[a] > worth[b]:
			return -1
		case worth[a] != worth[b]:
			return 1
		}
		return int(int64(a) - int64(b))
	})
	x.report.Segments = len(x.walk)
	return newest, nil
}

// walked is what a worker found in a segment.
type walked struct {
	segment uint32
	blocks  []format.BlockEntry
	damaged int64
	err     error
}

// salvage walks the segments and enters their blocks. The store runs without cleaner.
func (s *Store) salvage(ctx context.Context, x *salvager, progress func(SalvageProgress)) error {
	if err := s.post(&task{kind: taskCreate, volume: SalvageVolume, blocks: VolumeBlocksMax}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	workers := min(runtime.GOMAXPROCS(0), salvageWorkers)
	todo, found := make(chan uint32), make(chan walked, workers)
	var group sync.WaitGroup
	defer func() {
		cancel()
		group.Wait()
	}()
	group.Go(func() {
		defer close(todo)
		for _, n := range x.walk {
			select {
			case todo <- n:
			case <-ctx.Done():
				return
			}
		}
	})
	for range workers {
		group.Go(func() {
			w := &walker{s: s, red: dedup.NewReducer(s.cfg.Key), buf: device.AlignedBuffer(int(s.segs.bytes))}
			defer device.FreeAligned(w.buf)
			for n := range todo {
				out := w.segment(n)
				select {
				case found <- out:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	size := int64(s.segs.bytes)
	at := SalvageProgress{Total: int64(len(x.walk)) * size}
	left := slices.Clone(x.walk)
	for range x.walk {
		var w walked
		select {
		case w = <-found:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !s.salvageRoom() {
			break
		}
		at.Done += size
		x.report.Read += size
		x.report.Damaged += w.damaged
		if w.err != nil {
			s.logger.Warn("a segment cannot be salvaged", "segment", w.segment, "err", w.err)
		}
		kept, err := s.adoptSegment(x, &w)
		if err != nil {
			return err
		}
		if kept == 0 && len(w.blocks) == 0 && w.err != nil {
			x.report.LetGo++
		}
		at.Kept = x.report.Bytes
		left[slices.Index(left, w.segment)] = format.NoSegment
		if progress != nil {
			progress(at)
		}
	}
	cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range slices.Concat(left, x.keep) {
		if n != format.NoSegment {
			s.segs.all[n].state = segmentSealed // nothing lives there: it comes back by itself
		}
	}
	for _, n := range left {
		if n != format.NoSegment {
			x.report.LetGo++
		}
	}
	return nil
}

// salvageRoom says whether more may be kept.
func (s *Store) salvageRoom() bool {
	return s.charged() < s.usable.Load()/100*salvageFill && s.segs.nFree.Load() > s.reserve()+s.segs.active.Load()/32+4
}

// adoptSegment enters the blocks of a segment that are not known yet, and seals it.
func (s *Store) adoptSegment(x *salvager, w *walked) (kept int, err error) {
	n := w.segment
	if s.worthKeeping(w) {
		slices.SortFunc(w.blocks, func(a, b format.BlockEntry) int {
			switch p, q := BID(a.BID), BID(b.BID); {
			case p.slot() != q.slot():
				return int(int64(p.slot()) - int64(q.slot()))
			default:
				return int(q.generation()) - int(p.generation()) // the newest of a slot first
			}
		})
		for list := w.blocks; len(list) > 0; {
			t := &task{kind: taskAdopt, volume: SalvageVolume, adopt: list[:min(len(list), salvageBatch)]}
			if err := s.post(t); err != nil {
				return kept, err
			}
			kept += t.adopted.blocks
			x.report.Blocks += int64(t.adopted.blocks)
			x.report.Bytes += t.adopted.bytes
			x.report.Again += int64(t.adopted.looked - t.adopted.blocks)
			list = list[t.adopted.looked:]
		}
	} else {
		x.report.LetGo++
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	seg := &s.segs.all[n]
	seg.state, seg.stream, seg.lastSeq = segmentSealed, streamLog, x.ages[n]
	if !x.bySeq[n] {
		seg.stream, seg.lastSeq = streamCold, x.old.Durable
		if s.segs.classOf(n) == Capacity {
			seg.stream = streamCapacity
		}
	}
	return kept, nil
}

// worthKeeping says whether what a segment adds is worth the room that it takes, while
// less than a quarter of the pool is free.
func (s *Store) worthKeeping(w *walked) bool {
	if s.segs.nFree.Load() >= s.segs.active.Load()/4 {
		return true
	}
	adds := uint32(0)
	for i := range w.blocks {
		s.mu.RLock()
		known, _ := s.stands(&w.blocks[i].Fingerprint)
		s.mu.RUnlock()
		if !known {
			adds += w.blocks[i].Share()
		}
	}
	return adds >= s.segs.bytes/8
}
