package sim

import (
	"errors"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/replication/wire"
)

// Volumes of the policy mirrored-ram (W6). Their writes are relaxed: done when they are
// written to the log, and flushed by the store itself a little later. What is written and
// not flushed survives the process, and a loss of power takes a part of it from the end:
// what is left of the log is a prefix.
//
// A host may find such a loss only after a node that lost something became owner: court
// tells the registers then (register.lose). All that is durable stays even so: what was
// acknowledged before a flush was asked for that was answered, what was written with FUA,
// what is no write, and what was acknowledged by an owner that was alone.

// relaxed is an operation that is written and not flushed, with what it replaced.
type relaxed struct {
	volume   lsfs.VolumeID
	start    lsfs.BlockNo
	old      []*content
	first    uint32 // chunk
	versions []lsfs.Seq
	durable  lsfs.OpID
}

// remember notes what an operation is about to replace. Called with mu.
func (d *disk) remember(op *lsfs.Op) {
	v := d.volumes[op.Volume]
	if v == nil || op.Count == 0 {
		return
	}
	x := relaxed{volume: op.Volume, start: op.Start, durable: v.meta.Durable, first: uint32(op.Start / wire.ChunkBlocks)}
	end := op.Start + lsfs.BlockNo(op.Count)
	for no := op.Start; no < end; no++ {
		x.old = append(x.old, v.at[no])
	}
	for c := x.first; lsfs.BlockNo(c) <= (end-1)/wire.ChunkBlocks; c++ {
		x.versions = append(x.versions, v.versions[c])
	}
	d.loose = append(d.loose, x)
}

// undo takes the newest operation that is not flushed back.
func (d *disk) undo() lsfs.VolumeID {
	x := d.loose[len(d.loose)-1]
	d.loose = d.loose[:len(d.loose)-1]
	v := d.volumes[x.volume]
	for i, c := range x.old {
		if c != nil { // the log still has it
			if d.contents[c.fp] == nil {
				d.contents[c.fp] = c
			}
			d.byID[c.id] = c
		}
		d.set(v, x.start+lsfs.BlockNo(i), c)
	}
	for i, s := range x.versions {
		if c := x.first + uint32(i); s == 0 {
			delete(v.versions, c)
		} else {
			v.versions[c] = s
		}
	}
	v.meta.Durable = x.durable
	return x.volume
}

// flushed notes that the first n of the operations that are not flushed are.
func (d *disk) flushed(n int) {
	d.loose = d.loose[n:]
	d.flushes += n
}

// flushLater flushes the log again and again until nothing waits for it.
func (s *store) flushLater() {
	for {
		time.Sleep(s.w.unflushed)
		s.p.gate()
		s.mu.Lock()
		until := s.disk.flushes + len(s.disk.loose)
		s.mu.Unlock()
		time.Sleep(s.w.flushDelay(s.p.id))
		s.p.gate()
		s.mu.Lock()
		if s.dead || s.poisoned {
			s.mu.Unlock()
			return
		}
		if s.p.poison.Swap(false) {
			s.poisoned = true
			s.w.note("poisoned", uint64(s.p.id))
			s.mu.Unlock()
			return
		}
		s.disk.flushed(max(0, until-s.disk.flushes))
		if len(s.disk.loose) == 0 {
			s.flushing = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
	}
}

// blackout takes a part of what is not flushed away, and says whether nothing was. Called
// with mu.
func (s *store) blackout(r *random) (nothing bool) {
	n := r.n(len(s.disk.loose) + 1)
	s.w.mu.Lock()
	if s.w.dark != nil {
		n = s.w.dark(n)
	}
	s.w.mu.Unlock()
	for range n {
		s.w.lost(s.p.id, s.disk.undo())
	}
	if n > 0 {
		s.w.note("unflushed-lost", uint64(s.p.id), uint64(n))
	}
	return n == 0
}

// lost notes that a node has lost something of a volume that it had acknowledged.
func (w *world) lost(id replication.NodeID, vol lsfs.VolumeID) {
	epoch := w.court.record(vol).Epoch
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lossy[id][vol] = epoch
}

// mayLack says whether a node may have lost what is acknowledged just now: the answer was on its way
// when the node that gave it lost its power.
func (w *world) mayLack(id replication.NodeID, vol lsfs.VolumeID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, is := w.lossy[id][vol]
	return is && w.ram[vol]
}

// whole notes that a node has everything of a volume that there was when a reign began.
func (w *world) whole(id replication.NodeID, vol lsfs.VolumeID, reign lsfs.Epoch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at, is := w.lossy[id][vol]; is && at < reign {
		delete(w.lossy[id], vol)
	}
}

// owned looks at a record that has just changed: an owner that lost something may show
// its hosts an older moment.
func (w *world) owned(rec *replication.Record) {
	w.mu.Lock()
	_, shows := w.lossy[rec.Owner][rec.Volume]
	for id := range w.lossy {
		if !rec.Has(replication.NodeID(id)) {
			delete(w.lossy[id], rec.Volume)
		}
	}
	w.mu.Unlock()
	if !shows {
		return
	}
	w.note("loss-shows", uint64(rec.Volume), uint64(rec.Owner))
	for _, c := range w.clients {
		for _, reg := range c.regs[rec.Volume] {
			reg.lose()
		}
	}
}

// lose notes that what was acknowledged and is not durable may be gone.
func (r *register) lose() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.losses++
	r.floor, r.fixed = r.firm, -1
}

// secure notes that version i is durable wherever it counts.
func (r *register) secure(i int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.firm = max(r.firm, i)
	r.floor = max(r.floor, r.firm)
}

// alone says whether an owner acknowledges with its own copy only, as far as it knows.
func (p *process) alone(vol lsfs.VolumeID) bool {
	n, ok := p.isServing()
	if !ok || n.Volume(vol) == nil {
		return false
	}
	s := n.Volume(vol).Status()
	return s.Owner == p.id && s.Role == replication.Active && len(s.InSync) == 1
}

// flush makes what was acknowledged durable: SYNCHRONIZE CACHE.
func (c *client) flush(v int) {
	type mark struct {
		reg *register
		i   int
	}
	var marks []mark
	for _, x := range c.w.clients {
		for _, reg := range x.regs[v] {
			b := reg.begin()
			marks = append(marks, mark{reg, b.floor})
		}
	}
	losses := c.regs[v][0].begin().losses
	_, err := c.do(lsfs.VolumeID(v), func() *replication.Request { return &replication.Request{Op: replication.OpFlush} })
	switch {
	case err == nil:
		c.w.note("flushed", uint64(c.id), uint64(v))
		for _, m := range marks {
			if c.regs[v][0].begin().losses == losses { // else it was of what is left
				m.reg.secure(m.i)
			}
		}
	case !errors.Is(err, errLost) && !errors.Is(err, replication.ErrReserved):
		c.w.fail("volume %d: a flush failed: %v", v, err)
	}
}
