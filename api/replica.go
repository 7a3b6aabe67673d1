package api

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/twinsan/twinsan/api/v1"
	"github.com/twinsan/twinsan/replication"
	"github.com/twinsan/twinsan/server"
)

type replicaService struct {
	v1.UnimplementedReplicasServer
	backend ReplicaBackend
}

func (s *replicaService) AddReplica(ctx context.Context, r *v1.AddReplicaRequest) (*v1.Operation, error) {
	o, err := s.backend.AddReplica(ctx, r.GetVolume(), r.GetNode(), "")
	if err != nil {
		return nil, err
	}
	return operationMessage(o), nil
}

func (s *replicaService) MoveReplica(ctx context.Context, r *v1.MoveReplicaRequest) (*v1.Operation, error) {
	if r.GetFrom() == "" {
		return nil, fmt.Errorf("%w: the node whose replica goes is missing", server.ErrInvalid)
	}
	o, err := s.backend.AddReplica(ctx, r.GetVolume(), r.GetTo(), r.GetFrom())
	if err != nil {
		return nil, err
	}
	return operationMessage(o), nil
}

func (s *replicaService) RemoveReplica(ctx context.Context, r *v1.RemoveReplicaRequest) (*v1.Volume, error) {
	v, err := s.backend.RemoveReplica(ctx, r.GetVolume(), r.GetNode(), r.GetForce(), r.GetDryRun())
	if err != nil {
		return nil, err
	}
	return volumeMessage(v), nil
}

func (s *replicaService) PromoteVolume(ctx context.Context, r *v1.PromoteVolumeRequest) (*v1.PromoteVolumeResponse, error) {
	p, err := s.backend.Promote(ctx, server.PromoteSpec{
		Volume: r.GetVolume(), Node: r.GetNode(), Epoch: r.GetEpoch(), Inconsistent: r.GetInconsistent(), DryRun: r.GetDryRun(),
	})
	if err != nil {
		return nil, err
	}
	return &v1.PromoteVolumeResponse{Volume: volumeMessage(p.Volume), Epoch: p.Epoch, Facts: p.Facts, Refuse: p.Refuse}, nil
}

type operationService struct {
	v1.UnimplementedOperationsServer
	backend ReplicaBackend
}

func (s *operationService) ListOperations(ctx context.Context, _ *v1.ListOperationsRequest) (*v1.ListOperationsResponse, error) {
	list, err := s.backend.Operations(ctx)
	if err != nil {
		return nil, err
	}
	return &v1.ListOperationsResponse{Operations: each(list, operationMessage)}, nil
}

func (s *operationService) GetOperation(ctx context.Context, r *v1.GetOperationRequest) (*v1.Operation, error) {
	list, err := s.backend.Operations(ctx)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].ID == r.GetId() {
			return operationMessage(&list[i]), nil
		}
	}
	return nil, fmt.Errorf("operation %d: %w", r.GetId(), server.ErrNotFound)
}

func (s *operationService) CancelOperation(ctx context.Context, r *v1.CancelOperationRequest) (*v1.Operation, error) {
	o, err := s.backend.CancelOperation(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return operationMessage(o), nil
}

func operationMessage(o *server.Operation) *v1.Operation {
	return &v1.Operation{
		Id: o.ID, Kind: enum[v1.OperationKind](v1.OperationKind_value, "OPERATION_KIND_", string(o.Kind)),
		State:  enum[v1.OperationState](v1.OperationState_value, "OPERATION_STATE_", string(o.State)),
		Volume: o.Volume, From: o.From, To: o.To, Started: stamp(o.Started), Ended: stamp(o.Ended), Text: o.Text,
		DoneBytes: o.Done, TotalBytes: o.Total, Left: span(o.Left),
	}
}

// span is an optional duration: absent when zero.
func span(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func standingMessage(s *replication.Standing) *v1.Standing {
	if s == nil {
		return nil
	}
	return &v1.Standing{Epoch: s.Epoch, Sequence: s.Sequence, Consistent: s.Consistent}
}

func standingOf(m *v1.Standing) *replication.Standing {
	if m == nil {
		return nil
	}
	return &replication.Standing{Epoch: m.Epoch, Sequence: m.Sequence, Consistent: m.Consistent}
}
