package scsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// luState is the ordered state of a logical unit: what every node must answer
// alike, across take-over and restart (C2). It travels in the volume's stream of
// operations as one value; each node decodes what its replica holds. A published
// luState is never modified, nor is anything that it points to: an edit works on
// a copy.
type luState struct {
	id         StateID
	event      stateEvent
	pr         persistent     // PERSISTENT RESERVE OUT
	legacy     *legacyReserve // RESERVE; nil when nobody holds the unit so
	protected  bool           // SWP of the control mode page
	identity   []byte         // SET IDENTIFYING INFORMATION
	clock      *clockSetting  // SET TIMESTAMP; nil: the nodes' clocks
	aborts     uint32         // how often all tasks of the unit were aborted, on every node
	tokens     []*tokenRecord
	sanitize   *sanitizeRecord
	thresholds []thresholdSetting
	unknown    []section
}

// portID names an initiator port at a target port: an I_T nexus in the whole cluster.
type portID struct {
	initiator string
	isid      [6]byte
	target    uint16 // relative target port id
}

func (n *Nexus) id() portID { return portID{n.Initiator, n.ISID, n.Port} }

// eventKind says what made a state, so that every node can tell its initiators.
// Part of the wire and disk formats, do not change.
type eventKind uint8

const (
	// eventOther has nothing to be told.
	eventOther eventKind = 0
	// eventMode: MODE SELECT.
	eventMode eventKind = 1
	// eventReleased: a persistent reservation ended by RELEASE or because its holder
	// unregistered.
	eventReleased eventKind = 2
	// eventCleared: PERSISTENT RESERVE OUT with CLEAR.
	eventCleared eventKind = 3
	// eventPreempted: PERSISTENT RESERVE OUT with PREEMPT.
	eventPreempted eventKind = 4
	// eventPreemptAborted: the same with PREEMPT AND ABORT.
	eventPreemptAborted eventKind = 5
	// eventTasksCleared: CLEAR TASK SET.
	eventTasksCleared eventKind = 6
	// eventReset: LOGICAL UNIT RESET or TARGET WARM RESET.
	eventReset eventKind = 7
	// eventColdReset: TARGET COLD RESET, at the last unit that it resets.
	eventColdReset eventKind = 8
	// eventIdentity: SET IDENTIFYING INFORMATION.
	eventIdentity eventKind = 9
	// eventTimestamp: SET TIMESTAMP.
	eventTimestamp eventKind = 10
)

// stateEvent is the change that led to a state, and whose it was.
type stateEvent struct {
	kind eventKind
	by   portID
}

// The encoded state: a version byte, then sections in ascending order of their tag:
//
//	0  u8  tag    1  u16 length of the body, big-endian    3  body
//
// A section whose tag this version does not know is kept as it is, so that nodes
// of two versions do not lose each other's state. Part of the wire and disk
// formats, do not change.
const stateVersion = 1

const (
	sectionEvent      = 1
	sectionReserve    = 2
	sectionLegacy     = 3
	sectionControl    = 4
	sectionIdentity   = 5
	sectionThresholds = 6
	sectionSanitize   = 7
	sectionTokens     = 8
	sectionTimestamp  = 9
	sectionAborts     = 10
)

// section is one that this version does not know.
type section struct {
	tag  byte
	body []byte
}

// stateSections is the codec: put appends a body, nothing for an absent one; get
// takes one and must copy what it keeps.
var stateSections = [...]struct {
	tag byte
	put func(*luState, []byte) []byte
	get func(*luState, []byte) error
}{
	{sectionEvent, (*luState).putEvent, (*luState).getEvent},
	{sectionReserve, (*luState).putReserve, (*luState).getReserve},
	{sectionLegacy, (*luState).putLegacy, (*luState).getLegacy},
	{sectionControl, (*luState).putControl, (*luState).getControl},
	{sectionIdentity, (*luState).putIdentity, (*luState).getIdentity},
	{sectionThresholds, (*luState).putThresholds, (*luState).getThresholds},
	{sectionSanitize, (*luState).putSanitize, (*luState).getSanitize},
	{sectionTokens, (*luState).putTokens, (*luState).getTokens},
	{sectionTimestamp, (*luState).putTimestamp, (*luState).getTimestamp},
	{sectionAborts, (*luState).putAborts, (*luState).getAborts},
}

var errState = errors.New("unreadable state of a logical unit")

// encode appends the state.
func (st *luState) encode(b []byte) []byte {
	b = append(b, stateVersion)
	rest := st.unknown
	add := func(tag byte, put func([]byte) []byte) {
		start := len(b)
		b = put(append(b, tag, 0, 0))
		if len(b) == start+3 {
			b = b[:start]
			return
		}
		binary.BigEndian.PutUint16(b[start+1:], uint16(len(b)-start-3))
	}
	for i := range stateSections {
		s := &stateSections[i]
		for ; len(rest) > 0 && rest[0].tag < s.tag; rest = rest[1:] {
			add(rest[0].tag, func(b []byte) []byte { return append(b, rest[0].body...) })
		}
		add(s.tag, func(b []byte) []byte { return s.put(st, b) })
	}
	for _, u := range rest {
		add(u.tag, func(b []byte) []byte { return append(b, u.body...) })
	}
	return b
}

