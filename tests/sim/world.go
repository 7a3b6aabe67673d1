package sim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/dedup"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// Options choose what a run does beside its seed.
type Options struct {
	Seed    uint64
	Length  time.Duration // of the phase with faults, virtual
	Verbose io.Writer     // the whole story, or nil
	Only    []string      // kinds of faults; nil: a random subset
	Plain   bool          // no volume begins as a snapshot: what seeds were before that
	Hard    bool          // many faults and busy hosts: to find a known bug soon
}

// Result is what a run found.
type Result struct {
	Seed    uint64
	Hash    uint64        // of everything that happened
	Virtual time.Duration // simulated time
	Good    int           // acknowledged writes
	Reads   int
	Faults  string // kinds that were on
	Err     string // the first violation, or ""
	Unequal bool   // a second run had another hash
}

// world is one run: a cluster, its hosts and what happens to them.
type world struct {
	seed   uint64
	opt    Options
	began  time.Time
	nodes  int
	count  atomic.Int32 // of volumes; it rises when one is born
	timing replication.Timing
	key    dedup.Key

	faultRandom, netRandom, storeRandom, courtRandom, clientRandom, checkRandom *random

	net     *network
	court   *court
	clients []*client
	shared  [][]byte
	lockOf  []lockState

	// What the seed chose.
	enabled     map[string]bool
	gap         time.Duration // mean time between faults
	think       time.Duration // of a client between steps
	flush       time.Duration // of a disk
	follow      time.Duration // by which nodes learn of records
	wander      float64       // chance that a client changes its path
	patience    time.Duration // of a host with a command
	inspectAcks float64
	oneNetwork  bool
	calm        bool // voters elect at once
	burst       bool
	violated    func(err string) // told of the first violation, or nil
	impatient   bool             // standbys do not wait for the lease before they propose themselves
	dropDelay   time.Duration    // by which sessions outlive the order to drop them
	clones      bool
	locks       bool
	fences      bool
	snapshots   bool
	rollbacks   bool // and snapshots are deleted
	groups      bool // and of two volumes at one moment
	hosts       *quiet
	placing     bool                // copies come and go
	births      bool                // a volume begins as a snapshot of another one
	ram         [birthsMax + 1]bool // by volume: mirrored-ram
	unflushed   time.Duration       // how long what is only written waits for its flush
	rot         bool
	rotten      replication.NodeID
	rates       [maxNodes + 1]float64

	amnesia atomic.Bool                // a disk has lost its memory: copies are not looked into
	restore [birthsMax + 1]atomic.Bool // by volume: blocks of it are lost for good and have to be written again
	faulty  atomic.Int32               // open faults

	mu      sync.Mutex
	disks   [maxNodes + 1]*disk
	procs   [maxNodes + 1]*process
	hostUp  [maxNodes + 1]bool
	hostCut [chainHost + 1][maxNodes + 1]int
	links   map[uint64]uint64 // of chain: by the sum of a block
	slow    [maxNodes + 1]time.Duration
	ids     uint64
	hash    uint64
	good    int
	reads   int
	err     string
	born    *born                                      // or nil
	frozen  map[lsfs.VolumeID]uint64                   // what every snapshot holds
	named   map[operation]uint64                       // what every number that was given stands for (ORDERED)
	lossy   [maxNodes + 1]map[lsfs.VolumeID]lsfs.Epoch // in which a node has lost something that it had acknowledged (W6)
	last    [maxNodes + 1][]replication.Record         // what a node was told last

	dark func(n int) int // of a scenario: how much of what is not flushed the power takes along, instead of n

	stop      chan struct{} // closed at the end, or at the first failure
	healing   chan struct{} // closed when all faults heal
	open      sync.WaitGroup
	inspected chan struct{} // closed when the inspector has gone
	group     sync.WaitGroup
}

type lockState struct {
	sync.Mutex
	holder int
}

const (
	volumeBlocks = 1024 // four chunks
	lockBlock    = 3
	clientCount  = 3
	readerCount  = 2
)

