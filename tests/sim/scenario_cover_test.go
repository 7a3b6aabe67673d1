package sim

import (
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Scenarios in which a rule covers another one, and of power that is lost in the middle of
// a resync.

// darkWhileFilled: a replica whose tail is taken off loses power when the last record of
// a chunk, which takes several, is in the log and not flushed. It loses that one alone.
func (w *world) darkWhileFilled() {
	c := w.clients[0]
	c.pinned(1, c.regs[1][0], time.Minute)
	heal := w.cutOff(1, 2)
	w.post(c, 1) // in chunks where nobody writes afterwards
	w.await("node 2 owns", func() bool { return w.serves(2) })
	d := w.disks[1]
	w.unflushed = time.Minute
	w.setSlow(1, 200*time.Millisecond)
	heal()
	last := lsfs.BlockNo(0)
	w.soon("a chunk is in the log", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		if n := len(d.loose); n > 1 {
			last = d.loose[n-1].start
		}
		return last != 0
	})
	if last%256 == 0 {
		w.fail("%s: a chunk of several records", wrongScenario)
	}
	w.mu.Lock()
	w.dark = func(int) int { return 1 }
	w.mu.Unlock()
	w.procs[1].kill(true)
	w.unflushed = 200 * time.Millisecond
	w.setSlow(1, 0)
	time.Sleep(time.Second)
	w.revive(1)
	w.mend(func() {})
}

// candidateHears: what the owner writes drips over a slow link to one of two replicas, which hears
// no beacons that count, and takes over while it is still coming. Its disk is slow. The
// other replica hears nothing.
func (w *world) candidateHears() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	data, _ := w.faultCut([]cutLink{{2, 1, false}, {1, 3, false}, {3, 1, false}})
	old, court := w.cutOff(1), w.cutOff(2)
	end := w.catching(func(ch replication.Change) bool { return ch.By == 3 })
	w.net.mu.Lock()
	w.net.rate = 24 << 10
	w.net.mu.Unlock()
	w.setSlow(2, 800*time.Millisecond)
	for i, c := range w.clients { // eight seconds of it
		for k, reg := range c.regs[1] {
			w.open.Go(func() { _ = w.put(c, 1, reg, stamp(uint64(i<<8+k), true)) })
		}
	}
	w.await("a candidate", func() bool { return w.status(2).Role == replication.Candidate })
	time.Sleep(2 * time.Second) // what it took before is stored
	court()
	w.soon("it becomes owner", func() bool { return w.status(2).Role == replication.Activating })
	w.net.mu.Lock()
	w.net.rate = 1 << 30
	w.net.mu.Unlock()
	if !w.eventually(time.Now().Add(30*time.Second), func() bool { return w.serves(2) }) {
		w.fail("I20: node 2 does not become owner: %s", w.state(time.Now()))
	}
	end()
	w.setSlow(2, 0)
	w.mend(func() { data(); old() })
}

// breakLinks ends all connections between nodes with an error.
func (w *world) breakLinks() {
	w.net.mu.Lock()
	defer w.net.mu.Unlock()
	for _, c := range w.net.conns {
		for _, e := range c.ends {
			e.timeOut()
		}
	}
}

// beginsAsSnapshot: a volume begins as a snapshot that the node which is away has, too, and which
// is deleted as soon as the owner has begun. With lost the owner finds no snapshot when it
// makes its copy, so it must not serve.
func (w *world) beginsAsSnapshot(lost bool) {
	c := w.clients[0]
	for _, reg := range c.regs[1] {
		c.pinned(1, reg, time.Minute)
	}
	origin := w.court.pending(1)
	if err := w.takeSnapshot(1, origin); err != nil {
		w.fail("a snapshot ends with: %v", err)
		return
	}
	w.court.taken(origin, true)
	for _, reg := range c.regs[1][:runBlocks] {
		c.pinned(1, reg, time.Minute)
	}
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	if lost {
		w.procs[1].kill(false)
	}
	if !w.bear(origin) {
		w.fail("%s: a volume is born", wrongScenario)
		return
	}
	if lost {
		d := w.disks[1]
		d.mu.Lock()
		d.forget(d.snaps[origin])
		d.mu.Unlock()
		w.revive(1)
		time.Sleep(20 * time.Second)
		p, _ := w.processAt(1)
		if n, ok := p.isServing(); ok && n.Volume(2) != nil && n.Volume(2).Serving() {
			w.fail("C8: node 1 serves volume 2, which begins as a snapshot that node 1 does not have")
		}
		w.finish()
		return
	}
	w.await("it has begun", func() bool { return !w.begins(origin) })
	w.court.taken(origin, false)
	for _, reg := range c.regs[2][runBlocks:] {
		c.pinned(1, reg, time.Minute)
	}
	w.revive(2)
	for _, reg := range c.regs[2] {
		w.clients[1].readAt(1, reg, 10*time.Second)
	}
	w.mend(func() {})
	w.unchanged()
}
