package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

func (s *nodeService) ExplainPool(r *v1.ExplainPoolRequest, stream grpc.ServerStreamingServer[v1.ExplainPoolResponse]) error {
	x, err := s.backend.ExplainPool(stream.Context(), r.GetName(), r.GetExact(), r.GetHere(), func(done float64) error {
		return stream.Send(&v1.ExplainPoolResponse{Done: done})
	})
	if err != nil {
		return err
	}
	return stream.Send(&v1.ExplainPoolResponse{Done: 1, Pool: explainedMessage(x)})
}

// ExplainPool passes on what another node finds.
func (p *Peers) ExplainPool(ctx context.Context, node replication.NodeID, address, name string, exact bool, progress func(done float64) error) (*server.PoolExplained, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx) // ends the walk when progress fails
	defer cancel()
	stream, err := v1.NewNodesClient(conn).ExplainPool(ctx, &v1.ExplainPoolRequest{Name: name, Exact: exact, Here: true})
	if err != nil {
		return nil, err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("node %s: %w", name, io.ErrUnexpectedEOF)
		}
		if err != nil {
			return nil, err
		}
		if m.Pool != nil {
			return explainedOf(m.Pool), nil
		}
		if progress == nil {
			continue
		}
		if err := progress(m.Done); err != nil {
			return nil, err
		}
	}
}

func explainedMessage(x *server.PoolExplained) *v1.PoolExplained {
	p := &x.Pool
	b := func(n int64) uint64 { return uint64(max(n, 0)) }
	m := &v1.PoolExplained{
		Node: x.Node, SizeBytes: b(p.Size), VolumesBytes: b(p.Volumes), SnapshotsBytes: b(p.Snapshots), LeavingBytes: b(p.Leaving), UnsettledBytes: b(p.Unsettled),
		MetadataBytes: b(p.Metadata), GarbageBytes: b(p.Garbage), ReturningBytes: b(p.Returning), ReservedBytes: b(p.Reserved), AvailableBytes: b(p.Available),
		UsableBytes: b(p.Usable), LiveBytes: b(p.Live), MappedBytes: b(p.Mapped), DeduplicatedBytes: b(p.Deduplicated), CompressedBytes: b(p.Compressed),
		ZerosBytes: b(p.Zeros), Sample: uint64(p.Sample),
		Forecast: &v1.Forecast{HistorySeconds: int64(x.Forecast.History / time.Second), NeededSeconds: int64(x.Forecast.Needed / time.Second),
			Known: x.Forecast.Known, GrowthBytesPerDay: x.Forecast.Growth},
	}
	for _, v := range p.List {
		m.Volumes = append(m.Volumes, &v1.VolumeShare{
			Id: uint64(v.ID), Name: x.Names[v.ID], Deleted: v.Deleted, SizeBytes: b(v.Size), MappedBytes: b(v.Mapped), ReducedBytes: b(v.Reduced), StoredBytes: b(v.Stored),
			Snapshots: uint64(v.Snapshots), OwnBytes: b(v.Own), SnapshotsOnlyBytes: b(v.SnapshotsOnly), FreesBytes: b(v.Frees), FreesMetadataBytes: b(v.FreesMetadata),
		})
	}
	for _, l := range x.Forecast.Levels {
		m.Forecast.Levels = append(m.Forecast.Levels, &v1.ForecastLevel{Percent: uint32(l.Percent), Days: l.Days})
	}
	return m
}

func explainedOf(m *v1.PoolExplained) *server.PoolExplained {
	x := &server.PoolExplained{Node: m.Node, Names: map[lsfs.VolumeID]string{}, Pool: lsfs.Explanation{
		Size: int64(m.SizeBytes), Volumes: int64(m.VolumesBytes), Snapshots: int64(m.SnapshotsBytes), Leaving: int64(m.LeavingBytes), Unsettled: int64(m.UnsettledBytes),
		Metadata: int64(m.MetadataBytes), Garbage: int64(m.GarbageBytes), Returning: int64(m.ReturningBytes), Reserved: int64(m.ReservedBytes), Available: int64(m.AvailableBytes),
		Usable: int64(m.UsableBytes), Live: int64(m.LiveBytes), Mapped: int64(m.MappedBytes), Deduplicated: int64(m.DeduplicatedBytes), Compressed: int64(m.CompressedBytes),
		Zeros: int64(m.ZerosBytes), Sample: int(m.Sample),
	}}
	for _, v := range m.Volumes {
		x.Pool.List = append(x.Pool.List, lsfs.VolumeShare{
			ID: lsfs.VolumeID(v.Id), Deleted: v.Deleted, Size: int64(v.SizeBytes), Mapped: int64(v.MappedBytes), Reduced: int64(v.ReducedBytes), Stored: int64(v.StoredBytes),
			Snapshots: int(v.Snapshots), Own: int64(v.OwnBytes), SnapshotsOnly: int64(v.SnapshotsOnlyBytes), Frees: int64(v.FreesBytes), FreesMetadata: int64(v.FreesMetadataBytes),
		})
		if v.Name != "" {
			x.Names[lsfs.VolumeID(v.Id)] = v.Name
		}
	}
	f := m.GetForecast()
	x.Forecast = server.Forecast{History: time.Duration(f.GetHistorySeconds()) * time.Second, Needed: time.Duration(f.GetNeededSeconds()) * time.Second,
		Known: f.GetKnown(), Growth: f.GetGrowthBytesPerDay()}
	for _, l := range f.GetLevels() {
		x.Forecast.Levels = append(x.Forecast.Levels, server.ForecastLevel{Percent: int(l.Percent), Days: l.Days})
	}
	return x
}
