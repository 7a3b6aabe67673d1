package server

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// Info returns the identity of the cluster.
func (n *Node) Info(context.Context) (*Info, error) {
	state := n.known()
	i := &Info{
		Name: n.id.Cluster, UUID: n.id.UUID.String(), Created: n.id.Created, Target: n.id.Target, FeatureLevel: int(max(state.Cluster.FeatureLevel, 1)), LevelKnown: cluster.FeatureLevel,
		Quorum: n.cluster.Quorum(), Voters: len(n.cluster.Voters()),
		Discovery: discoveryModes[state.Discovery.Mode], DiscoveryUser: state.Discovery.User, DiscoveryMutual: state.Discovery.MutualUser,
	}
	i.ResyncRate = state.Settings.ResyncRate
	i.QuorumMode, i.Balance = quorumModes[state.Settings.Quorum], !state.Settings.BalanceOff
	if i.BalanceAfter = balanceAfter; state.Settings.BalanceAfter != 0 {
		i.BalanceAfter = time.Duration(state.Settings.BalanceAfter) * time.Second
	}
	if state.Settings.Preferred != 0 {
		i.Preferred = state.NodeName(state.Settings.Preferred)
	}
	if leader := n.cluster.Leader(); leader != 0 {
		i.Leader = state.NodeName(leader)
	}
	for _, x := range state.Nodes {
		for _, p := range x.Portals {
			i.Portals = append(i.Portals, Portal{Address: p, Node: x.Name, Group: uint16(x.ID)})
		}
	}
	return i, nil
}

// Member says what a node is in the cluster.
func (n *Node) Member(id replication.NodeID) (Role, bool) {
	x := n.cluster.State().Node(id)
	switch {
	case x == nil:
		return "", false
	case x.Role == cluster.RoleWitness:
		return Witness, true
	}
	return Data, true
}

// CreateToken makes a join token.
func (n *Node) CreateToken(ctx context.Context, role Role, ttl time.Duration) (*Token, error) {
	as := cluster.RoleData
	if role == Witness {
		as = cluster.RoleWitness
	}
	t, err := n.cluster.CreateToken(ctx, as, ttl)
	if err != nil {
		return nil, err
	}
	out := &Token{Text: t.Text, Role: role, Expires: t.Expires}
	for _, x := range n.cluster.State().Nodes {
		if x.Role != cluster.RoleData {
			continue
		}
		// This node first: it is known to answer.
		if x.ID == n.cluster.Self() {
			out.Addresses = slices.Insert(out.Addresses, 0, x.Control())
		} else {
			out.Addresses = append(out.Addresses, x.Control())
		}
	}
	return out, nil
}

// IssueCertificate signs an administrator's certificate.
func (n *Node) IssueCertificate(ctx context.Context, name string, csr []byte) (certificate, ca []byte, expires time.Time, err error) {
	cert, root, expires, err := n.cluster.IssueAdminCertificate(ctx, csr, name)
	if err != nil {
		return nil, nil, time.Time{}, err
	}
	text := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	return text(cert), text(root), expires, nil
}

// eventPoll is how often a follower looks for new events. Events are rare and
// looking costs nothing, so no list of waiters is kept.
const eventPoll = 200 * time.Millisecond

