package replication

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/replication/wire"
)

// DeviceUse is what one device of this node has done since the node started.
type DeviceUse struct {
	Name     string
	Capacity bool // of class capacity; else flash
	Writes   int64
	Flushes  int64
	// The time that all of them took beyond the transfer of their bytes.
	WriteWait, FlushWait time.Duration
}

// Pace is how fast a device of this node, or the link to another node, answers.
type Pace struct {
	Device string // its name; empty: a link
	Peer   NodeID // the other end of a link
	// Now is of the last seconds, Usual of the time before; 0: not known yet. Of a device
	// it is a write and its flush, of a link the round trip of a beacon.
	Now, Usual time.Duration
	Slow       bool
}

// Limits of the judgement. A thing is suspected while it takes paceTimes what it usually
// takes, paceTimes what its peers take, and more than its floor. paceSuspect of that make
// it slow: everything that is more sudden is caught by Timing.Stall. It is well again
// after paceCalm without a trace; every time that it was slow within paceMemory doubles
// that, so that what comes and goes stays out.
const (
	paceTimes   = 10
	paceTrace   = 5 // times as much: no suspicion, but not well either
	paceSuspect = Instant(30 * time.Second)
	paceCalm    = Instant(time.Minute)
	paceCalmMax = Instant(time.Hour)
	paceMemory  = Instant(24 * time.Hour)
	// paceMute is for how long a slow thing may give no sign before it gets another chance.
	paceMute = Instant(10 * time.Minute)
	// paceHistory samples must have been taken before anything is judged by them.
	paceHistory = 30
	// The weights of a new sample, of which there is one a second at most: Now forgets
	// in seconds, Usual in minutes.
	paceNowWeight   = 0.25
	paceUsualWeight = 1.0 / 300
	// What takes less is fast enough, however fast it was before.
	deviceFloor = 10 * time.Millisecond
	linkFloor   = 20 * time.Millisecond
)

// pace judges one device or link by its own past and by its peers. It has no clock.
//
//	well --suspect for 30 s--> slow --calm for a minute, or mute for ten--> well
type pace struct {
	floor      time.Duration
	now, usual float64 // nanoseconds
	samples    int
	suspect    Instant // since when; 0: it is not
	calm       Instant // slow: for how long there was no trace, less the time with one
	seen       Instant // newest step
	heard      Instant // newest sample
	slow       bool
	ended      Instant // when it was slow last
	times      int     // how often, see paceMemory
}

// step takes the mean of the last second (0: nothing was measured) and what the peers
// take now (0: there are none, or they do not say), and says whether slow changed.
func (p *pace) step(at Instant, sample, peers time.Duration) bool {
	was, passed := p.slow, min(at-p.seen, Instant(2*time.Second))
	p.seen = at
	if sample > 0 {
		p.sample(at, float64(sample))
	}
	suspect := p.exceeds(paceTimes, peers)
	switch {
	case !suspect:
		p.suspect = 0
	case p.suspect == 0:
		p.suspect = at
	case !p.slow && at-p.suspect >= paceSuspect && at-p.heard < paceSuspect/2:
		p.slow, p.calm = true, 0
		if p.ended != 0 && at-p.ended > paceMemory {
			p.times = 0
		}
		p.times++
	}
	if !p.slow {
		return p.slow != was
	}
	if p.exceeds(paceTrace, peers) {
		p.calm = max(p.calm-passed, 0) // a hiccup does not start it over
	} else if at-p.heard < paceSuspect {
		p.calm += passed
	}
	if at-p.heard >= paceMute || p.calm >= p.patience() {
		p.slow, p.suspect, p.ended = false, 0, at
		p.now = min(p.now, p.usual)
	}
	return p.slow != was
}

func (p *pace) sample(at Instant, sample float64) {
	p.heard = at
	p.samples++
	if p.samples == 1 {
		p.now, p.usual = sample, sample
		return
	}
	p.now += (sample - p.now) * paceNowWeight
	if p.samples > paceHistory && (p.slow || p.exceeds(paceTrace, 0)) {
		return // what is out of the usual does not become it
	}
	p.usual += (sample - p.usual) * max(paceUsualWeight, 1/float64(p.samples))
}

// exceeds says whether it takes so many times what it and its peers usually take.
func (p *pace) exceeds(times float64, peers time.Duration) bool {
	return p.samples > paceHistory && p.now >= float64(p.floor) && p.now >= times*p.usual && p.now >= times*float64(peers)
}

