package lsfs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs/device/devicetest"
	"github.com/twinsan/twinsan/lsfs/format"
)

// addDisk puts a disk into the machine, under the next free name.
func (r *rig) addDisk(seed uint64, size int64) string {
	name := fmt.Sprintf("disk%d", len(r.disks))
	r.disks[name] = devicetest.New(seed, size)
	r.disks[name].SetPath(name)
	return name
}

// persist makes the paths that the store tells those of the next start, as a node does.
func (r *rig) persist() {
	r.cfg.Persist = func(generation uint64, devices []DeviceInfo) error {
		var paths []string
		for _, d := range devices {
			paths = append(paths, d.Path)
		}
		r.persisting.Lock()
		defer r.persisting.Unlock()
		r.names, r.cfg.Devices, r.cfg.Generation = paths, paths, generation
		return nil
	}
}

// crashAll is crash with all disks of the machine and what was persisted.
func (r *rig) crashAll(o devicetest.CrashOptions) *rig {
	c := &rig{cold: r.cold, tb: r.tb, disks: map[string]*devicetest.Disk{}}
	var names []string
	for n := range r.disks {
		names = append(names, n)
	}
	slices.Sort(names)
	// All disks stand still for the moment: the power goes for all of them at once.
	for _, n := range names {
		defer r.disks[n].Hold(devicetest.Write)()
		defer r.disks[n].Hold(devicetest.Flush)()
	}
	for _, n := range names {
		o.Seed++
		c.disks[n] = r.disks[n].Crash(o)
		c.disks[n].SetPath(n)
	}
	r.persisting.Lock()
	c.names = slices.Clone(r.names)
	generation := r.cfg.Generation
	r.persisting.Unlock()
	c.configure()
	c.cfg.Generation = generation
	c.persist()
	return c
}

func deviceAt(tb testing.TB, s *Store, path string) DeviceInfo {
	tb.Helper()
	for _, d := range s.Devices() {
		if d.Path == path {
			return d
		}
	}
	tb.Fatalf("no device %s in %v", path, s.Devices())
	return DeviceInfo{}
}

// waitDevices waits until the devices are as wanted.
func waitDevices(tb testing.TB, s *Store, what string, ok func([]DeviceInfo) bool) {
	tb.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok(s.Devices()) {
		select {
		case <-tick.C:
		case <-deadline:
			for _, d := range s.Devices() {
				if d.State != DeviceOK {
					tb.Logf("%s %s: %d bytes live, %d of %d free %s", d.Path, d.State, d.LiveBytes, d.FreeBytes, d.SizeBytes, d.Stuck)
				}
			}
			tb.Fatalf("not in time: %s, segments %v", what, s.Stats().Segments)
		}
	}
}

func waitDrained(tb testing.TB, s *Store, id DeviceID) {
	tb.Helper()
	waitDevices(tb, s, "drained", func(all []DeviceInfo) bool {
		return slices.ContainsFunc(all, func(d DeviceInfo) bool { return d.ID == id && d.State == DeviceDrained })
	})
}

func waitGone(tb testing.TB, s *Store, id DeviceID) {
	tb.Helper()
	waitDevices(tb, s, "gone", func(all []DeviceInfo) bool {
		return !slices.ContainsFunc(all, func(d DeviceInfo) bool { return d.ID == id })
	})
}

// load writes n random operations.
func (h *history) load(tb testing.TB, c *client, rng *rand.Rand, id VolumeID, n int, distinct uint64) {
	tb.Helper()
	for range n {
		c.must(h.randomOp(c, rng, id, distinct))
	}
}

