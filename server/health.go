package server

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/twinsan/twinsan/replication"
)

// reply is what asking one node gave.
type reply struct {
	report *Report
	err    error
	detour bool // it did not answer at the address of its API
}

// merge completes a status made from the recorded state by what the nodes
// reported, and judges it. It is pure: nodes, volumes and replicas in,
// judgement out. record tells which nodes are recorded in sync for a volume.
func merge(s *Status, replies map[replication.NodeID]reply) {
	byName := map[string]*Member{}
	for i := range s.Nodes {
		n := &s.Nodes[i]
		byName[n.Name] = n
		r := replies[n.ID]
		n.Detour = n.Detour || r.detour
		switch {
		case r.report == nil:
			n.State = NodeDown
			if r.err != nil {
				n.Error = r.err.Error()
			}
			continue
		case !r.report.Ready:
			n.State = NodeStarting
		default:
			n.State = NodeUp
		}
		n.Version, n.Started, n.Pool, n.Scrub = r.report.Version, r.report.Started, r.report.Pool, r.report.Scrub
		n.Sessions = len(r.report.Sessions)
		for _, v := range r.report.Volumes {
			n.Traffic.add(v.Traffic)
		}
	}
	s.VotersUp = 0
	for _, n := range s.Nodes {
		if n.Voter && n.State != NodeDown {
			s.VotersUp++
		}
	}
	for i := range s.Volumes {
		mergeVolume(&s.Volumes[i], s.Nodes, byName, replies)
	}
	mergeOperations(s)
	s.Risk = riskOf(s)
	var devices []Device
	for _, n := range s.Nodes {
		if r := replies[n.ID].report; r != nil {
			devices = append(devices, r.Devices...)
		}
	}
	s.Problems = append(problems(s), deviceProblems(devices)...)
	slices.SortStableFunc(s.Problems, func(a, b Problem) int { return rank(b.Severity) - rank(a.Severity) })
	s.Health = Healthy
	for _, p := range s.Problems {
		if rank(p.Severity) > rank(s.Health) {
			s.Health = p.Severity
		}
	}
}

// mergeVolume takes a volume whose replicas carry the recorded in-sync set
// (ReplicaInSync or ReplicaStale) and adds what is really so.
func mergeVolume(v *Volume, nodes []Member, byName map[string]*Member, replies map[replication.NodeID]reply) {
	var owner *VolumeReport
	v.ServedBy = nil
	for _, n := range nodes {
		r := replies[n.ID].report
		if r == nil {
			continue
		}
		for j := range r.Volumes {
			local := &r.Volumes[j]
			if local.ID != v.ID {
				continue
			}
			v.Traffic.add(local.Traffic)
			v.Counts = addCounts(v.Counts, local.Counts)
			if v.Reservations == nil {
				v.Reservations = local.Reservations
			}
			if local.Served && n.State == NodeUp {
				v.ServedBy = append(v.ServedBy, n.Name)
			}
			if local.Owner && n.Name == v.Owner {
				owner = local
			}
			v.Mapped = max(v.Mapped, local.Mapped)
		}
	}
	if owner != nil {
		v.Room, v.Reservations = owner.Room, owner.Reservations // its picture is the newest
	}
	mergePaths(v, replies, byName)
	healthy := true
	for i := range v.Replicas {
		r := &v.Replicas[i]
		n := byName[r.Node]
		r.Owner = r.Node == v.Owner
		if n != nil {
			n.Replicas++
			if r.Owner {
				n.Owns++
			}
		}
		if n == nil || n.State == NodeDown {
			r.State, healthy = ReplicaDown, false
			continue
		}
		if r.State == ReplicaInSync {
			n.InSync++
			continue
		}
		healthy = false
		if owner != nil {
			if at := slices.IndexFunc(owner.Replicas, func(o Replica) bool { return o.Node == r.Node }); at >= 0 && owner.Replicas[at].State == ReplicaSyncing {
				r.State = ReplicaSyncing
				o := &owner.Replicas[at]
				r.ResyncDone, r.ResyncTotal, r.ResyncSent, r.ResyncLeft = o.ResyncDone, o.ResyncTotal, o.ResyncSent, o.ResyncLeft
			}
		}
	}
	switch {
	case v.State == VolumeDeleting:
	case owner == nil || len(v.ServedBy) == 0:
		// With the owner's node up or some other in-sync node left, service
		// comes back by itself: somebody is about to own the volume.
		v.State = VolumeOffline
		for _, r := range v.Replicas {
			if r.State == ReplicaInSync {
				v.State = VolumeStarting
			}
		}
	case healthy:
		v.State = VolumeOnline
	default:
		v.State = VolumeDegraded
	}
}

// mergePaths takes the paths as recorded and says which of them work, and how many
// sessions use them.
func mergePaths(v *Volume, replies map[replication.NodeID]reply, byName map[string]*Member) {
	for i := range v.Paths {
		p := &v.Paths[i]
		if !slices.Contains(v.ServedBy, p.Node) {
			p.State = PathUnavailable
		}
		p.Sessions = 0
		node := byName[p.Node]
		if node == nil || replies[node.ID].report == nil {
			continue
		}
		for _, s := range replies[node.ID].report.Sessions {
			if v.AnyHost || s.Host != "" && slices.Contains(v.Hosts, s.Host) {
				p.Sessions++
			}
		}
	}
}

func rank(h Health) int {
	switch h {
	case Unavailable:
		return 2
	case Degraded:
		return 1
	}
	return 0
}

