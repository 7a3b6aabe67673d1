package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/twinsan/twinsan/api"
	"github.com/twinsan/twinsan/server"
)

// The exit codes, part of the interface for scripts.
const (
	exitDone     = 0
	exitFailed   = 1
	exitUsage    = 2
	exitDegraded = 3 // done, and the cluster is degraded
	exitRefused  = 4 // refused for safety
)

// failure is an error with its exit code. A nil err prints nothing.
type failure struct {
	code int
	err  error
}

func (f *failure) Error() string {
	if f.err == nil {
		return ""
	}
	return f.err.Error()
}
func (f *failure) Unwrap() error { return f.err }

func usage(format string, args ...any) error {
	return &failure{exitUsage, fmt.Errorf(format, args...)}
}

func refuse(format string, args ...any) error {
	return &failure{exitRefused, fmt.Errorf(format, args...)}
}

// app is one run of the program: where it reads and writes, and the flags that
// every command has.
type app struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
	terminal func() bool // a person can answer questions

	address  string // --api
	config   string // --config
	certs    string // --certs
	output   string // -o
	bytes    bool   // --bytes
	timeout  time.Duration
	demoHook *demoHooks // replaced by tests
}

func stdinIsTerminal() bool { return term.IsTerminal(int(os.Stdin.Fd())) }

// run executes one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.command()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	code, text := explain(err)
	if text != "" {
		fmt.Fprintln(a.err, "twinsan: "+text)
	}
	return code
}

// explain turns an error into an exit code and a text for people.
func explain(err error) (int, string) {
	var f *failure
	if errors.As(err, &f) {
		if f.err == nil {
			return f.code, ""
		}
		_, text := explain(f.err)
		return f.code, text
	}
	switch {
	case errors.Is(err, server.ErrRefused), errors.Is(err, server.ErrExists):
		return exitRefused, err.Error()
	case errors.Is(err, server.ErrInvalid):
		return exitUsage, err.Error()
	}
	var config *server.ConfigError
	if errors.As(err, &config) {
		return exitUsage, err.Error()
	}
	if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
		switch s.Code() {
		case codes.InvalidArgument:
			return exitUsage, s.Message()
		case codes.FailedPrecondition:
			return exitRefused, s.Message()
		case codes.Unavailable:
			return exitFailed, s.Message() + "\n  see whether the nodes run: systemctl status twinsan; ask another node: --api"
		case codes.DeadlineExceeded:
			return exitFailed, "no answer in time: " + s.Message()
		}
		return exitFailed, s.Message()
	}
	return exitFailed, err.Error()
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "twinsan",
		Short: "A virtual SAN from the disks of two servers",
		Long: `twinsan turns the disks of two or more servers into one highly available SAN.

The first five minutes:
  twinsan demo up              two nodes and a witness on this machine, no root
  twinsan init CLUSTER ...     make a cluster with this machine as its first node
  twinsan join ADDRESS ...     add this machine to a cluster
  twinsan status               what is wrong, what it risks, what to do`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArguments,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "table" && a.output != "json" {
				return usage("-o %s: want table or json", a.output)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage("%w\n  see: %s --help", err, c.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.address, "api", "", "API of a node: unix:///path or host:port (or set TWINSAN_API)")
	f.StringVar(&a.config, "config", "", "file of the node (default "+server.DefaultConfigPath+")")
	f.StringVar(&a.certs, "certs", "", "directory of an administrator's certificate, for host:port (or set TWINSAN_CERTS)")
	f.StringVarP(&a.output, "output", "o", "table", "table or json")
	f.BoolVar(&a.bytes, "bytes", false, "print sizes in bytes")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "how long to wait for an answer")
	root.AddCommand(
		a.statusCommand(), a.eventsCommand(),
		a.initCommand(), a.joinCommand(), a.serveCommand(), a.demoCommand(),
		a.clusterCommand(), a.nodeCommand(), a.poolCommand(), a.deviceCommand(), a.volumeCommand(), a.snapshotCommand(), a.hostCommand(),
		a.connectCommand(), a.operationCommand(), a.upgradeCommand(), a.sessionCommand(), a.scrubCommand(), a.storeCommand(), a.versionCommand(),
	)
	return root
}

