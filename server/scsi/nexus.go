package scsi

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// MaxNexuses bounds the I_T nexuses of one node. At the bound logins are
// refused with "out of resources".
const MaxNexuses = 1024

// maxLost bounds the memory of lost nexuses. A forgotten one is greeted with
// POWER ON, which says more.
const maxLost = 1024

// ErrTooManyNexuses is returned by Attach at MaxNexuses.
var ErrTooManyNexuses = errors.New("too many sessions on this node")

// nexusState is the device server's part of a Nexus.
type nexusState struct {
	view        atomic.Pointer[view] // what the initiator sees; replaced whole under Server.mu
	lunsChanged atomic.Bool          // REPORTED LUNS DATA HAS CHANGED is due
	dropped     atomic.Bool          // the transport was told to reset it
	greeting    attention            // for units that the nexus meets
	echo        echoBuffer           // of READ and WRITE BUFFER
}

// view is one nexus's logical units. It is never modified.
type view struct {
	units map[uint16]*itlNexus
}

// find returns the I_T_L nexus at an address, or nil.
func (v *view) find(address uint64) *itlNexus {
	lun, ok := cdb.DecodeLUN(address)
	if !ok {
		return nil
	}
	return v.units[lun]
}

// all returns the units in no order.
func (v *view) all() []*logicalUnit {
	units := make([]*logicalUnit, 0, len(v.units))
	for _, i := range v.units {
		units = append(units, i.lu)
	}
	return units
}

// itlNexus is one nexus's relation to one logical unit. It lives from the
// moment the initiator sees the unit until it no longer does and the last task
// has ended.
type itlNexus struct {
	nexus    *Nexus
	lu       *logicalUnit
	readOnly bool // writes from this initiator are refused

	grant    atomic.Pointer[grant]    // under the ordered state; set before the nexus sees the unit
	pending  atomic.Int32             // len(attentions)
	counters atomic.Pointer[counters] // made at the first command

	mu         sync.Mutex
	attentions []attention
	tasks      *Task // ring of registered tasks
	inFlight   int
	retired    bool // no longer in a view: no new tasks
}

// Attach makes the nexus of a session that has just logged in. Its first
// command to each logical unit meets a unit attention.
func (s *Server) Attach(initiator string, isid [6]byte) (*Nexus, error) {
	n := &Nexus{Initiator: initiator, ISID: isid, Port: s.nodePort, server: s}
	units, err := s.attach(n)
	if err != nil {
		return nil, err
	}
	s.dropReservesOf(n, units)
	return n, nil
}

// attach adds a nexus and returns the units that it sees.
func (s *Server) attach(n *Nexus) ([]*logicalUnit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.nexuses) >= MaxNexuses {
		return nil, ErrTooManyNexuses
	}
	n.state.greeting = attentionPowerOn
	name := portName{n.Initiator, n.ISID}
	if _, ok := s.lost[name]; ok {
		n.state.greeting = attentionLoss
		delete(s.lost, name)
	}
	n.state.view.Store(&view{})
	s.nexuses[n] = struct{}{}
	s.rebuildLocked(n)
	n.state.lunsChanged.Store(false) // nothing was reported to it before
	n.state.greeting = attentionPowerOn
	return n.state.view.Load().all(), nil
}

// Detach gives a nexus up, by logout or (lost) because the connection went. The
// transport has ended its tasks before: each was completed or forgotten. A lost
// nexus that comes back is told so.
//
// What the nexus holds by RESERVE is released; persistent reservations stay.
func (s *Server) Detach(n *Nexus, lost bool) {
	s.dropReservesOf(n, s.detach(n, lost))
}

// detach takes a nexus out and returns the units that it saw.
func (s *Server) detach(n *Nexus, lost bool) []*logicalUnit {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.nexuses[n]; !ok {
		return nil
	}
	delete(s.nexuses, n)
	if lost && len(s.lost) < maxLost {
		s.lost[portName{n.Initiator, n.ISID}] = struct{}{}
	}
	old := n.state.view.Swap(&view{})
	for _, i := range old.units {
		i.retire()
	}
	return old.all()
}

