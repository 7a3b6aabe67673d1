package replication

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication/wire"
)

// gate is a connection on which each write waits for a permit and is then noted.
type gate struct {
	net.Conn
	permits chan struct{}
	writes  chan []byte
}

func (g *gate) SetWriteDeadline(time.Time) error { return nil }
func (g *gate) Close() error                     { return nil }
func (g *gate) Write(b []byte) (int, error) {
	if _, ok := <-g.permits; !ok {
		return 0, net.ErrClosed
	}
	g.writes <- bytes.Clone(b)
	return len(b), nil
}

// TestBulkTurns: frames of a resync and those of the stream take turns, so that neither
// stands behind more than one of the other; one that nobody waits for is not sent.
func TestBulkTurns(t *testing.T) {
	g := &gate{permits: make(chan struct{}), writes: make(chan []byte, 100)}
	l := newLink(&Node{timing: DefaultTiming}, 2, g, true)
	var group sync.WaitGroup
	group.Go(l.writer)
	data := make([]byte, bulkMin)
	abandon, abandoned := make(chan struct{}), make(chan error, 1)
	errs := make(chan error, 4)
	queued := func(n int) {
		eventually(t, "frames are queued", func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.writing && len(l.bulk) == n
		})
	}
	send := func(name byte, cancel chan struct{}, to chan error) {
		group.Go(func() {
			head := append(wire.Begin(nil), name)
			_, err := l.callBulk(wire.Header{Volume: 1}, wire.SyncApply, head, data, cancel)
			to <- err
		})
	}
	stream := func(name byte) {
		l.lock()
		l.out = wire.AppendFrame(l.out, wire.Header{Type: wire.Beacon}, []byte{name}, nil)
		l.unlock()
		l.flush()
	}
	send('A', nil, errs)
	queued(0) // being written: it waits for its permit
	for n, name := range []byte("BCD") {
		cancel, to := chan struct{}(nil), errs
		if name == 'C' {
			cancel, to = abandon, abandoned
		}
		send(name, cancel, to)
		queued(n + 1)
	}
	close(abandon)
	if err := <-abandoned; !errors.Is(err, errCancelled) {
		t.Fatal(err)
	}
	stream('1')
	order := ""
	next := func() {
		g.permits <- struct{}{}
		w := <-g.writes
		if len(w) == len(data) {
			return // the data part of the frame before
		}
		h, _, err := wire.ParseHeader(w)
		if err != nil {
			t.Fatal(err)
		}
		if want := uint32(len(data)); h.Type == wire.Call && h.DataLen != want {
			t.Errorf("a header says %d bytes of data, there are %d", h.DataLen, want)
		}
		order += string(w[wire.HeaderLen : wire.HeaderLen+1])
	}
	for range 4 { // A, its data, 1, B
		next()
	}
	stream('2')
	stream('3')       // with 2
	for range 1 + 3 { // the data of B, 2, D, its data
		next()
	}
	if order != "A1B2D" {
		t.Errorf("the order is %s", order)
	}
	l.fail(net.ErrClosed)
	for range 3 {
		if err := <-errs; err == nil {
			t.Error("a call on a link that has failed succeeded")
		}
	}
	close(g.permits)
	group.Wait()
}

// frames is what a link carried: some calls with data parts that become bodies, some
// that do not, and other frames between them.
func someFrames(sizes []int) (all []byte) {
	for i, size := range sizes {
		typ := wire.Call
		if i%3 == 2 {
			typ = wire.Prepare
		}
		all = wire.AppendFrame(all, wire.Header{Type: typ, Seq: uint64(i)}, bytes.Repeat([]byte{byte(i)}, i%5*1000), bytes.Repeat([]byte{byte(i + 1)}, size))
	}
	return all
}

// readCut lets a link read bytes in pieces of at most cut bytes, and tells what it saw.
func readCut(all []byte, cut int) (seen []string, err error) {
	n := &Node{cfg: Config{Clock: func() Instant { return 0 }}, timing: DefaultTiming}
	l := newLink(n, 2, &pieces{all: all, cut: cut}, true)
	var kept []*body
	var want [][]byte
	err = l.read(func(h wire.Header, meta, data []byte) error {
		seen = append(seen, fmt.Sprint(h.Type, h.Seq, len(meta), len(data), dedup.Sum(meta), dedup.Sum(data)))
		if b := l.takeBody(); b != nil && h.Seq%2 == 0 {
			kept, want = append(kept, b), append(want, bytes.Clone(data))
		} else if b != nil {
			b.free()
		}
		return nil
	}, func() {})
	for i, b := range kept {
		if !bytes.Equal(b.data, want[i]) {
			return seen, errors.New("a body that was taken has changed")
		}
	}
	return seen, err
}

type pieces struct {
	net.Conn
	all []byte
	cut int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.all) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), p.cut)], p.all)
	p.all = p.all[n:]
	return n, nil
}

