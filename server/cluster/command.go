package cluster

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// A command in the raft log is an envelope and a body:
//
//	version  1 byte   of the encoding of the body (codec.go)
//	kind     1 byte   which body
//	request  16 bytes random; equal in every copy of one command
//	now      8 bytes  the proposer's clock, nanoseconds since 1970
//	by       4 bytes  the proposing node
//	body              see the walk of the type
//
// Part of the raft log format, do not change. A node that meets a version, a
// kind or a body that it does not know stops: it must not pass over a command
// that the others apply. So a command is written in the oldest version that can
// say what it says: a node that was not upgraded yet goes on until somebody
// uses what it does not know.
const commandVersion = codecVersion

// oldestVersion is the version in which a command is written.
func oldestVersion(x command) byte {
	switch x := x.(type) {
	case *cmdInit:
		return withManagement(&x.Node.Addresses)
	case *cmdJoin:
		return withManagement(&x.Addresses)
	case *cmdStart:
		return withManagement(&x.Addresses)
	case *cmdCreateVolume:
		if x.PhysicalBytes == defaultPhysicalBytes {
			return 1
		}
		return 2
	case *cmdDeleteVolume:
		if x.Snapshots {
			return 3
		}
		return 1
	case *cmdMapVolume, *cmdDrainNode, *cmdDiscovery:
		return 2
	case *cmdSettings:
		if x.Resync {
			return 4
		}
		return 3
	}
	if x.kind() >= kindAddReplica {
		return 3
	}
	return 1
}

// withManagement is the oldest version that can say addresses.
func withManagement(a *Addresses) byte {
	if a.Management != "" {
		return 5
	}
	return 1
}

// maxCommandBytes bounds a command in the log and on the wire.
const maxCommandBytes = 256 << 10

// kind names the body of a command. Part of the raft log format, do not change.
type kind uint8

const (
	kindInit         kind = 1
	kindJoin         kind = 2
	kindStart        kind = 3
	kindRemoveNode   kind = 4
	kindChange       kind = 5
	kindCreateVolume kind = 6
	kindDeleteVolume kind = 7
	kindResizeVolume kind = 8
	kindVolumeFreed  kind = 9
	kindAddHost      kind = 10
	kindRemoveHost   kind = 11
	kindVolumeHosts  kind = 12
	kindAddEvent     kind = 13
	kindCreateToken  kind = 14
	kindMapVolume    kind = 15
	kindDrainNode    kind = 16
	kindDiscovery    kind = 17
	// Kinds from 32 on are of version 3.
	kindAddReplica      kind = 32
	kindRemoveReplica   kind = 33
	kindCancelOperation kind = 34
	kindNodeMode        kind = 35
	kindSettings        kind = 36
	kindPrefer          kind = 37
	kindPromote         kind = 38
	kindRaiseLevel      kind = 39
)

type envelope struct {
	Request [16]byte
	Now     time.Time
	By      replication.NodeID
}

// command is the body of a command. apply changes e.s, or refuses and changes nothing.
type command interface {
	walker
	kind() kind
	apply(e *edit) result
}

func newCommand(k kind) command {
	switch k {
	case kindInit:
		return new(cmdInit)
	case kindJoin:
		return new(cmdJoin)
	case kindStart:
		return new(cmdStart)
	case kindRemoveNode:
		return new(cmdRemoveNode)
	case kindChange:
		return new(cmdChange)
	case kindCreateVolume:
		return new(cmdCreateVolume)
	case kindDeleteVolume:
		return new(cmdDeleteVolume)
	case kindResizeVolume:
		return new(cmdResizeVolume)
	case kindVolumeFreed:
		return new(cmdVolumeFreed)
	case kindAddHost:
		return new(cmdAddHost)
	case kindRemoveHost:
		return new(cmdRemoveHost)
	case kindVolumeHosts:
		return new(cmdVolumeHosts)
	case kindAddEvent:
		return new(cmdAddEvent)
	case kindCreateToken:
		return new(cmdCreateToken)
	case kindMapVolume:
		return new(cmdMapVolume)
	case kindDrainNode:
		return new(cmdDrainNode)
	case kindDiscovery:
		return new(cmdDiscovery)
	case kindAddReplica:
		return new(cmdAddReplica)
	case kindRemoveReplica:
		return new(cmdRemoveReplica)
	case kindCancelOperation:
		return new(cmdCancelOperation)
	case kindNodeMode:
		return new(cmdNodeMode)
	case kindSettings:
		return new(cmdSettings)
	case kindPrefer:
		return new(cmdPrefer)
	case kindPromote:
		return new(cmdPromote)
	case kindRaiseLevel:
		return new(cmdRaiseLevel)
	}
	return newSnapshotCommand(k)
}

