package pdu

// Login stages (RFC 7143 section 11.12.3). 2 is not used.
const (
	StageSecurity    = 0
	StageOperational = 1
	StageFull        = 3
)

// LoginRequest is one step of a login (RFC 7143 section 11.12). Its data
// segment is text.
type LoginRequest struct {
	Transit    bool // T: ready to leave stage CSG for NSG
	Continue   bool // C: the text goes on in the next PDU
	CSG, NSG   uint8
	VersionMax uint8
	VersionMin uint8
	ISID       [6]byte
	TSIH       uint16
	ITT        uint32
	CID        uint16
	CmdSN      uint32
	ExpStatSN  uint32
}

// Decode reads the PDU from its header.
func (p *LoginRequest) Decode(h *Header) {
	p.Transit = h[1]&flagFinal != 0
	p.Continue = h[1]&flagContinue != 0
	p.CSG = h[1] >> 2 & 3
	p.NSG = h[1] & 3
	p.VersionMax = h[2]
	p.VersionMin = h[3]
	copy(p.ISID[:], h[8:])
	p.TSIH = h.get16(14)
	p.ITT = h.ITT()
	p.CID = h.get16(20)
	p.CmdSN, p.ExpStatSN = h.CmdSN(), h.ExpStatSN()
}

// Encode writes the PDU's header.
func (p *LoginRequest) Encode(h *Header) {
	h.begin(OpLoginRequest, true, bit(p.Transit, flagFinal)|bit(p.Continue, flagContinue)|p.CSG&3<<2|p.NSG&3)
	h[2] = p.VersionMax
	h[3] = p.VersionMin
	copy(h[8:], p.ISID[:])
	h.put16(14, p.TSIH)
	h.put32(16, p.ITT)
	h.put16(20, p.CID)
	h.putOrder(p.CmdSN, p.ExpStatSN)
}

// LoginResponse answers a LoginRequest (RFC 7143 section 11.13).
type LoginResponse struct {
	Transit  bool
	Continue bool
	CSG, NSG uint8
	ISID     [6]byte
	TSIH     uint16
	ITT      uint32
	Numbers
	Status uint16 // class and detail
}

// Decode reads the PDU from its header.
func (p *LoginResponse) Decode(h *Header) {
	p.Transit = h[1]&flagFinal != 0
	p.Continue = h[1]&flagContinue != 0
	p.CSG = h[1] >> 2 & 3
	p.NSG = h[1] & 3
	copy(p.ISID[:], h[8:])
	p.TSIH = h.get16(14)
	p.ITT = h.ITT()
	p.Numbers.decode(h)
	p.Status = h.get16(36)
}

// Encode writes the PDU's header. Active and maximum version are 0.
func (p *LoginResponse) Encode(h *Header) {
	h.begin(OpLoginResponse, false, bit(p.Transit, flagFinal)|bit(p.Continue, flagContinue)|p.CSG&3<<2|p.NSG&3)
	copy(h[8:], p.ISID[:])
	h.put16(14, p.TSIH)
	h.put32(16, p.ITT)
	p.Numbers.encode(h)
	h.put16(36, p.Status)
}

// TextRequest negotiates in full feature phase (RFC 7143 section 11.10).
type TextRequest struct {
	Immediate bool
	Final     bool
	Continue  bool
	LUN       uint64
	ITT       uint32
	TTT       uint32
	CmdSN     uint32
	ExpStatSN uint32
}

// Decode reads the PDU from its header.
func (p *TextRequest) Decode(h *Header) {
	p.Immediate = h.Immediate()
	p.Final = h.Final()
	p.Continue = h[1]&flagContinue != 0
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.CmdSN, p.ExpStatSN = h.CmdSN(), h.ExpStatSN()
}

// Encode writes the PDU's header.
func (p *TextRequest) Encode(h *Header) {
	h.begin(OpTextRequest, p.Immediate, bit(p.Final, flagFinal)|bit(p.Continue, flagContinue))
	h.putTags(p.LUN, p.ITT, p.TTT)
	h.putOrder(p.CmdSN, p.ExpStatSN)
}

