// Package apitest has a cluster in memory that stands behind the API in tests of
// its clients: [Backend] implements api.Backend without a store or a network.
package apitest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

// Epoch is the time at which everything in a Backend happened.
var Epoch = time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)

// Backend is a cluster "lab" of data nodes a and b and witness w. Tests set its
// fields before they use it, or under Mu.
type Backend struct {
	Mu sync.Mutex // over all fields below

	State       server.Status
	Target      string
	HostList    []server.Host
	SessionList []server.Session
	DeviceList  []server.Device
	Unreachable []server.Unreachable
	EventList   []server.Event
	Members     map[replication.NodeID]server.Role
	Join        string // address that tokens name
	Discovery   server.DiscoverySpec
	// SnapshotList and ScheduleList are those of all volumes.
	SnapshotList []server.Snapshot
	ScheduleList []server.Schedule
	Balance      bool
	ResyncRate   uint32
	Quorum       server.QuorumMode
	Preferred    string
	Level        int
	Fail         error // every call fails with it
	Panic        bool  // every call panics
	Calls        []string

	requests map[string]string
	tokens   int
	changed  chan struct{}
}

// New makes a healthy cluster with one volume, "csv1".
func New() *Backend {
	gib := uint64(1 << 30)
	pool := func(live uint64) *server.Pool {
		return &server.Pool{Size: 100 * gib, Live: live, Garbage: gib, Free: 90 * gib, Usable: 80 * gib, Mapped: 27 * gib, Stored: 10 * gib, Caches: []server.Cache{
			{Tier: "ram", Bytes: gib, Capacity: gib, Hits: 9000, Misses: 1000},
			{Tier: "flash", Path: "/dev/fast", Bytes: 40 * gib, Capacity: 64 * gib, Hits: 600, Misses: 400, Written: 50 * gib},
		}}
	}
	node := func(id replication.NodeID, name string, role server.Role) server.Member {
		n := server.Member{ID: id, Name: name, Role: role, State: server.NodeUp, Sync: fmt.Sprintf("10.0.1.1%d:7400", id), Management: fmt.Sprintf("10.0.1.1%d:7400", id), API: fmt.Sprintf("10.0.1.1%d:7443", id),
			Voter: true, Mode: server.ModeServing, Incarnation: 4, Version: "1.0.0", Started: Epoch, Leader: id == 1}
		if role == server.Data {
			n.Portals, n.Pool = []string{fmt.Sprintf("10.0.2.1%d:3260", id)}, pool(10*gib)
			n.Replicas, n.InSync = 1, 1
			n.Traffic = server.Traffic{ReadOps: 1000, WriteOps: 500, ReadBytes: gib, WriteBytes: gib / 2}
		}
		return n
	}
	b := &Backend{
		Target: "iqn.2026-11.io.twinsan:lab",
		State: server.Status{
			Cluster: "lab", Health: server.Healthy, AnsweredBy: "a", Quorum: true, Leader: "a", Voters: 3, VotersUp: 3,
			Nodes: []server.Member{node(1, "a", server.Data), node(2, "b", server.Data), node(3, "w", server.Witness)},
		},
		HostList: []server.Host{{Name: "hv1", Initiators: []string{"iqn.1991-05.com.microsoft:hv1.corp.local"}, Volumes: []string{"csv1"}, Paths: []string{"a", "b"}}},
		SessionList: []server.Session{{Node: "a", Host: "hv1", Initiator: "iqn.1991-05.com.microsoft:hv1.corp.local", ISID: [6]byte{0x80, 1, 2, 3, 4, 5}, TSIH: 1,
			Portal: "10.0.2.11:3260", Peer: "10.0.2.50:49152", Since: Epoch, Auth: "none", Digests: "none", Commands: 12, BytesIn: 4096, BytesOut: 8192}},
		DeviceList: []server.Device{
			{Node: "a", Path: "/dev/sdb", UUID: "11111111-0000-0000-0000-000000000001", Size: 100 * gib, State: "ok", DirectIO: true, Class: "flash", Live: 10 * gib, Free: 88 * gib, ReadLatency: 90 * time.Microsecond, FlushLatency: 30 * time.Microsecond},
			{Node: "b", Path: "/dev/sdb", UUID: "11111111-0000-0000-0000-000000000002", Size: 100 * gib, State: "ok", Class: "capacity", Live: 10 * gib, Free: 88 * gib},
		},
		EventList: []server.Event{
			{Number: 1, Time: Epoch, Severity: server.Notice, Code: "node-joined", Text: "node b joined", Node: "a"},
			{Number: 2, Time: Epoch.Add(time.Minute), Severity: server.Warning, Code: "node-down", Text: "node b does not answer", Node: "a"},
		},
		Members: map[replication.NodeID]server.Role{1: server.Data, 2: server.Data, 3: server.Witness},
		Join:    "10.0.1.11:7400",

		Discovery: server.DiscoverySpec{Mode: server.DiscoveryHost},
		Balance:   true,
		Quorum:    server.QuorumAuto,
		Level:     2,

		requests: map[string]string{},
		changed:  make(chan struct{}),
	}
	b.add(server.VolumeSpec{Name: "csv1", Size: 2 << 40, Hosts: []string{"hv1"}, Dedup: true, Compress: true})
	b.State.Nodes[0].Owns = 1
	return b
}

