package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/twinsan/twinsan/tests/lab"
)

// medianRun is the run with the median rate.
func medianRun(runs []*lab.Result) *lab.Result {
	sorted := slices.Clone(runs)
	slices.SortFunc(sorted, func(a, b *lab.Result) int {
		switch {
		case a.IOPS < b.IOPS:
			return -1
		case a.IOPS > b.IOPS:
			return 1
		}
		return 0
	})
	return sorted[(len(sorted)-1)/2]
}

// medianRatio is the median over the rounds of a's rate to b's.
func medianRatio(a, b []*lab.Result) float64 {
	var all []float64
	for i := range min(len(a), len(b)) {
		if b[i].IOPS > 0 {
			all = append(all, a[i].IOPS/b[i].IOPS)
		}
	}
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[(len(all)-1)/2]
}

// report is the table in markdown.
func (b *bench) report(m *machine) string {
	var t strings.Builder
	fmt.Fprintf(&t, "%s\n\n", m)
	fmt.Fprintf(&t, "Each cell is the median of %d measurements of %s; targets take turns within a row. CPU is the processor time of the\n", b.rounds, b.runtime)
	fmt.Fprintf(&t, "target's processes for each I/O (twinsan: both nodes together). The load generator runs on the same machine.\n")
	fmt.Fprintf(&t, "twinsan's writes are durable on both nodes; tgt keeps one copy, durable only with --fua. \"x\" is twinsan's rate divided by the row's.\n\n")
	if b.noPeerWhy != "" {
		fmt.Fprintf(&t, "**No peer: %s**\n\n", b.noPeerWhy)
	}
	t.WriteString("| access | depth | sessions | target | IOPS | MiB/s | p50 us | p99 us | CPU us/IO | x |\n|---|--:|--:|---|--:|--:|--:|--:|--:|--:|\n")
	last := ""
	for _, c := range b.results {
		where := fmt.Sprintf("| %s | %d | %d ", c.Row, c.Depth, c.Session)
		shown := where
		if where == last {
			shown = "| | | "
		}
		last = where
		op := c.median.Read
		if c.row.write {
			op = c.median.Write
		}
		if op == nil {
			op = &lab.OpStat{}
		}
		ratio := ""
		if b.cluster != nil && c.Target != "twinsan" {
			ratio = fmt.Sprintf("%.2f", c.ratio)
		}
		fmt.Fprintf(&t, "%s| %s | %.0f | %.1f | %.0f | %.0f | %.1f | %s |\n",
			shown, c.Target, c.median.IOPS, c.median.MiBs, op.Latency.P50, op.Latency.P99, c.median.CPU.TargetUS, ratio)
	}
	fmt.Fprintf(&t, "\nRepeat: make bench. One measurement: %s\n", b.results[0].Command)
	return t.String()
}
