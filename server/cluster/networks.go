package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

// The nodes talk over one network or two. Replication and the leases live on the
// sync address and nowhere else: when that network is cut the lease dies with it,
// and the quorum decides over the other one who goes on. Raft and the questions of
// other nodes prefer the management address and take the sync address when that
// does not answer (a detour), so that one cut network of two stops nothing. A node
// that tells no management address has both on its sync address.
//
// The listener at the sync address therefore takes every protocol, also because the
// other nodes know a new management address only when its node has told them; the
// one at the management address takes all but data.

const (
	// detourAfter is how long the management address has for itself before the sync
	// address is tried as well: many round trips, a fraction of what raft waits for.
	detourAfter = 300 * time.Millisecond
	// returnEvery is how often a management address that did not answer is tried again.
	returnEvery = 5 * time.Second
)

// between are the addresses at which the other nodes reach a node.
func (a *Addresses) between() []string {
	if a.Control() == a.Sync {
		return []string{a.Sync}
	}
	return []string{a.Sync, a.Management}
}

// shares returns an address that both would listen at, or "".
func (a *Addresses) shares(b *Addresses) string {
	for _, x := range a.between() {
		if slices.Contains(b.between(), x) {
			return x
		}
	}
	return ""
}

// route returns where a node is dialled for a protocol, best first. fallback is for
// a node that this node's state does not know.
func (c *Cluster) route(n replication.NodeID, fallback, proto string) []string {
	node := c.State().Node(n)
	switch {
	case node == nil && fallback == "":
		return nil
	case node == nil:
		return []string{fallback}
	case proto == protoData || node.Control() == node.Sync:
		return []string{node.Sync}
	}
	return []string{node.Control(), node.Sync}
}

// dial connects to a node at its recorded addresses, or at fallback while this
// node's state does not know it.
func (c *Cluster) dial(ctx context.Context, n replication.NodeID, fallback, proto string) (*tls.Conn, error) {
	addrs := c.route(n, fallback, proto)
	if len(addrs) == 0 {
		return nil, fmt.Errorf("dial node %d: %w", n, errorf(ErrNotFound, "its address is not known"))
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeMax)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	if len(addrs) == 1 {
		return c.dialAt(ctx, n, addrs[0], proto)
	}
	return c.dialEither(ctx, n, addrs, proto)
}

// dialAt connects to a node at one address, authenticated and authorised by both
// sides when it returns.
func (c *Cluster) dialAt(ctx context.Context, n replication.NodeID, addr, proto string) (*tls.Conn, error) {
	t, err := dialTLS(ctx, addr, c.dialTLS(n, proto))
	if err == nil {
		var b [1]byte
		if _, err = io.ReadFull(t, b[:]); err == nil && b[0] != welcome {
			err = errors.New("unexpected answer")
		}
		if err == nil {
			err = t.SetDeadline(time.Time{})
		}
		if err != nil {
			t.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("dial node %d at %s: %w", n, addr, err)
	}
	return t, nil
}

// dialEither dials the management address, and the sync address too when that has
// failed or takes long. The first connection wins; when there is none, the error is
// that of the management address.
func (c *Cluster) dialEither(ctx context.Context, n replication.NodeID, addrs []string, proto string) (*tls.Conn, error) {
	type attempt struct {
		conn *tls.Conn
		err  error
		at   int
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan attempt, len(addrs))
	start := func(at int) {
		go func() {
			t, err := c.dialAt(ctx, n, addrs[at], proto)
			done <- attempt{t, err, at}
		}()
	}
	start(0)
	started, running := 1, 1
	head := time.NewTimer(detourAfter)
	defer head.Stop()
	var won attempt
	var failed error
	for running > 0 {
		select {
		case <-head.C:
			if started == 1 && won.conn == nil {
				start(1)
				started, running = 2, running+1
			}
		case a := <-done:
			running--
			switch {
			case a.err == nil && won.conn == nil:
				won = a
				cancel()
			case a.err == nil:
				a.conn.Close()
			case a.at == 0:
				failed = a.err
				if started == 1 && ctx.Err() == nil {
					start(1)
					started, running = 2, running+1
				}
			}
		}
	}
	switch {
	case won.conn == nil:
		return nil, failed
	case won.at == 0:
		c.detours.over(n)
	case c.detours.take(n):
		c.log.Warn("a node does not answer at its management address; raft takes the sync network", "peer", uint32(n), "address", addrs[0])
	}
	return won.conn, nil
}

// detours remembers which nodes are reached by the sync network because their
// management address does not answer.
type detours struct {
	mu    sync.Mutex
	nodes map[replication.NodeID]bool
}

// take returns whether this is news.
func (d *detours) take(n replication.NodeID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nodes == nil {
		d.nodes = make(map[replication.NodeID]bool)
	}
	news := !d.nodes[n]
	d.nodes[n] = true
	return news
}

// over returns whether there was one.
func (d *detours) over(n replication.NodeID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.nodes[n]
	delete(d.nodes, n)
	return was
}

func (d *detours) list() []replication.NodeID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []replication.NodeID
	for n := range d.nodes {
		list = append(list, n)
	}
	slices.Sort(list)
	return list
}

// Detours are the nodes that this node reaches by the sync network because their
// management addresses do not answer.
func (c *Cluster) Detours() []replication.NodeID { return c.detours.list() }

// comeBack tries the management addresses that did not answer, and moves raft's
// connections back to those that do again.
func (c *Cluster) comeBack() {
	tick := time.NewTicker(returnEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-c.ctx.Done():
			return
		}
		for _, n := range c.detours.list() {
			node := c.State().Node(n)
			if node == nil || node.Control() == node.Sync {
				c.detours.over(n)
				continue
			}
			ctx, cancel := context.WithTimeout(c.ctx, pingMax)
			t, err := c.dialAt(ctx, n, node.Control(), protoRPC)
			cancel()
			if err != nil {
				continue
			}
			c.pool.drop(n)
			c.pool.put(n, t)
			if c.detours.over(n) {
				c.layer.redial(n)
				c.log.Info("a node answers at its management address again", "peer", uint32(n), "address", node.Control())
			}
		}
	}
}

// redial closes the connections that raft has dialled to a node; it dials anew.
func (l *raftLayer) redial(n replication.NodeID) {
	l.mu.Lock()
	var conns []net.Conn
	for r := range l.conns {
		if r.to == n {
			conns = append(conns, r.Conn)
		}
	}
	l.mu.Unlock()
	for _, conn := range conns {
		conn.Close()
	}
}

// drop closes the idle connections to a node.
func (p *rpcPool) drop(n replication.NodeID) {
	p.mu.Lock()
	idle := p.idle[n]
	if !p.closed {
		delete(p.idle, n)
	}
	p.mu.Unlock()
	for _, conn := range idle {
		conn.Close()
	}
}

// raftAddressFor is what the raft configuration holds for a node.
func raftAddressFor(n *Node) raft.ServerAddress { return raftAddress(n.ID, n.Control()) }
