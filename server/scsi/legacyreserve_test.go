package scsi_test

import (
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

var (
	reserve6  = command{cdb: []byte{cdb.Reserve6, 0, 0, 0, 0, 0}}
	release6  = command{cdb: []byte{cdb.Release6, 0, 0, 0, 0, 0}}
	reserve10 = command{cdb: []byte{cdb.Reserve10, 0, 0, 0, 0, 0, 0, 0, 0, 0}}
	release10 = command{cdb: []byte{cdb.Release10, 0, 0, 0, 0, 0, 0, 0, 0, 0}}
)

func TestReserveUnit(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	for _, k := range []struct{ reserve, release command }{{reserve6, release10}, {reserve10, release6}} {
		a.good(a.run(k.reserve))
		a.good(a.run(k.reserve))
		for _, q := range []command{unitReadyCmd, readBlock0Cmd, writeBlock0, k.reserve, prIn(0, 255), prOut(register, 0, 0, 1, 0),
			{cdb: modeSense6(8, 8, 0), read: true, expected: 255}, {cdb: readCapacity16(32), read: true, expected: 32}, {cdb: []byte{0xff}}} {
			b.conflicts(q)
		}
		for _, q := range []command{{cdb: inq(0, 0, 255), read: true, expected: 255}, reportLUNsCmd, requestSenseIn, k.release} {
			b.good(b.run(q))
		}
		b.conflicts(writeBlock0) // its RELEASE did nothing
		a.good(a.run(writeBlock0))
		a.good(a.run(k.release))
		a.good(a.run(k.release))
		b.good(b.run(writeBlock0))
	}
	for _, k := range [][]byte{{cdb.Reserve6, 1, 0, 0, 0, 0}, {cdb.Reserve6, 0x10, 0, 0, 0, 0}, {cdb.Reserve10, 2, 0, 0, 0, 0, 0, 0, 0, 0}} {
		a.refused(a.run(command{cdb: k}), badField)
	}
	// With registrations RESERVE and RELEASE have no effect, or conflict.
	a.pr(register, 0, 0, 1)
	for _, q := range []command{reserve6, release6} {
		a.conflicts(q)
		b.conflicts(q)
	}
	a.pr(reserve, 5, 1, 0)
	a.good(a.run(reserve10))
	a.good(a.run(release10))
	b.conflicts(reserve10)
	b.good(b.run(unitReadyCmd))
}

// waitFree runs TEST UNIT READY until it no longer conflicts: what holds the
// unit is dropped by the sequencer.
func (p port) waitFree() {
	p.t.Helper()
	for {
		if res := p.run(unitReadyCmd); res.status != cdb.ReservationConflict {
			return
		}
	}
}

// RESERVE goes with a reset, with its nexus, and with its node.
func TestReserveUnitIsVolatile(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	b.good(b.run(reserve6))
	a.conflicts(writeBlock0)
	c.a.manage(a.nexus, scsi.LogicalUnitReset, 0, nil)
	a.expect(uaReset)
	a.good(a.run(writeBlock0))
	b.expect(uaReset)

	// The nexus is lost, and comes back.
	b.good(b.run(reserve6))
	c.b.s.Detach(b.nexus, true)
	a.waitFree()
	b = c.b.host("iqn.b", 2)
	b.good(b.run(reserve6))
	a.conflicts(writeBlock0)
	b.good(b.run(release6))

	// The drop fails: the next command in whose way it stands repeats it.
	b.good(b.run(reserve6))
	c.lu.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpState {
			return scsi.ErrBusy
		}
		return nil
	})
	c.b.s.Detach(b.nexus, true)
	a.conflicts(writeBlock0)
	c.lu.SetFail(nil)
	far := c.b.host("iqn.w", 5)
	far.waitFree()

	// The holder does not see the unit any more.
	far.good(far.run(reserve6))
	c.b.s.SetAccess(0, scsi.Visibility{Initiators: []string{"iqn.x"}})
	c.b.host("iqn.x", 6).waitFree()
	a.waitFree()
	c.b.s.SetAccess(0, scsi.Visibility{Any: true})
	far.run(reportLUNsCmd)
	far.attentions()

	// Its node starts again.
	far.good(far.run(reserve6))
	second := scsi.New(scsi.Config{Backend: c.path, NodePort: 128, PortGroup: 2, TargetName: target})
	defer second.Close()
	if err := second.SetLU(unitConfig(0, c.lu.Path())); err != nil {
		t.Fatal(err)
	}
	a.waitFree()

	// The holder's node dies: the owner's node drops it, the other does not.
	far.good(far.run(reserve6))
	a.conflicts(writeBlock0)
	c.setGroups(scsi.PortGroup{ID: 1, Ports: []uint16{1}, State: scsi.ActiveOptimized}, scsi.PortGroup{ID: 2, Ports: []uint16{128}, State: scsi.Unavailable})
	a.run(requestSenseIn)
	a.waitFree()
	a.run(requestSenseIn)
	a.good(a.run(writeBlock0))
}
