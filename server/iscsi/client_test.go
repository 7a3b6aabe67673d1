package iscsi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testTarget    = "iqn.2026-01.com.github.twinsan:test"
	testInitiator = "iqn.2026-01.org.example:host"
	patience      = 10 * time.Second
)

// testDirectory admits whom its maps name; open admits all.
type testDirectory struct {
	mu        sync.Mutex
	open      bool
	access    map[string]Access
	discovery map[string]Access
	portals   []Portal
	redirect  string
}

func (d *testDirectory) Access(i string) (Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, ok := d.access[i]
	return a, ok || d.open
}

func (d *testDirectory) Discovery(i string) (Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, ok := d.discovery[i]
	return a, ok || d.open
}

func (d *testDirectory) Portals(string) []Portal {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.portals
}

func (d *testDirectory) Redirect(string) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.redirect, d.redirect != ""
}

// fakeClock is a clock that tests move.
type fakeClock struct {
	mu  sync.Mutex
	now time.Time
}

func newFakeClock() *fakeClock { return &fakeClock{now: time.Unix(1e9, 0)} }

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// bench is a target with its parts.
type bench struct {
	*Target
	device *memoryDevice
	dir    *testDirectory
	addr   string
}

// newBench starts a target. Change may adapt its configuration.
func newBench(tb testing.TB, change func(*Config)) *bench {
	tb.Helper()
	d := newMemoryDevice(64 << 10)
	dir := &testDirectory{open: true, portals: []Portal{{"192.0.2.1:3260", 1}, {"[2001:db8::2]:3260", 2}}}
	cfg := Config{TargetName: testTarget, PortGroup: 1, Listen: []string{"127.0.0.1:0"}, Device: d, Directory: dir}
	if change != nil {
		change(&cfg)
	}
	target, err := New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	d.target = target
	if err := target.Start(context.Background()); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		d.gate(false)
		target.Close()
		if n := target.Stats().BuffersInUse; n != 0 {
			tb.Errorf("%d bytes of buffers not returned", n)
		}
		if n := len(d.state); n != 0 {
			tb.Errorf("%d tasks left with the device server", n)
		}
		if n := len(d.nexuses); n != 0 {
			tb.Errorf("%d nexuses left with the device server", n)
		}
	})
	return &bench{target, d, dir, target.Addrs()[0].String()}
}

// client is a raw initiator.
type client struct {
	tb     testing.TB
	conn   net.Conn
	layout pdu.Layout
	cmdSN  uint32
	itt    uint32
	isid   [6]byte
	tsih   uint16
	cid    uint16
	keys   map[string]string // what the target said
	last   pdu.Numbers
}

// reply is a PDU from the target.
type reply struct {
	pdu.Header
	data []byte
}

func dial(tb testing.TB, b *bench) *client {
	tb.Helper()
	conn, err := net.Dial("tcp", b.addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		tb.Fatal(err)
	}
	return &client{tb: tb, conn: conn, cmdSN: 100, itt: 1, isid: [6]byte{0x80, 1, 2, 3, 4, 5}, keys: map[string]string{}}
}

// encode builds a PDU with this layout.
func encode(l pdu.Layout, h *pdu.Header, ahs, data []byte) []byte {
	h[4] = byte(len(ahs) / 4)
	h.SetDataLen(len(data))
	out := append(append([]byte(nil), h[:]...), ahs...)
	if l.HeaderDigest {
		out = pdu.AppendDigest(out, pdu.Digest(out))
	}
	out = append(out, data...)
	out = append(out, make([]byte, pdu.Pad(len(data)))...)
	if l.DataDigest && len(data) > 0 {
		out = pdu.AppendDigest(out, pdu.DataDigest(data))
	}
	return out
}

func (c *client) write(b []byte) {
	c.tb.Helper()
	if _, err := c.conn.Write(b); err != nil {
		c.tb.Fatal(err)
	}
}

func (c *client) send(h *pdu.Header, data []byte) {
	c.tb.Helper()
	c.write(encode(c.layout, h, nil, data))
}

// receive reads one PDU; it checks digests and that the command window never
// goes back.
func (c *client) receive() (*reply, error) {
	var r reply
	if _, err := io.ReadFull(c.conn, r.Header[:]); err != nil {
		return nil, err
	}
	rest := make([]byte, c.layout.Size(&r.Header)-pdu.HeaderLen)
	if _, err := io.ReadFull(c.conn, rest); err != nil {
		return nil, err
	}
	at := 0
	if c.layout.HeaderDigest {
		if pdu.GetDigest(rest) != pdu.Digest(r.Header[:]) {
			return nil, errors.New("header digest of the target is wrong")
		}
		at = 4
	}
	r.data = rest[at : at+r.DataLen()]
	if c.layout.DataDigest && r.DataLen() > 0 {
		if pdu.GetDigest(rest[len(rest)-4:]) != pdu.DataDigest(r.data) {
			return nil, errors.New("data digest of the target is wrong")
		}
	}
	exp, limit := r.ExpCmdSN(), r.MaxCmdSN()
	if pdu.SerialLess(exp, c.last.ExpCmdSN) && c.last.ExpCmdSN != 0 || pdu.SerialLess(limit, c.last.MaxCmdSN) && c.last.MaxCmdSN != 0 {
		return nil, errors.New("the command window went back")
	}
	c.last.ExpCmdSN, c.last.MaxCmdSN = exp, limit
	return &r, nil
}

