package device_test

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"golang.org/x/sys/unix"
)

// numbered makes a disk whose blocks hold their own number.
func numbered(t testing.TB, blocks int) *devicetest.Disk {
	d := devicetest.New(1, int64(blocks)*device.Align)
	p := device.AlignedBuffer(device.Align)
	defer device.FreeAligned(p)
	for i := range blocks {
		binary.LittleEndian.PutUint64(p, uint64(i))
		if err := d.WriteAt(p, int64(i)*device.Align); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestReadPoolReadsAll(t *testing.T) {
	const blocks, rounds = 64, 20
	d := numbered(t, blocks)
	pool := device.NewReadPool(4)
	mem := device.AlignedBuffer(blocks * device.Align)
	defer device.FreeAligned(mem)
	reads := make([]device.Read, blocks)
	list := make([]*device.Read, blocks)
	for range rounds {
		var wg sync.WaitGroup
		wg.Add(blocks)
		clear(mem)
		for i := range reads {
			reads[i] = device.Read{Device: d, P: mem[i*device.Align : (i+1)*device.Align], Off: int64(i) * device.Align,
				Done: func(*device.Read) { wg.Done() }}
			list[i] = &reads[i]
		}
		pool.Submit(list[:blocks/2]...)
		for _, r := range list[blocks/2:] {
			pool.Submit(r)
		}
		wg.Wait()
		for i := range reads {
			if got := binary.LittleEndian.Uint64(reads[i].P); reads[i].Err != nil || got != uint64(i) {
				t.Fatalf("block %d: read %d, %v", i, got, reads[i].Err)
			}
		}
	}
	pool.Close()
}

// TestReadPoolUsesAllReaders: as many reads as readers are at the device at once,
// and never more.
func TestReadPoolUsesAllReaders(t *testing.T) {
	const readers = 4
	d := &countingDevice{Device: numbered(t, 16), full: make(chan struct{}), want: readers}
	pool := device.NewReadPool(readers)
	defer pool.Close()
	mem := device.AlignedBuffer(16 * device.Align)
	defer device.FreeAligned(mem)
	var wg sync.WaitGroup
	wg.Add(16)
	for i := range 16 {
		pool.Submit(&device.Read{Device: d, P: mem[i*device.Align : (i+1)*device.Align], Done: func(*device.Read) { wg.Done() }})
	}
	<-d.full // never, if fewer work at once
	wg.Wait()
	if got := d.most.Load(); got != readers {
		t.Errorf("%d reads at once, want %d", got, readers)
	}
}

// countingDevice holds reads until as many as wanted are there, once.
type countingDevice struct {
	device.Device
	now, most atomic.Int32
	want      int32
	full      chan struct{}
	once      sync.Once
}

func (d *countingDevice) ReadAt(p []byte, off int64) error {
	n := d.now.Add(1)
	defer d.now.Add(-1)
	for {
		m := d.most.Load()
		if n <= m || d.most.CompareAndSwap(m, n) {
			break
		}
	}
	if n == d.want {
		d.once.Do(func() { close(d.full) })
	}
	<-d.full
	return d.Device.ReadAt(p, off)
}

func TestReadBatch(t *testing.T) {
	d := numbered(t, 32)
	pool := device.NewReadPool(3)
	mem := device.AlignedBuffer(8 * device.Align)
	defer device.FreeAligned(mem)
	batch := func(first int) []*device.Read {
		var reads []*device.Read
		for i := range 8 {
			reads = append(reads, &device.Read{Device: d, P: mem[i*device.Align : (i+1)*device.Align], Off: int64(first+i) * device.Align})
		}
		return reads
	}
	for first := range 24 {
		if err := pool.ReadBatch(batch(first)); err != nil {
			t.Fatal(err)
		}
		for i := range 8 {
			if got := binary.LittleEndian.Uint64(mem[i*device.Align:]); got != uint64(first+i) {
				t.Fatalf("block %d: read %d", first+i, got)
			}
		}
	}
	if err := pool.ReadBatch(nil); err != nil {
		t.Error(err)
	}
	d.FailRange(devicetest.Read, 3*device.Align, 4*device.Align, nil)
	reads := batch(0)
	if err := pool.ReadBatch(reads); !errors.Is(err, unix.EIO) {
		t.Errorf("batch over a bad block: %v", err)
	}
	for i, r := range reads {
		if (r.Err != nil) != (i == 3) {
			t.Errorf("read %d: %v", i, r.Err)
		}
	}
	pool.Close()
	if err := pool.ReadBatch(batch(8)); !errors.Is(err, device.ErrClosed) {
		t.Errorf("batch after close: %v", err)
	}
	var got error
	pool.Submit(&device.Read{Device: d, P: mem[:device.Align], Done: func(r *device.Read) { got = r.Err }})
	if !errors.Is(got, device.ErrClosed) {
		t.Errorf("read after close: %v", got)
	}
}

// TestReadPoolCloseWaits: what was submitted before Close is read.
func TestReadPoolCloseWaits(t *testing.T) {
	d := numbered(t, 16)
	release := d.Hold(devicetest.Read)
	pool := device.NewReadPool(2)
	mem := device.AlignedBuffer(16 * device.Align)
	defer device.FreeAligned(mem)
	var done atomic.Int32
	for i := range 16 {
		pool.Submit(&device.Read{Device: d, P: mem[i*device.Align : (i+1)*device.Align], Done: func(r *device.Read) {
			if r.Err == nil {
				done.Add(1)
			}
		}})
	}
	closed := make(chan struct{})
	go func() {
		pool.Close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("Close did not wait for held reads")
	default:
	}
	release()
	<-closed
	if got := done.Load(); got != 16 {
		t.Errorf("%d of 16 reads done when Close returned", got)
	}
}

func TestReadPoolDoesNotAllocate(t *testing.T) {
	path := newFile(t, 1<<20)
	d := open(t, path, device.Options{})
	pool := device.NewReadPool(2)
	defer pool.Close()
	mem := device.AlignedBuffer(2 * device.Align)
	defer device.FreeAligned(mem)
	done := make(chan struct{})
	r := &device.Read{Device: d, P: mem[:device.Align], Done: func(*device.Read) { done <- struct{}{} }}
	if n := testing.AllocsPerRun(200, func() {
		pool.Submit(r)
		<-done
	}); n >= 1 {
		t.Errorf("%v allocations per read", n)
	}
	if r.Err != nil {
		t.Error(r.Err)
	}
}
