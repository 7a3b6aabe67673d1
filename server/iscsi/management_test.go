package iscsi

import (
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
	"github.com/twinsan/twinsan/server/scsi"
)

// manage sends an immediate task management request.
func (c *client) manage(f scsi.TaskFunction, lun uint64, ref, refCmdSN uint32) uint32 {
	c.tb.Helper()
	c.itt++
	p := pdu.TaskRequest{Immediate: true, Function: uint8(f), LUN: lun, ITT: c.itt, RefTag: ref, CmdSN: c.cmdSN, RefCmdSN: refCmdSN}
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, nil)
	return c.itt
}

func (c *client) managed(itt uint32, want scsi.TaskResponse) {
	c.tb.Helper()
	r := c.expect(pdu.OpTaskResponse)
	var p pdu.TaskResponse
	p.Decode(&r.Header)
	if p.ITT != itt || scsi.TaskResponse(p.Response) != want {
		c.tb.Errorf("task management response %d for tag %d, want %d for %d", p.Response, p.ITT, want, itt)
	}
}

// TestAbortExecuting: the answer waits for the task, which gets no response.
func TestAbortExecuting(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	b.device.gate(true)
	itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: write10(0, 1)}, pattern(512, 1))
	tmf := c.manage(scsi.AbortTask, 0, itt, c.cmdSN-1)
	c.quiet() // no answer while the write is with the device server
	b.device.gate(false)
	c.managed(tmf, scsi.FunctionComplete)
	c.quiet()
	if data, _ := c.read(0, 1, 512); data[1] != 0 {
		t.Error("aborted write was done")
	}
	// The place in the window came back, and the tag may be used again.
	if c.last.MaxCmdSN != c.last.ExpCmdSN+127 {
		t.Errorf("window %+v", c.last)
	}
	tmf = c.manage(scsi.AbortTask, 0, itt, c.cmdSN-2)
	c.managed(tmf, scsi.NoSuchTask)
}

// TestAbortEnded: a task that has ended does not exist, like one that never was.
func TestAbortEnded(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	itt, sn := c.command(pdu.SCSICommand{Final: true}, nil), c.cmdSN-1
	c.response(itt)
	c.managed(c.manage(scsi.AbortTask, 0, itt, sn), scsi.NoSuchTask)
	c.managed(c.manage(scsi.AbortTask, 0, itt, sn-1), scsi.NoSuchTask)
	c.managed(c.manage(scsi.AbortTask, 0, itt+1000, sn), scsi.NoSuchTask)
	c.managed(c.manage(scsi.AbortTask, 0, 0, 0), scsi.NoSuchTask) // like an unused place
}

// TestColdReset: the answer reaches the initiator before its session is dropped
// with all others.
func TestColdReset(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	other := dial(t, b)
	other.isid[5]++
	other.login()
	b.device.mu.Lock()
	b.device.cold = func() { b.DropSessions("", "cold reset") }
	b.device.mu.Unlock()
	c.managed(c.manage(scsi.TargetColdReset, 0, pdu.NoTag, 0), scsi.FunctionComplete)
	if _, err := c.receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the answer: %v, want an orderly end", err)
	}
	other.expectClosed()
	eventually(t, "connections gone", func() bool {
		return !slices.ContainsFunc(b.Sessions(), func(s SessionInfo) bool { return s.Peer != "" })
	})
}

// TestManagementTags: the tag of a function under way is in use.
func TestManagementTags(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	b.device.gate(true)
	c.command(pdu.SCSICommand{Final: true}, nil)
	tmf := c.manage(scsi.AbortTaskSet, 0, pdu.NoTag, 0)
	c.itt--
	c.manage(scsi.AbortTaskSet, 0, pdu.NoTag, 0)
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectInProgress {
		t.Errorf("function: reject % x", r.Header[:4])
	}
	c.itt--
	c.command(pdu.SCSICommand{Final: true}, nil)
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectInProgress {
		t.Errorf("command: reject % x", r.Header[:4])
	}
	b.device.gate(false)
	c.managed(tmf, scsi.FunctionComplete)
	c.itt--
	c.response(c.command(pdu.SCSICommand{Final: true}, nil))
}

// TestNumberedFunction: a function that is not immediate takes its turn.
func TestNumberedFunction(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	c.itt++
	p := pdu.TaskRequest{Function: uint8(scsi.AbortTaskSet), ITT: c.itt, RefTag: pdu.NoTag, CmdSN: c.cmdSN + 1}
	tmf := c.itt
	var h pdu.Header
	p.Encode(&h)
	c.send(&h, nil)
	c.quiet() // the command before it has not come
	itt := c.command(pdu.SCSICommand{Final: true}, nil)
	c.response(itt)
	c.managed(tmf, scsi.FunctionComplete)
	c.cmdSN++
	c.quiet()
	if c.last.ExpCmdSN != c.cmdSN || c.last.MaxCmdSN != c.cmdSN+127 {
		t.Errorf("window %+v, next is %d", c.last, c.cmdSN)
	}
}

