package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what a reader must know to compare numbers.
type machine struct {
	CPU      string        `json:"cpu"`
	Cores    int           `json:"cores"`
	MemGiB   float64       `json:"memory_gib"`
	Kernel   string        `json:"kernel"`
	FS       string        `json:"file_system"`
	Flush    time.Duration `json:"flush_ns"` // median of a 4 KiB write with fdatasync
	DirectIO bool          `json:"direct_io"`
	Twinsan  string        `json:"twinsan"`
	Peer     string        `json:"peer"`
	Date     time.Time     `json:"date"`
}

func (m *machine) String() string {
	direct := "direct I/O"
	if m.Twinsan != "" && !m.DirectIO {
		direct = "no direct I/O here: reads that miss our cache may hit the page cache"
	}
	s := fmt.Sprintf("Machine: %s, %d cores, %.0f GiB, %s, devices are files on %s (4 KiB write and fdatasync: %d us; %s), %s",
		m.CPU, m.Cores, m.MemGiB, m.Kernel, m.FS, m.Flush.Microseconds(), direct, runtime.Version())
	for _, v := range []string{m.Twinsan, m.Peer} {
		if v != "" {
			s += ", " + v
		}
	}
	return s + ", " + m.Date.Format(time.DateOnly) + "."
}

func describeMachine(dir string) *machine {
	m := &machine{Cores: runtime.NumCPU(), CPU: "unknown CPU", Date: time.Now().UTC().Truncate(time.Second)}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) == nil {
		m.MemGiB = float64(info.Totalram) * float64(info.Unit) / (1 << 30)
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	}
	m.FS = fileSystem(dir)
	m.Flush = flushTime(dir)
	return m
}

// fileSystem is the type of the file system that holds dir: that of the longest
// mount point above it.
func fileSystem(dir string) string {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "an unknown file system"
	}
	best, kind := "", "an unknown file system"
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		rel, err := filepath.Rel(f[1], dir)
		if err == nil && rel != ".." && !strings.HasPrefix(rel, "../") && len(f[1]) >= len(best) {
			best, kind = f[1], f[2]
		}
	}
	return kind
}

// flushTime is the median of a 4 KiB write with fdatasync; 0 when it cannot be told.
func flushTime(dir string) time.Duration {
	f, err := os.CreateTemp(dir, "flush")
	if err != nil {
		return 0
	}
	defer os.Remove(f.Name())
	defer f.Close()
	page := make([]byte, 4096)
	var all []time.Duration
	for i := range 101 {
		start := time.Now()
		if _, err := f.WriteAt(page, int64(i%16)*4096); err != nil {
			return 0
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	return all[len(all)/2]
}
