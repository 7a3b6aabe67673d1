package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

var key = dedup.Key{5, 0, 5}

// pool is a store in a file, with one volume that covers all of it.
type pool struct {
	*lsfs.Store
	path   string
	volume *lsfs.Volume
}

func makePool(path string, size int64, segment uint32) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	return lsfs.Format(context.Background(), lsfs.FormatConfig{Key: key, Devices: []string{path}, Sizes: []int64{size}, SegmentBytes: segment})
}

func openPool(path string, metadata int64) (*pool, error) {
	p := &pool{path: path}
	s, err := lsfs.Open(context.Background(), lsfs.Config{
		Devices: []string{path}, Key: key, L1Bytes: 16 << 20, MetadataBytes: metadata, IndexBytes: 8 << 20,
	})
	if err != nil {
		return nil, err
	}
	p.Store = s
	p.volume = s.Volume(1)
	return p, nil
}

func (p *pool) fill() float64 {
	r := p.Room()
	return float64(r.Live) / float64(r.Usable)
}

// content fills a block that does not compress with what version n of block no is.
func content(b []byte, no, n uint64) {
	x := no*0x9e3779b97f4a7c15 ^ n*0xd1342543de82ef95 ^ 0x5555
	for i := 0; i < len(b); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	binary.LittleEndian.PutUint64(b, no)
	binary.LittleEndian.PutUint64(b[8:], n)
}

// words are what text consists of: some 3 bits a letter.
var words = func() (w [2048][]byte) {
	x := uint64(1)
	for i := range w {
		x = x*6364136223846793005 + 1442695040888963407
		for k := range 2 + x>>61 {
			w[i] = append(w[i], "etaoinshrdlucmfw"[x>>(20+4*k)&15])
		}
		w[i] = append(w[i], ' ')
	}
	return w
}()

// text fills a block that compresses about two to one with what version n of block no is.
func text(b []byte, no, n uint64) {
	x := no*0x9e3779b97f4a7c15 ^ n*0xd1342543de82ef95 ^ 0x5555
	binary.LittleEndian.PutUint64(b, no)
	binary.LittleEndian.PutUint64(b[8:], n)
	for at := 16; at < len(b); {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		at += copy(b[at:], words[x>>40&2047&(x>>52|x>>20)]) // some more often than others
	}
}

// load keeps a number of writes of one block in flight.
type load struct {
	p    *pool
	seq  lsfs.Seq
	done chan *lsfs.Op
	idle []*lsfs.Op
	sent map[*lsfs.Op]time.Time

	lats  []time.Duration
	text  bool   // written, instead of what does not compress
	plain []byte // of a block of text
	red   *dedup.Reducer

	refused int
	failed  error
	ended   func(op *lsfs.Op, err error) // called for each
}

func newLoad(p *pool, depth int) *load {
	l := &load{p: p, seq: p.volume.Meta().Durable.Seq, done: make(chan *lsfs.Op, depth), sent: map[*lsfs.Op]time.Time{}, plain: make([]byte, dedup.BlockSize), red: dedup.NewReducer(key)}
	for range depth {
		op := &lsfs.Op{Kind: lsfs.OpWrite, Volume: 1, Count: 1, Blocks: []dedup.Block{{Encoding: dedup.Raw, Data: make([]byte, dedup.BlockSize, dedup.EncodeRoom)}}}
		op.Done = func(op *lsfs.Op, err error) {
			op.Ctx = err
			l.done <- op
		}
		l.idle = append(l.idle, op)
	}
	return l
}

// write starts a write of version n of a block, after waiting for one of those in flight
// if there are as many as there may be.
func (l *load) write(no, n uint64) {
	if len(l.idle) == 0 {
		l.p.Kick()
		l.take(<-l.done)
		for len(l.done) > 0 {
			l.take(<-l.done)
		}
	}
	op := l.idle[len(l.idle)-1]
	l.idle = l.idle[:len(l.idle)-1]
	l.seq++
	op.Kind, op.Start, op.Count = lsfs.OpWrite, lsfs.BlockNo(no), 1
	op.ID = lsfs.OpID{Epoch: 1, Seq: l.seq}
	op.Blocks = op.Blocks[:1]
	b := &op.Blocks[0]
	if l.text {
		text(l.plain, no, n)
		b.Encoding, b.Data = l.red.Encode(b.Data[:0], l.plain, true)
	} else {
		content(b.Data, no, n)
	}
	// As good as a fingerprint here: nobody looks for the block's equals.
	b.Fingerprint = dedup.Fingerprint{}
	binary.LittleEndian.PutUint64(b.Fingerprint[:], (no<<32|n&0xffffffff)*0x9e3779b97f4a7c15)
	binary.LittleEndian.PutUint64(b.Fingerprint[8:], n^no<<20)
	copy(b.Fingerprint[16:], b.Data[16:32])
	b.Sum = dedup.Sum(b.Data)
	l.sent[op] = time.Now()
	l.p.Append(op)
}

// snapshot takes a snapshot at the place in the stream that comes next, and waits for it.
func (l *load) snapshot(id lsfs.VolumeID) {
	done := make(chan error, 1)
	l.seq++
	op := &lsfs.Op{Kind: lsfs.OpSnapshot, Volume: 1, ID: lsfs.OpID{Epoch: 1, Seq: l.seq}, Snapshot: id}
	op.Done = func(_ *lsfs.Op, err error) { done <- err }
	l.p.Append(op)
	l.p.Kick()
	if err := <-done; err != nil {
		l.failed = fmt.Errorf("snapshot %d: %w", id, err)
	}
}

func (l *load) take(op *lsfs.Op) {
	l.lats = append(l.lats, time.Since(l.sent[op]))
	err, _ := op.Ctx.(error)
	if l.ended != nil {
		l.ended(op, err)
	}
	switch {
	case err == nil:
	case errors.Is(err, lsfs.ErrNoSpace) || errors.Is(err, lsfs.ErrGap):
		l.refused++
	case l.failed == nil:
		l.failed = err
	}
	l.idle = append(l.idle, op)
}

// wait lets all writes end.
func (l *load) wait() {
	l.p.Kick()
	for len(l.idle) < cap(l.done) {
		l.take(<-l.done)
	}
	l.seq = l.p.volume.Meta().Durable.Seq
}

// percentile of the latencies since the last reset.
func (l *load) percentile(q float64) time.Duration {
	if len(l.lats) == 0 {
		return 0
	}
	slices.Sort(l.lats)
	return l.lats[min(int(q*float64(len(l.lats))), len(l.lats)-1)]
}

// verify reads all blocks and compares them with the versions that they may have.
func verify(v *lsfs.Volume, blocks uint64, fill func(b []byte, no, n uint64), may func(no, n uint64) bool) error {
	const run = 256
	got, want := make([]byte, run*dedup.BlockSize), make([]byte, dedup.BlockSize)
	for no := uint64(0); no < blocks; no += run {
		n := min(run, blocks-no)
		if err := v.Read(context.Background(), no*dedup.BlockSize, got[:n*dedup.BlockSize]); err != nil {
			return err
		}
		for i := range n {
			b := got[i*dedup.BlockSize:][:dedup.BlockSize]
			version := binary.LittleEndian.Uint64(b[8:])
			if dedup.IsZero(b) {
				version = 0
			} else if fill(want, no+i, version); string(want) != string(b) {
				return fmt.Errorf("block %d holds what was never written there", no+i)
			}
			if !may(no+i, version) {
				return fmt.Errorf("block %d has version %d", no+i, version)
			}
		}
	}
	return nil
}