// TestDeviceLife adds a device, drains the first, keeps it, drains it again, removes
// it, and replaces the next, with data on all of them, and reopens after each step.
func TestDeviceLife(t *testing.T) {
	ctx := context.Background()
	rng := testRand(3)
	r := newRig(t, 1, 16<<20, 12<<20)
	r.persist()
	s := r.start()
	h := &history{blocks: 900}
	mustCreate(t, s, 1, h.blocks)
	step := func() {
		t.Helper()
		h.load(t, newClient(t, s), rng, 1, 60, 700)
		mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
		mustCheck(t, s)
		mustClose(t, s)
		s = r.start()
		mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
		mustCheck(t, s)
	}
	step()
	before := s.Room().Usable
	added, err := s.AddDevice(ctx, r.addDisk(7, 16<<20), NewDevice{})
	if err != nil {
		t.Fatal(err)
	}
	if now := s.Room().Usable; now <= before {
		t.Fatalf("usable %d, was %d", now, before)
	}
	step()
	first := deviceAt(t, s, "disk0")
	if err := s.DrainDevice(ctx, first.ID, false); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveDevice(ctx, first.ID); !errors.Is(err, ErrDevice) && deviceAt(t, s, "disk0").State != DeviceDrained {
		t.Fatalf("remove of a device in use: %v", err)
	}
	step() // the drain goes on after a start
	waitDrained(t, s, first.ID)
	step() // a drained one stays so
	if d := deviceAt(t, s, "disk0"); d.State != DeviceDrained || d.LiveBytes != 0 || d.FreeBytes != d.SizeBytes {
		t.Fatalf("%+v", d)
	}
	if err := s.KeepDevice(ctx, first.ID); err != nil {
		t.Fatal(err)
	}
	step()
	if d := deviceAt(t, s, "disk0"); d.State != DeviceOK || d.FreeBytes == d.SizeBytes {
		t.Fatalf("a kept device is not used: %+v", d)
	}
	if err := s.DrainDevice(ctx, first.ID, false); err != nil {
		t.Fatal(err)
	}
	waitDrained(t, s, first.ID)
	if err := s.RemoveDevice(ctx, first.ID); err != nil {
		t.Fatal(err)
	}
	if got := len(s.Devices()); got != 2 || slices.Contains(r.names, "disk0") {
		t.Fatalf("%d devices, paths %v", got, r.names)
	}
	step()
	second := deviceAt(t, s, "disk1")
	fresh, err := s.AddDevice(ctx, r.addDisk(8, 20<<20), NewDevice{Replaces: second.ID})
	if err != nil {
		t.Fatal(err)
	}
	step()
	waitGone(t, s, second.ID)
	step()
	ids := []DeviceID{}
	for _, d := range s.Devices() {
		ids = append(ids, d.ID)
	}
	if !slices.Equal(ids, []DeviceID{added.ID, fresh.ID}) {
		t.Fatalf("%v", ids)
	}
	// What has left is empty, and may come again.
	if _, err := s.AddDevice(ctx, "disk0", NewDevice{Class: Capacity}); err != nil {
		t.Fatal(err)
	}
	step()
	// The numbers of what has left are not used again.
	if n := s.segs.Stats(); n.gone != 64-4+48-4 {
		t.Fatalf("%+v", n)
	}
	mustClose(t, s)
}

type numberStats struct{ gone, used int }

func (t *segmentTable) Stats() (n numberStats) {
	for i := range t.all {
		if t.all[i].state == segmentGone {
			n.gone++
		} else {
			n.used++
		}
	}
	return n
}

