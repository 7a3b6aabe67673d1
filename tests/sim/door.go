package sim

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// The door is what a device server and an iSCSI target are to replication: sessions
// that are dropped, requests that wait in sockets, and an ordered state (a mask of
// fenced hosts) under which requests are let in.

// doorState is the ordered state as this node's device server knows it.
type doorState struct {
	id     replication.StateID
	fenced uint64 // bit per client
}

func fencedIn(value []byte) uint64 {
	if len(value) < 16 {
		return 0
	}
	return binary.LittleEndian.Uint64(value[8:])
}

// session is one host's session with one process.
type session struct {
	c    *client
	p    *process
	mu   sync.Mutex
	over bool
	gone atomic.Bool   // over, for the requests that came by it
	lost chan struct{} // closed when the host learns that it is over
}

// login opens a session; nil when nobody answers.
func (p *process) login(c *client) *session {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.serving || p.dead || p.resume != nil {
		return nil
	}
	s := &session{c: c, p: p, lost: make(chan struct{})}
	live := p.sessions[:0]
	for _, o := range p.sessions {
		if !o.isOver() {
			live = append(live, o)
		}
	}
	p.sessions = append(live, s)
	return s
}

func (s *session) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// end resets the session; the host learns of it when what it abandons is settled, as
// server/iscsi has it, and the network lets it.
func (s *session) end() { s.finish(false, false) }

// die ends the session with its process: nothing is settled then.
func (s *session) die(silently bool) { s.finish(true, silently) }

func (s *session) finish(dead, silently bool) {
	s.mu.Lock()
	was := s.over
	s.over = true
	s.gone.Store(true)
	s.mu.Unlock()
	if was {
		return
	}
	w, n := s.p.w, s.p.node
	w.group.Go(func() {
		if !dead {
			n.SettleForwards()
		}
		d := w.clientRandom.between(100*time.Microsecond, 5*time.Millisecond)
		if silently {
			d = w.clientRandom.between(8*time.Second, 15*time.Second) // its own NOP-Out tells it
		}
		time.Sleep(d)
		for !w.over() && !w.reaches(s.c, s.p.id) {
			time.Sleep(100 * time.Millisecond)
		}
		close(s.lost)
	})
}

// drop is replication's DropSessions: every host of the simulation sees every volume.
func (p *process) drop(reason string) {
	p.mu.Lock()
	sessions := p.sessions
	p.sessions = nil
	p.mu.Unlock()
	if len(sessions) > 0 {
		p.w.note("sessions-dropped", uint64(p.id), uint64(len(sessions)))
		p.w.logf("node %d drops sessions: %s", p.id, reason)
	}
	time.Sleep(p.w.dropDelay)
	for _, s := range sessions {
		s.end()
	}
}

// watch learns of the ordered state of every volume.
func (p *process) watch() {
	for _, v := range p.node.Volumes() {
		id := v.ID()
		if p.watched[id] {
			continue
		}
		p.watched[id] = true
		v.Watch(func(name replication.StateID, value []byte, _ bool) {
			p.mu.Lock()
			p.stated[id] = doorState{name, fencedIn(value)}
			p.mu.Unlock()
		})
	}
}

func (p *process) state(v lsfs.VolumeID) doorState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stated[v]
}

// submit executes a host's request; done is called once, or never when the session ends.
func (p *process) submit(s *session, vol lsfs.VolumeID, r *replication.Request, done func(*replication.Request)) {
	n, ok := p.isServing()
	if !ok || s.isOver() {
		return
	}
	v := n.Volume(vol)
	if v == nil {
		return
	}
	if r.Op != replication.OpState && r.Op != replication.OpReadState {
		bit := uint64(1) << s.c.id
		st := p.state(vol)
		writes := r.Op != replication.OpRead
		if writes && st.fenced&bit != 0 {
			r.Err = replication.ErrReserved
			done(r)
			return
		}
		if !mutant("C2-recheck") {
			r.State = st.id
			r.Recheck = func(r *replication.Request) error {
				st := p.state(vol)
				if writes && st.fenced&bit != 0 {
					return replication.ErrReserved
				}
				r.State = st.id
				return nil
			}
		}
	}
	r.Abandoned = &s.gone
	r.Done = func(r *replication.Request) {
		if errors.Is(r.Err, replication.ErrUnavailable) {
			s.end() // as server/scsi does
			return
		}
		done(r)
	}
	if r.Op == replication.OpRead && v.TryRead(r.Off, r.Data) {
		r.Done(r)
		return
	}
	v.Submit(r)
	n.Kick()
}

// ask sends a request from a host through a session and waits for its end: nil error
// and r.Err, or errLost when the session ended or the host lost patience.
func (c *client) ask(s *session, vol lsfs.VolumeID, r *replication.Request) error {
	w, cmd := c.w, c.current.Load()
	answer := make(chan struct{})
	var once sync.Once
	w.group.Go(func() {
		time.Sleep(w.clientRandom.between(50*time.Microsecond, time.Millisecond))
		if !w.reaches(c, s.p.id) {
			return // lost on the way, or the session dies before it is sent again
		}
		s.p.gate()
		s.p.submit(s, vol, r, func(r *replication.Request) {
			c.acknowledged(s.p, vol, cmd, r)
			w.group.Go(func() {
				s.p.gate()
				if s.isOver() {
					return
				}
				time.Sleep(w.clientRandom.between(50*time.Microsecond, time.Millisecond))
				if w.reaches(c, s.p.id) {
					once.Do(func() { close(answer) })
				}
			})
		})
	})
	t := time.NewTimer(w.patience)
	defer t.Stop()
	select {
	case <-answer:
		return nil
	case <-s.lost:
	case <-t.C:
		w.note("host-gave-up", uint64(c.id), uint64(s.p.id))
	case <-w.stop:
	}
	s.end()
	return errLost
}

var errLost = errors.New("the session was lost, the outcome is not known")
