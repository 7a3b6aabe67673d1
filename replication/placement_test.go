package replication

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// amend changes a volume's record as an administrator does.
func (b *bench) amend(f func(*Record)) {
	b.court.mu.Lock()
	defer b.court.mu.Unlock()
	r := b.court.records[1]
	r.Replicas, r.InSync = slices.Clone(r.Replicas), slices.Clone(r.InSync)
	f(&r)
	if r.Epoch > 1 {
		r.Epoch++
	}
	b.court.records[1] = r
	for _, n := range b.court.notify {
		select {
		case n <- struct{}{}:
		default:
		}
	}
}

func (b *bench) addReplica(n NodeID, id ReplicaID) {
	b.amend(func(r *Record) { r.Replicas = append(r.Replicas, Replica{n, id}) })
}

func (b *bench) removeReplica(n NodeID) {
	b.amend(func(r *Record) {
		r.Replicas = slices.DeleteFunc(r.Replicas, func(p Replica) bool { return p.Node == n })
		r.InSync = slices.DeleteFunc(r.InSync, func(m NodeID) bool { return m == n })
	})
}

// trio starts three nodes with one volume, in sync on all of them.
func trio(t *testing.T, size uint64) (*bench, map[NodeID]*testNode) {
	b := newBench(t)
	b.members = []NodeID{1, 2, 3}
	nodes := map[NodeID]*testNode{1: b.start(1), 2: b.start(2), 3: b.start(3)}
	b.create(size, 1)
	b.addReplica(3, ReplicaID{3})
	b.inSync(1, 2, 3)
	return b, nodes
}

// writers write numbered blocks through some nodes until stop, each its own region
// of 64 blocks, and keep what was acknowledged. A command may be refused only when
// fails allows it.
type writers struct {
	t     *testing.T
	group sync.WaitGroup
	quit  atomic.Bool
	done  atomic.Int64
	mu    sync.Mutex
	acked map[uint64]uint64 // block -> number
	fails bool
}

func (w *writers) start(region uint64, n *testNode) {
	w.group.Go(func() {
		for i := uint64(1); !w.quit.Load(); i++ {
			block := region*64 + i%64
			data := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, i), 512)
			if err := n.do(&Request{Op: OpWrite, Off: block * 4096, Len: 4096, Data: data}); err != nil {
				if !w.fails {
					w.t.Errorf("write %d through a node: %v", i, err)
				}
				return
			}
			w.mu.Lock()
			w.acked[block] = i
			w.mu.Unlock()
			w.done.Add(1)
		}
	})
}

func (w *writers) progress(n int64) {
	w.t.Helper()
	was := w.done.Load()
	eventually(w.t, "progress of the writers", func() bool { return w.done.Load() >= was+n })
}

// check reads everything acknowledged back through a node.
func (w *writers) check(n *testNode) {
	w.t.Helper()
	for block, number := range w.acked {
		if got := binary.LittleEndian.Uint64(n.read(w.t, block*4096, 4096)); got < number {
			w.t.Errorf("block %d holds write %d, acknowledged was %d", block, got, number)
		}
	}
}

// A third replica comes, the second goes, and the first gives the volume away and
// goes too, all under load: no command fails, and the freed node can be given a
// copy again.
func TestReplicasComeAndGo(t *testing.T) {
	b := newBench(t)
	b.members = []NodeID{1, 2, 3}
	b.timing = DefaultTiming
	nodes := map[NodeID]*testNode{1: b.start(1), 2: b.start(2), 3: b.start(3)}
	b.create(4<<20, 1)
	b.inSync(1, 2)
	w := &writers{t: t, acked: map[uint64]uint64{}}
	w.start(0, nodes[1])
	w.start(1, nodes[1])
	w.progress(50)
	b.addReplica(3, ReplicaID{3})
	b.inSync(1, 2, 3)
	w.start(2, nodes[3])
	w.progress(50)
	b.removeReplica(2)
	eventually(t, "the copy is freed", func() bool { return nodes[2].store.Volume(1) == nil })
	w.progress(50)
	if r := b.record(); !slices.Equal(r.InSync, []NodeID{1, 3}) {
		t.Fatalf("%+v", r)
	}
	// The same node again, as another replica.
	b.addReplica(2, ReplicaID{0x22})
	b.inSync(1, 2, 3)
	w.progress(50)
	eventually(t, "the move", func() bool { return nodes[1].Volume(1).MoveTo(t.Context(), 2) == nil })
	w.progress(50)
	b.removeReplica(1)
	eventually(t, "the copy is freed", func() bool { return nodes[1].store.Volume(1) == nil })
	w.progress(50) // node 1 forwards to node 2
	w.quit.Store(true)
	w.group.Wait()
	b.inSync(2, 3)
	for _, n := range []NodeID{2, 3} {
		w.check(nodes[n])
	}
	b.equal()
}

