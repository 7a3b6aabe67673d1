package lsfs

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// coldStores are stores for which all that moves is cold, so that groups are made where a pool
// would take days to.
type coldStores struct {
	mu  sync.Mutex
	all []*Store
}

// every gives the stores for every n-th seed.
func (c *coldStores) every(n, seed uint64) *coldStores {
	if seed%n != 0 {
		return nil
	}
	return c
}

func (c *coldStores) add(s *Store) {
	if c == nil {
		return
	}
	s.cleaner.turn.Lock()
	s.cleaner.eager = true
	s.cleaner.turn.Unlock()
	c.mu.Lock()
	c.all = append(c.all, s)
	c.mu.Unlock()
}

// chill cleans up to most sealed segments that hold blocks, whatever it gains, or packs them, and seals what was written, so that
// it is cleaned by the next call.
func chill(s *Store, most int, pack bool) {
	var full []uint32
	s.mu.RLock()
	for n := range s.segs.all {
		if seg := &s.segs.all[n]; seg.state == segmentSealed && seg.live > 0 && !seg.bad && len(full) < most {
			full = append(full, uint32(n))
		}
	}
	s.mu.RUnlock()
	for _, n := range full {
		if pack {
			s.emptySegment(n, true)
		}
		s.cleanSegment(n) // what was not worth packing
	}
	s.cleaner.turn.Lock()
	s.mu.Lock()
	for i := range s.cleaner.out {
		s.sealStream(&s.cleaner.out[i])
	}
	s.mu.Unlock()
	s.cleaner.turn.Unlock()
}

// mustHaveMet: a test of all seeds made groups, moved some, took some apart, and read some.
func (c *coldStores) mustHaveMet(t *testing.T) { c.mustHave(t, true) }

// mustHave is the same; without moved, of those that were made and read.
func (c *coldStores) mustHave(t *testing.T, moved bool) {
	var made, kept, ended, read int64
	for _, s := range c.all {
		p := &s.cleaner.packing
		made, kept, ended, read = made+p.groups.Load(), kept+p.kept.Load(), ended+p.ended.Load(), read+s.stats.groupReads.Load()
	}
	t.Logf("%d groups made, %d moved whole, %d taken apart, %d read", made, kept, ended, read)
	if *seedFlag == 0 && (made == 0 || moved && (kept == 0 || ended == 0) || read == 0) {
		t.Error("groups were not met")
	}
}

// groupRig is a store whose volume 1 holds prose in groups, as far as that goes, and nothing cached.
func groupRig(t *testing.T, blocks int, sizes ...int64) (*rig, *Store) {
	t.Helper()
	r := newRig(t, 1, sizes...)
	r.opts = func(c *Config) { c.ScrubInterval = -1; c.ReadAhead = -1 }
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, uint64(blocks))
	fill(newClient(t, s), 1, new(Seq), blocks, prose)
	for range 4 {
		cleanAll(t, s) // in segments of 256 KiB few of a pass are not in one
	}
	mustClose(t, s)
	s = r.start()
	<-s.filled // it reads pages
	return r, s
}

// entriesOf gives the entries of the blocks of volume 1 that are members of groups, by block.
func entriesOf(t *testing.T, s *Store, blocks int) map[int]format.Entry {
	t.Helper()
	ctx := context.Background()
	rc, err := s.lease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer s.giveBack(rc)
	list := map[int]format.Entry{}
	for at := 0; at < blocks; at += readBlocks {
		if err := s.Volume(1).resolve(ctx, rc, uint64(at), min(readBlocks, blocks-at), func(int, BID) bool { return false }); err != nil {
			t.Fatal(err)
		}
		for i := range rc.blocks {
			if l := &rc.blocks[i]; l.e.Encoding == dedup.ZstdGroup {
				list[at+l.index] = l.e
			}
		}
		s.letGo(rc)
	}
	return list
}

// groupsOf counts the groups that entries are members of.
func groupsOf(list map[int]format.Entry) int {
	seen := map[format.Addr]bool{}
	for _, e := range list {
		seen[e.Addr] = true
	}
	return len(seen)
}

func mustHold(t *testing.T, v *Volume, first, blocks int, content func(uint64) []byte) {
	t.Helper()
	buf := make([]byte, blocks*dedup.BlockSize)
	if err := v.Read(context.Background(), uint64(first)*dedup.BlockSize, buf); err != nil {
		t.Fatal(err)
	}
	for i := range blocks {
		if !bytes.Equal(buf[i*dedup.BlockSize:][:dedup.BlockSize], content(uint64(first+i))) {
			t.Fatalf("block %d has other content", first+i)
		}
	}
}

