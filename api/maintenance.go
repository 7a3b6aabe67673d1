package api

import (
	"context"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/server"
)

type maintenanceService struct {
	v1.UnimplementedMaintenanceServer
	backend Backend
}

func (s *maintenanceService) SetMaintenance(ctx context.Context, r *v1.SetMaintenanceRequest) (*v1.SetMaintenanceResponse, error) {
	m, hurt, err := s.backend.SetMaintenance(ctx, r.GetNode(), !r.GetLeave(), r.GetForce(), r.GetDryRun())
	if err != nil {
		return nil, err
	}
	return &v1.SetMaintenanceResponse{Node: nodeMessage(m), Hurt: hurt}, nil
}

func (s *maintenanceService) EvacuateNode(ctx context.Context, r *v1.EvacuateNodeRequest) (*v1.Node, error) {
	m, err := s.backend.EvacuateNode(ctx, r.GetNode(), r.GetTo(), r.GetStop())
	if err != nil {
		return nil, err
	}
	return nodeMessage(m), nil
}

func (s *maintenanceService) RemoveNode(ctx context.Context, r *v1.RemoveNodeRequest) (*v1.RemoveNodeResponse, error) {
	effects, err := s.backend.RemoveNode(ctx, r.GetNode(), r.GetLost(), r.GetDryRun())
	if err != nil {
		return nil, err
	}
	return &v1.RemoveNodeResponse{Effects: effects}, nil
}

func (s *maintenanceService) SetBalance(ctx context.Context, r *v1.SetBalanceRequest) (*v1.ClusterInfo, error) {
	if err := s.backend.SetBalance(ctx, r.GetOn(), r.GetAfter().AsDuration()); err != nil {
		return nil, err
	}
	return s.info(ctx)
}

func (s *maintenanceService) SetResyncRate(ctx context.Context, r *v1.SetResyncRateRequest) (*v1.ClusterInfo, error) {
	if err := s.backend.SetResyncRate(ctx, r.GetMibPerSecond()); err != nil {
		return nil, err
	}
	return s.info(ctx)
}

func (s *maintenanceService) SetQuorum(ctx context.Context, r *v1.SetQuorumRequest) (*v1.ClusterInfo, error) {
	if err := s.backend.SetQuorum(ctx, server.QuorumMode(Word(r.GetMode(), "QUORUM_MODE_")), r.GetPreferredNode()); err != nil {
		return nil, err
	}
	return s.info(ctx)
}

func (s *maintenanceService) info(ctx context.Context) (*v1.ClusterInfo, error) {
	i, err := s.backend.Info(ctx)
	if err != nil {
		return nil, err
	}
	return infoMessage(i), nil
}

func (s *maintenanceService) GetUpgradePlan(ctx context.Context, _ *v1.GetUpgradePlanRequest) (*v1.UpgradePlan, error) {
	p, err := s.backend.UpgradePlan(ctx)
	if err != nil {
		return nil, err
	}
	return planMessage(p), nil
}

func (s *maintenanceService) RaiseLevel(ctx context.Context, r *v1.RaiseLevelRequest) (*v1.UpgradePlan, error) {
	if err := s.backend.RaiseLevel(ctx, int(r.GetLevel())); err != nil {
		return nil, err
	}
	return s.GetUpgradePlan(ctx, &v1.GetUpgradePlanRequest{})
}

func planMessage(p *server.UpgradePlan) *v1.UpgradePlan {
	return &v1.UpgradePlan{
		Level: uint32(p.Level), Next: uint32(p.Next), Ready: p.Ready, Advice: p.Advice, Unhealthy: p.Unhealthy,
		Nodes: each(p.Nodes, func(n *server.UpgradeNode) *v1.UpgradeNode {
			return &v1.UpgradeNode{Name: n.Name, Version: n.Version, Level: uint32(n.Level), Error: n.Error}
		}),
	}
}
