package replication

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// redirect sends a request to the owner, or holds it until there is one.
func (v *Volume) redirect(r *Request) {
	n := v.node
	now := n.now()
	v.mu.Lock()
	if v.gone != nil {
		err := v.gone
		v.mu.Unlock()
		v.end(r, err)
		return
	}
	if l := v.ownerLink(); l != nil {
		epoch := v.g.rec.Epoch
		v.mu.Unlock()
		n.forward(v, l, epoch, r)
		return
	}
	v.holdLocked(r, now)
	v.mu.Unlock()
}

// ownerLink is the way to the owner when that is another node in reach. Called with mu.
func (v *Volume) ownerLink() *link {
	owner := v.g.rec.Owner
	if !v.g.known || owner == 0 || owner == v.node.self || v.g.role == Candidate {
		return nil
	}
	return v.node.linkTo(owner)
}

// holdLocked keeps a request that nobody can execute now: long while this node
// is becoming the owner, short while it can reach none (Q4, Z5).
func (v *Volume) holdLocked(r *Request, now Instant) {
	own(r)
	until, ok := r.Scratch.(Instant)
	if !ok {
		until = now.After(v.node.timing.Drop)
		if v.g.role == Candidate || v.g.role == Activating || v.g.role == Active {
			until = now.After(v.node.timing.Hold)
		}
		r.Scratch = until
	}
	if len(v.held) >= maxHeld {
		v.node.spawn(func() {
			v.end(r, ErrBusy)
			v.node.flush()
		})
		return
	}
	v.held = append(v.held, heldRequest{r, until})
}

// retryHeld sends held requests on their way when there is one.
func (v *Volume) retryHeld() {
	v.mu.Lock()
	if len(v.held) == 0 || !v.active.Load() && v.ownerLink() == nil {
		v.mu.Unlock()
		return
	}
	held := v.held
	v.held = nil
	v.mu.Unlock()
	for _, h := range held {
		v.Submit(h.r)
	}
	v.node.Kick()
}

// forwarding is the table of requests that wait for the owner's answer.
type forwarding struct {
	mu   sync.Mutex
	last uint64
	open map[uint64]forwarded
}

type forwarded struct {
	v     *Volume
	r     *Request
	l     *link
	until Instant // Z3
}

// forward ships a request to the owner with the epoch in which it was accepted (Z2).
func (n *Node) forward(v *Volume, l *link, epoch lsfs.Epoch, r *Request) {
	b := wire.ForwardBody{Op: uint8(r.Op), FUA: r.FUA, Off: r.Off, Len: r.Len}
	if p := (*n.peers.Load())[l.peer]; p != nil {
		b.Stamp = p.clock.Load()
	}
	data := r.Data
	if r.Op == OpRead {
		data = nil
	}
	b.Sum = dedup.Sum(data)
	if _, ok := r.Scratch.(Instant); !ok {
		r.Scratch = n.now().After(n.timing.Drop)
	}
	own(r) // kept for a repetition when the owner refuses
	f := &n.forwards
	f.mu.Lock()
	f.last++
	id := f.last
	if f.open == nil {
		f.open = map[uint64]forwarded{}
	}
	f.open[id] = forwarded{v, r, l, n.now().After(n.timing.Drop)}
	f.mu.Unlock()
	l.lock()
	dead := l.err != nil
	at := len(l.out)
	l.out = wire.Begin(l.out)
	l.out = wire.AppendForward(l.out, &b)
	metaLen := len(l.out) - at - wire.HeaderLen
	l.out = append(l.out, data...)
	l.out = wire.End(l.out, at, wire.Header{Type: wire.Forward, Volume: uint64(v.id), Epoch: uint64(epoch), Seq: id}, metaLen)
	l.unlock()
	if dead { // it never left
		n.endForwards(ErrBusy, func(x *forwarded) bool { return x.l == l && x.r == r })
	}
}

