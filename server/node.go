package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/server/scsi"
)

// Options are how Open runs a node, besides its file.
type Options struct {
	Logger *slog.Logger
	// Witness refuses to run a node that joined with another role.
	Witness bool
}

// Peers asks other nodes; declared here because a node uses it, implemented by
// the API's client. Calls end with ctx and fail at once where nobody listens.
type Peers interface {
	// Report returns what only that node knows.
	Report(ctx context.Context, node replication.NodeID, address string) (*Report, error)
	// CheckVolume compares the replicas of a volume that the node owns.
	CheckVolume(ctx context.Context, node replication.NodeID, address, volume string) ([]Digest, bool, error)
	// MoveVolume makes the node called to the owner of a volume that the asked node owns.
	MoveVolume(ctx context.Context, node replication.NodeID, address, volume, to string) error
	// ChangeDevice changes the devices of the asked node.
	ChangeDevice(ctx context.Context, node replication.NodeID, address string, c DeviceChange) (*Device, error)
	// ClearReservations drops the reservations of a volume that the asked node owns.
	ClearReservations(ctx context.Context, node replication.NodeID, address, volume string) error
	// MergeNode shows, starts or stops the merging of duplicates of the asked node, which is called name.
	MergeNode(ctx context.Context, node replication.NodeID, address, name string, action MergeAction) (*Merge, error)
	// ScrubNode shows, starts or stops the scrub of the asked node, which is called name.
	ScrubNode(ctx context.Context, node replication.NodeID, address, name string, action ScrubAction, fullSpeed bool) (*Scrub, error)
	// ExplainPool says what the pool of the asked node, which is called name, is taken by.
	ExplainPool(ctx context.Context, node replication.NodeID, address, name string, exact bool, progress func(done float64) error) (*PoolExplained, error)
	// SnapshotStep does one step of a snapshot on the asked node.
	SnapshotStep(ctx context.Context, node replication.NodeID, address string, step SnapshotStep) (bool, error)
	// Changes passes on what the asked node sends.
	Changes(ctx context.Context, node replication.NodeID, address string, spec ChangesSpec, send func([]ChangedRange, uint64) error) error
}

// Node is one running node of a cluster.
//
//	Open -> starting -(quorum, first state applied, portals open)-> ready -> Close
type Node struct {
	config  *Config
	log     *slog.Logger
	id      cluster.Identity
	started time.Time

	store   *lsfs.Store // nil on a witness
	cluster *cluster.Cluster
	journal *journal
	freed   *freer
	watch   *worker // of the pool's fill; nil on a witness
	drainer *worker // nil on a witness
	saver   *worker // of the scrub's place; nil on a witness
	notes   *worker // of the pool's fill over time; nil on a witness
	history atomic.Pointer[spaceHistory]
	keeper  *worker // of snapshots; nil on a witness
	steward *worker // nil on a witness
	moves   *hostMoves
	levels  atomic.Pointer[levels]
	metrics *metricsServer
	peers   atomic.Pointer[Peers]
	serving atomic.Pointer[serving] // set once by the first state
	ready   atomic.Bool             // portals are open
	// retiring: this node is about to stop and takes nothing over.
	retiring atomic.Bool
	failed   chan error
	reason   atomic.Pointer[error] // of failed
	opened   chan struct{}         // closed when Open has filled the fields above

	mu      sync.Mutex // see doc.go
	closing bool
	exports map[uint16]*export // by LUN
	// reconciled is the state by which snapshots were last held against the records.
	reconciled *cluster.State
}

// serving are the parts that a data node makes when it has a quorum.
type serving struct {
	replication *replication.Node
	scsi        *scsi.Server
	target      *iscsi.Target
}

