package lsfs

import (
	"sync"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// moment is what a loss of power at one write or flush of a rig left, and what held right
// before and right after it.
type moment[T any] struct {
	rig    *rig
	before T
	after  T
	how    devicetest.CrashOptions
}

// recorder keeps moments of a rig: every so many writes and flushes of its disks.
type recorder[T any] struct {
	mu    sync.Mutex // held while a moment is taken
	r     *rig
	seed  uint64
	every int
	note  func() T
	crash func(devicetest.CrashOptions) *rig
	seen  int
	list  []moment[T]
}

// newRecorder makes a recorder that does not run yet. note says what holds; it is called
// from within the store, with the recorder's mutex.
func newRecorder[T any](r *rig, seed uint64, every int, note func() T) *recorder[T] {
	return &recorder[T]{r: r, seed: seed, every: every, note: note, crash: r.crash}
}

func (x *recorder[T]) start() {
	for _, d := range x.r.disks {
		d.Observe(x.observe)
	}
}

func (x *recorder[T]) stop() {
	for _, d := range x.r.disks {
		d.Observe(nil)
	}
}

func (x *recorder[T]) observe(op devicetest.Op) {
	if op.Kind != devicetest.Write && op.Kind != devicetest.Flush {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.seen++; x.seen%x.every != 0 {
		return
	}
	n := len(x.list)
	how := devicetest.CrashOptions{Seed: x.seed<<32 | uint64(n)<<8, Keep: float64(n%5) / 4, Tear: n%3 == 0, InOrder: n%7 == 0}
	m := moment[T]{before: x.note(), how: how}
	m.rig = x.crash(how)
	m.after = x.note()
	x.list = append(x.list, m)
}

// each starts a store from every moment, and says which one it was when look fails.
func (x *recorder[T]) each(t *testing.T, look func(i int, m *moment[T], s *Store)) {
	t.Helper()
	one := func(i int, m *moment[T]) {
		defer func() {
			if t.Failed() {
				t.Logf("crash %d of %d: %+v, between %+v and %+v, devices %v", i, len(x.list), m.how, m.before, m.after, m.rig.names)
			}
		}()
		m.rig.tb = t
		look(i, m, m.rig.start())
	}
	for i := range x.list {
		one(i, &x.list[i])
	}
	t.Logf("%d crashes", len(x.list))
}
