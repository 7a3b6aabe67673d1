package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type statusPage struct {
	version1
	Cluster    string        `json:"cluster"`
	Health     string        `json:"health"`
	Quorum     bool          `json:"quorum"`
	Leader     string        `json:"leader"`
	Voters     uint32        `json:"voters"`
	VotersUp   uint32        `json:"voters_up"`
	AnsweredBy string        `json:"answered_by"`
	Problems   []problemView `json:"problems"`
	Nodes      []nodeView    `json:"nodes"`
	Volumes    []volumeView  `json:"volumes"`

	Risk       riskView        `json:"risk"`
	Operations []operationView `json:"operations"`
}

// riskView is what the next failure of a single node does.
type riskView struct {
	Survives bool       `json:"survives_any_node"`
	Text     string     `json:"text"`
	Stops    []stopView `json:"stops"`
}

type stopView struct {
	Node    string   `json:"node"`
	Volumes []string `json:"volumes"`
	Quorum  bool     `json:"quorum_lost"`
}

func viewRisk(r *v1.Risk) riskView {
	return riskView{r.GetSurvives(), r.GetText(), views(r.GetStops(), func(x *v1.Stop) stopView { return stopView{x.Node, words(x.Volumes), x.Quorum} })}
}

func newStatusPage(s *v1.Status) *statusPage {
	return &statusPage{
		version1: v1Header, Cluster: s.Cluster, Health: api.Word(s.Health, "HEALTH_"), Quorum: s.Quorum, Leader: s.Leader,
		Voters: s.Voters, VotersUp: s.VotersUp, AnsweredBy: s.AnsweredBy,
		Problems: views(s.Problems, viewProblem), Nodes: views(s.Nodes, viewNode), Volumes: views(s.Volumes, viewVolume),
		Risk: viewRisk(s.Risk), Operations: views(s.Operations, viewOperation),
	}
}

func (s *statusPage) text(p *printer) {
	leader := "no leader"
	if s.Leader != "" {
		leader = "leader " + s.Leader
	}
	p.line("cluster %s   %s   %d of %d voters, %s", s.Cluster, strings.ToUpper(s.Health), s.VotersUp, s.Voters, leader)
	for _, x := range s.Problems {
		mark := "!"
		if x.Severity == "healthy" {
			mark = "i"
		}
		p.line("%s %s", mark, x.Cause)
		p.line("    risk: %s", x.Risk)
		p.line("    do:   %s", x.Remedy)
	}
	if s.Risk.Text != "" {
		p.line("next failure: %s", s.Risk.Text)
	}
	p.line("")
	nodeTable(p, s.Nodes)
	if len(s.Volumes) > 0 {
		p.line("")
		volumeTable(p, s.Volumes)
	}
	for _, n := range s.Nodes {
		if n.Scrub != nil && n.Scrub.State == "running" {
			p.line("scrub %s  %s", n.Name, n.Scrub.summary())
		}
	}
	for _, v := range s.Volumes {
		for _, r := range v.Replicas {
			if r.State == "syncing" {
				p.line("resync %s %s  %s  %s left%s", v.Name, r.Node, bar(r.ResyncDone, r.ResyncTotal), p.size(r.ResyncTotal-min(r.ResyncDone, r.ResyncTotal)), timeLeft(r.ResyncLeft))
			}
		}
	}
	for _, o := range s.Operations {
		if o.State == "running" {
			p.line("%s", strings.TrimRight(fmt.Sprintf("operation %d  %s  %s", o.ID, o.what(), o.Text), " "))
		}
	}
}

func (a *app) statusCommand() *cobra.Command {
	var wait string
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what is wrong, what it risks and what to do",
		Long:  "Show the health of the cluster. Exit code 0: healthy; 3: degraded or worse.",
		Args:  arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				s, err := client.Cluster.GetStatus(ctx, &v1.GetStatusRequest{})
				for wait != "" && (err != nil || api.Word(s.GetHealth(), "HEALTH_") != wait) {
					select {
					case <-time.After(200 * time.Millisecond):
					case <-ctx.Done():
						if err == nil {
							err = fmt.Errorf("the cluster is %s and not %s within %s", api.Word(s.GetHealth(), "HEALTH_"), wait, a.timeout)
						}
						return err
					}
					var next *v1.Status
					if next, err = client.Cluster.GetStatus(ctx, &v1.GetStatusRequest{}); err == nil {
						s = next
					}
				}
				if err != nil {
					return err
				}
				page := newStatusPage(s)
				if err := a.print(page); err != nil {
					return err
				}
				if page.Health != "healthy" {
					return &failure{exitDegraded, nil}
				}
				if len(page.Volumes) == 0 {
					a.next("twinsan volume create NAME SIZE --host HOST")
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&wait, "wait", "", "wait until the cluster is in this state (healthy or degraded), at most --timeout")
	return c
}
