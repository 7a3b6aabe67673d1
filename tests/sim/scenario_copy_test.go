package sim

import (
	"context"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Scenarios of resync and of clones (rules Y and C4).

func timeout(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// replicasTail: the owner is cut off with writes that only it has, in chunks where its
// successor writes nothing.
func (w *world) replicasTail() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	heal := w.cutOff(1, 2)
	w.post(c, 1)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.mend(heal)
}

// refill kills node 2, has a host write to all its blocks, and starts node 2 again.
func (w *world) refill(c *client) {
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	w.setSlow(2, 100*time.Millisecond)
	w.revive(2)
}

// killedWhileFilled: a replica dies when it has taken the owner's number, and before it
// has what lies below it.
func (w *world) killedWhileFilled() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	w.refill(c)
	stands := w.meta(1, 1).Durable.Seq
	w.soon("the stream is open", func() bool { return w.meta(2, 1).Durable.Seq >= stands })
	w.procs[2].kill(false)
	w.setSlow(2, 0)
	w.revive(2)
	w.mend(func() {})
}

// storedLate: the owner, whose disk is slow, has given a number to a write and does not
// have it on its disk when it begins to fill its replica.
func (w *world) storedLate() {
	c := w.clients[0]
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	w.setDelay(60 * time.Millisecond)
	w.setSlow(2, 100*time.Millisecond)
	w.revive(2)
	w.soon("the filling begins", func() bool { return w.meta(2, 1).Inconsistent })
	w.setSlow(1, 2*time.Second)
	w.post(c, 1)
	time.Sleep(3 * time.Second)
	w.setSlow(1, 0)
	w.setSlow(2, 0)
	w.mend(func() {})
}

// writesWhileFilled: a host writes to a chunk that is being copied. Its writes come to the
// replica at once, and to the owner's disk, which is slow, later.
func (w *world) writesWhileFilled() {
	c := w.clients[0]
	regs := c.regs[1][runBlocks:]
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for _, reg := range regs {
		c.pinned(1, reg, time.Minute)
	}
	stands := w.meta(1, 1).Durable.Seq
	w.setSlow(1, 800*time.Millisecond) // and 200 ms for a read
	w.revive(2)
	w.soon("the stream is open", func() bool { return w.meta(2, 1).Durable.Seq >= stands })
	for i, reg := range regs {
		w.open.Go(func() { _ = w.put(c, 1, reg, stamp(uint64(200+i), true)) })
		time.Sleep(20 * time.Millisecond)
	}
	w.await("both in sync", w.healthy)
	w.setSlow(1, 0)
	w.mend(func() {})
}

// clone makes one run of a host equal to another one of it, by reference, and says whether
// it was.
func (w *world) clone(c *client, dst, src []*register) bool {
	contents, ok := c.known(src)
	if !ok {
		return false
	}
	p, _ := w.processAt(1)
	var versions []int
	for i, reg := range dst {
		versions = append(versions, reg.sent(contents[i]))
	}
	r := &replication.Request{Op: replication.OpClone, Off: off(dst[0]), Len: uint64(len(dst)) * blockBytes, Source: src[0].vol, SourceOff: off(src[0])}
	if err := c.ask(p.login(c), dst[0].vol, r); err != nil {
		return false
	}
	for i, reg := range dst {
		if r.Err == nil {
			reg.good(versions[i])
		} else {
			reg.refused(versions[i])
		}
	}
	return r.Err == nil
}

// cloneWhileFilled: inside a volume, a chunk that the replica has is made equal to one that
// it lacks.
func (w *world) cloneWhileFilled() {
	c := w.clients[0]
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for _, reg := range c.regs[1][:runBlocks] {
		c.pinned(1, reg, time.Minute)
	}
	w.fill(1, 72, 112)
	w.setSlow(1, 3*time.Second) // a quarter of it for each block that is read to be copied
	w.revive(2)
	stands := w.meta(1, 1).Durable.Seq
	w.soon("the stream is open", func() bool { return w.meta(2, 1).Durable.Seq >= stands })
	time.Sleep(500 * time.Millisecond)
	for !w.clone(c, c.regs[1][runBlocks:][:4], c.regs[1][:4]) && w.failure() == "" {
		time.Sleep(20 * time.Millisecond)
	}
	w.setSlow(1, 0)
	w.mend(func() {})
}

