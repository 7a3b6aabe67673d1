package initiator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// TestDataTransfer_RFC7143_11_7 (RFC 7143 sections 13.1, 13.10 to 13.14, 13.17): for every
// shape of data transfer that a login can agree on, a shadow of the disk and the
// disk stay the same under writes and reads of all sizes, many at once.
func TestDataTransfer_RFC7143_11_7(t *testing.T) {
	for _, c := range []struct {
		name string
		keys []initiator.Key
	}{
		{"plain", nil},
		{"digests", []initiator.Key{{Name: "HeaderDigest", Value: "CRC32C"}, {Name: "DataDigest", Value: "CRC32C"}}},
		{"initial R2T", []initiator.Key{{Name: "InitialR2T", Value: "Yes"}}},
		{"no immediate data", []initiator.Key{{Name: "ImmediateData", Value: "No"}}},
		{"nothing unsolicited", []initiator.Key{{Name: "ImmediateData", Value: "No"}, {Name: "InitialR2T", Value: "Yes"}}},
		{"small", []initiator.Key{{Name: "MaxRecvDataSegmentLength", Value: "512"}, {Name: "MaxBurstLength", Value: "1536"}, {Name: "FirstBurstLength", Value: "1024"}, {Name: "MaxOutstandingR2T", Value: "1"}}},
		{"small with digests", []initiator.Key{{Name: "HeaderDigest", Value: "CRC32C"}, {Name: "DataDigest", Value: "CRC32C"}, {Name: "MaxRecvDataSegmentLength", Value: "1000"}, {Name: "MaxBurstLength", Value: "10000"}, {Name: "FirstBurstLength", Value: "3000"}}},
	} {
		for _, async := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/async=%t", c.name, async), func(t *testing.T) {
				r := newRig(t, async, iscsi.Limits{})
				cfg := r.config()
				cfg.Keys = initiator.WithKeys(c.keys...)
				conn := dial(t, cfg)
				const blocks = 4096
				shadow := make([]byte, blocks*512)
				rng := rand.New(rand.NewPCG(1, 2))
				for round := range 12 {
					// Writes that do not overlap, all under way together, then reads of everything.
					var tasks []*initiator.Task
					for at := 0; at < blocks; {
						n := min(1+rng.IntN(1<<rng.IntN(11)), blocks-at)
						data := fill(n*512, rng.Uint64())
						copy(shadow[at*512:], data)
						cmd := &initiator.Command{CDB: initiator.Write16(uint64(at), uint32(n)), Out: data,
							NoImmData: rng.IntN(4) == 0, NoUnsolic: rng.IntN(4) == 0}
						if rng.IntN(3) == 0 {
							cmd.PDUDataMax = 512 * (1 + rng.IntN(8))
						}
						task, err := conn.Start(wait(t), cmd)
						if err != nil {
							t.Fatal(err)
						}
						tasks = append(tasks, task)
						at += n
					}
					finish(t, tasks)
					got := make([]byte, len(shadow))
					tasks = nil
					for at := 0; at < blocks; {
						n := min(1+rng.IntN(1<<rng.IntN(12)), blocks-at)
						task, err := conn.Start(wait(t), &initiator.Command{CDB: initiator.Read16(uint64(at), uint32(n)), In: got[at*512 : (at+n)*512]})
						if err != nil {
							t.Fatal(err)
						}
						tasks = append(tasks, task)
						at += n
					}
					finish(t, tasks)
					if !bytes.Equal(got, shadow) {
						t.Fatalf("round %d: the disk differs from what was written", round)
					}
				}
				if n, err := conn.Logout(wait(t), 0); n != 0 || err != nil {
					t.Errorf("logout: %d, %v", n, err)
				}
				if err := conn.Done(wait(t)); err != io.EOF {
					t.Errorf("after the logout: %v", err)
				}
			})
		}
	}
}

func finish(t testing.TB, tasks []*initiator.Task) {
	t.Helper()
	ctx := wait(t)
	for _, task := range tasks {
		if r, err := task.Wait(ctx); err != nil || !r.OK() {
			t.Fatalf("%v, %v", r, err)
		}
	}
}

