package iscsi

import (
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// counters are the target's own.
type counters struct {
	abandoned      atomic.Uint64
	evicted        atomic.Uint64
	rejects        atomic.Uint64
	taskManagement atomic.Uint64

	// Sums over connections that have ended.
	former struct {
		commands, bytesIn, bytesOut, failures, aborted, waits, refusals, stalls, dropped, digests atomic.Uint64
	}
}

func (t *Target) count(v *atomic.Uint64) { v.Add(1) }

func (t *Target) countLogin(status uint16) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logins[status]++
}

// SessionInfo describes a session. A session without a connection waits for its
// initiator to come back; Portal and Peer are "" then.
type SessionInfo struct {
	Initiator    string
	ISID         [6]byte
	TSIH         uint16
	Discovery    bool
	Portal, Peer string
	Since        time.Time // of the connection
	HeaderDigest bool
	DataDigest   bool
	Auth         string // "None", "CHAP" or "CHAP mutual"
	Commands     uint64
	BytesIn      uint64 // as received, headers included
	BytesOut     uint64
	InFlight     int // tasks
	Unsent       int // bytes of replies that the initiator has not taken
}

// Sessions returns all sessions, by initiator and ISID.
func (t *Target) Sessions() []SessionInfo {
	t.mu.Lock()
	var infos []SessionInfo
	var conns []*connection
	for _, s := range t.sessions {
		infos = append(infos, SessionInfo{Initiator: s.initiator, ISID: s.isid, TSIH: s.tsih, Discovery: s.discovery, Auth: s.auth})
		conns = append(conns, s.conn)
	}
	t.mu.Unlock()
	for i, c := range conns {
		if c == nil {
			continue
		}
		n := &infos[i]
		n.Portal, n.Peer, n.Since = c.portal, c.peer, c.since
		n.BytesIn = c.bytesIn.Load()
		c.mu.Lock()
		n.HeaderDigest, n.DataDigest = c.layout.HeaderDigest, c.layout.DataDigest
		n.Commands, n.BytesOut, n.InFlight, n.Unsent = c.commands, c.bytesOut, c.tasks, c.unsentLocked()
		c.mu.Unlock()
	}
	slices.SortFunc(infos, func(a, b SessionInfo) int {
		if d := strings.Compare(a.Initiator, b.Initiator); d != 0 {
			return d
		}
		return slices.Compare(a.ISID[:], b.ISID[:])
	})
	return infos
}

// Stats are counters since the target was made, and a few present values.
type Stats struct {
	Logins          map[uint16]uint64 // by login status; 0 is success
	LoginsAbandoned uint64            // the connection ended during login, or the time was over
	HalfOpen        int               // connections in login phase now
	HalfOpenEvicted uint64            // gave way to newer ones
	Sessions        int
	Commands        uint64
	BytesIn         uint64
	BytesOut        uint64
	Failures        uint64 // commands that ended with another status than GOOD
	TasksAborted    uint64 // without a response
	TaskManagement  uint64
	Rejects         uint64
	DigestErrors    uint64
	WindowDrops     uint64 // PDUs outside the command window or doubled
	MemoryWaits     uint64 // tasks that waited for a data buffer
	MemoryRefusals  uint64 // tasks that ended with BUSY or TASK SET FULL
	WriteStalls     uint64 // writes that the socket did not take at once
	BuffersInUse    int64  // bytes
}

// Stats returns the counters.
func (t *Target) Stats() Stats {
	f := &t.counters.former
	st := Stats{
		LoginsAbandoned: t.counters.abandoned.Load(),
		HalfOpenEvicted: t.counters.evicted.Load(),
		TaskManagement:  t.counters.taskManagement.Load(),
		Rejects:         t.counters.rejects.Load(),
		BuffersInUse:    t.buffers.inUse(),
	}
	t.mu.Lock()
	st.Logins = maps.Clone(t.logins)
	st.HalfOpen = len(t.halfOpen)
	st.Sessions = len(t.sessions)
	conns := t.connectionsLocked("")
	st.Commands, st.BytesIn, st.BytesOut = f.commands.Load(), f.bytesIn.Load(), f.bytesOut.Load()
	st.Failures, st.TasksAborted, st.DigestErrors = f.failures.Load(), f.aborted.Load(), f.digests.Load()
	st.WindowDrops, st.MemoryWaits, st.MemoryRefusals = f.dropped.Load(), f.waits.Load(), f.refusals.Load()
	st.WriteStalls = f.stalls.Load()
	t.mu.Unlock()
	for _, c := range conns {
		st.BytesIn += c.bytesIn.Load()
		c.mu.Lock()
		st.Commands += c.commands
		st.BytesOut += c.bytesOut
		st.Failures += c.failures
		st.TasksAborted += c.aborted
		st.DigestErrors += c.digestErrors
		st.WindowDrops += c.droppedPDUs
		st.MemoryWaits += c.waits
		st.MemoryRefusals += c.refusals
		st.WriteStalls += c.stalls
		c.mu.Unlock()
	}
	return st
}

// retireLocked adds a connection that has ended to the sums. Under Target.mu, so
// that no reader of Stats sees it twice or not at all.
func (t *Target) retireLocked(c *connection) {
	f := &t.counters.former
	f.bytesIn.Add(c.bytesIn.Load())
	c.mu.Lock()
	defer c.mu.Unlock()
	f.commands.Add(c.commands)
	f.bytesOut.Add(c.bytesOut)
	f.failures.Add(c.failures)
	f.aborted.Add(c.aborted)
	f.digests.Add(c.digestErrors)
	f.dropped.Add(c.droppedPDUs)
	f.waits.Add(c.waits)
	f.refusals.Add(c.refusals)
	f.stalls.Add(c.stalls)
}
