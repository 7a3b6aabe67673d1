package scsi_test

import (
	"bytes"
	"testing"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	mib       = 1 << 20
	initiator = "iqn.2026-11.test:host"
	target    = "iqn.2026-11.io.twinsan:test"
)

// rig is a device server with one unit at LUN 0 and one nexus, whose unit
// attentions are read. It plays the transport.
type rig struct {
	t  testing.TB
	s  *scsi.Server
	lu *memlu.LU
	n  *scsi.Nexus
}

func unitConfig(lun uint16, v scsi.Volume) scsi.LUConfig {
	return scsi.LUConfig{
		LUN: lun, VolumeUUID: [16]byte{1, 2, 3, byte(lun)}, Name: "vol", Serial: "TS0123456789ABCDEF",
		NAA:          []byte{0x30, 1, 2, 3, 4, 5, 6, byte(lun)},
		LogicalBlock: 512, PhysicalBlock: 4096, Thin: true, Volume: v,
	}
}

func newRig(t testing.TB, size uint64, change func(*scsi.LUConfig)) *rig {
	t.Helper()
	lu := memlu.New(size)
	s := scsi.New(scsi.Config{Backend: lu, NodePort: 2, PortGroup: 1, TargetName: target})
	t.Cleanup(s.Close)
	r := &rig{t: t, s: s, lu: lu}
	c := unitConfig(0, lu)
	if change != nil {
		change(&c)
	}
	if err := s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	s.SetAccess(0, scsi.Visibility{Any: true})
	r.n = r.attach(initiator, 1)
	return r
}

// attach makes a nexus and reads its unit attentions.
func (r *rig) attach(name string, isid byte) *scsi.Nexus {
	r.t.Helper()
	n, err := r.s.Attach(name, [6]byte{isid})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range r.luns(n) {
		r.on(n, e).run(command{cdb: []byte{cdb.RequestSense, 0, 0, 0, 252, 0}, read: true, expected: 252})
	}
	return n
}

// luns are the addresses that REPORT LUNS returns.
func (r *rig) luns(n *scsi.Nexus) []uint64 {
	r.t.Helper()
	res := r.on(n, 0).run(command{cdb: []byte{cdb.ReportLUNs, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0}, read: true, expected: 65536})
	var all []uint64
	for d := res.in[8:]; len(d) >= 8; d = d[8:] {
		all = append(all, be64(d))
	}
	return all
}

func be64(d []byte) (v uint64) {
	for _, b := range d[:8] {
		v = v<<8 | uint64(b)
	}
	return v
}

// port is one nexus's address of a unit.
type port struct {
	*rig
	nexus *scsi.Nexus
	lun   uint64
}

func (r *rig) on(n *scsi.Nexus, lun uint64) port { return port{r, n, lun} }

// command is one command with its data.
type command struct {
	cdb         []byte
	read, write bool
	expected    uint32
	out         []byte
	extended    bool
	noTry       bool // go to Execute without TryExecute
}

type result struct {
	status   byte
	sense    cdb.Sense
	in       []byte
	transfer uint32
	tried    bool // ended in TryExecute
}

// newTask makes a task as a transport would.
func (p port) newTask(c command) *scsi.Task {
	t := &scsi.Task{Nexus: p.nexus, LUN: p.lun, Read: c.read, Write: c.write, Expected: c.expected, Extended: c.extended}
	copy(t.CDB[:], c.cdb)
	return t
}

