//go:build e2e

package e2e

import (
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestMirroredRAM: a volume with a volatile write cache. Power losses of one node lose
// nothing at all. Losses of both, with devices that forget what was not flushed, lose
// nothing that was flushed or written with FUA, and leave equal copies.
func TestMirroredRAM(t *testing.T) {
	checkedOnly(t)
	for _, x := range []struct {
		name, percent string
		both          bool
	}{{"owner", "0", false}, {"both", "0", true}, {"both half", "50", true}} {
		t.Run(x.name, func(t *testing.T) {
			t.Setenv("TWINSAN_VOLATILE", x.percent)
			scenario(t)
			r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:512M"}})
			_, err := r.c.CLI(r.ctx, "volume", "set", "demo", "--write-policy", "mirrored-ram")
			r.must(err, "policy")
			for round := 1; round <= *rounds; round++ {
				more := []string{"--failover", "--io-timeout", "20", "--iodepth", "8"}
				if x.both {
					more = append(more, "--volatile", "--sync-every", "64")
					r.volatile = true
				}
				load := r.verify(r.both(r.volume("demo").LUN), 0, 32*mib, more...)
				load.progress(100+r.rand.Int64N(3000), 30*time.Second)
				v := r.volume("demo")
				if x.both {
					killBoth(r, v, load)
				} else {
					killOwner(r, v, load)
				}
				r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "round %d: recovery", round)
				load.progress(100, 30*time.Second)
				load.stop()
				r.must(r.c.CheckEqual(r.ctx, "demo"), "round %d: volume check", round)
				load.check(r.c.URL([]string{"a", "b"}[round%2], v.LUN))
				r.Logf("round %d: owner %s, %d writes, %d of them were not flushed and are lost", round, v.Owner, load.acked(), load.unflushed)
			}
		})
	}
}
