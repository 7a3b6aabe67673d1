//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// diskState is a device as the command line lists it.
type diskState struct {
	Node  string `json:"node"`
	Path  string `json:"path"`
	UUID  string `json:"uuid"`
	Class string `json:"class"`
	State string `json:"state"`
	Live  int64  `json:"live_bytes"`
	Stuck string `json:"stuck"`
}

func (r *rig) devices(node string) ([]diskState, error) {
	var page struct {
		Devices []diskState `json:"devices"`
	}
	err := r.c.JSON(r.ctx, &page, "device", "list", "--node", node)
	return page.Devices, err
}

func (r *rig) mustDevices(node string) []diskState {
	r.Helper()
	list, err := r.devices(node)
	r.must(err, "device list")
	return list
}

// awaitDevices waits until a node's devices are as wanted.
func (r *rig) awaitDevices(node, what string, ok func([]diskState) bool) {
	r.Helper()
	r.must(lab.Until(r.ctx, 2*time.Minute, func() error {
		list, err := r.devices(node)
		if err != nil {
			return err
		}
		if !ok(list) {
			return fmt.Errorf("the devices of node %s are %+v", node, list)
		}
		return nil
	}), "%s", what)
}

// TestDevices has disks of both nodes come and go under verified load, and kills the
// node in the middle of each change: what was begun goes on by itself, and every
// acknowledged write is there on both nodes.
func TestDevices(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "2G", Volumes: []string{"demo:512M"}})
	// What a drain takes a while to move.
	v := r.volume("demo")
	r.load("--rw", "write", "--once", "--bs", "1m", "--iodepth", "8", "--offset", fmt.Sprint(96*mib), "--size", fmt.Sprint(400*mib), r.c.URL(v.Owner, v.LUN))
	load := r.verify(r.both(r.volume("demo").LUN), 0, 96*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	at := func(path string) func(d diskState) bool { return func(d diskState) bool { return d.Path == path } }
	kill := func(node string) {
		t.Helper()
		r.demo("kill", node)
		load.progress(200, 30*time.Second) // it goes on without the node
		r.demo("start", node)
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "recovery of node %s", node)
	}
	kills, inside := 0, 0
	for _, node := range []string{"a", "b"} {
		list := r.mustDevices(node)
		if len(list) != 1 {
			t.Fatalf("devices %+v", list)
		}
		first := list[0]
		dir := filepath.Dir(first.Path)
		second, third := filepath.Join(dir, "second.img"), filepath.Join(dir, "third.img")

		// A second disk, and the power goes right after it.
		r.cli("device", "add", node, second, "--size", "2G")
		kill(node)
		r.awaitDevices(node, "two devices", func(list []diskState) bool { return len(list) == 2 && list[1].State == "ok" })

		// Drain the first; the power goes while it is drained.
		r.cli("device", "drain", node, first.Path, "--no-wait")
		r.awaitDevices(node, "the drain", func(list []diskState) bool { return list[0].Live < 350*mib })
		busy := slices.ContainsFunc(r.mustDevices(node), func(d diskState) bool { return d.State == "draining" })
		kill(node)
		if busy {
			inside++
		}
		kills += 2
		r.cli("device", "drain", node, first.Path)
		if _, err := r.c.CLI(r.ctx, "device", "remove", node, second); err == nil {
			t.Error("a device in use was removed")
		}
		r.cli("device", "remove", node, first.Path)
		r.awaitDevices(node, "the first is gone", func(list []diskState) bool {
			return len(list) == 1 && !slices.ContainsFunc(list, at(first.Path))
		})
		load.progress(300, 30*time.Second)

		// Replace the second, and the power goes in the middle.
		r.cli("device", "replace", node, second, third, "--size", "3G", "--no-wait")
		kill(node)
		kills++
		r.awaitDevices(node, "the second is gone", func(list []diskState) bool {
			return len(list) == 1 && list[0].Path == third && list[0].State == "ok"
		})
		load.progress(300, 30*time.Second)
	}
	result := load.stop()
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "healthy")
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	for _, node := range []string{"a", "b"} {
		load.check(r.c.URL(node, r.volume("demo").LUN))
	}
	r.Logf("%d kills (%d in a drain), %d acknowledged writes, 0 lost, 0 stale, 0 corrupt, longest pause %.2f s", kills, inside, load.acked(), result.Failover.MaxGapMS/1000)
}

// TestLostDisk loses the disk of a node for good under verified load: the node's pool is
// made anew on another one, and the other node fills it.
func TestLostDisk(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "2G", Volumes: []string{"demo:256M"}})
	v := r.volume("demo")
	node := v.Other()
	load := r.verify(r.both(v.LUN), 0, 64*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	disk := r.mustDevices(node)[0].Path
	r.demo("kill", node)
	r.must(os.Remove(disk), "the disk")
	load.progress(200, 30*time.Second)
	config := filepath.Join(filepath.Dir(disk), "twinsan.toml")
	if out, err := lab.Run(r.ctx, *program, "serve", "--config", config); err == nil || !strings.Contains(err.Error(), "none of its devices is here") {
		t.Fatalf("start without a disk: %v %s", err, out)
	}
	_, err := lab.Run(r.ctx, *program, "store", "rebuild", "--config", config, "--devices", filepath.Join(filepath.Dir(disk), "new.img"), "--yes")
	r.must(err, "store rebuild")
	r.demo("start", node)
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "refill")
	load.progress(200, 30*time.Second)
	load.stop()
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL(node, v.LUN))
}
