package replication

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// snapshotsSince is the first wire version that knows snapshots.
const snapshotsSince = 3

// snapshots makes the snapshots of the replica those of the owner, when its content
// is: what only the replica has is dropped, what it lacks is forged, the oldest first,
// each from the nearest one that both have or else from the volume itself. Only the
// chunks that changed between the two are compared, and only what the replica's pool
// lacks is sent. What both have is not looked at: it was applied from the same stream
// or compared when it was forged. What was forged before an interruption stays.
//
// With live the stream goes on meanwhile: from SyncWhole on the replica takes the
// snapshots of the stream itself.
func (s *resync) snapshots(c Copy, live bool) error {
	v, n := s.v, s.v.node
	if p := (*n.peers.Load())[s.peer]; p == nil || p.version.Load() < snapshotsSince || mutant("S-forge") {
		return nil
	}
	limit := lsfs.OpID{Epoch: ^lsfs.Epoch(0)}
	if live {
		upTo, err := s.takeStream()
		if err != nil {
			return err
		}
		limit = lsfs.OpID{Epoch: s.epoch, Seq: upTo}
	}
	// within: by the copy or the earlier part of the stream, not by what follows.
	within := func(p lsfs.OpID) bool { return p.Epoch < limit.Epoch || p.Epoch == limit.Epoch && p.Seq <= limit.Seq }
	ours := slices.DeleteFunc(n.pool.Snapshots(v.id), func(x SnapshotCopy) bool { return !within(x.Point()) })
	have, err := s.dropStrangers(ours, within)
	if err != nil {
		return err
	}
	missing := 0
	for i, x := range ours {
		if have[x.ID()] {
			continue
		}
		missing++
		err := s.forge(c, ours, i, have, live)
		if errors.Is(err, lsfs.ErrNoVolume) && n.pool.Snapshot(x.ID()) == nil {
			_, _ = s.call(wire.SnapDrop, nil, binary.LittleEndian.AppendUint64(nil, uint64(x.ID()))) // deleted meanwhile; the next start of the replica drops it as well
			continue
		}
		if err != nil {
			return fmt.Errorf("snapshot %d: %w", x.ID(), err)
		}
		have[x.ID()] = true
	}
	if missing > 0 {
		v.log.Info("snapshots brought to the replica", "peer", s.peer, "count", missing)
	}
	return nil
}

// takeStream tells the replica that its content is whole, and waits until it and our own
// copy have everything that was sequenced before. It returns the last number of that.
func (s *resync) takeStream() (lsfs.Seq, error) {
	v := s.v
	v.mu.Lock()
	f := v.follower(s.peer)
	if v.g.role != Active || f == nil || f.link != s.link {
		v.mu.Unlock()
		return 0, errors.New("the stream to the replica broke")
	}
	upTo := v.next - 1
	// Under the mutex: the call stands in the stream before the next operation.
	c := s.link.begin(wire.Header{Volume: uint64(v.id), Epoch: uint64(s.epoch)}, wire.SyncWhole, nil, nil)
	v.mu.Unlock()
	s.link.flush()
	if _, err := s.link.wait(c, s.ctx.Done()); err != nil {
		return 0, err
	}
	for {
		v.mu.Lock()
		f := v.follower(s.peer)
		here, there := v.local >= upTo, f != nil && f.link == s.link && f.acked >= upTo
		gone := f == nil || f.link != s.link
		v.mu.Unlock()
		if gone {
			return 0, errors.New("the stream to the replica broke")
		}
		if here && there {
			return upTo, nil
		}
		v.node.Kick()
		if !pause(s.ctx, time.Millisecond) {
			return 0, s.ctx.Err()
		}
	}
}

// dropStrangers has the replica drop the snapshots that the owner does not have, and
// says which of ours it has.
func (s *resync) dropStrangers(ours []SnapshotCopy, within func(lsfs.OpID) bool) (map[VolumeID]bool, error) {
	rep, err := s.call(wire.SnapList, nil, nil)
	if err != nil {
		return nil, err
	}
	theirs, err := wire.DecodeSnapshots(rep.data)
	if err != nil {
		return nil, err
	}
	points := make(map[VolumeID]lsfs.OpID, len(ours))
	for _, x := range ours {
		points[x.ID()] = x.Point()
	}
	have := map[VolumeID]bool{}
	var drop []byte
	for _, t := range theirs {
		point, known := points[VolumeID(t.ID)]
		switch {
		case known && point == t.Point:
			have[VolumeID(t.ID)] = true
		case known || within(t.Point):
			drop = binary.LittleEndian.AppendUint64(drop, t.ID)
		}
	}
	if len(drop) > 0 && !mutant("S-strangers") {
		if _, err := s.call(wire.SnapDrop, nil, drop); err != nil {
			return nil, err
		}
		s.v.log.Info("snapshots of another history dropped", "peer", s.peer, "count", len(drop)/8)
	}
	return have, nil
}

