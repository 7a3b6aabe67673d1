package server

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/format"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/scsi"
)

// export is what the device server was told about one logical unit.
type export struct {
	volume     lsfs.VolumeID
	size       uint64
	paths      []scsi.PortGroup
	any        bool
	initiators []string
	readOnly   []string // those of initiators whose writes are refused
	restored   uint64   // rollbacks so far
	volatile   bool     // write policy mirrored-ram: hosts see a write cache

	// told is paths as the device server sees them, of all exports of the unit. It
	// follows the state of the cluster only when sessions that would find this node's
	// path unavailable have been dropped: a lost path is repeated on another one by
	// every initiator, a command that ends with "unavailable" is not.
	told *atomic.Pointer[[]scsi.PortGroup]
}

// onChange brings a new state of the cluster to the parts of this node, in this
// order: replication (local replicas), logical units, access. The first one
// starts the serving parts and at its end opens the portals (NO-STALE). It runs
// on the cluster member's goroutine; states that come meanwhile are merged there.
func (n *Node) onChange(s *cluster.State) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closing || n.cluster == nil {
		return
	}
	if n.id.Role == cluster.RoleWitness {
		n.ready.Store(true)
		return
	}
	parts := n.serving.Load()
	if parts == nil {
		var err error
		if parts, err = n.start(s); err != nil {
			n.fail(err)
			return
		}
	}
	if s.Cluster.FeatureLevel >= cluster.LevelGroups {
		n.store.RaiseRoot(format.RootVersion)
	}
	parts.replication.SetResyncRate(int64(s.Settings.ResyncRate) << 20)
	parts.replication.Update(s.Records(), s.DataNodes())
	n.reconcileSnapshots(parts, s)
	n.freed.want(n.gone(s))
	n.exportAll(parts, s)
	if self := s.Node(n.cluster.Self()); self != nil && self.Draining {
		n.drainer.poke()
	}
	if !n.ready.Load() {
		if err := parts.target.Start(context.Background()); err != nil {
			n.fail(err)
			return
		}
		n.ready.Store(true)
		n.log.Info("portals are open", "portals", n.config.ISCSI.Portals, "volumes", len(n.exports))
	}
}

// reconcileSnapshots has replication drop the snapshots that no record names, when
// the records have changed. The keeper does so now and then as well.
func (n *Node) reconcileSnapshots(parts *serving, s *cluster.State) {
	last := n.reconciled
	n.reconciled = s
	if last != nil && len(last.Snapshots) == len(s.Snapshots) && (len(s.Snapshots) == 0 || last.Snapshots[0] == s.Snapshots[0] && last.Snapshots[len(last.Snapshots)-1] == s.Snapshots[len(s.Snapshots)-1]) {
		return
	}
	parts.replication.ReconcileSnapshots(s.KnownSnapshots())
}

// gone lists deleted volumes that have a replica recorded here and no copy any more.
func (n *Node) gone(s *cluster.State) []lsfs.VolumeID {
	var ids []lsfs.VolumeID
	self := n.cluster.Self()
	for _, v := range s.Volumes {
		here := slices.ContainsFunc(v.Record.Replicas, func(r replication.Replica) bool { return r.Node == self })
		if v.Record.Deleted && here && n.store.Volume(v.ID) == nil {
			ids = append(ids, v.ID)
		}
	}
	return ids
}

// exportAll makes the logical units follow the state. Only what changed is told
// to the device server, because it tells the initiators.
func (n *Node) exportAll(parts *serving, s *cluster.State) {
	want := map[uint16]bool{}
	for _, v := range s.Volumes {
		if v.Record.Deleted {
			continue
		}
		want[v.LUN] = true
	}
	for lun := range n.exports {
		if !want[lun] {
			parts.scsi.RemoveLU(lun)
			delete(n.exports, lun)
		}
	}
	for _, v := range s.Volumes {
		if v.Record.Deleted {
			continue
		}
		if err := n.export(parts, s, v); err != nil {
			n.log.Error("volume is not exported", "volume", v.Name, "lun", v.LUN, "err", err)
		}
	}
}

