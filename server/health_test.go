package server

import (
	"errors"
	"reflect"
	"slices"
	"testing"

	"github.com/twinsan/twinsan/replication"
)

// picture is a cluster of nodes a and b, witness w and one volume, as recorded.
func picture() *Status {
	return &Status{
		Cluster: "lab", Quorum: true, Leader: "a", Voters: 3,
		Nodes: []Member{
			{ID: 1, Name: "a", Role: Data, Voter: true},
			{ID: 2, Name: "b", Role: Data, Voter: true},
			{ID: 3, Name: "w", Role: Witness, Voter: true},
		},
		Volumes: []Volume{{ID: 7, Name: "vm", Owner: "a", Size: 1 << 30, Replicas: []Replica{
			{Node: "a", State: ReplicaInSync}, {Node: "b", State: ReplicaInSync},
		}}},
	}
}

func answers() map[replication.NodeID]reply {
	return map[replication.NodeID]reply{
		1: {report: &Report{Node: 1, Ready: true, Pool: &Pool{Live: 10, Usable: 100}, Volumes: []VolumeReport{
			{ID: 7, Owner: true, Served: true, Mapped: 4096, Traffic: Traffic{WriteOps: 2}}}}},
		2: {report: &Report{Node: 2, Ready: true, Pool: &Pool{Live: 10, Usable: 100}, Volumes: []VolumeReport{
			{ID: 7, Served: true, Mapped: 4096, Traffic: Traffic{WriteOps: 3}}}}},
		3: {report: &Report{Node: 3, Ready: true}},
	}
}

func TestMerge(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(s *Status, r map[replication.NodeID]reply)
		health Health
		state  VolumeState
		codes  []string
	}{
		{"all well", func(*Status, map[replication.NodeID]reply) {}, Healthy, VolumeOnline, nil},
		{"witness down", func(_ *Status, r map[replication.NodeID]reply) { r[3] = reply{err: errors.New("refused")} },
			Degraded, VolumeOnline, []string{"witness-down"}},
		{"replica's node down, still recorded in sync", func(_ *Status, r map[replication.NodeID]reply) { delete(r, 2) },
			Degraded, VolumeDegraded, []string{"node-down", "replica-out-of-sync"}},
		{"node that said why it stopped", func(s *Status, r map[replication.NodeID]reply) {
			s.Nodes[1].Failure = "node b has stopped: raft store"
			delete(r, 2)
		}, Degraded, VolumeDegraded, []string{"node-failed", "replica-out-of-sync"}},
		{"one that is back since", func(s *Status, _ map[replication.NodeID]reply) { s.Nodes[1].Failure = "node b has stopped: raft store" },
			Healthy, VolumeOnline, nil},
		{"node that answers at its sync address alone", func(_ *Status, r map[replication.NodeID]reply) { r[2] = reply{report: r[2].report, detour: true} },
			Degraded, VolumeOnline, []string{"management-unreachable"}},
		{"owner's node down", func(_ *Status, r map[replication.NodeID]reply) { delete(r, 1) },
			Unavailable, VolumeStarting, []string{"volume-starting", "node-down"}},
		{"both down", func(_ *Status, r map[replication.NodeID]reply) { delete(r, 1); delete(r, 2) },
			Unavailable, VolumeOffline, []string{"volume-offline", "node-down", "node-down"}},
		{"resync", func(s *Status, r map[replication.NodeID]reply) {
			s.Volumes[0].Replicas[1].State = ReplicaStale
			r[1].report.Volumes[0].Replicas = []Replica{{Node: "b", State: ReplicaSyncing, ResyncDone: 1 << 20, ResyncTotal: 3 << 20}}
		}, Degraded, VolumeDegraded, []string{"replica-out-of-sync"}},
		{"no owner recorded", func(s *Status, _ map[replication.NodeID]reply) { s.Volumes[0].Owner = "" },
			Unavailable, VolumeStarting, []string{"volume-starting"}},
		{"starting node", func(_ *Status, r map[replication.NodeID]reply) {
			r[2].report.Ready = false
			r[2].report.Volumes = nil
		}, Degraded, VolumeOnline, []string{"node-starting"}},
		{"no quorum", func(s *Status, r map[replication.NodeID]reply) { s.Quorum = false; delete(r, 3); delete(r, 2) },
			Unavailable, VolumeDegraded, []string{"quorum-lost", "node-down", "witness-down", "replica-out-of-sync"}},
		{"full pool", func(_ *Status, r map[replication.NodeID]reply) { r[2].report.Pool.Live = 96 },
			Degraded, VolumeOnline, []string{"pool-full"}},
		{"filling pool is an advice", func(_ *Status, r map[replication.NodeID]reply) { r[2].report.Pool.Live = 85 },
			Healthy, VolumeOnline, []string{"pool-filling"}},
		{"no witness is an advice", func(s *Status, _ map[replication.NodeID]reply) { s.Nodes = s.Nodes[:2] },
			Healthy, VolumeOnline, []string{"no-witness"}},
		{"deleting", func(s *Status, _ map[replication.NodeID]reply) { s.Volumes[0].State = VolumeDeleting },
			Healthy, VolumeDeleting, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, r := picture(), answers()
			test.change(s, r)
			merge(s, r)
			var codes []string
			for _, p := range s.Problems {
				codes = append(codes, p.Code)
				if p.Cause == "" || p.Risk == "" || p.Remedy == "" {
					t.Errorf("problem without cause, risk or remedy: %+v", p)
				}
			}
			if s.Health != test.health || s.Volumes[0].State != test.state || !slices.Equal(codes, test.codes) {
				t.Errorf("got %s, volume %s, %v; want %s, %s, %v", s.Health, s.Volumes[0].State, codes, test.health, test.state, test.codes)
			}
		})
	}
}

func TestMergeCounts(t *testing.T) {
	s := picture()
	merge(s, answers())
	v := s.Volumes[0]
	if want := (Traffic{WriteOps: 5}); v.Traffic != want || v.Mapped != 4096 || !reflect.DeepEqual(v.ServedBy, []string{"a", "b"}) {
		t.Errorf("volume %+v", v)
	}
	if a := s.Nodes[0]; a.Owns != 1 || a.InSync != 1 || a.Replicas != 1 || a.State != NodeUp {
		t.Errorf("node a %+v", a)
	}
	if b := s.Nodes[1]; b.Owns != 0 || b.InSync != 1 || b.Replicas != 1 {
		t.Errorf("node b %+v", b)
	}
	if s.VotersUp != 3 {
		t.Errorf("%d voters up", s.VotersUp)
	}
}
