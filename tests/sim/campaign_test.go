package sim

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	jobsFlag  = flag.Int("sim.jobs", 0, "processes of a campaign; 0: none")
	pastFlag  = flag.String("sim.past", "", "file with seeds that failed once, to be run first")
	limitFlag = flag.Duration("sim.limit", 0, "real time after which no new seeds are begun; 0: none")
)

// batch is some seeds for one process.
type batch struct {
	first  uint64
	count  int
	length time.Duration
	plain  bool
}

// child runs a batch in a process of its own and reports each result. A process that
// dies or hangs is the result of the seed that it was at.
func child(b batch, mutant, only string, report func(Result)) {
	args := []string{"-test.run=^TestSeeds$", "-test.timeout=10m", "-sim.child",
		fmt.Sprintf("-sim.seed=%d", b.first), fmt.Sprintf("-sim.seeds=%d", b.count), fmt.Sprintf("-sim.length=%v", b.length)}
	if mutant != "" {
		args = append(args, "-sim.mutant="+mutant)
	}
	if only != "" {
		args = append(args, "-sim.only="+only)
	}
	args = append(args, fmt.Sprintf("-sim.twice=%d", *twiceFlag))
	if b.plain {
		args = append(args, "-sim.plain")
	}
	if *hardFlag {
		args = append(args, "-sim.hard")
	}
	spawn(b.first, args, 2*time.Minute, report)
}

// childScenario runs a scenario with a mutant in a process of its own.
func childScenario(name, mutant string, report func(Result)) {
	spawn(1, []string{"-test.run=^TestScenarios$", "-test.timeout=10m", "-sim.child", "-sim.scenario=" + name, "-sim.mutant=" + mutant, fmt.Sprintf("-sim.seed=%d", *seedFlag)}, 30*time.Second, report)
}

// spawn starts this binary and reports each result that it tells. It kills what tells
// nothing for longer than patient.
func spawn(first uint64, args []string, patient time.Duration, report func(Result)) {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "GOMAXPROCS=1")
	var noise strings.Builder
	c.Stderr = &noise
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		report(Result{Seed: first, Err: err.Error()})
		return
	}
	hung := time.AfterFunc(patient, func() { c.Process.Kill() })
	defer hung.Stop()
	at := uint64(0)
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if s, ok := strings.CutPrefix(line, "begin "); ok {
			at, _ = strconv.ParseUint(s, 10, 64)
			hung.Reset(patient)
		} else if s, ok := strings.CutPrefix(line, "end "); ok {
			var r Result
			if err := json.Unmarshal([]byte(s), &r); err != nil {
				r = Result{Seed: at, Err: err.Error()}
			}
			report(r)
			at = 0
		} else if at != 0 {
			noise.WriteString(line + "\n")
		}
	}
	if err := c.Wait(); at != 0 {
		text := noise.String()
		if i := strings.Index(text, "panic: "); i >= 0 {
			text = text[i:]
		}
		report(Result{Seed: at, Err: fmt.Sprintf("the process ended (%v): %s", err, text[:min(len(text), 3000)])})
	}
}

// past reads the file of seeds that failed once: seed, length, and what it was.
func past(t *testing.T, file string) (list []batch) {
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 || strings.HasPrefix(f[0], "#") {
			continue
		}
		seed, err := strconv.ParseUint(f[0], 10, 64)
		text, births := strings.CutSuffix(f[1], "+")
		length, err2 := time.ParseDuration(text)
		if err != nil || err2 != nil {
			t.Fatalf("%s: %q", file, line)
		}
		list = append(list, batch{seed, 1, length, !births})
	}
	return list
}

// TestCampaign runs many seeds in several processes.
func TestCampaign(t *testing.T) {
	if *jobsFlag == 0 {
		t.Skip("started by make sim and make sim-test")
	}
	first := *seedFlag
	if first == 0 {
		first = uint64(time.Now().UnixNano()) >> 10
	}
	began := time.Now()
	work := make(chan batch)
	go func() {
		defer close(work)
		for _, b := range past(t, *pastFlag) {
			work <- b
		}
		const size = 20
		for i := 0; i < *seedsFlag; i += size {
			if *limitFlag > 0 && time.Since(began) > *limitFlag {
				return
			}
			work <- batch{first + uint64(i), min(size, *seedsFlag-i), *lengthFlag, *plainFlag}
		}
	}()
	var mu sync.Mutex
	var virtual time.Duration
	seeds, fresh, good, reads, failed, twice, unequal := 0, 0, 0, 0, 0, 0, 0
	report := func(r Result, b batch) {
		mu.Lock()
		defer mu.Unlock()
		if seeds++; r.Seed >= first && r.Seed < first+uint64(*seedsFlag) {
			fresh++
		}
		virtual += r.Virtual
		good += r.Good
		reads += r.Reads
		if r.Seed%*twiceFlag == 0 && r.Err == "" {
			twice++
			virtual += r.Virtual
		}
		if r.Unequal {
			unequal++
			fmt.Printf("seed %d: two runs differ\n", r.Seed)
			t.Errorf("seed %d: two runs differ", r.Seed)
		}
		if r.Err != "" {
			failed++
			fmt.Printf("FAILED seed %d: %s\n", r.Seed, r.Err)
			t.Errorf("seed %d: %s\nto repeat it: tests/sim.sh story -sim.seed=%d -sim.seeds=1 -sim.length=%v -sim.plain=%v", r.Seed, r.Err, r.Seed, b.length, b.plain)
		}
	}
	var jobs sync.WaitGroup
	for range *jobsFlag {
		jobs.Go(func() {
			for b := range work {
				child(b, "", *onlyFlag, func(r Result) { report(r, b) })
			}
		})
	}
	jobs.Wait()
	took := time.Since(began)
	fmt.Printf("sim: %d of %d seeds from %d on, and %d past failures: %d failed; %.1f hours simulated in %v (%.0f times real time); %d writes, %d reads; of %d seeds run twice %d differed\n",
		fresh, *seedsFlag, first, seeds-fresh, failed, virtual.Hours(), took.Round(time.Second), virtual.Seconds()/took.Seconds(), good, reads, twice, unequal)
}
