package replication

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// TryRead serves a read from memory (see the device server's Volume). A write
// in flight on the range sends the caller to Submit: what is not committed is
// never shown (R2), so the filter is asked before and after the copy.
func (v *Volume) TryRead(off uint64, dst []byte) bool {
	if !v.active.Load() {
		return false
	}
	start, end := lsfs.BlockNo(off/blockSize), lsfs.BlockNo((off+uint64(len(dst))+blockSize-1)/blockSize)
	c := v.replica.Load()
	if mutant("R2") {
		return c != nil && c.TryRead(off, dst) && v.mayServe()
	}
	before := mutant("R1-before") && v.mayServe()
	if c == nil || !v.locks.clear(start, end) || !c.TryRead(off, dst) || !v.locks.clear(start, end) {
		return false
	}
	return before || v.mayServe()
}

// readSlow reads with I/O, under a shared lock: writes in flight on the range
// commit first, later ones wait (R2).
func (v *Volume) readSlow(r *Request, elsewhere func()) {
	h := &hold{start: lsfs.BlockNo(r.Off / blockSize), end: lsfs.BlockNo((r.Off + r.Len + blockSize - 1) / blockSize)}
	if v.sampleRead.Load() && v.sampleRead.CompareAndSwap(true, false) {
		began := v.node.now()
		defer func() { v.node.sampled(true, time.Duration(v.node.now()-began)) }()
	}
	if mutant("R2") {
		h.end = h.start
	}
	err := v.lockFor(h, r)
	before := mutant("R1-before") && v.mayServe()
	if err == nil {
		if r.Op == OpExtents {
			err = v.extents(h, r)
		} else {
			err = v.fetch(r.Off, r.Data)
		}
		v.unlockRange(h)
	}
	if err == nil && !before && !v.mayServe() {
		err = v.waitLease() // R1
	}
	if errors.Is(err, errElsewhere) {
		elsewhere()
	} else {
		v.fail(r, err)
	}
	v.node.flush()
}

// extents lists what is mapped in h's range, cut to r's ends.
func (v *Volume) extents(h *hold, r *Request) error {
	c := v.copy()
	if c == nil {
		return errElsewhere
	}
	runs, err := c.Extents(v.node.ctx, h.start, h.end, make([]lsfs.Extent, 0, cap(r.Extents)))
	if err != nil {
		return err
	}
	r.Extents = r.Extents[:0]
	off, end, at := r.Off, r.Off+r.Len, uint64(h.start)
	for _, x := range runs {
		at += x.Blocks
		n := min(at*blockSize, end) - off
		r.Extents = append(r.Extents, Extent{Bytes: n, Mapped: x.Mapped})
		off += n
	}
	return nil
}

// waitLease waits for a lease that ran out and may be renewed, at most Drop.
func (v *Volume) waitLease() error {
	t := time.NewTicker(v.node.timing.Beacon / 4)
	defer t.Stop()
	deadline := v.node.now().After(v.node.timing.Drop)
	for v.active.Load() {
		if v.mayServe() {
			return nil
		}
		if v.node.now() > deadline {
			return ErrUnavailable
		}
		select {
		case <-t.C:
		case <-v.node.ctx.Done():
			return ErrUnavailable
		}
	}
	return errElsewhere
}

// fetch reads from the local copy, and repairs a damaged block from another
// replica on the way.
func (v *Volume) fetch(off uint64, dst []byte) error {
	c := v.copy()
	if c == nil {
		return errElsewhere
	}
	for attempt := 0; ; attempt++ {
		err := c.Read(v.node.ctx, off, dst)
		var bad *lsfs.CorruptError
		if err == nil || !errors.As(err, &bad) || attempt == len(dst)/blockSize+2 {
			return err
		}
		if err := v.repair(c, bad); err != nil {
			v.log.Error("block cannot be repaired", "block", bad.Block, "err", err)
			if bad.BID == 0 { // not a block but what leads to some
				return ErrMedium
			}
			return &badBlock{bad.Block}
		}
	}
}

// repair fetches a block by its fingerprint from any other replica: equal
// fingerprints are equal content, so even a stale one is a safe donor.
func (v *Volume) repair(c chunkSource, bad *lsfs.CorruptError) error {
	v.mu.Lock()
	replicas := slices.Clone(v.g.rec.Replicas)
	v.mu.Unlock()
	err := errors.New("no other replica is in reach")
	for _, r := range replicas {
		if r.Node == v.node.self {
			continue
		}
		l := v.node.linkTo(r.Node)
		if l == nil {
			continue
		}
		var b dedup.Block
		if b, err = fetchFrom(l, wire.Header{Volume: uint64(v.id), Epoch: uint64(bad.Block) + 1}, bad.Fingerprint, v.node.ctx.Done()); err != nil {
			continue
		}
		if err = c.Repair(v.node.ctx, bad.Block, b); err == nil {
			v.node.cfg.Event(levelWarn, "block-repaired", fmt.Sprintf("volume %d: a damaged block (%v) was replaced by the intact copy of node %d", v.id, bad, r.Node))
			return nil
		}
	}
	return err
}

// linkTo is the link that this node dialled to another, or nil.
func (n *Node) linkTo(id NodeID) *link {
	if p := (*n.peers.Load())[id]; p != nil {
		return p.link.Load()
	}
	return nil
}