// fill writes to every second block of a part of a volume: much to copy for a resync.
func (w *world) fill(vol lsfs.VolumeID, start, blocks lsfs.BlockNo) {
	p, _ := w.processAt(1)
	s := p.login(w.clients[2])
	for no := start; no < start+blocks; no += 2 {
		done := make(chan struct{})
		p.submit(s, vol, &replication.Request{Op: replication.OpWrite, Off: uint64(no) * blockBytes, Len: blockBytes, Data: stamp(uint64(no), true)}, func(*replication.Request) { close(done) })
		<-done
	}
}

// cloneFromFilled: one volume is in sync already, and is made equal to a part of another
// one that the replica lacks.
func (w *world) cloneFromFilled() {
	c := w.clients[0]
	src, dst := c.regs[2][runBlocks:][:4], c.regs[1][:4]
	c.pinned(1, dst[0], time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync)+len(w.court.record(2).InSync) == 2 })
	for _, reg := range src {
		c.pinned(1, reg, time.Minute)
	}
	w.fill(2, 520, 160)
	w.setSlow(1, 200*time.Millisecond) // a quarter of it for each block that is read to be copied
	w.revive(2)
	w.soon("the volume of the clone is in sync", func() bool { return len(w.court.record(1).InSync) == 2 })
	if len(w.court.record(2).InSync) == 2 {
		w.fail("the scenario is wrong: the source is in sync first")
	}
	w.clone(c, dst, src)
	time.Sleep(time.Second)
	w.setSlow(1, 0)
	w.mend(func() {})
}

// cloneOfWritten: blocks are cloned into another volume while they are overwritten with
// contents of which a replica has to ask for one now and then.
func (w *world) cloneOfWritten() {
	c := w.clients[0]
	p, _ := w.processAt(1)
	s := p.login(c)
	do := func(vol lsfs.VolumeID, r *replication.Request) chan struct{} {
		done := make(chan struct{})
		p.submit(s, vol, r, func(*replication.Request) { close(done) })
		return done
	}
	write := func(no int, data []byte) chan struct{} {
		return do(1, &replication.Request{Op: replication.OpWrite, Off: uint64(no) * blockBytes, Len: blockBytes, Data: data})
	}
	for i := range 4 {
		<-write(600+i, stamp(uint64(i), true))
	}
	for i := range 200 {
		a := write(500, stamp(uint64(i%4), true))
		b := do(2, &replication.Request{Op: replication.OpClone, Off: uint64(i) * blockBytes, Len: blockBytes, Source: 1, SourceOff: 500 * blockBytes})
		<-a
		<-b
	}
	w.mend(func() {})
}

// takeSnapshot takes a snapshot at a node.
func (w *world) takeSnapshot(at replication.NodeID, id lsfs.VolumeID) error {
	p, _ := w.processAt(at)
	n, _ := p.isServing()
	ctx, cancel := timeout(time.Second)
	defer cancel()
	return n.Volume(1).TakeSnapshot(ctx, id)
}

// snapshotsWhileFilled: one snapshot is taken while the replica is away, and more when it
// is filled.
func (w *world) snapshotsWhileFilled() {
	c := w.clients[0]
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	for i, reg := range c.regs[1] {
		if i == runBlocks {
			if err := w.takeSnapshot(1, 1000); err != nil {
				w.fail("a snapshot of a lone owner ends with: %v", err)
			}
		}
		c.pinned(1, reg, time.Minute)
	}
	w.setSlow(2, 100*time.Millisecond)
	stands := w.meta(1, 1).Durable.Seq
	w.revive(2)
	w.soon("the stream is open", func() bool { return w.meta(2, 1).Durable.Seq >= stands })
	for id := lsfs.VolumeID(1001); id < 1004; id++ {
		_ = w.takeSnapshot(1, id)
		time.Sleep(50 * time.Millisecond)
	}
	w.await("both in sync", w.healthy)
	w.setSlow(2, 0)
	w.mend(func() {})
}