// TestGroupReads: a scan in long commands decodes each group about once, wherever the commands begin; a
// read of one block is one read of the device and one group.
func TestGroupReads(t *testing.T) {
	const blocks = 1024
	r, s := groupRig(t, blocks, 48<<20)
	list := entriesOf(t, s, blocks)
	groups := int64(groupsOf(list))
	if len(list) < blocks*3/4 || groups*dedup.PackedBlocks != int64(len(list)) {
		t.Fatalf("%d of %d blocks are in %d groups", len(list), blocks, groups)
	}
	for _, first := range []int{0, 3} {
		was := s.Stats().GroupReads
		for at := first; at < blocks; at += readBlocks {
			mustHold(t, s.Volume(1), at, min(readBlocks, blocks-at), prose)
		}
		// One more for each that two commands share.
		if n := s.Stats().GroupReads - was; n < groups*3/4 || groups+blocks/readBlocks < n {
			t.Errorf("a scan from %d decoded %d times for %d groups", first, n, groups)
		}
		mustClose(t, s)
		s = r.start()
		<-s.filled
	}
	rng := testRand(3)
	mustHold(t, s.Volume(1), 0, 1, prose) // brings the maps in
	for range 20 {
		at := rng.IntN(blocks)
		if _, ok := list[at]; !ok || s.Volume(1).TryRead(uint64(at)*dedup.BlockSize, make([]byte, dedup.BlockSize)) {
			continue
		}
		was := s.Stats()
		mustHold(t, s.Volume(1), at, 1, prose)
		if st := s.Stats(); st.GroupReads != was.GroupReads+1 || st.DeviceReads != was.DeviceReads+1 {
			t.Fatalf("a read of block %d decoded %d groups with %d reads", at, st.GroupReads-was.GroupReads, st.DeviceReads-was.DeviceReads)
		}
	}
	// Sectors, and reads that begin and end in a block.
	for _, c := range [][2]int{{512, 512}, {3 * 512, 5 * 4096}, {4096, 7 * 512}, {0, 64 << 10}} {
		buf := make([]byte, c[1]+7)[7:] // not aligned for the device
		if err := s.Volume(1).Read(context.Background(), uint64(64*4096+c[0]), buf); err != nil {
			t.Fatal(err)
		}
		for i := range buf {
			at := 64*4096 + c[0] + i
			if buf[i] != prose(uint64(at / 4096))[at%4096] {
				t.Fatalf("byte %d of %v", i, c)
			}
		}
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestGroupReadsAhead: who goes through cold data in single blocks has it decoded in parts, not block by block.
func TestGroupReadsAhead(t *testing.T) {
	const blocks = 2048
	r, s := groupRig(t, blocks, 48<<20)
	groups := int64(groupsOf(entriesOf(t, s, blocks)))
	mustClose(t, s)
	r.opts = func(c *Config) { c.ScrubInterval = -1; c.L1Bytes = 16 << 20 }
	r.configure()
	s = r.start()
	<-s.filled
	for at := range blocks {
		mustHold(t, s.Volume(1), at, 1, prose)
		until(t, "read ahead", func() bool { return len(s.ahead) == 0 })
	}
	if n := s.Stats().GroupReads; n > 2*groups {
		t.Errorf("decoded %d times for %d groups", n, groups)
	}
	mustClose(t, s)
}

// TestGroupLife: members die one by one, and each takes its share of the live bytes along; what moves while
// all live moves as it is; what is left of others is packed anew. Clones and snapshots hold members,
// a start after a crash finds all of it, and the last member takes the group along.
func TestGroupLife(t *testing.T) {
	const blocks = 1024
	r, s := groupRig(t, blocks, 48<<20)
	ctx := context.Background()
	p := &s.cleaner.packing
	c := newClient(t, s)
	seq := s.Volume(1).Meta().Durable.Seq
	list := entriesOf(t, s, blocks)
	restart := func() {
		t.Helper()
		mustCheck(t, s)
		old := s
		r = r.crash(devicetest.CrashOptions{Seed: uint64(seq), Keep: 0.5, Tear: true})
		mustClose(t, old)
		s = r.start()
		c, p = newClient(t, s), &s.cleaner.packing
		mustCheck(t, s)
	}
	// Every member of three groups, one after the other; every second of others.
	rng := testRand(4)
	dead := map[int]bool{}
	kill := func(at int) {
		t.Helper()
		e := list[at]
		s.mu.RLock()
		was := s.segs.all[e.Addr.Segment()].live
		s.mu.RUnlock()
		seq++
		c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq}, Start: BlockNo(at), Count: 1})
		dead[at] = true
		s.mu.RLock()
		now := s.segs.all[e.Addr.Segment()].live
		s.mu.RUnlock()
		if was-now != e.Share() || e.Share() < uint32(e.Len)/dedup.PackedBlocks || uint32(e.Len)/dedup.PackedBlocks+1 < e.Share() {
			t.Fatalf("block %d of %d bytes took %d along, its share is %d", at, e.Len, was-now, e.Share())
		}
	}
	ends := map[format.Addr]int{}
	for at := range blocks {
		if e, ok := list[at]; ok && (len(ends) < 3 || ends[e.Addr] > 0) {
			ends[e.Addr]++
			kill(at)
		} else if ok && at > blocks/2 && rng.IntN(2) == 0 {
			kill(at)
		}
	}
	for a, n := range ends {
		if n != dedup.PackedBlocks {
			t.Fatalf("group at %x has %d members", uint64(a), n)
		}
	}
	content := func(n uint64) []byte {
		if dead[int(n)] {
			return make([]byte, dedup.BlockSize)
		}
		return prose(n)
	}
	mustHold(t, s.Volume(1), 0, blocks, content)
	restart()
	mustHold(t, s.Volume(1), 0, blocks, content)

	// What is dead by now lives in a clone and a snapshot, both made before more of it dies.
	seq++
	c.must(&Op{Kind: OpSnapshot, Volume: 1, ID: OpID{1, seq}, Snapshot: 9})
	for at := blocks / 4; at < blocks/2; at++ {
		dead[at] = true
	}
	seq++
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq}, Start: blocks / 4, Count: blocks / 4})
	data := s.segs.data.Load()
	for range 3 {
		cleanAll(t, s)
	}
	if p.kept.Load() == 0 || p.ended.Load() == 0 || p.groups.Load() == 0 {
		t.Fatalf("%d groups moved whole, %d taken apart, %d made", p.kept.Load(), p.ended.Load(), p.groups.Load())
	}
	// What was taken apart leaves no group behind that is garbage in part.
	whole := map[format.Addr]int{}
	err := s.eachEntryPage(nil, func(_ BID, page []byte) {
		var e format.Entry
		for i := range format.EntriesPerPage {
			if format.ParseEntry(format.EntryAt(page, i), &e); e.Addr != 0 && e.Encoding == dedup.ZstdGroup {
				whole[e.Addr]++
			}
		}
	})
	for a, n := range whole {
		if err != nil || n != dedup.PackedBlocks {
			t.Fatalf("%v: %d members are left at %x", err, n, uint64(a))
		}
	}
	// The living do not take more room for it, but for a few that found no company.
	if now := s.segs.data.Load(); data+data/20 < now {
		t.Fatalf("%d bytes became %d", data, now)
	}
	mustHold(t, s.Volume(1), 0, blocks, content)
	restart()
	mustHold(t, s.Volume(1), 0, blocks, content)
	mustHold(t, &s.Snapshot(9).content, blocks/4, blocks/4, prose)

	x, err := s.Explain(ctx, true, nil)
	if err != nil || x.Volumes+x.Snapshots != s.segs.data.Load() || x.Snapshots == 0 || x.Unsettled != 0 {
		t.Fatalf("%+v, %v", x, err)
	}
	if last := mustScrub(t, s); last.Damaged != 0 || last.Counters != 0 {
		t.Fatalf("%+v", last)
	}
	var dump strings.Builder
	mustClose(t, s)
	if err := DumpPool(ctx, r.cfg, DumpOptions{Segment: format.NoSegment, Volume: 1, Count: blocks}, &dump); err != nil || !strings.Contains(dump.String(), "number 7 of 8 in") {
		t.Fatalf("%v\n%s", err, dump.String())
	}
	s = r.start()
	if err := s.DeleteVolume(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteSnapshot(ctx, 9); err != nil {
		t.Fatal(err)
	}
	for _, id := range []VolumeID{1, 9} {
		if err := s.trimmer.wait(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.segs.data.Load(); n != 0 {
		t.Fatalf("%d bytes are live when all is gone", n)
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestGroupDamage: a damaged group is refused by every reader of every member, left where it is by the
// cleaner, and mended member by member from a donor by scrub, or by who reads; the counts of scrub are of
// living members.
func TestGroupDamage(t *testing.T) {
	const blocks = 512
	ctx := context.Background()
	r, s := groupRig(t, blocks, 48<<20)
	list := entriesOf(t, s, blocks)
	var places []int
	for at := range list {
		places = append(places, at)
	}
	slices.Sort(places)
	first := list[places[0]]
	var members []int
	for _, at := range places {
		if e := list[at]; sameGroup(&e, &first) {
			members = append(members, at)
		}
	}
	c := newClient(t, s)
	seq := s.Volume(1).Meta().Durable.Seq + 1
	c.must(&Op{Kind: OpUnmap, Volume: 1, ID: OpID{1, seq}, Start: BlockNo(members[2]), Count: 1})
	flip := func(bit int64) {
		d, off := s.segs.locate(first.Addr)
		r.disks[d.Path()].FlipBit(off, bit)
	}
	flip(int64(first.Len)*4 + 3)
	buf, red := make([]byte, dedup.BlockSize), dedup.NewReducer(testKey)
	for _, at := range members {
		err := s.Volume(1).Read(ctx, uint64(at)*dedup.BlockSize, buf)
		var ce *CorruptError
		if bad := errors.As(err, &ce); bad != (at != members[2]) || bad && (ce.Fingerprint != list[at].Fingerprint || ce.Block != BlockNo(at)) {
			t.Fatalf("member %d: %v", at, err)
		}
	}
	if err := s.Volume(1).ReadReduced(ctx, BlockNo(members[0]), make([]dedup.Block, 1), buf); err == nil {
		t.Fatal("a damaged block goes to another node")
	}
	if r, err := s.check(ctx, true); err != nil || r.Count != dedup.PackedBlocks-1 {
		t.Fatal(r, err)
	}
	if last := mustScrub(t, s); last.Damaged != dedup.PackedBlocks-1 || last.Lost != dedup.PackedBlocks-1 || last.Repaired != 0 {
		t.Fatalf("without a donor: %+v", last)
	}
	s.cleanSegment(first.Addr.Segment())
	if got := entriesOf(t, s, blocks)[members[0]]; got.Addr != first.Addr {
		t.Fatal("a damaged group was moved")
	}
	// One is repaired by who reads it. The others stay as they are.
	repair := func(at int) dedup.Block {
		enc, data := red.Encode(make([]byte, 0, dedup.EncodeRoom), prose(uint64(at)), true)
		return dedup.Block{Fingerprint: red.Fingerprint(prose(uint64(at))), Encoding: enc, Data: data, Sum: dedup.Sum(data)}
	}
	if err := s.Volume(1).Repair(ctx, BlockNo(members[5]), repair(members[5])); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s.Volume(1), members[5], 1, prose)
	s.SetDonor(func(_ context.Context, fp dedup.Fingerprint, _ []Place) (dedup.Block, error) {
		for _, at := range members {
			if list[at].Fingerprint == fp {
				return repair(at), nil
			}
		}
		return dedup.Block{}, ErrNotFound
	})
	if last := mustScrub(t, s); last.Damaged != dedup.PackedBlocks-2 || last.Repaired != last.Damaged || last.Counters != 0 {
		t.Fatalf("%+v", last)
	}
	content := func(n uint64) []byte {
		if int(n) == members[2] {
			return make([]byte, dedup.BlockSize)
		}
		return prose(n)
	}
	mustHold(t, s.Volume(1), 0, blocks, content)
	mustCheck(t, s)

	// Commits of a segment with groups are damaged: all that lives there goes elsewhere.
	second := list[places[len(places)-1]]
	d, off := s.segs.locate(format.MakeAddr(second.Addr.Segment(), 0))
	r.disks[d.Path()].FlipBit(off, 777)
	if last := mustScrub(t, s); last.Damaged == 0 || last.Lost != 0 {
		t.Fatalf("%+v", last)
	}
	if got := entriesOf(t, s, blocks)[places[len(places)-1]]; got.Addr == second.Addr {
		t.Fatal("a block stands behind a damaged commit")
	}
	mustHold(t, s.Volume(1), 0, blocks, content)
	mustCheck(t, s)
	mustClose(t, s)
}

// TestGroupThatIsNone: identities that no writer wrote are damaged blocks, and nothing else happens.
func TestGroupThatIsNone(t *testing.T) {
	const blocks = 512
	ctx := context.Background()
	_, s := groupRig(t, blocks, 48<<20)
	list := entriesOf(t, s, blocks)
	at := 0
	for list[at].Addr == 0 {
		at++
	}
	buf, p := make([]byte, dedup.BlockSize), newProver(s)
	defer p.close()
	for name, change := range map[string]func(e *format.Entry){
		"index":    func(e *format.Entry) { e.Index = dedup.PackedBlocks },
		"index2":   func(e *format.Entry) { e.Index = 255 },
		"no bytes": func(e *format.Entry) { e.Len, e.Sum = 0, 0 },
		"few":      func(e *format.Entry) { e.Len = 7 },
		"many":     func(e *format.Entry) { e.Len = 1<<16 - 1 },
		"a block":  func(e *format.Entry) { e.Encoding = dedup.Zstd },
		"behind":   func(e *format.Entry) { e.Addr = format.MakeAddr(e.Addr.Segment(), format.SegmentMin-1) },
	} {
		put := func(e format.Entry) {
			s.mu.Lock()
			leaf, _, _, _ := s.pg.lookup(s.find(1).mapTree, wordShift, uint64(at))
			b, _, _ := s.entryOf(BID(format.Word(leaf, at)))
			format.PutEntry(b, &e)
			s.mu.Unlock()
		}
		e := list[at]
		change(&e)
		put(e)
		err := s.Volume(1).Read(ctx, uint64(at)*dedup.BlockSize, buf)
		var ce *CorruptError
		if !errors.As(err, &ce) {
			t.Errorf("%s: %v", name, err)
		}
		if r, err := s.check(ctx, true); err != nil || r.OK() {
			t.Errorf("%s: %v %v", name, r, err)
		}
		s.cleanSegment(list[at].Addr.Segment())
		// As scrub does, which would also correct what the segments count.
		bad := 0
		p.prove([]suspect{{e: e, nowhere: !s.segs.valid(e.Addr, uint32(e.Len))}}, func(*suspect, uint32, error) { bad++ })
		if bad != 1 {
			t.Errorf("%s: proved", name)
		}
		put(list[at])
	}
	mustClose(t, s)
}

// TestGroupReadAllocatesNothing: neither alone nor in a row.
func TestGroupReadAllocatesNothing(t *testing.T) {
	flat := make(flatDisk, 64<<20)
	open := func(string) (device.Device, error) { return &lockedDisk{flatDisk: flat}, nil }
	err := Format(context.Background(), FormatConfig{Key: testKey, Devices: []string{"flat"}, OpenDevice: open, SegmentBytes: format.SegmentMin})
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(context.Background(), Config{Devices: []string{"flat"}, OpenDevice: open, Key: testKey, L1Bytes: 1 << 20, MetadataBytes: 16 << 20, IndexBytes: 1 << 20, ReadAhead: -1})
	if err != nil {
		t.Fatal(err)
	}
	const blocks = 1024
	v := mustCreate(t, s, 1, blocks)
	fill(newClient(t, s), 1, new(Seq), blocks, prose)
	cleanAll(t, s)
	cleanAll(t, s)
	buf := make([]byte, 64*dedup.BlockSize)
	n := uint64(0)
	read := func(blocks uint64) func() {
		return func() {
			n = (n + 97) % 960
			if err := v.Read(context.Background(), n*dedup.BlockSize, buf[:blocks*dedup.BlockSize]); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, blocks := range []uint64{1, 8, 64} {
		for range 200 {
			read(blocks)()
		}
		was := s.Stats().GroupReads
		if a := testing.AllocsPerRun(300, read(blocks)); a != 0 && !raceEnabled {
			t.Errorf("%.1f allocations per read of %d blocks", a, blocks)
		}
		if s.Stats().GroupReads-was < 100 {
			t.Errorf("%d groups were read", s.Stats().GroupReads-was)
		}
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestRaiseRoot: a pool stays one that a program of before groups opens, and has none, until it is told
// otherwise and two checkpoints say so; then there is no way back.
func TestRaiseRoot(t *testing.T) {
	r := newRig(t, 1, 48<<20)
	r.opts = func(c *Config) { c.RootVersion = format.OldestRootVersion }
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, 1024)
	fill(newClient(t, s), 1, new(Seq), 1024, prose)
	again := func(version uint32) {
		t.Helper()
		mustHold(t, s.Volume(1), 0, 1024, prose)
		mustCheck(t, s)
		mustClose(t, s)
		s = r.start()
		if got := s.rootVersion.Load(); got != version {
			t.Fatalf("a root of version %d, want %d", got, version)
		}
	}
	for range 3 {
		cleanAll(t, s)
	}
	if p := &s.cleaner.packing; p.groups.Load() != 0 || p.blocks.Load() == 0 {
		t.Fatalf("%d groups, %d blocks packed", p.groups.Load(), p.blocks.Load())
	}
	again(format.OldestRootVersion)
	s.RaiseRoot(format.RootVersion)
	s.RaiseRoot(format.OldestRootVersion)
	if err := s.checkpoint(); err != nil {
		t.Fatal(err)
	}
	cleanAll(t, s)
	if n := s.cleaner.packing.groups.Load(); n != 0 {
		t.Fatalf("%d groups, and the root before is older", n)
	}
	cleanAll(t, s)
	if s.cleaner.packing.groups.Load() == 0 {
		t.Fatal("no groups")
	}
	again(format.RootVersion)
	again(format.RootVersion)
	mustClose(t, s)
}

// TestGroupTiers: what moves to capacity goes there in groups. A member that is read again and again comes
// back by itself, and the others stay; when the device is lost each member is repaired by itself.
func TestGroupTiers(t *testing.T) {
	ctx := context.Background()
	const blocks = 1024
	r := newTiers(t, 32<<20, 32<<20)
	r.opts = func(c *Config) { c.ScrubInterval = -1; c.ReadAhead = -1 }
	r.configure()
	s := r.start()
	mustCreate(t, s, 1, blocks)
	fill(newClient(t, s), 1, new(Seq), blocks, prose)
	if err := s.post(&task{kind: taskTurn}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.checkpoint(); err != nil { // from then on no older program can open it
			t.Fatal(err)
		}
	}
	s.cleaner.mu.Lock() // the cleaner itself is idle: the pool is far from full
	for range 20 {
		if victim, _ := s.coldest(); victim != format.NoSegment {
			s.demote(victim)
		}
	}
	s.cleaner.mu.Unlock()
	list := entriesOf(t, s, blocks)
	if on := where(t, s.Volume(1), 0, blocks); len(list) < blocks/2 || on[Capacity] < len(list) {
		t.Fatalf("%d blocks in groups, %d on capacity", len(list), on[Capacity])
	}
	at := 0
	for list[at].Addr == 0 {
		at++
	}
	buf := make([]byte, dedup.BlockSize)
	until(t, "promotion", func() bool {
		if err := s.Volume(1).Read(ctx, uint64(at)*dedup.BlockSize, buf); err != nil {
			t.Fatal(err)
		}
		forget(t, s.Volume(1), at+1)
		return where(t, s.Volume(1), uint64(at), uint64(at)+1)[Flash] == 1
	})
	now := entriesOf(t, s, blocks)
	if _, still := now[at]; still || len(now) < blocks/4 { // looking for where blocks stand counts as reads of them, too
		t.Fatalf("%d of %d blocks are in groups after some came back", len(now), len(list))
	}
	mustHold(t, s.Volume(1), 0, blocks, prose)
	mustCheck(t, s)
	id := deviceAt(t, s, "capacity").ID
	mustClose(t, s)

	r.lose("capacity")
	r.cfg.Forget = []DeviceID{id}
	s = r.start()
	now = entriesOf(t, s, blocks) // what was read often has come back meanwhile
	if len(now) < blocks/4 {
		t.Fatalf("%d blocks are in groups", len(now))
	}
	for at = 0; now[at].Addr == 0; {
		at++
	}
	err := s.Volume(1).Read(ctx, uint64(at)*dedup.BlockSize, make([]byte, 8*dedup.BlockSize))
	if !errors.Is(err, ErrLost) {
		t.Fatal(err)
	}
	red, numbers := dedup.NewReducer(testKey), map[dedup.Fingerprint]uint64{}
	for n := range uint64(blocks) {
		numbers[red.Fingerprint(prose(n))] = n
	}
	s.SetDonor(func(_ context.Context, fp dedup.Fingerprint, _ []Place) (dedup.Block, error) {
		enc, data := red.Encode(make([]byte, 0, dedup.EncodeRoom), prose(numbers[fp]), true)
		return dedup.Block{Fingerprint: fp, Encoding: enc, Data: data, Sum: dedup.Sum(data)}, nil
	})
	if last := mustScrub(t, s); last.Damaged < uint64(len(now)) || last.Repaired != last.Damaged || last.Counters != 0 {
		t.Fatalf("%d were in groups: %+v", len(now), last)
	}
	mustHold(t, s.Volume(1), 0, blocks, prose)
	mustCheck(t, s)
	mustClose(t, s)
}
