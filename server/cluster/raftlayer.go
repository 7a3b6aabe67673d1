package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

// A server of the raft configuration has the decimal node id as its id and
// "<id>@<management address>" as its address: the id says whose certificate to expect,
// and the address is what connects a restarted node before its state is back.
func raftID(n replication.NodeID) raft.ServerID { return raft.ServerID(strconv.Itoa(int(n))) }

func raftAddress(n replication.NodeID, addr string) raft.ServerAddress {
	return raft.ServerAddress(fmt.Sprintf("%d@%s", n, addr))
}

func nodeOf(id raft.ServerID) replication.NodeID {
	n, err := strconv.ParseUint(string(id), 10, 32)
	if err != nil {
		return 0
	}
	return replication.NodeID(n)
}

func splitRaftAddress(a raft.ServerAddress) (replication.NodeID, string, error) {
	id, addr, ok := strings.Cut(string(a), "@")
	n := nodeOf(raft.ServerID(id))
	if !ok || n == 0 {
		return 0, "", fmt.Errorf("raft address %q is not id@host:port", a)
	}
	return n, addr, nil
}

// raftLayer carries the raft library's connections. It implements raft.StreamLayer.
type raftLayer struct {
	c      *Cluster
	addr   raftAddr
	accept chan net.Conn
	closed chan struct{} // ends Accept
	once   sync.Once
	ctx    context.Context // ends at cut
	cancel context.CancelFunc

	mu       sync.Mutex
	conns    map[*raftConn]struct{}
	accepted sync.WaitGroup // accepted connections that raft has not closed
}

type raftAddr raft.ServerAddress

func (raftAddr) Network() string  { return "twinsan" }
func (a raftAddr) String() string { return string(a) }

func newRaftLayer(c *Cluster, addr raft.ServerAddress) *raftLayer {
	l := &raftLayer{c: c, addr: raftAddr(addr), accept: make(chan net.Conn), closed: make(chan struct{}), conns: make(map[*raftConn]struct{})}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// raftConn is a connection in raft's hands.
type raftConn struct {
	net.Conn
	layer  *raftLayer
	to     replication.NodeID // whom this node has dialled; 0: it was accepted
	once   sync.Once
	closed func()
}

// Read ends cleanly when this node cuts its connections; raft would complain.
func (r *raftConn) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	if err != nil && r.layer.ctx.Err() != nil {
		err = io.EOF
	}
	return n, err
}

func (r *raftConn) Close() error {
	err := r.Conn.Close()
	r.once.Do(r.closed)
	return err
}

// track takes a connection that was dialled to a node, or accepted (0). It returns nil when the layer is cut.
func (l *raftLayer) track(conn net.Conn, to replication.NodeID, closed func()) *raftConn {
	accepted := to == 0
	r := &raftConn{Conn: conn, layer: l, to: to}
	r.closed = func() {
		l.mu.Lock()
		delete(l.conns, r)
		l.mu.Unlock()
		closed()
		if accepted {
			l.accepted.Done()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return nil
	}
	if accepted {
		l.accepted.Add(1)
	}
	l.conns[r] = struct{}{}
	return r
}

// offer gives an accepted connection to raft, which calls closed when it is done with it.
func (l *raftLayer) offer(conn net.Conn, closed func()) bool {
	r := l.track(conn, 0, closed)
	if r == nil {
		return false
	}
	select {
	case l.accept <- r:
	case <-l.ctx.Done():
		r.Close()
	}
	return true
}

// Accept implements net.Listener.
func (l *raftLayer) Accept() (net.Conn, error) {
	select {
	case conn := <-l.accept:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (l *raftLayer) Addr() net.Addr { return l.addr }

// Dial implements raft.StreamLayer.
func (l *raftLayer) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	n, addr, err := splitRaftAddress(to)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	t, err := l.c.dial(ctx, n, addr, protoRaft)
	if err != nil {
		return nil, err
	}
	r := l.track(t, n, func() {})
	if r == nil {
		return nil, errors.Join(net.ErrClosed, t.Close())
	}
	return r, nil
}

// Close implements net.Listener. raft's transport calls it when it is shut down.
func (l *raftLayer) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.cut()
	return nil
}

// cut ends all of raft's connections and dials, so that none of its goroutines
// waits for a peer while it is being shut down.
func (l *raftLayer) cut() {
	l.cancel()
	l.mu.Lock()
	conns := make([]*raftConn, 0, len(l.conns))
	for r := range l.conns {
		conns = append(conns, r)
	}
	l.mu.Unlock()
	for _, r := range conns {
		// Only the connection: raft's goroutine notices and closes r itself.
		r.Conn.Close()
	}
}