// Results of a forwarded request, in the first byte of the answer's meta part.
const (
	fwdGood       = 0
	fwdMiscompare = 1
	fwdNoSpace    = 2
	fwdMedium     = 3
	fwdBusy       = 4 // nothing took effect; may be repeated
	fwdReadOnly   = 5
	fwdDeleted    = 6
	fwdLost       = 7 // the outcome is not known
)

// forwardDone takes the owner's answer.
func (n *Node) forwardDone(p *peer, h wire.Header, meta, data []byte) error {
	if len(meta) != 13 {
		return fmt.Errorf("%w: answer of %d bytes", wire.ErrFrame, len(meta))
	}
	f := &n.forwards
	f.mu.Lock()
	x, ok := f.open[h.Seq]
	delete(f.open, h.Seq)
	f.mu.Unlock()
	if !ok {
		return nil
	}
	if binary.LittleEndian.Uint32(meta[9:]) != dedup.Sum(data) { // CHECKED
		return fmt.Errorf("%w: data of a forwarded read does not match its sum", wire.ErrFrame)
	}
	r := x.r
	switch meta[0] {
	case fwdGood:
		if r.Op == OpRead && copy(r.Data, data) != len(r.Data) {
			return fmt.Errorf("%w: forwarded read of %d bytes brought %d", wire.ErrFrame, len(r.Data), len(data))
		}
		x.v.end(r, nil)
	case fwdMiscompare:
		r.Miscompare = binary.LittleEndian.Uint64(meta[1:])
		x.v.end(r, ErrMiscompare)
	case fwdNoSpace:
		x.v.end(r, ErrNoSpace)
	case fwdMedium:
		x.v.end(r, ErrMedium)
	case fwdReadOnly:
		x.v.end(r, ErrReadOnly)
	case fwdDeleted:
		x.v.end(r, ErrDeleted)
	case fwdBusy:
		now := n.now()
		x.v.mu.Lock()
		x.v.holdLocked(r, now)
		x.v.mu.Unlock()
	default:
		x.v.end(r, ErrUnavailable)
	}
	return nil
}

// A forwarded request whose answer does not come ends when it cannot take effect
// any more, and not before: then the initiator may repeat it, and no old command
// lands on top of newer ones.

// forwardsDrained ends what was sent on older links to a node that has greeted us
// on a new one: it reads the old ones no more.
func (n *Node) forwardsDrained(l *link) {
	n.endForwards(ErrBusy, func(x *forwarded) bool { return x.l.peer == l.peer && x.l != l })
}

// forwardsMoved ends what waits for the answer of a node that does not own the
// volume any more: what it did not commit is gone for good (M3).
func (v *Volume) forwardsMoved(owner NodeID) {
	v.node.endForwards(ErrBusy, func(x *forwarded) bool { return x.v == v && x.l.peer != owner })
}

// forwardsExpired ends what waits too long: the owner refuses it by now (Z3). The
// path fails, so that the initiator takes another (Z5).
func (n *Node) forwardsExpired(now Instant) {
	n.endForwards(ErrUnavailable, func(x *forwarded) bool { return now > x.until })
}

// endForwards ends forwarded requests without an answer: a read is repeated here,
// anything else by the initiator, for nobody knows whether it took effect.
func (n *Node) endForwards(err error, which func(*forwarded) bool) {
	f := &n.forwards
	var lost []forwarded
	f.mu.Lock()
	for id, x := range f.open {
		if which(&x) {
			lost = append(lost, x)
			delete(f.open, id)
		}
	}
	f.mu.Unlock()
	if len(lost) == 0 {
		return
	}
	now := n.now()
	for _, x := range lost {
		if x.r.Op == OpRead || x.r.Op == OpFlush {
			x.v.mu.Lock()
			x.v.holdLocked(x.r, now)
			x.v.mu.Unlock()
		} else {
			x.v.end(x.r, err)
		}
	}
	n.flush()
}

// served is a forwarded request at the owner.
type served struct {
	req  Request
	node *Node
	l    *link
	h    wire.Header
	buf  []byte
}