// expect reads a PDU of a type.
func (c *client) expect(op pdu.Opcode) *reply {
	c.tb.Helper()
	r, err := c.receive()
	if err != nil {
		c.tb.Fatalf("waiting for opcode %#x: %v", op, err)
	}
	if r.Opcode() != op {
		c.tb.Fatalf("got opcode %#x (% x), want %#x", r.Opcode(), r.Header[:], op)
	}
	return r
}

// expectClosed reads until the target has closed the connection.
func (c *client) expectClosed() {
	c.tb.Helper()
	for {
		r, err := c.receive()
		if err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				c.tb.Fatal("the target did not close the connection")
			}
			_ = c.conn.Close()
			return
		}
		if r.Opcode() == pdu.OpAsync {
			continue
		}
		c.tb.Fatalf("got opcode %#x, want the end", r.Opcode())
	}
}

// quiet proves that the target answers nothing to what was sent before: a ping
// is answered first.
func (c *client) quiet() {
	c.tb.Helper()
	itt := c.ping(nil)
	if r := c.expect(pdu.OpNopIn); r.ITT() != itt {
		c.tb.Fatalf("ping answer with tag %d, want %d", r.ITT(), itt)
	}
}

// ping sends an immediate NOP-Out.
func (c *client) ping(data []byte) uint32 {
	c.tb.Helper()
	c.itt++
	var h pdu.Header
	p := pdu.NopOut{Immediate: true, ITT: c.itt, TTT: pdu.NoTag, CmdSN: c.cmdSN}
	p.Encode(&h)
	c.send(&h, data)
	return c.itt
}

func text(pairs ...string) []byte {
	var b []byte
	for _, p := range pairs {
		b = append(append(b, p...), 0)
	}
	return b
}

// step makes one login exchange.
func (c *client) step(csg, nsg uint8, transit bool, pairs ...string) pdu.LoginResponse {
	c.tb.Helper()
	p := pdu.LoginRequest{Transit: transit, CSG: csg, NSG: nsg, ISID: c.isid, TSIH: c.tsih, CID: c.cid, ITT: 7, CmdSN: c.cmdSN}
	if !transit {
		p.NSG = 0
	}
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, text(pairs...))
	return c.loginResponse()
}

func (c *client) loginResponse() pdu.LoginResponse {
	c.tb.Helper()
	r := c.expect(pdu.OpLoginResponse)
	var p pdu.LoginResponse
	p.Decode(&r.Header)
	got, err := pdu.ParseText(r.data, 100)
	if err != nil {
		c.tb.Fatal(err)
	}
	for _, g := range got {
		c.keys[g.Key] = g.Value
	}
	return p
}

var fullOffer = []string{
	"InitialR2T=No", "ImmediateData=Yes", "MaxRecvDataSegmentLength=262144", "MaxBurstLength=1048576",
	"FirstBurstLength=262144", "MaxOutstandingR2T=8", "DefaultTime2Wait=2", "DefaultTime2Retain=20",
	"ErrorRecoveryLevel=0", "MaxConnections=1", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes",
}

// login goes to full feature phase without authentication. Pairs take the place
// of fullOffer's of the same key.
func (c *client) login(pairs ...string) *client {
	c.tb.Helper()
	offer := []string{"InitiatorName=" + testInitiator, "TargetName=" + testTarget, "SessionType=Normal"}
	have := func(list []string, p string) bool {
		key, _, _ := strings.Cut(p, "=")
		for _, o := range list {
			if strings.HasPrefix(o, key+"=") {
				return true
			}
		}
		return false
	}
	var base []string
	for _, p := range append(offer, fullOffer...) {
		if !have(pairs, p) {
			base = append(base, p)
		}
	}
	p := c.step(pdu.StageOperational, pdu.StageFull, true, append(base, pairs...)...)
	if p.Status != 0 || !p.Transit || p.NSG != pdu.StageFull || p.TSIH == 0 {
		c.tb.Fatalf("login: %+v", p)
	}
	c.tsih = p.TSIH
	c.layout = pdu.Layout{HeaderDigest: c.keys["HeaderDigest"] == "CRC32C", DataDigest: c.keys["DataDigest"] == "CRC32C"}
	return c
}

