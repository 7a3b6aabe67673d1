package lsfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// rotSome flips a bit in some stored blocks and returns how many.
func rotSome(s *Store, r *rig, rng *rand.Rand) (n int) {
	hit := map[format.Addr]bool{} // of a group once
	_ = s.eachEntryPage(nil, func(_ BID, page []byte) {
		for i := range format.EntriesPerPage {
			var e format.Entry
			if format.ParseEntry(format.EntryAt(page, i), &e); e.Addr != 0 && rng.IntN(40) == 0 && !hit[e.Addr] {
				hit[e.Addr] = true
				d, off := s.segs.locate(e.Addr)
				r.disks[d.Path()].FlipBit(off, rng.Int64N(int64(e.Len)*8))
				n++
			}
		}
	})
	return n
}

// TestModel runs random operations on a few volumes against a plain map, with
// readers beside, the cleaner and checkpoints at random moments, deletes,
// resizes, clean restarts, power cuts, and rot that scrub repairs from a peer. What the
// store is configured to is random too. For every second seed all that moves is cold.
func TestModel(t *testing.T) {
	met := &coldStores{}
	defer met.mustHaveMet(t)
	eachSeed(t, 5, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		rng := rand.New(rand.NewPCG(seed, 2))
		r := newRig(t, seed, 16<<20, 12<<20)
		r.cold = met.every(2, seed)
		r.opts = func(c *Config) {
			c.ScrubInterval = -1
			c.CheckpointBytes = 64 << 10 << rng.IntN(6)
			c.GarbageMax = 5 + rng.IntN(46)
			c.IndexBytes = 64 << 10 << rng.IntN(3)
			c.L1Bytes = 1 << 20 << rng.IntN(2)
		}
		numbers := map[dedup.Fingerprint]uint64{}
		red := dedup.NewReducer(testKey)
		for n := uint64(1); n <= 150; n++ {
			numbers[red.Fingerprint(pattern(n))] = n
		}
		donor := func(_ context.Context, fp dedup.Fingerprint, _ []Place) (dedup.Block, error) {
			enc, data := red.Encode(make([]byte, 0, dedup.EncodeRoom), pattern(numbers[fp]), true)
			return dedup.Block{Fingerprint: fp, Encoding: enc, Data: data, Sum: dedup.Sum(data)}, nil
		}
		r.configure()
		s := r.start()
		model := map[VolumeID]*history{}
		created := VolumeID(0)
		create := func() {
			created++
			h := &history{blocks: rng.Uint64N(900) + 100}
			mustCreate(t, s, created, h.blocks)
			model[created] = h
		}
		create()
		create()
		c := newClient(t, s)
		verify := func() {
			t.Helper()
			for id, h := range model {
				v := s.Volume(id)
				if v == nil || v.Blocks() != h.blocks {
					t.Fatalf("volume %d is gone or has another size", id)
				}
				mustEqual(t, v, h.at(Seq(len(h.steps))))
			}
			mustCheck(t, s)
		}
		// Readers see whole blocks, old or new, never a mixture.
		var readers sync.WaitGroup
		var stop chan struct{}
		read := func() {
			stop = make(chan struct{})
			for i := range 2 {
				rng := rand.New(rand.NewPCG(seed, uint64(i)+10))
				vols := s.Volumes()
				readers.Add(1)
				go func(s *Store, stop chan struct{}) {
					defer readers.Done()
					buf := make([]byte, 16*dedup.BlockSize)
					for {
						select {
						case <-stop:
							return
						default:
						}
						v := s.Volume(vols[rng.IntN(len(vols))])
						if v == nil {
							continue
						}
						n := v.Blocks()
						if n < 17 {
							continue
						}
						off := rng.Uint64N(n-16) * dedup.BlockSize
						if !v.TryRead(off, buf) {
							err := v.Read(ctx, off, buf)
							if errors.Is(err, ErrNoVolume) || errors.Is(err, ErrRange) {
								continue
							}
							if err != nil {
								t.Error(err)
								return
							}
						}
						for b := buf; len(b) > 0; b = b[dedup.BlockSize:] {
							if n := binary.LittleEndian.Uint64(b[4000:]); n != 0 && !bytes.Equal(b[:dedup.BlockSize], pattern(n)) {
								t.Errorf("a mixed block, partly pattern %d", n)
								return
							}
						}
					}
				}(s, stop)
			}
		}
		quiet := func() { close(stop); readers.Wait() }
		read()
		for range 250 {
			var ids []VolumeID
			for id := range model {
				ids = append(ids, id)
			}
			// Map order must not choose: a seed replays.
			low := ids[0]
			for _, id := range ids {
				low = min(low, id)
			}
			id := low
			for _, i := range ids {
				if rng.IntN(2) == 0 && i != low {
					id = max(id, i)
				}
			}
			h := model[id]
			switch k := rng.IntN(44); {
			case k < 30:
				var wg sync.WaitGroup
				for range rng.IntN(5) + 1 {
					op := h.randomOp(c, rng, id, 150)
					wg.Add(1)
					op.Done = func(_ *Op, err error) {
						if err != nil {
							t.Error(err)
						}
						wg.Done()
					}
					s.Append(op)
				}
				s.Kick()
				wg.Wait()
			case k < 32:
				if err := s.checkpoint(); err != nil {
					t.Fatal(err)
				}
			case k < 34:
				if n, ok := s.victim(rng.IntN(2) == 0); r.cold != nil {
					if err := s.post(&task{kind: taskTurn}); err != nil {
						t.Fatal(err)
					}
					chill(s, 4, rng.IntN(2) == 0)
				} else if ok {
					s.cleaner.mu.Lock() // the cleaner itself is idle: the pool is far from full
					s.cleanSegment(n)
					s.cleaner.mu.Unlock()
				}
			case k == 34:
				size := rng.Uint64N(900) + 100
				if err := s.Volume(id).Resize(ctx, size); err != nil {
					t.Fatal(err)
				}
				old := h.at(Seq(len(h.steps)))
				grown := make([]uint64, size)
				copy(grown, old)
				// Start over from here: the steps before are of another size.
				n := len(h.steps)
				h.blocks = size
				h.steps = make([]func([]uint64), n)
				for i := range h.steps {
					h.steps[i] = func([]uint64) {}
				}
				if n > 0 {
					h.steps[n-1] = func(c []uint64) { copy(c, grown) }
				}
			case k == 35 && len(model) > 1:
				if err := s.DeleteVolume(ctx, id); err != nil {
					t.Fatal(err)
				}
				delete(model, id)
			case k == 36 && len(model) < 4:
				create()
			case k == 37:
				quiet()
				mustClose(t, s)
				s = r.start()
				c = newClient(t, s)
				verify()
				read()
			case k == 38:
				quiet()
				old := s
				r = r.crash(devicetest.CrashOptions{Seed: rng.Uint64(), Keep: rng.Float64(), Tear: true})
				mustClose(t, old)
				s = r.start()
				c = newClient(t, s)
				verify()
				read()
			case k == 40:
				evict(s)
			case k == 41:
				// Reads would refuse what is damaged until scrub has been there.
				quiet()
				n := rotSome(s, r, rng)
				s.SetDonor(donor)
				s.StartScrub(true)
				if err := s.WaitScrub(ctx); err != nil {
					t.Fatal(err)
				}
				if last := s.Scrub().Last; last.Damaged < uint64(n) || last.Repaired != last.Damaged || last.Counters != 0 {
					t.Fatalf("%d damaged: %+v", n, last)
				}
				verify()
				read()
			case k == 39:
				for _, bid := range []int{0, 1, 2} {
					b, p := c.reduce(pattern(uint64(bid)+rng.Uint64N(150)+1), true)
					if p != 0 {
						if b.Data != nil {
							t.Fatal("pinned block with data")
						}
						s.Unpin(p)
					}
				}
			}
			if t.Failed() {
				quiet()
				t.FailNow()
			}
		}
		quiet()
		verify()
		mustClose(t, s)
	}, 100, 104, 116)
}