// decodeState reads a value of the ordered state; an empty one is that of a new unit.
func decodeState(id StateID, b []byte) (*luState, error) {
	st := &luState{id: id}
	if len(b) == 0 {
		return st, nil
	}
	if b[0] != stateVersion {
		return nil, fmt.Errorf("%w: version %d", errState, b[0])
	}
	last := byte(0)
	for b = b[1:]; len(b) > 0; {
		if len(b) < 3 {
			return nil, fmt.Errorf("%w: cut short", errState)
		}
		tag, n := b[0], int(binary.BigEndian.Uint16(b[1:]))
		if tag <= last || n == 0 || len(b)-3 < n {
			return nil, fmt.Errorf("%w: section %d of %d bytes", errState, tag, n)
		}
		body := b[3 : 3+n]
		b, last = b[3+n:], tag
		known := false
		for i := range stateSections {
			if s := &stateSections[i]; s.tag == tag {
				known = true
				if err := s.get(st, body); err != nil {
					return nil, fmt.Errorf("section %d: %w", tag, err)
				}
			}
		}
		if !known {
			st.unknown = append(st.unknown, section{tag, slices.Clone(body)})
		}
	}
	return st, nil
}

// edited returns a copy to be changed, with the event that the change is.
func (st *luState) edited(kind eventKind, by portID) *luState {
	next := *st
	next.event = stateEvent{kind, by}
	return &next
}

// getNumber reads a number whose type belongs to the store.
func getNumber[N ~uint64](n *N, b []byte) { *n = N(binary.BigEndian.Uint64(b)) }

func appendPort(b []byte, p portID) []byte {
	b = append(b, p.isid[:]...)
	b = binary.BigEndian.AppendUint16(b, p.target)
	b = append(b, byte(len(p.initiator)))
	return append(b, p.initiator...)
}

// cutPort reads a port from the beginning of b and returns the rest.
func cutPort(b []byte) (p portID, rest []byte, err error) {
	if len(b) < 9 || len(b)-9 < int(b[8]) {
		return p, nil, fmt.Errorf("%w: port cut short", errState)
	}
	copy(p.isid[:], b)
	p.target = binary.BigEndian.Uint16(b[6:])
	n := 9 + int(b[8])
	p.initiator = string(b[9:n])
	return p, b[n:], nil
}

func (st *luState) putEvent(b []byte) []byte {
	if st.event.kind == eventOther {
		return b
	}
	return appendPort(append(b, byte(st.event.kind)), st.event.by)
}

func (st *luState) getEvent(b []byte) (err error) {
	st.event.kind = eventKind(b[0])
	st.event.by, _, err = cutPort(b[1:])
	return err
}

func (st *luState) putControl(b []byte) []byte {
	if !st.protected {
		return b
	}
	return append(b, 1)
}

func (st *luState) getControl(b []byte) error {
	st.protected = b[0]&1 != 0
	return nil
}

func (st *luState) putIdentity(b []byte) []byte { return append(b, st.identity...) }

func (st *luState) getIdentity(b []byte) error {
	st.identity = slices.Clone(b)
	return nil
}

func (st *luState) putAborts(b []byte) []byte {
	if st.aborts == 0 {
		return b
	}
	return binary.BigEndian.AppendUint32(b, st.aborts)
}

func (st *luState) getAborts(b []byte) error {
	if len(b) != 4 {
		return fmt.Errorf("%w: a count of %d bytes", errState, len(b))
	}
	st.aborts = binary.BigEndian.Uint32(b)
	return nil
}

// refusal is an edit's error that has a sense of its own.
type refusal struct{ sense cdb.Sense }

func (*refusal) Error() string { return "the command is refused" }

// stateChange is one change of the ordered state on its way: computed from the
// newest value, submitted, and computed again when another change came first.
type stateChange struct {
	s     *Server
	lu    *logicalUnit
	edit  func(now *luState) (*luState, error)
	done  func(after *luState, err error)
	req   Request
	after *luState
	tries int
}

// changeTries bounds how often a change is overtaken by others before it is BUSY.
const changeTries = 100

// changeState changes the ordered state of a unit. edit is given the newest value
// and returns the next one (made with edited), nil when nothing is to be
// changed, or an error to end the change with; it may be called several times
// and must not block. done is called once, on the sequencer's goroutine, with the
// value in force: after it every node acts by the new value. Not to be called
// from inside a request's Done: there the sequencer comes between.
func (s *Server) changeState(lu *logicalUnit, edit func(now *luState) (*luState, error), done func(after *luState, err error)) {
	c := &stateChange{s: s, lu: lu, edit: edit, done: done}
	if lu.changes.enter(c) {
		c.begin()
	}
}

