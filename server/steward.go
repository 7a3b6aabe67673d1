package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server/cluster"
)

// The steward brings long changes to their end, whatever happened to the node that
// was asked for them: it runs on the node that leads the quorum, and looks at what
// is recorded. Each of its steps may be repeated without harm.
const (
	stewardEvery = time.Second
	// stewardMoves replicas are on their way at a time because of evacuations.
	stewardMoves = 4
	// balanceAfter is for how long nothing must have happened to nodes and replicas
	// before volumes move back, unless it is set; balancePace is the pause after each.
	balanceAfter = time.Minute
	balancePace  = 5 * time.Second
)

// stewardState is what the steward's goroutine remembers while its node leads.
type stewardState struct {
	said    string            // the last trouble: it is tried again every second
	emptied map[string]bool   // nodes that were reported empty
	picture map[string]string // of nodes and replicas
	since   time.Time         // for how long it has been like that
}

func (n *Node) stewardship(ctx context.Context, st *stewardState) {
	if !n.cluster.Leads() || n.serving.Load() == nil || n.retiring.Load() {
		*st = stewardState{}
		return
	}
	state, err := n.cluster.Sync(ctx) // who only believes to lead does nothing
	if err != nil || state.Cluster.FeatureLevel < 2 {
		return
	}
	trouble := errors.Join(n.finishMoves(ctx, state), n.evacuate(ctx, state, st), n.balance(ctx, state, st))
	said := ""
	if trouble != nil {
		said = trouble.Error()
	}
	if said != st.said && ctx.Err() == nil {
		if st.said = said; said != "" {
			n.log.Warn("a change does not go on yet", "why", said)
		}
	}
}

// finishMoves drops the replicas whose successors are in sync.
func (n *Node) finishMoves(ctx context.Context, state *cluster.State) (trouble error) {
	for _, o := range state.Operations {
		v := state.Volume(o.Volume)
		if !o.Running() || o.Kind != cluster.OperationMove || v == nil || !v.Record.Has(o.To) {
			continue
		}
		once, cancel := context.WithTimeout(ctx, moveMax)
		err := n.succeed(once, state, v, o)
		cancel()
		if err != nil {
			trouble = errors.Join(trouble, fmt.Errorf("operation %d: %w", o.ID, err))
		}
	}
	return trouble
}

// succeed lets a new replica take the place of the old one.
func (n *Node) succeed(ctx context.Context, state *cluster.State, v *cluster.Volume, o *cluster.Operation) error {
	if v.Record.Owner == o.From {
		to := state.Node(o.To)
		if to == nil || !to.Stays() {
			to = heir(state, v, o.From)
		}
		if to == nil {
			return fmt.Errorf("%w: no node that stays can own volume %s", ErrRefused, v.Name)
		}
		if err := n.move(ctx, state, v, to, false); err != nil {
			return err
		}
	}
	return n.dropReplica(ctx, v.ID, o.From)
}

// evacuate begins moves for the replicas on nodes that are evacuated.
func (n *Node) evacuate(ctx context.Context, state *cluster.State, st *stewardState) (trouble error) {
	var s *Status
	running := 0
	for _, o := range state.Operations {
		if o.Running() {
			running++
		}
	}
	for _, from := range state.Nodes {
		if from.Mode != cluster.ModeEvacuating {
			delete(st.emptied, from.Name)
			continue
		}
		left := 0
		for _, v := range state.Volumes {
			if v.Record.Deleted || !slices.ContainsFunc(v.Record.Replicas, func(r replication.Replica) bool { return r.Node == from.ID }) {
				continue
			}
			left++
			moving := slices.ContainsFunc(state.Operations, func(o *cluster.Operation) bool { return o.Running() && o.Volume == v.ID && o.From == from.ID })
			if moving || running >= stewardMoves {
				continue
			}
			if s == nil {
				var err error
				if s, err = n.Status(ctx); err != nil {
					return err
				}
			}
			to := refuge(state, s, v, from)
			if to == nil {
				trouble = errors.Join(trouble, fmt.Errorf("volume %s cannot leave node %s: no node that is up and stays has room for it and no copy of it", v.Name, from.Name))
				continue
			}
			if _, err := n.cluster.AddReplica(ctx, v.ID, to.ID, from.ID); err != nil && !errors.Is(err, replication.ErrConflict) {
				trouble = errors.Join(trouble, fmt.Errorf("volume %s: %w", v.Name, err))
				continue
			}
			running++
		}
		if left == 0 && !st.emptied[from.Name] {
			if st.emptied == nil {
				st.emptied = map[string]bool{}
			}
			st.emptied[from.Name] = true
			n.journal.report(levelInfo, "node-empty", fmt.Sprintf("node %s holds no replica any more", from.Name))
		}
	}
	return trouble
}