// TextResponse answers a TextRequest (RFC 7143 section 11.11).
type TextResponse struct {
	Final    bool
	Continue bool
	LUN      uint64
	ITT      uint32
	TTT      uint32
	Numbers
}

// Decode reads the PDU from its header.
func (p *TextResponse) Decode(h *Header) {
	p.Final = h.Final()
	p.Continue = h[1]&flagContinue != 0
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.Numbers.decode(h)
}

// Encode writes the PDU's header.
func (p *TextResponse) Encode(h *Header) {
	h.begin(OpTextResponse, false, bit(p.Final, flagFinal)|bit(p.Continue, flagContinue))
	h.putTags(p.LUN, p.ITT, p.TTT)
	p.Numbers.encode(h)
}

// Reasons of a Logout (RFC 7143 section 11.14.1).
const (
	LogoutSession    = 0
	LogoutConnection = 1
	LogoutRecovery   = 2
)

// Logout ends a session or connection (RFC 7143 section 11.14).
type Logout struct {
	Immediate bool
	Reason    uint8 // 7 bits
	ITT       uint32
	CID       uint16
	CmdSN     uint32
	ExpStatSN uint32
}

// Decode reads the PDU from its header.
func (p *Logout) Decode(h *Header) {
	p.Immediate = h.Immediate()
	p.Reason = h[1] & 0x7f
	p.ITT = h.ITT()
	p.CID = h.get16(20)
	p.CmdSN, p.ExpStatSN = h.CmdSN(), h.ExpStatSN()
}

// Encode writes the PDU's header.
func (p *Logout) Encode(h *Header) {
	h.begin(OpLogout, p.Immediate, flagFinal|p.Reason&0x7f)
	h.put32(16, p.ITT)
	h.put16(20, p.CID)
	h.putOrder(p.CmdSN, p.ExpStatSN)
}

// Responses to a Logout (RFC 7143 section 11.15.1).
const (
	LogoutDone          = 0
	LogoutNoSuchCID     = 1
	LogoutNoRecovery    = 2
	LogoutCleanupFailed = 3
)

// LogoutResponse answers a Logout (RFC 7143 section 11.15).
type LogoutResponse struct {
	Response uint8
	ITT      uint32
	Numbers
	Time2Wait   uint16 // seconds
	Time2Retain uint16 // seconds
}

// Decode reads the PDU from its header.
func (p *LogoutResponse) Decode(h *Header) {
	p.Response = h[2]
	p.ITT = h.ITT()
	p.Numbers.decode(h)
	p.Time2Wait = h.get16(40)
	p.Time2Retain = h.get16(42)
}

// Encode writes the PDU's header.
func (p *LogoutResponse) Encode(h *Header) {
	h.begin(OpLogoutResponse, false, flagFinal)
	h[2] = p.Response
	h.put32(16, p.ITT)
	p.Numbers.encode(h)
	h.put16(40, p.Time2Wait)
	h.put16(42, p.Time2Retain)
}

// NopOut is a ping or the answer to one (RFC 7143 section 11.18).
type NopOut struct {
	Immediate bool
	LUN       uint64
	ITT       uint32
	TTT       uint32
	CmdSN     uint32
	ExpStatSN uint32
}

// Decode reads the PDU from its header.
func (p *NopOut) Decode(h *Header) {
	p.Immediate = h.Immediate()
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.CmdSN, p.ExpStatSN = h.CmdSN(), h.ExpStatSN()
}

// Encode writes the PDU's header.
func (p *NopOut) Encode(h *Header) {
	h.begin(OpNopOut, p.Immediate, flagFinal)
	h.putTags(p.LUN, p.ITT, p.TTT)
	h.putOrder(p.CmdSN, p.ExpStatSN)
}

