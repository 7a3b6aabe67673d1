package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

// fileLost in the cluster directory names the nodes that were declared lost when
// the quorum was recovered here. They come from another history of the log: this
// node talks to none of them, and gives them no vote, for ever. A machine that is
// to be used again is wiped and joins as a new node.
const fileLost = "lost.json"

type lostFile struct {
	Version int                  `json:"version"`
	Lost    []replication.NodeID `json:"lost"`
}

const lostVersion = 1

// readLost returns the nodes that were declared lost here.
func readLost(dir string) ([]replication.NodeID, error) {
	path := filepath.Join(dir, fileLost)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var f lostFile
	if err := json.Unmarshal(b, &f); err != nil || f.Version != lostVersion {
		return nil, fmt.Errorf("%s is damaged, or of a newer version", path)
	}
	return f.Lost, nil
}

// members are the nodes that raft is made of: all but those declared lost here.
func (c *Cluster) members(s *State) []*Node {
	if len(c.lost) == 0 {
		return s.Nodes
	}
	return slices.DeleteFunc(slices.Clone(s.Nodes), func(n *Node) bool { return slices.Contains(c.lost, n.ID) })
}

// Recovery is what a node that does not run knows of its cluster.
type Recovery struct {
	Cluster string
	Node    string // this one
	// Index and Term are those of the newest entry of its log. Of several nodes that
	// are left, the one with the highest (Term, Index) is to recover.
	Index, Term uint64
	Voters      []string
	Lost        []string // of the voters and members, as they were named
	State       *State
}

// probeMax bounds the look whether a node that is called lost answers.
const probeMax = 2 * time.Second

// Recover makes the node whose identity lies in dir the only voter of its cluster,
// after its quorum was lost for good: lost are the names of the nodes that will
// never come back. What these had committed and this node has not got is gone, as
// if it had never been decided. With dryRun nothing is changed. The node must not
// run. It is refused (ErrRefused) when the voters that are not lost still are a
// majority, when a node that is called lost answers, and on a witness.
func Recover(dir string, lost []string, dryRun bool, log *slog.Logger) (_ *Recovery, err error) {
	id, err := ReadIdentity(dir)
	if err != nil {
		return nil, err
	}
	if id.Role != RoleData {
		return nil, errorf(ErrRefused, "%s is a witness and holds no data: recover on a data node", id.Name)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	rlog := newRaftLog(log)
	var broken error
	store, snaps, err := openRaftStore(filepath.Join(dir, dirRaft), rlog, func(err error) { broken = err })
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, broken, store.Close()) }()
	conf := raft.DefaultConfig()
	conf.LocalID = raftID(id.Node)
	conf.Logger = rlog

	_, trans := raft.NewInmemTransport("")
	defer func() { err = errors.Join(err, trans.Close()) }()
	servers, err := raft.GetConfiguration(conf, newFSM(func(error) {}), store, store, snaps, trans)
	if err != nil {
		return nil, fmt.Errorf("read the raft log: %w", err)
	}
	fsm := newFSM(func(e error) { broken = e })
	r, err := lookBack(id, store, snaps, fsm)
	if err != nil {
		return nil, err
	}
	ids, err := r.judge(id, servers.Servers, lost)
	if err != nil || dryRun {
		return r, err
	}
	addr := raft.ServerAddress("")
	for _, s := range servers.Servers {
		if s.ID == raftID(id.Node) {
			addr = s.Address
		}
	}
	if addr == "" {
		addr = raftAddress(id.Node, id.Addresses.Control())
	}
	old, err := readLost(dir)
	if err != nil {
		return nil, err
	}
	for _, n := range ids {
		if !slices.Contains(old, n) {
			old = append(old, n)
		}
	}
	// First the names, so that no interruption leaves a voter that listens to them.
	b, err := json.Marshal(lostFile{lostVersion, old})
	if err != nil {
		return nil, err
	}
	if err := renameio.WriteFile(filepath.Join(dir, fileLost), append(b, '\n'), 0o600); err != nil {
		return nil, err
	}
	alone := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raftID(id.Node), Address: addr}}}
	if err := raft.RecoverCluster(conf, newFSM(func(e error) { broken = e }), store, store, snaps, trans, alone); err != nil {
		return nil, fmt.Errorf("recover the quorum: %w", err)
	}
	return r, nil
}

// lookBack applies what this node has to a state machine that is thrown away.
func lookBack(id *Identity, store *raftStore, snaps raft.SnapshotStore, fsm *fsm) (*Recovery, error) {
	r := &Recovery{Cluster: id.Cluster, Node: id.Name}
	list, err := snaps.List()
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		_, body, err := snaps.Open(m.ID)
		if err == nil {
			err = fsm.Restore(body)
		}
		if err == nil {
			r.Index, r.Term = m.Index, m.Term
			break
		}
	}
	last, err := store.LastIndex()
	if err != nil {
		return nil, err
	}
	for i := r.Index + 1; i <= last; i++ {
		var l raft.Log
		if err := store.GetLog(i, &l); err != nil {
			return nil, fmt.Errorf("read entry %d of the raft log: %w", i, err)
		}
		if l.Type == raft.LogCommand {
			if a := fsm.applyOne(&l); a.err != nil {
				return nil, a.err
			}
		}
		r.Index, r.Term = l.Index, l.Term
	}
	fsm.publish()
	r.State = fsm.state.Load()
	if len(r.State.Nodes) == 0 {
		return nil, errorf(ErrRefused, "this node has not learnt anything of its cluster yet: there is nothing to recover")
	}
	return r, nil
}

// judge refuses a recovery that is not needed, or not honest.
func (r *Recovery) judge(id *Identity, servers []raft.Server, lost []string) (ids []replication.NodeID, err error) {
	for _, name := range lost {
		n := r.State.NodeNamed(name)
		switch {
		case n == nil:
			return nil, errorf(ErrNotFound, "there is no node %s", name)
		case n.ID == id.Node:
			return nil, errorf(ErrInvalid, "%s is this node", name)
		}
		ids = append(ids, n.ID)
		r.Lost = append(r.Lost, name)
		for _, address := range n.between() {
			if c, err := net.DialTimeout("tcp", address, probeMax); err == nil {
				c.Close()
				return nil, errorf(ErrRefused, "node %s answers at %s: it is not lost", name, address)
			}
		}
	}
	voters, left := 0, 0
	for _, s := range servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		n := nodeOf(s.ID)
		r.Voters = append(r.Voters, r.State.NodeName(n))
		if !slices.Contains(ids, n) {
			left++
		}
	}
	if left > voters/2 {
		return nil, errorf(ErrRefused, "of the voters %s those that are not lost are a majority: start them instead", strings.Join(r.Voters, ", "))
	}
	return ids, nil
}
