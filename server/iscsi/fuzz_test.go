package iscsi

import (
	"bytes"
	"encoding/binary"
	"net"
	"runtime/metrics"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
	"github.com/twinsan/twinsan/server/scsi"
)

// fuzzLimits keep what a run may hold small, so that the bound on it means something.
var fuzzLimits = Limits{Window: 16, Buffers: 8 << 20}

// newWireless makes a connection in full feature phase without a socket: PDUs are
// put into its receive buffer, and what it answers stays in its output.
func newWireless(tb testing.TB, p parameters, layout pdu.Layout) (*connection, *memoryDevice) {
	d := newMemoryDevice(128) // so that no transfer is longer than 64 KiB
	t, err := New(Config{
		TargetName: testTarget, PortGroup: 1, Listen: []string{"127.0.0.1:0"}, Device: d,
		Directory: &testDirectory{open: true}, Limits: fuzzLimits,
	})
	if err != nil {
		tb.Fatal(err)
	}
	d.target = t
	c := &connection{
		target: t, out: &batch{}, spare: &batch{}, session: &session{nexus: &scsi.Nexus{}},
		params: p, layout: layout, window: newWindow(1, fuzzLimits.Window), statSN: 0xfffffff0,
		in: make([]byte, inputLen), full: true, busy: true,
		writing: true, // so that nothing is written
	}
	c.changed.L = &c.mu
	return c, d
}

// feed processes one whole PDU.
func (c *connection) feed(b []byte) error {
	c.r, c.w, c.checked = 0, copy(c.in, b), false
	missing, err := c.next()
	if err == nil && missing > 0 {
		panic("a whole PDU is not enough")
	}
	return err
}

// answers takes the PDUs out of the output. The fuzzed commands read nothing
// long, so all stand in one piece.
func (c *connection) answers(tb testing.TB) []reply {
	var all []reply
	for b := c.out.buf; len(b) > 0; {
		r := reply{Header: pdu.Header(b)}
		size := c.layout.Size(&r.Header)
		if size > len(b) {
			tb.Fatalf("answer of %d bytes in %d: % x", size, len(b), r.Header[:])
		}
		if c.layout.HeaderDigest && pdu.GetDigest(b[pdu.HeaderLen:]) != pdu.Digest(r.Header[:]) {
			tb.Fatal("header digest of an answer is wrong")
		}
		start := c.layout.DataStart(&r.Header)
		r.data = bytes.Clone(b[start : start+r.DataLen()])
		all = append(all, r)
		b = b[size:]
	}
	c.out.empty()
	return all
}

// end ends all tasks as the end of a connection does, and proves that nothing is left.
func (c *connection) end(tb testing.TB, d *memoryDevice) {
	c.mu.Lock()
	c.closed = true
	c.endParkedLocked(func(*task) bool { return true })
	tasks, active := c.tasks, c.active
	c.dropOutputLocked() // long reads wait in it, in buffers of their own
	c.mu.Unlock()
	if tasks != 0 || active != 0 || len(c.managements) != 0 || len(d.state) != 0 || c.target.buffers.inUse() != 0 || c.solicited != 0 {
		tb.Fatalf("left: %d tasks, %d active, %d functions, %d with the device server, %d bytes, %d R2Ts",
			tasks, active, len(c.managements), len(d.state), c.target.buffers.inUse(), c.solicited)
	}
}

