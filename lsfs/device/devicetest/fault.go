package devicetest

import (
	"slices"

	"github.com/twinsan/twinsan/lsfs/device"
	"golang.org/x/sys/unix"
)

// fault is what happens to one operation, or to all in a range.
type fault struct {
	kind    Kind
	at      int // counts[kind] that it waits for; 0 is any
	lo, hi  int64
	forever bool

	err       error
	torn      bool // some sectors of the failed write arrive
	lose      bool
	flip      bool
	elsewhere bool
	to        int64
}

func (d *Disk) takeFault(op Op) *fault {
	for i, f := range d.faults {
		if f.kind != op.Kind || f.at != 0 && f.at != op.N {
			continue
		}
		if f.hi != 0 && (op.Off >= f.hi || op.Off+op.Len <= f.lo) {
			continue
		}
		if !f.forever {
			d.faults = append(d.faults[:i:i], d.faults[i+1:]...)
		}
		return f
	}
	return nil
}

func (d *Disk) arm(n int, f fault) {
	if n < 1 {
		panic("devicetest: faults count operations from 1, the next one")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	f.at = d.counts[f.kind] + n
	d.faults = append(d.faults, &f)
}

// FailNth makes the n-th operation of a kind from now (1 is the next) fail with
// err, nil for unix.EIO. A write that fails may have reached the disk in part.
func (d *Disk) FailNth(k Kind, n int, err error) {
	if err == nil {
		err = unix.EIO
	}
	d.arm(n, fault{kind: k, err: err, torn: k == Write})
}

// FailRange makes every operation of a kind that touches [lo, hi) fail with err,
// nil for unix.EIO, until Heal: a bad place.
func (d *Disk) FailRange(k Kind, lo, hi int64, err error) {
	if err == nil {
		err = unix.EIO
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = append(d.faults, &fault{kind: k, lo: lo, hi: hi, forever: true, err: err})
}

// Fail makes every operation of every kind fail with err, nil for unix.EIO, until
// Heal: a dead device.
func (d *Disk) Fail(err error) {
	if err == nil {
		err = unix.EIO
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k := range kinds {
		d.faults = append(d.faults, &fault{kind: k, forever: true, err: err})
	}
}

// LoseNth makes the n-th write, flush or discard from now succeed without doing anything.
func (d *Disk) LoseNth(k Kind, n int) { d.arm(n, fault{kind: k, lose: true}) }

// MisdirectNth makes the n-th write from now land at another offset, and succeed.
func (d *Disk) MisdirectNth(n int, to int64) {
	d.arm(n, fault{kind: Write, elsewhere: true, to: to})
}

// FlipNth flips one random bit of the data of the n-th read (of the answer only)
// or the n-th write (as it arrives on the disk) from now.
func (d *Disk) FlipNth(k Kind, n int) { d.arm(n, fault{kind: k, flip: true}) }

// Heal ends all faults, the full disk and the lying flush. A poisoned disk stays so.
func (d *Disk) Heal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults, d.full, d.lying = nil, false, false
}

// SetFull makes writes to pages that were never written fail with ENOSPC, as a
// sparse file does on a full file system.
func (d *Disk) SetFull(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = on
}

// SetLying makes every flush succeed and secure nothing.
func (d *Disk) SetLying(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lying = on
}

// FlipBit flips one bit of what the disk holds: bit counts from off. It is at
// once and for good, as rot is, and survives crashes.
func (d *Disk) FlipBit(off, bit int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := off + bit/8
	mask := byte(1) << (bit % 8)
	d.amend(at, 1, func(p []byte, _ int64) { p[0] ^= mask })
}

// Overwrite replaces what the disk holds from off on, at once and for good,
// without counting as an operation: for images of other times and garbage.
func (d *Disk) Overwrite(off int64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.amend(off, int64(len(p)), func(dst []byte, at int64) { copy(dst, p[at-off:]) })
}

// amend changes [off, off+n) everywhere that it stands, page by page: on stable
// storage, in the cache, and in the writes that a crash may bring back. change gets
// the bytes and the offset of the first.
func (d *Disk) amend(off, n int64, change func(p []byte, at int64)) {
	end := off + n
	for at := off; at < end; {
		base := at &^ (device.Align - 1)
		next := min(end, base+device.Align)
		s := new(page) // clones share the old one
		if old := d.stable[base]; old != nil {
			*s = *old
		}
		change(s[at-base:next-base], at)
		d.stable[base] = s
		if v := d.volatile[base]; v != nil {
			change(v[at-base:next-base], at)
		}
		at = next
	}
	for i := range d.unsynced {
		w := &d.unsynced[i]
		lo, hi := max(off, w.off), min(end, w.off+w.n)
		if w.data != nil && lo < hi {
			w.data = slices.Clone(w.data) // clones share it too
			change(w.data[lo-w.off:hi-w.off], lo)
		}
	}
}

// Peek copies what the disk holds from off on, without counting as an operation.
func (d *Disk) Peek(p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var buf page
	for len(p) > 0 {
		base := off &^ (device.Align - 1)
		d.readPage(buf[:], base)
		n := copy(p, buf[off-base:])
		off += int64(n)
		p = p[n:]
	}
}

// Hold makes operations of a kind wait, before they do anything, until the
// function that it returns is called (once): a disk that has become slow. Close
// waits for them too.
func (d *Disk) Hold(k Kind) (release func()) {
	gate := make(chan struct{})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gates[k] != nil {
		panic("devicetest: " + k.String() + " is held already")
	}
	d.gates[k] = gate
	return func() {
		d.mu.Lock()
		d.gates[k] = nil
		d.mu.Unlock()
		close(gate)
	}
}

// Observe sets a function that sees every operation after it was performed and
// before its caller does; nil is none. It may take a Crash of the disk, which is then
// one between two operations, and it may block, which slows that operation only.
func (d *Disk) Observe(f func(Op)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.observe = f
}
