package cluster

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// machine is the state machine: a state, and what is derived from it to apply
// commands quickly. It is owned by one goroutine; the states that it leaves
// behind are immutable.
type machine struct {
	state *State
	seen  map[[16]byte]*request
}

func newMachine(s *State) *machine {
	m := &machine{state: s, seen: make(map[[16]byte]*request, 2*keepRequests)}
	m.index()
	return m
}

func (m *machine) index() {
	clear(m.seen)
	for i := range m.state.requests {
		m.seen[m.state.requests[i].ID] = &m.state.requests[i]
	}
}

// apply takes one command of the log. It fails only on a command that this
// program cannot read; then nothing has changed and the node must stop.
func (m *machine) apply(index uint64, data []byte) (result, error) {
	env, cmd, err := decodeCommand(data)
	if err != nil {
		return result{}, fmt.Errorf("apply command %d: %w", index, err)
	}
	if q := m.seen[env.Request]; q != nil {
		r := result{Code: q.Code, Text: q.Text, ID: q.Value, Index: q.Index}
		if x, ok := cmd.(*cmdChange); ok {
			r.Record = m.record(x.Volume)
		}
		next := *m.state
		next.Index = index
		m.state = &next
		return r, nil
	}

	next := *m.state
	next.Index = index
	e := &edit{s: &next, env: env}
	var r result
	if _, first := cmd.(*cmdInit); !first && next.Cluster.Name == "" {
		r = refuse(codeInvalid, "the cluster is not initialised")
	} else if need := needsLevel(cmd); need > max(next.Cluster.FeatureLevel, 1) {
		r = refuse(codeRefused, "%s", tooLow(need, next.Cluster.FeatureLevel))
	} else {
		r = cmd.apply(e)
	}
	r.Index = index
	if len(r.Text) > maxText {
		r.Text = r.Text[:maxText]
	}
	next.requests = append(next.requests, request{env.Request, r.Code, r.Text, r.ID, index})
	m.state = &next
	if len(next.requests) >= 2*keepRequests {
		next.requests = slices.Clone(next.requests[keepRequests:])
		m.index()
	} else {
		m.seen[env.Request] = &next.requests[len(next.requests)-1]
	}
	return r, nil
}

func (m *machine) record(id lsfs.VolumeID) replication.Record {
	if v := m.state.Volume(id); v != nil {
		return v.Record
	}
	return replication.Record{}
}

// edit is one command at work on a new state. Lists are copied before they are
// changed, and things are replaced, never modified: older states share them.
type edit struct {
	s   *State
	env envelope
}

func (e *edit) setNode(n *Node) {
	e.s.Nodes = replace(e.s.Nodes, n, func(x *Node) bool { return x.ID == n.ID })
}

func (e *edit) setVolume(v *Volume) {
	e.s.Volumes = replace(e.s.Volumes, v, func(x *Volume) bool { return x.ID == v.ID })
}

// replace returns a copy of list with x in the place of the item that same
// accepts, or at the end.
func replace[T any](list []T, x T, same func(T) bool) []T {
	list = append(make([]T, 0, len(list)+1), list...)
	if i := slices.IndexFunc(list, same); i >= 0 {
		list[i] = x
		return list
	}
	return append(list, x)
}

func without[T any](list []T, drop func(T) bool) []T {
	return slices.DeleteFunc(slices.Clone(list), drop)
}

func (e *edit) event(sev Severity, code, format string, args ...any) {
	e.s.nextEvent++
	text := fmt.Sprintf(format, args...)
	if len(text) > maxText {
		text = text[:maxText]
	}
	e.s.Events = append(e.s.Events, Event{e.s.nextEvent, e.env.Now, sev, code, text, e.env.By})
	if len(e.s.Events) >= 2*keepEvents {
		e.s.Events = slices.Clone(e.s.Events[keepEvents:])
	}
}

func (x *cmdInit) apply(e *edit) result {
	s := e.s
	if s.Cluster.Name != "" {
		return refuse(codeExists, "the cluster %s is initialised already", s.Cluster.Name)
	}
	if !validName(x.Cluster.Name) || !validName(x.Node.Name) || x.Node.ID != 1 || x.Node.Role != RoleData || len(x.Tokens) > maxTokens {
		return refuse(codeInvalid, "malformed init command")
	}
	if err := checkAddresses(x.Node.Addresses); err != nil {
		return refuse(codeInvalid, "%s", err)
	}
	s.Cluster = x.Cluster
	n := x.Node
	s.Nodes = []*Node{&n}
	s.tokens = slices.Clone(x.Tokens)
	s.nextNode, s.nextVolume = 2, 1
	e.event(Info, "cluster-created", "cluster %s created by node %s", s.Cluster.Name, n.Name)
	return result{ID: 1}
}

