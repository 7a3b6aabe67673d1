package lsfs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

var rotMiB = flag.Int("rot.mib", 16, "size of the store in which TestRot flips a bit in every 4 KiB")

// rotStore is a filled store on an image, and what it holds.
type rotStore struct {
	*Store
	image   *devicetest.Image
	cfg     Config
	content [3][]uint64 // pattern numbers by block of volumes 1 to 3
	peer    *Store
	cold    coldStores
}

// rotBlock is a block that is told apart by n: one in four does not compress.
func rotBlock(n uint64) []byte {
	b := make([]byte, dedup.BlockSize)
	if n == 0 {
		return b
	}
	rng := rand.New(rand.NewPCG(n, 77))
	end := len(b)
	if n%4 != 0 {
		end = int(n*911) % len(b) &^ 7
	}
	for i := 0; i < end; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	binary.LittleEndian.PutUint64(b[4000:], n)
	return b
}

// newRotStore fills a store to nine tenths of what it takes, with blocks that several
// places share, clones, holes, and what has been overwritten and cleaned.
func newRotStore(t *testing.T, mib int, name string) *rotStore {
	t.Helper()
	segment := uint32(format.SegmentMin)
	for int64(mib)<<20/int64(segment) > 1024 {
		segment *= 2
	}
	r := &rotStore{image: devicetest.NewImage(name, format.SuperblockArea+int64(mib)<<20)}
	r.cfg = explorerConfig([]*devicetest.Image{r.image})
	r.cfg.ScrubInterval, r.cfg.IndexBytes = -1, max(64<<10, int64(mib)<<14)
	r.cfg.MetadataBytes = max(8<<20, int64(mib)<<15)
	err := Format(context.Background(), FormatConfig{Pool: [16]byte{9}, Key: testKey, Devices: r.cfg.Devices, SegmentBytes: segment, OpenDevice: r.cfg.OpenDevice})
	if err != nil {
		t.Fatal(err)
	}
	if r.Store, err = Open(context.Background(), r.cfg); err != nil {
		t.Fatal(err)
	}
	r.cold.add(r.Store)
	rng := rand.New(rand.NewPCG(uint64(mib), 5))
	blocks := uint64(mib) * 256
	c := newClient(t, r.Store)
	var seq [3]Seq
	for i := range r.content {
		mustCreate(t, r.Store, VolumeID(i+1), blocks)
		r.content[i] = make([]uint64, blocks)
	}
	n := uint64(0)
	for at := uint64(0); ; {
		count := min(1+rng.Uint64N(64), blocks-at)
		if room := r.Room(); count == 0 || room.Usable/10*9 < room.Live {
			break
		}
		var data []byte
		v := rng.IntN(2)
		for i := range count {
			if n++; rng.IntN(8) == 0 {
				r.content[v][at+i] = rng.Uint64N(n) + 1
			} else {
				r.content[v][at+i] = n
			}
			data = append(data, rotBlock(r.content[v][at+i])...)
		}
		seq[v]++
		c.must(c.write(VolumeID(v+1), seq[v], BlockNo(at), data))
		at += count
		if rng.IntN(10) == 0 && at > 2000 {
			start, count := rng.Uint64N(at-600), rng.Uint64N(600)+1
			seq[v]++
			c.must(&Op{Kind: OpUnmap, Volume: VolumeID(v + 1), ID: OpID{1, seq[v]}, Start: BlockNo(start), Count: uint32(count)})
			clear(r.content[v][start : start+count])
		}
	}
	for at := uint64(0); at < blocks; at += 1024 {
		if rng.IntN(3) > 0 {
			seq[2]++
			src := rng.IntN(2)
			c.must(&Op{Kind: OpClone, Volume: 3, ID: OpID{1, seq[2]}, Start: BlockNo(at), Count: 1024, Source: VolumeID(src + 1), SourceStart: BlockNo(at)})
			copy(r.content[2][at:at+1024], r.content[src][at:])
		}
	}
	// A part of what is stored becomes cold.
	for n := range r.segs.count() / 3 {
		r.mu.RLock()
		use := r.segs.all[n].state == segmentSealed && r.segs.all[n].live > 0
		r.mu.RUnlock()
		if use {
			r.cleanSegment(n)
		}
		if n%8 == 0 {
			r.settle(t, 2)
		}
	}
	r.settle(t, 1)
	if r.cleaner.packing.groups.Load() == 0 {
		t.Fatal("no groups")
	}
	return r
}

