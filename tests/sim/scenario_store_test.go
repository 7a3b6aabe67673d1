package sim

import (
	"time"

	"github.com/twinsan/twinsan/replication"
)

// Scenarios of what a store does: copies that come and go (M8), writes that are not flushed
// (W6), blocks that are lost (Y5, Y8), disks that hang (M1).

// copiesComeAndGo: of three nodes two have a copy. The third one gets one, then owns, and
// the first one's copy goes, while a host writes.
func (w *world) copiesComeAndGo() {
	c := w.clients[0]
	w.placing = true
	w.court.removeCopy(1, 3)
	if !w.eventually(time.Now().Add(10*time.Second), w.healthy) {
		w.fail("M8: node 3 does not free its copy: %s", w.state(time.Now()))
	}
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	w.court.addCopy(1, 3)
	if !w.eventually(time.Now().Add(20*time.Second), w.healthy) {
		w.fail("M8: a copy that was added is not filled: %s", w.state(time.Now()))
	}
	if w.court.removeCopy(1, 1) {
		w.fail("M8: the owner's copy is removed")
	}
	w.move(1, 3)
	for _, reg := range c.regs[1][:8] {
		c.pinned(3, reg, time.Minute)
	}
	w.court.removeCopy(1, 1)
	if !w.eventually(time.Now().Add(10*time.Second), w.healthy) {
		w.fail("M8: node 1 does not free its copy: %s", w.state(time.Now()))
	}
	w.procs[2].kill(true)
	c.pinned(3, c.regs[1][0], time.Minute)
	w.mend(func() { w.revive(2) })
}

// addedAgain: the copy of a node that is away is taken off, and it gets a new one.
func (w *world) addedAgain() {
	c := w.clients[0]
	w.placing = true
	c.pinned(1, c.regs[1][0], time.Minute)
	w.procs[3].kill(true)
	w.await("two in sync", func() bool { return len(w.court.record(1).InSync) == 2 })
	w.court.removeCopy(1, 3)
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	w.court.addCopy(1, 3)
	w.mend(func() { w.revive(3) })
}

// relax gives the volume the policy mirrored-ram.
func (w *world) relax() {
	w.ram[1] = true
	w.court.mu.Lock()
	rec := *w.court.records[1]
	rec.MirroredRAM = true
	w.court.records[1] = &rec
	w.court.publish()
	w.court.mu.Unlock()
	time.Sleep(time.Second)
}

// darken takes the power from both nodes, and gives it back.
func (w *world) darken() {
	w.procs[1].kill(true)
	w.procs[2].kill(true)
	time.Sleep(time.Second)
	w.revive(1)
	w.revive(2)
	w.await("an owner", func() bool { return w.serves(1) || w.serves(2) })
}

// readAll reads all blocks of a host.
func (w *world) readAll(c *client) {
	for _, reg := range c.regs[1] {
		w.await("a read", func() bool { return c.readAt(1, reg, time.Second) || c.readAt(2, reg, time.Second) })
	}
}

// flushedAndDark: all nodes lose power right after a host had its writes flushed.
func (w *world) flushedAndDark() {
	w.relax()
	c := w.clients[0]
	for range 4 {
		w.post(c, 1)()
		c.path, w.wander = 1, 0
		c.flush(1)
		w.darken()
		w.readAll(c)
		if !w.regain(1) {
			return
		}
	}
	w.mend(func() {})
}

// regain waits until both nodes are in sync, and has one of them own. It says whether
// nothing has failed until now.
func (w *world) regain(id replication.NodeID) bool {
	w.await("both in sync", w.healthy)
	if w.failure() == "" && !w.serves(id) {
		w.move(3-id, id)
	}
	return w.failure() == ""
}

// unitAccessAndDark: all nodes lose power right after writes with FUA.
func (w *world) unitAccessAndDark() {
	w.relax()
	c := w.clients[0]
	for n := range 4 {
		for k, reg := range c.regs[1] {
			data := stamp(uint64(n<<8+k), true)
			i := reg.sent(data)
			p, _ := w.processAt(1)
			r := &replication.Request{Op: replication.OpWrite, Off: off(reg), Len: blockBytes, Data: data, FUA: true}
			if c.ask(p.login(c), 1, r) == nil && r.Err == nil {
				reg.good(i)
				reg.secure(i)
			}
		}
		w.darken()
		w.readAll(c)
		if !w.regain(1) {
			return
		}
	}
	w.mend(func() {})
}

// oneDark: one node after the other loses power right after a write: the other one has it,
// and what that one writes alone survives its own loss of power.
func (w *world) oneDark() {
	w.relax()
	c := w.clients[0]
	for _, id := range []replication.NodeID{1, 2, 1, 2} { // each owns in its turn
		w.post(c, id)()
		w.procs[id].kill(true)
		w.await("an owner", func() bool { return w.serves(3 - id) })
		w.readAll(c)
		w.post(c, 3-id)()
		w.procs[3-id].kill(true)
		w.revive(3 - id)
		w.await("an owner", func() bool { return w.serves(3 - id) })
		w.readAll(c)
		w.revive(id)
		if !w.regain(3 - id) {
			return
		}
	}
	w.mend(func() {})
}

