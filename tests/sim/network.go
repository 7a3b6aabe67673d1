package sim

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/twinsan/twinsan/replication"
)

// Nodes are numbered from 1; the witness has no data and no number of its own here.
const (
	maxNodes = 3
	witness  = maxNodes + 1
)

// links is one network: which node can send to which.
type links struct {
	cut   [witness + 1][witness + 1]int // how many faults cut it
	since [witness + 1][witness + 1]int // changes of cut, to tell one cut from the next
}

func (l *links) up(from, to replication.NodeID) bool { return l.cut[from][to] == 0 }
func (l *links) both(a, b replication.NodeID) bool   { return l.up(a, b) && l.up(b, a) }

// network carries the connections between nodes: bytes take time, a cut link holds
// them up until it heals, and a connection dies when it has been cut for as long as
// the kernel is patient (TCP_USER_TIMEOUT and keep-alive of the real one, 10 s).
type network struct {
	w     *world
	mu    sync.Mutex
	data  links
	conns []*pair
	delay time.Duration // one way, mean
	rate  int64         // bytes per second of a link
}

// window is how many bytes of a connection are on their way; more has to wait.
const window = 4 << 20

const patience = 10 * time.Second

// pair is one connection.
type pair struct {
	ends [2]*end
	id   uint64
}

// pipe is one direction of a connection. The bytes of all chunks lie one after another
// in data[at:].
type pipe struct {
	from, to replication.NodeID
	queue    []chunk // queue[head:] are on their way
	head     int
	data     []byte
	at       int
	last     time.Time // when the newest chunk arrives
	stalled  time.Time
	arrival  *time.Timer   // of the next chunk, for the reader
	read     chan struct{} // something else changed for the reader
	write    chan struct{} // and for the writer
}

type chunk struct {
	size int
	due  time.Time
	end  error // io.EOF or a reset instead of data
}

func newPipe(from, to replication.NodeID) *pipe {
	p := &pipe{from: from, to: to, arrival: time.NewTimer(0), read: make(chan struct{}, 1), write: make(chan struct{}, 1)}
	p.arrival.Stop()
	return p
}

func (p *pipe) bytes() int       { return len(p.data) - p.at }
func (p *pipe) waiting() []chunk { return p.queue[p.head:] }

// clear loses everything that is on its way.
func (p *pipe) clear() { p.queue, p.head, p.data, p.at = p.queue[:0], 0, p.data[:0], 0 }

// drop takes the first chunk off.
func (p *pipe) drop() {
	if p.head++; p.head == len(p.queue) {
		p.queue, p.head = p.queue[:0], 0
	}
}

// due is when the first chunk arrives.
func (p *pipe) due() time.Time {
	if due := p.queue[p.head].due; !p.stalled.After(due) {
		return due
	}
	return p.stalled
}

// end is one side of a connection: a net.Conn.
type end struct {
	n        *network
	p        *process
	pair     *pair
	in, out  *pipe
	err      error // it is over
	rd, wd   time.Time
	deadline chan struct{}
}

func wakeup(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// connect makes a connection from a to b, both alive.
func (n *network) connect(a, b *process) (*end, *end) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ab, ba := newPipe(a.id, b.id), newPipe(b.id, a.id)
	c := &pair{id: n.w.nextID()}
	x := &end{n: n, p: a, pair: c, in: ba, out: ab, deadline: make(chan struct{}, 1)}
	y := &end{n: n, p: b, pair: c, in: ab, out: ba, deadline: make(chan struct{}, 1)}
	c.ends = [2]*end{x, y}
	live := n.conns[:0]
	for _, o := range n.conns {
		if o.ends[0].err == nil || o.ends[1].err == nil {
			live = append(live, o)
		}
	}
	n.conns = append(live, c)
	return x, y
}

func (e *end) Read(b []byte) (int, error) {
	for {
		e.p.gate()
		n, err := e.take(b)
		if n > 0 || err != nil {
			return n, err
		}
		select {
		case <-e.in.arrival.C:
		case <-e.in.read:
		case <-e.deadline:
		}
	}
}