// allocated is the number of bytes that the process has allocated so far.
func heapAllocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// FuzzPDUs sends any PDUs, with additional header segments and digests, to a
// connection in full feature phase. Whatever comes: numbers never go back, what
// is allocated is bounded by what was sent, and nothing is left at the end.
//
// A record is: flags, words of AHS, length of data (2), header (48), AHS, data.
// Flags: 01 keep the command number, 02 wrong header digest, 04 wrong data digest.
func FuzzPDUs(f *testing.F) {
	record := func(flags byte, p interface{ Encode(*pdu.Header) }, ahs, data []byte) []byte {
		var h pdu.Header
		p.Encode(&h)
		b := append([]byte{flags, byte(len(ahs) / 4), byte(len(data) >> 8), byte(len(data))}, h[:]...)
		return append(append(b, ahs...), data...)
	}
	write := pdu.SCSICommand{Final: true, Write: true, ITT: 1, Expected: 1024, CDB: write10(0, 2)}
	f.Add(slices.Concat(
		record(0, &write, nil, make([]byte, 512)),
		record(0, &pdu.DataOut{Final: true, ITT: 1, TTT: 1, Offset: 512}, nil, make([]byte, 512))), byte(3))
	f.Add(record(0, &pdu.SCSICommand{Final: true, ITT: 2}, []byte{0, 5, 1, 0, 1, 2, 3, 4, 0, 5, 2, 0, 0, 0, 2, 0}, nil), byte(0))
	f.Add(record(0, &pdu.SCSICommand{Final: true, ITT: 2}, []byte{0xff, 0xff, 1, 0}, nil), byte(1))
	f.Add(slices.Concat(
		record(1, &pdu.SCSICommand{Final: true, ITT: 3, CmdSN: 3}, nil, nil),
		record(0, &pdu.TaskRequest{Immediate: true, Function: 1, ITT: 4, RefTag: 3, RefCmdSN: 3, CmdSN: 9}, nil, nil),
		record(4, &pdu.TextRequest{Final: true, ITT: 5, TTT: pdu.NoTag}, nil, []byte("SendTargets=All\x00"))), byte(2))
	f.Add(slices.Concat(
		record(0, &pdu.SCSICommand{Write: true, ITT: 6, Expected: 4096, CDB: write10(0, 8)}, nil, nil),
		record(0, &pdu.TaskRequest{Immediate: true, Function: 5, ITT: 7}, nil, nil),
		record(0, &pdu.Logout{Immediate: true, ITT: 8}, nil, nil)), byte(0))
	f.Fuzz(func(t *testing.T, in []byte, digests byte) {
		p := defaultParameters()
		p.initialR2T = digests&4 != 0
		c, d := newWireless(t, p, pdu.Layout{HeaderDigest: digests&1 != 0, DataDigest: digests&2 != 0})
		before, size := heapAllocated(), len(in)
		exp, limit, stat := c.window.exp, c.window.max, c.statSN
		var err error
		for len(in) >= 4+pdu.HeaderLen && err == nil {
			flags, words, n := in[0], int(in[1]), int(binary.BigEndian.Uint16(in[2:]))
			h := pdu.Header(in[4:])
			in = in[4+pdu.HeaderLen:]
			ahs := in[:min(4*words, len(in)&^3)]
			in = in[len(ahs):]
			data := in[:min(n, len(in))]
			in = in[len(data):]
			if flags&1 == 0 {
				binary.BigEndian.PutUint32(h[24:], c.window.exp)
			}
			raw := encode(c.layout, &h, ahs, data)
			if flags&2 != 0 && c.layout.HeaderDigest {
				raw[pdu.HeaderLen+len(ahs)] ^= 1
			}
			if flags&4 != 0 && c.layout.DataDigest && len(data) > 0 {
				raw[len(raw)-1] ^= 1
			}
			err = c.feed(raw)
			if pdu.SerialLess(c.window.exp, exp) || pdu.SerialLess(c.window.max, limit) || pdu.SerialLess(c.statSN, stat) ||
				c.window.max+1-c.window.exp > uint32(fuzzLimits.Window) {
				t.Fatalf("numbers went from %d, %d, %d to %d, %d, %d", exp, limit, stat, c.window.exp, c.window.max, c.statSN)
			}
			exp, limit, stat = c.window.exp, c.window.max, c.statSN
			if c.heldBytes > maxHeldBytes || c.immediates > c.target.limits.Immediate || len(c.text) > c.target.limits.NegotiationText {
				t.Fatalf("%d bytes held, %d immediate commands, %d bytes of text", c.heldBytes, c.immediates, len(c.text))
			}
		}
		if grown := heapAllocated() - before; grown > 8<<20+256*uint64(size) {
			t.Fatalf("%d bytes of input made us allocate %d", size, grown)
		}
		c.end(t, d)
	})
}

