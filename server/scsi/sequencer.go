package scsi

import "sync"

// sequencer runs the next step of commands that make several requests. It has
// the package's one goroutine: a volume's completions run on the volume's
// goroutines, where Submit must not be called. Its queue holds tasks, so the
// transports' command windows bound it.
type sequencer struct {
	wake chan struct{}
	done chan struct{}

	mu     sync.Mutex
	first  *Task
	last   *Task
	closed bool
}

func (q *sequencer) start(s *Server) {
	q.wake = make(chan struct{}, 1)
	q.done = make(chan struct{})
	go q.loop(s)
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
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take removes all tasks at once.
func (q *sequencer) take() (first *Task, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	first = q.first
	q.first, q.last = nil, nil
	return first, q.closed
}

func (q *sequencer) loop(s *Server) {
	defer close(q.done)
	for range q.wake {
		for {
			t, closed := q.take()
			if t == nil {
				if closed {
					return
				}
				break
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
	select {
	case q.wake <- struct{}{}:
	default:
	}
	<-q.done
}
