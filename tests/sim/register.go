package sim

import (
	"encoding/binary"
	"sync"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// register is the history of one block. One client writes it, one command at a time,
// any client reads it. A version is everything that its writer has sent.
//
//	versions  0 is the hole of a new volume; the last is the newest that was sent
//	floor     the oldest that a read may return that begins now: it was acknowledged,
//	          or a read has returned it
//
// A version of which the writer has read something older, after it had given up the
// command, is void: it did not happen, and must not happen later (I13).
type register struct {
	vol   lsfs.VolumeID
	no    lsfs.BlockNo
	owner int

	mu       sync.Mutex
	versions []version
	floor    int
	firm     int  // not above floor: this one is durable (W6)
	turns    int  // changes by others than the writer
	losses   int  // how often all above firm may have been lost
	fenced   bool // its writer is fenced: nothing changes any more (I12)
	fixed    int  // with fenced: the version that was read since, or -1
}

type version struct {
	hash uint64
	data []byte
	void bool
}

// sum is a fast hash of whole blocks, in four lanes that the processor takes at once.
func sum(b []byte) uint64 {
	h := [4]uint64{14695981039346656037, 0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9}
	mix := func(h, x uint64) uint64 {
		h = (h ^ x) * 0x9e3779b97f4a7c15
		return h ^ h>>29
	}
	for len(b) >= 32 {
		h[0] = mix(h[0], binary.LittleEndian.Uint64(b))
		h[1] = mix(h[1], binary.LittleEndian.Uint64(b[8:]))
		h[2] = mix(h[2], binary.LittleEndian.Uint64(b[16:]))
		h[3] = mix(h[3], binary.LittleEndian.Uint64(b[24:]))
		b = b[32:]
	}
	return mix(mix(mix(h[0], h[1]), h[2]), h[3])
}

var hole = make([]byte, blockBytes)
var holeSum = sum(hole)

func newRegister(vol lsfs.VolumeID, no lsfs.BlockNo, owner int) *register {
	return &register{vol: vol, no: no, owner: owner, versions: []version{{holeSum, hole, false}}, fixed: -1}
}

// sent notes a new version and returns its number.
func (r *register) sent(data []byte) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.versions = append(r.versions, version{sum(data), data, false})
	return len(r.versions) - 1
}

// good notes that version i was acknowledged.
func (r *register) good(i int) {
	r.mu.Lock()
	r.floor = max(r.floor, i)
	r.mu.Unlock()
}

// refused notes that version i had no effect.
func (r *register) refused(i int) {
	r.mu.Lock()
	r.versions[i].void = true
	r.mu.Unlock()
}

// settled is the content if the writer knows it.
func (r *register) settled() ([]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := r.floor + 1; i < len(r.versions); i++ {
		if !r.versions[i].void {
			return nil, false
		}
	}
	return r.versions[r.floor].data, true
}

// begin is what a read remembers of its beginning.
type begin struct {
	floor  int
	issued int
	fenced bool
	firm   int
	losses int
	turns  int
}

func (r *register) begin() begin {
	r.mu.Lock()
	defer r.mu.Unlock()
	return begin{r.floor, len(r.versions), r.fenced, r.firm, r.losses, r.turns}
}

// read checks what a read returned that began at b; own says that the writer itself
// reads, so nothing of it is under way.
func (r *register) read(w *world, b begin, data []byte, own bool, who int) {
	r.found(w, b, sum(data), own, who)
}

// found is read of a block whose sum is h.
func (r *register) found(w *world, b begin, h uint64, own bool, who int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.losses != r.losses {
		b.floor = min(b.floor, b.firm)
	}
	b.fenced = b.fenced && b.losses == r.losses && b.turns == r.turns
	at := -1
	for i := b.floor; i < len(r.versions); i++ {
		if v := &r.versions[i]; v.hash == h && !v.void {
			at = i
			break
		}
	}
	if at < 0 {
		what := "what nobody wrote"
		for i := range r.versions {
			if r.versions[i].hash == h {
				what = "version " + utoa(i)
				if r.versions[i].void {
					what += ", which its writer gave up and found without effect (I13)"
				}
			}
		}
		w.fail("I1, I2, I9: volume %d block %d: client %d read %s; acknowledged or seen before it began: %d, sent: %d", r.vol, r.no, who, what, b.floor, len(r.versions)-1)
		return
	}
	if r.fenced && b.fenced {
		if r.fixed >= 0 && r.versions[r.fixed].hash != h {
			w.fail("I12: volume %d block %d of the fenced client %d changed from version %d to %d", r.vol, r.no, r.owner, r.fixed, at)
		}
		r.fixed = at
	}
	r.floor = max(r.floor, at)
	if own {
		for i := at + 1; i < b.issued; i++ {
			r.versions[i].void = true
		}
	}
}

// fence and unfence: from now on, or no longer, nothing changes.
func (r *register) fence(on bool) {
	r.mu.Lock()
	r.fenced, r.fixed = on, -1
	r.mu.Unlock()
}

// stored checks a replica's copy of the block, whose sum is h, against acknowledged
// version i.
func (r *register) stored(i int, h uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range r.versions[i:] {
		if v.hash == h {
			return true
		}
	}
	return false
}

// acknowledged is called at the owner's door, at the instant when a request ends: I5
// and I6 are looked at where the copies are.
func (c *client) acknowledged(p *process, vol lsfs.VolumeID, cmd *command, r *replication.Request) {
	w := c.w
	if w.ram[vol] && cmd != nil && r.Err == nil && p.alone(vol) {
		for _, x := range cmd.regs {
			x.reg.secure(x.version)
		}
	}
	if r.Err != nil || r.Op == replication.OpRead || cmd == nil || w.amnesia.Load() {
		return
	}
	if !w.checkRandom.chance(w.inspectAcks) {
		return
	}
	for _, x := range cmd.regs {
		for _, n := range w.court.record(vol).InSync {
			d := w.disks[n]
			d.mu.Lock()
			h := d.sum(vol, x.reg.no)
			d.mu.Unlock()
			if !x.reg.stored(x.version, h) && !w.mayLack(n, vol) {
				w.fail("I5, I6: volume %d block %d: version %d (operation %d) is acknowledged and node %d, in sync, does not have it", vol, x.reg.no, x.version, r.Op, n)
			}
		}
	}
}