// snapshotOfDeposed: an owner that is cut off gives a number to a snapshot that nobody
// else ever hears of.
func (w *world) snapshotOfDeposed() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	if err := w.takeSnapshot(1, 1000); err != nil {
		w.fail("a snapshot ends with: %v", err)
	}
	heal := w.cutOff(1, 2)
	if err := w.takeSnapshot(1, 1001); err == nil {
		w.fail("a snapshot of an owner that is cut off is good")
	}
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.mend(heal)
}

// snapshotDeleted: a snapshot is deleted while a replica is away, and another one was never
// recorded: neither stays anywhere.
func (w *world) snapshotDeleted() {
	c := w.clients[0]
	for _, reg := range c.regs[1][:3] {
		c.pinned(1, reg, time.Minute)
		w.take(1)
	}
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	ready := w.court.listed(true)
	if len(ready) != 3 {
		w.fail("%s: three snapshots", wrongScenario)
		return
	}
	w.court.taken(ready[1], false)
	id := w.court.pending(1)
	if err := w.takeSnapshot(1, id); err != nil {
		w.fail("a snapshot of a lone owner ends with: %v", err)
	}
	w.court.taken(id, false)
	c.pinned(1, c.regs[1][4], time.Minute)
	w.revive(2)
	w.await("both in sync", w.healthy)
	if !w.eventually(time.Now().Add(20*time.Second), w.recorded) {
		w.fail("C6: nodes have other snapshots than are recorded")
	}
	w.mend(func() {})
}

// rolledBackUnder: a volume is rolled back while a command reads what it changes a part of.
func (w *world) rolledBackUnder() {
	c, reg := w.clients[0], w.clients[0].regs[1][0]
	c.pinned(1, reg, time.Minute)
	first, _ := reg.settled()
	w.take(1)
	c.pinned(1, reg, time.Minute)
	merged, _ := reg.settled()
	merged = append([]byte(nil), merged...)
	sector := stamp(83, true)[:512]
	copy(merged, sector)
	w.setSlow(1, 4*time.Second) // one for a read
	i := reg.sent(merged)
	p, _ := w.processAt(1)
	p.submit(p.login(c), 1, &replication.Request{Op: replication.OpWriteSame, Off: off(reg), Len: 512, Data: sector}, func(r *replication.Request) {
		if r.Err == nil {
			reg.good(i)
		}
	})
	time.Sleep(50 * time.Millisecond)
	w.setSlow(1, 0)
	v, _ := w.ownerOf(1)
	ready := w.court.listed(true)
	if v == nil || len(ready) != 1 {
		w.fail("%s: a snapshot", wrongScenario)
		return
	}
	rolled := reg.sent(first)
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	if err := v.RollBack(ctx, ready[0]); err != nil {
		w.fail("C7: a rollback ends with: %v", err)
	}
	reg.good(rolled)
	time.Sleep(2 * time.Second)
	c.readAt(1, reg, 10*time.Second)
	w.mend(func() {})
}

// groupsOfWritten: two volumes are snapshot as a group again and again, while a host
// writes to one and then to the other.
func (w *world) groupsOfWritten() {
	w.think = 4 * time.Millisecond
	w.setSlow(2, 10*time.Millisecond)
	w.open.Go(w.chain)
	good := 0
	for range 60 {
		time.Sleep(w.clientRandom.between(10*time.Millisecond, 50*time.Millisecond))
		if w.failure() == "" && w.takeGroup() {
			good++
		}
	}
	if good < 40 {
		w.fail("%s: enough groups, only %d", wrongScenario, good)
	}
	w.setSlow(2, 0)
	w.mend(func() {})
}