// add makes a volume; the caller holds Mu or is alone.
func (b *Backend) add(spec server.VolumeSpec) *server.Volume {
	n := len(b.State.Volumes) + 1
	b.State.Volumes = append(b.State.Volumes, server.Volume{
		ID: lsfs.VolumeID(n), Name: spec.Name, UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", n), LUN: uint16(n - 1),
		Serial: fmt.Sprintf("tw%06d", n), NAA: fmt.Sprintf("naa.3000000000%06d", n), Size: spec.Size, LogicalBlock: max(512, spec.LogicalBlock),
		PhysicalBlock: cmp.Or(spec.PhysicalBlock, 4096), Room: 70 << 30,
		Paths: []server.Path{
			{Node: "a", State: server.PathOptimized, Portals: []string{"10.0.2.11:3260"}},
			{Node: "b", State: server.PathNonOptimized, Portals: []string{"10.0.2.12:3260"}},
		},
		WritePolicy: policyOf(spec.MirroredRAM),
		Dedup:       spec.Dedup, Compress: spec.Compress, Thin: !spec.Thick, Hosts: spec.Hosts, AnyHost: spec.AnyHost, Created: Epoch,
		State: server.VolumeOnline, Epoch: 1, Owner: "a", ServedBy: []string{"a", "b"}, Mapped: 3 << 30,
		Replicas: []server.Replica{{Node: "a", State: server.ReplicaInSync, Owner: true}, {Node: "b", State: server.ReplicaInSync}},
	})
	return &b.State.Volumes[n-1]
}

func (b *Backend) begin(call string) error {
	b.Mu.Lock()
	b.Calls = append(b.Calls, call)
	if b.Panic {
		b.Mu.Unlock()
		panic("apitest: told to")
	}
	if b.Fail != nil {
		defer b.Mu.Unlock()
		return b.Fail
	}
	return nil
}

func (b *Backend) volume(name string) (*server.Volume, error) {
	for i := range b.State.Volumes {
		if v := &b.State.Volumes[i]; v.Name == name || v.UUID == name {
			return v, nil
		}
	}
	return nil, fmt.Errorf("volume %q: %w", name, server.ErrNotFound)
}