// NopIn is a ping or the answer to one (RFC 7143 section 11.19).
type NopIn struct {
	LUN uint64
	ITT uint32
	TTT uint32
	Numbers
}

// Decode reads the PDU from its header.
func (p *NopIn) Decode(h *Header) {
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.Numbers.decode(h)
}

// Encode writes the PDU's header.
func (p *NopIn) Encode(h *Header) {
	h.begin(OpNopIn, false, flagFinal)
	h.putTags(p.LUN, p.ITT, p.TTT)
	p.Numbers.encode(h)
}

// Events of an Async (RFC 7143 section 11.9.1).
const (
	AsyncLogoutRequest  = 1
	AsyncDropConnection = 2
	AsyncDropSession    = 3
)

// Async tells the initiator of an event (RFC 7143 section 11.9).
type Async struct {
	LUN uint64
	Numbers
	Event      uint8
	VendorCode uint8
	Parameter1 uint16
	Parameter2 uint16
	Parameter3 uint16
}

// Decode reads the PDU from its header.
func (p *Async) Decode(h *Header) {
	p.LUN = h.LUN()
	p.Numbers.decode(h)
	p.Event = h[36]
	p.VendorCode = h[37]
	p.Parameter1 = h.get16(38)
	p.Parameter2 = h.get16(40)
	p.Parameter3 = h.get16(42)
}

// Encode writes the PDU's header.
func (p *Async) Encode(h *Header) {
	h.begin(OpAsync, false, flagFinal)
	h.put64(8, p.LUN)
	h.put32(16, NoTag)
	p.Numbers.encode(h)
	h[36] = p.Event
	h[37] = p.VendorCode
	h.put16(38, p.Parameter1)
	h.put16(40, p.Parameter2)
	h.put16(42, p.Parameter3)
}

// Reasons of a Reject (RFC 7143 section 11.17.1).
const (
	RejectDataDigest    = 0x02
	RejectSNACK         = 0x03
	RejectProtocol      = 0x04
	RejectUnsupported   = 0x05
	RejectTooMany       = 0x06 // immediate commands
	RejectInProgress    = 0x07 // initiator task tag in use
	RejectInvalidField  = 0x09
	RejectOutOfResource = 0x0a
)

// Reject refuses a PDU (RFC 7143 section 11.17). Its data segment is the
// header of the PDU that is refused.
type Reject struct {
	Reason uint8
	Numbers
	DataSN uint32
}

// Decode reads the PDU from its header.
func (p *Reject) Decode(h *Header) {
	p.Reason = h[2]
	p.Numbers.decode(h)
	p.DataSN = h.get32(36)
}

// Encode writes the PDU's header.
func (p *Reject) Encode(h *Header) {
	h.begin(OpReject, false, flagFinal)
	h[2] = p.Reason
	h.put32(16, NoTag)
	p.Numbers.encode(h)
	h.put32(36, p.DataSN)
}

// SNACK asks for PDUs again (RFC 7143 section 11.16).
type SNACK struct {
	Type      uint8 // 4 bits
	LUN       uint64
	ITT       uint32
	TTT       uint32
	ExpStatSN uint32
	BegRun    uint32
	RunLength uint32
}

// Decode reads the PDU from its header.
func (p *SNACK) Decode(h *Header) {
	p.Type = h[1] & 0x0f
	p.LUN, p.ITT, p.TTT = h.LUN(), h.ITT(), h.TTT()
	p.ExpStatSN = h.ExpStatSN()
	p.BegRun = h.get32(40)
	p.RunLength = h.get32(44)
}

// Encode writes the PDU's header.
func (p *SNACK) Encode(h *Header) {
	h.begin(OpSNACK, false, flagFinal|p.Type&0x0f)
	h.putTags(p.LUN, p.ITT, p.TTT)
	h.put32(28, p.ExpStatSN)
	h.put32(40, p.BegRun)
	h.put32(44, p.RunLength)
}
