package scsi_test

import (
	"slices"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

var (
	uaPowerOn  = code{6, 0x29, 0}
	uaReset    = code{6, 0x29, 3}
	uaLoss     = code{6, 0x29, 7}
	uaMode     = code{6, 0x2a, 1}
	uaPaths    = code{6, 0x2a, 6}
	uaCapacity = code{6, 0x2a, 9}
	uaInquiry  = code{6, 0x3f, 3}
	uaLUNs     = code{6, 0x3f, 0x0e}
)

var (
	testUnitReady  = []byte{cdb.TestUnitReady, 0, 0, 0, 0, 0}
	requestSense   = []byte{cdb.RequestSense, 0, 0, 0, 255, 0}
	reportLUNsCDB  = []byte{cdb.ReportLUNs, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0}
	readBlock0     = rw10(cdb.Read10, 0, 0, 1)
	readBlock0Cmd  = command{cdb: readBlock0, read: true, expected: 512}
	unitReadyCmd   = command{cdb: testUnitReady}
	reportLUNsCmd  = command{cdb: reportLUNsCDB, read: true, expected: 255}
	requestSenseIn = command{cdb: requestSense, read: true, expected: 255}
)

// attentions reads all conditions that wait, by TEST UNIT READY.
func (p port) attentions() []code {
	p.t.Helper()
	var all []code
	for range 100 {
		res := p.run(unitReadyCmd)
		if res.status == cdb.Good {
			return all
		}
		if res.sense.Key != cdb.UnitAttention {
			p.t.Fatalf("sense %x", res.code())
		}
		all = append(all, res.code())
	}
	p.t.Fatal("unit attentions never end")
	return nil
}

func (p port) expect(want ...code) {
	p.t.Helper()
	if got := p.attentions(); !slices.Equal(got, want) {
		p.t.Fatalf("unit attentions %x, want %x", got, want)
	}
}

func TestNewNexus(t *testing.T) {
	r := newRig(t, mib, nil)
	if err := r.s.SetLU(unitConfig(5, memlu.New(mib))); err != nil {
		t.Fatal(err)
	}
	r.s.SetAccess(5, scsi.Visibility{Any: true})
	n, err := r.s.Attach(initiator, [6]byte{9})
	if err != nil {
		t.Fatal(err)
	}
	p, q := r.on(n, 0), r.on(n, 5<<48)
	// Exempt commands neither report nor clear it.
	r.good(p.run(command{cdb: inq(0, 0, 255), read: true, expected: 255}))
	r.good(p.run(reportLUNsCmd))
	// It is reported once, by a command that is not executed, on each unit.
	r.refused(p.run(command{cdb: rw10(cdb.Write10, 0, 0, 1), write: true, expected: 512, out: pattern(512, 1)}), uaPowerOn)
	if r.lu.Count(scsi.OpWrite) != 0 {
		t.Error("the command was executed")
	}
	p.expect()
	// Unknown operation codes come after unit attentions.
	r.refused(q.run(command{cdb: []byte{0xff}}), uaPowerOn)
	r.refused(q.run(command{cdb: []byte{0xff}}), badOpcode)

	// A nexus that was lost is told so, one that logged out is new.
	r.s.Detach(n, true)
	if n, err = r.s.Attach(initiator, [6]byte{9}); err != nil {
		t.Fatal(err)
	}
	r.on(n, 0).expect(uaLoss)
	sense, _, _ := cdb.ParseSense(r.good(r.on(n, 5<<48).run(requestSenseIn)).in)
	if (code{sense.Key, sense.ASC, sense.ASCQ}) != uaLoss {
		t.Errorf("REQUEST SENSE %+v", sense)
	}
	r.on(n, 5<<48).expect() // REQUEST SENSE cleared it
	r.s.Detach(n, false)
	if n, err = r.s.Attach(initiator, [6]byte{9}); err != nil {
		t.Fatal(err)
	}
	r.on(n, 0).expect(uaPowerOn)
	r.s.Detach(n, false)
	r.s.Detach(n, true) // twice is harmless
	r.refused(r.on(n, 0).run(unitReadyCmd), badLUN)
}

func TestNexusesAreBounded(t *testing.T) {
	r := newRig(t, mib, nil)
	var last *scsi.Nexus
	for i := 1; i < scsi.MaxNexuses; i++ {
		n, err := r.s.Attach(initiator, [6]byte{2, byte(i >> 8), byte(i)})
		if err != nil {
			t.Fatal(err)
		}
		last = n
	}
	if _, err := r.s.Attach(initiator, [6]byte{3}); err != scsi.ErrTooManyNexuses {
		t.Fatalf("error %v", err)
	}
	r.s.Detach(last, false)
	if _, err := r.s.Attach(initiator, [6]byte{3}); err != nil {
		t.Fatal(err)
	}
}

func TestChangesRaiseAttentions(t *testing.T) {
	r := newRig(t, mib, func(c *scsi.LUConfig) { c.Paths = twoNodes })
	other := r.on(r.attach("iqn.2026-11.test:other", 2), 0)
	own := r.on(r.n, 0)
	base := unitConfig(0, r.lu)
	base.Paths = twoNodes
	both := func(want ...code) {
		t.Helper()
		own.expect(want...)
		other.expect(want...)
	}
	set := func(change func(*scsi.LUConfig)) {
		t.Helper()
		change(&base)
		if err := r.s.SetLU(base); err != nil {
			t.Fatal(err)
		}
	}
	set(func(*scsi.LUConfig) {})
	both()
	set(func(c *scsi.LUConfig) { c.ReadOnly = true })
	both(uaMode)
	set(func(c *scsi.LUConfig) { c.VolatileCache = true })
	both(uaMode)
	set(func(c *scsi.LUConfig) { c.Serial = "ANOTHER" })
	both(uaInquiry)
	r.lu.Resize(2 * mib)
	r.s.CapacityChanged(0)
	both(uaCapacity)
	r.s.CapacityChanged(0) // the same size again is no news
	both()
	r.lu.Resize(3 * mib)
	set(func(c *scsi.LUConfig) { c.Name = "renamed" })
	both(uaCapacity)
	r.s.PathsChanged(0)
	both(uaPaths)
	r.s.PathsChanged(0)
	r.s.PathsChanged(0) // no duplicates
	r.lu.Resize(4 * mib)
	r.s.CapacityChanged(0)
	r.s.PathsChanged(0)
	both(uaPaths, uaCapacity) // in order of arrival
	r.s.CapacityChanged(99)
	r.s.PathsChanged(99)

	// After a change of paths the status code says implicit transition.
	rtpg := r.good(r.read(maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), 255)).in
	if rtpg[4+5] != 2 {
		t.Errorf("RTPG %x", rtpg)
	}
	bad := base
	bad.LogicalBlock = 4096
	if err := r.s.SetLU(bad); err == nil {
		t.Error("the logical block size changed")
	}
	// Another volume at the LUN is another unit.
	set(func(c *scsi.LUConfig) { c.VolumeUUID[0] = 99 })
	both(uaPowerOn, uaLUNs)
}

