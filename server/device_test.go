package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/lsfs"
)

// TestChangeDevices has devices come and go, asked at the node itself and at another,
// and finds them under other names after a restart.
func TestChangeDevices(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	c := l.config("a", false)
	tokens, err := Init(ctx, c, InitOptions{Cluster: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	n := l.open(c)
	wc := l.config("w", true)
	if err := Join(ctx, wc, JoinOptions{Address: c.Sync.Address, Token: tokens.Witness, Witness: true}); err != nil {
		t.Fatal(err)
	}
	w := l.open(wc)
	if _, err := n.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true, Dedup: true, Compress: true}); err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(c.DataDir, "disk1")
	d, err := w.ChangeDevice(ctx, DeviceChange{Action: DeviceAdd, Node: "a", Path: second, Size: 256 << 20, Class: "capacity"}, false)
	if err != nil || d.Path != second || d.Class != "capacity" || d.State != "ok" {
		t.Fatalf("%+v, %v", d, err)
	}
	refused := func(c DeviceChange, want error, text string) {
		t.Helper()
		if _, err := n.ChangeDevice(ctx, c, false); !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("%+v: %v, want %v with %q", c, err, want, text)
		}
	}
	first := c.Store.Devices[0]
	text := filepath.Join(c.DataDir, "text")
	if err := os.WriteFile(text, []byte(strings.Repeat("data", 1<<18)), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(DeviceChange{Action: DeviceAdd, Node: "a", Path: second}, ErrRefused, "holds data (a twinsan pool)")
	refused(DeviceChange{Action: DeviceAdd, Node: "a", Path: text}, ErrRefused, "holds data")
	refused(DeviceChange{Action: DeviceAdd, Node: "a", Path: text, Wipe: true, Class: "tape"}, ErrInvalid, "tape")
	refused(DeviceChange{Action: DeviceAdd, Node: "a", Path: text, Wipe: true}, ErrRefused, "too small")
	refused(DeviceChange{Action: DeviceAdd, Node: "a", Path: "disk"}, ErrInvalid, "absolute")
	refused(DeviceChange{Action: DeviceAdd, Node: "z", Path: text}, ErrNotFound, "z")
	refused(DeviceChange{Action: DeviceAdd, Node: "w", Path: text}, ErrInvalid, "witness")
	refused(DeviceChange{Action: DeviceRemove, Node: "a", Device: second}, ErrRefused, "drain it first")
	refused(DeviceChange{Action: DeviceDrain, Node: "a", Device: "/dev/none"}, ErrNotFound, "device list")
	refused(DeviceChange{Action: "paint", Node: "a", Device: first}, ErrInvalid, "paint")
	checkMetrics(t, c.Metrics.Address, `twinsan_device_live_bytes{class="capacity",device="`+second+`"} 0`, `twinsan_device_errors_total{device="`+first+`",op="flush"} 0`)

	// The pool is found in the same directory under other names.
	n.Close()
	delete(l.nodes, n.id.Node)
	moved := filepath.Join(c.DataDir, "moved")
	if err := errors.Join(os.Rename(first, moved), os.Rename(second, first)); err != nil {
		t.Fatal(err)
	}
	n = l.open(c)
	paths := func() (out []string) {
		list, _, err := n.Devices(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range list {
			out = append(out, filepath.Base(d.Path)+" "+d.Class+" "+d.State)
		}
		slices.Sort(out)
		return out
	}
	if got := paths(); !slices.Equal(got, []string{"disk capacity ok", "moved flash ok"}) {
		t.Fatal(got)
	}
	record, err := readPool(c.DataDir)
	if err != nil || len(record.Devices) != 2 || record.Devices[0].Path != moved || record.Generation != 2 {
		t.Fatalf("%+v, %v", record, err)
	}
	// Replaced by a new one, over the old one's uuid.
	third := filepath.Join(c.DataDir, "disk2")
	if _, err := n.ChangeDevice(ctx, DeviceChange{Action: DeviceReplace, Node: "a", Device: record.Devices[0].UUID[:8], Path: third, Size: 256 << 20}, false); err != nil {
		t.Fatal(err)
	}
	l.await("the old device is gone", func() error {
		if got := paths(); !slices.Equal(got, []string{"disk capacity ok", "disk2 flash ok"}) {
			return errors.New(strings.Join(got, ", "))
		}
		return nil
	})
	if d, err := n.ChangeDevice(ctx, DeviceChange{Action: DeviceDrain, Node: "a", Device: first}, false); err != nil || d.State != "draining" && d.State != "drained" {
		t.Fatalf("%+v, %v", d, err)
	}
	l.await("drained", func() error {
		if got := paths(); !slices.Equal(got, []string{"disk capacity drained", "disk2 flash ok"}) {
			return errors.New(strings.Join(got, ", "))
		}
		return nil
	})
	if _, err := n.ChangeDevice(ctx, DeviceChange{Action: DeviceRemove, Node: "a", Device: first}, false); err != nil {
		t.Fatal(err)
	}
	n.Close()
	delete(l.nodes, n.id.Node)
	if r, err := CheckStore(context.Background(), c, nil, false); err != nil || r.Count != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	// What was removed does not come back, though the file names it.
	n = l.open(c)
	if got := paths(); !slices.Equal(got, []string{"disk2 flash ok"}) {
		t.Fatal(got)
	}
}

// TestPoolRecordOfVersion1 reads a record as it was written before devices could come
// and go.
func TestPoolRecordOfVersion1(t *testing.T) {
	dir := t.TempDir()
	old := `{"version": 1, "pool": "0a000000-0000-4000-8000-000000000001", "devices": ["/dev/sdb", "/dev/sdc"]}`
	if err := os.WriteFile(filepath.Join(dir, poolFile), []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := readPool(dir)
	if err != nil || r.Pool[0] != 10 || r.Generation != 0 || !slices.Equal(r.Devices, []poolDevice{{Path: "/dev/sdb"}, {Path: "/dev/sdc"}}) {
		t.Fatalf("%+v, %v", r, err)
	}
	k := &poolKeeper{dir: dir, last: *r}
	if err := k.persist(4, []lsfs.DeviceInfo{{Path: "/dev/sdd", Class: lsfs.Capacity}}); err != nil {
		t.Fatal(err)
	}
	if r, err = readPool(dir); err != nil || r.Generation != 4 || len(r.Devices) != 1 || r.Devices[0].Class != "capacity" {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, bad := range []string{"", "{}", `{"version": 3, "pool": "0a000000-0000-4000-8000-000000000001"}`} {
		if err := os.WriteFile(filepath.Join(dir, poolFile), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readPool(dir); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestForgetAndRebuild starts a node without a device that is gone, and one whose pool
// was made anew.
func TestForgetAndRebuild(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	c := l.config("a", false)
	if _, err := Init(ctx, c, InitOptions{Cluster: "lab"}); err != nil {
		t.Fatal(err)
	}
	n := l.open(c)
	if _, err := RebuildStore(ctx, c, nil); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "stop it first") {
		t.Fatalf("rebuild of a running node: %v", err)
	}
	second := filepath.Join(c.DataDir, "disk1")
	d, err := n.ChangeDevice(ctx, DeviceChange{Action: DeviceAdd, Node: "a", Path: second, Size: 256 << 20, Class: "capacity"}, false)
	if err != nil {
		t.Fatal(err)
	}
	stop := func() {
		n.Close()
		delete(l.nodes, n.id.Node)
	}
	stop()
	if err := ForgetDevice(c, d.UUID); !errors.Is(err, ErrRefused) {
		t.Fatalf("a device that is there: %v", err)
	}
	if err := ForgetDevice(c, "x"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("no device: %v", err)
	}
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, c, Options{}); err == nil || !strings.Contains(err.Error(), d.UUID) || !strings.Contains(err.Error(), "store forget") {
		t.Fatalf("a missing device: %v", err)
	}
	if err := ForgetDevice(c, strings.ToUpper(d.UUID)); err != nil {
		t.Fatal(err)
	}
	n = l.open(c)
	l.await("it is forgotten", func() error {
		list, _, err := n.Devices(ctx, "a")
		if err == nil && len(list) != 1 {
			err = errors.New("it is still listed")
		}
		return err
	})
	if _, err := n.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true, Dedup: true, Compress: true}); err != nil {
		t.Fatal(err)
	}
	stop()
	n = l.open(c)
	stop()
	before, err := readPool(c.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	list, err := RebuildStore(ctx, c, nil)
	if err != nil || !slices.Equal(list, c.Store.Devices) {
		t.Fatalf("%v, %v", list, err)
	}
	if after, err := readPool(c.DataDir); err != nil || after.Pool == before.Pool || len(after.Forget) != 0 {
		t.Fatalf("%+v, %v", after, err)
	}
	n = l.open(c)
	stop()
}
