package sim

import (
	"context"
	"encoding/binary"
	"errors"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Scenarios of commands that come too late (rules Z), of COMPARE AND WRITE and of the
// ordered state (rules C), and of what a deposed owner answers.

// stray is a command that lies in a node's socket although its host has given it up:
// nobody could tell the node so. What the host writes afterwards must stay.
type stray struct {
	s     *session
	r     *replication.Request
	ended atomic.Bool
}

func (w *world) stray(c *client, id replication.NodeID, reg *register, op replication.RequestOp) *stray {
	p, _ := w.processAt(id)
	data := stamp(77, true)
	r := &replication.Request{Op: op, Off: off(reg), Len: blockBytes, Data: data}
	if op == replication.OpWriteSame { // of one sector: the rest of its block is read first
		r.Len, r.Data = 512, data[:512]
	} else {
		reg.sent(data)
	}
	return &stray{s: p.login(c), r: r}
}

// arrive has the node read the command from its socket.
func (x *stray) arrive() {
	x.s.p.submit(x.s, 1, x.r, func(*replication.Request) { x.ended.Store(true) })
}

func (w *world) setSlow(id replication.NodeID, d time.Duration) {
	w.mu.Lock()
	w.slow[id] = d
	w.mu.Unlock()
}

func (w *world) setDelay(d time.Duration) {
	w.net.mu.Lock()
	w.net.delay = d
	w.net.mu.Unlock()
}

// stallFrom holds up what the connection that one node dialled carries to the other.
func (w *world) stallFrom(from, to replication.NodeID, d time.Duration) {
	w.net.mu.Lock()
	defer w.net.mu.Unlock()
	for _, c := range w.net.conns {
		if e := c.ends[0]; e.p.id == from && e.out.to == to && e.err == nil {
			e.out.stalled = time.Now().Add(d)
			wakeup(e.out.read)
		}
	}
}

func (w *world) status(id replication.NodeID) (s replication.Status) {
	if p, _ := w.processAt(id); p != nil {
		if n, ok := p.isServing(); ok && n.Volume(1) != nil {
			s = n.Volume(1).Status()
		}
	}
	return s
}

// soon waits in short steps for a moment that does not last.
func (w *world) soon(what string, ok func() bool) {
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) || w.failure() != "" {
			w.await(what, ok)
			return
		}
	}
}

// move gives the volume from its owner to another node.
func (w *world) move(from, to replication.NodeID) {
	w.soon("an owner", func() bool { return w.status(from).Role == replication.Active })
	p, _ := w.processAt(from)
	n, ok := p.isServing()
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := n.Volume(1).MoveTo(ctx, to); err != nil {
		w.fail("M6: the volume does not move from node %d to node %d: %v", from, to, err)
	}
	w.soon("the new owner", func() bool { return w.status(to).Role == replication.Active })
}

// strayAtDeposed: the owner is cut off and deposed. It reads the stray when it has
// learned of that.
func (w *world) strayAtDeposed() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	x := w.stray(c, 1, reg, replication.OpWrite)
	heal := w.cutOff(1, 2)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	c.pinned(2, reg, time.Minute)
	heal()
	w.await("node 1 knows", func() bool { return w.status(1).Owner == 2 })
	time.Sleep(time.Second)
	x.arrive()
	time.Sleep(2 * time.Second)
	w.mend(func() {})
}

// strayAfterPause: the node by which the command came does not own the volume, and
// stands still meanwhile.
func (w *world) strayAfterPause() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(2, reg, time.Minute)
	x := w.stray(c, 2, reg, replication.OpWrite)
	p, _ := w.processAt(2)
	p.pause()
	time.Sleep(4 * time.Second)
	c.pinned(1, reg, time.Minute)
	p.unpause()
	time.Sleep(time.Second)
	x.arrive()
	time.Sleep(2 * time.Second)
	w.mend(func() {})
}

