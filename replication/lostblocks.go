package replication

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// A block can be damaged on the only copy that is in sync, and stand nowhere else: it was
// written while the other replica was away. Reads of it are MEDIUM ERROR, and a resync
// cannot copy it. So the resync copies everything else, keeps the live stream open and
// waits (Y8): a host that overwrites the block makes it good, here and, by the stream, on
// the replica. Until then the replica is not in sync, since what it has there is old.

// lostAgain is how often a resync looks again at what it could not read. It gives its
// place in the queue to others meanwhile.
const lostAgain = 3 * time.Second

// lostTold bounds the blocks that the event names.
const lostTold = 32

// lostBlocks are the blocks that stop a resync, one of each chunk.
type lostBlocks struct {
	mu     sync.Mutex
	blocks map[uint32]lsfs.BlockNo // by chunk
}

// add notes the chunk if the error says that a block of it cannot be read.
func (l *lostBlocks) add(chunk uint32, err error) bool {
	var bad *badBlock
	if !errors.As(err, &bad) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blocks == nil {
		l.blocks = map[uint32]lsfs.BlockNo{}
	}
	l.blocks[chunk] = bad.block
	return true
}

// take returns and forgets what was noted.
func (l *lostBlocks) take() (chunks []uint32, blocks []lsfs.BlockNo) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.blocks {
		chunks = append(chunks, c)
	}
	slices.Sort(chunks)
	for _, c := range chunks {
		blocks = append(blocks, l.blocks[c])
	}
	l.blocks = nil
	return chunks, blocks
}

// readIntact reads the stored form of blocks of a chunk. A damaged one is repaired from
// another node; the first that none has is a *badBlock.
func (s *resync) readIntact(c chunkSource, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error {
	for attempt := 0; ; attempt++ {
		err := c.ReadChosen(s.ctx, start, index, dst, buf)
		var bad *lsfs.CorruptError
		if err == nil || !errors.As(err, &bad) || bad.BID == 0 || attempt == 2*len(dst) {
			return err
		}
		if err := s.v.repair(c, bad); err != nil {
			return fmt.Errorf("%w: %w", &badBlock{bad.Block}, err)
		}
	}
}

// awaitLost waits until every chunk with a block that could not be read has been copied.
func (s *resync) awaitLost(c Copy) error {
	v, q := s.v, &s.v.node.resyncs
	for {
		chunks, blocks := s.lost.take()
		if len(chunks) == 0 {
			return nil
		}
		s.total.Add(-int64(len(chunks))) // copyChunks counts them again
		v.tellLost(s.peer, blocks)
		if mutant("Y8") {
			return nil
		}
		s.turn.leave(q)
		if !pause(s.ctx, lostAgain) {
			return s.ctx.Err()
		}
		if err := q.enter(s.ctx, &s.turn); err != nil {
			return err
		}
		if err := s.copyChunks(c, chunks, true); err != nil {
			return err
		}
	}
}

// tellLost tells which blocks stop the resync of a replica.
func (v *Volume) tellLost(peer NodeID, blocks []lsfs.BlockNo) {
	names := make([]string, 0, lostTold)
	for _, b := range blocks[:min(len(blocks), lostTold)] {
		names = append(names, fmt.Sprint(uint64(b)))
	}
	v.tellBlocked(fmt.Sprintf("volume %d: node %d cannot come in sync: no copy can be read of blocks (of 4 KiB) in %d places: %s; hosts get MEDIUM ERROR there. Overwrite them, and it goes on by itself", v.id, peer, len(blocks), strings.Join(names, ", ")))
}

// tellBlocked tells once why a resync cannot end.
func (v *Volume) tellBlocked(text string) {
	v.mu.Lock()
	told := v.toldLost == text
	v.toldLost = text
	v.mu.Unlock()
	if !told {
		v.node.cfg.Event(levelError, "resync-blocked", text)
	}
}
