package device_test

import (
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

func TestMetered(t *testing.T) {
	disk := devicetest.New(1, 1<<20)
	m := device.Meter(disk)
	p := device.AlignedBuffer(4096)
	defer device.FreeAligned(p)
	for i := range 5 {
		if err := m.WriteAt(p, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	disk.FailNth(devicetest.Read, 2, nil)
	if err := m.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := m.ReadAt(p, 0); err == nil {
		t.Fatal("the second read did not fail")
	}
	u := m.Usage()
	if u.Reads != 2 || u.Writes != 5 || u.Flushes != 1 || u.Errors != 1 || u.ReadErrors != 1 {
		t.Fatalf("%+v", u)
	}
	if u.WriteLatency <= 0 || time.Second < u.WriteLatency {
		t.Fatalf("mean write takes %v", u.WriteLatency)
	}
	if m.Holes(0, 4096) {
		t.Fatal("a disk has no holes")
	}
}

func TestRotationalFile(t *testing.T) {
	if device.Rotational(t.TempDir() + "/none") {
		t.Fatal("what does not exist rotates")
	}
}
