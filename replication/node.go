package replication

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// Config is what a node's replication is made of.
type Config struct {
	Self        NodeID
	Incarnation Incarnation
	Pool        Pool
	Key         dedup.Key
	Control     Control
	Transport   Transport
	Logger      *slog.Logger
	Timing      Timing // zero: DefaultTiming
	// Budget bounds the bytes of operations in flight on this node, own and
	// received together; beyond it commands are answered BUSY. Default 512 MiB.
	Budget int64
	// Event records a durable fact for the operator.
	Event func(severity slog.Level, code, text string)
	// Flush is called after a batch of requests was completed (scsi Hooks.Flush).
	Flush func()
	// DropSessions closes every session that uses the volume, 0 for all, with RST (Z1, Z5).
	DropSessions func(v lsfs.VolumeID, reason string)
	// Fatal is told that the local store failed: the process withdraws by ending.
	Fatal func(error)
	// Clock reads CLOCK_BOOTTIME; nil takes the system's.
	Clock func() Instant
	// Devices reads the counters of the pool's devices; nil: nothing is judged by them,
	// and no link either. It may wait for the store.
	Devices func() []DeviceUse
	// Probe writes a little to the log and has it flushed: it is called once a second
	// while a device is slow.
	Probe func(context.Context) error
}

// Node is the replication of one node: its volumes and its links to the others.
type Node struct {
	cfg      Config
	self     NodeID
	pool     Pool
	log      *slog.Logger
	timing   Timing
	works    workPool
	reducers reducers

	ctx    context.Context
	stop   context.CancelFunc
	group  sync.WaitGroup
	lastUp atomic.Int64 // Instant of the newest tick, to detect pauses
	failed atomic.Bool

	volumes atomic.Pointer[map[lsfs.VolumeID]*Volume] // copy on write under mu
	peers   atomic.Pointer[map[NodeID]*peer]

	reconcile sync.Mutex // one ReconcileSnapshots at a time; taken first and held over I/O

	mu      sync.Mutex
	inbound atomic.Pointer[[]*link] // copy on write under mu

	// Between the Done calls of one commit and OnCommit: touched by the committing goroutine only.
	touched []*Volume
	retired []*work

	beat     chan struct{} // asks the ticker for beacons out of turn
	forwards forwarding
	borrows  atomic.Uint64 // loans asked for
	served   sync.Pool     // of *served
	resyncs  resyncQueue
	throttle throttle // of resyncs
	paces    paces
}

// NewNode starts replication. The caller has read the cluster state through a
// quorum since this process started (B1) and calls Update with it.
func NewNode(cfg Config) *Node {
	if cfg.Timing == (Timing{}) {
		cfg.Timing = DefaultTiming
	}
	if cfg.Budget == 0 {
		cfg.Budget = 512 << 20
	}
	if cfg.Clock == nil {
		cfg.Clock = bootTime
	}
	n := &Node{
		cfg: cfg, self: cfg.Self, pool: cfg.Pool, log: cfg.Logger, timing: cfg.Timing,
		beat: make(chan struct{}, 1),
	}
	n.works.budget = cfg.Budget
	n.paces.devices, n.paces.links = map[string]*devicePace{}, map[NodeID]*pace{}
	n.reducers.key = cfg.Key
	n.served.New = newServed
	n.inbound.Store(&[]*link{})
	n.volumes.Store(&map[lsfs.VolumeID]*Volume{})
	n.peers.Store(&map[NodeID]*peer{})
	n.ctx, n.stop = context.WithCancel(context.Background())
	n.lastUp.Store(int64(n.now()))
	n.pool.OnCommit(n.committed)
	n.spawn(n.ticker)
	n.spawn(n.watchPaces)
	return n
}

func bootTime() Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("CLOCK_BOOTTIME: " + err.Error()) // Linux has it since 2.6.39
	}
	return Instant(ts.Nano())
}

func (n *Node) now() Instant { return n.cfg.Clock() }

func (n *Node) spawn(f func()) {
	n.group.Add(1)
	go func() {
		defer n.group.Done()
		f()
	}()
}

