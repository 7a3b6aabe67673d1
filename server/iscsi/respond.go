package iscsi

import (
	"encoding/binary"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// SCSI status codes (SAM-5 "Status codes") that the transport itself knows.
const (
	statusGood           = 0x00
	statusCheckCondition = 0x02
	statusBusy           = 0x08
	statusTaskSetFull    = 0x28
	statusTaskAborted    = 0x40
)

// failure is a result that the transport gives a task in place of the device
// server's. It is kept apart from the task's status, which the device server
// may write as long as it knows the task.
type failure struct {
	status    byte
	asc, ascq byte
}

// fail lets the task end with CHECK CONDITION, ABORTED COMMAND and this
// additional sense (RFC 7143 section 11.4.7.2). The first failure counts.
func (t *task) fail(asc, ascq byte) {
	if !t.failed {
		t.failed = true
		t.failure = failure{statusCheckCondition, asc, ascq}
	}
}

// refuse lets the task end with BUSY or TASK SET FULL.
func (t *task) refuse(status byte) {
	if !t.failed {
		t.failed = true
		t.failure = failure{status: status}
	}
}

// applyFailure makes the failure the task's result, in fixed format sense. The
// device server does not know the task (any more).
func (t *task) applyFailure() {
	t.Status, t.SenseLen, t.Transfer = t.failure.status, 0, 0
	if t.Status == statusCheckCondition {
		t.Sense = [64]byte{0: 0x70, 2: 0x0b, 7: 10, 12: t.failure.asc, 13: t.failure.ascq}
		t.SenseLen = 18
	}
}

// residual compares what the CDB asks for with what the initiator expects (RFC
// 7143 section 11.4.5.2). A command whose R and W bits contradict its CDB moved
// nothing although it ended well: all that the CDB asks for is missing.
func (t *task) residual() (over, under bool, n uint32) {
	expected := t.Expected
	if t.Status == statusGood && t.Transfer > 0 && t.InLen == 0 && t.OutLen == 0 {
		expected = 0
	}
	switch {
	case t.Transfer > expected:
		return true, false, t.Transfer - expected
	case t.Transfer < expected:
		return false, true, expected - t.Transfer
	}
	return false, false, 0
}

// respondLocked appends a task's Data-In and response. Its buffer, when it is
// long, goes along and is released after the write.
func (c *connection) respondLocked(t *task) {
	if n := min(t.Transfer, t.InLen, uint32(len(t.In))); t.Status == statusGood && t.SenseLen == 0 && n > 0 {
		c.dataInLocked(t, t.In[:n])
		return
	}
	if t.Status != statusGood {
		c.failures++
	}
	p := pdu.SCSIResponse{Status: t.Status, ITT: t.itt}
	p.Overflow, p.Underflow, p.Residual = t.residual()
	h := c.out.header()
	p.Numbers = c.responseNumbersLocked(t)
	p.Encode(h)
	if t.SenseLen == 0 {
		c.sealLocked(h, 0)
		return
	}
	var sense [2 + 64]byte
	binary.BigEndian.PutUint16(sense[:], uint16(t.SenseLen))
	n := 2 + copy(sense[2:], t.Sense[:t.SenseLen])
	c.sealLocked(h, n)
	c.dataLocked(sense[:n])
}

// responseNumbersLocked returns the numbers of a task's last PDU: the place in
// the window that the task is about to give back is already counted.
func (c *connection) responseNumbersLocked(t *task) pdu.Numbers {
	n := c.numbersLocked()
	if !t.immediate {
		n.MaxCmdSN++
	}
	return n
}

// dataInLocked appends data in PDUs as long as the initiator takes, each
// sequence at most MaxBurstLength, status in the last one.
func (c *connection) dataInLocked(t *task, data []byte) {
	inserts := len(data) > copyData
	var burst uint32
	p := pdu.DataIn{LUN: t.LUN, ITT: t.itt, TTT: pdu.NoTag}
	for off := 0; off < len(data); {
		n := min(uint32(len(data)-off), c.params.maxBurst-burst)
		if n > c.params.maxSend {
			n = c.params.maxSend &^ 3 // inside a sequence whole words only (section 11.7.7)
		}
		part := data[off : off+int(n)]
		burst += n
		last := off+int(n) == len(data)
		p.Offset = uint32(off)
		p.Final = last || burst == c.params.maxBurst
		if p.Final {
			burst = 0
		}
		h := c.out.header()
		if last {
			p.HasStatus = true
			p.Overflow, p.Underflow, p.Residual = t.residual()
			p.Numbers = c.responseNumbersLocked(t)
		} else {
			p.Numbers = c.peekNumbersLocked()
			p.StatSN = 0
		}
		p.Encode(h)
		c.sealLocked(h, len(part))
		if inserts {
			var l lease
			if last {
				l, t.lease = t.lease, lease{}
			}
			c.out.insert(part, l)
			c.tailLocked(part)
		} else {
			c.dataLocked(part)
		}
		p.DataSN++
		off += int(n)
	}
}

// fitsInline reports whether a task's Data-In is one PDU of moderate size.
func (c *connection) fitsInline(t *task) bool {
	return t.InLen <= min(inlineData, c.params.maxSend, c.params.maxBurst)
}

// tryInline lets the device server answer a task that fitsInline straight into
// the output buffer, where the Data-In belongs. True: the task has ended. The mutex is
// held meanwhile, so that nothing is appended in between; TryExecute neither
// waits nor calls back.
func (c *connection) tryInline(t *task) bool {
	n := int(t.InLen)
	c.mu.Lock()
	b := c.out
	start := len(b.buf)
	b.grow(pdu.HeaderLen)
	if c.layout.HeaderDigest {
		b.grow(pdu.DigestLen)
	}
	at := len(b.buf)
	b.grow(n)
	t.In = b.buf[at : at+n : at+n]
	if !c.target.device.TryExecute(&t.Task) {
		b.buf = b.buf[:start]
		t.In = nil
		c.mu.Unlock()
		return false
	}
	got := min(int(t.Transfer), n)
	if t.Status != statusGood || t.SenseLen != 0 || got == 0 {
		b.buf = b.buf[:start]
		c.respondLocked(t)
	} else {
		p := pdu.DataIn{LUN: t.LUN, ITT: t.itt, TTT: pdu.NoTag, Final: true, HasStatus: true}
		p.Overflow, p.Underflow, p.Residual = t.residual()
		p.Numbers = c.responseNumbersLocked(t)
		h := (*pdu.Header)(b.buf[start:])
		p.Encode(h)
		h.SetDataLen(got)
		if c.layout.HeaderDigest {
			pdu.PutDigest(b.buf[start+pdu.HeaderLen:], pdu.Digest(h[:]))
		}
		b.buf = b.buf[:at+got]
		b.size += len(b.buf) - start
		c.tailLocked(t.In[:got])
	}
	c.freeTaskLocked(t)
	c.flushDue = c.out.size >= flushAt
	c.mu.Unlock()
	return true
}

// openWindowLocked tells the initiator of the command window with a NOP-In that
// wants no answer.
func (c *connection) openWindowLocked() {
	h := c.out.header()
	p := pdu.NopIn{ITT: pdu.NoTag, TTT: pdu.NoTag, Numbers: c.peekNumbersLocked()}
	p.Encode(h)
	c.sealLocked(h, 0)
}
