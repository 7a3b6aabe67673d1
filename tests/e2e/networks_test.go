//go:build e2e

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/twinsan/twinsan/tests/lab"
)

// cutWire and mendWire take both directions of each pair on one wire.
func (r *netRig) cutWire(w lab.Wire, pairs ...string) {
	r.Helper()
	for i := 0; i < len(pairs); i += 2 {
		r.must(r.n.CutWire(r.ctx, w, pairs[i], pairs[i+1]), "cut")
		r.must(r.n.CutWire(r.ctx, w, pairs[i+1], pairs[i]), "cut")
	}
}

func (r *netRig) mendWire(w lab.Wire, pairs ...string) {
	r.Helper()
	for i := 0; i < len(pairs); i += 2 {
		r.must(r.n.MendWire(r.ctx, w, pairs[i], pairs[i+1]), "mend")
		r.must(r.n.MendWire(r.ctx, w, pairs[i+1], pairs[i]), "mend")
	}
}

// twoWires are the faults of one network of two. Initiators are on the data network
// and reach both nodes all the time; the witness is on the management network alone.
var twoWires = []fault{
	{
		name:   "data network cut between the nodes",
		hurt:   func(r *netRig, owner, other string) { r.cutWire(lab.Data, owner, other) },
		heal:   func(r *netRig, owner, other string) { r.mendWire(lab.Data, owner, other) },
		goesOn: true, limit: 5 * time.Second, says: "replica-out-of-sync",
	},
	{
		name:   "the owner's management network cut",
		hurt:   func(r *netRig, owner, other string) { r.cutWire(lab.Management, owner, other, owner, "w") },
		heal:   func(r *netRig, owner, other string) { r.mendWire(lab.Management, owner, other, owner, "w") },
		goesOn: true, limit: 2 * time.Second, says: "management-unreachable",
	},
	{
		name:   "the replica's management network cut",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.cutWire(lab.Management, other, owner, other, "w") },
		heal:   func(r *netRig, owner, other string) { r.mendWire(lab.Management, other, owner, other, "w") },
		goesOn: true, limit: 2 * time.Second, says: "management-unreachable",
	},
	{
		name:   "the whole management network cut",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.cutWire(lab.Management, owner, other, owner, "w", other, "w") },
		heal:   func(r *netRig, owner, other string) { r.mendWire(lab.Management, owner, other, owner, "w", other, "w") },
		goesOn: true, limit: 2 * time.Second, says: "management-unreachable",
	},
	{
		name:   "what the owner sends to the replica is lost on the data network",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.must(r.n.CutWire(r.ctx, lab.Data, owner, other), "cut") },
		heal:   func(r *netRig, owner, other string) { r.must(r.n.MendWire(r.ctx, lab.Data, owner, other), "mend") },
		goesOn: true, limit: 5 * time.Second, says: "replica-out-of-sync",
	},
	{
		name:   "what the replica sends to the owner is lost on the data network",
		long:   true,
		hurt:   func(r *netRig, owner, other string) { r.must(r.n.CutWire(r.ctx, lab.Data, other, owner), "cut") },
		heal:   func(r *netRig, owner, other string) { r.must(r.n.MendWire(r.ctx, lab.Data, other, owner), "mend") },
		goesOn: true, limit: 5 * time.Second, says: "replica-out-of-sync",
	},
	{
		name: "what the owner sends on the management network is lost",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.must(r.n.CutWire(r.ctx, lab.Management, owner, other), "cut")
			r.must(r.n.CutWire(r.ctx, lab.Management, owner, "w"), "cut")
		},
		heal: func(r *netRig, owner, other string) {
			r.must(r.n.MendWire(r.ctx, lab.Management, owner, other), "mend")
			r.must(r.n.MendWire(r.ctx, lab.Management, owner, "w"), "mend")
		},
		goesOn: true, limit: 2 * time.Second, says: "management-unreachable",
	},
	{
		name: "what the owner is sent on the management network is lost",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.must(r.n.CutWire(r.ctx, lab.Management, other, owner), "cut")
			r.must(r.n.CutWire(r.ctx, lab.Management, "w", owner), "cut")
		},
		heal: func(r *netRig, owner, other string) {
			r.must(r.n.MendWire(r.ctx, lab.Management, other, owner), "mend")
			r.must(r.n.MendWire(r.ctx, lab.Management, "w", owner), "mend")
		},
		goesOn: true, limit: 2 * time.Second, says: "management-unreachable",
	},
	{
		name: "data network cut, and the replica's management network",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.cutWire(lab.Data, owner, other)
			r.cutWire(lab.Management, other, owner, other, "w")
		},
		heal: func(r *netRig, owner, other string) {
			r.mendWire(lab.Data, owner, other)
			r.mendWire(lab.Management, other, owner, other, "w")
		},
		goesOn: true, limit: 5 * time.Second,
	},
	{
		name: "data network cut, and the owner's management network",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			r.cutWire(lab.Management, owner, other, owner, "w")
			r.cutWire(lab.Data, owner, other)
		},
		heal: func(r *netRig, owner, other string) {
			r.mendWire(lab.Management, owner, other, owner, "w")
			r.mendWire(lab.Data, owner, other)
		},
		goesOn: true, limit: 8 * time.Second, takes: true,
	},
	{
		name: "the data network comes and goes",
		long: true,
		hurt: func(r *netRig, owner, other string) {
			for range 8 {
				r.cutWire(lab.Data, owner, other)
				r.wait(time.Duration(50+r.rand.IntN(1500)) * time.Millisecond)
				r.mendWire(lab.Data, owner, other)
				r.wait(time.Duration(50+r.rand.IntN(1500)) * time.Millisecond)
			}
		},
		heal:   func(*netRig, string, string) {},
		goesOn: true, limit: 8 * time.Second, takes: true, // it may
	},
}

