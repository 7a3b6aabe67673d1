package server

import (
	"fmt"
	"slices"
	"strings"
)

// Risk is what the next failure of a single node does, by what is known now.
type Risk struct {
	Survives bool   // whichever node fails, all I/O goes on
	Text     string // in a sentence
	// Stops has, for each node whose failure would stop I/O, what stops.
	Stops []Stop
}

// Stop is what the failure of one node stops.
type Stop struct {
	Node    string
	Volumes []string // that nobody could serve any more
	Quorum  bool     // no quorum is left: volumes that would have to move, or to go on without a copy, stop too
}

// riskOf looks at each node that is up as if it failed.
func riskOf(s *Status) Risk {
	r := Risk{Survives: true}
	if !s.Quorum {
		return Risk{Text: "there is no quorum: whatever fails next, its volumes stop"}
	}
	for _, n := range s.Nodes {
		if n.State == NodeDown || n.Mode == ModeMaintenance && n.State != NodeUp {
			continue
		}
		stop := Stop{Node: n.Name, Quorum: n.Voter && s.VotersUp-1 <= s.Voters/2}
		for i := range s.Volumes {
			v := &s.Volumes[i]
			if v.State != VolumeDeleting && v.State != VolumeOffline && stops(s, v, n.Name, stop.Quorum) {
				stop.Volumes = append(stop.Volumes, v.Name)
			}
		}
		if len(stop.Volumes) > 0 {
			r.Survives = false
			r.Stops = append(r.Stops, stop)
		}
	}
	data := 0
	for _, n := range s.Nodes {
		if n.Role == Data {
			data++
		}
	}
	switch {
	case data < 2:
		r.Survives, r.Text = false, "the failure of the only node stops all I/O"
	case r.Survives:
		r.Text = "survives the loss of any one node"
	default:
		var parts []string
		for _, x := range r.Stops {
			what := strings.Join(x.Volumes[:min(4, len(x.Volumes))], ", ")
			if len(x.Volumes) > 4 {
				what += fmt.Sprintf(" and %d more", len(x.Volumes)-4)
			}
			parts = append(parts, fmt.Sprintf("the failure of node %s stops I/O of %s", x.Node, what))
		}
		r.Text = strings.Join(parts, "; ")
	}
	return r
}

// stops says whether a volume stops when a node fails. What needs a change of the
// record (a take-over, or going on without a copy) needs a quorum for it; an owner
// that is in sync alone needs nobody (L4).
func stops(s *Status, v *Volume, node string, quorumLost bool) bool {
	inSync, others, member := 0, 0, false
	for _, r := range v.Replicas {
		if r.State != ReplicaInSync {
			continue
		}
		inSync++
		if r.Node == node {
			member = true
		} else if m := memberNamed(s, r.Node); m != nil && m.State == NodeUp {
			others++
		}
	}
	switch {
	case inSync == 0 || !member:
		return false // nothing changes for it
	case others == 0:
		return true
	}
	return quorumLost
}

// riskOfVolume says what the next failure does to one volume.
func riskOfVolume(s *Status, v *Volume) string {
	var nodes []string
	for _, x := range s.Risk.Stops {
		if slices.Contains(x.Volumes, v.Name) {
			nodes = append(nodes, x.Node)
		}
	}
	if len(nodes) == 0 {
		return "none: it survives the loss of any one node"
	}
	return "the failure of node " + strings.Join(nodes, " or ") + " stops its I/O"
}

// coming says whether a replica is new and on its way by an operation: nothing is
// less protected for that than before.
func coming(s *Status, v *Volume, node string) bool {
	good := 0
	for _, r := range v.Replicas {
		if r.State == ReplicaInSync {
			good++
		}
	}
	return good > 1 && slices.ContainsFunc(s.Operations, func(o Operation) bool { return o.State == OperationRunning && o.Volume == v.Name && o.To == node })
}
