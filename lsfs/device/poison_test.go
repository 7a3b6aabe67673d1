package device

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFailedFlushPoisons puts a pipe behind the device, which has no fdatasync:
// the first failure must be the last call that the system sees, even when the next
// one would succeed.
func TestFailedFlushPoisons(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	f, err := open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	p := AlignedBuffer(Align)
	defer FreeAligned(p)
	if err := errors.Join(f.WriteAt(p, 0), f.Flush()); err != nil {
		t.Fatal(err)
	}

	good := f.fd
	f.fd = pipe[1]
	err = f.Flush()
	f.fd = good
	if !errors.Is(err, ErrPoisoned) || !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), path) {
		t.Errorf("failed flush: %v", err)
	}
	for name, err := range map[string]error{"flush": f.Flush(), "write": f.WriteAt(p, 0), "discard": f.Discard(0, Align)} {
		if !errors.Is(err, ErrPoisoned) {
			t.Errorf("%s after a failed flush: %v, want ErrPoisoned", name, err)
		}
	}
	if err := f.ReadAt(p, 0); err != nil {
		t.Errorf("read after a failed flush: %v", err)
	}
}

func TestErrorsNameTheRequest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	f, err := open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := AlignedBuffer(2 * Align)
	defer FreeAligned(p)
	good := f.fd
	f.fd = 1 << 20 // no such descriptor
	werr, rerr := f.WriteAt(p, 8*Align), f.ReadAt(p, 4*Align)
	f.fd = good
	for err, want := range map[error]Error{
		werr: {Op: "write", Path: path, Off: 8 * Align, Len: 2 * Align, Err: unix.EBADF},
		rerr: {Op: "read", Path: path, Off: 4 * Align, Len: 2 * Align, Err: unix.EBADF},
	} {
		var got *Error
		if !errors.As(err, &got) || *got != want {
			t.Errorf("error %v, want %v", err, &want)
		}
	}
}
