package sim

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// The records of snapshots, their deletion, and rollbacks (C6, C7).

// firstSnapshot is the first id that is handed out.
const firstSnapshot = lsfs.VolumeID(1000)

// snapshotRecord is what raft holds of a snapshot. While it is pending, nobody knows
// whether it was taken; the owner is asked (FindSnapshot).
type snapshotRecord struct {
	of    lsfs.VolumeID
	ready bool
}

// pending records that a snapshot is about to be taken, and hands out its id.
func (c *court) pending(vol lsfs.VolumeID) lsfs.VolumeID {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := firstSnapshot + lsfs.VolumeID(c.ids)
	c.ids++
	c.snaps[id] = &snapshotRecord{of: vol}
	c.publish()
	return id
}

// taken ends that: the snapshot is ready, or its record goes.
func (c *court) taken(id lsfs.VolumeID, good bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.snaps[id] == nil {
		return
	}
	if good {
		c.snaps[id] = &snapshotRecord{of: c.snaps[id].of, ready: true}
	} else {
		delete(c.snaps, id)
	}
	c.publish()
}

// listed are the ids of recorded snapshots, ready or pending.
func (c *court) listed(ready bool) (list []lsfs.VolumeID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, x := range c.snaps {
		if x.ready == ready {
			list = append(list, id)
		}
	}
	slices.Sort(list)
	return list
}

// known is what a node knows that reads the records now.
func (c *court) known() replication.KnownSnapshots {
	c.mu.Lock()
	defer c.mu.Unlock()
	of := map[lsfs.VolumeID]lsfs.VolumeID{}
	for id, x := range c.snaps {
		of[id] = x.of
	}
	return replication.KnownSnapshots{Next: firstSnapshot + lsfs.VolumeID(c.ids), Of: func(id lsfs.VolumeID) lsfs.VolumeID { return of[id] }}
}

func (c *court) snapshotOf(id lsfs.VolumeID) lsfs.VolumeID {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x := c.snaps[id]; x != nil {
		return x.of
	}
	return 0
}

// ownerOf is a volume at its owner, nil when that does not run.
func (w *world) ownerOf(vol lsfs.VolumeID) (*replication.Volume, *process) {
	p, _ := w.processAt(w.court.record(vol).Owner)
	if p == nil || p.isPaused() {
		return nil, nil
	}
	n, ok := p.isServing()
	if !ok {
		return nil, nil
	}
	return n.Volume(vol), p
}

// settle asks the owners for snapshots of which nobody knows whether they were taken.
func (w *world) settle() {
	for _, id := range w.court.listed(false) {
		v, _ := w.ownerOf(w.court.snapshotOf(id))
		if v == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		found, err := v.FindSnapshot(ctx, id)
		cancel()
		if err == nil {
			w.note("settled", uint64(id), b2u(found))
			w.court.taken(id, found)
		}
	}
}

// recorded says that every node that has a copy has the snapshots that are recorded, and
// no others.
func (w *world) recorded() bool {
	if len(w.court.listed(false)) > 0 {
		return false
	}
	ready := w.court.listed(true)
	for _, rec := range w.court.all() {
		var want []lsfs.VolumeID
		for _, id := range ready {
			if w.court.snapshotOf(id) == rec.Volume {
				want = append(want, id)
			}
		}
		for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
			w.mu.Lock()
			d := w.disks[id]
			w.mu.Unlock()
			d.mu.Lock()
			var has []lsfs.VolumeID
			for _, x := range d.snapshotsOf(rec.Volume) {
				has = append(has, x.id)
			}
			d.mu.Unlock()
			slices.Sort(has)
			if copyOn(&rec, id) < 0 {
				if len(has) > 0 {
					return false
				}
			} else if !slices.Equal(has, want) {
				return false
			}
		}
	}
	return true
}

