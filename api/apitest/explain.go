package apitest

import (
	"context"
	"fmt"
	"time"

	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/server"
)

// ExplainPool explains a pool of 100 GiB, half full, whose history of 12 days grows by
// 1 GiB a day; with exact nothing is estimated.
func (b *Backend) ExplainPool(_ context.Context, name string, exact, _ bool, progress func(float64) error) (*server.PoolExplained, error) {
	if err := b.begin(fmt.Sprintf("ExplainPool %s %v", name, exact)); err != nil {
		return nil, err
	}
	defer b.Mu.Unlock()
	for i := range b.State.Nodes {
		if m := &b.State.Nodes[i]; m.Name != name || m.Role != server.Data {
			continue
		}
		for _, done := range []float64{0.25, 0.5, 1} {
			if err := progress(done); err != nil {
				return nil, err
			}
		}
		x := &server.PoolExplained{Node: name, Names: map[lsfs.VolumeID]string{1: "vm1"}, Pool: lsfs.Explanation{
			Size: 100 << 30, Volumes: 40 << 30, Snapshots: 5 << 30, Leaving: 1 << 30, Metadata: 2 << 30, Garbage: 10 << 30, Returning: 2 << 30, Reserved: 16 << 30, Available: 24 << 30,
			Usable: 76 << 30, Live: 48 << 30, Mapped: 120 << 30, Deduplicated: 60 << 30, Compressed: 20 << 30, Zeros: 3 << 30, Sample: 4,
			List: []lsfs.VolumeShare{
				{ID: 1, Size: 1 << 40, Mapped: 120 << 30, Reduced: 60 << 30, Stored: 40 << 30, Snapshots: 3, Own: 30 << 30, SnapshotsOnly: 4 << 30, Frees: 42 << 30, FreesMetadata: 1 << 30},
				{ID: 9, Deleted: true, Snapshots: 1, SnapshotsOnly: 1 << 30, Frees: 1 << 30},
			}},
			Forecast: server.Forecast{History: 12 * 24 * time.Hour, Needed: 24 * time.Hour, Known: true, Growth: 1 << 30, Levels: []server.ForecastLevel{
				{Percent: 80, Days: 12.8}, {Percent: 90, Days: 20.4}, {Percent: 100, Days: 28},
			}},
		}
		if exact {
			x.Pool.Sample = 1
			x.Forecast = server.Forecast{History: 5 * time.Hour, Needed: 24 * time.Hour}
		}
		return x, nil
	}
	return nil, fmt.Errorf("node %q: %w", name, server.ErrNotFound)
}
