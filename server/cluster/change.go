package cluster

import (
	"slices"

	"github.com/twinsan/twinsan/replication"
)

// apply decides a compare-and-set on a volume's record: the rules of
// replication.Change, each refused with its reason. ONE-OWNER and NO-STALE rest
// on this function.
func (x *cmdChange) apply(e *edit) result {
	v := e.s.Volume(x.Volume)
	if v == nil {
		return refuse(codeConflict, "there is no volume %d", x.Volume)
	}
	old := &v.Record
	conflict := func(format string, args ...any) result {
		r := refuse(codeConflict, "volume %s: "+format, append([]any{v.Name}, args...)...)
		r.Record = *old
		return r
	}
	switch {
	case old.Deleted:
		return conflict("it is deleted")
	case x.Expect != old.Epoch:
		return conflict("epoch %d was expected, it is %d", x.Expect, old.Epoch)
	case len(x.InSync) == 0:
		return conflict("nobody would be in sync")
	case !slices.Contains(x.InSync, x.Owner):
		return conflict("the owner %d would not be in sync", x.Owner)
	case x.Owner != old.Owner && !old.Has(x.Owner):
		return conflict("%s cannot own it: it is not in sync", e.s.NodeName(x.Owner))
	case x.Owner != old.Owner && slices.Contains(x.InSync, old.Owner) && x.By != old.Owner:
		// M6: the new owner takes such a record as the old one's word that it has stopped.
		return conflict("only %s can give it away and stay in sync", e.s.NodeName(old.Owner))
	}

	inSync := slices.Clone(x.InSync)
	slices.Sort(inSync)
	for i, n := range inSync {
		if i > 0 && n == inSync[i-1] {
			return conflict("node %d is named twice", n)
		}
		if old.Has(n) {
			continue
		}
		if n != x.Grow {
			return conflict("%s would enter the in-sync set without proof", e.s.NodeName(n))
		}
	}
	if x.Grow != 0 {
		if r := x.checkGrow(e, old, inSync, conflict); r.Code != codeOK {
			return r
		}
	}

	w := *v
	w.Record.Epoch = old.Epoch + 1
	w.Record.Owner = x.Owner
	w.Record.InSync = inSync
	e.keepHistory(&w, old.InSync)
	e.setVolume(&w)
	x.report(e, v, &w)
	e.replicaArrived(&w, x.Grow)
	return result{ID: uint64(w.Record.Epoch), Record: w.Record}
}

// checkGrow checks the one member that the in-sync set gains (M4): the owner
// vouches for it, and it is the replica and the process that the owner filled.
func (x *cmdChange) checkGrow(e *edit, old *replication.Record, inSync []replication.NodeID, conflict func(string, ...any) result) result {
	name := e.s.NodeName(x.Grow)
	switch {
	case old.Has(x.Grow):
		return conflict("%s is in sync already", name)
	case !slices.Contains(inSync, x.Grow):
		return conflict("%s is to become in sync and is not in the set", name)
	case x.By != old.Owner || x.Owner != old.Owner:
		return conflict("only the owner can say that %s is in sync", name)
	}
	i := slices.IndexFunc(old.Replicas, func(p replication.Replica) bool { return p.Node == x.Grow })
	if i < 0 {
		return conflict("%s has no replica", name)
	}
	if old.Replicas[i].ID != x.GrowReplica {
		return conflict("the replica on %s is another one than the owner filled", name)
	}
	n := e.s.Node(x.Grow)
	if n == nil || n.Incarnation != x.GrowIncarnation {
		return conflict("%s was restarted since the owner filled its replica", name)
	}
	return result{}
}

// report records what the change means to an administrator.
func (x *cmdChange) report(e *edit, v, w *Volume) {
	reason := ""
	if x.Reason != "" {
		reason = ": " + x.Reason
	}
	old, now := &v.Record, &w.Record
	if old.Owner != now.Owner {
		e.event(Warning, "owner-moved", "volume %s is owned by %s instead of %s%s", v.Name, e.s.NodeName(now.Owner), e.s.NodeName(old.Owner), reason)
	}
	for _, n := range old.InSync {
		if !now.Has(n) {
			e.event(Warning, "replica-out-of-sync", "volume %s goes on without %s (in sync: %s)%s", v.Name, e.s.NodeName(n), e.names(now.InSync), reason)
		}
	}
	if x.Grow != 0 {
		e.event(Info, "replica-in-sync", "volume %s is in sync on %s", v.Name, e.names(now.InSync))
	}
}
