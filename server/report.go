package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/twinsan/twinsan/lsfs"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/scsi"
)

// chunkBytes is the unit in which replication counts resync.
const chunkBytes = 1 << 20

// Report returns what only this node knows.
func (n *Node) Report(context.Context) (*Report, error) {
	r := &Report{Node: n.cluster.Self(), Version: Version, Started: n.started, Ready: n.ready.Load()}
	if n.store == nil {
		return r, nil
	}
	state := n.cluster.State()
	stats, room := n.store.Stats(), n.store.Room()
	r.Pool = &Pool{
		Size: bytesOf(room.Size), Live: bytesOf(room.Live), Garbage: bytesOf(room.Garbage), Free: bytesOf(room.Free), Usable: bytesOf(room.Usable),
		Mapped: stats.MappedBlocks * 4096, Stored: bytesOf(stats.UniqueBytes), Caches: caches(&stats),
		Reclaim: stats.ReclaimBlocks * 4096, WriteAmplification: stats.WriteAmplification(),
	}
	r.Scrub = n.scrub(state)
	for _, d := range n.store.Devices() {
		r.Devices = append(r.Devices, n.deviceReport(&d))
	}
	parts := n.serving.Load()
	if parts == nil {
		return r, nil
	}
	for _, s := range parts.target.Sessions() {
		if s.Discovery {
			continue // it asks for portals and is gone; it uses no volume
		}
		x := Session{
			Node: n.id.Name, Initiator: s.Initiator, ISID: s.ISID, TSIH: s.TSIH, Portal: s.Portal, Peer: s.Peer, Since: s.Since, Auth: s.Auth,
			Digests: digests(s.HeaderDigest, s.DataDigest), Commands: s.Commands, BytesIn: s.BytesIn, BytesOut: s.BytesOut, Tasks: s.InFlight,
		}
		if h := state.HostOf(s.Initiator); h != nil {
			x.Host = h.Name
		}
		r.Sessions = append(r.Sessions, x)
	}
	units := map[[16]byte]*scsi.LUStats{}
	for _, u := range parts.scsi.Stats() {
		units[u.VolumeUUID] = &u
	}
	for _, v := range state.Volumes {
		if volume := parts.replication.Volume(v.ID); volume != nil && !v.Record.Deleted {
			x := n.volumeReport(state, v, volume.Status())
			if at, here := volume.Standing(); here {
				x.Standing = &at
			}
			if u := units[v.UUID]; u != nil {
				x.Traffic, x.Counts = unitTraffic(u), classCounts(u)
			}
			held := parts.scsi.Reservations(v.LUN)
			x.Reservations = reservationsOf(state, &held)
			x.Room = n.space(v.ID).Free
			r.Volumes = append(r.Volumes, x)
		}
	}
	return r, nil
}

// caches lists the levels of the cache, the nearest first.
func caches(s *lsfs.Stats) []Cache {
	all := []Cache{{Tier: "ram", Bytes: bytesOf(s.L1.Bytes), Capacity: bytesOf(s.L1.Capacity), Hits: s.L1.Hits, Misses: s.L1.Misses}}
	l2 := &s.L2
	if l2.Path == "" {
		return all
	}
	x := Cache{
		Tier: "flash", Path: l2.Path, Bytes: bytesOf(l2.Bytes), Capacity: bytesOf(l2.Capacity), Hits: uint64(l2.Hits), Misses: uint64(l2.Misses),
		Written: bytesOf(l2.Written), Warming: !l2.Warm,
	}
	if l2.Failure != nil {
		x.Failure, x.Warming = l2.Failure.Error(), false
	}
	return append(all, x)
}

func digests(header, data bool) string {
	switch {
	case header && data:
		return "header, data"
	case header:
		return "header"
	case data:
		return "data"
	}
	return "none"
}

func bytesOf(n int64) uint64 { return uint64(max(n, 0)) }

