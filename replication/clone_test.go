package replication

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

func (n *testNode) writeTo(t testing.TB, id VolumeID, off uint64, data []byte) {
	t.Helper()
	if err := n.on(id, &Request{Op: OpWrite, Off: off, Len: uint64(len(data)), Data: data}); err != nil {
		t.Fatalf("write to volume %d at %d: %v", id, off, err)
	}
}

func (n *testNode) readFrom(t testing.TB, id VolumeID, off uint64, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	if err := n.on(id, &Request{Op: OpRead, Off: off, Len: uint64(size), Data: data}); err != nil {
		t.Fatalf("read of volume %d at %d: %v", id, off, err)
	}
	return data
}

// TestCloneAgainstModel clones between two volumes and inside each, through both
// nodes, with writes between, against plain arrays.
func TestCloneAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 9))
	b := newBench(t)
	a, c := b.start(1), b.start(2)
	const size = 8 << 20
	b.createAs(1, size, 1)
	b.createAs(2, size, 1)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	nodes := []*testNode{a, c}
	model := map[VolumeID][]byte{1: make([]byte, size), 2: make([]byte, size)}
	annex := map[VolumeID][]byte{1: make([]byte, size), 2: make([]byte, size)}
	pool := pattern(seed, 1<<20)
	cloned := 0
	for i := range 400 {
		n := nodes[r.IntN(2)]
		id := VolumeID(1 + r.IntN(2))
		off := r.Uint64N(size/4096) * 4096
		length := min((1+r.Uint64N(300))*4096, size-off)
		switch r.IntN(4) {
		case 0:
			at := r.IntN(len(pool) - 300<<10)
			length = min(length, 300<<10)
			n.writeTo(t, id, off, pool[at:at+int(length)])
			copy(model[id][off:], pool[at:at+int(length)])
		case 1:
			if err := n.on(id, &Request{Op: OpUnmap, Off: off, Len: length}); err != nil {
				t.Fatal(err)
			}
			clear(model[id][off : off+length])
		default:
			src := VolumeID(1 + r.IntN(2))
			from := min(r.Uint64N(size/4096)*4096, size-length)
			into, of := model[id], model[src]
			req := &Request{Op: OpClone, Off: off, Len: length, Source: src, SourceOff: from}
			if r.IntN(4) == 0 {
				req.Off += AnnexOff
				into = annex[id]
			}
			if r.IntN(4) == 0 {
				req.SourceOff += AnnexOff
				of = annex[src]
			}
			switch err := n.on(id, req); err {
			case nil:
				copy(into[off:off+length], bytes.Clone(of[from:from+length]))
				cloned++
			case ErrNoClone: // a replica is being filled
			default:
				t.Fatalf("operation %d: %v", i, err)
			}
		}
	}
	if cloned < 50 {
		t.Errorf("%d clones", cloned)
	}
	for id := range model {
		for _, n := range nodes {
			if !bytes.Equal(n.readFrom(t, id, 0, size), model[id]) {
				t.Errorf("volume %d differs from the model", id)
			}
			if !bytes.Equal(n.readFrom(t, id, AnnexOff, size), annex[id]) {
				t.Errorf("the annex of volume %d differs from the model", id)
			}
		}
		b.equalAs(id)
	}
}

