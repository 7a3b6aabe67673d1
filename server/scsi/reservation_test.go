package scsi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

var (
	uaCleared   = code{6, 0x2a, 3}
	uaReleased  = code{6, 0x2a, 4}
	uaPreempted = code{6, 0x2a, 5}
	uaTimestamp = code{6, 0x2a, 0x10}
	uaIdentity  = code{6, 0x3f, 5}

	badRelease = code{5, 0x26, 4}
	software   = code{7, 0x27, 2}
)

// cluster is two device servers on one volume: nodes 1 and 2.
type cluster struct {
	a, b  *rig
	lu    *memlu.LU
	near  *memlu.Path // node 1's way to the volume
	path  *memlu.Path // node 2's
	state struct {
		sync.Mutex
		groups []scsi.PortGroup
	}
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	lu := memlu.New(mib)
	c := &cluster{lu: lu, near: lu.Path(), path: lu.Path()}
	c.state.groups = []scsi.PortGroup{
		{ID: 1, Ports: []uint16{1}, State: scsi.ActiveOptimized, Preferred: true},
		{ID: 2, Ports: []uint16{128}, State: scsi.ActiveNonOptimized},
	}
	node := func(port, group uint16, backend scsi.Backend, v scsi.Volume) *rig {
		s := scsi.New(scsi.Config{Backend: backend, NodePort: port, PortGroup: group, TargetName: target})
		t.Cleanup(s.Close)
		config := unitConfig(0, v)
		config.Paths = func() []scsi.PortGroup {
			c.state.Lock()
			defer c.state.Unlock()
			return c.state.groups
		}
		if err := s.SetLU(config); err != nil {
			t.Fatal(err)
		}
		s.SetAccess(0, scsi.Visibility{Any: true})
		return &rig{t: t, s: s, lu: lu}
	}
	c.a, c.b = node(1, 1, c.near, c.near), node(128, 2, c.path, c.path)
	return c
}

func (c *cluster) setGroups(groups ...scsi.PortGroup) {
	c.state.Lock()
	c.state.groups = groups
	c.state.Unlock()
	c.a.s.PathsChanged(0)
	c.b.s.PathsChanged(0)
}

// host makes a nexus and returns its address of LUN 0.
func (r *rig) host(name string, isid byte) port { return r.on(r.attach(name, isid), 0) }

// Service actions of PERSISTENT RESERVE OUT.
const (
	register = iota
	reserve
	release
	clearAll
	preempt
	preemptAbort
	registerIgnore
	registerMove
)

func prOut(action, kind byte, key, serviceKey uint64, flags byte, ids ...byte) command {
	list := binary.BigEndian.AppendUint64(nil, key)
	list = binary.BigEndian.AppendUint64(list, serviceKey)
	list = append(list, 0, 0, 0, 0, flags, 0, 0, 0)
	if flags&8 != 0 {
		list = binary.BigEndian.AppendUint32(list, uint32(len(ids)))
	}
	return prOutList(action, kind, append(list, ids...))
}

func prMove(key, serviceKey uint64, flags byte, target uint16, id []byte) command {
	list := binary.BigEndian.AppendUint64(nil, key)
	list = binary.BigEndian.AppendUint64(list, serviceKey)
	list = append(list, 0, flags, byte(target>>8), byte(target))
	list = binary.BigEndian.AppendUint32(list, uint32(len(id)))
	return prOutList(registerMove, 0, append(list, id...))
}

func prOutList(action, kind byte, list []byte) command {
	n := len(list)
	return command{cdb: []byte{cdb.PersistentReserveOut, action, kind, 0, 0, 0, 0, byte(n >> 8), byte(n), 0},
		write: true, expected: uint32(n), out: list}
}

func prIn(action byte, alloc uint16) command {
	return command{cdb: []byte{cdb.PersistentReserveIn, action, 0, 0, 0, 0, 0, byte(alloc >> 8), byte(alloc), 0}, read: true, expected: uint32(alloc)}
}

