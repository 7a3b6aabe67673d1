package lsfs

import (
	"errors"
	"fmt"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// A device that failed for good can be given up (Config.Forget). The pool then opens
// without it, if no metadata and nothing of the log stood there: so it is with a
// capacity device, which holds cold blocks alone. A block that stood there is found
// damaged when it is read, and is repaired from another replica as any damaged one
// is (Volume.Repair). So only what the device held moves. When nothing is missing any
// more, the device leaves the list.

// ErrLost is what reads of a device that was given up answer.
var ErrLost = errors.New("the device was given up")

// lostDevice stands for a device that was given up.
type lostDevice struct{ id DeviceID }

func (d lostDevice) fail(op string, off, n int64) error {
	return &device.Error{Op: op, Path: d.Path(), Off: off, Len: n, Err: ErrLost}
}

func (d lostDevice) ReadAt(p []byte, off int64) error  { return d.fail("read", off, int64(len(p))) }
func (d lostDevice) WriteAt(p []byte, off int64) error { return d.fail("write", off, int64(len(p))) }
func (d lostDevice) Flush() error                      { return d.fail("flush", 0, 0) }
func (d lostDevice) Discard(int64, int64) error        { return nil }
func (d lostDevice) Size() int64                       { return 0 }
func (d lostDevice) Path() string                      { return "lost:" + d.id.String() }
func (d lostDevice) Direct() bool                      { return true }
func (d lostDevice) Close() error                      { return nil }

// lost says whether a device of the pool was given up.
func (m *member) lost() bool { return m.state == format.MemberLost }

// giveUp says whether a member that is missing was given up, now or before.
func (c *Config) giveUp(m *format.Member) bool {
	if m.State == format.MemberLost {
		return true
	}
	for _, id := range c.Forget {
		if id == m.Device {
			return true
		}
	}
	return false
}

// explainLost adds to an error of a start what is behind it when a device was given up.
func (s *Store) explainLost(err error) error {
	if errors.Is(err, ErrLost) {
		return fmt.Errorf("%w\n  metadata or the log stood on the device that was given up, so this pool cannot do without it: begin the node's pool anew, and the other node fills it.\n  twinsan store salvage keeps what the other devices hold, so that only the rest moves; twinsan store rebuild keeps nothing", err)
	}
	return err
}

// markLost has the cleaner leave alone what cannot be read. The store is opening.
func (s *Store) markLost() error {
	for _, m := range s.segs.layout.Load().members {
		if !m.lost() {
			continue
		}
		for n := m.first; n < m.first+m.count; n++ {
			seg := &s.segs.all[n]
			if seg.pages > 0 || seg.state == segmentNext {
				return fmt.Errorf("segment %d of device %s holds metadata: %w", n, m.id, ErrLost)
			}
			seg.bad = true
		}
		m.begun = s.standsOn(m)
		s.logger.Error("a device was given up", "device", m.id.String(), "bytes", m.begun)
		s.cfg.Event(Event{Code: "device-lost", Text: fmt.Sprintf("device %s was given up: %d bytes of blocks that stood there are repaired from the other node as they are read or scrubbed", m.id, m.begun)})
	}
	return nil
}
