package cluster

import (
	"slices"

	"github.com/twinsan/twinsan/replication"
)

// apply refuses to drain a node whose volumes would have nowhere to go: each of
// them needs another in-sync copy, on a node that stays.
func (x *cmdDrainNode) apply(e *edit) result {
	old := e.s.Node(x.Node)
	switch {
	case old == nil:
		return refuse(codeNotFound, "node %d is not a member of the cluster", x.Node)
	case old.Role != RoleData:
		return refuse(codeInvalid, "%s is a witness: it has neither volumes nor portals to drain", old.Name)
	case old.Draining == x.Drain:
		return result{}
	}
	if x.Drain {
		if r := e.mayDrain(old); r.Code != codeOK {
			return r
		}
	}
	n := *old
	n.Draining = x.Drain
	e.setNode(&n)
	if x.Drain {
		e.event(Warning, "node-draining", "node %s is drained: its volumes move away, and initiators are sent to other nodes", n.Name)
	} else {
		e.event(Info, "node-resumed", "node %s serves initiators again", n.Name)
	}
	return result{}
}

func (e *edit) mayDrain(n *Node) result {
	stays := func(id replication.NodeID) bool {
		m := e.s.Node(id)
		return id != n.ID && m != nil && m.Stays()
	}
	if !slices.ContainsFunc(e.s.DataNodes(), stays) {
		return refuse(codeRefused, "no other data node would be left to serve what %s serves", n.Name)
	}
	for _, v := range e.s.Volumes {
		r := &v.Record
		if r.Deleted || !r.Has(n.ID) || slices.ContainsFunc(r.InSync, stays) {
			continue
		}
		others := "it has no other copy"
		for _, p := range r.Replicas {
			if p.Node != n.ID && !stays(p.Node) {
				others = e.s.NodeName(p.Node) + " is drained as well"
			} else if p.Node != n.ID {
				others = "the copy on " + e.s.NodeName(p.Node) + " is not in sync"
			}
		}
		return refuse(codeRefused, "volume %s would have nowhere to go: %s\n  wait until it is: twinsan volume show %s", v.Name, others, v.Name)
	}
	return result{}
}
