package iscsi

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// TestReadWrite moves data of many sizes both ways, with and without digests,
// small segments and the slow path of reads.
func TestReadWrite(t *testing.T) {
	for _, digests := range []bool{false, true} {
		for _, cached := range []bool{false, true} {
			for _, segment := range []int{1024, 262144} {
				t.Run(fmt.Sprintf("digests=%v cached=%v segment=%d", digests, cached, segment), func(t *testing.T) {
					b := newBench(t, nil)
					b.device.cached = cached
					keys := []string{fmt.Sprintf("MaxRecvDataSegmentLength=%d", segment), "MaxBurstLength=65536"}
					if digests {
						keys = append(keys, "HeaderDigest=CRC32C", "DataDigest=CRC32C,None")
					}
					c := dial(t, b).login(keys...)
					for i, blocks := range []int{1, 7, 8, 128, 129, 512, 700, 2048} {
						data := pattern(blocks*testBlock, byte(i))
						c.writeAll(i*4096, data, 8192+4)
						got, p := c.read(i*4096, blocks, uint32(len(data)))
						equal(t, got, data)
						if p.Status != 0 || p.Overflow || p.Underflow || p.Residual != 0 {
							t.Errorf("%d blocks: %+v", blocks, p)
						}
					}
				})
			}
		}
	}
}

// writeAll writes as an initiator would: as much as it may unasked, the rest
// after R2Ts.
func (c *client) writeAll(lba int, data []byte, seg int) {
	c.tb.Helper()
	first := 65536
	immediate := min(len(data), first, 4096+12)
	if len(data) <= 65536 {
		immediate = len(data)
	}
	unsolicited := min(len(data), first)
	itt := c.command(pdu.SCSICommand{
		Final: immediate == unsolicited, Write: true, Expected: uint32(len(data)), CDB: write10(lba, len(data)/testBlock),
	}, data[:immediate])
	sn := uint32(0)
	for off := immediate; off < unsolicited; sn++ {
		n := min(seg, unsolicited-off)
		c.dataOut(pdu.DataOut{Final: off+n == unsolicited, ITT: itt, TTT: pdu.NoTag, DataSN: sn, Offset: uint32(off)}, data[off:off+n])
		off += n
	}
	for done := unsolicited; done < len(data); {
		r := c.r2t(itt)
		if int(r.Offset) != done {
			c.tb.Fatalf("R2T for offset %d, want %d", r.Offset, done)
		}
		c.answerR2T(r, data, seg)
		done += int(r.Length)
	}
	if p, _ := c.response(itt); p.Status != 0 || p.Residual != 0 {
		c.tb.Fatalf("write: %+v", p)
	}
}

// TestResiduals has expected length below, at and above what the CDB asks for.
func TestResiduals(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	disk := pattern(8*testBlock, 3)
	c.writeAll(0, disk, 4096)
	for _, tt := range []struct {
		expected    uint32
		over, under bool
		residual    uint32
	}{{1024, true, false, 1024}, {2048, false, false, 0}, {4096, false, true, 2048}, {100, true, false, 1948}} {
		got, p := c.read(0, 4, tt.expected)
		equal(t, got, disk[:min(int(tt.expected), 2048)])
		if p.Status != 0 || p.Overflow != tt.over || p.Underflow != tt.under || p.Residual != tt.residual {
			t.Errorf("read of 2048, expected %d: %+v", tt.expected, p)
		}
		itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: tt.expected, CDB: write10(16, 4)}, make([]byte, tt.expected))
		p, data := c.response(itt)
		wantStatus := byte(0)
		if tt.expected%testBlock != 0 { // half a block is not written
			wantStatus = statusCheckCondition
			if p.Status == wantStatus && sense(data) != [3]byte{5, 0x0e, 3} {
				t.Errorf("sense % x", data)
			}
		}
		if p.Status != wantStatus || p.Overflow != tt.over || p.Underflow != tt.under || p.Residual != tt.residual {
			t.Errorf("write of 2048, expected %d: %+v", tt.expected, p)
		}
	}
	// Directions that the CDB does not have.
	itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: read10(0, 1)}, make([]byte, 512))
	if p, _ := c.response(itt); p.Status != 0 || !p.Overflow || p.Residual != 512 {
		t.Errorf("READ with W: %+v", p)
	}
	itt = c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 512, CDB: write10(0, 1)}, nil)
	if p, _ := c.response(itt); p.Status != 0 || !p.Overflow || p.Residual != 512 {
		t.Errorf("WRITE with R: %+v", p)
	}
	itt = c.command(pdu.SCSICommand{Final: true, CDB: read10(0, 1)}, nil)
	if p, _ := c.response(itt); p.Status != 0 || !p.Overflow || p.Residual != 512 {
		t.Errorf("READ without R: %+v", p)
	}
	itt = c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 512, CDB: [16]byte{0}}, nil)
	if p, _ := c.response(itt); p.Status != 0 || !p.Underflow || p.Residual != 512 {
		t.Errorf("TEST UNIT READY with R: %+v", p)
	}
	itt = c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 512, CDB: read10(1<<20, 1)}, nil)
	if p, data := c.response(itt); p.Status != statusCheckCondition || sense(data) != [3]byte{5, 0x21, 0} || !p.Underflow || p.Residual != 512 {
		t.Errorf("READ beyond the end: %+v", p)
	}
	if p, data := c.response(c.command(pdu.SCSICommand{Final: true, Read: true, Write: true, Expected: 512, CDB: read10(0, 1)}, nil)); p.Status != statusCheckCondition || sense(data) != [3]byte{5, 0x20, 0} {
		t.Errorf("bidirectional: %+v", p)
	}
}

