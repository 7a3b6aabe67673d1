package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// unruly are the faults of raft stores in TestRaftChaos.
type unruly struct {
	mu     sync.Mutex
	fails  map[string]bool          // the next write of that member's store fails
	slow   map[string]time.Duration // each of its operations takes that much longer
	failed map[string]bool          // the member was told that it cannot go on
}

func (u *unruly) set(f func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f()
}

func (u *unruly) fault(name, what string) error {
	u.mu.Lock()
	wait := u.slow[name]
	fails := u.fails[name] && strings.HasPrefix(what, "write")
	u.mu.Unlock()
	if wait > 0 {
		<-time.After(wait)
	}
	if fails {
		return errors.New("injected: input/output error")
	}
	return nil
}

func (u *unruly) told(name string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failed[name]
}

// tear puts rubbish behind the end of the newest file of a member's raft log, as a
// write leaves it that was under way when the power went.
func tear(t *testing.T, dir string) {
	files, err := filepath.Glob(filepath.Join(dir, dirRaft, "log", "*.wal"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no log in %s: %v", dir, err)
	}
	slices.Sort(files)
	text, err := os.ReadFile(files[len(files)-1])
	if err != nil {
		t.Fatal(err)
	}
	end := len(strings.TrimRight(string(text), "\x00"))
	end = (end + 7) &^ 7 // frames are padded
	end = min(end+64, len(text)-4096)
	rand.Read(text[end : end+2000])
	if err := os.WriteFile(files[len(files)-1], text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRaftChaos runs the real raft over members that crash, whose stores fail, are
// slow, or end in rubbish, while two nodes compete for the epochs of a record. Each
// epoch has one winner, none that was told so is forgotten, and all members end with
// the same state at the same index (I18).
func TestRaftChaos(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	seed := mathrand.Uint64()
	t.Logf("seed %d", seed)
	r := mathrand.New(mathrand.NewPCG(seed, 1))
	l, a, _, _ := full(t)
	v := must(a.CreateVolume(testContext(t), VolumeSpec{Name: "vm1", SizeBytes: 1 << 20}))(t)
	l.mirror(v)
	u := &unruly{fails: map[string]bool{}, slow: map[string]time.Duration{}, failed: map[string]bool{}}
	l.fault = u.fault
	l.fatal = func(name string, _ error) { u.set(func() { u.failed[name] = true }) }
	for _, name := range []string{"b", "w", "a"} { // from here on with faults
		l.crash(name)
		l.ready(l.restart(name))
	}

	var mu sync.Mutex // guards live and winners
	live := map[string]*Cluster{"a": l.members["a"].Cluster, "b": l.members["b"].Cluster}
	winners := map[lsfs.Epoch]string{}
	ctx, cancel := context.WithCancel(testContext(t))
	var wg sync.WaitGroup
	compete := func(name string) {
		for ctx.Err() == nil {
			mu.Lock()
			c := live[name]
			mu.Unlock()
			if c == nil {
				<-time.After(5 * time.Millisecond)
				continue
			}
			once, done := context.WithTimeout(ctx, 2*time.Second)
			rec, err := c.Record(once, v.ID)
			if err == nil {
				expect := rec.Epoch
				rec, err = c.Propose(once, replication.Change{Volume: v.ID, Expect: expect, Owner: rec.Owner, InSync: rec.InSync, By: c.Self(), Reason: name})
				// A repeated attempt may bring the record as it is by now, later epochs included.
				if err == nil && rec.Epoch == expect+1 {
					mu.Lock()
					if w := winners[rec.Epoch]; w != "" {
						t.Errorf("epoch %d was won by %s and by %s", rec.Epoch, w, name)
					}
					winners[rec.Epoch] = name
					mu.Unlock()
				}
			}
			done()
		}
	}
	for _, name := range []string{"a", "b"} {
		wg.Go(func() { compete(name) })
	}
	won := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(winners)
	}
	for round := range rounds {
		name := []string{"a", "b", "w"}[r.IntN(3)]
		kind := []string{"crash", "torn", "failing", "slow"}[r.IntN(4)]
		t.Logf("round %d: %s %s, %d changes", round, kind, name, won())
		before := won()
		switch kind {
		case "slow":
			u.set(func() { u.slow[name] = time.Duration(r.IntN(150)) * time.Millisecond })
			eventually(t, "changes with a slow store", func() bool { return won() > before })
			u.set(func() { delete(u.slow, name) })
		default:
			if kind == "failing" {
				u.set(func() { u.fails[name], u.failed[name] = true, false })
				eventually(t, "the end of "+name, func() bool { return u.told(name) })
			}
			mu.Lock()
			delete(live, name)
			mu.Unlock()
			m := l.members[name]
			if err := m.stop(false); err != nil && kind != "failing" {
				t.Fatal(err)
			}
			m.Cluster = nil
			u.set(func() { u.fails[name] = false })
			if kind == "torn" {
				tear(t, m.cfg.Dir)
			}
			eventually(t, "changes without "+name, func() bool { return won() > before })
			m = l.restart(name)
			l.ready(m)
			mu.Lock()
			if name != "w" {
				live[name] = m.Cluster
			}
			mu.Unlock()
		}
		eventually(t, "changes afterwards", func() bool { return won() > before+1 })
	}
	cancel()
	wg.Wait()
	last := must(l.members["a"].Record(testContext(t), v.ID))(t)
	for epoch := range winners {
		if epoch > last.Epoch {
			t.Errorf("the change to epoch %d was acknowledged, the record is at %d", epoch, last.Epoch)
		}
	}
	l.agree()
	t.Logf("%d changes acknowledged, epoch %d", len(winners), last.Epoch)
}
