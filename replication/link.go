package replication

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/replication/wire"
)

// link is one connection to another node. Frames are appended to out under the
// mutex and written by whoever flushes first; a flusher that finds a write under
// way leaves its frames to it. Bulk frames take turns with them. One goroutine reads. A node dials every other
// node, so two links join each pair: requests go out on the dialled one, answers
// come back on it.
type link struct {
	node    *Node
	peer    NodeID
	conn    net.Conn
	dialled bool

	mu      sync.Mutex
	out     []byte // frames not yet given to the writer
	spare   []byte // the other buffer of the pair
	bulk    []bulk // frames that are not in out
	writing bool
	err     error
	calls   map[uint64]chan reply
	callID  uint64

	pending atomic.Bool // out is not empty
	wake    chan struct{}
	closed  chan struct{}
	drained chan struct{} // inbound: closed when no frame of it is handled any more

	scratch readScratch
	body    *body // the reading goroutine's: the data part of the frame that it handles
}

// readScratch is the reading goroutine's own.
type readScratch struct {
	beacon wire.BeaconBody
	answer wire.BeaconBody
}

// reply is the answer to a Call. Its bytes are the receiver's own copy.
type reply struct {
	status uint8
	epoch  uint64
	meta   []byte
	data   []byte
	err    error
}

// A link whose unsent frames pass maxUnsent is as good as dead: the peer takes
// nothing although operations are bounded far below that.
const (
	maxUnsent    = 512 << 20
	inlineUnsent = 128 << 10 // longer writes are left to the link's own goroutine
	writeTimeout = 5 * time.Second
)

func newLink(n *Node, peer NodeID, c net.Conn, dialled bool) *link {
	return &link{
		node: n, peer: peer, conn: c, dialled: dialled,
		calls: map[uint64]chan reply{}, wake: make(chan struct{}, 1), closed: make(chan struct{}), drained: make(chan struct{}),
	}
}

// lock begins appending to l.out; unlock ends it. Between the two the caller
// does nothing else. Frames appended to a failed link are thrown away.
func (l *link) lock() { l.mu.Lock() }

func (l *link) unlock() {
	if l.err != nil {
		l.out = l.out[:0]
	} else if len(l.out) > maxUnsent {
		l.failLocked(fmt.Errorf("node %d takes no data: %d bytes wait for it", l.peer, len(l.out)))
	} else {
		l.pending.Store(true)
	}
	l.mu.Unlock()
}

