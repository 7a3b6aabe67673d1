package scsi_test

import (
	"runtime"
	"sync"
	"testing"

	"github.com/twinsan/twinsan/server/scsi"
	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// collect records a node's calls to its transport.
type collect struct {
	given   chan *scsi.Task
	dropped chan string
}

func (r *rig) collect() *collect {
	c := &collect{given: make(chan *scsi.Task, 8), dropped: make(chan string, 8)}
	r.s.SetHooks(scsi.Hooks{
		AbortWaiting: func(k *scsi.Task) { c.given <- k },
		DropSessions: func(name, reason string) { c.dropped <- name + reason },
	})
	return c
}

// A function that concerns all nexuses ends the tasks of every node, and nothing
// of them lands after the answer; resets are told on every node.
func TestTaskManagementOverTwoNodes(t *testing.T) {
	for _, f := range []scsi.TaskFunction{scsi.ClearTaskSet, scsi.LogicalUnitReset, scsi.TargetWarmReset, scsi.TargetColdReset} {
		c := newCluster(t)
		near, far := c.a.collect(), c.b.collect()
		a, b, w := c.a.host("iqn.a", 1), c.a.host("iqn.b", 2), c.b.host("iqn.w", 3)
		c.path.Hold()
		c.lu.Hold()
		own, foreign := a.launch(writeBlock0, true), b.launch(writeBlock0, true)
		distant := command{cdb: rw10(cdb.Write10, 0, 64, 1), write: true, expected: 512, out: pattern(512, 1)}
		onTheWay, waiting := w.launch(distant, true), w.launch(distant, false)
		answer := c.a.ask(a.nexus, f, 0, nil)
		c.a.unanswered(answer)
		after := a.launch(readBlock0Cmd, true) // sent after the function: not its object
		c.lu.Release()
		if got := <-answer; got != scsi.FunctionComplete {
			t.Fatalf("function %d: answer %d", f, got)
		}
		landed := c.lu.Allocated()
		if own.completed != 1 || !own.aborted || own.status == cdb.TaskAborted || foreign.status != cdb.TaskAborted {
			t.Errorf("function %d: own %d times %v %02x, foreign %02x", f, own.completed, own.aborted, own.status, foreign.status)
		}
		<-after.done
		if after.aborted || after.status != cdb.Good {
			t.Errorf("function %d: a later command was aborted: %02x", f, after.status)
		}
		if !onTheWay.Aborted.Load() || !waiting.Aborted.Load() || waiting.Status != cdb.TaskAborted {
			t.Errorf("function %d: the other node's tasks go on", f)
		}
		if got := <-far.given; got != waiting.Task || len(far.given)+len(near.given) != 0 {
			t.Errorf("function %d: others were given up", f)
		}
		c.path.Release()
		if onTheWay.completed != 1 || onTheWay.status != cdb.TaskAborted || c.lu.Allocated() != landed {
			t.Errorf("function %d: on the way: %02x, %d blocks", f, onTheWay.status, c.lu.Allocated())
		}
		c.b.s.Forget(waiting.Task)
		if f == scsi.TargetColdReset {
			if got := <-near.dropped + <-far.dropped; got != "target cold reset by iqn.atarget cold reset by iqn.a" {
				t.Errorf("dropped %q", got)
			}
		}
		for _, p := range []port{a, b, w} {
			if f == scsi.ClearTaskSet {
				p.expect()
			} else {
				p.expect(uaReset)
			}
		}
		a.good(a.run(writeBlock0))
		w.good(w.run(writeBlock0))
	}
}

// The answer waits for this node's tasks even when the change is in force before they end.
func TestResetWaitsForTasks(t *testing.T) {
	for _, f := range []scsi.TaskFunction{scsi.ClearTaskSet, scsi.LogicalUnitReset, scsi.TargetWarmReset, scsi.TargetColdReset} {
		c := newCluster(t)
		a, b, w := c.a.host("iqn.a", 1), c.a.host("iqn.b", 2), c.b.host("iqn.w", 3)
		c.near.Hold(scsi.OpWrite)
		own, foreign := a.launch(writeBlock0, true), b.launch(writeBlock0, true)
		answer := c.a.ask(a.nexus, f, 0, nil)
		// A second function over the same tasks, from the other node: it has none to wait for.
		if got := c.b.manage(w.nexus, scsi.LogicalUnitReset, 0, nil); got != scsi.FunctionComplete {
			t.Errorf("answer %d", got)
		}
		changes := uint64(2)
		if f == scsi.TargetColdReset {
			changes = 1 // its own comes after its tasks
		}
		for c.lu.Changes() < changes {
			runtime.Gosched()
		}
		a.attentions()
		a.settled(0) // the sequencer has gone on after the change
		c.a.unanswered(answer)
		c.near.Release()
		if got := <-answer; got != scsi.FunctionComplete || own.completed != 1 || foreign.status != cdb.TaskAborted || c.lu.Allocated() != 0 {
			t.Errorf("function %d: answer %d, own completed %d times, foreign %02x", f, got, own.completed, foreign.status)
		}
	}
}

// What another begins between the function and its change is ended by it, and waited for.
func TestResetEndsWhatCameMeanwhile(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.a.host("iqn.b", 2)
	c.near.Hold(scsi.OpReadState, scsi.OpWrite)
	answer := c.a.ask(a.nexus, scsi.LogicalUnitReset, 0, nil)
	w := b.launch(writeBlock0, true)
	if w.Aborted.Load() {
		t.Fatal("aborted before the change")
	}
	c.near.Release(scsi.OpReadState)
	for c.lu.Count(scsi.OpState) < 1 {
		runtime.Gosched()
	}
	a.attentions()
	a.settled(0)
	c.a.unanswered(answer)
	c.near.Release()
	if got := <-answer; got != scsi.FunctionComplete || w.completed != 1 || w.status != cdb.TaskAborted || c.lu.Allocated() != 0 {
		t.Errorf("answer %d, the write %d times %02x", got, w.completed, w.status)
	}
}

// When the change of state fails the function says so; the next one works.
func TestTaskManagementFails(t *testing.T) {
	for _, f := range []scsi.TaskFunction{scsi.ClearTaskSet, scsi.LogicalUnitReset, scsi.TargetWarmReset, scsi.TargetColdReset} {
		c := newCluster(t)
		near := c.a.collect()
		a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
		for _, op := range []scsi.RequestOp{scsi.OpReadState, scsi.OpState} {
			c.lu.SetFail(func(q *scsi.Request) error {
				if q.Op == op {
					return scsi.ErrUnavailable
				}
				return nil
			})
			if got := c.a.manage(a.nexus, f, 0, nil); got != scsi.FunctionRejected {
				t.Errorf("function %d: answer %d", f, got)
			}
		}
		c.lu.SetFail(nil)
		a.expect()
		b.expect()
		if len(near.dropped) != 0 {
			t.Error("sessions were dropped")
		}
		if got := c.a.manage(a.nexus, f, 0, nil); got != scsi.FunctionComplete {
			t.Errorf("function %d: answer %d", f, got)
		}
	}
}

// A change of the ordered state that a reset of another node has overtaken is not
// made for a task which that reset aborted, though this node has not heard of it.
func TestResetOvertakesChange(t *testing.T) {
	c := newCluster(t)
	a, b := c.a.host("iqn.a", 1), c.b.host("iqn.b", 2)
	c.path.Hold()
	f := b.launch(prOut(registerIgnore, 0, 0, 5, 0), true)
	if got := c.a.manage(a.nexus, scsi.LogicalUnitReset, 0, nil); got != scsi.FunctionComplete {
		t.Fatal(got)
	}
	c.path.Release()
	<-f.done
	if f.status != cdb.TaskAborted {
		t.Errorf("status %02x", f.status)
	}
	a.expect(uaReset)
	a.expectIn(0, "00000000 00000000")
}

// Functions and PREEMPT AND ABORT at once, from both nodes, all end.
func TestAbortsDoNotWaitForEachOther(t *testing.T) {
	c := newCluster(t)
	c.lu.StartAsync(func() {})
	t.Cleanup(c.lu.Close)
	hosts := []port{c.a.host("iqn.a", 1), c.b.host("iqn.b", 2), c.a.host("iqn.c", 3), c.b.host("iqn.d", 4)}
	var wg sync.WaitGroup
	for i, p := range hosts {
		wg.Go(func() {
			for n := range 60 {
				key := uint64(i + 1)
				switch n % 6 {
				case 0:
					p.run(prOut(registerIgnore, 0, 0, key, 0))
				case 1:
					p.run(prOut(reserve, 7, key, 0, 0))
				case 2:
					p.run(writeBlock0)
				case 3:
					p.run(prOut(preemptAbort, 7, key, uint64(n/6+i)%4+1, 0))
				case 4:
					<-p.ask(p.nexus, scsi.LogicalUnitReset, 0, nil)
				case 5:
					p.run(modeSelect6(after(make([]byte, 4), controlPage(byte(n/6%2)*8))))
				}
			}
		})
	}
	wg.Wait()
	for _, node := range []*rig{c.a, c.b} {
		if s := node.s.Stats()[0]; s.InFlight != 0 {
			t.Errorf("%d tasks are left", s.InFlight)
		}
	}
}
