package server

import (
	"context"
	"fmt"

	"github.com/twinsan/twinsan/server/cluster"
)

// MapVolume lets hosts see a volume in addition to those that do; with readOnly
// their writes are refused. Initiators that are logged in notice at once.
func (n *Node) MapVolume(ctx context.Context, name string, hosts []string, readOnly bool) (*Volume, error) {
	_, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, err := n.cluster.MapVolume(ctx, v.ID, hosts, readOnly); err != nil {
		return nil, err
	}
	return n.described(ctx, v.ID)
}

// UnmapVolume takes a volume away from hosts.
func (n *Node) UnmapVolume(ctx context.Context, name string, hosts []string) (*Volume, error) {
	_, v, err := n.volumeNamed(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, err := n.cluster.UnmapVolume(ctx, v.ID, hosts); err != nil {
		return nil, err
	}
	return n.described(ctx, v.ID)
}

// DiscoveryMode says how initiators prove themselves before they are told the portals.
type DiscoveryMode string

const (
	// DiscoveryHost: as for a login, by the credentials of the host.
	DiscoveryHost DiscoveryMode = "host"
	// DiscoveryNone: not at all.
	DiscoveryNone DiscoveryMode = "none"
	// DiscoveryCHAP: by one user for the whole cluster.
	DiscoveryCHAP DiscoveryMode = "chap"
)

var discoveryModes = map[cluster.DiscoveryMode]DiscoveryMode{
	cluster.DiscoveryAsHost: DiscoveryHost, cluster.DiscoveryOpen: DiscoveryNone, cluster.DiscoveryCHAP: DiscoveryCHAP,
}

// DiscoverySpec is the policy for discovery sessions.
type DiscoverySpec struct {
	Mode DiscoveryMode
	// The rest for DiscoveryCHAP only; MutualUser with MutualSecret: the target
	// proves itself as well.
	User, Secret             string
	MutualUser, MutualSecret string
}

// SetDiscovery sets the policy for discovery sessions.
func (n *Node) SetDiscovery(ctx context.Context, spec DiscoverySpec) error {
	for mode, word := range discoveryModes {
		if word == spec.Mode {
			return n.cluster.SetDiscovery(ctx, cluster.DiscoverySpec{Mode: mode, User: spec.User, Secret: spec.Secret, MutualUser: spec.MutualUser, MutualSecret: spec.MutualSecret})
		}
	}
	return fmt.Errorf("%w: discovery-auth %q: want host, none or chap", ErrInvalid, spec.Mode)
}
