package cluster

import (
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// OperationKind is what a long change does. Part of the raft log and snapshot
// formats, do not change.
type OperationKind uint8

const (
	// OperationAdd brings a new replica into sync.
	OperationAdd OperationKind = 1
	// OperationMove does so and then drops the replica that it replaces.
	OperationMove OperationKind = 2
)

// OperationState is how far a long change is. Part of the raft log and snapshot
// formats, do not change.
type OperationState uint8

const (
	// OperationRunning: it goes on, whatever nodes come and go.
	OperationRunning OperationState = 1
	// OperationDone: it has reached its end.
	OperationDone OperationState = 2
	// OperationCancelled: an administrator has ended it; what it had made is gone.
	OperationCancelled OperationState = 3
	// OperationFailed: it cannot reach its end any more.
	OperationFailed OperationState = 4
)

// Operation is a change that takes its time. It is recorded before it begins, and
// every node does its part by the record, so it survives any restart.
type Operation struct {
	ID     uint64 // 1, 2, ...
	Kind   OperationKind
	State  OperationState
	Volume lsfs.VolumeID
	// From is the replica that goes at the end (OperationMove), To the one that comes.
	From, To replication.NodeID
	Started  time.Time
	Ended    time.Time // zero while it runs
	Text     string    // why it failed
}

func (o *Operation) walk(c *codec) {
	u64(c, &o.ID)
	u8(c, &o.Kind)
	u8(c, &o.State)
	u64(c, &o.Volume)
	u32(c, &o.From)
	u32(c, &o.To)
	c.time(&o.Started)
	c.time(&o.Ended)
	text(c, &o.Text)
}

// Running says whether it goes on.
func (o *Operation) Running() bool { return o.State == OperationRunning }

// keepOperations ended ones are remembered.
const keepOperations = 100

// Operation returns an operation by its number, or nil.
func (s *State) Operation(id uint64) *Operation {
	for _, o := range s.Operations {
		if o.ID == id {
			return o
		}
	}
	return nil
}

// begin records an operation that runs.
func (e *edit) begin(o Operation) uint64 {
	s := e.s
	s.nextOperation++
	o.ID, o.State, o.Started = s.nextOperation, OperationRunning, e.env.Now
	s.Operations = append(slices.Clone(s.Operations), &o)
	ended := 0
	for _, x := range s.Operations {
		if !x.Running() {
			ended++
		}
	}
	s.Operations = slices.DeleteFunc(s.Operations, func(x *Operation) bool {
		drop := !x.Running() && ended > keepOperations
		if drop {
			ended--
		}
		return drop
	})
	return o.ID
}

// endOperations ends those that run and that which accepts.
func (e *edit) endOperations(which func(*Operation) bool, as OperationState, why string) {
	for _, o := range e.s.Operations {
		if !o.Running() || !which(o) {
			continue
		}
		w := *o
		w.State, w.Ended, w.Text = as, e.env.Now, why
		e.s.Operations = replace(e.s.Operations, &w, func(x *Operation) bool { return x.ID == w.ID })
	}
}

// replicaArrived ends what waited for a replica to be in sync.
func (e *edit) replicaArrived(v *Volume, n replication.NodeID) {
	if n == 0 {
		return
	}
	e.endOperations(func(o *Operation) bool { return o.Volume == v.ID && o.To == n && o.Kind == OperationAdd }, OperationDone, "")
}

// cmdCancelOperation ends an operation and takes back what it has made.
type cmdCancelOperation struct{ ID uint64 }

func (*cmdCancelOperation) kind() kind      { return kindCancelOperation }
func (x *cmdCancelOperation) walk(c *codec) { u64(c, &x.ID) }

func (x *cmdCancelOperation) apply(e *edit) result {
	o := e.s.Operation(x.ID)
	switch {
	case o == nil:
		return refuse(codeNotFound, "there is no operation %d", x.ID)
	case !o.Running():
		return refuse(codeRefused, "operation %d has ended", x.ID)
	}
	v, r := e.volume(o.Volume)
	if v == nil {
		return r
	}
	if v.Record.Owner == o.To {
		return refuse(codeRefused, "%s owns volume %s already: the operation is about to end", e.s.NodeName(o.To), v.Name)
	}
	e.endOperations(func(w *Operation) bool { return w.ID == x.ID }, OperationCancelled, "")
	e.takeOff(v, o.To)
	e.event(Info, "operation-cancelled", "operation %d was cancelled: volume %s gets no replica on %s", x.ID, v.Name, e.s.NodeName(o.To))
	return result{ID: x.ID}
}
