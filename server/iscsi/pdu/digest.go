package pdu

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// zeroPad is what Pad counts.
var zeroPad [3]byte

// Digest is the CRC32C of b.
func Digest(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// UpdateDigest continues the CRC32C of earlier bytes with b.
func UpdateDigest(crc uint32, b []byte) uint32 { return crc32.Update(crc, castagnoli, b) }

// DataDigest is the digest of a data segment with its padding of zeros.
func DataDigest(data []byte) uint32 {
	return UpdateDigest(Digest(data), zeroPad[:Pad(len(data))])
}

// PutDigest stores a digest into the first four bytes of b.
func PutDigest(b []byte, crc uint32) { binary.LittleEndian.PutUint32(b, crc) }

// GetDigest reads the digest in the first four bytes of b.
func GetDigest(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// AppendDigest appends a digest to b.
func AppendDigest(b []byte, crc uint32) []byte { return binary.LittleEndian.AppendUint32(b, crc) }
