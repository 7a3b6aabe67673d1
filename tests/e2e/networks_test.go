//go:build e2e

package e2e

import (
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