// With three copies a write waits for both others (W4), and goes on when the record
// has dropped the one that is gone; any of the two that are left may take over, and
// has everything (M2, M3).
func TestThreeReplicas(t *testing.T) {
	b, nodes := trio(t, 8<<20)
	b.court.reach(1, false)
	b.stop(3, nodes[3])
	done := make(chan error, 1)
	go func() { done <- nodes[1].do(&Request{Op: OpWrite, Len: 4096, Data: pattern(1, 4096)}) }()
	select {
	case err := <-done:
		t.Fatalf("W4: acknowledged (%v) while the record names three and two have it", err)
	case <-time.After(500 * time.Millisecond):
	}
	b.court.reach(1, true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b.inSync(1, 2)
	nodes[3] = b.start(3) // with an empty disk: the record's replica id is that of the old one
	b.removeReplica(3)
	b.addReplica(3, ReplicaID{0x33})
	b.inSync(1, 2, 3)
	second := pattern(2, 64<<10)
	nodes[2].write(t, 1<<20, second)
	b.stop(1, nodes[1])
	for _, n := range []NodeID{2, 3} { // both can be asked, whoever has won
		if got := nodes[n].read(t, 1<<20, len(second)); !bytes.Equal(got, second) {
			t.Errorf("through node %d acknowledged data is missing", n)
		}
	}
	if r := b.record(); r.Has(1) || r.Owner == 1 {
		t.Errorf("%+v", r)
	}
	b.inSync(2, 3)
	b.equal()
	// And once more: the last one alone.
	owner := b.record().Owner
	other := 5 - owner
	b.stop(owner, nodes[owner])
	if got := nodes[other].read(t, 0, 4096); !bytes.Equal(got, pattern(1, 4096)) {
		t.Error("the last copy lacks acknowledged data")
	}
}

// A copy that leaves on purpose is not waited for: the record says so before it
// stops.
func TestLeave(t *testing.T) {
	b := newBench(t)
	b.timing = DefaultTiming
	a, c := b.pair(4 << 20)
	a.write(t, 0, pattern(1, 64<<10))
	err := a.Volume(1).Leave(t.Context())
	if r := b.record(); err != nil || !r.Has(1) {
		t.Errorf("the owner left: %v", err)
	}
	if err := c.Volume(1).Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := b.record(); !slices.Equal(r.InSync, []NodeID{1}) || r.Owner != 1 {
		t.Fatalf("%+v", r)
	}
	b.stop(2, c)
	began := time.Now()
	a.write(t, 0, pattern(2, 4096))
	if d := time.Since(began); d > time.Second {
		t.Errorf("a write waited %s for a copy that had left", d)
	}
}

// B3: a stale copy is made the volume. What the better one held is discarded when
// its node comes back.
func TestPromoted(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	a, c := b.startOn(1, filepath.Join(dir, "a"), true), b.startOn(2, filepath.Join(dir, "b"), true)
	b.create(4<<20, 1)
	b.inSync(1, 2)
	old := pattern(1, 64<<10)
	a.write(t, 0, old)
	b.stop(2, c)
	lost := pattern(2, 64<<10)
	a.write(t, 0, lost) // after the record has dropped the other
	b.inSync(1)
	b.stop(1, a)
	c = b.startOn(2, filepath.Join(dir, "b"), false)
	eventually(t, "the copy is known to be stale", func() bool { v := c.Volume(1); return v != nil && v.Status().Role == Stale })
	if s, ok := c.Volume(1).Standing(); !ok || !s.Consistent || s.Sequence == 0 {
		t.Errorf("%+v, %t", s, ok)
	}
	b.amend(func(r *Record) {
		r.Owner, r.InSync, r.Forced = 2, []NodeID{2}, true
		r.Replicas[0].ID = ReplicaID{0xaa}
	})
	if got := c.read(t, 0, len(old)); !bytes.Equal(got, old) {
		t.Fatal("the promoted copy is not what it was")
	}
	c.write(t, 8192, pattern(3, 4096))
	a = b.startOn(1, filepath.Join(dir, "a"), false)
	b.inSync(1, 2)
	b.equal()
	want := slices.Clone(old)
	copy(want[8192:], pattern(3, 4096))
	if got := a.read(t, 0, len(want)); !bytes.Equal(got, want) {
		t.Error("the other lineage shows")
	}
}

// A copy that was in the middle of a resync can be promoted, too, and serves again
// after its next start.
func TestPromotedInResync(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "b")
	a, c := b.start(1), b.startOn(2, path, true)
	b.create(4<<20, 1)
	b.inSync(1, 2)
	a.write(t, 0, pattern(1, 64<<10))
	b.stop(1, a)
	b.inSync(2)
	b.stop(2, c)
	c = b.startOn(2, path, false)
	eventually(t, "the copy is there", func() bool { v := c.Volume(1); return v != nil && v.copy() != nil })
	b.amend(func(r *Record) { r.Owner, r.InSync = 1, []NodeID{1} })
	eventually(t, "the copy is known to be stale", func() bool { return c.Volume(1).Status().Role == Stale })
	m := c.Volume(1).copy().Meta()
	m.Inconsistent = true
	if err := c.Volume(1).copy().SetMeta(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	b.amend(func(r *Record) { r.Owner, r.InSync, r.Forced = 2, []NodeID{2}, true })
	c.read(t, 0, 4096)
	b.stop(2, c)
	c = b.startOn(2, path, false)
	if got := c.read(t, 0, 4096); len(got) != 4096 {
		t.Error(fmt.Sprint("read ", len(got)))
	}
}
