package scsi_test

import (
	"bytes"
	"strings"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
	"github.com/twinsan/twinsan/server/scsi/memlu"
)

// manage performs a task management function and waits for its answer.
func (r *rig) manage(n *scsi.Nexus, f scsi.TaskFunction, lun uint64, ref *scsi.Task) scsi.TaskResponse {
	r.t.Helper()
	answer := <-r.ask(n, f, lun, ref)
	return answer
}

// ask starts a task management function.
func (r *rig) ask(n *scsi.Nexus, f scsi.TaskFunction, lun uint64, ref *scsi.Task) chan scsi.TaskResponse {
	answers := make(chan scsi.TaskResponse, 1) // a second answer would panic below
	once := false
	r.s.TaskManagement(n, f, lun, ref, func(a scsi.TaskResponse) {
		if once {
			panic("answered twice")
		}
		once = true
		answers <- a
	})
	r.s.Kick()
	return answers
}

// unanswered fails when a function was answered.
func (r *rig) unanswered(answers chan scsi.TaskResponse) {
	r.t.Helper()
	select {
	case a := <-answers:
		r.t.Fatalf("answered %d too early", a)
	default:
	}
}

// flight is a task under way.
type flight struct {
	*scsi.Task
	completed int
	status    byte
	aborted   bool
	done      chan struct{} // closed at the first completion
}

// launch brings a command to the given point: begun, or started.
func (p port) launch(c command, start bool) *flight {
	p.t.Helper()
	f := &flight{Task: p.newTask(c), done: make(chan struct{})}
	f.Complete = func(k *scsi.Task) {
		f.completed++
		f.status, f.aborted = k.Status, k.Aborted.Load()
		if f.completed == 1 {
			close(f.done)
		}
	}
	if v := p.s.Begin(f.Task); v == scsi.Finished {
		p.t.Fatalf("CDB %x finished: %02x %x", c.cdb, f.Status, f.Sense[:f.SenseLen])
	}
	if start {
		f.Out = bytes.Clone(c.out)
		f.In = make([]byte, f.InLen)
		p.s.Execute(f.Task)
	}
	return f
}

var writeBlock0 = command{cdb: rw10(cdb.Write10, 0, 0, 1), write: true, expected: 512, out: pattern(512, 1)}

func TestTaskManagementAnswers(t *testing.T) {
	r := newRig(t, mib, nil)
	for _, c := range []struct {
		f    scsi.TaskFunction
		lun  uint64
		want scsi.TaskResponse
	}{
		{scsi.ClearACA, 0, scsi.FunctionUnsupported}, {scsi.TaskReassign, 0, scsi.ReassignUnsupported},
		{0, 0, scsi.FunctionUnsupported}, {9, 0, scsi.FunctionUnsupported}, {12, 0, scsi.FunctionUnsupported},
		{scsi.AbortTask, 0, scsi.NoSuchTask},
		{scsi.AbortTaskSet, 0, scsi.FunctionComplete}, {scsi.ClearTaskSet, 0, scsi.FunctionComplete},
		{scsi.LogicalUnitReset, 0, scsi.FunctionComplete}, {scsi.TargetWarmReset, 1 << 48, scsi.FunctionComplete},
		{scsi.AbortTaskSet, 1 << 48, scsi.NoSuchLUN}, {scsi.ClearTaskSet, 7, scsi.NoSuchLUN}, {scsi.LogicalUnitReset, 1 << 48, scsi.NoSuchLUN},
	} {
		if got := r.manage(r.n, c.f, c.lun, nil); got != c.want {
			t.Errorf("function %d, LUN %x: %d, want %d", c.f, c.lun, got, c.want)
		}
	}
}