func transportID(name string, isid byte) []byte {
	b := []byte(fmt.Sprintf("\x45\x00\x00\x00%s,i,0x%02x0000000000\x00", name, isid))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	b[3] = byte(len(b) - 4)
	return b
}

func (p port) pr(action, kind byte, key, serviceKey uint64) {
	p.t.Helper()
	p.good(p.run(prOut(action, kind, key, serviceKey, 0)))
}

func (p port) conflicts(c command) {
	p.t.Helper()
	if res := p.run(c); res.status != cdb.ReservationConflict {
		p.t.Fatalf("CDB %x: status %02x %x, want RESERVATION CONFLICT", c.cdb, res.status, res.code())
	}
}

// expectIn compares a reply of PERSISTENT RESERVE IN.
func (p port) expectIn(action byte, want string) {
	p.t.Helper()
	want = strings.Join(strings.Fields(want), "")
	if got := hex.EncodeToString(p.good(p.run(prIn(action, 4096))).in); got != want {
		p.t.Fatalf("PERSISTENT RESERVE IN %d\n got %s\nwant %s", action, got, want)
	}
}

// Every node answers the same, and a registration belongs to one nexus.
func TestReservationsOverTwoNodes(t *testing.T) {
	c := newCluster(t)
	a, a2, b := c.a.host("iqn.a", 1), c.b.host("iqn.a", 1), c.b.host("iqn.b", 2)
	a.expectIn(0, "00000000 00000000")
	b.expectIn(1, "00000000 00000000")
	a.pr(register, 0, 0, 0xa1)
	b.good(b.run(prOut(register, 0, 0, 0xb1, 1))) // APTPL
	for _, p := range []port{a, a2, b} {
		p.expectIn(0, "00000002 00000010 00000000000000a1 00000000000000b1")
		p.expectIn(2, "0008 1d 81 ea01 0000")
	}
	a2.conflicts(prOut(reserve, 5, 0xa1, 0, 0)) // another nexus of the same initiator
	a.pr(reserve, 5, 0xa1, 0)
	a.pr(register, 0, 0xa1, 0xa2) // the key that is shown follows
	for _, p := range []port{a, b} {
		p.expectIn(1, "00000003 00000010 00000000000000a2 00000000 00 05 0000")
		p.expectIn(2, "0008 1d 80 ea01 0000")
	}
	idA, idB := hex.EncodeToString(transportID("iqn.a", 1)), hex.EncodeToString(transportID("iqn.b", 2))
	b.expectIn(3, "00000003 00000068"+
		"00000000000000a2 00000000 01 05 00000000 0001 0000001c"+idA+
		"00000000000000b1 00000000 00 00 00000000 0080 0000001c"+idB)
	// A cut reply still tells the full length.
	if res := a.good(a.run(prIn(3, 10))); len(res.in) != 10 || res.in[7] != 0x68 {
		t.Errorf("%x", res.in)
	}
	if res := a.good(a.run(prIn(0, 0))); len(res.in) != 0 {
		t.Errorf("%x", res.in)
	}
	// Registrants write, others read.
	a.good(a.run(writeBlock0))
	b.good(b.run(writeBlock0))
	a2.conflicts(writeBlock0)
	a2.good(a2.run(readBlock0Cmd))
	// The state is the volume's: it outlives sessions, resets and nodes.
	c.b.s.Detach(b.nexus, true)
	c.a.manage(a.nexus, scsi.LogicalUnitReset, 0, nil)
	third := scsi.New(scsi.Config{Backend: c.lu, NodePort: 3, PortGroup: 3, TargetName: target})
	defer third.Close()
	if err := third.SetLU(unitConfig(0, c.lu.Path())); err != nil {
		t.Fatal(err)
	}
	third.SetAccess(0, scsi.Visibility{Any: true})
	r := &rig{t: t, s: third, lu: c.lu}
	late := r.host("iqn.b", 2)
	late.expectIn(0, "00000003 00000010 00000000000000a2 00000000000000b1")
	late.conflicts(writeBlock0)
	// All registrants hold: no key is shown, and R_HOLDER everywhere.
	a.run(requestSenseIn)
	a.pr(release, 5, 0xa2, 0)
	a.pr(reserve, 8, 0xa2, 0)
	a.expectIn(1, "00000003 00000010 0000000000000000 00000000 00 08 0000")
	a.expectIn(3, "00000003 00000068"+
		"00000000000000a2 00000000 01 08 00000000 0001 0000001c"+idA+
		"00000000000000b1 00000000 01 08 00000000 0080 0000001c"+idB)
}

