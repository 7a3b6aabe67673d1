package replication

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Limits of what resyncs of one node send together, in bytes a second (Y6).
const (
	// ResyncFloor is what they may always send: a replica that is never equal again is
	// the greater danger.
	ResyncFloor = 10 << 20
	// chunkCost is what a chunk costs of which nothing has to be sent: fingerprints one
	// way, a digest the other, and the reading of the maps.
	chunkCost = 16 << 10
)

// throttle makes resyncs give way to initiators. While initiators work, what resyncs
// send grows by small steps and shrinks by large ones, so that the latency of reads and
// writes stays below foreTimes of what it is without a resync; while nobody works they
// take what there is. It never loses ground to writes: the replica takes the live
// stream while it is filled (Y3), so that no write makes a compared chunk dirty again.
//
// wait and charge are called without a range locked, or initiators would wait as well.
type throttle struct {
	ceiling atomic.Int64 // bytes a second; 0: none
	total   atomic.Int64 // bytes of contents sent since the start

	mu          sync.Mutex
	read, write foreground
	rate        float64 // bytes a second; 0: as much as there is
	tokens      float64 // may fall below zero: a chunk is charged when it was sent
	filled      Instant // when tokens were computed
	sent        float64 // since judged
	judged      Instant
}

// foreground is the latency of one kind of command, in nanoseconds.
type foreground struct {
	now, usual float64 // usual: while no resync runs
	heard      Instant
	fresh      bool // since the last judgement
}

const (
	foreTimes   = 1.8
	foreMin     = float64(time.Millisecond) // no resync gives way to what is as fast
	foreUnknown = float64(5 * time.Millisecond)
	foreQuiet   = Instant(time.Second) // without a command for so long nobody works
	judgeEvery  = Instant(200 * time.Millisecond)
	waitAtMost  = 100 * time.Millisecond
)

// observe takes the latency of one command. running says that a resync was under way.
func (f *foreground) observe(at Instant, took time.Duration, running bool) {
	x := float64(took)
	if f.now == 0 || at-f.heard > foreQuiet {
		f.now = x
	}
	f.now += (x - f.now) / 4
	f.heard, f.fresh = at, true
	switch {
	case running:
	case f.usual == 0:
		f.usual = x
	default:
		f.usual += (x - f.usual) / 64
	}
}

// hurt says whether initiators wait too long; busy whether there are any.
func (f *foreground) hurt(at Instant) (hurt, busy bool) {
	busy = f.heard != 0 && at-f.heard < foreQuiet
	usual := f.usual
	if usual == 0 {
		usual = foreUnknown
	}
	hurt = busy && f.fresh && f.now > max(foreTimes*usual, foreMin)
	f.fresh = false
	return hurt, busy
}

// working says whether initiators are at work.
func (t *throttle) working(at Instant) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.read.heard != 0 && at-t.read.heard < foreQuiet || t.write.heard != 0 && at-t.write.heard < foreQuiet
}

// judge sets the rate anew, five times a second.
func (t *throttle) judge(at Instant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if at-t.judged < judgeEvery {
		return
	}
	achieved := t.sent / time.Duration(at-t.judged).Seconds()
	t.judged, t.sent = at, 0
	hurtRead, readers := t.read.hurt(at)
	hurtWrite, writers := t.write.hurt(at)
	switch {
	case !readers && !writers:
		t.rate = 0
	case hurtRead || hurtWrite:
		if t.rate == 0 {
			t.rate = max(achieved, ResyncFloor)
		}
		t.rate = max(t.rate*0.75, ResyncFloor)
	case t.rate > 0:
		// Not beyond what it uses: the allowance would be worth nothing when it is needed.
		t.rate = min(t.rate*1.05+1<<20, max(2*achieved, ResyncFloor+1<<20, t.rate))
	}
}

// limit is what is in force, in bytes a second; 0: none. Called with mu.
func (t *throttle) limit() float64 {
	ceiling := float64(t.ceiling.Load())
	switch {
	case ceiling == 0:
		return t.rate
	case t.rate == 0:
		return ceiling
	}
	return min(t.rate, ceiling)
}

// delay is how long the next chunk has to wait.
func (t *throttle) delay(at Instant) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	limit := t.limit()
	if limit == 0 {
		t.tokens, t.filled = 0, at
		return 0
	}
	t.tokens = min(t.tokens+limit*time.Duration(at-t.filled).Seconds(), limit/10)
	t.filled = at
	if t.tokens >= 0 {
		return 0
	}
	return min(time.Duration(-t.tokens/limit*1e9)+time.Millisecond, waitAtMost)
}

// charge notes what was sent.
func (t *throttle) charge(n int) {
	t.mu.Lock()
	t.tokens -= float64(n)
	t.sent += float64(n)
	t.mu.Unlock()
}

// yield waits until the next chunk may be sent.
func (n *Node) yield(ctx context.Context) error {
	for {
		d := n.throttle.delay(n.now())
		if d == 0 {
			return nil
		}
		if !pause(ctx, d) {
			return ctx.Err()
		}
	}
}

// SetResyncRate sets what the resyncs from this node may send together, in bytes a
// second; 0: no limit but the latency of the initiators.
func (n *Node) SetResyncRate(bytes int64) { n.throttle.ceiling.Store(bytes) }

// ResyncState is what the resyncs that this node drives do.
type ResyncState struct {
	Running, Waiting int
	SentBytes        int64 // contents that they sent since the node started
	LimitBytes       int64 // what they may send together in a second; 0: no limit
}

// Resyncs says what the resyncs do. It may be called at any time.
func (n *Node) Resyncs() ResyncState {
	n.throttle.mu.Lock()
	limit := n.throttle.limit()
	n.throttle.mu.Unlock()
	n.resyncs.mu.Lock()
	waiting := len(n.resyncs.waiting)
	n.resyncs.mu.Unlock()
	return ResyncState{int(n.resyncs.active.Load()), waiting, n.throttle.total.Load(), int64(limit)}
}

// sampled takes the latency of a command that was chosen to be measured.
func (n *Node) sampled(read bool, took time.Duration) {
	t := &n.throttle
	running := n.resyncs.active.Load() > 0
	t.mu.Lock()
	f := &t.write
	if read {
		f = &t.read
	}
	f.observe(n.now(), took, running)
	t.mu.Unlock()
}
