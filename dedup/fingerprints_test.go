package dedup

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/zeebo/blake3"
)

// keyed is the specification's function, by another implementation.
func keyed(t testing.TB, k Key, block []byte) (fp Fingerprint) {
	t.Helper()
	h, err := blake3.NewKeyed(k[:])
	if err != nil {
		t.Fatal(err)
	}
	_, _ = h.Write(block)
	h.Sum(fp[:0])
	return fp
}

// with runs f with each kernel that this processor has.
func with(f func(k kernel)) {
	defer func(was kernel) { wide = was }(wide)
	for k := range wide + 1 { // each needs what the one before does
		wide = k
		f(k)
	}
}

// FuzzFingerprints: groups of one to four blocks, with blocks of zeros among them, get the
// fingerprints that each block gets alone, and that another implementation gives, by every kernel.
func FuzzFingerprints(f *testing.F) {
	f.Add(uint64(1), uint8(0b1111), uint8(4), []byte{0})
	f.Add(uint64(2), uint8(0b1010), uint8(4), []byte("some bytes"))
	f.Add(uint64(3), uint8(0), uint8(3), []byte{})
	f.Add(uint64(4), uint8(1), uint8(1), bytes.Repeat([]byte{0xff}, 5000))
	f.Fuzz(func(t *testing.T, seed uint64, full, count uint8, patch []byte) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var k Key
		for i := range k {
			k[i] = byte(rng.Uint32())
		}
		n := int(count%GroupBlocks) + 1
		// One byte off alignment: nothing may depend on it.
		mem := make([]byte, GroupBlocks*BlockSize+1)
		data := mem[seed%2:][:n*BlockSize]
		for i := range n {
			if full>>i&1 != 0 {
				b := data[i*BlockSize:][:BlockSize]
				for j := range b {
					b[j] = byte(rng.Uint32())
				}
				if len(patch) > 0 {
					copy(b[rng.IntN(BlockSize):], patch)
				}
			}
		}
		r := NewReducer(k)
		with(func(by kernel) {
			fps := [GroupBlocks]Fingerprint{{1}, {2}, {3}, {4}}
			r.Fingerprints(&fps, data)
			for i := range fps {
				want := Fingerprint{}
				if i < n && !IsZero(data[i*BlockSize:][:BlockSize]) {
					want = keyed(t, k, data[i*BlockSize:][:BlockSize])
					if got := r.Fingerprint(data[i*BlockSize:][:BlockSize]); got != want {
						t.Fatalf("block %d alone: %x, expected %x", i, got, want)
					}
				}
				if fps[i] != want {
					t.Fatalf("block %d of %d by kernel %d: %x, expected %x", i, n, by, fps[i], want)
				}
			}
		})
	})
}

func BenchmarkFingerprints(b *testing.B) {
	data := make([]byte, 64*BlockSize)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	r := NewReducer(Key{1})
	with(func(k kernel) {
		for _, n := range []int{1, 2, 4} {
			b.Run([]string{"library", "avx2", "avx512"}[k]+[]string{1: "/alone", 2: "/two", 4: "/four"}[n], func(b *testing.B) {
				var fps [GroupBlocks]Fingerprint
				b.SetBytes(BlockSize)
				for i := 0; i < b.N; i += n {
					at := i / n % (64 / n) * n * BlockSize
					r.Fingerprints(&fps, data[at:at+n*BlockSize])
				}
			})
		}
	})
}
