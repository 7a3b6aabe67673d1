package sim

import (
	"context"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

func (c *localCopy) ReadChosen(_ context.Context, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error {
	c.s.ioWait()
	return c.with(func(v *diskVolume) error {
		for k, i := range index {
			no := start + lsfs.BlockNo(i)
			dst[k] = dedup.Block{}
			if x := v.at[no]; x != nil {
				if x.rotten {
					return &lsfs.CorruptError{BID: x.id, Volume: c.id, Block: no, Fingerprint: x.fp, What: "block"}
				}
				dst[k] = x.block(buf[k*dedup.BlockSize : (k+1)*dedup.BlockSize])
			}
		}
		return nil
	})
}