// patience is for how long it must be calm.
func (p *pace) patience() Instant {
	return min(paceCalm<<min(max(p.times-1, 0), 10), paceCalmMax)
}

// paces is the judgement of all devices and links of this node: once a second, by a
// goroutine of its own, for the counters of the devices may have to be waited for.
type paces struct {
	slow atomic.Bool // one of our devices is
	own  [2]atomic.Uint32

	mu      sync.Mutex
	devices map[string]*devicePace
	links   map[NodeID]*pace
}

type devicePace struct {
	pace
	last DeviceUse
}

// watchPaces runs until the node ends.
func (n *Node) watchPaces() {
	if n.cfg.Devices == nil {
		return
	}
	for pause(n.ctx, time.Second) {
		for _, e := range append(n.judgeDevices(n.now(), n.cfg.Devices()), n.judgeLinks(n.now())...) {
			n.cfg.Event(e.level, e.code, e.text)
		}
		if n.paces.slow.Load() && n.cfg.Probe != nil {
			// Nothing may be written to a device that is spared: whether it is well again
			// has to be tried.
			once, cancel := context.WithTimeout(n.ctx, 10*time.Second)
			if err := n.cfg.Probe(once); err != nil && n.ctx.Err() == nil {
				n.log.Warn("a slow device cannot be tried", "err", err)
			}
			cancel()
		}
	}
}

// since is what a device took in the mean since the last look; 0: it did nothing.
func (d *devicePace) since(u DeviceUse) (mean time.Duration) {
	if w := u.Writes - d.last.Writes; w > 0 {
		mean += (u.WriteWait - d.last.WriteWait) / time.Duration(w)
	}
	if f := u.Flushes - d.last.Flushes; f > 0 {
		mean += (u.FlushWait - d.last.FlushWait) / time.Duration(f)
	}
	if mean == 0 && u.Writes+u.Flushes > d.last.Writes+d.last.Flushes {
		mean = 1
	}
	d.last = u
	return mean
}

func classOf(capacity bool) int {
	if capacity {
		return 1
	}
	return 0
}

// judgeDevices takes the counters of all devices and says what there is to report.
func (n *Node) judgeDevices(at Instant, list []DeviceUse) (events []paceEvent) {
	p := &n.paces
	p.mu.Lock()
	defer p.mu.Unlock()
	means := make([]time.Duration, len(list))
	seen := map[string]bool{}
	for i, u := range list {
		seen[u.Name] = true
		d := p.devices[u.Name]
		if d == nil {
			p.devices[u.Name] = &devicePace{pace: pace{floor: deviceFloor}, last: u}
			continue
		}
		means[i] = d.since(u)
	}
	for name := range p.devices {
		if !seen[name] {
			delete(p.devices, name)
		}
	}
	slow, worst := false, [2]float64{}
	for i, u := range list {
		d, class := p.devices[u.Name], classOf(u.Capacity)
		if d.step(at, means[i], n.peersOf(u)) {
			events = append(events, n.devicePaced(d, u.Name))
		}
		slow = slow || d.slow
		worst[class] = max(worst[class], d.now)
	}
	p.slow.Store(slow)
	for class := range worst {
		p.own[class].Store(uint32(min(worst[class]/1e3, math.MaxUint32)))
	}
	return events
}

// peersOf is what devices like u take now: the others of this node, and for each other
// node its slowest of the class; the median of them, 0 for none. Called with mu.
func (n *Node) peersOf(u DeviceUse) time.Duration {
	var all []time.Duration
	for name, d := range n.paces.devices {
		if name != u.Name && d.last.Capacity == u.Capacity && d.samples > paceHistory {
			all = append(all, time.Duration(d.now))
		}
	}
	for _, p := range *n.peers.Load() {
		if m := p.micros[classOf(u.Capacity)].Load(); m > 0 && p.link.Load() != nil {
			all = append(all, time.Duration(m)*time.Microsecond)
		}
	}
	return median(all)
}

// median is the lower one of two in the middle; 0 of none.
func median(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[(len(all)-1)/2]
}

// paceEvent is a fact for the operator.
type paceEvent struct {
	level      slog.Level
	code, text string
}

