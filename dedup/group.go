package dedup

// A group is PackedBlocks blocks that were compressed together: one zstd frame of their
// contents, one behind the other, stored once for all of them. Each of them has the length and
// the checksum of the frame, the encoding ZstdGroup, and its index in the group.
const (
	// PackedBlocks is the number of blocks of a group. Part of the disk format, do not change.
	// Sixteen would store another thirtieth less, for twice the price of a read of one
	// block: docs/reduction.md has the numbers.
	PackedBlocks = 8
	// PackedBytes is what a group decodes to.
	PackedBytes = PackedBlocks * BlockSize
	// PackedMax is the longest frame that is kept, as of a block by itself.
	PackedMax = PackedBlocks * compressedMax
)

// PackedLenOK says whether n can be the number of stored bytes of a group: each member
// has one of them at least, so what any of them needs is never counted as empty.
func PackedLenOK(n int) bool { return PackedBlocks <= n && n <= PackedMax }

// DecodeGroup fills dst, exactly PackedBytes, from the stored bytes of a group. It takes any
// input: what cannot be a group is a *CorruptError, and dst is then undefined. It does not look
// at the checksum, and allocates nothing by what the bytes ask for.
func DecodeGroup(dst, stored []byte) error {
	if len(dst) != PackedBytes {
		panic("dedup: DecodeGroup into a buffer that is not a group")
	}
	if !PackedLenOK(len(stored)) {
		return corrupt(ZstdGroup, stored, "group of an impossible length")
	}
	// The decoder writes no more than dst has room for.
	if b, err := unzstd().DecodeAll(stored, dst[:0:PackedBytes]); err != nil || len(b) != PackedBytes {
		return corrupt(ZstdGroup, stored, "undecodable group")
	}
	return nil
}

// Group gives the stored form of the blocks in plain, PackedBytes, as one group; it is valid until the
// next call. alone is what the best forms of them by themselves come to: it says no where a group does not
// save groupWins of that. What it gives was decoded again and compared; a frame that does not
// survive that is not given either.
func (p *Packer) Group(plain []byte, alone int) ([]byte, bool) {
	if len(plain) != PackedBytes {
		panic("dedup: Group of what is not a group")
	}
	p.frame = p.groups.EncodeAll(plain, p.frame[:0])
	if n := len(p.frame); !PackedLenOK(n) || alone-alone/groupWins < n {
		return nil, false
	}
	if DecodeGroup(p.whole, p.frame) != nil || string(p.whole) != string(plain) {
		return nil, false
	}
	return p.frame, true
}

// groupWins: a group saves a twentieth or more, or reading one block by decoding all does
// not pay.
const groupWins = 20
