package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/server"
)

// demoHooks is what a demo does to make and run nodes; tests put others in.
type demoHooks struct {
	exe  string   // this program
	env  []string // added to the environment of nodes
	init func(context.Context, *server.Config, server.InitOptions) (*server.Tokens, error)
	join func(context.Context, *server.Config, server.JoinOptions) error
}

// demo is one demonstration cluster while a command works on it.
type demo struct {
	app   *app
	dir   string
	file  *demoFile
	hooks *demoHooks
	reap  sync.WaitGroup // nodes that this program started
	began []member       // the same, for an "up" that fails
}

const defaultDemoDir = "./twinsan-demo"

func (a *app) demoCommand() *cobra.Command {
	var dir string
	verb := func(use, short string, args cobra.PositionalArgs, run func(ctx context.Context, d *demo, args []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: args, RunE: func(c *cobra.Command, args []string) error {
			d, unlock, err := a.openDemo(dir)
			if err != nil {
				return err
			}
			defer unlock()
			return run(c.Context(), d, args)
		}}
	}
	onNode := func(name, short string, run func(ctx context.Context, d *demo, m member) error) *cobra.Command {
		return verb(name+" NODE", short, arguments("NODE"), func(ctx context.Context, d *demo, args []string) error {
			m, err := d.file.member(args[0])
			if err != nil {
				return err
			}
			err = run(ctx, d, m)
			return errors.Join(err, d.file.save(d.dir))
		})
	}
	up := a.demoUpCommand(&dir)
	down := verb("down", "Stop all nodes; their data stays", arguments(), func(ctx context.Context, d *demo, _ []string) error {
		err := d.down(ctx)
		a.next("twinsan demo up%s   (or: twinsan demo clean%s)", d.flag(), d.flag())
		return err
	})
	clean := &cobra.Command{Use: "clean", Short: "Stop all nodes and remove the demo's directory", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error { return a.demoClean(c.Context(), dir) }}
	show := &cobra.Command{Use: "status", Short: "Show the demo's processes and the cluster's status", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			d, unlock, err := a.openDemo(dir)
			if err != nil {
				return err
			}
			err = d.file.save(d.dir)
			unlock() // asking the nodes may take a while
			if err != nil {
				return err
			}
			return d.show(c.Context())
		}}
	c := noun("demo", "A cluster of two nodes and a witness on this machine, without root", nil,
		up, show,
		onNode("kill", "kill -9 a node", func(ctx context.Context, d *demo, m member) error { return d.kill(ctx, m) }),
		onNode("stop", "Stop a node as a service manager does", func(ctx context.Context, d *demo, m member) error { return d.stop(ctx, m) }),
		onNode("start", "Start a node again", func(ctx context.Context, d *demo, m member) error { return d.start(ctx, m) }),
		onNode("pause", "Freeze a node (SIGSTOP), like a hung machine", func(_ context.Context, d *demo, m member) error {
			return d.signal(m, syscall.SIGSTOP, "resume")
		}),
		onNode("resume", "Let a paused node go on (SIGCONT)", func(_ context.Context, d *demo, m member) error {
			err := d.signal(m, syscall.SIGCONT, "")
			a.next("twinsan demo status%s", d.flag())
			return err
		}),
		down, clean, a.tourCommand(&dir),
	)
	c.Long = `A cluster on this machine: two nodes and a witness, real processes with sparse
files as disks and iSCSI portals on 127.0.0.1. Without a verb it is "demo up".`
	c.PersistentFlags().StringVar(&dir, "dir", defaultDemoDir, "directory of the demo")
	c.Flags().AddFlagSet(up.Flags())
	c.RunE = up.RunE
	return c
}