// TestDataInSequences checks F bits: no sequence is longer than MaxBurstLength.
func TestDataInSequences(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("MaxRecvDataSegmentLength=3072", "MaxBurstLength=8192")
	itt := c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 20480, CDB: read10(0, 40)}, nil)
	var lengths []int
	var finals []bool
	for off := 0; off < 20480; {
		r := c.expect(pdu.OpDataIn)
		if r.ITT() != itt {
			t.Fatal("tag")
		}
		lengths = append(lengths, r.DataLen())
		finals = append(finals, r.Final())
		off += r.DataLen()
		if last := off == 20480; (r.Header[1]&1 != 0) != last || !last && r.StatSN() != 0 {
			t.Errorf("at %d: status bit or StatSN", off)
		}
	}
	// Also when all of it would fit one PDU.
	c = dial(t, b).login("MaxBurstLength=512")
	itt = c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 2048, CDB: read10(0, 4)}, nil)
	for range 4 {
		if r := c.expect(pdu.OpDataIn); r.ITT() != itt || r.DataLen() != 512 || !r.Final() {
			t.Errorf("burst of 512: %d bytes, final %v", r.DataLen(), r.Final())
		}
	}
	if got, want := fmt.Sprint(lengths, finals), "[3072 3072 2048 3072 3072 2048 3072 1024] [false false true false false true false true]"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestDataInWords: inside a sequence every data segment is whole words.
func TestDataInWords(t *testing.T) {
	b := newBench(t, nil)
	for _, digests := range []string{"None", "CRC32C"} {
		c := dial(t, b).login("MaxRecvDataSegmentLength=1003", "MaxBurstLength=2047", "DataDigest="+digests)
		disk := pattern(8*testBlock, 3)
		b.device.mu.Lock()
		copy(b.device.data, disk)
		b.device.mu.Unlock()
		itt := c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 4096, CDB: read10(0, 8)}, nil)
		var got []byte
		for len(got) < 4096 {
			r := c.expect(pdu.OpDataIn)
			if r.ITT() != itt || !r.Final() && r.DataLen()%4 != 0 || r.DataLen() > 1003 {
				t.Errorf("at %d: %d bytes, final %v", len(got), r.DataLen(), r.Final())
			}
			got = append(got, r.data...)
		}
		equal(t, got, disk)
	}
}