// problems lists what is wrong, worst first, each with cause, risk and remedy.
func problems(s *Status) []Problem {
	var list []Problem
	add := func(severity Health, code, cause, risk, remedy string) {
		list = append(list, Problem{severity, code, cause, risk, remedy})
	}
	data, witnesses := 0, 0
	for _, n := range s.Nodes {
		if n.Role == Witness {
			witnesses++
		} else {
			data++
		}
	}
	if !s.Quorum {
		add(Unavailable, "quorum-lost",
			fmt.Sprintf("no quorum: %d of %d voters answer", s.VotersUp, s.Voters),
			"nothing can be changed, and the next failure stops I/O", "start the missing nodes: twinsan node list")
	}
	for _, n := range s.Nodes {
		switch {
		case n.Mode == ModeMaintenance:
			add(Healthy, "node-maintenance", fmt.Sprintf("node %s is in maintenance, and %s", n.Name, n.State),
				"until it is back, "+s.Risk.Text, "twinsan node maintenance "+n.Name+" leave")
		case n.State == NodeDown && n.Failure != "":
			add(Degraded, "node-failed", n.Failure,
				"until it is back, the next failure stops I/O", "look at the disk of its data directory and its log; then on "+n.Name+": systemctl start twinsan")
		case n.State == NodeDown && n.Role == Witness:
			add(Degraded, "witness-down", fmt.Sprintf("witness %s does not answer", n.Name),
				"the next node failure stops I/O", "twinsan node show "+n.Name)
		case n.State == NodeDown:
			add(Degraded, "node-down", fmt.Sprintf("node %s does not answer", n.Name),
				"its copies grow stale, and the next failure stops I/O", "twinsan node show "+n.Name)
		case n.State == NodeStarting:
			add(Degraded, "node-starting", fmt.Sprintf("node %s is starting", n.Name),
				"it does not serve yet", "twinsan node show "+n.Name)
		}
		if n.Detour {
			add(Degraded, "management-unreachable", fmt.Sprintf("node %s does not answer at its management address %s, as seen from node %s", n.Name, n.Management, s.AnsweredBy),
				"the sync network carries everything: when it fails too, the node is cut off", "look at that network, then: twinsan node show "+n.Name)
		}
		if n.Mode == ModeEvacuating {
			do := "twinsan op list"
			if n.Replicas == 0 {
				do = "twinsan node remove " + n.Name
			}
			add(Healthy, "node-evacuating", fmt.Sprintf("node %s is evacuated: %d replicas are left", n.Name, n.Replicas),
				"none", do)
		}
		if n.Draining && n.Mode != ModeMaintenance {
			add(Healthy, "node-draining", fmt.Sprintf("node %s is drained, and owns %d volumes", n.Name, n.Owns),
				"the failure of the other node stops I/O until this one takes over", "twinsan node resume "+n.Name)
		}
		list = append(list, scrubProblems(&n)...)
		if p := n.Pool; p != nil && p.Usable > 0 {
			switch used := p.Live * 100 / p.Usable; {
			case used >= 95:
				add(Degraded, "pool-full", fmt.Sprintf("pool of node %s is %d %% full", n.Name, used),
					"writes that need new space are refused when it is full", "delete or unmap data: twinsan volume list")
			case used >= 80:
				add(Healthy, "pool-filling", fmt.Sprintf("pool of node %s is %d %% full", n.Name, used),
					"writes that need new space are refused when it is full", "twinsan volume list")
			}
		}
	}
	for _, v := range s.Volumes {
		var missing []string
		expected := true // what is missing is missing on purpose
		for _, r := range v.Replicas {
			if m := memberNamed(s, r.Node); r.State != ReplicaInSync && (m == nil || m.Mode != ModeMaintenance) && !coming(s, &v, r.Node) {
				expected = false
			}
			switch r.State {
			case ReplicaDown:
				missing = append(missing, r.Node+" is down")
			case ReplicaStale:
				missing = append(missing, r.Node+" is stale")
			case ReplicaSyncing:
				text := fmt.Sprintf("%s is resyncing, %s left", r.Node, Size(r.ResyncTotal-min(r.ResyncDone, r.ResyncTotal)))
				if r.ResyncLeft > 0 {
					text += ", about " + r.ResyncLeft.Round(time.Second).String()
				}
				missing = append(missing, text)
			}
		}
		switch v.State {
		case VolumeOffline:
			add(Unavailable, "volume-offline", fmt.Sprintf("volume %s is not served: %s", v.Name, orNone(missing)),
				"its hosts wait, and fail after their time limits", "twinsan volume show "+v.Name)
		case VolumeStarting:
			add(Unavailable, "volume-starting", fmt.Sprintf("volume %s is changing its owner", v.Name),
				"its hosts wait a moment", "twinsan volume show "+v.Name)
		case VolumeDegraded:
			severity := Degraded
			if expected {
				severity = Healthy
			}
			add(severity, "replica-out-of-sync", fmt.Sprintf("volume %s: %s", v.Name, orNone(missing)),
				riskOfVolume(s, &v), "twinsan volume show "+v.Name)
		}
	}
	switch {
	case data == 1:
		add(Healthy, "not-mirrored", "the cluster has one data node", "a failed disk loses data",
			"twinsan cluster token create, then twinsan join on a second node")
	case data == 2 && witnesses == 0:
		add(Healthy, "no-witness", "two nodes and no witness", "the failure of the preferred node stops I/O",
			"twinsan cluster token create --witness, then twinsan join --witness on a third machine")
	}
	slices.SortStableFunc(list, func(a, b Problem) int { return rank(b.Severity) - rank(a.Severity) })
	return list
}

func orNone(missing []string) string {
	if len(missing) == 0 {
		return "no owner"
	}
	return strings.Join(missing, ", ")
}