// TestDeviceRefusals asks for what cannot be.
func TestDeviceRefusals(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 16<<20, 16<<20)
	r.persist()
	s := r.start()
	defer func() { mustClose(t, s) }()
	mustCreate(t, s, 1, 8000)
	c := newClient(t, s)
	seq := Seq(0)
	for at := BlockNo(0); at < 3600; at += 50 {
		var data []byte
		for i := range 50 {
			data = append(data, noise(uint64(at)+uint64(i)+1)...)
		}
		seq++
		c.must(c.write(1, seq, at, data))
	}
	first := deviceAt(t, s, "disk0")
	refused := func(name string, err error, want error, text string) {
		t.Helper()
		if !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), text) {
			t.Fatalf("%s: %v, want %v with %q", name, err, want, text)
		}
	}
	refused("no room", s.DrainDevice(ctx, first.ID, false), ErrNoSpace, "add a device or delete data")
	if d := deviceAt(t, s, "disk0"); d.State != DeviceOK {
		t.Fatalf("%+v", d)
	}
	refused("unknown", s.DrainDevice(ctx, DeviceID{1}, false), ErrDevice, "not in the pool")
	refused("in use", s.RemoveDevice(ctx, first.ID), ErrDevice, "drain it first")
	refused("kept", s.KeepDevice(ctx, first.ID), ErrDevice, "not being drained")
	_, err := s.AddDevice(ctx, "disk1", NewDevice{})
	refused("member", err, ErrDevice, "in the pool already")
	name := r.addDisk(5, 16<<20)
	r.disks[name].Overwrite(512<<10+77, []byte{1})
	_, err = s.AddDevice(ctx, name, NewDevice{})
	refused("not empty", err, ErrInUse, "foreign data")
	_, err = s.AddDevice(ctx, r.addDisk(6, 1<<20), NewDevice{})
	refused("small", err, ErrDevice, "too small")
	_, err = s.AddDevice(ctx, "nothing", NewDevice{})
	if err == nil {
		t.Fatal("a device that does not exist was added")
	}
	// A device that fails its first writes harms nothing, whichever of them it is.
	for kind, most := range map[devicetest.Kind]int{devicetest.Write: 5, devicetest.Flush: 3} {
		for n := 1; n <= most; n++ {
			bad := r.addDisk(uint64(n), 16<<20)
			r.disks[bad].FailNth(kind, n, nil)
			if _, err := s.AddDevice(ctx, bad, NewDevice{}); err == nil {
				t.Fatalf("%v %d failed, and the device was added", kind, n)
			}
			if err := s.failure(); err != nil {
				t.Fatalf("%v %d of a new device stopped the store: %v", kind, n, err)
			}
		}
	}
	r.cfg.Persist = nil
	if n := len(s.Devices()); n != 2 {
		t.Fatalf("%d devices", n)
	}
	mustCheck(t, s)
	_, err = s.AddDevice(ctx, name, NewDevice{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DrainDevice(ctx, first.ID, false); err != nil {
		t.Fatal(err)
	}
	waitDrained(t, s, first.ID)
	mustCheck(t, s)
}

// TestDeviceCrash cuts the power at every write and flush of an add, a drain with
// writes beside it, and a replacement, and looks at what a start makes of it with the
// devices that the node knew at that moment.
func TestDeviceCrash(t *testing.T) {
	eachSeed(t, 1, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		rng := testRand(seed)
		r := newRig(t, seed, 10<<20, 8<<20)
		r.persist()
		s := r.start()
		h := &history{blocks: 300}
		mustCreate(t, s, 1, h.blocks)
		h.load(t, newClient(t, s), rng, 1, 25, 200)
		every := 1
		if testing.Short() {
			every = 2
		}
		acked := Seq(len(h.steps))
		moments := newRecorder(r, seed, every, func() Seq { return acked })
		moments.crash = r.crashAll
		third, fourth := r.addDisk(seed+5, 9<<20), r.addDisk(seed+6, 11<<20)
		persisted := r.cfg.Persist
		r.cfg.Persist = func(g uint64, list []DeviceInfo) error {
			moments.mu.Lock()
			defer moments.mu.Unlock()
			return persisted(g, list)
		}
		mustClose(t, s)
		s = r.start()
		c := newClient(t, s)
		write := func() {
			for range 3 {
				c.must(h.randomOp(c, rng, 1, 200))
				moments.mu.Lock()
				acked = Seq(len(h.steps))
				moments.mu.Unlock()
			}
		}
		moments.start()
		if _, err := s.AddDevice(ctx, third, NewDevice{}); err != nil {
			t.Fatal(err)
		}
		write()
		if err := s.DrainDevice(ctx, deviceAt(t, s, "disk0").ID, false); err != nil {
			t.Fatal(err)
		}
		write()
		waitDrained(t, s, deviceAt(t, s, "disk0").ID)
		if err := s.RemoveDevice(ctx, deviceAt(t, s, "disk0").ID); err != nil {
			t.Fatal(err)
		}
		old := deviceAt(t, s, "disk1").ID
		if _, err := s.AddDevice(ctx, fourth, NewDevice{Replaces: old}); err != nil {
			t.Fatal(err)
		}
		write()
		waitGone(t, s, old)
		moments.stop()
		mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
		mustCheck(t, s)
		mustClose(t, s)
		lists := map[string]int{}
		moments.each(t, func(i int, m *moment[Seq], s *Store) {
			v := s.Volume(1)
			k := v.Meta().Durable.Seq
			if k < m.before || Seq(len(h.steps)) < k {
				t.Fatalf("durable is %d", k)
			}
			mustEqual(t, v, h.at(k))
			mustCheck(t, s)
			state := ""
			for _, d := range s.Devices() {
				state += fmt.Sprintf(" %s=%s", d.Path, d.State)
			}
			lists[state]++
			if i%16 == 0 {
				// What was begun goes on to its end.
				waitDevices(t, s, "settled", func(all []DeviceInfo) bool {
					return !slices.ContainsFunc(all, func(d DeviceInfo) bool { return d.State == DeviceDraining || d.State == DeviceLeaving })
				})
				mustEqual(t, v, h.at(k))
				mustCheck(t, s)
			}
			mustClose(t, s)
		})
		t.Logf("lists of devices: %v", lists)
		if len(lists) < 6 {
			t.Fatalf("only these lists of devices were met: %v", lists)
		}
	})
}