// Open starts the node whose identity lies in the data directory. It returns
// when the node is a listening member of its cluster; the volumes follow as soon
// as there is a quorum (Ready). On error nothing is left running.
func Open(ctx context.Context, c *Config, o Options) (_ *Node, err error) {
	n := &Node{config: c, log: o.Logger, started: time.Now().UTC(), failed: make(chan error, 1), opened: make(chan struct{}), exports: map[uint16]*export{}}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	id, err := cluster.ReadIdentity(c.DataDir)
	if err != nil {
		return nil, fmt.Errorf("this machine is no node yet (twinsan init, or twinsan join): %w", err)
	}
	n.id = *id
	switch {
	case id.Name != c.Name:
		return nil, fmt.Errorf("%w: the file names node %q, %s belongs to node %q", ErrInvalid, c.Name, c.DataDir, id.Name)
	case o.Witness && id.Role != cluster.RoleWitness:
		return nil, fmt.Errorf("%w: node %s is no witness", ErrInvalid, id.Name)
	case id.Role == cluster.RoleWitness && (len(c.Store.paths()) > 0 || len(c.ISCSI.Portals) > 0):
		return nil, fmt.Errorf("%w: node %s is a witness and has neither devices nor portals", ErrInvalid, id.Name)
	}
	defer func() {
		if err != nil {
			close(n.opened)
			n.Close()
		}
	}()
	n.journal = newJournal(n.log, func(ctx context.Context, s cluster.Severity, code, text string) error {
		select {
		case <-n.opened:
		case <-ctx.Done():
			return ctx.Err()
		}
		if n.cluster == nil {
			return ErrNotReady
		}
		return n.cluster.AddEvent(ctx, s, code, text)
	})
	if id.Role == cluster.RoleData {
		if err := n.openStore(ctx); err != nil {
			return nil, err
		}
	}
	member := cluster.Config{
		Dir: c.DataDir, Logger: n.log, Addresses: c.addresses(), Version: Version,
		OnChange: n.onChange, Fatal: n.fail,
	}
	if id.Role == cluster.RoleData {
		member.OnData = n.onData
	}
	n.mu.Lock() // the first state waits until all fields are set
	n.cluster, err = cluster.Open(ctx, member)
	if err == nil {
		n.freed = newFreer(n.log, n.cluster.VolumeFreed)
		if id.Role == cluster.RoleData {
			n.startWorkers()
		}
	}
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if n.metrics, err = serveMetrics(c.Metrics.Address, n); err != nil {
		return nil, err
	}
	close(n.opened)
	return n, nil
}

func (n *Node) openStore(ctx context.Context) error {
	config, err := n.config.store()
	if err != nil {
		return err
	}
	config.Discard = onBlockDevices(config.Devices)
	config.Logger = n.log
	config.ScrubFrom = readScrub(n.config.DataDir)
	config.Event = func(e lsfs.Event) {
		level, code := slog.LevelWarn, "store-"+e.Code
		switch {
		case e.Err != nil, e.Code == "poisoned", e.Code == "device-failed":
			level = slog.LevelError
		case e.Code == "device-drained", e.Code == "device-removed":
			level = slog.LevelInfo
		}
		if strings.HasPrefix(e.Code, "device-") {
			code = e.Code
		}
		n.journal.report(level, code, e.Text)
	}
	start := time.Now()
	if n.store, err = lsfs.Open(ctx, config); err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	n.log.Info("store is open", "took", time.Since(start).Round(time.Millisecond), "volumes", len(n.store.Volumes()))
	for _, d := range n.store.Devices() {
		if !d.Direct {
			n.log.Warn("no direct I/O on this file system, going on with flushes", "device", d.Path)
		}
	}
	return nil
}

// fail ends the node: Failed tells whoever runs it.
func (n *Node) fail(err error) {
	if n.reason.CompareAndSwap(nil, &err) { // the first failure is the one that counts
		n.failed <- err
	}
}

// Failed yields the error with which the node cannot go on. The process is
// expected to end then: the other nodes take over.
func (n *Node) Failed() <-chan error { return n.failed }

// farewellMax bounds how long a node that has failed tries to tell the others why.
const farewellMax = 3 * time.Second

// farewell tells the others why this node has failed. It no longer serves then: that
// comes first.
func (n *Node) farewell() {
	err := n.reason.Load()
	if err == nil || n.cluster == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), farewellMax)
	defer cancel()
	if err := n.cluster.Farewell(ctx, fmt.Sprintf("node %s has stopped: %v", n.id.Name, *err)); err != nil {
		n.log.Warn("the other nodes were not told why this one stops", "err", err)
	}
}

