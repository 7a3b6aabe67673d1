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
//	            to the sequencer, a goroutine of the package, for its next step,
//	            so that a volume never sees Submit called from inside Done
//	finish      counters, the task list, Task.Complete, waiting task management
//
// # The ordered state
//
// What every node must answer alike (reservations, RESERVE, software write
// protection, identifying information, the timestamp) is one value, luState, in
// the volume's stream of operations. A command that changes it computes the next
// value from the newest one (changeState, tried again when overtaken); the volume
// orders the change against all writes. Every node learns of every value in order:
//
//	publish     react: unit attentions for this node's initiators, their tasks
//	            aborted where the change says so; then a new grant for each I_T_L
//	            nexus: what it may do, in one word
//	Begin       checks the grant and notes its state's name in the request
//	recheck     when another state is in force at the request's turn, the newest
//	            grant decides again, and an aborted task does not start
//
// So a write that was accepted before a PREEMPT AND ABORT or a reset, on any node,
// and that is sequenced after it, has no effect. Task management that concerns
// other nexuses is such a change too.
//
// A task that waits for something other than a request (SANITIZE for the end of
// the operation, SET TARGET PORT GROUPS for the volume to move) is parked: see
// parking.go. A sanitize operation is part of the ordered state and has a
// goroutine of its own on the node that does it: see sanitize.go, sanitizer.go.
//
// One table (commands.go) drives dispatch, the checks of reserved CDB bits and
// REPORT SUPPORTED OPERATION CODES; one table (sense.go) translates errors; one
// function (reply.go) cuts every reply to its allocation length.
//
// # Third-party copies
//
// An operation is an EXTENDED COPY, POPULATE TOKEN or WRITE USING TOKEN from its
// execution until its status was read; the copyTable holds those of all nexuses.
// Its copiers run on the sequencer and make one request at a time, a clone where
// the volume can, in the name of the sender: every step asks again whether it may.
// A ROD token is a copy of its ranges at one point in time in the annex of the
// volume; its record travels in the ordered state (tokenstate.go), so every node
// knows it. A record is marked as ending before its place in the annex is emptied,
// and dropped when it is; a use of the token counts only if the record was still
// valid after the last byte was copied. Tick removes what expired.
//
// # Locks
//
// In this order; none is held across Submit, Complete, a hook or a Paths call.
//
//	Server.mu       the set of logical units, access lists and nexuses
//	logicalUnit.mu  the I_T_L nexuses of the unit
//	itlNexus.mu     task list and unit attention queue
//	leaves          copyTable.mu, copyBuffers.mu, pausedCopies.mu, tokenWatch.mu, sequencer.mu, changeQueue.mu
//
// react runs on goroutines of the volume and takes the last two only; what calls
// the transport, submits, or takes Server.mu from there goes to the sequencer.
// The path of a READ or WRITE takes itlNexus.mu only, for a few instructions at
// registering, starting and ending, and allocates nothing.
//
// # Invariants kept here
//
// A task is completed exactly once after Execute. A task that was aborted before
// it started never reaches its volume. Task management answers only when no
// request of an aborted task is with a volume. Buffers and queues are bounded:
// transfers by the limits of VPD page B0, unit attentions by maxAttentions,
// scratch memory by maxScratch and maxCopyBuffers, copies by maxCopies, tokens by
// maxTokens, registrations by maxRegistrations and maxReserveBytes, logical units
// and nexuses by MaxLUs and MaxNexuses (BOUNDED). A published luState or grant is
// never modified. A PREEMPT AND ABORT that was aborted waits for no task, so that
// no two wait for each other.
package scsi
