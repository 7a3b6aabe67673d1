package lsfs

// The annex of a volume is AnnexBlocks of addresses behind every volume's end, in
// the same map. Clones fill it, reads, unmaps and the copies of a resync reach it;
// writes do not, and neither Resize nor the trim of a tail touches it. It counts its
// mapped blocks apart, and goes with the volume.

const annexEnd = uint64(AnnexStart) + AnnexBlocks

// holds says whether count blocks from start lie in the volume or in its annex,
// not partly in both.
func (v *Volume) holds(start, count uint64) bool {
	if n := v.size.Load(); start <= n && count <= n-start {
		return true
	}
	return !v.bare && uint64(AnnexStart) <= start && start <= annexEnd && count <= annexEnd-start
}

// present is the reason why blocks cannot be read, nil if they can. The caller has Store.mu.
func (v *Volume) present(start, count uint64) error {
	switch {
	case v.deleting || v.stale:
		return ErrNoVolume
	case !v.holds(start, count):
		return ErrRange
	}
	return nil
}

// InRange says whether count blocks from start lie inside of the volume, or inside
// of its annex. It is free.
func (v *Volume) InRange(start BlockNo, count uint64) bool { return v.holds(uint64(start), count) }

// AnnexMapped is the number of blocks of the annex that are not holes.
func (v *Volume) AnnexMapped() uint64 {
	v.s.mu.RLock()
	defer v.s.mu.RUnlock()
	return v.annex
}

// counter is the counter of mapped blocks that block i belongs to.
func (v *Volume) counter(i uint64) *uint64 {
	if uint64(AnnexStart) <= i {
		return &v.annex
	}
	return &v.mapped
}
