package sim

import (
	"context"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// fault is one kind of fault: it strikes, and returns how it heals (nil: by itself).
type fault struct {
	name   string
	weight int
	strike func(w *world) (heal func(), after time.Duration)
}

// kinds are all faults. A seed turns a random subset on.
var kinds = []fault{
	{"kill", 4, func(w *world) (func(), time.Duration) { return w.faultKill(w.anyNode(), false) }},
	{"power", 2, func(w *world) (func(), time.Duration) { return w.faultKill(w.anyNode(), true) }},
	{"kill-all", 1, func(w *world) (func(), time.Duration) {
		for id := 1; id <= w.nodes; id++ {
			heal, after := w.faultKill(replication.NodeID(id), w.faultRandom.chance(0.5))
			w.later(heal, after)
		}
		return nil, 0
	}},
	{"pause", 4, func(w *world) (func(), time.Duration) {
		p, _ := w.processAt(w.anyNode())
		if p == nil || !p.pause() {
			return nil, 0
		}
		d := w.span(20 * time.Second)
		w.note("pause", uint64(p.id), uint64(d))
		w.court.disturb()
		return func() { w.note("resume", uint64(p.id)); p.unpause() }, d
	}},
	{"cut-data", 3, func(w *world) (func(), time.Duration) { return w.faultCut(w.anyPair(true, false)) }},
	{"cut-one-way", 3, func(w *world) (func(), time.Duration) { return w.faultCut(w.anyPair(false, false)) }},
	{"cut-control", 2, func(w *world) (func(), time.Duration) { return w.faultCut(w.anyPair(w.faultRandom.chance(0.5), true)) }},
	{"isolate", 2, func(w *world) (func(), time.Duration) {
		id := w.anyNode()
		var list []cutLink
		for other := replication.NodeID(1); other <= witness; other++ {
			if other != id && (int(other) <= w.nodes || other == witness) {
				if other != witness {
					list = append(list, cutLink{id, other, false}, cutLink{other, id, false})
				}
				list = append(list, cutLink{id, other, true}, cutLink{other, id, true})
			}
		}
		return w.faultCut(list)
	}},
	{"cut-everything", 1, func(w *world) (func(), time.Duration) { // any subset of directed links of both networks
		var list []cutLink
		for a := replication.NodeID(1); a <= witness; a++ {
			for b := replication.NodeID(1); b <= witness; b++ {
				exists := a != b && (int(a) <= w.nodes || a == witness) && (int(b) <= w.nodes || b == witness)
				if exists && a != witness && b != witness && w.faultRandom.chance(0.4) {
					list = append(list, cutLink{a, b, false})
				}
				if exists && w.faultRandom.chance(0.4) {
					list = append(list, cutLink{a, b, true})
				}
			}
		}
		return w.faultCut(list)
	}},
	{"cut-host", 2, func(w *world) (func(), time.Duration) {
		c, id := w.clients[w.faultRandom.n(len(w.clients))], w.anyNode()
		w.note("cut-host", uint64(c.id), uint64(id))
		w.mu.Lock()
		w.hostCut[c.id][id]++
		w.mu.Unlock()
		return func() {
			w.mu.Lock()
			w.hostCut[c.id][id]--
			w.mu.Unlock()
		}, w.span(20 * time.Second)
	}},
	{"witness", 2, func(w *world) (func(), time.Duration) {
		set := func(up bool) {
			w.court.mu.Lock()
			w.court.witnessUp = up
			w.court.mu.Unlock()
			w.court.disturb()
		}
		w.note("witness-down")
		set(false)
		return func() { set(true) }, w.span(30 * time.Second)
	}},
	{"stall", 3, func(w *world) (func(), time.Duration) {
		w.net.stall(w.faultRandom, w.span(8*time.Second))
		return nil, 0
	}},
	{"slow-disk", 2, func(w *world) (func(), time.Duration) {
		id, by := w.anyNode(), w.faultRandom.between(20*time.Millisecond, 3*time.Second)
		w.note("slow-disk", uint64(id), uint64(by))
		w.mu.Lock()
		w.slow[id] += by
		w.mu.Unlock()
		return func() {
			w.mu.Lock()
			w.slow[id] -= by
			w.mu.Unlock()
		}, w.span(10 * time.Second)
	}},
	{"poison", 1, func(w *world) (func(), time.Duration) {
		if p, _ := w.processAt(w.anyNode()); p != nil {
			w.note("poison", uint64(p.id))
			p.poison.Store(true)
		}
		return nil, 0
	}},
	{"answers", 2, func(w *world) (func(), time.Duration) {
		by := 0.2 + 0.6*float64(w.faultRandom.n(2))
		set := func(x float64) {
			w.court.mu.Lock()
			w.court.lossy += x
			w.court.mu.Unlock()
		}
		w.note("answers-lost", uint64(by*100))
		set(by)
		return func() { set(-by) }, w.span(15 * time.Second)
	}},
	{"move", 4, func(w *world) (func(), time.Duration) {
		vol := lsfs.VolumeID(1 + w.faultRandom.n(w.volumes()))
		rec := w.court.record(vol)
		to := rec.InSync[w.faultRandom.n(len(rec.InSync))]
		p, _ := w.processAt(rec.Owner)
		if p == nil || to == rec.Owner {
			return nil, 0
		}
		if n, ok := p.isServing(); ok {
			if v := n.Volume(vol); v != nil {
				limit := w.span(5 * time.Second)
				w.note("move", uint64(vol), uint64(to))
				p.group.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), limit)
					defer cancel()
					go func() {
						select {
						case <-p.ended:
							cancel()
						case <-ctx.Done():
						}
					}()
					if err := v.MoveTo(ctx, to); err != nil {
						w.logf("node %d does not move volume %d: %v", p.id, vol, err)
					}
				})
			}
		}
		return nil, 0
	}},
	{"rot", 2, func(w *world) (func(), time.Duration) {
		if !w.rot {
			return nil, 0
		}
		// Only one node's copies rot, so that an intact one exists somewhere, or did when
		// it was written. The locks' block is spared: nobody could write it again.
		d := w.disks[w.rotten]
		d.mu.Lock()
		defer d.mu.Unlock()
		ids := make([]lsfs.BID, 0, len(d.byID))
		for id := range d.byID {
			ids = append(ids, id)
		}
		slices.Sort(ids)
		for range min(len(ids), 3) {
			if c := d.byID[ids[w.faultRandom.n(len(ids))]]; c.refs > 0 && !d.holdsLock(c) {
				c.rotten = true
				w.note("rot", uint64(w.rotten), uint64(c.id))
			}
		}
		return nil, 0
	}},
	// The last two take a disk's memory away: only with everything else well, since they
	// cost one of two copies.
	{"wipe", 1, func(w *world) (func(), time.Duration) { return w.faultDisk(false) }},
	{"amnesia", 1, func(w *world) (func(), time.Duration) { return w.faultDisk(true) }},
}

