package cluster

import (
	"slices"
	"strings"
	"testing"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
)

// TestChange is the table of what may become of a record whose owner is 1, with
// replicas on 1 and 2, in epoch 2 and with or without 2 in sync.
func TestChange(t *testing.T) {
	ids := func(n ...replication.NodeID) []replication.NodeID { return n }
	type change = replication.Change
	tests := []struct {
		what   string
		inSync []replication.NodeID // before
		ch     change
		want   string // of the reason of the refusal; empty: committed
	}{
		{"shrink", ids(1, 2), change{Owner: 1, InSync: ids(1), By: 1}, ""},
		{"nothing but an epoch", ids(1, 2), change{Owner: 1, InSync: ids(1, 2), By: 1}, ""},
		{"unsorted", ids(1, 2), change{Owner: 1, InSync: ids(2, 1), By: 1}, ""},
		{"take-over", ids(1, 2), change{Owner: 2, InSync: ids(2), By: 2}, ""},
		{"planned move", ids(1, 2), change{Owner: 2, InSync: ids(1, 2), By: 1}, ""},
		{"move by the one that gains", ids(1, 2), change{Owner: 2, InSync: ids(1, 2), By: 2}, "can give it away"},
		{"grow", ids(1), change{Owner: 1, InSync: ids(1, 2), By: 1, Grow: 2}, ""},
		{"old epoch", ids(1, 2), change{Owner: 1, InSync: ids(1), By: 1, Expect: 1}, "epoch"},
		{"future epoch", ids(1, 2), change{Owner: 1, InSync: ids(1), By: 1, Expect: 3}, "epoch"},
		{"no such volume", ids(1, 2), change{Volume: 9, Owner: 1, InSync: ids(1), By: 1}, "no volume"},
		{"nobody in sync", ids(1, 2), change{Owner: 1, By: 1}, "nobody"},
		{"no owner", ids(1, 2), change{InSync: ids(1, 2), By: 1}, "not be in sync"},
		{"owner outside", ids(1, 2), change{Owner: 2, InSync: ids(1), By: 2}, "not be in sync"},
		{"stale owner", ids(1), change{Owner: 2, InSync: ids(2), By: 2}, "not in sync"},
		{"stale owner by growing", ids(1), change{Owner: 2, InSync: ids(1, 2), By: 1, Grow: 2}, "not in sync"},
		{"twice", ids(1, 2), change{Owner: 1, InSync: ids(1, 1), By: 1}, "twice"},
		{"grow unsaid", ids(1), change{Owner: 1, InSync: ids(1, 2), By: 1}, "without proof"},
		{"grow by two", ids(1), change{Owner: 1, InSync: ids(1, 2, 3), By: 1, Grow: 2}, "without proof"},
		{"grow what is in", ids(1, 2), change{Owner: 1, InSync: ids(1, 2), By: 1, Grow: 2}, "already"},
		{"grow and leave out", ids(1), change{Owner: 1, InSync: ids(1), By: 1, Grow: 2}, "not in the set"},
		{"grow without replica", ids(1), change{Owner: 1, InSync: ids(1, 3), By: 1, Grow: 3}, "no replica"},
		{"grow a stranger", ids(1), change{Owner: 1, InSync: ids(1, 9), By: 1, Grow: 9}, "no replica"},
		{"grow by the newcomer", ids(1), change{Owner: 1, InSync: ids(1, 2), By: 2, Grow: 2}, "only the owner"},
		{"grow another replica", ids(1), change{Owner: 1, InSync: ids(1, 2), By: 1, Grow: 2, GrowReplica: replication.ReplicaID{1}}, "another one"},
		{"grow an older start", ids(1), change{Owner: 1, InSync: ids(1, 2), By: 1, Grow: 2, GrowIncarnation: 7}, "restarted"},
	}
	for _, tt := range tests {
		t.Run(tt.what, func(t *testing.T) {
			b := newBench(t)
			id := lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
			first := change{Volume: id, Expect: 1, Owner: 1, InSync: tt.inSync, By: 1}
			if slices.Contains(tt.inSync, 2) {
				first.Grow, first.GrowReplica = 2, b.m.state.Volume(id).Record.Replicas[1].ID
				first.GrowIncarnation = b.m.state.Node(2).Incarnation
			}
			r := b.ok(&cmdChange{first})
			ch := tt.ch
			if ch.Volume == 0 {
				ch.Volume = id
			}
			if ch.Expect == 0 {
				ch.Expect = 2
			}
			if ch.Grow != 0 && ch.GrowReplica == (replication.ReplicaID{}) {
				ch.GrowReplica = r.Record.Replicas[1].ID
			}
			if ch.Grow != 0 && ch.GrowIncarnation == 0 {
				ch.GrowIncarnation = b.m.state.Node(2).Incarnation
			}
			events := len(b.m.state.Events)
			got := b.do(&cmdChange{ch})
			if tt.want != "" {
				if got.Code != codeConflict || !strings.Contains(got.Text, tt.want) {
					t.Errorf("code %d (%s)", got.Code, got.Text)
				}
				if ch.Volume == id && got.Record.Epoch != 2 {
					t.Errorf("refused without the current record: %+v", got.Record)
				}
				if b.m.state.Volume(id).Record.Epoch != 2 || len(b.m.state.Events) != events {
					t.Error("a refused change left a trace")
				}
				return
			}
			want := slices.Sorted(slices.Values(ch.InSync))
			if got.Code != codeOK || got.Record.Epoch != 3 || got.Record.Owner != ch.Owner || !slices.Equal(got.Record.InSync, want) {
				t.Errorf("%+v", got)
			}
		})
	}
}

// A replica that was restarted after its owner filled it may have lost its tail:
// the change that the owner still had on its way is refused.
func TestGrowAfterRestart(t *testing.T) {
	b := newBench(t)
	id := lsfs.VolumeID(b.ok(volumeCommand("vm1")).ID)
	r := b.ok(&cmdChange{replication.Change{Volume: id, Expect: 1, Owner: 1, InSync: []replication.NodeID{1}, By: 1}})
	grow := &cmdChange{replication.Change{
		Volume: id, Expect: 2, Owner: 1, InSync: []replication.NodeID{1, 2}, By: 1,
		Grow: 2, GrowReplica: r.Record.Replicas[1].ID, GrowIncarnation: 1,
	}}
	b.ok(&cmdStart{Node: 2, Addresses: b.m.state.Node(2).Addresses})
	if r := b.do(grow); r.Code != codeConflict {
		t.Errorf("%+v", r)
	}
}
