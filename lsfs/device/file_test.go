package device_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("TWINSAN_TEST_OPEN"); path != "" {
		// The second process of TestOpenIsAlone.
		d, err := device.Open(path, device.Options{})
		if errors.Is(err, device.ErrInUse) {
			os.Exit(42)
		}
		if err == nil {
			d.Close()
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func newFile(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	if err := device.Create(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, path string, o device.Options) device.Device {
	t.Helper()
	d, err := device.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestConform(t *testing.T) {
	t.Run("sparse", func(t *testing.T) {
		devicetest.Conform(t, func(t testing.TB) device.Device { return open(t, newFile(t, 2<<20), device.Options{}) })
	})
	t.Run("preallocated", func(t *testing.T) {
		devicetest.Conform(t, func(t testing.TB) device.Device {
			path := filepath.Join(t.TempDir(), "device")
			if err := device.Preallocate(path, 2<<20); errors.Is(err, unix.EOPNOTSUPP) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			return open(t, path, device.Options{})
		})
	})
	t.Run("memory", func(t *testing.T) {
		dir, err := os.MkdirTemp("/dev/shm", "device")
		if err != nil {
			t.Skip("no file system in memory: ", err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		devicetest.Conform(t, func(t testing.TB) device.Device {
			path := filepath.Join(dir, "device")
			os.Remove(path)
			if err := device.Create(path, 2<<20); err != nil {
				t.Fatal(err)
			}
			d := open(t, path, device.Options{})
			if d.Direct() {
				t.Error("direct I/O on a file system in memory")
			}
			return d
		})
	})
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "device")
	if err := device.Create(path, device.Align+100); err != nil {
		t.Fatal(err)
	}
	if d := open(t, path, device.Options{}); d.Size() != device.Align || d.Path() != path {
		t.Errorf("size %d, path %q", d.Size(), d.Path())
	}
	if err := device.Create(path, 1<<20); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create of a file that exists: %v", err)
	}
	if err := device.Create(filepath.Join(dir, "small"), device.Align-1); !errors.Is(err, device.ErrNotUsable) {
		t.Errorf("create of 4095 bytes: %v", err)
	}
	if err := device.Create(filepath.Join(dir, "none", "device"), 1<<20); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("create without a directory: %v", err)
	}
	// More than the file system has: nothing may stay behind.
	huge := filepath.Join(dir, "huge")
	if err := device.Preallocate(huge, 1<<50); err == nil {
		t.Error("a PiB was reserved")
	}
	if _, err := os.Stat(huge); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a device stayed behind: %v", err)
	}
}

func TestOpenIsAlone(t *testing.T) {
	path := newFile(t, 1<<20)
	second := func() int {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), "TWINSAN_TEST_OPEN="+path)
		c.Run()
		return c.ProcessState.ExitCode()
	}
	d := open(t, path, device.Options{})
	if code := second(); code != 42 {
		t.Errorf("second process: exit code %d, want 42 for ErrInUse", code)
	}
	for _, o := range []device.Options{{}, {ReadOnly: true}} {
		if _, err := device.Open(path, o); !errors.Is(err, device.ErrInUse) {
			t.Errorf("second open, %+v: %v, want ErrInUse", o, err)
		}
	}
	d.Close()
	if code := second(); code != 0 {
		t.Errorf("second process after close: exit code %d", code)
	}
	r1, r2 := open(t, path, device.Options{ReadOnly: true}), open(t, path, device.Options{ReadOnly: true})
	if _, err := device.Open(path, device.Options{}); !errors.Is(err, device.ErrInUse) {
		t.Errorf("writer beside readers: %v, want ErrInUse", err)
	}
	p := device.AlignedBuffer(device.Align)
	defer device.FreeAligned(p)
	for _, r := range []device.Device{r1, r2} {
		if err := r.ReadAt(p, 0); err != nil {
			t.Error(err)
		}
		for _, err := range []error{r.WriteAt(p, 0), r.Flush(), r.Discard(0, device.Align)} {
			if !errors.Is(err, device.ErrReadOnly) {
				t.Errorf("change through a reader: %v, want ErrReadOnly", err)
			}
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	pipe, small := filepath.Join(dir, "pipe"), filepath.Join(dir, "small")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(small, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		dir: device.ErrNotUsable, pipe: device.ErrNotUsable, "/dev/null": device.ErrNotUsable, small: device.ErrNotUsable,
		filepath.Join(dir, "none"): fs.ErrNotExist,
	} {
		if _, err := device.Open(path, device.Options{}); !errors.Is(err, want) {
			t.Errorf("open %s: %v, want %v", path, err, want)
		}
	}
}

// blocksOf is the room that a file takes.
func blocksOf(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestDiscardGivesSpaceBackUnlessItWasReserved(t *testing.T) {
	const size = 4 << 20
	p := device.AlignedBuffer(size)
	defer device.FreeAligned(p)
	for i := range p {
		p[i] = byte(i)
	}
	path := newFile(t, size)
	d := open(t, path, device.Options{})
	for _, err := range []error{d.WriteAt(p, 0), d.Flush(), d.Discard(0, size/2), d.Flush()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := blocksOf(t, path); got > size*3/4 {
		t.Errorf("sparse file takes %d bytes after half of it was discarded", got)
	}
	path = filepath.Join(t.TempDir(), "device")
	if err := device.Preallocate(path, size); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	d = open(t, path, device.Options{})
	if err := d.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	if got := blocksOf(t, path); got < size {
		t.Errorf("a discard took %d bytes from a preallocated file", size-got)
	}
}

// TestCutFile: a file that becomes shorter under the device is an error of the
// read, not zeros.
func TestCutFile(t *testing.T) {
	path := newFile(t, 1<<20)
	d := open(t, path, device.Options{})
	if err := os.Truncate(path, 64<<10); err != nil {
		t.Fatal(err)
	}
	p := device.AlignedBuffer(128 << 10)
	defer device.FreeAligned(p)
	for _, off := range []int64{0, 64 << 10, 512 << 10} {
		if err := d.ReadAt(p, off); err == nil {
			t.Errorf("read of 128 KiB at %d of a file of 64 KiB succeeded", off)
		}
	}
	if err := d.ReadAt(p[:64<<10], 0); err != nil {
		t.Error(err)
	}
}
