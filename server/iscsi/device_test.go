package iscsi

import (
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"github.com/twinsan/twinsan/server/scsi"
)

const testBlock = 512

// The device server of the project is one that this package can use.
var _ DeviceServer = (*scsi.Server)(nil)

// memoryDevice is a device server with one logical unit in RAM at LUN 0 and the
// few commands that initiators need to use it. While gate is closed it keeps
// the commands that Execute brings, until release.
type memoryDevice struct {
	mu        sync.Mutex
	data      []byte
	gated     bool
	cached    bool // TryExecute answers reads
	queue     []*scsi.Task
	state     map[*scsi.Task]string // "begun", "started"
	nexuses   map[*scsi.Nexus]bool
	detached  []bool // lost, in order
	kicks     int
	attachErr error
	target    *Target
	waiting   []pendingAbort
	forgotten int
	executed  int
	functions []scsi.TaskFunction
	refuse    scsi.TaskResponse // to every function, unless it is 0
	cold      func()            // what follows a cold reset
}

type pendingAbort struct {
	left map[*scsi.Task]bool
	done func(scsi.TaskResponse)
}

func newMemoryDevice(blocks int) *memoryDevice {
	return &memoryDevice{
		data:    make([]byte, blocks*testBlock),
		cached:  true,
		state:   make(map[*scsi.Task]string),
		nexuses: make(map[*scsi.Nexus]bool),
	}
}

func (d *memoryDevice) Attach(initiator string, isid [6]byte) (*scsi.Nexus, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attachErr != nil {
		return nil, d.attachErr
	}
	n := &scsi.Nexus{Initiator: initiator, ISID: isid, Port: 1}
	d.nexuses[n] = true
	return n, nil
}

func (d *memoryDevice) Release(*scsi.Nexus, time.Duration) {}

func (d *memoryDevice) AbortNexus(*scsi.Nexus) {}

func (d *memoryDevice) Detach(n *scsi.Nexus, lost bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.nexuses[n] {
		panic("detach of an unknown nexus")
	}
	for t := range d.state {
		if t.Nexus == n {
			panic("nexus given up with a task")
		}
	}
	delete(d.nexuses, n)
	d.detached = append(d.detached, lost)
}

func check(t *scsi.Task, key, asc, ascq byte) scsi.Verdict {
	t.Status = statusCheckCondition
	t.Sense = [64]byte{0: 0x70, 2: key, 7: 10, 12: asc, 13: ascq}
	t.SenseLen = 18
	return scsi.Finished
}

// span decodes LBA and block count of a read or write.
func span(t *scsi.Task) (lba uint64, blocks uint32) {
	c := &t.CDB
	switch c[0] {
	case 0x28, 0x2a:
		return uint64(binary.BigEndian.Uint32(c[2:])), uint32(binary.BigEndian.Uint16(c[7:]))
	case 0x88, 0x8a:
		return binary.BigEndian.Uint64(c[2:]), binary.BigEndian.Uint32(c[10:])
	}
	return 0, 0
}

func (d *memoryDevice) Begin(t *scsi.Task) scsi.Verdict {
	t.Aborted.Store(false)
	t.OutLen, t.InLen, t.Transfer = 0, 0, 0
	t.Status, t.SenseLen = statusGood, 0
	if t.LUN != 0 && t.CDB[0] != 0xa0 {
		return check(t, 5, 0x25, 0)
	}
	if t.Extended || t.Read && t.Write {
		return check(t, 5, 0x20, 0)
	}
	var verdict scsi.Verdict
	switch t.CDB[0] {
	case 0x00: // TEST UNIT READY
		verdict = scsi.Ready
	case 0x28, 0x88: // READ
		lba, n := span(t)
		if lba+uint64(n) > uint64(len(d.data)/testBlock) {
			return check(t, 5, 0x21, 0)
		}
		t.Transfer = n * testBlock
		if t.Read {
			t.InLen = min(t.Transfer, t.Expected)
		}
		verdict = scsi.Ready
	case 0x2a, 0x8a: // WRITE
		lba, n := span(t)
		if lba+uint64(n) > uint64(len(d.data)/testBlock) {
			return check(t, 5, 0x21, 0)
		}
		t.Transfer = n * testBlock
		if t.Write {
			t.OutLen = min(t.Transfer, t.Expected)
		}
		if t.OutLen%testBlock != 0 {
			return check(t, 5, 0x0e, 3)
		}
		verdict = scsi.WantData
		if t.OutLen == 0 {
			verdict = scsi.Ready
		}
	case 0x12: // INQUIRY
		t.Transfer = min(uint32(binary.BigEndian.Uint16(t.CDB[3:])), 36)
		t.InLen = min(t.Transfer, t.Expected)
		verdict = scsi.Ready
	case 0x25: // READ CAPACITY(10)
		t.Transfer = 8
		t.InLen = min(t.Transfer, t.Expected)
		verdict = scsi.Ready
	case 0x9e: // READ CAPACITY(16)
		t.Transfer = min(32, binary.BigEndian.Uint32(t.CDB[10:]))
		t.InLen = min(t.Transfer, t.Expected)
		verdict = scsi.Ready
	case 0xa0: // REPORT LUNS
		t.Transfer = min(16, binary.BigEndian.Uint32(t.CDB[6:]))
		t.InLen = min(t.Transfer, t.Expected)
		verdict = scsi.Ready
	default:
		return check(t, 5, 0x20, 0)
	}
	d.mu.Lock()
	d.state[t] = "begun"
	d.mu.Unlock()
	return verdict
}