// TestHugeUnmapIsCut unmaps more than one slice while few pages may be dirty, so
// that checkpoints are cut inside of the operation, and cuts the power there.
func TestHugeUnmapIsCut(t *testing.T) {
	r := newRig(t, 3, 32<<20)
	r.cfg.IndexBytes = 1 << 20
	s := r.start()
	const half = 4 * unmapSlice
	const blocks = 2 * half // the second is equal to the first: identities stay
	mustCreate(t, s, 1, blocks)
	c := newClient(t, s)
	small := func(n uint64) []byte {
		b := make([]byte, dedup.BlockSize)
		binary.LittleEndian.PutUint64(b, n)
		return b
	}
	seq := Seq(0)
	for at := uint64(0); at < blocks; at += 512 {
		var data []byte
		for i := range uint64(512) {
			data = append(data, small((at+i)%half+1)...)
		}
		seq++
		c.must(c.write(1, seq, BlockNo(at), data))
	}
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	before, _ := s.ckpt.numbers()
	s.enter()
	s.dirtySoft, s.dirtyHard = 60, 100
	s.leave()
	var mu sync.Mutex
	var crashes []*rig
	flushes := 0
	r.disks["disk0"].Observe(func(op devicetest.Op) {
		if flushes++; op.Kind == devicetest.Flush && flushes%5 == 0 {
			mu.Lock()
			crashes = append(crashes, r.crash(devicetest.CrashOptions{Seed: uint64(len(crashes))}))
			mu.Unlock()
		}
	})
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq + 1}, Start: half, Count: half})
	seq++
	r.disks["disk0"].Observe(nil)
	if cuts, _ := s.ckpt.numbers(); cuts-before < 2 {
		t.Fatalf("%d checkpoints inside of the operation", cuts-before)
	}
	mustCheck(t, s)
	if n := s.Volume(1).MappedBlocks(); n != half {
		t.Fatalf("%d blocks mapped", n)
	}
	mustClose(t, s)
	for i, cr := range crashes {
		s := cr.start()
		v := s.Volume(1)
		if n, k := v.MappedBlocks(), v.Meta().Durable.Seq; k == seq && n != half || k != seq && (k != seq-1 || n != blocks) {
			t.Fatalf("crash %d of %d: %d mapped, durable %d", i, len(crashes), n, k)
		}
		mustCheck(t, s)
		mustClose(t, s)
	}
	t.Logf("%d crashes", len(crashes))
}

