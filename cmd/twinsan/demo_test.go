package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server"
)

// rig runs demo commands with the test binary in the place of nodes.
type rig struct {
	t      *testing.T
	dir    string
	hooks  *demoHooks
	joined []string
	port   string
}

func newRig(t *testing.T, mode string) *rig {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "twdemo")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: filepath.Join(dir, "d"), port: freeBase(t)}
	identity := func(c *server.Config, note string) error {
		r.joined = append(r.joined, note)
		return os.WriteFile(filepath.Join(c.DataDir, server.IdentityFile), nil, 0o600)
	}
	r.hooks = &demoHooks{
		exe: exe, env: []string{serveVariable + "=" + mode},
		init: func(_ context.Context, c *server.Config, o server.InitOptions) (*server.Tokens, error) {
			return &server.Tokens{}, identity(c, "init "+o.Cluster+" "+c.Name)
		},
		join: func(_ context.Context, c *server.Config, o server.JoinOptions) error {
			note := "join " + c.Name
			if o.Witness {
				note += " witness"
			}
			if o.Token == "" || o.Address == "" {
				note += " without a token"
			}
			return identity(c, note)
		},
	}
	t.Cleanup(func() {
		if f, err := loadDemo(r.dir); err == nil {
			for _, m := range f.members() {
				if _, err := m.proc.end(context.Background(), time.Millisecond); err != nil {
					t.Error(err)
				}
			}
		}
		os.RemoveAll(dir)
	})
	return r
}

// freeBase finds a base port whose ranges are free now, below the ports that
// connections get, so that nobody takes one meanwhile.
func freeBase(t *testing.T) string {
	t.Helper()
	const first, last, span = 2048, 14000, demoAPIPorts + 100
	const places = (last - first) / span
	for i := range places {
		base := first + (os.Getpid()+i)%places*span
		free := true
		for at := 0; at < span && free; at += 100 {
			for node := range 4 {
				l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+at+node))
				if err != nil {
					free = false
					break
				}
				l.Close()
			}
		}
		if free {
			return strconv.Itoa(base)
		}
	}
	t.Fatal("no free ports")
	return ""
}

func (r *rig) run(args ...string) (stdout, stderr string, code int) {
	r.t.Helper()
	return r.runContext(r.t.Context(), args...)
}

func (r *rig) runContext(ctx context.Context, args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	a := &app{in: strings.NewReader(""), out: &out, err: &errs, getenv: func(string) string { return "" }, terminal: func() bool { return false }, demoHook: r.hooks}
	code = a.run(ctx, append([]string{"demo"}, append(args, "--dir", r.dir)...))
	return out.String(), errs.String(), code
}

func (r *rig) file() *demoFile {
	r.t.Helper()
	text, err := os.ReadFile(filepath.Join(r.dir, demoFileName))
	if err != nil {
		r.t.Fatal(err)
	}
	f := &demoFile{}
	if err := json.Unmarshal(text, f); err != nil {
		r.t.Fatal(err)
	}
	return f
}

