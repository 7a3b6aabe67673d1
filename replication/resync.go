package replication

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// resync makes one replica equal to the owner's copy (rules Y), driven by the owner.
//
// The dirty chunks are those with a version above the common point on either
// side. Each is compared and copied under a shared range lock: writes in flight
// commit first, new ones wait for the milliseconds that it takes, and once
// copied the chunk stays equal because the replica takes the live stream.
type resync struct {
	v      *Volume
	peer   NodeID
	link   *link
	epoch  lsfs.Epoch
	ctx    context.Context
	cancel context.CancelFunc

	total, done atomic.Int64  // chunks
	flying      atomic.Int32  // chunks under way
	sending     chan struct{} // a place for each chunk that is sent
	sent        atomic.Int64  // bytes of stored blocks
	started     time.Time     // with mu of the volume: when its turn came
	turn        turn
	lost        lostBlocks
}

// Modes of SyncStart and SyncEnd, after the OpID in their meta part.
const (
	syncLevel = 0 // inside M3: the replica stays in sync, it only loses or gains unacknowledged operations
	syncFull  = 1 // the replica is out of sync: inconsistent until the end
)

// Chunks under way in one resync. While initiators work, few are, so that none waits long
// for a range; while nobody does, enough to hide the waiting. They take 33 MiB at the
// owner. Of them sentChunks at most are on the link and at the replica, where they take
// 17 MiB, and hold their ranges against writes; the others are compared and read
// meanwhile, which is a third of the time that a chunk takes.
const (
	parallelChunks = 4
	quietChunks    = 32
	sentChunks     = 16
)

func newResync(v *Volume, peer NodeID, l *link, epoch lsfs.Epoch) *resync {
	return &resync{v: v, peer: peer, link: l, epoch: epoch, sending: make(chan struct{}, sentChunks)}
}

// startResyncs starts what is missing: one resync for every replica that is out
// of sync and in reach. Called with mu.
func (v *Volume) startResyncs() {
	if v.g.role != Active || v.gone != nil || v.g.proposal.open {
		return
	}
	for _, r := range v.g.rec.Replicas {
		if v.g.rec.Has(r.Node) || v.syncing[r.Node] != nil {
			continue
		}
		l := v.node.linkTo(r.Node)
		if l == nil || v.node.peerSlow(r.Node) {
			continue
		}
		s := newResync(v, r.Node, l, v.g.rec.Epoch)
		s.started, s.turn = time.Now(), turn{copies: len(v.g.rec.InSync), work: v.missing(r.Node)}
		s.ctx, s.cancel = context.WithCancel(v.node.ctx)
		v.syncing[r.Node] = s
		v.node.spawn(func() { s.run(r) })
	}
}

// missing is how much a replica has to catch up with, roughly: the operations since it
// was seen last, or all blocks. Called with mu.
func (v *Volume) missing(id NodeID) uint64 {
	all := v.size.Load() / blockSize
	p := (*v.node.peers.Load())[id]
	if p == nil {
		return all
	}
	at := p.stood.Load()
	if at == nil {
		return all
	}
	pos, here := (*at)[v.id]
	from := pos.Durable.Seq
	if pos.Inconsistent {
		from = pos.SyncFrom.Seq
	}
	if !here || v.next <= from+1 {
		return all
	}
	return min(uint64(v.next-1-from), all)
}

// run is one whole attempt. What it leaves behind when it fails is found again
// from the versions of the chunks: nothing is remembered elsewhere.
func (s *resync) run(r Replica) {
	v, n := s.v, s.v.node
	err := n.resyncs.enter(s.ctx, &s.turn)
	if err == nil {
		v.mu.Lock()
		s.started = time.Now()
		v.mu.Unlock()
		v.filling.Add(1)
		err = s.whole(r)
		v.filling.Add(-1)
		s.turn.leave(&n.resyncs)
	}
	s.cancel()
	if err != nil {
		v.log.Info("resync ended early", "peer", s.peer, "err", err)
		n.failedBy(err)
		again := 500 * time.Millisecond
		if errors.Is(err, ErrMedium) {
			again = lostAgain
			v.tellBlocked(fmt.Sprintf("volume %d: node %d cannot come in sync: %v", v.id, s.peer, err))
		}
		pause(n.ctx, again)
	}
	v.mu.Lock()
	delete(v.syncing, s.peer)
	if f := v.follower(s.peer); f != nil && f.mirror && !v.g.needsAck(s.peer) {
		f.mirror, f.joining, f.link = false, false, nil
		v.trackFollowers()
	}
	v.mu.Unlock()
}

func (s *resync) call(method wire.Method, meta, data []byte) (reply, error) {
	return s.link.call(wire.Header{Volume: uint64(s.v.id), Epoch: uint64(s.epoch)}, method, meta, data, s.ctx.Done())
}

