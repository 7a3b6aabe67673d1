package devicetest

import (
	"sync"
	"time"

	"github.com/twinsan/twinsan/lsfs/device"
)

// Paced is a device that is no faster than it is told: so many bytes a second, reads and
// writes together, one operation after another as a disk transfers them, and a time for
// each flush. It is set while the device is in use.
type Paced struct {
	device.Device

	mu    sync.Mutex
	rate  float64 // bytes a second; 0: no limit
	flush time.Duration
	free  time.Time // when what was asked for has been transferred
	wrote int64
}

// Pace puts a limit on a device. Without a call of Set there is none.
func Pace(d device.Device) *Paced { return &Paced{Device: d} }

// Set changes the limits: bytes a second, 0 for none, and the time of a flush.
func (d *Paced) Set(bytesPerSecond int64, flush time.Duration) {
	d.mu.Lock()
	d.rate, d.flush = float64(bytesPerSecond), flush
	d.mu.Unlock()
}

// Wrote is how many bytes have been written.
func (d *Paced) Wrote() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.wrote
}

// pass reserves the time in which the disk transfers n bytes more, or flushes, and returns
// its end.
func (d *Paced) pass(n int, flush, write bool) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); d.free.Before(now) {
		d.free = now
	}
	if d.rate > 0 {
		d.free = d.free.Add(time.Duration(float64(n) / d.rate * 1e9))
	}
	if flush {
		d.free = d.free.Add(d.flush)
	}
	if write {
		d.wrote += int64(n)
	}
	return d.free
}

// ReadAt is Device.ReadAt.
func (d *Paced) ReadAt(p []byte, off int64) error {
	end := d.pass(len(p), false, false)
	err := d.Device.ReadAt(p, off)
	time.Sleep(time.Until(end)) // what the device below takes is a part of it
	return err
}

// WriteAt is Device.WriteAt.
func (d *Paced) WriteAt(p []byte, off int64) error {
	end := d.pass(len(p), false, true)
	err := d.Device.WriteAt(p, off)
	time.Sleep(time.Until(end))
	return err
}

// Flush is Device.Flush.
func (d *Paced) Flush() error {
	end := d.pass(0, true, false)
	err := d.Device.Flush()
	time.Sleep(time.Until(end))
	return err
}
