package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/format"
)

// synthetic is a pool whose blocks have fingerprints and no content: the device forgets
// the payload of the log. Maps, identities, checkpoints and the directory are what
// they would be, and stand in a real file.
type synthetic struct {
	*lsfs.Store
	idle   chan *lsfs.Op
	failed atomic.Pointer[error]
	seqs   map[lsfs.VolumeID]lsfs.Seq
	data   []byte
	sum    uint32
	pin    bool         // look for duplicates
	worst  atomic.Int64 // longest operation since longest was called, nanoseconds
}

// syntheticStored is the stored bytes of a block: few, so that the pool in the file is small.
const (
	syntheticStored = 64
	syntheticRun    = 512
	syntheticDepth  = 16
)

// makeSynthetic makes a pool with room for blocks, and opens it.
func makeSynthetic(path string, blocks uint64, c lsfs.Config) (*synthetic, error) {
	if err := makePool(path, max(int64(blocks)*(syntheticStored+180)*2, 1<<30), format.SegmentMax); err != nil {
		return nil, err
	}
	c.Devices = []string{path}
	return openSynthetic(c)
}

// openSynthetic opens a pool that was made for it.
func openSynthetic(c lsfs.Config) (*synthetic, error) {
	y := &synthetic{idle: make(chan *lsfs.Op, syntheticDepth), seqs: map[lsfs.VolumeID]lsfs.Seq{}, data: make([]byte, syntheticStored)}
	y.sum = dedup.Sum(y.data)
	for range syntheticDepth {
		op := &lsfs.Op{Kind: lsfs.OpWrite, Blocks: make([]dedup.Block, syntheticRun), Pinned: make([]lsfs.BID, syntheticRun), Ctx: new(time.Time)}
		op.Done = func(op *lsfs.Op, err error) {
			if err != nil {
				y.failed.CompareAndSwap(nil, &err)
			}
			began, _ := op.Ctx.(*time.Time)
			for took := int64(time.Since(*began)); ; {
				if was := y.worst.Load(); took <= was || y.worst.CompareAndSwap(was, took) {
					break
				}
			}
			y.idle <- op
		}
		y.idle <- op
	}
	var bulk, ending atomic.Bool
	bulk.Store(true)
	c.Key, c.L1Bytes, c.ScrubInterval = key, 1<<20, -1
	c.OpenDevice = func(path string) (device.Device, error) {
		d, err := device.Open(path, device.Options{})
		return &forgetful{d, &bulk, &ending}, err
	}
	var err error
	y.Store, err = lsfs.Open(context.Background(), c)
	return y, err
}

// fingerprintOf is the fingerprint of the block that has a number.
func fingerprintOf(id uint64) (fp dedup.Fingerprint) {
	x := id
	for i := 0; i < len(fp); i += 8 {
		x += 0x9e3779b97f4a7c15
		z := (x ^ x>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(fp[i:], z^z>>31)
	}
	return fp
}

// write starts a write of n blocks, at most syntheticRun; id numbers their contents.
func (y *synthetic) write(v lsfs.VolumeID, start uint64, n int, id func(block uint64) uint64) {
	op := <-y.idle
	y.seqs[v]++
	op.Kind, op.Volume, op.ID, op.Start, op.Count = lsfs.OpWrite, v, lsfs.OpID{Epoch: 1, Seq: y.seqs[v]}, lsfs.BlockNo(start), uint32(n)
	op.Blocks, op.Pinned = op.Blocks[:n], op.Pinned[:n]
	for i := range op.Blocks {
		b := &op.Blocks[i]
		*b = dedup.Block{Fingerprint: fingerprintOf(id(start + uint64(i))), Encoding: dedup.S2, Data: y.data, Sum: y.sum}
		op.Pinned[i] = 0
		if y.pin {
			if bid, ok := y.Pin(&b.Fingerprint); ok {
				b.Data, op.Pinned[i] = nil, bid
			}
		}
	}
	y.start(op)
}

// unmap starts an unmap of n blocks.
func (y *synthetic) unmap(v lsfs.VolumeID, start uint64, n int) {
	op := <-y.idle
	y.seqs[v]++
	op.Kind, op.Volume, op.ID, op.Start, op.Count = lsfs.OpUnmap, v, lsfs.OpID{Epoch: 1, Seq: y.seqs[v]}, lsfs.BlockNo(start), uint32(n)
	op.Blocks, op.Pinned = op.Blocks[:0], op.Pinned[:0]
	y.start(op)
}

func (y *synthetic) start(op *lsfs.Op) {
	*op.Ctx.(*time.Time) = time.Now()
	y.Append(op)
	y.Kick()
}

// longest is the longest operation since the last call.
func (y *synthetic) longest() time.Duration { return time.Duration(y.worst.Swap(0)) }

// wait lets all writes end.
func (y *synthetic) wait() error {
	var ops []*lsfs.Op
	for range syntheticDepth {
		ops = append(ops, <-y.idle)
	}
	for _, op := range ops {
		y.idle <- op
	}
	if e := y.failed.Load(); e != nil {
		return *e
	}
	return nil
}

// fillWith writes blocks [0, n) of a volume.
func (y *synthetic) fillWith(v lsfs.VolumeID, n uint64, id func(block uint64) uint64) error {
	for at := uint64(0); at < n; at += syntheticRun {
		y.write(v, at, int(min(syntheticRun, n-at)), id)
		if y.failed.Load() != nil {
			break
		}
	}
	return y.wait()
}

// compare looks up all blocks [0, n) of a volume.
func (y *synthetic) compare(v lsfs.VolumeID, n uint64, id func(block uint64) uint64) error {
	var got [syntheticRun]dedup.Fingerprint
	for at := uint64(0); at < n; at += syntheticRun {
		part := got[:min(syntheticRun, n-at)]
		if err := y.Volume(v).Fingerprints(context.Background(), lsfs.BlockNo(at), part); err != nil {
			return err
		}
		for i := range part {
			if part[i] != fingerprintOf(id(at+uint64(i))) {
				return fmt.Errorf("block %d of volume %d is not what was written", at+uint64(i), v)
			}
		}
	}
	return nil
}

// pace is what operations cost.
type pace struct {
	perSecond float64
	cpu       float64 // nanoseconds of processor time of the process for each
	reads     float64 // pages read for each
	writes    float64 // pages written for each
	logged    float64 // bytes of metadata written for each: records, pages, directory, root
	worst     time.Duration
}

// measure calls f, which does a number of operations, over and over for a while.
func (y *synthetic) measure(length time.Duration, f func() int) (pace, error) {
	y.longest()
	before, cpu, began, n := y.Stats(), processCPU(), time.Now(), 0
	for time.Since(began) < length {
		n += f()
	}
	if err := y.wait(); err != nil {
		return pace{}, err
	}
	took, after := time.Since(began), y.Stats()
	if n == 0 {
		return pace{}, errors.New("nothing was measured")
	}
	return pace{
		perSecond: float64(n) / took.Seconds(), cpu: float64(processCPU()-cpu) / float64(n), worst: y.longest(),
		reads: float64(after.PageReads-before.PageReads) / float64(n), writes: float64(after.CheckpointPages-before.CheckpointPages) / float64(n),
		logged: float64(after.LogBytes-before.LogBytes-after.StoredBytes+before.StoredBytes) / float64(n),
	}, nil
}
