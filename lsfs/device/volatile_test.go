//go:build invariants

package device

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestVolatile: the cache is read through, a flush empties it, and what was not
// flushed is lost with it.
func TestVolatile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := func(b byte) []byte {
		p := AlignedBuffer(Align)
		copy(p, bytes.Repeat([]byte{b}, Align))
		return p
	}
	read := func(d Device, off int64) byte {
		p := AlignedBuffer(2 * Align)
		if err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		return p[0]
	}
	for _, percent := range []int{0, 100} {
		d := &volatileDevice{Device: f, percent: percent, pages: map[int64][]byte{}, rand: rand.New(rand.NewPCG(1, 2))}
		write := func(b byte, off int64) {
			if err := d.WriteAt(page(b), off); err != nil {
				t.Fatal(err)
			}
		}
		write(0, Align)
		write(1, 0)
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		write(2, Align)
		want := byte(0)
		if percent == 100 {
			want = 2
		}
		if read(d, 0) != 1 || read(d, Align) != 2 || read(f, 0) != 1 || read(f, Align) != want {
			t.Errorf("%d percent: %d %d in the cache, %d %d on the device", percent, read(d, 0), read(d, Align), read(f, 0), read(f, Align))
		}
	}
}
