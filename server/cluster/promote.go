package cluster

import (
	"slices"

	"github.com/google/uuid"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// cmdPromote makes a replica the only good copy of its volume, whatever the others
// hold (B3). The others become new replicas: what is on their nodes is discarded
// when these come back, and never merged.
type cmdPromote struct {
	Volume  lsfs.VolumeID
	Expect  lsfs.Epoch
	Node    replication.NodeID
	Lineage uuid.UUID
	// Others are the new ids of all other replicas.
	Others []replication.Replica
	Why    string // for the record: what was known of the copies
}

func (*cmdPromote) kind() kind { return kindPromote }
func (x *cmdPromote) walk(c *codec) {
	u64(c, &x.Volume)
	u64(c, &x.Expect)
	u32(c, &x.Node)
	c.raw(x.Lineage[:])
	list(c, &x.Others, func(c *codec, p *replication.Replica) {
		u32(c, &p.Node)
		c.raw(p.ID[:])
	})
	text(c, &x.Why)
}

func (x *cmdPromote) apply(e *edit) result {
	v, r := e.volume(x.Volume)
	if v == nil {
		return r
	}
	rec := &v.Record
	switch {
	case x.Expect != rec.Epoch:
		return refuse(codeConflict, "volume %s is changing its owner or its in-sync set, look at it again", v.Name)
	case replicaOn(rec, x.Node) < 0:
		return refuse(codeNotFound, "volume %s has no replica on %s", v.Name, e.s.NodeName(x.Node))
	case rec.Owner == x.Node && len(rec.InSync) == 1:
		return refuse(codeRefused, "%s is the only good copy of volume %s already", e.s.NodeName(x.Node), v.Name)
	case rec.Epoch == 1:
		return refuse(codeRefused, "volume %s has never been served: there is nothing on it", v.Name)
	case x.Lineage == uuid.Nil || x.Lineage == v.Lineage:
		return refuse(codeInvalid, "a promoted volume needs a lineage of its own")
	}
	w := *v
	w.Record.Replicas = slices.Clone(rec.Replicas)
	for i, p := range w.Record.Replicas {
		if p.Node == x.Node {
			continue
		}
		at := slices.IndexFunc(x.Others, func(q replication.Replica) bool { return q.Node == p.Node })
		if at < 0 || x.Others[at].ID == (replication.ReplicaID{}) || slices.ContainsFunc(rec.Replicas, func(q replication.Replica) bool { return q.ID == x.Others[at].ID }) {
			return refuse(codeInvalid, "the replica on %s needs a new id", e.s.NodeName(p.Node))
		}
		w.Record.Replicas[i].ID = x.Others[at].ID
	}
	before := e.names(rec.InSync)
	w.Record.Epoch++
	w.Record.Owner, w.Record.InSync = x.Node, []replication.NodeID{x.Node}
	w.Record.Forced = true
	w.Lineage, w.Left, w.Preferred = x.Lineage, nil, 0
	e.setVolume(&w)
	e.endOperations(func(o *Operation) bool { return o.Volume == v.ID }, OperationFailed, "the volume was promoted by force")
	e.event(Error, "volume-promoted", "volume %s was promoted by force on %s; in sync were %s, whose data is discarded. %s", v.Name, e.s.NodeName(x.Node), before, x.Why)
	return result{ID: uint64(w.Record.Epoch), Record: w.Record}
}
