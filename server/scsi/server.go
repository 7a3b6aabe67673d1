package scsi

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// Config is what a Server is made of.
type Config struct {
	Backend    Backend // the node below the volumes
	NodePort   uint16  // relative target port identifier of this node, unique in the cluster, not 0
	PortGroup  uint16  // target port group of this node
	TargetName string  // the iSCSI name that every node serves
	Logger     *slog.Logger
	// Now is the clock of latencies, of REPORT TIMESTAMP and of what expires; nil: the
	// system's. A server with a clock of its own is ticked by its owner: see Tick.
	Now func() time.Time
}

// Hooks are the calls from the device server to its transport. None may block.
// They come from any goroutine, also from inside Execute and TaskManagement,
// and never with a lock of the device server held.
type Hooks struct {
	// Flush sends the responses that were completed since the last call.
	Flush func()
	// AbortWaiting gives up a task that was begun and not executed, for it waits for
	// its Data-Out or for memory: t.Aborted is set, and t.Status is TASK ABORTED when
	// a response is due. The call may come early or late: the transport looks under
	// its own lock whether the task waits and has Aborted set, and ignores the call
	// otherwise; it looks at Aborted itself when it lets a task wait.
	AbortWaiting func(t *Task)
	// DropSessions resets the connections of one initiator, or of all for "".
	DropSessions func(initiator, reason string)
}

// Server is the device server of one node. Its methods may be called
// concurrently; those that take a Task only by the one who has it. A transport
// calls Attach at the end of a login, for each command Begin and then, by its
// verdict, TryExecute, Execute or Forget, Kick when it has no more commands at
// hand, TaskManagement, and Detach when all tasks of the nexus have ended.
type Server struct {
	backend   Backend
	nodePort  uint16
	portGroup uint16
	target    string
	log       *slog.Logger
	clock     func() time.Time
	born      time.Time

	hooks       atomic.Pointer[Hooks]
	sequencer   sequencer
	scratch     scratchPool
	copies      copyTable
	copyBuffers copyBuffers
	paused      pausedCopies
	ticker      ticker
	workers     workers

	mu      sync.Mutex
	units   map[uint16]*logicalUnit
	access  map[uint16]access
	nexuses map[*Nexus]struct{}
	lost    map[portName]struct{}
}

// portName identifies an initiator port.
type portName struct {
	initiator string
	isid      [6]byte
}

