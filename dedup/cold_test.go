package dedup

import (
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

var coldDir = flag.String("cold.dir", "/usr", "files whose blocks BenchmarkCold packs")

// processor is the time that this thread has had of a processor.
func processor() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

// BenchmarkCold packs the blocks of the files below a directory as the cleaner meets them: those that s2
// compresses, in their order, by themselves and in groups of several sizes. It says how much of their length is left,
// and what a block costs of a processor: to be made, to be read at random, and in a scan.
//
//	go test ./dedup -run '^$' -bench Cold -benchtime 1x -cold.dir /usr
func BenchmarkCold(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const most = 60_000
	var plain []byte
	var s2ed, alone int
	r, p := NewReducer(Key{1}), NewPacker()
	var making, reading time.Duration
	seen := map[Fingerprint]bool{}
	files := 0
	err := filepath.WalkDir(*coldDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || len(plain) >= most*BlockSize {
			return nil
		}
		if files++; files%16 != 0 { // from all over
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		for block := make([]byte, BlockSize); len(data) > 0; clear(block) {
			data = data[copy(block, data):]
			fp := r.Fingerprint(block)
			if IsZero(block) || seen[fp] {
				continue
			}
			seen[fp] = true
			enc, stored := r.Encode(make([]byte, 0, EncodeRoom), block, true)
			if enc != S2 {
				continue
			}
			plain = append(plain, block...)
			s2ed += len(stored)
			began := processor()
			enc, out := p.Alone(make([]byte, 0, AloneRoom), enc, stored, block)
			if enc != S2 && p.Survives(enc, out, block) != nil {
				b.Fatal("undecodable")
			}
			making += processor() - began
			began = processor()
			if Decode(block, enc, out) != nil {
				b.Fatal("undecodable")
			}
			reading += processor() - began
			alone += len(out)
		}
		return nil
	})
	if err != nil || len(plain) == 0 {
		b.Skip("no files that can be compressed", err)
	}
	blocks := len(plain) / BlockSize
	us := func(d time.Duration, n int) float64 { return float64(d.Nanoseconds()) / 1000 / float64(n) }
	b.Logf("%d blocks: s2 %.3f; zstd alone %.3f, %.1f us to make, %.1f us to read", blocks,
		float64(len(plain))/float64(s2ed), float64(len(plain))/float64(alone), us(making, blocks), us(reading, blocks))
	un, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		b.Fatal(err)
	}
	defer un.Close()
	for _, group := range []int{8, 16, 32} {
		n := group * BlockSize
		for _, level := range []zstd.EncoderLevel{zstd.SpeedDefault, zstd.SpeedBetterCompression} {
			z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(n),
				zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true), zstd.WithEncoderLevel(level))
			if err != nil {
				b.Fatal(err)
			}
			var stored, groups int
			var frame []byte
			out := make([]byte, 0, n)
			var making, reading time.Duration
			for at := 0; at+n <= len(plain); at += n {
				began := processor()
				frame = z.EncodeAll(plain[at:at+n], frame[:0])
				making += processor() - began
				began = processor()
				if _, err := un.DecodeAll(frame, out); err != nil {
					b.Fatal(err)
				}
				reading += processor() - began
				stored += len(frame)
				groups++
			}
			b.Logf("groups of %d, %v: %.3f; for a block %.1f us to make, %.1f us to read at random, %.1f us in a scan", group, level,
				float64(groups*n)/float64(stored), us(making, groups*group), us(reading, groups), us(reading, groups*group))
		}
	}
}
