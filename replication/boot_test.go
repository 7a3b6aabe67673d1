package replication

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// boots plays what two nodes and a witness do after all of them were off: the reigns
// of the nodes that start, a register in the place of raft that answers while two of
// three are there, and links that never fail. It returns who serves after a minute,
// and since when.
func boots(rec Record, a, b, witness bool) string {
	up := map[NodeID]*reign{}
	votes := 0
	for id, on := range map[NodeID]bool{1: a, 2: b} {
		if on {
			up[id] = newReign(id, DefaultTiming, 0)
			votes++
		}
	}
	if witness {
		votes++
	}
	quorum := votes >= 2
	order := []NodeID{1, 2}
	ready := map[NodeID]Instant{}
	for now := Instant(0); now < 60*second; now += Instant(100 * time.Millisecond) {
		for _, id := range order {
			g := up[id]
			if g == nil {
				continue
			}
			if quorum { // B1: what is recorded is known through a quorum only
				g.record(now, rec, true)
			}
			for other := range up {
				if other == id {
					continue
				}
				if g.role == Active || g.role == Activating {
					if up[other].beacon(now, id, g.rec.Epoch, true) {
						g.granted(now, other, now)
					}
				}
				if g.role == Active || g.role == Activating {
					g.alive(now, other)
				}
			}
			g.tick(now)
			for _, x := range g.take() {
				switch x.kind {
				case actPropose:
					c := x.change
					if !quorum {
						g.proposed(now, c, Record{}, ErrOutcomeUnknown)
						continue
					}
					if c.Expect != rec.Epoch || !slices.Contains(c.InSync, c.Owner) || !rec.Has(c.Owner) {
						g.proposed(now, c, rec, ErrConflict)
						continue
					}
					rec.Epoch, rec.Owner, rec.InSync = rec.Epoch+1, c.Owner, c.InSync
					g.proposed(now, c, rec, nil)
				case actActivate:
					ready[id] = max(x.at, now)
				}
			}
			for _, x := range g.take() {
				if x.kind == actActivate {
					ready[id] = max(x.at, now)
				}
			}
			// M3 needs every member of the in-sync set.
			whole := true
			for _, m := range rec.InSync {
				whole = whole && up[m] != nil
			}
			if g.role == Activating && g.rec.Epoch == rec.Epoch && whole && now >= ready[id] {
				g.activated(now, rec.Epoch)
			}
		}
	}
	for _, id := range order {
		if g := up[id]; g != nil && g.role == Active {
			return fmt.Sprintf("%c serves, in sync %s", 'A'+rune(id)-1, letters(rec.InSync))
		}
	}
	return "nobody serves"
}

func letters(ids []NodeID) string {
	var b strings.Builder
	for _, id := range slices.Sorted(slices.Values(ids)) {
		b.WriteByte('A' + byte(id) - 1)
	}
	return b.String()
}

// TestBootOrder is the table of what becomes of a volume after all nodes were off:
// every recorded in-sync set and owner, who boots, and whether the witness is there
// (B1, B2). testdata/bootorder.txt is the table; -run BootOrder with
// TWINSAN_REWRITE=1 writes it anew.
func TestBootOrder(t *testing.T) {
	var out strings.Builder
	out.WriteString("recorded      boots  witness  outcome\n")
	for _, isr := range [][]NodeID{{1}, {2}, {1, 2}} {
		for _, owner := range isr {
			for _, who := range []string{"A", "B", "AB"} {
				for _, witness := range []bool{true, false} {
					rec := Record{Volume: 1, SizeBytes: 1 << 20, Epoch: 7, Owner: owner, InSync: isr, Replicas: []Replica{{1, ReplicaID{1}}, {2, ReplicaID{2}}}}
					got := boots(rec, strings.Contains(who, "A"), strings.Contains(who, "B"), witness)
					up := map[bool]string{true: "up", false: "down"}[witness]
					fmt.Fprintf(&out, "%-3s owner %c   %-5s  %-7s  %s\n", letters(isr), 'A'+rune(owner)-1, who, up, got)
					// B2, NO-STALE: nobody serves who was not recorded in sync.
					for _, id := range []NodeID{1, 2} {
						if strings.HasPrefix(got, string('A'+rune(id)-1)+" serves") && !slices.Contains(isr, id) {
							t.Errorf("in sync %s: %s", letters(isr), got)
						}
					}
				}
			}
		}
	}
	path := filepath.Join("testdata", "bootorder.txt")
	if os.Getenv("TWINSAN_REWRITE") != "" {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != out.String() {
		t.Errorf("not the table of %s (%v):\n%s", path, err, out.String())
	}
}

// TestRestoredDisk (B4, M3): the owner's disk is put back to an older state while
// everything is off. What was acknowledged since is on the other copy, and stays:
// the copy that is ahead owns the volume.
func TestRestoredDisk(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	pathA, pathB := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	a, c := b.startOn(1, pathA, true), b.startOn(2, pathB, true)
	b.create(4<<20, 1)
	b.inSync(1, 2)
	a.write(t, 0, pattern(1, 64<<10))
	b.stop(2, c)
	b.stop(1, a)
	old := filepath.Join(dir, "old")
	clone(t, pathA, old)
	a, c = b.startOn(1, pathA, false), b.startOn(2, pathB, false)
	b.inSync(1, 2)
	eventually(t, "the owner is active", func() bool {
		n := b.nodes[b.record().Owner]
		return n != nil && n.Volume(1) != nil && n.Volume(1).Status().Serving
	})
	acked := pattern(2, 64<<10)
	a.write(t, 0, acked)
	// Both at once, so that both are recorded in sync.
	b.court.mu.Lock()
	b.court.cut[1], b.court.cut[2] = true, true
	b.court.mu.Unlock()
	b.stop(2, c)
	b.stop(1, a)
	b.court.mu.Lock()
	b.court.cut[1], b.court.cut[2] = false, false
	r := b.court.records[1]
	if len(r.InSync) != 2 {
		t.Fatalf("%+v", r)
	}
	r.Epoch, r.Owner = r.Epoch+1, 1
	b.court.records[1] = r
	b.court.mu.Unlock()
	clone(t, old, pathA)
	a, c = b.startOn(1, pathA, false), b.startOn(2, pathB, false)
	for what, n := range map[string]*testNode{"restored": a, "other": c} {
		// Sessions are dropped when the volume gets its other owner: an initiator asks again.
		got := make([]byte, len(acked))
		eventually(t, "a read through the "+what+" node", func() bool {
			return n.do(&Request{Op: OpRead, Len: uint64(len(got)), Data: got}) == nil
		})
		if !bytes.Equal(got, acked) {
			t.Errorf("through the %s node what was acknowledged is gone", what)
		}
	}
	b.inSync(1, 2)
	b.equal()
}

// clone makes the file to what the file from is.
func clone(t *testing.T, from, to string) {
	t.Helper()
	r, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := io.Copy(w, r); err != nil {
		t.Fatal(err)
	}
}
