package replication

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

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
	if err := v.outlived(r); err != nil {
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
	v.holdLocked(r, now, false)
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
// moved says that the owner has refused the ordered state that r names.
func (v *Volume) holdLocked(r *Request, now Instant, moved bool) {
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
	v.held = append(v.held, heldRequest{r: r, until: until, moved: moved, state: r.State, epoch: v.g.rec.Epoch})
}

// retryHeld sends held requests on their way when there is one.
func (v *Volume) retryHeld() {
	v.mu.Lock()
	if len(v.held) == 0 || v.gone != nil {
		v.mu.Unlock()
		return
	}
	reach := v.active.Load() || v.ownerLink() != nil
	held := v.held
	v.held = nil
	var failed []heldRequest
	known := v.stated.Load().id
	again := held[:0]
	for _, h := range held {
		if h.r.Err = v.outlived(h.r); h.r.Err != nil {
			failed = append(failed, h)
			continue
		}
		switch {
		case !reach:
			v.held = append(v.held, h)
		case !h.moved || v.active.Load() || h.epoch != v.g.rec.Epoch:
			again = append(again, h)
		case h.r.State != known && h.refused(v):
			failed = append(failed, h)
		case h.r.State == known && h.r.State != h.state:
			again = append(again, h)
		default:
			v.held = append(v.held, h) // the owner knows a newer one that has not come here yet
		}
	}
	v.mu.Unlock()
	for _, h := range failed {
		v.end(h.r, translate(h.r.Err))
	}
	for _, h := range again {
		v.route(h.r)
	}
	v.node.Kick()
	if len(failed) > 0 {
		v.node.flush()
	}
}

// outlived says that r must not take effect any more: who issued it has given it up, or
// the session that it came by has been dropped (Z1), so its initiator may have repeated
// it elsewhere and gone on; or it was forwarded to us in an earlier reign (Z2), and who
// sent it has ended it. It is never stamped again. Called with mu.
func (v *Volume) outlived(r *Request) error {
	switch {
	case r.Abandoned != nil && r.Abandoned.Load():
		return ErrBusy
	case mutant("Z1-outlived"):
	case r.served && r.term != v.term:
		return ErrBusy
	case !r.served && (r.drops != v.drops.Load() || v.dropping.Load() > 0):
		return ErrUnavailable
	}
	return nil
}

// dropSessions has every session that uses the volume dropped, and sees to it that
// nothing that came by one of them takes effect later (Z1).
func (v *Volume) dropSessions(reason string) {
	v.beginDrop()
	v.node.cfg.DropSessions(v.id, reason)
	v.endDrop()
}

// Between beginDrop and endDrop, sessions are being dropped: whatever comes in by them
// now is dead as well.
func (v *Volume) beginDrop() {
	v.dropping.Add(1)
	v.drops.Add(1)
}

func (v *Volume) endDrop() {
	v.drops.Add(1)
	v.dropping.Add(-1)
}

// refused looks at the request anew, with the newest state that is known here, and
// says whether it ends by that.
func (h *heldRequest) refused(v *Volume) bool {
	h.r.Err = translate(v.recheck(h.r))
	return h.r.Err != nil
}

// forwarding is the table of requests that wait for the owner's answer.
type forwarding struct {
	mu     sync.Mutex
	last   uint64
	open   map[uint64]forwarded
	wanted []*settling
}

type forwarded struct {
	v     *Volume
	r     *Request
	l     *link
	until Instant // Z3
}

// settling waits for some of the forwarded requests.
type settling struct {
	left map[uint64]bool
	done chan struct{} // closed when none is left
}

// removeLocked takes a request off the table.
func (f *forwarding) removeLocked(id uint64) {
	delete(f.open, id)
	for _, s := range f.wanted {
		if s.left[id] {
			if delete(s.left, id); len(s.left) == 0 {
				close(s.done)
			}
		}
	}
}

// SettleForwards returns when nothing that was abandoned before the call can take effect
// any more because it is on its way to an owner: that has answered, or refuses it for its
// age (Z3), so it takes a second and a half at most. Who drops a session calls it
// before the initiator learns of that: it could be faster through another node than the
// command, see it without effect, and be overtaken by it (Z1).
func (n *Node) SettleForwards() {
	if mutant("Z1-settle") {
		return
	}
	f := &n.forwards
	s := &settling{left: map[uint64]bool{}, done: make(chan struct{})}
	fresh := n.now().After(n.timing.Drop - n.timing.Fresh)
	f.mu.Lock()
	for id, x := range f.open {
		if x.r.Abandoned != nil && x.r.Abandoned.Load() && fresh <= x.until {
			s.left[id] = true
		}
	}
	if len(s.left) == 0 {
		f.mu.Unlock()
		return
	}
	f.wanted = append(f.wanted, s)
	f.mu.Unlock()
	t := time.NewTimer(n.timing.Fresh)
	defer t.Stop()
	select {
	case <-s.done:
	case <-t.C:
	}
	f.mu.Lock()
	f.wanted = slices.DeleteFunc(f.wanted, func(x *settling) bool { return x == s })
	f.mu.Unlock()
}

// forward ships a request to the owner with the epoch in which it was accepted (Z2).
func (n *Node) forward(v *Volume, l *link, epoch lsfs.Epoch, r *Request) {
	b := wire.ForwardBody{
		Op: uint8(r.Op), FUA: r.FUA, Atomic: r.Atomic, Off: r.Off, Len: r.Len,
		Stated: r.Recheck != nil, State: r.State, Source: uint64(r.Source), SourceOff: r.SourceOff,
	}
	if p := (*n.peers.Load())[l.peer]; p != nil {
		b.Stamp = p.clock.Load()
	}
	data := r.Data
	switch r.Op {
	case OpRead:
		data = nil
	case OpExtents:
		b.Limit = uint32(min(cap(r.Extents), extentsMax))
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
	if r.Abandoned != nil && r.Abandoned.Load() {
		// Whoever gave it up may not have found it in the table.
		n.endForwards(errNeverSent, func(x *forwarded) bool { return x.r == r })
		return
	}
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
		n.endForwards(errNeverSent, func(x *forwarded) bool { return x.l == l && x.r == r })
	}
}

// Results of a forwarded request. Part of the wire format, do not change.
const (
	fwdGood       = 0
	fwdMiscompare = 1
	fwdNoSpace    = 2
	fwdMedium     = 3
	fwdBusy       = 4 // nothing took effect; may be repeated
	fwdReadOnly   = 5
	fwdDeleted    = 6
	fwdLost       = 7 // the outcome is not known
	fwdMoved      = 8 // another ordered state is in force; nothing took effect
	fwdStateMoved = 9 // a change of the state was made from another one
	fwdNoClone    = 10
)

// fwdErrors are the results that are an error of the request and nothing more.
var fwdErrors = [...]error{
	fwdMiscompare: ErrMiscompare, fwdNoSpace: ErrNoSpace, fwdMedium: ErrMedium, fwdBusy: ErrBusy, fwdReadOnly: ErrReadOnly,
	fwdDeleted: ErrDeleted, fwdMoved: errMoved, fwdStateMoved: ErrStateMoved, fwdNoClone: ErrNoClone,
}

// extentsMax bounds the extents of one answer.
const extentsMax = 8192

// forwardDone takes the owner's answer.
func (n *Node) forwardDone(p *peer, h wire.Header, meta, data []byte) error {
	res, err := wire.DecodeForwardResult(meta)
	if err != nil {
		return err
	}
	f := &n.forwards
	f.mu.Lock()
	x, ok := f.open[h.Seq]
	f.removeLocked(h.Seq)
	f.mu.Unlock()
	if !ok {
		return nil
	}
	r := x.r
	if res.Sum != dedup.Sum(data) { // CHECKED
		x.v.end(r, ErrUnavailable)
		return fmt.Errorf("%w: data of an answer does not match its sum", wire.ErrFrame)
	}
	switch res.Code {
	case fwdGood:
		if err := takeResult(r, &res, data); err != nil {
			x.v.end(r, ErrUnavailable)
			return err
		}
		x.v.end(r, nil)
	case fwdMiscompare:
		r.Miscompare = res.At
		x.v.end(r, ErrMiscompare)
	case fwdMedium:
		r.Bad = res.At
		x.v.end(r, ErrMedium)
	case fwdNoSpace, fwdReadOnly, fwdDeleted, fwdStateMoved, fwdNoClone:
		x.v.end(r, fwdErrors[res.Code])
	case fwdBusy, fwdMoved:
		now := n.now()
		x.v.mu.Lock()
		x.v.holdLocked(r, now, res.Code == fwdMoved)
		x.v.mu.Unlock()
		if res.Code == fwdMoved {
			x.v.retryHeld() // the newer state may be known here by now
		}
	default:
		x.v.end(r, ErrUnavailable)
	}
	return nil
}

// takeResult fills r from the owner's answer. data lies in the read buffer.
func takeResult(r *Request, res *wire.ForwardResult, data []byte) error {
	want := 0
	switch r.Op {
	case OpRead:
		want = len(r.Data)
		copy(r.Data, data)
	case OpState:
		r.State = res.State
	case OpReadState:
		if want = len(data); want > StateBytesMax {
			want = StateBytesMax
		}
		r.State, r.Value = res.State, bytes.Clone(data)
	case OpExtents:
		r.Extents = r.Extents[:0]
		for len(data)-want >= wire.ExtentLen && len(r.Extents) < cap(r.Extents) {
			size, mapped := wire.DecodeExtent(data[want:])
			r.Extents = append(r.Extents, Extent{Bytes: size, Mapped: mapped})
			want += wire.ExtentLen
		}
		if len(r.Extents) == 0 {
			return fmt.Errorf("%w: an answer without extents", wire.ErrFrame)
		}
	}
	if len(data) != want {
		return fmt.Errorf("%w: %d bytes of data in the answer to operation %d, expected %d", wire.ErrFrame, len(data), r.Op, want)
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

// errNeverSent: a forwarded request has not left this node.
var errNeverSent = errors.New("the link to the owner was gone")

// endForwards ends forwarded requests without an answer. A read is repeated here,
// what may happen twice by the initiator (BUSY), for nobody knows whether it took
// effect. What must not happen twice (COMPARE AND WRITE, a change of the state)
// is not called BUSY, which would say that it did not happen: the path is lost, and
// the initiator looks for itself (C1).
func (n *Node) endForwards(err error, which func(*forwarded) bool) {
	f := &n.forwards
	var lost []forwarded
	f.mu.Lock()
	for id, x := range f.open {
		if which(&x) {
			lost = append(lost, x)
			f.removeLocked(id)
		}
	}
	f.mu.Unlock()
	if len(lost) == 0 {
		return
	}
	now := n.now()
	for _, x := range lost {
		if op := x.r.Op; mutant("C1-busy") && op == OpCompareAndWrite {
			x.v.end(x.r, ErrBusy)
		} else if op == OpRead || op == OpFlush || op == OpReadState || op == OpExtents {
			x.v.mu.Lock()
			x.v.holdLocked(x.r, now, false)
			x.v.mu.Unlock()
		} else {
			end := err
			switch {
			case err == errNeverSent:
				end = ErrBusy
			case x.r.Op == OpCompareAndWrite || x.r.Op == OpState || x.r.Op == OpClone && x.r.overlaps(x.v.id) && !mutant("C4-overlap"):
				end = ErrUnavailable // done a second time it would do something else
			}
			x.v.end(x.r, end)
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
	*r = Request{
		Op: RequestOp(b.Op), FUA: b.FUA, Atomic: b.Atomic, Off: b.Off, Len: b.Len, Data: data, Done: fn,
		State: b.State, Source: VolumeID(b.Source), SourceOff: b.SourceOff,
	}
	if b.Stated {
		r.Recheck = refuseMoved
	}
	v := n.Volume(lsfs.VolumeID(h.Volume))
	if v == nil {
		// It is gone, and whoever sent this will learn that as well, or it is new and this
		// node has not heard of it: then it must not be called gone.
		r.Err = ErrBusy
		done.done(r)
		return nil
	}
	if !done.prepare(v, &b, data) {
		return fmt.Errorf("%w: forwarded request %d at %d for %d with %d bytes of data", wire.ErrFrame, b.Op, b.Off, b.Len, len(data))
	}
	v.mu.Lock()
	current := v.serves() && (lsfs.Epoch(h.Epoch) == v.g.rec.Epoch || mutant("Z2"))
	r.served, r.term = true, v.term
	v.mu.Unlock()
	// Z3: it has waited too long on its way. Whoever issued it may have given it up.
	current = current && (n.now() < Instant(b.Stamp).After(n.timing.Fresh) || mutant("Z3"))
	refuse := func() {
		r.Err = ErrBusy
		done.done(r)
	}
	if !current { // Z2: accepted in another reign; the sender decides anew
		refuse()
		return nil
	}
	if r.Op == OpRead && v.TryRead(r.Off, r.Data) {
		v.mu.Lock()
		err := v.recheck(r)
		v.mu.Unlock()
		if err == nil {
			done.done(r)
			return nil
		}
	}
	v.submitHere(r, refuse)
	return nil
}

// prepare gives a request from the wire its memory (data is valid only until
// serveForward returns) and says whether it is one.
func (s *served) prepare(v *Volume, b *wire.ForwardBody, data []byte) bool {
	r := &s.req
	switch r.Op {
	case OpRead:
		if len(data) != 0 || b.Len > wire.MaxData {
			return false
		}
		if uint64(cap(s.buf)) < b.Len {
			s.buf = make([]byte, b.Len)
		}
		r.Data = s.buf[:b.Len]
	case OpWrite:
		r.Borrowed = true
	case OpExtents:
		if b.Limit == 0 || b.Limit > extentsMax {
			return false
		}
		r.Extents = make([]Extent, 0, b.Limit)
	default:
		s.buf = append(s.buf[:0], data...)
		r.Data = s.buf
	}
	return v.valid(r)
}

// done sends the answer. The caller flushes the link after its batch.
func (s *served) done(r *Request) {
	res := wire.ForwardResult{Code: fwdLost, At: r.Miscompare, State: r.State}
	if r.Err == nil {
		res.Code = fwdGood
	} else if i := slices.Index(fwdErrors[1:], r.Err); i >= 0 && fwdErrors[1+i] != nil {
		res.Code = uint8(1 + i)
	}
	var data []byte
	switch {
	case r.Err == ErrMedium:
		res.At = r.Bad
	case r.Err != nil:
	case r.Op == OpRead:
		data = r.Data
	case r.Op == OpReadState:
		data = r.Value
	case r.Op == OpExtents:
		s.buf = s.buf[:0]
		for _, x := range r.Extents {
			s.buf = wire.AppendExtent(s.buf, x.Bytes, x.Mapped)
		}
		data = s.buf
	}
	res.Sum = dedup.Sum(data)
	h := s.h
	h.Type = wire.ForwardReply
	l := s.l
	l.lock()
	at := len(l.out)
	l.out = wire.AppendForwardResult(wire.Begin(l.out), &res)
	metaLen := len(l.out) - at - wire.HeaderLen
	l.out = wire.End(append(l.out, data...), at, h, metaLen)
	l.unlock()
	if cap(s.buf) > 1<<20 {
		s.buf = nil
	}
	s.req.Data, s.req.Value, s.req.Extents = nil, nil, nil
	s.node.served.Put(s)
}
