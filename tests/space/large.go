package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/format"
)

// largeFiles is how many files a large pool stands in: ext4 has none above 16 TiB.
const largeFiles = 8

// large measures what operations cost in a pool of very many devices' size. The segment
// table, the root and the shape of the volume's map are those of the whole; of the blocks
// there are as many as -gib says, in runs of 2 MiB all over the volume. Pages of metadata,
// and with them the page directory, are in proportion to these.
func large(args []string) error {
	f := flag.NewFlagSet("large", flag.ExitOnError)
	dir := f.String("dir", "bin/space", "directory of the pool: metadata takes some 2.5 % of what is mapped")
	tib := f.Int64("tib", 64, "size of the pool and of its volume")
	gib := f.Int64("gib", 256, "mapped")
	ram := f.Int64("metadata", 256, "RAM for metadata, in MiB")
	length := f.Duration("time", 10*time.Second, "of each measurement")
	_ = f.Parse(args)

	c := lsfs.Config{MetadataRAM: *ram << 20, CheckpointInterval: 5 * time.Second}
	var paths []string
	var sizes []int64
	for i := range largeFiles {
		path := filepath.Join(*dir, fmt.Sprintf("large%d", i))
		defer os.Remove(path)
		if err := errors.Join(os.MkdirAll(*dir, 0o755), os.RemoveAll(path)); err != nil {
			return err
		}
		paths, sizes = append(paths, path), append(sizes, *tib<<40/largeFiles)
	}
	if err := lsfs.Format(context.Background(), lsfs.FormatConfig{Key: key, Devices: paths, Sizes: sizes, SegmentBytes: format.SegmentMax}); err != nil {
		return err
	}
	c.Devices = paths
	before := resident()
	y, err := openSynthetic(c)
	if err != nil {
		return err
	}
	defer func() {
		if y != nil {
			_ = y.Close()
		}
	}()
	fmt.Printf("empty pool of %d TiB: %d MiB resident, of it %d MiB of index\n", *tib, (resident()-before)>>20, y.Stats().Index.Bytes>>20)
	volume := uint64(*tib) << 40 / 4096
	if _, err := y.CreateVolume(context.Background(), 1, min(volume, 1<<35), [16]byte{1}); err != nil {
		return err
	}
	runs, places := uint64(*gib)<<30/4096/syntheticRun, volume/syntheticRun
	// Where run i is: all over the volume, each place once.
	at := func(i uint64) uint64 { return i * 0x9e3779b1 % places * syntheticRun }
	id := func(block uint64) uint64 { return block }
	line := func(what string, p pace) {
		fmt.Printf("| %s | %.0f | %.1f | %.2f | %.2f | %.0f |\n", what, p.perSecond, p.cpu/1000, p.reads, p.logged, p.worst.Seconds()*1000)
	}
	fmt.Println("| operation | per second | CPU, us | pages read | bytes of metadata written | longest, ms |")
	fmt.Println("| --- | ---: | ---: | ---: | ---: | ---: |")
	next := uint64(0)
	step := func(n uint64) func() int {
		return func() int {
			for range n {
				y.write(1, at(next), syntheticRun, id)
				next++
			}
			return int(n) * syntheticRun
		}
	}
	var fill pace
	for next < runs {
		if fill, err = y.measure(time.Millisecond, step(min(runs-next, 1<<14))); err != nil {
			return err
		}
	}
	line("block of a write of 2 MiB", fill)
	rng := rand.New(rand.NewPCG(1, 1))
	block := func() uint64 { return at(rng.Uint64N(runs)) + rng.Uint64N(syntheticRun) }
	fresh := uint64(1) << 50
	p, err := y.measure(*length, func() int {
		for range 64 {
			fresh++
			y.write(1, block(), 1, func(uint64) uint64 { return fresh })
		}
		return 64
	})
	if err != nil {
		return err
	}
	line("4 KiB overwrite at random", p)
	var fp [1]dedup.Fingerprint
	var failed error
	if p, err = y.measure(*length, func() int {
		failed = errors.Join(failed, y.Volume(1).Fingerprints(context.Background(), lsfs.BlockNo(block()), fp[:]))
		return 1
	}); err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	line("4 KiB lookup at random", p)
	if p, err = y.measure(*length, func() int {
		for range 16 {
			y.unmap(1, at(rng.Uint64N(runs)), syntheticRun/2)
		}
		return 16
	}); err != nil {
		return err
	}
	line("unmap of 1 MiB at random", p)
	// A checkpoint of nearly nothing: what the size of the pool alone costs.
	was, cpu, began := y.Stats(), processCPU(), time.Now()
	for n := was.Checkpoints + 3; y.Checkpoints() < n; {
		fresh++
		y.write(1, block(), 1, func(uint64) uint64 { return fresh })
		if err := y.wait(); err != nil {
			return err
		}
		if err := unix.Nanosleep(&unix.Timespec{Nsec: 10_000_000}, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	st := y.Stats()
	n := float64(st.Checkpoints - was.Checkpoints)
	fmt.Printf("checkpoint of little: %.1f MiB written, %.0f ms of CPU (with the writes beside it, %.0f in %.1f s), longest write meanwhile %.0f ms\n",
		float64(st.LogBytes-was.LogBytes)/n/(1<<20), (processCPU()-cpu).Seconds()*1000/n, float64(st.Ops-was.Ops), time.Since(began).Seconds(), y.longest().Seconds()*1000)
	fmt.Printf("%d pages for %d GiB; %.1f bytes of page directory for each, %d MiB of directory and segment table, %d MiB of frames, %d MiB resident in all\n",
		st.Pages, *gib, float64(st.FixedBytes-int64(*tib<<40/format.SegmentMax)*56)/float64(st.Pages), st.FixedBytes>>20, st.MetadataBytes>>20, resident()>>20)
	if err := y.Close(); err != nil {
		y = nil
		return err
	}
	y = nil
	began = time.Now()
	again, err := openSynthetic(c)
	if err != nil {
		return err
	}
	y = again
	if err := y.Volume(1).Fingerprints(context.Background(), lsfs.BlockNo(block()), fp[:]); err != nil {
		return err
	}
	fmt.Printf("clean start: first lookup after %.2f s\n", time.Since(began).Seconds())
	return nil
}

// processCPU is the processor time of this process.
func processCPU() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
