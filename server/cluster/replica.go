package cluster

import (
	"cmp"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// maxCopies is how many replicas a volume may have; one more while one of them is
// being replaced.
const maxCopies = 3

// Left says when a replica fell out of sync: what it holds is as old as that.
type Left struct {
	Node  replication.NodeID
	Epoch lsfs.Epoch // the first without it
	Time  time.Time
}

func (l *Left) walk(c *codec) {
	u32(c, &l.Node)
	u64(c, &l.Epoch)
	c.time(&l.Time)
}

// keepHistory notes which members of the in-sync set before are not in w's any
// more, and forgets those that are back.
func (e *edit) keepHistory(w *Volume, before []replication.NodeID) {
	if e.level() < levelReplicas {
		return // version 2 has no room for it
	}
	w.Left = without(w.Left, func(l Left) bool { return w.Record.Has(l.Node) })
	for _, n := range before {
		if !w.Record.Has(n) {
			w.Left = append(w.Left, Left{n, w.Record.Epoch, e.env.Now})
		}
	}
}

// replicaOn is the place of a node's replica in a record, or -1.
func replicaOn(r *replication.Record, n replication.NodeID) int {
	return slices.IndexFunc(r.Replicas, func(p replication.Replica) bool { return p.Node == n })
}

// cmdAddReplica gives a volume one more replica, by compare-and-set on the epoch.
// The epoch rises although owner and in-sync set stay: every node then knows the
// older list of replicas from the newer one.
type cmdAddReplica struct {
	Volume lsfs.VolumeID
	Expect lsfs.Epoch
	Node   replication.NodeID
	ID     replication.ReplicaID // drawn by the proposer, never used before
	// Replaces is the node whose replica goes when the new one is in sync; 0: none.
	Replaces replication.NodeID
}

func (*cmdAddReplica) kind() kind { return kindAddReplica }
func (x *cmdAddReplica) walk(c *codec) {
	u64(c, &x.Volume)
	u64(c, &x.Expect)
	u32(c, &x.Node)
	c.raw(x.ID[:])
	u32(c, &x.Replaces)
}

func (x *cmdAddReplica) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	rec, n := &v.Record, e.s.Node(x.Node)
	name := e.s.NodeName(x.Node)
	limit := maxCopies
	if x.Replaces != 0 {
		limit++
	}
	switch {
	case x.Expect != rec.Epoch:
		return refuse(codeConflict, "volume %s is changing its owner or its in-sync set, try again", v.Name)
	case n == nil:
		return refuse(codeNotFound, "node %d is not a member of the cluster", x.Node)
	case n.Role != RoleData:
		return refuse(codeInvalid, "%s is a witness and stores nothing", name)
	case replicaOn(rec, x.Node) >= 0:
		return refuse(codeExists, "volume %s has a replica on %s already", v.Name, name)
	case !n.Stays():
		return refuse(codeRefused, "node %s is %s: it takes no new replica", name, n.Away())
	case x.ID == (replication.ReplicaID{}) || slices.ContainsFunc(rec.Replicas, func(p replication.Replica) bool { return p.ID == x.ID }):
		return refuse(codeInvalid, "a new replica needs an id of its own")
	case x.Replaces != 0 && replicaOn(rec, x.Replaces) < 0:
		return refuse(codeNotFound, "volume %s has no replica on %s", v.Name, e.s.NodeName(x.Replaces))
	case len(rec.Replicas) >= limit:
		return refuse(codeRefused, "volume %s has %d replicas, the most that is supported", v.Name, len(rec.Replicas))
	}
	for _, o := range e.s.Operations {
		if o.Running() && o.Volume == v.ID && x.Replaces != 0 && o.From == x.Replaces {
			return refuse(codeExists, "the replica of volume %s on %s is being moved already: operation %d", v.Name, e.s.NodeName(x.Replaces), o.ID)
		}
	}
	w := *v
	w.Record.Epoch = nextEpoch(rec)
	w.Record.Replicas = append(slices.Clone(rec.Replicas), replication.Replica{Node: x.Node, ID: x.ID})
	slices.SortFunc(w.Record.Replicas, func(a, b replication.Replica) int { return cmp.Compare(a.Node, b.Node) })
	e.setVolume(&w)
	o := Operation{Kind: OperationAdd, Volume: v.ID, To: x.Node}
	if x.Replaces != 0 {
		o.Kind, o.From = OperationMove, x.Replaces
		e.event(Info, "replica-added", "volume %s gets a replica on %s, which replaces the one on %s", v.Name, name, e.s.NodeName(x.Replaces))
	} else {
		e.event(Info, "replica-added", "volume %s gets a replica on %s", v.Name, name)
	}
	return result{ID: e.begin(o)}
}

