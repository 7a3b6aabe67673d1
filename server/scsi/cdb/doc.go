// Package cdb is the codec of the SCSI device server: command descriptor
// blocks, logical unit numbers, sense data and the parameter lists that arrive
// as Data-Out. Bytes go in, values come out; there is no I/O, no clock, no
// state, and nothing on the path of a READ or WRITE allocates.
//
// The types to know are Sense, one condition in either sense format, and
// UnmapList, a view of an UNMAP parameter list that is never trusted beyond the
// bytes that arrived. Range reads the two fields that all block commands share.
//
// Every function accepts any bytes: none panics and none allocates by a length
// that it read. All integers on the wire are big-endian.
package cdb