// take copies what has arrived. With nothing it sets the timer to when that may change.
func (e *end) take(b []byte) (n int, err error) {
	e.n.mu.Lock()
	defer e.n.mu.Unlock()
	if e.err != nil {
		return 0, e.err
	}
	p := e.in
	now := time.Now()
	until := e.rd
	if !until.IsZero() && !until.After(now) {
		return 0, os.ErrDeadlineExceeded
	}
	for n < len(b) && len(p.waiting()) > 0 {
		c := &p.queue[p.head]
		if !e.n.data.up(p.from, p.to) {
			break // healing wakes us
		}
		if due := p.due(); due.After(now) {
			if until.IsZero() || due.Before(until) {
				until = due
			}
			break
		}
		if c.end != nil {
			if n == 0 {
				e.err = c.end
				return 0, c.end
			}
			break
		}
		m := copy(b[n:], p.data[p.at:][:c.size])
		n += m
		p.at += m
		if c.size -= m; c.size == 0 {
			p.drop()
		}
		if p.at == len(p.data) {
			p.data, p.at = p.data[:0], 0
		}
		wakeup(p.write)
	}
	if n == 0 && !until.IsZero() {
		p.arrival.Reset(until.Sub(now))
	}
	return n, nil
}

func (e *end) Write(b []byte) (int, error) {
	var t *time.Timer
	for {
		e.p.gate()
		e.n.mu.Lock()
		if e.err != nil {
			e.n.mu.Unlock()
			return 0, e.err
		}
		p, now := e.out, time.Now()
		if !e.wd.IsZero() && !now.Before(e.wd) {
			e.n.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		}
		if p.bytes() < window {
			e.push(b, nil)
			e.n.mu.Unlock()
			return len(b), nil
		}
		var expired <-chan time.Time
		if !e.wd.IsZero() {
			t = time.NewTimer(e.wd.Sub(now))
			expired = t.C
		}
		e.n.mu.Unlock()
		select {
		case <-p.write:
		case <-expired:
		}
		if t != nil {
			t.Stop()
		}
	}
}

// push sends bytes on their way, or the end of the connection. Called with the network's
// mutex.
func (e *end) push(b []byte, over error) {
	p := e.out
	at := time.Now().Add(e.n.w.netRandom.between(e.n.delay/2, e.n.delay*2))
	if at.Before(p.last) {
		at = p.last
	}
	at = at.Add(time.Duration(int64(len(b)) * int64(time.Second) / e.n.rate))
	p.last = at
	if p.at > len(p.data)/2 && len(p.data)+len(b) > cap(p.data) {
		p.data, p.at = p.data[:copy(p.data, p.data[p.at:])], 0
	}
	if p.head > len(p.queue)/2 && len(p.queue) == cap(p.queue) {
		p.queue, p.head = p.queue[:copy(p.queue, p.waiting())], 0
	}
	p.data = append(p.data, b...)
	p.queue = append(p.queue, chunk{len(b), at, over})
	if len(p.waiting()) > 1 {
		return // the timer runs for those before
	}
	if p.stalled.After(at) {
		wakeup(p.read) // its deadline may come first
	} else {
		p.arrival.Reset(time.Until(at))
	}
}

func (e *end) Close() error {
	e.n.mu.Lock()
	defer e.n.mu.Unlock()
	if e.err != nil {
		return nil
	}
	e.finish(net.ErrClosed)
	var over error = syscall.ECONNRESET
	if e.n.w.netRandom.chance(0.5) {
		over = io.EOF
	}
	e.push(nil, over)
	return nil
}

// finish ends this side. Called with the network's mutex.
func (e *end) finish(err error) {
	if e.err != nil {
		return
	}
	e.err = err
	wakeup(e.in.read)
	wakeup(e.out.write)
}

func (e *end) SetReadDeadline(t time.Time) error {
	e.n.mu.Lock()
	e.rd = t
	e.n.mu.Unlock()
	wakeup(e.deadline)
	return nil
}

func (e *end) SetWriteDeadline(t time.Time) error {
	e.n.mu.Lock()
	e.wd = t
	e.n.mu.Unlock()
	return nil
}

func (e *end) SetDeadline(t time.Time) error {
	_ = e.SetReadDeadline(t)
	return e.SetWriteDeadline(t)
}

type address replication.NodeID

