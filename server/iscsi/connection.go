package iscsi

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

const (
	// inputLen is the size of a receive buffer: room for the longest PDU and more
	// behind it. One read takes in as many commands as there are.
	inputLen = 512 << 10
	// minRead is the room that a read should have; with less the buffer is moved up.
	minRead = 128 << 10
	// directMin is the missing part of a Data-Out from which on it is read straight
	// into the task's buffer, past the receive buffer.
	directMin = 16 << 10
	// shortRead bounds a read while R2Ts are unanswered, so that the data behind
	// the first header go past the receive buffer.
	shortRead = 32 << 10
	// lingerTime and lingerBytes bound how long a connection that we end is read
	// from, so that our last PDU is not lost to a reset.
	lingerTime  = time.Second
	lingerBytes = 1 << 20
)

// Why a connection ends.
var (
	errDropped      = errors.New("connection dropped")
	errLogout       = errors.New("logout")
	errSlowWriter   = errors.New("initiator does not finish a PDU")
	errNoLogout     = errors.New("initiator was asked to log out and did not")
	errSlowReader   = errors.New("initiator does not take its replies")
	errNoPing       = errors.New("initiator does not answer pings")
	errGap          = errors.New("command number is missing")
	errHeaderDigest = errors.New("header digest is wrong")
	errProtocol     = errors.New("protocol error")
	errHeld         = errors.New("too much data sent ahead of a missing command number")
)

// connection is one TCP connection in full feature phase. Its goroutine, the
// reader, parses PDUs in place, starts commands and writes what was answered
// when no whole PDU is left. Completions on other goroutines append to the
// output under mu. A session has one connection, so what RFC 7143 keeps per
// session (the command window) stands here as well.
type connection struct {
	target  *Target
	conn    *net.TCPConn
	raw     syscall.RawConn
	portal  string
	peer    string
	address netip.Addr
	since   time.Time

	session *session // set before full feature phase
	params  parameters
	layout  pdu.Layout

	// The reader's own.
	in       []byte
	r, w     int // in[r:w] is not parsed yet
	checked  bool
	kickDue  bool
	flushDue bool
	taken    uint64       // PDUs processed
	pduOf    uint64       // taken when pduSince was set
	pduSince atomic.Int64 // Target.elapsed when the reader began to wait for the rest of a PDU, nanoseconds; 0: it does not
	text     []byte       // collected with C bits
	answer   []byte       // rest of a long text answer
	textOpen bool         // a text exchange goes on, with textTag
	textTag  uint32
	bytesIn  atomic.Uint64
	heard    atomic.Int64 // Target.elapsed at the last read, nanoseconds
	listens  atomic.Bool  // the reader is in Read

	dropped  atomic.Bool // read nothing more, start nothing more, send nothing more
	leaving  atomic.Bool // read nothing more, start nothing more
	reset    atomic.Bool // dropped, and the peer is not to know before its tasks are settled
	pushOnce func(fd uintptr) bool
	pushAll  func(fd uintptr) bool
	writers  sync.WaitGroup
	account  account

	spoke  atomic.Bool // has sent a login request
	pended bool        // in Target.pending, under Target.pendingMu

	mu          sync.Mutex
	changed     sync.Cond // writing, active or unsent went down, or a second has passed
	full        bool      // full feature phase: PDUs may be sent unasked
	closed      bool      // no output is taken any more
	cause       error     // why it was cut
	busy        bool      // the reader is awake and will flush before it sleeps
	writing     bool
	out, spare  *batch
	write       writeState // belongs to whoever set writing
	statSN      uint32
	window      window
	ttt         uint32
	tags        tagTable
	freeTasks   *task
	tasks       int // in tags
	active      int // not parked
	immediates  int
	managements []uint32 // initiator task tags of task management functions under way
	held        []heldPDU
	heldBytes   int
	solicited   int           // R2Ts unanswered
	gapSince    time.Duration // Target.elapsed when held became more than nothing
	pinged      time.Duration // Target.elapsed at our ping; 0: none is out
	pingTag     uint32
	closeAt     time.Duration // after a logout request: when it ends; 0: never
	answered    bool          // a last answer was given: a drop is to let it through

	commands, bytesOut, failures, aborted, waits, refusals, stalls, droppedPDUs, digestErrors uint64
}

