package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/api"
	"github.com/twinsan/twinsan/api/apitest"
	"github.com/twinsan/twinsan/server"
)

var rewrite = flag.Bool("rewrite", false, "write what the commands print into the scenario files")

// serveVariable makes the test binary a node without a store (see fakeServe):
// the demo's process control is tested with real processes.
const serveVariable = "TWINSAN_TEST_SERVE"

func TestMain(m *testing.M) {
	if mode := os.Getenv(serveVariable); mode != "" {
		os.Exit(fakeServe(mode))
	}
	time.Local = time.UTC
	goleak.VerifyTestMain(m)
}

// cli is a program whose API is a cluster in memory.
type cli struct {
	backend *apitest.Backend
	address string
	stdin   string
	tty     bool
}

func newCLI(t *testing.T) *cli {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw")
	if err != nil {
		t.Fatal(err)
	}
	c := &cli{backend: apitest.New(), address: "unix://" + filepath.Join(dir, "s")}
	s, err := api.Serve(api.Config{Backend: c.backend, Socket: filepath.Join(dir, "s")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); os.RemoveAll(dir) })
	return c
}

func (c *cli) run(ctx context.Context, args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	a := &app{in: strings.NewReader(c.stdin), out: &out, err: &errs, terminal: func() bool { return c.tty }, getenv: func(key string) string {
		if key == "TWINSAN_API" {
			return c.address
		}
		return ""
	}}
	code = a.run(ctx, args)
	return out.String(), errs.String(), code
}

// The scenario files in testdata are stories: lines "$ twinsan ..." are typed,
// what follows is what people see: standard output, then standard error behind
// "! ", then the exit code when it is not 0. "% set NAME" changes the cluster.
// go test ./cmd/twinsan -run Scenario -rewrite makes them anew.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scenarios", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c := newCLI(t)
			var got strings.Builder
			for _, line := range strings.Split(string(text), "\n") {
				if strings.HasPrefix(line, "%") {
					got.WriteString(line + "\n")
					if name, ok := strings.CutPrefix(line, "% set "); ok {
						change, ok := changes[name]
						if !ok {
							t.Fatalf("no change %q", name)
						}
						change(c)
					}
					continue
				}
				command, ok := strings.CutPrefix(line, "$ twinsan")
				if !ok {
					continue
				}
				out, errs, code := c.run(t.Context(), strings.Fields(command)...)
				got.WriteString(line + "\n" + out)
				for _, l := range strings.Split(strings.TrimSuffix(errs, "\n"), "\n") {
					if errs != "" {
						got.WriteString("! " + l + "\n")
					}
				}
				if code != 0 {
					fmt.Fprintf(&got, "[exit %d]\n", code)
				}
				got.WriteString("\n")
			}
			if *rewrite {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got.String() != string(text) {
				t.Errorf("%s is not what the commands print (go test ./cmd/twinsan -run Scenario -rewrite, then look at the difference)\n%s", file, firstDifference(string(text), got.String()))
			}
		})
	}
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		line := func(l []string) string {
			if i < len(l) {
				return l[i]
			}
			return "(end)"
		}
		if line(w) != line(g) {
			return fmt.Sprintf("line %d\nwant %s\ngot  %s", i+1, line(w), line(g))
		}
	}
	return ""
}