func TestReserveOutRefusals(t *testing.T) {
	c := newCluster(t)
	a := c.a.host("iqn.a", 1)
	id := transportID("iqn.b", 2)
	short := prOut(register, 0, 0, 1, 0)
	short.expected, short.out = 20, short.out[:20]
	long := prOutList(register, 0, append(prOut(register, 0, 0, 1, 0).out, 0, 0, 0, 0))
	for _, k := range []struct {
		name string
		c    command
		want code
	}{
		{"scope", prOut(reserve, 0x15, 0, 0, 0), badField},
		{"type 0", prOut(reserve, 0, 0, 0, 0), badField},
		{"type 2", prOut(preempt, 2, 0, 0, 0), badField},
		{"type 9", prOut(release, 9, 0, 0, 0), badField},
		{"service action 8", prOut(8, 0, 0, 0, 0), badField},
		{"list of 20", prOutList(register, 0, make([]byte, 20)), badListLen},
		{"list of 28", long, badListLen},
		{"less data than the list", short, badListLen},
		{"SPEC_I_PT without a list", prOutList(register, 0, append(make([]byte, 20), 8, 0, 0, 0)), badListLen},
		{"SPEC_I_PT with a wrong length", prOutList(register, 0, append(append(make([]byte, 20), 8, 0, 0, 0, 0, 0, 0, 40), id...)), badListLen},
		{"SPEC_I_PT of REGISTER AND IGNORE", prOut(registerIgnore, 0, 0, 1, 8, id...), badParam},
		{"SPEC_I_PT of CLEAR", prOut(clearAll, 0, 0, 1, 8, id...), badParam},
		{"bad TransportID", prOut(register, 0, 0, 1, 8, append(bytes.Clone(id), make([]byte, 28)...)...), badParam},
		{"TransportID of an unknown device", prOut(register, 0, 0, 1, 8, []byte("\x05\x00\x00\x14iqn.nobody.at.all\x00\x00\x00")...), badParam},
		{"move without a TransportID", prMove(0, 1, 0, 1, nil), badParam},
		{"move to a device", prMove(0, 1, 0, 1, []byte("\x05\x00\x00\x14iqn.nobody.at.all\x00\x00\x00")), badParam},
		{"move with two TransportIDs", prMove(0, 1, 0, 1, append(bytes.Clone(id), id...)), badParam},
		{"move with a wrong length", prOutList(registerMove, 0, append(make([]byte, 24), id...)), badListLen},
	} {
		before := c.lu.Count(scsi.OpState)
		if res := a.run(k.c); res.status != cdb.CheckCondition || res.code() != k.want {
			t.Errorf("%s: %02x %x, want %x", k.name, res.status, res.code(), k.want)
		}
		if c.lu.Count(scsi.OpState) != before {
			t.Errorf("%s: the state was written", k.name)
		}
	}
	a.expectIn(0, "00000000 00000000")
	// Scope and type of REGISTER are not looked at.
	a.good(a.run(prOut(register, 0xff, 0, 1, 0)))
	a.conflicts(prOut(register, 0, 9, 1, 0))
	a.pr(reserve, 1, 1, 0)
	a.refused(a.run(prOut(release, 3, 1, 0, 0)), badRelease)
}

