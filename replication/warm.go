package replication

import (
	"github.com/twinsan/twinsan/dedup"
)

// warmBlocks bounds the blocks of a write of which the cache gets the new content:
// longer ones are streams, which are seldom read back.
const warmBlocks = 16

// warm lets the store have the content of blocks that are overwritten while the cache
// holds their old content because somebody read it: they are likely to be read again.
// The plain bytes are here now and compressed ones later, so they are copied behind
// the stored ones, as long as the work's buffer, which has room for each block at its
// full length, has room for that.
func (v *Volume) warm(w *work, data []byte) {
	c := v.replica.Load()
	n := int(w.op.Count)
	if c == nil || n > warmBlocks {
		return
	}
	var wanted [warmBlocks]bool
	if !c.Wanted(w.op.Start, wanted[:n]) {
		return
	}
	free := w.buf[len(w.buf):cap(w.buf)]
	for i := range n {
		b := &w.op.Blocks[i]
		switch {
		case !wanted[i] || b.Data == nil:
			w.op.Plain = append(w.op.Plain, nil)
		case b.Encoding == dedup.Raw:
			w.op.Plain = append(w.op.Plain, b.Data)
		case len(free) >= blockSize:
			plain := free[:blockSize:blockSize]
			copy(plain, data[i*blockSize:])
			w.op.Plain = append(w.op.Plain, plain)
			free = free[blockSize:]
		default:
			w.op.Plain = append(w.op.Plain, nil)
		}
	}
}
