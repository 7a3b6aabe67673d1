// Package server is one node: its configuration, the start and stop of its parts
// in order, and the wires between them. Nothing clever lives here.
//
// The types to know: [Config], the node's file; [Node], the running node, which
// answers what the API asks (its methods are api.Backend); and [Status], the
// picture of a cluster that one node puts together from the recorded state and
// the [Report] of every node (health.go judges it).
//
// The flow of a start (Open):
//
//	identity -> store (replay) -> cluster member -> ready by a quorum
//	         -> replication -> device server -> iSCSI target
//	         -> first state applied: local replicas, logical units, access
//	         -> portals open
//
// Besides serving, a data node looks at the fill of its pool once a second (space.go)
// and, while it is recorded as draining, moves its volumes away (move.go).
//
// Open returns when the cluster member listens, so that the API can say what the
// node waits for; the rest follows in onChange, the one function through which
// every later change of the recorded state comes too (exports.go). Close goes the
// same way backwards.
//
// # Locks
//
//	Node.mu      the parts that the first state makes, and what was exported of it.
//	             Held over a whole application of a state, I/O of the store included,
//	             and by Close; never by a read, a write, a report or a status, which
//	             take the parts from an atomic pointer.
//	freer.mu     the list of freed volumes; poolKeeper.mu the list of devices as recorded. Both are taken
//	             last and held for no call.
//
// # Invariants
//
//	BOUNDED   events wait in a channel of fixed size, fan-out to nodes has one
//	          call each and a time limit; a node that is silent delays nobody longer.
//	NO-STALE  no portal listens before the recorded state of this start was applied.
package server
