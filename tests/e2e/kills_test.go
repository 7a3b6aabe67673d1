//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// blows are what a round of TestKills does. chance is out of ten.
var blows = []struct {
	name   string
	chance int
	limit  time.Duration // of all but one in a hundred pauses; 0: they last until both are up again
	hurt   func(*rig, *lab.Volume, *verified)
}{
	{"the owner", 5, pauseMax, killOwner},
	{"the replica", 4, pauseMax, killReplica},
	{"both", 1, 0, killBoth},
}

// percentile99 is the value that all but one in a hundred of the pauses do not exceed.
func percentile99(pauses []time.Duration) time.Duration {
	if len(pauses) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(pauses))
	return sorted[(len(sorted)*99+99)/100-1]
}

// TestKills kills the owner, its replica or both, -kills times on one cluster, each time
// under a load of its own that is read back. It prints the total after each round, and
// ends after the round under way when it is told to.
func TestKills(t *testing.T) {
	if *kills == 0 {
		t.Skip("a long run of its own: make kills KILLS=1000")
	}
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:512M"}})
	start, rounds, writes := time.Now(), 0, int64(0)
	pauses := make([][]time.Duration, len(blows))
	total := func() string {
		var kinds []string
		for i, b := range blows {
			longest := slices.Max(append(pauses[i], 0))
			kinds = append(kinds, fmt.Sprintf("%s %d times (pause: 99 %% up to %.2f s, longest %.2f s)", b.name, len(pauses[i]), percentile99(pauses[i]).Seconds(), longest.Seconds()))
		}
		return fmt.Sprintf("%d of %d rounds: %s; %d acknowledged writes, 0 lost, 0 stale, 0 corrupt, %.1f s a round",
			rounds, *kills, strings.Join(kinds, ", "), writes, time.Since(start).Seconds()/float64(max(rounds, 1)))
	}
	defer func() {
		if t.Failed() {
			t.Logf("failed in round %d; before it: %s", rounds+1, total())
		} else {
			t.Logf("total: %s", total())
		}
	}()
	for rounds < *kills && told.Err() == nil && !t.Failed() {
		kind, draw := 0, r.rand.IntN(10)
		for draw >= blows[kind].chance {
			draw -= blows[kind].chance
			kind++
		}
		pause, n := r.round(rounds+1, 8*mib, 0, blows[kind].hurt)
		if !t.Failed() {
			rounds, writes = rounds+1, writes+n
			pauses[kind] = append(pauses[kind], pause)
			t.Log(total())
		}
	}
	for i, b := range blows {
		if p := percentile99(pauses[i]); b.limit != 0 && p > b.limit {
			t.Errorf("%s killed: one in a hundred pauses is longer than %s", b.name, p)
		}
	}
}
