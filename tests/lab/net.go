package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Network is a cluster whose members live in network namespaces of their own,
// joined by a bridge: what happens to cables, switches and whole machines can
// happen to them. It is set up by the commands that an administrator types, and
// needs root. A further namespace, the hub, holds the bridge and the initiators.
type Network struct {
	*Cluster
	hub      string
	twoWires bool
	members  map[string]*netMember
	group    sync.WaitGroup // running members
}

type netMember struct {
	name, ns string
	ips      [2]string // by Wire; "" where it has none
	config   string
	witness  bool
	cmd      *exec.Cmd
}

// Wire is one of the networks.
type Wire int

const (
	// Data is the wire of replication and of the initiators.
	Data Wire = iota
	// Management is the wire of raft, where there is one of its own.
	Management
)

func (w Wire) device() string          { return fmt.Sprintf("eth%d", w) }
func (w Wire) bridge() string          { return fmt.Sprintf("br%d", w) }
func (w Wire) address(host int) string { return fmt.Sprintf("10.%d.0.%d", 77+w, host) }

// nowhere has a hardware address that nobody has: what goes there is lost
// without an error, unlike what a blackhole route takes.
func (w Wire) nowhere() string { return w.address(253) }

// NetworkOptions say how large a network is.
type NetworkOptions struct {
	Binary     string
	Dir        string
	DeviceSize string
	Nodes      []string // data nodes; a witness "w" comes on top
	Volumes    []string // "demo:512M"
	// TwoWires: data nodes have a management network besides that of data and of the
	// initiators; the witness has that one alone.
	TwoWires bool
}

// wires are those of a member.
func (n *Network) wires(witness bool) []Wire {
	switch {
	case !n.twoWires:
		return []Wire{Data}
	case witness:
		return []Wire{Management}
	}
	return []Wire{Data, Management}
}

// CanNetwork says why networks cannot be made here, nil if they can.
func CanNetwork(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	ns := fmt.Sprintf("tw%d-try", os.Getpid())
	if _, err := Run(ctx, "ip", "netns", "add", ns); err != nil {
		return err
	}
	_, err := Run(ctx, "ip", "-n", ns, "link", "add", "br0", "type", "bridge")
	_, undo := Run(ctx, "ip", "netns", "del", ns)
	return errors.Join(err, undo)
}