func (n *Node) export(parts *serving, s *cluster.State, v *cluster.Volume) error {
	next := &export{volume: v.ID, size: v.Record.SizeBytes, paths: paths(s, &v.Record), any: v.AnyHost, initiators: initiators(s, v.Hosts), readOnly: initiators(s, v.ReadOnly), restored: v.Restored, volatile: v.Record.MirroredRAM}
	old := n.exports[v.LUN]
	if old != nil {
		next.told = old.told
	}
	if old != nil && old.volume != v.ID { // deleted and made anew between two states
		parts.scsi.RemoveLU(v.LUN)
		old = nil
	}
	if old == nil || old.volatile != next.volatile {
		volume := parts.replication.Volume(v.ID)
		if volume == nil {
			return errors.New("replication does not know it")
		}
		id := v.ID
		if old == nil {
			next.told = &atomic.Pointer[[]scsi.PortGroup]{}
			next.told.Store(&next.paths)
		}
		if err := parts.scsi.SetLU(scsi.LUConfig{
			LUN: v.LUN, VolumeUUID: v.UUID, Name: v.Name, Serial: v.Serial, NAA: v.NAA[:], LogicalBlock: v.BlockBytes, PhysicalBlock: v.PhysicalBytes,
			Thin: v.Thin, VolatileCache: next.volatile, Volume: volume,
			Paths:    func() []scsi.PortGroup { return *next.told.Load() },
			Optimize: func(group uint16, done func(error)) { n.optimize(id, group, done) },
			Space:    func() scsi.Space { return n.space(id) },
		}); err != nil {
			return err
		}
	}
	n.exports[v.LUN] = next
	if old == nil || old.any != next.any || !slices.Equal(old.initiators, next.initiators) || !slices.Equal(old.readOnly, next.readOnly) {
		parts.scsi.SetAccess(v.LUN, scsi.Visibility{Any: next.any, Initiators: next.initiators, ReadOnly: next.readOnly})
		if old != nil {
			n.dropLost(parts, s, old)
		}
	}
	if old != nil && old.size != next.size {
		parts.scsi.CapacityChanged(v.LUN)
	}
	if old != nil && old.restored != next.restored {
		parts.scsi.ContentChanged(v.LUN)
	}
	if old != nil && !slices.EqualFunc(old.paths, next.paths, samePath) {
		self := uint16(n.cluster.Self())
		if next.state(self) == scsi.Unavailable && old.state(self) != scsi.Unavailable {
			n.dropSessions(v.ID, "this node's copy is out of sync: its path is unavailable")
		}
		next.told.Store(&next.paths)
		parts.scsi.PathsChanged(v.LUN)
	}
	return nil
}

// dropLost ends the sessions of initiators that may not log in any more.
func (n *Node) dropLost(parts *serving, s *cluster.State, old *export) {
	if old.any {
		for _, session := range parts.target.Sessions() {
			if !admitted(s, session.Initiator) {
				parts.target.DropSessions(session.Initiator, "the initiator may not log in any more")
			}
		}
		return
	}
	for _, name := range old.initiators {
		if !admitted(s, name) {
			parts.target.DropSessions(name, "the initiator may not log in any more")
		}
	}
}

// state is that of a port group.
func (x *export) state(group uint16) scsi.PathState {
	for _, g := range x.paths {
		if g.ID == group {
			return g.State
		}
	}
	return scsi.Unavailable
}

func samePath(a, b scsi.PortGroup) bool {
	return a.ID == b.ID && a.State == b.State && a.Preferred == b.Preferred && slices.Equal(a.Ports, b.Ports)
}

// paths are the target port groups of a volume, one for each data node: the
// owner's is active/optimized, those of other in-sync nodes active/non-optimized,
// all others unavailable.
func paths(s *cluster.State, r *replication.Record) []scsi.PortGroup {
	var groups []scsi.PortGroup
	for _, node := range s.Nodes {
		if node.Role != cluster.RoleData {
			continue
		}
		g := scsi.PortGroup{ID: uint16(node.ID), Ports: []uint16{node.RelativePort()}, State: scsi.Unavailable}
		if r.Has(node.ID) {
			g.State = scsi.ActiveNonOptimized
		}
		if r.Owner == node.ID {
			g.State, g.Preferred = scsi.ActiveOptimized, true
		}
		groups = append(groups, g)
	}
	return groups
}

// initiators are the names of all initiators of some hosts, sorted.
func initiators(s *cluster.State, hosts []string) []string {
	var names []string
	for _, h := range hosts {
		if host := s.Host(h); host != nil {
			names = append(names, host.Initiators...)
		}
	}
	slices.Sort(names)
	return names
}

// freer tells the cluster which deleted volumes this node has freed, for as long
// as it takes. It has one goroutine.
type freer struct {
	log    *slog.Logger
	tell   func(context.Context, lsfs.VolumeID) error
	cancel context.CancelFunc
	group  sync.WaitGroup
	wake   chan struct{} // one is enough

	mu  sync.Mutex
	ids []lsfs.VolumeID // bounded by the volumes of the cluster
}

func newFreer(log *slog.Logger, tell func(context.Context, lsfs.VolumeID) error) *freer {
	ctx, cancel := context.WithCancel(context.Background())
	f := &freer{log: log, tell: tell, cancel: cancel, wake: make(chan struct{}, 1)}
	f.group.Go(func() { f.run(ctx) })
	return f
}

// want replaces the list of volumes that are to be reported.
func (f *freer) want(ids []lsfs.VolumeID) {
	f.mu.Lock()
	f.ids = ids
	f.mu.Unlock()
	if len(ids) > 0 {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
}

func (f *freer) run(ctx context.Context) {
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		select {
		case <-f.wake:
		case <-again.C:
		case <-ctx.Done():
			return
		}
		f.mu.Lock()
		ids := f.ids
		f.mu.Unlock()
		for _, id := range ids {
			err := f.tell(ctx, id)
			if err != nil && !errors.Is(err, ErrNotFound) && ctx.Err() == nil {
				f.log.Warn("freed volume was not reported, trying again", "volume", id, "err", err)
				again.Reset(5 * time.Second)
			}
		}
	}
}

func (f *freer) close() {
	f.cancel()
	f.group.Wait()
}
