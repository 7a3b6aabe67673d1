package lsfs

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/twinsan/twinsan/dedup"
)

func benchStore(b *testing.B) (*Store, *Volume) {
	path := filepath.Join(b.TempDir(), "disk")
	ctx := context.Background()
	if err := Format(ctx, FormatConfig{Key: testKey, Devices: []string{path}, Sizes: []int64{2 << 30}}); err != nil {
		b.Fatal(err)
	}
	s, err := Open(ctx, Config{Devices: []string{path}, Key: testKey})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { mustClose(b, s) })
	return s, mustCreate(b, s, 1, 200000)
}

// BenchmarkWrite is 4 KiB random writes of incompressible blocks, already
// reduced, to a file, by the number of operations in flight.
func BenchmarkWrite(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(map[int]string{1: "depth=1", 32: "depth=32"}[depth], func(b *testing.B) {
			s, _ := benchStore(b)
			c := newClient(b, s)
			rng := rand.New(rand.NewPCG(1, 1))
			done := make(chan struct{}, depth)
			ops := make([]*Op, depth)
			for i := range ops {
				ops[i] = c.write(1, 1, 0, noise(uint64(i)))
				ops[i].Done = func(_ *Op, err error) {
					if err != nil {
						b.Error(err)
					}
					done <- struct{}{}
				}
			}
			n := uint64(0)
			b.ReportAllocs()
			b.SetBytes(dedup.BlockSize)
			for b.Loop() {
				op := ops[n%uint64(depth)]
				n++
				op.ID.Seq, op.Start = Seq(n), BlockNo(rng.Uint64N(200000))
				binary.LittleEndian.PutUint64(op.Blocks[0].Data, n)
				binary.LittleEndian.PutUint64(op.Blocks[0].Fingerprint[:], n*0x9e3779b97f4a7c15)
				op.Blocks[0].Sum = dedup.Sum(op.Blocks[0].Data)
				s.Append(op)
				if n%uint64(depth) == 0 {
					s.Kick()
					for range depth {
						<-done
					}
				}
			}
			s.Kick()
			for range n % uint64(depth) {
				<-done
			}
		})
	}
}

// BenchmarkTryRead is a 4 KiB read that L1 answers.
func BenchmarkTryRead(b *testing.B) {
	s, v := benchStore(b)
	c := newClient(b, s)
	var data []byte
	for i := range 256 {
		data = append(data, noise(uint64(i))...)
	}
	c.must(c.write(1, 1, 0, data))
	buf := make([]byte, len(data))
	if err := v.Read(context.Background(), 0, buf); err != nil {
		b.Fatal(err)
	}
	n := uint64(0)
	b.ReportAllocs()
	for b.Loop() {
		n++
		if !v.TryRead(n%256*dedup.BlockSize, buf[:dedup.BlockSize]) {
			b.Fatal("not cached")
		}
	}
}

// BenchmarkWanted is what a 4 KiB write pays to learn whether its content belongs in the cache.
func BenchmarkWanted(b *testing.B) {
	_, v := benchStore(b)
	wanted := make([]bool, 1)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		v.Wanted(BlockNo(i*7919%1000), wanted)
	}
}