func (n *Node) devicePaced(d *devicePace, name string) paceEvent {
	times := fmt.Sprintf("a write and its flush take %s, usual are %s", round(d.now), round(d.usual))
	if d.slow {
		return paceEvent{levelWarn, "device-slow", fmt.Sprintf("device %s of node %d is slow: %s; the node leaves volumes that have another good copy to that", name, n.self, times)}
	}
	return paceEvent{levelInfo, "device-well", fmt.Sprintf("device %s of node %d is as fast as before: %s", name, n.self, times)}
}

func round(nanoseconds float64) time.Duration {
	return time.Duration(nanoseconds).Round(10 * time.Microsecond)
}

// judgeLinks takes the round trips of the beacons. A slow link is reported and nothing
// more: operations and beacons share it, so that it is slow when it is full, and what
// is slow for want of bandwidth would be slower yet by the resync that an eviction
// costs. What makes no progress at all is caught by Timing.Stall.
func (n *Node) judgeLinks(at Instant) (events []paceEvent) {
	p := &n.paces
	p.mu.Lock()
	defer p.mu.Unlock()
	peers := *n.peers.Load()
	for id := range p.links {
		if peers[id] == nil {
			delete(p.links, id)
		}
	}
	for id, peer := range peers {
		l := p.links[id]
		if l == nil {
			l = &pace{floor: linkFloor}
			p.links[id] = l
		}
		var mean time.Duration
		if trips := peer.trips.Swap(0); trips > 0 {
			mean = max(time.Duration(peer.tripTime.Swap(0)/trips), 1)
		}
		var others []time.Duration
		for other, x := range p.links {
			if other != id && x.samples > paceHistory {
				others = append(others, time.Duration(x.now))
			}
		}
		if !l.step(at, mean, median(others)) {
			continue
		}
		times := fmt.Sprintf("a round trip from node %d takes %s, usual are %s", n.self, round(l.now), round(l.usual))
		if l.slow {
			events = append(events, paceEvent{levelWarn, "link-slow", fmt.Sprintf("the link to node %d is slow: %s; writes wait for it", id, times)})
		} else {
			events = append(events, paceEvent{levelInfo, "link-well", fmt.Sprintf("the link to node %d is as fast as before: %s", id, times)})
		}
	}
	return events
}

// Paces says how fast the devices of this node and its links to the others are, in a
// fixed order. It may be called at any time.
func (n *Node) Paces() []Pace {
	p := &n.paces
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []Pace
	for name, d := range p.devices {
		list = append(list, Pace{Device: name, Now: time.Duration(d.now), Usual: time.Duration(d.usual), Slow: d.slow})
	}
	for id, l := range p.links {
		list = append(list, Pace{Peer: id, Now: time.Duration(l.now), Usual: time.Duration(l.usual), Slow: l.slow})
	}
	slices.SortFunc(list, func(a, b Pace) int {
		return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Device, b.Device))
	})
	return list
}

// ownPace is what our beacons say of our devices.
func (n *Node) ownPace() wire.Pace {
	p := &n.paces
	return wire.Pace{Micros: [2]uint32{p.own[0].Load(), p.own[1].Load()}, Slow: p.slow.Load()}
}

// paced takes what a beacon of the peer, or its answer to one, says of its devices.
func (p *peer) paced(b *wire.BeaconBody) {
	for class := range p.micros {
		p.micros[class].Store(b.Pace.Micros[class])
	}
	p.slow.Store(b.Pace.Slow)
}

// peerSlow says whether a peer asks to be spared.
func (n *Node) peerSlow(id NodeID) bool {
	p := (*n.peers.Load())[id]
	return p != nil && p.slow.Load()
}

// spareMax bounds one attempt to give a volume away because our own devices are slow.
const spareMax = 15 * time.Second

// spareOwner gives a volume to a replica on a node that is not slow, when ours is. The
// new owner then drops us from the in-sync set. Called with mu.
func (v *Volume) spareOwner(now Instant) {
	n := v.node
	if v.g.role != Active || v.gone != nil || v.leaving || v.g.proposal.open || !n.paces.slow.Load() || now < v.spareAt {
		return
	}
	for _, f := range v.followers {
		if f.link == nil || !v.g.rec.Has(f.id) || n.peerSlow(f.id) {
			continue
		}
		v.spareAt = now.After(spareMax)
		n.spawn(func() {
			ctx, cancel := context.WithTimeout(n.ctx, spareMax)
			defer cancel()
			if err := v.MoveTo(ctx, f.id); err != nil && n.ctx.Err() == nil {
				v.log.Warn("the volume does not leave this slow node yet", "to", f.id, "err", err)
			}
		})
		return
	}
}