// Close stops serving, ends every link and waits for all goroutines. Requests
// that are still open end with ErrUnavailable. The store stays open.
func (n *Node) Close() {
	n.stop()
	n.mu.Lock()
	for _, l := range *n.inbound.Load() {
		l.fail(net.ErrClosed)
	}
	n.mu.Unlock()
	for _, p := range *n.peers.Load() {
		if l := p.link.Load(); l != nil {
			l.fail(net.ErrClosed)
		}
	}
	for _, v := range *n.volumes.Load() {
		v.shut(ErrUnavailable)
	}
	n.group.Wait()
}

// Volume finds a volume by its id; nil when the cluster has none.
func (n *Node) Volume(id lsfs.VolumeID) *Volume { return (*n.volumes.Load())[id] }

// Volumes lists all volumes of the cluster, with or without a copy here.
func (n *Node) Volumes() []*Volume { return slices.Collect(maps.Values(*n.volumes.Load())) }

// Update takes the recorded state, in the order of the raft log: every volume,
// the deleted ones with Deleted set, and every data node. It creates, resizes and deletes local copies, which
// may take I/O, and returns when it has.
func (n *Node) Update(records []Record, nodes []NodeID) {
	n.mu.Lock()
	peers := maps.Clone(*n.peers.Load())
	for _, id := range nodes {
		if id != n.self && peers[id] == nil {
			p := newPeer(n, id)
			peers[id] = p
			n.spawn(p.run)
		}
	}
	for id, p := range peers {
		if !slices.Contains(nodes, id) {
			p.stop()
			delete(peers, id)
		}
	}
	n.peers.Store(&peers)

	volumes := maps.Clone(*n.volumes.Load())
	seen := map[lsfs.VolumeID]bool{}
	var gone []*Volume
	for _, rec := range records {
		if rec.Deleted {
			continue
		}
		seen[rec.Volume] = true
		if volumes[rec.Volume] == nil {
			volumes[rec.Volume] = newVolume(n, rec)
		}
	}
	for id, v := range volumes {
		if !seen[id] {
			delete(volumes, id)
			gone = append(gone, v)
		}
	}
	n.volumes.Store(&volumes)
	n.mu.Unlock()

	for _, v := range gone {
		v.shut(ErrDeleted)
	}
	for _, rec := range records {
		if !rec.Deleted {
			volumes[rec.Volume].update(rec)
		}
	}
	// A copy goes only when the record says so: deleted, or placed elsewhere. A copy
	// that no record speaks of stays (a cluster state that is older than the pool
	// must never cost data).
	for _, rec := range records {
		placed := slices.ContainsFunc(rec.Replicas, func(r Replica) bool { return r.Node == n.self })
		if (rec.Deleted || !placed && !mutant("M8-free")) && n.pool.Copy(rec.Volume) != nil {
			if err := n.pool.DeleteCopy(n.ctx, rec.Volume); err != nil {
				n.log.Error("cannot delete local copy", "volume", rec.Volume, "err", err)
				n.failedBy(err)
			}
		}
	}
}

// Kick sends and commits what Submit queued.
func (n *Node) Kick() {
	n.flushPeers()
	n.pool.Kick()
}

func (n *Node) flushPeers() {
	for _, p := range *n.peers.Load() {
		if l := p.link.Load(); l != nil {
			l.flush()
		}
	}
}

// flush sends the answers of requests that were completed in a batch: to our own
// initiators and to the nodes that forwarded some.
func (n *Node) flush() {
	for _, l := range *n.inbound.Load() {
		l.flush()
	}
	n.cfg.Flush()
}

// addInbound and removeInbound keep the list of links that others opened. A new
// one from a node ends the older ones from it, which are returned: their commands
// are dead (Z1).
func (n *Node) addInbound(l *link) (older []*link, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ctx.Err() != nil {
		return nil, false
	}
	links := []*link{l}
	for _, old := range *n.inbound.Load() {
		if old.peer == l.peer {
			old.fail(errReplaced)
			older = append(older, old)
		} else {
			links = append(links, old)
		}
	}
	n.inbound.Store(&links)
	return older, true
}

func (n *Node) removeInbound(l *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	links := slices.DeleteFunc(slices.Clone(*n.inbound.Load()), func(o *link) bool { return o == l })
	n.inbound.Store(&links)
}

