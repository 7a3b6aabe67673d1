package scsi_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

var (
	sanitizing  = code{2, 4, 0x1b}
	notSanitary = code{3, 0x31, 3}
)

// Bits of byte 1 of SANITIZE.
const (
	immediate    = 0x80
	unrestricted = 0x20
)

func sanitizeCDB(action, flags byte, n int) []byte {
	return []byte{cdb.Sanitize, action | flags, 0, 0, 0, 0, 0, byte(n >> 8), byte(n), 0}
}

func overwriteList(first byte, p []byte) []byte {
	return append([]byte{first, 0, byte(len(p) >> 8), byte(len(p))}, p...)
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

// ready waits until TEST UNIT READY is GOOD.
func (r *rig) ready() {
	r.t.Helper()
	eventually(r.t, "unit ready", func() bool { return r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0).status == cdb.Good })
}

// gate is a volume that holds the writing requests of sanitize operations back
// while it is shut.
type gate struct {
	*memlu.LU
	mu   sync.Mutex
	shut int // requests that pass before it shuts; negative: all
	held []*scsi.Request
}

func (g *gate) Submit(r *scsi.Request) {
	if r.Op == scsi.OpWriteSame || r.Op == scsi.OpUnmap {
		g.mu.Lock()
		if g.shut == 0 {
			g.held = append(g.held, r)
			g.mu.Unlock()
			return
		}
		g.shut--
		g.mu.Unlock()
	}
	g.LU.Submit(r)
}

func (g *gate) holds() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.held)
}

func (g *gate) open() {
	g.mu.Lock()
	g.shut = -1
	held := g.held
	g.held = nil
	g.mu.Unlock()
	for _, r := range held {
		g.LU.Submit(r)
	}
}

// gateRig is a rig whose unit is behind a gate, with a clock that leaps, so that
// every request's progress is noted.
func gateRig(t *testing.T, g *gate, change func(*scsi.LUConfig)) *rig {
	t.Helper()
	now := time.Unix(1e9, 0)
	var mu sync.Mutex
	s := scsi.New(scsi.Config{Backend: g.LU, NodePort: 2, PortGroup: 1, TargetName: target, Now: func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		now = now.Add(10 * time.Second)
		return now
	}})
	t.Cleanup(s.Close)
	r := &rig{t: t, s: s, lu: g.LU}
	c := unitConfig(0, g)
	if change != nil {
		change(&c)
	}
	if err := s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	s.SetAccess(0, scsi.Visibility{Any: true})
	r.n = r.attach(initiator, 1)
	return r
}

// waiter is a command that was executed and may end later, on any goroutine.
type waiter struct {
	task *scsi.Task
	done atomic.Bool
}

func (w *waiter) completed() bool { return w.done.Load() }

func (p port) start(c command) *waiter {
	p.t.Helper()
	w := &waiter{task: p.newTask(c)}
	w.task.Complete = func(*scsi.Task) {
		if w.done.Swap(true) {
			p.t.Error("completed twice")
		}
	}
	if p.s.Begin(w.task) == scsi.Finished {
		p.t.Fatalf("CDB %x finished: %02x %x", c.cdb, w.task.Status, w.task.Sense[:w.task.SenseLen])
	}
	w.task.Out = bytes.Clone(c.out)
	w.task.In = make([]byte, w.task.InLen)
	p.s.Execute(w.task)
	p.s.Kick()
	return w
}

func (r *rig) medium(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if !r.lu.TryRead(0, b) {
		r.t.Fatal("the medium cannot be read")
	}
	return b
}

