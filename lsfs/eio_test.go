package lsfs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// TestEveryCallFails has the n-th read, write and flush of a workload fail with EIO, for
// every n that there is: nothing is acknowledged that is not there afterwards, on the
// device as it is and after a power cut at that moment, whatever of the unsynced writes
// survives. A start that cannot read refuses; it never makes anything up.
func TestEveryCallFails(t *testing.T) {
	rounds := uint64(6)
	if testing.Short() {
		rounds = 2
	}
	eachSeed(t, rounds, func(t *testing.T, seed uint64) {
		l := &lane{seed: seed, rng: rand.New(rand.NewPCG(seed, 0x65696f)), look: newReader(), model: &site{vols: map[VolumeID]*siteVolume{}}}
		l.images = []*devicetest.Image{
			devicetest.NewImage("a", format.SuperblockArea+18*format.SegmentMin), devicetest.NewImage("b", format.SuperblockArea+12*format.SegmentMin),
		}
		l.cfg = explorerConfig(l.images)
		err := Format(context.Background(), FormatConfig{Pool: [16]byte{9}, Key: testKey, Devices: l.cfg.Devices, SegmentBytes: format.SegmentMin, OpenDevice: l.cfg.OpenDevice})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.past(40); err != nil {
			if errors.Is(err, errFull) {
				t.Skip("the pool ran full")
			}
			t.Fatal(err)
		}
		total := 0
		for _, kind := range []devicetest.Kind{devicetest.Read, devicetest.Write, devicetest.Flush} {
			for unit := range l.images {
				for n := 1; ; n++ {
					met, err := l.failOne(kind, unit, n)
					if err != nil {
						t.Fatalf("%v %d of image %d fails: %v", kind, n, unit, err)
					}
					if !met {
						break
					}
					total++
				}
			}
		}
		t.Logf("%d calls failed, one at a time", total)
	})
}

// failOne runs the workload with one failing call. met says whether there was such a call.
func (l *lane) failOne(kind devicetest.Kind, unit, n int) (met bool, err error) {
	tape := &devicetest.Tape{}
	for i, m := range l.images {
		m.Mark()
		m.Record(tape, i)
	}
	defer func() {
		for _, m := range l.images {
			m.Rollback()
		}
	}()
	l.images[unit].FailNth(kind, n)
	// The same steps each time, up to the failure.
	d := &driver{rng: rand.New(rand.NewPCG(l.seed, 77)), images: l.images, tape: tape}
	opened := d.start(l.cfg, l.model, l.panicked)
	if opened == nil {
		for range 14 {
			if err := d.step(); err != nil {
				break
			}
		}
		_ = d.finishCheckpoint()
	}
	if d.s != nil {
		d.abandon()
	} else {
		d.models = []*site{l.model}
	}
	met = l.images[unit].Failed()
	l.images[unit].FailNth(kind, 0)
	for _, m := range l.images {
		m.Record(nil, 0)
	}
	if opened != nil && !met {
		return false, opened
	}
	if _, err := l.inspect(d.models[d.acked:]); err != nil {
		return met, fmt.Errorf("as it is, after %q: %w", d.done, err)
	}
	// And with the power cut at that moment.
	for _, m := range l.images {
		m.Rollback()
		m.Mark()
	}
	var unsynced []devicetest.Event
	for i := range tape.Events {
		if e := &tape.Events[i]; e.Kind == devicetest.Write {
			unsynced = append(unsynced, *e)
		} else {
			unsynced = l.sync(unsynced, e.Unit)
		}
	}
	loss := []devicetest.Loss{devicetest.LoseAll, devicetest.KeepAll, devicetest.Keep50, devicetest.OneWrong}[n%4]
	loss.Cut(l.images, unsynced, rand.New(rand.NewPCG(l.seed, uint64(n))))
	if _, err := l.inspect(d.models[d.acked:]); err != nil {
		return met, fmt.Errorf("with the power cut, %v, after %q: %w", loss, d.done, err)
	}
	return met, nil
}