// TestR2Ts checks number, length and numbering of R2Ts, with several outstanding.
func TestR2Ts(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("MaxBurstLength=4096", "FirstBurstLength=512", "MaxOutstandingR2T=3", "InitialR2T=Yes", "ImmediateData=No")
	data := pattern(10*4096+1024, 9)
	itt := c.command(pdu.SCSICommand{Final: true, Write: true, LUN: 0, Expected: uint32(len(data)), CDB: write10(8, len(data)/testBlock)}, nil)
	var open []pdu.R2T
	stat := uint32(0)
	for n := range 3 {
		r := c.r2t(itt)
		if int(r.R2TSN) != n || int(r.Offset) != n*4096 || r.Length != 4096 || r.TTT == pdu.NoTag {
			t.Errorf("R2T %d: %+v", n, r)
		}
		stat = r.StatSN
		open = append(open, r)
	}
	c.quiet() // no fourth
	for n := 3; len(open) > 0; n++ {
		c.answerR2T(open[0], data, 1000)
		open = open[1:]
		if n < 11 {
			r := c.r2t(itt)
			if int(r.R2TSN) != n || int(r.Offset) != n*4096 || int(r.Length) != min(4096, len(data)-n*4096) || r.StatSN != stat+1 {
				t.Errorf("R2T %d: %+v", n, r)
			}
			open = append(open, r)
		}
	}
	if p, _ := c.response(itt); p.Status != 0 || p.StatSN != stat+1 {
		t.Errorf("%+v", p) // the ping of quiet took one StatSN, the R2Ts none
	}
	got, _ := c.read(8, len(data)/testBlock, uint32(len(data)))
	equal(t, got, data)
}

// TestDataOutViolations: each ends the connection after a Reject, with nothing written.
func TestDataOutViolations(t *testing.T) {
	for name, change := range map[string]func(*pdu.DataOut, *int){
		"offset":      func(p *pdu.DataOut, _ *int) { p.Offset += 512 },
		"TTT":         func(p *pdu.DataOut, _ *int) { p.TTT++ },
		"LUN":         func(p *pdu.DataOut, _ *int) { p.LUN++ },
		"too long":    func(_ *pdu.DataOut, n *int) { *n += 512 },
		"short final": func(_ *pdu.DataOut, n *int) { *n -= 512 },
		"no final":    func(p *pdu.DataOut, _ *int) { p.Final = false },
	} {
		for _, size := range []int{4096, 131072} { // buffered whole, and too long for that
			b := newBench(t, nil)
			c := dial(t, b).login("ImmediateData=No", "InitialR2T=Yes")
			itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: uint32(size), CDB: write10(0, size/testBlock)}, nil)
			r := c.r2t(itt)
			p := pdu.DataOut{Final: true, ITT: itt, TTT: r.TTT}
			n := size
			change(&p, &n)
			c.dataOut(p, pattern(n, 1))
			reject := c.expect(pdu.OpReject)
			if reject.Header[2] != pdu.RejectProtocol || len(reject.data) != pdu.HeaderLen || pdu.Opcode(reject.data[0]&0x3f) != pdu.OpDataOut {
				t.Errorf("%s: reject % x", name, reject.Header[:4])
			}
			c.expectClosed()
			eventually(t, "forgotten", func() bool { return b.device.count().forgotten == 1 })
			if b.device.count().executed != 0 {
				t.Errorf("%s: executed", name)
			}
		}
	}
}

// TestDataOutNumbers: a number out of sequence stands for lost data. The task ends
// like one with a wrong digest, after the final PDU; nothing is written and the
// connection goes on.
func TestDataOutNumbers(t *testing.T) {
	for _, numbers := range [][4]uint32{{1, 2, 3, 4}, {0, 0, 1, 2}, {0, 1, 3, 2}, {3, 2, 1, 0}, {0, 1, 2, 0xffffffff}, {0, 2, 2, 3}} {
		for _, unsolicited := range []bool{false, true} {
			b := newBench(t, nil)
			c := dial(t, b).login("ImmediateData=No", "MaxOutstandingR2T=2", "MaxBurstLength=4096", "FirstBurstLength=4096")
			itt := c.command(pdu.SCSICommand{Final: !unsolicited, Write: true, Expected: 8192, CDB: write10(0, 16)}, nil)
			ttt := uint32(pdu.NoTag)
			var second pdu.R2T
			if !unsolicited {
				ttt = c.r2t(itt).TTT
				second = c.r2t(itt)
			}
			for i, sn := range numbers {
				c.dataOut(pdu.DataOut{Final: i == 3, ITT: itt, TTT: ttt, DataSN: sn, Offset: uint32(i * 1024)}, pattern(1024, 7))
			}
			if !unsolicited {
				c.quiet() // the response waits for the data of the other R2T
				c.answerR2T(second, pattern(8192, 7), 1024)
			}
			if p, data := c.response(itt); p.Status != statusCheckCondition || sense(data) != [3]byte{0xb, 0x47, 5} {
				t.Errorf("%v, unsolicited %v: %+v, sense %x", numbers, unsolicited, p, sense(data))
			}
			if got, p := c.read(0, 16, 8192); p.Status != 0 || !bytes.Equal(got, make([]byte, 8192)) {
				t.Errorf("%v, unsolicited %v: written, or %+v", numbers, unsolicited, p)
			}
			itt = c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 4096, CDB: write10(0, 8)}, nil)
			c.answerR2T(c.r2t(itt), pattern(4096, 1), 1024)
			if p, _ := c.response(itt); p.Status != 0 {
				t.Errorf("afterwards: %+v", p)
			}
		}
	}
}

