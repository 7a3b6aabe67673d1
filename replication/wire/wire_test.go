package wire

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// split takes one frame apart as a link does.
func split(t testing.TB, frame []byte) (Header, []byte, []byte) {
	t.Helper()
	h, sum, err := ParseHeader(frame)
	if err != nil {
		t.Fatal(err)
	}
	if len(frame) != HeaderLen+int(h.MetaLen)+int(h.DataLen) {
		t.Fatalf("frame of %d bytes says %d + %d + %d", len(frame), HeaderLen, h.MetaLen, h.DataLen)
	}
	meta := frame[HeaderLen : HeaderLen+h.MetaLen]
	if err := CheckMeta(meta, sum); err != nil {
		t.Fatal(err)
	}
	return h, meta, frame[HeaderLen+h.MetaLen:]
}

func sampleBlocks() []dedup.Block {
	raw := bytes.Repeat([]byte{7}, dedup.BlockSize)
	return []dedup.Block{
		{},
		{Fingerprint: dedup.Fingerprint{1}, Encoding: dedup.Raw, Data: raw, Sum: 77},
		{Fingerprint: dedup.Fingerprint{2}, Encoding: dedup.S2, Data: []byte("short"), Sum: 78},
		{Fingerprint: dedup.Fingerprint{3}, Encoding: dedup.Raw},
	}
}

func TestPrepareRoundTrip(t *testing.T) {
	for _, op := range []lsfs.Op{
		{Kind: lsfs.OpWrite, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 5}, Start: 6, Count: 4, Blocks: sampleBlocks()},
		{Kind: lsfs.OpWrite, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 5}, Start: 6, Count: 4, Blocks: sampleBlocks(), Relaxed: true},
		{Kind: lsfs.OpUnmap, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 6}, Start: 1 << 40, Count: 9},
		{Kind: lsfs.OpSnapshot, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 11}},
		{Kind: lsfs.OpEpoch, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 7}},
		{Kind: lsfs.OpState, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 8}, State: []byte("reservations")},
		{Kind: lsfs.OpState, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 9}},
		{Kind: lsfs.OpClone, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 10}, Start: 1 << 35, Count: lsfs.ClonedBlocksMax, Source: 8, SourceStart: 9},
		{Kind: lsfs.OpSnapshot, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 11}, Snapshot: 77},
		{Kind: lsfs.OpRollback, Volume: 3, ID: lsfs.OpID{Epoch: 5, Seq: 12}, Snapshot: 77},
	} {
		at := lsfs.OpID{}
		if op.Kind == lsfs.OpClone {
			at = lsfs.OpID{Epoch: 12, Seq: 13}
		}
		frame := AppendPrepare(nil, &op, at)
		h, meta, data := split(t, frame)
		var got lsfs.Op
		if source, err := DecodePrepare(h, meta, data, &got); err != nil || source != at {
			t.Fatalf("source %v, %v", source, err)
		}
		if len(got.Blocks) == 0 {
			got.Blocks = nil
		}
		if !reflect.DeepEqual(got, op) {
			t.Errorf("kind %d: got %+v, want %+v", op.Kind, got, op)
		}
		frame[HeaderLen+1+len(meta)/2] ^= 1
		if _, sum, err := ParseHeader(frame); err == nil && CheckMeta(frame[HeaderLen:HeaderLen+len(meta)], sum) == nil {
			t.Errorf("kind %d: a flipped bit in the meta part went unseen", op.Kind)
		}
	}
}

