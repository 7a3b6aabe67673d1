package pdu

// SCSICommand starts a task (RFC 7143 section 11.3).
type SCSICommand struct {
	Immediate bool
	Final     bool // no unsolicited Data-Out follows
	Read      bool
	Write     bool
	Attr      uint8 // task attribute, 0..7
	LUN       uint64
	ITT       uint32
	Expected  uint32 // expected data transfer length, bytes
	CmdSN     uint32
	ExpStatSN uint32
	CDB       [16]byte
}

// Decode reads the PDU from its header.
func (p *SCSICommand) Decode(h *Header) {
	p.Immediate = h.Immediate()
	p.Final = h.Final()
	p.Read = h[1]&0x40 != 0
	p.Write = h[1]&0x20 != 0
	p.Attr = h[1] & 7
	p.LUN, p.ITT, p.Expected = h.LUN(), h.ITT(), h.TTT()
	p.CmdSN, p.ExpStatSN = h.CmdSN(), h.ExpStatSN()
	copy(p.CDB[:], h[32:])
}

// Encode writes the PDU's header.
func (p *SCSICommand) Encode(h *Header) {
	h.begin(OpSCSICommand, p.Immediate, bit(p.Final, flagFinal)|bit(p.Read, 0x40)|bit(p.Write, 0x20)|p.Attr&7)
	h.putTags(p.LUN, p.ITT, p.Expected)
	h.putOrder(p.CmdSN, p.ExpStatSN)
	copy(h[32:], p.CDB[:])
}

// SCSIResponse ends a task (RFC 7143 section 11.4). Sense data, when there are
// any, are the data segment: a two-byte length and the sense bytes.
type SCSIResponse struct {
	Overflow  bool // O: the CDB asked for Residual bytes more than expected
	Underflow bool // U: Residual bytes of the expected length were not needed
	Response  uint8
	Status    uint8 // SCSI status
	ITT       uint32
	Numbers
	ExpDataSN uint32
	Residual  uint32 // bytes
}

// Decode reads the PDU from its header.
func (p *SCSIResponse) Decode(h *Header) {
	p.Overflow = h[1]&0x04 != 0
	p.Underflow = h[1]&0x02 != 0
	p.Response = h[2]
	p.Status = h[3]
	p.ITT = h.ITT()
	p.Numbers.decode(h)
	p.ExpDataSN = h.get32(36)
	p.Residual = h.get32(44)
}

// Encode writes the PDU's header.
func (p *SCSIResponse) Encode(h *Header) {
	h.begin(OpSCSIResponse, false, flagFinal|bit(p.Overflow, 0x04)|bit(p.Underflow, 0x02))
	h[2] = p.Response
	h[3] = p.Status
	h.put32(16, p.ITT)
	p.Numbers.encode(h)
	h.put32(36, p.ExpDataSN)
	h.put32(44, p.Residual)
}

// DataOut carries data to the target (RFC 7143 section 11.7).
type DataOut struct {
	Final     bool // last PDU of its sequence
	LUN       uint64
	ITT       uint32
	TTT       uint32 // of the R2T; NoTag: unsolicited
	ExpStatSN uint32
	DataSN    uint32
	Offset    uint32 // of the data in the transfer, bytes
}

// Decode reads the PDU from its header.
func (p *DataOut) Decode(h *Header) {
	p.Final = h.Final()
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.ExpStatSN = h.ExpStatSN()
	p.DataSN = h.get32(36)
	p.Offset = h.get32(40)
}

// Encode writes the PDU's header.
func (p *DataOut) Encode(h *Header) {
	h.begin(OpDataOut, false, bit(p.Final, flagFinal))
	h.putTags(p.LUN, p.ITT, p.TTT)
	h.put32(28, p.ExpStatSN)
	h.put32(36, p.DataSN)
	h.put32(40, p.Offset)
}

