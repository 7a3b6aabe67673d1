package cluster

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

// Timing of raft. A leader that is cut off steps down after leaseTimeout; its
// followers elect another after heartbeatTimeout at the earliest. A witness waits
// twice as long, so that a data node wins (Q1). Measured on two busy cores, 500 ms
// gives no false elections and 300 ms some.
const (
	heartbeatTimeout = 500 * time.Millisecond
	leaseTimeout     = 400 * time.Millisecond
	// commitTimeout is also the leader's idle pace towards each follower: at 10 ms
	// an idle cluster burned 6 % of a core in TLS records alone.
	commitTimeout = 50 * time.Millisecond
	raftIOTimeout = 3 * time.Second
	// maxApplies bounds commands in flight at a leader. More wait.
	maxApplies = 256
)

// Config is how a member runs.
type Config struct {
	Dir    string // as given to Bootstrap or JoinCluster
	Logger *slog.Logger
	// Addresses, when Sync is set, replace the recorded ones: a node tells the
	// others at each start where it is.
	Addresses Addresses
	Version   string // of the program, shown by node list

	// OnData takes an authorised data connection of another data node. It is called
	// on a goroutine of its own, which Close waits for; it may keep the connection
	// after it has returned. A node without it (a witness) refuses such connections.
	OnData func(peer replication.NodeID, conn net.Conn)
	// OnChange is told the newest state after changes: in the order of the log,
	// several changes at once when they come fast, on one goroutine of its own. The
	// first call comes when the node is ready (see WaitReady), so it never shows a
	// state older than this start. It must not call Close.
	OnChange func(s *State)
	// Fatal is told once that the member cannot go on: its disk failed, its log
	// holds what it cannot read, or it was removed. It is expected to end the
	// process, and may be called from within raft, so it must not call Close.
	Fatal func(err error)

	now          func() time.Time        // tests
	handshakeMax time.Duration           // tests
	storeFault   func(what string) error // tests: runs before each operation of raft's store
}

// Cluster is a running member. Its methods may be called concurrently. It
// implements replication.Control and replication.Transport.
//
//	Open -> starting -(start command committed and applied)-> ready -> Close
type Cluster struct {
	cfg  Config
	log  *slog.Logger
	id   *Identity
	seal *sealKey // nil on a witness
	addr Addresses
	now  func() time.Time
	lost []replication.NodeID // declared lost here (recover.go)

	lock  *os.File
	store *raftStore
	raft  *raft.Raft
	fsm   *fsm
	layer *raftLayer
	trans *promptTransport
	lis   *listener
	pool  rpcPool
	joins joinGate
	creds atomic.Pointer[credentials]
	// detours are other nodes that do not answer at their management addresses.
	detours detours

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // loops

	leaderChange broadcast
	observations chan raft.Observation

	incarnation atomic.Uint64
	ready       chan struct{} // closed when incarnation is set
	over        atomic.Bool   // raft's store has failed

	applying  chan struct{}  // maxApplies
	applies   sync.WaitGroup // futures of raft that somebody waits for
	fatalOnce sync.Once

	mu     sync.Mutex // closing, and applies.Add against applies.Wait
	closed bool
}

var (
	_ replication.Control   = (*Cluster)(nil)
	_ replication.Transport = (*Cluster)(nil)
)

// broadcast wakes everybody who waits for something to change.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// wait returns a channel that the next wake closes. What is waited for is to be
// looked at after the call.
func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) wake() {
	b.mu.Lock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
	b.mu.Unlock()
}

