package iscsi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/twinsan/twinsan/server/scsi"
)

// DeviceServer is what the target needs of the SCSI device server. Its methods
// may be called concurrently, for one task one after the other. See scsi.Task
// for who owns a task and its buffers when.
type DeviceServer interface {
	// Attach makes the nexus of a session that has just logged in.
	Attach(initiator string, isid [6]byte) (*scsi.Nexus, error)
	// Detach gives a nexus up, by logout or (lost) otherwise. Its tasks have ended.
	Detach(n *scsi.Nexus, lost bool)
	// Release gives up what a nexus that logs out holds until then, and waits for
	// that, at most limit.
	Release(n *scsi.Nexus, limit time.Duration)
	// AbortNexus ends the tasks of a nexus whose connection is gone, as far as they
	// need not be waited for.
	AbortNexus(n *scsi.Nexus)
	// Begin decodes a command. It does not block.
	Begin(t *scsi.Task) scsi.Verdict
	// TryExecute ends a task now if that needs no waiting. It is called with a lock
	// of the connection held and must not call back.
	TryExecute(t *scsi.Task) bool
	// Execute starts a task; t.Complete follows.
	Execute(t *scsi.Task)
	// Forget ends a task that will never be executed.
	Forget(t *scsi.Task)
	// TaskManagement performs a function; done is called once, on any goroutine,
	// when no effect of an aborted task can appear any more.
	TaskManagement(n *scsi.Nexus, f scsi.TaskFunction, lun uint64, ref *scsi.Task, done func(scsi.TaskResponse))
	// Kick starts what Execute queued. It may do I/O.
	Kick()
}

// Directory knows the initiators and portals of the cluster. Its methods are
// called during logins and discovery, concurrently; they should not block.
// Initiator names are given in lower case.
type Directory interface {
	// Access tells whether an initiator may log in to the target, and with which secrets.
	Access(initiator string) (Access, bool)
	// Discovery tells the same for discovery sessions.
	Discovery(initiator string) (Access, bool)
	// Portals lists the portals of all nodes at which an initiator finds the target.
	Portals(initiator string) []Portal
	// Redirect names the portal that an initiator is to use for now instead of this
	// node. It must be one that is alive and does not redirect.
	Redirect(initiator string) (addr string, ok bool)
}

// Access is how an initiator proves itself, and the target to it.
type Access struct {
	User, Secret             string // CHAP name and secret; User "": no authentication
	MutualUser, MutualSecret string // ours, when the initiator asks; must differ from Secret
}

// Portal is an address at which a node serves the target.
type Portal struct {
	Addr  string // "ip:port", IPv6 in brackets
	Group uint16 // target portal group tag
}

// Config is what a Target is made of.
type Config struct {
	TargetName string   // the iSCSI name, the same on every node
	PortGroup  uint16   // this node's target portal group tag, not 0
	Listen     []string // "host:port" of each portal, IPv4 or [IPv6]
	Device     DeviceServer
	Directory  Directory
	Limits     Limits
	Logger     *slog.Logger     // nil: nothing is logged
	Now        func() time.Time // nil: time.Now. Socket deadlines always use real time
	// Available says whether normal sessions may log in now; else they are told to
	// come back later. Nil: always.
	Available func() bool
	// Settle is called when connections are dropped, between the abort of their tasks
	// and the moment when the initiator learns of it: it returns when none of them can take
	// effect any more elsewhere, within two seconds. May be nil.
	Settle func()
	// Event is called for logins and ends of sessions. It must not block. May be nil.
	Event func(Event)

	firstStatSN uint32 // where connections begin to number; any value is good
}

// EventKind says what happened.
type EventKind uint8

const (
	// LoginSucceeded: a session has begun or got a new connection.
	LoginSucceeded EventKind = iota + 1
	// LoginFailed: see Status.
	LoginFailed
	// ConnectionEnded: see Reason.
	ConnectionEnded
)

// Event is something that an administrator may want to know.
type Event struct {
	Kind      EventKind
	Initiator string // "" when it did not say
	Peer      string // its address
	Portal    string // our address
	Discovery bool
	Status    uint16 // login status, class and detail (RFC 7143 section 11.13.5)
	Reason    string // for people
}

// ErrClosed is returned by Start after Close.
var ErrClosed = errors.New("iSCSI target is closed")

// Target serves one iSCSI target name on the portals of one node. It lives from
// New over Start to Close.
type Target struct {
	name      string
	limits    Limits
	listen    []string
	device    DeviceServer
	directory Directory
	log       *slog.Logger
	now       func() time.Time
	born      time.Time
	available func() bool
	settle    func()
	event     func(Event)
	login     loginConfig
	buffers   *bufferPool
	guard     guard
	counters  counters

	firstStatSN uint32

	stop      chan struct{} // closed by Close
	running   sync.WaitGroup
	closeOnce sync.Once

	pendingMu sync.Mutex
	pending   []*connection // with output that was completed on other goroutines

	mu        sync.Mutex
	started   bool
	closing   bool
	listeners []net.Listener
	sessions  map[sessionKey]*session
	byTSIH    map[uint16]*session
	halfOpen  []*connection // in login phase, oldest first
	logins    map[uint16]uint64
}

