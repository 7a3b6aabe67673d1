// Package initiator is an iSCSI initiator for tests: it can do what a host does,
// watches that the target keeps the rules, and can break every one of them itself.
//
// [Dial] logs in and gives a [Conn], which is one session of one connection.
// [Conn.Do] runs a SCSI [Command]; [Conn.Start] starts one and lets the caller do
// something else meanwhile. TaskManagement, Ping, Text and Logout are the other
// requests. For bad input, [Open] connects without a login, [Conn.Exchange] trades
// PDUs by hand, [Conn.Send] puts any [PDU] on the wire, and Config.Outgoing sees
// and may change each one that the initiator makes by itself.
//
// The codec is its own, written from RFC 7143 and not shared with the target, so
// that a misunderstanding of the standard shows instead of cancelling out.
//
// # Flow
//
// Requests are numbered and queued under the connection's mutex; one goroutine
// writes the queue, and another reads, checks and delivers. They are apart because
// a target may stop reading until its answers are taken.
//
// # Locks
//
// Conn.mu guards all state of a connection. It is not held across I/O.
//
// # Invariants
//
// Whatever the target does against the RFC ends the connection with a
// [Violation] that names the section; nothing is tolerated silently.
package initiator
