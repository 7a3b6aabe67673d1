package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// maxSnapshotBytes bounds what is read back as a snapshot; the limits of the
// state keep it far below.
const maxSnapshotBytes = 256 << 20

// fsm is the shell between raft and the state machine. raft calls Apply,
// ApplyBatch, Snapshot and Restore on one goroutine; everybody else reads the
// published state.
type fsm struct {
	machine *machine // owned by raft's goroutine
	stopped error    // owned by raft's goroutine: set once, nothing is applied afterwards
	fatal   func(error)

	state atomic.Pointer[State]

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each publication
}

func newFSM(fatal func(error)) *fsm {
	f := &fsm{machine: newMachine(new(State)), fatal: fatal, changed: make(chan struct{})}
	f.state.Store(f.machine.state)
	return f
}

func (f *fsm) publish() {
	f.state.Store(f.machine.state)
	f.mu.Lock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
}

// watch returns a channel that is closed at the next publication. The state is
// to be loaded after the call, so that no publication is missed.
func (f *fsm) watch() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// wait returns the state when it includes the command at index.
func (f *fsm) wait(ctx context.Context, index uint64) (*State, error) {
	for {
		changed := f.watch()
		if s := f.state.Load(); s.Index >= index {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for this node to catch up: %w", ctx.Err())
		}
	}
}

// applied is what an Apply future responds with.
type applied struct {
	result result
	err    error
}

func (f *fsm) applyOne(l *raft.Log) applied {
	if f.stopped != nil {
		return applied{err: f.stopped}
	}
	r, err := f.machine.apply(l.Index, l.Data)
	if err == nil && f.machine.state.Cluster.FeatureLevel > FeatureLevel {
		err = fmt.Errorf("the cluster has feature level %d; this program knows %d: install a newer one", f.machine.state.Cluster.FeatureLevel, FeatureLevel)
	}
	if err != nil {
		f.stopped = err
		f.fatal(err)
	}
	return applied{r, err}
}

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any {
	a := f.applyOne(l)
	f.publish()
	return a
}

// ApplyBatch implements raft.BatchingFSM: one publication for many commands.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, len(logs))
	for i, l := range logs {
		if l.Type == raft.LogCommand {
			out[i] = f.applyOne(l)
		}
	}
	f.publish()
	return out
}

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.stopped != nil {
		return nil, f.stopped
	}
	return snapshot{f.machine.state}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	b, err := io.ReadAll(io.LimitReader(r, maxSnapshotBytes+1))
	if err := errors.Join(err, r.Close()); err != nil {
		return fmt.Errorf("read state snapshot: %w", err)
	}
	if len(b) > maxSnapshotBytes {
		return fmt.Errorf("state snapshot exceeds %d bytes", maxSnapshotBytes)
	}
	s, err := unmarshalState(b)
	if err != nil {
		return err
	}
	if s.Cluster.FeatureLevel > FeatureLevel {
		return fmt.Errorf("the cluster has feature level %d; this program knows %d: install a newer one", s.Cluster.FeatureLevel, FeatureLevel)
	}
	f.machine = newMachine(s)
	f.publish()
	return nil
}

// snapshot is an immutable state on its way to a snapshot file.
type snapshot struct{ state *State }

func (s snapshot) Persist(sink raft.SnapshotSink) error {
	b, err := s.state.marshal()
	if err == nil {
		_, err = sink.Write(b)
	}
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

func (snapshot) Release() {}