// Run executes one seed. It must be called inside of a synctest bubble, for
// otherwise it takes as long as it says.
func Run(opt Options) Result {
	w := newWorld(opt)
	w.play()
	w.mu.Lock()
	defer w.mu.Unlock()
	var on []string
	for _, k := range kinds {
		if w.enabled[k.name] {
			on = append(on, k.name)
		}
	}
	return Result{Seed: w.seed, Hash: w.hash, Virtual: time.Since(w.began), Good: w.good, Reads: w.reads, Faults: strings.Join(on, " "), Err: w.err}
}

func newWorld(opt Options) *world {
	seed := opt.Seed
	w := &world{
		seed: seed, opt: opt, began: time.Now(), timing: replication.DefaultTiming, hash: 14695981039346656037,
		faultRandom: newRandom(seed, 1), netRandom: newRandom(seed, 2), storeRandom: newRandom(seed, 3), courtRandom: newRandom(seed, 4),
		clientRandom: newRandom(seed, 5), checkRandom: newRandom(seed, 6),
		stop: make(chan struct{}), healing: make(chan struct{}), enabled: map[string]bool{}, named: map[operation]uint64{}, frozen: map[lsfs.VolumeID]uint64{}, links: map[uint64]uint64{},
	}
	r := newRandom(seed, 7)
	binary.LittleEndian.PutUint64(w.key[:], seed)
	w.nodes = 2
	w.count.Store(int32(1 + r.n(2)))
	if r.chance(0.2) {
		w.nodes = 3
	}
	pick := func(list ...time.Duration) time.Duration { return list[r.n(len(list))] }
	w.gap = pick(2*time.Second, 5*time.Second, 8*time.Second, 15*time.Second)
	w.think = pick(200*time.Millisecond, 500*time.Millisecond, 1200*time.Millisecond)
	w.flush = pick(50*time.Microsecond, 500*time.Microsecond, 5*time.Millisecond)
	w.follow = pick(2*time.Millisecond, 20*time.Millisecond, 300*time.Millisecond)
	w.wander = []float64{0, 0.05, 0.5}[r.n(3)]
	w.patience = 30 * time.Second
	w.unflushed = 200 * time.Millisecond
	w.inspectAcks = 0.25
	w.oneNetwork, w.burst = r.chance(0.5), r.chance(0.3)
	w.clones, w.locks, w.fences = r.chance(0.5), r.chance(0.5), r.chance(0.5)
	w.rot, w.rotten = r.chance(0.15), replication.NodeID(1+r.n(w.nodes))
	for i := range w.rates {
		w.rates[i] = 1 + float64(r.n(201)-100)/10000 // within 1 % of each other
	}
	for _, k := range kinds {
		w.enabled[k.name] = r.chance(0.4)
	}
	w.enabled["rot"] = w.rot
	if w.enabled["wipe"] || w.enabled["amnesia"] {
		// These need health between them.
		w.enabled["wipe"], w.enabled["amnesia"] = r.chance(0.3), r.chance(0.3)
	}
	if opt.Hard {
		w.gap, w.think, w.inspectAcks = pick(time.Second, 2*time.Second, 4*time.Second), pick(30*time.Millisecond, 100*time.Millisecond), 1
		w.wander = []float64{0.02, 0.3}[r.n(2)]
		w.clones, w.locks, w.fences = r.chance(0.7), r.chance(0.7), r.chance(0.7)
	}
	if opt.Only != nil {
		for _, k := range kinds {
			w.enabled[k.name] = slices.Contains(opt.Only, k.name)
		}
		w.rot = w.enabled["rot"]
	}
	w.hosts = newQuiet()
	snaps := newRandom(seed, 8)
	w.snapshots = snaps.chance(0.5) && !w.rot // a block that only a snapshot has cannot be written again
	if w.snapshots && snaps.chance(0.5) {
		w.rollbacks, w.locks = true, false // a lock would be rolled back with the rest
	}
	if r := newRandom(seed, 10); opt.Only == nil || len(opt.Only) > 0 { // no scenario
		if r.chance(0.15) && !w.rot {
			w.placing, w.nodes = true, 3
		}
		if r.chance(0.15) {
			w.ram = [birthsMax + 1]bool{1: r.chance(0.7), 2: r.chance(0.7)}
			if opt.Only == nil { // that is what it is about
				w.enabled["power"], w.enabled["kill-all"] = true, true
			}
			w.unflushed = []time.Duration{200 * time.Millisecond, 2 * time.Second, 10 * time.Second}[r.n(3)]
			w.clones = w.clones && !w.ram[1] && !w.ram[2] // nobody knows for certain what is cloned
		}
	}
	w.groups = w.snapshots && !w.rollbacks && w.volumes() == 2 && w.ram == [birthsMax + 1]bool{} && snaps.chance(0.5)
	w.births = w.snapshots && !opt.Plain && newRandom(seed, 12).chance(0.5)
	w.net = &network{w: w, delay: pick(50*time.Microsecond, 300*time.Microsecond, 3*time.Millisecond), rate: []int64{1 << 30, 100 << 20, 10 << 20}[r.n(3)]}
	w.court = newCourt(w)
	for i := range 6 {
		w.shared = append(w.shared, stamp(seed+uint64(i), i%2 == 0))
	}
	w.shared = append(w.shared, hole)
	w.lockOf = make([]lockState, birthsMax+1)
	return w
}