// TestRejectedFunction: whatever the device server answers is passed on.
func TestRejectedFunction(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	for _, want := range []scsi.TaskResponse{scsi.FunctionRejected, scsi.AuthorizationFailed} {
		b.device.mu.Lock()
		b.device.refuse = want
		b.device.mu.Unlock()
		c.managed(c.manage(scsi.LogicalUnitReset, 0, pdu.NoTag, 0), want)
	}
}

// TestManagementUnderLoad: with window and memory used up a function still gets
// through and frees both.
func TestManagementUnderLoad(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limits.Buffers, c.Limits.Window = 8<<20, 8 })
	c := dial(t, b).login("ImmediateData=No", "InitialR2T=Yes")
	for range 8 { // 2 MiB are its share; the others wait in line
		c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 8 << 20, CDB: write10(0, 16384)}, nil)
	}
	for range 8 {
		c.expect(pdu.OpR2T) // of the first
	}
	c.quiet()
	if c.last.MaxCmdSN+1 != c.last.ExpCmdSN || b.Stats().MemoryWaits != 7 {
		t.Fatalf("window %+v, %+v", c.last, b.Stats())
	}
	tmf := c.manage(scsi.AbortTaskSet, 0, pdu.NoTag, 0)
	for {
		r, err := c.receive()
		if err != nil {
			t.Fatal(err)
		}
		if r.Opcode() == pdu.OpTaskResponse && r.ITT() == tmf {
			break
		}
		if r.Opcode() != pdu.OpR2T && r.Opcode() != pdu.OpNopIn {
			t.Fatalf("got % x", r.Header[:])
		}
	}
	c.quiet()
	if c.last.MaxCmdSN != c.last.ExpCmdSN+7 || b.Stats().BuffersInUse != 0 {
		t.Errorf("window %+v, %+v", c.last, b.Stats())
	}
}

// TestAbortCollecting: a task that waits for Data-Out, before and after R2T; data
// that still come are ignored.
func TestAbortCollecting(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("ImmediateData=No")
	itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 8192, CDB: write10(0, 16)}, nil)
	r := c.r2t(itt)
	c.managed(c.manage(scsi.AbortTask, 0, itt, c.cmdSN), scsi.NoSuchTask) // RefCmdSN is not the task's, nor below
	c.managed(c.manage(scsi.AbortTask, 0, itt, c.cmdSN-1), scsi.FunctionComplete)
	c.answerR2T(r, make([]byte, 8192), 4096)
	c.quiet()
	// A refused task that swallows its data.
	itt = c.command(pdu.SCSICommand{Write: true, LUN: 5, Expected: 8192, CDB: write10(0, 16)}, nil)
	c.managed(c.manage(scsi.AbortTask, 5, itt, c.cmdSN-1), scsi.FunctionComplete)
	c.dataOut(pdu.DataOut{Final: true, ITT: itt, TTT: pdu.NoTag}, make([]byte, 8192))
	c.quiet()
	if b.device.count().executed != 0 || b.Stats().TasksAborted != 2 {
		t.Errorf("executed %d, %+v", b.device.count().executed, b.Stats())
	}
}

// TestAbortNotReceived: a number that has not come counts as received.
func TestAbortNotReceived(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login()
	first := c.cmdSN
	c.cmdSN = first + 2
	held := c.command(pdu.SCSICommand{Final: true}, nil) // first and first+1 are missing
	later := c.command(pdu.SCSICommand{Final: true}, nil)
	c.managed(c.manage(scsi.AbortTask, 0, held, first+2), scsi.FunctionComplete)
	c.managed(c.manage(scsi.AbortTask, 0, 4711, first), scsi.FunctionComplete)
	if c.ping(nil); c.expect(pdu.OpNopIn).ExpCmdSN() != first+1 {
		t.Errorf("window %+v", c.last)
	}
	c.managed(c.manage(scsi.AbortTask, 0, 4712, first+4), scsi.NoSuchTask) // not below the function's number
	c.managed(c.manage(scsi.AbortTask, 0, 4713, first+1000), scsi.NoSuchTask)
	c.managed(c.manage(scsi.AbortTask, 0, 4714, first+1), scsi.FunctionComplete)
	if p, _ := c.response(later); p.ExpCmdSN != first+4 || p.MaxCmdSN != first+4+127 {
		t.Errorf("%+v", p)
	}
	c.quiet()
}

