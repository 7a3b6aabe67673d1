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

// TestPack: what wins a tenth is taken and decodes to the block; the rest stays as it is.
func TestPack(t *testing.T) {
	p := NewPacker()
	r := NewReducer(Key{1})
	text := bytes.Repeat([]byte("volume 17 starts at sector 2048 and ends at 4096; "), 100)[:BlockSize]
	for i := 0; i < BlockSize; i += 29 {
		text[i] = byte('a' + i*7%23)
	}
	noise := make([]byte, 0, BlockSize)
	for i := byte(0); len(noise) < BlockSize; i++ {
		fp := r.Fingerprint(append(make([]byte, BlockSize-1), i))
		noise = append(noise, fp[:]...)
	}
	for _, c := range []struct {
		name  string
		block []byte
		raw   Encoding // what becomes of it, stored raw
		s2    Encoding // and with s2, if that takes it
	}{{"text", text, Zstd, Zstd}, {"noise", noise, Raw, Raw}} {
		for _, compress := range []bool{false, true} {
			enc, stored := r.Encode(make([]byte, 0, EncodeRoom), c.block, compress)
			want := c.raw
			if compress {
				want = c.s2
			}
			dst := append(make([]byte, 0, 3+PackRoom), "abc"...)
			got, out, ok, err := p.Pack(dst, enc, stored)
			if err != nil || got != want || ok != (got != enc) || !bytes.Equal(out[:3], []byte("abc")) || !ok && len(out) != 3 {
				t.Fatalf("%s, compressed %v: encoding %d, %v, %d bytes, %v", c.name, compress, got, ok, len(out), err)
			}
			var plain [BlockSize]byte
			if ok {
				if err := Decode(plain[:], got, out[3:]); err != nil || !bytes.Equal(plain[:], c.block) || !StoredLenOK(got, len(out)-3) || len(stored)*9/10 < len(out)-3 {
					t.Fatalf("%s: %v, %d of %d bytes", c.name, err, len(out)-3, len(stored))
				}
				if again, _, ok, err := p.Pack(dst, got, out[3:]); again != got || ok || err != nil {
					t.Fatal("packed twice")
				}
			}
		}
	}
	if _, _, ok, err := p.Pack(make([]byte, 0, PackRoom), S2, []byte{1, 2, 3}); ok || err == nil {
		t.Fatal("packs what is no block")
	}
	room := make([]byte, 0, PackRoom)
	plain := make([]byte, BlockSize)
	n := testing.AllocsPerRun(100, func() {
		enc, out, _, _ := p.Pack(room, Raw, text)
		if Decode(plain, enc, out) != nil {
			t.Fatal("undecodable")
		}
	})
	if n > 0 && !raceEnabled { // the detector empties pools at random
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkPack(b *testing.B) {
	p := NewPacker()
	r := NewReducer(Key{1})
	text := bytes.Repeat([]byte("volume 17 starts at sector 2048 and ends at 4096; "), 100)[:BlockSize]
	for i := 0; i < BlockSize; i += 29 {
		text[i] = byte('a' + i*7%23)
	}
	enc, stored := r.Encode(make([]byte, 0, EncodeRoom), text, true)
	dst := make([]byte, 0, PackRoom)
	b.Run("pack", func(b *testing.B) {
		b.SetBytes(BlockSize)
		for b.Loop() {
			_, _, _, _ = p.Pack(dst, enc, stored)
		}
	})
	got, packed, _, _ := p.Pack(dst, enc, stored)
	b.Run("unpack", func(b *testing.B) {
		b.SetBytes(BlockSize)
		var plain [BlockSize]byte
		for b.Loop() {
			if Decode(plain[:], got, packed) != nil {
				b.Fatal("undecodable")
			}
		}
	})
}
