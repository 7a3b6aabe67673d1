package sim

import (
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/replication"
)

// Scenarios of leases, take-overs, records and starts (rules L, M, Q and B).

// impatient standbys take an owner for dead when they have not heard of it for half a
// second, long before the leases that they gave it have run out. The volume stands still
// then, and is not served twice: what they wait for before they serve is looked at apart.
func impatient(t *replication.Timing) {
	t.HeadStart = -1800 * time.Millisecond
	t.BootWait = 100 * time.Millisecond
}

// catching has the court not decide what ok picks; the function that it returns ends that.
func (w *world) catching(ok func(replication.Change) bool) (end func()) {
	set := func(f func(replication.Change) bool) {
		w.court.mu.Lock()
		w.court.catch = f
		w.court.mu.Unlock()
	}
	set(ok)
	return func() { set(nil) }
}

// readThroughMove: a read is in its disk when the volume is given away, and reads at last
// what the new owner has not committed. That is lost with the new owner.
func (w *world) readThroughMove() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	w.setSlow(1, 24*time.Second) // six for a read
	p, _ := w.processAt(1)
	n, _ := p.isServing()
	b := reg.begin()
	r := &replication.Request{Op: replication.OpRead, Off: off(reg), Len: blockBytes, Data: make([]byte, blockBytes)}
	r.Done = func(r *replication.Request) {
		if r.Err == nil {
			reg.read(w, b, r.Data, false, c.id)
		}
	}
	n.Volume(1).Submit(r)
	time.Sleep(50 * time.Millisecond)
	w.setSlow(1, 0)
	w.move(1, 2)
	w.await("the new owner serves", func() bool { return w.serves(2) })
	time.Sleep(4 * time.Second)
	w.setSlow(2, time.Minute)
	data, _ := w.faultCut([]cutLink{{2, 3, false}, {3, 2, false}})
	w.open.Go(func() { _ = w.put(c, 2, reg, stamp(82, true)) })
	time.Sleep(1800 * time.Millisecond) // the read ends
	w.procs[2].kill(false)
	w.setSlow(2, 0)
	one := w.cutOff(1, 2, 3)
	w.revive(2)
	w.await("node 3 owns", func() bool { return w.serves(3) })
	w.clients[1].readAt(3, reg, 10*time.Second)
	w.mend(func() { data(); one() })
}

// slowDisks: a write is good when it is on all disks, however long one of them takes.
func (w *world) slowDisks() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.setSlow(1, time.Second)
	_ = w.put(c, 1, c.regs[1][0], stamp(84, true))
	w.setSlow(1, 0)
	for _, slow := range []replication.NodeID{2, 1} {
		w.setSlow(slow, time.Second)
		for i, reg := range c.regs[1] {
			w.open.Go(func() { _ = w.put(c, 1, reg, stamp(uint64(slow)<<8+uint64(i), true)) })
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(3 * time.Second)
		w.setSlow(slow, 0)
	}
	w.mend(func() {})
}

// loneSurvivor: a replica falls silent for good. The owner goes on without it.
func (w *world) loneSurvivor() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.procs[2].kill(true)
	if c.pinned(1, c.regs[1][0], 8*time.Second) < 0 || !c.readAt(1, c.regs[1][0], 8*time.Second) {
		w.fail("M1, L4: the owner does not go on without its replica: %s", w.state(time.Now()))
	}
	w.mend(func() { w.revive(2) })
}

// writeCutOff: an owner that is cut off wants to go on alone, and may not.
func (w *world) writeCutOff() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	heal := w.cutOff(1, 2)
	w.open.Go(func() { _ = w.put(c, 1, c.regs[1][1], stamp(83, true)) })
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[1].readAt(2, c.regs[1][1], 10*time.Second)
	w.mend(heal)
}

// brokenLinks: all connections between two nodes end, and both live.
func (w *world) brokenLinks() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	epoch := w.court.record(1).Epoch
	w.breakLinks()
	time.Sleep(3 * time.Second)
	if rec := w.court.record(1); rec.Epoch != epoch {
		w.fail("L5: links broke, nobody died, and the record has changed from epoch %d to %d", epoch, rec.Epoch)
	}
	w.mend(func() {})
}

