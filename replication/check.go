package replication

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// checkChunks is how many chunks are compared under one lock: 16 MiB.
const checkChunks = 16

// CheckResult is what a comparison of a volume's replicas found.
type CheckResult struct {
	Owner    NodeID
	Chunks   int      // compared; the others were never written
	Digest   [32]byte // over the digests of those chunks at the owner
	Replicas []CheckReplica
}

// CheckReplica is one other in-sync replica's part.
type CheckReplica struct {
	Node      NodeID
	Equal     bool
	Different []uint32   // chunks, at most 64 of them
	State     bool       // the ordered state (C2) differs
	Snapshots []VolumeID // those that differ, or that only one of the two has
	Err       error
}

// Check compares the ordered state and the content of all in-sync replicas with the
// owner's, the latter chunk by chunk, while I/O goes on: each run of chunks is compared under a shared range
// lock. It runs on the owner; other nodes answer ErrNotOwner with its id in the result.
func (v *Volume) Check(ctx context.Context, progress func(done, total int)) (CheckResult, error) {
	v.mu.Lock()
	res := CheckResult{Owner: v.g.rec.Owner}
	active := v.g.role == Active
	others := slices.DeleteFunc(slices.Clone(v.g.rec.InSync), func(n NodeID) bool { return n == v.node.self })
	epoch := v.g.rec.Epoch
	v.mu.Unlock()
	if !active {
		return res, fmt.Errorf("%w: ask node %d", ErrNotOwner, res.Owner)
	}
	c := v.copy()
	for _, n := range others {
		res.Replicas = append(res.Replicas, CheckReplica{Node: n, Equal: true})
	}
	// What no copy has ever written is a hole in all of them.
	chunks, err := c.ChangedChunks(ctx, 0)
	if err != nil {
		return res, err
	}
	for i := range res.Replicas {
		r := &res.Replicas[i]
		var rep reply
		if rep, r.Err = v.ask(ctx, r.Node, epoch, wire.Changed, nil); r.Err != nil {
			r.Equal = false
			continue
		}
		theirs, err := parseChunks(rep.data, c.Blocks())
		if err != nil {
			return res, err
		}
		chunks = union(chunks, theirs, c.Blocks())
	}
	if err := v.checkState(ctx, epoch, &res); err != nil {
		return res, err
	}
	sum := sha256.New()
	for len(chunks) > 0 {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		// A run of consecutive chunks is compared under one lock.
		n := 1
		for n < len(chunks) && n < checkChunks && chunks[n] == chunks[0]+uint32(n) {
			n++
		}
		if err := v.checkRun(ctx, chunks[0], uint32(n), epoch, &res, func(d []byte) { sum.Write(d) }); err != nil {
			return res, err
		}
		chunks = chunks[n:]
		res.Chunks += n
		if progress != nil {
			progress(res.Chunks, res.Chunks+len(chunks))
		}
	}
	if err := v.checkSnapshots(ctx, epoch, &res); err != nil {
		return res, err
	}
	sum.Sum(res.Digest[:0])
	return res, nil
}

// ask calls a method of another node's replica.
func (v *Volume) ask(ctx context.Context, n NodeID, epoch lsfs.Epoch, m wire.Method, meta []byte) (reply, error) {
	l := v.node.linkTo(n)
	if l == nil {
		return reply{}, fmt.Errorf("no link to node %d", n)
	}
	return l.call(wire.Header{Volume: uint64(v.id), Epoch: uint64(epoch)}, m, meta, nil, ctx.Done())
}