func (w *world) anyNode() replication.NodeID {
	if w.faultRandom.chance(0.5) { // the owner of something
		return w.court.record(lsfs.VolumeID(1 + w.faultRandom.n(w.volumes()))).Owner
	}
	return replication.NodeID(1 + w.faultRandom.n(w.nodes))
}

// span is a duration: often short, sometimes up to limit.
func (w *world) span(limit time.Duration) time.Duration {
	switch w.faultRandom.n(4) {
	case 0:
		return w.faultRandom.between(limit/1000, limit/20)
	case 1, 2:
		return w.faultRandom.between(limit/20, limit/4)
	}
	return w.faultRandom.between(limit/4, limit)
}

// later heals a fault in its time, or when all heal.
func (w *world) later(heal func(), after time.Duration) {
	if heal == nil {
		return
	}
	w.open.Go(func() { w.healed(heal, after) })
}

func (w *world) healed(heal func(), after time.Duration) {
	select {
	case <-time.After(after):
	case <-w.healing:
	}
	heal()
}

func (w *world) faultKill(id replication.NodeID, hostDown bool) (func(), time.Duration) {
	p, _ := w.processAt(id)
	if p == nil {
		return nil, 0
	}
	p.kill(hostDown)
	down := w.span(30 * time.Second)
	if hostDown {
		down += 2 * time.Second
	}
	return func() { w.revive(id) }, down
}

