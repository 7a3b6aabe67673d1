package cluster

import (
	"errors"
	"syscall"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

// promptTransport is raft's transport, with one addition: this server can be told
// to stand for election at once, by the message with which a leader hands over.
type promptTransport struct {
	*raft.NetworkTransport
	rpcs chan raft.RPC
}

func newPromptTransport(t *raft.NetworkTransport) *promptTransport {
	return &promptTransport{NetworkTransport: t, rpcs: make(chan raft.RPC)}
}

// Consumer implements raft.Transport.
func (t *promptTransport) Consumer() <-chan raft.RPC { return t.rpcs }

// pass hands the messages of others on until the cluster ends.
func (t *promptTransport) pass(done <-chan struct{}) {
	for {
		select {
		case rpc := <-t.NetworkTransport.Consumer():
			select {
			case t.rpcs <- rpc:
			case <-done:
				return
			}
		case <-done:
			return
		}
	}
}

// succeed stands for election when n, whose listener has just refused a
// connection, was the leader: a listener lives as long as its process (L5), so there
// is nothing to wait for. An election is safe at any time; only one of the
// survivors calls it, or they would split the votes.
func (c *Cluster) succeed(n replication.NodeID, err error) {
	if !errors.Is(err, syscall.ECONNREFUSED) || c.raft.State() != raft.Follower {
		return
	}
	if _, id := c.raft.LeaderWithID(); nodeOf(id) != n {
		return
	}
	f := c.raft.GetConfiguration()
	if f.Error() != nil {
		return
	}
	voter := false
	for _, s := range f.Configuration().Servers {
		id := nodeOf(s.ID)
		switch {
		case s.Suffrage != raft.Voter || id == n:
		case id == c.id.Node:
			voter = true
		case id < c.id.Node && c.State().Node(id) != nil && c.State().Node(id).Role == RoleData:
			return // that one does
		}
	}
	if !voter {
		return
	}
	rpc := raft.RPC{
		Command:  &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}},
		RespChan: make(chan raft.RPCResponse, 1),
	}
	select {
	case c.trans.rpcs <- rpc:
		c.log.Info("the leader's process is gone, this node stands for election", "leader", n)
	case <-c.ctx.Done():
	}
}