func (x *cmdCreateToken) apply(e *edit) result {
	if x.Token.Role != RoleData && x.Token.Role != RoleWitness {
		return refuse(codeInvalid, "a token is for a data node or a witness")
	}
	if !x.Token.Expires.After(e.env.Now) {
		return refuse(codeInvalid, "the token would have expired already")
	}
	if slices.ContainsFunc(e.s.tokens, func(t token) bool { return t.Hash == x.Token.Hash }) {
		return refuse(codeExists, "the token exists")
	}
	live := without(e.s.tokens, func(t token) bool { return !t.Expires.After(e.env.Now) })
	if len(live) >= maxTokens {
		return refuse(codeRefused, "there are %d unexpired join tokens; wait until some have expired", len(live))
	}
	t := x.Token
	t.UsedBy = 0
	e.s.tokens = append(live, t)
	e.event(Info, "token-created", "join token for a %s node, valid until %s", t.Role, t.Expires.Format("2006-01-02 15:04:05Z"))
	return result{}
}

func (x *cmdJoin) apply(e *edit) result {
	s := e.s
	i := slices.IndexFunc(s.tokens, func(t token) bool { return t.Hash == x.Token })
	if i < 0 {
		return refuse(codeToken, "the join token is not known to this cluster: create one with: twinsan cluster token create")
	}
	t := s.tokens[i]
	if !t.Expires.After(e.env.Now) {
		return refuse(codeToken, "the join token expired at %s: create one with: twinsan cluster token create", t.Expires.Format("2006-01-02 15:04:05Z"))
	}
	if t.UsedBy != 0 {
		// The answer to the first attempt may have been lost; the key tells whether
		// this is the same node.
		if n := s.Node(t.UsedBy); n != nil && n.KeyPrint == x.KeyPrint && n.Name == x.Name {
			return result{ID: uint64(n.ID)}
		}
		return refuse(codeToken, "the join token was used by %s: create one with: twinsan cluster token create", s.NodeName(t.UsedBy))
	}
	if t.Role != x.Role {
		return refuse(codeToken, "the join token is for a %s node, not for a %s node", t.Role, x.Role)
	}
	if !validName(x.Name) {
		return refuse(codeInvalid, "%q is not a node name: %s", x.Name, nameRule)
	}
	if err := checkAddresses(x.Addresses); err != nil {
		return refuse(codeInvalid, "%s", err)
	}
	if len(s.Nodes) >= maxNodes || s.nextNode > 0xffff {
		return refuse(codeRefused, "the cluster has %d nodes, the most that is supported", len(s.Nodes))
	}
	for _, n := range s.Nodes {
		switch {
		case n.Name == x.Name:
			return refuse(codeExists, "there is a node %s already", x.Name)
		case n.shares(&x.Addresses) != "":
			return refuse(codeExists, "node %s has the address %s already", n.Name, n.shares(&x.Addresses))
		case n.KeyPrint == x.KeyPrint:
			return refuse(codeExists, "node %s has the same key", n.Name)
		case n.Role == RoleWitness && x.Role == RoleWitness:
			return refuse(codeRefused, "the cluster has a witness already: %s", n.Name)
		}
	}
	id := s.nextNode
	s.nextNode++
	s.tokens = slices.Clone(s.tokens)
	s.tokens[i].UsedBy = id
	e.setNode(&Node{ID: id, Name: x.Name, Role: x.Role, Addresses: x.Addresses, KeyPrint: x.KeyPrint, Joined: e.env.Now})
	e.event(Info, "node-joined", "%s node %s joined at %s", x.Role, x.Name, x.Addresses.Sync)
	if x.Role == RoleData {
		e.mirrorOnto(id)
	}
	return result{ID: uint64(id)}
}

