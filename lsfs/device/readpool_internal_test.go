package device

import (
	"runtime"
	"sync"
	"testing"
	"time"
)

// meeting is a device whose reads wait until a number of them are there.
type meeting struct {
	Device
	mu   sync.Mutex
	left int
	met  chan struct{}
}

func (m *meeting) ReadAt([]byte, int64) error {
	m.mu.Lock()
	if m.left--; m.left == 0 {
		close(m.met)
	}
	m.mu.Unlock()
	<-m.met
	return nil
}

// TestIdleReaderIsCountedOnce: reads submitted one by one, faster than an idle
// reader wakes up, each get a reader of their own.
func TestIdleReaderIsCountedOnce(t *testing.T) {
	const readers = 4
	p := NewReadPool(readers)
	defer p.Close()
	var wg sync.WaitGroup
	submit := func(m *meeting, n int) {
		wg.Add(n)
		for range n {
			p.Submit(&Read{Device: m, Done: func(*Read) { wg.Done() }})
		}
	}
	for range 20 {
		submit(&meeting{left: 1, met: make(chan struct{})}, 1)
		wg.Wait()
		for idle := false; !idle; runtime.Gosched() {
			p.mu.Lock()
			idle = p.idle == p.started
			p.mu.Unlock()
		}
		m := &meeting{left: readers, met: make(chan struct{})}
		submit(m, readers)
		select {
		case <-m.met:
		case <-time.After(10 * time.Second):
			t.Error("reads wait although readers are allowed")
			close(m.met)
		}
		wg.Wait()
	}
}
