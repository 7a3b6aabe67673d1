package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	v1 "github.com/twinsan/twinsan/api/v1"
)

// explainedView is what the pool of a node is taken by. The sum of volumes to available is size.
type explainedView struct {
	Node      string `json:"node"`
	Size      uint64 `json:"size_bytes"`
	Volumes   uint64 `json:"volumes_bytes"`
	Snapshots uint64 `json:"snapshots_bytes"`
	Leaving   uint64 `json:"leaving_bytes"`
	Unsettled uint64 `json:"unsettled_bytes"`
	Metadata  uint64 `json:"metadata_bytes"`
	Garbage   uint64 `json:"garbage_bytes"`
	Returning uint64 `json:"returning_bytes"`
	Reserved  uint64 `json:"reserved_bytes"`
	Available uint64 `json:"available_bytes"`

	Usable       uint64 `json:"usable_bytes"`
	Live         uint64 `json:"live_bytes"`
	Mapped       uint64 `json:"mapped_bytes"`
	Deduplicated uint64 `json:"deduplicated_bytes"`
	Compressed   uint64 `json:"compressed_bytes"`
	Zeros        uint64 `json:"zeros_bytes"` // since the node started

	Estimated bool        `json:"estimated"`
	Sample    uint64      `json:"sample"` // one block of so many was looked at
	List      []shareView `json:"volumes"`

	Forecast forecastView `json:"forecast"`
}

type shareView struct {
	ID            uint64 `json:"id"`
	Name          string `json:"name"`
	Deleted       bool   `json:"deleted"`
	Size          uint64 `json:"size_bytes"`
	Mapped        uint64 `json:"mapped_bytes"`
	Reduced       uint64 `json:"reduced_bytes"`
	Stored        uint64 `json:"stored_bytes"`
	Snapshots     uint64 `json:"snapshots"`
	Own           uint64 `json:"own_bytes"`
	SnapshotsOnly uint64 `json:"snapshots_only_bytes"`
	Frees         uint64 `json:"frees_bytes"`
	FreesMetadata uint64 `json:"frees_metadata_bytes"`
}

type forecastView struct {
	Known   bool        `json:"known"`
	History int64       `json:"history_seconds"`
	Needed  int64       `json:"needed_seconds"`
	Growth  float64     `json:"growth_bytes_per_day"`
	Levels  []levelView `json:"levels"`
}

type levelView struct {
	Percent uint32 `json:"percent"`
	// Days from now, 0 when it is reached; absent when it is not at this pace.
	Days *float64 `json:"days,omitempty"`
}

func viewExplained(x *v1.PoolExplained) explainedView {
	v := explainedView{
		Node: x.Node, Size: x.SizeBytes, Volumes: x.VolumesBytes, Snapshots: x.SnapshotsBytes, Leaving: x.LeavingBytes, Unsettled: x.UnsettledBytes,
		Metadata: x.MetadataBytes, Garbage: x.GarbageBytes, Returning: x.ReturningBytes, Reserved: x.ReservedBytes, Available: x.AvailableBytes,
		Usable: x.UsableBytes, Live: x.LiveBytes, Mapped: x.MappedBytes, Deduplicated: x.DeduplicatedBytes, Compressed: x.CompressedBytes, Zeros: x.ZerosBytes,
		Estimated: x.Sample > 1, Sample: x.Sample,
		List: views(x.Volumes, func(s *v1.VolumeShare) shareView {
			return shareView{s.Id, s.Name, s.Deleted, s.SizeBytes, s.MappedBytes, s.ReducedBytes, s.StoredBytes, s.Snapshots, s.OwnBytes, s.SnapshotsOnlyBytes, s.FreesBytes, s.FreesMetadataBytes}
		}),
	}
	f := x.GetForecast()
	v.Forecast = forecastView{Known: f.GetKnown(), History: f.GetHistorySeconds(), Needed: f.GetNeededSeconds(), Growth: f.GetGrowthBytesPerDay(), Levels: []levelView{}}
	for _, l := range f.GetLevels() {
		level := levelView{Percent: l.Percent}
		if l.Days >= 0 {
			level.Days = &l.Days
		}
		v.Forecast.Levels = append(v.Forecast.Levels, level)
	}
	return v
}

// text says the forecast in a line.
func (f *forecastView) text(p *printer) string {
	if !f.Known {
		return fmt.Sprintf("the history of %s is too short: %s are needed", duration(f.History), duration(f.Needed))
	}
	s := fmt.Sprintf("grows by %s a day", p.size(uint64(max(f.Growth, 0))))
	if f.Growth < 1 {
		s = "does not grow"
	}
	s += fmt.Sprintf(" (history of %s)", duration(f.History))
	for _, l := range f.Levels {
		switch {
		case l.Days == nil:
		case *l.Days == 0:
			s += fmt.Sprintf("; %d %% is reached", l.Percent)
		default:
			s += fmt.Sprintf("; %d %% in %s", l.Percent, days(*l.Days))
		}
	}
	return s
}

// duration is a span of time as people say it.
func duration(seconds int64) string {
	if seconds < 2*86400 {
		return fmt.Sprintf("%d hours", seconds/3600)
	}
	return fmt.Sprintf("%d days", seconds/86400)
}

func days(n float64) string {
	switch {
	case n < 2:
		return fmt.Sprintf("%.0f hours", math.Ceil(n*24))
	case n < 730:
		return fmt.Sprintf("%.0f days", n)
	}
	return "more than two years"
}

type explainPage struct {
	version1
	Pools []explainedView `json:"pools"`
}

