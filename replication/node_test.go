package replication

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// court is the raft group of the tests: one register per volume, decided at
// once, seen by every node that is up.
type court struct {
	mu      sync.Mutex
	records map[lsfs.VolumeID]Record
	notify  map[NodeID]chan struct{}
	cut     map[NodeID]bool // nodes without a quorum
}

// reach says whether a node reaches the court, as it does at first.
func (c *court) reach(n NodeID, yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut[n] = !yes
}

func (c *court) propose(by NodeID, ch Change) (Record, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut[by] {
		return Record{}, ErrOutcomeUnknown
	}
	rec := c.records[ch.Volume]
	if rec.Epoch != ch.Expect || !slices.Contains(ch.InSync, ch.Owner) || !rec.Has(ch.Owner) {
		return rec, ErrConflict
	}
	if ch.Owner != rec.Owner && slices.Contains(ch.InSync, rec.Owner) && ch.By != rec.Owner {
		return rec, ErrConflict
	}
	for _, n := range ch.InSync {
		if !rec.Has(n) && n != ch.Grow {
			return rec, ErrConflict
		}
	}
	rec.Epoch++
	rec.Owner, rec.InSync = ch.Owner, slices.Clone(ch.InSync)
	c.records[ch.Volume] = rec
	for _, n := range c.notify {
		select {
		case n <- struct{}{}:
		default:
		}
	}
	return rec, nil
}

type seat struct {
	c  *court
	by NodeID
}

func (s seat) Propose(_ context.Context, ch Change) (Record, error) { return s.c.propose(s.by, ch) }

func (s seat) Record(_ context.Context, v lsfs.VolumeID) (Record, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.c.records[v], nil
}

// bench is a small cluster in one process: real stores on files, real TCP on
// loopback, the tests' court instead of raft.
type bench struct {
	t      testing.TB
	tls    *tls.Config // nil: nodes talk in the clear
	court  *court
	mu     sync.Mutex
	addrs  map[NodeID]string
	nodes  map[NodeID]*testNode
	key    dedup.Key
	inc    Incarnation
	timing Timing
	// members are the nodes of the cluster, whether they run or not.
	members []NodeID
	wrap    func(NodeID, Pool) Pool            // what a node's pool is made of, or nil
	events  map[NodeID][]string                // codes
	told    func(id NodeID, code, text string) // is called with each event, or nil
	// wire is put on each connection that a node dials, or nil.
	wire func(from NodeID, c net.Conn) net.Conn
	// memory are the listeners of nodes that talk inside of the process; nil: by TCP.
	memory map[NodeID]*memoryListener
	clock  func() Instant // nil: the system's
}

// eventsOf lists the codes of the events of a node.
func (b *bench) eventsOf(id NodeID) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.events[id], " ")
}

type testNode struct {
	*Node
	store    *lsfs.Store
	faults   *faulty
	listener net.Listener
	quit     chan struct{}
	done     sync.WaitGroup
	dropped  chan string
}

var quick = Timing{
	Beacon: 20 * time.Millisecond, Lease: slowdown * 400 * time.Millisecond, Grace: slowdown * 460 * time.Millisecond,
	HeadStart: slowdown * 200 * time.Millisecond, Evict: slowdown * 400 * time.Millisecond, Stall: slowdown * time.Second,
	BootWait: slowdown * 600 * time.Millisecond, Retry: 50 * time.Millisecond,
	Drop: 2 * time.Second, Hold: 10 * time.Second, Pause: 5 * time.Second, Late: 5 * time.Second, Fresh: 2 * time.Second,
}

func newBench(t testing.TB) *bench {
	return &bench{t: t, timing: quick, members: []NodeID{1, 2}, addrs: map[NodeID]string{}, nodes: map[NodeID]*testNode{}, events: map[NodeID][]string{},
		court: &court{records: map[lsfs.VolumeID]Record{}, notify: map[NodeID]chan struct{}{}, cut: map[NodeID]bool{}}}
}

