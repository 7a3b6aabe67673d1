package scsi

import (
	"sync/atomic"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// abortWait counts the tasks that a task management function waits for. It
// starts with one for the function itself, so that it cannot run out while
// tasks are being found.
type abortWait struct {
	left atomic.Int32
	done func()
}

// wake tells functions that a task which they wait for has ended.
func wake(waiters []*abortWait) {
	for _, w := range waiters {
		w.oneLess()
	}
}

func (w *abortWait) oneLess() {
	if w.left.Add(-1) == 0 {
		w.done()
	}
}

// TaskManagement performs a task management function (SAM-5 "Task management
// functions") for nexus n. ref is the task that an ABORT TASK names, as the
// transport found it, or nil. done is called once, here or later on any
// goroutine, when no effect of an aborted task can appear any more: requests
// that are with a volume cannot be called back and are waited for. TaskManagement
// does not block; work that an aborted task queued is started by Kick.
func (s *Server) TaskManagement(n *Nexus, f TaskFunction, lun uint64, ref *Task, done func(TaskResponse)) {
	switch f {
	case ClearACA:
		done(FunctionUnsupported) // NACA=1 is refused
		return
	case TaskReassign:
		done(ReassignUnsupported)
		return
	case TargetWarmReset, TargetColdReset:
		s.targetReset(n, f == TargetColdReset, done)
		return
	case AbortTask, AbortTaskSet, ClearTaskSet, LogicalUnitReset:
	default:
		done(FunctionUnsupported)
		return
	}
	if f == AbortTask {
		s.abortTask(n, lun, ref, done)
		return
	}
	itl := n.state.view.Load().find(lun)
	if itl == nil {
		done(NoSuchLUN)
		return
	}
	a := s.newAbort(n, done)
	switch f {
	case AbortTaskSet:
		// A unit that was unmapped and mapped again has a former I_T_L nexus as well.
		for _, i := range itl.lu.members() {
			if i.nexus == n {
				a.tasksOf(i)
			}
		}
	case ClearTaskSet:
		a.unit(itl.lu)
	case LogicalUnitReset:
		a.unit(itl.lu)
		itl.lu.raise(attentionReset)
	}
	a.start()
}

// abortTask is ABORT TASK. A task that has ended meanwhile counts as aborted:
// some hosts reset a target that answers otherwise.
func (s *Server) abortTask(n *Nexus, lun uint64, ref *Task, done func(TaskResponse)) {
	switch {
	case ref == nil:
		done(NoSuchTask)
		return
	case ref.LUN != lun || ref.Nexus != n:
		done(NoSuchTask)
		return
	case ref.state.itl == nil:
		done(FunctionComplete)
		return
	}
	a := s.newAbort(n, done)
	a.one(ref.state.itl, ref)
	a.start()
}

// targetReset resets every unit that the nexus sees. A cold reset then drops
// every session.
func (s *Server) targetReset(n *Nexus, cold bool, done func(TaskResponse)) {
	a := s.newAbort(n, func(r TaskResponse) {
		done(r)
		if cold {
			h := s.hooks.Load()
			h.Flush() // the answer first
			h.DropSessions("", "target cold reset by "+n.Initiator)
		}
	})
	for _, itl := range n.state.view.Load().units {
		a.unit(itl.lu)
		itl.lu.raise(attentionReset)
	}
	a.start()
}

// abort is one task management function at work.
type abort struct {
	s       *Server
	by      *Nexus
	wait    abortWait
	waiting []*Task // tasks that were not executed yet: the transport gives them up
}

func (s *Server) newAbort(by *Nexus, done func(TaskResponse)) *abort {
	a := &abort{s: s, by: by}
	a.wait.left.Store(1)
	a.wait.done = func() { done(FunctionComplete) }
	return a
}

// start has the transport give up what waits with it, and lets the function
// end when the tasks that it waits for have ended.
func (a *abort) start() {
	if len(a.waiting) > 0 {
		h := a.s.hooks.Load()
		for _, t := range a.waiting {
			h.AbortWaiting(t)
		}
	}
	a.wait.oneLess()
}

func (a *abort) unit(lu *logicalUnit) {
	for _, i := range lu.members() {
		a.tasksOf(i)
	}
}

func (a *abort) tasksOf(i *itlNexus) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.tasks == nil {
		return
	}
	for t := i.tasks; ; {
		a.markLocked(i, t)
		if t = t.state.next; t == i.tasks {
			return
		}
	}
}

func (a *abort) one(i *itlNexus, t *Task) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if t.state.phase != taskIdle {
		a.markLocked(i, t)
	}
}

// markLocked aborts a registered task. One that has not started never will;
// one that has is waited for.
func (a *abort) markLocked(i *itlNexus, t *Task) {
	st := &t.state
	if st.abort == abortNot {
		st.abort = abortSilent
		if i.nexus != a.by {
			st.abort = abortStatus // TAS=1
		}
	}
	switch st.phase {
	case taskStarted:
		a.wait.left.Add(1)
		st.waiters = append(st.waiters, &a.wait)
	case taskBegun:
		if t.Aborted.Load() {
			return // given up already
		}
		if st.abort == abortStatus {
			t.Status, t.SenseLen = cdb.TaskAborted, 0
		}
		a.waiting = append(a.waiting, t)
	}
	t.Aborted.Store(true)
}
