package replication

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// peer is another data node: the link that we dialled to it and what its
// beacons' answers say of it.
type peer struct {
	node    *Node
	id      NodeID
	link    atomic.Pointer[link] // nil while down
	room    atomic.Int64         // free room of its pool as last reported, less what was sent since, bytes
	inc     atomic.Uint64        // its incarnation as last greeted
	clock   atomic.Int64         // its own clock in its newest beacon
	quit    chan struct{}
	nonce   uint64 // ticker goroutine's
	echoed  atomic.Uint64
	version atomic.Uint32 // the wire version that both speak
	refuse  atomic.Bool   // an event about refused versions was raised

	stood    atomic.Pointer[map[lsfs.VolumeID]wire.Position] // where its replicas stood when it greeted
	slow     atomic.Bool                                     // it says that a device of it is slow
	micros   [2]atomic.Uint32                                // what its devices take now, by class; 0: not known
	trips    atomic.Int64                                    // beacons answered since the last look, and their time
	tripTime atomic.Int64                                    // in nanoseconds
}

func newPeer(n *Node, id NodeID) *peer {
	p := &peer{node: n, id: id, quit: make(chan struct{})}
	p.room.Store(math.MaxInt64)
	return p
}

func (p *peer) stop() {
	close(p.quit)
	if l := p.link.Load(); l != nil {
		l.fail(net.ErrClosed)
	}
}

// run keeps a link to the peer up. A refused connection proves that the peer's
// process is gone (L5): its listener lives exactly as long as it does.
func (p *peer) run() {
	n := p.node
	ctx, cancel := context.WithCancel(n.ctx)
	defer cancel()
	n.spawn(func() {
		select {
		case <-p.quit:
			cancel()
		case <-ctx.Done():
		}
	})
	wait := 20 * time.Millisecond
	for ctx.Err() == nil {
		started := time.Now()
		err := p.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, syscall.ECONNREFUSED) || mutant("L5") && err != nil {
			now := n.now()
			for _, v := range *n.volumes.Load() {
				v.event(func(g *reign) { g.died(now, p.id) })
			}
		}
		if time.Since(started) > time.Second {
			wait = 20 * time.Millisecond
			continue // it was up: try again at once, it tells death from a broken cable
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(wait*2, 500*time.Millisecond)
	}
}

// serve dials, greets, resumes the streams of our volumes and reads until the link ends.
func (p *peer) serve(ctx context.Context) error {
	n := p.node
	dial, cancel := context.WithTimeout(ctx, 3*time.Second)
	c, err := n.cfg.Transport.Dial(dial, p.id)
	cancel()
	if err != nil {
		return err
	}
	l := newLink(n, p.id, c, true)
	defer l.fail(net.ErrClosed)
	n.spawn(l.writer)
	n.spawn(func() { // a link must not outlive the node
		select {
		case <-ctx.Done():
			l.fail(net.ErrClosed)
		case <-l.closed:
		}
	})
	hello := wire.Greeting{MinVersion: wire.MinVersion, Version: wire.Version, Node: uint32(n.self), Incarnation: uint64(n.cfg.Incarnation)}
	l.lock()
	l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Hello}, wire.AppendGreeting(nil, &hello), nil)
	l.unlock()
	l.flush()
	greeted := false
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	err = l.read(func(h wire.Header, meta, data []byte) error {
		if greeted {
			return p.handle(l, h, meta, data)
		}
		greeted = true
		if h.Type != wire.HelloAck {
			return fmt.Errorf("%w: type %d before the greeting", wire.ErrFrame, h.Type)
		}
		g, err := wire.DecodeGreeting(meta)
		if err != nil {
			return err
		}
		if g.MinVersion > wire.Version || g.Version < wire.MinVersion {
			if !p.refuse.Swap(true) {
				n.cfg.Event(levelError, "peer-version", fmt.Sprintf("node %d speaks wire versions %d to %d, this node %d to %d: upgrade the older one",
					p.id, g.MinVersion, g.Version, wire.MinVersion, wire.Version))
			}
			return fmt.Errorf("no common wire version with node %d", p.id)
		}
		if NodeID(g.Node) != p.id {
			return fmt.Errorf("%w: node %d answers as node %d", wire.ErrFrame, p.id, g.Node)
		}
		c.SetReadDeadline(time.Time{})
		p.up(l, &g)
		return nil
	}, n.afterBatch)
	p.down(l, err)
	return err
}

