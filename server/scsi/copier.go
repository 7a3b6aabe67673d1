package scsi

import (
	"errors"
	"sync"
	"time"

	"github.com/twinsan/twinsan/replication"
)

const (
	// copyPieceBytes is how much a copy by data moves at once: enough to amortise
	// its two requests, little enough that others' I/O passes between pieces.
	copyPieceBytes = 1 << 20
	// maxCopyBuffers bounds the memory of copies by data (16 MiB). A copy that finds
	// none left waits until another one is done with its own.
	maxCopyBuffers = 16
	// busyTicks is how many seconds a copy waits for a volume whose ownership is
	// moving before it fails: longer than a take-over, well below hosts' timeouts.
	busyTicks = 5
	// clonePageBytes is what one page of a volume's map covers. Clones end at its
	// multiples where they can, so that the next one shares whole pages again.
	clonePageBytes = 2 << 20
	// zeroPieceBytes is how much is unmapped at once.
	zeroPieceBytes = 512 << 20
)

// errStopped ends the copies of an operation that was aborted.
var errStopped = errors.New("copy operation aborted")

// place is one side of a copy: a volume, and who says whether it may be touched.
type place struct {
	volume Volume // nil: zeros, as a source
	base   uint64 // added to the copy's offsets: 0, or the annex
	// check is asked before each step and, where it has moved on, when a request is
	// sequenced: it returns the state that it judged by. Nil: always allowed.
	check func() (StateID, error)
}

func (p *place) allowed() (id StateID, err error) {
	if p.check == nil {
		return id, nil
	}
	return p.check()
}

// inName is a unit that a command touches in the name of its sender, in the
// class of a command that reads or writes.
func (s *Server) inName(itl *itlNexus, access Access) place {
	return place{volume: itl.lu.config.Load().Volume, check: func() (StateID, error) { return itl.permits(access) }}
}

// permits says whether the nexus may access its unit now: it still sees it, no
// reservation and no write protection stands against it.
func (i *itlNexus) permits(access Access) (StateID, error) {
	g := i.grant.Load()
	switch {
	case i.nexus.state.view.Load().units[i.lu.lun] != i:
		return g.id, ErrDeleted
	case g.denies(access):
		return g.id, ErrReserved
	case access == AccessWrite && (g.protected || i.readOnly || i.lu.config.Load().ReadOnly):
		return g.id, ErrReadOnly
	}
	return g.id, nil
}

// A copier's phases name the request that it waits for.
//
//	idle -> clone -> idle
//	     -> extents -> read -> write -> idle
//	                -> unmap ---------> idle
type copyPhase uint8

const (
	copyIdle copyPhase = iota
	copyCloning
	copyAsking
	copyReading
	copyWriting // or unmapping
)

// copier copies [src, src+length) of one place to [dst, dst+length) of another,
// one request at a time, so that the I/O of initiators goes between. Where both
// sides lie alike to 4 KiB blocks it clones; what cannot be cloned is copied by
// data, and holes stay holes. Ranges of one volume may overlap: the copy runs
// towards the side that is not overwritten first.
//
// It runs on the sequencer. A copier whose request is with a volume, or that
// waits for a buffer or for a busy volume, must not be touched.
type copier struct {
	s         *Server
	from, to  place
	src, dst  uint64 // multiples of 512
	length    uint64
	stopped   func() bool
	cloneOnly bool          // errNotCloned instead of a copy by data
	until     time.Duration // 0: no limit; else it stops there with nil and moved < length
	done      func(err error)

	failedFrom bool   // the error of done is the source's
	moved      uint64 // bytes, from the beginning, or from the end when backward
	backward   bool
	byData     bool // the volume cannot clone here
	unwritten  bool // the buffer is to be written again: the source may have changed by the first time
	phase      copyPhase
	piece      uint64 // of the current request
	at         uint64 // where the piece begins in the copy
	buffer     []byte
	busy       int // ticks in a row that a volume was busy
	req        Request
	extents    [32]Extent
	onDone     func(*Request)
	onFrom     func(*Request) error
	onTo       func(*Request) error
	next       *copier // of those who wait for a buffer or a volume
}

// start begins the copy. done is called once, on the sequencer's goroutine or
// before start returns. The caller must not touch c after start.
func (c *copier) start() {
	c.moved, c.busy, c.byData, c.unwritten, c.failedFrom, c.phase = 0, 0, false, false, false, copyIdle
	c.backward = c.from.volume != nil && c.from.volume.ID() == c.to.volume.ID() &&
		c.src+c.from.base < c.dst+c.to.base && c.dst+c.to.base < c.src+c.from.base+c.length
	if c.onDone == nil {
		c.onDone = func(*Request) { c.wake() }
		c.onFrom = func(r *Request) error { return c.recheck(r, &c.from) }
		c.onTo = func(r *Request) error { return c.recheck(r, &c.to) }
	}
	c.proceed()
}