// command sends a SCSI command with the next numbers and returns its tag.
func (c *client) command(p pdu.SCSICommand, data []byte) uint32 {
	c.tb.Helper()
	c.itt++
	p.ITT = c.itt
	p.CmdSN = c.cmdSN
	if !p.Immediate {
		c.cmdSN++
	}
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, data)
	return c.itt
}

func read10(lba, blocks int) (cdb [16]byte) {
	cdb[0], cdb[2], cdb[3], cdb[4], cdb[5], cdb[7], cdb[8] = 0x28, byte(lba>>24), byte(lba>>16), byte(lba>>8), byte(lba), byte(blocks>>8), byte(blocks)
	return cdb
}

func write10(lba, blocks int) (cdb [16]byte) {
	cdb = read10(lba, blocks)
	cdb[0] = 0x2a
	return cdb
}

// read reads blocks and returns data and final PDU's flags as a SCSI response.
func (c *client) read(lba, blocks int, expected uint32) ([]byte, pdu.SCSIResponse) {
	c.tb.Helper()
	itt := c.command(pdu.SCSICommand{Final: true, Read: true, Expected: expected, CDB: read10(lba, blocks)}, nil)
	return c.collect(itt)
}

// collect gathers Data-In PDUs up to the status.
func (c *client) collect(itt uint32) ([]byte, pdu.SCSIResponse) {
	c.tb.Helper()
	var data []byte
	for n := uint32(0); ; n++ {
		r, err := c.receive()
		if err != nil {
			c.tb.Fatal(err)
		}
		if r.ITT() != itt {
			c.tb.Fatalf("answer for tag %d, want %d", r.ITT(), itt)
		}
		switch r.Opcode() {
		case pdu.OpSCSIResponse:
			var p pdu.SCSIResponse
			p.Decode(&r.Header)
			if len(r.data) > 0 && data == nil {
				data = r.data
			}
			return data, p
		case pdu.OpDataIn:
			var p pdu.DataIn
			p.Decode(&r.Header)
			if p.DataSN != n || p.Offset != uint32(len(data)) {
				c.tb.Fatalf("Data-In %d at %d has DataSN %d, offset %d", n, len(data), p.DataSN, p.Offset)
			}
			data = append(data, r.data...)
			if p.HasStatus {
				return data, pdu.SCSIResponse{Status: p.Status, Overflow: p.Overflow, Underflow: p.Underflow, Residual: p.Residual, ITT: p.ITT, Numbers: p.Numbers}
			}
		default:
			c.tb.Fatalf("got opcode %#x in a read", r.Opcode())
		}
	}
}

// response reads a SCSI Response for a task.
func (c *client) response(itt uint32) (pdu.SCSIResponse, []byte) {
	c.tb.Helper()
	r := c.expect(pdu.OpSCSIResponse)
	var p pdu.SCSIResponse
	p.Decode(&r.Header)
	if p.ITT != itt {
		c.tb.Fatalf("response for tag %d, want %d", p.ITT, itt)
	}
	return p, r.data
}

// sense returns key, ASC and ASCQ of a response's data.
func sense(data []byte) [3]byte {
	if len(data) < 16 {
		return [3]byte{}
	}
	return [3]byte{data[2+2] & 0xf, data[2+12], data[2+13]}
}

// dataOut sends a Data-Out.
func (c *client) dataOut(p pdu.DataOut, data []byte) {
	c.tb.Helper()
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, data)
}

// r2t reads an R2T.
func (c *client) r2t(itt uint32) pdu.R2T {
	c.tb.Helper()
	r := c.expect(pdu.OpR2T)
	var p pdu.R2T
	p.Decode(&r.Header)
	if p.ITT != itt {
		c.tb.Fatalf("R2T for tag %d, want %d", p.ITT, itt)
	}
	return p
}

// answerR2T sends the data that an R2T asks for in PDUs of at most seg bytes.
func (c *client) answerR2T(p pdu.R2T, data []byte, seg int) {
	c.tb.Helper()
	sn := uint32(0)
	for off := 0; off < int(p.Length); off += seg {
		n := min(seg, int(p.Length)-off)
		at := int(p.Offset) + off
		c.dataOut(pdu.DataOut{Final: off+n == int(p.Length), LUN: p.LUN, ITT: p.ITT, TTT: p.TTT, DataSN: sn, Offset: uint32(at)}, data[at:at+n])
		sn++
	}
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>9) ^ byte(i) ^ seed
	}
	return b
}

// eventually waits for a condition.
func eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline:
			tb.Fatalf("waiting in vain: %s", what)
		case <-tick.C:
		}
	}
}

func equal(tb testing.TB, got, want []byte) {
	tb.Helper()
	if !bytes.Equal(got, want) {
		tb.Fatalf("data differ: got %d bytes, want %d", len(got), len(want))
	}
}

// dialFrom connects from one of the loopback addresses.
func dialFrom(source, addr string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	return d.Dial("tcp", addr)
}