// beaconsOfDeposed: an owner is deposed and does not learn of it. A replica goes on
// hearing it, and has to notice that its successor has died.
func (w *world) beaconsOfDeposed() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	time.Sleep(time.Second)
	w.court.mu.Lock()
	told := w.court.subs[1]
	w.court.subs[1] = nil
	w.court.mu.Unlock()
	end := w.catching(func(ch replication.Change) bool { return ch.By == 1 })
	heal, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.await("node 2 owns", func() bool { return w.serves(2) })
	time.Sleep(time.Second)
	w.procs[2].kill(true)
	if !w.eventually(time.Now().Add(10*time.Second), func() bool { return w.serves(3) }) {
		w.fail("L1, W2: nobody takes over from an owner that died: %s", w.state(time.Now()))
	}
	w.mend(func() {
		end()
		heal()
		w.court.mu.Lock()
		w.court.subs[1] = told
		w.court.publish()
		w.court.mu.Unlock()
		w.revive(2)
	})
}

// lateGrants: the grants that an owner gets lie in the network until its replica has
// taken over.
func (w *world) lateGrants() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	control := w.cutOff(1)
	back, _ := w.faultCut([]cutLink{{2, 1, false}})
	time.Sleep(400 * time.Millisecond)
	forth, _ := w.faultCut([]cutLink{{1, 2, false}})
	w.await("node 2 owns", func() bool { return w.serves(2) })
	c.pinned(2, reg, time.Minute)
	back()
	for range 20 {
		w.open.Go(func() { w.clients[1].readAt(1, reg, 100*time.Millisecond) })
		time.Sleep(100 * time.Millisecond)
	}
	w.mend(func() { control(); forth() })
}

// impatientStandby: the owner is cut off, and its replica wants to own at once.
func (w *world) impatientStandby() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	heal := w.cutOff(1, 2)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[0].pinned(2, w.clients[0].regs[1][0], time.Minute)
	time.Sleep(300 * time.Millisecond)
	w.mend(heal)
}

// impatientStart: as impatientStandby, and the grants were given by the process before.
func (w *world) impatientStart() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	control := w.cutOff(1)
	w.procs[2].kill(false)
	data, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.revive(2)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[0].pinned(2, w.clients[0].regs[1][0], time.Minute)
	time.Sleep(300 * time.Millisecond)
	w.mend(func() { control(); data() })
}

// parted cuts the owner, node 1, off from raft and from node 2, which takes over with node
// 3; node 3 hears both.
func (w *world) parted() (heal func()) {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	heal = w.cutOff(1, 2)
	w.soon("node 2 sends the record of its reign", func() bool {
		s := w.status(2)
		return s.Role == replication.Activating && s.InFlight > 0
	})
	return heal
}

// promiseAndCrash: the new owner has a replica's promise, which crashes before it has the
// record of the new reign. When it is back it hears the deposed owner first.
func (w *world) promiseAndCrash() {
	w.setDelay(20 * time.Millisecond)
	heal := w.parted()
	w.procs[3].kill(false)
	time.Sleep(41 * time.Millisecond) // its end comes to node 2, which cannot ask any more whether it is gone
	apart, _ := w.faultCut([]cutLink{{2, 3, false}, {3, 2, false}})
	w.post(w.clients[0], 1)
	w.revive(3)
	time.Sleep(800 * time.Millisecond)
	apart()
	time.Sleep(2 * time.Second)
	w.mend(heal)
}

// promiseAndWrite: the deposed owner writes when a replica has promised to follow the new
// one, and before the record of the new reign is there.
func (w *world) promiseAndWrite() {
	w.setDelay(50 * time.Millisecond)
	w.setSlow(3, 300*time.Millisecond)
	heal := w.parted()
	w.stallFrom(2, 3, 250*time.Millisecond)
	p, _ := w.processAt(1)
	reg := w.clients[0].regs[1][1]
	data := stamp(79, true)
	reg.sent(data)
	p.submit(p.login(w.clients[0]), 1, &replication.Request{Op: replication.OpWrite, Off: off(reg), Len: blockBytes, Data: data}, func(*replication.Request) {})
	time.Sleep(3 * time.Second)
	w.setSlow(3, 0)
	w.mend(heal)
}

