package lsfs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// The explorer drives a store by one goroutine, without the background ones whose
// moments are chance, so that a seed is one history of writes and flushes. Cleaning,
// trimming and checkpoints are steps like any other, and a checkpoint may be cut by
// one step and written by a later one.

// site is the model of a store: volumes by id. A volume is never changed in place.
type site struct {
	vols  map[VolumeID]*siteVolume
	snaps map[VolumeID]*siteVolume // content of snapshots, without an annex
	last  VolumeID
}

// siteVolume is what callers see of a volume: numbers of stock blocks (0: a hole),
// chunk versions, meta.
type siteVolume struct {
	part [2]sitePart // the volume, its annex
	meta Meta
}

type sitePart struct {
	blocks   []uint16
	versions []Seq
}

// annexExplored is how much of each annex the explorer uses.
const annexExplored = 1100

func newSiteVolume(blocks uint64, replica [16]byte) *siteVolume {
	v := &siteVolume{meta: Meta{Replica: replica}}
	v.part[0] = sitePart{make([]uint16, blocks), make([]Seq, (blocks+ChunkBlocks-1)/ChunkBlocks)}
	v.part[1] = sitePart{make([]uint16, annexExplored), make([]Seq, (annexExplored+ChunkBlocks-1)/ChunkBlocks)}
	return v
}

func (v *siteVolume) clone() *siteVolume {
	c := *v
	for i := range c.part {
		c.part[i] = sitePart{slices.Clone(v.part[i].blocks), slices.Clone(v.part[i].versions)}
	}
	return &c
}

// partOf splits a block number into the part and the place in it.
func partOf(b BlockNo) (int, uint64) {
	if AnnexStart <= b {
		return 1, uint64(b - AnnexStart)
	}
	return 0, uint64(b)
}

func partStart(i int) BlockNo { return BlockNo(i) * AnnexStart }

func (v *siteVolume) put(start BlockNo, nums []uint16, seq Seq) {
	i, at := partOf(start)
	p := &v.part[i]
	copy(p.blocks[at:], nums)
	for c := at >> chunkShift; c <= (at+uint64(len(nums))-1)>>chunkShift; c++ {
		p.versions[c] = seq
	}
}

// unmap clears n blocks. Chunks that hold none of them keep their versions; a leaf that
// lies wholly inside counts as one.
func (v *siteVolume) unmap(start BlockNo, n uint64, seq Seq) {
	i, at := partOf(start)
	p := &v.part[i]
	for from := at; from < at+n; {
		to := min(at+n, nextSpan(from, wordShift))
		if from%format.WordsPerPage != 0 || to != nextSpan(from, wordShift) {
			to = min(at+n, nextSpan(from, chunkShift))
		}
		if slices.ContainsFunc(p.blocks[from:to], func(b uint16) bool { return b != 0 }) {
			v.put(start+BlockNo(from-at), make([]uint16, to-from), seq)
		}
		from = to
	}
}

func (v *siteVolume) resize(n uint64) {
	p := &v.part[0]
	blocks, versions := make([]uint16, n), make([]Seq, (n+ChunkBlocks-1)/ChunkBlocks)
	copy(blocks, p.blocks)
	copy(versions, p.versions)
	v.part[0] = sitePart{blocks, versions}
}

// with gives the model in which volume id is v; nil takes it away.
func (m *site) with(id VolumeID, v *siteVolume) *site {
	n := &site{maps.Clone(m.vols), m.snaps, max(m.last, id)}
	if v == nil {
		delete(n.vols, id)
	} else {
		n.vols[id] = v
	}
	return n
}

// withSnapshot is the same for snapshots.
func (m *site) withSnapshot(id VolumeID, v *siteVolume) *site {
	n := &site{m.vols, map[VolumeID]*siteVolume{}, max(m.last, id)}
	maps.Copy(n.snaps, m.snaps)
	if v == nil {
		delete(n.snaps, id)
	} else {
		n.snaps[id] = v
	}
	return n
}

func (m *site) ids() []VolumeID { return slices.Sorted(maps.Keys(m.vols)) }

// stockBlock is a block that the explorer writes, reduced once for all.
type stockBlock struct {
	plain []byte
	block dedup.Block
}

const stockBlocks = 48

