package initiator

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// Command is one SCSI command. The lengths of Out and In are the expected data
// transfer length; only one of them may be used. Both buffers belong to the
// connection until the command is done.
type Command struct {
	LUN [8]byte // LUN(n) makes one
	CDB []byte  // longer than 16 bytes goes into an AHS
	Out []byte
	In  []byte

	Attr       byte // task attribute: 0 untagged, 1 simple, 2 ordered, 3 head of queue
	Immediate  bool // immediate delivery: outside of the order
	NoImmData  bool // no data in the command PDU, though it is allowed
	NoUnsolic  bool // wait for R2T, though unsolicited data are allowed
	PDUDataMax int  // of a data segment; 0 is as much as the target takes
}

// LUN encodes a logical unit number below 16384 as single level.
func LUN(n uint16) [8]byte {
	var b [8]byte
	if n > 255 {
		n |= 0x4000 // flat space addressing
	}
	binary.BigEndian.PutUint16(b[:], n)
	return b
}

// Result is the end of a command.
type Result struct {
	Status    byte
	Response  byte // 0: completed at the target
	Sense     []byte
	Overflow  bool
	Underflow bool
	Residual  uint32
	Received  int // bytes of Data-In, which fill In from its start
	R2Ts      int
}

// OK is GOOD status, completed at the target.
func (r *Result) OK() bool { return r.Status == 0 && r.Response == 0 }

// SenseKey gives key, ASC and ASCQ of fixed or descriptor sense data.
func (r *Result) SenseKey() (key, asc, ascq byte) {
	switch {
	case len(r.Sense) >= 14 && r.Sense[0]&0x7e == 0x70:
		return r.Sense[2] & 0xf, r.Sense[12], r.Sense[13]
	case len(r.Sense) >= 4 && r.Sense[0]&0x7e == 0x72:
		return r.Sense[1] & 0xf, r.Sense[2], r.Sense[3]
	}
	return 0, 0, 0
}

func (r *Result) String() string {
	key, asc, ascq := r.SenseKey()
	return fmt.Sprintf("status %02x response %02x sense %02x/%02x/%02x residual %d (overflow %t, underflow %t), %d bytes received",
		r.Status, r.Response, key, asc, ascq, r.Residual, r.Overflow, r.Underflow, r.Received)
}

// ErrAborted is the end of a task that a task management function has ended.
var ErrAborted = errors.New("task was aborted")

// RejectError is a request that the target rejected.
type RejectError struct{ Reason byte }

func (e *RejectError) Error() string { return fmt.Sprintf("rejected with reason %02x", e.Reason) }

// Task is a command on its way.
type Task struct {
	ITT   uint32
	CmdSN uint32

	conn   *Conn
	cmd    *Command
	done   chan struct{}
	result Result
	err    error

	// Progress, under Conn.mu.
	dataSN   uint32 // of the next Data-In
	received int
	inBurst  int
	r2tSN    uint32
	sent     int // bytes of Out sent or asked for
}

func (t *Task) end(err error) {
	t.err = err
	close(t.done)
}

