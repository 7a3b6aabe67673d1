package replication

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// door is what a node's device server knows of the ordered state: the newest value
// and everything that was brought live.
type door struct {
	n    *testNode
	now  atomic.Pointer[stated]
	mu   sync.Mutex
	live []StateID
	all  int
}

func newDoor(t *testing.T, n *testNode) *door {
	d := &door{n: n}
	d.now.Store(&stated{})
	eventually(t, "the volume", func() bool { return n.Volume(1) != nil })
	var busy atomic.Bool
	n.Volume(1).Watch(func(id StateID, value []byte, live bool) {
		if busy.Swap(true) {
			t.Error("Watch's function is called twice at a time")
		}
		defer busy.Store(false)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.now.Store(&stated{id, bytes.Clone(value)})
		d.all++
		if live {
			d.live = append(d.live, id)
		}
	})
	if d.all == 0 {
		t.Error("Watch returned before it brought the newest state")
	}
	return d
}

func (d *door) liveIDs() []StateID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.live)
}

// change replaces the state, whatever it is.
func (d *door) change(t testing.TB, value []byte) StateID {
	t.Helper()
	for {
		read := &Request{Op: OpReadState}
		if err := d.n.do(read); err != nil {
			t.Fatal(err)
		}
		r := &Request{Op: OpState, State: read.State, Data: value}
		switch err := d.n.do(r); {
		case err == nil:
			return r.State
		case !errors.Is(err, ErrStateMoved):
			t.Fatal(err)
		}
	}
}

func TestState(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	a, c := b.startOn(1, filepath.Join(dir, "a"), true), b.startOn(2, filepath.Join(dir, "b"), true)
	b.create(4<<20, 1)
	b.inSync(1, 2)
	da, dc := newDoor(t, a), newDoor(t, c)
	for _, n := range []*testNode{a, c} {
		r := &Request{Op: OpReadState, Value: []byte("x")}
		if err := n.do(r); err != nil || r.State != (StateID{}) || len(r.Value) != 0 {
			t.Fatalf("a new volume has state %v %q, %v", r.State, r.Value, err)
		}
	}
	first := &Request{Op: OpState, Data: []byte("first")}
	if err := c.do(first); err != nil || first.State == (StateID{}) {
		t.Fatalf("%v %v", first.State, err)
	}
	for _, d := range []*door{da, dc} {
		if got := d.now.Load(); got.id != first.State || string(got.value) != "first" {
			t.Errorf("answered before node %d knew: %v %q", d.n.self, got.id, got.value)
		}
	}
	for _, n := range []*testNode{a, c} {
		if err := n.do(&Request{Op: OpState, Data: []byte("late")}); err != ErrStateMoved {
			t.Errorf("a change from an older value: %v", err)
		}
	}
	value := pattern(4, StateBytesMax)
	second := &Request{Op: OpState, State: first.State, Data: value}
	if err := a.do(second); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*testNode{a, c} {
		r := &Request{Op: OpReadState}
		if err := n.do(r); err != nil || r.State != second.State || !bytes.Equal(r.Value, value) {
			t.Fatalf("state %v of %d bytes, %v", r.State, len(r.Value), err)
		}
	}
	for _, d := range []*door{da, dc} {
		if got := d.liveIDs(); !slices.Equal(got, []StateID{first.State, second.State}) {
			t.Errorf("node %d was told of %v", d.n.self, got)
		}
	}
	b.equal()
	b.stop(1, a)
	b.stop(2, c)
	a, c = b.startOn(1, filepath.Join(dir, "a"), false), b.startOn(2, filepath.Join(dir, "b"), false)
	da, dc = newDoor(t, a), newDoor(t, c)
	for _, d := range []*door{da, dc} {
		r := &Request{Op: OpReadState}
		if err := d.n.do(r); err != nil || r.State != second.State || !bytes.Equal(r.Value, value) {
			t.Fatalf("after a restart: state %v of %d bytes, %v", r.State, len(r.Value), err)
		}
		eventually(t, "the state at the door", func() bool { return d.now.Load().id == second.State })
		if len(d.liveIDs()) != 0 {
			t.Error("what a restart brings is not live")
		}
	}
}