// An answer waits for what the volume has, and nothing lands after it.
func TestAbortWaitsForTheVolume(t *testing.T) {
	for _, f := range []scsi.TaskFunction{scsi.AbortTask, scsi.AbortTaskSet, scsi.ClearTaskSet, scsi.LogicalUnitReset, scsi.TargetWarmReset, scsi.TargetColdReset} {
		r := newRig(t, mib, nil)
		var mu sync.Mutex
		var order []string
		dropped := make(chan struct{})
		note := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, what)
		}
		r.s.SetHooks(scsi.Hooks{
			Flush:        func() { note("flush") },
			DropSessions: func(name, _ string) { note("drop" + name); close(dropped) },
		})
		other := r.on(r.attach("iqn.2026-11.test:other", 2), 0)
		r.lu.Hold()
		own := r.on(r.n, 0).launch(writeBlock0, true)
		foreign := other.launch(writeBlock0, true)
		answered := make(chan struct{})
		r.s.TaskManagement(r.n, f, 0, own.Task, func(a scsi.TaskResponse) {
			if a != scsi.FunctionComplete || own.completed != 1 {
				t.Errorf("function %d: answer %d, task completed %d times", f, a, own.completed)
			}
			note("answer")
			close(answered)
		})
		select {
		case <-answered:
			t.Fatalf("function %d: answered while the volume has the write", f)
		default:
		}
		if !own.Aborted.Load() {
			t.Error("not marked")
		}
		r.lu.Release()
		<-answered
		if f == scsi.TargetColdReset {
			<-dropped
			mu.Lock()
			if got := join(order); !strings.Contains(got, "answer flush drop") {
				t.Errorf("function %d: %s", f, got)
			}
			mu.Unlock()
		}
		if !own.aborted || own.status != cdb.Good || own.completed != 1 {
			t.Errorf("function %d: own task: aborted %v status %02x completed %d", f, own.aborted, own.status, own.completed)
		}
		hits := f != scsi.AbortTask && f != scsi.AbortTaskSet
		if foreign.completed != 1 || foreign.aborted != hits || (foreign.status == cdb.TaskAborted) != hits {
			t.Errorf("function %d: other's task: aborted %v status %02x", f, foreign.aborted, foreign.status)
		}
		// A reset is told to all, the requester too; clearing with TAS=1 is not.
		if f >= scsi.LogicalUnitReset {
			r.on(r.n, 0).expect(uaReset)
			other.expect(uaReset)
		}
		r.on(r.n, 0).expect()
		other.expect()
		// A task that has ended meanwhile counts as aborted; one of another LUN or nexus is none.
		if f == scsi.AbortTask {
			if a := r.manage(r.n, f, 0, own.Task); a != scsi.FunctionComplete {
				t.Errorf("answer %d for an ended task", a)
			}
			if a := r.manage(r.n, f, 1<<48, own.Task); a != scsi.NoSuchTask {
				t.Errorf("answer %d for another LUN", a)
			}
			if a := r.manage(r.n, f, 0, foreign.Task); a != scsi.NoSuchTask {
				t.Errorf("answer %d for another nexus's task", a)
			}
		}
	}
}

func join(s []string) string {
	out := ""
	for i, x := range s {
		if i > 0 {
			out += " "
		}
		out += x
	}
	return out
}