// TestResiduals_RFC7143_11_4_5_1 (RFC 7143 section 11.4.5.1): the expected length against the one
// of the CDB.
func TestResiduals_RFC7143_11_4_5_1(t *testing.T) {
	for _, async := range []bool{false, true} {
		conn := dial(t, newRig(t, async, iscsi.Limits{}).config())
		content := fill(16*512, 3)
		do(t, conn, &initiator.Command{CDB: initiator.Write16(0, 16), Out: content})
		for _, c := range []struct {
			expected, blocks int
			over, under      bool
			residual         uint32
		}{
			{8 * 512, 8, false, false, 0}, {16 * 512, 8, false, true, 8 * 512}, {4 * 512, 8, true, false, 4 * 512}, {512, 0, false, true, 512},
		} {
			in := make([]byte, c.expected)
			r := do(t, conn, &initiator.Command{CDB: initiator.Read16(0, uint32(c.blocks)), In: in})
			n := min(c.expected, c.blocks*512)
			if !r.OK() || r.Overflow != c.over || r.Underflow != c.under || r.Residual != c.residual || !bytes.Equal(in[:n], content[:n]) {
				t.Errorf("read of %d blocks into %d bytes: %v", c.blocks, c.expected, r)
			}
		}
		// More data than the command takes, and less.
		r := do(t, conn, &initiator.Command{CDB: initiator.Write16(64, 2), Out: fill(4*512, 4)})
		if !r.OK() || !r.Underflow || r.Residual != 2*512 {
			t.Errorf("write of 2 blocks with the data of 4: %v", r)
		}
		r = do(t, conn, &initiator.Command{CDB: initiator.Write16(64, 4), Out: fill(2*512, 5)})
		if !r.OK() || !r.Overflow || r.Residual != 2*512 {
			t.Errorf("write of 4 blocks with the data of 2: %v", r)
		}
		in := make([]byte, 4*512)
		do(t, conn, &initiator.Command{CDB: initiator.Read16(64, 4), In: in})
		if want := append(fill(2*512, 5), make([]byte, 2*512)...); !bytes.Equal(in, want) {
			t.Error("more or less was written than the shorter of both lengths")
		}
		mustWork(t, conn)
	}
}

// TestCommandNumbering_RFC7143_4_2_2_1 (RFC 7143 section 4.2.2.1): what is outside of the window,
// or comes twice, is dropped without a word and without an effect.
func TestCommandNumbering_RFC7143_4_2_2_1(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{})
	conn := dial(t, r.config())
	mustWork(t, conn)
	writes := r.lu.Count(scsi.OpWrite)
	exp, most, _ := conn.Window()
	for _, sn := range []uint32{exp - 1, exp - 100, most + 1, most + 1000, exp + 1<<31} {
		p := initiator.NewPDU(initiator.OpCommand, 0x7000)
		p.BHS[1] |= 0x20
		p.Put32(20, 512)
		p.Put32(24, sn)
		copy(p.BHS[32:], initiator.Write16(0, 1))
		p.Data = make([]byte, 512)
		if err := conn.Send(p); err != nil {
			t.Fatal(err)
		}
	}
	mustWork(t, conn)
	if got := r.lu.Count(scsi.OpWrite); got != writes+1 {
		t.Errorf("%d writes instead of one", got-writes)
	}
}