// revive starts a node unless it runs.
func (w *world) revive(id replication.NodeID) {
	if p, _ := w.processAt(id); p == nil && !w.over() {
		w.start(id)
	}
}

// failed ends a process whose store failed; whatever supervises it starts it again.
func (w *world) failed(p *process) {
	if p.isDead() {
		return
	}
	p.kill(false)
	after := w.span(10 * time.Second)
	w.group.Go(func() { w.healed(func() { w.revive(p.id) }, after) }) // it may fail when all that is open is waited for
}

type cutLink struct {
	from, to replication.NodeID
	control  bool
}

// anyPair is a link between two nodes: of data, or of raft's messages; where both use
// one network, of both.
func (w *world) anyPair(bothWays, control bool) (list []cutLink) {
	a := replication.NodeID(1 + w.faultRandom.n(w.nodes))
	b := a
	for b == a {
		b = replication.NodeID(1 + w.faultRandom.n(w.nodes))
	}
	if control && w.faultRandom.chance(0.5) {
		b = witness
		if !bothWays && w.faultRandom.chance(0.5) {
			a, b = b, a
		}
	}
	list = append(list, cutLink{a, b, control})
	if bothWays {
		list = append(list, cutLink{b, a, control})
	}
	return list
}

func (w *world) faultCut(list []cutLink) (func(), time.Duration) {
	each := func(by int) {
		for _, l := range list {
			if l.control || w.oneNetwork {
				w.court.cut(l.from, l.to, by)
			}
			if l.from != witness && l.to != witness && (!l.control || w.oneNetwork) {
				if by > 0 {
					w.net.block(l.from, l.to)
				} else {
					w.net.heal(l.from, l.to)
				}
			}
		}
	}
	for _, l := range list {
		w.note("cut", uint64(l.from), uint64(l.to), b2u(l.control))
	}
	each(1)
	return func() {
		w.note("heal", uint64(len(list)))
		each(-1)
	}, w.span(25 * time.Second)
}

// faultDisk replaces a node's disk by an empty one, or by an older image of itself.
func (w *world) faultDisk(old bool) (func(), time.Duration) {
	if w.faulty.Load() > 0 || !w.healthy() {
		return nil, 0
	}
	w.amnesia.Store(true)
	id := replication.NodeID(1 + w.faultRandom.n(w.nodes))
	d := w.disks[id]
	d.mu.Lock()
	image := d.clone()
	d.mu.Unlock()
	if old {
		time.Sleep(w.faultRandom.between(time.Second, 20*time.Second))
		if !w.healthy() {
			w.amnesia.Store(false)
			return nil, 0
		}
	} else {
		image = newDisk()
	}
	before := w.court.all()
	if p, _ := w.processAt(id); p != nil {
		p.kill(w.faultRandom.chance(0.3))
	}
	w.note("disk-replaced", uint64(id), b2u(old))
	w.mu.Lock()
	w.disks[id] = image
	w.mu.Unlock()
	time.Sleep(w.span(10 * time.Second))
	w.revive(id)
	w.eventually(time.Now().Add(30*time.Second), func() bool { // it is struck (B4)
		now := w.court.all()
		for i := range before {
			if now[i].Epoch == before[i].Epoch && copyOn(&now[i], id) >= 0 {
				return false
			}
		}
		return true
	})
	w.waitHealthy(2 * time.Minute)
	w.amnesia.Store(false)
	return nil, 0
}

// strike runs faults until the time for them is over.
func (w *world) strike(until time.Time) {
	var on []fault
	total := 0
	for _, k := range kinds {
		if w.enabled[k.name] {
			on = append(on, k)
			total += k.weight
		}
	}
	for total > 0 && !w.over() {
		gap := w.faultRandom.exp(w.gap)
		if time.Now().Add(gap).After(until) {
			return
		}
		select {
		case <-time.After(gap):
		case <-w.stop:
			return
		}
		pick := w.faultRandom.n(total)
		for _, k := range on {
			if pick -= k.weight; pick < 0 {
				heal, after := k.strike(w)
				if heal != nil {
					w.faulty.Add(1)
					w.later(func() { heal(); w.faulty.Add(-1) }, after)
				}
				break
			}
		}
	}
}
