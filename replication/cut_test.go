package replication

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/replication/wire"
)

// TestCutWhileFilled (Y9): a replica loses power at every second write or flush of its resync,
// with a part of what was not flushed. Where it says that it is consistent it is equal to
// the owner; else the next resync makes it equal, whatever the cut has taken back. The
// replica has a tail that the owner has not, in several places of chunks that the owner
// has not touched since: their versions go down, and must not before the content is there.
func TestCutWhileFilled(t *testing.T) {
	const chunks = 6
	b := newBench(t)
	var disks [3]*devicetest.Disk
	open := func(id NodeID) func(string) (device.Device, error) {
		return func(string) (device.Device, error) {
			disks[id].Reopen()
			return disks[id], nil
		}
	}
	config := func(id NodeID) lsfs.Config {
		return lsfs.Config{Devices: []string{"disk"}, OpenDevice: open(id)}
	}
	for id := NodeID(1); id <= 2; id++ {
		disks[id] = devicetest.New(uint64(id), 96<<20)
		// Small segments: the works of a chunk do not fit one commit.
		if err := lsfs.Format(t.Context(), lsfs.FormatConfig{Devices: []string{"disk"}, OpenDevice: open(id), SegmentBytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	a, c := b.startWith(1, config(1)), b.startWith(2, config(2))
	b.create(chunks<<20, 1)
	b.inSync(1, 2)
	for i := range uint64(chunks) {
		a.write(t, i<<20, pattern(i, 1<<20))
	}
	b.stop(2, c)
	b.inSync(1)
	// What the owner of another life sent to nobody: in chunks 0 and 1, which change nowhere
	// else, and in chunk 2.
	tail(t, disks[2], open(2), b.key, []lsfs.BlockNo{10, 100, 200, 256 + 0, 256 + 130, 512 + 40})
	for i := range uint64(3) {
		a.write(t, (i+2)<<20, pattern(50+i, 1<<20))
	}

	// The moments of one resync.
	type moment struct {
		how  devicetest.CrashOptions
		disk *devicetest.Disk
	}
	var mu sync.Mutex
	var moments []moment
	seen := 0
	disks[2].Observe(func(op devicetest.Op) {
		if op.Kind != devicetest.Write && op.Kind != devicetest.Flush {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		n := seen
		if seen++; n%2 == 0 { // half of them take eight seconds
			return
		}
		how := devicetest.CrashOptions{Seed: uint64(n), Keep: float64(n%3) / 2, InOrder: n%4 == 1}
		left := disks[2].Crash(how)
		left.SetPath("disk")
		moments = append(moments, moment{how, left})
	})
	c = b.startWith(2, config(2))
	b.inSync(1, 2)
	disks[2].Observe(nil)
	if c.store.Stats().Relaxed == 0 {
		t.Error("no commit of the resync was left to a later flush")
	}
	b.equal()
	b.stop(2, c)
	b.inSync(1)

	mixed := 0
	for i, m := range moments {
		disks[2] = m.disk
		c := b.startWith(2, config(2))
		if c.store.Volume(1).Meta().Inconsistent {
			mixed++
		}
		b.inSync(1, 2)
		b.equal()
		b.stop(2, c)
		b.inSync(1)
		if t.Failed() {
			t.Fatalf("cut %d of %d, %s", i, len(moments), m.how)
		}
	}
	if mixed < 8 {
		t.Errorf("%d of %d cuts were in the middle", mixed, len(moments))
	}
	t.Logf("%d cuts, %d of them in the middle", len(moments), mixed)
}

// tail appends writes of 64 blocks to the copy of volume 1 on a disk, as a node does that
// owns it and reaches nobody.
func tail(t *testing.T, disk *devicetest.Disk, open func(string) (device.Device, error), key dedup.Key, at []lsfs.BlockNo) {
	t.Helper()
	store, err := lsfs.Open(t.Context(), lsfs.Config{Devices: []string{"disk"}, OpenDevice: open, Key: key, L1Bytes: 16 << 20, MetadataBytes: 32 << 20, IndexBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	r := dedup.NewReducer(key)
	id := store.Volume(1).Meta().Durable
	done := make(chan error, len(at))
	for i, start := range at {
		data := pattern(uint64(1000+i), 64*blockSize)
		id.Seq++
		op := &lsfs.Op{Kind: lsfs.OpWrite, Volume: 1, ID: id, Start: start, Count: 64, Done: func(_ *lsfs.Op, err error) { done <- err }}
		for k := range 64 {
			plain := data[k*blockSize:][:blockSize]
			var fp dedup.Fingerprint = r.Fingerprint(plain)
			op.Blocks = append(op.Blocks, dedup.Block{Fingerprint: fp, Encoding: dedup.Raw, Data: plain, Sum: dedup.Sum(plain)})
		}
		store.Append(op)
		store.Kick()
	}
	for range at {
		err = errors.Join(err, <-done)
	}
	if err = errors.Join(err, store.Close()); err != nil {
		t.Fatal(err)
	}
	disk.Reopen()
}

// TestCopyOfWrongSum (CHECKED): a block that arrives with another sum than its content's
// is stored nowhere; the resync ends, and the node goes on.
func TestCopyOfWrongSum(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(4 << 20)
	a.write(t, 0, pattern(1, 1<<20))
	v := c.Volume(1)
	var fps [wire.ChunkBlocks]dedup.Fingerprint
	if err := v.copy().Fingerprints(t.Context(), 0, fps[:]); err != nil {
		t.Fatal(err)
	}
	before := fps[3]
	data := pattern(9, blockSize)
	fps[3] = dedup.NewReducer(b.key).Fingerprint(data)
	sc := wire.SyncChunk{Version: 99, Fingerprints: fps[:], Index: []uint32{3},
		Blocks: []dedup.Block{{Fingerprint: fps[3], Encoding: dedup.Raw, Data: data, Sum: dedup.Sum(data) ^ 1}}}
	meta := wire.AppendSyncChunk(nil, &sc)
	if _, err := v.syncApply(t.Context(), meta, data); !errors.Is(err, lsfs.ErrInvalidOp) {
		t.Errorf("a block with a wrong sum: %v", err)
	}
	if err := v.copy().Fingerprints(t.Context(), 0, fps[:]); err != nil || fps[3] != before {
		t.Errorf("it was stored: %v", err)
	}
	a.write(t, 2<<20, pattern(2, 1<<20)) // both go on
	b.equal()
	if n := fmt.Sprint(b.record().InSync); n != "[1 2]" {
		t.Errorf("in sync are %s", n)
	}
}
