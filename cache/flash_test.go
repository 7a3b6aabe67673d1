package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
)

// flashDisk is a device in memory.
type flashDisk struct {
	mu    sync.Mutex
	p     []byte
	fails error
}

func (d *flashDisk) io(off int64, do func(at []byte)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fails == nil {
		do(d.p[off:])
	}
	return d.fails
}

func (d *flashDisk) ReadAt(p []byte, off int64) error {
	return d.io(off, func(at []byte) { copy(p, at[:len(p)]) })
}
func (d *flashDisk) WriteAt(p []byte, off int64) error {
	return d.io(off, func(at []byte) { copy(at, p) })
}
func (d *flashDisk) Size() int64  { return int64(len(d.p)) }
func (d *flashDisk) Path() string { return "flash" }

var keys sync.Map // of blocks by number

func keyOf(n uint64) Key {
	if k, ok := keys.Load(n); ok {
		return k.(Key)
	}
	k := Key(sha256.Sum256(block(n)))
	keys.Store(n, k)
	return k
}

// get reads as a caller does: by place, then by hash.
func (d *flashDisk) get(tb testing.TB, f *Flash, n uint64) bool {
	tb.Helper()
	key := keyOf(n)
	off, ok := f.Lookup(&key)
	if !ok {
		return false
	}
	p := make([]byte, BlockSize)
	if err := d.ReadAt(p, off); err != nil {
		f.Fail(err)
		return false
	}
	if sha256.Sum256(p) != key {
		f.Forget(&key, off)
		return false
	}
	if binary.LittleEndian.Uint64(p) != n {
		tb.Fatalf("block %d: other content", n)
	}
	return true
}

func add(f *Flash, n uint64) {
	key := keyOf(n)
	f.Add(&key, block(n))
}

