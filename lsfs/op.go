package lsfs

import "github.com/twinsan/twinsan/dedup"

// VolumeID names a volume in the whole cluster. It is never reused; zero is no volume.
type VolumeID uint64

// Epoch counts the reigns of a volume: it rises at every change of owner or in-sync set.
type Epoch uint64

// Seq numbers the operations of one volume without gaps, across epochs.
type Seq uint64

// OpID names one operation of a volume.
type OpID struct {
	Epoch Epoch
	Seq   Seq
}

// BlockNo counts the 4 KiB blocks of a volume.
type BlockNo uint64

// BID is a block identity: the only name that maps and caches use for a stored
// block. It is handed out in write order and local to one pool. Zero is the
// hole: a block that reads as zeros.
type BID uint64

// OpKind is the kind of a logged operation. Part of the disk and wire formats, do not change.
type OpKind uint8

const (
	// OpWrite replaces Count blocks from Start by Blocks.
	OpWrite OpKind = 1
	// OpUnmap makes Count blocks from Start read as zeros and drops their mappings.
	OpUnmap OpKind = 2
	// OpEpoch opens an epoch: (ID.Epoch, ID.Seq) is appended to the volume's epoch
	// log. It takes a sequence number of its own and carries no blocks.
	OpEpoch OpKind = 3
	// OpState replaces the volume's small ordered state (persistent reservations
	// and the like), an opaque value of up to 64 KiB in State.
	OpState OpKind = 4
	// OpCopy is OpWrite for one resynchronised range of a replica that is not in
	// sync: it has no sequence number of its own (ID.Seq is the source's chunk
	// version, stored as the version of the chunk it lies in) and does not move
	// the volume's durable sequence.
	OpCopy OpKind = 5
	// OpClone makes Count blocks from Start equal to those from SourceStart of
	// volume Source, as they are at its place in the log: by reference, sharing
	// whole map pages where the ranges allow it. Source may be Volume; overlapping
	// ranges end as if read first. It has a sequence number of Volume's. Either
	// range may lie in an annex. The caller keeps the source range unchanged until
	// Done, and sees to it that every replica that gets the operation holds the source.
	OpClone OpKind = 6
	// OpSnapshot makes snapshot Snapshot of Volume as it is at this place of its
	// stream. It costs one record and shares all pages, and takes a sequence number.
	// Where the snapshot is already it changes nothing else. Snapshot 0 makes none.
	OpSnapshot OpKind = 7
	// OpRollback makes the content and the size of Volume those of snapshot Snapshot;
	// the annex stays. It takes a sequence number, which is from then on the least
	// version of every chunk. It is refused with ErrNoVolume where the snapshot is not.
	OpRollback OpKind = 8
)

// ClonedBlocksMax bounds the blocks of one OpClone: 64 MiB.
const ClonedBlocksMax = 16 << 10

// Extent is a run of blocks that are all mapped, or all holes.
type Extent struct {
	Blocks uint64
	Mapped bool
	// Same: both sides hold the same there. Only ChangedRanges says so.
	Same bool
}

// Op is one reduced operation of one volume, as it is logged and as it is
// shipped to replicas. The caller owns it until Append and again after Done.
//
// For OpWrite and OpCopy len(Blocks) == Count. A block whose Data is nil and
// whose Encoding is not Zero is a reference: its fingerprint was pinned before
// (Volume.Pin), and Pinned holds the block identity at the same index.
type Op struct {
	Kind   OpKind
	Volume VolumeID
	ID     OpID
	Start  BlockNo
	Count  uint32
	Blocks []dedup.Block
	Pinned []BID
	State  []byte
	// Warm: what an OpWrite stores is likely to be read soon (heartbeats, locks,
	// journals): new blocks of it enter the cache on this node.
	Warm bool

	// Relaxed: an OpWrite or OpCopy that is done when it is written and visible, before it is
	// durable. It becomes durable with the next operation that is not relaxed, and after
	// Config.FlushInterval at the latest; until then a power cut may take it back,
	// together with everything that came after it.
	Relaxed bool

	// Plain may hold, for an OpWrite, the content of blocks that shall enter the cache
	// on this node because what they replace was read there (see Volume.Wanted): empty,
	// or nil or 4096 bytes for each block. It stays the caller's, until Done.
	Plain [][]byte

	Source      VolumeID // OpClone: a volume or a snapshot
	SourceStart BlockNo
	Snapshot    VolumeID // OpSnapshot, OpRollback

	// Done is called once by the committing goroutine, when the operation is
	// durable on this node (or Relaxed) and visible to Read, or has failed. Operations of one
	// volume are done in the order of Append. It must not block or call Append.
	Done func(op *Op, err error)
	// Ctx belongs to the caller.
	Ctx any

	next *Op // the store's queue
	err  error
	task *task // what a private kind does
	recordBytes,
	payloadBytes uint32
	// admitted: it was appended while the store took what grows.
	admitted bool
}