// newConnection wraps an accepted TCP connection.
func newConnection(t *Target, conn *net.TCPConn) (*connection, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &connection{
		target: t, conn: conn, raw: raw,
		portal: conn.LocalAddr().String(),
		peer:   conn.RemoteAddr().String(),
		since:  t.now(),
		out:    &batch{}, spare: &batch{},
		statSN: t.firstStatSN,
	}
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		c.address = a.AddrPort().Addr().Unmap()
	}
	c.changed.L = &c.mu
	c.pushOnce = func(fd uintptr) bool { c.write.push(fd); return true }
	c.pushAll = c.write.push
	// A peer that is frozen but does not close must not hold on for hours.
	err = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(t.limits.WriteTime.Milliseconds()))
	})
	if err != nil {
		return nil, err
	}
	if err := conn.SetNoDelay(true); err != nil {
		return nil, err
	}
	return c, nil
}

// serve runs full feature phase until the connection ends, and says why.
func (c *connection) serve() error {
	c.heard.Store(int64(c.target.elapsed()))
	c.mu.Lock()
	c.full = true
	if c.closeAt > 0 { // asked for before its login had ended
		left := max(c.closeAt-c.target.elapsed(), time.Second)
		c.asyncLocked(pdu.AsyncLogoutRequest, 0, uint16(left/time.Second))
	}
	c.mu.Unlock()
	for {
		if c.dropped.Load() || c.leaving.Load() {
			return c.why(errDropped)
		}
		missing, err := c.next()
		if err != nil {
			return c.why(err)
		}
		if missing > 0 {
			if err := c.fill(missing); err != nil {
				return c.why(err)
			}
		}
		if c.flushDue {
			c.flushDue = false
			c.flush()
			c.mu.Lock()
			untaken := c.unsentLocked() > c.target.limits.Unsent
			c.mu.Unlock()
			if untaken {
				c.settle(false)
				c.awake()
			}
		}
	}
}

// why prefers the reason for which the connection was cut to its consequence.
func (c *connection) why(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return c.cause
	}
	return err
}

// next processes one PDU of the receive buffer, or returns the number of bytes
// that a PDU needs from r on.
func (c *connection) next() (missing int, err error) {
	have := c.w - c.r
	if have < pdu.HeaderLen {
		return pdu.HeaderLen, nil
	}
	h := (*pdu.Header)(c.in[c.r:])
	start := c.layout.DataStart(h)
	if !c.checked {
		if c.layout.HeaderDigest {
			if have < start {
				return start, nil
			}
			head := c.in[c.r : c.r+start-pdu.DigestLen]
			if pdu.Digest(head) != pdu.GetDigest(c.in[c.r+len(head):]) {
				c.countDigestError()
				return 0, errHeaderDigest
			}
		}
		if err := c.checkHeader(h); err != nil {
			return 0, err
		}
		c.checked = true
	}
	size := c.layout.Size(h)
	if have < size {
		if h.Opcode() == pdu.OpDataOut && have >= start && size-have >= directMin {
			done, err := c.directDataOut(h, start)
			if done || err != nil {
				return 0, err
			}
		}
		return size, nil
	}
	n := h.DataLen()
	data := c.in[c.r+start : c.r+start+n : c.r+start+n]
	bad := false
	if c.layout.DataDigest && n > 0 {
		at := c.r + start + n + pdu.Pad(n)
		bad = pdu.Digest(c.in[c.r+start:at]) != pdu.GetDigest(c.in[at:])
		if bad {
			c.countDigestError()
		}
	}
	c.r += size
	c.taken++
	c.checked = false
	return 0, c.sequence(h, c.in[c.r-size:c.r], data, bad)
}

// checkHeader refuses what cannot be taken before anything is done by its
// lengths: unknown types, overlong data.
func (c *connection) checkHeader(h *pdu.Header) error {
	op := h.Opcode()
	switch op {
	case pdu.OpSCSICommand, pdu.OpTaskRequest, pdu.OpDataOut:
		if c.session.discovery {
			c.reject(pdu.RejectProtocol, h)
			return fmt.Errorf("opcode %#x in a discovery session: %w", op, errProtocol)
		}
	case pdu.OpNopOut, pdu.OpTextRequest, pdu.OpLogout, pdu.OpSNACK:
	case pdu.OpLoginRequest:
		c.reject(pdu.RejectProtocol, h)
		return fmt.Errorf("login in full feature phase: %w", errProtocol)
	default:
		c.reject(pdu.RejectUnsupported, h)
		return fmt.Errorf("opcode %#x: %w", op, errProtocol)
	}
	if h.DataLen() > maxRecvSegment {
		c.reject(pdu.RejectProtocol, h)
		return fmt.Errorf("data segment of %d bytes: %w", h.DataLen(), errProtocol)
	}
	if h.AHSLen() > 0 && op != pdu.OpSCSICommand {
		c.reject(pdu.RejectProtocol, h)
		return fmt.Errorf("additional header segment with opcode %#x: %w", op, errProtocol)
	}
	return nil
}

