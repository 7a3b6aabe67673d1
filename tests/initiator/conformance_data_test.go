package initiator_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// r2tOf reads the fields of an R2T that tests look at.
func r2tOf(p *initiator.PDU) (itt, offset, length uint32) { return p.ITT(), p.U32(40), p.U32(44) }

// TestR2TNeverExceedsMaxBurst_RFC7143_11_8: for each burst length, the R2Ts of a
// write ask for all of it, in order, in pieces of at most MaxBurstLength, with no
// more than MaxOutstandingR2T unanswered.
func TestR2TNeverExceedsMaxBurst_RFC7143_11_8(t *testing.T) {
	l := newLab(t)
	const total = 64 << 10
	for _, burst := range []int{512, 1000, 4096, 65536, 1 << 20} {
		for _, outstanding := range []int{1, 3, 8} {
			var asked, answered, tasks int
			var next uint32
			tags := make(map[uint32]bool)
			conn := l.dial(func(cfg *initiator.Config) {
				cfg.Keys = initiator.WithKeys(keys("InitialR2T=Yes", "ImmediateData=No", fmt.Sprintf("MaxBurstLength=%d", burst),
					"FirstBurstLength=512", fmt.Sprintf("MaxOutstandingR2T=%d", outstanding))...)
				cfg.Incoming = func(p *initiator.PDU) {
					if p.Opcode() != initiator.OpR2T {
						return
					}
					_, offset, length := r2tOf(p)
					if asked++; asked-answered > outstanding || int(length) > burst || length == 0 || offset != next || tags[p.U32(20)] || p.U32(20) == initiator.NoTag {
						t.Errorf("MaxBurstLength %d, MaxOutstandingR2T %d: R2T %d for %d bytes at %d with tag %08x, %d answered", burst, outstanding, asked, length, offset, p.U32(20), answered)
					}
					tags[p.U32(20)] = true
					next = offset + length
				}
				cfg.Outgoing = func(p *initiator.PDU) {
					if p.Opcode() == initiator.OpDataOut && p.Final() {
						answered++
					}
					if p.Opcode() == initiator.OpCommand {
						tasks++
					}
				}
			})
			data := fill(total, uint64(burst+outstanding))
			l.write(conn, 0, data)
			if want := (total + burst - 1) / burst; asked != want || int(next) != total || tasks == 0 {
				t.Errorf("MaxBurstLength %d: %d R2Ts up to %d, want %d", burst, asked, next, want)
			}
			if !bytes.Equal(l.read(conn, 0, total/l.block), data) {
				t.Errorf("MaxBurstLength %d: read differs", burst)
			}
			conn.Close()
		}
	}
}

// TestDataInSequences_RFC7143_11_7: Data-In goes in sequences of at most
// MaxBurstLength that end with F, in segments of at most what we take and of
// whole words, numbered through the task; status comes last.
func TestDataInSequences_RFC7143_11_7(t *testing.T) {
	l := newLab(t)
	const total = 48 << 10
	data := fill(total, 5)
	l.write(l.dial(nil), 0, data)
	for _, segment := range []int{512, 1003, 8192, 262144} {
		for _, burst := range []int{512, 2047, 10000, 1 << 20} {
			var sequence, count int
			conn := l.dial(func(cfg *initiator.Config) {
				cfg.Keys = initiator.WithKeys(keys(fmt.Sprintf("MaxRecvDataSegmentLength=%d", segment), fmt.Sprintf("MaxBurstLength=%d", burst))...)
				cfg.Incoming = func(p *initiator.PDU) {
					if p.Opcode() != initiator.OpDataIn {
						return
					}
					n := len(p.Data)
					sequence += n
					if n > segment || n == 0 || sequence > burst || !p.Final() && n%4 != 0 || int(p.U32(36)) != count {
						t.Errorf("segment %d, burst %d: %v, DataSN %d after %d", segment, burst, p, p.U32(36), count)
					}
					if status := p.BHS[1]&1 != 0; !status && p.U32(24) != 0 || status && !p.Final() {
						t.Errorf("segment %d, burst %d: %v with StatSN %d", segment, burst, p, p.U32(24))
					}
					count++
					if p.Final() {
						sequence = 0
					}
				}
			})
			sequence, count = 0, 0
			if got := l.read(conn, 0, total/l.block); !bytes.Equal(got, data) {
				t.Errorf("segment %d, burst %d: read differs", segment, burst)
			}
			conn.Close()
		}
	}
}

