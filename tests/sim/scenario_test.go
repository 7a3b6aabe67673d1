package sim

import (
	"encoding/json"
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

var scenarioFlag = flag.String("sim.scenario", "", "the scenario to play; empty: all")

// scenario is a short story of faults that needs one rule, or a few: without them it
// ends in a violation. It draws nothing that matters from its seed, which -sim.seed varies. Which scenario kills
// which mutant says testdata/mutants.txt.
type scenario struct {
	name    string
	nodes   int
	play    func(w *world)
	volumes int                       // 0: one
	timing  func(*replication.Timing) // nil: the default
}

var scenarios = []scenario{
	{name: "the deposed owner writes on", nodes: 3, play: (*world).deposedWrites},
	{name: "an older disk", nodes: 2, play: (*world).olderDisk},
	{name: "a link that works one way", nodes: 2, play: (*world).oneWay},
	{name: "killed when the replica counts again", nodes: 2, play: (*world).killedAfterGrow},
	{name: "a clone onto its source without an answer", nodes: 2, play: func(w *world) { w.lostAnswer(true) }},
	{name: "COMPARE AND WRITE without an answer", nodes: 2, play: func(w *world) { w.lostAnswer(false) }},
	{name: "read before commit, then take-over", nodes: 2, play: (*world).readUncommitted},
	{name: "taken in unseen, reads", nodes: 2, play: func(w *world) { w.takenInUnseen(false) }},
	{name: "taken in unseen, writes", nodes: 2, play: func(w *world) { w.takenInUnseen(true) }},
	{name: "a take-over is repeated after its answer was lost", nodes: 2, play: (*world).lateTakeOver},

	{name: "a stray command at a deposed owner", nodes: 2, play: (*world).strayAtDeposed},
	{name: "a stray command under way when its session is dropped", nodes: 2, play: (*world).strayUnderWay},
	{name: "a stray command after a pause", nodes: 2, play: (*world).strayAfterPause},
	{name: "a stray command behind a slow link", nodes: 2, play: (*world).strayBehindSlowLink},
	{name: "a stray command of an earlier reign", nodes: 3, play: (*world).strayOfEarlierReign},
	{name: "a stray command that waits for its range", nodes: 2, play: (*world).strayThatWaits},
	{name: "a stray command that reads through two reigns", nodes: 2, play: (*world).strayThatReads},
	{name: "COMPARE AND WRITE at a deposed owner", nodes: 2, play: (*world).comparesAtDeposed},
	{name: "three hosts and one lock", nodes: 2, play: (*world).oneLock},
	{name: "a fence in a stream of writes", nodes: 2, play: (*world).fenceInStream},
	{name: "two changes of one ordered state", nodes: 2, play: (*world).twoChanges},
	{name: "every door knows a change that is acknowledged", nodes: 2, play: (*world).everyDoorKnows},

	{name: "a read that takes longer than a reign", nodes: 3, play: (*world).readThroughMove},
	{name: "slow disks", nodes: 2, play: (*world).slowDisks},
	{name: "the lone survivor", nodes: 2, play: (*world).loneSurvivor},
	{name: "a write of an owner that is cut off", nodes: 2, play: (*world).writeCutOff},
	{name: "connections that break", nodes: 2, play: (*world).brokenLinks},
	{name: "the beacons of a deposed owner", nodes: 3, play: (*world).beaconsOfDeposed},
	{name: "grants that come late", nodes: 2, play: (*world).lateGrants},
	{name: "an impatient standby", nodes: 2, play: (*world).impatientStandby, timing: impatient},
	{name: "an impatient standby that has just started", nodes: 2, play: (*world).impatientStart, timing: impatient},
	{name: "a promise and then a crash", nodes: 3, play: (*world).promiseAndCrash},
	{name: "a promise and a write of the deposed owner", nodes: 3, play: (*world).promiseAndWrite},
	{name: "a move to a node while the other one is slow", nodes: 2, play: (*world).moveFromSlow},
	{name: "a replica that is behind at a take-over", nodes: 3, play: func(w *world) { w.uneven(false) }},
	{name: "a replica that is ahead at a take-over", nodes: 3, play: func(w *world) { w.uneven(true) }},
	{name: "the numbers of another owner", nodes: 2, play: (*world).numbersOfAnother},
	{name: "received, and not on disk", nodes: 3, play: (*world).receivedOnly},
	{name: "an eviction that is decided late", nodes: 2, play: (*world).lateEviction},
	{name: "a replica is taken in that was emptied meanwhile", nodes: 2, play: (*world).emptiedBeforeGrow},
	{name: "the stale node alone", nodes: 2, play: func(w *world) { w.aloneWith(false) }},
	{name: "the node with a new disk alone", nodes: 2, play: func(w *world) { w.aloneWith(true) }},
	{name: "amnesia, and then the owner dies", nodes: 2, play: (*world).amnesiaThenDeath},
	{name: "a lone owner starts again while it fills the other", nodes: 2, play: (*world).loneRestart},
	{name: "a node believes what it knew before it was killed", nodes: 2, play: (*world).staleStart},
	{name: "a move while a command takes long", nodes: 2, play: (*world).moveUnderWay},

	{name: "a tail that only the replica has", nodes: 2, play: (*world).replicasTail},
	{name: "killed while it is filled", nodes: 2, play: (*world).killedWhileFilled},
	{name: "a write that is being stored when the filling begins", nodes: 2, play: (*world).storedLate},
	{name: "writes while chunks are copied", nodes: 2, play: (*world).writesWhileFilled},
	{name: "a clone while its source is filled", nodes: 2, play: (*world).cloneWhileFilled},
	{name: "a clone from a volume that is filled", nodes: 2, play: (*world).cloneFromFilled, volumes: 2},
	{name: "snapshots while a replica is away and filled", nodes: 2, play: (*world).snapshotsWhileFilled},
	{name: "a snapshot of an owner that is cut off", nodes: 2, play: (*world).snapshotOfDeposed},
	{name: "copies come and go", nodes: 3, play: (*world).copiesComeAndGo},
	{name: "a copy is added again while its node is away", nodes: 3, play: (*world).addedAgain},
	{name: "flushed, and dark", nodes: 2, play: (*world).flushedAndDark},
	{name: "written with FUA, and dark", nodes: 2, play: (*world).unitAccessAndDark},
	{name: "one node is dark", nodes: 2, play: (*world).oneDark},
	{name: "the lone survivor of a write in two RAMs", nodes: 2, play: (*world).loneInRAM},
	{name: "a store that stops between two commands", nodes: 2, play: (*world).stoppedUnnoticed},
	{name: "a store that stops before it has a copy", nodes: 3, play: (*world).stoppedEmpty},
	{name: "a disk that loses what a resync brings", nodes: 2, play: (*world).lyingDisk},
	{name: "a block that no copy has", nodes: 2, play: (*world).lostBlock},
	{name: "a disk that hangs", nodes: 2, play: (*world).hangingDisk},
	{name: "a stray command after a silence on its link", nodes: 2, play: (*world).strayAfterSilence},
	{name: "a volume that is given away by another node", nodes: 2, play: (*world).givenByAnother},
	{name: "a snapshot is deleted while a replica is away", nodes: 2, play: (*world).snapshotDeleted},
	{name: "a rollback under a command that reads", nodes: 2, play: (*world).rolledBackUnder},
	{name: "groups of what is being written", nodes: 2, play: (*world).groupsOfWritten, volumes: 2},
	{name: "dark while it is filled", nodes: 2, play: (*world).darkWhileFilled},
	{name: "a volume that begins as a snapshot", nodes: 2, play: func(w *world) { w.beginsAsSnapshot(false) }},
	{name: "a volume whose origin its owner has lost", nodes: 2, play: func(w *world) { w.beginsAsSnapshot(true) }},
	{name: "a candidate that hears the owner", nodes: 3, play: (*world).candidateHears},
	{name: "clones of what is being written", nodes: 2, play: (*world).cloneOfWritten, volumes: 2},
}

// cutOff cuts the links from and to a node, of the data network to the nodes named, and
// of raft's to everybody.
func (w *world) cutOff(id replication.NodeID, data ...replication.NodeID) (heal func()) {
	var list []cutLink
	for _, n := range data {
		list = append(list, cutLink{id, n, false}, cutLink{n, id, false})
	}
	for n := replication.NodeID(1); n <= witness; n++ {
		if n != id && (int(n) <= w.nodes || n == witness) {
			list = append(list, cutLink{id, n, true}, cutLink{n, id, true})
		}
	}
	heal, _ = w.faultCut(list)
	return heal
}

// wrongScenario begins a failure that says nothing of the rules.
const wrongScenario = "the scenario does not come to"

// await waits for a state that the scenario needs; without it the scenario is wrong.
func (w *world) await(what string, ok func() bool) {
	if !w.eventually(time.Now().Add(time.Minute), ok) && w.failure() == "" {
		w.fail("%s: %s; %s", wrongScenario, what, w.state(time.Now()))
	}
}

func (w *world) serves(id replication.NodeID) bool {
	p, _ := w.processAt(id)
	if p == nil {
		return false
	}
	n, ok := p.isServing()
	return ok && n.Volume(1) != nil && n.Volume(1).Serving()
}

// readAt reads a block through one node, again and again until it is answered.
func (c *client) readAt(id replication.NodeID, reg *register, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end) && c.w.failure() == ""; {
		if p, _ := c.w.processAt(id); p != nil {
			if s := p.login(c); s != nil {
				b := reg.begin()
				r := &replication.Request{Op: replication.OpRead, Off: off(reg), Len: blockBytes, Data: make([]byte, blockBytes)}
				if c.ask(s, reg.vol, r) == nil && r.Err == nil {
					reg.read(c.w, b, r.Data, false, c.id)
					return true
				}
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return false
}

// post sends a write to each block of a host at about the same time, through one node;
// the function that it returns waits until all have ended.
func (w *world) post(c *client, id replication.NodeID) (wait func()) {
	p, _ := w.processAt(id)
	session := p.login(c)
	var all sync.WaitGroup
	for _, reg := range c.regs[1] {
		data := c.content()
		i := reg.sent(data)
		all.Go(func() {
			time.Sleep(w.clientRandom.between(0, 10*time.Millisecond))
			c.current.Store(&command{regs: []target{{reg, i}}})
			r := &replication.Request{Op: replication.OpWrite, Off: off(reg), Len: blockBytes, Data: append([]byte(nil), data...)}
			if c.ask(session, 1, r) == nil && r.Err == nil {
				reg.good(i)
			}
		})
	}
	return all.Wait
}

// mend heals everything and looks whether nothing was lost.
func (w *world) mend(heal func()) {
	if w.failure() != "" {
		return
	}
	heal()
	if !w.waitHealthy(liveWithin) {
		w.fail("I20: %s", w.state(time.Now()))
	}
	w.finish()
	w.open.Wait()
	w.pause(2 * time.Second)
	if w.failure() == "" {
		w.compare()
	}
}

// deposedWrites: the owner loses raft and one of two replicas; that one takes over with
// the other, to which the old owner still talks, and sends what it is given.
func (w *world) deposedWrites() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	heal := w.cutOff(1, 3)
	w.await("node 3 owns", func() bool { return w.serves(3) })
	old, new := w.post(w.clients[0], 1), w.post(w.clients[1], 3)
	old()
	new()
	if w.clients[2].pinned(3, w.clients[2].regs[1][0], 30*time.Second) < 0 {
		w.fail("I20: no write through the new owner")
	}
	w.mend(heal)
}

// olderDisk: all nodes are killed, and the owner comes back with its disk as it was before
// a write that was acknowledged.
func (w *world) olderDisk() {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	d := w.disks[1]
	d.mu.Lock()
	image := d.clone()
	d.mu.Unlock()
	w.clients[0].pinned(1, reg, time.Minute)
	w.procs[1].kill(false)
	w.procs[2].kill(false)
	w.mu.Lock()
	w.disks[1] = image
	w.mu.Unlock()
	w.revive(1)
	w.revive(2)
	w.await("an owner", func() bool { return w.serves(1) || w.serves(2) })
	w.await("a read", func() bool {
		return w.clients[1].readAt(1, reg, time.Second) || w.clients[1].readAt(2, reg, time.Second)
	})
	w.mend(func() {})
}

// oneWay: the owner is heard by the replica and hears nothing itself, neither of it nor of
// raft. Then the replica has to take over.
func (w *world) oneWay() {
	w.clients[0].pinned(1, w.clients[0].regs[1][0], time.Minute)
	control := w.cutOff(1)
	data, _ := w.faultCut([]cutLink{{2, 1, false}})
	if !w.eventually(time.Now().Add(8*time.Second), func() bool { return w.serves(2) }) {
		w.fail("Z5: nobody serves although a node could: %s", w.state(time.Now()))
	}
	w.mend(func() { control(); data() })
}

// killedAfterGrow: both nodes die when the replica, whose disk is slow, has just been
// taken in, and only the replica comes back.
func (w *world) killedAfterGrow() {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	var over atomic.Bool
	w.open.Go(func() {
		for i := uint64(0); !over.Load() && w.failure() == "" && w.put(w.clients[0], 1, reg, stamp(i, true)) == nil; i++ {
		}
	})
	w.setSlow(2, 250*time.Millisecond)
	w.revive(2)
	for end := time.Now().Add(time.Minute); len(w.court.record(1).InSync) < 2 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	w.procs[1].kill(true)
	w.procs[2].kill(false)
	over.Store(true)
	w.setSlow(2, 0)
	w.revive(2)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[1].readAt(2, reg, 20*time.Second)
	w.mend(func() { w.revive(1) })
}

// lostAnswer: a command is forwarded to the owner, which dies when both have it and
// before it can answer.
func (w *world) lostAnswer(clone bool) {
	c := w.clients[0]
	for _, reg := range c.regs[1][:4] {
		c.pinned(2, reg, time.Minute)
	}
	w.net.mu.Lock()
	w.net.delay = 60 * time.Millisecond
	w.net.mu.Unlock()
	stands := func() lsfs.Seq {
		d := w.disks[2]
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.volumes[1].meta.Durable.Seq
	}
	before := stands()
	w.open.Go(func() {
		c.path, w.wander = 2, 0
		old, ok := c.known(c.regs[1][:4])
		if !ok {
			return
		}
		dst, src := c.regs[1][1:4], c.regs[1][:3]
		if clone {
			c.change(dst, old[:3], func() *replication.Request {
				return &replication.Request{Op: replication.OpClone, Off: off(dst[0]), Len: 3 * blockBytes, Source: 1, SourceOff: off(src[0])}
			})
			return
		}
		data := stamp(99, true)
		c.change(dst[:1], [][]byte{data}, func() *replication.Request {
			return &replication.Request{Op: replication.OpCompareAndWrite, Off: off(dst[0]), Len: blockBytes, Data: append(append([]byte(nil), old[1]...), data...)}
		})
	})
	for end := time.Now().Add(20 * time.Second); stands() == before && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	w.procs[1].kill(false)
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.open.Wait()
	w.mend(func() { w.revive(1) })
}

// readUncommitted: a write that the replica cannot have is read at the owner, which dies.
func (w *world) readUncommitted() {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	heal := w.cutOff(1, 2)
	w.open.Go(func() { w.clients[0].pinned(1, reg, 500*time.Millisecond) })
	time.Sleep(100 * time.Millisecond)
	for range 8 { // by one of the two ways that a read can take
		w.open.Go(func() { w.clients[1].readAt(1, reg, 300*time.Millisecond) })
		time.Sleep(20 * time.Millisecond)
	}
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[2].readAt(2, reg, 10*time.Second)
	w.mend(heal)
}

// takeInLate leaves node 1 alone with its volume until it proposes to take node 2 in, which
// the register gets when decide is called.
func (w *world) takeInLate(reg *register) (decide func()) {
	w.clients[0].pinned(1, reg, time.Minute)
	w.procs[2].kill(false)
	w.await("node 1 alone", func() bool { return len(w.court.record(1).InSync) == 1 })
	var caught atomic.Pointer[replication.Change]
	end := w.catching(func(ch replication.Change) bool {
		if ch.Grow != 0 {
			caught.CompareAndSwap(nil, &ch)
		}
		return ch.Grow != 0
	})
	w.revive(2)
	w.await("a proposal", func() bool { return caught.Load() != nil })
	return func() {
		end()
		if _, err := w.court.decide(*caught.Load()); err != nil {
			w.fail("the caught proposal is refused: %v", err)
		}
	}
}

// takenInUnseen: a lone owner proposes to take the replica in, and hears no more of it; it
// goes on while the record changes and the replica takes over.
func (w *world) takenInUnseen(write bool) {
	reg := w.clients[0].regs[1][0]
	decide := w.takeInLate(reg)
	heal := w.cutOff(1, 2)
	if write {
		w.clients[0].pinned(1, reg, 700*time.Millisecond)
	}
	time.Sleep(3 * time.Second) // its silence
	decide()
	w.await("node 2 owns", func() bool { return w.serves(2) })
	w.clients[2].readAt(2, reg, 10*time.Second)
	w.clients[2].pinned(2, w.clients[2].regs[1][0], 10*time.Second)
	w.clients[1].readAt(1, w.clients[2].regs[1][0], 700*time.Millisecond)
	w.mend(heal)
}

// lateTakeOver: the answer to a take-over is lost and it commits later, when the candidate
// would have given it up.
func (w *world) lateTakeOver() {
	reg := w.clients[0].regs[1][0]
	w.clients[0].pinned(1, reg, time.Minute)
	var caught atomic.Pointer[replication.Change]
	end := w.catching(func(ch replication.Change) bool {
		if ch.By == 2 {
			caught.CompareAndSwap(nil, &ch)
		}
		return true
	})
	heal, _ := w.faultCut([]cutLink{{1, 2, false}, {2, 1, false}})
	w.await("a proposal", func() bool { return caught.Load() != nil })
	heal()
	time.Sleep(8 * time.Second) // a candidate that gave up would grant again
	end()
	_, _ = w.court.decide(*caught.Load())
	w.clients[1].pinned(2, w.clients[1].regs[1][0], 20*time.Second)
	w.mend(func() {})
}

// TestScenarios plays the scenarios; with a mutant, only those that are to kill it.
func TestScenarios(t *testing.T) {
	if err := setMutant(*mutantFlag); err != nil {
		t.Fatal(err)
	}
	for _, c := range scenarios {
		if *scenarioFlag != "" && *scenarioFlag != c.name {
			continue
		}
		var w *world
		name := fnv.New32a() // a scenario stays what it is when there are more of them
		name.Write([]byte(c.name))
		seed := uint64(name.Sum32()) + *seedFlag
		if *childFlag {
			fmt.Printf("begin %d\n", seed)
		}
		tell := func(err string) { // at once: a world in which a rule is broken may break itself
			b, _ := json.Marshal(Result{Seed: seed, Err: err})
			fmt.Printf("end %s\n", b)
		}
		runtimeSeed(seed)
		synctest.Test(t, func(*testing.T) {
			opt := Options{Seed: seed, Only: []string{}}
			if *storyFlag {
				opt.Verbose = os.Stdout
			}
			w = newWorld(opt)
			w.nodes, w.oneNetwork, w.calm = c.nodes, false, true
			w.count.Store(int32(max(c.volumes, 1)))
			if c.timing != nil {
				w.impatient = true
				c.timing(&w.timing)
			}
			w.rates = [maxNodes + 1]float64{1, 1, 1, 1}
			w.net.delay, w.net.rate, w.flush, w.follow = 100*time.Microsecond, 1<<30, 500*time.Microsecond, 2*time.Millisecond
			w.inspectAcks = 1
			if *childFlag {
				w.violated = tell
			}
			w.prepare()
			for _, rec := range w.court.records {
				rec.Owner, rec.InSync = 1, []replication.NodeID{1}
			}
			w.launch()
			w.await("health", w.healthy)
			c.play(w)
			w.shut()
		})
		if *childFlag {
			if w.err == "" {
				tell("")
			}
		} else if w.err != "" {
			t.Errorf("%s: %s", c.name, w.err)
		}
	}
}