// changes are what scenarios do to the cluster.
var changes = map[string]func(*cli){
	"witness down": func(c *cli) {
		s := &c.backend.State
		s.Nodes[2].State, s.Nodes[2].Error, s.VotersUp, s.Health = server.NodeDown, "connection refused", 2, server.Degraded
		s.Problems = []server.Problem{{Severity: server.Degraded, Code: "witness-down", Cause: "witness w does not answer", Risk: "the next node failure stops I/O", Remedy: "twinsan node show w"}}
	},
	"resync": func(c *cli) {
		s := &c.backend.State
		s.Health = server.Degraded
		s.Volumes[0].State = server.VolumeDegraded
		s.Volumes[0].Replicas[1] = server.Replica{Node: "b", State: server.ReplicaSyncing, ResyncDone: 610 << 20, ResyncTotal: 1000 << 20}
		s.Problems = []server.Problem{{Severity: server.Degraded, Code: "replica-out-of-sync", Cause: "volume csv1: b is resyncing, 390 MiB left", Risk: "one more failure stops its I/O", Remedy: "twinsan volume show csv1"}}
	},
	"old level":   func(c *cli) { c.backend.Level = 1 },
	"differ":      func(c *cli) { c.backend.State.Volumes[0].Replicas[1].State = server.ReplicaStale },
	"b down":      func(c *cli) { c.backend.State.Volumes[0].Replicas[1].State = server.ReplicaDown },
	"unreachable": func(c *cli) { c.backend.Unreachable = []server.Unreachable{{Node: "b", Error: "connection refused"}} },
	"no quorum":   func(c *cli) { c.backend.Fail = fmt.Errorf("no leader answers: %w", server.ErrNoQuorum) },
	"quorum":      func(c *cli) { c.backend.Fail = nil },
	"terminal":    func(c *cli) { c.tty = true },
	"says yes":    func(c *cli) { c.stdin = "yes\n" },
	"says no":     func(c *cli) { c.stdin = "y\n" },
	"sessions gone": func(c *cli) {
		c.backend.SessionList = nil
		c.backend.HostList[0].Paths = nil
	},
	"chap": func(c *cli) {
		c.backend.HostList[0].CHAPUser, c.backend.HostList[0].MutualUser = "hv1", "twinsan"
	},
	"busy hosts": func(c *cli) {
		v := &c.backend.State.Volumes[0]
		v.Counts, v.Reservations = apitest.Counts(), apitest.Reserved()
		v.Paths[0].Sessions, v.Paths[1].Sessions = 1, 1
	},
	"secrets":   func(c *cli) { c.stdin = "first-secret-1\nsecond-secret-2\n" },
	"says csv1": func(c *cli) { c.stdin = "csv1\n" },
	"esxi":      func(c *cli) { c.backend.HostList[0].Initiators = []string{"iqn.1998-01.com.vmware:esx1"} },
	"no nodes":  func(c *cli) { c.address = "unix:///nonexistent/socket" },
}