func (c *stateChange) begin() {
	c.read()
	c.s.backend.Kick() // task management comes without one
}

// end reports the outcome, and lets the unit's next change begin.
func (c *stateChange) end(after *luState, err error) {
	next := c.lu.changes.leave()
	c.done(after, err)
	if next != nil {
		next.begin()
	}
}

// changeQueue has the changes of one unit on this node go one after the other:
// only those of other nodes can overtake one. Commands and functions under way
// bound it.
type changeQueue struct {
	mu      sync.Mutex
	busy    bool
	waiting []*stateChange
}

// enter says whether c may begin; else it waits.
func (q *changeQueue) enter(c *stateChange) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.busy {
		q.waiting = append(q.waiting, c)
		return false
	}
	q.busy = true
	return true
}

// leave ends the turn of a change and returns the next one, or nil.
func (q *changeQueue) leave() *stateChange {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == 0 {
		q.busy, q.waiting = false, nil
		return nil
	}
	c := q.waiting[0]
	q.waiting = q.waiting[1:]
	return c
}

func (c *stateChange) submit(op RequestOp, data []byte) {
	c.req = Request{Op: op, Data: data, State: c.req.State, Done: func(*Request) { c.wake() }}
	c.lu.config.Load().Volume.Submit(&c.req)
}

// wake has the sequencer take the next step; when it is closed the change ends,
// and those of the unit that wait for it.
func (c *stateChange) wake() {
	if c.s.sequencer.later(c.step) {
		return
	}
	for c != nil {
		next := c.lu.changes.leave()
		c.done(nil, ErrBusy)
		c = next
	}
}

func (c *stateChange) read() {
	c.after = nil
	c.submit(OpReadState, nil)
}

// step goes on after a request has ended.
func (c *stateChange) step() {
	err := c.req.Err
	switch {
	case errors.Is(err, ErrStateMoved) && c.tries < changeTries:
		c.tries++
		c.read()
		return
	case errors.Is(err, ErrStateMoved):
		c.end(nil, ErrBusy)
		return
	case err != nil:
		c.end(nil, err)
		return
	case c.after != nil:
		c.after.id = c.req.State
		c.end(c.after, nil)
		return
	}
	now, err := decodeState(c.req.State, c.req.Value)
	if err != nil {
		c.s.log.Error("state of a logical unit cannot be read", "volume", c.lu.config.Load().Name, "err", err)
		c.end(nil, ErrBusy)
		return
	}
	next, err := c.edit(now)
	if err != nil || next == nil {
		c.end(now, err)
		return
	}
	data := next.encode(nil)
	if len(data) > stateBytesMax {
		c.end(now, &refusal{senseResources})
		return
	}
	c.after = next
	c.submit(OpState, data)
}

// changeState runs a change for a command and ends the command by its outcome.
func (t *Task) changeState(s *Server, edit func(now *luState) (*luState, error)) {
	s.changeState(t.state.itl.lu, t.checkedEdit(edit), func(_ *luState, err error) { s.concludeChange(t, err) })
}

// checkedEdit is an edit for a command: it first makes the checks of Begin again
// that depend on the ordered state, as recheck does for a request.
func (t *Task) checkedEdit(edit func(now *luState) (*luState, error)) func(now *luState) (*luState, error) {
	return func(now *luState) (*luState, error) {
		switch {
		case t.Aborted.Load(), now.aborts != t.state.aborts:
			return nil, ErrBusy // the status is the abort's, which may not have come here yet
		case now.grantTo(t.Nexus.id()).denies(t.state.cmd.access):
			return nil, ErrReserved
		}
		return edit(now)
	}
}

func (s *Server) concludeChange(t *Task, err error) {
	var r *refusal
	if errors.As(err, &r) {
		t.check(&r.sense)
		s.finish(t)
		return
	}
	s.conclude(t, err)
}

// readState gets the newest state for a command whose reply needs it.
func (t *Task) readState() {
	t.state.step = stepState
	t.Req.Recheck = nil
	t.Req.FUA, t.Req.Borrowed = false, false // a task's memory is used again and again
	t.submit(OpReadState, 0, 0, nil)
}

func stepState(s *Server, t *Task) {
	err := t.Req.Err
	if err == nil && !t.Aborted.Load() {
		if t.state.ordered, err = decodeState(t.Req.State, t.Req.Value); err != nil {
			err = ErrBusy
		}
	}
	t.Req.Value = nil
	if err != nil || t.Aborted.Load() {
		s.conclude(t, err)
		return
	}
	s.answer(t)
	s.finish(t)
}
