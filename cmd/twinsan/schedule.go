package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

type scheduleView struct {
	Volume    string     `json:"volume"`
	Every     uint64     `json:"every_seconds"`
	Keep      uint32     `json:"keep"`
	KeepDaily uint32     `json:"keep_daily"`
	Last      *time.Time `json:"last,omitempty"`
	Next      *time.Time `json:"next,omitempty"`
	Snapshots uint32     `json:"snapshots"`
}

func viewSchedule(s *v1.Schedule) scheduleView {
	return scheduleView{s.Volume, uint64(s.Every.AsDuration() / time.Second), s.Keep, s.KeepDaily, moment(api.Time(s.Last)), moment(api.Time(s.Next)), s.Snapshots}
}

type schedulesPage struct {
	version1
	Schedules []scheduleView `json:"schedules"`
}

func (s *schedulesPage) text(p *printer) {
	rows := [][]string{}
	for _, x := range s.Schedules {
		daily := ""
		if x.KeepDaily > 0 {
			daily = fmt.Sprintf("%d days", x.KeepDaily)
		}
		rows = append(rows, []string{x.Volume, period(x.Every).String(), fmt.Sprint(x.Keep), daily, fmt.Sprint(x.Snapshots), since(x.Last), since(x.Next)})
	}
	p.table("VOLUME EVERY KEEP KEEP_DAILY SNAPSHOTS LAST NEXT", rows)
}

// period is a flag: a duration with d for days and w for weeks as well. It counts seconds.
type period uint64

func (e *period) Set(text string) error {
	for unit, length := range map[string]time.Duration{"d": 24 * time.Hour, "w": 7 * 24 * time.Hour} {
		if number, ok := strings.CutSuffix(text, unit); ok {
			n, err := strconv.ParseUint(number, 10, 16)
			if err != nil {
				return fmt.Errorf("%q is no period: want 15m, 1h, 1d, 1w", text)
			}
			*e = period(time.Duration(n) * length / time.Second)
			return nil
		}
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Second || d%time.Second != 0 {
		return fmt.Errorf("%q is no period: want 15m, 1h, 1d, 1w", text)
	}
	*e = period(d / time.Second)
	return nil
}

func (e period) String() string {
	for _, u := range []struct {
		seconds period
		word    string
	}{{7 * 86400, "w"}, {86400, "d"}, {3600, "h"}, {60, "m"}} {
		if e > 0 && e%u.seconds == 0 {
			return fmt.Sprintf("%d%s", e/u.seconds, u.word)
		}
	}
	return fmt.Sprintf("%ds", uint64(e))
}

// Type names the value in usage texts.
func (e *period) Type() string { return "period" }

func (a *app) scheduleCommand() *cobra.Command {
	return noun("schedule", "Snapshots by the clock", nil, a.scheduleSet(), a.scheduleList(), a.scheduleRemove())
}

func (a *app) scheduleSet() *cobra.Command {
	var every period
	var keep, keepDaily uint32
	c := &cobra.Command{
		Use: "set VOLUME --every PERIOD --keep N", Short: "Take snapshots of a volume by the clock and delete old ones",
		Long: `Take snapshots of a volume by the clock and delete old ones. Runs fall on whole
periods of UTC: --every 1h runs at each full hour. A run that was missed, because
the cluster was down, is made up once. Every run is an event.

The newest N stay, and of the older ones the newest of each of the last days that
--keep-daily names. Snapshots that an administrator took are never deleted.`,
		Example: "  twinsan snapshot schedule set csv1 --every 1h --keep 24 --keep-daily 7", Args: arguments("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			if every == 0 || keep == 0 {
				return usage("--every and --keep are needed\n  usage: %s", c.UseLine())
			}
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				s, err := client.Snapshots.SetSchedule(ctx, &v1.SetScheduleRequest{
					Volume: args[0], Every: durationpb.New(time.Duration(every) * time.Second), Keep: keep, KeepDaily: keepDaily,
				})
				if err != nil {
					return err
				}
				a.next("twinsan snapshot schedule list")
				return a.print(&schedulesPage{v1Header, []scheduleView{viewSchedule(s)}})
			})
		},
	}
	c.Flags().Var(&every, "every", "time between two snapshots: 15m, 1h, 1d, 1w; at least 1m")
	c.Flags().Uint32Var(&keep, "keep", 0, "how many of the newest stay")
	c.Flags().Uint32Var(&keepDaily, "keep-daily", 0, "of how many days one stays")
	return c
}

func (a *app) scheduleList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the schedules", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				r, err := client.Snapshots.ListSchedules(ctx, &v1.ListSchedulesRequest{})
				if err != nil {
					return err
				}
				if len(r.Schedules) == 0 {
					a.next("twinsan snapshot schedule set VOLUME --every 1h --keep 24")
				} else {
					a.next("twinsan snapshot list --volume %s", r.Schedules[0].Volume)
				}
				return a.print(&schedulesPage{v1Header, views(r.Schedules, viewSchedule)})
			})
		},
	}
}

type scheduleRemovedPage struct {
	version1
	Volume string `json:"volume"`
}

func (r *scheduleRemovedPage) text(p *printer) {
	p.line("volume %s has no schedule any more; its snapshots stay", r.Volume)
}

func (a *app) scheduleRemove() *cobra.Command {
	return &cobra.Command{
		Use: "remove VOLUME", Short: "Take no more snapshots by the clock; those that are there stay", Args: arguments("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.call(c, func(ctx context.Context, client *api.Client) error {
				if _, err := client.Snapshots.RemoveSchedule(ctx, &v1.RemoveScheduleRequest{Volume: args[0]}); err != nil {
					return err
				}
				a.next("twinsan snapshot list --volume %s", args[0])
				return a.print(&scheduleRemovedPage{v1Header, args[0]})
			})
		},
	}
}