// prepare makes disks, records and hosts; launch starts the nodes; shut ends all.
func (w *world) prepare() {
	for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
		w.disks[id] = newDisk()
		w.lossy[id] = map[lsfs.VolumeID]lsfs.Epoch{}
	}
	for v := lsfs.VolumeID(1); int(v) <= w.volumes(); v++ {
		owner := replication.NodeID(1 + (int(v)-1)%w.nodes)
		away := replication.NodeID(0)
		if w.placing {
			away = owner%replication.NodeID(w.nodes) + 1
		}
		rec := &replication.Record{Volume: v, SizeBytes: volumeBlocks * blockBytes, Epoch: 1, Owner: owner, InSync: []replication.NodeID{owner}, Dedup: v == 1, Compress: true, MirroredRAM: w.ram[v]}
		for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
			if id != away {
				rec.Replicas = append(rec.Replicas, replication.Replica{Node: id, ID: replication.ReplicaID{byte(id), byte(v), 1}})
			}
		}
		w.court.records[v] = rec
	}
	for i := range clientCount {
		w.clients = append(w.clients, newClient(w, i))
	}
}

func (w *world) launch() {
	for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
		w.start(id)
	}
	w.inspected = make(chan struct{})
	go w.inspect(w.inspected)
}

func (w *world) shut() {
	w.finish()
	for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
		if p, _ := w.processAt(id); p != nil {
			p.unpause()
			p.kill(false)
		}
	}
	<-w.inspected
	w.open.Wait()
	w.group.Wait()
}

// play is the whole run.
func (w *world) play() {
	w.prepare()
	w.launch()
	if !w.waitHealthy(2*time.Minute) && !w.over() {
		w.fail("I20: a new cluster does not come in sync within two minutes")
	}
	for _, c := range w.clients {
		w.group.Go(c.run)
	}
	readers := readerCount
	if w.opt.Hard {
		readers *= 2
	}
	for i := range readers {
		w.group.Go(newClient(w, clientCount+1+i).watch)
	}
	if w.fences {
		w.group.Go(w.fence)
	}
	if w.snapshots {
		w.group.Go(w.keep)
	}
	if w.groups {
		w.group.Go(w.chain)
	}
	if w.placing {
		w.group.Go(w.arrange)
	}
	w.strike(time.Now().Add(w.opt.Length))
	w.pause(time.Until(w.began.Add(w.opt.Length)))

	// Everything heals; then everything works again.
	w.note("healing")
	close(w.healing)
	w.open.Wait()
	healed := time.Now()
	if !w.eventually(healed.Add(liveWithin), func() bool { return w.healthy() && w.served(healed) && w.recorded() }) && !w.over() {
		w.fail("I20: %s after the last fault was healed: %s", liveWithin, w.state(healed))
	}
	w.finish()
	w.pause(w.faultRandom.between(time.Second, 3*time.Second)) // what was under way ends
	if w.failure() == "" {
		w.compare()
		w.unchanged()
	}
	w.shut()
}