// loneInRAM: a replica dies with relaxed writes under way, and then the owner, whose disk is
// slow, loses power: what it acknowledged alone is there.
func (w *world) loneInRAM() {
	w.relax()
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	time.Sleep(time.Second)
	w.setSlow(2, time.Minute)
	w.setSlow(1, 2*time.Second) // a quarter of it for what is only written
	p, _ := w.processAt(1)
	s := p.login(c)
	for i, reg := range c.regs[1] {
		data := stamp(uint64(300+i), true)
		n := reg.sent(data)
		p.submit(s, 1, &replication.Request{Op: replication.OpWrite, Off: off(reg), Len: blockBytes, Data: data}, func(r *replication.Request) {
			if r.Err == nil && p.alone(1) {
				reg.good(n)
				reg.secure(n)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	w.procs[2].kill(false)
	w.soon("node 1 alone", func() bool { return w.status(1).Role == replication.Active && len(w.status(1).InSync) == 1 })
	time.Sleep(1200 * time.Millisecond)
	w.procs[1].kill(true)
	w.setSlow(1, 0)
	w.setSlow(2, 0)
	w.revive(1)
	w.await("node 1 owns", func() bool { return w.serves(1) })
	w.readAll(w.clients[1])
	for _, reg := range c.regs[1] {
		c.readAt(1, reg, 10*time.Second)
	}
	w.mend(func() { w.revive(2) })
}

// stoppedUnnoticed: the flush of what is only written fails, and nothing is written after
// that. A host that reads finds the store stopped: it loses its path, and has no error.
func (w *world) stoppedUnnoticed() {
	w.relax()
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	for range 8 { // each time a coin says by which of two ways the first read goes
		own := w.court.record(1).Owner
		c.pinned(own, reg, time.Minute)
		p, _ := w.processAt(own)
		time.Sleep(time.Second)
		c.pinned(own, reg, time.Minute)
		p.poison.Store(true)
		time.Sleep(time.Second)
		for range 8 { // memory may give what the store does not
			r := &replication.Request{Op: replication.OpRead, Off: off(reg), Len: blockBytes, Data: make([]byte, blockBytes)}
			s := p.login(c)
			if s == nil {
				break
			}
			if err := c.ask(s, 1, r); err == nil && r.Err != nil {
				w.fail("W6: a host that reads from a stopped store gets: %v", r.Err)
			}
		}
		w.readAll(c)
		w.await("both in sync", w.healthy)
		if w.failure() != "" {
			return
		}
	}
	w.mend(func() {})
}

// stoppedEmpty: the store of a node without a copy has stopped when it gets one.
func (w *world) stoppedEmpty() {
	c := w.clients[0]
	w.placing = true
	w.court.removeCopy(1, 3)
	w.await("node 3 frees its copy", w.healthy)
	c.pinned(1, c.regs[1][0], time.Minute)
	p, _ := w.processAt(3)
	p.poison.Store(true)
	w.court.addCopy(1, 3)
	w.mend(func() {})
}

// lyingDisk: a replica's store loses a block that a resync brought.
func (w *world) lyingDisk() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	w.disks[2].lies.Store(1)
	w.revive(2)
	w.await("both in sync", w.healthy)
	if w.disks[2].lies.Load() != 0 {
		w.fail("%s: a block that is lost", wrongScenario)
	}
	w.mend(func() {})
}

// lostBlock: a block that only the owner has is damaged there. The replica stays out of
// sync, so the block is never read as it was before, until it is written again.
func (w *world) lostBlock() {
	w.rot = true
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for _, reg := range c.regs[1] {
		for w.put(c, 1, reg, stamp(uint64(500+reg.no), true)) != nil && w.failure() == "" {
		}
	}
	d := w.disks[1]
	d.mu.Lock()
	d.volumes[1].at[reg.no].rotten = true
	d.mu.Unlock()
	w.revive(2)
	w.await("the loss is told", w.restore[1].Load)
	time.Sleep(8 * time.Second) // it is looked at again meanwhile
	if rec := w.court.record(1); rec.Has(2) {
		w.procs[1].kill(true)
		w.await("node 2 owns", func() bool { return w.serves(2) })
		w.clients[1].readAt(2, reg, 10*time.Second)
		w.fail("Y8: a replica is in sync that lacks a block")
	}
	c.pinned(1, reg, time.Minute) // everything else was copied, and the stream is open
	w.mend(func() {})
}

// hangingDisk: the disk of a replica hangs, while its node answers: the owner goes on
// without it.
func (w *world) hangingDisk() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.setSlow(2, 10*time.Minute)
	if c.pinned(1, c.regs[1][1], 10*time.Second) < 0 {
		w.fail("M1: a replica whose disk hangs keeps its owner waiting: %s", w.state(time.Now()))
	}
	w.procs[2].kill(false)
	w.setSlow(2, 0)
	w.mend(func() { w.revive(2) })
}

// strayAfterSilence: the connection by which a node forwards the command stands still for
// seconds. Its host goes on through another node meanwhile.
func (w *world) strayAfterSilence() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(2, reg, time.Minute)
	w.stallFrom(2, 1, 3*time.Second)
	w.stray(c, 2, reg, replication.OpWrite).arrive()
	time.Sleep(500 * time.Millisecond)
	c.pinned(1, reg, time.Minute)
	time.Sleep(4 * time.Second)
	w.mend(func() {})
}

// givenByAnother: nobody but the owner may give its volume away.
func (w *world) givenByAnother() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	rec := w.court.record(1)
	_, _ = w.court.decide(replication.Change{Volume: 1, Expect: rec.Epoch, Owner: 2, InSync: []replication.NodeID{1, 2}, By: 2})
	time.Sleep(time.Second)
	w.mend(func() {})
}