// TestRotIsNotCutOff damages commits that were durable: a start must refuse, not
// take them for a torn tail.
func TestRotIsNotCutOff(t *testing.T) {
	r := newRig(t, 1, 16<<20)
	s := r.start()
	mustCreate(t, s, 1, 1000)
	c := newClient(t, s)
	var at []format.Position
	for i := range 20 {
		s.log.turn.Lock()
		at = append(at, s.log.position())
		s.log.turn.Unlock()
		c.must(c.write(1, Seq(i+1), BlockNo(i*10), pattern(uint64(i))))
	}
	image := r.crash(devicetest.CrashOptions{})
	mustClose(t, s)
	for i, p := range at[1:] {
		if p.Segment == format.NoSegment {
			continue
		}
		d := image.disks["disk0"].Clone()
		d.FlipBit(format.SuperblockArea+int64(p.Segment)*format.SegmentMin+int64(p.Offset), int64(100+i*7))
		d.SetPath("disk0")
		x := &rig{tb: t, disks: map[string]*devicetest.Disk{"disk0": d}, names: r.names}
		x.configure()
		s, err := Open(context.Background(), x.cfg)
		last := i == len(at)-2
		var ce *CorruptError
		switch {
		case last && err == nil: // the last commit may have been in flight
			if k := s.Volume(1).Meta().Durable.Seq; k != 19 {
				t.Errorf("durable %d", k)
			}
			mustClose(t, s)
		case last || err == nil:
			t.Errorf("commit %d: opened, or the last one refused: %v", i, err)
			if err == nil {
				mustClose(t, s)
			}
		case !errors.As(err, &ce) || ce.What != "commit":
			t.Errorf("commit %d: %v", i, err)
		}
	}
}