func openFlash(t testing.TB, d *flashDisk, owner byte) *Flash {
	t.Helper()
	f, err := OpenFlash(d, [16]byte{owner}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Warm(nil)
	return f
}

func closeFlash(t testing.TB, f *Flash) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFlashGoesRound: the log holds what was added last, keeps what was used, and is
// there after a restart.
func TestFlashGoesRound(t *testing.T) {
	const segments = 8
	d := &flashDisk{p: make([]byte, (segments+1)*flashSegment)}
	f := openFlash(t, d, 1)
	total := uint64(3 * segments * flashBlocks)
	seen := uint64(0)
	for n := range total {
		add(f, n)
		if n%17 == 0 && d.get(t, f, 5) {
			seen = n
		}
		if n > seen+2*flashBlocks { // it may be on its way into another segment
			t.Fatalf("block 5, which is read all the time, is gone after %d blocks", n)
		}
	}
	found := 0
	for n := total - segments*flashBlocks; n < total; n++ {
		if d.get(t, f, n) {
			found++
		}
	}
	if found < (segments-2)*flashBlocks {
		t.Errorf("%d of the last %d blocks are there", found, segments*flashBlocks)
	}
	if d.get(t, f, 6) {
		t.Error("a block of the first round is there although nobody has used it")
	}
	st := f.Stats()
	if st.Kept == 0 || st.Stale != 0 || st.Bytes > st.Capacity || st.Blocks < int64(found) {
		t.Errorf("%+v", st)
	}
	closeFlash(t, f)

	f = openFlash(t, d, 1)
	again := 0
	for n := total - segments*flashBlocks; n < total; n++ {
		if d.get(t, f, n) {
			again++
		}
	}
	if again < found-flashBlocks || !f.Stats().Warm {
		t.Errorf("after a restart %d of %d are there", again, found)
	}
	// The log goes on where it stood: what is newest is not the first to go.
	for n := total; n < total+flashBlocks; n++ {
		add(f, n)
	}
	if !d.get(t, f, total-1) || !d.get(t, f, total) {
		t.Error("the first segment after a restart has replaced the newest one")
	}
	closeFlash(t, f)

	// Another pool finds nothing.
	f = openFlash(t, d, 2)
	if st := f.Stats(); st.Blocks != 0 {
		t.Errorf("another owner's cache has %d blocks", st.Blocks)
	}
	closeFlash(t, f)
}

// TestFlashRotIsAMiss: whatever is changed on the device, nothing wrong is found.
func TestFlashRotIsAMiss(t *testing.T) {
	const segments = 5
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3 {
		d := &flashDisk{p: make([]byte, (segments+1)*flashSegment)}
		f := openFlash(t, d, 1)
		for n := range uint64(2 * segments * flashBlocks) {
			add(f, n)
		}
		rot := func() {
			for range 1 + rng.IntN(30) {
				at := flashSegment + rng.IntN(segments*flashSegment)
				if rng.IntN(2) == 0 {
					at &^= BlockSize - 1
					copy(d.p[at:], d.p[flashSegment+rng.IntN(segments*256)*BlockSize:][:BlockSize])
				} else if rng.IntN(2) == 0 {
					d.p[at]++
				} else {
					at = at&^(flashSegment-1) + rng.IntN(BlockSize)
					d.p[at]++
				}
			}
		}
		rot()
		look := func() (n int) {
			for i := range uint64(2 * segments * flashBlocks) {
				if d.get(t, f, i) { // it fails the test on wrong content
					n++
				}
			}
			return n
		}
		if look() == 0 {
			t.Fatal("nothing is left")
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		rot()
		f = openFlash(t, d, 1)
		look()
		for n := range uint64(segments * flashBlocks) {
			add(f, n)
		}
		look()
		closeFlash(t, f)
	}
}

func TestFlashRefuses(t *testing.T) {
	d := &flashDisk{p: make([]byte, 6*flashSegment)}
	d.p[100] = 1
	if _, err := OpenFlash(d, [16]byte{1}, nil); !errors.Is(err, ErrFlashInUse) {
		t.Errorf("a device with foreign data: %v", err)
	}
	d.p[100] = 0
	closeFlash(t, openFlash(t, d, 1))
	binary.LittleEndian.PutUint16(d.p[8:], 2)
	binary.LittleEndian.PutUint32(d.p[flashSumAt:], sum(d.p[:BlockSize]))
	if _, err := OpenFlash(d, [16]byte{1}, nil); err == nil || errors.Is(err, ErrFlashInUse) {
		t.Errorf("a later version: %v", err)
	}
	if _, err := OpenFlash(&flashDisk{p: make([]byte, 4*flashSegment)}, [16]byte{1}, nil); err == nil {
		t.Error("4 MiB are taken")
	}
}

// TestFlashFails: a device that fails turns the cache off, once, and it stays quiet.
func TestFlashFails(t *testing.T) {
	for _, when := range []string{"warm", "write", "read"} {
		d := &flashDisk{p: make([]byte, 6*flashSegment)}
		told := 0
		f, err := OpenFlash(d, [16]byte{1}, func(error) { told++ })
		if err != nil {
			t.Fatal(err)
		}
		broken := errors.New("broken")
		if when == "warm" {
			d.fails = broken
		}
		f.Warm(nil)
		for n := range uint64(2 * flashBlocks) {
			add(f, n)
		}
		d.fails = broken
		if when == "read" {
			d.get(t, f, 1)
		}
		for n := range uint64(2 * flashBlocks) {
			add(f, n)
		}
		if d.get(t, f, 1) || told != 1 || !errors.Is(f.Failure(), broken) {
			t.Errorf("%s: told %d times, failure %v", when, told, f.Failure())
		}
		if err := f.Close(); !errors.Is(err, broken) {
			t.Errorf("%s: close: %v", when, err)
		}
	}
}

// TestFlashTogether reads while segments are replaced, for the race detector.
func TestFlashTogether(t *testing.T) {
	d := &flashDisk{p: make([]byte, 6*flashSegment)}
	f := openFlash(t, d, 1)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			for {
				select {
				case <-stop:
					return
				default:
					d.get(t, f, rng.Uint64N(4000))
					f.Stats()
				}
			}
		})
	}
	for n := range uint64(4000) {
		add(f, n)
	}
	close(stop)
	group.Wait()
	closeFlash(t, f)
}

func FuzzFlashSummary(f *testing.F) {
	d := &flashDisk{p: make([]byte, 6*flashSegment)}
	fl := openFlash(f, d, 1)
	for n := range uint64(flashBlocks) {
		add(fl, n)
	}
	closeFlash(f, fl)
	f.Add(d.p[flashSegment:][:BlockSize], d.p[:BlockSize])
	f.Add(make([]byte, BlockSize), make([]byte, BlockSize))
	f.Add([]byte("TWFLSEG\x01"), []byte("TWFLASH\x01"))
	f.Fuzz(func(t *testing.T, summary, header []byte) {
		// With good sums too: they keep nobody out who writes to the device.
		for _, good := range []bool{false, true} {
			d := &flashDisk{p: make([]byte, 5*flashSegment)}
			copy(d.p, header[:min(len(header), BlockSize)])
			for i := range 4 {
				copy(d.p[(i+1)*flashSegment:], summary[:min(len(summary), BlockSize)])
			}
			if good {
				for at := 0; at < len(d.p); at += flashSegment {
					if at > 0 {
						copy(d.p[at+8:at+16], d.p[32:40]) // generation
					}
					binary.LittleEndian.PutUint32(d.p[at+flashSumAt:], sum(d.p[at:]))
				}
			}
			fl, err := OpenFlash(d, [16]byte{1}, nil)
			if err != nil {
				continue
			}
			fl.Warm(nil)
			for n := range uint64(2 * flashBlocks) {
				add(fl, n)
				d.get(t, fl, n/2)
			}
			if st := fl.Stats(); st.Blocks < 0 || st.Bytes > st.Capacity+st.Capacity/4 {
				t.Errorf("%+v", st)
			}
			closeFlash(t, fl)
		}
	})
}
