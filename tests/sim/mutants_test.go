package sim

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	whichFlag = flag.String("sim.mutants", "", "names of mutants, separated by commas; empty: all")
	triesFlag = flag.Int("sim.tries", 120, "fresh seeds for one mutant that its known killer does not kill")
	budget    = flag.Duration("sim.budget", 0, "real time after which no more fresh seeds are tried; 0: none")
)

// mutants are the rules that can be switched off one at a time (build tag mutants; the
// places are found by the name), with what is lost without it.
var mutants = []struct{ name, rule string }{
	{"W1-term", "an operation that read in an earlier reign writes in a later one"},
	{"W2", "a replica takes operations of an epoch below its promise"},
	{"W2-beacon", "a replica grants leases to an epoch below its promise"},
	{"W2-position", "a deposed owner takes the new owner's numbers for acknowledgements"},
	{"W2-durable", "a promise is kept in RAM only"},
	{"W3-ack", "a replica acknowledges what it has received, not what is on its disk"},
	{"W3-received", "the number that a replica expects counts as an acknowledgement"},
	{"W4", "a write is acknowledged without the replicas"},
	{"W4-local", "a write is acknowledged before it is on the owner's disk"},
	{"W4-union", "a replica that is about to be taken in does not count"},
	{"R1", "reads are answered without a lease"},
	{"R1-before", "the lease is looked at before the data is fetched"},
	{"R2", "reads do not wait for writes in flight"},
	{"L1-send-time", "a lease runs from the arrival of its grant"},
	{"L1-union", "an owner needs no lease of a replica that its undecided proposal takes in"},
	{"L1-owner", "leases are granted to whoever asks"},
	{"L2-restart", "a node that has just started may take over at once"},
	{"L3", "a beacon counts without an echo"},
	{"L4", "a lone survivor needs a lease"},
	{"L5", "any failed connection proves a death"},
	{"M1-ack-before-commit", "a write is acknowledged before the smaller set is recorded"},
	{"M1-evict", "a silent replica is never dropped"},
	{"M2-stop-granting", "a candidate goes on granting"},
	{"M2-stop-acking", "a candidate goes on acknowledging"},
	{"M2-wait", "a candidate does not wait for its grants to run out"},
	{"M3-retest", "the grants are not looked at again before activation"},
	{"M3-promise", "replicas do not promise the new epoch"},
	{"M3-level", "replicas are not made equal before the owner serves"},
	{"M3-target-tail", "levelling leaves the replica's own tail"},
	{"M3-longest", "the new owner's log wins although another is longer"},
	{"M3-epoch", "the owner serves before the EPOCH record is on all copies"},
	{"M4-joining", "operations are acknowledged without a replica that is about to be proposed"},
	{"M4-level", "a replica is proposed before it has everything"},
	{"M4-stream", "a replica is proposed although its stream broke"},
	{"M4-stale-rid", "the record takes in another replica or process than was filled"},
	{"M5", "a restarted owner serves in its old epoch"},
	{"M6-given", "every take-over counts as a planned move: no lease is waited for"},
	{"M6-stop", "an owner serves while it gives the volume away"},
	{"M6-quiet", "a volume is given away with operations in flight"},
	{"M7", "a proposal without an answer counts as refused"},
	{"Q-epoch", "the record changes whatever epoch is expected"},
	{"Q-given", "anybody can give a volume away"},
	{"B1", "a node grants leases before it has read the record"},
	{"B2", "a node outside of the in-sync set may own"},
	{"I8-stale", "a node outside of the in-sync set grants and proposes"},
	{"I8-fit", "a replica that is mixed grants and proposes"},
	{"B4", "a replica that lost its memory stays in sync"},
	{"B4-copy", "a lost copy is made anew and counts"},
	{"Z1", "sessions outlive the loss of ownership"},
	{"Z1-outlived", "a command of a dropped session is executed by the next owner"},
	{"Z1-pause", "a pause goes unnoticed"},
	{"Z1-link", "what lies in the buffer of a failed link is executed"},
	{"Z2", "a forwarded command of another epoch is executed"},
	{"Z3", "a forwarded command is executed however old it is"},
	{"C1-lock", "COMPARE AND WRITE without the range lock"},
	{"C1-lease", "COMPARE AND WRITE compares without a lease"},
	{"C1-busy", "a COMPARE AND WRITE whose answer was lost is called BUSY"},
	{"C2-hold", "a change of the ordered state holds no blocks"},
	{"C2-from", "a change of the ordered state is made from any value"},
	{"C2-recheck", "requests are not held against a newer ordered state"},
	{"C2-announce", "a replica acknowledges a change of state before its device server knows"},
	{"C4-overlap", "a clone onto its own source whose answer was lost is called BUSY"},
	{"C4-followers", "clones are sent to replicas that may lack the source"},
	{"C4-replica", "a replica clones from a source that it may not have"},
	{"C4-hold", "a clone does not hold its source"},
	{"Y1-target-tail", "a resync leaves what only the replica has changed"},
	{"Y2", "a replica that is being filled does not note that it is mixed"},
	{"Y3", "a resync copies nothing"},
	{"Y3-stored", "a resync does not wait for what is being stored"},
	{"Y4", "a resync copies chunks without a lock"},
}