func (s *resync) whole(r Replica) error {
	v := s.v
	c := v.copy()
	rep, err := s.call(wire.Promise, nil, nil)
	if err != nil {
		return err
	}
	pos, err := wire.DecodePosition(rep.meta)
	if err != nil {
		return err
	}
	if ReplicaID(pos.Replica) != r.ID {
		return fmt.Errorf("node %d holds another replica than the recorded one", s.peer)
	}
	m := c.Meta()
	from := common(m.EpochLog, m.Durable, pos.EpochLog, pos.Durable)
	if pos.Inconsistent && pos.SyncFrom.Seq < from.Seq {
		from = pos.SyncFrom
	}
	if born := (lsfs.OpID{Seq: 1}); from == (lsfs.OpID{}) && pos.Durable == born && v.origin() != 0 {
		from = born // both began as the same snapshot
	}
	theirs, err := s.start(from, syncFull)
	if err != nil {
		return err
	}
	if err := s.mirror(); err != nil {
		return err
	}
	ours, err := c.ChangedChunks(s.ctx, from.Seq)
	if err != nil {
		return err
	}
	if mutant("Y1-target-tail") {
		theirs = nil
	}
	chunks := union(ours, theirs, c.Blocks())
	v.log.Info("resync starts", "peer", s.peer, "from", from.Seq, "chunks", len(chunks))
	v.node.cfg.Event(levelInfo, "resync-started", fmt.Sprintf("volume %d: node %d is filled from operation %d on: %d MiB to compare", v.id, s.peer, from.Seq, len(chunks)))
	if mutant("Y3") {
		chunks = nil
	}
	if err := s.copyChunks(c, chunks, true); err != nil {
		return err
	}
	if err := s.awaitLost(c); err != nil {
		return err
	}
	if err := s.snapshots(c, true); err != nil {
		return err
	}
	if _, err := s.call(wire.SyncEnd, append(wire.AppendPosition(nil, &wire.Position{Volume: uint64(v.id)}), syncFull), nil); err != nil {
		return err
	}
	// M4: only a replica that has everything is proposed, and from now on nothing is
	// acknowledged without it: once the record names it, it may own (DURABLE).
	var last lsfs.Seq
	v.mu.Lock()
	if f := v.follower(s.peer); f != nil {
		f.joining = !mutant("M4-joining")
	}
	last = v.next - 1
	v.mu.Unlock()
	for {
		v.mu.Lock()
		f := v.follower(s.peer)
		level := f != nil && (f.joining && f.acked >= last || mutant("M4-level") || mutant("M4-joining")) && f.link == s.link
		v.mu.Unlock()
		if f == nil || s.ctx.Err() != nil {
			return errors.New("the stream to the replica broke")
		}
		if level {
			break
		}
		if !pause(s.ctx, 5*time.Millisecond) {
			return s.ctx.Err()
		}
	}
	proposed := false
	inc := Incarnation(0)
	if p := (*v.node.peers.Load())[s.peer]; p != nil {
		inc = Incarnation(p.inc.Load())
	}
	v.event(func(g *reign) {
		// Looked at under the same hold of the mutex: when the stream broke meanwhile,
		// operations have retired without it.
		if f := v.follower(s.peer); f != nil && (f.joining || mutant("M4-joining")) && (f.link == s.link || mutant("M4-stream")) {
			proposed = g.grow(v.node.now(), s.peer, r.ID, inc)
		}
	})
	if !proposed {
		return errors.New("the in-sync set is changing")
	}
	for waiting := true; ; {
		v.mu.Lock()
		open, in := v.g.proposal.open, v.g.rec.Has(s.peer)
		v.mu.Unlock()
		if in {
			v.node.cfg.Event(levelInfo, "resync-done", fmt.Sprintf("volume %d: node %d is in sync again: %d chunks compared, %d bytes sent in %s", v.id, s.peer, s.total.Load(), s.sent.Load(), time.Since(s.started).Round(time.Millisecond)))
			return nil
		}
		if !open {
			return errors.New("the replica was not taken into the in-sync set")
		}
		if !waiting {
			return s.ctx.Err()
		}
		// The record that takes the replica in also ends this resync: it is looked at once more.
		waiting = pause(s.ctx, 5*time.Millisecond)
	}
}

// level makes an in-sync replica equal while nobody is served (M3).
func (s *resync) level(pos wire.Position, m lsfs.Meta) error {
	c := s.v.copy()
	from := common(m.EpochLog, m.Durable, pos.EpochLog, pos.Durable)
	theirs, err := s.start(from, syncLevel)
	if err != nil {
		return err
	}
	ours, err := c.ChangedChunks(s.ctx, from.Seq)
	if err != nil {
		return err
	}
	if mutant("M3-target-tail") {
		theirs = nil
	}
	chunks := union(ours, theirs, c.Blocks())
	s.v.log.Info("replica is levelled", "peer", s.peer, "from", from.Seq, "ours", m.Durable.Seq, "theirs", pos.Durable.Seq, "chunks", len(chunks))
	if err := s.copyChunks(c, chunks, false); err != nil {
		return err
	}
	if err := s.snapshots(c, false); err != nil {
		return err
	}
	end := wire.Position{Volume: uint64(s.v.id), Durable: m.Durable, EpochLog: m.EpochLog, State: m.State}
	_, err = s.call(wire.SyncEnd, append(wire.AppendPosition(nil, &end), syncLevel), nil)
	return err
}