// Wait returns the result when the command is done.
func (t *Task) Wait(ctx context.Context) (*Result, error) {
	select {
	case <-t.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if t.err != nil {
		return nil, t.err
	}
	return &t.result, nil
}

// Done is closed at the end of the command.
func (t *Task) Done() <-chan struct{} { return t.done }

// Do runs a command to its end. A status other than GOOD is no error.
func (c *Conn) Do(ctx context.Context, cmd *Command) (*Result, error) {
	t, err := c.Start(ctx, cmd)
	if err != nil {
		return nil, err
	}
	return t.Wait(ctx)
}

// Start sends a command, with the unsolicited data that the login allows, as soon
// as the command window is open.
func (c *Conn) Start(ctx context.Context, cmd *Command) (*Task, error) {
	if len(cmd.Out) > 0 && len(cmd.In) > 0 {
		return nil, errors.New("initiator: bidirectional command")
	}
	open := func() bool { return cmd.Immediate || c.openLocked() }
	if err := c.lockWhen(ctx, open); err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	return c.startLocked(cmd)
}

// openLocked: the next command is in the target's window.
func (c *Conn) openLocked() bool { return !before(c.maxCmdSN, c.cmdSN) }

func (c *Conn) startLocked(cmd *Command) (*Task, error) {
	if c.err != nil {
		return nil, c.err
	}
	t := &Task{ITT: c.takeITT(), CmdSN: c.cmdSN, conn: c, cmd: cmd, done: make(chan struct{})}
	p := NewPDU(OpCommand, t.ITT)
	p.BHS[1] |= cmd.Attr & 7
	copy(p.BHS[8:], cmd.LUN[:])
	switch {
	case len(cmd.Out) > 0:
		p.BHS[1] |= 0x20
		p.Put32(20, uint32(len(cmd.Out)))
	case len(cmd.In) > 0:
		p.BHS[1] |= 0x40
		p.Put32(20, uint32(len(cmd.In)))
	}
	p.Put32(24, c.cmdSN)
	p.Put32(28, c.expStatSN)
	if cmd.Immediate {
		p.BHS[0] |= Immediate
	} else {
		c.cmdSN++
	}
	copy(p.BHS[32:], cmd.CDB)
	if n := len(cmd.CDB); n > 16 {
		// Extended CDB AHS, section 11.2.2.3: length counts the reserved byte too.
		p.AHS = append(p.AHS, byte((n-15)>>8), byte(n-15), 1, 0)
		p.AHS = append(p.AHS, cmd.CDB[16:]...)
		p.AHS = append(p.AHS, make([]byte, -len(p.AHS)&3)...)
	}
	first := min(len(cmd.Out), c.params.FirstBurstLength)
	if c.params.ImmediateData && !cmd.NoImmData {
		t.sent = min(first, t.segment())
		p.Data = cmd.Out[:t.sent]
	}
	unsolicited := !c.params.InitialR2T && !cmd.NoUnsolic && t.sent < first
	if unsolicited {
		p.BHS[1] &^= final
	}
	c.tasks[t.ITT] = t
	if err := c.sendLocked(p); err != nil {
		delete(c.tasks, t.ITT)
		return nil, err
	}
	if unsolicited {
		from := t.sent
		t.sent = first
		return t, c.sendData(t, NoTag, from, first)
	}
	return t, nil
}

func (t *Task) segment() int {
	n := t.conn.params.SendLimit
	if t.cmd.PDUDataMax > 0 {
		n = min(n, t.cmd.PDUDataMax)
	}
	return n
}

// sendData sends one sequence of Data-Out.
func (c *Conn) sendData(t *Task, ttt uint32, from, to int) error {
	for sn := uint32(0); from < to; sn++ {
		p := NewPDU(OpDataOut, t.ITT)
		n := min(to-from, t.segment())
		if from+n < to {
			p.BHS[1] &^= final
		}
		copy(p.BHS[8:], t.cmd.LUN[:])
		p.Put32(20, ttt)
		p.Put32(28, c.expStatSN)
		p.Put32(36, sn)
		p.Put32(40, uint32(from))
		p.Data = t.cmd.Out[from : from+n]
		from += n
		if err := c.sendLocked(p); err != nil {
			return err
		}
	}
	return nil
}

func (c *Conn) deliverTask(t *Task, p *PDU) error {
	switch p.Opcode() {
	case OpR2T:
		return c.deliverR2T(t, p)
	case OpDataIn:
		if err := c.deliverData(t, p); err != nil {
			return err
		}
		if p.BHS[1]&1 == 0 {
			return nil
		}
		t.result.Status = p.BHS[3]
		if p.BHS[3] != 0 && p.BHS[3] != 4 && p.BHS[3] != 0x10 && p.BHS[3] != 0x14 {
			return violation("11.7.4", "status %02x in Data-In", p.BHS[3])
		}
	case OpResponse:
		t.result.Response, t.result.Status = p.BHS[2], p.BHS[3]
		if p.BHS[1]&final == 0 || p.BHS[1]&0x61 != 0 {
			return violation("11.4.1", "flags %02x of a response", p.BHS[1])
		}
		if len(p.Data) > 0 {
			n := 0
			if len(p.Data) >= 2 {
				n = int(binary.BigEndian.Uint16(p.Data))
			}
			if len(p.Data) < 2 || n > len(p.Data)-2 {
				return violation("11.4.7", "sense of %d bytes in %d", n, len(p.Data))
			}
			t.result.Sense = p.Data[2 : 2+n]
		}
		if t.result.Status == 2 && len(t.result.Sense) == 0 {
			return violation("11.4.7.1", "CHECK CONDITION without sense data")
		}
		if want := t.dataSN; t.result.Response == 0 && len(t.cmd.In) > 0 && p.U32(36) != want {
			return violation("11.4.8", "ExpDataSN %d after %d Data-In", p.U32(36), want)
		}
	}
	t.result.Overflow, t.result.Underflow = p.BHS[1]&4 != 0, p.BHS[1]&2 != 0
	t.result.Residual = p.U32(44)
	switch {
	case t.result.Overflow && t.result.Underflow:
		return violation("11.4.1", "both residual bits are set")
	case !t.result.Overflow && !t.result.Underflow && t.result.Residual != 0:
		return violation("11.4.5.1", "residual %d without a bit", t.result.Residual)
	case t.result.Underflow && t.result.Status == 0 && len(t.cmd.In) > 0 && int(t.result.Residual) != len(t.cmd.In)-t.received:
		return violation("11.4.5.1", "residual %d, but %d of %d bytes came", t.result.Residual, t.received, len(t.cmd.In))
	case t.result.Overflow && t.received == 0: // the CDB reads nothing: its direction was wrong
	case !t.result.Underflow && t.result.Status == 0 && t.result.Response == 0 && t.received != len(t.cmd.In):
		return violation("11.4.5.1", "GOOD without a residual, but %d of %d bytes came", t.received, len(t.cmd.In))
	}
	t.result.Received = t.received
	delete(c.tasks, t.ITT)
	t.end(nil)
	return nil
}

func (c *Conn) deliverData(t *Task, p *PDU) error {
	off := int(p.U32(40))
	switch {
	case len(t.cmd.In) == 0:
		return violation("11.7", "Data-In for a command that reads nothing: %v", p)
	case p.U32(36) != t.dataSN:
		return violation("11.7.5", "DataSN %d, expected %d", p.U32(36), t.dataSN)
	case off != t.received:
		return violation("13.18", "data at %d, expected at %d", off, t.received)
	case off+len(p.Data) > len(t.cmd.In):
		return violation("11.7.6", "data up to %d of %d", off+len(p.Data), len(t.cmd.In))
	case p.BHS[1]&1 != 0 && !p.Final():
		return violation("11.7.3", "status without the final bit")
	case p.BHS[1]&0x40 != 0:
		return violation("11.7.2", "A bit at error recovery level 0")
	case p.BHS[1]&1 == 0 && p.BHS[1]&6 != 0:
		return violation("11.7.3", "residual bits without status")
	}
	copy(t.cmd.In[off:], p.Data)
	t.dataSN++
	t.received += len(p.Data)
	t.inBurst += len(p.Data)
	if t.inBurst > c.params.MaxBurstLength {
		return violation("13.13", "burst of %d bytes, at most %d", t.inBurst, c.params.MaxBurstLength)
	}
	if p.Final() {
		t.inBurst = 0
	}
	return nil
}

func (c *Conn) deliverR2T(t *Task, p *PDU) error {
	off, n := int(p.U32(40)), int(p.U32(44))
	switch {
	case p.U32(36) != t.r2tSN:
		return violation("11.8.3", "R2TSN %d, expected %d", p.U32(36), t.r2tSN)
	case p.U32(20) == NoTag:
		return violation("11.8.5", "R2T with the reserved tag")
	case n == 0 || n > c.params.MaxBurstLength:
		return violation("11.8.4", "R2T for %d bytes, at most %d", n, c.params.MaxBurstLength)
	case off != t.sent:
		return violation("13.19", "R2T at %d, expected at %d", off, t.sent)
	case off+n > len(t.cmd.Out):
		return violation("11.8.4", "R2T up to %d of %d", off+n, len(t.cmd.Out))
	case string(p.BHS[8:16]) != string(t.cmd.LUN[:]):
		return violation("11.8", "R2T with LUN %x", p.BHS[8:16])
	}
	t.r2tSN++
	t.result.R2Ts++
	t.sent += n
	return c.sendData(t, p.U32(20), off, off+n)
}