// TestResidualTable_RFC7143_11_4_5: what the initiator expects against what the
// CDB asks for, in each direction, whole blocks and parts of them.
func TestResidualTable_RFC7143_11_4_5(t *testing.T) {
	l := newLab(t)
	c := l.dial(nil)
	b := l.block
	content := fill(8*b, 3)
	for _, tt := range []struct{ expected, blocks int }{
		{4 * b, 4}, {2 * b, 4}, {8 * b, 4}, {b, 1}, {0, 1}, {0, 0}, {b, 0}, {b / 2, 1}, {b + b/2, 2}, {3*b + 4, 3}, {4, 4},
	} {
		s := tt.blocks * b
		over, under, residual := s > tt.expected, s < tt.expected, max(s-tt.expected, tt.expected-s)
		check := func(what string, r *initiator.Result) {
			t.Helper()
			if r.Overflow != over || r.Underflow != under || int(r.Residual) != residual {
				t.Errorf("%s of %d bytes, %d expected: %v", what, s, tt.expected, r)
			}
		}
		l.write(c, 0, content)
		in := make([]byte, tt.expected)
		r := l.do(c, &initiator.Command{CDB: initiator.Read16(0, uint32(tt.blocks)), In: in})
		check("READ", r)
		n := min(s, tt.expected)
		if !r.OK() || !bytes.Equal(in[:n], content[:n]) || !bytes.Equal(in[n:], make([]byte, len(in)-n)) {
			t.Errorf("READ of %d bytes, %d expected: wrong data or %v", s, tt.expected, r)
		}
		data := fill(tt.expected, 4)
		r = l.do(c, &initiator.Command{CDB: initiator.Write16(0, uint32(tt.blocks)), Out: data})
		check("WRITE", r)
		want := bytes.Clone(content)
		if n := min(s, tt.expected); n%b == 0 {
			copy(want, data[:n])
			if !r.OK() {
				t.Errorf("WRITE of %d bytes, %d expected: %v", s, tt.expected, r)
			}
		} else if sense(r) != "05/0e/03" {
			t.Errorf("WRITE of %d bytes, %d expected: %v, want 05/0e/03", s, tt.expected, r)
		}
		if !bytes.Equal(l.read(c, 0, 8), want) {
			t.Errorf("WRITE of %d bytes, %d expected: the medium is wrong", s, tt.expected)
		}
	}
	// The other direction: nothing moves, and all of it is missing.
	l.write(c, 0, content)
	for what, cmd := range map[string]*initiator.Command{
		"READ with data": {CDB: initiator.Read16(0, 2), Out: fill(2*b, 6)}, "WRITE that reads": {CDB: initiator.Write16(0, 2), In: make([]byte, 2*b)},
		"INQUIRY with data": {CDB: initiator.Inquiry(-1, 36), Out: make([]byte, 36)},
	} {
		want := 2 * b
		if cmd.CDB[0] == 0x12 {
			want = 36
		}
		if r := l.do(c, cmd); !r.OK() || !r.Overflow || int(r.Residual) != want {
			t.Errorf("%s: %v", what, r)
		}
	}
	if !bytes.Equal(l.read(c, 0, 8), content) {
		t.Error("data moved in a direction that the command does not have")
	}
	// Less than was allowed for, more than the initiator takes, and failures.
	if r := l.do(c, &initiator.Command{CDB: initiator.Inquiry(-1, 4096), In: make([]byte, 4096)}); !r.OK() || !r.Underflow || int(r.Residual) != 4096-r.Received || r.Received < 36 {
		t.Errorf("INQUIRY: %v", r)
	}
	if r := l.do(c, &initiator.Command{CDB: initiator.Inquiry(-1, 36), In: make([]byte, 8)}); !r.OK() || !r.Overflow || r.Residual != 28 {
		t.Errorf("INQUIRY cut: %v", r)
	}
	if r := l.do(c, &initiator.Command{CDB: initiator.TestUnitReady(), In: make([]byte, b)}); !r.OK() || !r.Underflow || int(r.Residual) != b {
		t.Errorf("TEST UNIT READY that reads: %v", r)
	}
	if r := l.do(c, &initiator.Command{CDB: initiator.Read16(1<<60, 1), In: make([]byte, b)}); sense(r) != "05/21/00" || !r.Underflow || int(r.Residual) != b {
		t.Errorf("READ beyond the end: %v", r)
	}
	cdb, list := initiator.Unmap([2]uint64{0, 1})
	if r := l.do(c, &initiator.Command{CDB: cdb, Out: list[:8]}); sense(r) != "05/1a/00" {
		t.Errorf("UNMAP with half its list: %v", r)
	}
}