// origin is the snapshot as which the volume began.
func (v *Volume) origin() VolumeID {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.g.rec.Origin
}

func (s *resync) start(from lsfs.OpID, mode byte) ([]uint32, error) {
	rep, err := s.call(wire.SyncStart, append(wire.AppendOpID(nil, from), mode), nil)
	if err != nil {
		return nil, err
	}
	return parseChunks(rep.data, s.v.copy().Blocks())
}

// mirror opens the live stream to the replica at the present number (Y3) and
// waits until everything before it is in our own copy, so that the versions of
// the chunks tell of it.
func (s *resync) mirror() error {
	v := s.v
	if err := s.stored(); err != nil { // the record of this epoch among them
		return err
	}
	v.mu.Lock()
	if v.g.role != Active || v.g.rec.Epoch != s.epoch {
		v.mu.Unlock()
		return errors.New("the reign ended")
	}
	pos := wire.Position{Volume: uint64(v.id), Durable: lsfs.OpID{Epoch: s.epoch, Seq: v.next - 1}, EpochLog: v.copy().Meta().EpochLog, State: v.sequencedState(v.copy())}
	f := v.follower(s.peer)
	if f == nil {
		f = &follower{id: s.peer}
		v.followers = append(v.followers, f)
	}
	f.mirror, f.ready, f.joining, f.acked, f.link = true, false, false, v.next-1, s.link
	f.seen, f.since = f.acked, v.node.now()
	// Under the mutex: the call stands in the stream before the first mirrored operation.
	c := s.link.begin(wire.Header{Volume: uint64(v.id), Epoch: uint64(s.epoch)}, wire.SyncMirror, wire.AppendPosition(nil, &pos), nil)
	v.mu.Unlock()
	s.link.flush()
	if _, err := s.link.wait(c, s.ctx.Done()); err != nil {
		return err
	}
	v.mu.Lock()
	f.ready = true
	v.mu.Unlock()
	return s.stored()
}

// stored waits until everything sequenced so far is durable here.
func (s *resync) stored() error {
	v := s.v
	if mutant("Y3-stored") {
		return nil
	}
	v.mu.Lock()
	last := v.next - 1
	v.mu.Unlock()
	for {
		v.mu.Lock()
		done, active := v.local >= last, v.g.role == Active
		v.mu.Unlock()
		if done {
			return nil
		}
		if !active {
			return errors.New("the reign ended")
		}
		v.node.Kick()
		if !pause(s.ctx, time.Millisecond) {
			return s.ctx.Err()
		}
	}
}

// union merges two lists of chunks and drops those beyond the end.
func union(a, b []uint32, blocks uint64) []uint32 {
	all := append(slices.Clone(a), b...)
	slices.Sort(all)
	all = slices.Compact(all)
	return slices.DeleteFunc(all, func(c uint32) bool {
		start, end := chunkRange(c, blocks)
		return end <= start
	})
}

func (s *resync) copyChunks(c Copy, chunks []uint32, locked bool) error {
	s.total.Add(int64(len(chunks)))
	g, ctx := errgroup.WithContext(s.ctx)
	g.SetLimit(quietChunks)
	for _, chunk := range chunks {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			err := s.copyChunk(c, chunk, locked)
			if err == nil {
				s.done.Add(1)
			}
			if locked && s.lost.add(chunk, err) {
				return nil // the others first
			}
			return err
		})
	}
	return g.Wait()
}

// chunkRange is the range of blocks of a chunk in a copy of that many blocks, or in
// its annex; empty for a chunk beyond either.
func chunkRange(chunk uint32, blocks uint64) (start, end lsfs.BlockNo) {
	start = lsfs.BlockNo(chunk) * wire.ChunkBlocks
	end = lsfs.BlockNo(blocks)
	if start >= lsfs.AnnexStart {
		end = lsfs.AnnexStart + lsfs.AnnexBlocks
	}
	return start, max(start, min(start+wire.ChunkBlocks, end))
}

// takeOff waits until one more chunk may be under way.
func (s *resync) takeOff() error {
	for {
		limit := int32(quietChunks)
		if s.v.node.throttle.working(s.v.node.now()) {
			limit = parallelChunks
		}
		if n := s.flying.Load(); n < limit && s.flying.CompareAndSwap(n, n+1) {
			return nil
		} else if n < limit {
			continue // another one was faster
		}
		if !pause(s.ctx, 2*time.Millisecond) {
			return s.ctx.Err()
		}
	}
}
