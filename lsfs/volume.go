package lsfs

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/twinsan/twinsan/lsfs/format"
)

const (
	chunkShift = 8
	// ChunkBlocks is the number of blocks in a chunk (1 MiB), the unit of versions.
	ChunkBlocks = 1 << chunkShift
	// VolumeBlocksMax bounds a volume: 128 TiB.
	VolumeBlocksMax = 1 << 35
	// AnnexStart is the first block of a volume's annex: AnnexBlocks of addresses
	// behind every volume's end that belong to the volume and not to its size.
	AnnexStart  BlockNo = 1 << 35
	AnnexBlocks         = 1 << 34
)

// Meta is the small state of a volume. Its slices are never modified in place.
type Meta struct {
	// Replica is drawn anew when the replica is created.
	Replica [16]byte
	// Promised is the epoch below which the replica refuses everything (W2).
	Promised Epoch
	// EpochLog holds, per epoch, its number and the sequence of its OpEpoch, oldest first.
	EpochLog []OpID
	// Durable is the last operation on stable storage.
	Durable OpID
	// Inconsistent: a resync has begun and not ended (Y2).
	Inconsistent bool
	// SyncFrom is where that resync began.
	SyncFrom OpID
	// State is the value of the last OpState.
	State []byte
}

// Volume is one volume's replica in this store. Its methods may be called
// concurrently; after the volume is deleted they return ErrNoVolume.
type Volume struct {
	s  *Store
	id VolumeID

	size atomic.Uint64 // blocks; changed under Store.mu

	// Guarded by Store.mu.
	tailEnd  uint64 // [size, tailEnd) may still be mapped and goes in the background
	mapped   uint64 // of the blocks before the annex
	annex    uint64 // of the annex
	deleting bool
	mapTree  tree
	versions tree
	meta     Meta
	floor    Seq    // least version of every chunk before the annex
	old      []lead // what a rollback left and has to be shed
	bare     bool   // the content of a snapshot: no annex, no operations
	forging  bool   // bare, and not a snapshot yet
	stale    bool   // forging since before the store was opened: it will be deleted

	streams streams

	expect Seq // next sequence that Append takes; guarded by queue.mu
	built  Seq // last sequence in a commit; belongs to the committing role
}

// ID is the volume's id.
func (v *Volume) ID() VolumeID { return v.id }

// Blocks is the size of the volume.
func (v *Volume) Blocks() uint64 { return v.size.Load() }

// MappedBlocks is the number of blocks that are not holes, without the annex (see
// AnnexMapped).
func (v *Volume) MappedBlocks() uint64 {
	v.s.mu.RLock()
	defer v.s.mu.RUnlock()
	return v.mapped
}

// Meta returns the volume's meta as of the last commit. Its slices must not be modified.
func (v *Volume) Meta() Meta {
	v.s.mu.RLock()
	defer v.s.mu.RUnlock()
	return v.meta
}

// SetMeta replaces the whole meta, Durable, EpochLog and State included. It is
// durable on return, and takes its place in the order of operations: on a
// volume with operations under way use UpdateMeta.
func (v *Volume) SetMeta(ctx context.Context, m Meta) error {
	return v.UpdateMeta(ctx, func(p *Meta) { *p = m })
}

// UpdateMeta changes the meta as it is when the change's turn comes, after all
// operations appended before. It is durable on return. change runs once on the
// committing goroutine, must not block, and replaces slices rather than modify
// them. A change of Durable is followed by the sequence after it.
func (v *Volume) UpdateMeta(ctx context.Context, change func(*Meta)) error {
	return v.s.do(ctx, &task{kind: taskMeta, volume: v.id, change: change})
}

// Resize changes the size. Blocks behind a smaller end are given back in the
// background; to grow over blocks that are still being given back waits for them.
// It is durable on return.
func (v *Volume) Resize(ctx context.Context, blocks uint64) error {
	if blocks == 0 || VolumeBlocksMax < blocks {
		return fmt.Errorf("resize to %d blocks: %w", blocks, ErrRange)
	}
	for {
		err := v.s.do(ctx, &task{kind: taskResize, volume: v.id, blocks: blocks})
		if err != errTail {
			return err
		}
		v.s.trimmer.kick()
		if err := v.s.trimmer.wait(ctx, v.id); err != nil {
			return err
		}
	}
}

// Volume returns a volume, nil if it does not exist or is being deleted.
func (s *Store) Volume(id VolumeID) *Volume {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if v := s.volumes[id]; v != nil && !v.deleting {
		return v
	}
	return nil
}

