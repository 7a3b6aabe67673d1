package lsfs

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs/device"
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

// BenchmarkStream is a reader that goes through a volume in order, with so many commands
// in flight, with and without reading ahead. What it reads is not in the cache before.
func BenchmarkStream(b *testing.B) {
	const blocks = 128 << 10 // 512 MiB
	path := filepath.Join(b.TempDir(), "disk")
	ctx := context.Background()
	if err := Format(ctx, FormatConfig{Key: testKey, Devices: []string{path}, Sizes: []int64{2 << 30}}); err != nil {
		b.Fatal(err)
	}
	open := func(ahead int64) *Store {
		s, err := Open(ctx, Config{Devices: []string{path}, Key: testKey, ReadAhead: ahead, L1Bytes: 64 << 20})
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	s := open(-1)
	mustCreate(b, s, 1, blocks)
	c := newClient(b, s)
	var seq Seq
	fill(c, 1, &seq, blocks, noise)
	mustClose(b, s)
	for _, size := range []int{16 << 10, 64 << 10, 128 << 10, 256 << 10} {
		for _, depth := range []int{1, 2, 4} {
			for _, ahead := range []int64{-1, 0} {
				name := fmt.Sprintf("size=%dK/depth=%d/ahead=%v", size>>10, depth, ahead == 0)
				b.Run(name, func(b *testing.B) {
					s := open(ahead)
					v := s.Volume(1)
					<-s.filled
					var next, left atomic.Int64
					left.Store(int64(b.N))
					b.SetBytes(int64(size))
					b.ResetTimer()
					var group sync.WaitGroup
					for range depth {
						group.Go(func() {
							buf := device.AlignedBuffer(size)
							defer device.FreeAligned(buf)
							for left.Add(-1) >= 0 {
								at := uint64(next.Add(int64(size))-int64(size)) % (blocks * dedup.BlockSize)
								if !v.TryRead(at, buf) {
									if err := v.Read(ctx, at, buf); err != nil {
										b.Error(err)
										return
									}
								}
							}
						})
					}
					group.Wait()
					b.StopTimer()
					mustClose(b, s)
				})
			}
		}
	}
}
