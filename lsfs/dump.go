package lsfs

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// DumpOptions choose what DumpPool prints besides superblocks, root and volumes.
type DumpOptions struct {
	// Segments: every segment that is not free.
	Segments bool
	// Segment, if not NoSegment of package format: its commits with their records.
	Segment uint32
	// Volume, if not 0: where its blocks [Start, Start+Count) stand.
	Volume VolumeID
	Start  BlockNo
	Count  uint64
}

// DumpPool prints for people what stands on the devices of a pool that no process
// serves. It replays the log in memory and writes nothing. Where the pool does not open
// it prints the superblocks and what they lead to, and returns the error.
func DumpPool(ctx context.Context, c Config, o DumpOptions, to io.Writer) error {
	c = readOnly(c)
	w := bufio.NewWriter(to)
	defer w.Flush()
	for _, path := range c.Devices {
		if err := dumpSuperblocks(c, path, w); err != nil {
			return err
		}
	}
	s, err := open(ctx, c)
	if err != nil {
		return err
	}
	defer s.free()
	d := &dumper{s: s, w: w}
	d.root()
	d.volumes()
	d.segments(o.Segments)
	if o.Segment != format.NoSegment {
		if !s.segs.exists(o.Segment) {
			return fmt.Errorf("segment %d of %d: %w", o.Segment, s.segs.count(), ErrRange)
		}
		if err := d.segment(o.Segment); err != nil {
			return err
		}
	}
	if o.Volume != 0 {
		return d.blocks(ctx, &o)
	}
	return nil
}

// readOnly has devices opened for reading only, unless the caller says how.
func readOnly(c Config) Config {
	if c.OpenDevice == nil {
		c.OpenDevice = func(path string) (device.Device, error) { return device.Open(path, device.Options{ReadOnly: true}) }
	}
	return c
}

func dumpSuperblocks(c Config, path string, w *bufio.Writer) error {
	d, err := c.OpenDevice(path)
	if err != nil {
		return err
	}
	defer d.Close()
	page := device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(page)
	fmt.Fprintf(w, "device %s, %d bytes\n", path, d.Size())
	for _, off := range format.SuperblockOffsets {
		if err := d.ReadAt(page, off); err != nil {
			fmt.Fprintf(w, "  superblock at %-7d unreadable: %v\n", off, err)
			continue
		}
		sb, err := format.ParseSuperblock(page)
		if err != nil {
			fmt.Fprintf(w, "  superblock at %-7d damaged: %v\n", off, err)
			continue
		}
		fmt.Fprintf(w, "  superblock at %-7d sequence %d, pool %x, device %d of %d (%x), segments of %d bytes, checkpoint %d, commit %d was durable, root in %d parts\n",
			off, sb.Sequence, sb.Pool, sb.Index, len(sb.Members), sb.Device, sb.SegmentBytes, sb.Checkpoint, sb.Durable, len(sb.Root))
	}
	return nil
}

type dumper struct {
	s *Store
	w *bufio.Writer
}

func place(a format.Addr) string {
	if a == 0 {
		return "nowhere"
	}
	return fmt.Sprintf("%d+%d", a.Segment(), a.Offset())
}

// formOf says in which form a block is stored.
func formOf(enc dedup.Encoding, n uint16, index uint8) string {
	switch enc {
	case dedup.Zero:
		return "no bytes"
	case dedup.Raw:
		return fmt.Sprintf("%d bytes raw", n)
	case dedup.S2:
		return fmt.Sprintf("%d bytes s2", n)
	case dedup.Zstd:
		return fmt.Sprintf("%d bytes zstd", n)
	case dedup.ZstdGroup:
		return fmt.Sprintf("number %d of %d in %d bytes zstd", index, dedup.PackedBlocks, n)
	}
	return fmt.Sprintf("%d bytes encoding %d", n, enc)
}

func (d *dumper) root() {
	s := d.s
	fmt.Fprintf(d.w, "\nroot of checkpoint %d (places are segment+offset)\n", s.ckpt.number)
	for _, x := range s.ckpt.rootAt {
		fmt.Fprintf(d.w, "  part at %s, %d bytes, checksum %08x\n", place(x.Addr), x.Len, x.Sum)
	}
	p := s.log.position()
	fmt.Fprintf(d.w, "log: last commit %d, goes on in segment %d\n", p.Seq, p.Next)
	fmt.Fprintf(d.w, "pages: %d in use, %d ids, directory of %d pages\n", s.pg.nAlive.Load(), s.pg.n-1, len(s.ckpt.dirAt))
	fmt.Fprintf(d.w, "identities: %d stored, next %d, tree from page %d of height %d\n", s.stored.Load(), s.nextBID, s.identities.top, s.identities.height)
}

