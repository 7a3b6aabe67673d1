package cluster

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/twinsan/twinsan/replication"
)

// plan parses "a b w" into members (w is a witness) and "A B w" into servers
// (capitals vote), all with the address that the member has.
func plan(nodes, servers string) (ns []*Node, ss []raft.Server) {
	letters := "abcdw"
	addr := func(id replication.NodeID) string { return fmt.Sprintf("h%d:1", id) }
	id := func(s string) replication.NodeID {
		return replication.NodeID(strings.Index(letters, strings.ToLower(s)) + 1)
	}
	for _, s := range strings.Fields(nodes) {
		n := &Node{ID: id(s), Name: s, Role: RoleData, Addresses: Addresses{Sync: addr(id(s))}}
		if s == "w" {
			n.Role = RoleWitness
		}
		ns = append(ns, n)
	}
	for _, s := range strings.Fields(servers) {
		suf := raft.Nonvoter
		if s == strings.ToUpper(s) {
			suf = raft.Voter
		}
		ss = append(ss, raft.Server{Suffrage: suf, ID: raftID(id(s)), Address: raftAddress(id(s), addr(id(s)))})
	}
	return ns, ss
}

func TestNextStep(t *testing.T) {
	verbs := map[stepKind]string{stepNone: "", stepHandOver: "lead", stepAdd: "add", stepRemove: "remove", stepPromote: "promote", stepDemote: "demote"}
	tests := []struct{ nodes, servers, self, down, want string }{
		{"a", "A", "a", "", ""},
		{"a b", "A", "a", "b", "add b"},
		{"a b", "A b", "a", "", ""},      // preferred node: b has no vote
		{"a w", "A", "a", "", "add w"},   //
		{"a w", "A w", "a", "", ""},      // a witness for one node has no vote
		{"a b w", "A b w", "a", "b", ""}, // not through two voters while b is away
		{"a b w", "A b w", "a", "w", ""}, //
		{"a b w", "A b w", "a", "", "promote b"},
		{"a b w", "A B w", "a", "", "promote w"},
		{"a b w", "A B w", "a", "w", ""}, // it is down: no vote yet
		{"a b w", "A B W", "a", "", ""},
		{"a b w", "A B W", "w", "", "lead a"},
		{"a b w", "A B W", "w", "a", "lead b"},
		{"a b w", "A B W", "w", "a b", ""},
		{"a b c", "A B C", "a", "", ""},
		{"a b c w", "A B C w", "a", "", ""}, // three data nodes need no witness
		{"a b c w", "A B W c", "a", "", "promote c"},
		{"a b c w", "A B C W", "a", "", "demote w"},
		{"a b c d w", "A B C D w", "a", "", "promote w"},
		// The witness leaves: b loses its vote first when it is away, so that the votes
		// never hang on a node that is down.
		{"a b", "A B W", "a", "", "remove w"},
		{"a b", "A B W", "a", "b", "demote b"},
		{"a b", "A b W", "a", "b", "remove w"},
		{"a b", "A B", "a", "", "demote b"},
		{"a b", "A B", "a", "b", "demote b"},
		{"a b", "A B", "b", "", "demote a"},
		// b leaves.
		{"a w", "A B W", "a", "b", "remove b"},
		{"a w", "A B W", "a", "b w", ""}, // no majority to change anything
		{"a w", "A W", "a", "w", "demote w"},
		{"a w", "A B W", "b", "", "lead a"}, // the leader itself was removed
		{"a w", "A B W", "b", "a", ""},
		{"a", "A b", "a", "b", "remove b"},
	}
	for _, tt := range tests {
		nodes, servers := plan(tt.nodes, tt.servers)
		self, _ := plan(tt.self, "")
		down, _ := plan(tt.down, "")
		ready := func(id replication.NodeID) bool {
			if id == self[0].ID {
				t.Errorf("%+v: asked whether it is there itself", tt)
			}
			return !slices.ContainsFunc(down, func(n *Node) bool { return n.ID == id })
		}
		st := nextStep(nodes, new(Settings), servers, self[0].ID, ready)
		got := ""
		if st.kind != stepNone {
			got = verbs[st.kind] + " " + string("abcdw"[st.node-1])
		}
		if got != tt.want {
			t.Errorf("members %q, servers %q, %s leads, down %q: %q, want %q", tt.nodes, tt.servers, tt.self, tt.down, got, tt.want)
		}
	}

	// An administrator's choice goes before the rule: the preferred node is given its
	// vote before the leader leaves, and the others lose theirs after that.
	for _, tt := range []struct {
		quorum                                      QuorumMode
		preferred, nodes, servers, self, down, want string
	}{
		{QuorumPreferred, "b", "a b w", "A B W", "a", "", "lead b"},
		{QuorumPreferred, "b", "a b w", "A B W", "a", "b", ""},
		{QuorumPreferred, "b", "a b w", "A B W", "b", "", "demote a"},
		{QuorumPreferred, "b", "a b w", "B W a", "b", "", "demote w"},
		{QuorumPreferred, "b", "a b w", "B a w", "b", "", ""},
		{QuorumPreferred, "b", "a b", "A b", "a", "", "promote b"},
		{QuorumPreferred, "b", "a b", "A b", "a", "b", ""},
		{QuorumPreferred, "b", "a b", "A B", "a", "", "lead b"},
		{QuorumPreferred, "b", "a b", "A B", "b", "", "demote a"},
		{QuorumPreferred, "b", "a b", "B a", "b", "", ""},
		{QuorumPreferred, "d", "a b c", "A B C", "a", "", ""}, // it was removed: the rule holds
		{QuorumAuto, "", "a b w", "B a w", "b", "", "promote a"},
		{QuorumWitness, "", "a b w", "B a w", "b", "w", ""},
		{QuorumMajority, "", "a b c w", "A B C W", "a", "", "demote w"},
		{QuorumMajority, "", "a b w", "A B W", "a", "", ""}, // two alone would be worse
	} {
		nodes, servers := plan(tt.nodes, tt.servers)
		self, _ := plan(tt.self, "")
		down, _ := plan(tt.down, "")
		q := &Settings{Quorum: tt.quorum}
		if p, _ := plan(tt.preferred, ""); len(p) > 0 {
			q.Preferred = p[0].ID
		}
		st := nextStep(nodes, q, servers, self[0].ID, func(id replication.NodeID) bool {
			return !slices.ContainsFunc(down, func(n *Node) bool { return n.ID == id })
		})
		got := ""
		if st.kind != stepNone {
			got = verbs[st.kind] + " " + string("abcdw"[st.node-1])
		}
		if got != tt.want {
			t.Errorf("mode %d %s, members %q, servers %q, %s leads, down %q: %q, want %q", tt.quorum, tt.preferred, tt.nodes, tt.servers, tt.self, tt.down, got, tt.want)
		}
	}

	nodes, servers := plan("a b", "A b")
	nodes[1].Sync = "elsewhere:1"
	if st := nextStep(nodes, new(Settings), servers, 1, nil); st != (step{stepAdd, 2}) {
		t.Errorf("moved node: %+v", st)
	}
}