// FuzzDataOut sends writes whose Data-Out sequences are right but for what the
// input changes in them. Whatever is changed: a write that ends well has put
// exactly its own data in their place, one that does not has put nothing there.
//
// A command takes four bytes: LBA, blocks, immediate blocks, flags; then one
// byte for each Data-Out says what to change in it.
func FuzzDataOut(f *testing.F) {
	f.Add([]byte{0, 8, 1, 0, 0, 0, 0, 0, 0, 0}, byte(0))
	f.Add([]byte{3, 64, 0, 1, 0, 1, 0, 0}, byte(3))
	f.Add([]byte{3, 64, 2, 0, 2, 9, 4, 10, 64, 2, 0, 0, 5}, byte(2))
	f.Add([]byte{0, 16, 0, 0, 6, 0, 16, 0, 0, 7, 0, 16, 0, 0, 8}, byte(1))
	f.Fuzz(func(t *testing.T, in []byte, digests byte) {
		p := defaultParameters()
		p.initialR2T, p.maxBurst, p.firstBurst, p.maxR2T = digests&4 != 0, 8192, 4096, 2
		c, d := newWireless(t, p, pdu.Layout{HeaderDigest: digests&1 != 0, DataDigest: digests&2 != 0})
		shadow := bytes.Clone(d.data)
		pop := func() (b byte) {
			if len(in) > 0 {
				b, in = in[0], in[1:]
			}
			return b
		}
		itt := uint32(0)
		var err error
		for len(in) >= 4 && err == nil {
			lba, blocks, immediate, flags := int(pop())%64, 1+int(pop())%64, int(pop())%9, pop()
			itt++
			data := pattern(blocks*testBlock, byte(itt))
			first := min(immediate*testBlock, len(data), int(p.firstBurst))
			more := flags&1 == 0 && !p.initialR2T && first < min(len(data), int(p.firstBurst))
			var h pdu.Header
			(&pdu.SCSICommand{Final: !more, Write: true, ITT: itt, Expected: uint32(len(data)), CmdSN: c.window.exp, CDB: write10(lba, blocks)}).Encode(&h)
			err = c.feed(encode(c.layout, &h, nil, data[:first]))
			send := func(ttt uint32, from, to int) {
				for sn := uint32(0); from < to && err == nil; sn++ {
					n := min(to-from, 1024)
					part := data[from : from+n]
					out := pdu.DataOut{Final: from+n == to, ITT: itt, TTT: ttt, DataSN: sn, Offset: uint32(from)}
					bad := false
					switch pop() {
					case 1:
						out.DataSN++
					case 2:
						out.Offset += testBlock
					case 3:
						out.TTT ^= 1
					case 4:
						out.Final = !out.Final
					case 5:
						part = part[:n-1]
					case 6:
						part = append(bytes.Clone(part), part...)
					case 7:
						out.LUN ^= 1 << 48
					case 8:
						out.ITT++
					case 9:
						bad = true
					case 10:
						out.Offset -= testBlock
					case 11:
						part = nil
					}
					out.Encode(&h)
					raw := encode(c.layout, &h, nil, part)
					if bad && c.layout.DataDigest && len(part) > 0 {
						raw[len(raw)-1] ^= 0x80
					}
					err = c.feed(raw)
					from += n
				}
			}
			if more {
				send(pdu.NoTag, first, min(len(data), int(p.firstBurst)))
			}
			for again := true; again; {
				again = false
				for _, r := range c.answers(t) {
					switch {
					case r.Opcode() == pdu.OpR2T:
						var ask pdu.R2T
						ask.Decode(&r.Header)
						if ask.ITT == itt && int(ask.Offset+ask.Length) <= len(data) && ask.Length <= p.maxBurst {
							send(ask.TTT, int(ask.Offset), int(ask.Offset+ask.Length))
						} else {
							t.Fatalf("%+v", ask)
						}
						again = true
					case r.Opcode() == pdu.OpSCSIResponse && r.ITT() == itt && r.Header[3] == statusGood:
						copy(shadow[lba*testBlock:], data)
					}
				}
			}
			if !bytes.Equal(d.data, shadow) {
				t.Fatal("the medium is not what the responses say")
			}
			if c.tasks > fuzzLimits.Window-1 {
				break // left behind by lost data
			}
		}
		c.end(t, d)
		if !bytes.Equal(d.data, shadow) {
			t.Fatal("written at the end of the connection")
		}
	})
}

