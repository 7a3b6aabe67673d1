package lsfs

import "sync"

// ioLock is a mutex that is held while a device works. Who waits for it waits on a
// condition: so in virtual time (testing/synctest, which does not take waiting for a
// mutex as waiting) time passes meanwhile, and the device comes to its end. The zero
// value is unlocked.
type ioLock struct {
	mu   sync.Mutex
	free sync.Cond
	held bool
}

func (l *ioLock) Lock() {
	l.mu.Lock()
	if l.free.L == nil {
		l.free.L = &l.mu
	}
	for l.held {
		l.free.Wait()
	}
	l.held = true
	l.mu.Unlock()
}

func (l *ioLock) Unlock() {
	l.mu.Lock()
	l.held = false
	l.mu.Unlock()
	l.free.Signal()
}