// Open runs the member whose identity lies in cfg.Dir. It returns when the member
// listens; WaitReady waits until it is part of a quorum.
func Open(ctx context.Context, cfg Config) (_ *Cluster, err error) {
	c := &Cluster{
		cfg: cfg, log: cfg.Logger, now: cfg.now,
		pool:         rpcPool{idle: make(map[replication.NodeID][]net.Conn)},
		observations: make(chan raft.Observation, 16),
		ready:        make(chan struct{}),
		applying:     make(chan struct{}, maxApplies),
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.cfg.handshakeMax == 0 {
		c.cfg.handshakeMax = handshakeMax
	}
	if c.id, err = ReadIdentity(cfg.Dir); err != nil {
		return nil, err
	}
	c.addr = c.id.Addresses
	if cfg.Addresses.Sync != "" {
		c.addr = cfg.Addresses
	}
	if err := checkAddresses(c.addr); err != nil {
		return nil, errorf(ErrInvalid, "%v", err)
	}
	var undo []func()
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()
	if c.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, err
	}
	undo = append(undo, func() { c.lock.Close() })
	if c.lost, err = readLost(cfg.Dir); err != nil {
		return nil, err
	}
	if err := c.loadKeys(); err != nil {
		return nil, err
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	undo = append(undo, c.cancel)

	var lns []net.Listener
	for i, address := range c.addr.between() {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("%s address: %w", []string{"sync", "management"}[i], err)
		}
		undo = append(undo, func() { ln.Close() })
		lns = append(lns, ln)
	}
	c.lis = newListener(c, lns)

	rlog := newRaftLog(c.log)
	store, snaps, err := openRaftStore(filepath.Join(cfg.Dir, dirRaft), rlog, c.storeFailed)
	if err != nil {
		return nil, err
	}
	c.store = store
	if cfg.storeFault != nil {
		store.fault = cfg.storeFault
	}
	undo = append(undo, func() { store.Close() })
	c.fsm = newFSM(c.fatal)
	if c.raft, err = c.newRaft(snaps, rlog); err != nil {
		return nil, err
	}
	c.lis.start()
	c.wg.Go(func() { c.trans.pass(c.ctx.Done()) })
	for _, loop := range []func(){c.observe, c.announce, c.notify, c.govern, c.renewLoop, c.comeBack} {
		c.wg.Go(loop)
	}
	return c, nil
}

// loadKeys reads the keys and certificates, and renews the certificate if it is
// due and this node can do so alone.
func (c *Cluster) loadKeys() error {
	cr, err := readCredentials(c.cfg.Dir)
	if err != nil {
		return err
	}
	c.creds.Store(cr)
	if c.id.Role != RoleData {
		return nil
	}
	if c.seal, err = readSealKey(c.cfg.Dir); err != nil {
		return err
	}
	if c.now().After(cr.renewAt()) || !cr.names(c.addr) {
		return c.renewAlone()
	}
	return nil
}

func (c *Cluster) newRaft(snaps raft.SnapshotStore, rlog *raftLog) (*raft.Raft, error) {
	self := raftAddress(c.id.Node, c.addr.Control())
	c.layer = newRaftLayer(c, self)
	c.trans = newPromptTransport(raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: c.layer, MaxPool: 3, Timeout: raftIOTimeout, Logger: rlog.Named("net"),
		MsgpackUseNewTimeFormat: true,
	}))
	conf := raft.DefaultConfig()
	conf.LocalID = raftID(c.id.Node)
	conf.HeartbeatTimeout = heartbeatTimeout
	conf.ElectionTimeout = heartbeatTimeout
	if c.id.Role == RoleWitness {
		conf.HeartbeatTimeout = 2 * heartbeatTimeout
		conf.ElectionTimeout = 2 * heartbeatTimeout
	}
	conf.LeaderLeaseTimeout = leaseTimeout
	conf.CommitTimeout = commitTimeout
	conf.MaxAppendEntries = maxApplies
	// BatchApplyCh stays off: with its buffer a command may be left in the queue when
	// the node stops, so that its future never ends, and the enqueue timeout no
	// longer means that the command was not sent. The leader groups waiting commands
	// into one write without it as well.
	conf.ShutdownOnRemove = false
	conf.SnapshotThreshold = 4096
	conf.TrailingLogs = 4096
	conf.NoLegacyTelemetry = true
	conf.Logger = rlog
	r, err := raft.NewRaft(conf, c.fsm, c.store, c.store, snaps, c.trans)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start raft: %w", err), c.trans.Close())
	}
	r.RegisterObserver(raft.NewObserver(c.observations, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			return true
		}
		return false
	}))
	return r, nil
}

