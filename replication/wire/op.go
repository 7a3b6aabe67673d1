package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// The meta part of a Prepare:
//
//	 0  u8  kind
//	 1  u8  flags (1: relaxed, see lsfs.Op; only of a write)   2  u16 0
//	 4  u32 count of blocks the operation covers
//	 8  u64 first block
//	16  u32 number of block descriptors (0 or count)
//	20  u32 length of what follows the descriptors
//	24  descriptors of 40 bytes: fingerprint 32, sum u32, stored length u16,
//	    encoding u8, flags u8 (1: by reference, no data follows)
//	    then the state, or the source of a clone: volume u64, first block u64,
//	    epoch u64, seq u64; or the id of a snapshot: u64
//
// The data part is the stored blocks, one after the other. Part of the wire
// format, do not change.
const (
	opLen      = 24
	blockLen   = 40
	sourceLen  = 32
	takenLen   = 8
	flagRef    = 1
	opRelaxed  = 1
	maxBlocks  = 4096     // 16 MiB: twice the longest client request
	maxUnmap   = 1 << 28  // blocks of one unmap: 1 TiB
	maxState   = 64 << 10 // bytes of the ordered state with its name
	maxContent = maxBlocks
)

// AppendPrepare appends a Prepare frame with the whole operation. source, of an
// OpClone, is the epoch of the source volume in which it was sequenced and the
// newest operation of the source that had committed by then.
func AppendPrepare(dst []byte, op *lsfs.Op, source lsfs.OpID) []byte {
	at := len(dst)
	dst = Begin(dst)
	var m [opLen]byte
	m[0] = byte(op.Kind)
	if op.Relaxed {
		m[1] = opRelaxed
	}
	binary.LittleEndian.PutUint32(m[4:], op.Count)
	binary.LittleEndian.PutUint64(m[8:], uint64(op.Start))
	binary.LittleEndian.PutUint32(m[16:], uint32(len(op.Blocks)))
	tail := len(op.State)
	switch op.Kind {
	case lsfs.OpClone:
		tail = sourceLen
	case lsfs.OpSnapshot, lsfs.OpRollback:
		tail = takenLen
	}
	binary.LittleEndian.PutUint32(m[20:], uint32(tail))
	dst = append(dst, m[:]...)
	dst = appendBlocks(dst, op.Blocks)
	switch op.Kind {
	case lsfs.OpClone:
		dst = binary.LittleEndian.AppendUint64(dst, uint64(op.Source))
		dst = binary.LittleEndian.AppendUint64(dst, uint64(op.SourceStart))
		dst = appendOpID(dst, source)
	case lsfs.OpSnapshot, lsfs.OpRollback:
		dst = binary.LittleEndian.AppendUint64(dst, uint64(op.Snapshot))
	default:
		dst = append(dst, op.State...)
	}
	metaLen := len(dst) - at - HeaderLen
	dst = appendBlockData(dst, op.Blocks)
	return End(dst, at, Header{Type: Prepare, Volume: uint64(op.Volume), Epoch: uint64(op.ID.Epoch), Seq: uint64(op.ID.Seq)}, metaLen)
}

func appendBlocks(dst []byte, blocks []dedup.Block) []byte {
	for i := range blocks {
		b := &blocks[i]
		var d [blockLen]byte
		copy(d[:32], b.Fingerprint[:])
		binary.LittleEndian.PutUint32(d[32:], b.Sum)
		binary.LittleEndian.PutUint16(d[36:], uint16(len(b.Data)))
		d[38] = byte(b.Encoding)
		if b.Data == nil && b.Encoding != dedup.Zero {
			d[39] = flagRef
		}
		dst = append(dst, d[:]...)
	}
	return dst
}

func appendBlockData(dst []byte, blocks []dedup.Block) []byte {
	for i := range blocks {
		dst = append(dst, blocks[i].Data...)
	}
	return dst
}

