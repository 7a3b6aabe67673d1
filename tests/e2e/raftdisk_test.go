//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// TestRaftDiskFails fails every write of raft's store on one node, the owner or the
// other one, whoever leads: the process ends, the other node serves alone, and the
// status and the events say why. When the disk works again, so does the node.
func TestRaftDiskFails(t *testing.T) {
	checkedOnly(t)
	t.Setenv("TWINSAN_RAFT_FAULT", "1")
	round := 0
	kill(t, raftDiskMax, func(r *rig, v *lab.Volume, load *verified) {
		round++
		name := []string{v.Owner, v.Other()}[round%2]
		fault := filepath.Join(r.c.Node(name).Dir, "raft", "fault")
		r.must(os.WriteFile(fault, nil, 0o600), "fault")
		pid := r.c.Node(name).PID
		other := r.c.Node(map[string]string{"a": "b", "b": "a"}[name])
		survivor := *r.c
		survivor.Nodes = []lab.FileNode{*other}
		// Something to be written. That it is answered is not asked for: the leader may fail on it.
		_, _ = lab.Run(r.ctx, r.c.Binary, "--api", other.API, "--timeout", "5s", "host", "add", fmt.Sprintf("h%d", round), fmt.Sprintf("iqn.2026-01.test:h%d", round))
		r.must(lab.Until(r.ctx, 20*time.Second, func() error { return gone(pid) }), "the end of node %s", name)
		load.progress(300, 30*time.Second)
		var s *lab.Status
		r.must(lab.Until(r.ctx, 20*time.Second, func() error {
			var err error
			if s, err = survivor.Status(r.ctx); err != nil {
				return err
			}
			if !slices.ContainsFunc(s.Problems, func(p lab.Problem) bool {
				return p.Code == "node-failed" && strings.Contains(p.Cause, "node "+name) && strings.Contains(p.Cause, "raft store")
			}) {
				return fmt.Errorf("problems: %+v", s.Problems)
			}
			for _, rep := range s.Volumes[0].Replicas {
				if rep.Node == name && rep.State == "in_sync" {
					return fmt.Errorf("node %s counts as in sync", name)
				}
			}
			return nil
		}), "status")
		events, err := lab.Run(r.ctx, r.c.Binary, "--api", other.API, "events")
		r.must(err, "events")
		if !strings.Contains(string(events), "node "+name+" has stopped: raft store: ") {
			r.Errorf("round %d: no event says why:\n%s", round, events)
		}
		r.Logf("round %d: raft's disk failed on %s, the leader was %s", round, name, s.Leader)
		r.must(os.Remove(fault), "fault")
		r.demo("start", name)
	}, "--io-timeout", "2")
}

// raftDiskMax is how long an initiator waits: the process ends, so its connections do.
const raftDiskMax = 5 * time.Second