// Close stops the member and waits for all of its goroutines. A leader hands
// leadership over first, so that the others need no election timeout.
func (c *Cluster) Close() error { return c.stop(true) }

// stop is Close, or with graceful false the same without a word to the others, as
// after a crash.
func (c *Cluster) stop(graceful bool) error {
	if graceful && c.raft.State() == raft.Leader {
		ctx, cancel := context.WithTimeout(c.ctx, time.Second)
		if err := c.handOver(ctx); err != nil {
			c.log.Debug("leadership was not handed over", "err", err)
		}
		cancel()
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		c.wg.Wait()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	// raft answers what was submitted as long as it runs: by commit, or because its
	// lease is over.
	c.applies.Wait()
	c.layer.cut()
	err := c.raft.Shutdown().Error()
	c.lis.close()
	c.layer.accepted.Wait()
	c.pool.close()
	c.wg.Wait()
	return errors.Join(err, c.store.Close(), c.lock.Close())
}

// begin registers a future of raft that somebody waits for; each true is followed
// by one end.
func (c *Cluster) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.applies.Add(1)
	return true
}

func (c *Cluster) fatal(err error) {
	c.fatalOnce.Do(func() {
		c.log.Error("this member of the cluster cannot go on", "err", err)
		if c.cfg.Fatal != nil {
			c.cfg.Fatal(err)
		}
	})
}

// storeFailed ends this member's part in raft at once: nothing that it has not
// stored may count for the others, neither a vote nor an entry. Then it is fatal.
func (c *Cluster) storeFailed(err error) {
	c.over.Store(true)
	if c.layer != nil {
		c.layer.cut()
	}
	c.fatal(err)
}

// Farewell has another node record why this one cannot go on, although this one's
// own part in raft may be over. It asks all of them until one leads, or ctx ends. This
// node must serve nothing any more: it stops to listen, from which the others know that
// they need not wait for its leases (L5).
func (c *Cluster) Farewell(ctx context.Context, text string) error {
	for _, ln := range c.lis.lns {
		ln.Close()
	}
	env := envelope{Now: c.now().UTC(), By: c.id.Node}
	rand.Read(env.Request[:])
	data, err := encodeCommand(env, &cmdAddEvent{Error, EventNodeFailed, text[:min(len(text), maxText)]})
	if err != nil {
		return errorf(ErrInvalid, "%v", err)
	}
	for {
		for _, n := range c.State().Nodes {
			if n.ID == c.id.Node {
				continue
			}
			once, cancel := context.WithTimeout(ctx, time.Second)
			body := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(data)), timeoutMillis(once))
			_, _, err = c.call(once, n.ID, rpcPropose, append(body, data...))
			cancel()
			if err == nil {
				return nil
			}
		}
		retry := time.NewTimer(retryEvery)
		select {
		case <-retry.C:
		case <-ctx.Done():
			retry.Stop()
			return errors.Join(ctx.Err(), err)
		}
		retry.Stop()
	}
}

// EventNodeFailed is the code of the event by which a node says why it stops by itself.
const EventNodeFailed = "node-failed"

// Identity is who this node is.
func (c *Cluster) Identity() Identity { return *c.id }

// Self is this node's id.
func (c *Cluster) Self() replication.NodeID { return c.id.Node }

// State is the newest state that this node has applied. It may be behind the
// leader's; Sync catches up. Before the node is ready it may be empty.
func (c *Cluster) State() *State { return c.fsm.state.Load() }

// Incarnation is the number of this start, handed out by the quorum; 0 until the
// node is ready.
func (c *Cluster) Incarnation() replication.Incarnation {
	return replication.Incarnation(c.incarnation.Load())
}