// DataIn carries data to the initiator, and with S=1 the status of the task
// (RFC 7143 section 11.7).
type DataIn struct {
	Final     bool // last PDU of its sequence
	Overflow  bool // with HasStatus: as in SCSIResponse
	Underflow bool
	HasStatus bool // S: Status, StatSN and Residual are valid
	Status    uint8
	LUN       uint64
	ITT       uint32
	TTT       uint32
	Numbers   // StatSN is 0 without status
	DataSN    uint32
	Offset    uint32 // bytes
	Residual  uint32 // bytes
}

// Decode reads the PDU from its header.
func (p *DataIn) Decode(h *Header) {
	p.Final = h.Final()
	p.Overflow = h[1]&0x04 != 0
	p.Underflow = h[1]&0x02 != 0
	p.HasStatus = h[1]&0x01 != 0
	p.Status = h[3]
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.Numbers.decode(h)
	p.DataSN = h.get32(36)
	p.Offset = h.get32(40)
	p.Residual = h.get32(44)
}

// Encode writes the PDU's header.
func (p *DataIn) Encode(h *Header) {
	h.begin(OpDataIn, false, bit(p.Final, flagFinal)|bit(p.Overflow, 0x04)|bit(p.Underflow, 0x02)|bit(p.HasStatus, 0x01))
	h[3] = p.Status
	h.putTags(p.LUN, p.ITT, p.TTT)
	p.Numbers.encode(h)
	h.put32(36, p.DataSN)
	h.put32(40, p.Offset)
	h.put32(44, p.Residual)
}

// R2T asks the initiator for data (RFC 7143 section 11.8). It carries the next
// StatSN but does not use it up.
type R2T struct {
	LUN uint64
	ITT uint32
	TTT uint32
	Numbers
	R2TSN  uint32
	Offset uint32 // bytes
	Length uint32 // desired, bytes
}

// Decode reads the PDU from its header.
func (p *R2T) Decode(h *Header) {
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.Numbers.decode(h)
	p.R2TSN = h.get32(36)
	p.Offset = h.get32(40)
	p.Length = h.get32(44)
}

// Encode writes the PDU's header.
func (p *R2T) Encode(h *Header) {
	h.begin(OpR2T, false, flagFinal)
	h.putTags(p.LUN, p.ITT, p.TTT)
	p.Numbers.encode(h)
	h.put32(36, p.R2TSN)
	h.put32(40, p.Offset)
	h.put32(44, p.Length)
}

// TaskRequest is a task management function request (RFC 7143 section 11.5).
type TaskRequest struct {
	Immediate bool
	Function  uint8 // 7 bits
	LUN       uint64
	ITT       uint32
	RefTag    uint32 // initiator task tag of the task to abort
	CmdSN     uint32
	ExpStatSN uint32
	RefCmdSN  uint32
	ExpDataSN uint32
}

// Decode reads the PDU from its header.
func (p *TaskRequest) Decode(h *Header) {
	p.Immediate = h.Immediate()
	p.Function = h[1] & 0x7f
	p.LUN, p.ITT, p.RefTag = h.LUN(), h.ITT(), h.TTT()
	p.CmdSN, p.ExpStatSN = h.CmdSN(), h.ExpStatSN()
	p.RefCmdSN = h.get32(32)
	p.ExpDataSN = h.get32(36)
}

// Encode writes the PDU's header.
func (p *TaskRequest) Encode(h *Header) {
	h.begin(OpTaskRequest, p.Immediate, flagFinal|p.Function&0x7f)
	h.putTags(p.LUN, p.ITT, p.RefTag)
	h.putOrder(p.CmdSN, p.ExpStatSN)
	h.put32(32, p.RefCmdSN)
	h.put32(36, p.ExpDataSN)
}

// TaskResponse answers a TaskRequest (RFC 7143 section 11.6).
type TaskResponse struct {
	Response uint8
	ITT      uint32
	Numbers
}

// Decode reads the PDU from its header.
func (p *TaskResponse) Decode(h *Header) {
	p.Response = h[2]
	p.ITT = h.ITT()
	p.Numbers.decode(h)
}

// Encode writes the PDU's header.
func (p *TaskResponse) Encode(h *Header) {
	h.begin(OpTaskResponse, false, flagFinal)
	h[2] = p.Response
	h.put32(16, p.ITT)
	p.Numbers.encode(h)
}