func TestSpecifiedAndAllPorts(t *testing.T) {
	c := newCluster(t)
	a, a2 := c.a.host("iqn.a", 1), c.b.host("iqn.a", 1)
	b, b2, b3 := c.a.host("iqn.b", 2), c.b.host("iqn.b", 2), c.a.host("iqn.b", 3)
	all := []port{a, a2, b, b2, b3}
	// SPEC_I_PT registers on the sender's port; a device name stands for its ports here.
	a.good(a.run(prOut(register, 0, 0, 7, 8, []byte("\x05\x00\x00\x14iqn.b\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")...)))
	a.pr(reserve, 5, 7, 0)
	for _, p := range []port{a, b, b3} {
		p.good(p.run(writeBlock0))
	}
	for _, p := range []port{a2, b2} {
		p.conflicts(writeBlock0)
	}
	a.pr(clearAll, 0, 7, 0)
	for _, p := range all {
		p.attentions()
	}
	// ALL_TG_PT registers on the ports of both nodes, with SPEC_I_PT the others too.
	a.good(a.run(prOut(register, 0, 0, 7, 8|4, transportID("iqn.b", 2)...)))
	a.pr(reserve, 6, 7, 0)
	for _, p := range []port{a, a2, b, b2} {
		p.good(p.run(writeBlock0))
	}
	b3.conflicts(readBlock0Cmd)
	if in := b3.good(b3.run(prIn(3, 4096))).in; in[8+12] != 3 || len(in) != 8+4*(24+28) {
		t.Errorf("%x", in)
	}
	// Unregistering removes one nexus.
	a2.pr(register, 0, 7, 0)
	a2.conflicts(readBlock0Cmd)
	a.good(a.run(readBlock0Cmd))
	// REGISTER AND MOVE to a port of the other node; nobody is told.
	a.good(a.run(prMove(7, 9, 2, 128, transportID("iqn.c", 4))))
	a.conflicts(readBlock0Cmd)
	h := c.b.host("iqn.c", 4)
	h.good(h.run(writeBlock0))
	if in := h.good(h.run(prIn(1, 64))).in; in[15] != 9 {
		t.Errorf("%x", in)
	}
	for _, p := range all {
		p.expect()
	}
	h.pr(release, 6, 9, 0)
}

// The table of who hears of what; never the sender.
func TestReservationAttentions(t *testing.T) {
	for _, k := range []struct {
		name string
		kind byte // A holds it
		by   int  // who sends
		c    command
		want [4][]code // A B (node 1), C (node 2), D (node 2, not registered)
	}{
		{"register", 5, 0, prOut(register, 0, 1, 9, 0), [4][]code{}},
		{"release WE", 1, 0, prOut(release, 1, 1, 0, 0), [4][]code{}},
		{"release EA", 3, 0, prOut(release, 3, 1, 0, 0), [4][]code{}},
		{"release WE-RO", 5, 0, prOut(release, 5, 1, 0, 0), [4][]code{1: {uaReleased}, 2: {uaReleased}}},
		{"release EA-RO", 6, 0, prOut(release, 6, 1, 0, 0), [4][]code{1: {uaReleased}, 2: {uaReleased}}},
		{"release WE-AR by another", 7, 2, prOut(release, 7, 3, 0, 0), [4][]code{0: {uaReleased}, 1: {uaReleased}}},
		{"release EA-AR", 8, 0, prOut(release, 8, 1, 0, 0), [4][]code{1: {uaReleased}, 2: {uaReleased}}},
		{"unregister holder WE", 1, 0, prOut(register, 0, 1, 0, 0), [4][]code{}},
		{"unregister holder WE-RO", 5, 0, prOut(register, 0, 1, 0, 0), [4][]code{1: {uaReleased}, 2: {uaReleased}}},
		{"unregister one of AR", 7, 0, prOut(register, 0, 1, 0, 0), [4][]code{}},
		{"unregister another", 5, 2, prOut(register, 0, 3, 0, 0), [4][]code{}},
		{"clear", 5, 1, prOut(clearAll, 0, 2, 0, 0), [4][]code{0: {uaCleared}, 2: {uaCleared}}},
		{"clear, none held", 0, 2, prOut(clearAll, 0, 3, 0, 0), [4][]code{0: {uaCleared}, 1: {uaCleared}}},
		{"preempt, same type", 5, 2, prOut(preempt, 5, 3, 1, 0), [4][]code{0: {uaPreempted}}},
		{"preempt, other type", 5, 2, prOut(preempt, 1, 3, 1, 0), [4][]code{0: {uaPreempted}, 1: {uaReleased}}},
		{"preempt a registrant", 5, 0, prOut(preempt, 1, 1, 3, 0), [4][]code{2: {uaPreempted}}},
		{"preempt itself", 5, 0, prOut(preempt, 6, 1, 1, 0), [4][]code{1: {uaReleased}, 2: {uaReleased}}},
		{"preempt AR", 7, 1, prOut(preempt, 7, 2, 0, 0), [4][]code{0: {uaPreempted}, 2: {uaPreempted}}},
		{"preempt and abort", 6, 1, prOut(preemptAbort, 6, 2, 3, 0), [4][]code{2: {uaPreempted}}},
		{"move", 5, 0, prMove(1, 9, 2, 128, transportID("iqn.d", 4)), [4][]code{}},
	} {
		c := newCluster(t)
		hosts := [4]port{c.a.host("iqn.a", 1), c.a.host("iqn.b", 2), c.b.host("iqn.c", 3), c.b.host("iqn.d", 4)}
		for i := range 3 {
			hosts[i].pr(register, 0, 0, uint64(i+1))
		}
		if k.kind != 0 {
			hosts[0].pr(reserve, k.kind, 1, 0)
		}
		if res := hosts[k.by].run(k.c); res.status != cdb.Good {
			t.Fatalf("%s: %02x %x", k.name, res.status, res.code())
		}
		for i, p := range hosts {
			// INQUIRY does not clear them; read them by REQUEST SENSE.
			var got []code
			for {
				s, _, _ := cdb.ParseSense(p.good(p.run(requestSenseIn)).in)
				if s.Key != cdb.UnitAttention {
					break
				}
				got = append(got, code{s.Key, s.ASC, s.ASCQ})
			}
			if fmt.Sprint(got) != fmt.Sprint(k.want[i]) {
				t.Errorf("%s: host %d hears %x, want %x", k.name, i, got, k.want[i])
			}
		}
	}
}

