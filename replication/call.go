package replication

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// serveCall answers a request of the control kind. Those that wait run in a
// goroutine of their own; their number is bounded by what an owner asks at a time.
func (n *Node) serveCall(l *link, h wire.Header, meta, data []byte) error {
	method := wire.Method(h.Flags)
	if method == wire.Fetch {
		if len(meta) != len(dedup.Fingerprint{}) {
			return fmt.Errorf("%w: fingerprint of %d bytes", wire.ErrFrame, len(meta))
		}
		fp := dedup.Fingerprint(meta)
		n.spawn(func() { n.serveFetch(l, h, fp) })
		return nil
	}
	v := n.Volume(lsfs.VolumeID(h.Volume))
	if v == nil {
		l.replyError(h, errAbsent)
		return nil
	}
	epoch := lsfs.Epoch(h.Epoch)
	meta = append([]byte(nil), meta...)
	b := l.takeBody()
	if b == nil {
		data = append([]byte(nil), data...)
	}
	switch method {
	case wire.Lend, wire.Return:
		b, err := wire.DecodeLoan(meta)
		if err != nil {
			return err
		}
		if method == wire.Return {
			v.takeBack(l, b)
		} else {
			n.spawn(func() { v.lend(l, h, b) })
		}
	case wire.Promise:
		n.spawn(func() {
			pos, err := v.promise(n.ctx, l, epoch)
			if err != nil {
				l.replyError(h, err)
				return
			}
			l.reply(h, wire.StatusOK, wire.AppendPosition(nil, &pos), nil)
		})
	case wire.SyncMirror:
		// The operations that follow in the stream wait until the new position is durable.
		pos, err := wire.DecodePosition(meta)
		if err != nil {
			return err
		}
		return v.takeMirror(l, h, pos)
	case wire.SyncWhole:
		v.takeWhole(l, h)
		return nil
	case wire.SyncStart, wire.SyncCompare, wire.SyncApply, wire.SyncEnd, wire.Digests, wire.Changed, wire.StateSum,
		wire.SnapList, wire.SnapDrop, wire.SnapForge, wire.SnapCompare, wire.SnapApply, wire.SnapSeal, wire.SnapDigests:
		session := v.session.Load() // here, in the order of the link
		n.spawn(func() {
			if err := v.allows(epoch, method); err != nil {
				l.replyError(h, err)
				return
			}
			if changesReplica(method) {
				v.sessions.RLock()
				defer v.sessions.RUnlock()
				if v.session.Load() != session {
					l.replyError(h, errSuperseded)
					return
				}
			}
			var out, outData []byte
			var err error
			switch method {
			case wire.SyncStart:
				out, outData, err = v.syncStart(meta)
			case wire.SyncCompare:
				out, err = v.syncCompare(n.ctx, meta)
			case wire.SyncApply:
				out, err = v.syncApply(n.ctx, meta, data)
			case wire.SyncEnd:
				err = v.syncEnd(meta)
			case wire.Changed:
				outData, err = changedList(n.ctx, v.copy(), 0)
			case wire.Digests:
				out, err = v.serveDigests(n.ctx, meta)
			case wire.StateSum:
				out, err = stateSum(v.copy())
			default:
				out, outData, err = v.serveSnapshots(n.ctx, method, meta, data)
			}
			if err != nil && !errors.Is(err, errAgain) {
				v.log.Warn("request of the owner failed", "peer", l.peer, "method", int(method), "err", err)
			}
			if err != nil {
				l.replyError(h, err)
				return
			}
			if b != nil {
				b.free()
			}
			l.reply(h, wire.StatusOK, out, outData)
		})
	default:
		return fmt.Errorf("%w: method %d", wire.ErrFrame, method)
	}
	return nil
}

// changesReplica says whether a call changes what this node holds, on the ground of
// what the owner saw in this session.
func changesReplica(m wire.Method) bool {
	switch m {
	case wire.SyncApply, wire.SyncEnd, wire.SnapDrop, wire.SnapForge, wire.SnapApply, wire.SnapSeal:
		return true
	}
	return false
}

// newSession begins another attempt to make this replica equal. What is left of an
// earlier one, whose owner has given it up and holds no range for it any more, has
// ended when it returns, or is refused: a chunk that was read then must not replace
// what the stream has brought since (Y4).
func (v *Volume) newSession() {
	v.sessions.Lock()
	v.session.Add(1)
	v.sessions.Unlock()
}

var errSuperseded = errors.New("a later attempt to fill the replica has begun")

