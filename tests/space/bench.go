package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// sample is a window of a run.
type sample struct {
	Second   float64 // since the overwriting began
	Ops      float64 // per second
	Worst    float64 // milliseconds
	P99      float64
	Amp      float64 // bytes written per byte stored, in this window
	Garbage  float64 // part of the pool
	Free     float64
	Paced    float64 // part of the time
	Pages    int64
	Refused  int
	Overwrit float64 // times the pool's size so far
}

// result is a run at one fill.
type result struct {
	Fill    float64 // live bytes to usable ones
	Live    float64 // live bytes to the pool's size
	Samples []sample
	Ops     float64 // of the second half
	Worst   float64
	P99     float64
	Amp     float64
	Garbage float64
}

func bench(args []string) error {
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	dir := f.String("dir", "bin/space", "directory of the pool, on the disk to measure")
	size := f.Int64("mib", 2048, "size of the pool")
	fills := f.String("fill", "10,50,75,90", "fills to measure, in percent of what is usable; the first is called empty")
	length := f.Duration("time", 40*time.Second, "of overwriting at each fill")
	depth := f.Int("depth", 32, "writes in flight")
	metadata := f.Int64("metadata", 256, "RAM for metadata, in MiB")
	hot := f.Int("hot", 0, "percent of the blocks that take 90 % of the writes; 0: all alike")
	compress := f.Bool("compress", false, "write text, which compresses, and not what does not")
	out := f.String("out", "bin/space/results.json", "where the numbers are saved")
	_ = f.Parse(args)
	var all []result
	for _, s := range strings.Split(*fills, ",") {
		percent, err := strconv.Atoi(s)
		if err != nil {
			return err
		}
		r, err := overwrite(filepath.Join(*dir, "pool"), *size<<20, *metadata<<20, float64(percent)/100, *length, *depth, *hot, *compress)
		if err != nil {
			return fmt.Errorf("at %d %%: %w", percent, err)
		}
		all = append(all, *r)
		fmt.Printf("%3d %% full (%2.0f %% of the pool live): %6.0f writes/s = %3.0f %% of empty, p99 %5.1f ms, worst %5.1f ms, amplification %.2f, garbage %2.0f %%\n",
			percent, r.Live*100, r.Ops, r.Ops/all[0].Ops*100, r.P99, r.Worst, r.Amp, r.Garbage*100)
	}
	b, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, b, 0o644)
}

func overwrite(path string, size, metadata int64, fill float64, length time.Duration, depth, hot int, compress bool) (*result, error) {
	if err := makePool(path, size, 0); err != nil {
		return nil, err
	}
	defer os.Remove(path)
	p, err := openPool(path, metadata)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	volumeBlocks := uint64(size / 4096)
	if compress {
		volumeBlocks *= 8
	}
	if p.volume, err = p.CreateVolume(context.Background(), 1, volumeBlocks, [16]byte{1}); err != nil {
		return nil, err
	}
	l := newLoad(p, depth)
	l.text = compress
	blocks := uint64(0)
	for ; p.fill() < fill; blocks++ {
		l.write(blocks, 1)
	}
	l.wait()
	if l.failed != nil || l.refused > 0 {
		return nil, fmt.Errorf("filling: %d refused, %v", l.refused, l.failed)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	versions := make([]uint32, blocks)
	r := &result{Fill: fill, Live: float64(p.Room().Live) / float64(size)}
	begin := time.Now()
	before, started := p.Stats(), begin
	l.lats = l.lats[:0]
	half, count, written := 0.0, 0, uint64(0)
	var first lsfs.Stats
	for time.Since(begin) < length {
		for range 64 {
			no := rng.Uint64N(blocks)
			if hot > 0 && rng.IntN(10) > 0 {
				no = rng.Uint64N(max(blocks*uint64(hot)/100, 1))
			}
			versions[no]++
			l.write(no, uint64(versions[no])+1)
			written++
		}
		took := time.Since(started)
		if took < time.Second {
			continue
		}
		if l.failed != nil || l.refused > 0 {
			return nil, fmt.Errorf("%d overwrites refused, %v", l.refused, l.failed)
		}
		now, room := p.Stats(), p.Room()
		s := sample{
			Second: time.Since(begin).Seconds(), Ops: float64(len(l.lats)) / took.Seconds(),
			P99: ms(l.percentile(0.99)), Worst: ms(l.percentile(1)),
			Amp:     float64(now.LogBytes-before.LogBytes) / float64(max(now.StoredBytes-before.StoredBytes, 1)),
			Garbage: float64(room.Garbage) / float64(room.Size), Free: float64(room.Free) / float64(room.Size),
			Paced: (now.Paced - before.Paced).Seconds() / took.Seconds(), Pages: now.IdentityPages, Overwrit: float64(written) * 4096 / float64(size),
		}
		r.Samples = append(r.Samples, s)
		if length/2 < time.Since(begin) {
			if count == 0 {
				first = before
			}
			half += s.Ops
			count++
			r.Worst, r.P99, r.Garbage = max(r.Worst, s.Worst), max(r.P99, s.P99), s.Garbage
			r.Amp = float64(now.LogBytes-first.LogBytes) / float64(max(now.StoredBytes-first.StoredBytes, 1))
		}
		if os.Getenv("SPACE_VERBOSE") != "" {
			fmt.Printf("%5.1f s %6.0f/s p99 %6.1f worst %6.1f amp %5.2f garbage %4.1f free %4.1f paced %3.0f%% pages %d waits %d x%.2f moved %.2f pages %.2f cleaned %d ckpts %d\n", s.Second, s.Ops, s.P99, s.Worst, s.Amp, s.Garbage*100, s.Free*100, s.Paced*100, s.Pages, now.SpaceWaits-before.SpaceWaits, s.Overwrit, float64(now.CleanerBytes-before.CleanerBytes)/float64(now.StoredBytes-before.StoredBytes+1), 4096*float64(now.CheckpointPages-before.CheckpointPages)/float64(now.StoredBytes-before.StoredBytes+1), now.SegmentsCleaned-before.SegmentsCleaned, now.Checkpoints-before.Checkpoints)
		}
		before, started = now, time.Now()
		l.lats = l.lats[:0]
	}
	l.wait()
	r.Ops = half / float64(max(count, 1))
	contents := content
	if compress {
		contents = text
	}
	return r, verify(p.volume, blocks, contents, func(no, n uint64) bool { return n == uint64(versions[no])+1 })
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
