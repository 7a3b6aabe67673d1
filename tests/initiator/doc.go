// Package initiator is an iSCSI initiator for tests: it can do what a host does,
// watches that the target keeps the rules, and can break every one of them itself.
//
// [Dial] logs in and gives a [Conn], which is one session of one connection.
// For tests of what lies above, [Connect] gives a [Session]: CDBs by LUN in, status,
// sense and data out, several at once, with task management, reconnection and
// loss of the connection:
//
//	s, err := initiator.Connect(ctx, "192.0.2.1:3260", target, initiator.Options{})
//	_, err = s.Settle(ctx, 0)                                   // the unit attentions of a new nexus
//	r, err := s.Do(ctx, 0, initiator.Read16(lba, 8), nil, 4096) // r.Status, r.Sense, r.In
//	p, err := s.Submit(ctx, 0, initiator.Write16(lba, 8), data, 0)
//	select { case <-p.Done(): ... }                             // then p.Wait
//	code, err := s.TaskManagement(ctx, initiator.AbortTask, 0, p)
//	err = s.Reconnect(ctx)                                      // the same port again; or s.Drop(), s.Close(ctx)
//
// [Conn.Do] runs a SCSI [Command]; [Conn.Start] starts one and lets the caller do
// something else meanwhile. TaskManagement, Ping, Text and Logout are the other
// requests. For bad input, [Open] connects without a login, [Conn.Exchange] trades
// PDUs by hand, [Conn.Send] puts any [PDU] on the wire, and Config.Outgoing sees
// and may change each one that the initiator makes by itself.
//
// The codec is its own, written from RFC 7143 and not shared with the target, so
// that a misunderstanding of the standard shows instead of cancelling out.
//
// # Conformance
//
// The tests of this package are named after the clause that they prove. They run
// against a target in this process; those that only need the wire run against a
// real one, too, whose data they overwrite:
//
//	go test ./tests/initiator -args -target iscsi://192.0.2.1:3260/iqn.2026-01.example:san/0 -initiator iqn.2026-01.example:host
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