func (a *app) demoUpCommand(dir *string) *cobra.Command {
	plan := demoPlan{deviceSize: 32 << 30}
	var volumes []string
	c := &cobra.Command{
		Use: "up", Short: "Start the demo; in the foreground until Ctrl-C, or --detach", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			plan.volumes = nil
			for _, text := range volumes {
				name, size, _ := strings.Cut(text, ":")
				bytes, err := server.ParseSize(size)
				if err != nil || !server.ValidName(name) || bytes == 0 {
					return usage("--volume %q: want NAME:SIZE, like demo:4G", text)
				}
				plan.volumes = append(plan.volumes, volumeSpec{name, bytes})
			}
			if plan.nodes < 1 || 8 < plan.nodes {
				return usage("--nodes %d: want 1 to 8", plan.nodes)
			}
			if plan.basePort < 1024 || 65535-demoAPIPorts-10 < plan.basePort {
				return usage("--base-port %d: want 1024 to %d", plan.basePort, 65535-demoAPIPorts-10)
			}
			var err error
			if plan.dir, err = filepath.Abs(*dir); err != nil {
				return err
			}
			return a.demoUp(c.Context(), &plan)
		},
	}
	f := c.Flags()
	f.IntVar(&plan.nodes, "nodes", 2, "data nodes; two get a witness")
	f.IntVar(&plan.basePort, "base-port", 13260, "iSCSI portals are on this port and the ones after it")
	f.Var(&plan.deviceSize, "device-size", "size of each node's sparse disk")
	f.StringArrayVar(&volumes, "volume", []string{"demo:4G"}, "volume to make, NAME:SIZE; may be repeated")
	f.BoolVar(&plan.detach, "detach", false, "return when everything is in sync, and leave the nodes running")
	f.IntVar(&plan.debugBase, "debug-base-port", 0, "serve profiles on this port and the ones after it")
	if err := f.MarkHidden("debug-base-port"); err != nil {
		panic(err)
	}
	return c
}

// openDemo locks and loads an existing demo.
func (a *app) openDemo(dir string) (*demo, func(), error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, demoFileName)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("no demo in %s\n  start one: twinsan demo up", dir)
	}
	unlock, err := lockDemo(dir)
	if err != nil {
		return nil, nil, err
	}
	d, err := a.newDemo(dir)
	if err == nil {
		d.file, err = loadDemo(dir)
	}
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return d, unlock, nil
}

func (a *app) newDemo(dir string) (*demo, error) {
	d := &demo{app: a, dir: dir, hooks: a.demoHook}
	if d.hooks == nil {
		exe, err := os.Executable()
		if err != nil {
			return nil, err
		}
		d.hooks = &demoHooks{exe: exe, init: server.Init, join: server.Join}
	}
	return d, nil
}

// flag is how the demo is named in what to type next.
func (d *demo) flag() string {
	if standard, err := filepath.Abs(defaultDemoDir); err == nil && standard == d.dir {
		return ""
	}
	return " --dir " + d.dir
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.app.err, format+"\n", args...)
}

// watch keeps the file true until ctx ends, then takes the nodes down.
func (d *demo) watch(ctx context.Context) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
		if err := d.reload(func() error {
			if d.file.refresh() {
				return d.file.save(d.dir)
			}
			return nil
		}); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				d.say("The demo was removed.")
				d.reap.Wait()
				return nil
			}
			return err
		}
	}
	d.say("Taking the nodes down.")
	return d.reload(func() error {
		err := d.down(context.WithoutCancel(ctx))
		d.app.next("twinsan demo up%s   (or: twinsan demo clean%s)", d.flag(), d.flag())
		return err
	})
}

// reload reads the file again, which other commands may have changed, and runs
// f under the lock.
func (d *demo) reload(f func() error) error {
	unlock, err := lockDemo(d.dir)
	if err != nil {
		return err
	}
	defer unlock()
	text, err := os.ReadFile(filepath.Join(d.dir, demoFileName))
	if err != nil {
		return err
	}
	fresh, err := loadDemo(d.dir)
	if err != nil {
		return err
	}
	d.file = fresh
	// loadDemo forgets dead processes; write that down when it did.
	if now, err := fileText(fresh); err == nil && now != string(text) {
		if err := fresh.save(d.dir); err != nil {
			return err
		}
	}
	return f()
}

func (d *demo) kill(ctx context.Context, m member) error {
	if m.proc.state() == processGone {
		return fmt.Errorf("node %s is not running\n  start it: twinsan demo start %s%s", m.name, m.name, d.flag())
	}
	if err := killNow(ctx, m); err != nil {
		return err
	}
	d.app.next("twinsan demo status%s; twinsan demo start %s%s", d.flag(), m.name, d.flag())
	return nil
}

// killNow returns when the process is gone.
func killNow(ctx context.Context, m member) error {
	if err := m.proc.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := m.proc.wait(ctx); err != nil {
		return err
	}
	*m.proc = process{}
	return nil
}

