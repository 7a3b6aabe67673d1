package dedup

// BlockSize is the unit of reduction: every fingerprint, map entry and block
// identity names exactly this many bytes of client data.
const BlockSize = 4096

// Fingerprint is the keyed BLAKE3-256 of a 4 KiB block. The key is made once,
// when the cluster is created, and is the same on every node, so that equal
// blocks have equal fingerprints everywhere and nobody outside can craft two
// blocks with one fingerprint.
type Fingerprint [32]byte

// Key is the cluster's fingerprint key.
type Key [32]byte

// Encoding says how the stored bytes of a block are to be read.
// Part of the disk and wire formats, do not change.
type Encoding uint8

const (
	// Zero is a block of zeros. It has no stored bytes and no fingerprint.
	Zero Encoding = 0
	// Raw is a block stored as it is, 4096 bytes.
	Raw Encoding = 1
	// S2 is one s2 block (klauspost/compress), always shorter than 4096 bytes.
	S2 Encoding = 2
	// Zstd is one zstd frame, always shorter than 4096 bytes. Only devices hold it, of
	// pools since root version 4: what goes to another node is Raw or S2.
	Zstd Encoding = 3
	// ZstdGroup is one zstd frame of PackedBlocks blocks together, see DecodeGroup. Only devices hold
	// it, of pools since root version 5. It is no form of a block by itself: Decode,
	// StoredLenOK and Verify do not take it.
	ZstdGroup Encoding = 4
)

// Block is one 4 KiB block after reduction.
//
// Data holds the stored bytes. It is nil for Zero, and nil for a block that is
// sent or logged by reference (the receiver already holds the fingerprint).
// Sum is the CRC32C of the stored bytes; it travels with the block from the
// node that reduced it to every disk, and is checked before each use (CHECKED).
type Block struct {
	Fingerprint Fingerprint
	Sum         uint32
	Encoding    Encoding
	Data        []byte
}
