package lsfs

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/format"
)

// SnapshotsMax bounds the snapshots of a pool, which stand in the root of each
// checkpoint with 75 bytes each. AdmitSnapshot refuses more (ErrSnapshots). What was
// admitted elsewhere is taken up to twice as many.
const SnapshotsMax = 1 << 16

// Snapshot is the content of a volume at one operation, without its annex. It never
// changes. Its methods may be called concurrently; after it is deleted they return
// ErrNoVolume. It outlives its volume.
type Snapshot struct {
	content Volume // bare
	of      VolumeID
	point   OpID // guarded by Store.mu while it is forged
}

// ID is the snapshot's id, from the same numbers as those of volumes.
func (n *Snapshot) ID() VolumeID { return n.content.id }

// Volume is whose snapshot it is. That volume may be deleted by now.
func (n *Snapshot) Volume() VolumeID { return n.of }

// Point is the operation that took the snapshot.
func (n *Snapshot) Point() OpID { return n.point }

// Blocks is the size of the volume at that operation.
func (n *Snapshot) Blocks() uint64 { return n.content.Blocks() }

// MappedBlocks is the number of blocks that are not holes.
func (n *Snapshot) MappedBlocks() uint64 { return n.content.MappedBlocks() }

// Read is Volume.Read.
func (n *Snapshot) Read(ctx context.Context, off uint64, dst []byte) error {
	return n.content.Read(ctx, off, dst)
}

// Fingerprints is Volume.Fingerprints.
func (n *Snapshot) Fingerprints(ctx context.Context, start BlockNo, dst []dedup.Fingerprint) error {
	return n.content.Fingerprints(ctx, start, dst)
}

// Extents is Volume.Extents.
func (n *Snapshot) Extents(ctx context.Context, start, end BlockNo, dst []Extent) ([]Extent, error) {
	return n.content.Extents(ctx, start, end, dst)
}

// ChunkVersions is Volume.ChunkVersions, as they were at the snapshot.
func (n *Snapshot) ChunkVersions(ctx context.Context, first uint32, dst []Seq) error {
	return n.content.ChunkVersions(ctx, first, dst)
}

// ChangedChunks is Volume.ChangedChunks, as it was at the snapshot.
func (n *Snapshot) ChangedChunks(ctx context.Context, since Seq) ([]uint32, error) {
	return n.content.ChangedChunks(ctx, since)
}

// Digest is Volume.Digest: equal for snapshots of equal content.
func (n *Snapshot) Digest(ctx context.Context) ([32]byte, error) { return n.content.Digest(ctx) }

// Repair is Volume.Repair.
func (n *Snapshot) Repair(ctx context.Context, no BlockNo, b dedup.Block) error {
	return n.content.Repair(ctx, no, b)
}

// listed says whether the snapshot is one for the world outside. The caller has Store.mu.
func (n *Snapshot) listed() bool { return !n.content.deleting && !n.content.forging }

// Snapshot returns a snapshot, nil if it does not exist, is being deleted or is not
// sealed yet.
func (s *Store) Snapshot(id VolumeID) *Snapshot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := s.snapshots[id]; n != nil && n.listed() {
		return n
	}
	return nil
}

// Forged returns a snapshot that is being forged, to look at before it is sealed: nil if
// there is none.
func (s *Store) Forged(id VolumeID) *Snapshot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := s.snapshots[id]; n != nil && n.content.forging && !n.content.stale && !n.content.deleting {
		return n
	}
	return nil
}

// Snapshots lists the snapshots of a volume, or all when of is 0, in the order of their
// volumes and then of their points.
func (s *Store) Snapshots(of VolumeID) []*Snapshot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*Snapshot
	for _, n := range s.snapshots {
		if n.listed() && (of == 0 || n.of == of) {
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(a, b *Snapshot) int {
		return cmp.Or(cmp.Compare(a.of, b.of), cmp.Compare(a.point.Seq, b.point.Seq), cmp.Compare(a.content.id, b.content.id))
	})
	return list
}