// refuge is the node that takes a replica from one that is evacuated: the named
// one, else the one with the fewest replicas; nil: none can.
func refuge(state *cluster.State, s *Status, v *cluster.Volume, from *cluster.Node) *cluster.Node {
	replicas := map[replication.NodeID]int{}
	for _, x := range state.Volumes {
		for _, r := range x.Record.Replicas {
			replicas[r.Node]++
		}
	}
	var all []*cluster.Node
	for _, to := range state.Nodes {
		m := memberNamed(s, to.Name)
		has := slices.ContainsFunc(v.Record.Replicas, func(r replication.Replica) bool { return r.Node == to.ID })
		wanted := from.EvacuateTo == 0 || from.EvacuateTo == to.ID
		if to.Role == cluster.RoleData && to.Stays() && !has && wanted && m != nil && m.State == NodeUp && mayTake(s, v.Name, to.Name) == nil {
			all = append(all, to)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return slices.MinFunc(all, func(a, b *cluster.Node) int {
		return cmp.Or(cmp.Compare(replicas[a.ID], replicas[b.ID]), cmp.Compare(a.ID, b.ID))
	})
}

// balance moves one volume to where it belongs, when nodes and replicas have been
// as they are for long enough.
func (n *Node) balance(ctx context.Context, state *cluster.State, st *stewardState) error {
	picture := map[string]string{}
	for _, x := range state.Nodes {
		picture["node "+x.Name] = fmt.Sprint(x.Incarnation, x.Stays())
	}
	for _, v := range state.Volumes {
		picture["volume "+v.Name] = fmt.Sprint(v.Record.InSync, v.Preferred)
	}
	after := balanceAfter
	if s := state.Settings.BalanceAfter; s != 0 {
		after = time.Duration(s) * time.Second
	}
	if !equalMaps(picture, st.picture) {
		st.picture, st.since = picture, time.Now()
	}
	if state.Settings.BalanceOff || time.Since(st.since) < after {
		return nil
	}
	id, to := nextBalance(state)
	if id == 0 {
		return nil
	}
	v := state.Volume(id)
	st.since = time.Now().Add(min(balancePace-after, 0))
	once, cancel := context.WithTimeout(ctx, moveMax)
	defer cancel()
	if err := n.move(once, state, v, state.Node(to), false); err != nil {
		st.since = time.Now()
		return fmt.Errorf("volume %s does not move to node %s: %w", v.Name, state.NodeName(to), err)
	}
	n.journal.report(levelInfo, "volume-balanced", fmt.Sprintf("volume %s is owned by node %s again", v.Name, state.NodeName(to)))
	return nil
}

func equalMaps(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || w != v {
			return false
		}
	}
	return true
}

// nextBalance picks a volume that another node ought to own: its preferred one, or
// for volumes without one the node that owns fewest, when the difference is two.
func nextBalance(state *cluster.State) (lsfs.VolumeID, replication.NodeID) {
	may := func(v *cluster.Volume, to replication.NodeID) bool {
		node := state.Node(to)
		return !v.Record.Deleted && v.Record.Owner != 0 && v.Record.Owner != to && v.Record.Has(to) && node != nil && node.Stays()
	}
	for _, v := range state.Volumes {
		if v.Preferred != 0 && may(v, v.Preferred) {
			return v.ID, v.Preferred
		}
	}
	owns := ownedBy(state)
	best, gain := lsfs.VolumeID(0), 1
	var where replication.NodeID
	for _, v := range state.Volumes {
		if v.Preferred != 0 {
			continue
		}
		for _, to := range v.Record.InSync {
			if d := owns[v.Record.Owner] - owns[to]; may(v, to) && d > gain {
				best, where, gain = v.ID, to, d
			}
		}
	}
	return best, where
}