func TestReportedLUNsDataHasChanged(t *testing.T) {
	r := newRig(t, mib, nil)
	own := r.on(r.n, 0)
	other := r.on(r.attach("iqn.2026-11.test:other", 2), 0)
	if err := r.s.SetLU(unitConfig(300, memlu.New(mib))); err != nil {
		t.Fatal(err)
	}
	own.expect() // not visible yet
	r.s.SetAccess(300, scsi.Visibility{Initiators: []string{initiator}})
	if got := r.luns(other.nexus); !slices.Equal(got, []uint64{0}) {
		t.Errorf("other sees %x", got)
	}
	other.expect()
	own.expect(uaLUNs) // once per target
	far := r.on(r.n, 0x412c<<48)
	far.expect(uaPowerOn)
	if got := r.luns(r.n); !slices.Equal(got, []uint64{0, 0x412c << 48}) {
		t.Errorf("own sees %x", got)
	}
	r.refused(r.on(other.nexus, 0x412c<<48).run(unitReadyCmd), badLUN)

	// REPORT LUNS clears it.
	r.s.SetAccess(300, scsi.Visibility{Any: true})
	r.luns(other.nexus)
	other.expect()
	own.expect() // nothing changed for it
	r.s.SetAccess(300, scsi.Visibility{})
	own.expect(uaLUNs)
	r.refused(far.run(unitReadyCmd), badLUN)
	r.s.SetAccess(300, scsi.Visibility{Any: true})
	r.s.RemoveLU(300)
	r.s.RemoveLU(300)
	other.expect(uaLUNs)
	if got := r.luns(other.nexus); !slices.Equal(got, []uint64{0}) {
		t.Errorf("other sees %x", got)
	}
	// A reset keeps it.
	r.luns(r.n)
	r.s.SetAccess(7, scsi.Visibility{Any: true}) // before SetLU
	if err := r.s.SetLU(unitConfig(7, memlu.New(mib))); err != nil {
		t.Fatal(err)
	}
	r.manage(r.n, scsi.LogicalUnitReset, 0, nil)
	own.expect(uaReset, uaLUNs)
}

