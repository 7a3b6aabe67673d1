//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestImage writes a disk image made of a real directory tree through one node
// with QEMU's initiator and compares it through the other; then a slightly
// changed copy, which must cost little.
func TestImage(t *testing.T) {
	scenario(t)
	imageSize := (*imageMiB*5/4 + 48) * mib
	r := up(t, lab.Options{
		DeviceSize: fmt.Sprintf("%dM", max(2048, 4**imageMiB)),
		Volumes:    []string{fmt.Sprintf("first:%dM", imageSize/mib), fmt.Sprintf("second:%dM", imageSize/mib)},
	})
	mke2fs, err := lab.Tool("mke2fs")
	r.must(err, "tools")
	qemu, err := lab.Tool("qemu-img")
	r.must(err, "tools")

	tree := filepath.Join(r.dir, "tree")
	files, err := stageTree(tree, *imageMiB*mib)
	r.must(err, "stage a directory tree")
	image := filepath.Join(r.dir, "first.img")
	_, err = lab.Run(r.ctx, mke2fs, "-q", "-t", "ext4", "-b", "4096", "-d", tree, image, fmt.Sprintf("%dM", imageSize/mib))
	r.must(err, "mke2fs")
	r.Logf("%d files, %d MiB, in an ext4 image of %d MiB", files, *imageMiB, imageSize/mib)

	first, second := r.volume("first"), r.volume("second")
	took, gain := r.convert(qemu, image, r.c.URL("a", first.LUN))
	r.Logf("qemu-img convert through a: %.1f s, %.0f MiB/s; savings on each node: %v", took.Seconds(), float64(imageSize/mib)/took.Seconds(), gain)
	_, err = lab.Run(r.ctx, qemu, "compare", "-f", "raw", "-F", "raw", image, r.c.URL("b", first.LUN))
	r.must(err, "compare through b")

	changed := filepath.Join(r.dir, "second.img")
	r.must(changedCopy(changed, image), "change the image")
	took, gain = r.convert(qemu, changed, r.c.URL("b", second.LUN))
	r.Logf("the changed copy through b: %.1f s; savings on each node: %v", took.Seconds(), gain)
	for node, x := range gain {
		if x < 1.8 {
			r.Errorf("node %s: the second image saved %.2fx, want above 1.8x", node, x)
		}
	}
	for volume, file := range map[*lab.Volume]string{first: image, second: changed} {
		for _, node := range []string{"a", "b"} {
			_, err = lab.Run(r.ctx, qemu, "compare", "-f", "raw", "-F", "raw", file, r.c.URL(node, volume.LUN))
			r.must(err, "compare %s through %s", volume.Name, node)
		}
		r.must(r.c.CheckEqual(r.ctx, volume.Name), "volume check")
	}
	r.restart()
	_, err = lab.Run(r.ctx, qemu, "compare", "-f", "raw", "-F", "raw", image, r.c.URL("b", first.LUN))
	r.must(err, "compare after a restart of everything")
}

// restart stops all nodes as a service manager does and starts them again.
func (r *rig) restart() {
	r.Helper()
	r.demo("down")
	start := time.Now()
	r.demo("up", "--detach", "--base-port", fmt.Sprint(r.c.BasePort))
	r.Logf("stopped and started everything: in sync again in %.1f s", time.Since(start).Seconds())
}

// convert writes a file to an LU and returns the savings per node: what the new
// blocks would take, divided by what they do take.
func (r *rig) convert(qemu, file, url string) (time.Duration, map[string]float64) {
	r.Helper()
	before := r.pools()
	start := time.Now()
	_, err := lab.Run(r.ctx, qemu, "convert", "-n", "-f", "raw", "-O", "raw", file, url)
	r.must(err, "convert")
	took := time.Since(start)
	gain := map[string]float64{}
	for node, after := range r.pools() {
		mapped, stored := after.Mapped-before[node].Mapped, after.Stored-before[node].Stored
		if mapped < *imageMiB*mib/2 {
			r.Errorf("node %s maps %d MiB more after an image of %d MiB of files", node, mapped/mib, *imageMiB)
		}
		gain[node] = float64(mapped) / float64(max(stored, 1))
	}
	return took, gain
}

func (r *rig) pools() map[string]lab.Pool {
	r.Helper()
	s, err := r.c.Status(r.ctx)
	r.must(err, "status")
	pools := map[string]lab.Pool{}
	for _, n := range s.Nodes {
		if n.Pool != nil {
			pools[n.Name] = *n.Pool
		}
	}
	if len(pools) != len(r.c.Nodes) {
		r.Fatalf("%d nodes report a pool: %+v", len(pools), s.Nodes)
	}
	return pools
}

var errStaged = errors.New("enough")

// stageTree copies real files of this machine to dir, about size bytes.
func stageTree(dir string, size int64) (files int, err error) {
	total := int64(0)
	from := []string{"/usr/share", "/usr/lib", "/usr/bin"}
	if out, err := lab.Run(context.Background(), "go", "env", "GOROOT", "GOMODCACHE"); err == nil {
		from = append(strings.Fields(string(out)), from...)
	}
	for _, from := range from {
		err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil // what cannot be read is left out
			}
			info, err := e.Info()
			if err != nil || info.Size() > size/8 || info.Size() == 0 {
				return nil
			}
			to := filepath.Join(dir, path)
			if _, err := os.Lstat(to); err == nil {
				return nil
			}
			if err := copyFile(to, path); err != nil {
				if errors.Is(err, fs.ErrPermission) {
					return nil
				}
				return err
			}
			files++
			if total += (info.Size() + 4095) &^ 4095; total >= size {
				return errStaged
			}
			return nil
		})
		if errors.Is(err, errStaged) {
			return files, nil
		}
		if err != nil {
			return files, err
		}
	}
	return files, fmt.Errorf("this machine has only %d MiB of readable files: use -image-mib", total/mib)
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// changedCopy copies an image sparsely and changes one block in a hundred of
// those that hold anything.
func changedCopy(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(info.Size()); err != nil {
		return err
	}
	buf, zero := make([]byte, mib), make([]byte, 4096)
	seen := uint64(0)
	for at := int64(0); at < info.Size(); at += int64(len(buf)) {
		n, err := in.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for block := range slices.Chunk(buf[:n], 4096) {
			if bytes.Equal(block, zero[:len(block)]) {
				continue
			}
			if seen++; seen%100 == 50 {
				binary.LittleEndian.PutUint64(block[len(block)/2:], seen*0x9e3779b97f4a7c15)
			}
		}
		if bytes.Count(buf[:n], []byte{0}) == n {
			continue
		}
		if _, err := out.WriteAt(buf[:n], at); err != nil {
			return err
		}
	}
	return out.Close()
}