// volumes is how many there are. Their ids are one and up.
func (w *world) volumes() int { return int(w.count.Load()) }

// liveWithin bounds the time to full health: grace and boot waits, one conversation of
// a host given up, and the copying.
const liveWithin = 60 * time.Second

// pause lets time pass, also when the run is over, but not after a failure.
func (w *world) pause(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end) && w.failure() == ""; {
		time.Sleep(min(100*time.Millisecond, time.Until(end)))
	}
}

func (w *world) eventually(until time.Time, ok func() bool) bool {
	for !ok() {
		if w.over() || time.Now().After(until) {
			return false
		}
		time.Sleep(50 * time.Millisecond)
	}
	return true
}

// healthy says that every replica is in sync, every owner serves, and copies are where they
// should be and nowhere else.
func (w *world) healthy() bool {
	for _, rec := range w.court.all() {
		if len(rec.InSync) != len(rec.Replicas) || w.placing && w.strays(&rec) {
			return false
		}
		p, _ := w.processAt(rec.Owner)
		if p == nil || p.isPaused() {
			return false
		}
		n, ok := p.isServing()
		if !ok {
			return false
		}
		if v := n.Volume(rec.Volume); v == nil || !v.Serving() {
			return false
		}
	}
	return true
}

func (w *world) waitHealthy(limit time.Duration) bool {
	return w.eventually(time.Now().Add(limit), w.healthy)
}

// served says that every client has written to every volume since.
func (w *world) served(since time.Time) bool {
	for _, c := range w.clients {
		for v := 1; v <= w.volumes(); v++ {
			if c.done[v].Load() <= since.UnixNano() {
				return false
			}
		}
	}
	return true
}

// state describes the cluster for a message.
func (w *world) state(since time.Time) string {
	var b strings.Builder
	for _, rec := range w.court.all() {
		fmt.Fprintf(&b, "volume %d: epoch %d owner %d in sync %v;", rec.Volume, rec.Epoch, rec.Owner, rec.InSync)
		for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
			if p, _ := w.processAt(id); p != nil {
				if n, ok := p.isServing(); ok {
					if v := n.Volume(rec.Volume); v != nil {
						s := v.Status()
						fmt.Fprintf(&b, " node %d %v epoch %d serving %v in flight %d held %d;", id, s.Role, s.Epoch, s.Serving, s.InFlight, s.Held)
					}
				}
			}
		}
	}
	for _, c := range w.clients {
		for v := 1; v <= w.volumes(); v++ {
			if c.done[v].Load() <= since.UnixNano() {
				fmt.Fprintf(&b, " client %d has not written to volume %d;", c.id, v)
			}
		}
	}
	return b.String()
}

// inspect looks at all nodes again and again.
func (w *world) inspect(done chan struct{}) {
	defer close(done)
	for !w.over() {
		time.Sleep(w.checkRandom.between(20*time.Millisecond, 80*time.Millisecond))
		for v := lsfs.VolumeID(1); int(v) <= w.volumes(); v++ {
			serving := replication.NodeID(0)
			for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
				p, _ := w.processAt(id)
				if p == nil || p.isPaused() {
					continue
				}
				n, ok := p.isServing()
				if !ok {
					continue
				}
				if x := n.Volume(v); x != nil && x.Serving() {
					if serving != 0 {
						w.fail("I3: nodes %d and %d both serve volume %d", serving, id, v)
					}
					serving = id
					w.begun(x)
				}
			}
		}
	}
}

// begun checks what must hold before an owner serves: every replica in sync has the
// record of its reign on disk (M3).
func (w *world) begun(v *replication.Volume) {
	st := v.Status()
	rec := w.court.record(st.Volume)
	if w.amnesia.Load() || !st.Serving || st.Epoch != rec.Epoch || st.Owner != rec.Owner {
		return
	}
	w.court.mu.Lock()
	began := w.court.reigns[rec.Volume]
	w.court.mu.Unlock()
	for _, id := range rec.InSync {
		d := w.disks[id]
		d.mu.Lock()
		var log []lsfs.OpID
		if x := d.volumes[rec.Volume]; x != nil {
			log = x.meta.EpochLog
		}
		d.mu.Unlock()
		if len(log) > 0 && log[len(log)-1].Epoch >= began {
			w.whole(id, rec.Volume, began)
		} else {
			w.fail("M3: node %d serves volume %d, and node %d, in sync, does not have the record of epoch %d", rec.Owner, rec.Volume, id, began)
		}
	}
}

