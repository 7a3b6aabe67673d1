package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

// tourDir holds the tour's disk images, below the demo's directory.
const tourDir = "tour"

// tour shows on a running demo what the project promises, with tools that are
// not ours: a real disk image goes in through one node and comes out of the
// other, a changed copy costs little, and a node is killed while it works.
type tour struct {
	*demo
	tree string // directory to make the disk image of
	keep bool   // leave the tour's volumes

	client  *api.Client // of a node that the tour does not kill
	image   string
	size    int64
	owner   member
	other   member
	volumes [2]*v1.Volume
}

func (a *app) tourCommand(dir *string) *cobra.Command {
	t := &tour{}
	c := &cobra.Command{
		Use: "tour", Short: "Show it: write, compare, save space, kill a node, resync",
		Long: `A scripted tour of a running demo: write a disk image made of a real directory
tree through one node and compare it through the other, write a changed copy and
show what it costs, kill -9 the owner under load and show the pause, start it
again and show the resync. Needs qemu-img with iSCSI, and mke2fs.`,
		Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			d, unlock, err := a.openDemo(*dir)
			if err != nil {
				return err
			}
			defer unlock()
			t.demo = d
			return t.run(c.Context())
		},
	}
	c.Flags().StringVar(&t.tree, "tree", "", "directory to make the disk image of (default: some documentation or sources of this machine)")
	c.Flags().BoolVar(&t.keep, "keep", false, "leave the tour's volumes")
	return c
}

func (t *tour) run(ctx context.Context) error {
	if len(t.file.Nodes) < 2 {
		return errors.New("the tour needs a demo with two nodes")
	}
	if err := t.tools(ctx); err != nil {
		return err
	}
	for _, m := range t.file.members() {
		if m.proc.state() != processRunning {
			return fmt.Errorf("node %s is %s\n  start it: twinsan demo start %s%s", m.name, m.proc.state(), m.name, t.flag())
		}
	}
	client, err := api.Dial(t.file.Nodes[0].API, "")
	if err != nil {
		return err
	}
	defer func() { t.client.Close() }()
	t.client = client
	steps := []struct {
		title string
		run   func(context.Context) error
	}{
		{"make a disk image of a real directory tree", t.makeImage},
		{"write it through one node, compare it through the other", t.writeAndCompare},
		{"write a slightly changed copy to a second volume", t.writeCopy},
		{"kill -9 the owner of a volume under load", t.killUnderLoad},
		{"start it again and watch it catch up", t.resync},
		{"prove that nothing was lost", t.prove},
	}
	for i, s := range steps {
		t.say("\n%d. %s", i+1, s.title)
		if err := s.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.title, err)
		}
	}
	if err := t.tidy(ctx); err != nil {
		return err
	}
	t.say("\nThe demo is still up.")
	t.app.next("twinsan demo status%s; qemu-img convert -p -n -O raw DISK.qcow2 %s", t.flag(), t.file.url(0, 0))
	t.app.next("twinsan demo down%s   (or: twinsan demo clean%s)", t.flag(), t.flag())
	return nil
}

// tools says what is missing before anything is changed.
func (t *tour) tools(ctx context.Context) error {
	var missing []string
	for tool, pkg := range map[string]string{"qemu-img": "qemu-utils", "mke2fs": "e2fsprogs"} {
		if _, err := findTool(tool); err != nil {
			missing = append(missing, pkg)
		}
	}
	if len(missing) == 0 {
		qemu, err := findTool("qemu-img")
		if err != nil {
			return err
		}
		// A driver that is missing is named by qemu before it connects anywhere.
		out, _ := exec.CommandContext(ctx, qemu, "info", "-f", "raw", "iscsi://127.0.0.1:1/iqn.2026-11.io.twinsan:none/0").CombinedOutput()
		if bytes.Contains(out, []byte("Unknown protocol")) || bytes.Contains(out, []byte("Unknown driver")) {
			missing = append(missing, "qemu-block-extra")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the tour needs tools that are not installed\n  install them: apt-get install %s", strings.Join(missing, " "))
	}
	return nil
}

// findTool looks in the path and where administrators' tools are.
func findTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath("/usr/sbin/" + name)
}

