package devicetest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/twinsan/twinsan/lsfs/device"
)

// CrashOptions say what a power cut does to the writes that no flush has secured.
type CrashOptions struct {
	// Seed chooses among them. The same disk and seed give the same crash.
	Seed uint64
	// Keep is the probability, 0 to 1, that an unsynced write survives.
	Keep float64
	// Tear lets a write survive in part: each sector by itself, with the probability Keep.
	Tear bool
	// InOrder keeps a prefix of the writes (and, with Tear, a part of the next one):
	// a disk that does not reorder. Without it every write has its own fate, and a
	// later one may survive an earlier one.
	InOrder bool
}

// Crash gives the disk that a power cut would leave now. The disk itself is
// unharmed and goes on; the clone has no faults, no observer, and its own seed.
func (d *Disk) Crash(o CrashOptions) *Disk {
	rng := rand.New(rand.NewPCG(o.Seed, 0x637261736821))
	d.mu.Lock()
	c := d.cloneStable(rng)
	unsynced := slices.Clone(d.unsynced) // the data is never changed in place
	d.mu.Unlock()

	// In order, the first write that does not survive ends it.
	ended := false
	for _, w := range unsynced {
		kept := !ended && rng.Float64() < o.Keep
		if o.InOrder && !kept && !ended {
			ended = true
			if o.Tear && w.data != nil {
				c.applyTorn(w, rng, o.Keep)
			}
			continue
		}
		switch {
		case w.data == nil && kept:
			for at := w.off; at < w.off+w.n; at += device.Align {
				c.discardPage(at)
			}
		case w.data == nil:
		case o.Tear && !o.InOrder:
			c.applyTorn(w, rng, o.Keep)
		case kept:
			c.apply(w.off, w.data)
		}
	}
	maps.Copy(c.stable, c.volatile)
	clear(c.volatile)
	return c
}

// Clone gives a copy of the disk as it reads now, everything on stable storage.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cloneStable(rand.New(rand.NewPCG(d.rng.Uint64(), 0)))
	for at, p := range d.volatile {
		own := *p
		c.stable[at] = &own
	}
	return c
}

func (d *Disk) cloneStable(rng *rand.Rand) *Disk {
	return &Disk{
		path:     d.path,
		size:     d.size,
		rng:      rng,
		stable:   maps.Clone(d.stable),
		volatile: make(map[int64]*page),
	}
}

// applyTorn lets each sector of a write survive by itself. Half of the writes keep
// their fate as a whole, so that torn ones stand among good ones.
func (d *Disk) applyTorn(w write, rng *rand.Rand, keep float64) {
	if rng.IntN(2) == 0 {
		if rng.Float64() < keep {
			d.apply(w.off, w.data)
		}
		return
	}
	for at := 0; at < len(w.data); at += Sector {
		if rng.Float64() < keep {
			d.apply(w.off+int64(at), w.data[at:at+Sector])
		}
	}
}

func (d *Disk) apply(off int64, data []byte) {
	for len(data) > 0 {
		base := off &^ (device.Align - 1)
		n := copy(d.own(base)[off-base:], data)
		off += int64(n)
		data = data[n:]
	}
}

// String describes a crash for the message of a failed test.
func (o CrashOptions) String() string {
	return fmt.Sprintf("CrashOptions{Seed: %d, Keep: %g, Tear: %t, InOrder: %t}", o.Seed, o.Keep, o.Tear, o.InOrder)
}