type tcp struct {
	b  *bench
	me NodeID
}

func (d tcp) Dial(ctx context.Context, n NodeID) (net.Conn, error) {
	d.b.mu.Lock()
	addr, memory := d.b.addrs[n], d.b.memory[n]
	d.b.mu.Unlock()
	if addr == "" {
		return nil, errors.New("no such node yet")
	}
	var c net.Conn
	var err error
	if memory != nil {
		c, err = memory.dial()
	} else {
		c, err = (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}
	if err != nil {
		return nil, err
	}
	if d.b.wire != nil {
		c = d.b.wire(d.me, c)
	}
	if d.b.tls != nil {
		c = tls.Client(Records(c), d.b.tls)
	}
	if _, err := c.Write([]byte{byte(d.me)}); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (b *bench) start(id NodeID) *testNode {
	b.t.Helper()
	dir := b.t.TempDir()
	return b.startOn(id, filepath.Join(dir, "device"), true)
}

func (b *bench) startOn(id NodeID, path string, format bool) *testNode {
	b.t.Helper()
	ctx := b.t.Context()
	if format {
		if err := lsfs.Format(ctx, lsfs.FormatConfig{Devices: []string{path}, Sizes: []int64{256 << 20}}); err != nil {
			b.t.Fatal(err)
		}
	}
	return b.startWith(id, lsfs.Config{Devices: []string{path}})
}

// startWith starts a node on a pool that is formatted.
func (b *bench) startWith(id NodeID, c lsfs.Config) *testNode {
	b.t.Helper()
	c.Key, c.L1Bytes, c.MetadataBytes, c.IndexBytes, c.Logger = b.key, 16<<20, 32<<20, 4<<20, slog.New(slog.DiscardHandler)
	store, err := lsfs.Open(b.t.Context(), c)
	if err != nil {
		b.t.Fatal(err)
	}
	var ln net.Listener
	if b.memory != nil {
		m := &memoryListener{make(chan net.Conn), make(chan struct{})}
		b.mu.Lock()
		b.memory[id] = m
		b.mu.Unlock()
		ln = m
	} else if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		b.t.Fatal(err)
	}
	b.mu.Lock()
	b.inc++
	inc := b.inc
	b.addrs[id] = ln.Addr().String()
	b.mu.Unlock()
	n := &testNode{store: store, faults: &faulty{Pool: Local(store)}, listener: ln, quit: make(chan struct{}), dropped: make(chan string, 100)}
	if b.wrap != nil {
		n.faults.Pool = b.wrap(id, n.faults.Pool)
	}
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(b.t.Output(), nil)).With("node", id)
	}
	n.Node = NewNode(Config{
		Self: id, Incarnation: inc, Pool: n.faults, Key: b.key, Control: seat{b.court, id}, Transport: tcp{b, id}, Logger: log, Timing: b.timing, Clock: b.clock,
		Event: func(_ slog.Level, code, text string) {
			if b.told != nil {
				b.told(id, code, text)
			}
			b.mu.Lock()
			b.events[id] = append(b.events[id], code)
			b.mu.Unlock()
		},
		Flush: func() {},
		DropSessions: func(_ lsfs.VolumeID, reason string) {
			select {
			case n.dropped <- reason:
			default:
			}
		},
		Fatal: func(err error) { b.t.Errorf("node %d: store failed: %v", id, err) },
	})
	changed := make(chan struct{}, 1)
	changed <- struct{}{}
	b.court.mu.Lock()
	b.court.notify[id] = changed
	b.court.mu.Unlock()
	n.done.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			n.done.Go(func() {
				if b.tls != nil {
					c = tls.Server(Records(c), b.tls)
				}
				var from [1]byte
				if _, err := c.Read(from[:]); err != nil {
					c.Close()
					return
				}
				n.Accept(NodeID(from[0]), c)
			})
		}
	})
	n.done.Go(func() {
		for {
			select {
			case <-changed:
			case <-n.quit:
				return
			}
			b.court.mu.Lock()
			var recs []Record
			for _, r := range b.court.records {
				recs = append(recs, r)
			}
			b.court.mu.Unlock()
			n.Update(recs, b.members)
		}
	})
	b.mu.Lock()
	b.nodes[id] = n
	b.mu.Unlock()
	b.t.Cleanup(func() { b.stop(id, n) })
	return n
}

