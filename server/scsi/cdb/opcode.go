package cdb

// Operation codes (SPC-4 and SBC-3, annex "Operation codes").
const (
	TestUnitReady            = 0x00
	RequestSense             = 0x03
	Read6                    = 0x08
	Write6                   = 0x0a
	Inquiry                  = 0x12
	ModeSelect6              = 0x15
	Reserve6                 = 0x16
	Release6                 = 0x17
	ModeSense6               = 0x1a
	StartStopUnit            = 0x1b
	ReceiveDiagnosticResults = 0x1c
	SendDiagnostic           = 0x1d
	PreventAllow             = 0x1e
	ReadCapacity10           = 0x25
	Read10                   = 0x28
	Write10                  = 0x2a
	WriteAndVerify10         = 0x2e
	Verify10                 = 0x2f
	PreFetch10               = 0x34
	SynchronizeCache10       = 0x35
	ReadDefectData10         = 0x37
	WriteSame10              = 0x41
	Unmap                    = 0x42
	ModeSelect10             = 0x55
	Reserve10                = 0x56
	Release10                = 0x57
	ModeSense10              = 0x5a
	PersistentReserveIn      = 0x5e
	PersistentReserveOut     = 0x5f
	ThirdPartyCopyOut        = 0x83
	ThirdPartyCopyIn         = 0x84
	Read16                   = 0x88
	CompareAndWrite          = 0x89
	Write16                  = 0x8a
	WriteAndVerify16         = 0x8e
	Verify16                 = 0x8f
	PreFetch16               = 0x90
	SynchronizeCache16       = 0x91
	WriteSame16              = 0x93
	ServiceActionIn16        = 0x9e
	ReportLUNs               = 0xa0
	MaintenanceIn            = 0xa3
	MaintenanceOut           = 0xa4
	Read12                   = 0xa8
	Write12                  = 0xaa
	WriteAndVerify12         = 0xae
	Verify12                 = 0xaf
	ReadDefectData12         = 0xb7
	WriteBuffer              = 0x3b
	ReadBuffer               = 0x3c
	Sanitize                 = 0x48
	LogSelect                = 0x4c
	LogSense                 = 0x4d
	OrWrite16                = 0x8b
	WriteAtomic16            = 0x9c
)

// Service actions of SERVICE ACTION IN(16), MAINTENANCE IN and MAINTENANCE OUT.
const (
	ActionReadCapacity16       = 0x10
	ActionIdentifying          = 0x05 // REPORT IDENTIFYING INFORMATION
	ActionSetIdentifying       = 0x06 // SET IDENTIFYING INFORMATION
	ActionTimestamp            = 0x0f // REPORT TIMESTAMP, SET TIMESTAMP
	ActionReportTargetPorts    = 0x0a // REPORT TARGET PORT GROUPS
	ActionReportOpcodes        = 0x0c // REPORT SUPPORTED OPERATION CODES
	ActionReportTaskManagement = 0x0d // REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
)

// Service actions of THIRD-PARTY COPY OUT and THIRD-PARTY COPY IN.
const (
	ActionExtendedCopy       = 0x00 // EXTENDED COPY(LID1)
	ActionPopulateToken      = 0x10
	ActionWriteUsingToken    = 0x11
	ActionCopyAbort          = 0x1c // COPY OPERATION ABORT
	ActionCopyStatus1        = 0x00 // RECEIVE COPY STATUS(LID1)
	ActionCopyParameters     = 0x03 // RECEIVE COPY OPERATING PARAMETERS
	ActionCopyFailureDetails = 0x04 // RECEIVE COPY FAILURE DETAILS(LID1)
	ActionCopyStatus4        = 0x05 // RECEIVE COPY STATUS(LID4)
	ActionTokenInformation   = 0x07 // RECEIVE ROD TOKEN INFORMATION
	ActionAllTokens          = 0x08 // REPORT ALL ROD TOKENS
)

// Service actions that came later: of SERVICE ACTION IN(16), MAINTENANCE OUT and SANITIZE.
const (
	ActionGetLBAStatus       = 0x12
	ActionSetTargetPorts     = 0x0a // SET TARGET PORT GROUPS
	ActionSanitizeOverwrite  = 0x01
	ActionSanitizeBlockErase = 0x02
	ActionSanitizeExit       = 0x1f // EXIT FAILURE MODE
)

// Status codes (SAM-5 "Status codes").
const (
	Good                = 0x00
	CheckCondition      = 0x02
	Busy                = 0x08
	ReservationConflict = 0x18
	TaskSetFull         = 0x28
	TaskAborted         = 0x40
)