// Ready says whether the node serves.
func (n *Node) Ready() bool { return n.ready.Load() }

// SetPeers connects the node to the API's client. Before it, only this node is asked.
func (n *Node) SetPeers(p Peers) { n.peers.Store(&p) }

// APITLS is the node's end of the API: its certificate, and clients of the cluster only.
func (n *Node) APITLS() *tls.Config { return n.cluster.ServerTLS() }

// PeerTLS is this node's end of a connection to the API of another node.
func (n *Node) PeerTLS(to replication.NodeID) *tls.Config { return n.cluster.ClientTLS(to) }

// onData hands a connection of another data node to replication. One that comes
// before replication runs is closed; the other side tries again.
func (n *Node) onData(peer replication.NodeID, c net.Conn) {
	if s := n.serving.Load(); s != nil {
		s.replication.Accept(peer, c)
		return
	}
	c.Close()
}

// start makes the serving parts. Needs mu, once, after the cluster is ready.
func (n *Node) start(s *cluster.State) (*serving, error) {
	self := n.cluster.Self()
	key, err := n.cluster.FingerprintKey()
	if err != nil {
		return nil, err
	}
	out := &serving{}
	out.replication = replication.NewNode(replication.Config{
		Self: self, Incarnation: n.cluster.Incarnation(), Pool: replication.Local(n.store), Key: key,
		Control: n.cluster, Transport: n.cluster, Logger: n.log, Event: n.journal.report, Fatal: n.fail,
		Flush: func() {
			if s := n.serving.Load(); s != nil {
				s.target.Flush()
			}
		},
		DropSessions: n.dropSessions, Devices: n.deviceUse, Probe: n.probeLog,
	})
	n.store.SetDonor(out.replication.Intact)
	out.scsi = scsi.New(scsi.Config{Backend: out.replication, NodePort: uint16(self), PortGroup: uint16(self), TargetName: n.id.Target, Logger: n.log})
	out.target, err = iscsi.New(iscsi.Config{
		TargetName: n.id.Target, PortGroup: uint16(self), Listen: n.config.ISCSI.Portals,
		Device: out.scsi, Directory: directory{n}, Logger: n.log,
	})
	if err != nil {
		out.scsi.Close()
		out.replication.Close()
		return nil, err
	}
	out.scsi.SetHooks(scsi.Hooks{Flush: out.target.Flush, AbortWaiting: out.target.AbortWaiting, DropSessions: out.target.DropSessions})
	n.serving.Store(out)
	return out, nil
}

// dropSessions closes the sessions of all initiators that see a volume, or all
// sessions for volume 0.
func (n *Node) dropSessions(id lsfs.VolumeID, reason string) {
	s := n.serving.Load()
	if s == nil {
		return
	}
	state := n.cluster.State()
	v := state.Volume(id)
	if v == nil || v.AnyHost {
		s.target.DropSessions("", reason)
		return
	}
	for _, initiator := range initiators(state, v.Hosts) {
		s.target.DropSessions(initiator, reason)
	}
}

// Close stops the node in the reverse order of its start and waits for all of it.
func (n *Node) Close() {
	n.mu.Lock()
	n.closing = true
	n.mu.Unlock()
	n.ready.Store(false)
	if n.metrics != nil {
		n.metrics.close()
	}
	n.steward.close()
	n.drainer.close()
	n.keeper.close()
	n.watch.close()
	n.saver.close()
	n.notes.close()
	if s := n.serving.Load(); s != nil {
		n.moves.cancel() // commands that wait for one get their answer
		s.target.Close()
		n.moves.close()
		s.scsi.Close()
		s.replication.Close()
	}
	n.farewell()
	if n.freed != nil {
		n.freed.close()
	}
	if n.journal != nil {
		n.journal.close()
	}
	if n.cluster != nil {
		if err := n.cluster.Close(); err != nil {
			n.log.Error("cluster member did not close", "err", err)
		}
	}
	if n.store != nil {
		n.saveScrub(&lsfs.ScrubState{})
		if err := n.store.Close(); err != nil {
			n.log.Error("store did not close", "err", err)
		}
	}
}