// The whole life of a demo, with demo.json true after every step.
func TestDemoLife(t *testing.T) {
	r := newRig(t, "ok")
	out, errs, code := r.run("up", "--detach", "--base-port", r.port, "--volume", "demo:4G", "--volume", "two:1G")
	if code != 0 {
		t.Fatal(errs)
	}
	if want := "init demo a,join b,join w witness"; strings.Join(r.joined, ",") != want {
		t.Errorf("made %v", r.joined)
	}
	f := r.file()
	if f.Target != "iqn.2026-11.io.twinsan:lab" || len(f.Volumes) != 2 || f.Volumes[0] != (demoVolume{"demo", 0, 4 << 30}) || len(f.Nodes) != 2 || f.Witness == nil {
		t.Errorf("file %+v", f)
	}
	if !strings.Contains(out, "iscsi://127.0.0.1:"+r.port+"/iqn.2026-11.io.twinsan:lab/0\n") {
		t.Errorf("printed %s", out)
	}
	for _, m := range f.members() {
		if m.proc.state() != processRunning {
			t.Errorf("%s is %s", m.name, m.proc.state())
		}
	}
	first := *f.members()[0].proc

	// A second up finds everything running.
	if _, errs, code = r.run("up", "--detach", "--base-port", r.port); code != 0 || *r.file().members()[0].proc != first {
		t.Errorf("second up: exit %d, %s", code, errs)
	}

	if _, errs, code = r.run("pause", "b"); code != 0 {
		t.Error(errs)
	}
	b, err := r.file().member("b")
	if err != nil || b.proc.state() != processPaused {
		t.Errorf("b is %s", b.proc.state())
	}
	if out, _, _ = r.run("status", "-o", "json"); !strings.Contains(out, `"state": "paused"`) {
		t.Errorf("status %s", out)
	}
	if _, _, code = r.run("resume", "b"); code != 0 || b.proc.state() != processRunning {
		t.Errorf("after resume b is %s", b.proc.state())
	}

	if _, errs, code = r.run("kill", "b"); code != 0 || b.proc.state() != processGone || r.file().Nodes[1].PID != 0 {
		t.Errorf("after kill: %s, %d, %s", b.proc.state(), r.file().Nodes[1].PID, errs)
	}
	if _, errs, code = r.run("kill", "b"); code != exitFailed || !strings.Contains(errs, "is not running") {
		t.Errorf("second kill: %d %s", code, errs)
	}
	if _, errs, code = r.run("start", "b"); code != 0 || r.file().Nodes[1].PID == 0 {
		t.Errorf("start: %s", errs)
	}
	if _, errs, code = r.run("stop", "w"); code != 0 || r.file().Witness.PID != 0 {
		t.Errorf("stop w: %s", errs)
	}
	if _, errs, code = r.run("kill", "x"); code != exitUsage {
		t.Errorf("kill x: %d %s", code, errs)
	}

	if _, errs, code = r.run("down"); code != 0 {
		t.Error(errs)
	}
	for _, m := range r.file().members() {
		if m.proc.PID != 0 {
			t.Errorf("%s has pid %d after down", m.name, m.proc.PID)
		}
	}
	if _, errs, code = r.run("status"); code != exitDegraded {
		t.Errorf("status of a demo that is down: %d %s", code, errs)
	}
	if _, errs, code = r.run("up", "--detach", "--base-port", r.port, "--volume", "demo:4G"); code != 0 || len(r.joined) != 3 {
		t.Errorf("up again: %v %s", r.joined, errs)
	}
	if _, errs, code = r.run("clean"); code != 0 {
		t.Error(errs)
	}
	if _, err := os.Stat(r.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("clean left %s", r.dir)
	}
	if _, errs, code = r.run("clean"); code != 0 {
		t.Errorf("second clean: %s", errs)
	}
}