// UpNetwork starts a cluster and waits until all of it is in sync. The caller ends
// it with Close.
func UpNetwork(ctx context.Context, o NetworkOptions) (_ *Network, err error) {
	n := &Network{
		Cluster: &Cluster{Options: Options{Binary: o.Binary, Dir: o.Dir, DeviceSize: o.DeviceSize, Volumes: o.Volumes}},
		hub:     fmt.Sprintf("tw%d-hub", os.Getpid()), members: map[string]*netMember{}, twoWires: o.TwoWires,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	commands := [][]string{{"netns", "add", n.hub}, {"-n", n.hub, "link", "set", "lo", "up"}}
	for _, w := range n.wires(false) {
		commands = append(commands,
			[]string{"-n", n.hub, "link", "add", w.bridge(), "type", "bridge"},
			[]string{"-n", n.hub, "addr", "add", w.address(254) + "/24", "dev", w.bridge()},
			[]string{"-n", n.hub, "link", "set", w.bridge(), "up"})
	}
	for _, args := range commands {
		if _, err := Run(ctx, "ip", args...); err != nil {
			return nil, err
		}
	}
	for i, name := range append(slices.Clone(o.Nodes), "w") {
		if err := n.add(ctx, i, name, name == "w"); err != nil {
			return nil, err
		}
	}
	for _, spec := range o.Volumes {
		name, size, _ := strings.Cut(spec, ":")
		if _, err := n.CreateVolume(ctx, name, size); err != nil {
			return nil, err
		}
	}
	if err := n.WaitHealthy(ctx, time.Minute); err != nil {
		return nil, err
	}
	var info struct {
		Target string `json:"target"`
	}
	if err := n.JSON(ctx, &info, "cluster", "show"); err != nil {
		return nil, err
	}
	n.Target = info.Target
	return n, nil
}

// add makes a member and starts it.
func (n *Network) add(ctx context.Context, i int, name string, witness bool) error {
	m := &netMember{name: name, ns: fmt.Sprintf("tw%d-%s", os.Getpid(), name), witness: witness}
	dir := filepath.Join(n.Dir, name)
	m.config = filepath.Join(dir, "twinsan.toml")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	n.members[name] = m
	commands := [][]string{{"netns", "add", m.ns}, {"-n", m.ns, "link", "set", "lo", "up"}}
	for _, w := range n.wires(witness) {
		m.ips[w] = w.address(i + 1)
		commands = append(commands,
			[]string{"-n", n.hub, "link", "add", m.port(w), "type", "veth", "peer", "name", w.device(), "netns", m.ns},
			[]string{"-n", n.hub, "link", "set", m.port(w), "master", w.bridge(), "up"},
			[]string{"-n", m.ns, "addr", "add", m.ips[w] + "/24", "dev", w.device()},
			[]string{"-n", m.ns, "link", "set", w.device(), "up"},
			[]string{"-n", m.ns, "neigh", "add", w.nowhere(), "lladdr", "02:00:00:00:00:fd", "dev", w.device(), "nud", "permanent"})
	}
	for _, args := range commands {
		if _, err := Run(ctx, "ip", args...); err != nil {
			return err
		}
	}
	socket := filepath.Join(dir, "api.sock")
	args := []string{"--config", m.config, "--name", name, "--data-dir", filepath.Join(dir, "data"), "--socket", socket}
	for _, w := range n.wires(witness) {
		args = append(args, []string{"--sync", "--management"}[w], m.ips[w])
	}
	file := FileNode{Name: name, Portal: m.ips[Data] + ":3260", API: "unix://" + socket, Dir: dir}
	if !witness {
		file.Devices = []string{filepath.Join(dir, "disk")}
		args = append(args, "--devices", file.Devices[0], "--device-size", n.DeviceSize, "--iscsi", m.ips[Data])
	}
	if i == 0 {
		args = append([]string{"init", "lab"}, args...)
	} else {
		role := []string{"cluster", "token", "create", "-o", "json"}
		if witness {
			role = append(role, "--witness")
		}
		var token struct {
			Token string `json:"token"`
		}
		out, err := n.CLI(ctx, role...)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(out, &token); err != nil {
			return err
		}
		wires := n.wires(false)
		args = append([]string{"join", n.members[n.Nodes[0].Name].ips[wires[len(wires)-1]], "--token", token.Token}, args...)
		if witness {
			args = append(args, "--witness")
		}
	}
	if _, err := Run(ctx, "ip", append([]string{"netns", "exec", m.ns, n.Binary}, args...)...); err != nil {
		return err
	}
	if witness {
		n.Witness.API, n.Witness.Dir = file.API, dir
	} else {
		n.Nodes = append(n.Nodes, file)
	}
	return n.Start(ctx, name)
}

// Start starts the process of a member and waits until it answers.
func (n *Network) Start(ctx context.Context, name string) error {
	m := n.members[name]
	dir := filepath.Dir(m.config)
	log, err := os.OpenFile(filepath.Join(dir, "node.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"netns", "exec", m.ns, n.Binary, "serve", "--config", m.config}
	if m.witness {
		args = append(args, "--witness")
	}
	m.cmd = exec.Command("ip", args...)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return err
	}
	cmd := m.cmd
	n.group.Go(func() { _ = cmd.Wait() })
	n.pid(name, cmd.Process.Pid)
	return Until(ctx, 20*time.Second, func() error {
		_, err := Run(ctx, n.Binary, "--api", "unix://"+filepath.Join(dir, "api.sock"), "--timeout", "2s", "cluster", "show")
		return err
	})
}

func (n *Network) pid(name string, pid int) {
	if n.members[name].witness {
		n.Witness.PID = pid
	} else {
		n.Node(name).PID = pid
	}
}

// On runs a command of twinsan on a member's machine, with its file.
func (n *Network) On(ctx context.Context, name string, args ...string) ([]byte, error) {
	m := n.members[name]
	return Run(ctx, "ip", append([]string{"netns", "exec", m.ns, n.Binary, "--config", m.config}, args...)...)
}

// Address is where a member is on a wire, "" if it is not.
func (n *Network) Address(name string, w Wire) string { return n.members[name].ips[w] }

// Signal sends a signal to a member's process.
func (n *Network) Signal(name string, s syscall.Signal) error {
	return n.members[name].cmd.Process.Signal(s)
}

// Kill ends a member's process without a word.
func (n *Network) Kill(ctx context.Context, name string) error {
	m := n.members[name]
	if err := m.cmd.Process.Kill(); err != nil {
		return err
	}
	n.pid(name, 0)
	return Until(ctx, 10*time.Second, func() error {
		if m.cmd.Process.Signal(syscall.Signal(0)) == nil {
			return errors.New("it still runs")
		}
		return nil
	})
}

// port is the end of a member's cable at the switch.
func (m *netMember) port(w Wire) string { return fmt.Sprintf("p%d-%s", w, m.name) }

// Cut stops everything that from sends to another member, silently. The other
// direction stays.
func (n *Network) Cut(ctx context.Context, from, to string) error {
	return n.every(func(w Wire) error { return n.CutWire(ctx, w, from, to) })
}

// Mend undoes Cut.
func (n *Network) Mend(ctx context.Context, from, to string) error {
	return n.every(func(w Wire) error { return n.MendWire(ctx, w, from, to) })
}

func (n *Network) every(do func(Wire) error) error {
	var failed []error
	for _, w := range n.wires(false) {
		failed = append(failed, do(w))
	}
	return errors.Join(failed...)
}

// CutWire is Cut on one wire. It does nothing for a member that is not on it.
func (n *Network) CutWire(ctx context.Context, w Wire, from, to string) error {
	return n.route(ctx, "replace", w, from, to)
}

// MendWire undoes CutWire.
func (n *Network) MendWire(ctx context.Context, w Wire, from, to string) error {
	return n.route(ctx, "del", w, from, to)
}

func (n *Network) route(ctx context.Context, what string, w Wire, from, to string) error {
	f, t := n.members[from], n.members[to]
	if f.ips[w] == "" || t.ips[w] == "" {
		return nil
	}
	_, err := Run(ctx, "ip", "-n", f.ns, "route", what, t.ips[w]+"/32", "via", w.nowhere())
	return err
}

// Vanish pulls all of a member's cables at the switch: nobody is told, initiators
// neither. Return plugs them in again.
func (n *Network) Vanish(ctx context.Context, name string) error { return n.plug(ctx, name, "down") }

// Return undoes Vanish.
func (n *Network) Return(ctx context.Context, name string) error { return n.plug(ctx, name, "up") }

func (n *Network) plug(ctx context.Context, name, state string) error {
	m := n.members[name]
	for _, w := range n.wires(m.witness) {
		// Down takes the bridge out of the way only; the member's own end keeps its
		// routes, so its packets leave and arrive nowhere.
		args := []string{"-n", n.hub, "link", "set", m.port(w), "nomaster"}
		if state == "up" {
			args = []string{"-n", n.hub, "link", "set", m.port(w), "master", w.bridge()}
		}
		if _, err := Run(ctx, "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

// Slow bounds what a member may send on each wire, in bytes a second; 0 lifts the bound.
func (n *Network) Slow(ctx context.Context, name string, rate int) error {
	m := n.members[name]
	for _, w := range n.wires(m.witness) {
		args := []string{"netns", "exec", m.ns, "tc", "qdisc", "replace", "dev", w.device(), "root", "tbf",
			"rate", fmt.Sprintf("%dbit", 8*rate), "burst", fmt.Sprint(max(64<<10, rate/1000)), "latency", "400ms"} // a packet before its segmentation fits in
		if rate == 0 {
			args = []string{"netns", "exec", m.ns, "tc", "qdisc", "del", "dev", w.device(), "root"}
		}
		if _, err := Run(ctx, "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

// Inside writes a program that runs another one where the initiators are, and
// returns its path.
func (n *Network) Inside(program string) (string, error) {
	path := filepath.Join(n.Dir, filepath.Base(program))
	return path, os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\nexec ip netns exec %s %s \"$@\"\n", n.hub, program), 0o700)
}

// Do runs f where the initiators are: sockets that f opens itself, on no goroutine of its
// own, are in that network for as long as they live.
func (n *Network) Do(f func()) error { return n.within(n.hub, f) }

// DoOn is Do on the machine of a member.
func (n *Network) DoOn(name string, f func()) error { return n.within(n.members[name].ns, f) }

func (n *Network) within(ns string, f func()) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	there, err := os.Open(filepath.Join("/run/netns", ns))
	if err == nil {
		err = unix.Setns(int(there.Fd()), unix.CLONE_NEWNET)
		there.Close()
	}
	if err == nil {
		f()
	}
	// The thread is not left to its end: members that it started would get their signal.
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, back) // and nothing else runs on it
	}
	runtime.UnlockOSThread()
	return err
}

// Close kills all members and removes the namespaces. The files stay.
func (n *Network) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var failed []error
	for _, m := range n.members {
		if m.cmd != nil {
			_ = m.cmd.Process.Kill() // it may have ended
		}
	}
	n.group.Wait()
	for _, m := range n.members {
		_, err := Run(ctx, "ip", "netns", "del", m.ns)
		failed = append(failed, err)
	}
	_, err := Run(ctx, "ip", "netns", "del", n.hub)
	return errors.Join(append(failed, err)...)
}
