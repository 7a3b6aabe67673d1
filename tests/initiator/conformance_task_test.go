package initiator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi"
	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/tests/initiator"
)

// manage performs a task management function.
func manage(t testing.TB, c *initiator.Conn, function byte, lun [8]byte, ref *initiator.Task) byte {
	t.Helper()
	n, err := c.TaskManagement(wait(t), function, lun, ref)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// start starts a command.
func start(t testing.TB, c *initiator.Conn, cmd *initiator.Command) *initiator.Task {
	t.Helper()
	task, err := c.Start(wait(t), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// await waits until a number of requests is with the volume.
func (r *rig) await(t testing.TB, queued int) {
	t.Helper()
	ctx := wait(t)
	for r.lu.Queued() < queued {
		if ctx.Err() != nil {
			t.Fatalf("%d requests with the volume, want %d", r.lu.Queued(), queued)
		}
		// A ping is a turn of the target's reader.
		if _, err := r.pinger(t).Ping(ctx, nil, true); err != nil {
			t.Fatal(err)
		}
	}
}

// pinger is a session beside those that are tested.
func (r *rig) pinger(t testing.TB) *initiator.Conn {
	t.Helper()
	if r.ping == nil {
		cfg := r.config()
		cfg.InitiatorName, cfg.ISID[5] = hostName+"2", 0x77
		r.ping = ready(t, cfg)
	}
	return r.ping
}

// TestAbortOfEndedTask_RFC7143_11_6_1: a task that has ended does not exist, like
// one that never was.
func TestAbortOfEndedTask_RFC7143_11_6_1(t *testing.T) {
	l := newLab(t)
	c := l.dial(nil)
	task := start(t, c, &initiator.Command{LUN: l.lun, CDB: initiator.TestUnitReady()})
	finish(t, []*initiator.Task{task})
	if n := manage(t, c, initiator.AbortTask, l.lun, task); n != 1 {
		t.Errorf("an ended task: response %d", n)
	}
	for _, never := range []*initiator.Task{
		{ITT: task.ITT, CmdSN: task.CmdSN - 50}, {ITT: task.ITT + 5000, CmdSN: task.CmdSN}, {ITT: 4, CmdSN: task.CmdSN + 100000},
	} {
		if n := manage(t, c, initiator.AbortTask, l.lun, never); n != 1 {
			t.Errorf("tag %d with number %d never was: response %d", never.ITT, never.CmdSN, n)
		}
	}
	l.works(c)
}

// TestAbortOfMissingCommand_RFC7143_11_5_1: the number of a command that was lost
// on the way counts as received, and what waited for it runs.
func TestAbortOfMissingCommand_RFC7143_11_5_1(t *testing.T) {
	l := newLab(t)
	drop := false
	c := l.dial(func(cfg *initiator.Config) {
		cfg.Outgoing = func(p *initiator.PDU) { p.Drop = drop && p.Opcode() == initiator.OpCommand }
	})
	before := l.read(c, 0, 1)
	drop = true
	lost := start(t, c, &initiator.Command{LUN: l.lun, CDB: initiator.Write16(0, 1), Out: fill(l.block, 1)})
	drop = false
	later := start(t, c, &initiator.Command{LUN: l.lun, CDB: initiator.TestUnitReady()})
	if n := manage(t, c, initiator.AbortTask, l.lun, lost); n != 0 {
		t.Errorf("response %d", n)
	}
	finish(t, []*initiator.Task{later})
	if _, err := lost.Wait(wait(t)); !errors.Is(err, initiator.ErrAborted) {
		t.Error(err)
	}
	if !bytes.Equal(l.read(c, 0, 1), before) {
		t.Error("it was written")
	}
	if exp, most, next := c.Window(); exp != next || most != next+127 {
		t.Errorf("window %d to %d, next %d", exp, most, next)
	}
}

// TestTaskManagementCodes_RFC7143_11_6_1: functions that are not offered, and
// LUNs that are not there.
func TestTaskManagementCodes_RFC7143_11_6_1(t *testing.T) {
	l := newLab(t)
	c := l.dial(nil)
	nowhere := initiator.LUN(16000)
	for _, tt := range []struct {
		function byte
		lun      [8]byte
		want     byte
	}{
		{initiator.ClearACA, l.lun, 5}, {initiator.TaskReassign, l.lun, 4}, {0, l.lun, 5}, {9, l.lun, 5}, {10, l.lun, 5}, {11, l.lun, 5}, {12, l.lun, 5}, {127, l.lun, 5},
		{initiator.AbortTaskSet, l.lun, 0}, {initiator.ClearTaskSet, l.lun, 0},
		{initiator.AbortTaskSet, nowhere, 2}, {initiator.ClearTaskSet, nowhere, 2}, {initiator.LogicalUnitReset, nowhere, 2},
	} {
		if n := manage(t, c, tt.function, tt.lun, nil); n != tt.want {
			t.Errorf("function %d: response %d, want %d", tt.function, n, tt.want)
		}
	}
	l.works(c)
}

// TestTargetWarmReset_SAM5: every nexus hears of it.
func TestTargetWarmReset_SAM5(t *testing.T) {
	l := newLab(t)
	c := l.dial(nil)
	other := l.dial(func(cfg *initiator.Config) { cfg.ISID[5] ^= 0x10 })
	if n := manage(t, c, initiator.TargetWarmReset, l.lun, nil); n != 0 {
		t.Errorf("response %d", n)
	}
	for i, c := range []*initiator.Conn{c, other} {
		if r := l.do(c, &initiator.Command{CDB: initiator.TestUnitReady()}); sense(r) != "06/29/03" && sense(r) != "06/29/02" && sense(r) != "06/29/00" {
			t.Errorf("session %d after the reset: %v", i, r)
		}
		l.works(c)
	}
}

// TestTargetColdReset_SAM5: the answer comes, then all sessions go.
func TestTargetColdReset_SAM5(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	other := r.config()
	other.InitiatorName = hostName + "2"
	c, bystander := dial(t, r.config()), dial(t, other)
	if n := manage(t, c, initiator.TargetColdReset, initiator.LUN(0), nil); n != 0 {
		t.Errorf("response %d", n)
	}
	if err := c.Done(wait(t)); !errors.Is(err, io.EOF) {
		t.Errorf("the one who asked: %v, want an orderly end", err)
	}
	if err := bystander.Done(wait(t)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the other: %v", err)
	}
	mustLogIn(t, r)
}

// TestClearTaskSet_SAM5: tasks of another nexus end with TASK ABORTED, and the
// answer waits until no effect of theirs can come.
func TestClearTaskSet_SAM5(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	victim := dial(t, r.config())
	by := r.pinger(t)
	r.lu.Hold()
	task := start(t, victim, &initiator.Command{CDB: initiator.Write16(0, 1), Out: fill(512, 1)})
	r.await(t, 1)
	answer := make(chan byte, 1)
	go func() {
		n, _ := by.TaskManagement(wait(t), initiator.ClearTaskSet, initiator.LUN(0), nil)
		answer <- n
	}()
	for r.target.Stats().TaskManagement == 0 {
		if _, err := by.Ping(wait(t), nil, true); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-answer:
		t.Error("answered while the write was under way")
	default:
	}
	r.lu.Release()
	if n := <-answer; n != 0 {
		t.Errorf("response %d", n)
	}
	if res, err := task.Wait(wait(t)); err != nil || res.Status != 0x40 {
		t.Errorf("%v, %v, want TASK ABORTED", res, err)
	}
	mustWork(t, victim)
}

// TestResetBesideFrozenPeer_SAM5: a peer that does not send the data of its write
// holds nothing up: another's reset is answered at once, and data that come
// afterwards are not written.
func TestResetBesideFrozenPeer_SAM5(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	cfg := r.config()
	cfg.Keys = initiator.WithKeys(keys("InitialR2T=Yes", "ImmediateData=No")...)
	var kept []*initiator.PDU
	frozen := true
	cfg.Outgoing = func(p *initiator.PDU) {
		if frozen && p.Opcode() == initiator.OpDataOut {
			q := *p
			kept = append(kept, &q)
			p.Drop = true
		}
	}
	asked := make(chan struct{}, 16)
	cfg.Incoming = func(p *initiator.PDU) {
		if p.Opcode() == initiator.OpR2T {
			asked <- struct{}{}
		}
	}
	c := dial(t, cfg)
	task := start(t, c, &initiator.Command{CDB: initiator.Write16(0, 8), Out: fill(4096, 1)})
	<-asked
	by := r.pinger(t)
	if n := manage(t, by, initiator.LogicalUnitReset, initiator.LUN(0), nil); n != 0 {
		t.Errorf("response %d", n)
	}
	if res, err := task.Wait(wait(t)); err != nil || res.Status != 0x40 {
		t.Errorf("%v, %v, want TASK ABORTED", res, err)
	}
	frozen = false
	for _, p := range kept {
		if err := c.Send(p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Ping(wait(t), nil, true); err != nil {
		t.Fatal(err)
	}
	if n := r.lu.Count(scsi.OpWrite); n != 0 {
		t.Errorf("%d writes", n)
	}
}

// TestTagInUse_RFC7143_11_2_1_8: a tag that is in use is rejected, and the
// command that has it is not disturbed.
func TestTagInUse_RFC7143_11_2_1_8(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	cfg := r.config()
	var again uint32
	cfg.Outgoing = func(p *initiator.PDU) {
		if again != 0 && p.Opcode() == initiator.OpCommand {
			p.Put32(16, again)
		}
	}
	c := dial(t, cfg)
	r.lu.Hold()
	first := start(t, c, &initiator.Command{CDB: initiator.Write16(0, 1), Out: fill(512, 1)})
	r.await(t, 1)
	again = first.ITT
	second := start(t, c, &initiator.Command{CDB: initiator.TestUnitReady()})
	again = 0
	ev, err := c.Event(wait(t))
	if err != nil || ev.Opcode() != initiator.OpReject || ev.BHS[2] != 7 || ev.U32(28) != second.CmdSN+1 {
		t.Errorf("%v, %v, want Reject 07 with the next number", ev, err)
	}
	r.lu.Release()
	finish(t, []*initiator.Task{first})
}

// TestImmediateCommandLimit_RFC7143_11_17_1: immediate commands are bounded beside
// the window.
func TestImmediateCommandLimit_RFC7143_11_17_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	c := dial(t, r.config())
	r.lu.Hold()
	var tasks []*initiator.Task
	for i := range 4 {
		tasks = append(tasks, start(t, c, &initiator.Command{CDB: initiator.Write16(uint64(i), 1), Out: fill(512, 1), Immediate: true}))
	}
	r.await(t, 4)
	var rejected *initiator.RejectError
	if _, err := c.Do(wait(t), &initiator.Command{CDB: initiator.TestUnitReady(), Immediate: true}); !asReject(err, &rejected) || rejected.Reason != 6 {
		t.Errorf("%v, want Reject 06", err)
	}
	if n := manage(t, c, initiator.AbortTask, initiator.LUN(0), &initiator.Task{ITT: 99999, CmdSN: 77}); n != 1 {
		t.Errorf("task management beside them: response %d", n)
	}
	r.lu.Release()
	finish(t, tasks)
	mustWork(t, c)
}

// TestClosedWindow_RFC7143_4_2_2_1: the window closes when all its places are
// taken; what is sent nevertheless is dropped, functions still work, and places
// come back.
func TestClosedWindow_RFC7143_4_2_2_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	c := dial(t, r.config())
	r.lu.Hold()
	var tasks []*initiator.Task
	for i := range 128 {
		tasks = append(tasks, start(t, c, &initiator.Command{CDB: initiator.Write16(uint64(i), 1), Out: fill(512, uint64(i))}))
	}
	r.await(t, 128)
	if _, err := c.Ping(wait(t), nil, true); err != nil {
		t.Fatal(err)
	}
	exp, most, next := c.Window()
	if most != exp-1 || next != exp {
		t.Errorf("window %d to %d, next %d", exp, most, next)
	}
	p := initiator.NewPDU(initiator.OpCommand, 0x9999)
	p.BHS[1] |= 0x20
	p.Put32(20, 512)
	p.Put32(24, next)
	copy(p.BHS[32:], initiator.Write16(500, 1))
	p.Data = fill(512, 5)
	if err := c.Send(p); err != nil {
		t.Fatal(err)
	}
	if n := manage(t, c, initiator.AbortTask, initiator.LUN(0), &initiator.Task{ITT: 99999, CmdSN: 77}); n != 1 {
		t.Errorf("response %d", n)
	}
	r.lu.Release()
	finish(t, tasks)
	if exp, most, _ := c.Window(); most != exp+127 {
		t.Errorf("window %d to %d", exp, most)
	}
	if n := r.lu.Count(scsi.OpWrite); n != 128 {
		t.Errorf("%d writes", n)
	}
	mustWork(t, c)
}

// TestAbortRaces_RFC7143_11_5_1: writes and aborts of them at every moment. A task
// ends with GOOD and its data and does not exist for the abort, or is aborted and
// its block is wholly old or new; nothing changes after the answer.
func TestAbortRaces_RFC7143_11_5_1(t *testing.T) {
	r := newRig(t, true, iscsi.Limits{})
	for _, names := range [][]string{nil, {"InitialR2T=Yes", "ImmediateData=No"}} {
		cfg := r.config()
		cfg.Keys = initiator.WithKeys(keys(names...)...)
		c := ready(t, cfg)
		for round := range 150 {
			old, data := fill(4096, uint64(round)), fill(4096, uint64(round)+1000)
			lba := uint64(8 * (round % 4))
			do(t, c, &initiator.Command{CDB: initiator.Write16(lba, 8), Out: old})
			task := start(t, c, &initiator.Command{CDB: initiator.Write16(lba, 8), Out: data})
			n := manage(t, c, initiator.AbortTask, initiator.LUN(0), task)
			_, err := task.Wait(wait(t))
			after := fmt.Sprintf("round %d: response %d, task %v", round, n, err)
			if n > 1 || (n == 1) != (err == nil) || err != nil && !errors.Is(err, initiator.ErrAborted) {
				t.Fatal(after)
			}
			first, second := make([]byte, 4096), make([]byte, 4096)
			do(t, c, &initiator.Command{CDB: initiator.Read16(lba, 8), In: first})
			do(t, c, &initiator.Command{CDB: initiator.Read16(lba, 8), In: second})
			if !bytes.Equal(first, data) && (err == nil || !bytes.Equal(first, old)) || !bytes.Equal(first, second) {
				t.Fatalf("%s: wrong data", after)
			}
		}
	}
}
