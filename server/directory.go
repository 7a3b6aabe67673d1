package server

import (
	"github.com/twinsan/twinsan/server/cluster"
	"github.com/twinsan/twinsan/server/iscsi"
)

// directory tells the iSCSI target who may log in and where the portals are,
// from the newest state that this node has applied.
type directory struct{ node *Node }

// admitted says whether an initiator may log in: it belongs to a host, or some
// volume admits every initiator.
func admitted(s *cluster.State, initiator string) bool {
	if s.HostOf(initiator) != nil {
		return true
	}
	for _, v := range s.Volumes {
		if v.AnyHost && !v.Record.Deleted {
			return true
		}
	}
	return false
}

// Access says whether an initiator may log in, and with which credentials. A
// host whose secrets cannot be opened is refused.
func (d directory) Access(initiator string) (iscsi.Access, bool) {
	s := d.node.cluster.State()
	host := s.HostOf(initiator)
	if host == nil {
		return iscsi.Access{}, admitted(s, initiator)
	}
	secret, mutual, err := d.node.cluster.Secrets(host)
	if err != nil {
		d.node.log.Error("CHAP secrets cannot be opened", "host", host.Name, "err", err)
		return iscsi.Access{}, false
	}
	return iscsi.Access{User: host.User, Secret: secret, MutualUser: host.MutualUser, MutualSecret: mutual}, true
}

// Discovery asks for what the cluster's policy says, of initiators that may log in.
func (d directory) Discovery(initiator string) (iscsi.Access, bool) {
	s := d.node.cluster.State()
	switch s.Discovery.Mode {
	case cluster.DiscoveryOpen:
		return iscsi.Access{}, admitted(s, initiator)
	case cluster.DiscoveryCHAP:
		secret, mutual, err := d.node.cluster.DiscoverySecrets(&s.Discovery)
		if err != nil {
			d.node.log.Error("secrets of discovery cannot be opened", "err", err)
			return iscsi.Access{}, false
		}
		access := iscsi.Access{User: s.Discovery.User, Secret: secret, MutualUser: s.Discovery.MutualUser, MutualSecret: mutual}
		return access, admitted(s, initiator)
	}
	return d.Access(initiator)
}

// Portals are those of all data nodes.
func (d directory) Portals(string) []iscsi.Portal {
	var out []iscsi.Portal
	for _, n := range d.node.cluster.State().Nodes {
		for _, p := range n.Portals {
			out = append(out, iscsi.Portal{Addr: p, Group: uint16(n.ID)})
		}
	}
	return out
}

// Redirect sends initiators to another node while this one is drained.
func (d directory) Redirect(string) (string, bool) {
	return d.node.redirect(d.node.cluster.State(), d.node.serving.Load())
}