// fill reads more, so that the PDU at r may get complete with need bytes. What
// was answered is sent before the reader may have to wait.
func (c *connection) fill(need int) error {
	limit := c.settle(c.r < c.w)
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if c.r+need > len(c.in) || len(c.in)-c.w < minRead && c.r > 0 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	end := len(c.in)
	if limit > 0 {
		end = min(end, max(c.r+need, c.w+limit))
	}
	n, err := c.read(c.in[c.w:end])
	if err != nil {
		return err
	}
	c.w += n
	c.awake()
	return nil
}

// read is one read from the socket. While it lasts the initiator's silence counts.
func (c *connection) read(p []byte) (int, error) {
	c.listens.Store(true)
	n, err := c.conn.Read(p)
	c.listens.Store(false)
	c.bytesIn.Add(uint64(n))
	return n, err
}

// readFull reads all of p.
func (c *connection) readFull(p []byte) error {
	for len(p) > 0 {
		n, err := c.read(p)
		if err != nil {
			return err
		}
		c.heard.Store(int64(c.target.elapsed()))
		p = p[n:]
	}
	return nil
}

// settle is called before the reader may sleep: it sends what was answered and
// starts what was queued. Answers go first: Kick may do I/O, and an answer that
// is there already must not wait for it. Partial says that a part of a PDU has
// come; the rest has a time to come, whatever it trickles in at. It returns a
// bound for the next read, 0 for none.
func (c *connection) settle(partial bool) (limit int) {
	c.mu.Lock()
	c.busy = false
	pending := c.out.size > 0
	if c.solicited > 0 {
		limit = shortRead
	}
	c.mu.Unlock()
	if pending {
		c.flush()
	}
	if c.kickDue {
		c.kickDue = false
		c.target.device.Kick()
		c.flush()
	}
	switch {
	case !partial:
		c.pduSince.Store(0)
	case c.pduSince.Load() == 0 || c.pduOf != c.taken:
		c.pduOf = c.taken
		c.pduSince.Store(int64(c.target.elapsed()))
	}
	return limit
}

// awake follows settle. It notes that the initiator was heard, and waits while
// it leaves too many replies untaken.
func (c *connection) awake() {
	c.heard.Store(int64(c.target.elapsed()))
	c.mu.Lock()
	for c.unsentLocked() > c.target.limits.Unsent && c.cause == nil {
		c.pduSince.Store(0) // it is our turn to wait
		c.changed.Wait()
	}
	c.busy = true
	c.mu.Unlock()
}

// directDataOut takes a Data-Out whose data are not all there: what is buffered
// is copied, the rest read into the task's buffer. It declines when part of the
// data is to be discarded.
func (c *connection) directDataOut(h *pdu.Header, start int) (done bool, err error) {
	n := h.DataLen()
	c.mu.Lock()
	t, dst, err := c.acceptDataLocked(h)
	if err != nil || t == nil || len(dst) != n {
		c.mu.Unlock()
		return false, nil // the ordinary way deals with it when all is there
	}
	t.busy = true
	c.mu.Unlock()
	header := *h // the receive buffer is used again below
	c.settle(true)
	buffered := copy(dst, c.in[c.r+start:c.w])
	c.r, c.w, c.checked = 0, 0, false
	err = c.readFull(dst[buffered:])
	tail := c.in[:c.layout.Tail(n)]
	if err == nil && len(tail) > 0 {
		err = c.readFull(tail)
	}
	c.taken++
	c.awake()
	bad := false
	if err == nil && c.layout.DataDigest {
		pad := pdu.Pad(n)
		bad = pdu.UpdateDigest(pdu.Digest(dst), tail[:pad]) != pdu.GetDigest(tail[pad:])
		if bad {
			c.countDigestError()
		}
	}
	if err != nil {
		c.mu.Lock()
		t.busy = false
		c.mu.Unlock()
		return false, err
	}
	c.dataArrived(t, &header, bad)
	return true, nil
}