// Every class of command against every type, for the holder, a registrant and a
// stranger, through the wire.
func TestReservationMatrix(t *testing.T) {
	list := cdb.AppendUnmap(nil, [2]uint64{0, 8})
	any := []command{unitReadyCmd, {cdb: inq(0, 0, 255), read: true, expected: 255}, reportLUNsCmd, requestSenseIn,
		{cdb: readCapacity16(32), read: true, expected: 32}, {cdb: []byte{cdb.ReadCapacity10, 9: 0}, read: true, expected: 8},
		{cdb: maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), read: true, expected: 255},
		{cdb: maintenanceIn(cdb.ActionIdentifying, 0, 0, 0, 255), read: true, expected: 255},
		{cdb: maintenanceIn(cdb.ActionTimestamp, 0, 0, 0, 255), read: true, expected: 255},
		prIn(0, 255), prIn(3, 255),
		{cdb: []byte{cdb.StartStopUnit, 0, 0, 0, 1, 0}}, {cdb: []byte{cdb.PreventAllow, 0, 0, 0, 0, 0}}}
	reads := []command{readBlock0Cmd, {cdb: rw10(cdb.Verify10, 0, 0, 1)}, {cdb: rw10(cdb.PreFetch10, 0, 0, 1)},
		{cdb: modeSense6(8, 0x3f, 0), read: true, expected: 255}, {cdb: modeSense10(8, 0x3f, 0), read: true, expected: 255},
		{cdb: []byte{cdb.ReadDefectData10, 0, 0, 0, 0, 0, 0, 0, 8, 0}, read: true, expected: 8},
		{cdb: []byte{cdb.ReceiveDiagnosticResults, 0, 0, 0, 255, 0}, read: true, expected: 255},
		{cdb: maintenanceIn(cdb.ActionReportOpcodes, 0, 0, 0, 255), read: true, expected: 255},
		{cdb: maintenanceIn(cdb.ActionReportTaskManagement, 0, 0, 0, 255), read: true, expected: 255}}
	writes := []command{writeBlock0, {cdb: unmapCDB(len(list)), write: true, expected: uint32(len(list)), out: list}, {cdb: unmapCDB(0)},
		{cdb: rw16(cdb.WriteSame16, 1, 0, 1)}, {cdb: caw(0, 0, 0)}, {cdb: rw10(cdb.SynchronizeCache10, 0, 0, 0)},
		{cdb: []byte{cdb.SendDiagnostic, 4, 0, 0, 0, 0}}, {cdb: []byte{cdb.StartStopUnit, 0, 0, 0, 0, 0}},
		{cdb: []byte{cdb.PreventAllow, 0, 0, 0, 1, 0}}, {cdb: []byte{cdb.ModeSelect6, 0x10, 0, 0, 0, 0}},
		{cdb: maintenanceOut(cdb.ActionSetIdentifying, 0)}, {cdb: maintenanceOut(cdb.ActionTimestamp, 0)}, {cdb: rw10(cdb.WriteAndVerify10, 0, 0, 1), write: true, expected: 512, out: make([]byte, 512)}}
	for _, kind := range []byte{1, 3, 5, 6, 7, 8} {
		c := newCluster(t)
		holder, registrant, stranger := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2), c.b.host("iqn.c", 3)
		holder.pr(register, 0, 0, 1)
		registrant.pr(register, 0, 0, 2)
		holder.pr(reserve, kind, 1, 0)
		exclusive := kind == 3 || kind == 6 || kind == 8
		check := func(p port, what string, set []command, allowed bool) {
			t.Helper()
			for _, k := range set {
				res := p.run(k)
				if allowed && res.status != cdb.Good || !allowed && res.status != cdb.ReservationConflict {
					t.Errorf("type %d, %s, CDB %x: status %02x %x", kind, what, k.cdb, res.status, res.code())
				}
				for _, q := range []port{holder, registrant, stranger} {
					q.attentions() // SET IDENTIFYING INFORMATION tells the others
				}
			}
		}
		for _, p := range []struct {
			port
			what string
			free bool
		}{{holder, "holder", true}, {registrant, "registrant", kind >= 5}, {stranger, "stranger", false}} {
			check(p.port, p.what, any, true)
			check(p.port, p.what, reads, p.free || !exclusive)
			check(p.port, p.what, writes, p.free)
		}
	}
}

