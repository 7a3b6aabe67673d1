package sim

import (
	"cmp"
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
	triesFlag = flag.Int("sim.tries", 40, "fresh seeds for one mutant that its known killer does not kill")
	tableFlag = flag.Bool("sim.table", false, "nothing but what the table names is tried")
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
	{"W6-flush", "a flush is answered without a mark in the stream"},
	{"W6-fua", "a write with FUA is relaxed"},
	{"W6-single", "an owner that is alone relaxes writes"},
	{"W6-lone", "what was written in two RAMs is acknowledged in one"},
	{"W6-placed", "a store that has stopped is not noticed when a copy is made"},
	{"W6-stopped", "a read that finds its node's store stopped is a medium error"},
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
	{"M1-stall", "a replica that answers and makes no progress is never dropped"},
	{"M1-evict", "a silent replica is never dropped"},
	{"M2-stop-granting", "a candidate goes on granting"},
	{"M2-stop-acking", "a candidate goes on acknowledging"},
	{"M2-wait", "a candidate does not wait for its grants to run out"},
	{"M3-retest", "the grants are not looked at again before activation"},
	{"M3-promise", "replicas do not promise the new epoch"},
	{"M3-stored", "a new owner does not wait for what its store still has to do of the old one's stream"},
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
	{"M8-life", "a copy of an earlier life of a replica is kept"},
	{"M8-free", "a copy that was taken off is not freed"},
	{"Q-epoch", "the record changes whatever epoch is expected"},
	{"Q-given", "anybody can give a volume away"},
	{"B1", "a node that starts believes what its last process knew of the record"},
	{"B2", "a node outside of the in-sync set may own"},
	{"I8-stale", "a node outside of the in-sync set grants and proposes"},
	{"I8-fit", "a replica that is mixed grants and proposes"},
	{"B4", "a replica that lost its memory stays in sync"},
	{"B4-copy", "a lost copy is made anew and counts"},
	{"Z1", "sessions outlive the loss of ownership"},
	{"Z1-outlived", "a command of a dropped session is executed by the next owner"},
	{"Z1-pause", "a pause goes unnoticed"},
	{"Z1-settle", "a session is dropped while what it forwarded is on its way"},
	{"Z1-late", "what a link delivers after a long silence is executed"},
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
	{"C4-hold", "a clone does not hold its source in another volume"},
	{"C8-origin", "a copy of a volume that begins as a snapshot begins empty"},
	{"C8-lacking", "an owner that lacks the snapshot begins empty"},
	{"Y1-target-tail", "a resync leaves what only the replica has changed"},
	{"Y2", "a replica that is being filled does not note that it is mixed"},
	{"Y3", "a resync copies nothing"},
	{"Y3-stored", "a resync does not wait for what is being stored"},
	{"Y4", "a resync copies chunks without a lock"},
	{"Y5", "the digests of what a resync copied are not compared"},
	{"Y8", "a resync ends although a block could not be copied"},
	{"Y9-last", "each record of a chunk brings the owner's version, not only the last one"},
	{"S-hollow", "a replica that is being filled takes the snapshots of the stream"},
	{"S-forge", "a resync brings no snapshots"},
	{"S-strangers", "a replica keeps snapshots of another history"},
	{"S-reconcile", "snapshots that no record names stay"},
	{"C6-freeze", "the volumes of a group are not held"},
	{"C7-hold", "a rollback does not wait for what is under way"},
	{"S-later", "a snapshot is forged from a copy that has moved on, and the difference is not brought"},
}

// provoked are the kinds of faults that a rule is there for: seeds with these alone find
// its absence sooner.
var provoked = map[string]string{
	"W1": "pause,isolate,cut-data,stall,answers", "W2": "pause,isolate,cut-data,cut-everything,stall,power,answers", "W3": "slow-disk,kill,power,stall",
	"W4": "kill,power,answers,stall,slow-disk,pause", "R": "pause,isolate,cut-data,slow-disk,stall,cut-one-way", "L": "pause,isolate,cut-one-way,kill,stall,cut-everything",
	"M1": "kill,cut-data,cut-control,isolate,answers,pause", "M2": "pause,isolate,cut-one-way,stall,cut-data,answers", "M3": "kill,power,pause,isolate,kill-all,stall,amnesia",
	"M4": "kill,power,slow-disk,stall,answers,pause,wipe", "M5": "kill,power,kill-all,answers,stall", "M6": "move,answers,pause,stall,kill", "M7": "answers,pause,isolate,kill,cut-control",
	"Q": "answers,pause,kill,isolate,cut-control,move", "B": "kill,power,kill-all,wipe,amnesia,isolate", "I8": "kill,power,isolate,wipe,cut-control,stall",
	"Z": "pause,isolate,stall,cut-one-way,cut-data,move,cut-host", "C": "kill,pause,isolate,stall,slow-disk,move", "Y": "kill,power,pause,isolate,slow-disk", "S": "kill,power,pause,isolate,slow-disk",
}

