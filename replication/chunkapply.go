package replication

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// syncApply makes a chunk equal to the owner's and answers with its digest as it
// is stored now. The owner's lock keeps live operations out of the chunk. When it returns
// without an error, nothing refers to data any more.
func (v *Volume) syncApply(ctx context.Context, meta, data []byte) ([]byte, error) {
	c := v.copy()
	// In M3 the copy stays in sync: what changes it there is durable as what it replaces.
	return v.applyChunk(ctx, c, c.Blocks(), v.id, c.Meta().Inconsistent, meta, data)
}

// applyChunk is syncApply for what is not the copy itself, too: target takes the
// operations. relaxed: they are answered when they are written, before they are flushed.
// Nothing is built on them before a mark that is durable itself, and so makes them
// durable first: SyncEnd or SnapSeal (Y9).
func (v *Volume) applyChunk(ctx context.Context, c chunked, blocks uint64, target VolumeID, relaxed bool, meta, data []byte) ([]byte, error) {
	sc, err := wire.DecodeSyncChunk(meta, data)
	if err != nil {
		return nil, err
	}
	have, start, err := chunkFingerprints(ctx, c, blocks, sc.Chunk, len(sc.Fingerprints))
	if err != nil {
		return nil, err
	}
	works, err := v.chunkWorks(&sc, have, start, target)
	if err == nil {
		err = stampLast(ctx, c, &sc, works, relaxed)
	}
	if err != nil {
		for _, w := range works {
			v.node.unpin(w)
		}
		return nil, err
	}
	if err := v.storeAll(ctx, works); err != nil {
		return nil, err
	}
	if err := c.Fingerprints(ctx, start, have); err != nil {
		return nil, err
	}
	d := chunkDigest(have)
	return d[:], nil
}

// chunked is what a chunk is stored in: a copy, or a snapshot that is being forged.
type chunked interface {
	fingerprinted
	ChunkVersions(ctx context.Context, first uint32, dst []lsfs.Seq) error
}

// stampLast makes sure that the chunk has the owner's version when all of its works are in
// the log, and not before. Where the replica had moved beyond the common point and the
// owner had not, the owner's version is the lower one: with that and a part of the
// content no later resync would look at the chunk again (Y1). The log keeps the order of
// works, so what a loss of power leaves of them ends with one that has the higher one.
func stampLast(ctx context.Context, c chunked, sc *wire.SyncChunk, works []*work, relaxed bool) error {
	var have [1]lsfs.Seq
	if err := c.ChunkVersions(ctx, sc.Chunk, have[:]); err != nil {
		return err
	}
	for i, w := range works {
		w.op.Relaxed = relaxed
		if i < len(works)-1 && !mutant("Y9-last") {
			w.op.ID.Seq = max(w.op.ID.Seq, have[0])
		}
	}
	return nil
}

// chunkWorks are the operations that make a chunk what sc says: runs of blocks that
// differ become one each. The first block always goes along, so that the chunk's version
// moves even when nothing differs. After an error they hold pins.
func (v *Volume) chunkWorks(sc *wire.SyncChunk, have []dedup.Fingerprint, start lsfs.BlockNo, target VolumeID) (works []*work, err error) {
	var sent [wire.ChunkBlocks]*dedup.Block
	for k, i := range sc.Index {
		b := &sc.Blocks[k]
		if b.Data == nil || b.Fingerprint != sc.Fingerprints[i] { // CHECKED: the store verifies the sum before it takes it
			return nil, fmt.Errorf("block %d of chunk %d is not what was announced", i, sc.Chunk)
		}
		sent[i] = b
	}
	for i := 0; i < len(have); {
		if i > 0 && have[i] == sc.Fingerprints[i] {
			i++
			continue
		}
		j := i + 1
		for j < len(have) && j-i < partBytes/blockSize && have[j] != sc.Fingerprints[j] {
			j++
		}
		w := &work{v: v}
		w.op.Ctx, w.op.Done = w, v.node.stored
		w.op.Kind, w.op.Volume, w.op.ID = lsfs.OpCopy, target, lsfs.OpID{Epoch: lsfs.Epoch(0), Seq: sc.Version}
		w.op.Start, w.op.Count = start+lsfs.BlockNo(i), uint32(j-i)
		w.op.Blocks, w.op.Pinned = make([]dedup.Block, 0, j-i), make([]lsfs.BID, 0, j-i)
		works = append(works, w)
		for ; i < j; i++ {
			b := dedup.Block{Fingerprint: sc.Fingerprints[i], Encoding: dedup.Raw}
			var pinned lsfs.BID
			if sc.Fingerprints[i] == (dedup.Fingerprint{}) {
				b = dedup.Block{}
			} else if s := sent[i]; s != nil {
				b = *s
			} else {
				var held bool
				if pinned, held = v.node.pool.Pin(&sc.Fingerprints[i]); !held {
					// Live operations have overwritten its last copy since the comparison.
					return works, errAgain
				}
			}
			w.op.Blocks = append(w.op.Blocks, b)
			w.op.Pinned = append(w.op.Pinned, pinned)
		}
	}
	return works, nil
}

// storeAll gives works to the store together, so that they share commits, and waits
// until all of them are durable. It returns without an error only then.
func (v *Volume) storeAll(ctx context.Context, works []*work) error {
	done := make(chan error, len(works))
	v.mu.Lock()
	v.open += len(works)
	for _, w := range works {
		w.then = func(err error) { done <- err }
		v.node.pool.Append(&w.op)
	}
	v.mu.Unlock()
	v.node.pool.Kick()
	var failed error
	for range works {
		select {
		case err := <-done:
			if err != nil && failed == nil {
				failed = err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return failed
}