// TestUnsolicited checks what comes unasked although it must not, too much of
// it, and too little.
func TestUnsolicited(t *testing.T) {
	for _, tt := range []struct {
		name string
		keys []string
		send func(c *client) uint32
		want [3]byte
	}{
		{"immediate data not negotiated", []string{"ImmediateData=No"}, func(c *client) uint32 {
			return c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: write10(0, 1)}, make([]byte, 512))
		}, [3]byte{0xb, 0x0c, 0x0c}},
		{"immediate data beyond first burst", []string{"FirstBurstLength=512"}, func(c *client) uint32 {
			return c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 1024, CDB: write10(0, 2)}, make([]byte, 1024))
		}, [3]byte{0xb, 0x0c, 0x0c}},
		{"unsolicited data with InitialR2T", []string{"InitialR2T=Yes"}, func(c *client) uint32 {
			itt := c.command(pdu.SCSICommand{Write: true, Expected: 1024, CDB: write10(0, 2)}, make([]byte, 512))
			c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag, Offset: 512}, make([]byte, 512))
			return itt
		}, [3]byte{0xb, 0x0c, 0x0c}},
		{"unsolicited data beyond first burst", []string{"FirstBurstLength=1024"}, func(c *client) uint32 {
			itt := c.command(pdu.SCSICommand{Write: true, Expected: 2048, CDB: write10(0, 4)}, make([]byte, 512))
			c.dataOut(pdu.DataOut{ITT: itt, TTT: pdu.NoTag, Offset: 512}, make([]byte, 1024))
			c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag, DataSN: 1, Offset: 1536}, make([]byte, 512))
			return itt
		}, [3]byte{0xb, 0x0c, 0x0c}},
		{"not enough", nil, func(c *client) uint32 {
			itt := c.command(pdu.SCSICommand{Write: true, Expected: 2048, CDB: write10(0, 4)}, make([]byte, 512))
			c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag, Offset: 512}, make([]byte, 512))
			return itt
		}, [3]byte{0xb, 0x0c, 0x0d}},
		{"refused command's data are swallowed", nil, func(c *client) uint32 {
			itt := c.command(pdu.SCSICommand{Write: true, LUN: 1, Expected: 1024, CDB: write10(0, 2)}, make([]byte, 512))
			c.quiet() // the response waits for the data
			c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag, Offset: 512}, make([]byte, 512))
			return itt
		}, [3]byte{5, 0x25, 0}},
		{"unexpected data beside an R2T", []string{"ImmediateData=No"}, func(c *client) uint32 {
			itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 1024, CDB: write10(0, 2)}, nil)
			r := c.r2t(itt)
			c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag}, make([]byte, 512))
			c.answerR2T(r, make([]byte, 1024), 1024)
			return itt
		}, [3]byte{0xb, 0x0c, 0x0c}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, nil)
			c := dial(t, b).login(tt.keys...)
			p, data := c.response(tt.send(c))
			if p.Status != statusCheckCondition || sense(data) != tt.want {
				t.Errorf("%+v, sense %x", p, sense(data))
			}
			if b.device.count().executed != 0 {
				t.Error("executed")
			}
			c.quiet() // the stream is in step
		})
	}
	// Surplus data of a write whose CDB asks for less are taken and dropped.
	b := newBench(t, nil)
	c := dial(t, b).login()
	data := pattern(2048, 5)
	itt := c.command(pdu.SCSICommand{Write: true, Expected: 2048, CDB: write10(0, 1)}, data[:256])
	c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag, Offset: 256}, data[256:])
	if p, _ := c.response(itt); p.Status != 0 || !p.Underflow || p.Residual != 1536 {
		t.Errorf("surplus: %+v", p)
	}
	got, _ := c.read(0, 2, 1024)
	equal(t, got, append(data[:512:512], make([]byte, 512)...))
}

