package iscsi

import (
	"github.com/twinsan/twinsan/server/scsi"
)

// taskState says who may touch a task next.
//
//	free -> active ----------------------------------------> free
//	          |  ^                                             ^
//	          v  | all data are in, memory was found           |
//	       collecting --- aborted or connection gone ----------+
//	          |                                                ^
//	          +--> doomed (the granter is about to call) ------+
type taskState uint8

const (
	taskFree       taskState = iota
	taskActive               // the reader works on it, or the device server has it
	taskCollecting           // waits for Data-Out or memory; begun says whether the device server knows it
	taskDoomed               // ended while the granter brings memory; the granter frees it
)

// burst is one R2T that the initiator has not wholly answered.
type burst struct {
	ttt    uint32
	offset uint32 // bytes, of the whole burst
	length uint32
	got    uint32
	dataSN uint32
	broken bool // a number was missing: the rest is swallowed, up to the final PDU
}

// task is one SCSI command of a connection, from its PDU to its response. Tasks
// are pooled with the connection. The connection's mutex guards all fields
// below scsi.Task; while a task is active, what the transport does not need to
// find it belongs to the reader or the device server.
type task struct {
	scsi.Task
	c    *connection
	next *task // free list, or chain of the tag table

	state     taskState
	busy      bool // the reader is copying data into the buffer without the lock
	begun     bool // Begin returned WantData or Ready: it must be executed or forgotten
	verdict   scsi.Verdict
	failed    bool // ends with failure, without the device server
	failure   failure
	immediate bool
	itt       uint32
	cmdSN     uint32

	// Data-Out.
	unsolicited bool   // more unsolicited data come
	broken      bool   // a number was missing among them
	dataSN      uint32 // of the next unsolicited PDU
	got         uint32 // unsolicited bytes with immediate ones
	asked       uint32 // bytes got unasked or asked for with R2T
	r2tSN       uint32
	bursts      [maxR2T]burst // ring of outstanding R2Ts, in order
	head, count int

	lease  lease
	wait   waiter
	queued bool // in line for memory
}

// tagBuckets is the size of the table of tasks by initiator task tag. It need
// not grow: tasks are bounded by the window.
const tagBuckets = 256

// tagTable finds tasks by their initiator task tag.
type tagTable [tagBuckets]*task

func bucket(itt uint32) uint32 { return (itt * 0x9e3779b1) >> 24 }

func (t *tagTable) find(itt uint32) *task {
	for k := t[bucket(itt)]; k != nil; k = k.next {
		if k.itt == itt {
			return k
		}
	}
	return nil
}

func (t *tagTable) add(k *task) {
	b := &t[bucket(k.itt)]
	k.next = *b
	*b = k
}

func (t *tagTable) remove(k *task) {
	for p := &t[bucket(k.itt)]; *p != nil; p = &(*p).next {
		if *p == k {
			*p = k.next
			k.next = nil
			return
		}
	}
}

// newTaskLocked takes a task for a command with this tag.
func (c *connection) newTaskLocked(itt uint32) *task {
	t := c.freeTasks
	if t == nil {
		t = &task{c: c}
		t.Ctx = t
		t.Complete = completed
	} else {
		c.freeTasks = t.next
	}
	t.itt = itt
	t.state = taskActive
	t.busy, t.begun, t.failed, t.queued = false, false, false, false
	t.verdict = scsi.Finished
	t.unsolicited, t.broken = false, false
	t.dataSN, t.got, t.asked, t.r2tSN = 0, 0, 0, 0
	t.head, t.count = 0, 0
	c.tags.add(t)
	c.active++
	c.tasks++
	return t
}

// freeTaskLocked ends a task: its tag and its place in the window are free.
func (c *connection) freeTaskLocked(t *task) {
	if t.state != taskCollecting {
		c.active--
	}
	c.tags.remove(t)
	c.solicited -= t.count
	c.target.buffers.release(t.lease)
	t.lease = lease{}
	t.Out, t.In, t.OutBorrowed = nil, nil, false
	t.state = taskFree
	if t.immediate {
		c.immediates--
	} else {
		c.window.release()
	}
	c.tasks--
	t.next = c.freeTasks
	c.freeTasks = t
	if c.active == 0 {
		c.changed.Broadcast()
	}
}