// noun makes a command that only holds verbs.
func noun(name, short string, aliases []string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: name, Short: short, Aliases: aliases, Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(verbs...)
	return c
}

func noArguments(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usage("unknown command or argument %q\n  see: %s --help", args[0], c.CommandPath())
}

// arguments wants exactly these, named as in the usage line.
func arguments(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usage("%s is missing\n  usage: %s", strings.Join(names[len(args):], " and "), c.UseLine())
		}
		if len(args) > len(names) {
			return usage("unexpected %q\n  usage: %s", args[len(names)], c.UseLine())
		}
		return nil
	}
}

// call connects to the API and runs f with a deadline.
func (a *app) call(c *cobra.Command, f func(ctx context.Context, client *api.Client) error) error {
	ctx, cancel := context.WithTimeout(c.Context(), a.timeout)
	defer cancel()
	return a.stream(ctx, f)
}

// stream connects to the API and runs f until it ends.
func (a *app) stream(ctx context.Context, f func(ctx context.Context, client *api.Client) error) error {
	client, err := a.dial()
	if err != nil {
		return err
	}
	defer client.Close()
	return f(ctx, client)
}

func (a *app) dial() (*api.Client, error) {
	address, err := a.apiAddress()
	if err != nil {
		return nil, err
	}
	certs := a.certs
	if certs == "" {
		certs = a.getenv("TWINSAN_CERTS")
	}
	if certs == "" {
		certs = filepath.Join(a.getenv("HOME"), ".config", "twinsan")
	}
	return api.Dial(address, certs)
}

// apiAddress is the first of: --api, the socket of the file named by --config,
// TWINSAN_API, the socket of the installed node's file, the default socket.
func (a *app) apiAddress() (string, error) {
	if a.address != "" {
		return a.address, nil
	}
	if a.config == "" {
		if env := a.getenv("TWINSAN_API"); env != "" {
			return env, nil
		}
	}
	c, err := server.LoadConfig(a.configPath())
	switch {
	case err == nil:
		return "unix://" + c.API.Socket, nil
	case a.config == "":
		return "unix://" + server.DefaultSocket, nil
	}
	return "", err
}

func (a *app) configPath() string {
	if a.config != "" {
		return a.config
	}
	return server.DefaultConfigPath
}

// next prints what to type next. It goes to standard error so that pipes see results only.
func (a *app) next(format string, args ...any) {
	if a.output == "table" {
		fmt.Fprintf(a.err, "next: "+format+"\n", args...)
	}
}

// confirmation are the flags of a verb that destroys.
type confirmation struct {
	yes    bool
	dryRun bool
}

func (k *confirmation) flags(c *cobra.Command) {
	c.Flags().BoolVar(&k.yes, "yes", false, "do not ask")
	c.Flags().BoolVar(&k.dryRun, "dry-run", false, "only show what would happen")
}

// confirm shows the effect and asks. Without a terminal to ask it refuses.
func (a *app) confirm(k confirmation, effect string) error { return a.confirmWord(k, effect, "yes") }

// confirmWord is confirm where the answer is a word that is not typed by habit:
// the name of what is touched.
func (a *app) confirmWord(k confirmation, effect, word string) error {
	if k.yes {
		return nil
	}
	if !a.terminal() {
		return refuse("%s\n  nobody is here to confirm: repeat with --yes", effect)
	}
	fmt.Fprintf(a.err, "%s\nType %s to go on: ", effect, word)
	line, err := bufio.NewReader(io.LimitReader(a.in, 80)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if strings.TrimSpace(line) != word {
		return refuse("nothing was changed")
	}
	return nil
}