func (c *connection) countDigestError() {
	c.mu.Lock()
	c.digestErrors++
	c.mu.Unlock()
}

// cutLocked ends the connection from any goroutine; the reader notices and
// cleans up.
func (c *connection) cutLocked(cause error) {
	if c.cause == nil {
		c.cause = cause
	}
	c.dropped.Store(true)
	_ = c.conn.Close()
	c.changed.Broadcast()
}

// cut is cutLocked; with reset the peer gets an RST and what was not sent is
// thrown away, when the reader has aborted the tasks: who learns of the end before
// may be faster with another path than a task with its effect.
func (c *connection) cut(cause error, reset bool) {
	c.mu.Lock()
	if c.answered && reset {
		c.leaveLocked(cause)
		c.mu.Unlock()
		return
	}
	c.dropped.Store(true)
	if reset && c.conn.SetLinger(0) == nil && c.full {
		c.reset.Store(true)
		c.wakeLocked(cause, c.conn.SetDeadline)
	} else {
		c.cutLocked(cause)
	}
	c.mu.Unlock()
}

// leaveLocked lets the reader end the connection: its next read fails, then it
// sends what is left and closes.
func (c *connection) leaveLocked(cause error) {
	c.leaving.Store(true)
	c.wakeLocked(cause, c.conn.SetReadDeadline)
}

// wakeLocked has the reader notice that the connection is to end, and why: a deadline that has
// passed ends what it waits for.
func (c *connection) wakeLocked(cause error, deadline func(time.Time) error) {
	if c.cause == nil {
		c.cause = cause
	}
	c.changed.Broadcast()
	if deadline(time.Now()) != nil {
		c.cutLocked(cause)
	}
}

// finish sends what is left, as far as the peer takes it in time.
func (c *connection) finish() {
	c.flush()
	expired := false
	timer := time.AfterFunc(lingerTime, func() {
		c.mu.Lock()
		expired = true
		c.changed.Broadcast()
		c.mu.Unlock()
	})
	defer timer.Stop()
	c.mu.Lock()
	for c.writing && !expired {
		c.changed.Wait()
	}
	c.mu.Unlock()
}

// linger closes a connection for writing and reads on for a moment: closing a
// socket with unread input would reset it, and the peer might lose what we sent
// last.
func linger(conn *net.TCPConn, scratch []byte) {
	if conn.CloseWrite() != nil {
		return
	}
	if conn.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	for total := 0; total < lingerBytes; {
		n, err := conn.Read(scratch)
		if err != nil {
			return
		}
		total += n
	}
}

// shut ends all tasks and waits until the device server has none of them, no
// write is under way and all memory is given back. Gracefully, the peer gets to
// read what was sent.
func (c *connection) shut(gracefully bool) {
	c.mu.Lock()
	c.closed = true
	c.endParkedLocked(func(*task) bool { return true })
	c.mu.Unlock()
	if gracefully {
		linger(c.conn, c.in)
	}
	c.dropped.Store(true)
	reset := c.reset.Load()
	if !reset {
		_ = c.conn.Close()
	}
	if c.session != nil && c.session.nexus != nil {
		c.target.device.AbortNexus(c.session.nexus)
	}
	if reset {
		c.target.settle()
		_ = c.conn.Close()
	}
	c.mu.Lock()
	for c.active > 0 || len(c.managements) > 0 || c.writing {
		c.changed.Wait()
	}
	c.dropOutputLocked()
	c.held, c.heldBytes = nil, 0
	c.mu.Unlock()
	c.writers.Wait()
}

// dropOutputLocked forgets what nobody will send any more.
func (c *connection) dropOutputLocked() {
	for _, i := range c.out.inserts {
		c.target.buffers.release(i.lease)
	}
	c.out.empty()
}

// endParkedLocked ends the parked tasks that match, without a response. The
// lock is let go meanwhile.
func (c *connection) endParkedLocked(match func(*task) bool) {
	for {
		var t *task
		for i := range c.tags {
			for k := c.tags[i]; k != nil && t == nil; k = k.next {
				if k.state == taskCollecting && !k.busy && match(k) {
					t = k
				}
			}
		}
		if t == nil {
			return
		}
		if !c.unqueueLocked(t) {
			continue
		}
		c.resumeLocked(t)
		if t.begun {
			c.mu.Unlock()
			c.forget(t)
			c.mu.Lock()
		}
		c.aborted++
		c.freeTaskLocked(t)
	}
}
