package sim

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// The administrator who adds, removes and moves copies (M8), by the rules of the cluster's
// state machine (server/cluster/replica.go).

// copyOn is the place of a node's copy in a record, or -1.
func copyOn(rec *replication.Record, id replication.NodeID) int {
	return slices.IndexFunc(rec.Replicas, func(r replication.Replica) bool { return r.Node == id })
}

// relist changes the list of copies of a volume, which opens the next epoch. Called with
// mu.
func (c *court) relist(old *replication.Record, list []replication.Replica, inSync []replication.NodeID) {
	rec := *old
	if rec.Epoch > 1 {
		rec.Epoch++ // not the first: who finds a later one and has no copy has lost it (B4)
	}
	rec.Replicas, rec.InSync = list, inSync
	slices.SortFunc(rec.Replicas, func(a, b replication.Replica) int { return cmp.Compare(a.Node, b.Node) })
	c.records[rec.Volume] = &rec
	c.w.owned(&rec)
	c.publish()
}

// addCopy gives a volume one more copy.
func (c *court) addCopy(vol lsfs.VolumeID, id replication.NodeID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.records[vol]
	if copyOn(old, id) >= 0 {
		return false
	}
	c.copies++
	fresh := replication.Replica{Node: id, ID: replication.ReplicaID{byte(id), byte(vol), 2, byte(c.copies), byte(c.copies >> 8)}}
	c.relist(old, append(slices.Clone(old.Replicas), fresh), old.InSync)
	c.w.note("copy-added", uint64(vol), uint64(id), uint64(c.records[vol].Epoch))
	return true
}

// removeCopy takes one off; the owner's and the last good one stay.
func (c *court) removeCopy(vol lsfs.VolumeID, id replication.NodeID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.records[vol]
	if copyOn(old, id) < 0 || old.Owner == id || old.Has(id) && len(old.InSync) == 1 {
		return false
	}
	list := slices.DeleteFunc(slices.Clone(old.Replicas), func(r replication.Replica) bool { return r.Node == id })
	inSync := slices.DeleteFunc(slices.Clone(old.InSync), func(n replication.NodeID) bool { return n == id })
	c.relist(old, list, inSync)
	c.w.note("copy-removed", uint64(vol), uint64(id), uint64(c.records[vol].Epoch))
	return true
}

// decides says whether raft takes commands.
func (c *court) decides() bool {
	for id := replication.NodeID(1); int(id) <= c.w.nodes; id++ {
		if p, _ := c.w.processAt(id); p != nil && !p.isPaused() && c.quorum(id) {
			return true
		}
	}
	return false
}

// arrange adds, removes and moves copies until all faults heal.
func (w *world) arrange() {
	r := newRandom(w.seed, 11)
	least := 1
	if w.enabled["wipe"] || w.enabled["amnesia"] {
		least = 2 // these cost one
	}
	may := func() bool { return !w.over() && !w.isHealing() && !w.amnesia.Load() && w.court.decides() }
	wait := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-w.stop:
		case <-w.healing:
		}
	}
	for !w.over() && !w.isHealing() {
		wait(r.exp(6 * time.Second))
		vol, id := lsfs.VolumeID(1+r.n(w.volumes())), replication.NodeID(1+r.n(w.nodes))
		if !may() {
			continue
		}
		rec := w.court.record(vol)
		if copyOn(&rec, id) >= 0 {
			if len(rec.Replicas) > least {
				w.court.removeCopy(vol, id)
			}
			continue
		}
		old := rec.Replicas[r.n(len(rec.Replicas))].Node
		if moved := r.chance(0.6); !w.court.addCopy(vol, id) || !moved {
			continue
		}
		// A move: when the new one is in sync the old one goes.
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && !w.over() && !w.isHealing(); {
			wait(r.between(50*time.Millisecond, 500*time.Millisecond))
			if rec = w.court.record(vol); copyOn(&rec, id) < 0 || rec.Has(id) {
				break
			}
		}
		if rec.Has(id) && rec.Owner == old {
			w.give(vol, old, id)
		}
		if rec = w.court.record(vol); may() && rec.Has(id) && len(rec.Replicas) > least {
			w.court.removeCopy(vol, old)
		}
	}
}

// give has an owner give a volume to another node, if it can.
func (w *world) give(vol lsfs.VolumeID, from, to replication.NodeID) {
	p, _ := w.processAt(from)
	if p == nil {
		return
	}
	n, ok := p.isServing()
	if !ok || n.Volume(vol) == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if err := n.Volume(vol).MoveTo(ctx, to); err != nil {
		w.logf("volume %d is not given from node %d to node %d: %v", vol, from, to, err)
	}
}

// strays says whether a node has a copy that the record does not place there.
func (w *world) strays(rec *replication.Record) bool {
	for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
		if copyOn(rec, id) >= 0 {
			continue
		}
		w.mu.Lock()
		d := w.disks[id]
		w.mu.Unlock()
		d.mu.Lock()
		has := d.volumes[rec.Volume] != nil
		d.mu.Unlock()
		if has {
			return true
		}
	}
	return false
}

// offers says whether a node has a copy of a volume.
func (w *world) offers(id replication.NodeID, vol lsfs.VolumeID) bool {
	rec := w.court.record(vol)
	return copyOn(&rec, id) >= 0
}
