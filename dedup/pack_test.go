package dedup

import (
	"bytes"
	"testing"
)

// FuzzDecodeZstd: any bytes are decoded to one block or refused.
func FuzzDecodeZstd(f *testing.F) {
	p := NewPacker()
	for _, step := range []int{1, 3, 7} {
		block := make([]byte, BlockSize)
		for i := range block {
			block[i] = byte(i * i / step >> 3)
		}
		f.Add(p.zstd.EncodeAll(block, nil))
		f.Add(p.zstd.EncodeAll(append(block, 1), nil))
		f.Add(p.zstd.EncodeAll(block[1:], nil))
	}
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0})
	f.Fuzz(func(t *testing.T, stored []byte) {
		var dst [BlockSize + 1]byte
		dst[BlockSize] = 77
		if Decode(dst[:BlockSize], Zstd, stored) == nil && StoredLenOK(Zstd, len(stored)) != (0 < len(stored) && len(stored) <= compressedMax) || dst[BlockSize] != 77 {
			t.Fatal("wrote behind the block")
		}
	})
}

// FuzzDecodeGroup: any bytes are decoded to the blocks of a group or refused, and nothing is written behind them.
func FuzzDecodeGroup(f *testing.F) {
	p := NewPacker()
	group := make([]byte, PackedBytes)
	for i := range group {
		group[i] = byte(i * i >> 3 >> (i >> 12))
	}
	f.Add(p.groups.EncodeAll(group, nil))
	f.Add(p.groups.EncodeAll(append(group[:PackedBytes:PackedBytes], 1), nil))
	f.Add(p.groups.EncodeAll(group[1:], nil))
	f.Add(append(p.groups.EncodeAll(group[:5*BlockSize], nil), p.groups.EncodeAll(group[5*BlockSize:], nil)...))
	// A frame that promises 2^63 bytes, and one with a window of 1 TiB.
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	dst := make([]byte, PackedBytes+1)
	f.Fuzz(func(t *testing.T, stored []byte) {
		dst[PackedBytes] = 77
		if err := DecodeGroup(dst[:PackedBytes], stored); err == nil && !PackedLenOK(len(stored)) || dst[PackedBytes] != 77 {
			t.Fatal("wrote behind the group, or took an impossible length")
		}
	})
}

// text is a block of words that differs from others by n.
func text(n int) []byte {
	b := bytes.Repeat([]byte("volume 17 starts at sector 2048 and ends at 4096; "), 100)[:BlockSize]
	for i := 0; i < BlockSize; i += 29 {
		b[i] = byte('a' + i*(7+n)%23)
	}
	return b
}

func scattered(n int) []byte {
	r := NewReducer(Key{1, byte(n), byte(n >> 8)})
	b := make([]byte, 0, BlockSize)
	for i := byte(0); len(b) < BlockSize; i++ {
		fp := r.Fingerprint(append(make([]byte, BlockSize-1), i))
		b = append(b, fp[:]...)
	}
	return b
}

// TestAlone: what wins a tenth is taken and decodes to the block; the rest stays as it is.
func TestAlone(t *testing.T) {
	p := NewPacker()
	r := NewReducer(Key{1})
	for _, c := range []struct {
		name  string
		block []byte
		raw   Encoding // what becomes of it, stored raw
		s2    Encoding // and with s2, if that takes it
	}{{"text", text(0), Zstd, Zstd}, {"noise", scattered(0), Raw, Raw}} {
		for _, compress := range []bool{false, true} {
			enc, stored := r.Encode(make([]byte, 0, EncodeRoom), c.block, compress)
			want := c.raw
			if compress {
				want = c.s2
			}
			dst := append(make([]byte, 0, 3+AloneRoom), "abc"...)
			got, out := p.Alone(dst, enc, stored, c.block)
			if got != want || got == enc && &out[0] != &stored[0] || got != enc && &out[0] != &dst[:4][3] {
				t.Fatalf("%s, compressed %v: encoding %d, %d bytes", c.name, compress, got, len(out))
			}
			if got == enc {
				continue
			}
			if err := p.Survives(got, out, c.block); err != nil || !StoredLenOK(got, len(out)) || len(stored)*9/10 < len(out) {
				t.Fatalf("%s: %v, %d of %d bytes", c.name, err, len(out), len(stored))
			}
			if again, same := p.Alone(dst, got, out, c.block); again != got || &same[0] != &out[0] {
				t.Fatal("packed twice")
			}
			if p.Survives(got, out, text(1)) == nil || p.Survives(got, out[1:], c.block) == nil {
				t.Fatal("another block survived")
			}
		}
	}
}

// TestGroup: blocks that have much in common are stored in less than each by itself, and come
// back; what does not win a twentieth, or would be too long, is no group.
func TestGroup(t *testing.T) {
	p := NewPacker()
	plain, again := make([]byte, 0, PackedBytes), make([]byte, PackedBytes)
	alone := 0
	for i := range PackedBlocks {
		plain = append(plain, text(i)...)
		_, b := p.Alone(make([]byte, 0, AloneRoom), Raw, text(i), text(i))
		alone += len(b)
	}
	stored, ok := p.Group(plain, alone)
	if !ok || alone*9/10 < len(stored) {
		t.Fatalf("%v: %d bytes, alone %d", ok, len(stored), alone)
	}
	if err := DecodeGroup(again, stored); err != nil || !bytes.Equal(again, plain) {
		t.Fatal(err)
	}
	n := len(stored)
	for _, c := range []struct {
		alone int
		want  bool
	}{{n*groupWins/(groupWins-1) + 2, true}, {n*groupWins/(groupWins-1) - 2, false}, {n, false}} {
		if _, ok := p.Group(plain, c.alone); ok != c.want {
			t.Fatalf("a group of %d bytes for %d is made: %v", n, c.alone, ok)
		}
	}
	plain = plain[:0]
	for i := range PackedBlocks {
		plain = append(plain, scattered(i)...)
	}
	if _, ok := p.Group(plain, 2*PackedBytes); ok {
		t.Fatal("a group that saves nothing")
	}
	for _, bad := range [][]byte{nil, {0}, p.zstd.EncodeAll(plain[:BlockSize], nil), p.groups.EncodeAll(append(plain[:PackedBytes-1:PackedBytes-1], "ab"...), nil)} {
		if DecodeGroup(again, bad) == nil {
			t.Fatalf("%d bytes are a group", len(bad))
		}
	}
}

// TestPackingAllocatesNothing: neither blocks nor groups, coming and going.
func TestPackingAllocatesNothing(t *testing.T) {
	p := NewPacker()
	room, block := make([]byte, 0, AloneRoom), text(0)
	group, plain := bytes.Repeat(block, PackedBlocks), make([]byte, PackedBytes)
	n := testing.AllocsPerRun(50, func() {
		enc, out := p.Alone(room, Raw, block, block)
		if p.Survives(enc, out, block) != nil {
			t.Fatal("undecodable")
		}
		stored, ok := p.Group(group, PackedBytes)
		if !ok || DecodeGroup(plain, stored) != nil {
			t.Fatal("undecodable group")
		}
	})
	if n > 0 && !raceEnabled { // the detector empties pools at random
		t.Errorf("%v allocations", n)
	}
}