func TestMessagesRoundTrip(t *testing.T) {
	g := Greeting{MinVersion: 1, Version: 2, Node: 3, Incarnation: 4, Replicas: []Position{{
		Volume: 9, Replica: [16]byte{1, 2}, Promised: 8, Durable: lsfs.OpID{Epoch: 7, Seq: 6}, SyncFrom: lsfs.OpID{Epoch: 5, Seq: 4},
		Inconsistent: true, EpochLog: []lsfs.OpID{{Epoch: 1, Seq: 1}, {Epoch: 7, Seq: 3}}, State: []byte("a value with its name"),
	}}}
	if got, err := DecodeGreeting(AppendGreeting(nil, &g)); err != nil || !reflect.DeepEqual(got, g) {
		t.Errorf("greeting: %+v, %v", got, err)
	}
	b := BeaconBody{Nonce: 1, Sent: -2, Echo: 3, Room: 4, Leases: []Lease{{5, 6}}}
	var gotB BeaconBody
	if err := DecodeBeacon(AppendBeacon(nil, &b), &gotB); err != nil || !reflect.DeepEqual(gotB, b) {
		t.Errorf("beacon: %+v, %v", gotB, err)
	}
	b.Paced, b.Pace = true, Pace{Micros: [2]uint32{7, 1 << 31}, Slow: true}
	if err := DecodeBeacon(AppendBeacon(nil, &b), &gotB); err != nil || !reflect.DeepEqual(gotB, b) {
		t.Errorf("beacon with pace: %+v, %v", gotB, err)
	}
	if err := DecodeBeacon(append(AppendBeacon(nil, &b), 0), &gotB); err == nil {
		t.Error("a beacon with trailing bytes was taken")
	}
	c := SyncChunk{Chunk: 1, Version: 2, Fingerprints: []dedup.Fingerprint{{1}, {}, {3}}, Index: []uint32{0, 2},
		Blocks: []dedup.Block{sampleBlocks()[1], sampleBlocks()[2]}}
	if got, err := DecodeSyncChunk(AppendSyncChunk(nil, &c), AppendBlockData(nil, c.Blocks)); err != nil || !reflect.DeepEqual(got, c) {
		t.Errorf("chunk: %+v, %v", got, err)
	}
	f := ForwardBody{Op: 2, FUA: true, Stated: true, Off: 512, Len: 4096, Sum: 9, Stamp: -7,
		State: lsfs.OpID{Epoch: 3, Seq: 4}, Source: 5, SourceOff: 6, Limit: 7}
	if got, err := DecodeForward(AppendForward(nil, &f)); err != nil || got != f {
		t.Errorf("forward: %+v, %v", got, err)
	}
	res := ForwardResult{Code: 3, Sum: 4, At: 5, State: lsfs.OpID{Epoch: 6, Seq: 7}}
	if got, err := DecodeForwardResult(AppendForwardResult(nil, &res)); err != nil || got != res {
		t.Errorf("result: %+v, %v", got, err)
	}
	if n, mapped := DecodeExtent(AppendExtent(nil, 1<<47, true)); n != 1<<47 || !mapped {
		t.Errorf("extent: %d %v", n, mapped)
	}
	frame := AppendContent(nil, Header{Volume: 1, Seq: 2}, []uint32{1, 2}, sampleBlocks()[1:3])
	_, meta, data := split(t, frame)
	if index, blocks, err := DecodeContent(meta, data); err != nil || !reflect.DeepEqual(index, []uint32{1, 2}) || !reflect.DeepEqual(blocks, sampleBlocks()[1:3]) {
		t.Errorf("content: %v %v %v", index, blocks, err)
	}
}

