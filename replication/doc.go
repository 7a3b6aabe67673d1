// Package replication keeps a volume one, whatever fails: a replicated volume has
// copies on two or three nodes and one owner that orders every operation.
//
// The types to know: Node (one per process) holds the links to the other nodes
// and the volumes; Volume is what the device server talks to, on the owner and
// on every other node; reign is the state machine of membership and leases,
// without goroutine, socket or clock, that decides who may serve.
//
// The life of a write: Submit reduces it on the caller's goroutine, locks its
// range, gives it the next sequence number, queues it for the local log and for
// every replica's link; Kick sends and commits. When the log and every replica
// that counts (W4) have it durable, it retires: the range is free, the request
// is done. A read looks at a filter of ranges in flight, at the caches, at the
// filter again and at the lease, and is answered on the caller's goroutine, or
// goes on in its own goroutine under a shared range lock.
//
// Beside blocks a volume has one small ordered state, which changes by an
// operation of the stream (state.go): requests are held against it when they get
// their number. Ranges are cloned by reference (clone.go). A volume moves from one
// owner to another without a failing command (move.go).
//
// A node that does not own the volume forwards requests to the owner with the
// epoch in which it accepted them, or holds them a bounded time.
//
// Rule numbers (W1, L2, M3 ...) are those of docs/replication.md. Kept here:
// DURABLE (retireLocked), ORDERED (prepare), ONE-OWNER (reign), NO-STALE
// (reign.settle), READ-STABLE (TryRead, readSlow), BOUNDED (workPool), CHECKED
// (resolve).
//
// Lock order: Node.reconcile, Volume.sessions, Volume.sizing, watcher.mu, then
// Volume.mu (of two volumes the one with the lower id first, lockBoth), then link.mu,
// then the store's own queue. No lock but the first three is held across I/O, and
// those never on the way of a read or a write. Completions run without any lock of this package; Recheck runs under
// Volume.mu, the function of Watch under watcher.mu alone.
package replication