// TestTwoNetworks is TestPartitions where data and management have a network each:
// one of the two stops nothing for long.
func TestTwoNetworks(t *testing.T) {
	scenario(t)
	r := upNetwork(t, lab.NetworkOptions{DeviceSize: "4G", Nodes: []string{"a", "b"}, Volumes: []string{"demo:512M"}, TwoWires: true})
	r.suffer(twoWires)
}

// TestNodeSet changes the management addresses of both nodes, one after the other, as
// an administrator does it, and refuses what cannot work. The volume is served throughout.
func TestNodeSet(t *testing.T) {
	scenario(t)
	r := upNetwork(t, lab.NetworkOptions{DeviceSize: "4G", Nodes: []string{"a", "b"}, Volumes: []string{"demo:512M"}, TwoWires: true})
	v := r.volume("demo")
	load := r.verify(r.both(v.LUN), 0, 32*mib, "--failover", "--io-timeout", "20", "--iodepth", "8")
	load.progress(300, 30*time.Second)
	if _, err := r.n.On(r.ctx, "a", "node", "set", "a", "--management", "10.99.0.1"); err == nil || !strings.Contains(err.Error(), "no address of this machine; it has 10.77.0.1, 10.78.0.1") {
		r.Errorf("an address of nobody: %v", err)
	}
	if _, err := r.n.On(r.ctx, "a", "node", "set", "b", "--management", "sync"); err == nil || !strings.Contains(err.Error(), "this machine is node a") {
		r.Errorf("the other node's file: %v", err)
	}
	// The second port of the management network, and back.
	for _, step := range []struct {
		name, to, want string
	}{
		{"b", r.n.Address("b", lab.Management) + ":7500", r.n.Address("b", lab.Management) + ":7500"},
		{"a", r.n.Address("a", lab.Management) + ":7500", r.n.Address("a", lab.Management) + ":7500"},
		{"b", r.n.Address("b", lab.Management), r.n.Address("b", lab.Management) + ":7400"},
	} {
		_, err := r.n.On(r.ctx, step.name, "node", "set", step.name, "--management", step.to)
		r.must(err, "node set")
		r.must(r.n.Kill(r.ctx, step.name), "kill")
		load.progress(200, 30*time.Second)
		r.must(r.n.Start(r.ctx, step.name), "start")
		r.must(r.c.WaitHealthy(r.ctx, 2*time.Minute), "%s at %s", step.name, step.to)
		var page struct {
			Node struct {
				Sync       string `json:"sync_address"`
				Management string `json:"management_address"`
			} `json:"node"`
		}
		r.must(r.c.JSON(r.ctx, &page, "node", "show", step.name), "node show")
		if page.Node.Management != step.want || page.Node.Sync != r.n.Address(step.name, lab.Data)+":7400" {
			r.Errorf("node %s: %+v, want %s", step.name, page.Node, step.want)
		}
	}
	result := load.stop()
	if result.Errors.SCSI > 0 {
		r.Errorf("%d commands failed: %s", result.Errors.SCSI, result.Errors.Last)
	}
	r.must(r.c.CheckEqual(r.ctx, "demo"), "volume check")
	load.check(r.c.URL("a", v.LUN))
}
