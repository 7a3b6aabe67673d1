package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a cluster of real nodes in this process.
type lab struct {
	t     *testing.T
	nodes map[replication.NodeID]*Node
}

// labPeers asks nodes without a network; a node that is closed does not answer.
type labPeers struct{ *lab }

func (p labPeers) Report(ctx context.Context, node replication.NodeID, _ string) (*Report, error) {
	if n := p.nodes[node]; n != nil {
		return n.Report(ctx)
	}
	return nil, errors.New("connection refused")
}

func (p labPeers) CheckVolume(ctx context.Context, node replication.NodeID, _, volume string) ([]Digest, bool, error) {
	if n := p.nodes[node]; n != nil {
		return n.CheckVolume(ctx, volume, true)
	}
	return nil, false, errors.New("connection refused")
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t, nodes: map[replication.NodeID]*Node{}}
	t.Cleanup(func() {
		for _, n := range l.nodes {
			n.Close()
		}
	})
	return l
}

// freeAddress is a port of the loopback that nobody has now.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (l *lab) config(name string, witness bool) *Config {
	l.t.Helper()
	dir := filepath.Join(l.t.TempDir(), name)
	c := DefaultConfig()
	c.Name, c.DataDir = name, dir
	c.Sync.Address, c.API.Address, c.Metrics.Address = freeAddress(l.t), freeAddress(l.t), freeAddress(l.t)
	c.API.Socket = filepath.Join(dir, "api.sock")
	if !witness {
		c.Store = StoreConfig{Devices: []string{filepath.Join(dir, "disk")}, DeviceSize: 256 << 20, Cache: 16 << 20, Metadata: 16 << 20, Index: 4 << 20}
		c.ISCSI.Portals = []string{freeAddress(l.t)}
	} else {
		c.Store = StoreConfig{Cache: 16 << 20, Metadata: 16 << 20, Index: 4 << 20}
	}
	return c
}

func (l *lab) open(c *Config) *Node {
	l.t.Helper()
	n, err := Open(l.t.Context(), c, Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		l.t.Fatal(err)
	}
	n.SetPeers(labPeers{l})
	l.nodes[n.id.Node] = n
	l.await("ready", func() error {
		select {
		case err := <-n.Failed():
			l.t.Fatalf("node %s failed: %v", c.Name, err)
		default:
		}
		if !n.Ready() {
			return errors.New("not ready")
		}
		return nil
	})
	return n
}

func (l *lab) close(n *Node) {
	delete(l.nodes, n.id.Node)
	n.Close()
}

// await waits for a condition.
func (l *lab) await(what string, f func() error) {
	l.t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-deadline.C:
			l.t.Fatalf("%s: %v", what, err)
		}
	}
}

func (l *lab) awaitVolume(n *Node, name string, state VolumeState, servedBy ...string) *Volume {
	l.t.Helper()
	var out *Volume
	l.await("volume "+name, func() error {
		s, err := n.Status(l.t.Context())
		if err != nil {
			return err
		}
		for i := range s.Volumes {
			v := &s.Volumes[i]
			if v.Name == name && v.State == state && slices.Equal(v.ServedBy, servedBy) {
				out = v
				return nil
			}
		}
		return fmt.Errorf("volumes %+v, problems %+v", s.Volumes, s.Problems)
	})
	return out
}

