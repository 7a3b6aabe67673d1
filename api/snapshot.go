package api

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/lsfs"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

type snapshotService struct {
	v1.UnimplementedSnapshotsServer
	backend Backend
}

func snapshotMessage(s *server.Snapshot) *v1.Snapshot {
	return &v1.Snapshot{
		Id: uint64(s.ID), Name: s.Name, Volume: s.Volume, State: enum[v1.SnapshotState](v1.SnapshotState_value, "SNAPSHOT_STATE_", string(s.State)),
		Created: stamp(s.Created), SizeBytes: s.Size, MappedBytes: s.Mapped, Group: s.Group, Scheduled: s.Scheduled, Clones: s.Clones,
	}
}

func scheduleMessage(s *server.Schedule) *v1.Schedule {
	return &v1.Schedule{Volume: s.Volume, Every: durationpb.New(s.Every), Keep: uint32(s.Keep), KeepDaily: uint32(s.KeepDaily),
		Last: stamp(s.Last), Next: stamp(s.Next), Snapshots: uint32(s.Snapshots)}
}

func (s *snapshotService) ListSnapshots(ctx context.Context, r *v1.ListSnapshotsRequest) (*v1.ListSnapshotsResponse, error) {
	list, err := s.backend.Snapshots(ctx, r.GetVolume())
	if err != nil {
		return nil, err
	}
	return &v1.ListSnapshotsResponse{Snapshots: each(list, snapshotMessage)}, nil
}

func (s *snapshotService) GetSnapshot(ctx context.Context, r *v1.GetSnapshotRequest) (*v1.Snapshot, error) {
	list, err := s.backend.Snapshots(ctx, r.GetVolume())
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].Name == r.GetName() {
			return snapshotMessage(&list[i]), nil
		}
	}
	return nil, fmt.Errorf("snapshot %s@%s: %w", r.GetVolume(), r.GetName(), server.ErrNotFound)
}

func (s *snapshotService) CreateSnapshots(ctx context.Context, r *v1.CreateSnapshotsRequest) (*v1.CreateSnapshotsResponse, error) {
	if !server.ValidName(r.GetName()) {
		return nil, fmt.Errorf("%w: %q cannot name a snapshot: want 1 to 63 lower case letters, digits and hyphens", server.ErrInvalid, r.GetName())
	}
	if len(r.GetRequestId()) > 64 {
		return nil, fmt.Errorf("%w: request_id is longer than 64 bytes", server.ErrInvalid)
	}
	list, err := s.backend.CreateSnapshots(ctx, r.GetName(), r.GetVolumes(), r.GetRequestId())
	if err != nil {
		return nil, err
	}
	return &v1.CreateSnapshotsResponse{Snapshots: each(list, snapshotMessage)}, nil
}

func (s *snapshotService) DeleteSnapshot(ctx context.Context, r *v1.DeleteSnapshotRequest) (*v1.DeleteSnapshotResponse, error) {
	x, err := s.backend.DeleteSnapshot(ctx, r.GetVolume(), r.GetName(), r.GetDryRun())
	if err != nil {
		return nil, err
	}
	return &v1.DeleteSnapshotResponse{Snapshot: snapshotMessage(x)}, nil
}

func (s *snapshotService) ListChanges(r *v1.ListChangesRequest, stream grpc.ServerStreamingServer[v1.Changes]) error {
	spec := server.ChangesSpec{Volume: r.GetVolume(), From: r.GetFrom(), To: r.GetTo(), Offset: r.GetOffset(), OwnerOnly: r.GetOwnerOnly()}
	return s.backend.Changes(stream.Context(), spec, func(ranges []server.ChangedRange, next uint64) error {
		return stream.Send(&v1.Changes{NextOffset: next, Ranges: each(ranges, func(x *server.ChangedRange) *v1.ChangedRange {
			return &v1.ChangedRange{Offset: x.Offset, Length: x.Length, Hole: x.Hole}
		})})
	})
}

