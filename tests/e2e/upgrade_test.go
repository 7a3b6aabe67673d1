//go:build e2e

package e2e

import (
	"flag"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

var before = flag.String("before", "", "a twinsan of the version before, for TestUpgrade (make e2e-upgrade builds one)")

// TestUpgrade takes a cluster of the version before to this one, node by node, as
// docs/operations.md says, under verified load: both versions side by side, each of
// them owning, killed, and with the way back, until the feature level is raised.
func TestUpgrade(t *testing.T) {
	if *before == "" {
		t.Skip("needs a program of the version before: make e2e-upgrade BEFORE=COMMIT")
	}
	scenario(t)
	older, err := filepath.Abs(*before)
	if err != nil {
		t.Fatal(err)
	}
	r := up(t, lab.Options{Binary: older, DeviceSize: "4G", Volumes: []string{"demo:256M"}})
	load := r.verify(r.both(r.volume("demo").LUN), 0, 32*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	healthy := func(what string) {
		t.Helper()
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "%s", what)
		load.progress(200, 30*time.Second)
	}
	change := func(node, program, what string) {
		t.Helper()
		if node != "w" {
			r.cli("node", "maintenance", node, "enter")
		}
		r.demo("stop", node)
		r.c.Binary = program
		r.demo("start", node)
		if node != "w" {
			r.cli("node", "maintenance", node, "leave")
		}
		healthy(node + ": " + what)
	}
	level := func() (at, known uint32) {
		t.Helper()
		var info struct {
			Level uint32 `json:"feature_level"`
			Known uint32 `json:"feature_level_known"`
		}
		r.must(r.c.JSON(r.ctx, &info, "cluster", "show"), "cluster show")
		return info.Level, info.Known
	}
	first, _ := level()

	// Side by side: each version owns, and is killed while it does.
	change("b", *program, "upgraded")
	for _, owner := range []string{"b", "a"} {
		r.cli("volume", "move", "demo", "--to", owner)
		load.progress(200, 30*time.Second)
		r.demo("kill", owner)
		load.progress(200, 30*time.Second)
		r.c.Binary = map[string]string{"a": older, "b": *program}[owner]
		r.demo("start", owner)
		healthy(owner + ": back after a kill beside the other version")
		r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check, versions side by side")
	}
	change("w", *program, "upgraded")
	change("a", *program, "upgraded")
	// The way back is open until the level is raised.
	change("b", older, "gone back")
	change("b", *program, "upgraded again")
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check, upgraded")

	if at, known := level(); at != first {
		t.Errorf("the level went from %d to %d by itself", first, at)
	} else if known > at {
		r.cli("upgrade", "apply", "--yes")
		if at, _ := level(); at != known {
			t.Errorf("level %d after upgrade apply, this version knows %d", at, known)
		}
		healthy("level raised")
		// From here on there is no way back, and the older version says so.
		r.cli("node", "maintenance", "b", "enter")
		r.demo("stop", "b")
		r.c.Binary = older
		if out, err := r.c.Demo(r.ctx, "start", "b"); err == nil {
			t.Errorf("the version before runs at a level that it does not know:\n%s", out)
		} else if !strings.Contains(err.Error(), "level") {
			t.Errorf("it does not say why it refuses: %v", err)
		}
		r.c.Binary = *program
		r.demo("start", "b")
		r.cli("node", "maintenance", "b", "leave")
		healthy("b: back with the new version")
	}
	result := load.stop()
	if result.Errors.SCSI != 0 {
		t.Errorf("the initiator saw %+v", result.Errors)
	}
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL("a", r.volume("demo").LUN))
	r.Logf("level %d raised, %d acknowledged writes, 0 lost, longest pause %.2f s", first, load.acked(), result.Failover.MaxGapMS/1000)
}
