package format

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

func sampleSuperblock() *Superblock {
	return &Superblock{
		Sequence: 9, Pool: [16]byte{1}, Device: [16]byte{2}, Index: 1, SegmentBytes: 1 << 20, KeyCheck: [16]byte{3},
		Checkpoint: 4, Durable: 77, Segments: 20, Generation: 3,
		Members: []Member{{Device: [16]byte{9}, First: 2, Segments: 5, State: MemberDraining}, {Device: [16]byte{2}, First: 9, Segments: 6, Class: MemberCapacity}},
		Root:    []Extent{{Addr: MakeAddr(3, 4096), Len: 100, Sum: 5}},
	}
}

func sampleRoot() *Root {
	return &Root{
		Version: RootVersion, Checkpoint: 4,
		Position: Position{Segment: 3, Next: 4, Generation: 5, Offset: 8192, Seq: 6, Hash: [16]byte{7}},
		Progress: 12, NextBID: 99, Stored: 42, Identities: Tree{Top: 3, Height: 2},
		Volumes: []Volume{{ID: 1, Blocks: 10, TailEnd: 20, Mapped: 5, Annex: 6, Deleting: true, Map: Tree{1, 1}, Versions: Tree{2, 1},
			Meta: Meta{Replica: [16]byte{1}, Promised: 3, DurableEpoch: 2, DurableSeq: 1, SyncEpoch: 8, SyncSeq: 9, Inconsistent: true,
				EpochLog: []EpochStart{{1, 1}, {2, 50}}, State: []byte("state")},
			Floor: 44, Old: []Lead{{false, Tree{6, 2}}, {true, Tree{7, 1}}}}},
		Snapshots: []Snapshot{
			{ID: 5, Volume: 1, Epoch: 2, Seq: 3, Blocks: 10, TailEnd: 20, Mapped: 5, Floor: 2, Deleting: true, Map: Tree{1, 1}, Versions: Tree{2, 1}},
			{ID: 6, Volume: 9, Forging: true}},
		Dormant: []uint64{5, 6}, Live: []uint32{1, 2, 3}, Free: []byte{5}, Ages: []SegmentAge{{7, 1}, {8, 2}, {1<<32 - 1, 0}},
		Pages: 300, Directory: []Extent{{MakeAddr(1, 4096), PageSize, 1}, {MakeAddr(2, 4096), PageSize, 2}},
	}
}

func encodeRoot(r *Root) []byte {
	return AppendDirectory(AppendRoot(nil, r), r.Pages, r.Directory)
}

func TestSuperblockRoundTrip(t *testing.T) {
	page := make([]byte, PageSize)
	want := sampleSuperblock()
	want.Put(page)
	got, err := ParseSuperblock(page)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
	// Every flipped bit is noticed.
	for i := range PageSize * 8 {
		page[i/8] ^= 1 << (i % 8)
		if _, err := ParseSuperblock(page); !errors.Is(err, ErrInvalid) {
			t.Fatalf("bit %d: %v", i, err)
		}
		page[i/8] ^= 1 << (i % 8)
	}
}

// TestSuperblockOfVersion1 reads a superblock as it was written before devices could
// come and go.
func TestSuperblockOfVersion1(t *testing.T) {
	want := sampleSuperblock()
	want.Segments, want.Generation = 11, 0
	want.Members = []Member{{Device: [16]byte{9}, Segments: 5}, {Device: [16]byte{2}, First: 5, Segments: 6}}
	page := make([]byte, PageSize)
	want.Put(page)
	le := binary.LittleEndian
	old := make([]byte, PageSize)
	copy(old, page[:96])
	le.PutUint16(old[8:], 1)
	le.PutUint32(old[60:], 0)
	b := old[96:]
	for _, m := range want.Members {
		copy(b, m.Device[:])
		le.PutUint32(b[16:], m.Segments)
		b = b[20:]
	}
	copy(b, page[112+2*28:][:16])
	seal := func() { le.PutUint32(old[PageSize-4:], Checksum(old[:PageSize-4])) }
	seal()
	got, err := ParseSuperblock(old)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
	for _, version := range []uint16{0, SuperblockVersion + 1} {
		le.PutUint16(old[8:], version)
		seal()
		if _, err := ParseSuperblock(old); !errors.Is(err, ErrInvalid) {
			t.Fatalf("version %d: %v", version, err)
		}
	}
}

