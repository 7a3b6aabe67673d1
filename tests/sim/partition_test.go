package sim

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twinsan/twinsan/replication"
)

var (
	partitionsFlag = flag.Bool("sim.partitions", false, "all cases of the partition table instead of some")
	rewriteFlag    = flag.Bool("sim.rewrite", false, "write the partition table anew")
)

// partition is one case of the small model: two nodes, a witness, one volume.
type partition struct {
	cut     int  // bit set: the directed link of that number is cut
	owner   int  // 0 or 1: which node owns the volume
	alone   bool // the owner alone is in sync
	crashed int  // 0 nobody, 1 the owner, 2 the other node dies when the links are cut
}

// The six directed links, as seen from the owner O: P is the other node, W the witness.
var directed = [6]string{"O>P", "P>O", "O>W", "W>O", "P>W", "W>P"}

// outcome is what 20 seconds after the cut show.
type outcome struct {
	serves  string // who serves at their end
	atOwner string // what a host sees that knows only the owner's portal
	atOther string
	inSync  string // at their end
}

const watched = 20 * time.Second

// play is the case: a write on which all agree, the cut, a write through each node
// during the cut, 20 s later the end of all faults and full health again.
func (c partition) play(w *world) (o outcome) {
	owner := replication.NodeID(1 + c.owner)
	other := 3 - owner
	name := map[replication.NodeID]string{owner: "O", other: "P", 0: "nobody"}
	at := map[byte]replication.NodeID{'O': owner, 'P': other, 'W': witness}
	w.prepare()
	w.court.records[1].Owner, w.court.records[1].InSync = owner, []replication.NodeID{owner}
	w.launch()
	defer w.shut()
	if !w.waitHealthy(time.Minute) {
		w.fail("the cluster does not come in sync")
		return o
	}
	w.clients[2].pinned(owner, w.clients[2].regs[1][0], time.Minute)
	if c.alone {
		p, _ := w.processAt(other)
		p.kill(false)
		w.eventually(time.Now().Add(10*time.Second), func() bool { return len(w.court.record(1).InSync) == 1 })
	}
	var list []cutLink
	for i, l := range directed {
		if c.cut&(1<<i) != 0 {
			from, to := at[l[0]], at[l[2]]
			list = append(list, cutLink{from, to, from == witness || to == witness})
		}
	}
	heal, _ := w.faultCut(list)
	if c.alone && c.crashed != 2 {
		w.revive(other)
	}
	switch p, q := w.procs[owner], w.procs[other]; {
	case c.crashed == 1:
		p.kill(false)
	case c.crashed == 2 && q != nil:
		q.kill(false)
	}
	took := [2]time.Duration{}
	for i, id := range []replication.NodeID{owner, other} {
		w.open.Go(func() { took[i] = w.clients[i].pinned(id, w.clients[i].regs[1][0], watched) })
	}
	time.Sleep(watched + time.Second)
	serving := replication.NodeID(0)
	for id := replication.NodeID(1); id <= 2; id++ {
		if p, _ := w.processAt(id); p != nil {
			if n, ok := p.isServing(); ok && n.Volume(1) != nil && n.Volume(1).Status().Serving {
				serving = id
			}
		}
	}
	o.serves = name[serving]
	for _, n := range w.court.record(1).InSync {
		o.inSync += name[n]
	}
	if o.inSync == "PO" {
		o.inSync = "OP"
	}
	say := func(d time.Duration) string {
		switch {
		case d < 0:
			return "path fails"
		case d < time.Second:
			return "no pause"
		case d < 8*time.Second:
			return "pause"
		}
		return "long pause"
	}
	close(w.healing)
	w.open.Wait()
	o.atOwner, o.atOther = say(took[0]), say(took[1])
	heal()
	w.revive(owner)
	w.revive(other)
	if !w.waitHealthy(liveWithin) {
		w.fail("I20: %s", w.state(time.Now()))
	}
	for i, id := range []replication.NodeID{owner, other} {
		if w.clients[i].pinned(id, w.clients[i].regs[1][1], liveWithin) < 0 {
			w.fail("I20: no write through node %d after all was healed", id)
		}
	}
	w.compare()
	return o
}