func maintenanceOut(action byte, length byte) []byte {
	return []byte{cdb.MaintenanceOut, action, 0, 0, 0, 0, 0, 0, 0, length, 0, 0}
}

// A write that was accepted before a reservation came, and sequenced after it,
// conflicts.
func TestWriteOvertakenByReservation(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	a.pr(register, 0, 0, 1)
	c.path.Hold()
	f := b.launch(writeBlock0, true)
	a.pr(reserve, 1, 1, 0)
	c.path.Release()
	if f.completed != 1 || f.status != cdb.ReservationConflict || c.lu.Allocated() != 0 {
		t.Fatalf("completed %d, status %02x, %d blocks", f.completed, f.status, c.lu.Allocated())
	}
}

// After PREEMPT AND ABORT nothing of the victim lands, whether its writes wait
// at the volume, on their way from another node, or for their data.
func TestPreemptAndAbort(t *testing.T) {
	c := newCluster(t)
	var mu sync.Mutex
	var given []*scsi.Task
	gone := make(chan struct{}, 4)
	c.b.s.SetHooks(scsi.Hooks{AbortWaiting: func(k *scsi.Task) {
		mu.Lock()
		given = append(given, k)
		mu.Unlock()
		gone <- struct{}{}
	}})
	a, near, far, bystander := c.a.host("iqn.a", 1), c.a.host("iqn.v", 2), c.b.host("iqn.v", 2), c.b.host("iqn.w", 3)
	a.pr(register, 0, 0, 1)
	near.pr(register, 0, 0, 2)
	far.pr(register, 0, 0, 2)
	bystander.pr(register, 0, 0, 3)
	far.pr(reserve, 7, 2, 0)

	write := func(lba uint32) command {
		return command{cdb: rw10(cdb.Write10, 0, lba, 8), write: true, expected: 4096, out: pattern(4096, 1)}
	}
	c.path.Hold() // the other node's writes have not reached the owner
	onTheWay := far.launch(write(0), true)
	waiting := far.launch(write(8), false)
	other := bystander.launch(write(16), true)
	c.lu.Hold() // this node's write is being sequenced
	atOwner := near.launch(write(24), true)

	pre := prOut(preemptAbort, 7, 1, 2, 0)
	f := a.launch(pre, true)
	c.lu.Release() // the write, then the change
	<-f.done
	if f.status != cdb.Good {
		t.Fatalf("PREEMPT AND ABORT: %02x %x", f.status, f.Sense[:f.SenseLen])
	}
	if atOwner.completed != 1 {
		t.Fatal("answered while a write of the victim is with the volume")
	}
	landed := c.lu.Count(scsi.OpWrite)
	before := c.lu.Allocated()
	<-gone
	mu.Lock()
	if len(given) != 1 || given[0] != waiting.Task || waiting.Status != cdb.TaskAborted {
		t.Errorf("%d given up, status %02x", len(given), waiting.Status)
	}
	mu.Unlock()
	// What was on the way comes now: nothing of the victim is applied.
	c.path.Release()
	if onTheWay.completed != 1 || onTheWay.status != cdb.TaskAborted || !onTheWay.aborted {
		t.Errorf("on the way: completed %d, status %02x", onTheWay.completed, onTheWay.status)
	}
	if other.completed != 1 || other.status != cdb.Good || other.aborted {
		t.Errorf("bystander: status %02x", other.status)
	}
	if got := c.lu.Allocated() - before; got != 1 {
		t.Errorf("%d blocks landed after the answer, want the bystander's; %d writes before", got, landed)
	}
	waiting.Out = pattern(4096, 1)
	c.b.s.Execute(waiting.Task) // a transport that executes it all the same
	if waiting.status != cdb.TaskAborted || c.lu.Allocated()-before != 1 {
		t.Errorf("waiting: %02x", waiting.status)
	}
	near.expect(uaPreempted)
	far.expect(uaPreempted)
	bystander.expect()
	a.expect()
	far.conflicts(write(0))
}