// TestCloneBetweenOwners: a clone is made while both volumes have the same owner and
// while they have two, through either node, and refused where there is no source.
func TestCloneBetweenOwners(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "b")
	a, c := b.start(1), b.startOn(2, path, true)
	b.createAs(1, 4<<20, 1)
	b.createAs(2, 4<<20, 2)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	data := pattern(1, 1<<20)
	c.writeTo(t, 2, 0, data)
	clone := func(off uint64) *Request {
		return &Request{Op: OpClone, Off: off, Len: 1 << 20, Source: 2, SourceOff: 0}
	}
	for i, n := range []*testNode{a, c} {
		off := uint64(i+1) << 20
		eventually(t, "a clone from a volume that another node owns", func() bool { return n.do(clone(off)) == nil })
		if got := c.readFrom(t, 1, off, 1<<20); !bytes.Equal(got, data) {
			t.Error("the clone differs from its source")
		}
		if err := n.do(&Request{Op: OpClone, Len: 4096, Source: 77}); err != ErrNoClone {
			t.Errorf("from no volume: %v", err)
		}
		if err := n.do(&Request{Op: OpClone, Len: 4096, Source: 2, SourceOff: 4 << 20}); err != ErrNoClone {
			t.Errorf("from beyond the end: %v", err)
		}
	}
	eventually(t, "the end of all loans", func() bool {
		v := c.Volume(2)
		v.mu.Lock()
		defer v.mu.Unlock()
		return len(v.loans) == 0 && v.locks.shared == 0
	})
	b.equal()
	eventually(t, "the move", func() bool { return c.Volume(2).MoveTo(t.Context(), 1) == nil || b.recordOf(2).Owner == 1 })
	eventually(t, "both owned by node 1", func() bool { return a.Volume(2).Status().Serving })
	eventually(t, "the clone", func() bool { return c.do(clone(0)) == nil })
	if got := c.readFrom(t, 1, 0, 1<<20); !bytes.Equal(got, data) {
		t.Error("the clone differs from its source")
	}
	b.equal()
	// The other node is out of sync with both, then with none.
	b.stop(2, c)
	b.inSyncAs(1, 1)
	b.inSyncAs(2, 1)
	a.writeTo(t, 2, 0, data[4096:]) // it misses this
	if err := a.do(clone(1 << 20)); err != nil {
		t.Fatalf("nobody else counts or is sent the stream: %v", err)
	}
	c = b.startOn(2, path, false)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	b.equalAs(1)
	b.equalAs(2)
}

// TestReplicaRefusesClone (C4): a replica whose copy of the source follows a later
// epoch, or lacks operations, takes no clone from it. It ends up filled by fingerprint.
func TestReplicaRefusesClone(t *testing.T) {
	for name, spoil := range map[string]func(src *Volume, at *lsfs.OpID){
		"later epoch":       func(src *Volume, _ *lsfs.OpID) { src.g.promised++ },
		"missing operation": func(_ *Volume, at *lsfs.OpID) { at.Seq += 100 },
		"inconsistent":      func(src *Volume, _ *lsfs.OpID) { src.g.fit = false },
		"no copy":           func(src *Volume, _ *lsfs.OpID) { src.replica.Store(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			a := b.start(1)
			b.createAs(1, 1<<20, 1)
			b.inSyncAs(1, 1)
			a.writeTo(t, 1, 0, pattern(1, 4096))
			v := a.Volume(1)
			v.mu.Lock()
			defer v.mu.Unlock()
			at := lsfs.OpID{Epoch: v.g.promised, Seq: v.committed()}
			if !v.has(at) {
				t.Fatal("a good copy is refused")
			}
			kept := v.replica.Load()
			spoil(v, &at)
			if v.has(at) {
				t.Error("taken")
			}
			v.replica.Store(kept)
		})
	}
}

// TestRefusedCloneIsFilled lets a replica refuse for real: its promise for the
// source is ahead of the owner. The owner strikes it, and it comes back equal.
func TestRefusedCloneIsFilled(t *testing.T) {
	b := newBench(t)
	a, c := b.start(1), b.start(2)
	b.createAs(1, 4<<20, 1)
	b.createAs(2, 4<<20, 1)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	data := pattern(1, 1<<20)
	a.writeTo(t, 2, 0, data)
	epoch := b.recordOf(1).Epoch
	src := c.Volume(2)
	src.mu.Lock()
	src.g.promised++ // as if another node were taking the source over
	src.mu.Unlock()
	err := a.do(&Request{Op: OpClone, Len: 1 << 20, Source: 2})
	if err != nil && err != ErrNoClone {
		t.Fatal(err)
	}
	eventually(t, "the refusal", func() bool { return err == ErrNoClone || b.recordOf(1).Epoch > epoch })
	if err != nil {
		t.Skip("the source's lease had ended before")
	}
	src.mu.Lock()
	src.g.promised = min(src.g.promised, b.recordOf(2).Epoch+1)
	src.mu.Unlock()
	b.inSyncAs(1, 1, 2)
	if got := a.readFrom(t, 1, 0, 1<<20); !bytes.Equal(got, data) {
		t.Error("the owner's clone is wrong")
	}
	b.equalAs(1)
}

