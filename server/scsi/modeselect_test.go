package scsi_test

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

func modeSelect6(list []byte) command {
	return command{cdb: []byte{cdb.ModeSelect6, 0x10, 0, 0, byte(len(list)), 0}, write: true, expected: uint32(len(list)), out: list}
}

func modeSelect10(list []byte) command {
	return command{cdb: []byte{cdb.ModeSelect10, 0x10, 0, 0, 0, 0, 0, byte(len(list) >> 8), byte(len(list)), 0},
		write: true, expected: uint32(len(list)), out: list}
}

// controlPage is the control mode page as MODE SENSE returns it.
func controlPage(swp byte) []byte {
	return []byte{0x0a, 0x0a, 0x02, 0x10, swp, 0x40, 0, 0, 0x01, 0x2c, 0, 0}
}

func after(header []byte, rest ...[]byte) []byte {
	return bytes.Join(append([][]byte{header}, rest...), nil)
}

func TestSoftwareWriteProtect(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	b.good(b.run(writeBlock0))
	c.path.Hold()
	late := b.launch(writeBlock0, true)
	a.good(a.run(modeSelect6(after(make([]byte, 4), controlPage(8)))))
	c.path.Release()
	sense, _, _ := cdb.ParseSense(late.Sense[:late.SenseLen])
	if late.status != cdb.CheckCondition || (code{sense.Key, sense.ASC, sense.ASCQ}) != software {
		t.Errorf("a write that was overtaken: %02x %+v", late.status, sense)
	}
	a.expect()
	b.expect(uaMode)
	for _, p := range []port{a, b} {
		for _, k := range []command{writeBlock0, {cdb: unmapCDB(0)}, {cdb: rw16(cdb.WriteSame16, 1, 0, 1)}, {cdb: caw(0, 0, 0)}} {
			p.refused(p.run(k), software)
		}
		p.good(p.run(readBlock0Cmd))
		if in := p.good(p.run(command{cdb: modeSense6(8, 0x0a, 0), read: true, expected: 255})).in; in[2] != 0x90 || !bytes.Equal(in[4:], controlPage(8)) {
			t.Errorf("%x", in)
		}
		if in := p.good(p.run(command{cdb: modeSense6(8, 0x8a, 0), read: true, expected: 255})).in; !bytes.Equal(in[4:], controlPage(0)) {
			t.Errorf("default: %x", in)
		}
	}
	// The same again is no change; a reset keeps it.
	b.good(b.run(modeSelect10(after(make([]byte, 8), controlPage(8)))))
	a.expect()
	c.a.manage(a.nexus, scsi.LogicalUnitReset, 0, nil)
	a.expect(uaReset)
	b.expect(uaReset)
	a.refused(a.run(writeBlock0), software)
	// What MODE SENSE returned, with the bit cleared, is taken back as a whole.
	in := a.good(a.run(command{cdb: modeSense10(0, 0x3f, 0xff), read: true, expected: 1024})).in
	at := bytes.Index(in, controlPage(8))
	in[at+4] = 0
	b.good(b.run(modeSelect10(in)))
	a.expect(uaMode)
	a.good(a.run(writeBlock0))
	b.good(b.run(writeBlock0))
}

func TestModeSelectRefusals(t *testing.T) {
	r := newRig(t, mib, nil)
	head6, head10 := make([]byte, 4), make([]byte, 8)
	change := func(page []byte, at int, v byte) []byte {
		page = bytes.Clone(page)
		page[at] = v
		return page
	}
	descriptor := func(blocks, size uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte{0, 0, 0, 8}, blocks), size)
	}
	short := modeSelect6(after(head6, controlPage(8)))
	short.expected = 10
	noFormat := modeSelect6(after(head6, controlPage(8)))
	noFormat.cdb[1] = 0
	save := modeSelect6(after(head6, controlPage(8)))
	save.cdb[1] = 0x11
	caching := append([]byte{8, 0x12}, make([]byte, 18)...)
	for _, c := range []struct {
		name  string
		c     command
		want  code
		field int
	}{
		{"PF=0", noFormat, badField, 1},
		{"SP=1", save, badField, 1},
		{"less data than the list", short, badListLen, -1},
		{"header cut", modeSelect6(make([]byte, 3)), badListLen, -1},
		{"header cut, 10", modeSelect10(make([]byte, 7)), badListLen, -1},
		{"medium type", modeSelect6(change(head6, 1, 1)), badParam, 1},
		{"medium type, 10", modeSelect10(change(head10, 2, 1)), badParam, 2},
		{"descriptor length", modeSelect6(append(change(head6, 3, 4), 0, 0, 0, 0)), badParam, 3},
		{"descriptor cut", modeSelect6(descriptor(0, 512)[:10]), badListLen, -1},
		{"descriptor, blocks", modeSelect6(descriptor(5, 512)), badParam, 4},
		{"descriptor, block size", modeSelect6(descriptor(0, 4096)), badParam, 9},
		{"page header cut", modeSelect6(after(head6, []byte{0x0a})), badListLen, -1},
		{"page cut", modeSelect6(after(head6, controlPage(8)[:8])), badListLen, -1},
		{"subpage header cut", modeSelect6(after(head6, []byte{0x4a, 1, 0})), badListLen, -1},
		{"unknown page", modeSelect6(after(head6, []byte{0x02, 0})), badParam, 4},
		{"unknown subpage", modeSelect6(after(head6, []byte{0x4a, 9, 0, 0})), badParam, 4},
		{"page length", modeSelect6(after(head6, []byte{0x0a, 8, 0, 0, 0, 0, 0, 0, 0, 0})), badParam, 5},
		{"bit that does not change", modeSelect6(after(head6, change(controlPage(8), 5, 0))), badParam, 9},
		{"WCE", modeSelect6(after(head6, change(caching, 2, 4))), badParam, 6},
		{"second page bad", modeSelect6(after(head6, controlPage(8), change(caching, 2, 4))), badParam, 18},
		{"page 0 of all", modeSelect6(after(head6, []byte{0x3f, 0})), badParam, 4},
	} {
		res := r.do(c.c)
		if res.status != cdb.CheckCondition || res.code() != c.want || c.field >= 0 && int(res.sense.Field) != c.field {
			t.Errorf("%s: %02x %x field %d, want %x field %d", c.name, res.status, res.code(), res.sense.Field, c.want, c.field)
		}
	}
	// No partial effect.
	r.good(r.write(rw10(cdb.Write10, 0, 0, 1), pattern(512, 1)))
	r.good(r.do(modeSelect6(nil)))
	r.good(r.do(modeSelect6(descriptor(0xffffffff, 512))))
	r.good(r.do(modeSelect6(descriptor(mib/512, 512))))
	long := make([]byte, 8+16)
	long[4], long[7] = 1, 16
	binary.BigEndian.PutUint64(long[8:], mib/512)
	binary.BigEndian.PutUint32(long[20:], 512)
	r.good(r.do(modeSelect10(long)))
	if r.lu.Count(scsi.OpState) != 0 {
		t.Error("the state was written")
	}
	// A read-only unit says so first.
	ro := newRig(t, mib, func(c *scsi.LUConfig) { c.ReadOnly = true })
	ro.good(ro.do(modeSelect6(after(head6, controlPage(8)))))
	ro.refused(ro.do(writeBlock0), readOnly)
}

