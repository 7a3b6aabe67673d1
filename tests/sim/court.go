package sim

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// court is raft with its state machine as one linearizable register per volume: it
// decides compare-and-sets after a delay, loses answers, and may decide one long
// after its proposer has given up on it (M7).
type court struct {
	w  *world
	mu sync.Mutex

	ctl       links // the network of raft's messages
	witnessUp bool
	election  time.Time // nobody decides before
	records   map[lsfs.VolumeID]*replication.Record
	starts    map[replication.NodeID]replication.Incarnation
	version   int
	subs      [maxNodes + 1]chan struct{}  // by node: its process is to look
	lossy     float64                      // chance that an answer is lost
	reigns    map[lsfs.VolumeID]lsfs.Epoch // the epoch in which the owner of now began to own
	snaps     map[lsfs.VolumeID]*snapshotRecord
	ids       int                           // of snapshots that were handed out
	copies    int                           // that were added
	catch     func(replication.Change) bool // of a scenario: the change is not decided now, its proposer hears nothing
}

func newCourt(w *world) *court {
	return &court{w: w, witnessUp: true, records: map[lsfs.VolumeID]*replication.Record{}, starts: map[replication.NodeID]replication.Incarnation{}, reigns: map[lsfs.VolumeID]lsfs.Epoch{}, snaps: map[lsfs.VolumeID]*snapshotRecord{}}
}

// decide applies one change, and looks whether the owner of before serves at that instant:
// its lease must have run out, or it must have stopped (L1, M2, M6).
func (c *court) decide(ch replication.Change) (replication.Record, error) {
	before := c.record(ch.Volume).Owner
	rec, err := c.apply(ch)
	if err != nil || rec.Owner == before || c.w.impatient {
		return rec, err
	}
	if p, _ := c.w.processAt(before); p != nil && !p.isPaused() {
		if n, ok := p.isServing(); ok {
			if v := n.Volume(ch.Volume); v != nil && v.Serving() {
				c.w.fail("I3: node %d is recorded as owner of volume %d while node %d serves", rec.Owner, ch.Volume, before)
			}
		}
	}
	return rec, err
}

// apply changes the record by the rules of the cluster's state machine
// (server/cluster/change.go).
func (c *court) apply(ch replication.Change) (replication.Record, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.records[ch.Volume]
	refuse := func() (replication.Record, error) {
		c.w.note("refused", uint64(ch.Volume), uint64(ch.Expect), uint64(ch.By))
		return *old, replication.ErrConflict
	}
	switch {
	case ch.Expect != old.Epoch && !mutant("Q-epoch"):
		return refuse()
	case len(ch.InSync) == 0 || !slices.Contains(ch.InSync, ch.Owner):
		return refuse()
	case ch.Owner != old.Owner && !old.Has(ch.Owner) && !mutant("B2"):
		return refuse()
	case ch.Owner != old.Owner && slices.Contains(ch.InSync, old.Owner) && ch.By != old.Owner && !mutant("Q-given"):
		return refuse()
	}
	for _, n := range ch.InSync {
		if !old.Has(n) && n != ch.Grow && !mutant("B2") {
			return refuse()
		}
	}
	if ch.Grow != 0 {
		i := slices.IndexFunc(old.Replicas, func(r replication.Replica) bool { return r.Node == ch.Grow })
		switch {
		case old.Has(ch.Grow), !slices.Contains(ch.InSync, ch.Grow), ch.By != old.Owner, ch.Owner != old.Owner, i < 0:
			return refuse()
		case (old.Replicas[i].ID != ch.GrowReplica || c.starts[ch.Grow] != ch.GrowIncarnation) && !mutant("M4-stale-rid"):
			return refuse()
		}
	}
	rec := *old
	rec.Epoch++
	if ch.Owner != old.Owner || slices.Equal(ch.InSync, old.InSync) {
		c.reigns[ch.Volume] = rec.Epoch // taken over, given, or begun anew (M5)
	}
	rec.Owner, rec.InSync = ch.Owner, slices.Clone(ch.InSync)
	slices.Sort(rec.InSync)
	c.records[ch.Volume] = &rec
	c.w.owned(&rec)
	c.publish()
	c.w.note("record", uint64(ch.Volume), uint64(rec.Epoch), uint64(rec.Owner), mask(rec.InSync), uint64(ch.By))
	return rec, nil
}

