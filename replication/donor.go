package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// Intact fetches a block by its fingerprint from any other node: equal fingerprints are
// equal content, so even a stale replica is a safe donor. places are some of those where
// the block stands, for nodes whose index has forgotten the fingerprint; there may be
// none. It is the donor of the store's scrub (lsfs.Donor).
func (n *Node) Intact(ctx context.Context, fp dedup.Fingerprint, places []lsfs.Place) (dedup.Block, error) {
	asks := []wire.Header{{}}
	for _, p := range places {
		asks = append(asks, wire.Header{Volume: uint64(p.Volume), Epoch: uint64(p.Start) + 1})
	}
	err := errors.New("no other node is in reach")
	for id := range *n.peers.Load() {
		l := n.linkTo(id)
		if l == nil {
			continue
		}
		for _, h := range asks {
			var b dedup.Block
			if b, err = fetchFrom(l, h, fp, ctx.Done()); err == nil {
				return b, nil
			}
		}
	}
	return dedup.Block{}, err
}

// fetchFrom asks one node for a block. h may name a place of it: a volume, and in Epoch
// the block's number plus one.
func fetchFrom(l *link, h wire.Header, fp dedup.Fingerprint, cancel <-chan struct{}) (dedup.Block, error) {
	rep, err := l.call(h, wire.Fetch, fp[:], nil, cancel)
	if err != nil {
		return dedup.Block{}, err
	}
	_, blocks, err := wire.DecodeContent(rep.meta, rep.data)
	if err != nil || len(blocks) != 1 {
		return dedup.Block{}, fmt.Errorf("node %d sent no block: %w", l.peer, err)
	}
	return blocks[0], nil
}

// intactAt reads a block where a replica here has it, if that is the one with the fingerprint.
func (n *Node) intactAt(volume lsfs.VolumeID, block lsfs.BlockNo, fp dedup.Fingerprint, buf []byte) (dedup.Block, error) {
	c := n.pool.Copy(volume)
	if c == nil {
		return dedup.Block{}, lsfs.ErrNotFound
	}
	var one [1]dedup.Block
	if err := c.ReadReduced(n.ctx, block, one[:], buf); err != nil {
		return dedup.Block{}, err
	}
	if one[0].Fingerprint != fp || one[0].Encoding == dedup.Zero {
		return dedup.Block{}, lsfs.ErrNotFound
	}
	return one[0], nil
}