// Tasks that wait for data are given up at once, and have no effect even when
// the transport executes them after all.
func TestAbortOfWaitingTasks(t *testing.T) {
	r := newRig(t, mib, nil)
	other := r.attach("iqn.2026-11.test:other", 2)
	var given []*scsi.Task
	r.s.SetHooks(scsi.Hooks{AbortWaiting: func(k *scsi.Task) {
		if !k.Aborted.Load() {
			t.Error("Aborted is not set")
		}
		given = append(given, k)
	}})
	first := r.on(r.n, 0).launch(writeBlock0, false)
	second := r.on(r.n, 0).launch(writeBlock0, false)
	reading := r.on(r.n, 0).launch(readBlock0Cmd, false)
	if a := r.manage(other, scsi.ClearTaskSet, 0, nil); a != scsi.FunctionComplete {
		t.Fatalf("answer %d", a)
	}
	if len(given) != 3 || given[0] != first.Task || given[1] != second.Task || given[2] != reading.Task {
		t.Fatalf("%d tasks given up", len(given))
	}
	if first.Status != cdb.TaskAborted || reading.Status != cdb.TaskAborted {
		t.Errorf("status %02x, %02x for another's abort", first.Status, reading.Status)
	}
	r.s.Forget(first.Task)
	second.Out = pattern(512, 1)
	r.s.Execute(second.Task)
	reading.In = make([]byte, 512)
	if r.s.TryExecute(reading.Task) {
		t.Error("an aborted READ was answered")
	}
	r.s.Execute(reading.Task)
	if second.completed != 1 || second.status != cdb.TaskAborted || reading.completed != 1 || reading.status != cdb.TaskAborted {
		t.Errorf("write %d times %02x, read %d times %02x", second.completed, second.status, reading.completed, reading.status)
	}
	if r.lu.Count(scsi.OpWrite)+r.lu.Count(scsi.OpRead) != 0 {
		t.Error("an aborted task reached the volume")
	}
	// One's own abort asks for no response; a second one does not give up again.
	given = nil
	third := r.on(r.n, 0).launch(writeBlock0, false)
	r.manage(r.n, scsi.AbortTaskSet, 0, nil)
	r.manage(r.n, scsi.LogicalUnitReset, 0, nil)
	if len(given) != 1 || third.Status != cdb.Good {
		t.Errorf("%d given up, status %02x", len(given), third.Status)
	}
	r.s.Forget(third.Task)
	if s := r.s.Stats()[0]; s.InFlight != 0 || s.Classes[scsi.ClassWrite].Aborted != 3 || s.Classes[scsi.ClassRead].Aborted != 1 {
		t.Errorf("stats %+v", s)
	}
}

// Commands of many requests stop at the next one; two functions wait for the same task.
func TestAbortBetweenRequests(t *testing.T) {
	r := newRig(t, 16*mib, nil)
	r.lu.Hold()
	list := cdb.AppendUnmap(nil, [2]uint64{0, 8}, [2]uint64{8, 8}, [2]uint64{16, 8})
	u := r.on(r.n, 0).launch(command{cdb: unmapCDB(len(list)), write: true, expected: uint32(len(list)), out: list}, true)
	v := r.on(r.n, 0).launch(command{cdb: rw10(cdb.Verify10, 0, 0, 2000)}, true)
	answers := make(chan int, 2)
	for i := range 2 {
		r.s.TaskManagement(r.n, scsi.LogicalUnitReset, 0, nil, func(scsi.TaskResponse) { answers <- i })
	}
	r.lu.Release()
	<-answers
	<-answers
	if u.completed != 1 || v.completed != 1 {
		t.Fatal("answered before the tasks ended")
	}
	if r.lu.Count(scsi.OpUnmap) != 1 || r.lu.Count(scsi.OpRead) != 1 {
		t.Errorf("%d unmaps, %d reads after the abort", r.lu.Count(scsi.OpUnmap), r.lu.Count(scsi.OpRead))
	}
}

