package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/tests/lab"
)

// mirrorRows are what the mirror is held against: the same load on a cluster of
// one node, which orders, reduces and flushes as the owner of two does.
var mirrorRows = []struct {
	name string
	args []string
}{
	{"4K random write, depth 1", []string{"--rw", "randwrite", "--iodepth", "1"}},
	{"4K random write, depth 32", []string{"--rw", "randwrite", "--iodepth", "32"}},
	{"1M write, depth 4", []string{"--rw", "write", "--bs", "1m", "--iodepth", "4"}},
	{"4K random read, depth 32", []string{"--rw", "randread", "--iodepth", "32", "--size", "128m"}},
}

// startAlone brings up a cluster of one node with a volume of the same name. The caller cleans it.
func (b *bench) startAlone(ctx context.Context) (*lab.Cluster, error) {
	b.say("starting one node alone")
	return lab.Up(ctx, lab.Options{
		Binary: b.binary, Dir: filepath.Join(b.dir, "alone"), DeviceSize: fmt.Sprintf("%dM", max(8*b.sizeMiB, 8192)), DataNodes: 1,
		Volumes: []string{fmt.Sprintf("%s:%dM", volumeName, 2*b.sizeMiB)},
	})
}

// mirrorTable measures one node beside two. Both copies of the two share the
// machine, so it shows processor time and the disk twice, not the network.
func (b *bench) mirrorTable(ctx context.Context) (_ string, err error) {
	alone, err := b.startAlone(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, alone.Clean()) }()
	v, err := alone.Volume(ctx, volumeName)
	if err != nil {
		return "", err
	}
	urls := []string{alone.URL(v.Owner, v.LUN), b.cluster.URL(b.volume.Owner, b.volume.LUN)}
	var text strings.Builder
	text.WriteString("\nMirrored writes beside those of one node, MiB/s, medians\n\n| row | one node | two nodes | ratio |\n| --- | --- | --- | --- |\n")
	for _, row := range mirrorRows {
		b.say("%s", row.name)
		got := [2][]float64{}
		for range b.rounds {
			for i, url := range urls {
				args := append(slices.Clone(row.args), "--failover", "--runtime", fmt.Sprint(int(b.runtime.Seconds())), "--ramp", "1")
				if !slices.Contains(row.args, "--size") {
					args = append(args, "--size", fmt.Sprint(b.sizeMiB<<20))
				}
				res, err := lab.RunLoad(ctx, b.iscsiload, append(args, url)...)
				if err != nil {
					return "", fmt.Errorf("%s: %w", row.name, err)
				}
				got[i] = append(got[i], res.MiBs)
			}
		}
		for i := range got {
			slices.Sort(got[i])
		}
		one, two := got[0][b.rounds/2], got[1][b.rounds/2]
		fmt.Fprintf(&text, "| %s | %.1f | %.1f | %.2f |\n", row.name, one, two, two/one)
	}
	return text.String(), nil
}
