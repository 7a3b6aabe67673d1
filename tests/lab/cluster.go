package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Options describe a demonstration cluster. Zero values are the demo's defaults.
type Options struct {
	Binary     string   // path of twinsan; required
	Dir        string   // required; made when missing
	BasePort   int      // 0: free ports are looked for
	DataNodes  int      // 0: two, with a witness
	DeviceSize string   // "32G"
	Volumes    []string // "demo:4G"
	DebugPort  int      // first port of profiles; 0: none
}

// Cluster is a running demonstration cluster.
type Cluster struct {
	Options
	File
}

// File is demo.json, as far as tests read it.
type File struct {
	Target  string       `json:"target"`
	Volumes []FileVolume `json:"volumes"`
	Nodes   []FileNode   `json:"nodes"`
	Witness struct {
		PID int    `json:"pid"`
		API string `json:"api"`
		Dir string `json:"dir"`
	} `json:"witness"`
}

// FileVolume is a volume that the demo was started with.
type FileVolume struct {
	Name  string `json:"name"`
	LUN   int    `json:"lun"`
	Bytes int64  `json:"bytes"`
}

// FileNode is a data node of the demo. PID is 0 while it does not run.
type FileNode struct {
	Name    string   `json:"name"`
	PID     int      `json:"pid"`
	Portal  string   `json:"portal"`
	API     string   `json:"api"`
	Metrics string   `json:"metrics"`
	Dir     string   `json:"dir"`
	Devices []string `json:"devices"`
}

// ExitError is a command that ended with another code than 0.
type ExitError struct {
	Command string
	Code    int
	Stdout  string
	Stderr  string
}

// Error shows the command and what it said.
func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: exit code %d\n%s%s", e.Command, e.Code, e.Stderr, e.Stdout)
}

// Run runs a command and returns its standard output. A code other than 0 is an
// *ExitError. The command is killed when ctx ends.
func Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	return run(exec.CommandContext(ctx, name, args...))
}

func run(c *exec.Cmd) ([]byte, error) {
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	// A child of the command that outlives it must not hold us up by its copy of the pipe.
	c.WaitDelay = 5 * time.Second
	err := c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out.Bytes(), &ExitError{strings.Join(c.Args, " "), exit.ExitCode(), out.String(), errs.String()}
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err != nil {
		return out.Bytes(), fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, &errs)
	}
	return out.Bytes(), nil
}

// Tool finds a program in the path and where administrators' programs are.
func Tool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	path, err := exec.LookPath("/usr/sbin/" + name)
	if err != nil {
		return "", fmt.Errorf("%s is not installed\n  install what tests need: tests/install.sh e2e", name)
	}
	return path, nil
}

// Up starts a cluster and returns when every volume is served by both nodes with
// all replicas in sync. The caller ends it with Clean.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	if o.BasePort == 0 {
		base, err := freePorts()
		if err != nil {
			return nil, err
		}
		o.BasePort = base
	}
	c := &Cluster{Options: o}
	args := []string{"up", "--detach", "--base-port", strconv.Itoa(o.BasePort)}
	if o.DataNodes != 0 {
		args = append(args, "--nodes", strconv.Itoa(o.DataNodes))
	}
	if o.DeviceSize != "" {
		args = append(args, "--device-size", o.DeviceSize)
	}
	for _, v := range o.Volumes {
		args = append(args, "--volume", v)
	}
	if o.DebugPort != 0 {
		args = append(args, "--debug-base-port", strconv.Itoa(o.DebugPort))
	}
	if _, err := c.Demo(ctx, args...); err != nil {
		return nil, errors.Join(err, c.Clean())
	}
	return c, nil
}

// portSpan is how many ports from its base a demo uses.
const portSpan = 320

// freePorts looks for a base port all of whose ports are free. It begins at a place
// of this process, so that test runs side by side do not look at the same ones.
func freePorts() (int, error) {
	const first, last = 15000, 32000
	const places = (last - first) / portSpan
	for i := range places {
		base := first + (os.Getpid()+i)%places*portSpan
		free := true
		for _, offset := range []int{0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203, 300, 301, 302, 303} {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+offset))
			if err != nil {
				free = false
				break
			}
			l.Close()
		}
		if free {
			return base, nil
		}
	}
	return 0, fmt.Errorf("no free ports from %d to %d", first, last)
}

