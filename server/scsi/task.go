package scsi

import "sync/atomic"

// Nexus is one I_T nexus: an initiator port (name and ISID) with one of this
// node's target ports. Unit attentions and reservations hang on it. The
// transport makes it with Server.Attach at the end of a login, keeps it over
// the session's life and gives it up with Server.Detach.
type Nexus struct {
	Initiator string  // iSCSI name
	ISID      [6]byte // 0 for transports without
	Port      uint16  // relative target port id, unique in the cluster

	server *Server
	state  nexusState // the device server's, see nexus.go
}

// Verdict is what Begin decided.
type Verdict uint8

const (
	// Finished: Status (and Sense) are set; no data moves. The transport discards
	// what the initiator sends unasked, then responds.
	Finished Verdict = iota
	// WantData: the transport collects OutLen bytes of Data-Out, then calls Execute.
	WantData
	// Ready: no Data-Out is wanted; the transport provides In and calls TryExecute or Execute.
	Ready
)

// Task is one SCSI command from its receipt to its response. The transport owns
// the memory (pooled with the connection) and resets it between uses; between
// Execute and Complete it belongs to the device server.
type Task struct {
	// Set by the transport before Begin.
	Nexus    *Nexus
	LUN      uint64 // the eight LUN bytes, big-endian
	CDB      [16]byte
	Extended bool   // the CDB is longer than 16 bytes (an AHS carried the rest)
	Read     bool   // R and W bits of the command
	Write    bool   //
	Expected uint32 // expected data transfer length, bytes

	// Set by Begin. OutLen <= Expected and InLen <= Expected; both are bounded by
	// the maximum transfer length that page B0 advertises (8 MiB), so that the
	// transport may take buffers of that size. Transfer is the length that the CDB
	// asks for ("S" of the residual rules); Execute may lower it when less data
	// exists than was asked for (INQUIRY). The transport derives the residual.
	OutLen   uint32
	InLen    uint32
	Transfer uint32

	// Data. Out is exactly OutLen bytes. OutBorrowed says that Out lies in the
	// receive buffer and is valid only until Execute returns. In has InLen bytes;
	// on completion with GOOD its first min(Transfer, InLen) bytes are the Data-In.
	Out         []byte
	OutBorrowed bool
	In          []byte

	// Result.
	Status   byte
	SenseLen int
	Sense    [64]byte // fixed or descriptor format, SenseLen bytes

	// Complete is set by the transport. It is called exactly once after Execute,
	// on any goroutine, possibly before Execute returns. It must not block. After a
	// batch of completions the completing goroutine calls the flush hook once.
	Complete func(*Task)
	// Ctx belongs to the transport.
	Ctx any

	// Aborted is set when a task management function ended the task: it completes
	// as always, the transport then frees it without a response, or with status
	// TASK ABORTED when Status says so.
	Aborted atomic.Bool

	Req   Request   // the request this task makes of its volume
	state taskState // the device server's, see server.go
}

// TaskFunction is a task management function, with the numbers of RFC 7143.
type TaskFunction uint8

const (
	AbortTask        TaskFunction = 1
	AbortTaskSet     TaskFunction = 2
	ClearACA         TaskFunction = 3
	ClearTaskSet     TaskFunction = 4
	LogicalUnitReset TaskFunction = 5
	TargetWarmReset  TaskFunction = 6
	TargetColdReset  TaskFunction = 7
	TaskReassign     TaskFunction = 8
)

// TaskResponse answers a task management function, with the numbers of RFC 7143.
type TaskResponse uint8

const (
	FunctionComplete    TaskResponse = 0
	NoSuchTask          TaskResponse = 1
	NoSuchLUN           TaskResponse = 2
	TaskStillAllegiant  TaskResponse = 3
	ReassignUnsupported TaskResponse = 4
	FunctionUnsupported TaskResponse = 5
	AuthorizationFailed TaskResponse = 6
	FunctionRejected    TaskResponse = 255
)
