package device

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// ringDevice is a real file whose blocks hold their own number, and a pool with a ring.
func ringDevice(t testing.TB, blocks int) (Device, *ReadPool) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	p := make([]byte, blocks*Align)
	for i := range blocks {
		binary.LittleEndian.PutUint64(p[i*Align:], uint64(i))
	}
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	raw, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := Meter(raw) // as the store opens it
	t.Cleanup(func() { _ = d.Close() })
	pool := NewReadPool(4)
	t.Cleanup(pool.Close)
	if !pool.Ring() || !d.Direct() {
		t.Skip("no io_uring or no direct I/O here")
	}
	return d, pool
}

func TestRingReads(t *testing.T) {
	const blocks = 512
	d, pool := ringDevice(t, blocks)
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			mem := AlignedBuffer(blocks * Align)
			defer FreeAligned(mem)
			reads := make([]Read, blocks)
			var batch []*Read
			for round := range 20 {
				clear(mem)
				batch = batch[:0]
				n := []int{1, 3, 100, blocks}[(w+round)%4]
				for i := range n { // more than the ring holds, from all together
					at := (i*7 + w) % blocks
					reads[i] = Read{Device: d, P: mem[i*Align : (i+1)*Align], Off: int64(at) * Align}
					batch = append(batch, &reads[i])
				}
				if err := pool.ReadBatch(batch); err != nil {
					t.Error(err)
					return
				}
				for i := range n {
					if got := binary.LittleEndian.Uint64(reads[i].P); got != uint64((i*7+w)%blocks) {
						t.Errorf("read %d of %d: block %d", i, n, got)
						return
					}
				}
			}
		})
	}
	group.Wait()
	if u := d.(*Metered).Usage(); u.Reads == 0 || u.Errors != 0 || u.ReadLatency <= 0 {
		t.Errorf("usage %+v", u)
	}
}

// TestRingErrors: what the kernel does not perform as a whole is done again by pread,
// and its error is the one that is told.
func TestRingErrors(t *testing.T) {
	d, pool := ringDevice(t, 64)
	if err := os.Truncate(d.Path(), 32*Align); err != nil {
		t.Fatal(err)
	}
	mem := AlignedBuffer(8 * Align)
	defer FreeAligned(mem)
	good := Read{Device: d, P: mem[:Align], Off: 5 * Align}
	half := Read{Device: d, P: mem[Align : 5*Align], Off: 30 * Align}
	wrong := Read{Device: d, P: mem[5*Align : 6*Align], Off: 100 * Align}
	if err := pool.ReadBatch([]*Read{&good, &half, &wrong}); err == nil {
		t.Fatal("reads beyond the end succeed")
	}
	var e *Error
	if good.Err != nil || !errors.As(half.Err, &e) || !errors.Is(wrong.Err, ErrRange) {
		t.Errorf("good %v, half %v, wrong %v", good.Err, half.Err, wrong.Err)
	}
	if got := binary.LittleEndian.Uint64(good.P); got != 5 {
		t.Errorf("block 5 reads as %d", got)
	}
}

// TestRingCloses: a device is closed, and a pool, while reads are under way. Each read
// ends, with its data or an error.
func TestRingCloses(t *testing.T) {
	for range 20 {
		d, pool := ringDevice(t, 256)
		var group sync.WaitGroup
		mem := AlignedBuffer(256 * Align)
		reads := make([]Read, 256)
		group.Add(len(reads))
		started := make(chan struct{})
		go func() {
			for i := range reads {
				reads[i] = Read{Device: d, P: mem[i*Align : (i+1)*Align], Off: int64(i) * Align, Done: func(*Read) { group.Done() }}
				pool.Submit(&reads[i])
				if i == 50 {
					close(started)
				}
			}
		}()
		<-started
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		pool.Close()
		group.Wait()
		for i := range reads {
			if reads[i].Err == nil && binary.LittleEndian.Uint64(reads[i].P) != uint64(i) {
				t.Fatalf("block %d: wrong data", i)
			}
		}
		FreeAligned(mem)
	}
}

func BenchmarkReads(b *testing.B) {
	for _, ring := range []bool{false, true} {
		name := "pread"
		if ring {
			name = "ring"
		}
		b.Run(name, func(b *testing.B) {
			d, pool := ringDevice(b, 16384)
			if !ring {
				pool.ring.close()
				pool.ring = nil
			}
			b.SetParallelism(16)
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				mem := AlignedBuffer(Align)
				defer FreeAligned(mem)
				r := Read{Device: d, P: mem}
				batch := []*Read{&r}
				for n := uint64(1); pb.Next(); n = n*6364136223846793005 + 1442695040888963407 {
					r.Off = int64(n>>33%16384) * Align
					if err := pool.ReadBatch(batch); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
