// Command overlay makes the simulator's runtime: copies of some files of the installed
// Go's standard library in which everything that is drawn inside of a synctest bubble
// comes from one seed. It writes them and a file for "go build
// -overlay" below the directory that it is given.
//
// What changes: the order of the cases of a select, of timers of one instant, of
// semaphores, of iteration over maps, and of runnable goroutines (as under the race
// detector) come from one stream while a goroutine of a bubble runs; no
// goroutine is preempted for having run long; hashes of maps start from a fixed seed; no
// mutex looks at how long it was waited for; a
// context cancels its children in the order in which they were made; time passes while a
// goroutine waits for a mutex.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

type edit struct{ old, new string }

var edits = map[string][]edit{
	"context/context.go": {
		{"	children map[canceler]struct{} // set", "	order    []canceler\n	children map[canceler]struct{} // set"},
		{"			p.children[child] = struct{}{}", "			p.children[child] = struct{}{}\n			p.order = append(p.order, child)"},
		{"	for child := range c.children {\n", "	for _, child := range c.order {\n		if _, ok := c.children[child]; !ok {\n			continue\n		}\n"},
		{"	c.children = nil\n", "	c.children, c.order = nil, nil\n"},
	},
	"runtime/rand.go": {
		{"	seed := &globalRand.seed\n", "	startupRand = nil\n	seed := &globalRand.seed\n"},
		{"		if readRandom(seed[:]) != len(seed) || allZero(seed[:]) {", "		for i := range seed {\n			seed[i] = byte(i*7 + 1)\n		}\n		if false {"},
		{"	return uint32(rand())\n}\n\n// rand returns", "	return simRand()\n}\n\n// rand returns"},
		{"func maps_rand() uint64 {\n	return rand()", "func maps_rand() uint64 {\n	return uint64(simRand())<<32 | uint64(simRand())"},
		{"// rand32 is uint32(rand())", `var (
	simOn     bool
	simTimers bool // timers of the bubble run, and no goroutine
	simState  uint64
)

//go:nosplit
func simNext() uint32 {
	simState += 0x9e3779b97f4a7c15
	z := simState
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return uint32((z ^ z>>31) >> 32)
}

// simRand is for what is drawn the same number of times in every run of a seed.
//
//go:nosplit
func simRand() uint32 {
	if gp := getg().m.curg; simOn && (simTimers || gp != nil && gp.bubble != nil) {
		return simNext()
	}
	return uint32(rand())
}

//go:linkname simSeed github.com/twinsan/twinsan/tests/sim.runtimeSeed
func simSeed(seed uint64) {
	simOn, simState = true, seed
	getg().m.p.ptr().schedtick = 0
}

// rand32 is uint32(rand())`},
	},
	"runtime/synctest.go": {
		{"			gp.bubble.timers.check(bubble.now, bubble)\n", "			simTimers = true\n			gp.bubble.timers.check(bubble.now, bubble)\n			simTimers = false\n"},
	},
	// A lock that is held over I/O is held while
	// virtual time passes; without this the bubble would stand still.
	"runtime/runtime2.go": {
		{"	waitReasonSyncCondWait:          true,\n", "	waitReasonSyncCondWait:          true,\n	waitReasonSyncMutexLock: true,\n	waitReasonSyncRWMutexLock: true,\n	waitReasonSyncRWMutexRLock: true,\n"},
	},
	// Speed: goroutines begin with a stack that most of them never outgrow, and memory that
	// a seed leaves is kept for the next one.
	"runtime/stack.go": {
		{"var startingStackSize uint32 = fixedStack", "var startingStackSize uint32 = 16384"},
		{"	if debug.adaptivestackstart == 0 {", "	if true {"},
	},
	"runtime/mgcscavenge.go": {{"	if lastHeapGoal == 0 {", "	if true {"}},
	"internal/sync/mutex.go": {{"starvationThresholdNs = 1e6", "starvationThresholdNs = 1e18"}},
	"runtime/select.go":      {{"cheaprandn(uint32(norder + 1))", "uint32(uint64(simRand()) * uint64(norder+1) >> 32)"}},
	"runtime/sema.go":        {{"s.ticket = cheaprand() | 1", "s.ticket = simRand() | 1"}},
	"runtime/time.go":        {{"t.rand = cheaprand()", "t.rand = simRand()"}},
	"runtime/proc.go": {
		{"const forcePreemptNS = 10 * 1000 * 1000 // 10ms", "const forcePreemptNS = 1 << 60"},
		{"const randomizeScheduler = raceenabled", "const randomizeScheduler = true"},
		{"newg = malg(stackMin)", "newg = malg(16384)"},
		// A goroutine of the runtime comes at its own times: it must not push one of the bubble back.
		{"if randomizeScheduler && next && randn(2) == 0 {", "if simOn && gp.bubble == nil {\n\t\tnext = false\n\t}\n\tif randomizeScheduler && next && simRand()&1 == 0 {"},
	},
}

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "overlay:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return err
	}
	src := filepath.Join(strings.TrimSpace(string(out)), "src")
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	replace := map[string]string{}
	for name, list := range edits {
		b, err := os.ReadFile(filepath.Join(src, name))
		if err != nil {
			return err
		}
		text := string(b)
		for _, e := range list {
			if strings.Count(text, e.old) != 1 {
				return fmt.Errorf("%s of this version of Go does not have %q once; the simulator's runtime must be adapted", name, e.old)
			}
			text = strings.Replace(text, e.old, e.new, 1)
		}
		to := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(to, []byte(text), 0o644); err != nil {
			return err
		}
		replace[filepath.Join(src, name)] = to
	}
	b, err := json.MarshalIndent(map[string]any{"Replace": replace}, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "overlay.json"), b, 0o644)
}
