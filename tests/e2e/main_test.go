//go:build e2e

package e2e

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// The lengths of a run; the defaults are those of "make test".
var (
	root        = flag.String("root", "../..", "root of the source tree")
	program     = flag.String("bin", "", "twinsan to test (default ROOT/bin/twinsan)")
	work        = flag.String("work", "", "directory for clusters (default ROOT/bin/e2e)")
	keep        = flag.Bool("keep", false, "keep the directories of tests that pass")
	imageMiB    = flag.Int64("image-mib", 64, "size of the directory tree of the disk image")
	rounds      = flag.Int("rounds", 3, "kills of each kind")
	kills       = flag.Int("kills", 0, "rounds of TestKills")
	copyMiB     = flag.Int64("copy-mib", 256, "size of the unit that is cloned")
	stormMiB    = flag.Int64("storm-mib", 256, "size of the image of which a hundred clones are read at once")
	locks       = flag.Int("locks", 3000, "COMPARE AND WRITE commands that have to win")
	absence     = flag.Duration("absence", 5*time.Second, "how long a node is away before it has to catch up")
	seedFlag    = flag.Uint64("seed", 0, "seed of what is random (0: from the clock)")
	conformRuns = flag.Int("conformance-runs", 1, "runs of the conformance suite")
	conformWith = flag.String("conformance", "", "suites of iscsi-test-cu to run, as regular expression (default: a short list; \".\" is all)")
)

// tally counts scenarios for the closing line.
var tally struct {
	sync.Mutex
	passed, failed, skipped int
}

func TestMain(m *testing.M) {
	flag.Parse()
	for _, p := range []*string{root, program, work} {
		switch {
		case p == program && *p == "":
			*p = filepath.Join(*root, "bin/twinsan")
		case p == work && *p == "":
			*p = filepath.Join(*root, "bin/e2e")
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		*p = abs
	}
	if *seedFlag == 0 {
		*seedFlag = uint64(time.Now().UnixNano())
	}
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Println("e2e: the tests left goroutines behind:", err)
		code = 1
	}
	tally.Lock()
	if code != 0 && tally.failed == 0 {
		tally.failed++ // something outside the scenarios
	}
	fmt.Printf("e2e: %d passed, %d failed, %d skipped\n", tally.passed, tally.failed, tally.skipped)
	tally.Unlock()
	os.Exit(code)
}

// scenario counts a test, and prints how to repeat it when it fails.
func scenario(t *testing.T) {
	t.Helper()
	start := time.Now()
	t.Cleanup(func() {
		tally.Lock()
		defer tally.Unlock()
		switch {
		case t.Failed():
			tally.failed++
			t.Logf("repeat: make bin/twinsan && go test -tags e2e -count 1 -timeout 1h -v ./tests/e2e -run '^%s$' -seed %d -rounds %d -image-mib %d -absence %s -conformance '%s'",
				t.Name(), *seedFlag, *rounds, *imageMiB, *absence, *conformWith)
		case t.Skipped():
			tally.skipped++
		default:
			tally.passed++
			t.Logf("passed in %.1f s", time.Since(start).Seconds())
		}
	})
}