// strayBehindSlowLink: a node forwards the command behind so much else that it comes to
// the owner long after its host has lost the path by which it was sent.
func (w *world) strayBehindSlowLink() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(2, reg, time.Minute) // its link to the owner is up
	w.net.mu.Lock()
	w.net.rate = 64 << 10
	w.net.mu.Unlock()
	p, _ := w.processAt(2)
	other := p.login(w.clients[1])
	for i := range 24 { // half a second each
		p.submit(other, 1, &replication.Request{Op: replication.OpWrite, Off: uint64(400+8*i) * blockBytes, Len: 8 * blockBytes, Data: make([]byte, 8*blockBytes)}, func(*replication.Request) {})
	}
	x := w.stray(c, 2, reg, replication.OpWrite)
	x.arrive()
	w.await("the path fails", x.s.isOver)
	c.pinned(1, reg, time.Minute)
	time.Sleep(10 * time.Second)
	w.net.mu.Lock()
	w.net.rate = 1 << 30
	w.net.mu.Unlock()
	w.mend(func() {})
}

// strayUnderWay: the session is dropped, because of something else, when the command has left for
// the owner and is held up for a moment. Its host has another path at hand.
func (w *world) strayUnderWay() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(2, reg, time.Minute) // its link to the owner is up
	w.stallFrom(2, 1, 300*time.Millisecond)
	x := w.stray(c, 2, reg, replication.OpWrite)
	x.arrive()
	time.Sleep(10 * time.Millisecond)
	p, _ := w.processAt(2)
	p.drop("the scenario wants it")
	<-x.s.lost
	c.pinned(1, reg, time.Minute)
	time.Sleep(2 * time.Second)
	w.mend(func() {})
}

// strayOfEarlierReign: a node forwards the command, and it is held up on its way for less
// than a second (Late). In that time the volume moves away from the owner three times, which
// the node learns at once: it ends the command as BUSY, and its host goes on. Then
// the volume comes back to where the command is on its way to.
func (w *world) strayOfEarlierReign() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(3, reg, time.Minute)
	w.court.mu.Lock()
	told := w.court.subs[3]
	w.court.subs[3] = nil
	w.court.mu.Unlock()
	w.stallFrom(3, 1, 700*time.Millisecond)
	x := w.stray(c, 3, reg, replication.OpWrite)
	x.arrive()
	w.move(1, 2)
	w.move(2, 1)
	w.move(1, 2)
	w.court.mu.Lock()
	w.court.subs[3] = told
	w.court.publish()
	w.court.mu.Unlock()
	w.soon("the command ends", x.ended.Load)
	if !errors.Is(x.r.Err, replication.ErrBusy) {
		w.fail("%s: the command ends with %v", wrongScenario, x.r.Err)
	}
	c.pinned(2, reg, time.Minute)
	w.move(2, 1)
	time.Sleep(3 * time.Second)
	w.mend(func() {})
}

// strayThatWaits: the command waits at the owner for its range when the owner is deposed,
// and dropping the sessions takes a while.
func (w *world) strayThatWaits() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	control := w.cutOff(1)
	data, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.open.Go(func() { c.pinned(1, reg, 300*time.Millisecond) })
	time.Sleep(100 * time.Millisecond)
	w.stray(c, 1, reg, replication.OpWriteSame).arrive()
	w.await("node 2 owns", func() bool { return w.serves(2) })
	c.pinned(2, reg, time.Minute)
	w.dropDelay = 50 * time.Millisecond
	data()
	time.Sleep(3 * time.Second)
	control()
	time.Sleep(3 * time.Second)
	w.mend(func() {})
}

// strayThatReads: the command reads for so long that its owner is deposed and owns again
// before it has read.
func (w *world) strayThatReads() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	w.setSlow(1, 48*time.Second) // twelve for a read
	w.stray(c, 1, reg, replication.OpWriteSame).arrive()
	time.Sleep(50 * time.Millisecond)
	w.setSlow(1, 0)
	heal := w.cutOff(1, 2)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	c.pinned(2, reg, time.Minute)
	heal()
	w.await("both in sync", w.healthy)
	w.move(2, 1)
	time.Sleep(12 * time.Second)
	w.mend(func() {})
}

