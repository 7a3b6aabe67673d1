package lab

import (
	"net"
	"sync"
	"time"
)

// Line is a cable between two machines: it takes so many bytes a second in each direction,
// all connections that are put on it together, and delivers them after a delay. What is
// under way or waits to be sent is bounded as it is by the kernel's buffers for a socket.
type Line struct {
	there, back lane
}

// lane is one direction of a line.
type lane struct {
	mu    sync.Mutex
	rate  float64 // bytes a second; 0: no limit
	delay time.Duration
	free  time.Time // when the last byte that was sent has left
}

const (
	linePiece  = 64 << 10 // longer ones are sent in pieces
	linePieces = 128      // of one direction of a connection that are under way
)

// Set changes what the line takes, in bytes a second (0: everything at once), and the time
// that a byte needs from one end to the other.
func (l *Line) Set(bytesPerSecond int64, delay time.Duration) {
	for _, a := range []*lane{&l.there, &l.back} {
		a.mu.Lock()
		a.rate, a.delay = float64(bytesPerSecond), delay
		a.mu.Unlock()
	}
}

// arrives is when the last of n bytes that are sent now is at the other end.
func (a *lane) arrives(n int) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now := time.Now(); a.free.Before(now) {
		a.free = now
	}
	if a.rate > 0 {
		a.free = a.free.Add(time.Duration(float64(n) / a.rate * 1e9))
	}
	return a.free.Add(a.delay)
}

// Put makes c run over the line. It takes one end of the connection, and limits both
// directions there. Close waits for what it started.
func (l *Line) Put(c net.Conn) net.Conn {
	x := &lineConn{Conn: c, line: l, closed: make(chan struct{}), out: newFlow(), in: newFlow()}
	x.group.Go(func() { // out -> line -> c
		for p := range x.arriving(x.out) {
			if _, err := c.Write(p.data); err != nil {
				x.out.fail(err)
				return
			}
			x.out.spare <- p.data[:0]
		}
	})
	x.group.Go(func() { // c -> line -> in
		for {
			buf, ok := x.room(x.in)
			if !ok {
				return
			}
			n, err := c.Read(buf[:linePiece])
			if n > 0 {
				x.in.pieces <- piece{buf[:n], l.back.arrives(n)} // there are as many places as buffers
			}
			if err != nil {
				x.in.fail(err)
				return
			}
		}
	})
	return x
}

// flow is what is under way in one direction of a connection. A buffer is with the sender,
// on the line, with the receiver, or spare.
type flow struct {
	pieces chan piece
	spare  chan []byte
	failed chan struct{} // closed after err was set
	once   sync.Once
	err    error
}

type piece struct {
	data []byte
	due  time.Time
}

func newFlow() *flow {
	f := &flow{pieces: make(chan piece, linePieces), spare: make(chan []byte, linePieces), failed: make(chan struct{})}
	for range linePieces {
		f.spare <- nil
	}
	return f
}

func (f *flow) fail(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.failed)
	})
}

type lineConn struct {
	net.Conn
	line   *Line
	out    *flow
	in     *flow
	rest   []byte // of the piece that is being read
	whole  []byte
	closed chan struct{}
	once   sync.Once
	group  sync.WaitGroup
}

// room is a spare buffer; false when the connection is closed or the flow has failed.
func (x *lineConn) room(f *flow) ([]byte, bool) {
	select {
	case b := <-f.spare:
		if b == nil {
			b = make([]byte, linePiece)
		}
		return b, true
	case <-f.failed:
	case <-x.closed:
	}
	return nil, false
}

// next waits until the next piece has arrived.
func (x *lineConn) next(f *flow) (piece, bool) {
	select {
	case p := <-f.pieces:
		return x.due(p)
	default:
	}
	select {
	case p := <-f.pieces:
		return x.due(p)
	case <-f.failed:
		select {
		case p := <-f.pieces: // it was sent before
			return x.due(p)
		default:
		}
	case <-x.closed:
	}
	return piece{}, false
}

func (x *lineConn) due(p piece) (piece, bool) {
	if d := time.Until(p.due); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-x.closed:
			return p, false
		}
	}
	return p, true
}

// arriving are the pieces of a flow, each when it has arrived.
func (x *lineConn) arriving(f *flow) func(func(piece) bool) {
	return func(yield func(piece) bool) {
		for {
			if p, ok := x.next(f); !ok || !yield(p) {
				return
			}
		}
	}
}

// Write implements net.Conn: it returns when the line has taken all of p, as a socket does.
func (x *lineConn) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		buf, ok := x.room(x.out)
		if !ok {
			select {
			case <-x.out.failed:
				return sent, x.out.err
			default:
				return sent, net.ErrClosed
			}
		}
		n := copy(buf[:linePiece], p[sent:])
		x.out.pieces <- piece{buf[:n], x.line.there.arrives(n)}
		sent += n
	}
	return sent, nil
}

// Read implements net.Conn. One goroutine reads.
func (x *lineConn) Read(p []byte) (int, error) {
	if len(x.rest) == 0 {
		next, ok := x.next(x.in)
		if !ok {
			select {
			case <-x.in.failed:
				return 0, x.in.err
			default:
				return 0, net.ErrClosed
			}
		}
		x.rest, x.whole = next.data, next.data
	}
	n := copy(p, x.rest)
	if x.rest = x.rest[n:]; len(x.rest) == 0 {
		x.in.spare <- x.whole[:0]
	}
	return n, nil
}

// Close implements net.Conn.
func (x *lineConn) Close() error {
	x.once.Do(func() { close(x.closed) })
	err := x.Conn.Close()
	x.group.Wait()
	return err
}