// TestMutants holds the table testdata/mutants.txt against the truth: each mutant dies by
// what the table says, or is argued, and then what the argument names is shown. A mutant
// whose killer does not kill it any more is run against all scenarios and some seeds.
func TestMutants(t *testing.T) {
	if *jobsFlag == 0 {
		t.Skip("started by make mutants")
	}
	h := &hunt{t: t, known: map[string]bool{}, table: readTable(t), started: time.Now()}
	all := *whichFlag == ""
	work := make(chan string)
	go func() {
		defer close(work)
		for _, m := range mutants {
			if all || slices.Contains(strings.Split(*whichFlag, ","), m.name) {
				work <- m.name
			}
		}
	}()
	var jobs sync.WaitGroup
	for range *jobsFlag {
		jobs.Go(func() {
			for name := range work {
				h.run(name)
			}
		})
	}
	jobs.Wait()
	fmt.Printf("%d mutants: %d killed, %d argued, %d survive; %v\n", h.killed+h.argued+h.survive, h.killed, h.argued, h.survive, time.Since(h.started).Round(time.Second))
	if total := h.killed + h.survive; all && h.killed*100 < total*95 {
		t.Errorf("%d of %d mutants that are not argued are killed: that is below 95 %%", h.killed, total)
	}
	if *rewriteFlag {
		h.write()
	}
}

// hunt is one run of TestMutants.
type hunt struct {
	t       *testing.T
	started time.Time

	mu                      sync.Mutex
	known                   map[string]bool   // by scenario or seed: it passes without a mutant
	table                   map[string]killer // as read, and corrected
	killed, argued, survive int
}

// killer is what kills a mutant: a scenario, or a seed with the faults that it was given
// ("": what the seed chooses). As long as the code around a rule stays what it is, a run
// of either is the same.
type killer struct {
	scenario string
	seed     uint64
	only     string
}

func (k killer) String() string {
	if k.scenario != "" {
		return "scenario " + k.scenario
	}
	return fmt.Sprintf("seed %d %s", k.seed, cmp.Or(k.only, "-"))
}

// fails runs a killer with rules switched off and says what came out.
func (k killer) fails(rules string) (what string) {
	took := func(r Result) { what = r.Err }
	if k.scenario != "" {
		childScenario(k.scenario, rules, took)
	} else {
		child(batch{k.seed, 1, *lengthFlag, false}, rules, k.only, took)
	}
	what, _, _ = strings.Cut(what, "\n")
	if rules != "" && (strings.Contains(what, wrongScenario) || strings.HasPrefix(what, "the process ended")) {
		return "" // it would be no proof
	}
	return what
}

// sound says that a killer passes when no rule is switched off.
func (h *hunt) sound(k killer) bool {
	h.mu.Lock()
	ok, seen := h.known[k.String()]
	h.mu.Unlock()
	if !seen {
		what := k.fails("")
		ok = what == ""
		h.mu.Lock()
		h.known[k.String()] = ok
		h.mu.Unlock()
		if !ok {
			h.t.Errorf("%s fails without a mutant: %s", k, what)
		}
	}
	return ok
}

// kills says what violation a killer finds in a mutant, "" for none.
func (h *hunt) kills(k killer, name string) string {
	if what := k.fails(name); what != "" && h.sound(k) {
		return what
	}
	return ""
}

func (h *hunt) run(name string) {
	began := time.Now()
	found, what := killer{}, ""
	try := func(k killer) bool {
		if what == "" {
			if what = h.kills(k, name); what != "" {
				found = k
			}
		}
		return what != ""
	}
	h.mu.Lock()
	k, ok := h.table[name]
	h.mu.Unlock()
	why, isArgued := argued[name]
	if !(ok && try(k)) && !*tableFlag && (!isArgued || *whichFlag != "") {
		for _, c := range scenarios {
			try(killer{scenario: c.name})
		}
		h.seeds(name, try)
	}
	verdict := "killed  "
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case what != "":
		h.killed++
		h.table[name] = found
		if isArgued {
			h.t.Errorf("%s is argued, and killed by %s", name, found)
		}
		what = found.String() + ": " + what
	case isArgued:
		verdict, what = "argued  ", why.why
		h.argued++
		delete(h.table, name)
		if why.with != "" {
			k := killer{scenario: why.scenario}
			h.mu.Unlock()
			alone, other, both := k.fails(name), k.fails(why.with), k.fails(name+"+"+why.with)
			h.mu.Lock()
			what = fmt.Sprintf("%s: together: %s", why.with, both)
			if alone != "" || other != "" || both == "" {
				h.t.Errorf("%s is argued by %s, and %q does not show it: alone %q, the other %q, both %q", name, why.with, why.scenario, alone, other, both)
			}
		}
	default:
		verdict = "SURVIVED"
		h.survive++
		h.t.Errorf("%s survives: %s", name, ruleOf(name))
	}
	fmt.Printf("%s %-17s %5.1f s  %s\n", verdict, name, time.Since(began).Seconds(), what[:min(len(what), 190)])
}

