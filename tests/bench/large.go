package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/tests/lab"
)

// largeRows are commands of 1 MiB in order. Half: the data compresses two to one.
var largeRows = []struct {
	name  string
	write bool
	args  []string
}{
	{"write", true, []string{"--rw", "write"}},
	{"write, data that compresses 2:1", true, []string{"--rw", "write", "--compress", "50"}},
	{"read, uncached", false, []string{"--rw", "read"}},
}

// place is a volume that largeTable measures, or tgt's.
type place struct {
	label   string
	cluster *lab.Cluster // nil: tgt
	volume  string
	write   []string // flags for writes
	writes  bool     // is not measured by reads
}

// largeTable measures commands of 1 MiB: one node, two nodes, and both without looking for
// duplicates and without compressing. The last ones are what a write would cost if that
// were put off, and the background did it for nothing.
func (b *bench) largeTable(ctx context.Context) (_ string, err error) {
	alone, err := b.startAlone(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, alone.Clean()) }()
	v, err := alone.Volume(ctx, volumeName)
	if err != nil {
		return "", err
	}
	if _, err := lab.RunLoad(ctx, b.iscsiload, "--rw", "write", "--once", "--bs", "1m", "--iodepth", "8",
		"--size", fmt.Sprint(b.sizeMiB<<20), alone.URL(v.Owner, v.LUN)); err != nil {
		return "", err // reads are to find something
	}
	const plain = "plain"
	for _, c := range []*lab.Cluster{alone, b.cluster} {
		if _, err := c.CreateVolume(ctx, plain, fmt.Sprintf("%dM", b.sizeMiB), "--no-compress", "--no-dedup"); err != nil {
			return "", err
		}
	}
	defer func() { err = errors.Join(err, b.cluster.DeleteVolume(ctx, plain)) }()
	places := []place{
		{label: "one node", cluster: alone, volume: volumeName},
		{label: "two nodes", cluster: b.cluster, volume: volumeName},
		{label: "one node, nothing reduced", cluster: alone, volume: plain, writes: true},
		{label: "two nodes, nothing reduced", cluster: b.cluster, volume: plain, writes: true},
	}
	if b.peer != nil {
		places = append(places, place{label: "tgt", write: []string{"--fua"}})
	}
	var text strings.Builder
	text.WriteString("\n1 MiB commands in order, medians; CPU is of the target's processes, all nodes together; tgt writes with --fua and reads direct\n\n" +
		"| access | depth | target | MiB/s | p50 ms | CPU us/MiB | of tgt |\n| --- | --: | --- | --: | --: | --: | --: |\n")
	for _, row := range largeRows {
		for _, depth := range []int{4, 16} {
			of := slices.DeleteFunc(slices.Clone(places), func(p place) bool { return p.writes && !row.write })
			got := make([][]*lab.Result, len(of))
			for range b.rounds {
				for i, p := range of {
					args := append(slices.Clone(row.args), "--bs", "1m", "--iodepth", fmt.Sprint(depth), "--ramp", "1",
						"--runtime", lab.Seconds(b.runtime), "--size", fmt.Sprint(b.sizeMiB<<20))
					res, err := b.large(ctx, p, row.write, args)
					if err != nil {
						return "", fmt.Errorf("%s: %w", p.label, err)
					}
					b.say("1M %s, depth %d: %-26s %8.1f MiB/s %8.0f us CPU", row.name, depth, p.label, res.MiBs, res.CPU.TargetUS)
					got[i] = append(got[i], res)
				}
			}
			for i, p := range of {
				m, ratio := medianRun(got[i]), "" // of the rates, round by round: they were measured one after the other
				if b.peer != nil && p.cluster != nil {
					ratio = fmt.Sprintf("%.2f", medianRatio(got[i], got[len(of)-1]))
				}
				op := m.Read
				if row.write {
					op = m.Write
				}
				fmt.Fprintf(&text, "| %s | %d | %s | %.0f | %.1f | %.0f | %s |\n", row.name, depth, p.label, m.MiBs, op.Latency.P50/1000, m.CPU.TargetUS, ratio)
			}
		}
	}
	return text.String(), nil
}

// large is one measurement, at the owner of the moment.
func (b *bench) large(ctx context.Context, p place, write bool, args []string) (*lab.Result, error) {
	if p.cluster == nil {
		url := b.peer.DirectURL
		if write {
			url = b.peer.URL
			args = append(args, p.write...)
		}
		return lab.RunLoad(ctx, b.iscsiload, append(args, "--pid", fmt.Sprint(b.peer.PID), url)...)
	}
	v, err := p.cluster.Volume(ctx, p.volume)
	if err != nil {
		return nil, err
	}
	var pids []string
	for _, n := range p.cluster.Nodes {
		pids = append(pids, fmt.Sprint(n.PID))
	}
	return lab.RunLoad(ctx, b.iscsiload, append(args, "--pid", strings.Join(pids, ","), p.cluster.URL(v.Owner, v.LUN))...)
}
