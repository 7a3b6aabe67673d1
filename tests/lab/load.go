package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Result is what iscsiload prints; see tests/bench/iscsiload/README.md.
type Result struct {
	Label   string  `json:"label"`
	Seed    uint64  `json:"seed"`
	Elapsed float64 `json:"elapsed_s"`
	IOs     int64   `json:"ios"`
	IOPS    float64 `json:"iops"`
	MiBs    float64 `json:"mib_s"`
	Read    *OpStat `json:"read"`
	Write   *OpStat `json:"write"`
	CPU     struct {
		GeneratorUS float64 `json:"generator_us_per_io"`
		TargetUS    float64 `json:"target_us_per_io"`
		TargetS     float64 `json:"target_s"`
	} `json:"cpu"`
	Errors struct {
		SCSI  int64  `json:"scsi"`
		Short int64  `json:"short_read"`
		Last  string `json:"last"`
	} `json:"errors"`
	Failover struct {
		Losses   int64   `json:"path_losses"`
		Retried  int64   `json:"retried_ios"`
		MaxGapMS float64 `json:"max_gap_ms"`
		PerPath  []int64 `json:"ios_per_path"`
	} `json:"failover"`
	Verify *Verdict `json:"verify"`

	Raw json.RawMessage `json:"-"` // the whole object
}

// OpStat is the latency of one kind of command.
type OpStat struct {
	IOPS    float64 `json:"iops"`
	MiBs    float64 `json:"mib_s"`
	Latency struct {
		Mean float64 `json:"mean"`
		P50  float64 `json:"p50"`
		P99  float64 `json:"p99"`
		P999 float64 `json:"p99_9"`
		Max  float64 `json:"max"`
	} `json:"lat_us"`
}

// Verdict is what verification found.
type Verdict struct {
	Checked   int64 `json:"checked"`
	OK        int64 `json:"ok"`
	Lost      int64 `json:"lost"`
	Stale     int64 `json:"stale"`
	Corrupt   int64 `json:"corrupt"`
	Unflushed int64 `json:"unflushed"`
}

// Clean says that nothing was lost, stale or corrupt, and that something was looked at.
func (v *Verdict) Clean() bool {
	return v != nil && v.Checked > 0 && v.Lost+v.Stale+v.Corrupt == 0
}

// Flushed says the same of a target with a volatile cache: nothing was lost or stale
// that had been flushed or written with FUA.
func (v *Verdict) Flushed() bool {
	return v != nil && v.Checked > 0 && v.Lost+v.Stale == v.Unflushed && v.Corrupt == 0
}

// Load is a running load generator.
type Load struct {
	cmd     *exec.Cmd
	out     bytes.Buffer
	errs    bytes.Buffer
	cancel  context.CancelFunc
	ended   chan struct{}
	err     error
	Command string // to repeat it
}

// Iscsiload is the path of the load generator of this tree, built when it is
// missing or older than its source.
func Iscsiload(ctx context.Context, root string) (string, error) {
	source, target := filepath.Join(root, "tests/bench/iscsiload/iscsiload.c"), filepath.Join(root, "bin/iscsiload")
	s, err := os.Stat(source)
	if err != nil {
		return "", err
	}
	if b, err := os.Stat(target); err == nil && b.ModTime().After(s.ModTime()) {
		return target, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return "", err
	}
	if _, err := Run(ctx, "make", "-C", filepath.Dir(source), "--no-print-directory"); err != nil {
		return "", fmt.Errorf("build the load generator: %w\n  install what it needs: tests/install.sh e2e", err)
	}
	return target, os.Rename(filepath.Join(filepath.Dir(source), "iscsiload"), target)
}

// Start starts the load generator; ctx kills it.
func Start(ctx context.Context, iscsiload string, args ...string) (*Load, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &Load{cmd: exec.CommandContext(ctx, iscsiload, args...), cancel: cancel, ended: make(chan struct{}),
		Command: "bin/iscsiload " + strings.Join(args, " ")}
	l.cmd.Stdout, l.cmd.Stderr = &l.out, &l.errs
	// A generator that outlived a killed test would write to the next cluster on its port.
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := l.cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	go func() {
		defer close(l.ended)
		l.err = l.cmd.Wait()
	}()
	return l, nil
}

// Ended is closed when the generator is gone.
func (l *Load) Ended() <-chan struct{} { return l.ended }

// Stop lets the generator finish what is under way, verify and report.
func (l *Load) Stop() error {
	err := l.cmd.Process.Signal(syscall.SIGINT)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Kill ends the generator at once and waits for it.
func (l *Load) Kill() {
	l.cancel()
	<-l.ended
}

// Wait waits for the end and returns the result. A generator that says that I/O
// failed or data is wrong gives its result together with the error.
func (l *Load) Wait() (*Result, error) {
	<-l.ended
	l.cancel()
	r := &Result{Raw: bytes.Clone(l.out.Bytes())}
	if err := json.Unmarshal(r.Raw, r); err != nil {
		return nil, fmt.Errorf("%s: %v: %w\n%s%s", l.Command, l.err, err, &l.errs, &l.out)
	}
	if l.err != nil {
		return r, fmt.Errorf("%s: %w\n%s%s", l.Command, l.err, &l.errs, &l.out)
	}
	return r, nil
}

// RunLoad runs the generator to its end.
func RunLoad(ctx context.Context, iscsiload string, args ...string) (*Result, error) {
	l, err := Start(ctx, iscsiload, args...)
	if err != nil {
		return nil, err
	}
	return l.Wait()
}

// Seconds writes a duration as the generator takes it: whole seconds, at least one.
func Seconds(d time.Duration) string { return fmt.Sprint(max(1, int((d+time.Second-1)/time.Second))) }

// Said is what the process has written, and its exit code; -1 if it was killed.
// Only after Ended is closed.
func (l *Load) Said() (string, int) {
	return l.errs.String() + l.out.String(), l.cmd.ProcessState.ExitCode()
}
