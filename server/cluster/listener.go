package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/replication"
)

// The protocols between nodes, chosen by ALPN. Part of the wire format, do
// not change; a new version of a protocol takes a new name.
const (
	protoRaft = "twinsan-raft/1" // the raft library's own messages
	protoRPC  = "twinsan-rpc/1"  // frames of rpc.go
	protoData = "twinsan-data/1" // handed to replication
	protoJoin = "twinsan-join/1" // frames of join.go; the only one without a client certificate
)

const (
	// handshakeMax bounds a connection until it is authorised.
	handshakeMax = 5 * time.Second
	// maxHandshakes and maxHandshakesPerIP bound connections that are not yet
	// authorised. A connection beyond is closed at once: members retry, and a
	// flood from one address leaves room for the others.
	maxHandshakes      = 128
	maxHandshakesPerIP = 32
	// maxConns bounds authorised raft and rpc connections of one peer.
	maxConns = 32
	// userTimeout is how long the kernel keeps unacknowledged data before it
	// declares a connection dead.
	userTimeout = 10 * time.Second
)

// welcome is the byte that the server sends once it has authorised the client. In
// TLS 1.3 a client's handshake ends before the server has seen its certificate;
// without this byte a refusal would surface as a read error much later.
const welcome = 0x77

var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}

// listener accepts connections on the sync address and the management address,
// authorises them and hands them to their protocol. It keeps the raft and rpc connections, to close them
// when their peer is removed or the node stops; a data connection belongs to
// replication.
type listener struct {
	c   *Cluster
	lns []net.Listener // sync, and management when that is another one
	tls *tls.Config
	wg  sync.WaitGroup

	mu     sync.Mutex
	closed bool
	half   map[string]int // handshakes by remote address
	halves int
	conns  map[net.Conn]replication.NodeID // authorised and in our hands, or in the handshake (0)
}

func newListener(c *Cluster, lns []net.Listener) *listener {
	l := &listener{c: c, lns: lns, half: make(map[string]int), conns: make(map[net.Conn]replication.NodeID)}
	l.tls = &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			if slices.Contains(h.SupportedProtos, protoJoin) {
				return c.joinTLS(), nil
			}
			return c.memberTLS(), nil
		},
	}
	return l
}

func (l *listener) start() {
	for i, ln := range l.lns {
		l.wg.Go(func() { l.accept(ln, i == 0) })
	}
}

// accept takes connections; data ones only where data says so.
func (l *listener) accept(ln net.Listener, data bool) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors, most likely. Connections in use go on; new ones wait.
			l.c.log.Warn("cannot accept connections between nodes", "err", err)
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-l.c.ctx.Done():
				return
			}
		}
		if ip, ok := l.admit(conn); ok {
			l.wg.Go(func() { l.serve(conn, ip, data) })
		} else {
			conn.Close()
		}
	}
}

func (l *listener) admit(conn net.Conn) (ip string, ok bool) {
	ip, _, _ = net.SplitHostPort(conn.RemoteAddr().String())
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.halves >= maxHandshakes || l.half[ip] >= maxHandshakesPerIP {
		return ip, false
	}
	l.halves++
	l.half[ip]++
	l.conns[conn] = 0
	return ip, true
}

// authorised ends the handshake of a connection: it belongs to peer now, unless
// the peer has too many already. keep is false for a connection that leaves our hands.
func (l *listener) authorised(conn net.Conn, ip string, peer replication.NodeID, keep bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.halves--
	if l.half[ip]--; l.half[ip] == 0 {
		delete(l.half, ip)
	}
	if l.closed || !keep {
		delete(l.conns, conn)
		return !l.closed
	}
	n := 0
	for _, p := range l.conns {
		if p == peer {
			n++
		}
	}
	if n >= maxConns {
		delete(l.conns, conn)
		return false
	}
	l.conns[conn] = peer
	return true
}

func (l *listener) forget(conn net.Conn) {
	l.mu.Lock()
	delete(l.conns, conn)
	l.mu.Unlock()
}

// serve runs a connection from its handshake to its end.
func (l *listener) serve(conn net.Conn, ip string, data bool) {
	tuneTCP(conn)
	t := tls.Server(conn, l.tls)
	peer, proto, err := l.handshake(t)
	ok := l.authorised(conn, ip, peer, err == nil && (proto == protoRaft || proto == protoRPC))
	if err != nil || !ok {
		if err != nil && !errors.Is(err, io.EOF) {
			l.c.log.Debug("connection refused", "remote", conn.RemoteAddr().String(), "err", err)
		}
		conn.Close()
		return
	}
	switch proto {
	case protoJoin:
		l.c.serveJoin(t)
		t.Close()
	case protoRaft:
		// raft closes it; forget is called by then.
		if !l.c.layer.offer(t, func() { l.forget(conn) }) {
			l.forget(conn)
			t.Close()
		}
	case protoRPC:
		l.c.serveRPC(peer, t)
		l.forget(conn)
		t.Close()
	case protoData:
		if l.c.cfg.OnData == nil || !data {
			t.Close()
			return
		}
		l.c.cfg.OnData(peer, t)
	}
}

// handshake authenticates and authorises a connection in bounded time.
func (l *listener) handshake(t *tls.Conn) (replication.NodeID, string, error) {
	if err := t.SetDeadline(time.Now().Add(l.c.cfg.handshakeMax)); err != nil {
		return 0, "", err
	}
	ctx, cancel := context.WithTimeout(l.c.ctx, l.c.cfg.handshakeMax)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		return 0, "", err
	}
	cs := t.ConnectionState()
	if cs.NegotiatedProtocol == "" {
		return 0, "", errors.New("no protocol was chosen")
	}
	var peer replication.NodeID
	if cs.NegotiatedProtocol != protoJoin {
		p, err := peerOf(l.c.id.UUID, cs.PeerCertificates[0])
		if err != nil {
			return 0, "", err
		}
		peer = p.Node
		if _, err := t.Write([]byte{welcome}); err != nil {
			return 0, "", err
		}
	}
	return peer, cs.NegotiatedProtocol, t.SetDeadline(time.Time{})
}

