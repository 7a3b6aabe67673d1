package server

import (
	"cmp"
	"slices"

	"github.com/twinsan/twinsan/server/scsi"
)

// ClassCount counts the commands of one class that a logical unit has ended,
// since the node started.
type ClassCount struct {
	Class       string // as in metrics: "read", "write", "caw", ...
	Commands    uint64
	Good        uint64
	Bytes       uint64 // moved by commands that ended GOOD
	Nanoseconds uint64 // sum of the times from receipt to end
	Refused     []Refusal
}

// Refusal counts commands that ended in one way that is not GOOD. Key, ASC and
// ASCQ are 0 unless Status is CHECK CONDITION. Status 0 stands for several other
// ways, when there were too many to count each.
type Refusal struct {
	Status, Key, ASC, ASCQ byte
	Count                  uint64
}

// offloads are the classes whose use tells how well a host and this target work
// together, in the words of the hosts' manuals.
var offloads = []struct {
	name    string
	classes []string
}{
	{"ATS", []string{"caw"}},
	{"WRITE SAME", []string{"write_same"}},
	{"UNMAP", []string{"unmap"}},
	{"XCOPY", []string{"xcopy"}},
	{"ODX", []string{"odx_populate", "odx_write"}},
}

// Offload says whether hosts use one offload of a volume: Used once some command
// of it ended GOOD, Refused how many did not, unit attentions aside.
type Offload struct {
	Name    string
	Used    bool
	Refused uint64
}

// Offloads reads from counters which offloads hosts use.
func Offloads(counts []ClassCount) []Offload {
	out := make([]Offload, 0, len(offloads))
	for _, o := range offloads {
		x := Offload{Name: o.name}
		for _, c := range counts {
			if slices.Contains(o.classes, c.Class) {
				x.Used = x.Used || c.Good > 0
				for _, r := range c.Refused {
					if r.Status != statusCheck || r.Key != keyAttention {
						x.Refused += r.Count
					}
				}
			}
		}
		out = append(out, x)
	}
	return out
}

// classCounts are the counters of a logical unit, without classes that no host used.
func classCounts(u *scsi.LUStats) []ClassCount {
	var out []ClassCount
	for i := range u.Classes {
		c := &u.Classes[i]
		if n := c.Commands(); n > 0 {
			out = append(out, ClassCount{
				Class: scsi.OpClass(i).String(), Commands: n, Good: c.Good, Bytes: c.Bytes, Nanoseconds: c.Nanoseconds, Refused: refusals(c),
			})
		}
	}
	return out
}

// refusals are the ends of commands of one class that were not GOOD.
func refusals(c *scsi.ClassStats) []Refusal {
	var out []Refusal
	told := uint64(0)
	for _, r := range c.Refused {
		out = append(out, Refusal(r))
		told += r.Count
	}
	// Unit attentions are counted as commands, and have no reason of their own.
	if all := c.Commands() - c.Good; all > told {
		out = append(out, Refusal{Status: statusCheck, Key: keyAttention, Count: all - told})
	}
	return out
}

// addCounts adds the counters of one node to those of others.
func addCounts(sum, more []ClassCount) []ClassCount {
	for _, c := range more {
		i := slices.IndexFunc(sum, func(s ClassCount) bool { return s.Class == c.Class })
		if i < 0 {
			sum, i = append(sum, ClassCount{Class: c.Class}), len(sum)
		}
		to := &sum[i]
		to.Commands += c.Commands
		to.Good += c.Good
		to.Bytes += c.Bytes
		to.Nanoseconds += c.Nanoseconds
		for _, r := range c.Refused {
			same := func(x Refusal) bool {
				return x.Status == r.Status && x.Key == r.Key && x.ASC == r.ASC && x.ASCQ == r.ASCQ
			}
			if j := slices.IndexFunc(to.Refused, same); j >= 0 {
				to.Refused[j].Count += r.Count
			} else {
				to.Refused = append(to.Refused, r)
			}
		}
		slices.SortFunc(to.Refused, func(a, b Refusal) int {
			return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Status, b.Status), cmp.Compare(a.Key, b.Key), cmp.Compare(a.ASC, b.ASC), cmp.Compare(a.ASCQ, b.ASCQ))
		})
	}
	return sum
}

// byReason sums refusals by the label that metrics give them: what has no label
// of its own is "other", so that their number is bounded.
func byReason(refused []Refusal) []labelled {
	var out []labelled
	for _, r := range refused {
		label, _ := r.Reason()
		if i := slices.IndexFunc(out, func(x labelled) bool { return x.label == label }); i >= 0 {
			out[i].count += r.Count
		} else {
			out = append(out, labelled{label, r.Count})
		}
	}
	return out
}

type labelled struct {
	label string
	count uint64
}