// allows refuses what comes from an epoch that is over (W2).
func (v *Volume) allows(epoch lsfs.Epoch, m wire.Method) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case epoch < v.g.promised && !mutant("W2"):
		return errStale
	case v.copy() == nil || v.gone != nil:
		return errAbsent
	case m != wire.Digests && m != wire.Changed && m != wire.StateSum && m != wire.SnapList && m != wire.SnapDigests && (v.g.role == Active || v.g.role == Activating || v.g.role == Candidate):
		return fmt.Errorf("this node is %s itself", v.g.role)
	}
	return nil
}

// serveFetch reads a block for another node's repair.
func (n *Node) serveFetch(l *link, h wire.Header, fp dedup.Fingerprint) {
	buf := make([]byte, blockSize)
	b, err := n.pool.ReadFingerprint(n.ctx, &fp, buf)
	if errors.Is(err, lsfs.ErrNotFound) && h.Epoch > 0 {
		b, err = n.intactAt(lsfs.VolumeID(h.Volume), lsfs.BlockNo(h.Epoch-1), fp, buf)
	}
	if err != nil {
		l.replyError(h, err)
		return
	}
	// The answer's meta part has the form of Content's.
	frame := wire.AppendContent(nil, wire.Header{}, []uint32{0}, []dedup.Block{b})
	meta := frame[wire.HeaderLen : len(frame)-len(b.Data)]
	l.reply(h, wire.StatusOK, meta, b.Data)
}

// syncStart marks the replica inconsistent where its content is about to be
// mixed (Y2), and lists the chunks in which it has moved since the common point (Y1).
func (v *Volume) syncStart(meta []byte) (out, list []byte, err error) {
	if len(meta) < 1 {
		return nil, nil, wire.ErrFrame
	}
	from, err := wire.DecodeOpID(meta[:len(meta)-1])
	if err != nil {
		return nil, nil, err
	}
	full := meta[len(meta)-1] == syncFull
	v.newSession()
	err = v.hush(func(c Copy) error {
		m := c.Meta()
		if full {
			if m.Inconsistent && m.SyncFrom.Seq < from.Seq {
				from = m.SyncFrom
			}
			m.Inconsistent, m.SyncFrom = !mutant("Y2"), from
			if err := c.SetMeta(v.node.ctx, m); err != nil {
				return err
			}
			v.mu.Lock()
			v.g.fit, v.hollow = false, true
			v.mu.Unlock()
		}
		list, err = changedList(v.node.ctx, c, from.Seq)
		return err
	})
	return nil, list, err
}

// takeMirror sets the position from which the live stream goes on.
func (v *Volume) takeMirror(l *link, h wire.Header, pos wire.Position) error {
	v.mu.Lock()
	refuse := lsfs.Epoch(h.Epoch) < v.g.promised || v.replica.Load() == nil || v.gone != nil
	if !refuse {
		v.ackTo, v.deaf = l, nil
		v.dropBlocked()
		for v.frozen && v.gone == nil { // never long: another call of the same owner is at work
			v.still.Wait()
		}
		v.frozen = true
		v.next = pos.Durable.Seq + 1
	}
	v.mu.Unlock()
	if refuse {
		l.replyError(h, errStale)
		return nil
	}
	v.node.spawn(func() {
		v.mu.Lock()
		err := v.drain()
		v.mu.Unlock()
		if c := v.copy(); err == nil && c != nil {
			m := c.Meta()
			m.Durable, m.EpochLog, m.State = pos.Durable, pos.EpochLog, pos.State
			m.Promised = max(m.Promised, lsfs.Epoch(h.Epoch))
			err = c.SetMeta(v.node.ctx, m)
		}
		if err == nil {
			v.mu.Lock()
			v.restate(pos.State, false)
			v.mu.Unlock()
			v.announce()
		}
		v.mu.Lock()
		v.frozen = false
		if err == nil {
			v.local = pos.Durable.Seq
			v.unblock()
		}
		v.still.Broadcast()
		v.mu.Unlock()
		v.node.pool.Kick()
		if err != nil {
			l.replyError(h, err)
			return
		}
		l.reply(h, wire.StatusOK, nil, nil)
	})
	return nil
}

// syncCompare says which blocks of a chunk this node can make neither from what
// the chunk holds nor from any other block in its pool.
func (v *Volume) syncCompare(ctx context.Context, meta []byte) ([]byte, error) {
	c := v.copy()
	return v.compareChunk(ctx, c, c.Blocks(), meta)
}

