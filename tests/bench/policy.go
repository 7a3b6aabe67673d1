package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/tests/lab"
)

// policyTable measures the write policy mirrored-ram beside the durable one, and tgt
// with its volatile cache and with FUA, in turns.
func (b *bench) policyTable(ctx context.Context) (_ string, err error) {
	v, err := b.cluster.CreateVolume(ctx, "ram", fmt.Sprintf("%dM", b.sizeMiB), "--write-policy", "mirrored-ram")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, b.cluster.DeleteVolume(ctx, "ram")) }()
	targets := []target{
		{label: "durable", url: b.cluster.URL(b.volume.Owner, b.volume.LUN)},
		{label: "mirrored-ram", url: b.cluster.URL(v.Owner, v.LUN)},
		{label: "mirrored-ram --fua", url: b.cluster.URL(v.Owner, v.LUN), extra: []string{"--fua"}},
	}
	if b.peer != nil {
		targets = append(targets, target{label: "tgt, volatile cache", url: b.peer.URL}, target{label: "tgt --fua", url: b.peer.URL, extra: []string{"--fua"}})
	}
	var text strings.Builder
	text.WriteString("\nWrite policies: 4K random writes a second, median latency and p99 in us, medians of the rounds\n\n| depth | target | IOPS | p50 | p99 |\n| --- | --- | --- | --- | --- |\n")
	for _, depth := range []string{"1", "32"} {
		b.say("policies, depth %s", depth)
		got := make([][]*lab.Result, len(targets))
		for range b.rounds {
			for i, t := range targets {
				args := []string{"--rw", "randwrite", "--iodepth", depth, "--runtime", fmt.Sprint(int(b.runtime.Seconds())), "--ramp", "1", "--size", fmt.Sprint(b.sizeMiB << 20)}
				res, err := lab.RunLoad(ctx, b.iscsiload, append(append(args, t.extra...), t.url)...)
				if err != nil {
					return "", fmt.Errorf("%s: %w", t.label, err)
				}
				got[i] = append(got[i], res)
			}
		}
		for i, t := range targets {
			slices.SortFunc(got[i], func(x, y *lab.Result) int { return int(x.IOPS - y.IOPS) })
			m := got[i][b.rounds/2]
			fmt.Fprintf(&text, "| %s | %s | %.0f | %.0f | %.0f |\n", depth, t.label, m.IOPS, m.Write.Latency.P50, m.Write.Latency.P99)
		}
	}
	return text.String(), nil
}
