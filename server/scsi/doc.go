// Package scsi is the device server: it turns command descriptor blocks into
// operations on volumes and their results into status and sense (SAM-5, SPC-4,
// SBC-3). It knows no transport and no replication protocol: a transport hands
// it a Task, a volume takes a Request.
//
// The types to know are Server, Task (one command, owned by the transport and
// lent to the device server) and LUConfig (one logical unit). Inside, an
// itlNexus is one initiator's view of one logical unit: its unit attentions,
// its tasks in flight, its counters.
//
// # The flow of a command
//
//	Begin       find the logical unit in the nexus's view (an atomic load and a
//	            map look-up), find the row of the command table, check in the
//	            order of the standard: LUN, unit attention, asymmetric access,
//	            reservation, CDB, LBA range, length, write protection
//	            -> Finished, WantData or Ready
//	TryExecute  Ready only: replies, and reads that need no I/O, end here
//	Execute     the row's run function submits t.Req to the volume
//	requestDone the volume's answer; most commands end here. A command of more
//	            than one request (UNMAP, VERIFY, WRITE AND VERIFY, PRE-FETCH) goes
//	            to the sequencer, the package's one goroutine, for its next step,
//	            so that a volume never sees Submit called from inside Done
//	finish      counters, the task list, Task.Complete, waiting task management
//
// One table (commands.go) drives dispatch, the checks of reserved CDB bits and
// REPORT SUPPORTED OPERATION CODES; one table (sense.go) translates errors; one
// function (reply.go) cuts every reply to its allocation length.
//
// # Locks
//
// In this order; none is held across Submit, Complete, a hook or a Paths call.
//
//	Server.mu       the set of logical units, access lists and nexuses
//	logicalUnit.mu  the I_T_L nexuses of the unit
//	itlNexus.mu     task list and unit attention queue
//
// The path of a READ or WRITE takes itlNexus.mu only, for a few instructions at
// registering, starting and ending, and allocates nothing.
//
// # Invariants kept here
//
// A task is completed exactly once after Execute. A task that was aborted before
// it started never reaches its volume. Task management answers only when no
// request of an aborted task is with a volume. Buffers and queues are bounded:
// transfers by the limits of VPD page B0, unit attentions by maxAttentions,
// scratch memory by maxScratch, logical units and nexuses by MaxLUs and
// MaxNexuses (BOUNDED).
package scsi
