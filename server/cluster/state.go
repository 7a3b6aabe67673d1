package cluster

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Limits of the state. A mutation that would exceed one is refused.
const (
	maxNodes   = 16
	maxVolumes = 1024
	maxHosts   = 1024
	maxTokens  = 64
	// keepEvents are kept; the list grows to twice that and is cut back, so that
	// an event costs no copy of the others.
	keepEvents = 1000
	// keepRequests answers are remembered against repetition. A command is repeated
	// within the deadline of its caller, some seconds; a control plane that takes
	// this many commands in that time does not exist.
	keepRequests = 2048
	// MaxVolumeBytes is the largest size of a volume.
	MaxVolumeBytes = 1 << 46
)

// Role says what a node may do. Part of the log format, do not change.
type Role uint8

const (
	// RoleData stores volumes and serves initiators.
	RoleData Role = 1
	// RoleWitness votes and stores nothing but the raft log.
	RoleWitness Role = 2
)

func (r Role) String() string {
	switch r {
	case RoleData:
		return "data"
	case RoleWitness:
		return "witness"
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// Severity of an event. Part of the log format, do not change.
type Severity uint8

const (
	// Info: a state changed.
	Info Severity = 1
	// Warning: less protection than configured; heals itself or needs attention.
	Warning Severity = 2
	// Error: data or service is at risk.
	Error Severity = 3
)

func (s Severity) String() string {
	switch s {
	case Info:
		return "info"
	case Warning:
		return "warning"
	case Error:
		return "error"
	}
	return fmt.Sprintf("severity %d", uint8(s))
}

// Addresses is where a node is reached, each as host:port.
type Addresses struct {
	Sync    string   // the data path: replication and its leases
	Portals []string // iSCSI; none on a witness
	API     string   // admin API over TLS; may be empty
	Metrics string   // Prometheus; may be empty
	// Management is for raft and what nodes ask of each other; empty: Sync is.
	Management string `json:",omitempty"`
}

// Control is where raft and the questions of other nodes are answered.
func (a *Addresses) Control() string {
	if a.Management != "" {
		return a.Management
	}
	return a.Sync
}

// walk walks what version 1 had. Management stands at the end of what holds the
// addresses (walkManagement), so that a newer form only adds at its end.
func (a *Addresses) walk(c *codec) {
	text(c, &a.Sync)
	list(c, &a.Portals, text[string])
	text(c, &a.API)
	text(c, &a.Metrics)
}

// walkManagement walks what version 5 added to the addresses.
func (a *Addresses) walkManagement(c *codec) {
	if c.version >= 5 {
		text(c, &a.Management)
	}
}

// ClusterInfo describes the cluster as a whole. It does not change after init.
type ClusterInfo struct {
	Name         string
	UUID         uuid.UUID
	Created      time.Time
	Target       string // the IQN that all nodes export
	FeatureLevel uint32
	CA           []byte // certificate, DER
	CAKey        Sealed // PKCS #8
	Fingerprint  Sealed // dedup.Key
}

func (i *ClusterInfo) walk(c *codec) {
	text(c, &i.Name)
	c.raw(i.UUID[:])
	c.time(&i.Created)
	text(c, &i.Target)
	u32(c, &i.FeatureLevel)
	blob(c, &i.CA)
	blob(c, &i.CAKey)
	blob(c, &i.Fingerprint)
}

// Node is a member.
type Node struct {
	ID   replication.NodeID // also its target port group tag and relative target port id
	Name string
	Role Role
	Addresses
	// KeyPrint is the SHA-256 of the node's public key (SPKI). It stays when the
	// certificate is renewed.
	KeyPrint    [32]byte
	Incarnation replication.Incarnation // 0: never started
	Version     string                  // of the program, as of its last start
	Joined      time.Time
	Started     time.Time
	// Draining: initiators that log in are sent elsewhere, and volumes move away.
	Draining bool
	// Mode is what an administrator has set the node to, EvacuateTo the node that
	// takes its replicas (0: any), ModeSince when that was.
	Mode       NodeMode
	EvacuateTo replication.NodeID
	ModeSince  time.Time
}

// RelativePort is the node's relative target port id, unique in the cluster.
func (n *Node) RelativePort() uint16 { return uint16(n.ID) }

func (n *Node) walk(c *codec) {
	u32(c, &n.ID)
	text(c, &n.Name)
	u8(c, &n.Role)
	n.Addresses.walk(c)
	c.raw(n.KeyPrint[:])
	u64(c, &n.Incarnation)
	text(c, &n.Version)
	c.time(&n.Joined)
	c.time(&n.Started)
	if c.version >= 2 {
		c.flag(&n.Draining)
	}
	if c.version >= 3 {
		u8(c, &n.Mode)
		u32(c, &n.EvacuateTo)
		c.time(&n.ModeSince)
	}
	n.walkManagement(c)
}

// Volume is what the cluster knows of a volume. Its size, policies, owner and
// in-sync set are in Record. A deleted volume (Record.Deleted) stays until every
// replica has been freed; its name and LUN are free at once.
type Volume struct {
	ID         lsfs.VolumeID
	UUID       uuid.UUID
	Name       string
	LUN        uint16
	NAA        [8]byte // NAA type 3h, locally assigned
	Serial     string
	BlockBytes uint32 // logical block: 512 or 4096
	Thin       bool
	AnyHost    bool     // every initiator sees it
	Hosts      []string // names, sorted
	Created    time.Time
	Record     replication.Record
	// PhysicalBytes is the physical block: BlockBytes to 4096.
	PhysicalBytes uint32
	// ReadOnly are those of Hosts whose writes are refused, sorted.
	ReadOnly []string
	// Restoring is the snapshot to which the volume is being rolled back; 0: none.
	Restoring lsfs.VolumeID
	// Restored counts the rollbacks: hosts are told when it rises.
	Restored uint64
	// Preferred is the node that ought to own the volume; 0: none.
	Preferred replication.NodeID
	// Left says since when replicas are out of sync that were in sync before.
	Left []Left
	// Lineage names the history of the volume's content since it was promoted by
	// force; zero: it never was (B3).
	Lineage uuid.UUID
}

// defaultPhysicalBytes is the block in which the store writes: what is smaller or
// not aligned to it costs a read before the write.
const defaultPhysicalBytes = 4096

// walkPhysical walks a physical block, which version 1 did not name.
func walkPhysical(c *codec, bytes *uint32) {
	if c.version >= 2 {
		u32(c, bytes)
	} else if c.decoding {
		*bytes = defaultPhysicalBytes
	}
}

// SeenBy says whether a host of this name sees the volume.
func (v *Volume) SeenBy(host string) bool {
	return v.AnyHost || slices.Contains(v.Hosts, host)
}

func (v *Volume) walk(c *codec) {
	u64(c, &v.ID)
	c.raw(v.UUID[:])
	text(c, &v.Name)
	u16(c, &v.LUN)
	c.raw(v.NAA[:])
	text(c, &v.Serial)
	u32(c, &v.BlockBytes)
	c.flag(&v.Thin)
	c.flag(&v.AnyHost)
	list(c, &v.Hosts, text[string])
	c.time(&v.Created)
	walkRecord(c, &v.Record)
	walkPhysical(c, &v.PhysicalBytes)
	if c.version >= 2 {
		list(c, &v.ReadOnly, text[string])
	}
	if c.version >= 3 {
		v.walkSnapshots(c)
		u32(c, &v.Preferred)
		list(c, &v.Left, func(c *codec, l *Left) { l.walk(c) })
		c.raw(v.Lineage[:])
	}
}

func walkRecord(c *codec, r *replication.Record) {
	u64(c, &r.Volume)
	u64(c, &r.SizeBytes)
	u64(c, &r.Epoch)
	u32(c, &r.Owner)
	list(c, &r.InSync, u32[replication.NodeID])
	list(c, &r.Replicas, func(c *codec, p *replication.Replica) {
		u32(c, &p.Node)
		c.raw(p.ID[:])
	})
	c.flag(&r.Dedup)
	c.flag(&r.Compress)
	c.flag(&r.Forced)
	c.flag(&r.Deleted)
	if c.version >= 3 {
		u64(c, &r.Origin)
	}
}

// Host is a named set of initiators with their CHAP credentials.
type Host struct {
	Name       string
	Initiators []string // IQN, EUI or NAA names, lower case
	// User is the CHAP name that the initiator gives; empty: none is asked for.
	User   string
	Secret Sealed
	// MutualUser is the name with which the target answers the initiator's
	// challenge; empty: it does not.
	MutualUser   string
	MutualSecret Sealed
	Created      time.Time
}

func (h *Host) walk(c *codec) {
	text(c, &h.Name)
	list(c, &h.Initiators, text[string])
	text(c, &h.User)
	blob(c, &h.Secret)
	text(c, &h.MutualUser)
	blob(c, &h.MutualSecret)
	c.time(&h.Created)
}

// DiscoveryMode says how initiators prove themselves before they are told the
// portals. Part of the raft log and snapshot formats, do not change.
type DiscoveryMode uint8

const (
	// DiscoveryAsHost: as for a login, by the CHAP credentials of the host.
	DiscoveryAsHost DiscoveryMode = 0
	// DiscoveryOpen: not at all. What they are told is no secret.
	DiscoveryOpen DiscoveryMode = 1
	// DiscoveryCHAP: by one CHAP user for the whole cluster.
	DiscoveryCHAP DiscoveryMode = 2
)

// Discovery is the policy for discovery sessions; its zero is DiscoveryAsHost.
type Discovery struct {
	Mode         DiscoveryMode
	User         string // DiscoveryCHAP only, as all that follows
	Secret       Sealed
	MutualUser   string // empty: the target does not prove itself
	MutualSecret Sealed
}

func (d *Discovery) walk(c *codec) {
	u8(c, &d.Mode)
	text(c, &d.User)
	blob(c, &d.Secret)
	text(c, &d.MutualUser)
	blob(c, &d.MutualSecret)
}

// token admits one node, once. Only the hash of its secret is kept.
type token struct {
	Hash    [32]byte
	Role    Role
	Expires time.Time
	// UsedBy is the node that it admitted. It may ask again with the same key, if
	// the answer got lost.
	UsedBy replication.NodeID
}

func (t *token) walk(c *codec) {
	c.raw(t.Hash[:])
	u8(c, &t.Role)
	c.time(&t.Expires)
	u32(c, &t.UsedBy)
}

// Event is a durable fact.
type Event struct {
	Number   uint64 // 1, 2, ... without gaps
	Time     time.Time
	Severity Severity
	Code     string // stable for scripts: "node-joined", "owner-moved", ...
	Text     string
	Node     replication.NodeID // the proposer
}

func (e *Event) walk(c *codec) {
	u64(c, &e.Number)
	c.time(&e.Time)
	u8(c, &e.Severity)
	text(c, &e.Code)
	text(c, &e.Text)
	u32(c, &e.Node)
}

// request remembers the answer to a command.
type request struct {
	ID    [16]byte
	Code  code
	Text  string
	Value uint64
	Index uint64
}

func (r *request) walk(c *codec) {
	c.raw(r.ID[:])
	u8(c, &r.Code)
	text(c, &r.Text)
	u64(c, &r.Value)
	u64(c, &r.Index)
}

// State is what the quorum has decided, up to Index. It is immutable: everything
// reached through it may be read for ever and by anyone, and is changed by nobody.
// Volumes, nodes and hosts are ordered by id or name.
type State struct {
	Index   uint64 // raft index of the last command
	Cluster ClusterInfo
	Nodes   []*Node
	Volumes []*Volume // deleted ones too
	Hosts   []*Host
	// Events, oldest first; numbers without gaps.
	Events    []Event
	Discovery Discovery
	Snapshots []*Snapshot // in the order of ids
	Schedules []*Schedule // in the order of volumes
	Settings  Settings
	// Operations are the long changes that run, and the last ones that have ended,
	// oldest first.
	Operations []*Operation

	tokens     []token
	nextNode   replication.NodeID
	nextVolume lsfs.VolumeID
	nextEvent  uint64
	// nextOperation is the number of the newest operation.
	nextOperation uint64

	// requests are the answers to the last commands, oldest first, cut like Events.
	requests []request
}

func (s *State) walk(c *codec) {
	u64(c, &s.Index)
	s.Cluster.walk(c)
	pointers(c, &s.Nodes)
	pointers(c, &s.Volumes)
	pointers(c, &s.Hosts)
	list(c, &s.Events, func(c *codec, e *Event) { e.walk(c) })
	list(c, &s.tokens, func(c *codec, t *token) { t.walk(c) })
	u32(c, &s.nextNode)
	u64(c, &s.nextVolume)
	u64(c, &s.nextEvent)
	list(c, &s.requests, func(c *codec, r *request) { r.walk(c) })
	if c.version >= 2 {
		s.Discovery.walk(c)
	}
	if c.version >= 3 {
		s.walkSnapshots(c)
		s.Settings.walk(c)
		pointers(c, &s.Operations)
		u64(c, &s.nextOperation)
	}
}

// The snapshot is "TWSTATE", a version byte, the encoded state, and the SHA-256
// of all that. The version is that of the encoding (codec.go), the oldest that a
// cluster of this feature level can do with; a reader takes all older ones. It refuses a newer version and a wrong sum: the node then stops and
// says so, and is to be upgraded or joined anew. Part of the snapshot format, do
// not change.
const (
	snapshotMagic   = "TWSTATE"
	snapshotVersion = codecVersion
)

func (s *State) marshal() ([]byte, error) {
	version := s.encoding()
	c := codec{buf: append([]byte(snapshotMagic), version), version: version}
	s.walk(&c)
	if c.err != nil {
		return nil, c.err
	}
	sum := sha256.Sum256(c.buf)
	return append(c.buf, sum[:]...), nil
}

func unmarshalState(b []byte) (*State, error) {
	head := len(snapshotMagic)
	if len(b) < head+1+sha256.Size || string(b[:head]) != snapshotMagic {
		return nil, fmt.Errorf("%w: not a state snapshot", errEncoding)
	}
	version := b[head]
	if version < 1 || version > snapshotVersion {
		return nil, fmt.Errorf("%w: state snapshot of version %d; this program reads 1 to %d", errEncoding, version, snapshotVersion)
	}
	body, want := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if sum := sha256.Sum256(body); string(sum[:]) != string(want) {
		return nil, fmt.Errorf("%w: checksum of the state snapshot is wrong", errEncoding)
	}
	s := new(State)
	if err := decodeVersion(body[head+1:], version, s); err != nil {
		return nil, err
	}
	return s, nil
}

// Hash is a digest of the whole state. Nodes that have applied the same Index
// have the same hash (I18), those of the version before as well.
func (s *State) Hash() [32]byte {
	b, err := encodeVersion(s, s.encoding())
	if err != nil {
		// Every value was checked when its command was applied.
		panic("cluster: state does not encode: " + err.Error())
	}
	return sha256.Sum256(b)
}

// Node returns a node by its id, or nil.
func (s *State) Node(id replication.NodeID) *Node {
	for _, n := range s.Nodes {
		if n.ID == id {
			return n
		}
	}
	return nil
}

// NodeNamed returns a node by its name, or nil.
func (s *State) NodeNamed(name string) *Node {
	for _, n := range s.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// NodeName returns the name of a node for messages; also of one that is gone.
func (s *State) NodeName(id replication.NodeID) string {
	if n := s.Node(id); n != nil {
		return n.Name
	}
	if id == 0 {
		return "none"
	}
	return fmt.Sprintf("node %d", id)
}

// DataNodes returns the ids of the nodes with data, in order.
func (s *State) DataNodes() []replication.NodeID {
	var ids []replication.NodeID
	for _, n := range s.Nodes {
		if n.Role == RoleData {
			ids = append(ids, n.ID)
		}
	}
	return ids
}

// Volume returns a volume by its id, a deleted one too, or nil.
func (s *State) Volume(id lsfs.VolumeID) *Volume {
	i, ok := slices.BinarySearchFunc(s.Volumes, id, func(v *Volume, id lsfs.VolumeID) int {
		switch {
		case v.ID < id:
			return -1
		case v.ID > id:
			return 1
		}
		return 0
	})
	if !ok {
		return nil
	}
	return s.Volumes[i]
}

// VolumeNamed returns a volume by its name or UUID, or nil. Deleted ones are not found.
func (s *State) VolumeNamed(name string) *Volume {
	id, err := uuid.Parse(name)
	for _, v := range s.Volumes {
		if !v.Record.Deleted && (v.Name == name || err == nil && v.UUID == id) {
			return v
		}
	}
	return nil
}

// Records returns the records of all volumes, deleted ones too, in the order of ids.
func (s *State) Records() []replication.Record {
	r := make([]replication.Record, len(s.Volumes))
	for i, v := range s.Volumes {
		r[i] = v.Record
	}
	return r
}

// Host returns a host by its name, or nil.
func (s *State) Host(name string) *Host {
	for _, h := range s.Hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// HostOf returns the host that has the initiator name, or nil.
func (s *State) HostOf(initiator string) *Host {
	initiator = strings.ToLower(initiator)
	for _, h := range s.Hosts {
		if slices.Contains(h.Initiators, initiator) {
			return h
		}
	}
	return nil
}

// EventsAfter returns the kept events with numbers above n.
func (s *State) EventsAfter(n uint64) []Event {
	if len(s.Events) == 0 {
		return nil
	}
	first := s.Events[0].Number
	if n < first {
		return s.Events
	}
	if n-first+1 >= uint64(len(s.Events)) {
		return nil
	}
	return s.Events[n-first+1:]
}

// replicaID derives the id of a replica that is made with its volume or with its
// node's arrival: it must differ from every other replica's and be the same on
// all nodes that apply the command.
func replicaID(volume uuid.UUID, n replication.NodeID) (id replication.ReplicaID) {
	b := append([]byte("twinsan replica"), volume[:]...)
	sum := sha256.Sum256(binary.BigEndian.AppendUint32(b, uint32(n)))
	copy(id[:], sum[:])
	return id
}