// TestFlippedBlocks flips a bit in each stored block: every read says so, and a
// repair makes it good again.
func TestFlippedBlocks(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 16<<20)
	r.cfg.ReadAhead = -1 // every block is read from the device
	var events int
	r.cfg.Event = func(e Event) {
		if e.Code == "corrupt" {
			events++
		}
	}
	s := r.start()
	v := mustCreate(t, s, 1, 64)
	c := newClient(t, s)
	var data []byte
	for i := range 64 {
		data = append(data, pattern(uint64(i+1))...)
	}
	c.must(c.write(1, 1, 0, data))
	buf := make([]byte, dedup.BlockSize)
	for i := range 64 {
		b, _ := c.reduce(data[i*4096:(i+1)*4096], false)
		s.mu.RLock()
		leaf, _, _, _ := s.pg.lookup(v.mapTree, wordShift, uint64(i))
		e, _, _ := s.entryOf(BID(format.Word(leaf, i)))
		addr, n := format.EntryAddr(e), format.EntryLen(e)
		s.mu.RUnlock()
		_, off := s.segs.locate(addr)
		r.disks["disk0"].FlipBit(off, int64(i*131)%int64(n*8))
		err := v.Read(ctx, uint64(i)*4096, buf)
		var ce *CorruptError
		if !errors.As(err, &ce) || ce.Block != BlockNo(i) || ce.Volume != 1 || ce.Fingerprint != b.Fingerprint || ce.Device != "disk0" {
			t.Fatalf("block %d: %v", i, err)
		}
		if err := v.Repair(ctx, BlockNo(i), b); err != nil {
			t.Fatal(err)
		}
		if err := v.Read(ctx, uint64(i)*4096, buf); err != nil || !bytes.Equal(buf, pattern(uint64(i+1))) {
			t.Fatalf("block %d after repair: %v", i, err)
		}
	}
	if events != 64 || s.Stats().Repairs != 64 {
		t.Fatalf("%d events, %d repairs", events, s.Stats().Repairs)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestImport: devices that do not belong together are named, not used.
func TestImport(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 16<<20, 8<<20)
	old := r.disks["disk1"].Clone()
	s := r.start()
	mustCreate(t, s, 1, 100)
	for range 3 {
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	if err := Format(ctx, FormatConfig{Pool: [16]byte{8}, Devices: r.names, OpenDevice: r.open}); !errors.Is(err, ErrInUse) {
		t.Fatalf("format over a pool: %v", err)
	}
	refused := func(name, want string, change func(c *Config)) {
		t.Helper()
		c := r.cfg
		change(&c)
		s, err := Open(ctx, c)
		if err == nil {
			_ = s.Close()
			t.Fatalf("%s: opened", name)
		}
		if !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Fatalf("%s: %v, want %q", name, err, want)
		}
	}
	refused("missing", "missing", func(c *Config) { c.Devices = r.names[:1] })
	refused("key", "key of another cluster", func(c *Config) { c.Key[5]++ })
	foreign := newRig(t, 9, 16<<20)
	r.disks["foreign"] = foreign.disks["disk0"]
	for i := range format.SuperblockOffsets {
		p := make([]byte, 4096)
		r.disks["foreign"].Peek(p, format.SuperblockOffsets[i])
		sb, err := format.ParseSuperblock(p)
		if err != nil {
			t.Fatal(err)
		}
		sb.Pool[3]++
		sb.Put(p)
		r.disks["foreign"].Overwrite(format.SuperblockOffsets[i], p)
	}
	refused("foreign", "belongs to pool", func(c *Config) { c.Devices = []string{"disk0", "foreign"} })
	r.disks["copy"] = r.disks["disk0"].Clone()
	refused("twice", "same member", func(c *Config) { c.Devices = []string{"disk0", "copy"} })
	r.disks["empty"] = devicetest.New(1, 16<<20)
	refused("empty", "superblock", func(c *Config) { c.Devices = []string{"disk0", "empty"} })
	r.disks["old"] = old
	refused("stale", "stale", func(c *Config) { c.Devices = []string{"disk0", "old"} })
	// Two damaged copies of four are survived, three are not.
	for _, bad := range [][]int{{0}, {1, 2}, {2, 3}, {0, 3}} {
		for _, n := range bad {
			r.disks["disk0"].FlipBit(format.SuperblockOffsets[n], 777)
		}
		s := r.start()
		mustCheck(t, s)
		_ = s.Close()
		if c := s.Stats().Checkpoints; c != 0 {
			t.Fatalf("%d checkpoints of an untouched store", c)
		}
		for _, off := range format.SuperblockOffsets {
			p := make([]byte, 4096)
			r.disks["disk0"].Peek(p, off)
			if _, err := format.ParseSuperblock(p); err != nil {
				t.Fatalf("after %d were damaged: %v", bad, err)
			}
		}
	}
	for _, off := range format.SuperblockOffsets[:3] {
		r.disks["disk0"].FlipBit(off, 777)
	}
	refused("superblocks", "no two of four superblocks agree", func(*Config) {})
}

