//go:build e2e

package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

const (
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// rig is what a test works with: a cluster, the load generator, randomness.
type rig struct {
	*testing.T
	ctx       context.Context
	c         *lab.Cluster
	dir       string
	iscsiload string
	rand      *rand.Rand
	volatile  bool // the volume has a volatile cache: what was not flushed may be lost

	// inside runs what opens a socket where the initiators are; nil: here.
	inside func(func()) error
}

// up starts a cluster that lives as long as the test.
func up(t *testing.T, o lab.Options) *rig {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	load, err := lab.Iscsiload(ctx, *root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(*program); err != nil {
		t.Fatalf("%v\n  build it: make bin/twinsan", err)
	}
	h := fnv.New64a()
	h.Write([]byte(t.Name()))
	r := &rig{T: t, ctx: ctx, iscsiload: load, dir: filepath.Join(*work, strings.ReplaceAll(t.Name(), "/", "-")),
		rand: rand.New(rand.NewPCG(*seedFlag, h.Sum64()))}
	if err := clearOld(ctx, r.dir); err != nil {
		t.Fatal(err)
	}
	if o.Binary == "" {
		o.Binary = *program
	}
	o.Dir = filepath.Join(r.dir, "demo")
	start := time.Now()
	if r.c, err = lab.Up(ctx, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	t.Logf("cluster up and in sync in %.1f s: %s", time.Since(start).Seconds(), r.c.Repeat())
	return r
}

// clearOld removes what an earlier failed run kept.
func clearOld(ctx context.Context, dir string) error {
	demo := filepath.Join(dir, "demo")
	if _, err := os.Stat(filepath.Join(demo, "demo.json")); err == nil {
		if _, err := lab.Run(ctx, *program, "demo", "clean", "--dir", demo); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func (r *rig) close() {
	if err := r.c.Reload(); err != nil {
		r.Errorf("demo.json: %v", err)
	}
	for _, line := range r.c.Panics() {
		r.Errorf("a node's log: %s", line)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if r.Failed() {
		r.Log(r.c.Logs(30))
		if out, err := r.c.CLI(ctx, "status"); err != nil {
			r.Logf("status: %v", err)
		} else {
			r.Logf("status:\n%s", out)
		}
	}
	if r.Failed() || *keep {
		// The processes end, the evidence stays.
		if _, err := r.c.Demo(ctx, "down"); err != nil {
			r.Logf("demo down: %v", err)
		}
		r.Logf("kept: %s", r.dir)
		return
	}
	if err := r.c.Clean(); err != nil {
		r.Errorf("clean: %v", err)
	}
	if err := os.RemoveAll(r.dir); err != nil {
		r.Error(err)
	}
}

// must ends the test on an error.
func (r *rig) must(err error, format string, args ...any) {
	r.Helper()
	if err != nil {
		r.Fatalf("%s: %v", fmt.Sprintf(format, args...), err)
	}
}

func (r *rig) demo(args ...string) {
	r.Helper()
	_, err := r.c.Demo(r.ctx, args...)
	r.must(err, "demo %s", strings.Join(args, " "))
}

func (r *rig) volume(name string) *lab.Volume {
	r.Helper()
	v, err := r.c.Volume(r.ctx, name)
	r.must(err, "volume %s", name)
	return v
}

// both are the URLs of a volume through both nodes.
func (r *rig) both(lun int) []string { return []string{r.c.URL("a", lun), r.c.URL("b", lun)} }

func (r *rig) load(args ...string) *lab.Result {
	r.Helper()
	res, err := lab.RunLoad(r.ctx, r.iscsiload, args...)
	r.must(err, "load")
	return res
}

// clean demands a verdict without lost, stale or corrupt blocks.
func (r *rig) clean(what string, res *lab.Result) {
	r.Helper()
	if !res.Verify.Clean() && !(r.volatile && res.Verify.Flushed()) {
		r.Fatalf("%s: %+v, errors %+v", what, res.Verify, res.Errors)
	}
}

// verified is a verified load that runs until stop. It knows every write that
// was acknowledged, by a table that it shares with the generator.
type verified struct {
	*lab.Load
	r     *rig
	table string
	args  []string

	unflushed int64 // blocks that check found older than acknowledged
}

// verify starts verified random reads and writes on a range of an LU.
func (r *rig) verify(urls []string, offset, size int64, more ...string) *verified {
	r.Helper()
	f, err := os.CreateTemp(r.dir, "table-")
	r.must(err, "table")
	r.must(f.Close(), "table")
	v := &verified{r: r, table: f.Name()}
	v.args = []string{"--offset", fmt.Sprint(offset), "--size", fmt.Sprint(size), "--seed", fmt.Sprint(r.rand.Uint64() >> 1), "--verify-file", v.table}
	args := append([]string{"--rw", "randrw", "--rwmix", "40", "--iodepth", "16", "--verify", "--ramp", "0", "--runtime", "3600",
		"--dedupe", "20", "--compress", "30"}, v.args...)
	v.Load, err = lab.Start(r.ctx, r.iscsiload, append(append(args, more...), urls...)...)
	r.must(err, "load")
	r.Cleanup(v.Kill)
	v.progress(200, 30*time.Second)
	return v
}

// acked is the number of acknowledged writes so far, as the generator's table
// has it: per 4 KiB block three 32-bit counters (durable, acknowledged, issued)
// behind one page of header.
func (v *verified) acked() int64 {
	v.r.Helper()
	text, err := os.ReadFile(v.table)
	v.r.must(err, "table")
	total := int64(0)
	for at := 4096; at+12 <= len(text); at += 12 {
		total += int64(binary.LittleEndian.Uint32(text[at+4:]))
	}
	return total
}

// progress waits until n more writes were acknowledged.
func (v *verified) progress(n int64, limit time.Duration) {
	v.r.Helper()
	first := v.acked()
	v.r.must(lab.Until(v.r.ctx, limit, func() error {
		select {
		case <-v.Ended():
			_, err := v.Wait()
			v.r.Fatalf("the load generator ended: %v", err)
		default:
		}
		if now := v.acked(); now < first+n {
			return fmt.Errorf("%d of %d writes were acknowledged\n  %s", now-first, n, v.Command)
		}
		return nil
	}), "progress")
}

// stop ends the load; no I/O may have failed and no read been wrong.
func (v *verified) stop() *lab.Result {
	v.r.Helper()
	v.r.must(v.Stop(), "stop the load")
	res, err := v.Wait()
	v.r.must(err, "load")
	v.r.clean("while the load ran", res)
	return res
}

// check reads back everything that was ever written, through one path.
func (v *verified) check(url string) {
	v.r.Helper()
	args := append([]string{"--check", "--verify", "--iodepth", "16"}, v.args...)
	if v.r.volatile {
		args = append(args, "--volatile")
	}
	res, err := lab.RunLoad(v.r.ctx, v.r.iscsiload, append(args, url)...)
	v.r.must(err, "read back through %s", url)
	v.unflushed = res.Verify.Unflushed
	v.r.clean("read back", res)
}