// run plays a command from start to end, with every check that a transport's
// memory depends on.
func (p port) run(c command) result {
	p.t.Helper()
	t := p.newTask(c)
	done := make(chan struct{}, 2)
	t.Complete = func(*scsi.Task) { done <- struct{}{} }
	var res result
	switch p.s.Begin(t) {
	case scsi.Finished:
	case scsi.WantData:
		if t.OutLen == 0 || t.OutLen > t.Expected || t.OutLen > 8*mib || int(t.OutLen) > len(c.out) {
			p.t.Fatalf("CDB %x: OutLen %d, expected %d, %d bytes of data", c.cdb, t.OutLen, t.Expected, len(c.out))
		}
		borrowed := bytes.Clone(c.out[:t.OutLen])
		t.Out, t.OutBorrowed = borrowed, true
		p.s.Execute(t)
		for i := range borrowed {
			borrowed[i] = 0xdb // borrowed data is gone when Execute returns
		}
		p.s.Kick()
		<-done
	case scsi.Ready:
		if t.InLen > t.Expected || t.InLen > 8*mib {
			p.t.Fatalf("CDB %x: InLen %d, expected %d", c.cdb, t.InLen, t.Expected)
		}
		t.In = make([]byte, t.InLen)
		if !c.noTry && p.s.TryExecute(t) {
			res.tried = true
		} else {
			p.s.Execute(t)
			p.s.Kick()
			<-done
		}
	}
	if len(done) != 0 {
		p.t.Fatalf("CDB %x: completed more than once", c.cdb)
	}
	p.s.Forget(t) // harmless after the end
	res.status, res.transfer = t.Status, t.Transfer
	if t.Status == cdb.Good {
		res.in = t.In[:min(t.Transfer, t.InLen)]
	}
	if t.Status == cdb.CheckCondition {
		var ok bool
		var descriptor bool
		if res.sense, descriptor, ok = cdb.ParseSense(t.Sense[:t.SenseLen]); !ok || descriptor {
			p.t.Fatalf("CDB %x: sense %x", c.cdb, t.Sense[:t.SenseLen])
		}
	} else if t.SenseLen != 0 {
		p.t.Fatalf("CDB %x: status %02x with sense", c.cdb, t.Status)
	}
	return res
}

// do runs a command on the rig's own nexus at LUN 0.
func (r *rig) do(c command) result {
	r.t.Helper()
	return r.on(r.n, 0).run(c)
}

func (r *rig) read(c []byte, expected int) result {
	r.t.Helper()
	return r.do(command{cdb: c, read: expected > 0, expected: uint32(expected)})
}

func (r *rig) write(c []byte, out []byte) result {
	r.t.Helper()
	return r.do(command{cdb: c, write: len(out) > 0, expected: uint32(len(out)), out: out})
}

// none runs a command without data.
func (r *rig) none(c ...byte) result {
	r.t.Helper()
	return r.do(command{cdb: c})
}

// code is sense as the standards write it: key/ASC/ASCQ.
type code [3]byte

func (res result) code() code { return code{res.sense.Key, res.sense.ASC, res.sense.ASCQ} }

func (r *rig) good(res result) result {
	r.t.Helper()
	if res.status != cdb.Good {
		r.t.Fatalf("status %02x, sense %x", res.status, res.code())
	}
	return res
}

func (r *rig) refused(res result, want code) result {
	r.t.Helper()
	if res.status != cdb.CheckCondition || res.code() != want {
		r.t.Fatalf("status %02x sense %x, want CHECK CONDITION %x", res.status, res.code(), want)
	}
	return res
}

// rw10 and rw16 make CDBs of READ's form.
func rw10(op byte, flags byte, lba uint32, blocks uint16) []byte {
	return []byte{op, flags, byte(lba >> 24), byte(lba >> 16), byte(lba >> 8), byte(lba), 0, byte(blocks >> 8), byte(blocks), 0}
}

func rw12(op byte, flags byte, lba, blocks uint32) []byte {
	return []byte{op, flags, byte(lba >> 24), byte(lba >> 16), byte(lba >> 8), byte(lba),
		byte(blocks >> 24), byte(blocks >> 16), byte(blocks >> 8), byte(blocks), 0, 0}
}

func rw16(op byte, flags byte, lba uint64, blocks uint32) []byte {
	return []byte{op, flags, byte(lba >> 56), byte(lba >> 48), byte(lba >> 40), byte(lba >> 32),
		byte(lba >> 24), byte(lba >> 16), byte(lba >> 8), byte(lba),
		byte(blocks >> 24), byte(blocks >> 16), byte(blocks >> 8), byte(blocks), 0, 0}
}

func caw(flags byte, lba uint64, blocks byte) []byte {
	c := rw16(cdb.CompareAndWrite, flags, lba, 0)
	c[13] = blocks
	return c
}

func unmapCDB(n int) []byte {
	return []byte{cdb.Unmap, 0, 0, 0, 0, 0, 0, byte(n >> 8), byte(n), 0}
}

// pattern is n bytes that depend on seed and place.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed ^ byte(i) ^ byte(i>>8)*7 | 1
	}
	return b
}

var (
	badOpcode  = code{5, 0x20, 0}
	badLBA     = code{5, 0x21, 0}
	badField   = code{5, 0x24, 0}
	badLUN     = code{5, 0x25, 0}
	badParam   = code{5, 0x26, 0}
	badListLen = code{5, 0x1a, 0}
	badUnit    = code{5, 0x0e, 3}
	readOnly   = code{7, 0x27, 0}
	miscompare = code{0xe, 0x1d, 0}
)