// TestDigestCombinations_RFC7143_13_1: each digest alone and both, over all
// lengths of padding, in both directions.
func TestDigestCombinations_RFC7143_13_1(t *testing.T) {
	l := newLab(t)
	for _, header := range []string{"None", "CRC32C"} {
		for _, data := range []string{"None", "CRC32C"} {
			conn := l.dial(func(cfg *initiator.Config) {
				cfg.Keys = initiator.WithKeys(keys("HeaderDigest="+header, "DataDigest="+data)...)
			})
			if p := conn.Params(); p.HeaderDigest != (header == "CRC32C") || p.DataDigest != (data == "CRC32C") {
				t.Errorf("%+v", p)
			}
			for n := range 9 {
				if _, err := conn.Ping(wait(t), fill(n, 1), n%2 == 0); err != nil {
					t.Errorf("ping of %d bytes: %v", n, err)
				}
			}
			for _, n := range []int{18, 17, 19, 20} { // INQUIRY data cut to odd lengths
				l.do(conn, &initiator.Command{CDB: initiator.Inquiry(-1, 36), In: make([]byte, n)})
			}
			want := fill(96<<10, 8)
			for _, cmd := range []*initiator.Command{
				{}, {NoImmData: true}, {NoUnsolic: true, NoImmData: true}, {PDUDataMax: 1021},
			} {
				cmd.CDB, cmd.Out = initiator.Write16(0, uint32(len(want)/l.block)), want
				if r := l.do(conn, cmd); !r.OK() {
					t.Errorf("write: %v", r)
				}
				if !bytes.Equal(l.read(conn, 0, len(want)/l.block), want) {
					t.Error("read differs")
				}
			}
			conn.Close()
		}
	}
}

// TestLostPing_RFC7143_11_17_1: a damaged ping is rejected with the reason data
// digest error, its number counts, and the session goes on.
func TestLostPing_RFC7143_11_17_1(t *testing.T) {
	l := newLab(t)
	damage := false
	conn := l.dial(func(cfg *initiator.Config) {
		cfg.Keys = initiator.WithKeys(keys("DataDigest=CRC32C")...)
		cfg.Outgoing = func(p *initiator.PDU) { p.BadDataDigest = damage && p.Opcode() == initiator.OpNopOut }
	})
	damage = true
	var rejected *initiator.RejectError
	if _, err := conn.Ping(wait(t), []byte("ping"), false); err == nil || !asReject(err, &rejected) || rejected.Reason != 2 {
		t.Errorf("%v", err)
	}
	damage = false
	l.works(conn)
}

