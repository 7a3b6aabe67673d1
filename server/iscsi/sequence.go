package iscsi

import (
	"slices"

	"github.com/twinsan/twinsan/server/iscsi/pdu"
)

// maxHeldBytes bounds the PDUs that are kept while an earlier command number is
// missing. On one TCP connection a gap is a fault of the initiator; above the
// bound the connection ends.
const maxHeldBytes = 1 << 20

// heldPDU is a command that came ahead of its turn, copied from the receive
// buffer, with the unsolicited data that followed it.
type heldPDU struct {
	cmdSN uint32
	itt   uint32
	lun   uint64
	parts []heldPart
}

type heldPart struct {
	raw       []byte
	badDigest bool
}

// sequence brings PDUs into the order of their command numbers (RFC 7143
// section 4.2.2.1) and starts them. Raw is the whole PDU.
func (c *connection) sequence(h *pdu.Header, raw, data []byte, badDigest bool) error {
	op := h.Opcode()
	switch op {
	case pdu.OpDataOut:
		if len(c.held) > 0 && h.TTT() == pdu.NoTag {
			if i := c.findHeld(h.ITT()); i >= 0 {
				return c.hold(&c.held[i], raw, badDigest)
			}
		}
		return c.dataOut(h, data, badDigest)
	case pdu.OpSNACK:
		c.reject(pdu.RejectSNACK, h)
		return nil
	}
	if h.Immediate() || op == pdu.OpNopOut && h.ITT() == pdu.NoTag {
		_, err := c.dispatch(h, raw, data, badDigest)
		return err
	}
	c.mu.Lock()
	arrival := c.window.classify(h.CmdSN())
	switch arrival {
	case arrivalDrop:
		c.droppedPDUs++
	case arrivalNext:
		c.takeTurnLocked(op)
	case arrivalAhead:
		c.window.mark(h.CmdSN())
	}
	c.mu.Unlock()
	switch arrival {
	case arrivalDrop:
		return nil // silently: an answer would confuse, a close would hurt
	case arrivalAhead:
		if len(c.held) == 0 {
			c.mu.Lock()
			c.gapSince = c.target.elapsed()
			c.mu.Unlock()
		}
		c.held = append(c.held, heldPDU{cmdSN: h.CmdSN(), itt: h.ITT(), lun: h.LUN()})
		return c.hold(&c.held[len(c.held)-1], raw, badDigest)
	}
	if err := c.run(h, raw, data, badDigest); err != nil {
		return err
	}
	return c.runHeld()
}

// takeTurnLocked advances the window for a PDU of this type. Only commands stay
// in it; others have ended when they are answered.
func (c *connection) takeTurnLocked(op pdu.Opcode) {
	c.window.advance()
	if op != pdu.OpSCSICommand {
		c.window.release()
	}
}

// run dispatches a numbered PDU whose turn it is.
func (c *connection) run(h *pdu.Header, raw, data []byte, badDigest bool) error {
	started, err := c.dispatch(h, raw, data, badDigest)
	if !started && h.Opcode() == pdu.OpSCSICommand {
		c.mu.Lock()
		c.window.release()
		c.mu.Unlock()
	}
	return err
}

// runHeld runs what was held and is next now.
func (c *connection) runHeld() error {
	for {
		c.mu.Lock()
		if !c.window.nextCame() {
			if c.window.held == 0 {
				c.gapSince = 0
			}
			c.mu.Unlock()
			return nil
		}
		sn := c.window.exp
		i := slices.IndexFunc(c.held, func(p heldPDU) bool { return p.cmdSN == sn })
		if i < 0 { // aborted before it came
			c.window.advance()
			c.window.release()
			c.mu.Unlock()
			continue
		}
		held := c.held[i]
		c.dropHeldLocked(i)
		c.takeTurnLocked((*pdu.Header)(held.parts[0].raw).Opcode())
		c.mu.Unlock()
		for n, part := range held.parts {
			h := (*pdu.Header)(part.raw)
			start := c.layout.DataStart(h)
			data := part.raw[start : start+h.DataLen()]
			var err error
			if n == 0 {
				err = c.run(h, part.raw, data, part.badDigest)
			} else {
				err = c.dataOut(h, data, part.badDigest)
			}
			if err != nil {
				return err
			}
		}
	}
}

func (c *connection) findHeld(itt uint32) int {
	return slices.IndexFunc(c.held, func(p heldPDU) bool { return p.itt == itt })
}

// hold copies a PDU out of the receive buffer.
func (c *connection) hold(p *heldPDU, raw []byte, badDigest bool) error {
	if c.heldBytes+len(raw) > maxHeldBytes {
		return errHeld
	}
	c.heldBytes += len(raw)
	p.parts = append(p.parts, heldPart{slices.Clone(raw), badDigest})
	return nil
}

// dropHeldLocked removes a held command.
func (c *connection) dropHeldLocked(i int) {
	for _, part := range c.held[i].parts {
		c.heldBytes -= len(part.raw)
	}
	c.held = slices.Delete(c.held, i, i+1)
}

// dispatch starts one PDU. Started says that a command has become a task, which
// keeps its place in the window.
func (c *connection) dispatch(h *pdu.Header, raw, data []byte, badDigest bool) (started bool, err error) {
	op := h.Opcode()
	if op == pdu.OpSCSICommand {
		ahs := raw[pdu.HeaderLen : pdu.HeaderLen+h.AHSLen()]
		return c.command(h, ahs, data, badDigest), nil
	}
	if badDigest {
		c.reject(pdu.RejectDataDigest, h)
		return false, nil
	}
	switch op {
	case pdu.OpTaskRequest:
		return false, c.manage(h)
	case pdu.OpNopOut:
		c.nopOut(h, data)
		return false, nil
	case pdu.OpTextRequest:
		return false, c.textRequest(h, data)
	default: // OpLogout; checkHeader lets nothing else through
		return false, c.logout(h)
	}
}
