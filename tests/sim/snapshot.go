package sim

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// diskSnapshot is a snapshot on a disk: the blocks of its volume as they were.
type diskSnapshot struct {
	*diskVolume
	id, of lsfs.VolumeID
	point  lsfs.OpID
	forged bool // a resync is making it
}

// snap keeps the blocks of a volume, or of another snapshot, as they are.
func (d *disk) snap(id, of lsfs.VolumeID, v *diskVolume) *diskSnapshot {
	x := &diskSnapshot{diskVolume: &diskVolume{blocks: v.blocks, at: maps.Clone(v.at), versions: maps.Clone(v.versions)}, id: id, of: of}
	for _, c := range x.at {
		c.refs++
	}
	d.snaps[id] = x
	return x
}

func (d *disk) forget(x *diskSnapshot) {
	for no := range x.at {
		d.set(x.diskVolume, no, nil)
	}
	delete(d.snaps, x.id)
}

// target is the volume that an operation changes, or the snapshot that is being forged.
func (d *disk) target(id lsfs.VolumeID) *diskVolume {
	if x := d.snaps[id]; x != nil && x.forged {
		return x.diskVolume
	}
	return d.volumes[id]
}

// of are the snapshots of a volume, or all for 0, in the order of their points.
func (d *disk) snapshotsOf(of lsfs.VolumeID) (list []*diskSnapshot) {
	for _, x := range d.snaps {
		if !x.forged && (of == 0 || x.of == of) {
			list = append(list, x)
		}
	}
	slices.SortFunc(list, func(a, b *diskSnapshot) int {
		return cmp.Or(cmp.Compare(a.of, b.of), cmp.Compare(a.point.Seq, b.point.Seq), cmp.Compare(a.id, b.id))
	})
	return list
}

// sum is a digest of what a snapshot holds.
func (x *diskSnapshot) sum() uint64 {
	h, b := fnv.New64a(), make([]byte, 0, 40)
	b = binary.LittleEndian.AppendUint64(b, uint64(x.of))
	b = binary.LittleEndian.AppendUint64(b, uint64(x.point.Epoch))
	h.Write(binary.LittleEndian.AppendUint64(b, uint64(x.point.Seq)))
	for _, no := range slices.Sorted(maps.Keys(x.at)) {
		h.Write(append(binary.LittleEndian.AppendUint64(b[:0], uint64(no)), x.at[no].fp[:]...))
	}
	return h.Sum64()
}

// sealed looks whether a snapshot that is whole now on one node is the same as on the node
// that had it first (ORDERED). Called with mu.
func (s *store) sealed(x *diskSnapshot) {
	w, what := s.w, x.sum()
	w.mu.Lock()
	was, seen := w.frozen[x.id]
	if !seen {
		w.frozen[x.id] = what
	}
	w.mu.Unlock()
	if seen && was != what {
		w.fail("ORDERED: snapshot %d of volume %d, at %v, is another one on node %d than on the node that had it first", x.id, x.of, x.point, s.p.id)
	}
}

func (s *store) find(id lsfs.VolumeID, forged bool) replication.SnapshotCopy {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.disk.snaps[id]; x != nil && x.forged == forged {
		return &localSnapshot{localCopy{s, id}, x}
	}
	return nil
}

func (s *store) Snapshot(id lsfs.VolumeID) replication.SnapshotCopy { return s.find(id, false) }
func (s *store) Forged(id lsfs.VolumeID) replication.SnapshotCopy   { return s.find(id, true) }

func (s *store) Snapshots(of lsfs.VolumeID) (list []replication.SnapshotCopy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.disk.snapshotsOf(of) {
		list = append(list, &localSnapshot{localCopy{s, x.id}, x})
	}
	return list
}

func (s *store) remove(ctx context.Context, id lsfs.VolumeID, forged bool) error {
	return s.do(ctx, func(d *disk) error {
		x := d.snaps[id]
		if x == nil || x.forged != forged {
			return lsfs.ErrNoVolume
		}
		d.forget(x)
		return nil
	})
}

func (s *store) DeleteSnapshot(ctx context.Context, id lsfs.VolumeID) error {
	return s.remove(ctx, id, false)
}

func (s *store) AbandonSnapshot(ctx context.Context, id lsfs.VolumeID) error {
	return s.remove(ctx, id, true)
}

func (s *store) SealSnapshot(ctx context.Context, id lsfs.VolumeID, point lsfs.OpID) error {
	return s.do(ctx, func(d *disk) error {
		x := d.snaps[id]
		if x == nil || !x.forged {
			return lsfs.ErrNoVolume
		}
		x.point, x.forged = point, false
		s.sealed(x)
		return nil
	})
}