// afterBatch starts what a batch of frames queued and sends the answers.
func (n *Node) afterBatch() {
	n.flushPeers()
	n.pool.Kick()
	n.flush()
}

func (p *peer) up(l *link, g *wire.Greeting) {
	n := p.node
	p.inc.Store(g.Incarnation)
	p.version.Store(uint32(min(g.Version, wire.Version)))
	p.echoed.Store(0)
	p.link.Store(l)
	n.log.Info("link up", "peer", p.id, "incarnation", g.Incarnation)
	at := map[lsfs.VolumeID]wire.Position{}
	for _, pos := range g.Replicas {
		at[lsfs.VolumeID(pos.Volume)] = pos
	}
	p.stood.Store(&at)
	now := n.now()
	for _, v := range *n.volumes.Load() {
		v.event(func(g *reign) { g.alive(now, p.id) })
		pos, here := at[v.id]
		v.linkUp(p, l, pos, here)
	}
	n.forwardsDrained(l)
	l.flush()
}

func (p *peer) down(l *link, err error) {
	if !p.link.CompareAndSwap(l, nil) {
		return
	}
	p.room.Store(math.MaxInt64) // what it has counts again when it is back
	p.node.log.Warn("link down", "peer", p.id, "err", err)
	for _, v := range *p.node.volumes.Load() {
		v.linkDown(p)
	}
}

// handle takes a frame that came back on the link we dialled.
func (p *peer) handle(l *link, h wire.Header, meta, data []byte) error {
	n := p.node
	switch h.Type {
	case wire.Ack:
		if v := n.Volume(lsfs.VolumeID(h.Volume)); v != nil {
			v.acknowledged(p.id, lsfs.Epoch(h.Epoch), lsfs.Seq(h.Seq))
		}
	case wire.BeaconAck:
		return p.granted(l, meta)
	case wire.Reply:
		l.answer(h, meta, data)
	case wire.ForwardReply:
		return n.forwardDone(p, h, meta, data)
	case wire.Need:
		index, err := wire.DecodeNeed(meta)
		if err != nil {
			return err
		}
		if v := n.Volume(lsfs.VolumeID(h.Volume)); v != nil {
			n.spawn(func() { v.sendContent(l, h, index) })
		}
	case wire.Gap:
		if v := n.Volume(lsfs.VolumeID(h.Volume)); v != nil {
			v.gap(p, l, lsfs.Seq(h.Seq))
		}
	case wire.Stale:
		if v := n.Volume(lsfs.VolumeID(h.Volume)); v != nil {
			n.spawn(v.reread)
		}
	default:
		return fmt.Errorf("%w: type %d as an answer", wire.ErrFrame, h.Type)
	}
	return nil
}

// sendBeacons asks every peer for the leases of the volumes that we own (L1).
func (n *Node) sendBeacons() {
	var b wire.BeaconBody
	for _, v := range *n.volumes.Load() {
		if epoch, owner := v.reigns(); owner {
			b.Leases = append(b.Leases, wire.Lease{Volume: uint64(v.id), Epoch: epoch})
		}
	}
	for _, p := range *n.peers.Load() {
		l := p.link.Load()
		if l == nil {
			continue
		}
		p.nonce++
		b.Nonce, b.Echo, b.Room = p.nonce, p.echoed.Load(), n.freeRoom()
		b.Sent = int64(n.now())
		b.Paced, b.Pace = p.version.Load() >= paceSince, n.ownPace()
		l.lock()
		l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Beacon}, wire.AppendBeacon(nil, &b), nil)
		l.unlock()
	}
}

// granted takes the answer to a beacon.
func (p *peer) granted(l *link, meta []byte) error {
	b := &l.scratch.beacon
	if err := wire.DecodeBeacon(meta, b); err != nil {
		return err
	}
	p.room.Store(int64(min(b.Room, math.MaxInt64)))
	p.echoed.Store(max(p.echoed.Load(), b.Nonce))
	p.paced(b)
	now := p.node.now()
	p.tripTime.Add(max(int64(now)-b.Sent, 0))
	p.trips.Add(1)
	for _, g := range b.Leases {
		if v := p.node.Volume(lsfs.VolumeID(g.Volume)); v != nil {
			v.granted(now, p.id, Instant(b.Sent))
		}
	}
	return nil
}