// faulty is a pool that says of one unmap that it had no room.
type faulty struct {
	Pool
	full   atomic.Bool
	sealed atomic.Bool // no room for copies of shared metadata
}

func (f *faulty) Copy(id lsfs.VolumeID) Copy {
	if c := f.Pool.Copy(id); c != nil {
		return sealedCopy{c, f}
	}
	return nil
}

func (f *faulty) CreateCopy(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica ReplicaID) (Copy, error) {
	c, err := f.Pool.CreateCopy(ctx, id, blocks, replica)
	if err != nil {
		return nil, err
	}
	return sealedCopy{c, f}, nil
}

type sealedCopy struct {
	Copy
	f *faulty
}

func (c sealedCopy) AdmitUnmap(start lsfs.BlockNo, count uint32) bool {
	return c.Copy.AdmitUnmap(start, count) && !(c.f.sealed.Load() && count < 512)
}

func (f *faulty) Append(op *lsfs.Op) {
	if op.Kind == lsfs.OpUnmap && f.full.Swap(false) {
		done := op.Done
		op.Done = func(op *lsfs.Op, _ error) { done(op, lsfs.ErrNoSpace) }
	}
	f.Pool.Append(op)
}

// stop ends a node as a dying process does: its listener is gone.
func (b *bench) stop(id NodeID, n *testNode) {
	b.mu.Lock()
	if b.nodes[id] != n {
		b.mu.Unlock()
		return
	}
	delete(b.nodes, id)
	b.mu.Unlock()
	b.court.mu.Lock()
	delete(b.court.notify, id)
	b.court.mu.Unlock()
	n.listener.Close()
	close(n.quit)
	n.Close()
	n.done.Wait()
	if err := n.store.Close(); err != nil {
		b.t.Error(err)
	}
}

// pair starts two nodes with one volume, owned by the first and in sync on both.
func (b *bench) pair(size uint64) (a, c *testNode) {
	a, c = b.start(1), b.start(2)
	b.create(size, 1)
	b.inSync(1, 2)
	return a, c
}

// create records a volume as the cluster does: in sync at its owner alone.
func (b *bench) create(size uint64, owner NodeID) { b.createAs(1, size, owner) }

func (b *bench) createAs(id VolumeID, size uint64, owner NodeID) {
	b.court.mu.Lock()
	b.court.records[id] = Record{Volume: id, SizeBytes: size, Epoch: 1, Owner: owner, InSync: []NodeID{owner},
		Replicas: []Replica{{1, ReplicaID{1}}, {2, ReplicaID{2}}}, Dedup: true, Compress: true}
	for _, n := range b.court.notify {
		select {
		case n <- struct{}{}:
		default:
		}
	}
	b.court.mu.Unlock()
}

func (b *bench) record() Record { return b.recordOf(1) }