// TestCloneUnderFire clones from a range that others overwrite, while ownership of
// both volumes moves and a node dies. A clone is always a value that the source had
// as a whole; the copies stay equal.
func TestCloneUnderFire(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "b")
	a, c := b.start(1), b.startOn(2, path, true)
	b.createAs(1, 4<<20, 1)
	b.createAs(2, 4<<20, 1)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	const length = 128 << 10
	fill := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 3, 4}, length/4) }
	a.writeTo(t, 2, 0, fill(0))
	a.writeTo(t, 1, 0, fill(0))
	var stop atomic.Bool
	var group sync.WaitGroup
	var clones, refused atomic.Int64
	group.Go(func() { // writes whole values into the source, slowly enough for the others
		for i := 1; !stop.Load(); i++ {
			a.on(2, &Request{Op: OpWrite, Len: length, Data: fill(i), Atomic: true})
			<-time.After(time.Millisecond)
		}
	})
	for range 2 {
		group.Go(func() {
			for !stop.Load() {
				switch err := a.do(&Request{Op: OpClone, Len: length, Source: 2}); err {
				case nil:
					clones.Add(1)
				default:
					refused.Add(1)
					<-time.After(time.Millisecond)
				}
				<-time.After(time.Millisecond)
			}
		})
	}
	check := func() {
		t.Helper()
		got := make([]byte, length)
		if err := a.do(&Request{Op: OpRead, Len: length, Data: got}); err != nil {
			return // on its way to another owner
		}
		if i := int(got[0]) | int(got[1])<<8; !bytes.Equal(got, fill(i)) {
			t.Error("a clone is no value that its source ever had")
		}
	}
	enough := func(n int64) {
		was := clones.Load()
		waitFor(t, &stop, func() bool { check(); return clones.Load() > was+n })
	}
	for range 6 { // one of the two moves, so that clones end in the middle
		enough(20)
		id := VolumeID(1 + rand.IntN(2))
		if err := a.Volume(id).MoveTo(t.Context(), 2); err == nil {
			enough(20) // between two owners
			eventually(t, "the new owner", func() bool { return c.Volume(id).Status().Serving })
			if err := c.Volume(id).MoveTo(t.Context(), 1); err != nil {
				t.Log(err)
			}
		}
	}
	enough(20)
	b.stop(2, c)
	enough(20)
	c = b.startOn(2, path, false)
	waitFor(t, &stop, func() bool {
		check()
		r, q := b.recordOf(1), b.recordOf(2)
		return r.Has(2) && q.Has(2)
	})
	enough(20)
	stop.Store(true)
	group.Wait()
	t.Logf("%d clones, %d refused", clones.Load(), refused.Load())
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	for id := VolumeID(1); id <= 2; id++ {
		b.equalAs(id)
	}
}

