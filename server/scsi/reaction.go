package scsi

// publish makes a value of the ordered state the unit's: it is Watch's function.
// It runs on goroutines of the volume, one call at a time.
func (s *Server) publish(lu *logicalUnit, id StateID, value []byte, live bool) {
	next, err := decodeState(id, value)
	if err != nil {
		s.log.Error("state of a logical unit cannot be read, the last one stays in force: is a node of an older version running?",
			"volume", lu.config.Load().Name, "err", err)
		return
	}
	if live {
		// Before the grants: a request that is held against the new value must find
		// its task aborted when that is what the value means (see recheck).
		s.react(lu, lu.state.Load(), next)
	}
	registered := next.pr.ports()
	lu.mu.Lock()
	lu.state.Store(next)
	for i := range lu.itls {
		p := i.nexus.id()
		i.grant.Store(next.grant(p, registered[p]))
	}
	lu.mu.Unlock()
	s.tendSanitize(lu)
}

// react tells this node's initiators what another state means to them, and ends
// the tasks that it ends. It is called for every change in turn, on every node,
// on goroutines of the volume: what calls the transport is left to the sequencer.
func (s *Server) react(lu *logicalUnit, old, next *luState) {
	by := next.event.by
	switch next.event.kind {
	case eventMode:
		lu.raiseOthers(attentionMode, by)
	case eventIdentity:
		lu.raiseOthers(attentionIdentity, by)
	case eventTimestamp:
		lu.raiseOthers(attentionTimestamp, by)
	case eventReleased, eventCleared, eventPreempted, eventPreemptAborted:
		s.tellRegistrants(lu, old, next)
	case eventTasksCleared:
		s.abortFrom(lu, func(p portID) bool { return p != by })
	case eventReset:
		lu.raise(attentionReset)
		s.copies.stopUnit(lu)
		s.abortFrom(lu, func(p portID) bool { return p != by })
	case eventColdReset:
		lu.raise(attentionReset)
		s.copies.stopUnit(lu)
		s.abortFrom(lu, func(p portID) bool { return p != by })
		if by.target != s.nodePort { // there the answer goes first, see targetReset
			s.sequencer.later(func() { s.hooks.Load().DropSessions("", "target cold reset by "+by.initiator) })
		}
	}
}

// tellRegistrants raises the unit attentions of a change of persistent
// reservations (SPC-4 "Persistent reservations"): never for the nexus that made
// the change. After PREEMPT AND ABORT it ends the tasks of those whose
// registration went.
func (s *Server) tellRegistrants(lu *logicalUnit, old, next *luState) {
	event := next.event
	before, after := old.pr.ports(), next.pr.ports()
	for _, i := range lu.members() {
		p := i.nexus.id()
		if p == event.by || !before[p] {
			continue
		}
		switch {
		case event.kind == eventCleared:
			i.raise(attentionCleared)
		case event.kind == eventReleased:
			if old.pr.kind.forRegistrants() {
				i.raise(attentionReleased)
			}
		case !after[p]:
			i.raise(attentionPreempted)
		case old.pr.kind != next.pr.kind:
			i.raise(attentionReleased)
		}
	}
	if event.kind == eventPreemptAborted {
		s.abortFrom(lu, func(p portID) bool { return p != event.by && before[p] && !after[p] })
	}
}

// abortFrom ends the tasks of other initiators on this node, with status TASK
// ABORTED. Nobody is waited for here: whoever made the change waits for the tasks
// on its own node, and no other node's task has an effect after it, since
// what is sequenced later is rechecked.
func (s *Server) abortFrom(lu *logicalUnit, victim func(portID) bool) {
	a := abort{s: s}
	for _, i := range lu.members() {
		if victim(i.nexus.id()) {
			a.tasksOf(i, nil)
		}
	}
	if len(a.waiting) > 0 {
		s.sequencer.later(a.giveUp)
	}
}

// raiseOthers queues a unit attention for every nexus of the unit but one.
func (lu *logicalUnit) raiseOthers(a attention, but portID) {
	for _, i := range lu.members() {
		if i.nexus.id() != but {
			i.raise(a)
		}
	}
}