// dropStrangers closes the connections of nodes that are members no longer.
func (l *listener) dropStrangers() {
	l.mu.Lock()
	var drop []net.Conn
	for conn, peer := range l.conns {
		if peer != 0 && !l.c.isMember(peer) {
			drop = append(drop, conn)
		}
	}
	l.mu.Unlock()
	for _, conn := range drop {
		conn.Close()
	}
}

// close refuses further connections, closes those in our hands and waits for
// their goroutines.
func (l *listener) close() {
	l.mu.Lock()
	l.closed = true
	var conns []net.Conn
	for conn := range l.conns {
		conns = append(conns, conn)
	}
	l.mu.Unlock()
	for _, ln := range l.lns {
		ln.Close()
	}
	for _, conn := range conns {
		conn.Close()
	}
	l.wg.Wait()
}

// tuneTCP makes a dead peer's connection fail in seconds instead of many minutes.
// Detection that matters is done above (leases, raft); this frees resources.
func tuneTCP(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	// Errors leave the kernel's defaults, which work too.
	_ = tcp.SetKeepAliveConfig(keepAlive)
	if raw, err := tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
		})
	}
}

// memberTLS is the server's side of raft, rpc and data connections.
func (c *Cluster) memberTLS() *tls.Config {
	cr := c.creds.Load()
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Time:                   c.now,
		Certificates:           []tls.Certificate{cr.cert},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              cr.pool,
		NextProtos:             []string{protoRaft, protoRPC, protoData},
		SessionTicketsDisabled: true, // each connection is authorised anew
		VerifyConnection: func(cs tls.ConnectionState) error {
			p, err := peerOf(c.id.UUID, cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			return c.authorise(p, keyPrint(cs.PeerCertificates[0]), cs.NegotiatedProtocol)
		},
	}
}

// joinTLS is the server's side of a join: the client has no certificate yet.
func (c *Cluster) joinTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Time:                   c.now,
		Certificates:           []tls.Certificate{c.creds.Load().cert},
		NextProtos:             []string{protoJoin},
		SessionTicketsDisabled: true,
	}
}

// dialTLS is the client's side of a connection to a certain node.
func (c *Cluster) dialTLS(to replication.NodeID, proto string) *tls.Config {
	cr := c.creds.Load()
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Time:         c.now,
		ServerName:   ServerName,
		RootCAs:      cr.pool,
		Certificates: []tls.Certificate{cr.cert},
		NextProtos:   []string{proto},
		VerifyConnection: func(cs tls.ConnectionState) error {
			p, err := peerOf(c.id.UUID, cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			if p.Node != to {
				return errorf(ErrNotMember, "node %d answered in the place of node %d", p.Node, to)
			}
			if n := c.State().Node(to); n != nil && n.KeyPrint != keyPrint(cs.PeerCertificates[0]) {
				return errorf(ErrNotMember, "node %d has another key than the one that joined", to)
			}
			return nil
		},
	}
}

// authorise says whether the holder of a valid certificate may speak a protocol,
// by its membership and role and never by its address.
//
// A node with an id that this node's state has not yet handed out joined after
// the state was current: this node was away. It may speak raft, since otherwise
// a new leader could never tell this node about itself; the raft library admits
// to elections only the servers of its own configuration.
func (c *Cluster) authorise(p Peer, key [32]byte, proto string) error {
	s := c.State()
	n := s.Node(p.Node)
	switch {
	case p.Node == 0:
		return errorf(ErrNotMember, "%s is an administrator, not a node", p.Admin)
	case slices.Contains(c.lost, p.Node):
		return errorf(ErrNotMember, "node %d was declared lost when the quorum was recovered; wipe it and let it join as a new node", p.Node)
	case n != nil && n.KeyPrint != key:
		return errorf(ErrNotMember, "node %d has another key than the one that joined", p.Node)
	case n != nil && proto == protoData && (n.Role != RoleData || c.id.Role != RoleData):
		return errorf(ErrNotMember, "a witness has no data connections")
	case n != nil:
		return nil
	case proto != protoData && c.inRaft(p.Node):
		return nil
	case proto == protoRaft && p.Node >= s.nextNode:
		return nil
	}
	return errorf(ErrNotMember, "node %d is not a member", p.Node)
}

// isMember says whether a node is in the state or in the raft configuration.
func (c *Cluster) isMember(id replication.NodeID) bool {
	s := c.State()
	return s.Node(id) != nil || id >= s.nextNode || c.inRaft(id)
}

// Dial implements replication.Transport: a data connection to a node,
// authenticated and authorised by both sides when it returns. It waits until ctx
// ends at most. The caller owns the connection.
func (c *Cluster) Dial(ctx context.Context, n replication.NodeID) (net.Conn, error) {
	conn, err := c.dial(ctx, n, "", protoData)
	if err != nil {
		c.succeed(n, err)
		return nil, err
	}
	return conn, nil
}

// dialTLS connects and shakes hands until ctx ends; the deadline of ctx stays on
// the connection.
func dialTLS(ctx context.Context, addr string, cfg *tls.Config) (*tls.Conn, error) {
	d := net.Dialer{KeepAliveConfig: keepAlive}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	tuneTCP(conn)
	if dl, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(dl); err != nil {
			conn.Close()
			return nil, err
		}
	}
	t := tls.Client(conn, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return t, nil
}