// mirrorOnto gives every volume with one replica its second on node id: what was
// created while there was a single data node becomes mirrored when the second
// one arrives. The replica is not in sync; its owner brings it there (M4). The
// epoch stays, since neither owner nor in-sync set changes.
func (e *edit) mirrorOnto(id replication.NodeID) {
	for _, v := range e.s.Volumes {
		r := &v.Record
		if r.Deleted || len(r.Replicas) != 1 || r.Replicas[0].Node == id {
			continue
		}
		w := *v
		w.Record.Replicas = append(slices.Clone(r.Replicas), replication.Replica{Node: id, ID: replicaID(v.UUID, id)})
		e.setVolume(&w)
		e.event(Info, "replica-added", "volume %s gets a replica on %s", v.Name, e.s.NodeName(id))
	}
}

func (x *cmdStart) apply(e *edit) result {
	old := e.s.Node(x.Node)
	if old == nil {
		return refuse(codeNotFound, "node %d is not a member of the cluster", x.Node)
	}
	if err := checkAddresses(x.Addresses); err != nil {
		return refuse(codeInvalid, "%s", err)
	}
	for _, n := range e.s.Nodes {
		if taken := n.shares(&x.Addresses); n.ID != x.Node && taken != "" {
			return refuse(codeExists, "node %s has the address %s already", n.Name, taken)
		}
	}
	n := *old
	n.Incarnation++
	n.Addresses = x.Addresses
	n.Version = x.Version
	n.Started = e.env.Now
	e.setNode(&n)
	e.event(Info, "node-started", "node %s started (incarnation %d)", n.Name, n.Incarnation)
	return result{ID: uint64(n.Incarnation)}
}

func (x *cmdRemoveNode) apply(e *edit) result {
	s := e.s
	n := s.Node(x.Node)
	if n == nil {
		return refuse(codeNotFound, "node %d is not a member of the cluster", x.Node)
	}
	if n.Role == RoleData && len(s.DataNodes()) == 1 {
		return refuse(codeRefused, "%s is the last node with data", n.Name)
	}
	for _, v := range s.Volumes {
		r := &v.Record
		if r.Deleted {
			continue
		}
		if r.Has(n.ID) || r.Owner == n.ID {
			return refuse(codeRefused, "%s holds an in-sync copy of volume %s: stop the node first and wait until the volume goes on without it", n.Name, v.Name)
		}
	}
	for _, v := range s.Volumes {
		if slices.ContainsFunc(v.Record.Replicas, func(p replication.Replica) bool { return p.Node == n.ID }) {
			e.dropReplica(v, n.ID)
		}
	}
	e.forgetNode(n)
	s.Nodes = without(s.Nodes, func(m *Node) bool { return m.ID == n.ID })
	e.event(Warning, "node-removed", "node %s was removed from the cluster", n.Name)
	return result{}
}

// dropReplica takes a replica that is not in sync off a volume; the last one of a
// deleted volume takes the volume along.
func (e *edit) dropReplica(v *Volume, n replication.NodeID) {
	w := *v
	w.Record.Replicas = without(v.Record.Replicas, func(p replication.Replica) bool { return p.Node == n })
	w.Left = without(v.Left, func(l Left) bool { return l.Node == n })
	if w.Record.Deleted && len(w.Record.Replicas) == 0 {
		e.s.Volumes = without(e.s.Volumes, func(u *Volume) bool { return u.ID == v.ID })
		return
	}
	e.setVolume(&w)
}

func (x *cmdCreateVolume) apply(e *edit) result {
	return x.create(e, func() replication.Record { return place(e.s, x.UUID) })
}

