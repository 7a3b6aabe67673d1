package iscsi

import (
	"slices"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
	"github.com/twinsan/twinsan/server/scsi"
)

// manage processes a task management function request (RFC 7143 section 11.5).
// What the transport still holds back (commands that wait for their number,
// tasks that only swallow data) it ends itself, before the device server is asked.
func (c *connection) manage(h *pdu.Header) error {
	var p pdu.TaskRequest
	p.Decode(h)
	c.mu.Lock()
	switch {
	case p.ITT == pdu.NoTag:
		c.rejectLocked(pdu.RejectInvalidField, h)
		c.mu.Unlock()
		return nil
	case c.tags.find(p.ITT) != nil, slices.Contains(c.managements, p.ITT):
		c.rejectLocked(pdu.RejectInProgress, h)
		c.mu.Unlock()
		return nil
	case len(c.managements) >= c.target.limits.TaskManagement:
		c.rejectLocked(pdu.RejectTooMany, h)
		c.mu.Unlock()
		return nil
	}
	c.managements = append(c.managements, p.ITT)
	c.mu.Unlock()
	c.target.count(&c.target.counters.taskManagement)

	function := scsi.TaskFunction(p.Function)
	switch function {
	case scsi.AbortTask:
		return c.abortTask(&p)
	case scsi.AbortTaskSet, scsi.ClearTaskSet, scsi.LogicalUnitReset:
		c.endUnstarted(p.CmdSN, func(lun uint64) bool { return lun == p.LUN })
	case scsi.TargetWarmReset, scsi.TargetColdReset:
		c.endUnstarted(p.CmdSN, func(uint64) bool { return true })
	case scsi.ClearACA:
	case scsi.TaskReassign:
		c.managed(p.ITT, scsi.ReassignUnsupported)
		return nil
	default:
		c.managed(p.ITT, scsi.FunctionUnsupported)
		return nil
	}
	c.target.device.TaskManagement(c.session.nexus, function, p.LUN, nil, func(r scsi.TaskResponse) {
		c.managed(p.ITT, r)
		if function == scsi.TargetColdReset {
			c.sayGoodbye()
		}
	})
	c.target.Flush() // what other nexuses are told of their tasks
	return nil
}

// sayGoodbye follows the answer to a TARGET COLD RESET. The device server is
// about to drop every session; this one's answer is sent before.
func (c *connection) sayGoodbye() {
	c.mu.Lock()
	c.answered = true
	c.mu.Unlock()
	c.flush()
}

// endUnstarted ends what the device server does not know yet and a function on
// these LUNs applies to: commands numbered below it.
func (c *connection) endUnstarted(cmdSN uint32, matches func(lun uint64) bool) {
	c.mu.Lock()
	for i := len(c.held) - 1; i >= 0; i-- {
		if matches(c.held[i].lun) && pdu.SerialLess(c.held[i].cmdSN, cmdSN) {
			c.dropHeldLocked(i) // its number counts as received
			c.aborted++
		}
	}
	c.endParkedLocked(func(t *task) bool { return !t.begun && matches(t.LUN) })
	c.mu.Unlock()
}

// abortTask is ABORT TASK (RFC 7143 section 11.5.1 and 11.6.1).
func (c *connection) abortTask(p *pdu.TaskRequest) error {
	c.mu.Lock()
	t := c.tags.find(p.RefTag)
	if t != nil && t.cmdSN == p.RefCmdSN {
		if t.begun || t.state != taskCollecting {
			c.mu.Unlock()
			c.target.device.TaskManagement(c.session.nexus, scsi.AbortTask, p.LUN, &t.Task, func(r scsi.TaskResponse) {
				c.managed(p.ITT, r)
			})
			return nil
		}
		c.endParkedLocked(func(k *task) bool { return k == t })
		c.mu.Unlock()
		c.managed(p.ITT, scsi.FunctionComplete)
		return nil
	}
	if !c.window.inside(p.RefCmdSN) || !pdu.SerialLess(p.RefCmdSN, p.CmdSN) {
		c.mu.Unlock()
		// The device server knows whether it is the task or the unit that does not exist.
		c.target.device.TaskManagement(c.session.nexus, scsi.AbortTask, p.LUN, nil, func(r scsi.TaskResponse) {
			c.managed(p.ITT, r)
		})
		return nil
	}
	// The command has not come, or waits for its turn: its number counts as received.
	if i := slices.IndexFunc(c.held, func(k heldPDU) bool { return k.cmdSN == p.RefCmdSN }); i >= 0 {
		c.dropHeldLocked(i)
	}
	c.window.mark(p.RefCmdSN)
	c.aborted++
	c.mu.Unlock()
	c.managed(p.ITT, scsi.FunctionComplete)
	return c.runHeld()
}

// managed sends the response of a task management function. It may be called
// on any goroutine.
func (c *connection) managed(itt uint32, r scsi.TaskResponse) {
	c.mu.Lock()
	if i := slices.Index(c.managements, itt); i >= 0 {
		c.managements = slices.Delete(c.managements, i, i+1)
	}
	if !c.closed {
		p := pdu.TaskResponse{Response: uint8(r), ITT: itt, Numbers: c.numbersLocked()}
		h := c.out.header()
		p.Encode(h)
		c.sealLocked(h, 0)
	}
	busy := c.busy || c.closed
	c.changed.Broadcast()
	c.mu.Unlock()
	if !busy {
		c.flush()
	}
}
