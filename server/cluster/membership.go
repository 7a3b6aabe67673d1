package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

const (
	// governEvery is how often a leader compares the raft configuration with the
	// members, besides at each change.
	governEvery = 250 * time.Millisecond
	// changeMax bounds the wait until raft takes a change of its configuration.
	changeMax = 2 * time.Second
	// pingMax bounds the question whether a node is there.
	pingMax = time.Second
	// behindMax is how many entries a node may lack to be given a vote.
	behindMax = 16
)

// stepKind is one change of the raft configuration.
type stepKind int

const (
	stepNone     stepKind = iota
	stepHandOver          // give leadership to a data node
	stepAdd               // add without a vote, or correct the address
	stepRemove
	stepPromote // give a vote
	stepDemote  // take it away
)

type step struct {
	kind stepKind
	node replication.NodeID
}

// wantVoters says which nodes ought to vote (Q1, Q3).
//
//	one data node              it alone; a witness waits without a vote
//	two data nodes             both and the witness; without a witness only one of
//	                           them, the preferred node, so that the cluster survives
//	                           the loss of the other
//	three and more data nodes  all, and the witness when their number is even
//
// An administrator may want one preferred node in any case, or the data nodes alone.
func wantVoters(nodes []*Node, q *Settings, voters []replication.NodeID, self replication.NodeID) []replication.NodeID {
	var data, witness []replication.NodeID
	for _, n := range nodes {
		if n.Role == RoleData {
			data = append(data, n.ID)
		} else {
			witness = append(witness, n.ID)
		}
	}
	switch {
	case q.Quorum == QuorumPreferred && slices.Contains(data, q.Preferred):
		return []replication.NodeID{q.Preferred}
	case q.Quorum == QuorumMajority && len(data) != 2:
		return data
	case len(data) == 2 && len(witness) == 0:
		preferred := data[0]
		if !slices.Contains(voters, preferred) && slices.Contains(voters, data[1]) || data[1] == self {
			preferred = data[1]
		}
		return []replication.NodeID{preferred}
	case len(data)%2 == 0:
		return append(data, witness...)
	}
	return data
}

// nextStep compares the raft configuration with the members and returns the one
// change to make now. ready asks whether a node answers and has caught up; it is
// asked only when a step depends on it. A vote is added or taken only when a
// majority of the resulting voters is ready, so that the change itself commits
// and the cluster goes on after it.
func nextStep(nodes []*Node, q *Settings, servers []raft.Server, self replication.NodeID, ready func(replication.NodeID) bool) step {
	member := func(id replication.NodeID) *Node {
		i := slices.IndexFunc(nodes, func(n *Node) bool { return n.ID == id })
		if i < 0 {
			return nil
		}
		return nodes[i]
	}
	var voters, all []replication.NodeID
	for _, s := range servers {
		id := nodeOf(s.ID)
		all = append(all, id)
		if s.Suffrage == raft.Voter {
			voters = append(voters, id)
		}
	}
	want := wantVoters(nodes, q, voters, self)

	// A witness, and a node that is to lose its vote or its membership, does not lead.
	if me := member(self); me == nil || me.Role == RoleWitness || !slices.Contains(want, self) {
		// One that keeps its vote comes first; a data node waits for such a one.
		for _, keeps := range []bool{true, false} {
			for _, v := range voters {
				n := member(v)
				if v == self || n == nil || n.Role != RoleData || slices.Contains(want, v) != keeps {
					continue
				}
				if (keeps || me == nil || me.Role == RoleWitness) && ready(v) {
					return step{stepHandOver, v}
				}
			}
		}
		if me == nil || me.Role == RoleWitness && !slices.Contains(want, self) {
			return step{}
		}
	}
	for _, n := range nodes {
		i := slices.Index(all, n.ID)
		if i < 0 || servers[i].Address != raftAddressFor(n) {
			return step{stepAdd, n.ID}
		}
	}

	// safe says whether the voters without drop have a ready majority.
	safe := func(drop replication.NodeID) bool {
		total, up := 0, 0
		for _, v := range voters {
			if v == drop {
				continue
			}
			total++
			if v == self || ready(v) {
				up++
			}
		}
		return up > total/2
	}
	for _, id := range all {
		if member(id) == nil && id != self && (!slices.Contains(voters, id) || safe(id)) {
			return step{stepRemove, id}
		}
	}
	var up []replication.NodeID
	for _, id := range want {
		if !slices.Contains(voters, id) && ready(id) {
			up = append(up, id)
		}
	}
	// From one voter to three leads over two, of which none may fail. That moment is
	// kept short: it begins only when both newcomers are ready.
	if len(up) > 0 && (len(voters) > 1 || len(want) < 3 || len(up) >= 2) {
		return step{stepPromote, up[0]}
	}
	if !slices.Contains(want, self) {
		return step{} // until it has given leadership away, it takes no vote
	}
	for _, id := range voters {
		if !slices.Contains(want, id) && id != self && safe(id) {
			return step{stepDemote, id}
		}
	}
	return step{}
}

