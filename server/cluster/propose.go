package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// outcome says what is known of a command after an attempt to commit it.
type outcome int

const (
	outcomeDecided outcome = iota // it was applied: the result says how
	outcomeUnsent                 // it was not appended anywhere, and will not be
	outcomeUnknown                // it may still commit (M7)
)

// retryEvery is the pause between attempts while no change of leader is seen.
const retryEvery = 50 * time.Millisecond

// propose commits a command and returns its result. It looks for the leader and
// repeats the command, under one request id, until ctx ends. When it gives up,
// the error is ErrNoQuorum; it is replication.ErrOutcomeUnknown as well unless
// the command certainly was never appended.
func (c *Cluster) propose(ctx context.Context, cmd command) (result, error) {
	env := envelope{Now: c.now().UTC(), By: c.id.Node}
	rand.Read(env.Request[:])
	return c.proposeAs(ctx, env, cmd)
}

func (c *Cluster) proposeAs(ctx context.Context, env envelope, cmd command) (result, error) {
	data, err := encodeCommand(env, cmd)
	if err != nil {
		return result{}, errorf(ErrInvalid, "%v", err)
	}
	if err := c.mayAppend(cmd); err != nil {
		return result{}, err
	}
	unknown := false
	for {
		changed := c.leaderChange.wait()
		r, out, err := c.attempt(ctx, data)
		switch {
		case out == outcomeDecided:
			return r, err
		case out == outcomeUnknown:
			unknown = true
		}
		retry := time.NewTimer(retryEvery)
		select {
		case <-changed:
		case <-retry.C:
		case <-ctx.Done():
		case <-c.ctx.Done():
		}
		retry.Stop()
		if ctx.Err() == nil && c.ctx.Err() == nil {
			continue
		}
		why := ErrNoQuorum
		if c.ctx.Err() != nil {
			why = ErrClosed
		}
		if unknown {
			return result{}, fmt.Errorf("%w: %w (%v)", why, replication.ErrOutcomeUnknown, err)
		}
		return result{}, fmt.Errorf("%w (%v)", why, err)
	}
}

// attempt tries once, at the node that leads now. A decided outcome with an error
// is a leader that refused to take the command at all.
func (c *Cluster) attempt(ctx context.Context, data []byte) (result, outcome, error) {
	leader := c.Leader()
	switch leader {
	case 0:
		return result{}, outcomeUnsent, errors.New("no leader is known")
	case c.id.Node:
		return c.applyHere(ctx, data)
	}
	body := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(data)), timeoutMillis(ctx))
	b, sent, err := c.call(ctx, leader, rpcPropose, append(body, data...))
	switch {
	case errors.Is(err, ErrRefused):
		return result{}, outcomeDecided, err
	case err != nil && sent:
		return result{}, outcomeUnknown, err
	case err != nil:
		return result{}, outcomeUnsent, err
	}
	var r result
	if err := decodeMessage(b, &r); err != nil {
		return result{}, outcomeUnknown, fmt.Errorf("answer of the leader: %w", err)
	}
	return r, outcomeDecided, nil
}

// timeoutMillis is what is left of ctx, for the leader.
func timeoutMillis(ctx context.Context) uint32 {
	left := proposeMax
	if dl, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(dl))
	}
	return uint32(max(left.Milliseconds(), 1))
}

// applyHere commits a command if this node leads.
func (c *Cluster) applyHere(ctx context.Context, data []byte) (result, outcome, error) {
	if c.raft.State() != raft.Leader {
		return result{}, outcomeUnsent, errNotLeader
	}
	select {
	case c.applying <- struct{}{}:
	case <-ctx.Done():
		return result{}, outcomeUnsent, ctx.Err()
	}
	if !c.begin() {
		<-c.applying
		return result{}, outcomeUnsent, ErrClosed
	}
	type answer struct {
		a   applied
		err error
	}
	done := make(chan answer, 1)
	enqueue := time.Duration(timeoutMillis(ctx)) * time.Millisecond
	// The future may outlive the caller; Close waits for it.
	go func() {
		defer func() { <-c.applying; c.applies.Done() }()
		f := c.raft.Apply(data, enqueue)
		if err := f.Error(); err != nil {
			done <- answer{err: err}
			return
		}
		a, _ := f.Response().(applied)
		done <- answer{a: a, err: a.err}
	}()
	select {
	case d := <-done:
		switch {
		case d.err == nil:
			return d.a.result, outcomeDecided, nil
		case errors.Is(d.err, raft.ErrNotLeader), errors.Is(d.err, raft.ErrEnqueueTimeout), errors.Is(d.err, raft.ErrLeadershipTransferInProgress):
			return result{}, outcomeUnsent, d.err
		}
		return result{}, outcomeUnknown, d.err
	case <-ctx.Done():
		return result{}, outcomeUnknown, ctx.Err()
	}
}

