//go:build e2e

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
	"github.com/twinsan/twinsan/tests/lab"
)

// stamp is what one sector of the lock test holds: how often it was taken, by
// whom, and with which of its attempts.
type stamp struct {
	count   uint64
	host    uint64
	attempt uint64
}

func (s stamp) sector() []byte {
	b := make([]byte, 512)
	binary.BigEndian.PutUint64(b, s.count)
	binary.BigEndian.PutUint64(b[8:], s.host)
	binary.BigEndian.PutUint64(b[16:], s.attempt)
	return b
}

func stampOf(b []byte) stamp {
	return stamp{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
}

// ledger is what all hosts together know of the sector's history: who made it
// reach each count. Two hosts that both made it the same are two holders of one lock.
type ledger struct {
	mu    sync.Mutex
	chain map[uint64]stamp
	wrong error
}

// saw notes that s was in the sector.
func (l *ledger) saw(s stamp, how string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old, ok := l.chain[s.count]; ok && old != s && l.wrong == nil {
		l.wrong = fmt.Errorf("count %d was reached by host %d with attempt %d and, %s, by host %d with attempt %d", s.count, old.host, old.attempt, how, s.host, s.attempt)
	}
	l.chain[s.count] = s
}

func (l *ledger) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wrong
}

// TestLock races COMPARE AND WRITE on one sector from hosts on both nodes, while
// nodes are killed and ownership moves: each success is the only one for its
// count, none is lost, and none is made up.
func TestLock(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	v := r.volume("demo")
	const sector = 2049
	book := &ledger{chain: map[uint64]stamp{}}
	first := stamp{}
	r.host("first", v.LUN, "a", "b").good("WRITE", initiator.Write16(sector, 1), first.sector(), 0)
	book.saw(first, "written at first")

	ctx, cancel := context.WithTimeout(r.ctx, time.Hour)
	defer cancel()
	var wins, lost, unknown, made atomic.Int64
	var group sync.WaitGroup
	goal := int64(*locks)
	race := func(id uint64, h *host) {
		defer group.Done()
		seen := first
		for attempt := uint64(1); ctx.Err() == nil && book.err() == nil && wins.Load() < goal; attempt++ {
			made.Add(1)
			next := stamp{seen.count + 1, id, attempt}
			res, _, err := h.do(ctx, initiator.CompareAndWrite(sector, 1), append(seen.sector(), next.sector()...), 0)
			switch {
			case err == nil && res.OK():
				book.saw(next, "by its own word")
				wins.Add(1)
				seen = next
				continue
			case err == nil:
				if key, _, _ := res.SenseKey(); key != 0xe {
					t.Errorf("host %d: COMPARE AND WRITE ended with %s", id, res)
					return
				}
				lost.Add(1)
			case errors.Is(err, errOutcome):
				unknown.Add(1)
			default:
				return
			}
			for ctx.Err() == nil {
				res, b, err := h.do(ctx, initiator.Read16(sector, 1), nil, 512)
				if err == nil && res.OK() {
					seen = stampOf(b)
					book.saw(seen, "as it was read")
					break
				}
				if err == nil {
					t.Errorf("host %d: READ ended with %s", id, res)
					return
				}
			}
		}
	}
	start := time.Now()
	for id, h := range []*host{r.host("one", v.LUN, "a", "b"), r.host("two", v.LUN, "b", "a")} {
		group.Add(1)
		go race(uint64(id+1), h)
	}
	progress := func(n int64) {
		target := min(wins.Load()+n, goal)
		r.must(lab.Until(r.ctx, time.Minute+time.Duration(n)*20*time.Millisecond, func() error {
			if err := book.err(); err != nil {
				r.Fatal(err)
			}
			if w := wins.Load(); w < target {
				return fmt.Errorf("%d of %d locks were taken", w, target)
			}
			return nil
		}), "progress")
	}
	for round := range *rounds {
		progress(goal / int64(2**rounds+2))
		owner := r.volume("demo").Owner
		victim := owner
		if round%3 == 1 {
			victim = r.volume("demo").Other()
		}
		r.demo("kill", victim)
		progress(goal / int64(2**rounds+2) / 2)
		r.demo("start", victim)
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "round %d: recovery", round)
		if _, err := r.c.CLI(r.ctx, "volume", "move", "demo", "--to", r.volume("demo").Other()); err != nil {
			r.Errorf("round %d: %v", round, err)
		}
	}
	done := make(chan struct{})
	go func() { group.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(time.Second):
			if err := book.err(); err != nil {
				r.Fatal(err)
			}
		}
	}
	r.must(book.err(), "history")
	last := stampOf(r.host("last", v.LUN, "b", "a").good("READ", initiator.Read16(sector, 1), nil, 512))
	book.saw(last, "at the end")
	for count := range last.count + 1 {
		if _, ok := book.chain[count]; !ok {
			r.Fatalf("nobody knows who made the sector reach %d of %d", count, last.count)
		}
	}
	r.must(book.err(), "history")
	if top := uint64(len(book.chain)); top != last.count+1 {
		r.Fatalf("%d counts were seen and the sector ends at %d: a lock was granted and forgotten", top-1, last.count)
	}
	if made := int64(last.count); made < wins.Load() || made > wins.Load()+unknown.Load() {
		r.Fatalf("the sector was taken %d times; %d were confirmed and %d unknown", made, wins.Load(), unknown.Load())
	}
	r.Logf("%d attempts: %d won, %d lost, %d with unknown outcome, %.0f per second", made.Load(), wins.Load(), lost.Load(), unknown.Load(), float64(made.Load())/time.Since(start).Seconds())
}
