package sim

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var (
	seedFlag   = flag.Uint64("sim.seed", 0, "first seed; 0 takes one from the clock")
	seedsFlag  = flag.Int("sim.seeds", 6, "how many")
	lengthFlag = flag.Duration("sim.length", 60*time.Second, "virtual time with faults")
	storyFlag  = flag.Bool("sim.v", false, "tell the story")
	childFlag  = flag.Bool("sim.child", false, "results as JSON, for a campaign")
	mutantFlag = flag.String("sim.mutant", "", "the rule to switch off (build tag mutants)")
	hardFlag   = flag.Bool("sim.hard", false, "many faults and busy hosts")
	plainFlag  = flag.Bool("sim.plain", false, "no volume begins as a snapshot, as seeds were at first")
	twiceFlag  = flag.Uint64("sim.twice", 50, "every so many-th seed is run twice, and the two must be the same")
	onlyFlag   = flag.String("sim.only", "", "kinds of faults, separated by commas, instead of what the seed chooses")
)

// The sampling of allocations draws random numbers, too.
func init() {
	runtime.MemProfileRate = 0
	if deterministic {
		runtime.GOMAXPROCS(1)
	}
}

// runSeed runs a seed in a bubble of its own.
func runSeed(t *testing.T, opt Options) (res Result, took time.Duration) {
	runtime.GC()
	runtime.GC() // pools of earlier runs are empty
	time.Sleep(time.Millisecond)
	runtimeSeed(opt.Seed)
	began := time.Now()
	synctest.Test(t, func(*testing.T) { res = Run(opt) })
	return res, time.Since(began)
}

// TestSeeds runs seeds one after the other. make sim and make sim-test run many.
func TestSeeds(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a seed fits in RAM, and a collection would reorder goroutines
	if err := setMutant(*mutantFlag); err != nil {
		t.Fatal(err)
	}
	first := *seedFlag
	if first == 0 {
		first = uint64(time.Now().UnixNano()) >> 10
	}
	var story bytes.Buffer
	for i := range *seedsFlag {
		opt := Options{Seed: first + uint64(i), Length: *lengthFlag, Hard: *hardFlag, Plain: *plainFlag}
		if *onlyFlag != "" {
			opt.Only = strings.Split(*onlyFlag, ",")
		}
		if *storyFlag {
			story.Reset()
			opt.Verbose = &story
		}
		if *childFlag {
			fmt.Printf("begin %d\n", opt.Seed)
		}
		res, took := runSeed(t, opt)
		os.Stdout.Write(story.Bytes())
		if deterministic && !*storyFlag && res.Seed%*twiceFlag == 0 && res.Err == "" {
			if again, _ := runSeed(t, opt); again.Hash != res.Hash {
				res.Unequal = true
			}
		}
		if *childFlag {
			b, _ := json.Marshal(res)
			fmt.Printf("end %s\n", b)
			if res.Err != "" && *mutantFlag != "" {
				return
			}
			continue
		}
		t.Logf("seed %d hash %016x: %v in %v (%.0f times real time), %d writes, %d reads; faults: %s", res.Seed, res.Hash, res.Virtual.Round(time.Second),
			took.Round(time.Millisecond), res.Virtual.Seconds()/took.Seconds(), res.Good, res.Reads, res.Faults)
		if res.Err != "" {
			t.Errorf("seed %d: %s\nto repeat it: make sim SEED=%d SEEDS=1 LENGTH=%v STORY=1", res.Seed, res.Err, res.Seed, *lengthFlag)
		}
		if res.Unequal {
			t.Errorf("seed %d: two runs differ", res.Seed)
		}
	}
}
