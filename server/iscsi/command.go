package iscsi

import (
	"slices"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
	"github.com/twinsan/twinsan/server/scsi"
)

// Additional sense of ABORTED COMMAND for data that went wrong (RFC 7143
// section 11.4.7.2).
const (
	ascData               = 0x0c
	ascqUnexpectedData    = 0x0c
	ascqNotEnoughData     = 0x0d
	ascDigest, ascqDigest = 0x47, 0x05
)

// command starts a task. Data is the immediate data in the receive buffer. It
// returns false when the command was rejected and there is no task.
func (c *connection) command(h *pdu.Header, ahs, data []byte, badDigest bool) (started bool) {
	itt := h.ITT()
	final, read, write := h[1]&0x80 != 0, h[1]&0x40 != 0, h[1]&0x20 != 0
	extended := false
	if len(ahs) > 0 {
		a, err := pdu.ParseAHS(ahs)
		if err != nil {
			c.reject(pdu.RejectProtocol, h)
			return false
		}
		extended = a.ExtendedCDB != nil
	}
	if itt == pdu.NoTag || !final && !write {
		c.reject(pdu.RejectInvalidField, h)
		return false
	}
	immediate := h.Immediate()
	c.mu.Lock()
	switch {
	case c.tags.find(itt) != nil, slices.Contains(c.managements, itt):
		c.rejectLocked(pdu.RejectInProgress, h)
		c.mu.Unlock()
		return false
	case immediate && c.immediates >= c.target.limits.Immediate:
		c.rejectLocked(pdu.RejectTooMany, h)
		c.mu.Unlock()
		return false
	}
	t := c.newTaskLocked(itt)
	t.immediate = immediate
	if immediate {
		c.immediates++
	}
	c.commands++
	if badDigest {
		c.rejectLocked(pdu.RejectDataDigest, h)
	}
	c.mu.Unlock()

	t.Nexus = c.session.nexus
	t.LUN = h.LUN()
	copy(t.CDB[:], h[32:])
	t.Extended = extended
	t.Read, t.Write = read, write
	t.Expected = h.TTT() // same place in the header
	t.cmdSN = h.CmdSN()
	t.Out, t.In, t.OutBorrowed = nil, nil, false
	t.OutLen, t.InLen, t.Transfer = 0, 0, 0
	t.Status, t.SenseLen = 0, 0
	t.unsolicited = !final
	t.got = uint32(len(data))
	if !write {
		t.got = 0
	}
	switch {
	case badDigest:
		t.Aborted.Store(false)
		t.fail(ascDigest, ascqDigest)
	case !final && c.params.initialR2T,
		len(data) > 0 && (!write || !c.params.immediateData),
		t.got > c.params.firstBurst, t.got > t.Expected:
		t.Aborted.Store(false)
		t.fail(ascData, ascqUnexpectedData)
	default:
		t.verdict = c.target.device.Begin(&t.Task)
		t.begun = t.verdict != scsi.Finished
	}
	c.start(t, data)
	return true
}

// start continues a task whose command was decoded.
func (c *connection) start(t *task, data []byte) {
	switch {
	case !t.unsolicited && !t.begun:
		c.respond(t)
	case t.verdict == scsi.WantData:
		c.startWrite(t, data)
	case t.unsolicited:
		// The data come although nobody wants them; the response waits for their end.
		c.park(t)
	default:
		c.startRead(t)
	}
}

// respond ends a task that the device server does not have (any more).
func (c *connection) respond(t *task) {
	if t.failed && !t.Aborted.Load() {
		t.applyFailure()
	}
	c.mu.Lock()
	c.finishLocked(t)
	c.mu.Unlock()
}

// forget takes a task that will not be executed from the device server. An
// abort that came before keeps its result.
func (c *connection) forget(t *task) {
	aborted := t.Aborted.Load() && t.Status == statusTaskAborted
	c.target.device.Forget(&t.Task)
	t.begun = false
	t.SenseLen, t.Transfer, t.Status = 0, 0, statusGood
	if aborted {
		t.Status = statusTaskAborted
	}
}

// park lets a task wait for Data-Out.
func (c *connection) park(t *task) {
	c.mu.Lock()
	c.collectLocked(t)
	if t.begun && t.Aborted.Load() {
		c.reapLocked(t)
	}
	c.mu.Unlock()
}

// startRead runs a task that wants no Data-Out: at once when the device server
// can, else with a buffer that stays.
func (c *connection) startRead(t *task) {
	d := c.target.device
	inline := c.fitsInline(t)
	if inline && c.tryInline(t) {
		return
	}
	if t.InLen > 0 {
		l, ok := c.target.buffers.try(&c.account, t.InLen)
		if !ok {
			c.waitForMemory(t, t.InLen)
			return
		}
		t.lease = l
		t.In = l.buf[:t.InLen]
		if !inline && d.TryExecute(&t.Task) {
			c.respond(t)
			return
		}
	}
	c.kickDue = true
	d.Execute(&t.Task)
}

// waitForMemory parks a task in line for a buffer of n bytes.
func (c *connection) waitForMemory(t *task, n uint32) {
	c.mu.Lock()
	c.collectLocked(t)
	t.queued = true
	c.waits++
	if l, ok := c.target.buffers.wait(&t.wait, t, &c.account, n); ok {
		t.wait.got = l
		c.mu.Unlock()
		t.memoryGranted()
		c.kickDue = true
		return
	}
	if t.Aborted.Load() {
		c.reapLocked(t)
	}
	c.mu.Unlock()
}

// startWrite runs a task whose data are all in the receive buffer, or collects
// them in a buffer of the pool.
func (c *connection) startWrite(t *task, data []byte) {
	if !t.unsolicited && uint32(len(data)) >= t.OutLen {
		t.Out = data[:t.OutLen:t.OutLen]
		t.OutBorrowed = true
		c.kickDue = true
		c.target.device.Execute(&t.Task)
		return
	}
	l, ok := c.target.buffers.try(&c.account, t.OutLen)
	if !ok && len(data) == 0 && !t.unsolicited {
		c.waitForMemory(t, t.OutLen) // the data are asked for when there is memory
		return
	}
	if !ok { // they come, or have come, unasked
		t.refuse(c.loadStatus())
		c.forget(t)
		if t.unsolicited {
			c.park(t)
		} else {
			c.respond(t)
		}
		return
	}
	t.lease = l
	copy(l.buf[:t.OutLen], data)
	c.mu.Lock()
	c.collectLocked(t)
	if t.Aborted.Load() {
		c.reapLocked(t)
	} else if !t.unsolicited {
		c.sendR2TsLocked(t)
	}
	c.mu.Unlock()
}

// loadStatus is the status of a command that there is no memory for (SAM-5
// "Status codes"): BUSY for the only task of a session, else TASK SET FULL.
func (c *connection) loadStatus() byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refusals++
	if c.tasks > 1 {
		return statusTaskSetFull
	}
	return statusBusy
}
