// Command bench measures twinsan and prints a table: two nodes and a witness on
// this machine, one mirrored volume, and tgt without a mirror beside it in the
// same run. Peers take turns within each row, so a ratio compares two
// measurements that are seconds apart.
//
//	go run ./tests/bench                    all rows (make bench)
//	go run ./tests/bench -rows write        rows whose name contains "write"
//	go run ./tests/bench -rows costs        what COMPARE AND WRITE, digests, reservations cost
//	go run ./tests/bench -rows mirror       two nodes beside one
//	go run ./tests/bench -rows large        1 MiB commands by depth, data, nodes and reduction
//	go run ./tests/bench -rows ha           what resyncs move, and how fast
//	go run ./tests/bench -rows ha-links     the same over links of 1 and 2.5 Gbit/s (root)
//	go run ./tests/bench -rows policy       the write policies beside each other
//	go run ./tests/bench -profile           CPU profiles of the owner for each row
//
// The raw numbers of every measurement are saved next to the table.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

type bench struct {
	root    string
	binary  string
	dir     string
	out     string
	rows    string
	runtime time.Duration
	rounds  int
	sizeMiB int64
	noPeer  bool
	noOurs  bool
	profile bool

	iscsiload string
	cluster   *lab.Cluster
	volume    *lab.Volume
	peer      *lab.Peer
	noPeerWhy string
	results   []cellResult
}

func main() {
	b := &bench{}
	flag.StringVar(&b.root, "root", ".", "root of the source tree")
	flag.StringVar(&b.binary, "binary", "bin/twinsan", "twinsan to measure: a release build")
	flag.StringVar(&b.dir, "dir", "bin/bench", "directory of all devices, on the disk to measure")
	flag.StringVar(&b.out, "out", "", "name of the results, .md and .json are added (default DIR/results-DATE)")
	flag.StringVar(&b.rows, "rows", "", "only rows whose name contains this")
	flag.DurationVar(&b.runtime, "runtime", 8*time.Second, "length of one measurement")
	flag.IntVar(&b.rounds, "rounds", 3, "measurements of each cell; the median counts")
	flag.Int64Var(&b.sizeMiB, "size-mib", 2048, "range of uncached access, filled before")
	flag.BoolVar(&b.noPeer, "no-peer", false, "leave tgt out")
	flag.BoolVar(&b.noOurs, "peer-only", false, "leave twinsan out")
	flag.BoolVar(&b.profile, "profile", false, "save a CPU profile of the owner in the first round of each row")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context) (err error) {
	if flag.NArg() > 0 || b.rounds < 1 || b.runtime < time.Second || b.sizeMiB < 512 {
		return errors.New("usage: bench [flags]; rounds >= 1, runtime >= 1s, size-mib >= 512")
	}
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	if b.iscsiload, err = lab.Iscsiload(ctx, b.root); err != nil {
		return err
	}
	if b.out == "" {
		b.out = filepath.Join(b.dir, "results-"+time.Now().Format("2006-01-02-150405"))
	}
	m := describeMachine(b.dir)
	defer func() { err = errors.Join(err, b.tearDown()) }()
	if b.rows != linkRows { // these have a cluster of their own
		if err := b.setUp(ctx, m); err != nil {
			return err
		}
	}
	for _, r := range rows(b.sizeMiB << 20) {
		if !strings.Contains(r.name(), b.rows) {
			continue
		}
		if err := b.measure(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", r.name(), err)
		}
	}
	text := ""
	if len(b.results) > 0 {
		text = b.report(m)
	}
	if b.rows == "" || strings.Contains("costs", b.rows) {
		table, err := b.costTable(ctx)
		if err != nil {
			return err
		}
		text += table
	}
	if !b.noOurs && (b.rows == "" || strings.Contains("mirror", b.rows)) {
		table, err := b.mirrorTable(ctx)
		if err != nil {
			return err
		}
		text += table
	}
	if !b.noOurs && (b.rows == "" || strings.Contains("large", b.rows)) {
		table, err := b.largeTable(ctx)
		if err != nil {
			return err
		}
		text += table
	}
	if !b.noOurs && (b.rows == "" || strings.Contains("ha", b.rows)) {
		table, err := b.haTable(ctx)
		if err != nil {
			return err
		}
		text += table
	}
	if !b.noOurs && (b.rows == "" || strings.Contains(linkRows, b.rows)) {
		table, err := b.linkTable(ctx)
		if err != nil {
			return err
		}
		text += table
	}
	if !b.noOurs && (b.rows == "" || strings.Contains("policy", b.rows)) {
		table, err := b.policyTable(ctx)
		if err != nil {
			return err
		}
		text += table
	}
	if text == "" {
		return fmt.Errorf("no row contains %q", b.rows)
	}
	fmt.Print(text)
	return errors.Join(os.WriteFile(b.out+".md", []byte(text), 0o644), b.saveRaw(m))
}

