package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type scrubView struct {
	Node      string          `json:"node"`
	State     string          `json:"state"` // running, waiting, stopped
	Phase     string          `json:"phase,omitempty"`
	FullSpeed bool            `json:"full_speed"`
	Done      float64         `json:"done"` // of the pass, 0 to 1
	LeftSec   int64           `json:"left_seconds"`
	NextPass  *time.Time      `json:"next_pass,omitempty"`
	Reclaim   bool            `json:"reclaim"` // false: nothing is given back until all counts are proved
	Current   scrubResultView `json:"current"`
	Last      scrubResultView `json:"last"`
	Lost      []string        `json:"lost"`
}

type scrubResultView struct {
	Started  *time.Time `json:"started,omitempty"`
	Finished *time.Time `json:"finished,omitempty"`
	Blocks   uint64     `json:"blocks"`
	Pages    uint64     `json:"pages"`
	Bytes    uint64     `json:"bytes"`
	Damaged  uint64     `json:"damaged"`
	Repaired uint64     `json:"repaired"`
	Lost     uint64     `json:"lost"`
	Counters uint64     `json:"counters"`
}

func viewScrub(s *v1.Scrub) scrubView {
	result := func(r *v1.ScrubResult) scrubResultView {
		return scrubResultView{moment(api.Time(r.GetStarted())), moment(api.Time(r.GetFinished())), r.GetBlocks(), r.GetPages(), r.GetBytes(),
			r.GetDamaged(), r.GetRepaired(), r.GetLost(), r.GetCounters()}
	}
	v := scrubView{Node: s.Node, State: "waiting", Phase: s.Phase, FullSpeed: s.FullSpeed, Done: s.Done, LeftSec: s.LeftSeconds,
		NextPass: moment(api.Time(s.NextPass)), Reclaim: s.Reclaim, Current: result(s.Current), Last: result(s.Last), Lost: words(s.Lost)}
	switch {
	case s.Running:
		v.State = "running"
	case s.Stopped:
		v.State = "stopped"
	}
	return v
}

// summary is the scrub in one line.
func (v *scrubView) summary() string {
	switch {
	case v.State == "running":
		text := fmt.Sprintf("running, %.0f %% (%s)", v.Done*100, v.Phase)
		if v.LeftSec > 0 {
			text += ", " + (time.Duration(v.LeftSec) * time.Second).String() + " left"
		}
		return text + found(&v.Current)
	case v.Last.Finished == nil:
		return v.State + ", no pass is through yet"
	}
	return v.State + ", last pass ended " + clock(*v.Last.Finished) + found(&v.Last)
}

func found(r *scrubResultView) string {
	if r.Damaged+r.Counters == 0 {
		return ": no damage"
	}
	return fmt.Sprintf(": %d damaged, %d repaired, %d lost, %d counters corrected", r.Damaged, r.Repaired, r.Lost, r.Counters)
}

type scrubPage struct {
	version1
	Scrubs []scrubView `json:"scrubs"`
}

func (s *scrubPage) text(p *printer) {
	for _, v := range s.Scrubs {
		next := ""
		if v.NextPass != nil && v.State == "waiting" {
			next = clock(*v.NextPass)
		}
		speed := "in the background"
		if v.FullSpeed {
			speed = "full"
		}
		p.facts("node", v.Node, "scrub", v.summary(), "speed", speed,
			"read", fmt.Sprintf("%d blocks, %d pages, %s", v.Current.Blocks, v.Current.Pages, p.size(v.Current.Bytes)), "next pass", next)
		if !v.Reclaim {
			p.line("! a reference count was too low: no space is given back until a pass has found all right")
		}
		for _, l := range v.Lost {
			p.line("! no intact copy: %s", l)
		}
	}
}

func (a *app) scrubCommand() *cobra.Command {
	run := func(c *cobra.Command, args []string, action string, full bool) error {
		return a.call(c, func(ctx context.Context, client *api.Client) error {
			names, err := a.dataNodes(ctx, client, args)
			if err != nil {
				return err
			}
			page := &scrubPage{version1: v1Header, Scrubs: []scrubView{}}
			for _, name := range names {
				s, err := client.Nodes.ScrubNode(ctx, &v1.ScrubNodeRequest{Name: name, Action: action, FullSpeed: full})
				if err != nil {
					return err
				}
				page.Scrubs = append(page.Scrubs, viewScrub(s))
			}
			if err := a.print(page); err != nil {
				return err
			}
			for _, v := range page.Scrubs {
				if !v.Reclaim || len(v.Lost) > 0 {
					return &failure{exitDegraded, nil}
				}
			}
			return nil
		})
	}
	var full bool
	start := &cobra.Command{
		Use: "start [NODE]", Short: "Begin a pass now, or go on with one that was stopped", Args: oneNode,
		Long: `Read everything that is in use on a node's devices (all data nodes without NODE),
prove it by checksums, fingerprints and reference counts, and repair what is
damaged from the other nodes. It runs in the background.`,
		RunE: func(c *cobra.Command, args []string) error { return run(c, args, "start", full) },
	}
	start.Flags().BoolVar(&full, "full-speed", false, "take all the device time that it can get; without it 5 % at most")
	stop := &cobra.Command{
		Use: "stop [NODE]", Short: "Stop the pass where it is; none begins by itself until start", Args: oneNode,
		RunE: func(c *cobra.Command, args []string) error { return run(c, args, "stop", false) },
	}
	show := &cobra.Command{
		Use: "status [NODE]", Short: "Show progress and what was found", Args: oneNode,
		Long: "Show progress and what was found. Exit code 3: something is lost, or space is not given back.",
		RunE: func(c *cobra.Command, args []string) error { return run(c, args, "show", false) },
	}
	return noun("scrub", "Proof and repair of what is stored", nil, start, stop, show)
}