// stopMax is how long a node may take to stop by itself.
const stopMax = 60 * time.Second

func (d *demo) stop(ctx context.Context, m member) error {
	killed, err := m.proc.end(ctx, stopMax)
	if err != nil {
		return err
	}
	*m.proc = process{}
	if killed {
		return fmt.Errorf("node %s did not stop within %s and was killed; its log: %s", m.name, stopMax, m.log())
	}
	d.app.next("twinsan demo start %s%s", m.name, d.flag())
	return nil
}

func (d *demo) start(ctx context.Context, m member) error {
	err := d.startNode(ctx, m)
	if err == nil {
		d.app.next("twinsan demo status%s", d.flag())
	}
	return err
}

// startNode returns when the node's API answers.
func (d *demo) startNode(ctx context.Context, m member) error {
	switch m.proc.state() {
	case processRunning:
		return nil
	case processPaused:
		return fmt.Errorf("node %s is paused\n  let it go on: twinsan demo resume %s%s", m.name, m.name, d.flag())
	}
	config, err := server.LoadConfig(m.config())
	if err != nil {
		return err
	}
	if err := d.launch(m, config); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := d.answer(ctx, m); err != nil {
		d.reapIfDown()
		return err
	}
	return nil
}

func (d *demo) signal(m member, sig os.Signal, undo string) error {
	if err := m.proc.signal(sig); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("node %s is not running\n  start it: twinsan demo start %s%s", m.name, m.name, d.flag())
		}
		return err
	}
	if undo != "" {
		d.app.next("twinsan demo status%s; twinsan demo %s %s%s", d.flag(), undo, m.name, d.flag())
	}
	return nil
}

// down stops all nodes at the same time.
func (d *demo) down(ctx context.Context) error {
	var wg sync.WaitGroup
	members := d.file.members()
	failed := make([]error, len(members))
	for i, m := range members {
		wg.Go(func() {
			killed, err := m.proc.end(ctx, stopMax)
			if killed && err == nil {
				err = fmt.Errorf("node %s did not stop within %s and was killed; its log: %s", m.name, stopMax, m.log())
			}
			failed[i] = err
		})
	}
	wg.Wait()
	d.file.refresh()
	return errors.Join(append(failed, d.file.save(d.dir))...)
}

func (a *app) demoClean(ctx context.Context, dir string) error {
	d, unlock, err := a.openDemo(dir)
	if err != nil {
		abs, absErr := filepath.Abs(dir)
		if _, statErr := os.Stat(dir); absErr == nil && errors.Is(statErr, fs.ErrNotExist) {
			return nil
		}
		return refuse("%s holds no demo, so it is not removed: %v", abs, err)
	}
	defer unlock()
	for _, m := range d.file.members() {
		if m.proc.state() != processGone {
			if err := killNow(ctx, m); err != nil {
				return err
			}
		}
	}
	// Only what a demo makes is removed, should D hold anything else.
	var failed []error
	for _, m := range d.file.members() {
		failed = append(failed, os.RemoveAll(m.dir))
		if socket := strings.TrimPrefix(m.api, "unix://"); !strings.HasPrefix(socket, d.dir) {
			failed = append(failed, os.RemoveAll(filepath.Dir(socket)))
		}
	}
	failed = append(failed, os.RemoveAll(filepath.Join(d.dir, tourDir)),
		os.Remove(filepath.Join(d.dir, demoFileName)), os.Remove(filepath.Join(d.dir, ".lock")))
	if err := errors.Join(failed...); err != nil {
		return err
	}
	if rest, err := os.ReadDir(d.dir); err == nil && len(rest) == 0 {
		return os.Remove(d.dir)
	}
	d.say("%s stays: it holds files that are not the demo's", d.dir)
	return nil
}

// logTail is the end of a node's log, for a message.
func logTail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > 2048 {
		if _, err := f.Seek(-2048, io.SeekEnd); err != nil {
			return ""
		}
	}
	text, err := io.ReadAll(io.LimitReader(f, 2048))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	var b strings.Builder
	for _, l := range lines[max(0, len(lines)-5):] {
		b.WriteString("    " + l + "\n")
	}
	return b.String()
}

// running are the members whose processes run.
func (d *demo) running() []member {
	return slices.DeleteFunc(d.file.members(), func(m member) bool { return m.proc.state() != processRunning })
}
