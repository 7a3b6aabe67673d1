package api

import (
	"context"
	"fmt"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type volumeService struct {
	v1.UnimplementedVolumesServer
	backend Backend
}

func (s *volumeService) ListVolumes(ctx context.Context, _ *v1.ListVolumesRequest) (*v1.ListVolumesResponse, error) {
	st, err := s.backend.Status(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ListVolumesResponse{Volumes: each(st.Volumes, volumeMessage)}, nil
}

func (s *volumeService) GetVolume(ctx context.Context, r *v1.GetVolumeRequest) (*v1.Volume, error) {
	st, err := s.backend.Status(ctx)
	if err != nil {
		return nil, err
	}
	for i := range st.Volumes {
		if v := &st.Volumes[i]; v.Name == r.GetName() || v.UUID == r.GetName() {
			return volumeMessage(v), nil
		}
	}
	return nil, fmt.Errorf("volume %q: %w", r.GetName(), server.ErrNotFound)
}

func (s *volumeService) CreateVolume(ctx context.Context, r *v1.CreateVolumeRequest) (*v1.Volume, error) {
	if !server.ValidName(r.GetName()) {
		return nil, fmt.Errorf("%w: %q cannot name a volume: want 1 to 63 lower case letters, digits and hyphens", server.ErrInvalid, r.GetName())
	}
	if len(r.GetRequestId()) > 64 {
		return nil, fmt.Errorf("%w: request_id is longer than 64 bytes", server.ErrInvalid)
	}
	policy, err := server.ParseWritePolicy(r.GetWritePolicy())
	if err != nil {
		return nil, err
	}
	v, err := s.backend.CreateVolume(ctx, server.VolumeSpec{
		Name: r.GetName(), Size: r.GetSizeBytes(), Hosts: r.GetHosts(), AnyHost: r.GetAnyHost(),
		Dedup: !r.GetNoDedup(), Compress: !r.GetNoCompress(), LogicalBlock: r.GetLogicalBlockBytes(), RequestID: r.GetRequestId(),
		PhysicalBlock: r.GetPhysicalBlockBytes(), Thick: r.GetThick(), MirroredRAM: policy == server.MirroredRAM,
	})
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *volumeService) DeleteVolume(ctx context.Context, r *v1.DeleteVolumeRequest) (*v1.DeleteVolumeResponse, error) {
	v, sessions, err := s.backend.DeleteVolume(ctx, r.GetName(), r.GetDryRun(), r.GetInUse(), r.GetWithSnapshots())
	if err != nil {
		return nil, err
	}
	return &v1.DeleteVolumeResponse{Volume: volumeMessage(v), Sessions: each(sessions, sessionMessage)}, nil
}

func (s *volumeService) ResizeVolume(ctx context.Context, r *v1.ResizeVolumeRequest) (*v1.Volume, error) {
	v, err := s.backend.ResizeVolume(ctx, r.GetName(), r.GetSizeBytes())
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *volumeService) SetVolume(ctx context.Context, r *v1.SetVolumeRequest) (*v1.Volume, error) {
	if r.GetWritePolicy() == "" {
		return s.GetVolume(ctx, &v1.GetVolumeRequest{Name: r.GetName()})
	}
	policy, err := server.ParseWritePolicy(r.GetWritePolicy())
	if err != nil {
		return nil, err
	}
	v, err := s.backend.SetWritePolicy(ctx, r.GetName(), policy)
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *volumeService) MoveVolume(ctx context.Context, r *v1.MoveVolumeRequest) (*v1.Volume, error) {
	v, err := s.backend.MoveVolume(ctx, r.GetName(), r.GetTo(), r.GetOwnerOnly())
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *volumeService) ClearReservations(ctx context.Context, r *v1.ClearReservationsRequest) (*v1.ClearReservationsResponse, error) {
	v, cleared, err := s.backend.ClearReservations(ctx, r.GetName(), r.GetDryRun(), r.GetOwnerOnly())
	if err != nil {
		return nil, err
	}
	return &v1.ClearReservationsResponse{Volume: volumeMessage(v), Cleared: reservationsMessage(cleared)}, nil
}

func (s *volumeService) CheckVolume(ctx context.Context, r *v1.CheckVolumeRequest) (*v1.CheckVolumeResponse, error) {
	digests, equal, err := s.backend.CheckVolume(ctx, r.GetName(), r.GetOwnerOnly())
	if err != nil {
		return nil, err
	}
	return &v1.CheckVolumeResponse{Equal: equal, Digests: each(digests, digestMessage)}, nil
}
