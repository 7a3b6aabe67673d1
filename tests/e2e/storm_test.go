//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestBootStorm makes a hundred clones of one image and reads them all at once, with cold
// caches: each node reads the image from its device once, and holds it in RAM once.
func TestBootStorm(t *testing.T) {
	scenario(t)
	image := *stormMiB * mib
	r := up(t, lab.Options{DeviceSize: fmt.Sprintf("%dM", 4096+4**stormMiB), Volumes: []string{fmt.Sprintf("demo:%dM", *stormMiB)}})
	table := filepath.Join(r.dir, "image")
	extent := []string{"--size", fmt.Sprint(image), "--seed", "77"}
	load := func(more ...string) *lab.Result {
		for {
			res, err := lab.RunLoad(r.ctx, r.iscsiload, append(append([]string{"--failover"}, extent...), more...)...)
			if err != nil && strings.Contains(err.Error(), "Out of resources") {
				continue // so many logins at once from one address are turned away
			}
			if err != nil {
				t.Error(err)
			}
			return res
		}
	}
	demo := r.volume("demo")
	load("--rw", "write", "--bs", "256k", "--iodepth", "8", "--once", "--ramp", "0", "--verify", "--verify-file", table, r.c.URL(demo.Owner, demo.LUN))
	r.cli("snapshot", "create", "demo@image")
	clones := make([]string, stormClones)
	for i := range clones {
		clones[i] = fmt.Sprintf("clone-%d", i)
		r.cli("volume", "clone", "demo@image", clones[i], "--any-host")
	}
	r.must(r.c.WaitHealthy(r.ctx, 5*time.Minute), "clones")
	// Cold caches, which are larger than the image.
	for _, n := range r.c.Nodes {
		r.demo("kill", n.Name)
		path := filepath.Join(n.Dir, "twinsan.toml")
		text, err := os.ReadFile(path)
		r.must(err, "configuration")
		text = regexp.MustCompile(`(?m)^cache *=.*$`).ReplaceAll(text, fmt.Appendf(nil, "cache = '%dMiB'", max(256, 3**stormMiB/2)))
		r.must(os.WriteFile(path, text, 0o600), "configuration")
	}
	for _, n := range r.c.Nodes {
		r.demo("start", n.Name)
	}
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "start")
	r.must(r.c.Reload(), "processes")
	for i := range clones {
		r.cli("volume", "move", clones[i], "--to", r.c.Nodes[i%2].Name)
	}
	status, err := r.c.Status(r.ctx)
	r.must(err, "status")
	urls := map[string]string{}
	for _, v := range status.Volumes {
		urls[v.Name] = r.c.URL(v.Owner, v.LUN)
	}
	var before [2]int64
	for i, n := range r.c.Nodes {
		before[i] = readBytes(t, n.PID)
	}

	start := time.Now()
	var group sync.WaitGroup
	for i, name := range clones {
		group.Go(func() {
			// The seed gives the ISID as well: each is a host of its own.
			host := []string{"--initiator", fmt.Sprintf("iqn.2026-11.io.twinsan:host-%d", i), urls[name]}
			if i >= 4 {
				load(append(host, "--rw", "read", "--bs", "256k", "--iodepth", "2", "--once", "--ramp", "0")...)
				return
			}
			own := fmt.Sprintf("%s-%d", table, i)
			text, err := os.ReadFile(table)
			if err == nil {
				err = os.WriteFile(own, text, 0o600)
			}
			if err != nil {
				t.Error(err)
				return
			}
			if res := load(append(host, "--check", "--verify", "--iodepth", "16", "--verify-file", own)...); res != nil && !res.Verify.Clean() {
				t.Errorf("%s: %+v", name, res.Verify)
			}
		})
	}
	group.Wait()
	took := time.Since(start)
	for i, n := range r.c.Nodes {
		read, held := readBytes(t, n.PID)-before[i], int64(r.metric(n, `twinsan_cache_bytes{tier="ram"}`))
		t.Logf("node %s: %d clones of %d MiB read in %.1f s: %.1f MiB from the device, %.1f MiB in RAM", n.Name, stormClones/2, *stormMiB, took.Seconds(), float64(read)/float64(mib), float64(held)/float64(mib))
		if slack := image/8 + 8*mib; read < image/2 || image+slack < read || held < image/2 || image+slack < held {
			t.Errorf("node %s read %d bytes and holds %d, the image has %d", n.Name, read, held, image)
		}
	}
}

// stormClones boot at once.
const stormClones = 100

// readBytes is what a process has read from devices.
func readBytes(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "read_bytes: "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no read_bytes: %s", text)
	return 0
}

// metric is the value of one metric of a node.
func (r *rig) metric(n lab.FileNode, name string) float64 {
	r.Helper()
	resp, err := http.Get(n.Metrics)
	r.must(err, "metrics")
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if rest, ok := bytes.CutPrefix(lines.Bytes(), []byte(name+" ")); ok {
			f, err := strconv.ParseFloat(string(rest), 64)
			r.must(err, "%s", name)
			return f
		}
	}
	r.Fatalf("node %s has no metric %s", n.Name, name)
	return 0
}
