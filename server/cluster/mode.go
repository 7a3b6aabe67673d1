package cluster

import (
	"fmt"
	"time"

	"github.com/twinsan/twinsan/replication"
)

// NodeMode is what an administrator has set a node to. Part of the raft log and
// snapshot formats, do not change.
type NodeMode uint8

const (
	// ModeServing: nothing special.
	ModeServing NodeMode = 0
	// ModeMaintenance: it is drained, and its absence is no alarm.
	ModeMaintenance NodeMode = 1
	// ModeEvacuating: its replicas move to other nodes.
	ModeEvacuating NodeMode = 2
)

// Stays says whether a node may be given volumes and replicas.
func (n *Node) Stays() bool { return !n.Draining && n.Mode == ModeServing }

// Away says in a word why a node does not stay.
func (n *Node) Away() string {
	switch {
	case n.Mode == ModeMaintenance:
		return "in maintenance"
	case n.Mode == ModeEvacuating:
		return "evacuated"
	case n.Draining:
		return "drained"
	}
	return "serving"
}

// cmdNodeMode sets the mode of a node.
type cmdNodeMode struct {
	Node replication.NodeID
	Mode NodeMode
	// Force enters maintenance although volumes have no other good copy.
	Force bool
	// To takes the replicas of an evacuated node; 0: any.
	To replication.NodeID
}

func (*cmdNodeMode) kind() kind { return kindNodeMode }
func (x *cmdNodeMode) walk(c *codec) {
	u32(c, &x.Node)
	u8(c, &x.Mode)
	c.flag(&x.Force)
	u32(c, &x.To)
}

func (x *cmdNodeMode) apply(e *edit) result {
	old := e.s.Node(x.Node)
	if old == nil {
		return refuse(codeNotFound, "node %d is not a member of the cluster", x.Node)
	}
	n := *old
	n.Mode, n.EvacuateTo, n.ModeSince = x.Mode, x.To, e.env.Now
	data := old.Role == RoleData
	switch x.Mode {
	case ModeServing:
		if old.Mode == ModeServing {
			return result{}
		}
		n.EvacuateTo, n.ModeSince = 0, time.Time{}
		if old.Mode == ModeMaintenance {
			n.Draining = false
		}
		e.setNode(&n)
		e.event(Info, "node-serving", "node %s is %s no more", n.Name, old.Away())
		return result{}
	case ModeMaintenance:
		if data && !x.Force && !old.Draining {
			if r := e.mayDrain(old); r.Code != codeOK {
				return r
			}
		}
		n.EvacuateTo, n.Draining = 0, data
		e.setNode(&n)
		forced := ""
		if x.Force {
			forced = ", by force"
		}
		e.event(Warning, "node-maintenance", "node %s is in maintenance%s", n.Name, forced)
		return result{}
	case ModeEvacuating:
		to := e.s.Node(x.To)
		switch {
		case !data:
			return refuse(codeInvalid, "%s is a witness: it stores nothing that could move", n.Name)
		case x.To != 0 && (to == nil || to.Role != RoleData || x.To == x.Node):
			return refuse(codeInvalid, "%s cannot take the replicas of %s", e.s.NodeName(x.To), n.Name)
		case x.To != 0 && !to.Stays():
			return refuse(codeRefused, "node %s is %s: it takes no replicas", to.Name, to.Away())
		case len(e.s.DataNodes()) < 2:
			return refuse(codeRefused, "no other data node is there to take the replicas of %s", n.Name)
		}
		e.setNode(&n)
		where := "other nodes"
		if to != nil {
			where = to.Name
		}
		e.event(Warning, "node-evacuating", "the replicas of node %s move to %s", n.Name, where)
		return result{}
	}
	return refuse(codeInvalid, "there is no mode %d of a node", x.Mode)
}

// forgetNode drops what speaks of a node that is removed.
func (e *edit) forgetNode(n *Node) {
	e.endOperations(func(o *Operation) bool { return o.To == n.ID }, OperationFailed, fmt.Sprintf("node %s was removed", n.Name))
	e.endOperations(func(o *Operation) bool { return o.From == n.ID }, OperationDone, "")
	for _, v := range e.s.Volumes {
		if v.Preferred == n.ID {
			w := *v
			w.Preferred = 0
			e.setVolume(&w)
		}
	}
	for _, m := range e.s.Nodes {
		if m.EvacuateTo == n.ID {
			w := *m
			w.EvacuateTo = 0
			e.setNode(&w)
		}
	}
	if e.s.Settings.Preferred == n.ID {
		e.s.Settings.Quorum, e.s.Settings.Preferred = QuorumAuto, 0
	}
}

// QuorumMode says which nodes vote. Part of the raft log and snapshot formats, do
// not change.
type QuorumMode uint8

const (
	// QuorumAuto: by the members (see wantVoters).
	QuorumAuto QuorumMode = 0
	// QuorumWitness: as QuorumAuto, and a witness has to be there.
	QuorumWitness QuorumMode = 1
	// QuorumPreferred: one data node alone (Q3). It survives the loss of all others;
	// when it is lost itself, an administrator decides.
	QuorumPreferred QuorumMode = 2
	// QuorumMajority: the data nodes, an odd number of three and more.
	QuorumMajority QuorumMode = 3
)

