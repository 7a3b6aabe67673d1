package scsi

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

const (
	// maxCopies bounds the copy operations under way on this node, foreground and
	// background. Beyond it they are answered TASK SET FULL.
	maxCopies = 64
	// maxKept bounds the finished operations that one nexus may still ask one unit
	// about; the oldest is forgotten first.
	maxKept = 16
	// maxKeptAll bounds those of all nexuses.
	maxKeptAll = 2048
	// keptFor is how long a finished operation may be asked about.
	keptFor = 60 * time.Second
)

// COPY OPERATION STATUS (SPC-4 "RECEIVE COPY STATUS(LID4) command"). Hosts take
// copyPartial as "go on from TRANSFER COUNT".
const (
	copyGood       = 0x01
	copyFailed     = 0x02
	copyPartial    = 0x03
	copyForeground = 0x11
	copyBackground = 0x12
	copyTerminated = 0x60
)

// copyParty is whose list identifiers are told apart: those of one nexus at one unit.
type copyParty struct {
	nexus *Nexus
	lu    *logicalUnit
}

// operation is a third-party copy command from its execution until its status is
// read or forgotten (SPC-4 "Third-party copy commands"). The fields above mu do
// not change; result is written once, before ended.
//
//	admit -> under way -> finish -> kept -> read, replaced or forgotten
type operation struct {
	s       *Server
	party   copyParty
	itl     *itlNexus
	unit    *unitConfig
	action  byte // service action of the command
	id      uint32
	known   bool // has a list identifier while it is under way
	keep    bool // and afterwards
	immed   bool // goes on in the background
	started time.Duration
	task    *Task // ends with the operation; nil once it is in the background

	aborted  atomic.Bool   // by COPY OPERATION ABORT
	bytes    atomic.Uint64 // moved so far
	segments atomic.Uint32 // done so far

	// Under copyTable.mu.
	ended   bool
	endedAt time.Duration
	result  copyResult
	waiters []*Task // COPY OPERATION ABORT
}

// copyResult is how an operation ended.
type copyResult struct {
	state    byte // COPY OPERATION STATUS
	status   byte // of the command
	sense    [64]byte
	senseLen int
	token    *[cdb.TokenBytes]byte // of POPULATE TOKEN
}

// stopped says whether the operation shall not go on.
func (op *operation) stopped() bool {
	return op.aborted.Load() || op.task != nil && op.task.Aborted.Load()
}

// copyTable holds the operations under way and those that are kept.
type copyTable struct {
	mu      sync.Mutex
	running int
	kept    int
	parties map[copyParty][]*operation // in order of their beginning
}

// admission is what admit says.
type admission uint8

const (
	admitted admission = iota
	admitInUse
	admitFull
)

// admit registers an operation that begins. A finished one with the same list
// identifier is forgotten.
func (c *copyTable) admit(op *operation) admission {
	c.mu.Lock()
	defer c.mu.Unlock()
	if op.known {
		if old := c.findLocked(op.party, op.id); old != nil {
			if !old.ended {
				return admitInUse
			}
			c.dropLocked(old)
		}
	}
	if c.running >= maxCopies {
		return admitFull
	}
	c.running++
	if op.known {
		if c.parties == nil {
			c.parties = make(map[copyParty][]*operation)
		}
		c.parties[op.party] = append(c.parties[op.party], op)
	}
	return admitted
}

// stopUnit stops the operations of a unit that was reset, those in the background
// too: they are no tasks.
func (c *copyTable) stopUnit(lu *logicalUnit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for party, list := range c.parties {
		if party.lu != lu {
			continue
		}
		for _, op := range list {
			if !op.ended {
				op.aborted.Store(true)
			}
		}
	}
}

func (c *copyTable) findLocked(p copyParty, id uint32) *operation {
	for _, op := range c.parties[p] {
		if op.id == id {
			return op
		}
	}
	return nil
}

func (c *copyTable) dropLocked(op *operation) {
	list := c.parties[op.party]
	i := slices.Index(list, op)
	if i < 0 {
		return
	}
	if op.ended {
		c.kept--
	}
	if list = slices.Delete(list, i, i+1); len(list) == 0 {
		delete(c.parties, op.party)
	} else {
		c.parties[op.party] = list
	}
}