func TestSanitizeOverwrite(t *testing.T) {
	const size = 40 * mib // three requests
	r := newRig(t, size, nil)
	var passes [][]byte
	record := func(q *scsi.Request) error {
		switch {
		case q.Off != 0:
		case q.Op == scsi.OpWriteSame:
			passes = append(passes, bytes.Clone(q.Data))
		case q.Op == scsi.OpUnmap:
			passes = append(passes, make([]byte, 512))
		}
		return nil
	}
	full := pattern(512, 3)
	inverse := func(b []byte) []byte {
		b = bytes.Clone(b)
		for i := range b {
			b[i] = ^b[i]
		}
		return b
	}
	seven := bytes.Repeat([]byte("pattern"), 74)[:512]
	for _, c := range []struct {
		first byte
		p     []byte
		want  [][]byte
	}{
		{1, full, [][]byte{full}},
		{1, full[:256], [][]byte{slices.Concat(full[:256], full[:256])}},
		{1, []byte("pattern"), [][]byte{seven}},
		{2, full, [][]byte{full, full}},
		{0x82, full, [][]byte{inverse(full), full}},
		{0x83, []byte("pattern"), [][]byte{seven, inverse(seven), seven}},
		{0x82, []byte{0}, [][]byte{inverse(make([]byte, 512)), make([]byte, 512)}},
	} {
		passes = nil
		list := overwriteList(c.first, c.p)
		r.lu.SetFail(record)
		r.good(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, len(list)), list))
		r.lu.SetFail(nil)
		if !slices.EqualFunc(passes, c.want, bytes.Equal) {
			t.Errorf("%02x of %d bytes: passes %x", c.first, len(c.p), passes)
		}
		if got := r.medium(size); !bytes.Equal(got, bytes.Repeat(c.want[len(c.want)-1], size/512)) {
			t.Errorf("%02x of %d bytes: not all is overwritten", c.first, len(c.p))
		}
	}
	if n := r.lu.Allocated(); n != 0 {
		t.Errorf("zeros take %d blocks", n)
	}
}

func TestSanitizeBlockErase(t *testing.T) {
	r := newRig(t, 16*mib, nil)
	r.good(r.write(rw16(cdb.Write16, 0, 0, 8192), pattern(4*mib, 1)))
	r.good(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, 0, 0)...))
	if r.lu.Allocated() != 0 || !bytes.Equal(r.medium(16*mib), make([]byte, 16*mib)) {
		t.Error("not erased")
	}
	got := descriptors(t, r.good(r.read(lbaStatus(0, 255), 255)).in)
	if len(got) != 1 || got[0] != [3]uint64{0, 32768, 1} {
		t.Errorf("GET LBA STATUS %v", got)
	}
	r.good(r.none(sanitizeCDB(cdb.ActionSanitizeExit, 0, 0)...)) // nothing failed: nothing to do
}

// TestSanitizeIsAnsweredAtItsEnd has the server look at the unit all the time, and so at
// who waits: no look that began before a command may answer it.
func TestSanitizeIsAnsweredAtItsEnd(t *testing.T) {
	r := newRig(t, mib, nil)
	stop := make(chan struct{})
	var looks sync.WaitGroup
	for range 4 {
		looks.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if err := r.s.SetLU(unitConfig(0, r.lu)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	list := overwriteList(1, pattern(512, 2))
	for range 500 {
		r.good(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, len(list)), list))
	}
	close(stop)
	looks.Wait()
}