func mask(nodes []replication.NodeID) (m uint64) {
	for _, n := range nodes {
		m |= 1 << n
	}
	return m
}

// publish tells the nodes that there is something new. Called with mu.
func (c *court) publish() {
	c.version++
	for _, ch := range c.subs {
		if ch != nil {
			wakeup(ch)
		}
	}
}

func (c *court) record(v lsfs.VolumeID) replication.Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return *c.records[v]
}

func (c *court) all() []replication.Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []replication.Record
	for id := lsfs.VolumeID(1); int(id) <= len(c.records); id++ {
		list = append(list, *c.records[id])
	}
	return list
}

// quorum says whether node n is one of a majority that can talk to each other.
func (c *court) quorum(n replication.NodeID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Now().Before(c.election) {
		return false
	}
	votes := 1
	if c.w.nodes == 2 && c.witnessUp && c.ctl.both(n, witness) {
		votes++
	}
	for id := replication.NodeID(1); int(id) <= c.w.nodes; id++ {
		if p, _ := c.w.processAt(id); id != n && p != nil && !p.isPaused() && c.ctl.both(n, id) {
			votes++
		}
	}
	return votes >= 2
}

// disturb makes the voters elect a leader.
func (c *court) disturb() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.w.calm && c.w.courtRandom.chance(0.5) { // else the leader was elsewhere
		c.election = time.Now().Add(c.w.courtRandom.between(100*time.Millisecond, 2500*time.Millisecond))
	}
}

// cut and heal change one direction of raft's network.
func (c *court) cut(from, to replication.NodeID, by int) {
	c.mu.Lock()
	c.ctl.cut[from][to] += by
	c.mu.Unlock()
	c.disturb()
}

// await waits until node n has a quorum.
func (c *court) await(ctx context.Context, p *process) error {
	for {
		p.gate()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if p.isDead() {
			return context.Canceled
		}
		if c.quorum(p.id) {
			return nil
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
		case <-p.ended:
		}
		t.Stop()
	}
}

// seat is one process's access to the court: replication.Control.
type seat struct {
	c *court
	p *process
}

func (s seat) pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		s.p.gate()
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s seat) Propose(ctx context.Context, ch replication.Change) (replication.Record, error) {
	r := s.c.w.courtRandom
	unknown := func(err error) (replication.Record, error) {
		return replication.Record{}, fmt.Errorf("%w: %w", replication.ErrOutcomeUnknown, err)
	}
	s.c.mu.Lock()
	lossy, catch := s.c.lossy, s.c.catch
	s.c.mu.Unlock()
	if catch != nil && catch(ch) {
		return unknown(s.pause(ctx, time.Second))
	}
	if r.chance(lossy) { // it is on its way, and its proposer hears nothing more of it
		if r.chance(0.7) {
			late := r.exp(2 * time.Second)
			time.AfterFunc(late, func() {
				if !s.c.w.over() {
					_, _ = s.c.decide(ch)
				}
			})
		}
		return unknown(s.pause(ctx, r.between(10*time.Millisecond, 6*time.Second)))
	}
	if err := s.pause(ctx, r.between(time.Millisecond, 20*time.Millisecond)); err != nil {
		return unknown(err)
	}
	if err := s.c.await(ctx, s.p); err != nil {
		return unknown(err)
	}
	rec, err := s.c.decide(ch)
	if e := s.pause(ctx, r.between(time.Millisecond, 20*time.Millisecond)); e != nil {
		return unknown(e)
	}
	return rec, err
}

func (s seat) Record(ctx context.Context, v lsfs.VolumeID) (replication.Record, error) {
	r := s.c.w.courtRandom
	if err := s.pause(ctx, r.between(time.Millisecond, 20*time.Millisecond)); err != nil {
		return replication.Record{}, err
	}
	if err := s.c.await(ctx, s.p); err != nil {
		return replication.Record{}, err
	}
	rec := s.c.record(v)
	return rec, s.pause(ctx, r.between(time.Millisecond, 20*time.Millisecond))
}