// Demo runs "twinsan demo ARGS" on this cluster and reads demo.json again.
func (c *Cluster) Demo(ctx context.Context, args ...string) ([]byte, error) {
	out, err := Run(ctx, c.Binary, append(append([]string{"demo"}, args...), "--dir", c.Dir)...)
	if readErr := c.reload(); readErr != nil && err == nil && !errors.Is(readErr, fs.ErrNotExist) {
		err = readErr
	}
	return out, err
}

func (c *Cluster) reload() error {
	text, err := os.ReadFile(filepath.Join(c.Dir, "demo.json"))
	if err != nil {
		return err
	}
	var f File
	if err := json.Unmarshal(text, &f); err != nil {
		return fmt.Errorf("demo.json: %w", err)
	}
	c.File = f
	return nil
}

// Reload reads demo.json again.
func (c *Cluster) Reload() error { return c.reload() }

// CLI runs an administrator's command against the first node that runs.
func (c *Cluster) CLI(ctx context.Context, args ...string) ([]byte, error) {
	api := c.Nodes[0].API
	for _, n := range c.Nodes {
		if n.PID != 0 {
			api = n.API
			break
		}
	}
	return Run(ctx, c.Binary, append([]string{"--api", api}, args...)...)
}

// JSON runs an administrator's command with -o json into v.
func (c *Cluster) JSON(ctx context.Context, v any, args ...string) error {
	out, err := c.CLI(ctx, append(args, "-o", "json")...)
	if err != nil {
		// A degraded cluster answers, and says so by its code.
		var exit *ExitError
		if !errors.As(err, &exit) || exit.Code != ExitDegraded {
			return err
		}
	}
	if err := json.Unmarshal(out, v); err != nil {
		return fmt.Errorf("twinsan %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// The exit codes of the command line.
const (
	ExitFailed   = 1
	ExitUsage    = 2
	ExitDegraded = 3
	ExitRefused  = 4
)

// Node returns the node of that name.
func (c *Cluster) Node(name string) *FileNode {
	i := slices.IndexFunc(c.Nodes, func(n FileNode) bool { return n.Name == name })
	return &c.Nodes[i]
}

// URL is where a volume is reached through a node.
func (c *Cluster) URL(node string, lun int) string {
	return fmt.Sprintf("iscsi://%s/%s/%d", c.Node(node).Portal, c.Target, lun)
}

// Repeat is the command line that makes a cluster like this one.
func (c *Cluster) Repeat() string {
	b := fmt.Sprintf("twinsan demo up --detach --base-port %d", c.BasePort)
	if c.DataNodes != 0 {
		b += fmt.Sprintf(" --nodes %d", c.DataNodes)
	}
	if c.DeviceSize != "" {
		b += " --device-size " + c.DeviceSize
	}
	for _, v := range c.Options.Volumes {
		b += " --volume " + v
	}
	return b
}

// Clean kills all processes of the cluster and removes its files.
func (c *Cluster) Clean() error {
	if _, err := os.Stat(filepath.Join(c.Dir, "demo.json")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := Run(ctx, c.Binary, "demo", "clean", "--dir", c.Dir)
	return err
}

// Logs is the end of every node's log.
func (c *Cluster) Logs(lines int) string {
	var b strings.Builder
	dirs := []string{c.Witness.Dir}
	for _, n := range c.Nodes {
		dirs = append(dirs, n.Dir)
	}
	slices.Sort(dirs)
	for _, dir := range dirs {
		text, err := os.ReadFile(filepath.Join(dir, "node.log"))
		if dir == "" || err != nil {
			continue
		}
		all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
		fmt.Fprintf(&b, "--- %s/node.log, last %d of %d lines\n%s\n", dir, min(lines, len(all)), len(all), strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
	return b.String()
}

// Panics returns lines of the nodes' logs that no test should ever cause.
func (c *Cluster) Panics() []string {
	var found []string
	for _, n := range c.Nodes {
		found = append(found, grepLog(filepath.Join(n.Dir, "node.log"))...)
	}
	return append(found, grepLog(filepath.Join(c.Witness.Dir, "node.log"))...)
}

func grepLog(path string) []string {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		for _, bad := range []string{"panic:", "fatal error:", "goroutine stack exceeds", "WARNING: DATA RACE", "runtime error:"} {
			if strings.Contains(line, bad) {
				found = append(found, path+": "+strings.TrimSpace(line))
			}
		}
	}
	return found
}