func (v *envelope) walk(c *codec) {
	c.raw(v.Request[:])
	c.time(&v.Now)
	u32(c, &v.By)
}

func encodeCommand(v envelope, x command) ([]byte, error) {
	version := oldestVersion(x)
	c := codec{buf: []byte{version, byte(x.kind())}, version: version}
	v.walk(&c)
	x.walk(&c)
	if c.err == nil && len(c.buf) > maxCommandBytes {
		c.fail("command too long")
	}
	return c.buf, c.err
}

func decodeCommand(b []byte) (envelope, command, error) {
	if len(b) < 2 || len(b) > maxCommandBytes {
		return envelope{}, nil, fmt.Errorf("%w: command of %d bytes", errEncoding, len(b))
	}
	if b[0] < 1 || b[0] > commandVersion {
		return envelope{}, nil, fmt.Errorf("%w: command of version %d; this program knows 1 to %d", errEncoding, b[0], commandVersion)
	}
	x := newCommand(kind(b[1]))
	if x == nil {
		return envelope{}, nil, fmt.Errorf("%w: command of unknown kind %d", errEncoding, b[1])
	}
	c := codec{buf: b[2:], version: b[0], decoding: true}
	var v envelope
	v.walk(&c)
	x.walk(&c)
	if c.err == nil && len(c.buf) != 0 {
		c.fail("trailing bytes")
	}
	if c.err == nil && b[0] != oldestVersion(x) {
		c.fail("a command in another version than the oldest that can say it")
	}
	return v, x, c.err
}

// cmdInit makes the cluster and its first node. It is the first command of every log.
type cmdInit struct {
	Cluster ClusterInfo
	Node    Node // ID is 1
	Tokens  []token
}

func (*cmdInit) kind() kind { return kindInit }
func (x *cmdInit) walk(c *codec) {
	x.Cluster.walk(c)
	x.Node.walk(c)
	list(c, &x.Tokens, func(c *codec, t *token) { t.walk(c) })
}

// cmdJoin admits a node against a token.
type cmdJoin struct {
	Token     [32]byte // hash of the secret
	Name      string
	Role      Role
	Addresses Addresses
	KeyPrint  [32]byte
}

func (*cmdJoin) kind() kind { return kindJoin }
func (x *cmdJoin) walk(c *codec) {
	c.raw(x.Token[:])
	text(c, &x.Name)
	u8(c, &x.Role)
	x.Addresses.walk(c)
	c.raw(x.KeyPrint[:])
	x.Addresses.walkManagement(c)
}

// cmdStart raises the incarnation of a node and tells where it is now.
type cmdStart struct {
	Node      replication.NodeID
	Addresses Addresses
	Version   string
}

func (*cmdStart) kind() kind { return kindStart }
func (x *cmdStart) walk(c *codec) {
	u32(c, &x.Node)
	x.Addresses.walk(c)
	text(c, &x.Version)
	x.Addresses.walkManagement(c)
}

// cmdRemoveNode takes a node out of the cluster.
type cmdRemoveNode struct{ Node replication.NodeID }

func (*cmdRemoveNode) kind() kind      { return kindRemoveNode }
func (x *cmdRemoveNode) walk(c *codec) { u32(c, &x.Node) }

// cmdChange is a compare-and-set on a volume's record.
type cmdChange struct{ replication.Change }

func (*cmdChange) kind() kind { return kindChange }
func (x *cmdChange) walk(c *codec) {
	u64(c, &x.Volume)
	u64(c, &x.Expect)
	u32(c, &x.Owner)
	list(c, &x.InSync, u32[replication.NodeID])
	u32(c, &x.Grow)
	c.raw(x.GrowReplica[:])
	u64(c, &x.GrowIncarnation)
	u32(c, &x.By)
	text(c, &x.Reason)
}

// cmdCreateVolume makes a volume; the state machine picks its id, LUN and nodes.
type cmdCreateVolume struct {
	Name       string
	UUID       uuid.UUID
	NAA        [8]byte
	Serial     string
	SizeBytes  uint64
	BlockBytes uint32
	Dedup      bool
	Compress   bool
	Thin       bool
	AnyHost    bool
	Hosts      []string
	// PhysicalBytes is the physical block; 4096 in version 1.
	PhysicalBytes uint32
}

