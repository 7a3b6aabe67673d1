//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestSalvage loses one of three flash disks of a node, killed under verified load, for good. What
// the two others hold is kept, so the other node sends little more than the third that is missing.
func TestSalvage(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "1G", Volumes: []string{"demo:512M"}})
	v := r.volume("demo")
	node := v.Other()
	dir := filepath.Dir(r.mustDevices(node)[0].Path)
	for _, name := range []string{"second.img", "third.img"} {
		r.cli("device", "add", node, filepath.Join(dir, name), "--size", "1G")
	}
	load := r.verify(r.both(v.LUN), 0, 32*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	r.load("--rw", "write", "--once", "--bs", "1m", "--iodepth", "8", "--offset", fmt.Sprint(64*mib), "--size", fmt.Sprint(420*mib), r.c.URL(v.Owner, v.LUN))
	load.progress(200, 30*time.Second)
	var held, lost int64
	list := r.mustDevices(node)
	for _, d := range list {
		held += d.Live
	}
	// One that the pool cannot do without: the node says so.
	r.demo("kill", node)
	config := filepath.Join(dir, "twinsan.toml")
	run := func(args ...string) ([]byte, error) {
		return lab.Run(r.ctx, *program, append(args, "--config", config)...)
	}
	for _, d := range list {
		away := filepath.Join(r.dir, "away.img") // not beside the others, where it is looked for
		r.must(os.Rename(d.Path, away), "the disk")
		if out, err := run("store", "salvage", "--dry-run"); err != nil {
			if e := (*lab.ExitError)(nil); !errors.As(err, &e) || !strings.Contains(e.Stderr, "store forget") {
				t.Fatalf("dry run: %v %s", err, out)
			}
			r.must(os.Rename(away, d.Path), "the disk")
			continue
		}
		r.must(os.Remove(away), "the disk")
		lost = d.Live
		r.must(func() error { _, err := run("store", "forget", d.UUID, "--yes"); return err }(), "store forget")
		break
	}
	if lost == 0 {
		t.Fatalf("the pool opens without any of %+v", list)
	}
	if _, err := run("serve"); err == nil || !strings.Contains(err.Error(), "twinsan store salvage") {
		t.Fatalf("start without the disk: %v", err)
	}
	out, err := run("store", "salvage", "--yes", "-o", "json")
	r.must(err, "store salvage")
	var page struct {
		Blocks uint64   `json:"blocks"`
		Bytes  uint64   `json:"bytes"`
		Rate   uint64   `json:"bytes_per_second"`
		Lost   []string `json:"missing"`
	}
	r.must(json.Unmarshal(out, &page), "%s", out)
	load.progress(200, 30*time.Second)
	const sent = "twinsan_resync_sent_bytes_total"
	before := r.metric(*r.c.Node(v.Owner), sent)
	r.demo("start", node)
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "refill")
	moved := int64(r.metric(*r.c.Node(v.Owner), sent) - before)
	t.Logf("%d MiB kept, read at %d MiB/s; the node held %d MiB, the disk %d, %d MiB moved", page.Bytes/uint64(mib), page.Rate/uint64(mib), held/mib, lost/mib, moved/mib)
	// What the load has overwritten since the disk was lost is missing, too.
	if limit := lost + lost/10 + 32*mib; moved > limit || page.Blocks == 0 || len(page.Lost) != 1 {
		t.Errorf("%d bytes moved, expected at most %d: %s", moved, limit, out)
	}
	r.must(lab.Until(r.ctx, time.Minute, func() error {
		if n := r.metric(*r.c.Node(node), "twinsan_pool_salvaged_blocks"); n != 0 {
			return fmt.Errorf("%v blocks are held", n)
		}
		return nil
	}), "the end of the hold")
	load.progress(200, 30*time.Second)
	load.stop()
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL(node, v.LUN))
}
