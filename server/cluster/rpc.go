package cluster

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/twinsan/twinsan/replication"
)

// A frame between nodes is a 32-bit big-endian length, one byte of kind (request)
// or status (response), and the body; the length counts kind and body. One
// request is in flight on a connection at a time. A frame that is too long or
// does not decode ends the connection. Part of the wire format of
// twinsan-rpc/1 and twinsan-join/1, do not change.
const maxFrame = maxCommandBytes + 64

// Kinds of requests.
const (
	// rpcPropose: timeout in milliseconds (4 bytes), command. Answer: a result.
	rpcPropose = 1
	// rpcRead: timeout in milliseconds (4 bytes). Answer: the index (8 bytes) that a
	// state must have reached to be as fresh as the request.
	rpcRead = 2
	// rpcPing: nothing. Answer: a Pong.
	rpcPing = 3
	// rpcSign: a certificate request of the caller. Answer: its new certificate.
	rpcSign = 4
	// rpcLevel: nothing. Answer: the highest feature level that the program knows (4
	// bytes). A program that knows level 1 only refuses the question.
	rpcLevel = 5
)

// Statuses of responses.
const (
	rpcOK        = 0
	rpcNotLeader = 1 // nothing was done; ask another node
	rpcUnknown   = 2 // it may or may not take effect
	rpcFailed    = 3 // nothing was done; the body is a text
)

const (
	// rpcIdle connections are kept for each node.
	rpcIdle = 4
	// frameMax bounds the arrival of a frame whose first bytes have come.
	frameMax = 10 * time.Second
	// proposeMax bounds a forwarded proposal at the leader.
	proposeMax = 10 * time.Second
)

func writeFrame(w io.Writer, kind byte, body []byte) error {
	if len(body) > maxFrame-1 {
		return fmt.Errorf("%w: frame of %d bytes", errEncoding, len(body))
	}
	b := make([]byte, 5, 5+len(body))
	binary.BigEndian.PutUint32(b, uint32(1+len(body)))
	b[4] = kind
	_, err := w.Write(append(b, body...))
	return err
}

