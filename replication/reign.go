package replication

import (
	"errors"
	"math"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// Instant is a reading of CLOCK_BOOTTIME in nanoseconds. The protocol compares
// only readings of one node's own clock (L2).
type Instant int64

// After is t plus d.
func (t Instant) After(d time.Duration) Instant { return t + Instant(d) }

const never = Instant(math.MaxInt64)

// Timing holds the protocol's times. Zero values take the defaults.
type Timing struct {
	Beacon    time.Duration // between beacons to each peer (L1): 200 ms
	Lease     time.Duration // L, from the sending of the beacon that a grant answers: 2 s
	Grace     time.Duration // G = L*(1+2*1 %) + slack: a granter stays out of take-overs so long: 2.3 s
	HeadStart time.Duration // by which a standby waits longer than the owner (M2): 1 s
	Evict     time.Duration // silence after which the owner drops a replica (M1): 2 s
	Stall     time.Duration // no progress although operations wait and beacons are answered (M1): 5 s
	BootWait  time.Duration // after a start, how long to wait for the other replicas (B2): 10 s
	Retry     time.Duration // between attempts of a proposal whose outcome is unknown (M7): 500 ms
	Drop      time.Duration // without an owner in reach, sessions are dropped (Z5): 5 s
	Hold      time.Duration // commands are held at most so long while this node becomes owner: 25 s
	Pause     time.Duration // a gap of the node's own clock tick that counts as a pause (Z1): 1 s
	Late      time.Duration // silence after which a link delivers nothing any more (Z1): 1 s
	Fresh     time.Duration // a forwarded request is refused when it took longer to come (Z3): 1.5 s
}

// DefaultTiming is what a production node runs with.
var DefaultTiming = Timing{
	Beacon: 200 * time.Millisecond, Lease: 2 * time.Second, Grace: 2300 * time.Millisecond,
	HeadStart: time.Second, Evict: 2 * time.Second, Stall: 5 * time.Second, BootWait: 10 * time.Second,
	Retry: 500 * time.Millisecond, Drop: 5 * time.Second, Hold: 25 * time.Second, Pause: time.Second, Late: time.Second, Fresh: 1500 * time.Millisecond,
}

// Role is what a node is for a volume.
//
//	Unknown --record--> Standby | Stale
//	Standby --owner silent--> Candidate --CAS--> Activating --M3--> Active
//	Active | Activating | Candidate --record names another owner--> Standby | Stale
type Role uint8

const (
	// Unknown: just started; serves and grants nothing (B1).
	Unknown Role = iota
	// Stale: not in the in-sync set; serves, grants and wins nothing (NO-STALE).
	Stale
	// Standby: in sync, forwards to the owner, grants its lease.
	Standby
	// Candidate: has stopped granting and proposes itself as owner (M2).
	Candidate
	// Activating: recorded as owner, not serving yet (M3).
	Activating
	// Active: the owner. ONE-OWNER rests on reign.lease and on the grace of its granters.
	Active
)

func (r Role) String() string {
	return [...]string{"unknown", "stale", "standby", "candidate", "activating", "active"}[r]
}

// reign is the membership and lease state machine of one volume on one node:
// rules L, M and B. It has no goroutine, socket or clock: every method is an
// event at an instant, and leaves what is to be done in actions, which the
// shell (volume.go) takes and performs. The shell's mutex guards it.
type reign struct {
	self   NodeID
	timing Timing
	boot   Instant

	rec       Record
	known     bool
	role      Role
	promised  lsfs.Epoch // lowest epoch this node still acts in (W2)
	fit       bool       // the local replica is the recorded one, consistent and healthy
	ownerDead bool       // the owner's process is proved dead (L5)
	heard     bool       // a beacon of the recorded owner has come since boot
	ceded     bool       // the newest record that names another owner is our own planned move (M6)

	lastBeacon    Instant // newest beacon of the recorded owner
	lastGrant     Instant // newest grant sent to any owner (L2)
	activateAfter Instant // M3: not before
	evictFrom     Instant // B2: no eviction before
	spares        bool    // slow replicas are dropped: our own devices are not slow (M1)

	peers    map[NodeID]*peerView
	proposal proposal
	actions  []action
}

// peerView is what the owner knows of another replica's node.
type peerView struct {
	grantUntil Instant // lease granted by it (L1)
	seen       Instant // newest answer to a beacon
	progress   Instant // newest advance of its acknowledgements, or nothing was pending
	dead       bool    // its process is proved dead (L5)
	failed     bool    // it reported its store failed or came back with amnesia (B4)
	slow       bool    // its devices are slow (M1)
}

type proposal struct {
	open   bool // submitted, and not decided as far as we know (M7)
	busy   bool // the shell is waiting for its result
	change Change
	at     Instant
}

type actionKind uint8

const (
	actPropose  actionKind = iota + 1 // submit change
	actActivate                       // run M3 for epoch, not before at
	actEpoch                          // still owner, membership changed: append an EPOCH record, recount acknowledgements
	actDemote                         // no longer owner: fail what is in flight, drop sessions (Z1)
	actRole                           // the role changed otherwise: held commands may go on
	actCede                           // given away as we proposed (M6): no session is dropped
	actKeep                           // not given away after all: serve again
)

type action struct {
	kind   actionKind
	change Change
	at     Instant
	given  bool // actActivate, actRole: the old owner gave the volume up, and lives (M6)
	reason string
}

func newReign(self NodeID, t Timing, now Instant) *reign {
	// L2 after a restart: the process before this one may have granted just now.
	g := &reign{self: self, timing: t, boot: now, lastBeacon: now, lastGrant: now, peers: map[NodeID]*peerView{}}
	if mutant("L2-restart") {
		g.lastGrant = 0
	}
	return g
}

func (g *reign) do(a action) { g.actions = append(g.actions, a) }

// take returns the actions since the last take.
func (g *reign) take() []action {
	a := g.actions
	g.actions = nil
	return a
}

func (g *reign) peer(n NodeID) *peerView {
	p := g.peers[n]
	if p == nil {
		p = &peerView{}
		g.peers[n] = p
	}
	return p
}

// needsAck says whether a write needs the durable acknowledgement of another node
// (W4): a member of the recorded in-sync set, or of the one that a proposal of
// unknown outcome may have made of it.
func (g *reign) needsAck(n NodeID) bool {
	if n == g.self {
		return false
	}
	if mutant("M1-ack-before-commit") && g.proposal.open && !slices.Contains(g.proposal.change.InSync, n) {
		return false
	}
	return g.rec.Has(n) || g.proposal.open && !mutant("W4-union") && slices.Contains(g.proposal.change.InSync, n)
}

// lease is the instant until which this node may serve (L1): the earliest of the
// grants of the other in-sync replicas, for ever when there are none (L4), never
// unless active. A replica that a proposal of unknown outcome may have taken in counts:
// the record may name it already, and then it may own (M7).
func (g *reign) lease() Instant {
	if g.role != Active {
		return 0
	}
	until := never
	if mutant("L4") && len(g.rec.InSync) == 1 {
		return 0
	}
	for _, n := range g.rec.InSync {
		if n != g.self {
			until = min(until, g.peer(n).grantUntil)
		}
	}
	if g.proposal.open && g.proposal.change.Owner == g.self && !mutant("L1-union") {
		for _, n := range g.proposal.change.InSync {
			if n != g.self {
				until = min(until, g.peer(n).grantUntil)
			}
		}
	}
	return until
}

// record takes the recorded state of the volume, from raft, in any order.
// fit says that the local replica is the recorded one and consistent.
func (g *reign) record(now Instant, rec Record, fit bool) {
	g.fit = fit
	if g.known && rec.Epoch < g.rec.Epoch {
		return
	}
	moved := !g.known || rec.Epoch > g.rec.Epoch
	before := g.rec
	g.rec, g.known = rec, true
	if !moved {
		g.settle(now, before)
		return
	}
	mine := g.proposal.open && rec.Owner == g.proposal.change.Owner && rec.Epoch == g.proposal.change.Expect+1
	ours := mine && rec.Owner == g.self
	ceding := g.proposal.open && g.proposal.change.Owner != g.self
	if g.proposal.open && rec.Epoch > g.proposal.change.Expect {
		g.proposal.open = false
	}
	if rec.Owner != before.Owner {
		g.lastBeacon, g.ownerDead, g.heard = now, false, false
	}
	if rec.Owner != g.self {
		// A take-over by the same node at the same moment would have left us out.
		g.ceded = mine && ceding && rec.Has(g.self)
		g.settle(now, before)
		return
	}
	// M6: only its owner gives a volume to another and stays in sync itself, and it
	// has stopped serving before it proposes that. So there is no lease to wait for.
	given := mutant("M6-given") || before.Owner != 0 && before.Owner != g.self && before.Epoch+1 == rec.Epoch && rec.Has(before.Owner)
	switch g.role {
	case Active:
		g.do(action{kind: actEpoch})
		if ceding {
			g.do(action{kind: actKeep})
		}
	case Activating:
		g.do(action{kind: actActivate, at: g.activateAfter})
	default:
		if !ours && g.role == Unknown {
			g.restart(now) // M5: the recorded reign belongs to the process before us
			return
		}
		// Won by a take-over (M2), given by a planned move (M6), or our own restart (M5).
		switch {
		case given:
			g.activateAfter = 0
		case g.role == Standby || g.role == Stale:
			g.activateAfter = g.lastGrant.After(g.timing.Grace)
		}
		g.become(Activating)
		for _, n := range rec.InSync {
			g.peer(n).seen, g.peer(n).progress = now, now
		}
		g.do(action{kind: actActivate, at: g.activateAfter, given: given})
	}
}

// settle takes the role that the record gives to a node that is not its owner.
func (g *reign) settle(now Instant, before Record) {
	if g.rec.Owner == g.self {
		return
	}
	role := Stale
	if (g.rec.Has(g.self) || mutant("I8-stale")) && (g.fit || mutant("I8-fit")) {
		role = Standby
	}
	if g.role == Candidate && g.proposal.open && role == Standby && before.Epoch == g.rec.Epoch {
		return // still waiting for our proposal
	}
	was := g.role
	given := before.Owner != 0 && before.Owner != g.rec.Owner && before.Epoch+1 == g.rec.Epoch && g.rec.Has(before.Owner)
	if was == role {
		if before.Epoch != g.rec.Epoch {
			g.do(action{kind: actRole, given: given})
		}
		return
	}
	g.become(role)
	if was == Active && g.ceded {
		g.do(action{kind: actCede})
	} else if was == Active || was == Activating {
		g.do(action{kind: actDemote, reason: "another node owns the volume now"})
	} else {
		g.do(action{kind: actRole})
	}
}

func (g *reign) become(r Role) {
	g.role = r
	if r != Activating && r != Active {
		g.evictFrom = 0
	}
}

// restart proposes our own next epoch for a reign that an earlier process held (M5).
func (g *reign) restart(now Instant) {
	if g.proposal.open || !g.fit && !mutant("I8-fit") {
		return
	}
	g.evictFrom = g.boot.After(g.timing.BootWait)
	g.activateAfter = 0 // our own older process is dead, and only it could serve
	if mutant("M5") {
		g.become(Activating)
		g.do(action{kind: actActivate})
		return
	}
	reason := "owner restarted"
	if g.rec.Epoch == 1 {
		reason = "first start"
	}
	g.propose(now, Change{Owner: g.self, InSync: g.rec.InSync, Reason: reason})
}

func (g *reign) propose(now Instant, c Change) {
	c.Volume, c.Expect, c.By = g.rec.Volume, g.rec.Epoch, g.self
	g.proposal = proposal{open: true, busy: true, change: c, at: now}
	g.do(action{kind: actPropose, change: c})
}

// proposed takes the result of the open proposal; rec is the record that came
// with it (nil error or ErrConflict).
func (g *reign) proposed(now Instant, c Change, rec Record, err error) {
	if !g.proposal.open || g.proposal.change.Expect != c.Expect {
		if err == nil || errors.Is(err, ErrConflict) {
			g.record(now, rec, g.fit)
		}
		return
	}
	g.proposal.busy, g.proposal.at = false, now
	switch {
	case err == nil:
		g.record(now, rec, g.fit)
	case errors.Is(err, ErrConflict):
		g.proposal.open = false
		if rec.Volume != 0 {
			g.record(now, rec, g.fit)
		}
		if g.role == Candidate {
			// Refused: somebody else won, or we are not eligible. Grant again.
			g.become(Standby)
			g.lastBeacon = now
			g.settle(now, g.rec)
		}
		if g.role == Active && c.Owner != g.self {
			g.do(action{kind: actKeep})
		}
	}
	if mutant("M7") && err != nil && !errors.Is(err, ErrConflict) {
		g.proposal.open = false
		if g.role == Candidate {
			g.become(Standby)
		}
	}
	// Otherwise it may still commit (M7): it stays open, W4's union stays, tick repeats it.
}

// beacon takes a beacon of peer, who claims the volume in epoch, and says
// whether the lease is granted. fresh is false for a peer that does not hear us (L3).
func (g *reign) beacon(now Instant, peer NodeID, epoch lsfs.Epoch, fresh bool) bool {
	if !fresh && !mutant("L3") || !g.known || peer != g.rec.Owner && !mutant("L1-owner") {
		return false
	}
	if g.role != Standby && g.role != Stale && !(mutant("M2-stop-granting") && g.role == Candidate) || epoch < g.promised && !mutant("W2-beacon") {
		return false
	}
	g.lastBeacon, g.heard, g.ownerDead = now, true, false
	g.lastGrant = now
	return true
}

// granted takes peer's answer to the beacon that was sent at sent.
func (g *reign) granted(now Instant, peer NodeID, sent Instant) {
	p := g.peer(peer)
	p.seen, p.dead = now, false
	if mutant("L1-send-time") {
		sent = now
	}
	p.grantUntil = max(p.grantUntil, sent.After(g.timing.Lease))
}

// progressed says that peer's acknowledgements advanced, or that nothing was pending for it.
func (g *reign) progressed(now Instant, peer NodeID) { g.peer(peer).progress = now }

// died takes the proof that peer's process is dead (L5).
func (g *reign) died(now Instant, peer NodeID) {
	g.peer(peer).dead = true
	if g.known && peer == g.rec.Owner {
		g.ownerDead = true
	}
	g.tick(now)
}

// alive says that peer answered a greeting.
func (g *reign) alive(now Instant, peer NodeID) {
	p := g.peer(peer)
	p.dead = false
	p.seen, p.progress = now, now
	if peer == g.rec.Owner {
		g.ownerDead = false
	}
}

// broken says that peer cannot be a replica any more (amnesia, B4, or a failed store).
func (g *reign) broken(now Instant, peer NodeID) {
	g.peer(peer).failed = true
	g.tick(now)
}

// activated ends M3 for epoch.
func (g *reign) activated(now Instant, epoch lsfs.Epoch) bool {
	if g.role != Activating || g.rec.Epoch != epoch {
		return false
	}
	g.become(Active)
	g.evictFrom = 0
	return true
}

// grow proposes peer for the in-sync set (M4). From now on W4 counts it.
func (g *reign) grow(now Instant, peer NodeID, id ReplicaID, inc Incarnation) bool {
	if g.role != Active || g.proposal.open || g.rec.Has(peer) {
		return false
	}
	p := g.peer(peer)
	p.seen, p.progress, p.failed = now, now, false
	g.propose(now, Change{
		Owner: g.self, InSync: append(slices.Clone(g.rec.InSync), peer),
		Grow: peer, GrowReplica: id, GrowIncarnation: inc, Reason: "replica is equal again",
	})
	return true
}

// cede proposes another member of the in-sync set as owner (M6). Before, the shell
// has stopped serving and nothing is in flight any more.
func (g *reign) cede(now Instant, to NodeID) bool {
	if g.role != Active || g.proposal.open || to == g.self || !g.rec.Has(to) {
		return false
	}
	g.propose(now, Change{Owner: to, InSync: g.rec.InSync, Reason: "planned move"})
	return true
}

// yield proposes another member of the in-sync set as owner while this node activates
// and has not served: it has more in its log (M3, B4).
func (g *reign) yield(now Instant, to NodeID) bool {
	if g.role != Activating || g.proposal.open || to == g.self || !g.rec.Has(to) {
		return false
	}
	g.propose(now, Change{Owner: to, InSync: g.rec.InSync, Reason: "its log is longer"})
	return true
}

// tick lets time pass.
func (g *reign) tick(now Instant) {
	if !g.known || g.rec.Deleted {
		return
	}
	if g.proposal.open {
		if !g.proposal.busy && now >= g.proposal.at.After(g.timing.Retry) {
			g.proposal.busy, g.proposal.at = true, now
			g.do(action{kind: actPropose, change: g.proposal.change})
		}
		return
	}
	switch g.role {
	case Unknown:
		if g.rec.Owner == g.self {
			g.restart(now)
		}
	case Active, Activating:
		g.tickOwner(now)
	case Standby:
		g.tickStandby(now)
	}
}

// tickOwner drops replicas that are dead, silent or stuck from the in-sync set (M1).
func (g *reign) tickOwner(now Instant) {
	if now < g.evictFrom || mutant("M1-evict") {
		return
	}
	keep := make([]NodeID, 0, len(g.rec.InSync))
	reason := ""
	for _, n := range g.rec.InSync {
		if n == g.self {
			keep = append(keep, n)
			continue
		}
		p := g.peer(n)
		switch {
		case p.failed:
			reason = "its store failed"
		case p.dead:
			reason = "its process is gone"
		case now > max(p.seen, g.evictFrom).After(g.timing.Evict):
			reason = "it is silent"
		case now > max(p.progress, g.evictFrom).After(g.timing.Stall) && !mutant("M1-stall"):
			reason = "it makes no progress"
		case p.slow && g.spares && g.role == Active:
			reason = "its device is slow"
		default:
			keep = append(keep, n)
		}
	}
	if len(keep) < len(g.rec.InSync) {
		g.propose(now, Change{Owner: g.self, InSync: keep, Reason: "a replica is dropped: " + reason})
	}
}

// tickStandby takes over from an owner that is dead or silent (M2).
func (g *reign) tickStandby(now Instant) {
	if !g.fit && !mutant("I8-fit") || !g.rec.Has(g.self) && !mutant("I8-stale") {
		return
	}
	if !g.heard && now < g.boot.After(g.timing.BootWait) {
		return // B2: after a start the owner gets time to come, too
	}
	silent := now > g.lastBeacon.After(g.timing.Grace+g.timing.HeadStart)
	if !g.ownerDead && !silent {
		return
	}
	g.become(Candidate) // stops granting: beacon answers only standbys
	g.activateAfter = g.lastGrant.After(g.timing.Grace)
	if g.ownerDead || mutant("M2-wait") {
		g.activateAfter = 0
	}
	reason := "the owner is silent"
	if g.ownerDead {
		reason = "the owner's process is gone"
	}
	isr := slices.DeleteFunc(slices.Clone(g.rec.InSync), func(n NodeID) bool { return n == g.rec.Owner })
	if mutant("I8-stale") && !slices.Contains(isr, g.self) {
		isr = append(isr, g.self)
	}
	g.propose(now, Change{Owner: g.self, InSync: isr, Reason: "take-over: " + reason})
}
