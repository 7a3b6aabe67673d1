package scsi

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/twinsan/twinsan/server/scsi/cdb"
)

// OpClass is a kind of command, for statistics.
type OpClass uint8

const (
	ClassOther OpClass = iota
	ClassRead
	ClassWrite
	ClassUnmap
	ClassCompareAndWrite
	ClassWriteSame
	ClassExtendedCopy
	ClassPopulateToken
	ClassWriteUsingToken
	ClassVerify      // VERIFY, PRE-FETCH
	ClassFlush       // SYNCHRONIZE CACHE
	ClassReservation // PERSISTENT RESERVE IN and OUT, RESERVE, RELEASE
	ClassOrWrite
	ClassWriteAtomic
	ClassLBAStatus // GET LBA STATUS
	ClassLog       // LOG SENSE, LOG SELECT
	ClassSanitize
	ClassPaths // REPORT and SET TARGET PORT GROUPS
	// Classes is the number of classes.
	Classes
)

// classNames are the classes as they appear in metrics.
var classNames = [Classes]string{
	ClassOther:           "other",
	ClassRead:            "read",
	ClassWrite:           "write",
	ClassUnmap:           "unmap",
	ClassCompareAndWrite: "caw",
	ClassWriteSame:       "write_same",
	ClassExtendedCopy:    "xcopy",
	ClassPopulateToken:   "odx_populate",
	ClassWriteUsingToken: "odx_write",
	ClassVerify:          "verify",
	ClassFlush:           "flush",
	ClassReservation:     "reservation",
	ClassOrWrite:         "or_write",
	ClassWriteAtomic:     "write_atomic",
	ClassLBAStatus:       "lba_status",
	ClassLog:             "log",
	ClassSanitize:        "sanitize",
	ClassPaths:           "paths",
}

// String returns the class as it appears in metrics.
func (c OpClass) String() string {
	if c >= Classes {
		return "?"
	}
	return classNames[c]
}

// onMedium says whether the commands of a class count the bytes of the medium
// that they read, wrote or zeroed, and not those of their replies.
func (c OpClass) onMedium() bool {
	switch c {
	case ClassOther, ClassReservation, ClassLBAStatus, ClassLog, ClassSanitize, ClassPaths, ClassFlush:
		return false
	default:
		return true
	}
}

// LatencyBuckets is the number of buckets of a latency histogram.
const LatencyBuckets = 25

// LatencyBound returns the upper bound of bucket i: 1 µs, 2 µs, 4 µs ... The
// last bucket has no bound and returns a negative duration.
func LatencyBound(i int) time.Duration {
	if i >= LatencyBuckets-1 {
		return -1
	}
	return time.Microsecond << i
}

// ClassStats counts the commands of one class since the logical unit was set.
type ClassStats struct {
	Good            uint64
	CheckConditions uint64
	Conflicts       uint64 // RESERVATION CONFLICT
	Busy            uint64 // BUSY and TASK SET FULL
	Aborted         uint64
	Bytes           uint64 // moved by commands that ended GOOD
	Nanoseconds     uint64 // sum of the times from Begin to the end
	Latency         [LatencyBuckets]uint64
	// Refused says why commands did not end GOOD, by reason, unit attentions aside.
	// A last element with Status 0 holds what had no room.
	Refused []Refusal
}

// Refusal is one reason for which commands did not end GOOD, and how often.
type Refusal struct {
	Status         byte
	Key, ASC, ASCQ byte // with CHECK CONDITION
	Count          uint64
}

// Commands is the number of commands that ended.
func (c *ClassStats) Commands() uint64 {
	return c.Good + c.CheckConditions + c.Conflicts + c.Busy + c.Aborted
}

// LUStats are the counters of one logical unit, summed over all nexuses.
type LUStats struct {
	LUN        uint16
	VolumeUUID [16]byte
	Name       string
	InFlight   int // commands under way now
	Nexuses    int // nexuses that see the unit now
	Classes    [Classes]ClassStats
}

// counters are what one I_T_L nexus adds to LUStats: mostly written by one
// connection, so that they cost no bouncing cache line. Those of a class are
// made at its first command.
type counters [Classes]atomic.Pointer[classCounters]

type classCounters struct {
	ended       [5]atomic.Uint64 // by outcome
	bytes       atomic.Uint64
	nanoseconds atomic.Uint64
	latency     [LatencyBuckets]atomic.Uint64
}

const (
	endedGood = iota
	endedCheck
	endedConflict
	endedBusy
	endedAborted
)

// maxReasons bounds the reasons of refusal that are counted apart in one class.
// There are few on a healthy unit, and the first ones tell.
const maxReasons = 8

// refusals count why the commands of one unit did not end GOOD. They belong to
// the unit and not to its nexuses, for they are rare. The zero value is ready.
type refusals [Classes]struct {
	reasons [maxReasons]struct {
		reason atomic.Uint32 // status, sense key, ASC, ASCQ; 0 is free
		count  atomic.Uint64
	}
	other atomic.Uint64
}

