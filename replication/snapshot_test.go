package replication

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// content reads a whole snapshot in a node's store; nil when it is not there.
func (n *testNode) content(t testing.TB, id VolumeID) []byte {
	t.Helper()
	s := n.store.Snapshot(id)
	if s == nil {
		return nil
	}
	data := make([]byte, s.Blocks()*4096)
	if err := s.Read(t.Context(), 0, data); err != nil {
		t.Fatalf("snapshot %d: %v", id, err)
	}
	return data
}

// all reads volume 1 in parts that can be forwarded.
func (n *testNode) all(t *testing.T, size uint64) []byte {
	t.Helper()
	var data []byte
	for off := uint64(0); off < size; off += 1 << 20 {
		data = append(data, n.read(t, off, int(min(1<<20, size-off)))...)
	}
	return data
}

// try is do on a node that may be closed at any moment: what it has then is lost, as
// with a process.
func (n *testNode) try(r *Request) error {
	done := make(chan struct{})
	r.Done = func(*Request) { close(done) }
	n.Volume(1).Submit(r)
	n.Kick()
	select {
	case <-done:
		return r.Err
	case <-n.quit:
	}
	pause(context.Background(), 50*time.Millisecond)
	select {
	case <-done:
		return r.Err
	default:
		return errCancelled
	}
}

// owner is the node that serves a volume.
func (b *bench) owner(id VolumeID) *testNode {
	b.t.Helper()
	var n *testNode
	eventually(b.t, "an owner", func() bool {
		b.mu.Lock()
		n = b.nodes[b.recordOf(id).Owner]
		b.mu.Unlock()
		return n != nil && n.Volume(id) != nil && n.Volume(id).Status().Serving
	})
	return n
}

// known is a record of snapshots for reconciling.
func known(next VolumeID, of map[VolumeID]VolumeID) KnownSnapshots {
	return KnownSnapshots{Next: next, Of: func(id VolumeID) VolumeID { return of[id] }}
}

// sameSnapshots compares the snapshots of two nodes with a model, and their points
// with each other.
func sameSnapshots(t *testing.T, model map[VolumeID][]byte, nodes ...*testNode) {
	t.Helper()
	for id, want := range model {
		var point lsfs.OpID
		for i, n := range nodes {
			got := n.content(t, id)
			if !bytes.Equal(got, want) {
				t.Errorf("node %d: snapshot %d: %d bytes differ from the model, %d bytes", n.self, id, len(got), len(want))
				continue
			}
			if p := n.store.Snapshot(id).Point(); i > 0 && p != point {
				t.Errorf("snapshot %d has the points %v and %v", id, point, p)
			} else {
				point = p
			}
		}
	}
	for _, n := range nodes {
		if list := n.store.Snapshots(0); len(list) != len(model) {
			t.Errorf("node %d has %d snapshots, want %d", n.self, len(list), len(model))
		}
	}
}