// New checks a configuration and returns a target that does not listen yet.
func New(c Config) (*Target, error) {
	switch {
	case c.TargetName == "" || !validName(c.TargetName):
		return nil, fmt.Errorf("target name %q is not an iSCSI name", c.TargetName)
	case c.PortGroup == 0:
		return nil, errors.New("target portal group tag is 0")
	case len(c.Listen) == 0:
		return nil, errors.New("no portal to listen on")
	case c.Device == nil || c.Directory == nil:
		return nil, errors.New("device server or directory is missing")
	}
	t := &Target{
		name:      strings.ToLower(c.TargetName),
		limits:    c.Limits.withDefaults(),
		listen:    c.Listen,
		device:    c.Device,
		directory: c.Directory,
		log:       c.Logger,
		now:       c.Now,
		available: c.Available,
		settle:    c.Settle,
		event:     c.Event,

		firstStatSN: c.firstStatSN,

		stop:     make(chan struct{}),
		sessions: make(map[sessionKey]*session),
		byTSIH:   make(map[uint16]*session),
		logins:   make(map[uint16]uint64),
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	if t.now == nil {
		t.now = time.Now
	}
	if t.event == nil {
		t.event = func(Event) {}
	}
	if t.available == nil {
		t.available = func() bool { return true }
	}
	if t.settle == nil {
		t.settle = func() {}
	}
	t.born = t.now()
	t.buffers = newBufferPool(t.limits.Buffers)
	t.login.target, t.login.group, t.login.limits = t.name, c.PortGroup, &t.limits
	t.login.directory, t.login.challenges, t.login.random = c.Directory, &challengeLedger{}, rand.Reader
	return t, nil
}

// elapsed is the time since the target was made, and a nanosecond: 0 stands for
// never.
func (t *Target) elapsed() time.Duration { return t.now().Sub(t.born) + 1 }

// Start listens on all portals and serves them until Close or until ctx ends.
// On an error nothing listens.
func (t *Target) Start(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closing || t.started {
		return ErrClosed
	}
	for _, addr := range t.listen {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			for _, l := range t.listeners {
				_ = l.Close()
			}
			t.listeners = nil
			return fmt.Errorf("listen on portal %s: %w", addr, err)
		}
		t.listeners = append(t.listeners, l)
	}
	t.started = true
	for _, l := range t.listeners {
		t.running.Go(func() { t.accept(l) })
	}
	t.running.Go(t.grantMemory)
	t.running.Go(func() { t.keepTime(ctx) })
	return nil
}

// Addrs returns the addresses that the target listens on, in the order of
// Config.Listen.
func (t *Target) Addrs() []net.Addr {
	t.mu.Lock()
	defer t.mu.Unlock()
	addrs := make([]net.Addr, len(t.listeners))
	for i, l := range t.listeners {
		addrs[i] = l.Addr()
	}
	return addrs
}

// Close ends all sessions, after telling their initiators, and waits for every
// goroutine. Commands in the device server are waited for.
func (t *Target) Close() {
	t.shutdown()
	t.running.Wait()
	t.expireSessions(0)
}

// shutdown starts the end of everything.
func (t *Target) shutdown() {
	t.closeOnce.Do(func() {
		t.mu.Lock()
		t.closing = true
		close(t.stop)
		for _, l := range t.listeners {
			_ = l.Close()
		}
		conns := t.connectionsLocked("")
		half := slices.Clone(t.halfOpen)
		t.mu.Unlock()
		for _, c := range conns {
			c.farewell()
		}
		for _, c := range half {
			c.cut(errDropped, false)
		}
	})
}

// connectionsLocked returns the logged-in connections of an initiator, or all
// for "".
func (t *Target) connectionsLocked(initiator string) []*connection {
	var conns []*connection
	for _, s := range t.sessions {
		if s.conn != nil && (initiator == "" || s.initiator == initiator) {
			conns = append(conns, s.conn)
		}
	}
	return conns
}

func (t *Target) connections(initiator string) []*connection {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.connectionsLocked(strings.ToLower(initiator))
}

// DropSessions resets (RST) the connections of an initiator, or all for "".
// Nothing that was not sent yet is sent, nothing more is read. It does not
// wait; the sessions end like lost ones, once their tasks have (Config.Settle).
// It is the device server's hook.
func (t *Target) DropSessions(initiator, reason string) {
	for _, c := range t.connections(initiator) {
		c.cut(fmt.Errorf("%w: %s", errDropped, reason), true)
	}
}

// RequestLogout asks an initiator, or all for "", to log out within a time of at
// most 65535 s, and closes the connections that are still there then, after
// telling so. New logins are Directory.Redirect's matter, or Drain's.
func (t *Target) RequestLogout(initiator string, within time.Duration) {
	for _, c := range t.connections(initiator) {
		c.requestLogout(within)
	}
}

// AbortWaiting is the device server's hook for aborted tasks that wait for
// their Data-Out.
func (t *Target) AbortWaiting(task *scsi.Task) { abortWaiting(task) }

