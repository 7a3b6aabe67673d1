//go:build invariants

package device

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestSlowDeviceFollowsItsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := &slowDevice{Device: f, file: path + ".slow"}
	defer d.Close()
	m := Meter(d)
	buf := AlignedBuffer(Align)
	defer FreeAligned(buf)
	if err := m.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	if d.delay.Load() != 0 {
		t.Fatal("a device without its file is slow")
	}
	if err := os.WriteFile(d.file, []byte("30\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.looked.Store(0)
	before := m.Usage()
	if err := m.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	u := m.Usage()
	if w, f := u.WriteWait-before.WriteWait, u.FlushWait-before.FlushWait; w < 29*time.Millisecond || f < 29*time.Millisecond {
		t.Errorf("a write waited %s, a flush %s; both were to take 30 ms longer", w, f)
	}
	if err := os.Remove(d.file); err != nil {
		t.Fatal(err)
	}
	d.looked.Store(0)
	if d.wait(); d.delay.Load() != 0 {
		t.Error("still slow without the file")
	}
}