// TestSnapshotsAgainstModel takes, deletes and rolls back among writes, clones and
// growth through both nodes, against plain arrays.
func TestSnapshotsAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	b := newBench(t)
	b.timing = DefaultTiming // a busy machine must not change the owner
	size := uint64(6 << 20)
	a, c := b.pair(size)
	nodes := []*testNode{a, c}
	live := make([]byte, size)
	snaps := map[VolumeID][]byte{}
	of := map[VolumeID]VolumeID{}
	next := VolumeID(100)
	pool := pattern(seed, 1<<20)
	rolled := 0
	for i := range 300 {
		n := nodes[r.IntN(2)]
		off := r.Uint64N(size/4096) * 4096
		length := min((1+r.Uint64N(200))*4096, size-off)
		switch k := r.IntN(12); {
		case k < 5:
			at := r.IntN(len(pool) - int(length))
			n.write(t, off, pool[at:at+int(length)])
			copy(live[off:], pool[at:at+int(length)])
		case k == 5:
			if err := n.do(&Request{Op: OpUnmap, Off: off, Len: length}); err != nil {
				t.Fatal(err)
			}
			clear(live[off : off+length])
		case k == 6:
			from := min(r.Uint64N(size/4096)*4096, size-length)
			if err := n.do(&Request{Op: OpClone, Off: off, Len: length, Source: 1, SourceOff: from}); err == nil {
				copy(live[off:off+length], bytes.Clone(live[from:from+length]))
			} else if err != ErrNoClone {
				t.Fatal(err)
			}
		case k < 9:
			id := next
			next++
			if err := b.owner(1).Volume(1).TakeSnapshot(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			snaps[id], of[id] = bytes.Clone(live), 1
			if err := c.Volume(1).TakeSnapshot(t.Context(), next+1000); c != b.owner(1) && !errors.Is(err, ErrNotOwner) {
				t.Fatalf("TakeSnapshot at another node than the owner: %v", err)
			}
		case k == 9:
			for id, was := range snaps { // any
				if err := b.owner(1).Volume(1).RollBack(t.Context(), id); err != nil {
					t.Fatalf("roll back: %v", err)
				}
				clear(live)
				copy(live, was)
				rolled++
				break
			}
		case k == 10:
			for id := range snaps {
				delete(snaps, id)
				delete(of, id)
				for _, n := range nodes {
					n.ReconcileSnapshots(known(next, of))
				}
				break
			}
		case size < 12<<20:
			size += 1 << 20
			b.court.mu.Lock()
			rec := b.court.records[1]
			rec.SizeBytes = size
			b.court.records[1] = rec
			for _, n := range b.court.notify {
				select {
				case n <- struct{}{}:
				default:
				}
			}
			b.court.mu.Unlock()
			eventually(t, "the volume has grown", func() bool { return a.Volume(1).SizeBytes() == size && c.Volume(1).SizeBytes() == size })
			live = append(live, make([]byte, 1<<20)...)
		}
		if i%20 == 0 {
			if !bytes.Equal(n.all(t, size), live) {
				t.Fatalf("operation %d: the volume differs from the model", i)
			}
		}
	}
	t.Logf("%d snapshots at the end, %d rollbacks", len(snaps), rolled)
	for _, n := range nodes {
		if !bytes.Equal(n.all(t, size), live) {
			t.Error("the volume differs from the model")
		}
	}
	sameSnapshots(t, snaps, a, c)
	b.equal()
	if err := b.owner(1).Volume(1).RollBack(t.Context(), 7777); !errors.Is(err, ErrNoSnapshot) {
		t.Errorf("roll back to nothing: %v", err)
	}
}

