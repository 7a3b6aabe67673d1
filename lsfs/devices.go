package lsfs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// A change of the devices is a change of the list in the superblocks, and they are
// written by checkpoints. So each step is: change the list under the committing role
// and Store.mu, then see a checkpoint through. What a crash leaves is one list or the
// other:
//
//	add     joining in all superblocks, its own too -> told to Persist -> active ->
//	        only now segments are taken from it
//	drain   draining: nothing new is put there, the cleaner empties its segments ->
//	        drained when two checkpoints name none of them
//	remove  not in the list of any other device -> told to Persist -> its own
//	        superblocks are wiped
//
// A start finds a joining device and makes it active, or misses it and drops it; goes
// on with a drain; removes a device that was leaving once it is empty. Segment numbers
// are addresses, so those of a removed device are never given out again.

// ErrDevice: the device is unknown, or not in a state that allows what was asked.
var ErrDevice = errors.New("device")

// NewDevice says how AddDevice takes a device.
type NewDevice struct {
	Class Class
	// Force takes a device that is not empty. What was on it is lost.
	Force bool
	// Replaces is a device that is drained and removed as soon as the new one is in
	// use. Zero: none.
	Replaces DeviceID
}

// usableOf is how much of size bytes of segments data may take.
func (s *Store) usableOf(size int64) int64 {
	// A twentieth goes to commit headers, records and padding of what the cleaner packs.
	return max(0, (size-reserveSegments*int64(s.segs.bytes))/20*19*int64(100-s.cfg.GarbageMax)/100)
}

// logClass is the class of devices that take the log.
func (s *Store) logClass() Class {
	if s.segs.countOf[Flash].Load() > 0 {
		return Flash
	}
	return Capacity
}

// rearrange changes the list of devices by f and makes it durable. f runs with the
// committing role and Store.mu. The caller holds Store.changing.
func (s *Store) rearrange(f func() error) error {
	if err := s.failure(); err != nil {
		return err
	}
	s.enter()
	s.mu.Lock()
	err := f()
	if err == nil {
		s.segs.recount()
		s.usable.Store(s.usableOf(s.segs.size() * int64(s.segs.bytes)))
	}
	s.mu.Unlock()
	s.leave()
	if err != nil {
		return err
	}
	return s.checkpoint()
}

// findDevice finds a device of the pool by its id.
func (s *Store) findDevice(id DeviceID) (*member, error) {
	for _, m := range s.segs.layout.Load().members {
		if m.id == id {
			return m, nil
		}
	}
	return nil, fmt.Errorf("%w %s is not in the pool", ErrDevice, id)
}

// AddDevice makes a device part of the pool while it is in use. It is durable on
// return. A device whose first MiB is not all zeros is refused (ErrInUse) unless forced.
func (s *Store) AddDevice(ctx context.Context, path string, o NewDevice) (DeviceInfo, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	if err := ctx.Err(); err != nil {
		return DeviceInfo{}, err
	}
	m, err := s.openNew(path, o)
	if err != nil {
		return DeviceInfo{}, fmt.Errorf("add device: %w", err)
	}
	if err := s.adopt(m, o); err != nil {
		return DeviceInfo{}, fmt.Errorf("add device %s: %w", path, err)
	}
	s.logger.Info("device added", "device", path, "id", m.id.String(), "class", m.class.String())
	for _, d := range s.Devices() {
		if d.ID == m.id {
			return d, nil
		}
	}
	return DeviceInfo{}, fmt.Errorf("%w %s has left again", ErrDevice, path)
}

// openNew opens a device that may join, and proves that it can be written.
func (s *Store) openNew(path string, o NewDevice) (_ *member, err error) {
	for _, m := range s.segs.layout.Load().members {
		if m.Path() == path {
			return nil, fmt.Errorf("%w %s is in the pool already", ErrDevice, path)
		}
	}
	if o.Class >= classes {
		return nil, fmt.Errorf("%w class %d is not known", ErrDevice, o.Class)
	}
	d, err := s.cfg.OpenDevice(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = d.Close()
		}
	}()
	n := (d.Size() - format.SuperblockArea) / int64(s.segs.bytes)
	if n < 1 || int64(format.NoSegment) <= n {
		return nil, fmt.Errorf("%w %s has %d bytes, too small for a segment of %d", ErrDevice, path, d.Size(), s.segs.bytes)
	}
	buf := device.AlignedBuffer(format.SuperblockArea)
	defer device.FreeAligned(buf)
	if !o.Force {
		if err := mustBeEmpty(d, buf); err != nil {
			return nil, err
		}
	}
	clear(buf)
	// A device that fails its first writes fails here, where it harms nothing.
	if err := d.WriteAt(buf, 0); err != nil {
		return nil, err
	}
	if err := d.Flush(); err != nil {
		return nil, err
	}
	m := &member{Metered: device.Meter(d), count: uint32(n), class: o.Class, state: format.MemberJoining}
	_, _ = rand.Read(m.id[:])
	return m, nil
}

