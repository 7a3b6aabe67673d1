package initiator

import (
	"bytes"
	"context"
	"strings"
)

// Task management functions (RFC 7143, section 11.5.1).
const (
	AbortTask        = 1
	AbortTaskSet     = 2
	ClearACA         = 3
	ClearTaskSet     = 4
	LogicalUnitReset = 5
	TargetWarmReset  = 6
	TargetColdReset  = 7
	TaskReassign     = 8
)

// request is one that has a single answer: NOP, text, logout, task management.
type request struct {
	answer   byte       // opcode
	onAnswer func(*PDU) // under Conn.mu, before anything that comes after it
	done     chan struct{}
	pdu      *PDU
	err      error
}

func (r *request) end(p *PDU, err error) {
	r.pdu, r.err = p, err
	close(r.done)
}

// ask numbers and sends a request and waits for its answer.
func (c *Conn) ask(ctx context.Context, p *PDU, answer byte, onAnswer func(*PDU)) (*PDU, error) {
	r := &request{answer: answer, onAnswer: onAnswer, done: make(chan struct{})}
	if err := c.lockWhen(ctx, func() bool { return p.BHS[0]&Immediate != 0 || c.openLocked() }); err != nil {
		return nil, err
	}
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	itt := c.takeITT()
	p.Put32(16, itt)
	p.Put32(24, c.cmdSN)
	if p.BHS[0]&Immediate == 0 {
		c.cmdSN++
	}
	p.Put32(28, c.expStatSN)
	c.requests[itt] = r
	err := c.sendLocked(p)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-r.done:
		return r.pdu, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// deliverReject ends the request whose header came back, except for a command
// that still is to end by itself: one with damaged data, or the older one whose
// tag was used again.
func (c *Conn) deliverReject(p *PDU) {
	var h PDU
	copy(h.BHS[:], p.Data)
	err := &RejectError{Reason: p.BHS[2]}
	if r := c.requests[h.ITT()]; r != nil {
		delete(c.requests, h.ITT())
		r.end(nil, err)
	}
	const dataDigest, inProgress = 2, 7
	if t := c.tasks[h.ITT()]; t != nil && h.Opcode() == OpCommand && err.Reason != dataDigest && err.Reason != inProgress {
		delete(c.tasks, h.ITT())
		t.end(err)
	}
}

// Ping sends a NOP-Out, immediate or in order, and returns the data of the answer.
func (c *Conn) Ping(ctx context.Context, data []byte, immediate bool) ([]byte, error) {
	p := NewPDU(OpNopOut, 0)
	if immediate {
		p.BHS[0] |= Immediate
	}
	p.Put32(20, NoTag)
	p.Data = data
	r, err := c.ask(ctx, p, OpNopIn, nil)
	if err != nil {
		return nil, err
	}
	if r.U32(20) != NoTag {
		return nil, violation("11.19.1", "target task tag %08x in an answer to a ping", r.U32(20))
	}
	if want := data[:min(len(data), c.params.ReceiveLimit)]; !bytes.Equal(r.Data, want) {
		return nil, violation("11.19", "%d bytes of ping data came back as %d, or changed", len(data), len(r.Data))
	}
	return r.Data, nil
}

// TaskManagement sends a task management function, immediate, and returns the
// response. ref is the task for AbortTask. Tasks that the function ended are done
// with ErrAborted, and nothing more may come for them.
func (c *Conn) TaskManagement(ctx context.Context, function byte, lun [8]byte, ref *Task) (byte, error) {
	p := NewPDU(OpTaskManagement|Immediate, 0)
	p.BHS[1] |= function
	copy(p.BHS[8:], lun[:])
	p.Put32(20, NoTag)
	if ref != nil {
		p.Put32(20, ref.ITT)
		p.Put32(32, ref.CmdSN)
	}
	c.mu.Lock()
	older := make(map[uint32]*Task, len(c.tasks))
	for itt, t := range c.tasks {
		older[itt] = t
	}
	c.mu.Unlock()
	r, err := c.ask(ctx, p, OpTaskManagementResponse, func(r *PDU) {
		if r.BHS[2] != 0 {
			return
		}
		for itt, t := range older {
			if c.tasks[itt] != t {
				continue // ended before
			}
			switch function {
			case AbortTask:
				if t != ref {
					continue
				}
			case AbortTaskSet, ClearTaskSet, LogicalUnitReset:
				if t.cmd.LUN != lun {
					continue
				}
			case TargetWarmReset, TargetColdReset:
			default:
				continue
			}
			delete(c.tasks, itt)
			t.end(ErrAborted)
		}
	})
	if err != nil {
		return 0, err
	}
	return r.BHS[2], nil
}

// Text sends a text request and collects the whole answer, in order.
func (c *Conn) Text(ctx context.Context, keys ...Key) ([]Key, error) {
	text := encodeKeys(keys)
	ttt := uint32(NoTag)
	var answer []byte
	for {
		p := NewPDU(OpText, 0)
		p.Put32(20, ttt)
		p.Data = text
		r, err := c.ask(ctx, p, OpTextResponse, nil)
		if err != nil {
			return nil, err
		}
		answer = append(answer, r.Data...)
		ttt = r.U32(20)
		if r.Final() {
			if ttt != NoTag || r.BHS[1]&cont != 0 {
				return nil, violation("11.11.4", "final answer with tag %08x, flags %02x", ttt, r.BHS[1])
			}
			break
		}
		if ttt == NoTag {
			return nil, violation("11.11.4", "answer that goes on without a tag")
		}
		text = nil
	}
	var out []Key
	for len(answer) > 0 {
		pair, rest, ok := bytes.Cut(answer, []byte{0})
		name, value, eq := strings.Cut(string(pair), "=")
		if !ok || !eq {
			return nil, violation("6.1", "text %q", answer)
		}
		out = append(out, Key{name, value})
		answer = rest
	}
	return out, nil
}

// SendTargets gives the portals of each target that is answered to SendTargets=what.
func (c *Conn) SendTargets(ctx context.Context, what string) (map[string][]string, error) {
	keys, err := c.Text(ctx, Key{"SendTargets", what})
	if err != nil {
		return nil, err
	}
	targets := map[string][]string{}
	name := ""
	for _, k := range keys {
		switch {
		case k.Name == "TargetName":
			name = k.Value
			targets[name] = nil
		case k.Name == "TargetAddress" && name != "":
			targets[name] = append(targets[name], k.Value)
		default:
			return nil, violation("appendix C", "%s=%s in an answer to SendTargets", k.Name, k.Value)
		}
	}
	return targets, nil
}

// Logout asks for the end of the session (reason 0) or the connection (1), and
// returns the response. After response 0 the target closes, which Done reports as io.EOF.
func (c *Conn) Logout(ctx context.Context, reason byte) (byte, error) {
	p := NewPDU(OpLogout|Immediate, 0)
	p.BHS[1] |= reason
	p.Put16(20, c.cfg.CID)
	r, err := c.ask(ctx, p, OpLogoutResponse, nil)
	if err != nil {
		return 0, err
	}
	return r.BHS[2], nil
}