var stock = sync.OnceValue(func() []stockBlock {
	list := make([]stockBlock, stockBlocks+1)
	red := dedup.NewReducer(testKey)
	list[0].plain = make([]byte, dedup.BlockSize)
	for n := uint64(1); n <= stockBlocks; n++ {
		b := &list[n]
		switch n % 4 {
		case 0:
			b.plain = noise(n)
		case 1:
			b.plain = pattern(n)
		default:
			b.plain = small(n)
		}
		enc, data := red.Encode(make([]byte, 0, 2*dedup.EncodeRoom), b.plain, true)
		b.block = dedup.Block{Fingerprint: red.Fingerprint(b.plain), Encoding: enc, Data: data, Sum: dedup.Sum(data)}
	}
	return list
})

// driver runs steps on an open store and keeps the model beside it.
type driver struct {
	rng     *rand.Rand
	s       *Store
	images  []*devicetest.Image
	tape    *devicetest.Tape // nil: nothing is recorded
	models  []*site          // after each change that was issued; the last acknowledged is acked
	acked   int
	pins    map[uint16]BID // blocks held by a pin
	big     bool           // writes are larger: to get around the log sooner
	cold    bool           // all that moves is cold
	lax     *rand.Rand     // nil: no operation is relaxed. Its own, so that a seed is the history that it was
	current string         // what runs, for messages
	done    []string
}

var errFull = errors.New("the pool of the explorer is full")

func explorerConfig(images []*devicetest.Image) Config {
	c := Config{
		Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 8 << 20, IndexBytes: 64 << 10, CheckpointInterval: 1 << 40,
		OpenDevice: func(path string) (device.Device, error) {
			for _, m := range images {
				if m.Path() == path {
					return m, nil
				}
			}
			return nil, fmt.Errorf("no image %s", path)
		},
	}
	for _, m := range images {
		c.Devices = append(c.Devices, m.Path())
	}
	return c
}

// start opens the images. panicked is called if the store's goroutine panics.
func (d *driver) start(c Config, model *site, panicked func(any)) error {
	s, err := open(context.Background(), c)
	if err != nil {
		return err
	}
	s.cleaner.eager = d.cold
	d.s, d.models, d.acked, d.pins, d.done = s, []*site{model}, 0, map[uint16]BID{}, nil
	if _, err := s.healSuperblocks(); err != nil {
		return err
	}
	s.running.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				panicked(p)
				panic(p)
			}
		}()
		s.committer()
	})
	return s.eachEntryPage(nil, func(first BID, page []byte) {
		for i := range format.EntriesPerPage {
			if e := format.EntryAt(page, i); format.EntryAddr(e) != 0 {
				fp := dedup.Fingerprint(e[:32])
				s.index.Insert(&fp, uint64(first)+uint64(i))
			}
		}
	})
}

// abandon ends the store as a power cut would: nothing more is written.
func (d *driver) abandon() {
	s := d.s
	s.queue.mu.Lock()
	s.queue.closed = true
	s.queue.wake.Broadcast()
	s.queue.mu.Unlock()
	s.running.Wait()
	s.free()
	d.s = nil
}

func (d *driver) model() *site { return d.models[len(d.models)-1] }

// issue adds the models of changes that are about to be made, in order.
func (d *driver) issue(models ...*site) {
	d.models = append(d.models, models...)
	d.mark()
}

func (d *driver) mark() {
	if d.tape != nil {
		d.tape.Stamp = [2]int{d.acked, len(d.models) - 1}
	}
}

// alone performs f with the committing role.
func (d *driver) alone(f func()) {
	d.s.enter()
	f()
	for d.s.runOnce() {
	}
	d.s.leave()
}

// run commits operations, in one batch if they fit one.
func (d *driver) run(ops ...*Op) error {
	var failed error
	left := len(ops)
	before := len(d.models) - 1 - len(ops)
	firm := 0
	d.alone(func() {
		for _, op := range ops {
			op.Relaxed = d.lax != nil && d.lax.IntN(4) > 0
			op.Done = func(_ *Op, err error) {
				left--
				if failed = errors.Join(failed, err); failed == nil {
					if before++; !op.Relaxed || op.Kind != OpWrite && op.Kind != OpCopy {
						firm = before
					}
				}
			}
			d.s.Append(op)
		}
	})
	if left > 0 || errors.Is(failed, ErrNoSpace) {
		return errFull
	}
	if d.lax != nil && d.lax.IntN(8) == 0 {
		failed = errors.Join(failed, d.s.flushLog())
		firm = before
	}
	d.acked = max(d.acked, firm)
	d.mark()
	return failed
}