func (s *store) ForgeSnapshot(ctx context.Context, id, of, base lsfs.VolumeID, blocks uint64) error {
	return s.do(ctx, func(d *disk) error {
		from := d.volumes[of]
		if base != 0 && base != of {
			from = nil
			if x := d.snaps[base]; x != nil && !x.forged {
				from = x.diskVolume
			}
		}
		switch {
		case from == nil:
			return lsfs.ErrNoVolume
		case d.snaps[id] != nil:
			return lsfs.ErrExists
		}
		x := d.snap(id, of, from)
		x.blocks, x.forged = blocks, true
		return nil
	})
}

// localSnapshot is a snapshot of a store; it is read as a copy is.
type localSnapshot struct {
	localCopy
	x *diskSnapshot
}

func (l *localSnapshot) ID() lsfs.VolumeID     { return l.x.id }
func (l *localSnapshot) Volume() lsfs.VolumeID { return l.x.of }

func (l *localSnapshot) Point() lsfs.OpID {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	return l.x.point
}

// snapshotsMax is how many snapshots a run takes of a volume, about.
const snapshotsMax = 8

// keep takes snapshots of the volumes now and then, and, in some seeds, deletes some and
// rolls volumes back.
func (w *world) keep() {
	r := newRandom(w.seed, 9)
	for !w.over() {
		mean := w.opt.Length / snapshotsMax
		if w.isHealing() {
			mean = 2 * time.Second
		}
		select {
		case <-time.After(r.exp(mean)):
		case <-w.stop:
			return
		}
		w.settle()
		ready := w.court.listed(true)
		switch {
		case w.isHealing() || w.amnesia.Load():
		case w.births && w.born == nil && len(ready) > 0 && r.chance(0.5):
			w.bear(ready[r.n(len(ready))])
		case w.rollbacks && len(ready) > 0 && r.chance(0.3):
			w.rollBack(ready[r.n(len(ready))])
		case w.rollbacks && len(ready) > 0 && r.chance(0.3):
			if id := ready[r.n(len(ready))]; !w.begins(id) {
				w.note("delete", uint64(id))
				w.court.taken(id, false)
			}
		case w.groups && r.chance(0.5) && w.court.ids < w.volumes()*snapshotsMax:
			w.takeGroup()
		case w.court.ids < w.volumes()*snapshotsMax:
			w.take(lsfs.VolumeID(1 + r.n(w.volumes())))
		}
	}
}

// take takes a snapshot. One that is good holds of every block a version that a read might
// have returned that lasted as long.
func (w *world) take(vol lsfs.VolumeID) {
	v, p := w.ownerOf(vol)
	if v == nil {
		return
	}
	var begins []begin
	for _, c := range w.clients {
		for _, reg := range c.regs[vol] {
			begins = append(begins, reg.begin())
		}
	}
	id := w.court.pending(vol)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	err := v.TakeSnapshot(ctx, id)
	cancel()
	w.note("snapshot", uint64(vol), uint64(id), b2u(err == nil))
	if err != nil {
		w.logf("no snapshot %d of volume %d: %v", id, vol, err)
		return // settle finds out
	}
	s := p.store
	for _, c := range w.clients {
		for _, reg := range c.regs[vol] {
			s.mu.Lock()
			x, h := s.disk.snaps[id], uint64(0)
			if x != nil {
				h = x.diskVolume.sum(reg.no)
			}
			s.mu.Unlock()
			if x == nil && w.placing && !w.offers(p.id, vol) {
				return // its copy was taken off meanwhile; settle finds out
			}
			if x == nil {
				w.fail("snapshot %d of volume %d was taken, and node %d does not have it", id, vol, p.id)
				return
			}
			reg.found(w, begins[0], h, false, clientCount)
			begins = begins[1:]
		}
	}
	w.court.taken(id, true)
}

// compareSnapshots looks whether two disks have the same snapshots of a volume.
func (w *world) compareSnapshots(vol lsfs.VolumeID, own, other *disk, a, b replication.NodeID) {
	x, y := own.snapshotsOf(vol), other.snapshotsOf(vol)
	if !slices.EqualFunc(x, y, func(x, y *diskSnapshot) bool { return x.id == y.id && x.sum() == y.sum() }) {
		w.fail("I7: volume %d: the snapshots of nodes %d and %d differ: %v and %v", vol, a, b, x, y)
	}
}

func (x *diskSnapshot) String() string { return fmt.Sprintf("%d at %v", x.id, x.point) }