func (s *snapshotService) CloneSnapshot(ctx context.Context, r *v1.CloneSnapshotRequest) (*v1.Volume, error) {
	if !server.ValidName(r.GetName()) {
		return nil, fmt.Errorf("%w: %q cannot name a volume: want 1 to 63 lower case letters, digits and hyphens", server.ErrInvalid, r.GetName())
	}
	if len(r.GetRequestId()) > 64 {
		return nil, fmt.Errorf("%w: request_id is longer than 64 bytes", server.ErrInvalid)
	}
	v, err := s.backend.CloneSnapshot(ctx, server.CloneSpec{
		Volume: r.GetVolume(), Snapshot: r.GetSnapshot(), Name: r.GetName(), Size: r.GetSizeBytes(), Hosts: r.GetHosts(), AnyHost: r.GetAnyHost(), RequestID: r.GetRequestId(),
	})
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *snapshotService) RollBackVolume(ctx context.Context, r *v1.RollBackVolumeRequest) (*v1.RollBackVolumeResponse, error) {
	v, x, sessions, err := s.backend.RollBackVolume(ctx, r.GetVolume(), r.GetSnapshot(), r.GetDryRun(), r.GetInUse())
	if err != nil {
		return nil, err
	}
	return &v1.RollBackVolumeResponse{Volume: volumeMessage(v), Snapshot: snapshotMessage(x), Sessions: each(sessions, sessionMessage)}, nil
}

func (s *snapshotService) ListSchedules(ctx context.Context, _ *v1.ListSchedulesRequest) (*v1.ListSchedulesResponse, error) {
	list, err := s.backend.Schedules(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ListSchedulesResponse{Schedules: each(list, scheduleMessage)}, nil
}

func (s *snapshotService) SetSchedule(ctx context.Context, r *v1.SetScheduleRequest) (*v1.Schedule, error) {
	if r.GetEvery() == nil || r.GetEvery().CheckValid() != nil {
		return nil, fmt.Errorf("%w: how often is missing", server.ErrInvalid)
	}
	x, err := s.backend.SetSchedule(ctx, r.GetVolume(), r.GetEvery().AsDuration(), int(r.GetKeep()), int(r.GetKeepDaily()))
	if err != nil {
		return nil, err
	}
	return scheduleMessage(x), nil
}

func (s *snapshotService) RemoveSchedule(ctx context.Context, r *v1.RemoveScheduleRequest) (*v1.RemoveScheduleResponse, error) {
	return &v1.RemoveScheduleResponse{}, s.backend.RemoveSchedule(ctx, r.GetVolume())
}

func (s *peerService) SnapshotStep(ctx context.Context, r *v1.SnapshotStepRequest) (*v1.SnapshotStepResponse, error) {
	found, err := s.backend.SnapshotStep(ctx, server.SnapshotStep{
		Act: server.SnapshotAct(r.GetStep()), Volume: lsfs.VolumeID(r.GetVolume()), Snapshot: lsfs.VolumeID(r.GetSnapshot()), Group: lsfs.VolumeID(r.GetGroup()),
	})
	if err != nil {
		return nil, err
	}
	return &v1.SnapshotStepResponse{Found: found}, nil
}

// SnapshotStep asks the owner of a volume to do one step of a snapshot. An error
// wraps server.ErrNotReady when the owner is changing or does not answer.
func (p *Peers) SnapshotStep(ctx context.Context, node replication.NodeID, address string, step server.SnapshotStep) (bool, error) {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return false, err
	}
	r, err := v1.NewPeersClient(conn).SnapshotStep(ctx, &v1.SnapshotStepRequest{
		Step: string(step.Act), Volume: uint64(step.Volume), Snapshot: uint64(step.Snapshot), Group: uint64(step.Group),
	})
	if status.Code(err) == codes.Unavailable {
		err = fmt.Errorf("%w: %w", server.ErrNotReady, err)
	}
	return r.GetFound(), err
}

// Changes passes on the changes that another node finds.
func (p *Peers) Changes(ctx context.Context, node replication.NodeID, address string, spec server.ChangesSpec, send func([]server.ChangedRange, uint64) error) error {
	conn, err := p.conn(peerKey{node, address})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx) // ends the stream when send fails
	defer cancel()
	stream, err := v1.NewSnapshotsClient(conn).ListChanges(ctx, &v1.ListChangesRequest{
		Volume: spec.Volume, From: spec.From, To: spec.To, Offset: spec.Offset, OwnerOnly: true,
	})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := send(each(m.Ranges, func(x **v1.ChangedRange) server.ChangedRange {
			r := *x
			return server.ChangedRange{Offset: r.Offset, Length: r.Length, Hole: r.Hole}
		}), m.NextOffset); err != nil {
			return err
		}
	}
}
