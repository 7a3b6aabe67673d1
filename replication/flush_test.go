package replication

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/lsfs/device"
	"github.com/twinsan/twinsan/lsfs/device/devicetest"
)

// ramBench is two nodes with disks that lose their write caches, and volume 1 with the
// policy mirrored-ram. No flush comes by itself.
type ramBench struct {
	*bench
	disks [3]*devicetest.Disk // by node
	nodes [3]*testNode
}

func newRAMBench(t *testing.T) *ramBench {
	b := &ramBench{bench: newBench(t)}
	for id := NodeID(1); id <= 2; id++ {
		b.disks[id] = devicetest.New(uint64(id), 96<<20)
		if err := lsfs.Format(t.Context(), lsfs.FormatConfig{Devices: []string{"disk"}, OpenDevice: b.open(id)}); err != nil {
			t.Fatal(err)
		}
		b.boot(id)
	}
	b.createAs(1, 8<<20, 1)
	b.court.mu.Lock()
	r := b.court.records[1]
	r.MirroredRAM = true
	b.court.records[1] = r
	b.court.mu.Unlock()
	b.inSync(1, 2) // the owner reads the record anew by then
	if !b.nodes[1].Volume(1).ram.Load() {
		t.Fatal("the policy was not taken")
	}
	return b
}

func (b *ramBench) open(id NodeID) func(string) (device.Device, error) {
	return func(string) (device.Device, error) {
		b.disks[id].Reopen()
		return b.disks[id], nil
	}
}

func (b *ramBench) boot(id NodeID) {
	b.nodes[id] = b.startWith(id, lsfs.Config{Devices: []string{"disk"}, OpenDevice: b.open(id), FlushInterval: 10 * time.Second})
}

// cutPower ends nodes at once, as their disks are then: none of them gets to propose anything.
func (b *ramBench) cutPower(how devicetest.CrashOptions, nodes ...NodeID) {
	for _, id := range nodes {
		how.Seed++
		left := b.disks[id].Crash(how)
		left.SetPath("disk")
		b.court.reach(id, false)
		defer func() { b.disks[id] = left }()
	}
	for _, id := range nodes {
		b.stop(id, b.nodes[id])
	}
	for _, id := range nodes {
		b.court.reach(id, true)
	}
}

func block(i int) []byte { return pattern(uint64(i)+100, 4096) }

func (b *ramBench) put(t *testing.T, by NodeID, i int, fua bool) {
	t.Helper()
	eventually(t, "a write", func() bool { // as in standing
		return b.nodes[by].do(&Request{Op: OpWrite, FUA: fua, Off: uint64(i) * 4096, Len: 4096, Data: block(i)}) == nil
	})
}

// standing says how many of the blocks from 0 on are there, and fails when one behind
// them is there as well.
func (b *ramBench) standing(t *testing.T, through NodeID, n int) int {
	t.Helper()
	have := make([]byte, n*4096)
	eventually(t, "a read", func() bool { // what came while the owner was found out is repeated, as an initiator does
		return b.nodes[through].do(&Request{Op: OpRead, Len: uint64(len(have)), Data: have}) == nil
	})
	k := 0
	for k < n && bytes.Equal(have[k*4096:][:4096], block(k)) {
		k++
	}
	for i := k; i < n; i++ {
		if !bytes.Equal(have[i*4096:][:4096], make([]byte, 4096)) {
			t.Fatalf("block %d is there and block %d is not", i, k)
		}
	}
	return k
}

// TestMirroredRAMPowerLoss: both nodes lose power. What was flushed is there by whatever
// flushed it, the rest of both logs is a prefix, and the copies are equal.
func TestMirroredRAMPowerLoss(t *testing.T) {
	flush := func(r *Request) func(*testing.T, *ramBench) {
		return func(t *testing.T, b *ramBench) {
			r := *r
			if err := b.nodes[1].do(&r); err != nil {
				t.Fatal(err)
			}
		}
	}
	lost := 0
	for name, sync := range map[string]func(*testing.T, *ramBench){
		"nothing":       nil,
		"fua":           func(t *testing.T, b *ramBench) { b.put(t, 1, 10, true) },
		"fua elsewhere": func(t *testing.T, b *ramBench) { b.put(t, 2, 10, true) },
		"flush":         flush(&Request{Op: OpFlush}),
		"fua read":      flush(&Request{Op: OpRead, FUA: true, Len: 512, Data: make([]byte, 512)}),
		"state":         flush(&Request{Op: OpState, Data: []byte("reserved")}),
		"unmap":         flush(&Request{Op: OpUnmap, Off: 4 << 20, Len: 4096}),
		"compare":       flush(&Request{Op: OpCompareAndWrite, Off: 1 << 20, Len: 512, Data: make([]byte, 1024)}),
	} {
		for _, keep := range []float64{0, 0.5} {
			t.Run(fmt.Sprint(name, keep), func(t *testing.T) {
				b := newRAMBench(t)
				for i := range 10 {
					b.put(t, NodeID(1+i%2), i, false)
				}
				least := 0
				if sync != nil {
					sync(t, b)
					least = 10
				}
				for i := 10; i < 40; i++ {
					b.put(t, 1, i, false)
				}
				b.cutPower(devicetest.CrashOptions{Seed: uint64(len(name)), Keep: keep, Tear: true}, 1, 2)
				b.boot(2)
				b.boot(1)
				b.inSync(1, 2)
				k := b.standing(t, 1, 40)
				if k < least {
					t.Errorf("%d blocks are left, %d were flushed", k, least)
				}
				lost += 40 - k
				b.equal()
			})
		}
	}
	if lost == 0 {
		t.Error("nothing was ever lost: no write was relaxed")
	}
}

