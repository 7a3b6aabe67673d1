package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twinsan/twinsan/tests/lab"
)

// haRow is one way in which a replica falls behind. It returns how much of the volume
// has changed by then, in bytes; the cluster is on its way back when it returns.
type haRow struct {
	name string
	fall func(ctx context.Context, b *bench, bytes int64) (changed int64, err error)
}

var haRows = []haRow{
	{"away while a part was rewritten", func(ctx context.Context, b *bench, bytes int64) (int64, error) {
		away := b.volume.Other()
		err := b.demo(ctx, "kill", away)
		if err == nil {
			err = b.rewrite(ctx, "write", "1m", bytes)
		}
		if err == nil {
			err = b.demo(ctx, "start", away)
		}
		return bytes, err
	}},
	{"away while single 4K blocks were rewritten", func(ctx context.Context, b *bench, bytes int64) (int64, error) {
		away := b.volume.Other()
		if err := b.demo(ctx, "kill", away); err != nil {
			return 0, err
		}
		blocks := b.sizeMiB << 20 / 4096
		if _, err := lab.RunLoad(ctx, b.iscsiload, "--rw", "randwrite", "--bs", "4k", "--iodepth", "32", "--size", fmt.Sprint(b.sizeMiB<<20),
			"--ops", fmt.Sprint(blocks/8), b.cluster.URL(b.volume.Owner, b.volume.LUN)); err != nil {
			return 0, err
		}
		// Some were written twice: of n draws from m blocks m(1-(1-1/m)^n) are distinct.
		return distinct(float64(blocks/8), float64(blocks)) * 4096, b.demo(ctx, "start", away)
	}},
	{"the same part, then the other node killed too", func(ctx context.Context, b *bench, bytes int64) (int64, error) {
		owner, away := b.volume.Owner, b.volume.Other()
		err := b.demo(ctx, "kill", away)
		if err == nil {
			err = b.rewrite(ctx, "write", "1m", bytes)
		}
		for _, step := range [][]string{{"kill", owner}, {"start", away}, {"start", owner}} {
			if err == nil {
				err = b.demo(ctx, step...)
			}
		}
		return bytes, err
	}},
	{"a new replica", func(ctx context.Context, b *bench, _ int64) (int64, error) {
		other := b.volume.Other()
		if _, err := b.cluster.CLI(ctx, "volume", "replica", "remove", volumeName, other, "--yes", "--force"); err != nil {
			return 0, err
		}
		_, err := b.cluster.CLI(ctx, "volume", "replica", "add", volumeName, other)
		return b.sizeMiB << 20, err
	}},
}

// distinct is how many different blocks n random writes to m blocks reach.
func distinct(n, m float64) int64 {
	left := 1.0
	for base, e := 1-1/m, int64(n); e > 0; e >>= 1 { // base to the power of n
		if e&1 == 1 {
			left *= base
		}
		base *= base
	}
	return int64(m * (1 - left))
}

func (b *bench) demo(ctx context.Context, args ...string) error {
	_, err := b.cluster.Demo(ctx, args...)
	return err
}

// rewrite writes new content to the first part of the volume.
func (b *bench) rewrite(ctx context.Context, rw, bs string, bytes int64) error {
	_, err := lab.RunLoad(ctx, b.iscsiload, "--rw", rw, "--once", "--bs", bs, "--iodepth", "8", "--size", fmt.Sprint(bytes), b.cluster.URL(b.volume.Owner, b.volume.LUN))
	return err
}

var resyncDone = regexp.MustCompile(`node \d+ is in sync again: (\d+) chunks compared, (\d+) bytes sent in (\S+)`)

// lastResync is what the newest resync of the cluster's events did, and how many there were.
func (b *bench) lastResync(ctx context.Context) (chunks, bytes int64, took time.Duration, count int, err error) {
	out, err := b.cluster.CLI(ctx, "events")
	if err != nil {
		return 0, 0, 0, 0, err
	}
	all := resyncDone.FindAllStringSubmatch(string(out), -1)
	if len(all) == 0 {
		return 0, 0, 0, 0, nil
	}
	last := all[len(all)-1]
	chunks, _ = strconv.ParseInt(last[1], 10, 64)
	bytes, _ = strconv.ParseInt(last[2], 10, 64)
	took, err = time.ParseDuration(last[3])
	return chunks, bytes, took, len(all), err
}

// haTable measures resyncs: what they move beside what has changed, and how fast
// beside what the disk takes. Nobody else works.
func (b *bench) haTable(ctx context.Context) (string, error) {
	part := b.sizeMiB << 20 / 2
	var t strings.Builder
	t.WriteString("\nResync of a replica, both nodes and their disks on one machine, nobody else works\n\n" +
		"| the replica was | changed MiB | compared MiB | sent MiB | sent / changed | took s | MiB/s | of the disk |\n|---|--:|--:|--:|--:|--:|--:|--:|\n")
	var disks []float64
	for _, r := range haRows {
		var err error
		if b.volume, err = b.cluster.Volume(ctx, volumeName); err != nil {
			return "", err
		}
		disk, err := diskRate(filepath.Join(b.dir, "reference"), part)
		if err != nil {
			return "", err
		}
		disks = append(disks, disk)
		b.say("resync: %s; the disk takes %.0f MiB/s", r.name, disk)
		_, _, _, before, err := b.lastResync(ctx)
		if err != nil {
			return "", err
		}
		changed, err := r.fall(ctx, b, part)
		if err != nil {
			return "", fmt.Errorf("%s: %w", r.name, err)
		}
		var chunks, sent int64
		var took time.Duration
		if err := lab.Until(ctx, 10*time.Minute, func() error {
			var count int
			var e error
			if chunks, sent, took, count, e = b.lastResync(ctx); e == nil && count <= before {
				e = errors.New("no resync has ended")
			}
			return e
		}); err != nil {
			return "", fmt.Errorf("%s: %w", r.name, err)
		}
		if err := b.cluster.WaitHealthy(ctx, 5*time.Minute); err != nil {
			return "", fmt.Errorf("%s: %w", r.name, err)
		}
		rate := float64(sent) / (1 << 20) / took.Seconds()
		row := fmt.Sprintf("| %s | %d | %d | %d | %.2f | %.2f | %.0f | %.0f %% |\n",
			r.name, changed>>20, chunks, sent>>20, float64(sent)/float64(changed), took.Seconds(), rate, 100*rate/disk)
		b.say("%s", strings.TrimSpace(row))
		t.WriteString(row)
	}
	low, high := disks[0], disks[0]
	for _, d := range disks {
		low, high = min(low, d), max(high, d)
	}
	fmt.Fprintf(&t, "\nThe disk: %d MiB of random content, written in pieces of 1 MiB past the page cache and flushed, before each row: %.0f to %.0f MiB/s.\n", part>>20, low, high)
	return t.String(), nil
}

// diskRate writes a file past the page cache, flushes it and returns MiB/s.
func diskRate(path string, bytes int64) (_ float64, err error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EINVAL) { // no such thing on this file system
		fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd), os.Remove(path)) }()
	if err := unix.Fallocate(fd, 0, 0, bytes); err != nil {
		return 0, err
	}
	const piece = 1 << 20
	p, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(p)) }()
	rand.Read(p)
	start := time.Now()
	for off := int64(0); off < bytes; off += piece {
		if _, err := unix.Pwrite(fd, p, off); err != nil {
			return 0, err
		}
	}
	if err := unix.Fdatasync(fd); err != nil {
		return 0, err
	}
	return float64(bytes) / (1 << 20) / time.Since(start).Seconds(), nil
}