// paceSince is the first wire version whose beacons say how fast devices are.
const paceSince = 4

// echoWindow is how many beacons may be unanswered before a peer counts as one
// that does not hear us (L3): 2 s of them.
const echoWindow = 10

// grant answers a beacon of the node at the other end of an inbound link.
func (n *Node) grant(l *link, meta []byte) error {
	b, answer := &l.scratch.beacon, &l.scratch.answer
	if err := wire.DecodeBeacon(meta, b); err != nil {
		return err
	}
	now := n.now()
	fresh := b.Nonce <= b.Echo+echoWindow
	if p := (*n.peers.Load())[l.peer]; p != nil {
		p.clock.Store(b.Sent)
		p.paced(b)
	}
	answer.Paced, answer.Pace = b.Paced, n.ownPace()
	answer.Nonce, answer.Sent, answer.Room = b.Nonce, b.Sent, n.freeRoom()
	answer.Leases = answer.Leases[:0]
	if !n.failed.Load() {
		for _, lease := range b.Leases {
			if v := n.Volume(lsfs.VolumeID(lease.Volume)); v != nil && v.grant(now, l.peer, lease.Epoch, fresh) {
				answer.Leases = append(answer.Leases, lease)
			}
		}
	}
	l.lock()
	l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.BeaconAck}, wire.AppendBeacon(nil, answer), nil)
	l.unlock()
	return nil
}

// Accept serves a connection that peer opened to this node's data path, until it ends.
// It takes the connection.
func (n *Node) Accept(from NodeID, c net.Conn) {
	l := newLink(n, from, c, false)
	n.group.Add(1)
	defer n.group.Done()
	defer close(l.drained)
	older, ok := n.addInbound(l)
	if !ok {
		c.Close()
		return
	}
	for _, o := range older {
		<-o.drained
	}
	n.spawn(l.writer)
	greeted := false
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	err := l.read(func(h wire.Header, meta, data []byte) error {
		if !greeted {
			if h.Type != wire.Hello {
				return fmt.Errorf("%w: type %d before the greeting", wire.ErrFrame, h.Type)
			}
			g, err := wire.DecodeGreeting(meta)
			if err != nil {
				return err
			}
			if NodeID(g.Node) != from {
				return fmt.Errorf("%w: node %d greets as node %d", wire.ErrFrame, from, g.Node)
			}
			greeted = true
			c.SetReadDeadline(time.Time{})
			return n.greet(l)
		}
		return n.serveFrame(l, h, meta, data)
	}, n.afterBatch)
	l.fail(err)
	n.removeInbound(l)
	n.log.Warn("inbound link ended", "peer", from, "err", err)
}

// greet answers a Hello with where our replicas stand.
func (n *Node) greet(l *link) error {
	g := wire.Greeting{MinVersion: wire.MinVersion, Version: wire.Version, Node: uint32(n.self), Incarnation: uint64(n.cfg.Incarnation)}
	for _, v := range *n.volumes.Load() {
		if pos, ok := v.position(l); ok {
			pos.EpochLog = nil // asked for by Promise when it matters
			g.Replicas = append(g.Replicas, pos)
		}
	}
	l.lock()
	l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.HelloAck}, wire.AppendGreeting(nil, &g), nil)
	l.unlock()
	return nil
}

// serveFrame takes a frame from the node that dialled us.
func (n *Node) serveFrame(l *link, h wire.Header, meta, data []byte) error {
	switch h.Type {
	case wire.Prepare:
		if v := n.Volume(lsfs.VolumeID(h.Volume)); v != nil {
			return v.prepare(l, h, meta, data)
		}
		return nil // not known here yet: the owner resends when we greet again or ask
	case wire.Content:
		if v := n.Volume(lsfs.VolumeID(h.Volume)); v != nil {
			return v.content(l, h, meta, data)
		}
	case wire.Beacon:
		return n.grant(l, meta)
	case wire.Forward:
		return n.serveForward(l, h, meta, data)
	case wire.Call:
		return n.serveCall(l, h, meta, data)
	default:
		return fmt.Errorf("%w: type %d as a request", wire.ErrFrame, h.Type)
	}
	return nil
}