// rollTo makes the volume on a disk what its snapshot is (C7).
func (d *disk) rollTo(v *diskVolume, op *lsfs.Op) error {
	x := d.snaps[op.Snapshot]
	if x == nil || x.forged || x.of != op.Volume {
		return lsfs.ErrNoVolume
	}
	for no := range lsfs.BlockNo(volumeBlocks) {
		if v.at[no] != x.at[no] {
			d.set(v, no, x.at[no])
		}
	}
	for chunk := range uint32(volumeBlocks / 256) {
		v.versions[chunk] = op.ID.Seq
	}
	v.blocks = x.blocks
	return nil
}

// quiet keeps hosts out of the steps that they take.
type quiet struct {
	mu     sync.Mutex
	moved  *sync.Cond
	inside int
	shut   bool
}

func newQuiet() *quiet {
	q := &quiet{}
	q.moved = sync.NewCond(&q.mu)
	return q
}

func (q *quiet) enter() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.shut {
		q.moved.Wait()
	}
	q.inside++
}

func (q *quiet) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inside--
	q.moved.Broadcast()
}

// begin waits until nobody is inside, and lets nobody in until end.
func (q *quiet) begin() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.shut = true
	for q.inside > 0 {
		q.moved.Wait()
	}
}

func (q *quiet) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.shut = false
	q.moved.Broadcast()
}

// turn notes that somebody else than the writer is about to change the block.
func (r *register) turn() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.turns++
	r.fixed = -1
}

// rollBack makes a volume what one of its snapshots is, while no host has a command under
// way: each has found out before what became of those that it lost. It takes effect on all
// blocks or on none.
func (w *world) rollBack(id lsfs.VolumeID) {
	vol := w.court.snapshotOf(id)
	w.hosts.begin()
	defer w.hosts.end()
	type block struct {
		reg       *register
		i         int
		different bool
	}
	learn := func() bool {
		for _, c := range w.clients {
			for _, half := range [][]*register{c.regs[vol][:runBlocks], c.regs[vol][runBlocks:]} {
				if _, ok := c.known(half); !ok {
					return false
				}
			}
		}
		return true
	}
	if !learn() {
		return
	}
	v, p := w.ownerOf(vol)
	if v == nil || w.over() {
		return
	}
	var blocks []block
	d := p.store.disk
	d.mu.Lock()
	x := d.snaps[id]
	if x == nil || x.forged {
		d.mu.Unlock()
		return
	}
	for _, c := range w.clients {
		for _, reg := range c.regs[vol] {
			data := hole
			if b := x.at[reg.no]; b != nil {
				var err error
				if data, _, err = b.decode(); err != nil {
					d.mu.Unlock()
					return
				}
			}
			now, _ := reg.settled()
			blocks = append(blocks, block{reg, reg.sent(data), sum(now) != sum(data)})
		}
	}
	d.mu.Unlock()
	for _, b := range blocks {
		b.reg.turn()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	err := v.RollBack(ctx, id)
	cancel()
	w.note("rollback", uint64(vol), uint64(id), b2u(err == nil))
	w.logf("rollback of volume %d to snapshot %d: %v", vol, id, err)
	switch {
	case err == nil:
		for _, b := range blocks {
			b.reg.good(b.i)
			b.reg.secure(b.i)
		}
	case errors.Is(err, replication.ErrNotOwner), errors.Is(err, replication.ErrNoSnapshot):
		for _, b := range blocks {
			b.reg.refused(b.i)
		}
	default:
		for !learn() {
			if w.over() {
				return
			}
		}
		done, not := 0, 0
		for _, b := range blocks {
			switch {
			case !b.different:
			case b.reg.begin().floor == b.i:
				done++
			default:
				not++
			}
		}
		if done > 0 && not > 0 {
			w.fail("C7: the rollback of volume %d to snapshot %d has happened on %d blocks, and not on %d", vol, id, done, not)
		}
	}
	for _, b := range blocks {
		b.reg.turn()
	}
}
