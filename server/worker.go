package server

import (
	"context"
	"sync"
	"time"
)

// worker is a goroutine that does one thing over and over: once in each period,
// and at once when it is woken. Wake-ups that come together are one.
type worker struct {
	cancel context.CancelFunc
	group  sync.WaitGroup
	wake   chan struct{} // one is enough
}

// newWorker starts it. do ends with its context.
func newWorker(every time.Duration, do func(context.Context)) *worker {
	ctx, cancel := context.WithCancel(context.Background())
	w := &worker{cancel: cancel, wake: make(chan struct{}, 1)}
	w.group.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-w.wake:
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if ctx.Err() != nil {
				return // both were ready
			}
			do(ctx)
		}
	})
	return w
}

// poke makes it work now. It never waits.
func (w *worker) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// close ends it and waits for it; nil is fine.
func (w *worker) close() {
	if w != nil {
		w.cancel()
		w.group.Wait()
	}
}
