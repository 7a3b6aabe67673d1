package cluster

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/raft"
)

// Raft's snapshots are under the same latch as its log: after a failed flush nothing
// more is written, whatever it is.
func TestSnapshotFailureLatches(t *testing.T) {
	for _, at := range []int{1, 2, 3} { // Create, Write, Close
		var told []error
		s, snaps, err := openRaftStore(t.TempDir(), newRaftLog(slog.New(slog.DiscardHandler)), func(err error) { told = append(told, err) })
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		s.fault = func(what string) error {
			if what != "write snapshot" {
				return nil
			}
			if n++; n == at {
				return errors.New("injected: input/output error")
			}
			return nil
		}
		sink, err := snaps.Create(raft.SnapshotVersionMax, 1, 1, raft.Configuration{}, 1, nil)
		if err == nil {
			_, err = sink.Write([]byte("state"))
		}
		if err == nil {
			err = sink.Close()
		}
		if err == nil || len(told) != 1 || !strings.Contains(told[0].Error(), "write snapshot") {
			t.Errorf("step %d: %v, told %v", at, err, told)
		}
		if err := s.StoreLog(&raft.Log{Index: 1, Term: 1}); err == nil {
			t.Errorf("step %d: the log goes on", at)
		}
		// raft panics when it cannot store a term; it is let to go on, with nobody to talk to.
		if err := s.SetUint64([]byte("CurrentTerm"), 3); err != nil {
			t.Error(err)
		}
		if err := s.SetUint64([]byte("LastVoteTerm"), 3); err == nil {
			t.Error("a vote counts that was not stored")
		}
		if got, err := s.wal.GetUint64([]byte("CurrentTerm")); got != 0 {
			t.Errorf("term %d, %v", got, err)
		}
		if list, err := snaps.List(); len(list) != 0 {
			t.Errorf("step %d: %d snapshots, %v", at, len(list), err)
		}
		if len(told) != 1 {
			t.Errorf("told %v", told)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A member whose store has failed takes no part in raft any more, and has another one
// record why, whether it led or not.
func TestFarewell(t *testing.T) {
	l, _, _, _ := full(t)
	var fails atomic.Pointer[string] // the member whose writes fail
	l.fault = func(member, what string) error {
		if name := fails.Load(); name != nil && member == *name && strings.HasPrefix(what, "write") {
			return errors.New("injected: input/output error")
		}
		return nil
	}
	for _, leads := range []bool{true, false} {
		var lead, victim *member
		eventually(t, "a data node that leads", func() bool {
			lead = l.leader()
			return lead.id.Role == RoleData
		})
		if victim = lead; !leads {
			victim = l.members[map[string]string{"a": "b", "b": "a"}[lead.id.Name]]
		}
		name := victim.id.Name
		other := l.members[map[string]string{"a": "b", "b": "a"}[name]]
		fatal := make(chan error, 1)
		l.crash(name)
		cfg := victim.cfg
		cfg.Fatal = func(err error) { fatal <- err }
		victim = l.open(name, cfg)
		l.ready(victim)
		if leads {
			eventually(t, name+" leads", func() bool {
				if now := l.leader(); now != victim {
					_ = now.transfer(victim.Self())
				}
				return victim.raft.State() == raft.Leader
			})
		}
		fails.Store(&name)
		// Somebody's command: it may be answered or not.
		_ = other.AddEvent(testContext(t), Info, "x", "y")
		err := <-fatal
		if err := victim.Farewell(testContext(t), "node "+name+" has stopped: "+err.Error()); err != nil {
			t.Fatalf("leads %v: %v", leads, err)
		}
		s := must(other.Sync(testContext(t)))(t)
		if i := slices.IndexFunc(s.Events, func(e Event) bool { return e.Code == EventNodeFailed && e.Node == victim.Self() && e.Severity == Error }); i < 0 || !strings.Contains(s.Events[i].Text, "input/output error") {
			t.Errorf("leads %v: events %+v", leads, s.Events)
		}
		// Its part in raft is over: nothing that it has not stored can count.
		victim.layer.mu.Lock()
		if len(victim.layer.conns) != 0 && victim.layer.ctx.Err() == nil {
			t.Errorf("%d connections of raft are left", len(victim.layer.conns))
		}
		victim.layer.mu.Unlock()
		if err := victim.stop(false); err != nil {
			t.Logf("stop: %v", err)
		}
		fails.Store(nil)
		cfg.Fatal = nil
		l.ready(l.open(name, cfg))
	}
	l.agree()
}
