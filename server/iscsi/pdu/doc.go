// Package pdu is the codec of iSCSI protocol data units (RFC 7143 section 11):
// bytes in, value or error out. It does no I/O, keeps no state and allocates
// nothing but the strings of text negotiation.
//
// The types to know are Header, a view of the 48-byte basic header segment that
// is laid over a buffer by conversion, (*Header)(buf), and the typed PDUs
// (SCSICommand, DataIn, LoginRequest ...), each with Decode and Encode.
//
// On the wire a PDU is
//
//	+--------------------------+ 0
//	| basic header segment     | 48 bytes
//	+--------------------------+ 48
//	| additional header segs   | Header.AHSLen bytes, a multiple of 4
//	+--------------------------+
//	| header digest            | 4 bytes, when negotiated: CRC32C of all above
//	+--------------------------+
//	| data segment             | Header.DataLen bytes
//	| padding                  | zeros, to a multiple of 4
//	+--------------------------+
//	| data digest              | 4 bytes, when negotiated and there is data:
//	+--------------------------+ CRC32C of data and padding
//
// All integers are big-endian, except the digests, whose reflected CRC goes out
// least significant byte first (RFC 7143 section 13.1). The lengths in a header
// are the peer's claim: Layout computes with them, the caller compares them with
// its limits before it reserves memory.
package pdu
