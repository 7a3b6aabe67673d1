package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// operationView is a change that takes its time.
type operationView struct {
	ID      uint64     `json:"id"`
	Kind    string     `json:"kind"`
	State   string     `json:"state"`
	Volume  string     `json:"volume"`
	From    string     `json:"from,omitempty"`
	To      string     `json:"to"`
	Started *time.Time `json:"started,omitempty"`
	Ended   *time.Time `json:"ended,omitempty"`
	Text    string     `json:"text,omitempty"`
	Done    uint64     `json:"done_bytes"`
	Total   uint64     `json:"total_bytes"`
	Left    float64    `json:"left_seconds,omitempty"`
}

func viewOperation(o *v1.Operation) operationView {
	return operationView{o.Id, api.Word(o.Kind, "OPERATION_KIND_"), api.Word(o.State, "OPERATION_STATE_"), o.Volume, o.From, o.To,
		moment(api.Time(o.Started)), moment(api.Time(o.Ended)), o.Text, o.DoneBytes, o.TotalBytes, o.Left.AsDuration().Seconds()}
}

// what says in words what an operation does.
func (o *operationView) what() string {
	switch o.Kind {
	case "replica_add":
		return fmt.Sprintf("a copy of volume %s for node %s", o.Volume, o.To)
	case "replica_move":
		return fmt.Sprintf("the copy of volume %s moves from node %s to %s", o.Volume, o.From, o.To)
	}
	return o.Kind + " of volume " + o.Volume
}

// progress draws how far it is; empty when that cannot be told.
func (o *operationView) progress() string {
	if o.State != "running" || o.Total == 0 {
		return ""
	}
	return bar(o.Done, o.Total) + timeLeft(o.Left)
}

type operationPage struct {
	version1
	Operation operationView `json:"operation"`
}

func (x *operationPage) text(p *printer) {
	o := &x.Operation
	p.facts("operation", fmt.Sprint(o.ID), "what", o.what(), "state", o.State, "progress", o.progress(), "note", o.Text, "started", since(o.Started), "ended", since(o.Ended))
}

type operationsPage struct {
	version1
	Operations []operationView `json:"operations"`
}

func (x *operationsPage) text(p *printer) {
	rows := [][]string{}
	for i := range x.Operations {
		o := &x.Operations[i]
		note := o.progress()
		if note == "" {
			note = o.Text
		}
		rows = append(rows, []string{fmt.Sprint(o.ID), o.State, o.what(), since(o.Started), note})
	}
	p.table("ID STATE WHAT STARTED PROGRESS", rows)
}

// operationID reads the number of an operation.
func operationID(text string) (uint64, error) {
	id, err := strconv.ParseUint(text, 10, 64)
	if err != nil || id == 0 {
		return 0, usage("%q is not the number of an operation\n  see: twinsan op list", text)
	}
	return id, nil
}

func (a *app) operationCommand() *cobra.Command {
	var all bool
	listing := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the operations that run, or all that are remembered", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Operations.ListOperations(ctx, &v1.ListOperationsRequest{})
				if err != nil {
					return err
				}
				page := &operationsPage{v1Header, []operationView{}}
				for _, o := range r.Operations {
					if all || o.State == v1.OperationState_OPERATION_STATE_RUNNING {
						page.Operations = append(page.Operations, viewOperation(o))
					}
				}
				return a.print(page)
			})
		},
	}
	listing.Flags().BoolVar(&all, "all", false, "those that have ended, too")
	byID := func(use, short string, run func(c *cobra.Command, id uint64) error) *cobra.Command {
		return &cobra.Command{Use: use + " ID", Short: short, Args: arguments("ID"), RunE: func(c *cobra.Command, args []string) error {
			id, err := operationID(args[0])
			if err != nil {
				return err
			}
			return run(c, id)
		}}
	}
	show := byID("show", "Show one operation", func(c *cobra.Command, id uint64) error {
		return a.call(c, func(ctx context.Context, client *api.Client) error {
			o, err := client.Operations.GetOperation(ctx, &v1.GetOperationRequest{Id: id})
			if err != nil {
				return err
			}
			return a.print(&operationPage{v1Header, viewOperation(o)})
		})
	})
	watch := byID("watch", "Wait until an operation has ended", func(c *cobra.Command, id uint64) error {
		return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error { return a.watchOperation(ctx, client, id) })
	})
	cancel := byID("cancel", "End an operation and take back what it has made", func(c *cobra.Command, id uint64) error {
		return a.call(c, func(ctx context.Context, client *api.Client) error {
			o, err := client.Operations.CancelOperation(ctx, &v1.CancelOperationRequest{Id: id})
			if err != nil {
				return err
			}
			return a.print(&operationPage{v1Header, viewOperation(o)})
		})
	})
	return noun("op", "Changes that take their time", []string{"operation"}, listing, show, watch, cancel)
}

// watchPoll is how often an operation is looked at.
const watchPoll = 300 * time.Millisecond

// watchOperation waits for the end of an operation, and tells its progress.
func (a *app) watchOperation(ctx context.Context, client *api.Client, id uint64) error {
	tick := time.NewTicker(watchPoll)
	defer tick.Stop()
	told, silent := "", 0
	for {
		once, cancel := context.WithTimeout(ctx, a.timeout)
		o, err := client.Operations.GetOperation(once, &v1.GetOperationRequest{Id: id})
		cancel()
		if err != nil {
			// The node that is asked may be restarted meanwhile; the operation goes on.
			if silent++; silent > 20 || ctx.Err() != nil {
				return err
			}
		} else {
			silent = 0
			v := viewOperation(o)
			if v.State != "running" {
				if err := a.print(&operationPage{v1Header, v}); err != nil {
					return err
				}
				if v.State != "done" {
					if v.State == "cancelled" {
						return &failure{exitFailed, fmt.Errorf("operation %d was cancelled", id)}
					}
					return &failure{exitFailed, fmt.Errorf("operation %d has failed: %s", id, v.Text)}
				}
				return nil
			}
			if line := v.what() + "  " + v.progress() + "  " + v.Text; line != told {
				told = line
				fmt.Fprintln(a.err, line)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("operation %d goes on by itself: twinsan op watch %d", id, id)
		}
	}
}