// AdmitSnapshot says why an OpSnapshot of the volume would be refused, nil if it would
// not, for a caller that must know before it gives it a sequence number: ErrSnapshots,
// ErrReferences. It does no I/O.
func (v *Volume) AdmitSnapshot() error {
	s := v.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.roomForSnapshot(v, SnapshotsMax)
}

// AdmitRollback says why an OpRollback of the volume would be refused, nil if it would
// not: ErrNoVolume when the snapshot is not here, ErrReferences. It does no I/O.
func (v *Volume) AdmitRollback(snapshot VolumeID) error {
	s := v.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.snapshotUsable(snapshot)
}

func (s *Store) roomForSnapshot(v *Volume, limit int) error {
	switch {
	case limit <= len(s.snapshots):
		return fmt.Errorf("snapshot of volume %d: %w", v.id, ErrSnapshots)
	case s.topCrowded(v.mapTree):
		return fmt.Errorf("snapshot of volume %d: %w", v.id, ErrReferences)
	}
	return nil
}

// snapshotUsable says why a snapshot cannot become a volume's content.
func (s *Store) snapshotUsable(id VolumeID) error {
	n := s.snapshots[id]
	switch {
	case n == nil || !n.listed():
		return fmt.Errorf("snapshot %d: %w", id, ErrNoVolume)
	case s.topCrowded(n.content.mapTree):
		return fmt.Errorf("snapshot %d: %w", id, ErrReferences)
	}
	return nil
}

// topCrowded says whether a tree's top, or what it leads to, can have no more parents.
func (s *Store) topCrowded(t tree) bool {
	if t.top == 0 || s.pg.crowd.Load() < s.parentsLast {
		return false
	}
	if s.parentsLast <= s.pg.page(t.top).parents {
		return true
	}
	data := s.pg.data(t.top)
	if t.height == 1 || data == nil {
		return false
	}
	for k := range format.WordsPerPage {
		if w := uint32(format.Word(data, k)); w != 0 && s.parentsLast <= s.pg.page(w).parents {
			return true
		}
	}
	return false
}

// stageSnapshot looks at an OpSnapshot or OpRollback before it is logged.
func (s *Store) stageSnapshot(v *Volume, op *Op) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if op.Kind == OpRollback {
		return s.snapshotUsable(op.Snapshot)
	}
	if op.Snapshot == 0 {
		return nil
	}
	if s.volumes[op.Snapshot] != nil {
		return fmt.Errorf("snapshot %d of volume %d: %w", op.Snapshot, v.id, ErrExists)
	}
	if s.snapshots[op.Snapshot] != nil {
		return nil
	}
	return s.roomForSnapshot(v, 2*SnapshotsMax)
}

// DeleteSnapshot removes a snapshot. It is gone for good on return; the space that only
// it used is given back in the background, after a restart too. ErrNoVolume when there
// is none.
func (s *Store) DeleteSnapshot(ctx context.Context, id VolumeID) error {
	if err := s.do(ctx, &task{kind: taskForget, volume: id}); err != nil {
		return err
	}
	s.trimmer.kick()
	return nil
}

// CreateVolumeFrom makes a volume with the content of a snapshot, durable on return. It
// shares all pages and so costs one record. blocks is at least the snapshot's size. The
// volume begins at operation {0, 1}, which is the version of all its chunks, so an empty
// replica of it finds what to fetch. ErrNoVolume when the snapshot is not here.
func (s *Store) CreateVolumeFrom(ctx context.Context, id VolumeID, blocks uint64, replica [16]byte, snapshot VolumeID) (*Volume, error) {
	if id == 0 || blocks == 0 || VolumeBlocksMax < blocks {
		return nil, fmt.Errorf("create volume %d of %d blocks: %w", id, blocks, ErrRange)
	}
	if err := s.doTrimmed(ctx, &task{kind: taskFrom, volume: id, blocks: blocks, replica: replica, base: snapshot}); err != nil {
		return nil, err
	}
	if v := s.Volume(id); v != nil {
		return v, nil
	}
	return nil, ErrNoVolume
}