func (d *driver) task(t *task) error {
	op := &Op{Kind: opTask, Volume: t.volume, task: t}
	var failed error
	left := 1
	op.Done = func(_ *Op, err error) { left, failed = 0, err }
	d.alone(func() {
		d.s.queue.mu.Lock()
		d.s.queue.push(op)
		d.s.queue.mu.Unlock()
	})
	if left > 0 {
		return errFull
	}
	if failed == nil {
		d.acked = len(d.models) - 1
		d.mark()
	}
	return failed
}

// finishCheckpoint writes the checkpoint that is cut, if one is.
func (d *driver) finishCheckpoint() error {
	select {
	case <-d.s.ckpt.start:
		d.s.runCheckpoint()
	default:
	}
	return d.s.failure()
}

func (d *driver) cutCheckpoint() {
	d.alone(func() {
		if len(d.s.ckpt.start) == 0 {
			d.s.cut(d.s.log.position(), 0)
		}
	})
}

func (d *driver) checkpoint() error {
	if err := d.finishCheckpoint(); err != nil {
		return err
	}
	d.cutCheckpoint()
	return d.finishCheckpoint()
}

func (d *driver) clean(need bool) error {
	if d.cold && !need {
		d.alone(func() { _ = d.s.turnLog() })
		chill(d.s, 4, len(d.done)%2 == 0)
		return d.s.failure()
	}
	if n, ok := d.s.victim(need); ok {
		d.s.cleanSegment(n)
	}
	return d.s.failure()
}

