package lsfs

import (
	"fmt"
	"unsafe"

	"github.com/twinsan/twinsan/lsfs/format"
)

// RAM for metadata is one budget (Config.MetadataRAM) for four things:
//
//	segment table    56 bytes a segment
//	page directory   32 bytes a page of metadata: 150 MiB for a TiB of unique blocks
//	index            a quarter: fingerprints of blocks that may come again
//	frames           the rest: pages of maps and identities
//
// The first two are what they are. Too little of the third costs savings, too little of
// the fourth reads and writes of pages; see docs/space.md for how much.

const (
	// metadataRAMMin is the least budget that is taken at all.
	metadataRAMMin = 16 << 20
	framesMin      = 8 << 20
	indexMin       = 64 << 10
	// A byte of blocks that are full needs 1/220 of a page: one of 64 identities, an
	// eighth more for what is dead, and one of 512 places in a map.
	blocksPerPage = 55
)

const (
	directoryEntry = int64(unsafe.Sizeof(page{}) + unsafe.Sizeof(format.DirEntry{}))
	segmentEntry   = int64(unsafe.Sizeof(segment{}))
)

// share divides the budget between index and frames where they are not set.
func (c *Config) share() error {
	ram := c.MetadataRAM
	if ram == 0 {
		return nil
	}
	if ram < metadataRAMMin {
		return fmt.Errorf("config: MetadataRAM is %d bytes, at least %d", ram, metadataRAMMin)
	}
	if set := c.MetadataBytes + c.IndexBytes; ram < set || ram < set+framesMin+indexMin && c.MetadataBytes*c.IndexBytes == 0 {
		return fmt.Errorf("config: MetadataRAM is %d bytes, of which MetadataBytes and IndexBytes take %d: too little is left", ram, set)
	}
	if c.MetadataBytes > 0 && c.IndexBytes > 0 {
		return nil
	}
	c.divided = c.MetadataBytes == 0
	if c.IndexBytes == 0 {
		c.IndexBytes = ram / 4
		if !c.divided {
			c.IndexBytes = ram - c.MetadataBytes
		}
	}
	if c.divided {
		c.MetadataBytes = ram - c.IndexBytes
	}
	return nil
}

// reserve takes what a full pool of size bytes needs beside frames off them, as far as a
// quarter of the budget goes.
func (c *Config) reserve(size int64, segments uint32) int64 {
	if !c.divided {
		return 0
	}
	n := min(size/format.PageSize/blocksPerPage*directoryEntry+int64(segments)*segmentEntry, c.MetadataRAM/4)
	n = min(n, c.MetadataBytes-framesMin)
	c.MetadataBytes -= n
	return n
}

// fixedBytes is the RAM of segment table and page directory.
func (s *Store) fixedBytes() int64 {
	return int64(len(s.pg.pages))*pagesPerPart*directoryEntry + int64(s.segs.count())*segmentEntry
}

// keepBudget makes the frames fewer when the pool that was opened needs more beside
// them than what was set aside, down to the least with which a store works: a pool that has
// outgrown its budget is served, slower, and says so.
func (s *Store) keepBudget(reserved int64) {
	over := s.fixedBytes() - reserved
	if !s.cfg.divided || over <= 0 {
		return
	}
	frames := s.cfg.MetadataBytes - over
	if frames < framesMin {
		s.outgrown = fmt.Errorf("the page directory and the index take %d MiB of the %d MiB for metadata: give it %d MiB, and for full speed 1 GiB for each TiB of unique data",
			(s.fixedBytes()+s.cfg.IndexBytes)>>20, s.cfg.MetadataRAM>>20, (s.fixedBytes()*2+s.cfg.IndexBytes)>>20)
		frames = framesMin
	}
	s.cfg.MetadataBytes = frames
	s.pg.max = max(int(frames/format.PageSize), slabFrames)
	s.bounds()
}

// bounds says how many pages may be dirty.
func (s *Store) bounds() {
	s.dirtySoft, s.dirtyHard = int64(s.pg.max)/4, int64(s.pg.max)*5/8
}