func (b *bench) recordOf(id VolumeID) Record {
	b.court.mu.Lock()
	defer b.court.mu.Unlock()
	return b.court.records[id]
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come true in 20 s", what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

func (b *bench) inSync(nodes ...NodeID) {
	b.t.Helper()
	b.inSyncAs(1, nodes...)
}

func (b *bench) inSyncAs(id VolumeID, nodes ...NodeID) {
	b.t.Helper()
	eventually(b.t, fmt.Sprintf("in sync: %v", nodes), func() bool {
		r := b.recordOf(id)
		return len(r.InSync) == len(nodes) && !slices.ContainsFunc(nodes, func(n NodeID) bool { return !r.Has(n) })
	})
}

// do runs a request through a node and waits for it.
func (n *testNode) do(r *Request) error { return n.on(1, r) }

// on is do for another volume than 1.
func (n *testNode) on(id VolumeID, r *Request) error {
	var v *Volume
	for v == nil {
		v = n.Volume(id)
		if v == nil {
			<-time.After(time.Millisecond)
		}
	}
	done := make(chan struct{})
	r.Done = func(*Request) { close(done) }
	v.Submit(r)
	n.Kick()
	<-done
	return r.Err
}

// serve is do for what an initiator repeats while no owner answers.
func (n *testNode) serve(t *testing.T, r Request) {
	t.Helper()
	eventually(t, fmt.Sprintf("request %d at %d", r.Op, r.Off), func() bool {
		again := r
		err := n.do(&again)
		if err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrUnavailable) {
			t.Fatalf("request %d at %d: %v", r.Op, r.Off, err)
		}
		return err == nil
	})
}

func (n *testNode) write(t *testing.T, off uint64, data []byte) {
	t.Helper()
	n.serve(t, Request{Op: OpWrite, Off: off, Len: uint64(len(data)), Data: data})
}

func (n *testNode) read(t *testing.T, off uint64, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	if n.Volume(1) != nil && n.Volume(1).TryRead(off, data) {
		return data
	}
	n.serve(t, Request{Op: OpRead, Off: off, Len: uint64(size), Data: data})
	return data
}

// TestAgainstModel runs every operation through both nodes against a plain
// array, and then compares the copies.
func TestAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 7))
	b := newBench(t)
	const size = 4 << 20
	a, c := b.pair(size)
	model := make([]byte, size)
	pool := make([][]byte, 8)
	for i := range pool {
		pool[i] = make([]byte, 64<<10)
		for j := range pool[i] {
			pool[i][j] = byte(r.Uint32()) >> (i % 5)
		}
	}
	for i := range 600 {
		n := []*testNode{a, c}[r.IntN(2)]
		off := r.Uint64N(size/512) * 512
		length := min((1+r.Uint64N(100))*512, size-off)
		if r.IntN(2) == 0 {
			off, length = off&^4095, (length+4095)&^4095
			length = min(length, size-off)
		}
		switch r.IntN(8) {
		case 0, 1:
			data := bytes.Clone(pool[r.IntN(len(pool))][:length])
			if err := n.do(&Request{Op: OpWrite, Off: off, Len: length, Data: data, Atomic: r.IntN(2) == 0}); err != nil {
				t.Fatal(err)
			}
			copy(model[off:], data)
		case 6:
			data := bytes.Clone(pool[r.IntN(len(pool))][:length])
			if err := n.do(&Request{Op: OpOrWrite, Off: off, Len: length, Data: data}); err != nil {
				t.Fatal(err)
			}
			for i := range data {
				model[off+uint64(i)] |= data[i]
			}
		case 7:
			req := &Request{Op: OpExtents, Off: off, Len: size - off, Extents: make([]Extent, 0, 1+r.IntN(20))}
			if err := n.do(req); err != nil {
				t.Fatal(err)
			}
			at := off
			for i, x := range req.Extents {
				if x.Bytes == 0 || !x.Mapped && !bytes.Equal(model[at:at+x.Bytes], make([]byte, x.Bytes)) {
					t.Fatalf("operation %d: %v at %d is not a hole", i, x, at)
				}
				if (at+x.Bytes)%4096 != 0 {
					t.Fatalf("extent of %d bytes at %d ends inside a block", x.Bytes, at)
				}
				at += x.Bytes
			}
			if len(req.Extents) == 0 || at > size || len(req.Extents) < cap(req.Extents) && at != size {
				t.Fatalf("extents of %d to %d end at %d", off, size, at)
			}
		case 2:
			if err := n.do(&Request{Op: OpUnmap, Off: off, Len: length}); err != nil {
				t.Fatal(err)
			}
			clear(model[off : off+length])
		case 3:
			pattern := pool[r.IntN(len(pool))][:512]
			if err := n.do(&Request{Op: OpWriteSame, Off: off, Len: length, Data: bytes.Clone(pattern)}); err != nil {
				t.Fatal(err)
			}
			copy(model[off:off+length], bytes.Repeat(pattern, int(length/512)))
		case 4:
			data := slices.Concat(model[off:off+512], pool[r.IntN(len(pool))][:512])
			want := error(nil)
			if r.IntN(2) == 0 {
				data[100] ^= 1
				want = ErrMiscompare
			}
			req := &Request{Op: OpCompareAndWrite, Off: off, Len: 512, Data: data}
			if err := n.do(req); err != want || want != nil && req.Miscompare != 100 {
				t.Fatalf("operation %d: compare and write: %v at %d, want %v", i, err, req.Miscompare, want)
			}
			if want == nil {
				copy(model[off:], data[512:])
			}
		case 5:
			if got := n.read(t, off, int(length)); !bytes.Equal(got, model[off:off+length]) {
				t.Fatalf("operation %d: read at %d differs", i, off)
			}
		}
	}
	for _, n := range []*testNode{a, c} {
		if !bytes.Equal(n.read(t, 0, size), model) {
			t.Error("the volume differs from the model")
		}
	}
	b.equal()
}

