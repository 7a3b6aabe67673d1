package api

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/twinsan/twinsan/server"
)

// table is the one translation of errors to gRPC codes. The first row that
// matches by errors.Is wins.
var table = []struct {
	err  error
	code codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{server.ErrNotFound, codes.NotFound},
	{server.ErrExists, codes.AlreadyExists},
	{server.ErrInvalid, codes.InvalidArgument},
	{server.ErrRefused, codes.FailedPrecondition},
	{server.ErrNoQuorum, codes.Unavailable},
	{server.ErrNotReady, codes.Unavailable},
	{server.ErrOutcomeUnknown, codes.Unknown},
}

// toStatus gives err the code that clients act on; the text stays whole.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, row := range table {
		if errors.Is(err, row.err) {
			return status.Error(row.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}