func (x *explainPage) text(p *printer) {
	for i := range x.Pools {
		if i > 0 {
			p.line("")
		}
		v := &x.Pools[i]
		about := ""
		if v.Estimated {
			about = fmt.Sprintf(" (estimated from one block of %d; --exact looks at all)", v.Sample)
		}
		p.line("pool of node %s, %s%s", v.Node, p.size(v.Size), about)
		rows := [][]string{}
		for _, part := range []struct {
			name, what string
			bytes      uint64
			always     bool
		}{
			{"volumes", "blocks that volumes map, each once", v.Volumes, true},
			{"snapshots", "blocks that only snapshots map", v.Snapshots, true},
			{"leaving", "blocks of what was deleted, on their way back", v.Leaving, false},
			{"unsettled", "blocks that came or went meanwhile", v.Unsettled, false},
			{"metadata", "maps and block identities", v.Metadata, true},
			{"garbage", "overwritten and deleted; the cleaner gives it back", v.Garbage, true},
			{"returning", "was garbage, is free in a minute", v.Returning, false},
			{"reserved", "free, kept for the cleaner and for garbage", v.Reserved, true},
			{"available", "free, for new data", v.Available, true},
			{"size", "", v.Size, true},
		} {
			if part.always || part.bytes > 0 {
				rows = append(rows, []string{part.name, p.size(part.bytes), fmt.Sprintf("%.1f %%", 100*float64(part.bytes)/float64(max(v.Size, 1))), part.what})
			}
		}
		p.table("PART BYTES SHARE WHAT", rows)
		saved := fmt.Sprintf("%s of %s that volumes map is stored once for several, %s is compressed away %s", p.size(v.Deduplicated), p.size(v.Mapped), p.size(v.Compressed), savings(v.Mapped, v.Volumes))
		if v.Mapped == 0 {
			saved = ""
		}
		zeros := ""
		if v.Zeros > 0 {
			zeros = p.size(v.Zeros) + " written since the node started, stored nowhere"
		}
		p.facts("used", fmt.Sprintf("%s of %s usable", p.size(v.Live), p.size(v.Usable)), "saved", saved, "zeros", zeros, "forecast", v.Forecast.text(p))
		if len(v.List) == 0 {
			continue
		}
		rows = [][]string{}
		for _, s := range v.List {
			name := s.Name
			if name == "" {
				name = fmt.Sprintf("(%d)", s.ID)
			}
			if s.Deleted {
				name += ", deleted"
			}
			rows = append(rows, []string{name, p.size(s.Size), p.size(s.Mapped), p.size(s.Stored), savings(s.Mapped, s.Stored), fmt.Sprint(s.Snapshots), p.size(s.SnapshotsOnly), p.size(s.Frees + s.FreesMetadata)})
		}
		p.table("VOLUME SIZE WRITTEN STORED SAVINGS SNAPSHOTS ONLY_IN_THEM DELETE_FREES", rows)
	}
}

func (a *app) poolCommand() *cobra.Command {
	var exact bool
	explain := &cobra.Command{
		Use: "explain [NODE]", Short: "Say what the pool is taken by, what deleting frees, and when it is full",
		Long: `Say what every byte of a node's pool (of all data nodes without NODE) is there
for, what each volume takes, and when the pool is full if it goes on growing.

WRITTEN is what a volume maps, STORED what that takes, each block once, whoever
else names it too. DELETE FREES is what becomes free when a volume is deleted with
its snapshots, ONLY IN THEM when its snapshots are: what clones or equal blocks of
other volumes need stays.

It reads the maps, which takes its time; Ctrl-C ends it. A pool with more than
64 GiB of blocks is sampled, unless --exact.`,
		Args: oneNode,
		RunE: func(c *cobra.Command, args []string) error {
			return a.stream(c.Context(), func(ctx context.Context, client *api.Client) error {
				names, err := a.dataNodes(ctx, client, args)
				if err != nil {
					return err
				}
				page := &explainPage{v1Header, []explainedView{}}
				for _, name := range names {
					v, err := a.explainPool(ctx, client, name, exact)
					if err != nil {
						return err
					}
					page.Pools = append(page.Pools, *v)
				}
				return a.print(page)
			})
		},
	}
	explain.Flags().BoolVar(&exact, "exact", false, "look at every block, however long it takes")
	return noun("pool", "The pools of devices of the nodes", nil, explain, a.mergeCommand())
}

// dataNodes are the named nodes, or, when none is named, the names of all that have a pool.
func (a *app) dataNodes(ctx context.Context, client *api.Client, names []string) ([]string, error) {
	if len(names) > 0 {
		return names, nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	r, err := client.Nodes.ListNodes(ctx, &v1.ListNodesRequest{})
	if err != nil {
		return nil, err
	}
	for _, n := range r.Nodes {
		if n.Role == v1.Role_ROLE_DATA {
			names = append(names, n.Name)
		}
	}
	return names, nil
}

// explainPool waits for the explanation of one pool, and tells its progress.
func (a *app) explainPool(ctx context.Context, client *api.Client, name string, exact bool) (*explainedView, error) {
	stream, err := client.Nodes.ExplainPool(ctx, &v1.ExplainPoolRequest{Name: name, Exact: exact})
	if err != nil {
		return nil, err
	}
	told := -1
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("node %s has ended without an answer", name)
		}
		if err != nil {
			return nil, err
		}
		if m.Pool != nil {
			v := viewExplained(m.Pool)
			return &v, nil
		}
		if percent := int(m.Done * 100); told/5 < percent/5 && percent < 100 {
			told = percent
			fmt.Fprintf(a.err, "reading the maps of node %s %s\n", name, bar(uint64(percent), 100))
		}
	}
}
