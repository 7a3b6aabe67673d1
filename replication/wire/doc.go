// Package wire is the codec of what nodes say to each other on the data path:
// bytes in, value or error out. It opens no sockets, starts no goroutines and
// knows no clock; package replication gives the messages their meaning.
//
// A connection carries frames. A frame is a fixed header, a small meta part and
// an optional data part (stored blocks or client data). The header and the meta
// part are covered by CRC32C sums in the header; blocks in the data part carry
// their own sums, which the receiver verifies before it stores or returns them.
package wire