// comparesAtDeposed: an owner that is cut off compares with what it has.
func (w *world) comparesAtDeposed() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	heal := w.cutOff(1, 2)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	c.pinned(2, reg, time.Minute)
	old, _ := reg.settled()
	p, _ := w.processAt(1)
	data := stamp(78, true)
	reg.sent(data)
	r := &replication.Request{Op: replication.OpCompareAndWrite, Off: off(reg), Len: blockBytes, Data: append(append([]byte(nil), old...), data...)}
	if err := c.ask(p.login(c), 1, r); err == nil && errors.Is(r.Err, replication.ErrMiscompare) {
		w.fail("C1: a deposed owner says that the newest content is another one")
	}
	w.mend(heal)
}

// oneLock: three hosts want the same lock, again and again.
func (w *world) oneLock() {
	for _, c := range w.clients {
		w.open.Go(func() {
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && w.failure() == ""; {
				c.lock(1)
			}
		})
	}
	time.Sleep(11 * time.Second)
	w.mend(func() {})
}

// put writes a block of a host through a node once, and says how that ended.
func (w *world) put(c *client, id replication.NodeID, reg *register, data []byte) error {
	i := reg.sent(data)
	p, _ := w.processAt(id)
	s := p.login(c)
	r := &replication.Request{Op: replication.OpWrite, Off: off(reg), Len: blockBytes, Data: append([]byte(nil), data...)}
	c.current.Store(&command{regs: []target{{reg, i}}})
	if err := c.ask(s, 1, r); err != nil {
		return err
	}
	if r.Err == nil {
		reg.good(i)
	}
	return r.Err
}

// orderState makes a value of the ordered state of another one, through a node; done
// runs at the owner at the moment of the acknowledgement.
func (w *world) orderState(id replication.NodeID, from replication.StateID, fenced uint64) (replication.StateID, error) {
	c := newClient(w, clientCount)
	p, _ := w.processAt(id)
	value := binary.LittleEndian.AppendUint64(make([]byte, 8), fenced)
	r := &replication.Request{Op: replication.OpState, State: from, Data: value}
	if err := c.ask(p.login(c), 1, r); err != nil {
		return from, err
	}
	return r.State, r.Err
}

// fenceInStream: a host is fenced and let in again while it writes to all its blocks.
func (w *world) fenceInStream() {
	c := w.clients[0]
	var over atomic.Bool
	for i, reg := range c.regs[1] {
		w.open.Go(func() {
			for n := 0; !over.Load() && w.failure() == ""; n++ {
				if w.put(c, 1, reg, stamp(uint64(i<<20+n), true)) != nil {
					time.Sleep(5 * time.Millisecond)
				}
			}
		})
	}
	var id replication.StateID
	for range 20 {
		for _, fenced := range []uint64{1, 0} {
			var err error
			if id, err = w.orderState(1, id, fenced); err != nil {
				w.fail("C2: a change of the ordered state ended with: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	over.Store(true)
	w.mend(func() {})
}

// twoChanges: of two changes that were made from one value only one may be good.
func (w *world) twoChanges() {
	var none replication.StateID
	if _, err := w.orderState(1, none, 1); err != nil {
		w.fail("C2: the first change ended with: %v", err)
	}
	if _, err := w.orderState(2, none, 2); !errors.Is(err, replication.ErrStateMoved) {
		w.fail("C2: a second change that was made from the same value ended with: %v", err)
	}
	w.mend(func() {})
}

// everyDoorKnows: when a change of the ordered state is acknowledged, the device servers
// of all nodes in sync know it.
func (w *world) everyDoorKnows() {
	var id replication.StateID
	p, _ := w.processAt(1)
	q, _ := w.processAt(2)
	for i := range 10 {
		c := newClient(w, clientCount)
		value := binary.LittleEndian.AppendUint64(make([]byte, 8), uint64(i%2))
		r := &replication.Request{Op: replication.OpState, State: id, Data: value}
		done := make(chan struct{})
		p.submit(p.login(c), 1, r, func(r *replication.Request) {
			if at := q.state(lsfs.VolumeID(1)).id; r.Err == nil && at != r.State {
				w.fail("C2: change %v of the ordered state is acknowledged, and the door of node 2 knows %v", r.State, at)
			}
			close(done)
		})
		<-done
		if id = r.State; r.Err != nil {
			w.fail("C2: a change of the ordered state ended with: %v", r.Err)
		}
	}
	w.mend(func() {})
}
