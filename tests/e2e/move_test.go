//go:build e2e

package e2e

import (
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// moveMax is the longest pause that a planned move may cause.
const moveMax = time.Second

// TestMove gives a volume back and forth under verified load on both paths: no
// command fails, and nothing but a short pause is seen.
func TestMove(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:512M"}})
	load := r.verify(r.both(r.volume("demo").LUN), 0, 64*mib, "--iodepth", "8")
	moves, longest := 0, time.Duration(0)
	for range 10 * *rounds {
		start := time.Now()
		r.moveTo("demo", r.volume("demo").Other())
		moves, longest = moves+1, max(longest, time.Since(start))
		load.progress(50, 30*time.Second)
	}
	result := load.stop()
	if result.Failover.Losses != 0 || result.Errors.SCSI != 0 {
		r.Errorf("the initiator saw %+v, %+v", result.Failover, result.Errors)
	}
	if pause := time.Duration(result.Failover.MaxGapMS * float64(time.Millisecond)); pause > moveMax {
		r.Errorf("the initiator waited %s, allowed are %s", pause, moveMax)
	}
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL("a", r.volume("demo").LUN))
	r.Logf("%d moves, the longest took %s; %d writes, longest pause %.0f ms", moves, longest.Round(time.Millisecond), load.acked(), result.Failover.MaxGapMS)
}