func (b *bench) saveRaw(m *machine) error {
	text, err := json.MarshalIndent(struct {
		Machine *machine     `json:"machine"`
		Cells   []cellResult `json:"cells"`
	}{m, b.results}, "", " ")
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "saved %s.md and %s.json\n", b.out, b.out)
	return os.WriteFile(b.out+".json", append(text, '\n'), 0o644)
}

const volumeName = "bench"

// Ports below those that clusters look for.
const (
	peerPort    = 14260
	profilePort = 14900
)

func (b *bench) setUp(ctx context.Context, m *machine) error {
	if !b.noOurs {
		b.say("starting two nodes and a witness")
		o := lab.Options{
			Binary: b.binary, Dir: filepath.Join(b.dir, "demo"), DeviceSize: fmt.Sprintf("%dM", max(8*b.sizeMiB, 8192)),
			Volumes: []string{fmt.Sprintf("%s:%dM", volumeName, 2*b.sizeMiB)},
		}
		if b.profile {
			o.DebugPort = profilePort
		}
		c, err := lab.Up(ctx, o)
		if err != nil {
			return err
		}
		b.cluster = c
		if b.volume, err = c.Volume(ctx, volumeName); err != nil {
			return err
		}
		if m.DirectIO, err = directIO(ctx, c); err != nil {
			return err
		}
		if out, err := lab.Run(ctx, b.binary, "version"); err == nil {
			m.Twinsan = strings.TrimSpace(string(out))
		}
	}
	if !b.noPeer {
		b.say("starting tgt")
		p, err := lab.StartPeer(ctx, filepath.Join(b.dir, "peer"), peerPort, b.sizeMiB<<21)
		switch {
		case errors.Is(err, lab.ErrNoPeer):
			b.noPeerWhy = err.Error()
			b.say("SKIPPED: %v: the table has no peer", err)
		case err != nil:
			return err
		default:
			b.peer, m.Peer = p, p.Version
		}
	}
	for _, t := range b.targets() {
		if !t.fills {
			continue
		}
		b.say("filling %d MiB through %s", b.sizeMiB, t.label)
		if _, err := lab.RunLoad(ctx, b.iscsiload, "--rw", "write", "--once", "--bs", "1m", "--iodepth", "8",
			"--size", fmt.Sprint(b.sizeMiB<<20), t.url); err != nil {
			return err
		}
	}
	return nil
}

func directIO(ctx context.Context, c *lab.Cluster) (bool, error) {
	var page struct {
		Devices []struct {
			Direct bool `json:"direct_io"`
		} `json:"devices"`
	}
	if err := c.JSON(ctx, &page, "device", "list"); err != nil {
		return false, err
	}
	for _, d := range page.Devices {
		if !d.Direct {
			return false, nil
		}
	}
	return len(page.Devices) > 0, nil
}