// A unit that is unmapped while tasks are under way keeps them in sight of a reset.
func TestResetSeesFormerNexuses(t *testing.T) {
	r := newRig(t, mib, nil)
	other := r.attach("iqn.2026-11.test:other", 2)
	r.lu.Hold()
	f := r.on(r.n, 0).launch(writeBlock0, true)
	waiting := r.on(r.n, 0).launch(writeBlock0, false)
	r.s.SetAccess(0, scsi.Visibility{Initiators: []string{"iqn.2026-11.test:other"}})
	r.refused(r.on(r.n, 0).run(unitReadyCmd), badLUN)
	answer := r.ask(other, scsi.LogicalUnitReset, 0, nil)
	r.unanswered(answer)
	r.s.Forget(waiting.Task)
	r.lu.Release()
	if a := <-answer; a != scsi.FunctionComplete || f.status != cdb.TaskAborted {
		t.Errorf("answer %d, status %02x", a, f.status)
	}
	// The counters of a former nexus stay.
	if s := r.s.Stats()[0]; s.Classes[scsi.ClassWrite].Aborted != 2 || s.Nexuses != 1 || s.InFlight != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestStats(t *testing.T) {
	r := newRig(t, mib, nil)
	if err := r.s.SetLU(unitConfig(3, memlu.New(mib))); err != nil {
		t.Fatal(err)
	}
	r.good(r.write(rw10(cdb.Write10, 0, 0, 4), pattern(2048, 1)))
	r.good(r.read(rw10(cdb.Read10, 0, 0, 2), 1024))
	r.good(r.read(rw10(cdb.Read10, 0, 0, 2), 100))
	r.refused(r.read(rw10(cdb.Read10, 0, 5000, 2), 1024), badLBA)
	r.good(r.write(caw(0, 0, 1), append(pattern(512, 1), pattern(512, 2)...)))
	r.good(r.write(rw10(cdb.WriteSame10, 0, 0, 8), make([]byte, 512)))
	list := cdb.AppendUnmap(nil, [2]uint64{0, 8}, [2]uint64{8, 8})
	r.good(r.write(unmapCDB(len(list)), list))
	r.lu.SetFail(func(*scsi.Request) error { return scsi.ErrBusy })
	r.write(rw10(cdb.Write10, 0, 0, 1), pattern(512, 1))
	all := r.s.Stats()
	if len(all) != 2 || all[0].LUN != 0 || all[1].LUN != 3 || all[0].Nexuses != 1 || all[1].Nexuses != 0 {
		t.Fatalf("%+v", all)
	}
	for _, c := range []struct {
		class                     scsi.OpClass
		good, checks, busy, bytes uint64
	}{
		{scsi.ClassRead, 2, 1, 0, 1124}, {scsi.ClassWrite, 1, 0, 1, 2048}, {scsi.ClassCompareAndWrite, 1, 0, 0, 512},
		{scsi.ClassWriteSame, 1, 0, 0, 4096}, {scsi.ClassUnmap, 1, 0, 0, 8192},
	} {
		s := all[0].Classes[c.class]
		if s.Good != c.good || s.CheckConditions != c.checks || s.Busy != c.busy || s.Bytes != c.bytes {
			t.Errorf("%v: %+v", c.class, s)
		}
		sum := uint64(0)
		for _, n := range s.Latency {
			sum += n
		}
		if sum != s.Commands() || s.Nanoseconds == 0 {
			t.Errorf("%v: %d in the histogram, %d commands, %d ns", c.class, sum, s.Commands(), s.Nanoseconds)
		}
	}
	if scsi.LatencyBound(0) != 1000 || scsi.LatencyBound(scsi.LatencyBuckets-1) >= 0 || scsi.ClassUnmap.String() != "unmap" {
		t.Error("names and bounds")
	}
}

// A reset that comes while TryExecute looks for the blocks in memory ends, and
// the task, which was not answered, is never executed.
func TestAbortDuringTryExecute(t *testing.T) {
	v := &abortingVolume{LU: memlu.New(mib)}
	r := newRig(t, mib, func(c *scsi.LUConfig) { c.Volume = v })
	other := r.attach("iqn.2026-11.test:other", 2)
	f := r.on(r.n, 0).launch(readBlock0Cmd, false)
	f.In = make([]byte, 512)
	var answer chan scsi.TaskResponse
	v.during = func() {
		answer = r.ask(other, scsi.ClearTaskSet, 0, nil)
		r.unanswered(answer)
	}
	if r.s.TryExecute(f.Task) {
		t.Fatal("answered from memory")
	}
	if a := <-answer; a != scsi.FunctionComplete || !f.Aborted.Load() || f.Status != cdb.TaskAborted {
		t.Errorf("answer %d, aborted %v, status %02x", a, f.Aborted.Load(), f.Status)
	}
	r.s.Execute(f.Task)
	if f.completed != 1 || f.status != cdb.TaskAborted || v.Count(scsi.OpRead) != 0 {
		t.Errorf("completed %d times with %02x, %d reads", f.completed, f.status, v.Count(scsi.OpRead))
	}
}

// abortingVolume has nothing in memory and calls during while it looks.
type abortingVolume struct {
	*memlu.LU
	during func()
}

func (v *abortingVolume) TryRead(uint64, []byte) bool {
	v.during()
	return false
}
