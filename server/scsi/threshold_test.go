package scsi_test

import (
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

var (
	uaSpace = code{6, 0x38, 7}
	uaLog   = code{6, 0x2a, 2}
)

// Every nexus is told once of each threshold that is crossed, and again only
// after room has grown by a hundredth above it.
func TestThresholds(t *testing.T) {
	free := uint64(1000 * mib)
	withSpace := func(thresholds []uint8) func(*scsi.LUConfig) {
		return func(c *scsi.LUConfig) {
			c.Thresholds = thresholds
			c.Space = func() scsi.Space { return scsi.Space{Total: 1000 * mib, Free: free} }
		}
	}
	r := newRig(t, mib, withSpace(nil)) // 70, 80, 90
	one, two := r.on(r.n, 0), r.on(r.attach("iqn.2026-11.test:two", 2), 0)
	short := func() bool {
		t.Helper()
		p := r.good(r.read(logSense(0x2f, 0, 255), 255)).in
		return p[8] == 0x38 && p[9] == 7
	}
	for _, step := range []struct {
		free uint64
		told bool
		at   uint64 // byte of the descriptor in the mode page
	}{
		{1000, false, 0}, {301, false, 0}, {300, true, 16}, {299, false, 0}, {250, false, 0},
		{200, true, 24}, {205, false, 0}, {210, false, 0}, {200, false, 0}, // re-armed above 210 only
		{211, false, 0}, {200, true, 24}, {99, true, 32}, {310, false, 0}, {99, true, 32}, {1000, false, 0}, {0, true, 32},
	} {
		free = step.free * mib
		r.s.SpaceChanged(0)
		r.s.SpaceChanged(0)
		for _, p := range []port{one, two} {
			if !step.told {
				p.expect()
				continue
			}
			res := r.refused(p.run(unitReadyCmd), uaSpace)
			if !res.sense.HasInfo || res.sense.Info != step.at {
				t.Errorf("%d MiB free: INFORMATION %+v, want %d", step.free, res.sense, step.at)
			}
			p.expect()
		}
	}
	if !short() {
		t.Error("log page 2F knows of no threshold")
	}
	free = 1000 * mib
	r.s.SpaceChanged(0)
	if short() {
		t.Error("log page 2F stays")
	}
	r.s.SpaceChanged(99) // no such unit

	// Without thresholds nothing is told, but the room is.
	r = newRig(t, mib, withSpace([]uint8{}))
	free = 0
	r.s.SpaceChanged(0)
	r.on(r.n, 0).expect()
	r.good(r.read(logSense(0x0c, 0, 255), 255))
	r.refused(r.read(modeSense6(0, 0x1c, 2), 255), badField)

	// Another configuration is another mode page.
	c := unitConfig(0, r.lu)
	withSpace([]uint8{50})(&c)
	if err := r.s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	r.on(r.n, 0).expect(uaMode)
	for _, bad := range [][]uint8{{0}, {100}, {1, 2, 3, 4, 5, 6, 7, 8, 9}} {
		withSpace(bad)(&c)
		if err := r.s.SetLU(c); err == nil {
			t.Errorf("thresholds %v accepted", bad)
		}
	}
	// All mode pages fit into the reply of the short command.
	withSpace([]uint8{1, 2, 3, 4, 5, 6, 7, 8, 8})(&c)
	if err := r.s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	r.on(r.n, 0).expect(uaMode)
	if b := r.good(r.read(modeSense6(0, 0x3f, 0xff), 255)).in; int(b[0]) != len(b)-1 {
		t.Errorf("MODE DATA LENGTH %d of %d bytes", b[0], len(b))
	}
}

// The statistics count what was read and written, until LOG SELECT.
func TestStatisticsLog(t *testing.T) {
	r := newRig(t, mib, nil)
	other := r.on(r.attach("iqn.2026-11.test:two", 2), 0)
	r.good(r.write(rw10(cdb.Write10, 0, 0, 4), make([]byte, 2048)))
	r.good(r.write(rw16(cdb.OrWrite16, 0, 0, 1), make([]byte, 512)))
	r.good(r.read(rw10(cdb.Read10, 0, 0, 2), 1024))
	r.good(r.read(rw10(cdb.Read10, 0, 0, 1), 512))
	r.good(r.read(rw10(cdb.Read10, 0, 0, 1), 512))
	want := func(reads, writes, received, transmitted uint64) {
		t.Helper()
		b := r.good(r.read(logSense(0x19, 0, 255), 255)).in[8:]
		for i, n := range []uint64{reads, writes, received, transmitted} {
			if got := be64(b[8*i:]); got != n {
				t.Errorf("field %d is %d, want %d", i, got, n)
			}
		}
		if be64(b[48:]) != reads+writes {
			t.Errorf("%d commands", be64(b[48:]))
		}
	}
	want(3, 2, 5, 4)
	for _, c := range [][]byte{{cdb.LogSelect, 0, 9: 0}, {cdb.LogSelect, 2, 0x2f, 9: 0}} { // no reset, another page
		r.good(r.none(c...))
		want(3, 2, 5, 4)
	}
	r.good(r.none(cdb.LogSelect, 2, 0x40, 0, 0, 0, 0, 0, 0, 0))
	want(0, 0, 0, 0)
	other.expect(uaLog)
	r.on(r.n, 0).expect()
	r.good(r.read(rw10(cdb.Read10, 0, 0, 1), 512))
	want(1, 0, 0, 1)
	if n := r.s.Stats()[0].Classes[scsi.ClassRead].Good; n != 4 {
		t.Errorf("LOG SELECT set the administrator's counters to zero: %d", n)
	}
}

// Why commands did not end GOOD, each reason once, in order of the first one.
func TestRefusals(t *testing.T) {
	r := newRig(t, mib, nil)
	r.refused(r.write(unmapCDB(8), make([]byte, 7)), badListLen)
	r.refused(r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{1 << 40, 1})), badLBA)
	r.refused(r.write(unmapCDB(8), nil), badListLen)
	r.refused(r.none(unmapCDB(7)...), badListLen)
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrReserved })
	r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{0, 8}))
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrBusy })
	r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{0, 8}))
	r.lu.SetFail(nil)
	wrong := append(pattern(512, 1), pattern(512, 2)...)
	r.refused(r.write(caw(0, 0, 1), wrong), miscompare)
	// Attentions are not refusals.
	r.s.PathsChanged(0)
	r.refused(r.write(unmapCDB(24), cdb.AppendUnmap(nil, [2]uint64{0, 8})), uaPaths)
	classes := r.s.Stats()[0].Classes
	same := func(class scsi.OpClass, want ...scsi.Refusal) {
		t.Helper()
		got := classes[class].Refused
		if len(got) != len(want) {
			t.Fatalf("%v: %+v", class, got)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("%v: %+v, want %+v", class, got[i], want[i])
			}
		}
	}
	same(scsi.ClassUnmap,
		scsi.Refusal{Status: 2, Key: 5, ASC: 0x1a, Count: 3}, scsi.Refusal{Status: 2, Key: 5, ASC: 0x21, Count: 1},
		scsi.Refusal{Status: cdb.ReservationConflict, Count: 1}, scsi.Refusal{Status: cdb.Busy, Count: 1})
	same(scsi.ClassCompareAndWrite, scsi.Refusal{Status: 2, Key: 0xe, ASC: 0x1d, Count: 1})
	same(scsi.ClassRead)

	// A ninth reason is counted with the others that have no room.
	for asc := range byte(12) {
		switch asc {
		case 0:
			r.refused(r.read(rw10(cdb.Read10, 0, 0x7fffffff, 1), 512), badLBA)
		default:
			r.lu.SetFail(func(*scsi.Request) error {
				return []error{scsi.ErrBusy, scsi.ErrMedium, scsi.ErrNoSpace, scsi.ErrReserved, scsi.ErrReadOnly, scsi.ErrDeleted, errSurprise, scsi.ErrMiscompare, scsi.ErrBusy}[asc%9]
			})
			r.read(readBlock0, 512)
		}
	}
	r.lu.SetFail(nil)
	r.refused(r.read(rw10(cdb.Read10, 0x20, 0, 1), 512), badField)
	r.refused(r.read(rw10(cdb.Read10, 0x20, 0, 1), 512), badField)
	classes = r.s.Stats()[0].Classes
	list := classes[scsi.ClassRead].Refused
	sum := uint64(0)
	for _, f := range list {
		sum += f.Count
	}
	if c := classes[scsi.ClassRead]; len(list) != 9 || list[8].Status != 0 || list[8].Count == 0 || sum != c.CheckConditions+c.Conflicts+c.Busy {
		t.Errorf("%+v of %+v", list, c)
	}
}