// TestSnapshotsMissed: a replica is absent while snapshots come and go and the volume
// is rolled back; another one is new. Afterwards all are equal.
func TestSnapshotsMissed(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "b")
	const size = 8 << 20
	a, c := b.start(1), b.startOn(2, path, true)
	b.create(size, 1)
	b.inSync(1, 2)
	live := make([]byte, size)
	snaps, of := map[VolumeID][]byte{}, map[VolumeID]VolumeID{}
	step := func(id VolumeID) {
		t.Helper()
		for k := range 3 {
			data := pattern(uint64(id)*8+uint64(k), 300<<10)
			off := (uint64(id)*1_300_000 + uint64(k)*900_000) % (size - 400<<10) &^ 4095
			a.write(t, off, data)
			copy(live[off:], data)
		}
		if err := a.Volume(1).TakeSnapshot(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		snaps[id], of[id] = bytes.Clone(live), 1
	}
	for id := VolumeID(10); id < 16; id++ {
		step(id)
	}
	sameSnapshots(t, snaps, a, c)
	b.stop(2, c)
	b.inSync(1)
	for id := VolumeID(16); id < 20; id++ {
		step(id)
	}
	for _, id := range []VolumeID{11, 15, 18} {
		delete(snaps, id)
		delete(of, id)
	}
	a.ReconcileSnapshots(known(100, of))
	if err := a.Volume(1).RollBack(t.Context(), 13); err != nil {
		t.Fatal(err)
	}
	copy(live, snaps[13])
	for id := VolumeID(20); id < 23; id++ {
		step(id)
	}
	c = b.startOn(2, path, false)
	b.inSync(1, 2)
	c.ReconcileSnapshots(known(100, of))
	sameSnapshots(t, snaps, a, c)
	b.equal()
	if got := c.all(t, size); !bytes.Equal(got, live) {
		t.Error("the volume differs from the model")
	}

	// An empty replica gets all of them.
	b.stop(2, c)
	b.inSync(1)
	step(23)
	c = b.start(2)
	b.inSync(1, 2)
	sameSnapshots(t, snaps, a, c)
	b.equal()
	before := a.store.Stats().UniqueBytes
	if got := c.store.Stats().UniqueBytes; got > before+before/20 {
		t.Errorf("the new replica stores %d bytes, the owner %d: sharing was lost", got, before)
	}
	// And it can own: what it has is right.
	if err := a.Volume(1).MoveTo(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	if err := b.owner(1).Volume(1).RollBack(t.Context(), 16); err != nil {
		t.Fatal(err)
	}
	if got := a.all(t, size); !bytes.Equal(got, snaps[16]) {
		t.Error("rolled back at the other node, the volume is not its snapshot")
	}
	b.equal()
}

// TestSnapshotsWhileFilled: snapshots are taken while a replica is filled and gets
// the stream. Each of them is right in the end.
func TestSnapshotsWhileFilled(t *testing.T) {
	b := newBench(t)
	const size = 24 << 20
	a := b.start(1)
	b.create(size, 1)
	b.inSync(1)
	live := pattern(5, size)
	a.write(t, 0, live)
	c := b.start(2)
	snaps := map[VolumeID][]byte{}
	id := VolumeID(50)
	whole := func() bool { r := b.recordOf(1); return r.Has(2) }
	for !whole() || id < 60 {
		data := pattern(uint64(id), 40<<10)
		off := uint64(id) * 7_000_000 % (size - 40<<10) &^ 4095
		a.write(t, off, data)
		copy(live[off:], data)
		if id < 250 {
			if err := a.Volume(1).TakeSnapshot(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			snaps[id] = bytes.Clone(live)
			id++
		}
	}
	t.Logf("%d snapshots", len(snaps))
	b.inSync(1, 2)
	sameSnapshots(t, snaps, a, c)
	b.equal()
}

// TestSnapshotsSurviveOwners: owners die under load while snapshots are taken. Every
// snapshot is afterwards on both nodes with the same content, or on none; those that
// were answered are there, and hold what had been acknowledged.
func TestSnapshotsSurviveOwners(t *testing.T) {
	b := newBench(t)
	b.timing.Lease, b.timing.Grace, b.timing.Evict = 1200*time.Millisecond, 1300*time.Millisecond, 1200*time.Millisecond // a busy machine must not strike a node that lives
	paths := map[NodeID]string{1: filepath.Join(t.TempDir(), "a"), 2: filepath.Join(t.TempDir(), "b")}
	const size = 4 << 20
	b.startOn(1, paths[1], true)
	b.startOn(2, paths[2], true)
	b.create(size, 1)
	b.inSync(1, 2)
	type taken struct {
		id  VolumeID
		ack [8]uint64 // what each writer had acknowledged when it was asked for
		ok  bool
	}
	var mu sync.Mutex
	var all []taken
	var acked [8]atomic.Uint64
	var stop atomic.Bool
	var group sync.WaitGroup
	node := func(id NodeID) *testNode {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.nodes[id]
	}
	for w := range 8 {
		group.Go(func() {
			for i := uint64(1); !stop.Load(); i++ {
				data := make([]byte, 4096)
				binary.LittleEndian.PutUint64(data, i)
				for !stop.Load() {
					n := node(NodeID(1 + i%2))
					if n == nil || n.Volume(1) == nil || n.try(&Request{Op: OpWrite, Off: uint64(w) * 4096, Len: 4096, Data: data}) != nil {
						pause(context.Background(), time.Millisecond)
						continue
					}
					acked[w].Store(i)
					break
				}
			}
		})
	}
	group.Go(func() {
		for id := VolumeID(1000); !stop.Load(); id++ {
			n := node(b.recordOf(1).Owner)
			if n == nil || n.Volume(1) == nil {
				pause(context.Background(), time.Millisecond)
				continue
			}
			x := taken{id: id}
			for w := range acked {
				x.ack[w] = acked[w].Load()
			}
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			x.ok = n.Volume(1).TakeSnapshot(ctx, id) == nil
			cancel()
			mu.Lock()
			all = append(all, x)
			mu.Unlock()
			pause(context.Background(), 5*time.Millisecond)
		}
	})
	rounds := 4
	if testing.Short() {
		rounds = 2
	}
	for round := range rounds {
		count := func() int { mu.Lock(); defer mu.Unlock(); return len(all) }
		was := count()
		eventually(t, "snapshots under load", func() bool { return count() > was+8 })
		victim := b.recordOf(1).Owner
		if round%2 == 1 {
			victim = 3 - victim
		}
		b.stop(victim, node(victim))
		b.inSync(3 - victim)
		eventually(t, "the other one serves", func() bool { return node(3 - victim).Volume(1).Status().Serving })
		b.startOn(victim, paths[victim], false)
		b.inSync(1, 2)
	}
	stop.Store(true)
	group.Wait()
	b.equal()
	owner := b.owner(1)
	answered := 0
	for _, x := range all {
		found, err := owner.Volume(1).FindSnapshot(t.Context(), x.id)
		if err != nil {
			t.Fatal(err)
		}
		one, two := node(1).content(t, x.id), node(2).content(t, x.id)
		if !bytes.Equal(one, two) || found != (one != nil) {
			t.Errorf("snapshot %d: on the nodes %v and %v, found %v", x.id, one != nil, two != nil, found)
		}
		if !x.ok {
			continue
		}
		answered++
		if one == nil {
			t.Errorf("snapshot %d was answered and is gone", x.id)
			continue
		}
		for w := range x.ack {
			if got := binary.LittleEndian.Uint64(one[w*4096:]); got < x.ack[w] {
				t.Errorf("snapshot %d lacks write %d of writer %d, which had been acknowledged: it has %d", x.id, x.ack[w], w, got)
			}
		}
	}
	t.Logf("%d snapshots, %d answered", len(all), answered)
	if answered == 0 {
		t.Error("no snapshot was answered")
	}
}

// TestSnapshotGroup: two volumes of two owners; each write to the second follows the
// acknowledgement of one to the first. No group has the later one without the earlier.
func TestSnapshotGroup(t *testing.T) {
	b := newBench(t)
	b.timing = DefaultTiming // a busy machine must not change the owner
	a, c := b.start(1), b.start(2)
	b.createAs(1, 1<<20, 1)
	b.createAs(2, 1<<20, 2)
	b.inSyncAs(1, 1, 2)
	b.inSyncAs(2, 1, 2)
	var stop atomic.Bool
	var n atomic.Uint64
	var group sync.WaitGroup
	group.Go(func() {
		for i := uint64(1); !stop.Load(); i++ {
			data := make([]byte, 4096)
			binary.LittleEndian.PutUint64(data, i)
			for _, id := range []VolumeID{1, 2} {
				if err := a.on(id, &Request{Op: OpWrite, Off: 0, Len: 4096, Data: data}); err != nil {
					t.Errorf("write %d: %v", i, err)
					return
				}
			}
			n.Store(i)
		}
	})
	owners := map[VolumeID]*testNode{1: a, 2: c}
	ctx := t.Context()
	for g := VolumeID(100); g < 140; g += 2 {
		was := n.Load()
		eventually(t, "load", func() bool { return n.Load() > was+2 })
		for _, id := range []VolumeID{1, 2} {
			if err := owners[id].Volume(id).Freeze(ctx, g); err != nil {
				t.Fatal(err)
			}
		}
		// A read goes on while writes are held.
		if err := a.on(1, &Request{Op: OpRead, Off: 4096, Len: 4096, Data: make([]byte, 4096)}); err != nil {
			t.Fatal(err)
		}
		for i, id := range []VolumeID{2, 1} {
			if err := owners[id].Volume(id).TakeFrozen(ctx, g, g+VolumeID(i)); err != nil {
				t.Fatal(err)
			}
		}
		second, first := binary.LittleEndian.Uint64(a.content(t, g)), binary.LittleEndian.Uint64(a.content(t, g+1))
		if first < second || first > second+1 {
			t.Errorf("group %d: write %d of the first volume, %d of the second", g, first, second)
		}
	}
	// One that is frozen and not asked again goes on by itself.
	began := time.Now()
	if err := a.Volume(1).Freeze(ctx, 500); err != nil {
		t.Fatal(err)
	}
	if err := a.Volume(1).Freeze(ctx, 500); !errors.Is(err, ErrBusy) {
		t.Errorf("frozen twice for one group: %v", err)
	}
	was := n.Load()
	eventually(t, "writes after the lapse", func() bool { return n.Load() > was+3 })
	if took := time.Since(began); took < FreezeMax || took > FreezeMax+8*time.Second {
		t.Errorf("writes were held %v", took)
	}
	if err := a.Volume(1).TakeFrozen(ctx, 500, 501); !errors.Is(err, errLapsed) {
		t.Errorf("TakeFrozen after the lapse: %v", err)
	}
	if a.store.Snapshot(501) != nil || c.store.Snapshot(501) != nil {
		t.Error("it was taken all the same")
	}
	if err := a.Volume(1).Freeze(ctx, 502); err != nil {
		t.Fatal(err)
	}
	a.Volume(1).Thaw(502)
	a.Volume(1).Thaw(502)
	was = n.Load()
	eventually(t, "writes after the thaw", func() bool { return n.Load() > was })
	stop.Store(true)
	group.Wait()
	b.equalAs(1)
	b.equalAs(2)
}

// TestRollBackUnderLoad: readers and writers go on around rollbacks; each read sees
// the old content or the new one, and writes after a rollback stay.
func TestRollBackUnderLoad(t *testing.T) {
	b := newBench(t)
	b.timing = DefaultTiming // a busy machine must not change the owner
	const size = 4 << 20
	a, c := b.pair(size)
	base := pattern(1, size)
	a.write(t, 0, base)
	if err := a.Volume(1).TakeSnapshot(t.Context(), 10); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var group sync.WaitGroup
	for w := range 4 {
		n := []*testNode{a, c}[w%2]
		group.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for !stop.Load() {
				off := r.Uint64N(size/4096) * 4096
				if w < 2 {
					data := bytes.Repeat([]byte{byte(w + 1)}, 4096)
					if err := n.do(&Request{Op: OpWrite, Off: off, Len: 4096, Data: data}); err != nil {
						t.Errorf("write: %v", err)
						return
					}
					continue
				}
				data := make([]byte, 4096)
				if err := n.do(&Request{Op: OpRead, Off: off, Len: 4096, Data: data}); err != nil {
					t.Errorf("read: %v", err)
					return
				}
				if whole := bytes.Repeat(data[:1], 4096); !bytes.Equal(data, base[off:off+4096]) && (!bytes.Equal(data, whole) || data[0] != 1 && data[0] != 2) {
					t.Errorf("ATOMIC-4K: block %d is neither", off/4096)
					return
				}
			}
		})
	}
	for range 10 {
		pause(t.Context(), 20*time.Millisecond)
		if err := b.owner(1).Volume(1).RollBack(t.Context(), 10); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	group.Wait()
	b.equal()
	if err := b.owner(1).Volume(1).RollBack(t.Context(), 10); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*testNode{a, c} {
		if !bytes.Equal(n.all(t, size), base) {
			t.Error("rolled back, it is not the snapshot")
		}
	}
	sameSnapshots(t, map[VolumeID][]byte{10: base}, a, c)
}

// TestCloneOfSnapshot: a volume begins as a snapshot, on a node that has it and on one
// that has not; nothing is sent that the other pool holds.
func TestCloneOfSnapshot(t *testing.T) {
	b := newBench(t)
	b.timing = DefaultTiming // a busy machine must not change the owner
	const size = 4 << 20
	a, c := b.pair(size)
	base := pattern(3, size)
	a.write(t, 0, base)
	if err := a.Volume(1).TakeSnapshot(t.Context(), 10); err != nil {
		t.Fatal(err)
	}
	a.write(t, 0, pattern(4, 1<<20))
	clone := func(id VolumeID, size uint64, origin VolumeID) {
		b.court.mu.Lock()
		b.court.records[id] = Record{Volume: id, SizeBytes: size, Epoch: 1, Owner: 1, InSync: []NodeID{1},
			Replicas: []Replica{{1, ReplicaID{1, byte(id)}}, {2, ReplicaID{2, byte(id)}}}, Dedup: true, Compress: true, Origin: origin}
		for _, n := range b.court.notify {
			select {
			case n <- struct{}{}:
			default:
			}
		}
		b.court.mu.Unlock()
		b.inSyncAs(id, 1, 2)
	}
	clone(20, size, 10)
	clone(21, size+1<<20, 10)
	if err := c.store.DeleteSnapshot(t.Context(), 10); err != nil { // lost there, say
		t.Fatal(err)
	}
	clone(22, size, 10)
	for _, n := range []*testNode{a, c} {
		for _, id := range []VolumeID{20, 21, 22} {
			if got := n.readFrom(t, id, 0, size); !bytes.Equal(got, base) {
				t.Errorf("node %d: clone %d differs from its origin", n.self, id)
			}
		}
		if got := n.readFrom(t, 21, size, 1<<20); !bytes.Equal(got, make([]byte, 1<<20)) {
			t.Error("the grown part of a clone is not empty")
		}
	}
	c.writeTo(t, 20, 8192, pattern(9, 64<<10))
	if got := a.readFrom(t, 1, 0, 1<<20); !bytes.Equal(got, pattern(4, 1<<20)) {
		t.Error("a write to the clone changed its origin's volume")
	}
	for _, id := range []VolumeID{1, 20, 21, 22} {
		if id == 1 {
			continue // the lost snapshot is found
		}
		b.equalAs(id)
	}
	res, err := b.owner(1).Volume(1).Check(t.Context(), nil)
	if err != nil || len(res.Replicas) != 1 || res.Replicas[0].Equal || fmt.Sprint(res.Replicas[0].Snapshots) != "[10]" {
		t.Errorf("the check does not see that a snapshot is lost: %+v, %v", res, err)
	}
	// It is brought back at the next resync.
	owner := b.owner(1)
	other := map[*testNode]NodeID{a: 2, c: 1}[owner]
	b.court.mu.Lock()
	rec := b.court.records[1]
	rec.Epoch++
	rec.InSync = []NodeID{rec.Owner}
	b.court.records[1] = rec
	for _, n := range b.court.notify {
		select {
		case n <- struct{}{}:
		default:
		}
	}
	b.court.mu.Unlock()
	eventually(t, "in sync again", func() bool { r := b.recordOf(1); return r.Has(other) })
	sameSnapshots(t, map[VolumeID][]byte{10: base}, a, c)
	b.equal()
}

// TestReconcile: only what a record that is not older than the pool passes over goes.
func TestReconcile(t *testing.T) {
	b := newBench(t)
	a := b.start(1)
	b.create(1<<20, 1)
	b.inSync(1)
	eventually(t, "serving", func() bool { return a.Volume(1) != nil && a.Volume(1).Status().Serving })
	for id := VolumeID(10); id < 14; id++ {
		if err := a.Volume(1).TakeSnapshot(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	count := func() int { return len(a.store.Snapshots(0)) }
	for _, test := range []struct {
		k    KnownSnapshots
		want int
	}{
		{known(13, nil), 4}, // handed out up to 12, and the pool has 13: the record is older
		{known(14, map[VolumeID]VolumeID{10: 1, 12: 1, 13: 1}), 3}, // 11 is nobody's
		{known(14, map[VolumeID]VolumeID{10: 77, 12: 1}), 2},       // of a volume that is not known yet: stays; 13 goes
		{known(14, nil), 0},
	} {
		a.ReconcileSnapshots(test.k)
		if count() != test.want {
			t.Errorf("up to %d: %d snapshots, want %d", test.k.Next, count(), test.want)
		}
	}
	// They go with the placement of their volume.
	if err := a.Volume(1).TakeSnapshot(t.Context(), 20); err != nil {
		t.Fatal(err)
	}
	a.Update([]Record{{Volume: 1, SizeBytes: 1 << 20, Epoch: 50, Owner: 2, InSync: []NodeID{2}, Replicas: []Replica{{2, ReplicaID{2}}}}}, []NodeID{1, 2})
	a.ReconcileSnapshots(known(30, map[VolumeID]VolumeID{20: 1}))
	if count() != 0 {
		t.Errorf("%d snapshots of a volume that is placed elsewhere", count())
	}
}

// TestLateApply (Y4): a replica is slow with a chunk that it was told to copy. The owner
// gives up meanwhile, begins anew, and the chunk is written again. What was read for
// the first attempt must not come on top.
func TestLateApply(t *testing.T) {
	b := newBench(t)
	b.timing = DefaultTiming
	a, c := b.pair(1 << 20)
	for n := 0; !a.Volume(1).Status().Serving; n++ {
		pause(t.Context(), 5*time.Millisecond)
	}
	old, fresh := pattern(1, 1<<20), pattern(2, 1<<20)
	a.write(t, 0, old)
	v := c.Volume(1)
	session := v.session.Load()
	v.sessions.RLock() // a call of the first attempt at work
	begun := make(chan struct{})
	go func() { v.newSession(); close(begun) }()
	select {
	case <-begun:
		t.Fatal("a new attempt began while the old one was at work")
	case <-time.After(50 * time.Millisecond):
	}
	v.sessions.RUnlock()
	<-begun
	if v.session.Load() == session {
		t.Fatal("what is left of the old attempt is not told from the new one")
	}
	a.write(t, 0, fresh)
	// Over the wire: a call that was read before the next attempt began is refused.
	l := a.linkTo(2)
	h := wire.Header{Volume: 1, Epoch: uint64(b.record().Epoch)}
	hole := wire.AppendSyncChunk(nil, &wire.SyncChunk{Chunk: 0, Version: 1, Fingerprints: make([]dedup.Fingerprint, 256)})
	v.sessions.Lock() // the call is read, and comes no further
	call := l.begin(h, wire.SyncApply, hole, nil)
	l.flush()
	read := l.begin(h, wire.StateSum, nil, nil) // behind it
	l.flush()
	if _, err := l.wait(read, t.Context().Done()); err != nil {
		t.Fatal(err)
	}
	v.session.Add(1)
	v.sessions.Unlock()
	if _, err := l.wait(call, t.Context().Done()); err == nil {
		t.Error("Y4: a chunk of an attempt that was given up was taken")
	}
	if got := c.store.Volume(1); got == nil {
		t.Fatal("no copy")
	} else if data := make([]byte, 1<<20); got.Read(t.Context(), 0, data) != nil || !bytes.Equal(data, fresh) {
		t.Error("Y4: what came late has replaced what was newer")
	}
	b.equal()
}
