package dedup

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// PackRoom is the free capacity that Pack needs behind the bytes already in dst.
const PackRoom = BlockSize

// unzstd decodes blocks, on as many goroutines as there are processors; more wait. It never gives
// more than a block, and starts no goroutines.
var unzstd = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(1<<20))
	if err != nil {
		panic("dedup: " + err.Error()) // only for options that do not fit together
	}
	return d
})

// Packer compresses blocks that are stored already once more, and better, for those that
// are hardly read: zstd, which takes some 25 us a block against 5 of s2 and stores a fifth
// less. It is not safe for concurrent use.
//
// Groups of 16 blocks would store another eighth less, and make each read of one block decode
// all of them: 47 us instead of 8. One block at a time keeps a read a read of one block.
type Packer struct {
	zstd         *zstd.Encoder
	plain, again [BlockSize]byte
	fast         [EncodeRoom]byte
	best         [2 * BlockSize]byte
}

// NewPacker makes a Packer.
func NewPacker() *Packer {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(BlockSize),
		zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		panic("dedup: " + err.Error()) // only for options that do not fit together
	}
	return &Packer{zstd: z}
}

// Pack appends a shorter stored form of a block to dst, whose checksum was verified, and says
// which encoding it has. It says no where nothing wins a tenth or more: then dst is
// returned as it was. What it gives has been decoded again and compared. dst is never moved: it must have
// PackRoom bytes of free capacity. An error is of stored bytes that cannot be decoded.
func (p *Packer) Pack(dst []byte, enc Encoding, stored []byte) (Encoding, []byte, bool, error) {
	if cap(dst)-len(dst) < PackRoom {
		panic("dedup: Pack without PackRoom in dst")
	}
	if enc != Raw && enc != S2 {
		return enc, dst, false, nil
	}
	if err := Decode(p.plain[:], enc, stored); err != nil {
		return enc, dst, false, err
	}
	got, best := enc, stored
	if enc == Raw {
		// What s2 cannot do anything with it gives up soon, and nothing else can.
		fast := s2.Encode(p.fast[:], p.plain[:])
		if len(fast) > compressedMax {
			return enc, dst, false, nil
		}
		got, best = S2, fast
	}
	if b := p.zstd.EncodeAll(p.plain[:], p.best[:0]); len(b) <= len(best)-len(best)/10 && len(b) <= compressedMax {
		got, best = Zstd, b
	}
	if got == enc {
		return enc, dst, false, nil
	}
	if err := Decode(p.again[:], got, best); err != nil || p.again != p.plain {
		return enc, dst, false, fmt.Errorf("block does not survive its compression: encoding %d, %v", got, err)
	}
	return got, append(dst, best...), true, nil
}
