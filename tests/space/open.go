package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// opened makes a pool with very many mapped blocks and measures how long it takes to serve
// after a kill. The blocks are written by the store itself, so map, identities,
// directory and checkpoints are what they would be. Only the device forgets: the
// payload of the log, and its records too until the last part, whose replay is measured.
func opened(args []string) error {
	f := flag.NewFlagSet("open", flag.ExitOnError)
	dir := f.String("dir", "bin/space", "directory of the pool: metadata takes some 1.8 % of what is mapped")
	gib := f.Int64("gib", 1024, "mapped GiB")
	metadata := f.Int64("metadata", 1024, "RAM for metadata, in MiB")
	keep := f.Bool("keep", false, "leave the pool there")
	reuse := f.Bool("reuse", false, "only open the pool that an earlier run left")
	_ = f.Parse(args)
	path := filepath.Join(*dir, "open")
	if !*reuse {
		if err := madePool(path, *gib, *metadata); err != nil {
			return err
		}
	}
	if !*keep {
		defer os.Remove(path)
	}
	return timeOpen(path, *metadata)
}

// forgetful drops the payload of the log's commits, and the commits while bulk is set.
type forgetful struct {
	device.Device
	bulk   *atomic.Bool
	ending *atomic.Bool
}

func (d *forgetful) WriteAt(p []byte, off int64) error {
	if d.ending.Load() {
		return nil // the power is gone
	}
	le := binary.LittleEndian
	if len(p) >= format.CommitHeaderSize && string(p[:8]) == "TWCOMMIT" && le.Uint64(p[56:]) != 0 {
		if d.bulk.Load() {
			return nil
		}
		head := (int(le.Uint32(p[92:])) + format.PageSize - 1) &^ (format.PageSize - 1)
		p = p[:min(head, len(p))]
	}
	return d.Device.WriteAt(p, off)
}

func (d *forgetful) Flush() error {
	if d.bulk.Load() || d.ending.Load() {
		return nil
	}
	return d.Device.Flush()
}