// ForgeSnapshot begins snapshot id of volume of on a replica that missed it. It starts
// with the content of base, a volume or snapshot here, or empty (0), cut to blocks, the
// size of the missing one. Until SealSnapshot it takes OpCopy and OpUnmap, addressed
// to id, whose ID.Seq is the source's chunk version; it is not listed, and the next start
// deletes it. Where an earlier one of this id is still being deleted it waits for that.
// ErrExists when there is one already, ErrNoVolume when base is not here.
func (s *Store) ForgeSnapshot(ctx context.Context, id, of, base VolumeID, blocks uint64) error {
	if id == 0 || of == 0 || id == base || blocks == 0 || VolumeBlocksMax < blocks {
		return fmt.Errorf("forge snapshot %d of %d blocks: %w", id, blocks, ErrRange)
	}
	return s.doTrimmed(ctx, &task{kind: taskForge, volume: id, of: of, base: base, blocks: blocks})
}

// SealSnapshot makes a forged snapshot a real one, taken at point. It is durable on
// return. A second call changes nothing. ErrNoVolume when none is being forged.
func (s *Store) SealSnapshot(ctx context.Context, id VolumeID, point OpID) error {
	return s.do(ctx, &task{kind: taskSeal, volume: id, point: point})
}

// AbandonSnapshot deletes a snapshot that is being forged. ErrNoVolume when there is none.
func (s *Store) AbandonSnapshot(ctx context.Context, id VolumeID) error {
	if err := s.do(ctx, &task{kind: taskForget, volume: id, of: id}); err != nil {
		return err
	}
	s.trimmer.kick()
	return nil
}

// doTrimmed does a task that may have to wait for blocks that are being given back.
func (s *Store) doTrimmed(ctx context.Context, t *task) error {
	for {
		err := s.do(ctx, t)
		if err != errTail {
			return err
		}
		s.trimmer.kick()
		if err := s.trimmer.wait(ctx, t.volume); err != nil {
			return err
		}
	}
}

// snapshotTask appends the record of a task of snapshots to buf. Nothing appended
// means that nothing is to be done. v is what has the task's id.
func (s *Store) snapshotTask(t *task, v *Volume, buf []byte) ([]byte, error) {
	s.mu.RLock()
	buf, err := s.snapshotRecord(t, v, buf)
	s.mu.RUnlock()
	if err != nil || len(buf) == format.CommitHeaderSize {
		return buf, err
	}
	r, _, err := format.NextRecord(buf[format.CommitHeaderSize:])
	if err == nil && r.Kind == format.RecordForge {
		err = s.require(r) // before anything is logged
	}
	return buf, err
}

func (s *Store) snapshotRecord(t *task, v *Volume, buf []byte) ([]byte, error) {
	none := func() ([]byte, error) { return nil, fmt.Errorf("snapshot %d: %w", t.volume, ErrNoVolume) }
	switch t.kind {
	case taskShed:
		if v == nil || len(v.old) == 0 && (!v.deleting || v.mapTree.top == 0 && v.versions.top == 0) {
			return buf, nil
		}
		leaves := s.roomToShed(shedLeaves)
		if leaves == 0 {
			return buf, nil // the trimmer will wait
		}
		return format.AppendVolume(buf, format.RecordShed, uint64(t.volume), uint64(leaves*shedLeaf)), nil
	case taskForget:
		if v == nil || !v.bare || v.deleting || t.of != 0 && !v.forging || t.of == 0 && v.forging {
			return none()
		}
		return format.AppendVolume(buf, format.RecordDelete, uint64(t.volume)), nil
	case taskSeal:
		switch n := s.snapshots[t.volume]; {
		case n == nil || v.deleting || v.stale || !v.forging && n.point != t.point:
			return none()
		case !v.forging:
			return buf, nil
		}
		return format.AppendVolume(buf, format.RecordSeal, uint64(t.volume), uint64(t.point.Epoch), uint64(t.point.Seq)), nil
	case taskFrom:
		if v != nil {
			return nil, fmt.Errorf("create volume %d: %w", t.volume, ErrExists)
		}
		if err := s.snapshotUsable(t.base); err != nil {
			return nil, err
		}
		from := &s.snapshots[t.base].content
		if size := from.size.Load(); t.blocks < size {
			return nil, fmt.Errorf("create volume %d of %d blocks from a snapshot of %d: %w", t.volume, t.blocks, size, ErrRange)
		} else if size < t.blocks && size < from.tailEnd {
			return nil, errTail
		}
		return format.AppendFrom(buf, uint64(t.volume), t.blocks, t.replica, uint64(t.base)), nil
	case taskForge:
		if v != nil && v.bare && (v.deleting || v.stale) {
			return nil, errTail
		}
		if v != nil {
			return nil, fmt.Errorf("forge snapshot %d: %w", t.volume, ErrExists)
		}
		if 2*SnapshotsMax <= len(s.snapshots) {
			return nil, fmt.Errorf("forge snapshot %d: %w", t.volume, ErrSnapshots)
		}
		if t.base != 0 {
			base := s.find(t.base)
			if base == nil || base.deleting || base.forging {
				return nil, fmt.Errorf("forge snapshot %d from %d: %w", t.volume, t.base, ErrNoVolume)
			}
			if s.topCrowded(base.mapTree) {
				return nil, fmt.Errorf("forge snapshot %d from %d: %w", t.volume, t.base, ErrReferences)
			}
			if size := base.size.Load(); size < t.blocks && size < base.tailEnd {
				return nil, errTail
			}
		}
		return format.AppendVolume(buf, format.RecordForge, uint64(t.volume), uint64(t.of), uint64(t.base), t.blocks), nil
	}
	return nil, fmt.Errorf("task %d: %w", t.kind, ErrInvalidOp)
}

