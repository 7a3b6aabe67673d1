package api

import (
	"context"
	"fmt"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type nodeService struct {
	v1.UnimplementedNodesServer
	backend Backend
}

func (s *nodeService) ListNodes(ctx context.Context, _ *v1.ListNodesRequest) (*v1.ListNodesResponse, error) {
	st, err := s.backend.Status(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ListNodesResponse{Nodes: each(st.Nodes, nodeMessage)}, nil
}

func (s *nodeService) GetNode(ctx context.Context, r *v1.GetNodeRequest) (*v1.Node, error) {
	st, err := s.backend.Status(ctx)
	if err != nil {
		return nil, err
	}
	for i := range st.Nodes {
		if st.Nodes[i].Name == r.GetName() {
			return nodeMessage(&st.Nodes[i]), nil
		}
	}
	return nil, fmt.Errorf("node %q: %w", r.GetName(), server.ErrNotFound)
}

func (s *nodeService) DrainNode(ctx context.Context, r *v1.DrainNodeRequest) (*v1.Node, error) {
	m, err := s.backend.DrainNode(ctx, r.GetName(), !r.GetResume())
	if err != nil {
		return nil, err
	}
	return nodeMessage(m), nil
}

func (s *nodeService) ScrubNode(ctx context.Context, r *v1.ScrubNodeRequest) (*v1.Scrub, error) {
	action := server.ScrubAction(r.GetAction())
	if action == "" {
		action = server.ScrubShow
	}
	x, err := s.backend.ScrubNode(ctx, r.GetName(), action, r.GetFullSpeed(), r.GetHere())
	if err != nil {
		return nil, err
	}
	return scrubMessage(x), nil
}

func (s *nodeService) MergeNode(ctx context.Context, r *v1.MergeNodeRequest) (*v1.Merge, error) {
	action := server.MergeAction(r.GetAction())
	if action == "" {
		action = server.MergeShow
	}
	m, err := s.backend.MergeNode(ctx, r.GetName(), action, r.GetHere())
	if err != nil {
		return nil, err
	}
	return mergeMessage(m), nil
}

type sessionService struct {
	v1.UnimplementedSessionsServer
	backend NodeBackend
}

func (s *sessionService) ListSessions(ctx context.Context, _ *v1.ListSessionsRequest) (*v1.ListSessionsResponse, error) {
	sessions, unreachable, err := s.backend.Sessions(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ListSessionsResponse{Sessions: each(sessions, sessionMessage), Unreachable: each(unreachable, unreachableMessage)}, nil
}

type peerService struct {
	v1.UnimplementedPeersServer
	backend Backend
}

func (s *peerService) Report(ctx context.Context, _ *v1.ReportRequest) (*v1.NodeReport, error) {
	r, err := s.backend.Report(ctx)
	if err != nil {
		return nil, err
	}
	return reportMessage(r), nil
}