// wake has the sequencer take the next step.
func (c *copier) wake() {
	if !c.s.sequencer.later(c.step) {
		c.end(ErrBusy)
	}
}

func (c *copier) recheck(r *Request, p *place) error {
	if c.stopped() {
		return ErrBusy
	}
	id, err := p.allowed()
	if err == nil {
		r.State = id
	}
	return err
}

// end gives the buffer back and ends the copy.
func (c *copier) end(err error) {
	if c.buffer != nil {
		b := c.buffer
		c.buffer = nil
		c.s.copyBuffers.put(b)
	}
	c.phase = copyIdle
	c.done(err)
}

// step goes on after a request has ended, or a buffer has come.
func (c *copier) step() {
	err := c.req.Err
	if c.phase != copyIdle {
		c.unwritten = err != nil && c.phase == copyWriting && c.buffer != nil
	}
	switch {
	case c.phase == copyIdle && c.unwritten:
		c.write(c.req.Op)
	case c.phase == copyIdle:
		c.proceed()
	case err != nil && c.stopped():
		c.end(errStopped)
	case errors.Is(err, ErrBusy) && c.s.paused.add(c):
		// Tick brings it back. It must not be touched any more.
	case c.phase == copyCloning && errors.Is(err, ErrNoClone) && c.cloneOnly:
		c.end(errNotCloned)
	case c.phase == copyCloning && errors.Is(err, ErrNoClone):
		c.byData = true
		c.proceed()
	case err != nil:
		c.failedFrom = c.phase == copyAsking || c.phase == copyReading
		c.end(err)
	case c.phase == copyAsking:
		c.choose()
	case c.phase == copyReading && allZero(c.buffer[:c.piece]):
		c.write(OpUnmap)
	case c.phase == copyReading:
		c.write(OpWrite)
	default:
		c.moved += c.piece
		c.busy = 0
		c.proceed()
	}
}

// proceed begins the next piece.
func (c *copier) proceed() {
	c.phase = copyIdle
	if c.moved == c.length {
		c.end(nil)
		return
	}
	if c.stopped() {
		c.end(errStopped)
		return
	}
	from, err := c.from.allowed()
	if err != nil {
		c.failedFrom = true
		c.end(err)
		return
	}
	to, err := c.to.allowed()
	if err != nil {
		c.end(err)
		return
	}
	if c.until != 0 && c.s.now() >= c.until {
		c.end(nil)
		return
	}
	if c.from.volume == nil {
		c.cut(zeroPieceBytes)
		c.request(copyWriting, &c.to, to, OpUnmap, nil)
		return
	}
	if c.cutClone() {
		c.req = Request{Source: c.from.volume.ID(), SourceOff: c.from.base + c.src + c.at}
		c.request(copyCloning, &c.to, to, OpClone, nil)
		return
	}
	if c.buffer == nil {
		b := c.s.copyBuffers.get(c)
		if b == nil {
			return // it comes back when there is one, on another goroutine
		}
		c.buffer = b
	}
	if c.from.base != 0 {
		c.request(copyReading, &c.from, from, OpRead, c.buffer[:c.piece])
		return
	}
	c.request(copyAsking, &c.from, from, OpExtents, nil)
}

// request submits the current piece.
func (c *copier) request(phase copyPhase, p *place, id StateID, op RequestOp, data []byte) {
	c.phase = phase
	r := &c.req
	*r = Request{Op: op, Off: p.base + c.dst + c.at, Len: c.piece, Data: data, State: id, Done: c.onDone,
		Source: r.Source, SourceOff: r.SourceOff}
	recheck := c.onTo
	if p == &c.from {
		r.Off = p.base + c.src + c.at
		recheck = c.onFrom
	}
	if op == OpExtents {
		r.Extents = c.extents[:0]
	}
	if p.check != nil {
		r.Recheck = recheck
	}
	p.volume.Submit(r)
}

func (c *copier) write(op RequestOp) {
	id, err := c.to.allowed()
	if err == nil && c.stopped() {
		err = errStopped
	}
	if err != nil {
		c.end(err)
		return
	}
	var data []byte
	if op == OpWrite {
		data = c.buffer[:c.piece]
	}
	c.request(copyWriting, &c.to, id, op, data)
}

// cut makes the next piece, of at most limit bytes, that ends (or, backward,
// begins) at a block of the destination when it can.
func (c *copier) cut(limit uint64) {
	left := c.length - c.moved
	if c.backward {
		end := left
		begin := end - min(left, limit)
		if up := (c.dst+begin+grainBytes-1)&^(grainBytes-1) - c.dst; begin > 0 && up < end {
			begin = up
		}
		c.at, c.piece = begin, end-begin
		return
	}
	c.at = c.moved
	c.piece = min(left, limit)
	if end := (c.dst + c.at + c.piece) &^ (grainBytes - 1); c.piece < left && end > c.dst+c.at {
		c.piece = end - c.dst - c.at
	}
}

