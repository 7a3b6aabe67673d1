//go:build invariants

package device

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// VolatileEnv names the variable that gives every device a volatile write cache, in
// binaries with the tag "invariants": what was written stays in RAM until a flush, so
// that a killed process leaves behind what a power failure would. Its value is the
// percentage of writes that get to the device all the same, in any order.
const VolatileEnv = "TWINSAN_VOLATILE"

func init() {
	text, ok := os.LookupEnv(VolatileEnv)
	if !ok {
		return
	}
	percent, err := strconv.Atoi(text)
	if err != nil || percent < 0 || 100 < percent {
		panic(fmt.Sprintf("%s is %q, want a percentage", VolatileEnv, text))
	}
	inner := cached
	cached = func(d Device) Device {
		d = inner(d)
		h := fnv.New64a()
		h.Write([]byte(d.Path()))
		return &volatileDevice{
			Device: d, percent: percent, pages: map[int64][]byte{},
			rand: rand.New(rand.NewPCG(h.Sum64(), uint64(time.Now().UnixNano()))),
		}
	}
}

// volatileDevice is a device with a write cache that is lost with the process.
type volatileDevice struct {
	Device
	percent int

	mu    sync.Mutex
	rand  *rand.Rand
	pages map[int64][]byte // by offset: written and not flushed
}

func (d *volatileDevice) WriteAt(p []byte, off int64) error {
	if err := CheckRange(p, off, d.Size()); err != nil {
		return d.Device.WriteAt(p, off) // it has the words for it
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for at := 0; at < len(p); at += Align {
		page := d.pages[off+int64(at)]
		if page == nil {
			page = AlignedBuffer(Align)
			d.pages[off+int64(at)] = page
		}
		copy(page, p[at:at+Align])
		if d.rand.IntN(100) < d.percent {
			if err := d.Device.WriteAt(page, off+int64(at)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *volatileDevice) ReadAt(p []byte, off int64) error {
	// Both under the lock, or a page could leave the cache between the two.
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.Device.ReadAt(p, off); err != nil {
		return err
	}
	for at := 0; at < len(p); at += Align {
		if page := d.pages[off+int64(at)]; page != nil {
			copy(p[at:], page)
		}
	}
	return nil
}

func (d *volatileDevice) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	offs := make([]int64, 0, len(d.pages))
	for off := range d.pages {
		offs = append(offs, off)
	}
	slices.SortFunc(offs, cmp.Compare)
	for _, off := range offs {
		if err := d.Device.WriteAt(d.pages[off], off); err != nil {
			return err
		}
		FreeAligned(d.pages[off])
		delete(d.pages, off)
	}
	return d.Device.Flush()
}