// rebuildLocked makes a nexus's view from the units and access lists. Units that
// it sees newly get its greeting as a unit attention.
func (s *Server) rebuildLocked(n *Nexus) {
	old := n.state.view.Load()
	next := &view{units: make(map[uint16]*itlNexus, len(old.units))}
	changed := false
	for lun, lu := range s.units {
		allowed, readOnly := s.access[lun].allows(n.Initiator)
		if !allowed {
			continue
		}
		i := old.units[lun]
		if i == nil || i.lu != lu || i.readOnly != readOnly {
			changed = true
			i = &itlNexus{nexus: n, lu: lu, readOnly: readOnly}
			i.raise(n.state.greeting)
			lu.join(i)
		}
		next.units[lun] = i
	}
	n.state.view.Store(next)
	for lun, i := range old.units {
		if next.units[lun] != i {
			changed = true
			i.retire()
		}
	}
	if changed {
		n.state.lunsChanged.Store(true)
	}
}

// register adds a task in phase begun. It is refused when the unit is no longer visible.
func (i *itlNexus) register(t *Task) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.retired {
		return false
	}
	if head := i.tasks; head == nil {
		t.state.prev, t.state.next = t, t
		i.tasks = t
	} else {
		last := head.state.prev
		t.state.prev, t.state.next = last, head
		last.state.next, head.state.prev = t, t
	}
	i.inFlight++
	t.state.phase = taskBegun
	return true
}

// begin moves a task to phase started, unless it was aborted before.
func (i *itlNexus) begin(t *Task) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	t.state.phase = taskStarted
	return t.state.abort == abortNot
}

// tryBegin is begin for TryExecute: an aborted task stays where it is.
func (i *itlNexus) tryBegin(t *Task) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if t.state.abort != abortNot {
		return false
	}
	t.state.phase = taskStarted
	return true
}

// unbegin undoes tryBegin and returns who waits for the task: when it was
// aborted meanwhile it never starts again.
func (i *itlNexus) unbegin(t *Task) []*abortWait {
	i.mu.Lock()
	defer i.mu.Unlock()
	st := &t.state
	st.phase = taskBegun
	if st.abort == abortStatus {
		t.Status, t.SenseLen = cdb.TaskAborted, 0
	}
	waiters := st.waiters
	st.waiters = nil
	return waiters
}

// end takes a task out and returns who waits for that. The task's result is
// final after it.
func (i *itlNexus) end(s *Server, t *Task) []*abortWait {
	i.mu.Lock()
	if t.state.abort == abortStatus {
		t.Status, t.SenseLen = cdb.TaskAborted, 0
	}
	last := i.removeLocked(t)
	waiters := t.state.waiters
	t.state.waiters = nil
	i.mu.Unlock()
	i.account(s, t)
	if last {
		i.lu.leave(i)
	}
	return waiters
}

// forget takes a task out that was not started.
func (i *itlNexus) forget(s *Server, t *Task) {
	i.mu.Lock()
	if t.state.phase != taskBegun {
		i.mu.Unlock()
		return
	}
	last := i.removeLocked(t)
	i.mu.Unlock()
	i.count(s, t, endedAborted)
	if last {
		i.lu.leave(i)
	}
}

// removeLocked unlinks a task and says whether it was the last of a retired nexus.
func (i *itlNexus) removeLocked(t *Task) bool {
	st := &t.state
	if st.next == t {
		i.tasks = nil
	} else {
		st.prev.state.next, st.next.state.prev = st.next, st.prev
		if i.tasks == t {
			i.tasks = st.next
		}
	}
	st.prev, st.next = nil, nil
	st.phase = taskIdle
	i.inFlight--
	return i.retired && i.inFlight == 0
}

// retire refuses new tasks. The unit keeps the I_T_L nexus in its list until the last
// task has ended, so that a reset still waits for it.
func (i *itlNexus) retire() {
	i.mu.Lock()
	i.retired = true
	idle := i.inFlight == 0
	i.mu.Unlock()
	if idle {
		i.lu.leave(i)
	}
}