// One data node from init to delete, with a restart.
func TestOneNode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	c := l.config("a", false)
	tokens, err := Init(ctx, c, InitOptions{Cluster: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	if tokens.Data == "" || tokens.Witness == "" {
		t.Errorf("tokens %+v", tokens)
	}
	if _, err := Init(ctx, c, InitOptions{Cluster: "lab", Wipe: true}); !errors.Is(err, ErrRefused) {
		t.Errorf("second init: %v", err)
	}
	if _, err := Open(ctx, c, Options{Witness: true}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a data node as a witness: %v", err)
	}
	renamed := *c
	renamed.Name = "z"
	if _, err := Open(ctx, &renamed, Options{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("another name: %v", err)
	}

	n := l.open(c)
	if _, err := n.CreateVolume(ctx, VolumeSpec{Name: "odd", Size: 1000}); !errors.Is(err, ErrInvalid) {
		t.Errorf("odd size: %v", err)
	}
	spec := VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true, Dedup: true, Compress: true, RequestID: "r1"}
	v, err := n.CreateVolume(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := n.CreateVolume(ctx, spec); err != nil || again.UUID != v.UUID {
		t.Errorf("the same request again: %+v, %v", again, err)
	}
	spec.RequestID = "r2"
	if _, err := n.CreateVolume(ctx, spec); !errors.Is(err, ErrExists) {
		t.Errorf("the same name again: %v", err)
	}
	l.awaitVolume(n, "vm", VolumeOnline, "a")
	if v, err := n.ResizeVolume(ctx, "vm", 128<<20); err != nil || v.Size != 128<<20 {
		t.Errorf("resize: %+v, %v", v, err)
	}
	if _, err := n.ResizeVolume(ctx, v.UUID, 64<<20); !errors.Is(err, ErrRefused) {
		t.Errorf("shrink: %v", err)
	}
	s, err := n.Status(ctx)
	if err != nil || s.Health != Healthy || s.Leader != "a" || s.VotersUp != 1 || len(s.Problems) != 1 || s.Problems[0].Code != "not-mirrored" {
		t.Errorf("status %+v, %v", s, err)
	}
	devices, missing, err := n.Devices(ctx, "a")
	if err != nil || len(missing) != 0 || len(devices) != 1 || devices[0].Size != 256<<20 || len(devices[0].UUID) != 36 {
		t.Errorf("devices %+v, %v, %v", devices, missing, err)
	}
	conn, err := net.Dial("tcp", c.ISCSI.Portals[0])
	if err != nil {
		t.Errorf("portal: %v", err)
	} else {
		conn.Close()
	}
	checkMetrics(t, c.Metrics.Address, "twinsan_cluster_quorum 1", "twinsan_node_ready 1", `twinsan_volume_owner{node="a",volume="vm"} 1`,
		`twinsan_volume_provisioned_bytes{volume="vm"} 1.34217728e+08`, `twinsan_raft_leader{node="a"} 1`, "twinsan_iscsi_sessions 0",
		`twinsan_volume_write_seconds_count{volume="vm"} 0`, `twinsan_scsi_commands_total{op="caw",status="good",volume="vm"} 0`)

	l.close(n)
	n = l.open(c)
	l.awaitVolume(n, "vm", VolumeOnline, "a")
	if digests, equal, err := n.CheckVolume(ctx, "vm", false); err != nil || !equal || len(digests) != 1 {
		t.Errorf("check %+v, %v, %v", digests, equal, err)
	}
	if _, _, err := n.DeleteVolume(ctx, "nothing", false, false); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete nothing: %v", err)
	}
	if v, _, err := n.DeleteVolume(ctx, "vm", true, false); err != nil || v.Name != "vm" {
		t.Errorf("dry run: %v", err)
	}
	if _, _, err := n.DeleteVolume(ctx, "vm", false, false); err != nil {
		t.Fatal(err)
	}
	// The replica is freed, the cluster is told, and the volume leaves the state.
	l.await("freed", func() error {
		if len(n.cluster.State().Volumes) > 0 || len(n.store.Volumes()) > 0 {
			return fmt.Errorf("state has %d volumes, the store %d", len(n.cluster.State().Volumes), len(n.store.Volumes()))
		}
		return nil
	})
	l.close(n)
	if r, err := CheckStore(ctx, c); err != nil || r.Count != 0 {
		t.Errorf("offline check: %+v, %v", r, err)
	}
}

func checkMetrics(t *testing.T, address string, want ...string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	have := map[string]bool{}
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		have[lines.Text()] = true
	}
	for _, w := range want {
		if !have[w] {
			t.Errorf("metrics lack %s", w)
		}
	}
}

