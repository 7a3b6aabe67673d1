package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// mergeView is how merging does in one node's pool.
type mergeView struct {
	Node      string          `json:"node"`
	State     string          `json:"state"` // running, waiting, off
	Done      float64         `json:"done"`
	Catalogue uint64          `json:"catalogue_bytes"`
	Blocks    uint64          `json:"merged_blocks"` // since the node started
	Bytes     uint64          `json:"merged_bytes"`
	Current   mergeResultView `json:"current"`
	Last      mergeResultView `json:"last"`
}

type mergeResultView struct {
	Started  *time.Time `json:"started,omitempty"`
	Finished *time.Time `json:"finished,omitempty"`
	Looked   uint64     `json:"looked_up"`
	Found    uint64     `json:"found"`
	Blocks   uint64     `json:"merged_blocks"`
	Bytes    uint64     `json:"merged_bytes"`
	Error    string     `json:"error,omitempty"`
}

func viewMerge(m *v1.Merge) mergeView {
	result := func(r *v1.MergeResult) mergeResultView {
		return mergeResultView{moment(api.Time(r.GetStarted())), moment(api.Time(r.GetFinished())), r.GetLooked(), r.GetFound(), r.GetBlocks(), r.GetBytes(), r.GetError()}
	}
	v := mergeView{Node: m.Node, State: "waiting", Done: m.Done, Catalogue: m.CatalogueBytes, Blocks: m.Blocks, Bytes: m.Bytes,
		Current: result(m.GetCurrent()), Last: result(m.GetLast())}
	switch {
	case m.Running:
		v.State = "running"
	case !m.On:
		v.State = "off"
	}
	return v
}

// text is a pass in one line.
func (r *mergeResultView) text(p *printer) string {
	s := fmt.Sprintf("%d looked up, %d stored twice, %d merged (%s)", r.Looked, r.Found, r.Blocks, p.size(r.Bytes))
	if r.Error != "" {
		s += "; ended early: " + r.Error
	}
	return s
}

type mergePage struct {
	version1
	Merges []mergeView `json:"merges"`
}

func (m *mergePage) text(p *printer) {
	for i := range m.Merges {
		v := &m.Merges[i]
		state, last, catalogue := v.State, "none since the node started", p.size(v.Catalogue)
		switch {
		case v.State == "running":
			state = fmt.Sprintf("running, %.0f %%: %s", 100*v.Done, v.Current.text(p))
		case v.State == "off":
			state, catalogue = "off: merge-minutes is 0 in the node's file", ""
		}
		if v.Last.Finished != nil {
			last = clock(*v.Last.Finished) + ": " + v.Last.text(p)
		}
		p.facts("node", v.Node, "merge", state, "last pass", last, "since the start", fmt.Sprintf("%d merged (%s)", v.Blocks, p.size(v.Bytes)), "catalogue", catalogue)
	}
}

func (a *app) mergeCommand() *cobra.Command {
	action := func(name, verb, short, long string) *cobra.Command {
		return &cobra.Command{
			Use: name + " [NODE]", Short: short, Long: long, Args: oneNode,
			RunE: func(c *cobra.Command, args []string) error {
				return a.call(c, func(ctx context.Context, client *api.Client) error {
					names, err := a.dataNodes(ctx, client, args)
					if err != nil {
						return err
					}
					page := &mergePage{v1Header, []mergeView{}}
					for _, n := range names {
						m, err := client.Nodes.MergeNode(ctx, &v1.MergeNodeRequest{Name: n, Action: verb})
						if err != nil {
							return err
						}
						page.Merges = append(page.Merges, viewMerge(m))
					}
					return a.print(page)
				})
			},
		}
	}
	start := action("start", "start", "Begin a pass now", `Look now for blocks that the pool of a node (of all data nodes without NODE) stores
twice, and merge them. Such a pass begins by itself every merge-minutes of the node's
file, if anything was stored. It runs in the background and leaves hosts half of the time.`)
	stop := action("stop", "stop", "End the pass that runs; the next one comes at its time", "")
	show := action("status", "show", "Show progress and what was merged", "")
	return noun("merge", "Blocks that are stored twice", nil, start, stop, show)
}

// oneNode lets name one node, or none for all.
func oneNode(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usage("unexpected %q: name one node, or none for all", args[1])
	}
	return nil
}