// cutClone makes the next piece and says whether it is one for OpClone: whole
// blocks on both sides. Before the first and behind the last of them it is a
// piece for the data path.
func (c *copier) cutClone() bool {
	src, dst := c.from.base+c.src, c.to.base+c.dst
	if c.byData || (src^dst)%grainBytes != 0 {
		c.cut(copyPieceBytes)
		return false
	}
	begin, end := c.moved, c.length
	if c.backward {
		begin, end = 0, c.length-c.moved
	}
	first := (src+begin+grainBytes-1)&^(grainBytes-1) - src
	last := (src+end)&^(grainBytes-1) - src // below 0 when that block begins before the source
	if int64(last-first) <= 0 {
		c.at, c.piece = begin, end-begin // a part of one or two blocks
		return false
	}
	switch {
	case !c.backward && first > begin:
		c.at, c.piece = begin, first-begin
		return false
	case c.backward && last < end:
		c.at, c.piece = last, end-last
		return false
	case c.backward:
		c.at = first
		if last-first > replication.CloneBytesMax {
			c.at = last - replication.CloneBytesMax
		}
		c.piece = last - c.at
	default:
		c.at = first
		c.piece = last - first
		if c.piece > replication.CloneBytesMax {
			stop := (dst + first + replication.CloneBytesMax) &^ (clonePageBytes - 1)
			c.piece = stop - dst - first
		}
	}
	return true
}

// choose looks at what is mapped in the current piece of the source: a hole is
// unmapped at the destination, the rest is read.
func (c *copier) choose() {
	e := c.req.Extents
	if len(e) == 0 {
		c.end(errExtents)
		return
	}
	run := e[0]
	if c.backward {
		sum := uint64(0)
		for _, x := range e {
			sum += x.Bytes
		}
		run = e[len(e)-1]
		if sum < c.piece {
			run = Extent{Bytes: c.piece, Mapped: true} // more extents than there is room for
		}
	}
	n := min(run.Bytes, c.piece)
	if n == 0 || n%512 != 0 {
		c.end(errExtents)
		return
	}
	if c.backward {
		c.at += c.piece - n
	}
	c.piece = n
	if !run.Mapped {
		c.write(OpUnmap)
		return
	}
	id, err := c.from.allowed()
	if err != nil {
		c.end(err)
		return
	}
	c.request(copyReading, &c.from, id, OpRead, c.buffer[:c.piece])
}

// errNotCloned: the volume does not clone here and now, and data shall not be copied.
var errNotCloned = errors.New("not cloned by the volume")

var errExtents = errors.New("volume reports extents that are none")

// copyBuffers lends the buffers of copies by data.
type copyBuffers struct {
	pool sync.Pool

	mu          sync.Mutex
	lent        int
	first, last *copier // who waits, longest first
}

// get returns a buffer, or nil: then the copier is in line for one.
func (p *copyBuffers) get(c *copier) []byte {
	p.mu.Lock()
	if p.lent >= maxCopyBuffers {
		c.next = nil
		if p.first == nil {
			p.first = c
		} else {
			p.last.next = c
		}
		p.last = c
		p.mu.Unlock()
		return nil
	}
	p.lent++
	p.mu.Unlock()
	if b, ok := p.pool.Get().(*[copyPieceBytes]byte); ok {
		return b[:]
	}
	return make([]byte, copyPieceBytes)
}

// put takes a buffer back and hands it to who has waited longest.
func (p *copyBuffers) put(b []byte) {
	p.mu.Lock()
	c := p.first
	if c == nil {
		p.lent--
		p.mu.Unlock()
		p.pool.Put((*[copyPieceBytes]byte)(b))
		return
	}
	p.first = c.next
	p.mu.Unlock()
	c.buffer = b
	c.wake()
}

// pausedCopies are those that met a busy volume; each Tick lets them try again.
type pausedCopies struct {
	mu   sync.Mutex
	last *copier
}

// add takes a copier, unless it was busy for too long.
func (p *pausedCopies) add(c *copier) bool {
	if c.busy >= busyTicks {
		return false
	}
	c.busy++
	c.phase = copyIdle
	p.mu.Lock()
	c.next, p.last = p.last, c
	p.mu.Unlock()
	return true
}

// resume lets all go on.
func (p *pausedCopies) resume() {
	p.mu.Lock()
	c := p.last
	p.last = nil
	p.mu.Unlock()
	for c != nil {
		next := c.next
		c.wake()
		c = next
	}
}