// cmdRemoveReplica takes a replica off a volume, in sync or not, by compare-and-set
// on the epoch. The owner's own replica is never taken: it is the last in-sync one,
// or another member of the set can own the volume first.
type cmdRemoveReplica struct {
	Volume lsfs.VolumeID
	Expect lsfs.Epoch
	Node   replication.NodeID
}

func (*cmdRemoveReplica) kind() kind { return kindRemoveReplica }
func (x *cmdRemoveReplica) walk(c *codec) {
	u64(c, &x.Volume)
	u64(c, &x.Expect)
	u32(c, &x.Node)
}

func (x *cmdRemoveReplica) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	name := e.s.NodeName(x.Node)
	switch {
	case replicaOn(&v.Record, x.Node) < 0:
		return refuse(codeNotFound, "volume %s has no replica on %s", v.Name, name)
	case x.Expect != v.Record.Epoch:
		return refuse(codeConflict, "volume %s is changing its owner or its in-sync set, try again", v.Name)
	case v.Record.Has(x.Node) && len(v.Record.InSync) == 1:
		return refuse(codeRefused, "the replica of volume %s on %s is its last good copy", v.Name, name)
	case v.Record.Owner == x.Node:
		return refuse(codeRefused, "%s owns volume %s\n  let another node own it first: twinsan volume move %s --to NODE", name, v.Name, v.Name)
	}
	e.takeOff(v, x.Node)
	e.event(Info, "replica-removed", "volume %s has no replica on %s any more", v.Name, name)
	return result{ID: uint64(v.ID)}
}

// takeOff drops a replica that does not own, and opens the next epoch: a change of
// the in-sync set that is on its way was made for the list before. Operations that
// still run and that would bring this replica fail; one that was to drop it is done.
func (e *edit) takeOff(v *Volume, n replication.NodeID) {
	if replicaOn(&v.Record, n) < 0 {
		return
	}
	w := *v
	w.Record.Epoch = nextEpoch(&v.Record)
	w.Record.Replicas = without(v.Record.Replicas, func(p replication.Replica) bool { return p.Node == n })
	w.Record.InSync = without(v.Record.InSync, func(m replication.NodeID) bool { return m == n })
	w.Left = without(v.Left, func(l Left) bool { return l.Node == n })
	if w.Preferred == n {
		w.Preferred = 0
	}
	e.setVolume(&w)
	e.endOperations(func(o *Operation) bool { return o.Volume == v.ID && o.From == n }, OperationDone, "")
	e.endOperations(func(o *Operation) bool { return o.Volume == v.ID && o.To == n }, OperationFailed, "the replica was removed")
}

// nextEpoch is the epoch of a record whose list of replicas changes. The first one
// stays until the owner has begun: an owner that finds a later one and has no copy
// has lost it (B4).
func nextEpoch(r *replication.Record) lsfs.Epoch {
	if r.Epoch == 1 {
		return 1
	}
	return r.Epoch + 1
}

// cmdPrefer names the node that ought to own a volume.
type cmdPrefer struct {
	Volume lsfs.VolumeID
	Node   replication.NodeID // 0: none
}

func (*cmdPrefer) kind() kind { return kindPrefer }
func (x *cmdPrefer) walk(c *codec) {
	u64(c, &x.Volume)
	u32(c, &x.Node)
}

func (x *cmdPrefer) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	if x.Node != 0 && replicaOn(&v.Record, x.Node) < 0 {
		return refuse(codeRefused, "%s has no replica of volume %s", e.s.NodeName(x.Node), v.Name)
	}
	w := *v
	w.Preferred = x.Node
	e.setVolume(&w)
	return result{ID: uint64(v.ID)}
}