// equal compares the copies of all in-sync replicas. A machine that is busy may
// take an owner for dead, so whoever owns the volume by now does it.
func (b *bench) equal() {
	b.t.Helper()
	b.equalAs(1)
}

func (b *bench) equalAs(id VolumeID) {
	b.t.Helper()
	var owner *testNode
	eventually(b.t, "the owner's view", func() bool {
		owner = b.nodes[b.recordOf(id).Owner]
		if owner == nil || owner.Volume(id) == nil {
			return false
		}
		s := owner.Volume(id).Status()
		return s.Role == Active && s.Epoch == b.recordOf(id).Epoch
	})
	res, err := owner.Volume(id).Check(b.t.Context(), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, r := range res.Replicas {
		if !r.Equal || r.Err != nil {
			b.t.Errorf("volume %d, replica on node %d: different chunks %v, state differs: %v, %v", id, r.Node, r.Different, r.State, r.Err)
		}
	}
	if r := b.recordOf(id); len(res.Replicas) != len(r.InSync)-1 {
		b.t.Errorf("%d replicas compared, in sync are %v", len(res.Replicas), r.InSync)
	}
}

func pattern(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 3))
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// TestTakeOverAndReturn: the owner dies, the other takes over with everything
// acknowledged, the dead one comes back and receives what changed and no more.
func TestTakeOverAndReturn(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "device")
	a := b.startOn(1, path, true)
	c := b.start(2)
	const size = 32 << 20
	b.create(size, 1)
	b.inSync(1, 2)
	first := pattern(1, 8<<20)
	a.write(t, 0, first[:4<<20])
	c.write(t, 4<<20, first[4<<20:])
	b.stop(1, a)
	second := pattern(2, 1<<20)
	c.write(t, 2<<20, second) // waits for the take-over
	copy(first[2<<20:], second)
	if got := c.read(t, 0, len(first)); !bytes.Equal(got, first) {
		t.Fatal("the new owner lost acknowledged data")
	}
	if r := b.record(); r.Owner != 2 || !slices.Equal(r.InSync, []NodeID{2}) {
		t.Fatalf("record %+v", r)
	}
	a = b.startOn(1, path, false)
	var sent int64
	eventually(t, "resync", func() bool {
		for _, s := range c.Volume(1).Status().Replicas {
			sent = max(sent, s.SentBytes)
		}
		r := b.record()
		return r.Has(1)
	})
	if sent > 3<<20 {
		t.Errorf("the resync of 1 MiB sent %d bytes", sent)
	}
	b.equal()
	if got := a.read(t, 0, len(first)); !bytes.Equal(got, first) {
		t.Error("the returned node's path shows other data")
	}
}