// DecodePrepare fills op from a Prepare frame. Block data aliases data, the state
// aliases meta; op.Blocks is reused when it has room.
func DecodePrepare(h Header, meta, data []byte, op *lsfs.Op) (source lsfs.OpID, err error) {
	if len(meta) < opLen {
		return source, fmt.Errorf("%w: operation of %d bytes", ErrFrame, len(meta))
	}
	n := binary.LittleEndian.Uint32(meta[16:])
	tailLen := binary.LittleEndian.Uint32(meta[20:])
	op.Kind = lsfs.OpKind(meta[0])
	if meta[1] > opRelaxed || meta[1] != 0 && op.Kind != lsfs.OpWrite {
		return source, fmt.Errorf("%w: flags %d of an operation of kind %d", ErrFrame, meta[1], op.Kind)
	}
	op.Relaxed = meta[1] == opRelaxed
	op.Volume = lsfs.VolumeID(h.Volume)
	op.ID = lsfs.OpID{Epoch: lsfs.Epoch(h.Epoch), Seq: lsfs.Seq(h.Seq)}
	op.Count = binary.LittleEndian.Uint32(meta[4:])
	op.Start = lsfs.BlockNo(binary.LittleEndian.Uint64(meta[8:]))
	op.Blocks, op.State, op.Source, op.SourceStart, op.Snapshot = op.Blocks[:0], nil, 0, 0, 0
	switch op.Kind {
	case lsfs.OpWrite:
		if n != op.Count || n == 0 || n > maxBlocks || tailLen != 0 {
			return source, fmt.Errorf("%w: write of %d blocks with %d descriptors", ErrFrame, op.Count, n)
		}
	case lsfs.OpUnmap:
		if n != 0 || tailLen != 0 || op.Count == 0 || op.Count > maxUnmap {
			return source, fmt.Errorf("%w: unmap of %d blocks with %d descriptors", ErrFrame, op.Count, n)
		}
	case lsfs.OpEpoch:
		if n != 0 || tailLen != 0 || op.Count != 0 {
			return source, fmt.Errorf("%w: epoch with blocks", ErrFrame)
		}
	case lsfs.OpState:
		if n != 0 || op.Count != 0 || tailLen > maxState {
			return source, fmt.Errorf("%w: state of %d bytes", ErrFrame, tailLen)
		}
	case lsfs.OpClone:
		if n != 0 || tailLen != sourceLen || op.Count == 0 || op.Count > lsfs.ClonedBlocksMax {
			return source, fmt.Errorf("%w: clone of %d blocks with %d descriptors", ErrFrame, op.Count, n)
		}
	case lsfs.OpSnapshot, lsfs.OpRollback:
		if n != 0 || tailLen != takenLen || op.Count != 0 {
			return source, fmt.Errorf("%w: snapshot with %d descriptors", ErrFrame, n)
		}
	default:
		return source, fmt.Errorf("%w: operation kind %d", ErrFrame, op.Kind)
	}
	if op.Start > maxBlockNo {
		return source, fmt.Errorf("%w: first block %d", ErrFrame, op.Start)
	}
	if uint64(tailLen) > uint64(len(meta)-opLen) {
		return source, fmt.Errorf("%w: operation cut short", ErrFrame)
	}
	tail := meta[len(meta)-int(tailLen):]
	switch {
	case op.Kind == lsfs.OpClone:
		op.Source = lsfs.VolumeID(binary.LittleEndian.Uint64(tail))
		op.SourceStart = lsfs.BlockNo(binary.LittleEndian.Uint64(tail[8:]))
		source.Epoch = lsfs.Epoch(binary.LittleEndian.Uint64(tail[16:]))
		source.Seq = lsfs.Seq(binary.LittleEndian.Uint64(tail[24:]))
		if op.SourceStart > maxBlockNo {
			return source, fmt.Errorf("%w: first block %d of the source", ErrFrame, op.SourceStart)
		}
	case op.Kind == lsfs.OpSnapshot || op.Kind == lsfs.OpRollback:
		// Snapshot 0 is a mark: nothing but its place in the stream.
		if op.Snapshot = lsfs.VolumeID(binary.LittleEndian.Uint64(tail)); op.Snapshot == 0 && op.Kind == lsfs.OpRollback {
			return source, fmt.Errorf("%w: no snapshot", ErrFrame)
		}
	case tailLen > 0:
		op.State = tail
	}
	op.Blocks, err = decodeBlocks(op.Blocks, meta[opLen:len(meta)-int(tailLen)], data, int(n))
	return source, err
}

