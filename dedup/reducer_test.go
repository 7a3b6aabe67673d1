package dedup

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/zeebo/blake3"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testKey and pattern are those of the published BLAKE3 test vectors.
var testKey = Key([]byte("whats the Elvish word for friend"))

func pattern() []byte {
	p := make([]byte, BlockSize)
	for i := range p {
		p[i] = byte(i % 251)
	}
	return p
}

func random(seed uint64) []byte {
	p := make([]byte, BlockSize)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// halfRandom has n random bytes and repetition behind them.
func halfRandom(seed uint64, n int) []byte {
	p := random(seed)
	for i := n; i < len(p); i++ {
		p[i] = "the quick brown fox "[i%20]
	}
	return p
}

func TestIsZero(t *testing.T) {
	p := make([]byte, BlockSize)
	if !IsZero(p) || !IsZero(p[:100]) || !IsZero(nil) {
		t.Error("zeros are not zero")
	}
	for _, i := range []int{0, 1, 2047, 4095} {
		p[i] = 0x80
		if IsZero(p) {
			t.Errorf("zero in spite of byte %d", i)
		}
		p[i] = 0
	}
}

// TestFingerprintIsKeyedBLAKE3 pins the fingerprint to the published vector for
// 4096 bytes: it stands on disks and in other nodes' catalogues.
func TestFingerprintIsKeyedBLAKE3(t *testing.T) {
	r := NewReducer(testKey)
	want := "befc660aea2f1718884cd8deb9902811d332f4fc4a38cf7c7300d597a081bfc0"
	for range 2 { // the second one by a used hasher
		if fp := r.Fingerprint(pattern()); hex.EncodeToString(fp[:]) != want {
			t.Errorf("fingerprint %x, want %s", fp, want)
		}
		other := r.Fingerprint(random(1))
		if hex.EncodeToString(other[:]) == want {
			t.Error("two blocks have one fingerprint")
		}
	}
	if fp := NewReducer(Key{1}).Fingerprint(pattern()); hex.EncodeToString(fp[:]) == want {
		t.Error("two keys give one fingerprint")
	}
}

func TestSumIsCRC32C(t *testing.T) {
	if got := Sum([]byte("123456789")); got != 0xe3069283 {
		t.Errorf("sum %08x", got)
	}
}

func TestEncodeDecode(t *testing.T) {
	r := NewReducer(testKey)
	for _, c := range []struct {
		name     string
		block    []byte
		compress bool
		want     Encoding
	}{
		{"text", bytes.Repeat([]byte("0123456789abcdef"), 256), true, S2},
		{"text, not compressed", bytes.Repeat([]byte("0123456789abcdef"), 256), false, Raw},
		{"random", random(1), true, Raw},
		{"zeros", make([]byte, BlockSize), true, S2},
		{"saves an eighth", halfRandom(1, 3400), true, S2},
		{"saves too little", halfRandom(1, 3700), true, Raw},
	} {
		const prefix = "what was there before"
		dst := append(make([]byte, 0, len(prefix)+EncodeRoom), prefix...)
		before := bytes.Clone(c.block)
		enc, out := r.Encode(dst, c.block, c.compress)
		if enc != c.want {
			t.Errorf("%s: encoding %d, want %d", c.name, enc, c.want)
		}
		if &out[0] != &dst[0] || string(out[:len(prefix)]) != prefix {
			t.Errorf("%s: dst was moved or changed", c.name)
		}
		if !bytes.Equal(before, c.block) {
			t.Errorf("%s: the block was changed", c.name)
		}
		stored := out[len(prefix):]
		if !StoredLenOK(enc, len(stored)) {
			t.Errorf("%s: %d stored bytes do not fit encoding %d", c.name, len(stored), enc)
		}
		got := random(9)
		if err := Decode(got, enc, stored); err != nil || !bytes.Equal(got, c.block) {
			t.Errorf("%s: decoded block differs, %v", c.name, err)
		}
		b := Block{Encoding: enc, Data: stored, Sum: Sum(stored)}
		if err := Verify(&b); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestEncodePanicsWithoutRoom(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Encode grew dst")
		}
	}()
	NewReducer(testKey).Encode(make([]byte, 1, EncodeRoom), random(1), true)
}

func TestEncodeRoomIsEnough(t *testing.T) {
	if n := s2.MaxEncodedLen(BlockSize); n > EncodeRoom {
		t.Errorf("the encoder wants %d bytes: it would allocate", n)
	}
}

func TestNoAllocations(t *testing.T) {
	r := NewReducer(testKey)
	blocks := [][]byte{random(1), halfRandom(2, 1000)}
	dst := make([]byte, 0, EncodeRoom)
	out := make([]byte, BlockSize)
	var fp Fingerprint
	var fps [GroupBlocks]Fingerprint
	group := append(random(3), halfRandom(4, 1000)...)
	if n := testing.AllocsPerRun(100, func() {
		r.Fingerprints(&fps, group)
		for _, b := range blocks {
			fp = r.Fingerprint(b)
			enc, stored := r.Encode(dst, b, true)
			block := Block{Fingerprint: fp, Sum: Sum(stored), Encoding: enc, Data: stored}
			if Verify(&block) != nil || Decode(out, enc, stored) != nil {
				t.Error("bad round trip")
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestDecodeRefuses(t *testing.T) {
	good := s2.Encode(nil, halfRandom(1, 1000))
	long := s2.Encode(nil, make([]byte, 2*BlockSize))
	for _, c := range []struct {
		name   string
		enc    Encoding
		stored []byte
	}{
		{"zero with bytes", Zero, []byte{0}},
		{"short raw", Raw, make([]byte, BlockSize-1)},
		{"long raw", Raw, make([]byte, BlockSize+1)},
		{"empty s2", S2, nil},
		{"cut s2", S2, good[:len(good)-1]},
		{"s2 with bytes behind", S2, append(bytes.Clone(good), 0)},
		{"s2 of 8 KiB", S2, long},
		{"s2 of 4 GiB", S2, []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0}},
		{"unknown encoding", 77, good},
	} {
		var bad *CorruptError
		if err := Decode(make([]byte, BlockSize), c.enc, c.stored); !errors.As(err, &bad) || bad.Encoding != c.enc || bad.Len != len(c.stored) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	raw := random(1)
	for _, c := range []struct {
		name  string
		block Block
		ok    bool
	}{
		{"reference", Block{Encoding: S2, Sum: 1}, true},
		{"zero", Block{Encoding: Zero}, true},
		{"zero with bytes", Block{Encoding: Zero, Data: raw[:1]}, false},
		{"raw", Block{Encoding: Raw, Data: raw, Sum: Sum(raw)}, true},
		{"flipped", Block{Encoding: Raw, Data: raw, Sum: Sum(raw) ^ 1}, false},
		{"short raw", Block{Encoding: Raw, Data: raw[:100], Sum: Sum(raw[:100])}, false},
		{"s2 that saves nothing", Block{Encoding: S2, Data: raw[:compressedMax+1], Sum: Sum(raw[:compressedMax+1])}, false},
		{"empty s2", Block{Encoding: S2, Data: []byte{}}, false},
		{"unknown encoding", Block{Encoding: 9}, false},
	} {
		err := Verify(&c.block)
		var bad *CorruptError
		if c.ok != (err == nil) || err != nil && (!errors.As(err, &bad) || bad.Error() == "") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// FuzzDecode: any stored bytes are a block or a CorruptError, the same for both
// of two reads, and nothing is written beyond the block.
func FuzzDecode(f *testing.F) {
	r := NewReducer(testKey)
	for _, b := range [][]byte{random(1), halfRandom(1, 100), halfRandom(2, 2000), make([]byte, BlockSize)} {
		enc, out := r.Encode(make([]byte, 0, EncodeRoom), b, true)
		f.Add(uint8(enc), out)
	}
	f.Add(uint8(Zero), []byte{})
	f.Add(uint8(S2), []byte{0x80, 0x20, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, enc uint8, stored []byte) {
		mem := make([]byte, 2*BlockSize)
		mem[BlockSize] = 0xa5
		first := mem[:BlockSize]
		err := Decode(first, Encoding(enc), stored)
		second := random(3)
		if err2 := Decode(second, Encoding(enc), stored); (err == nil) != (err2 == nil) {
			t.Fatalf("one read says %v, the other %v", err, err2)
		}
		if err == nil && !bytes.Equal(first, second) {
			t.Fatal("two reads differ")
		}
		if mem[BlockSize] != 0xa5 {
			t.Fatal("written beyond the block")
		}
		Verify(&Block{Encoding: Encoding(enc), Data: stored, Sum: 1})
	})
}

// FuzzEncode: every block comes back.
func FuzzEncode(f *testing.F) {
	f.Add([]byte("abc"), uint16(3), true)
	f.Add([]byte{0}, uint16(0), true)
	f.Add(random(1), uint16(4000), false)
	f.Fuzz(func(t *testing.T, seed []byte, repeat uint16, compress bool) {
		block := make([]byte, BlockSize)
		for at := 0; at < BlockSize && len(seed) > 0; {
			at += copy(block[at:], seed)
			at += int(repeat) % 97
		}
		enc, out := NewReducer(testKey).Encode(make([]byte, 0, EncodeRoom), block, compress)
		got := make([]byte, BlockSize)
		if err := Decode(got, enc, out); err != nil || !bytes.Equal(got, block) {
			t.Fatalf("block does not come back: %v", err)
		}
	})
}

func BenchmarkFingerprint(b *testing.B) {
	block := random(1)
	b.Run("keyed hasher reused", func(b *testing.B) {
		r := NewReducer(testKey)
		b.SetBytes(BlockSize)
		for b.Loop() {
			r.Fingerprint(block)
		}
	})
	b.Run("unkeyed Sum256", func(b *testing.B) {
		b.SetBytes(BlockSize)
		for b.Loop() {
			blake3.Sum256(block)
		}
	})
	b.Run("new keyed hasher", func(b *testing.B) {
		b.SetBytes(BlockSize)
		for b.Loop() {
			NewReducer(testKey).Fingerprint(block)
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	for name, block := range map[string][]byte{"random": random(1), "half": halfRandom(1, 2048)} {
		b.Run(name, func(b *testing.B) {
			r := NewReducer(testKey)
			dst := make([]byte, 0, EncodeRoom)
			b.SetBytes(BlockSize)
			for b.Loop() {
				r.Encode(dst, block, true)
			}
		})
	}
}
