package replication

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// A list of chunks is sent as a u32 each or, where that is longer than a frame, as
// runs: runsMark, then first chunk and count of each run. After a rollback every chunk
// of a volume has changed; that is one run, and the annex. A list of runs may name
// chunks that have not changed: it costs a comparison. Part of the wire format, do not
// change.
const (
	runsMark = 0xffffffff
	// annexRunMax bounds what runs may name in an annex: 1 TiB, which holds point in
	// time copies of some hosts. What is before it is bounded by the size of the volume.
	annexRunMax = 1 << 20
	annexFirst  = uint64(lsfs.AnnexStart) / wire.ChunkBlocks
	annexEnd    = annexFirst + lsfs.AnnexBlocks/wire.ChunkBlocks
)

// changedList is the list of chunks with a version above since, as it is sent.
func changedList(ctx context.Context, c Copy, since lsfs.Seq) ([]byte, error) {
	chunks, err := c.ChangedChunks(ctx, since)
	if err != nil {
		return nil, err
	}
	return appendChunks(chunks, wire.MaxData), nil
}

// appendChunks encodes ascending chunks in at most limit bytes, some dozens at least.
func appendChunks(chunks []uint32, limit int) (list []byte) {
	if len(chunks)*4 <= limit {
		for _, c := range chunks {
			list = binary.LittleEndian.AppendUint32(list, c)
		}
		return list
	}
	// Runs with a gap below a growing width become one.
	for gap := uint32(1); ; gap *= 2 {
		list = binary.LittleEndian.AppendUint32(list[:0], runsMark)
		for i := 0; i < len(chunks) && len(list)+8 <= limit+8; {
			j := i + 1
			for j < len(chunks) && chunks[j]-chunks[j-1] <= gap && (uint64(chunks[j]) < annexFirst) == (uint64(chunks[i]) < annexFirst) {
				j++
			}
			list = binary.LittleEndian.AppendUint32(list, chunks[i])
			list = binary.LittleEndian.AppendUint32(list, chunks[j-1]-chunks[i]+1)
			i = j
		}
		if len(list) <= limit || gap > 1<<30 {
			return list
		}
	}
}

// parseChunks is the inverse of changedList, for a volume of that many blocks.
func parseChunks(list []byte, blocks uint64) ([]uint32, error) {
	if len(list)%4 != 0 {
		return nil, fmt.Errorf("%w: list of chunks", wire.ErrFrame)
	}
	if len(list) < 4 || binary.LittleEndian.Uint32(list) != runsMark {
		chunks := make([]uint32, len(list)/4)
		for i := range chunks {
			chunks[i] = binary.LittleEndian.Uint32(list[i*4:])
		}
		return chunks, nil
	}
	if list = list[4:]; len(list)%8 != 0 {
		return nil, fmt.Errorf("%w: list of runs of chunks", wire.ErrFrame)
	}
	own := (blocks + wire.ChunkBlocks - 1) / wire.ChunkBlocks
	total, annex, next := uint64(0), uint64(0), uint64(0)
	for at := 0; at < len(list); at += 8 {
		first, count := uint64(binary.LittleEndian.Uint32(list[at:])), uint64(binary.LittleEndian.Uint32(list[at+4:]))
		switch end := first + count; {
		case first < next || count == 0 || end > annexEnd || first < annexFirst && end > own:
			return nil, fmt.Errorf("%w: run of %d chunks at %d", wire.ErrFrame, count, first)
		case first >= annexFirst:
			annex += count
		}
		next, total = first+count, total+count
	}
	if annex > annexRunMax {
		return nil, fmt.Errorf("%w: runs of %d chunks in an annex", wire.ErrFrame, annex)
	}
	chunks := make([]uint32, 0, total)
	for at := 0; at < len(list); at += 8 {
		first, count := binary.LittleEndian.Uint32(list[at:]), binary.LittleEndian.Uint32(list[at+4:])
		for i := range count {
			chunks = append(chunks, first+i)
		}
	}
	return chunks, nil
}