// flatDisk is a device that allocates nothing.
type flatDisk []byte

func (d flatDisk) ReadAt(p []byte, off int64) error  { copy(p, d[off:]); return nil }
func (d flatDisk) WriteAt(p []byte, off int64) error { copy(d[off:], p); return nil }
func (d flatDisk) Flush() error                      { return nil }
func (d flatDisk) Discard(int64, int64) error        { return nil }
func (d flatDisk) Size() int64                       { return int64(len(d)) }
func (d flatDisk) Path() string                      { return "flat" }
func (d flatDisk) Direct() bool                      { return true }
func (d flatDisk) Close() error                      { return nil }

// TestNoAllocation: nothing is allocated per operation on the write and cached read paths.
func TestNoAllocation(t *testing.T) {
	flat := make(flatDisk, 64<<20)
	open := func(string) (device.Device, error) { return flat, nil }
	err := Format(context.Background(), FormatConfig{Key: testKey, Devices: []string{"flat"}, OpenDevice: open})
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(context.Background(), Config{Devices: []string{"flat"}, OpenDevice: open, Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 16 << 20, IndexBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	v := mustCreate(t, s, 1, 1000)
	c := newClient(t, s)
	op := c.write(1, 1, 0, noise(1))
	var failed error
	done := make(chan struct{}, 1)
	op.Done = func(_ *Op, err error) {
		failed = errors.Join(failed, err)
		done <- struct{}{}
	}
	seq, n := Seq(0), uint64(0)
	run := func() {
		seq++
		n++
		op.ID.Seq = seq
		op.Start = BlockNo(seq % 900)
		binary.LittleEndian.PutUint64(op.Blocks[0].Data, n)
		binary.LittleEndian.PutUint64(op.Blocks[0].Fingerprint[:], n*0x9e3779b97f4a7c15)
		op.Blocks[0].Sum = dedup.Sum(op.Blocks[0].Data)
		s.Append(op)
		s.Kick()
		<-done
	}
	for range 1000 {
		run()
	}
	if a := testing.AllocsPerRun(500, run); a != 0 {
		t.Errorf("%.1f allocations per write", a)
	}
	if failed != nil {
		t.Fatal(failed)
	}
	clones := []*Op{
		{Kind: OpClone, Volume: 1, Start: 0, Count: 488, Source: 1, SourceStart: 512},
		{Kind: OpClone, Volume: 1, Start: AnnexStart, Count: 512, Source: 1},
		{Kind: OpUnmap, Volume: 1, Start: AnnexStart, Count: 100},
	}
	for _, op := range clones {
		op.Done = func(_ *Op, err error) {
			failed = errors.Join(failed, err)
			done <- struct{}{}
		}
	}
	cloneAll := func() {
		for _, op := range clones {
			seq++
			op.ID.Seq = seq
			s.Append(op)
			s.Kick()
			<-done
		}
		run()
	}
	for range 50 {
		cloneAll()
	}
	if a := testing.AllocsPerRun(100, cloneAll); a != 0 {
		t.Errorf("%.1f allocations per clones", a)
	}
	if failed != nil {
		t.Fatal(failed)
	}
	list := make([]Extent, 0, 8)
	if a := testing.AllocsPerRun(100, func() {
		if _, err := v.Extents(context.Background(), 0, 1000, list); err != nil {
			t.Fatal(err)
		}
	}); a != 0 {
		t.Errorf("%.1f allocations per list of extents", a)
	}
	buf := make([]byte, 4096)
	if err := v.Read(context.Background(), 5*4096, buf); err != nil {
		t.Fatal(err)
	}
	if a := testing.AllocsPerRun(500, func() {
		if !v.TryRead(5*4096, buf) {
			t.Fatal("not cached")
		}
	}); a != 0 {
		t.Errorf("%.1f allocations per cached read", a)
	}
	// Its fingerprints are made up, so the blocks are not proved.
	if r, err := s.check(context.Background(), false); err != nil || !r.OK() {
		t.Fatal(r, err)
	}
	mustClose(t, s)
}