// still closes the store and opens it without what moves things by itself: it commits
// and takes the checkpoints that are asked for, and cleans where clean is called.
func (r *rotStore) still(t *testing.T) {
	t.Helper()
	mustClose(t, r.Store)
	s, err := open(context.Background(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Store = s
	if _, err := s.healSuperblocks(); err != nil {
		t.Fatal(err)
	}
	s.running.Go(s.committer)
	s.running.Go(s.checkpointLoop)
}

// clean makes room, as the cleaner does.
func (r *rotStore) clean(t *testing.T) {
	t.Helper()
	for try := 0; r.segs.nFree.Load() <= r.reserve()+4 && try < 16; try++ {
		if n, ok := r.victim(true); ok {
			r.cleanSegment(n)
		}
		if try%2 == 1 {
			r.settle(t, 3)
		}
	}
}

// settle takes n checkpoints.
func (r *rotStore) settle(t *testing.T, n int) {
	t.Helper()
	for range n {
		if err := r.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
}

// verify reads everything back.
func (r *rotStore) verify(t *testing.T) {
	t.Helper()
	buf := make([]byte, 256*dedup.BlockSize)
	for i, content := range r.content {
		v := r.Volume(VolumeID(i + 1))
		for at := 0; at < len(content); at += 256 {
			if err := v.Read(context.Background(), uint64(at)*dedup.BlockSize, buf); err != nil {
				t.Fatal(err)
			}
			for k, n := range content[at : at+256] {
				if !bytes.Equal(buf[k*dedup.BlockSize:][:dedup.BlockSize], rotBlock(n)) {
					t.Fatalf("volume %d block %d is not %d", i+1, at+k, n)
				}
			}
		}
	}
}

// item is what stands in a range of a device.
type item struct {
	off, end int64
	block    *suspect
	page     uint32 // id
	dir      bool   // page of the directory, or of the root
	commit   bool   // header and records, or parity: of no use but to the cleaner, a start and repair
}

// items lists what is in use in a segment.
func (r *rotStore) items(n uint32) []item {
	_, base := r.segs.locate(format.MakeAddr(n, 0))
	at := func(a format.Addr) int64 { return base + int64(a.Offset()) }
	var list []item
	_ = r.eachEntryPage(nil, func(first BID, page []byte) {
		for i := range format.EntriesPerPage {
			if e := format.EntryAt(page, i); format.EntryAddr(e) != 0 && format.EntryAddr(e).Segment() == n {
				l := &suspect{bid: identityAt(first, i, e)}
				format.ParseEntry(e, &l.e)
				list = append(list, item{off: at(l.e.Addr), end: at(l.e.Addr) + int64(l.e.Len), block: l})
			}
		}
	})
	r.mu.RLock()
	for id := uint32(1); id < r.pg.n; id++ {
		if p := r.pg.page(id); p.flags&pageAlive != 0 && p.flags&pageDirty == 0 && r.pg.entry(id).Addr.Segment() == n && r.pg.entry(id).Addr != 0 {
			a := r.pg.entry(id).Addr
			list = append(list, item{off: at(a), end: at(a) + format.PageSize, page: id})
		}
	}
	for _, x := range append(slices.Clone(r.ckpt.dirAt), r.ckpt.rootAt...) {
		if x.Addr.Segment() == n {
			list = append(list, item{off: at(x.Addr), end: at(x.Addr) + int64(x.Len), dir: true})
		}
	}
	live := len(list) > 0 && r.segs.arena[n].state == segmentSealed
	r.mu.RUnlock()
	if live {
		k := &logReader{s: r.Store, buf: device.AlignedBuffer(int(r.commitMax) + readAhead), ahead: format.PageSize}
		defer device.FreeAligned(k.buf)
		var c format.Commit
		generation := uint64(0)
		for off := uint32(0); off < r.segs.bytes; {
			ok, err := k.header(n, off, &c)
			if err != nil || !ok || off > 0 && c.Generation != generation {
				break // or what an earlier use of the segment left
			}
			generation = c.Generation
			all, _, _ := k.records(&c)
			if pages, ok := parityPages(&c, all[format.CommitHeaderSize:]); ok {
				// All of it is needed, pages of before too: parity makes the others from them.
				for i := range pages {
					at := base + int64(off) + int64(i)*format.PageSize
					if !slices.ContainsFunc(list, func(x item) bool { return x.off <= at && at < x.end }) {
						list = append(list, item{off: at, end: at + format.PageSize, commit: true})
					}
				}
			} else {
				list = append(list, item{off: base + int64(off), end: base + int64(off) + format.CommitHeaderSize + int64(c.RecordBytes), commit: true})
			}
			off += c.Total
		}
	}
	slices.SortFunc(list, func(a, b item) int { return cmp.Compare(a.off, b.off) })
	return list
}

// TestRot flips one bit in every 4 KiB of a store, one at a time, while it runs:
// superblocks, headers of commits, map and identity pages, directory, root, parity and
// blocks. Each that hits something in use is found by scrub and repaired, from a peer
// that gives blocks by their fingerprints, from parity or from copies; a read that
// meets it first says so and never returns it. One that hits nothing changes nothing.
func TestRot(t *testing.T) {
	mib := *rotMiB
	if testing.Short() {
		mib = 8
	}
	ctx := context.Background()
	r := newRotStore(t, mib, "rot")
	r.still(t)
	defer func() { mustClose(t, r.Store) }()
	if mib <= 64 {
		p := newRotStore(t, mib, "peer")
		defer func() { mustClose(t, p.Store) }()
		r.peer = p.Store
	}
	numbers := map[dedup.Fingerprint]uint64{}
	red := dedup.NewReducer(testKey)
	for _, content := range r.content {
		for _, n := range content {
			if n != 0 && r.peer == nil {
				numbers[red.Fingerprint(rotBlock(n))] = n
			}
		}
	}
	fetched := 0
	donor := func(ctx context.Context, fp dedup.Fingerprint, _ []Place) (dedup.Block, error) {
		fetched++
		if r.peer != nil {
			return r.peer.ReadFingerprint(ctx, &fp, make([]byte, dedup.BlockSize))
		}
		enc, data := red.Encode(make([]byte, 0, dedup.EncodeRoom), rotBlock(numbers[fp]), true)
		return dedup.Block{Fingerprint: fp, Encoding: enc, Data: data, Sum: dedup.Sum(data)}, nil
	}
	r.SetDonor(donor)
	r.allocScrub()
	r.scrub.full = true
	rng := rand.New(rand.NewPCG(uint64(mib), 6))
	began := time.Now()
	var groups int // that were damaged
	var flips, blocks, pages, commits, directory, supers, free, refused int
	result := func() ScrubResult { return r.Scrub().Current }

	for at := int64(0); at < format.SuperblockArea; at += format.PageSize {
		flips++
		before := result()
		r.image.FlipBit(at, rng.Int64N(format.PageSize*8))
		if err := r.scrubSuperblocks(); err != nil {
			t.Fatal(err)
		}
		switch after := result(); {
		case slices.Contains(format.SuperblockOffsets[:], at):
			if supers++; after.Repaired != before.Repaired+1 {
				t.Fatalf("superblock at %d is not repaired", at)
			}
		case after != before:
			t.Fatalf("a flip at %d, where nothing is, has %+v", at, after)
		default:
			free++
		}
	}
	buf := make([]byte, dedup.BlockSize)
	for n := range r.segs.count() {
		if n%64 == 63 {
			r.settle(t, 1)
		}
		_, base := r.segs.locate(format.MakeAddr(n, 0))
		r.mu.RLock()
		sealed := r.segs.arena[n].state == segmentSealed
		r.segs.arena[n].readers.Add(1) // what is flipped back here must still be what was flipped
		r.mu.RUnlock()
		list := r.items(n)
		for off := base; off < base+int64(r.segs.bytes); off += format.PageSize {
			flips++
			bit := rng.Int64N(format.PageSize * 8)
			// Where something is in use in the page, it is hit.
			if k := slices.IndexFunc(list, func(x item) bool { return x.off < off+format.PageSize && off < x.end }); k >= 0 {
				for k+1 < len(list) && list[k+1].off < off+format.PageSize && rng.IntN(2) == 0 {
					k++
				}
				lo, hi := max(list[k].off, off), min(list[k].end, off+format.PageSize)
				bit = (lo-off)*8 + rng.Int64N((hi-lo)*8)
			}
			hit := off + bit/8
			i, _ := slices.BinarySearchFunc(list, hit, func(x item, at int64) int { return cmp.Compare(x.off, at+1) })
			if i == 0 || list[i-1].end <= hit {
				free++
				r.mu.RLock()
				idle := sealed && r.segs.arena[n].state == segmentSealed
				r.mu.RUnlock()
				if idle {
					r.image.FlipBit(off, bit) // and there it stays
				}
				continue
			}
			x := list[i-1]
			before := result()
			switch {
			case x.block != nil:
				r.mu.RLock()
				e, _, _ := r.entryOf(x.block.bid)
				gone := e == nil || format.EntryAddr(e) != x.block.e.Addr
				r.mu.RUnlock()
				if gone {
					free++ // it was repaired, to elsewhere
					continue
				}
				r.image.FlipBit(off, bit)
				r.l1.Remove(uint64(x.block.bid))
				places := map[BID][]Place{x.block.bid: nil}
				if blocks%8 == 0 {
					if err := r.findPlaces(ctx, places); err != nil {
						t.Fatal(err)
					}
				}
				for _, p := range places[x.block.bid] {
					var ce *CorruptError
					err := r.Volume(p.Volume).Read(ctx, uint64(p.Start)*dedup.BlockSize, buf)
					if !errors.As(err, &ce) || ce.BID != x.block.bid {
						t.Fatalf("read of a damaged block: %v", err)
					}
					refused++
				}
				// With a member of a group all of them are damaged.
				hurt := []suspect{*x.block}
				for _, y := range list {
					if y.block == nil || y.block.bid == x.block.bid || !sameGroup(&y.block.e, &x.block.e) {
						continue
					}
					r.mu.RLock()
					e, _, _ := r.entryOf(y.block.bid)
					stands := e != nil && format.EntryAddr(e) == y.block.e.Addr
					r.mu.RUnlock()
					if stands {
						r.l1.Remove(uint64(y.block.bid))
						hurt = append(hurt, *y.block)
					}
				}
				if len(hurt) > 1 {
					groups++
				}
				r.proveBlocks(ctx, hurt)
				if after := result(); after.Damaged != before.Damaged+uint64(len(hurt)) || after.Repaired != before.Repaired+uint64(len(hurt)) {
					t.Fatalf("block %d: %+v after %+v", x.block.bid, after, before)
				}
				for _, p := range places[x.block.bid] {
					if err := r.Volume(p.Volume).Read(ctx, uint64(p.Start)*dedup.BlockSize, buf); err != nil || !bytes.Equal(buf, rotBlock(r.content[p.Volume-1][p.Start])) {
						t.Fatalf("%v after the repair: %v", p, err)
					}
				}
				blocks++
			case x.page != 0, x.dir:
				continue // below: they move with each checkpoint
			case x.commit:
				k := &logReader{s: r.Store, buf: device.AlignedBuffer(int(r.commitMax) + readAhead), ahead: format.PageSize}
				r.image.FlipBit(off, bit)
				_, damaged, err := r.proveCommits(k, n)
				device.FreeAligned(k.buf)
				last := i == len(list) || !slices.ContainsFunc(list[i:], func(y item) bool { return y.commit })
				if err != nil || damaged == 0 && !last {
					t.Fatalf("commit at segment %d: %d damaged, %v", n, damaged, err)
				}
				if commits++; commits%50 == 0 {
					r.scrub.state.Next = uint64(n)
					if err := r.scrubCommits(ctx); err != nil {
						t.Fatal(err)
					}
				}
				r.image.FlipBit(off, bit)
			}
		}
		r.segs.arena[n].readers.Add(-1)
		r.clean(t) // blocks were written elsewhere
	}
	r.settle(t, 1)
	for id := uint32(1); id < r.pg.n; id++ {
		r.mu.RLock()
		e := *r.pg.entry(id)
		clean := r.pg.page(id).flags&(pageAlive|pageDirty) == pageAlive && e.Addr != 0
		if clean {
			r.segs.arena[e.Addr.Segment()].readers.Add(1)
		}
		r.mu.RUnlock()
		if !clean {
			continue
		}
		flips++
		before := result()
		_, off := r.segs.locate(e.Addr)
		bit := rng.Int64N(format.PageSize * 8)
		r.image.FlipBit(off, bit)
		if pages%2 == 0 {
			evict(r.Store) // so it comes from parity
		}
		r.scrubPage(id)
		r.image.FlipBit(off, bit) // one at a time: parity makes the next page from this one
		r.segs.arena[e.Addr.Segment()].readers.Add(-1)
		if after := result(); after.Damaged != before.Damaged+1 || after.Repaired != before.Repaired+1 {
			t.Fatalf("page %d: %+v after %+v", id, after, before)
		}
		pages++
	}
	for i := 0; ; i++ {
		r.mu.RLock()
		var places []format.Addr
		for _, x := range append(slices.Clone(r.ckpt.dirAt), r.ckpt.rootAt...) {
			for off := uint32(0); off < x.Len; off += format.PageSize {
				places = append(places, x.Addr+format.Addr(off))
			}
		}
		r.mu.RUnlock()
		if len(places) <= i {
			break
		}
		flips++
		before := result()
		_, off := r.segs.locate(places[i])
		r.image.FlipBit(off, int64(i%16)) // in what the last page of the root is filled with, too
		if err := r.scrubDirectory(ctx); err != nil {
			t.Fatal(err)
		}
		if after := result(); after.Damaged != before.Damaged+1 || after.Repaired != before.Repaired+1 {
			t.Fatalf("directory: %+v after %+v", after, before)
		}
		r.image.FlipBit(off, int64(i%16))
		directory++
	}
	t.Logf("%d flips in %v: %d blocks, %d of groups, %d pages, %d of directory and root, %d of commits, %d superblocks, %d where nothing is in use; %d reads refused, %d blocks from the peer",
		flips, time.Since(began).Round(time.Millisecond), blocks, groups, pages, directory, commits, supers, free, refused, fetched)
	if blocks == 0 || groups == 0 || pages == 0 || directory == 0 || commits == 0 || supers != 4 {
		t.Error("a kind was not hit")
	}
	// Nothing spread: a whole pass finds nothing, and all is as it was.
	r.freeScrub()
	mustClose(t, r.Store)
	var err error
	if r.Store, err = Open(ctx, r.cfg); err != nil {
		t.Fatal(err)
	}
	r.SetDonor(donor)
	r.StartScrub(true)
	if err := r.WaitScrub(ctx); err != nil {
		t.Fatal(err)
	}
	if last := r.Scrub().Last; last.Damaged != 0 || last.Counters != 0 || last.Blocks == 0 || last.Pages == 0 {
		t.Fatalf("the pass behind finds %+v", last)
	}
	r.verify(t)
	mustCheck(t, r.Store)
}