// adopt takes an opened device through joining to active.
func (s *Store) adopt(m *member, o NewDevice) error {
	t := s.segs
	joined := false
	err := s.rearrange(func() error {
		if o.Replaces != (DeviceID{}) {
			old, err := s.findDevice(o.Replaces)
			if err != nil {
				return err
			}
			if err := s.fitsWithout(old, int64(m.count)); err != nil {
				return err
			}
		}
		if len(t.layout.Load().members) == format.DevicesMax {
			return fmt.Errorf("%w: the pool has %d devices, the most that it takes", ErrDevice, format.DevicesMax)
		}
		if int64(t.count())+int64(m.count) >= int64(format.NoSegment) || t.grow(t.count()+m.count) != nil {
			return fmt.Errorf("%w: %d more segments than %d need a restart of the node first", ErrDevice, m.count, t.count())
		}
		m.first = t.count() - m.count
		t.join(m)
		for n := m.first; n < m.first+m.count; n++ {
			t.all[n].state = segmentFree
		}
		joined = true
		s.generation++
		return nil
	})
	if !joined {
		_ = m.Close()
		return err
	}
	if err == nil {
		s.mu.RLock()
		err = m.failed
		generation := s.generation
		s.mu.RUnlock()
		if err == nil {
			err = s.cfg.Persist(generation, s.Devices())
		}
	}
	if err != nil {
		// Out again: nothing stands on it. If this fails too, the next start drops it.
		return errors.Join(err, s.expel(m))
	}
	var old *member
	err = s.rearrange(func() (err error) {
		if o.Replaces != (DeviceID{}) {
			if old, err = s.findDevice(o.Replaces); err != nil {
				return err
			}
			old.state = format.MemberLeaving
		}
		m.state = format.MemberActive
		return nil
	})
	if err != nil {
		return err
	}
	// Its superblocks say that it is needed, so now it may hold something. The one that it
	// replaces is closed at the same moment and not before: it may be the only one.
	s.enter()
	s.mu.Lock()
	m.open = true
	if old != nil {
		s.empty(old, old.state)
	}
	t.recount()
	s.usable.Store(s.usableOf(t.size() * int64(t.bytes)))
	s.mu.Unlock()
	s.leave()
	s.cleaner.kick()
	return nil
}

// remainMin is how many segments must remain in use for a drain: enough for the pool to
// work (segmentsMin), and to take in what moves while checkpoints are cut in between.
const remainMin = 2 * segmentsMin

// fitsWithout refuses when what the pool holds does not fit on the devices in use
// without m, with more segments besides. The caller holds Store.mu.
func (s *Store) fitsWithout(m *member, more int64) error {
	left := s.segs.size() + more
	if m.open {
		left -= int64(m.count)
	}
	if left < remainMin {
		return fmt.Errorf("%w: without device %s the pool has %d segments, it needs at least %d: add a device first", ErrNoSpace, m.Path(), left, remainMin)
	}
	if usable := s.usableOf(left * int64(s.segs.bytes)); usable < s.charged()+s.waiting.Load() {
		return fmt.Errorf("%w: the pool holds %d bytes, without device %s it has room for %d: add a device or delete data first", ErrNoSpace, s.charged(), m.Path(), usable)
	}
	return nil
}

// empty closes a device for new segments. The caller holds the role and Store.mu.
func (s *Store) empty(m *member, state format.MemberState) {
	m.state, m.open, m.stuck = state, false, ""
	m.begun = s.standsOn(m)
}

// standsOn is how many bytes stand on a device, under Store.mu.
func (s *Store) standsOn(m *member) (n int64) {
	for i := m.first; i < m.first+m.count; i++ {
		n += int64(s.segs.all[i].live) + int64(s.segs.all[i].pages)
	}
	return n
}

