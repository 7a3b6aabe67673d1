package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/server/cluster"
)

// Scrub is how the scrub of a node's pool does: it reads all that is in use and
// repairs what is damaged.
type Scrub struct {
	Node      string
	Running   bool
	Stopped   bool // by an administrator: no pass begins by itself
	FullSpeed bool
	Phase     string  // what it reads; empty: no pass is under way
	Done      float64 // of the pass, 0 to 1
	Left      time.Duration
	NextPass  time.Time // zero: none by itself
	Reclaim   bool      // false: a reference count was too low, the pool gives nothing back
	Current   ScrubResult
	Last      ScrubResult // pass that finished last
	Lost      []string    // ranges of volumes without an intact copy, the first 64
}

// ScrubResult counts what a pass found.
type ScrubResult struct {
	Started, Finished       time.Time
	Blocks, Pages, Bytes    uint64
	Damaged, Repaired, Lost uint64
	Counters                uint64 // reference counts and live bytes that were corrected
}

// ScrubAction is what an administrator wants of a scrub.
type ScrubAction string

const (
	ScrubShow  ScrubAction = "show"
	ScrubStart ScrubAction = "start"
	ScrubStop  ScrubAction = "stop"
)

// scrubFile in the data directory says how far the scrub of the pool is, so that a
// restart does not begin anew.
const scrubFile = "scrub.json"

type scrubRecord struct {
	Version int             `json:"version"`
	State   lsfs.ScrubState `json:"state"`
}

// scrubSaveEvery is how often it is written while a pass runs: what is read twice
// after a crash is that much.
const scrubSaveEvery = time.Minute

// readScrub is where scrub goes on. A file that is missing or damaged means: from the beginning.
func readScrub(dataDir string) lsfs.ScrubState {
	text, err := os.ReadFile(filepath.Join(dataDir, scrubFile))
	if errors.Is(err, fs.ErrNotExist) {
		return lsfs.ScrubState{}
	}
	var r scrubRecord
	if err != nil || json.Unmarshal(text, &r) != nil || r.Version != 1 {
		return lsfs.ScrubState{}
	}
	return r.State
}

// saveScrub writes where scrub is, if that is news.
func (n *Node) saveScrub(last *lsfs.ScrubState) {
	state := n.store.Scrub().ScrubState
	if state == *last {
		return
	}
	text, err := json.MarshalIndent(scrubRecord{1, state}, "", "  ")
	if err == nil {
		err = renameio.WriteFile(filepath.Join(n.config.DataDir, scrubFile), append(text, '\n'), 0o600)
	}
	if err != nil {
		n.log.Warn("the place of the scrub was not written", "err", err)
		return
	}
	*last = state
}

// poolOf finds the node with a pool that is called name. peers is what to ask it with, nil
// when it is this one; with here no other is asked.
func (n *Node) poolOf(state *cluster.State, name string, here bool) (node *cluster.Node, peers Peers, err error) {
	node = state.NodeNamed(name)
	switch {
	case node == nil:
		return nil, nil, fmt.Errorf("node %q: %w", name, ErrNotFound)
	case node.Role != cluster.RoleData:
		return nil, nil, fmt.Errorf("%w: node %s is a witness and stores nothing", ErrInvalid, name)
	case node.ID == n.cluster.Self():
		return node, nil, nil
	}
	p := n.peers.Load()
	if here || p == nil || node.API == "" {
		return nil, nil, fmt.Errorf("node %s is not in reach: %w", name, ErrNotReady)
	}
	return node, *p, nil
}

// ScrubNode shows, starts or stops the scrub of a node's pool; it does not wait for it.
// A node that is not the one called name asks that, unless here.
func (n *Node) ScrubNode(ctx context.Context, name string, action ScrubAction, fullSpeed, here bool) (*Scrub, error) {
	state := n.known()
	node, peers, err := n.poolOf(state, name, here)
	switch {
	case err != nil:
		return nil, err
	case peers != nil:
		return peers.ScrubNode(ctx, node.ID, n.api(node), name, action, fullSpeed)
	}
	switch action {
	case ScrubStart:
		n.store.StartScrub(fullSpeed)
	case ScrubStop:
		n.store.StopScrub()
	case ScrubShow:
	default:
		return nil, fmt.Errorf("%w: %q is nothing that a scrub can do", ErrInvalid, action)
	}
	return n.scrub(state), nil
}

// scrub is how this node's scrub does.
func (n *Node) scrub(state *cluster.State) *Scrub {
	s := n.store.Scrub()
	out := &Scrub{
		Node: n.id.Name, Running: s.Running, Stopped: s.Stopped, FullSpeed: s.FullSpeed, Phase: string(s.Phase), Done: s.Done, Left: s.Left,
		NextPass: s.NextPass, Reclaim: s.Reclaim, Current: ScrubResult(s.Current), Last: ScrubResult(s.Last),
	}
	for _, p := range s.Lost {
		name := fmt.Sprintf("volume %d", p.Volume)
		if v := state.Volume(p.Volume); v != nil {
			name = v.Name
		}
		out.Lost = append(out.Lost, fmt.Sprintf("%s, blocks of 4 KiB %d to %d", name, p.Start, uint64(p.Start)+p.Blocks-1))
	}
	return out
}

// scrubProblems are those of one node.
func scrubProblems(m *Member) (out []Problem) {
	s := m.Scrub
	if s == nil {
		return nil
	}
	if !s.Reclaim {
		out = append(out, Problem{Degraded, "reclaim-stopped", fmt.Sprintf("node %s: a reference count was too low", m.Name),
			"the pool gives no space back until a scrub has found all counts right", fmt.Sprintf("twinsan scrub start %s --full-speed", m.Name)})
	}
	if n := max(s.Current.Lost, s.Last.Lost); n > 0 {
		text := fmt.Sprintf("node %s: %d damaged blocks have no intact copy in reach", m.Name, n)
		if len(s.Lost) > 0 {
			text += ": " + s.Lost[0]
		}
		out = append(out, Problem{Degraded, "blocks-lost", text, "reads of these blocks fail there", fmt.Sprintf("bring the other nodes up, then: twinsan scrub start %s --full-speed", m.Name)})
	}
	return out
}
