package sim

import (
	"context"
	"slices"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/replication/wire"
)

// A volume that begins as a snapshot (C8), while everything else goes on. What its hosts
// find at first is what the snapshot holds: the versions of its registers begin with that,
// and what nobody writes stays.

// birthsMax is how many volumes a run has at most: two, and one that begins as a snapshot.
const birthsMax = 3

// born is what a volume that begins as a snapshot began with.
type born struct {
	volume, origin lsfs.VolumeID
	blocks         map[lsfs.BlockNo]dedup.Fingerprint
}

// bear records a volume that begins as a snapshot, by the rules of the cluster's state
// machine (server/cluster/snapshotcommand.go), and says whether it did.
func (w *world) bear(origin lsfs.VolumeID) bool {
	rec := w.court.record(w.court.snapshotOf(origin))
	w.mu.Lock()
	d := w.disks[rec.Owner]
	w.mu.Unlock()
	id := lsfs.VolumeID(w.volumes() + 1)
	regs := make([][]*register, len(w.clients))
	b := &born{volume: id, origin: origin, blocks: map[lsfs.BlockNo]dedup.Fingerprint{}}
	d.mu.Lock()
	x := d.snaps[origin]
	whole := x != nil && !x.forged && x.blocks == volumeBlocks
	if whole {
		for no, c := range x.at {
			b.blocks[no] = c.fp
		}
		for i, c := range w.clients {
			for _, r := range c.regs[rec.Volume] {
				data := hole
				if at := x.at[r.no]; at != nil {
					var err error
					if data, _, err = at.decode(); err != nil {
						whole = false
					}
				}
				first := newRegister(id, r.no, c.id)
				first.versions[0] = version{sum(data), data, false}
				regs[i] = append(regs[i], first)
			}
		}
	}
	d.mu.Unlock()
	c := w.court
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.snaps[origin]; !whole || s == nil || !s.ready {
		return false
	}
	fresh := replication.Record{Volume: id, SizeBytes: volumeBlocks * blockBytes, Epoch: 1, Owner: rec.Owner, InSync: []replication.NodeID{rec.Owner}, Origin: origin,
		Dedup: true, Compress: true, MirroredRAM: w.ram[id]}
	for _, r := range c.records[rec.Volume].Replicas {
		fresh.Replicas = append(fresh.Replicas, replication.Replica{Node: r.Node, ID: replication.ReplicaID{byte(r.Node), byte(id), 3}})
	}
	if copyOn(&fresh, rec.Owner) < 0 {
		return false // it has moved meanwhile
	}
	for i, c := range w.clients {
		c.regs[id] = regs[i]
	}
	w.mu.Lock()
	w.born = b
	w.mu.Unlock()
	c.records[id] = &fresh
	w.count.Store(int32(id))
	c.publish()
	w.note("born", uint64(id), uint64(origin), uint64(rec.Owner))
	return true
}

// begins says whether a volume that has not begun its first epoch is to begin as a
// snapshot: then that stays (C8).
func (w *world) begins(origin lsfs.VolumeID) bool {
	return slices.ContainsFunc(w.court.all(), func(rec replication.Record) bool { return rec.Origin == origin && rec.Epoch == 1 })
}

// unchanged looks, at the end, whether the blocks that nobody has written are the snapshot's
// on every copy.
func (w *world) unchanged() {
	w.mu.Lock()
	b := w.born
	w.mu.Unlock()
	if b == nil {
		return
	}
	written := map[lsfs.BlockNo]bool{lockBlock: true}
	for _, c := range w.clients {
		for _, r := range c.regs[b.volume] {
			written[r.no] = true
		}
	}
	rec := w.court.record(b.volume)
	for _, id := range rec.InSync {
		v := w.disks[id].volumes[b.volume]
		if v == nil {
			continue // compare has said so
		}
		for no := lsfs.BlockNo(0); no < volumeBlocks; no++ {
			var fp dedup.Fingerprint
			if c := v.at[no]; c != nil {
				fp = c.fp
			}
			if !written[no] && fp != b.blocks[no] {
				w.fail("C8: volume %d block %d on node %d is not that of snapshot %d, as which the volume began", b.volume, no, id, b.origin)
				return
			}
		}
	}
}

// CreateCopyFrom makes a copy that begins as a snapshot, at operation {0, 1}: all its chunks
// are as new as that.
func (s *store) CreateCopyFrom(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica replication.ReplicaID, origin lsfs.VolumeID) (replication.Copy, error) {
	err := s.do(ctx, func(d *disk) error {
		x := d.snaps[origin]
		switch {
		case d.volumes[id] != nil:
			return lsfs.ErrExists
		case x == nil || x.forged:
			return lsfs.ErrNoVolume
		}
		v := &diskVolume{blocks: blocks, at: map[lsfs.BlockNo]*content{}, versions: map[uint32]lsfs.Seq{}, meta: lsfs.Meta{Replica: replica, Durable: lsfs.OpID{Seq: 1}}}
		for no, c := range x.at {
			d.set(v, no, c)
		}
		for chunk := range uint32(blocks / wire.ChunkBlocks) {
			v.versions[chunk] = 1
		}
		d.volumes[id] = v
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.w.note("born-on", uint64(s.p.id), uint64(id))
	return &localCopy{s, id}, nil
}
