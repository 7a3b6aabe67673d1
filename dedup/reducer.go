package dedup

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/klauspost/compress/s2"
	"github.com/zeebo/blake3"
)

const (
	// EncodeRoom is the free capacity that Encode needs behind the bytes already in
	// dst: the worst case of an s2 block of 4096 bytes, which is what the encoder
	// demands before it starts even though at most BlockSize bytes are kept.
	EncodeRoom = BlockSize + 64

	// compressedMax is the longest s2 block that is kept. Saving less than 512 bytes
	// of 4096 does not pay for the decoding of every later read.
	compressedMax = BlockSize - 512
)

var zeroBlock [BlockSize]byte

// castagnoli is CRC-32C, which the processor computes at 30 GB/s.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// IsZero says whether block, of at most BlockSize bytes, holds only zeros.
// It leaves at the first difference: 3 ns for most blocks that are not zero.
func IsZero(block []byte) bool {
	return bytes.Equal(block, zeroBlock[:len(block)])
}

// Sum is the CRC-32C (Castagnoli) of the stored bytes of a block.
func Sum(stored []byte) uint32 {
	return crc32.Checksum(stored, castagnoli)
}

// Reducer makes fingerprints and stored bytes. It holds the state of the hash
// (12 KiB), so that nothing is allocated per block. It is not safe for
// concurrent use: every goroutine that reduces has its own.
type Reducer struct {
	hash *blake3.Hasher
	key  [8]uint32
	tree tree4
}

// NewReducer makes a Reducer for the cluster's key.
func NewReducer(k Key) *Reducer {
	h, err := blake3.NewKeyed(k[:])
	if err != nil {
		panic("dedup: " + err.Error()) // only for a key that is not 32 bytes
	}
	r := &Reducer{hash: h}
	for i := range r.key {
		r.key[i] = binary.LittleEndian.Uint32(k[4*i:])
	}
	return r
}

// Fingerprint is the keyed BLAKE3-256 of block, BlockSize bytes.
//
// A reused keyed Hasher costs about what the one-shot unkeyed function does (2.9
// and 3.0 us on one machine): both copy the block once and then wait for a kernel
// that has four chunks for its eight lanes. A new Hasher per block clears 12 KiB
// first and costs 7.1 us. BenchmarkFingerprint repeats this.
func (r *Reducer) Fingerprint(block []byte) Fingerprint {
	if len(block) != BlockSize {
		panic("dedup: fingerprint of a block that is not 4096 bytes")
	}
	var fp Fingerprint
	r.hash.Reset()
	r.hash.Write(block) // never fails
	r.hash.Sum(fp[:0])
	return fp
}

// GroupBlocks is how many blocks Fingerprints takes at once.
const GroupBlocks = lanesBlocks

// Fingerprints fills fps with the fingerprints of the blocks of data, one to GroupBlocks
// of BlockSize bytes each; blocks of zeros have none, and get the zero value. Where the processor has
// AVX2 two blocks, with AVX-512 four cost little more than one (BenchmarkFingerprints).
func (r *Reducer) Fingerprints(fps *[GroupBlocks]Fingerprint, data []byte) {
	if len(data)%BlockSize != 0 || len(data) > GroupBlocks*BlockSize {
		panic("dedup: fingerprints of a group that is not one to four blocks")
	}
	*fps = [GroupBlocks]Fingerprint{}
	var blocks [lanesBlocks][]byte
	var place [lanesBlocks]int
	n := 0
	for i := range len(data) / BlockSize {
		block := data[i*BlockSize : (i+1)*BlockSize]
		if IsZero(block) {
			continue
		}
		if wide == narrow {
			fps[i] = r.Fingerprint(block)
			continue
		}
		blocks[n], place[n] = block, i
		n++
	}
	if n == 0 {
		return
	}
	if n == 1 {
		fps[place[0]] = r.Fingerprint(blocks[0])
		return
	}
	r.tree.hash4(wide, &r.key, &blocks, n)
	for i := range n {
		fps[place[i]] = r.tree.cvs[i]
	}
}