// Events sends recorded events.
func (n *Node) Events(ctx context.Context, after uint64, follow bool, send func(Event) error) error {
	tick := time.NewTicker(eventPoll)
	defer tick.Stop()
	for {
		state := n.cluster.State()
		for _, e := range state.EventsAfter(after) {
			severity := Notice
			switch e.Severity {
			case cluster.Warning:
				severity = Warning
			case cluster.Error:
				severity = Failure
			}
			if err := send(Event{Number: e.Number, Time: e.Time, Severity: severity, Code: e.Code, Text: e.Text, Node: state.NodeName(e.Node)}); err != nil {
				return err
			}
			after = e.Number
		}
		if !follow {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// collect asks all data nodes, or the named one, for their reports.
func (n *Node) collect(ctx context.Context, name string, each func(*Report)) ([]Unreachable, error) {
	state := n.known()
	if name != "" && state.NodeNamed(name) == nil {
		return nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
	}
	var missing []Unreachable
	replies := n.reports(ctx, state)
	for _, x := range state.Nodes {
		if x.Role != cluster.RoleData || (name != "" && x.Name != name) {
			continue
		}
		switch r := replies[x.ID]; {
		case r.report != nil:
			each(r.report)
		case r.err != nil:
			missing = append(missing, Unreachable{x.Name, r.err.Error()})
		}
	}
	return missing, nil
}

// Devices lists devices.
func (n *Node) Devices(ctx context.Context, node string) (all []Device, missing []Unreachable, err error) {
	missing, err = n.collect(ctx, node, func(r *Report) { all = append(all, r.Devices...) })
	return all, missing, err
}

// Sessions lists sessions.
func (n *Node) Sessions(ctx context.Context) (all []Session, missing []Unreachable, err error) {
	missing, err = n.collect(ctx, "", func(r *Report) { all = append(all, r.Sessions...) })
	return all, missing, err
}

// volumeNamed finds a volume by name or uuid in a state as fresh as the quorum's.
func (n *Node) volumeNamed(ctx context.Context, name string) (*cluster.State, *cluster.Volume, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, nil, err
	}
	if v := state.VolumeNamed(name); v != nil {
		return state, v, nil
	}
	for _, v := range state.Volumes {
		if v.UUID.String() == name && !v.Record.Deleted {
			return state, v, nil
		}
	}
	return nil, nil, fmt.Errorf("volume %q: %w", name, ErrNotFound)
}

// described completes a changed volume by what the nodes report of it.
func (n *Node) described(ctx context.Context, id lsfs.VolumeID) (*Volume, error) {
	s, err := n.Status(ctx)
	if err != nil {
		return nil, err
	}
	for i := range s.Volumes {
		if s.Volumes[i].ID == id {
			return &s.Volumes[i], nil
		}
	}
	return nil, fmt.Errorf("volume %d: %w", id, ErrNotFound)
}

// CreateVolume makes a volume.
func (n *Node) CreateVolume(ctx context.Context, spec VolumeSpec) (*Volume, error) {
	if spec.Size == 0 || spec.Size%4096 != 0 {
		return nil, fmt.Errorf("%w: the size is %d bytes; want a multiple of 4 KiB above 0", ErrInvalid, spec.Size)
	}
	v, err := n.cluster.CreateVolume(ctx, cluster.VolumeSpec{
		Name: spec.Name, SizeBytes: spec.Size, BlockBytes: spec.LogicalBlock, Hosts: spec.Hosts, AnyHost: spec.AnyHost,
		NoDedup: !spec.Dedup, NoCompress: !spec.Compress, RequestID: spec.RequestID,
		PhysicalBytes: spec.PhysicalBlock, Thick: spec.Thick,
	})
	if err != nil {
		return nil, err
	}
	return n.described(ctx, v.ID)
}

// DeleteVolume deletes a volume.
func (n *Node) DeleteVolume(ctx context.Context, name string, dryRun, inUse, withSnapshots bool) (*Volume, []Session, error) {
	state, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	out, err := n.described(ctx, v.ID)
	if err != nil {
		return nil, nil, err
	}
	using, err := n.using(ctx, state, v)
	if err != nil {
		return nil, nil, err
	}
	if len(using) > 0 && !inUse {
		return nil, nil, fmt.Errorf("%w: volume %s is in use: %s is logged in to node %s\n  log its hosts out first, or delete it all the same: --in-use", ErrRefused, v.Name, using[0].Initiator, using[0].Node)
	}
	if out.Snapshots > 0 && !withSnapshots {
		return nil, nil, fmt.Errorf("%w: volume %s has %d snapshots\n  delete them first, or with the volume: --with-snapshots", ErrRefused, v.Name, out.Snapshots)
	}
	if dryRun {
		return out, using, nil
	}
	if err := n.cluster.DeleteVolume(ctx, v.ID, withSnapshots); err != nil {
		return nil, nil, err
	}
	out.State = VolumeDeleting
	return out, using, nil
}

// using lists the sessions of initiators that see a volume. Whether such a
// session really has the disk open cannot be known.
func (n *Node) using(ctx context.Context, state *cluster.State, v *cluster.Volume) ([]Session, error) {
	sessions, _, err := n.Sessions(ctx)
	if err != nil {
		return nil, err
	}
	names := initiators(state, v.Hosts)
	return slices.DeleteFunc(sessions, func(s Session) bool {
		return !v.AnyHost && !slices.Contains(names, strings.ToLower(s.Initiator))
	}), nil
}

// ResizeVolume grows a volume.
func (n *Node) ResizeVolume(ctx context.Context, name string, size uint64) (*Volume, error) {
	_, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, err
	}
	if size == 0 || size%4096 != 0 {
		return nil, fmt.Errorf("%w: the size is %d bytes; want a multiple of 4 KiB", ErrInvalid, size)
	}
	if _, err := n.cluster.ResizeVolume(ctx, v.ID, size); err != nil {
		return nil, err
	}
	return n.described(ctx, v.ID)
}

// CheckVolume compares the replicas of a volume, on its owner.
func (n *Node) CheckVolume(ctx context.Context, name string, ownerOnly bool) ([]Digest, bool, error) {
	state, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, false, err
	}
	var digests []Digest
	equal := false
	err = n.atOwner(state, v, ownerOnly,
		func(parts *serving) (err error) {
			digests, equal, err = n.checkHere(ctx, parts, state, v)
			return err
		},
		func(p Peers, owner *cluster.Node) (err error) {
			digests, equal, err = p.CheckVolume(ctx, owner.ID, n.api(owner), v.UUID.String())
			return err
		})
	return digests, equal, err
}

