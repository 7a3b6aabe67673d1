package server

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSalvageStore loses a device that metadata stood on: the pool begins anew with the blocks of the
// other one, and an interrupted salvage is repeated before the node starts.
func TestSalvageStore(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	c := l.config("a", false)
	if _, err := Init(ctx, c, InitOptions{Cluster: "lab"}); err != nil {
		t.Fatal(err)
	}
	n := l.open(c)
	second := filepath.Join(c.DataDir, "disk1")
	d, err := n.ChangeDevice(ctx, DeviceChange{Action: DeviceAdd, Node: "a", Path: second, Size: 256 << 20, Class: "flash"}, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true, Dedup: true, Compress: true}); err != nil {
		t.Fatal(err)
	}
	stop := func() {
		n.Close()
		delete(l.nodes, n.id.Node)
	}
	stop()
	n = l.open(c)
	for holds := false; !holds; { // the log goes to the other device when it gets there
		for _, d := range n.store.Devices() {
			holds = holds || d.Path == second && d.FreeBytes < d.SizeBytes
		}
		if !holds {
			stop()
			n = l.open(c)
		}
	}
	if _, err := SalvageStore(ctx, c, false, nil); !errors.Is(err, ErrRefused) {
		t.Fatalf("of a running node: %v", err)
	}
	stop()
	if _, err := SalvageStore(ctx, c, false, nil); !errors.Is(err, ErrRefused) {
		t.Fatalf("of a whole pool: %v", err)
	}
	before, err := readPool(c.DataDir)
	if err != nil || before.Salvaging {
		t.Fatalf("%+v %v", before, err)
	}
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	if err := ForgetDevice(c, d.UUID); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, c, Options{}); err == nil || !strings.Contains(err.Error(), "twinsan store salvage") {
		t.Fatalf("without its metadata: %v", err)
	}
	s, err := SalvageStore(ctx, c, true, nil)
	if err != nil || len(s.Missing) != 1 || s.Missing[0] != d.UUID || len(s.Devices) != 1 {
		t.Fatalf("%+v %v", s, err)
	}
	// It was interrupted: the node waits for it.
	record, err := readPool(c.DataDir)
	if err != nil || record.Salvaging {
		t.Fatalf("%+v %v", record, err)
	}
	record.Salvaging = true
	if err := record.write(c.DataDir); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, c, Options{}); !errors.Is(err, errSalvaging) {
		t.Fatalf("in the middle: %v", err)
	}
	if _, err := SalvageStore(ctx, c, false, nil); err != nil {
		t.Fatal(err)
	}
	after, err := readPool(c.DataDir)
	if err != nil || after.Salvaging || len(after.Forget) != 0 || len(after.Devices) != 1 || after.Pool != before.Pool || after.Generation <= before.Generation {
		t.Fatalf("%+v %v", after, err)
	}
	// Through, but for the record.
	after.Salvaging = true
	if err := after.write(c.DataDir); err != nil {
		t.Fatal(err)
	}
	if _, err := SalvageStore(ctx, c, false, nil); err != nil {
		t.Fatal(err)
	}
	n = l.open(c)
	if _, held := n.store.Salvaged(); !held {
		t.Error("nothing is held")
	}
	stop()
	if err := EndSalvage(ctx, c); err != nil {
		t.Fatal(err)
	}
	if r, err := CheckStore(ctx, c, nil, false); err != nil || r.Count != 0 {
		t.Fatalf("%+v %v", r, err)
	}
}
