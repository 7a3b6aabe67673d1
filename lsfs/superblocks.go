package lsfs

import (
	"fmt"
	"sync"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// deviceList is the list of devices as of the cut of a checkpoint, which is what its
// superblocks say.
type deviceList struct {
	generation uint64
	segments   uint32
	members    []*member
	records    []format.Member
}

// deviceList copies the list. The caller holds Store.mu.
func (s *Store) deviceList() deviceList {
	members := s.segs.layout.Load().members
	return deviceList{s.generation, s.segs.count(), members, membersOf(members)}
}

func membersOf(members []*member) []format.Member {
	list := make([]format.Member, len(members))
	for i, m := range members {
		list[i] = format.Member{Device: m.id, First: m.first, Segments: m.count, Class: format.MemberClass(m.class), State: m.state}
	}
	return list
}

// writeDevices writes the superblocks of a checkpoint. A device that holds nothing
// may fail: the pool goes on without it.
func (s *Store) writeDevices(sb *format.Superblock) error {
	l := &s.ckpt.devices
	sb.Generation, sb.Segments, sb.Members = l.generation, l.segments, l.records
	for i, err := range writeSuperblocks(l.members, *sb) {
		switch {
		case err == nil:
		case holdsNothing(l.records[i].State):
			s.mu.Lock()
			l.members[i].failed = err
			s.mu.Unlock()
			s.logger.Warn("device that holds nothing failed", "device", l.members[i].Path(), "err", err)
		default:
			s.deviceFailed(l.members[i], err)
			return err
		}
	}
	return nil
}

// deviceFailed tells which device it was that stops the store.
func (s *Store) deviceFailed(m *member, err error) {
	s.cfg.Event(Event{Code: "device-failed", Text: fmt.Sprintf("device %s (%s) failed: %v", m.Path(), m.id, err)})
}

// writeSuperblocks writes the superblock of each device, all at the same time, and
// returns the errors in the order of the devices.
func writeSuperblocks(members []*member, sb format.Superblock) []error {
	errs := make([]error, len(members))
	if len(members) == 1 {
		errs[0] = writeSuperblock(members[0], 0, sb)
		return errs
	}
	var group sync.WaitGroup
	for i, m := range members {
		if sb.Members[i].State == format.MemberLost {
			continue
		}
		group.Go(func() { errs[i] = writeSuperblock(m, i, sb) })
	}
	group.Wait()
	return errs
}

// writeSuperblock writes the four copies of a device in two pairs, so that a crash
// leaves one pair whole.
func writeSuperblock(d device.Device, index int, sb format.Superblock) error {
	page := device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(page)
	sb.Index, sb.Device = index, sb.Members[index].Device
	sb.Put(page)
	return writeCopies(d, page)
}

func writeCopies(d device.Device, page []byte) error {
	for n, off := range format.SuperblockOffsets {
		if err := d.WriteAt(page, off); err != nil {
			return fmt.Errorf("write superblock: %w", err)
		}
		if n%2 == 1 {
			if err := d.Flush(); err != nil {
				return fmt.Errorf("flush superblock: %w", err)
			}
		}
	}
	return nil
}

// wipeSuperblocks makes a device empty, as far as Format and AddDevice look.
func wipeSuperblocks(d device.Device) error {
	page := device.AlignedBuffer(format.PageSize)
	defer device.FreeAligned(page)
	return writeCopies(d, page)
}