func (address) Network() string     { return "sim" }
func (a address) String() string    { return fmt.Sprintf("node%d", a) }
func (e *end) LocalAddr() net.Addr  { return address(e.out.from) }
func (e *end) RemoteAddr() net.Addr { return address(e.out.to) }

// block and heal change one direction between two nodes of the data network.
func (n *network) block(from, to replication.NodeID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.data.cut[from][to]++
	if n.data.cut[from][to] > 1 {
		return
	}
	n.data.since[from][to]++
	was := n.data.since[from][to]
	for side := range 2 {
		time.AfterFunc(patience+n.w.netRandom.between(0, 1500*time.Millisecond), func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.data.cut[from][to] == 0 || n.data.since[from][to] != was {
				return
			}
			for _, c := range n.conns {
				if e := c.ends[side]; e.joins(from, to) {
					e.timeOut()
				}
			}
		})
	}
}

// timeOut ends this side for want of answers; the other side learns it when it sends
// something and is reset. Called with the network's mutex.
func (e *end) timeOut() {
	if e.err == nil {
		e.finish(syscall.ETIMEDOUT)
		e.push(nil, syscall.ECONNRESET)
	}
}

func (e *end) joins(a, b replication.NodeID) bool {
	return e.out.from == a && e.out.to == b || e.out.from == b && e.out.to == a
}

func (n *network) heal(from, to replication.NodeID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.data.cut[from][to]--; n.data.cut[from][to] > 0 {
		return
	}
	n.data.since[from][to]++
	now := time.Now()
	for _, c := range n.conns {
		for _, e := range c.ends {
			if p := e.in; p.from == from && p.to == to {
				// What was held up comes with the sender's next repetition.
				late := now.Add(n.w.netRandom.between(0, time.Second))
				list := p.waiting()
				for i := range list {
					if list[i].due.Before(late) {
						list[i].due = late
					}
				}
				if p.last.Before(late) {
					p.last = late
				}
				wakeup(p.read)
			}
		}
	}
}

// stall holds up one direction of one connection; others between the same nodes pass it.
func (n *network) stall(r *random, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.conns) == 0 {
		return
	}
	p := n.conns[r.n(len(n.conns))].ends[r.n(2)].in
	p.stalled = time.Now().Add(d)
	n.w.note("stall", uint64(p.from), uint64(p.to), uint64(d))
}

// gone ends every connection of a process that ended. With its host alive the
// kernel says so; without, the other side learns it by its own patience or from the
// host that comes back.
func (n *network) gone(p *process, hostDown bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		for i, e := range c.ends {
			if e.p != p || e.err != nil {
				continue
			}
			e.finish(net.ErrClosed)
			if hostDown {
				// What is on its way arrives; then silence.
				other := c.ends[1-i]
				time.AfterFunc(patience+n.w.netRandom.between(0, 1500*time.Millisecond), func() {
					n.mu.Lock()
					defer n.mu.Unlock()
					other.timeOut()
				})
				continue
			}
			if n.w.netRandom.chance(0.5) {
				e.out.clear() // unread input: a reset overtakes what was sent
			}
			e.push(nil, syscall.ECONNRESET)
		}
	}
}

// transport is a node's way to the others.
type transport struct{ p *process }

func (t transport) Dial(ctx context.Context, to replication.NodeID) (net.Conn, error) {
	w, n := t.p.w, t.p.w.net
	t.p.gate()
	pause := func(d time.Duration) error {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		if err := pause(w.netRandom.between(n.delay, n.delay*6)); err != nil {
			return nil, err
		}
		n.mu.Lock()
		reach := n.data.both(t.p.id, to)
		n.mu.Unlock()
		q, hostUp := w.processAt(to)
		switch {
		case !reach || !hostUp || q != nil && q.isPaused():
			// SYNs are lost, or nobody answers the handshake.
			if err := pause(200 * time.Millisecond); err != nil {
				return nil, err
			}
			continue
		case q == nil:
			return nil, fmt.Errorf("node %d: %w", to, syscall.ECONNREFUSED)
		}
		t.p.gate()
		if t.p.isDead() {
			return nil, net.ErrClosed
		}
		mine, theirs := n.connect(t.p, q)
		if !q.accept(t.p.id, theirs) {
			theirs.Close()
		}
		return mine, nil
	}
}