func (*cmdCreateVolume) kind() kind { return kindCreateVolume }
func (x *cmdCreateVolume) walk(c *codec) {
	text(c, &x.Name)
	c.raw(x.UUID[:])
	c.raw(x.NAA[:])
	text(c, &x.Serial)
	u64(c, &x.SizeBytes)
	u32(c, &x.BlockBytes)
	c.flag(&x.Dedup)
	c.flag(&x.Compress)
	c.flag(&x.Thin)
	c.flag(&x.AnyHost)
	list(c, &x.Hosts, text[string])
	walkPhysical(c, &x.PhysicalBytes)
}

// cmdDeleteVolume records the deletion of a volume.
type cmdDeleteVolume struct {
	Volume    lsfs.VolumeID
	Snapshots bool // its snapshots go with it; without, it is refused while there are some
}

func (*cmdDeleteVolume) kind() kind { return kindDeleteVolume }
func (x *cmdDeleteVolume) walk(c *codec) {
	u64(c, &x.Volume)
	if c.version >= 3 {
		c.flag(&x.Snapshots)
	}
}

// cmdResizeVolume grows a volume.
type cmdResizeVolume struct {
	Volume    lsfs.VolumeID
	SizeBytes uint64
}

func (*cmdResizeVolume) kind() kind { return kindResizeVolume }
func (x *cmdResizeVolume) walk(c *codec) {
	u64(c, &x.Volume)
	u64(c, &x.SizeBytes)
}

// cmdVolumeFreed says that a node has freed its replica of a deleted volume.
type cmdVolumeFreed struct {
	Volume lsfs.VolumeID
	Node   replication.NodeID
}

func (*cmdVolumeFreed) kind() kind { return kindVolumeFreed }
func (x *cmdVolumeFreed) walk(c *codec) {
	u64(c, &x.Volume)
	u32(c, &x.Node)
}

// cmdAddHost adds a host. The secrets come sealed.
type cmdAddHost struct{ Host Host }

func (*cmdAddHost) kind() kind      { return kindAddHost }
func (x *cmdAddHost) walk(c *codec) { x.Host.walk(c) }

// cmdRemoveHost removes a host and takes it off all volumes.
type cmdRemoveHost struct{ Name string }

func (*cmdRemoveHost) kind() kind      { return kindRemoveHost }
func (x *cmdRemoveHost) walk(c *codec) { text(c, &x.Name) }

// cmdVolumeHosts lets exactly these hosts see a volume.
type cmdVolumeHosts struct {
	Volume  lsfs.VolumeID
	Hosts   []string
	AnyHost bool
}

func (*cmdVolumeHosts) kind() kind { return kindVolumeHosts }
func (x *cmdVolumeHosts) walk(c *codec) {
	u64(c, &x.Volume)
	list(c, &x.Hosts, text[string])
	c.flag(&x.AnyHost)
}

// cmdAddEvent records a fact that came about outside the state machine.
type cmdAddEvent struct {
	Severity Severity
	Code     string
	Text     string
}

func (*cmdAddEvent) kind() kind { return kindAddEvent }
func (x *cmdAddEvent) walk(c *codec) {
	u8(c, &x.Severity)
	text(c, &x.Code)
	text(c, &x.Text)
}

// cmdCreateToken admits one more node.
type cmdCreateToken struct{ Token token }

func (*cmdCreateToken) kind() kind      { return kindCreateToken }
func (x *cmdCreateToken) walk(c *codec) { x.Token.walk(c) }

// mapping is what a host may do with a volume. Part of the raft log format, do
// not change.
type mapping uint8

const (
	mapNone      mapping = 0
	mapReadWrite mapping = 1
	mapReadOnly  mapping = 2
)

// cmdMapVolume gives a volume to some hosts, or takes it away, and leaves the
// others as they are.
type cmdMapVolume struct {
	Volume lsfs.VolumeID
	Hosts  []string
	As     mapping
}

func (*cmdMapVolume) kind() kind { return kindMapVolume }
func (x *cmdMapVolume) walk(c *codec) {
	u64(c, &x.Volume)
	list(c, &x.Hosts, text[string])
	u8(c, &x.As)
}

// cmdDrainNode says that initiators and volumes leave a node, or may come back.
type cmdDrainNode struct {
	Node  replication.NodeID
	Drain bool
}

func (*cmdDrainNode) kind() kind { return kindDrainNode }
func (x *cmdDrainNode) walk(c *codec) {
	u32(c, &x.Node)
	c.flag(&x.Drain)
}

// cmdDiscovery says how initiators prove themselves to ask for the portals. The
// secrets come sealed.
type cmdDiscovery struct{ Discovery Discovery }

func (*cmdDiscovery) kind() kind      { return kindDiscovery }
func (x *cmdDiscovery) walk(c *codec) { x.Discovery.walk(c) }