// collectLocked parks an active task.
func (c *connection) collectLocked(t *task) {
	t.state = taskCollecting
	c.active--
	if c.active == 0 {
		c.changed.Broadcast()
	}
}

// resumeLocked makes a parked task active.
func (c *connection) resumeLocked(t *task) {
	t.state = taskActive
	c.active++
}

// unqueueLocked takes a parked task out of the line for memory. False: the
// granter is about to call; the task is doomed and the granter will free it.
func (c *connection) unqueueLocked(t *task) bool {
	if !t.queued {
		return true
	}
	if c.target.buffers.cancel(&t.wait) {
		t.queued = false
		return true
	}
	c.resumeLocked(t)
	t.state = taskDoomed
	return false
}

// completed is every task's Complete. It may be called on any goroutine.
func completed(st *scsi.Task) {
	t := st.Ctx.(*task)
	c := t.c
	c.mu.Lock()
	c.finishLocked(t)
	busy := c.busy || c.closed || c.out.size == 0
	c.mu.Unlock()
	if !busy {
		c.target.addPending(c)
	}
}

// finishLocked sends the response of a task that the device server has
// completed, or none when it was aborted, and frees it.
func (c *connection) finishLocked(t *task) {
	switch {
	case c.closed:
	case t.Aborted.Load() && t.Status != statusTaskAborted:
		c.aborted++
		shut := c.window.closed()
		c.freeTaskLocked(t)
		if shut {
			// The initiator may send nothing, and no response tells it that it may.
			c.openWindowLocked()
		}
		return
	default:
		c.respondLocked(t)
	}
	c.freeTaskLocked(t)
}

// abortWaiting is the device server's hook: it gives up a task that waits for
// data or memory. A call that comes too late finds the task in another state.
func abortWaiting(st *scsi.Task) {
	t, ok := st.Ctx.(*task)
	if !ok {
		return
	}
	c := t.c
	c.mu.Lock()
	if c.closed || t.state != taskCollecting || t.busy || !t.begun || !t.Aborted.Load() {
		c.mu.Unlock()
		return
	}
	c.reapLocked(t)
	pending := c.out.size > 0 && !c.busy
	c.mu.Unlock()
	if pending {
		c.target.addPending(c)
	}
}

// reapLocked ends a parked task that was aborted. The lock is let go while the
// device server forgets the task.
func (c *connection) reapLocked(t *task) {
	if !c.unqueueLocked(t) {
		return
	}
	c.resumeLocked(t)
	c.mu.Unlock()
	c.forget(t)
	c.mu.Lock()
	c.finishLocked(t)
}

// memoryGranted continues a parked task that waited for memory, now in
// t.wait.got. It runs on the target's granter goroutine, or on the reader.
func (t *task) memoryGranted() {
	c := t.c
	defer c.target.addPending(c)
	c.mu.Lock()
	if t.state == taskDoomed {
		c.mu.Unlock()
		if t.begun {
			c.forget(t)
		}
		c.target.buffers.release(t.wait.got)
		c.mu.Lock()
		c.finishLocked(t)
		c.mu.Unlock()
		return
	}
	t.queued = false
	t.lease = t.wait.got
	if t.Aborted.Load() {
		c.reapLocked(t)
		c.mu.Unlock()
		return
	}
	switch {
	case t.failed && (t.unsolicited || t.busy):
		c.mu.Unlock() // the reader ends it
	case t.failed:
		c.resumeLocked(t)
		c.mu.Unlock()
		c.forget(t)
		c.respond(t)
	case t.verdict == scsi.Ready:
		c.resumeLocked(t)
		t.In = t.lease.buf[:t.InLen]
		c.mu.Unlock()
		c.target.device.Execute(&t.Task)
	default:
		c.sendR2TsLocked(t)
		c.mu.Unlock()
	}
}