// flush sends what is in out: here and now when it is short and nobody else is
// writing, else by the link's writer goroutine.
func (l *link) flush() {
	if !l.pending.Load() {
		return
	}
	l.mu.Lock()
	if l.writing || l.err != nil || len(l.out) == 0 && len(l.bulk) == 0 {
		l.mu.Unlock()
		return
	}
	if len(l.out) <= inlineUnsent && len(l.bulk) == 0 {
		l.writeLocked(false)
	}
	left := l.err == nil && (len(l.out) > 0 || len(l.bulk) > 0)
	l.mu.Unlock()
	if left {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// writeLocked writes until nothing is left. It lets go of the mutex meanwhile. Bulk
// frames take turns with what is in out, so that neither waits for more than one piece
// of the other; they are for the link's own goroutine.
func (l *link) writeLocked(own bool) {
	l.writing = true
	for l.err == nil && (len(l.out) > 0 || len(l.bulk) > 0) && (own || len(l.bulk) == 0) {
		if len(l.out) > 0 {
			l.writeOutLocked()
		}
		if own && l.err == nil && len(l.bulk) > 0 {
			l.writeBulkLocked()
		}
	}
	l.writing = false
}

func (l *link) writeOutLocked() {
	buf := l.out
	l.out, l.spare = l.spare[:0], nil
	l.pending.Store(len(l.bulk) > 0)
	l.mu.Unlock()
	l.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := l.conn.Write(buf)
	l.mu.Lock()
	if cap(buf) <= 16<<20 {
		l.spare = buf[:0]
	}
	if err != nil {
		l.failLocked(err)
	}
}

// writer is the goroutine for long writes.
func (l *link) writer() {
	for {
		select {
		case <-l.wake:
		case <-l.closed:
			return
		}
		l.mu.Lock()
		if !l.writing && l.err == nil {
			l.writeLocked(true)
		}
		l.mu.Unlock()
	}
}

// fail ends the link: the connection is closed and waiting calls fail.
func (l *link) fail(err error) {
	l.mu.Lock()
	l.failLocked(err)
	l.mu.Unlock()
}

func (l *link) failLocked(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	l.out, l.bulk = l.out[:0], nil
	close(l.closed)
	// The socket itself: the end of a TLS session is polite and may block.
	if t, ok := l.conn.(interface{ NetConn() net.Conn }); ok {
		t.NetConn().Close()
	} else {
		l.conn.Close()
	}
	for id, c := range l.calls {
		delete(l.calls, id)
		c <- reply{err: err}
	}
}

// call sends a request of the control kind and waits for its answer.
func (l *link) call(h wire.Header, method wire.Method, meta, data []byte, cancel <-chan struct{}) (reply, error) {
	c := l.begin(h, method, meta, data)
	l.flush()
	return l.wait(c, cancel)
}

// pendingCall is a call on its way.
type pendingCall struct {
	id     uint64
	answer chan reply
}

// begin queues a call behind the frames queued before it; wait gets its answer.
func (l *link) begin(h wire.Header, method wire.Method, meta, data []byte) pendingCall {
	c := pendingCall{answer: make(chan reply, 1)}
	l.lock()
	if l.err != nil {
		c.answer <- reply{err: l.err}
	} else {
		h = l.enlist(&c, h, method)
		l.out = wire.AppendFrame(l.out, h, meta, data)
	}
	l.unlock()
	return c
}

// enlist makes c a call that an answer may come for. Called with mu.
func (l *link) enlist(c *pendingCall, h wire.Header, method wire.Method) wire.Header {
	l.callID++
	c.id = l.callID
	l.calls[c.id] = c.answer
	h.Type, h.Flags, h.Seq = wire.Call, uint8(method), c.id
	return h
}

func (l *link) wait(c pendingCall, cancel <-chan struct{}) (reply, error) {
	select {
	case r := <-c.answer:
		switch {
		case r.err != nil:
			return r, r.err
		case r.status == wire.StatusOK:
			return r, nil
		case r.status == wire.StatusStale:
			return r, errStale
		case r.status == wire.StatusAbsent:
			return r, errAbsent
		case r.status == wire.StatusAgain:
			return r, errAgain
		default:
			return r, fmt.Errorf("node %d: %s", l.peer, r.meta)
		}
	case <-cancel:
		l.mu.Lock()
		delete(l.calls, c.id)
		l.mu.Unlock()
		return reply{}, errCancelled
	}
}

var (
	errStale     = errors.New("the peer promised a later epoch")
	errAbsent    = errors.New("the peer does not have it")
	errAgain     = errors.New("a block that was there has gone")
	errCancelled = errors.New("cancelled")
	errLate      = errors.New("the peer was silent for too long: what it sends now may be out of date")
)

// answer completes a call. It copies: the frame lies in the read buffer.
func (l *link) answer(h wire.Header, meta, data []byte) {
	l.mu.Lock()
	c := l.calls[h.Seq]
	delete(l.calls, h.Seq)
	l.mu.Unlock()
	if c != nil {
		c <- reply{status: h.Flags, epoch: h.Epoch, meta: append([]byte(nil), meta...), data: append([]byte(nil), data...)}
	}
}

// reply answers a Call from the peer.
func (l *link) reply(h wire.Header, status uint8, meta, data []byte) {
	h.Type, h.Flags = wire.Reply, status
	l.lock()
	l.out = wire.AppendFrame(l.out, h, meta, data)
	l.unlock()
	l.flush()
}

func (l *link) replyError(h wire.Header, err error) {
	l.node.failedBy(err)
	switch {
	case errors.Is(err, errStale):
		l.reply(h, wire.StatusStale, nil, nil)
	case errors.Is(err, errAbsent):
		l.reply(h, wire.StatusAbsent, nil, nil)
	case errors.Is(err, errAgain):
		l.reply(h, wire.StatusAgain, nil, nil)
	default:
		l.reply(h, wire.StatusError, []byte(err.Error()), nil)
	}
}

// more says whether the next Read of the connection returns at once. Over TLS that is
// so more often than not while much is sent: a Read returns one record of 16 KiB, and
// a batch of no more than that would be a commit of four operations.
func (l *link) more() bool {
	t, ok := l.conn.(interface{ NetConn() net.Conn })
	if !ok {
		return false
	}
	m, ok := t.NetConn().(interface{ More() bool })
	return ok && m.More()
}
