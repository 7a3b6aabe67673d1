package lsfs

import (
	"fmt"

	"github.com/twinsan/twinsan/lsfs/format"
)

// drainStep does the next piece of work for a device that what stands on it shall
// leave: moves the contents of one segment, or sees a checkpoint through. It says
// whether there is more to do at once. It runs on the cleaner's goroutine.
func (s *Store) drainStep() bool {
	var m *member
	lost := false
	s.mu.RLock()
	for _, x := range s.segs.layout.Load().members {
		if leaves(x.state) || x.lost() {
			m, lost = x, x.lost()
			break
		}
	}
	s.mu.RUnlock()
	if m == nil || s.failure() != nil {
		return false
	}
	left := s.drainLeft(m)
	switch {
	case lost && left.bad > 0:
		return false // until the last block was repaired
	case left.victim != format.NoSegment:
		s.mu.RLock()
		seg := &s.segs.all[left.victim]
		need := int64(seg.live+seg.pages) + (s.pg.nDirty.Load()+s.ckpt.pending.Load())*format.PageSize*9/8 + 4*int64(s.segs.bytes)
		s.mu.RUnlock()
		if s.freeBytes() < need {
			return false // the cleaner makes room first, and comes back
		}
		s.cleanSegment(left.victim)
		s.drainStuck(m, "")
		return true
	case left.log:
		if s.post(&task{kind: taskTurn}) != nil {
			return false
		}
		return s.checkpoint() == nil
	case left.cold:
		s.leaveDevice(m)
		return true
	case left.pages:
		return s.checkpoint() == nil // it opens another one
	case left.waiting > 0:
		before := s.segs.idle.Load()
		for range 3 {
			if s.checkpoint() != nil {
				return false
			}
		}
		return s.segs.idle.Load() != before
	case left.bad > 0:
		s.drainStuck(m, fmt.Sprintf("%d segments hold blocks that cannot be read intact: they are repaired from the other node when a scrub or a read finds them, and the drain goes on", left.bad))
		return false
	}
	return s.drained(m)
}

// turnLog has the log leave its open segment for the next one, with an empty commit: none
// is passed over without a commit, where replay would not find the way. The caller has the committing role.
func (s *Store) turnLog() error {
	s.log.turn.Lock()
	s.log.left.Store(0)
	s.log.turn.Unlock()
	return s.commitMoves(nil)
}

// drainLeft is what keeps a device from being empty.
type drainLeft struct {
	victim  uint32 // a segment to clean
	log     bool   // the log is there
	cold    bool   // what is moved is put there
	pages   bool   // checkpoints are
	waiting int    // segments that checkpoints free
	bad     int    // segments that cannot be cleaned
}

func (s *Store) drainLeft(m *member) drainLeft {
	_, done := s.ckpt.numbers()
	l := drainLeft{victim: format.NoSegment}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for n := m.first; n < m.first+m.count; n++ {
		seg := &s.segs.all[n]
		switch {
		case seg.state == segmentFree:
		case seg.state == segmentOpen && seg.stream == streamPages:
			l.pages = true
		case seg.state == segmentOpen && seg.stream >= streamCold:
			l.cold = true
		case seg.state == segmentNext || seg.state == segmentOpen:
			l.log = true
		case seg.state == segmentSealed && seg.live+seg.pages > 0 && seg.bad:
			l.bad++
		case seg.state == segmentSealed && seg.live+seg.pages > 0 && seg.leaves <= done:
			if l.victim == format.NoSegment {
				l.victim = n
			}
		default:
			l.waiting++
		}
	}
	return l
}

// drainStuck notes why a drain does not get on, and tells it once.
func (s *Store) drainStuck(m *member, why string) {
	s.mu.Lock()
	news := m.stuck == "" && why != ""
	m.stuck = why
	s.mu.Unlock()
	if news {
		s.cfg.Event(Event{Code: "device-drain-stuck", Text: fmt.Sprintf("the drain of device %s does not get on: %s", m.Path(), why)})
	}
}

// drained records that a device is empty, and removes it if it was to leave.
func (s *Store) drained(m *member) bool {
	if !s.changing.TryLock() {
		return false // somebody changes the list; the next tick comes back
	}
	defer s.changing.Unlock()
	remove := false
	err := s.rearrange(func() error {
		if !leaves(m.state) && !m.lost() {
			return fmt.Errorf("%w %s is kept", ErrDevice, m.Path())
		}
		for n := m.first; n < m.first+m.count; n++ {
			if seg := &s.segs.all[n]; seg.state != segmentFree || seg.readers.Load() != 0 {
				return fmt.Errorf("%w %s is not empty", ErrDevice, m.Path())
			}
		}
		if remove = m.state != format.MemberDraining; remove {
			s.segs.part(m)
			s.generation++
		} else {
			m.state = format.MemberDrained
		}
		return nil
	})
	if err != nil {
		return false
	}
	s.logger.Info("device drained", "device", m.Path(), "id", m.id.String())
	s.cfg.Event(Event{Code: "device-drained", Text: fmt.Sprintf("nothing stands on device %s (%s) any more", m.Path(), m.id)})
	if remove {
		s.farewell(m)
	}
	return true
}