// The JSON of a command has exactly these fields: taking one away or renaming it
// breaks scripts. New ones are added to the lists here.
func TestJSONIsStable(t *testing.T) {
	c := newCLI(t)
	changes["resync"](c)
	changes["busy hosts"](c)
	volume := "id name uuid lun serial naa size_bytes logical_block_bytes dedup compress thin hosts any_host created state epoch owner replicas served_by mapped_bytes traffic physical_block_bytes read_only_hosts paths room_bytes commands offloads snapshots"
	snapshot := "id name volume state created size_bytes mapped_bytes group scheduled clones"
	node := "id name role state leader voter sync_address management_address portals api_address metrics_address software started incarnation owns in_sync replicas sessions pool traffic draining mode"
	for _, test := range []struct {
		command string
		code    int
		fields  map[string]string // path -> fields
	}{
		{"status", 3, map[string]string{
			"": "version cluster health quorum leader voters voters_up answered_by problems nodes volumes risk operations", "risk": "survives_any_node text stops", "nodes.0": node, "volumes.0": volume + " reservations",
			"problems.0": "severity code cause risk do", "volumes.0.replicas.0": "node state owner resync_done_bytes resync_total_bytes resync_sent_bytes",
			"nodes.0.pool":          "size_bytes live_bytes garbage_bytes free_bytes usable_bytes mapped_bytes stored_bytes savings caches reclaim_bytes write_amplification",
			"nodes.0.pool.caches.1": "tier path bytes capacity_bytes hits misses hit_rate written_bytes",
			"nodes.0.traffic":       "read_ops write_ops read_bytes write_bytes",
		}},
		{"node list", 0, map[string]string{"": "version nodes", "nodes.0": node}},
		{"node show a", 0, map[string]string{"": "version node", "node": node}},
		{"device list", 0, map[string]string{"": "version devices unreachable", "devices.0": "node path uuid size_bytes state direct_io errors class live_bytes free_bytes drain_bytes read_seconds write_seconds flush_seconds"}},
		{"volume list", 0, map[string]string{"": "version volumes", "volumes.0": volume + " reservations"}},
		{"volume show csv1", 0, map[string]string{
			"": "version volume", "volume": volume + " reservations", "volume.paths.0": "node state portals sessions",
			"volume.commands.1": "class commands good bytes nanoseconds refused", "volume.commands.1.refused.0": "code reason text count", "volume.offloads.0": "name used refused",
			"volume.reservations": "type generation persist registrations", "volume.reservations.registrations.0": "host initiator isid node key holder",
		}},
		{"volume clear-reservations csv1 --yes", 0, map[string]string{"": "version volume cleared reservations"}},
		{"volume map csv1 --host hv1 --read-only", 0, map[string]string{"": "version volume", "volume": volume}},
		{"volume unmap csv1 --host hv1", 0, map[string]string{"": "version volume", "volume": volume}},
		{"volume map csv1 --host hv1", 0, map[string]string{"": "version volume", "volume": volume}},
		{"volume move csv1 --to a", 3, map[string]string{"": "version volume", "volume": volume}},
		{"node drain b", 0, map[string]string{"": "version node", "node": node}},
		{"node resume b", 0, map[string]string{"": "version node", "node": node}},
		{"cluster set discovery-auth chap --mutual", 0, map[string]string{"": "version discovery_auth discovery_user discovery_mutual_user chap_secret mutual_secret"}},
		{"cluster set discovery-auth host", 0, map[string]string{"": "version discovery_auth"}},
		{"volume create v 1G --any-host", 0, map[string]string{"": "version volume", "volume": volume}},
		{"volume resize v 2G", 0, map[string]string{"": "version volume", "volume": volume}},
		{"volume hosts v hv1", 0, map[string]string{"": "version volume", "volume": volume}},
		{"volume delete v --yes --in-use", 0, map[string]string{"": "version volume deleted", "volume": volume}},
		{"volume check csv1", 1, map[string]string{"": "version volume equal digests", "digests.0": "node digest", "digests.1": "node digest different_chunks"}},
		{"snapshot list", 0, map[string]string{"": "version snapshots"}},
		{"snapshot create s --volume csv1", 0, map[string]string{"": "version snapshots", "snapshots.0": snapshot}},
		{"snapshot show csv1@s", 0, map[string]string{"": "version snapshot", "snapshot": snapshot}},
		{"volume clone csv1@s copy", 0, map[string]string{"": "version volume", "volume": volume + " origin"}},
		{"snapshot diff csv1@s --offset 1048576", 0, map[string]string{"": "version offset length kind"}},
		{"volume rollback csv1 --snapshot s --in-use --yes", 0, map[string]string{"": "version volume snapshot rolled_back", "volume": volume, "snapshot": snapshot}},
		{"snapshot delete csv1@s --yes", 0, map[string]string{"": "version snapshot deleted", "snapshot": snapshot}},
		{"snapshot schedule set csv1 --every 1h --keep 2", 0, map[string]string{"": "version schedules", "schedules.0": "volume every_seconds keep keep_daily next snapshots"}},
		{"snapshot schedule remove csv1", 0, map[string]string{"": "version volume"}},
		{"host list", 0, map[string]string{"": "version hosts", "hosts.0": "name initiators volumes paths"}},
		{"host add h2 iqn.2026-01.x:y --mutual", 0, map[string]string{"": "version host chap_secret mutual_secret", "host": "name initiators chap_user mutual_user volumes paths"}},
		{"host remove h2 --yes", 0, map[string]string{"": "version host removed"}},
		{"connect csv1 hv1", 0, map[string]string{"": "version volume lun naa host target portals os commands"}},
		{"session list", 0, map[string]string{"": "version sessions unreachable", "sessions.0": "node host initiator isid tsih portal peer since auth digests commands in_bytes out_bytes tasks"}},
		{"cluster show", 0, map[string]string{"": "version name uuid created target portals leader quorum voters feature_level discovery_auth feature_level_known quorum_mode balance balance_after_seconds resync_mib_per_second", "portals.0": "address node group"}},
		{"cluster set balance off", 0, map[string]string{"": "version name uuid created target portals leader quorum voters feature_level discovery_auth feature_level_known quorum_mode balance balance_after_seconds resync_mib_per_second"}},
		{"cluster set quorum witness", 0, map[string]string{"": "version name uuid created target portals leader quorum voters feature_level discovery_auth feature_level_known quorum_mode balance balance_after_seconds resync_mib_per_second"}},
		{"upgrade plan", 0, map[string]string{"": "version feature_level feature_level_known ready advice nodes", "nodes.0": "name software feature_level_known"}},
		{"node maintenance b enter --force", 0, map[string]string{"": "version node hurt", "node": node}},
		{"node maintenance b leave", 0, map[string]string{"": "version node hurt", "node": node}},
		{"volume replica add csv1 w", 0, map[string]string{"": "version operation", "operation": "id kind state volume to started done_bytes total_bytes left_seconds"}},
		{"op list", 0, map[string]string{"": "version operations", "operations.0": "id kind state volume to started done_bytes total_bytes left_seconds"}},
		{"op cancel 1", 0, map[string]string{"": "version operation", "operation": "id kind state volume to started ended done_bytes total_bytes left_seconds"}},
		{"volume promote csv1 --node a --dry-run", 0, map[string]string{"": "version volume node promoted epoch facts"}},
		{"cluster token create", 0, map[string]string{"": "version token role expires addresses"}},
		{"version", 0, map[string]string{"": "version software go revision"}},
	} {
		out, errs, code := c.run(t.Context(), append(strings.Fields(test.command), "-o", "json")...)
		if code != test.code {
			t.Errorf("%s: exit %d, %s", test.command, code, errs)
			continue
		}
		var page any
		if err := json.Unmarshal([]byte(out), &page); err != nil {
			t.Errorf("%s: %v in %s", test.command, err, out)
			continue
		}
		if v, ok := page.(map[string]any)["version"].(float64); !ok || v != 1 {
			t.Errorf("%s: version %v", test.command, v)
		}
		for path, want := range test.fields {
			got, ok := at(page, path).(map[string]any)
			if !ok {
				t.Errorf("%s: nothing at %q in %s", test.command, path, out)
				continue
			}
			for _, f := range strings.Fields(want) {
				if _, ok := got[f]; !ok {
					t.Errorf("%s: %s lacks %q", test.command, path, f)
				}
			}
			if len(got) != len(strings.Fields(want)) {
				t.Errorf("%s: %q has fields that the test does not list: %v", test.command, path, got)
			}
		}
		if strings.Contains(out, ": null") {
			t.Errorf("%s: a null in %s", test.command, out)
		}
	}
}