// pinned writes one block through one node, again and again until it is acknowledged,
// and says how long that took; -1 when it was not within limit.
func (c *client) pinned(id replication.NodeID, reg *register, limit time.Duration) time.Duration {
	data := c.content()
	began := time.Now()
	i := reg.sent(data)
	for time.Since(began) < limit && c.w.failure() == "" {
		if p, _ := c.w.processAt(id); p != nil {
			if s := p.login(c); s != nil {
				r := &replication.Request{Op: replication.OpWrite, Off: off(reg), Len: blockBytes, Data: append([]byte(nil), data...)}
				c.current.Store(&command{regs: []target{{reg, i}}})
				err := c.ask(s, reg.vol, r)
				c.current.Store(nil)
				if err == nil && r.Err == nil {
					reg.good(i)
					if d := time.Since(began); d < limit {
						return d
					}
					return -1
				}
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return -1
}

func runPartition(t *testing.T, c partition) (o outcome) {
	var w *world
	seed := uint64(1 + c.cut + 64*c.crashed)
	runtimeSeed(seed)
	synctest.Test(t, func(t *testing.T) {
		w = newWorld(Options{Seed: seed, Only: []string{}})
		w.nodes, w.oneNetwork, w.calm = 2, true, true
		w.count.Store(1)
		w.rates = [maxNodes + 1]float64{1, 1, 1, 1}
		w.net.delay, w.net.rate, w.flush, w.follow = 100*time.Microsecond, 1<<30, 500*time.Microsecond, 2*time.Millisecond
		w.inspectAcks = 1
		o = c.play(w)
	})
	if w.err != "" {
		t.Errorf("%+v: %s", c, w.err)
	}
	return o
}

// TestPartitions is the exhaustive small model: every state of the six directed links,
// either node owning, the owner alone in sync or not, and nobody or one of them dying
// at that moment. What must be the same whoever owns is checked to be, so the table
// (testdata/partitions.golden) has one row for both owners.
func TestPartitions(t *testing.T) {
	file := filepath.Join("testdata", "partitions.golden")
	want, err := os.ReadFile(file)
	if err != nil && !*rewriteFlag {
		t.Fatal(err)
	}
	golden := map[string]string{}
	for _, line := range strings.Split(string(want), "\n") {
		if cells := strings.Split(line, " | "); len(cells) > 3 && !strings.HasPrefix(line, "#") {
			golden[strings.Join(cells[:3], " | ")] = strings.Join(cells[3:], " | ")
		}
	}
	var table bytes.Buffer
	fmt.Fprintf(&table, `# Two nodes and a witness, one network. O owns the volume when the links named in the first
# column are cut ("O>P": nothing gets from O to P) and whoever is named dies. What 20 s
# without repair show: who serves at their end, what hosts see that know only O's or only
# P's portal (pause: 1 to 8 s), and who is in sync. Then everything is healed, and must be
# in sync, equal and served within a minute with nothing lost.
#
# Written by: go test ./tests/sim -run TestPartitions -sim.partitions -sim.rewrite
#
`)
	fmt.Fprintf(&table, "#%-22s | %-7s | %-7s | %-7s | %-10s | %-10s | %s\n", "cut", "in sync", "dies", "serves", "host at O", "host at P", "in sync then")
	for _, alone := range []bool{false, true} {
		for crashed := range 3 {
			for cut := range 64 {
				if !*partitionsFlag && (cut*6+crashed*2)%17 != 0 {
					continue
				}
				c := partition{cut: cut, alone: alone, crashed: crashed}
				var names []string
				for i, l := range directed {
					if cut&(1<<i) != 0 {
						names = append(names, l)
					}
				}
				cell := strings.Join(names, " ")
				if len(names) == 0 {
					cell = "nothing"
				}
				before, dies := "OP", [3]string{"nobody", "O", "P"}[crashed]
				if alone {
					before = "O"
				}
				key := fmt.Sprintf("%-23s | %-7s | %-7s", cell, before, dies)
				o := runPartition(t, c)
				row := fmt.Sprintf("%-7s | %-10s | %-10s | %s", o.serves, o.atOwner, o.atOther, o.inSync)
				fmt.Fprintf(&table, "%s | %s\n", key, row)
				c.owner = 1
				if m := runPartition(t, c); m != o {
					t.Errorf("%s: with the other owner %+v instead of %+v", key, m, o)
				}
				if got := golden[key]; !*rewriteFlag && got != row {
					t.Errorf("%s: %s\nin the table: %s", key, row, got)
				}
			}
		}
	}
	if *rewriteFlag && !t.Failed() {
		if err := os.WriteFile(file, table.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if t.Failed() && *partitionsFlag {
		_ = os.WriteFile(filepath.Join(os.TempDir(), "partitions.new"), table.Bytes(), 0o644)
	}
}