func (n *Node) checkHere(ctx context.Context, parts *serving, state *cluster.State, v *cluster.Volume) ([]Digest, bool, error) {
	volume := parts.replication.Volume(v.ID)
	if volume == nil {
		return nil, false, fmt.Errorf("volume %q: %w", v.Name, ErrNotFound)
	}
	r, err := volume.Check(ctx, nil)
	if errors.Is(err, replication.ErrNotOwner) {
		return nil, false, fmt.Errorf("volume %s is changing its owner: %w", v.Name, ErrNotReady)
	}
	if err != nil {
		return nil, false, err
	}
	digests, equal := []Digest{{Node: n.id.Name, Sum: r.Digest[:]}}, true
	for _, x := range r.Replicas {
		d := Digest{Node: state.NodeName(x.Node), Different: x.Different}
		for _, id := range x.Snapshots {
			name := fmt.Sprintf("snapshot %d, which no record names", id)
			if s := state.Snapshot(id); s != nil {
				name = s.Name
			}
			d.Snapshots = append(d.Snapshots, name)
		}
		switch {
		case x.Err != nil:
			d.Error, equal = x.Err.Error(), false
		case !x.Equal:
			equal = false
		default:
			d.Sum = r.Digest[:]
		}
		digests = append(digests, d)
	}
	for _, x := range v.Record.Replicas {
		name := state.NodeName(x.Node)
		if !slices.ContainsFunc(digests, func(d Digest) bool { return d.Node == name }) {
			digests, equal = append(digests, Digest{Node: name, Error: "out of sync, so not compared"}), false
		}
	}
	return digests, equal, nil
}

// SetVolumeHosts says who sees a volume.
func (n *Node) SetVolumeHosts(ctx context.Context, name string, hosts []string, any bool) (*Volume, error) {
	_, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, err := n.cluster.SetVolumeHosts(ctx, v.ID, hosts, any); err != nil {
		return nil, err
	}
	return n.described(ctx, v.ID)
}

// hostOf describes a host, with the sessions that it has.
func hostOf(state *cluster.State, h *cluster.Host, sessions []Session) Host {
	x := Host{Name: h.Name, Initiators: slices.Clone(h.Initiators), CHAPUser: h.User, MutualUser: h.MutualUser}
	for _, v := range state.Volumes {
		if !v.Record.Deleted && v.SeenBy(h.Name) {
			x.Volumes = append(x.Volumes, v.Name)
		}
	}
	for _, s := range sessions {
		if s.Host == h.Name && !slices.Contains(x.Paths, s.Node) {
			x.Paths = append(x.Paths, s.Node)
		}
	}
	slices.Sort(x.Paths)
	return x
}

// Hosts lists the hosts.
func (n *Node) Hosts(ctx context.Context) ([]Host, error) {
	sessions, _, err := n.Sessions(ctx)
	if err != nil {
		return nil, err
	}
	state := n.cluster.State()
	out := make([]Host, 0, len(state.Hosts))
	for _, h := range state.Hosts {
		out = append(out, hostOf(state, h, sessions))
	}
	return out, nil
}

// AddHost adds a host.
func (n *Node) AddHost(ctx context.Context, spec HostSpec) (*Host, error) {
	h, err := n.cluster.AddHost(ctx, cluster.HostSpec{
		Name: spec.Name, Initiators: spec.Initiators, User: spec.CHAPUser, Secret: spec.CHAPSecret, MutualUser: spec.MutualUser, MutualSecret: spec.MutualSecret,
	})
	if err != nil {
		return nil, err
	}
	out := hostOf(n.cluster.State(), h, nil)
	return &out, nil
}

// RemoveHost removes a host.
func (n *Node) RemoveHost(ctx context.Context, name string, dryRun, inUse bool) (*Host, error) {
	state, err := n.cluster.Sync(ctx)
	if err != nil {
		return nil, err
	}
	h := state.Host(name)
	if h == nil {
		return nil, fmt.Errorf("host %q: %w", name, ErrNotFound)
	}
	sessions, _, err := n.Sessions(ctx)
	if err != nil {
		return nil, err
	}
	out := hostOf(state, h, sessions)
	if len(out.Paths) > 0 && !inUse {
		return nil, fmt.Errorf("%w: host %s is logged in to %s\n  log it out first, or remove it all the same: --in-use", ErrRefused, name, strings.Join(out.Paths, " and "))
	}
	if dryRun {
		return &out, nil
	}
	return &out, n.cluster.RemoveHost(ctx, name)
}