// TestGapInCommandNumbers_RFC7143_4_2_2_1: commands that arrive out of order run in order.
func TestGapInCommandNumbers_RFC7143_4_2_2_1(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{})
	cfg := r.config()
	var held *initiator.PDU
	hold := false
	cfg.Outgoing = func(p *initiator.PDU) {
		if hold && p.Opcode() == initiator.OpCommand && held == nil {
			q := *p
			held = &q
			p.Drop = true
		}
	}
	conn := dial(t, cfg)
	hold = true
	first, err := conn.Start(wait(t), &initiator.Command{CDB: initiator.Write16(0, 1), Out: fill(512, 1)})
	if err != nil {
		t.Fatal(err)
	}
	second, err := conn.Start(wait(t), &initiator.Command{CDB: initiator.Write16(0, 1), Out: fill(512, 2)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Ping(wait(t), nil, true); err != nil {
		t.Fatal(err)
	}
	select {
	case <-second.Done():
		t.Error("a command overtook a missing one")
	default:
	}
	hold = false
	if err := conn.Send(held); err != nil {
		t.Fatal(err)
	}
	finish(t, []*initiator.Task{first, second})
	got := make([]byte, 512)
	do(t, conn, &initiator.Command{CDB: initiator.Read16(0, 1), In: got})
	if !bytes.Equal(got, fill(512, 2)) {
		t.Error("the commands ran in the order of their arrival")
	}
}

// TestDigestErrors_RFC7143_7_8 (RFC 7143 sections 7.8 and 11.17.1): damaged data are written
// nowhere, and a damaged header ends the connection.
func TestDigestErrors_RFC7143_7_8(t *testing.T) {
	digests := initiator.WithKeys(initiator.Key{Name: "HeaderDigest", Value: "CRC32C"}, initiator.Key{Name: "DataDigest", Value: "CRC32C"})
	for _, c := range []struct {
		name   string
		opcode byte
		header bool
	}{
		{"data of a command", initiator.OpCommand, false}, {"data of Data-Out", initiator.OpDataOut, false},
		{"header of a command", initiator.OpCommand, true}, {"header of Data-Out", initiator.OpDataOut, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, false, iscsi.Limits{})
			other := r.config()
			other.InitiatorName = hostName + "2"
			bystander := dial(t, other)
			cfg := r.config()
			cfg.Keys = digests
			damage := false
			cfg.Outgoing = func(p *initiator.PDU) {
				if damage && p.Opcode() == c.opcode {
					p.BadHeaderDigest, p.BadDataDigest = c.header, !c.header
					damage = false
				}
			}
			conn := dial(t, cfg)
			before := fill(64<<10, 1)
			do(t, conn, &initiator.Command{CDB: initiator.Write16(0, 128), Out: before})
			writes := r.lu.Count(scsi.OpWrite)
			damage = true
			res, err := conn.Do(wait(t), &initiator.Command{CDB: initiator.Write16(0, 128), Out: fill(64<<10, 2), PDUDataMax: 16 << 10})
			if c.header {
				if err == nil {
					t.Fatalf("write under a damaged header: %v", res)
				}
			} else {
				if err != nil || sense(res) != "0b/47/05" {
					t.Fatalf("write with damaged data: %v, %v", res, err)
				}
				if ev, err := conn.Event(wait(t)); err != nil || ev.Opcode() != initiator.OpReject || ev.BHS[2] != 2 {
					t.Errorf("event %v, %v, want Reject 02", ev, err)
				}
				mustWork(t, conn)
				writes++ // that one
			}
			if got := r.lu.Count(scsi.OpWrite); got != writes {
				t.Errorf("%d writes of damaged data", got-writes)
			}
			got := make([]byte, 64<<10)
			do(t, bystander, &initiator.Command{CDB: initiator.Read16(0, 128), In: got})
			if !bytes.Equal(got, before) {
				t.Error("damaged data were written")
			}
		})
	}
}

// TestBrokenPDUs_RFC7143_7 (RFC 7143 section 7): what cannot be followed ends its own
// connection, writes nothing, and hurts no other.
func TestBrokenPDUs_RFC7143_7(t *testing.T) {
	first := func(opcode byte, change func(*initiator.PDU)) func(*initiator.PDU) {
		done := false
		return func(p *initiator.PDU) {
			if p.Opcode() == opcode && !done {
				done = true
				change(p)
			}
		}
	}
	dataOut := func(change func(*initiator.PDU)) func(*initiator.PDU) { return first(initiator.OpDataOut, change) }
	for name, change := range map[string]func(*initiator.PDU){
		"Data-Out offset":    dataOut(func(p *initiator.PDU) { p.Put32(40, p.U32(40)+512) }),
		"Data-Out beyond":    dataOut(func(p *initiator.PDU) { p.Put32(40, 0xfffffe00) }),
		"Data-Out tag":       dataOut(func(p *initiator.PDU) { p.Put32(20, p.U32(20)+1) }),
		"Data-Out too early": dataOut(func(p *initiator.PDU) { p.BHS[1] ^= 0x80 }),
		"Data-Out too long":  dataOut(func(p *initiator.PDU) { p.Data = append(p.Data[:len(p.Data):len(p.Data)], make([]byte, 4096)...) }),
		"length":             dataOut(func(p *initiator.PDU) { p.BHS[5], p.BHS[6], p.BHS[7], p.RawLengths = 0xff, 0xff, 0xff, true }),
		"opcode":             dataOut(func(p *initiator.PDU) { p.BHS[0] = 0x1f }),
		"target's opcode":    dataOut(func(p *initiator.PDU) { p.BHS[0] = initiator.OpDataIn }),
		"second login":       dataOut(func(p *initiator.PDU) { *p = *initiator.NewPDU(initiator.OpLogin|initiator.Immediate, 1) }),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, true, iscsi.Limits{})
			other := r.config()
			other.InitiatorName = hostName + "2"
			bystander := dial(t, other)
			cfg := r.config()
			cfg.Keys = initiator.WithKeys(initiator.Key{Name: "InitialR2T", Value: "Yes"}, initiator.Key{Name: "ImmediateData", Value: "No"})
			cfg.Outgoing = change
			conn := dial(t, cfg)
			res, err := conn.Do(wait(t), &initiator.Command{CDB: initiator.Write16(0, 64), Out: fill(32<<10, 2), PDUDataMax: 8 << 10})
			if err == nil {
				t.Errorf("the write ended with %v", res)
			}
			if err := conn.Done(wait(t)); errors.Is(err, context.DeadlineExceeded) {
				t.Error("the connection stays open")
			} else if v := (*initiator.Violation)(nil); errors.As(err, &v) {
				t.Error(err)
			}
			mustWork(t, bystander)
			got := make([]byte, 32<<10)
			do(t, bystander, &initiator.Command{CDB: initiator.Read16(0, 64), In: got})
			if !bytes.Equal(got, make([]byte, len(got))) {
				t.Error("something was written")
			}
		})
	}
}

