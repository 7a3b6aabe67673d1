//go:build e2e

package e2e

import (
	"errors"
	"math"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// pauseMax is the longest time without a completion that a kill may cause.
const pauseMax = 1500 * time.Millisecond

// freezeMax is the same for a node that hangs: nobody refuses connections for
// it, so its lease has to run out.
const freezeMax = 10 * time.Second

// TestKillOwner kills the node that orders the volume's writes while they are verified.
func TestKillOwner(t *testing.T) {
	kill(t, pauseMax, killOwner)
}

func killOwner(r *rig, v *lab.Volume, load *verified) {
	r.demo("kill", v.Owner)
	load.progress(300, 30*time.Second) // it goes on without the node
	r.demo("start", v.Owner)
}

// TestKillReplica kills the node that mirrors the volume.
func TestKillReplica(t *testing.T) {
	kill(t, pauseMax, killReplica)
}

func killReplica(r *rig, v *lab.Volume, load *verified) {
	other := v.Other()
	r.demo("kill", other)
	load.progress(300, 30*time.Second)
	r.demo("start", other)
}

// TestKillBoth kills both nodes at once, as a power failure of the site does.
// The pause lasts until they are up again, so it has no limit here but the test's.
func TestKillBoth(t *testing.T) {
	kill(t, 0, killBoth)
}

func killBoth(r *rig, v *lab.Volume, load *verified) {
	for _, n := range r.c.Nodes {
		if err := syscall.Kill(n.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			r.Fatal(err)
		}
	}
	for _, n := range r.c.Nodes {
		r.must(lab.Until(r.ctx, 10*time.Second, func() error { return gone(n.PID) }), "end of node %s", n.Name)
	}
	first, second := v.Owner, v.Other()
	if r.rand.IntN(2) == 0 {
		first, second = second, first
	}
	r.demo("start", first)
	r.demo("start", second)
	load.progress(300, time.Minute)
}

// TestPowerLoss is TestKillBoth, or a kill of one node, with devices that forget what was
// written and not flushed, except for a part of it in any order.
func TestPowerLoss(t *testing.T) {
	checkedOnly(t)
	for _, percent := range []string{"0", "50"} {
		t.Setenv("TWINSAN_VOLATILE", percent)
		t.Run(percent, func(t *testing.T) { kill(t, 0, killBoth) })
	}
	t.Run("owner", func(t *testing.T) { kill(t, pauseMax, killOwner) })
}

// TestFreezeOwner stops the owner in the middle of its work, lets the other node
// take over, and wakes it: what it still had in its sockets must not do harm.
func TestFreezeOwner(t *testing.T) {
	kill(t, freezeMax, func(r *rig, v *lab.Volume, load *verified) {
		r.demo("pause", v.Owner)
		load.progress(300, 30*time.Second)
		r.demo("resume", v.Owner)
		load.progress(300, 30*time.Second)
	})
}

// TestZombie stops the owner, the replica or both for a time from a fraction of a
// second to a minute, with commands in their sockets and queues. The initiator waits
// two seconds, less than any real one, then repeats them through the other node and
// overwrites what they wrote; then the sleeper wakes. Nothing old may come back.
func TestZombie(t *testing.T) {
	round := 0
	kill(t, 0, func(r *rig, v *lab.Volume, load *verified) {
		round++
		longest := 6.0
		if *rounds > 3 {
			longest = 60
		}
		length := time.Duration(0.2 * math.Pow(longest/0.2, r.rand.Float64()) * float64(time.Second))
		sleepers := [][]string{{v.Owner}, {v.Other()}, {v.Owner}, {v.Owner, v.Other()}}[round%4]
		for _, node := range sleepers {
			r.demo("pause", node)
		}
		select {
		case <-time.After(length):
		case <-r.ctx.Done():
		}
		for _, node := range sleepers {
			r.demo("resume", node)
		}
		r.Logf("round %d: %v of owner %s slept for %.1f s", round, sleepers, v.Owner, length.Seconds())
		load.progress(300, time.Minute)
	}, "--io-timeout", "2")
}

// gone returns nil when no process has the number; zombies count as gone.
func gone(pid int) error {
	state, err := processState(pid)
	if errors.Is(err, os.ErrNotExist) || state == "Z" || state == "X" {
		return nil
	}
	return errors.New("it still runs")
}

func kill(t *testing.T, limit time.Duration, hurt func(*rig, *lab.Volume, *verified), more ...string) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:512M"}})
	longest, total := time.Duration(0), int64(0)
	for round := 1; round <= *rounds; round++ {
		pause, writes := r.round(round, 32*mib, limit, hurt, more...)
		longest, total = max(longest, pause), total+writes
	}
	r.Logf("%d rounds, %d acknowledged writes, 0 lost, 0 stale, 0 corrupt, longest pause %.2f s", *rounds, total, longest.Seconds())
}

// round is one blow under a verified load of its own on so much of the volume, which is
// read back afterwards. limit 0: the pause has none.
func (r *rig) round(round int, size int64, limit time.Duration, hurt func(*rig, *lab.Volume, *verified), more ...string) (pause time.Duration, writes int64) {
	r.Helper()
	start := time.Now()
	// A small range that is written over and over: each round ends when the node
	// has caught up with it, and that should not take longer than it has to.
	load := r.verify(r.both(r.volume("demo").LUN), 0, size, append([]string{"--failover", "--io-timeout", "20", "--iodepth", "8"}, more...)...)
	// The blow falls at another moment each time.
	load.progress(100+r.rand.Int64N(3000), 30*time.Second)
	v := r.volume("demo")
	hurt(r, v, load)
	// Both replicas are back while I/O goes on.
	r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "round %d: recovery", round)
	load.progress(100, 30*time.Second)
	result := load.stop()
	pause, writes = time.Duration(result.Failover.MaxGapMS*float64(time.Millisecond)), load.acked()
	if limit != 0 && pause > limit {
		r.Errorf("round %d (owner %s): the initiator waited %.2f s, allowed are %s", round, v.Owner, pause.Seconds(), limit)
	}
	r.must(r.c.CheckEqual(r.ctx, "demo"), "round %d: volume check", round)
	// Half of the rounds read back through each node.
	load.check(r.c.URL([]string{"a", "b"}[round%2], v.LUN))
	r.Logf("round %d: owner %s, pause %.2f s, %d writes, %.1f s", round, v.Owner, pause.Seconds(), writes, time.Since(start).Seconds())
	return pause, writes
}
