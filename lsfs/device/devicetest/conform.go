package devicetest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device"
)

// conformSize is the least size of a device for Conform.
const conformSize = 1 << 20

// Conform checks that a device does what the interface promises. open makes a new
// device of 1 MiB or more for each check; Conform closes it.
func Conform(t *testing.T, open func(testing.TB) device.Device) {
	check := func(name string, f func(*testing.T, device.Device)) {
		t.Run(name, func(t *testing.T) {
			d := open(t)
			if d.Size() < conformSize || d.Size()%device.Align != 0 {
				t.Fatalf("size %d: want a multiple of %d, %d or more", d.Size(), device.Align, conformSize)
			}
			defer func() {
				if err := d.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}()
			f(t, d)
		})
	}
	check("ReadsWhatWasWritten", conformReadWrite)
	check("RefusesBadRanges", conformRanges)
	check("DiscardSparesNeighbours", conformDiscard)
	check("Concurrent", conformConcurrent)
	check("ClosedIsClosed", conformClosed)
	check("DoesNotAllocate", conformAllocs)
}

// random fills an aligned buffer that the test frees.
func random(t testing.TB, n int, seed uint64) []byte {
	p := device.AlignedBuffer(n)
	t.Cleanup(func() { device.FreeAligned(p) })
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

func conformReadWrite(t *testing.T, d device.Device) {
	const n = 64 << 10
	last := d.Size() - n
	for i, off := range []int64{0, device.Align, 300 << 10, last} {
		want := random(t, n, uint64(i))
		if err := d.WriteAt(want, off); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		got := random(t, n, 99)
		if err := d.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("at %d: read differs from what was written", off)
		}
		// A part of it, across a former write.
		if err := d.ReadAt(got[:device.Align], off+n-device.Align); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:device.Align], want[n-device.Align:]) {
			t.Fatalf("at %d: last block differs from what was written", off)
		}
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	// The second write overlapped the first one but for its first block.
	got, first := random(t, device.Align, 98), random(t, n, 0)
	if err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, first[:device.Align]) {
		t.Fatal("a write changed the block before it")
	}
}

func conformRanges(t *testing.T, d device.Device) {
	p := random(t, 4*device.Align, 1)
	for _, c := range []struct {
		name string
		p    []byte
		off  int64
	}{
		{"empty", p[:0], 0},
		{"short length", p[:512], 0},
		{"odd length", p[:device.Align+1], 0},
		{"unaligned offset", p[:device.Align], 512},
		{"unaligned memory", p[512 : 512+device.Align], 0},
		{"negative offset", p[:device.Align], -device.Align},
		{"at the end", p[:device.Align], d.Size()},
		{"across the end", p[:2*device.Align], d.Size() - device.Align},
		{"overflow", p[:2*device.Align], 1<<63 - device.Align},
	} {
		if err := d.ReadAt(c.p, c.off); !errors.Is(err, device.ErrRange) {
			t.Errorf("read, %s: %v, want ErrRange", c.name, err)
		}
		if err := d.WriteAt(c.p, c.off); !errors.Is(err, device.ErrRange) {
			t.Errorf("write, %s: %v, want ErrRange", c.name, err)
		}
	}
	for _, c := range [][2]int64{{0, 0}, {0, -device.Align}, {0, 512}, {512, device.Align}, {-device.Align, device.Align},
		{d.Size(), device.Align}, {0, d.Size() + device.Align}, {device.Align, 1<<63 - device.Align}} {
		if err := d.Discard(c[0], c[1]); !errors.Is(err, device.ErrRange) {
			t.Errorf("discard %d at %d: %v, want ErrRange", c[1], c[0], err)
		}
	}
}

func conformDiscard(t *testing.T, d device.Device) {
	const n = 16 * device.Align
	want := random(t, n, 2)
	if err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := d.Discard(4*device.Align, 8*device.Align); err != nil {
		t.Fatal(err)
	}
	got := random(t, n, 3)
	if err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:4*device.Align], want[:4*device.Align]) || !bytes.Equal(got[12*device.Align:], want[12*device.Align:]) {
		t.Fatal("a discard changed blocks beside it")
	}
	if err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("a discarded range does not take a write")
	}
}

func conformConcurrent(t *testing.T, d device.Device) {
	var wg sync.WaitGroup
	for g := range 8 {
		p, q := random(t, 4*device.Align, uint64(g)), random(t, 4*device.Align, 99)
		wg.Go(func() {
			for i := range 16 {
				off := int64(g)*conformSize/8 + int64(i)*device.Align // an eighth for each
				if err := d.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				if i%4 == 0 {
					if err := d.Flush(); err != nil {
						t.Error(err)
					}
				}
				if err := d.ReadAt(q, off); err != nil {
					t.Error(err)
				}
				if !bytes.Equal(p, q) {
					t.Errorf("goroutine %d: read at %d differs from its own write", g, off)
				}
			}
		})
	}
	wg.Wait()
}

func conformClosed(t *testing.T, d device.Device) {
	p := random(t, device.Align, 4)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"read": d.ReadAt(p, 0), "write": d.WriteAt(p, 0), "flush": d.Flush(), "discard": d.Discard(0, device.Align),
	} {
		if !errors.Is(err, device.ErrClosed) {
			t.Errorf("%s after close: %v, want ErrClosed", name, err)
		}
	}
}

func conformAllocs(t *testing.T, d device.Device) {
	if _, ok := d.(*Disk); ok {
		t.Skip("the disk in memory keeps what is written")
	}
	p := random(t, device.Align, 5)
	if n := testing.AllocsPerRun(100, func() {
		if d.WriteAt(p, 0) != nil || d.ReadAt(p, 0) != nil || d.Flush() != nil {
			t.Error("I/O failed")
		}
	}); n != 0 {
		t.Errorf("%v allocations for a write, a read and a flush", n)
	}
}