// tool runs a tool and shows the command, so that everybody can repeat it.
func (t *tour) tool(ctx context.Context, name string, args ...string) error {
	path, err := findTool(name)
	if err != nil {
		return err
	}
	t.say("   $ %s %s", name, strings.Join(args, " "))
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// The image holds a tree of at least treeMin bytes if this machine has one, and never
// more than treeMax.
const (
	treeMin = 64 << 20
	treeMax = 1 << 30
)

// pickTree chooses a directory with a fair amount of ordinary files.
func pickTree() (string, int64, error) {
	best, bestBytes := "", int64(0)
	for _, dir := range []string{"/usr/local/go/src", "/usr/lib/go/src", "/usr/share/doc", "/usr/lib/python3", "/usr/share/perl", "/usr/share", "/usr/bin", "/etc"} {
		n, err := treeBytes(dir)
		if err != nil || n > treeMax {
			continue
		}
		if n > bestBytes {
			best, bestBytes = dir, n
		}
		if n >= treeMin {
			return dir, n, nil
		}
	}
	if best == "" {
		return "", 0, errors.New("found no directory to make an image of: name one with --tree")
	}
	return best, bestBytes, nil
}

var errTooLarge = errors.New("larger than 1 GiB")

// treeBytes is about what the files below dir take in a file system.
func treeBytes(dir string) (int64, error) {
	total := int64(0)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if path == dir {
				return err
			}
			return nil // what cannot be read is not counted
		}
		total += 1024
		if info, err := e.Info(); err == nil && e.Type().IsRegular() {
			total += (info.Size() + 4095) &^ 4095
		}
		if total > treeMax {
			return errTooLarge
		}
		return nil
	})
	return total, err
}

