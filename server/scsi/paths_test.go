package scsi_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

var errSurprise = errors.New("surprise")

func setGroups(n int) []byte {
	return []byte{cdb.MaintenanceOut, cdb.ActionSetTargetPorts, 0, 0, 0, 0, 0, 0, byte(n >> 8), byte(n), 0, 0}
}

// groupList is a parameter list of pairs: state, group.
func groupList(pairs ...byte) []byte {
	b := make([]byte, 4)
	for ; len(pairs) > 0; pairs = pairs[2:] {
		b = append(b, pairs[0], 0, 0, pairs[1])
	}
	return b
}

// mover plays the node: it moves a unit between two nodes on demand.
type mover struct {
	mu    sync.Mutex
	owner int
	asked []uint16
	done  []func(error)
}

func (m *mover) config(c *scsi.LUConfig) {
	c.Paths = func() []scsi.PortGroup {
		m.mu.Lock()
		defer m.mu.Unlock()
		groups := twoNodes()
		groups[0].State, groups[1].State = scsi.ActiveNonOptimized, scsi.ActiveNonOptimized
		groups[2-m.owner].State = scsi.ActiveOptimized
		return groups
	}
	c.Optimize = func(group uint16, done func(error)) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.asked = append(m.asked, group)
		m.done = append(m.done, done)
	}
}

func (m *mover) move(to int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.owner = to
}

// end answers the oldest demand.
func (m *mover) end(err error) {
	m.mu.Lock()
	done := m.done[0]
	m.done = m.done[1:]
	m.mu.Unlock()
	done(err)
}

func (r *rig) statusCode() byte {
	r.t.Helper()
	return r.good(r.read(maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), 255)).in[9]
}

func TestSetTargetPortGroups(t *testing.T) {
	m := &mover{owner: 1}
	r := newRig(t, mib, m.config)
	own, other := r.on(r.n, 0), r.on(r.attach("iqn.2026-11.test:other", 2), 0)
	set := func(list []byte) *waiter {
		return own.start(command{cdb: setGroups(len(list)), write: true, expected: uint32(len(list)), out: list})
	}

	// What changes nothing is answered at once.
	r.good(r.none(setGroups(0)...))
	r.good(r.write(setGroups(4), groupList()))
	r.good(r.write(setGroups(8), groupList(0, 1)))
	for n, list := range map[int][]byte{3: groupList(), 6: make([]byte, 8), 8: groupList()} {
		r.refused(r.write(setGroups(n), list), badListLen)
	}
	r.refused(r.do(command{cdb: []byte{cdb.MaintenanceOut, cdb.ActionSetTargetPorts, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xfc, 0, 0}, write: true, expected: 8, out: groupList(0, 1)}), badListLen)
	for _, c := range []struct {
		list  []byte
		field uint16
	}{
		{groupList(1, 2), 4}, {groupList(2, 1), 4}, {groupList(3, 1), 4}, {groupList(0xf, 1), 4},
		{groupList(0, 9), 6}, {groupList(0, 1, 0, 1), 8}, {groupList(0, 1, 0, 2), 8}, {groupList(0, 2, 1, 1), 8},
	} {
		if res := r.refused(r.write(setGroups(len(c.list)), c.list), badParam); res.sense.Field != c.field {
			t.Errorf("list %x: field %d, want %d", c.list, res.sense.Field, c.field)
		}
	}
	if len(m.asked) != 0 {
		t.Fatalf("the node was asked for %v", m.asked)
	}

	// A move that works; the node tells of the paths before it is done.
	w := set(groupList(0, 2))
	if w.completed() || len(m.asked) != 1 || m.asked[0] != 2 {
		t.Fatalf("asked for %v", m.asked)
	}
	r.refused(other.run(command{cdb: setGroups(8), write: true, expected: 8, out: groupList(0, 2)}), code{2, 4, 0x0a})
	m.move(2)
	r.s.PathsChanged(0)
	m.end(nil)
	if !w.completed() || w.task.Status != cdb.Good {
		t.Fatalf("status %02x", w.task.Status)
	}
	r.s.PathsChanged(0) // late, and no news
	own.expect()
	other.expect(uaPaths)
	if c := r.statusCode(); c != 1 {
		t.Errorf("STATUS CODE %d", c)
	}

	// The node tells only by done.
	w = set(groupList(0, 1))
	m.move(1)
	m.end(nil)
	if !w.completed() || w.task.Status != cdb.Good {
		t.Fatalf("status %02x", w.task.Status)
	}
	own.expect()
	other.expect(uaPaths)
	// An implicit move is told to all.
	m.move(2)
	r.s.PathsChanged(0)
	own.expect(uaPaths)
	other.expect(uaPaths)
	if c := r.statusCode(); c != 2 {
		t.Errorf("STATUS CODE %d", c)
	}

	// A move that fails, and one whose command is aborted.
	w = set(groupList(0, 1))
	m.end(errors.New("not in sync"))
	sense, _, _ := cdb.ParseSense(w.task.Sense[:w.task.SenseLen])
	if !w.completed() || (code{sense.Key, sense.ASC, sense.ASCQ}) != (code{4, 0x67, 0x0a}) {
		t.Errorf("status %02x, %+v", w.task.Status, sense)
	}
	w = set(groupList(0, 1))
	if a := r.manage(r.n, scsi.AbortTaskSet, 0, nil); a != scsi.FunctionComplete || !w.completed() || !w.task.Aborted.Load() {
		t.Errorf("ABORT TASK SET: %d", a)
	}
	m.move(1)
	m.end(nil)
	own.expect()
	other.expect(uaPaths)
}

// It works where the unit is not active, and is not there without Optimize.
func TestSetTargetPortGroupsOffered(t *testing.T) {
	state := scsi.Unavailable
	asked := false
	r := newRig(t, mib, func(c *scsi.LUConfig) {
		c.Paths = func() []scsi.PortGroup { return []scsi.PortGroup{{ID: 1, Ports: []uint16{2}, State: state}} }
		c.Optimize = func(_ uint16, done func(error)) {
			asked = true
			state = scsi.ActiveOptimized
			done(nil)
		}
	})
	r.refused(r.none(testUnitReady...), code{2, 4, 0x0c})
	r.good(r.write(setGroups(8), groupList(0, 1)))
	r.good(r.none(testUnitReady...))
	if !asked {
		t.Error("not asked")
	}
	plain := newRig(t, mib, nil)
	plain.refused(plain.write(setGroups(8), groupList(0, 1)), badField)
	one := plain.good(plain.read(maintenanceIn(cdb.ActionReportOpcodes, 3, cdb.MaintenanceOut, cdb.ActionSetTargetPorts, 255), 255)).in
	if one[1]&7 != 1 {
		t.Errorf("REPORT SUPPORTED OPERATION CODES %x", one)
	}
}
