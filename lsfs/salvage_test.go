package lsfs

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// census is what a store keeps: the share and the device of each block by its fingerprint.
type census map[dedup.Fingerprint]struct {
	share int64
	on    string
	group bool
}

func censusOf(t testing.TB, s *Store) census {
	t.Helper()
	c := census{}
	err := s.eachEntryPage(nil, func(_ BID, page []byte) {
		var e format.Entry
		for i := range format.EntriesPerPage {
			if format.ParseEntry(format.EntryAt(page, i), &e); e.Addr == 0 {
				continue
			}
			x := c[e.Fingerprint]
			x.share, x.on, x.group = int64(e.Share()), s.devicePath(e.Addr.Segment()), e.Encoding == dedup.ZstdGroup
			c[e.Fingerprint] = x
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// on sums up what stands on a device.
func (c census) on(path string) (bytes int64, groups int) {
	for _, x := range c {
		if x.on == path {
			bytes += x.share
			if x.group {
				groups++
			}
		}
	}
	return bytes, groups
}

// salvageRig is a pool of three devices with two volumes, a snapshot, groups, and stale content
// wherever there is room for it. It is closed, or the power went.
type salvageRig struct {
	*rig
	models [3][]func(uint64) []byte // of volumes 1 and 2 and of the snapshot of 2, by block
	held   census
	ids    []DeviceInfo
}

func newSalvageRig(t *testing.T, seed uint64, clean bool) *salvageRig {
	t.Helper()
	r := &salvageRig{rig: newRig(t, seed, 24<<20, 24<<20, 24<<20)}
	r.opts = func(c *Config) { c.ScrubInterval, c.ReadAhead, c.IndexBytes = -1, -1, 1<<20 }
	r.configure()
	r.persist()
	s := r.start()
	c := newClient(t, s)
	rng := testRand(seed)
	const cold, hot = 2400, 2000
	mustCreate(t, s, 1, cold)
	mustCreate(t, s, 2, hot)
	var one, two Seq
	fill(c, 1, &one, cold, prose)
	for range 4 {
		cleanAll(t, s)
	}
	for i := range uint64(cold) {
		r.models[0] = append(r.models[0], func(uint64) []byte { return prose(i) })
	}
	content := make([]uint64, hot)
	write := func(n int) {
		for range n {
			at := rng.IntN(hot - 8)
			var data []byte
			for k := range 8 {
				content[at+k] = rng.Uint64N(3000) + 1
				data = append(data, noise(content[at+k])...)
			}
			two++
			c.must(c.write(2, two, BlockNo(at), data))
		}
	}
	// Overwritten again and again, with cleaning between: stale copies, slots that are
	// given out anew, free segments that are full of what was.
	rounds := 6
	if raceEnabled {
		rounds = 2
	}
	for range rounds {
		write(120)
		chill(s, 10, false)
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	two++
	c.must(&Op{Kind: OpSnapshot, Volume: 2, ID: OpID{1, two}, Snapshot: 9})
	kept := append([]uint64(nil), content...)
	write(60)
	for _, list := range [][]uint64{content, kept} {
		k := 1
		if &list[0] == &kept[0] {
			k = 2
		}
		for _, n := range list {
			r.models[k] = append(r.models[k], func(uint64) []byte {
				if n == 0 {
					return make([]byte, dedup.BlockSize)
				}
				return noise(n)
			})
		}
	}
	mustCheck(t, s)
	r.held, r.ids = censusOf(t, s), s.Devices()
	if clean {
		mustClose(t, s)
		return r
	}
	crashed := r.crashAll(devicetest.CrashOptions{Seed: seed, Keep: 0.5, Tear: true})
	mustClose(t, s)
	crashed.opts = r.opts
	generation, devices := crashed.cfg.Generation, crashed.cfg.Devices
	crashed.configure()
	crashed.cfg.Generation, crashed.cfg.Devices = generation, devices
	crashed.persist()
	r.rig = crashed
	return r
}

// notUnderRace leaves out what goes the same ways as TestSalvage, and would take minutes.
func notUnderRace(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("TestSalvage alone runs under the race detector")
	}
}

// copyOf is the same pool on disks of its own.
func (r *salvageRig) copyOf() *salvageRig {
	c := &salvageRig{rig: &rig{tb: r.tb, disks: map[string]*devicetest.Disk{}, names: r.names, opts: r.opts}, models: r.models, held: r.held, ids: r.ids}
	for n, d := range r.disks {
		c.disks[n] = d.Clone()
		c.disks[n].SetPath(n)
	}
	c.configure()
	c.cfg.Generation, c.cfg.Devices = r.cfg.Generation, r.cfg.Devices
	c.persist()
	return c
}

func (r *salvageRig) salvage(t testing.TB) *SalvageReport {
	t.Helper()
	report, err := Salvage(context.Background(), r.cfg, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// mustRefill opens the salvaged pool, writes all volumes again as a resync does, by fingerprint,
// and returns the stored bytes that had to be sent.
func (r *salvageRig) mustRefill(t testing.TB) (s *Store, sent int64) {
	t.Helper()
	s = r.start()
	mustCheck(t, s)
	if n := len(s.Volumes()); n != 0 || len(s.Snapshots(0)) != 0 {
		t.Fatalf("%d volumes survived", n)
	}
	if _, held := s.Salvaged(); !held {
		t.Fatal("nothing is held")
	}
	c := newClient(t, s)
	for k, model := range r.models {
		id := VolumeID(k + 1)
		mustCreate(t, s, id, uint64(len(model)))
		for at, seq := 0, Seq(1); at < len(model); at, seq = at+16, seq+1 {
			var data []byte
			var fps []dedup.Fingerprint
			for i := at; i < min(at+16, len(model)); i++ {
				data = append(data, model[i](0)...)
				fps = append(fps, c.red.Fingerprint(model[i](0)))
			}
			if at%256 == 0 {
				evict(s) // a start has nothing in RAM
			}
			s.Recall(context.Background(), fps)
			op := c.write(id, seq, BlockNo(at), data)
			for i := range op.Blocks {
				// As it was stored: of a group a share, which is less than what is sent.
				if b := &op.Blocks[i]; len(b.Data) > 0 {
					sent += cmp.Or(r.held[b.Fingerprint].share, int64(len(b.Data)))
				}
			}
			c.must(op)
		}
	}
	r.mustHold(t, s)
	return s, sent
}

// mustClean cleans every segment that holds blocks: the cleaner finds all of them.
func (r *salvageRig) mustClean(t testing.TB, s *Store) {
	t.Helper()
	var full []uint32
	s.mu.RLock()
	for n := range s.segs.all {
		if seg := &s.segs.all[n]; seg.state == segmentSealed && seg.live > 0 {
			full = append(full, uint32(n))
		}
	}
	s.mu.RUnlock()
	for _, n := range full {
		until(t, "there is room to clean", func() bool {
			if s.roomToClean(n) && s.segs.nFree.Load() > 6 {
				return true
			}
			if err := s.checkpoint(); err != nil {
				t.Fatal(err)
			}
			return false
		})
		s.cleanSegment(n)
		s.mu.RLock()
		if seg := &s.segs.all[n]; seg.bad {
			t.Errorf("segment %d cannot be cleaned: %d bytes are left", n, seg.live)
		}
		s.mu.RUnlock()
	}
}

func (r *salvageRig) mustHold(t testing.TB, s *Store) {
	t.Helper()
	buf := make([]byte, dedup.BlockSize)
	for k, model := range r.models {
		v := s.Volume(VolumeID(k + 1))
		for i := range model {
			if err := v.Read(context.Background(), uint64(i)*dedup.BlockSize, buf); err != nil {
				t.Fatal(err)
			}
			if string(buf) != string(model[i](0)) {
				t.Fatalf("volume %d block %d has other content", k+1, i)
			}
		}
	}
	mustCheck(t, s)
}

// TestSalvage loses one device of three, which the pool cannot do without, and keeps
// what stands on the others: a refill sends what the lost one held and little more. When the hold
// ends, what no volume has again is free space.
func TestSalvage(t *testing.T) {
	ctx := context.Background()
	for seed, clean := range []bool{true, false, true, false} {
		if testing.Short() && seed > 1 || raceEnabled && seed != 1 {
			continue
		}
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := newSalvageRig(t, uint64(seed+1), clean)
			if _, err := Salvage(ctx, r.cfg, false, nil); !errors.Is(err, ErrWhole) {
				t.Fatalf("a whole pool: %v", err)
			}
			lost := r.ids[seed%3]
			away := r.disks[lost.Path]
			r.lose(lost.Path)
			forget := r.cfg
			forget.Forget = []DeviceID{lost.ID}
			if _, err := Open(ctx, forget); !errors.Is(err, ErrLost) {
				t.Fatalf("the pool without %s: %v", lost.Path, err)
			}
			if report, err := Salvage(ctx, r.cfg, true, nil); err != nil || report.Segments == 0 || report.Blocks != 0 {
				t.Fatalf("dry run: %+v %v", report, err)
			}
			if _, err := Open(ctx, forget); !errors.Is(err, ErrLost) {
				t.Fatalf("after the dry run: %v", err)
			}
			report := r.salvage(t)
			if len(report.Missing) != 1 || report.Missing[0] != lost.ID || report.Damaged > 0 && clean {
				t.Fatalf("%+v", report)
			}
			s, sent := r.mustRefill(t)
			was, _ := r.held.on(lost.Path)
			var all int64
			groups := 0
			for _, d := range r.ids {
				n, g := r.held.on(d.Path)
				all += n
				if d.ID != lost.ID {
					groups += g
				}
			}
			if groups < 100 {
				t.Fatalf("only %d members of groups stood on the devices that are left", groups)
			}
			t.Logf("%+v: %d bytes were lost of %d, %d were sent", *report, was, all, sent)
			if sent > was+was/10 {
				t.Errorf("%d bytes were sent, the lost device held %d", sent, was)
			}
			// A restart and a fallback to the root before in the middle of it all.
			mustClose(t, s)
			s = r.start()
			if _, held := s.Salvaged(); !held {
				t.Fatal("the hold did not survive a restart")
			}
			r.mustClean(t, s)
			r.mustHold(t, s)
			if err := s.EndSalvage(ctx); err != nil {
				t.Fatal(err)
			}
			if err := s.trimmer.wait(ctx, 0); err != nil {
				t.Fatal(err)
			}
			until(t, "the salvage is gone", func() bool { return salvageGone(s) })
			r.mustHold(t, s)
			// All that is left is what volumes map.
			named := map[dedup.Fingerprint]bool{}
			c := newClient(t, s)
			for _, model := range r.models {
				for i := range model {
					if b, _ := c.reduce(model[i](0), false); b.Encoding != dedup.Zero {
						named[b.Fingerprint] = true
					}
				}
			}
			if left := censusOf(t, s); len(left) != len(named) {
				t.Errorf("%d blocks are stored, %d are named", len(left), len(named))
			}
			mustClose(t, s)
			// The lost device comes back: nobody takes it for the pool.
			r.disks[lost.Path] = away
			r.cfg.Devices = append(r.cfg.Devices, lost.Path)
			s = r.start()
			if len(s.Devices()) != 2 {
				t.Fatalf("%+v", s.Devices())
			}
			r.mustHold(t, s)
			mustClose(t, s)
			r.cfg.Generation = 0
			for i, j := 0, len(r.cfg.Devices)-1; i < j; i, j = i+1, j-1 {
				r.cfg.Devices[i], r.cfg.Devices[j] = r.cfg.Devices[j], r.cfg.Devices[i]
			}
			s = r.start()
			r.mustHold(t, s)
			mustClose(t, s)
		})
	}
}

// TestSalvageCut cuts the power at writes and flushes of a salvage, one after the other:
// it can be run again, or it was through.
func TestSalvageCut(t *testing.T) {
	notUnderRace(t)
	ctx := context.Background()
	base := newSalvageRig(t, 7, false)
	base.lose("disk0")
	whole := base.copyOf()
	report := whole.salvage(t)
	writes := whole.disks["disk1"].Counts(devicetest.Write) - base.disks["disk1"].Counts(devicetest.Write)
	before, after := 0, 0
	step := max(writes/3, 1)
	if testing.Short() {
		step = writes
	}
	for n := 1; n <= writes+1; n++ {
		if n > 1 && n < writes-3 && n%step != 0 {
			continue
		}
		r := base.copyOf()
		r.disks["disk1"].FailNth(devicetest.Write, n, device.ErrClosed)
		_, err := Salvage(ctx, r.cfg, false, nil)
		if err != nil && !strings.Contains(err.Error(), "salvage pool") {
			t.Fatalf("write %d: %v", n, err)
		}
		generation := r.cfg.Generation
		x := r.crashAll(devicetest.CrashOptions{Seed: uint64(n), Keep: 0.5, Tear: true})
		x.opts = r.opts
		x.configure()
		x.cfg.Generation, x.cfg.Devices = generation, base.cfg.Devices
		x.persist()
		r.rig = x
		switch again, err := Salvage(ctx, r.cfg, false, nil); {
		case errors.Is(err, ErrWhole):
			after++
		case err != nil:
			t.Fatalf("write %d, again: %v", n, err)
		default:
			before++
			if again.Blocks < report.Blocks-report.Blocks/20 {
				t.Fatalf("write %d: %d blocks were kept, %d at first", n, again.Blocks, report.Blocks)
			}
		}
		s, sent := r.mustRefill(t)
		if lost, _ := r.held.on("disk0"); sent > lost+lost/5 {
			t.Errorf("write %d: %d bytes were sent, the lost device held %d", n, sent, lost)
		}
		mustClose(t, s)
	}
	t.Logf("%d writes, cut before the end %d times, after it %d times", writes, before, after)
	if before == 0 || after == 0 {
		t.Error("one side was never met")
	}
}

// TestSalvageRot damages bytes of the devices that are left: what is damaged is not kept, and
// nothing that is kept is wrong.
func TestSalvageRot(t *testing.T) {
	notUnderRace(t)
	base := newSalvageRig(t, 3, true)
	base.lose("disk2")
	clean := base.copyOf()
	want := clean.salvage(t)
	for seed := range uint64(6) {
		r := base.copyOf()
		rng := testRand(seed)
		flips := 0
		for _, name := range []string{"disk0", "disk1"} {
			for range 60 * (seed + 1) {
				r.disks[name].FlipBit(format.SuperblockArea+rng.Int64N(20<<20), rng.Int64N(8))
				flips++
			}
		}
		report := r.salvage(t)
		if report.Damaged == 0 || want.Blocks <= report.Blocks {
			t.Errorf("%d flips: %+v, without them %+v", flips, report, want)
		}
		t.Logf("%d flips: %d blocks kept of %d, %d damaged", flips, report.Blocks, want.Blocks, report.Damaged)
		s, _ := r.mustRefill(t) // every stored block is proved
		mustClose(t, s)
	}
}

// TestSalvageShort fills a salvaged pool with other things: what was kept goes, writes do not fail.
func TestSalvageShort(t *testing.T) {
	notUnderRace(t)
	r := newSalvageRig(t, 5, true)
	r.lose("disk1")
	r.salvage(t)
	ended := make(chan struct{})
	r.cfg.Event = func(e Event) {
		if e.Code == "salvage-ended" {
			close(ended)
		}
	}
	s := r.start()
	c := newClient(t, s)
	mustCreate(t, s, 1, 1<<20)
	seq := Seq(0)
	next := uint64(1 << 30)
	write := func() {
		var data []byte
		for range 8 {
			next++
			data = append(data, noise(next)...)
		}
		seq++
		c.must(c.write(1, seq, BlockNo(seq*8), data))
	}
	room := s.Room()
	for s.Room().Live < room.Usable*95/100 {
		write()
	}
	<-ended
	until(t, "the salvage is gone", func() bool { return salvageGone(s) })
	if now := s.Room().Live; room.Usable*95/100 <= now {
		t.Fatalf("%d bytes are live, %d when it was full", now, room.Usable)
	}
	write()
	mustCheck(t, s)
	mustClose(t, s)
}

// TestSalvageFallback damages the root that a salvage left: a start takes the one before.
func TestSalvageFallback(t *testing.T) {
	notUnderRace(t)
	r := newSalvageRig(t, 6, false)
	r.lose("disk0")
	r.salvage(t)
	r.disks["disk1"].Reopen()
	sb, err := readSuperblock(r.disks["disk1"])
	if err != nil || len(sb.Root) == 0 || len(sb.Previous) == 0 {
		t.Fatalf("%+v %v", sb, err)
	}
	for _, x := range sb.Root {
		for i, m := range sb.Members {
			if n := x.Addr.Segment(); m.First <= n && n < m.First+m.Segments {
				at := format.SuperblockArea + int64(n-m.First)*int64(sb.SegmentBytes) + int64(x.Addr.Offset())
				disk := r.disks[[]string{"disk1", "disk2"}[i]]
				disk.FlipBit(at+20, 3)
				disk.FlipBit(at+format.PageSize+20, 3) // its parity
			}
		}
	}
	fell := false
	r.cfg.Event = func(e Event) { fell = fell || e.Code == "root-fallback" }
	s := r.start()
	if !fell {
		t.Error("the newest root was believed")
	}
	mustCheck(t, s)
	mustClose(t, s)
	s, sent := r.mustRefill(t)
	if lost, _ := r.held.on("disk0"); sent > lost+lost/10 {
		t.Errorf("%d bytes were sent, the lost device held %d", sent, lost)
	}
	mustClose(t, s)
}

// resum makes the checksums of headers and records right, as far as there are any.
func resum(image []byte) {
	le := binary.LittleEndian
	for at := 0; at+format.PageSize <= len(image); {
		h := image[at : at+format.CommitHeaderSize]
		if string(h[:8]) != "TWCOMMIT" {
			return
		}
		if n := int64(le.Uint32(h[88:])); int64(at+format.CommitHeaderSize)+n <= int64(len(image)) {
			le.PutUint32(h[100:], format.Checksum(image[at+format.CommitHeaderSize:][:n]))
		}
		le.PutUint32(h[124:], format.Checksum(h[:124]))
		if at += max(int(roundUp(le.Uint32(h[52:]))), format.PageSize); at < 0 {
			return
		}
	}
}

// FuzzSalvageSegment puts any bytes anywhere into segments of the log and of moved blocks, with the
// checksums of headers and records made right again: nothing panics, and what is listed
// is what its fingerprint says.
func FuzzSalvageSegment(f *testing.F) {
	r := newRig(f, 1, 24<<20)
	s := r.start()
	mustCreate(f, s, 1, 200)
	fill(newClient(f, s), 1, new(Seq), 200, prose)
	cleanAll(f, s)
	cleanAll(f, s)
	fill(newClient(f, s), 1, &[]Seq{4}[0], 48, noise)
	f.Cleanup(func() { mustClose(f, s) })
	var all []uint32
	for n := range s.segs.all {
		if s.segs.all[n].live > 0 {
			all = append(all, uint32(n))
		}
	}
	w := &walker{s: s, red: dedup.NewReducer(testKey), buf: device.AlignedBuffer(int(s.segs.bytes))}
	f.Cleanup(func() { device.FreeAligned(w.buf) })
	image := make([]byte, s.segs.bytes)
	groups := 0
	for i, n := range all {
		for _, b := range w.segment(n).blocks {
			if b.Encoding == dedup.ZstdGroup {
				groups++
			}
		}
		f.Add(uint8(i), uint32(140), []byte{1, 2, 3})
		f.Add(uint8(i), uint32(160), []byte{255, 255, 255, 255, 255, 255, 255, 127})
		f.Add(uint8(i), uint32(128), []byte{32, 0, 0, 0, 16, 0, 0, 0, 255, 255, 255, 255})
	}
	if groups == 0 || len(all) < 2 {
		f.Fatalf("%d segments with %d members of groups", len(all), groups)
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint32, patch []byte) {
		n := all[int(which)%len(all)]
		d, off := s.segs.locate(format.MakeAddr(n, 0))
		if err := d.ReadAt(image, off); err != nil {
			t.Fatal(err)
		}
		copy(image[at%uint32(len(image)):], patch)
		resum(image)
		copy(w.buf, image)
		for _, b := range w.parse(n).blocks {
			e := format.Entry{Fingerprint: b.Fingerprint, Addr: b.Addr, Sum: b.Sum, Len: b.Len, Encoding: b.Encoding, Index: b.Index}
			p := &prover{s: s, red: w.red}
			if !s.segs.valid(b.Addr, uint32(b.Len)) || b.Addr.Segment() != n || !storedOK(&e) {
				t.Fatalf("%+v is listed", b)
			}
			if err := p.right(&e, image[b.Addr.Offset():][:b.Len]); err != nil {
				t.Fatalf("%+v: %v", b, err)
			}
		}
	})
}

// salvageGone says whether nothing is left of the hidden volume.
func salvageGone(s *Store) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.volumes[SalvageVolume] == nil
}

// fillNoise writes volume 1 whole.
func fillNoise(c *client, seq *Seq, blocks int, shift uint64) {
	for at := 0; at < blocks; at += 32 {
		var data []byte
		for i := at; i < min(at+32, blocks); i++ {
			data = append(data, noise(uint64(i)+shift)...)
		}
		*seq++
		c.must(c.write(1, *seq, BlockNo(at), data))
	}
}

// TestSalvageCapacity loses the flash of a pool, with log and maps: what had moved to capacity is kept.
func TestSalvageCapacity(t *testing.T) {
	r := &salvageRig{rig: newTiers(t, 32<<20, 32<<20)}
	r.persist()
	s := r.start()
	const blocks = 3200
	mustCreate(t, s, 1, blocks)
	var seq Seq
	fillNoise(newClient(t, s), &seq, blocks, 1)
	for i := range uint64(blocks) {
		r.models[0] = append(r.models[0], func(uint64) []byte { return noise(i + 1) })
	}
	s.cleaner.mu.Lock()
	for range 20 {
		if victim, _ := s.coldest(); victim != format.NoSegment {
			s.demote(victim)
		}
	}
	s.cleaner.mu.Unlock()
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	flash := deviceAt(t, s, "flash")
	r.held = censusOf(t, s)
	mustClose(t, s)
	r.lose("flash")
	report := r.salvage(t)
	if report.Blocks < 500 {
		t.Fatalf("%+v", report)
	}
	r.models[1], r.models[2] = r.models[0][:1], r.models[0][:1]
	s, sent := r.mustRefill(t)
	if lost, _ := r.held.on(flash.Path); sent > lost+lost/20 {
		t.Errorf("%d bytes were sent, flash held %d", sent, lost)
	}
	r.mustClean(t, s)
	r.mustHold(t, s)
	mustClose(t, s)
}

// TestSalvageTight salvages a pool that is nearly full: some is let go, what is left has room for its
// metadata, and with a new disk the volumes are whole again.
func TestSalvageTight(t *testing.T) {
	notUnderRace(t)
	ctx := context.Background()
	r := &salvageRig{rig: newRig(t, 4, 24<<20, 24<<20, 24<<20)}
	r.opts = func(c *Config) { c.ScrubInterval, c.IndexBytes = -1, 1<<20 }
	r.configure()
	r.persist()
	s := r.start()
	c := newClient(t, s)
	blocks := int(s.Room().Usable * 88 / 100 / (dedup.BlockSize + identityCost))
	mustCreate(t, s, 1, uint64(blocks))
	var seq Seq
	fillNoise(c, &seq, blocks, 1<<20)
	fillNoise(c, &seq, blocks, 1<<21) // free segments are full of what was
	for i := range uint64(blocks) {
		r.models[0] = append(r.models[0], func(uint64) []byte { return noise(i + 1<<21) })
	}
	r.models[1], r.models[2] = r.models[0][:1], r.models[0][:1]
	r.held, r.ids = censusOf(t, s), s.Devices()
	mustClose(t, s)
	for i, lost := range r.ids {
		if testing.Short() && i > 0 {
			break
		}
		x := r.copyOf()
		x.lose(lost.Path)
		report, err := Salvage(ctx, x.cfg, false, nil)
		if errors.Is(err, ErrWhole) {
			continue // no metadata stands there at this moment
		}
		if err != nil {
			t.Fatal(err)
		}
		s := x.start()
		mustCheck(t, s)
		if _, held := s.Salvaged(); !held {
			t.Fatal("it is given up at once")
		}
		room := s.Room()
		x.disks["spare"] = devicetest.New(99, 24<<20)
		x.disks["spare"].SetPath("spare")
		if _, err := s.AddDevice(ctx, "spare", NewDevice{}); err != nil {
			t.Fatal(err)
		}
		mustClose(t, s)
		s, sent := x.mustRefill(t)
		gone, _ := r.held.on(lost.Path)
		t.Logf("hint %v: %d of %d segments let go, %d bytes kept of %d usable; %d bytes were lost, %d sent", report.Hint, report.LetGo, report.Segments, report.Bytes, room.Usable, gone, sent)
		if limit := gone + gone/10 + int64(report.LetGo)*int64(s.segs.bytes); sent > limit {
			t.Errorf("%d bytes were sent, more than %d", sent, limit)
		}
		if err := s.EndSalvage(ctx); err != nil {
			t.Fatal(err)
		}
		x.mustHold(t, s)
		mustClose(t, s)
	}
}

// BenchmarkSalvage salvages 768 MiB on files, of blocks that do not compress and of some that do.
func BenchmarkSalvage(b *testing.B) {
	ctx := context.Background()
	for name, content := range map[string]func(uint64) []byte{"noise": noise, "half": pattern} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				c := salvageFiles(b, content)
				b.StartTimer()
				report, err := Salvage(ctx, c, false, nil)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(report.Read)
			}
		})
	}
}