func TestResetSupersedesAttentions(t *testing.T) {
	r := newRig(t, mib, nil)
	own := r.on(r.n, 0)
	// A reset clears what is older.
	r.s.PathsChanged(0)
	r.manage(r.n, scsi.LogicalUnitReset, 0, nil)
	r.lu.Resize(2 * mib)
	r.s.CapacityChanged(0)
	own.expect(uaReset, uaCapacity)
}

func TestInvalidUnits(t *testing.T) {
	s := scsi.New(scsi.Config{Backend: memlu.New(0)})
	defer s.Close()
	for name, change := range map[string]func(*scsi.LUConfig){
		"LUN":            func(c *scsi.LUConfig) { c.LUN = cdb.MaxLUN + 1 },
		"logical block":  func(c *scsi.LUConfig) { c.LogicalBlock = 1024 },
		"physical block": func(c *scsi.LUConfig) { c.PhysicalBlock = 3000 },
		"blocks":         func(c *scsi.LUConfig) { c.LogicalBlock, c.PhysicalBlock = 4096, 512 },
		"volume":         func(c *scsi.LUConfig) { c.Volume = nil },
		"no serial":      func(c *scsi.LUConfig) { c.Serial = "" },
		"serial":         func(c *scsi.LUConfig) { c.Serial = "a b" },
		"NAA":            func(c *scsi.LUConfig) { c.NAA = c.NAA[:7] },
		"NAA type":       func(c *scsi.LUConfig) { c.NAA[0] = 0x50 },
	} {
		c := unitConfig(0, memlu.New(mib))
		change(&c)
		if err := s.SetLU(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for lun := range uint16(scsi.MaxLUs) {
		if err := s.SetLU(unitConfig(lun, memlu.New(4096))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SetLU(unitConfig(scsi.MaxLUs, memlu.New(4096))); err == nil {
		t.Error("more than MaxLUs")
	}
}

// Each command is made to fail every check from some step on; the first of the
// standard's order must be the one that is reported.
func TestOrderOfChecks(t *testing.T) {
	state := scsi.ActiveOptimized
	r := newRig(t, mib, func(c *scsi.LUConfig) {
		c.ReadOnly = true
		c.Paths = func() []scsi.PortGroup { return []scsi.PortGroup{{ID: 1, Ports: []uint16{2}, State: state}} }
	})
	n, err := r.s.Attach("iqn.2026-11.test:other", [6]byte{7})
	if err != nil {
		t.Fatal(err)
	}
	// WRITE(16) with WRPROTECT, beyond the end, too long, on a read-only unit,
	// with data that do not fit.
	bad := command{cdb: rw16(cdb.Write16, 0x20, 1<<40, 1<<20), write: true, expected: 100, out: make([]byte, 100)}
	state = scsi.Standby
	r.refused(r.on(n, 1<<48).run(bad), badLUN)
	r.s.PathsChanged(0)
	p := r.on(n, 0)
	r.refused(p.run(bad), uaPowerOn)
	r.refused(p.run(bad), uaPaths)
	r.refused(p.run(bad), code{2, 4, 0x0b})
	state = scsi.ActiveNonOptimized
	r.s.PathsChanged(0)
	r.refused(p.run(bad), uaPaths)
	r.do(requestSenseIn)
	r.good(r.do(prOut(register, 0, 0, 1, 0)))
	r.good(r.do(prOut(reserve, 1, 1, 0, 0)))
	p.conflicts(bad)
	p.conflicts(command{cdb: []byte{0xff}})
	r.good(r.do(prOut(release, 1, 1, 0, 0)))
	r.refused(p.run(bad), badField)
	bad.cdb[1] = 0
	r.refused(p.run(bad), badLBA)
	bad.cdb = rw16(cdb.Write16, 0, 0, 1<<20)
	r.lu.Resize(1 << 40)
	r.s.CapacityChanged(0)
	r.refused(p.run(bad), uaCapacity)
	r.refused(p.run(bad), badField)
	bad.cdb = rw16(cdb.Write16, 0, 0, 1)
	r.refused(p.run(bad), readOnly)
	for _, c := range [][]byte{rw10(cdb.WriteSame10, 0, 0, 1), caw(0, 0, 1), unmapCDB(3), rw10(cdb.WriteAndVerify10, 0, 0, 1)} {
		r.refused(p.run(command{cdb: c, write: true, expected: 100, out: make([]byte, 100)}), readOnly)
	}
	r.good(p.run(command{cdb: rw10(cdb.SynchronizeCache10, 0, 0, 0)}))
	r.good(p.run(readBlock0Cmd))
	// AHS longer than 16 bytes.
	r.refused(p.run(command{cdb: readBlock0, read: true, expected: 512, extended: true}), badOpcode)
}

func TestPathStates(t *testing.T) {
	state := scsi.ActiveOptimized
	r := newRig(t, mib, func(c *scsi.LUConfig) {
		c.Paths = func() []scsi.PortGroup {
			return []scsi.PortGroup{{ID: 1, Ports: []uint16{2}, State: state}, {ID: 2, Ports: []uint16{0x80}}}
		}
	})
	always := [][]byte{inq(0, 0, 255), inq(1, 0x83, 255), reportLUNsCDB, requestSense, maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255)}
	standby := [][]byte{modeSense6(0, 8, 0), modeSense10(0, 8, 0), readCapacity16(32), {cdb.ReadCapacity10, 9: 0},
		{cdb.ReceiveDiagnosticResults, 0, 0, 0, 255, 0}, {cdb.SendDiagnostic, 4, 0, 0, 0, 0},
		prIn(0, 255).cdb, {cdb.ModeSelect6, 0x10, 0, 0, 0, 0}, logSense(0, 0, 255), {cdb.LogSelect, 9: 0}}
	buffers := [][]byte{{cdb.ReadBuffer, 3, 8: 4, 9: 0}, {cdb.WriteBuffer, 0x0a, 9: 0}}
	active := [][]byte{testUnitReady, readBlock0, rw10(cdb.SynchronizeCache10, 0, 0, 0), rw10(cdb.Verify10, 0, 0, 1), unmapCDB(0),
		maintenanceIn(cdb.ActionReportOpcodes, 0, 0, 0, 255), maintenanceIn(cdb.ActionIdentifying, 0, 0, 0, 255), reserve6.cdb,
		lbaStatus(0, 24), rw16(cdb.OrWrite16, 0, 0, 0), atomicCDB(0, 0, 0, 0), sanitizeCDB(cdb.ActionSanitizeExit, 0, 0), rw10(cdb.PreFetch10, 0, 0, 1)}
	for _, c := range []struct {
		state scsi.PathState
		sense code
		works [][][]byte
		fails [][][]byte
	}{
		{scsi.ActiveOptimized, code{}, [][][]byte{always, standby, buffers, active}, nil},
		{scsi.ActiveNonOptimized, code{}, [][][]byte{always, standby, buffers, active}, nil},
		{scsi.Standby, code{2, 4, 0x0b}, [][][]byte{always, standby, buffers}, [][][]byte{active}},
		{scsi.Unavailable, code{2, 4, 0x0c}, [][][]byte{always, buffers}, [][][]byte{standby, active}},
		{scsi.Transitioning, code{2, 4, 0x0a}, [][][]byte{always}, [][][]byte{standby, buffers, active}},
	} {
		state = c.state
		r.s.PathsChanged(0)
		r.on(r.n, 0).run(requestSenseIn)
		for _, set := range c.works {
			for _, k := range set {
				if res := r.read(k, 512); res.status != cdb.Good {
					t.Errorf("state %x, CDB %x: %02x %x", c.state, k, res.status, res.code())
				}
			}
		}
		for _, set := range c.fails {
			for _, k := range append(set, []byte{0xff}) {
				if res := r.read(k, 512); res.code() != c.sense {
					t.Errorf("state %x, CDB %x: %02x %x", c.state, k, res.status, res.code())
				}
			}
		}
		if rtpg := r.read(maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), 255).in; rtpg[4] != byte(c.state) {
			t.Errorf("RTPG says %x, want %x", rtpg[4], c.state)
		}
	}
	// A node that is in no group is no path.
	r.s.RemoveLU(0)
	c := unitConfig(0, r.lu)
	c.Paths = func() []scsi.PortGroup { return []scsi.PortGroup{{ID: 9}} }
	if err := r.s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	r.s.SetAccess(0, scsi.Visibility{Any: true})
	n := r.attach(initiator, 3)
	r.refused(r.on(n, 0).run(unitReadyCmd), code{2, 4, 0x0c})
}
