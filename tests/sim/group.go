package sim

import (
	"context"
	"errors"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Snapshots of two volumes at one moment (C6). A host writes a number to a block of one
// volume and, when that is acknowledged, to a block of the other one, and then the next
// number: at every moment the first block has what the second one has, or one more.

const (
	chainBlock = 5
	chainHost  = 8
)

// chain is that host.
func (w *world) chain() {
	c := newClient(w, chainHost)
	for n := uint64(1); !w.over(); n++ {
		data := stamp(n<<32|w.seed&0xffffffff, true)
		w.mu.Lock()
		w.links[sum(data)] = n
		w.mu.Unlock()
		for vol := lsfs.VolumeID(1); vol <= 2; vol++ {
			for !w.over() {
				_, err := c.do(vol, func() *replication.Request {
					return &replication.Request{Op: replication.OpWrite, Off: chainBlock * blockBytes, Len: blockBytes, Data: data}
				})
				if err == nil {
					break
				}
				if !errors.Is(err, errLost) {
					w.fail("volume %d: a write ends with: %v", vol, err)
				}
			}
		}
		select {
		case <-time.After(c.r.exp(w.think / 4)):
		case <-w.stop:
		}
	}
}

// takeGroup takes a snapshot of both volumes at one moment, and says whether it is good.
func (w *world) takeGroup() bool {
	var volumes [3]*replication.Volume
	var owners [3]*process
	for vol := lsfs.VolumeID(1); vol <= 2; vol++ {
		if volumes[vol], owners[vol] = w.ownerOf(vol); volumes[vol] == nil {
			return false
		}
	}
	ids := [3]lsfs.VolumeID{1: w.court.pending(1), 2: w.court.pending(2)}
	group := ids[1]
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := volumes[1].Freeze(ctx, group)
	if err == nil {
		err = volumes[2].Freeze(ctx, group)
	}
	for vol := 1; vol <= 2 && err == nil; vol++ {
		err = volumes[vol].TakeFrozen(ctx, group, ids[vol])
		time.Sleep(w.clientRandom.between(0, 100*time.Millisecond)) // the owners hear of it one after the other
	}
	w.note("group", uint64(group), b2u(err == nil))
	if err != nil { // all of it is given up
		w.logf("no snapshots %d and %d: %v", ids[1], ids[2], err)
		for vol := 1; vol <= 2; vol++ {
			volumes[vol].Thaw(group)
			w.court.taken(ids[vol], false)
		}
		return false
	}
	var has [3]uint64
	for vol := lsfs.VolumeID(1); vol <= 2; vol++ {
		d := owners[vol].store.disk
		d.mu.Lock()
		x, h := d.snaps[ids[vol]], uint64(0)
		if x != nil {
			h = x.diskVolume.sum(chainBlock)
		}
		d.mu.Unlock()
		if x == nil && w.placing && !w.offers(owners[vol].id, vol) {
			return true // its copy was taken off meanwhile; settle finds out
		}
		if x == nil {
			w.fail("C6: snapshot %d of volume %d was taken in a group, and node %d does not have it", ids[vol], vol, owners[vol].id)
			return false
		}
		w.mu.Lock()
		n, known := w.links[h]
		w.mu.Unlock()
		if !known && h != holeSum {
			w.fail("C6: snapshot %d of volume %d has what nobody wrote", ids[vol], vol)
		}
		has[vol] = n
	}
	if has[1] < has[2] || has[1] > has[2]+1 {
		w.fail("C6: snapshots %d and %d are of two moments: number %d was written to the first volume, and %d to the second one", ids[1], ids[2], has[1], has[2])
	}
	for vol := 1; vol <= 2; vol++ {
		w.court.taken(ids[vol], true)
	}
	return true
}
