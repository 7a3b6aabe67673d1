package api

import (
	"context"
	"fmt"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type hostService struct {
	v1.UnimplementedHostsServer
	backend Backend
}

func (s *hostService) ListHosts(ctx context.Context, _ *v1.ListHostsRequest) (*v1.ListHostsResponse, error) {
	hosts, err := s.backend.Hosts(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ListHostsResponse{Hosts: each(hosts, hostMessage)}, nil
}

func (s *hostService) AddHost(ctx context.Context, r *v1.AddHostRequest) (*v1.Host, error) {
	if !server.ValidName(r.GetName()) {
		return nil, fmt.Errorf("%w: %q cannot name a host: want 1 to 63 lower case letters, digits and hyphens", server.ErrInvalid, r.GetName())
	}
	h, err := s.backend.AddHost(ctx, server.HostSpec{
		Name: r.GetName(), Initiators: r.GetInitiators(),
		CHAPUser: r.GetChapUser(), CHAPSecret: r.GetChapSecret(), MutualUser: r.GetMutualUser(), MutualSecret: r.GetMutualSecret(),
	})
	if err != nil {
		return nil, err
	}
	return hostMessage(h), nil
}

func (s *hostService) RemoveHost(ctx context.Context, r *v1.RemoveHostRequest) (*v1.RemoveHostResponse, error) {
	h, err := s.backend.RemoveHost(ctx, r.GetName(), r.GetDryRun(), r.GetInUse())
	if err != nil {
		return nil, err
	}
	return &v1.RemoveHostResponse{Host: hostMessage(h)}, nil
}

func (s *hostService) SetVolumeHosts(ctx context.Context, r *v1.SetVolumeHostsRequest) (*v1.Volume, error) {
	v, err := s.backend.SetVolumeHosts(ctx, r.GetVolume(), r.GetHosts(), r.GetAnyHost())
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *hostService) MapVolume(ctx context.Context, r *v1.MapVolumeRequest) (*v1.Volume, error) {
	v, err := s.backend.MapVolume(ctx, r.GetVolume(), r.GetHosts(), r.GetReadOnly())
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *hostService) UnmapVolume(ctx context.Context, r *v1.UnmapVolumeRequest) (*v1.Volume, error) {
	v, err := s.backend.UnmapVolume(ctx, r.GetVolume(), r.GetHosts())
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}