// forge makes snapshot i of ours at the replica.
func (s *resync) forge(c Copy, ours []SnapshotCopy, i int, have map[VolumeID]bool, live bool) error {
	x := ours[i]
	base, chunks, err := s.forgeBase(ours, i, have)
	if err == nil && base != s.v.id {
		if err = s.begin(x, base); err == nil {
			return s.fill(x, chunks)
		}
		if !errors.Is(err, errAbsent) { // the replica has just deleted it: no record names it any more
			return err
		}
	}
	if err != nil && !errors.Is(err, errAbsent) {
		return err
	}
	if err := s.begin(x, s.v.id); err != nil {
		return err
	}
	if live {
		// What the base has from the stream is in our own copy before we look at it.
		if err := s.stored(); err != nil {
			return err
		}
	}
	if mutant("S-later") {
		return s.fill(x, nil)
	}
	if chunks, err = c.ChangedChunks(s.ctx, x.Point().Seq); err != nil {
		return err
	}
	return s.fill(x, chunks)
}

// forgeBase picks the snapshot from which x is forged, and lists the chunks in which
// the two may differ: those with a version above the older one's point in the
// younger. It is the volume itself when the replica has no other.
func (s *resync) forgeBase(ours []SnapshotCopy, i int, have map[VolumeID]bool) (VolumeID, []uint32, error) {
	x := ours[i]
	for j := i - 1; j >= 0; j-- {
		if have[ours[j].ID()] {
			chunks, err := x.ChangedChunks(s.ctx, ours[j].Point().Seq)
			return ours[j].ID(), chunks, err
		}
	}
	for _, y := range ours[i+1:] {
		if have[y.ID()] {
			chunks, err := y.ChangedChunks(s.ctx, x.Point().Seq)
			if errors.Is(err, lsfs.ErrNoVolume) {
				continue // deleted meanwhile
			}
			return y.ID(), chunks, err
		}
	}
	return s.v.id, nil, nil
}

func (s *resync) begin(x SnapshotCopy, base VolumeID) error {
	_, err := s.call(wire.SnapForge, wire.AppendForge(nil, &wire.ForgeBody{ID: uint64(x.ID()), Base: uint64(base), Blocks: x.Blocks()}), nil)
	return err
}