// create makes a volume; where says on which nodes.
func (x *cmdCreateVolume) create(e *edit, where func() replication.Record) result {
	s := e.s
	switch {
	case !validName(x.Name):
		return refuse(codeInvalid, "%q is not a volume name: %s", x.Name, nameRule)
	case x.SizeBytes == 0 || x.SizeBytes%4096 != 0 || x.SizeBytes > MaxVolumeBytes:
		return refuse(codeInvalid, "the size of a volume is a multiple of 4096 bytes, up to %d TiB", MaxVolumeBytes>>40)
	case x.BlockBytes != 512 && x.BlockBytes != 4096:
		return refuse(codeInvalid, "a logical block has 512 or 4096 bytes, not %d", x.BlockBytes)
	case x.PhysicalBytes != 512 && x.PhysicalBytes != 4096:
		return refuse(codeInvalid, "a physical block has 512 or 4096 bytes, not %d", x.PhysicalBytes)
	case x.PhysicalBytes < x.BlockBytes:
		return refuse(codeInvalid, "a physical block of %d bytes is smaller than the logical block of %d bytes", x.PhysicalBytes, x.BlockBytes)
	case x.UUID == [16]byte{}:
		return refuse(codeInvalid, "the volume has no UUID")
	case len(s.DataNodes()) == 0:
		return refuse(codeRefused, "there is no data node")
	case s.VolumeNamed(x.Name) != nil:
		return refuse(codeExists, "there is a volume %s already", x.Name)
	case len(s.Volumes) >= maxVolumes:
		return refuse(codeRefused, "there are %d volumes, the most that is supported", len(s.Volumes))
	}
	for _, v := range s.Volumes {
		if v.UUID == x.UUID || v.NAA == x.NAA {
			return refuse(codeExists, "volume %s has the same identity", v.Name)
		}
	}
	hosts, r := e.hostNames(x.Hosts)
	if r.Code != codeOK {
		return r
	}
	rec := where()
	rec.Volume = s.nextVolume
	rec.SizeBytes = x.SizeBytes
	rec.Epoch = 1
	rec.Dedup, rec.Compress = x.Dedup, x.Compress
	v := &Volume{
		ID: s.nextVolume, UUID: x.UUID, Name: x.Name, LUN: freeLUN(s), NAA: x.NAA, Serial: x.Serial,
		BlockBytes: x.BlockBytes, Thin: x.Thin, AnyHost: x.AnyHost, Hosts: hosts, Created: e.env.Now, Record: rec,
		PhysicalBytes: x.PhysicalBytes,
	}
	if e.level() >= levelReplicas {
		v.Preferred = rec.Owner
	}
	s.nextVolume++
	e.setVolume(v)
	e.event(Info, "volume-created", "volume %s created: %d bytes, LUN %d, owner %s, in sync %s",
		v.Name, x.SizeBytes, v.LUN, s.NodeName(rec.Owner), e.names(rec.InSync))
	return result{ID: uint64(v.ID)}
}

// copies is the number of replicas of a volume, when there are that many data nodes.
const copies = 2

// place picks the nodes of a new volume: those with the fewest replicas, and of
// them the one that owns fewest as the owner. A node that is drained comes last.
// Lower ids win ties.
func place(s *State, uuid [16]byte) (r replication.Record) {
	type load struct {
		id             replication.NodeID
		draining       int // 1: yes
		replicas, owns int
	}
	var loads []load
	for _, id := range s.DataNodes() {
		l := load{id: id}
		if !s.Node(id).Stays() {
			l.draining = 1
		}
		for _, v := range s.Volumes {
			if v.Record.Deleted {
				continue
			}
			if v.Record.Owner == id {
				l.owns++
			}
			if slices.ContainsFunc(v.Record.Replicas, func(p replication.Replica) bool { return p.Node == id }) {
				l.replicas++
			}
		}
		loads = append(loads, l)
	}
	slices.SortStableFunc(loads, func(a, b load) int {
		return cmp.Or(cmp.Compare(a.draining, b.draining), cmp.Compare(a.replicas, b.replicas), cmp.Compare(a.id, b.id))
	})
	loads = loads[:min(copies, len(loads))]
	owner := slices.MinFunc(loads, func(a, b load) int {
		return cmp.Or(cmp.Compare(a.draining, b.draining), cmp.Compare(a.owns, b.owns), cmp.Compare(a.id, b.id))
	})
	r.Owner = owner.id
	for _, l := range loads {
		r.Replicas = append(r.Replicas, replication.Replica{Node: l.id, ID: replicaID(uuid, l.id)})
	}
	slices.SortFunc(r.Replicas, func(a, b replication.Replica) int { return cmp.Compare(a.Node, b.Node) })
	// The others prove themselves like any replica that comes back: the owner
	// compares (nothing, of an empty volume) and takes them into the in-sync set. So
	// a node that the record calls in sync has had its copy, always (B4).
	r.InSync = []replication.NodeID{owner.id}
	return r
}

// freeLUN returns the lowest logical unit number that no volume has.
func freeLUN(s *State) uint16 {
	used := make(map[uint16]bool, len(s.Volumes))
	for _, v := range s.Volumes {
		used[v.LUN] = used[v.LUN] || !v.Record.Deleted
	}
	lun := uint16(0)
	for used[lun] {
		lun++
	}
	return lun
}

