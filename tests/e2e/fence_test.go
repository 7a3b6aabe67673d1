//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/initiator"
	"github.com/twinsan/twinsan/tests/lab"
)

const (
	keyOne = 0x1111111111111111
	keyTwo = 0x2222222222222222
)

// victim writes to its own sectors as fast as it can, in many commands at once,
// until it is refused.
type victim struct {
	h       *host
	first   uint64
	stop    context.CancelFunc
	group   sync.WaitGroup
	good    atomic.Int64
	refused atomic.Int64
}

const victimSectors = 64

func (r *rig) victim(h *host, first uint64) *victim {
	ctx, cancel := context.WithCancel(r.ctx)
	v := &victim{h: h, first: first, stop: cancel}
	r.must(h.connect(ctx), "login")
	conn := h.conn
	for i := range uint64(16) {
		v.group.Go(func() {
			for n := uint64(1); ctx.Err() == nil; n++ {
				sector := make([]byte, 512)
				binary.BigEndian.PutUint64(sector, n)
				res, err := conn.Do(ctx, &initiator.Command{LUN: initiator.LUN(uint16(h.lun)), CDB: initiator.Write16(first+(n*16+i)%victimSectors, 1), Out: sector})
				switch {
				case err != nil:
					return // its task was aborted, or the session ended
				case res.OK():
					v.good.Add(1)
				case res.Status == statusConflict:
					v.refused.Add(1)
				}
			}
		})
	}
	return v
}

// TestFence does what cluster software does to take a disk from a node that it
// believes dead: the other host preempts and aborts, and from its answer on
// nothing of the victim may reach the disk, whatever it had under way.
func TestFence(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	lun := r.volume("demo").LUN
	total := int64(0)
	for round := range 4 * *rounds {
		// Both directions, and both hosts on one node too.
		from, to := []string{"a", "b", "a", "b"}[round%4], []string{"b", "a", "a", "b"}[round%4]
		one, two := r.host("one", lun, from), r.host("two", lun, to)
		one.register(keyOne)
		cdb, list := prOut(prReserve, prWriteExclusiveRegistrants, keyOne, 0)
		one.good("RESERVE", cdb, list, 0)
		two.register(keyTwo)
		v := r.victim(one, 1000)
		r.must(lab.Until(r.ctx, 30*time.Second, func() error {
			if v.good.Load() < 200 {
				return errOutcome
			}
			return nil
		}), "the victim writes")
		cdb, list = prOut(prPreemptAbort, prWriteExclusiveRegistrants, keyTwo, keyOne)
		two.good("PREEMPT AND ABORT", cdb, list, 0)
		read := func() []byte { return two.good("READ", initiator.Read16(1000, victimSectors), nil, victimSectors*512) }
		before := read()
		mine := bytes.Repeat([]byte{0xa5}, victimSectors*512)
		two.good("WRITE", initiator.Write16(1000, victimSectors), mine, 0)
		// Those of its commands that were not aborted are refused by now; give what
		// might have slipped through the time to land.
		start := time.Now()
		r.must(lab.Until(r.ctx, 30*time.Second, func() error {
			if v.refused.Load() < 16 && time.Since(start) < time.Second {
				return errOutcome
			}
			return nil
		}), "the victim is refused")
		if after := read(); !bytes.Equal(after, mine) {
			at := slices.IndexFunc(after, func(b byte) bool { return b != 0xa5 })
			r.Fatalf("round %d (%s preempts %s): a write of the victim landed after it was preempted and aborted, in sector %d (before: %x)", round, to, from, at/512, before[at/512*512:at/512*512+8])
		}
		v.stop()
		v.group.Wait()
		total += v.good.Load()
		if keys := two.keys(); !slices.Equal(keys, []uint64{keyTwo}) {
			r.Fatalf("round %d: keys %x", round, keys)
		}
		if key, kind := two.reservation(); key != keyTwo || kind != prWriteExclusiveRegistrants {
			r.Fatalf("round %d: reservation %x of type %d", round, key, kind)
		}
		cdb, list = prOut(prClear, 0, keyTwo, 0)
		two.good("CLEAR", cdb, list, 0)
		one.close()
		two.close()
	}
	r.Logf("%d rounds, %d writes of victims before they were fenced", 4**rounds, total)
}

// TestReservationsLive: registrations and the reservation are the same through
// both nodes, after the owner was killed, and after everything was.
func TestReservationsLive(t *testing.T) {
	scenario(t)
	r := up(t, lab.Options{DeviceSize: "4G", Volumes: []string{"demo:64M"}})
	lun := r.volume("demo").LUN
	one, two := r.host("one", lun, "a"), r.host("two", lun, "b")
	one.register(keyOne)
	two.register(keyTwo)
	cdb, list := prOut(prReserve, prWriteExclusiveRegistrants, keyOne, 0)
	one.good("RESERVE", cdb, list, 0)
	outsider := []*host{r.host("outsider", lun, "a"), r.host("outsider", lun, "b")}
	check := func(when string, nodes ...string) {
		for _, node := range nodes {
			h := r.host("reader", lun, node)
			if keys := h.keys(); !slices.Equal(keys, []uint64{keyOne, keyTwo}) {
				r.Fatalf("%s, through node %s: keys %x", when, node, keys)
			}
			if key, kind := h.reservation(); key != keyOne || kind != prWriteExclusiveRegistrants {
				r.Fatalf("%s, through node %s: reservation %x of type %d", when, node, key, kind)
			}
			h.close()
			o := outsider[slices.Index([]string{"a", "b"}, node)]
			if res, _ := o.result("WRITE", initiator.Write16(0, 1), make([]byte, 512), 0); res.Status != statusConflict {
				r.Fatalf("%s, through node %s: a write of an unregistered host ended with %s", when, node, res)
			}
			o.close()
		}
		// The registrants go on.
		for i, h := range []*host{one, two} {
			if slices.Contains(nodes, h.nodes[0]) {
				h.good("WRITE", initiator.Write16(uint64(8*i), 1), make([]byte, 512), 0)
			}
		}
	}
	check("at first", "a", "b")
	for range *rounds {
		v := r.volume("demo")
		other := v.Other()
		r.demo("kill", v.Owner)
		check("after the owner was killed", other)
		r.demo("start", v.Owner)
		r.must(r.c.WaitHealthy(r.ctx, time.Minute), "recovery")
		check("after the owner came back", "a", "b")
	}
	one.close()
	two.close()
	r.demo("kill", "a")
	r.demo("kill", "b")
	r.demo("start", "b")
	r.demo("start", "a")
	r.must(r.c.WaitHealthy(r.ctx, time.Minute), "recovery")
	check("after all nodes were killed", "a", "b")
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
}
