package replication

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// chunkRoom is the owner's room for one chunk on its way to a replica.
//
//	survey   what the replica lacks, by fingerprint, and its contents: no range is held
//	[lock]   writes in flight have committed, new ones wait
//	send     if the chunk is still what was surveyed; else it is surveyed again first
//	[unlock]
//
// So initiators wait for one round trip and one commit of the replica and for no reading.
// Rooms are reused, but for those of calls that failed: the link may still write from
// them. BOUNDED by takeOff.
type chunkRoom struct {
	fps    [wire.ChunkBlocks]dedup.Fingerprint // when it was surveyed
	again  [wire.ChunkBlocks]dedup.Fingerprint // with the range locked
	blocks [wire.ChunkBlocks]dedup.Block       // contents that the replica lacks, in buf
	head   []byte                              // frame up to its data part
	buf    []byte                              // of a chunk; as large an allocation is aligned, so that devices read into it
	fill   int                                 // bytes of buf, from its beginning, that are contents
}

// Between resyncs the garbage collector has the rooms back.
var chunkRooms = sync.Pool{New: func() any { return &chunkRoom{buf: make([]byte, wire.ChunkBlocks*blockSize)} }}

// chunkJob is the copying of one chunk.
type chunkJob struct {
	s          *resync
	source     chunkSource
	snapshot   uint64 // that is being forged; 0: the copy itself
	start, end lsfs.BlockNo
	room       *chunkRoom
	sc         wire.SyncChunk
}

// copyChunk makes one chunk of the replica's copy that of ours (Y4).
func (s *resync) copyChunk(c Copy, chunk uint32, locked bool) error {
	v := s.v
	start, end := chunkRange(chunk, c.Blocks())
	if locked {
		if err := v.node.yield(s.ctx); err != nil {
			return err
		}
		if err := s.takeOff(); err != nil {
			return err
		}
		defer s.flying.Add(-1)
	}
	return s.carry(&chunkJob{s: s, source: c, start: start, end: end, sc: wire.SyncChunk{Chunk: chunk}}, locked)
}

// copySnapshotChunk makes one chunk of the snapshot that the replica is forging that of x.
func (s *resync) copySnapshotChunk(x SnapshotCopy, chunk uint32) error {
	start, end := chunkRange(chunk, x.Blocks())
	return s.carry(&chunkJob{s: s, source: x, snapshot: uint64(x.ID()), start: start, end: end, sc: wire.SyncChunk{Chunk: chunk}}, false)
}