// compare looks at all disks when nothing moves any more.
func (w *world) compare() {
	for _, rec := range w.court.all() {
		if len(rec.InSync) != len(rec.Replicas) {
			continue // a liveness failure was reported, or a replica left meanwhile
		}
		own := w.disks[rec.Owner]
		for id := replication.NodeID(1); int(id) <= w.nodes; id++ {
			d := w.disks[id]
			if id == rec.Owner || copyOn(&rec, id) < 0 {
				continue
			}
			a, b := own.volumes[rec.Volume], d.volumes[rec.Volume]
			if a == nil || b == nil {
				w.fail("I7: volume %d: node %d has no copy", rec.Volume, id)
				return
			}
			w.compareSnapshots(rec.Volume, own, d, rec.Owner, id)
			if !bytes.Equal(a.meta.State, b.meta.State) {
				w.fail("I7: volume %d: the ordered state of nodes %d and %d differs", rec.Volume, rec.Owner, id)
			}
			for no := lsfs.BlockNo(0); no < volumeBlocks; no++ {
				x, y := a.at[no], b.at[no]
				if (x == nil) != (y == nil) || x != nil && x.fp != y.fp {
					w.fail("I7: volume %d block %d differs between nodes %d and %d", rec.Volume, no, rec.Owner, id)
					return
				}
			}
		}
		for _, c := range w.clients {
			for _, r := range c.regs[rec.Volume] {
				r.found(w, r.begin(), own.sum(rec.Volume, r.no), false, c.id)
			}
		}
	}
}

// fence is an administrator who fences hosts and lets them in again by changing the
// ordered state, which counts its changes in its first eight bytes. A change whose
// answer was lost may still be on its way: then another one may fail because of it.
func (w *world) fence() {
	c := newClient(w, clientCount)
	issued, floor := make([]uint64, birthsMax+1), make([]uint64, birthsMax+1)
	lost := make([]bool, birthsMax+1)
	last := lsfs.VolumeID(1)
	look := func(v lsfs.VolumeID) (id replication.StateID, count, mask uint64, ok bool) {
		was := floor[v]
		r, err := c.do(v, func() *replication.Request { return &replication.Request{Op: replication.OpReadState} })
		if err != nil {
			return id, 0, 0, false
		}
		if len(r.Value) >= 16 {
			count, mask = binary.LittleEndian.Uint64(r.Value), fencedIn(r.Value)
		}
		if count < was || count > issued[v] {
			w.fail("I2, C2: volume %d: the ordered state reads as change %d; acknowledged or seen: %d, sent: %d", v, count, was, issued[v])
		}
		floor[v] = max(floor[v], count)
		return r.State, count, mask, true
	}
	for !w.over() {
		select {
		case <-time.After(c.r.exp(4 * time.Second)):
		case <-w.stop:
			return
		}
		v := lsfs.VolumeID(1 + c.r.n(w.volumes()))
		if w.isHealing() {
			v = last%lsfs.VolumeID(w.volumes()) + 1 // each in its turn
		}
		last = v
		id, count, was, ok := look(v)
		if !ok || w.isHealing() && was == 0 && !lost[v] {
			continue
		}
		now := was ^ 1<<c.r.n(clientCount)
		if w.isHealing() { // nobody stays outside
			now = 0
		}
		for i, x := range w.clients {
			if now&(1<<i) == 0 { // what it writes may change again
				for _, r := range x.regs[v] {
					r.fence(false)
				}
			}
		}
		issued[v] = max(issued[v], count+1)
		value := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, count+1), now)
		r, err := c.do(v, func() *replication.Request {
			return &replication.Request{Op: replication.OpState, State: id, Data: append([]byte(nil), value...)}
		})
		switch {
		case errors.Is(err, replication.ErrStateMoved) && !lost[v]:
			w.fail("C2: volume %d: the ordered state moved under its only writer", v)
		case err != nil:
			lost[v] = lost[v] || errors.Is(err, errLost)
			continue
		case r.State == (replication.StateID{}):
			w.fail("C2: volume %d: a change of the ordered state has no name", v)
		}
		floor[v] = count + 1
		lost[v] = false // made from the value that was in force: nothing else can follow on it
		w.note("fenced", uint64(v), now)
		for i, x := range w.clients {
			if now&(1<<i) != 0 && was&(1<<i) == 0 {
				for _, r := range x.regs[v] {
					r.fence(true)
				}
			}
		}
	}
}

