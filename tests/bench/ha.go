package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/twinsan/twinsan/replication"
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
// beside what the disk and a TLS connection give. Nobody else works.
func (b *bench) haTable(ctx context.Context) (string, error) {
	part := b.sizeMiB << 20 / 2
	var t strings.Builder
	t.WriteString("\nResync of a replica, both nodes and their disks on one machine, nobody else works\n\n" +
		"| the replica was | changed MiB | compared MiB | sent MiB | sent / changed | took s | MiB/s | disk MiB/s | link MiB/s | of the lesser | owner CPU s/GiB | replica CPU s/GiB |\n" +
		"|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	var disk, link lab.Rate
	for _, r := range haRows {
		var err error
		if b.volume, err = b.cluster.Volume(ctx, volumeName); err != nil {
			return "", err
		}
		if disk, err = lab.DiskLimit(b.dir, part); err != nil {
			return "", err
		}
		if link, err = lab.LinkLimit(part, nil, replication.Records); err != nil {
			return "", err
		}
		b.say("resync: %s; the disk gives %s, a link %s", r.name, disk, link)
		_, _, _, before, err := b.lastResync(ctx)
		if err != nil {
			return "", err
		}
		pids := b.pids()
		changed, err := r.fall(ctx, b, part)
		if err == nil {
			err = b.cluster.Reload()
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", r.name, err)
		}
		// Of a process that was started meanwhile, its start counts as well.
		used := map[string]time.Duration{}
		for name, pid := range b.pids() {
			if pid == pids[name] {
				used[name] = lab.CPU(pid)
			}
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
		gib := float64(sent) / (1 << 30)
		cpu := map[string]float64{}
		for name, pid := range b.pids() {
			cpu[name] = (lab.CPU(pid) - used[name]).Seconds() / gib
		}
		if err := b.cluster.WaitHealthy(ctx, 5*time.Minute); err != nil {
			return "", fmt.Errorf("%s: %w", r.name, err)
		}
		if b.volume, err = b.cluster.Volume(ctx, volumeName); err != nil {
			return "", err
		}
		rate := 1024 * gib / took.Seconds()
		row := fmt.Sprintf("| %s | %d | %d | %d | %.2f | %.2f | %.0f | %.0f | %.0f | %.0f %% | %.1f | %.1f |\n",
			r.name, changed>>20, chunks, sent>>20, float64(sent)/float64(changed), took.Seconds(), rate, disk.MiBps, link.MiBps,
			100*rate/min(disk.MiBps, link.MiBps), cpu[b.volume.Owner], cpu[b.volume.Other()])
		b.say("%s", strings.TrimSpace(row))
		t.WriteString(row)
	}
	fmt.Fprintf(&t, "\nBefore each row: %d MiB are read from one file and written to another at the same time, past the page cache, and flushed (disk; %.2f processor seconds for each GiB); "+
		"as much is sent through TLS over loopback and thrown away (link; %.2f).\n", part>>20, disk.CPUSeconds, link.CPUSeconds)
	return t.String(), nil
}

// pids are the processes of the data nodes, by name.
func (b *bench) pids() map[string]int {
	all := map[string]int{}
	for _, n := range b.cluster.Nodes {
		all[n.Name] = n.PID
	}
	return all
}