func readFrame(r io.Reader) (kind byte, body []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < 1 || n > maxFrame {
		return 0, nil, fmt.Errorf("%w: frame of %d bytes", errEncoding, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, nil, noEOF(err)
	}
	return b[0], b[1:], nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Pong is what a node says of itself.
type Pong struct {
	Node    replication.NodeID
	Leader  replication.NodeID // as it sees it; 0: none
	Index   uint64             // of its State
	Applied uint64             // raft index, counts raft's own entries too
	Ready   bool               // its incarnation was raised since it started
}

func (p *Pong) walk(c *codec) {
	u32(c, &p.Node)
	u32(c, &p.Leader)
	u64(c, &p.Index)
	u64(c, &p.Applied)
	c.flag(&p.Ready)
}

// serveRPC answers the requests of one authorised connection until it ends.
func (c *Cluster) serveRPC(peer replication.NodeID, conn net.Conn) {
	for {
		// The first byte may take as long as it likes, the rest of a frame not.
		var first [1]byte
		if _, err := io.ReadFull(conn, first[:]); err != nil {
			return
		}
		if conn.SetReadDeadline(time.Now().Add(frameMax)) != nil {
			return
		}
		kind, body, err := readFrame(io.MultiReader(bytes.NewReader(first[:]), conn))
		if err != nil || conn.SetDeadline(time.Time{}) != nil {
			return
		}
		status, answer := c.handleRPC(peer, kind, body)
		if conn.SetWriteDeadline(time.Now().Add(frameMax)) != nil || writeFrame(conn, status, answer) != nil {
			return
		}
	}
}

func (c *Cluster) handleRPC(peer replication.NodeID, kind byte, body []byte) (status byte, answer []byte) {
	fail := func(err error) (byte, []byte) {
		t := err.Error()
		return rpcFailed, []byte(t[:min(len(t), maxText)])
	}
	if c.over.Load() {
		if kind == rpcPropose || kind == rpcRead {
			return rpcNotLeader, nil
		}
		return fail(errors.New("its raft store has failed, and it stops")) // it is not fit to lead either
	}
	switch kind {
	case rpcPropose:
		if len(body) < 4 {
			return fail(errEncoding)
		}
		ctx, cancel := context.WithTimeout(c.ctx, requestTimeout(body))
		defer cancel()
		env, cmd, err := decodeCommand(body[4:])
		if err == nil {
			err = c.mayPropose(peer, env, cmd)
		}
		if err == nil {
			err = c.mayAppend(cmd)
		}
		if err != nil && c.State().Node(peer) == nil {
			// Just elected after a start, and our state is older than the log: who the
			// peer is will show when it has caught up.
			return rpcNotLeader, nil
		}
		if err != nil {
			return fail(err)
		}
		r, out, err := c.applyHere(ctx, slices.Clone(body[4:]))
		switch out {
		case outcomeUnsent:
			return rpcNotLeader, nil
		case outcomeUnknown:
			return rpcUnknown, []byte(err.Error())
		}
		b, err := c.encodeMessage(&r)
		if err != nil {
			return rpcUnknown, nil
		}
		return rpcOK, b
	case rpcRead:
		if len(body) != 4 {
			return fail(errEncoding)
		}
		ctx, cancel := context.WithTimeout(c.ctx, requestTimeout(body))
		defer cancel()
		i, err := c.readIndexHere(ctx)
		if err != nil {
			return rpcNotLeader, nil
		}
		return rpcOK, binary.BigEndian.AppendUint64(nil, i)
	case rpcPing:
		p := c.pong()
		b, err := c.encodeMessage(&p)
		if err != nil {
			return fail(err)
		}
		return rpcOK, b
	case rpcLevel:
		return rpcOK, binary.BigEndian.AppendUint32(nil, FeatureLevel)
	case rpcSign:
		cert, err := c.signFor(peer, body)
		if err != nil {
			return fail(err)
		}
		return rpcOK, cert
	}
	return fail(fmt.Errorf("%w: request of unknown kind %d", errEncoding, kind))
}

// requestTimeout reads the timeout that leads a request, bounded by proposeMax.
func requestTimeout(body []byte) time.Duration {
	return min(time.Duration(binary.BigEndian.Uint32(body))*time.Millisecond, proposeMax)
}

// mayPropose says whether a peer may have a command committed: nobody speaks for
// another node, and a witness speaks only of itself.
func (c *Cluster) mayPropose(peer replication.NodeID, env envelope, cmd command) error {
	role := RoleWitness // what an unknown member may do
	if n := c.State().Node(peer); n != nil {
		role = n.Role
	}
	own := env.By == peer
	switch x := cmd.(type) {
	case *cmdInit:
		own = false
	case *cmdStart:
		own = own && x.Node == peer
	case *cmdChange:
		own = own && x.By == peer
	case *cmdVolumeFreed:
		own = own && x.Node == peer
	}
	if !own {
		return errorf(ErrRefused, "node %d may not propose this", peer)
	}
	if k := cmd.kind(); role != RoleData && k != kindStart && k != kindAddEvent {
		return errorf(ErrRefused, "a witness may not propose this")
	}
	return nil
}

func (c *Cluster) pong() Pong {
	return Pong{
		Node: c.id.Node, Leader: c.Leader(), Index: c.State().Index,
		Applied: c.raft.AppliedIndex(), Ready: c.Incarnation() != 0,
	}
}

// Ping asks a node what it says of itself: whether it is there at all.
func (c *Cluster) Ping(ctx context.Context, n replication.NodeID) (Pong, error) {
	if n == c.id.Node {
		return c.pong(), nil
	}
	b, _, err := c.call(ctx, n, rpcPing, nil)
	if err != nil {
		return Pong{}, err
	}
	var p Pong
	if err := decodeMessage(b, &p); err != nil {
		return Pong{}, fmt.Errorf("ping node %d: %w", n, err)
	}
	return p, nil
}

var (
	errNotLeader = errors.New("that node is not the leader")
	errUnknown   = errors.New("the leader does not know the outcome")
)

// call sends a request and returns the body of its answer. Until sent is true the
// request has certainly had no effect. Every request may be repeated, so that a
// connection that went stale in the pool is replaced without a word.
func (c *Cluster) call(ctx context.Context, n replication.NodeID, kind byte, body []byte) (answer []byte, sent bool, err error) {
	for {
		conn := c.pool.take(n)
		pooled := conn != nil
		if !pooled {
			t, err := c.dial(ctx, n, c.raftAddressOf(n), protoRPC)
			if err != nil {
				return nil, sent, err
			}
			conn = t
		}
		sent = true
		status, answer, err := roundTrip(ctx, conn, kind, body)
		if err != nil {
			conn.Close()
			if pooled && ctx.Err() == nil {
				continue
			}
			return nil, sent, fmt.Errorf("ask node %d: %w", n, err)
		}
		c.pool.put(n, conn)
		switch status {
		case rpcOK:
			return answer, true, nil
		case rpcNotLeader:
			return nil, false, errNotLeader
		case rpcFailed:
			return nil, false, errorf(ErrRefused, "node %d: %s", n, answer)
		}
		return nil, true, errUnknown
	}
}

// roundTrip is one request and its answer; the end of ctx cuts it short.
func roundTrip(ctx context.Context, conn net.Conn, kind byte, body []byte) (byte, []byte, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err := writeFrame(conn, kind, body)
	var status byte
	var answer []byte
	if err == nil {
		status, answer, err = readFrame(conn)
	}
	if !stop() && err == nil {
		err = ctx.Err() // the deadline is spent: the connection is not fit for reuse
	}
	return status, answer, err
}

// rpcPool keeps idle connections to other nodes.
type rpcPool struct {
	mu     sync.Mutex
	closed bool
	idle   map[replication.NodeID][]net.Conn
}

func (p *rpcPool) take(n replication.NodeID) net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.idle[n]
	if len(l) == 0 {
		return nil
	}
	p.idle[n] = l[:len(l)-1]
	return l[len(l)-1]
}

func (p *rpcPool) put(n replication.NodeID, conn net.Conn) {
	p.mu.Lock()
	keep := !p.closed && len(p.idle[n]) < rpcIdle
	if keep {
		p.idle[n] = append(p.idle[n], conn)
	}
	p.mu.Unlock()
	if !keep {
		conn.Close()
	}
}

func (p *rpcPool) close() {
	p.mu.Lock()
	p.closed = true
	idle := p.idle
	p.idle = nil
	p.mu.Unlock()
	for _, l := range idle {
		for _, conn := range l {
			conn.Close()
		}
	}
}