// New returns a running device server without logical units. It panics when
// there is no Backend. Close ends it.
func New(c Config) *Server {
	if c.Backend == nil {
		panic("scsi: Config.Backend is missing")
	}
	s := &Server{
		backend:   c.Backend,
		nodePort:  c.NodePort,
		portGroup: c.PortGroup,
		target:    c.TargetName,
		log:       c.Logger,
		clock:     c.Now,
		born:      time.Now(),
		units:     make(map[uint16]*logicalUnit),
		access:    make(map[uint16]access),
		nexuses:   make(map[*Nexus]struct{}),
		lost:      make(map[portName]struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.clock != nil {
		s.born = s.clock()
	}
	s.hooks.Store(&Hooks{Flush: func() {}, AbortWaiting: func(*Task) {}, DropSessions: func(string, string) {}})
	s.sequencer.start(s)
	if s.clock == nil {
		s.ticker.start(s)
	}
	return s
}

// SetHooks connects the transport. It is called once, before the first task.
// Hooks that are nil do nothing.
func (s *Server) SetHooks(h Hooks) {
	old := *s.hooks.Load()
	if h.Flush == nil {
		h.Flush = old.Flush
	}
	if h.AbortWaiting == nil {
		h.AbortWaiting = old.AbortWaiting
	}
	if h.DropSessions == nil {
		h.DropSessions = old.DropSessions
	}
	s.hooks.Store(&h)
}

// Close stops the device server's goroutines and waits for them. Copies in the
// background end at their next step. The transport
// has ended all tasks before; a task that is still under way after Close ends
// with BUSY at its next step.
func (s *Server) Close() {
	if s.ticker.quit != nil {
		s.ticker.stop()
	}
	s.workers.stop()
	s.sequencer.stop()
}

// Kick tells the node below that no more commands are at hand.
func (s *Server) Kick() { s.backend.Kick() }

// now is the time since the server was made.
func (s *Server) now() time.Duration {
	if s.clock != nil {
		return s.clock().Sub(s.born)
	}
	return time.Since(s.born)
}

// wallMillis is the time of day in milliseconds since 1970.
func (s *Server) wallMillis() int64 {
	if s.clock != nil {
		return s.clock().UnixMilli()
	}
	return time.Now().UnixMilli()
}

// A task's phases. A task that Begin finished stays idle.
//
//	idle -> begun (registered) -> started (its requests may be with the volume) -> idle
const (
	taskIdle = iota
	taskBegun
	taskStarted
	taskParked // started, and waits for something other than a request; see parking.go
)

// Why a task was aborted.
const (
	abortNot    = iota
	abortSilent // by its own nexus: no response
	abortStatus // by another nexus, TAS=1: status TASK ABORTED
)

// taskState is the device server's part of a Task.
type taskState struct {
	unit      *unitConfig // the logical unit as Begin found it; nil without one
	protected bool        // writes are refused
	cmd       *command
	start     time.Duration

	// Under itl.mu, set while the task is registered.
	itl        *itlNexus
	prev, next *Task
	phase      uint8
	abort      uint8
	waiters    []*abortWait
	parked     *parking

	off     uint64   // bytes: where the command works
	length  uint64   // bytes: on how much of the medium
	alloc   uint32   // replies: allocation length
	ordered *luState // replies that need the newest state: it
	aborts  uint32   // luState.aborts as Begin found it

	// Commands of several requests; see sequencer.go.
	step    func(*Server, *Task) // what to do after the current request; nil: the task ends
	queued  *Task                // the sequencer's list
	pos     uint64               // bytes done
	piece   uint64               // bytes of the current request
	mode    pieceMode
	list    cdb.UnmapList
	index   int
	data    []byte // Out, or our copy of it when it was borrowed
	small   *smallBuffer
	scratch []byte
}

// taskOf returns the task that a request is embedded in.
func taskOf(r *Request) *Task {
	return (*Task)(unsafe.Add(unsafe.Pointer(r), -int(unsafe.Offsetof(Task{}.Req))))
}

// Begin decodes a command and makes all checks that come before its data. It
// sets OutLen, InLen and Transfer, for Finished also Status and Sense. After
// WantData or Ready the task is registered with its logical unit until it is
// completed or forgotten. Begin does not block.
func (s *Server) Begin(t *Task) Verdict {
	t.state = taskState{start: s.now()}
	t.Aborted.Store(false)
	t.OutLen, t.InLen, t.Transfer = 0, 0, 0
	t.Status, t.SenseLen = cdb.Good, 0

	n := t.Nexus
	cmd, known := findCommand(&t.CDB)
	t.state.cmd = cmd
	itl := n.state.view.Load().find(t.LUN)
	if itl == nil {
		return s.beginWithoutUnit(t)
	}
	verdict := s.beginOn(t, itl, known)
	if verdict != Finished && !itl.register(t) {
		t.refuse(&senseLUN) // unmapped between the look-up and here
		verdict = Finished
	}
	if verdict == Finished {
		itl.account(s, t)
	}
	return verdict
}

// beginOn makes the checks in the order of the standard.
func (s *Server) beginOn(t *Task, itl *itlNexus, known bool) Verdict {
	cmd := t.state.cmd
	lu := itl.lu
	unit := lu.config.Load()
	t.state.itl = itl
	t.state.unit = unit

	if itl.pending.Load() != 0 || t.Nexus.state.lunsChanged.Load() {
		if cmd == nil || !cmd.passAttention {
			if a, ok := itl.takeAttention(); ok {
				sense := lu.attentionSense(a)
				return t.refuse(&sense)
			}
		}
	}
	if state := PathState(lu.path.Load()); state > ActiveNonOptimized {
		if cmd == nil || cmd.worksIn&pathBit(state) == 0 {
			return t.refuse(pathSense(state))
		}
	}
	grant := itl.grant.Load()
	access := AccessWrite // of an unknown command the worst is assumed
	if cmd != nil {
		access = cmd.accessOf(&t.CDB)
	}
	if grant.denies(access) {
		s.reviewReserve(lu)
		t.Status = cdb.ReservationConflict
		return Finished
	}
	if wipe := lu.state.Load().sanitize; wipe != nil && !wipe.admits(cmd) {
		sense := wipe.sense(unit)
		return t.refuse(&sense)
	}
	if !t.checkCommand(known) {
		return Finished
	}
	t.Req.State, t.Req.Recheck, t.Req.Abandoned = grant.id, recheck, &t.Aborted
	t.state.aborts = grant.aborts
	t.state.protected = unit.ReadOnly || itl.readOnly || grant.protected
	return cmd.begin(s, t)
}

// checkCommand checks what the command table knows: the operation code, the
// service action, and bits that are reserved or ask for what we do not do.
func (t *Task) checkCommand(known bool) bool {
	cmd := t.state.cmd
	offered := cmd == nil || cmd.offeredOn(t.state.unit)
	switch {
	case (cmd == nil && known || !offered && cmd.actions) && opcodes[t.CDB[0]].offeredOn(t.state.unit):
		sense := invalidField(1)
		sense.Bit, sense.HasBit = 4, true // SERVICE ACTION
		t.refuse(&sense)
		return false
	case cmd == nil || t.Extended || t.Read && t.Write || !offered:
		t.refuse(&senseOpcode)
		return false
	}
	if field, bit, found := cmd.reserved.FirstBit(&t.CDB); found {
		sense := invalidField(field)
		sense.Bit, sense.HasBit = bit, true
		t.refuse(&sense)
		return false
	}
	return true
}

// beginWithoutUnit answers for LUNs at which the initiator sees no logical unit.
func (s *Server) beginWithoutUnit(t *Task) Verdict {
	cmd := t.state.cmd
	wellKnown := t.LUN == cdb.WellKnownReportLUNs
	switch {
	case cmd == nil:
		if !wellKnown {
			return t.refuse(&senseLUN)
		}
		return t.refuse(&senseOpcode)
	case cmd.op == cdb.Inquiry, cmd.op == cdb.RequestSense:
	case cmd.op == cdb.ReportLUNs && (wellKnown || t.LUN == 0):
	case cmd.op == cdb.TestUnitReady && wellKnown:
	case wellKnown:
		return t.refuse(&senseOpcode)
	default:
		return t.refuse(&senseLUN)
	}
	if !t.checkCommand(true) {
		return Finished
	}
	return cmd.begin(s, t)
}

// TryExecute ends a Ready task now if that needs neither I/O nor waiting: t.In
// is filled, Status, Sense and Transfer are set, and Complete is not called. On
// false nothing has happened but that t.In may have been scribbled on, and the
// task is where Begin left it.
func (s *Server) TryExecute(t *Task) bool {
	cmd, itl := t.state.cmd, t.state.itl
	switch {
	case cmd.reply == nil && !cmd.tryRead, cmd.readsState:
		return false
	case itl == nil:
		s.answer(t)
		return true
	case !itl.tryBegin(t):
		return false
	}
	if cmd.reply != nil {
		s.answer(t)
	} else if !t.tryRead() {
		wake(itl.unbegin(t))
		return false
	}
	wake(itl.end(s, t))
	return true
}

// Execute starts a task after WantData (with Out) or Ready (with In). Complete
// follows, possibly before Execute returns. When OutBorrowed is set, t.Out is
// not used after Execute returns. Work may stay queued until Kick.
func (s *Server) Execute(t *Task) {
	cmd := t.state.cmd
	itl := t.state.itl
	switch {
	case itl == nil:
		s.answer(t)
		t.Complete(t)
	case !itl.begin(t):
		s.finish(t)
	case cmd.readsState:
		t.readState()
	case cmd.reply != nil:
		s.answer(t)
		s.finish(t)
	default:
		t.state.data = t.Out
		cmd.run(s, t)
	}
}

// Forget ends a task after Begin that will never be executed: its data were
// wrong, or it was aborted while it waited for them. After it returns the device
// server holds no reference to the task. For a task that Begin finished, or
// that was completed, it does nothing.
func (s *Server) Forget(t *Task) {
	if itl := t.state.itl; itl != nil {
		itl.forget(s, t)
	}
}

// submit hands the task's request to the volume. The caller has set what else
// the operation needs.
func (t *Task) submit(op RequestOp, off, length uint64, data []byte) {
	r := &t.Req
	r.Op = op
	r.Off, r.Len, r.Data = off, length, data
	r.Err = nil
	r.Miscompare = 0
	r.Bad = 0
	r.Atomic = t.state.cmd.atomic
	r.Scratch = nil
	r.Done = requestDone
	t.state.unit.Volume.Submit(r)
}

// requestDone is every request's Done.
func requestDone(r *Request) {
	t := taskOf(r)
	s := t.Nexus.server
	if t.state.step != nil {
		s.sequencer.add(s, t)
		return
	}
	s.conclude(t, r.Err)
}

// conclude ends a started task by the result of its last request.
func (s *Server) conclude(t *Task, err error) {
	if err == nil {
		t.Status = cdb.Good
	} else {
		s.fail(t, err)
	}
	s.finish(t)
}

// finish ends a task that Execute took: it leaves its logical unit, is
// completed, and task management that waits for it goes on.
func (s *Server) finish(t *Task) {
	st := &t.state
	if st.scratch != nil {
		s.scratch.put(st.scratch)
		st.scratch = nil
	}
	if st.small != nil {
		smallBuffers.Put(st.small)
		st.small = nil
	}
	st.data, st.list = nil, nil
	waiters := st.itl.end(s, t)
	t.Complete(t)
	wake(waiters)
}

// refuse sets CHECK CONDITION with this sense before any data moved.
func (t *Task) refuse(sense *cdb.Sense) Verdict {
	t.OutLen, t.InLen, t.Transfer = 0, 0, 0
	t.check(sense)
	return Finished
}

// check sets CHECK CONDITION with this sense, in fixed format as the control
// mode page says (D_SENSE=0).
func (t *Task) check(sense *cdb.Sense) {
	t.Status = cdb.CheckCondition
	t.SenseLen = sense.Encode(t.Sense[:], false)
}
