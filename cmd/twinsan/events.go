package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// eventPage is one event: events are printed one by one, so that -f shows them
// as they come, and JSON is one object on each line.
type eventPage struct {
	version1
	eventView
}

func (e *eventPage) text(p *printer) {
	p.line("%s  %-7s  %-20s  %-8s  %s", clock(e.Time), e.Severity, e.Code, e.Node, e.Text)
}

func (a *app) eventsCommand() *cobra.Command {
	var follow bool
	var after uint64
	c := &cobra.Command{
		Use: "events", Short: "Show what happened; -f follows", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			get := func(ctx context.Context, client *api.Client) error {
				stream, err := client.Cluster.ListEvents(ctx, &v1.ListEventsRequest{After: after, Follow: follow})
				if err != nil {
					return err
				}
				for {
					e, err := stream.Recv()
					switch {
					case errors.Is(err, io.EOF):
						a.next("twinsan events -f, or twinsan status")
						return nil
					case err != nil && status.Code(err) == codes.Canceled && c.Context().Err() != nil:
						return nil // Ctrl-C ends -f, as it should
					case err != nil:
						return err
					}
					if err := a.printEvent(&eventPage{v1Header, viewEvent(e)}); err != nil {
						return err
					}
				}
			}
			if follow {
				return a.stream(c.Context(), get)
			}
			return a.call(c, get)
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new events until interrupted")
	c.Flags().Uint64Var(&after, "after", 0, "only events after this number")
	return c
}

func (a *app) printEvent(e *eventPage) error {
	if a.output != "json" {
		return a.print(e)
	}
	line, err := json.Marshal(e)
	if err == nil {
		_, err = fmt.Fprintf(a.out, "%s\n", line)
	}
	return err
}