// scanSharing holds the pages that a record of snapshots needs.
func (s *Store) scanSharing(r format.Record) {
	tops := func(id uint64) {
		if v := s.find(VolumeID(id)); v != nil {
			s.scanTop(v.mapTree, uint64(AnnexStart))
			s.scanTop(v.versions, annexChunk)
		}
	}
	switch r.Kind {
	case format.RecordSnapshot:
		tops(r.Op().Volume)
	case format.RecordRollback:
		tops(r.Op().Volume)
		tops(r.Snapshot())
	case format.RecordForge:
		tops(r.Arg(2))
	}
}

// applySharing makes a record of snapshots true.
func (s *Store) applySharing(r format.Record) error {
	if err := s.require(r); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Kind {
	case format.RecordSnapshot:
		h := r.Op()
		v := s.volumes[VolumeID(h.Volume)]
		if v == nil {
			return fmt.Errorf("snapshot of volume %d: %w", h.Volume, ErrNoVolume)
		}
		at := OpID{Epoch(h.Epoch), Seq(h.Seq)}
		if id := VolumeID(r.Snapshot()); id != 0 && s.find(id) == nil {
			n := s.beginSnapshot(id, v.id, v.size.Load(), v)
			n.point = at
		}
		v.meta.Durable = at
	case format.RecordRollback:
		return s.applyRollback(r)
	case format.RecordFrom:
		return s.applyFrom(r)
	case format.RecordForge:
		id, base := VolumeID(r.Arg(0)), s.find(VolumeID(r.Arg(2)))
		if s.find(id) != nil {
			return fmt.Errorf("forge snapshot %d: %w", id, ErrExists)
		}
		if base == nil && r.Arg(2) != 0 {
			return fmt.Errorf("forge snapshot %d from %d: %w", id, r.Arg(2), ErrNoVolume)
		}
		s.beginSnapshot(id, VolumeID(r.Arg(1)), r.Arg(3), base).content.forging = true
	case format.RecordSeal:
		n := s.snapshots[VolumeID(r.Arg(0))]
		if n == nil {
			return fmt.Errorf("seal snapshot %d: %w", r.Arg(0), ErrNoVolume)
		}
		n.point = OpID{Epoch(r.Arg(1)), Seq(r.Arg(2))}
		n.content.forging = false
	}
	return nil
}

