package scsi

import "sync"

// parking is a started task that waits for something other than a request of
// its own: for the end of a sanitize operation, for a volume to move. Either
// unpark takes it back, or task management ends it; never both.
type parking struct {
	itl *itlNexus
	t   *Task // under itl.mu; nil when the task has left
}

// park lets the task wait. Nil: it was aborted meanwhile, and has ended.
func (t *Task) park(s *Server) *parking {
	i := t.state.itl
	p := &parking{itl: i, t: t}
	i.mu.Lock()
	if t.state.abort != abortNot {
		i.mu.Unlock()
		s.finish(t)
		return nil
	}
	t.state.phase = taskParked
	t.state.parked = p
	i.mu.Unlock()
	return p
}

// unpark returns the task, which the caller then ends, or nil when it was aborted.
func (p *parking) unpark() *Task {
	p.itl.mu.Lock()
	defer p.itl.mu.Unlock()
	if p.t == nil {
		return nil
	}
	return p.t.state.unparkLocked()
}

// unparkLocked needs the lock of the I_T_L nexus.
func (st *taskState) unparkLocked() *Task {
	t := st.parked.t
	st.parked.t, st.parked = nil, nil
	st.phase = taskStarted
	return t
}

// AbortNexus aborts all tasks of a nexus whose connection is gone: those that
// wait for long work (SANITIZE, SET TARGET PORT GROUPS) end at once and the work
// goes on, those with a volume end as the volume ends them. No task of the nexus
// has a response to send any more.
func (s *Server) AbortNexus(n *Nexus) {
	a := s.newAbort(n, func(TaskResponse) {})
	for _, itl := range n.state.view.Load().units {
		for _, i := range itl.lu.members() {
			if i.nexus == n {
				a.tasksOf(i, nil)
			}
		}
	}
	a.start()
}

// workers are the goroutines of long work: at most two for each logical unit.
type workers struct {
	mu      sync.Mutex
	stopped chan struct{} // made at the first start
	closed  bool
	running sync.WaitGroup
}

// start runs f, which returns soon after stop is closed. After stop it does nothing.
func (w *workers) start(f func(stop <-chan struct{})) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	if w.stopped == nil {
		w.stopped = make(chan struct{})
	}
	stop := w.stopped
	w.running.Go(func() { f(stop) })
	return true
}

// stop ends all of them and waits.
func (w *workers) stop() {
	w.mu.Lock()
	if !w.closed && w.stopped != nil {
		close(w.stopped)
	}
	w.closed = true
	w.mu.Unlock()
	w.running.Wait()
}