// Encode appends the stored bytes of block (BlockSize bytes) to dst and returns
// the encoding and the longer slice. With compress it tries s2 and keeps the
// result when it saves an eighth of the block or more; otherwise the block is
// appended as it is. Zero blocks are the caller's to find (IsZero): Encode never
// answers Zero.
//
// dst is never moved, so that slices of it stay valid: it must have EncodeRoom
// bytes of free capacity, and Encode panics when it has not. The bytes between
// the returned length and that room are overwritten too. block must not overlap them.
func (r *Reducer) Encode(dst, block []byte, compress bool) (Encoding, []byte) {
	n := len(dst)
	if cap(dst)-n < EncodeRoom {
		panic("dedup: Encode without EncodeRoom in dst")
	}
	if len(block) != BlockSize {
		panic("dedup: Encode of a block that is not 4096 bytes")
	}
	if compress {
		out := s2.Encode(dst[n:n+EncodeRoom:n+EncodeRoom], block)
		if len(out) <= compressedMax {
			return S2, dst[:n+len(out)]
		}
	}
	return Raw, append(dst, block...)
}

// CorruptError says that the stored bytes of a block are not what was stored.
// Whoever knows the device and the address wraps it.
type CorruptError struct {
	Encoding Encoding
	Len      int    // of the stored bytes
	Reason   string // constant phrase
	Want     uint32 // checksum that the block carries, when it is the sum that differs
	Got      uint32 // checksum of the bytes
}

func (e *CorruptError) Error() string {
	if e.Want != e.Got {
		return fmt.Sprintf("corrupt block: %s: expected %08x, found %08x over %d bytes, encoding %d",
			e.Reason, e.Want, e.Got, e.Len, e.Encoding)
	}
	return fmt.Sprintf("corrupt block: %s: %d bytes, encoding %d", e.Reason, e.Len, e.Encoding)
}

func corrupt(enc Encoding, stored []byte, reason string) error {
	return &CorruptError{Encoding: enc, Len: len(stored), Reason: reason}
}

// Decode fills dst, exactly BlockSize bytes, from the stored bytes of a block.
// It takes any input: what cannot be the stored form of one block is a
// *CorruptError, and dst is then undefined. It does not look at the checksum.
func Decode(dst []byte, enc Encoding, stored []byte) error {
	if len(dst) != BlockSize {
		panic("dedup: Decode into a buffer that is not 4096 bytes")
	}
	switch enc {
	case Zero:
		if len(stored) != 0 {
			return corrupt(enc, stored, "zero block with stored bytes")
		}
		clear(dst)
		return nil
	case Raw:
		if len(stored) != BlockSize {
			return corrupt(enc, stored, "raw block of the wrong length")
		}
		copy(dst, stored)
		return nil
	case S2:
		// The length is checked before the decoder sees dst: a longer one would make
		// it allocate what the bytes ask for.
		if n, err := s2.DecodedLen(stored); err != nil || n != BlockSize {
			return corrupt(enc, stored, "s2 block that does not hold 4096 bytes")
		}
		if _, err := s2.Decode(dst[:BlockSize:BlockSize], stored); err != nil {
			return corrupt(enc, stored, "undecodable s2 block")
		}
		return nil
	case Zstd:
		// The decoder writes no more than dst has room for.
		if b, err := unzstd().DecodeAll(stored, dst[:0:BlockSize]); err != nil || len(b) != BlockSize {
			return corrupt(enc, stored, "undecodable zstd block")
		}
		return nil
	}
	return corrupt(enc, stored, "unknown encoding")
}

// StoredLenOK says whether n can be the number of stored bytes of a block with
// this encoding. Readers of disk and wire formats ask it before they trust a length.
func StoredLenOK(enc Encoding, n int) bool {
	switch enc {
	case Zero:
		return n == 0
	case Raw:
		return n == BlockSize
	case S2, Zstd:
		return 0 < n && n <= compressedMax
	}
	return false
}

// Verify checks a block that carries its stored bytes: the encoding is known,
// the length fits it, and the bytes have the sum that the block names. A
// reference (nil Data, not Zero) has only its encoding to check. It does not
// decode: a block with the right sum and undecodable bytes was made wrong, and
// Decode says so.
func Verify(b *Block) error {
	if b.Data == nil && (b.Encoding == Raw || b.Encoding == S2) {
		return nil
	}
	if !StoredLenOK(b.Encoding, len(b.Data)) {
		return corrupt(b.Encoding, b.Data, "length does not fit the encoding")
	}
	if b.Encoding == Zero {
		return nil
	}
	if got := Sum(b.Data); got != b.Sum {
		return &CorruptError{Encoding: b.Encoding, Len: len(b.Data), Reason: "wrong checksum", Want: b.Sum, Got: got}
	}
	return nil
}