// provoked are the kinds of faults that a rule is there for: seeds with these alone find
// its absence sooner.
var provoked = map[string]string{
	"W1": "pause,isolate,cut-data,stall,answers", "W2": "pause,isolate,cut-data,cut-everything,stall,power,answers", "W3": "slow-disk,kill,power,stall",
	"W4": "kill,power,answers,stall,slow-disk,pause", "R": "pause,isolate,cut-data,slow-disk,stall,cut-one-way", "L": "pause,isolate,cut-one-way,kill,stall,cut-everything",
	"M1": "kill,cut-data,cut-control,isolate,answers,pause", "M2": "pause,isolate,cut-one-way,stall,cut-data,answers", "M3": "kill,power,pause,isolate,kill-all,stall,amnesia",
	"M4": "kill,power,slow-disk,stall,answers,pause,wipe", "M5": "kill,power,kill-all,answers,stall", "M6": "move,answers,pause,stall,kill", "M7": "answers,pause,isolate,kill,cut-control",
	"Q": "answers,pause,kill,isolate,cut-control,move", "B": "kill,power,kill-all,wipe,amnesia,isolate", "I8": "kill,power,isolate,wipe,cut-control,stall",
	"Z": "pause,isolate,stall,cut-one-way,cut-data,move,cut-host", "C": "kill,pause,isolate,stall,slow-disk,move", "Y": "kill,power,pause,isolate,slow-disk",
}

// TestMutants runs the simulator against each mutant until it fails or the time for it
// is over. A mutant that survives needs a reason in docs/testing.md.
func TestMutants(t *testing.T) {
	if *jobsFlag == 0 {
		t.Skip("started by make mutants")
	}
	type verdict struct {
		killed bool
		seed   uint64
		only   string
		seeds  int
		took   time.Duration
		what   string
	}
	var names []string
	for _, m := range mutants {
		if *whichFlag == "" || slices.Contains(strings.Split(*whichFlag, ","), m.name) {
			names = append(names, m.name)
		}
	}
	first := *seedFlag
	if first == 0 {
		first = 1
	}
	killers := readKillers(t)
	started := time.Now()
	work := make(chan string)
	go func() {
		defer close(work)
		for _, n := range names {
			work <- n
		}
	}()
	var mu sync.Mutex
	var jobs sync.WaitGroup
	killed := 0
	known := map[string]bool{}
	// sound says that a seed fails only with the mutant.
	sound := func(seed uint64, only string) bool {
		key := fmt.Sprint(seed, " ", only)
		mu.Lock()
		ok, seen := known[key]
		mu.Unlock()
		if !seen {
			child(batch{seed, 1, *lengthFlag}, "", only, func(r Result) { ok = r.Err == "" })
			mu.Lock()
			known[key] = ok
			mu.Unlock()
			if !ok {
				fmt.Printf("seed %d fails without a mutant\n", seed)
			}
		}
		return ok
	}
	for range *jobsFlag {
		jobs.Go(func() {
			for name := range work {
				var v verdict
				began := time.Now()
				try := func(b batch, only string) {
					child(b, name, only, func(r Result) {
						v.seeds++
						if r.Err != "" && !v.killed && sound(r.Seed, only) {
							v.killed, v.seed, v.only, v.what = true, r.Seed, only, r.Err
						}
					})
				}
				for _, c := range scenarios {
					if !v.killed && slices.Contains(c.rules, name) {
						childScenario(c.name, name, func(r Result) {
							v.killed, v.only, v.what = r.Err != "", "scenario:"+c.name, r.Err
						})
					}
				}
				if k, ok := killers[name]; ok && !v.killed && !strings.HasPrefix(k.only, "scenario:") {
					try(batch{k.seed, 1, *lengthFlag}, k.only)
				}
				for at := first; !v.killed && v.seeds < *triesFlag && (*budget == 0 || time.Since(started) < *budget); at += 20 {
					group := strings.TrimRight(name[:min(2, len(name))], "-")
					only := provoked[group]
					if only == "" {
						only = provoked[group[:1]]
					}
					if at/20%2 == 0 { // every other batch with what the seeds choose
						only = ""
					}
					try(batch{at, 20, *lengthFlag}, only)
				}
				v.took = time.Since(began)
				mu.Lock()
				how := "SURVIVED"
				if v.killed {
					how = "killed  "
					killed++
					killers[name] = killer{v.seed, v.only}
				} else if argued[name] == "" {
					t.Errorf("%s survives: %s", name, ruleOf(name))
				}
				what, _, _ := strings.Cut(v.what, "\n")
				fmt.Printf("%s %-22s %4d seeds %6.1f s  seed %-6d %s\n", how, name, v.seeds, v.took.Seconds(), v.seed, what[:min(len(what), 110)])
				mu.Unlock()
			}
		})
	}
	jobs.Wait()
	fmt.Printf("%d of %d mutants killed in %v\n", killed, len(names), time.Since(started).Round(time.Second))
	if *rewriteFlag {
		writeKillers(t, killers)
	}
}