// Settings are what an administrator may set for the cluster as a whole. Zero
// values are the defaults.
type Settings struct {
	// BalanceOff: volumes stay where they are after a node has come back.
	BalanceOff bool
	// BalanceAfter is for how long all nodes must have been up before volumes move
	// back, in seconds; 0: the default.
	BalanceAfter uint32
	Quorum       QuorumMode
	Preferred    replication.NodeID // QuorumPreferred only
	// ResyncRate is what the resyncs from one node may send together, in MiB a second;
	// 0: no limit but the latency of the initiators.
	ResyncRate uint32
}

func (s *Settings) walk(c *codec) {
	c.flag(&s.BalanceOff)
	u32(c, &s.BalanceAfter)
	u8(c, &s.Quorum)
	u32(c, &s.Preferred)
	if c.version >= 4 {
		u32(c, &s.ResyncRate)
	}
}

// cmdSettings sets some of the settings.
type cmdSettings struct {
	Balance  bool // the first two
	Quorum   bool // the next two
	Resync   bool // the last
	Settings Settings
}

func (*cmdSettings) kind() kind { return kindSettings }
func (x *cmdSettings) walk(c *codec) {
	c.flag(&x.Balance)
	c.flag(&x.Quorum)
	if c.version >= 4 {
		c.flag(&x.Resync)
	}
	x.Settings.walk(c)
}

// maxBalanceAfter bounds Settings.BalanceAfter.
const maxBalanceAfter = 24 * time.Hour

// The bounds of Settings.ResyncRate in MiB a second. Less than the floor that resyncs
// keep under load (replication.ResyncFloor) would leave replicas behind for ever.
const (
	minResyncRate = replication.ResyncFloor >> 20
	maxResyncRate = 1 << 20
)

func (x *cmdSettings) apply(e *edit) result {
	now := e.s.Settings
	if x.Balance {
		if time.Duration(x.Settings.BalanceAfter)*time.Second > maxBalanceAfter {
			return refuse(codeInvalid, "volumes move back after at most %s", maxBalanceAfter)
		}
		now.BalanceOff, now.BalanceAfter = x.Settings.BalanceOff, x.Settings.BalanceAfter
	}
	if x.Quorum {
		if r := e.mayVote(&x.Settings); r.Code != codeOK {
			return r
		}
		now.Quorum, now.Preferred = x.Settings.Quorum, x.Settings.Preferred
	}
	if x.Resync {
		if r := x.Settings.ResyncRate; r != 0 && (r < minResyncRate || maxResyncRate < r) {
			return refuse(codeInvalid, "resyncs send %d to %d MiB a second, or as much as there is", minResyncRate, maxResyncRate)
		}
		now.ResyncRate = x.Settings.ResyncRate
	}
	if now == e.s.Settings {
		return result{}
	}
	if now.BalanceOff != e.s.Settings.BalanceOff {
		e.event(Info, "balance-set", "volumes %s", map[bool]string{true: "stay where they are", false: "go back to their nodes"}[now.BalanceOff])
	}
	if now.ResyncRate != e.s.Settings.ResyncRate {
		rate := "as much as there is"
		if now.ResyncRate != 0 {
			rate = fmt.Sprintf("%d MiB a second at most", now.ResyncRate)
		}
		e.event(Info, "resync-rate-set", "resyncs from one node send %s", rate)
	}
	if now.Quorum != e.s.Settings.Quorum || now.Preferred != e.s.Settings.Preferred {
		words := map[QuorumMode]string{QuorumAuto: "all data nodes, and the witness when their number is even", QuorumWitness: "the data nodes and the witness",
			QuorumPreferred: "node " + e.s.NodeName(now.Preferred) + " alone", QuorumMajority: "the data nodes"}
		e.event(Warning, "quorum-set", "the quorum is that of %s", words[now.Quorum])
	}
	e.s.Settings = now
	return result{}
}

// mayVote refuses a quorum that would be worse than none.
func (e *edit) mayVote(s *Settings) result {
	data, witnesses := len(e.s.DataNodes()), 0
	for _, n := range e.s.Nodes {
		if n.Role == RoleWitness {
			witnesses++
		}
	}
	preferred := e.s.Node(s.Preferred)
	switch s.Quorum {
	case QuorumAuto, QuorumWitness, QuorumMajority:
		if s.Preferred != 0 {
			return refuse(codeInvalid, "only the mode preferred-node names a node")
		}
	}
	switch s.Quorum {
	case QuorumAuto:
	case QuorumWitness:
		if witnesses == 0 {
			return refuse(codeRefused, "the cluster has no witness\n  let one join first: twinsan cluster token create --witness")
		}
		if data%2 != 0 {
			return refuse(codeRefused, "%d data nodes have a majority of their own, a witness would take it away: use majority", data)
		}
	case QuorumMajority:
		if data < 3 || data%2 == 0 {
			return refuse(codeRefused, "of %d data nodes alone no majority survives the loss of half: use witness or preferred-node", data)
		}
	case QuorumPreferred:
		if preferred == nil || preferred.Role != RoleData {
			return refuse(codeInvalid, "the preferred node must be a data node")
		}
	default:
		return refuse(codeInvalid, "there is no quorum mode %d", s.Quorum)
	}
	return result{}
}