// Two nodes and a witness: mirrored, served by both, degraded and healed again.
func TestThreeNodes(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ca, cb, cw := l.config("a", false), l.config("b", false), l.config("w", true)
	tokens, err := Init(ctx, ca, InitOptions{Cluster: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	a := l.open(ca)
	if err := Join(ctx, cb, JoinOptions{Address: ca.Sync.Address, Token: tokens.Witness}); err == nil {
		t.Error("joined with a token for another role")
	}
	if err := Join(ctx, cb, JoinOptions{Address: ca.Sync.Address, Token: tokens.Data}); err != nil {
		t.Fatal(err)
	}
	b := l.open(cb)
	if err := Join(ctx, cw, JoinOptions{Address: ca.Sync.Address, Token: tokens.Witness, Witness: true}); err != nil {
		t.Fatal(err)
	}
	w := l.open(cw)
	if _, err := a.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, Hosts: []string{"hv1"}}); !errors.Is(err, ErrNotFound) {
		t.Errorf("an unknown host: %v", err)
	}
	if _, err := b.AddHost(ctx, HostSpec{Name: "hv1", Initiators: []string{"iqn.2026-01.x:HV1"}, CHAPUser: "u", CHAPSecret: "twelve-chars"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, Hosts: []string{"hv1"}, Dedup: true}); err != nil {
		t.Fatal(err)
	}
	l.awaitVolume(a, "vm", VolumeOnline, "a", "b")
	l.await("three voters", func() error {
		s, err := w.Status(ctx) // a witness can be asked as well
		if err == nil && (s.VotersUp != 3 || s.Health != Healthy) {
			err = fmt.Errorf("status %+v", s)
		}
		return err
	})
	for _, n := range []*Node{a, b} {
		d := directory{n}
		access, ok := d.Access("iqn.2026-01.x:hv1")
		if !ok || access.User != "u" || access.Secret != "twelve-chars" {
			t.Errorf("access %+v, %v", access, ok)
		}
		if _, ok := d.Access("iqn.2026-01.x:other"); ok {
			t.Error("an initiator of no host may log in")
		}
		if p := d.Portals(""); len(p) != 2 || p[0].Group != 1 || p[1].Group != 2 {
			t.Errorf("portals %+v", p)
		}
	}
	for _, n := range []*Node{a, b} {
		if digests, equal, err := n.CheckVolume(ctx, "vm", false); err != nil || !equal || len(digests) != 2 {
			t.Errorf("check through %s: %+v, %v, %v", n.id.Name, digests, equal, err)
		}
	}

	// The owner goes; the other takes over and says what is wrong.
	v := l.awaitVolume(a, "vm", VolumeOnline, "a", "b")
	owner, other := a, b
	if v.Owner == "b" {
		owner, other = b, a
	}
	l.close(owner)
	l.awaitVolume(other, "vm", VolumeDegraded, other.id.Name)
	s, err := other.Status(ctx)
	if err != nil || s.Health != Degraded || !slices.ContainsFunc(s.Problems, func(p Problem) bool { return p.Code == "node-down" }) {
		t.Errorf("status %+v, %v", s, err)
	}
	if _, equal, err := other.CheckVolume(ctx, "vm", false); err != nil || equal {
		t.Errorf("check of a degraded volume: %v, %v", equal, err)
	}
	reopened := l.open(owner.config)
	l.awaitVolume(reopened, "vm", VolumeOnline, "a", "b")

	// The events tell the story.
	seen := map[string]bool{}
	if err := reopened.Events(ctx, 0, false, func(e Event) error { seen[e.Code] = true; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, code := range []string{"cluster-created", "node-joined", "volume-created", "host-added"} {
		if !seen[code] {
			t.Errorf("no event %s in %v", code, seen)
		}
	}
	if _, err := reopened.RemoveHost(ctx, "hv1", false, false); err != nil {
		t.Error(err)
	}
	if hosts, err := reopened.Hosts(ctx); err != nil || len(hosts) != 0 {
		t.Errorf("hosts %+v, %v", hosts, err)
	}
}

// Devices with data are refused before anything is changed.
func TestInitRefusesDevicesWithData(t *testing.T) {
	l := newLab(t)
	for _, test := range []struct {
		name, text, want string
		at               int64
	}{
		{"ext4", "\x53\xef", "an ext file system", 1080},
		{"MBR", "\x55\xaa", "a partition table", 510},
		{"anything", "x", "holds data", 1<<20 - 1},
		{"XFS", "XFSB", "an XFS file system", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := l.config("a", false)
			if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(c.Store.Devices[0])
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte(test.text), test.at); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(f.Truncate(256<<20), f.Close()); err != nil {
				t.Fatal(err)
			}
			_, err = Init(t.Context(), c, InitOptions{Cluster: "lab"})
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "--wipe") {
				t.Errorf("got %v", err)
			}
			if _, err := cluster.ReadIdentity(c.DataDir); err == nil {
				t.Error("a cluster was made all the same")
			}
			if _, err := Init(t.Context(), c, InitOptions{Cluster: "lab", Wipe: true}); err != nil {
				t.Errorf("with wipe: %v", err)
			}
		})
	}
}

// A setup that was interrupted between identity and format is finished by the same command.
func TestInitIsFinishedByRepeating(t *testing.T) {
	l := newLab(t)
	c := l.config("a", false)
	devices := c.Store.Devices
	if _, err := Init(t.Context(), c, InitOptions{Cluster: "lab"}); err != nil {
		t.Fatal(err)
	}
	// As after a crash before the format.
	if err := errors.Join(os.Remove(filepath.Join(c.DataDir, poolFile)), os.Remove(devices[0])); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), c, InitOptions{Cluster: "other"}); !errors.Is(err, ErrRefused) {
		t.Errorf("as another cluster: %v", err)
	}
	if _, err := Init(t.Context(), c, InitOptions{Cluster: "lab"}); err != nil {
		t.Fatal(err)
	}
	l.open(c)
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	l := newLab(t)
	c := l.config("a", false)
	if _, err := Open(t.Context(), c, Options{}); err == nil || !strings.Contains(err.Error(), "twinsan init") {
		t.Errorf("no identity: %v", err)
	}
	if _, err := Init(t.Context(), c, InitOptions{Cluster: "lab"}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.Store.Devices[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), c, Options{}); err == nil || !strings.Contains(err.Error(), c.Store.Devices[0]) {
		t.Errorf("no device: %v", err)
	}
}
