package api

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type clusterService struct {
	v1.UnimplementedClusterServer
	backend ClusterBackend
}

func (s *clusterService) GetStatus(ctx context.Context, _ *v1.GetStatusRequest) (*v1.Status, error) {
	st, err := s.backend.Status(ctx)
	if err != nil {
		return nil, err
	}
	return statusMessage(st), nil
}

func (s *clusterService) GetCluster(ctx context.Context, _ *v1.GetClusterRequest) (*v1.ClusterInfo, error) {
	info, err := s.backend.Info(ctx)
	if err != nil {
		return nil, err
	}
	return infoMessage(info), nil
}

// tokenMax is the longest life of a token.
const tokenMax = 7 * 24 * time.Hour

func (s *clusterService) CreateToken(ctx context.Context, r *v1.CreateTokenRequest) (*v1.Token, error) {
	ttl := r.GetTtl().AsDuration()
	if ttl < 0 || ttl > tokenMax {
		return nil, fmt.Errorf("%w: a token lives at most %s", server.ErrInvalid, tokenMax)
	}
	kind := server.Data
	switch r.GetRole() {
	case v1.Role_ROLE_UNSPECIFIED, v1.Role_ROLE_DATA:
	case v1.Role_ROLE_WITNESS:
		kind = server.Witness
	default:
		return nil, fmt.Errorf("%w: role %v is not known", server.ErrInvalid, r.GetRole())
	}
	t, err := s.backend.CreateToken(ctx, kind, ttl)
	if err != nil {
		return nil, err
	}
	return &v1.Token{Token: t.Text, Role: role(t.Role), Expires: stamp(t.Expires), Addresses: t.Addresses}, nil
}

func (s *clusterService) SetDiscovery(ctx context.Context, r *v1.SetDiscoveryRequest) (*v1.ClusterInfo, error) {
	mode := server.DiscoveryMode(Word(r.GetMode(), "DISCOVERY_MODE_"))
	if mode != server.DiscoveryHost && mode != server.DiscoveryNone && mode != server.DiscoveryCHAP {
		return nil, fmt.Errorf("%w: discovery mode %v is not known", server.ErrInvalid, r.GetMode())
	}
	if err := s.backend.SetDiscovery(ctx, server.DiscoverySpec{
		Mode: mode, User: r.GetChapUser(), Secret: r.GetChapSecret(), MutualUser: r.GetMutualUser(), MutualSecret: r.GetMutualSecret(),
	}); err != nil {
		return nil, err
	}
	return s.GetCluster(ctx, &v1.GetClusterRequest{})
}

// maxRequestBytes bounds a certificate request before it is parsed.
const maxRequestBytes = 16 << 10

func (s *clusterService) IssueCertificate(ctx context.Context, r *v1.IssueCertificateRequest) (*v1.Certificate, error) {
	if len(r.GetCsr()) > maxRequestBytes {
		return nil, fmt.Errorf("%w: the certificate request is larger than 16 KiB", server.ErrInvalid)
	}
	if !server.ValidName(r.GetName()) {
		return nil, fmt.Errorf("%w: %q cannot name an administrator: want lower case letters, digits and hyphens", server.ErrInvalid, r.GetName())
	}
	certificate, ca, expires, err := s.backend.IssueCertificate(ctx, r.GetName(), r.GetCsr())
	if err != nil {
		return nil, err
	}
	return &v1.Certificate{CertificatePem: certificate, CaPem: ca, Expires: stamp(expires)}, nil
}

func (s *clusterService) ListEvents(r *v1.ListEventsRequest, stream grpc.ServerStreamingServer[v1.Event]) error {
	return s.backend.Events(stream.Context(), r.GetAfter(), r.GetFollow(), func(e server.Event) error {
		return stream.Send(eventMessage(&e))
	})
}