// TestExtendedCDB_RFC7143_11_2_2: additional header segments are understood, and
// what they ask for is refused by the right sense; unknown ones are rejected.
func TestExtendedCDB_RFC7143_11_2_2(t *testing.T) {
	l := newLab(t)
	var ahs []byte
	conn := l.dial(func(cfg *initiator.Config) {
		cfg.Outgoing = func(p *initiator.PDU) {
			if p.Opcode() == initiator.OpCommand && ahs != nil {
				p.AHS = ahs
			}
		}
	})
	if r := l.do(conn, &initiator.Command{CDB: append([]byte{0x7f}, make([]byte, 31)...)}); sense(r) != "05/20/00" {
		t.Errorf("CDB of 32 bytes: %v", r)
	}
	ahs = []byte{0, 5, 1, 0, 1, 2, 3, 4, 0, 5, 2, 0, 0, 0, 2, 0} // both types
	if r := l.do(conn, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(r) != "05/20/00" {
		t.Errorf("both types: %v", r)
	}
	for name, bad := range map[string][]byte{
		"unknown type": {0, 5, 60, 0, 1, 2, 3, 4}, "longer than it is": {0, 50, 1, 0, 1, 2, 3, 4}, "no length": {0, 0, 1, 0},
		"the same twice": {0, 5, 2, 0, 0, 0, 2, 0, 0, 5, 2, 0, 0, 0, 2, 0},
	} {
		ahs = bad
		var rejected *initiator.RejectError
		cmd := &initiator.Command{LUN: l.lun, CDB: initiator.TestUnitReady()}
		if _, err := conn.Do(wait(t), cmd); !asReject(err, &rejected) || rejected.Reason != 4 {
			t.Errorf("%s: %v, want Reject 04", name, err)
		}
	}
	ahs = nil
	l.works(conn)
}

// TestBidirectional_RFC7143_11_3_1: a command with R and W is refused, its data swallowed.
func TestBidirectional_RFC7143_11_3_1(t *testing.T) {
	l := newLab(t)
	both := false
	conn := l.dial(func(cfg *initiator.Config) {
		cfg.Outgoing = func(p *initiator.PDU) {
			if both && p.Opcode() == initiator.OpCommand {
				p.BHS[1] |= 0x60
			}
		}
	})
	both = true
	for _, cmd := range []*initiator.Command{
		{CDB: initiator.Write16(0, 8), Out: make([]byte, 8*l.block)},
		{CDB: initiator.Write16(0, 8), Out: make([]byte, 8*l.block), PDUDataMax: 512},
	} {
		if r := l.do(conn, cmd); sense(r) != "05/20/00" {
			t.Errorf("%v", r)
		}
	}
	both = false
	l.works(conn)
}

// TestNumbersWrap_RFC7143_4_2_2_1: command numbers run over their end under load.
func TestNumbersWrap_RFC7143_4_2_2_1(t *testing.T) {
	l := newLab(t)
	for _, first := range []uint32{0xffffffff, 0xfffffff0, 0x7ffffff0} {
		conn := l.dial(func(cfg *initiator.Config) { cfg.CmdSN = first })
		_, _, base := conn.Window()
		var tasks []*initiator.Task
		for i := range 300 {
			data := fill(l.block, uint64(i))
			cmd := &initiator.Command{LUN: l.lun, CDB: initiator.Write16(uint64(i%64), 1), Out: data}
			if i%3 == 0 {
				cmd = &initiator.Command{LUN: l.lun, CDB: initiator.Read16(uint64(i%64), 1), In: make([]byte, l.block)}
			}
			task, err := conn.Start(wait(t), cmd)
			if err != nil {
				t.Fatal(err)
			}
			tasks = append(tasks, task)
		}
		finish(t, tasks)
		if exp, most, next := conn.Window(); exp != next || most != next+127 || next != base+300 {
			t.Errorf("from %08x: ExpCmdSN %08x, MaxCmdSN %08x, next %08x", first, exp, most, next)
		}
		conn.Close()
	}
}

// TestDataSNOutOfSequence_RFC7143_7_9: a number out of sequence means that data
// were lost. Nothing is written, the task ends with CRC error, the session goes on.
func TestDataSNOutOfSequence_RFC7143_7_9(t *testing.T) {
	l := newLab(t)
	for _, agreed := range [][]string{{"InitialR2T=Yes", "ImmediateData=No"}, {"ImmediateData=No"}, {"FirstBurstLength=8192"}} {
		for name, change := range map[string]func(sn uint32) uint32{
			"always 0": func(uint32) uint32 { return 0 }, "too high": func(sn uint32) uint32 { return sn + 27 },
			"-1": func(uint32) uint32 { return 0xffffffff }, "reversed": func(sn uint32) uint32 { return sn ^ 1 },
		} {
			armed := false
			conn := l.dial(func(cfg *initiator.Config) {
				cfg.Keys = initiator.WithKeys(keys(agreed...)...)
				cfg.Outgoing = func(p *initiator.PDU) {
					if armed && p.Opcode() == initiator.OpDataOut {
						p.Put32(36, change(p.U32(36)))
					}
				}
			})
			before := fill(16<<10, 1)
			l.write(conn, 0, before)
			armed = true
			r := l.do(conn, &initiator.Command{CDB: initiator.Write16(0, uint32(len(before)/l.block)), Out: fill(16<<10, 2), PDUDataMax: 4096})
			armed = false
			if sense(r) != "0b/47/05" {
				t.Errorf("%v, %s: %v", agreed, name, r)
			}
			if !bytes.Equal(l.read(conn, 0, len(before)/l.block), before) {
				t.Errorf("%v, %s: something was written", agreed, name)
			}
			conn.Close()
		}
	}
}

// TestReceiveLimitChanges_RFC7143_13_12: what the initiator takes in one PDU may
// change during the session.
func TestReceiveLimitChanges_RFC7143_13_12(t *testing.T) {
	l := newLab(t)
	limit := 262144
	conn := l.dial(func(cfg *initiator.Config) {
		cfg.Incoming = func(p *initiator.PDU) {
			if p.Opcode() == initiator.OpDataIn && len(p.Data) > limit {
				t.Errorf("%d bytes of data, limit is %d", len(p.Data), limit)
			}
		}
	})
	data := fill(16<<10, 1)
	l.write(conn, 0, data)
	for _, limit = range []int{512, 1024, 8192, 65536} {
		if got, err := conn.Text(wait(t), keys(fmt.Sprintf("MaxRecvDataSegmentLength=%d", limit))...); err != nil || len(got) != 0 {
			t.Errorf("%v, %v", got, err)
		}
		if !bytes.Equal(l.read(conn, 0, len(data)/l.block), data) {
			t.Errorf("limit %d: read differs", limit)
		}
	}
}

// TestLateData_RFC7143_11_7: Data-Out of a task that has ended, or never was, is
// nobody's.
func TestLateData_RFC7143_11_7(t *testing.T) {
	l := newLab(t)
	conn := l.dial(nil)
	before := l.read(conn, 0, 1)
	for _, ttt := range []uint32{initiator.NoTag, 1, 0} {
		p := initiator.NewPDU(initiator.OpDataOut, 0x7777)
		p.Put32(20, ttt)
		p.Data = fill(l.block, 7)
		if err := conn.Send(p); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(l.read(conn, 0, 1), before) {
		t.Error("it was written")
	}
	l.works(conn)
}

// TestImmediateDataLimits_RFC7143_13_11: immediate data where none was agreed on,
// and up to the very limit where it was.
func TestImmediateDataLimits_RFC7143_13_11(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	for _, c := range []struct {
		keys []string
		n    int
		want string
	}{
		{[]string{"ImmediateData=No", "InitialR2T=Yes"}, 512, "0b/0c/0c"},
		{[]string{"FirstBurstLength=4096"}, 4608, "0b/0c/0c"},
		{[]string{"FirstBurstLength=65536"}, 8192, "00/00/00"},
	} {
		cfg := r.config()
		cfg.Keys = initiator.WithKeys(keys(c.keys...)...)
		armed := false
		data := fill(8192, 1)
		cfg.Outgoing = func(p *initiator.PDU) {
			if armed && p.Opcode() == initiator.OpCommand {
				p.Data = data[:c.n]
				p.BHS[1] |= 0x80
			}
		}
		conn := ready(t, cfg)
		armed = true
		before := r.lu.Count(scsi.OpWrite)
		task, err := conn.Start(wait(t), &initiator.Command{CDB: initiator.Write16(0, 16), Out: data})
		if err != nil {
			t.Fatal(err)
		}
		res, err := task.Wait(wait(t))
		if err != nil || sense(res) != c.want {
			t.Errorf("%v, %d bytes: %v, %v, want %s", c.keys, c.n, res, err, c.want)
		}
		if wrote := r.lu.Count(scsi.OpWrite) - before; wrote != 0 && c.want != "00/00/00" {
			t.Errorf("%v, %d bytes: written", c.keys, c.n)
		}
		conn.Close()
	}
}