// stored is the Done of every operation: durable here, or failed.
func (n *Node) stored(op *lsfs.Op, err error) {
	w := op.Ctx.(*work)
	v := w.v
	missing := w.op.Kind == lsfs.OpRollback && errors.Is(err, lsfs.ErrNoVolume) && n.pool.Copy(v.id) != nil // the snapshot, not the volume
	if !missing && (errors.Is(err, lsfs.ErrNoVolume) || errors.Is(err, lsfs.ErrClosed)) {
		v.lost(w) // deleted or closing: its requests were ended before
		return
	}
	if err != nil && v.tripped(w, err) {
		return // this replica cannot follow; the node goes on
	}
	if err != nil {
		n.storeFailed(err)
		return // w is never settled: nothing of it may be acknowledged
	}
	if !v.touched {
		v.touched = true
		n.touched = append(n.touched, v)
	}
	v.stored(w)
}

// committed runs after the Done calls of a commit: acknowledges to the initiator
// or to the owner, once per volume.
func (n *Node) committed() {
	for _, v := range n.touched {
		v.touched = false
		n.retired = v.durable(n.retired)
	}
	n.touched = n.touched[:0]
	n.finish(n.retired)
	clear(n.retired)
	n.retired = n.retired[:0]
	for _, l := range *n.inbound.Load() {
		l.flush()
	}
	n.flushPeers()
}

// finish completes the requests of works that have committed, or were refused before
// they got a number (err), and gives the works back.
func (n *Node) finish(works []*work) {
	if len(works) == 0 {
		return
	}
	for _, w := range works {
		if r := w.req; r != nil {
			w.req = nil
			r.Err, r.Scratch = translate(w.err), nil
			r.Done(r)
		} else if w.then != nil {
			w.then(w.err)
		}
		n.works.put(w)
	}
	n.cfg.Flush()
}

// failedBy withdraws this node when err says that its store has stopped: no operation
// may be under way that would tell, as on a replica that is about to be filled.
func (n *Node) failedBy(err error) {
	if errors.Is(err, lsfs.ErrPoisoned) {
		n.storeFailed(err)
	}
}

// storeFailed withdraws this node: nothing more is acknowledged or granted (DURABLE).
func (n *Node) storeFailed(err error) {
	if n.failed.Swap(true) {
		return
	}
	n.log.Error("the store failed, this node withdraws", "err", err)
	n.cfg.Fatal(err)
}

// ticker is the protocol's clock: beacons, timeouts, and the detection of pauses.
func (n *Node) ticker() {
	step := n.timing.Beacon / 2
	t := time.NewTicker(step)
	defer t.Stop()
	beacon := false
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-n.beat:
			if !n.failed.Load() {
				n.sendBeacons()
				n.flushPeers()
			}
			continue
		case <-t.C:
		}
		now := n.now()
		if gap := time.Duration(now - Instant(n.lastUp.Swap(int64(now)))); gap > n.timing.Pause {
			n.paused(gap)
		}
		for _, v := range *n.volumes.Load() {
			v.tick(now)
		}
		n.resyncs.dispatch()
		n.throttle.judge(now)
		n.forwardsExpired(now)
		if beacon = !beacon; beacon && !n.failed.Load() {
			n.sendBeacons()
		}
		n.flushPeers()
	}
}

// beaconNow has beacons sent without waiting for the tick.
func (n *Node) beaconNow() {
	select {
	case n.beat <- struct{}{}:
	default:
	}
}

// paused drops everything that may hold commands from before a pause (Z1): the
// sessions, and the links on which forwarded commands may wait unread.
func (n *Node) paused(gap time.Duration) {
	if mutant("Z1-pause") {
		return
	}
	n.log.Warn("this process was paused, sessions are dropped", "gap", gap)
	volumes := *n.volumes.Load()
	for _, v := range volumes {
		v.beginDrop()
	}
	n.cfg.DropSessions(0, "the node was paused for "+gap.Round(time.Millisecond).String())
	for _, v := range volumes {
		v.endDrop()
	}
	for _, l := range *n.inbound.Load() {
		l.fail(errPaused)
	}
}

var (
	errPaused   = errors.New("this process was paused")
	errReplaced = errors.New("the peer opened a newer link")
)

// freeRoom is how many bytes new data may still take in the own pool.
func (n *Node) freeRoom() uint64 {
	r := n.pool.Room()
	return uint64(max(r.Usable-r.Live, 0))
}
