package main

import (
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

func runsOf(rates ...float64) []*lab.Result {
	var all []*lab.Result
	for _, r := range rates {
		all = append(all, &lab.Result{IOPS: r, Write: &lab.OpStat{IOPS: r}})
	}
	return all
}

func TestMedians(t *testing.T) {
	for _, c := range []struct {
		rates []float64
		want  float64
	}{{[]float64{7}, 7}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 2}, 2}, {[]float64{1, 100, 3, 2, 50}, 3}} {
		if got := medianRun(runsOf(c.rates...)).IOPS; got != c.want {
			t.Errorf("median of %v: %v, want %v", c.rates, got, c.want)
		}
	}
	// The ratio is formed within a turn: a machine that slows down between turns
	// does not change it.
	if got := medianRatio(runsOf(200, 20, 2), runsOf(100, 10, 1)); got != 2 {
		t.Errorf("ratio %v, want 2", got)
	}
	if got := medianRatio(runsOf(200), runsOf(0)); got != 0 {
		t.Errorf("ratio to nothing %v, want 0", got)
	}
}

// Every access of the list is measured on twinsan, writes against both kinds of
// tgt, reads against the one that reads from the same place.
func TestRowsMeetTheirTargets(t *testing.T) {
	b := &bench{
		cluster: &lab.Cluster{File: lab.File{Nodes: []lab.FileNode{{Name: "a"}, {Name: "b"}}}},
		volume:  &lab.Volume{Owner: "a", Replicas: []lab.Replica{{Node: "a"}, {Node: "b"}}}, peer: &lab.Peer{},
	}
	depths := map[int]bool{}
	for _, r := range rows(1 << 30) {
		depths[r.depth*100+r.sessions] = true
		var labels []string
		for _, target := range b.targets() {
			if target.takes(r) {
				labels = append(labels, target.label)
			}
		}
		got := strings.Join(labels, "; ")
		want := map[bool]string{true: "tgt --fua; tgt, volatile cache", false: "tgt, page cache"}[r.write]
		if r.access == "uncached" {
			want = "tgt, direct"
		}
		if !strings.HasPrefix(got, "twinsan") || !strings.HasSuffix(got, want) {
			t.Errorf("%s depth %d x %d is measured on %s", r.name(), r.depth, r.sessions, got)
		}
		if r.write != strings.Contains(r.name(), "write") {
			t.Errorf("write %t is called %q", r.write, r.name())
		}
	}
	for _, want := range []int{101, 104, 3201, 3204} {
		if !depths[want] {
			t.Errorf("no row with depth %d and %d sessions", want/100, want%100)
		}
	}
}

func TestReport(t *testing.T) {
	r := row{write: true, random: true, bs: "4k", depth: 32, sessions: 1}
	b := &bench{cluster: &lab.Cluster{}, rounds: 1, runtime: time.Second, noPeerWhy: "tgt stays away"}
	for _, c := range []struct {
		target string
		rate   float64
	}{{"twinsan", 3000}, {"tgt --fua", 1500}} {
		b.results = append(b.results, cellResult{Row: r.name(), Depth: 32, Session: 1, Target: c.target, Command: "bin/iscsiload",
			median: runsOf(c.rate)[0], ratio: 3000 / c.rate, row: r})
	}
	text := b.report(&machine{CPU: "Test", Cores: 2})
	for _, want := range []string{
		"| 4K random write | 32 | 1 | twinsan | 3000 | 0.0 | 0 | 0 | 0.0 |  |\n",
		"| | | | tgt --fua | 1500 | 0.0 | 0 | 0 | 0.0 | 2.00 |\n",
		"**No peer: tgt stays away**", "Machine: Test, 2 cores",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
}