// find is the volume of that id, or the content of the snapshot, however far its life
// is: nil if there is neither. The caller has Store.mu.
func (s *Store) find(id VolumeID) *Volume {
	if v := s.volumes[id]; v != nil {
		return v
	}
	if n := s.snapshots[id]; n != nil {
		return &n.content
	}
	return nil
}

// taker is what an operation goes to, nil if there is nothing that takes it.
func (s *Store) taker(op *Op) *Volume {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if v := s.find(op.Volume); v != nil && v.takes(op.Kind) {
		return v
	}
	return nil
}

// takes says whether operations of a kind may change a volume, or a snapshot that is
// being forged. The caller has Store.mu.
func (v *Volume) takes(kind OpKind) bool {
	if v.bare {
		return v.forging && !v.stale && !v.deleting && (kind == OpCopy || kind == OpUnmap)
	}
	return !v.deleting
}

// Volumes lists the volumes in the order of their ids.
func (s *Store) Volumes() []VolumeID {
	s.mu.RLock()
	defer s.mu.RUnlock()
	ids := make([]VolumeID, 0, len(s.volumes))
	for id, v := range s.volumes {
		if !v.deleting && id != SalvageVolume {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// CreateVolume makes an empty volume, durable on return. An id whose deletion is
// still under way exists (ErrExists).
func (s *Store) CreateVolume(ctx context.Context, id VolumeID, blocks uint64, replica [16]byte) (*Volume, error) {
	if id == 0 || id == SalvageVolume || blocks == 0 || VolumeBlocksMax < blocks {
		return nil, fmt.Errorf("create volume %d of %d blocks: %w", id, blocks, ErrRange)
	}
	if err := s.do(ctx, &task{kind: taskCreate, volume: id, blocks: blocks, replica: replica}); err != nil {
		return nil, err
	}
	if v := s.Volume(id); v != nil {
		return v, nil
	}
	return nil, ErrNoVolume
}

// DeleteVolume removes a volume. It is gone for good on return; its space is
// given back in the background, after a restart too.
func (s *Store) DeleteVolume(ctx context.Context, id VolumeID) error {
	if err := s.do(ctx, &task{kind: taskDelete, volume: id}); err != nil {
		return err
	}
	s.trimmer.kick()
	return nil
}

func (v *Volume) stored() format.Volume {
	m := &v.meta
	return format.Volume{
		ID: uint64(v.id), Blocks: v.size.Load(), TailEnd: v.tailEnd, Mapped: v.mapped, Annex: v.annex, Deleting: v.deleting,
		Map:      format.Tree{Top: v.mapTree.top, Height: v.mapTree.height},
		Versions: format.Tree{Top: v.versions.top, Height: v.versions.height},
		Meta:     m.stored(),
		Floor:    uint64(v.floor), Old: storedLeads(v.old),
	}
}

func (m *Meta) stored() format.Meta {
	f := format.Meta{
		Replica: m.Replica, Promised: uint64(m.Promised),
		DurableEpoch: uint64(m.Durable.Epoch), DurableSeq: uint64(m.Durable.Seq),
		SyncEpoch: uint64(m.SyncFrom.Epoch), SyncSeq: uint64(m.SyncFrom.Seq),
		Inconsistent: m.Inconsistent, State: m.State,
	}
	for _, e := range m.EpochLog {
		f.EpochLog = append(f.EpochLog, format.EpochStart{Epoch: uint64(e.Epoch), Seq: uint64(e.Seq)})
	}
	return f
}

func metaOf(f *format.Meta) Meta {
	m := Meta{
		Replica: f.Replica, Promised: Epoch(f.Promised),
		Durable:  OpID{Epoch(f.DurableEpoch), Seq(f.DurableSeq)},
		SyncFrom: OpID{Epoch(f.SyncEpoch), Seq(f.SyncSeq)}, Inconsistent: f.Inconsistent, State: f.State,
	}
	for _, e := range f.EpochLog {
		m.EpochLog = append(m.EpochLog, OpID{Epoch(e.Epoch), Seq(e.Seq)})
	}
	return m
}

func volumeOf(s *Store, f *format.Volume) *Volume {
	v := &Volume{
		s: s, id: VolumeID(f.ID), tailEnd: f.TailEnd, mapped: f.Mapped, annex: f.Annex, deleting: f.Deleting,
		mapTree: tree{f.Map.Top, f.Map.Height}, versions: tree{f.Versions.Top, f.Versions.Height},
		meta: metaOf(&f.Meta), floor: Seq(f.Floor), old: leadsOf(f.Old),
	}
	v.size.Store(f.Blocks)
	v.settle()
	return v
}

// settle makes the next sequence follow the durable one.
func (v *Volume) settle() {
	v.built = v.meta.Durable.Seq
	v.expect = v.built + 1
}