func (x *cmdDeleteVolume) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	if r := e.dropVolumeSnapshots(v, x.Snapshots); r.Code != codeOK {
		return r
	}
	w := *v
	w.Hosts, w.ReadOnly, w.AnyHost, w.Restoring = nil, nil, false, 0
	w.Record.Deleted = true
	w.Record.Owner, w.Record.InSync = 0, nil
	// A change of owner or in-sync set that is still on its way must fail.
	w.Record.Epoch++
	w.Preferred, w.Left = 0, nil
	e.setVolume(&w)
	e.endOperations(func(o *Operation) bool { return o.Volume == v.ID }, OperationFailed, "the volume was deleted")
	e.event(Warning, "volume-deleted", "volume %s (%s) was deleted", v.Name, v.UUID)
	return result{ID: uint64(v.ID)}
}

func (x *cmdVolumeFreed) apply(e *edit) result {
	v := e.s.Volume(x.Volume)
	if v == nil {
		return result{} // freed by all
	}
	if !v.Record.Deleted {
		return refuse(codeRefused, "volume %s is not deleted", v.Name)
	}
	e.dropReplica(v, x.Node)
	return result{}
}

func (x *cmdResizeVolume) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	old := v.Record.SizeBytes
	switch {
	case x.SizeBytes%4096 != 0 || x.SizeBytes > MaxVolumeBytes:
		return refuse(codeInvalid, "the size of a volume is a multiple of 4096 bytes, up to %d TiB", MaxVolumeBytes>>40)
	case x.SizeBytes < old:
		return refuse(codeRefused, "volume %s has %d bytes; shrinking to %d would destroy data", v.Name, old, x.SizeBytes)
	case x.SizeBytes == old:
		return result{ID: uint64(v.ID)}
	case v.Restoring != 0:
		return refuse(codeRefused, "volume %s is being rolled back; try again in a moment", v.Name)
	}
	w := *v
	w.Record.SizeBytes = x.SizeBytes
	e.setVolume(&w)
	e.event(Info, "volume-resized", "volume %s grew from %d to %d bytes", v.Name, old, x.SizeBytes)
	return result{ID: uint64(v.ID)}
}

// volume returns a volume that is not deleted, or the refusal.
func (e *edit) volume(id lsfs.VolumeID) (*Volume, result) {
	v := e.s.Volume(id)
	if v == nil || v.Record.Deleted {
		return nil, refuse(codeNotFound, "there is no volume %d", id)
	}
	return v, result{}
}

func (x *cmdAddEvent) apply(e *edit) result {
	if x.Severity < Info || x.Severity > Error || !validName(x.Code) {
		return refuse(codeInvalid, "an event has a severity and a code")
	}
	e.event(x.Severity, x.Code, "%s", x.Text)
	return result{ID: e.s.nextEvent}
}

// names lists nodes for a message.
func (e *edit) names(ids []replication.NodeID) string {
	var b strings.Builder
	for i, id := range ids {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(e.s.NodeName(id))
	}
	return b.String()
}

const (
	nameRule      = "1 to 63 of a-z, 0-9 and inner hyphens"
	maxInitiators = 64
	maxPortals    = 16
)

// validName accepts a DNS label in lower case (RFC 1123).
func validName(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}

// validInitiator accepts an iSCSI name in lower case (RFC 7143 section 4.2.7).
func validInitiator(s string) bool {
	if len(s) > 223 || s != strings.ToLower(s) {
		return false
	}
	switch {
	case strings.HasPrefix(s, "iqn."), strings.HasPrefix(s, "eui."), strings.HasPrefix(s, "naa."):
	default:
		return false
	}
	for _, c := range []byte(s[4:]) {
		if c <= ' ' || c == 0x7f || c == ',' {
			return false
		}
	}
	return len(s) > 4
}

// checkAddresses says whether addresses can be told to others.
func checkAddresses(a Addresses) error {
	for _, x := range []struct{ what, address string }{{"sync", a.Sync}, {"management", a.Control()}} {
		host, _, err := net.SplitHostPort(x.address)
		if err != nil {
			return fmt.Errorf("%s address: %w", x.what, err)
		}
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			return fmt.Errorf("%s address %s: other nodes cannot connect to it; name one address of this node", x.what, x.address)
		}
	}
	if len(a.Portals) > maxPortals {
		return fmt.Errorf("a node has at most %d portals", maxPortals)
	}
	for _, p := range a.Portals {
		if _, _, err := net.SplitHostPort(p); err != nil {
			return fmt.Errorf("portal: %w", err)
		}
	}
	return nil
}