func (t *tour) makeImage(ctx context.Context) error {
	n := int64(0)
	var err error
	if t.tree == "" {
		t.tree, n, err = pickTree()
	} else {
		n, err = treeBytes(t.tree)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", t.tree, err)
	}
	dir := filepath.Join(t.dir, tourDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	t.image = filepath.Join(dir, "disk.img")
	if err := os.Remove(t.image); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	const mib = 1 << 20
	t.size = (n*5/4/mib + 48) * mib
	if err := t.tool(ctx, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", t.tree, t.image, fmt.Sprintf("%dM", t.size/mib)); err != nil {
		return err
	}
	t.say("   %s of files in an ext4 image of %s", server.Size(n), server.Size(t.size))
	return nil
}

// newVolume makes a volume of the image's size, in place of one from an earlier tour.
func (t *tour) newVolume(ctx context.Context, name string) (*v1.Volume, error) {
	_, err := t.client.Volumes.DeleteVolume(ctx, &v1.DeleteVolumeRequest{Name: name, InUse: true})
	if err != nil && status.Code(err) != codes.NotFound {
		return nil, err
	}
	v, err := t.client.Volumes.CreateVolume(ctx, &v1.CreateVolumeRequest{Name: name, SizeBytes: uint64(t.size), AnyHost: true})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = retry(ctx, func() error {
		if v, err = t.client.Volumes.GetVolume(ctx, &v1.GetVolumeRequest{Name: name}); err != nil {
			return err
		}
		if v.State != v1.VolumeState_VOLUME_STATE_ONLINE || len(v.ServedBy) < 2 {
			return fmt.Errorf("volume %s is %s", name, api.Word(v.State, "VOLUME_STATE_"))
		}
		return nil
	})
	return v, err
}

func (t *tour) volumeURL(m member, v *v1.Volume) string {
	for _, n := range t.file.Nodes {
		if n.Name == m.name {
			return fmt.Sprintf("iscsi://%s/%s/%d", n.Portal, t.file.Target, v.Lun)
		}
	}
	return ""
}

// holder is a node with a replica of a volume: with three nodes not every one has.
func (t *tour) holder(v *v1.Volume, i int) member {
	m, err := t.file.member(v.Replicas[i].Node)
	if err != nil {
		return t.file.members()[i]
	}
	return m
}

// pool is the fill of a node's store.
func (t *tour) pool(ctx context.Context, name string) (*v1.Pool, error) {
	n, err := t.client.Nodes.GetNode(ctx, &v1.GetNodeRequest{Name: name})
	if err != nil {
		return nil, err
	}
	if n.Pool == nil {
		return nil, fmt.Errorf("node %s reports no pool", name)
	}
	return n.Pool, nil
}

func (t *tour) write(ctx context.Context, image string, v *v1.Volume) error {
	through := t.holder(v, 0)
	before, err := t.pool(ctx, through.name)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := t.tool(ctx, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, t.volumeURL(through, v)); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := t.pool(ctx, through.name)
	if err != nil {
		return err
	}
	mapped, stored := after.MappedBytes-min(before.MappedBytes, after.MappedBytes), after.StoredBytes-min(before.StoredBytes, after.StoredBytes)
	t.say("   %s of data in %.1f s on both nodes; %s had to be stored (savings %s)",
		server.Size(mapped), took.Seconds(), server.Size(stored), orNone(savings(mapped, stored)))
	return nil
}

func (t *tour) writeAndCompare(ctx context.Context) error {
	v, err := t.newVolume(ctx, "tour-disk")
	if err != nil {
		return err
	}
	t.volumes[0] = v
	if err := t.write(ctx, t.image, v); err != nil {
		return err
	}
	second := t.holder(v, 1)
	if err := t.compare(ctx, second); err != nil {
		return err
	}
	t.say("   read through node %s: identical", second.name)
	return nil
}

func (t *tour) compare(ctx context.Context, through member) error {
	return t.tool(ctx, "qemu-img", "compare", "-f", "raw", "-F", "raw", t.image, t.volumeURL(through, t.volumes[0]))
}

func (t *tour) writeCopy(ctx context.Context) error {
	changed := filepath.Join(filepath.Dir(t.image), "changed.img")
	if err := t.changedCopy(changed); err != nil {
		return err
	}
	v, err := t.newVolume(ctx, "tour-copy")
	if err != nil {
		return err
	}
	t.volumes[1] = v
	if err := t.write(ctx, changed, v); err != nil {
		return err
	}
	return os.Remove(changed)
}

// changedCopy copies the image sparsely and changes one block in a hundred.
func (t *tour) changedCopy(to string) error {
	in, err := os.Open(t.image)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(t.size); err != nil {
		return err
	}
	block, zero := make([]byte, 4096), make([]byte, 4096)
	for n := int64(0); n*4096 < t.size; n++ {
		if _, err := in.ReadAt(block, n*4096); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if bytes.Equal(block, zero) {
			continue
		}
		if n%100 == 50 {
			binary.LittleEndian.PutUint64(block[2048:], uint64(n)*0x9e3779b97f4a7c15)
			if _, err := rand.Read(block[1024:1040]); err != nil {
				return err
			}
		}
		if _, err := out.WriteAt(block, n*4096); err != nil {
			return err
		}
	}
	return out.Close()
}

func (t *tour) killUnderLoad(ctx context.Context) error {
	v, err := t.client.Volumes.GetVolume(ctx, &v1.GetVolumeRequest{Name: "tour-copy"})
	if err != nil {
		return err
	}
	for i, m := range t.file.members()[:len(t.file.Nodes)] {
		switch {
		case m.name == v.Owner:
			t.owner = m
		case t.other.name == "" && holds(v, t.file.Nodes[i].Name):
			t.other = m
		}
	}
	if t.owner.name == "" || t.other.name == "" {
		return fmt.Errorf("volume %s has owner %q", v.Name, v.Owner)
	}
	client, err := api.Dial(t.other.api, "")
	if err != nil {
		return err
	}
	t.client.Close()
	t.client = client

	qemu, err := findTool("qemu-img")
	if err != nil {
		return err
	}
	loadCtx, endLoad := context.WithCancel(ctx)
	defer endLoad()
	args := []string{"bench", "-w", "-c", "10000000", "-d", "16", "-s", "4096", "-S", "36864", "--pattern=171", "-f", "raw", t.volumeURL(t.other, v)}
	t.say("   $ qemu-img %s", strings.Join(args, " "))
	load := exec.CommandContext(loadCtx, qemu, args...)
	var out bytes.Buffer
	load.Stdout, load.Stderr = &out, &out
	if err := load.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- load.Wait() }()
	defer func() { endLoad(); <-ended }()

	w := &writeWatch{client: client, node: t.other.name}
	if err := w.until(ctx, ended, &out, 2000); err != nil {
		return err
	}
	t.say("   node %s takes writes that node %s orders; killing %s", t.other.name, t.owner.name, t.owner.name)
	if err := t.owner.proc.signal(os.Kill); err != nil {
		return err
	}
	w.longest = 0
	if err := w.until(ctx, ended, &out, 2000); err != nil {
		return err
	}
	if err := t.owner.proc.wait(ctx); err != nil {
		return err
	}
	*t.owner.proc = process{}
	if err := t.file.save(t.dir); err != nil {
		return err
	}
	endLoad()
	<-ended
	ended <- nil // for the deferred wait
	if err := t.tool(ctx, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", t.image, t.volumeURL(t.other, v)); err != nil {
		return err
	}
	t.say("   node %s owns the volume now; the writer saw no error, its longest pause was %.1f s", t.other.name, w.longest.Seconds())
	s := t.ask(ctx)
	if s != nil {
		t.say("   the cluster is %s", strings.ToUpper(api.Word(s.Health, "HEALTH_")))
	}
	return nil
}