// TestMirroredRAMOneNode: one node loses power with all that it had not flushed. Nothing
// that was acknowledged is lost, and it is made equal again.
func TestMirroredRAMOneNode(t *testing.T) {
	for _, dead := range []NodeID{1, 2} {
		for _, waits := range []bool{false, true} {
			t.Run(fmt.Sprint(dead, waits), func(t *testing.T) {
				b := newRAMBench(t)
				for i := range 40 {
					b.put(t, NodeID(1+i%2), i, false)
				}
				epoch := b.record().Epoch
				b.cutPower(devicetest.CrashOptions{}, dead)
				other := 3 - dead
				if waits {
					eventually(t, "the other alone", func() bool { return slices.Equal(b.record().InSync, []NodeID{other}) })
					b.put(t, other, 40, false)
				}
				b.boot(dead) // else before the other has missed it
				eventually(t, "another epoch", func() bool { return b.record().Epoch > epoch })
				b.inSync(1, 2)
				b.put(t, dead, 40, false)
				if k := b.standing(t, dead, 41); k != 41 {
					t.Errorf("%d of 41 blocks are left", k)
				}
				b.equal()
			})
		}
	}
}

// TestMirroredRAMAlone: with one copy in sync the policy is durable, for what was under
// way when the other was struck as well.
func TestMirroredRAMAlone(t *testing.T) {
	b := newRAMBench(t)
	for i := range 5 {
		b.put(t, 1, i, false)
	}
	b.stop(2, b.nodes[2])
	var left *devicetest.Disk
	answered := make(chan error, 1)
	b.nodes[1].Volume(1).Submit(&Request{Op: OpWrite, Off: 5 * 4096, Len: 4096, Data: block(5), Done: func(r *Request) {
		left = b.disks[1].Crash(devicetest.CrashOptions{})
		answered <- r.Err
	}})
	b.nodes[1].Kick()
	if err := <-answered; err != nil { // it waits for the smaller set
		t.Fatal(err)
	}
	if !slices.Equal(b.record().InSync, []NodeID{1}) {
		t.Fatalf("acknowledged with %v in sync", b.record().InSync)
	}
	left.SetPath("disk")
	b.stop(1, b.nodes[1])
	b.disks[1] = left
	b.boot(1)
	if k := b.standing(t, 1, 6); k != 6 {
		t.Fatalf("%d of 6 blocks are left", k)
	}
	b.put(t, 1, 6, false)
	b.cutPower(devicetest.CrashOptions{}, 1)
	b.boot(1)
	if k := b.standing(t, 1, 7); k != 7 {
		t.Fatalf("%d of 7 blocks are left", k)
	}
}

// TestMirroredRAMBecomesDurable: the policy changes while the volume is in use.
func TestMirroredRAMBecomesDurable(t *testing.T) {
	b := newRAMBench(t)
	b.put(t, 1, 0, false)
	b.court.mu.Lock()
	r := b.court.records[1]
	r.MirroredRAM = false
	b.court.records[1] = r
	for _, n := range b.court.notify {
		select {
		case n <- struct{}{}:
		default:
		}
	}
	b.court.mu.Unlock()
	eventually(t, "the policy", func() bool { return !b.nodes[1].Volume(1).ram.Load() })
	b.put(t, 1, 1, false)
	b.cutPower(devicetest.CrashOptions{}, 1, 2)
	b.boot(1)
	b.boot(2)
	b.inSync(1, 2)
	if k := b.standing(t, 2, 2); k != 2 {
		t.Fatalf("%d of 2 blocks are left", k)
	}
	b.equal()
}
