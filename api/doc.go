// Package api is the one way to see and change a cluster: the gRPC services of
// twinsan.v1 (api/v1/twinsan.proto). A service translates, authorises and
// calls; what a call means is decided in package server.
//
// The types to know: [Server] listens on a unix socket for the local
// administrator and, under mutual TLS, on TCP for remote administrators and the
// other nodes. [Backend] is what it needs of a node. [Client] is the other end,
// for the command line; [Peers] is the same for nodes that ask each other.
//
// A call goes through recover -> authorise -> log, then to its service, which
// turns messages into the types of package server, calls the [Backend] and
// turns the answer back (translate.go). Errors become gRPC codes in one table
// (status.go) and nowhere else.
//
// Who may call what: on the socket, root and the user that the node runs as are
// administrators (SO_PEERCRED). On TCP a certificate of the cluster's CA says
// who calls: twinsan://UUID/admin/NAME is an administrator,
// twinsan://UUID/node/ID is a node and must be a member; a witness may only read.
//
// The package holds no state of the cluster and starts no goroutines but those
// of gRPC, which Server.Close and Client.Close wait for. Peers has one mutex
// over its connections; it is not held across I/O.
package api