func holds(v *v1.Volume, node string) bool {
	for _, r := range v.Replicas {
		if r.Node == node {
			return true
		}
	}
	return false
}

// writeWatch measures pauses of the writes that initiators get done through one node.
type writeWatch struct {
	client  *api.Client
	node    string
	ops     uint64    // at the last look
	moved   time.Time // when ops had risen; zero: never looked
	longest time.Duration
}

// until returns when n more writes were completed. A pause counts from the last
// look that saw progress to the first that sees some again, so it is never
// understated. ended is fed when the writer ends.
func (w *writeWatch) until(ctx context.Context, ended chan error, out *bytes.Buffer, n uint64) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for done := uint64(0); ; {
		x, err := w.client.Nodes.GetNode(ctx, &v1.GetNodeRequest{Name: w.node})
		if ops := x.GetTraffic().GetWriteOps(); err == nil && ops > w.ops {
			if !w.moved.IsZero() {
				w.longest = max(w.longest, time.Since(w.moved))
				done += ops - w.ops
			}
			w.ops, w.moved = ops, time.Now()
		}
		if done >= n {
			return nil
		}
		select {
		case err := <-ended:
			ended <- err
			return fmt.Errorf("the writer ended: %v\n%s", err, bytes.TrimSpace(out.Bytes()))
		case <-ctx.Done():
			return fmt.Errorf("writes stand still for %.1f s", time.Since(w.moved).Seconds())
		case <-tick.C:
		}
	}
}

func (t *tour) resync(ctx context.Context) error {
	start := time.Now()
	last, err := t.resyncEvents(ctx, 0)
	if err != nil {
		return err
	}
	after := uint64(0)
	if len(last) > 0 {
		after = last[len(last)-1].Number
	}
	if err := t.startNode(ctx, t.owner); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := retry(ctx, func() error {
		s, err := t.client.Cluster.GetStatus(ctx, &v1.GetStatusRequest{})
		if err != nil {
			return err
		}
		return settled(s, len(t.file.Nodes), t.file.Witness != nil)
	}); err != nil {
		return err
	}
	t.say("   node %s is back in sync %.1f s after its start; only what changed was fetched:", t.owner.name, time.Since(start).Seconds())
	events, err := t.resyncEvents(ctx, after)
	for _, e := range events {
		t.say("   %s", e.Text)
	}
	return err
}

// resyncEvents are the recorded ends of resyncs.
func (t *tour) resyncEvents(ctx context.Context, after uint64) ([]*v1.Event, error) {
	stream, err := t.client.Cluster.ListEvents(ctx, &v1.ListEventsRequest{After: after})
	if err != nil {
		return nil, err
	}
	var out []*v1.Event
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if e.Code == "resync-done" {
			out = append(out, e)
		}
	}
}

func (t *tour) prove(ctx context.Context) error {
	for _, v := range t.volumes {
		r, err := t.client.Volumes.CheckVolume(ctx, &v1.CheckVolumeRequest{Name: v.Name})
		if err != nil {
			return err
		}
		if !r.Equal {
			return fmt.Errorf("the replicas of volume %s differ", v.Name)
		}
		t.say("   twinsan volume check %s: the replicas hold the same content", v.Name)
	}
	through, note := t.owner, ", which was killed"
	if !holds(t.volumes[0], through.name) {
		through, note = t.holder(t.volumes[0], 0), ""
	}
	if err := t.compare(ctx, through); err != nil {
		return err
	}
	t.say("   the image read through node %s%s: identical", through.name, note)
	return nil
}

func (t *tour) tidy(ctx context.Context) error {
	if t.keep {
		return nil
	}
	for _, v := range t.volumes {
		if _, err := t.client.Volumes.DeleteVolume(ctx, &v1.DeleteVolumeRequest{Name: v.Name, InUse: true}); err != nil {
			return err
		}
	}
	return os.RemoveAll(filepath.Join(t.dir, tourDir))
}
