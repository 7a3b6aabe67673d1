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

func (p labPeers) ChangeDevice(ctx context.Context, node replication.NodeID, _ string, c DeviceChange) (*Device, error) {
	if n := p.nodes[node]; n != nil {
		return n.ChangeDevice(ctx, c, true)
	}
	return nil, errors.New("connection refused")
}

func (p labPeers) MoveVolume(ctx context.Context, node replication.NodeID, _, volume, to string) error {
	if n := p.nodes[node]; n != nil {
		_, err := n.MoveVolume(ctx, volume, to, true)
		return err
	}
	return errors.New("connection refused")
}

func (p labPeers) ClearReservations(ctx context.Context, node replication.NodeID, _, volume string) error {
	if n := p.nodes[node]; n != nil {
		_, _, err := n.ClearReservations(ctx, volume, false, true)
		return err
	}
	return errors.New("connection refused")
}

func (p labPeers) ExplainPool(ctx context.Context, node replication.NodeID, _, name string, exact bool, progress func(float64) error) (*PoolExplained, error) {
	if n := p.nodes[node]; n != nil {
		return n.ExplainPool(ctx, name, exact, true, progress)
	}
	return nil, ErrNotReady
}

func (p labPeers) ScrubNode(ctx context.Context, node replication.NodeID, _, name string, action ScrubAction, fullSpeed bool) (*Scrub, error) {
	if n := p.nodes[node]; n != nil {
		return n.ScrubNode(ctx, name, action, fullSpeed, true)
	}
	return nil, errors.New("connection refused")
}

func (p labPeers) MergeNode(ctx context.Context, node replication.NodeID, _, name string, action MergeAction) (*Merge, error) {
	if n := p.nodes[node]; n != nil {
		return n.MergeNode(ctx, name, action, true)
	}
	return nil, errors.New("connection refused")
}

func (p labPeers) SnapshotStep(ctx context.Context, node replication.NodeID, _ string, step SnapshotStep) (bool, error) {
	if n := p.nodes[node]; n != nil {
		return n.SnapshotStep(ctx, step)
	}
	return false, fmt.Errorf("%w: connection refused", ErrNotReady)
}

