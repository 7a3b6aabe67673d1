package lsfs

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

const (
	// extentLeaves bounds the leaves of the map that one call of Extents walks: 4 GiB
	// of mapped blocks, some milliseconds when they are in RAM.
	extentLeaves = 2048
	// extentHold is how many of them are walked under one hold of the lock.
	extentHold = 16
)

// Extents lists what of [start, end) is mapped and what is holes: runs of blocks
// from start on, without gaps, neighbours of a kind merged. They replace dst's
// content, up to its capacity, and nothing is allocated. Empty parts of the map cost
// nothing. The list ends early when dst is full or much of the map was walked, but
// never without one run when start < end and dst has room; the caller goes on where
// it ends. It is of one instant only while no operation commits. ErrRange when the
// range is not inside of the volume or its annex.
func (v *Volume) Extents(ctx context.Context, start, end BlockNo, dst []Extent) ([]Extent, error) {
	s := v.s
	dst = dst[:0]
	if end < start {
		return dst, fmt.Errorf("extents of volume %d from %d to %d: %w", v.id, start, end, ErrRange)
	}
	at := uint64(start)
	for leaves := 0; ; {
		if err := s.failure(); err != nil {
			return dst, err
		}
		if err := ctx.Err(); err != nil {
			return dst, err
		}
		var missing uint32
		s.mu.RLock()
		if err := v.present(at, uint64(end)-at); err != nil {
			s.mu.RUnlock()
			return dst, fmt.Errorf("extents of volume %d from %d to %d: %w", v.id, start, end, err)
		}
		full := cap(dst) == 0
		for stop := leaves + extentHold; at < uint64(end) && leaves < stop && !full; {
			data, _, miss, span := s.pg.lookup(v.mapTree, wordShift, at)
			if missing = miss; missing != 0 {
				break
			}
			if data == nil {
				next := min(uint64(end), nextSpan(at, span))
				if dst, full = addExtent(dst, next-at, false); !full {
					at = next
				}
				continue
			}
			leaves++
			for next := min(uint64(end), nextSpan(at, wordShift)); at < next && !full; {
				mapped := format.Word(data, int(at)&(format.WordsPerPage-1)) != 0
				n := at + 1
				for n < next && (format.Word(data, int(n)&(format.WordsPerPage-1)) != 0) == mapped {
					n++
				}
				if dst, full = addExtent(dst, n-at, mapped); !full {
					at = n
				}
			}
		}
		s.mu.RUnlock()
		if full || at == uint64(end) || extentLeaves <= leaves {
			return dst, nil
		}
		if missing != 0 {
			if err := s.fault(missing, false); err != nil {
				return dst, err
			}
		}
	}
}

// addExtent adds a run, to the last one if that is of its kind. full: there was no room.
func addExtent(dst []Extent, blocks uint64, mapped bool) (_ []Extent, full bool) {
	if n := len(dst); n > 0 && dst[n-1].Mapped == mapped {
		dst[n-1].Blocks += blocks
		return dst, false
	}
	if len(dst) == cap(dst) {
		return dst, true
	}
	return append(dst, Extent{Blocks: blocks, Mapped: mapped}), false
}
