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
	change *stateChange // newest first: they are few, and none waits for another
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

// addChange queues a change of state whose request is done.
func (q *sequencer) addChange(c *stateChange) {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		c.done(nil, ErrBusy)
		return
	}
	c.next, q.change = q.change, c
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take removes all that waits at once.
func (q *sequencer) take() (first *Task, change *stateChange, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	first, change = q.first, q.change
	q.first, q.last, q.change = nil, nil, nil
	return first, change, q.closed
}

func (q *sequencer) loop(s *Server) {
	defer close(q.done)
	for range q.wake {
		for {
			t, c, closed := q.take()
			if t == nil && c == nil {
				if closed {
					return
				}
				break
			}
			for c != nil {
				next := c.next
				c.step()
				c = next
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