// Flush sends what completions have queued since the last call. The goroutine
// that completed a batch of tasks calls it after the batch. It does not wait
// for an initiator.
func (t *Target) Flush() {
	for {
		t.pendingMu.Lock()
		n := len(t.pending)
		if n == 0 {
			t.pendingMu.Unlock()
			return
		}
		c := t.pending[n-1]
		t.pending[n-1] = nil
		t.pending = t.pending[:n-1]
		c.pended = false
		t.pendingMu.Unlock()
		c.flush()
	}
}

// addPending notes that a connection has output to flush.
func (t *Target) addPending(c *connection) {
	t.pendingMu.Lock()
	if !c.pended {
		c.pended = true
		t.pending = append(t.pending, c)
	}
	t.pendingMu.Unlock()
}

// grantMemory serves the line for buffers.
func (t *Target) grantMemory() {
	for {
		select {
		case <-t.buffers.granted:
		case <-t.stop:
			// Connections that end take their tasks out of the line; those about to be
			// served are still brought to their end below.
			return
		}
		served := false
		for {
			w, ok := t.buffers.serve()
			if !ok {
				break
			}
			served = true
			w.task.memoryGranted()
		}
		if served {
			t.device.Kick()
			t.Flush()
		}
	}
}

// keepTime does once a second what depends on the clock.
func (t *Target) keepTime(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			t.shutdown()
			return
		case <-t.stop:
			return
		case <-ticker.C:
			t.tick()
		}
	}
}

// tick does what is due now.
func (t *Target) tick() {
	now := t.elapsed()
	for _, c := range t.connections("") {
		c.tick(now)
	}
	t.expireSessions(now)
	t.guard.sweep(t.now())
}

// accept takes connections of one portal. When the process is out of file
// descriptors it backs off, so that disks and peers get theirs.
func (t *Target) accept(l net.Listener) {
	var pause time.Duration
	for {
		conn, err := l.Accept()
		if err != nil {
			select {
			case <-t.stop:
				return
			default:
			}
			if errors.Is(err, net.ErrClosed) {
				return
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			t.log.Warn("accept failed", "target", t.name, "err", err)
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-t.stop:
				timer.Stop()
				return
			}
			continue
		}
		pause = 0
		c, err := newConnection(t, conn.(*net.TCPConn))
		if err != nil {
			_ = conn.Close()
			continue
		}
		if !t.enterLogin(c) {
			_ = conn.Close()
			return
		}
	}
}

// enterLogin starts the goroutine of a new connection. At a bound the oldest
// connection in login phase gives way, first of the same address.
func (t *Target) enterLogin(c *connection) bool {
	t.mu.Lock()
	if t.closing {
		t.mu.Unlock()
		return false
	}
	var victim *connection
	if t.halfOpenLocked(c.address) >= t.limits.HalfOpenPerAddress {
		victim = t.oldestHalfOpenLocked(func(o *connection) bool { return o.address == c.address })
	} else if len(t.halfOpen) >= t.limits.HalfOpen {
		victim = t.oldestHalfOpenLocked(func(*connection) bool { return true })
	}
	if victim != nil {
		t.removeHalfOpenLocked(victim)
	}
	t.halfOpen = append(t.halfOpen, c)
	t.running.Go(func() { t.handle(c) })
	t.mu.Unlock()
	if victim != nil {
		t.count(&t.counters.evicted)
		victim.cut(errDropped, true)
	}
	return true
}

func (t *Target) halfOpenLocked(address netip.Addr) int {
	n := 0
	for _, o := range t.halfOpen {
		if o.address == address {
			n++
		}
	}
	return n
}

// oldestHalfOpenLocked finds who has to give way: who has not sent a login
// request yet before who has, then the oldest.
func (t *Target) oldestHalfOpenLocked(match func(*connection) bool) *connection {
	var oldest *connection
	for _, o := range t.halfOpen {
		switch {
		case !match(o):
		case !o.spoke.Load():
			return o
		case oldest == nil:
			oldest = o
		}
	}
	return oldest
}

func (t *Target) removeHalfOpenLocked(c *connection) {
	for i, o := range t.halfOpen {
		if o == c {
			t.halfOpen = append(t.halfOpen[:i], t.halfOpen[i+1:]...)
			return
		}
	}
}

// handle is the goroutine of one connection.
func (t *Target) handle(c *connection) {
	rest, ok := t.logIn(c)
	t.mu.Lock()
	t.removeHalfOpenLocked(c)
	t.mu.Unlock()
	if !ok {
		_ = c.conn.Close()
		return
	}
	c.in = make([]byte, inputLen)
	c.w = copy(c.in, rest)
	err := c.serve()
	gracefully := !c.dropped.Load() && !errors.Is(err, io.EOF)
	if gracefully {
		c.finish()
	}
	c.shut(gracefully)
	s := c.session
	t.log.Info("connection ended", "nexus", s.initiator, "peer", c.peer, "err", err)
	t.event(Event{Kind: ConnectionEnded, Initiator: s.initiator, Peer: c.peer, Portal: c.portal, Discovery: s.discovery, Reason: err.Error()})
	t.connectionEnded(c, err)
}