// TestUnsolicitedData_RFC7143_11_4_7_2 (RFC 7143 sections 4.2.4 and 11.4.7.2): too much or too
// little of it ends the task and nothing else.
func TestUnsolicitedData_RFC7143_11_4_7_2(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*initiator.PDU)
		want   string
	}{
		{"too much immediate data", func(p *initiator.PDU) {
			if p.Opcode() == initiator.OpCommand {
				p.Data = append(p.Data[:len(p.Data):len(p.Data)], make([]byte, 4096)...)
			}
		}, "0b/0c/0c"},
		{"too much in Data-Out", func(p *initiator.PDU) {
			if p.Opcode() == initiator.OpDataOut && p.Final() {
				p.Data = append(p.Data[:len(p.Data):len(p.Data)], make([]byte, 4096)...)
			}
		}, "0b/0c/0c"},
		{"too little", func(p *initiator.PDU) {
			if p.Opcode() == initiator.OpDataOut {
				p.Drop = p.U32(36) > 0
				p.BHS[1] |= 0x80
			}
		}, "0b/0c/0d"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, true, iscsi.Limits{})
			cfg := r.config()
			cfg.Keys = initiator.WithKeys(initiator.Key{Name: "FirstBurstLength", Value: "8192"})
			armed := false
			cfg.Outgoing = func(p *initiator.PDU) {
				if armed {
					c.change(p)
				}
			}
			conn := dial(t, cfg)
			armed = true
			cmd := &initiator.Command{CDB: initiator.Write16(0, 64), Out: fill(32<<10, 1), PDUDataMax: 2048}
			if c.name == "too much immediate data" {
				cmd.PDUDataMax = 0
			}
			res := do(t, conn, cmd)
			armed = false
			if sense(res) != c.want {
				t.Errorf("%v, want %s", res, c.want)
			}
			if n := r.lu.Count(scsi.OpWrite); n != 0 {
				t.Errorf("%d writes", n)
			}
			mustWork(t, conn)
		})
	}
}

// TestAbortTask_RFC7143_11_5_1 (RFC 7143 section 11.5.1, SAM-5): no status and no effect of a
// task comes after the response that says that it was aborted.
func TestAbortTask_RFC7143_11_5_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	conn := dial(t, r.config())
	r.lu.Hold()
	task, err := conn.Start(wait(t), &initiator.Command{CDB: initiator.Write16(0, 1), Out: fill(512, 1)})
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan byte, 1)
	go func() {
		n, err := conn.TaskManagement(wait(t), initiator.AbortTask, initiator.LUN(0), task)
		if err != nil {
			t.Error(err)
		}
		answer <- n
	}()
	for r.target.Stats().TaskManagement == 0 {
		if _, err := conn.Ping(wait(t), nil, true); err != nil { // the session goes on
			t.Fatal(err)
		}
	}
	select {
	case <-answer:
		t.Error("the abort was answered while the write could still happen")
	default:
	}
	r.lu.Release()
	if n := <-answer; n != 0 {
		t.Errorf("response %d", n)
	}
	if _, err := task.Wait(wait(t)); err != initiator.ErrAborted && err != nil {
		t.Errorf("the task: %v", err)
	}
	if n, err := conn.TaskManagement(wait(t), initiator.AbortTask, initiator.LUN(0), task); err != nil || n != 1 {
		t.Errorf("abort of what is gone: %d, %v", n, err)
	}
	mustWork(t, conn)
}

