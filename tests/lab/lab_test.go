package lab

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRunReportsCodeAndOutput(t *testing.T) {
	_, err := Run(t.Context(), "sh", "-c", "echo out; echo said >&2; exit 3")
	var exit *ExitError
	if !errors.As(err, &exit) {
		t.Fatal(err)
	}
	want := ExitError{Command: "sh -c echo out; echo said >&2; exit 3", Code: ExitDegraded, Stdout: "out\n", Stderr: "said\n"}
	if *exit != want {
		t.Errorf("%+v, want %+v", *exit, want)
	}
	if _, err := Run(t.Context(), filepath.Join(t.TempDir(), "nothing")); err == nil {
		t.Error("a program that does not exist ran")
	}
}

// A generator says that data is wrong by its exit code and what is wrong by its
// output: both must get through.
func TestLoadGivesResultWithItsError(t *testing.T) {
	script := filepath.Join(t.TempDir(), "load")
	const result = `{"iops":12.5,"write":{"lat_us":{"p99":7}},"failover":{"max_gap_ms":1500.5},"verify":{"checked":9,"ok":8,"lost":1}}`
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho '"+result+"'\nexit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	r, err := RunLoad(t.Context(), script, "--x")
	if err == nil || !strings.Contains(err.Error(), "--x") {
		t.Errorf("the error does not show the command: %v", err)
	}
	if r == nil || r.IOPS != 12.5 || r.Write.Latency.P99 != 7 || r.Failover.MaxGapMS != 1500.5 || r.Verify.Lost != 1 || r.Verify.Clean() {
		t.Errorf("%+v", r)
	}
	if !json.Valid(r.Raw) {
		t.Errorf("raw: %s", r.Raw)
	}
}

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		v    *Verdict
		want bool
	}{
		{&Verdict{Checked: 1, OK: 1}, true}, {&Verdict{}, false}, {nil, false},
		{&Verdict{Checked: 2, OK: 1, Stale: 1}, false}, {&Verdict{Checked: 2, OK: 1, Corrupt: 1}, false},
	} {
		if got := c.v.Clean(); got != c.want {
			t.Errorf("%+v: clean %t, want %t", c.v, got, c.want)
		}
	}
}

func TestKillEndsTheGenerator(t *testing.T) {
	l, err := Start(t.Context(), "sleep", "600")
	if err != nil {
		t.Fatal(err)
	}
	l.Kill()
	if _, code := l.Said(); code != -1 {
		t.Errorf("exit code %d, want -1: killed", code)
	}
}

func TestUntilKeepsTheLastError(t *testing.T) {
	last := errors.New("not yet")
	if err := Until(context.Background(), time.Millisecond, func() error { return last }); !errors.Is(err, last) {
		t.Errorf("%v, want %v", err, last)
	}
	n := 0
	if err := Until(context.Background(), time.Minute, func() error {
		if n++; n < 3 {
			return last
		}
		return nil
	}); err != nil || n != 3 {
		t.Errorf("%v after %d attempts", err, n)
	}
}

func TestPanicsAreFoundInLogs(t *testing.T) {
	dir := t.TempDir()
	c := &Cluster{File: File{Nodes: []FileNode{{Name: "a", Dir: dir}}}}
	log := filepath.Join(dir, "node.log")
	for text, want := range map[string]int{"level=INFO msg=fine\n": 0, "x\npanic: REFS: count below zero\n\ngoroutine 1\n": 1, "WARNING: DATA RACE\n": 1} {
		if err := os.WriteFile(log, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := c.Panics(); len(got) != want {
			t.Errorf("%q: found %q", text, got)
		}
	}
}
