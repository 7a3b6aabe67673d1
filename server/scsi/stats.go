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
	// Classes is the number of classes.
	Classes
)

// String returns the class as it appears in metrics.
func (c OpClass) String() string {
	return [...]string{"other", "read", "write", "unmap", "caw", "write_same", "?"}[min(c, Classes)]
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
// connection, so that they cost no bouncing cache line.
type counters [Classes]struct {
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
	c := &all[class]
	if outcome == endedGood {
		c.bytes.Add(t.moved())
	}
	took := max(s.now()-t.state.start, 0)
	c.ended[outcome].Add(1)
	c.nanoseconds.Add(uint64(took))
	c.latency[min(bits.Len64(uint64(took)/1000), LatencyBuckets-1)].Add(1)
}

// moved is what a command counts as bytes: what it read, wrote or zeroed on the
// medium, or the length of its reply.
func (t *Task) moved() uint64 {
	if t.state.cmd.class != ClassOther {
		return t.state.length
	}
	return uint64(min(t.Transfer, t.InLen))
}

// addTo adds the counters to a sum.
func (i *itlNexus) addTo(sum *LUStats) {
	all := i.counters.Load()
	if all == nil {
		return
	}
	for class := range all {
		from, to := &all[class], &sum.Classes[class]
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

// Stats returns the counters of every logical unit, in order of LUN.
func (s *Server) Stats() []LUStats {
	units := s.sortedUnits()
	all := make([]LUStats, 0, len(units))
	for _, lu := range units {
		c := lu.config.Load()
		lu.mu.Lock()
		sum := lu.former
		for i := range lu.itls {
			i.addTo(&sum)
			i.mu.Lock()
			sum.InFlight += i.inFlight
			if !i.retired {
				sum.Nexuses++
			}
			i.mu.Unlock()
		}
		lu.mu.Unlock()
		sum.LUN, sum.VolumeUUID, sum.Name = lu.lun, c.VolumeUUID, c.Name
		all = append(all, sum)
	}
	return all
}