// TestAbortWaitingForData_RFC7143_11_5_1: a write that still waits for its data is aborted at
// once, and data that come late do no harm.
func TestAbortWaitingForData_RFC7143_11_5_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	cfg := r.config()
	cfg.Keys = initiator.WithKeys(initiator.Key{Name: "InitialR2T", Value: "Yes"}, initiator.Key{Name: "ImmediateData", Value: "No"})
	dropped := make(chan struct{}, 100)
	cfg.Outgoing = func(p *initiator.PDU) {
		if p.Opcode() == initiator.OpDataOut && p.U32(40) == 0 && len(p.Data) == 1024 {
			p.Drop = true
			dropped <- struct{}{}
		}
	}
	conn := dial(t, cfg)
	task, err := conn.Start(wait(t), &initiator.Command{CDB: initiator.Write16(0, 2), Out: fill(1024, 1)})
	if err != nil {
		t.Fatal(err)
	}
	<-dropped
	if n, err := conn.TaskManagement(wait(t), initiator.AbortTask, initiator.LUN(0), task); n != 0 || err != nil {
		t.Fatalf("abort: %d, %v", n, err)
	}
	if _, err := task.Wait(wait(t)); err != initiator.ErrAborted {
		t.Errorf("the task: %v", err)
	}
	mustWork(t, conn)
	got := make([]byte, 1024)
	do(t, conn, &initiator.Command{CDB: initiator.Read16(0, 2), In: got})
	if !bytes.Equal(got, make([]byte, 1024)) {
		t.Error("an aborted write was done")
	}
}

// TestLogicalUnitReset_RFC7143_11_5_1 (SAM-5): every nexus hears of it, tasks are gone.
func TestLogicalUnitReset_RFC7143_11_5_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	conn := dial(t, r.config())
	other := r.config()
	other.InitiatorName = hostName + "2"
	second := dial(t, other)
	if n, err := conn.TaskManagement(wait(t), initiator.LogicalUnitReset, initiator.LUN(0), nil); n != 0 || err != nil {
		t.Fatalf("reset: %d, %v", n, err)
	}
	for i, c := range []*initiator.Conn{conn, second} {
		if res := do(t, c, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(res) != "06/29/03" {
			t.Errorf("connection %d after the reset: %v", i, res)
		}
		mustWork(t, c)
	}
	if n, err := conn.TaskManagement(wait(t), initiator.LogicalUnitReset, initiator.LUN(9), nil); n != 2 || err != nil {
		t.Errorf("reset of a LUN that is not there: %d, %v", n, err)
	}
	if n, err := conn.TaskManagement(wait(t), initiator.TaskReassign, initiator.LUN(0), nil); n != 4 || err != nil {
		t.Errorf("task reassign: %d, %v", n, err)
	}
}

// TestNop_RFC7143_11_18 (RFC 7143 sections 11.18 and 11.19).
func TestNop_RFC7143_11_18(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{PingAfter: 50 * time.Millisecond, PingTime: time.Hour})
	conn := dial(t, r.config())
	for _, immediate := range []bool{false, true} {
		for _, n := range []int{0, 1, 4096, 100000} {
			if got, err := conn.Ping(wait(t), fill(n, 1), immediate); err != nil || len(got) != n {
				t.Errorf("ping of %d bytes: %d, %v", n, len(got), err)
			}
		}
	}
	cfg := r.config()
	cfg.InitiatorName = hostName + "2"
	cfg.KeepPings = true
	idle := dial(t, cfg)
	ev, err := idle.Event(wait(t))
	if err != nil || ev.Opcode() != initiator.OpNopIn || ev.ITT() != initiator.NoTag || ev.U32(20) == initiator.NoTag {
		t.Fatalf("the target's ping: %v, %v", ev, err)
	}
	mustWork(t, idle)
}

// TestSilentInitiatorIsDropped_RFC7143_11_19: no answer to the target's ping.
func TestSilentInitiatorIsDropped_RFC7143_11_19(t *testing.T) {
	r := newRig(t, false, iscsi.Limits{PingAfter: 20 * time.Millisecond, PingTime: 20 * time.Millisecond})
	cfg := r.config()
	cfg.KeepPings = true
	conn := dial(t, cfg)
	if err := conn.Done(wait(t)); errors.Is(err, context.DeadlineExceeded) {
		t.Error("a dead initiator keeps its connection")
	}
}