// TestReplicaDeath: the owner goes on alone only after the record says so.
func TestReplicaDeath(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(8 << 20)
	b.court.reach(1, false) // no quorum for the owner
	b.stop(2, c)
	done := make(chan error, 1)
	go func() {
		done <- a.do(&Request{Op: OpWrite, Len: 4096, Data: pattern(1, 4096)})
	}()
	select {
	case err := <-done:
		t.Fatalf("M1: a degraded write was answered (%v) before the record allowed it", err)
	case <-time.After(700 * time.Millisecond):
	}
	b.court.reach(1, true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	b.inSync(1)
}

// TestFullReplica: a replica whose pool has no room although the owner's has is
// struck and filled again; neither node ends.
func TestFullReplica(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(4 << 20)
	a.write(t, 0, pattern(1, 64<<10))
	epoch := b.record().Epoch
	c.faults.full.Store(true)
	if err := c.do(&Request{Op: OpUnmap, Off: 4096, Len: 8192}); err != nil {
		t.Fatal(err)
	}
	if r := b.record(); r.Epoch == epoch {
		t.Errorf("answered with the set %v that has not got it", r.InSync)
	}
	b.inSync(1, 2)
	if got := c.read(t, 4096, 8192); !bytes.Equal(got, make([]byte, 8192)) {
		t.Error("not unmapped")
	}
	b.equal()
}

// TestLockRace: two nodes race COMPARE AND WRITE on one sector; every success is
// one increment.
func TestLockRace(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(4 << 20)
	sector := func(i int) []byte {
		s := make([]byte, 512)
		s[0], s[1] = byte(i), byte(i>>8)
		return s
	}
	var group sync.WaitGroup
	for _, n := range []*testNode{a, c, a, c} {
		group.Go(func() {
			for range 50 {
				for i := 0; ; i++ {
					cur := make([]byte, 512)
					if err := n.do(&Request{Op: OpRead, Off: 512, Len: 512, Data: cur}); err != nil {
						t.Error(err)
						return
					}
					v := int(cur[0]) | int(cur[1])<<8
					err := n.do(&Request{Op: OpCompareAndWrite, Off: 512, Len: 512, Data: slices.Concat(sector(v), sector(v+1))})
					if err == nil {
						break
					}
					if err != ErrMiscompare {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	group.Wait()
	if got := c.read(t, 512, 512); !bytes.Equal(got, sector(200)) {
		t.Errorf("counter %d after 200 successful increments", int(got[0])|int(got[1])<<8)
	}
}

// TestRestartOfEverything: both stop, both come back, nothing acknowledged is
// missing, and no full resync is needed.
func TestRestartOfEverything(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	a, c := b.startOn(1, filepath.Join(dir, "a"), true), b.startOn(2, filepath.Join(dir, "b"), true)
	b.create(16<<20, 1)
	b.inSync(1, 2)
	data := pattern(5, 2<<20)
	a.write(t, 1<<20, data)
	epoch := b.record().Epoch
	b.stop(2, c)
	b.stop(1, a)
	a, c = b.startOn(1, filepath.Join(dir, "a"), false), b.startOn(2, filepath.Join(dir, "b"), false)
	if got := c.read(t, 1<<20, len(data)); !bytes.Equal(got, data) {
		t.Error("data lost over a restart of all nodes")
	}
	b.inSync(1, 2)
	if b.record().Epoch <= epoch {
		t.Error("M5: the restarted owner serves in its old epoch")
	}
	b.equal()
	_ = a
}