// Status returns State.
func (b *Backend) Status(context.Context) (*server.Status, error) {
	if err := b.begin("Status"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	s := b.State
	s.Nodes, s.Volumes = slices.Clone(s.Nodes), slices.Clone(s.Volumes)
	return &s, nil
}

// Info describes the cluster.
func (b *Backend) Info(context.Context) (*server.Info, error) {
	if err := b.begin("Info"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	i := &server.Info{Name: b.State.Cluster, UUID: "22222222-0000-4000-8000-000000000000", Created: Epoch, Target: b.Target, FeatureLevel: b.Level, LevelKnown: 2, QuorumMode: b.Quorum, Preferred: b.Preferred, Balance: b.Balance, ResyncRate: b.ResyncRate, BalanceAfter: time.Minute, Leader: b.State.Leader, Quorum: b.State.Quorum, Voters: b.State.Voters,
		Discovery: b.Discovery.Mode, DiscoveryUser: b.Discovery.User, DiscoveryMutual: b.Discovery.MutualUser}
	for _, n := range b.State.Nodes {
		for _, p := range n.Portals {
			i.Portals = append(i.Portals, server.Portal{Address: p, Node: n.Name, Group: uint16(n.ID)})
		}
	}
	return i, nil
}

// CreateToken counts tokens.
func (b *Backend) CreateToken(_ context.Context, role server.Role, ttl time.Duration) (*server.Token, error) {
	if err := b.begin(fmt.Sprintf("CreateToken %s %s", role, ttl)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	b.tokens++
	return &server.Token{Text: fmt.Sprintf("tw1-token%d", b.tokens), Role: role, Expires: Epoch.Add(ttl), Addresses: []string{b.Join}}, nil
}

// IssueCertificate answers with fixed texts.
func (b *Backend) IssueCertificate(_ context.Context, name string, csr []byte) ([]byte, []byte, time.Time, error) {
	if err := b.begin("IssueCertificate " + name); err != nil {
		return nil, nil, time.Time{}, err
	}
	defer b.Mu.Unlock()
	return []byte("certificate\n"), []byte("ca\n"), Epoch.Add(24 * time.Hour), nil
}

// Emit records an event and wakes those who follow.
func (b *Backend) Emit(e server.Event) {
	b.Mu.Lock()
	defer b.Mu.Unlock()
	b.EventList = append(b.EventList, e)
	close(b.changed)
	b.changed = make(chan struct{})
}

// Events sends EventList, and with follow what Emit adds.
func (b *Backend) Events(ctx context.Context, after uint64, follow bool, send func(server.Event) error) error {
	if err := b.begin("Events"); err != nil {
		return err
	}
	b.Mu.Unlock()
	for {
		b.Mu.Lock()
		list, changed := slices.Clone(b.EventList), b.changed
		b.Mu.Unlock()
		for _, e := range list {
			if e.Number > after {
				if err := send(e); err != nil {
					return err
				}
				after = e.Number
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Member looks into Members.
func (b *Backend) Member(id replication.NodeID) (server.Role, bool) {
	b.Mu.Lock()
	defer b.Mu.Unlock()
	r, ok := b.Members[id]
	return r, ok
}

// Devices lists DeviceList.
func (b *Backend) Devices(_ context.Context, node string) ([]server.Device, []server.Unreachable, error) {
	if err := b.begin("Devices " + node); err != nil {
		return nil, nil, err
	}
	defer b.Mu.Unlock()
	return slices.DeleteFunc(slices.Clone(b.DeviceList), func(d server.Device) bool { return node != "" && d.Node != node }), b.Unreachable, nil
}

// ChangeDevice changes DeviceList: drains and replacements end at once.
func (b *Backend) ChangeDevice(_ context.Context, c server.DeviceChange, _ bool) (*server.Device, error) {
	if err := b.begin(fmt.Sprintf("ChangeDevice %s %s %s %s", c.Action, c.Node, c.Device, c.Path)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	fresh := server.Device{Node: c.Node, Path: c.Path, UUID: "00000000-0000-4000-8000-00000000ffff", Size: 1 << 40, State: "ok", DirectIO: true, Class: cmp.Or(c.Class, "flash")}
	if c.Action == server.DeviceAdd {
		b.DeviceList = append(b.DeviceList, fresh)
		return &fresh, nil
	}
	at := slices.IndexFunc(b.DeviceList, func(d server.Device) bool {
		return d.Node == c.Node && (d.Path == c.Device || d.UUID == c.Device)
	})
	if at < 0 {
		return nil, fmt.Errorf("device %q: %w", c.Device, server.ErrNotFound)
	}
	d := &b.DeviceList[at]
	switch c.Action {
	case server.DeviceDrain:
		d.State, d.Live = "drained", 0
	case server.DeviceKeep:
		d.State = "ok"
	case server.DeviceReplace:
		*d = fresh
	case server.DeviceRemove:
		if d.State != "drained" {
			return nil, fmt.Errorf("%w: device %s is %s: drain it first", server.ErrRefused, d.Path, d.State)
		}
		gone := *d
		b.DeviceList = slices.Delete(b.DeviceList, at, at+1)
		return &gone, nil
	}
	out := *d
	return &out, nil
}

// Sessions lists SessionList.
func (b *Backend) Sessions(context.Context) ([]server.Session, []server.Unreachable, error) {
	if err := b.begin("Sessions"); err != nil {
		return nil, nil, err
	}
	defer b.Mu.Unlock()
	return slices.Clone(b.SessionList), b.Unreachable, nil
}

// Report is node a's.
func (b *Backend) Report(context.Context) (*server.Report, error) {
	if err := b.begin("Report"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	return &server.Report{
		Node: 1, Version: "1.0.0", Started: Epoch, Ready: true, Pool: b.State.Nodes[0].Pool, Devices: slices.Clone(b.DeviceList[:1]), Sessions: slices.Clone(b.SessionList),
		Volumes: []server.VolumeReport{{ID: 1, Role: "owner", Owner: true, Served: true, Epoch: 3, Mapped: 9,
			Traffic:  server.Traffic{ReadOps: 1, WriteOps: 2, ReadBytes: 3, WriteBytes: 4},
			Replicas: []server.Replica{{Node: "b", State: server.ReplicaSyncing, ResyncDone: 5, ResyncTotal: 6}},
			Room:     8, Counts: Counts(), Reservations: Reserved()}},
	}, nil
}

// CreateVolume adds a volume, once for each request.
func (b *Backend) CreateVolume(_ context.Context, spec server.VolumeSpec) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("CreateVolume %s %d", spec.Name, spec.Size)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	if name, ok := b.requests[spec.RequestID]; ok && spec.RequestID != "" {
		return b.volume(name)
	}
	if _, err := b.volume(spec.Name); err == nil {
		return nil, fmt.Errorf("volume %q: %w", spec.Name, server.ErrExists)
	}
	for _, h := range spec.Hosts {
		if !slices.ContainsFunc(b.HostList, func(x server.Host) bool { return x.Name == h }) {
			return nil, fmt.Errorf("host %q: %w", h, server.ErrNotFound)
		}
	}
	b.requests[spec.RequestID] = spec.Name
	v := *b.add(spec)
	return &v, nil
}

// DeleteVolume refuses a volume of a host with sessions unless inUse.
func (b *Backend) DeleteVolume(_ context.Context, name string, dryRun, inUse, withSnapshots bool) (*server.Volume, []server.Session, error) {
	if err := b.begin(fmt.Sprintf("DeleteVolume %s dry=%v", name, dryRun)); err != nil {
		return nil, nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, nil, err
	}
	var using []server.Session
	for _, s := range b.SessionList {
		if v.AnyHost || slices.Contains(v.Hosts, s.Host) {
			using = append(using, s)
		}
	}
	if len(using) > 0 && !inUse {
		return nil, nil, fmt.Errorf("%w: volume %s is in use by %s", server.ErrRefused, v.Name, using[0].Initiator)
	}
	if v.Snapshots > 0 && !withSnapshots {
		return nil, nil, fmt.Errorf("%w: volume %s has %d snapshots: delete them first, or with the volume: --with-snapshots", server.ErrRefused, v.Name, v.Snapshots)
	}
	gone := *v
	if !dryRun {
		b.State.Volumes = slices.DeleteFunc(b.State.Volumes, func(x server.Volume) bool { return x.UUID == gone.UUID })
	}
	return &gone, using, nil
}

func policyOf(mirroredRAM bool) server.WritePolicy {
	if mirroredRAM {
		return server.MirroredRAM
	}
	return server.Durable
}

// SetWritePolicy changes the write policy of a volume.
func (b *Backend) SetWritePolicy(_ context.Context, name string, p server.WritePolicy) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("SetWritePolicy %s %s", name, p)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	v.WritePolicy = p
	return v, nil
}

// ResizeVolume grows a volume.
func (b *Backend) ResizeVolume(_ context.Context, name string, size uint64) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("ResizeVolume %s %d", name, size)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	if size < v.Size {
		return nil, fmt.Errorf("%w: volume %s cannot shrink", server.ErrRefused, name)
	}
	v.Size = size
	out := *v
	return &out, nil
}

// CheckVolume finds the replicas equal while they are in sync.
func (b *Backend) CheckVolume(_ context.Context, name string, _ bool) ([]server.Digest, bool, error) {
	if err := b.begin("CheckVolume " + name); err != nil {
		return nil, false, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, false, err
	}
	equal := true
	var out []server.Digest
	for _, r := range v.Replicas {
		sum := sha256.Sum256([]byte(v.UUID))
		d := server.Digest{Node: r.Node, Sum: sum[:]}
		switch r.State {
		case server.ReplicaInSync:
		case server.ReplicaDown:
			d, equal = server.Digest{Node: r.Node, Error: "does not answer"}, false
		default:
			d.Sum, d.Different, equal = nil, []uint32{7}, false
		}
		out = append(out, d)
	}
	return out, equal, nil
}

// SetVolumeHosts sets the hosts.
func (b *Backend) SetVolumeHosts(_ context.Context, name string, hosts []string, any bool) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("SetVolumeHosts %s %s %v", name, strings.Join(hosts, ","), any)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	v.Hosts, v.AnyHost = hosts, any
	out := *v
	return &out, nil
}

// Counts are what hosts did with a volume: ATS wins and loses, UNMAP is used, and
// one WRITE SAME found the pool full.
func Counts() []server.ClassCount {
	return []server.ClassCount{
		{Class: "read", Commands: 1000, Good: 1000, Bytes: 1 << 30, Nanoseconds: 200e6},
		{Class: "write", Commands: 500, Good: 497, Bytes: 1 << 29, Nanoseconds: 250e6, Refused: []server.Refusal{
			{Status: 2, Key: 7, ASC: 0x27, ASCQ: 7, Count: 2}, {Status: 0x18, Count: 1}}},
		{Class: "caw", Commands: 9, Good: 7, Bytes: 7 << 10, Nanoseconds: 9e6, Refused: []server.Refusal{{Status: 2, Key: 0xe, ASC: 0x1d, Count: 2}}},
		{Class: "unmap", Commands: 3, Good: 3, Bytes: 3 << 20, Nanoseconds: 3e6},
		{Class: "xcopy", Commands: 1, Nanoseconds: 1e6, Refused: []server.Refusal{{Status: 2, Key: 0xa, ASC: 0x0d, ASCQ: 2, Count: 1}}},
	}
}

// Reserved is a volume that host hv1 has reserved through both nodes.
func Reserved() *server.Reservations {
	name := "iqn.1991-05.com.microsoft:hv1.corp.local"
	return &server.Reservations{Generation: 4, Persist: true, Type: "write exclusive, registrants only", Registrations: []server.Registration{
		{Host: "hv1", Initiator: name, ISID: [6]byte{0x80, 1, 2, 3, 4, 5}, Node: "a", Key: 0x1234abcd, Holder: true},
		{Host: "hv1", Initiator: name, ISID: [6]byte{0x80, 1, 2, 3, 4, 6}, Node: "b", Key: 0x1234abcd},
	}}
}

// MoveVolume makes another node with a copy in sync the owner.
func (b *Backend) MoveVolume(_ context.Context, name, to string, _ bool) (*server.Volume, error) {
	if err := b.begin(fmt.Sprintf("MoveVolume %s %s", name, to)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(v.Replicas, func(r server.Replica) bool { return r.Node == to })
	switch {
	case at < 0:
		return nil, fmt.Errorf("node %q: %w", to, server.ErrNotFound)
	case v.Replicas[at].State != server.ReplicaInSync:
		return nil, fmt.Errorf("%w: the copy of volume %s on node %s is not in sync", server.ErrRefused, v.Name, to)
	}
	v.Owner = to
	v.Replicas = slices.Clone(v.Replicas)
	for i := range v.Replicas {
		v.Replicas[i].Owner = v.Replicas[i].Node == to
	}
	v.Paths = slices.Clone(v.Paths)
	for i := range v.Paths {
		v.Paths[i].State = server.PathNonOptimized
		if v.Paths[i].Node == to {
			v.Paths[i].State = server.PathOptimized
		}
	}
	for i := range b.State.Nodes {
		b.State.Nodes[i].Owns = 0
		for _, x := range b.State.Volumes {
			if x.Owner == b.State.Nodes[i].Name {
				b.State.Nodes[i].Owns++
			}
		}
	}
	out := *v
	return &out, nil
}

// ClearReservations drops the reservations.
func (b *Backend) ClearReservations(_ context.Context, name string, dryRun, _ bool) (*server.Volume, *server.Reservations, error) {
	if err := b.begin(fmt.Sprintf("ClearReservations %s dry=%v", name, dryRun)); err != nil {
		return nil, nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, nil, err
	}
	was := v.Reservations
	if !dryRun {
		v.Reservations = nil
	}
	out := *v
	return &out, was, nil
}

// MapVolume adds hosts.
func (b *Backend) MapVolume(_ context.Context, name string, hosts []string, readOnly bool) (*server.Volume, error) {
	return b.remap(fmt.Sprintf("MapVolume %s %s %v", name, strings.Join(hosts, ","), readOnly), name, hosts, true, readOnly)
}

// UnmapVolume takes hosts away.
func (b *Backend) UnmapVolume(_ context.Context, name string, hosts []string) (*server.Volume, error) {
	return b.remap(fmt.Sprintf("UnmapVolume %s %s", name, strings.Join(hosts, ",")), name, hosts, false, false)
}

func (b *Backend) remap(call, name string, hosts []string, add, readOnly bool) (*server.Volume, error) {
	if err := b.begin(call); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if !slices.ContainsFunc(b.HostList, func(x server.Host) bool { return x.Name == h }) {
			return nil, fmt.Errorf("host %q: %w", h, server.ErrNotFound)
		}
	}
	named := func(h string) bool { return slices.Contains(hosts, h) }
	v.Hosts, v.ReadOnly = slices.DeleteFunc(slices.Clone(v.Hosts), named), slices.DeleteFunc(slices.Clone(v.ReadOnly), named)
	if add {
		v.Hosts = append(v.Hosts, hosts...)
	}
	if readOnly {
		v.ReadOnly = append(v.ReadOnly, hosts...)
	}
	out := *v
	return &out, nil
}

// ScrubNode shows a scrub that is half way, or was stopped.
func (b *Backend) ScrubNode(_ context.Context, name string, action server.ScrubAction, fullSpeed, _ bool) (*server.Scrub, error) {
	if err := b.begin(fmt.Sprintf("ScrubNode %s %s %v", name, action, fullSpeed)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	for i := range b.State.Nodes {
		if m := &b.State.Nodes[i]; m.Name == name && m.Role == server.Data {
			if m.Scrub == nil {
				m.Scrub = &server.Scrub{Node: name, Phase: "blocks", Done: 0.5, Left: time.Hour, Reclaim: true, Current: server.ScrubResult{Started: Epoch, Blocks: 1000}}
			}
			if action != server.ScrubShow {
				m.Scrub.Running, m.Scrub.Stopped, m.Scrub.FullSpeed = action == server.ScrubStart, action == server.ScrubStop, fullSpeed
			}
			s := *m.Scrub
			return &s, nil
		}
	}
	return nil, fmt.Errorf("node %q: %w", name, server.ErrNotFound)
}

// MergeNode shows a pass that has found something, and one that runs after start.
func (b *Backend) MergeNode(_ context.Context, name string, action server.MergeAction, _ bool) (*server.Merge, error) {
	if err := b.begin(fmt.Sprintf("MergeNode %s %s", name, action)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	if !slices.ContainsFunc(b.State.Nodes, func(m server.Member) bool { return m.Name == name && m.Role == server.Data }) {
		return nil, fmt.Errorf("node %q: %w", name, server.ErrNotFound)
	}
	m := &server.Merge{Node: name, On: true, CatalogueBytes: 1 << 20, Blocks: 100, Bytes: 300_000,
		Last: server.MergeResult{Started: Epoch, Finished: Epoch.Add(time.Minute), Looked: 5000, Found: 120, Blocks: 100, Bytes: 300_000}}
	if action == server.MergeStart {
		m.Running, m.Done, m.Current = true, 0.25, server.MergeResult{Started: Epoch.Add(time.Hour), Looked: 40}
	}
	return m, nil
}

// DrainNode moves all volumes of the node at once.
func (b *Backend) DrainNode(_ context.Context, name string, drain bool) (*server.Member, error) {
	if err := b.begin(fmt.Sprintf("DrainNode %s %v", name, drain)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	at := slices.IndexFunc(b.State.Nodes, func(n server.Member) bool { return n.Name == name })
	if at < 0 {
		return nil, fmt.Errorf("node %q: %w", name, server.ErrNotFound)
	}
	for _, v := range b.State.Volumes {
		for _, r := range v.Replicas {
			if drain && r.Node != name && r.State != server.ReplicaInSync {
				return nil, fmt.Errorf("%w: volume %s would have nowhere to go: the copy on node %s is not in sync", server.ErrRefused, v.Name, r.Node)
			}
		}
	}
	n := &b.State.Nodes[at]
	n.Draining = drain
	if drain {
		n.Owns = 0
	}
	out := *n
	return &out, nil
}

// SetDiscovery remembers the policy.
func (b *Backend) SetDiscovery(_ context.Context, spec server.DiscoverySpec) error {
	if err := b.begin(fmt.Sprintf("SetDiscovery %s %s/%d %s/%d", spec.Mode, spec.User, len(spec.Secret), spec.MutualUser, len(spec.MutualSecret))); err != nil {
		return err
	}
	defer b.Mu.Unlock()
	b.Discovery = spec
	return nil
}

// Hosts lists HostList.
func (b *Backend) Hosts(context.Context) ([]server.Host, error) {
	if err := b.begin("Hosts"); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	return slices.Clone(b.HostList), nil
}

// AddHost adds a host.
func (b *Backend) AddHost(_ context.Context, spec server.HostSpec) (*server.Host, error) {
	if err := b.begin(fmt.Sprintf("AddHost %s %s/%d %s/%d", spec.Name, spec.CHAPUser, len(spec.CHAPSecret), spec.MutualUser, len(spec.MutualSecret))); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	h := server.Host{Name: spec.Name, Initiators: spec.Initiators, CHAPUser: spec.CHAPUser, MutualUser: spec.MutualUser}
	b.HostList = append(b.HostList, h)
	return &h, nil
}

// RemoveHost refuses a host with paths unless inUse.
func (b *Backend) RemoveHost(_ context.Context, name string, dryRun, inUse bool) (*server.Host, error) {
	if err := b.begin(fmt.Sprintf("RemoveHost %s dry=%v", name, dryRun)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	at := slices.IndexFunc(b.HostList, func(h server.Host) bool { return h.Name == name })
	if at < 0 {
		return nil, fmt.Errorf("host %q: %w", name, server.ErrNotFound)
	}
	h := b.HostList[at]
	if len(h.Paths) > 0 && !inUse {
		return nil, fmt.Errorf("%w: host %s is logged in to %s", server.ErrRefused, name, strings.Join(h.Paths, " and "))
	}
	if !dryRun {
		b.HostList = slices.Delete(b.HostList, at, at+1)
	}
	return &h, nil
}
