package lsfs

import (
	"context"
	"fmt"
	"slices"

	"github.com/twinsan/twinsan/dedup"
)

// ReadChosen is ReadReduced for some of the blocks from start on: those whose distances
// from it are in index, ascending, and the last of them no more than 1 MiB behind the
// first. The devices get all reads at once. Data of dst[k] lies in buf from 4096*k on.
func (v *Volume) ReadChosen(ctx context.Context, start BlockNo, index []uint32, dst []dedup.Block, buf []byte) error {
	s, n := v.s, len(index)
	if n == 0 {
		return nil
	}
	for k := range n - 1 {
		if index[k] >= index[k+1] {
			return fmt.Errorf("read of block %d after block %d: %w", index[k+1], index[k], ErrRange)
		}
	}
	if index[n-1]-index[0] >= readBlocks || len(dst) != n || len(buf) < n*dedup.BlockSize {
		return fmt.Errorf("read of %d blocks between %d and %d: %w", n, index[0], index[n-1], ErrRange)
	}
	rc, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer s.giveBack(rc)
	first := uint64(start) + uint64(index[0])
	if index[n-1]-index[0] == uint32(n-1) {
		// Neighbours that are stored whole are read to where they are wanted.
		rc.to = makeTarget(first*dedup.BlockSize, buf[:n*dedup.BlockSize])
		defer func() { rc.to = target{} }()
	}
	k := 0
	err = v.resolve(ctx, rc, first, int(index[n-1]-index[0])+1, func(i int, bid BID) (skip bool) {
		if i == 0 {
			k = 0 // it may begin anew
		}
		if index[k]-index[0] != uint32(i) {
			return true
		}
		if bid == 0 {
			dst[k] = dedup.Block{}
		}
		k++
		return false
	})
	if err != nil {
		return err
	}
	return s.fetchAll(rc, v, first, func(l *located, stored []byte) error {
		k, _ := slices.BinarySearch(index, index[0]+uint32(l.index))
		if l.direct {
			dst[k] = dedup.Block{Fingerprint: l.e.Fingerprint, Sum: l.e.Sum, Encoding: l.e.Encoding, Data: stored[:len(stored):len(stored)]}
			return nil
		}
		dst[k], err = rc.portable(l, stored, buf[k*dedup.BlockSize:])
		return err
	})
}

// ReadChosen is that of Volume, as of the snapshot.
func (n *Snapshot) ReadChosen(ctx context.Context, start BlockNo, index []uint32, dst []dedup.Block, buf []byte) error {
	return n.content.ReadChosen(ctx, start, index, dst, buf)
}
