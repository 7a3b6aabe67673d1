package device

import (
	"sync/atomic"
	"time"
)

// Metered counts what a device does and how long that takes. Its methods are those
// of the device that it wraps; counting costs two looks at the clock for each.
type Metered struct {
	Device
	reads, writes, flushes meter
}

type meter struct {
	ops    atomic.Int64
	errors atomic.Int64
	mean   atomic.Int64 // nanoseconds, see observe
	wait   atomic.Int64 // nanoseconds, see transferByte
}

// transferByte is the time that a byte may take: what an operation takes beyond that
// for its length is waiting. It is that of a rotating disk, 100 MB/s, so that large
// operations do not look like slow ones.
const transferByte = 10 * time.Nanosecond

// meanWeight: a new observation changes the mean by this part of its distance to it.
const meanWeight = 16

func (m *meter) observe(start time.Time, length int, err error) error {
	m.ops.Add(1)
	if err != nil {
		m.errors.Add(1)
		return err
	}
	// Two observations at once may lose one of them, which does a mean no harm.
	old, took := m.mean.Load(), int64(time.Since(start))
	m.wait.Add(max(took-int64(length)*int64(transferByte), 0))
	if old == 0 {
		m.mean.Store(took)
	} else {
		m.mean.Store(old + (took-old)/meanWeight)
	}
	return nil
}

// Usage is what a device did since it was opened. Latencies are means that forget:
// the last few dozen operations count.
type Usage struct {
	Reads, Writes, Flushes                  int64
	Errors                                  int64 // of all three
	ReadLatency, WriteLatency, FlushLatency time.Duration
	ReadErrors, WriteErrors, FlushErrors    int64
	// WriteWait and FlushWait are sums over all that succeeded: the time that each took
	// beyond the transfer of its bytes at the speed of a rotating disk.
	WriteWait, FlushWait time.Duration
}

// Meter wraps a device.
func Meter(d Device) *Metered { return &Metered{Device: d} }

// ReadAt is Device.ReadAt.
func (m *Metered) ReadAt(p []byte, off int64) error {
	start := time.Now()
	return m.reads.observe(start, len(p), m.Device.ReadAt(p, off))
}

// WriteAt is Device.WriteAt.
func (m *Metered) WriteAt(p []byte, off int64) error {
	start := time.Now()
	return m.writes.observe(start, len(p), m.Device.WriteAt(p, off))
}

// Flush is Device.Flush.
func (m *Metered) Flush() error {
	start := time.Now()
	return m.flushes.observe(start, 0, m.Device.Flush())
}

// Holes says whether a part of [off, off+n) of a file has no written place yet;
// false where that is not known.
func (m *Metered) Holes(off, n int64) bool {
	h, ok := m.Device.(interface{ Holes(off, n int64) bool })
	return ok && h.Holes(off, n)
}

// Usage reads the counters.
func (m *Metered) Usage() Usage {
	u := Usage{
		Reads: m.reads.ops.Load(), Writes: m.writes.ops.Load(), Flushes: m.flushes.ops.Load(),
		ReadLatency: time.Duration(m.reads.mean.Load()), WriteLatency: time.Duration(m.writes.mean.Load()), FlushLatency: time.Duration(m.flushes.mean.Load()),
		ReadErrors: m.reads.errors.Load(), WriteErrors: m.writes.errors.Load(), FlushErrors: m.flushes.errors.Load(),
		WriteWait: time.Duration(m.writes.wait.Load()), FlushWait: time.Duration(m.flushes.wait.Load()),
	}
	u.Errors = u.ReadErrors + u.WriteErrors + u.FlushErrors
	return u
}