// WaitReady waits until a quorum has raised this node's incarnation and this node
// has applied everything up to there. Then State is as fresh as this start.
func (c *Cluster) WaitReady(ctx context.Context) error {
	select {
	case <-c.ready:
		return nil
	case <-ctx.Done():
		return errorf(ErrNoQuorum, "wait for a quorum: %v", ctx.Err())
	case <-c.ctx.Done():
		return ErrClosed
	}
}

// Leader is the leader as this node sees it, or 0.
func (c *Cluster) Leader() replication.NodeID {
	_, id := c.raft.LeaderWithID()
	return nodeOf(id)
}

// Quorum says whether this node sees a working quorum: it leads under a lease, or
// has heard of a leader within the election timeout. It is for display; no
// decision about data may rest on it.
func (c *Cluster) Quorum() bool { return c.Leader() != 0 }

// Voters returns the nodes that vote, as this node knows it. Other nodes follow
// without a vote: the second data node while there is no witness, and a node that
// has just joined.
func (c *Cluster) Voters() []replication.NodeID {
	var ids []replication.NodeID
	for _, s := range c.servers() {
		if s.Suffrage == raft.Voter {
			ids = append(ids, nodeOf(s.ID))
		}
	}
	return ids
}

func (c *Cluster) servers() []raft.Server {
	f := c.raft.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	return f.Configuration().Servers
}

func (c *Cluster) inRaft(n replication.NodeID) bool { return c.raftAddressOf(n) != "" }

// raftAddressOf is the address of a node in the raft configuration, or "".
func (c *Cluster) raftAddressOf(n replication.NodeID) string {
	for _, s := range c.servers() {
		if s.ID == raftID(n) {
			if _, addr, err := splitRaftAddress(s.Address); err == nil {
				return addr
			}
		}
	}
	return ""
}

// observe passes raft's news about leadership on.
func (c *Cluster) observe() {
	var last replication.NodeID
	for {
		select {
		case <-c.observations:
			if l := c.Leader(); l != last {
				last = l
				if l == 0 {
					c.log.Info("no leader", "node", c.id.Name)
				} else {
					c.log.Info("leader elected", "node", c.id.Name, "leader", c.State().NodeName(l))
				}
			}
			c.leaderChange.wake()
		case <-c.ctx.Done():
			return
		}
	}
}

// announce raises the incarnation, as often as it takes.
func (c *Cluster) announce() {
	told := c.addr
	for {
		ctx, cancel := context.WithTimeout(c.ctx, proposeMax)
		r, err := c.proposeSync(ctx, &cmdStart{Node: c.id.Node, Addresses: told, Version: c.cfg.Version})
		cancel()
		if errors.Is(err, ErrRefused) && told.Management != "" {
			// A member that was not upgraded yet could not read it. The sync address takes
			// every protocol, so that this node is reached there.
			c.log.Warn("the management address is not used: it needs a higher feature level (twinsan upgrade plan), then a restart of this node", "address", told.Management, "err", err)
			told.Management = ""
			continue
		}
		switch {
		case err == nil:
			c.incarnation.Store(r.ID)
			close(c.ready)
			return
		case c.ctx.Err() != nil:
			return
		case errors.Is(err, ErrNotFound):
			c.fatal(fmt.Errorf("%w: %w", ErrRemoved, err))
			return
		case errors.Is(err, ErrExists), errors.Is(err, ErrInvalid):
			c.fatal(fmt.Errorf("announce the start of this node: %w", err))
			return
		}
		c.log.Info("waiting for a quorum of the cluster", "err", err)
	}
}

// notify tells OnChange about new states, and cuts off nodes that were removed.
func (c *Cluster) notify() {
	ready := c.ready
	var told *State
	for {
		changed := c.fsm.watch()
		c.lis.dropStrangers()
		if ready == nil && c.cfg.OnChange != nil {
			if s := c.State(); s != told {
				told = s
				c.cfg.OnChange(s)
			}
		}
		select {
		case <-changed:
		case <-ready:
			ready = nil
		case <-c.ctx.Done():
			return
		}
	}
}
