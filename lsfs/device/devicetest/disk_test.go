package devicetest

import (
	"bytes"
	"errors"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConform(t *testing.T) {
	Conform(t, func(testing.TB) device.Device { return New(1, 4<<20) })
}

// fill makes an aligned block of one value.
func fill(t testing.TB, n int, v byte) []byte {
	p := device.AlignedBuffer(n)
	t.Cleanup(func() { device.FreeAligned(p) })
	for i := range p {
		p[i] = v
	}
	return p
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sectors gives the value of each sector of the disk's first blocks, and fails if
// one is mixed.
func sectors(t testing.TB, d *Disk, blocks int) []byte {
	t.Helper()
	p := make([]byte, blocks*device.Align)
	d.Peek(p, 0)
	var v []byte
	for at := 0; at < len(p); at += Sector {
		s := p[at : at+Sector]
		if !bytes.Equal(s, bytes.Repeat(s[:1], Sector)) {
			t.Fatalf("sector at %d is mixed", at)
		}
		v = append(v, s[0])
	}
	return v
}

func TestCrashKeepsWhatWasFlushed(t *testing.T) {
	for seed := range uint64(200) {
		d := New(seed, 1<<20)
		must(t, d.WriteAt(fill(t, 8*device.Align, 1), 0))
		must(t, d.Flush())
		must(t, d.WriteAt(fill(t, 2*device.Align, 2), 6*device.Align))
		o := CrashOptions{Seed: seed, Keep: 0.5, Tear: seed%2 == 0, InOrder: seed%3 == 0}
		c := d.Crash(o)
		if got := sectors(t, c, 6); !bytes.Equal(got, bytes.Repeat([]byte{1}, 48)) {
			t.Fatalf("%v: a flushed write is lost: %v", o, got)
		}
		for _, v := range sectors(t, c, 8)[48:] {
			if v != 1 && v != 2 {
				t.Fatalf("%v: sector of value %d", o, v)
			}
		}
		if c.Unsynced() != 0 {
			t.Fatal("after a crash everything is on stable storage")
		}
	}
}

// TestCrashReachesEveryFate checks that the crashes differ as they should: whole
// and lost writes, torn ones only with Tear, later without earlier ones only
// without InOrder.
func TestCrashReachesEveryFate(t *testing.T) {
	d := New(7, 1<<20)
	for i := range byte(4) {
		must(t, d.WriteAt(fill(t, device.Align, i+1), int64(i)*device.Align))
	}
	for _, o := range []CrashOptions{{}, {Tear: true}, {InOrder: true}, {Tear: true, InOrder: true}} {
		var torn, disordered, all, nothing bool
		for seed := range uint64(500) {
			o.Seed, o.Keep = seed, 0.5
			v := sectors(t, d.Crash(o), 4)
			count := [4]int{}
			for i, x := range v {
				if x != 0 {
					count[i/8]++
				}
			}
			for i, n := range count {
				torn = torn || n != 0 && n != 8
				disordered = disordered || i > 0 && n > 0 && count[i-1] < 8
			}
			all = all || count == [4]int{8, 8, 8, 8}
			nothing = nothing || count == [4]int{}
		}
		if torn != o.Tear || disordered == o.InOrder || !all || !nothing {
			t.Errorf("%v: torn %t, disordered %t, all kept %t, all lost %t", o, torn, disordered, all, nothing)
		}
	}
	for _, keep := range []float64{0, 1} {
		got := sectors(t, d.Crash(CrashOptions{Keep: keep, Tear: true}), 1)
		if want := bytes.Repeat([]byte{byte(keep)}, 8); !bytes.Equal(got, want) {
			t.Errorf("keep %v: %v", keep, got)
		}
	}
	a, b := d.Crash(CrashOptions{Seed: 3, Keep: 0.5, Tear: true}), d.Crash(CrashOptions{Seed: 3, Keep: 0.5, Tear: true})
	if !bytes.Equal(sectors(t, a, 4), sectors(t, b, 4)) {
		t.Error("the same seed gives different crashes")
	}
}

func TestCrashLeavesTheDiskAlone(t *testing.T) {
	d := New(1, 1<<20)
	must(t, d.WriteAt(fill(t, device.Align, 1), 0))
	c := d.Crash(CrashOptions{Keep: 1})
	must(t, c.WriteAt(fill(t, device.Align, 2), 0))
	must(t, d.WriteAt(fill(t, device.Align, 3), device.Align))
	c.FlipBit(0, 0)
	if got := sectors(t, d, 2); got[0] != 1 || got[8] != 3 {
		t.Errorf("the disk reads %v", got)
	}
	must(t, d.Flush())
	e := d.Clone()
	must(t, d.WriteAt(fill(t, device.Align, 4), 0))
	must(t, d.Flush())
	if got := sectors(t, e, 2); got[0] != 1 {
		t.Errorf("the clone changed with its disk: %v", got)
	}
}

func TestFaults(t *testing.T) {
	p := fill(t, device.Align, 1)
	d := New(1, 1<<20)

	d.FailNth(Write, 2, nil)
	must(t, d.WriteAt(p, 0))
	if err := d.WriteAt(p, 0); !errors.Is(err, unix.EIO) {
		t.Fatalf("second write: %v", err)
	}
	must(t, d.WriteAt(p, 0))

	d.FailNth(Read, 1, unix.ENXIO)
	if err := d.ReadAt(p, 0); !errors.Is(err, unix.ENXIO) {
		t.Fatalf("read: %v", err)
	}
	must(t, d.ReadAt(p, 0))

	d.FailRange(Read, 3*device.Align, 4*device.Align, nil)
	must(t, d.ReadAt(p, 4*device.Align))
	must(t, d.ReadAt(p, 2*device.Align))
	for range 2 {
		if err := d.ReadAt(p, 3*device.Align); !errors.Is(err, unix.EIO) {
			t.Fatalf("bad place: %v", err)
		}
	}
	d.Heal()
	must(t, d.ReadAt(p, 3*device.Align))

	d.LoseNth(Write, 1)
	must(t, d.WriteAt(fill(t, device.Align, 9), 0))
	if got := sectors(t, d, 1)[0]; got != 1 {
		t.Fatalf("a lost write left %d", got)
	}
	d.MisdirectNth(1, 5*device.Align)
	must(t, d.WriteAt(fill(t, device.Align, 9), 0))
	if got := sectors(t, d, 6); got[0] != 1 || got[40] != 9 {
		t.Fatalf("misdirected write: %v", got)
	}

	d.SetFull(true)
	must(t, d.WriteAt(p, 0))
	if err := d.WriteAt(p, 9*device.Align); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("full disk: %v", err)
	}
	d.Heal()
	must(t, d.WriteAt(p, 9*device.Align))

	d.Fail(nil)
	for i, err := range []error{d.ReadAt(p, 0), d.WriteAt(p, 0), d.Discard(0, device.Align), d.Flush()} {
		if !errors.Is(err, unix.EIO) {
			t.Errorf("dead device, operation %d: %v", i, err)
		}
	}
	d.Heal()
	if err := d.WriteAt(p, 0); !errors.Is(err, device.ErrPoisoned) {
		t.Fatalf("write after a failed flush: %v", err)
	}
	if err := d.Flush(); !errors.Is(err, device.ErrPoisoned) {
		t.Fatalf("flush after a failed flush: %v", err)
	}
	must(t, d.ReadAt(p, 0))
	d.Reopen()
	must(t, d.Flush())
}

func differences(a, b []byte) (bits int) {
	for i := range a {
		for x := a[i] ^ b[i]; x != 0; x &= x - 1 {
			bits++
		}
	}
	return bits
}

func TestFlips(t *testing.T) {
	want := fill(t, device.Align, 0x55)
	got := fill(t, device.Align, 0)
	d := New(1, 1<<20)
	must(t, d.WriteAt(want, 0))

	d.FlipNth(Read, 1)
	must(t, d.ReadAt(got, 0))
	if n := differences(got, want); n != 1 {
		t.Errorf("flipped read differs in %d bits", n)
	}
	must(t, d.ReadAt(got, 0))
	if n := differences(got, want); n != 0 {
		t.Errorf("read after a flipped read differs in %d bits", n)
	}
	before := d.Crash(CrashOptions{Keep: 1})
	d.FlipBit(100, 3)
	for name, c := range map[string]*Disk{
		"itself": d, "crash": d.Crash(CrashOptions{Keep: 1}), "clone": d.Clone(),
	} {
		c.Peek(got, 0)
		if n := differences(got, want); n != 1 || got[100] != 0x55^8 {
			t.Errorf("%s: flipped disk differs in %d bits", name, n)
		}
	}
	if before.Peek(got, 0); differences(got, want) != 0 {
		t.Error("a flip reached a clone made before it")
	}
	must(t, d.Flush())
	d.FlipNth(Write, 1)
	must(t, d.WriteAt(want, device.Align))
	d.Peek(got, device.Align)
	if n := differences(got, want); n != 1 {
		t.Errorf("flipped write differs in %d bits", n)
	}
	d.Overwrite(100, []byte{1, 2, 3})
	c := d.Crash(CrashOptions{})
	c.Peek(got[:3], 100)
	if !bytes.Equal(got[:3], []byte{1, 2, 3}) {
		t.Errorf("overwritten bytes after a crash: %v", got[:3])
	}
}

func TestLyingFlush(t *testing.T) {
	d := New(1, 1<<20)
	d.SetLying(true)
	must(t, d.WriteAt(fill(t, device.Align, 1), 0))
	must(t, d.Flush())
	if got := sectors(t, d.Crash(CrashOptions{}), 1)[0]; got != 0 {
		t.Error("a lying flush secured a write")
	}
	d.SetLying(false)
	must(t, d.Flush())
	if got := sectors(t, d.Crash(CrashOptions{}), 1)[0]; got != 1 {
		t.Error("an honest flush did not secure an earlier write")
	}
}

func TestHoldAndObserve(t *testing.T) {
	d := New(1, 1<<20)
	p := fill(t, device.Align, 1)
	seen := make(chan Op, 10)
	var atWrite *Disk
	d.Observe(func(op Op) {
		if op.Kind == Write {
			atWrite = d.Crash(CrashOptions{Keep: 1})
		}
		seen <- op
	})
	release := d.Hold(Write)
	done := make(chan error)
	go func() { done <- d.WriteAt(p, device.Align) }()
	must(t, d.ReadAt(p, 0)) // reads go on
	if op := <-seen; op.Kind != Read || op.N != 1 {
		t.Fatalf("first operation seen: %+v", op)
	}
	select {
	case <-done:
		t.Fatal("a held write was done")
	default:
	}
	release()
	must(t, <-done)
	if op := <-seen; op != (Op{Kind: Write, N: 1, Off: device.Align, Len: device.Align}) {
		t.Fatalf("second operation seen: %+v", op)
	}
	if got := sectors(t, atWrite, 2)[8]; got != 0 && got != 1 || d.Counts(Write) != 1 {
		t.Fatalf("crash at the write: %d", got)
	}
	d.FailNth(Flush, 1, nil)
	if err := d.Flush(); err == nil {
		t.Fatal("flush succeeded")
	}
	if op := <-seen; op.Kind != Flush || !errors.Is(op.Err, unix.EIO) {
		t.Fatalf("third operation seen: %+v", op)
	}
}

func TestReadOnly(t *testing.T) {
	d := New(1, 1<<20)
	p := fill(t, device.Align, 1)
	d.SetReadOnly(true)
	for k, err := range []error{d.ReadAt(p, 0), d.WriteAt(p, 0), d.Flush(), d.Discard(0, device.Align)} {
		if want := Kind(k) != Read; want != errors.Is(err, device.ErrReadOnly) {
			t.Errorf("%v: %v", Kind(k), err)
		}
	}
}