// unitTraffic sums what initiators moved through one logical unit.
func unitTraffic(u *scsi.LUStats) (t Traffic) {
	for class, c := range u.Classes {
		switch scsi.OpClass(class) {
		case scsi.ClassRead:
			t.ReadOps += c.Good
			t.ReadBytes += c.Bytes
		case scsi.ClassWrite, scsi.ClassCompareAndWrite:
			t.WriteOps += c.Good
			t.WriteBytes += c.Bytes
		}
	}
	return t
}

// volumeReport is this node's view of a volume.
func (n *Node) volumeReport(state *cluster.State, v *cluster.Volume, s replication.Status) VolumeReport {
	self := n.cluster.Self()
	x := VolumeReport{ID: v.ID, Role: s.Role.String(), Epoch: s.Epoch, Owner: s.Role == replication.Active && s.Serving}
	if c := n.store.Volume(v.ID); c != nil {
		x.Mapped = c.MappedBlocks() * 4096
	}
	// Through this node initiators reach the volume when it owns it, or is in sync
	// and has a link to the owner.
	x.Served = x.Owner
	for _, r := range s.Replicas {
		if s.Role == replication.Standby && r.Node == s.Owner && s.Owner != self && r.Linked {
			x.Served = true
		}
		if !x.Owner {
			continue
		}
		replica := Replica{Node: state.NodeName(r.Node), State: ReplicaStale, Owner: r.Node == self}
		switch {
		case r.InSync:
			replica.State = ReplicaInSync
		case r.Syncing:
			replica.State, replica.ResyncDone, replica.ResyncTotal = ReplicaSyncing, bytesOf(r.Done)*chunkBytes, bytesOf(r.Total)*chunkBytes
			replica.ResyncSent = bytesOf(r.SentBytes)
			if r.Done > 0 && r.Total > r.Done {
				replica.ResyncLeft = time.Duration(float64(r.SyncedFor) * float64(r.Total-r.Done) / float64(r.Done))
			}
		}
		x.Replicas = append(x.Replicas, replica)
	}
	return x
}

// reportMax is how long another node may take to report. Longer is silence.
const reportMax = 1500 * time.Millisecond

// reports asks all nodes at the same time.
func (n *Node) reports(ctx context.Context, s *cluster.State) map[replication.NodeID]reply {
	ctx, cancel := context.WithTimeout(ctx, reportMax)
	defer cancel()
	var mu sync.Mutex
	out := map[replication.NodeID]reply{}
	var group sync.WaitGroup
	peers := n.peers.Load()
	for _, node := range s.Nodes {
		group.Go(func() {
			var r reply
			switch {
			case node.ID == n.cluster.Self():
				r.report, r.err = n.Report(ctx)
			case peers == nil || node.API == "":
				r.err = fmt.Errorf("its API is not known")
			default:
				r = n.askReport(ctx, *peers, node)
			}
			mu.Lock()
			out[node.ID] = r
			mu.Unlock()
		})
	}
	group.Wait()
	return out
}

// Status puts the picture of the cluster together.
func (n *Node) Status(ctx context.Context) (*Status, error) {
	state := n.known()
	s := n.recorded(state)
	merge(s, n.reports(ctx, state))
	s.Problems = append(s.Problems, linkProblems(n.id.Name, n.paces(), state.NodeName)...)
	return s, nil
}

// known is the newest state, or before this node has met the others one with
// itself alone, so that it can say what it waits for.
func (n *Node) known() *cluster.State {
	state := n.cluster.State()
	if len(state.Nodes) > 0 {
		return state
	}
	return &cluster.State{Nodes: []*cluster.Node{{ID: n.id.Node, Name: n.id.Name, Role: n.id.Role, Addresses: n.config.addresses()}}}
}

