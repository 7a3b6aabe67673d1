// Package lab sets up what the end-to-end tests and the benchmarks work on: a
// demonstration cluster of real processes, iSCSI tools that are not ours, a load
// generator, and tgt as a peer.
//
// The types to know: Cluster (twinsan demo and the command line against it),
// Load (a running iscsiload and its Result) and Peer (a tgtd of our own).
//
// A Cluster belongs to one goroutine; Demo and CLI may be called by several.
// Everything that is started is stopped by the Close of what started it, and
// only that: processes are ended by their number and start, never by name.
package lab