// maxBlockNo keeps sums of block numbers far from an overflow.
const maxBlockNo = 1 << 52

// decodeBlocks reads n descriptors from meta, which holds nothing else, and
// points them into data, which they use up exactly.
func decodeBlocks(dst []dedup.Block, meta, data []byte, n int) ([]dedup.Block, error) {
	if len(meta) != n*blockLen {
		return dst, fmt.Errorf("%w: %d bytes for %d block descriptors", ErrFrame, len(meta), n)
	}
	for ; n > 0; n-- {
		d := meta[:blockLen]
		meta = meta[blockLen:]
		var b dedup.Block
		copy(b.Fingerprint[:], d)
		b.Sum = binary.LittleEndian.Uint32(d[32:])
		b.Encoding = dedup.Encoding(d[38])
		size := int(binary.LittleEndian.Uint16(d[36:]))
		ref := d[39] == flagRef
		switch {
		case d[39] > flagRef || b.Encoding > dedup.S2:
			return dst, fmt.Errorf("%w: block encoding %d, flags %d", ErrFrame, d[38], d[39])
		case b.Encoding == dedup.Zero && (size != 0 || ref),
			ref && size != 0,
			!ref && b.Encoding == dedup.Raw && size != dedup.BlockSize,
			!ref && b.Encoding == dedup.S2 && (size == 0 || size >= dedup.BlockSize):
			return dst, fmt.Errorf("%w: stored length %d with encoding %d", ErrFrame, size, d[38])
		case size > len(data):
			return dst, fmt.Errorf("%w: block data cut short", ErrFrame)
		}
		if size > 0 {
			b.Data, data = data[:size:size], data[size:]
		}
		dst = append(dst, b)
	}
	if len(data) != 0 {
		return dst, fmt.Errorf("%w: %d bytes left over", ErrFrame, len(data))
	}
	return dst, nil
}

// AppendContent appends a Content frame: the blocks at the given indexes of the
// operation that the header's volume and seq name.
func AppendContent(dst []byte, h Header, index []uint32, blocks []dedup.Block) []byte {
	at := len(dst)
	dst = Begin(dst)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(index)))
	for _, i := range index {
		dst = binary.LittleEndian.AppendUint32(dst, i)
	}
	dst = appendBlocks(dst, blocks)
	metaLen := len(dst) - at - HeaderLen
	dst = appendBlockData(dst, blocks)
	h.Type = Content
	return End(dst, at, h, metaLen)
}

// DecodeContent is the inverse of AppendContent; block data aliases data.
func DecodeContent(meta, data []byte) (index []uint32, blocks []dedup.Block, err error) {
	index, rest, err := decodeIndex(meta)
	if err != nil {
		return nil, nil, err
	}
	blocks, err = decodeBlocks(nil, rest, data, len(index))
	return index, blocks, err
}

// AppendNeed appends a Need frame: the indexes of blocks whose content is missing.
func AppendNeed(dst []byte, h Header, index []uint32) []byte {
	at := len(dst)
	dst = Begin(dst)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(index)))
	for _, i := range index {
		dst = binary.LittleEndian.AppendUint32(dst, i)
	}
	h.Type = Need
	return End(dst, at, h, len(dst)-at-HeaderLen)
}

// DecodeNeed is the inverse of AppendNeed.
func DecodeNeed(meta []byte) ([]uint32, error) {
	index, rest, err := decodeIndex(meta)
	if err == nil && len(rest) != 0 {
		err = fmt.Errorf("%w: %d bytes left over", ErrFrame, len(rest))
	}
	return index, err
}

func decodeIndex(meta []byte) ([]uint32, []byte, error) {
	if len(meta) < 4 {
		return nil, nil, fmt.Errorf("%w: index of %d bytes", ErrFrame, len(meta))
	}
	n := binary.LittleEndian.Uint32(meta)
	meta = meta[4:]
	if n > maxContent || int(n)*4 > len(meta) {
		return nil, nil, fmt.Errorf("%w: %d indexes in %d bytes", ErrFrame, n, len(meta))
	}
	index := make([]uint32, n)
	for i := range index {
		index[i] = binary.LittleEndian.Uint32(meta[i*4:])
	}
	return index, meta[n*4:], nil
}
