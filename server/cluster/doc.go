// Package cluster is the control plane of twinsan: it decides, by a quorum, who
// the nodes are, which volumes exist, who owns each of them and which copies are
// in sync. Data never passes through it, and nothing here is on the path of one
// read or write (C3).
//
// The types to know: [Cluster], a running member; [State], an immutable picture
// of what the quorum has decided; and the commands of command.go, the only way
// from one State to the next.
//
// # Flow
//
//	Bootstrap / JoinCluster   write the identity of a node into its directory, once
//	Open                      runs it: one TCP listener, raft, the start command
//	mutation -> command -> leader -> raft log -> apply on every node -> State -> OnChange
//
// apply (apply.go, change.go) is a pure function of a state and a command. It
// reads no clock, draws no random number and ranges over no map: times and random
// identifiers come in with the command. So the same log makes the same state, to
// the byte, on every node; State.Hash checks it.
//
// A mutation may be sent twice without harm: each command carries a request id,
// and the state remembers the answers of the last ones. A repeated command gets
// the first answer and changes nothing. This is what makes ErrConflict final (M7):
// once a change is refused, a delayed copy of it is refused too.
//
// All traffic uses one listener and TLS 1.3; the protocol is chosen by ALPN
// (listener.go). Everything but joining asks for a node certificate, and what the
// node may say follows from its membership and its role.
//
// # Locks
//
//	Cluster.mu      closing, against new futures of raft
//	broadcast.mu    waiters for a change of leader
//	fsm.mu          waiters for an index; the state itself is an atomic pointer
//	raftStore.mu    the latched error
//	rpcPool.mu      idle connections
//	raftLayer.mu    open raft connections
//	listener.mu     open connections, counts of half-open handshakes
//
// No lock is held across I/O, a callback or another of these locks.
//
// # Invariants kept here
//
//	ONE-OWNER   a record changes owner only by compare-and-set on its epoch, to a
//	            member of the recorded in-sync set (change.go)
//	NO-STALE    a replica enters the in-sync set only by its owner's proposal, with
//	            the recorded replica id and incarnation (change.go)
//	BOUNDED     events, tokens, requests, volumes, hosts, nodes, connections and
//	            handshakes have fixed limits
package cluster