// recorded is the status as the cluster recorded it, without what nodes report.
func (n *Node) recorded(state *cluster.State) *Status {
	leader, voters, detours := n.cluster.Leader(), n.cluster.Voters(), n.cluster.Detours()
	s := &Status{Cluster: n.id.Cluster, AnsweredBy: n.id.Name, Quorum: n.cluster.Quorum(), Voters: len(voters)}
	if leader != 0 {
		s.Leader = state.NodeName(leader)
	}
	for _, x := range state.Nodes {
		m := Member{
			ID: x.ID, Name: x.Name, Role: Data, Sync: x.Sync, Management: x.Control(), Portals: slices.Clone(x.Portals), API: x.API, Metrics: x.Metrics,
			Leader: x.ID == leader, Voter: slices.Contains(voters, x.ID), Incarnation: uint64(x.Incarnation), Version: x.Version, Started: x.Started,
			Draining: x.Draining, Mode: modes[x.Mode], ModeSince: x.ModeSince,
		}
		if x.EvacuateTo != 0 {
			m.EvacuateTo = state.NodeName(x.EvacuateTo)
		}
		if x.Role == cluster.RoleWitness {
			m.Role = Witness
		}
		m.Detour = slices.Contains(detours, x.ID)
		m.Failure = failureOf(state, x)
		s.Nodes = append(s.Nodes, m)
	}
	snapshots := state.SnapshotCounts()
	for _, v := range state.Volumes {
		x := volumeOf(state, v)
		x.Snapshots = snapshots[v.ID]
		s.Volumes = append(s.Volumes, x)
	}
	for _, o := range state.Operations {
		s.Operations = append(s.Operations, operationOf(state, o))
	}
	return s
}

// failureOf is what a node said of why it stopped, if it has not started since.
func failureOf(state *cluster.State, x *cluster.Node) string {
	for i := len(state.Events) - 1; i >= 0; i-- {
		e := &state.Events[i]
		switch {
		case e.Time.Before(x.Started):
			return ""
		case e.Node == x.ID && e.Code == cluster.EventNodeFailed:
			return e.Text
		}
	}
	return ""
}

// volumeOf is a volume as it is recorded.
func volumeOf(state *cluster.State, v *cluster.Volume) Volume {
	x := Volume{
		ID: v.ID, Name: v.Name, UUID: v.UUID.String(), LUN: v.LUN, Serial: v.Serial, NAA: "naa." + hex.EncodeToString(v.NAA[:]),
		Size: v.Record.SizeBytes, LogicalBlock: v.BlockBytes, Dedup: v.Record.Dedup, Compress: v.Record.Compress, Thin: v.Thin,
		Hosts: slices.Clone(v.Hosts), AnyHost: v.AnyHost, Created: v.Created, Epoch: uint64(v.Record.Epoch), State: VolumeStarting,
		PhysicalBlock: v.PhysicalBytes, ReadOnly: slices.Clone(v.ReadOnly),
	}
	x.Restoring = v.Restoring != 0
	if s := state.Snapshot(v.Record.Origin); s != nil {
		x.Origin = state.Volume(s.Volume).Name + "@" + s.Name
	}
	if v.Record.Deleted {
		x.State = VolumeDeleting
	}
	if v.Preferred != 0 {
		x.Preferred = state.NodeName(v.Preferred)
	}
	if v.Lineage != (uuid.UUID{}) {
		x.Lineage = v.Lineage.String()
	}
	if v.Record.Owner != 0 {
		x.Owner = state.NodeName(v.Record.Owner)
	}
	for _, r := range v.Record.Replicas {
		replica := Replica{Node: state.NodeName(r.Node), State: ReplicaStale, Owner: r.Node == v.Record.Owner}
		if v.Record.Has(r.Node) {
			replica.State = ReplicaInSync
		}
		if at := slices.IndexFunc(v.Left, func(l cluster.Left) bool { return l.Node == r.Node }); at >= 0 {
			replica.Since = v.Left[at].Time
		}
		x.Replicas = append(x.Replicas, replica)
	}
	for _, g := range paths(state, &v.Record) {
		node := state.Node(replication.NodeID(g.ID))
		p := Path{Node: node.Name, State: PathUnavailable, Portals: slices.Clone(node.Portals)}
		switch g.State {
		case scsi.ActiveOptimized:
			p.State = PathOptimized
		case scsi.ActiveNonOptimized:
			p.State = PathNonOptimized
		}
		x.Paths = append(x.Paths, p)
	}
	return x
}