func TestSanitizeRefusals(t *testing.T) {
	r := newRig(t, mib, nil)
	before := pattern(mib, 1)
	r.good(r.write(rw16(cdb.Write16, 0, 0, 2048), before))
	list := overwriteList(1, pattern(512, 2))
	for n := range 5 {
		res := r.refused(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, n), list[:n]), badField)
		if res.sense.Field != 7 || res.sense.InData {
			t.Errorf("length %d: %+v", n, res.sense)
		}
	}
	r.refused(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, 517), make([]byte, 520)), badField)
	r.refused(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, 516), list[:515]), badListLen)
	for _, action := range []byte{cdb.ActionSanitizeBlockErase, cdb.ActionSanitizeExit} {
		r.refused(r.write(sanitizeCDB(action, 0, 8), make([]byte, 8)), badField)
	}
	for action := range byte(32) {
		switch action {
		case cdb.ActionSanitizeOverwrite, cdb.ActionSanitizeBlockErase, cdb.ActionSanitizeExit:
			for _, at := range []int{1, 2, 3, 4, 5, 6} {
				c := sanitizeCDB(action, 0, 0)
				c[at] |= 0x40
				if res := r.refused(r.none(c...), badField); res.sense.Field != uint16(at) || res.sense.Bit != 6 {
					t.Errorf("reserved bit of byte %d: %+v", at, res.sense)
				}
			}
		default:
			r.refused(r.none(sanitizeCDB(action, 0, 0)...), badField)
		}
	}
	for _, c := range []struct {
		at    int
		value byte
		field uint16
	}{{0, 0, 0}, {0, 0x80, 0}, {0, 0x21, 0}, {1, 1, 1}, {3, 1, 2}, {2, 0, 2}} {
		bad := bytes.Clone(list)
		bad[c.at] = c.value
		if c.at == 2 {
			bad[3] = 0 // no pattern
		}
		res := r.refused(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, len(bad)), bad), badParam)
		if res.sense.Field != c.field || !res.sense.InData {
			t.Errorf("byte %d of %02x: %+v", c.at, c.value, res.sense)
		}
	}
	c := unitConfig(0, r.lu)
	c.ReadOnly = true
	if err := r.s.SetLU(c); err != nil {
		t.Fatal(err)
	}
	r.on(r.n, 0).attentions()
	r.refused(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, 0, 0)...), readOnly)
	r.refused(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, len(list)), list), readOnly)
	if !bytes.Equal(r.medium(mib), before) {
		t.Error("a refused SANITIZE changed the medium")
	}
}

// What works during the operation and what does not, on every nexus, with the
// progress of it; and nothing ends it.
func TestDuringSanitize(t *testing.T) {
	g := &gate{LU: memlu.New(64 * mib), shut: 1}
	r := gateRig(t, g, nil)
	r.good(r.write(rw16(cdb.Write16, 0, 0, 8), pattern(4096, 1)))
	// A write that was begun before does not land after.
	early := r.on(r.n, 0).newTask(command{cdb: rw16(cdb.Write16, 0, 0, 1), write: true, expected: 512})
	earlyDone := make(chan struct{})
	early.Complete = func(*scsi.Task) { close(earlyDone) }
	if r.s.Begin(early) != scsi.WantData {
		t.Fatal("no data wanted")
	}

	list := overwriteList(1, pattern(512, 7))
	waiting := r.on(r.n, 0).start(command{cdb: sanitizeCDB(cdb.ActionSanitizeOverwrite, 0, len(list)), write: true, expected: uint32(len(list)), out: list})
	eventually(t, "one of four requests is done", func() bool { return g.holds() == 1 })

	early.Out = make([]byte, 512)
	r.s.Execute(early)
	<-earlyDone
	if sense, _, _ := cdb.ParseSense(early.Sense[:early.SenseLen]); early.Status != cdb.CheckCondition || sense.ASCQ != 0x1b {
		t.Errorf("a command from before: status %02x, %+v", early.Status, sense)
	}

	other := r.attach("iqn.2026-11.test:other", 2)
	for _, n := range []*scsi.Nexus{r.n, other} {
		p := r.on(n, 0)
		for _, c := range [][]byte{
			{cdb.TestUnitReady, 5: 0}, {cdb.StartStopUnit, 4: 1, 5: 0}, readBlock0, rw10(cdb.Write10, 0, 0, 1), rw16(cdb.Verify16, 0, 0, 1),
			rw10(cdb.SynchronizeCache10, 0, 0, 0), modeSense6(0, 8, 0), unmapCDB(0), {cdb.LogSelect, 9: 0}, {0xff},
			sanitizeCDB(cdb.ActionSanitizeBlockErase, immediate, 0), sanitizeCDB(cdb.ActionSanitizeExit, 0, 0),
			rw16(cdb.OrWrite16, 0, 0, 1), atomicCDB(0, 0, 0, 1), lbaStatus(0, 24), {cdb.ReadBuffer, 3, 9: 0},
		} {
			res := r.refused(p.run(command{cdb: c, read: true, expected: 512}), sanitizing)
			if !res.sense.HasProgress || res.sense.Progress != 0x4000 {
				t.Errorf("CDB %x: progress %+v", c, res.sense)
			}
		}
		for _, c := range [][]byte{
			inq(0, 0, 255), inq(1, 0xb1, 255), reportLUNsCDB, readCapacity16(32), {cdb.ReadCapacity10, 9: 0}, logSense(0x19, 0, 255),
			maintenanceIn(cdb.ActionReportTargetPorts, 0, 0, 0, 255), maintenanceIn(cdb.ActionReportOpcodes, 0, 0, 0, 255),
		} {
			r.good(p.run(command{cdb: c, read: true, expected: 255}))
		}
		got := r.good(p.run(requestSenseIn)).in
		if s, _, _ := cdb.ParseSense(got); (code{s.Key, s.ASC, s.ASCQ}) != sanitizing || s.Progress != 0x4000 {
			t.Errorf("REQUEST SENSE %x", got)
		}
	}

	// An abort ends the command that waits, and not the operation.
	if waiting.completed() {
		t.Error("SANITIZE without IMMED was answered before the end")
	}
	if a := r.manage(r.n, scsi.AbortTask, 0, waiting.task); a != scsi.FunctionComplete || !waiting.completed() {
		t.Errorf("ABORT TASK: %d", a)
	}
	for _, f := range []scsi.TaskFunction{scsi.AbortTaskSet, scsi.LogicalUnitReset, scsi.TargetWarmReset} {
		if a := r.manage(r.n, f, 0, nil); a != scsi.FunctionComplete {
			t.Errorf("function %d: %d", f, a)
		}
	}
	r.on(r.n, 0).run(requestSenseIn)
	r.refused(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0), sanitizing)
	g.open()
	r.ready()
	if !bytes.Equal(r.medium(64*mib), bytes.Repeat(pattern(512, 7), 64*mib/512)) {
		t.Error("not all is overwritten")
	}
}