// DrainDevice begins to move away what stands on a device, in the background;
// Devices shows how far it is. With remove the device is removed when it is empty.
// It is refused (ErrNoSpace) when the rest of the pool has no room for it. That it
// has begun is durable on return, and a start goes on with it.
func (s *Store) DrainDevice(ctx context.Context, id DeviceID, remove bool) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	err := s.rearrange(func() error {
		m, err := s.findDevice(id)
		switch {
		case err != nil:
			return err
		case m.lost():
			return fmt.Errorf("%w %s was given up", ErrDevice, m.id)
		case m.state == format.MemberDrained && !remove:
			return nil
		case m.state != format.MemberDrained && !leaves(m.state):
			if err := s.fitsWithout(m, 0); err != nil {
				return err
			}
		}
		if remove {
			s.empty(m, format.MemberLeaving)
		} else {
			s.empty(m, format.MemberDraining)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("drain device: %w", err)
	}
	s.cleaner.kick()
	return nil
}

// KeepDevice ends a drain, or puts a drained device to use again. It is durable on return.
func (s *Store) KeepDevice(ctx context.Context, id DeviceID) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	err := s.rearrange(func() error {
		m, err := s.findDevice(id)
		switch {
		case err != nil:
			return err
		case m.state == format.MemberActive || m.lost():
			return fmt.Errorf("%w %s is not being drained", ErrDevice, m.Path())
		}
		// What its superblocks say until the checkpoint, that it may hold something, is
		// true of draining; a drained one is opened when they say so.
		m.open = leaves(m.state)
		m.state, m.begun, m.stuck = format.MemberActive, 0, ""
		return nil
	})
	if err == nil {
		err = s.rearrange(func() error {
			m, err := s.findDevice(id)
			if err == nil {
				m.open = true
			}
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("keep device: %w", err)
	}
	return nil
}

// RemoveDevice takes a drained device out of the pool and empties it, so that it can be
// used elsewhere. It is durable on return.
func (s *Store) RemoveDevice(ctx context.Context, id DeviceID) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	m, err := s.findDevice(id)
	if err == nil {
		s.mu.RLock()
		if m.state != format.MemberDrained {
			err = fmt.Errorf("%w %s is %s: drain it first", ErrDevice, m.Path(), deviceStates[m.state])
		}
		s.mu.RUnlock()
	}
	if err == nil {
		err = s.expel(m)
	}
	if err != nil {
		return fmt.Errorf("remove device: %w", err)
	}
	return nil
}

// expel takes a device that holds nothing out of the list.
func (s *Store) expel(m *member) error {
	err := s.rearrange(func() error {
		if m.state != format.MemberJoining && m.state != format.MemberDrained {
			return fmt.Errorf("%w %s is %s: drain it first", ErrDevice, m.Path(), deviceStates[m.state])
		}
		s.segs.part(m)
		s.generation++
		return nil
	})
	if err != nil {
		return err
	}
	s.farewell(m)
	return nil
}

// farewell ends a device that the durable list does not name any more.
func (s *Store) farewell(m *member) {
	s.mu.RLock()
	generation := s.generation
	s.mu.RUnlock()
	if err := s.cfg.Persist(generation, s.Devices()); err != nil {
		// The superblocks are what counts: the next start tells it again.
		s.logger.Warn("the list of devices could not be recorded", "err", err)
	}
	if m.lost() {
		s.logger.Info("device given up, and all that stood there repaired", "id", m.id.String())
		s.cfg.Event(Event{Code: "device-repaired", Text: fmt.Sprintf("nothing that stood on device %s, which was given up, is missing any more", m.id)})
		return
	}
	// If it cannot be wiped it says that it was a member once, and is refused as such.
	if err := wipeSuperblocks(m); err != nil {
		s.logger.Warn("removed device could not be wiped", "device", m.Path(), "err", err)
	}
	if err := m.Close(); err != nil {
		s.logger.Warn("close device", "device", m.Path(), "err", err)
	}
	s.logger.Info("device removed", "device", m.Path(), "id", m.id.String())
	s.cfg.Event(Event{Code: "device-removed", Text: fmt.Sprintf("device %s (%s) has left the pool", m.Path(), m.id)})
}