func (d *dumper) volumes() {
	ids := slices.Sorted(maps.Keys(d.s.volumes))
	fmt.Fprintf(d.w, "\nvolumes: %d\n", len(ids))
	for _, id := range ids {
		v := d.s.volumes[id]
		state := ""
		if v.deleting {
			state = ", being deleted"
		} else if v.size.Load() < v.tailEnd {
			state = fmt.Sprintf(", blocks up to %d are being given back", v.tailEnd)
		}
		m := &v.meta
		fmt.Fprintf(d.w, "  volume %d: %d blocks, %d mapped, %d in the annex%s; map from page %d of height %d, versions from page %d of height %d\n",
			id, v.size.Load(), v.mapped, v.annex, state, v.mapTree.top, v.mapTree.height, v.versions.top, v.versions.height)
		fmt.Fprintf(d.w, "    replica %x, durable epoch %d seq %d, promised epoch %d, %d epochs, %d bytes of state", m.Replica, m.Durable.Epoch, m.Durable.Seq, m.Promised, len(m.EpochLog), len(m.State))
		if m.Inconsistent {
			fmt.Fprintf(d.w, ", INCONSISTENT since epoch %d seq %d", m.SyncFrom.Epoch, m.SyncFrom.Seq)
		}
		fmt.Fprintln(d.w)
	}
}

var segmentNames = [...]string{"free", "next", "open", "sealed", "quarantine", "gone"}

func (d *dumper) segments(each bool) {
	counts := make(map[string]int)
	for i := range d.s.segs.all {
		counts[segmentNames[d.s.segs.all[i].state]]++
	}
	fmt.Fprintf(d.w, "\nsegments: %d of %d bytes", d.s.segs.count(), d.s.segs.bytes)
	for _, name := range segmentNames {
		if counts[name] > 0 {
			fmt.Fprintf(d.w, ", %d %s", counts[name], name)
		}
	}
	fmt.Fprintln(d.w)
	for i := range d.s.segs.all {
		if seg := &d.s.segs.all[i]; each && seg.state != segmentFree && seg.state != segmentGone {
			dev, off := d.s.segs.locate(format.MakeAddr(uint32(i), 0))
			fmt.Fprintf(d.w, "  segment %d on %s at %d: %s, %d bytes of blocks, %d of pages\n", i, dev.Path(), off, segmentNames[seg.state], seg.live, seg.pages)
		}
	}
}

var recordNames = map[format.RecordKind]string{
	format.RecordWrite: "write", format.RecordUnmap: "unmap", format.RecordEpoch: "epoch", format.RecordState: "state", format.RecordCopy: "copy", format.RecordClone: "clone",
	format.RecordCreate: "create", format.RecordDelete: "delete", format.RecordGone: "gone", format.RecordResize: "resize", format.RecordTrim: "trim", format.RecordMeta: "meta",
	format.RecordSnapshot: "snapshot", format.RecordRollback: "rollback", format.RecordShed: "shed", format.RecordFrom: "from", format.RecordForge: "forge", format.RecordSeal: "seal",
	format.RecordMerge: "merge", format.RecordMove: "move", format.RecordPages: "pages", format.RecordDirs: "directory", format.RecordRoot: "root",
}

// segment lists the commits of a segment as they stand there, old ones too.
func (d *dumper) segment(n uint32) error {
	s := d.s
	r := &logReader{s: s, buf: device.AlignedBuffer(int(s.commitMax) + readAhead)}
	defer device.FreeAligned(r.buf)
	fmt.Fprintf(d.w, "\ncommits of segment %d\n", n)
	var c format.Commit
	for at := uint32(0); s.segs.bytes-at >= format.PageSize; {
		ok, err := r.header(n, at, &c)
		if err != nil {
			return err
		}
		if !ok {
			at += format.PageSize
			continue
		}
		fmt.Fprintf(d.w, "  at %d: commit %d, generation %016x, %d bytes, %d records, next segment %d, commit %d was durable\n", at, c.Seq, c.Generation, c.Total, c.Records, c.Next, c.Durable)
		all, ok, err := r.records(&c)
		if err != nil {
			return err
		}
		if !ok {
			fmt.Fprintf(d.w, "    records DAMAGED: checksum %08x, expected %08x\n", format.Checksum(all[format.CommitHeaderSize:]), c.RecordSum)
		}
		for rest := all[format.CommitHeaderSize:]; ok && len(rest) > 0; {
			rec, more, err := format.NextRecord(rest)
			if err != nil {
				fmt.Fprintf(d.w, "    record DAMAGED: %v\n", err)
				break
			}
			rest = more
			d.record(rec)
		}
		at += c.Total
	}
	return nil
}