// The nexus of a command that waits for the end goes away: the command ends.
func TestSanitizeOutlivesItsNexus(t *testing.T) {
	g := &gate{LU: memlu.New(mib)}
	r := gateRig(t, g, nil)
	waiting := r.on(r.n, 0).start(command{cdb: sanitizeCDB(cdb.ActionSanitizeBlockErase, 0, 0)})
	eventually(t, "at work", func() bool { return g.holds() == 1 })
	r.s.AbortNexus(r.n)
	if !waiting.completed() || !waiting.task.Aborted.Load() {
		t.Error("the command goes on without a nexus")
	}
	r.s.Detach(r.n, true)
	r.n = r.attach(initiator, 1)
	r.refused(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0), sanitizing)
	g.open()
	r.ready()
}

// The node with the optimized path does the work; another goes on where it was,
// and so does a node that was started again.
func TestSanitizeMoves(t *testing.T) {
	const size = 64 * mib
	var mu sync.Mutex
	state := scsi.ActiveNonOptimized
	paths := func(c *scsi.LUConfig) {
		c.Paths = func() []scsi.PortGroup {
			mu.Lock()
			defer mu.Unlock()
			return []scsi.PortGroup{{ID: 1, Ports: []uint16{2}, State: state}}
		}
	}
	g := &gate{LU: memlu.New(size), shut: 2}
	var offsets []uint64
	g.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpWriteSame {
			offsets = append(offsets, q.Off/mib)
		}
		return nil
	})
	r := gateRig(t, g, paths)
	move := func(to scsi.PathState) {
		mu.Lock()
		state = to
		mu.Unlock()
		r.s.PathsChanged(0)
		r.on(r.n, 0).run(requestSenseIn)
	}
	list := overwriteList(1, pattern(512, 7))
	r.good(r.write(sanitizeCDB(cdb.ActionSanitizeOverwrite, immediate, len(list)), list))
	r.refused(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0), sanitizing)
	if n := g.Count(scsi.OpWriteSame); n != 0 {
		t.Fatalf("a node without the optimized path made %d requests", n)
	}
	move(scsi.ActiveOptimized)
	eventually(t, "two of four requests are done", func() bool { return g.holds() == 1 })
	// The node dies: what it had under way is lost.
	g.mu.Lock()
	g.held = nil
	g.mu.Unlock()
	r.s.Close()

	again := &gate{LU: g.LU, shut: 1}
	r = gateRig(t, again, paths)
	eventually(t, "three of four requests are done", func() bool { return again.holds() == 1 })
	res := r.refused(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0), sanitizing)
	if res.sense.Progress != 0xc000 {
		t.Errorf("progress %04x", res.sense.Progress)
	}
	move(scsi.ActiveNonOptimized)
	again.open()
	if n := g.Count(scsi.OpFlush); n != 0 {
		t.Error("finished without the path")
	}
	move(scsi.ActiveOptimized)
	r.ready()
	g.SetFail(nil)
	if !bytes.Equal(r.medium(size), bytes.Repeat(pattern(512, 7), size/512)) {
		t.Error("not all is overwritten")
	}
	if got := fmt.Sprint(offsets); got != "[0 16 32 48]" && got != "[0 16 32 48 48]" {
		t.Errorf("pieces at MiB %s", got)
	}
}