func (w *world) isHealing() bool {
	select {
	case <-w.healing:
		return true
	default:
		return false
	}
}

// reaches says whether a host's network reaches a node.
func (w *world) reaches(c *client, id replication.NodeID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hostUp[id] && w.hostCut[c.id][id] == 0
}

func (w *world) flushDelay(id replication.NodeID) time.Duration {
	w.mu.Lock()
	slow := w.slow[id]
	w.mu.Unlock()
	return w.storeRandom.between(w.flush/2, w.flush*2) + slow
}

func (w *world) readDelay(id replication.NodeID) time.Duration {
	w.mu.Lock()
	slow := w.slow[id]
	w.mu.Unlock()
	return w.storeRandom.between(0, w.flush) + slow/4
}

func (w *world) nextID() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids++
	return w.ids
}

// note makes an event part of the trace.
func (w *world) note(kind string, args ...uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch kind {
	case "good":
		w.good++
	case "read":
		w.reads++
	}
	h := w.hash
	mix := func(x uint64) { h = (h ^ x) * 0x100000001b3; h ^= h >> 31 }
	for i := range len(kind) {
		mix(uint64(kind[i]))
	}
	mix(uint64(time.Since(w.began)))
	for _, a := range args {
		mix(a)
	}
	w.hash = h
	if w.opt.Verbose != nil {
		fmt.Fprintf(w.opt.Verbose, "%12.6f %016x %s %d\n", time.Since(w.began).Seconds(), h, kind, args)
	}
}

func (w *world) logf(format string, args ...any) {
	if w.opt.Verbose != nil {
		fmt.Fprintf(w.opt.Verbose, "%12.6f %s\n", time.Since(w.began).Seconds(), fmt.Sprintf(format, args...))
	}
}

func (w *world) said(id replication.NodeID, code, text string) {
	if code == "resync-blocked" {
		var v int
		if _, err := fmt.Sscanf(text, "volume %d:", &v); err == nil {
			w.restore[v].Store(true)
		}
	}
	w.logf("node %d: %s: %s", id, code, text)
}

// logger is a node's log: part of the story when that is wanted.
func (w *world) logger(id replication.NodeID) *slog.Logger {
	if w.opt.Verbose == nil {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(story{w: w, id: id})
}

// story writes log records into the trace, with virtual time.
type story struct {
	w     *world
	id    replication.NodeID
	attrs string
}

func (s story) Enabled(context.Context, slog.Level) bool { return true }
func (s story) WithGroup(string) slog.Handler            { return s }
func (s story) WithAttrs(as []slog.Attr) slog.Handler {
	for _, a := range as {
		s.attrs += " " + a.String()
	}
	return s
}

func (s story) Handle(_ context.Context, r slog.Record) error {
	text := r.Message + s.attrs
	r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
	s.w.logf("node %d: %s", s.id, text)
	return nil
}

// fail notes a violation; the first one ends the run.
func (w *world) fail(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	w.logf("VIOLATION: %s", text)
	w.mu.Lock()
	first := w.err == ""
	if first {
		w.err = fmt.Sprintf("at %.3f s: %s", time.Since(w.began).Seconds(), text)
	}
	w.mu.Unlock()
	if first {
		if w.violated != nil {
			w.violated(w.err)
		}
		w.finish()
	}
}

func (w *world) failure() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// finish ends the hosts' work.
func (w *world) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over() {
		close(w.stop)
	}
}

func (w *world) over() bool {
	select {
	case <-w.stop:
		return true
	default:
		return false
	}
}
