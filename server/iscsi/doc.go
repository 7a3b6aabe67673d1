// Package iscsi is the iSCSI transport (RFC 7143): login, sessions, connections
// and the command window. It knows no SCSI command by name; a DeviceServer does.
//
// The types to know are Target (the portals of one node), session (an initiator
// port, outlives its connection by Time2Retain) and connection (a TCP connection
// in full feature phase, with its tasks). login is the negotiation as a state
// machine without socket.
//
// # The flow
//
// Each connection has one goroutine, the reader. It reads into a 512 KiB buffer
// and parses PDUs in place:
//
//	next -> sequence -> dispatch -> command -> start -> startRead   tryInline, Execute
//	        (CmdSN)                                  -> startWrite  Execute, or R2Ts
//	     -> dataOut -> dataArrived ------------------------------>  Execute
//
// A read that needs no waiting is answered by the device server straight into
// the output buffer, behind the header that will describe it. A write whose data
// are all there is handed on as a slice of the receive buffer. Longer data go
// from the socket into the task's own buffer. Nothing is allocated per PDU.
//
// When no whole PDU is left the reader writes what was answered with one system
// call, calls DeviceServer.Kick, and reads again (settle, fill). Completions on
// other goroutines append their response under the connection's mutex; whoever
// completed a batch calls Target.Flush, which writes once per connection. While
// the reader is awake completions leave the write to it. What a socket does not
// take at once is left to a goroutine with a deadline (drain).
//
// # Emptying a node
//
// Drain sends new logins to other nodes, asks the sessions that are there to log
// out, and ends those that do not; Resume takes logins again.
//
// # Goroutines
//
// Per portal one that accepts, per connection the reader and at times one that
// drains, per target one that serves the line for memory (grantMemory) and one
// that keeps time. Close waits for all of them.
//
// # Locks
//
// In this order:
//
//	Target.mu         sessions, half-open connections
//	connection.mu     output, numbers, window, task table
//	bufferPool.mu     memory on loan
//
// Target.pendingMu, guard.mu and challengeLedger.mu are taken alone. connection.mu
// is held across DeviceServer.TryExecute, which neither waits nor calls back, and
// across nothing else outside the package. StatSN, ExpCmdSN and MaxCmdSN of a PDU
// are read under connection.mu in the order in which PDUs are appended, so no
// older pair follows a newer one.
//
// # Invariants kept here
//
// A task that the device server knows is executed once or forgotten once. A
// session's nexus is given up only after its tasks have ended, a new session of
// the same initiator port begins only after that. MaxCmdSN never goes back.
// Memory, connections, sessions, tasks and held PDUs are bounded by Limits
// (BOUNDED); lengths from the wire are compared with a limit before they are
// used.
package iscsi