// TestDevicesModel changes devices at random under random operations, with power cuts.
func TestDevicesModel(t *testing.T) {
	met := &coldStores{}
	defer met.mustHaveMet(t)
	eachSeed(t, 4, func(t *testing.T, seed uint64) {
		ctx := context.Background()
		rng := testRand(seed)
		r := newRig(t, seed, 14<<20, 10<<20)
		r.cold = met.every(2, seed)
		r.persist()
		s := r.start()
		h := &history{blocks: 500}
		mustCreate(t, s, 1, h.blocks)
		c := newClient(t, s)
		verify := func() {
			t.Helper()
			mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
			mustCheck(t, s)
		}
		for i := range 90 {
			h.load(t, c, rng, 1, 5, 300)
			all := s.Devices()
			d := all[rng.IntN(len(all))]
			if r.cold != nil && i%3 == 0 {
				if err := s.post(&task{kind: taskTurn}); err != nil {
					t.Fatal(err)
				}
				chill(s, 100, rng.IntN(2) == 0)
			}
			var err error
			switch k := rng.IntN(9); {
			case k < 2 && len(all) < 6:
				_, err = s.AddDevice(ctx, r.addDisk(seed<<8+uint64(i), 6<<20+rng.Int64N(9)<<20), NewDevice{Class: Class(rng.IntN(2))})
			case k == 2 && len(all) < 6:
				if _, err = s.AddDevice(ctx, r.addDisk(seed<<8+uint64(i), 12<<20), NewDevice{Class: d.Class, Replaces: d.ID}); errors.Is(err, ErrNoSpace) || errors.Is(err, ErrDevice) {
					err = nil // it may have left meanwhile
				}
			case k < 5:
				if err = s.DrainDevice(ctx, d.ID, rng.IntN(2) == 0); errors.Is(err, ErrNoSpace) || errors.Is(err, ErrDevice) {
					err = nil // it may have left meanwhile
				}
			case k == 5:
				if err = s.KeepDevice(ctx, d.ID); errors.Is(err, ErrDevice) {
					err = nil
				}
			case k == 6:
				if err = s.RemoveDevice(ctx, d.ID); errors.Is(err, ErrDevice) {
					err = nil
				}
			case k == 7:
				mustClose(t, s)
				rng.Shuffle(len(r.cfg.Devices), func(i, j int) {
					r.cfg.Devices[i], r.cfg.Devices[j] = r.cfg.Devices[j], r.cfg.Devices[i]
				})
				s = r.start()
				c = newClient(t, s)
				verify()
			case k == 8:
				old := s
				crashed := r.crashAll(devicetest.CrashOptions{Seed: rng.Uint64(), Keep: rng.Float64(), Tear: true})
				mustClose(t, old)
				r = crashed
				r.tb = t
				s = r.start()
				c = newClient(t, s)
				verify()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		verify()
		mustClose(t, s)
	})
}

// TestReplaceTheOnlyDevice has checkpoints and writes go on while the only device is replaced.
func TestReplaceTheOnlyDevice(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 20<<20)
	r.persist()
	s := r.start()
	mustCreate(t, s, 1, 500)
	c := newClient(t, s)
	stop := make(chan struct{})
	var checkpoints sync.WaitGroup
	for round := range 12 {
		checkpoints.Go(func() {
			for s.checkpoint() == nil {
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		c.must(c.write(1, Seq(round+1), BlockNo(round), noise(uint64(round))))
		old := s.Devices()[0]
		if _, err := s.AddDevice(ctx, r.addDisk(uint64(round), 20<<20), NewDevice{Replaces: old.ID}); err != nil {
			t.Fatal(err)
		}
		waitGone(t, s, old.ID)
		close(stop)
		checkpoints.Wait()
		stop = make(chan struct{})
	}
	mustCheck(t, s)
	mustClose(t, s)
}

// TestManyDevices runs a pool of 48 devices, opened in another order, and one more
// than a pool takes.
func TestManyDevices(t *testing.T) {
	ctx := context.Background()
	sizes := make([]int64, 48)
	for i := range sizes {
		sizes[i] = int64(3+i%3) << 20
	}
	r := newRig(t, 1, sizes...)
	r.persist()
	s := r.start()
	h := &history{blocks: 3000}
	mustCreate(t, s, 1, h.blocks)
	rng := testRand(1)
	h.load(t, newClient(t, s), rng, 1, 300, 2500)
	for range 3 {
		if err := s.checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	rng.Shuffle(len(r.names), func(i, j int) { r.names[i], r.names[j] = r.names[j], r.names[i] })
	s = r.start()
	mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
	mustCheck(t, s)
	busy := 0
	for _, d := range s.Devices() {
		if d.LiveBytes > 0 {
			busy++
		}
	}
	if busy < 10 {
		t.Fatalf("only %d of 48 devices hold anything", busy)
	}
	for range format.DevicesMax - 48 {
		if _, err := s.AddDevice(ctx, r.addDisk(9, 3<<20), NewDevice{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.AddDevice(ctx, r.addDisk(9, 3<<20), NewDevice{}); !errors.Is(err, ErrDevice) {
		t.Fatalf("device %d: %v", format.DevicesMax+1, err)
	}
	for i := range 20 {
		if err := s.DrainDevice(ctx, deviceAt(t, s, fmt.Sprintf("disk%d", i)).ID, true); err != nil {
			t.Fatal(err)
		}
	}
	waitDevices(t, s, "44 devices", func(all []DeviceInfo) bool { return len(all) == format.DevicesMax-20 })
	mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
	mustCheck(t, s)
	mustClose(t, s)
	s = r.start()
	mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
	mustCheck(t, s)
	mustClose(t, s)
}

// TestImportElsewhere looks for the devices of a pool among others and under other names.
func TestImportElsewhere(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 12<<20, 12<<20)
	r.persist()
	s := r.start()
	h := &history{blocks: 200}
	mustCreate(t, s, 1, h.blocks)
	h.load(t, newClient(t, s), testRand(1), 1, 20, 100)
	alone := r.disks["disk0"].Clone() // of the time when two disks were all
	other := r.disks["disk1"].Clone()
	if _, err := s.AddDevice(ctx, r.addDisk(3, 12<<20), NewDevice{}); err != nil {
		t.Fatal(err)
	}
	gone := deviceAt(t, s, "disk0").ID
	if err := s.DrainDevice(ctx, gone, true); err != nil {
		t.Fatal(err)
	}
	r.disks["disk0"].Observe(nil)
	waitGone(t, s, gone)
	h.load(t, newClient(t, s), testRand(2), 1, 20, 100)
	mustClose(t, s)
	open := func(search []string, paths ...string) (string, []string) {
		t.Helper()
		c := r.cfg
		var events []string
		c.Devices, c.Persist = paths, nil
		c.Event = func(e Event) { events = append(events, e.Code+": "+e.Text) }
		if search != nil {
			c.Search = func() []string { return search }
		}
		s, err := Open(ctx, c)
		if err != nil {
			return err.Error(), events
		}
		mustEqual(t, s.Volume(1), h.at(Seq(len(h.steps))))
		mustCheck(t, s)
		mustClose(t, s)
		return "", events
	}
	want := func(what, got, text string) {
		t.Helper()
		if text == "" && got != "" || !strings.Contains(got, text) {
			t.Fatalf("%s: %q, want %q", what, got, text)
		}
	}
	refusal := func(paths ...string) string { got, _ := open(nil, paths...); return got }

	// In another order, with the place of the one that left, which is empty now.
	want("order", refusal("disk2", "disk1"), "")
	want("empty one among them", refusal("disk0", "disk2", "disk1"), "")
	// Under other names, found where the node is told to search.
	r.disks["sdx"], r.disks["sdy"] = r.disks["disk1"], r.disks["disk2"]
	got, _ := open([]string{"sdy", "disk0", "sdx"}, "disk7", "disk8")
	want("other names", got, "")
	got, _ = open([]string{"disk0"}, "disk1")
	want("not found", got, "is missing")
	// The disk that has left, as it was before it was wiped: it is not taken, and the
	// pool does without it; alone it is refused.
	r.disks["old"] = alone
	got, events := open(nil, "old", "disk1", "disk2")
	want("left", got, "")
	if len(events) != 1 || !strings.Contains(events[0], "removed or replaced") {
		t.Fatalf("%q", events)
	}
	r.disks["old1"] = other
	want("all old", refusal("old", "old1"), "an older state of pool")
	want("one of them old", refusal("old1", "disk2"), "is stale")
	// A foreign disk is left alone too.
	foreign := newRig(t, 9, 8<<20)
	r.disks["foreign"] = foreign.disks["disk0"]
	rewriteSuperblocks(t, r.disks["foreign"], func(sb *format.Superblock) { sb.Pool[3]++ })
	got, events = open(nil, "disk1", "foreign", "disk2")
	want("foreign", got, "")
	if len(events) != 1 || !strings.Contains(events[0], "belongs to pool") {
		t.Fatalf("%q", events)
	}
	want("foreign in its place", refusal("disk1", "foreign"), "swapped between nodes")
	// A copy cannot be told from the original.
	r.disks["copy"] = r.disks["disk2"].Clone()
	want("copy", refusal("disk1", "disk2", "copy"), "one is a copy")
	// One that was drained and pulled out before it was removed is not needed.
	s = r.start()
	if _, err := s.AddDevice(ctx, "disk0", NewDevice{}); err != nil {
		t.Fatal(err)
	}
	second := deviceAt(t, s, "disk2").ID
	if err := s.DrainDevice(ctx, second, false); err != nil {
		t.Fatal(err)
	}
	waitDrained(t, s, second)
	mustClose(t, s)
	want("drained one pulled out", refusal("disk1", "disk0"), "")
}

func rewriteSuperblocks(tb testing.TB, d *devicetest.Disk, change func(*format.Superblock)) {
	tb.Helper()
	for _, off := range format.SuperblockOffsets {
		p := make([]byte, format.PageSize)
		d.Peek(p, off)
		sb, err := format.ParseSuperblock(p)
		if err != nil {
			tb.Fatal(err)
		}
		change(sb)
		sb.Put(p)
		d.Overwrite(off, p)
	}
}