func (v *Volume) checkRun(ctx context.Context, first, count uint32, epoch lsfs.Epoch, res *CheckResult, add func([]byte)) error {
	start, _ := chunkRange(first, v.copy().Blocks())
	_, end := chunkRange(first+count-1, v.copy().Blocks())
	h := &hold{start: start, end: end}
	if err := v.lockRange(h); err != nil {
		return ErrNotOwner
	}
	defer v.unlockRange(h)
	own, err := v.digests(ctx, first, count)
	if err != nil {
		return err
	}
	add(own)
	meta := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, first), count)
	for i := range res.Replicas {
		r := &res.Replicas[i]
		if r.Err != nil {
			continue
		}
		rep, err := v.ask(ctx, r.Node, epoch, wire.Digests, meta)
		if err != nil {
			r.Equal, r.Err = false, err
			continue
		}
		if bytes.Equal(rep.meta, own) {
			continue
		}
		r.Equal = false
		for k := range count {
			if at := int(k) * 32; len(r.Different) < 64 && (len(rep.meta) < at+32 || !bytes.Equal(rep.meta[at:at+32], own[at:at+32])) {
				r.Different = append(r.Different, first+k)
			}
		}
	}
	return nil
}

// checkState compares the ordered state, which does not change while any block is held.
func (v *Volume) checkState(ctx context.Context, epoch lsfs.Epoch, res *CheckResult) error {
	h := &hold{end: 1}
	if err := v.lockRange(h); err != nil {
		return ErrNotOwner
	}
	defer v.unlockRange(h)
	own, err := stateSum(v.copy())
	if err != nil {
		return err
	}
	for i := range res.Replicas {
		r := &res.Replicas[i]
		if r.Err != nil {
			continue
		}
		rep, err := v.ask(ctx, r.Node, epoch, wire.StateSum, nil)
		if err != nil {
			r.Equal, r.Err = false, err
		} else if !bytes.Equal(rep.meta, own) {
			r.Equal, r.State = false, true
		}
	}
	return nil
}

// Status is what an operator sees of a volume on this node.
type Status struct {
	Volume   lsfs.VolumeID
	Role     Role
	Epoch    lsfs.Epoch
	Owner    NodeID
	InSync   []NodeID
	Replicas []ReplicaStatus
	Serving  bool // owner with a valid lease
	Sequence lsfs.Seq
	Held     int // commands waiting for an owner
	InFlight int
}

// ReplicaStatus is one replica as this node sees it; Lag, Syncing and the rest
// only on the owner.
type ReplicaStatus struct {
	Node       NodeID
	InSync     bool
	Linked     bool
	Lag        uint64 // operations not acknowledged yet
	Syncing    bool
	Done       int64 // chunks
	Total      int64
	SentBytes  int64
	SyncedFor  time.Duration
	Consistent bool // of the local replica
}

// Serving says whether this node answers reads from its copy now: it is the active owner
// and has a lease (R1).
func (v *Volume) Serving() bool { return v.mayServe() }

// Status reports the volume's state as this node sees it.
func (v *Volume) Status() Status {
	serving := v.Serving()
	v.mu.Lock()
	defer v.mu.Unlock()
	s := Status{
		Volume: v.id, Role: v.g.role, Epoch: v.g.rec.Epoch, Owner: v.g.rec.Owner, InSync: slices.Clone(v.g.rec.InSync),
		Serving: serving, Held: len(v.held), InFlight: v.flight.len(),
	}
	if v.next > 0 {
		s.Sequence = v.next - 1
	}
	for _, r := range v.g.rec.Replicas {
		rs := ReplicaStatus{Node: r.Node, InSync: v.g.rec.Has(r.Node), Linked: r.Node == v.node.self || v.node.linkTo(r.Node) != nil}
		if r.Node == v.node.self {
			rs.Consistent = v.g.fit
		}
		if f := v.follower(r.Node); f != nil && v.next > f.acked+1 {
			rs.Lag = uint64(v.next - 1 - f.acked)
		}
		if sy := v.syncing[r.Node]; sy != nil {
			rs.Syncing, rs.Done, rs.Total, rs.SentBytes, rs.SyncedFor = true, sy.done.Load(), sy.total.Load(), sy.sent.Load(), time.Since(sy.started)
		}
		s.Replicas = append(s.Replicas, rs)
	}
	return s
}