// perform does the command's work.
func (d *memoryDevice) perform(t *scsi.Task) {
	lba, _ := span(t)
	reply := make([]byte, 36)
	blocks := uint64(len(d.data) / testBlock)
	switch t.CDB[0] {
	case 0x28, 0x88:
		copy(t.In, d.data[lba*testBlock:])
		return
	case 0x2a, 0x8a:
		copy(d.data[lba*testBlock:], t.Out)
		return
	case 0x12:
		copy(reply, "\x00\x00\x05\x02\x1f\x00\x00\x02twinsan MEMORY          0001")
	case 0x25:
		binary.BigEndian.PutUint32(reply, uint32(blocks-1))
		binary.BigEndian.PutUint32(reply[4:], testBlock)
	case 0x9e:
		binary.BigEndian.PutUint64(reply, blocks-1)
		binary.BigEndian.PutUint32(reply[8:], testBlock)
	case 0xa0:
		binary.BigEndian.PutUint32(reply, 8)
	}
	copy(t.In, reply)
}

func (d *memoryDevice) TryExecute(t *scsi.Task) bool {
	if t.Aborted.Load() {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.cached || d.gated {
		clear(t.In) // scribble
		return false
	}
	delete(d.state, t)
	d.perform(t)
	return true
}

func (d *memoryDevice) Execute(t *scsi.Task) {
	d.mu.Lock()
	if d.state[t] != "begun" {
		panic("execute of a task that was not begun")
	}
	d.state[t] = "started"
	d.executed++
	if d.gated {
		if t.OutBorrowed {
			t.Out = append([]byte(nil), t.Out...)
		}
		d.queue = append(d.queue, t)
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	d.complete(t)
}

func (d *memoryDevice) complete(t *scsi.Task) {
	d.mu.Lock()
	if !t.Aborted.Load() {
		d.perform(t)
	}
	done := d.endLocked(t)
	d.mu.Unlock()
	t.Complete(t)
	for _, f := range done {
		f()
	}
}

// endLocked takes a task out and returns the answers that waited for it.
func (d *memoryDevice) endLocked(t *scsi.Task) (done []func()) {
	delete(d.state, t)
	for i := 0; i < len(d.waiting); i++ {
		w := d.waiting[i]
		if !w.left[t] {
			continue
		}
		delete(w.left, t)
		if len(w.left) == 0 {
			d.waiting = append(d.waiting[:i], d.waiting[i+1:]...)
			i--
			done = append(done, func() { w.done(scsi.FunctionComplete) })
		}
	}
	return done
}

// gate closes or opens the device. Opening completes what is kept, on this
// goroutine, and flushes once.
func (d *memoryDevice) gate(closed bool) {
	d.mu.Lock()
	d.gated = closed
	queue := d.queue
	if !closed {
		d.queue = nil
	}
	d.mu.Unlock()
	if closed {
		return
	}
	for _, t := range queue {
		d.complete(t)
	}
	if d.target != nil {
		d.target.Flush()
	}
}

func (d *memoryDevice) queued() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.queue)
}

// deviceCount counts tasks.
type deviceCount struct{ executed, forgotten int }

func (d *memoryDevice) count() deviceCount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return deviceCount{d.executed, d.forgotten}
}

func (d *memoryDevice) Forget(t *scsi.Task) {
	d.mu.Lock()
	if d.state[t] == "started" {
		panic("forget of a started task")
	}
	if d.state[t] == "begun" {
		d.forgotten++
	}
	done := d.endLocked(t)
	t.Status = statusTaskAborted // as the real one does, for its accounts
	d.mu.Unlock()
	for _, f := range done {
		f()
	}
}

func (d *memoryDevice) TaskManagement(n *scsi.Nexus, f scsi.TaskFunction, lun uint64, ref *scsi.Task, done func(scsi.TaskResponse)) {
	d.mu.Lock()
	d.functions = append(d.functions, f)
	if refuse := d.refuse; refuse != 0 {
		d.mu.Unlock()
		done(refuse)
		return
	}
	if cold := d.cold; f == scsi.TargetColdReset && cold != nil {
		d.mu.Unlock()
		done(scsi.FunctionComplete)
		cold()
		return
	}
	if lun != 0 {
		d.mu.Unlock()
		done(scsi.NoSuchLUN)
		return
	}
	victims := make(map[*scsi.Task]bool)
	var waiting []*scsi.Task
	for t, state := range d.state {
		if f == scsi.AbortTask && t != ref || f == scsi.AbortTaskSet && t.Nexus != n {
			continue
		}
		if f == scsi.ClearTaskSet && t.Nexus != n {
			t.Status = statusTaskAborted // TAS=1
		}
		t.Aborted.Store(true)
		victims[t] = true
		if state == "begun" {
			waiting = append(waiting, t)
		}
	}
	if len(victims) == 0 {
		d.mu.Unlock()
		if f == scsi.AbortTask {
			done(scsi.NoSuchTask)
		} else {
			done(scsi.FunctionComplete)
		}
		return
	}
	d.waiting = append(d.waiting, pendingAbort{victims, done})
	d.mu.Unlock()
	for _, t := range waiting {
		d.target.AbortWaiting(t)
	}
}

func (d *memoryDevice) Kick() {
	d.mu.Lock()
	d.kicks++
	d.mu.Unlock()
}

var errFull = errors.New("no nexus left")