// TestTaskSets: what functions reach in the transport and in the device server.
func TestTaskSets(t *testing.T) {
	for _, f := range []scsi.TaskFunction{scsi.AbortTaskSet, scsi.ClearTaskSet, scsi.LogicalUnitReset, scsi.TargetWarmReset} {
		b := newBench(t, nil)
		c := dial(t, b).login("ImmediateData=No")
		b.device.gate(true)
		c.command(pdu.SCSICommand{Final: true}, nil) // executing
		c.r2t(c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 8192, CDB: write10(0, 16)}, nil))
		refused := c.command(pdu.SCSICommand{Write: true, LUN: 5, Expected: 512, CDB: write10(0, 1)}, nil)
		c.cmdSN++
		c.command(pdu.SCSICommand{Final: true}, nil) // held
		tmf := c.manage(f, 0, pdu.NoTag, 0)
		c.quiet()
		b.device.gate(false)
		c.managed(tmf, scsi.FunctionComplete)
		c.cmdSN -= 2
		c.response(c.command(pdu.SCSICommand{Final: true}, nil)) // fills the gap; the held one is gone
		c.cmdSN++
		c.dataOut(pdu.DataOut{Final: true, ITT: refused, TTT: pdu.NoTag}, make([]byte, 512))
		if f != scsi.TargetWarmReset { // it is on another logical unit
			c.response(refused)
		}
		c.quiet()
		if c.last.ExpCmdSN != c.cmdSN || c.last.MaxCmdSN != c.last.ExpCmdSN+127 {
			t.Errorf("function %d: window %+v", f, c.last)
		}
	}
}

// TestClearedByAnother: with TAS=1 the other nexus sees TASK ABORTED, also for a
// task that waits for data.
func TestClearedByAnother(t *testing.T) {
	b := newBench(t, nil)
	c := dial(t, b).login("ImmediateData=No")
	other := dial(t, b)
	other.isid[5]++
	other.login()
	itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 8192, CDB: write10(0, 16)}, nil)
	c.r2t(itt)
	tmf := other.manage(scsi.ClearTaskSet, 0, pdu.NoTag, 0)
	other.managed(tmf, scsi.FunctionComplete)
	if p, _ := c.response(itt); p.Status != statusTaskAborted {
		t.Errorf("%+v", p)
	}
	if b.device.count().forgotten != 1 {
		t.Errorf("%d forgotten", b.device.forgotten)
	}
}

// TestSilentEndOpensWindow: when the window is closed and a task ends without
// a response, the initiator is told that it may send again.
func TestSilentEndOpensWindow(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limits.Window = 1 })
	c := dial(t, b).login("ImmediateData=No")
	itt := c.command(pdu.SCSICommand{Final: true, Write: true, Expected: 512, CDB: write10(0, 1)}, nil)
	c.r2t(itt)
	c.quiet()
	if c.last.MaxCmdSN+1 != c.last.ExpCmdSN {
		t.Fatalf("window %+v", c.last)
	}
	b.device.mu.Lock()
	var task *scsi.Task
	for task = range b.device.state {
		task.Aborted.Store(true) // as by another nexus with TAS=0
	}
	b.device.mu.Unlock()
	b.AbortWaiting(task)
	b.Flush()
	r := c.expect(pdu.OpNopIn)
	if r.ITT() != pdu.NoTag || r.TTT() != pdu.NoTag || c.last.MaxCmdSN != c.last.ExpCmdSN {
		t.Errorf("% x", r.Header[:])
	}
	b.AbortWaiting(task) // late: nothing happens
	c.quiet()
}

// TestOtherFunctions: what is answered without the device server, and passed on.
func TestOtherFunctions(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Limits.TaskManagement = 2 })
	c := dial(t, b).login()
	c.managed(c.manage(scsi.TaskReassign, 0, 1, 0), scsi.ReassignUnsupported)
	c.managed(c.manage(9, 0, 1, 0), scsi.FunctionUnsupported)
	c.managed(c.manage(127, 0, 1, 0), scsi.FunctionUnsupported)
	c.managed(c.manage(scsi.LogicalUnitReset, 7, 1, 0), scsi.NoSuchLUN)
	c.managed(c.manage(scsi.ClearACA, 7, 1, 0), scsi.NoSuchLUN)
	b.device.mu.Lock()
	functions := slices.Clone(b.device.functions)
	b.device.mu.Unlock()
	if want := []scsi.TaskFunction{scsi.LogicalUnitReset, scsi.ClearACA}; !slices.Equal(functions, want) {
		t.Errorf("device server saw %v", functions)
	}
	b.device.gate(true)
	c.command(pdu.SCSICommand{Final: true}, nil)
	first := c.manage(scsi.AbortTaskSet, 0, 0, 0)
	second := c.manage(scsi.AbortTaskSet, 0, 0, 0)
	c.manage(scsi.AbortTaskSet, 0, 0, 0)
	if r := c.expect(pdu.OpReject); r.Header[2] != pdu.RejectTooMany {
		t.Errorf("% x", r.Header[:4])
	}
	b.device.gate(false)
	c.managed(first, scsi.FunctionComplete)
	c.managed(second, scsi.FunctionComplete)
}