// settled runs PERSISTENT RESERVE IN until it shows a generation, and once more:
// then the device server of p has gone on after the change that made it.
func (p port) settled(generation byte) {
	p.t.Helper()
	for seen := false; ; {
		in := p.good(p.run(prIn(0, 8))).in
		if seen {
			return
		}
		seen = in[3] == generation
	}
}

// PREEMPT AND ABORT waits for the victim's tasks on its own node even when its
// change is in force before they end.
func TestPreemptAndAbortWaits(t *testing.T) {
	c := newCluster(t)
	a, v := c.a.host("iqn.a", 1), c.a.host("iqn.v", 2)
	a.pr(register, 0, 0, 1)
	v.pr(register, 0, 0, 2)
	c.near.Hold(scsi.OpWrite)
	w := v.launch(writeBlock0, true)
	f := a.launch(prOut(preemptAbort, 5, 1, 2, 0), true)
	a.settled(3)
	select {
	case <-f.done:
		t.Fatal("answered while the victim's write is under way")
	default:
	}
	c.near.Release()
	<-f.done
	if f.status != cdb.Good || w.completed != 1 || w.status != cdb.TaskAborted || c.lu.Allocated() != 0 {
		t.Errorf("status %02x, the write %d times %02x", f.status, w.completed, w.status)
	}
	// Of its own tasks too, when it preempts itself; they are not answered.
	c.near.Hold(scsi.OpWrite)
	w = a.launch(writeBlock0, true)
	f = a.launch(prOut(preemptAbort, 5, 1, 1, 0), true)
	v.expect(uaPreempted)
	v.settled(4)
	select {
	case <-f.done:
		t.Fatal("answered while its own write is under way")
	default:
	}
	c.near.Release()
	<-f.done
	if f.status != cdb.Good || w.completed != 1 || !w.aborted || w.status == cdb.TaskAborted || c.lu.Allocated() != 0 {
		t.Errorf("status %02x, its own write %d times %02x", f.status, w.completed, w.status)
	}
	// A reset that comes while it waits ends it, and waits for both.
	v.pr(register, 0, 0, 2)
	c.near.Hold(scsi.OpWrite)
	v.launch(writeBlock0, true)
	f = a.launch(prOut(preemptAbort, 5, 1, 2, 0), true)
	a.settled(6)
	answer := c.a.ask(v.nexus, scsi.LogicalUnitReset, 0, nil)
	c.a.unanswered(answer)
	c.near.Release()
	if got := <-answer; got != scsi.FunctionComplete || f.completed != 1 || f.status != cdb.TaskAborted {
		t.Errorf("answer %d, completed %d times, %02x", got, f.completed, f.status)
	}
}