// TestLoanThatEnds ends loans under way, while the lent range is overwritten: the
// lender refuses such a clone, and the copies end up equal.
func TestLoanThatEnds(t *testing.T) {
	b := newBench(t)
	a, c := b.start(1), b.start(2)
	b.createAs(1, 4<<20, 1)
	b.createAs(2, 4<<20, 2)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	epoch := b.recordOf(1).Epoch
	var stop atomic.Bool
	var group sync.WaitGroup
	group.Go(func() {
		for i := 0; !stop.Load(); i++ {
			c.on(2, &Request{Op: OpWrite, Len: 64 << 10, Data: bytes.Repeat([]byte{byte(i), byte(i >> 8), 1, 1}, 16<<10)})
		}
	})
	group.Go(func() {
		for !stop.Load() {
			a.do(&Request{Op: OpClone, Len: 64 << 10, Source: 2})
		}
	})
	lender := c.Volume(2)
	eventually(t, "a refused clone", func() bool {
		lender.mu.Lock()
		for _, x := range lender.loans {
			close(x.returned)
		}
		lender.loans = nil
		lender.mu.Unlock()
		return b.recordOf(1).Epoch > epoch
	})
	stop.Store(true)
	group.Wait()
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	b.equalAs(1)
	b.equalAs(2)
}

// TestAnnexIsResynced: what a replica missed of an annex comes to it like the rest.
func TestAnnexIsResynced(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "b")
	a, c := b.start(1), b.startOn(2, path, true)
	b.create(4<<20, 1)
	b.inSync(1, 2)
	data := pattern(1, 2<<20)
	a.write(t, 0, data)
	b.stop(2, c)
	b.inSync(1)
	if err := a.do(&Request{Op: OpClone, Off: AnnexOff + 64<<20, Len: 2 << 20, Source: 1}); err != nil {
		t.Fatal(err)
	}
	a.write(t, 0, pattern(2, 2<<20))
	c = b.startOn(2, path, false)
	b.inSync(1, 2)
	b.equal()
	got := make([]byte, 2<<20)
	if err := c.Volume(1).copy().Read(t.Context(), AnnexOff+64<<20, got); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the copy of node 2 has another annex: %v", err)
	}
	if err := a.do(&Request{Op: OpUnmap, Off: AnnexOff + 64<<20, Len: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	b.equal()
}

func TestChunksOfTheAnnex(t *testing.T) {
	const blocks = 1000
	annex := uint32(lsfs.AnnexStart / wire.ChunkBlocks)
	last := uint32((lsfs.AnnexStart+lsfs.AnnexBlocks)/wire.ChunkBlocks) - 1
	for _, tt := range []struct {
		chunk uint32
		want  uint64 // blocks
	}{{0, 256}, {3, 1000 - 3*256}, {4, 0}, {annex - 1, 0}, {annex, 256}, {last, 256}, {last + 1, 0}} {
		start, end := chunkRange(tt.chunk, blocks)
		if uint64(end-start) != tt.want || uint64(start) != uint64(tt.chunk)*256 {
			t.Errorf("chunk %d is %d to %d", tt.chunk, start, end)
		}
	}
	if got := union([]uint32{3, annex, 4}, []uint32{annex, 0, last + 1}, blocks); !slices.Equal(got, []uint32{0, 3, annex}) {
		t.Errorf("union %v", got)
	}
}

// TestBadBlockHasAPlace: a read that fails says which block it was.
func TestBadBlockHasAPlace(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "device")
	a := b.startOn(1, path, true)
	b.create(4<<20, 1)
	b.inSync(1)
	data := pattern(7, 256<<10)
	a.write(t, 1<<20, data)
	const bad = 21
	b.stop(1, a)
	spoilFile(t, path, data[bad*4096:bad*4096+4096])
	a = b.startOn(1, path, false)
	c := b.start(2)
	for _, n := range []*testNode{a, c} {
		r := &Request{Op: OpRead, Off: 1<<20 + 512, Len: 200 << 10, Data: make([]byte, 200<<10)}
		if err := n.do(r); err != ErrMedium || r.Bad != 1<<20+bad*4096 {
			t.Errorf("node %d: %v at %s", n.self, err, fmt.Sprint(r.Bad))
		}
	}
}

// spoilFile flips a bit of a block where it lies on a device.
func spoilFile(t *testing.T, path string, block []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(all, block)
	if at < 0 {
		t.Fatal("the block is not on the device as it is")
	}
	if _, err := f.WriteAt([]byte{block[9] ^ 4}, int64(at)+9); err != nil {
		t.Fatal(err)
	}
}