func ruleOf(name string) string {
	for _, m := range mutants {
		if m.name == name {
			return m.rule
		}
	}
	return ""
}

// killer is a seed that killed a mutant once, with the faults that it was given ("": what
// the seed chooses). It is tried first: as long as the code around a rule stays what it
// is, a run of a seed is the same.
type killer struct {
	seed uint64
	only string
}

var killersFile = filepath.Join("testdata", "mutants.txt")

func readKillers(t *testing.T) map[string]killer {
	list := map[string]killer{}
	b, err := os.ReadFile(killersFile)
	if err != nil && !*rewriteFlag {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] != "#" {
			seed, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatalf("%s: %q", killersFile, line)
			}
			list[f[0]] = killer{seed, strings.TrimPrefix(f[2], "-")}
		}
	}
	return list
}

func writeKillers(t *testing.T, list map[string]killer) {
	var b strings.Builder
	b.WriteString("# Seeds that kill: mutant, seed, faults (-: what the seed chooses).\n# Written by: tests/sim.sh mutants -sim.hard -sim.length 25s -sim.rewrite\n")
	for _, m := range mutants {
		if k, ok := list[m.name]; ok {
			if k.only == "" {
				k.only = "-"
			}
			fmt.Fprintf(&b, "%s %d %s\n", m.name, k.seed, k.only)
		}
	}
	if err := os.WriteFile(killersFile, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// argued are the mutants that need not be killed, each with the reason.
var argued = map[string]string{
	"R1-before":      "what is read then was the newest when the lease was looked at, which is after the read began: the owner's copy has no commits but its own (R2, W3)",
	"W1-term":        "whoever holds blocks at the end of a reign has lost its session (Z1-outlived), and a planned move waits until nobody holds any (M6-quiet)",
	"W2-beacon":      "the new owner is itself a member of the old set, and never grants to the old owner (M2): its lease lacks that grant",
	"L1-owner":       "as W2-beacon: who asks without being the owner lacks the grant of the owner",
	"W2-durable":     "the old owner needs the new one's acknowledgement as well (W4), which promised by its EPOCH record, and no other replica's position counts before that record is on its disk (M3)",
	"L1-send-time":   "a grant that was under way for more than a second never arrives (Z1-link), and a candidate waits for the lease, the margin and another second (Grace, HeadStart)",
	"M3-promise":     "the EPOCH record is a promise as well, and nobody serves before it is on all disks (M3-epoch)",
	"M3-level":       "the EPOCH record cannot follow a gap (W3): the shorter replica is struck before anybody serves",
	"M3-target-tail": "a replica in sync whose log is longer owns itself (M3-longest), so none has a tail",
	"Q-given":        "no node but the owner proposes that; the register looks a second time",
	"B2":             "no node outside of the set proposes itself (I8-stale); the register looks a second time",
	"M2-stop-acking": "what a candidate acknowledges is in its log, and M3 keeps everything that is in the new owner's log",
	"M2-wait":        "the silence after which a node becomes a candidate is longer than its grants run (Grace and HeadStart after the last beacon)",
	"M3-retest":      "as M2-wait: it is the second look, for a record that names a node which did not ask for it",
	"M6-given":       "as M2-wait: nobody proposes a take-over before its own grants have run out",
	"L2-restart":     "a node that has just started waits for the owner for longer than its earlier grants can run (B2)",
}