// A request that is late, after another node has finished the operation, does
// not touch what was written since.
func TestLateSanitizeRequest(t *testing.T) {
	g := &gate{LU: memlu.New(mib)}
	r := gateRig(t, g, nil)
	r.good(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, immediate, 0)...))
	eventually(t, "at work", func() bool { return g.holds() == 1 })
	g.SetState(nil) // the other node has finished it
	data := pattern(4096, 5)
	r.good(r.write(rw16(cdb.Write16, 0, 0, 8), data))
	g.open()
	eventually(t, "late request refused", func() bool { return g.Count(scsi.OpUnmap) == 1 })
	if !bytes.Equal(r.medium(4096), data) {
		t.Error("the late request was executed")
	}
	r.good(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0))
}

// A volume that is busy is tried again; one that fails makes the operation fail,
// until it is repeated or, when it was unrestricted, given up.
func TestSanitizeFails(t *testing.T) {
	busy := 0
	r := newRig(t, mib, nil)
	r.lu.SetFail(func(q *scsi.Request) error {
		if q.Op == scsi.OpUnmap && busy < 2 {
			busy++
			return scsi.ErrBusy
		}
		return nil
	})
	r.good(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, 0, 0)...))
	if busy != 2 {
		t.Error("not tried again")
	}
	broken := func(q *scsi.Request) error {
		if q.Op == scsi.OpUnmap {
			return errors.New("disk on fire")
		}
		return nil
	}
	exit := sanitizeCDB(cdb.ActionSanitizeExit, 0, 0)
	for _, flags := range []byte{0, unrestricted} {
		r.lu.SetFail(broken)
		r.refused(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, flags, 0)...), notSanitary)
		r.refused(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0), notSanitary)
		r.refused(r.read(readBlock0, 512), notSanitary)
		r.good(r.read(inq(0, 0, 255), 255))
		got := r.good(r.on(r.n, 0).run(requestSenseIn)).in
		if s, _, _ := cdb.ParseSense(got); (code{s.Key, s.ASC, s.ASCQ}) != notSanitary {
			t.Errorf("REQUEST SENSE %x", got)
		}
		if flags == 0 {
			r.refused(r.none(exit...), badField)
			r.refused(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, unrestricted, 0)...), badField)
			r.lu.SetFail(nil)
			r.good(r.none(sanitizeCDB(cdb.ActionSanitizeBlockErase, 0, 0)...))
		} else {
			r.lu.SetFail(nil)
			r.good(r.none(exit...))
		}
		r.good(r.none(cdb.TestUnitReady, 0, 0, 0, 0, 0))
	}
}