// salvageFiles makes a pool on three files, and loses the one that the root stands on.
func salvageFiles(b *testing.B, content func(uint64) []byte) Config {
	b.Helper()
	ctx, dir := context.Background(), b.TempDir()
	var paths []string
	for i := range 3 {
		paths = append(paths, fmt.Sprintf("%s/disk%d", dir, i))
	}
	if err := Format(ctx, FormatConfig{Pool: [16]byte{7}, Key: testKey, Devices: paths, Sizes: []int64{768 << 20, 768 << 20, 768 << 20}}); err != nil {
		b.Fatal(err)
	}
	c := Config{Devices: paths, Key: testKey, ScrubInterval: -1}
	s, err := Open(ctx, c)
	if err != nil {
		b.Fatal(err)
	}
	const blocks = 768 << 8
	mustCreate(b, s, 1, blocks)
	w, seq := newClient(b, s), Seq(0)
	for at := 0; at < blocks; at += 256 {
		var data []byte
		for i := range 256 {
			data = append(data, content(uint64(at+i)+1<<40)...)
		}
		seq++
		w.must(w.write(1, seq, BlockNo(at), data))
	}
	if err := s.checkpoint(); err != nil {
		b.Fatal(err)
	}
	mustClose(b, s)
	gone := s.devicePath(s.ckpt.rootAt[0].Addr.Segment())
	c.Devices = slices.DeleteFunc(paths, func(p string) bool { return p == gone })
	return c
}
