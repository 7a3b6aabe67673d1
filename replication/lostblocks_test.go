package replication

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
)

// rotten is a pool whose block of volume 1 cannot be read until it is written anew.
type rotten struct {
	Pool
	block lsfs.BlockNo
	good  atomic.Bool
}

type rottenCopy struct {
	Copy
	p *rotten
}

func (p *rotten) Copy(id VolumeID) Copy {
	if c := p.Pool.Copy(id); c != nil {
		return rottenCopy{c, p}
	}
	return nil
}

func (p *rotten) CreateCopy(ctx context.Context, id VolumeID, blocks uint64, replica ReplicaID) (Copy, error) {
	c, err := p.Pool.CreateCopy(ctx, id, blocks, replica)
	if err != nil {
		return nil, err
	}
	return rottenCopy{c, p}, nil
}

func (p *rotten) Append(op *lsfs.Op) {
	if op.Kind == lsfs.OpWrite && op.Start <= p.block && p.block < op.Start+lsfs.BlockNo(op.Count) {
		p.good.Store(true)
	}
	p.Pool.Append(op)
}

func (c rottenCopy) damage(start lsfs.BlockNo, n int) error {
	if c.p.good.Load() || c.p.block < start || start+lsfs.BlockNo(n) <= c.p.block {
		return nil
	}
	var fp [1]dedup.Fingerprint
	if err := c.Fingerprints(context.Background(), c.p.block, fp[:]); err != nil {
		return err
	}
	return &lsfs.CorruptError{BID: 1, Volume: 1, Block: c.p.block, Fingerprint: fp[0], What: "block"}
}

func (c rottenCopy) TryRead(off uint64, dst []byte) bool {
	return c.damage(lsfs.BlockNo(off/blockSize), (len(dst)+blockSize-1)/blockSize) == nil && c.Copy.TryRead(off, dst)
}

func (c rottenCopy) Read(ctx context.Context, off uint64, dst []byte) error {
	if err := c.damage(lsfs.BlockNo(off/blockSize), (len(dst)+blockSize-1)/blockSize); err != nil {
		return err
	}
	return c.Copy.Read(ctx, off, dst)
}

func (c rottenCopy) ReadChosen(ctx context.Context, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error {
	for _, i := range index {
		if err := c.damage(start+lsfs.BlockNo(i), 1); err != nil {
			return err
		}
	}
	return c.Copy.ReadChosen(ctx, start, index, dst, buf)
}

func (c rottenCopy) ReadReduced(ctx context.Context, start lsfs.BlockNo, dst []dedup.Block, buf []byte) error {
	if err := c.damage(start, len(dst)); err != nil {
		return err
	}
	return c.Copy.ReadReduced(ctx, start, dst, buf)
}

// TestLostBlock: a block that was written while the replica was away is damaged on the
// only copy. The resync copies all the rest, says what stops it, and ends when the block
// has been overwritten (Y8).
func TestLostBlock(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "device")
	const size = 8 << 20
	bad := &rotten{block: 700}
	bad.good.Store(true)
	b.wrap = func(id NodeID, p Pool) Pool {
		if id != 1 {
			return p
		}
		bad.Pool = p
		return bad
	}
	a := b.start(1)
	c := b.startOn(2, path, true)
	b.create(size, 1)
	b.inSync(1, 2)
	want := pattern(1, size)
	a.write(t, 0, pattern(3, 4<<20))
	b.stop(2, c)
	a.write(t, 0, want) // alone
	b.inSync(1)
	bad.good.Store(false)
	c = b.startOn(2, path, false)
	eventually(t, "the event", func() bool { return strings.Contains(b.eventsOf(1), "resync-blocked") })
	if err := a.do(&Request{Op: OpRead, Off: 700 * blockSize, Len: blockSize, Data: make([]byte, blockSize)}); !errors.Is(err, ErrMedium) {
		t.Errorf("a read of the lost block: %v, want %v", err, ErrMedium)
	}
	if r := b.record(); r.Has(2) {
		t.Fatal("a replica without the block counts")
	}
	again := pattern(2, blockSize)
	copy(want[700*blockSize:], again)
	a.write(t, 700*blockSize, again)
	b.inSync(1, 2)
	b.equal()
	if got := c.all(t, size); !bytes.Equal(got, want) {
		t.Error("the content differs")
	}
	if n := strings.Count(b.eventsOf(1), "resync-blocked"); n != 1 {
		t.Errorf("told %d times", n)
	}
}