// TestDataDigestErrors: the PDU is rejected, its task ends with 0B/47/05, the
// stream stays in step and the command number counts.
func TestDataDigestErrors(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("HeaderDigest=CRC32C", "DataDigest=CRC32C", "FirstBurstLength=4096", "ImmediateData=Yes")
	spoil := func(h *pdu.Header, data []byte) []byte {
		out := encode(c.layout, h, nil, data)
		out[len(out)-6] ^= 1
		return out
	}
	ends := func(itt uint32) {
		t.Helper()
		p, data := c.response(itt)
		if p.Status != statusCheckCondition || sense(data) != [3]byte{0xb, 0x47, 5} {
			t.Errorf("%+v, sense %x", p, sense(data))
		}
	}
	rejected := func(reason byte) {
		t.Helper()
		if r := c.expect(pdu.OpReject); r.Header[2] != reason {
			t.Errorf("reject reason %d, want %d", r.Header[2], reason)
		}
	}
	c.itt++
	var h pdu.Header
	cmd := pdu.SCSICommand{Final: true, Write: true, ITT: c.itt, CmdSN: c.cmdSN, Expected: 512, CDB: write10(0, 1)}
	cmd.Encode(&h)
	c.cmdSN++
	c.write(spoil(&h, pattern(512, 1)))
	rejected(pdu.RejectDataDigest)
	ends(c.itt)
	for _, size := range []int{8192, 262144} {
		itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: uint32(size), CDB: write10(0, size/testBlock)}, make([]byte, 4096))
		r := c.r2t(itt)
		out := pdu.DataOut{ITT: itt, TTT: r.TTT, Offset: 4096}
		out.Encode(&h)
		part := int(r.Length) - 1024
		c.write(spoil(&h, pattern(part, 1)))
		rejected(pdu.RejectDataDigest)
		c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: r.TTT, DataSN: 1, Offset: uint32(4096 + part)}, make([]byte, 1024))
		ends(itt)
	}
	nop := pdu.NopOut{ITT: 999, TTT: pdu.NoTag, CmdSN: c.cmdSN}
	nop.Encode(&h)
	c.cmdSN++
	c.write(spoil(&h, []byte("ping data")))
	rejected(pdu.RejectDataDigest)
	if got, p := c.read(0, 1, 512); p.Status != 0 || got[1] != 0 {
		t.Errorf("afterwards: %+v", p)
	}
	if n := b.Stats().DigestErrors; n != 4 || b.device.count().executed != 0 {
		t.Errorf("%d digest errors, %d executed", n, b.device.count().executed)
	}
	// A wrong header digest: nothing in the header can be trusted.
	nop.Encode(&h)
	bad := encode(c.layout, &h, nil, nil)
	bad[20] ^= 1
	c.write(bad)
	c.expectClosed()
}

// TestCommandNumbers: duplicates and numbers outside the window are dropped
// without a word, gaps wait, and all of it works across the wrap.
func TestCommandNumbers(t *testing.T) {
	for _, first := range []uint32{100, 0xfffffffe, 0xffffffff} {
		b := newBench(t, func(c *Config) { c.Limits.Window = 16; c.firstStatSN = 0xfffffffd })
		c := dial(t, b)
		c.cmdSN = first
		c.login()
		tur := func(sn uint32) uint32 {
			t.Helper()
			c.cmdSN = sn
			return c.command(pdu.SCSICommand{Final: true}, nil)
		}
		if p, _ := c.response(tur(first)); p.ExpCmdSN != first+1 || p.MaxCmdSN != first+16 || p.StatSN != 0xfffffffe {
			t.Errorf("first: %+v", p)
		}
		tur(first)      // again
		tur(first - 1)  // old
		tur(first + 17) // beyond the window
		c.cmdSN = first + 1
		c.quiet()
		// 3 and 2 before 1, with a duplicate; unsolicited data follow a held write.
		third := tur(first + 3)
		c.cmdSN = first + 2
		second := c.command(pdu.SCSICommand{Write: true, Expected: 1024, CDB: write10(0, 2)}, make([]byte, 512))
		c.dataOut(pdu.DataOut{Final: true, ITT: second, TTT: pdu.NoTag, Offset: 512}, pattern(512, 1))
		tur(first + 3)
		c.cmdSN = first + 1
		c.quiet()
		one := tur(first + 1)
		for _, itt := range []uint32{one, second, third} {
			if p, _ := c.response(itt); p.Status != 0 {
				t.Errorf("in order: %+v", p)
			}
		}
		c.cmdSN = first + 4
		if got, p := c.read(1, 1, 512); p.Status != 0 || got[1] != pattern(2, 1)[1] {
			t.Errorf("held write: %+v", p)
		}
		if n := b.Stats().WindowDrops; n != 4 {
			t.Errorf("%d dropped", n)
		}
	}
}