func madePool(path string, gib, metadata int64) error {
	const stored = 700 // bytes of a block, so that the pool need not be much larger than it must
	blocks := uint64(gib << 30 / 4096)
	if err := makePool(path, int64(blocks)*(stored+600)*2, format.SegmentMax); err != nil {
		return err
	}
	var bulk, ending atomic.Bool
	bulk.Store(true)
	s, err := lsfs.Open(context.Background(), lsfs.Config{
		Devices: []string{path}, Key: key, MetadataBytes: metadata << 20, L1Bytes: 1 << 20, IndexBytes: 1 << 20,
		OpenDevice: func(path string) (device.Device, error) {
			d, err := device.Open(path, device.Options{})
			return &forgetful{d, &bulk, &ending}, err
		},
	})
	if err != nil {
		return err
	}
	v, err := s.CreateVolume(context.Background(), 1, blocks, [16]byte{1})
	if err != nil {
		return err
	}
	began := time.Now()
	const run, depth = 512, 16
	idle := make(chan *lsfs.Op, depth)
	var failed atomic.Pointer[error]
	data := make([]byte, stored)
	sum := dedup.Sum(data)
	for range depth {
		op := &lsfs.Op{Kind: lsfs.OpWrite, Volume: 1, Blocks: make([]dedup.Block, run)}
		op.Done = func(op *lsfs.Op, err error) {
			if err != nil {
				failed.CompareAndSwap(nil, &err)
			}
			idle <- op
		}
		for i := range op.Blocks {
			op.Blocks[i] = dedup.Block{Encoding: dedup.S2, Data: data, Sum: sum}
		}
		idle <- op
	}
	seq, unique := lsfs.Seq(0), uint64(0)
	write := func(start uint64, n int) {
		op := <-idle
		seq++
		op.ID, op.Start, op.Count, op.Blocks = lsfs.OpID{Epoch: 1, Seq: seq}, lsfs.BlockNo(start), uint32(n), op.Blocks[:n]
		for i := range op.Blocks {
			unique++
			binary.LittleEndian.PutUint64(op.Blocks[i].Fingerprint[:], unique*0x9e3779b97f4a7c15)
			binary.LittleEndian.PutUint64(op.Blocks[i].Fingerprint[8:], unique)
		}
		s.Append(op)
		s.Kick()
	}
	drain := func() error {
		for range depth {
			<-idle
		}
		if e := failed.Load(); e != nil {
			return *e
		}
		return nil
	}
	for at := uint64(0); at < blocks; at += run {
		write(at, run)
		if at%(1<<23) == 0 && failed.Load() != nil {
			return *failed.Load()
		}
	}
	if err := drain(); err != nil {
		return err
	}
	fmt.Printf("%d GiB mapped in %s: %d blocks, %d pages\n", gib, time.Since(began).Round(time.Second), v.MappedBlocks(), s.Stats().Pages)
	// Until a checkpoint was cut after the switch, the log would begin with commits that
	// were not written. Then as much as replay may have to take: up to the next checkpoint.
	bulk.Store(false)
	rng := rand.New(rand.NewPCG(1, 1))
	for range depth {
		op := &lsfs.Op{Kind: lsfs.OpWrite, Volume: 1, Blocks: make([]dedup.Block, 1)}
		op.Blocks[0] = dedup.Block{Encoding: dedup.S2, Data: data, Sum: sum}
		op.Done = func(op *lsfs.Op, err error) {
			if err != nil {
				failed.CompareAndSwap(nil, &err)
			}
			idle <- op
		}
		idle <- op
	}
	settled := s.Stats().Checkpoints + 2
	for s.Stats().Checkpoints < settled {
		for range 256 {
			write(rng.Uint64N(blocks), 1)
		}
	}
	last, since := s.Stats().Checkpoints, 0
	longest := 0
	for round := 0; round < 3; {
		for range 64 {
			write(rng.Uint64N(blocks), 1)
		}
		since += 64
		if n := s.Stats().Checkpoints; n != last {
			last, longest, since = n, max(longest, since), 0
			round++
		}
	}
	// Nearly up to where the next one would be.
	for since < longest*8/10 {
		for range 64 {
			write(rng.Uint64N(blocks), 1)
		}
		since += 64
		if n := s.Stats().Checkpoints; n != last {
			last, longest, since = n, max(longest*7/8, since), 0
		}
	}
	err = drain()
	ending.Store(true)
	fmt.Printf("killed %d writes after a checkpoint, of %d between two\n", since, longest)
	_ = s.Close()
	return err
}

// timeOpen opens the pool and reads what needs nothing but metadata: a fingerprint.
func timeOpen(path string, metadata int64) error {
	before := resident()
	began := time.Now()
	s, err := lsfs.Open(context.Background(), lsfs.Config{
		Devices: []string{path}, Key: key, MetadataBytes: metadata << 20, L1Bytes: 1 << 20, IndexBytes: 64 << 20,
		OpenDevice: func(path string) (device.Device, error) { return openForgetting(path) },
	})
	if err != nil {
		return err
	}
	opened := time.Since(began)
	var fp [1]dedup.Fingerprint
	if err := s.Volume(1).Fingerprints(context.Background(), 12345, fp[:]); err != nil {
		return err
	}
	served := time.Since(began)
	st := s.Stats()
	fmt.Printf("with %d MiB for metadata: open in %.2f s, first read after %.2f s, %d operations replayed, %d pages read, %d MiB resident (64 MiB of index among them)\n",
		metadata, opened.Seconds(), served.Seconds(), st.Ops, st.PageReads, (resident()-before)>>20)
	return s.Close()
}

// openForgetting opens the pool so that nothing that is written to it stays.
func openForgetting(path string) (device.Device, error) {
	d, err := device.Open(path, device.Options{})
	var bulk, ending atomic.Bool
	ending.Store(true)
	return &forgetful{d, &bulk, &ending}, err
}