// room makes sure that operations need not wait for the cleaner.
func (d *driver) room() error {
	for try := 0; d.s.segs.nFree.Load() <= d.s.reserve()+2; try++ {
		if try == 6 {
			return errFull
		}
		if err := d.clean(true); err != nil {
			return err
		}
		for range 3 {
			if err := d.checkpoint(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *driver) trimAll() error {
	var todo []*Volume
	d.s.mu.RLock()
	for _, v := range d.s.volumes {
		if v.wasteful() {
			todo = append(todo, v)
		}
	}
	for _, n := range d.s.snapshots {
		if n.content.wasteful() {
			todo = append(todo, &n.content)
		}
	}
	d.s.mu.RUnlock()
	slices.SortFunc(todo, func(a, b *Volume) int { return cmp.Compare(a.id, b.id) })
	for _, v := range todo {
		if err := d.s.trim(v); err != nil {
			return err
		}
	}
	return nil
}

func (d *driver) pick() VolumeID {
	ids := d.model().ids()
	return ids[d.rng.IntN(len(ids))]
}

// place picks a range of a volume of at most n blocks, often at the border of a leaf.
func (d *driver) place(v *siteVolume, annex bool, n int) (BlockNo, int) {
	i := 0
	if annex {
		i = 1
	}
	size := len(v.part[i].blocks)
	at := d.rng.IntN(size)
	switch d.rng.IntN(4) {
	case 0:
		at = at &^ (format.WordsPerPage - 1)
	case 1:
		at = min(at, 12) // places that are written again and again
	}
	return partStart(i) + BlockNo(at), min(n, size-at)
}

// op makes an operation on a volume and what it makes of the volume.
func (d *driver) op(m *site, id VolumeID) (*Op, *siteVolume) {
	rng := d.rng
	v := m.vols[id].clone()
	op := &Op{Volume: id, ID: OpID{v.meta.Durable.Epoch, v.meta.Durable.Seq + 1}}
	if op.ID.Epoch == 0 {
		op.ID.Epoch = 1
	}
	most := 6
	if d.big {
		most = 40
	}
	switch k := rng.IntN(20); {
	case k < 9:
		start, n := d.place(v, false, 1+rng.IntN(most))
		d.fill(op, v, OpWrite, start, n)
	case k < 11:
		start, n := d.place(v, rng.IntN(3) == 0, 1+rng.IntN(most))
		d.fill(op, v, OpCopy, start, n)
	case k < 14:
		n := []int{1 + rng.IntN(8), 1 + rng.IntN(600), 512, 1200}[rng.IntN(4)]
		start, n := d.place(v, rng.IntN(3) == 0, n)
		op.Kind, op.Start, op.Count = OpUnmap, start, uint32(n)
		v.unmap(start, uint64(n), op.ID.Seq)
		if start == AnnexStart && n == annexExplored {
			op.Count = 3 * unmapSlice // to be applied in slices
		}
	case k < 18:
		from := id
		if rng.IntN(2) == 0 {
			from = d.pickOf(m)
		}
		n := []int{1 + rng.IntN(20), 512, 1 + rng.IntN(700), 1100}[rng.IntN(4)]
		start, n := d.place(v, rng.IntN(3) == 0, n)
		src := m.vols[from]
		srcStart, n := d.place(src, rng.IntN(3) == 0, n)
		op.Kind, op.Start, op.Count, op.Source, op.SourceStart = OpClone, start, uint32(n), from, srcStart
		i, at := partOf(srcStart)
		v.put(start, slices.Clone(src.part[i].blocks[at:at+uint64(n)]), op.ID.Seq)
	case k == 18:
		op.Kind = OpEpoch
		op.ID.Epoch++
		v.meta.EpochLog = append(slices.Clone(v.meta.EpochLog), op.ID)
	default:
		op.Kind, op.State = OpState, fmt.Appendf(nil, "state %d", rng.Uint32())
		v.meta.State = op.State
	}
	if op.Kind != OpCopy {
		v.meta.Durable = op.ID
	}
	return op, v
}

func (d *driver) pickOf(m *site) VolumeID {
	ids := m.ids()
	return ids[d.rng.IntN(len(ids))]
}

// fill makes a write or a copy of random stock blocks, some of them by reference.
func (d *driver) fill(op *Op, v *siteVolume, kind OpKind, start BlockNo, n int) {
	op.Kind, op.Start, op.Count = kind, start, uint32(n)
	if kind == OpCopy {
		op.ID.Seq = Seq(1 + d.rng.Uint64N(100))
	}
	few := stockBlocks
	if d.rng.IntN(2) == 0 {
		few = 6
	}
	nums := make([]uint16, n)
	for i := range nums {
		if d.rng.IntN(8) == 0 {
			op.Blocks, op.Pinned = append(op.Blocks, dedup.Block{}), append(op.Pinned, 0)
			continue
		}
		nums[i] = uint16(1 + d.rng.IntN(few))
		b, bid := stock()[nums[i]].block, BID(0)
		if held := d.pins[nums[i]]; held != 0 && d.rng.IntN(2) == 0 {
			delete(d.pins, nums[i])
			b.Data, bid = nil, held
		} else if d.rng.IntN(3) > 0 {
			if found, ok := d.s.Pin(&b.Fingerprint); ok {
				b.Data, bid = nil, found
			}
		}
		op.Blocks, op.Pinned = append(op.Blocks, b), append(op.Pinned, bid)
	}
	v.put(start, nums, op.ID.Seq)
}

// step does one random thing. errFull says that this pool cannot go on.
func (d *driver) step() error {
	if err := d.room(); err != nil {
		return err
	}
	rng, m := d.rng, d.model()
	say := func(text string, args ...any) {
		d.current = fmt.Sprintf(text, args...)
		d.done = append(d.done, d.current)
	}
	k := rng.IntN(70)
	if len(m.vols) == 0 {
		k = 40
	}
	switch {
	case k < 24:
		op, v := d.op(m, d.pick())
		say("%d of volume %d at %d+%d from %d at %d, seq %d", op.Kind, op.Volume, op.Start, op.Count, op.Source, op.SourceStart, op.ID.Seq)
		d.issue(m.with(op.Volume, v))
		return d.run(op)
	case k < 32:
		var ops []*Op
		for range 2 + rng.IntN(3) {
			op, v := d.op(m, d.pickOf(m))
			m = m.with(op.Volume, v)
			d.models = append(d.models, m)
			ops = append(ops, op)
		}
		say("batch of %d", len(ops))
		d.mark()
		return d.run(ops...)
	case k < 36:
		say("checkpoint")
		return d.checkpoint()
	case k < 38:
		say("cut")
		d.cutCheckpoint()
		return nil
	case k < 40:
		say("finish checkpoint")
		return d.finishCheckpoint()
	case k < 42:
		if len(m.vols) > 2 {
			return nil
		}
		id, blocks := m.last+1, 100+rng.Uint64N(1500)
		say("create %d of %d", id, blocks)
		r := [16]byte{byte(id), 1}
		d.issue(m.with(id, newSiteVolume(blocks, r)))
		return d.task(&task{kind: taskCreate, volume: id, blocks: blocks, replica: r})
	case k < 44:
		if len(m.vols) < 2 {
			return nil
		}
		id := d.pick()
		say("delete %d", id)
		d.issue(m.with(id, nil))
		return d.task(&task{kind: taskDelete, volume: id})
	case k < 47:
		id := d.pick()
		v := m.vols[id].clone()
		blocks := 100 + rng.Uint64N(1500)
		if uint64(len(v.part[0].blocks)) < blocks {
			if err := d.trimAll(); err != nil {
				return err
			}
		}
		say("resize %d to %d", id, blocks)
		v.resize(blocks)
		d.issue(m.with(id, v))
		return d.task(&task{kind: taskResize, volume: id, blocks: blocks})
	case k < 50:
		id := d.pick()
		v := m.vols[id].clone()
		v.meta.Promised++
		v.meta.Inconsistent = rng.IntN(2) == 0
		v.meta.SyncFrom = OpID{Epoch(rng.IntN(9)), Seq(rng.IntN(99))}
		if rng.IntN(4) == 0 {
			v.meta.Durable.Seq += 5
			v.meta.EpochLog = nil
		}
		say("meta of %d", id)
		d.issue(m.with(id, v))
		return d.task(&task{kind: taskMeta, volume: id, change: func(p *Meta) { *p = v.meta }})
	case k < 53:
		say("clean")
		return d.clean(rng.IntN(2) == 0)
	case k < 55:
		say("trim")
		return d.trimAll()
	case k < 57:
		n := uint16(1 + rng.IntN(6))
		if _, ok := d.pins[n]; !ok {
			if bid, ok := d.s.Pin(&stock()[n].block.Fingerprint); ok {
				say("pin %d", n)
				d.pins[n] = bid
			}
		}
		if d.pins[n] == 0 || rng.IntN(3) == 0 {
			return nil
		}
		// Nothing refers to it any more: it lives by the pin, over a checkpoint.
		say("unmap all, and checkpoint")
		for _, id := range m.ids() {
			for i := range m.vols[id].part {
				m = d.model()
				v := m.vols[id].clone()
				op := &Op{Kind: OpUnmap, Volume: id, ID: OpID{max(1, v.meta.Durable.Epoch), v.meta.Durable.Seq + 1}, Start: partStart(i), Count: uint32(len(v.part[i].blocks))}
				v.unmap(op.Start, uint64(op.Count), op.ID.Seq)
				v.meta.Durable = op.ID
				d.issue(m.with(id, v))
				if err := d.run(op); err != nil {
					return err
				}
			}
		}
		return d.checkpoint()
	case k < 58:
		for n, bid := range d.pins {
			say("unpin %d", n)
			d.s.Unpin(bid)
			delete(d.pins, n)
			d.alone(func() {})
			break
		}
		return nil
	case k < 60:
		if len(m.snaps) > 3 {
			return nil
		}
		id, snap := d.pick(), m.last+1
		was, v := m.vols[id], m.vols[id].clone()
		op := &Op{Kind: OpSnapshot, Volume: id, Snapshot: snap, ID: OpID{max(1, v.meta.Durable.Epoch), v.meta.Durable.Seq + 1}}
		v.meta.Durable = op.ID
		say("snapshot %d of %d", snap, id)
		d.issue(m.with(id, v).withSnapshot(snap, was))
		return d.run(op)
	case k < 62:
		for _, snap := range slices.Sorted(maps.Keys(m.snaps)) {
			say("delete snapshot %d", snap)
			d.issue(m.withSnapshot(snap, nil))
			return d.task(&task{kind: taskForget, volume: snap})
		}
		return nil
	case k < 66:
		// What comes next of these is stored again.
		say("forget some fingerprints")
		for n := 1; n <= stockBlocks; n++ {
			if rng.IntN(2) == 0 {
				unindex(d.s, &stock()[n].block.Fingerprint)
			}
		}
		return nil
	case k < 68:
		say("merge duplicates")
		if err := d.s.mergePass(context.Background(), mapCatalogue{}); !errors.Is(err, errCrowded) {
			return err
		}
		return nil
	default:
		id := d.pick()
		for i, n := range m.vols[id].part[0].blocks {
			if n != 0 {
				say("repair block %d of %d", i, id)
				return d.s.Volume(id).Repair(context.Background(), BlockNo(i), stock()[n].block)
			}
		}
		return nil
	}
}

// reader compares stores with models. Its buffers are kept from store to store.
type reader struct {
	buf      []byte
	extents  []Extent
	versions []Seq
}

func newReader() *reader {
	return &reader{buf: make([]byte, 1<<20), extents: make([]Extent, 0, 64)}
}

// find says which of the models the store holds, the newest first.
func (r *reader) find(s *Store, models []*site) (int, error) {
	var why error
	for i := len(models) - 1; i >= 0; i-- {
		err := r.compare(s, models[i])
		if err == nil {
			return i, nil
		}
		why = errors.Join(why, fmt.Errorf("not change %d: %w", i, err))
	}
	return 0, why
}

func sameMeta(a, b *Meta) bool {
	return a.Replica == b.Replica && a.Promised == b.Promised && a.Durable == b.Durable && a.Inconsistent == b.Inconsistent && a.SyncFrom == b.SyncFrom &&
		slices.Equal(a.EpochLog, b.EpochLog) && bytes.Equal(a.State, b.State)
}

// compare reads everything that a model speaks of.
func (r *reader) compare(s *Store, m *site) error {
	if ids, want := s.Volumes(), m.ids(); !slices.Equal(ids, want) {
		return fmt.Errorf("volumes %d, want %d", ids, want)
	}
	for id, want := range m.vols {
		meta := s.Volume(id).Meta()
		if got := s.Volume(id).Blocks(); !sameMeta(&meta, &want.meta) || got != uint64(len(want.part[0].blocks)) {
			return fmt.Errorf("volume %d has %d blocks and %+v, want %d and %+v", id, got, meta, len(want.part[0].blocks), want.meta)
		}
	}
	snaps := s.Snapshots(0)
	if len(snaps) != len(m.snaps) {
		return fmt.Errorf("%d snapshots, want %d", len(snaps), len(m.snaps))
	}
	for _, n := range snaps {
		want := m.snaps[n.ID()]
		if want == nil || n.Blocks() != uint64(len(want.part[0].blocks)) {
			return fmt.Errorf("snapshot %d of %d blocks, want %v", n.ID(), n.Blocks(), want != nil)
		}
		if err := r.comparePart(&n.content, &want.part[0], 0); err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
	}
	for id, want := range m.vols {
		v := s.Volume(id)
		for i := range want.part {
			if err := r.comparePart(v, &want.part[i], partStart(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *reader) comparePart(v *Volume, want *sitePart, start BlockNo) error {
	ctx := context.Background()
	r.versions = append(r.versions[:0], want.versions...)
	if err := v.ChunkVersions(ctx, uint32(start>>chunkShift), r.versions); err != nil {
		return err
	}
	if !slices.Equal(r.versions, want.versions) {
		return fmt.Errorf("volume %d: versions from %d on are %d, want %d", v.id, start, r.versions, want.versions)
	}
	end := start + BlockNo(len(want.blocks))
	for at := start; at < end; {
		list, err := v.Extents(ctx, at, end, r.extents)
		if err != nil {
			return err
		}
		for _, x := range list {
			nums := want.blocks[at-start:][:x.Blocks]
			if !x.Mapped {
				for i, n := range nums {
					if n != 0 {
						return fmt.Errorf("volume %d block %d is a hole, want %d", v.id, at+BlockNo(i), n)
					}
				}
			}
			for x.Mapped && len(nums) > 0 {
				n := min(len(nums), len(r.buf)/dedup.BlockSize)
				if err := v.Read(ctx, uint64(at)*dedup.BlockSize, r.buf[:n*dedup.BlockSize]); err != nil {
					return err
				}
				for i, num := range nums[:n] {
					if num == 0 || !bytes.Equal(r.buf[i*dedup.BlockSize:][:dedup.BlockSize], stock()[num].plain) {
						return fmt.Errorf("volume %d block %d is not %d", v.id, at+BlockNo(i), num)
					}
				}
				nums = nums[n:]
				at += BlockNo(n)
			}
			at += BlockNo(len(nums))
		}
	}
	return nil
}