// add counts one refusal.
func (r *refusals) add(class OpClass, t *Task) {
	reason := uint32(t.Status) << 24
	if t.Status == cdb.CheckCondition {
		if t.Sense[2]&0x0f == cdb.UnitAttention {
			return
		}
		reason |= uint32(t.Sense[2]&0x0f)<<16 | uint32(t.Sense[12])<<8 | uint32(t.Sense[13])
	}
	c := &r[class]
	for i := range c.reasons {
		slot := &c.reasons[i]
		if slot.reason.Load() == 0 {
			slot.reason.CompareAndSwap(0, reason)
		}
		if slot.reason.Load() == reason {
			slot.count.Add(1)
			return
		}
	}
	c.other.Add(1)
}

// list returns the refusals of one class.
func (r *refusals) list(class OpClass) (all []Refusal) {
	c := &r[class]
	for i := range c.reasons {
		slot := &c.reasons[i]
		reason, n := slot.reason.Load(), slot.count.Load()
		if n == 0 {
			continue
		}
		all = append(all, Refusal{byte(reason >> 24), byte(reason >> 16), byte(reason >> 8), byte(reason), n})
	}
	if n := c.other.Load(); n != 0 {
		all = append(all, Refusal{Count: n})
	}
	return all
}

// account counts a task whose result is final.
func (i *itlNexus) account(s *Server, t *Task) {
	outcome := endedBusy
	switch {
	case t.Aborted.Load() || t.Status == cdb.TaskAborted:
		outcome = endedAborted
	case t.Status == cdb.Good:
		outcome = endedGood
	case t.Status == cdb.CheckCondition:
		outcome = endedCheck
	case t.Status == cdb.ReservationConflict:
		outcome = endedConflict
	}
	i.count(s, t, outcome)
}

func (i *itlNexus) count(s *Server, t *Task, outcome int) {
	all := i.counters.Load()
	if all == nil {
		i.counters.CompareAndSwap(nil, new(counters))
		all = i.counters.Load()
	}
	class := ClassOther
	if t.state.cmd != nil {
		class = t.state.cmd.class
	}
	c := all[class].Load()
	if c == nil {
		all[class].CompareAndSwap(nil, new(classCounters))
		c = all[class].Load()
	}
	switch outcome {
	case endedGood:
		c.bytes.Add(t.moved())
	case endedAborted:
	default:
		i.lu.refused.add(class, t)
	}
	took := max(s.now()-t.state.start, 0)
	c.ended[outcome].Add(1)
	c.nanoseconds.Add(uint64(took))
	c.latency[min(bits.Len64(uint64(took)/1000), LatencyBuckets-1)].Add(1)
}

// moved is what a command counts as bytes: what it read, wrote or zeroed on the
// medium, or the length of its reply.
func (t *Task) moved() uint64 {
	if t.state.cmd.class.onMedium() {
		return t.state.length
	}
	return uint64(min(t.Transfer, t.InLen))
}

// addTo adds the counters to a sum.
func (i *itlNexus) addTo(sum *[Classes]ClassStats) {
	all := i.counters.Load()
	if all == nil {
		return
	}
	for class := range all {
		from, to := all[class].Load(), &sum[class]
		if from == nil {
			continue
		}
		to.Good += from.ended[endedGood].Load()
		to.CheckConditions += from.ended[endedCheck].Load()
		to.Conflicts += from.ended[endedConflict].Load()
		to.Busy += from.ended[endedBusy].Load()
		to.Aborted += from.ended[endedAborted].Load()
		to.Bytes += from.bytes.Load()
		to.Nanoseconds += from.nanoseconds.Load()
		for b := range from.latency {
			to.Latency[b] += from.latency[b].Load()
		}
	}
}

// stats returns the counters of the unit.
func (lu *logicalUnit) stats() LUStats {
	c := lu.config.Load()
	sum := LUStats{LUN: lu.lun, VolumeUUID: c.VolumeUUID, Name: c.Name}
	lu.mu.Lock()
	defer lu.mu.Unlock()
	sum.Classes = lu.former
	for i := range lu.itls {
		i.addTo(&sum.Classes)
		i.mu.Lock()
		sum.InFlight += i.inFlight
		if !i.retired {
			sum.Nexuses++
		}
		i.mu.Unlock()
	}
	for class := range sum.Classes {
		sum.Classes[class].Refused = lu.refused.list(OpClass(class))
	}
	return sum
}

// Stats returns the counters of every logical unit, in order of LUN.
func (s *Server) Stats() []LUStats {
	units := s.sortedUnits()
	all := make([]LUStats, 0, len(units))
	for _, lu := range units {
		all = append(all, lu.stats())
	}
	return all
}
