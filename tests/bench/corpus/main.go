// Command corpus measures disk images: what is allocated in them, what of it is unique,
// and what zstd makes of it. It prints JSON; tests/bench/corpus.sh makes tables of that.
//
//	go run ./tests/bench/corpus IMAGE...
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/dedup"
)

// imageNumbers are those of one image, in bytes.
type imageNumbers struct {
	Name        string `json:"name"`
	Provisioned int64  `json:"provisioned"`
	// Allocated is what a file system of today, which unmaps, has in use: blocks of 4 KiB
	// that are not zero.
	Allocated int64 `json:"allocated"`
	// Zstd is what "zstd -3" makes of these, in order.
	Zstd int64 `json:"zstd"`
}

type numbers struct {
	Images []imageNumbers `json:"images"`
	// Unique is what is left of all images when each block of 4 KiB is kept once, and
	// UniqueZstd that in groups of 128 KiB by zstd -3: a bound for file systems which
	// find every equal block and compress in such groups.
	Unique     int64 `json:"unique"`
	UniqueZstd int64 `json:"unique_zstd"`
}

const groupBytes = 128 << 10

// corpus is what was met so far.
type corpus struct {
	seen    map[[16]byte]struct{}
	group   []byte
	encoder *zstd.Encoder
	out     []byte
	total   numbers
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "corpus:", err)
		os.Exit(1)
	}
}

func run(images []string) error {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(3)), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	c := &corpus{seen: map[[16]byte]struct{}{}, encoder: e}
	for _, path := range images {
		if err := c.image(path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	c.pack()
	return json.NewEncoder(os.Stdout).Encode(&c.total)
}

// image reads what is allocated of an image, and has it compressed beside.
func (c *corpus) image(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	n := imageNumbers{Name: strings.TrimSuffix(filepath.Base(path), ".img"), Provisioned: st.Size()}
	tool := exec.Command("zstd", "-3", "-q", "-c")
	tool.Stderr = os.Stderr
	in, err := tool.StdinPipe()
	if err != nil {
		return err
	}
	out, err := tool.StdoutPipe()
	if err != nil {
		return err
	}
	if err := tool.Start(); err != nil {
		return err
	}
	counted := make(chan error, 1)
	go func() {
		var err error
		n.Zstd, err = io.Copy(io.Discard, out)
		counted <- err
	}()
	err = c.blocks(f, st.Size(), func(block []byte) error {
		n.Allocated += int64(len(block))
		_, err := in.Write(block)
		return err
	})
	err = errors.Join(err, in.Close(), <-counted, tool.Wait())
	c.total.Images = append(c.total.Images, n)
	return err
}

// blocks calls f for each block of a sparse file that is not zero.
func (c *corpus) blocks(f *os.File, size int64, each func([]byte) error) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for start = start &^ (dedup.BlockSize - 1); start < end; start += int64(len(buf)) {
			part := buf[:min(int64(len(buf)), (end-start+dedup.BlockSize-1)&^(dedup.BlockSize-1))]
			n, err := f.ReadAt(part, start)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			clear(part[n:])
			for ; len(part) > 0; part = part[dedup.BlockSize:] {
				block := part[:dedup.BlockSize]
				if dedup.IsZero(block) {
					continue
				}
				c.meet(block)
				if err := each(block); err != nil {
					return err
				}
			}
		}
		off = end
	}
	return nil
}

func (c *corpus) meet(block []byte) {
	sum := blake3.Sum256(block)
	k := [16]byte(sum[:16])
	if _, ok := c.seen[k]; ok {
		return
	}
	c.seen[k] = struct{}{}
	c.total.Unique += int64(len(block))
	if c.group = append(c.group, block...); len(c.group) == groupBytes {
		c.pack()
	}
}

func (c *corpus) pack() {
	c.out = c.encoder.EncodeAll(c.group, c.out[:0])
	c.total.UniqueZstd += int64(min(len(c.out), len(c.group)))
	c.group = c.group[:0]
}