func TestRootRoundTrip(t *testing.T) {
	want := sampleRoot()
	b := encodeRoot(want)
	got, err := ParseRoot(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
	for n := range b {
		if _, err := ParseRoot(b[:n]); !errors.Is(err, ErrInvalid) {
			t.Fatalf("cut to %d of %d bytes: %v", n, len(b), err)
		}
	}
}

// withoutSharing takes out of a root, and of its encoding, what version 3 added.
func withoutSharing(t *testing.T, r *Root) []byte {
	t.Helper()
	b, sharing := encodeRoot(r), appendSharing(appendAges(nil, r), r)
	at := bytes.Index(b, sharing)
	if at < 0 {
		t.Fatal("the root does not hold it")
	}
	r.Snapshots, r.Volumes[0].Floor, r.Volumes[0].Old, r.Ages = nil, 0, nil, nil
	return append(b[:at:at], b[at+len(sharing):]...)
}

// TestRootOfVersion2 reads a root as it was written before there were snapshots.
func TestRootOfVersion2(t *testing.T) {
	want := sampleRoot()
	b := withoutSharing(t, want)
	want.Version = 2
	binary.LittleEndian.PutUint32(b[8:], 2)
	got, err := ParseRoot(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
}

// TestRootOfVersion1 reads a root as it was written before volumes had an annex.
func TestRootOfVersion1(t *testing.T) {
	want := sampleRoot()
	want.Volumes[0].Annex = 0
	b := withoutSharing(t, want)
	// magic 8, version 4, checkpoint 8, position 44, progress, next identity and stored 24,
	// tree 5, volumes 4; then id, blocks, end of tail and mapped 32.
	const annex = 8 + 4 + 8 + 44 + 24 + 5 + 4 + 32
	old := append(append([]byte(nil), b[:annex]...), b[annex+8:]...)
	want.Version = 1
	binary.LittleEndian.PutUint32(old[8:], 1)
	got, err := ParseRoot(old)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
	for _, version := range []uint32{0, RootVersion + 1} {
		binary.LittleEndian.PutUint32(b[8:], version)
		if _, err := ParseRoot(b); !errors.Is(err, ErrInvalid) {
			t.Fatalf("version %d: %v", version, err)
		}
	}
}

func TestCommitRoundTrip(t *testing.T) {
	want := Commit{Pool: [16]byte{1}, Records: 3, Segment: 7, Next: 8, Generation: 9, Offset: 4096, Total: 8192, Seq: 11, Durable: 10,
		Previous: [16]byte{5}, RecordBytes: 100, PayloadOff: 300, PayloadLen: 50, RecordSum: 6}
	b := make([]byte, CommitHeaderSize)
	want.Put(b)
	var got Commit
	if err := ParseCommit(b, &got, want.Pool, 7, 4096, SegmentMin); err != nil || got != want {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
	tests := []struct {
		name            string
		pool            [16]byte
		segment, offset uint32
	}{
		{"other pool", [16]byte{2}, 7, 4096}, {"other segment", [16]byte{1}, 6, 4096}, {"misdirected", [16]byte{1}, 7, 8192},
		{"does not fit the segment", [16]byte{1}, 7, SegmentMin - 4096},
	}
	for _, tt := range tests {
		if err := ParseCommit(b, &got, tt.pool, tt.segment, tt.offset, SegmentMin); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	for i := range len(b) * 8 {
		b[i/8] ^= 1 << (i % 8)
		if err := ParseCommit(b, &got, want.Pool, 7, 4096, SegmentMin); !errors.Is(err, ErrInvalid) {
			t.Fatalf("bit %d: %v", i, err)
		}
		b[i/8] ^= 1 << (i % 8)
	}
}

// sampleRecords is one record of each kind.
func sampleRecords() []byte {
	h := OpHead{Volume: 1, Epoch: 2, Seq: 3, Start: 4, Count: 2}
	n := OpSize(RecordWrite, 2, 0)
	b := make([]byte, n)
	PutOp(b, RecordWrite, &h, n)
	PutBlock(b[OpFixed:], &BlockEntry{Fingerprint: dedup.Fingerprint{1}, Addr: 5, BID: 6, Sum: 7, Len: 8, Encoding: dedup.ZstdGroup, Index: 7, Ref: true})
	for _, k := range []RecordKind{RecordUnmap, RecordEpoch} {
		r := make([]byte, OpFixed)
		PutOp(r, k, &h, OpFixed)
		b = append(b, r...)
	}
	h.Count = 5
	r := make([]byte, OpFixed+5)
	PutOp(r, RecordState, &h, len(r))
	copy(r[OpFixed:], "state")
	b = append(b, r...)
	h.Count = 512
	r = make([]byte, CloneSize)
	PutOp(r, RecordClone, &h, CloneSize)
	PutSource(r, 7, 1<<35)
	b = append(b, r...)
	h.Count = 2
	for _, k := range []RecordKind{RecordSnapshot, RecordRollback} {
		r = make([]byte, OpSize(k, 0, 0))
		PutOp(r, k, &h, len(r))
		PutSnapshot(r, 77)
		b = append(b, r...)
	}
	b = AppendFrom(b, 1, 2, [16]byte{3}, 4)
	b = AppendVolume(b, RecordShed, 1, 512)
	b = AppendVolume(b, RecordForge, 1, 2, 3, 4)
	b = AppendVolume(b, RecordSeal, 1, 2, 3)
	b = AppendCreate(b, 1, 100, [16]byte{9})
	b = AppendVolume(b, RecordDelete, 1)
	b = AppendVolume(b, RecordGone, 1)
	b = AppendVolume(b, RecordResize, 1, 50)
	b = AppendVolume(b, RecordTrim, 1, 50, 60)
	b = AppendMetaRecord(b, 1, &sampleRoot().Volumes[0].Meta)
	r = make([]byte, ListFixed+MoveEntrySize)
	PutList(r, RecordMove, 1)
	PutMove(r, 0, &Move{BID: 1, Old: 2, New: 3, Sum: 4, Len: 5, Encoding: dedup.ZstdGroup, Index: 15})
	b = append(b, r...)
	r = make([]byte, MergeSize(2))
	PutMergeHead(r, 9, 2)
	PutMerge(r, 1, &Merge{Block: 1 << 35, From: 2, To: 3 << 48})
	b = append(b, r...)
	r = make([]byte, ListFixed+PageEntrySize)
	PutList(r, RecordPages, 1)
	PutPageEntry(r, 0, 1, 2)
	b = append(b, r...)
	r = make([]byte, ListFixed)
	PutRootRecord(r, 0, 1)
	return append(b, r...)
}

// useRecord reads all that a record holds.
func useRecord(r Record) error {
	switch r.Kind {
	case RecordWrite, RecordCopy:
		var e BlockEntry
		for i := range int(r.Op().Count) {
			r.Block(i, &e)
			if e.BID != r.BlockBID(i) {
				return errors.New("two readings of one identity")
			}
		}
	case RecordState:
		_ = r.State()
	case RecordUnmap, RecordEpoch:
		_ = r.Op()
	case RecordClone:
		if v, start := r.Source(); v != binary.LittleEndian.Uint64(r.Body[40:]) || start != binary.LittleEndian.Uint64(r.Body[48:]) {
			return errors.New("two readings of one source")
		}
	case RecordSnapshot, RecordRollback:
		if r.Snapshot() != binary.LittleEndian.Uint64(r.Body[40:]) {
			return errors.New("two readings of one snapshot")
		}
	case RecordFrom:
		_, _, _ = r.Arg(1), r.Replica(), r.Arg(4)
	case RecordShed:
		_ = r.Arg(1)
	case RecordForge:
		_ = r.Arg(3)
	case RecordSeal:
		_ = r.Arg(2)
	case RecordCreate:
		_, _ = r.Arg(1), r.Replica()
	case RecordDelete, RecordGone:
		_ = r.Arg(0)
	case RecordResize:
		_ = r.Arg(1)
	case RecordTrim:
		_ = r.Arg(2)
	case RecordMeta:
		var m Meta
		if err := r.Meta(&m); err == nil && !bytes.Equal(AppendMeta(nil, &m), r.Body[8:]) {
			// The two reserved words may hold anything.
			again := Meta{}
			if _, err := ParseMeta(AppendMeta(nil, &m), &again); err != nil || !reflect.DeepEqual(m, again) {
				return errors.New("meta does not round trip")
			}
		}
	case RecordMerge:
		var m, again Merge
		volume, n := r.Merges()
		b := make([]byte, MergeSize(n))
		PutMergeHead(b, volume, n)
		for i := range n {
			r.Merge(i, &m)
			PutMerge(b, i, &m)
			if (Record{Kind: RecordMerge, Body: b[recordPrefix:]}).Merge(i, &again); m != again {
				return errors.New("merge does not round trip")
			}
		}
	case RecordMove:
		var m Move
		for i := range r.Count() {
			r.Move(i, &m)
		}
	case RecordPages, RecordDirs:
		for i := range r.Count() {
			r.PageEntry(i)
		}
	}
	return nil
}

func TestRecords(t *testing.T) {
	rest := sampleRecords()
	var kinds []RecordKind
	for len(rest) > 0 {
		r, more, err := NextRecord(rest)
		if err != nil {
			t.Fatal(err)
		}
		if err := useRecord(r); err != nil {
			t.Fatal(err)
		}
		if r.Kind == RecordWrite {
			var e BlockEntry
			r.Block(0, &e)
			if want := (BlockEntry{Fingerprint: dedup.Fingerprint{1}, Addr: 5, BID: 6, Sum: 7, Len: 8, Encoding: dedup.ZstdGroup, Index: 7, Ref: true}); e != want || r.Op() != (OpHead{1, 2, 3, 4, 2}) {
				t.Fatalf("%+v %+v", e, r.Op())
			}
		}
		if r.Kind == RecordMove {
			var m Move
			if r.Move(0, &m); m != (Move{1, 2, 3, 4, 5, dedup.ZstdGroup, 15}) {
				t.Fatalf("%+v", m)
			}
		}
		if r.Kind == RecordClone {
			if v, start := r.Source(); v != 7 || start != 1<<35 || r.Op() != (OpHead{1, 2, 3, 4, 512}) {
				t.Fatalf("clone of %d at %d, %+v", v, start, r.Op())
			}
		}
		switch r.Kind {
		case RecordSnapshot, RecordRollback:
			if r.Snapshot() != 77 || r.Op() != (OpHead{1, 2, 3, 4, 2}) {
				t.Fatalf("snapshot %d, %+v", r.Snapshot(), r.Op())
			}
		case RecordFrom:
			if r.Arg(0) != 1 || r.Arg(1) != 2 || r.Replica() != [16]byte{3} || r.Arg(4) != 4 {
				t.Fatalf("%x", r.Body)
			}
		case RecordForge:
			if r.Arg(0) != 1 || r.Arg(1) != 2 || r.Arg(2) != 3 || r.Arg(3) != 4 {
				t.Fatalf("%x", r.Body)
			}
		}
		kinds = append(kinds, r.Kind)
		rest = more
	}
	want := []RecordKind{RecordWrite, RecordUnmap, RecordEpoch, RecordState, RecordClone, RecordSnapshot, RecordRollback, RecordFrom, RecordShed, RecordForge, RecordSeal, RecordCreate, RecordDelete, RecordGone, RecordResize, RecordTrim, RecordMeta, RecordMove, RecordMerge, RecordPages, RecordRoot}
	if !reflect.DeepEqual(kinds, want) {
		t.Fatal(kinds)
	}
}

func TestEntry(t *testing.T) {
	page := make([]byte, PageSize)
	want := Entry{Fingerprint: dedup.Fingerprint{1, 2}, Addr: MakeAddr(5, 77), Sum: 3, Refs: 4, Len: 4097, Encoding: dedup.ZstdGroup, Index: 14, Generation: 8}
	PutEntry(EntryAt(page, 63), &want)
	PutEntryRefs(EntryAt(page, 63), 9)
	want.Refs = 9
	var got Entry
	ParseEntry(EntryAt(page, 63), &got)
	if got != want || got.Addr.Segment() != 5 || got.Addr.Offset() != 77 {
		t.Fatalf("%+v", got)
	}
	dir := []DirEntry{{}, {Addr: 9, Sum: 8, Kind: WordPage}, {Addr: 9, Sum: 8, Kind: EntryPage}}
	dir[1].SetParents(ParentsMax - 1)
	dir[2].SetParents(1)
	dir[2].SetCount(64)
	PutDirPage(page, dir)
	back := make([]DirEntry, 3)
	ParseDirPage(page, back)
	if !reflect.DeepEqual(dir, back) || back[1].Parents() != ParentsMax-1 || back[2].Parents() != 1 || back[2].Count() != 64 {
		t.Fatal(back)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add(sampleRecords())
	f.Add([]byte{byte(RecordWrite), 0, 0, 0, 8, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for n := 0; len(b) > 0; n++ {
			r, rest, err := NextRecord(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			if err := useRecord(r); err != nil {
				t.Fatal(err)
			}
			b = rest
		}
	})
}

// FuzzRoot leaves out the checksum, which stands in the superblock, so the fuzzer
// sees the parser itself.
func FuzzRoot(f *testing.F) {
	f.Add(encodeRoot(sampleRoot()))
	f.Add(encodeRoot(&Root{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRoot(b)
		if err != nil {
			return
		}
		again, err := ParseRoot(encodeRoot(r))
		if err != nil || !reflect.DeepEqual(r, again) {
			t.Fatalf("%v\n%+v\n%+v", err, r, again)
		}
	})
}

// FuzzSuperblock sets the checksum right, which would stop the fuzzer.
func FuzzSuperblock(f *testing.F) {
	page := make([]byte, PageSize)
	sampleSuperblock().Put(page)
	f.Add(page[:256])
	f.Fuzz(func(t *testing.T, b []byte) {
		page := make([]byte, PageSize)
		copy(page[:PageSize-4], b)
		sum := Checksum(page[:PageSize-4])
		page[PageSize-4], page[PageSize-3], page[PageSize-2], page[PageSize-1] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
		s, err := ParseSuperblock(page)
		if err != nil || RootExtentsMax < len(s.Root) {
			return // version 1 could hold more
		}
		s.Put(page)
		again, err := ParseSuperblock(page)
		if err != nil || !reflect.DeepEqual(s, again) {
			t.Fatalf("%v\n%+v\n%+v", err, s, again)
		}
	})
}

// FuzzCommit sets the checksum right too.
func FuzzCommit(f *testing.F) {
	b := make([]byte, CommitHeaderSize)
	(&Commit{Segment: 1, Total: 4096, RecordBytes: 10, PayloadOff: 200}).Put(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		var b [CommitHeaderSize]byte
		copy(b[:124], in)
		sum := Checksum(b[:124])
		b[124], b[125], b[126], b[127] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
		var c Commit
		if ParseCommit(b[:], &c, [16]byte{}, 1, 0, SegmentMin) != nil {
			return
		}
		if uint64(c.PayloadOff)+uint64(c.PayloadLen) > uint64(c.Total) || c.Total > SegmentMin || c.RecordBytes > c.PayloadOff {
			t.Fatalf("%+v", c)
		}
	})
}

// TestShare: what the members of a group count comes to its bytes, for every length, and of a block by
// itself all of them; the three forms in which an identity is written agree.
func TestShare(t *testing.T) {
	b := make([]byte, EntrySize)
	for n := range 1 << 16 {
		sum := uint32(0)
		for i := range uint8(dedup.PackedBlocks) {
			e := Entry{Len: uint16(n), Encoding: dedup.ZstdGroup, Index: i}
			part := e.Share()
			if sum += part; n >= dedup.PackedBlocks && part == 0 {
				t.Fatalf("member %d of %d bytes counts nothing", i, n)
			}
			block, move := BlockEntry{Len: e.Len, Encoding: e.Encoding, Index: i}, Move{Len: e.Len, Encoding: e.Encoding, Index: i}
			if PutEntry(b, &e); EntryShare(b) != part || block.Share() != part || move.Share() != part {
				t.Fatalf("member %d of %d bytes counts %d, %d, %d or %d", i, n, part, EntryShare(b), block.Share(), move.Share())
			}
		}
		if sum != uint32(n) {
			t.Fatalf("the members of %d bytes count %d", n, sum)
		}
		for _, enc := range []dedup.Encoding{dedup.Raw, dedup.S2, dedup.Zstd} {
			if e := (Entry{Len: uint16(n), Encoding: enc, Index: 3}); e.Share() != uint32(n) {
				t.Fatalf("%d bytes of encoding %d count %d", n, enc, e.Share())
			}
		}
	}
}