func TestHeaderRefuses(t *testing.T) {
	good := AppendFrame(nil, Header{Type: Ack, Volume: 1, Epoch: 2, Seq: 3}, nil, nil)
	for name, spoil := range map[string]func(b []byte) []byte{
		"short":   func(b []byte) []byte { return b[:HeaderLen-1] },
		"magic":   func(b []byte) []byte { b[0] ^= 1; return b },
		"any bit": func(b []byte) []byte { b[33] ^= 0x80; return b },
	} {
		if _, _, err := ParseHeader(spoil(bytes.Clone(good))); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for _, h := range []Header{{Type: 0}, {Type: ForwardReply + 1}} {
		if _, _, err := ParseHeader(AppendFrame(nil, h, nil, nil)); err == nil {
			t.Errorf("type %d accepted", h.Type)
		}
	}
}

// FuzzDecode feeds arbitrary parts to every decoder: none may panic, and what
// decodes must encode to the same bytes again.
func FuzzDecode(f *testing.F) {
	for _, op := range []lsfs.Op{
		{Kind: lsfs.OpWrite, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 5}, Start: 6, Count: 4, Blocks: sampleBlocks()},
		{Kind: lsfs.OpWrite, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 5}, Start: 6, Count: 4, Blocks: sampleBlocks(), Relaxed: true},
		{Kind: lsfs.OpSnapshot, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 6}},
		{Kind: lsfs.OpState, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 6}, State: []byte("a state")},
		{Kind: lsfs.OpClone, Volume: 3, ID: lsfs.OpID{Epoch: 4, Seq: 7}, Start: 6, Count: 4, Source: 9, SourceStart: 3},
	} {
		_, meta, data := split(f, AppendPrepare(nil, &op, lsfs.OpID{Epoch: 8, Seq: 9}))
		f.Add(meta, data)
	}
	f.Add(AppendGreeting(nil, &Greeting{Version: 1, Replicas: []Position{{EpochLog: []lsfs.OpID{{Epoch: 1, Seq: 1}}, State: []byte("x")}}}), []byte{})
	f.Add(AppendBeacon(nil, &BeaconBody{Leases: []Lease{{1, 2}}}), []byte{})
	f.Add(AppendBeacon(nil, &BeaconBody{Leases: []Lease{{1, 2}}, Paced: true, Pace: Pace{Micros: [2]uint32{3, 4}, Slow: true}}), []byte{})
	f.Add(AppendSyncChunk(nil, &SyncChunk{Fingerprints: make([]dedup.Fingerprint, 3), Index: []uint32{1}, Blocks: sampleBlocks()[2:3]}), []byte("short"))
	f.Add(AppendForward(nil, &ForwardBody{Op: 3, Atomic: true, Stated: true, State: lsfs.OpID{Epoch: 1, Seq: 2}}), []byte{})
	f.Add(AppendLoan(nil, &Loan{ID: 1, Start: 2, Count: 3}), []byte{})
	f.Add(AppendForwardResult(nil, &ForwardResult{Code: 1, At: 2}), []byte{})
	f.Fuzz(func(t *testing.T, meta, data []byte) {
		var op lsfs.Op
		if at, err := DecodePrepare(Header{}, meta, data, &op); err == nil {
			_, m, d := split(t, AppendPrepare(nil, &op, at))
			var again lsfs.Op
			if at2, err := DecodePrepare(Header{}, m, d, &again); err != nil || at != at2 || !reflect.DeepEqual(op, again) {
				t.Fatalf("prepare: %v", err)
			}
		}
		if g, err := DecodeGreeting(meta); err == nil {
			if again, err := DecodeGreeting(AppendGreeting(nil, &g)); err != nil || !reflect.DeepEqual(g, again) {
				t.Fatalf("greeting: %v", err)
			}
		}
		if b, err := DecodeLoan(meta); err == nil && !bytes.Equal(AppendLoan(nil, &b), meta) {
			t.Fatal("loan")
		}
		if p, err := DecodePosition(meta); err == nil {
			if again, err := DecodePosition(AppendPosition(nil, &p)); err != nil || !reflect.DeepEqual(p, again) {
				t.Fatalf("position: %v", err)
			}
		}
		var b BeaconBody
		if err := DecodeBeacon(meta, &b); err == nil && !bytes.Equal(AppendBeacon(nil, &b), meta) {
			t.Fatal("beacon")
		}
		if c, err := DecodeSyncChunk(meta, data); err == nil {
			if again, err := DecodeSyncChunk(AppendSyncChunk(nil, &c), AppendBlockData(nil, c.Blocks)); err != nil || !reflect.DeepEqual(c, again) {
				t.Fatalf("chunk: %v", err)
			}
		}
		if f, err := DecodeForward(meta); err == nil {
			if again, err := DecodeForward(AppendForward(nil, &f)); err != nil || f != again {
				t.Fatalf("forward: %v", err)
			}
		}
		if r, err := DecodeForwardResult(meta); err == nil {
			if again, err := DecodeForwardResult(AppendForwardResult(nil, &r)); err != nil || r != again {
				t.Fatalf("result: %v", err)
			}
		}
		DecodeContent(meta, data)
		DecodeNeed(meta)
		DecodeOpID(meta)
		ParseHeader(meta)
	})
}

func TestSnapshotMessages(t *testing.T) {
	want := []SnapshotBody{{ID: 7, Point: lsfs.OpID{Epoch: 2, Seq: 9}, Blocks: 256}, {ID: 8, Point: lsfs.OpID{Epoch: 3, Seq: 10}, Blocks: 512}}
	var b []byte
	for i := range want {
		b = AppendSnapshot(b, &want[i])
	}
	if got, err := DecodeSnapshots(b); err != nil || !reflect.DeepEqual(got, want) || len(b) != 2*SnapshotLen {
		t.Errorf("snapshots %+v, %v", got, err)
	}
	f := ForgeBody{ID: 1, Base: 2, Blocks: 3}
	if got, err := DecodeForge(AppendForge(nil, &f)); err != nil || got != f {
		t.Errorf("forge %+v, %v", got, err)
	}
	if id, at, err := DecodeSeal(AppendSeal(nil, 5, lsfs.OpID{Epoch: 6, Seq: 7})); err != nil || id != 5 || at != (lsfs.OpID{Epoch: 6, Seq: 7}) {
		t.Errorf("seal %d at %v, %v", id, at, err)
	}
}

func FuzzSnapshotMessages(f *testing.F) {
	f.Add(AppendSnapshot(nil, &SnapshotBody{ID: 7, Blocks: 9}))
	f.Add(AppendForge(nil, &ForgeBody{ID: 1, Base: 2, Blocks: 3}))
	f.Add(AppendSeal(nil, 5, lsfs.OpID{Epoch: 6, Seq: 7}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, err := DecodeSnapshots(b); err == nil {
			var again []byte
			for i := range list {
				again = AppendSnapshot(again, &list[i])
			}
			if !bytes.Equal(again, b) {
				t.Error("a list of snapshots is not canonical")
			}
		}
		if x, err := DecodeForge(b); err == nil && !bytes.Equal(AppendForge(nil, &x), b) {
			t.Error("forge is not canonical")
		}
		if id, at, err := DecodeSeal(b); err == nil && !bytes.Equal(AppendSeal(nil, id, at), b) {
			t.Error("seal is not canonical")
		}
	})
}
