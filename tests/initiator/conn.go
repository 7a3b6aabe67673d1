package initiator

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
)

// Config is an initiator port and what it logs in to.
type Config struct {
	Addr          string // host:port of the portal
	InitiatorName string
	TargetName    string // none for a discovery session
	ISID          [6]byte
	TSIH          uint16 // 0 is a new session
	CID           uint16
	CmdSN         uint32 // of the first command

	CHAP         *CHAP // nil is AuthMethod=None
	SkipSecurity bool  // begin with the operational stage
	SecurityKeys []Key // more of them in the first request
	Keys         []Key // operational ones; nil is DefaultKeys
	LoginSegment int   // split longer texts of a login by the C bit; 0 is never

	// Outgoing sees, and may change, every PDU that the initiator is about to send,
	// in order. It is called with the connection locked: it must not call Conn.
	Outgoing func(*PDU)
	// Incoming sees every PDU of the full feature phase that the target sends, in
	// order, before it is checked. It is called with the connection locked.
	Incoming func(*PDU)
	// KeepPings leaves the target's pings without an answer. They are events.
	KeepPings bool
}

// ErrClosed is what unfinished requests end with after Close.
var ErrClosed = errors.New("initiator closed the connection")

// eventsMax bounds the events that nobody fetches; more is an error of the test.
const eventsMax = 1024

// Conn is a session of one connection. It is safe for concurrent use.
type Conn struct {
	cfg      Config
	nc       net.Conn
	r        *bufio.Reader
	params   Params // fixed by the login
	loginITT uint32
	wg       sync.WaitGroup

	mu        sync.Mutex
	changed   sync.Cond // any of the following
	cmdSN     uint32    // of the next command that is not immediate
	expCmdSN  uint32    // the newest of the target
	maxCmdSN  uint32
	expStatSN uint32 // of the next response
	nextITT   uint32
	tasks     map[uint32]*Task
	requests  map[uint32]*request
	queue     []*PDU // to be written
	events    []*PDU
	full      bool // in full feature phase: the goroutines run
	err       error
}

// Open connects without a login. Login, or Exchange, comes next.
func Open(ctx context.Context, cfg Config) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", cfg.Addr)
	if err != nil {
		return nil, err
	}
	return open(nc, cfg), nil
}

func open(nc net.Conn, cfg Config) *Conn {
	c := &Conn{
		cfg: cfg, nc: nc, r: bufio.NewReaderSize(nc, 64<<10),
		cmdSN: cfg.CmdSN, loginITT: 0x10001, nextITT: 1,
		tasks: map[uint32]*Task{}, requests: map[uint32]*request{},
	}
	c.changed.L = &c.mu
	return c
}

// Dial connects and logs in.
func Dial(ctx context.Context, cfg Config) (*Conn, error) {
	c, err := Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := c.Login(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Params is what the login agreed on.
func (c *Conn) Params() Params { return c.params }

// Window gives the target's newest ExpCmdSN and MaxCmdSN, and the CmdSN of the next command.
func (c *Conn) Window() (expCmdSN, maxCmdSN, next uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.expCmdSN, c.maxCmdSN, c.cmdSN
}

func (c *Conn) startFullFeature() {
	c.mu.Lock()
	c.full = true
	c.mu.Unlock()
	c.wg.Go(c.readLoop)
	c.wg.Go(c.writeLoop)
}

// Close ends the connection without a logout: the target sees a lost one.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	c.wg.Wait()
	return nil
}

// Abort closes with a reset instead of an orderly end.
func (c *Conn) Abort() {
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	c.Close()
}

// fail ends the connection for the given reason, if it is the first.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	for _, t := range c.tasks {
		t.end(c.err)
	}
	clear(c.tasks)
	for _, r := range c.requests {
		r.end(nil, c.err)
	}
	clear(c.requests)
	c.changed.Broadcast()
	c.mu.Unlock()
	c.nc.Close()
}

// Done waits for the end of the connection and returns its reason: io.EOF when the
// target closed it, a *Violation, ErrClosed, or another error of the network.
func (c *Conn) Done(ctx context.Context) error {
	if err := c.lockWhen(ctx, func() bool { return c.err != nil }); err != nil {
		return err
	}
	defer c.mu.Unlock()
	return c.err
}

// lockWhen waits for a condition over what mu guards, or for the end of the
// connection, and returns with mu locked. On the context's error it is not.
func (c *Conn) lockWhen(ctx context.Context, cond func() bool) error {
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changed.Broadcast()
	})
	defer stop()
	c.mu.Lock()
	for !cond() && c.err == nil {
		if ctx.Err() != nil {
			c.mu.Unlock()
			return ctx.Err()
		}
		c.changed.Wait()
	}
	return nil
}

// Send queues a PDU as it is, with digests as agreed. ExpStatSN is not filled in.
func (c *Conn) Send(p *PDU) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sendLocked(p)
}

func (c *Conn) sendLocked(p *PDU) error {
	if c.err != nil {
		return c.err
	}
	if !c.full {
		return errors.New("initiator: Send before the full feature phase")
	}
	if c.cfg.Outgoing != nil && p.raw == nil {
		c.cfg.Outgoing(p)
	}
	if !p.Drop {
		c.queue = append(c.queue, p)
		c.changed.Broadcast()
	}
	return nil
}

// SendBytes puts bytes on the wire, after all that is queued.
func (c *Conn) SendBytes(b []byte) error {
	return c.Send(&PDU{raw: b})
}

