package scsi

import "sync"

// sequencer runs the next step of commands that make several requests, on a
// goroutine of its own: a volume's completions run on the volume's goroutines,
// where Submit must not be called. Its queue holds tasks, so the transports'
// command windows bound it.
type sequencer struct {
	wake chan struct{}
	done chan struct{}

	mu     sync.Mutex
	first  *Task
	last   *Task
	calls  []func()
	closed bool
}

func (q *sequencer) start(s *Server) {
	q.wake = make(chan struct{}, 1)
	q.done = make(chan struct{})
	go q.loop(s)
}

// poke wakes the goroutine; one wake-up is enough for all that waits.
func (q *sequencer) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// add queues a task whose request is done.
func (q *sequencer) add(s *Server, t *Task) {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		s.conclude(t, ErrBusy)
		return
	}
	t.state.queued = nil
	if q.last == nil {
		q.first = t
	} else {
		q.last.state.queued = t
	}
	q.last = t
	q.mu.Unlock()
	q.poke()
}

// later has f called on the sequencer's goroutine: for what begins in a
// volume's callback and must submit, or call the transport, or take Server.mu. It
// returns false when the sequencer is closed. Calls are few: one for a task
// management function, for a reservation under review, and for a change of state
// that aborted tasks which wait.
func (q *sequencer) later(f func()) bool {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return false
	}
	q.calls = append(q.calls, f)
	q.mu.Unlock()
	q.poke()
	return true
}

// take removes all that waits at once.
func (q *sequencer) take() (first *Task, calls []func(), closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	first, calls = q.first, q.calls
	q.first, q.last, q.calls = nil, nil, nil
	return first, calls, q.closed
}

func (q *sequencer) loop(s *Server) {
	defer close(q.done)
	for range q.wake {
		for {
			t, calls, closed := q.take()
			if t == nil && len(calls) == 0 {
				if closed {
					return
				}
				break
			}
			for _, f := range calls {
				f()
			}
			for t != nil {
				next := t.state.queued // the step may end the task and its memory be used again
				t.state.step(s, t)
				t = next
			}
			s.backend.Kick()
			s.hooks.Load().Flush()
		}
	}
}

func (q *sequencer) stop() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.poke()
	<-q.done
}
