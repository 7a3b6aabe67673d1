package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process names a process so that it is never mistaken for a later one with the
// same number: Start is the boot's id and the clock tick at which it started.
type process struct {
	PID   int    `json:"pid"` // 0: not running
	Start string `json:"start,omitempty"`
}

// processState is what the kernel says of a process.
type processState string

const (
	processGone    processState = "stopped"
	processRunning processState = "running"
	processPaused  processState = "paused"
)

// bootID distinguishes processes with equal numbers and ticks of two boots.
var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "boot"
	}
	return strings.TrimSpace(string(b))
})

// lookUp reads state and start of whatever process has the number now.
func lookUp(pid int) (processState, string) {
	if pid <= 0 {
		return processGone, ""
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return processGone, ""
	}
	// The name stands in parentheses and may contain anything.
	_, rest, ok := strings.Cut(string(stat[max(0, strings.LastIndexByte(string(stat), ')')):]), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return processGone, ""
	}
	start := bootID() + ":" + fields[19]
	switch fields[0] {
	case "Z", "X", "x":
		return processGone, ""
	case "T":
		return processPaused, start
	}
	return processRunning, start
}

// state says how the process does; a stranger with its number does not count.
func (p process) state() processState {
	s, start := lookUp(p.PID)
	if start != p.Start {
		return processGone
	}
	return s
}

// signal sends a signal to the process and to no other: the handle is taken
// before its start is compared.
func (p process) signal(sig os.Signal) error {
	h, err := os.FindProcess(p.PID)
	if err != nil {
		return err
	}
	defer h.Release()
	if p.state() == processGone {
		return os.ErrProcessDone
	}
	return h.Signal(sig)
}

// wait returns when the process is gone.
func (p process) wait(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for p.state() != processGone {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("process %d does not end: %w", p.PID, ctx.Err())
		}
	}
	return nil
}

// end stops the process: SIGTERM, and SIGKILL when it takes longer than grace.
// It says whether it had to kill.
func (p process) end(ctx context.Context, grace time.Duration) (killed bool, err error) {
	if err := p.signal(syscall.SIGTERM); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return false, nil
		}
		return false, err
	}
	if err := p.signal(syscall.SIGCONT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return false, err
	}
	patient, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if p.wait(patient) == nil {
		return false, nil
	}
	if err := p.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return true, err
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return true, p.wait(last)
}

// spawn starts a command in a session of its own, with its output appended to a
// file. It lives on when this program ends; while this program lives, reap
// collects it.
func spawn(exe string, args, env []string, log string, reap *sync.WaitGroup) (process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return process{}, err
	}
	defer f.Close()
	c := exec.Command(exe, args...)
	c.Stdout, c.Stderr = f, f
	c.Env = append(os.Environ(), env...)
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return process{}, err
	}
	_, start := lookUp(c.Process.Pid)
	p := process{PID: c.Process.Pid, Start: start}
	reap.Go(func() { _ = c.Wait() }) // its end is seen through state
	return p, nil
}