func (d *dumper) record(r format.Record) {
	name := recordNames[r.Kind]
	switch r.Kind {
	case format.RecordWrite, format.RecordCopy:
		h := r.Op()
		fmt.Fprintf(d.w, "    %s: volume %d blocks %d+%d, epoch %d seq %d\n", name, h.Volume, h.Start, h.Count, h.Epoch, h.Seq)
		var e format.BlockEntry
		for i := range int(h.Count) {
			r.Block(i, &e)
			kind := "new"
			switch {
			case e.BID == 0:
				kind = "zero"
			case e.Ref:
				kind = "reference"
			}
			fmt.Fprintf(d.w, "      block %d: %s, identity %d at %s, %s\n", h.Start+uint64(i), kind, e.BID, place(e.Addr), formOf(e.Encoding, e.Len, e.Index))
		}
	case format.RecordUnmap, format.RecordEpoch, format.RecordState:
		h := r.Op()
		fmt.Fprintf(d.w, "    %s: volume %d blocks %d+%d, epoch %d seq %d\n", name, h.Volume, h.Start, h.Count, h.Epoch, h.Seq)
	case format.RecordClone:
		h := r.Op()
		from, start := r.Source()
		fmt.Fprintf(d.w, "    %s: volume %d blocks %d+%d from volume %d block %d, epoch %d seq %d\n", name, h.Volume, h.Start, h.Count, from, start, h.Epoch, h.Seq)
	case format.RecordMove:
		var m format.Move
		fmt.Fprintf(d.w, "    %s: %d blocks\n", name, r.Count())
		for i := range r.Count() {
			r.Move(i, &m)
			fmt.Fprintf(d.w, "      identity %d from %s to %s, %s\n", m.BID, place(m.Old), place(m.New), formOf(m.Encoding, m.Len, m.Index))
		}
	case format.RecordMerge:
		volume, n := r.Merges()
		var m format.Merge
		fmt.Fprintf(d.w, "    %s: volume %d, %d blocks\n", name, volume, n)
		for i := range n {
			r.Merge(i, &m)
			fmt.Fprintf(d.w, "      block %d: identity %d becomes %d\n", m.Block, m.From, m.To)
		}
	case format.RecordPages, format.RecordDirs:
		fmt.Fprintf(d.w, "    %s:", name)
		for i := range r.Count() {
			id, _ := r.PageEntry(i)
			fmt.Fprintf(d.w, " %d", id)
		}
		fmt.Fprintln(d.w)
	case format.RecordCreate, format.RecordDelete, format.RecordGone, format.RecordResize, format.RecordTrim, format.RecordMeta:
		fmt.Fprintf(d.w, "    %s: volume %d\n", name, r.Arg(0))
	default:
		fmt.Fprintf(d.w, "    %s %d, %d bytes\n", name, r.Kind, len(r.Body))
	}
}

// blocks prints where the blocks of a range stand.
func (d *dumper) blocks(ctx context.Context, o *DumpOptions) error {
	s := d.s
	v := s.volumes[o.Volume]
	if v == nil {
		return fmt.Errorf("volume %d: %w", o.Volume, ErrNoVolume)
	}
	fmt.Fprintf(d.w, "\nmap of volume %d, blocks %d to %d\n", v.id, o.Start, uint64(o.Start)+o.Count)
	holes := uint64(0)
	var e format.Entry
	for i := uint64(o.Start); i < uint64(o.Start)+o.Count; i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		leaf, _, missing, _ := s.pg.lookup(v.mapTree, wordShift, i)
		var entry []byte
		var bid BID
		if missing == 0 && leaf != nil {
			if bid = BID(format.Word(leaf, int(i)&(format.WordsPerPage-1))); bid != 0 {
				entry, _, missing = s.entryOf(bid)
			}
		}
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return err
			}
			i--
			continue
		}
		switch {
		case bid == 0:
			holes++
			continue
		case entry == nil:
			fmt.Fprintf(d.w, "  %d: identity %d, which is DEAD\n", i, bid)
			continue
		}
		format.ParseEntry(entry, &e)
		fmt.Fprintf(d.w, "  %d: identity %d at %s on %s, %s, %d references, fingerprint %s\n", i, bid, place(e.Addr), s.devicePath(e.Addr.Segment()), formOf(e.Encoding, e.Len, e.Index), e.Refs, hex.EncodeToString(e.Fingerprint[:8]))
	}
	fmt.Fprintf(d.w, "  %d holes\n", holes)
	return nil
}
