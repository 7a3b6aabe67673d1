//go:build invariants

package device

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// SlowEnv names the variable that lets every device be made slow while it is in use,
// in binaries with the tag "invariants": the file beside the device whose name is that
// of the device and the variable's value holds the milliseconds that each write and
// flush takes longer. Without the file, or without a number in it, nothing is changed.
const SlowEnv = "TWINSAN_SLOW"

func init() {
	suffix := os.Getenv(SlowEnv)
	if suffix == "" {
		return
	}
	inner := cached
	cached = func(d Device) Device { return &slowDevice{Device: inner(d), file: d.Path() + suffix} }
}

// slowDevice is a device that takes its time.
type slowDevice struct {
	Device
	file   string
	looked atomic.Int64 // when the file was read last, Unix nanoseconds
	delay  atomic.Int64 // nanoseconds
}

// wait looks at the file ten times a second at most.
func (d *slowDevice) wait() {
	if now := time.Now().UnixNano(); now-d.looked.Load() > int64(100*time.Millisecond) {
		d.looked.Store(now)
		text, _ := os.ReadFile(d.file) // none is none
		ms, _ := strconv.Atoi(strings.TrimSpace(string(text)))
		d.delay.Store(int64(time.Duration(max(ms, 0)) * time.Millisecond))
	}
	if t := d.delay.Load(); t > 0 {
		time.Sleep(time.Duration(t))
	}
}

func (d *slowDevice) WriteAt(p []byte, off int64) error {
	d.wait()
	return d.Device.WriteAt(p, off)
}

func (d *slowDevice) Flush() error {
	d.wait()
	return d.Device.Flush()
}