func (b *bench) tearDown() error {
	var failed []error
	if b.cluster != nil {
		failed = append(failed, b.cluster.Clean())
	}
	if b.peer != nil {
		failed = append(failed, b.peer.Close())
	}
	return errors.Join(failed...)
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

// target is one thing that is measured: a way to a LU and how it is asked.
type target struct {
	label string
	url   string
	pids  string
	extra []string // flags of the load generator
	only  string   // "write" or "read"; "" both
	when  string   // only rows with this access: "cached", "uncached"; "" all
	far   bool     // through the node that does not own
	fills bool     // fill the LU through it before measuring
}

func (b *bench) targets() []target {
	var all []target
	if b.cluster != nil {
		pids := fmt.Sprintf("%d,%d", b.cluster.Nodes[0].PID, b.cluster.Nodes[1].PID)
		all = append(all,
			target{label: "twinsan", url: b.cluster.URL(b.volume.Owner, b.volume.LUN), pids: pids, fills: true},
			target{label: "twinsan, other node", url: b.cluster.URL(b.volume.Other(), b.volume.LUN), pids: pids, far: true})
	}
	if b.peer != nil {
		pid := fmt.Sprint(b.peer.PID)
		all = append(all,
			target{label: "tgt --fua", url: b.peer.URL, pids: pid, extra: []string{"--fua"}, only: "write", fills: true},
			target{label: "tgt, volatile cache", url: b.peer.URL, pids: pid, only: "write"},
			target{label: "tgt, page cache", url: b.peer.URL, pids: pid, only: "read", when: "cached"},
			target{label: "tgt, direct", url: b.peer.DirectURL, pids: pid, only: "read", when: "uncached"})
	}
	return all
}

// row is one kind of access.
type row struct {
	write    bool
	random   bool
	access   string // "cached", "uncached" or ""
	bs       string
	size     int64 // range
	depth    int
	sessions int
	far      bool // measured through the other node as well
}

func (r row) name() string {
	kind := map[bool]string{true: "write", false: "read"}[r.write]
	if r.random {
		kind = "random " + kind
	} else {
		kind = "sequential " + kind
	}
	words := []string{strings.ToUpper(r.bs[:1]) + strings.ToUpper(r.bs[1:]), kind}
	if r.access != "" {
		words = append(words, r.access)
	}
	return strings.Join(words, " ")
}

func rows(full int64) []row {
	var all []row
	for _, sessions := range []int{1, 4} {
		for _, depth := range []int{1, 32} {
			all = append(all,
				row{write: true, random: true, bs: "4k", size: full, depth: depth, sessions: sessions, far: sessions == 1},
				row{random: true, access: "cached", bs: "4k", size: 64 << 20, depth: depth, sessions: sessions, far: sessions == 1 && depth == 32},
				row{random: true, access: "uncached", bs: "4k", size: full, depth: depth, sessions: sessions})
		}
	}
	all = append(all,
		row{write: true, bs: "1m", size: full, depth: 8, sessions: 1},
		row{access: "uncached", bs: "1m", size: full, depth: 8, sessions: 1})
	return all
}

// takes says whether a row is measured on a target.
func (t *target) takes(r row) bool {
	switch {
	case t.far && !r.far,
		t.only == "write" && !r.write,
		t.only == "read" && r.write,
		t.when != "" && t.when != r.access:
		return false
	}
	return true
}

// cellResult is all measurements of one row on one target.
type cellResult struct {
	Row     string            `json:"row"`
	Depth   int               `json:"depth"`
	Session int               `json:"sessions"`
	Target  string            `json:"target"`
	Command string            `json:"command"`
	Raw     []json.RawMessage `json:"results"`

	runs   []*lab.Result
	median *lab.Result
	row    row
	ratio  float64 // of twinsan's rate to this one's, median over the rounds
}

func (b *bench) measure(ctx context.Context, r row) error {
	var cells []*cellResult
	var of []target
	for _, t := range b.targets() {
		if t.takes(r) {
			of = append(of, t)
			cells = append(cells, &cellResult{Row: r.name(), Depth: r.depth, Session: r.sessions, Target: t.label, row: r})
		}
	}
	for round := range b.rounds {
		if b.cluster != nil {
			// A node whose devices are slow gives its volumes away: the numbers are of the owner.
			var err error
			if b.volume, err = b.cluster.Volume(ctx, volumeName); err != nil {
				return err
			}
			of = slices.DeleteFunc(b.targets(), func(t target) bool { return !t.takes(r) })
		}
		for i := range of {
			i = (i + round) % len(of) // take turns in going first
			t := of[i]
			result, command, err := b.once(ctx, r, t, round == 0 && b.profile && t.fills && b.cluster != nil)
			if err != nil {
				return err
			}
			c := cells[i]
			c.Command = command
			c.runs, c.Raw = append(c.runs, result), append(c.Raw, result.Raw)
			b.say("%-24s depth %2d x %d  %-20s %9.0f IOPS %8.1f MiB/s %7.1f us/IO", c.Row, c.Depth, c.Session, c.Target, result.IOPS, result.MiBs, result.CPU.TargetUS)
		}
	}
	for _, c := range cells {
		c.median = medianRun(c.runs)
		c.ratio = medianRatio(cells[0].runs, c.runs)
		b.results = append(b.results, *c)
	}
	return nil
}

func (b *bench) once(ctx context.Context, r row, t target, profile bool) (*lab.Result, string, error) {
	rw := map[bool]string{true: "write", false: "read"}[r.write]
	if r.random {
		rw = "rand" + rw
	}
	args := append([]string{"--rw", rw, "--bs", r.bs, "--iodepth", fmt.Sprint(r.depth), "--sessions", fmt.Sprint(r.sessions),
		"--size", fmt.Sprint(r.size), "--runtime", lab.Seconds(b.runtime), "--pid", t.pids}, t.extra...)
	if r.access == "cached" {
		// The first pass fills the cache and is not measured.
		if _, err := lab.RunLoad(ctx, b.iscsiload, "--rw", "read", "--once", "--bs", "256k", "--size", fmt.Sprint(r.size), t.url); err != nil {
			return nil, "", err
		}
	}
	l, err := lab.Start(ctx, b.iscsiload, append(args, t.url)...)
	if err != nil {
		return nil, "", err
	}
	if profile {
		err := b.saveProfile(ctx, r, l)
		if err != nil {
			l.Kill()
			return nil, "", err
		}
	}
	result, err := l.Wait()
	if err == nil && result.Errors.SCSI+result.Errors.Short > 0 {
		err = fmt.Errorf("%s: %d errors, last: %s", l.Command, result.Errors.SCSI+result.Errors.Short, result.Errors.Last)
	}
	return result, l.Command, err
}

// saveProfile takes a CPU profile of the owner while the generator runs.
func (b *bench) saveProfile(ctx context.Context, r row, l *lab.Load) error {
	port := b.cluster.DebugPort
	for i, n := range b.cluster.Nodes {
		if n.Name == b.volume.Owner {
			port += i
		}
	}
	seconds := max(1, int(b.runtime/time.Second)-2)
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/debug/pprof/profile?seconds=%d", port, seconds), nil)
	if err != nil {
		return err
	}
	a, err := http.DefaultClient.Do(q)
	if err != nil {
		return err
	}
	defer a.Body.Close()
	if a.StatusCode != http.StatusOK {
		return fmt.Errorf("profile: %s", a.Status)
	}
	name := fmt.Sprintf("%s-%s-depth%d-x%d.pprof", b.out, strings.ReplaceAll(r.name(), " ", "-"), r.depth, r.sessions)
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, a.Body)
	b.say("profile: go tool pprof -top %s", name)
	return errors.Join(err, f.Close())
}
