package main

import (
	"context"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// The budget's data: half of all runs of blocks are new, the others equal one of before.
// How long before is spread evenly over the orders of magnitude: as many within the
// last hundred runs as within those from a thousand to a hundred thousand.
const (
	budgetRun   = 32 // blocks
	budgetEqual = 50 // percent
)

// budgeted measures savings and speed of pools with more and less RAM for metadata.
func budgeted(args []string) error {
	f := flag.NewFlagSet("budget", flag.ExitOnError)
	dir := f.String("dir", "bin/space", "directory of the pool, on the disk to measure")
	gib := f.Int64("gib", 64, "unique data, GiB")
	parts := f.String("parts", "1,4", "parts of 1 GiB of RAM per TiB to measure: the whole of it, a quarter")
	length := f.Duration("time", 10*time.Second, "of each measurement")
	_ = f.Parse(args)
	fmt.Printf("%d GiB unique, of twice as much written\n", *gib)
	fmt.Println("| RAM for metadata | duplicates found | blocks/s in order | hot: overwrites/s (pages read, written) | lookups/s (pages read) | all alike: overwrites/s (pages read, written) | lookups/s (pages read) |")
	fmt.Println("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, s := range strings.Split(*parts, ",") {
		part, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return err
		}
		if err := budgetOf(filepath.Join(*dir, "budget"), *gib, *gib<<20/part, *length); err != nil {
			return fmt.Errorf("with 1/%d: %w", part, err)
		}
	}
	return nil
}

func budgetOf(path string, gib, ram int64, length time.Duration) error {
	unique := uint64(gib) << 30 / 4096
	blocks := unique * 100 / (100 - budgetEqual) / budgetRun * budgetRun
	y, err := makeSynthetic(path, unique*2, lsfs.Config{MetadataRAM: ram})
	if err != nil {
		return err
	}
	defer os.Remove(path)
	defer y.Close()
	if _, err := y.CreateVolume(context.Background(), 1, blocks, [16]byte{1}); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(1, 1))
	origin := make([]uint32, blocks/budgetRun) // of runs: the run that had the content first
	equal := 0
	for i := range origin {
		origin[i] = uint32(i)
		if i > 0 && rng.IntN(100) < budgetEqual {
			origin[i] = origin[i-int(math.Exp(rng.Float64()*math.Log(float64(i))))]
			equal += budgetRun
		}
	}
	versions := map[uint64]uint64{} // of overwritten blocks
	content := func(block uint64) uint64 {
		if n, ok := versions[block]; ok {
			return 1<<62 | n
		}
		return uint64(origin[block/budgetRun])*budgetRun + block%budgetRun
	}
	y.pin = true
	began := time.Now()
	if err := y.fillWith(1, blocks, content); err != nil {
		return err
	}
	fill := float64(blocks) / time.Since(began).Seconds()
	found := float64(y.Stats().BlocksRef) / float64(equal)
	y.pin = false
	// Of 90 % of the operations the place is in a twentieth of the volume.
	place := func(hot bool) uint64 {
		if hot && rng.IntN(10) > 0 {
			return rng.Uint64N(blocks / 20)
		}
		return rng.Uint64N(blocks)
	}
	row := fmt.Sprintf("| %d MiB | %.1f %% | %.0f |", ram>>20, found*100, fill)
	for _, hot := range []bool{true, false} {
		writes, err := y.measure(length, func() int {
			for range 64 {
				at, n := place(hot), uint64(len(versions)+1)
				versions[at] = n
				y.write(1, at, 1, func(uint64) uint64 { return 1<<62 | n })
			}
			return 64
		})
		if err != nil {
			return err
		}
		var fp [1]dedup.Fingerprint
		var failed error
		lookups, err := y.measure(length, func() int {
			if err := y.Volume(1).Fingerprints(context.Background(), lsfs.BlockNo(place(hot)), fp[:]); err != nil {
				failed = err
			}
			return 1
		})
		if err != nil || failed != nil {
			return fmt.Errorf("lookups: %v, %v", err, failed)
		}
		row += fmt.Sprintf(" %.0f (%.2f, %.2f) | %.0f (%.2f) |", writes.perSecond, writes.reads, writes.writes, lookups.perSecond, lookups.reads)
	}
	fmt.Println(row)
	if err := y.compare(1, blocks, content); err != nil {
		return err
	}
	r, err := y.Check(context.Background())
	if err != nil {
		return err
	}
	if !r.OK() {
		return fmt.Errorf("the check found %d problems, first: %v", r.Count, r.Problems[0])
	}
	return nil
}