// govern keeps the raft configuration equal to the members while this node
// leads: one change at a time, the next one when the last is committed.
func (c *Cluster) govern() {
	tick := time.NewTicker(governEvery)
	defer tick.Stop()
	for {
		leader, state := c.leaderChange.wait(), c.fsm.watch()
		if c.raft.State() == raft.Leader && c.State().Cluster.Name != "" {
			// A leader that has not applied its predecessors' entries yet would judge by an
			// old list of members.
			ctx, cancel := context.WithTimeout(c.ctx, proposeMax)
			for c.ctx.Err() == nil && c.takeStep(ctx) {
			}
			cancel()
		}
		select {
		case <-tick.C:
		case <-leader:
		case <-state:
		case <-c.ctx.Done():
			return
		}
	}
}

// takeStep makes the next change and says whether it did.
func (c *Cluster) takeStep(ctx context.Context) bool {
	asked := make(map[replication.NodeID]bool)
	servers := c.servers()
	ready := func(n replication.NodeID) bool {
		ok, known := asked[n]
		if !known {
			ok = c.caughtUp(ctx, n)
			asked[n] = ok
		}
		return ok
	}
	now := c.State()
	if nextStep(c.members(now), &now.Settings, servers, c.id.Node, ready).kind == stepNone {
		return false
	}
	// There is something to do, so it is worth a round through the quorum to know
	// that the list of members is the newest.
	if _, err := c.readIndexHere(ctx); err != nil {
		return false
	}
	now = c.State()
	nodes := c.members(now)
	st := nextStep(nodes, &now.Settings, servers, c.id.Node, ready)
	if st.kind == stepNone {
		return false
	}
	if !c.begin() {
		return false
	}
	defer c.applies.Done()
	id := raftID(st.node)
	var f raft.Future
	var what string
	switch st.kind {
	case stepHandOver:
		return c.transfer(st.node) == nil
	case stepAdd:
		what = "added without a vote"
		f = c.raft.AddNonvoter(id, c.addressFor(nodes, st.node), 0, changeMax)
	case stepRemove:
		what = "removed"
		f = c.raft.RemoveServer(id, 0, changeMax)
	case stepPromote:
		what = "given a vote"
		f = c.raft.AddVoter(id, c.addressFor(nodes, st.node), 0, changeMax)
	case stepDemote:
		what = "without a vote from now on"
		f = c.raft.DemoteVoter(id, 0, changeMax)
	}
	if err := f.Error(); err != nil {
		c.log.Info("raft configuration was not changed", "peer", uint32(st.node), "change", what, "err", err)
		return false
	}
	c.log.Info("raft configuration changed", "peer", uint32(st.node), "change", what)
	c.lis.dropStrangers()
	return true
}

func (c *Cluster) addressFor(nodes []*Node, id replication.NodeID) raft.ServerAddress {
	for _, n := range nodes {
		if n.ID == id {
			return raftAddressFor(n)
		}
	}
	return ""
}

// caughtUp asks a node whether it is there and has what this leader committed.
func (c *Cluster) caughtUp(ctx context.Context, n replication.NodeID) bool {
	ctx, cancel := context.WithTimeout(ctx, pingMax)
	defer cancel()
	commit := c.raft.CommitIndex()
	p, err := c.Ping(ctx, n)
	return err == nil && p.Applied+behindMax >= commit
}

// transfer gives leadership to a voter. The caller holds a begin.
func (c *Cluster) transfer(to replication.NodeID) error {
	addr := c.raftAddressOf(to)
	if addr == "" {
		return fmt.Errorf("hand leadership over: node %d is not in the raft configuration", to)
	}
	if err := c.raft.LeadershipTransferToServer(raftID(to), raftAddress(to, addr)).Error(); err != nil {
		c.log.Info("leadership was not handed over", "peer", uint32(to), "err", err)
		return err
	}
	c.log.Info("leadership handed over", "peer", uint32(to))
	return nil
}

// handOver gives leadership to any data node that votes and is up to date.
func (c *Cluster) handOver(ctx context.Context) error {
	if !c.begin() {
		return ErrClosed
	}
	defer c.applies.Done()
	s := c.State()
	for _, v := range c.Voters() {
		if n := s.Node(v); v != c.id.Node && n != nil && n.Role == RoleData && c.caughtUp(ctx, v) {
			return c.transfer(v)
		}
	}
	return errors.New("no other data node can lead now")
}