// moveFromSlow: the new owner has to wait until the old one, whose disk is slow, has the
// record of the new reign.
func (w *world) moveFromSlow() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.setSlow(1, time.Second)
	w.move(1, 2)
	c.pinned(2, c.regs[1][0], time.Minute)
	w.setSlow(1, 0)
	w.mend(func() {})
}

// uneven: the owner dies when only one of its two replicas has its last write, and node 2
// takes over: the one that is behind is made equal and stays in sync; the one that
// is ahead owns the volume, or is made equal.
func (w *world) uneven(ahead bool) {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	end := w.catching(func(ch replication.Change) bool { return ch.By == 3 })
	without := replication.NodeID(3)
	if ahead {
		without = 2
	}
	heal, _ := w.faultCut([]cutLink{{1, without, false}, {without, 1, false}})
	w.post(w.clients[0], 1)
	time.Sleep(200 * time.Millisecond)
	w.procs[1].kill(false)
	w.await("an owner", func() bool { return w.serves(2) || w.serves(3) })
	if rec := w.court.record(1); !slices.Equal(rec.InSync, []replication.NodeID{2, 3}) {
		w.fail("M3: a replica was only uneven, and is out of the in-sync set: %v", rec.InSync)
	}
	end()
	w.mend(func() { heal(); w.revive(1) })
}

// numbersOfAnother: an owner is cut off with a write under way, for so long that its
// connections end. Then it hears its successor, and nothing of the record.
func (w *world) numbersOfAnother() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	control := w.cutOff(1)
	data, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.open.Go(func() { _ = w.put(c, 1, c.regs[1][1], stamp(81, true)) })
	w.await("node 2 owns", func() bool { return w.serves(2) })
	for _, reg := range w.clients[1].regs[1] {
		w.clients[1].pinned(2, reg, time.Minute)
	}
	time.Sleep(9 * time.Second)
	data()
	time.Sleep(3 * time.Second)
	w.mend(control)
}

// receivedOnly: a replica whose disk is slow has received writes when the in-sync set
// changes, and asks for what comes next.
func (w *world) receivedOnly() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.setSlow(2, 1500*time.Millisecond)
	for i, reg := range c.regs[1][1:] {
		w.open.Go(func() { _ = w.put(c, 1, reg, stamp(uint64(100+i), true)) })
	}
	time.Sleep(20 * time.Millisecond)
	w.procs[3].kill(false)
	time.Sleep(3 * time.Second)
	w.setSlow(2, 0)
	w.mend(func() { w.revive(3) })
}

// lateEviction: the owner wants to drop its replica, and that is decided when the
// replica has taken over and both are in sync again.
func (w *world) lateEviction() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	var caught atomic.Pointer[replication.Change]
	end := w.catching(func(ch replication.Change) bool {
		if ch.By == 1 {
			caught.CompareAndSwap(nil, &ch)
		}
		return ch.By == 1
	})
	heal, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.await("node 2 owns", func() bool { return w.serves(2) })
	end()
	heal()
	w.await("both in sync", w.healthy)
	if _, err := w.court.decide(*caught.Load()); !errors.Is(err, replication.ErrConflict) {
		w.fail("Q: a change that was made from an older record is taken")
	}
	w.mend(func() {})
}

// aloneLook waits for longer than a start takes, and reads if node 2 serves.
func (w *world) aloneLook(reg *register) {
	if w.eventually(time.Now().Add(16*time.Second), func() bool { return w.serves(2) }) {
		w.clients[1].readAt(2, reg, 10*time.Second)
	}
}

// emptiedBeforeGrow: the owner proposes to take its replica in, whose disk is replaced
// before that is decided. The owner dies.
func (w *world) emptiedBeforeGrow() {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	w.clients[0].pinned(1, reg, time.Minute)
	var caught atomic.Pointer[replication.Change]
	end := w.catching(func(ch replication.Change) bool {
		if ch.Grow != 0 {
			caught.CompareAndSwap(nil, &ch)
		}
		return ch.Grow != 0
	})
	w.revive(2)
	w.await("a proposal", func() bool { return caught.Load() != nil })
	w.procs[2].kill(false)
	w.procs[1].kill(true)
	w.replaceDisk(2, newDisk())
	w.revive(2)
	end()
	time.Sleep(time.Second)
	_, _ = w.court.decide(*caught.Load())
	w.aloneLook(reg)
	w.mend(func() { w.revive(1) })
}