// seeds tries fresh seeds, in turns with the faults that the rule is there for and with
// what they choose.
func (h *hunt) seeds(name string, try func(killer) bool) {
	group := strings.TrimRight(name[:min(2, len(name))], "-")
	faults := cmp.Or(provoked[group], provoked[group[:1]])
	first := cmp.Or(*seedFlag, 1)
	for i := range *triesFlag {
		only := ""
		if i/20%2 == 0 {
			only = faults
		}
		if *budget != 0 && time.Since(h.started) > *budget || try(killer{seed: first + uint64(i), only: only}) {
			return
		}
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

var tableFile = filepath.Join("testdata", "mutants.txt")

// readTable reads the killers. A mutant that is argued stands in the file as well, for the
// reader.
func readTable(t *testing.T) map[string]killer {
	list := map[string]killer{}
	b, err := os.ReadFile(tableFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || f[0] == "#" || f[1] == "argued":
		case f[1] == "scenario":
			list[f[0]] = killer{scenario: strings.Join(f[2:], " ")}
		case f[1] == "seed" && len(f) == 4:
			seed, err := strconv.ParseUint(f[2], 10, 64)
			if err != nil {
				t.Fatalf("%s: %q", tableFile, line)
			}
			list[f[0]] = killer{seed: seed, only: strings.TrimPrefix(f[3], "-")}
		default:
			t.Fatalf("%s: %q", tableFile, line)
		}
	}
	return list
}

func (h *hunt) write() {
	var b strings.Builder
	b.WriteString("# What kills each mutant: a scenario, or a seed with faults (-: what the seed chooses).\n# Held against the truth by: make mutants. Written by: make mutants REWRITE=1\n")
	for _, m := range mutants {
		if k, ok := h.table[m.name]; ok {
			fmt.Fprintf(&b, "%-17s %s\n", m.name, k)
		} else if why, ok := argued[m.name]; ok {
			fmt.Fprintf(&b, "%-17s argued %s\n", m.name, cmp.Or(why.with, "-"))
		}
	}
	if err := os.WriteFile(tableFile, []byte(b.String()), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// argument says why a mutant need not be killed. Where another rule covers it that can be
// switched off as well, a scenario shows that: it passes without the one, and without the
// other, and fails without both.
type argument struct {
	why            string
	with, scenario string
}

// argued are the mutants that need not be killed.
var argued = map[string]argument{
	"W2-beacon":      {why: "a deposed owner is not the recorded one, so it gets no grant (L1-owner). Besides, a reign's lease needs the grants of all members of its set, and who takes over is one of them", with: "L1-owner", scenario: "the beacons of a deposed owner"},
	"L1-owner":       {why: "whoever asks without being the owner asks for an epoch below the promise (W2-beacon)", with: "W2-beacon", scenario: "the beacons of a deposed owner"},
	"M2-stop-acking": {why: "what a candidate acknowledges is in its log, and the activation waits for what its store still has to do before it looks where the log ends (M3-stored), and once more when it writes its promise down (W2-durable)", with: "M3-stored+W2-durable", scenario: "a candidate that hears the owner"},
	"M3-stored":      {why: "a candidate has taken nothing for seconds (M2-stop-acking), and the promise is written behind what the store still has to do (W2-durable)", with: "M2-stop-acking+W2-durable", scenario: "a candidate that hears the owner"},
	"M4-stream":      {why: "a link that breaks, and a replica that takes nothing, end the resync as well (linkDown and mirrorsStuck cancel it); the second look closes a window in which no time passes"},
	"Z1-link":        {why: "who forwarded a command ends it when it has greeted anew, which waits until the old link is drained, when the volume has moved, or after five seconds; all of these come later than what was read from a link before it failed, or that is refused as too old (Z3). Operations of a stream are numbered and belong to an epoch (W2, W3)"},
	"B1":             {why: "a node that believes an older record has to change it before it serves, and that fails (M5)", with: "M5", scenario: "a node believes what it knew before it was killed"},
	"I8-stale":       {why: "the register refuses an owner who is not in the set (B2)", with: "B2", scenario: "the stale node alone"},
	"B2":             {why: "no node outside of the set proposes itself (I8-stale); the register looks a second time", with: "I8-stale", scenario: "the stale node alone"},
	"M3-target-tail": {why: "a replica in sync whose log is longer owns the volume itself (M3-longest), so none that is made equal has a tail", with: "M3-longest", scenario: "a replica that is ahead at a take-over"},
	"C4-replica":     {why: "the owner does not clone to a replica that may lack the source (C4-followers)", with: "C4-followers", scenario: "a clone from a volume that is filled"},
}