// beginSnapshot makes a snapshot with the map and the versions of base, if there is one.
func (s *Store) beginSnapshot(id, of VolumeID, blocks uint64, base *Volume) *Snapshot {
	n := &Snapshot{of: of, content: Volume{s: s, id: id, bare: true, tailEnd: blocks}}
	c := &n.content
	c.size.Store(blocks)
	if base != nil {
		c.mapTree = s.pg.shareMain(base.mapTree, uint64(AnnexStart))
		c.versions = s.pg.shareMain(base.versions, annexChunk)
		c.mapped, c.floor = base.mapped, base.floor
		c.tailEnd = max(blocks, base.size.Load(), base.tailEnd)
	}
	s.snapshots[id] = n
	return n
}

// applyRollback gives a volume the map of a snapshot. What it led to is shed later.
func (s *Store) applyRollback(r format.Record) error {
	h := r.Op()
	v, n := s.volumes[VolumeID(h.Volume)], s.snapshots[VolumeID(r.Snapshot())]
	if v == nil || n == nil || !n.listed() {
		return fmt.Errorf("rollback of volume %d to snapshot %d: %w", h.Volume, r.Snapshot(), ErrNoVolume)
	}
	if t := s.pg.detachMain(&v.mapTree, uint64(AnnexStart)); t.top != 0 {
		v.old = append(v.old, lead{tree: t})
	}
	if t := s.pg.detachMain(&v.versions, annexChunk); t.top != 0 {
		v.old = append(v.old, lead{tree: t, versions: true})
	}
	from := &n.content
	s.pg.attachMain(&v.mapTree, from.mapTree)
	v.mapped, v.tailEnd = from.mapped, from.tailEnd
	v.size.Store(from.size.Load())
	v.floor = Seq(h.Seq)
	v.meta.Durable = OpID{Epoch(h.Epoch), Seq(h.Seq)}
	s.trimmer.kick()
	return nil
}

// applyFrom makes a volume that leads to the map of a snapshot.
func (s *Store) applyFrom(r format.Record) error {
	id, n := VolumeID(r.Arg(0)), s.snapshots[VolumeID(r.Arg(4))]
	if s.find(id) != nil {
		return fmt.Errorf("create volume %d: %w", id, ErrExists)
	}
	if n == nil {
		return fmt.Errorf("create volume %d from snapshot %d: %w", id, r.Arg(4), ErrNoVolume)
	}
	from := &n.content
	v := &Volume{s: s, id: id, mapped: from.mapped, tailEnd: max(r.Arg(1), from.tailEnd), floor: 1, meta: Meta{Replica: r.Replica(), Durable: OpID{0, 1}}}
	v.size.Store(r.Arg(1))
	s.pg.attachMain(&v.mapTree, from.mapTree)
	v.settle()
	s.volumes[id] = v
	return nil
}

// abandonForged marks what a crash or a restart left half forged: the trimmer deletes it.
func (s *Store) abandonForged() {
	for _, n := range s.snapshots {
		n.content.stale = n.content.forging && !n.content.deleting
	}
}

func (n *Snapshot) stored() format.Snapshot {
	c := &n.content
	return format.Snapshot{
		ID: uint64(c.id), Volume: uint64(n.of), Epoch: uint64(n.point.Epoch), Seq: uint64(n.point.Seq),
		Blocks: c.size.Load(), TailEnd: c.tailEnd, Mapped: c.mapped, Floor: uint64(c.floor), Deleting: c.deleting, Forging: c.forging,
		Map:      format.Tree{Top: c.mapTree.top, Height: c.mapTree.height},
		Versions: format.Tree{Top: c.versions.top, Height: c.versions.height},
	}
}

func snapshotOf(s *Store, f *format.Snapshot) *Snapshot {
	n := &Snapshot{of: VolumeID(f.Volume), point: OpID{Epoch(f.Epoch), Seq(f.Seq)}, content: Volume{
		s: s, id: VolumeID(f.ID), bare: true, tailEnd: f.TailEnd, mapped: f.Mapped, floor: Seq(f.Floor), deleting: f.Deleting, forging: f.Forging,
		mapTree: tree{f.Map.Top, f.Map.Height}, versions: tree{f.Versions.Top, f.Versions.Height},
	}}
	n.content.size.Store(f.Blocks)
	return n
}