// compareChunk is syncCompare for what is not the copy itself, too.
func (v *Volume) compareChunk(ctx context.Context, c fingerprinted, blocks uint64, meta []byte) ([]byte, error) {
	sc, err := wire.DecodeSyncChunk(meta, nil)
	if err != nil {
		return nil, err
	}
	have, _, err := chunkFingerprints(ctx, c, blocks, sc.Chunk, len(sc.Fingerprints))
	if err != nil {
		return nil, err
	}
	v.node.pool.Recall(ctx, sc.Fingerprints)
	var missing []uint32
	for i := range sc.Fingerprints {
		fp := &sc.Fingerprints[i]
		if have[i] == *fp || *fp == (dedup.Fingerprint{}) {
			continue
		}
		if id, held := v.node.pool.Pin(fp); held {
			v.node.pool.Unpin(id)
			continue
		}
		missing = append(missing, uint32(i))
	}
	frame := wire.AppendNeed(nil, wire.Header{}, missing)
	return frame[wire.HeaderLen:], nil
}

// fingerprinted is what a chunk is compared in: a copy or a snapshot.
type fingerprinted interface {
	Fingerprints(ctx context.Context, start lsfs.BlockNo, dst []dedup.Fingerprint) error
}

func chunkFingerprints(ctx context.Context, c fingerprinted, blocks uint64, chunk uint32, want int) ([]dedup.Fingerprint, lsfs.BlockNo, error) {
	start, end := chunkRange(chunk, blocks)
	if end <= start || int(end-start) != want {
		return nil, 0, fmt.Errorf("chunk %d has %d blocks at the owner, and here the volume has %d", chunk, want, blocks)
	}
	have := make([]dedup.Fingerprint, want)
	return have, start, c.Fingerprints(ctx, start, have)
}

// syncEnd makes the replica consistent again; after M3 it also takes over the
// owner's position.
func (v *Volume) syncEnd(meta []byte) error {
	if len(meta) < 1 {
		return wire.ErrFrame
	}
	pos, err := wire.DecodePosition(meta[:len(meta)-1])
	if err != nil {
		return err
	}
	full := meta[len(meta)-1] == syncFull
	return v.hush(func(c Copy) error {
		m := c.Meta()
		m.Inconsistent, m.SyncFrom = false, lsfs.OpID{}
		if !full {
			m.Durable, m.EpochLog, m.State = pos.Durable, pos.EpochLog, pos.State
		}
		if err := c.SetMeta(v.node.ctx, m); err != nil {
			return err
		}
		v.mu.Lock()
		v.g.fit, v.hollow = true, false
		if !full {
			v.local = pos.Durable.Seq
			v.next = v.local + 1
			v.restate(pos.State, false)
		}
		v.mu.Unlock()
		v.announce()
		return nil
	})
}

// serveDigests answers with the digests of a run of chunks.
func (v *Volume) serveDigests(ctx context.Context, meta []byte) ([]byte, error) {
	if len(meta) != 8 {
		return nil, wire.ErrFrame
	}
	first, count := binary.LittleEndian.Uint32(meta), binary.LittleEndian.Uint32(meta[4:])
	if count > checkChunks {
		return nil, errors.New("too many chunks at a time")
	}
	return v.digests(ctx, first, count)
}

// stateSum is the name of the ordered state in a copy and the digest of its value.
func stateSum(c Copy) ([]byte, error) {
	if c == nil {
		return nil, errAbsent
	}
	s := parseState(c.Meta().State)
	sum := sha256.Sum256(s.value)
	return append(wire.AppendOpID(nil, s.id), sum[:]...), nil
}

func (v *Volume) digests(ctx context.Context, first, count uint32) (out []byte, err error) {
	c := v.copy()
	if c == nil {
		return nil, errAbsent
	}
	return digestsOf(ctx, c, c.Blocks(), first, count)
}

// digestsOf are the digests of a run of chunks of a copy or a snapshot.
func digestsOf(ctx context.Context, c fingerprinted, blocks uint64, first, count uint32) (out []byte, err error) {
	for chunk := first; chunk < first+count; chunk++ {
		start, end := chunkRange(chunk, blocks)
		if end <= start {
			break
		}
		fps := make([]dedup.Fingerprint, end-start)
		if err := c.Fingerprints(ctx, start, fps); err != nil {
			return nil, err
		}
		d := chunkDigest(fps)
		out = append(out, d[:]...)
	}
	return out, nil
}
