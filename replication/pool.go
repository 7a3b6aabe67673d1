package replication

import (
	"context"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// Pool is what replication needs of this node's store. *lsfs.Store is one
// through Local.
type Pool interface {
	// Append queues an operation for the next commit; Kick starts it. Operations of
	// one volume are durable in the order of Append; op.Done says when.
	Append(op *lsfs.Op)
	Kick()
	// OnCommit sets the hook that runs after the Done calls of each commit.
	OnCommit(func())
	// Pin finds a stored block by its fingerprint and keeps it until an operation
	// that refers to it is appended and done, or Unpin.
	Pin(fp *dedup.Fingerprint) (lsfs.BID, bool)
	Unpin(id lsfs.BID)
	// Recall does the I/O that Pin may need to find blocks that a salvage kept; nothing else.
	Recall(ctx context.Context, fps []dedup.Fingerprint)
	// ReadFingerprint reads the stored form of a block; Data lies in buf.
	ReadFingerprint(ctx context.Context, fp *dedup.Fingerprint, buf []byte) (dedup.Block, error)
	Room() lsfs.Room

	Copy(id lsfs.VolumeID) Copy // nil when this node has none
	CreateCopy(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica ReplicaID) (Copy, error)
	DeleteCopy(ctx context.Context, id lsfs.VolumeID) error
	Copies() []lsfs.VolumeID

	SnapshotPool
}

// Copy is this node's replica of a volume in the pool.
type Copy interface {
	Blocks() uint64
	Resize(ctx context.Context, blocks uint64) error
	// Admit says whether a write of these blocks finds room; it does no I/O.
	Admit(start lsfs.BlockNo, blocks []dedup.Block) bool
	// AdmitUnmap says so of an unmap, which takes room where metadata is shared.
	AdmitUnmap(start lsfs.BlockNo, count uint32) bool
	// Kept says whether snapshots or clones keep what a range holds, so that changing it
	// frees nothing.
	Kept(start lsfs.BlockNo, count uint32) bool
	// AdmitClone says whether a clone finds room for its metadata; it does no I/O.
	AdmitClone(start lsfs.BlockNo, source lsfs.VolumeID, sourceStart lsfs.BlockNo, count uint32) bool
	// Wanted marks the blocks of which memory holds a content that was read, and says
	// whether there are any. It does not wait, and may say no.
	Wanted(start lsfs.BlockNo, dst []bool) bool
	// TryRead serves from memory only; Read may do I/O. off counts bytes, in sectors.
	TryRead(off uint64, dst []byte) bool
	Read(ctx context.Context, off uint64, dst []byte) error
	// ReadReduced reads stored forms with their fingerprints; Data lies in buf.
	ReadReduced(ctx context.Context, start lsfs.BlockNo, dst []dedup.Block, buf []byte) error
	// ReadChosen does so for blocks start+index[k], which ascend within a chunk, all at once.
	ReadChosen(ctx context.Context, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error
	// Fingerprints reads fingerprints, the zero value for holes.
	Fingerprints(ctx context.Context, start lsfs.BlockNo, dst []dedup.Fingerprint) error
	// Extents lists what is mapped of [start, end) in dst, up to its capacity; never nothing.
	Extents(ctx context.Context, start, end lsfs.BlockNo, dst []lsfs.Extent) ([]lsfs.Extent, error)
	// Meta and SetMeta read and change where the replica stands; durable on return.
	Meta() lsfs.Meta
	SetMeta(ctx context.Context, m lsfs.Meta) error
	// ChangedChunks lists chunks with a version above since; ChunkVersions reads versions from first on.
	ChangedChunks(ctx context.Context, since lsfs.Seq) ([]uint32, error)
	ChunkVersions(ctx context.Context, first uint32, dst []lsfs.Seq) error
	// AdmitSnapshot and AdmitRollback say why the operation would be refused; no I/O.
	AdmitSnapshot() error
	AdmitRollback(snapshot lsfs.VolumeID) error
	// Repair rewrites a damaged block by an intact copy from another replica.
	Repair(ctx context.Context, block lsfs.BlockNo, intact dedup.Block) error
}

// SnapshotPool is the snapshots of a pool.
type SnapshotPool interface {
	// Snapshot finds a snapshot, nil when there is none; Snapshots lists those of a
	// volume in the order of their points, or all for 0.
	Snapshot(id lsfs.VolumeID) SnapshotCopy
	Snapshots(of lsfs.VolumeID) []SnapshotCopy
	// DeleteSnapshot is durable on return; lsfs.ErrNoVolume when there is none.
	DeleteSnapshot(ctx context.Context, id lsfs.VolumeID) error
	// CreateCopyFrom makes a copy that begins as a snapshot, at operation {0, 1};
	// lsfs.ErrNoVolume when the snapshot is not here.
	CreateCopyFrom(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica ReplicaID, snapshot lsfs.VolumeID) (Copy, error)
	// ForgeSnapshot begins a snapshot of volume of with the content of base; it takes
	// OpCopy until SealSnapshot makes it one, or AbandonSnapshot deletes it. Forged finds it.
	ForgeSnapshot(ctx context.Context, id, of, base lsfs.VolumeID, blocks uint64) error
	Forged(id lsfs.VolumeID) SnapshotCopy
	SealSnapshot(ctx context.Context, id lsfs.VolumeID, point lsfs.OpID) error
	AbandonSnapshot(ctx context.Context, id lsfs.VolumeID) error
}

// SnapshotCopy is a snapshot in this node's pool. It never changes; when it has been
// deleted its methods fail with lsfs.ErrNoVolume.
type SnapshotCopy interface {
	ID() lsfs.VolumeID
	Volume() lsfs.VolumeID // whose it is
	Point() lsfs.OpID      // the operation that took it
	Blocks() uint64
	// Fingerprints, ReadChosen, ChangedChunks, ChunkVersions and Repair are those of
	// Copy, as of the snapshot.
	Fingerprints(ctx context.Context, start lsfs.BlockNo, dst []dedup.Fingerprint) error
	ReadChosen(ctx context.Context, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error
	ChangedChunks(ctx context.Context, since lsfs.Seq) ([]uint32, error)
	ChunkVersions(ctx context.Context, first uint32, dst []lsfs.Seq) error
	Repair(ctx context.Context, block lsfs.BlockNo, intact dedup.Block) error
}

// Local makes a node's store a Pool.
func Local(s *lsfs.Store) Pool { return localPool{s} }

type localPool struct{ *lsfs.Store }

func (p localPool) Copy(id lsfs.VolumeID) Copy {
	if v := p.Volume(id); v != nil {
		return v
	}
	return nil
}

func (p localPool) CreateCopy(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica ReplicaID) (Copy, error) {
	v, err := p.CreateVolume(ctx, id, blocks, replica)
	if err != nil {
		return nil, err
	}
	return v, nil
}

func (p localPool) DeleteCopy(ctx context.Context, id lsfs.VolumeID) error {
	return p.DeleteVolume(ctx, id)
}
func (p localPool) Copies() []lsfs.VolumeID { return p.Volumes() }

func (p localPool) Snapshot(id lsfs.VolumeID) SnapshotCopy {
	if s := p.Store.Snapshot(id); s != nil {
		return s
	}
	return nil
}

func (p localPool) Forged(id lsfs.VolumeID) SnapshotCopy {
	if s := p.Store.Forged(id); s != nil {
		return s
	}
	return nil
}

func (p localPool) Snapshots(of lsfs.VolumeID) []SnapshotCopy {
	list := p.Store.Snapshots(of)
	out := make([]SnapshotCopy, len(list))
	for i, s := range list {
		out[i] = s
	}
	return out
}

func (p localPool) CreateCopyFrom(ctx context.Context, id lsfs.VolumeID, blocks uint64, replica ReplicaID, snapshot lsfs.VolumeID) (Copy, error) {
	v, err := p.CreateVolumeFrom(ctx, id, blocks, replica, snapshot)
	if err != nil {
		return nil, err
	}
	return v, nil
}
