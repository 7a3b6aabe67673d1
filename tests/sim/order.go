package sim

import (
	"hash/fnv"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// operation names an operation of a volume, for ever and on every node.
type operation struct {
	volume lsfs.VolumeID
	id     lsfs.OpID
}

// apply makes an operation part of the disk and looks whether the stream keeps its
// promises: a number names one operation (ORDERED, M5), and nothing of a fenced host
// follows the change of the ordered state that fences it (I12). Called with mu.
func (s *store) apply(op *lsfs.Op) error {
	loose := len(s.disk.loose)
	if op.Relaxed {
		s.disk.remember(op)
	}
	err := s.disk.apply(op)
	if err != nil {
		s.disk.loose = s.disk.loose[:loose]
	}
	if err != nil || op.Kind == lsfs.OpCopy {
		return err
	}
	if op.Kind == lsfs.OpSnapshot && op.Snapshot != 0 {
		s.sealed(s.disk.snaps[op.Snapshot])
	}
	h := fnv.New64a()
	h.Write([]byte{byte(op.Kind), byte(op.Start), byte(op.Start >> 8), byte(op.Count), byte(op.Count >> 8), byte(op.Source), byte(op.SourceStart), byte(op.SourceStart >> 8)})
	for i := range op.Blocks {
		h.Write(op.Blocks[i].Fingerprint[:])
	}
	h.Write(op.State)
	if op.Kind == lsfs.OpRollback {
		h.Write([]byte{byte(op.Snapshot), byte(op.Snapshot >> 8)})
	}
	w, what, at := s.w, h.Sum64(), operation{op.Volume, op.ID}
	w.mu.Lock()
	was, seen := w.named[at]
	w.named[at] = what
	w.mu.Unlock()
	if seen && was != what {
		w.fail("ORDERED: operation %v of volume %d is another one on node %d than on the node that stored it first", op.ID, op.Volume, s.p.id)
	}
	if state := s.disk.volumes[op.Volume].meta.State; op.Count > 0 && len(state) > stateName {
		fenced := fencedIn(state[stateName:])
		for host := range clientCount {
			if fenced&(1<<host) != 0 && writes(op, host) {
				w.fail("I12: operation %v of volume %d, of the fenced host %d, follows the change that fences it", op.ID, op.Volume, host)
			}
		}
	}
	return nil
}

// stateName is the length of the name in front of a stored ordered state
// (replication/state.go).
const stateName = 16

// writes says whether an operation changes a block that belongs to a host.
func writes(op *lsfs.Op, host int) bool {
	end := op.Start + lsfs.BlockNo(op.Count)
	for _, first := range hostRuns(host) {
		if op.Start < first+runBlocks && first < end {
			return true
		}
	}
	return false
}

// hostRuns are the first blocks of the two runs that belong to a host: one crosses the
// border of two chunks, the other is elsewhere.
func hostRuns(host int) [2]lsfs.BlockNo {
	return [2]lsfs.BlockNo{lsfs.BlockNo(256 - 8 + host*16), lsfs.BlockNo(700 + host*16)}
}

const runBlocks = 8

// meta is what a node's disk holds of a volume beside its blocks.
func (w *world) meta(id replication.NodeID, vol lsfs.VolumeID) lsfs.Meta {
	w.mu.Lock()
	d := w.disks[id]
	w.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.volumes[vol]; v != nil {
		return v.meta
	}
	return lsfs.Meta{}
}