// carry surveys a chunk and sends it. locked: of a copy that takes writes.
func (s *resync) carry(j *chunkJob, locked bool) error {
	j.room = chunkRooms.Get().(*chunkRoom)
	s.v.node.throttle.charge(chunkCost)
	if err := j.survey(j.room.fps[:j.end-j.start]); err != nil {
		return err
	}
	select {
	case s.sending <- struct{}{}:
		defer func() { <-s.sending }()
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	if locked && !mutant("Y4") {
		h := &hold{start: j.start, end: j.end}
		if err := s.v.lockRange(h); err != nil {
			return err
		}
		defer s.v.unlockRange(h)
	}
	if locked {
		now := j.room.again[:j.end-j.start]
		if err := j.source.Fingerprints(s.ctx, j.start, now); err != nil {
			return err
		}
		if !slices.Equal(now, j.sc.Fingerprints) || !j.current() {
			if err := j.survey(now); err != nil {
				return err
			}
		}
	}
	if err := j.send(); err != nil {
		return err
	}
	chunkRooms.Put(j.room)
	return nil
}

// survey asks what the replica lacks of the chunk as it is now, and reads that.
func (j *chunkJob) survey(fps []dedup.Fingerprint) error {
	s := j.s
	if err := j.source.Fingerprints(s.ctx, j.start, fps); err != nil {
		return err
	}
	j.sc.Fingerprints, j.sc.Index, j.sc.Blocks = fps, nil, nil
	rep, err := s.call(j.method(wire.SyncCompare, wire.SnapCompare), j.meta()[wire.HeaderLen:], nil)
	if err != nil {
		return err
	}
	if j.sc.Index, err = wire.DecodeNeed(rep.meta); err != nil {
		return err
	}
	return j.read()
}

// read reads the contents that the index names, all of them at once.
func (j *chunkJob) read() error {
	r, index := j.room, j.sc.Index
	if len(index) > len(j.sc.Fingerprints) {
		return fmt.Errorf("%w: %d blocks are asked for in a chunk of %d", wire.ErrFrame, len(index), len(j.sc.Fingerprints))
	}
	blocks := r.blocks[:len(index)]
	r.fill = 0
	for k, i := range index {
		if int(i) >= len(j.sc.Fingerprints) || k > 0 && i <= index[k-1] {
			return fmt.Errorf("%w: index %d", wire.ErrFrame, i)
		}
	}
	if err := j.s.readIntact(j.source, j.start, index, blocks, r.buf); err != nil {
		return err
	}
	for k := range blocks { // one after another; each moves towards the beginning, or not at all
		b := &blocks[k]
		n := copy(r.buf[r.fill:], b.Data)
		if n > 0 {
			b.Data = r.buf[r.fill : r.fill+n : r.fill+n]
		}
		r.fill += n
	}
	j.sc.Blocks = blocks
	return nil
}

// send sends what was surveyed, and checks the digest of what the replica has then (Y5).
func (j *chunkJob) send() error {
	rep, err := j.apply()
	if errors.Is(err, errAgain) {
		j.sc.Index = j.sc.Index[:0]
		for i := range j.sc.Fingerprints {
			if j.sc.Fingerprints[i] != (dedup.Fingerprint{}) {
				j.sc.Index = append(j.sc.Index, uint32(i))
			}
		}
		if err := j.read(); err != nil {
			return err
		}
		rep, err = j.apply()
	}
	if err != nil {
		return err
	}
	if want := chunkDigest(j.sc.Fingerprints); string(rep.meta) != string(want[:]) && !mutant("Y5") {
		return fmt.Errorf("chunk %d differs after it was copied to node %d", j.sc.Chunk, j.s.peer)
	}
	return nil
}

func (j *chunkJob) apply() (reply, error) {
	s, n := j.s, j.room.fill
	if !j.current() {
		return reply{}, fmt.Errorf("chunk %d changed while it was copied", j.sc.Chunk)
	}
	var version [1]lsfs.Seq
	if err := j.source.ChunkVersions(s.ctx, j.sc.Chunk, version[:]); err != nil {
		return reply{}, err
	}
	j.sc.Version = version[0]
	s.sent.Add(int64(n))
	s.v.node.throttle.total.Add(int64(n))
	s.v.node.throttle.charge(n)
	h := wire.Header{Volume: uint64(s.v.id), Epoch: uint64(s.epoch)}
	return s.link.callBulk(h, j.method(wire.SyncApply, wire.SnapApply), j.meta(), j.room.buf[:n], s.ctx.Done())
}

// current says whether the contents that were read are those of the fingerprints that
// were surveyed: a write may have come in between.
func (j *chunkJob) current() bool {
	for k, i := range j.sc.Index {
		if j.sc.Blocks[k].Fingerprint != j.sc.Fingerprints[i] {
			return false
		}
	}
	return true
}

func (j *chunkJob) method(copied, forged wire.Method) wire.Method {
	if j.snapshot != 0 {
		return forged
	}
	return copied
}

// meta is the meta part of both calls, with room for a header before it.
func (j *chunkJob) meta() []byte {
	m := wire.Begin(j.room.head[:0])
	if j.snapshot != 0 {
		m = binary.LittleEndian.AppendUint64(m, j.snapshot)
	}
	j.room.head = wire.AppendSyncChunk(m, &j.sc)
	return j.room.head
}

// chunkDigest is the digest of a chunk's content: SHA-256 over its fingerprints.
func chunkDigest(fps []dedup.Fingerprint) [32]byte {
	h := sha256.New()
	for i := range fps {
		h.Write(fps[i][:])
	}
	var d [32]byte
	h.Sum(d[:0])
	return d
}