// PREEMPT AND ABORT of one's own key ends one's own other tasks and keeps the
// registration; two at once do not wait for each other.
func TestPreemptItself(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	a.pr(register, 0, 0, 1)
	b.pr(register, 0, 0, 2)
	a.pr(reserve, 5, 1, 0)
	c.lu.Hold()
	w := a.launch(writeBlock0, true)
	first := a.launch(prOut(preemptAbort, 5, 1, 1, 0), true)
	second := a.launch(prOut(preemptAbort, 5, 1, 1, 0), true)
	c.lu.Release()
	<-first.done
	<-second.done
	if w.completed != 1 {
		t.Error("answered before the write ended")
	}
	if first.aborted && second.aborted {
		t.Error("both were aborted")
	}
	a.good(a.run(writeBlock0))
	a.expect()
	b.expect()
	// Each of the other's: one wins, the other conflicts or is aborted.
	c.lu.Hold()
	x := a.launch(prOut(preemptAbort, 5, 1, 2, 0), true)
	y := b.launch(prOut(preemptAbort, 5, 2, 1, 0), true)
	c.lu.Release()
	<-x.done
	<-y.done
	if (x.status == cdb.Good) == (y.status == cdb.Good) {
		t.Errorf("status %02x, %02x", x.status, y.status)
	}
}

// A change that fails says so, and nothing changed.
func TestReserveOutFails(t *testing.T) {
	c := newCluster(t)
	a := c.a.host("iqn.a", 1)
	c.lu.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpState {
			return scsi.ErrBusy
		}
		return nil
	})
	for _, k := range []command{prOut(register, 0, 0, 1, 0), {cdb: []byte{cdb.Reserve6, 0, 0, 0, 0, 0}}} {
		if res := a.run(k); res.status != cdb.Busy {
			t.Errorf("CDB %x: %02x", k.cdb, res.status)
		}
	}
	c.lu.SetFail(nil)
	a.expectIn(0, "00000000 00000000")
	// Overtaken changes are made again, but not for ever.
	tries := 0
	c.lu.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpState && tries < 50 {
			tries++
			return scsi.ErrStateMoved
		}
		return nil
	})
	a.pr(register, 0, 0, 1)
	c.lu.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpState {
			return scsi.ErrStateMoved
		}
		return nil
	})
	if res := a.run(prOut(register, 0, 1, 2, 0)); res.status != cdb.Busy {
		t.Errorf("%02x", res.status)
	}
}

// An update by another node that this version cannot read leaves what was.
func TestUnreadableState(t *testing.T) {
	c := newCluster(t)
	a := c.a.host("iqn.a", 1)
	a.pr(register, 0, 0, 1)
	c.lu.SetState([]byte{99})
	if res := a.run(prIn(0, 255)); res.status != cdb.Busy {
		t.Errorf("%02x", res.status)
	}
	if res := a.run(prOut(register, 0, 1, 2, 0)); res.status != cdb.Busy {
		t.Errorf("%02x", res.status)
	}
	a.good(a.run(writeBlock0))
}