func (w *world) replaceDisk(id replication.NodeID, d *disk) {
	w.amnesia.Store(true)
	w.mu.Lock()
	w.disks[id] = d
	w.mu.Unlock()
}

// aloneWith: both nodes die, and only node 2 comes back, which is not in sync, or whose
// disk is new.
func (w *world) aloneWith(emptied bool) {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	if emptied {
		w.procs[1].kill(true)
		w.procs[2].kill(false)
		w.replaceDisk(2, newDisk())
	} else {
		w.procs[2].kill(false)
		w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
		w.clients[0].pinned(1, reg, time.Minute)
		w.procs[1].kill(true)
	}
	w.revive(2)
	w.aloneLook(reg)
	w.mend(func() { w.revive(1) })
}

// amnesiaThenDeath: the replica comes back with its disk as it was before a write that
// it had acknowledged. A second later the owner dies.
func (w *world) amnesiaThenDeath() {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	d := w.disks[2]
	d.mu.Lock()
	image := d.clone()
	d.mu.Unlock()
	w.clients[0].pinned(1, reg, time.Minute)
	heal, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.procs[2].kill(false)
	w.replaceDisk(2, image)
	w.revive(2)
	time.Sleep(700 * time.Millisecond)
	heal()
	time.Sleep(time.Second)
	w.procs[1].kill(true)
	w.aloneLook(reg)
	w.mend(func() { w.revive(1) })
}

// loneRestart: a lone owner, whose disk is slow, dies while the replica that it fills has
// more of the stream on disk than it has itself.
func (w *world) loneRestart() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	stands := w.meta(1, 1).Durable.Seq
	w.setSlow(2, 100*time.Millisecond)
	w.setSlow(1, 600*time.Millisecond)
	w.revive(2)
	w.soon("the stream is open", func() bool { return w.meta(2, 1).Durable.Seq >= stands })
	w.post(c, 1)
	w.soon("the replica has a write", func() bool { return w.meta(2, 1).Durable.Seq > stands+3 })
	w.procs[1].kill(false)
	w.setSlow(1, 0)
	w.setSlow(2, 0)
	w.revive(1)
	w.await("node 1 owns", func() bool { return w.serves(1) })
	for _, reg := range w.clients[1].regs[1] {
		w.clients[1].pinned(1, reg, time.Minute)
	}
	w.mend(func() {})
}

// staleStart: a lone owner takes its replica in, and dies before it hears that. It starts
// again where it reaches nobody, while the replica owns the volume.
func (w *world) staleStart() {
	reg := w.clients[0].regs[1][0]
	decide := w.takeInLate(reg)
	w.procs[1].kill(true)
	heal := w.cutOff(1, 2)
	decide()
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[2].pinned(2, w.clients[2].regs[1][0], time.Minute)
	w.revive(1)
	w.clients[1].readAt(1, w.clients[2].regs[1][0], 2*time.Second)
	time.Sleep(3 * time.Second)
	w.mend(heal)
}

// moveUnderWay: a volume is to be given away while the replica takes four seconds for a
// write. The host of the write must not notice.
func (w *world) moveUnderWay() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.setSlow(2, 4*time.Second)
	w.open.Go(func() {
		if err := w.put(c, 1, c.regs[1][1], stamp(80, true)); err != nil {
			w.fail("M6: a planned move ended a command with: %v", err)
		}
	})
	time.Sleep(50 * time.Millisecond)
	p, _ := w.processAt(1)
	n, _ := p.isServing()
	ctx, cancel := timeout(10 * time.Second)
	_ = n.Volume(1).MoveTo(ctx, 2)
	cancel()
	time.Sleep(4 * time.Second)
	w.setSlow(2, 0)
	w.mend(func() {})
}
