package dedup

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// AloneRoom is the free capacity that Alone needs behind the bytes already in dst.
const AloneRoom = BlockSize

// unzstd decodes blocks and groups, on as many goroutines as there are processors; more wait. It never gives
// more than it is given room for, and starts no goroutines.
var unzstd = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxMemory(1<<20), zstd.WithDecoderMaxWindow(PackedBytes))
	if err != nil {
		panic("dedup: " + err.Error()) // only for options that do not fit together
	}
	return d
})

// Packer compresses blocks that are stored already once more, and better, for those that
// are hardly read: zstd, which takes some 25 us a block against 5 of s2 and stores a fifth
// less, and in groups another eighth less. It is not safe for concurrent use.
type Packer struct {
	zstd, groups *zstd.Encoder
	again        [BlockSize]byte
	fast         [EncodeRoom]byte
	best         [2 * BlockSize]byte
	frame, whole []byte // of a group
}

// NewPacker makes a Packer.
func NewPacker() *Packer {
	encoder := func(window int) *zstd.Encoder {
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(window),
			zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true), zstd.WithEncoderLevel(zstd.SpeedDefault))
		if err != nil {
			panic("dedup: " + err.Error()) // only for options that do not fit together
		}
		return z
	}
	// What does not compress is a little longer than it was.
	return &Packer{zstd: encoder(BlockSize), groups: encoder(PackedBytes), frame: make([]byte, 0, PackedBytes+PackedBytes/16), whole: make([]byte, PackedBytes)}
}

// Alone gives the best stored form of a block by itself: what it is stored as, or what wins a
// tenth or more. plain is the block's content, stored its form with enc: Raw, S2 or Zstd. A new form stands
// in dst's free capacity, of which it needs AloneRoom; otherwise it is stored itself. Who stores a new
// form asks Survives before.
func (p *Packer) Alone(dst []byte, enc Encoding, stored, plain []byte) (Encoding, []byte) {
	if cap(dst)-len(dst) < AloneRoom {
		panic("dedup: Alone without AloneRoom in dst")
	}
	if enc != Raw && enc != S2 {
		return enc, stored
	}
	got, best := enc, stored
	if enc == Raw {
		// What s2 cannot do anything with it gives up soon, and nothing else can.
		fast := s2.Encode(p.fast[:], plain)
		if len(fast) > compressedMax {
			return enc, stored
		}
		got, best = S2, fast
	}
	if b := p.zstd.EncodeAll(plain, p.best[:0]); len(b) <= len(best)-len(best)/10 && len(b) <= compressedMax {
		got, best = Zstd, b
	}
	if got == enc {
		return enc, stored
	}
	n := len(dst)
	return got, append(dst, best...)[n:]
}

// Survives decodes a new form of a block and compares it with the block's content.
func (p *Packer) Survives(enc Encoding, stored, plain []byte) error {
	if err := Decode(p.again[:], enc, stored); err != nil {
		return fmt.Errorf("block does not survive its compression: %w", err)
	}
	if string(p.again[:]) != string(plain) {
		return fmt.Errorf("block does not survive its compression: other content with encoding %d", enc)
	}
	return nil
}