func at(v any, path string) any {
	for _, key := range strings.Split(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			if key != "" {
				v = x[key]
			}
		case []any:
			i := 0
			if _, err := fmt.Sscan(key, &i); err != nil || i >= len(x) {
				return nil
			}
			v = x[i]
		}
	}
	return v
}

func TestEventsFollowUntilInterrupted(t *testing.T) {
	c := newCLI(t)
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	var errs bytes.Buffer
	done := make(chan int, 1)
	go func() {
		a := &app{in: strings.NewReader(""), out: w, err: &errs, getenv: func(string) string { return "" }, terminal: func() bool { return false }}
		done <- a.run(ctx, []string{"events", "-f", "--after", "2", "-o", "json", "--api", c.address})
		w.Close()
	}()
	c.backend.Emit(server.Event{Number: 3, Time: apitest.Epoch, Severity: server.Failure, Code: "x", Text: "t", Node: "a"})
	line := make([]byte, 512)
	n, err := r.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"version":1,"number":3,"time":"2026-11-21T10:00:00Z","severity":"error","code":"x","node":"a","text":"t"}` + "\n"
	if string(line[:n]) != want {
		t.Errorf("got  %swant %s", line[:n], want)
	}
	cancel()
	if code := <-done; code != 0 {
		t.Errorf("exit %d: %s", code, errs.String())
	}
}

func TestSecretsFromStandardInput(t *testing.T) {
	c := newCLI(t)
	c.stdin = "first-secret-1\nsecond-secret-2\n"
	out, errs, code := c.run(t.Context(), "host", "add", "h2", "iqn.2026-01.x:y", "--mutual", "--secrets-stdin")
	if code != 0 || strings.Contains(out+errs, "secret-") {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	if last := c.backend.Calls[len(c.backend.Calls)-1]; last != "AddHost h2 iqn.2026-01.x:y/14 twinsan/15" {
		t.Errorf("called %s", last)
	}
	c.stdin = "short\n"
	if _, errs, code := c.run(t.Context(), "host", "add", "h3", "iqn.2026-01.x:z", "--chap", "--secrets-stdin"); code != exitUsage {
		t.Errorf("a short secret: exit %d, %s", code, errs)
	}
}

func TestAdminCertificate(t *testing.T) {
	c, dir := newCLI(t), filepath.Join(t.TempDir(), "admin")
	if _, errs, code := c.run(t.Context(), "cluster", "admin-cert", "--out", dir, "--name", "alice"); code != 0 {
		t.Fatal(errs)
	}
	for _, f := range []string{api.AdminKey, api.AdminCertificate, api.AdminCA} {
		if info, err := os.Stat(filepath.Join(dir, f)); err != nil || info.Mode().Perm() != 0o600 || info.Size() == 0 {
			t.Errorf("%s: %v, %v", f, info, err)
		}
	}
}

func TestAPIAddress(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte("name = \"a\"\n[sync]\naddress = \"h\"\n[api]\nsocket = \"/x/y.sock\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ flag, config, env, want string }{
		{"h:1", path, "e:1", "h:1"},
		{"", path, "e:1", "unix:///x/y.sock"},
		{"", "", "e:1", "e:1"},
	} {
		a := &app{address: test.flag, config: test.config, getenv: func(string) string { return test.env }}
		if got, err := a.apiAddress(); err != nil || got != test.want {
			t.Errorf("%+v: got %s, %v", test, got, err)
		}
	}
	a := &app{config: "/nonexistent", getenv: func(string) string { return "" }}
	if _, err := a.apiAddress(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file that was named: %v", err)
	}
}

// fakeServe is "twinsan serve" with a cluster in memory: all nodes of the demo
// are healthy. Mode "crash" ends at once, "deaf" ignores SIGTERM.
func fakeServe(mode string) int {
	config, err := server.LoadConfig(os.Args[3])
	if err != nil || mode == "crash" {
		fmt.Fprintln(os.Stderr, "fake node ends", err)
		return 1
	}
	b := apitest.New()
	b.State.Volumes = nil
	b.Join = config.Sync.Address
	s, err := api.Serve(api.Config{Backend: b, Socket: config.API.Socket})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer s.Close()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	for {
		select {
		case <-stop:
			if mode != "deaf" {
				return 0
			}
		case <-time.After(time.Minute): // a test that died
			return 1
		}
	}
}
