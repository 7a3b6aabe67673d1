package cdb

// Operation codes (SPC-4 and SBC-3, annex "Operation codes").
const (
	TestUnitReady            = 0x00
	RequestSense             = 0x03
	Read6                    = 0x08
	Write6                   = 0x0a
	Inquiry                  = 0x12
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
	ModeSense10              = 0x5a
	PersistentReserveIn      = 0x5e
	PersistentReserveOut     = 0x5f
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
	Read12                   = 0xa8
	Write12                  = 0xaa
	WriteAndVerify12         = 0xae
	Verify12                 = 0xaf
	ReadDefectData12         = 0xb7
)

// Service actions of SERVICE ACTION IN(16) and MAINTENANCE IN.
const (
	ActionReadCapacity16       = 0x10
	ActionReportTargetPorts    = 0x0a // REPORT TARGET PORT GROUPS
	ActionReportOpcodes        = 0x0c // REPORT SUPPORTED OPERATION CODES
	ActionReportTaskManagement = 0x0d // REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
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