func (p labPeers) Changes(ctx context.Context, node replication.NodeID, _ string, spec ChangesSpec, send func([]ChangedRange, uint64) error) error {
	if n := p.nodes[node]; n != nil {
		return n.Changes(ctx, spec, send)
	}
	return errors.New("connection refused")
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
		`twinsan_volume_write_seconds_count{volume="vm"} 0`, `twinsan_volume_commands_total{class="caw",result="good",volume="vm"} 0`)

	l.close(n)
	n = l.open(c)
	l.awaitVolume(n, "vm", VolumeOnline, "a")
	if digests, equal, err := n.CheckVolume(ctx, "vm", false); err != nil || !equal || len(digests) != 1 {
		t.Errorf("check %+v, %v, %v", digests, equal, err)
	}
	if _, _, err := n.DeleteVolume(ctx, "nothing", false, false, false); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete nothing: %v", err)
	}
	if v, _, err := n.DeleteVolume(ctx, "vm", true, false, false); err != nil || v.Name != "vm" {
		t.Errorf("dry run: %v", err)
	}
	if _, _, err := n.DeleteVolume(ctx, "vm", false, false, false); err != nil {
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
	if r, err := CheckStore(ctx, c, nil, false); err != nil || r.Count != 0 {
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

// pair is a cluster of two data nodes, a and b, without a witness.
func (l *lab) pair() (a, b *Node) {
	l.t.Helper()
	return l.join(l.config("a", false), l.config("b", false))
}

// join starts a cluster of two nodes.
func (l *lab) join(ca, cb *Config) (a, b *Node) {
	l.t.Helper()
	tokens, err := Init(l.t.Context(), ca, InitOptions{Cluster: "lab"})
	if err != nil {
		l.t.Fatal(err)
	}
	a = l.open(ca)
	if err := Join(l.t.Context(), cb, JoinOptions{Address: ca.Sync.Address, Token: tokens.Data}); err != nil {
		l.t.Fatal(err)
	}
	return a, l.open(cb)
}

// fill makes volume vm on nodes a and b, which begins with data.
func (l *lab) fill(a, b *Node, data []byte) {
	l.t.Helper()
	if _, err := a.CreateVolume(l.t.Context(), VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true, Dedup: true, Compress: true}); err != nil {
		l.t.Fatal(err)
	}
	v := l.awaitVolume(a, "vm", VolumeOnline, "a", "b")
	owner := a
	if v.Owner == "b" {
		owner = b
	}
	done := make(chan error, 1)
	parts := owner.serving.Load()
	parts.replication.Volume(v.ID).Submit(&replication.Request{Op: replication.OpWrite, Len: uint64(len(data)), Data: data, Done: func(r *replication.Request) { done <- r.Err }})
	parts.replication.Kick()
	if err := <-done; err != nil {
		l.t.Fatal(err)
	}
}

// Block profiles, read-only hosts and the policy of discovery reach the parts that act by them.
func TestProfilesAndAccess(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	c := l.config("a", false)
	if _, err := Init(ctx, c, InitOptions{Cluster: "lab"}); err != nil {
		t.Fatal(err)
	}
	n := l.open(c)
	for _, h := range []HostSpec{{Name: "hv1", Initiators: []string{"iqn.2026-01.x:hv1"}, CHAPUser: "u", CHAPSecret: "twelve-chars"}, {Name: "hv2", Initiators: []string{"iqn.2026-01.x:hv2"}}} {
		if _, err := n.AddHost(ctx, h); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.CreateVolume(ctx, VolumeSpec{Name: "bad", Size: 64 << 20, LogicalBlock: 4096, PhysicalBlock: 512}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a physical block below the logical one: %v", err)
	}
	v, err := n.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, PhysicalBlock: 512, Thick: true, Hosts: []string{"hv1"}})
	if err != nil || v.PhysicalBlock != 512 || v.LogicalBlock != 512 || v.Thin {
		t.Fatalf("volume %+v, %v", v, err)
	}
	if v, err = n.MapVolume(ctx, "vm", []string{"hv2"}, true); err != nil || !slices.Equal(v.Hosts, []string{"hv1", "hv2"}) || !slices.Equal(v.ReadOnly, []string{"hv2"}) {
		t.Fatalf("mapped: %+v, %v", v, err)
	}
	l.await("export of the mapping", func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		x := n.exports[v.LUN]
		if x == nil || !slices.Equal(x.readOnly, []string{"iqn.2026-01.x:hv2"}) || len(x.initiators) != 2 {
			return fmt.Errorf("export %+v", x)
		}
		return nil
	})
	if v, err = n.UnmapVolume(ctx, "vm", []string{"hv1", "hv2"}); err != nil || len(v.Hosts)+len(v.ReadOnly) != 0 {
		t.Errorf("unmapped: %+v, %v", v, err)
	}
	if _, err := n.MapVolume(ctx, "vm", []string{"hv9"}, false); !errors.Is(err, ErrNotFound) {
		t.Errorf("map to an unknown host: %v", err)
	}

	d := directory{n}
	if a, ok := d.Discovery("iqn.2026-01.x:hv1"); !ok || a.Secret != "twelve-chars" {
		t.Errorf("discovery as for a login: %+v, %v", a, ok)
	}
	for what, spec := range map[string]DiscoverySpec{
		"short":                    {Mode: DiscoveryCHAP, User: "d", Secret: "short"},
		"no user":                  {Mode: DiscoveryCHAP, Secret: "discovery-secret"},
		"one secret for both":      {Mode: DiscoveryCHAP, User: "d", Secret: "discovery-secret", MutualUser: "t", MutualSecret: "discovery-secret"},
		"the target's is a host's": {Mode: DiscoveryCHAP, User: "d", Secret: "discovery-secret", MutualUser: "t", MutualSecret: "twelve-chars"},
		"no such mode":             {Mode: "sometimes"},
		"secret without chap":      {Mode: DiscoveryNone, User: "d", Secret: "discovery-secret"},
	} {
		if err := n.SetDiscovery(ctx, spec); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := n.SetDiscovery(ctx, DiscoverySpec{Mode: DiscoveryCHAP, User: "d", Secret: "discovery-secret", MutualUser: "t", MutualSecret: "targets-secret"}); err != nil {
		t.Fatal(err)
	}
	if a, ok := d.Discovery("iqn.2026-01.x:hv1"); !ok || a.User != "d" || a.Secret != "discovery-secret" || a.MutualUser != "t" || a.MutualSecret != "targets-secret" {
		t.Errorf("discovery by CHAP: %+v, %v", a, ok)
	}
	if _, ok := d.Discovery("iqn.2026-01.x:stranger"); ok {
		t.Error("a stranger may ask for the portals")
	}
	// A host may not have the secret with which the target proves itself for discovery.
	if _, err := n.AddHost(ctx, HostSpec{Name: "hv3", Initiators: []string{"iqn.2026-01.x:hv3"}, CHAPUser: "u", CHAPSecret: "targets-secret"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a host with the target's secret: %v", err)
	}
	if i, err := n.Info(ctx); err != nil || i.Discovery != DiscoveryCHAP || i.DiscoveryUser != "d" || i.DiscoveryMutual != "t" {
		t.Errorf("info %+v, %v", i, err)
	}
	if err := n.SetDiscovery(ctx, DiscoverySpec{Mode: DiscoveryNone}); err != nil {
		t.Fatal(err)
	}
	// Nothing is reserved, and clearing that is recorded all the same.
	if _, was, err := n.ClearReservations(ctx, "vm", false, false); err != nil || was != nil {
		t.Errorf("clear: %+v, %v", was, err)
	}
	cleared := false
	if err := n.Events(ctx, 0, false, func(e Event) error { cleared = cleared || e.Code == "reservations-cleared"; return nil }); err != nil || !cleared {
		t.Errorf("no event of the clearing, %v", err)
	}
	if a, ok := d.Discovery("iqn.2026-01.x:hv1"); !ok || a.User != "" {
		t.Errorf("open discovery: %+v, %v", a, ok)
	}
	l.await("room", func() error {
		s, err := n.Status(ctx)
		if err != nil {
			return err
		}
		if v := s.Volumes[0]; v.Room == 0 || v.Room > 256<<20 || len(v.Paths) != 1 || v.Paths[0].State != PathOptimized {
			return fmt.Errorf("volume %+v", v)
		}
		return nil
	})
	if s := n.space(v.ID); s.Total == 0 || s.Free > s.Total || s.Used != 0 {
		t.Errorf("space %+v", s)
	}
}

// A node is drained when the other one can take over, redirects logins, and serves again after resume.
func TestDrain(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	a, b := l.pair()
	if _, err := a.CreateVolume(ctx, VolumeSpec{Name: "vm", Size: 64 << 20, AnyHost: true}); err != nil {
		t.Fatal(err)
	}
	v := l.awaitVolume(a, "vm", VolumeOnline, "a", "b")
	owner, other := a, b
	if v.Owner == "b" {
		owner, other = b, a
	}
	if _, ok := (directory{owner}).Redirect("iqn.x"); ok {
		t.Error("a node that is not drained redirects")
	}
	if _, err := a.DrainNode(ctx, "z", true); !errors.Is(err, ErrNotFound) {
		t.Errorf("drain of an unknown node: %v", err)
	}
	if _, err := a.MoveVolume(ctx, "vm", "z", false); !errors.Is(err, ErrNotFound) {
		t.Errorf("move to an unknown node: %v", err)
	}
	if m, err := a.MoveVolume(ctx, "vm", owner.id.Name, false); err != nil || m.Owner != owner.id.Name {
		t.Errorf("move to the owner: %+v, %v", m, err)
	}
	// The request reaches the owner, wherever it is made.
	if m, err := other.MoveVolume(ctx, "vm", other.id.Name, false); err != nil || m.Owner != other.id.Name {
		t.Fatalf("move: %+v, %v", m, err)
	}
	l.awaitVolume(a, "vm", VolumeOnline, "a", "b")
	// So does a host's, by the target port group.
	for _, n := range []*Node{owner, other, owner} {
		done := make(chan error, 1)
		owner.optimize(v.ID, uint16(n.id.Node), func(err error) { done <- err })
		if err := <-done; err != nil {
			t.Fatalf("move to the group of node %s: %v", n.id.Name, err)
		}
		if s := l.awaitVolume(owner, "vm", VolumeOnline, "a", "b"); s.Owner != n.id.Name || s.Paths[n.id.Node-1].State != PathOptimized {
			t.Errorf("after it: %+v", s)
		}
	}
	for group, want := range map[uint16]error{9: ErrNotFound} {
		done := make(chan error, 1)
		owner.optimize(v.ID, group, func(err error) { done <- err })
		if err := <-done; !errors.Is(err, want) {
			t.Errorf("move to group %d: %v", group, err)
		}
	}

	if m, err := other.DrainNode(ctx, owner.id.Name, true); err != nil || !m.Draining {
		t.Fatalf("drain: %+v, %v", m, err)
	}
	if _, err := owner.DrainNode(ctx, other.id.Name, true); !errors.Is(err, ErrRefused) {
		t.Errorf("drain of the other node as well: %v", err)
	}
	l.await("redirect", func() error {
		if to, ok := (directory{owner}).Redirect("iqn.x"); !ok || to != other.config.ISCSI.Portals[0] {
			return fmt.Errorf("redirected to %q, %v", to, ok)
		}
		return nil
	})
	if _, ok := (directory{other}).Redirect("iqn.x"); ok {
		t.Error("redirects go on")
	}
	if _, err := other.MoveVolume(ctx, "vm", owner.id.Name, false); !errors.Is(err, ErrRefused) {
		t.Errorf("move to a drained node: %v", err)
	}
	l.await("volumes to leave", func() error {
		if o := l.awaitVolume(other, "vm", VolumeOnline, "a", "b").Owner; o != other.id.Name {
			return fmt.Errorf("owner %s", o)
		}
		return nil
	})
	l.await("the event of it", func() error {
		found := false
		err := other.Events(ctx, 0, false, func(e Event) error { found = found || e.Code == "node-drained"; return nil })
		if err == nil && !found {
			err = errors.New("none")
		}
		return err
	})
	if m, err := owner.DrainNode(ctx, owner.id.Name, false); err != nil || m.Draining {
		t.Errorf("resume: %+v, %v", m, err)
	}
	l.await("no redirect", func() error {
		if _, ok := (directory{owner}).Redirect("iqn.x"); ok {
			return errors.New("redirects")
		}
		return nil
	})

	// With the other node gone there is nowhere to go. The quorum of two nodes is
	// gone along unless the preferred one stays, so only the refusal is looked at.
	if owner == a {
		l.close(b)
		l.await("refusal", func() error {
			if _, err := a.DrainNode(ctx, "a", true); !errors.Is(err, ErrRefused) {
				return fmt.Errorf("drain with the other node down: %v", err)
			}
			return nil
		})
	}
	seen := map[string]bool{}
	if err := a.Events(ctx, 0, false, func(e Event) error { seen[e.Code] = true; return nil }); err != nil || !seen["node-draining"] || !seen["node-resumed"] {
		t.Errorf("events %v, %v", seen, err)
	}
}
