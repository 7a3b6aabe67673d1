package server

import (
	"context"
	"time"

	"github.com/twinsan/twinsan/lsfs"
)

// PoolExplained says what the pool of a node is taken by, and when it will be full.
type PoolExplained struct {
	Node     string
	Pool     lsfs.Explanation
	Names    map[lsfs.VolumeID]string // of the volumes in Pool.List that the cluster knows
	Forecast Forecast
}

// ExplainPool walks the maps of a node's pool and says what its bytes are there for; see
// lsfs.Store.Explain. progress, which may be nil, is told how far it is, from 0 to 1; its
// error ends the walk. A node that is not the one called name asks that, unless here.
func (n *Node) ExplainPool(ctx context.Context, name string, exact, here bool, progress func(done float64) error) (*PoolExplained, error) {
	state := n.known()
	node, peers, err := n.poolOf(state, name, here)
	switch {
	case err != nil:
		return nil, err
	case peers != nil:
		return peers.ExplainPool(ctx, node.ID, n.api(node), name, exact, progress)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p, err := n.store.Explain(ctx, exact, func(done float64) {
		if progress == nil {
			return
		}
		if err := progress(done); err != nil {
			cancel(err)
		}
	})
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, err
	}
	x := &PoolExplained{Node: n.id.Name, Pool: *p, Names: map[lsfs.VolumeID]string{}, Forecast: n.history.Load().forecast(time.Now(), p.Live, p.Usable)}
	state = n.known()
	for _, share := range p.List {
		if v := state.Volume(share.ID); v != nil {
			x.Names[share.ID] = v.Name
		}
	}
	return x, nil
}
