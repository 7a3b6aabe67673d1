package scsi

import (
	"sync/atomic"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// Task management over all nodes. ABORT TASK and ABORT TASK SET concern one nexus,
// which is on this node. CLEAR TASK SET and the resets concern all nexuses: they
// abort the tasks of this node at once and change the ordered state of the unit.
// The change ends the tasks of other nodes (react), is ordered against every
// write, and nothing of an aborted task can be sequenced after it (recheck). The
// function answers when the change is in force and the tasks of this node have
// ended; when the change fails it answers FUNCTION REJECTED.

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
				a.tasksOf(i, nil)
			}
		}
	case ClearTaskSet:
		a.everywhere(itl.lu, eventTasksCleared)
	case LogicalUnitReset:
		a.everywhere(itl.lu, eventReset)
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
// every session: on this node after the answer, on the others with the last unit.
func (s *Server) targetReset(n *Nexus, cold bool, done func(TaskResponse)) {
	units := n.state.view.Load().all()
	a := s.newAbort(n, done)
	if cold && len(units) > 0 {
		last := units[len(units)-1]
		units = units[:len(units)-1]
		a.unit(last)
		a.wait.done = func() {
			// Maybe on a volume's goroutine, where nothing is submitted.
			if a.failed.Load() || !s.sequencer.later(func() { s.coldReset(n, last, done) }) {
				done(FunctionRejected)
			}
		}
	}
	for _, lu := range units {
		a.everywhere(lu, eventReset)
	}
	a.start()
}

// coldReset is the last step of TARGET COLD RESET.
func (s *Server) coldReset(n *Nexus, last *logicalUnit, done func(TaskResponse)) {
	a := s.newAbort(n, func(r TaskResponse) {
		done(r)
		if r != FunctionComplete {
			return
		}
		h := s.hooks.Load()
		h.Flush() // the answer first
		h.DropSessions("", "target cold reset by "+n.Initiator)
	})
	a.change(last, eventColdReset) // its tasks here were aborted at the beginning
	a.start()
}

// abort is one task management function at work, or a change of state that
// aborts tasks.
type abort struct {
	s       *Server
	by      *Nexus
	wait    *abortWait // nil: nobody waits
	failed  atomic.Bool
	waiting []*Task // tasks that were not executed yet: the transport gives them up
	parked  []*Task // tasks that waited for something other than a request: they end
}

func (s *Server) newAbort(by *Nexus, done func(TaskResponse)) *abort {
	a := &abort{s: s, by: by, wait: new(abortWait)}
	a.wait.left.Store(1)
	a.wait.done = func() {
		if a.failed.Load() {
			done(FunctionRejected)
			return
		}
		done(FunctionComplete)
	}
	return a
}

// start has the transport give up what waits with it, and lets the function
// end when the tasks that it waits for have ended.
func (a *abort) start() {
	a.giveUp()
	a.wait.oneLess()
}

func (a *abort) giveUp() {
	if len(a.waiting) > 0 {
		h := a.s.hooks.Load()
		for _, t := range a.waiting {
			h.AbortWaiting(t)
		}
	}
	for _, t := range a.parked {
		a.s.finish(t)
	}
}

// everywhere aborts all tasks of a unit on all nodes. Those of the function's
// own nexus are found now: what its initiator sends after the function is not
// its object. Those of others may come up to the moment of the change.
func (a *abort) everywhere(lu *logicalUnit, kind eventKind) {
	a.unit(lu)
	a.change(lu, kind)
}

// change makes the change of state that ends the tasks of other nexuses.
func (a *abort) change(lu *logicalUnit, kind eventKind) {
	a.wait.left.Add(1)
	by := a.by.id()
	a.s.changeState(lu, func(now *luState) (*luState, error) {
		next := now.edited(kind, by)
		next.aborts++
		if kind != eventTasksCleared {
			next.legacy = nil
		}
		return next, nil
	}, func(_ *luState, err error) {
		if err != nil {
			a.failed.Store(true)
		} else {
			for _, i := range lu.members() {
				a.await(i, nil)
			}
		}
		a.wait.oneLess()
	})
}

func (a *abort) unit(lu *logicalUnit) {
	for _, i := range lu.members() {
		a.tasksOf(i, nil)
	}
}

// eachTask calls f for the registered tasks but one, under the lock.
func (i *itlNexus) eachTask(but *Task, f func(*Task)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.tasks == nil {
		return
	}
	for t := i.tasks; ; {
		if t != but {
			f(t)
		}
		if t = t.state.next; t == i.tasks {
			return
		}
	}
}

// tasksOf aborts the tasks of an I_T_L nexus but one.
func (a *abort) tasksOf(i *itlNexus, but *Task) {
	i.eachTask(but, func(t *Task) { a.markLocked(i, t) })
}

// await waits for those tasks of an I_T_L nexus that were aborted and have not ended.
func (a *abort) await(i *itlNexus, but *Task) {
	i.eachTask(but, func(t *Task) {
		if st := &t.state; st.abort != abortNot && st.phase == taskStarted {
			a.waitLocked(t)
		}
	})
}

func (a *abort) waitLocked(t *Task) {
	if a.wait != nil {
		a.wait.left.Add(1)
		t.state.waiters = append(t.state.waiters, a.wait)
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
	case taskStarted, taskParked:
		if st.phase == taskParked {
			a.parked = append(a.parked, st.unparkLocked())
		}
		a.waitLocked(t)
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