// TestWindowCloses: with all places taken MaxCmdSN stands at ExpCmdSN-1, and a
// command beyond is dropped; places come back with the responses.
func TestWindowCloses(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limits.Window = 4 })
	c := dial(t, b).login()
	b.device.gate(true)
	for range 5 {
		c.command(pdu.SCSICommand{Final: true}, nil)
	}
	c.cmdSN--
	c.quiet()
	if c.last.MaxCmdSN+1 != c.last.ExpCmdSN || b.device.queued() != 4 {
		t.Errorf("window %+v, %d queued", c.last, b.device.queued())
	}
	// Immediate commands go on, as many as are allowed; the next is rejected.
	for range 4 {
		c.command(pdu.SCSICommand{Immediate: true, Final: true}, nil)
	}
	itt := c.command(pdu.SCSICommand{Immediate: true, Final: true}, nil)
	r := c.expect(pdu.OpReject)
	if r.Header[2] != pdu.RejectTooMany || (*pdu.Header)(r.data).ITT() != itt {
		t.Errorf("reject % x", r.Header[:4])
	}
	b.device.gate(false)
	for range 8 {
		c.expect(pdu.OpSCSIResponse)
	}
	if c.last.MaxCmdSN != c.last.ExpCmdSN+3 {
		t.Errorf("window %+v", c.last)
	}
	// A tag in use.
	b.device.gate(true)
	itt = c.command(pdu.SCSICommand{Final: true}, nil)
	c.itt--
	c.command(pdu.SCSICommand{Final: true}, nil)
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectInProgress || r.ExpCmdSN() != c.cmdSN {
		t.Errorf("reject % x", r.Header[:4])
	}
	b.device.gate(false)
	c.response(itt)
}

// TestMemory: reads and solicited writes wait for buffers, in order; writes that
// send data unasked are refused; nothing else is held up.
func TestMemory(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limits.Buffers = 8 << 20 })
	b.device.cached = false
	c := dial(t, b).login("MaxRecvDataSegmentLength=262144")
	b.device.gate(true)
	big := 16384 // blocks, 8 MiB: all there is
	one := c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 8 << 20, CDB: read10(0, big)}, nil)
	eventually(t, "first read", func() bool { return b.device.queued() == 1 })
	two := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 1 << 20, CDB: write10(0, 2048)}, nil)
	three := c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 4096, CDB: read10(0, 8)}, nil)
	four := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 1 << 20, CDB: write10(0, 2048)}, make([]byte, 4096))
	if p, _ := c.response(four); p.Status != statusTaskSetFull {
		t.Errorf("unasked data without memory: %+v", p)
	}
	five := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 4096, CDB: write10(0, 8)}, make([]byte, 4096))
	c.quiet()
	if n := b.device.queued(); n != 2 {
		t.Fatalf("%d queued, want the first read and the write that needs no memory", n)
	}
	b.device.gate(false)
	if data, p := c.collect(one); p.Status != 0 || len(data) != 8<<20 {
		t.Errorf("first: %+v", p)
	}
	c.response(five)
	r := c.r2t(two)
	if _, p := c.collect(three); p.Status != 0 {
		t.Errorf("read that waited: %+v", p)
	}
	c.answerR2T(r, make([]byte, 1<<20), 262144)
	if p, _ := c.response(two); p.Status != 0 {
		t.Errorf("write that waited: %+v", p)
	}
	st := b.Stats()
	if st.MemoryWaits != 2 || st.MemoryRefusals != 1 || st.BuffersInUse != 0 {
		t.Errorf("%+v", st)
	}
	// A connection that goes while its tasks stand in line.
	b.device.gate(true)
	c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 8 << 20, CDB: read10(0, big)}, nil)
	for range 3 {
		c.command(pdu.SCSICommand{Final: true, Read: true, Expected: 1 << 20, CDB: read10(0, 2048)}, nil)
	}
	c.quiet()
	_ = c.conn.Close()
	b.device.gate(false)
	eventually(t, "memory back", func() bool { return b.Stats().BuffersInUse == 0 })
}