// proposeSync is propose for administrators: it turns refusals into errors, and
// returns when this node has applied the command too, so that State shows it.
func (c *Cluster) proposeSync(ctx context.Context, cmd command) (result, error) {
	r, err := c.propose(ctx, cmd)
	return c.settle(ctx, r, err)
}

func (c *Cluster) settle(ctx context.Context, r result, err error) (result, error) {
	if err == nil {
		err = r.err()
	}
	if err == nil {
		_, err = c.fsm.wait(ctx, r.Index)
	}
	return r, err
}

// proposeOnce is proposeSync under a request id that the caller chose: a repeated
// call has the effect of one. An empty id is a new request.
func (c *Cluster) proposeOnce(ctx context.Context, request string, cmd command) (result, error) {
	if request == "" {
		return c.proposeSync(ctx, cmd)
	}
	env := envelope{Now: c.now().UTC(), By: c.id.Node}
	h := sha256.Sum256(append([]byte{byte(cmd.kind())}, request...))
	copy(env.Request[:], h[:])
	r, err := c.proposeAs(ctx, env, cmd)
	return c.settle(ctx, r, err)
}

// Propose implements replication.Control. A change that was committed by an
// earlier attempt and answered by a later one comes with the record as it is now,
// which may have moved on since.
func (c *Cluster) Propose(ctx context.Context, ch replication.Change) (replication.Record, error) {
	r, err := c.propose(ctx, &cmdChange{ch})
	if err != nil {
		if !errors.Is(err, replication.ErrOutcomeUnknown) && !errors.Is(err, ErrRefused) && !errors.Is(err, ErrInvalid) {
			// It was never sent. The contract knows no such answer; this one is safe.
			err = fmt.Errorf("%w: %w", replication.ErrOutcomeUnknown, err)
		}
		return replication.Record{}, err
	}
	return r.Record, r.err()
}

// Record implements replication.Control.
func (c *Cluster) Record(ctx context.Context, v lsfs.VolumeID) (replication.Record, error) {
	s, err := c.Sync(ctx)
	if err != nil {
		return replication.Record{}, err
	}
	vol := s.Volume(v)
	if vol == nil {
		return replication.Record{}, errorf(ErrNotFound, "there is no volume %d", v)
	}
	return vol.Record, nil
}

// Sync returns a state that holds everything that was committed before the call:
// a linearizable read, through the leader and a quorum.
func (c *Cluster) Sync(ctx context.Context) (*State, error) {
	for {
		changed := c.leaderChange.wait()
		i, err := c.readIndex(ctx)
		if err == nil {
			return c.fsm.wait(ctx, i)
		}
		retry := time.NewTimer(retryEvery)
		select {
		case <-changed:
		case <-retry.C:
		case <-ctx.Done():
		case <-c.ctx.Done():
		}
		retry.Stop()
		switch {
		case c.ctx.Err() != nil:
			return nil, ErrClosed
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w (%v)", ErrNoQuorum, err)
		}
	}
}

func (c *Cluster) readIndex(ctx context.Context) (uint64, error) {
	leader := c.Leader()
	switch leader {
	case 0:
		return 0, errors.New("no leader is known")
	case c.id.Node:
		return c.readIndexHere(ctx)
	}
	b, _, err := c.call(ctx, leader, rpcRead, binary.BigEndian.AppendUint32(nil, timeoutMillis(ctx)))
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, errEncoding
	}
	return binary.BigEndian.Uint64(b), nil
}

// readIndexHere returns the index of the last command that a quorum had committed
// when it was called. A barrier entry proves it: it commits only in the leader's
// own term, after everything before it was applied here. Asking for leadership
// alone would not do, since a new leader may not know yet what is committed.
func (c *Cluster) readIndexHere(ctx context.Context) (uint64, error) {
	if c.raft.State() != raft.Leader {
		return 0, errNotLeader
	}
	if !c.begin() {
		return 0, ErrClosed
	}
	select {
	case c.applying <- struct{}{}:
	case <-ctx.Done():
		c.applies.Done()
		return 0, ctx.Err()
	}
	done := make(chan error, 1)
	enqueue := time.Duration(timeoutMillis(ctx)) * time.Millisecond
	go func() {
		defer func() { <-c.applying; c.applies.Done() }()
		done <- c.raft.Barrier(enqueue).Error()
	}()
	select {
	case err := <-done:
		if err != nil {
			return 0, err
		}
		return c.State().Index, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}