// fill makes the chunks of a snapshot that is being forged those of ours, and seals it.
func (s *resync) fill(x SnapshotCopy, chunks []uint32) error {
	chunks = union(chunks, nil, x.Blocks())
	chunks = slices.DeleteFunc(chunks, func(c uint32) bool { return uint64(c)*wire.ChunkBlocks >= uint64(lsfs.AnnexStart) })
	s.total.Add(int64(len(chunks)))
	g, ctx := errgroup.WithContext(s.ctx)
	g.SetLimit(parallelChunks)
	for _, chunk := range chunks {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if s.turn.start != nil { // else nobody is served until this has ended (M3)
				if err := s.v.node.yield(s.ctx); err != nil {
					return err
				}
			}
			err := s.copySnapshotChunk(x, chunk)
			if err == nil {
				s.done.Add(1)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		var bad *badBlock
		if errors.As(err, &bad) {
			return fmt.Errorf("block %d of snapshot %d cannot be read on any node, delete the snapshot: %w", bad.block, x.ID(), err)
		}
		return err
	}
	_, err := s.call(wire.SnapSeal, wire.AppendSeal(nil, uint64(x.ID()), x.Point()), nil)
	return err
}

// chunkSource is what the contents of a chunk are read from: a copy or a snapshot.
type chunkSource interface {
	Fingerprints(ctx context.Context, start lsfs.BlockNo, dst []dedup.Fingerprint) error
	ReadChosen(ctx context.Context, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error
	ChunkVersions(ctx context.Context, first uint32, dst []lsfs.Seq) error
	Repair(ctx context.Context, block lsfs.BlockNo, intact dedup.Block) error
}

// ---------------------------------------------------------------- the replica

// takeWhole notes that what follows in the stream finds the whole content.
func (v *Volume) takeWhole(l *link, h wire.Header) {
	v.mu.Lock()
	refuse := lsfs.Epoch(h.Epoch) < v.g.promised || v.replica.Load() == nil || v.gone != nil || v.ackTo != l
	if !refuse {
		v.hollow = false
	}
	v.mu.Unlock()
	if refuse {
		l.replyError(h, errStale)
		return
	}
	l.reply(h, wire.StatusOK, nil, nil)
}

// serveSnapshots answers the calls about the snapshots of a volume.
func (v *Volume) serveSnapshots(ctx context.Context, method wire.Method, meta, data []byte) (out, list []byte, err error) {
	pool := v.node.pool
	switch method {
	case wire.SnapList:
		return nil, v.snapshotList(), nil
	case wire.SnapDrop:
		if len(data)%8 != 0 {
			return nil, nil, wire.ErrFrame
		}
		for ; len(data) > 0; data = data[8:] {
			if err := v.dropSnapshot(ctx, VolumeID(binary.LittleEndian.Uint64(data))); err != nil {
				return nil, nil, err
			}
		}
		return nil, nil, nil
	case wire.SnapForge:
		b, err := wire.DecodeForge(meta)
		if err != nil {
			return nil, nil, err
		}
		return nil, nil, v.beginForge(ctx, b)
	case wire.SnapSeal:
		id, point, err := wire.DecodeSeal(meta)
		if err != nil {
			return nil, nil, err
		}
		if _, err := v.forged(VolumeID(id)); err != nil {
			return nil, nil, err
		}
		return nil, nil, pool.SealSnapshot(ctx, VolumeID(id), point)
	}
	if len(meta) < 8 {
		return nil, nil, wire.ErrFrame
	}
	id, meta := VolumeID(binary.LittleEndian.Uint64(meta)), meta[8:]
	if method == wire.SnapDigests {
		out, err = v.snapshotDigests(ctx, id, meta)
		return out, nil, err
	}
	x, err := v.forged(id)
	if err != nil {
		return nil, nil, err
	}
	if method == wire.SnapCompare {
		out, err = v.compareChunk(ctx, x, x.Blocks(), meta)
	} else {
		out, err = v.applyChunk(ctx, x, x.Blocks(), id, true, meta, data)
	}
	return out, nil, err
}

// snapshotList is the snapshots of the volume as they are sent.
func (v *Volume) snapshotList() (list []byte) {
	for _, x := range v.node.pool.Snapshots(v.id) {
		list = wire.AppendSnapshot(list, &wire.SnapshotBody{ID: uint64(x.ID()), Point: x.Point(), Blocks: x.Blocks()})
	}
	return list
}

// forged finds a snapshot of this volume that is being forged.
func (v *Volume) forged(id VolumeID) (SnapshotCopy, error) {
	x := v.node.pool.Forged(id)
	if x == nil || x.Volume() != v.id {
		return nil, errAbsent
	}
	return x, nil
}

// beginForge begins a snapshot anew: what an earlier attempt left of it goes.
func (v *Volume) beginForge(ctx context.Context, b wire.ForgeBody) error {
	id, base, pool := VolumeID(b.ID), VolumeID(b.Base), v.node.pool
	if base != 0 && base != v.id {
		if x := pool.Snapshot(base); x == nil || x.Volume() != v.id {
			return errAbsent
		}
	}
	if x := pool.Forged(id); x != nil && x.Volume() == v.id {
		if err := pool.AbandonSnapshot(ctx, id); err != nil && !errors.Is(err, lsfs.ErrNoVolume) {
			return err
		}
	}
	return pool.ForgeSnapshot(ctx, id, v.id, base, b.Blocks)
}

// dropSnapshot deletes a snapshot of this volume, sealed or being forged.
func (v *Volume) dropSnapshot(ctx context.Context, id VolumeID) error {
	pool := v.node.pool
	var err error
	if x := pool.Snapshot(id); x != nil && x.Volume() == v.id {
		err = pool.DeleteSnapshot(ctx, id)
	} else if x := pool.Forged(id); x != nil && x.Volume() == v.id {
		err = pool.AbandonSnapshot(ctx, id)
	}
	if errors.Is(err, lsfs.ErrNoVolume) {
		return nil // somebody else was faster
	}
	return err
}

// dropSnapshots deletes all snapshots of this volume here: they belong to a copy that
// means nothing any more.
func (v *Volume) dropSnapshots(ctx context.Context) error {
	for _, x := range v.node.pool.Snapshots(v.id) {
		if err := v.dropSnapshot(ctx, x.ID()); err != nil {
			return err
		}
	}
	return nil
}

// ---------------------------------------------------------------- the check

// snapshotDigests are the digests of a run of chunks of a snapshot.
func (v *Volume) snapshotDigests(ctx context.Context, id VolumeID, meta []byte) ([]byte, error) {
	if len(meta) != 8 {
		return nil, wire.ErrFrame
	}
	first, count := binary.LittleEndian.Uint32(meta), binary.LittleEndian.Uint32(meta[4:])
	if count > checkChunks {
		return nil, errors.New("too many chunks at a time")
	}
	x := v.node.pool.Snapshot(id)
	if x == nil || x.Volume() != v.id {
		return nil, errAbsent
	}
	return digestsOf(ctx, x, x.Blocks(), first, count)
}

// checkSnapshots compares the snapshots of the other in-sync replicas with ours: that
// the same ones are there, and of each the chunks that changed since the one before
// it; so all chunks of all of them are compared once. Those that are deleted
// meanwhile are passed over.
func (v *Volume) checkSnapshots(ctx context.Context, epoch lsfs.Epoch, res *CheckResult) error {
	ours := v.node.pool.Snapshots(v.id)
	for i := range res.Replicas {
		r := &res.Replicas[i]
		if r.Err == nil {
			if err := v.checkSnapshotList(ctx, epoch, r); err != nil {
				return err
			}
		}
	}
	since := lsfs.Seq(0)
	for _, x := range ours {
		chunks, err := x.ChangedChunks(ctx, since)
		if errors.Is(err, lsfs.ErrNoVolume) {
			continue
		}
		if err != nil {
			return err
		}
		chunks = union(chunks, nil, x.Blocks())
		for len(chunks) > 0 {
			run := 1
			for run < len(chunks) && run < checkChunks && chunks[run] == chunks[0]+uint32(run) {
				run++
			}
			own, err := digestsOf(ctx, x, x.Blocks(), chunks[0], uint32(run))
			if errors.Is(err, lsfs.ErrNoVolume) {
				break
			}
			if err != nil {
				return err
			}
			v.compareDigests(ctx, epoch, res, x, chunks[0], uint32(run), own)
			chunks = chunks[run:]
		}
		since = x.Point().Seq
	}
	return ctx.Err()
}

// compareDigests holds one run of chunks of a snapshot against the replicas'.
func (v *Volume) compareDigests(ctx context.Context, epoch lsfs.Epoch, res *CheckResult, x SnapshotCopy, first, count uint32, own []byte) {
	meta := binary.LittleEndian.AppendUint64(nil, uint64(x.ID()))
	meta = binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(meta, first), count)
	for i := range res.Replicas {
		r := &res.Replicas[i]
		if r.Err != nil || slices.Contains(r.Snapshots, x.ID()) {
			continue
		}
		rep, err := v.ask(ctx, r.Node, epoch, wire.SnapDigests, meta)
		switch {
		case errors.Is(err, errAbsent) && v.node.pool.Snapshot(x.ID()) == nil:
		case errors.Is(err, errAbsent):
			r.Equal, r.Snapshots = false, append(r.Snapshots, x.ID())
		case err != nil:
			r.Equal, r.Err = false, err
		case !bytes.Equal(rep.meta, own):
			r.Equal, r.Snapshots = false, append(r.Snapshots, x.ID())
		}
	}
}

// checkSnapshotList compares which snapshots a replica has. One that is being deleted
// goes from one node a moment earlier than from another, so a difference has to last.
func (v *Volume) checkSnapshotList(ctx context.Context, epoch lsfs.Epoch, r *CheckReplica) error {
	if p := (*v.node.peers.Load())[r.Node]; p == nil || p.version.Load() < snapshotsSince {
		return nil
	}
	for try := 0; ; try++ {
		differ, err := v.listDifference(ctx, epoch, r.Node)
		if err != nil {
			r.Equal, r.Err = false, err
			return ctx.Err()
		}
		if len(differ) == 0 {
			return nil
		}
		if try == 3 {
			r.Equal, r.Snapshots = false, differ
			return nil
		}
		if !pause(ctx, time.Second) {
			return ctx.Err()
		}
	}
}

// listDifference names the snapshots that one of the two has and the other has not,
// while none is in flight.
func (v *Volume) listDifference(ctx context.Context, epoch lsfs.Epoch, node NodeID) ([]VolumeID, error) {
	h := whole(false)
	if err := v.lockUntil(h, nil, ctx.Done()); err != nil {
		return nil, notOwner(err)
	}
	defer v.unlockRange(h)
	rep, err := v.ask(ctx, node, epoch, wire.SnapList, nil)
	if err != nil {
		return nil, err
	}
	theirs, err := wire.DecodeSnapshots(rep.data)
	if err != nil {
		return nil, err
	}
	points := map[VolumeID]lsfs.OpID{}
	for _, x := range v.node.pool.Snapshots(v.id) {
		points[x.ID()] = x.Point()
	}
	var differ []VolumeID
	for _, t := range theirs {
		id := VolumeID(t.ID)
		if p, ok := points[id]; !ok || p != t.Point {
			differ = append(differ, id)
		}
		delete(points, id)
	}
	for id := range points {
		differ = append(differ, id)
	}
	slices.Sort(differ)
	return differ, nil
}
