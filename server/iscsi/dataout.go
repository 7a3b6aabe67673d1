package iscsi

import (
	"errors"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
	"github.com/twinsan/twinsan/server/scsi"
)

// errDataOut is the end of a connection whose Data-Out PDUs contradict the R2Ts.
var errDataOut = errors.New("Data-Out PDU out of sequence")

// sendR2TsLocked asks for the data that a parked task still needs, as many
// bursts at a time as negotiated.
func (c *connection) sendR2TsLocked(t *task) {
	if t.asked < t.got {
		t.asked = t.got
	}
	for t.count < int(c.params.maxR2T) && t.asked < t.OutLen {
		n := min(c.params.maxBurst, t.OutLen-t.asked)
		c.ttt++
		if c.ttt == pdu.NoTag {
			c.ttt = 0
		}
		t.bursts[(t.head+t.count)%maxR2T] = burst{ttt: c.ttt, offset: t.asked, length: n}
		t.count++
		c.solicited++
		p := pdu.R2T{
			LUN: t.LUN, ITT: t.itt, TTT: c.ttt, Numbers: c.peekNumbersLocked(),
			R2TSN: t.r2tSN, Offset: t.asked, Length: n,
		}
		t.r2tSN++
		t.asked += n
		h := c.out.header()
		p.Encode(h)
		c.sealLocked(h, 0)
	}
}

// acceptDataLocked checks a Data-Out header against its task and returns where
// the data go; a short or empty dst means that the rest is discarded. Without a
// task the PDU is for one that has ended, and is ignored. It changes nothing.
//
// A DataSN out of sequence stands for data that were lost (RFC 7143 section 7.9):
// the task fails like one with a wrong digest, when the final PDUs have come. All
// else that contradicts the R2T is a protocol error.
func (c *connection) acceptDataLocked(h *pdu.Header) (t *task, dst []byte, err error) {
	t = c.tags.find(h.ITT())
	if t == nil || t.state == taskDoomed {
		return nil, nil, nil
	}
	if t.state != taskCollecting {
		return nil, nil, errDataOut
	}
	var p pdu.DataOut
	p.Decode(h)
	n := uint32(h.DataLen())
	if p.TTT == pdu.NoTag {
		if t.broken || t.unsolicited && p.DataSN != t.dataSN {
			return t, nil, nil
		}
		if t.unsolicited && p.Offset != t.got {
			return nil, nil, errDataOut
		}
		if !t.unsolicited || t.failed || t.got+n > min(c.params.firstBurst, t.Expected) {
			return t, nil, nil
		}
	} else {
		b := &t.bursts[t.head]
		switch {
		case t.count == 0, p.TTT != b.ttt, p.LUN != t.LUN:
			return nil, nil, errDataOut
		case b.broken, p.DataSN != b.dataSN:
			return t, nil, nil
		case p.Offset != b.offset+b.got, n > b.length-b.got, p.Final != (n == b.length-b.got):
			return nil, nil, errDataOut
		}
	}
	if t.failed || t.lease.buf == nil || p.Offset >= t.OutLen {
		return t, nil, nil
	}
	return t, t.lease.buf[p.Offset:min(p.Offset+n, t.OutLen)], nil
}

// dataOut processes a Data-Out PDU that lies whole in the receive buffer.
func (c *connection) dataOut(h *pdu.Header, data []byte, badDigest bool) error {
	c.mu.Lock()
	t, dst, err := c.acceptDataLocked(h)
	if err != nil {
		c.rejectLocked(pdu.RejectProtocol, h)
		c.mu.Unlock()
		return err
	}
	if t == nil {
		c.mu.Unlock()
		return nil
	}
	t.busy = true
	c.mu.Unlock()
	if !badDigest {
		copy(dst, data)
	}
	c.dataArrived(t, h, badDigest)
	return nil
}

// dataArrived accounts for a Data-Out PDU whose data were put in place, and
// goes on with its task when they were the last.
func (c *connection) dataArrived(t *task, h *pdu.Header, badDigest bool) {
	var p pdu.DataOut
	p.Decode(h)
	n := uint32(h.DataLen())
	c.mu.Lock()
	t.busy = false
	if badDigest {
		c.rejectLocked(pdu.RejectDataDigest, h)
	}
	if t.begun && t.Aborted.Load() {
		c.reapLocked(t)
		c.mu.Unlock()
		return
	}
	if badDigest {
		t.fail(ascDigest, ascqDigest)
	}
	if p.TTT == pdu.NoTag {
		c.unsolicitedArrivedLocked(t, &p, n)
	} else {
		b := &t.bursts[t.head]
		if p.DataSN != b.dataSN {
			b.broken = true
			t.fail(ascDigest, ascqDigest)
		}
		b.got += n
		b.dataSN++
		if p.Final { // which comes with the last byte, unless the burst is broken
			t.head = (t.head + 1) % maxR2T
			t.count--
			c.solicited--
		}
	}
	wanted := t.verdict == scsi.WantData && !t.failed
	if wanted && !t.unsolicited && !t.queued {
		c.sendR2TsLocked(t)
	}
	if t.unsolicited || t.count > 0 || t.queued || wanted && t.asked < t.OutLen {
		c.mu.Unlock()
		return
	}
	c.resumeLocked(t)
	c.mu.Unlock()
	switch {
	case t.failed && t.begun:
		c.forget(t)
		c.respond(t)
	case !t.begun:
		c.respond(t)
	case t.verdict == scsi.WantData:
		t.Out = t.lease.buf[:t.OutLen]
		c.kickDue = true
		c.target.device.Execute(&t.Task)
	default:
		c.startRead(t)
	}
}

// unsolicitedArrivedLocked accounts for n unsolicited bytes.
func (c *connection) unsolicitedArrivedLocked(t *task, p *pdu.DataOut, n uint32) {
	limit := min(c.params.firstBurst, t.Expected)
	if t.unsolicited && p.DataSN != t.dataSN {
		t.broken = true
		if t.begun {
			t.fail(ascDigest, ascqDigest)
		}
	}
	if t.broken || !t.unsolicited || t.got+n > limit {
		if t.begun {
			t.fail(ascData, ascqUnexpectedData)
		}
		if t.queued && c.target.buffers.cancel(&t.wait) {
			t.queued = false
		}
	}
	t.dataSN++
	t.got += n
	t.unsolicited = !p.Final
	if p.Final && !t.failed && t.verdict == scsi.WantData && t.got < limit {
		t.fail(ascData, ascqNotEnoughData)
	}
}