// FuzzLoginSequence sends login requests to a target that serves a session of
// an initiator that has to prove itself. Nobody who cannot gets in, and the
// session that is there stays as it is.
//
// A record is: the first 24 bytes of a header, length of text (2), text.
func FuzzLoginSequence(f *testing.F) {
	b := newBench(f, func(c *Config) {
		c.Limits.FailedLoginDelay = time.Nanosecond
		c.Limits.PingAfter = time.Hour // the victim reads nothing meanwhile
	})
	victim := dial(f, b).login()
	victim.quiet() // its login is counted
	b.dir.mu.Lock()
	b.dir.open = false
	secret := map[string]Access{testInitiator: {User: "user", Secret: userSecret}}
	b.dir.access, b.dir.discovery = secret, secret
	b.dir.mu.Unlock()
	before := b.Sessions()[0].TSIH
	record := func(p pdu.LoginRequest, text []byte) []byte {
		var h pdu.Header
		p.ISID, p.ITT = victim.isid, 7
		p.Encode(&h)
		return append(append(bytes.Clone(h[:24]), byte(len(text)>>8), byte(len(text))), text...)
	}
	f.Add(record(pdu.LoginRequest{Transit: true, CSG: 1, NSG: 3}, text(who...)))
	f.Add(record(pdu.LoginRequest{Transit: true, CSG: 1, NSG: 3, TSIH: before}, text(who...)))
	f.Add(slices.Concat(
		record(pdu.LoginRequest{}, text(with(who, "AuthMethod=CHAP")...)),
		record(pdu.LoginRequest{}, text("CHAP_A=5")),
		record(pdu.LoginRequest{Transit: true, NSG: 1}, text("CHAP_N=user", "CHAP_R=0x00"))))
	f.Add(slices.Concat(
		record(pdu.LoginRequest{Continue: true}, []byte("InitiatorName=")),
		record(pdu.LoginRequest{Transit: true, NSG: 3}, append([]byte(testInitiator+"\x00"), text("SessionType=Discovery", "AuthMethod=None")...))))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		var out []byte
		for len(in) >= 26 {
			var h pdu.Header
			copy(h[:24], in)
			n := min(int(binary.BigEndian.Uint16(in[24:])), len(in)-26)
			keep := h[4:8]
			ahs, long := keep[0], keep[1]
			raw := encode(pdu.Layout{}, &h, nil, in[26:26+n])
			raw[4], raw[5] = ahs, long // lengths that are not those of what follows
			out = append(out, raw...)
			in = in[26+n:]
		}
		_, _ = c.Write(out)
		_ = c.(*net.TCPConn).CloseWrite()
		reader := client{tb: t, conn: c}
		for {
			r, err := reader.receive()
			if err != nil {
				break
			}
			if r.Opcode() != pdu.OpLoginResponse || r.Final() && r.Header[1]&3 == pdu.StageFull && r.Header[36] == 0 {
				t.Fatalf("let in: % x", r.Header[:])
			}
		}
		s := b.Sessions()
		if len(s) != 1 || s[0].TSIH != before || s[0].Peer == "" {
			t.Fatalf("the session table has changed: %+v", s)
		}
		if st := b.Stats(); st.Logins[statusSuccess] != 1 {
			t.Fatalf("%+v", st)
		}
	})
}