// In the foreground the demo lives until it is interrupted, and notices deaths.
func TestDemoForeground(t *testing.T) {
	r := newRig(t, "ok")
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	type result struct {
		errs string
		code int
	}
	done := make(chan result, 1)
	go func() {
		_, errs, code := r.runContext(ctx, "up", "--base-port", r.port)
		done <- result{errs, code}
	}()
	await := func(what string, f func(*demoFile) bool) {
		t.Helper()
		deadline := time.NewTimer(20 * time.Second)
		defer deadline.Stop()
		for {
			text, err := os.ReadFile(filepath.Join(r.dir, demoFileName))
			file := &demoFile{}
			if err == nil && json.Unmarshal(text, file) == nil && f(file) {
				return
			}
			select {
			case x := <-done:
				t.Fatalf("%s: up has ended: %d %s", what, x.code, x.errs)
			case <-deadline.C:
				t.Fatalf("%s: not in time: %s", what, text)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	await("up", func(f *demoFile) bool { return f.Target != "" && f.Nodes[1].PID != 0 })
	if err := r.file().Nodes[1].signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await("death of b", func(f *demoFile) bool { return f.Nodes[1].PID == 0 })
	interrupt()
	if x := <-done; x.code != 0 {
		t.Errorf("exit %d: %s", x.code, x.errs)
	}
	for _, m := range r.file().members() {
		if m.proc.PID != 0 {
			t.Errorf("%s has pid %d after the end", m.name, m.proc.PID)
		}
	}
}

// A node that dies at its start is an error with the end of its log, and nothing
// is left running.
func TestDemoUpFails(t *testing.T) {
	r := newRig(t, "crash")
	_, errs, code := r.run("up", "--detach", "--base-port", r.port)
	if code != exitFailed || !strings.Contains(errs, "node a has ended") || !strings.Contains(errs, "fake node ends") {
		t.Errorf("exit %d: %s", code, errs)
	}
	for _, m := range r.file().members() {
		if m.proc.PID != 0 {
			t.Errorf("%s is left with pid %d", m.name, m.proc.PID)
		}
	}
}

func TestDemoPortTaken(t *testing.T) {
	r := newRig(t, "ok")
	l, err := net.Listen("tcp", "127.0.0.1:"+r.port)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, errs, code := r.run("up", "--detach", "--base-port", r.port); code != exitFailed || !strings.Contains(errs, "127.0.0.1:"+r.port+" is taken") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

func TestDemoUsage(t *testing.T) {
	r := newRig(t, "ok")
	for _, args := range [][]string{
		{"up", "--volume", "demo"}, {"up", "--volume", "De:4G"}, {"up", "--volume", "d:x"}, {"up", "--nodes", "0"}, {"up", "--nodes", "9"},
		{"up", "--base-port", "80"}, {"up", "--base-port", "65500"}, {"up", "--device-size", "huge"}, {"kill"}, {"kill", "a", "b"},
	} {
		if _, errs, code := r.run(args...); code != exitUsage {
			t.Errorf("%v: exit %d: %s", args, code, errs)
		}
	}
	if _, err := os.Stat(r.dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("a refused command made the directory")
	}
	if _, errs, code := r.run("kill", "a"); code != exitFailed || !strings.Contains(errs, "no demo in") {
		t.Errorf("kill without a demo: %d %s", code, errs)
	}
}

// Clean removes what a demo made and nothing else.
func TestDemoCleanIsCareful(t *testing.T) {
	r := newRig(t, "ok")
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(r.dir, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := r.run("clean"); code != exitRefused {
		t.Errorf("a directory without a demo: %d %s", code, errs)
	}
	if _, err := layOut(&demoPlan{dir: r.dir, nodes: 2, basePort: 20000, deviceSize: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := r.run("clean"); code != 0 {
		t.Errorf("%d %s", code, errs)
	}
	if rest, err := os.ReadDir(r.dir); err != nil || len(rest) != 1 {
		t.Errorf("left %v, %v", rest, err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

// A number that now belongs to another process is never signalled.
func TestProcessIsNotAStranger(t *testing.T) {
	state, start := lookUp(os.Getpid())
	if state != processRunning || start == "" {
		t.Fatalf("this process is %s, started %q", state, start)
	}
	stranger := process{PID: os.Getpid(), Start: start + "0"}
	if stranger.state() != processGone {
		t.Error("another start counts as the same process")
	}
	if err := stranger.signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal: %v", err) // had it been sent, nobody would read this
	}
	if killed, err := (process{}).end(t.Context(), time.Second); killed || err != nil {
		t.Errorf("end of nothing: %v %v", killed, err)
	}
}

// A process that ignores SIGTERM is killed when its time is over, also a paused one.
func TestProcessEndKills(t *testing.T) {
	r := newRig(t, "deaf")
	f, err := func() (*demoFile, error) {
		if err := os.MkdirAll(r.dir, 0o700); err != nil {
			return nil, err
		}
		return layOut(&demoPlan{dir: r.dir, nodes: 1, basePort: 20000, deviceSize: 1 << 30})
	}()
	if err != nil {
		t.Fatal(err)
	}
	var reap sync.WaitGroup
	p, err := spawn(r.hooks.exe, []string{"serve", "--config", f.members()[0].config()}, r.hooks.env, filepath.Join(r.dir, "log"), &reap)
	if err != nil {
		t.Fatal(err)
	}
	d := &demo{app: &app{}, dir: r.dir, file: f}
	*f.members()[0].proc = p
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := d.answer(ctx, f.members()[0]); err != nil { // it handles signals from here on
		t.Fatal(err)
	}
	if err := p.signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	killed, err := p.end(t.Context(), 300*time.Millisecond)
	if err != nil || !killed || p.state() != processGone {
		t.Errorf("killed %v, %v, %s", killed, err, p.state())
	}
	reap.Wait()
}

func TestDemoSocketIsShort(t *testing.T) {
	long := "/tmp/" + strings.Repeat("x", 100)
	path, err := demoSocket(long, "a")
	if err != nil || len(path) > socketPathMax {
		t.Errorf("%s, %v", path, err)
	}
	other, err := demoSocket(long+"y", "a")
	if err != nil || other == path {
		t.Errorf("two demos share %s, %v", other, err)
	}
	for _, p := range []string{path, other} {
		if err := os.Remove(filepath.Dir(p)); err != nil {
			t.Error(err)
		}
	}
}