func TestIdentifyingInformation(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	set := func(kind byte, text string) command {
		k := command{cdb: maintenanceOut(cdb.ActionSetIdentifying, byte(len(text))), write: len(text) > 0, expected: uint32(len(text)), out: []byte(text)}
		k.cdb[10] = kind << 1
		return k
	}
	report := func(kind byte) command {
		k := command{cdb: maintenanceIn(cdb.ActionIdentifying, 0, 0, 0, 255), read: true, expected: 255}
		k.cdb[10] = kind << 1
		return k
	}
	is := func(p port, want string) {
		t.Helper()
		if in := p.good(p.run(report(0))).in; string(in[4:]) != want || int(in[3]) != len(want) {
			t.Errorf("%q, want %q", in, want)
		}
	}
	is(a, "")
	a.good(a.run(set(0, "the accounts' disk")))
	b.expect(uaIdentity)
	a.expect()
	is(a, "the accounts' disk")
	is(b, "the accounts' disk")
	long := string(bytes.Repeat([]byte{'x'}, 64))
	b.good(b.run(set(0, long)))
	a.run(requestSenseIn)
	is(a, long)
	a.refused(a.run(set(0, long+"x")), badField)
	a.refused(a.run(set(1, "x")), badField)
	a.refused(a.run(report(5)), badField)
	short := set(0, "abc")
	short.expected = 2
	a.refused(a.run(short), badListLen)
	if in := a.good(a.run(report(0x7f))).in; !bytes.Equal(in, []byte{0, 0, 0, 4, 0, 0, 0, 64}) {
		t.Errorf("%x", in)
	}
	a.good(a.run(set(0, "")))
	b.run(requestSenseIn)
	is(b, "")
}

func TestTimestamp(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	lu := memlu.New(mib)
	s := scsi.New(scsi.Config{Backend: lu, NodePort: 1, PortGroup: 1, TargetName: target, Now: func() time.Time { return now }})
	defer s.Close()
	r := &rig{t: t, s: s, lu: lu}
	if err := s.SetLU(unitConfig(0, lu)); err != nil {
		t.Fatal(err)
	}
	s.SetAccess(0, scsi.Visibility{Any: true})
	a, b := r.host("iqn.a", 1), r.host("iqn.b", 2)
	is := func(p port, origin byte, want int64) {
		t.Helper()
		in := p.good(p.run(command{cdb: maintenanceIn(cdb.ActionTimestamp, 0, 0, 0, 255), read: true, expected: 255})).in
		got := int64(binary.BigEndian.Uint64(in[2:]) & (1<<48 - 1))
		if len(in) != 12 || in[1] != 10 || in[2] != origin || got != want {
			t.Errorf("%x: %d, want %d", in, got, want)
		}
	}
	is(a, 3, now.UnixMilli())
	list := make([]byte, 12)
	binary.BigEndian.PutUint64(list[2:], 5_000_000)
	a.good(a.run(command{cdb: maintenanceOut(cdb.ActionTimestamp, 12), write: true, expected: 12, out: list}))
	b.expect(uaTimestamp)
	a.expect()
	is(b, 2, 5_000_000)
	now = now.Add(3 * time.Second)
	is(a, 2, 5_003_000)
	a.refused(a.run(command{cdb: maintenanceOut(cdb.ActionTimestamp, 8), write: true, expected: 8, out: list}), badListLen)
	a.good(a.run(command{cdb: maintenanceOut(cdb.ActionTimestamp, 0)}))
	is(a, 2, 5_003_000)
}