// Event gives the next PDU that belongs to no request: Reject, Async Message, a
// ping with KeepPings.
func (c *Conn) Event(ctx context.Context) (*PDU, error) {
	if err := c.lockWhen(ctx, func() bool { return len(c.events) > 0 }); err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	if len(c.events) == 0 {
		return nil, c.err
	}
	p := c.events[0]
	c.events = c.events[1:]
	return p, nil
}

func (c *Conn) writeLoop() {
	var buf []byte
	for {
		c.mu.Lock()
		for len(c.queue) == 0 && c.err == nil {
			c.changed.Wait()
		}
		if c.err != nil {
			c.mu.Unlock()
			return
		}
		queue := c.queue
		c.queue = nil
		c.mu.Unlock()
		for i, p := range queue {
			buf = p.appendTo(buf, c.params.HeaderDigest, c.params.DataDigest)
			if len(buf) < 1<<18 && i < len(queue)-1 {
				continue
			}
			if _, err := c.nc.Write(buf); err != nil {
				// The reader knows better why: it may still have an answer to take.
				return
			}
			buf = buf[:0]
		}
	}
}

func (c *Conn) readLoop() {
	for {
		p, err := readPDU(c.r, c.params.HeaderDigest, c.params.DataDigest, c.params.ReceiveLimit)
		if err == nil {
			c.mu.Lock()
			if c.cfg.Incoming != nil {
				c.cfg.Incoming(p)
			}
			err = c.deliver(p)
			c.changed.Broadcast()
			c.mu.Unlock()
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

// before says that a comes before b in the serial arithmetic of section 4.2.2.1.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// deliver checks and dispatches a PDU of the full feature phase.
func (c *Conn) deliver(p *PDU) error {
	if err := c.checkNumbers(p); err != nil {
		return err
	}
	switch p.Opcode() {
	case OpDataIn, OpResponse, OpR2T:
		t := c.tasks[p.ITT()]
		if t == nil {
			return violation("11.2.1.8", "no task has the tag of %v", p)
		}
		return c.deliverTask(t, p)
	case OpNopIn:
		if p.ITT() == NoTag {
			return c.deliverPing(p)
		}
	case OpReject:
		if p.ITT() != NoTag || len(p.Data) < headerLen {
			return violation("11.17", "%v", p)
		}
		c.deliverReject(p)
		return c.event(p)
	case OpAsync:
		return c.event(p)
	}
	r := c.requests[p.ITT()]
	if r == nil || r.answer != p.Opcode() {
		return violation("11.2.1.8", "no request waits for %v", p)
	}
	delete(c.requests, p.ITT())
	if r.onAnswer != nil {
		r.onAnswer(p)
	}
	r.end(p, nil)
	return nil
}

func (c *Conn) event(p *PDU) error {
	if len(c.events) == eventsMax {
		return fmt.Errorf("initiator: %d events that nobody fetched", eventsMax)
	}
	c.events = append(c.events, p)
	return nil
}

// checkNumbers follows ExpCmdSN and MaxCmdSN (section 11.4.6 and 7) and StatSN
// (section 11.4.5; 4.2.2.2).
func (c *Conn) checkNumbers(p *PDU) error {
	op := p.Opcode()
	switch op {
	case OpNopIn, OpResponse, OpTaskManagementResponse, OpTextResponse, OpDataIn, OpLogoutResponse, OpR2T, OpAsync, OpReject:
	default:
		return violation("11.2.1.2", "opcode in full feature phase: %v", p)
	}
	if p.BHS[0]&0xc0 != 0 {
		return violation("11.2.1", "reserved bits of byte 0 in %v", p)
	}
	exp, most := p.U32(28), p.U32(32)
	switch {
	case before(exp, c.expCmdSN):
		return violation("4.2.2.1", "ExpCmdSN %d after %d in %v", exp, c.expCmdSN, p)
	case before(c.cmdSN, exp) && !c.cfg.loose():
		return violation("4.2.2.1", "ExpCmdSN %d, but %d is not sent yet", exp, c.cmdSN)
	case before(most, c.maxCmdSN):
		return violation("4.2.2.1", "MaxCmdSN %d after %d in %v", most, c.maxCmdSN, p)
	case before(most, exp-1):
		return violation("4.2.2.1", "MaxCmdSN %d and ExpCmdSN %d in %v", most, exp, p)
	}
	c.expCmdSN, c.maxCmdSN = exp, most
	if op == OpDataIn && p.BHS[1]&1 == 0 {
		return nil // no status, no StatSN
	}
	if got := p.U32(24); got != c.expStatSN {
		return violation("4.2.2.2", "StatSN %d, expected %d, in %v", got, c.expStatSN, p)
	}
	if op != OpR2T && (op != OpNopIn || p.ITT() != NoTag) {
		c.expStatSN++
	}
	return nil
}

// loose: a test that rewrites PDUs may have numbered them its own way.
func (cfg *Config) loose() bool { return cfg.Outgoing != nil }

func (c *Conn) deliverPing(p *PDU) error {
	ttt := p.U32(20)
	if c.cfg.KeepPings {
		return c.event(p)
	}
	if ttt == NoTag {
		return nil // the target only shows its numbers
	}
	r := NewPDU(OpNopOut|Immediate, NoTag)
	copy(r.BHS[8:16], p.BHS[8:16])
	r.Put32(20, ttt)
	r.Put32(24, c.cmdSN)
	r.Put32(28, c.expStatSN)
	return c.sendLocked(r)
}

// takeITT gives a tag that nothing uses.
func (c *Conn) takeITT() uint32 {
	for {
		itt := c.nextITT
		c.nextITT++
		if _, used := c.tasks[itt]; itt != NoTag && !used && c.requests[itt] == nil {
			return itt
		}
	}
}