// TestReadBodies: what a link hands on does not depend on how its bytes arrive, and a
// body that was taken stays as it is.
func TestReadBodies(t *testing.T) {
	sizes := []int{0, 1 << 20, 10, bodyMin, bodyMin - 1, 3 << 20, 1 << 20, 1 << 20, 2 << 20, 200 << 10, bodyMax, bodyMax + 1, 7}
	all := someFrames(sizes)
	for _, cut := range []int{1 << 30, 1 << 20, 16 << 10, 4093, 333} {
		seen, err := readCut(all, cut)
		if err != io.EOF || len(seen) != len(sizes) {
			t.Fatalf("pieces of %d: %d frames of %d, %v", cut, len(seen), len(sizes), err)
		}
		rest := all
		for i := range seen {
			h, _, _ := wire.ParseHeader(rest)
			head, end := wire.HeaderLen+int(h.MetaLen), wire.HeaderLen+int(h.MetaLen)+int(h.DataLen)
			if want := fmt.Sprint(h.Type, h.Seq, h.MetaLen, h.DataLen, dedup.Sum(rest[wire.HeaderLen:head]), dedup.Sum(rest[head:end])); seen[i] != want {
				t.Fatalf("pieces of %d, frame %d: %s, want %s", cut, i, seen[i], want)
			}
			rest = rest[end:]
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(someFrames([]int{0, 100, 5, 300}), uint16(0))
	f.Add(someFrames([]int{0, 100, 5, bodyMin, 7}), uint16(10000))
	f.Add(someFrames([]int{bodyMin + 1})[:bodyMin], uint16(1))
	broken := someFrames([]int{bodyMin, bodyMin})
	broken[wire.HeaderLen+bodyMin+3] ^= 1
	f.Add(broken, uint16(4096))
	f.Fuzz(func(t *testing.T, all []byte, cut uint16) {
		whole, errWhole := readCut(all, 1<<30)
		cutUp, errCut := readCut(all, int(cut)+256)
		if strings.Join(whole, "\n") != strings.Join(cutUp, "\n") || (errWhole == io.EOF) != (errCut == io.EOF) {
			t.Errorf("in one piece %q, %v; in pieces of %d %q, %v", whole, errWhole, int(cut)+256, cutUp, errCut)
		}
	})
}

// meddled is a pool with a hook after what a resync reads of a chunk, and one before
// the replica stores it.
type meddled struct {
	Pool
	read   func(start lsfs.BlockNo, n int)
	append func(op *lsfs.Op)
}

func (p *meddled) Append(op *lsfs.Op) {
	p.append(op)
	p.Pool.Append(op)
}

type meddledCopy struct {
	Copy
	p *meddled
}

func (p *meddled) Copy(id VolumeID) Copy {
	if c := p.Pool.Copy(id); c != nil {
		return meddledCopy{c, p}
	}
	return nil
}

func (p *meddled) CreateCopy(ctx context.Context, id VolumeID, blocks uint64, replica ReplicaID) (Copy, error) {
	c, err := p.Pool.CreateCopy(ctx, id, blocks, replica)
	if err != nil {
		return nil, err
	}
	return meddledCopy{c, p}, nil
}

func (c meddledCopy) ReadChosen(ctx context.Context, start lsfs.BlockNo, index []uint32, dst []dedup.Block, buf []byte) error {
	err := c.Copy.ReadChosen(ctx, start, index, dst, buf)
	c.p.read(start, len(dst))
	return err
}

// TestWriteAfterSurvey (Y4): initiators write to each chunk after a resync has read it
// and before it holds its range; what was read must not replace what they wrote. The range
// is held while the replica stores the chunk. No more chunks than quietChunks are under way.
func TestWriteAfterSurvey(t *testing.T) {
	const chunks = 40
	b := newBench(t)
	var a *testNode
	var met [chunks]atomic.Bool
	var most atomic.Int32
	content := make([]byte, chunks<<20)
	hook := func(start lsfs.BlockNo, n int) {
		chunk := int(start / wire.ChunkBlocks)
		v := a.Volume(1)
		v.mu.Lock()
		s := v.syncing[2]
		v.mu.Unlock()
		if s == nil || met[chunk].Swap(true) {
			return
		}
		for n := s.flying.Load(); n > most.Load(); {
			most.Store(n)
		}
		at := chunk<<20 + chunk%7*blockSize
		data := pattern(uint64(1000+chunk), 8<<10)
		copy(content[at:], data)
		a.write(t, uint64(at), data)
	}
	var free atomic.Int32 // operations that were stored with their range not held
	held := func(op *lsfs.Op) {
		if op.Kind != lsfs.OpCopy {
			return
		}
		v := a.Volume(1)
		v.mu.Lock()
		defer v.mu.Unlock()
		for h := v.locks.holders.head; h != nil; h = h.next {
			if h.start <= op.Start && op.Start+lsfs.BlockNo(op.Count) <= h.end && !h.exclusive {
				return
			}
		}
		free.Add(1)
	}
	b.wrap = func(id NodeID, p Pool) Pool {
		if id == 1 {
			return &meddled{p, hook, func(*lsfs.Op) {}}
		}
		return &meddled{p, func(lsfs.BlockNo, int) {}, held}
	}
	a = b.start(1)
	b.create(chunks<<20, 1)
	eventually(t, "the volume is served", func() bool { return a.Volume(1) != nil && a.Volume(1).Status().Serving })
	copy(content, pattern(7, chunks<<20))
	for off := 0; off < len(content); off += 1 << 20 {
		a.write(t, uint64(off), content[off:off+1<<20])
	}
	c := b.start(2)
	b.inSync(1, 2)
	for i := range met {
		if !met[i].Load() {
			t.Fatalf("chunk %d was not surveyed", i)
		}
	}
	if n := most.Load(); n > quietChunks {
		t.Errorf("%d chunks were under way", n)
	}
	if n := free.Load(); n > 0 {
		t.Errorf("Y4: %d operations copied blocks that nobody held", n)
	}
	b.equal()
	for off := 0; off < len(content); off += 1 << 20 {
		if !bytes.Equal(c.read(t, uint64(off), 1<<20), content[off:off+1<<20]) {
			t.Errorf("chunk %d is not what was written last", off>>20)
		}
	}
}

// TestGapOfNothing: a replica that is being filled and asks for what comes next has missed
// nothing, and its resync goes on; one that asks for what has retired is filled again.
func TestGapOfNothing(t *testing.T) {
	b := newBench(t)
	var a *testNode
	var asked atomic.Bool
	b.wrap = func(id NodeID, p Pool) Pool {
		return &meddled{p, func(lsfs.BlockNo, int) {
			v := a.Volume(1)
			v.mu.Lock()
			s, next, local := v.syncing[2], v.next, v.local
			v.mu.Unlock()
			if id != 1 || s == nil || local+1 < next || asked.Swap(true) {
				return
			}
			p := (*a.peers.Load())[2]
			v.gap(p, s.link, next)
			if s.ctx.Err() != nil {
				t.Error("a resync was ended although nothing was missed")
			}
			v.gap(p, s.link, next-1)
			if s.ctx.Err() == nil {
				t.Error("a resync goes on although an operation is missing")
			}
		}, func(*lsfs.Op) {}}
	}
	a = b.start(1)
	b.create(1<<20, 1)
	eventually(t, "the volume is served", func() bool { return a.Volume(1) != nil && a.Volume(1).Status().Serving })
	a.write(t, 0, pattern(1, 1<<20))
	b.start(2)
	b.inSync(1, 2)
	if !asked.Load() {
		t.Fatal("nothing was asked for")
	}
	b.equal()
}

// fuse is a connection that breaks when so many bytes have been written to it.
type fuse struct {
	net.Conn
	left atomic.Int64
}

func (f *fuse) Write(b []byte) (int, error) {
	if f.left.Add(-int64(len(b))) < 0 {
		f.Conn.Close()
		return 0, net.ErrClosed
	}
	return f.Conn.Write(b)
}

// TestLinkBreaksInWindow: the link breaks again and again with chunks under way, while
// an initiator writes. The resync goes on from what the replica has, and in the end both
// have the same.
func TestLinkBreaksInWindow(t *testing.T) {
	const size, piece = 48 << 20, 1 << 20
	b := newBench(t)
	breaks := []int64{3 << 20, 9<<20 + 12345, 1 << 20, 20 << 20}
	var dialled atomic.Int32
	b.wire = func(from NodeID, c net.Conn) net.Conn {
		n := int(dialled.Add(1)) - 1
		if from != 1 || n >= len(breaks)*2 {
			return c
		}
		f := &fuse{Conn: c}
		f.left.Store(breaks[n/2])
		return f
	}
	a := b.start(1)
	b.create(size, 1)
	eventually(t, "the volume is served", func() bool { return a.Volume(1) != nil && a.Volume(1).Status().Serving })
	data := pattern(1, piece)
	for off := 0; off < size; off += piece {
		for at := 0; at < piece; at += blockSize {
			data[at], data[at+1] = byte(off/piece), byte(at/blockSize)
		}
		a.write(t, uint64(off), data)
	}
	before := a.Resyncs().SentBytes
	b.start(2)
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		r := rand.New(rand.NewPCG(1, 2))
		for i := uint64(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			a.write(t, r.Uint64N(size/blockSize)*blockSize, pattern(5000+i, blockSize))
		}
	})
	b.inSync(1, 2)
	close(stop)
	group.Wait()
	if n := dialled.Load(); n < 5 {
		t.Errorf("%d connections: the link did not break", n)
	}
	sent := a.Resyncs().SentBytes - before
	t.Logf("%d MiB were sent for %d, over %d connections", sent>>20, size>>20, dialled.Load())
	if most := int64(size + len(breaks)*(sentChunks+2)<<20); sent > most {
		t.Errorf("%d MiB were sent, at most %d may have been", sent>>20, most>>20)
	}
	b.equal()
}
