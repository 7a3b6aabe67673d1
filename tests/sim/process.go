package sim

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// process is one life of a node's daemon: from start to kill. A pause (SIGSTOP) freezes
// its clock and stops it at every border: nothing arrives, nothing leaves, no I/O ends.
// What its goroutines do meanwhile counts as done at the instant of the pause.
//
//	starting --quorum--> serving --kill, failed store--> dead
type process struct {
	w     *world
	id    replication.NodeID
	store *store
	node  *replication.Node // nil until serving
	inc   replication.Incarnation

	poison atomic.Bool   // the next flush fails
	ended  chan struct{} // closed by kill
	group  sync.WaitGroup

	mu       sync.Mutex
	dead     bool
	serving  bool
	resume   chan struct{} // not nil while paused
	frozen   replication.Instant
	sessions []*session
	stated   map[lsfs.VolumeID]doorState

	watched map[lsfs.VolumeID]bool // of run
}

// start begins a new life of a node.
func (w *world) start(id replication.NodeID) *process {
	p := &process{w: w, id: id, ended: make(chan struct{}), stated: map[lsfs.VolumeID]doorState{}, watched: map[lsfs.VolumeID]bool{}}
	w.mu.Lock()
	p.store = newStore(w, p, w.disks[id])
	w.procs[id], w.hostUp[id] = p, true
	w.mu.Unlock()
	w.note("start", uint64(id))
	w.court.disturb()
	p.group.Go(p.run)
	return p
}

// processAt is the process of a node, nil when none runs, and whether its host is up.
func (w *world) processAt(id replication.NodeID) (*process, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.procs[id], w.hostUp[id]
}

func (p *process) run() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := context.AfterFunc(ctx, func() {})
	defer stop()
	go func() {
		select {
		case <-p.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	changed := make(chan struct{}, 1)
	c := p.w.court
	s := seat{c, p}
	told := p.w.told(p.id)
	trusting := mutant("B1") && told != nil
	if s.pause(ctx, p.w.courtRandom.between(50*time.Millisecond, 400*time.Millisecond)) != nil || !trusting && c.await(ctx, p) != nil {
		return
	}
	c.mu.Lock()
	c.starts[p.id]++
	p.inc = c.starts[p.id]
	c.subs[p.id] = changed
	c.mu.Unlock()
	records, snaps := c.all(), c.known() // B1: read through a quorum
	if trusting {
		records = told
	}
	if s.pause(ctx, p.w.courtRandom.between(time.Millisecond, 50*time.Millisecond)) != nil {
		return
	}
	node := replication.NewNode(replication.Config{
		Self: p.id, Incarnation: p.inc, Pool: p.store, Key: p.w.key, Control: s, Transport: transport{p}, Logger: p.w.logger(p.id), Timing: p.w.timing,
		Event: func(_ slog.Level, code, text string) { p.w.said(p.id, code, text) }, Flush: func() {},
		DropSessions: func(_ lsfs.VolumeID, reason string) { p.drop(reason) },
		Fatal:        func(error) { go p.w.failed(p) },
		Clock:        p.clock,
	})
	p.mu.Lock()
	if p.dead {
		p.mu.Unlock()
		node.Close()
		return
	}
	p.node, p.serving = node, true
	p.mu.Unlock()
	ids := make([]replication.NodeID, p.w.nodes)
	for i := range ids {
		ids[i] = replication.NodeID(i + 1)
	}
	p.w.tell(p.id, records)
	node.Update(records, ids)
	node.ReconcileSnapshots(snaps)
	p.watch()
	p.w.note("serving", uint64(p.id), uint64(p.inc))
	for {
		select {
		case <-changed:
		case <-time.After(5 * time.Second): // snapshots that no record names may have come meanwhile
			node.ReconcileSnapshots(c.known())
			continue
		case <-ctx.Done():
			return
		}
		if s.pause(ctx, p.w.courtRandom.exp(p.w.follow)) != nil || c.await(ctx, p) != nil {
			return
		}
		records, snaps := c.all(), c.known()
		p.w.tell(p.id, records)
		node.Update(records, ids)
		node.ReconcileSnapshots(snaps)
		p.watch() // what was born
	}
}

// tell notes what a node has learned of the records; told is what its last process knew.
func (w *world) tell(id replication.NodeID, records []replication.Record) {
	w.mu.Lock()
	w.last[id] = records
	w.mu.Unlock()
}

func (w *world) told(id replication.NodeID) []replication.Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last[id]
}

// kill ends the process. With its host down too, nothing tells the others.
func (p *process) kill(hostDown bool) {
	p.w.mu.Lock()
	if p.w.procs[p.id] == p {
		p.w.procs[p.id] = nil
		p.w.hostUp[p.id] = !hostDown
	}
	p.w.mu.Unlock()
	p.mu.Lock()
	if p.dead {
		p.mu.Unlock()
		return
	}
	p.dead = true
	close(p.ended)
	if p.resume != nil {
		close(p.resume)
		p.resume = nil
	}
	sessions, node := p.sessions, p.node
	p.sessions = nil
	p.mu.Unlock()
	p.w.note("kill", uint64(p.id), b2u(hostDown))
	p.store.crash(p.w.storeRandom, hostDown)
	p.w.net.gone(p, hostDown)
	p.w.court.disturb()
	for _, s := range sessions {
		s.die(hostDown)
	}
	p.w.group.Go(func() {
		if node != nil {
			node.Close()
		}
		p.group.Wait()
	})
}

func b2u(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

func (p *process) isDead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

func (p *process) isPaused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resume != nil
}

func (p *process) isServing() (*replication.Node, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.node, p.serving && !p.dead
}

// gate waits while the process is paused.
func (p *process) gate() {
	for {
		p.mu.Lock()
		c := p.resume
		p.mu.Unlock()
		if c == nil {
			return
		}
		<-c
	}
}

func (p *process) pause() bool {
	now := p.clock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead || p.resume != nil {
		return false
	}
	p.frozen, p.resume = now, make(chan struct{})
	return true
}

func (p *process) unpause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.resume != nil {
		close(p.resume)
		p.resume = nil
	}
}

// clock is CLOCK_BOOTTIME of the node: its rate differs from the others'.
func (p *process) clock() replication.Instant {
	p.mu.Lock()
	if p.resume != nil {
		defer p.mu.Unlock()
		return p.frozen
	}
	p.mu.Unlock()
	return replication.Instant(float64(time.Since(p.w.began))*p.w.rates[p.id]) + replication.Instant(p.id)*1e15
}

// accept takes a connection from another node, if the node is that far.
func (p *process) accept(from replication.NodeID, c net.Conn) bool {
	n, ok := p.isServing()
	if ok {
		p.group.Go(func() { n.Accept(from, c) })
	}
	return ok
}