func newServed() any {
	s := &served{}
	s.req.Done = s.done
	return s
}

// serveForward executes a request that another node's initiator made.
func (n *Node) serveForward(l *link, h wire.Header, meta, data []byte) error {
	b, err := wire.DecodeForward(meta)
	if err != nil {
		return err
	}
	if dedup.Sum(data) != b.Sum { // CHECKED
		return fmt.Errorf("%w: data of a forwarded request does not match its sum", wire.ErrFrame)
	}
	done := n.served.Get().(*served)
	fn := done.req.Done
	*done = served{node: n, l: l, h: h, buf: done.buf[:0]}
	r := &done.req
	*r = Request{Op: RequestOp(b.Op), FUA: b.FUA, Off: b.Off, Len: b.Len, Data: data, Done: fn}
	v := n.Volume(lsfs.VolumeID(h.Volume))
	if v == nil {
		r.Err = ErrDeleted
		done.done(r)
		return nil
	}
	size := v.size.Load()
	valid := b.Off <= size && b.Len <= size-b.Off && b.Off%sectorSize == 0 && b.Len%sectorSize == 0
	switch r.Op {
	case OpRead:
		valid = valid && len(data) == 0 && b.Len <= wire.MaxData
	case OpWrite:
		valid = valid && uint64(len(data)) == b.Len
		r.Borrowed = true
	case OpCompareAndWrite:
		valid = valid && len(data)%(2*sectorSize) == 0 && uint64(len(data)/2) <= size-b.Off
	case OpWriteSame:
		valid = valid && (len(data) == sectorSize || len(data) == blockSize)
	case OpUnmap, OpFlush:
	default:
		valid = false
	}
	if !valid {
		return fmt.Errorf("%w: forwarded request %d at %d for %d with %d bytes of data", wire.ErrFrame, b.Op, b.Off, b.Len, len(data))
	}
	v.mu.Lock()
	current := v.g.role == Active && lsfs.Epoch(h.Epoch) == v.g.rec.Epoch
	v.mu.Unlock()
	// Z3: whoever sent it has given it up, or is about to.
	current = current && n.now() < Instant(b.Stamp).After(n.timing.Drop)
	refuse := func() {
		r.Err = ErrBusy
		done.done(r)
	}
	if !current { // Z2: accepted in another reign; the sender decides anew
		refuse()
		return nil
	}
	if r.Op == OpRead {
		if cap(done.buf) < int(b.Len) {
			done.buf = make([]byte, b.Len)
		}
		r.Data = done.buf[:b.Len]
		if v.TryRead(r.Off, r.Data) {
			done.done(r)
			return nil
		}
	} else if r.Op != OpWrite {
		r.Data = append(done.buf[:0], data...)
	}
	v.submitHere(r, refuse)
	return nil
}

// done sends the answer. The caller flushes the link after its batch.
func (s *served) done(r *Request) {
	var meta [13]byte
	switch r.Err {
	case nil:
		meta[0] = fwdGood
	case ErrMiscompare:
		meta[0] = fwdMiscompare
	case ErrNoSpace:
		meta[0] = fwdNoSpace
	case ErrMedium:
		meta[0] = fwdMedium
	case ErrBusy:
		meta[0] = fwdBusy
	case ErrReadOnly:
		meta[0] = fwdReadOnly
	case ErrDeleted:
		meta[0] = fwdDeleted
	default:
		meta[0] = fwdLost
	}
	binary.LittleEndian.PutUint64(meta[1:], r.Miscompare)
	var data []byte
	if r.Err == nil && r.Op == OpRead {
		data = r.Data
	}
	binary.LittleEndian.PutUint32(meta[9:], dedup.Sum(data))
	h := s.h
	h.Type = wire.ForwardReply
	l := s.l
	l.lock()
	l.out = wire.AppendFrame(l.out, h, meta[:], data)
	l.unlock()
	if cap(s.buf) > 1<<20 {
		s.buf = nil
	}
	s.req.Data = nil
	s.node.served.Put(s)
}