// TestStateBans (C2): once a change of the state is answered, nothing of whom it
// bans is sequenced any more, whichever node it came through and however far it had got.
func TestStateBans(t *testing.T) {
	b := newBench(t)
	const size = 16 << 20
	a, c := b.pair(size)
	doors := []*door{newDoor(t, a), newDoor(t, c)}
	const writers, slots = 8, 1 << 20
	var served, banned [writers]atomic.Int64
	var stop atomic.Bool
	var group sync.WaitGroup
	for w := range writers {
		d := doors[w%2]
		// The state is a list of the banned.
		allowed := func(s *stated) bool { return !slices.Contains(s.value, byte(w)) }
		group.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(w)))
			for i := 1; !stop.Load(); i++ {
				accepted := d.now.Load()
				if !allowed(accepted) {
					banned[w].Add(1)
					waitFor(t, &stop, func() bool { return allowed(d.now.Load()) })
					continue
				}
				req := &Request{State: accepted.id, Off: uint64(w) * slots, Recheck: func(q *Request) error {
					now := d.now.Load()
					if !allowed(now) {
						return ErrReserved
					}
					q.State = now.id
					return nil
				}}
				fill := bytes.Repeat([]byte{byte(i), byte(i >> 8), byte(i >> 16), byte(w) + 1}, 300<<10/4)
				switch r.IntN(5) {
				case 0: // one part
					req.Op, req.Data = OpWrite, fill[:8192]
				case 1: // several parts
					req.Op, req.Data = OpWrite, fill
				case 2: // ragged
					req.Op, req.Data, req.Off = OpWrite, fill[:5*512], req.Off+512
				case 3:
					req.Op, req.Len = OpUnmap, 512<<10
				case 4:
					req.Op, req.Data = OpOrWrite, fill[:4096]
				}
				if req.Op != OpUnmap {
					req.Len = uint64(len(req.Data))
				}
				switch err := d.n.do(req); err {
				case nil:
					served[w].Add(1)
				case ErrReserved:
					banned[w].Add(1)
				case ErrBusy, ErrUnavailable: // a slow machine takes a node for dead
				default:
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	for round := range 12 {
		victim := round % writers
		before := served[victim].Load()
		waitFor(t, &stop, func() bool { return served[victim].Load() > before+3 })
		by := doors[round/2%2]
		var moving sync.WaitGroup
		if round%3 == 2 { // while the volume goes to the other node
			from := b.record().Owner
			moving.Go(func() {
				if err := b.nodes[from].Volume(1).MoveTo(t.Context(), 3-from); err != nil {
					t.Logf("round %d: not moved: %v", round, err)
				}
			})
		}
		by.change(t, []byte{byte(victim)})
		snap := a.read(t, uint64(victim)*slots, slots)
		other := (victim + 1) % writers
		was := served[other].Load()
		waitFor(t, &stop, func() bool { return served[other].Load() > was+5 })
		if got := c.read(t, uint64(victim)*slots, slots); !bytes.Equal(got, snap) {
			t.Errorf("round %d: a write of %d landed after the answer that bans it", round, victim)
		}
		by.change(t, nil)
		moving.Wait()
	}
	stop.Store(true)
	group.Wait()
	total := int64(0)
	for w := range banned {
		total += banned[w].Load()
	}
	if total == 0 {
		t.Error("nobody was ever refused")
	}
	b.equal()
}

// waitFor waits for ok, and gives up with the test: it may run on any goroutine.
func waitFor(t *testing.T, stop *atomic.Bool, ok func() bool) {
	for deadline := time.Now().Add(20 * time.Second); !ok() && !stop.Load() && !t.Failed(); {
		if time.Now().After(deadline) {
			t.Error("waited 20 s in vain")
		}
		<-time.After(time.Millisecond)
	}
}

// TestStateIsWholeAfterDeath: an owner dies with a change of the state on its way.
// Afterwards both nodes hold the same value, old or new, and the doors know it.
func TestStateIsWholeAfterDeath(t *testing.T) {
	for _, first := range []NodeID{1, 2} {
		t.Run(fmt.Sprintf("node %d first", first), func(t *testing.T) {
			b := newBench(t)
			dir := t.TempDir()
			paths := map[NodeID]string{1: filepath.Join(dir, "a"), 2: filepath.Join(dir, "b")}
			a, c := b.startOn(1, paths[1], true), b.startOn(2, paths[2], true)
			b.create(4<<20, 1)
			b.inSync(1, 2)
			old, next := pattern(1, 50<<10), pattern(2, 60<<10)
			id := newDoor(t, a).change(t, old)
			b.court.reach(1, false) // it cannot go on alone
			b.stop(2, c)
			done := make(chan error, 1)
			go func() { done <- a.do(&Request{Op: OpState, State: id, Data: next}) }()
			eventually(t, "the change in the owner's log", func() bool {
				return parseState(a.Volume(1).copy().Meta().State).id != id
			})
			b.stop(1, a)
			if err := <-done; err == nil {
				t.Fatal("W4: a change of the state was answered that one node has")
			}
			b.court.reach(1, true)
			want := next
			n := b.startOn(first, paths[first], false)
			if first == 2 {
				want = old
				b.inSync(2) // it goes on alone, and the other one is filled again (Y)
			}
			m := b.startOn(3-first, paths[3-first], false)
			b.inSync(1, 2)
			for _, n := range []*testNode{n, m} {
				d := newDoor(t, n)
				r := &Request{Op: OpReadState}
				if err := n.do(r); err != nil || !bytes.Equal(r.Value, want) {
					t.Fatalf("node %d: state %v of %d bytes, %v", n.self, r.State, len(r.Value), err)
				}
				eventually(t, "the door", func() bool { return bytes.Equal(d.now.Load().value, want) })
			}
			b.equal()
		})
	}
}

// TestAtomic: readers through both nodes see an atomic write whole or not at all.
func TestAtomic(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(4 << 20)
	const length, off = 384 << 10, 512 * 5
	var stop atomic.Bool
	var group sync.WaitGroup
	fill := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 1, 2}, length/4) }
	if err := a.do(&Request{Op: OpWrite, Off: off, Len: length, Data: fill(0), Atomic: true}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*testNode{a, c} {
		group.Go(func() {
			for !stop.Load() {
				got := make([]byte, length)
				if !n.Volume(1).TryRead(off, got) {
					if err := n.do(&Request{Op: OpRead, Off: off, Len: length, Data: got}); err != nil {
						continue // a slow machine may take a replica for dead
					}
				}
				<-time.After(time.Millisecond)
				if i := int(got[0]) | int(got[1])<<8; !bytes.Equal(got, fill(i)) {
					t.Error("ATOMIC: a reader saw a part of a write")
					return
				}
			}
		})
	}
	for i := range 60 {
		n := []*testNode{a, c}[i%2]
		before := a.Volume(1).Status()
		if err := n.do(&Request{Op: OpWrite, Off: off, Len: length, Data: fill(i), Atomic: true}); err != nil {
			t.Logf("write %d: %v", i, err)
			continue
		}
		after := a.Volume(1).Status()
		if ops := after.Sequence - before.Sequence; ops != 1 && after.Epoch == before.Epoch {
			t.Fatalf("an atomic write took %d operations of the log", ops)
		}
	}
	stop.Store(true)
	group.Wait()
}