// end marks an operation finished and returns the commands that wait for it.
func (c *copyTable) end(op *operation, r *copyResult, now time.Duration) []*Task {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running--
	op.result, op.endedAt = *r, now
	waiters := op.waiters
	op.waiters = nil
	if !op.keep {
		c.dropLocked(op)
		op.ended = true
		return waiters
	}
	op.ended = true
	c.kept++
	kept := 0
	var oldest *operation
	for _, o := range c.parties[op.party] {
		if o.ended {
			if kept++; oldest == nil || o.endedAt < oldest.endedAt {
				oldest = o
			}
		}
	}
	if kept > maxKept {
		c.dropLocked(oldest)
	}
	if c.kept > maxKeptAll {
		c.forgetLocked(func(o *operation) bool { return o != op && c.kept > maxKeptAll })
	}
	return waiters
}

// forgetLocked drops finished operations.
func (c *copyTable) forgetLocked(which func(*operation) bool) {
	for _, list := range c.parties {
		for _, op := range slices.Clone(list) {
			if op.ended && which(op) {
				c.dropLocked(op)
			}
		}
	}
}

// sweep forgets what was kept long enough.
func (c *copyTable) sweep(now time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetLocked(func(op *operation) bool { return now-op.endedAt >= keptFor })
}

// copyView is what RECEIVE COPY commands tell of an operation.
type copyView struct {
	action   byte
	state    byte
	ended    bool
	bytes    uint64
	segments uint32
	shift    uint8
	result   *copyResult // of an ended one; not modified any more
}

// look finds an operation for a RECEIVE COPY command of its party. read says, of
// an ended one, whether that frees it.
func (c *copyTable) look(p copyParty, id uint32, now time.Duration, read func(*operation) bool) (v copyView, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	op := c.findLocked(p, id)
	if op == nil || op.ended && now-op.endedAt >= keptFor {
		return v, false
	}
	v = copyView{action: op.action, ended: op.ended, bytes: op.bytes.Load(), segments: op.segments.Load(), shift: op.unit.shift}
	switch {
	case op.ended:
		v.state, v.result = op.result.state, &op.result
		if read != nil && read(op) {
			c.dropLocked(op)
		}
	case op.immed:
		v.state = copyBackground
	default:
		v.state = copyForeground
	}
	return v, true
}

// beginCopy admits an operation for a command that is being executed. On false the
// command has ended.
func (s *Server) beginCopy(op *operation, t *Task) bool {
	op.s, op.itl, op.unit = s, t.state.itl, t.state.unit
	op.party = copyParty{t.Nexus, t.state.itl.lu}
	op.action = t.state.cmd.action
	op.task = t
	op.started = s.now()
	switch s.copies.admit(op) {
	case admitInUse:
		t.check(&senseInProgress)
		s.finish(t)
	case admitFull:
		t.Status = cdb.TaskSetFull
		s.finish(t)
	default:
		return true
	}
	return false
}

// detach puts an operation with immed into the background: its command ends now.
func (op *operation) detach() {
	if !op.immed {
		return
	}
	t := op.task
	op.task = nil
	op.s.conclude(t, nil)
}

// finish ends an operation, and its command by it.
func (op *operation) finish(r *copyResult) {
	s, t := op.s, op.task
	if op.stopped() && r.state != copyGood {
		r.state = copyTerminated
	}
	if t != nil {
		t.state.length = op.bytes.Load()
		t.Status = r.status
		t.SenseLen = copy(t.Sense[:], r.sense[:r.senseLen])
	}
	waiters := s.copies.end(op, r, s.now())
	if t != nil {
		s.finish(t)
	}
	for _, w := range waiters {
		s.conclude(w, nil)
	}
}

// finishError ends an operation as a command ends by an error of its volume.
func (op *operation) finishError(err error) {
	r := copyResult{state: copyFailed}
	r.setError(err)
	if errors.Is(err, ErrUnavailable) && op.task != nil {
		// As for every command: see Server.fail.
		op.task.Aborted.Store(true)
		op.s.dropNexus(op.party.nexus)
	}
	op.finish(&r)
}

// runCopyAbort is COPY OPERATION ABORT. It ends when the operation has.
func runCopyAbort(s *Server, t *Task) {
	const idField = 2
	id := be32(t.CDB[idField:])
	c := &s.copies
	c.mu.Lock()
	op := c.findLocked(copyParty{t.Nexus, t.state.itl.lu}, id)
	if op != nil && !op.ended {
		op.aborted.Store(true)
		op.waiters = append(op.waiters, t)
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	sense := invalidField(idField)
	t.check(&sense)
	s.finish(t)
}
