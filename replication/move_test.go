package replication

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// TestMove (M6): a volume goes back and forth under load from both nodes. No
// command fails, no session is dropped, and every acknowledged write is there.
func TestMove(t *testing.T) {
	b := newBench(t)
	b.timing = DefaultTiming // to wait for a lease would take 2.3 s
	const blocks = 64
	a, c := b.pair(4 << 20)
	nodes := map[NodeID]*testNode{1: a, 2: c}
	var stop atomic.Bool
	var group sync.WaitGroup
	var longest, done atomic.Int64
	for w := range 4 {
		n := nodes[NodeID(1+w%2)]
		group.Go(func() {
			for i := uint64(1); !stop.Load(); i++ {
				off := uint64(w*blocks)*4096 + (i%blocks)*4096
				data := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, i<<8|uint64(w)), 512)
				began := time.Now()
				var err error
				switch i % 3 {
				case 0:
					err = n.do(&Request{Op: OpWrite, Off: off, Len: 4096, Data: data})
				case 1: // ragged: under a range lock of its own
					err = n.do(&Request{Op: OpWrite, Off: off, Len: 4096 - 512, Data: data[512:]})
					if err == nil {
						err = n.do(&Request{Op: OpWrite, Off: off + 4096 - 512, Len: 512, Data: data[:512]})
					}
				case 2: // once and only once
					old := make([]byte, 512)
					if err = n.do(&Request{Op: OpRead, Off: off, Len: 512, Data: old}); err == nil {
						err = n.do(&Request{Op: OpCompareAndWrite, Off: off, Len: 512, Data: append(old, data[:512]...)})
					}
					if err == nil {
						err = n.do(&Request{Op: OpWrite, Off: off, Len: 4096, Data: data})
					}
				}
				if err != nil {
					t.Errorf("writer %d: command %d: %v", w, i, err)
					return
				}
				longest.Store(max(longest.Load(), int64(time.Since(began))))
				got := make([]byte, 4096)
				if err := n.do(&Request{Op: OpRead, Off: off, Len: 4096, Data: got}); err != nil || !bytes.Equal(got, data) {
					t.Errorf("writer %d: block %d is not what was written: %v", w, i%blocks, err)
					return
				}
				done.Add(1)
			}
		})
	}
	for i := range 10 {
		was := done.Load()
		waitFor(t, &stop, func() bool { return done.Load() > was+20 })
		from := b.record().Owner
		to := 3 - from
		if err := nodes[to].Volume(1).MoveTo(t.Context(), from); !errors.Is(err, ErrNotOwner) {
			t.Fatalf("MoveTo at another node than the owner: %v", err)
		}
		if err := nodes[from].Volume(1).MoveTo(t.Context(), 9); err == nil {
			t.Fatal("moved to a stranger")
		}
		eventually(t, "the owner is active", func() bool { return nodes[from].Volume(1).Status().Serving })
		began := time.Now()
		if err := nodes[from].Volume(1).MoveTo(t.Context(), to); err != nil {
			t.Fatalf("move %d: %v", i, err)
		}
		if r := b.record(); r.Owner != to || len(r.InSync) != 2 {
			t.Fatalf("after move %d the record is %+v", i, r)
		}
		eventually(t, "the new owner is active", func() bool { return nodes[to].Volume(1).Status().Serving })
		t.Logf("move %d: %v", i, time.Since(began))
	}
	stop.Store(true)
	group.Wait()
	t.Logf("%d commands, the longest took %v", done.Load(), time.Duration(longest.Load()))
	if longest.Load() > int64(2*time.Second) {
		t.Error("M6: a command waited as long as for a lease")
	}
	for id, n := range nodes {
		select {
		case reason := <-n.dropped:
			t.Errorf("node %d dropped sessions: %s", id, reason)
		default:
		}
	}
	b.equal()
}

// TestMoveRefused: without a quorum the volume stays stopped until the outcome is
// known (M7), and then goes where the record says.
func TestMoveWithoutQuorum(t *testing.T) {
	b := newBench(t)
	a, c := b.pair(1 << 20)
	a.write(t, 0, pattern(1, 4096))
	b.court.reach(1, false)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := a.Volume(1).MoveTo(ctx, 2); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("without a quorum: %v", err)
	}
	if a.Volume(1).Status().Serving || a.Volume(1).TryRead(0, make([]byte, 4096)) {
		t.Fatal("M7: serves although another may own the volume")
	}
	b.court.reach(1, true)
	data := pattern(2, 4096)
	a.write(t, 0, data) // held until the move is decided, then forwarded
	if r := b.record(); r.Owner != 2 {
		t.Errorf("record %+v", r)
	}
	if got := c.read(t, 0, 4096); !bytes.Equal(got, data) {
		t.Error("a held write is missing")
	}
}

func TestCede(t *testing.T) {
	g := activeReign(t)
	if g.cede(10*second, 3) || g.cede(10*second, 1) {
		t.Fatal("given to a node that is not in sync, or to itself")
	}
	if !g.cede(10*second, 2) {
		t.Fatal("cannot give the volume away")
	}
	p := proposals(g)
	if len(p) != 1 || p[0].Owner != 2 || len(p[0].InSync) != 2 {
		t.Fatalf("M6: proposed %+v", p)
	}
	g.proposed(10*second, p[0], Record{}, ErrOutcomeUnknown)
	g.tick(11 * second)
	if q := proposals(g); len(q) != 1 || q[0].Owner != 2 {
		t.Fatalf("M7: repeated %+v", q)
	}
	g.record(11*second, testRecord(3, 2, 1, 2), true)
	if a := g.take(); len(a) != 1 || a[0].kind != actCede || g.role != Standby {
		t.Errorf("role %v, actions %+v: a planned move drops no session", g.role, a)
	}
	// The other one took over at the same moment.
	g = activeReign(t)
	g.cede(10*second, 2)
	g.take()
	g.record(11*second, testRecord(3, 2, 2), true)
	if a := g.take(); len(a) != 1 || a[0].kind != actDemote {
		t.Errorf("Z1: actions %+v after a take-over", a)
	}
	// Refused: it serves on.
	g = activeReign(t)
	g.cede(10*second, 2)
	p = proposals(g)
	g.proposed(11*second, p[0], testRecord(2, 1, 1, 2), ErrConflict)
	if a := g.take(); len(a) != 1 || a[0].kind != actKeep || g.role != Active {
		t.Errorf("role %v, actions %+v after a refused move", g.role, a)
	}
}

// TestGiven: who is given a volume waits for no lease; who only finds itself recorded does.
func TestGiven(t *testing.T) {
	for name, tt := range map[string]struct {
		rec  Record
		want Instant
	}{
		"given":             {testRecord(3, 2, 1, 2), 0},
		"missed a change":   {testRecord(4, 2, 1, 2), (20 * second).After(DefaultTiming.Grace)},
		"the owner is gone": {testRecord(3, 2, 2), (20 * second).After(DefaultTiming.Grace)},
	} {
		g := standbyReign(20 * second)
		g.beacon(20*second, 1, lsfs.Epoch(2), true)
		g.record(20*second+1, tt.rec, true)
		a := g.take()
		if len(a) != 1 || a[0].kind != actActivate || a[0].at != tt.want || a[0].given != (tt.want == 0) {
			t.Errorf("%s: %+v, want activation after %d", name, a, tt.want)
		}
	}
}
